"""What a collector shows, as a plain dictionary."""

import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from vllm_multilora.metrics import router_names
from vllm_multilora.metrics.collector import LoRACollector
from vllm_multilora.metrics.recorder import Recorder

MODEL = "base"


def recorder(
    folder: Path,
    role: str = "worker",
    *,
    engine: str = "0",
    most: int = 10,
    has_latencies: bool = False,
    clock: Callable[[], float] = time.monotonic,
) -> Recorder:
    return Recorder(
        folder,
        role=role,
        engine=engine,
        model_name=MODEL,
        max_adapters=most,
        has_latencies=has_latencies,
        clock=clock,
    )


def shown(folder: Path) -> dict[str, float]:
    """Values by sample name and labels, `model_name` left out: `name{a=1,b=2}`.

    What is shown again under the names that routers know is left out: see `shown_to_routers`.
    """
    return _shown(folder, for_routers=False)


def shown_to_routers(folder: Path) -> dict[str, float]:
    """Likewise, of the names that routers know."""
    return _shown(folder, for_routers=True)


def _shown(folder: Path, *, for_routers: bool) -> dict[str, float]:
    names = {definition.name for definition in router_names.ALL}
    collector = LoRACollector()
    collector.show(folder)
    return {
        _text(sample.name, sample.labels): sample.value
        for metric in collector.collect()
        if (metric.name in names) is for_routers
        for sample in metric.samples
    }


def _text(name: str, labels: dict[str, str]) -> str:
    assert labels["model_name"] == MODEL
    own = ",".join(f"{k}={v}" for k, v in sorted(labels.items()) if k != "model_name")
    return f"{name}{{{own}}}"


def in_another_process(code: str, folder: Path) -> None:
    """Runs code, with `record` made for the folder, in a process that has ended afterwards."""
    start = f"""
from pathlib import Path
from tests.metrics.readings import recorder
from vllm_multilora.metrics import definitions as defined
record = recorder(Path({str(folder)!r}))
"""
    subprocess.run([sys.executable, "-c", start + code], check=True, timeout=60)
