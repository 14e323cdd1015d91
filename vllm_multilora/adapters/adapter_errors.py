"""Exceptions for an adapter's files; each message names the file and the tensor or key."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Self

from vllm_multilora.adapters.problems import Code, Problem, bounded
from vllm_multilora.errors import MultiLoRAError


class AdapterError(MultiLoRAError):
    """Base class: this adapter cannot be had, others are not concerned; its `problems` say why."""

    def __init__(self, message: str, problems: Sequence[Problem] = ()) -> None:
        super().__init__(message)
        self.problems = tuple(problems)

    @classmethod
    def of(cls, *problems: Problem) -> Self:
        """The error of one or more problems, one a line; of very many, see `bounded`."""
        reported = bounded(problems)
        return cls("\n".join(map(str, reported)), reported)

    @classmethod
    def at(
        cls,
        code: Code,
        file: str,
        found: str,
        expected: str,
        *,
        where: str = "",
        verb: str = "is",
        hint: str = "",
    ) -> Self:
        """The error of one problem; the arguments are those of `Problem.at`."""
        return cls.of(Problem.at(code, file, where, found, expected, verb=verb, hint=hint))


class AdapterFormatError(AdapterError, ValueError):
    """The adapter's files hold something that cannot be served; trying again does not help."""


class AdapterReadError(AdapterError, OSError):
    """The adapter's files could not be read, or changed meanwhile; a later try may succeed."""


class AdapterNotFoundError(AdapterError, FileNotFoundError):
    """The adapter's folder or one of its files is missing."""
