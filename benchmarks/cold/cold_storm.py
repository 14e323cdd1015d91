"""One tenant's cold adapter, alone and beside 200 of another tenant's.

The store is a process of its own, as a server starts it. Its client asks for adapters that nobody
has read yet, as an engine core does: first one of a tenant's, alone; then 200 of another tenant's,
and while these are read one more of the first tenant's.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

from benchmarks.cold.intake_cost import layout_of
from benchmarks.harness.registry import Figure, benchmark
from benchmarks.loads.fleet import Fleet
from benchmarks.loads.smollm2 import model_config
from vllm_multilora.store.clients.client import StoreClient
from vllm_multilora.store.protocol.messages import Failed, Loaded, LoadRequest, StoreSettings
from vllm_multilora.store.protocol.store_folder import FOLDER_VARIABLE

RANK, HOST_PLACES = 8, 64
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")
HEAD_START_S = 0.3
"""From the storm's beginning to the other tenant's request."""
LIMIT_S = 120.0


@benchmark(
    workload="adapters of rank 8 on q, k, v and o of SmolLM2-135M, in a store process: one of a "
    "tenant's, alone and beside 200 of another tenant's",
    control="the same tenant's request alone, in the same round",
    figure="milliseconds until the adapter is in host memory",
    compares_to="twice the time alone, the goal",
    quick={"rounds": 1, "storm": 20},
)
def cold_storm(rounds: int = 3, storm: int = 200) -> Iterable[Figure]:
    """One tenant's cold adapter, alone and beside a storm of another tenant's.

    Args:
        rounds: Of both.
        storm: Adapters that the other tenant asks for at once.
    """
    with tempfile.TemporaryDirectory() as name:
        os.environ[FOLDER_VARIABLE] = str(Path(name) / "store")
        fleet = Fleet(Path(name) / "adapters", model_config(), RANK, PROJECTIONS)
        folders = [str(fleet.add(f"a{n}")) for n in range(1 + rounds * (storm + 2))]
        client = StoreClient.connect("process", "benchmark")
        try:
            client.configure(
                [layout_of(_sizes(), RANK, columns_first=True)],
                StoreSettings(budget_adapters=HOST_PLACES),
            )
            asker = _Asker(client, iter(folders))
            asker.wait_for(asker.ask("quiet"))  # which starts what reads
            alone, beside = [], []
            for _ in range(rounds):
                alone.append(1000 * asker.wait_for(asker.ask("quiet")))
                others = [asker.ask("noisy") for _ in range(storm)]
                time.sleep(HEAD_START_S)
                beside.append(1000 * asker.wait_for(asker.ask("quiet")))
                for ticket in others:
                    asker.wait_for(ticket)
        finally:
            client.close()
    yield Figure("alone", "ms", alone)
    yield Figure(f"beside {storm}", "ms", beside)
    ratios = [b / a for a, b in zip(alone, beside, strict=True)]
    yield Figure(f"beside {storm}", "/ alone", ratios)


class _Asker:
    """Asks for one adapter after another.

    Args:
        client: Of the store.
        folders: Of adapters that nobody has asked for.
    """

    def __init__(self, client: StoreClient, folders: Iterator[str]) -> None:
        self._client = client
        self._folders = folders
        self._number = 0
        self._asked: dict[int, float] = {}
        self._seconds: dict[int, float] = {}  # of those that have been answered

    def ask(self, tenant: str) -> int:
        """Asks for the next adapter; returns the load request's ticket."""
        self._number += 1
        folder = next(self._folders)
        ticket = self._client.request_load(
            LoadRequest(self._number, f"a{self._number}", folder, owners=(tenant,))
        )
        self._asked[ticket] = time.perf_counter()
        return ticket

    def wait_for(self, ticket: int) -> float:
        """Waits for an adapter; returns the seconds from the load request to its answer."""
        end = time.perf_counter() + LIMIT_S
        while ticket not in self._seconds:
            if time.perf_counter() > end:
                raise RuntimeError(f"no answer within {LIMIT_S:.0f} seconds")
            for message in self._client.poll(0.1):
                if isinstance(message, Failed):
                    raise RuntimeError(f"an adapter was refused: {message}")
                if isinstance(message, Loaded):
                    self._client.release(message.pack.pack)
                    asked = self._asked[message.ticket]
                    self._seconds[message.ticket] = time.perf_counter() - asked
        return self._seconds[ticket]


def _sizes() -> dict[str, tuple[int, int]]:
    """Inputs and outputs of the projections that are adapted, in each layer."""
    config = model_config()
    hidden = config["hidden_size"]
    keys = hidden // config["num_attention_heads"] * config["num_key_value_heads"]
    outputs = dict(zip(PROJECTIONS, (hidden, keys, keys, hidden), strict=True))
    return {
        f"model.layers.{layer}.self_attn.{name}": (hidden, size)
        for layer in range(config["num_hidden_layers"])
        for name, size in outputs.items()
    }
