"""How a failed load reaches the clients whose requests it fails, and no others.

The engine core ends the request with vLLM's own finish reason for errors. The reason travels as the
output's stop reason, which vLLM passes on unread. The process that answers takes it out again: as
an HTTP status and message in a server, as finish reason and text for `LLM.generate`.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from http import HTTPStatus
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from vllm import outputs
from vllm.entrypoints.generate.beam_search.utils import BeamSearchSequence
from vllm.exceptions import GracefulHTTPError
from vllm.v1.engine import FinishReason

from vllm_multilora.adapters.problems import shown, shown_name
from vllm_multilora.errors import MultiLoRAError
from vllm_multilora.failures import FailureKind, LoadFailure, RequestFailure
from vllm_multilora.integration.attached import HIDDEN_FOLDERS, ON_FAILURE
from vllm_multilora.integration.blends import blend_of
from vllm_multilora.wording import counted

if TYPE_CHECKING:
    from vllm.lora.request import LoRARequest

_PREFIX, _REQUESTS = "multilora-load-failure:", "multilora-request-failure:"
_UNINVOKED = "multilora-uninvoked:"

_MOST_LOGGED = 1000
"""Characters of a reason that are logged."""

REFUSAL_MARK = "\nmultilora-refused:"
"""Separates a refusal's sentences from its fields."""

