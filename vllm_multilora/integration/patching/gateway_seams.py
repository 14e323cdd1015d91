"""What HTTP, names, keys, tenants, media, grammars and metering replace in vLLM.

This is the gateway's part of the seam table; mends of vLLM that serve no adapter are in it, too.
"""

from __future__ import annotations

from functools import partial

from vllm_multilora.integration.patching import patch
from vllm_multilora.integration.patching.attributes import GATEWAY_ATTRIBUTES
from vllm_multilora.integration.patching.parts import GATEWAY
from vllm_multilora.integration.patching.seams import Seams

Patch = partial(patch.Patch, part=GATEWAY)

_PATCHES: tuple[patch.Patch, ...] = (
    Patch(
        name="grammar-time",
        target="vllm.v1.structured_output:StructuredOutputManager._fill_bitmasks",
        takes=("self, batch",),
        handler="engine.grammars:fill_bitmasks",
        why="Nothing bounds how long the grammar of a structured output takes for a token, and no "
        "step is taken meanwhile: one of sixty characters takes seconds for each. Notes it, so "
        "that the requests of tenants end whose grammars take too long. And where a grammar allows "
        "no token, vLLM chooses one all the same, logs two errors and fails the request with 500. "
        "Notes that, too: requests end with 400 then.",
        until="vLLM bounds what grammars take, and says that one allows no token.",
    ),
    Patch(
        name="grammar-time-of-answers",
        target="vllm.v1.structured_output:StructuredOutputManager.accept_tokens",
        takes=("self, request, new_token_ids",),
        handler="engine.grammars:accept_tokens",
        why="Nor does anything bound how long a grammar takes to go on by a token of the answer: "
        "one of forty characters takes milliseconds to say what it allows next, and seconds for "
        "this. Notes it, too.",
        until="vLLM bounds what grammars take.",
    ),
    Patch(
        name="load-route",
        target="vllm.entrypoints.openai.models.serving:OpenAIServingModels.load_lora_adapter",
        takes=("self, request, base_model_name=None",),
        handler="server.registration:load_lora_adapter",
        why="vLLM answers a bad adapter with HTTP 500 and a reload with a mixture of old and new "
        "weights. Answers with the right status and all problems, and gives every version a "
        "number of its own.",
        until="vLLM validates adapters at registration and versions reloads.",
    ),
    Patch(
        name="unload-route",
        target="vllm.entrypoints.openai.models.serving:OpenAIServingModels.unload_lora_adapter",
        takes=("self, request",),
        handler="server.registration:unload_lora_adapter",
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
        handler="server.model_names:check_model",
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
        handler="server.model_names:check_pooling_model",
        why="As model-names, for embeddings, scores and the like.",
        until="As model-names.",
    ),
    Patch(
        name="realtime-model",
        target="vllm.entrypoints.speech_to_text.realtime.connection:RealtimeConnection._check_model",
        takes=("self, model",),
        handler="server.model_names:check_realtime_model",
        why="vLLM's WebSocket has the base model answer, and tells a session that names an adapter "
        "that there is none. One that has named the base model before goes on with it. Says what "
        "the WebSocket serves, and has nothing answer until that is named.",
        until="vLLM's WebSocket takes adapters.",
    ),
    Patch(
        name="default-adapters",
        target="vllm.entrypoints.serve.engine.serving:BaseServing._get_active_default_mm_loras",
        takes=("self, request",),
        handler="server.multimodal:active_default_adapter",
        why="vLLM applies an adapter that is named like a part of a chat message, `text` or "
        "`image`, to base-model requests that have such a part, whoever has registered it. Does "
        "so for the operator's `default_mm_loras` alone.",
        until="vLLM looks default adapters up in its configuration.",
    ),
    Patch(
        name="length-of-texts",
        target="vllm.renderers.params:TokenizeParams._text_len_check",
        takes=("self, tokenizer, text",),
        handler="server.request_bounds:check_length",
        why="Texts of any length are made into tokens where nothing limits these, or only the "
        "first are kept: sixty megabytes take half a minute, in which nobody is answered, and more "
        "than nine gigabytes of memory. Bounds a tenant's texts.",
        until="vLLM bounds texts that are truncated, or only made into tokens.",
    ),
    Patch(
        name="ids-of-images",
        target="vllm.renderers.base:BaseRenderer._process_tokens_async",
        takes=("self, prompt, *, skip_mm_cache=False",),
        handler="server.multimodal:process_tokens",
        why="A client may give an image a `uuid`, and later the `uuid` alone: vLLM then takes the "
        "image that anybody has sent with it, and even before one that is sent. It takes the "
        "engine to have all images that requests have come with, those that are refused after "
        "they have been read included: the next one who sends the same image gets an error. Has "
        "each tenant's images kept apart.",
        until="vLLM keeps the images of clients with different cache salts apart.",
    ),
    Patch(
        name="ids-of-images-pooling",
        target="vllm.renderers.base:BaseRenderer._process_tokens",
        takes=("self, prompt, *, skip_mm_cache=False",),
        handler="server.multimodal:process_tokens",
        why="As ids-of-images, for embeddings, classes, scores and other pooled answers.",
        until="As ids-of-images.",
    ),
    Patch(
        name="caller-pooling",
        target="vllm.entrypoints.pooling.base.io_processor:PoolingIOProcessor.__init__",
        takes=("self, vllm_config, renderer, chat_template_config",),
        handler="server.multimodal:init_pooling",
        why="vLLM fetches what pooling chats point to where downloads-pooling has it fetch nothing "
        "for tenants. Reads theirs as those that generate.",
        until="As downloads-pooling.",
    ),
    Patch(
        name="downloads",
        target="vllm.connections:HTTPConnection.async_get_bytes",
        takes=(
            "self, url, *, timeout=None, allow_redirects=True, max_bytes=None",
            "self, url, *, timeout=None, allow_redirects=True, max_bytes=None, request_budget=None",
        ),
        handler="server.multimodal:download",
        why="vLLM has a hundred connections for all images and the like that requests point to: a "
        "request for a hundred of a host that does not answer has all others' fail. Gives each "
        "tenant a few.",
        until="vLLM shares its connections among those who send requests.",
    ),
    Patch(
        name="downloads-pooling",
        target="vllm.connections:HTTPConnection.get_bytes",
        takes=(
            "self, url, *, timeout=None, allow_redirects=True, max_bytes=None",
            "self, url, *, timeout=None, allow_redirects=True, max_bytes=None, request_budget=None",
        ),
        handler="server.multimodal:download_now",
        why="vLLM fetches what pooling requests point to on the one thread that makes prompts of "
        "everybody's texts, which waits for minutes for a host that does not answer. Fetches "
        "nothing there for tenants; caller-pooling has chats be read elsewhere.",
        until="vLLM waits for no host on its renderer's thread.",
    ),
    Patch(
        name="unpacked-images",
        target="vllm.multimodal.media.image:ImageMediaIO.load_bytes",
        takes=("self, data",),
        handler="server.multimodal:unpack",
        why="An image of a few kilobytes is unpacked to half a gigabyte, and a request may have a "
        "thousand. Bounds what a tenant's call has unpacked.",
        until="vLLM bounds it in all versions, as 0.33 does.",
    ),
    Patch(
        name="files-of-images",
        target="vllm.multimodal.media.image:BytesIO",
        takes=("self, /, *args, **kwargs",),
        handler="server.multimodal:image_file",
        why="A JPEG of a megabyte takes minutes if most of it is scans or padding, on one of few "
        "threads. Counts the time that a tenant's call has its images read.",
        until="vLLM bounds the time for an image.",
    ),
    Patch(
        name="unpacked-videos",
        target="vllm.multimodal.media.video:VideoMediaIO.load_bytes",
        takes=("self, data",),
        handler="server.multimodal:unpack",
        why="As unpacked-images, for videos.",
        until="As unpacked-images.",
    ),
    Patch(
        name="unpacked-recordings",
        target="vllm.multimodal.media.audio:AudioMediaIO.load_bytes",
        takes=("self, data",),
        handler="server.multimodal:unpack",
        why="As unpacked-images, for recordings.",
        until="As unpacked-images.",
    ),
    Patch(
        name="unpacked-files-of-recordings",
        target="vllm.multimodal.media.audio:AudioMediaIO.load_file",
        takes=("self, filepath",),
        handler="server.multimodal:unpack",
        why="As unpacked-recordings, for those that the operator has below "
        "`--allowed-local-media-path`, which are not read by it.",
        until="As unpacked-images.",
    ),
    Patch(
        name="errors-of-images",
        target="vllm.multimodal.media.connector:MediaConnector.load_from_url_async",
        takes=("self, url, media_io, *, fetch_timeout=None",),
        handler="server.released_errors:release",
        why="Where an image or the like is refused, its error holds what it was unpacked from, and "
        "is held by it, until Python looks for circles. Has it held by nothing.",
        until="vLLM keeps no error in a variable that the error holds.",
    ),
    Patch(
        name="errors-of-prompts",
        # Not where the class is defined, which differs between versions.
        target="vllm.entrypoints.scale_out.token_in_token_out.serving:"
        "AsyncMultiModalItemTracker.resolve_items",
        takes=("self",),
        handler="server.released_errors:release",
        why="As errors-of-images, of all that the prompt has: gigabytes after a few calls.",
        until="As errors-of-images.",
    ),
    Patch(
        name="errors-of-calls",
        target="vllm.entrypoints.serve.utils.api_utils:with_cancellation",
        takes=("handler_func",),
        handler="server.released_errors:with_cancellation",
        why="As errors-of-images, of all that a call has.",
        until="As errors-of-images.",
    ),
    Patch(
        name="turns-for-recordings",
        target="vllm.entrypoints.speech_to_text.base.serving:SpeechToTextBaseServing.__init__",
        takes=(
            "self, engine_client, models, *, request_logger, return_tokens_as_token_ids=False, "
            "task_type='transcribe', enable_force_include_usage=False",
        ),
        handler="server.start:init_speech",
        why="Two threads of vLLM's unpack recordings in the order in which they come, and take "
        "seconds for one: one tenant's many hold up all others'. Has tenants take turns.",
        until="vLLM shares its threads among those who send requests.",
    ),
    Patch(
        name="one-look-up",
        target="vllm.entrypoints.serve.engine.serving:BaseServing._maybe_get_adapters",
        takes=("self, request, supports_default_mm_loras=False",),
        handler="server.versions:maybe_get_adapters",
        why="vLLM looks a name up twice, and a reload may come between. Keeps a request to the "
        "version that its answer's headers name.",
        until="vLLM resolves a model name once.",
    ),
    Patch(
        name="engine-calls",
        target="vllm.v1.engine.core_client:AsyncMPClient._call_utility_async",
        takes=("self, method, *args, engine",),
        handler="server.engine_calls:call_utility",
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
        handler="server.metering:finish_request",
        why="As engine-door.",
        until="As engine-door.",
    ),
    Patch(
        name="meter-abort",
        target="vllm.v1.engine.output_processor:OutputProcessor.abort_requests",
        takes=("self, request_ids, internal",),
        handler="server.metering:abort_requests",
        why="As engine-door.",
        until="As engine-door.",
    ),
    Patch(
        name="meter-shutdown",
        target="vllm.v1.engine.async_llm:AsyncLLM.shutdown",
        takes=("self, timeout=None",),
        handler="server.metering:shutdown",
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
        handler="server.metering:beam_search",
        why="A beam search is many requests to the engine. Counts it as what its answer says.",
        until="As engine-door.",
    ),
    Patch(
        name="waiting-adapters",
        target="vllm.v1.engine.output_processor:OutputProcessor.update_scheduler_stats",
        takes=("self, scheduler_stats",),
        handler="server.metering:update_scheduler_stats",
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
        handler="server.metrics:record",
        why="vllm:lora_requests_info has a series for every set of adapters that ever had requests "
        "at once: an API server's memory, its /metrics and Prometheus' load grow for as long as it "
        "lives, and of several API servers the times are added up. Shows the newest alone, which "
        "routers read.",
        until="vLLM removes its series of what has passed.",
    ),
    Patch(
        name="request-heads",
        target="vllm.entrypoints.launchers.api_server.entry:serve_http",
        takes=(
            "app, sock, enable_ssl_refresh=False, **uvicorn_kwargs",
            "app, sock, enable_ssl_refresh=False, peer_loads=None, **uvicorn_kwargs",
        ),
        handler="server.request_heads:serve",
        why="vLLM's limits of a request's headers act with h11 alone, which uvicorn takes where it "
        "has no httptools. Anybody's endless header, or body in endless parts, holds up a server.",
        until="vLLM's limits of headers act whatever reads them.",
    ),
    Patch(
        name="error-texts",
        target="vllm.entrypoints.serve.exception_handling.error_response:sanitize_message",
        takes=("message",),
        handler="server.http_calls:sanitize_message",
        why="vLLM looks for paths in errors' texts, which may repeat what clients send, and takes "
        "the third power of their length for that: minutes for twenty kilobytes, in which nobody "
        "is answered. Shortens them before.",
        until="vLLM bounds what an error repeats.",
    ),
    Patch(
        name="validation-error-texts",
        target="vllm.entrypoints.serve.exception_handling.handlers.validation:sanitize_message",
        takes=("message",),
        handler="server.http_calls:sanitize_message",
        why="As error-texts, of bodies that are wrong.",
        until="As error-texts.",
    ),
    Patch(
        name="parameters-checks",
        target="vllm.v1.engine.async_llm:AsyncLLM.add_request",
        takes=(
            "self, request_id, prompt, params, arrival_time=None, lora_request=None, "
            "tokenization_kwargs=None, trace_headers=None, priority=0, data_parallel_rank=None, "
            "session_id=None, prompt_text=None, reasoning_ended=None, "
            "reasoning_parser_kwargs=None, kv_hints=None",
        ),
        handler="server.schema_checks:add_request",
        why="vLLM tokenizes bad_words, and checks structured outputs, on the event loop: nobody is "
        "answered for 40 s where a request has ten megabytes of the first, and for seconds for "
        "some schemas of a line. Refuses what is that long of a tenant's, and has its schemas "
        "checked on a thread, one by one, before vLLM looks at the request.",
        until="vLLM bounds both, and does neither on the event loop.",
    ),
    Patch(
        name="engine-door",
        target="vllm.v1.engine.output_processor:OutputProcessor.add_request",
        takes=("self, request, prompt, parent_req=None, request_index=0, queue=None",),
        handler="server.engine_door:add_request",
        why="All requests come by here on their way to the engine, in their client's context. "
        "Says whose each is, gives it its tenant's salt, refuses what no check of the model's name "
        "has granted, and follows each prompt to its end: vLLM counts tokens of whole servers.",
        until="vLLM's requests carry who sent them, and it counts tokens by adapter.",
    ),
    Patch(
        name="unsent-requests",
        target="vllm.v1.engine.async_llm:AsyncLLM._add_request",
        takes=("self, request, prompt, parent_req, index, queue",),
        handler="server.engine_door:send_request",
        why="An API server keeps a request that it cannot send to its engine for as long as it "
        "lives, prompt and all, and counts it among those that --max-num-queued-reqs bounds: any "
        "client can fill it with such. Ends it.",
        until="vLLM forgets requests that it has not sent.",
    ),
    Patch(
        name="schema-checks",
        target="vllm.sampling_params:SamplingParams._validate_structured_outputs",
        takes=("self, model_config, structured_outputs_config, tokenizer",),
        handler="server.schema_checks:check_structured_outputs",
        why="As parameters-checks. Checks no schema again that has been checked there.",
        until="As parameters-checks.",
    ),
    Patch(
        name="structural-tags",
        target="vllm.entrypoints.generate.base.protocol:validate_structural_tag_payload",
        takes=("payload, *, parameter",),
        handler="server.schema_checks:validate_structural_tag",
        why="An API server checks a structural tag, with the schemas in it, as it reads a body, on "
        "its event loop. A tenant's is checked by parameters-checks alone.",
        until="As parameters-checks.",
    ),
    Patch(
        name="stored-responses",
        target="vllm.entrypoints.openai.responses.serving:OpenAIServingResponses.__init__",
        takes=(
            "self, engine_client, models, online_renderer, *, request_logger, chat_template, "
            "chat_template_content_format, return_tokens_as_token_ids=False, reasoning_parser='', "
            "enable_auto_tools=False, tool_parser=None, tool_strict_level='auto', "
            "tool_server=None, enable_prompt_tokens_details=False, "
            "enable_force_include_usage=False, "
            "enable_per_request_metrics=False, enable_log_outputs=False, "
            "default_chat_template_kwargs=None",
            "self, engine_client, models, online_renderer, *, request_logger, chat_template, "
            "chat_template_content_format, return_tokens_as_token_ids=False, reasoning_parser='', "
            "enable_auto_tools=False, tool_parser=None, tool_strict_level=None, "
            "tool_server=None, enable_prompt_tokens_details=False, "
            "enable_force_include_usage=False, "
            "enable_per_request_metrics=False, enable_log_outputs=False, "
            "default_chat_template_kwargs=None",
        ),
        handler="server.stored_responses:init_responses",
        why="Stored responses are found by whoever has their id. Keeps each tenant's apart, and "
        "has those that are made in the background count in their tenant's limits.",
        until="As engine-door.",
    ),
    Patch(
        name="failed-response-stream",
        target="vllm.entrypoints.openai.responses.serving:"
        "OpenAIServingResponses.responses_stream_generator",
        takes=(
            "self, request, sampling_params, result_generator, context, model_name, tokenizer, "
            "request_metadata, created_time=None",
        ),
        handler="server.failed_answers:stream_response",
        why="A stream of /v1/responses breaks off where its request fails, and one in the "
        "background never ends. Ends it with `response.failed` and the reason.",
        until="vLLM sends `response.failed`, with a reason.",
    ),
    Patch(
        name="failed-background-stream",
        target="vllm.entrypoints.openai.responses.serving:"
        "OpenAIServingResponses.responses_background_stream_generator",
        takes=("self, response_id, starting_after=None",),
        handler="server.failed_answers:stream_from_background",
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
        handler="server.metrics:init_stat_loggers",
        why="vLLM has one LoRA metric. Has the process that shows an engine's metrics show ours "
        "too, in LLM.get_metrics() and, with one API server, on /metrics.",
        until="vLLM counts loads, evictions and requests by adapter.",
    ),
    Patch(
        name="loggers",
        target="logging.config:DictConfigurator.configure",
        takes=("self",),
        handler="logs:configure_loggers",
        why="A file in VLLM_LOGGING_CONFIG_PATH or --log-config-file silences all loggers that are "
        "there and that it does not name, unless it says otherwise, as no example of vLLM's does. "
        "vLLM takes it when a process starts, and API servers have uvicorn take it again. Has ours "
        "go on.",
        until="vLLM sets disable_existing_loggers where a file leaves it out.",
    ),
)

GATEWAY_SEAMS = Seams(GATEWAY, _PATCHES, attributes=GATEWAY_ATTRIBUTES)
