"""How a failed load reaches the clients whose requests it fails, and no others.

The engine core ends the request with vLLM's own finish reason for errors. The reason travels as the
output's stop reason, which vLLM passes on unread. The process that answers takes it out again: as
an HTTP status and message in a server, as finish reason and text for `LLM.generate` (see
`api_server/failure_delivery.py`).
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from http import HTTPStatus
from typing import TYPE_CHECKING, Any

from vllm.exceptions import GracefulHTTPError

from vllm_multilora.adapters.problems import shown, shown_name
from vllm_multilora.errors import MultiLoRAError
from vllm_multilora.failures import FailureKind, LoadFailure, RequestFailure
from vllm_multilora.integration.blends import blend_of
from vllm_multilora.wording import counted

if TYPE_CHECKING:
    from vllm.lora.request import LoRARequest

_PREFIX, _REQUESTS = "multilora-load-failure:", "multilora-request-failure:"
_UNINVOKED = "multilora-uninvoked:"

_MAX_LOGGED = 1000
"""Characters of a reason that are logged."""

STATUS = {
    FailureKind.GONE: HTTPStatus.NOT_FOUND,
    FailureKind.INVALID: HTTPStatus.BAD_REQUEST,
    FailureKind.UNREADABLE: HTTPStatus.SERVICE_UNAVAILABLE,
    FailureKind.NO_MEMORY: HTTPStatus.SERVICE_UNAVAILABLE,
    FailureKind.TIMEOUT: HTTPStatus.SERVICE_UNAVAILABLE,
    FailureKind.QUARANTINED: HTTPStatus.BAD_REQUEST,
    FailureKind.CONFLICT: HTTPStatus.CONFLICT,
    FailureKind.INTERNAL: HTTPStatus.INTERNAL_SERVER_ERROR,
}


def to_stop_reason(failure: LoadFailure, adapter: LoRARequest) -> str:
    """A failure as the text that travels with a request's last output.

    Files are named without the adapter's folder, which is the operator's affair: vLLM takes paths
    out of what it tells clients, file names and all.
    """
    message = without_folder(failure.message, adapter)
    what = "is" if failure.kind is FailureKind.QUARANTINED else "could not be loaded:"
    prefix = _REQUESTS if isinstance(failure, RequestFailure) else _PREFIX
    return _stop_reason(prefix, failure.kind, f"adapter {adapter.lora_name!r} {what} {message}")


def unloaded_stop_reason(adapter: LoRARequest, limit_s: float) -> str:
    """The text of a request that had not ended when its adapter had to go."""
    return _stop_reason(
        _REQUESTS,
        FailureKind.GONE,
        f"adapter {adapter.lora_name!r} was unloaded, and this request did not end within the "
        f"{limit_s:g} s that running requests have then (--multilora-unload-timeout-s)",
    )


def replaced_stop_reason(adapter: LoRARequest) -> str:
    """The text of a request that cannot go on with what its adapter has become meanwhile."""
    return _stop_reason(
        _REQUESTS,
        FailureKind.UNREADABLE,
        f"adapter {adapter.lora_name!r} was reloaded while this request waited to go on with what "
        "the version before had computed; send it again",
    )


def unsealed_stop_reason() -> str:
    """The text of a request to a server with tenants that did not come through the gateway."""
    return _stop_reason(
        _REQUESTS,
        FailureKind.INVALID,
        "this server has tenants and answers HTTP calls to known routes only; this request came "
        "another way",
    )


def uninvoked_stop_reason(adapter: LoRARequest, tokens: Sequence[int]) -> str:
    """What travels with a request whose prompt lacks the tokens that activate its adapter."""
    return f"{_UNINVOKED}{json.dumps([adapter.lora_name, *tokens])}"


def _stop_reason(prefix: str, kind: FailureKind, message: str) -> str:
    """What `from_stop_reason` reads."""
    return f"{prefix}{kind.value}:{message}"


def without_folder(text: str, adapter: LoRARequest) -> str:
    """A text with the files of an adapter's folder named alone, the folders of a blend by part."""
    blend = blend_of(adapter)
    if blend is None:
        return text.replace(f"{adapter.lora_path.rstrip('/')}/", "")
    names = {part.path.rstrip("/"): part.name for part in blend.parts}
    folders = "|".join(map(re.escape, sorted(names, key=len, reverse=True)))
    return re.sub(rf"({folders})(?![\w.-])", lambda found: names[found[1]], text)


HIDDEN = "<path>"
"""Stands for a folder in what clients are told, as it does in vLLM's own messages."""


