"""Images, videos and recordings of one tenant: hosts that never answer, and what becomes large."""

import asyncio
import base64
import gc
import io
import itertools
import socket
import struct
import tempfile
import threading
import tracemalloc
import wave
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from pkgutil import resolve_name
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.tenants.callers import as_caller
from vllm_multilora.integration.server import callers, multimodal
from vllm_multilora.integration.server.callers import Caller
from vllm_multilora.tenants.limits import MOST_DOWNLOADS, Account
from vllm_multilora.tenants.rules import Role
from vllm_multilora.tenants.tenant import Tenant
from vllm_multilora.tenants.work_turns import take_turns

pytestmark = [pytest.mark.serving, pytest.mark.smoke]  # imports vLLM

LIMIT_S = 60.0
SIDE = 100
UNPACKED = 4 * SIDE**2
"""Bytes of a square image."""


@pytest.fixture(autouse=True)
def patched() -> None:
    from vllm_multilora.integration.patching.ledger import apply_patches

    apply_patches()


def tenant(name: str) -> Caller:
    return Caller(Role.TENANT, account=Account(Tenant(name, base_model=True)), secret="secret")


@pytest.fixture
def connection(monkeypatch: pytest.MonkeyPatch) -> Any:
    """In the place of vLLM's, which fetches what all requests point to."""
    from vllm.connections import HTTPConnection

    monkeypatch.setenv("VLLM_MEDIA_FETCH_MAX_RETRIES", "1")
    made = HTTPConnection()
    monkeypatch.setattr(multimodal, "global_http_connection", made)
    return made


def test_a_host_that_never_answers_one_tenant_keeps_no_others_waiting(connection: Any) -> None:
    """vLLM has a hundred connections for all."""
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
        multimodal.share_connections()
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


