"""Choosing by a value that the request brings: user, metadata, a header, a language."""

import pytest

from vllm_multilora.routing.request_facts import RequestError, RequestFacts
from vllm_multilora.routing.route_targets import Turns
from vllm_multilora.routing.routes_file import parse_routes

CASES = "cases: {fr: french, pt-br: brazilian, de: german}"


def choose(text, **facts):
    target = parse_routes("routes.yaml", f"routes: {{r: {{{text}}}}}").targets["r"]
    return target.candidates(RequestFacts(**facts), Turns())[0]


@pytest.mark.parametrize(
    ("by", "facts"),
    [
        ("user", {"user": "de"}),
        ("metadata:task", {"metadata": {"task": "de"}}),
        ("metadata:task", {"metadata": {"task": " De "}}),
        ("header:X-Task", {"headers": {"x-task": "DE"}}),
        ("language", {"metadata": {"language": "de"}}),
        ("language", {"headers": {"accept-language": "de"}}),
        ("language", {"metadata": {"language": "de"}, "headers": {"accept-language": "fr"}}),
        ("language", {"metadata": {"language": " "}, "headers": {"accept-language": "de"}}),
        ("language", {"metadata": {"language": 49}, "headers": {"accept-language": "de"}}),
    ],
)
def test_a_value_chooses_its_case(by, facts):
    assert choose(f"by: '{by}', {CASES}, default: other", **facts) == "german"


@pytest.mark.parametrize(
    ("header", "adapter"),
    [
        ("fr", "french"),
        ("fr-CH", "french"),
        ("fr_CH", "french"),
        ("fr-Latn-CH", "french"),
        ("pt-BR", "brazilian"),
        ("pt", "other"),
        ("en-GB, de;q=0.7, fr;q=0.9", "french"),
        ("de;q=0.9, fr;q=0.9", "german"),
        ("de;q=0, fr;q=0.1", "french"),
        ("de;q=much, fr;q=0.1", "french"),
        ("*", "other"),
        ("it, *;q=0.5", "other"),
        (", ;q=1", "other"),
    ],
)
def test_languages_are_looked_up_as_http_says(header, adapter):
    facts = {"headers": {"accept-language": header}}
    assert choose(f"by: language, {CASES}, default: other", **facts) == adapter


@pytest.mark.parametrize("asked", ["pt-BR", "pt_BR"])
@pytest.mark.parametrize("written", ["pt-BR", "pt_BR", "' PT_br '"])
def test_a_language_may_be_written_in_either_way(written, asked):
    text = f"by: language, cases: {{{written}: brazilian}}, default: other"
    assert choose(text, headers={"accept-language": asked}) == "brazilian"


@pytest.mark.parametrize("value", [None, True, 1.5, ["fr"], {"fr": 1}, "", "  "])
def test_what_is_no_text_is_no_value(value):
    facts = {"metadata": {"task": value}}
    assert choose(f"by: 'metadata:task', {CASES}, default: other", **facts) == "other"


def test_whole_numbers_are_read_as_text():
    assert choose("by: 'metadata:tier', cases: {'1': gold}", metadata={"tier": 1}) == "gold"


@pytest.mark.parametrize(
    ("facts", "found"), [({}, "no value"), ({"metadata": {"task": "Tea"}}, "'Tea'")]
)
def test_without_default_a_value_without_case_is_an_error(facts, found):
    with pytest.raises(RequestError) as caught:
        choose(f"by: 'metadata:task', {CASES}", **facts)
    message = f"metadata:task and has no default: found {found}, expected one of fr, pt-br, de"
    assert str(caught.value) == f"r chooses by {message}"


def test_cases_may_be_split_and_each_keeps_its_own_turns():
    text = "by: user, cases: {a: {split: {x: 1, y: 1}}, b: {split: {x: 1, y: 1}}}"
    target = parse_routes("routes.yaml", f"routes: {{r: {{{text}}}}}").targets["r"]
    turns = Turns()
    # A customer stays where the hash puts it; `sticky` names another value for turns.
    assert len({target.candidates(RequestFacts(user="a"), turns) for _ in range(10)}) == 1
    assert not turns
