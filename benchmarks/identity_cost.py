"""What identity and metering cost, as ratios of paired rounds: with each of them over without.

    python benchmarks/identity_cost.py [--rounds 15] [--engine-rounds 7] [--json FILE]

Loading: an adapter is opened, checked and packed into memory that was touched before, from the page
cache, with its digest and without, turn by turn; and signed, with a key, against unsigned. Of each
round the ratio of the two times is taken. The goal for the digest is at most 1.10.

Throughput: two engines answer the same requests turn by turn, one of which meters them as an API
server does, into metrics and a log. The goal is at least 0.99. Nothing else may run meanwhile.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from contextlib import redirect_stdout
from pathlib import Path

import numpy as np
from intake_cost import PROJECTIONS, Memory, layout_of, write_adapter
from turns import paired

from vllm_multilora.adapters.digest import AdapterDigest
from vllm_multilora.adapters.intake import Rules, open_adapter
from vllm_multilora.adapters.layout import ModelLayout
from vllm_multilora.adapters.signers import Signers

sys.path.insert(0, str(Path(__file__).parents[1]))

DIGEST_GOAL, METERING_GOAL = 1.10, 0.99
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
    from tests.adapters.signing import KeyPair

    layers = max(1, round(megabytes * 1e6 / (2 * RANK * sum(map(sum, PROJECTIONS.values())))))
    layout = layout_of(layers, RANK, columns_first=False)
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


def report(what: str, ratios: list[float], goal: str) -> None:
    """A line of the table."""
    median, least, most = statistics.median(ratios), min(ratios), max(ratios)
    print(f"| {what} | {median:.3f} | {least:.3f} to {most:.3f} | {goal} |", flush=True)


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--megabytes", type=float, default=84.0, help="of the adapter")
    parser.add_argument("--rounds", type=int, default=15, help="of loading")
    parser.add_argument("--engine-rounds", type=int, default=7, help="of both engines")
    parser.add_argument("--no-engines", action="store_true", help="measure loading alone")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    options = parser.parse_args()
    figures = loading(options.megabytes, options.rounds)
    if not options.no_engines:
        from metrics_cost import throughput

        figures["metering"] = throughput(options.engine_rounds, "metering")
    print("| with, over without | median | all rounds | goal |\n|---|---|---|---|")
    for what, goal in (("digest", f"at most {DIGEST_GOAL:.2f}"), ("signature", "none")):
        ratios = [one["with"] / one["without"] for one in figures[what]]
        report(f"time to load, {what}", ratios, goal)
    if "metering" in figures:
        ratios = [one["off"] / one["on"] for one in figures["metering"]]
        report("throughput, metering", ratios, f"at least {METERING_GOAL:.2f}")
    if options.json:
        options.json.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
