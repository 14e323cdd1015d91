"""Adapters that hold all experts of a layer as one: PEFT writes them, slots hold what it means."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.adapters.checkpoints import write
from vllm_multilora.adapters.problems import Code
from vllm_multilora.adapters.validation import validate
from vllm_multilora.integration.worker_link.fill_link import Answer, Filled
from vllm_multilora.integration.worker_link.orders import Fill
from vllm_multilora.store.clients.client import StoreClient
from vllm_multilora.store.protocol.messages import Failed, Loaded, LoadRequest, StoreSettings
from vllm_multilora.store.store_launch import StoreThread

from ..allocated_slots import Setting, real_manager, write_configs

pytestmark = pytest.mark.serving

LIMIT_S = 30.0
SLOT, RANK, ALPHA = 1, 4, 8
SETTING = Setting(max_loras=2, max_lora_rank=8)


@dataclass(frozen=True)
class Trained:
    """An adapter, and what it adds to experts.

    Attributes:
        folder: Of the adapter.
        deltas: By the experts' layer and parameter: float32 [experts, outputs, inputs].
    """

    folder: Path
    deltas: Mapping[tuple[str, str], torch.Tensor]


@pytest.fixture(scope="module")
def configs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("configs")
    write_configs(folder)
    return folder


@pytest.fixture(scope="module")
def trained(configs: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Trained]:
    """An adapter of all experts, for each of two base models."""
    return {
        model: _train(configs / model, tmp_path_factory.mktemp(model))
        for model in ("gpt-oss", "mixtral")
    }


def _train(base: Path, folder: Path) -> Trained:
    from peft import LoraConfig, get_peft_model
    from peft.tuners.lora.layer import ParamWrapper
    from transformers import AutoConfig, AutoModelForCausalLM

    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(base))
    config = LoraConfig(
        task_type="CAUSAL_LM",
        target_modules=[],
        target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
        r=RANK,
        lora_alpha=ALPHA,
        rank_pattern={"experts.down_proj": 2},
        alpha_pattern={"mlp.experts.gate_up_proj": 16},
    )
    peft: Any = get_peft_model(model.float(), config)
    generator = torch.Generator().manual_seed(0)
    deltas = {}
    for name, module in peft.named_modules():
        if isinstance(module, ParamWrapper):
            for part in (module.lora_A, module.lora_B):
                weight = part["default"].weight.data
                values = torch.randn(weight.shape, generator=generator)
                weight.copy_(values.bfloat16())  # as the slots can hold them
            layer = name[name.index("model.layers.") :].partition(".mlp.experts")[0]
            delta = module.get_delta_weight("default").detach()
            transposed = getattr(module.get_base_layer(), "is_transposed", False)
            deltas[layer, module.parameter_name] = delta.mT if transposed else delta
    peft.save_pretrained(folder)
    return Trained(folder, deltas)


@contextmanager
def filler(manager: Any) -> Iterator[Any]:
    """Fills slots of a real model from a store, and returns what its worker answers."""
    from vllm.lora.request import LoRARequest

    from vllm_multilora.integration.worker.slots.filler import SlotFiller
    from vllm_multilora.integration.worker.slots.special import SpecialParts

    client = StoreClient(StoreThread(), "server")
    try:
        client.configure([manager.layout], StoreSettings())
        answers: SimpleQueue[Answer] = SimpleQueue()
        link: Any = SimpleNamespace(tell=answers.put)
        filler = SlotFiller(manager, SpecialParts(manager, None), link)
        filler.open_memory(client.address, "server")

        def fill(folder: Path) -> Answer:
            client.request_load(LoadRequest(7, "experts", str(folder)))
            while True:
                for message in client.poll(LIMIT_S):
                    assert not isinstance(message, Failed), message
                    if isinstance(message, Loaded):
                        lora = LoRARequest("experts", 7, str(folder))
                        filler.begin(Fill(1, lora, message.pack, slot=SLOT))
                        return answers.get(timeout=LIMIT_S)

        yield fill
    finally:
        client.close()


def in_slot(layer: Any, part: str) -> torch.Tensor:
    """What the slot adds to projections: float32 [experts, outputs, inputs]."""
    a, b = (getattr(layer, f"{part}_lora_{x}_stacked") for x in "ab")
    parts = [two[SLOT].float() @ one[SLOT].float() for one, two in zip(a, b, strict=True)]
    return torch.cat(parts, dim=1)


def write_of_queries(folder: Path) -> Path:
    """Writes an adapter that leaves experts alone."""
    prefix = "base_model.model.model.layers.0.self_attn.q_proj.lora"
    shapes = {"A": (RANK, 96), "B": (256, RANK)}
    tensors = {f"{prefix}_{part}.weight": torch.ones(shape) for part, shape in shapes.items()}
    return write(folder, tensors, RANK, ALPHA)


@pytest.mark.smoke("MoE formats")
@pytest.mark.parametrize(
    ("model", "mixed"),
    [("gpt-oss", False), ("gpt-oss", True), ("mixtral", False)],
    ids=["held-as-one", "mixed-formats", "one-by-one"],
)
def test_slots_hold_what_peft_adds(
    configs: Path, trained: dict[str, Trained], tmp_path: Path, model: str, mixed: bool
) -> None:
    """Nobody has said of the adapter which format it has, and which one the model.

    An adapter of other layers that gets its slot afterwards adds nothing to experts.
    """
    from vllm_multilora.integration.offline.model_without_weights import one_worker

    formats = {"enable_mixed_moe_lora_format": mixed}
    adapter = trained[model]
    with (
        real_manager(configs / model, SETTING, one_worker, **formats) as manager,
        filler(manager) as fill,
    ):
        assert validate(adapter.folder, manager.layout) == []
        answer = fill(adapter.folder)
        assert isinstance(answer, Filled), answer
        layers = {
            name.rpartition(".")[0].rpartition(".")[0]: module
            for name, module in manager.modules.items()
            if name.endswith("experts")
        }
        assert len(layers) == 2
        for name, layer in layers.items():
            expected = adapter.deltas[name, "gate_up_proj"]
            if mixed:  # gate and up are apart there, which take turns in a GPT-OSS
                expected = torch.cat([expected[:, ::2], expected[:, 1::2]], dim=1)
            torch.testing.assert_close(in_slot(layer, "w13"), expected, rtol=1e-4, atol=1e-4)
            expected = adapter.deltas[name, "down_proj"]
            torch.testing.assert_close(in_slot(layer, "w2"), expected, rtol=1e-4, atol=1e-4)
        assert isinstance(fill(write_of_queries(tmp_path)), Filled)
        for layer in layers.values():
            assert not any(in_slot(layer, part).any() for part in ("w13", "w2"))


@pytest.mark.parametrize("model", ["gpt-oss", "mixtral"])
def test_triton_kernels_add_what_peft_adds(
    configs: Path,
    trained: dict[str, Trained],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    model: str,
) -> None:
    """Called as vLLM's experts call them on a GPU: between the two products, and after both.

    An adapter of other layers that gets the slot afterwards adds nothing.
    """
    import numpy as np
    from vllm.lora.layers.utils import LoRAMappingType

    from vllm_multilora.integration.offline.model_without_weights import one_worker
    from vllm_multilora.integration.step.mapping import BatchMapping

    monkeypatch.setenv("TRITON_INTERPRET", "1")
    own = {"backend": "triton", "kernels": "ours"}
    adapter = trained[model]
    with (
        real_manager(configs / model, SETTING, one_worker, own) as manager,
        filler(manager) as fill,
    ):
        assert isinstance(fill(adapter.folder), Filled)
        manager.give_slot(SLOT, 7)
        ids, rows = np.array([7, 0, 7]), np.array([4, 2, 3])
        manager.set_adapter_mapping(BatchMapping(ids, rows, rows, LoRAMappingType.LANGUAGE))
        generator = torch.Generator().manual_seed(0)
        experts = torch.stack([torch.randperm(4, generator=generator)[:2] for _ in range(9)])
        weights = torch.rand(9, 2, generator=generator)
        is_adapted = torch.tensor([True] * 4 + [False] * 2 + [True] * 3)[:, None, None]
        layers = {n: layer for n, layer in manager.modules.items() if n.endswith("experts")}
        for name, layer in layers.items():
            of_layer = name.rpartition(".")[0].rpartition(".")[0]
            x = torch.randn(9, 96, generator=generator).bfloat16()
            h = torch.randn(18, 176, generator=generator).bfloat16()
            first, second = call_experts(layer, x, h, experts, weights)
            delta = adapter.deltas[of_layer, "gate_up_proj"][experts]
            expected = torch.einsum("tkoi,ti->tko", delta, x.float()) * is_adapted
            assert (first - expected).norm() < 0.01 * expected.norm()
            delta = adapter.deltas[of_layer, "down_proj"][experts]
            expected = torch.einsum("tkoi,tki->tko", delta, h.float().view(9, 2, -1)) * is_adapted
            expected *= weights[..., None]
            assert (second - expected).norm() < 0.01 * expected.norm()
            assert not any(each[~is_adapted[:, 0, 0]].any() for each in (first, second))
        assert isinstance(fill(write_of_queries(tmp_path)), Filled)
        for layer in layers.values():
            assert not any(each.any() for each in call_experts(layer, x, h, experts, weights))


def call_experts(
    layer: Any, x: torch.Tensor, h: torch.Tensor, experts: torch.Tensor, weights: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """What adapters add to both of a layer's products, [tokens, k, width]."""
    calls = layer._moe_kernel.fused_experts
    tokens, top_k = experts.shape
    of_both = {"w1": None, "w2": None, "num_tokens": tokens, "top_k_num": top_k}
    of_both |= {"topk_weights": weights}
    first = torch.zeros(tokens, top_k, 352, dtype=torch.bfloat16)
    second = torch.zeros(tokens, top_k, 96, dtype=torch.bfloat16)
    context = calls._lora_context
    given = calls.apply_w13_lora(
        context, y=first, x=x, topk_ids=experts, expert_map=None, **of_both
    )
    names = "sorted_token_ids_lora", "expert_ids_lora", "num_tokens_post_padded_lora"
    found = dict(zip((*names, "token_lora_mapping"), given, strict=True))
    calls.apply_w2_lora(context, y=second, x=h, **found, **of_both)
    return first, second


