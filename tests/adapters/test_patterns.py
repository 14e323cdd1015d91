"""Patterns of module names: PEFT's meaning, and no pattern that takes long or much memory."""

import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from peft.utils.other import get_pattern_key

from vllm_multilora.adapters import patterns
from vllm_multilora.adapters.patterns import PatternError, PatternMatcher, check_pattern

NAMES = [
    f"model.layers.{layer}.{kind}"
    for layer in (0, 1, 7, 12, 31)
    for kind in ("self_attn.q_proj", "self_attn.k_proj", "mlp.down_proj", "mlp.gate_proj")
]
REAL = [
    "q_proj",
    "self_attn.q_proj",
    "^model.layers.0.mlp.down_proj",
    "model.layers.(0|1|2|3|4|5|6|7).self_attn.(q_proj|k_proj)",
    r"layers\.[0-9]\..*proj",
    r".*\.layers\.\d+\.(self_attn|mlp)\..*(q|k|v|o|gate|up|down)_proj",
    r"model\.layers\.(?:1[0-9]|2[0-9])\.mlp.*",
    r"(self_attn|mlp)?.q_proj",
    r"[^.]+_proj",
    r"layers\.(?P<number>\d{1,2})\.mlp\.down_proj",
    r"layers\.(?!0\.).*q_proj",
]


@pytest.mark.parametrize("pattern", REAL)
def test_a_pattern_for_modules_means_what_it_means_in_peft(pattern):
    check_pattern(pattern)
    matcher = PatternMatcher({pattern: 3})
    found = [name for name in NAMES if matcher.get(name) == 3]
    assert found == [name for name in NAMES if get_pattern_key([pattern], name) == pattern]


@pytest.mark.parametrize(
    "pattern",
    [
        "(.*)*x",
        "(.+)+x",
        "(a|b)*x",
        "((a?)(b?))+x",
        "(?:.*,)*x",
        "(a{1000}){1000}",
        "(((a{9}){9}){9}){9}",
        "(.|.)" * 30,
        ".*.*.*.*.*x",
        "[^x]*" * 5,
        r"\w+\w+\w+\w+x",
        "(?s).*",
        "(?>a*)b",
        "(a)?(?(1)b|c)",
        "x" * 3000,
    ],
    ids=lambda pattern: pattern[:24],
)
def test_a_pattern_that_could_take_long_is_refused_at_once(pattern):
    start = time.thread_time()
    with pytest.raises(PatternError):
        check_pattern(pattern)
    assert time.thread_time() - start < 0.5


@pytest.mark.parametrize("pattern", ["(", "[a", "*a", "a)", "a{2,1}", "\\"])
def test_what_is_no_expression_is_refused(pattern):
    with pytest.raises(PatternError, match="is not a regular expression"):
        check_pattern(pattern)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.text("ab.*+?()|[]{2,}^\\dw", max_size=30))
def test_whatever_is_taken_is_matched_soon(pattern):
    try:
        check_pattern(pattern)
    except PatternError:
        return
    matcher = PatternMatcher({pattern: 1})
    start = time.thread_time()
    for name in ("ab" * 30, "a.b" * 20, "b"):
        matcher.get(name)
    assert time.thread_time() - start < 1.5 * patterns.MOST_SECONDS


def test_all_look_ups_together_are_bounded(monkeypatch):
    monkeypatch.setattr(patterns, "MOST_SECONDS", -1.0)
    with pytest.raises(PatternError, match="processor time"):
        PatternMatcher({"q_proj": 1}).get(NAMES[0])
    assert PatternMatcher({}).get(NAMES[0]) is None


def test_the_first_pattern_that_fits_counts():
    matcher = PatternMatcher({"layers.0.self_attn.q_proj": 2, "q_proj": 4, "model.*": 8})
    assert [matcher.get(name) for name in (NAMES[0], NAMES[4], NAMES[2], "other")] == [
        2,
        4,
        8,
        None,
    ]
