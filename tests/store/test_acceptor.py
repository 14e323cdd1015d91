"""Who comes in to a store, and who is sent away."""

import contextlib
import os
import resource
from collections.abc import Iterator
from pathlib import Path

import pytest

from vllm_multilora.store.connections import Acceptor
from vllm_multilora.store.protocol import store_folder
from vllm_multilora.store.protocol.channel import Channel, ChannelClosedError
from vllm_multilora.store.protocol.messages import FromStore, Refused


def descriptors() -> set[int]:
    return {int(path.name) for path in Path("/proc/self/fd").iterdir()}


@contextlib.contextmanager
def no_descriptor_left() -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    taken = [os.dup(1) for _ in range(max(descriptors()))]  # that many leave no gap
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(taken) + 1, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        for number in taken:
            os.close(number)


@pytest.fixture
def acceptor(tmp_path, monkeypatch) -> Iterator[Acceptor]:
    monkeypatch.chdir(tmp_path)
    before = descriptors()
    acceptor = Acceptor(store_folder.listen(tmp_path / "s.sock"))
    yield acceptor
    acceptor.close()
    assert descriptors() == before


def test_nobody_is_waited_for(acceptor):
    assert acceptor.accept() is None
    with store_folder.connect("s.sock"):
        channel = acceptor.accept()
        assert channel is not None
        assert channel.receive() == []
        channel.close()


def test_for_whom_there_is_no_descriptor_learns_it_and_others_come_in_later(acceptor):
    for _ in range(2):
        with contextlib.closing(Channel(store_folder.connect("s.sock"), FromStore)) as client:
            with no_descriptor_left():
                assert acceptor.accept() is None
            ((refused, _),) = client.receive()
            assert isinstance(refused, Refused)
            assert "ulimit -n" in refused.reason
    with store_folder.connect("s.sock"):
        channel = acceptor.accept()
        assert channel is not None
        channel.close()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can be somebody else")
def test_another_user_is_not_served(acceptor, tmp_path):
    """The folder keeps others away; where somebody has opened it, this does."""
    tmp_path.chmod(0o755)
    (tmp_path / "s.sock").chmod(0o666)
    os.seteuid(12345)
    try:
        client = Channel(store_folder.connect("s.sock"), FromStore)
    finally:
        os.seteuid(0)
    assert acceptor.accept() is None
    with contextlib.closing(client), pytest.raises(ChannelClosedError):
        client.receive()
