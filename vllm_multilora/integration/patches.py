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

from vllm_multilora.integration import prefix_keys
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
        from vllm_multilora.integration.activation import (
            announce,
            kernel_backend,
            settings_of,
        )
        from vllm_multilora.integration.cache_settings import (
            check_cache_settings,
            lift_default_count,
        )

        vllm_config = original(self, *args, **kwargs)
        announce(vllm_config)
        if kernel_backend(vllm_config) != "vllm":
            check_cache_settings(settings_of(vllm_config), vllm_config)
            lift_default_count(self, vllm_config)
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

        # Our manager fills slots for our kernels; stock ones need stock's cleared slots.
        if kernel_backend(vllm_config) == "vllm" or not PUNICA_WRAPPER.is_applied():
            return original(vllm_config, *args, **kwargs)
        from vllm_multilora.integration.worker_manager import MultiLoRAWorkerManager

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
        from vllm_multilora.integration.worker_manager import MultiLoRAWorkerManager

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
        from vllm_multilora.integration.worker_manager import MultiLoRAWorkerManager

        manager = getattr(self, "lora_manager", None)
        if not isinstance(manager, MultiLoRAWorkerManager):
            return original(self, hidden_states, *args, **kwargs)
        with manager.model_manager.rows_from_prompts(hidden_states):
            return original(self, hidden_states, *args, **kwargs)

    return get_prompt_logprobs


