"""What identity and metering cost, as ratios of paired rounds: with each of them over without.

Loading: an adapter is opened, checked and packed into memory that was touched before, from the page
cache, with its digest and without, turn by turn; and signed, with a key, against unsigned. Of each
round the ratio of the two times is taken. The goal for the digest is at most 1.10.

Throughput: two engines answer the same requests turn by turn, one of which meters them as an API
server does, into metrics and a log. The goal is at least 0.99. Nothing else may run meanwhile.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterable
from contextlib import redirect_stdout
from pathlib import Path

import numpy as np

from benchmarks.cold.intake_cost import PROJECTIONS, Memory, layout_of, modules, write_adapter
from benchmarks.harness.registry import Figure, benchmark
from benchmarks.harness.turns import paired
from vllm_multilora.adapters.intake import Rules, open_adapter
from vllm_multilora.adapters.model.layout import ModelLayout
from vllm_multilora.adapters.signing.adapter_digest import AdapterDigest
from vllm_multilora.adapters.signing.signers import Signers

RANK = 64


def seconds_to_load(folder: Path, layout: ModelLayout, memory: Memory, rules: Rules) -> float:
    """Seconds until an adapter is in memory."""
    begin = time.perf_counter()
    with open_adapter(str(folder), rules) as source:
        intake = source.check([layout])
        places = np.cumsum([0, *intake.block_bytes[:-1]])
        intake.read(memory.array.ctypes.data + places, places)
    return time.perf_counter() - begin


def loading(megabytes: float, rounds: int) -> dict[str, list[dict[str, float]]]:
    """Rounds of loading with and without a digest, and with and without a signature."""
    from tests.adapters.signing.signed_folders import KeyPair

    layers = max(1, round(megabytes * 1e6 / (2 * RANK * sum(map(sum, PROJECTIONS.values())))))
    layout = layout_of(modules(layers), RANK, columns_first=False)
    update = AdapterDigest.update
    with tempfile.TemporaryDirectory() as name:
        scratch, folder = Path(name), Path(name) / "adapter"
        folder.mkdir()
        write_adapter(folder, layers, RANK)
        key = KeyPair.make(scratch, "signing")
        with redirect_stdout(None):
            key.sign(folder)
        rules = Rules(signers=Signers.read(key.public))
        size = (folder / "adapter_model.safetensors").stat().st_size
        memory = Memory(size + (1 << 20), fresh=False)
        print(f"an adapter of {size / 1e6:.0f} MB, rank {RANK}\n", flush=True)

        def load(*, digest: bool = True, signed: bool = False) -> float:
            AdapterDigest.update = update if digest else lambda self, content: None  # type: ignore[method-assign]
            try:
                return seconds_to_load(folder, layout, memory, rules if signed else Rules())
            finally:
                AdapterDigest.update = update  # type: ignore[method-assign]

        return {
            "digest": paired({"without": lambda: load(digest=False), "with": load}, rounds),
            "signature": paired({"without": load, "with": lambda: load(signed=True)}, rounds),
        }


@benchmark(
    workload="an adapter of rank 64, opened, checked and packed; 16 requests that are metered",
    control="the same without a digest, without a signature, and without metering",
    figure="time with over time without",
    compares_to="1.10 for digests and 1.01 for metering, the goals",
    quick={"megabytes": 8.0, "rounds": 2, "engine_rounds": 0},
)
def identity_cost(
    megabytes: float = 84.0, rounds: int = 15, engine_rounds: int = 7
) -> Iterable[Figure]:
    """What identity and metering cost, as ratios of paired rounds: with each of them over without.

    Args:
        megabytes: Of the adapter.
        rounds: Of loading.
        engine_rounds: Of both engines; 0 for loading alone.
    """
    found = loading(megabytes, rounds)
    for what, of in (("digest", "loading with a digest"), ("signature", "loading what is signed")):
        yield Figure("", of, [one["with"] / one["without"] for one in found[what]])
    if engine_rounds:
        from benchmarks.tenants.metrics_cost import throughput

        metering = throughput(engine_rounds, "metering")
        yield Figure("", "requests that are metered", [one["on"] / one["off"] for one in metering])
