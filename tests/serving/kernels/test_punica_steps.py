"""What a step costs the punica wrapper: which copies it makes, and that nothing waits or moves."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from multilora_kernels.batch.staging import StagingRing

pytestmark = pytest.mark.serving  # imports vLLM

SLOTS = [5, None, 9, 3]
MAX_TOKENS, VOCABULARY = 64, 1000


def make_wrapper(
    device: str = "cpu", backend: str = "torch", *, specialize_active_lora: bool = False
) -> Any:
    from vllm_multilora.integration.step.punica import MultiLoRAPunicaWrapper

    lora_config = SimpleNamespace(
        max_loras=len(SLOTS), specialize_active_lora=specialize_active_lora
    )
    return MultiLoRAPunicaWrapper(MAX_TOKENS, 8, device, backend=backend, lora_config=lora_config)


def tuples(lengths: list[int], adapters: list[int]) -> Any:
    """A mapping as vLLM builds it: an entry per token, and one per sampled row."""
    from vllm.lora.layers import LoRAMapping

    return LoRAMapping(tuple(np.repeat(adapters, lengths)), tuple(adapters), is_prefill=True)


def arrays(lengths: list[int], adapters: list[int]) -> Any:
    from vllm.lora.layers.utils import LoRAMappingType

    from vllm_multilora.integration.step.mapping import BatchMapping

    return BatchMapping(np.array(adapters), np.array(lengths), None, LoRAMappingType.LANGUAGE)


def step(wrapper: Any, lengths: list[int], adapters: list[int], mapping=tuples) -> None:
    wrapper.update_metadata(mapping(lengths, adapters), SLOTS, len(SLOTS) + 1, VOCABULARY)


def layer(kind: str) -> Any:
    """A layer of one of vLLM's classes, without weights: the wrapper asks for its class only."""
    from vllm.lora import layers

    return object.__new__(getattr(layers, kind))


LINEAR, LOGITS = "ColumnParallelLinearWithLoRA", "LogitsProcessorWithLoRA"
EMBEDDING, HEAD = "VocabParallelEmbeddingWithLoRA", "ClassificationHeadWithLoRA"


@pytest.mark.parametrize("mapping", [tuples, arrays])
def test_what_vllms_layers_read_of_a_step(mapping):
    wrapper = make_wrapper()
    step(wrapper, [2, 1, 3], [9, 0, 5], mapping)
    slots = [2, 2, -1, 0, 0, 0]
    assert (wrapper.plan.tokens, wrapper.plan.rows, wrapper.plan.runs) == (6, 5, 2)
    offsets = [max(slot, 0) * VOCABULARY for slot in slots]
    assert wrapper._embeddings_indices[:6].tolist() == offsets
    assert wrapper.stock_rows.sampler_slots.rows.tolist() == [2, -1, 0]
    assert wrapper.token_lora_indices.tolist() == slots


@pytest.mark.parametrize("mapping", [tuples, arrays])
def test_in_decoding_one_plan_serves_tokens_and_sampled_rows(mapping):
    wrapper = make_wrapper()
    step(wrapper, [1, 1, 1], [9, 0, 5], mapping)
    assert wrapper.output_rows.plan(torch.empty(3, 4)) is wrapper.plan
    step(wrapper, [1, 2], [9, 5], mapping)
    assert wrapper.output_rows.plan(torch.empty(2, 4)) is not wrapper.plan


def test_a_batch_is_not_taken_for_the_one_before_in_whose_arrays_it_is():
    """vLLM changes these in place, and whoever is told of a batch compares it with the last."""
    from vllm.lora.layers.utils import LoRAMappingType

    from vllm_multilora.integration.step.mapping import BatchMapping

    ids, tokens = np.array([9, 5]), np.array([1, 1])
    for changed in (ids, tokens):
        before = BatchMapping(ids, tokens, None, LoRAMappingType.LANGUAGE)
        assert before == BatchMapping(ids, tokens, None, LoRAMappingType.LANGUAGE)
        changed[:] = [3, 2]
        assert before != BatchMapping(ids, tokens, None, LoRAMappingType.LANGUAGE)


