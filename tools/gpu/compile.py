"""Compiles what the timed parts launch, in as many processes as there are processors.

    python -m tools.gpu.compile [--out compile.json] [--rehearse]

The other parts find the kernels in Triton's cache on disk. `--rehearse` needs no card: it compiles
for sm_90 what two tiny layers would launch there.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

import tools.kernels
from multilora_kernels.triton_availability import INTERPRET_VARIABLE
from tools.kernels.measure.batches import LAYERS, BatchSpec, build
from tools.kernels.measure.contenders import Multilora

assert tools.kernels  # finds the checkout's kernels
REHEARSED = [
    BatchSpec(LAYERS["8b.qkv"].scaled(128), 8, max_rank=rank, ranks=8) for rank in (16, 64)
]
"""What a rehearsal compiles."""


def calls_of(specs: Iterable[BatchSpec], device: torch.device) -> Callable[[], None]:
    """Calls every kind of layer and number of tokens once, and what fills slots.

    Args:
        specs: Batches; which adapters they have makes no difference to a launch.
        device: Where they are built, one after the other.
    """
    from multilora_kernels.packs.device_staging import DeviceStaging

    kinds = {(spec.layer, spec.tokens, spec.max_rank, spec.max_loras): spec for spec in specs}

    def call() -> None:
        for spec in kinds.values():
            Multilora("triton").prepare(build(spec, device))()
        DeviceStaging(device, 4 << 20).warm_up()

    return call


def main(arguments: list[str] | None = None) -> int:
    """Compiles all; 1 if something could not be compiled, 2 where that cannot be done."""
    parser = argparse.ArgumentParser(prog="python -m tools.gpu.compile")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--rehearse", action="store_true", help="without a card, for sm_90")
    chosen = parser.parse_args(arguments)
    if os.environ.get(INTERPRET_VARIABLE) == "1":
        parser.error(f"nothing is compiled with {INTERPRET_VARIABLE}=1: unset it")
    if not chosen.rehearse and not torch.cuda.is_available():
        print("PyTorch finds no GPU here; --rehearse compiles without one", file=sys.stderr)
        return 2
    # They import Triton, which reads the variable then.
    from multilora_kernels.triton.compiling.compile_pool import CompilePool, compile_jobs
    from multilora_kernels.triton.compiling.compile_process import target_of
    from multilora_kernels.triton.launch import device_facts, noted_launches
    from tools.gpu import stress, times
    from tools.kernels.measure.compiled.without_card import launched_without_card

    begin = time.monotonic()
    device = torch.device("cpu" if chosen.rehearse else "cuda")
    specs = REHEARSED if chosen.rehearse else [*times.cases(), *stress.specs(on_gpu=True)]
    with ExitStack() as stack:
        if chosen.rehearse:
            stack.enter_context(launched_without_card())
        architecture = "sm_90" if chosen.rehearse else device_facts(device).architecture
        noted = stack.enter_context(noted_launches())
        calls_of(specs, device)()
    jobs = compile_jobs(noted, target_of(architecture))
    processes = min(len(os.sched_getaffinity(0)), len(jobs))
    with CompilePool(processes, ("tools.kernels",)) as pool:
        problems = pool.compile(jobs)
    result: dict[str, Any] = {
        "architecture": architecture,
        "kernels": len(jobs),
        "processes": processes,
        "problems": problems,
        "seconds": round(time.monotonic() - begin, 1),
    }
    print(json.dumps(result, indent=1))
    if chosen.out:
        chosen.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return int(bool(problems))


if __name__ == "__main__":
    sys.exit(main())
