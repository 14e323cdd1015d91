"""Builds the C kernels for this machine's processor, once, and loads them.

The wheel carries C source, not binaries: one wheel serves every platform, and the compiler
may use all of the processor's vector instructions. The shared library is cached by a hash of
the sources, the compiler and the processor's features, so an update or another machine sharing
the home folder builds its own.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from functools import lru_cache
from pathlib import Path

import torch

logger = logging.getLogger(__name__)

SOURCE_FOLDER = Path(__file__).parent
SOURCE = SOURCE_FOLDER / "segment_gemm.c"
MOVE_SOURCES = tuple(SOURCE_FOLDER / name for name in ("blocks.c", "scatter.c"))
"""What moves adapters: from their files into host memory, and from there into slots."""
_INCLUDED = tuple(
    SOURCE_FOLDER / name for name in ("vectors.h", "dot_products.h", "outer_products.h")
)
_FLAGS = ("-std=gnu11", "-O3", "-march=native", "-ffp-contract=off", "-fPIC", "-Wno-psabi")
_COMPILE_SECONDS = 120


class NativeUnavailableError(RuntimeError):
    """The C kernels cannot be built or loaded here; the message says why and what to do."""


def cache_dir() -> Path:
    """Where built kernels are kept: `MULTILORA_CACHE_DIR`, else below `XDG_CACHE_HOME`."""
    if configured := os.environ.get("MULTILORA_CACHE_DIR"):
        return Path(configured)
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(home) / "vllm-multilora"


@lru_cache(maxsize=1)
def load_library() -> ctypes.PyDLL:
    """The compiled kernels, built first if no cached build fits.

    The library is a `PyDLL`, which keeps the GIL: a call takes tens of microseconds, and a
    thread that gave up the GIL might wait for milliseconds to get it back in a busy process.

    Raises:
        NativeUnavailableError: No C compiler, a failed compilation, or no OpenMP runtime.
    """
    _make_openmp_visible()
    library = _build()
    try:
        return ctypes.PyDLL(str(library))
    except OSError as error:
        raise NativeUnavailableError(
            f"cannot load the compiled kernels {library}: {error}"
        ) from None


@lru_cache(maxsize=1)
def load_releasing_library() -> ctypes.CDLL:
    """The same library through calls that release the GIL: for those of milliseconds.

    Raises:
        NativeUnavailableError: As for `load_library`.
    """
    return ctypes.CDLL(load_library()._name)


def _make_openmp_visible() -> None:
    """Lets the library find PyTorch's own OpenMP runtime.

    The library is linked without one, so that its threads are PyTorch's threads: a second
    runtime would bring a second pool that fights the first for the cores and ignores the
    processor binding that vLLM sets up.
    """
    if hasattr(ctypes.CDLL(None), "GOMP_parallel"):
        return
    packages = Path(torch.__file__).parent
    for folder in (packages / "lib", packages.parent / "torch.libs"):
        for candidate in sorted(folder.glob("lib[gi]omp*.so*")):
            if hasattr(ctypes.CDLL(str(candidate), mode=ctypes.RTLD_GLOBAL), "GOMP_parallel"):
                return
    raise NativeUnavailableError(
        "PyTorch's OpenMP runtime (libgomp or libiomp5) was not found beside torch in "
        f"{packages / 'lib'}; the native kernels share its threads and do not run without it"
    )


def _build() -> Path:
    compiler = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")
    compiler = compiler or shutil.which("cc")
    if compiler is None:
        raise NativeUnavailableError(
            "no C compiler found (looked for $CC, gcc, clang, cc); install one, for example "
            "`apt-get install gcc`, to use the native CPU kernels"
        )
    command = compiler.split()
    library = cache_dir() / f"kernels-{_fingerprint(command)}.so"
    if library.exists():
        return library
    try:
        library.parent.mkdir(parents=True, exist_ok=True)
        build_dir = tempfile.mkdtemp(prefix=".build-", dir=library.parent)
    except OSError as error:
        raise NativeUnavailableError(
            f"cannot write to the cache folder {library.parent}: {error}; set MULTILORA_CACHE_DIR "
            "to a folder that can be written"
        ) from None
    try:
        # Linking apart from compiling, so that -fopenmp adds no OpenMP runtime of its own.
        built = Path(build_dir) / library.name
        objects = [str(Path(build_dir) / f"{source.stem}.o") for source in _sources()]
        for source, compiled in zip(_sources(), objects, strict=True):
            include = f"-I{SOURCE_FOLDER}"
            _run([*command, *_FLAGS, "-fopenmp", include, "-c", str(source), "-o", compiled])
        _run([*command, "-shared", *objects, "-o", str(built)])
        built.replace(library)  # atomic: another process may be building the same one
        logger.info("Compiled the native CPU kernels with %s: %s", compiler, library)
    finally:
        shutil.rmtree(build_dir, ignore_errors=True)
    return library


def _sources() -> tuple[Path, ...]:
    return SOURCE, *MOVE_SOURCES


def _run(command: list[str]) -> str:
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=_COMPILE_SECONDS, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise NativeUnavailableError(f"`{' '.join(command)}` did not run: {error}") from None
    if done.returncode:
        raise NativeUnavailableError(
            f"`{' '.join(command)}` failed with exit status {done.returncode}:\n"
            f"{done.stderr.strip()[-2000:]}"
        )
    return done.stdout


def _fingerprint(command: list[str]) -> str:
    version = _run([*command, "--version"])
    sources = (*_sources(), *_INCLUDED)
    digest = hashlib.sha256(b"".join(source.read_bytes() for source in sources))
    for part in (" ".join(command), version, " ".join(_FLAGS), platform.machine(), _cpu_features()):
        digest.update(part.encode())
    return digest.hexdigest()[:16]


def _cpu_features() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    keys = ("flags", "Features", "model name", "CPU part")
    return "\n".join(sorted({line for line in lines if line.startswith(keys)}))
