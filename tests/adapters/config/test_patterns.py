"""Patterns of module names: PEFT's meaning, and no pattern that takes long or much memory."""

import contextlib
import re
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from peft.utils.other import get_pattern_key

from vllm_multilora.adapters.config import patterns
from vllm_multilora.adapters.config.patterns import (
    Budget,
    PatternError,
    PatternMatcher,
    check_expression,
    check_pattern,
)

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
    check_pattern(pattern, Budget())
    matcher = PatternMatcher({pattern: 3}, Budget())
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
        r"[^\]x]*" * 5,
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
        check_pattern(pattern, Budget())
    assert time.thread_time() - start < 0.5


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.text("ab.*+?()|[]{2,}^\\dw", max_size=30))
def test_whatever_is_taken_is_matched_soon(pattern):
    try:
        check_pattern(pattern, Budget())
    except PatternError:
        return
    matcher = PatternMatcher({pattern: 1}, Budget())
    start = time.thread_time()
    for name in ("ab" * 30, "a.b" * 20, "b"):
        matcher.get(name)
    assert time.thread_time() - start < 1.5 * patterns.MAX_SECONDS


def test_all_patterns_of_an_adapter_share_one_budget(monkeypatch):
    monkeypatch.setattr(patterns, "MAX_SECONDS", 0.0)
    budget = Budget()
    with pytest.raises(PatternError, match="processor time"):
        PatternMatcher({"q_pro[j]": 1}, budget).get(NAMES[0])
    with pytest.raises(PatternError, match="processor time"):
        PatternMatcher({"q_proj": 1}, budget).get(NAMES[0])
    assert PatternMatcher({}, budget).get(NAMES[0]) is None


def test_as_many_expressions_are_taken_as_are_said_to_be():
    budget = Budget()
    for _ in range(patterns.MAX_EXPRESSIONS):
        check_pattern("q_pro[j]", budget)
    check_pattern("q_proj", budget)
    with pytest.raises(PatternError, match=f"more than {patterns.MAX_EXPRESSIONS} regular"):
        check_pattern("q_pro[j]", budget)


def test_the_budget_is_looked_at_between_patterns_not_names_only(monkeypatch):
    """One name alone, and as many expressions as are taken, each of which takes a while."""
    monkeypatch.setattr(patterns, "MAX_SECONDS", 0.1)
    slow = {f".*.*.*{number:02}x": number for number in range(patterns.MAX_EXPRESSIONS)}
    for pattern in slow:
        check_pattern(pattern, Budget())
    start = time.thread_time()
    with pytest.raises(PatternError, match="processor time"):
        PatternMatcher(slow, Budget()).get("ab" * 128)
    assert time.thread_time() - start < 3


@pytest.mark.parametrize(
    ("pattern", "name"),
    [("a*a*a*a*a*a*c", "a" * 40 + "b"), (r"\d*[0-9]*\d*\d*[0-9]*\d*c", "1234567890" * 4)],
    ids=["letter", "digits"],
)
def test_names_that_repeat_more_than_modules_names_do_are_not_matched(pattern, name):
    """A few times as long, any of these names would take hours."""
    check_pattern(pattern, Budget())
    with pytest.raises(PatternError, match="in a row"):
        PatternMatcher({"q_proj": 1, pattern: 2}, Budget()).get(name)
    assert PatternMatcher({"q_proj": 1}, Budget()).get(f"{name}.q_proj") == 1
    start = time.thread_time()
    assert PatternMatcher({pattern: 2}, Budget()).get("layers.10000000.aaaaaaaa") is None
    assert time.thread_time() - start < 1


def test_ten_thousand_names_are_looked_up_in_milliseconds():
    """PEFT writes one for each module whose rank is its own."""
    kinds = ("self_attn.q_proj", "self_attn.k_proj", "mlp.up_proj", "mlp.down_proj")
    modules = [f"model.layers.{i}.{kind}" for i in range(2_500) for kind in kinds]
    start = time.thread_time()
    for module in modules:
        check_pattern(module, Budget())
    matcher = PatternMatcher({module: i for i, module in enumerate(modules)}, Budget())
    assert [matcher.get(name) for name in modules[:1_000]] == list(range(1_000))
    assert all(matcher.get(f"{name}.base_layer") is None for name in modules[:1_000])
    assert time.thread_time() - start < 0.5


@settings(max_examples=300, deadline=None, derandomize=True)
@given(
    st.lists(st.text("ab._-", max_size=6), max_size=8),
    st.text("ab._-\n", max_size=8),
)
def test_a_name_as_pattern_fits_where_its_expression_does(names, module):
    """Also with a dot in the place of any other character, and at a line's end."""
    values = {pattern: number for number, pattern in enumerate(names)}
    fits = [p for p in values if re.match(rf"(.*\.)?({p})$", module)]
    expected = values[fits[0]] if fits else None
    assert PatternMatcher(values, Budget()).get(module) == expected


@pytest.mark.parametrize(
    "expression",
    ["x|" * (1 << 21), "(?i)" + "[\0-\U0010ffff]" * 400, "(?si:" + "[\0-\U0010ffff]" * 150 + ")"],
    ids=["four-mebibytes", "many-sets", "many-sets-in-a-group"],
)
def test_an_expression_that_is_not_matched_costs_next_to_nothing(expression):
    start = time.thread_time()
    with contextlib.suppress(PatternError):
        check_expression(expression)
    assert time.thread_time() - start < 0.1
