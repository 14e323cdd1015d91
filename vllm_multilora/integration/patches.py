"""The ledger: every change that this plugin makes to vLLM, in one place.

All patches are put in place when vLLM loads its plugins, in every process, before any setting
is known; in modules that the process has not imported yet, as soon as it does. Each replacement
asks `activation.py` whether the plugin acts for the engine at hand and otherwise calls vLLM's
original, so that without LoRA, with `--no-multilora` or with an unsupported vLLM everything runs
as if the package were not installed.
"""

from __future__ import annotations

from vllm_multilora.integration.patching import Patch
from vllm_multilora.integration.replacements import engine, server, worker

CHECKED = "0.31 to 0.33"

PUNICA_WRAPPER = Patch(
    name="punica-wrapper",
    target="vllm.lora.model_manager:get_punica_wrapper",
    why="The wrapper class is the platform's choice; an out-of-tree wrapper has no way in. "
    "Returns ours when the plugin is active and has kernels for the platform.",
    checked=CHECKED,
    until="vLLM selects punica wrappers through a registry.",
    replace=worker.punica,
)

PATCHES: tuple[Patch, ...] = (
    Patch(
        name="flags",
        target="vllm.engine.arg_utils:EngineArgs.add_cli_args",
        why="vLLM has no hook for a plugin's own flags on `vllm serve`; adds the --multilora ones.",
        checked=CHECKED,
        until="vLLM lets plugins add arguments.",
        replace=server.flags,
    ),
    Patch(
        name="flag-values",
        target="vllm.engine.arg_utils:EngineArgs.from_cli_args",
        why="Unknown flags are dropped there; moves ours into additional_config, which reaches "
        "every process.",
        checked=CHECKED,
        until="vLLM lets plugins add arguments.",
        replace=server.from_cli_args,
    ),
    Patch(
        name="settings-check",
        target="vllm.engine.arg_utils:EngineArgs.create_engine_config",
        why="additional_config is not validated by vLLM; a wrong setting must be one clear "
        "sentence at start-up, for `vllm serve` and `LLM(...)` alike.",
        checked=CHECKED,
        until="vLLM lets plugins validate their part of additional_config.",
        replace=server.engine_config,
    ),
    PUNICA_WRAPPER,
    Patch(
        name="worker-manager",
        target="vllm.v1.worker.lora_model_runner_mixin:LRUCacheWorkerLoRAManager",
        why="The manager class is imported by name and not configurable. Ours keeps adapters in "
        "the three-tier cache and tells the kernels the true rank of every module and slot.",
        checked=CHECKED,
        until="vLLM makes the LoRA manager class configurable.",
        replace=worker.worker_manager,
    ),
    Patch(
        name="batch-mapping",
        target="vllm.v1.worker.lora_model_runner_mixin:LoRAModelRunnerMixin.set_active_loras",
        why="vLLM spells the batch's adapters out in tuples with one entry per token and walks "
        "them several times a step. Hands arrays per request to our manager instead.",
        checked=CHECKED,
        until="vLLM's LoRAMapping holds arrays.",
        replace=worker.set_active_loras,
    ),
    Patch(
        name="prompt-logprobs",
        target="vllm.v1.worker.gpu_model_runner:GPUModelRunner._get_prompt_logprobs_dict",
        why="vLLM sends a prompt's rows through the output layer with the mapping of the sampled "
        "rows: on CPUs the engine dies of it, elsewhere lm_head adapters meet the wrong rows. "
        "Tells our wrapper that the rows are tokens of the step.",
        checked=CHECKED,
        until="vLLM sets the LoRA mapping for prompt_logprobs.",
        replace=worker.prompt_logprobs,
    ),
    Patch(
        name="batch-inputs",
        target="vllm.v1.worker.gpu.lora_utils:LoraState.make_lora_inputs",
        why="As batch-mapping, for vLLM's second model runner.",
        checked=CHECKED,
        until="As batch-mapping.",
        replace=worker.lora_inputs,
    ),
    Patch(
        name="batch-inputs-taken",
        target="vllm.v1.worker.lora_model_runner_mixin:LoRAModelRunnerMixin._set_active_loras",
        why="Takes what batch-inputs makes; spells it out for stock managers.",
        checked=CHECKED,
        until="As batch-mapping.",
        replace=worker.set_active_loras_from_inputs,
    ),
    Patch(
        name="prompt-logprobs-2",
        target="vllm.v1.worker.gpu.sample.prompt_logprob:"
        "PromptLogprobsWorker.compute_prompt_logprobs",
        why="As prompt-logprobs, for vLLM's second model runner.",
        checked=CHECKED,
        until="As prompt-logprobs.",
        replace=worker.prompt_scores,
    ),
    Patch(
        name="prompt-scores-2",
        target="vllm.v1.worker.gpu.sample.prompt_logprob:"
        "PromptLogprobsWorker.compute_prompt_token_id_logprobs",
        why="As prompt-logprobs, for the scores of given tokens.",
        checked=CHECKED,
        until="As prompt-logprobs.",
        replace=worker.prompt_scores,
    ),
    Patch(
        name="sampled-rows",
        target="vllm.v1.worker.gpu.model_runner:GPUModelRunner.sample",
        why="vLLM's second model runner maps one row a request to the output layer, though "
        "speculative decoding samples several. Tells our wrapper how many.",
        checked=CHECKED,
        until="vLLM's LoRA mapping covers all sampled rows.",
        replace=worker.sample,
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
        replace=engine.scheduler_class,
    ),
    Patch(
        name="pin",
        target="vllm.v1.engine.core:EngineCore.pin_lora",
        why="Tells the scheduler of the pin.",
        checked=CHECKED,
        until="As scheduler-class.",
        replace=engine.pin,
    ),
    Patch(
        name="remove-lora",
        target="vllm.v1.engine.core:EngineCore.remove_lora",
        why="vLLM takes an adapter away from requests that use it, which then read it again. "
        "Waits until they have ended, for a limited time.",
        checked=CHECKED,
        until="vLLM's remove_lora waits for running requests.",
        replace=engine.remove,
    ),
    Patch(
        name="load-route",
        target="vllm.entrypoints.openai.models.serving:OpenAIServingModels.load_lora_adapter",
        why="vLLM answers a bad adapter with HTTP 500 and a reload with a mixture of old and new "
        "weights. Answers with the right status and all problems, and gives every version a "
        "number of its own.",
        checked=CHECKED,
        until="vLLM validates adapters at registration and versions reloads.",
        replace=server.load_route,
    ),
    Patch(
        name="unload-route",
        target="vllm.entrypoints.openai.models.serving:OpenAIServingModels.unload_lora_adapter",
        why="vLLM forgets the name and keeps slot and memory. Frees them.",
        checked=CHECKED,
        until="vLLM's unload removes the adapter from the workers.",
        replace=server.unload_route,
    ),
    Patch(
        name="server-start",
        target="vllm.entrypoints.openai.models.serving:OpenAIServingModels.init_static_loras",
        why="vLLM has no hook in an API server that is about to serve; looks at the adapter "
        "directories and reads the routes there.",
        checked=CHECKED,
        until="vLLM calls plugins when an API server starts.",
        replace=server.server_start,
    ),
    Patch(
        name="model-names",
        target="vllm.entrypoints.serve.engine.serving:BaseServing._check_model",
        why="vLLM's resolvers are asked for names that it does not know, but only where clients "
        "may load adapters too, and their failures lose status and reason. Finds adapters of "
        "the adapter directories, and answers as a registration would; before that, puts an "
        "adapter's name in the place of a route's.",
        checked=CHECKED,
        until="vLLM's resolvers work without VLLM_ALLOW_RUNTIME_LORA_UPDATING and may refuse.",
        replace=server.model_names,
    ),
    Patch(
        name="model-names-pooling",
        target="vllm.entrypoints.pooling.base.serving:PoolingBaseServing._check_model",
        why="As model-names, for embeddings, scores and the like.",
        checked=CHECKED,
        until="As model-names.",
        replace=server.pooling_names,
    ),
    Patch(
        name="models-list",
        target="vllm.entrypoints.openai.models.serving:OpenAIServingModels.show_available_models",
        why="Lists the routes beside the adapters.",
        checked=CHECKED,
        until="vLLM has model aliases that lead to adapters.",
        replace=server.models_list,
    ),
    Patch(
        name="registration-names",
        target="vllm.entrypoints.openai.models.serving:"
        "OpenAIServingModels._check_load_lora_adapter_request",
        why="Refuses to register an adapter under a route's name, where it could not be reached.",
        checked=CHECKED,
        until="As models-list.",
        replace=server.registration_names,
    ),
    Patch(
        name="middleware",
        target="vllm.entrypoints.launchers.app:init_entrypoints_middleware",
        why="vLLM looks model names up without HTTP at hand. Brings the request's headers to the "
        "routes, and the adapter that they chose into the answer's headers; only where there "
        "are routes.",
        checked=CHECKED,
        until="As models-list.",
        replace=server.middleware,
    ),
    Patch(
        name="lora-ids",
        target="vllm.v1.worker.gpu.lora_utils:LoraState.__init__",
        why="vLLM's second model runner keeps adapters' numbers in 32 bits; those of adapter "
        "directories, which servers find without asking each other, need more.",
        checked=CHECKED,
        until="vLLM keeps them in 64 bits, as its first model runner does.",
        replace=worker.lora_ids,
    ),
    Patch(
        name="status-route",
        target="vllm.entrypoints.serve.lora.api_router:attach_router",
        why="vLLM loads a plugin's routes only where VLLM_PLUGINS names the plugin, which shuts "
        "all others out. Adds GET /v1/lora_adapters.",
        checked=CHECKED,
        until="vLLM loads the routes of every plugin, or tells of its adapters itself.",
        replace=server.status_route,
    ),
    Patch(
        name="adapter-status",
        target="vllm.v1.engine.core:EngineCore.collective_rpc",
        why="An API server can send workers nothing but the names of their own methods. Answers "
        "one more name, for status-route, with what the workers tell of their adapters.",
        checked=CHECKED,
        until="As status-route.",
        replace=engine.collective_rpc,
    ),
    Patch(
        name="prefix-cache-keys",
        target="vllm.v1.core.kv_cache_utils:_gen_lora_extra_hash_keys",
        why="Cached prefixes are found by an adapter's name and path, so that new weights at the "
        "same path get blocks of the old ones. Adds the adapter's number, which a reload changes.",
        checked=CHECKED,
        until="vLLM's keys tell versions of an adapter apart.",
        replace=engine.hash_keys,
    ),
    Patch(
        name="executor",
        target="vllm.v1.executor.abstract:Executor.__init__",
        why="Opens the log through which workers tell which adapters they have ready, before they "
        "start.",
        checked=CHECKED,
        until="As scheduler-class.",
        replace=engine.executor,
    ),
    Patch(
        name="add-request",
        target="vllm.v1.engine.core:EngineCore.add_request",
        why="Gives the scheduler its view of that log, before its first request.",
        checked=CHECKED,
        until="As scheduler-class.",
        replace=engine.add_request,
    ),
    Patch(
        name="add-lora",
        target="vllm.v1.engine.core:EngineCore.add_lora",
        why="Registering an adapter reads it in the workers while no step runs. Reads it in the "
        "background and answers when that is done.",
        checked=CHECKED,
        until="vLLM loads adapters in the background.",
        replace=engine.add_lora,
    ),
    Patch(
        name="client-requests",
        target="vllm.v1.engine.core:EngineCoreProc._handle_client_request",
        why="An idle engine core waits for clients only; has it look at the log when it is woken "
        "for a registration.",
        checked=CHECKED,
        until="As add-lora.",
        replace=engine.client_request,
    ),
    Patch(
        name="failed-requests",
        target="vllm.v1.engine.output_processor:OutputProcessor.process_outputs",
        why="vLLM answers a request that fails in the engine with HTTP 500 and no reason. Puts "
        "the status and the reason of a failed load in their place.",
        checked=CHECKED,
        until="vLLM carries a status and a reason with a failed request.",
        replace=server.outputs,
    ),
    Patch(
        name="stat-loggers",
        target="vllm.v1.metrics.loggers:StatLoggerManager.__init__",
        why="vLLM has one LoRA metric. Has the process that shows an engine's metrics show ours "
        "too, in LLM.get_metrics() and, with one API server, on /metrics.",
        checked=CHECKED,
        until="vLLM counts loads, evictions and requests by adapter.",
        replace=server.stat_loggers,
    ),
    Patch(
        name="metrics-of-several-servers",
        target="prometheus_client.multiprocess:MultiProcessCollector.collect",
        why="With several API servers, /metrics shows what this collector finds in vLLM's folder, "
        "in a registry made anew for each answer. Has it find ours too.",
        checked=CHECKED,
        until="As stat-loggers.",
        replace=server.multiprocess,
    ),
    Patch(
        name="wake-up",
        target="vllm.v1.worker.gpu_worker:Worker.wake_up",
        why="Sleep mode may discard the slots' memory, and vLLM then answers from slots that hold "
        "nothing. Has the adapters copied into their slots again.",
        checked=CHECKED,
        until="vLLM restores adapter slots after a sleep.",
        replace=worker.wake_up,
    ),
)


def apply_patches() -> None:
    """Puts every patch in place, now or as soon as its target is imported; safe to call again."""
    for patch in PATCHES:
        patch.apply_on_import()
