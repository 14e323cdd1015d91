"""Workers tell their engine core what has become of its orders, over real sockets."""

import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest

from vllm_multilora.failures import FailureKind
from vllm_multilora.integration.worker_link import fill_link
from vllm_multilora.integration.worker_link.fill_link import (
    PATH_VARIABLE,
    Filled,
    FillFailed,
    FillLink,
    Missing,
    WorkerLink,
    attach_worker,
)
from vllm_multilora.store.protocol.store_folder import FOLDER_VARIABLE

PATIENT_S = 10.0


@pytest.fixture
def link():
    link = FillLink(2)
    yield link
    link.close()


def take(link: FillLink, count: int) -> list:
    deadline = time.monotonic() + PATIENT_S
    found: list = []
    while len(found) < count:
        assert time.monotonic() < deadline, f"only {found}"
        found += link.poll()
    return found


def test_answers_arrive_in_order_each_with_its_rank(link):
    workers = [WorkerLink.attach(link.path, rank) for rank in (1, 0)]
    assert link.attach_all() == []
    assert link.poll() == []
    said = [Filled(1, 0.5), FillFailed(2, FailureKind.NO_MEMORY, "no room"), Missing(3)]
    for answer in said:
        workers[0].tell(answer)
    workers[1].tell(Filled(1, 0.25))
    found = take(link, 4)
    assert [answer for rank, answer in found if rank == 1] == said
    assert [answer for rank, answer in found if rank == 0] == [Filled(1, 0.25)]


def test_what_is_said_ends_a_wait(link):
    workers = [WorkerLink.attach(link.path, rank) for rank in (0, 1)]
    assert link.attach_all() == []
    assert link.poll(0.001) == []
    saying = threading.Timer(0.05, workers[0].tell, (Filled(1, 0.5),))
    saying.start()
    begin = time.monotonic()
    assert link.poll(PATIENT_S) == [(0, Filled(1, 0.5))]
    assert time.monotonic() - begin < PATIENT_S
    saying.join()


def test_workers_that_have_not_connected_are_named_and_nobody_comes_later(link):
    WorkerLink.attach(link.path, 1)
    assert link.attach_all() == [0]
    assert not link.path.exists()
    with pytest.raises(FileNotFoundError):
        WorkerLink.attach(link.path, 0)


@pytest.mark.parametrize("rank", [-1, 1, 2], ids=["negative", "twice", "too high"])
def test_a_rank_that_is_none_or_has_connected_is_sent_away(link, caplog, rank):
    worker = WorkerLink.attach(link.path, 1)
    other = WorkerLink.attach(link.path, rank)
    assert link.attach_all() == [0]
    assert f"as rank {rank} of 2" in caplog.text
    other.tell(Filled(1, 0.5))
    worker.tell(Filled(2, 0.5))
    assert take(link, 1) == [(1, Filled(2, 0.5))]


@pytest.mark.parametrize("words", [b"", b"GET / HTTP/1.1\r\n\r\n"], ids=["silent", "nonsense"])
def test_whoever_is_no_worker_is_sent_away(link, monkeypatch, words):
    monkeypatch.setattr(fill_link, "_ATTACH_LIMIT_S", 0.05)
    with socket.socket(socket.AF_UNIX) as stranger:
        stranger.connect(str(link.path))
        stranger.send(words)
        assert link.attach_all() == [0, 1]
        assert stranger.recv(1) == b""


def test_a_worker_that_has_gone_is_heard_to_its_last_word(link):
    worker, other = WorkerLink.attach(link.path, 0), WorkerLink.attach(link.path, 1)
    link.attach_all()
    worker.tell(Filled(1, 0.5))
    worker._channel.close()
    assert take(link, 1) == [(0, Filled(1, 0.5))]
    assert link.poll() == []
    other.tell(Filled(2, 0.5))
    assert take(link, 1) == [(1, Filled(2, 0.5))]


def test_a_worker_without_an_engine_core_goes_on(link, caplog):
    worker = WorkerLink.attach(link.path, 0)
    link.attach_all()
    link.close()
    for _ in range(2):
        worker.tell(Filled(1, 0.5))
    assert "does not hear this worker" in caplog.text


def test_threads_of_a_worker_do_not_mix_their_words(link):
    worker = WorkerLink.attach(link.path, 0)
    link.attach_all()
    text = "it is broken " * 1000

    def talk(number: int) -> None:
        for order in range(50):
            worker.tell(FillFailed(1000 * number + order, FailureKind.INTERNAL, text))

    threads = [threading.Thread(target=talk, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    found = [answer for _, answer in take(link, 200)]
    for thread in threads:
        thread.join()
    assert all(answer.message == text for answer in found)
    for number in range(4):
        own = [answer.order % 1000 for answer in found if answer.order // 1000 == number]
        assert own == list(range(50))


def test_an_engine_core_that_sleeps_is_woken_once_until_it_looks(link):
    worker = WorkerLink.attach(link.path, 0)
    link.attach_all()
    woken = threading.Semaphore(0)
    link.start_waking(woken.release)
    for round_ in range(2):
        worker.tell(Filled(2 * round_, 0.5))
        worker.tell(Filled(2 * round_ + 1, 0.5))
        assert woken.acquire(timeout=PATIENT_S)
        assert not woken.acquire(timeout=0.05)
        take(link, 2)


def test_a_link_leaves_nothing_behind():
    before = psutil.Process().num_fds()
    link = FillLink(1)
    worker = WorkerLink.attach(link.path, 0)
    link.attach_all()
    link.start_waking(lambda: None)
    worker._channel.close()
    link.close()
    link.close()
    assert psutil.Process().num_fds() <= before
    assert not link.path.exists()


def test_what_is_left_by_an_engine_core_killed_at_its_start_is_removed_by_the_next_one(
    monkeypatch, tmp_path
):
    monkeypatch.setenv(FOLDER_VARIABLE, str(tmp_path))
    code = f"from {fill_link.__name__} import *; print(FillLink(1).path, flush=True); os._exit(1)"
    killed = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    left = Path(killed.stdout.strip())
    assert left.is_socket()
    FillLink(1).close()
    assert not left.exists()


def test_a_worker_finds_its_engine_core_by_its_environment(link, monkeypatch, tmp_path):
    monkeypatch.delenv(PATH_VARIABLE, raising=False)
    assert attach_worker(0) is None
    monkeypatch.setenv(PATH_VARIABLE, str(tmp_path / "elsewhere"))
    assert attach_worker(0) is None
    monkeypatch.setenv(PATH_VARIABLE, str(link.path))
    assert attach_worker(0) is not None
    assert link.attach_all() == [1]
