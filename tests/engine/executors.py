"""An executor without workers, for what an engine core calls for single adapters."""

from queue import Queue
from types import SimpleNamespace
from typing import Any

from vllm_multilora.integration.engine.executor import AdapterExecutorMixin
from vllm_multilora.integration.engine.scheduling.scheduler import AdapterAwareMixin
from vllm_multilora.integration.worker import worker_calls


class StockExecutor:
    """What vLLM's executor does, written down.

    Attributes:
        called: The methods of workers that were called, in order.
    """

    def __init__(self, vllm_config: Any) -> None:
        self.vllm_config = vllm_config
        self.called: list[Any] = []

    def collective_rpc(self, method: Any, *args: Any, **kwargs: Any) -> list[Any]:
        if method is worker_calls.take_pushed:  # follows calls of other programs'
            return [[]]
        self.called.append(method)
        return [None]


class SchedulerStub(SimpleNamespace):
    """What an executor asks of the scheduler beside it.

    Attributes:
        adapters: The engine's adapters.
        requests: The engine's requests.
        is_connected: Whether it has its adapters.
    """

    def __init__(self, adapters: Any = None) -> None:
        super().__init__(adapters=adapters, requests={}, is_connected=True)


class StartedExecutor(AdapterExecutorMixin, StockExecutor):
    """An executor that has started, beside a scheduler.

    Args:
        scheduler: The scheduler, which has its adapters.
        vllm_config: The engine's configuration; None: one without settings of the plugin.
        inputs: The queue of an engine core in a process of its own; None: its caller takes steps.
    """

    def __init__(
        self,
        scheduler: AdapterAwareMixin | SchedulerStub,
        vllm_config: Any,
        inputs: Queue[Any] | None = None,
    ) -> None:
        StockExecutor.__init__(self, vllm_config or SimpleNamespace(additional_config={}))
        self.inputs, self.beside = inputs, scheduler
        self.serve(scheduler)
