"""Takes a blend in: opens and checks its parts like any adapters, and packs them side by side.

    with open_blend(blend, rules) as source:
        intake = source.check(layouts)
        taken = intake.read(addresses, places)

Each part's files are opened once and read once, under all the rules that apply to an adapter on its
own. Scales and weights are multiplied into the values of B on their way into the pack, so parts may
differ in rank, alpha and modules. Not every adapter can be part of a sum: see `_misfits`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from typing import Self

import numpy as np
import numpy.typing as npt

from multilora_kernels.packs.packing import CONVERT, TRANSPOSE
from vllm_multilora.adapters.adapter_errors import AdapterError
from vllm_multilora.adapters.blend import Blend, BlendPart
from vllm_multilora.adapters.checks.matching import MatchedModule
from vllm_multilora.adapters.config.adapter_config import AdapterConfig
from vllm_multilora.adapters.files.adapter_folder import CONFIG_NAME, TENSORS_NAME
from vllm_multilora.adapters.files.one_pass import TensorPart
from vllm_multilora.adapters.intake import (
    AdapterSource,
    Intake,
    IntakeResult,
    Rules,
    error_of,
    open_adapter,
)
from vllm_multilora.adapters.model.layout import ModelLayout, SliceLayout
from vllm_multilora.adapters.model.ranks import room_for
from vllm_multilora.adapters.packing.applied import Applied
from vllm_multilora.adapters.packing.pack_index import PackIndex, RankIndex
from vllm_multilora.adapters.packing.pack_plan import padded_sizes, unpacked, write_index
from vllm_multilora.adapters.problems import Code, Problem, shown

_Ints = npt.NDArray[np.int64]


def open_blend(blend: Blend, rules: Rules) -> BlendSource:
    """Opens the files of all parts of a blend.

    Raises:
        AdapterError: As `open_adapter`, of the first part that cannot be opened.
    """
    with ExitStack() as opened:
        sources = [opened.enter_context(open_adapter(part.path, rules)) for part in blend.parts]
        opened.pop_all()
    return BlendSource(blend, sources)


class BlendSource:
    """The open files of a blend's parts; a context manager that closes them.

    Attributes:
        version: Tells one state of the files from another.
    """

    def __init__(self, blend: Blend, sources: Sequence[AdapterSource]) -> None:
        self._blend = blend
        self._sources = sources
        versions = [source.version for source in sources]
        is_whole = not any("-" in version.split() for version in versions)
        self.version = blend.version(versions) if is_whole else "-"

    def check(self, layouts: Sequence[ModelLayout]) -> BlendIntake:
        """Checks all but the weights' values: each part, and whether they fit together.

        Args:
            layouts: As for `AdapterSource.check`.

        Raises:
            AdapterError: A part cannot be served, or not in a blend, or not with the others; its
                problems are all that is wrong.
        """
        problems: list[Problem] = []
        intakes: list[Intake] = []
        for part, source in zip(self._blend.parts, self._sources, strict=True):
            # First: whatever the server could do with the part alone, it does not in a blend.
            misfits = list(_misfits(part, source.config()))
            try:
                intake = source.check(layouts)
            except AdapterError as error:
                keys = {misfit.where for misfit in misfits}
                problems += misfits
                problems += [each for each in error.problems if each.where not in keys]
            else:
                problems += [*misfits, *_special_layers(part, intake)]
                intakes.append(intake)
        if not problems:
            problems += _too_large(self._blend, intakes, layouts)
        if problems:
            raise error_of(problems)
        return BlendIntake(self._blend, intakes, layouts)

    def close(self) -> None:
        """Closes the files; closing twice is harmless."""
        for source in self._sources:
            source.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


class BlendIntake:
    """A checked blend that is to be read; attributes as of `Intake`."""

    has_special = dora = False
    invocation_tokens: tuple[int, ...] = ()

    def __init__(
        self, blend: Blend, intakes: Sequence[Intake], layouts: Sequence[ModelLayout]
    ) -> None:
        self._blend = blend
        self._intakes = intakes
        weighted = [
            [_weighted(applied, part.weight) for applied in intake.applied]
            for part, intake in zip(blend.parts, intakes, strict=True)
        ]
        self._plan = _BlendPlan(layouts, weighted)
        for parts, intake, applied in zip(self._plan.parts, intakes, weighted, strict=True):
            parts += unpacked(intake.file, parts, layouts, applied)
        self.rank = self._plan.rank
        self.block_bytes = padded_sizes(self._plan)

    def read(self, addresses: _Ints | None, places: _Ints | None) -> IntakeResult:
        """Reads the tensors of all parts once; arguments and errors as of `Intake.read`."""
        plan = self._plan
        if addresses is not None and places is not None:
            write_index(plan, addresses, places)
        digests = [
            intake.read_parts(parts, None if addresses is None else _targets(addresses, of, parts))
            for intake, parts, of in zip(self._intakes, plan.parts, plan.goals, strict=True)
        ]
        return IntakeResult(self._blend.digest(digests), int(plan.sizes.sum()), tuple(digests))


class _BlendPlan:
    """The blocks of a blend's pack: A and B of each worker's slices, and the index.

    Args:
        layouts: What each worker keeps.
        applied: For each part of the blend, what of it is applied by each worker.

    Attributes:
        parts: For each part of the blend, what of its tensors is to be packed.
        goals: Of these, the block that each goes to, and how many bytes into it.
        rank: The largest sum of ranks.
        sizes: int64 [n], bytes of the blocks, the index last.
    """

    def __init__(
        self, layouts: Sequence[ModelLayout], applied: Sequence[Sequence[Applied]]
    ) -> None:
        self.parts: list[list[TensorPart]] = [[] for _ in applied]
        self.goals: list[list[tuple[int, int]]] = [[] for _ in applied]
        self.rank = 0
        self._sizes: list[int] = []
        self._ranks: list[tuple[list[int], list[int], list[int]]] = []
        for worker, layout in enumerate(layouts):
            self._ranks.append(([], [], []))
            found = _slices(layout, [of[worker] for of in applied])
            for row in sorted(found):
                self._add(layout, *found[row])
        index = len(self.index(np.zeros(len(self._sizes) + 1, np.int64)).encode())
        self.sizes: _Ints = np.array([*self._sizes, index], np.int64)

    def index(self, places: _Ints) -> PackIndex:
        """The index of a pack whose blocks lie at these places; [n], the index's own is unused."""
        ranks, first = [], 0
        for rows, true_ranks, a_ranks in self._ranks:
            last = first + 2 * len(rows)
            ranks.append(
                RankIndex(
                    np.array(rows, np.int32),
                    np.array(true_ranks, np.int32),
                    np.array(a_ranks, np.int32),
                    places[first:last:2],
                    places[first + 1 : last : 2],
                    np.full(len(rows), -1, np.int64),
                )
            )
            first = last
        return PackIndex(tuple(ranks))

    def _add(
        self, layout: ModelLayout, of: SliceLayout, modules: list[tuple[int, MatchedModule]]
    ) -> None:
        """Puts the ranks of all parts that have a slice side by side."""
        rank = sum(module.rank for _, module in modules)
        first, last = of.rows_of_a(rank)  # that this worker keeps
        inputs = of.input_range[1] - of.input_range[0]
        outputs = of.output_range[1] - of.output_range[0]
        width, a_block, at = layout.dtype.itemsize, len(self._sizes), 0
        for part, module in modules:
            low, high = max(first, at), min(last, at + module.rank)
            if low < high:
                a = TensorPart(
                    module.a_name,
                    layout.dtype,
                    rows=(low - at, high - at),
                    columns=of.input_range,
                )
                self._put(part, a, a_block, (low - first) * inputs * width)
            b = TensorPart(
                module.b_name,
                layout.dtype,
                module.scaling,
                rows=module.rows_of(of),
                columns=(0, module.rank),
                kind=TRANSPOSE if layout.columns_first else CONVERT,
                stride=None if layout.columns_first else rank,
            )
            self._put(part, b, a_block + 1, at * (outputs if layout.columns_first else 1) * width)
            at += module.rank
        self._sizes += [(last - first) * inputs * width, outputs * rank * width]
        rows, ranks, a_ranks = self._ranks[-1]
        rows.append(of.row)
        ranks.append(rank)
        a_ranks.append(last - first)
        self.rank = max(self.rank, rank)

    def _put(self, part: int, requested: TensorPart, block: int, offset: int) -> None:
        self.parts[part].append(requested)
        self.goals[part].append((block, offset))


