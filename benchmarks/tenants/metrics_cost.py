"""What the LoRA metrics and metering cost: microseconds, and throughput with them on and off.

The first table times what is recorded, each in its own loop; minimum over repeats. `step` is all
that a step of a running batch records; the rest happens when a request or an adapter comes or goes.
`scrape` is what reading the files of an engine with 200 adapters takes of an API server.

The second part starts two engines with the same settings, metrics on (`on`: vLLM's statistics,
its own metrics among them, are on in both) and off, and times the same requests on each, turn by
turn; reported are medians, and the medians of the ratios taken within a round. With
`of=metering` metrics are on in both, and one meters its requests as an API server does, into
metrics and a log.
"""

from __future__ import annotations

import tempfile
import time
import timeit
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.harness.registry import Figure, benchmark
from benchmarks.harness.turns import paired
from benchmarks.loads.smollm2 import base_model, model_config
from benchmarks.steps.cpu_throughput import (
    MAX_RANK,
    RANKS,
    REQUESTS,
    fastest_dtype,
    random_prompts,
    requested_adapters,
)
from vllm_multilora.metering.usage_log import Usage, UsageLog
from vllm_multilora.metrics.adapter_metrics import AdapterMetrics
from vllm_multilora.metrics.collector import LoRACollector
from vllm_multilora.metrics.recorder import Recorder
from vllm_multilora.metrics.request_metrics import RequestMetrics
from vllm_multilora.metrics.server_counts import COUNTS
from vllm_multilora.slots.adapter_usage import AdapterUse
from vllm_multilora.slots.assignment import SlotAssignment
from vllm_multilora.slots.policies.lru import LruPolicy
from vllm_multilora.states import AdapterState

ADAPTERS = 200
RUNS = 1_000
REPEATS = 100
PROMPT_TOKENS, NEW_TOKENS = 16, 48


def microseconds(act: Callable[[], object], runs: int = RUNS) -> float:
    """Least time of one call."""
    return min(timeit.repeat(act, number=runs, repeat=REPEATS)) / runs * 1e6


def recording_costs(folder: Path) -> dict[str, float]:
    """Microseconds by what is recorded."""

    def make(role: str) -> Recorder:
        return Recorder(folder, role=role, engine="0", model_name="base", max_adapters=ADAPTERS)

    names = {number: f"customer-{number}" for number in range(ADAPTERS)}
    recorder = make("engine")
    use = AdapterUse(rank=16, size=1 << 20)
    adapters = AdapterMetrics(recorder, names.get, lambda number: use, slots=16, max_rank=64)
    slots = SlotAssignment(16, LruPolicy(), adapters)
    requests = RequestMetrics(recorder)
    for number, name in names.items():
        adapters.known(name)
        adapters.read(name, 0.02)
        adapters.moved(number, AdapterState.HOST)
        requests.accept(name, number, name, is_ready=True)
        requests.finish(name, number)

    def step() -> None:
        adapters.step(8)
        adapters.contents(slots.contents)

    def request() -> None:
        requests.accept("a request", 7, "customer-7", is_ready=True)
        requests.finish("a request", 7)

    def move() -> None:
        slots.clear(7)
        slots.assign(7, pack=1)
        adapters.copied("customer-7", 0.005)
        adapters.moved(7, AdapterState.SLOT)
        adapters.contents(slots.contents)

    collector = LoRACollector()
    collector.show(folder)
    COUNTS.start(lambda: make("server"))
    usage = Usage("a request", "customer-7", "d" * 64, None, None, 100, 32, 48)
    return {
        "prompt counted, at its end": microseconds(lambda: COUNTS.count_tokens(usage)),
        "step": microseconds(step),
        "request, from its arrival to its end": microseconds(request),
        "adapter copied into a slot": microseconds(move),
        f"scrape, {ADAPTERS} adapters": microseconds(lambda: list(collector.collect()), runs=3),
    }


def throughput(rounds: int, of: str) -> list[dict[str, float]]:
    """Seconds for the same requests with metrics, or metering, on and off, by round."""
    from vllm import LLM, SamplingParams

    from vllm_multilora.integration.server.requests.metering import ServerMeter, attach

    model, config = base_model(), model_config()
    prompts = random_prompts(PROMPT_TOKENS)
    sampling = SamplingParams(temperature=0, max_tokens=NEW_TOKENS, ignore_eos=True)

    with tempfile.TemporaryDirectory() as scratch:
        requests = requested_adapters(Path(scratch), config)

        def start(*, metrics: bool) -> LLM:
            # Where there is no folder, nothing is recorded: as with --disable-log-stats, but with
            # vLLM's own statistics the same on both sides.
            from vllm_multilora.integration.api_server import engine_settings

            settings: dict[str, Any] = {
                "dtype": fastest_dtype(),
                "enforce_eager": True,
                "max_model_len": 256,
                "max_num_seqs": REQUESTS,
                "enable_lora": True,
                "max_loras": len(RANKS),
                "max_lora_rank": MAX_RANK,
                "disable_log_stats": False,
            }
            make_folder = engine_settings.make_folder
            if not metrics:
                engine_settings.make_folder = lambda vllm_config: None
            try:
                return LLM(str(model), **settings)
            finally:
                engine_settings.make_folder = make_folder

        # The one with metrics last: a process shows its newest engine's.
        engines = {"off": start(metrics=of == "metering"), "on": start(metrics=True)}
        usage_log = Path(scratch) / "usage.jsonl"
        if of == "metering":
            log = UsageLog(usage_log, limit=1 << 40)
            attach(engines["on"].llm_engine.output_processor, ServerMeter(log))

        def seconds(name: str) -> float:
            engine = engines[name]
            engine.reset_prefix_cache()
            begin = time.perf_counter()
            engine.generate(prompts, sampling, lora_request=requests, use_tqdm=False)
            return time.perf_counter() - begin

        found = paired({name: partial(seconds, name) for name in engines}, rounds)
        counted = {
            m.labels["lora_name"] for m in engines["on"].get_metrics() if "by_adapter" in m.name
        }
        assert len(counted) == len(RANKS), "the engine that should record did not"
        if of == "metering":
            log.close()
            lines = len(usage_log.read_text().splitlines())
            assert lines == (rounds + 1) * REQUESTS, f"{lines} prompts were metered"
        for engine in engines.values():
            engine.llm_engine.engine_core.shutdown(timeout=30.0)
        return found


@benchmark(
    workload="what is recorded, each in a loop; 16 requests of 16 + 48 tokens over 8 adapters",
    control="an engine with the same settings that does not record, in the same rounds",
    figure="time with metrics, or metering, over time without",
    compares_to="1.01, the goal",
    quick={"rounds": 0},
)
def metrics_cost(of: str = "metrics", rounds: int = 5) -> Iterable[Figure]:
    """What the LoRA metrics and metering cost: microseconds, and throughput with them on and off.

    Args:
        of: What is on and off: `metrics` or `metering`.
        rounds: Of both engines; 0 for the recording alone.
    """
    with tempfile.TemporaryDirectory() as scratch:
        for what, cost in recording_costs(Path(scratch)).items():
            yield Figure("", f"{what}, µs", [cost])
    if rounds:
        found = throughput(rounds, of)
        yield Figure("", f"time with {of} / without", [one["on"] / one["off"] for one in found])
