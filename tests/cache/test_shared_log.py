"""The log's rings, in memory of one process: order, overflow, torn and corrupt entries."""

import sys
import threading

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_multilora.cache import shared_log
from vllm_multilora.cache.load_failures import FailureKind, LoadFailure
from vllm_multilora.cache.readiness_events import (
    ENTRY_BYTES,
    MESSAGE_BYTES,
    Displaced,
    Failed,
    Lost,
    Missed,
    MissedReason,
    Placed,
    Ready,
    cut_utf8,
    decode,
    encode,
    sequence_of,
)
from vllm_multilora.cache.shared_log import LogLayout, LogReader, LogWriter, SharedLogError

OVERFLOW = Missed(MissedReason.OVERFLOW)
CORRUPT = Missed(MissedReason.CORRUPT)
EVENTS = [
    Ready(1, 7),
    Lost(2),
    Placed(4, 1 << 40),
    Displaced(-4),
    Failed(3, 8, LoadFailure(FailureKind.NO_MEMORY, "läuft über")),
    Failed(4, 9, LoadFailure(FailureKind.GONE, "")),
]


class Log:
    """A log in a bytearray with its reader and writers."""

    def __init__(self, ranks=1, capacity=8):
        self.layout = LogLayout(ranks, capacity)
        self.memory = bytearray(self.layout.size)
        self.layout.write_to(self.memory)
        self.writers = [LogWriter(self.memory, rank) for rank in range(ranks)]
        self.reader = LogReader(self.memory)

    def spoil(self, sequence, offset, rank=0):
        """Flips a bit of an entry."""
        self.memory[self.layout.entry_at(rank, sequence) + offset] ^= 4

    def set_head(self, head, rank=0):
        at = self.layout.heads_at + 8 * rank
        self.memory[at : at + 8] = head.to_bytes(8, "little")


def test_events_come_out_as_they_went_in_and_once():
    log = Log()
    for event in EVENTS:
        log.writers[0].append(event)
    assert log.reader.drain() == [(0, event) for event in EVENTS]
    assert log.reader.drain() == []


def test_each_rank_has_its_own_order():
    log = Log(ranks=3)
    log.writers[2].append(Ready(1, 1))
    log.writers[0].append(Ready(1, 1))
    log.writers[2].append(Lost(1))
    assert log.reader.drain() == [(0, Ready(1, 1)), (2, Ready(1, 1)), (2, Lost(1))]
    log.writers[1].append(Lost(5))
    assert log.reader.drain() == [(1, Lost(5))]


def test_rings_may_go_round_many_times():
    log = Log(capacity=4)
    for turn in range(50):
        events = [Ready(turn, serial) for serial in range(turn % 5)]
        for event in events:
            log.writers[0].append(event)
        assert log.reader.drain() == [(0, event) for event in events]


@pytest.mark.parametrize("excess", [1, 2, 100])
def test_a_reader_that_comes_too_late_is_told_and_goes_on(excess):
    log = Log(ranks=2, capacity=4)
    for serial in range(4 + excess):
        log.writers[1].append(Ready(1, serial))
    log.writers[0].append(Lost(9))
    assert log.reader.drain() == [(0, Lost(9)), (1, OVERFLOW)]
    log.writers[1].append(Ready(1, 1000))
    assert log.reader.drain() == [(1, Ready(1, 1000))]


def test_a_writer_that_comes_round_while_the_reader_reads_is_noticed(monkeypatch):
    log = Log(capacity=2)
    for serial in (0, 1):
        log.writers[0].append(Ready(1, serial))

    def decode_slowly(entry):
        event = decode(entry)
        if event == Ready(1, 0):
            for serial in (2, 3, 4):
                log.writers[0].append(Ready(1, serial))
        return event

    monkeypatch.setattr(shared_log, "decode", decode_slowly)
    assert log.reader.drain() == [(0, Ready(1, 0)), (0, OVERFLOW)]
    log.writers[0].append(Ready(1, 5))
    assert log.reader.drain() == [(0, Ready(1, 5))]


def test_an_entry_whose_bytes_come_after_the_head_is_read_at_a_later_drain():
    """As a processor that reorders stores may show it."""
    log = Log()
    at = log.layout.entry_at(0, 1)
    log.writers[0].append(Ready(1, 0))
    entry = encode(Ready(2, 0), 1)
    log.memory[at : at + 16] = entry[:16]
    log.set_head(2)
    assert log.reader.drain() == [(0, Ready(1, 0))]
    assert log.reader.drain() == []
    log.memory[at : at + len(entry)] = entry
    assert log.reader.drain() == [(0, Ready(2, 0))]


def test_an_entry_of_the_last_round_is_not_taken_for_the_next():
    log = Log(capacity=2)
    log.writers[0].append(Ready(1, 0))
    log.writers[0].append(Ready(2, 0))
    log.reader.drain()
    log.set_head(3)
    assert log.reader.drain() == []


@pytest.mark.parametrize("offset", range(36))
def test_a_spoilt_entry_is_given_up_after_a_while_and_the_next_is_read(offset):
    log = Log()
    log.writers[0].append(Ready(0, 1))
    log.writers[0].append(Failed(1, 2, LoadFailure(FailureKind.INVALID, "torn")))
    log.writers[0].append(Ready(2, 3))
    log.spoil(1, offset)
    assert log.reader.drain() == [(0, Ready(0, 1))]
    assert log.reader.drain() == []  # It might still be on its way.
    later = [found for _ in range(100) for found in log.reader.drain()]
    assert later == [(0, CORRUPT), (0, Ready(2, 3))]


