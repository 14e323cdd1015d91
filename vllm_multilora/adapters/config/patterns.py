r"""Patterns of module names, as PEFT matches them, in bounded time and memory.

A pattern is a regular expression for the end of a name, starting at a dot; the first one that
matches counts (PEFT's `get_pattern_key`). Patterns are untrusted, and both matching and compiling
one can take forever: `(a+)+b` in Python's `re`, `((a{1000}){1000}){1000}` in the `regex` package,
which vLLM uses. So patterns with nested repetition are refused, and so are those with more
repetitions and alternatives than anybody needs to name modules.

But nearly all patterns are plain names; PEFT itself writes names of single modules, by the
thousand. These are looked up and never compiled. The few regular expressions share a budget of
processor time, which is checked before each of them. No name is matched with them that repeats
digits or a character more than those of modules do.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Generic, TypeVar

from vllm_multilora.adapters.model.tensor_names import ends_of

_Value = TypeVar("_Value")

MAX_CHARACTERS = 2000
MAX_CHOICES = 1 << 20
MAX_PATTERNS = 10_000
MAX_EXPRESSIONS = 64
MAX_SECONDS = 2.0

_LITERAL = re.compile(r"[A-Za-z0-9_.-]*")
_QUANTIFIER = re.compile(r"[*+?]|\{\d*(?:,\d*)?\}")
_NARROW, _WIDE = 8, 64  # repetitions of a digit or a letter in a module's name, and of anything
_LONG_RUN = re.compile(rf"(.)\1{{{_NARROW}}}|\d{{{_NARROW + 1}}}", re.DOTALL)
_PLAIN_GROUP = re.compile(r"\?(?::|P<\w+>|[=!])")
_IGNORES_CASE = re.compile(r"\(\?[a-zA-Z]*i")


class PatternError(ValueError):
    """A pattern is no regular expression, or one that could take too long."""


class Budget:
    """What all patterns of an adapter share: expressions, and processor time of one thread."""

    def __init__(self) -> None:
        self._expressions = 0
        self._left = MAX_SECONDS
        self._end: float | None = None

    @contextmanager
    def spending(self) -> Iterator[None]:
        """The time that the block takes is spent."""
        self._end = time.thread_time() + self._left
        try:
            yield
        finally:
            self._left = self._end - time.thread_time()
            self._end = None

    def count_expression(self) -> None:
        """Counts a pattern that is to be compiled; `PatternError`: too many, or no time is left."""
        self._expressions += 1
        if self._expressions > MAX_EXPRESSIONS:
            raise PatternError(
                f"is one of more than {MAX_EXPRESSIONS} regular expressions in the file; plain "
                "module names do not count"
            )
        self.require_left()

    def require_left(self) -> None:
        """Ends a block of `spending` that has taken too long, by a `PatternError`."""
        if self._end is not None and time.thread_time() > self._end:
            raise PatternError(
                f"matching module names takes more than {MAX_SECONDS:g} s of processor time"
            )


class PatternMatcher(Generic[_Value]):
    """Looks values up by the first pattern that fits; `check_pattern` finds all of them safe."""

    def __init__(self, values: Mapping[str, _Value], budget: Budget) -> None:
        self._values = list(values.values())
        self._patterns = list(values)
        self._literals = _Literals()
        self._expressions: list[int] = []
        for index, pattern in enumerate(self._patterns):
            if _LITERAL.fullmatch(pattern):
                self._literals.add(pattern, index)
            else:
                self._expressions.append(index)
        self._compiled: dict[int, re.Pattern[str]] = {}
        self._known: dict[str, _Value | None] = {}
        self._budget = budget

    def __bool__(self) -> bool:
        return bool(self._values)

    def get(self, name: str) -> _Value | None:
        """The value for a module's name; None if no pattern fits; `PatternError`: out of budget."""
        if not self._values:
            return None
        if name not in self._known:
            with self._budget.spending():
                index = self._first(name)
            self._known[name] = None if index is None else self._values[index]
        return self._known[name]

    def _first(self, name: str) -> int | None:
        if "\n" in name:  # which `.` does not match, and `$` does not mind at the end
            return self._first_of(name, range(len(self._patterns)))
        literal = self._literals.first(name, self._budget)
        if literal is None:
            return self._first_of(name, self._expressions)
        before = self._first_of(name, [i for i in self._expressions if i < literal])
        return literal if before is None else before

    def _first_of(self, name: str, indices: Sequence[int]) -> int | None:
        if indices and self._expressions and _LONG_RUN.search(name):
            # Repetitions that have been found safe could take forever with it.
            raise PatternError(
                f"names cannot be matched that have more than {_NARROW} digits in a row, or one "
                f"character more than {_NARROW} times in a row"
            )
        for index in indices:
            self._budget.require_left()
            if index not in self._compiled:
                self._compiled[index] = re.compile(rf"(.*\.)?({self._patterns[index]})$")
            if self._compiled[index].match(name):
                return index
        return None


