"""Replays one graph over changing batches while slots are filled beside it, checked bit by bit.

    python -m tools.gpu.stress [--replays 3000] [--out stress.json]

A case ends early where `GPU_SECONDS` in the environment says that time is up; the result tells how
many replays there were.

The plan is updated before each replay and nobody waits for it; the kernels' programmatic dependent
launches meet every mix of adapters. Another thread fills slots that no batch uses on a stream of
its own. Expected are the bits of the same call made by itself. Without a GPU it runs in Triton's
interpreter, at tiny sizes and without streams: that shows that the command works.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import threading
import time
from collections.abc import Callable
from contextlib import nullcontext
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch

if __name__ == "__main__" and not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported

import tools.kernels
from multilora_kernels import PreparedLinear, SlotIndex, SlotTable
from tools.kernels.measure.batches import LAYERS, BatchSpec, LayerBatch, build
from tools.kernels.measure.contenders import by_column
from tools.kernels.measure.environment import command_arguments, current_environment

assert tools.kernels  # finds the checkout's kernels
SLOTS, FILLED = 16, 2  # the last ones are filled meanwhile, and in no batch
MIXES = 12 if torch.cuda.is_available() else 4


def specs(*, on_gpu: bool) -> list[BatchSpec]:
    """The layers and batches."""
    if not on_gpu:
        tiny = LAYERS["8b.qkv"].scaled(128)
        return [BatchSpec(tiny, 3, "distinct", ranks=16, max_loras=SLOTS, max_rank=16)]
    return [
        BatchSpec(LAYERS[name], tokens, "distinct", max_loras=SLOTS)
        for name, tokens in (("8b.qkv", 32), ("8b.o", 1), ("8b.down", 256))
    ]


def mixes(tokens: int, seed: int = 0) -> list[np.ndarray[Any, Any]]:
    """Batches of many kinds: nobody, one adapter, few, all, rows without one."""
    generator, used = np.random.default_rng(seed), SLOTS - FILLED
    found = [np.full(tokens, -1), np.zeros(tokens, np.int64), np.arange(tokens) % used]
    while len(found) < MIXES:
        few = generator.integers(-1, used, size=int(generator.integers(1, used)))
        found.append(generator.choice(few, tokens))
    return found


def wrong_replays(batch: LayerBatch, replays: int, seconds: float) -> tuple[int, int]:
    """Replays whose result has other bits than the call by itself, and how many there were."""
    end = time.monotonic() + seconds
    linear = PreparedLinear(
        batch.lora_a, batch.lora_b, batch.ranks, batch.plan.layout, backend="triton"
    )
    y, start = batch.y, torch.randn_like(batch.y)

    def call() -> None:
        y.copy_(start)
        linear(y, batch.x, batch.plan)

    expected = []
    plans = mixes(batch.x.size(0))
    for slots in plans:
        batch.plan.update(slots)
        call()
        expected.append(y.clone())
    replay = captured(call)
    wrong = torch.zeros((), dtype=torch.int64, device=y.device)
    done = 0
    for i in range(replays):
        if i and time.monotonic() > end:
            break
        batch.plan.update(plans[i * 7 % MIXES])
        replay()
        wrong += (y.view(torch.int16) != expected[i * 7 % MIXES].view(torch.int16)).any()
        done += 1
    return int(wrong.item()), done


def captured(call: Callable[[], None]) -> Callable[[], None]:
    """A graph of the call; without a GPU the call itself."""
    if not torch.cuda.is_available():
        return call
    graph = torch.cuda.CUDAGraph()
    # What the other thread does meanwhile is not for the graph, nor a reason to give it up.
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        call()
    return graph.replay


class Filling:
    """Fills the last slots in turn until it is told to end, and looks at what has arrived."""

    def __init__(self, batch: LayerBatch, times: int | None = None) -> None:
        # Before there are two threads to import it.
        import_module("multilora_kernels.triton.spread")
        self._table = SlotTable(batch.lora_a, batch.lora_b)
        self._batch, self._times = batch, times
        self.wrong = self.done = 0
        self.error: BaseException | None = None
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> Filling:
        if torch.cuda.is_available():
            self._thread.start()
        else:
            self._run()  # the interpreter takes one thread
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        if self._thread.ident is not None:
            self._thread.join()
        if self.error is not None:
            raise self.error

    def _run(self) -> None:
        try:
            on_gpu = torch.cuda.is_available()
            with torch.cuda.stream(torch.cuda.Stream()) if on_gpu else nullcontext():
                while not self._end.is_set() or self.done < (self._times or 1):
                    self._fill(SLOTS - 1 - self.done % FILLED, seed=self.done)
                    self.done += 1
                    if self._times and self.done >= self._times:
                        break
        except BaseException as error:  # is raised where the thread is joined
            self.error = error

    def _fill(self, slot: int, seed: int) -> None:
        batch, on_gpu = self._batch, torch.cuda.is_available()
        generator = torch.Generator().manual_seed(seed)
        rank = int(torch.randint(1, batch.spec.max_rank + 1, (), generator=generator))

        def matrix(rows: int, columns: int) -> torch.Tensor:
            values = torch.randn(rows, columns, generator=generator).to(batch.x.dtype)
            return values.pin_memory() if on_gpu else values

        a = [matrix(rank, each.size(-1)) for each in batch.lora_a]
        b = [matrix(rank, each.size(-2)) for each in batch.lora_b]  # by column, as the slots
        ranks = np.full(len(a), rank, np.int32)
        index = SlotIndex(
            np.arange(len(a), dtype=np.int32),
            ranks,
            ranks,
            np.array([each.data_ptr() for each in a], np.int64),
            np.array([each.data_ptr() for each in b], np.int64),
        )
        self._table.scatter(slot, index, backend="triton")
        if on_gpu:
            torch.cuda.current_stream().synchronize()
        for host_a, host_b, in_a, in_b in zip(a, b, batch.lora_a, batch.lora_b, strict=True):
            same = in_a[slot, 0, :rank].cpu().equal(host_a)
            self.wrong += not (same and in_b[slot, 0, :, :rank].mT.cpu().equal(host_b))


def main(arguments: list[str] | None = None) -> int:
    """Prints and writes what was found; 1 if any bit was wrong."""
    on_gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(prog="python -m tools.gpu.stress")
    parser.add_argument("--replays", type=int, default=3000 if on_gpu else MIXES)
    parser.add_argument("--out", type=Path)
    chosen = parser.parse_args(arguments)
    device = torch.device("cuda" if on_gpu else "cpu")
    result: dict[str, Any] = {
        **current_environment(device, "tools.gpu.stress", command_arguments(arguments)).facts(),
        "measured": on_gpu,
        "cases": {},
    }
    wrong, seconds = 0, float(os.environ.get("GPU_SECONDS", "3600"))
    todo = specs(on_gpu=on_gpu)
    for spec in todo:
        batch = by_column(build(spec, device))
        with Filling(batch, None if on_gpu else 2) as filling:
            failed, replays = wrong_replays(batch, chosen.replays, seconds / len(todo))
        wrong += failed + filling.wrong
        result["cases"][f"{spec.layer.name}, {spec.tokens} tokens"] = {
            "replays": replays,
            "wrong_replays": failed,
            "slots_filled": filling.done,
            "wrong_slots": filling.wrong,
        }
    print(json.dumps(result, indent=1))
    if chosen.out:
        chosen.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