def _slices(
    layout: ModelLayout, applied: Sequence[Applied]
) -> dict[int, tuple[SliceLayout, list[tuple[int, MatchedModule]]]]:
    """By row, a slice and the modules that fill it, each with its part's place in the blend."""
    found: dict[int, tuple[SliceLayout, list[tuple[int, MatchedModule]]]] = {}
    for part, of in enumerate(applied):
        for module in of.modules:
            for one in layout.by_name[module.name]:
                found.setdefault(one.row, (one, []))[1].append((part, module))
    return found


def _targets(
    addresses: _Ints, goals: Sequence[tuple[int, int]], parts: Sequence[TensorPart]
) -> _Ints:
    """Where each of a part's parts goes; 0 for the last ones, which are only judged."""
    targets = np.zeros(len(parts), np.int64)
    if goals:
        blocks, offsets = np.array(goals, np.int64).T
        targets[: len(goals)] = addresses[blocks] + offsets
    return targets


def _weighted(applied: Applied, weight: float) -> Applied:
    """What is applied of a part, with its weight in the scale of B."""
    of_b = {module.b_name for module in applied.modules}
    return Applied(
        tuple(module._replace(scaling=module.scaling * weight) for module in applied.modules),
        applied.raw,
        tuple(
            (name, factor * weight if name in of_b else factor) for name, factor in applied.factors
        ),
    )


