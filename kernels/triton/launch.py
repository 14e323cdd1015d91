"""What a launch needs to know of the device, and how many programs it starts."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch

from multilora_kernels.configs.config_facts import MIN_BLOCK, power_of_two_up
from multilora_kernels.plan import PlanLayout

_REGISTERS, _MAX_REGISTERS = 65_536, 255  # of a multiprocessor; of a thread
_WARP_THREADS = 32
_INTERPRETER_PROCESSORS = 16  # enough for the defaults to split K, as they do on a GPU


@dataclass(frozen=True)
class Spread:
    """How much work a launch may have, and how many programs a device can hold for it.

    Attributes:
        pieces: Into which each part of a tile is cut.
        block_m: Rows of a part.
        per_processor: Programs for each multiprocessor.
    """

    pieces: int
    block_m: int
    per_processor: int


@dataclass(frozen=True)
class Launch:
    """A kernel with everything it is started with; `report` compiles from the same.

    Attributes:
        kernel: The Triton function.
        grid: Programs.
        arguments: Tensors and numbers by parameter name.
        constants: Compile-time parameters by name.
        options: Warps, stages and the like.
        before: A launch that this one needs the results of; run just before it.
        spread: What the size of the grid follows from.
    """

    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    constants: dict[str, Any]
    options: dict[str, int]
    before: Launch | None = None
    spread: Spread | None = None

    def run(self) -> Any:
        """Launches; returns Triton's compiled kernel, None in the interpreter or if only noted."""
        if self.before is not None:
            self.before.run()
        if _noted is not None:
            _noted.append(self)
            return None
        return self.kernel[self.grid](**self.arguments, **self.constants, **self.options)


_noted: list[Launch] | None = None


@contextmanager
def noted_launches() -> Iterator[list[Launch]]:
    """Meanwhile launches of all threads are put on a list and do not run."""
    global _noted
    launches: list[Launch] = []
    _noted = launches
    try:
        yield launches
    finally:
        _noted = None


@dataclass(frozen=True)
class DeviceFacts:
    """Attributes of a device that decide how a kernel is launched.

    Attributes:
        architecture: The name of its configuration table, such as `sm_90` or `gfx942`.
        processors: Streaming multiprocessors (compute units).
        pdl: Whether a kernel may start before its predecessor has ended (programmatic
            dependent launch).
    """

    architecture: str
    processors: int
    pdl: bool


@dataclass(frozen=True)
class Batch:
    """What every launch of one call reads beside its own tensors.

    Attributes:
        ranks: int32 [slices, slots], the true ranks.
        plan: int32 [layout.size], the plan's buffer.
        layout: Where the plan's parts lie.
        facts: The device.
        batch_invariant: Whether the blocks must not depend on the number of tokens.
    """

    ranks: torch.Tensor
    plan: torch.Tensor
    layout: PlanLayout
    facts: DeviceFacts
    batch_invariant: bool = False

    def programs(self, spread: Spread, tokens: int) -> int:
        """How many programs share the work: as many as the device holds, or can have any.

        A function of shapes alone: a captured graph keeps it for whatever batch it replays. Any
        number is correct, since the programs divide among themselves what the plan says.

        Args:
            spread: Of the launch.
            tokens: Rows of the activations.
        """
        tokens = min(tokens, self.layout.max_tokens)  # the plan has a record for no more parts
        most_parts = tokens // spread.block_m + min(self.layout.max_loras, tokens)
        return max(1, min(most_parts * spread.pieces, spread.per_processor * self.facts.processors))

    def rows_per_program(self, block_m: int) -> int:
        """The configured block of tokens, but no longer than the plan's tiles can fill."""
        return min(block_m, max(MIN_BLOCK, power_of_two_up(self.layout.tile_rows)))

    def arguments(self, tokens: int) -> dict[str, Any]:
        """The arguments that all kernels take, by name; `tokens` are rows of the activations."""
        return {
            "ranks": self.ranks,
            "plan": self.plan,
            "tokens": tokens,
            "order": self.layout.order.start,
            "ranks_slice": self.ranks.stride(0),
            "ranks_slot": self.ranks.stride(1),
        }


@lru_cache
def device_facts(device: torch.device) -> DeviceFacts:
    """The facts of a CUDA or ROCm device, or of Triton's interpreter for `cpu`."""
    if device.type == "cpu":
        return DeviceFacts("interpreter", _INTERPRETER_PROCESSORS, pdl=False)
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip is not None:
        architecture = properties.gcnArchName.split(":")[0]
        return DeviceFacts(architecture, properties.multi_processor_count, pdl=False)
    architecture = f"sm_{properties.major}{properties.minor}"
    return DeviceFacts(architecture, properties.multi_processor_count, pdl=properties.major >= 9)


def launch_options(
    num_warps: int,
    num_stages: int,
    facts: DeviceFacts,
    per_processor: int,
    *,
    pdl: bool = False,
) -> dict[str, int]:
    """Options of a Triton launch.

    Where NVIDIA's compiler is asked, a thread gets no more registers than let a multiprocessor
    hold `per_processor` programs at once. It is always told a limit: left to itself it picks a
    number that lets more run, and spills a few bytes for it.
    """
    options = {"num_warps": num_warps, "num_stages": num_stages}
    if facts.architecture.startswith("sm_"):
        most = _REGISTERS // (per_processor * num_warps * _WARP_THREADS) // 8 * 8
        options["maxnreg"] = min(most, _MAX_REGISTERS)
    # ROCm's Triton does not know the options, so this one is named only where it is wanted.
    return options | {"launch_pdl": True} if pdl else options
