"""`vllm-multilora store`: a store that is run by hand, and what `--describe` shows of any store."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from tests.adapters.checkpoints import MODULES, layout, weights, write
from tests.store.conftest import Engine
from vllm_multilora.cli import main
from vllm_multilora.store.clients.client import StoreClient
from vllm_multilora.store.protocol.messages import ClientRow, Description, Loaded, Totals
from vllm_multilora.store.protocol.store_folder import StoreUnavailableError, socket_path
from vllm_multilora.store.store_launch import RunningStore, StoreProcess
from vllm_multilora.toolbox.commands import store as command

pytestmark = pytest.mark.waits

SOON_S = 20.0


@pytest.fixture
def by_hand(store_folder):
    """A store that is run by hand, and what it has printed."""
    process = subprocess.Popen(
        [sys.executable, "-m", "vllm_multilora.cli", "store"], stdout=subprocess.PIPE, text=True
    )
    printed = [process.stdout.readline() for _ in range(2)]
    yield process, printed
    process.kill()
    process.wait()
    process.stdout.close()


def shown(capsys) -> dict:
    assert main(["store", "--describe", "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_it_says_where_it_listens_and_goes_on_between_servers(by_hand, store_folder, capsys):
    process, printed = by_hand
    assert printed == [
        f"the store of this user listens at {socket_path(store_folder)}\n",
        "servers with --enable-lora find it there; Ctrl-C ends it\n",
    ]
    client = StoreClient(StoreProcess(), "a server")
    found = shown(capsys)
    assert found["pid"] == process.pid
    assert found["socket"] == str(socket_path(store_folder))
    assert found["mode"] == "process"
    assert {
        "role": "engine",
        "server": "a server",
        "pid": os.getpid(),
        "load_requests": 0,
        "leases": 0,
    } in (found["clients"])
    client.close()
    time.sleep(2.5)  # longer than a store without --keep would stay
    assert [one["role"] for one in shown(capsys)["clients"]] == ["observer"]


def test_it_keeps_adapters_between_servers(by_hand, tmp_path):
    folder = write(
        tmp_path / "a", weights({module: 4 for module, _, _ in MODULES}), rank=4, alpha=4
    )

    def is_alone() -> bool:
        clients = command.describe(RunningStore(), SOON_S).clients
        return [one.role for one in clients] == ["observer"]

    def load(server: str) -> Loaded:
        engine = Engine(StoreClient(StoreProcess(), server), [layout()])
        found = engine.load(1, str(folder))
        engine.client.close()
        deadline = time.monotonic() + SOON_S
        while not is_alone():
            assert time.monotonic() < deadline
        return found

    assert [load("one").was_read, load("two").was_read] == [True, False]


def test_ctrl_c_ends_it_and_leaves_nothing_behind(by_hand, store_folder):
    process, _ = by_hand
    command.describe(RunningStore(), SOON_S)  # it is up
    process.send_signal(signal.SIGINT)
    assert process.wait(SOON_S) == 0
    assert not socket_path(store_folder).exists()


def test_a_second_one_is_refused(by_hand, store_folder, capsys):
    assert main(["store"]) == 2
    assert f"is already running at {socket_path(store_folder)}" in capsys.readouterr().err


def test_the_place_of_a_store_that_was_killed_is_taken(by_hand, store_folder):
    process, _ = by_hand
    process.kill()
    process.wait()
    with command._listen() as listener:
        assert listener.getsockname() == str(socket_path(store_folder))


def test_describing_starts_no_store(store_folder, capsys):
    assert main(["store", "--describe"]) == 2
    assert f"no store of this user is running (none listens at {socket_path(store_folder)})" in (
        capsys.readouterr().err
    )
    assert not socket_path(store_folder).exists()


def test_a_store_that_does_not_answer_is_given_up(by_hand):
    process, _ = by_hand
    command.describe(RunningStore(), SOON_S)
    process.send_signal(signal.SIGSTOP)
    with pytest.raises(StoreUnavailableError, match=r"not answered within 0\.2 seconds"):
        command.describe(RunningStore(), patience_s=0.2)


def test_json_without_describe_is_refused(store_folder, capsys):
    assert main(["store", "--json"]) == 2
    assert "needs --describe" in capsys.readouterr().err


def test_the_table_names_memory_loads_protection_and_clients():
    lines = command.table(
        Description(
            pid=70,
            mode="process",
            protection=["limits of time", "seccomp"],
            clients=[
                ClientRow("engine", "vllm-1", 41, 2, 1),
                ClientRow("worker", "vllm-1", 5, 0, 0),
            ],
            totals=Totals(560_000_000, 12, 8_000_000_000, None),
            segment_bytes=640_000_000,
            queued=3,
            reading=2,
            stuck=1,
        ),
        "/run/store-1.sock",
    )
    assert lines == [
        "store        process 70, at /run/store-1.sock",
        "checks       limits of time, seccomp",
        "host memory  12 adapters, 0.52 GiB of 7.45 GiB; its segments take 0.60 GiB",
        "loads        3 waiting, 2 under way, 1 killed that do not end",
        "",
        "CLIENT  SERVER  PROCESS  WANTS  LEASES",
        "engine  vllm-1       41      2       1",
        "worker  vllm-1        5      0       0",
    ]
