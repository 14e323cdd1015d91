"""`vllm-multilora plan --traffic`: predicts how a calibrated server would handle a trace."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path

import msgspec

from vllm_multilora.errors import ConfigError
from vllm_multilora.slots.budget import CpuBudget
from vllm_multilora.slots.simulation.adapter_sizes import size_in
from vllm_multilora.slots.simulation.replay import ServerShape
from vllm_multilora.slots.simulation.traces import read_timed_trace
from vllm_multilora.toolbox.capacity.calibration import Calibration, check_fits, read_calibration
from vllm_multilora.toolbox.capacity.forecast import Forecast, forecast
from vllm_multilora.toolbox.capacity.served import PlannedServer
from vllm_multilora.toolbox.commands.output.text_table import aligned
from vllm_multilora.wording import counted

_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin", "adapter_model.pt")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    traffic = parser.add_argument_group(
        "traffic instead of memory (settings default to those of the calibrated server)"
    )
    traffic.add_argument(
        "--traffic",
        type=Path,
        metavar="TRACE",
        help="predict how a server handles these requests: CSV or JSON lines with time (in "
        "seconds), adapter, prompt_tokens, generation_tokens and optionally bytes; or a usage log",
    )
    traffic.add_argument(
        "--calibration",
        type=Path,
        metavar="FILE",
        help="a file written by vllm-multilora calibrate",
    )
    for flag, meaning in (
        ("--max-num-seqs", "most requests per step"),
        ("--max-num-batched-tokens", "most tokens per step"),
        ("--max-cpu-loras", "most adapters in host memory"),
    ):
        traffic.add_argument(flag, type=int, metavar="N", help=meaning)
    traffic.add_argument(
        "--cpu-cache-gib", type=float, metavar="GIB", help="most GiB of adapters in host memory"
    )
    traffic.add_argument(
        "--policy", default="lru", metavar="NAME", help="cache policy (default: %(default)s)"
    )


def run(arguments: argparse.Namespace) -> int:
    if arguments.calibration is None:
        raise ConfigError(
            "--traffic needs --calibration, a file that `vllm-multilora calibrate` writes"
        )
    for flag, value in (("--plot", arguments.plot), ("--gpu-memory", arguments.gpu_memory)):
        if value is not None:
            raise ConfigError(f"{flag} is for plans of memory: leave it or --traffic out")
    trace = read_timed_trace(arguments.traffic)
    calibration = read_calibration(arguments.calibration)
    check_fits(calibration, arguments.calibration, arguments.model)
    server = _server(arguments, calibration)
    sizes = dict(calibration.adapters)
    if arguments.adapters is not None:
        sizes |= sizes_in(arguments.adapters)
    found = forecast(trace, sizes, server, calibration)
    report = _json if arguments.json else _text
    print(report(found, server, calibration))
    for each in found.outside:
        print(f"vllm-multilora plan: outside the calibration: {each}", file=sys.stderr)
    return 0


def sizes_in(folder: Path) -> dict[str, int]:
    """Bytes of the weights of the adapters in a directory, by their folders' names."""
    try:
        files = [each / name for each in sorted(folder.iterdir()) for name in _WEIGHTS]
    except OSError as error:
        raise ConfigError(f"--adapters {folder}: {error.strerror}") from error
    return {file.parent.name: file.stat().st_size for file in reversed(files) if file.is_file()}


def _server(arguments: argparse.Namespace, calibration: Calibration) -> PlannedServer:
    known, gib = calibration.settings, arguments.cpu_cache_gib
    size = None if gib is None else size_in("GiB", gib, "--cpu-cache-gib")

    def setting(name: str) -> int:
        given = getattr(arguments, name)
        return int(getattr(known, name) if given is None else given)

    budget = CpuBudget(adapters=arguments.max_cpu_loras, bytes=size)
    if size is None and arguments.max_cpu_loras is None:
        budget = CpuBudget(adapters=known.max_cpu_loras, bytes=known.cpu_cache_bytes)
    shape = ServerShape(setting("max_loras"), budget, setting("max_num_seqs"))
    return PlannedServer(shape, setting("max_num_batched_tokens"), arguments.policy)


def _text(found: Forecast, server: PlannedServer, calibration: Calibration) -> str:
    rows = [
        ("", "p50", "p99"),
        ("first token, ms", _ms(found.first_token_p50), _ms(found.first_token_p99)),
        ("token to token, ms", _ms(found.next_token_p50), _ms(found.next_token_p99)),
    ]
    shape = server.shape
    return "\n".join(
        [
            f"{counted(found.requests, 'request')} in {found.seconds:.1f} s; "
            f"{counted(shape.slots, 'slot')}, host memory: {shape.budget}, {server.policy}; "
            f"batches of {counted(shape.concurrency, 'request')}, "
            f"steps of {counted(server.max_num_batched_tokens, 'token')}",
            f"{found.generated_per_s:.1f} generated tokens/s, {found.prompt_per_s:.1f} tokens/s of "
            f"prompts; the engine computes {found.busy:.0%} of the time",
            "",
            *aligned(rows, right=(1, 2)),
            "",
            f"adapters: {found.gpu_hit_rate:.1%} of requests find theirs in a slot, "
            f"{found.cpu_hit_rate:.1%} in a slot or in host memory; "
            f"{counted(found.loads, 'load')}, "
            f"{counted(found.activations, 'copy', 'copies')} into slots",
            f"calibrated {calibration.created} on {calibration.machine.processor}; steps are "
            f"fitted to {calibration.residual.rms:.1%}",
        ]
    )


def _ms(seconds: float) -> str:
    return f"{1000 * seconds:,.1f}"


def _json(found: Forecast, server: PlannedServer, calibration: Calibration) -> str:
    shape = server.shape
    report = {
        "forecast": asdict(found),
        "server": {
            "max_loras": shape.slots,
            "max_cpu_loras": shape.budget.adapters,
            "cpu_cache_bytes": shape.budget.bytes,
            "max_num_seqs": shape.concurrency,
            "max_num_batched_tokens": server.max_num_batched_tokens,
            "policy": server.policy,
        },
        "calibration": {
            "created": calibration.created,
            "machine": msgspec.to_builtins(calibration.machine),
            "versions": calibration.versions,
            "model": calibration.model[0],
            "residual": calibration.residual.rms,
        },
    }
    return json.dumps(report, indent=2)
