"""What is wrong with an adapter, as text for people and as fields for programs."""

from __future__ import annotations

import reprlib
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from enum import StrEnum
from functools import partial
from typing import Any

from vllm_multilora.wording import counted, printable

MAX_PROBLEMS = 100
"""Problems that are reported for an adapter; any others are only counted."""

MAX_CHARACTERS = 32_768
"""Characters in the texts of an adapter's problems; the first problem is always reported."""

_MAX_SHOWN = 160
_MAX_OF_A_CODE = 8
_MAX_TEXT = 2000
_TEXTS = ("file", "where", "found", "expected", "message", "hint")  # fields of a `Problem`


class Code(StrEnum):
    """Kinds of problem; the values are stable, so that programs may compare them."""

    FOLDER_MISSING = "folder-missing"
    FILE_MISSING = "file-missing"
    FILE_UNREADABLE = "file-unreadable"
    FILE_CHANGED = "file-changed"
    FILE_TOO_LARGE = "file-too-large"
    NOT_A_FILE = "not-a-file"
    NOT_ALLOWED = "not-allowed"
    NOT_SIGNED = "not-signed"
    WRONG_SIGNATURE = "wrong-signature"
    NOT_AS_SIGNED = "not-as-signed"
    WRONG_DIGEST = "wrong-digest"
    NOT_SAFETENSORS = "not-safetensors"
    NOT_PICKLED_TENSORS = "not-pickled-tensors"

    CONFIG_NOT_JSON = "config-not-json"
    CONFIG_KEY_MISSING = "config-key-missing"
    CONFIG_VALUE = "config-value"
    CONFIG_PATTERN = "config-pattern"
    UNSUPPORTED_FEATURE = "unsupported-feature"
    UNSUPPORTED_PEFT_TYPE = "unsupported-peft-type"
    UNSUPPORTED_MODULES_TO_SAVE = "unsupported-modules-to-save"
    RANK_TOO_LARGE = "rank-too-large"

    HEADER_TOO_LARGE = "header-too-large"
    HEADER_NOT_JSON = "header-not-json"
    HEADER_ENTRY = "header-entry"
    HEADER_OFFSETS = "header-offsets"
    FILE_SIZE = "file-size"
    TOO_MANY_TENSORS = "too-many-tensors"

    NO_LORA_TENSORS = "no-lora-tensors"
    NO_MATCHING_MODULES = "no-matching-modules"
    NOTHING_APPLIED = "nothing-applied"
    UNKNOWN_MODULE = "unknown-module"
    MERGED_MODULE = "merged-module"
    LAYER_OUT_OF_RANGE = "layer-out-of-range"
    UNKNOWN_TENSOR = "unknown-tensor"
    DUPLICATE_TENSOR = "duplicate-tensor"
    HALF_MISSING = "half-missing"
    WRONG_DTYPE = "wrong-dtype"
    EMPTY_TENSOR = "empty-tensor"
    WRONG_SHAPE = "wrong-shape"
    WRONG_VOCABULARY = "wrong-vocabulary"
    RANKS_DIFFER = "ranks-differ"
    RANK_NOT_AS_CONFIGURED = "rank-not-as-configured"
    NOT_FINITE = "not-finite"
    OVERFLOW = "overflow"

    MORE_PROBLEMS = "more-problems"


TRUST_CODES = frozenset(
    {Code.NOT_SIGNED, Code.WRONG_SIGNATURE, Code.NOT_AS_SIGNED, Code.WRONG_DIGEST}
)
"""Codes for a bad signature, a folder that differs from what was signed, and a wrong digest."""


@dataclass(frozen=True)
class Problem:
    """One cause for which an adapter cannot be served.

    Attributes:
        file: The file it is in, or the adapter's folder.
        where: The tensor or the JSON key; empty where the file as a whole is meant.
        message: All of this as a sentence, beginning with the file.
        hint: What to do about it; may be empty.
        count: How many tensors or keys have it; `where` is the first of them.
    """

    code: Code
    file: str
    where: str
    found: str
    expected: str
    message: str
    hint: str = ""
    count: int = 1

    @classmethod
    def at(
        cls,
        code: Code,
        file: str,
        where: str,
        found: str,
        expected: str,
        *,
        verb: str = "is",
        hint: str = "",
        others: int = 0,
    ) -> Problem:
        """A problem whose sentence is "<file>: <where> is <found>, expected <expected>".

        Keys and tensors are named as they are; a file as a whole has no `where`. `verb` stands
        between `where` and `found`, and `others` more tensors or keys have the same problem.
        """
        more = f" ({others} more like this)" if others else ""
        subject = f"{file}: {where}" if where else file
        message = f"{subject} {verb} {found}, expected {expected}{more}"
        return cls(code, file, where, found, expected, message, hint, 1 + others)

    def __str__(self) -> str:
        return f"{self.message}; {self.hint}" if self.hint else self.message

    def with_texts(self, change: Callable[[str], str]) -> Problem:
        """The same problem, each of its texts changed."""
        texts: dict[str, Any] = {name: change(getattr(self, name)) for name in _TEXTS}
        return replace(self, **texts)

    def as_dict(self) -> dict[str, Any]:
        return asdict(self) | {"code": str(self.code)}

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> Problem:
        return cls(**{**fields, "code": Code(fields["code"])})


