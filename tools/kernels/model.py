"""An analytical model of a layer's time on a GPU, for these kernels' grids and for vLLM's.

    python -m tools.kernels.model [--card H200] [--json] [--candidates]

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

`--candidates` models what these kernels do not do by default. It takes the worse assumption where
there are two:

* `vector_rows`: the shrink kernel without tensor cores, for at most `FEW_ROWS` rows of an adapter.
  A multiprocessor does `LANES` operations in `OPERATION`: one for each row and value of A, and one
  to widen that value. Threads add up what they have in `SUM`, once a part of K.
* `early`: the shrink kernel is placed while the base layer's product ends. That lets others start
  no earlier than by ending, so what is saved is `START` less `OVERLAPPED`, and no load.
* `beside`: the shrink kernel on a second branch of the graph, beside the base layer's product,
  whose programs have a processor to themselves and so end later by as long as the shrink's hold
  it. What is left to save is a launch; the branches' join costs the expand kernel its early start.
* `cluster`: one launch. The programs of a cluster of `CLUSTER` share out K, exchange their parts of
  h in `EXCHANGE`, and share out columns; several clusters for one part of a tile, as many as are
  best, each compute the h that they need.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass

from multilora_kernels.configs import (
    ExpandConfig,
    ShrinkConfig,
    Workload,
    default_expand,
    default_shrink,
)
from multilora_kernels.configs.model import power_of_two_up
from tools.kernels.measure.batches import LAYERS, MIXED_RANKS, Layer

START, OVERLAPPED, PROGRAM = 2.0, 0.7, 0.0011  # microseconds
CACHE, MEMORY, PRODUCT = 0.25, 0.65, 0.02
LANES, OPERATION, SUM = 128, 0.0006, 0.15
CLUSTER, EXCHANGE, FEW_ROWS, ENOUGH = 8, 0.5, 4, 1.25
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


@dataclass(frozen=True)
class _Half:
    """One launch of these kernels.

    Attributes:
        programs: That are started.
        chain: Microseconds of the loads that its longest program waits for, one after the other.
        products: Microseconds of that program's products, which wait for each other too.
        moving: Microseconds in which all programs' bytes move.
    """

    programs: int
    chain: float
    products: float
    moving: float

    def after(self, launch: float) -> float:
        """Microseconds, those that the launch costs included."""
        return launch + self.programs * PROGRAM + max(self.chain + self.products, self.moving)


def _ours(layer: Layer, batch: Batch, gpu: GPU) -> float:
    return _shrink(layer, batch, gpu).after(START) + _expand(layer, batch, gpu).after(OVERLAPPED)


def candidates(layer: Layer, batch: Batch, gpu: GPU) -> dict[str, float]:
    """Microseconds of a layer call by candidate; without those that are not for this batch."""
    shrink, expand = _shrink(layer, batch, gpu), _expand(layer, batch, gpu)
    found = {
        "early": shrink.after(OVERLAPPED) + expand.after(OVERLAPPED),
        "beside": shrink.after(0.0) + expand.after(START),
        "cluster": min(_cluster(layer, batch, gpu, clusters) for clusters in (1, 2, 4, 8, 16)),
    }
    if batch.tokens <= FEW_ROWS * batch.adapters:
        vector = _shrink(layer, batch, gpu, vector=True)
        found["vector_rows"] = vector.after(START) + expand.after(OVERLAPPED)
    return found


def _cluster(layer: Layer, batch: Batch, gpu: GPU, clusters: int) -> float:
    """With so many clusters for each part of a tile."""
    slices, width, rows = len(layer.outputs), sum(layer.outputs), batch.tokens / batch.adapters
    expand = default_expand(_workload(layer, batch.tokens, width, gpu))
    shrink = default_shrink(_workload(layer, batch.tokens, layer.inputs, gpu))
    ranks, columns = sum(batch.rank_of_each()), 2 * expand.block_n
    programs = batch.adapters * math.ceil(rows / expand.block_m) * clusters * CLUSTER
    at_once = min(programs, expand.per_processor * gpu.processors)
    rounds = math.ceil(programs / at_once)
    own_slices = math.ceil(slices / clusters)  # whose h a cluster needs
    chunk = layer.inputs / CLUSTER
    products = own_slices * chunk / 16 * PRODUCT
    steps = math.ceil(width / (clusters * CLUSTER * columns))
    rank = ranks / batch.adapters
    a_bytes = ranks * layer.inputs * slices * ITEM
    b_bytes = (ranks + 2 * batch.tokens) * width * ITEM
    of_a = at_once * 2 * min(chunk, shrink.block_k) * rank * ITEM
    of_b = at_once * columns * (2 * rank + min(rows, expand.block_m)) * ITEM
    again = a_bytes * max(0, clusters * own_slices / slices - 1) / gpu.cache_bandwidth
    first = max(rounds * (2 * CACHE + MEMORY + products), _moving(a_bytes, of_a, gpu) + again)
    second = max(rounds * steps * (MEMORY / 2 + 4 * PRODUCT), _moving(b_bytes, of_b, gpu))
    return START + programs * PROGRAM + first + rounds * EXCHANGE + second


def _shrink(layer: Layer, batch: Batch, gpu: GPU, *, vector: bool = False) -> _Half:
    """A piece is a part of K of one slice; `vector`: multiplied without tensor cores."""
    slices, tokens, rows = len(layer.outputs), batch.tokens, batch.tokens / batch.adapters
    shrink = default_shrink(_workload(layer, tokens, layer.inputs, gpu))
    mean_rank = sum(batch.rank_of_each()) / batch.adapters
    parts = batch.adapters * math.ceil(rows / shrink.block_m)
    per_part = slices * shrink.split_k
    programs = min(_most_parts(tokens, shrink) * per_part, shrink.per_processor * gpu.processors)
    pieces = parts * per_part
    share = math.ceil(pieces / programs)
    chunk = math.ceil(layer.inputs / shrink.split_k)
    runs = math.ceil(share / shrink.split_k)
    block = power_of_two_up(max(16, int(mean_rank)))
    products = share * chunk / 16 * PRODUCT
    if vector:
        resident = math.ceil(min(pieces, programs) / gpu.processors)
        operations = share * chunk * block * (power_of_two_up(math.ceil(rows)) + 1)
        products = resident * operations / LANES * OPERATION + share * SUM
    step = shrink.block_k * (shrink.block_m + shrink.block_r) // (shrink.block_m + block)
    under_way = min(pieces, programs) * 2 * min(step, chunk) * mean_rank * ITEM
    a_bytes = sum(batch.rank_of_each()) * layer.inputs * slices * ITEM
    return _Half(
        programs, runs * (2 * CACHE + MEMORY) + CACHE, products, _moving(a_bytes, under_way, gpu)
    )


def _expand(layer: Layer, batch: Batch, gpu: GPU) -> _Half:
    """A piece is a block of columns; runs of them share the plan, the rank and h."""
    slices, width = len(layer.outputs), sum(layer.outputs)
    tokens, rows = batch.tokens, batch.tokens / batch.adapters
    mean_rank = sum(batch.rank_of_each()) / batch.adapters
    split_k = default_shrink(_workload(layer, tokens, layer.inputs, gpu)).split_k
    expand = default_expand(_workload(layer, tokens, width, gpu))
    parts = batch.adapters * math.ceil(rows / expand.block_m)
    per_part = sum(math.ceil(n / expand.block_n) for n in layer.outputs)
    programs = min(_most_parts(tokens, expand) * per_part, expand.per_processor * gpu.processors)
    pieces = parts * per_part
    share = math.ceil(pieces / programs)
    runs = math.ceil(share * slices / per_part) if share > per_part / slices else 1
    block = power_of_two_up(max(16, int(mean_rank)))
    columns = expand.block_n * min(2 if expand.block_m == 16 else 1, max(1, int(64 / block)))
    steps = math.ceil(share * expand.block_n / columns)
    of_y = min(rows, expand.block_m)
    under_way = min(pieces, programs) * columns * (2 * mean_rank + of_y) * ITEM
    b_bytes = sum(batch.rank_of_each()) * width * ITEM
    y_bytes = 2 * tokens * width * ITEM
    planes = min(pieces, programs + parts * slices) * of_y
    in_cache = planes * mean_rank * 4 * split_k / gpu.cache_bandwidth
    return _Half(
        programs,
        runs * (2 * CACHE + split_k * PRODUCT),
        steps * (MEMORY / 2 + 4 * PRODUCT),
        _moving(b_bytes + y_bytes, under_way, gpu) + in_cache,
    )


def _most_parts(tokens: int, config: ShrinkConfig | ExpandConfig) -> int:
    return tokens // config.block_m + min(SLOTS, tokens)


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


def candidates_table(gpu: GPU) -> Iterator[str]:
    """For each candidate the batch that it gains most for, in Markdown."""
    gains: dict[str, list[tuple[float, str]]] = {}
    for batch in cases():
        for layer in LAYERS.values():
            own = _ours(layer, batch, gpu)
            where = f"{layer.name}, {batch.tokens} tokens, {batch.adapters} adapters, {batch.ranks}"
            for name, other in candidates(layer, batch, gpu).items():
                case = f"{where}: {own:.1f} to {other:.1f} µs"
                gains.setdefault(name, []).append((own / other, case))
    yield f"| candidate | most | where | at least {ENOUGH} |"
    yield "|---|---:|---|---:|"
    for name, found in gains.items():
        most, where = max(found, key=lambda each: each[0])
        enough = sum(gain >= ENOUGH for gain, _ in found)
        yield f"| {name} | {most:.2f} | {where} | {enough} of {len(found)} |"


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
    """Prints a table, or one JSON object a line."""
    parser = argparse.ArgumentParser(prog="python -m tools.kernels.model", description=__doc__)
    parser.add_argument("--card", choices=GPUS, default="H100")
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    parser.add_argument("--candidates", action="store_true", help="what is not done by default")
    chosen = parser.parse_args(arguments)
    gpu = GPUS[chosen.card]
    if chosen.candidates:
        print(*candidates_table(gpu), sep="\n")
        return 0
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
