"""langchain-openai's calls."""

from typing import Any

from client_call import main, outcome
from langchain_openai import ChatOpenAI


def chat(task: dict[str, Any], model: str, key: str | None = None, **more: Any) -> ChatOpenAI:
    return ChatOpenAI(
        model=model,
        base_url=f"{task['url']}/v1",
        api_key=key or task["key"],
        temperature=0,
        include_response_headers=True,
        **{"max_tokens": task["max_tokens"], "max_retries": 0, **more},
    )


def answers(task: dict[str, Any]) -> dict[str, dict[str, str]]:
    return {
        model: {
            "chat": chat(task, model).invoke(prompt).content,
            "chat, streamed": "".join(part.content for part in chat(task, model).stream(prompt)),
        }
        for model, prompt in task["prompts"].items()
    }


def headers(task: dict[str, Any]) -> dict[str, Any]:
    return chat(task, task["model"]).invoke("t1").response_metadata["headers"]


def errors(task: dict[str, Any]) -> dict[str, Any]:
    def ask(model: str, key: str | None = None) -> dict[str, Any]:
        return outcome(lambda: chat(task, model, key).invoke(task["prompts"][task["model"]]))

    model = task["model"]
    chat(task, model, task["hasty"], max_tokens=task["long_answer"]).invoke(task["prompts"][model])
    return {
        "limit": ask(model, task["hasty"]),
        "wrong key": ask(model, "wrong"),
        "unknown model": ask("unknown"),
        "broken adapter": ask(task["broken"]),
    }


def retried(task: dict[str, Any]) -> dict[str, Any]:
    """Asks for an adapter that the server cannot give yet, with the package's own retries."""
    once = outcome(lambda: chat(task, task["model"]).invoke(task["prompt"]))
    answer = chat(task, task["model"], max_retries=2).invoke(task["prompt"])
    return {"once": once, "text": answer.content}


main(answers, headers, errors, retried)
