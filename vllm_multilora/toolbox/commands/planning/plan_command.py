"""`vllm-multilora plan`: computes what settings cost, before a server is started."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from vllm_multilora.errors import ConfigError
from vllm_multilora.slots.assignment import MAX_SLOTS
from vllm_multilora.slots.budget import GIB
from vllm_multilora.toolbox.commands.output import plots
from vllm_multilora.toolbox.commands.planning import plan_traffic
from vllm_multilora.toolbox.commands.shared_arguments import add_server_flags, server_of

if TYPE_CHECKING:
    from vllm_multilora.integration.offline.base_model import BaseModel

PLANNED, TOO_LARGE = 0, 1


def add_arguments(parser: argparse.ArgumentParser) -> None:
    server = add_server_flags(parser, needs_model=False)
    for flag, metavar, default, meaning in (
        ("--max-loras", "N", None, "number of slots"),
        ("--max-lora-rank", "R", None, "rank of the slots"),
        ("--tensor-parallel-size", "T", 1, "number of workers (default: 1)"),
        ("--max-model-len", "TOKENS", None, "length of the longest request"),
    ):
        server.add_argument(flag, type=int, metavar=metavar, default=default, help=meaning)
    server.add_argument(
        *("--fully-sharded-loras", "--fully-sharded"),
        action="store_true",
        help="shard LoRA as far as possible",
    )
    server.add_argument(
        "--gpu-memory-utilization",
        type=float,
        metavar="SHARE",
        help="part of a GPU's memory that vLLM takes, above 0 and at most 1 (default: vLLM's)",
    )
    plot = "plot the slots' memory against their number, as FILE.png or FILE.svg"
    for flag, kind, metavar, meaning in (
        ("--gpu-memory", float, "GIB", "memory of one GPU; shows what is left for requests"),
        ("--adapters", Path, "DIR", "folder whose sub-folders are the adapters to serve"),
        ("--plot", Path, "FILE", plot),
    ):
        parser.add_argument(flag, type=kind, metavar=metavar, help=meaning)
    parser.add_argument("--json", action="store_true", help="print JSON")
    plan_traffic.add_arguments(parser)


def _offline_costs(arguments: argparse.Namespace) -> BaseModel:
    server = server_of(arguments)
    from vllm_multilora.integration.offline.costs import offline_costs

    return offline_costs(server)


def run(
    arguments: argparse.Namespace,
    costs_of: Callable[[argparse.Namespace], BaseModel] = _offline_costs,
) -> int:
    """Runs the command; `costs_of` finds out what the base model costs."""
    if arguments.traffic is not None:
        return plan_traffic.run(arguments)
    _check(arguments)
    if arguments.plot:
        plots.require(arguments.plot)
    model, gpu = costs_of(arguments), arguments.gpu_memory
    from vllm_multilora.toolbox.commands.planning.plan_json import plan_as_json
    from vllm_multilora.toolbox.commands.planning.plan_report import report
    from vllm_multilora.toolbox.planning.adapter_survey import survey_adapters
    from vllm_multilora.toolbox.planning.memory_plan import MemoryPlan

    survey = None
    if arguments.adapters is not None:
        survey = survey_adapters(arguments.adapters, model.layouts[model.ranks[-1]])
    plan = MemoryPlan(
        model,
        arguments.max_loras,
        arguments.max_lora_rank,
        gpu_bytes=None if gpu is None else int(gpu * GIB),
        utilization=arguments.gpu_memory_utilization or model.utilization,
        survey=survey,
    )
    if arguments.plot:
        plots.draw_memory(plan, arguments.plot)
    if arguments.json:
        print(json.dumps(plan_as_json(plan), indent=2))
    else:
        print("\n".join(report(plan)))
    return TOO_LARGE if plan.left is not None and plan.left <= 0 else PLANNED


def _check(arguments: argparse.Namespace) -> None:
    """Checks what neither argparse nor vLLM checks, or checks in words of its own.

    Raises:
        ConfigError: A number is out of range, or one is missing.
    """
    given = {
        "--model": arguments.model,
        "--max-loras": arguments.max_loras,
        "--max-lora-rank": arguments.max_lora_rank,
    }
    if lacking := [flag for flag, value in given.items() if value is None]:
        raise ConfigError(
            f"without --traffic the following arguments are required: {', '.join(lacking)}"
        )
    if arguments.calibration is not None:
        raise ConfigError("--calibration is for --traffic, which is not given")
    for flag, value, most in (
        ("--max-loras", arguments.max_loras, MAX_SLOTS),
        ("--max-lora-rank", arguments.max_lora_rank, math.inf),
        ("--tensor-parallel-size", arguments.tensor_parallel_size, math.inf),
        ("--max-model-len", arguments.max_model_len, math.inf),
    ):
        if value is not None and not 1 <= value <= most:
            limit = f" and at most {most}" if most < math.inf else ""
            raise ConfigError(f"{flag} must be at least 1{limit}, got {value}")
    share, gpu = arguments.gpu_memory_utilization, arguments.gpu_memory
    if share is not None and not 0 < share <= 1:
        raise ConfigError(f"--gpu-memory-utilization must be in (0, 1], got {share}")
    if gpu is not None and not (gpu > 0 and math.isfinite(gpu * GIB)):
        raise ConfigError(f"--gpu-memory must be a positive number of GiB, got {gpu}")
