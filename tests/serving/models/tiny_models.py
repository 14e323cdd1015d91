"""Tiny random base models, written as ordinary Hugging Face checkpoints.

The sizes are awkward on purpose (a hidden size, a vocabulary and an MLP width that are no powers
of two), as real checkpoints are after sharding. The weights are scaled far from a trained model's
initialisation so that greedy decoding wanders instead of settling into a loop: attention is sharp,
every block moves the residual stream, and logits have a standard deviation of about
``LOGIT_STD``, which keeps the best token clear of the second best.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    ApertusConfig,
    BertConfig,
    BertForTokenClassification,
    BertModel,
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    Gemma4ForCausalLM,
    Gemma4TextConfig,
    Glm4Config,
    Glm4ForCausalLM,
    Glm4MoeConfig,
    Glm4MoeForCausalLM,
    GptOssConfig,
    GptOssForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    GraniteMoeHybridConfig,
    GraniteMoeHybridForCausalLM,
    JambaConfig,
    Llama4TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    MixtralConfig,
    MixtralForCausalLM,
    ModernBertConfig,
    ModernBertModel,
    Phi3Config,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    RobertaConfig,
    RobertaForSequenceClassification,
)

VOCAB_SIZE = 300
TWO_LAYERS = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 128,
    "intermediate_size": 208,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "tie_word_embeddings": False,
    "bos_token_id": None,
    "eos_token_id": None,
}
"""Configuration of a small decoder. Heads of 32 are the smallest for vLLM's CPU attention."""

LOGIT_STD = 6.0

# Standard deviation of a projection's output for an input of unit variance.
_GAINS = {"q_proj": 2.0, "k_proj": 2.0, "o_proj": 3.0, "down_proj": 3.0, "lm_head": LOGIT_STD}


def write_llama(
    path: Path, *, seed: int = 0, positions: int = 256, mlp: int = 176, tied: bool = False
) -> Path:
    """Writes a three-layer Llama: 8 heads, 2 key-value heads, no biases.

    Args:
        path: Directory to write into.
        seed: Seeds the weights.
        positions: Tokens that a request can have.
        mlp: Width of the MLPs.
        tied: Whether the head is the embedding.

    Returns:
        ``path``.
    """
    config = _llama_config(
        max_position_embeddings=positions, intermediate_size=mlp, tie_word_embeddings=tied
    )
    return _write(LlamaForCausalLM, config, path, seed)


def write_eagle(path: Path, base: Path) -> Path:
    """Writes an EAGLE head for a Llama: its first layer again, of the mean of token and state.

    Args:
        path: Directory to write into.
        base: Directory of the Llama, whose embedding and head serve here, too.

    Returns:
        ``path``.
    """
    config = LlamaConfig.from_pretrained(base)
    half = torch.eye(config.hidden_size) / 2
    weights = {
        name.removeprefix("model."): weight
        for name, weight in load_file(base / "model.safetensors").items()
        # The layer's input has no norm here.
        if name.startswith("model.layers.0.") and "input_layernorm" not in name
    }
    weights["fc.weight"] = torch.cat([half, half], dim=1)
    config.num_hidden_layers = 1
    config.save_pretrained(path)
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
    return path


def write_granite(path: Path, *, seed: int = 3) -> Path:
    """Writes a Granite, which scales its logits, with a Qwen2's sizes: see `write_qwen2`."""
    config = GraniteConfig(
        **TWO_LAYERS, attention_multiplier=0.2, residual_multiplier=0.7, logits_scaling=1.5
    )
    return _write(GraniteForCausalLM, config, path, seed)


def write_granite_hybrid(path: Path, *, seed: int = 8) -> Path:
    """Writes a Granite 4 without experts: a Mamba 2 layer, which has a state, and an attention."""
    config = GraniteMoeHybridConfig(
        **TWO_LAYERS,
        shared_intermediate_size=TWO_LAYERS["intermediate_size"],
        layer_types=["mamba", "attention"],
        num_local_experts=0,
        num_experts_per_tok=0,
        mamba_n_heads=8,
        mamba_d_head=32,
        mamba_d_state=16,
        mamba_n_groups=1,
        position_embedding_type="rope",
        pad_token_id=None,
    )
    return _write(GraniteMoeHybridForCausalLM, config, path, seed)


def write_gemma4(path: Path, *, seed: int = 10) -> Path:
    """Writes a Gemma 4 without experts, whose second layer's keys are its values, too."""
    config = Gemma4TextConfig(
        **TWO_LAYERS,
        head_dim=32,
        global_head_dim=32,
        layer_types=["sliding_attention", "full_attention"],
        attention_k_eq_v=True,
        hidden_size_per_layer_input=0,
        vocab_size_per_layer_input=VOCAB_SIZE,
        pad_token_id=None,
    )
    return _write(Gemma4ForCausalLM, config, path, seed)


