"""Loaders for tests: loads that go on only when let, and a record of what was loaded and told."""

import threading
import time
import weakref
from collections import defaultdict
from contextlib import contextmanager

from vllm_multilora.cache.loader import BackgroundLoader

PATIENCE_S = 20.0
"""How long a test waits for a thread before it fails; never reached when all is well."""

HANG_S = 0.2
"""When a load is given up; long enough for one that does not hang, on a busy machine."""


class Gate:
    """A load function whose loads wait until opened; the request is the adapter's id."""

    def __init__(self, *, closed=()):
        self.started = []
        self.at_once = 0
        self.most_at_once = 0
        self.outcomes = {}
        self._closed = set(closed)
        self._changed = threading.Condition()

    def load(self, adapter_id):
        with self._changed:
            self.started.append(adapter_id)
            self.at_once += 1
            self.most_at_once = max(self.most_at_once, self.at_once)
            self._changed.notify_all()
            while adapter_id in self._closed:
                self._changed.wait()
            self.at_once -= 1
            outcome = self.outcomes.get(adapter_id)
        if isinstance(outcome, BaseException):
            raise outcome
        return f"weights {adapter_id}" if outcome is None else outcome

    def open(self, *adapter_ids):
        with self._changed:
            self._closed -= set(adapter_ids)
            self._changed.notify_all()

    def open_all(self):
        self.open(*list(self._closed))

    def wait_started(self, count):
        """Waits until so many loads have begun, and returns all that have."""
        with self._changed:
            assert self._changed.wait_for(lambda: len(self.started) >= count, PATIENCE_S)
            return list(self.started)


class Told:
    """What `on_done` was called with, in order."""

    def __init__(self):
        self.entries = []
        self._changed = threading.Condition()

    def __call__(self, adapter_id, report):
        with self._changed:
            self.entries.append((adapter_id, report))
            self._changed.notify_all()

    def wait(self, count=1):
        """Waits until so many calls were made, and returns all that were."""
        with self._changed:
            assert self._changed.wait_for(lambda: len(self.entries) >= count, PATIENCE_S)
            return list(self.entries)

    def by_adapter(self):
        reports = defaultdict(list)
        for adapter_id, report in self.entries:
            reports[adapter_id].append(report)
        return reports


def eventually(condition):
    """Waits for what other threads bring about without telling."""
    end = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < end, "it did not come about"
        time.sleep(0.001)


_of_others: weakref.WeakSet[threading.Thread] = weakref.WeakSet()


@contextmanager
def make_loader(gate, told, **options):
    settings = {
        "threads": 2,
        "staged_limit": 8,
        "timeout_s": PATIENCE_S,
        "retry_delay_s": PATIENCE_S,
    }
    _of_others.clear()
    _of_others.update(threading.enumerate())
    loader = BackgroundLoader(gate.load, on_done=told, **(settings | options))
    try:
        yield loader
    finally:
        gate.open_all()
        assert loader.close(PATIENCE_S)


@contextmanager
def waiting(loader, adapter_id, **options):
    """A thread that waits for an adapter; its outcome is in the list once the block is left."""
    outcome = []

    def wait():
        try:
            outcome.append(loader.wait(adapter_id, adapter_id, timeout_s=PATIENCE_S, **options))
        except Exception as error:
            outcome.append(error)

    thread = threading.Thread(target=wait, daemon=True)
    thread.start()
    yield outcome
    thread.join(PATIENCE_S)
    assert not thread.is_alive()


def loader_threads():
    """The threads of the loader made last; engines of other tests may have left theirs."""
    threads = [t for t in threading.enumerate() if t not in _of_others]
    return [t for t in threads if t.name.startswith("multilora-load-")]
