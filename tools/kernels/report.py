"""Compiles the Triton kernels for GPUs that need not be there and shows what came out.

    python -m tools.kernels.report [--arch 90] [--case "qkv decode"] [--json] [--candidates]

For every launch of every case (`measure/tuned/launch_cases.py`), and for the tables in force:
registers and shared memory of a program, bytes spilled to local memory, how wide each tensor is
read and written, how many loads one after the other come before that, tensor-core instructions, and
how many programs a multiprocessor holds. A launch that several cases share is compiled once.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from multilora_kernels.triton import INTERPRETED
from multilora_kernels.triton.launch import Launch
from tools.kernels.measure.compiled.ptx import Ptx
from tools.kernels.measure.signature import pointers_of, specialise
from tools.kernels.measure.tuned.launch_cases import (
    CARDS,
    CASES,
    SHARED_MEMORY_LIMIT,
    LaunchCase,
    candidate_launches,
    launches,
    table_cases,
    table_name,
)

_USAGE = re.compile(r"REG:(\d+) STACK:(\d+) SHARED:(\d+)")
_FRAME = re.compile(r"\.local \.align \d+ \.b8\s+__local_depot\d+\[(\d+)\]")
_AMD_ACCESS = re.compile(r"\b(?:global|buffer)_(load|store)_(\w+)")
_AMD_BYTES = {
    **{f"dwordx{n}": 4 * n for n in (2, 3, 4)},
    **dict.fromkeys(("dword", "lds_dword"), 4),
    **dict.fromkeys(("short", "ushort", "sshort", "short_d16", "short_d16_hi"), 2),
}
_LOCAL_ACCESS = re.compile(r"\b(?:ld|st|cvta)\S*\.local\b")

Widths = dict[str, dict[int, int]]
"""Tensor -> bytes that a thread moves with one instruction -> how many such instructions."""


@dataclass(frozen=True)
class Compiled:
    """What one compilation gave.

    Attributes:
        case: The layer and load.
        kernel: Name of the Triton function.
        architecture: Such as 90 or gfx942.
        blocks: The blocks in words.
        constants: The compile-time parameters that are numbers.
        threads: Of a program.
        registers: Per thread.
        per_processor: Programs that are started for each multiprocessor.
        resident: Programs that one holds at once.
        shared_bytes: Per program.
        spilled_bytes: Local memory per thread; anything but 0 is a spill.
        tensor_core: Tensor-core instructions.
        in_flight: Of these, those that read registers while the program goes on.
        atomics: Atomic operations.
        pdl: Whether it takes part in programmatic dependent launch.
        starts_early: Whether it is launched so that it may start before its predecessor has ended.
        ends_early: Whether it may even end before that.
        read_early: Tensors that it may read before that.
        written_early: Tensors that it may write before that.
        loads_before: By tensor, the loads that end one after the other before it is first read.
        types: Of each tensor's elements, as Triton calls them.
        loads: How wide each tensor is read; on AMD's cards all of them together, as `all`.
        stores: How wide each tensor is written; likewise.
        cubin: The machine code of NVIDIA's cards, which the command does not print.
    """

    case: str
    kernel: str
    architecture: str
    blocks: str
    constants: dict[str, int]
    threads: int
    registers: int
    per_processor: int
    resident: int
    shared_bytes: int
    spilled_bytes: int
    tensor_core: int
    in_flight: int
    atomics: int
    pdl: bool
    starts_early: bool
    ends_early: bool
    read_early: list[str]
    written_early: list[str]
    loads_before: dict[str, int]
    types: dict[str, str]
    loads: Widths
    stores: Widths
    cubin: bytes = field(default=b"", repr=False)

    @property
    def problem(self) -> str | None:
        """What must not be, in words."""
        if self.spilled_bytes:
            return f"{self.spilled_bytes} bytes spilled"
        limit = min(SHARED_MEMORY_LIMIT, CARDS[self.architecture].program_bytes)
        if self.shared_bytes > limit:
            return f"{self.shared_bytes} bytes of shared memory (limit {limit})"
        if self.resident < self.per_processor:
            return f"{self.per_processor} programs a multiprocessor, which holds {self.resident}"
        if self.in_flight:
            # It may use the registers again before they have been read, and Triton brings an older
            # one before 3.9: https://github.com/triton-lang/triton/pull/11781
            return f"{self.in_flight} products that ptxas before 13.3 gets wrong"
        return f"{self.atomics} atomic operations" if self.atomics else None


def compile_launch(title: str, launch: Launch, architecture: str) -> Compiled:
    """Compiles a launch to machine code.

    Args:
        title: What to call it.
        launch: Over tensors without memory, if that is all there is.
        architecture: One of `CARDS`.

    Raises:
        RuntimeError: This process has Triton in interpreter mode.
    """
    if INTERPRETED:
        raise RuntimeError("with TRITON_INTERPRET=1 nothing can be compiled: unset it")
    signature, constants, attributes = specialise(launch)
    is_amd = architecture.startswith("gfx")
    target = (
        GPUTarget("hip", architecture, 64) if is_amd else GPUTarget("cuda", int(architecture), 32)
    )
    source = ASTSource(launch.kernel, signature, constants, attributes)
    compiled = triton.compile(source, target=target, options=launch.options)
    if is_amd:
        return _compiled_for_amd(title, launch, architecture, compiled, pointers_of(signature))
    text = compiled.asm["ptx"]
    usage = _USAGE.search(_resource_usage(compiled.asm["cubin"]))
    if usage is None:
        raise RuntimeError(f"cuobjdump shows no resource usage of {launch.kernel.__name__}")
    registers, stack, _ = map(int, usage.groups())
    ptx, pointers = Ptx(text), pointers_of(signature)
    widths: tuple[defaultdict[str, Counter[int]], ...] = defaultdict(Counter), defaultdict(Counter)
    early: tuple[set[str], ...] = set(), set()
    loads_before: dict[str, int] = {}
    for access in ptx.accesses():
        found = sorted({pointers[p][0] for p in access.parameters & pointers.keys()})
        tensors = found or ["unknown"]
        widths[access.store][" or ".join(tensors)][access.size] += 1
        if not access.after_wait:
            early[access.store].update(tensors)
        if not access.store:
            for tensor in tensors:
                before = loads_before.get(tensor, access.loads_before)
                loads_before[tensor] = min(before, access.loads_before)
    return Compiled(
        case=title,
        kernel=launch.kernel.__name__.removesuffix("_kernel"),
        registers=registers,
        **_shared_facts(launch, architecture, 32, registers, compiled),
        spilled_bytes=stack - _untouched_frame(text),
        tensor_core=ptx.tensor_core,
        in_flight=ptx.in_flight,
        atomics=ptx.atomics,
        pdl="griddepcontrol" in text,
        starts_early=bool(launch.options.get("launch_pdl", False)),
        ends_early=ptx.may_end_unwaited,
        read_early=sorted(early[False]),
        written_early=sorted(early[True]),
        loads_before=loads_before,
        types=dict(pointers.values()),
        loads={name: dict(sorted(sizes.items())) for name, sizes in widths[False].items()},
        stores={name: dict(sorted(sizes.items())) for name, sizes in widths[True].items()},
        cubin=compiled.asm["cubin"],
    )


def _shared_facts(
    launch: Launch, architecture: str, warp_threads: int, registers: int, compiled: Any
) -> dict[str, Any]:
    threads, shared_bytes = warp_threads * launch.options["num_warps"], compiled.metadata.shared
    return {
        "architecture": architecture,
        "blocks": _blocks(launch),
        "constants": {k: int(v) for k, v in launch.constants.items() if isinstance(v, int)},
        "threads": threads,
        "per_processor": launch.spread.per_processor if launch.spread else 0,
        "resident": CARDS[architecture].resident(threads, registers, shared_bytes),
        "shared_bytes": shared_bytes,
    }


def _compiled_for_amd(
    title: str,
    launch: Launch,
    architecture: str,
    compiled: Any,
    pointers: dict[int, tuple[str, str]],
) -> Compiled:
    """What its assembly says: all but which tensor an instruction reads."""
    text = compiled.asm["amdgcn"]

    def number(name: str) -> int:
        return int(re.findall(rf"\.{name}:\s*(\d+)", text)[-1])

    widths: tuple[Counter[int], ...] = Counter(), Counter()
    for verb, size in _AMD_ACCESS.findall(text):
        widths[verb == "store"][_AMD_BYTES[size]] += 1
    registers = number("vgpr_count")
    return Compiled(
        case=title,
        kernel=launch.kernel.__name__.removesuffix("_kernel"),
        registers=registers,
        **_shared_facts(launch, architecture, 64, registers, compiled),
        spilled_bytes=number("private_segment_fixed_size"),
        tensor_core=text.count("v_mfma"),
        in_flight=0,
        atomics=len(re.findall(r"_atomic_", text)),
        pdl=False,
        starts_early=False,
        ends_early=True,
        read_early=[],
        written_early=[],
        loads_before={},
        types=dict(pointers.values()),
        loads={"all": dict(sorted(widths[False].items()))},
        stores={"all": dict(sorted(widths[True].items()))},
    )


def _untouched_frame(ptx: str) -> int:
    """Bytes of the stack that LLVM reserved and never touches: they are no spill.

    It leaves a frame of one byte in some kernels, which the assembler makes 8.
    """
    if _LOCAL_ACCESS.search(ptx):
        return 0
    return sum(-(-int(size) // 8) * 8 for size in _FRAME.findall(ptx))


def _blocks(launch: Launch) -> str:
    letters = {"BLOCK_M": "m", "BLOCK_N": "n", "BLOCK_R": "r", "BLOCK_K": "k", "SPLIT_K": "split "}
    words = [
        f"{short}{launch.constants[key]}"
        for key, short in letters.items()
        if key in launch.constants
    ]
    if launch.constants.get("VECTOR_ROWS"):
        words.append(f"rows {launch.constants['VECTOR_ROWS']}")
    if launch.constants.get("EARLY"):
        words.append("early")
    options = launch.options
    return f"{' '.join(words)}, {options['num_warps']} warps, {options['num_stages']} stages"


def _resource_usage(cubin: bytes) -> str:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        return subprocess.run(
            [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", str(path)],
            check=True,
            capture_output=True,
            text=True,
        ).stdout


def report(
    architecture: str, requested: tuple[str, ...] | None, *, candidates: bool
) -> Iterator[Compiled]:
    """Compiles what was asked for on one architecture.

    Args:
        architecture: One of `CARDS`.
        requested: Beginnings of the cases' titles; None: all cases.
        candidates: Compile the tuner's candidates instead.
    """
    known: dict[str, Compiled] = {}
    for case, launch in _asked_for(architecture, requested, candidates):
        key = repr((launch.kernel.__name__, specialise(launch), launch.options))
        if key not in known:
            known[key] = compile_launch(case.title, launch, architecture)
        yield replace(known[key], case=case.title)


def _asked_for(
    architecture: str, requested: tuple[str, ...] | None, candidates: bool
) -> Iterator[tuple[LaunchCase, Launch]]:
    if candidates:
        yield from candidate_launches(architecture)
        return
    for case in (*CASES, *table_cases(architecture)):
        if requested is None or case.title.startswith(requested):
            for launch in launches(case, architecture):
                yield case, launch


def table(results: list[Compiled]) -> str:
    """The results as a table in Markdown."""
    rows = [
        "| sm | kernel | case | blocks | registers | shared KiB | programs | fit | spilled "
        "| loads (bytes x count) | loads before | tensor core | PDL |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for r in results:
        loads = "; ".join(
            f"{tensor} " + ", ".join(f"{size} x {count}" for size, count in sizes.items())
            for tensor, sizes in sorted(r.loads.items())
        )
        before = ", ".join(f"{tensor} {loads}" for tensor, loads in sorted(r.loads_before.items()))
        rows.append(
            f"| {r.architecture} | {r.kernel} | {r.case} | {r.blocks} | {r.registers} | "
            f"{r.shared_bytes / 1024:.1f} | {r.per_processor} | {r.resident} | {r.spilled_bytes} | "
            f"{loads} | {before} | {r.tensor_core} | {'yes' if r.pdl else 'no'} |"
        )
    return "\n".join(rows)


def main(arguments: list[str] | None = None) -> int:
    """Compiles everything; returns 1 if something spills, does not fit or is atomic.

    The tuner drops candidates that spill or do not fit, so these are only shown.
    """
    parser = argparse.ArgumentParser(prog="python -m tools.kernels.report", description=__doc__)
    parser.add_argument("--arch", choices=CARDS, action="append")
    parser.add_argument("--case", action="append", help="only cases that begin with this")
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    parser.add_argument("--candidates", action="store_true", help="the tuner's, instead of cases")
    chosen = parser.parse_args(arguments)
    requested = None if chosen.case is None else tuple(chosen.case)
    results = [
        result
        for architecture in chosen.arch or CARDS
        for result in report(architecture, requested, candidates=chosen.candidates)
    ]
    if chosen.json:
        for result in results:
            print(json.dumps({k: v for k, v in asdict(result).items() if k != "cubin"}))
    else:
        print(table(results))
    bad = [r for r in results if r.problem is not None]
    for r in bad:
        print(
            f"{r.kernel} for {r.case} on {table_name(r.architecture)}: {r.problem}", file=sys.stderr
        )
    return 1 if bad and not chosen.candidates else 0


if __name__ == "__main__":
    sys.exit(main())
