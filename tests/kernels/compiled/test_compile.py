"""Under torch.compile a call is one opaque in-place operator that reads the current plan."""

import gc

import numpy as np
import pytest
import torch

from multilora_kernels import PreparedLinear, lora_linear

from ..problems import make_problem
from ..tolerances import assert_close


def test_compiled_code_follows_plan_updates_without_recompiling():
    torch._dynamo.reset()
    problem = make_problem([0, 1, -1, 2, 1, 0], widths=(16, 8))
    weight = torch.randn(27, 40)
    graphs = 0

    def backend(graph, inputs):
        nonlocal graphs
        graphs += 1
        return graph.forward

    def layer(x):
        y = torch.nn.functional.linear(x, weight)
        lora_linear(
            y, x, problem.lora_a, problem.lora_b, problem.ranks, problem.plan, backend="native"
        )
        return y * 2

    compiled = torch.compile(layer, backend=backend, fullgraph=True)
    for token_slots in ([0, 1, -1, 2, 1, 0], [-1] * 6, [7, 7, 7, 3, 3, -1]):
        problem.token_slots = token_slots
        problem.plan.update(np.array(token_slots))
        problem.y = torch.nn.functional.linear(problem.x, weight)
        assert_close(compiled(problem.x), problem.expected() * 2, problem.magnitude() * 2)
    assert graphs == 1


def test_the_operators_pass_torch_library_checks():
    problem = make_problem([0, 1, -1], widths=(8,))
    layout = problem.plan.layout
    arguments = (
        problem.y,
        problem.x,
        problem.lora_a,
        problem.lora_b,
        problem.ranks,
        problem.plan.buffer,
        problem.plan.buffer,  # the host's side of a plan on the CPU is the same tensor
        layout.max_tokens,
        layout.max_loras,
        layout.tile_rows,
        1.0,
        0,
        True,
        "native",
    )
    # NaNs past the true ranks are fine for the kernels but not for opcheck's comparisons.
    for weights in (*problem.lora_a, *problem.lora_b):
        weights.nan_to_num_(0.0)
    torch.library.opcheck(torch.ops.multilora.lora_linear.default, arguments)


class Layer(torch.nn.Module):
    """A linear layer that calls a prepared one, as an engine's layers do; y is a view."""

    def __init__(self, problem, **options):
        super().__init__()
        weights = problem.lora_a, problem.lora_b, problem.ranks
        self.plan = problem.plan
        self.weight = torch.randn(27, 40)
        self.prepared = PreparedLinear(*weights, self.plan.layout, backend="native", **options)

    def forward(self, x):
        y = torch.nn.functional.linear(x, self.weight)
        self.prepared(y.view(-1, y.size(-1)), x, self.plan)
        return y * 2


def compiled_graph(layer: Layer, x: torch.Tensor):
    """What torch.compile has made of a layer, and what it gives to that."""
    torch._dynamo.reset()
    found = []

    def backend(graph, inputs):
        found.append((graph, inputs))
        return graph.forward

    torch.compile(layer, backend=backend, fullgraph=True)(x)
    ((graph, inputs),) = found
    return graph, inputs


@pytest.mark.parametrize("add_inputs", [True, False], ids=["add", "overwrite"])
def test_a_prepared_layer_is_one_operator_that_follows_the_plan(add_inputs):
    torch._dynamo.reset()
    problem = make_problem([0, 1, -1, 2, 1, 0], widths=(16, 8))
    layer = Layer(problem, add_inputs=add_inputs)
    # With functionalization, as inductor has it.
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    for token_slots in ([0, 1, -1, 2, 1, 0], [-1] * 6, [7, 7, 7, 3, 3, -1]):
        problem.token_slots = token_slots
        problem.plan.update(np.array(token_slots))
        problem.y = torch.nn.functional.linear(problem.x, layer.weight)
        options = {"add_inputs": add_inputs}
        expected, size = problem.expected(**options), problem.magnitude(**options)
        assert_close(compiled(problem.x), expected * 2, size * 2)
    graph, _ = compiled_graph(layer, problem.x)
    calls = [node for node in graph.graph.nodes if node.op == "call_function"]
    assert torch.ops.multilora.prepared.default in [node.target for node in calls]


def test_compiled_code_of_one_layer_computes_another_that_is_put_in_its_place():
    """Engines share compiled code, and find that of an earlier process: nothing is baked in."""
    problem, other = (make_problem([0, 1, -1, 2], widths=(16, 8), seed=seed) for seed in (0, 1))
    first, second = Layer(problem), Layer(other)
    graph, inputs = compiled_graph(first, problem.x)
    in_place_of = {
        id(own): others
        for own, others in (
            (problem.x, other.x),
            (first.weight, second.weight),
            (first.plan.buffer, second.plan.buffer),
            (first.prepared._number, second.prepared._number),
        )
    }
    assert {id(t) for t in inputs if isinstance(t, torch.Tensor)} == in_place_of.keys()
    (found,) = graph(*(in_place_of.get(id(each), each) for each in inputs))
    assert torch.equal(found, second(other.x))
    assert not torch.equal(found, first(problem.x))


def test_a_prepared_layer_that_is_gone_is_missed():
    problem = make_problem([0, 1, -1], widths=(8,))
    layer = Layer(problem)
    number, plan = layer.prepared._number, problem.plan
    del layer
    gc.collect()
    with pytest.raises(RuntimeError, match="must be kept as long as"):
        torch.ops.multilora.prepared(problem.y, problem.x, plan.buffer, plan.host, number)


def test_the_operator_of_prepared_layers_passes_torch_library_checks():
    problem = make_problem([0, 1, -1], widths=(8,))
    for weights in (*problem.lora_a, *problem.lora_b):
        weights.nan_to_num_(0.0)
    prepared = Layer(problem).prepared
    plan = problem.plan.buffer
    arguments = problem.y, problem.x, plan, plan, prepared._number
    torch.library.opcheck(torch.ops.multilora.prepared.default, arguments)
