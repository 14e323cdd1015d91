"""The corpus's registers, and how adapters get into them."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from vllm_multilora.adapters.problems import Code

from .draft import CONFIG, WEIGHTS, Draft, good

Change = Callable[[Draft], Draft | None]


@dataclass(frozen=True)
class BadAdapter:
    """An adapter that is wrong in one way.

    Attributes:
        name: What is wrong.
        codes: The problems that it has, in order.
        words: What the first problem's message must contain, beside the file's name.
        file: The file that the message must name.
        change: Makes it out of a good one.
        is_right_untied: Whether it is right for a base model whose head is not its embedding.
    """

    name: str
    codes: tuple[Code, ...]
    words: tuple[str, ...]
    file: str
    change: Change
    is_right_untied: bool = False

    def write(self, folder: Path) -> Path:
        """Writes the adapter; returns where it lies, which may be no folder at all."""
        draft = good()
        return (self.change(draft) or draft).write(folder)


@dataclass(frozen=True)
class ValidAdapter:
    """An adapter that must be accepted.

    Attributes:
        name: What is special about it.
        read_by_peft: Whether PEFT takes the files as they are, so that it can be the reference.
        change: Makes it out of a plain one.
    """

    name: str
    read_by_peft: bool
    change: Change

    def write(self, folder: Path) -> Path:
        """Writes the adapter; returns its folder."""
        draft = good()
        return (self.change(draft) or draft).write(folder)


BAD: dict[str, BadAdapter] = {}
BAD_DORA: dict[str, BadAdapter] = {}
"""For a server that takes DoRA adapters; all others refuse each of them alike."""
VALID: dict[str, ValidAdapter] = {}


def bad(
    file: str,
    *codes: Code,
    words: tuple[str, ...] = (),
    of: dict[str, BadAdapter] = BAD,
    is_right_untied: bool = False,
) -> Callable[[Change], Change]:
    """Registers a bad adapter under its function's name."""

    def register(change: Change) -> Change:
        name = change.__name__.replace("_", "-")
        assert name not in of, f"{name} is there twice"
        of[name] = BadAdapter(name, codes, words, file, change, is_right_untied)
        return change

    return register


def bad_config(*codes: Code, words: tuple[str, ...] = ()) -> Callable[[Change], Change]:
    """Registers an adapter with a bad configuration."""
    return bad(CONFIG, *codes, words=words)


def bad_weights(
    *codes: Code, words: tuple[str, ...] = (), is_right_untied: bool = False
) -> Callable[[Change], Change]:
    """Registers an adapter with a bad tensor file."""
    return bad(WEIGHTS, *codes, words=words, is_right_untied=is_right_untied)


def valid(*, read_by_peft: bool = True) -> Callable[[Change], Change]:
    """Registers a valid adapter under its function's name."""

    def register(change: Change) -> Change:
        name = change.__name__.replace("_", "-")
        assert name not in VALID, f"{name} is there twice"
        VALID[name] = ValidAdapter(name, read_by_peft, change)
        return change

    return register
