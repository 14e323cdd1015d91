"""How the examples in this folder ask a server, and what they say if it does not answer."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpx

URL = "http://127.0.0.1:8000"


def settings(url: str) -> dict[str, Any]:
    """What an `httpx` client is made with; a server without keys takes no notice of the key."""
    key = os.environ.get("VLLM_API_KEY") or "none"
    return {"base_url": url, "headers": {"Authorization": f"Bearer {key}"}, "timeout": 120}


def problem(response: httpx.Response) -> str:
    """An error's status and what it says, in one line."""
    try:
        error = response.json()["error"]
        said = error if isinstance(error, str) else str(error["message"])
    except (ValueError, KeyError, TypeError):
        said = response.text
    return f"{response.status_code}: {' '.join(said.split())}"


@contextmanager
def errors_in_one_line() -> Iterator[None]:
    """Ends the program with status 1 where a server is not there, or answers with an error."""
    try:
        yield
    except httpx.HTTPStatusError as error:
        sys.exit(f"{error.request.url} answers {problem(error.response)}")
    except httpx.RequestError as error:
        sys.exit(f"{error.request.url} gives no answer: {error or type(error).__name__}")
