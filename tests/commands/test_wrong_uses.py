"""Wrong uses of the commands: one sentence each, the right exit status, and no traceback."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from tests.adapters.checkpoints import MODULES, weights, write
from tests.adapters.signing.signed_folders import KeyPair
from tests.serving.server import free_port
from vllm_multilora.cli import INTERRUPTED, PIPE_CLOSED, TRACEBACK, main

NOBODY = "http://127.0.0.1:{port}"
PLAN = "plan --model m --max-loras 2 --max-lora-rank 8"
CALIBRATE = "calibrate --max-num-seqs"
BUSY_S = 1.0
"""Seconds of processor time after which a command is past its imports."""
SOON_S = 5.0
"""A fraction of a second, on a machine with nothing else to do."""
ZIPF = "simulate --synthetic zipf --requests 10 --adapters 4"

WRONG = [
    # No command, or no such flag.
    ("--verison", "the following arguments are required: COMMAND"),
    ("nope", "invalid choice: 'nope'"),
    ("status --nope", "unrecognized arguments: --nope"),
    ("doctor too much", "unrecognized arguments: too much"),
    ("simulate --synthetic zipf --jsn", "unrecognized arguments: --jsn"),
    # simulate
    ("simulate", "give either a trace file or --synthetic with one of: zipf"),
    ("simulate {trace} --synthetic zipf", "give either a trace file or --synthetic"),
    ("simulate --synthetic zipff", "invalid choice: 'zipff'"),
    ("simulate {missing}", "No such file"),
    ("simulate {folder}", "directory"),
    ("simulate {empty}", "the header lacks time and adapter"),
    ("simulate {bytes}", "cannot be read"),
    (
        f"{ZIPF} --max-loras 0",
        "at most 32766, got 0",
    ),
    (f"{ZIPF} --max-loras many", "invalid int value: 'many'"),
    (f"{ZIPF} --max-loras 4 --max-cpu-loras 3", "got 3 for 4 slots"),
    (f"{ZIPF} --cpu-cache-gib -1", "--cpu-cache-gib must be a positive"),
    (f"{ZIPF} --cpu-cache-gib nan", "nan"),
    (f"{ZIPF} --concurrency 0", "got 0"),
    (f"{ZIPF} --max-loras 99999999999999999999", "at most 32766, got 99999999999999999999"),
    (f"{ZIPF} --zipf-exponent 1e308", "zipf_exponent must be 0 or more, at most 10, got 1e+308"),
    (f"{ZIPF} --rank-mix 8=1e308,16=1e308", "positive ranks and weights below 2^63"),
    (f"{ZIPF} --rank-mix {'9' * 400}=1", "positive ranks and weights below 2^63"),
    (f"{ZIPF} --adapter-mib 1e308", "--adapter-mib must be a positive number of MiB"),
    ("simulate {deep}", "too deep nesting"),
    (f"{ZIPF} --policy best", "'best'"),
    (f"{ZIPF} --policy no.such:Class", "no.such"),
    (f"{ZIPF} --adapter-mib 0", "--adapter-mib"),
    (f"{ZIPF} --adapter-mib 9000", "more than the whole CPU budget (8.00 GiB)"),
    (f"{ZIPF} --adapter-mib 8 --rank-mix 8=1", "not allowed with argument"),
    (f"{ZIPF} --rank-mix 8", "8"),
    (f"{ZIPF} --rank-mix 8=x", "x"),
    (f"{ZIPF} --adapter-sizes {{missing}}", "No such file"),
    (f"{ZIPF} --adapter-sizes {{bytes}}", "expected UTF-8 text"),
    (f"{ZIPF} --adapter-sizes {{deep}}", "nested too deeply"),
    (f"{ZIPF} --plot {{folder}}/none/p.png", "there is no folder"),
    (f"{ZIPF} --plot {{folder}}/p.txt", "its name ends in '.txt', expected one of .png, .svg"),
    ("simulate --synthetic zipf --requests 0", "got 0"),
    ("simulate --synthetic zipf --adapters 0", "got 0"),
    # status and advise
    ("status --url nonsense", "is not a server address: expected http://HOST:PORT"),
    ("status --url ftp://localhost", "is not a server address"),
    ("status --url {nobody}", "cannot be reached: Connection refused"),
    ("status --url {nobody} --json", "cannot be reached"),
    ("status --watch often", "invalid float value: 'often'"),
    ("status --watch 0", "0"),
    ("advise --url {nobody}", "cannot be reached"),
    ("advise --url {nobody} --window 0", "--window must be a positive number of seconds"),
    ("advise --url {nobody} --window soon", "invalid float value: 'soon'"),
    ("advise --url {nobody} --match job=a", "--match needs --prometheus"),
    ("advise --prometheus {nobody}", "cannot be reached"),
    ("advise --prometheus {nobody} --window 1e9", "at most 86400 s (a day)"),
    ("advise --prometheus localhost:9090", "is not a server address"),
    # adapters
    ("adapters drop {folder} --workers {nobody}", "invalid choice: 'drop'"),
    ("adapters sync {missing} --workers {nobody}", "No such file"),
    ("adapters sync {empty} --workers {nobody}", "Not a directory"),
    ("adapters sync {folder} --workers nonsense", "is not a server address"),
    ("adapters sync {folder} --workers {nobody} --every 0", "--every must be a positive number"),
    # store and tenants
    ("store --describe", "no store of this user is running"),
    ("store describe", "unrecognized arguments: describe"),
    ("tenants burn", "invalid choice: 'burn'"),
    ("tenants check {missing}", "No such file"),
    ("tenants check {bytes}", "expected UTF-8 text"),
    ("tenants check {empty}", "found nothing, expected tenants"),
    ("tenants check", "check takes a file"),
    # plan and validate
    ("plan --traffic {trace}", "--traffic needs --calibration"),
    ("plan --traffic {missing} --calibration {empty}", "No such file"),
    ("plan --traffic {trace} --calibration {empty} --plot p.png", "--plot is for plans of memory"),
    ("plan --traffic {trace} --calibration {empty}", "lacks prompt_tokens and generation_tokens"),
    (f"{PLAN} --max-loras 0", "--max-loras must be at least 1"),
    (f"{PLAN} --max-loras 40000", "at most 32766, got 40000"),
    (f"{PLAN} --max-lora-rank 0", "--max-lora-rank must be at least 1"),
    (f"{PLAN} --tensor-parallel-size 0", "--tensor-parallel-size must be at least 1"),
    (f"{PLAN} --gpu-memory nan", "--gpu-memory must be a positive number"),
    (f"{PLAN} --gpu-memory-utilization 2", "--gpu-memory-utilization must be in (0, 1]"),
    (f"{PLAN} --dtype int8", "invalid choice: 'int8'"),
    (f"{PLAN} --calibration {{empty}}", "--calibration is for --traffic"),
    (f"{CALIBRATE} 1 --max-num-batched-tokens 64", "--max-num-seqs must be at least 2"),
    (f"{CALIBRATE} 64 --max-num-batched-tokens 16", "got 64 and 16"),
    (f"{CALIBRATE} 4 --max-num-batched-tokens 64 --url nonsense", "is not a server address"),
    (f"{CALIBRATE} 4 --max-num-batched-tokens 64 --url {{nobody}}", "cannot be reached"),
    # digest and doctor
    ("digest {missing}", "does not exist, expected an adapter folder"),
    ("digest {empty}", "is a file, expected an adapter folder"),
    ("digest {folder}", "adapter_config.json"),
    # sign and verify
    ("sign {folder} --key {missing}", "No such file"),
    ("sign {missing} --key {key}", "is not a folder"),
    ("sign {folder} --key {key}", "has no adapter_config.json, expected an adapter's folder"),
    ("verify {folder} --keys {missing}", "cannot be read: No such file"),
    ("verify {folder} --keys {empty}", "has no key, expected"),
    # completion
    ("completion cmd", "invalid choice: 'cmd'"),
    ("doctor --against {missing}", "does not exist: expected a wheel"),
    ("doctor --against {folder}", "contains no vLLM"),
]


@pytest.fixture
def paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    monkeypatch.setenv("MULTILORA_STORE_FOLDER", str(tmp_path / "stores"))
    named = {name: str(tmp_path / f"{name}.csv") for name in ("missing", "empty", "bytes", "trace")}
    Path(named["empty"]).touch()
    Path(named["bytes"]).write_bytes(b"\x00\xff\x80" * 100)
    Path(named["trace"]).write_text("time,adapter\n0,a\n")
    named["deep"] = str(tmp_path / "deep.jsonl")
    Path(named["deep"]).write_text("[" * 100_000)
    named["folder"] = str(tmp_path / "folder.csv")
    Path(named["folder"]).mkdir()
    named["key"] = str(KeyPair.make(tmp_path, "signing").private)
    return named | {"nobody": NOBODY.format(port=free_port())}


@pytest.mark.parametrize(("command", "message"), WRONG, ids=[command for command, _ in WRONG])
def test_one_sentence_says_what_is_wrong(command, message, paths, capfd):
    arguments = command.format_map(paths).split()
    try:
        status = main(arguments)
    except SystemExit as end:
        status = end.code
    out, err = capfd.readouterr()
    could_tell = command.startswith(("digest {", "tenants check {bytes}", "tenants check {empty}"))
    assert status == (1 if could_tell else 2)
    said = err.strip().splitlines()[-1] if err else out.strip()
    assert message in said
    assert said.startswith(("vllm-multilora", *paths.values())), said
    assert "Traceback" not in err
    before = err.strip().splitlines()[:-1]
    assert all(line.startswith(("usage: ", " ")) for line in before), err


def test_an_error_that_nobody_expects_is_no_answer(monkeypatch, capsys):
    def run(arguments):
        raise KeyError("first\nsecond")

    monkeypatch.setattr("vllm_multilora.toolbox.commands.simulate.run", run)
    assert main(["simulate"]) == 2
    err = capsys.readouterr().err
    assert err.startswith("vllm-multilora simulate: error: KeyError: ")
    assert len(err.splitlines()) == 1
    monkeypatch.setenv(TRACEBACK, "1")
    assert f"set {TRACEBACK}=1" in err
    assert main(["simulate"]) == 2
    err = capsys.readouterr().err
    assert err.startswith("Traceback")
    assert "in run" in err


def test_without_vllm_a_command_says_how_to_install_it(monkeypatch, capsys):
    def run(arguments):
        raise ModuleNotFoundError("No module named 'vllm'", name="vllm")

    monkeypatch.setattr("vllm_multilora.toolbox.commands.simulate.run", run)
    assert main(["simulate"]) == 2
    assert "error: vllm is not installed: pip install" in capsys.readouterr().err


def running(*arguments: str, encoding: str = "utf-8", **options) -> subprocess.Popen:
    """Its output is held back until there is much of it, or the end, as in most shells."""
    env = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    return subprocess.Popen(
        [sys.executable, "-m", "vllm_multilora.cli", *arguments],
        env=env | {"PYTHONIOENCODING": encoding},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )


def test_control_c_ends_a_command_at_once():
    """While it replays a long trace."""
    process = running(
        *("simulate", "--synthetic", "zipf", "--requests", "5000000"),
        # A shell's background job ignores it, and so would what that starts.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    with process:
        works = psutil.Process(process.pid)
        while works.cpu_times().user < BUSY_S:
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        begin = time.monotonic()
        _, err = process.communicate(timeout=30)
    assert process.returncode == INTERRUPTED
    assert err == ""
    assert time.monotonic() - begin < SOON_S


@pytest.mark.parametrize(
    "command", ["simulate --synthetic zipf --requests 100 --json", "plan --help"]
)
def test_a_reader_that_has_seen_enough_is_no_error(command):
    process = running(*command.split())
    with process:
        process.stdout.close()
        err = process.stderr.read()
        process.wait(timeout=30)
    assert (process.returncode, err) == (PIPE_CLOSED, "")


@pytest.mark.parametrize("command", ["tenants new", "--version"])
def test_output_for_which_there_is_no_room_is_no_answer(command):
    with Path("/dev/full").open("w") as full:
        process = running(*command.split(), preexec_fn=lambda: os.dup2(full.fileno(), 1))
    with process:
        _, err = process.communicate(timeout=30)
    assert process.returncode == 2
    (line,) = err.splitlines()
    assert "[Errno 28]" in line


def test_where_there_is_no_room_to_say_so_there_is_no_answer_either():
    with Path("/dev/full").open("w") as full:
        process = running("tenants", "check", preexec_fn=lambda: os.dup2(full.fileno(), 2))
    with process:
        process.communicate(timeout=30)
    assert process.returncode == 2


def test_output_that_nobody_reads_is_no_error():
    process = running("tenants", "new", preexec_fn=lambda: os.close(1))
    with process:
        out, err = process.communicate(timeout=30)
    assert (process.returncode, out, err) == (0, "", "")


def test_a_name_that_is_no_text_is_shown_all_the_same(tmp_path):
    folders = [
        write(tmp_path / os.fsdecode(name), weights({MODULES[0][0]: 4}), 4, 8)
        for name in (b"n\xff", b"z")
    ]
    # As where the locale is one of UTF-8.
    with running("digest", *map(str, folders), encoding="utf-8:strict") as process:
        out, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (0, "")
    assert [line.rpartition("/")[2] for line in out.splitlines()] == [r"n\udcff", "z"]