class _Literals:
    """Patterns that are names, found by the ends of a name without looking at each.

    A dot in a pattern fits any character. So patterns are kept by their length and by where their
    dots are, and the end of a name is looked up with dots in those places.
    """

    def __init__(self) -> None:
        self._of_length: dict[int, dict[tuple[int, ...], dict[str, int]]] = {}

    def add(self, pattern: str, index: int) -> None:
        dots = tuple(i for i, character in enumerate(pattern) if character == ".")
        self._of_length.setdefault(len(pattern), {}).setdefault(dots, {})[pattern] = index

    def first(self, name: str, budget: Budget) -> int | None:
        """The smallest index of a pattern that fits a name without line breaks."""
        found: int | None = None
        for end in ends_of(name):
            for dots, patterns in self._of_length.get(len(end), {}).items():
                budget.require_left()
                index = patterns.get(_with_dots(end, dots))
                if index is not None and (found is None or index < found):
                    found = index
        return found


def _with_dots(text: str, places: tuple[int, ...]) -> str:
    begins = (0, *(place + 1 for place in places))
    return ".".join(text[a:b] for a, b in zip(begins, (*places, len(text)), strict=True))


def check_pattern(pattern: str, budget: Budget) -> None:
    """Raises `PatternError` for one too many, and one that may not match in bounded time."""
    if len(pattern) > MAX_CHARACTERS:
        raise PatternError(
            f"has {len(pattern)} characters, and at most {MAX_CHARACTERS} are allowed"
        )
    if _LITERAL.fullmatch(pattern):
        return
    budget.count_expression()
    if _Scan(pattern).choices > MAX_CHOICES:
        raise PatternError("has too many repetitions and alternatives")
    _compile(pattern)


def check_expression(pattern: str) -> None:
    """Raises `PatternError` if a text is no regular expression; it is not going to be matched.

    One that is very long is taken for one: trainers write all modules' names into it.
    """
    # Compiling sets of characters takes milliseconds for each where case is ignored.
    if len(pattern) <= MAX_CHARACTERS and not _IGNORES_CASE.search(pattern):
        _compile(pattern)


def _compile(pattern: str) -> None:
    try:
        re.compile(pattern)
    except (re.error, RecursionError, OverflowError) as error:
        raise PatternError(f"is not a regular expression: {error}") from None


class _Scan:
    """Goes through a pattern once and multiplies up the `choices` in which it can be tried."""

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
            raise PatternError("repeats a group that has repetitions or alternatives itself")
        self.choices *= 2 if optional else self._atom
        self._has_choices[-1] = True

    def _open(self) -> None:
        self._at += 1
        if self._pattern.startswith("?", self._at):
            kind = _PLAIN_GROUP.match(self._pattern, self._at)
            if kind is None:
                raise PatternError("has a group of an unsupported kind")
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
