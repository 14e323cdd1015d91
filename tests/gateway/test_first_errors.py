"""A body's lists are read to the first item that is wrong."""

from types import SimpleNamespace

import pytest

pytest.importorskip("fastapi")

from fastapi import FastAPI
from fastapi.testclient import TestClient
from pydantic import BaseModel

from vllm_multilora.gateway.app import stop_at_first_errors


class Body(BaseModel):
    numbers: list[int] = []
    names: dict[str, int] = {}


@pytest.fixture
def app():
    app = FastAPI()

    @app.post("/")
    async def answer(body: Body):
        return len(body.numbers) + len(body.names)

    return app


@pytest.mark.parametrize(
    "body",
    [{"numbers": ["a"] * 9}, {"names": dict.fromkeys("abcdefghi", "a")}],
    ids=["list", "object"],
)
def test_many_wrong_items_when_stopped_are_one_error(app, body):
    client = TestClient(app)
    assert len(client.post("/", json=body).json()["detail"]) == 9
    stop_at_first_errors(app)
    assert len(client.post("/", json=body).json()["detail"]) == 1
    assert client.post("/", json={"numbers": [1, 2], "names": {"a": 3}}).json() == 3


def test_unknown_fastapi_is_reported_once_and_left_alone(caplog):
    route = SimpleNamespace(dependant=SimpleNamespace(body_params=[object()]))
    stop_at_first_errors(SimpleNamespace(routes=[object(), route, route]))
    assert caplog.text.count("FastAPI") == 1
