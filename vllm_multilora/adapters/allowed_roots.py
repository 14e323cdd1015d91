"""Which folders adapters may come from."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from vllm_multilora.adapters.errors import AdapterFormatError
from vllm_multilora.adapters.folder import CONFIG_NAME, TENSORS_NAME
from vllm_multilora.adapters.problems import Code, Problem


class AllowedRoots:
    """Folders below which adapters must lie, with all links resolved.

    Args:
        roots: The folders; without any, adapters may lie anywhere.
    """

    def __init__(self, roots: Sequence[str | Path]) -> None:
        self._roots = tuple(Path(os.path.realpath(root)) for root in roots)

    def allows(self, path: str | Path) -> bool:
        """Whether a path, `..` and links resolved, lies below a root."""
        if not self._roots:
            return True
        real = Path(os.path.realpath(path))
        return any(real != root and real.is_relative_to(root) for root in self._roots)

    def require(self, folder: Path) -> None:
        """Refuses a folder outside the roots, and one whose files are links to outside.

        Raises:
            AdapterFormatError: It, or one of its files, lies elsewhere.
        """
        for path in (folder, folder / CONFIG_NAME, folder / TENSORS_NAME):
            if not self.allows(path):
                roots = ", ".join(map(str, self._roots))
                problem = Problem.at(
                    Code.NOT_ALLOWED,
                    str(path),
                    "",
                    "outside the folders that adapters may come from",
                    f"a path below {roots} (--multilora-allowed-roots)",
                )
                raise AdapterFormatError.of(problem)
