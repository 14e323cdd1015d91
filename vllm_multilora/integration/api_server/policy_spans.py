"""Which version of its adapter each token of an answer is of, in the form of ART's protocol.

Requests go on with other weights if an adapter is swapped in flight. A span is an interval of
tokens that one version has computed, half open. `policy_token_spans` are those of the answer.
`prompt_policy_token_spans` are those of the prompt, whose first token nothing predicts.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from vllm_multilora.integration.attached import Attached
from vllm_multilora.integration.engine.requests.weight_versions import (
    VersionPart,
    parts_in,
    version_in,
)

Span = dict[str, Any]

FIELD, PROMPT_FIELD = "policy_token_spans", "prompt_policy_token_spans"

VERSIONS: Attached[VersionsInUse] = Attached("versions-in-use")
"""The versions that a `RequestState` has had."""

_OF_PARENT: Attached[dict[int, Any]] = Attached("states")
"""The states of a `ParentRequest` that tell their versions, by their choices."""

_SHOWN_DIGITS = 16


@dataclass
class VersionsInUse:
    """The versions of one answer, each with the number of tokens before its first.

    Attributes:
        first: The digest of the first one.
        starts: All of them; empty where requests end on their first one.
    """

    first: str | None = None
    starts: list[tuple[int, VersionPart]] = field(default_factory=list)

    def take(self, headers: Mapping[str, str] | None, tokens: int) -> None:
        """Takes in what an output tells, before its tokens are added."""
        parts = parts_in(headers)
        if self.first is None:
            self.first = version_in(headers)
        elif parts and not self.starts:  # the adapter is swapped in flight for the first time
            before = VersionPart(self.first, parts[0].update - 1, 0)
            self.starts.append((0, before))
        self.starts += ((tokens, part) for part in parts)


def note(outputs: Iterable[Any], states: Mapping[str, Any]) -> list[Any]:
    """Takes in what a step's outputs tell of versions; returns the states with more than one."""
    told = []
    for output in outputs:
        if (state := states.get(output.request_id)) is None or state.detokenizer is None:
            continue
        if output.trace_headers is not None:
            versions = VERSIONS.get_or_make(state, VersionsInUse)
            versions.take(output.trace_headers, state.detokenizer.num_output_tokens())
            if versions.starts and state.parent_req is not None:
                _OF_PARENT.get_or_make(state.parent_req, dict)[state.request_index] = state
        if (known := VERSIONS.get(state)) is not None and known.starts:
            told.append(state)
    return told


def tell(states: Iterable[Any], request_outputs: Iterable[Any]) -> None:
    """Puts the spans so far into the outputs that are ready for requests' readers."""
    ready = {output.request_id: output for output in request_outputs}
    for state in states:
        owner, of_parent = state.parent_req or state, {state.request_index: state}
        if state.parent_req is not None:
            of_parent = _OF_PARENT.get_or_make(state.parent_req, dict)
        output = ready.get(owner.external_req_id) if state.queue is None else state.queue.output
        for completion in getattr(output, "outputs", ()):
            if (of_choice := of_parent.get(completion.index)) is not None:
                for name, spans in fields_of(of_choice).items():
                    setattr(completion, name, spans)


def fields_of(state: Any) -> dict[str, list[Span]]:
    """The spans of a `RequestState`, by their field in an answer."""
    starts = (VERSIONS.get(state) or VersionsInUse()).starts
    lora, tokens = state.lora_request, state.detokenizer.num_output_tokens()
    slot = "" if lora is None else lora.lora_name
    prompt = [(part.computed + 1, part) for _, part in starts]
    return {
        PROMPT_FIELD: list(_spans(prompt, state.prompt_len, slot)),
        FIELD: list(_spans(starts, tokens, slot)),
    }


def _spans(starts: list[tuple[int, VersionPart]], end: int, slot: str) -> Iterator[Span]:
    """The spans of versions that begin at these tokens, those without any left out."""
    last: Span | None = None
    for (start, part), (until, _) in zip(starts, [*starts[1:], (end, None)], strict=True):
        if start >= (until := min(until, end)):
            continue
        identity = (part.digest[:_SHOWN_DIGITS], part.update)
        if last is not None and (last["generation_id"], last["update_seq"]) == identity:
            last["end_token"] = until
            continue
        if last is not None:
            yield last
        last = {
            "start_token": start,
            "end_token": until,
            "generation_id": identity[0],
            "policy_version": part.update,
            "lora_slot": slot,
            "update_seq": part.update,
        }
    if last is not None:
        yield last
