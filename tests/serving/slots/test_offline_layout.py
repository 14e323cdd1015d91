"""The layout found without weights is the one that a worker has."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Qwen2Config

from tests.adapters.corpus import LAYOUT
from tests.adapters.corpus.draft import good
from tests.adapters.corpus.llama_layout import MODULES
from vllm_multilora.adapters.model.layout import ModelLayout
from vllm_multilora.adapters.problems import Code
from vllm_multilora.adapters.validation import validate

from ..models import tiny_models, tiny_speech
from ..models.recipes import AdapterRecipe
from ..models.tiny_adapters import write_adapter

pytestmark = [pytest.mark.serving, pytest.mark.slow]

UNKNOWN = ("model.layers.9.self_attn.q_proj", "model.layers.0.self_attn.qkv_proj", "score", "x")


@pytest.fixture(scope="module", params=["llama", "qwen2"])
def folder(request, tmp_path_factory):
    write = {"llama": tiny_models.write_llama, "qwen2": tiny_models.write_qwen2}[request.param]
    return write(tmp_path_factory.mktemp(request.param))


def layout_of(folder: Path, **flags: Any) -> ModelLayout:
    """What is found of a base model with a server's flags."""
    from vllm_multilora.integration.offline.model_without_weights import ServerFlags, offline_layout

    return offline_layout(ServerFlags(str(folder), **flags))


def worker_layout(folder, rank: int, *, layers_elsewhere: tuple[int, ...] = ()):
    """The layout of a worker's own manager, over a model with weights."""
    from vllm.config import set_current_vllm_config
    from vllm.engine.arg_utils import EngineArgs
    from vllm.model_executor.model_loader.utils import initialize_model
    from vllm.model_executor.models.utils import PPMissingLayer
    from vllm.utils.torch_utils import set_default_torch_dtype

    from vllm_multilora.integration.offline.model_without_weights import one_worker
    from vllm_multilora.integration.patching.tables.ledger import apply_patches
    from vllm_multilora.integration.worker.slots.model_manager import MultiLoRAModelManager

    apply_patches()
    config = EngineArgs(
        model=str(folder),
        enable_lora=True,
        max_loras=2,
        max_lora_rank=rank,
        enforce_eager=True,
        max_model_len=64,
    ).create_engine_config()
    with set_current_vllm_config(config), one_worker():
        with set_default_torch_dtype(config.model_config.dtype):
            model = initialize_model(config)
        for layer in layers_elsewhere:
            model.model.layers[layer] = PPMissingLayer()
        manager = MultiLoRAModelManager(
            model=model,
            max_num_seqs=4,
            max_num_batched_tokens=64,
            vocab_size=config.model_config.get_vocab_size(),
            lora_config=config.lora_config,
            device=torch.device("cpu"),
            vllm_config=config,
        )
        return manager.layout


def test_it_is_that_of_a_worker(folder):
    (folder / "model.safetensors").rename(folder / "weights.away")
    try:
        offline = layout_of(folder, max_lora_rank=64)
    finally:
        (folder / "weights.away").rename(folder / "model.safetensors")
    worker = worker_layout(folder, 64)
    assert offline.slices == worker.slices
    assert offline.special == worker.special
    assert offline.special_shapes == worker.special_shapes
    assert (offline.max_rank, offline.dtype) == (worker.max_rank, worker.dtype)
    for name in (*offline.by_name, *offline.special, *UNKNOWN):
        assert offline.naming.rename(name) == worker.naming.rename(name)


@pytest.mark.parametrize("tied", [True, False])
def test_it_knows_whether_the_head_is_the_embedding(tmp_path, tied):
    folder = tiny_models.write_llama(tmp_path, tied=tied)
    assert layout_of(folder, max_lora_rank=64).tied == tied


