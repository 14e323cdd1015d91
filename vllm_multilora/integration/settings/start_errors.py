"""Errors of a start, with which a command of vLLM's ends in one sentence."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import wraps
from typing import Any

from vllm_multilora.errors import MultiLoRAError

_command: list[str] = []
"""What this process runs, once it is known to be a command; other hosts get exceptions."""


def in_one_sentence(handler: Callable[..., Any]) -> Callable[..., Any]:
    """A handler whose errors, which say all, end a command without a traceback.

    Arguments of vLLM's command line, if there are any among the handler's, say what it will run.
    """

    @wraps(handler)
    def call(*args: Any, **kwargs: Any) -> Any:
        if hasattr(args[-1], "dispatch_function"):
            _command[:] = [f"vllm {getattr(args[-1], 'subparser', '')}"]
        try:
            return handler(*args, **kwargs)
        except MultiLoRAError as error:
            if not _command:
                raise
            sys.exit(f"{_command[0]}: error: {error}")

    return call
