"""A store reads an adapter of its own before it forks, and leaves nothing behind."""

import tempfile
import threading
from pathlib import Path

from vllm_multilora.store.jobs.adapter_reader import AdapterReader
from vllm_multilora.store.rehearsal import rehearse


def held() -> set[object]:
    """This process's threads and descriptors; what an earlier test left may end meanwhile."""
    return {*threading.enumerate(), *(path.name for path in Path("/proc/self/fd").iterdir())}


def test_rehearsal_when_it_ends_leaves_no_thread_file_or_descriptor(tmp_path, monkeypatch):
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    reader = AdapterReader()
    before = held()
    assert rehearse(reader)
    assert held() <= before
    assert not list(folder.iterdir())


def test_rehearsal_when_no_adapter_can_be_written_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "missing"))
    assert not rehearse(AdapterReader())


def test_rehearsal_when_jobs_fail_says_so(tmp_path, monkeypatch):
    class Reader(AdapterReader):
        def open(self, path, rules):
            raise OSError("the disk is gone")

    assert not rehearse(Reader())
