"""The anthropic package's calls."""

from typing import Any

import anthropic
import client_call
import httpx2
from client_call import main, noting, outcome


def client(
    task: dict[str, Any],
    key: str | None = None,
    retries: int = 0,
    statuses: list[int] | None = None,
) -> anthropic.Anthropic:
    return anthropic.Anthropic(
        base_url=task["url"],
        api_key=key or task["key"],
        max_retries=retries,
        http_client=noting(httpx2, [] if statuses is None else statuses),
    )


def message(task: dict[str, Any], model: str, prompt: str = "t1", **fields: Any) -> dict[str, Any]:
    messages = [{"role": "user", "content": prompt}]
    body = {"model": model, "messages": messages, "max_tokens": task["max_tokens"]}
    return body | {"extra_body": {"temperature": 0}} | fields


def answers(task: dict[str, Any]) -> dict[str, dict[str, str]]:
    found = {}
    for model, prompt in task["prompts"].items():
        body = message(task, model, prompt)
        with client(task).messages.stream(**body) as stream:
            streamed = "".join(stream.text_stream)
        found[model] = {
            "messages": client(task).messages.create(**body).content[0].text,
            "messages, streamed": streamed,
        }
    return found


def models(task: dict[str, Any]) -> dict[str, Any]:
    asked, model = client(task), task["model"]
    messages = [{"role": "user", "content": task["prompts"][model]}]
    return {
        "listed": [each.id for each in asked.models.list()],
        "retrieved": asked.models.retrieve(model).id,
        "unknown": outcome(lambda: asked.models.retrieve("unknown")),
        "tokens": asked.messages.count_tokens(model=model, messages=messages).input_tokens,
    }


def headers(task: dict[str, Any]) -> dict[str, Any]:
    raw = client(task).messages.with_raw_response.create(
        **message(task, task["model"]), extra_headers={"X-Request-Id": "asked-by-anthropic"}
    )
    return {"headers": dict(raw.headers)}


def errors(task: dict[str, Any]) -> dict[str, Any]:
    def ask(model: str, key: str | None = None, **fields: Any) -> dict[str, Any]:
        return outcome(lambda: client(task, key).messages.create(**message(task, model, **fields)))

    return {
        "wrong key": ask(task["model"], "wrong"),
        "unknown model": ask("unknown"),
        "broken adapter": ask(task["broken"]),
        "bad field": ask(task["model"], max_tokens=-1),
    }


def retried(task: dict[str, Any]) -> dict[str, Any]:
    body = message(task, task["model"], task["prompt"])

    def ask(tokens: int, retries: int, statuses: list[int]) -> str:
        asked = client(task, task["with_key"], retries, statuses).messages
        return asked.create(**body | {"max_tokens": tokens}).content[0].text

    return client_call.retried(task, ask)


main(answers, models, headers, errors, retried)
