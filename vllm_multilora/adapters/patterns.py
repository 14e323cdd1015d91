r"""Patterns of module names, as PEFT matches them, in bounded time and memory.

A pattern stands for the end of a name, beginning at a dot, and is a regular expression; the first
one that fits counts (PEFT's `get_pattern_key`). They come from strangers, and both matching and
compiling one can be made to take for ever: `(a+)+b` in Python's `re`, `((a{1000}){1000}){1000}` in
the `regex` package, which vLLM uses. So patterns with nested repetition are refused, and those
with more repetitions and alternatives than anybody needs to name modules.
"""

from __future__ import annotations

import re
import time
from collections.abc import Mapping
from typing import Generic, TypeVar

_Value = TypeVar("_Value")

MOST_CHARACTERS = 2000
MOST_CHOICES = 1 << 20
MOST_PATTERNS = 10_000
MOST_SECONDS = 2.0

_QUANTIFIER = re.compile(r"[*+?]|\{\d*(?:,\d*)?\}")
_NARROW, _WIDE = 8, 64  # repetitions of a digit or a letter in a module's name, and of anything
_PLAIN_GROUP = re.compile(r"\?(?::|P<\w+>|[=!])")


class PatternError(ValueError):
    """A pattern is no regular expression, or one that could take too long."""


class PatternMatcher(Generic[_Value]):
    """Looks values up by the first pattern that fits a module's name.

    Args:
        values: Values by pattern, all of them found safe by `check_pattern`.
    """

    def __init__(self, values: Mapping[str, _Value]) -> None:
        self._values = [
            (re.compile(rf"(.*\.)?({pattern})$"), value) for pattern, value in values.items()
        ]
        self._known: dict[str, _Value | None] = {}
        self._spent = 0.0

    def get(self, name: str) -> _Value | None:
        """The value for a module's name; None if no pattern fits.

        Raises:
            PatternError: All look-ups together have taken too much processor time.
        """
        if not self._values:
            return None
        if name not in self._known:
            if self._spent > MOST_SECONDS:
                raise PatternError(
                    f"matching module names takes more than {MOST_SECONDS:g} s of processor time"
                )
            start = time.thread_time()
            self._known[name] = next((v for p, v in self._values if p.match(name)), None)
            self._spent += time.thread_time() - start
        return self._known[name]


def check_pattern(pattern: str) -> None:
    """Raises if a pattern is not one that can be matched in bounded time.

    Raises:
        PatternError: It is no regular expression, too long, or repeats too much.
    """
    if len(pattern) > MOST_CHARACTERS:
        raise PatternError(
            f"has {len(pattern)} characters, and at most {MOST_CHARACTERS} are taken"
        )
    if _Scan(pattern).choices > MOST_CHOICES:
        raise PatternError("has too many repetitions and alternatives")
    check_expression(pattern)


def check_expression(pattern: str) -> None:
    """Raises if a text is not a regular expression at all; it is not going to be matched.

    Raises:
        PatternError: It is not.
    """
    try:
        re.compile(pattern)
    except (re.error, RecursionError, OverflowError) as error:
        raise PatternError(f"is not a regular expression: {error}") from None


class _Scan:
    """Goes through a pattern once and multiplies up the ways in which it can be tried.

    Attributes:
        choices: About how many ways there are to match a module's name.
    """

    def __init__(self, pattern: str) -> None:
        self.choices = 1
        self._pattern = pattern
        self._at = 0
        # Of each open group, the whole pattern first: alternatives; whether it has choices.
        self._alternatives = [1]
        self._has_choices = [False]
        self._atom = _NARROW  # in how many ways what stands before can be repeated
        self._atom_has_choices = False
        while self._at < len(pattern):
            self._step()
        self.choices *= self._alternatives[0]

    def _step(self) -> None:
        pattern, character = self._pattern, self._pattern[self._at]
        if quantifier := _QUANTIFIER.match(pattern, self._at):
            self._repeat(quantifier[0])
            self._at = quantifier.end()
            if pattern.startswith(("?", "+"), self._at):  # lazy, possessive
                self._at += 1
            return
        self._atom_has_choices = False
        if character == "(":
            self._open()
        elif character == ")":
            self._close()
        elif character == "[":
            end = _end_of_set(pattern, self._at)
            self._atom = _NARROW if pattern[self._at : end] == "[0-9]" else _WIDE
            self._at = end
        elif character == "\\":
            following = pattern[self._at + 1 : self._at + 2]
            self._atom = _WIDE if following.isalnum() and following != "d" else _NARROW
            self._at += 2
        else:
            self._atom = _WIDE if character == "." else _NARROW
            if character == "|":
                self._alternatives[-1] += 1
                self._has_choices[-1] = True
            self._at += 1

    def _repeat(self, quantifier: str) -> None:
        optional = quantifier == "?"
        if self._atom_has_choices and not optional:
            raise PatternError("repeats what repeats or branches itself")
        self.choices *= 2 if optional else self._atom
        self._has_choices[-1] = True

    def _open(self) -> None:
        self._at += 1
        if self._pattern.startswith("?", self._at):
            kind = _PLAIN_GROUP.match(self._pattern, self._at)
            if kind is None:
                raise PatternError("has a group of a kind that is not taken")
            self._at = kind.end()
        self._alternatives.append(1)
        self._has_choices.append(False)

    def _close(self) -> None:
        self._at += 1
        self._atom = _WIDE
        if len(self._alternatives) > 1:  # else it is no expression, which is found out later
            self.choices *= self._alternatives.pop()
            self._atom_has_choices = self._has_choices.pop()
            self._has_choices[-1] |= self._atom_has_choices


def _end_of_set(pattern: str, at: int) -> int:
    """Where a character set that begins at `at` ends."""
    at += 1
    at += pattern.startswith("^", at)
    at += pattern.startswith("]", at)
    while at < len(pattern) and pattern[at] != "]":
        at += 2 if pattern[at] == "\\" else 1
    return at + 1
