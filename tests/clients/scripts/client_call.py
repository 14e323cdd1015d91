"""What the Python scripts share: a task on standard input, its result as JSON on the last line."""

import json
import sys
from collections.abc import Callable, Mapping
from typing import Any


def main(calls: Mapping[str, Callable[[dict[str, Any]], Any]]) -> None:
    """Does what the command line names."""
    print("\n" + json.dumps(calls[sys.argv[1]](json.load(sys.stdin))))


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
