"""litellm's calls, as a library; the proxy is asked with openai's."""

from typing import Any

import litellm
from client_call import main, outcome

litellm.suppress_debug_info = True


def fields(task: dict[str, Any], model: str, key: str | None = None) -> dict[str, Any]:
    return {
        "model": f"hosted_vllm/{model}",
        "api_base": f"{task['url']}/v1",
        "api_key": key or task["key"],
        "messages": [{"role": "user", "content": task["prompts"].get(model, "t1")}],
        "max_tokens": task["max_tokens"],
        "temperature": 0,
        "num_retries": 0,
        "max_retries": 0,
    }


def answers(task: dict[str, Any]) -> dict[str, dict[str, str]]:
    found = {}
    for model in task["prompts"]:
        asked = fields(task, model)
        streamed = litellm.completion(stream=True, **asked)
        found[model] = {
            "chat": litellm.completion(**asked).choices[0].message.content,
            "chat, streamed": "".join(part.choices[0].delta.content or "" for part in streamed),
        }
    return found


def headers(task: dict[str, Any]) -> dict[str, Any]:
    answer = litellm.completion(**fields(task, task["model"]))
    return answer._hidden_params["additional_headers"]


def errors(task: dict[str, Any]) -> dict[str, Any]:
    def ask(model: str, key: str | None = None, **more: Any) -> dict[str, Any]:
        return outcome(lambda: litellm.completion(**fields(task, model, key) | more))

    model = task["model"]
    litellm.completion(**fields(task, model, task["hasty"]) | {"max_tokens": task["long_answer"]})
    return {
        "limit": ask(model, task["hasty"]),
        "wrong key": ask(model, "wrong"),
        "unknown model": ask("unknown"),
        "broken adapter": ask(task["broken"]),
    }


def retried(task: dict[str, Any]) -> dict[str, Any]:
    """Asks for an adapter that the server cannot give yet, with the retries of litellm's router."""
    model = task["model"]
    asked = fields(task, model) | {"messages": [{"role": "user", "content": task["prompt"]}]}
    once = outcome(lambda: litellm.completion(**asked))
    given = {key: asked.pop(key) for key in ("model", "api_base", "api_key")}
    router = litellm.Router([{"model_name": model, "litellm_params": given}], num_retries=2)
    answer = router.completion(**asked | {"model": model, "num_retries": 2})
    return {"once": once, "text": answer.choices[0].message.content}


main(answers, headers, errors, retried)
