"""What the store needs to know about adapters' files; `adapter_reader` implements it."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from vllm_multilora.store.messages import StoreSettings


class Taken(Protocol):
    """What reading has found: see `adapters.intake.Taken`."""

    @property
    def digest(self) -> str: ...
    @property
    def nbytes(self) -> int: ...
    @property
    def parts(self) -> tuple[str, ...]: ...


class Intake(Protocol):
    """A checked adapter: see `adapters.intake.Intake`."""

    @property
    def rank(self) -> int: ...
    @property
    def has_special(self) -> bool: ...
    @property
    def invocation_tokens(self) -> tuple[int, ...]: ...
    @property
    def dora(self) -> bool: ...
    @property
    def block_bytes(self) -> NDArray[np.int64]: ...
    def read(
        self, addresses: NDArray[np.int64] | None, places: NDArray[np.int64] | None
    ) -> Taken: ...


class Source(Protocol):
    """An adapter's open files: see `adapters.intake.Source`."""

    @property
    def version(self) -> str: ...
    def check(self, layouts: Sequence[Any]) -> Intake: ...


class Reader(Protocol):
    """What the store needs to know of adapters."""

    def decode_layouts(self, data: bytes) -> list[Any]:
        """The layouts of `Configure`; raises `msgspec.MsgspecError`."""

    def prepare(self, settings: StoreSettings) -> None:
        """Loads what jobs with these settings will need, once for all of them."""

    def rules(self, settings: StoreSettings) -> Any:
        """What adapters are opened by; reads the operator's files, and no customer's.

        Raises `MultiLoRAError`.
        """

    def open(self, path: str, rules: Any) -> AbstractContextManager[Source]:
        """Opens an adapter's files; raises `AdapterError`."""
