"""Prints what an analytical model expects of these kernels, of vLLM's and of SGLang's on a GPU.

    python -m tools.kernels.model [--card H200] [--max-rank 16] [--json]
    python -m tools.kernels.model --published | --losses | --candidates

Nothing here was measured. The model is arithmetic over what launches say about themselves and over
counts of machine code, with two factors fitted to times that others have published
(`tools/kernels/modelled`). Every ratio is a range. Its first end is calibrated. Its second is
pessimistic: these kernels take a fifth longer, and others issue instructions twice as fast.

Contenders: `default`, vLLM's kernels and blocks with a grid over all slots; `tuned`, the same with
graphs for the adapters in use and the best of several blocks; `sglang`, SGLang's chunked backend
with the best cut of K. The base layer's product runs before all of that and costs nothing.

Not modelled: more than 64 tokens; vLLM's second stream; what caches keep between layers.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass

from tools.kernels.measure.batches import LAYERS, Layer
from tools.kernels.modelled import sglang, vllm
from tools.kernels.modelled.cases import ITEM, RANKS, Batch, cases
from tools.kernels.modelled.machine import CALIBRATED, GPU, GPUS, PESSIMISTIC
from tools.kernels.modelled.ours import candidates_us, ours_us
from tools.kernels.modelled.published import published

LOWEST_RATIO = 0.15
"""Ratios below this are not printed: the model's errors are larger than such differences."""

ENOUGH = 1.25
"""Gain from which a candidate counts."""

CONTENDERS: dict[str, tuple[str, Callable[[Layer, Batch, GPU, float], float]]] = {
    "default": ("vLLM's default", vllm.default_us),
    "tuned": ("vLLM tuned", vllm.tuned_us),
    "sglang": ("SGLang's best", sglang.best_us),
}
"""By key, a contender's title and its time."""


@dataclass(frozen=True)
class Modelled:
    """One layer call.

    Attributes:
        ours_us: These kernels' microseconds, calibrated and pessimistic.
        others_us: By contender, its microseconds, calibrated and pessimistic.
        floor_us: Time of the true ranks' weights and the activations at full bandwidth.
    """

    ours_us: tuple[float, float]
    others_us: dict[str, tuple[float, float]]
    floor_us: float

    def ratios(self, contender: str) -> tuple[float, float]:
        """These kernels' time over a contender's, calibrated and pessimistic."""
        first, second = (
            o / t for o, t in zip(self.ours_us, self.others_us[contender], strict=True)
        )
        return first, second


def model(layer: Layer, batch: Batch, gpu: GPU) -> Modelled:
    """The modelled times of one layer call."""
    variants = CALIBRATED, PESSIMISTIC
    sides = len(layer.outputs) * layer.inputs + sum(layer.outputs)
    activations = batch.tokens * (layer.inputs + 2 * sum(layer.outputs))
    calibrated, pessimistic = (ours_us(layer, batch, gpu, variant) for variant in variants)
    others = {}
    for name, (_, time_us) in CONTENDERS.items():
        first, second = (time_us(layer, batch, gpu, variant.issue) for variant in variants)
        others[name] = first, second
    floor = (sum(batch.rank_of_each()) * sides + activations) * ITEM / gpu.bandwidth
    return Modelled((calibrated, pessimistic), others, floor)


def as_ratio(value: float) -> str:
    """A ratio as it may be quoted."""
    return f"below {LOWEST_RATIO}" if value < LOWEST_RATIO else f"{value:.2f}"


def as_range(ends: tuple[float, float]) -> str:
    """A range of ratios as it may be quoted."""
    first, second = map(as_ratio, ends)
    return first if first == second else f"{first} to {second}"


def table(gpu: GPU, max_rank: int) -> Iterator[str]:
    """A server's batches in Markdown, beside what was measured.

    Times are the least and the most of all layers. Ratios are geometric means over the layers.
    """
    titles = " | ".join(title for title, _ in CONTENDERS.values())
    yield f"| tokens | adapters | ranks | these kernels, µs | {titles} | measured |"
    yield "|---:|---:|---:|---:|" + "---:|" * len(CONTENDERS) + "---|"
    for batch in cases(max_rank):
        found = [model(layer, batch, gpu) for layer in LAYERS.values()]
        times = [each.ours_us[0] for each in found]
        cells = [f"{min(times):.1f} to {max(times):.1f}"]
        for name in CONTENDERS:
            first, second = zip(*(each.ratios(name) for each in found), strict=True)
            cells.append(as_range((_mean(first), _mean(second))))
        yield (
            f"| {batch.tokens} | {batch.adapters} | {batch.ranks} | {' | '.join(cells)} | "
            f"nothing yet |"
        )


