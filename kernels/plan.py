"""The batch plan: which tokens each adapter slot covers, ready for a kernel to read.

A plan is built on the host once per step and shared by every layer. It sorts the batch's
tokens by adapter slot, so that the tokens of one adapter form one *run*, cuts every run into
*tiles* of at most `tile_rows` rows, the unit of work of a kernel, and puts long tiles first::

    token        0  1  2  3  4  5        order       1  4  0  2  5 | 3     (row -> token)
    slot         1  0  1 -1  0  1        tiles of 2  (0, row 0, 2) (1, row 2, 2) (1, row 4, 1)

Rows without an adapter (slot -1) come last in `order` and belong to no tile.

Kernels whose blocks are shorter than `tile_rows` cut tiles into parts of their own. The tiles that
have an n-th part are the first so many, since long ones come first; the header says how many, and
how many parts there are over all tiles, for blocks of any length that a kernel may have.

Everything lives in one int32 buffer whose shape depends only on `PlanLayout` (the largest
token count, the number of slots, the tile size), never on the batch. On an accelerator one
asynchronous copy brings it over, from a host buffer that is not the last step's (`staging`);
compiled code and captured graphs keep reading the same addresses, step after step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt
import torch

from multilora_kernels.batch.slot_runs import SlotRuns
from multilora_kernels.batch.staging import StagingRing

HEADER_INTS = 32
"""Length of the header; `PLAN_*` index it. `native/sources/segment_gemm.c` reads the same
fields."""
PLAN_TOKENS, PLAN_ROWS, PLAN_RUNS, PLAN_TILES, PLAN_OWN_GRAPHS = range(5)
PLAN_PARTS = 8
"""From here on, parts over all tiles in blocks of 16, 32, 64, 128 and 256 rows."""
PLAN_LONGER = 16
"""From here on, tiles of more than 0, 16, 32, ... rows; the first of these is `PLAN_TILES`."""

PART_ROWS = 16
"""The shortest block that tiles are cut into; longer ones are a power of two times as long."""
MAX_TILE_ROWS = PART_ROWS * (HEADER_INTS - PLAN_LONGER)
_BLOCKS = tuple(1 << i for i in range((MAX_TILE_ROWS // PART_ROWS).bit_length()))

TILE_INTS = 4
"""Length of a tile's record: slot, first row, rows, and one that is not used: 16 bytes in all."""

DEFAULT_TILE_ROWS = 128
"""The longest block of the Triton kernels, which cut shorter ones out of a tile; on CPUs, shorter
tiles read and rearrange their adapter's weights more often.
"""


@dataclass(frozen=True)
class PlanLayout:
    """Where each part of a plan's buffer lies; equal for all plans of one engine.

    Attributes:
        max_tokens: The largest number of tokens a step may have.
        max_loras: Number of adapter slots; token slots are in [-1, max_loras).
        tile_rows: The largest number of rows in a tile.
        slot_runs: Whether there is room for the batch's slot runs (`slot_runs.py`) behind the plan.
    """

    max_tokens: int
    max_loras: int
    tile_rows: int = DEFAULT_TILE_ROWS
    slot_runs: bool = False

    def __post_init__(self) -> None:
        for name, low, high in (
            ("max_tokens", 1, 2**31 - 1),
            ("max_loras", 1, 2**15 - 2),
            ("tile_rows", 1, MAX_TILE_ROWS),
        ):
            value = getattr(self, name)
            if not low <= value <= high:
                raise ValueError(f"{name} must be between {low} and {high}, got {value}")

    @cached_property
    def max_tiles(self) -> int:
        """The most tiles a batch can have: full ones, and one partial tile per run."""
        return self.max_tokens // self.tile_rows + min(self.max_loras, self.max_tokens)

    @cached_property
    def tile_slot(self) -> slice:
        """int32 [max_tiles]: the adapter slot of each tile, in the tiles' records."""
        return self._of_tiles(0)

    @cached_property
    def tile_start(self) -> slice:
        """int32 [max_tiles]: the first row of each tile."""
        return self._of_tiles(1)

    @cached_property
    def tile_length(self) -> slice:
        """int32 [max_tiles]: the number of rows of each tile; long tiles come first."""
        return self._of_tiles(2)

    def _of_tiles(self, field: int) -> slice:
        return slice(HEADER_INTS + field, self.order.start, TILE_INTS)

    @cached_property
    def order(self) -> slice:
        """int32 [max_tokens]: the token of each row, adapters' rows first, tile by tile."""
        first = HEADER_INTS + TILE_INTS * self.max_tiles
        return slice(first, first + self.max_tokens)

    @cached_property
    def runs(self) -> SlotRuns:
        """Where the slot runs lie, if there is room for them."""
        return SlotRuns(self.order.stop, self.max_tokens, self.max_loras)

    @cached_property
    def size(self) -> int:
        """Length of the whole buffer in int32 elements."""
        size: int = self.runs.by_slot.stop if self.slot_runs else self.order.stop
        return size