def test_a_worker_knows_what_others_have_from_what_nobody_has(tmp_path):
    """Under pipeline parallelism, where it has a part of the layers only."""
    folder = tiny_models.write_llama(tmp_path)
    layout = worker_layout(folder, 64, layers_elsewhere=(0, 2))
    assert {name.split(".")[2] for name in layout.by_name} == {"1"}
    here, other = "model.layers.1.mlp.up_proj", "model.layers.2.mlp.up_proj"
    assert (layout.naming.rename(here), layout.naming.elsewhere(here)) == (here, False)
    assert (layout.naming.rename(other), layout.naming.elsewhere(other)) == (None, True)
    beyond = "model.layers.7.mlp.up_proj"
    assert (layout.naming.rename(beyond), layout.naming.elsewhere(beyond)) == (beyond, False)
    for strange in ("transformer.h.0.attn.c_attn", "visual.blocks.0.attn.qkv"):
        assert (layout.naming.rename(strange), layout.naming.elsewhere(strange)) == (None, False)


def test_adapters_that_the_servers_target_modules_leave_nothing_of_are_refused(tmp_path):
    layout = layout_of(
        tiny_models.write_llama(tmp_path / "model"),
        max_lora_rank=64,
        lora_target_modules=("o_proj", "gate_proj"),
    )
    # vLLM adapts a fused layer whole, whichever part of it is named.
    kinds = {name.rpartition(".")[2] for name in layout.by_name}
    assert kinds == {"o_proj", "gate_proj", "up_proj"}
    served = good().write(tmp_path / "served")
    assert validate(served, layout) == []
    attention = [name for name in MODULES if name.endswith(("q_proj", "v_proj"))]
    [problem] = validate(good(attention).write(tmp_path / "refused"), layout)
    assert problem.code == Code.NOTHING_APPLIED
    assert "--lora-target-modules o_proj gate_proj" in problem.hint


