"""`vllm-multilora simulate`: what hit rates cache settings and policies give for a trace."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

from vllm_multilora.errors import ConfigError
from vllm_multilora.slots.budget import GIB, CpuBudget, readable
from vllm_multilora.slots.policies.policy_registry import make_policy, policy_names
from vllm_multilora.slots.simulation.adapter_sizes import (
    DEFAULT_MIB_PER_RANK,
    parse_rank_mix,
    read_sizes,
    size_in,
    sizes_by_rank,
)
from vllm_multilora.slots.simulation.replay import Optimum, Outcome, ServerShape, optimum, simulate
from vllm_multilora.slots.simulation.synthetic_traces import (
    KINDS,
    Traffic,
    kinds_help,
    synthetic_trace,
)
from vllm_multilora.slots.simulation.traces import Trace, TraceError, read_trace
from vllm_multilora.toolbox.commands.output import plots
from vllm_multilora.toolbox.commands.output.text_table import aligned
from vllm_multilora.wording import counted

DEFAULT_CPU_CACHE_GIB = 8.0
DEFAULT_ADAPTER_MIB = 16 * DEFAULT_MIB_PER_RANK
_SYNTHETIC = {
    "requests": "number of requests",
    "adapters": "number of adapters",
    "zipf_exponent": "how unequal, up to 10; 0: all alike",
    "burst_length": "bursts: mean requests of a burst",
    "scan_every": "scan: requests between two scans",
    "seed": "of the random numbers",
}
"""The attributes of `Traffic`, each of which has a flag, and what they mean."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    defaults = asdict(Traffic())
    traffic = parser.add_argument_group("traffic")
    traffic.add_argument(
        "trace",
        nargs="?",
        type=Path,
        help="CSV or JSON lines: time, adapter and, optionally, bytes; or a usage log",
    )
    traffic.add_argument(
        "--synthetic", choices=KINDS, help="generate traffic instead. " + kinds_help()
    )
    synthetic = parser.add_argument_group("synthetic traffic")
    for name, meaning in _SYNTHETIC.items():
        synthetic.add_argument(
            f"--{name.replace('_', '-')}",
            type=type(defaults[name]),
            default=defaults[name],
            metavar="N",
            help=f"{meaning} (default: %(default)s)",
        )

    sizes = parser.add_argument_group("sizes of adapters, if the trace has no bytes")
    way = sizes.add_mutually_exclusive_group()
    way.add_argument(
        "--adapter-mib",
        type=float,
        default=DEFAULT_ADAPTER_MIB,
        metavar="MIB",
        help=f"one size for all (default: {DEFAULT_ADAPTER_MIB:g}, rank 16 on Llama 3 8B)",
    )
    way.add_argument(
        "--adapter-sizes", type=Path, metavar="FILE", help='JSON in MiB, like {"acme": 80}'
    )
    way.add_argument(
        "--rank-mix", metavar="MIX", help="random ranks with these weights, like 8=70,16=20,64=10"
    )
    sizes.add_argument(
        "--mib-per-rank",
        type=float,
        default=DEFAULT_MIB_PER_RANK,
        metavar="MIB",
        help="size of one rank, for --rank-mix (default: %(default)g, Llama 3 8B)",
    )

    server = parser.add_argument_group("server")
    for flag, slots, meaning in (
        ("--max-loras", 16, "number of slots (default: %(default)s)"),
        ("--max-cpu-loras", None, "limit of adapters in host memory"),
    ):
        server.add_argument(flag, type=int, default=slots, metavar="N", help=meaning)
    server.add_argument(
        "--cpu-cache-gib",
        type=float,
        metavar="GIB",
        help="limit of host memory for adapters, in GiB (default: "
        f"{DEFAULT_CPU_CACHE_GIB:g} without --max-cpu-loras)",
    )
    server.add_argument(
        "--concurrency",
        type=int,
        default=8,
        metavar="N",
        help="the running batch is the N most recent requests (default: %(default)s); policies "
        "differ only if there are more slots than adapters in the batch",
    )
    server.add_argument(
        "--policy",
        action="append",
        metavar="NAME",
        help="policy to try, a name or module:Class; repeatable (default: every known name)",
    )

    output = parser.add_argument_group("output")
    output.add_argument("--json", action="store_true", help="print JSON")
    output.add_argument(
        "--plot",
        type=Path,
        metavar="FILE",
        help="plot the GPU hit rate against the number of slots, as FILE.png or FILE.svg",
    )


def run(arguments: argparse.Namespace) -> int:
    trace = _trace(arguments)
    sizes = _sizes(arguments, trace)
    shape = _shape(arguments)
    policies = tuple(dict.fromkeys(arguments.policy or policy_names()))
    for policy in policies:
        make_policy(policy)  # says what is wrong with it before anything is replayed
    if arguments.plot:
        plots.require(arguments.plot)
    outcomes = [simulate(trace.requests, sizes, shape, policy) for policy in policies]
    bound = optimum(trace.requests, sizes, shape)
    report = _json if arguments.json else _table
    print(report(trace, sum(sizes[name] for name in trace.adapters), shape, outcomes, bound))
    if arguments.plot:
        _plot(trace, sizes, shape, policies, arguments.plot)
    return 0


