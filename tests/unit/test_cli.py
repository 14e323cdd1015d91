"""`vllm-multilora` answers at once where no command has to run."""

import argparse
import json
import shlex
import subprocess
import sys

import pytest

from vllm_multilora import __version__
from vllm_multilora.cli import COMMANDS, main, parser_of
from vllm_multilora.toolbox.commands import validate
from vllm_multilora.toolbox.commands.planning import plan_command

HEAVY = ("torch", "vllm", "numpy", "triton", "matplotlib", "prometheus_client")
MAX_MODULES = 400
"""Limit of the modules that an answer imports; torch alone imports over 1,000."""

WRONG = {
    "adapters": ["burn"],
    "advise": ["--url", "http://localhost", "--prometheus", "http://localhost"],
    "calibrate": ["--max-num-seqs", "16"],
    "completion": ["cmd"],
    "digest": [],
    "doctor": ["--no-such-flag"],
    "plan": ["--model", "m", "--max-loras", "many"],
    "sign": ["adapter"],
    "simulate": ["--no-such-flag"],
    "status": ["--watch", "often"],
    "store": ["--no-such-flag"],
    "tenants": ["burn"],
    "validate": ["adapter"],
    "verify": ["adapter"],
}


PROGRAM = """
import contextlib, io, json, sys
from vllm_multilora.cli import main
answers = []
for call in json.loads(sys.argv[1]):
    text = io.StringIO()
    with contextlib.redirect_stdout(text), contextlib.redirect_stderr(text):
        try:
            main(call)
        except SystemExit as end:
            answers.append((end.code, text.getvalue()))
heavy = [name for name in json.loads(sys.argv[2]) if name in sys.modules]
print(json.dumps([answers, heavy, len(sys.modules)]))
"""
CALLS = {
    "": {
        ("--version",): (0, __version__),
        ("--help",): (0, COMMANDS["validate"].help),
        (): (2, "arguments are required"),
        ("vaildate",): (2, "invalid choice: 'vaildate'"),
    },
    **{
        name: {(name, "--help"): (0, "--help"), (name, *WRONG[name]): (2, "error: ")}
        for name in sorted(COMMANDS)
    },
}


@pytest.mark.parametrize("calls", CALLS.values(), ids=CALLS)
def test_help_and_wrong_arguments_import_nothing_heavy(calls):
    command = [sys.executable, "-c", PROGRAM, json.dumps([*calls]), json.dumps(HEAVY)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    answers, heavy, modules = json.loads(done.stdout)
    for (status, text), (expected, words) in zip(answers, calls.values(), strict=True):
        assert status == expected
        assert words in text
    assert heavy == []
    assert modules < MAX_MODULES


@pytest.mark.parametrize("name", COMMANDS)
def test_examples_are_in_the_help_and_can_be_parsed(name, capsys):
    with pytest.raises(SystemExit, match="0"):
        main([name, "--help"])
    shown = capsys.readouterr().out.replace(" \\\n      ", " ")
    assert " ".join(COMMANDS[name].description.split()) in " ".join(shown.split())
    for example in COMMANDS[name].examples:
        assert f"\n  vllm-multilora {example}\n" in shown
        words = shlex.split(example.partition(">")[0])
        assert words[0] == name
        assert parser_of([name]).parse_args(words).run


@pytest.mark.parametrize("words", [[], *([name] for name in COMMANDS)], ids=" ".join)
def test_help_fits_a_terminal_of_usual_width(words, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit, match="0"):
        main([*words, "--help"])
    _usage, _, text = capsys.readouterr().out.partition("\n\n")  # argparse breaks no alternatives
    assert [line for line in text.splitlines() if len(line) > 80] == []


@pytest.mark.parametrize("name", COMMANDS)
def test_every_flag_says_what_it_means(name):
    words = shlex.split(COMMANDS[name].examples[0].partition(">")[0])
    flags = parser_of([name]).parse_args(words).parser._actions
    assert [flag.option_strings for flag in flags if flag.option_strings and not flag.help] == []


@pytest.mark.parametrize("columns", ["1", "2", "12"])
def test_a_terminal_may_be_narrower_than_any_text(columns, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", columns)
    assert main(["tenants", "new"]) == 0
    with pytest.raises(SystemExit, match="0"):
        main(["tenants", "--help"])
    assert "hashes" in capsys.readouterr().out


@pytest.mark.parametrize("shell", ["bash", "zsh", "tcsh"])
def test_shells_complete_all_commands_and_flags(shell, capsys):
    assert main(["completion", shell]) == 0
    script = capsys.readouterr().out
    for word in (*COMMANDS, "max-lora-rank", "describe"):
        assert word in script
    if shell == "bash":
        subprocess.run(["bash", "-n"], input=script, text=True, check=True)


def test_completion_without_shtab_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "shtab", None)
    assert main(["completion", "bash"]) == 2
    assert "pip install 'vllm-multilora[completion]'" in capsys.readouterr().err


def test_commands_that_take_a_flag_of_the_servers_say_the_same_of_it():
    def reported(command):
        parser = argparse.ArgumentParser()
        command.add_arguments(parser)
        return {
            a.option_strings[0]: (a.help, a.choices) for a in parser._actions if a.option_strings
        }

    of_plan, of_validate = reported(plan_command), reported(validate)
    both = of_plan.keys() & of_validate.keys() - {"--max-lora-rank"}  # which has no default in one
    assert len(both) >= 8
    assert {flag: of_plan[flag] for flag in both} == {flag: of_validate[flag] for flag in both}
