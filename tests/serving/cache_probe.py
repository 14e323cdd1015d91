"""Looks at where an engine's adapters are: in slots, in host memory, or nowhere."""

import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from vllm_multilora.integration.engine.adapter_status import METHOD
from vllm_multilora.integration.step.staged_rows import StagedRows

if TYPE_CHECKING:
    from vllm import LLM

_NEWS_S = 0.1  # the store tells of its memory at least this often, when something has changed
_LIMIT_S = 30.0


@dataclass(frozen=True)
class CacheView:
    """An engine's adapters at a moment.

    Attributes:
        slots: The adapter in each slot, as the engine core has decided.
        model_slots: The same as each worker's layers and kernels see it. Workers are not told when
            a slot becomes free.
        host: Adapters in host memory.
        host_adapters: How many adapters the store holds.
        host_bytes: Bytes that they take there, in whole pages.
        own_bytes: Bytes of these adapters without the pages' padding.
        reads: How often each adapter's files were read since the last look.
    """

    slots: tuple[int | None, ...]
    model_slots: tuple[tuple[int | None, ...], ...]
    host: frozenset[int]
    host_adapters: int
    host_bytes: int
    own_bytes: int
    reads: Counter[int]

    @property
    def in_slots(self) -> frozenset[int]:
        """The adapters that are in slots."""
        return frozenset(i for i in self.slots if i is not None)

    @property
    def workers_agree(self) -> bool:
        """Whether every worker has in every slot what the engine core has decided."""
        return all(
            found == requested
            for model_slots in self.model_slots
            for found, requested in zip(model_slots, self.slots, strict=True)
            if requested is not None
        )


def report(llm: "LLM", adapters: Sequence[int] = ()) -> dict[str, Any]:
    """An engine core's own report, as `engine_report` gives it, of these adapters at least."""
    (found,) = llm.collective_rpc(METHOD, timeout=60, args=(list(adapters),))
    return found


def _model_slots(worker: Any) -> tuple[int | None, ...]:
    return tuple(worker.model_runner.lora_manager.model_manager.lora_index_to_id)


def _overwrite_slots(worker: Any) -> None:
    """Runs in the worker: all that level 2 does not keep in vLLM before 0.33."""
    manager = worker.model_runner.lora_manager
    for module in manager.model_manager.modules.values():
        for stacked in (*module.lora_a_stacked, *module.lora_b_stacked):
            stacked.fill_(float("nan"))
    model = manager.model_manager
    buffers = [model._shrink_ranks, model._expand_ranks]
    for wrapper in model.punica_wrapper_mapping.values():
        rows = vars(wrapper.stock_rows).values()
        buffers += [wrapper.plan.buffer, wrapper.output_rows.buffer]
        buffers += [staged.buffer for staged in rows if isinstance(staged, StagedRows)]
    for buffer in buffers:
        buffer.fill_(-(2**30))
    manager.slots_lost()
    # Zeros, and -1 for rows without a slot: what an empty batch has.
    assert all(bool(((buffer == 0) | (buffer == -1)).all()) for buffer in buffers)


class CacheProbe:
    """Watches an engine's adapters from now on; the engine forgets those that it knows."""

    def __init__(self, llm: "LLM") -> None:
        self._llm = llm
        for row in report(llm)["adapters"]:
            llm.llm_engine.remove_lora(row["int_id"])
        self._loads: Counter[int] = Counter()
        deadline = time.monotonic() + _LIMIT_S
        while True:  # the store tells what its memory holds in its own time
            seen = self.look()
            if (seen.in_slots, seen.host, seen.host_bytes) == (frozenset(), frozenset(), 0):
                return
            assert time.monotonic() < deadline, seen
            time.sleep(0.05)

    def look(self) -> CacheView:
        """The adapters now, once nothing changes any more; forgets the reads so far."""
        found = self._settled()
        rows = found["adapters"]
        slots: list[int | None] = [None] * found["slots"]["total"]
        for row in rows:
            if row["slot"] is not None:
                slots[row["slot"]] = row["int_id"]
        loads = Counter({row["int_id"]: row["loads"] for row in rows})
        reads, self._loads = loads - self._loads, loads
        return CacheView(
            slots=tuple(slots),
            model_slots=tuple(self._llm.collective_rpc(_model_slots, timeout=60)),
            host=frozenset(row["int_id"] for row in rows if row["bytes"]),
            host_adapters=found["cpu"]["adapters"],
            host_bytes=found["cpu"]["bytes"],
            own_bytes=sum(row["bytes"] for row in rows),
            reads=reads,
        )

    def _settled(self) -> dict[str, Any]:
        deadline = time.monotonic() + _LIMIT_S
        found, before = self._report(), None
        while found != before:
            assert time.monotonic() < deadline, f"an idle engine's adapters change: {found}"
            time.sleep(_NEWS_S)
            found, before = self._report(), found
        return found

    def _report(self) -> dict[str, Any]:
        """Without the time that it took to make, which differs each time."""
        return {key: value for key, value in report(self._llm).items() if key != "seconds"}

    def lose_slots(self) -> None:
        """Has the engine sleep and wake up; all memory that it may lose on a GPU is overwritten."""
        self._llm.sleep(level=2)
        self._llm.collective_rpc(_overwrite_slots, timeout=60)
        self._llm.wake_up()