def test_rows_from_a_prompt_are_those_of_its_tokens():
    """As for `prompt_logprobs`: vLLM slices prompts' rows, and copies those that it samples."""
    from vllm_multilora.integration.step.output_rows import with_known_rows
    from vllm_multilora.integration.worker.slots.model_manager import MultiLoRAModelManager

    wrapper = make_wrapper()
    step(wrapper, [2, 1, 3], [9, 0, 5])
    a, b = torch.ones(4, 1, 8, 16), torch.ones(4, 1, 24, 8)
    b *= torch.arange(1, 5).view(4, 1, 1, 1)  # each slot's own

    class Model(torch.nn.Module):
        def compute_logits(self, hidden_states):
            y = torch.zeros(len(hidden_states), 24)
            wrapper.add_lora_logits(y, hidden_states.clone(), a, b, 1.0)
            return (y[:, 0] / (8 * 16) - 1).int()

    model = Model()
    model.lora_manager = MultiLoRAModelManager.__new__(MultiLoRAModelManager)
    model.lora_manager.punica_wrapper_mapping = {"model": wrapper}
    known = with_known_rows(model)
    assert isinstance(known, Model)
    hidden_states, sampled = torch.ones(6, 16), torch.tensor([1, 2, 5])
    for padded in (hidden_states, torch.ones(9, 16)[:6]):
        assert known.compute_logits(padded[1:3]).tolist() == [2, -1]
        assert known.compute_logits(padded[4:6]).tolist() == [0, 0]
        assert known.compute_logits(padded[:6]).tolist() == [2, 2, -1, 0, 0, 0]
        assert known.compute_logits(padded[sampled]).tolist() == [2, -1, 0]


def test_padding_rows_have_valid_embedding_offsets_before_and_after_a_step():
    """A captured graph looks up its padding rows too."""
    wrapper = make_wrapper()
    last = (len(SLOTS) - 1) * VOCABULARY
    assert wrapper._embeddings_indices.eq(0).all()
    step(wrapper, [30, 30], [3, 9])
    step(wrapper, [1], [5])
    assert wrapper._embeddings_indices.shape == (MAX_TOKENS,)
    assert wrapper._embeddings_indices.ge(0).logical_and(wrapper._embeddings_indices <= last).all()


def test_what_steps_read_is_valid_again_after_memory_was_lost():
    """Sleep level 2 keeps nothing that lies beside the model's weights."""
    wrapper = make_wrapper()
    step(wrapper, [30, 30], [3, 9])
    with torch.inference_mode():  # as vLLM runs models, but not what wakes them up
        heads = wrapper._ranks(None, 2, 24)
        heads.zero_()
    buffers = [
        wrapper._embeddings_indices,
        wrapper.stock_rows.sampler_slots.buffer,
        wrapper.stock_rows.token_slots.buffer,
    ]
    plans = [wrapper.plan.buffer, wrapper.output_rows.buffer]
    for buffer in (*buffers, *plans):
        buffer.fill_(-(2**30))
    wrapper.for_layer(torch.zeros(1, 4).int(), torch.zeros(1, 4).int()).memory_lost()
    assert not any(buffer.any() for buffer in buffers)
    assert all(plan.equal(make_wrapper().plan.buffer) for plan in plans)
    assert wrapper._ranks(None, 2, 24) is heads
    assert heads.eq(24).all()


