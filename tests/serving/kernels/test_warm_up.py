"""After the warm-up no step meets a Triton kernel that would have to be compiled first."""

import os
import re
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from multilora_kernels import SlotTable

pytestmark = pytest.mark.serving  # imports vLLM

SLOTS, RANK, HIDDEN, VOCABULARY = 5, 16, 96, 150
MAX_TOKENS, MAX_BATCHES = 4000, 20
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
PLACES = {"as allocated": (0, 0), "late": (1, 0), "odd rows": (0, 1), "both": (3, 8)}
"""Elements before the first row, and between rows."""


@pytest.fixture
def variants(monkeypatch) -> set:
    """The variants of kernels that were launched; nothing runs."""
    from multilora_kernels.triton.launch import Launch

    seen: set = set()

    def note(launch: Launch) -> None:
        options = vars(launch.kernel) if DEVICE == "cuda" else launch.kernel.kwargs
        fixed = options["do_not_specialize"] + options["do_not_specialize_on_alignment"]
        arguments = [
            (name, kind_of(value, name not in fixed)) for name, value in launch.arguments.items()
        ]
        facts = (*arguments, *launch.constants.items(), *launch.options.items())
        seen.add((launch.kernel.fn.__name__, facts))

    monkeypatch.setattr(Launch, "run", note)
    return seen


def kind_of(value: Any, special: bool) -> Any:
    """What Triton compiles anew for."""
    if isinstance(value, tuple):
        return tuple(kind_of(each, special) for each in value)
    if isinstance(value, torch.Tensor):
        return value.dtype, special and value.data_ptr() % 16 == 0
    return special and isinstance(value, int) and (value == 1, value % 16 == 0)


def stacked(*shape: int) -> torch.Tensor:
    return torch.zeros(SLOTS, *shape, dtype=torch.float16, device=DEVICE)


def make_layer(kind: str, a: Any, b: Any, **attributes: Any) -> Any:
    """A layer of one of vLLM's classes with the attributes that matter here."""
    from vllm.lora import layers

    layer = object.__new__(getattr(layers, kind))
    torch.nn.Module.__init__(layer)
    layer.lora_a_stacked, layer.lora_b_stacked = a, b
    layer.base_layer = SimpleNamespace(params_dtype=torch.bfloat16)
    vars(layer).update(attributes)
    layer.output_slices = tuple(each.size(-2) for each in b) if isinstance(b, tuple) else ()
    return layer


def make_layers() -> dict[str, Any]:
    def linear(*widths: int, k: int = HIDDEN, a_rank: int = RANK) -> tuple:
        a = tuple(stacked(1, a_rank, k) for _ in widths)
        return a, tuple(stacked(1, width, RANK) for width in widths)

    return {
        "qkv": make_layer("QKVParallelLinearWithLoRA", *linear(96, 32, 32)),
        "qkv of the next layer": make_layer("QKVParallelLinearWithLoRA", *linear(96, 32, 32)),
        "odd": make_layer("RowParallelLinearWithLoRA", *linear(51, k=75)),
        "aside": make_layer("ColumnParallelLinearWithLoRA", *linear(160)),
        "sharded": make_layer("ColumnParallelLinearWithShardedLoRA", *linear(80, a_rank=8)),
        "second of sharded rows": make_layer(
            "RowParallelLinearWithShardedLoRA", *linear(40), tp_rank=1
        ),
        "whole beside sharded": make_layer("ReplicatedLinearWithLoRA", *linear(64)),
        "router": make_layer(
            "ReplicatedLinearWithLoRA",
            *linear(8),
            base_layer=SimpleNamespace(params_dtype=torch.bfloat16, out_dtype=torch.float32),
        ),
        "router in float32": make_layer(
            "ReplicatedLinearWithLoRA",
            *linear(24),
            base_layer=SimpleNamespace(params_dtype=torch.float32),
        ),
        "embedding": make_layer(
            "VocabParallelEmbeddingWithLoRA", stacked(VOCABULARY, RANK), stacked(1, HIDDEN, RANK)
        ),
        "logits": make_layer(
            "LogitsProcessorWithLoRA",
            stacked(1, RANK, HIDDEN),
            stacked(1, VOCABULARY, RANK),
            base_layer=SimpleNamespace(head_dtype=torch.float32),
        ),
    }


def make_slots() -> SlotTable:
    return SlotTable([stacked(1, RANK, HIDDEN)], [stacked(1, HIDDEN, RANK)])


def make_wrapped_layers(backend: str, max_tokens: int = MAX_TOKENS) -> tuple[Any, dict[str, Any]]:
    """A wrapper, and layers that share it."""
    from vllm_multilora.integration.step.punica import MultiLoRAPunicaWrapper

    wrapper = MultiLoRAPunicaWrapper(
        max_tokens, MAX_BATCHES, DEVICE, backend=backend,
        lora_config=SimpleNamespace(max_loras=SLOTS),
    )  # fmt: skip
    layers = make_layers()
    table = torch.zeros(20, SLOTS, dtype=torch.int32, device=DEVICE)
    for row, layer in enumerate(layers.values()):
        slices = len(layer.output_slices) or 1
        ranks = table[row : row + slices]  # aligned for the first, not for the next
        layer.set_mapping(wrapper.for_layer(ranks, ranks))
    return wrapper, layers


