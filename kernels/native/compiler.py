"""Builds the C code for this machine's processor, once, and loads it.

The wheel carries C source, not binaries: one wheel serves every platform, and the compiler
may use all of the processor's vector instructions. There are two libraries: `KERNELS`, on
PyTorch's OpenMP threads, and `PACKING`, which needs neither. Each is cached by a hash of its
sources, the compiler and the processor's features, so an update or another machine sharing the
home folder builds its own.
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
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from multilora_kernels.native.trust import distrust

logger = logging.getLogger(__name__)

SOURCE_FOLDER = Path(__file__).parent
_FLAGS = ("-std=gnu11", "-O3", "-march=native", "-ffp-contract=off", "-fPIC", "-Wno-psabi")
_COMPILE_SECONDS = 120


@dataclass(frozen=True)
class Library:
    """C code that is built into one shared library.

    Attributes:
        name: What its file's name begins with.
        sources: The files to compile.
        headers: The files that they include.
        openmp: Whether it runs on OpenMP's threads.
    """

    name: str
    sources: tuple[Path, ...]
    headers: tuple[Path, ...]
    openmp: bool


def _files(*names: str) -> tuple[Path, ...]:
    return tuple(SOURCE_FOLDER / name for name in names)


KERNELS = Library(
    "kernels",
    _files("segment_gemm.c", "scatter.c"),
    _files("vectors.h", "dot_products.h", "outer_products.h", "streaming.h"),
    openmp=True,
)
PACKING = Library("packing", _files("pack.c"), _files("vectors.h", "streaming.h"), openmp=False)


class NativeUnavailableError(RuntimeError):
    """The C code cannot be built or loaded here; the message says why and what to do."""


def is_available() -> bool:
    """Whether the C kernels are built, or can be built, here; builds them."""
    try:
        load_library()
    except NativeUnavailableError:
        return False
    return True


@lru_cache(maxsize=1)
def load_library() -> ctypes.PyDLL:
    """The compiled kernels, built first if no cached build fits.

    The library is a `PyDLL`, which keeps the GIL: a call takes tens of microseconds, and a
    thread that gave up the GIL might wait for milliseconds to get it back in a busy process.

    Raises:
        NativeUnavailableError: No C compiler, a failed compilation, or no OpenMP runtime.
    """
    _make_openmp_visible()
    library = _load(KERNELS)
    return ctypes.PyDLL(library._name, handle=library._handle)


@lru_cache(maxsize=1)
def load_releasing_library() -> ctypes.CDLL:
    """The same library through calls that release the GIL: for those of milliseconds.

    Raises:
        NativeUnavailableError: As for `load_library`.
    """
    library = load_library()
    return ctypes.CDLL(library._name, handle=library._handle)


@lru_cache(maxsize=1)
def load_packing_library() -> ctypes.CDLL:
    """The compiled packing code, built first if no cached build fits; calls release the GIL.

    Raises:
        NativeUnavailableError: No C compiler, or a failed compilation.
    """
    return _load(PACKING)


def _load(library: Library) -> ctypes.CDLL:
    with built(library) as path:
        try:
            return ctypes.CDLL(str(path))
        except OSError as error:
            raise NativeUnavailableError(
                f"cannot load the compiled {library.name} {path}: {error}"
            ) from None


def _make_openmp_visible() -> None:
    """Lets the library find PyTorch's own OpenMP runtime.

    The library is linked without one, so that its threads are PyTorch's threads: a second
    runtime would bring a second pool that fights the first for the cores and ignores the
    processor binding that vLLM sets up.
    """
    import torch

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


@contextmanager
def built(library: Library) -> Iterator[Path]:
    """The path of a library that fits this machine; it may be gone after the block.

    It is taken from the cache folder or built there. Where that folder is the default one and
    cannot be had, or others could have written to it, it is built in a private temporary folder.

    Raises:
        NativeUnavailableError: It cannot be built; or the folder in `MULTILORA_CACHE_DIR` is not
            one to load code from.
    """
    command = _compiler()
    name = f"{library.name}-{_fingerprint(library, command)}.so"
    if configured := os.environ.get("MULTILORA_CACHE_DIR"):
        yield _cached(library, command, Path(configured) / name)
        return
    try:
        path = _cached(library, command, _default_cache() / name)
    except _CacheUnusableError as error:
        with tempfile.TemporaryDirectory(prefix="vllm-multilora-") as folder:
            logger.warning(
                "The C code (%s) is compiled for this process alone, since it cannot be kept: %s",
                library.name,
                error,
            )
            yield _compile(library, command, Path(folder) / name)
        return
    yield path


class _CacheUnusableError(NativeUnavailableError):
    """Nothing can be kept in the cache folder, or nothing in it can be trusted."""


def _default_cache() -> Path:
    if home := os.environ.get("XDG_CACHE_HOME"):
        return Path(home) / "vllm-multilora"
    try:
        return Path.home() / ".cache" / "vllm-multilora"
    except RuntimeError:  # neither HOME nor an entry in the user database
        raise _CacheUnusableError(
            f"user {os.geteuid()} has no home folder; set MULTILORA_CACHE_DIR to a folder of its "
            "own"
        ) from None


def _cached(library: Library, command: list[str], path: Path) -> Path:
    """The library's file in a cache folder, compiled if it is not there yet."""
    folder = path.parent
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        reason = distrust(folder) or (distrust(path) if path.exists() else "")
    except OSError as error:
        raise _CacheUnusableError(_not_writable(folder, error)) from None
    if reason:
        raise _CacheUnusableError(
            f"{reason}, so that code in it may be another user's; give it to user {os.geteuid()} "
            f"and run `chmod go-w` on it, or set MULTILORA_CACHE_DIR to a folder of its own"
        )
    if path.exists():
        return path
    try:
        work = tempfile.mkdtemp(prefix=".build-", dir=folder)
    except OSError as error:
        raise _CacheUnusableError(_not_writable(folder, error)) from None
    try:
        # Renamed into place: another process may be building the same one.
        _compile(library, command, Path(work) / path.name).replace(path)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return path


def _not_writable(folder: Path, error: OSError) -> str:
    return (
        f"cannot write to the cache folder {folder}: {error}; set MULTILORA_CACHE_DIR to a folder "
        "that can be written"
    )


def _compiler() -> list[str]:
    compiler = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")
    compiler = compiler or shutil.which("cc")
    if compiler is None:
        raise NativeUnavailableError(
            "no C compiler found (looked for $CC, gcc, clang, cc); install one, for example "
            "`apt-get install gcc`, to use the native CPU kernels"
        )
    return compiler.split()


def _compile(library: Library, command: list[str], path: Path) -> Path:
    """Compiles and links a library, in a folder that is nobody else's."""
    flags = (*_FLAGS, f"-I{SOURCE_FOLDER}", *(["-fopenmp"] if library.openmp else []))
    objects = []
    for source in library.sources:
        objects.append(str(path.with_name(f"{source.stem}.o")))
        _run([*command, *flags, "-c", str(source), "-o", objects[-1]])
    # Linking apart from compiling, so that -fopenmp adds no OpenMP runtime of its own.
    _run([*command, "-shared", *objects, "-o", str(path)])
    path.chmod(0o700)
    logger.info("Compiled the native %s with %s: %s", library.name, command[0], path)
    return path


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


def _fingerprint(library: Library, command: list[str]) -> str:
    version = _run([*command, "--version"])
    files = (*library.sources, *library.headers)
    digest = hashlib.sha256(b"".join(file.read_bytes() for file in files))
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
