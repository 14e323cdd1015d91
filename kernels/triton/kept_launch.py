"""A launch that is repeated with other tensors, without Triton's search for its compiled kernel.

For every launch Triton looks at each argument, makes a key of what it finds and looks the kernel
up: tens of microseconds on the host. Nearly all of these arguments are a layer's own and never
change. What a batch brings are addresses, row strides and a number of tokens, and from those Triton
compiles anew only for what `activations` keeps away. So the kernel that was compiled for one batch
fits every other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from triton.runtime import driver

from multilora_kernels.triton.launch import Batch, Launch


def current_stream() -> int:
    """The current stream of the current device, as Triton's launches take it."""
    active = driver.active
    stream: int = active.get_current_stream(active.get_current_device())
    return stream


class KeptLaunch:
    """The launch of one kernel of a layer, for batches of one range of token counts.

    Args:
        launch: That of some batch; its constants, its options and all arguments that are not a
            batch's are kept.
        batch: For the number of programs; its plan is not used.
        names: The arguments of a batch, `tokens` among them, in the order in which `run` and
            `run_compiled` take them.

    Attributes:
        is_compiled: Whether `run_compiled` may be called.
    """

    def __init__(self, launch: Launch, batch: Batch, names: Sequence[str]) -> None:
        self._batch = batch
        self._names = tuple(names)
        self._tokens_at = self._names.index("tokens")
        # Places of a batch's own are kept, so that all launches name arguments in one order.
        arguments = {n: None if n in names else value for n, value in launch.arguments.items()}
        self._launch = replace(launch, arguments=arguments, before=None)
        self._launcher: Any = None
        self._compiled: tuple[Any, Any] = (None, None)
        self._values: list[Any] = []
        self._places: tuple[int, ...] = ()
        self._tokens = self._programs = 0  # of the last batch: as a rule the next has as many
        self.is_compiled = False

    def run(self, *of_the_batch: Any) -> None:
        """Launches through Triton.

        Args:
            of_the_batch: Tensors and numbers by the names of the constructor.
        """
        programs = self._programs_for(of_the_batch[self._tokens_at])
        own = dict(zip(self._names, of_the_batch, strict=True))
        arguments = {**self._launch.arguments, **own}
        compiled = replace(self._launch, grid=(programs,), arguments=arguments).run()
        if compiled is not None and self._batch.facts.architecture.startswith("sm_"):
            # Elsewhere Triton looks at more: ROCm's, at the sizes of tensors.
            self._keep(compiled)

    def run_compiled(self, stream: int, *of_the_batch: int) -> None:
        """Launches the compiled kernel.

        Triton's hooks at launches, by which its profiler names kernels, are not called.

        Args:
            stream: The current stream, as Triton's driver gives it.
            of_the_batch: As for `run`, with addresses in the place of tensors.
        """
        values = self._values.copy()
        for place, value in zip(self._places, of_the_batch, strict=True):
            values[place] = value
        tokens = of_the_batch[self._tokens_at]
        programs = self._programs if tokens == self._tokens else self._programs_for(tokens)
        function, metadata = self._compiled
        self._launcher(programs, 1, 1, stream, function, metadata, None, None, None, *values)

    def _programs_for(self, tokens: int) -> int:
        assert self._launch.spread is not None, "a layer's launches follow from their work"
        self._programs = self._batch.programs(self._launch.spread, tokens)
        self._tokens = tokens
        return self._programs

    def _keep(self, compiled: Any) -> None:
        given = {**self._launch.arguments, **self._launch.constants}
        parameters = self._launch.kernel.signature.parameters
        self._values = [
            _addresses(given.get(name, parameter.default)) for name, parameter in parameters.items()
        ]
        self._places = tuple(list(parameters).index(name) for name in self._names)
        self._launcher = compiled.run
        self._compiled = compiled.function, compiled.packed_metadata
        self.is_compiled = True


def _addresses(value: Any) -> Any:
    """Addresses for tensors: the launcher asks the driver about every tensor, at each launch."""
    if isinstance(value, torch.Tensor):
        return value.data_ptr()
    if isinstance(value, tuple):
        return tuple(map(_addresses, value))
    return value