def test_experts_without_gates_have_all_that_peft_adds() -> None:
    """vLLM builds models of them for GPUs only: this is what becomes of an adapter's tensors."""
    from vllm.lora.lora_model import LoRAModel
    from vllm.lora.lora_weights import LoRALayerWeights

    from vllm_multilora.integration.worker.slots.model_manager import MultiLoRAModelManager

    name, experts, rank, width, inner = "model.layers.0.mixer.experts", 3, 2, 4, 6
    up_a, up_b = torch.randn(experts * rank, width), torch.randn(inner, rank * experts)
    down_a, down_b = torch.randn(experts * rank, inner), torch.randn(width, rank * experts)
    lora = LoRAModel(
        1,
        rank,
        {
            f"{name}.base_layer": LoRALayerWeights("", rank, rank, up_a, up_b),
            name: LoRALayerWeights("", rank, rank, down_a, down_b),
        },
    )
    manager = object.__new__(MultiLoRAModelManager)
    manager.is_pooling_model = False
    manager.model = SimpleNamespace(config=SimpleNamespace(architectures=["NemotronHForCausalLM"]))
    module = SimpleNamespace(
        local_num_experts=experts,
        global_num_experts=experts,
        ep_rank=0,
        moe_config=SimpleNamespace(is_act_and_mul=False),
    )
    manager._convert_3d_to_2d_moe_lora(lora, module, name)
    found = lora.get_lora(name)
    for place, (a, b) in enumerate(((up_a, up_b), (down_a, down_b))):
        # PEFT's `ParamWrapper.get_delta_weight`.
        of_b = b.reshape(len(b), rank, experts)
        expected = torch.einsum("ore,eri->eoi", of_b, a.reshape(experts, rank, -1))
        torch.testing.assert_close(found.lora_b[place] @ found.lora_a[place], expected)


