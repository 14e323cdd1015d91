"""`adapter_config.json`: scalings as PEFT computes them, and precise refusals."""

import json

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.utils.other import get_pattern_key
from vllm.lora.peft_helper import PEFTHelper

from vllm_multilora.adapters.adapter_errors import AdapterFormatError
from vllm_multilora.adapters.config.adapter_config import AdapterConfig
from vllm_multilora.adapters.config.config_checks import feature_problems
from vllm_multilora.adapters.signing.adapter_digest import AdapterDigest

from ..checkpoints import config_of

MODULES = [
    "model.layers.0.self_attn.q_proj",
    "model.layers.1.self_attn.q_proj",
    "model.layers.11.self_attn.q_proj",
    "model.layers.0.mlp.down_proj",
    "q_proj",
    "xq_proj",
]
PATTERNS = {
    "none": {},
    "suffix": {"q_proj": 4},
    "full-name": {"model.layers.1.self_attn.q_proj": 2},
    "first-match-wins": {"layers.0.self_attn.q_proj": 2, "q_proj": 4, "model.layers.0.*": 8},
    "general-before-special": {"q_proj": 4, "layers.0.self_attn.q_proj": 2},
    "regular-expression": {r"layers\.[0-9]\..*proj": 3},
    "anchored": {"^model.layers.0.mlp.down_proj": 6},
}

READS_PATTERNS = hasattr(PEFTHelper, "get_rank_and_scaling")
"""Whether vLLM does, and refuses what it does not compute: 0.31 takes `bias` alone amiss."""


def read(**keys: object) -> AdapterConfig:
    content = {"r": 16, "lora_alpha": 24, "target_modules": ["q_proj"]} | keys
    return config_of(json.dumps(content))


@pytest.mark.parametrize("rslora", [False, True], ids=["plain", "rslora"])
@pytest.mark.parametrize("alphas", PATTERNS.values(), ids=PATTERNS)
@pytest.mark.parametrize("ranks", PATTERNS.values(), ids=PATTERNS)
def test_ranks_and_scalings_are_pefts_and_vllms(ranks, alphas, rslora):
    keys = {"rank_pattern": ranks, "alpha_pattern": alphas, "use_rslora": rslora}
    config = read(**keys)
    stock = PEFTHelper.from_dict({"r": 16, "lora_alpha": 24, "target_modules": []} | keys)
    for module in MODULES:
        rank = ranks.get(get_pattern_key(ranks, module), 16)
        alpha = alphas.get(get_pattern_key(alphas, module), 24)
        assert config.rank_of(module) == rank
        assert config.scaling(module) == alpha / (rank**0.5 if rslora else rank)
        if READS_PATTERNS:
            assert stock.get_rank_and_scaling(module) == (rank, config.scaling(module))


@pytest.mark.parametrize("target", ["gate.weight", "mlp.gate.weight", "weight"])
def test_patterns_of_weights_that_are_targets_are_matched_with_their_names(target):
    """As PEFT adapts routers. Of modules that are targets, they are matched with the modules'."""
    model = torch.nn.ModuleDict({"mlp": torch.nn.ModuleDict({"gate": torch.nn.Linear(4, 4)})})
    keys = {
        "r": 2,
        "lora_alpha": 4,
        "target_parameters": [target],
        "rank_pattern": {"mlp.gate": 3, "gate.weight": 5},
        "alpha_pattern": {"gate": 2, "mlp.gate.weight": 32},
    }
    peft = LoraConfig(target_modules=[], **keys)
    adapted = inject_adapter_in_model(peft, model)["mlp"]["gate"]
    config = read(**keys)
    assert config.rank_of("mlp.gate") == adapted.r["default"] == 5
    assert config.scaling("mlp.gate") == adapted.scaling["default"] == 32 / 5
    plain = read(**{**keys, "target_parameters": ["experts.gate_up_proj", "late.weight"]})
    assert (plain.rank_of("mlp.gate"), plain.scaling("mlp.gate")) == (3, 2 / 3)
    assert digest(config) != digest(plain) != digest(read(**{**keys, "target_parameters": None}))


def digest(config: AdapterConfig) -> str:
    return AdapterDigest(config, {}).hexdigest()


def test_the_tokens_that_activate_an_adapter_are_read_and_make_it_another():
    config = read(alora_invocation_tokens=[7, 1 << 17, 7], task_type="CAUSAL_LM")
    assert config.invocation_tokens == (7, 1 << 17, 7)
    assert feature_problems(config, "c.json") == []
    assert read(alora_invocation_tokens=None).invocation_tokens == ()


@pytest.mark.parametrize("start", [True, False, "gaussian", "EVA", "orthogonal"])
def test_initialisations_of_the_adapter_alone_are_supported(start):
    assert feature_problems(read(init_lora_weights=start), "c.json") == []


def test_a_configuration_of_nothing_but_lists_is_refused_before_it_is_parsed():
    text = '{"r": [' + "[]," * 1_000_000 + "0]}"
    with pytest.raises(AdapterFormatError, match=r"has 1000002 brackets .* expected at most"):
        config_of(text)
