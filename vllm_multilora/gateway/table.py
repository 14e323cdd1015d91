"""What tenants may ask: the routes, and the fields that the body of each may have.

This is data. A route that is not in `TENANT_ROUTES` is refused to tenants, and so is a field that a
route does not list: what a new vLLM adds is closed until somebody has looked at it and written it
here. Everybody else may ask whatever vLLM answers.

Why something is left out: it has others' requests wait or the engine end (`bad_words`,
`allowed_token_ids`, `repetition_detection`, `use_beam_search`, `prompt_logprobs`,
`/generative_scoring`), reaches past the prompt (`prompt_embeds`, `kv_transfer_params`,
`vllm_xargs`, `mm_payload`, `chat_template`), or is meant for an operator's own components
(`/inference/v1/generate`, `/render`, `/derender`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from vllm_multilora.tenants.tenant import GRAMMARS, MEDIA


def _words(*texts: str) -> frozenset[str]:
    return frozenset(word for text in texts for word in text.split())


@dataclass(frozen=True)
class Gated:
    """A field that needs a word in the tenant's `allow`.

    Attributes:
        word: The word; None where no tenant may use the field.
        is_harmless: Whether a value, besides None, asks for nothing and so needs no word.
        written: What the gateway writes for tenants without the word that leave the field out; None
            for nothing.
    """

    word: str | None
    is_harmless: Callable[[Any], bool] = lambda value: False
    written: Any = None


@dataclass(frozen=True)
class Route:
    """A route that tenants may call.

    Attributes:
        plain: Fields whose texts are short: settings, names, stop texts.
        contents: Fields with prompts and messages. Texts in them may be long; objects in them have
            the keys and types of text alone, unless the tenant may send media.
        documents: Fields with any JSON for the chat template. Texts in them may be long.
        gated: Fields that need a word.
        word: The word that the route itself needs; None for none.
        is_form: Whether the body is a form, which is passed on unread, and not JSON.
        is_decoding: Whether it makes text of tokens, each of which costs more than to read it.
        is_of_any_kind: Whether vLLM tries the body as each kind of request in turn.
    """

    plain: frozenset[str] = frozenset()
    contents: frozenset[str] = frozenset()
    documents: frozenset[str] = frozenset()
    gated: Mapping[str, Gated] = field(default_factory=dict)
    word: str | None = None
    is_form: bool = False
    is_decoding: bool = False
    is_of_any_kind: bool = False

    @cached_property
    def known(self) -> frozenset[str]:
        return self.plain | self.contents | self.documents | self.gated.keys()


def _is_text_format(value: Any) -> bool:
    return bool(value == {"type": "text"})


def _has_no_format(value: Any) -> bool:
    """Whether a setting of `/v1/responses` or `/v1/messages` leaves the answer's form open."""
    if not isinstance(value, dict):
        return False
    return value.get("format") is None or _is_text_format(value["format"])


_NAMED = _words("model lora_blend user metadata priority request_id cache_salt")
_SAMPLING = _NAMED | _words(
    "temperature top_p top_k min_p seed stop stream stream_options n max_tokens",
    "presence_penalty frequency_penalty repetition_penalty length_penalty logit_bias",
    "stop_token_ids include_stop_str_in_output ignore_eos min_tokens skip_special_tokens",
    "spaces_between_special_tokens add_special_tokens truncate_prompt_tokens truncation_side",
    "logprobs echo return_token_ids return_tokens_as_token_ids return_token_offsets",
    "thinking_token_budget stream_interval watermarking session_id",
)
_CHAT = _SAMPLING | _words(
    "top_logprobs max_completion_tokens reasoning_effort include_reasoning parallel_tool_calls",
    "add_generation_prompt continue_final_message chat_template_kwargs",
    "service_tier safety_identifier prompt_cache_key verbosity store",
)
_POOLING = _NAMED | _words(
    "encoding_format embed_dtype endianness dimensions use_activation add_special_tokens padding",
    "truncate_prompt_tokens truncation_side add_generation_prompt continue_final_message",
    "chat_template_kwargs task",
)
_SCORING = _POOLING | _words("max_tokens_per_query max_tokens_per_doc top_n")

_OUTPUT_FORMS: dict[str, Gated] = {
    "response_format": Gated(GRAMMARS, _is_text_format),
    "structured_outputs": Gated(GRAMMARS),
}
_TOOLS: dict[str, Gated] = {
    "tools": Gated(GRAMMARS, lambda value: value == []),
    "tool_choice": Gated(GRAMMARS, lambda value: value in ("none", "auto", {"type": "auto"})),
}
_STORED: dict[str, Gated] = {
    "store": Gated(None, lambda value: value is False, written=False),
    "background": Gated(None, lambda value: value is False),
    "previous_response_id": Gated(None),
}

_COMPLETIONS = Route(_SAMPLING, contents=_words("prompt suffix"), gated=_OUTPUT_FORMS)
_CHATS = Route(
    _CHAT,
    contents=_words("messages"),
    documents=_words("documents"),
    gated={**_OUTPUT_FORMS, **_TOOLS},
)
_EMBEDDINGS = Route(_POOLING, contents=_words("input messages"))
_SCORES = Route(
    _SCORING,
    contents=_words("data_1 data_2 text_1 text_2 queries query items documents instruction"),
)

