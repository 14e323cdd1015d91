"""What a request says of itself is bounded before it is looked at."""

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_multilora.routing.request_facts import (
    LONGEST_VALUE,
    FactSource,
    RequestError,
    RequestFacts,
)

LANGUAGE = FactSource.parse("language")
MAX_TAGS, LONGEST_TAG = 32 * 32, 64


def languages(text: str) -> list[str]:
    return LANGUAGE.requested(RequestFacts(headers={"accept-language": text}))


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("fr-CH, en;q=0.5", ["fr-ch", "fr", "en"]),
        ("zh-Hant-CN-x-private1-private2", [
            "zh-hant-cn-x-private1-private2", "zh-hant-cn-x-private1", "zh-hant-cn", "zh-hant", "zh"
        ]),
        ("de-u-co-phonebk", ["de-u-co-phonebk", "de-u-co", "de"]),
        ("en;q=0.1, de;q=0.9, fr;q=2, it;q=nan, es;q=-1, nl;q=x", ["de", "en"]),
        ("*, fr-*, d\u00e9, a b", []),
        ("-, --", []),
    ],
)  # fmt: skip
def test_languages_are_looked_up_as_rfc_4647_says(text, found):
    assert languages(text) == found


@pytest.mark.parametrize(
    "text",
    ["a-" * 24_576, ",".join(["a-b-c-d"] * 10_000), "a" * 49_152, ";" * 49_152, "," * 49_152],
    ids=["one-tag", "many-tags", "one-word", "parameters", "commas"],
)
def test_a_header_of_48_kib_costs_no_more_than_a_short_one(text):
    began = time.thread_time()
    found = languages(text)
    assert time.thread_time() - began < 0.1
    assert len(found) <= MAX_TAGS
    assert all(len(tag) <= LONGEST_TAG for tag in found)


@given(st.text())
def test_whatever_is_asked_for_the_answer_is_a_bounded_list_of_tags(text):
    found = languages(text)
    assert len(found) <= MAX_TAGS
    assert all(0 < len(tag) <= LONGEST_TAG and tag.isascii() for tag in found)


@pytest.mark.parametrize(
    ("source", "facts"),
    [
        ("user", {"user": "x" * (LONGEST_VALUE + 1)}),
        ("metadata:task", {"metadata": {"task": "x" * 5000}}),
        ("metadata:task", {"metadata": {"task": 10**600}}),
        ("header:x-task", {"headers": {"x-task": "x" * 5000}}),
    ],
    ids=["user", "metadata", "number", "header"],
)
def test_a_value_longer_than_any_name_is_refused_with_a_sentence(source, facts):
    with pytest.raises(RequestError, match="more than 512 characters"):
        FactSource.parse(source).requested(RequestFacts(**facts))
