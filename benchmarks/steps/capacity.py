"""What `vllm-multilora plan --traffic` predicts of a server, and what the server does.

In each round a server of SmolLM2-135M in bfloat16 with adapters of ranks 8 to 64 on all projections
gets three traces over HTTP. It is calibrated (`vllm-multilora calibrate`) before and after each
round, since machines change their speed, and the mean of both predictions counts. `steady` asks for
half of what the server can do; `bursty` comes close to that, in bursts, over many more adapters
than slots; `saturating` asks for all at once, of adapters of all ranks. In each round all adapters
of a trace are new to the server, so that it begins as the prediction does: cold.
"""

from __future__ import annotations

import contextlib
import csv
import io
import json
import random
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from benchmarks.harness.registry import Figure, benchmark
from benchmarks.loads.engine_loop import power_law, quantile
from benchmarks.loads.fleet import Fleet
from benchmarks.loads.server import vllm_server
from benchmarks.loads.smollm2 import base_model, model_config
from benchmarks.steps.cpu_throughput import fastest_dtype
from vllm_multilora.cli import main
from vllm_multilora.toolbox.clients.completions import Answer, Ask, Completions

SLOTS, HOST_PLACES, BATCH, STEP_TOKENS = 8, 64, 16, 512
RANKS = (8, 16, 32, 64)
CALIBRATED = 24
"""Adapters that a calibration has for itself."""

MEASURES = {
    "generated_per_s": "output tokens/s",
    "first_token_p50": "first token, p50, ms",
    "first_token_p99": "p99, ms",
    "next_token_p50": "later tokens, p50, ms",
}


@dataclass(frozen=True)
class Line:
    """A request of a trace, its adapter as a number."""

    time: float
    adapter: int
    prompt_tokens: int
    generation_tokens: int


def steady(dice: random.Random, requests: int) -> Iterable[Line]:
    """Three requests a second for six adapters."""
    return _lines(dice, (dice.expovariate(3) for _ in range(requests)), power_law(6))