def _trace(arguments: argparse.Namespace) -> Trace:
    if (arguments.trace is None) == (arguments.synthetic is None):
        raise ConfigError(
            "give either a trace file or --synthetic with one of: " + ", ".join(KINDS)
        )
    if arguments.trace is not None:
        return read_trace(arguments.trace)
    traffic = Traffic(**{name: getattr(arguments, name) for name in _SYNTHETIC})
    return synthetic_trace(arguments.synthetic, traffic)


def _sizes(arguments: argparse.Namespace, trace: Trace) -> dict[str, int]:
    """Bytes of every adapter; what the trace states counts before what the command line says."""
    unstated = [adapter for adapter in trace.adapters if adapter not in trace.sizes]
    if arguments.rank_mix:
        mix = parse_rank_mix(arguments.rank_mix)
        sizes = sizes_by_rank(unstated, mix, arguments.mib_per_rank, arguments.seed)
    elif arguments.adapter_sizes:
        sizes = read_sizes(arguments.adapter_sizes)
        for adapter in unstated:
            if adapter not in sizes:
                raise TraceError(f"{arguments.adapter_sizes}: has no size for adapter {adapter!r}")
    else:
        sizes = dict.fromkeys(unstated, size_in("MiB", arguments.adapter_mib, "--adapter-mib"))
    return {**sizes, **trace.sizes}


def _shape(arguments: argparse.Namespace) -> ServerShape:
    gib = arguments.cpu_cache_gib
    if gib is None and arguments.max_cpu_loras is None:
        gib = DEFAULT_CPU_CACHE_GIB
    size = None if gib is None else size_in("GiB", gib, "--cpu-cache-gib")
    budget = CpuBudget(adapters=arguments.max_cpu_loras, bytes=size)
    return ServerShape(arguments.max_loras, budget, arguments.concurrency)


def _table(
    trace: Trace, total: int, shape: ServerShape, outcomes: Sequence[Outcome], bound: Optimum
) -> str:
    header = ["policy", "GPU hits", "CPU hits", "loads", "activations", "GPU evictions"]
    rows = [[*header, "CPU evictions", "disk->CPU GiB", "CPU->GPU GiB"]]
    rows += [
        [
            *(outcome.policy, *_common(outcome)),
            *(str(outcome.gpu_evictions), str(outcome.cpu_evictions)),
            *(f"{moved / GIB:.1f}" for moved in (outcome.bytes_loaded, outcome.bytes_activated)),
        ]
        for outcome in outcomes
    ]
    rows.append(["optimum", *_common(bound), *[""] * 4])
    return "\n".join(
        [
            f"{counted(len(trace.requests), 'request')}, "
            f"{counted(len(trace.adapters), 'adapter')} of {readable(total)} in all; "
            f"{counted(shape.slots, 'slot')}, host memory: {shape.budget}, "
            f"batches of {counted(shape.concurrency, 'request')}",
            "",
            *aligned(rows, right=range(1, len(rows[0]))),
            "",
            "CPU hits: adapter in a slot or in host memory. Optimum: a bound by Belady's rule",
            "for adapters of one size, with the future known; even boundless memory needs "
            f"{counted(bound.compulsory, 'load')}.",
        ]
    )


def _common(found: Outcome | Optimum) -> list[str]:
    """The cells that outcomes and the optimum have."""
    rates = (f"{rate:.1%}" for rate in (found.gpu_hit_rate, found.cpu_hit_rate))
    return [*rates, str(found.loads), str(found.activations)]


def _json(
    trace: Trace, total: int, shape: ServerShape, outcomes: Sequence[Outcome], bound: Optimum
) -> str:
    report = {
        "trace": {"requests": len(trace.requests), "adapters": len(trace.adapters), "bytes": total},
        "server": {
            "max_loras": shape.slots,
            "max_cpu_loras": shape.budget.adapters,
            "cpu_cache_bytes": shape.budget.bytes,
            "concurrency": shape.concurrency,
        },
        "policies": [
            asdict(outcome)
            | {"gpu_hit_rate": outcome.gpu_hit_rate, "cpu_hit_rate": outcome.cpu_hit_rate}
            for outcome in outcomes
        ],
        "optimum": asdict(bound),
    }
    return json.dumps(report, indent=2)


def _plot(
    trace: Trace, sizes: dict[str, int], shape: ServerShape, policies: Sequence[str], path: Path
) -> None:
    """Replays the trace with 1, 2, 4, ... slots, as many as adapters and budget give sense to."""
    most = len(trace.adapters)
    if shape.budget.adapters is not None:
        most = min(most, shape.budget.adapters)
    slots = sorted({2**power for power in range(most.bit_length())} | {min(shape.slots, most)})
    shapes = [replace(shape, slots=count) for count in slots]
    rates = {
        policy: [simulate(trace.requests, sizes, at, policy).gpu_hit_rate for at in shapes]
        for policy in policies
    }
    rates["optimum"] = [optimum(trace.requests, sizes, at).gpu_hit_rate for at in shapes]
    title = (
        f"{counted(len(trace.requests), 'request')}, {counted(len(trace.adapters), 'adapter')}, "
        f"batches of {shape.concurrency}"
    )
    plots.draw_hit_rates(slots, rates, title, path)
