"""Names of modules as data give what vLLM's own functions give, over its models' own mappers."""

import importlib
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("vllm")

from transformers.core_model_loading import PrefixChange, WeightRenaming
from vllm.lora.layers import BaseLayerWithLoRA, FusedMoEWithLoRA
from vllm.lora.model_manager import LoRAModelManager
from vllm.lora.utils import is_in_target_modules, parse_fine_tuned_lora_name
from vllm.model_executor.models.utils import WeightsMapper

from vllm_multilora.adapters.model.naming import Renames
from vllm_multilora.integration.worker.model.model_layout import bypassed_layers
from vllm_multilora.integration.worker.model.module_naming import (
    module_naming,
    refused_layers,
    renames_of,
)

MODELS = {
    "no-mapper": ("llama", "LlamaForCausalLM"),
    "qwen2-vl": ("qwen2_vl", "Qwen2VLForConditionalGeneration"),
    "qwen3-vl": ("qwen3_vl", "Qwen3VLForConditionalGeneration"),
    "regex-aria": ("aria", "AriaForConditionalGeneration"),
    "regex-mistral": ("mistral_large_3", "MistralLarge3ForCausalLM"),
    "nemotron": ("nemotron_h", "NemotronHForCausalLM"),
    "bert": ("bert", "BertEmbeddingModel"),
}
KINDS = ("self_attn.q_proj", "self_attn.qkv_proj", "attention.wq_a", "mlp.down_proj", "mlp.fc1")
NAMES = [
    *(f"{start}layers.{i}.{kind}" for start in ("", "model.", "backbone.") for i in (0, 11)
      for kind in KINDS),
    *(f"{start}.layers.3.{kind}" for kind in KINDS
      for start in ("model.language_model", "language_model.model", "model.text_model")),
    "model.visual.blocks.0.attn.qkv",
    "visual.merger.mlp.0",
    "vision_tower.vision_model.encoder.layers.0.self_attn.k_proj",
    "model.multi_modal_projector.linear_1",
    "mtp.layers.0.mixer.in_proj",
    "backbone.mtp.up_proj",
    "lm_head",
    "model.lm_head",
    "language_model.lm_head",
    "model.embed_tokens",
    "score",
    "router.base_model.model.experts",
    "x",
]  # fmt: skip


def mapper_of(model: str) -> WeightsMapper | None:
    module, name = MODELS[model]
    model_class = getattr(importlib.import_module(f"vllm.model_executor.models.{module}"), name)
    return getattr(model_class, "hf_to_vllm_mapper", None)


def parsed(module: str, mapper: WeightsMapper | None) -> str:
    """The module that vLLM finds for an adapter's tensor."""
    rename = mapper.get_rename_mapper() if mapper is not None else None
    return parse_fine_tuned_lora_name(f"base_model.model.{module}.lora_A.weight", rename)[0]


def manager_of(mapper=None, *, targets=None, packed=None, pooling=False, model=None, **attributes):
    """As much of a LoRA manager as is looked at."""
    model = model or torch.nn.Module()
    if mapper is not None:
        model.hf_to_vllm_mapper = mapper
    return SimpleNamespace(
        model=model,
        lora_config=SimpleNamespace(target_modules=targets),
        packed_modules_mapping=packed or {},
        is_pooling_model=pooling,
        _get_punica_wrapper=lambda name: None if name.startswith("visual.") else "language",
        **{"supports_mm": False} | attributes,
    )


@pytest.mark.parametrize("model", MODELS)
def test_names_become_those_that_vllm_reads(model, caplog):
    mapper = mapper_of(model)
    caplog.clear()  # vLLM may warn of something else where it imports a model
    naming = module_naming(manager_of(mapper), frozenset())
    assert {name: naming.rename(name) for name in NAMES} == {
        name: parsed(name, mapper) for name in NAMES
    }
    assert not caplog.records


