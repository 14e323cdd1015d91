"""Without a GPU the Triton kernels run in Triton's interpreter, on CPU tensors.

Triton decides as it is imported, and `multilora_kernels` and vLLM import it. So it is imported
here, before any test module. Some tests start processes that must not inherit the variable, so it
is set for the import only, and again by the tests that launch kernels.
"""

import gc
import logging
import os
from collections.abc import Iterator

import pytest

# Models of tests are computed sooner by one thread than by several that wait for each other: two of
# these processes share a small machine. NumPy and PyTorch read it on import.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

if not torch.cuda.is_available():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        import multilora_kernels.experts.pair_products
        import multilora_kernels.triton  # noqa: F401


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files that take long come first: at the end no process waits for another's last file."""
    long = {
        item.path
        for item in items
        if any(item.get_closest_marker(mark) for mark in ("serving", "slow", "waits"))
    }
    items.sort(key=lambda item: item.path not in long)


def pytest_collection_finish() -> None:
    """Tests and modules stay to the end, and are thousands: no collection need look at them."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _log_records_reach_pytest() -> Iterator[None]:
    """Once vLLM has loaded the plugin in this process, log lines go vLLM's way and no other.

    What vLLM imports for SageMaker hides what is not an error, of everybody.
    """
    root = logging.getLogger()
    levels = [(each, each.level) for each in (root, *root.handlers)]
    loggers = [logging.getLogger(name) for name in ("vllm_multilora", "multilora_kernels")]
    parents = [logger.parent for logger in loggers]
    for logger in loggers:
        logger.parent = root
    yield
    for logger, parent in zip(loggers, parents, strict=True):
        logger.parent = parent
    for each, level in levels:
        each.setLevel(level)


@pytest.fixture(autouse=True)
def _priority_is_kept() -> Iterator[None]:
    """No test lowers the priority of the process that runs the next ones: it cannot rise again."""
    before = os.getpriority(os.PRIO_PROCESS, 0)
    yield
    assert os.getpriority(os.PRIO_PROCESS, 0) == before
