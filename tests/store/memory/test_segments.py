"""What a job that gets a segment to write to can do to those that map it."""

import fcntl
import os

import pytest

from vllm_multilora.store.memory.segments import SharedSegments

SIZE = 1 << 20


@pytest.fixture
def segments():
    segments = SharedSegments()
    segments.create(1, SIZE)
    yield segments
    segments.close_all()


@pytest.mark.skipif(not hasattr(os, "memfd_create"), reason="no seals here")
@pytest.mark.parametrize("size", [0, SIZE - 1, SIZE + 1])
def test_nobody_changes_a_segments_size(segments, size):
    with pytest.raises(PermissionError):
        os.ftruncate(segments.descriptor(1), size)
    assert os.fstat(segments.descriptor(1)).st_size == SIZE


@pytest.mark.skipif(not hasattr(os, "memfd_create"), reason="no seals here")
def test_nobody_keeps_the_next_job_from_writing(segments):
    with pytest.raises(PermissionError):
        fcntl.fcntl(segments.descriptor(1), fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE)


def test_pages_of_a_segment_are_given_back(segments):
    descriptor = segments.descriptor(1)
    os.pwrite(descriptor, b"A" * 8192, 0)
    before = os.fstat(descriptor).st_blocks
    segments.give_back(1, 0, 4096)
    assert os.pread(descriptor, 4097, 0) == bytes(4096) + b"A"
    assert os.fstat(descriptor).st_blocks < before


@pytest.mark.parametrize("pinned", [True, False])
def test_pages_that_a_device_has_pinned_are_not_given_back(segments, pinned):
    os.close(segments.open(1, pinned=pinned))
    os.pwrite(segments.descriptor(1), b"A" * 4096, 0)
    segments.give_back(1, 0, 4096)
    assert os.pread(segments.descriptor(1), 1, 0) == (b"A" if pinned else bytes(1))


def test_a_segment_is_a_file_where_there_is_no_anonymous_memory(monkeypatch):
    monkeypatch.delattr(os, "memfd_create")
    segments = SharedSegments()
    segments.create(1, SIZE)
    assert os.fstat(segments.descriptor(1)).st_size == SIZE
    segments.close_all()
