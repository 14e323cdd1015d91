"""Messages arrive whole, in order, with their descriptors; nobody waits for a slow reader."""

import os
import resource
import socket
import struct
from pathlib import Path

import pytest

from vllm_multilora.store.protocol.channel import Channel, ChannelClosedError
from vllm_multilora.store.protocol.job_messages import FromJob
from vllm_multilora.store.protocol.messages import (
    Evicted,
    FromClient,
    FromStore,
    Release,
    Segment,
    Used,
)

# A job's failure with one problem, whose only field is fifty thousand lists in one another.
DEEP = b"\x94\xa7Failure\xa7invalid\xa0\x91\x81\xa1x" + b"\x91" * 50_000 + b"\xc0"


@pytest.fixture
def ends():
    left, right = socket.socketpair()
    left.setblocking(False)
    right.setblocking(False)
    yield left, right
    left.close()
    right.close()


def open_descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def received(channel):
    return [message for message, _ in channel.receive()]


def test_messages_arrive_in_order_however_they_are_cut(ends):
    left, right = ends
    sender, receiver = Channel(left, FromStore), Channel(right, FromClient)
    sent = [Used(list(range(n))) for n in range(0, 3000, 500)]
    for message in sent:
        sender.send(message)
    found = []
    while len(found) < len(sent):
        found += received(receiver)
    assert found == sent


def test_a_message_that_comes_byte_by_byte_is_one_message(ends):
    left, right = ends
    whole = Channel(left, FromStore)
    whole.send(Release(5))
    data = right.recv(1000)
    receiver = Channel(right, FromClient)
    for at in range(len(data)):
        left.send(data[at : at + 1])
        assert received(receiver) == ([Release(5)] if at == len(data) - 1 else [])


def test_descriptors_come_with_their_own_message(ends, tmp_path):
    left, right = ends
    sender = Channel(left, FromClient)
    receiver = Channel(right, FromStore, take_descriptors=True)
    (tmp_path / "one").write_bytes(b"one")
    (tmp_path / "two").write_bytes(b"two")
    sender.send(Evicted(1))
    for number, name in enumerate(("one", "two")):
        descriptor = os.open(tmp_path / name, os.O_RDONLY)
        sender.send(Segment(number, 3), [descriptor])
        os.close(descriptor)
    found = []
    while len(found) < 3:
        found += receiver.receive()
    assert [len(descriptors) for _, descriptors in found] == [0, 1, 1]
    assert [os.read(d[0], 9) for _, d in found[1:]] == [b"one", b"two"]
    for _, descriptors in found[1:]:
        os.close(descriptors[0])


def test_a_message_whose_descriptors_cannot_all_be_copied_leaves_none_behind(ends):
    left, _ = ends
    before = open_descriptors()
    sender = Channel(left, FromClient)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    free = [number for number in range(1000) if not Path(f"/proc/self/fd/{number}").exists()]
    resource.setrlimit(resource.RLIMIT_NOFILE, (free[3], hard))  # three more can be opened
    try:
        with pytest.raises(OSError, match="Too many open files"):
            sender.send(Segment(1, 2), [left.fileno()] * 5)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert open_descriptors() == before
    assert sender.pending == 0


def test_descriptors_of_a_message_that_never_came_whole_are_closed(ends):
    left, right = ends
    before = open_descriptors()
    receiver = Channel(right, FromStore, take_descriptors=True)
    socket.send_fds(left, [struct.pack("<IB", 100, 3)], [0, 1, 2])
    assert receiver.receive() == []
    assert open_descriptors() == before + 3
    receiver.close()
    assert open_descriptors() == before - 1  # its own socket, too


def test_descriptors_that_could_not_be_sent_are_closed_with_the_channel(ends):
    left, _ = ends
    sender = Channel(left, FromClient)
    while not sender.pending:
        sender.send(Segment(1, 2))
    before = open_descriptors()
    sender.send(Segment(1, 2), [0, 1, 2])
    assert open_descriptors() == before + 3
    sender.close()
    assert open_descriptors() == before - 1  # its own socket, too


def test_who_takes_no_descriptors_is_not_filled_up_with_them(ends):
    left, right = ends
    before = open_descriptors()
    sender, receiver = Channel(left, FromClient), Channel(right, FromStore)
    sender.send(Segment(1, 2), [0, 1, 2])
    assert [(m, d) for m, d in receiver.receive()] == [(Segment(1, 2), [])]
    assert open_descriptors() == before


def test_a_reader_that_stands_still_costs_memory_up_to_a_limit_and_no_time(ends, monkeypatch):
    monkeypatch.setattr("vllm_multilora.store.protocol.channel.MAX_PENDING", 1 << 20)
    left, right = ends
    sender = Channel(left, FromClient)
    message = Used(list(range(10000)))
    while sender.pending <= 1 << 20:
        sender.send(message)
    with pytest.raises(ChannelClosedError, match="does not read"):
        sender.send(message)
    assert 1 << 20 < sender.pending < 2 << 20
    receiver = Channel(right, FromClient)
    count = 0
    while sender.pending:
        count += len(receiver.receive())
        sender.flush()
    assert count > 0


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (struct.pack("<IB", 1 << 31, 0), "bytes"),
        (struct.pack("<IB", 3, 0) + b"\xff\xff\xff", "makes no sense"),
        (struct.pack("<IB", len(DEEP), 0) + DEEP, "makes no sense"),
        (struct.pack("<IB", 0, 2), "2 descriptors were announced, 0 came"),
    ],
    ids=["huge", "not-msgpack", "deep", "without-its-descriptors"],
)
def test_nonsense_ends_the_connection(ends, data, reason):
    left, right = ends
    left.send(data)
    with pytest.raises(ChannelClosedError, match=reason):
        Channel(right, FromJob, take_descriptors=True).receive()


def test_descriptors_that_come_with_nonsense_are_closed(ends):
    left, right = ends
    before = open_descriptors()
    receiver = Channel(right, FromStore, take_descriptors=True)
    socket.send_fds(left, [struct.pack("<IB", 1, 2) + b"\xff"], [0, 1])
    with pytest.raises(ChannelClosedError, match="makes no sense"):
        receiver.receive()
    assert open_descriptors() == before


def test_the_end_of_the_other_side_is_seen_by_both_directions(ends):
    left, right = ends
    channel = Channel(right, FromClient)
    assert channel.receive() == []
    left.close()
    with pytest.raises(ChannelClosedError, match="closed"):
        channel.receive()
    with pytest.raises(ChannelClosedError):
        channel.send(Evicted(1))
