"""The openai package's calls."""

from typing import Any

import client_call
import httpx
import openai
from client_call import main, noting, outcome


def client(
    task: dict[str, Any],
    key: str | None = None,
    retries: int = 0,
    statuses: list[int] | None = None,
) -> openai.OpenAI:
    return openai.OpenAI(
        base_url=f"{task['url']}/v1",
        api_key=key or task["key"],
        max_retries=retries,
        http_client=noting(httpx, [] if statuses is None else statuses),
    )


def answers(task: dict[str, Any]) -> dict[str, dict[str, str]]:
    asked, length = client(task), task["max_tokens"]
    found = {}
    for model, prompt in task["prompts"].items():
        messages = [{"role": "user", "content": prompt}]
        plain = {"model": model, "max_tokens": length, "temperature": 0}
        stream = asked.chat.completions.create(messages=messages, stream=True, **plain)
        streamed = [part.choices[0].delta.content or "" for part in stream if part.choices]
        events = asked.responses.create(
            model=model,
            input=prompt,
            max_output_tokens=length,
            temperature=0,
            store=False,
            stream=True,
        )
        found[model] = {
            "completions": asked.completions.create(prompt=prompt, **plain).choices[0].text,
            "chat": asked.chat.completions.create(messages=messages, **plain)
            .choices[0]
            .message.content,
            "chat, streamed": "".join(streamed),
            "responses": asked.responses.create(
                model=model, input=prompt, max_output_tokens=length, temperature=0, store=False
            ).output_text,
            "responses, streamed": "".join(
                event.delta for event in events if event.type == "response.output_text.delta"
            ),
        }
    return found


def models(task: dict[str, Any]) -> dict[str, Any]:
    asked, model = client(task), task["model"]
    one = asked.models.retrieve(model)
    return {
        "listed": {each.id: each.model_extra["max_model_len"] for each in asked.models.list()},
        "retrieved": [one.id, one.model_extra["max_model_len"], one.model_extra["parent"]],
        "unknown": outcome(lambda: asked.models.retrieve("unknown")),
    }


def headers(task: dict[str, Any]) -> dict[str, Any]:
    model = task["model"]
    asked = client(task).completions
    raw = asked.with_raw_response.create(
        model=model,
        prompt=task["prompts"][model],
        max_tokens=1,
        extra_headers={"X-Request-Id": "asked-by-openai"},
    )
    return {"headers": dict(raw.headers), "request_id": raw.parse()._request_id}


def errors(task: dict[str, Any]) -> dict[str, Any]:
    def ask(key: str | None = None, **fields: Any) -> dict[str, Any]:
        body = {"model": task["model"], "prompt": "t1", "max_tokens": 1, **fields}
        return outcome(lambda: client(task, key).completions.create(**body))

    def load(key: str | None = None) -> dict[str, Any]:
        body = {"lora_name": task["model"], "lora_path": task["folder"]}
        return outcome(
            lambda: client(task, key).post("/load_lora_adapter", body=body, cast_to=object)
        )

    return {
        "wrong key": ask("wrong"),
        "not allowed": load(),
        "name taken": load(task["admin_key"]),
        "unknown model": ask(model="unknown"),
        "broken adapter": ask(model=task["broken"]),
        "bad field": ask(max_tokens=-1),
    }


def retried(task: dict[str, Any]) -> dict[str, Any]:
    fields = {"model": task["model"], "prompt": task["prompt"], "temperature": 0}

    def ask(tokens: int, retries: int, statuses: list[int]) -> str:
        asked = client(task, task["with_key"], retries, statuses).completions
        return asked.create(max_tokens=tokens, **fields).choices[0].text

    return client_call.retried(task, ask)


main(answers, models, headers, errors, retried)