def _prompt_scores_replacement(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def compute(self: Any, logits_fn: Any, hidden_states: Any, *args: Any, **kwargs: Any) -> Any:
        from vllm_multilora.integration.model_manager import MultiLoRAModelManager

        manager = getattr(getattr(logits_fn, "__self__", None), "lora_manager", None)
        if not isinstance(manager, MultiLoRAModelManager):
            return original(self, logits_fn, hidden_states, *args, **kwargs)
        with manager.rows_from_prompts(hidden_states):
            return original(self, logits_fn, hidden_states, *args, **kwargs)

    return compute


def _sample_replacement(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def sample(self: Any, hidden_states: Any, input_batch: Any, *args: Any, **kwargs: Any) -> Any:
        import numpy as np

        from vllm_multilora.integration.worker_manager import MultiLoRAWorkerManager

        manager = getattr(self, "lora_manager", None)
        if isinstance(manager, MultiLoRAWorkerManager):
            manager.model_manager.set_sampled_rows(np.diff(input_batch.cu_num_logits_np))
        return original(self, hidden_states, input_batch, *args, **kwargs)

    return sample


def _lora_inputs_replacement(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def make_lora_inputs(
        self: Any, req_ids: list[str], idx_mapping: Any, num_scheduled_tokens: Any
    ) -> tuple[Any, Any, Any]:
        from vllm.lora.layers.utils import LoRAMappingType

        from vllm_multilora.integration.mapping import BatchMapping

        mapping = BatchMapping(
            self.lora_ids[idx_mapping], num_scheduled_tokens, None, LoRAMappingType.LANGUAGE
        )
        return mapping, mapping, self.get_activate_loras(req_ids)

    return make_lora_inputs


def _set_active_loras_from_inputs(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def set_active_loras(
        self: Any, prompts: Any, tokens: Any, requests: Any, *args: Any, **kwargs: Any
    ) -> None:
        from vllm_multilora.integration.mapping import BatchMapping
        from vllm_multilora.integration.worker_manager import MultiLoRAWorkerManager

        if isinstance(prompts, BatchMapping):
            manager = getattr(self, "lora_manager", None)
            if isinstance(manager, MultiLoRAWorkerManager):
                manager.set_active_adapters(requests, prompts)
                return
            prompts, tokens = prompts.prompt_mapping, prompts.index_mapping
        original(self, prompts, tokens, requests, *args, **kwargs)

    return set_active_loras


def _scheduler_class_replacement(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def get_scheduler_cls(self: Any) -> type:
        from vllm_multilora.integration.scheduler import adapter_aware

        return adapter_aware(original(self))

    return get_scheduler_cls


def _pin_replacement(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def pin_lora(self: Any, lora_id: int) -> bool:
        done = original(self, lora_id)
        if done and (tell := getattr(self.scheduler, "pin_adapter", None)):
            tell(lora_id)
        return done

    return pin_lora


def _remove_replacement(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def remove_lora(self: Any, lora_id: int) -> Any:
        from vllm_multilora.integration.engine_core import unregister

        return unregister(self, lora_id, original)

    return remove_lora


def _load_route_replacement(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    async def load_lora_adapter(self: Any, request: Any, base_model_name: str | None = None) -> Any:
        from vllm_multilora.integration import registration

        if registration.acts_for(self):
            return await registration.load_adapter(self, request, base_model_name)
        return await original(self, request, base_model_name)

    return load_lora_adapter


def _unload_route_replacement(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    async def unload_lora_adapter(self: Any, request: Any) -> Any:
        from vllm_multilora.integration import registration

        if registration.acts_for(self):
            return await registration.unload_adapter(self, request)
        return await original(self, request)

    return unload_lora_adapter


def _hash_keys_replacement(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def lora_hash_keys(request: Any) -> list[Any]:
        keys = original(request)
        if not prefix_keys.tells_versions_apart:
            return keys
        return [(*key, request.lora_request.lora_int_id) for key in keys]

    return lora_hash_keys


def _executor_replacement(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def init(self: Any, vllm_config: Any, *args: Any, **kwargs: Any) -> None:
        from vllm_multilora.integration.engine_core import starting_workers

        with starting_workers(self, vllm_config):
            original(self, vllm_config, *args, **kwargs)

    return init


def _add_request_replacement(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def add_request(self: Any, *args: Any, **kwargs: Any) -> Any:
        from vllm_multilora.integration.engine_core import gate_of

        gate_of(self)
        return original(self, *args, **kwargs)

    return add_request


def _add_lora_replacement(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def add_lora(self: Any, lora_request: Any) -> Any:
        from vllm_multilora.integration.engine_core import register

        return register(self, lora_request, original)

    return add_lora


def _client_request_replacement(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def handle_client_request(self: Any, *args: Any, **kwargs: Any) -> Any:
        gate = getattr(self, "multilora_gate", None)
        if gate is not None:
            gate.poll()
        return original(self, *args, **kwargs)

    return handle_client_request


def _outputs_replacement(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def process_outputs(self: Any, engine_core_outputs: Any, *args: Any, **kwargs: Any) -> Any:
        from vllm_multilora.integration.failures import deliver_failures

        deliver_failures(engine_core_outputs, self.request_states)
        return original(self, engine_core_outputs, *args, **kwargs)

    return process_outputs


def _wake_up_replacement(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def wake_up(self: Any, tags: list[str] | None = None) -> None:
        from vllm_multilora.integration.worker_manager import MultiLoRAWorkerManager

        original(self, tags)
        manager = getattr(self.model_runner, "lora_manager", None)
        if isinstance(manager, MultiLoRAWorkerManager) and (tags is None or "weights" in tags):
            manager.slots_lost()

    return wake_up


CHECKED = "0.31 to 0.33"

PUNICA_WRAPPER = Patch(
    name="punica-wrapper",
    target="vllm.lora.model_manager:get_punica_wrapper",
    why="The wrapper class is the platform's choice; an out-of-tree wrapper has no way in. "
    "Returns ours when the plugin is active and has kernels for the platform.",
    checked=CHECKED,
    until="vLLM selects punica wrappers through a registry.",
    replace=_punica_replacement,
)

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
    PUNICA_WRAPPER,
    Patch(
        name="worker-manager",
        target="vllm.v1.worker.lora_model_runner_mixin:LRUCacheWorkerLoRAManager",
        why="The manager class is imported by name and not configurable. Ours keeps adapters in "
        "the three-tier cache and tells the kernels the true rank of every module and slot.",
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
    Patch(
        name="batch-inputs",
        target="vllm.v1.worker.gpu.lora_utils:LoraState.make_lora_inputs",
        why="As batch-mapping, for vLLM's second model runner.",
        checked=CHECKED,
        until="As batch-mapping.",
        replace=_lora_inputs_replacement,
    ),
    Patch(
        name="batch-inputs-taken",
        target="vllm.v1.worker.lora_model_runner_mixin:LoRAModelRunnerMixin._set_active_loras",
        why="Takes what batch-inputs makes; spells it out for stock managers.",
        checked=CHECKED,
        until="As batch-mapping.",
        replace=_set_active_loras_from_inputs,
    ),
    Patch(
        name="prompt-logprobs-2",
        target="vllm.v1.worker.gpu.sample.prompt_logprob:"
        "PromptLogprobsWorker.compute_prompt_logprobs",
        why="As prompt-logprobs, for vLLM's second model runner.",
        checked=CHECKED,
        until="As prompt-logprobs.",
        replace=_prompt_scores_replacement,
    ),
    Patch(
        name="prompt-scores-2",
        target="vllm.v1.worker.gpu.sample.prompt_logprob:"
        "PromptLogprobsWorker.compute_prompt_token_id_logprobs",
        why="As prompt-logprobs, for the scores of given tokens.",
        checked=CHECKED,
        until="As prompt-logprobs.",
        replace=_prompt_scores_replacement,
    ),
    Patch(
        name="sampled-rows",
        target="vllm.v1.worker.gpu.model_runner:GPUModelRunner.sample",
        why="vLLM's second model runner maps one row a request to the output layer, though "
        "speculative decoding samples several. Tells our wrapper how many.",
        checked=CHECKED,
        until="vLLM's LoRA mapping covers all sampled rows.",
        replace=_sample_replacement,
    ),
    Patch(
        name="scheduler-class",
        target="vllm.config.scheduler:SchedulerConfig.get_scheduler_cls",
        why="vLLM schedules requests whose adapter is not loaded, and the model step loads it "
        "while everybody waits, or raises and ends the engine; it fills a step with `max_loras` "
        "adapters whichever slots are pinned, and never frees a slot for an adapter as long as "
        "others' requests keep coming. See `scheduler`.",
        checked=CHECKED,
        until="vLLM's scheduler knows which adapters are ready and who has slots.",
        replace=_scheduler_class_replacement,
    ),
    Patch(
        name="pin",
        target="vllm.v1.engine.core:EngineCore.pin_lora",
        why="Tells the scheduler of the pin.",
        checked=CHECKED,
        until="As scheduler-class.",
        replace=_pin_replacement,
    ),
    Patch(
        name="remove-lora",
        target="vllm.v1.engine.core:EngineCore.remove_lora",
        why="vLLM takes an adapter away from requests that use it, which then read it again. "
        "Waits until they have ended, for a limited time.",
        checked=CHECKED,
        until="vLLM's remove_lora waits for running requests.",
        replace=_remove_replacement,
    ),
    Patch(
        name="load-route",
        target="vllm.entrypoints.openai.models.serving:OpenAIServingModels.load_lora_adapter",
        why="vLLM answers a bad adapter with HTTP 500 and a reload with a mixture of old and new "
        "weights. Answers with the right status and all problems, and gives every version a "
        "number of its own.",
        checked=CHECKED,
        until="vLLM validates adapters at registration and versions reloads.",
        replace=_load_route_replacement,
    ),
    Patch(
        name="unload-route",
        target="vllm.entrypoints.openai.models.serving:OpenAIServingModels.unload_lora_adapter",
        why="vLLM forgets the name and keeps slot and memory. Frees them.",
        checked=CHECKED,
        until="vLLM's unload removes the adapter from the workers.",
        replace=_unload_route_replacement,
    ),
    Patch(
        name="prefix-cache-keys",
        target="vllm.v1.core.kv_cache_utils:_gen_lora_extra_hash_keys",
        why="Cached prefixes are found by an adapter's name and path, so that new weights at the "
        "same path get blocks of the old ones. Adds the adapter's number, which a reload changes.",
        checked=CHECKED,
        until="vLLM's keys tell versions of an adapter apart.",
        replace=_hash_keys_replacement,
    ),
    Patch(
        name="executor",
        target="vllm.v1.executor.abstract:Executor.__init__",
        why="Opens the log through which workers tell which adapters they have ready, before they "
        "start.",
        checked=CHECKED,
        until="As scheduler-class.",
        replace=_executor_replacement,
    ),
    Patch(
        name="add-request",
        target="vllm.v1.engine.core:EngineCore.add_request",
        why="Gives the scheduler its view of that log, before its first request.",
        checked=CHECKED,
        until="As scheduler-class.",
        replace=_add_request_replacement,
    ),
    Patch(
        name="add-lora",
        target="vllm.v1.engine.core:EngineCore.add_lora",
        why="Registering an adapter reads it in the workers while no step runs. Reads it in the "
        "background and answers when that is done.",
        checked=CHECKED,
        until="vLLM loads adapters in the background.",
        replace=_add_lora_replacement,
    ),
    Patch(
        name="client-requests",
        target="vllm.v1.engine.core:EngineCoreProc._handle_client_request",
        why="An idle engine core waits for clients only; has it look at the log when it is woken "
        "for a registration.",
        checked=CHECKED,
        until="As add-lora.",
        replace=_client_request_replacement,
    ),
    Patch(
        name="failed-requests",
        target="vllm.v1.engine.output_processor:OutputProcessor.process_outputs",
        why="vLLM answers a request that fails in the engine with HTTP 500 and no reason. Puts "
        "the status and the reason of a failed load in their place.",
        checked=CHECKED,
        until="vLLM carries a status and a reason with a failed request.",
        replace=_outputs_replacement,
    ),
    Patch(
        name="wake-up",
        target="vllm.v1.worker.gpu_worker:Worker.wake_up",
        why="Sleep mode may discard the slots' memory, and vLLM then answers from slots that hold "
        "nothing. Has the adapters copied into their slots again.",
        checked=CHECKED,
        until="vLLM restores adapter slots after a sleep.",
        replace=_wake_up_replacement,
    ),
)


def apply_patches() -> dict[str, bool]:
    """Puts every patch in place; safe to call again.

    Returns:
        For each patch's name, whether it is in place.
    """
    return {patch.name: patch.apply() for patch in PATCHES}