class Traffic(TorchDispatchMode):
    """Records every operation that a device would see; `meta` stands for the device."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, bool]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        touched = [t for t in (*args, *(kwargs or {}).values()) if isinstance(t, torch.Tensor)]
        result = func(*args, **(kwargs or {}))
        if any(t.device.type == "meta" for t in touched) and not func.is_view:
            # copy_(destination, source, non_blocking)
            self.seen.append((func.overloadpacket.__name__, len(args) > 2 and bool(args[2])))
        return result


COPY = ("copy_", True)


BATCHES = ([2, 1, 3], [9, 0, 5]), ([1, 1], [3, 3]), ([4], [0]), ([1, 3], [5, 9])


@pytest.mark.parametrize("mapping", [tuples, arrays])
@pytest.mark.parametrize(
    "kinds",
    [
        pytest.param([LINEAR], id="linear"),
        pytest.param([LINEAR, LOGITS], id="logits"),
        pytest.param([LINEAR, EMBEDDING], id="embedding"),
        pytest.param([LINEAR, HEAD], id="head"),
        pytest.param([LINEAR, EMBEDDING, LOGITS, HEAD], id="all"),
    ],
)
def test_a_step_is_one_asynchronous_copy_and_nothing_else(kinds, mapping):
    wrapper = make_wrapper("meta", "triton")
    wrapper.adopt_layers([layer(kind) for kind in kinds])
    for lengths, adapters in BATCHES:
        with Traffic() as traffic:
            step(wrapper, lengths, adapters, mapping)
            if LOGITS in kinds or HEAD in kinds:
                wrapper.output_rows.plan(torch.empty(len(lengths), 4))
        assert traffic.seen == [COPY]


def test_a_steps_copy_brings_whatever_its_layers_read(monkeypatch: pytest.MonkeyPatch):
    """Beside a wrapper in host memory, which writes where its kernels read."""
    from vllm_multilora.integration.step import punica

    class Arriving(StagingRing):
        def send(self, end: int, begin: int = 0) -> None:
            super().send(end, begin)
            if not self._gathers:
                device[begin:end] = torch.from_numpy(self._values[self._turn][begin:end])

    device = torch.zeros(4096, dtype=torch.int32)
    expected = make_wrapper()
    monkeypatch.setattr(punica, "StagingRing", Arriving)
    wrapper = make_wrapper("meta", "triton")

    def arrived(part: torch.Tensor, count: int) -> torch.Tensor:
        begin = part.storage_offset() * part.itemsize // 4
        return device[begin : begin + len(part) * part.itemsize // 4].view(part.dtype)[:count]

    layout = wrapper.plan.layout
    order = layout.order.start
    for lengths, adapters in BATCHES:
        tokens, rows = sum(lengths), len(lengths)
        for each in (wrapper, expected):
            step(each, lengths, adapters)
        x = torch.empty(rows, 4)
        plans = [(wrapper.plan, expected.plan, tokens)]
        plans.append((wrapper.output_rows.plan(x), expected.output_rows.plan(x), rows))
        for found, other, count in plans:
            end = order + count
            assert arrived(found.buffer, end)[order:].equal(other.buffer[order:end])
            assert arrived(found.buffer, 4).equal(other.buffer[:4])
            tiles = arrived(found.buffer, order)[layout.tile_slot][: other.tiles]
            assert tiles.equal(other.buffer[layout.tile_slot][: other.tiles])
        for name, count in (
            ("embedding_offsets", tokens),
            ("sampler_slots", rows),
            ("token_slots", tokens),
        ):
            found = arrived(getattr(wrapper.stock_rows, name).buffer, count)
            assert found.equal(getattr(expected.stock_rows, name).rows), name


@pytest.mark.parametrize("how", ["prompt", "drafts"])
def test_rows_that_a_steps_mapping_does_not_have_cost_a_copy(how):
    """Rows of a prompt, for `prompt_logprobs`; drafts in vLLM's second model runner."""
    wrapper = make_wrapper("meta", "triton")
    wrapper.adopt_layers([layer(LINEAR), layer(LOGITS)])
    step(wrapper, [2, 1, 3], [9, 0, 5])
    with Traffic() as traffic:
        if how == "prompt":
            with wrapper.output_rows.from_prompt(1):
                wrapper.output_rows.plan(torch.empty(2, 4))
        else:
            wrapper.output_rows.set_counts(np.array([2, 1, 2]))
            for _ in range(2):  # layers share it
                wrapper.output_rows.plan(torch.empty(5, 4))
    assert traffic.seen == [COPY]


def test_layers_that_vllms_kernels_serve_need_no_further_copy():
    wrapper = make_wrapper("meta", "triton")
    wrapper.adopt_layers([layer(LINEAR), layer(LOGITS)])
    wrapper.for_layer(torch.zeros(1, 4).int(), torch.zeros(1, 4).int()).read_slot_runs()
    for lengths, adapters in ([2, 1, 3], [9, 0, 5]), ([4], [0]):
        with Traffic() as traffic:
            step(wrapper, lengths, adapters)
        assert traffic.seen == [COPY]


def test_a_step_before_the_layers_are_known_prepares_for_all_of_them():
    wrapper = make_wrapper("meta", "triton")
    with Traffic() as traffic:
        step(wrapper, [2, 1], [9, 0])
    assert traffic.seen == [COPY]


def test_buffers_keep_their_addresses_for_captured_graphs():
    wrapper = make_wrapper()
    own = wrapper.for_layer(torch.zeros(1, 4).int(), torch.zeros(1, 4).int())

    def addresses() -> list[int]:
        rows = wrapper.stock_rows.sampler_slots.buffer
        buffers = wrapper.plan.buffer, wrapper._embeddings_indices, rows
        return [buffer.data_ptr() for buffer in buffers]

    before = addresses()
    for lengths, adapters in ([2, 1], [9, 5]), ([1] * 8, [3] * 8), ([60], [0]):
        step(wrapper, lengths, adapters)
        assert addresses() == before
        assert own.plan is wrapper.plan
        assert own._embeddings_indices.data_ptr() == before[1]


