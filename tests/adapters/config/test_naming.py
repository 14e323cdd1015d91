"""Names of modules as data: a layout can be sent, and means the same where it arrives."""

from dataclasses import replace

import msgspec
import pytest

from vllm_multilora.adapters.model.layout import ModelLayout
from vllm_multilora.adapters.model.naming import ModuleNaming, Renames, Replacement, SourceRename
from vllm_multilora.adapters.model.tensor_names import parse_tensor_name

from ..corpus import LAYOUT

Q0 = "model.layers.0.self_attn.q_proj"
NAMING = ModuleNaming(
    names=frozenset(LAYOUT.by_name),
    renames=Renames(
        sources=(SourceRename(r"(?P<g0>^decoder\.(\w+))", r"model.\1", ("base.", "")),),
        expressions=(Replacement(r"^BLOCK\.", "layers.", 2),),
        prefixes=(Replacement("language.", "model."),),
    ),
    text_names={"layers.0.self_attn.q_proj": Q0},
    skipped=("mtp.",),
    others=("model.layers.7.",),
    roots=frozenset({"model", "lm_head"}),
    targets=("q_proj", "qkv_proj"),
    packed={"qkv_proj": ("q_proj", "k_proj", "v_proj")},
    unwrapped=frozenset({"visual.blocks.0.attn.q_proj"}),
    unloaded=("model.pooler.",),
)


def test_a_layout_is_the_same_after_a_journey():
    layout = replace(LAYOUT, naming=NAMING)
    # What has been looked up once must not travel along.
    assert layout.naming.rename(Q0) in layout.by_name
    arrived = msgspec.msgpack.decode(msgspec.msgpack.encode(layout), type=ModelLayout)
    assert arrived == layout
    assert arrived.by_name == layout.by_name
    assert arrived.naming.rename("language.layers.0.self_attn.q_proj") == Q0


@pytest.mark.parametrize(
    ("module", "name"),
    [
        (Q0, Q0),
        ("language.layers.0.self_attn.q_proj", Q0),
        ("decoder.layers.0.self_attn.q_proj", Q0),
        ("base.decoder.layers", "base.model.layers"),
        ("layers.0.self_attn.q_proj", Q0),
        ("block.0.self_attn.q_proj", Q0),
        ("model.layers.0.mlp.up_proj", "model.layers.0.mlp.up_proj"),  # adapted: named or not
        ("model.layers.9.self_attn.v_proj", "model.layers.9.self_attn.v_proj"),
        ("model.layers.9.mlp.up_proj", None),  # no target
        ("visual.blocks.0.attn.q_proj", None),
        ("model.pooler.q_proj", None),
        ("model.poolers.q_proj", "model.poolers.q_proj"),
        ("mtp.layers.0.q_proj", None),
        ("model.mtp.q_proj", None),
        ("model.layers.7.self_attn.q_proj", None),
    ],
)
def test_names_of_checkpoints_become_names_of_the_model(module, name):
    naming = NAMING if name != "base.model.layers" else replace(NAMING, targets=None, others=())
    assert naming.rename(module) == name


def test_what_peft_calls_a_parameter_of_experts_goes_where_the_experts_go():
    """Its last part is no name of a module, and no target of a server's."""
    experts, elsewhere = "model.layers.0.mlp.experts", "model.layers.7.mlp.experts"
    naming = replace(
        NAMING,
        names=frozenset({experts}),
        text_names={"layers.0.mlp.experts": experts},
        targets=("experts",),
    )
    for name in (experts, "language.layers.0.mlp.experts", "layers.0.mlp.experts"):
        assert naming.rename(name) == experts
        assert naming.rename(f"{name}.base_layer") == f"{experts}.base_layer"
    assert naming.rename(f"{elsewhere}.base_layer") is None
    assert naming.elsewhere(f"{elsewhere}.base_layer")
    others = replace(naming, names=frozenset(), text_names={}, targets=("q_proj",))
    assert others.rename(experts) is others.rename(f"{experts}.base_layer") is None


def test_a_pooling_models_adapters_may_lack_the_models_name():
    naming = ModuleNaming(
        names=frozenset({Q0}), pooling=True, others=("model.layers.7.",), roots=frozenset({"model"})
    )
    assert naming.rename(Q0.removeprefix("model.")) == Q0
    assert naming.elsewhere("layers.7.self_attn.q_proj")


def test_plain_tensors_of_a_layout_are_read_as_names_are_read_one_by_one():
    layout = replace(LAYOUT, naming=NAMING)
    assert f"base_model.model.{Q0}.lora_A.weight" in layout.by_tensor
    for tensor, (role, name) in layout.by_tensor.items():
        assert role == parse_tensor_name(tensor)
        assert name == layout.naming.rename(role.module)
        assert name in layout.by_name


def test_plain_tensors_leave_out_modules_that_need_a_closer_look():
    layout = replace(LAYOUT, naming=NAMING)
    for change in (
        {"special": frozenset({Q0})},
        {"bypassed": {Q0: "why"}},
        {"merged": {Q0: ("one", "two")}},
    ):
        changed = replace(layout, **change)
        assert f"base_model.model.{Q0}.lora_A.weight" not in changed.by_tensor