SHARED = {  # of each projection the shapes of A and B
    "w1": ((1, RANK, 96), (4, 176, RANK)),
    "w2": ((4, RANK, 176), (1, 96, RANK)),
    "w3": ((1, RANK, 96), (4, 176, RANK)),
}


def write_shared(folder: Path, shapes: Mapping[str, tuple[tuple[int, ...], ...]]) -> Path:
    """Writes an adapter of experts that share matrices, for both layers of a Mixtral."""
    generator = torch.Generator().manual_seed(0)
    tensors = {
        f"base_model.model.model.layers.{layer}.block_sparse_moe.experts.{kind}.lora_{part}.weight":
        torch.randn(shape, generator=generator).bfloat16().float()
        for layer in range(2)
        for kind, both in shapes.items()
        for part, shape in zip("AB", both, strict=True)
    }  # fmt: skip
    return write(folder, tensors, RANK, RANK)


def test_experts_that_share_matrices_are_served_where_slots_do(
    configs: Path, tmp_path: Path
) -> None:
    from safetensors.torch import load_file

    from vllm_multilora.integration.offline.model_without_weights import one_worker

    folder = write_shared(tmp_path, SHARED)
    tensors = load_file(folder / "adapter_model.safetensors")
    with (
        real_manager(
            configs / "mixtral", SETTING, one_worker, enable_moe_shared_loras=True
        ) as manager,
        filler(manager) as fill,
    ):
        assert validate(folder, manager.layout) == []
        assert isinstance(fill(folder), Filled)
        for name, layer in manager.modules.items():
            if name.endswith("experts"):
                of_w1 = f"base_model.model.{name}.w1.lora"
                a, b = tensors[f"{of_w1}_A.weight"], tensors[f"{of_w1}_B.weight"]
                of_a, of_b = layer.w13_lora_a_stacked[0], layer.w13_lora_b_stacked[0]
                found = of_b[SLOT].float() @ of_a[SLOT].float()
                torch.testing.assert_close(found, b @ a, rtol=1e-4, atol=1e-4)
        for kind, shapes in (
            ("w1", ((4, RANK, 96), (4, 176, RANK))),  # A of each, of which vLLM would take one
            ("w2", ((4, RANK, 176), (96, RANK))),
            ("w3", ((1, RANK, 95), (4, 176, RANK))),
        ):
            wrong = write_shared(tmp_path / kind, {**SHARED, kind: shapes})
            problems = validate(wrong, manager.layout)
            assert {problem.code for problem in problems} == {Code.WRONG_SHAPE}
            assert all(f".{kind}." in problem.where for problem in problems)


