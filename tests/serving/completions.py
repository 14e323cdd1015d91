"""Completions of a server, as the tests that talk to one over HTTP want them."""

import httpx

from .models.cases import NEW_TOKENS, Case
from .server import VllmServer


def ask(server: VllmServer, model: str, case: Case, **options: object) -> httpx.Response:
    """Asks a model or adapter for the greedy continuation of a case's prompt."""
    return server.post("/v1/completions", body(model, case, **options))


def body(model: str, case: Case, **options: object) -> dict[str, object]:
    """The body of such a request."""
    return {
        "model": model,
        "prompt": list(case.prompt),
        "max_tokens": NEW_TOKENS,
        "temperature": 0,
        "ignore_eos": True,
        "return_token_ids": True,
        **options,
    }


def token_ids(response: httpx.Response) -> tuple[int, ...]:
    """The tokens of an answer."""
    return tuple(response.json()["choices"][0]["token_ids"])


def assert_serves(server: VllmServer, model: str, case: Case) -> None:
    """The answer is PEFT's."""
    response = ask(server, model, case)
    assert response.status_code == 200, f"{response.text}\n{server.log_tail()}"
    assert token_ids(response) == case.expected.tokens
