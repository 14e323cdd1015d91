"""The ledger: every change that this plugin makes to vLLM, in one place.

All patches are put in place when vLLM loads its plugins, in every process, before any setting
is known. Each replacement asks `activation.py` whether the plugin acts for the engine at hand
and otherwise calls vLLM's original, so that without LoRA, with `--no-multilora` or with an
unsupported vLLM everything runs as if the package were not installed.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from vllm_multilora.integration.patching import Patch


def _flags_replacement(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def add_cli_args(parser: Any) -> Any:
        from vllm_multilora.integration.flags import add_flags

        parser = original(parser)
        add_flags(parser)
        return parser

    return add_cli_args


def _from_cli_args_replacement(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def from_cli_args(cls: type, args: Any) -> Any:
        from vllm_multilora.integration.flags import merge_flags

        engine_args = original(cls, args)
        merge_flags(args, engine_args)
        return engine_args

    return from_cli_args


def _engine_config_replacement(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def create_engine_config(self: Any, *args: Any, **kwargs: Any) -> Any:
        from vllm_multilora.integration.activation import announce

        vllm_config = original(self, *args, **kwargs)
        announce(vllm_config)
        return vllm_config

    return create_engine_config


def _punica_replacement(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def get_punica_wrapper(*args: Any, **kwargs: Any) -> Any:
        from vllm.config import get_current_vllm_config

        from vllm_multilora.integration.activation import kernel_backend

        backend = kernel_backend(get_current_vllm_config())
        if backend == "vllm":
            return original(*args, **kwargs)
        from vllm_multilora.integration.punica import MultiLoRAPunicaWrapper

        return MultiLoRAPunicaWrapper(*args, backend=backend, **kwargs)

    return get_punica_wrapper


def _worker_manager_replacement(original: type) -> Callable[..., Any]:
    @functools.wraps(original, updated=())
    def make_worker_manager(vllm_config: Any, *args: Any, **kwargs: Any) -> Any:
        from vllm_multilora.integration.activation import kernel_backend

        if kernel_backend(vllm_config) == "vllm":
            return original(vllm_config, *args, **kwargs)
        from vllm_multilora.integration.manager import MultiLoRAWorkerManager

        return MultiLoRAWorkerManager(vllm_config, *args, **kwargs)

    return make_worker_manager


def _set_active_loras_replacement(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def set_active_loras(
        self: Any,
        input_batch: Any,
        num_scheduled_tokens: Any,
        num_sampled_tokens: Any = None,
        *args: Any,
        **kwargs: Any,
    ) -> None:
        from vllm_multilora.integration.manager import MultiLoRAWorkerManager

        manager = getattr(self, "lora_manager", None)
        if isinstance(manager, MultiLoRAWorkerManager):
            manager.activate_batch(
                input_batch, num_scheduled_tokens, num_sampled_tokens, *args, **kwargs
            )
        else:
            original(self, input_batch, num_scheduled_tokens, num_sampled_tokens, *args, **kwargs)

    return set_active_loras


def _prompt_logprobs_replacement(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def get_prompt_logprobs(self: Any, hidden_states: Any, *args: Any, **kwargs: Any) -> Any:
        from vllm_multilora.integration.manager import MultiLoRAWorkerManager

        manager = getattr(self, "lora_manager", None)
        if not isinstance(manager, MultiLoRAWorkerManager):
            return original(self, hidden_states, *args, **kwargs)
        with manager.rows_from_prompts(hidden_states):
            return original(self, hidden_states, *args, **kwargs)

    return get_prompt_logprobs


CHECKED = "0.32"

PATCHES: tuple[Patch, ...] = (
    Patch(
        name="flags",
        target="vllm.engine.arg_utils:EngineArgs.add_cli_args",
        why="vLLM has no hook for a plugin's own flags on `vllm serve`; adds the --multilora ones.",
        checked=CHECKED,
        until="vLLM lets plugins add arguments.",
        replace=_flags_replacement,
    ),
    Patch(
        name="flag-values",
        target="vllm.engine.arg_utils:EngineArgs.from_cli_args",
        why="Unknown flags are dropped there; moves ours into additional_config, which reaches "
        "every process.",
        checked=CHECKED,
        until="vLLM lets plugins add arguments.",
        replace=_from_cli_args_replacement,
    ),
    Patch(
        name="settings-check",
        target="vllm.engine.arg_utils:EngineArgs.create_engine_config",
        why="additional_config is not validated by vLLM; a wrong setting must be one clear "
        "sentence at start-up, for `vllm serve` and `LLM(...)` alike.",
        checked=CHECKED,
        until="vLLM lets plugins validate their part of additional_config.",
        replace=_engine_config_replacement,
    ),
    Patch(
        name="punica-wrapper",
        target="vllm.lora.model_manager:get_punica_wrapper",
        why="The wrapper class is the platform's choice; an out-of-tree wrapper has no way in. "
        "Returns ours when the plugin is active and has kernels for the platform.",
        checked=CHECKED,
        until="vLLM selects punica wrappers through a registry.",
        replace=_punica_replacement,
    ),
    Patch(
        name="worker-manager",
        target="vllm.v1.worker.lora_model_runner_mixin:LRUCacheWorkerLoRAManager",
        why="The manager class is imported by name and not configurable. Ours knows the true "
        "rank of every module and slot, which the kernels need.",
        checked=CHECKED,
        until="vLLM makes the LoRA manager class configurable.",
        replace=_worker_manager_replacement,
    ),
    Patch(
        name="batch-mapping",
        target="vllm.v1.worker.lora_model_runner_mixin:LoRAModelRunnerMixin.set_active_loras",
        why="vLLM spells the batch's adapters out in tuples with one entry per token and walks "
        "them several times a step. Hands arrays per request to our manager instead.",
        checked=CHECKED,
        until="vLLM's LoRAMapping holds arrays.",
        replace=_set_active_loras_replacement,
    ),
    Patch(
        name="prompt-logprobs",
        target="vllm.v1.worker.gpu_model_runner:GPUModelRunner._get_prompt_logprobs_dict",
        why="vLLM sends a prompt's rows through the output layer with the mapping of the sampled "
        "rows: on CPUs the engine dies of it, elsewhere lm_head adapters meet the wrong rows. "
        "Tells our wrapper that the rows are tokens of the step.",
        checked=CHECKED,
        until="vLLM sets the LoRA mapping for prompt_logprobs.",
        replace=_prompt_logprobs_replacement,
    ),
)


def apply_patches() -> dict[str, bool]:
    """Puts every patch in place; safe to call again.

    Returns:
        For each patch's name, whether it is in place.
    """
    return {patch.name: patch.apply() for patch in PATCHES}