def write_glm4(path: Path, *, seed: int = 11) -> Path:
    """Writes a GLM-4, in which gate and up are one."""
    config = Glm4Config(**TWO_LAYERS, head_dim=32, pad_token_id=None)
    return _write(Glm4ForCausalLM, config, path, seed)


def write_apertus_config(path: Path) -> Path:
    """Writes what says of an Apertus how large it is, and no weights."""
    config = ApertusConfig(**TWO_LAYERS, pad_token_id=None)
    config.architectures = ["ApertusForCausalLM"]
    config.save_pretrained(path)
    return path


def write_jamba_config(path: Path) -> Path:
    """Writes what says of a Jamba without experts how large it is, and no weights."""
    config = JambaConfig(
        **TWO_LAYERS, attn_layer_period=2, attn_layer_offset=1, num_experts=1, mamba_dt_rank=8
    )
    config.architectures = ["JambaForCausalLM"]
    config.save_pretrained(path)
    return path


def write_phi3_config(path: Path) -> Path:
    """Writes what says of a Phi-3 with one key-value head how large it is, and no weights."""
    config = Phi3Config(**TWO_LAYERS | {"num_key_value_heads": 1}, pad_token_id=None)
    config.architectures = ["Phi3ForCausalLM"]
    config.save_pretrained(path)
    return path


def write_llama4_config(path: Path) -> Path:
    """Writes what says of a Llama 4 without experts how large it is, and no weights."""
    config = Llama4TextConfig(
        **TWO_LAYERS, head_dim=32, intermediate_size_mlp=208, num_local_experts=2, moe_layers=[]
    )
    config.architectures = ["Llama4ForCausalLM"]
    config.save_pretrained(path)
    return path


_LATENT_ATTENTION = {
    **TWO_LAYERS,
    "num_key_value_heads": 4,
    "q_lora_rank": 48,
    "kv_lora_rank": 512,  # this and 64 of positions are what vLLM's attention on CPUs takes
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 64,
    "v_head_dim": 32,
    "head_dim": 64,
}


def write_deepseek(path: Path, *, seed: int = 9) -> Path:
    """Writes a DeepSeek-V3 without experts: its attention caches what it makes keys of."""
    config = DeepseekV3Config(
        **_LATENT_ATTENTION, first_k_dense_replace=2, n_routed_experts=8, n_group=1, topk_group=1
    )
    return _write(DeepseekV3ForCausalLM, config, path, seed)


def write_deepseek_moe(path: Path, *, seed: int = 15) -> Path:
    """Writes a DeepSeek-V3: each token has two of eight experts, of one of two groups, and one."""
    config = DeepseekV3Config(
        **_LATENT_ATTENTION,
        first_k_dense_replace=0,
        n_routed_experts=8,
        num_experts_per_tok=2,
        n_group=2,
        topk_group=1,
        n_shared_experts=1,
        moe_intermediate_size=80,
        routed_scaling_factor=1.5,
        topk_method="noaux_tc",  # vLLM asks for these
        scoring_func="sigmoid",
    )
    return _write(DeepseekV3ForCausalLM, config, path, seed)


def write_glm4_moe(path: Path, *, seed: int = 16) -> Path:
    """Writes a GLM-4.5: each token has two of eight experts, and one that all tokens share."""
    config = Glm4MoeConfig(
        **TWO_LAYERS,
        head_dim=32,
        first_k_dense_replace=0,
        n_routed_experts=8,
        num_experts_per_tok=2,
        n_group=1,
        topk_group=1,
        n_shared_experts=1,
        moe_intermediate_size=80,
        routed_scaling_factor=1.5,
        pad_token_id=None,
    )
    return _write(Glm4MoeForCausalLM, config, path, seed)


def write_gpt_oss(path: Path, *, seed: int = 17) -> Path:
    """Writes a GPT-OSS: experts have biases, and gates and what they multiply take turns."""
    config = GptOssConfig(
        **{**TWO_LAYERS, "intermediate_size": 128},
        head_dim=32,
        num_local_experts=4,
        num_experts_per_tok=2,
        sliding_window=64,
        layer_types=["sliding_attention", "full_attention"],
        pad_token_id=None,
    )
    return _write(GptOssForCausalLM, config, path, seed)


def write_mixtral(path: Path, *, seed: int = 12) -> Path:
    """Writes a Mixtral: each token has two of four experts."""
    config = MixtralConfig(**TWO_LAYERS, num_local_experts=4, num_experts_per_tok=2)
    return _write(MixtralForCausalLM, config, path, seed)


def write_qwen2_moe(path: Path, *, seed: int = 13) -> Path:
    """Writes a Qwen2-MoE: as a Mixtral, and each token has the expert that all share, too."""
    config = Qwen2MoeConfig(
        **TWO_LAYERS,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=80,
        shared_expert_intermediate_size=112,
    )
    return _write(Qwen2MoeForCausalLM, config, path, seed)


