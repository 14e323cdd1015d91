"""Whether an adapter's configuration asks for something that is computed here."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from vllm_multilora.adapters.config.adapter_config import AdapterConfig
from vllm_multilora.adapters.model.layout import ModelLayout
from vllm_multilora.adapters.model.ranks import room_for
from vllm_multilora.adapters.model.tensor_names import HEADS
from vllm_multilora.adapters.problems import Code, Problem, shown

# What a setting changes, by key; each is supported only where it is unset. vLLM refuses some of
# them, and ignores the others, which then gives other outputs than PEFT's.
_UNSUPPORTED = {
    "lora_bias": "a bias beside B is not supported",
    "layer_replication": "the adapter belongs to a model with replicated layers",
    "use_bdlora": "block-diagonal LoRA is not supported",
    "use_qalora": "QALoRA is not supported",
    "kasa_config": "KaSA has singular values between A and B and changes the base model's weights",
    "arrow_config": "Arrow routes each token to several adapters",
    "trainable_token_indices": "embeddings of single tokens are not served",
}
# What PEFT does not combine with activated LoRA, beside what is not supported anyway.
_NOT_ACTIVATED = {
    "use_dora": "PEFT does not combine DoRA with activated LoRA",
    "target_parameters": "PEFT activates linear layers only",
    "modules_to_save": "a head that is trained whole acts on all tokens",
    "velora_config": "PEFT does not combine VeLoRA with activated LoRA",
    "monteclora_config": "PEFT does not combine MonteCLoRA with activated LoRA",
}
# Initialisations that only set the adapter's first weights. Any other one by name (PiSSA, OLoRA,
# CorDA, LoftQ, ...) also changes the base model's weights, which the served ones are not.
_PLAIN_INITIALISATIONS = frozenset({"gaussian", "eva", "orthogonal", "mica", "lora_ga"})


def config_problems(config: AdapterConfig, file: str, layout: ModelLayout) -> list[Problem]:
    """What of a configuration the server cannot serve, whatever the tensors are."""
    return [
        *feature_problems(config, file),
        *_dora(config, file, layout),
        *_saved_modules(config, file),
        *_ranks(config, file, layout),
        *_invocation(config, file, layout),
    ]


def feature_problems(config: AdapterConfig, file: str) -> list[Problem]:
    """What a configuration asks for that LoRA serving here does not compute."""
    found = [
        _unsupported(file, key, config.raw[key], "unset", why)
        for key, why in _UNSUPPORTED.items()
        if _is_set(key, config.raw)
    ]
    start = config.raw.get("init_lora_weights")
    if isinstance(start, str) and start.lower() not in _PLAIN_INITIALISATIONS:
        why = (
            "it changes the base model's weights as well; convert the adapter with PEFT's "
            "path_initial_model_for_weight_conversion"
        )
        found.append(_unsupported(file, "init_lora_weights", start, "true", why))
    return [*found, *_activated(config, file)] if config.invocation_tokens else found


def _is_set(key: str, raw: Mapping[str, Any]) -> bool:
    """Whether a key has effect in PEFT, which takes an empty configuration for the default one."""
    value = raw.get(key)
    return bool(value) or (isinstance(value, dict) and key != "trainable_token_indices")


def _activated(config: AdapterConfig, file: str) -> Iterable[Problem]:
    """What PEFT does not train with `alora_invocation_tokens`, or computes as something else."""
    kind = "with 'alora_invocation_tokens'"
    for key, why in _NOT_ACTIVATED.items():
        if _is_set(key, config.raw):
            yield _unsupported(file, key, config.raw[key], f"unset {kind}", why)
    start = config.raw.get("init_lora_weights")
    if isinstance(start, str) and start.lower() == "mica":
        why = "PEFT does not combine MiCA with activated LoRA"
        yield _unsupported(file, "init_lora_weights", start, f"true {kind}", why)
    task = config.raw.get("task_type")
    if task != "CAUSAL_LM":
        why = "PEFT leaves the adapter out of all tokens of other tasks"
        yield _unsupported(file, "task_type", task, f"'CAUSAL_LM' {kind}", why)


def _dora(config: AdapterConfig, file: str, layout: ModelLayout) -> Iterable[Problem]:
    if config.dora and not layout.dora and not config.invocation_tokens:
        why = (
            "DoRA (weight-decomposed LoRA) multiplies outputs, for which a server has room if it "
            "is started with --multilora-dora"
        )
        yield _unsupported(file, "use_dora", True, "unset", why)


def _invocation(config: AdapterConfig, file: str, layout: ModelLayout) -> Iterable[Problem]:
    """Tokens that the base model does not have, and no prompt can contain."""
    size = layout.vocabulary
    unknown = [token for token in config.invocation_tokens if size is not None and token >= size]
    if unknown:
        yield Problem.at(
            Code.WRONG_VOCABULARY,
            file,
            "alora_invocation_tokens",
            shown(list(config.invocation_tokens)),
            f"ids below {size}, the base model's vocabulary",
            hint="the adapter was trained with another tokenizer",
        )


def _unsupported(file: str, key: str, value: object, expected: str, why: str) -> Problem:
    message = f"{file}: {key!r} is {shown(value)}, expected {expected}: {why}"
    return Problem(Code.UNSUPPORTED_FEATURE, file, key, shown(value), expected, message)


def _saved_modules(config: AdapterConfig, file: str) -> Iterable[Problem]:
    refused = [name for name in config.modules_to_save if name not in HEADS]
    if refused:
        yield Problem.at(
            Code.UNSUPPORTED_MODULES_TO_SAVE,
            file,
            "modules_to_save",
            shown(refused),
            f"none but {' and '.join(map(repr, HEADS))}",
            hint="modules trained whole are served for classification heads only; train them as "
            "LoRA targets, or merge them into the base model",
        )


def _ranks(config: AdapterConfig, file: str, layout: ModelLayout) -> Iterable[Problem]:
    """Ranks over the limit, as vLLM counts them: also of patterns that fit no module."""
    ranks = {"r": config.rank} | {
        f"rank_pattern[{shown(pattern)}]": rank for pattern, rank in config.rank_pattern.items()
    }
    too_large = {key: rank for key, rank in ranks.items() if rank > layout.max_rank}
    if too_large:
        key, rank = max(too_large.items(), key=lambda item: item[1])
        yield Problem.at(
            Code.RANK_TOO_LARGE,
            file,
            key,
            str(rank),
            f"at most {layout.max_rank}",
            hint=room_for(rank),
            others=len(too_large) - 1,
        )