def test_compiled_code_calls_what_was_prepared_for_its_own_layer(monkeypatch: pytest.MonkeyPatch):
    wrapper, ranks = make_wrapper(), torch.zeros(1, len(SLOTS)).int()
    weights = [((torch.zeros(4, 1, 8, 16),), (torch.zeros(4, 1, 24, 8),)) for _ in range(2)]
    layers = [wrapper.for_layer(ranks, ranks) for _ in weights]
    prepared = [own.linear(*each) for own, each in zip(layers, weights, strict=True)]
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    for own, each, expected in zip(layers, weights, prepared, strict=True):
        assert own.linear(*each) is expected
    with pytest.raises(KeyError):  # the shared wrapper's layers are never compiled
        wrapper.linear(*weights[0])


def config(*, specialize: bool = True, drafter: Any = None) -> Any:
    return SimpleNamespace(
        compilation_config=SimpleNamespace(cudagraph_specialize_lora=specialize),
        speculative_config=drafter,
    )


class TestGraphs:
    """Which captured graphs may be without kernels: those of batches without adapters alone."""

    @pytest.mark.parametrize(
        ("vllm_config", "expected"),
        [
            (config(), True),
            (config(specialize=False), False),
            (config(drafter="eagle"), False),
            (None, False),
        ],
        ids=["default", "one graph for all", "drafter", "no settings"],
    )
    @pytest.mark.parametrize("mapping", [tuples, arrays])
    def test_vllms_settings_decide(self, monkeypatch, vllm_config, expected, mapping):
        from vllm_multilora.integration.step import punica

        monkeypatch.setattr(punica, "get_current_vllm_config_or_none", lambda: vllm_config)
        wrapper = make_wrapper()
        step(wrapper, [2, 1], [0, 0], mapping)
        assert wrapper.plan.own_graphs is expected

    def test_graphs_of_a_tower_are_never_distinguished(self, monkeypatch):
        from vllm.lora.layers.utils import LoRAMappingType

        from vllm_multilora.integration.step import punica

        monkeypatch.setattr(punica, "get_current_vllm_config_or_none", config)
        wrapper = make_wrapper()
        for kind in LoRAMappingType:
            mapping = tuples([2], [0])
            mapping.type = kind
            wrapper.update_metadata(mapping, SLOTS, len(SLOTS) + 1, VOCABULARY)
            assert wrapper.plan.own_graphs is (kind is LoRAMappingType.LANGUAGE)

    @pytest.mark.parametrize("specialize", [True, False])
    def test_a_layer_captured_without_adapters(self, monkeypatch, specialize):
        from multilora_kernels import skipping, torch_backend
        from vllm_multilora.integration.step import punica

        calls: list[Any] = []
        monkeypatch.setattr(torch_backend, "lora_linear", lambda *args: calls.append(args))
        monkeypatch.setattr(skipping, "is_capturing", lambda device: True)
        monkeypatch.setattr(
            punica, "get_current_vllm_config_or_none", lambda: config(specialize=specialize)
        )
        wrapper = make_wrapper()
        a, b = (torch.zeros(4, 1, 8, 16),), (torch.zeros(4, 1, 24, 8),)
        for adapters in ([0, 0], [0, 9]):
            step(wrapper, [2, 1], adapters)
            wrapper.add_lora_linear(torch.zeros(3, 24), torch.zeros(3, 16), a, b, 1.0, (24,))
        assert len(calls) == (1 if specialize else 2)


@pytest.fixture
def vllms_gpu_wrapper(monkeypatch):
    """Makes vLLM choose its wrapper for GPUs, on this machine's CPU."""
    from vllm.lora.ops.triton_ops.lora_kernel_metadata import LoRAKernelMeta
    from vllm.lora.punica_wrapper import punica_gpu, punica_selector

    monkeypatch.setattr(punica_gpu, "LoRAKernelMeta", LoRAKernelMeta, raising=False)
    platform = SimpleNamespace(
        get_punica_wrapper=lambda: "vllm.lora.punica_wrapper.punica_gpu.PunicaWrapperGPU"
    )
    monkeypatch.setattr(punica_selector, "current_platform", platform)
    return punica_gpu.PunicaWrapperGPU


