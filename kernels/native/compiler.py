"""Loads the C code: as it came in the wheel, or compiled once from the sources beside this file.

A wheel carries no sources, but a build for each instruction set (see `builds`). A source tree
carries no builds: each is compiled when it is first used, and kept by a hash of its sources, flags
and compiler, so that nothing stale is ever loaded. There are two libraries: `KERNELS`, on
PyTorch's OpenMP threads, and `PACKING`, which needs neither.
"""

from __future__ import annotations

import ctypes
import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache, partial
from pathlib import Path

from multilora_kernels.cache_folder import default_cache_folder
from multilora_kernels.native.builds import (
    BUILT_FOLDER,
    KERNELS,
    PACKING,
    InstructionSet,
    Library,
    NativeUnavailableError,
    compile_library,
    compiler,
    fingerprint,
)
from multilora_kernels.native.processor import chosen_set
from multilora_kernels.native.trust import distrust

logger = logging.getLogger(__name__)


@lru_cache(maxsize=1)
def is_available() -> bool:
    """Whether the C kernels are built, or can be built, here; builds them.

    It tries once, as a build that fails may take long, and the log says why it fails.
    """
    try:
        load_library()
    except NativeUnavailableError as error:
        logger.warning(
            "There are no native CPU kernels, and plain PyTorch, which is slower, computes in "
            "their place: %s",
            error,
        )
        return False
    return True


@lru_cache(maxsize=1)
def load_library() -> ctypes.PyDLL:
    """The compiled kernels.

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
    """The compiled packing code; calls release the GIL.

    Raises:
        NativeUnavailableError: No C compiler, or a failed compilation.
    """
    return _load(PACKING)


def check_size(library: ctypes.CDLL, constant: str, size: int) -> None:
    """Makes sure that a struct is as long in C as where Python fills it.

    Args:
        library: The loaded library.
        constant: Holds the size of the struct there.
        size: What Python takes it for, in bytes.

    Raises:
        NativeUnavailableError: It is not: the library is from other sources than this package.
    """
    found = ctypes.c_int64.in_dll(library, constant).value
    if found != size:
        raise NativeUnavailableError(
            f"{library._name} was built from other sources than this package: {constant} is "
            f"{found} there and {size} here; reinstall vllm-multilora"
        )


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

    It came with the installation, or its sources did. Then it is taken from the cache folder or
    built there. Where that folder is the default one and cannot be had, or others could have
    written to it, it is built in a private temporary folder.

    Raises:
        NativeUnavailableError: It cannot be built; or the folder in `MULTILORA_CACHE_DIR` is not
            one to load code from; or `MULTILORA_INSTRUCTIONS` names no set that runs here.
    """
    instructions = chosen_set()
    if not library.sources[0].exists():
        yield _installed(library, instructions)
        return
    command = compiler()
    key = fingerprint(library, instructions, command)
    name = f"{library.name}-{instructions.name}-{key}.so"
    build = partial(_compile, library, instructions, command)
    if configured := os.environ.get("MULTILORA_CACHE_DIR"):
        yield _cached(build, Path(configured) / name)
        return
    try:
        path = _cached(build, _default_cache() / name)
    except _CacheUnusableError as error:
        with tempfile.TemporaryDirectory(prefix="vllm-multilora-") as folder:
            logger.warning(
                "The C code (%s) is compiled for this process alone, since it cannot be kept: %s",
                library.name,
                error,
            )
            yield build(Path(folder) / name)
        return
    yield path


def _installed(library: Library, instructions: InstructionSet) -> Path:
    path = BUILT_FOLDER / library.file_name(instructions)
    if not path.exists():
        raise NativeUnavailableError(
            f"{path} is missing, and so are its sources: this installation is not whole; reinstall "
            "vllm-multilora"
        )
    return path


class _CacheUnusableError(NativeUnavailableError):
    """Nothing can be kept in the cache folder, or nothing in it can be trusted."""


def _default_cache() -> Path:
    folder = default_cache_folder()
    if folder is None:
        raise _CacheUnusableError(
            f"user {os.geteuid()} has no home folder; set MULTILORA_CACHE_DIR to a folder of its "
            "own"
        )
    return folder


def _cached(build: Callable[[Path], Path], path: Path) -> Path:
    """The library's file in a cache folder, compiled if it is not there yet."""
    folder = path.parent
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        # Without links, which others might lead elsewhere once the folder has been looked at.
        folder = folder.resolve(strict=True)
        path = folder / path.name
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
        build(Path(work) / path.name).replace(path)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return path


def _not_writable(folder: Path, error: OSError) -> str:
    return (
        f"cannot write to the cache folder {folder}: {error}; set MULTILORA_CACHE_DIR to a folder "
        "that can be written"
    )


def _compile(
    library: Library, instructions: InstructionSet, command: list[str], path: Path
) -> Path:
    compile_library(library, instructions, command, path).chmod(0o700)
    logger.info("Compiled the native %s with %s: %s", library.name, command[0], path)
    return path