def losses(gpu: GPU) -> Iterator[str]:
    """Where these kernels are modelled slower than a contender, in Markdown."""
    yield (
        "| maximum rank | against | slower, calibrated | slower, pessimistic | layers that are "
        "slower, calibrated | worst case |"
    )
    yield "|---:|---|---:|---:|---|---|"
    for max_rank in RANKS:
        for name, (title, _) in CONTENDERS.items():
            found = [
                (model(layer, batch, gpu).ratios(name), layer.name, batch)
                for batch in cases(max_rank)
                for layer in LAYERS.values()
            ]
            slower = [sum(ratios[end] > 1 for ratios, *_ in found) for end in (0, 1)]
            names = dict.fromkeys(layer for ratios, layer, _ in found if ratios[0] > 1)
            worst, layer, batch = max(found, key=lambda each: each[0][1])
            where = f"{layer}, {batch.tokens} tokens of {batch.adapters}, rank {batch.ranks}"
            yield (
                f"| {max_rank} | {title} | {slower[0]} of {len(found)} | {slower[1]} of "
                f"{len(found)} | {', '.join(names) or 'none'} | {where}: {as_range(worst)} |"
            )


def published_table() -> Iterator[str]:
    """What others have published, beside the model, in Markdown."""
    yield "| published | card | measured, µs | modelled, µs | error |"
    yield "|---|---|---:|---:|---:|"
    for each in published():
        yield (
            f"| [{each.case}]({each.source}) | {each.card} | {each.measured_us:.2f} | "
            f"{each.modelled_us:.1f} | {each.error:+.0%} |"
        )


def candidates_table(gpu: GPU) -> Iterator[str]:
    """For each candidate the batch that it gains most for, in Markdown."""
    gains: dict[str, list[tuple[float, str]]] = {}
    for batch in cases(64):
        for layer in LAYERS.values():
            own = ours_us(layer, batch, gpu, CALIBRATED)
            where = f"{layer.name}, {batch.tokens} tokens, {batch.adapters} adapters, {batch.ranks}"
            for name, other in candidates_us(layer, batch, gpu).items():
                case = f"{where}: {own:.1f} to {other:.1f} µs"
                gains.setdefault(name, []).append((own / other, case))
    yield f"| candidate | most | where | at least {ENOUGH} |"
    yield "|---|---:|---|---:|"
    for name, found in gains.items():
        most, where = max(found, key=lambda each: each[0])
        enough = sum(gain >= ENOUGH for gain, _ in found)
        yield f"| {name} | {most:.2f} | {where} | {enough} of {len(found)} |"


def _mean(values: tuple[float, ...]) -> float:
    return math.prod(values) ** (1 / len(values))


def main(arguments: list[str] | None = None) -> int:
    """Prints a table, or one JSON object a line."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.kernels.model",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--card", choices=GPUS, default="H100")
    parser.add_argument("--max-rank", type=int, choices=RANKS, default=64, help="of the server")
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--json", action="store_true", help="each layer, one JSON object a line")
    how.add_argument("--published", action="store_true", help="what the model was held against")
    how.add_argument("--losses", action="store_true", help="where these kernels are slower")
    how.add_argument("--candidates", action="store_true", help="what is not done by default")
    chosen = parser.parse_args(arguments)
    gpu = GPUS[chosen.card]
    if chosen.json:
        for batch in cases(chosen.max_rank):
            for layer in LAYERS.values():
                found = {**asdict(batch), "layer": layer.name, "card": chosen.card}
                print(json.dumps({**found, "modelled": asdict(model(layer, batch, gpu))}))
    elif chosen.published:
        print(*published_table(), sep="\n")
    elif chosen.losses:
        print(*losses(gpu), sep="\n")
    elif chosen.candidates:
        print(*candidates_table(gpu), sep="\n")
    else:
        print(*table(gpu, chosen.max_rank), sep="\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