def test_a_name_server_that_never_answers_one_tenant_keeps_no_others_waiting(
    connection: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An event loop has few threads for lookups, and one stays busy when nobody waits any more.

    Nor does the process wait at its end, as it does for threads that are no daemons.
    """
    is_over, looked, look_up = threading.Event(), threading.Semaphore(0), socket.getaddrinfo
    is_daemon: list[bool] = []

    def slow_look_up(host: Any, *args: Any, **kwargs: Any) -> Any:
        if host == "never.example":
            is_daemon.append(threading.current_thread().daemon)
            looked.release()
            assert is_over.wait(LIMIT_S)
        return look_up("127.0.0.1", *args, **kwargs)

    async def answer(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 4\r\nconnection: close\r\n\r\nfine")
        writer.close()

    async def fetch() -> bytes:
        asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(1))
        server = await asyncio.start_server(answer, "127.0.0.1")
        port = server.sockets[0].getsockname()[1]
        monkeypatch.setattr(socket, "getaddrinfo", slow_look_up)
        multimodal.share_connections()

        def start(who: Caller, host: str) -> asyncio.Task[bytes]:
            url = f"http://{host}:{port}/"
            return as_caller(who, lambda: asyncio.ensure_future(connection.async_get_bytes(url)))

        acme = tenant("acme")
        slow = start(acme, "never.example")
        while not looked.acquire(blocking=False):
            await asyncio.sleep(0)
        slow.cancel()
        await asyncio.wait([slow])
        try:
            return await asyncio.wait_for(start(tenant("zen"), "zen.example"), LIMIT_S / 4)
        finally:
            is_over.set()
            await connection._async_client.close()
            server.close()

    assert asyncio.run(fetch()) == b"fine"
    assert is_daemon == [True]


def test_no_thread_is_left_by_what_tenants_have_had_looked_up() -> None:
    """There may be thousands of them."""
    used: list[threading.Thread] = []

    async def look_up() -> None:
        lookups = multimodal._Lookups()
        for name in ("acme", "zen"):
            who = tenant(name)
            await as_caller(who, lambda: asyncio.ensure_future(lookups.getaddrinfo("127.0.0.1", 9)))
            kept.append(who)
            used.extend(each for each in threading.enumerate() if "lookup" in each.name)

    kept: list[Caller] = []
    asyncio.run(look_up())
    for each in used:
        each.join(LIMIT_S / 6)
    assert not [each for each in used if each.is_alive()]


def test_nothing_is_fetched_or_unpacked_for_a_call_that_has_been_answered(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of several chats to embed vLLM refuses all for the first, and reads on in the others."""
    from vllm.connections import HTTPConnection
    from vllm.exceptions import GracefulHTTPError

    asked: list[str] = []

    async def never(_: Any, url: str, **__: Any) -> None:
        asked.append(url)
        await asyncio.Event().wait()

    monkeypatch.setattr(
        HTTPConnection, "async_get_bytes", partial(multimodal.download, never, None)
    )

    async def fetch() -> None:
        who = tenant("acme")
        fetches = as_caller(
            who,
            lambda: [
                asyncio.ensure_future(HTTPConnection.async_get_bytes(f"/{number}"))
                for number in range(MOST_DOWNLOADS + 1)
            ],
        )
        await asyncio.sleep(0)
        who.ended()
        fetches[0].cancel()
        with pytest.raises(GracefulHTTPError, match="has been answered"):
            await asyncio.wait_for(fetches[-1], LIMIT_S)
        assert len(asked) == MOST_DOWNLOADS
        with pytest.raises(GracefulHTTPError, match="has been answered"):
            as_caller(who, lambda: load_image(png()))
        for each in fetches:
            each.cancel()
        await asyncio.gather(*fetches, return_exceptions=True)

    asyncio.run(fetch())


@pytest.mark.parametrize("kind", ["base:PoolingIOProcessor", "embed:TokenEmbedIOProcessor"])
def test_pooling_waits_for_no_host_on_the_thread_that_makes_prompts_for_all(kind: str) -> None:
    from vllm import PoolingParams
    from vllm.connections import HTTPConnection
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
    config = SimpleNamespace(model_config=None)
    make = resolve_name(f"vllm.entrypoints.pooling.{kind.replace(':', '.io_processor:')}")
    pooling: Any = make(config, Renderer(), template)
    of_all = {"tok_params": None, "prompt_extras": None, "skip_mm_cache": False}
    of_all |= {"params": PoolingParams(), "lora_requests": None, "priorities": 0}
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


def image(form: str) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (SIDE, SIDE)).save(file, form)
    return file.getvalue()


def png() -> bytes:
    return image("png")


def icon() -> bytes:
    """One that says that it has sixteen pixels a side, and has more."""
    head = struct.pack("<HHHBBBBHHII", 0, 1, 1, 16, 16, 0, 0, 1, 32, len(png()), 22)
    return head + png()


def recording() -> bytes:
    file = io.BytesIO()
    with wave.open(file, "wb") as written:
        written.setnchannels(1)
        written.setsampwidth(2)
        written.setframerate(16_000)
        written.writeframes(bytes(2 * SIDE**2))
    return file.getvalue()


def video(frames: int = 4) -> bytes:
    """Each of its frames has three bytes for a pixel."""
    import cv2

    with tempfile.NamedTemporaryFile(suffix=".avi") as file:
        written = cv2.VideoWriter(file.name, cv2.VideoWriter.fourcc(*"MJPG"), 4, (SIDE, SIDE))
        for _ in range(frames):
            written.write(np.zeros((SIDE, SIDE, 3), np.uint8))
        written.release()
        return file.read()


def load_image(data: bytes) -> Any:
    from vllm.multimodal.media import ImageMediaIO

    return ImageMediaIO().load_bytes(data)


def load_frames(data: bytes) -> Any:
    from vllm.multimodal.media import ImageMediaIO, VideoMediaIO

    frames = ",".join([base64.b64encode(data).decode()] * 2)
    return VideoMediaIO(ImageMediaIO()).load_base64("video/jpeg", frames)