def test_every_kind_of_rename_is_applied_in_vllms_order():
    import regex

    mapper = WeightsMapper(
        orig_to_new_renaming=[WeightRenaming(r"^layers\.(\d+)", r"blocks.\1")],
        orig_to_new_regex={
            regex.compile(r"^blocks\.(\d+)\.(mlp)", regex.I): r"h.\1.\2.inner",
            regex.compile("nothing"): None,
        },
        orig_to_new_substr={"self_attn": "attn", ".mlp.": ".ffn.", "gone": None},
        orig_to_new_stacked={".q_proj": (".qkv_proj", "q")},
        orig_to_new_prefix={"h.": "model.h.", "blocks.": "model.blocks.", "model.": "language."},
        orig_to_new_suffix={"fc1.lora_A.weight": "fc_in.lora_A.weight"},
    )
    naming = module_naming(manager_of(mapper), frozenset())
    found = {name: naming.rename(name) for name in NAMES}
    assert found == {name: parsed(name, mapper) for name in NAMES}
    assert found["layers.11.mlp.fc1"] == "language.h.11.ffn.inner.fc_in"


@pytest.mark.parametrize("scope", [None, "", "text_model"])
@pytest.mark.parametrize(
    "renaming",
    [
        lambda: WeightRenaming(["self_attn.q_proj", "mlp"], "inner"),
        lambda: WeightRenaming(r"^layers\.(\d+)", r"blocks.\1"),
        lambda: PrefixChange(prefix_to_add="language_model", model_prefix="model"),
        lambda: PrefixChange(prefix_to_remove="language_model", model_prefix="model"),
    ],
    ids=["two-sources", "group", "prefix-added", "prefix-removed"],
)
def test_transformers_renames_are_reported_as_data(renaming, scope, caplog):
    renaming = renaming()
    renaming.scope_prefix, renaming.base_model_prefix = scope, "model"
    mapper = WeightsMapper(orig_to_new_renaming=[renaming])
    naming = module_naming(manager_of(mapper), frozenset())
    found = {name: naming.rename(name) for name in NAMES}
    assert found == {name: parsed(name, mapper) for name in NAMES}
    assert not caplog.records


def test_a_rename_that_remembers_other_names_is_warned_of_once(caplog):
    from transformers.core_model_loading import GroupWeightRename  # only newer ones have it

    group = GroupWeightRename(["norm0", "norm1"], ["norm1", "norm2"])
    mapper = WeightsMapper(orig_to_new_renaming=[group], orig_to_new_prefix={"a.": "b."})
    assert renames_of(mapper).sources == ()
    assert len(renames_of(mapper).prefixes) == 1
    assert len(caplog.records) == 2  # one for each time that a model was read
    assert "GroupWeightRename" in caplog.text
    caplog.clear()
    assert renames_of(WeightsMapper()) == Renames()
    assert not caplog.records


@pytest.mark.parametrize(
    "targets",
    [None, (), ("q_proj",), ("qkv_proj",), ("gate_up_proj", "down_proj"), ("x",), ("model.x",),
     ("experts.0.up_proj",)],
    ids=str,
)  # fmt: skip
def test_targets_take_in_what_vllm_takes_in(targets):
    packed = {
        "qkv_proj": ["q_proj", "k_proj", "v_proj"],
        "gate_up_proj": ["gate_proj", "up_proj"],
        "experts": ["experts.0.gate_proj", "experts.0.up_proj"],
    }
    names = [
        *NAMES,
        "x",
        "model.x",
        "q_proj",
        "experts",
        "mlp.experts.0.up_proj",
        "experts.0.up_proj",
        "mlp.experts",
        "mlp.gate_up_proj",
        "mlp.up_proj",
    ]
    naming = module_naming(manager_of(targets=targets, packed=packed), frozenset())
    for name in names:
        expected = is_in_target_modules(name, targets, packed)
        assert naming.is_target(name) == expected, name
        assert (naming.rename(name) == parsed(name, None)) == expected, name


def test_what_transformers_has_renamed_since_version_5_leads_to_the_same_modules():
    experts, tower = "model.layers.0.block_sparse_moe.experts", "tower.vision_model.layers.0.fc1"
    naming = module_naming(manager_of(), frozenset({experts, tower}))
    assert naming.rename("model.layers.0.mlp.experts") == experts
    assert naming.rename("model.layers.0.mlp.experts.base_layer") == f"{experts}.base_layer"
    assert naming.rename("tower.layers.0.fc1") == tower
    assert naming.rename(experts) == experts


