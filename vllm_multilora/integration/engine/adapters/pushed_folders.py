"""The folders of adapters that workers were given as tensors.

An adapter's path is a link, which leads to the newest version. The version before stays until the
newest one has been checked, and is the adapter's again if that one is refused.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

if TYPE_CHECKING:
    from vllm.lora.request import LoRARequest

    from vllm_multilora.integration.worker.pushed_tensors import Push


@dataclass
class _Entry:
    """An adapter's path in requests, the link, the newest version, and one that may be served."""

    path: str
    link: Path
    newest: Path
    accepted: Path | None = None


class PushedFolders:
    """Which adapters were pushed; for the engine core's main thread."""

    def __init__(self) -> None:
        self._entries: dict[int, _Entry] = {}

    def resolve(self, request: LoRARequest) -> LoRARequest:
        """A request's adapter with the path of its folder, where it was pushed."""
        entry = self._entries.get(request.lora_int_id)
        if entry is None or request.lora_path != entry.path:
            return request
        return msgspec.structs.replace(request, lora_path=str(entry.link))

    def numbers(self) -> set[int]:
        """Adapters that have a version which may be served."""
        return {number for number, entry in self._entries.items() if entry.accepted is not None}

    def begin(self, push: Push) -> None:
        """Makes a version the newest one of its adapter."""
        assert push.folder is not None
        folder = Path(push.folder)
        entry = self._entries.get(push.number)
        if entry is None or entry.link.parent != folder.parent:
            entry = _Entry(push.path, folder.parent / str(push.number), folder)
            self._entries[push.number] = entry
        entry.path = push.path
        _lead(entry, folder)

    def end(self, push: Push, *, is_accepted: bool) -> None:
        """A version was checked."""
        assert push.folder is not None
        folder, entry = Path(push.folder), self._entries.get(push.number)
        if entry is None:  # it was removed meanwhile
            left: Path | None = folder
        elif is_accepted:
            left, entry.accepted = entry.accepted, folder
        else:
            left = folder
            if entry.accepted is None:
                self.remove(push.number)
            elif entry.newest == folder:
                _lead(entry, entry.accepted)
        if left is not None:
            shutil.rmtree(left, ignore_errors=True)

    def remove(self, number: int) -> None:
        """Deletes an adapter's folders."""
        entry = self._entries.pop(number, None)
        if entry is None:
            return
        for folder in {entry.newest, entry.accepted or entry.newest}:
            shutil.rmtree(folder, ignore_errors=True)
        entry.link.unlink(missing_ok=True)


def _lead(entry: _Entry, folder: Path) -> None:
    """Has an adapter's link lead to a version, at once."""
    entry.newest = folder
    new = entry.link.with_name(f"{entry.link.name}.new")
    new.unlink(missing_ok=True)
    new.symlink_to(folder)
    new.replace(entry.link)