def test_adapters_of_what_latent_attention_does_not_call_are_refused(tmp_path):
    """It multiplies with that layer's weights itself: the base model would answer."""
    folder = tiny_models.write_deepseek(tmp_path / "model")
    layout = layout_of(folder, max_lora_rank=64)
    attention = ("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "o_proj")
    for kinds in (attention, (*attention, "kv_b_proj")):
        recipe = AdapterRecipe("-".join(kinds), kinds)
        adapter = write_adapter(folder, tmp_path / recipe.name, recipe, seed=0)
        problems = validate(adapter, layout)
        assert [problem.code for problem in problems] == [Code.UNSUPPORTED_FEATURE] * (
            "kv_b_proj" in kinds
        )
        assert all("kv_b_proj" in problem.where for problem in problems)


@pytest.mark.parametrize("kind", ["in_proj", "x_proj", "dt_proj", "out_proj"])
def test_adapters_of_what_mamba_computes_in_two_parts_are_refused(tmp_path, kind):
    """vLLM takes both parts for a step's first rows: those of other requests."""
    layout = layout_of(tiny_models.write_jamba_config(tmp_path / "model"))
    module = f"model.layers.0.mamba.{kind}"
    assert (module in layout.bypassed) == (kind in ("x_proj", "dt_proj"))
    assert module in layout.by_name or layout.is_special(module)


@pytest.mark.parametrize(
    ("of", "inputs", "outputs", "workers"),
    [
        ("mamba.in_proj", 128, 2 * 256 + 2 * 16 + 8, 1),
        ("mamba.in_proj", 128, 2 * 256 + 2 * 16 + 8, 2),
        ("shared_mlp.input_linear", 128, 2 * 208, 2),
    ],
)
def test_layers_of_several_slices_that_checkpoints_have_as_one_are_of_their_sizes(
    tmp_path, of, inputs, outputs, workers
):
    """vLLM would cut off what it has no room for, and leave the rest as it is."""
    folder = tiny_models.write_granite_hybrid(tmp_path / "model")
    layout = layout_of(folder, tensor_parallel_size=workers)
    module = f"model.layers.0.{of}"
    assert layout.is_special(module) == (workers > 1)  # where each has some rows of every slice
    assert "model.layers.0.mamba.conv1d" in layout.bypassed
    adapter = good(["model.layers.0.self_attn.q_proj"])
    adapter.config["target_modules"] = [of.rpartition(".")[2]]
    for rows, columns in ((outputs, inputs), (outputs + 4, inputs), (outputs, inputs - 4)):
        rank = adapter.config["r"]
        adapter.tensors = {
            f"base_model.model.{module}.lora_A.weight": torch.ones(rank, columns),
            f"base_model.model.{module}.lora_B.weight": torch.ones(rows, rank),
        }
        problems = validate(adapter.write(tmp_path / f"{rows}-{columns}"), layout)
        assert [problem.code for problem in problems] == [Code.WRONG_SHAPE] * (
            (rows, columns) != (outputs, inputs)
        )


@pytest.mark.parametrize(
    ("kind", "found"),
    [
        ({"task_type": "CAUSAL_LM", "alora_invocation_tokens": [1]}, None),
        ({"use_dora": True}, "vLLM fills itself"),
    ],
    ids=["activated", "dora"],
)
def test_layers_that_ranks_share_out_part_by_part_may_be_activated(tmp_path, kind, found):
    """Rows are theirs like those of any linear layer; their outputs nobody here multiplies."""
    folder = tiny_models.write_phi3_config(tmp_path / "model")
    layout = layout_of(folder, tensor_parallel_size=2, dora=True)
    module = "model.layers.0.mlp.gate_up_proj"
    assert layout.is_special(module)
    adapter = good(["model.layers.0.self_attn.q_proj"])
    rank = adapter.config["r"]
    adapter.config |= {"target_modules": ["gate_up_proj"], **kind}
    adapter.tensors = {
        f"base_model.model.{module}.lora_A.weight": torch.ones(rank, 128),
        f"base_model.model.{module}.lora_B.weight": torch.ones(2 * 208, rank),
    }
    if "use_dora" in kind:
        name = f"base_model.model.{module}.lora_magnitude_vector"
        adapter.tensors[name] = torch.ones(2 * 208)
    problems = validate(adapter.write(tmp_path / "adapter"), layout)
    assert bool(problems) == (found is not None)
    assert all(found in problem.message for problem in problems)


def test_adapters_of_an_encoder_that_a_decoder_follows_are_served(tmp_path):
    layout = layout_of(tiny_speech.write_whisper(tmp_path))
    assert set(layout.bypassed) == {"proj_out"}  # the output head, which vLLM does not adapt
    for part in ("encoder", "decoder"):
        assert f"model.{part}.layers.0.self_attn.q_proj" in layout.by_name


def test_adapters_of_a_longer_decoder_are_not_cut_off(tmp_path):
    """A Whisper "turbo" has the encoder of a "large", and a few layers of its decoder."""
    path = tiny_speech.write_whisper(tmp_path) / "config.json"
    config = json.loads(path.read_text()) | {"encoder_layers": 4, "num_hidden_layers": 4}
    path.write_text(json.dumps(config))
    naming = layout_of(tmp_path).naming
    beyond = "model.decoder.layers.3.self_attn.q_proj"
    assert naming.rename(beyond) == beyond


def test_layers_that_read_numbers_back_while_they_are_made_have_them(tmp_path):
    from vllm.model_executor.layers.activation import XIELU

    made = XIELU.__init__
    layout = layout_of(tiny_models.write_apertus_config(tmp_path))
    assert "model.layers.0.mlp.up_proj" in layout.by_name
    assert XIELU.__init__ is made


def test_it_leaves_nothing_for_the_next_model_of_the_process(tmp_path):
    """vLLM shares rotary embeddings between models; one without memory would end the next."""
    from vllm.model_executor.layers import rotary_embedding

    shared = rotary_embedding._ROPE_DICT
    before = dict(shared)
    shared["of another model"] = "kept"
    layout_of(tiny_models.write_llama(tmp_path))
    assert shared.pop("of another model") == "kept"
    assert shared == before


def test_the_corpus_was_made_for_that_of_the_tiny_llama(tmp_path):
    found = layout_of(tiny_models.write_llama(tmp_path), max_lora_rank=64, dtype="float32")
    assert found.by_name == LAYOUT.by_name
    assert found.special == LAYOUT.special
    assert found.special_shapes == LAYOUT.special_shapes
    assert not found.bypassed
    assert (found.max_rank, found.dtype) == (LAYOUT.max_rank, LAYOUT.dtype)
    assert [found.naming.rename(module) for module in MODULES] == list(MODULES)


def test_heads_that_vllm_does_not_adapt_are_known_with_the_reason(tmp_path):
    architecture = "Qwen2ForCausalLM"
    config = Qwen2Config(**tiny_models.TWO_LAYERS, architectures=[architecture])
    config.save_pretrained(tmp_path)
    layout = layout_of(tmp_path, max_lora_rank=64)
    heads = {name for name, shape in layout.special_shapes.items() if not shape.embedding}
    [embedding] = layout.special_shapes.keys() - heads
    assert heads == {"lm_head"}
    assert embedding.endswith(".embed_tokens")
    for name in ("lm_head", embedding):
        assert not layout.is_special(name)
        assert layout.naming.rename(name) == name
        reason = layout.bypassed[name]
        assert reason == f"vLLM adapts no embeddings and output heads of {architecture}"


def test_the_ranks_that_hints_name_are_those_that_vllm_takes():
    from vllm_multilora.adapters.model.ranks import MAX_LORA_RANKS
    from vllm_multilora.integration.offline.model_without_weights import ALLOWED_RANKS

    assert MAX_LORA_RANKS == ALLOWED_RANKS


def test_a_model_that_vllm_does_not_take_is_an_error(tmp_path):
    from vllm_multilora.integration.offline.model_without_weights import BaseModelError

    with pytest.raises(BaseModelError, match="cannot load the base model"):
        layout_of(tmp_path)
    model = tiny_models.write_llama(tmp_path / "model")
    with pytest.raises(BaseModelError, match="max_lora_rank"):
        layout_of(model, max_lora_rank=7)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[]", "cannot load the base model"),
        ('{"hidden_size": -1}', "cannot load the base model .*-1"),
        ('{"hidden_act": "nope"}', "cannot build the base model .*nope"),
        # It has no LoRA, and asserts so without a message.
        (
            '{"architectures": ["Mamba2ForCausalLM"], "model_type": "mamba2", "num_heads": 8,'
            '"head_dim": 32, "hidden_size": 128, "state_size": 16, "n_groups": 1}',
            "cannot build the base model .*: AssertionError: assert not .*lora",
        ),
    ],
    ids=["list", "size", "activation", "no LoRA"],
)
def test_a_wrong_configuration_is_an_error(tmp_path, text, message):
    from vllm_multilora.integration.offline.model_without_weights import BaseModelError

    file = tiny_models.write_llama(tmp_path) / "config.json"
    changed = json.loads(text)
    right = json.loads(file.read_text())
    file.write_text(json.dumps(right | changed if isinstance(changed, dict) else changed))
    with pytest.raises(BaseModelError, match=message):
        layout_of(tmp_path)


