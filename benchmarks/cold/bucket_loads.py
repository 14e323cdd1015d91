"""First loads of adapters in a bucket, against the same ones in a folder.

The store loads each adapter once, one after the other, from a folder and from a bucket that moto
serves on the loopback address; both are new to it. "Transfer" is what obstore takes to read the
same two files of each adapter in this process. What is left of the bucket's time is for asking,
keeping the files in the disk cache, and loading them from there.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from unittest.mock import patch

from benchmarks.cold.intake_cost import layout_of
from benchmarks.harness.registry import Figure, benchmark
from benchmarks.loads.smollm2 import model_config
from benchmarks.steps.cpu_throughput import sizes_of, write_random_adapter

RANK = 8
FILES = "adapter_config.json", "adapter_model.safetensors"
WAIT_S = 60.0


def first_loads(paths: Iterable[str], layout: object, **settings: object) -> list[float]:
    """Milliseconds of each load, by a store of their own."""
    from vllm_multilora.store.clients.client import StoreClient
    from vllm_multilora.store.protocol.messages import Failed, Loaded, LoadRequest, StoreSettings
    from vllm_multilora.store.protocol.store_folder import FOLDER_VARIABLE
    from vllm_multilora.store.store_launch import StoreProcess

    found = []
    with (
        tempfile.TemporaryDirectory(prefix="multilora-", ignore_cleanup_errors=True) as folder,
        patch.dict(os.environ, {FOLDER_VARIABLE: folder}),
    ):
        client = StoreClient(StoreProcess(), "benchmark")
        try:
            client.configure([layout], StoreSettings(**settings))  # type: ignore[arg-type]
            for number, path in enumerate(paths, 1):
                begin = time.perf_counter()
                ticket, answer = client.request_load(LoadRequest(number, path, path)), None
                while answer is None:
                    said = client.poll(WAIT_S)
                    answers = (m for m in said if isinstance(m, Loaded | Failed))
                    answer = next((m for m in answers if m.ticket == ticket), None)
                if isinstance(answer, Failed):
                    raise RuntimeError(answer.message)
                found.append((time.perf_counter() - begin) * 1e3)
        finally:
            client.close()
    return found


def transfers(names: Iterable[str]) -> list[float]:
    """Milliseconds of reading each adapter's files."""
    from obstore.store import from_url

    store, found = from_url("s3://loras", client_options={"allow_http": True}), []
    for name in names:
        begin = time.perf_counter()
        for file in FILES:
            store.get(f"{name}/{file}").bytes()
        found.append((time.perf_counter() - begin) * 1e3)
    return found


@benchmark(
    workload="adapters of SmolLM2-135M, rank 8, each loaded once, one after the other",
    control="the same adapters in a folder",
    figure="time from a bucket without the transfer, divided by the folder's",
    compares_to="the goal, 1.5",
    quick={"adapters": 4, "rounds": 1},
)
def bucket_loads(adapters: int = 200, rounds: int = 3) -> Iterable[Figure]:
    """First loads of adapters in a bucket, against the same ones in a folder.

    Args:
        adapters: How many.
        rounds: Of all; the figures are each round's medians.
    """
    from tests.sources.emulators import put_publicly, s3_server

    config = model_config()
    sizes = {f"model.{name}": size for name, size in sizes_of(config).items()}
    layout = layout_of(sizes, RANK, columns_first=True)
    names = [f"tenant{number}" for number in range(adapters)]
    columns: dict[str, list[float]] = {"folder, ms": [], "bucket, ms": [], "transfer, ms": []}
    with tempfile.TemporaryDirectory() as text, s3_server() as address:
        put_publicly(f"{address}/loras")
        folder, access = Path(text), {"AWS_ENDPOINT_URL": address, "AWS_SKIP_SIGNATURE": "true"}
        for number, name in enumerate(names):
            write_random_adapter(folder / name, config, RANK, seed=number)
            for file in FILES:
                put_publicly(f"{address}/loras/{name}/{file}", (folder / name / file).read_bytes())
        for turn in range(rounds):
            cache = str(folder / f"cache{turn}")
            with patch.dict(os.environ, access | {"AWS_DEFAULT_REGION": "us-east-1"}):
                found = {
                    "folder, ms": first_loads((str(folder / name) for name in names), layout),
                    "bucket, ms": first_loads(
                        (f"s3://loras/{name}" for name in names),
                        layout,
                        allowed_roots=("s3://loras", cache),
                        disk_cache=cache,
                        disk_cache_bytes=8 << 30,
                    ),
                    "transfer, ms": transfers(names),
                }
            for column, values in found.items():
                columns[column].append(sorted(values)[len(values) // 2])
    for column, medians in columns.items():
        yield Figure("", column, medians)
    ratios = [(b - t) / f for f, b, t in zip(*columns.values(), strict=True)]
    yield Figure("", "(bucket - transfer) / folder", ratios)
