"""Compiles what a layer of experts launches, and prints what is wrong with it as JSON."""

import json
import sys

import torch

from multilora_kernels.experts import pair_products
from multilora_kernels.triton.launch import noted_launches
from tools.kernels.measure.tuned.launch_cases import card_facts
from tools.kernels.report import compile_launch

SLOTS, EXPERTS, TOP_K, WIDTH, INNER = 8, 128, 8, 2048, 768


def problems(architecture: str, rank: int, tokens: int) -> list[str]:
    """What is wrong with a layer's launches; the sort of pairs may add atomically."""
    pair_products.device_facts = lambda _: card_facts(architecture)

    def empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    def products(inputs: int, width: int, slices: int) -> pair_products.PairProducts:
        a = [empty(SLOTS, EXPERTS, rank, inputs)] * slices
        b = [empty(SLOTS, EXPERTS, width, rank)] * slices
        return pair_products.PairProducts(a, b, False)

    first, second = products(WIDTH, INNER, 2), products(INNER, WIDTH, 1)
    pairs = tokens * TOP_K
    with noted_launches() as launches:
        experts = empty(tokens, TOP_K, dtype=torch.int32)
        plans = first.sort(experts, empty(tokens, dtype=torch.int32))
        first.add(empty(pairs, 2 * INNER), empty(tokens, WIDTH), plans, TOP_K)
        weights = empty(tokens, TOP_K, dtype=torch.float32)
        second.add(empty(pairs, WIDTH), empty(pairs, INNER), plans, TOP_K, weights)
    found = [compile_launch("experts", launch, architecture) for launch in launches]
    assert [each.kernel for each in found if each.kernel != "combine"] == [
        *("sort", "shrink", "expand", "shrink", "expand")
    ]
    return [
        f"sm {architecture}, rank {rank}, {tokens} tokens: {each.kernel}: {each.problem}"
        for each in found
        if each.problem and (each.kernel != "sort" or each.spilled_bytes)
    ]


if __name__ == "__main__":
    cases = [(arch, *shape) for arch in sys.argv[1:] for shape in ((16, 8), (64, 512))]
    print(json.dumps([problem for case in cases for problem in problems(*case)]))
