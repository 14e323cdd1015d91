"""Run in a process of its own, without Triton's interpreter; prints what it finds as JSON.

`test_compiled_launches.py` says what should be found.
"""

import json
from typing import Any

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from multilora_kernels import BatchPlan, PlanLayout, PreparedLinear, SlotIndex, SlotTable
from multilora_kernels.triton import kept_launch, prepared
from tools.kernels.measure.without_card import Launches, launched_without_card

SLOTS, RANK, K, WIDTHS, MAX_TOKENS = 6, 64, 1024, (1024, 256), 4096
TOKENS = (1, 2, 64, 33, 1000, 600, 4096, 2049)


class Layer:
    def __init__(self, backend: str, k: int = K, widths: tuple[int, ...] = WIDTHS) -> None:
        def weights(*shape: int) -> torch.Tensor:
            return torch.empty(SLOTS, 1, *shape, dtype=torch.bfloat16)

        self.k, self.width = k, sum(widths)
        self.plan = BatchPlan(PlanLayout(MAX_TOKENS, SLOTS, 128))
        # A layer's ranks are some rows of a table: aligned or not.
        ranks = torch.ones(len(widths) + 1, SLOTS, dtype=torch.int32)[1:]
        a, b = (weights(RANK, k) for _ in widths), (weights(width, RANK) for width in widths)
        self.prepared = PreparedLinear(tuple(a), tuple(b), ranks, self.plan.layout, backend=backend)

    def call(self, tokens: int, skipped: int = 0, extra: int = 0) -> None:
        """A batch whose activations begin so many elements late, in rows so much longer."""
        self.plan.update(np.arange(tokens) % SLOTS)
        self.prepared(
            activations(tokens, self.width, 0, extra),
            activations(tokens, self.k, skipped, extra),
            self.plan,
        )


def activations(rows: int, width: int, skipped: int, extra: int) -> torch.Tensor:
    memory = torch.empty(rows * (width + extra) + skipped, dtype=torch.bfloat16)
    return memory[skipped:].view(rows, width + extra)[:, :width]


def described(launches: Launches) -> list[Any]:
    """Which kernels, grids and numbers; addresses only where they are a layer's own."""
    found = []
    for kernel, grid, values in launches.launched:
        numbers = [
            value.data_ptr() if isinstance(value, torch.Tensor) else value for value in values
        ]
        found.append((id(kernel), grid, numbers))
    launches.launched.clear()
    return found


def same(kept: list[Any], looked_up: list[Any]) -> bool:
    """The same launches; memory between the halves may be another."""

    def plain(values: list[Any]) -> list[Any]:
        return [
            "memory" if isinstance(v, int) and v > 1 << 32 else v
            for v in values
            if not isinstance(v, tuple | torch.Tensor)
        ]

    return [(k, g, plain(v)) for k, g, v in kept] == [(k, g, plain(v)) for k, g, v in looked_up]


class Allocations(TorchDispatchMode):
    """Notes every operator that returns other memory than it was given."""

    def __init__(self) -> None:
        super().__init__()
        self.made: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        given = {t.untyped_storage()._cdata for t in args if isinstance(t, torch.Tensor)}
        if isinstance(result, torch.Tensor) and result.untyped_storage()._cdata not in given:
            self.made.append(str(func))
        return result


def scatter(launches: Launches) -> dict[str, Any]:
    """What filling slots compiles after the warm-up, and how many programs a group has."""
    shapes = [(4096, 4096), (4096, 1024), (70, 3), (8, 9)]
    table = SlotTable(
        [torch.zeros(2, RANK, k, dtype=torch.bfloat16) for k, _ in shapes],
        [torch.zeros(2, n, RANK, dtype=torch.bfloat16) for _, n in shapes],
    )
    table._device_staging().warm_up()
    compiled = launches.compiled.count("scatter_kernel")
    launches.launched.clear()
    allocations = Allocations()
    memory = torch.zeros(RANK * 4096 + 8, dtype=torch.bfloat16).data_ptr()
    for rank, late in ((1, 2), (3, 2), (8, 4), (16, 8), (64, 8)):
        for rows in ([0, 1], [0, 1, 2, 3], [2], [3]):
            n = len(rows)
            ranks, addresses = np.full(n, rank, np.int32), np.full(n, memory, np.int64)
            index = SlotIndex(np.array(rows, np.int32), ranks, ranks, addresses, addresses + late)
            with allocations:
                for group in table.pieces(1, index):
                    table.copy(group, backend="triton")
    most = max(grid[0] * grid[1] for _, grid, _ in launches.launched)
    kinds = {values[0].dtype for _, _, values in launches.launched}
    late = launches.compiled.count("scatter_kernel") - compiled
    launches.launched.clear()
    with allocations:
        torch.zeros(1)
    return {
        "warmed": compiled,
        "late": late,
        "kinds": len(kinds),
        "most programs": most,
        "allocations": allocations.made,
    }


def main() -> None:
    result: dict[str, Any] = {"differ": [], "compiled_late": [], "through_triton": {}}
    looked_up = 0
    run = kept_launch.Launch.run

    def counted(launch: Any) -> Any:
        nonlocal looked_up
        looked_up += 1
        return run(launch)

    kept_launch.Launch.run = counted  # type: ignore[method-assign]
    always = kept_launch.is_aligned
    with launched_without_card() as launches:
        for backend in ("triton", "triton-invariant"):
            layer = Layer(backend)
            for tokens in TOKENS:  # what a warm-up does
                layer.call(tokens)
            described(launches)
            compiled, looked_up = len(launches.compiled), 0
            for tokens in TOKENS:
                layer.call(tokens)
                kept = described(launches)
                prepared.is_aligned = lambda *_: False  # type: ignore[assignment]
                through, looked_up_kept = looked_up, looked_up
                layer.call(tokens)
                looked_up = through
                prepared.is_aligned = always
                if not kept or not same(kept, described(launches)) or looked_up_kept:
                    result["differ"].append((backend, tokens))
            result["compiled_late"].append(len(launches.compiled) - compiled)
        for name, options in {
            "aligned": {},
            "longer rows": {"extra": 16},
            "begin late": {"skipped": 1},
            "begin 16 bytes late": {"skipped": 8},
            "odd rows": {"extra": 1},
            "rows of 8 more": {"extra": 8},
        }.items():
            layer = Layer("triton")
            layer.call(64)
            looked_up, before = 0, len(launches.compiled)
            layer.call(64, **options)
            result["through_triton"][name] = looked_up, len(launches.compiled) - before
        result["scatter"] = scatter(launches)
        odd = Layer("triton", k=75, widths=(51,))
        looked_up = 0
        odd.call(64)
        odd.call(64)
        result["odd layer looked up"] = looked_up
    print(json.dumps(result))


if __name__ == "__main__":
    main()
