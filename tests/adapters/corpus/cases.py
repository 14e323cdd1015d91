"""The corpus's registers, and how adapters get into them."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllm_multilora.adapters.problems import Code

from .draft import Draft, good

Change = Callable[[Draft], object]
"""Changes a good adapter, or returns another one to be written in its place."""


@dataclass(frozen=True)
class CorpusAdapter:
    """An adapter that is made by changing a good one."""

    name: str
    change: Change

    def write(self, folder: Path) -> Path:
        """Writes the adapter; returns where it lies, which may be no folder at all."""
        draft = good()
        changed = self.change(draft)
        return (changed if isinstance(changed, Draft) else draft).write(folder)


@dataclass(frozen=True)
class BadAdapter(CorpusAdapter):
    """An adapter that is wrong in one way.

    Attributes:
        codes: The problems that it has, in order.
        words: What the first problem's message must contain, beside the file's name.
        file: The file that the message must name.
        is_right_untied: Whether it is right for a base model whose head is not its embedding.
    """

    codes: tuple[Code, ...]
    words: tuple[str, ...]
    file: str
    is_right_untied: bool = False


@dataclass(frozen=True)
class ValidAdapter(CorpusAdapter):
    """An adapter that must be accepted.

    Attributes:
        read_by_peft: Whether PEFT takes the files as they are, so that it can be the reference.
    """

    read_by_peft: bool


BAD: dict[str, BadAdapter] = {}
BAD_DORA: dict[str, BadAdapter] = {}
"""For a server that takes DoRA adapters; all others refuse each of them alike."""
VALID: dict[str, ValidAdapter] = {}


def add_bad(
    file: str,
    rows: Mapping[str, tuple[Any, ...]],
    of: dict[str, BadAdapter] = BAD,
    *,
    is_right_untied: bool = False,
) -> None:
    """Registers adapters by name: the change, the code or codes, and words of the first problem."""
    for name, (change, codes, *words) in rows.items():
        assert name not in of, f"{name} is there twice"
        codes = codes if isinstance(codes, tuple) else (codes,)
        of[name] = BadAdapter(name, change, codes, tuple(words), file, is_right_untied)


def add_valid(rows: Mapping[str, Change], *, read_by_peft: bool = True) -> None:
    """Registers valid adapters by name."""
    for name, change in rows.items():
        assert name not in VALID, f"{name} is there twice"
        VALID[name] = ValidAdapter(name, change, read_by_peft)