@pytest.mark.parametrize(
    ("experts", "rank", "width", "code"),
    [
        pytest.param(8, RANK, 96, Code.RANK_NOT_AS_CONFIGURED, id="more-experts"),
        pytest.param(2, RANK, 96, Code.RANK_NOT_AS_CONFIGURED, id="fewer-experts"),
        pytest.param(4, 2 * RANK, 96, Code.RANK_NOT_AS_CONFIGURED, id="another-rank"),
        pytest.param(4, RANK, 64, Code.WRONG_SHAPE, id="a-narrower-model"),
        pytest.param(4, RANK, 96, None, id="as-the-model-has-them"),
    ],
)
def test_experts_held_as_one_have_the_models_sizes(
    configs: Path, tmp_path: Path, experts: int, rank: int, width: int, code: Code | None
) -> None:
    """Slots would take what there is, and PEFT refuses it."""
    from vllm_multilora.integration.offline.model_without_weights import ServerFlags, offline_layout

    layout = offline_layout(ServerFlags(str(configs / "gpt-oss"), max_lora_rank=8))
    tensors = {}
    for module, inputs, outputs in (("experts.base_layer", width, 352), ("experts", 176, width)):
        prefix = f"base_model.model.model.layers.0.mlp.{module}.lora"
        tensors[f"{prefix}_A.weight"] = torch.ones(experts * rank, inputs)
        tensors[f"{prefix}_B.weight"] = torch.ones(outputs, experts * rank)
    targets = {"target_modules": [], "target_parameters": ["gate_up_proj", "down_proj"]}
    write(tmp_path, tensors, RANK, ALPHA, **targets)
    problems = validate(tmp_path, layout)
    assert {problem.code for problem in problems} == ({code} if code else set())


@pytest.mark.parametrize("width", [96, 64])
def test_single_experts_have_the_models_sizes(configs: Path, tmp_path: Path, width: int) -> None:
    from vllm_multilora.integration.offline.model_without_weights import ServerFlags, offline_layout

    layout = offline_layout(ServerFlags(str(configs / "mixtral"), max_lora_rank=8))
    tensors = {}
    experts = "base_model.model.model.layers.0.block_sparse_moe.experts"
    for kind, inputs, outputs in (("w1", width, 176), ("w2", 176, width), ("w3", width, 176)):
        for expert in range(4):
            prefix = f"{experts}.{expert}.{kind}.lora"
            tensors[f"{prefix}_A.weight"] = torch.ones(RANK, inputs)
            tensors[f"{prefix}_B.weight"] = torch.ones(outputs, RANK)
    write(tmp_path, tensors, RANK, ALPHA)
    problems = validate(tmp_path, layout)
    assert {problem.code for problem in problems} == ({Code.WRONG_SHAPE} if width != 96 else set())
