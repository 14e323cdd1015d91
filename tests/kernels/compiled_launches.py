"""Run in a process of its own, without Triton's interpreter; prints what it finds as JSON.

`test_compiled_launches.py` says what should be found.
"""

import json
from typing import Any

import numpy as np
import torch

from multilora_kernels import BatchPlan, PlanLayout, PreparedLinear
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
        odd = Layer("triton", k=75, widths=(51,))
        looked_up = 0
        odd.call(64)
        odd.call(64)
        result["odd layer looked up"] = looked_up
    print(json.dumps(result))


if __name__ == "__main__":
    main()
