"""One problem for each cause, and no more of a kind than anybody reads."""

from vllm_multilora.adapters import Code
from vllm_multilora.adapters.problem_list import ProblemList


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