@pytest.mark.parametrize(
    ("later", "name"),
    [
        ("model.layers.0.mlp.router", "model.layers.0.block_sparse_moe.gate"),
        ("model.layers.0.block_sparse_moe.router", "model.layers.0.block_sparse_moe.gate"),
        ("model.layers.0.block_sparse_moe.router.layer", "model.layers.0.block_sparse_moe.gate"),
        ("model.layers.0.mlp.router.gate", "model.layers.0.mlp.gate"),
        ("layers.0.mlp.shared_experts.up_proj", "layers.0.mlp.shared_expert.up_proj"),
        ("model.language_model.layers.0.q_proj", "language_model.model.layers.0.q_proj"),
        ("language_model.layers.0.q_proj", "language_model.model.layers.0.q_proj"),
    ],
)
def test_names_that_a_version_of_transformers_has_lead_to_the_module(later, name):
    assert module_naming(manager_of(), frozenset({name})).rename(later) == name


def test_what_a_tower_fuses_is_known_by_its_parts_and_where_transformers_has_it():
    tower = torch.nn.ModuleDict(
        {"qkv": torch.nn.Linear(2, 2), "gate_up_proj": torch.nn.Linear(2, 2)}
    )
    tower.hf_to_vllm_mapper = WeightsMapper(
        orig_to_new_stacked={
            ".q.": (".qkv.", "q"),
            ".gate_proj": (".gate_up_proj", 0),
            ".up_proj": (".gate_up_proj", 1),
        }
    )
    manager = manager_of(
        model=torch.nn.ModuleDict({"visual": tower}),
        packed={"gate_up_proj": ["gate_up_proj"]},
        supports_mm=True,
        mm_mapping=SimpleNamespace(language_model=["language"], tower_model=["visual"]),
    )
    naming = module_naming(manager, frozenset())
    for kind in ("qkv", "q", "gate_up_proj", "gate_proj", "up_proj"):
        assert naming.rename(f"visual.{kind}") is None
        assert naming.rename(f"model.visual.{kind}") is None
    assert naming.rename("visual.other") == "visual.other"


def test_layers_of_a_tower_that_nobody_uses_are_left_out():
    """A LLaVA takes the states before a CLIP's last layer, and adapters have that one, too."""

    def layer() -> torch.nn.Module:
        return torch.nn.ModuleDict({"q_proj": torch.nn.Linear(2, 2)})

    encoder = torch.nn.Module()
    encoder.layers = torch.nn.ModuleList([layer(), layer()])
    tower = torch.nn.ModuleDict({"vision_model": torch.nn.ModuleDict({"encoder": encoder})})
    tower.config = SimpleNamespace(num_hidden_layers=3)
    model = torch.nn.ModuleDict({"visual": tower})
    parts = SimpleNamespace(language_model=["language."], tower_model=["visual"])
    naming = module_naming(manager_of(model=model, supports_mm=True, mm_mapping=parts), frozenset())
    for start in ("visual.vision_model.encoder", "visual.encoder"):
        assert naming.rename(f"{start}.layers.1.q_proj") is None
        assert naming.rename(f"{start}.layers.2.q_proj") is None
        for unknown in ("layers.3.q_proj", "layers.2.other"):
            assert naming.rename(f"{start}.{unknown}") == f"{start}.{unknown}"


def test_a_pooling_models_names_and_a_text_only_siblings_lead_to_its_modules():
    names = frozenset({"model.layers.0.q_proj", "language.layers.1.q_proj"})
    language = SimpleNamespace(language_model=["language."], tower_model=[])
    manager = manager_of(pooling=True, supports_mm=True, mm_mapping=language)
    naming = module_naming(manager, names)
    assert naming.rename("layers.0.q_proj") == "model.layers.0.q_proj"
    assert naming.rename("layers.1.q_proj") == "language.layers.1.q_proj"
    assert naming.rename("model.layers.1.q_proj") == "language.layers.1.q_proj"
    assert naming.rename("layers.2.q_proj") == "layers.2.q_proj"


