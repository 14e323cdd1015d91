"""Which version of its adapter each token of an answer is of, in the form of ART's protocol.

Requests go on with other weights where an adapter is swapped in flight. A span is an interval of
tokens that one version has computed, half open: of the answer, and of the prompt, whose first token
nothing predicts.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from vllm_multilora.integration.attached import Attached
from vllm_multilora.integration.engine.requests.weight_versions import Part, parts_in, version_in

_FIRST: Attached[str] = Attached("first-version")
_STARTS: Attached[list[tuple[int, Part]]] = Attached("version-starts")
"""The versions of a `RequestState` that may have several, each with the tokens before its own."""
_CHOICES: Attached[dict[int, Any]] = Attached("choices")
"""Such states of a `ParentRequest`, by their choices."""

_SHOWN_DIGITS = 16


def note(outputs: Iterable[Any], states: Mapping[str, Any]) -> list[Any]:
    """Takes in what a step's outputs tell of versions; returns the states that may have several."""
    found = []
    for output in outputs:
        state, digest = states.get(output.request_id), version_in(output.trace_headers)
        if state is None or state.detokenizer is None:
            continue
        if digest is not None and (first := _FIRST.get(state)) is None:
            _FIRST.set(state, digest)
        if parts := parts_in(output.trace_headers):
            if not (starts := _STARTS.get_or_make(state, list)) and first is not None:
                starts.append((0, (first, parts[0][1] - 1, 0)))
            starts += ((state.detokenizer.num_output_tokens(), part) for part in parts)
            if state.parent_req is not None:
                _CHOICES.get_or_make(state.parent_req, dict)[state.request_index] = state
        if _STARTS.is_set(state):
            found.append(state)
    return found


def tell(states: Sequence[Any], request_outputs: Iterable[Any]) -> None:
    """Puts the spans so far into the outputs that are ready for requests' readers."""
    ready = {output.request_id: output for output in request_outputs} if states else {}
    for state in states:
        owner, choices = state, {state.request_index: state}
        if state.parent_req is not None:
            owner = state.parent_req
            choices = _CHOICES.get_or_make(owner, dict)
        output = ready.get(owner.external_req_id) if state.queue is None else state.queue.output
        for completion in getattr(output, "outputs", ()):
            if completion.index in choices:
                vars(completion).update(fields_of(choices[completion.index]))


def fields_of(state: Any) -> dict[str, list[dict[str, Any]]]:
    """The spans of a `RequestState`, by their field in an answer."""
    starts, name = _STARTS.get(state) or [], state.lora_request.lora_name
    prompt = [(part[2] + 1, part) for _, part in starts]
    prompt_spans = _spans(prompt, state.prompt_len, name)
    spans = _spans(starts, state.detokenizer.num_output_tokens(), name)
    return {"prompt_policy_token_spans": prompt_spans, "policy_token_spans": spans}


def _spans(starts: Sequence[tuple[int, Part]], end: int, name: str) -> list[dict[str, Any]]:
    """The spans of versions that begin at these tokens, those without any left out."""
    spans: list[dict[str, Any]] = []
    ends = [min(start, end) for start, _ in starts[1:]] + [end]
    for (start, (digest, update, _)), until in zip(starts, ends, strict=True):
        if spans and spans[-1]["update_seq"] == update:
            spans[-1]["end_token"] = max(spans[-1]["end_token"], until)
        elif start < until:
            span = {"start_token": start, "end_token": until, "lora_slot": name}
            span |= {"generation_id": digest[:_SHOWN_DIGITS], "policy_version": update}
            spans.append(span | {"update_seq": update})
    return spans
