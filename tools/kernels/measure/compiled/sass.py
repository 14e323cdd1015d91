"""A compiled kernel's loops over tensor-core products, read from its machine code (SASS).

Written for what nvdisasm prints of sm_80 to sm_120: 128 bits an instruction, of which bits 105 to
108 hold the cycles that the issuing warp waits before its next instruction.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import triton

_LABEL = re.compile(r"^(\.L_\w+):")
_INSTRUCTION = re.compile(
    r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@(!?U?P\w+)\s+)?([A-Z][\w.]*)\s*(.*?)\s*;\s*/\*\s*0x([0-9a-f]{16})"
)
_SECOND_WORD = re.compile(r"^\s*/\*\s*0x([0-9a-f]{16})\s*\*/\s*$")
_TARGET = re.compile(r"`\((\.L_\w+)\)")
_STALL_SHIFT, _STALL_MASK = 105 - 64, 0xF
_TENSOR_CORE = ("HMMA", "HGMMA", "UTCHMMA")
_ENDS = ("EXIT", "RET")


@dataclass(frozen=True)
class Counts:
    """What one warp issues on one way through some code.

    Attributes:
        instructions: How many.
        cycles: The sum of the stall counts: how long they take if no load makes the warp wait.
        tensor_core: Tensor-core instructions among them.
        wide_loads: Loads of 16 bytes from global memory, asynchronous copies included.
    """

    instructions: int = 0
    cycles: int = 0
    tensor_core: int = 0
    wide_loads: int = 0

    def __add__(self, other: Counts) -> Counts:
        return Counts(
            self.instructions + other.instructions,
            self.cycles + other.cycles,
            self.tensor_core + other.tensor_core,
            self.wide_loads + other.wide_loads,
        )


@dataclass(frozen=True)
class _Instruction:
    name: str
    stall: int
    is_conditional: bool
    target: str | None

    def counts(self) -> Counts:
        is_load = self.name.startswith(("LDG.E", "LDGSTS.E"))
        return Counts(
            1,
            self.stall,
            int(self.name.startswith(_TENSOR_CORE)),
            int(is_load and ".128" in self.name),
        )


class Sass:
    """One kernel's machine code.

    Args:
        text: What `nvdisasm -c -hex` prints.

    Raises:
        ValueError: It branches in a way that is not known here.
    """

    def __init__(self, text: str) -> None:
        self._blocks, self._successors = _blocks(text)
        self._counts = [sum((each.counts() for each in block), Counts()) for block in self._blocks]

    def main_loops(self) -> list[Counts]:
        """One pass of each innermost loop with tensor-core instructions, in the order of the text.

        Where a pass may take several ways, the longest counts.
        """
        loops = self._loops()
        found = {
            header: body
            for header, body in loops.items()
            if any(self._counts[block].tensor_core for block in body)
        }
        inner = [
            (header, body)
            for header, body in found.items()
            if not any(other in body for other in found if other != header)
        ]
        return [self._longest(header, body) for header, body in sorted(inner)]

    def _loops(self) -> dict[int, set[int]]:
        """Blocks of each loop by its first block; a loop ends with a jump backwards."""
        predecessors: list[list[int]] = [[] for _ in self._blocks]
        for block, following in enumerate(self._successors):
            for successor in following:
                predecessors[successor].append(block)
        loops: dict[int, set[int]] = {}
        for block, following in enumerate(self._successors):
            for header in following:
                if header > block:
                    continue
                body, stack = {header}, [block]
                while stack:
                    if (each := stack.pop()) not in body:
                        body.add(each)
                        stack.extend(predecessors[each])
                loops[header] = loops.get(header, set()) | body
        return loops

    def _longest(self, header: int, body: set[int]) -> Counts:
        """The longest way, by cycles, from a loop's first block to a jump back to it."""
        reached = {header: self._counts[header]}
        best = Counts()
        for block in sorted(body):  # blocks of an innermost loop only lead forward, or back to it
            if block not in reached:
                continue
            for successor in self._successors[block]:
                if successor == header:
                    best = max(best, reached[block], key=lambda counts: counts.cycles)
                elif successor in body:
                    way = reached[block] + self._counts[successor]
                    known = reached.get(successor, Counts())
                    reached[successor] = max(known, way, key=lambda counts: counts.cycles)
        return best


def disassemble(cubin: bytes) -> Sass:
    """Machine code as Triton keeps it, by the disassembler that Triton brings."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        done = subprocess.run(
            [triton.knobs.nvidia.nvdisasm.path, "-c", "-hex", str(path)],
            check=True,
            capture_output=True,
            text=True,
        )
    return Sass(done.stdout)


def _blocks(text: str) -> tuple[list[list[_Instruction]], list[list[int]]]:
    """Basic blocks, and the numbers of those that follow each."""
    blocks: list[list[_Instruction]] = [[]]
    labels: dict[str, int] = {}
    for item in _items(text):
        if isinstance(item, str):
            if blocks[-1]:
                blocks.append([])
            labels[item] = len(blocks) - 1
            continue
        blocks[-1].append(item)
        if item.target is not None or item.name.startswith(_ENDS):
            blocks.append([])
    successors: list[list[int]] = []
    for number, block in enumerate(blocks):
        following = [number + 1] if number + 1 < len(blocks) else []
        if block:
            last = block[-1]
            ends = last.target is not None or last.name.startswith(_ENDS)
            if ends and not last.is_conditional:
                following = []
            if last.target is not None:
                following = [*following, labels[last.target]]
        successors.append(following)
    return blocks, successors


def _items(text: str) -> Iterator[str | _Instruction]:
    """Labels and instructions, in the order of the text."""
    lines = iter(text.splitlines())
    for line in lines:
        if found := _LABEL.match(line):
            yield found[1]
        elif found := _INSTRUCTION.match(line):
            second = _SECOND_WORD.match(next(lines, ""))
            if second is None:
                raise ValueError(f"{line!r} is not followed by the rest of its encoding")
            predicate, name, operands, _ = found.groups()
            target = _TARGET.search(operands) if name.startswith("BRA") else None
            if name.startswith(("BRX", "CALL", "JMP")) or (name.startswith("BRA") and not target):
                raise ValueError(f"{line!r} leads where nobody knows")
            # A branch may also have its condition among its operands: BRA.U UP0, `(.L_x_1).
            conditional = predicate is not None or (target and target.start() > 0)
            stall = int(second[1], 16) >> _STALL_SHIFT & _STALL_MASK
            yield _Instruction(name, stall, bool(conditional), target and target[1])
