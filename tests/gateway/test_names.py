"""Requests carry to vLLM the name of one version of their adapter, and answers the public name."""

import asyncio
import json
from types import SimpleNamespace

import pytest

pytest.importorskip("vllm")

from starlette.requests import Request
from vllm.lora.request import LoRARequest

from vllm_multilora.gateway.answers import HttpCallMiddleware
from vllm_multilora.gateway.names.names_middleware import NamesMiddleware, VersionNames
from vllm_multilora.integration.server.names.public_names import separate
from vllm_multilora.integration.server.requests.metering import METER, ServerMeter

SAGEMAKER = "x-amzn-sagemaker-adapter-identifier"
ACME, FRENCH = LoRARequest("acme", 1, "/acme"), LoRARequest("français", 2, "/french")


class Server:
    """A server behind the gateway that keeps what it gets, and repeats the model that it is asked.

    Attributes:
        models: vLLM's table of models.
        body: The last body that has come by the gateway.
        found: The adapter that vLLM would find for it.
        header: SageMaker's header of the last request.
    """

    def __init__(self):
        METER.set(processor := SimpleNamespace(), ServerMeter(None))
        self.models = SimpleNamespace(
            engine_client=SimpleNamespace(output_processor=processor),
            base_model_paths=[SimpleNamespace(name="base")],
            is_base_model=lambda name: name == "base",
            lora_requests={lora.lora_name: lora for lora in (ACME, FRENCH)},
        )
        separate(self.models)
        self.body, self.found, self.header = None, None, None
        self._gateway = HttpCallMiddleware(NamesMiddleware(self._answer, self.models))

    async def _answer(self, scope, receive, send):
        request = Request(scope, receive)
        kind = request.headers.get("content-type", "")
        if kind.startswith("multipart"):
            self.body = dict((await request.form()).multi_items())
        else:
            self.body = await request.body()
            assert len(self.body) == int(request.headers["content-length"])
        self.header = request.headers.get(SAGEMAKER)
        model = self.body.get("model") if isinstance(self.body, dict) else self.model
        self.found = self.models.lora_requests.get(model)
        answer = json.dumps({"model": model}).encode()
        kind = scope.get("answer", "application/json").encode()
        headers = [(b"content-type", kind), (b"content-length", b"%d" % len(answer))]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": answer})

    @property
    def model(self):
        """The model in the last body."""
        try:
            content = json.loads(self.body)
        except (ValueError, RecursionError):
            return None
        return content.get("model") if isinstance(content, dict) else None

    def post(self, body, path="/v1/completions", headers=(), answer="application/json"):
        """The status and the body of the answer to a request."""
        self.body = None
        sent, parts = [], [body[:5], body[5:]]

        async def receive():
            part = parts.pop(0)
            return {"type": "http.request", "body": part, "more_body": bool(parts)}

        async def send(message):
            sent.append(message)

        given = [(b"content-length", b"%d" % len(body)), *headers]
        scope = {"type": "http", "method": "POST", "path": path, "headers": given, "answer": answer}
        asyncio.run(self._gateway(scope, receive, send))
        assert set(self.models.lora_requests) == set()  # nothing stays behind
        head, content = sent[0], sent[1]["body"]
        length = dict(head["headers"])[b"content-length"]
        assert int(length) == len(content)
        return head["status"], content


@pytest.fixture
def server():
    return Server()


@pytest.mark.parametrize("lora", [ACME, FRENCH], ids=["ascii", "not-ascii"])
@pytest.mark.parametrize("kind", ["application/json", "text/event-stream; charset=utf-8"])
def test_request_for_an_adapter_finds_it_and_its_answer_has_the_public_name(server, lora, kind):
    body = {"prompt": "é", "model": lora.lora_name, "n": [1, {"a": None}], "model_": 1}
    status, answer = server.post(json.dumps(body).encode(), answer=kind)
    assert server.found is lora
    assert {**json.loads(server.body), "model": lora.lora_name} == body
    assert status == 200
    assert json.loads(answer) == {"model": lora.lora_name}


@pytest.mark.parametrize(
    "body",
    [
        b'{"model": "base", "model": "acme"}',
        rb'{"mod\u0065l": "\u0061cme"}',
        b'{"model": "acme", "x": NaN}',
        rb'{"model": "acme", "x": "\ud800"}',
        '{"model": "acme"}'.encode("utf-16"),
        b'\xef\xbb\xbf{"model": "acme"}',
    ],
    ids=["twice", "escaped", "nan", "surrogate", "utf-16", "byte-order-mark"],
)
def test_adapter_is_found_however_the_body_is_written(server, body):
    assert server.post(body)[0] == 200
    assert server.found is ACME


@pytest.mark.parametrize(
    "body",
    [
        *(b"", b"[]", b"{", b'{"model": "acme"', b"[" * 99_999, b'{"prompt": "acme"}', b"\xff"),
        b'{"model": ' + b"9" * 5_000 + b"}",
    ],
    ids=["empty", "list", "broken", "cut-off", "deep", "no-model", "no-text", "long-number"],
)
def test_body_that_names_no_model_passes_as_it_is(server, body):
    assert server.post(body)[0] == 200
    assert server.body == body


def test_request_for_the_base_model_passes_as_it_is(server):
    body = b'{ "model":"base" , "prompt":"x" }'
    assert server.post(body) == (200, b'{"model": "base"}')
    assert server.body == body


