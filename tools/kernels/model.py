"""An analytical model of a layer's time on a GPU, for these kernels' grids and for vLLM's.

    python -m tools.kernels.model [--card H200] [--json]

Nothing here was measured; it is arithmetic over what the launches say about themselves, to choose
defaults and to know where to look first once there is a card. It may be wrong by half in either
direction. What it assumes:

* A launch costs `START` inside a graph, `OVERLAPPED` where programmatic dependent launch places its
  programs while the one before ends. Programs start one after the other, `PROGRAM` each, with work
  or without; that figure is what published timings of vLLM's large grids come to.
* A load that another one waits for takes `CACHE` from the second-level cache (plan, ranks, planes)
  and `MEMORY` from memory (weights). A program's chain is the sum of these, plus a tensor-core
  product (`PRODUCT`) for every 16 columns that it multiplies one after the other.
* Weights move at `SHARE` of the card's bandwidth, or at what the programs have under way at once
  divided by `MEMORY`, whichever is less. Planes move within the second-level cache.
* A kernel takes the longer of its programs' chains and its bytes, after the programs have started.
* vLLM reads each adapter at the highest rank, clears its intermediate by a launch of its own, adds
  64 parts of K by atomic operations (8 from 128 tokens on), and starts programs for every slot: all
  of them, or the next power of two of those in use, as its specialised graphs do.
* The base layer's product runs before or beside all of that and costs neither anything.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass

from multilora_kernels.configs import Workload, default_expand, default_shrink
from multilora_kernels.configs.model import power_of_two_up
from tools.kernels.measure.batches import LAYERS, MIXED_RANKS, Layer

START, OVERLAPPED, PROGRAM = 2.0, 0.7, 0.0011  # microseconds
CACHE, MEMORY, PRODUCT = 0.25, 0.65, 0.02
SHARE = 0.85
MAX_RANK, SLOTS, ITEM = 64, 64, 2
TOKENS, ADAPTERS, RANKS = (1, 8, 32, 64, 256), (1, 8, 64), ("8", "16", "64", "mixed")


@dataclass(frozen=True)
class GPU:
    """A card.

    Attributes:
        processors: Streaming multiprocessors.
        bandwidth: Of memory, bytes a microsecond.
        cache_bandwidth: Of the second-level cache, likewise.
    """

    processors: int
    bandwidth: float
    cache_bandwidth: float


GPUS = {"H100": GPU(132, 3.35e6, 5.5e6), "H200": GPU(132, 4.8e6, 5.5e6)}


@dataclass(frozen=True)
class Batch:
    """Tokens that are shared out evenly among adapters.

    Attributes:
        tokens: Rows of x.
        adapters: Of different slots.
        ranks: `8`, `16`, `64` or `mixed`: `MIXED_RANKS` in turn.
    """

    tokens: int
    adapters: int
    ranks: str

    def rank_of_each(self) -> list[int]:
        own = MIXED_RANKS if self.ranks == "mixed" else (int(self.ranks),)
        return [own[i % len(own)] for i in range(self.adapters)]


@dataclass(frozen=True)
class Modelled:
    """Microseconds of one layer call.

    Attributes:
        ours: These kernels.
        vllm: vLLM's, with a grid for all slots.
        specialised: vLLM's, with a grid for the slots in use.
        floor: What the weights up to the true ranks and the activations take at full bandwidth.
    """

    ours: float
    vllm: float
    specialised: float
    floor: float


def model(layer: Layer, batch: Batch, gpu: GPU) -> Modelled:
    """The modelled times of one layer call."""
    sides = len(layer.outputs) * layer.inputs + sum(layer.outputs)
    weights = sum(batch.rank_of_each()) * sides * ITEM
    activations = batch.tokens * (layer.inputs + 2 * sum(layer.outputs)) * ITEM
    active = power_of_two_up(batch.adapters) + 1
    return Modelled(
        ours=_ours(layer, batch, gpu),
        vllm=_vllm(layer, batch, gpu, SLOTS + 1),
        specialised=_vllm(layer, batch, gpu, min(active, SLOTS + 1)),
        floor=(weights + activations) / gpu.bandwidth,
    )


def _ours(layer: Layer, batch: Batch, gpu: GPU) -> float:
    slices, width = len(layer.outputs), sum(layer.outputs)
    tokens, rows = batch.tokens, batch.tokens / batch.adapters
    mean_rank = sum(batch.rank_of_each()) / batch.adapters
    shrink = default_shrink(_workload(layer, tokens, layer.inputs, gpu))
    expand = default_expand(_workload(layer, tokens, width, gpu))
    most = tokens // shrink.block_m + min(SLOTS, tokens)
    parts = batch.adapters * math.ceil(rows / shrink.block_m)
    # Shrink: a piece is a part of K of one slice.
    per_part = slices * shrink.split_k
    programs = min(most * per_part, shrink.per_processor * gpu.processors)
    pieces = parts * per_part
    share = math.ceil(pieces / programs)
    chunk = math.ceil(layer.inputs / shrink.split_k)
    runs = math.ceil(share / shrink.split_k)
    chain = runs * (2 * CACHE + MEMORY) + share * chunk / 16 * PRODUCT + CACHE
    block = power_of_two_up(max(16, int(mean_rank)))
    step = shrink.block_k * (shrink.block_m + shrink.block_r) // (shrink.block_m + block)
    under_way = min(pieces, programs) * 2 * min(step, chunk) * mean_rank * ITEM
    a_bytes = sum(batch.rank_of_each()) * layer.inputs * slices * ITEM
    first = START + programs * PROGRAM + max(chain, _moving(a_bytes, under_way, gpu))
    # Expand: a piece is a block of columns; runs of them share the plan, the rank and h.
    per_part = sum(math.ceil(n / expand.block_n) for n in layer.outputs)
    programs = min(most * per_part, expand.per_processor * gpu.processors)
    pieces = parts * per_part
    share = math.ceil(pieces / programs)
    runs = math.ceil(share * slices / per_part) if share > per_part / slices else 1
    columns = expand.block_n * min(2 if expand.block_m == 16 else 1, max(1, int(64 / block)))
    steps = math.ceil(share * expand.block_n / columns)
    chain = runs * (2 * CACHE + shrink.split_k * PRODUCT) + steps * (MEMORY / 2 + 4 * PRODUCT)
    of_y = min(rows, expand.block_m)
    under_way = min(pieces, programs) * columns * (2 * mean_rank + of_y) * ITEM
    b_bytes = sum(batch.rank_of_each()) * width * ITEM
    y_bytes = 2 * tokens * width * ITEM
    planes = min(pieces, programs + parts * slices) * of_y
    in_cache = planes * mean_rank * 4 * shrink.split_k / gpu.cache_bandwidth
    moved = _moving(b_bytes + y_bytes, under_way, gpu) + in_cache
    return first + OVERLAPPED + programs * PROGRAM + max(chain, moved)


def _workload(layer: Layer, tokens: int, width: int, gpu: GPU) -> Workload:
    return Workload(
        tokens=power_of_two_up(tokens),
        width=width,
        slices=len(layer.outputs),
        max_rank=MAX_RANK,
        item_size=ITEM,
        architecture="sm_90",
        processors=gpu.processors,
    )


def _vllm(layer: Layer, batch: Batch, gpu: GPU, slots: int) -> float:
    slices, width = len(layer.outputs), sum(layer.outputs)
    few = batch.tokens < 128
    split, step = (64, 256) if few else (8, 32)
    rank_blocks, blocks_m = MAX_RANK // 16, math.ceil(batch.tokens / 32)
    programs = split * blocks_m * rank_blocks * slices * slots
    chunk = math.ceil(layer.inputs / split)
    chain = 3 * CACHE + MEMORY + max(chunk, min(step, layer.inputs)) / 16 * PRODUCT + CACHE
    live = split * rank_blocks * slices * batch.adapters
    bytes_of_a = batch.adapters * MAX_RANK * layer.inputs * slices * ITEM
    under_way: float = min(live, 4 * gpu.processors) * 16 * min(step, chunk) * ITEM
    clear = START
    first = OVERLAPPED + programs * PROGRAM + max(chain, _moving(bytes_of_a, under_way, gpu))
    columns = max(64, power_of_two_up(128 // slices))
    per_slice = math.ceil(max(layer.outputs) / columns)
    programs = math.ceil(batch.tokens / 64) * per_slice * slices * slots
    chain = 3 * CACHE + MEMORY + MAX_RANK / 16 * (PRODUCT + CACHE)
    live = per_slice * slices * batch.adapters
    moved = (batch.adapters * MAX_RANK + 2 * batch.tokens) * width * ITEM
    of_y = min(batch.tokens / batch.adapters, 64)
    under_way = min(live, 4 * gpu.processors) * columns * (16 + of_y) * ITEM
    second = OVERLAPPED + programs * PROGRAM + max(chain, _moving(moved, under_way, gpu))
    return clear + first + second


def _moving(moved: float, under_way: float, gpu: GPU) -> float:
    return moved / min(SHARE * gpu.bandwidth, max(1.0, under_way / MEMORY))


def cases() -> Iterator[Batch]:
    """All batches of the table."""
    for tokens in TOKENS:
        for adapters in ADAPTERS:
            if adapters <= tokens:
                for ranks in RANKS:
                    yield Batch(tokens, adapters, ranks)


def table(gpu: GPU, layers: Sequence[Layer] = tuple(LAYERS.values())) -> Iterator[str]:
    """The model's answers in Markdown, beside what was measured.

    A cell holds these kernels' microseconds, and in brackets their share of vLLM's time with
    specialised graphs.
    """
    names = " | ".join(layer.name for layer in layers)
    yield f"| tokens | adapters | ranks | {names} | measured |"
    yield "|---:|---:|---:|" + "---:|" * len(layers) + "---|"
    for batch in cases():
        cells = []
        for layer in layers:
            found = model(layer, batch, gpu)
            cells.append(f"{found.ours:.1f} ({found.ours / found.specialised:.2f})")
        yield (
            f"| {batch.tokens} | {batch.adapters} | {batch.ranks} | {' | '.join(cells)} | "
            f"nothing yet |"
        )


def main(arguments: list[str] | None = None) -> int:
    """Prints the table, or one JSON object a line."""
    parser = argparse.ArgumentParser(prog="python -m tools.kernels.model", description=__doc__)
    parser.add_argument("--card", choices=GPUS, default="H100")
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    chosen = parser.parse_args(arguments)
    gpu = GPUS[chosen.card]
    if not chosen.json:
        print(*table(gpu), sep="\n")
        return 0
    for batch in cases():
        for layer in LAYERS.values():
            found = {**asdict(batch), "layer": layer.name, "card": chosen.card}
            print(json.dumps({**found, "modelled": asdict(model(layer, batch, gpu))}))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