QWEN2_VL = {
    "architectures": ["Qwen2VLForConditionalGeneration"],
    "model_type": "qwen2_vl",
    "hidden_size": 128,
    "intermediate_size": 208,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 300,
    "max_position_embeddings": 256,
    "rope_scaling": {"type": "mrope", "mrope_section": [4, 6, 6]},
    "vision_config": {"depth": 1, "embed_dim": 32, "hidden_size": 128, "num_heads": 2},
}
PROCESSOR = {"image_processor_type": "Qwen2VLImageProcessor", "patch_size": 14, "merge_size": 2}


def test_adapters_of_a_multimodal_model_are_served_without_its_tower(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(QWEN2_VL))
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(PROCESSOR))
    layout = layout_of(tmp_path)
    language = "language_model.model.layers.0.self_attn.q_proj"
    assert language in layout.by_name
    rename = layout.naming.rename
    assert rename("model.language_model.layers.0.self_attn.q_proj") == language
    assert rename("model.layers.0.self_attn.q_proj") == language
    for tower in ("model.visual.blocks.0.attn.qkv", "visual.merger.mlp.0"):
        assert rename(tower) is None
        assert not layout.naming.elsewhere(tower)
    # This model has one block: no other is taken for something that is left out.
    assert rename("model.visual.blocks.1.attn.qkv") == "visual.blocks.1.attn.qkv"