class _Shortener(reprlib.Repr):
    def __init__(self) -> None:
        super().__init__()
        self.maxstring = self.maxother = self.maxlong = _MAX_SHOWN
        self.maxdict = self.maxlist = self.maxtuple = 6
        self.maxlevel = 3


def shown(value: Any) -> str:
    """A value of a file as messages show it: short, printable, and as Python writes it.

    Files come from strangers: a value may be long or deeply nested, and hold characters that
    cannot be encoded.
    """
    return printable(_Shortener().repr(value))


def shown_name(name: str, most: int = _MAX_SHOWN) -> str:
    """A tensor's or module's name as messages show it: short, printable, without quotes."""
    return _shortened(printable(_shortened(name, most)), 2 * most)


def _shortened(text: str, most: int) -> str:
    half = (most - 3) // 2
    return text if len(text) <= most else f"{text[:half]}...{text[-half:]}"


def more_problems(file: str, count: int) -> Problem:
    """What stands for problems that are only counted."""
    found = f"{counted(count, 'more problem')}, not listed"
    return replace(Problem.at(Code.MORE_PROBLEMS, file, "", found, "none", verb="has"), count=count)


def bounded(problems: Iterable[Problem]) -> list[Problem]:
    """The problems of one adapter as they may be kept, logged and sent.

    However wrong the adapter is, and whatever its files and its path hold, there are at most
    `MAX_PROBLEMS`, of at most `MAX_CHARACTERS`, and one more that counts the others; their texts
    are short, printable and can be encoded.
    """
    kept: list[Problem] = []
    more, left = 0, MAX_CHARACTERS
    for problem in problems:
        if problem.code == Code.MORE_PROBLEMS:
            more += problem.count
            continue
        if len(kept) < MAX_PROBLEMS and left > 0:
            reported = problem.with_texts(_text)
            left -= sum(len(getattr(reported, name)) for name in _TEXTS if name != "hint")
            if left > 0 or not kept:
                kept.append(reported)
                continue
        more += 1
    return [*kept, more_problems(kept[0].file, more)] if more and kept else kept


def _text(text: str) -> str:
    return _shortened(printable(_shortened(text, _MAX_TEXT)), _MAX_TEXT)


class ProblemList:
    """The problems of one file.

    Tensors with the same code and the same found and expected values have one cause and become
    one problem with a count. A file that is wrong in very many ways is not told all of them: from
    the eighth problem of a code on, they are only counted.
    """

    def __init__(self, file: str) -> None:
        self._file = file
        # By cause, what makes the problem once it is known how many more like it there are.
        self._first: dict[tuple[str, ...], Callable[..., Problem]] = {}
        self._counts: Counter[tuple[str, ...]] = Counter()
        self._last_of: dict[Code, tuple[str, ...]] = {}
        self._groups_of: Counter[Code] = Counter()

    def __len__(self) -> int:
        return len(self._first)

    def add(
        self,
        code: Code,
        where: str,
        found: str,
        expected: str,
        *,
        verb: str = "is",
        hint: str = "",
        cause: str | None = None,
    ) -> None:
        """Notes a problem; the arguments are those of `Problem.at`, and its `cause`.

        A tensor's name may be given as it is in the file. `cause` tells what has one cause where
        `found` and `expected` differ from tensor to tensor.
        """
        key: tuple[str, ...] = (code, found, expected) if cause is None else (code, cause)
        if key not in self._first and self._groups_of[code] >= _MAX_OF_A_CODE:
            key = self._last_of[code]
        self._counts[key] += 1
        if key not in self._first:
            where = shown_name(where)
            made = partial(
                Problem.at, code, self._file, where, found, expected, verb=verb, hint=hint
            )
            self._first[key], self._last_of[code] = made, key
            self._groups_of[code] += 1

    def grouped(self) -> list[Problem]:
        """The problems, in the order in which they were found first."""
        return [make(others=self._counts[key] - 1) for key, make in self._first.items()]
