"""Timers that compare calls with each other: every repetition times each call once, in turn.

Cards change their clocks and machines their load from second to second, so two calls measured
one after the other differ even if they are the same. Here they alternate, and ratios are taken
within a repetition (see `ratios`). The order rotates, so that no call always follows the same one.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

import torch

Call = Callable[[], None]

_WARM_UP = 3
_GRAPH_WARM_UP = 2
_MICROSECONDS = 1e6


class Timer(Protocol):
    """Times calls against each other."""

    @property
    def method(self) -> str:
        """How it measures, in words for a report."""

    def paired(self, calls: Sequence[Call], repetitions: int) -> list[list[float]]:
        """Microseconds of shape [calls, repetitions]; column j was measured in one go."""


class WallTimer:
    """The clock of the host, for calls that have finished when they return.

    Args:
        clock: Seconds.
    """

    method = "wall clock of the host, caches warm"

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock

    def paired(self, calls: Sequence[Call], repetitions: int) -> list[list[float]]:
        """See `Timer`."""
        times: list[list[float]] = [[] for _ in calls]
        for repetition in range(-_WARM_UP, repetitions):
            for i in _rotated(len(calls), repetition):
                begin = self._clock()
                calls[i]()
                elapsed = self._clock() - begin
                if repetition >= 0:
                    times[i].append(elapsed * _MICROSECONDS)
        return times


class GraphTimer:
    """Events around replays of a CUDA graph of the call, with the L2 cache emptied before each.

    A serving engine replays its decode steps as graphs, so the host's time to launch is in
    neither. Between two calls of a layer a step reads many other weights, so the layer finds
    nothing of its own in L2; emptying it is done by reading, because lines that were written
    would have to go back to memory while the call runs. The constant time of a replay is part of
    every figure: `floor` tells it.

    Args:
        device: A CUDA or ROCm device.
    """

    method = "device events around CUDA graph replays, L2 emptied before each"

    def __init__(self, device: torch.device) -> None:
        self._device = device
        # Several times the cache. It also takes the device longer than the host needs to queue
        # what follows, so that the device never waits for the host between the events.
        size = max(256 << 20, 4 * torch.cuda.get_device_properties(device).L2_cache_size)
        self._other_data = torch.zeros(size // 4, dtype=torch.int32, device=device)
        self._sink = torch.zeros((), dtype=torch.int32, device=device)

    def paired(self, calls: Sequence[Call], repetitions: int) -> list[list[float]]:
        """See `Timer`."""
        with torch.cuda.device(self._device):
            graphs = [_capture(call) for call in calls]
            events = [[_event_pair() for _ in range(repetitions)] for _ in calls]
            unused = _event_pair()
            for repetition in range(-_WARM_UP, repetitions):
                for i in _rotated(len(calls), repetition):
                    begin, end = events[i][repetition] if repetition >= 0 else unused
                    torch.amax(self._other_data, dim=0, out=self._sink)
                    begin.record()
                    graphs[i].replay()
                    end.record()
            torch.cuda.synchronize()
            return [[1e3 * begin.elapsed_time(end) for begin, end in pairs] for pairs in events]

    def floor(self, repetitions: int = 50) -> float:
        """Microseconds of replaying a graph of next to nothing, the median."""
        sink = torch.zeros(1, device=self._device)

        def next_to_nothing() -> None:
            sink.zero_()

        times = self.paired([next_to_nothing], repetitions)[0]
        return sorted(times)[len(times) // 2]


def timer_for(device: torch.device) -> GraphTimer | WallTimer:
    """The timer for a device's kernels."""
    return GraphTimer(device) if device.type == "cuda" else WallTimer()


def _rotated(count: int, by: int) -> Iterator[int]:
    return ((i + by) % count for i in range(count))


def _event_pair() -> tuple[torch.cuda.Event, torch.cuda.Event]:
    return torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)


def _capture(call: Call) -> torch.cuda.CUDAGraph:
    # Compiling and the first allocations must not fall into the capture.
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(_GRAPH_WARM_UP):
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph
