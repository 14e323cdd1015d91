"""Takes a blend in: opens and checks its parts like any adapters, and packs them side by side.

Each part's files are opened once and read once, under all the rules that apply to an adapter on its
own. Scales and weights are multiplied into the values of B on their way into the pack, so parts may
differ in rank, alpha and modules. Not every adapter can be part of a sum: see `_misfits`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack

import numpy as np
import numpy.typing as npt

from vllm_multilora.adapters.adapter_errors import AdapterError
from vllm_multilora.adapters.blend import Blend, BlendPart
from vllm_multilora.adapters.config.adapter_config import AdapterConfig
from vllm_multilora.adapters.files.adapter_folder import CONFIG_NAME, TENSORS_NAME
from vllm_multilora.adapters.intake import (
    AdapterSource,
    Intake,
    IntakeResult,
    Rules,
    error_of,
    open_adapter,
)
from vllm_multilora.adapters.model.layout import ModelLayout
from vllm_multilora.adapters.model.ranks import room_for
from vllm_multilora.adapters.packing.applied import Applied
from vllm_multilora.adapters.packing.pack_plan import PackPlan
from vllm_multilora.adapters.problems import Code, Problem, shown

_Ints = npt.NDArray[np.int64]


def open_blend(blend: Blend, rules: Rules) -> BlendSource:
    """Opens the files of all parts of a blend; raises `AdapterError` as `open_adapter`."""
    with ExitStack() as opened:
        sources = [opened.enter_context(open_adapter(part.path, rules)) for part in blend.parts]
        opened.pop_all()
    return BlendSource(blend, sources)


class BlendSource(ExitStack):
    """The open files of a blend's parts; `version` tells one state of them from another."""

    def __init__(self, blend: Blend, sources: Sequence[AdapterSource]) -> None:
        self._blend = blend
        self._sources = sources
        super().__init__()
        for source in sources:
            self.callback(source.close)
        versions = [source.version for source in sources]
        is_whole = not any("-" in version.split() for version in versions)
        self.version = blend.version(versions) if is_whole else "-"

    def check(self, layouts: Sequence[ModelLayout]) -> BlendIntake:
        """Checks all but the weights' values: each part, and whether they fit together.

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
        self._plan = PackPlan([intake.file for intake in intakes], layouts, weighted)
        self.rank = self._plan.rank
        self.block_bytes = self._plan.block_bytes

    def read(self, addresses: _Ints | None, places: _Ints | None) -> IntakeResult:
        """Reads the tensors of all parts once; arguments and errors as of `Intake.read`."""
        plan = self._plan
        if addresses is not None and places is not None:
            plan.write_index(addresses, places)
        digests = [
            intake.read_parts(parts, plan.targets(number, addresses))
            for number, (intake, parts) in enumerate(zip(self._intakes, plan.parts, strict=True))
        ]
        return IntakeResult(self._blend.digest(digests), int(plan.sizes.sum()), tuple(digests))


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