@pytest.mark.parametrize("start", ["language", "llm."])
def test_text_only_names_are_those_that_vllm_finds(start):
    """From 0.33 on it does; before, it passes adapters with such names over."""
    begin = start.rstrip(".")
    inner = ["model.layers.0.q_proj", "lm_head", "layers.1.q_proj"]
    names = frozenset({f"{begin}.{name}" for name in inner} | {"visual.q_proj"})
    manager = manager_of(
        supports_mm=True, mm_mapping=SimpleNamespace(language_model=[start], tower_model=[])
    )
    naming = module_naming(manager, names)
    assert naming.text_names == {
        "model.layers.0.q_proj": f"{begin}.model.layers.0.q_proj",
        "lm_head": f"{begin}.lm_head",
        "layers.1.q_proj": f"{begin}.layers.1.q_proj",
        "model.layers.1.q_proj": f"{begin}.layers.1.q_proj",
    }
    of = getattr(LoRAModelManager, "_get_text_lora_names", None)
    if of is not None:
        assert naming.text_names == {
            other: name for name in sorted(names) for other in of(manager, name)
        }


def test_linear_layers_that_vllm_leaves_alone_are_known_by_name():
    tower = torch.nn.ModuleDict({"qkv_proj": torch.nn.Linear(2, 2), "norm": torch.nn.LayerNorm(2)})
    head = torch.nn.ModuleDict({"dense": torch.nn.Linear(2, 2)})
    model = torch.nn.ModuleDict(
        {"visual": tower, "other": torch.nn.Linear(2, 2), "classifier": head}
    )
    packed = {"qkv_proj": ["q_proj", "k_proj"]}
    manager = manager_of(packed=packed, model=model)
    naming = module_naming(manager, frozenset({"other"}))
    assert naming.unwrapped == {"visual.qkv_proj", "visual.q_proj", "visual.k_proj"}
    # Adapters are not served without the others that they have.
    assert set(refused_layers(manager)) == {"other", "classifier.dense"}
    assert naming.rename("visual.q_proj") is None
    assert not naming.elsewhere("visual.q_proj")
    for refused in ("visual.norm", "classifier.dense"):  # as unknown
        assert naming.rename(refused) == refused


class Wrapped(BaseLayerWithLoRA):
    def __init__(self) -> None:
        super().__init__()
        self.base_layer = torch.nn.Linear(2, 2)


def test_layers_on_which_adapters_would_not_act_are_known_by_name():
    kv, o, last = Wrapped(), Wrapped(), torch.nn.Linear(2, 2)
    attention = torch.nn.ModuleDict({"kv_b_proj": kv, "o_proj": o})
    attention.impl = SimpleNamespace(kv_b_proj=kv.base_layer, sinks=None)
    experts = torch.nn.ModuleDict({"gate": Wrapped(), "gate_up_proj": Wrapped()})
    language = torch.nn.ModuleDict({"attention": attention, "last": last, "experts": experts})
    of_tower = ("qkv_proj", "patch_embedding", "linear_1")
    tower = torch.nn.ModuleDict({kind: Wrapped() for kind in of_tower})
    model = torch.nn.ModuleDict({"text": language, "tower": tower})
    modules = {name: part for name, part in model.named_modules() if isinstance(part, Wrapped)}
    modules["text.attention"] = attention  # no layer lies under it
    packed = {"tower.qkv_proj": ["tower.q_proj", "tower.k_proj"]}
    packed["text.experts.gate_up_proj"] = ["text.experts.gate_proj", "text.experts.up_proj"]

    def found(**attributes: object) -> set[str]:
        known = {"supports_mm": False, "punica_wrapper_mapping": {}} | attributes
        manager = manager_of(model=model, modules=modules, packed_modules=packed, **known)
        return {name for name, _ in bypassed_layers(manager)}

    always = {"text.attention.kv_b_proj", "text.last"}
    assert found() == always
    model.supports_multimodal, model.get_language_model = True, lambda: language
    all_of_tower = {f"tower.{kind}" for kind in ("q_proj", "k_proj", *of_tower[1:])}
    assert found() == always | all_of_tower
    assert found(supports_mm=True) == found(punica_wrapper_mapping={"encoder": None}) == always

    def unknown() -> torch.nn.Module:
        raise NotImplementedError

    model.get_language_model = unknown
    assert found() == always
    some_rows = {f"text.experts.{kind}" for kind in ("gate", "gate_proj", "up_proj")}
    experts.is_sequence_parallel = True
    assert found() == always | some_rows
    experts.is_sequence_parallel, experts.vision_experts = False, torch.nn.Identity()
    assert found() == always | some_rows


