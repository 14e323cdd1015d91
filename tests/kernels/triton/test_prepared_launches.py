"""A prepared layer launches what an unprepared one does, without working it out again."""

import gc
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch

from multilora_kernels import BatchPlan, PlanLayout, PreparedLinear, lora_linear
from multilora_kernels.triton import combine, expand, launch, product, shrink
from multilora_kernels.triton.launch import DeviceFacts, Launch
from tools.kernels.measure.counted.interpreter import launched_as_on

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SLOTS, RANK, K, WIDTHS = 6, 256, 4096, (4096, 1024, 1024)
H100 = DeviceFacts("sm_90", 132, pdl=False)
BF16, FP32 = torch.bfloat16, torch.float32
BACKENDS = ["triton", "triton-invariant"]


@pytest.fixture
def recorded(monkeypatch) -> list[Launch]:
    """The launches, with their `before` first; nothing runs."""
    seen: list[Launch] = []

    def record(launch: Launch) -> None:
        if launch.before is not None:
            seen.append(launch.before)
        seen.append(launch)

    monkeypatch.setattr(Launch, "run", record)
    return seen


@contextmanager
def nothing_is_worked_out() -> Iterator[None]:
    """Meanwhile everything fails that chooses blocks or describes a launch from scratch."""

    def never(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("it was worked out anew")

    with pytest.MonkeyPatch.context() as patch:
        for module, name in (
            (product, "Workload"),
            (product, "choose_shrink"),
            (product, "choose_expand"),
            (product, "prepare_shrink"),
            (product, "prepare_expand"),
            (expand, "prepare_combine"),
            (launch, "launch_options"),
        ):
            patch.setattr(module, name, never)
        patch.setattr(launch.Batch, "arguments", never)
        yield


class Layer:
    """One layer with memory for its weights but no contents."""

    def __init__(self, kind: str, *, add_inputs: bool = True) -> None:
        def weights(*shape: int) -> torch.Tensor:
            return torch.empty(SLOTS, 1, *shape, dtype=torch.bfloat16, device=DEVICE)

        self.lora_a = tuple(weights(RANK, K) for _ in WIDTHS)
        self.lora_b = tuple(weights(width, RANK) for width in WIDTHS)
        self.ranks = torch.ones(len(WIDTHS), SLOTS, dtype=torch.int32, device=DEVICE)
        self.plan = BatchPlan(PlanLayout(4096, SLOTS, 128), DEVICE)
        self.options: dict[str, Any] = {"backend": kind, "add_inputs": add_inputs}
        self.prepared = PreparedLinear(*self._weights(), self.plan.layout, **self.options)

    def _weights(self) -> tuple[Any, ...]:
        return self.lora_a, self.lora_b, self.ranks

    def batch(
        self, tokens: int, y_dtype: torch.dtype = BF16, x_dtype: torch.dtype = BF16
    ) -> tuple[Any, ...]:
        """y, with rows longer than it needs, x, and the plan, newly filled."""
        self.plan.update(np.arange(tokens) % SLOTS)
        y = torch.empty(tokens, sum(WIDTHS) + 64, dtype=y_dtype, device=DEVICE)
        return y, torch.empty(tokens, K, dtype=x_dtype, device=DEVICE), self.plan

    def call_plainly(self, y: torch.Tensor, x: torch.Tensor, plan: BatchPlan) -> None:
        lora_linear(y, x, *self._weights(), plan, **self.options)


def described(launch: Launch) -> tuple[Any, ...]:
    """All of a launch; of the memory between the halves, what it looks like."""

    def value(name: str, argument: Any) -> Any:
        if name in ("planes", "h"):
            return argument.shape, argument.stride(), argument.dtype, argument.device
        if isinstance(argument, torch.Tensor):
            return id(argument)
        if isinstance(argument, tuple):
            return tuple(map(id, argument))
        return argument

    arguments = {name: value(name, argument) for name, argument in launch.arguments.items()}
    in_order = tuple(arguments.items())
    return launch.kernel, launch.grid, in_order, launch.constants, launch.options


@pytest.mark.parametrize("add_inputs", [True, False], ids=["add", "overwrite"])
@pytest.mark.parametrize("kind", BACKENDS)
def test_every_launch_is_that_of_the_unprepared_layer(recorded, kind, add_inputs):
    """Token counts of which several share a power of two, in both directions."""
    with launched_as_on(H100):
        layer, kernels = Layer(kind, add_inputs=add_inputs), set()
        for tokens in (64, 33, 1, 600, 513, 1024, 2, 4096, 2049, 600, 64):
            for dtypes in ((BF16, BF16), (FP32, BF16), (BF16, FP32), (FP32, FP32)):
                batch = layer.batch(tokens, *dtypes)
                layer.prepared(*batch)
                ours = [described(launch) for launch in recorded]
                recorded.clear()
                layer.call_plainly(*batch)
                assert ours == [described(launch) for launch in recorded]
                kernels |= {launch.kernel for launch in recorded}
                recorded.clear()
    assert kernels == {shrink.shrink_kernel, combine.combine_kernel, expand.expand_kernel}


@pytest.mark.parametrize("kind", BACKENDS)
def test_a_range_of_token_counts_is_worked_out_once(recorded, kind):
    with launched_as_on(H100):
        layer = Layer(kind)
        for tokens in (1, 64, 1024, 4096):
            layer.prepared(*layer.batch(tokens))
    recorded.clear()
    with nothing_is_worked_out():
        for tokens in (64, 33, 1, 1000, 513, 4096, 2100):
            layer.prepared(*layer.batch(tokens))
        assert len(recorded) >= 14
        with pytest.raises(AssertionError, match="worked out anew"):
            layer.prepared(*layer.batch(200))


def test_the_halves_of_one_launch_share_their_planes(recorded):
    layer = Layer("triton")
    for _ in range(2):
        layer.prepared(*layer.batch(600))
        first, *between, last = recorded
        if between:
            assert between[0].arguments["planes"] is first.arguments["planes"]
            h = between[0].arguments["h"]
            assert last.arguments["planes"].data_ptr() == h.data_ptr()
        else:
            assert last.arguments["planes"] is first.arguments["planes"]
        recorded.clear()


def test_a_batchs_tensors_are_not_kept(recorded):
    layer = Layer("triton")
    y, x, plan = layer.batch(1024)
    watched = [weakref.ref(x), weakref.ref(y)]
    layer.prepared(y, x, plan)
    watched += [weakref.ref(launch.arguments["planes"]) for launch in recorded]
    recorded.clear()
    del x, y
    gc.collect()
    assert [reference() for reference in watched] == [None] * len(watched)


def test_no_tokens_are_no_work(recorded):
    layer = Layer("triton")
    y, x, plan = layer.batch(4)
    layer.prepared(y[:0], x[:0], plan)
    assert recorded == []