TENANT_ROUTES: Mapping[str, Route] = {
    "/v1/completions": _COMPLETIONS,
    "/v1/chat/completions": _CHATS,
    "/v1/chat/completions/batch": _CHATS,
    "/v1/responses": Route(
        _SAMPLING - _words("request_id")
        | _words(
            "include max_output_tokens max_tool_calls parallel_tool_calls reasoning",
            "include_reasoning service_tier top_logprobs truncation prompt_cache_key",
            "safety_identifier chat_template_kwargs",
        ),
        contents=_words("input instructions"),
        gated={
            "text": Gated(GRAMMARS, _has_no_format),
            "structured_outputs": Gated(GRAMMARS),
            **_TOOLS,
            **_STORED,
        },
    ),
    "/v1/messages": Route(
        _NAMED
        | _words(
            "max_tokens stop_sequences stream temperature top_k top_p thinking watermarking",
            "chat_template_kwargs service_tier",
        ),
        contents=_words("messages system"),
        gated={"output_config": Gated(GRAMMARS, _has_no_format), **_TOOLS},
    ),
    "/v1/messages/count_tokens": Route(
        _NAMED | _words("thinking chat_template_kwargs"),
        contents=_words("messages system"),
        gated={"output_config": Gated(GRAMMARS, _has_no_format), **_TOOLS},
    ),
    "/cohere/v2/chat": Route(
        _words("model lora_blend stream citation_options safety_mode max_tokens stop_sequences")
        | _words("temperature seed frequency_penalty presence_penalty k p logprobs thinking")
        | _words("priority watermarking chat_template_kwargs strict_tools"),
        contents=_words("messages"),
        documents=_words("documents"),
        gated={**_OUTPUT_FORMS, "tools": _TOOLS["tools"], "tool_choice": _TOOLS["tool_choice"]},
    ),
    "/v1/embeddings": _EMBEDDINGS,
    "/pooling": _EMBEDDINGS,
    "/classify": _EMBEDDINGS,
    "/v2/embed": Route(
        _words("model lora_blend input_type output_dimension embedding_types truncate max_tokens")
        | _words("priority"),
        contents=_words("texts inputs"),
        gated={"images": Gated(MEDIA)},
    ),
    "/score": _SCORES,
    "/v1/score": _SCORES,
    "/rerank": _SCORES,
    "/v1/rerank": _SCORES,
    "/v2/rerank": _SCORES,
    "/tokenize": Route(
        _NAMED
        | _words("add_special_tokens return_token_strs add_generation_prompt")
        | _words("continue_final_message chat_template_kwargs"),
        contents=_words("prompt messages"),
        gated=_TOOLS,
    ),
    "/detokenize": Route(_NAMED | _words("tokens"), is_decoding=True),
    "/invocations": Route(
        _CHAT | _SCORING,
        contents=_COMPLETIONS.contents | _CHATS.contents | _EMBEDDINGS.contents | _SCORES.contents,
        gated={**_OUTPUT_FORMS, **_TOOLS},
        is_of_any_kind=True,
    ),
    "/v1/audio/transcriptions": Route(word=MEDIA, is_form=True),
    "/v1/audio/translations": Route(word=MEDIA, is_form=True),
}
"""Paths that tenants may POST to."""

MAX_ITEMS: Mapping[str, int] = {
    **dict.fromkeys(_words("stop stop_sequences stop_token_ids"), 64),
    "logit_bias": 1_024,
}
"""Items that a field may have. Those that end an answer are looked for after each token; with more
tokens to favour, vLLM's second model runner ends its engine."""

_LONG = _words("seed priority top_k k min_tokens thinking_token_budget stream_interval")
MAX_NUMBERS: Mapping[str, int] = {
    "n": 2_048,
    **dict.fromkeys(_words("max_tokens max_completion_tokens max_output_tokens"), 1 << 30),
    **dict.fromkeys(_LONG, (1 << 63) - 1),
}
"""The largest value that a field may have. Engines end at what their 32 or 64 bits do not hold."""

MESSAGE_KEYS = _words(
    "role content name type text id call_id tool_call_id tool_use_id tool_calls function",
    "arguments input output is_error thinking signature closed data reasoning reasoning_content",
    "refusal status summary encrypted_content annotations logprobs cache_control citations",
    "tool_name tool_plan task document phase",
)
"""Keys that objects in messages, inputs and texts may have."""

MESSAGE_TYPES = _words(
    "text input_text output_text refusal thinking redacted_thinking tool_use tool_result",
    "tool_reference message function function_call function_call_output reasoning reasoning_text",
    "summary_text document",
)
"""Values that `type` may have there."""

FREE_KEYS = _words(
    "arguments input annotations logprobs cache_control citations document tools definition"
)
"""Keys whose values are any JSON: a tool, what it was called with, and what goes with a text."""

LONG_KEYS = FREE_KEYS | _words(
    "content text output thinking signature data reasoning reasoning_content refusal summary",
    "encrypted_content tool_plan url image_url audio_url video_url",
)
"""Keys whose texts may be long."""

MEDIA_KEYS = _words("image_url audio_url video_url input_audio source url detail format media_type")
"""Keys that objects may have besides where a tenant may send media.

No `uuid`: vLLM would take the image that anybody has sent with it.
"""

MEDIA_TYPES = _words("image image_url input_image audio_url input_audio video_url base64 url")

URL_KEYS = _words("image_url audio_url video_url url images")
"""Keys whose texts must be `data:` URLs."""

GRAMMAR_KEYS = _words("tools tool definition input_schema description parameters strict")
"""Keys that objects may have besides where a tenant may send tools: messages that add some."""

GRAMMAR_TYPES = _words("tool_addition tool_removal tool_definition")
