"""Frameworks that ask through a package of OpenAI's, or as it does."""

import subprocess
import time
from collections.abc import Callable, Iterator

import httpx
import pytest
import yaml

from tests.clients.programs import (
    BIN,
    INSPECT,
    LANGCHAIN,
    LITELLM,
    SAGEMAKER,
    Program,
    each_of,
    environment,
)
from tests.clients.site import ACME_KEY, BASE, BROKEN, LATE, LEGAL, MEDICAL, SOURCES, Site, spoil
from tests.serving.server import free_port

pytestmark = [pytest.mark.serving, pytest.mark.clients]

PROXY_KEY = "sk-key-of-the-proxy"
START_LIMIT_S = 120.0


def assert_pefts(site: Site, answers: dict[str, dict[str, str]]) -> None:
    assert set(answers) == {BASE, *SOURCES}
    for model, by_route in answers.items():
        assert by_route == dict.fromkeys(by_route, site.expected(model)), model


@each_of(LITELLM, LANGCHAIN)
@pytest.mark.proves("answers of adapters and base model are PEFT's, also streamed")
def test_answers_are_pefts(site: Site, client: Program) -> None:
    assert_pefts(site, client.run("answers", site.task()))


@each_of(LITELLM, LANGCHAIN)
@pytest.mark.proves("reads the headers of the request id and of the weights that answered")
def test_headers_say_which_request_and_which_weights(site: Site, client: Program) -> None:
    said = client.run("headers", site.task(model=MEDICAL))
    headers = {name.removeprefix("llm_provider-"): value for name, value in said.items()}
    assert headers["x-multilora-adapter"] == MEDICAL
    assert headers["x-request-id"]


@each_of(LITELLM, LANGCHAIN)
@pytest.mark.proves("raises its own exception for each status")
def test_each_refusal_raises_the_right_exception(site: Site, client: Program) -> None:
    errors = client.run("errors", site.task(model=MEDICAL, hasty=client.key))
    for what, (kind, status) in {
        "wrong key": ("AuthenticationError", 401),
        "unknown model": ("NotFoundError", 404),
        "broken adapter": ("BadRequestError", 400),
        "limit": ("RateLimitError", 429),
    }.items():
        assert errors[what]["status"] == status, what
        assert kind in errors[what]["kinds"], what
    assert "NaN" in errors["broken adapter"]["message"]


@each_of(LITELLM, LANGCHAIN)
@pytest.mark.proves("tries again after 503, then succeeds")
def test_an_adapter_that_storage_withholds_is_answered_later(site: Site, client: Program) -> None:
    with site.failing_storage() as mended:
        said = client.run("retried", site.task(model=LATE, prompt=site.prompt(LATE)))
        assert mended.is_set(), said
    assert said["once"]["status"] == 503
    assert said["text"] == site.expected(LATE)


@pytest.fixture(scope="module")
def proxy(site: Site, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """litellm's proxy in front of the server: a model of its own for each adapter."""
    folder = tmp_path_factory.mktemp("litellm")
    config, log = folder / "config.yaml", folder / "proxy.log"
    models = [
        {
            "model_name": f"our-{model}",
            "litellm_params": {
                "model": f"hosted_vllm/{model}",
                "api_base": f"{site.url}/v1",
                "api_key": ACME_KEY,
            },
        }
        for model in (BASE, *SOURCES, BROKEN)
    ]
    settings = {"master_key": PROXY_KEY}
    config.write_text(
        yaml.safe_dump(
            {
                "model_list": models,
                "general_settings": settings,
                "router_settings": {"num_retries": 0},
            }
        )
    )
    port = free_port()
    with log.open("wb") as file:
        process = subprocess.Popen(
            [BIN / "litellm", "--config", config, "--host", "127.0.0.1", "--port", str(port)],
            env=environment({"NO_DOCS": "True", "HOME": str(folder)}),
            cwd=folder,
            stdout=file,
            stderr=subprocess.STDOUT,
        )
    try:
        url = f"http://127.0.0.1:{port}"
        end = time.monotonic() + START_LIMIT_S
        while True:
            assert process.poll() is None, log.read_text()[-3000:]
            assert time.monotonic() < end, log.read_text()[-3000:]
            try:
                if httpx.get(f"{url}/health/liveliness", trust_env=False).is_success:
                    break
            except httpx.TransportError:
                pass
            time.sleep(0.5)
        yield url
    finally:
        process.terminate()
        process.wait(30)


@pytest.mark.proves("answers through it are PEFT's; a refusal keeps its status and its reason")
def test_litellms_proxy_passes_answers_and_refusals_on(
    site: Site, proxy: str, tried: Callable[[str, str], None]
) -> None:
    tried("litellm's proxy", LITELLM.version)
    with httpx.Client(
        base_url=proxy, headers={"Authorization": f"Bearer {PROXY_KEY}"}, trust_env=False
    ) as asked:

        def ask(model: str, prompt: str) -> httpx.Response:
            body = {"model": f"our-{model}", "messages": [{"role": "user", "content": prompt}]}
            more = {"max_tokens": site.task()["max_tokens"], "temperature": 0}
            return asked.post("/v1/chat/completions", json=body | more, timeout=60)

        for model in (BASE, *SOURCES):
            answer = ask(model, site.prompt(model))
            assert answer.status_code == 200, answer.text
            assert answer.json()["choices"][0]["message"]["content"] == site.expected(model)
        refused = ask(BROKEN, "t1")
    assert refused.status_code == 400
    assert "NaN" in refused.text


@each_of(INSPECT)
@pytest.mark.proves("`vllm/BASE:ADAPTER` and `vllm/BASE:FOLDER` answer as PEFT does")
def test_inspect_ai_asks_adapters_and_registers_folders(site: Site, client: Program) -> None:
    folder = site.put(LATE, "of-inspect")
    answers = client.run("answers", site.task(folder=str(folder), prompt=site.prompt(LATE)))
    assert answers == {model: site.expected(model) for model in (BASE, *SOURCES)} | {
        "folder": site.expected(LATE)
    }


@each_of(INSPECT)
@pytest.mark.proves("a folder that is refused is an error with the reason")
def test_inspect_ai_says_why_an_adapter_is_refused(site: Site, client: Program) -> None:
    folder = site.put(LEGAL, "broken-of-inspect")
    spoil(folder)
    errors = client.run("errors", site.task(folder=str(folder)))
    assert {error["class"] for error in errors.values()} == {"RuntimeError"}
    assert "NaN" in errors["broken folder"]["message"]


@each_of(SAGEMAKER)
@pytest.mark.proves("answers at `/invocations`, by inference component, are PEFT's")
def test_sagemakers_invocations_are_answered_by_the_component(site: Site, client: Program) -> None:
    assert_pefts(site, client.run("answers", site.task()))


@each_of(SAGEMAKER)
@pytest.mark.proves("refusals keep their statuses")
def test_sagemakers_client_keeps_the_statuses_of_refusals(site: Site, client: Program) -> None:
    errors = client.run("errors", site.task())
    assert {what: error["status"] for what, error in errors.items()} == {
        "unknown model": 404,
        "broken adapter": 400,
    }
