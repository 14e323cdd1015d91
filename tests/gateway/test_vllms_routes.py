"""Every route and every field of vLLM's that the table must have an opinion about."""

import ast
import importlib
import logging
from pathlib import Path

import pytest

pytest.importorskip("vllm")

import vllm
from pydantic import BaseModel

from tests.serving.engine import SCALE_OUT
from vllm_multilora.gateway.endpoints import endpoint_of
from vllm_multilora.gateway.table import TENANT_ROUTES
from vllm_multilora.tenants.rules import Endpoint

from .refused_routes import REFUSED_ROUTES

pytestmark = pytest.mark.smoke

ADDS_ROUTES = {
    *("get", "post", "put", "patch", "delete", "head", "options", "websocket", "route", "mount"),
    *("api_route", "add_api_route", "add_api_websocket_route", "add_route", "websocket_route"),
}
OPEN = {Endpoint.HEALTH, Endpoint.PAGE, Endpoint.MODELS, Endpoint.STATUS}


def paths_in_source():
    """Paths in calls that add routes, whatever the model and the flags have to be for them."""
    found = set()
    for file in (Path(vllm.__file__).parent / "entrypoints").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)):
                continue
            path = node.args[0] if node.args else None
            if node.func.attr in ADDS_ROUTES and isinstance(path, ast.Constant):
                found.add(path.value)
    return {path for path in found if isinstance(path, str) and path.startswith("/")}


def paths_in_app():
    """Paths of an application with all that flags add, for a model that generates and listens."""
    from vllm.entrypoints.cli.serve import make_arg_parser
    from vllm.entrypoints.launchers.app import build_app
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    args = make_arg_parser(FlexibleArgumentParser()).parse_args([*SCALE_OUT])
    level = logging.root.level
    try:
        app = build_app(args, ("generate", "transcription", "realtime"))
    finally:
        logging.root.setLevel(level)  # vLLM hides what is not an error, of everybody
    return {route.path for route in app.routes}


def is_known(path):
    """Whether the table says of a path who may call it."""
    found = {endpoint_of(method, path) for method in ("GET", "POST", "DELETE")}
    is_open = bool(found & (OPEN | {Endpoint.MANAGE}))
    return is_open or path in TENANT_ROUTES or path in REFUSED_ROUTES


def test_every_path_of_this_vllm_is_in_the_table(monkeypatch):
    monkeypatch.setenv("VLLM_SERVER_DEV_MODE", "1")
    paths = paths_in_source() | paths_in_app()
    assert len(paths) > 60
    unknown = {path.replace("{adapter_name}", "x") for path in paths}
    unknown = {path for path in unknown if not is_known(path)}
    assert not unknown, (
        "vLLM has paths that the table does not know: decide for each who may call it, and write "
        "it into TENANT_ROUTES or REFUSED_ROUTES"
    )


def test_path_that_the_table_does_not_know_is_noticed():
    assert not is_known("/v1/brand/new")
    assert endpoint_of("POST", "/v1/brand/new") is Endpoint.OTHER


REQUESTS = {
    "/v1/completions": "openai.completion.protocol:CompletionRequest",
    "/v1/chat/completions": "openai.chat_completion.protocol:ChatCompletionRequest",
    "/v1/responses": "openai.responses.protocol:ResponsesRequest",
    "/v1/messages": "anthropic.protocol:AnthropicMessagesRequest",
    "/v1/messages/count_tokens": "anthropic.protocol:AnthropicCountTokensRequest",
    "/v1/embeddings": "pooling.embed.protocol:EmbeddingCompletionRequest",
    "/v2/embed": "pooling.embed.protocol:CohereEmbedRequest",
    "/score": "pooling.scoring.protocol:ScoreTextRequest",
    "/rerank": "pooling.scoring.protocol:RerankRequest",
    "/tokenize": "serve.tokenize.protocol:TokenizeChatRequest",
    "/detokenize": "serve.tokenize.protocol:DetokenizeRequest",
}
DANGEROUS = {
    *("bad_words", "allowed_token_ids", "repetition_detection", "prompt_embeds", "vllm_xargs"),
    *("kv_transfer_params", "ec_transfer_params", "mm_payload", "return_mm_kwargs", "data"),
    *("chat_template", "mm_processor_kwargs", "media_io_kwargs", "prompt_logprobs"),
    *("use_beam_search", "previous_input_messages"),
}


@pytest.mark.parametrize("path", REQUESTS)
def test_route_takes_what_vllm_needs_and_nothing_dangerous(path):
    module, _, name = REQUESTS[path].partition(":")
    request: type[BaseModel] = getattr(importlib.import_module(f"vllm.entrypoints.{module}"), name)
    route = TENANT_ROUTES[path]
    known = route.plain | route.contents | route.documents | route.gated.keys()
    required = {key for key, field in request.model_fields.items() if field.is_required()}
    assert required <= known
    assert not known & DANGEROUS
