"""The table of fields: what tenants may send, and what is said of the rest."""

import json

import pytest

from vllm_multilora.gateway.fields import MAX_SHORT_TEXT, FieldError, check_body
from vllm_multilora.gateway.table import TENANT_ROUTES
from vllm_multilora.tenants.tenant import ALLOWABLE

from .refused_routes import REFUSED_ROUTES

ALL = frozenset(ALLOWABLE)
CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
RESPONSES, MESSAGES, EMBED = "/v1/responses", "/v1/messages", "/v2/embed"
LONG = "a" * (MAX_SHORT_TEXT + 1)
PIXEL = "data:image/png;base64,iVBORw0KGgo="
SCHEMA = {"type": "object", "properties": {"a": {"type": "string", "description": LONG}}}
TOOL = {"type": "function", "function": {"name": "f", "description": LONG, "parameters": SCHEMA}}


def fault(path, body, allow=frozenset()):
    """What is said of a body, and of which field; None where it passes."""
    try:
        check_body(body, TENANT_ROUTES[path], allow)
    except FieldError as error:
        return str(error), error.param
    return None


def nested(levels):
    value = "a"
    for _ in range(levels):
        value = [value]
    return value


def says(role, content, **others):
    """A message."""
    return {"role": role, "content": content, **others}


def part(kind="text", **others):
    """A part of a message; a long text, unless it is said to be something else."""
    return {"type": kind, **(others or {"text": LONG})}


def message_with(found):
    return {"messages": [says("user", [part(text="a"), found])]}


CALL = part("function", id="1", function={"name": "f", "arguments": json.dumps({"url": LONG})})
TEXTS = {
    "prompt": (COMPLETIONS, {"model": "a", "prompt": LONG, "max_tokens": 1, "stop": ["b"]}),
    "tokens": (
        COMPLETIONS,
        {"prompt": [1, 2, 3], "logit_bias": {"5": 1.0}, "lora_blend": {"a": 1}},
    ),
    "prompts": (COMPLETIONS, {"prompt": [[1], [2]], "suffix": LONG, "metadata": {"task": "x"}}),
    "chat": (
        CHAT,
        {
            "messages": [
                says("system", LONG),
                says("user", [part()]),
                says("assistant", None, tool_calls=[CALL]),
                says("tool", LONG, tool_call_id="1"),
            ],
            "documents": [{"title": "a", "anything": LONG}],
            "chat_template_kwargs": {"enable_thinking": False},
            "response_format": {"type": "text"},
            "tools": None,
            "tool_choice": "none",
        },
    ),
    "batch": (f"{CHAT}/batch", {"messages": [[says("user", LONG)]]}),
    "response": (
        RESPONSES,
        {
            "input": [
                says("user", [part("input_text")]),
                says(
                    "assistant",
                    [part("output_text", text=LONG, annotations=[{"b": 1}])],
                    type="message",
                    id="m",
                    status="completed",
                ),
                part("function_call", call_id="1", name="f", arguments=LONG),
                part("function_call_output", call_id="1", output=LONG),
                part("reasoning", id="r", summary=[part("summary_text")]),
            ],
            "instructions": LONG,
            "text": {"format": {"type": "text"}, "verbosity": "low"},
            "reasoning": {"effort": "low"},
            "store": False,
            "background": False,
        },
    ),
    "anthropic": (
        MESSAGES,
        {
            "system": [part(text=LONG, cache_control={"type": "ephemeral"})],
            "messages": [
                says("user", LONG),
                says(
                    "assistant",
                    [
                        part("thinking", thinking=LONG, signature=LONG),
                        part("tool_use", id="1", name="f", input={"image": [LONG]}),
                    ],
                ),
                says("user", [part("tool_result", tool_use_id="1", content=[part()])]),
            ],
            "max_tokens": 1,
            "stop_sequences": ["a"],
            "output_config": {"effort": "low"},
        },
    ),
    "cohere": (
        "/cohere/v2/chat",
        {
            "messages": [says("user", "a")],
            "documents": [LONG, {"id": "1", "data": {"text": LONG}}],
            "k": 1,
            "p": 0.5,
        },
    ),
    "embeddings": ("/v1/embeddings", {"input": [LONG, "b"], "encoding_format": "base64"}),
    "cohere-embed": (EMBED, {"texts": [LONG], "input_type": "query"}),
    "score": ("/score", {"text_1": LONG, "text_2": [LONG], "truncate_prompt_tokens": 1}),
    "score-parts": ("/v1/score", {"queries": {"content": [part()]}}),
    "rerank": ("/v2/rerank", {"query": LONG, "documents": [LONG], "top_n": 1}),
    "tokenize": ("/tokenize", {"prompt": LONG}),
    "detokenize": ("/detokenize", {"tokens": [1, 2]}),
    "sagemaker": ("/invocations", {"messages": [], "text_1": LONG, "max_tokens": 1}),
}


