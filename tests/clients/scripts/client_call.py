"""What the Python scripts share: a task on standard input, its result as JSON on the last line."""

import json
import sys
from collections.abc import Callable
from typing import Any


def main(*calls: Callable[[dict[str, Any]], Any]) -> None:
    """Does what the command line names."""
    [call] = [each for each in calls if each.__name__ == sys.argv[1]]
    print("\n" + json.dumps(call(json.load(sys.stdin))))


def outcome(call: Callable[[], Any]) -> dict[str, Any]:
    """What a client makes of a refusal."""
    try:
        call()
    except Exception as error:
        response = getattr(error, "response", None)
        headers = {} if response is None else dict(response.headers)
        return {
            "class": type(error).__name__,
            "kinds": [each.__name__ for each in type(error).__mro__],
            "status": getattr(error, "status_code", None),
            "request_id": getattr(error, "request_id", None),
            "headers": {name.lower(): value for name, value in headers.items()},
            "message": str(error),
        }
    return {"class": None}


def noting(library: Any, statuses: list[int], timeout_s: float = 60.0) -> Any:
    """What a package sends its requests with: a client of `httpx` that notes each status."""
    hooks = {"response": [lambda response: statuses.append(response.status_code)]}
    return library.Client(event_hooks=hooks, timeout=timeout_s)


def retried(task: dict[str, Any], ask: Callable[[int, int, list[int]], str]) -> dict[str, Any]:
    """Asks for what the server cannot give yet: without retries, then with the package's own.

    Args:
        task: The task.
        ask: Asks for so many tokens with so many retries, notes statuses, returns the answer's
            text.
    """
    statuses: list[int] = []
    if task["spends"]:
        ask(task["long_answer"], 0, [])
    once = outcome(lambda: ask(task["max_tokens"], 0, []))
    text = ask(task["max_tokens"], 2, statuses)
    return {"once": once, "text": text, "statuses": statuses}
