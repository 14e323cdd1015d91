"""One problem for each cause, and no more of a kind than anybody reads."""

import json
import time

import pytest

from vllm_multilora.adapters.adapter_errors import AdapterFormatError
from vllm_multilora.adapters.config.adapter_config import AdapterConfig
from vllm_multilora.adapters.problems import (
    MAX_CHARACTERS,
    MAX_PROBLEMS,
    Code,
    Problem,
    ProblemList,
    bounded,
)


def test_tensors_with_one_cause_are_one_problem_with_a_count_and_an_example():
    problems = ProblemList("file")
    for number in range(224):
        problems.add(Code.RANKS_DIFFER, f"tensor-{number}", "the rank 4", "8", verb="has")
    problems.add(Code.RANKS_DIFFER, "another", "the rank 2", "8", verb="has")
    first, second = problems.grouped()
    assert (first.where, first.count) == ("tensor-0", 224)
    assert first.message == "file: tensor-0 has the rank 4, expected 8 (223 more like this)"
    assert (second.where, second.count) == ("another", 1)


def test_a_cause_joins_what_differs_in_values():
    problems = ProblemList("file")
    for number in range(3):
        problems.add(Code.NOT_FINITE, f"tensor-{number}", f"{number} NaN", "numbers", cause="nan")
    [problem] = problems.grouped()
    assert (problem.found, problem.count) == ("0 NaN", 3)


def test_a_file_wrong_in_very_many_ways_gets_few_problems_that_count_all():
    problems = ProblemList("file")
    for number in range(10_000):
        problems.add(Code.UNKNOWN_MODULE, f"tensor-{number}", f"for module {number}", "others")
    found = problems.grouped()
    assert len(found) == len(problems) == 8
    assert sum(problem.count for problem in found) == 10_000


def test_the_hint_follows_the_sentence():
    problems = ProblemList("file")
    problems.add(Code.FILE_SIZE, "", "7 bytes", "9", verb="has", hint="copy it again")
    [problem] = problems.grouped()
    assert str(problem) == "file has 7 bytes, expected 9; copy it again"
    assert problem.as_dict()["code"] == "file-size"


def problem(**texts: str) -> Problem:
    fields = {"file": "file", "where": "q", "found": "1", "expected": "2", "message": "file: q"}
    return Problem(code=Code.CONFIG_VALUE, **(fields | texts))


def test_of_very_long_problems_as_many_are_reported_as_fit():
    reported = bounded(problem(message="m" * 1900, where=str(number)) for number in range(90))
    assert sum(len(str(one)) for one in reported) <= MAX_CHARACTERS
    assert reported[-1].code == Code.MORE_PROBLEMS
    assert len(reported) - 1 + reported[-1].count == 90
    assert bounded(reported) == reported


def test_of_very_many_problems_a_hundred_are_reported_and_the_others_counted():
    reported = bounded(problem(where=str(number)) for number in range(20_000))
    assert len(reported) == MAX_PROBLEMS + 1
    assert reported[-1].code == Code.MORE_PROBLEMS
    assert reported[-1].message == "file has 19900 more problems, not listed, expected none"
    assert bounded(reported) == reported
    assert bounded([*reported, problem(), *reported])[-1].count == 19_900 + 19_900 + 101
    error = AdapterFormatError.of(*(problem() for _ in range(20_000)))
    assert len(error.problems) == MAX_PROBLEMS + 1
    assert bounded([]) == []


def test_a_hundred_thousand_wrong_patterns_cost_little_text_and_time():
    patterns = {f"(({number}": 1 for number in range(10_000)}
    keys = {"r": 8, "lora_alpha": 8, "target_modules": []}
    text = json.dumps(keys | {"rank_pattern": patterns, "alpha_pattern": patterns})
    start = time.thread_time()
    _, problems = AdapterConfig.read(text, "c.json")
    assert time.thread_time() - start < 1
    assert len(problems) == MAX_PROBLEMS + 1
    assert problems[-1].count == 20_000 - MAX_PROBLEMS
    assert sum(len(str(problem)) for problem in problems) < 100_000
    assert any("more than 64 regular expressions" in str(problem) for problem in problems)


@pytest.mark.parametrize("field", ["file", "where", "found", "expected", "message", "hint"])
@pytest.mark.parametrize(
    "text",
    ["x" * 100_000, "a\x1b[2Jb", "line\nbreak", "\ud800", "nul\0", "\U000e0001" * 5_000],
    ids=["long", "escape", "line", "surrogate", "nul", "tags"],
)
def test_whatever_a_problem_holds_it_is_reported_short_printable_and_encodable(field, text):
    [reported] = bounded([problem(**{field: text})])
    shown_text = getattr(reported, field)
    assert len(shown_text) <= 2000
    assert shown_text.isprintable()
    assert shown_text.encode()
