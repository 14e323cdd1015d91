"""Under torch.compile a call is one opaque in-place operator that reads the current plan."""

import numpy as np
import torch

from multilora_kernels import lora_linear

from .problems import make_problem
from .tolerances import assert_close


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
