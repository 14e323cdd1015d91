"""An engine core and its workers for tests of the gate: they say only what a test says."""

from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm_multilora.cache.load_failures import LoadFailure
from vllm_multilora.cache.readiness_events import Event, Ready
from vllm_multilora.cache.readiness_log import ReadinessLog, attach_writer

if TYPE_CHECKING:
    from vllm.lora.request import LoRARequest

RANKS = 2
PROBLEM = {"message": "adapter_config.json is missing", "hint": ""}
Orders = list[tuple[str, int]]


def lora(number: int, path: str = "", *, load_inplace: bool = False) -> "LoRARequest":
    from vllm.lora.request import LoRARequest

    return LoRARequest(
        f"customer-{number}", number, path or f"/adapters/{number}", load_inplace=load_inplace
    )


class Executor:
    """Stands in for vLLM's: keeps what is asked of the workers, and answers for them."""

    def __init__(self) -> None:
        self.calls: list[list[Any]] = []
        self.replies: list[Future[list[None]]] = []
        self.failures: dict[int, LoadFailure] = {}
        """What the last rank answers where it is to load at once, by adapter."""
        self.ensured: list[int] = []

    def collective_rpc(
        self, function: Callable[..., Any], args: tuple[Any, ...] = (), non_block: bool = False
    ) -> Any:
        from vllm_multilora.integration import worker_calls

        if function is worker_calls.problems:
            return [[], [PROBLEM]]
        if function is worker_calls.ensure:
            self.ensured.append(args[0].lora_int_id)
            return [None, self.failures.get(args[0].lora_int_id)]
        assert function is worker_calls.carry_out
        self.calls.append(list(args[0]))
        if not non_block:
            return [None] * RANKS
        self.replies.append(Reply())
        return self.replies[-1]

    def take(self) -> Orders:
        """The orders sent since the last look, by kind and adapter."""
        orders = [order for call in self.calls for order in call]
        self.calls.clear()
        return [
            (type(o).__name__, o.request.lora_int_id if hasattr(o, "request") else o.lora_id)
            for o in orders
        ]


class Reply(Future[list[None]]):
    """Has arrived, and knows whether it was read."""

    def __init__(self) -> None:
        super().__init__()
        self.was_read = False
        self.set_result([None] * RANKS)

    def result(self, timeout: float | None = None) -> list[None]:
        self.was_read = True
        return super().result(timeout)


class Engine:
    """A gate between an executor and the log that its workers write to."""

    def __init__(self, folder: Path) -> None:
        from vllm_multilora.integration.adapter_gate import BackgroundGate

        self.executor = Executor()
        log = ReadinessLog("gate", RANKS, capacity=8, folder=folder)
        self._writers = [attach_writer(log.path, rank) for rank in range(RANKS)]
        log.seal()
        self.gate: BackgroundGate = BackgroundGate(
            self.executor.collective_rpc, log, RANKS, wake=None
        )
        self._log = log

    def newest_serial(self, number: int) -> int:
        """The serial number with which the adapter was asked for last."""
        return next(
            order.serial
            for call in reversed(self.executor.calls)
            for order in reversed(call)
            if getattr(order, "request", None) is not None and order.request.lora_int_id == number
        )

    def say(self, event: Event, ranks: tuple[int, ...] = (0, 1)) -> None:
        for rank in ranks:
            self._writers[rank].append(event)

    def load(self, number: int) -> int:
        """Has an adapter loaded on all ranks; the serial number of the request."""
        self.gate.want(lora(number))
        self.gate.poll()
        serial = self.newest_serial(number)
        self.say(Ready(number, serial))
        self.gate.poll()
        self.executor.take()
        return serial

    def close(self) -> None:
        for end in (*self._writers, self._log):
            end.close()
