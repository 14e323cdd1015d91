"""Which folders adapters may come from."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from vllm_multilora.adapters.adapter_errors import AdapterFormatError
from vllm_multilora.adapters.files.missing_files import is_url
from vllm_multilora.adapters.problems import Code


class AllowedRoots:
    """Folders below which adapters must lie, with all links resolved.

    Args:
        roots: The folders; without any, adapters may lie anywhere. URLs are none.
        directories: Directories of adapters. They are roots too; and where there are no others,
            what lies in one by its path must not lead out of them by a link.
    """

    def __init__(self, roots: Sequence[str | Path], directories: Sequence[str | Path] = ()) -> None:
        self._directories = tuple(Path(os.path.realpath(folder)) for folder in directories)
        folders = [Path(os.path.realpath(root)) for root in roots if not is_url(str(root))]
        paths = (*folders, *self._directories)
        self._roots = tuple(dict.fromkeys(paths))
        self._is_open = not roots

    def roots_for(self, path: str | Path) -> tuple[str, ...]:
        """The folders below which a path must lead; none: it may lead anywhere."""
        if self._is_open and not _is_below(Path(path).absolute(), self._directories):
            return ()
        return tuple(map(str, self._roots))

    def allows(self, path: str | Path) -> bool:
        """Whether a path, `..` and links resolved, lies where adapters may."""
        return not self.roots_for(path) or _is_below(Path(os.path.realpath(path)), self._roots)

    def require(self, path: Path, real: str) -> None:
        """Raises `AdapterFormatError` for what lies outside the roots; `real` has no links."""
        if not self.roots_for(path) or _is_below(Path(real), self._roots):
            return
        roots = ", ".join(map(str, self._roots))
        raise AdapterFormatError.at(
            Code.NOT_ALLOWED,
            str(path),
            "outside the folders that adapters may come from",
            f"a path below {roots} (--multilora-allowed-roots, --multilora-adapter-dir)",
        )


def _is_below(path: Path, roots: Sequence[Path]) -> bool:
    return any(path != root and path.is_relative_to(root) for root in roots)
