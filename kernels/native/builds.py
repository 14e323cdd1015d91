"""What the C code is compiled from, for which processors, and how.

`setup.py` loads this file by its path, to build what a wheel carries: nothing here imports the
package.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

BUILT_FOLDER = Path(__file__).parent
SOURCE_FOLDER = BUILT_FOLDER / "sources"
X86_MACHINES = ("x86_64", "AMD64")
_FLAGS = ("-std=gnu11", "-O3", "-ffp-contract=off", "-fPIC", "-Wno-psabi")
_LINK_FLAGS = ("-shared", "-static-libgcc")
_COMPILE_SECONDS = 600  # usually two, on a machine with nothing else to do


class NativeUnavailableError(RuntimeError):
    """The C code cannot be built or loaded here; the message says why and what to do."""


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

    def file_name(self, instructions: InstructionSet) -> str:
        """What its build for an instruction set is called in a wheel."""
        return f"{self.name}-{instructions.name}.so"


@dataclass(frozen=True)
class InstructionSet:
    """What the compiler may take for granted about the processor.

    It alone decides the bits of results, with the sources: neither the compiler's tuning nor
    other instructions change the order of sums.

    Attributes:
        name: As in `MULTILORA_INSTRUCTIONS` and in files' names.
        flags: The compiler's.
        needs: What the processor must have, as Linux calls it in /proc/cpuinfo.
    """

    name: str
    flags: tuple[str, ...]
    needs: frozenset[str] = frozenset()


def _files(*names: str) -> tuple[Path, ...]:
    return tuple(SOURCE_FOLDER / name for name in names)


_EXPERTS = "../../experts/sources/"
KERNELS = Library(
    "kernels",
    _files("segment_gemm.c", "packed_linear.c", "scatter.c", f"{_EXPERTS}experts.c"),
    _files(
        f"{_EXPERTS}experts.h",
        "abi.h",
        "threads.h",
        "vectors.h",
        "dot_products.h",
        "outer_products.h",
        "word_products.h",
        "streaming.h",
    ),
    openmp=True,
)
PACKING = Library(
    "packing", _files("pack.c"), _files("abi.h", "vectors.h", "streaming.h"), openmp=False
)
LIBRARIES = (KERNELS, PACKING)

_V3 = frozenset({"abm", "avx", "avx2", "bmi1", "bmi2", "f16c", "fma", "movbe", "xsave"})
_V4 = _V3 | {"avx512bw", "avx512cd", "avx512dq", "avx512f", "avx512vl"}
_X86 = (
    InstructionSet("avx512bf16", ("-march=x86-64-v4", "-mavx512bf16"), _V4 | {"avx512_bf16"}),
    InstructionSet("avx512", ("-march=x86-64-v4",), _V4),
    InstructionSet("avx2", ("-march=x86-64-v3",), _V3),
    InstructionSet("baseline", ("-march=x86-64",)),
)
_OTHER = (InstructionSet("baseline", ()),)  # as the compiler has it: NEON on aarch64


def instruction_sets(machine: str) -> tuple[InstructionSet, ...]:
    """Instruction sets to build for on a kind of machine, best first; the last runs anywhere."""
    return _X86 if machine in X86_MACHINES else _OTHER


def compiler() -> list[str]:
    """The C compiler's command: `$CC`, gcc, clang or cc.

    Raises:
        NativeUnavailableError: There is none.
    """
    command = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")
    command = command or shutil.which("cc")
    if command is None:
        raise NativeUnavailableError(
            "no C compiler found (looked for $CC, gcc, clang, cc); install one, for example "
            "`apt-get install gcc`, to build the native CPU kernels"
        )
    return command.split()


def compile_library(
    library: Library, instructions: InstructionSet, command: list[str], path: Path
) -> Path:
    """Compiles and links a library, in a folder that is nobody else's.

    Raises:
        NativeUnavailableError: The compiler does not run, or fails.
    """
    flags = (*_FLAGS, *instructions.flags, f"-I{SOURCE_FOLDER}")
    if library.openmp:
        flags += ("-fopenmp",)
    objects = []
    for source in library.sources:
        objects.append(str(path.with_name(f"{path.stem}-{source.stem}.o")))
        _run([*command, *flags, "-c", str(source), "-o", objects[-1]])
    # Linking apart from compiling, so that -fopenmp adds no OpenMP runtime of its own.
    _run([*command, *_LINK_FLAGS, *objects, "-o", str(path)])
    for each in objects:
        Path(each).unlink()
    return path


def fingerprint(library: Library, instructions: InstructionSet, command: list[str]) -> str:
    """Other for other sources, flags, compilers and kinds of machine.

    Raises:
        NativeUnavailableError: The compiler does not run.
    """
    digest = hashlib.sha256()
    for file in (*library.sources, *library.headers):
        digest.update(file.read_bytes())
    version = _run([*command, "--version"])
    for part in (*command, version, *_FLAGS, *instructions.flags, *_LINK_FLAGS, os.uname().machine):
        digest.update(part.encode())
    return digest.hexdigest()[:16]


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