def write_qwen3_moe(path: Path, *, seed: int = 14) -> Path:
    """Writes a Qwen3-MoE: each token has three of eight experts."""
    config = Qwen3MoeConfig(
        **TWO_LAYERS, head_dim=32, num_experts=8, num_experts_per_tok=3, moe_intermediate_size=80
    )
    return _write(Qwen3MoeForCausalLM, config, path, seed)


def write_classifier(path: Path, *, labels: int, seed: int = 2) -> Path:
    """Writes a Llama as `write_llama` does, with a head for classes in the place of its own.

    Args:
        path: Directory to write into.
        labels: Classes; with one the model is a cross-encoder to vLLM, and its class a score.
        seed: Seeds the weights.

    Returns:
        ``path``.
    """
    return _write(LlamaForSequenceClassification, _llama_config(num_labels=labels), path, seed)


_ENCODER = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 128,
    "intermediate_size": 176,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
}


def write_bert(path: Path, *, seed: int = 4) -> Path:
    """Writes a three-layer BERT without a head for tokens, and with its pooler."""
    return _write(BertModel, BertConfig(**_ENCODER), path, seed)


def write_token_classifier(path: Path, *, labels: int, seed: int = 7) -> Path:
    """Writes a three-layer BERT with a head for so many classes of tokens."""
    return _write(BertForTokenClassification, BertConfig(**_ENCODER, num_labels=labels), path, seed)


def write_modern_bert(path: Path, *, seed: int = 5) -> Path:
    """Writes a three-layer ModernBERT: q, k and v are one, and most attention is to neighbours."""
    config = ModernBertConfig(
        **_ENCODER,
        global_attn_every_n_layers=2,
        local_attention=16,
        **dict.fromkeys(("pad_token_id", "bos_token_id", "cls_token_id"), 0),
        **dict.fromkeys(("eos_token_id", "sep_token_id"), 1),
    )
    return _write(ModernBertModel, config, path, seed)


def write_roberta(path: Path, *, labels: int, seed: int = 6) -> Path:
    """Writes a three-layer RoBERTa with a head for so many classes."""
    config = RobertaConfig(**_ENCODER, type_vocab_size=1, num_labels=labels)
    return _write(RobertaForSequenceClassification, config, path, seed)


def _llama_config(**more: Any) -> LlamaConfig:
    settings = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 96,
        "intermediate_size": 176,
        "num_hidden_layers": 3,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "max_position_embeddings": 256,
        "tie_word_embeddings": False,
        "bos_token_id": None,
        "eos_token_id": None,
    }
    return LlamaConfig(**{**settings, **more})


def write_qwen2(path: Path, *, seed: int = 1) -> Path:
    """Writes a two-layer Qwen2: 4 heads, 2 key-value heads, biases on q, k and v.

    vLLM derives a Qwen2 head's size from the hidden size, and its CPU attention takes no head
    below 32: four heads are what a hidden size of 128 leaves room for.
    """
    return _write(Qwen2ForCausalLM, Qwen2Config(**TWO_LAYERS), path, seed)


def _write(
    build: Callable[[Any], PreTrainedModel],
    config: PreTrainedConfig,
    path: Path,
    seed: int,
) -> Path:
    model = build(config).to(torch.float32)
    randomise(model, torch.Generator().manual_seed(seed))
    model.save_pretrained(path)
    word_tokenizer().save_pretrained(path)
    return path


def randomise(model: PreTrainedModel, generator: torch.Generator) -> None:
    """Fills every parameter in place, in the order of the model's parameter names."""
    for name, parameter in sorted(model.named_parameters()):
        module, _, kind = name.rpartition(".")
        leaf = module.rpartition(".")[2]
        noise = torch.randn(parameter.shape, generator=generator)
        if "norm" in leaf.lower():
            value = 1.0 + 0.1 * noise
        elif kind == "bias" or (leaf == "experts" and kind.endswith("_bias")):
            value = 0.5 * noise
        elif leaf.endswith(("embed_tokens", "embeddings")):
            value = noise
        elif leaf == "experts":  # all experts' weights of one projection
            value = noise * _GAINS.get(kind, 1.0) / parameter.shape[-1] ** 0.5
        else:
            value = noise * _GAINS.get(leaf, 1.0) / parameter[0].numel() ** 0.5
        parameter.data.copy_(value)


def word_tokenizer(special: Sequence[str] = (), **named: str) -> PreTrainedTokenizerFast:
    """A tokenizer of the words ``t0 t1 …``, one a token id.

    Args:
        special: Tokens that are no words, whose ids come next.
        **named: Which of them is what, as the tokenizer's arguments.
    """
    words = [*(f"t{token}" for token in range(VOCAB_SIZE)), *special]
    vocabulary = {word: token for token, word in enumerate(words)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="t0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="t0", **named)
