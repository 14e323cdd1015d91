"""Measures configurations on this machine's GPU and writes its architecture's table.

    python -m tools.kernels.tune [--layers 8b.qkv 8b.o] [--tokens 16 64] [--out sm_90.json]
    python -m tools.kernels.tune --dry-run

For every class of workloads, candidates are timed on training batches, and the best one is
compared with the computed default on held-out batches; what does not win there beyond noise is
not taken. Candidates are compiled by several processes before they are timed. The kernels' README
says how to run it, check its table and use it. It needs a GPU; `--dry-run` lists what would be
timed and does not.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import torch

from multilora_kernels import triton_availability
from multilora_kernels.configs import ExpandConfig, ShrinkConfig
from multilora_kernels.configs.config_table import (
    Origin,
    Table,
    TableEntry,
    write_table,
)
from multilora_kernels.triton_availability import TritonUnavailableError
from tools.kernels.measure.batches import LAYERS
from tools.kernels.measure.environment import (
    Environment,
    command_arguments,
    current_environment,
)
from tools.kernels.measure.timing import Timer, timer_for
from tools.kernels.measure.tuned.selection import Choice, Effort, Margins, UnusableConfigError

if TYPE_CHECKING:  # these import Triton, which is asked for politely first
    from multilora_kernels.triton.compiling.compile_pool import CompilePool
    from multilora_kernels.triton.launch import DeviceFacts
    from tools.kernels.measure.tuned.tuning import Task

_Config = TypeVar("_Config", ShrinkConfig, ExpandConfig)

TOKENS = (16, 64, 256, 1024, 4096)
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}
"""Float32 products use no tensor cores and other blocks; nobody serves them on a GPU."""

NO_GPU = (
    "tuning measures on a GPU, and PyTorch finds none here: run it on the card that is to serve, "
    "or use --dry-run to see what it would time"
)


def main(arguments: list[str] | None = None) -> int:
    """Tunes and writes the table; 2 where that cannot be done, 1 where a default does not run."""
    chosen = _parser().parse_args(arguments)
    has_gpu = torch.cuda.is_available()
    if not has_gpu and not chosen.dry_run:
        print(NO_GPU, file=sys.stderr)
        return 2
    try:
        if not chosen.dry_run or not triton_availability.is_installed():
            triton_availability.require("cuda")
    except TritonUnavailableError as error:
        print(error, file=sys.stderr)
        return 2
    facts, shared_memory = _device(chosen.arch, has_gpu=has_gpu)
    tasks = tasks_for(
        chosen.layers, chosen.tokens, chosen.max_rank, chosen.max_loras, DTYPES[chosen.dtype]
    )
    if chosen.dry_run:
        print(dry_run(tasks, facts, shared_memory, Effort(), listed=chosen.list))
        return 0
    path = chosen.out or Path(f"{facts.architecture}.json")
    if path.exists() or not path.parent.is_dir():
        found = f"{path} exists" if path.exists() else f"there is no folder {path.parent}"
        print(f"{found}: name another file with --out", file=sys.stderr)
        return 2
    if path.stem != facts.architecture:
        print(f"note: to be found, the file must be named {facts.architecture}.json")
    device = torch.device("cuda")
    environment = current_environment(device, "tools.kernels.tune", command_arguments(arguments))
    from multilora_kernels.triton.compiling.compile_pool import CompilePool

    timer = timer_for(device)
    try:
        with CompilePool(chosen.processes, ("tools.kernels",)) as pool:
            tune_all(tasks, device, facts, shared_memory, timer, path, environment, pool=pool)
    except UnusableConfigError as error:
        print(f"the computed default does not run as it should here: {error}", file=sys.stderr)
        return 1
    print(f"wrote {path}")
    return 0


def tasks_for(
    layers: Sequence[str],
    tokens: Sequence[int],
    max_ranks: Sequence[int],
    max_loras: int,
    dtype: torch.dtype,
) -> list[Task]:
    """The classes of workloads of these layers."""
    from tools.kernels.measure.tuned.trials import buckets
    from tools.kernels.measure.tuned.tuning import Task

    return [
        Task(LAYERS[name], bucket, max_loras, max_rank, dtype)
        for name in layers
        for max_rank in sorted(set(max_ranks))
        for bucket in buckets(list(tokens))
    ]


def dry_run(
    tasks: Sequence[Task], facts: DeviceFacts, shared_memory: int, effort: Effort, *, listed: bool
) -> str:
    """What would be timed, as a table; with `listed` every candidate as well."""
    from tools.kernels.measure.tuned.candidates import LIMIT
    from tools.kernels.measure.tuned.tuning import describe, outlook

    lines = [
        f"for {facts.architecture}, {facts.processors} processors, {shared_memory} bytes of "
        f"shared memory",
        "| workload | shrink candidates | expand candidates | timed calls, at most |",
        "|---|---|---|---|",
    ]
    candidates, total = [], 0
    for task in tasks:
        plan = outlook(task, facts, shared_memory, effort)
        lines.append(
            f"| {task.name} | {len(plan.shrink)} | {len(plan.expand)} | {plan.timed_calls} |"
        )
        candidates += [f"{task.name}: shrink {describe(config)}" for config in plan.shrink]
        candidates += [f"{task.name}: expand {describe(config)}" for config in plan.expand]
        total += plan.timed_calls
    lines.append(
        f"{len(candidates)} candidates to be compiled, at most {LIMIT} for each half of a layer; "
        f"{total} timed calls at most"
    )
    return "\n".join(lines + (candidates if listed else []))


def tune_all(
    tasks: Sequence[Task],
    device: torch.device,
    facts: DeviceFacts,
    shared_memory: int,
    timer: Timer,
    path: Path,
    environment: Environment,
    effort: Effort | None = None,
    margins: Margins | None = None,
    pool: CompilePool | None = None,
) -> Table:
    """Tunes one task after the other; the file holds what is finished, if it is interrupted.

    Raises:
        UnusableConfigError: A computed default does not run as it should.
    """
    from tools.kernels.measure.tuned.tuning import describe, tune

    origin = Origin(
        card=environment.device,
        date=environment.date,
        driver=environment.driver,
        torch=environment.torch,
        triton=environment.triton,
        command=environment.command,
    )
    shrink: dict[object, TableEntry[ShrinkConfig]] = {}
    expand: dict[object, TableEntry[ExpandConfig]] = {}
    table = Table(origin=origin)

    def say(half: str, choice: Choice[ShrinkConfig] | Choice[ExpandConfig]) -> None:
        print(f"  {half}: {describe(choice.config)}; {choice.reason}; {choice.unusable} unusable")

    for task in tasks:
        print(task.name)
        tuned = tune(
            task,
            device,
            facts,
            shared_memory,
            timer,
            effort or Effort(),
            margins or Margins(),
            pool,
        )
        say("shrink", tuned.shrink)
        say("expand", tuned.expand)
        # Two layers may share a half's shapes: the first one's word stands.
        shrink.setdefault(tuned.shrink_entry.limits, tuned.shrink_entry)
        expand.setdefault(tuned.expand_entry.limits, tuned.expand_entry)
        table = Table(_narrow_first(shrink.values()), _narrow_first(expand.values()), origin)
        write_table(path, facts.architecture, table)
    return table


def _narrow_first(
    entries: Iterable[TableEntry[_Config]],
) -> tuple[TableEntry[_Config], ...]:
    """Entries in an order in which none hides another that it holds all workloads of."""
    keys = ("item_size", "slices", "max_rank", "width", "tokens")

    def limits(entry: TableEntry[_Config]) -> tuple[float, ...]:
        own = dict(entry.limits)
        return tuple(own.get(key, math.inf) for key in keys)

    return tuple(sorted(entries, key=limits))


def _device(architecture: int, *, has_gpu: bool) -> tuple[DeviceFacts, int]:
    """The device's facts and shared memory; without a GPU those of a card of an architecture."""
    from multilora_kernels.triton.launch import device_facts
    from tools.kernels.measure.tuned.launch_cases import CARDS, card_facts
    from tools.kernels.measure.tuned.trials import shared_memory_of

    if has_gpu:
        device = torch.device("cuda")
        return device_facts(device), shared_memory_of(device)
    card = str(architecture)
    return card_facts(card), CARDS[card].program_bytes


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m tools.kernels.tune",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--layers", nargs="+", choices=LAYERS, default=list(LAYERS), metavar="NAME")
    parser.add_argument("--tokens", nargs="+", type=_power_of_two, default=list(TOKENS))
    parser.add_argument("--max-rank", nargs="+", type=_positive, default=[16, 64])
    parser.add_argument("--max-loras", type=_positive, default=32, help="less takes less memory")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16")
    parser.add_argument(
        "--processes", type=_positive, default=os.cpu_count() or 1, help="that compile"
    )
    parser.add_argument("--out", type=Path, metavar="FILE", help="default: ARCHITECTURE.json")
    parser.add_argument("--dry-run", action="store_true", help="only say what would be timed")
    parser.add_argument("--list", action="store_true", help="with --dry-run: every candidate")
    parser.add_argument(
        "--arch",
        type=int,
        choices=(80, 90, 100, 120),
        default=90,
        help="of --dry-run without a GPU",
    )
    return parser


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


def _power_of_two(text: str) -> int:
    value = _positive(text)
    if value & (value - 1):
        raise argparse.ArgumentTypeError(
            f"must be a power of two, as workloads are rounded to, got {value}"
        )
    return value


if __name__ == "__main__":
    sys.exit(main())
