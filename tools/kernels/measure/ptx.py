"""What a compiled kernel does with memory, read from its PTX: accesses by tensor, waits, atomics.

Written for what Triton 3.6 to 3.9 emit for sm_80 and later: one function, branches to labels, and
addresses that are computed in registers from the kernel's parameters.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass

_LABEL = re.compile(r"^(\$\w+):")
_STATEMENT = re.compile(r"^(?:@!?%\w+\s+)?([a-z][\w.:]*)\s*(.*);$")
_REGISTER = re.compile(r"%[a-z]+\d+")
_PARAMETER = re.compile(r"_param_(\d+)")
_WIDTH = re.compile(r"(?:\.v(\d))?\.[busf](\d+)$")
_SIZE = re.compile(r"\], (0x[0-9a-f]+|\d+)")
_TENSOR_CORE = ("mma.sync", "wgmma.mma_async", "tcgen05.mma")
_ATOMIC = ("atom.", "red.")
_WAIT = "griddepcontrol.wait"
_WIDE = "%rd"  # registers of 64 bits, as addresses are
_SHARED = "shared memory"


@dataclass(frozen=True)
class Access:
    """One instruction that reads or writes global memory.

    Attributes:
        parameters: Kernel parameters that its address is computed from, by position.
        size: Bytes that a thread moves with it.
        store: Whether it writes.
        after_wait: Whether every way to it passes `griddepcontrol.wait`.
    """

    parameters: frozenset[int]
    size: int
    store: bool
    after_wait: bool


@dataclass(frozen=True)
class _Statement:
    operation: str
    operands: str
    predicated: bool


class Ptx:
    """One kernel's PTX.

    Args:
        text: As the compiler gives it.

    Raises:
        ValueError: It branches in a way that is not known here.
    """

    def __init__(self, text: str) -> None:
        self._blocks, self._successors = _blocks(text)
        self._statements = [each for block in self._blocks for each in block]

    def accesses(self) -> list[Access]:
        """Loads (asynchronous copies too) and stores, in the order of the text."""
        origins, waited = self._origins(), self._waited()
        found = []
        for block, has_waited in zip(self._blocks, waited, strict=True):
            for each in block:
                has_waited = has_waited or _waits(each)
                if (described := _described(each)) is not None:
                    address, size, store = described
                    parameters = frozenset[int]().union(*(origins[r] for r in address))
                    found.append(Access(parameters, size, store, has_waited))
        return found

    @property
    def may_end_unwaited(self) -> bool:
        """Whether there is a way to the end that does not pass `griddepcontrol.wait`."""
        return any(
            each.operation in ("ret", "exit") and not (waited or any(map(_waits, block)))
            for block, waited in zip(self._blocks, self._waited(), strict=True)
            for each in block
        )

    def count(self, *prefixes: str) -> int:
        """Instructions that begin with any of these."""
        return sum(each.operation.startswith(prefixes) for each in self._statements)

    @property
    def tensor_core(self) -> int:
        """Tensor-core instructions."""
        return self.count(*_TENSOR_CORE)

    @property
    def atomics(self) -> int:
        """Atomic operations and reductions, on whatever memory."""
        return self.count(*_ATOMIC)

    def _origins(self) -> dict[str, set[int]]:
        """For each register, the parameters that it was computed from.

        Threads also exchange addresses through shared memory. What lies where in it is not
        followed: any 64-bit value read from it may be any that was written there.
        """
        origins: defaultdict[str, set[int]] = defaultdict(set)
        changed = True
        while changed:  # a loop carries values backwards
            changed = False
            for each in self._statements:
                targets, sources = _flow(each)
                found = set(map(int, _PARAMETER.findall(each.operands)))
                found = found.union(*(origins[source] for source in sources))
                for target in targets:
                    if not found <= origins[target]:
                        origins[target] |= found
                        changed = True
        return origins

    def _waited(self) -> list[bool]:
        """For each block, whether the program has waited on every way to it."""
        waited = [True] * len(self._blocks)  # until a way is found on which it has not
        waited[0] = False
        queue = [0]
        while queue:
            number = queue.pop()
            if any(map(_waits, self._blocks[number])):
                continue
            for successor in self._successors[number]:
                if waited[successor]:
                    waited[successor] = False
                    queue.append(successor)
        return waited


def _flow(statement: _Statement) -> tuple[list[str], list[str]]:
    """Registers that get a result in which an address may be, and those that it is made of."""
    operation, operands = statement.operation, statement.operands
    registers = _REGISTER.findall(operands)
    if operation.startswith("st.shared"):
        return [_SHARED], [r for r in registers if r.startswith(_WIDE)]
    if not registers or operation.startswith(("ld.global", "st.", "cp.", "ldmatrix")):
        return [], []
    targets = 1
    if operands.startswith("{"):
        targets = len(_REGISTER.findall(operands.partition("}")[0]))
    if operation.startswith("ld.shared"):
        return [r for r in registers[:targets] if r.startswith(_WIDE)], [_SHARED]
    return registers[:targets], registers[targets:]


def _waits(statement: _Statement) -> bool:
    return statement.operation == _WAIT and not statement.predicated


def _described(statement: _Statement) -> tuple[list[str], int, bool] | None:
    """Registers of the address, bytes, whether it is a store; None for what is no access."""
    operation, operands = statement.operation, statement.operands
    addresses = re.findall(r"\[([^]]*)\]", operands)
    if operation.startswith("cp.async.c"):
        sizes = _SIZE.findall(operands)  # cp.async.commit_group has none
        return (_REGISTER.findall(addresses[1]), int(sizes[-1], 0), False) if sizes else None
    if not operation.startswith(("ld.global", "st.global")):
        return None
    width = _WIDTH.search(operation)
    if width is None:
        raise ValueError(f"how wide is {operation!r}?")
    size = int(width[1] or 1) * int(width[2]) // 8
    return _REGISTER.findall(addresses[0]), size, operation.startswith("st.")


def _blocks(text: str) -> tuple[list[list[_Statement]], list[list[int]]]:
    """Basic blocks, and the numbers of those that follow each."""
    blocks: list[list[_Statement]] = [[]]
    labels: dict[str, int] = {}
    jumps: list[tuple[int, str]] = []
    falls_through: set[int] = set()
    for line in _lines(text):
        if found := _LABEL.match(line):
            if blocks[-1]:
                falls_through.add(len(blocks) - 1)
                blocks.append([])
            labels[found[1]] = len(blocks) - 1
            continue
        if (match := _STATEMENT.match(line)) is None:
            continue
        each = _Statement(match[1], match[2], line.startswith("@"))
        blocks[-1].append(each)
        root = each.operation.partition(".")[0]
        if root in ("brx", "call"):
            raise ValueError(f"{line!r} leads where nobody knows")
        if root in ("bra", "ret", "exit", "trap"):
            if root == "bra":
                jumps.append((len(blocks) - 1, each.operands.strip()))
            if each.predicated:
                falls_through.add(len(blocks) - 1)
            blocks.append([])
    successors: list[list[int]] = [[] for _ in blocks]
    for number in falls_through:
        if number + 1 < len(blocks):
            successors[number].append(number + 1)
    for number, label in jumps:
        successors[number].append(labels[label])
    return blocks, successors


def _lines(text: str) -> Iterator[str]:
    """Statements and labels of the function's body, one a line, without comments."""
    _, _, body = text.partition("\n{")
    for line in body.splitlines():
        yield line.partition("//")[0].strip()
