"""Compiling for the tuner in several processes, ahead of timing.

What they compile goes into Triton's cache on disk, where the process that times finds it. They
need no GPU and leave the card's memory alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from types import TracebackType

from multilora_kernels.configs import ExpandConfig, ShrinkConfig
from multilora_kernels.triton.launch import DeviceFacts
from tools.kernels.measure.launch_cases import LaunchCase, configured_launches
from tools.kernels.measure.without_card import compile_without_card


@dataclass(frozen=True)
class Work:
    """A layer under one configuration of both halves.

    Attributes:
        case: The layer and load.
        facts: The device that it is compiled for.
        shrink: Blocks of the first half.
        expand: Blocks of the second half.
    """

    case: LaunchCase
    facts: DeviceFacts
    shrink: ShrinkConfig
    expand: ExpandConfig


class Ahead:
    """Processes that compile; to be used in a `with` statement.

    Args:
        processes: How many.
    """

    def __init__(self, processes: int) -> None:
        # A forked process would share the card's context, which CUDA does not allow.
        self._pool = ProcessPoolExecutor(processes, mp_context=get_context("spawn"))

    def __enter__(self) -> Ahead:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._pool.shutdown(cancel_futures=True)

    def compile(self, work: Sequence[Work]) -> list[str]:
        """Returns when all is compiled: what could not be, in words.

        Whoever times meets the same error at the same configuration, and leaves it out.
        """
        return [problem for problem in self._pool.map(_compile, work) if problem]


def _compile(work: Work) -> str:
    launches = configured_launches(work.case, work.facts, work.shrink, work.expand)
    try:
        for launch in launches:
            compile_without_card(launch, work.facts.architecture)
    except Exception as error:  # the compiler's are of many kinds, and need not travel
        return f"{type(error).__name__}: {error} with {work.shrink} and {work.expand}"
    return ""