def without_folders(text: str, folders: Sequence[str]) -> str:
    """A text in which folders, and the beginnings of what lies below them, are not named."""
    for folder in sorted({path.rstrip("/") for path in folders}, key=len, reverse=True):
        if folder:
            text = text.replace(folder, HIDDEN)
    return text


def from_stop_reason(stop_reason: Any, tokenizer: Any = None) -> LoadFailure | None:
    """The failure in a stop reason; None if it is another kind of stop."""
    if not isinstance(stop_reason, str):
        return None
    if stop_reason.startswith(_UNINVOKED):
        name, *tokens = json.loads(stop_reason.removeprefix(_UNINVOKED))
        return uninvoked(name, tokens, tokenizer)
    if not stop_reason.startswith((_PREFIX, _REQUESTS)):
        return None
    prefix, kind, message = stop_reason.split(":", 2)
    made = RequestFailure if f"{prefix}:" == _REQUESTS else LoadFailure
    return made(FailureKind(kind), message)


def uninvoked(name: str, invocation: Sequence[int], tokenizer: Any) -> RequestFailure:
    """The failure of a request whose prompt does not activate its adapter."""
    tokens, text = list(invocation), ""
    if tokenizer is not None:
        # Tokenizers may know fewer ids than the model has room for, and some raise for the rest.
        with suppress(Exception):
            text = f" ({shown(tokenizer.decode(tokens))})"
    message = (
        f"adapter {name!r} is activated by the tokens {tokens}{text}, which the prompt does not "
        "contain: put them where the adapter is to begin"
    )
    return RequestFailure(FailureKind.INVALID, message)


class RefusalsInOneLine(logging.Filter):
    """Shortens what vLLM logs of a refused adapter or request: a traceback, and all that it holds.

    Clients may have adapters refused as often as they like, and streams fail for those.
    """

    def filter(self, record: logging.LogRecord) -> bool:
        error = record.exc_info[1] if record.exc_info else None
        if isinstance(error, AdapterRefusedError):
            record.msg, record.args = "Adapter refused: %s", (error.in_one_line(),)
        elif type(error) is GracefulHTTPError:  # of vLLM's own errors each has a class of its own
            reason = shown_name(error.message, _MAX_LOGGED)
            record.msg, record.args = "Request failed: %s", (reason,)
        else:
            return True
        record.exc_info, record.exc_text = None, None
        record.levelno, record.levelname = logging.WARNING, "WARNING"
        return True


class AdapterRefusedError(MultiLoRAError):
    """An adapter cannot be served; says all that is wrong, for people and for programs."""

    def __init__(
        self, adapter_id: int, failure: LoadFailure, problems: list[dict[str, Any]]
    ) -> None:
        super().__init__(adapter_id, failure, problems)
        self.adapter_id = adapter_id
        self.failure = failure
        self.problems = problems

    def in_one_line(self) -> str:
        """The first problem, shortened, and how many more there are."""
        first = self.problems[0]["message"] if self.problems else self.failure.message
        more = len(self.problems) - 1
        others = f" (and {counted(more, 'more problem')})" if more > 0 else ""
        return shown_name(first, _MAX_LOGGED) + others

    def __str__(self) -> str:
        messages = [
            f"{problem['message']}; {problem['hint']}" if problem["hint"] else problem["message"]
            for problem in self.problems
        ]
        return "\n".join(messages or [self.failure.message])

    def as_dict(self) -> dict[str, Any]:
        """What `of_dict` makes an equal one of; of plain values, as vLLM sends no others."""
        return {"kind": self.failure.kind.value, "message": str(self), "problems": self.problems}

    @classmethod
    def of_dict(cls, adapter_id: int, sent: Mapping[str, Any]) -> AdapterRefusedError:
        failure = LoadFailure(FailureKind(sent["kind"]), sent["message"])
        return cls(adapter_id, failure, sent["problems"])


def not_by_workers(verb: str) -> MultiLoRAError:
    """The error of a worker that is called to `add`, `remove` or `pin` an adapter."""
    return MultiLoRAError(
        f"workers {verb} no LoRA adapters with vllm-multilora: call {verb}_lora of the engine "
        f"(AsyncLLM, or LLM(...).llm_engine), with the path of an adapter's folder. They take "
        f"adapters that come as tensors: in a request with the fields lora_tensors and "
        f"peft_config. Or leave adapters to vLLM: --no-multilora, or "
        f'additional_config={{"multilora": {{"enabled": False}}}}'
    )