@pytest.mark.parametrize(
    ("places", "moves", "is_served"),
    [
        (None, False, True),
        ([-1, -1, 0, 1], False, True),
        ([0, -1, 1, -1], False, False),  # dealt out
        ([-1, -1, -1, 0, 1], False, False),  # the first rank has three
        ([-1, -1, 0, 1], True, False),
    ],
    ids=["all", "its-turn", "dealt-out", "unequal", "moved"],
)
def test_experts_of_ranks_that_have_others_than_slots_are_filled_for_are_refused(
    places, moves, is_served
):
    experts = FusedMoEWithLoRA.__new__(FusedMoEWithLoRA)
    torch.nn.Module.__init__(experts)
    experts.moe_config = SimpleNamespace(
        num_local_experts=2, moe_parallel_config=SimpleNamespace(ep_rank=1)
    )
    of_ranks = SimpleNamespace(expert_map=None if places is None else torch.tensor(places))
    experts.base_layer = SimpleNamespace(
        eplb_state=object() if moves else None,
        routed_experts=SimpleNamespace(expert_map_manager=of_ranks),
    )
    single = ["mlp.experts.0.w1", "mlp.experts.0.w2"]
    manager = manager_of(
        modules={"mlp.experts": experts},
        packed_modules={"mlp.experts": single},
        supports_mm=True,
        punica_wrapper_mapping={},
    )
    found = {name for name, _ in bypassed_layers(manager)}
    assert found == (set() if is_served else {"mlp.experts", "mlp.experts.base_layer", *single})


@pytest.mark.parametrize("part", ["score", "norm"])
def test_what_vllm_leaves_in_the_checkpoint_is_known_by_name(part):
    """A converted model's head for tokens, unless classes may be made of it; BERT's pooler."""
    from vllm.model_executor.models.utils import StageMissingLayer

    inner = torch.nn.ModuleDict({"encoder": torch.nn.Linear(2, 2)})
    inner.hf_to_vllm_mapper = WeightsMapper(orig_to_new_prefix={"pooler.": None, "old.": "new."})
    tower, head = StageMissingLayer("vision_tower"), StageMissingLayer("output")
    model = torch.nn.ModuleDict(
        {"model": inner, "visual": tower, "lm_head": head, part: torch.nn.Linear(2, 2)}
    )
    named = frozenset({"model.encoder", part})

    def left_out(*, pooling: bool) -> set[str]:
        naming = module_naming(manager_of(model=model, pooling=pooling), named)
        names = ("lm_head", "pooler.dense", "model.pooler.dense", "visual.qkv", "visuals", "new.x")
        return {name for name in names if naming.rename(name) is None}

    if part == "score":
        assert left_out(pooling=True) == {"visual.qkv"}
    else:
        poolers = {"pooler.dense", "model.pooler.dense"}
        assert left_out(pooling=True) == {"lm_head", "visual.qkv"} | poolers
        assert left_out(pooling=False) == {"lm_head", "visual.qkv"}


def test_quantised_experts_that_would_need_triton_are_refused_at_the_start(monkeypatch):
    from vllm.model_executor.layers.fused_moe import MoERunner

    from vllm_multilora.errors import ConfigError
    from vllm_multilora.integration.worker.experts import expert_kernels

    monkeypatch.setattr(expert_kernels, "HAS_TRITON", False)
    runner = MoERunner.__new__(MoERunner)
    torch.nn.Module.__init__(runner)
    runner.routed_experts = SimpleNamespace(quant_method=object())
    with pytest.raises(ConfigError, match=r"the experts in mlp\.experts are quantised \(object\)"):
        expert_kernels.choose_expert_kernels(
            torch.nn.ModuleDict({"mlp": torch.nn.ModuleDict({"experts": runner})})
        )
