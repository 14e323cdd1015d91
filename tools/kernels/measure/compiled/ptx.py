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
_STATEMENT = re.compile(r"^(?:@!?(%\w+)\s+)?([a-z][\w.:]*)\s*(.*);$")
_REGISTER = re.compile(r"%[a-z]+\d+")
_PARAMETER = re.compile(r"_param_(\d+)")
_WIDTH = re.compile(r"(?:\.v(\d))?\.[busf](\d+)$")
_SIZE = re.compile(r"\], (0x[0-9a-f]+|\d+)")
_TENSOR_CORE = ("mma.sync", "wgmma.mma_async", "tcgen05.mma")
_ATOMIC = ("atom.", "red.")
_FROM_REGISTERS = re.compile(r"\{[^}]*\}\s*,\s*\{")  # sums, and then the first factor
_WAIT = "griddepcontrol.wait"
_WIDE = "%rd"  # registers of 64 bits, as addresses are
_SHARED = "shared memory"
_BRANCHES = ("bra", "bra.uni", "ret", "exit")


@dataclass(frozen=True)
class Access:
    """One instruction that reads or writes global memory.

    Attributes:
        parameters: Kernel parameters that its address is computed from, by position.
        size: Bytes that a thread moves with it.
        store: Whether it writes.
        after_wait: Whether every way to it passes `griddepcontrol.wait`.
        loads_before: Loads that end one after the other before it can be started, on the way
            with the fewest: those that its address, its predicate or a branch before it needs.
    """

    parameters: frozenset[int]
    size: int
    store: bool
    after_wait: bool
    loads_before: int


@dataclass(frozen=True)
class _Statement:
    operation: str
    operands: str
    predicate: str | None


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
        origins, waited, loads_before = self._origins(), self._waited(), self._loads_before()
        found = []
        for number, has_waited in enumerate(waited):
            for place, each in enumerate(self._blocks[number]):
                has_waited = has_waited or _waits(each)
                if (described := _described(each)) is not None:
                    address, size, store = described
                    parameters = frozenset[int]().union(*(origins[r] for r in address))
                    before = loads_before.get((number, place), 0)
                    found.append(Access(parameters, size, store, has_waited, before))
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
    def in_flight(self) -> int:
        """Asynchronous products with a factor in registers, and no wait for them in their block."""
        found = 0
        for block in self._blocks:
            begun = 0
            for each in block:
                if each.operation.startswith("wgmma.mma_async"):
                    begun += _FROM_REGISTERS.match(each.operands) is not None
                elif each.operation.startswith("wgmma.wait_group") and each.operands == "0":
                    begun = 0
            found += begun
        return found

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

    def _loads_before(self) -> dict[tuple[int, int], int]:
        """`Access.loads_before` of each statement, by its block and its place there.

        Of a loop the first pass counts.
        """
        known: defaultdict[str, dict[int, int]] = defaultdict(dict)  # by register and block
        on_the_way = {0: 0}  # by block, the loads that branches have waited for
        found = {}
        for number in self._in_order():
            for place, each in enumerate(self._blocks[number]):
                targets, sources = _targets(each)
                needed = [*sources, *([each.predicate] if each.predicate else [])]
                # A value that comes from several blocks: by the shortest way.
                values = (min(known[r].values()) for r in needed if r in known)
                loads = found[number, place] = max([on_the_way[number], *values])
                if each.operation in _BRANCHES:
                    on_the_way[number] = loads
                for target in targets:
                    if target == _SHARED:
                        known[target].clear()
                    known[target][number] = loads + each.operation.startswith("ld.global")
            for successor in self._successors[number]:
                here = on_the_way[number]
                on_the_way[successor] = min(here, on_the_way.get(successor, here))
        return found

    def _in_order(self) -> list[int]:
        """Blocks that can be reached, each after those that lead to it but for loops."""
        order: list[int] = []
        seen, stack = {0}, [(0, iter(self._successors[0]))]
        while stack:
            number, rest = stack[-1]
            following = next((s for s in rest if s not in seen), None)
            if following is None:
                order.append(number)
                stack.pop()
            else:
                seen.add(following)
                stack.append((following, iter(self._successors[following])))
        return order[::-1]


def _flow(statement: _Statement) -> tuple[list[str], list[str]]:
    """Registers that get a result in which an address may be, and those that it is made of."""
    operation, operands = statement.operation, statement.operands
    registers = _REGISTER.findall(operands)
    if operation.startswith("st.shared"):
        return [_SHARED], [r for r in registers if r.startswith(_WIDE)]
    if not registers or operation.startswith(("ld.global", "st.", "cp.", "ldmatrix")):
        return [], []
    targets, sources = _targets(statement)
    if operation.startswith("ld.shared"):
        return [r for r in targets if r.startswith(_WIDE)], [_SHARED]
    return targets, sources


def _targets(statement: _Statement) -> tuple[list[str], list[str]]:
    """Registers that get a result, and those that it is made of."""
    operation, operands = statement.operation, statement.operands
    registers = _REGISTER.findall(operands)
    if operation.startswith("st.shared"):
        return [_SHARED], registers
    if operation.startswith(("st.", "cp.", "bra", "bar")):
        return [], registers
    targets = 1
    if operands.startswith("{"):
        targets = len(_REGISTER.findall(operands.partition("}")[0]))
    shared = [_SHARED] if operation.startswith(("ld.shared", "ldmatrix")) else []
    return registers[:targets], registers[targets:] + shared


def _waits(statement: _Statement) -> bool:
    return statement.operation == _WAIT and statement.predicate is None


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
        each = _Statement(match[2], match[3], match[1])
        blocks[-1].append(each)
        root = each.operation.partition(".")[0]
        if root in ("brx", "call"):
            raise ValueError(f"{line!r} leads where nobody knows")
        if root in ("bra", "ret", "exit", "trap"):
            if root == "bra":
                jumps.append((len(blocks) - 1, each.operands.strip()))
            if each.predicate is not None:
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
