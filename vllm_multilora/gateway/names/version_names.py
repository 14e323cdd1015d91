"""Names that stand for one version of an adapter in vLLM's table, for as long as it is used."""

from __future__ import annotations

import secrets
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vllm.lora.request import LoRARequest

_SECRET_BYTES = 8


class VersionNames:
    """Registers versions of adapters in vLLM's table; used on the server's event loop only.

    Nobody can guess the names. They do not get out of this process: answers have the public names.

    Args:
        table: vLLM's adapters, by the names that its endpoints look up.
    """

    def __init__(self, table: dict[str, LoRARequest]) -> None:
        self._table = table
        self._secret = secrets.token_hex(_SECRET_BYTES)
        self._users: Counter[str] = Counter()

    def name_of(self, lora: LoRARequest) -> str:
        """The name of an adapter's version, which vLLM finds while somebody holds it."""
        return f"multilora-{lora.lora_int_id}-{self._secret}"

    @contextmanager
    def hold(self, lora: LoRARequest) -> Iterator[str]:
        """Lets vLLM find an adapter's version by its name until the end of the block."""
        name = self.name_of(lora)
        self._table[name] = lora
        self._users[name] += 1
        try:
            yield name
        finally:
            self._users[name] -= 1
            if not self._users[name]:
                del self._users[name], self._table[name]
