"""A descriptor that stays open as long as an object lives or a block lasts."""

from __future__ import annotations

import os
from typing import Self


class OpenDescriptor:
    """A file descriptor; a context manager that closes it.

    Args:
        descriptor: Closed with this object.
    """

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor

    def close(self) -> None:
        """Closes it; closing twice is harmless."""
        descriptor, self._descriptor = self._descriptor, -1
        if descriptor >= 0:
            os.close(descriptor)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()
