"""Collects problems: one per cause, however many tensors have it."""

from __future__ import annotations

from vllm_multilora.adapters.problems import Code, Problem, shown_name

_MAX_OF_A_CODE = 8


class ProblemList:
    """The problems of one file.

    Tensors with the same code and the same found and expected values have one cause and become
    one problem with a count. A file that is wrong in very many ways is not told all of them: from
    the eighth problem of a code on, they are only counted.

    Args:
        file: What the problems call the file.
    """

    def __init__(self, file: str) -> None:
        self._file = file
        self._first: dict[tuple[str, ...], tuple[Code, str, str, str, str, str]] = {}
        self._counts: dict[tuple[str, ...], int] = {}
        self._last_of: dict[Code, tuple[str, ...]] = {}
        self._groups_of: dict[Code, int] = {}

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
        if key not in self._first and self._groups_of.get(code, 0) >= _MAX_OF_A_CODE:
            key = self._last_of[code]
        if key in self._first:
            self._counts[key] += 1
            return
        self._first[key] = (code, shown_name(where), found, expected, verb, hint)
        self._counts[key] = 1
        self._last_of[code] = key
        self._groups_of[code] = self._groups_of.get(code, 0) + 1

    def grouped(self) -> list[Problem]:
        """The problems, in the order in which they were found first."""
        return [
            Problem.at(
                code,
                self._file,
                where,
                found,
                expected,
                verb=verb,
                hint=hint,
                others=self._counts[key] - 1,
            )
            for key, (code, where, found, expected, verb, hint) in self._first.items()
        ]
