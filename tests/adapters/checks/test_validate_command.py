"""`vllm-multilora validate`: exit status, table and JSON, with the layout given."""

import argparse
import json
from pathlib import Path

import pytest

from vllm_multilora.cli import status_of
from vllm_multilora.errors import MultiLoRAError
from vllm_multilora.toolbox.commands import validate as validate_command

from ..corpus import BAD, LAYOUT, VALID
from ..files.test_pickled import pickle_weights


def command(*argv: str, layout_of=lambda _: LAYOUT) -> int:
    parser = argparse.ArgumentParser()
    validate_command.add_arguments(parser)
    parsed = parser.parse_args([*argv, "--model", "tiny/llama"])
    return status_of(
        lambda given: validate_command.run(given, layout_of), parsed, "vllm-multilora validate"
    )


@pytest.fixture
def good(tmp_path) -> str:
    return str(VALID["plain"].write(tmp_path / "good"))


@pytest.fixture
def bad(tmp_path) -> str:
    return str(BAD["wrong-in-four-ways"].write(tmp_path / "bad"))


def test_good_adapters_exit_with_zero(good, capsys):
    assert command(good) == 0
    table = capsys.readouterr().out
    assert f"{good}  ok\n" in table
    assert table.endswith("1 adapter, 0 cannot be served\n")


def test_one_bad_adapter_exits_with_one_and_every_problem_is_reported(good, bad, capsys):
    assert command(good, bad) == 1
    table = capsys.readouterr().out
    for code in BAD["wrong-in-four-ways"].codes:
        assert f" invalid  {code.value} " in table
    assert table.count("\n- ") == 4
    assert "'use_dora' is True, expected unset" in table
    assert any(line.split() == [good, "ok"] for line in table.splitlines())


def test_json_is_the_only_thing_printed(good, bad, capsys):
    assert command(good, bad, "--json", "--max-lora-rank", "64") == 1
    report = json.loads(capsys.readouterr().out)
    assert (report["model"], report["max_lora_rank"]) == ("tiny/llama", 64)
    first, second = report["adapters"]
    assert first == {"path": good, "valid": True, "problems": []}
    assert (second["path"], second["valid"]) == (bad, False)
    assert [problem["code"] for problem in second["problems"]] == [
        code.value for code in BAD["wrong-in-four-ways"].codes
    ]
    assert set(second["problems"][0]) == {
        "code",
        "file",
        "where",
        "found",
        "expected",
        "message",
        "hint",
        "count",
    }


def test_weights_are_left_unread_if_asked(tmp_path):
    folder = str(BAD["a-with-one-nan"].write(tmp_path / "nan"))
    assert command(folder) == 1
    assert command(folder, "--no-check-finite") == 0


def test_pickled_weights_are_checked_for_servers_that_read_them(good, tmp_path, capsys):
    pickle_weights(Path(good))
    assert command(good) == 1
    assert "--multilora-allow-pickle" in capsys.readouterr().out
    assert command(good, "--multilora-allow-pickle") == 0


def test_a_base_model_that_cannot_be_had_exits_with_two(good, capsys):
    def fail(_: argparse.Namespace):
        raise MultiLoRAError("no such model")

    assert command(good, layout_of=fail) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == "vllm-multilora validate: error: no such model\n"
