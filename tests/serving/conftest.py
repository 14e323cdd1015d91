"""Environment and shared checkpoints of the serving tests."""

import fcntl
import importlib.util
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import pytest

# vLLM and huggingface_hub read these on import, in this process and in the ones they start.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_WORKER_MULTIPROC_METHOD", "spawn")
# By itself vLLM binds an engine's threads to cores, each rank's and each engine's to a NUMA node of
# its own: a small machine has one, and two tests' engines would share its first core.
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
# Tests look into the workers by sending them functions.
os.environ.setdefault("VLLM_ALLOW_INSECURE_SERIALIZATION", "1")

if TYPE_CHECKING:
    from .models.blend_models import BlendScenario
    from .models.cases import Scenario

_Built = TypeVar("_Built")

_NEEDED = ("vllm", "transformers", "peft")


@pytest.fixture(scope="session", autouse=True)
def _servers_can_be_forked() -> None:
    """No test module may set what would have every server and engine import vLLM for itself."""
    from . import template

    changed = template.changed_since_import(os.environ)
    assert not changed, "set on import by a test module, or left by a test: do it in a fixture"


def _require_serving_stack() -> None:
    missing = [name for name in _NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        pytest.skip(f"serving tests need {', '.join(missing)}")


def _shared(factory: pytest.TempPathFactory, name: str, build: Callable[[Path], _Built]) -> _Built:
    """What one of the processes that run the tests has built, for all of them."""
    folder = factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent
    built = folder / f"{name}.pickle"
    with (folder / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not built.exists():
            built.write_bytes(pickle.dumps(build(factory.mktemp(name))))
    found: _Built = pickle.loads(built.read_bytes())
    return found


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> "Scenario":
    """A tiny Llama, its nine adapters, and cases answered by PEFT."""
    _require_serving_stack()
    from .models.scenarios import llama_scenario

    return _shared(tmp_path_factory, "llama", llama_scenario)


@pytest.fixture(scope="session")
def qwen2(tmp_path_factory: pytest.TempPathFactory) -> "Scenario":
    """A tiny Qwen2, its eight adapters, and cases answered by PEFT."""
    _require_serving_stack()
    from .models.scenarios import qwen2_scenario

    return _shared(tmp_path_factory, "qwen2", qwen2_scenario)


@pytest.fixture(scope="session")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> "Scenario":
    """A tiny Llama, forty adapters of ranks from 8 to 64, and a case of each answered by PEFT."""
    _require_serving_stack()
    from .models.scenarios import fleet_scenario

    return _shared(tmp_path_factory, "fleet", fleet_scenario)


@pytest.fixture(scope="session")
def activated(tmp_path_factory: pytest.TempPathFactory) -> "Scenario":
    """A tiny Llama, activated adapters and a plain one, and prompts that invoke them."""
    _require_serving_stack()
    from .models.activated_models import activated_scenario

    return _shared(tmp_path_factory, "activated", activated_scenario)


@pytest.fixture(scope="session")
def blends(tmp_path_factory: pytest.TempPathFactory) -> "BlendScenario":
    """A tiny Llama, adapters, and blends of them that PEFT has made."""
    _require_serving_stack()
    from .models.blend_models import blend_scenario

    return _shared(tmp_path_factory, "blends", blend_scenario)
