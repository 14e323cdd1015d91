"""Compiles the Triton kernels for GPUs that need not be there and shows what came out.

    python -m multilora_kernels.report [--arch 90] [--case "qkv decode"] [--json]

For every configuration: registers and shared memory of a program, bytes spilled to local memory,
widths of the loads from global memory, tensor-core instructions. The launches compiled are those
that the backend would run, made from tensors without memory.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from multilora_kernels.plan import PlanLayout
from multilora_kernels.triton import INTERPRETED
from multilora_kernels.triton.combine import prepare_combine
from multilora_kernels.triton.launch import Batch, DeviceFacts, Launch
from multilora_kernels.triton.product import expand_launch, shrink_launch

# Architecture: streaming multiprocessors, for the computed defaults (A100, H100, B200).
ARCHITECTURES = {80: 108, 90: 132, 100: 148}
SHARED_MEMORY_LIMIT = 99 * 1024
"""What a program may take on every card since sm_80; the smallest limit is that of sm_86."""

_TYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.int32: "i32"}
_LOAD = re.compile(r"ld\.global\S*?(?:\.v(\d))?\.b(\d+) ")
_ASYNC_COPY = re.compile(r"cp\.async\.c[ag]\.shared\.global \[[^]]*\], \[[^]]*\], (0x\w+|\d+)")
_TENSOR_CORE = re.compile(r"\b(?:mma\.sync|wgmma\.mma_async|tcgen05\.mma)\b")
_USAGE = re.compile(r"REG:(\d+) STACK:(\d+) SHARED:(\d+)")
_FRAME = re.compile(r"\.local \.align \d+ \.b8\s+__local_depot\d+\[(\d+)\]")
_LOCAL_ACCESS = re.compile(r"\b(?:ld|st|cvta)\S*\.local\b")


@dataclass(frozen=True)
class Case:
    """A layer under a load. The widths are those of 8B and 70B Llama models.

    Attributes:
        name: What the table shows.
        k: Columns of x.
        widths: Columns of y, per slice.
        max_rank: Columns reserved for the rank.
        tokens: Rows of the batch.
        dtype: Of activations and weights.
        batch_invariant: Whether the blocks must not depend on the batch.
        by_column: Whether B's columns are contiguous rather than its rows.
    """

    name: str
    k: int
    widths: tuple[int, ...]
    max_rank: int
    tokens: int
    dtype: torch.dtype = torch.bfloat16
    batch_invariant: bool = False
    by_column: bool = False

    @property
    def title(self) -> str:
        return f"{self.name}, R {self.max_rank}, T {self.tokens}"


_QKV, _GATE_UP = (4096, (4096, 1024, 1024)), (8192, (28672, 28672))
CASES = (
    Case("qkv decode", *_QKV, max_rank=16, tokens=16),
    Case("qkv decode", *_QKV, max_rank=64, tokens=64),
    Case("qkv mixed", *_QKV, max_rank=64, tokens=512),
    Case("qkv prefill", *_QKV, max_rank=64, tokens=2048),
    Case("qkv prefill", *_QKV, max_rank=64, tokens=8192),
    Case("qkv prefill, high rank", *_QKV, max_rank=256, tokens=8192),
    Case("qkv invariant", *_QKV, max_rank=64, tokens=64, batch_invariant=True),
    Case("qkv decode, B by column", *_QKV, max_rank=64, tokens=64, by_column=True),
    Case("qkv prefill, B by column", *_QKV, max_rank=64, tokens=8192, by_column=True),
    Case("gate-up 70B decode", *_GATE_UP, max_rank=64, tokens=64),
    Case("gate-up 70B prefill", *_GATE_UP, max_rank=64, tokens=8192),
    Case("down 8B decode", 14336, (4096,), max_rank=32, tokens=64),
    Case("qkv decode fp16", *_QKV, max_rank=64, tokens=64, dtype=torch.float16),
    Case("qkv prefill fp16", *_QKV, max_rank=64, tokens=8192, dtype=torch.float16),
    Case("qkv decode fp32", *_QKV, max_rank=64, tokens=64, dtype=torch.float32),
    Case("qkv prefill fp32", *_QKV, max_rank=64, tokens=8192, dtype=torch.float32),
    Case("qkv fp32, invariant", *_QKV, 64, 64, dtype=torch.float32, batch_invariant=True),
)


@dataclass(frozen=True)
class Compiled:
    """What one compilation gave.

    Attributes:
        case: The layer and load.
        kernel: Name of the Triton function.
        architecture: Such as 90.
        blocks: The blocks in words.
        registers: Per thread.
        shared_bytes: Per program.
        spilled_bytes: Local memory per thread; anything but 0 is a spill.
        loads: Bytes of a thread's load instruction -> how many such instructions.
        tensor_core: Tensor-core instructions.
        pdl: Whether it takes part in programmatic dependent launch.
    """

    case: str
    kernel: str
    architecture: int
    blocks: str
    registers: int
    shared_bytes: int
    spilled_bytes: int
    tensor_core: int
    pdl: bool
    loads: dict[int, int] = field(default_factory=dict)


def launches(case: Case, architecture: int) -> Iterator[Launch]:
    """The launches that the backend would run for a case, over tensors without memory."""
    slots = 64
    facts = DeviceFacts(f"sm_{architecture}", ARCHITECTURES[architecture], pdl=architecture >= 90)
    layout = PlanLayout(max_tokens=8192, max_loras=slots, tile_rows=128)

    def empty(*shape: int, dtype: torch.dtype = case.dtype) -> torch.Tensor:
        return torch.empty(*shape, dtype=dtype, device="meta")

    lora_a = [empty(slots, 1, case.max_rank, case.k) for _ in case.widths]
    if case.by_column:
        lora_b = [empty(slots, 1, case.max_rank, n).transpose(-1, -2) for n in case.widths]
    else:
        lora_b = [empty(slots, 1, n, case.max_rank) for n in case.widths]
    ranks = empty(len(case.widths), slots, dtype=torch.int32)
    plan = empty(layout.size, dtype=torch.int32)
    x, y = empty(case.tokens, case.k), empty(case.tokens, sum(case.widths))
    batch = Batch(ranks, plan, layout, facts, case.batch_invariant)
    planes, launch = shrink_launch(x, lora_a, batch, 1.0)
    yield launch
    expand = expand_launch(y, planes, lora_b, batch, 0, True, after_shrink=True)
    if expand.before is not None:
        yield expand.before
    yield expand
    if case.max_rank == 64 and len(case.widths) == 3 and case.tokens == 64:
        h = empty(*planes.shape[1:])
        yield prepare_combine(h, planes, batch)


def compile_launch(case: Case, launch: Launch, architecture: int) -> Compiled:
    """Compiles a launch to machine code.

    Raises:
        RuntimeError: This process has Triton in interpreter mode.
    """
    if INTERPRETED:
        raise RuntimeError("with TRITON_INTERPRET=1 nothing can be compiled: unset it")
    signature, constants, attributes = _specialise(launch)
    compiled = triton.compile(
        ASTSource(launch.kernel, signature, constants, attributes),
        target=GPUTarget("cuda", architecture, 32),
        options=launch.options,
    )
    ptx = compiled.asm["ptx"]
    usage = _USAGE.search(_resource_usage(compiled.asm["cubin"]))
    if usage is None:
        raise RuntimeError(f"cuobjdump shows no resource usage of {launch.kernel.__name__}")
    registers, stack, _ = map(int, usage.groups())
    loads: Counter[int] = Counter()
    for count, bits in _LOAD.findall(ptx):
        loads[int(count or 1) * int(bits) // 8] += 1
    for size in _ASYNC_COPY.findall(ptx):
        loads[int(size, 0)] += 1
    return Compiled(
        case=case.title,
        kernel=launch.kernel.__name__.removesuffix("_kernel"),
        architecture=architecture,
        blocks=_blocks(launch),
        registers=registers,
        shared_bytes=compiled.metadata.shared,
        spilled_bytes=stack - _untouched_frame(ptx),
        tensor_core=len(_TENSOR_CORE.findall(ptx)),
        pdl="griddepcontrol" in ptx,
        loads=dict(sorted(loads.items(), reverse=True)),
    )


def _specialise(
    launch: Launch,
) -> tuple[dict[str, Any], dict[tuple[int, ...], Any], dict[tuple[int, ...], Any]]:
    """Types, constants and alignments, as Triton finds them when the kernel is launched."""
    names = launch.kernel.arg_names
    params = launch.kernel.params
    fixed = {p.name for p in params if p.do_not_specialize or p.do_not_specialize_on_alignment}
    signature: dict[str, Any] = dict.fromkeys(launch.constants, "constexpr")
    constants: dict[tuple[int, ...], Any] = {
        (names.index(name),): value for name, value in launch.constants.items()
    }
    attributes: dict[tuple[int, ...], Any] = {}

    def describe(value: Any, path: tuple[int, ...], special: bool) -> Any:
        if isinstance(value, tuple):
            return tuple(describe(v, (*path, i), special) for i, v in enumerate(value))
        if isinstance(value, float):
            return "fp32"
        if special and (isinstance(value, torch.Tensor) or value % 16 == 0):
            attributes[path] = [["tt.divisibility", 16]]
        if isinstance(value, torch.Tensor):
            return f"*{_TYPES[value.dtype]}"
        if special and value == 1:
            constants[path] = 1
            return "constexpr"
        return "i32" if value < 2**31 else "i64"

    for name, value in launch.arguments.items():
        signature[name] = describe(value, (names.index(name),), name not in fixed)
    return {name: signature[name] for name in names}, constants, attributes


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


def table(results: list[Compiled]) -> str:
    """The results as a table in Markdown."""
    rows = [
        "| sm | kernel | case | blocks | registers | shared KiB | spilled | loads (bytes x count) "
        "| tensor core | PDL |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for r in results:
        loads = ", ".join(f"{size} x {count}" for size, count in r.loads.items())
        rows.append(
            f"| {r.architecture} | {r.kernel} | {r.case} | {r.blocks} | {r.registers} | "
            f"{r.shared_bytes / 1024:.1f} | {r.spilled_bytes} | {loads} | {r.tensor_core} | "
            f"{'yes' if r.pdl else 'no'} |"
        )
    return "\n".join(rows)


def main(arguments: list[str] | None = None) -> int:
    """Compiles everything; returns 1 if something spills or takes too much shared memory."""
    parser = argparse.ArgumentParser(prog="python -m multilora_kernels.report", description=__doc__)
    parser.add_argument("--arch", type=int, choices=ARCHITECTURES, action="append")
    parser.add_argument("--case", action="append", help="only cases that begin with this")
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    chosen = parser.parse_args(arguments)
    results = []
    for architecture in chosen.arch or ARCHITECTURES:
        for case in CASES:
            if chosen.case is None or case.title.startswith(tuple(chosen.case)):
                for launch in launches(case, architecture):
                    results.append(compile_launch(case, launch, architecture))
    if chosen.json:
        for result in results:
            print(json.dumps(asdict(result)))
    else:
        print(table(results))
    bad = [r for r in results if r.spilled_bytes or r.shared_bytes > SHARED_MEMORY_LIMIT]
    for r in bad:
        print(
            f"{r.kernel} for {r.case} on sm_{r.architecture}: {r.spilled_bytes} bytes spilled, "
            f"{r.shared_bytes} bytes of shared memory (limit {SHARED_MEMORY_LIMIT})",
            file=sys.stderr,
        )
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