@pytest.mark.parametrize("head", [1, 1 << 40, (1 << 64) - 1], ids=["back", "far", "farthest"])
def test_a_spoilt_head_costs_events_but_not_the_log(head):
    log = Log()
    for serial in range(3):
        log.writers[0].append(Ready(1, serial))
    log.reader.drain()
    log.set_head(head)
    assert log.reader.drain() == [(0, OVERFLOW)]
    log.writers[0].append(Ready(1, 3))
    log.reader.drain()
    log.writers[0].append(Ready(1, 4))
    assert log.reader.drain() == [(0, Ready(1, 4))]


@pytest.fixture
def _threads_take_turns_all_the_time():
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(interval)


@pytest.mark.usefixtures("_threads_take_turns_all_the_time")
def test_threads_of_a_process_may_write_at_the_same_time():
    log = Log(capacity=4096)
    start = threading.Barrier(4)

    def write(number):
        start.wait()
        for serial in range(500):
            log.writers[0].append(Ready(number, serial))

    threads = [threading.Thread(target=write, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    events = [event for _, event in log.reader.drain()]
    assert len(events) == 2000
    for number in range(4):
        assert [e.serial for e in events if e.adapter_id == number] == list(range(500))


def test_a_rank_has_one_writer_and_a_log_no_more_ranks_than_it_was_made_for():
    log = Log(ranks=2)
    with pytest.raises(SharedLogError, match="rank 1 is written by process"):
        LogWriter(log.memory, 1)
    for rank in (-1, 2):
        with pytest.raises(SharedLogError, match=f"rank must be 0 to 1 in this log, got {rank}"):
            LogWriter(log.memory, rank)


def test_what_is_no_log_or_another_versions_is_refused():
    log = Log()
    with pytest.raises(SharedLogError, match="found 4 bytes in all"):
        LogReader(bytearray(4))
    with pytest.raises(SharedLogError, match="the same version"):
        LogReader(bytearray(log.layout.size))
    with pytest.raises(SharedLogError, match=r"has \d+ bytes, found \d+"):
        LogReader(log.memory + bytearray(64))


@pytest.mark.parametrize(("ranks", "capacity"), [(0, 1), (1, 0), (1 << 31, 1)])
def test_a_log_has_ranks_and_room(ranks, capacity):
    with pytest.raises(ValueError, match="must be at least 1"):
        LogLayout(ranks, capacity)


@pytest.mark.parametrize("event", [Ready(1 << 63, 1), Ready(1, -1), Lost(-(1 << 63) - 1)])
def test_numbers_that_do_not_fit_are_refused_and_harm_nothing(event):
    log = Log()
    with pytest.raises(ValueError, match="adapter ids must be int64"):
        log.writers[0].append(event)
    log.writers[0].append(Lost(1))
    assert log.reader.drain() == [(0, Lost(1))]


def test_a_closed_writer_writes_nothing():
    log = Log()
    log.writers[0].close()
    log.writers[0].close()
    with pytest.raises(SharedLogError, match="the writer is closed"):
        log.writers[0].append(Lost(1))
    assert log.reader.drain() == []


@pytest.mark.parametrize("text", ["a" * 400, "é" * 400, "語" * 400, "🦙" * 400, "a" + "🦙" * 400])
def test_a_long_message_is_cut_between_characters(text):
    cut = cut_utf8(text, MESSAGE_BYTES)
    assert MESSAGE_BYTES - 4 < len(cut) <= MESSAGE_BYTES
    assert cut.decode().endswith("…")
    assert text.startswith(cut.decode()[:-1])
    log = Log()
    log.writers[0].append(Failed(1, 1, LoadFailure(FailureKind.INVALID, text)))
    ((_, event),) = log.reader.drain()
    assert event.failure.message == cut.decode()


@settings(deadline=None)
@given(text=st.text(), limit=st.integers(3, 40))
def test_any_text_is_cut_to_valid_utf8_that_fits(text, limit):
    cut = cut_utf8(text, limit)
    assert len(cut) <= limit
    cut.decode()
    if len(text.encode()) <= limit:
        assert cut.decode() == text


def test_a_file_name_that_is_no_utf8_can_be_told_of():
    assert cut_utf8("adapters/\udcff", 40) == b"adapters/?"


@settings(deadline=None)
@given(
    event=st.one_of(
        st.builds(Ready, st.integers(-(1 << 63), (1 << 63) - 1), st.integers(0, (1 << 64) - 1)),
        st.builds(Lost, st.integers(0, 1 << 40)),
        st.builds(
            Failed,
            st.integers(0, 1 << 40),
            st.integers(0, 1 << 40),
            st.builds(LoadFailure, st.sampled_from(FailureKind), st.text(max_size=80)),
        ),
    ),
    sequence=st.integers(0, (1 << 64) - 1),
    bit=st.integers(0, 8 * ENTRY_BYTES - 1),
)
def test_an_entry_is_what_was_written_or_nothing(event, sequence, bit):
    entry = bytearray(encode(event, sequence))
    length = len(entry)
    entry.extend(b"\xa5" * (ENTRY_BYTES - length))
    assert decode(bytes(entry)) == event
    assert sequence_of(bytes(entry)) == sequence
    entry[bit // 8] ^= 1 << bit % 8
    if bit // 8 < length:
        assert decode(bytes(entry)) is None
    else:
        assert decode(bytes(entry)) == event
