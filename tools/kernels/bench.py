"""Times the kernels against other ways to compute the same LoRA layers.

    python -m tools.kernels.bench [--quick] [--case "decode 8b zipf"] [--json FILE]

Against vLLM's own kernels, where vLLM is installed, a loop of the vendor's GEMMs over the adapters,
and the base layer's own GEMM, for decode and prefill batches of four popularities, four rank mixes
and the layers of Llama 3 8B and 70B. Every contender's result is checked before it is timed.
Without a GPU the CPU backends run at reduced sizes: that shows that the command works, and nothing
about a GPU.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any

import torch

from multilora_kernels import native, triton_availability
from multilora_kernels.configs.config_table import table_path
from multilora_kernels.triton_availability import INTERPRET_VARIABLE, TritonUnavailableError
from tools.kernels.measure.baselines import BaseLayer, GemmLoop
from tools.kernels.measure.batches import build
from tools.kernels.measure.cases import (
    CASES,
    CPU_SIZES,
    GPU_SIZES,
    GROUPS,
    Case,
    Sizes,
    choose_cases,
)
from tools.kernels.measure.comparison import CaseResult, available, compare, group_means
from tools.kernels.measure.contenders import Contender, Multilora, load_contenders
from tools.kernels.measure.environment import command_arguments, current_environment
from tools.kernels.measure.limits import measure_peaks
from tools.kernels.measure.timing import GraphTimer, timer_for


def contenders_for(device: torch.device) -> tuple[list[Contender], dict[str, str]]:
    """Who runs on a device, these kernels first, and who is left out for what reason.

    Raises:
        TritonUnavailableError: There is a GPU, and these kernels cannot run on it.
    """
    entered = load_contenders()
    left_out = dict(entered.left_out)
    if device.type == "cuda":
        triton_availability.require(device.type)
        own: list[Contender] = [Multilora("triton")]
        if config_table(device) is not None:
            from tools.kernels.measure.tuned.trials import ComputedDefaults  # imports Triton

            own.append(ComputedDefaults())
        return [*own, *entered.contenders, GemmLoop()], left_out
    own = [Multilora("native"), Multilora("torch")]
    if not native.is_available():
        left_out[own.pop(0).name] = "the C kernels cannot be built here"
    others = list(entered.contenders)
    if os.environ.get(INTERPRET_VARIABLE) == "1":
        reason = f"{INTERPRET_VARIABLE}=1: times in Triton's interpreter say nothing about kernels"
        left_out |= {contender.name: reason for contender in others}
        others = []
    return [*own, *others, GemmLoop()], left_out


def run_cases(
    cases: Sequence[Case],
    sizes: Sizes,
    device: torch.device,
    contenders: Sequence[Contender],
    **how: Any,
) -> Iterator[CaseResult]:
    """Builds and compares one case after the other; `how` goes to `compare`."""
    for case in cases:
        batch = build(case.spec(sizes), device, sizes.dtype)
        yield compare(case.name, case.group, batch, contenders, **how)


def table_head(contenders: Sequence[str]) -> str:
    """Title and rule of the table, in Markdown."""
    first, *others = contenders
    columns = ["case", "adapters", f"{BaseLayer.name} us", f"{first} us", "share of peak"]
    columns += [f"{name} us" for name in others]
    columns += [f"ratio to {name}" for name in (*others, BaseLayer.name)]
    return f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}"


def table_row(result: CaseResult, contenders: Sequence[str]) -> str:
    """A case's row of the table; a dash where there is no figure."""
    first, *others = contenders

    def cell(values: dict[str, float], name: str, form: str) -> str:
        return format(values[name], form) if name in values else "-"

    cells = [result.case, str(result.active_adapters), f"{result.base_us:.1f}"]
    cells += [
        cell(result.microseconds, first, ".1f"),
        cell(result.share_of_peak, first, ".0%"),
        *(cell(result.microseconds, name, ".1f") for name in others),
        *(cell(result.ratios, name, ".2f") for name in (*others, BaseLayer.name)),
    ]
    return f"| {' | '.join(cells)} |"


