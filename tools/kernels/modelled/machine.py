"""What a launch costs on a GPU, from counts of its machine code and of its bytes.

The counts are static: instructions, and cycles as the assembler's stall counts state them, on the
shortest path of one warp (sm_90, Triton 3.6 and 3.9). A kernel takes, after its start, the longest
of three: its longest program's chain of loads and instructions; the instructions that all programs
of a multiprocessor issue; its bytes. Two factors turn static counts into time. Both were fitted to
published times of SGLang's kernels (`published`): `CHAIN` and `Variant.issue`.
"""

from __future__ import annotations

from dataclasses import dataclass

START_US = 1.3
"""A launch inside a CUDA graph. The smallest published kernel takes 2.2 µs with its loads."""

OVERLAPPED_US = 0.7
"""A programmatic dependent launch, whose programs are placed while the one before ends."""

IDLE_US = 0.0003
"""A program without work. SGLang saved 7 % of a pair by leaving out 114,688 of them."""

CACHE_US, MEMORY_US = 0.25, 0.65
"""A load that another one waits for, from the second-level cache and from memory."""

CHAIN = 1.45
"""Real over static cycles of a chain of instructions. Fitted to steps of 0.515 µs, static 0.358."""

SHARE = 0.75
"""Part of the memory's bandwidth that weights move at."""

_SCHEDULERS = 4  # of a multiprocessor; each issues for its own warps


@dataclass(frozen=True)
class GPU:
    """A card.

    Attributes:
        processors: Streaming multiprocessors.
        clock: Cycles a microsecond.
        bandwidth: Bytes a microsecond from memory.
        cache_bandwidth: Bytes a microsecond from the second-level cache.
        latency: Microseconds for which bytes from memory are under way.
    """

    processors: int
    clock: float
    bandwidth: float
    cache_bandwidth: float
    latency: float


GPUS = {
    "H100": GPU(132, 1755, 3.35e6, 5.5e6, 0.60),
    "H200": GPU(132, 1755, 4.8e6, 5.5e6, 0.65),
    "B200": GPU(148, 1900, 8.0e6, 6.5e6, 0.80),
}


@dataclass(frozen=True)
class Variant:
    """Assumptions that published times leave open.

    Attributes:
        ours: Factor on these kernels' times.
        issue: Instructions a cycle and scheduler that other kernels reach; these reach 0.5.
    """

    ours: float
    issue: float


CALIBRATED = Variant(ours=1.0, issue=0.5)
"""0.5 is fitted: a program of SGLang's expand kernel holds a multiprocessor for 0.52 µs."""

PESSIMISTIC = Variant(ours=1.2, issue=1.0)
"""Against these kernels: they take a fifth longer, and others issue twice as fast."""


@dataclass(frozen=True)
class Kernel:
    """One launch.

    Attributes:
        programs: That are started.
        working: Programs that have work.
        loads_us: Loads of the longest program that wait for each other.
        cycles: Static cycles of the longest program.
        instructions: Of all programs, in warps' instructions.
        moved: Bytes from and to memory.
        under_way: Bytes that all programs have requested at once.
        cached: Bytes from the second-level cache.
    """

    programs: float
    working: float
    loads_us: float
    cycles: float
    instructions: float
    moved: float
    under_way: float
    cached: float = 0.0

    def time_us(self, gpu: GPU, issue: float) -> float:
        """Microseconds after the start.

        Args:
            gpu: The card.
            issue: Instructions a cycle and scheduler.
        """
        chain = CHAIN * self.cycles / gpu.clock
        # A multiprocessor with one program takes that program's time, however few have work.
        fullest = max(1.0, self.working / gpu.processors) / max(1.0, self.working)
        issuing = self.instructions * fullest / (_SCHEDULERS * issue * gpu.clock)
        rate = min(SHARE * gpu.bandwidth, max(1.0, self.under_way / gpu.latency))
        moving = self.moved / rate + self.cached / gpu.cache_bandwidth
        idle = IDLE_US * max(0.0, self.programs - self.working)
        return idle + max(self.loads_us + max(chain, issuing), moving)
