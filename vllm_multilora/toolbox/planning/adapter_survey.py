"""What the adapters in a directory need: ranks, modules, host memory."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from vllm_multilora.adapters.adapter_errors import AdapterError
from vllm_multilora.adapters.files.adapter_folder import CONFIG_NAME, TENSORS_NAME
from vllm_multilora.adapters.intake import Intake, Rules, open_adapter
from vllm_multilora.adapters.model.layout import ModelLayout, block_bytes
from vllm_multilora.adapters.model.tensor_names import parse_tensor_name
from vllm_multilora.adapters.problems import Problem
from vllm_multilora.errors import MultiLoRAError
from vllm_multilora.wording import adapter_kind


class SurveyError(MultiLoRAError):
    """A directory has no adapters to look at."""


@dataclass(frozen=True)
class SurveyedAdapter:
    """An adapter that the base model accepts.

    Attributes:
        rank: The rank that slots must have for it.
        ranks: The true rank of every module that packed adapters fill, by the layout's names.
        special: Its modules that vLLM fills itself.
        special_elements: Elements of their tensors.
    """

    name: str
    rank: int
    ranks: tuple[tuple[str, int], ...]
    special: frozenset[str]
    special_elements: int
    kind: str = "lora"

    @property
    def modules(self) -> frozenset[str]:
        """All modules that it adapts."""
        return self.special | {name for name, _ in self.ranks}

    def host_bytes(self, layout: ModelLayout) -> int:
        """Bytes of one worker's host copy."""
        packed = sum(
            block_bytes(rows * columns, layout.dtype)
            for name, rank in self.ranks
            for part in layout.by_name[name]
            for rows, columns in layout.block_shapes(part, rank)
        )
        if self.kind == "dora":
            parts = (part for name, _ in self.ranks for part in layout.by_name[name])
            packed += sum(map(layout.magnitude_bytes, parts))
        return packed + self.special_elements * layout.dtype.itemsize


@dataclass(frozen=True)
class Survey:
    """A directory's adapters that the base model accepts, and what is wrong with the others."""

    adapters: tuple[SurveyedAdapter, ...]
    refused: tuple[tuple[str, tuple[Problem, ...]], ...] = ()


def survey_adapters(directory: Path, layout: ModelLayout) -> Survey:
    """Looks at every adapter below a directory; weights are not read.

    Args:
        directory: Its sub-folders are adapters, or it is one itself.
        layout: What the base model accepts, with slots of the largest rank that can be had.

    Raises:
        SurveyError: There is no such directory, or no adapter in it.
    """
    adapters, refused = [], []
    for folder in _folders(directory):
        try:
            with open_adapter(str(folder), Rules(check_finite=False)) as source:
                adapters.append(_look_at(folder.name, source.check([layout]), layout))
        except AdapterError as error:
            refused.append((folder.name, error.problems))
    return Survey(tuple(adapters), tuple(refused))


def _folders(directory: Path) -> list[Path]:
    found = f"has no sub-folder with {CONFIG_NAME} or {TENSORS_NAME}"
    try:
        if _is_adapter(directory):
            return [directory]
        if folders := sorted(filter(_is_adapter, directory.iterdir())):
            return folders
    except OSError as error:
        found = f"is not a directory that can be read ({error.strerror})"
    raise SurveyError(
        f"{directory} {found}: --adapters expects a folder whose sub-folders are adapters"
    )


def _is_adapter(folder: Path) -> bool:
    return (folder / CONFIG_NAME).is_file() or (folder / TENSORS_NAME).is_file()


def _look_at(name: str, intake: Intake, layout: ModelLayout) -> SurveyedAdapter:
    [applied] = intake.applied
    config = intake.config
    ranks = tuple((each.name, each.rank) for each in applied.modules)
    special = []  # of every tensor that is no part of a packed adapter: module and elements
    for tensor, info in intake.file.tensors.items():
        role = parse_tensor_name(tensor)
        module = layout.naming.rename(role.module) if role else None
        if module and layout.is_special(module):
            special.append((module, math.prod(info.shape)))
    return SurveyedAdapter(
        name,
        rank=max(config.rank, *(rank for _, rank in ranks), 1),
        ranks=ranks,
        special=frozenset(name for name, _ in special),
        special_elements=sum(elements for _, elements in special),
        kind=adapter_kind(invocation_tokens=config.invocation_tokens, dora=config.dora),
    )
