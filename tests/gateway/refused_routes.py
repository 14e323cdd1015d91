"""Paths of vLLM 0.29 to 0.33 that tenants may not call, so that a new one is noticed.

The gateway does not read this: a path that is not in its own table is refused.
"""

_PATHS = (
    # Computes, but is not for tenants; see above.
    "/generative_scoring /inference/v1/generate /inference/v1/abort_requests /v1/realtime",
    "/v1/systemone /v1/decisions /v1/chat/completions/render /v1/completions/render",
    "/v1/responses/render /v1/messages/render /cohere/v2/chat/render",
    "/v1/chat/completions/derender /v1/completions/derender",
    # Reads and cancels stored responses, which anybody's are.
    "/v1/responses/{response_id} /v1/responses/{response_id}/cancel",
    # Says what the server is and does.
    "/openapi.json /docs /docs/oauth2-redirect /redoc /static /load /version /metrics /server_info",
    "/kv_event_sources /tokenizer_info /get_world_size /ready /readyz /weight_info",
    # Changes what the server does.
    "/reset_prefix_cache /reset_mm_cache /reset_encoder_cache /release_kv_cache_memory",
    "/collective_rpc /sleep /wake_up /is_sleeping /pause /resume /is_paused /abort_requests",
    "/init_weight_transfer_engine /shutdown_weight_transfer_engine /start_weight_update",
    "/start_draft_weight_update /update_weights /finish_weight_update /update_weight_version",
    "/weight_checker /scale_elastic_ep /is_scaling_elastic_ep /start_profile /stop_profile",
    "/fault_tolerance/apply /fault_tolerance/status",
)

REFUSED_ROUTES = frozenset(path for paths in _PATHS for path in paths.split())
