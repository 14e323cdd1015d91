"""Images and the like of one tenant, on hosts that never answer."""

import asyncio
import threading
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import pytest

from tests.tenants.callers import as_caller
from vllm_multilora.integration.server import multimodal
from vllm_multilora.integration.server.callers import Caller
from vllm_multilora.tenants.limits import MOST_DOWNLOADS, Account
from vllm_multilora.tenants.rules import Role
from vllm_multilora.tenants.tenant import Tenant

pytestmark = pytest.mark.serving  # imports vLLM

LIMIT_S = 60.0


@pytest.fixture(autouse=True)
def patched() -> None:
    from vllm_multilora.integration.patching.ledger import apply_patches

    apply_patches()


def tenant(name: str) -> Caller:
    return Caller(Role.TENANT, account=Account(Tenant(name, base_model=True)), secret="secret")


def test_a_host_that_never_answers_one_tenant_keeps_no_others_waiting(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """vLLM has a hundred connections for all."""
    from vllm.connections import HTTPConnection

    monkeypatch.setenv("VLLM_MEDIA_FETCH_MAX_RETRIES", "1")
    connection = HTTPConnection()
    monkeypatch.setattr(multimodal, "global_http_connection", connection)
    asked: list[bytes] = []

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        asked.append(await reader.readline())
        if b"/never" not in asked[-1]:
            writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 4\r\n\r\nfine")
        with pytest.raises(asyncio.CancelledError):
            await asyncio.Event().wait()

    async def fetch() -> bytes:
        server = await asyncio.start_server(answer, "127.0.0.1", backlog=200)
        url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        multimodal.lift_limit_of_connections()
        acme, zen = tenant("acme"), tenant("zen")

        def start(who: Caller, path: str) -> asyncio.Task[bytes]:
            return as_caller(
                who, lambda: asyncio.ensure_future(connection.async_get_bytes(url + path))
            )

        waiting = [start(acme, "/never") for _ in range(120)]
        async with asyncio.timeout(LIMIT_S):
            while len(asked) < MOST_DOWNLOADS:
                await asyncio.sleep(0)
            found = await asyncio.wait_for(start(zen, "/"), LIMIT_S / 2)
        assert len(asked) == MOST_DOWNLOADS + 1
        for task in waiting:
            task.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)
        await connection._async_client.close()
        server.close()
        return found

    assert asyncio.run(fetch()) == b"fine"


def test_pooling_waits_for_no_host_on_the_thread_that_makes_prompts_for_all() -> None:
    from vllm.connections import HTTPConnection
    from vllm.entrypoints.pooling.base.io_processor import PoolingIOProcessor
    from vllm.exceptions import GracefulHTTPError

    has_begun, is_over = threading.Event(), threading.Event()

    class Renderer:
        _executor = ThreadPoolExecutor(1)

        def render_chat(self, *_: Any, **__: Any) -> Any:
            has_begun.set()
            is_over.wait(LIMIT_S)

        async def render_chat_async(self, *_: Any, **__: Any) -> Any:
            has_begun.set()
            await asyncio.Event().wait()

        def render_cmpl(self, **_: Any) -> Any:
            return ["a prompt"]

    template = SimpleNamespace(
        chat_template=None, chat_template_content_format="auto", trust_request_chat_template=False
    )
    pooling: Any = PoolingIOProcessor(
        SimpleNamespace(model_config=None),  # type: ignore[arg-type]
        Renderer(),  # type: ignore[arg-type]
        template,  # type: ignore[arg-type]
    )
    of_all = {"tok_params": None, "prompt_extras": None, "skip_mm_cache": False}
    of_all |= {"params": "params", "lora_requests": None, "priorities": 0}
    chat = {"conversations": [], "chat_params": None, **of_all}

    async def render() -> Any:
        slow = as_caller(tenant("acme"), lambda: asyncio.ensure_future(pooling.render_async(chat)))
        while not has_begun.is_set():
            await asyncio.sleep(0)
        text = as_caller(
            tenant("zen"),
            lambda: asyncio.ensure_future(pooling.render_async({"prompts": "x", **of_all})),
        )
        try:
            return await asyncio.wait_for(text, LIMIT_S / 4)
        finally:
            is_over.set()
            slow.cancel()

    assert asyncio.run(render())["prompts"] == "a prompt"
    Renderer._executor.shutdown()
    with pytest.raises(GracefulHTTPError, match="data URLs"):
        as_caller(tenant("acme"), lambda: HTTPConnection().get_bytes("http://127.0.0.1:9/"))
