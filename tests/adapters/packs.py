"""Adapters taken into memory for the tests, as the store does it."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch

from vllm_multilora.adapters.adapter_errors import AdapterFormatError
from vllm_multilora.adapters.blend_intake import BlendIntake
from vllm_multilora.adapters.intake import Intake, IntakeResult, Rules, open_adapter
from vllm_multilora.adapters.model.layout import BLOCK_BYTES, ModelLayout
from vllm_multilora.adapters.packing.pack_index import PackIndex
from vllm_multilora.adapters.problems import Problem

POISON = 0xA5


@dataclass
class Pack:
    """An adapter in memory; a block's place is its offset there."""

    memory: torch.Tensor
    index: PackIndex
    block_bytes: np.ndarray
    places: np.ndarray
    layouts: tuple[ModelLayout, ...]
    taken: IntakeResult
    rank: int

    @property
    def nbytes(self) -> int:
        """Bytes of A and B of the first rank, and all raw tensors."""
        return int(self.block_bytes[:-1].sum())

    def matrix(self, place: int, dtype: torch.dtype, *shape: int) -> torch.Tensor:
        """What lies at a place."""
        count = int(np.prod(shape))
        return self.memory[place : place + count * dtype.itemsize].view(dtype).view(shape)

    def contents(self, rank: int = 0) -> dict[int, tuple[torch.Tensor, torch.Tensor]]:
        """A [a_rank, K] and B [N, rank] of each row of a worker."""
        of, model = self.index.ranks[rank], self.layouts[rank]
        parts = {part.row: part for part in model.slices}
        found = {}
        for row, r, a_rank, a_at, b_at in zip(
            of.rows, of.ranks, of.a_ranks, of.a_places, of.b_places, strict=True
        ):
            part = parts[int(row)]
            inputs = part.input_range[1] - part.input_range[0]
            outputs = part.output_range[1] - part.output_range[0]
            dtype = model.dtype.torch
            a = self.matrix(a_at, dtype, a_rank, inputs)
            b_shape = (r, outputs) if model.columns_first else (outputs, r)
            b = self.matrix(b_at, dtype, *b_shape)
            found[int(row)] = (a, b.T if model.columns_first else b)
        return found

    def raw(self, name: str) -> torch.Tensor:
        """A raw tensor."""
        tensor = self.index.tensors[name]
        return self.matrix(tensor.place, tensor.dtype.torch, *tensor.shape)


def take(folder: Path, *layouts: ModelLayout, rules: Rules | None = None) -> Pack:
    """Takes an adapter in, with a poisoned line between any two blocks."""
    with open_adapter(str(folder), rules or Rules()) as source:
        return taken(source.check(layouts), *layouts)


def refused(folder: Path, *layouts: ModelLayout, rules: Rules | None = None) -> tuple[Problem, ...]:
    """Why an adapter is not taken in."""
    with pytest.raises(AdapterFormatError) as caught:
        take(folder, *layouts, rules=rules)
    return tuple(caught.value.problems)


def taken(intake: Intake | BlendIntake, *layouts: ModelLayout) -> Pack:
    """What has been checked, read into memory likewise."""
    sizes = intake.block_bytes
    places = np.cumsum([BLOCK_BYTES, *(sizes[:-1] + BLOCK_BYTES)])
    memory = np.full(int(places[-1] + sizes[-1]) + 2 * BLOCK_BYTES, POISON, np.uint8)
    memory = memory[-memory.ctypes.data % BLOCK_BYTES :]
    read = intake.read(memory.ctypes.data + places, places)
    outside = np.ones(len(memory), np.bool_)
    for place, size in zip(places.tolist(), sizes.tolist(), strict=True):
        outside[place : place + size] = False
    assert (memory[outside] == POISON).all(), "written outside the blocks"
    index = PackIndex.decode(memory[places[-1] :].data)
    return Pack(
        torch.from_numpy(memory),
        index,
        sizes,
        places,
        layouts,
        read,
        intake.rank,
    )
