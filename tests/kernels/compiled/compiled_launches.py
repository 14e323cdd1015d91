"""Run in a process of its own, without Triton's interpreter; prints what it finds as JSON.

`test_compiled_launches.py` says what should be found.
"""

import json
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from multilora_kernels import (
    BatchPlan,
    PlanLayout,
    PreparedExpand,
    PreparedLinear,
    PreparedShrink,
    SlotIndex,
    SlotTable,
)
from multilora_kernels.triton import kept_launch
from multilora_kernels.triton.kept_launch import KeptLaunch
from tools.kernels.measure.compiled.without_card import Launches, launched_without_card

SLOTS, RANK, K, WIDTHS, MAX_TOKENS = 6, 64, 1024, (1024, 256), 4096
TOKENS = (1, 2, 64, 33, 1000, 600, 4096, 2049)
PLACES: dict[str, dict[str, int]] = {
    "aligned": {},
    "longer rows": {"extra": 16},
    "begin late": {"skipped": 1},
    "begin 16 bytes late": {"skipped": 8},
    "odd rows": {"extra": 1},
    "rows of 8 more": {"extra": 8},
}


class Layer:
    def __init__(self, backend: str, k: int = K, widths: tuple[int, ...] = WIDTHS) -> None:
        def weights(*shape: int) -> torch.Tensor:
            return torch.empty(SLOTS, 1, *shape, dtype=torch.bfloat16)

        self.k, self.width = k, sum(widths)
        self.plan = BatchPlan(PlanLayout(MAX_TOKENS, SLOTS, 128))
        # A layer's ranks are some rows of a table: aligned or not.
        ranks = torch.ones(len(widths) + 1, SLOTS, dtype=torch.int32)[1:]
        a = tuple(weights(RANK, k) for _ in widths)
        b = tuple(weights(width, RANK) for width in widths)
        self.slices = len(widths)
        self.prepared = PreparedLinear(a, b, ranks, self.plan.layout, backend=backend)
        self.shrink = PreparedShrink(a, ranks, self.plan.layout, backend=backend)
        self.expand = PreparedExpand(b, ranks, self.plan.layout, offset=16, backend=backend)

    def call(self, tokens: int, skipped: int = 0, extra: int = 0) -> None:
        """A batch whose activations begin so many elements late, in rows so much longer."""
        self.plan.update(np.arange(tokens) % SLOTS)
        y, x = (activations(tokens, n, skipped, extra) for n in (self.width + 16, self.k))
        self.prepared(y, x, self.plan)
        h = activations(self.slices * tokens, RANK, skipped, extra, torch.float32)
        h = h.unflatten(0, (self.slices, tokens))
        self.shrink(h, x, self.plan)
        self.expand(y, h, self.plan)


def activations(
    rows: int, width: int, skipped: int, extra: int, dtype: torch.dtype = torch.bfloat16
) -> torch.Tensor:
    memory = torch.empty(rows * (width + extra) + skipped, dtype=dtype)
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
    result: dict[str, Any] = {"differ": [], "compiled_late": [], "looked_up_late": {}}
    looked_up = 0
    run = kept_launch.Launch.run

    def counted(launch: Any) -> Any:
        nonlocal looked_up
        looked_up += 1
        return run(launch)

    kept_launch.Launch.run = counted  # type: ignore[method-assign]
    never = property(lambda launch: False, lambda launch, value: None)
    with launched_without_card() as launches:
        for backend in ("triton", "triton-invariant"):
            layer = Layer(backend)
            for tokens in TOKENS:  # what a warm-up does
                layer.call(tokens)
            described(launches)
            compiled, looked_up = len(launches.compiled), 0
            for tokens in TOKENS:
                layer.call(tokens)
                kept, found = described(launches), looked_up
                with patch.object(KeptLaunch, "is_compiled", never, create=True):
                    layer.call(tokens)
                looked_up = found
                if not kept or not same(kept, described(launches)) or found:
                    result["differ"].append((backend, tokens))
            result["compiled_late"].append(len(launches.compiled) - compiled)
        for name, k, widths in (("even", K, WIDTHS), ("odd", 75, (51, 8))):
            layer = Layer("triton", k=k, widths=widths)
            layer.call(64)
            for place, options in PLACES.items():
                looked_up, before = 0, len(launches.compiled)
                layer.call(64, **options)
                kept = looked_up
                with patch.object(KeptLaunch, "is_compiled", never, create=True):
                    layer.call(64, **options)
                late = kept, len(launches.compiled) - before
                result["looked_up_late"][f"{name}, {place}"] = late
        result["scatter"] = scatter(launches)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
