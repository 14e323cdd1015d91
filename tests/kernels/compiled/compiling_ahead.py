"""Run in a process of its own, without Triton's interpreter; prints what it finds as JSON.

`test_compiling_ahead.py` says what should be found. Kernels are compiled for sm_90 and not run.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from multilora_kernels import BatchPlan, PlanLayout, PreparedLinear
from multilora_kernels.packs.device_staging import DeviceStaging
from multilora_kernels.triton.compiling import compile_pool
from multilora_kernels.triton.compiling.compile_ahead import call_compiled
from tools.kernels.measure.compiled.without_card import launched_without_card

SLOTS, RANK, K, WIDTHS, MAX_TOKENS = 4, 16, 256, (128, 64), 512


def calls_of_a_server() -> Any:
    """Calls as a warm-up makes them: two kinds of layer, and what fills slots."""

    def weights(*shape: int) -> torch.Tensor:
        return torch.empty(SLOTS, 1, *shape, dtype=torch.bfloat16)

    layers = []
    for k, widths in ((K, WIDTHS), (75, (51,))):
        plan = BatchPlan(PlanLayout(MAX_TOKENS, SLOTS))
        ranks = torch.ones(len(widths), SLOTS, dtype=torch.int32)
        a = tuple(weights(RANK, k) for _ in widths)
        b = tuple(weights(width, RANK) for width in widths)
        prepared = PreparedLinear(a, b, ranks, plan.layout, backend="triton")
        layers.append((prepared, plan, k, sum(widths)))
    staging = DeviceStaging(torch.device("cpu"), 4 << 20)

    def call() -> None:
        for prepared, plan, k, width in layers:
            for tokens in (1, 64, MAX_TOKENS):
                x, y = (torch.empty(tokens, n, dtype=torch.bfloat16) for n in (k, width))
                prepared(y, x, plan)
        staging.warm_up()

    return call


def main() -> None:
    how = sys.argv[1]
    program = compile_pool.PROGRAM
    if how == "failing":
        program = "import sys; sys.exit('no compiler today')"
    elif how == "dying":  # in the middle of its second job
        program = program.replace(
            "main()\n",
            "import os\n"
            "from multilora_kernels.triton.compiling.compile_process import CompileJob\n"
            "run, done = CompileJob.run, []\n"
            "def once(job):\n"
            "    done and os._exit(9)\n"
            "    done.append(run(job))\n"
            "CompileJob.run = once\n"
            "main()\n",
        )
    elif how == "hanging":
        program = "import time; time.sleep(600)"
    seconds = 1.0 if how == "hanging" else compile_pool.MAX_SECONDS
    with (
        patch.object(compile_pool, "PROGRAM", program),
        patch.object(compile_pool, "MAX_SECONDS", seconds),
        launched_without_card(compiling=True) as launches,
    ):
        done = call_compiled(calls_of_a_server(), processes=2)
    found = {
        "kernels": done.kernels,
        "processes": done.processes,
        "problems": done.problems,
        "late": len(done.late),
        "launched": len(launches.launched),
        "cached": len(list(Path(os.environ["TRITON_CACHE_DIR"]).glob("*/*.cubin"))),
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