def summary(results: Sequence[CaseResult], first: str) -> str:
    """The geometric means per group, in words."""
    means = group_means(results)
    lines = [f"Geometric means of the time of {first} over that of others (below 1: faster)"]
    for group in GROUPS:
        lines += [
            f"  {group}: {mean:.2f} to {name} ({count} cases)"
            for name, (mean, count) in means.get(group, {}).items()
        ]
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    """Runs the benchmark; returns 1 if these kernels failed or were wrong in some case."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.kernels.bench",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--quick", action="store_true", help="few cases and repetitions")
    parser.add_argument(
        "--case",
        action="append",
        default=[],
        help="only cases whose name has these words, such as 'decode 70b mixed'; repeatable",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write JSON lines")
    chosen = parser.parse_args(arguments)
    cases = choose_cases(chosen.case, quick=chosen.quick)
    if not cases:
        parser.error(f"no case has these words; names are like {CASES[0].name!r}")
    if chosen.json is not None and not chosen.json.parent.is_dir():
        parser.error(f"--json: there is no folder {chosen.json.parent}")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        contenders, left_out = contenders_for(device)
    except TritonUnavailableError as error:
        print(error, file=sys.stderr)
        return 2
    with ExitStack() as stack:
        file = stack.enter_context(chosen.json.open("w", encoding="utf-8")) if chosen.json else None
        given = command_arguments(arguments)
        return _run(cases, device, contenders, left_out, chosen.quick, file, given)


def _run(
    cases: list[Case],
    device: torch.device,
    contenders: list[Contender],
    left_out: dict[str, str],
    quick: bool,
    file: IO[str] | None,
    arguments: list[str],
) -> int:
    sizes = GPU_SIZES if device.type == "cuda" else CPU_SIZES

    def record(kind: str, **values: Any) -> None:
        if file is not None:
            print(json.dumps({"record": kind, **values}), file=file, flush=True)

    timer = timer_for(device)
    # On a CPU the batches lie in its caches, so shares of the memory's bandwidth mean nothing.
    on_gpu = device.type == "cuda"
    peaks = measure_peaks(timer, device, sizes.dtype) if on_gpu else None
    repetitions = max(5, sizes.repetitions // 4) if quick else sizes.repetitions
    able, unable = available(contenders, build(cases[0].spec(sizes), device, sizes.dtype))
    left_out |= unable
    header: dict[str, Any] = {
        **current_environment(device, "tools.kernels.bench", arguments).facts(),
        "timing": timer.method,
        "repetitions": repetitions,
        "sizes": asdict(sizes) | {"dtype": str(sizes.dtype).removeprefix("torch.")},
        "peaks": None if peaks is None else asdict(peaks),
        "config_table": str(config_table(device) or "computed defaults") if on_gpu else None,
        "left_out": left_out,
    }
    if isinstance(timer, GraphTimer):
        header["graph_floor_us"] = timer.floor()
    record("environment", **header)
    print(_heading(header))
    names = [contender.name for contender in able]
    print(table_head(names))
    results = []
    how = {"timer": timer, "peaks": peaks, "repetitions": repetitions}
    for result in run_cases(cases, sizes, device, able, **how):
        results.append(result)
        record("case", **asdict(result))
        print(table_row(result, names), flush=True)
        for name, reason in result.not_timed.items():
            print(f"{result.case}: {name} {reason}", file=sys.stderr)
    print(summary(results, names[0]))
    for group, means in group_means(results).items():
        ratios = {name: {"mean": mean, "cases": count} for name, (mean, count) in means.items()}
        record("group", group=group, first=names[0], ratios=ratios)
    return 1 if any(names[0] in result.not_timed for result in results) else 0


def _heading(header: dict[str, Any]) -> str:
    peaks = header["peaks"]
    lines = [
        f"{header['device']}, driver {header['driver']}, torch {header['torch']}, "
        f"triton {header['triton']}, {header['date']}",
        f"timing: {header['timing']}; medians of {header['repetitions']}",
    ]
    if header["config_table"] is not None:
        lines.append(f"configurations: {header['config_table']}")
    if peaks is not None:
        lines.append(
            f"peaks ({peaks['method']}): {peaks['bytes_per_second'] / 1e9:.0f} GB/s, "
            f"{peaks['operations_per_second'] / 1e12:.1f} TFLOP/s"
        )
    if "graph_floor_us" in header:
        lines.append(
            f"in every time: {header['graph_floor_us']:.1f} us that any graph replay takes"
        )
    lines += [f"left out: {name}: {reason}" for name, reason in header["left_out"].items()]
    if not header["on_gpu"]:
        lines.insert(
            0, "NO GPU WAS MEASURED: CPU backends at reduced sizes. Nothing follows for a GPU."
        )
    return "\n".join(lines) + "\n"


def config_table(device: torch.device) -> Path | None:
    """The table that the Triton kernels' configurations come from; None: they are computed."""
    from multilora_kernels.triton.launch import device_facts  # imports Triton

    return table_path(device_facts(device).architecture)


if __name__ == "__main__":
    sys.exit(main())
