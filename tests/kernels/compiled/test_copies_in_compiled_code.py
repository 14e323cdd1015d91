"""Compiled as Inductor compiles it, a layer's output is changed in place: nothing copies it.

PyTorch first makes a function without side effects of the code, in which the operator returns a new
y, and puts it back later. Where it cannot prove that y is not needed as it was, it copies all of y
before each layer.
"""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch._dynamo.backends.common import aot_autograd
from torch._guards import detect_fake_mode
from torch._inductor import config
from torch._inductor.fx_passes.post_grad import post_grad_passes
from torch._inductor.virtualized import V

from multilora_kernels import BatchPlan, PlanLayout, PreparedLinear, lora_linear

SLOTS, RANK, TOKENS, HIDDEN = 4, 8, 5, 32
WIDTHS = (24, 8, 8)
COPIES = {
    torch.ops.aten.clone.default,
    torch.ops.aten.copy.default,
    torch.ops.aten.copy_.default,
}


@pytest.fixture
def plan() -> BatchPlan:
    plan = BatchPlan(PlanLayout(16, SLOTS))
    plan.update(np.array([0, -1, 2, 2, 0]))
    return plan


@pytest.fixture
def weights() -> tuple[list[torch.Tensor], list[torch.Tensor], torch.Tensor]:
    a = [torch.randn(SLOTS, 1, RANK, HIDDEN) for _ in WIDTHS]
    b = [torch.randn(SLOTS, 1, width, RANK) for width in WIDTHS]
    return a, b, torch.full((len(WIDTHS), SLOTS), RANK, dtype=torch.int32)


def copies_in(function: Callable[..., torch.Tensor]) -> int:
    """Copies in the compiled function's code; it is run, and must compute what it did before."""
    graphs: list[torch.fx.GraphModule] = []

    def compiler(graph: torch.fx.GraphModule, inputs: list) -> torch.fx.GraphModule:
        with V.set_fake_mode(detect_fake_mode(inputs)):
            post_grad_passes(graph, True)
        graphs.append(graph)
        return graph

    torch._dynamo.reset()
    x, base = torch.randn(TOKENS, HIDDEN), torch.randn(HIDDEN, sum(WIDTHS))
    with torch.inference_mode():
        compiled = torch.compile(
            function, backend=aot_autograd(fw_compiler=compiler), fullgraph=True
        )
        torch.testing.assert_close(compiled(x, base), function(x, base))
    (graph,) = graphs
    calls = [node.target for node in graph.graph.nodes if node.op == "call_function"]
    assert any(getattr(call, "namespace", "") == "multilora" for call in calls)
    return sum(call in COPIES for call in calls)


def attention_input(y: torch.Tensor) -> torch.Tensor:
    """What follows on a fused layer: its slices are taken apart."""
    q, k, v = y.split(WIDTHS, dim=-1)
    return torch.cat([q.view(TOKENS, 3, 8).relu().flatten(1), k * v], dim=-1)


@pytest.mark.parametrize("newer", [True, False], ids=["functionalized v2", "v1"])
def test_a_prepared_layer_copies_nothing(plan, weights, newer):
    layer = PreparedLinear(*weights, plan.layout, backend="torch")

    def call(x: torch.Tensor, base: torch.Tensor) -> torch.Tensor:
        y = x @ base
        layer(y, x, plan)
        return attention_input(y)

    with config.patch(enable_auto_functionalized_v2=newer):
        assert copies_in(call) == 0


@pytest.mark.parametrize("newer", [True, False], ids=["functionalized v2", "v1"])
def test_a_layer_that_was_not_prepared_copies_nothing(plan, weights, newer):
    def call(x: torch.Tensor, base: torch.Tensor) -> torch.Tensor:
        y = x @ base
        lora_linear(y, x, *weights, plan, backend="torch")
        return attention_input(y)

    with config.patch(enable_auto_functionalized_v2=newer):
        assert copies_in(call) == 0


def test_an_output_that_is_needed_as_it_was_is_copied(plan, weights):
    """The count sees copies where there must be one."""
    layer = PreparedLinear(*weights, plan.layout, backend="torch")

    def call(x: torch.Tensor, base: torch.Tensor) -> torch.Tensor:
        before = x @ base
        y = before.clone()
        layer(y, x, plan)
        return attention_input(y).sum() + before

    assert copies_in(call) == 1