@pytest.mark.smoke("MoE formats")
class TestExpertLayers:
    """MoE layers: vLLM's own kernels, with the metadata that they read."""

    @pytest.mark.parametrize("kind", ["FusedMoEWithLoRA", "FusedMoE3DWithLoRA"])
    @pytest.mark.parametrize("adapters", [[9, 0, 5], [0, 0, 0], [3, 3, 3]], ids=str)
    def test_the_metadata_is_what_vllm_prepares(self, vllms_gpu_wrapper, kind, adapters):
        ours = make_wrapper()
        metadata = adopt_experts(ours, kind, LINEAR).token_mapping_meta
        lora_config = SimpleNamespace(max_loras=len(SLOTS), specialize_active_lora=False)
        stock = vllms_gpu_wrapper(MAX_TOKENS, 8, "cpu", lora_config=lora_config)
        for lengths in ([30, 1, 1], [2, 1, 3]):
            step(ours, lengths, adapters)
            step(stock, lengths, adapters)
            found = metadata.meta_args(sum(lengths), False)
            expected = stock.token_mapping_meta.meta_args(sum(lengths), False)
            if stock.token_mapping_meta.no_lora_flag_cpu:
                found, expected = found[2:], expected[2:]  # vLLM leaves the tokens' part as it is
            for one, other in zip(found, expected, strict=True):
                assert one.equal(other)

    @pytest.mark.parametrize("specialize", [False, True])
    def test_a_graph_looks_at_all_adapters_of_whatever_batch_it_is_given(
        self, vllms_gpu_wrapper, specialize
    ):
        """Both versions of an adapter that was loaded again, to vLLM one, beside the base model."""
        from vllm.lora.request import LoRARequest
        from vllm.v1.worker.gpu.lora_utils import LoraState, get_num_active_loras_for_dispatch

        state = LoraState(3)
        for row, number in enumerate((5, 9)):
            state.add_request(str(row), row, LoRARequest("acme", number, "/acme"))
        state.add_request("2", 2, None)
        captured = get_num_active_loras_for_dispatch(object(), state, ["0", "1", "2"], False)
        wrapper = make_wrapper(specialize_active_lora=specialize)
        stock = adopt_experts(wrapper)
        step(wrapper, [1] * captured, [5, 9, 3][:captured])
        *_, launched = stock.token_mapping_meta.meta_args(
            captured, stock.lora_config.specialize_active_lora
        )
        launched = int(launched)  # of a graph, from now on
        step(wrapper, [1, 1, 1], [5, 9, 0])
        present = stock.token_mapping_meta.active_lora_ids.tolist().index(-1, 1)
        assert launched >= present == 3

    def test_the_metadata_comes_with_the_plan_in_one_copy(self, vllms_gpu_wrapper):
        wrapper = make_wrapper("meta", "triton")
        adopt_experts(wrapper)
        for lengths, adapters in ([2, 1, 3], [9, 0, 5]), ([4], [0]):
            with Traffic() as traffic:
                step(wrapper, lengths, adapters)
            assert traffic.seen == [COPY]

    def test_padding_rows_are_of_valid_slots_after_memory_was_lost(self, vllms_gpu_wrapper):
        """A captured graph's kernels look up whose they are, and then what that slot has."""
        wrapper = make_wrapper()
        stock = adopt_experts(wrapper)
        step(wrapper, [30, 30], [3, 9])
        slots = stock.token_mapping_meta.token_lora_mapping
        slots.fill_(2**30)
        wrapper.memory_lost()
        step(wrapper, [1], [5])
        assert slots.tolist() == [0] + [-1] * (MAX_TOKENS - 1)

    def test_expert_layers_have_vllms_wrapper_and_others_ours(self, vllms_gpu_wrapper):
        wrapper = make_wrapper()
        linear = layer(LINEAR)
        linear.set_mapping(wrapper)
        stock = adopt_experts(wrapper, "FusedMoEWithLoRA", linear)
        assert isinstance(stock, vllms_gpu_wrapper)
        assert linear.punica_wrapper is wrapper

    def test_a_model_without_expert_layers_makes_no_such_wrapper(self, monkeypatch):
        from vllm_multilora.integration.step import punica_moe

        made = []
        monkeypatch.setattr(punica_moe, "get_punica_wrapper", lambda *_, **__: made.append(1))
        wrapper = make_wrapper()
        wrapper.adopt_layers([layer(LINEAR)])
        step(wrapper, [2], [9])
        assert not made


def adopt_experts(ours: Any, kind: str = "FusedMoEWithLoRA", other: Any = None) -> Any:
    """Has a wrapper adopt a layer of experts, and perhaps another; returns what the first calls."""
    experts, mapped = layer(kind), []
    experts.__dict__["set_mapping"] = mapped.append
    others = [layer(other) if isinstance(other, str) else other] if other else []
    ours.adopt_layers([*others, experts])
    (stock,) = mapped
    return stock