def _misfits(part: BlendPart, config: AdapterConfig | None) -> Iterator[Problem]:
    """What keeps an adapter out of blends: where it is no sum that others can be added to."""
    if config is None:
        return
    for where, found, why in (
        (
            "alora_invocation_tokens",
            shown(list(config.invocation_tokens)) if config.invocation_tokens else "",
            "an activated adapter acts on a part of the prompt only",
        ),
        (
            "use_dora",
            "True" if config.dora else "",
            "DoRA rescales what the base model and the adapter compute together",
        ),
    ):
        if found:
            yield Problem.at(
                Code.UNSUPPORTED_FEATURE,
                f"{part.path}/{CONFIG_NAME}",
                where,
                found,
                "unset in a part of a blend",
                hint=f"{why}: ask for {part.name!r} by itself",
            )


def _special_layers(part: BlendPart, intake: Intake) -> Iterator[Problem]:
    """Notes an adapter of layers that no blend is packed for."""
    if intake.has_special:
        yield Problem.at(
            Code.UNSUPPORTED_FEATURE,
            f"{part.path}/{TENSORS_NAME}",
            "",
            "tensors of layers that vLLM fills itself: embeddings, output heads, experts and, with "
            "tensor parallelism, layers of several parts that checkpoints have as one",
            "linear layers only in a part of a blend",
            verb="has",
            hint=f"ask for {part.name!r} alone",
        )


def _too_large(
    blend: Blend, intakes: Sequence[Intake], layouts: Sequence[ModelLayout]
) -> Iterator[Problem]:
    """Whether ranks add up to more than a slot holds; told of the module with the largest sum."""
    ranks: dict[str, dict[str, int]] = {}
    for part, intake in zip(blend.parts, intakes, strict=True):
        for applied in intake.applied:
            for module in applied.modules:
                ranks.setdefault(module.name, {})[part.name] = module.rank
    most = min(layout.max_rank for layout in layouts)
    widest, largest = max(ranks.items(), key=lambda item: sum(item[1].values()), default=("", {}))
    total = sum(largest.values())
    if total <= most:
        return
    summands = " + ".join(f"{rank} ({name})" for name, rank in largest.items())
    yield Problem.at(
        Code.RANK_TOO_LARGE,
        f"blend {blend.name}",
        "its rank",
        f"{summands} = {total} in {widest}",
        f"at most {most}",
        hint=f"{room_for(total)}, or blend fewer adapters",
    )