@pytest.mark.parametrize(
    "path", ["/v1/completions", "/v1/messages", "/cohere/v2/chat", "/a/new/one"]
)
def test_request_for_an_unknown_model_is_answered_by_the_gateway(server, path):
    status, answer = server.post(b'{"model": "nobody"}', path)
    assert status == 404
    assert b"The model `nobody` does not exist." in answer
    assert server.body is None


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/messages"])
def test_unknown_model_whose_name_is_no_unicode_is_answered_too(server, path):
    assert server.post(rb'{"model": "no\ud800body"}', path)[0] == 404
    assert server.post(rb'{"lora_blend": {"no\ud800body": 1}}', path)[0] == 400


def test_name_that_the_gateway_has_given_means_nothing_to_clients(server):
    """Not even while a request has it, and to somebody who has seen it."""
    names = VersionNames(server.models.lora_requests)
    with names.hold(ACME) as name:
        sent = []

        async def receive():
            body = json.dumps({"model": name}).encode()
            return {"type": "http.request", "body": body, "more_body": False}

        async def send(message):
            sent.append(message)

        scope = {"type": "http", "method": "POST", "path": "/v1/completions", "headers": []}
        asyncio.run(HttpCallMiddleware(NamesMiddleware(None, server.models))(scope, receive, send))
        assert sent[0]["status"] == 404


def test_form_names_the_adapter_and_keeps_its_other_fields_and_files(server):
    boundary, crlf = b"----x", b"\r\n"
    fields = [
        (b'name="file"; filename="a \xc3\xa9.wav"', b"\x00\r\n--\xff" * 1000),
        (b'name="model"', b"acme"),
        (b'name="prompt"', "né\r\nà".encode()),
    ]
    parts = [
        crlf.join((b"--" + boundary, b"content-disposition: form-data; " + head, b"", value, b""))
        for head, value in fields
    ]
    body = b"".join((*parts, b"--" + boundary + b"--\r\n"))
    kind = (b"content-type", b"multipart/form-data; boundary=" + boundary)
    status, answer = server.post(body, "/v1/audio/transcriptions", [kind])
    assert (status, json.loads(answer)) == (200, {"model": "acme"})
    assert server.found is ACME
    assert server.body["prompt"] == "né\r\nà"
    assert server.body["file"].filename == "a é.wav"
    assert asyncio.run(server.body["file"].read()) == fields[0][1]


@pytest.mark.parametrize(
    ("header", "model"),
    [
        ([], ACME),
        ([""], ACME),
        ([" \t"], ACME),
        (["français"], FRENCH),
        (["", "français"], FRENCH),
        (["base"], None),
    ],
    ids=["none", "empty", "spaces", "another", "second", "base"],
)
def test_sagemakers_header_names_the_model_of_the_body_unless_it_names_one(server, header, model):
    body = b'{"model": "acme", "prompt": [7]}'
    given = [(SAGEMAKER.encode(), each.encode("latin-1")) for each in header]
    assert server.post(body, "/invocations", given)[0] == 200
    if model is None:
        assert server.header is None  # SageMaker then drops the body's model
    else:
        assert server.found is model
        assert server.header == server.model


@pytest.mark.parametrize("model", [7, ["acme"]])
def test_model_that_is_no_name_is_refused(server, model):
    """SageMaker's own code would drop it, and the base model answer."""
    for path in ("/invocations", "/v1/completions"):
        assert server.post(json.dumps({"model": model}).encode(), path)[0] == 400
        assert server.body is None


@pytest.mark.smoke
@pytest.mark.parametrize("header", [None, "", "français"], ids=["none", "empty", "another"])
def test_sagemakers_own_code_puts_the_headers_model_into_the_body(server, header):
    module = pytest.importorskip(
        "model_hosting_container_standards.sagemaker.lora.transforms.inject_to_body"
    )
    given = [] if header is None else [(SAGEMAKER.encode(), header.encode("latin-1"))]
    server.post(b'{"model": "acme", "prompt": [7]}', "/invocations", given)
    transforming = module.InjectToBodyApiTransform({"model": f'headers."{SAGEMAKER}"'})
    body, named = server.body, server.model
    headers = [(SAGEMAKER.encode(), server.header.encode())]
    scope = {"type": "http", "method": "POST", "path": "/", "query_string": b"", "headers": headers}

    async def transformed():
        async def receive():
            return {"type": "http.request", "body": body, "more_body": False}

        request = Request(scope, receive)
        await transforming.transform_request(request)
        return json.loads(await request.body())

    assert asyncio.run(transformed()) == {"model": named, "prompt": [7]}
    assert server.found is (FRENCH if header else ACME)


def test_only_what_the_client_sends_later_comes_after_a_body(server):
    """vLLM waits for the client to leave while it answers."""
    came = [{"type": "http.request", "body": b'{"model": ', "more_body": True}]
    came += [{"type": "http.request", "body": b'"acme"}'}, {"type": "http.disconnect"}]
    seen = []

    async def app(scope, receive, send):
        seen.extend([await receive(), await receive()])

    async def receive():
        return came.pop(0)

    scope = {"type": "http", "method": "POST", "path": "/v1/completions", "headers": []}
    gateway = HttpCallMiddleware(NamesMiddleware(app, server.models))
    asyncio.run(gateway(scope, receive, None))
    assert [each["type"] for each in seen] == ["http.request", "http.disconnect"]
    assert b"multilora-1-" in seen[0]["body"]
