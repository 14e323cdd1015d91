"""What one prompt, with all of its choices, has used."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class Status(StrEnum):
    """How a prompt's work has ended."""

    OK = "ok"
    ABORTED = "aborted"  # the client has gone, or the server was told to stop
    FAILED = "failed"


@dataclass
class Usage:
    """Tokens as an answer's `usage` counts them.

    Attributes:
        request_id: vLLM's id of the prompt: the answer's, for most endpoints with the number of the
            prompt after it, as in `cmpl-...-0`.
        adapter: The adapter's name; None for the base model.
        is_blend: Whether that is a blend of adapters.
        version: The digest of the weights that have computed it; None if nothing was.
        route: The route that the client asked for; None if it named a model.
        tenant: Whose request it was; None where nobody says.
        prompt_tokens: Of the prompt, once for all choices; 0 if no choice has got as far.
        cached_tokens: Those of them that were found in the prefix cache by the first choice.
        generated_tokens: Of all choices.
        status: How it has ended.
    """

    request_id: str
    adapter: str | None = None
    version: str | None = None
    route: str | None = None
    tenant: str | None = None
    prompt_tokens: int = 0
    cached_tokens: int = 0
    generated_tokens: int = 0
    status: Status = Status.OK
    is_blend: bool = False