def load_video(data: bytes) -> Any:
    from vllm.multimodal.media import ImageMediaIO, VideoMediaIO

    return VideoMediaIO(ImageMediaIO()).load_bytes(data)


def load_recording(data: bytes) -> Any:
    from vllm.multimodal.media import AudioMediaIO

    return AudioMediaIO().load_bytes(data)


def load_recording_from_file(data: bytes) -> Any:
    """As one of the operator's, whose address a tenant has sent."""
    from vllm.multimodal.media import AudioMediaIO

    with tempfile.NamedTemporaryFile() as file:
        file.write(data)
        file.flush()
        return AudioMediaIO().load_file(Path(file.name))


@pytest.fixture
def executor() -> Iterator[ThreadPoolExecutor]:
    """As vLLM's for what it unpacks."""
    with ThreadPoolExecutor(2) as made:
        take_turns(made, lambda *_: "")
        yield made


@pytest.mark.parametrize(
    ("load", "make", "each"),
    [
        pytest.param(load_image, png, 1, id="image"),
        pytest.param(load_frames, png, 2, id="frames"),
        pytest.param(load_video, video, 3, id="video"),
        pytest.param(load_recording, recording, 1, id="recording"),
        pytest.param(load_recording_from_file, recording, 1, id="recording-in-a-file"),
    ],
)
def test_a_call_has_only_so_much_unpacked(
    load: Callable[[bytes], Any],
    make: Callable[[], bytes],
    each: int,
    executor: ThreadPoolExecutor,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from vllm.exceptions import GracefulHTTPError

    monkeypatch.setattr(callers, "MOST_UNPACKED", 2 * each * UNPACKED)
    who, data = tenant("acme"), make()
    for _ in range(2):
        as_caller(who, lambda: executor.submit(load, data)).result(LIMIT_S)
    with pytest.raises(GracefulHTTPError, match="bytes of unpacked images"):
        as_caller(who, lambda: executor.submit(load, data)).result(LIMIT_S)
    as_caller(tenant("acme"), lambda: executor.submit(load, data)).result(LIMIT_S)  # another call
    for other in (None, Caller(Role.CLIENT)):
        for _ in range(3):
            as_caller(other, lambda: executor.submit(load, data)).result(LIMIT_S)


def test_a_video_is_refused_before_its_frames_are_unpacked(monkeypatch: pytest.MonkeyPatch) -> None:
    """A megabyte has hundreds, each of them of fifty."""
    from vllm.exceptions import GracefulHTTPError
    from vllm.multimodal.media import ImageMediaIO, VideoMediaIO

    frames = 64
    data, size = video(frames), 3 * SIDE**2 * frames
    monkeypatch.setattr(callers, "MOST_UNPACKED", 2 * size)
    who = tenant("acme")

    def load() -> Any:
        return VideoMediaIO(ImageMediaIO(), num_frames=-1).load_bytes(data)

    for _ in range(2):
        loaded, _ = as_caller(who, load).media
        assert loaded.nbytes == size
    del loaded
    tracemalloc.start()
    try:
        with pytest.raises(GracefulHTTPError, match="bytes of unpacked images"):
            as_caller(who, load)
        assert tracemalloc.get_traced_memory()[1] < size / 2
    finally:
        tracemalloc.stop()


def test_a_call_has_only_so_much_of_its_videos_gone_through(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of two frames the second may be the last of any number, each of which is read before it."""
    from vllm.exceptions import GracefulHTTPError
    from vllm.multimodal.media import ImageMediaIO, VideoMediaIO

    frames = 64
    data = video(frames)
    monkeypatch.setattr(callers, "MOST_WATCHED", frames * SIDE**2)

    def load() -> Any:
        return VideoMediaIO(ImageMediaIO(), num_frames=2).load_bytes(data)

    for who in (None, tenant("acme")):
        loaded, _ = as_caller(who, load).media
        assert len(loaded) == 2
    with pytest.raises(GracefulHTTPError, match="pixels of videos"):
        as_caller(who, load)


@pytest.mark.parametrize("load", [load_video, load_recording], ids=["video", "recording"])
def test_no_ports_are_opened_to_wait_for_what_a_tenant_has_not_sent(
    load: Callable[[bytes], Any],
) -> None:
    """Four hundred, in half a minute, for eight kilobytes."""
    from vllm.exceptions import GracefulHTTPError

    session = b"v=0\nc=IN IP4 127.0.0.1\nt=0 0\nm=video 7000 RTP/AVP 31\n"
    with pytest.raises(GracefulHTTPError, match="SDP"):
        as_caller(tenant("acme"), lambda: load(session))


def qoi() -> bytes:
    """An image that Python unpacks, all of one colour."""
    head = b"qoif" + struct.pack(">IIBB", SIDE, SIDE, 3, 0)
    return head + b"\xfd" * (SIDE**2 // 62 + 1) + bytes(7) + b"\1"


def tiff() -> bytes:
    """An image each of whose rows is unpacked from the whole file."""
    row = zlib.compress(bytes(SIDE))
    tags = [(256, 1, SIDE), (257, 1, SIDE), (258, 1, 8), (259, 1, 8), (262, 1, 1), (278, 1, 1)]
    places = 8 + len(row)
    tags += [(273, SIDE, places), (279, SIDE, places + 4 * SIDE)]  # where rows are, their bytes
    listed = b"".join(struct.pack("<HHII", tag, 4, *rest) for tag, *rest in sorted(tags))
    head = struct.pack("<2sHI", b"II", 42, places + 8 * SIDE) + row
    rows = struct.pack("<I", 8) * SIDE + struct.pack("<I", len(row)) * SIDE
    return head + rows + struct.pack("<H", len(tags)) + listed + bytes(4)


@pytest.mark.parametrize(
    "data",
    [icon(), qoi(), b"P3 1 1 255 1 2 3 ", image("jpeg2000"), tiff()],
    ids=["icon", "qoi", "text", "jpeg-2000", "tiff"],
)
def test_no_image_of_a_tenants_is_unpacked_that_takes_more_than_its_size(data: bytes) -> None:
    """Twelve of three million pixels kept all others waiting for 10 of 53 seconds."""
    from vllm.exceptions import GracefulHTTPError

    assert load_image(data).media.size
    with pytest.raises(GracefulHTTPError, match="expected an image in one of"):
        as_caller(tenant("acme"), lambda: load_image(data))


def jpeg(*, padding: int = 0, scans: int = 0) -> bytes:
    """One with bytes that say nothing before its head, or scans that change nothing at its end."""
    file = io.BytesIO()
    Image.new("L", (8, 8)).save(file, "jpeg", progressive=True)
    start, rest = file.getvalue()[:2], file.getvalue()[2:]
    table = struct.pack(">BBHB16BB", 0xFF, 0xC4, 20, 0x10, 1, *[0] * 15, 0)  # ends a block by a bit
    scan = struct.pack(">BBHBBBBBBB", 0xFF, 0xDA, 8, 1, 1, 0, 1, 63, 0, 0x7F)
    end = rest.index(b"\xff\xda")
    return start + b"\xff" * padding + rest[:end] + table + scan * scans + rest[end:]


SECONDS = 12
"""More than an image is read in pieces."""


@pytest.mark.parametrize(
    "data",
    [jpeg(padding=SECONDS), jpeg(scans=SECONDS << 13)],
    ids=["padding", "scans"],
)
def test_a_call_has_its_images_read_for_so_long_only(
    data: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One of a megabyte takes minutes, and vLLM has eight threads for all."""
    from vllm.exceptions import GracefulHTTPError

    seconds = itertools.count()  # one more for each piece
    clock = SimpleNamespace(thread_time=lambda: float(next(seconds)))
    monkeypatch.setattr(multimodal, "time", clock)
    monkeypatch.setattr(callers, "MOST_READING_S", float(2 * SECONDS))
    assert load_image(data).media.size  # nobody's
    who = tenant("acme")
    with pytest.raises(GracefulHTTPError, match="seconds of a processor"):
        as_caller(who, lambda: load_image(data))
    assert as_caller(tenant("acme"), lambda: load_image(png())).media.size


def test_what_an_image_takes_after_it_was_read_counts_for_its_calls_next_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Some formats are read whole, and unpacked then."""
    from vllm.exceptions import GracefulHTTPError
    from vllm.multimodal.media import ImageMediaIO

    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(multimodal, "time", SimpleNamespace(thread_time=lambda: clock.now))
    monkeypatch.setattr(callers, "MOST_READING_S", 1.0)

    def unpack_slowly(*_: Any) -> Any:
        clock.now += 1
        return Image.new("RGB", (1, 1))

    def load() -> Any:
        return multimodal.unpack(unpack_slowly, ImageMediaIO(), image("webp"))

    who = tenant("acme")
    assert as_caller(who, load).size
    with pytest.raises(GracefulHTTPError, match="seconds of a processor"):
        as_caller(who, load)
    assert as_caller(tenant("acme"), load).size


BROKEN = b"no image"


@pytest.mark.parametrize(
    ("images", "refusal"),
    [
        pytest.param([png()] * 6, "bytes of unpacked images", id="too-large"),
        pytest.param([png(), BROKEN, BROKEN], "expected an image in one of", id="broken"),
    ],
)
def test_what_a_refused_call_has_unpacked_is_not_kept(
    images: list[bytes],
    refusal: str,
    executor: ThreadPoolExecutor,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It waited for Python to look for circles: two clients had a server hold six gigabytes."""
    from vllm.entrypoints.scale_out.token_in_token_out.serving import AsyncMultiModalItemTracker
    from vllm.entrypoints.serve.utils.api_utils import with_cancellation
    from vllm.exceptions import GracefulHTTPError
    from vllm.multimodal.media import connector

    monkeypatch.setattr(callers, "MOST_UNPACKED", 4 * UNPACKED)
    monkeypatch.setattr(connector, "global_thread_pool", executor)
    urls = [f"data:image/png;base64,{base64.b64encode(image).decode()}" for image in images]

    @with_cancellation
    async def endpoint(request: Any, raw_request: Any) -> None:
        tracker: Any = object.__new__(AsyncMultiModalItemTracker)
        fetch = connector.MediaConnector().fetch_image_async
        tracker._items_by_modality = {"image": [partial(fetch, url) for url in urls]}
        await tracker.resolve_items()

    async def call() -> str:
        client = SimpleNamespace(receive=asyncio.Event().wait)  # who stays
        try:
            await endpoint(None, raw_request=client)
        except (GracefulHTTPError, ValueError) as error:  # which `pytest.raises` would keep
            return str(error)
        return ""

    assert refusal in as_caller(tenant("acme"), lambda: asyncio.run(call()))
    gc.disable()
    try:
        before = images_and_errors()
        as_caller(tenant("acme"), lambda: asyncio.run(call()))
        executor.shutdown()  # whose threads have what they work on until they end
        assert not images_and_errors().keys() - before
    finally:
        gc.enable()


def images_and_errors() -> dict[int, Any]:
    """All that there are, by id."""
    found = (each for each in gc.get_objects() if isinstance(each, Image.Image | Exception))
    return {id(each): each for each in found}


def test_python_looks_for_no_other_kinds_of_images_in_what_a_tenant_sends(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It takes a second for each megabyte of PostScript, only to see that it is none."""
    from PIL.EpsImagePlugin import EpsImageFile
    from vllm.exceptions import GracefulHTTPError

    looked: list[Any] = []
    monkeypatch.setattr(EpsImageFile, "_open", looked.append)
    with pytest.raises(GracefulHTTPError, match="expected an image in one of"):
        as_caller(tenant("acme"), lambda: load_image(b"%!PS-Adobe-3.0\n%%x: y\n"))
    assert not looked