@pytest.mark.parametrize(("path", "body"), TEXTS.values(), ids=TEXTS)
def test_text_is_every_tenants(path, body):
    assert fault(path, body) is None


REFUSED = {
    "unknown": (COMPLETIONS, {"prompt": "a", "new_field": 1}, "here: `new_field`.", "new_field"),
    "null": (COMPLETIONS, {"vllm_xargs": None}, "here: `vllm_xargs`.", "vllm_xargs"),
    "several": (
        CHAT,
        {"messages": [], **{f"f{number}": 1 for number in range(10)}},
        "here: `f0`, `f1`, `f2`, `f3`, `f4`, `f5`, `f6`, `f7` and 2 more.",
        "f0",
    ),
    "long-name": (COMPLETIONS, {LONG: 1}, f"here: `{'a' * 64}...`.", f"{'a' * 64}..."),
    "surrogate": (COMPLETIONS, {"\ud800": 1}, "here: `\\ud800`.", "\\ud800"),
    "other-route": (MESSAGES, {"seed": 1}, "here: `seed`.", "seed"),
    "list": (COMPLETIONS, ["prompt"], "The body is a list, expected a JSON object.", None),
    "long-model": (COMPLETIONS, {"model": LONG}, "`model`: found a text of 1025", "model"),
    "long-stop": (COMPLETIONS, {"stop": ["a", LONG]}, "`stop`: found a text of 1025", "stop"),
    "long-key": (COMPLETIONS, {"logit_bias": {LONG: 1}}, "a key of 1025 char", "logit_bias"),
    "long-role": (CHAT, {"messages": [{"role": LONG}]}, "a text of 1025", "messages"),
    "long-type": (
        CHAT,
        {"messages": [{"content": [{"type": LONG}]}]},
        f"type is not allowed for this tenant: {'a' * 64}...",
        "messages",
    ),
    "type-of-no-text": (
        CHAT,
        {"messages": [{"type": ["text"]}]},
        "type is not allowed for this tenant: a list.",
        "messages",
    ),
    "message-key": (
        CHAT,
        {"messages": [{"role": "user", "author": {}}]},
        "keys that are not allowed for this tenant: `author`.",
        "messages",
    ),
    "many-stops": (COMPLETIONS, {"stop": ["a"] * 65}, "found 65 items, expected 64", "stop"),
    "many-stop-sequences": (MESSAGES, {"stop_sequences": ["a"] * 65}, "65 items", "stop_sequences"),
    "many-stop-tokens": (CHAT, {"stop_token_ids": [1] * 65}, "65 items", "stop_token_ids"),
    "much-bias": (
        CHAT,
        {"logit_bias": {str(token): 1 for token in range(1_025)}},
        "found 1025 items, expected 1024",
        "logit_bias",
    ),
    "long-answer": (CHAT, {"max_tokens": (1 << 30) + 1}, "1073741824 at most", "max_tokens"),
    "longer-answer": (
        RESPONSES,
        {"max_output_tokens": 1e300},
        "found a larger one, expected a number, 1073741824 at most",
        "max_output_tokens",
    ),
    "number-in-a-text": (
        CHAT,
        {"max_completion_tokens": "9" * 20},
        "found a string, expected a number",
        "max_completion_tokens",
    ),
    "large-seed": (COMPLETIONS, {"seed": 1 << 63}, "expected a number", "seed"),
    "small-priority": (COMPLETIONS, {"priority": -1 - (1 << 63)}, "expected a number", "priority"),
    "smaller-priority": (COMPLETIONS, {"priority": -1e300}, "expected a number", "priority"),
    "number-in-a-short-text": (CHAT, {"top_k": "9" * 20}, "found a string", "top_k"),
    "large-item": (COMPLETIONS, {"stop_token_ids": [1, 1 << 63]}, "64 bits", "stop_token_ids"),
    "large-number": (COMPLETIONS, {"logprobs": 1 << 64}, "more than 64 bits", "logprobs"),
    "half-a-character": (COMPLETIONS, {"stop": ["\ud800"]}, "surrogate pair", "stop"),
    "half-in-a-key": (COMPLETIONS, {"metadata": {"\udfff": 1}}, "surrogate pair", "metadata"),
    "no-number": (COMPLETIONS, {"seed": float("nan")}, "expected a number", "seed"),
    "many-answers": (COMPLETIONS, {"n": 2_049}, "2048 at most", "n"),
    "chosen-id": (RESPONSES, {"request_id": "resp_1"}, "here: `request_id`.", "request_id"),
    "deep": (COMPLETIONS, {"prompt": nested(65)}, "expected 64 at most", "prompt"),
    "deep-setting": (COMPLETIONS, {"metadata": {"a": nested(64)}}, "expected 64", "metadata"),
    "deep-arguments": (
        MESSAGES,
        {"messages": [{"content": [{"type": "tool_use", "input": nested(61)}]}]},
        "expected 64 at most",
        "messages",
    ),
}


