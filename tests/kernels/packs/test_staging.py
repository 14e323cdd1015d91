"""Steps are prepared ahead of the device: their copies never mix, and seldom hold up the host."""

import numpy as np
import pytest
import torch

from multilora_kernels import BatchPlan, PlanLayout
from multilora_kernels.batch import staging
from multilora_kernels.batch.staging import BUFFERS, StagingRing


class LateDevice:
    """A tensor on a device whose copies run only when somebody waits for them; and its events."""

    device = torch.device("meta")
    shape, dtype = torch.Size([4]), torch.int32

    def __init__(self) -> None:
        self.values = torch.zeros(4, dtype=torch.int32)
        self.arrived: list[list[int]] = []
        self.waits = 0
        self._queue: list[tuple[slice, torch.Tensor]] = []
        self._done = 0

    def __getitem__(self, part: slice) -> "LateDevice.Part":
        return LateDevice.Part(self, part)

    def run_to(self, end: int) -> None:
        for part, source in self._queue[self._done : end]:
            self.values[part] = source
            self.arrived.append(self.values.tolist())
        self._done = max(self._done, end)

    class Part:
        def __init__(self, device: "LateDevice", part: slice) -> None:
            self._device, self._part = device, part

        def copy_(self, source: torch.Tensor, *, non_blocking: bool) -> None:
            assert non_blocking
            # What it holds is read later, as the device does.
            self._device._queue.append((self._part, source))

    class Event:
        def __init__(self, device: "LateDevice") -> None:
            self._device, self._point = device, 0

        def record(self) -> None:
            self._point = len(self._device._queue)

        def synchronize(self) -> None:
            self._device.waits += self._point > self._device._done
            self._device.run_to(self._point)


def send(ring: StagingRing, values: list[int]) -> None:
    ring.open()[: len(values)] = values
    ring.send(len(values))


@pytest.fixture
def device() -> LateDevice:
    return LateDevice()


@pytest.fixture
def ring(device, monkeypatch) -> StagingRing:
    monkeypatch.setattr(staging, "copy_event", lambda _: device.Event(device))
    return StagingRing(device)


def test_as_many_steps_as_there_are_buffers_are_queued_without_waiting(device, ring):
    for step in range(BUFFERS):
        send(ring, [step, step, step, step])
    assert (device.waits, device.arrived) == (0, [])


def test_a_buffer_is_written_again_only_after_its_own_copy(device, ring):
    for step in range(1, BUFFERS + 3):
        send(ring, [step] * 4)
    assert device.waits == 2
    assert device.arrived == [[1] * 4, [2] * 4]
    device.run_to(BUFFERS + 2)
    assert device.arrived == [[step] * 4 for step in range(1, BUFFERS + 3)]


def test_nothing_waits_for_a_device_that_keeps_up(device, ring):
    for step in range(1, 10):
        send(ring, [step])
        device.run_to(step)
    assert device.waits == 0


def test_values_behind_those_that_are_sent_stay(device, ring):
    send(ring, [1, 2, 3, 4])
    send(ring, [7])
    device.run_to(2)
    assert device.arrived == [[1, 2, 3, 4], [7, 2, 3, 4]]


def test_values_before_those_that_are_sent_stay(device, ring):
    send(ring, [1, 2, 3, 4])
    ring.open()[:] = 7
    ring.send(3, 2)
    device.run_to(2)
    assert device.arrived[-1] == [1, 2, 7, 4]


def test_what_is_sent_within_one_copy_leaves_together_at_its_end(device, ring):
    for step in range(1, BUFFERS + 1):
        with ring.one_copy():
            ring.open()[1] = step
            ring.send(2, 1)
            ring.open()[3] = 10 * step
            ring.send(4, 3)
        device.run_to(step)
        assert device.arrived[step - 1 :] == [[0, step, 0, 10 * step]]
    assert device.waits == 0


def test_a_step_that_fails_sends_nothing(device, ring):
    def fail() -> None:
        with ring.one_copy():
            ring.open()[:] = 5
            ring.send(4)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    send(ring, [6])
    device.run_to(1)
    assert device.arrived == [[6, 0, 0, 0]]


class Slow:
    """An event of a device that is always behind."""

    made: list["Slow"]

    def __init__(self) -> None:
        self.recorded = self.waits = 0
        self.made.append(self)

    def record(self) -> None:
        self.recorded += 1

    def synchronize(self) -> None:
        self.waits += self.recorded > 0


@pytest.fixture
def events(monkeypatch) -> list[Slow]:
    monkeypatch.setattr(Slow, "made", [], raising=False)
    monkeypatch.setattr(staging, "copy_event", lambda _: Slow())
    return Slow.made


def test_a_plan_does_not_wait_for_the_last_steps_copy(events):
    plan = BatchPlan(PlanLayout(8, 4), "meta")
    addresses = plan.buffer.untyped_storage()._cdata, plan.host.data_ptr()
    for step in range(1, BUFFERS + 2):
        plan.update(np.array([0, -1, step % 4]))
        assert sum(event.waits for event in events) == max(0, step - BUFFERS)
        assert sum(event.recorded for event in events) == step
    assert addresses == (plan.buffer.untyped_storage()._cdata, plan.host.data_ptr())


def test_a_refused_batch_takes_no_buffer(events):
    plan = BatchPlan(PlanLayout(8, 4), "meta")
    for _ in range(2 * BUFFERS):
        with pytest.raises(ValueError, match="between -1 and 3"):
            plan.update(np.array([4]))
    plan.update(np.array([1, -1]))
    assert [event.recorded for event in events].count(1) == 1
    assert (plan.tokens, plan.rows) == (2, 1)


def test_the_plan_that_is_copied_is_the_one_of_its_step():
    """Buffers are used again: what an earlier step left in them is not read."""

    class Recorder(StagingRing):
        def send(self, count: int) -> None:
            sent.append(torch.from_numpy(self._values[self._turn][:count].copy()))

    sent: list[torch.Tensor] = []
    layout = PlanLayout(64, 4, 4)
    plan = BatchPlan(layout, "meta")
    plan._staging = Recorder(plan.buffer)
    batches = [[i % 5 - 1 for i in range(60)], [2], [-1, -1], [3, 0, 3], [1] * 64, [0, 3], [2]]
    for token_slots in batches:
        plan.update(np.array(token_slots))
    for token_slots, found in zip(batches, sent, strict=True):
        expected = BatchPlan(layout)
        expected.update(np.array(token_slots))
        tokens, tiles = expected.tokens, expected.tiles
        for part, count in (
            (slice(0, 6), 6),
            (layout.order, tokens),
            (layout.tile_slot, tiles),
            (layout.tile_start, tiles),
            (layout.tile_length, tiles),
        ):
            assert found[part][:count].equal(expected.buffer[part][:count])