def call_as_vllm_does(
    layers: dict[str, Any], tokens: int, outputs: int, late: int, extra: int
) -> None:
    def activations(rows: int, width: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        memory = torch.zeros(rows * (width + extra) + late, dtype=dtype, device=DEVICE)
        return memory[late:].view(rows, width + extra)[:, :width]

    def half(rank: int) -> torch.Tensor:
        return activations(tokens, rank, torch.float32).unsqueeze(0)

    half_precision, single = torch.bfloat16, torch.float32
    for name, of_y, of_x, options in (
        ("qkv", half_precision, half_precision, {}),
        ("qkv of the next layer", half_precision, half_precision, {}),
        ("odd", half_precision, half_precision, {}),
        ("aside", half_precision, half_precision, {"add_inputs": False}),
        ("aside", half_precision, half_precision, {}),  # as vLLM's towers and replicated layers do
        ("whole beside sharded", half_precision, half_precision, {}),
        ("router", single, half_precision, {}),
        ("router in float32", single, single, {}),
    ):
        layer = layers[name]
        a, b = layer.lora_a_stacked, layer.lora_b_stacked
        layer.punica_wrapper.add_lora_linear(
            activations(tokens, sum(layer.output_slices), of_y),
            activations(tokens, a[0].size(-1), of_x),
            a,
            b,
            1.0,
            layer.output_slices,
            **options,
        )
    for name, rank, first in (("sharded", 8, 0), ("second of sharded rows", RANK, 40)):
        layer = layers[name]
        layer.punica_wrapper.add_shrink(
            half(rank), activations(tokens, HIDDEN), layer.lora_a_stacked, 1.0
        )
        layer.punica_wrapper.add_expand(
            activations(tokens, 80), half(RANK), layer.lora_b_stacked, layer.output_slices,
            offset_start=first,
        )  # fmt: skip
    layer = layers["embedding"]
    layer.punica_wrapper.add_lora_embedding(
        activations(tokens, HIDDEN), activations(tokens, RANK, torch.float16), layer.lora_b_stacked
    )
    layer = layers["logits"]
    layer.punica_wrapper.add_lora_logits(
        activations(outputs, 192, torch.float32), activations(outputs, HIDDEN),
        layer.lora_a_stacked, layer.lora_b_stacked, 1.0,
    )  # fmt: skip


@pytest.mark.parametrize("backend", ["triton", "triton-invariant"])
def test_steps_of_any_size_launch_only_what_the_warm_up_has_launched(
    variants, backend, monkeypatch
):
    from vllm.lora.layers import LoRAMapping

    from vllm_multilora.integration.worker.slots.warm_up import warm_up

    monkeypatch.setenv("VLLM_LORA_ENABLE_DUAL_STREAM", "1")
    wrapper, layers = make_wrapped_layers(backend)
    warm_up(layers.values(), torch.bfloat16, make_slots())
    warmed = set(variants)
    assert {kernel for kernel, _ in warmed} == {"shrink_kernel", "expand_kernel", "combine_kernel"}
    for tokens in (1, 2, 3, 5, 8, 13, 31, 64, 100, 129, 257, 512, 513, 1500, MAX_TOKENS):
        outputs = min(tokens, MAX_BATCHES)
        lengths = [tokens // outputs] * outputs
        lengths[-1] += tokens - sum(lengths)
        adapters = [1 + i % SLOTS for i in range(outputs)]
        mapping = LoRAMapping(tuple(np.repeat(adapters, lengths)), tuple(adapters))
        wrapper.update_metadata(mapping, list(range(1, SLOTS + 1)), SLOTS + 1, VOCABULARY)
        for place, (late, extra) in PLACES.items():
            call_as_vllm_does(layers, tokens, outputs, late, extra)
            assert variants == warmed, f"a step of {tokens} tokens, {place}"
        with wrapper.output_rows.from_prompt(0):  # for prompt_logprobs of all of them
            call_as_vllm_does(layers, tokens, tokens, 0, 0)
        assert variants == warmed, f"the logits of {tokens} tokens"


PROGRAM = """
import logging
import torch
from tests.serving.kernels.test_warm_up import make_slots, make_wrapped_layers
from tools.kernels.measure.compiled.without_card import launched_without_card
from vllm_multilora.integration.worker.slots.warm_up import warm_up

logging.basicConfig(level="INFO", format="%(message)s", force=True)
logging.getLogger("vllm_multilora").parent = logging.getLogger()
with launched_without_card(compiling=True) as launches:
    _, layers = make_wrapped_layers("triton", 64)
    names = "qkv", "qkv of the next layer", "sharded", "embedding"
    warm_up([layers[name] for name in names], torch.bfloat16, make_slots())
print("late:", launches.compiled, "launched:", len(launches.launched))
"""


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="the driver is a stand-in")
def test_processes_compile_what_the_warm_up_launches_and_it_says_so(tmp_path):
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        env=environment, capture_output=True, text=True, timeout=540, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    said = re.search(
        r"LoRA kernels for 4 kinds of layer are ready after [\d.]+ s: (\d+) kernels, of which "
        r"(\d+) processes compiled what Triton's cache lacked, and this one 0\.",
        done.stderr,
    )
    assert said is not None, done.stderr
    kernels, processes = map(int, said.groups())
    assert processes == min(len(os.sched_getaffinity(0)), 16)
    assert len(list(tmp_path.glob("*/*.cubin"))) == kernels > 5
    assert "late: [] launched:" in done.stdout