@pytest.mark.parametrize(("path", "body", "message", "param"), REFUSED.values(), ids=REFUSED)
@pytest.mark.parametrize("allow", [frozenset(), ALL], ids=["nothing", "everything"])
def test_what_no_tenant_may_send_is_named(path, body, message, param, allow):
    found = fault(path, body, allow)
    assert found is not None
    assert message in found[0]
    assert found[1] == param
    assert len(found[0]) < 1_000


def test_numbers_and_items_are_counted_to_their_limits():
    bias = {str(token): 1 for token in range(1_024)}
    most = {"n": 2_048, "max_tokens": 1 << 30, "seed": (1 << 63) - 1, "logit_bias": bias}
    assert fault(COMPLETIONS, {**most, "stop": ["a"] * 64, "stop_token_ids": [1] * 64}) is None
    assert fault(COMPLETIONS, {"n": None, "seed": -5, "stop": "a", "max_tokens": 1.0}) is None


URL = {"url": PIXEL}
IMAGE = part("input_image", image_url=PIXEL)
BASE64 = {"type": "base64", "media_type": "image/png", "data": LONG}
MEDIA = {
    "image": (CHAT, message_with(part("image_url", image_url=URL)), "`image_url`"),
    "image-without-type": (CHAT, message_with({"image_url": PIXEL}), "`image_url`"),
    "video": (CHAT, message_with(part("video_url", video_url=URL)), "`video_url`"),
    "audio": (
        CHAT,
        message_with(part("input_audio", input_audio={"data": LONG, "format": "wav"})),
        "`input_audio`",
    ),
    "response-image": (RESPONSES, {"input": [says("user", [IMAGE])]}, "`image_url`"),
    "tool-output-image": (
        RESPONSES,
        {"input": [part("function_call_output", output=[IMAGE])]},
        "`image_url`",
    ),
    "anthropic-image": (MESSAGES, message_with(part("image", source=BASE64)), "`source`"),
    "cohere-images": (EMBED, {"images": [PIXEL]}, "`images` is not allowed for this tenant"),
    "rerank-image": (
        "/rerank",
        {"query": "a", "documents": [{"content": [part("image_url", image_url=URL)]}]},
        "`image_url`",
    ),
}


@pytest.mark.parametrize(("path", "body", "message"), MEDIA.values(), ids=MEDIA)
def test_media_are_for_tenants_that_may_send_them(path, body, message):
    assert message in fault(path, body)[0]
    assert message in fault(path, body, ALL - {"media"})[0]
    assert fault(path, body, {"media"}) is None


ADDRESSES = ("https://example.com/a.png", "file:///etc/passwd", " data:,", "DATA:,", "")