def bursty(dice: random.Random, requests: int) -> Iterable[Line]:
    """Bursts of six a second, and one a second between them, for 24 adapters."""
    gaps = (dice.expovariate(6 if n // 12 % 2 == 0 else 1.5) for n in range(requests))
    return _lines(dice, gaps, power_law(24))


def saturating(dice: random.Random, requests: int) -> Iterable[Line]:
    """Thirty requests a second for eight adapters of all ranks."""
    return _lines(dice, (dice.expovariate(30) for _ in range(requests)), [1.0] * SLOTS)


TRACES: tuple[Callable[[random.Random, int], Iterable[Line]], ...] = (steady, bursty, saturating)


def _lines(dice: random.Random, gaps: Iterable[float], weights: Sequence[float]) -> Iterable[Line]:
    time = 0.0
    for gap in gaps:
        time += gap
        (adapter,) = dice.choices(range(len(weights)), weights)
        yield Line(round(time, 4), adapter, dice.randint(16, 128), dice.randint(8, 32))


@benchmark(
    workload="SmolLM2-135M in bfloat16 behind HTTP, adapters of ranks 8 to 64 on all projections "
    "in 8 slots, requests of 16 to 128 + 8 to 32 tokens: steady at half of the capacity, bursty "
    "with cold adapters near it, and saturating",
    control="the real server, calibrated before and after each round",
    figure="the prediction of `plan --traffic` divided by what the server does",
    compares_to="the goal, 0.90 to 1.10",
    quick={"rounds": 1, "requests": 6},
)
def capacity(rounds: int = 3, requests: int = 200, keep: str = "") -> Iterable[Figure]:
    """Predicted throughput and first tokens against those of a real server.

    Args:
        rounds: Of all traces.
        requests: Of each trace.
        keep: A folder for the calibrations and the traces.
    """
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        kept = Path(keep) if keep else scratch
        fleet = Fleet(scratch / "adapters", model_config(), RANKS[0])
        for n in range((rounds + 1) * CALIBRATED):
            fleet.add(f"calibrated-{n}", rank=RANKS[n % len(RANKS)])
        traces = {make.__name__: list(make(random.Random(0), requests)) for make in TRACES}
        for kind, lines in traces.items():
            for turn in range(rounds):
                for n in {line.adapter for line in lines}:
                    fleet.add(_name(kind, turn, n), rank=RANKS[n % len(RANKS)])
        with vllm_server(
            base_model(),
            *("--served-model-name", "base", "--dtype", fastest_dtype(), "--enforce-eager"),
            *("--max-model-len", "512", "--max-num-seqs", str(BATCH)),
            *("--max-num-batched-tokens", str(STEP_TOKENS), "--no-enable-prefix-caching"),
            *("--enable-lora", "--max-loras", str(SLOTS), "--max-cpu-loras", str(HOST_PLACES)),
            *("--max-lora-rank", str(max(RANKS)), "--multilora-adapter-dir", str(fleet.folder)),
            log=scratch / "server.log",
        ) as server:
            settings = ("--max-num-seqs", str(BATCH), "--max-num-batched-tokens", str(STEP_TOKENS))
            client = Completions(server.url, seed=0)
            found: dict[str, list[dict[str, float]]] = {kind: [] for kind in traces}
            expected: dict[str, list[dict[str, float]]] = {kind: [] for kind in traces}

            def calibrate(number: int) -> Path:
                file = kept / f"calibration-{number}.json"
                _command("calibrate", "--url", server.url, *settings, "--output", str(file))
                return file

            before = calibrate(0)
            for turn in range(rounds):
                files = {kind: kept / f"{kind}-{turn}.csv" for kind in traces}
                for kind, lines in traces.items():
                    asks = [
                        Ask(
                            _name(kind, turn, x.adapter),
                            x.prompt_tokens,
                            x.generation_tokens,
                            x.time,
                        )
                        for x in lines
                    ]
                    _write(files[kind], asks)
                    found[kind].append(_summary(client.together(asks)))
                    print(f"{kind}: {found[kind][-1]}", file=sys.stderr, flush=True)
                after = calibrate(turn + 1)
                for kind, trace in files.items():
                    reported = [_forecast(trace, file, fleet.folder) for file in (before, after)]
                    means = {key: statistics.mean(one[key] for one in reported) for key in MEASURES}
                    expected[kind].append(means)
                before = after
        for kind in traces:
            for key, measure in MEASURES.items():
                scale = 1 if key == "generated_per_s" else 1000
                real = [scale * one[key] for one in found[kind]]
                predicted = [scale * one[key] for one in expected[kind]]
                yield Figure(f"{kind}, real", measure, real)
                yield Figure(f"{kind}, predicted", measure, predicted)
                ratios = [a / b for a, b in zip(predicted, real, strict=True)]
                yield Figure(f"{kind}, predicted / real", measure, ratios)


def _name(kind: str, turn: int, adapter: int) -> str:
    return f"trace-{kind}-{turn}-{adapter}"  # after those that the calibration takes first


def _write(path: Path, asks: Sequence[Ask]) -> None:
    with path.open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(("time", "adapter", "prompt_tokens", "generation_tokens"))
        for ask in asks:
            rows.writerow((ask.delay_s, ask.model, ask.prompt_tokens, ask.new_tokens))


def _forecast(trace: Path, calibration: Path, adapters: Path) -> dict[str, float]:
    words = ("--traffic", str(trace), "--calibration", str(calibration))
    reported = _command("plan", *words, "--adapters", str(adapters), "--json")
    forecast: dict[str, float] = json.loads(reported)["forecast"]
    return forecast


def _command(*words: str) -> str:
    """What a command prints.

    Raises:
        RuntimeError: It fails.
    """
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        status = main(words)
    if status:
        raise RuntimeError(f"vllm-multilora {' '.join(words)} ended with {status}")
    return printed.getvalue()


def _summary(answers: Sequence[Answer]) -> dict[str, float]:
    """What the server did, in seconds, as the prediction names it."""
    begin = min(answer.begin_s for answer in answers)
    end = max(answer.tokens_s[-1] for answer in answers)
    first = [answer.first_token_s for answer in answers]
    gaps = [after - before for answer in answers for before, after in pairwise(answer.tokens_s)]
    return {
        "generated_per_s": sum(len(answer.tokens_s) for answer in answers) / (end - begin),
        "first_token_p50": quantile(first, 0.5),
        "first_token_p99": quantile(first, 0.99),
        "next_token_p50": quantile(gaps, 0.5),
    }