STATUS = {
    FailureKind.GONE: HTTPStatus.NOT_FOUND,
    FailureKind.INVALID: HTTPStatus.BAD_REQUEST,
    FailureKind.UNREADABLE: HTTPStatus.SERVICE_UNAVAILABLE,
    FailureKind.NO_MEMORY: HTTPStatus.SERVICE_UNAVAILABLE,
    FailureKind.TIMEOUT: HTTPStatus.SERVICE_UNAVAILABLE,
    FailureKind.QUARANTINED: HTTPStatus.BAD_REQUEST,
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


def slow_grammar_stop_reason() -> str:
    """The text of a request that nobody is to wait for any longer."""
    return _stop_reason(
        _REQUESTS,
        FailureKind.INVALID,
        "the structured output takes too long to compute: ask for a simpler schema, regular "
        "expression or grammar",
    )


def uninvoked_stop_reason(adapter: LoRARequest, tokens: Sequence[int]) -> str:
    """What travels with a request whose prompt lacks the tokens that activate its adapter."""
    return f"{_UNINVOKED}{json.dumps([adapter.lora_name, *tokens])}"


def _uninvoked(stop_reason: Any, tokenizer: Any) -> RequestFailure | None:
    """The failure in such a stop reason, with the tokens' text where there is a tokenizer."""
    if not isinstance(stop_reason, str) or not stop_reason.startswith(_UNINVOKED):
        return None
    name, *tokens = json.loads(stop_reason.removeprefix(_UNINVOKED))
    text = ""
    if tokenizer is not None:
        # Tokenizers may know fewer ids than the model has room for, and some raise for the rest.
        with suppress(Exception):
            text = f" ({shown(tokenizer.decode(tokens))})"
    message = (
        f"adapter {name!r} is activated by the tokens {tokens}{text}, which the prompt does not "
        "contain: put them where the adapter is to begin"
    )
    return RequestFailure(FailureKind.INVALID, message)


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


def from_stop_reason(stop_reason: Any) -> LoadFailure | None:
    """The failure in a stop reason; None if it is another kind of stop."""
    if not isinstance(stop_reason, str) or not stop_reason.startswith((_PREFIX, _REQUESTS)):
        return None
    prefix, kind, message = stop_reason.split(":", 2)
    made = RequestFailure if f"{prefix}:" == _REQUESTS else LoadFailure
    return made(FailureKind(kind), message)


def http_error(failure: LoadFailure) -> GracefulHTTPError:
    """What a server answers: 404 gone, 400 invalid, 503 where a later try may help."""
    return GracefulHTTPError(failure.message, STATUS[failure.kind])


def deliver_failures(
    engine_core_outputs: list[Any],
    request_states: dict[str, Any],
    on_failure: Callable[[LoRARequest, LoadFailure], None] | None = None,
    tokenizer: Any = None,
) -> dict[str, LoadFailure]:
    """Turns failures among a step's outputs into what their requests' readers understand.

    Args:
        engine_core_outputs: As the engine core sent them; stop reasons become plain text.
        request_states: vLLM's request states by internal request id.
        on_failure: Is told of every request with an adapter that has failed: which, and why.
        tokenizer: The model's; None where there is none.

    Returns:
        The failures of requests to `LLM`, by the ids of vLLM's answers to them: see `mark_failed`.
    """
    unmarked = {}
    for output in engine_core_outputs:
        if output.finish_reason is not FinishReason.ERROR:
            continue
        failure = from_stop_reason(output.stop_reason) or _uninvoked(output.stop_reason, tokenizer)
        if failure is None:
            continue
        state = request_states.get(output.request_id)
        if state is not None:
            folders = HIDDEN_FOLDERS.get(state) or ()
            failure = replace(failure, message=without_folders(failure.message, folders))
        output.stop_reason = failure.message
        if state is None:
            continue
        if on_failure is not None and state.lora_request is not None:
            on_failure(state.lora_request, failure)
        if state.detokenizer is None:
            # A pooling request. Without a result vLLM takes it for one that generates; then its
            # output task ends, and the whole server with it. Aborted ones get an empty one, too.
            output.pooling_output = torch.empty(0)
        state.streaming_input = False  # vLLM would keep it for as long as more input may come
        if state.queue is not None:
            # An exception in the queue is what the reader gets, before any output.
            state.queue.put(http_error(failure))
        else:
            unmarked[state.external_req_id] = failure
    return unmarked


def mark_failed(request_outputs: list[Any], failures: dict[str, LoadFailure]) -> None:
    """Completes the answers to failed requests to `LLM`.

    Those of `LLM.generate` have said why by their finish and stop reasons. Those of `LLM.embed` and
    the like, which are empty, have nothing of that kind.

    Args:
        request_outputs: vLLM's answers of a step.
        failures: By the ids of the answers; see `deliver_failures`.
    """
    for output in request_outputs if failures else ():
        failure = failures.get(output.request_id)
        if failure is None:
            continue
        if isinstance(output, outputs.RequestOutput):
            for completion in output.outputs:
                # vLLM's beam search looks at the first token of any that has a list of them.
                completion.logprobs = completion.logprobs or None
        else:
            # vLLM 0.31 has neither the class nor the field.
            make_error: Any = getattr(outputs, "RequestError", SimpleNamespace)
            output.error = make_error(code=failure.kind.value, message=failure.message)


def offline_answer(original: Callable[..., Any], request_output: Any) -> Any:
    """Offline: what `LLM.embed`, `classify` or `score` returns for one request.

    Of a failed one, in vLLM 0.31, as later versions have it: no numbers or a score of 0, and an
    `error`, which answers to others lack there.
    """
    error = getattr(request_output, "error", None)
    if error is None or hasattr(outputs, "RequestError"):
        return original(request_output)
    is_score = original.__qualname__.startswith("ScoringRequestOutput")
    answer = original(
        SimpleNamespace(
            **vars(request_output)
            | {"outputs": outputs.PoolingOutput(torch.zeros(() if is_score else 0))}
        )
    )
    answer.error = error
    return answer


def beam_search(
    original: Callable[..., Any],
    llm: Any,
    prompts: Sequence[Any],
    params: Any,
    lora_request: Any = None,
    *args: Any,
    **kwargs: Any,
) -> Any:
    """Offline: a search that an adapter has failed ends with a sequence that says so."""
    failures: dict[int, LoadFailure] = {}

    def note(lora: LoRARequest, failure: LoadFailure) -> None:
        failures[lora.lora_int_id] = failure

    processor = llm.llm_engine.output_processor
    ON_FAILURE.set(processor, note)
    try:
        searches = original(llm, prompts, params, lora_request, *args, **kwargs)
    finally:
        ON_FAILURE.set(processor, None)
    if failures:
        are_many = isinstance(lora_request, Sequence)
        loras = lora_request if are_many else [lora_request] * len(searches)
        for prompt, lora, search in zip(prompts, loras, searches, strict=True):
            failure = None if lora is None else failures.get(lora.lora_int_id)
            if failure is not None and len(search.sequences) < params.beam_width:
                failed = BeamSearchSequence(
                    prompt, [], [], lora, finish_reason="error", stop_reason=failure.message
                )
                search.sequences.append(failed)
    return searches


class RefusalsInOneLine(logging.Filter):
    """Shortens what vLLM logs of a refused adapter or request: a traceback, and all that it holds.

    Clients may have adapters refused as often as they like, and streams fail for those.
    """

    def filter(self, record: logging.LogRecord) -> bool:
        error = record.exc_info[1] if record.exc_info else None
        if isinstance(error, AdapterRefusedError):
            record.msg, record.args = "Adapter refused: %s", (error.in_one_line(),)
        elif type(error) is GracefulHTTPError:  # of vLLM's own errors each has a class of its own
            reason = shown_name(error.message, _MOST_LOGGED)
            record.msg, record.args = "Request failed: %s", (reason,)
        else:
            return True
        record.exc_info, record.exc_text = None, None
        record.levelno, record.levelname = logging.WARNING, "WARNING"
        return True


class AdapterRefusedError(MultiLoRAError):
    """An adapter cannot be served; says all that is wrong, for people and for programs.

    The text is all that reaches another process, so it carries the fields along at its end.

    Attributes:
        adapter_id: The adapter's number.
        failure: Why.
        problems: All that is wrong with its files, each as `Problem.as_dict`.
    """

    def __init__(
        self, adapter_id: int, failure: LoadFailure, problems: list[dict[str, Any]]
    ) -> None:
        super().__init__(adapter_id, failure, problems)
        self.adapter_id = adapter_id
        self.failure = failure
        self.problems = problems
        self._fields = json.dumps({"kind": failure.kind.value, "problems": problems})

    def in_one_line(self) -> str:
        """The first problem, shortened, and how many more there are."""
        first = self.problems[0]["message"] if self.problems else self.failure.message
        more = len(self.problems) - 1
        others = f" (and {counted(more, 'more problem')})" if more > 0 else ""
        return shown_name(first, _MOST_LOGGED) + others

    def __str__(self) -> str:
        messages = [
            f"{problem['message']}; {problem['hint']}" if problem["hint"] else problem["message"]
            for problem in self.problems
        ]
        return "\n".join(messages or [self.failure.message]) + REFUSAL_MARK + self._fields