@pytest.mark.parametrize("address", ADDRESSES)
@pytest.mark.parametrize(
    ("path", "make"),
    [
        (CHAT, lambda url: message_with(part("image_url", image_url={"url": url}))),
        (CHAT, lambda url: message_with({"image_url": url})),
        (CHAT, lambda url: message_with({"image_url": [url]})),
        (CHAT, lambda url: message_with({"audio_url": {"url": url}})),
        (CHAT, lambda url: message_with({"video_url": {"url": url}})),
        (RESPONSES, lambda url: {"input": [part("input_image", image_url=url)]}),
        (MESSAGES, lambda url: message_with(part("image", source={"type": "url", "url": url}))),
        (EMBED, lambda url: {"images": [PIXEL, url]}),
    ],
    ids=["part", "short", "list", "audio", "video", "response", "anthropic", "cohere"],
)
def test_media_come_in_the_request_and_from_no_address(path, make, address):
    assert "expected a `data:` URL" in fault(path, make(address), ALL)[0]
    assert fault(path, make(PIXEL), ALL) is None


@pytest.mark.parametrize(
    "part",
    [
        {"type": "image_url", "image_url": {"url": PIXEL}, "uuid": "another's"},
        {"type": "image_embeds", "image_embeds": "a"},
        {"type": "audio_embeds", "audio_embeds": "a"},
        {"type": "prompt_embeds", "data": "a"},
        {"image_pil": "a"},
        {"type": "input_file", "file_id": "a"},
    ],
    ids=["uuid", "image-embeds", "audio-embeds", "prompt-embeds", "pil", "file"],
)
def test_ids_and_embeddings_are_no_tenants(part):
    assert "not allowed for this tenant" in fault(CHAT, message_with(part), ALL)[0]


GATED = {
    "response-format": (COMPLETIONS, {"response_format": {"type": "json_object"}}, "grammars"),
    "structured": (CHAT, {"structured_outputs": {"regex": "a"}}, "grammars"),
    "tools": (CHAT, {"tools": [TOOL]}, "grammars"),
    "tool-choice": (CHAT, {"tool_choice": "required"}, "grammars"),
    "format": (
        RESPONSES,
        {"text": {"format": {"type": "json_schema", "schema": SCHEMA}}},
        "grammars",
    ),
    "response-tools": (
        RESPONSES,
        {"tools": [{"type": "function", "parameters": SCHEMA}]},
        "grammars",
    ),
    "anthropic-tools": (MESSAGES, {"tools": [{"name": "f", "input_schema": SCHEMA}]}, "grammars"),
    "anthropic-format": (
        MESSAGES,
        {"output_config": {"format": {"type": "json_schema"}}},
        "grammars",
    ),
    "counted-tools": (f"{MESSAGES}/count_tokens", {"tools": [{"name": "f"}]}, "grammars"),
    "tokenized-tools": ("/tokenize", {"messages": [], "tools": [TOOL]}, "grammars"),
    "sagemaker": ("/invocations", {"messages": [], "tools": [TOOL]}, "grammars"),
}


@pytest.mark.parametrize(("path", "body", "word"), GATED.values(), ids=GATED)
def test_field_needs_its_word(path, body, word):
    (name,) = body.keys() - {"messages"}
    expected = (
        f"`{name}` is not allowed for this tenant: the server's operator has not allowed `{word}`."
    )
    assert fault(path, body) == (expected, name)
    assert fault(path, body, ALL - {word}) == (expected, name)
    assert fault(path, body, {word}) is None


def test_tools_in_messages_need_the_word_for_tools():
    definition = part("tool_definition", definition={"name": "f", "input_schema": SCHEMA})
    body = {"messages": [says("system", [part("tool_addition", tool=definition)])]}
    assert "`tool`" in fault(MESSAGES, body)[0]
    assert fault(MESSAGES, body, {"grammars"}) is None


def test_no_route_is_both_allowed_and_refused():
    assert not TENANT_ROUTES.keys() & REFUSED_ROUTES


@pytest.mark.parametrize("path", TENANT_ROUTES)
def test_fields_of_a_route_are_of_one_kind_each(path):
    route = TENANT_ROUTES[path]
    kinds = [route.plain, route.contents, route.documents, route.gated.keys()]
    assert sum(map(len, kinds)) == len(frozenset().union(*kinds))
    assert route.is_form or "model" in route.plain
