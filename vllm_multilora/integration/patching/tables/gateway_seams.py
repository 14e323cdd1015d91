"""What HTTP, names, keys, tenants, media, grammars and metering replace in vLLM.

This is the gateway's part of the seam table; mends of vLLM that serve no adapter are in it, too.
"""

from __future__ import annotations

from functools import partial

from vllm_multilora.integration.patching import patch
from vllm_multilora.integration.patching.parts import GATEWAY
from vllm_multilora.integration.patching.seams import Seams
from vllm_multilora.integration.patching.tables.attributes import GATEWAY_ATTRIBUTES

Patch = partial(patch.Patch, part=GATEWAY)

_PATCHES: tuple[patch.Patch, ...] = (
    Patch(
        name="load-route",
        target="vllm.entrypoints.openai.models.serving:OpenAIServingModels.load_lora_adapter",
        takes=("self, request, base_model_name=None",),
        handler="server.names.registration:load_lora_adapter",
        why="vLLM answers a bad adapter with HTTP 500 and a reload with a mixture of old and new "
        "weights. Answers with the right status and all problems, and gives every version a "
        "number of its own.",
        until="vLLM validates adapters at registration and versions reloads.",
    ),
    Patch(
        name="unload-route",
        target="vllm.entrypoints.openai.models.serving:OpenAIServingModels.unload_lora_adapter",
        takes=("self, request",),
        handler="server.names.registration:unload_lora_adapter",
        why="vLLM forgets the name and keeps slot and memory. Frees them.",
        until="vLLM's unload removes the adapter from the workers.",
    ),
    Patch(
        name="server-start",
        target="vllm.entrypoints.openai.models.serving:OpenAIServingModels.init_static_loras",
        takes=("self",),
        handler="server.start:init_static_loras",
        why="vLLM has no hook in an API server that is about to serve; looks at the adapter "
        "directories and reads the routes there, and puts locks that go when nobody holds them in "
        "the place of vLLM's, which keeps one for every name that was ever asked for.",
        until="vLLM calls plugins when an API server starts.",
    ),
    Patch(
        name="model-names",
        target="vllm.entrypoints.serve.engine.serving:BaseServing._check_model",
        takes=("self, request",),
        handler="server.names.model_names:check_model",
        why="vLLM's resolvers are asked for names that it does not know, but only where clients "
        "may load adapters too, and their failures lose status and reason. Asks them in vLLM's "
        "place, finds adapters of the adapter directories, and answers as a registration would; "
        "before that, puts an adapter's name in the place of a route's.",
        until="vLLM's resolvers work without VLLM_ALLOW_RUNTIME_LORA_UPDATING and may refuse.",
    ),
    Patch(
        name="model-names-pooling",
        target="vllm.entrypoints.pooling.base.serving:PoolingBaseServing._check_model",
        takes=("self, request",),
        handler="server.names.model_names:check_pooling_model",
        why="As model-names, for embeddings, scores and the like.",
        until="As model-names.",
    ),
    Patch(
        name="realtime-model",
        target="vllm.entrypoints.speech_to_text.realtime.connection:RealtimeConnection._check_model",
        takes=("self, model",),
        handler="server.names.model_names:check_realtime_model",
        why="vLLM's WebSocket has the base model answer, and tells a session that names an adapter "
        "that there is none. One that has named the base model before goes on with it. Says what "
        "the WebSocket serves, and has nothing answer until that is named.",
        until="vLLM's WebSocket takes adapters.",
    ),
    Patch(
        name="default-adapters",
        target="vllm.entrypoints.serve.engine.serving:BaseServing._get_active_default_mm_loras",
        takes=("self, request",),
        handler="server.names.multimodal:active_default_adapter",
        why="vLLM applies an adapter that is named like a part of a chat message, `text` or "
        "`image`, to base-model requests that have such a part, whoever has registered it. Does "
        "so for the operator's `default_mm_loras` alone.",
        until="vLLM looks default adapters up in its configuration.",
    ),
    Patch(
        name="invoked-prompts",
        target="vllm.renderers.base:BaseRenderer._process_tokens_async",
        takes=("self, prompt, *, skip_mm_cache=False",),
        handler="server.requests.invoked_prompts:process_tokens",
        why="A stream has begun, with status 200, before the engine core sees that a prompt lacks "
        "the tokens that its activated adapter acts from. Answers 400 once the prompt has tokens.",
        checked=(),
        until="vLLM lets a request be refused between its tokens and its stream.",
    ),
    Patch(
        name="one-look-up",
        target="vllm.entrypoints.serve.engine.serving:BaseServing._maybe_get_adapters",
        takes=("self, request, supports_default_mm_loras=False",),
        handler="server.requests.bound_versions:maybe_get_adapters",
        why="vLLM looks a name up twice, and a reload may come between. Keeps a request to the "
        "version that its answer's headers name.",
        until="vLLM resolves a model name once.",
    ),
    Patch(
        name="engine-calls",
        target="vllm.v1.engine.core_client:AsyncMPClient._call_utility_async",
        takes=("self, method, *args, engine",),
        handler="server.requests.engine_calls:call_utility",
        why="vLLM fails the requests of an engine that has died, but not the calls that wait for "
        "its answers: a server whose engine died during a load would never end. And it answers "
        "calls of a server that is being stopped as if its software had failed.",
        until="vLLM fails these calls too, with 503 where the server is being stopped.",
    ),
    Patch(
        name="added-offline",
        target="vllm.v1.engine.llm_engine:LLMEngine.add_lora",
        takes=("self, lora_request",),
        handler="api_server.registered_versions:add_lora_offline",
        why="As registered-version, for callers of LLM's engine, who get True from vLLM.",
        until="As registered-version.",
    ),
    Patch(
        name="meter-end",
        target="vllm.v1.engine.output_processor:OutputProcessor._finish_request",
        takes=("self, req_state",),
        handler="server.requests.metering:finish_request",
        why="As engine-door.",
        until="As engine-door.",
    ),
    Patch(
        name="meter-abort",
        target="vllm.v1.engine.output_processor:OutputProcessor.abort_requests",
        takes=("self, request_ids, internal",),
        handler="server.requests.metering:abort_requests",
        why="As engine-door.",
        until="As engine-door.",
    ),
    Patch(
        name="meter-shutdown",
        target="vllm.v1.engine.async_llm:AsyncLLM.shutdown",
        takes=("self, timeout=None",),
        handler="server.requests.metering:shutdown",
        why="Most requests that a server is stopped amidst end nowhere: their clients wait, and "
        "the server for them, until it is killed. Ends them, and counts what they have used.",
        until="vLLM ends all requests before it stops.",
    ),
    Patch(
        name="meter-beams",
        target="vllm.entrypoints.generate.beam_search.online:BeamSearchOnlineMixin.beam_search",
        takes=(
            "self, prompt, request_id, params, lora_request=None, trace_headers=None, "
            "session_id=None",
            "self, prompt, request_id, params, lora_request=None, trace_headers=None, "
            "session_id=None, priority=0",
        ),
        handler="server.requests.metering:beam_search",
        why="A beam search is many requests to the engine. Counts it as what its answer says.",
        until="As engine-door.",
    ),
    Patch(
        name="waiting-adapters",
        target="vllm.v1.engine.output_processor:OutputProcessor.update_scheduler_stats",
        takes=("self, scheduler_stats",),
        handler="server.requests.metering:update_scheduler_stats",
        why="vllm:lora_requests_info never names an adapter whose requests wait, since an API "
        "server hears of a request with its first output, and names adapters that have none. "
        "Leaves it at what the engine core has said.",
        until="vLLM's scheduler says which adapters have waiting requests.",
    ),
    Patch(
        name="newest-lists",
        target="vllm.v1.metrics.loggers:PrometheusStatLogger.record",
        takes=(
            "self, scheduler_stats, iteration_stats, mm_cache_stats=None, engine_idx=None",
            "self, scheduler_stats, iteration_stats, mm_cache_stats=None, engine_idx=0",
        ),
        handler="server.requests.metrics_route:record",
        why="vllm:lora_requests_info has a series for every set of adapters that ever had requests "
        "at once: an API server's memory, its /metrics and Prometheus' load grow for as long as it "
        "lives, and of several API servers the times are added up. Shows the newest alone, which "
        "routers read.",
        until="vLLM removes its series of what has passed.",
    ),
    Patch(
        name="error-texts",
        target="vllm.entrypoints.serve.exception_handling.error_response:sanitize_message",
        takes=("message",),
        handler="server.requests.http_calls:sanitize_message",
        why="vLLM looks for paths in errors' texts, which may repeat what clients send, and takes "
        "the third power of their length for that: minutes for twenty kilobytes, in which nobody "
        "is answered. Shortens them before.",
        until="vLLM bounds what an error repeats.",
    ),
    Patch(
        name="validation-error-texts",
        target="vllm.entrypoints.serve.exception_handling.handlers.validation:sanitize_message",
        takes=("message",),
        handler="server.requests.http_calls:sanitize_message",
        why="As error-texts, of bodies that are wrong.",
        until="As error-texts.",
    ),
    Patch(
        name="engine-door",
        target="vllm.v1.engine.output_processor:OutputProcessor.add_request",
        takes=("self, request, prompt, parent_req=None, request_index=0, queue=None",),
        handler="server.requests.engine_door:add_request",
        why="All requests come by here on their way to the engine, in their client's context. "
        "Says whose each is, gives it its tenant's salt, refuses what no check of the model's name "
        "has granted, and follows each prompt to its end: vLLM counts tokens of whole servers.",
        until="vLLM's requests carry who sent them, and it counts tokens by adapter.",
    ),
    Patch(
        name="unsent-requests",
        target="vllm.v1.engine.async_llm:AsyncLLM._add_request",
        takes=("self, request, prompt, parent_req, index, queue",),
        handler="server.requests.engine_door:send_request",
        why="An API server keeps a request that it cannot send to its engine for as long as it "
        "lives, prompt and all, and counts it among those that --max-num-queued-reqs bounds: any "
        "client can fill it with such. Ends it.",
        until="vLLM forgets requests that it has not sent.",
    ),
    Patch(
        name="failed-response-stream",
        target="vllm.entrypoints.openai.responses.serving:"
        "OpenAIServingResponses.responses_stream_generator",
        takes=(
            "self, request, sampling_params, result_generator, context, model_name, tokenizer, "
            "request_metadata, created_time=None",
        ),
        handler="server.requests.failed_answers:stream_response",
        why="A stream of /v1/responses breaks off where its request fails, and one in the "
        "background never ends. Ends it with `response.failed` and the reason.",
        until="vLLM sends `response.failed`, with a reason.",
    ),
    Patch(
        name="failed-background-stream",
        target="vllm.entrypoints.openai.responses.serving:"
        "OpenAIServingResponses.responses_background_stream_generator",
        takes=("self, response_id, starting_after=None",),
        handler="server.requests.failed_answers:stream_from_background",
        why="The events of a response in the background end when it is complete, and with nothing "
        "else. Ends them with failed-response-stream's last event, too.",
        until="As failed-response-stream.",
    ),
    Patch(
        name="stat-loggers",
        target="vllm.v1.metrics.loggers:StatLoggerManager.__init__",
        takes=(
            "self, vllm_config, engine_idxs=None, custom_stat_loggers=None, "
            "enable_default_loggers=True, aggregate_engine_logging=False, client_count=1",
        ),
        handler="server.requests.metrics_route:init_stat_loggers",
        why="vLLM has one LoRA metric. Has the process that shows an engine's metrics show ours "
        "too, in LLM.get_metrics() and, with one API server, on /metrics.",
        until="vLLM counts loads, evictions and requests by adapter.",
    ),
)

GATEWAY_SEAMS = Seams(GATEWAY, _PATCHES, attributes=GATEWAY_ATTRIBUTES)
