"""How long a call takes on a GPU, inside a CUDA graph and with cold caches."""

from __future__ import annotations

import statistics
from collections.abc import Callable

import torch

Clock = Callable[[Callable[[], None]], float]
"""Seconds that one call takes."""

CALLS = 10
"""Calls in a graph: enough for launches to overlap as they do in a model's graph."""
REPLAYS = 7
"""Replays that are timed; the middle one counts."""
DEFAULT_CACHE_BYTES = 64 << 20
"""Size of the second-level cache where PyTorch does not say."""


class GraphClock:
    """Times calls as a server makes them: replayed from a graph, their weights not in a cache.

    Before each call a buffer larger than the cache is overwritten, as a model's own weights drive
    out an adapter's; a graph of these writes alone is timed once and subtracted.

    Args:
        device: The GPU.
    """

    def __init__(self, device: torch.device) -> None:
        properties = torch.cuda.get_device_properties(device)
        cache = getattr(properties, "L2_cache_size", 0) or DEFAULT_CACHE_BYTES
        self._flood = torch.empty(2 * cache, dtype=torch.uint8, device=device)
        self._floods_s = self._replayed(lambda: None)

    def __call__(self, call: Callable[[], None]) -> float:
        """Seconds of one call; at least one nanosecond."""
        return max((self._replayed(call) - self._floods_s) / CALLS, 1e-9)

    def _replayed(self, call: Callable[[], None]) -> float:
        """Seconds of a replay of `CALLS` calls, each behind a write of the buffer."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            call()  # compiles what it needs, outside of the graph
        stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            for _ in range(CALLS):
                self._flood.zero_()
                call()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        found: list[float] = []
        for _ in range(REPLAYS + 1):  # the first one warms up
            begin.record()
            graph.replay()
            end.record()
            end.synchronize()
            found.append(begin.elapsed_time(end) / 1_000)
        return float(statistics.median(found[1:]))