class BatchPlan:
    """A step's plan in one int32 buffer that keeps its address from step to step.

    Args:
        layout: Where the parts of the buffer lie.
        device: Where the kernels run.
        ring: Of what the buffer is a part; None: it is a tensor of its own.

    Attributes:
        layout: Where the parts of the buffer lie.
        buffer: int32 tensor of shape [layout.size] on the device the kernels run on.
        host: int32 tensor in host memory that begins with the same header; keeps its address too,
            because compiled code holds on to it.
        header: The same memory as a NumPy array, which is read without PyTorch's overhead.
        sends_slot_runs: Whether steps bring their slot runs too; only where the layout has room.
    """

    def __init__(
        self,
        layout: PlanLayout,
        device: torch.device | str = "cpu",
        ring: StagingRing | None = None,
    ) -> None:
        self.layout = layout
        if ring is None:
            ring = StagingRing(torch.zeros(layout.size, dtype=torch.int32, device=device))
        self._staging = ring.take(layout.size)
        self.host = self.buffer = self._staging.tensor
        if self.buffer.device.type != "cpu":
            self.host = torch.zeros(HEADER_INTS, dtype=torch.int32)
        self.header = self.host.numpy()
        self._arange = np.arange(max(layout.max_tiles, layout.max_tokens), dtype=np.int32)
        self.sends_slot_runs = False
        self.clear()

    def clear(self) -> None:
        """Makes the buffer on the device an empty plan's: it is new, or its memory was lost."""
        self.buffer.zero_()
        if self.layout.slot_runs:
            self.buffer[self.layout.runs.token_slot].fill_(-1)

    @classmethod
    def build(
        cls,
        token_slots: Sequence[int] | npt.NDArray[np.integer],
        max_loras: int,
        *,
        tile_rows: int = DEFAULT_TILE_ROWS,
        device: torch.device | str = "cpu",
    ) -> BatchPlan:
        """A plan for one batch, in a buffer that just fits it.

        Args:
            token_slots: The adapter slot of each token, of shape [tokens]; -1 for none.
            max_loras: Number of adapter slots.
            tile_rows: The largest number of rows in a tile.
            device: Where the kernels run.

        Raises:
            ValueError: A slot is outside [-1, max_loras), or the shape is not [tokens].
        """
        slots = np.asarray(token_slots)
        plan = cls(PlanLayout(max(1, len(slots)), max_loras, tile_rows), device)
        plan.update(slots)
        return plan

    def update(self, token_slots: npt.NDArray[np.integer], *, own_graphs: bool = False) -> None:
        """Replaces the plan's contents by those for a new batch.

        A stable radix sort and a few vector operations; no loop over tokens.

        Args:
            token_slots: The adapter slot of each token, integers of shape [tokens], tokens at
                most `layout.max_tokens`; -1 for a token without adapter.
            own_graphs: Whether batches without adapters have CUDA graphs of their own: should
                this be such a batch, and a graph be captured with it, then no kernel needs to be
                in it. Without this word a captured graph holds all kernels.

        Raises:
            ValueError: The shape or a slot is out of bounds. The plan is then unchanged.
        """
        layout = self.layout
        if token_slots.ndim != 1 or len(token_slots) > layout.max_tokens:
            raise ValueError(
                f"token_slots must have shape [tokens] with at most {layout.max_tokens} tokens, "
                f"got shape {list(token_slots.shape)}"
            )
        # 16-bit keys: numpy's stable sort of them is a radix sort, linear in the tokens.
        keys = token_slots.astype(np.int16)
        fits = np.array_equal(keys, token_slots)
        keys += 1  # 0: no adapter
        tokens = len(keys)
        counts = _count(keys, layout.max_loras) if fits else None
        if counts is None:
            raise ValueError(
                f"token slots must be between -1 and {layout.max_loras - 1}, got "
                f"{token_slots.min()} to {token_slots.max()}"
            )
        ints = self._staging.open()
        rows = tokens - int(counts[0])
        order = ints[layout.order]
        runs = tiles = 0
        by_slot = None
        if rows:
            by_slot = keys.argsort(kind="stable")
            order[rows:tokens] = by_slot[: tokens - rows]
            runs, tiles = self._write_tiles(ints, counts[1:], by_slot[tokens - rows :])
        else:
            order[:tokens] = self._arange[:tokens]
            ints[PLAN_PARTS:HEADER_INTS] = 0
        ints[:5] = (tokens, rows, runs, tiles, own_graphs)
        if self.sends_slot_runs:
            layout.runs.write(ints, token_slots, by_slot, counts)
        self.header[:HEADER_INTS] = ints[:HEADER_INTS]
        self._staging.send(layout.size if self.sends_slot_runs else layout.order.stop)

    def _write_tiles(
        self,
        ints: npt.NDArray[np.int32],
        rows_per_slot: npt.NDArray[np.intp],
        by_slot: npt.NDArray[np.intp],
    ) -> tuple[int, int]:
        """Writes the tiles and the tokens of their rows; returns how many runs and tiles."""
        size = self.layout.tile_rows
        slots = rows_per_slot.nonzero()[0]
        lengths = rows_per_slot[slots]
        starts = lengths.cumsum() - lengths
        runs = tiles = len(slots)
        longest = int(np.maximum.reduce(lengths))
        if longest > size:
            per_run = (lengths + (size - 1)) // size
            tile_ends = per_run.cumsum()
            tiles = int(tile_ends[-1])
            within = self._arange[:tiles] - (tile_ends - per_run).repeat(per_run)
            slots = slots.repeat(per_run)
            lengths = np.minimum(lengths.repeat(per_run) - within * size, size)
            starts = starts.repeat(per_run) + within * size
        if tiles > 1 and (lengths[1:] > lengths[:-1]).any():
            by_length = (-lengths).argsort(kind="stable")
            slots, lengths = slots[by_length], lengths[by_length]
            found = starts[by_length]
            starts = lengths.cumsum() - lengths
            by_slot = by_slot[(found - starts).repeat(lengths) + self._arange[: len(by_slot)]]
        base = self.layout.order.start
        ints[base : base + len(by_slot)] = by_slot
        records = ints[HEADER_INTS:base].reshape(-1, TILE_INTS)[:tiles]
        records[:, 0] = slots
        records[:, 1] = starts
        records[:, 2] = lengths
        ints[PLAN_PARTS:HEADER_INTS] = 0
        if longest <= PART_ROWS:
            ints[PLAN_PARTS : PLAN_PARTS + len(_BLOCKS)] = ints[PLAN_LONGER] = tiles
        else:
            steps = np.bincount((lengths - 1) // PART_ROWS)
            longer = steps[::-1].cumsum()[::-1]
            ints[PLAN_LONGER : PLAN_LONGER + len(longer)] = longer
            for i, block in enumerate(_BLOCKS):
                ints[PLAN_PARTS + i] = longer[::block].sum()
        return runs, tiles

    @property
    def tokens(self) -> int:
        """Tokens in the batch, with and without adapter."""
        return int(self.header[PLAN_TOKENS])

    @property
    def rows(self) -> int:
        """Tokens with an adapter."""
        return int(self.header[PLAN_ROWS])

    @property
    def runs(self) -> int:
        """Active adapters."""
        return int(self.header[PLAN_RUNS])

    @property
    def tiles(self) -> int:
        """Tiles over all runs."""
        return int(self.header[PLAN_TILES])

    @property
    def own_graphs(self) -> bool:
        """What `update` was told."""
        return bool(self.header[PLAN_OWN_GRAPHS])


def _count(keys: npt.NDArray[np.int16], max_loras: int) -> npt.NDArray[np.intp] | None:
    """How often each slot from -1 on occurs, by keys one higher; None if one is out of range."""
    try:
        counts = np.bincount(keys, minlength=max_loras + 1)
    except ValueError:  # numpy refuses negative numbers, here slots below -1
        return None
    return counts if len(counts) == max_loras + 1 else None
