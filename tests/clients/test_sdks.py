"""The packages of OpenAI and Anthropic, for Python and for node."""

import pytest

from tests.clients.programs import (
    ANTHROPIC,
    ANTHROPIC_NODE,
    OPENAI,
    OPENAI_NODE,
    Program,
    each_of,
    statuses,
)
from tests.clients.site import BASE, LATE, LENGTH, MEDICAL, MODEL_LENGTH, SOURCES, Site

pytestmark = [pytest.mark.serving, pytest.mark.clients]

OPENAIS, ANTHROPICS = (OPENAI, OPENAI_NODE), (ANTHROPIC, ANTHROPIC_NODE)


@each_of(*OPENAIS, *ANTHROPICS)
@pytest.mark.proves("answers of adapters and base model are PEFT's, also streamed")
def test_answers_are_pefts(site: Site, client: Program) -> None:
    answers = client.run("answers", site.task())
    assert set(answers) == {BASE, *SOURCES}
    for model, by_route in answers.items():
        assert by_route == dict.fromkeys(by_route, site.expected(model)), model


@each_of(*OPENAIS)
@pytest.mark.proves("lists and retrieves models with their length")
def test_openai_lists_and_retrieves_models(site: Site, client: Program) -> None:
    models = client.run("models", site.task(model=MEDICAL))
    assert set(models["listed"]) >= {BASE, *SOURCES}
    assert set(models["listed"].values()) == {MODEL_LENGTH}
    assert models["retrieved"] == [MEDICAL, MODEL_LENGTH, BASE]
    assert statuses({"unknown": models["unknown"]}) == {"unknown": ("NotFoundError", 404)}


@each_of(*ANTHROPICS)
@pytest.mark.proves("lists and retrieves models, counts tokens")
def test_anthropic_lists_and_retrieves_models(site: Site, client: Program) -> None:
    models = client.run("models", site.task(model=MEDICAL))
    assert set(models["listed"]) >= {BASE, *SOURCES}
    assert models["retrieved"] == MEDICAL
    assert models["tokens"] == LENGTH
    assert statuses({"unknown": models["unknown"]}) == {"unknown": ("NotFoundError", 404)}


@each_of(*OPENAIS, *ANTHROPICS)
@pytest.mark.proves("reads the headers of the request id and of the weights that answered")
def test_headers_say_which_request_and_which_weights(site: Site, client: Program) -> None:
    said = client.run("headers", site.task(model=MEDICAL))
    headers = {name.lower(): value for name, value in said["headers"].items()}
    [row] = [each for each in site.server.get("/v1/models").json()["data"] if each["id"] == MEDICAL]
    assert headers["x-multilora-adapter"] == MEDICAL
    assert row["digest"].startswith(headers["x-multilora-version"])
    assert headers["x-request-id"].startswith("asked-by-")
    if client in OPENAIS:
        assert said["request_id"] == headers["x-request-id"]


@each_of(*OPENAIS)
@pytest.mark.proves("raises its own exception for each status")
def test_openai_raises_its_own_exceptions(site: Site, client: Program) -> None:
    task = site.task(model=MEDICAL, folder=str(site.put("legal", "other")))
    errors = client.run("errors", task)
    assert statuses(errors) == {
        "wrong key": ("AuthenticationError", 401),
        "not allowed": ("PermissionDeniedError", 403),
        "name taken": ("BadRequestError", 400),
        "unknown model": ("NotFoundError", 404),
        "broken adapter": ("BadRequestError", 400),
        "bad field": ("BadRequestError", 400),
    }
    assert "NaN" in errors["broken adapter"]["message"]
    assert "unknown" in errors["unknown model"]["message"]


@each_of(*ANTHROPICS)
@pytest.mark.proves("raises its own exception for each status")
def test_anthropic_raises_its_own_exceptions(site: Site, client: Program) -> None:
    errors = client.run("errors", site.task(model=MEDICAL))
    assert statuses(errors) == {
        "wrong key": ("AuthenticationError", 401),
        "unknown model": ("NotFoundError", 404),
        "broken adapter": ("BadRequestError", 400),
        "bad field": ("BadRequestError", 400),
    }
    for what, kind in {
        "wrong key": "authentication_error",
        "unknown model": "not_found_error",
        "broken adapter": "invalid_request_error",
    }.items():
        assert kind in errors[what]["message"], what
    assert "NaN" in errors["broken adapter"]["message"]


@each_of(*OPENAIS, *ANTHROPICS)
@pytest.mark.proves("waits as `Retry-After` says after 429, then succeeds")
def test_a_tenant_over_its_limit_is_answered_later(site: Site, client: Program) -> None:
    task = site.task(model=MEDICAL, prompt=site.prompt(MEDICAL), with_key=client.key, spends=True)
    said = client.run("retried", task)
    assert statuses({"once": said["once"]}) == {"once": ("RateLimitError", 429)}
    assert int(said["once"]["headers"]["retry-after"]) >= 1
    assert said["statuses"] == [429, 200]
    assert said["text"] == site.expected(MEDICAL)


@each_of(*OPENAIS, *ANTHROPICS)
@pytest.mark.proves("waits as `Retry-After` says after 503, then succeeds")
def test_an_adapter_that_storage_withholds_is_answered_later(site: Site, client: Program) -> None:
    with site.failing_storage() as mended:
        task = site.task(model=LATE, prompt=site.prompt(LATE), with_key=None, spends=False)
        said = client.run("retried", task)
        assert mended.is_set(), said
    assert said["once"]["status"] == 503
    unavailable = "InternalServerError" if client in OPENAIS else "ServiceUnavailableError"
    assert said["once"]["class"] == unavailable
    assert int(said["once"]["headers"]["retry-after"]) >= 1
    assert said["statuses"] == [503, 200]
    assert said["text"] == site.expected(LATE)
