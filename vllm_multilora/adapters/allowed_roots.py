"""Which folders adapters may come from."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from vllm_multilora.adapters.errors import AdapterFormatError
from vllm_multilora.adapters.folder import CONFIG_NAME, PICKLED_NAMES, TENSORS_NAME
from vllm_multilora.adapters.problems import Code, Problem
from vllm_multilora.config import MultiLoRAConfig

_FILES = (CONFIG_NAME, TENSORS_NAME, *PICKLED_NAMES)


class AllowedRoots:
    """Folders below which adapters must lie, with all links resolved.

    Args:
        roots: The folders; without any, adapters may lie anywhere.
        directories: Directories of adapters. They are roots too; and where there are no others,
            what lies in one by its path must not lead out of them by a link.
    """

    def __init__(self, roots: Sequence[str | Path], directories: Sequence[str | Path] = ()) -> None:
        self._directories = tuple(Path(os.path.realpath(folder)) for folder in directories)
        self._roots = (*(Path(os.path.realpath(root)) for root in roots), *self._directories)
        self._is_open = not roots

    @classmethod
    def of(cls, settings: MultiLoRAConfig) -> AllowedRoots:
        """What a server's settings allow."""
        return cls(settings.allowed_roots, settings.adapter_dir)

    def allows(self, path: str | Path) -> bool:
        """Whether a path, `..` and links resolved, lies where adapters may."""
        if not self._roots:
            return True
        if _is_below(Path(os.path.realpath(path)), self._roots):
            return True
        return self._is_open and not _is_below(Path(path).absolute(), self._directories)

    def require(self, folder: Path) -> None:
        """Refuses a folder outside the roots, and one whose files are links to outside.

        Raises:
            AdapterFormatError: It, or one of its files, lies elsewhere.
        """
        for path in (folder, *(folder / name for name in _FILES)):
            if not self.allows(path):
                roots = ", ".join(map(str, self._roots))
                problem = Problem.at(
                    Code.NOT_ALLOWED,
                    str(path),
                    "",
                    "outside the folders that adapters may come from",
                    f"a path below {roots} (--multilora-allowed-roots, --multilora-adapter-dir)",
                )
                raise AdapterFormatError.of(problem)


def _is_below(path: Path, roots: Sequence[Path]) -> bool:
    return any(path != root and path.is_relative_to(root) for root in roots)
