"""What LoRA serving replaces in vLLM: the core's part of the seam table."""

from __future__ import annotations

from vllm_multilora.integration.patching.parts import CORE
from vllm_multilora.integration.patching.patch import Patch
from vllm_multilora.integration.patching.seams import Seams
from vllm_multilora.integration.patching.tables.attributes import CORE_ATTRIBUTES
from vllm_multilora.integration.patching.tables.overrides import OVERRIDES

_PATCHES: tuple[Patch, ...] = (
    Patch(
        name="flags",
        target="vllm.engine.arg_utils:EngineArgs.add_cli_args",
        takes=("parser",),
        handler="settings.flags:add_cli_args",
        why="vLLM has no hook for a plugin's own flags on `vllm serve`; adds the --multilora ones.",
        checked=("0.29", "0.29/2", "0.30", "0.31", "0.31/2", "0.32", "0.32/2", "0.33", "0.33/2"),
        until="vLLM lets plugins add arguments.",
    ),
    Patch(
        name="flag-values",
        target="vllm.engine.arg_utils:EngineArgs.from_cli_args",
        takes=("cls, args",),
        handler="flag_values:from_cli_args",
        why="Unknown flags are dropped there; moves ours into additional_config, which reaches "
        "every process.",
        checked=("0.29", "0.29/2", "0.30", "0.31", "0.31/2", "0.32", "0.32/2", "0.33", "0.33/2"),
        until="vLLM lets plugins add arguments.",
    ),
    Patch(
        name="settings-check",
        target="vllm.engine.arg_utils:EngineArgs.create_engine_config",
        takes=("self, usage_context=None, headless=False",),
        handler="engine_config:create_engine_config",
        why="additional_config is not validated by vLLM; a wrong setting must be one clear "
        "sentence at start-up, for `vllm serve` and `LLM(...)` alike.",
        checked=("0.29", "0.29/2", "0.30", "0.31", "0.31/2", "0.32", "0.32/2", "0.33", "0.33/2"),
        until="vLLM lets plugins validate their part of additional_config.",
    ),
    Patch(
        name="worker-manager",
        target="vllm.v1.worker.lora_model_runner_mixin:LRUCacheWorkerLoRAManager",
        takes=("self, vllm_config, device, embedding_modules, lora_model_cls=LoRAModel",),
        handler="worker.manager:make_worker_manager",
        why="The manager class is imported by name and not configurable. Ours fills slots as the "
        "engine core orders and tells the kernels the true rank of every module and slot.",
        checked=("0.29", "0.29/2", "0.30", "0.31", "0.31/2", "0.32", "0.32/2", "0.33", "0.33/2"),
        until="vLLM makes the LoRA manager class configurable.",
    ),
    Patch(
        name="batch-mapping",
        target="vllm.v1.worker.lora_model_runner_mixin:LoRAModelRunnerMixin.set_active_loras",
        takes=(
            "self, input_batch, num_scheduled_tokens, num_sampled_tokens=None, "
            "mapping_type=LoRAMappingType.LANGUAGE",
        ),
        handler="worker.manager:set_active_loras",
        why="vLLM spells the batch's adapters out in tuples with one entry per token and walks "
        "them several times a step. Hands arrays per request to our manager instead. On CPUs the "
        "engine dies of a request with a seed whose prompt takes several steps, as generators of "
        "random numbers cannot be turned back there. Has them draw nothing before the prompt's "
        "end.",
        checked=("0.29", "0.30", "0.31", "0.32", "0.33"),
        until="vLLM's LoRAMapping holds arrays, and seeds work with divided prompts on CPUs.",
    ),
    Patch(
        name="batch-mapping-2",
        target="vllm.v1.worker.gpu.model_runner:LoraState",
        takes=("self, max_num_reqs",),
        handler="worker.rows.batch_lora_state:make_lora_state",
        why="vLLM's second model runner spells a step's adapters out by token, takes two versions "
        "of an adapter for one, so that the engine dies after a reload, and has 32 bits for "
        "numbers. Ours maps requests, as batch-mapping does.",
        checked=("0.29/2", "0.31/2", "0.32/2", "0.33/2"),
        until="As batch-mapping, and it tells adapters apart by number.",
    ),
    Patch(
        name="rows-to-embed",
        target="vllm.v1.worker.gpu_model_runner:GPUModelRunner._preprocess",
        takes=("self, scheduler_output, num_input_tokens, intermediate_tensors=None",),
        handler="worker.sampling:preprocess",
        why="Of a step with prompts that are embeddings already (--enable-prompt-embeds), vLLM's "
        "first model runner has the embedding look up the tokens alone, with the mapping of all "
        "rows: adapters of it act on other requests. Tells our wrapper which rows these are.",
        checked=("0.29", "0.30", "0.31", "0.32", "0.33"),
        until="vLLM sets the LoRA mapping for such steps.",
    ),
    Patch(
        name="sampled-rows",
        target="vllm.v1.worker.gpu.model_runner:GPUModelRunner.sample",
        takes=("self, hidden_states, input_batch, grammar_output",),
        handler="worker.sampling:sample",
        why="vLLM's second model runner maps one row a request to the output layer, though "
        "speculative decoding samples several, and takes the counts of their NaN for those of "
        "requests. Tells our wrapper how many, and adds the counts up.",
        checked=("0.29/2", "0.31/2", "0.32/2", "0.33/2"),
        until="vLLM's LoRA mapping covers all sampled rows, and its counts go by request.",
    ),
    Patch(
        name="limits-of-drafts",
        target="vllm.v1.sample.rejection_sampler:apply_sampling_constraints",
        takes=("logits, cu_num_draft_tokens, sampling_metadata",),
        handler="worker.sampling:apply_sampling_constraints",
        why="With speculative decoding on CPUs, the engine dies of a request with `top_k`; other "
        "drafts are judged by any temperature and `top_p` but the request's. Answers them all.",
        checked=("0.29", "0.31", "0.33"),
        until="vLLM's RejectionSampler knows on CPUs what requests ask for.",
    ),
    Patch(
        name="unsound-rows",
        target="vllm.v1.worker.gpu_model_runner:GPUModelRunner._bookkeeping_sync",
        takes=(
            "self, scheduler_output, sampler_output, logits, hidden_states, num_scheduled_tokens",
        ),
        handler="worker.sampling:bookkeeping_sync",
        why="As sampled-rows, for the counts of vLLM's first model runner: with drafted tokens, "
        "one customer's NaN would be another's. It counts in logits that have been sampled from: a "
        "request's penalties make NaN of sound ones of float32, and would have its adapter "
        "quarantined. Hands it each row's maximum before, NaN if any of the row is: counting among "
        "the whole vocabulary takes far longer on CPUs.",
        checked=("0.29", "0.30", "0.31", "0.32", "0.33"),
        until="As sampled-rows, and vLLM's first model runner counts before it samples.",
    ),
    Patch(
        name="executor-class",
        target="vllm.v1.executor.abstract:Executor.get_class",
        takes=("vllm_config",),
        handler="engine.executor:get_class",
        why="Has adapters read and slots filled in the background, as the engine core decides; "
        "the class that it returns chooses the scheduler's. To name it in "
        "`distributed_executor_backend` would change what vLLM does where it compares that with "
        "`mp` and `external_launcher`, at a dozen places.",
        checked=("0.29", "0.29/2", "0.30", "0.31", "0.31/2", "0.32/2", "0.33", "0.33/2"),
        until="vLLM asks for no name where a class was given.",
    ),
    Patch(
        name="engine-core",
        target="vllm.v1.engine.core:EngineCoreProc.process_input_sockets",
        takes=("self, input_addresses, coord_input_address, identity, ready_event",),
        handler="engine.executor:process_input_sockets",
        why="An executor cannot wake the engine core that waits for requests, though an adapter "
        "has been read meanwhile. Hands it the engine core's queue.",
        checked=("0.29", "0.29/2", "0.30", "0.31", "0.31/2", "0.32/2", "0.33", "0.33/2"),
        until="vLLM's executors can wake their engine core.",
    ),
    Patch(
        name="equal-loads",
        target="vllm.entrypoints.openai.models.serving:OpenAIServingModels.load_lora_adapter",
        takes=("self, request, base_model_name=None",),
        handler="api_server.equal_loads:load_lora_adapter",
        why="Of several loads of one adapter at once, vLLM refuses all but the first. Ray Serve "
        "makes one for each request that comes before the first has ended, and would answer 500 to "
        "the others. Answers them with the first one's success.",
        checked=("0.29", "0.29/2", "0.30", "0.31", "0.31/2", "0.32/2", "0.33", "0.33/2"),
        until="vLLM answers a load that has waited for an equal one with success.",
    ),
    Patch(
        name="prefix-cache-keys",
        target="vllm.v1.core.kv_cache_utils:generate_block_hash_extra_keys",
        takes=("request, start_token_idx, end_token_idx, start_mm_idx",),
        handler="engine.requests.prefix_keys:block_hash_keys",
        why="Cached prefixes are found by an adapter's name and path, so that new weights at the "
        "same path get blocks of the old ones, and equal weights elsewhere get none. Has the "
        "digest of the weights in their place, and leaves blocks that an activated adapter does "
        "not act on to the base model, which has computed them.",
        checked=("0.29", "0.29/2", "0.30", "0.31", "0.31/2", "0.32", "0.32/2", "0.33", "0.33/2"),
        until="vLLM's keys go by what adapters contain, and it serves activated LoRA.",
    ),
    Patch(
        name="empty-blocks",
        target="vllm.v1.kv_cache_interface:KVCacheConfig.needs_kv_cache_zeroing",
        takes=("self",),
        handler="kv_blocks:needs_kv_cache_zeroing",
        why="What one tenant's adapter leaves in a block of the KV cache, NaN for instance, is "
        "multiplied by zero for the next one who has the block, and is NaN there. Has blocks "
        "emptied before they are used again, as vLLM does for models with states.",
        checked=("0.29", "0.29/2", "0.30", "0.31", "0.31/2", "0.32", "0.32/2", "0.33", "0.33/2"),
        until="vLLM's attention reads nothing beyond a request's own tokens.",
    ),
    Patch(
        name="attention-without-amx",
        target="vllm.v1.attention.backends.cpu_attn:_get_attn_isa",
        takes=("dtype, block_size, head_size=None, kv_cache_dtype=None",),
        handler="worker.base_layers.base_products:attention_isa",
        why="With AMX, vLLM's attention on CPUs lets NaN of one request into the answers of others "
        "in its step. Takes the kernels that do not.",
        checked=("0.29", "0.29/2", "0.30", "0.31", "0.31/2", "0.32", "0.32/2", "0.33", "0.33/2"),
        until="vLLM's attention with AMX reads nothing beyond a request's own tokens.",
    ),
    Patch(
        name="base-products",
        target="vllm.model_executor.layers.utils:dispatch_cpu_unquantized_gemm",
        takes=("layer, remove_weight",),
        handler="worker.base_layers.base_products:dispatch_gemm",
        why="With AMX, oneDNN reads the next row's numbers where a row does not fill its last "
        "tile, and makes NaN of them: fills it. Without AMX, oneDNN reads weights and multiplies "
        "in turn where rows are few: multiplies these by C kernels that do both at once. "
        "Either way weights are repacked and nothing else is kept: keeps the lengths of their rows "
        "before, which DoRA adapters need.",
        checked=("0.29", "0.29/2", "0.30", "0.31", "0.31/2", "0.32/2", "0.33", "0.33/2"),
        until="oneDNN reads no more than a row has, and multiplies few rows while it reads.",
    ),
    Patch(
        name="failed-requests",
        target="vllm.v1.engine.output_processor:OutputProcessor.process_outputs",
        takes=(
            "self, engine_core_outputs, engine_core_timestamp=None, iteration_stats=None",
            "self, engine_core_outputs, engine_core_timestamp=None, iteration_stats=None, "
            "weight_version=None",
        ),
        handler="api_server.failure_delivery:process_outputs",
        why="vLLM answers a request that fails in the engine with HTTP 500 and no reason. Puts "
        "the status and the reason of a failed load in their place, and notes which version of "
        "its adapter each request runs on.",
        checked=("0.29", "0.29/2", "0.30", "0.31", "0.31/2", "0.32", "0.32/2", "0.33", "0.33/2"),
        until="vLLM carries a status and a reason with a failed request.",
    ),
)

CORE_SEAMS = Seams(CORE, _PATCHES, OVERRIDES, CORE_ATTRIBUTES)
