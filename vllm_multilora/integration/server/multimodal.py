"""Adapters and requests with images, audio or other input besides text."""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import Callable
from concurrent.futures import Future
from contextvars import ContextVar
from functools import partial
from http import HTTPStatus
from io import BytesIO
from threading import Thread
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from aiohttp import ClientSession, TCPConnector
from aiohttp.resolver import ThreadedResolver
from PIL import Image, UnidentifiedImageError
from vllm.connections import global_http_connection
from vllm.entrypoints.pooling.typing import PoolingEngineInput
from vllm.exceptions import GracefulHTTPError
from vllm.multimodal.media import ImageMediaIO, VideoMediaIO

from vllm_multilora.integration.server import invoked_prompts
from vllm_multilora.integration.server.activation import is_active_behind
from vllm_multilora.integration.server.callers import (
    Caller,
    current_account,
    current_caller,
    current_tenant,
    error_response,
)

if TYPE_CHECKING:
    from vllm.entrypoints.serve.engine.protocol import ErrorResponse

_WIDTH, _HEIGHT = 3, 4
"""Of a video's frames, as OpenCV numbers what it knows of one; vLLM can do without OpenCV."""

_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "AVIF")
"""Of tenants' images. Pillow has Python unpack many others, in which nobody is answered, or even
read them for long to find out that they are broken, and lets no thread go on while it unpacks
JPEG 2000; icons hold images that are larger than they say; of a TIFF all rows may be the same part
of the file, and a megabyte takes a quarter of an hour."""

_SESSION = b"c=IN IP"
"""In a description of a session, at any place (RFC 8866): FFmpeg opens two ports for each of its
media, and waits on them for ten seconds or thirty."""


def active_default_adapter(original: Callable[..., Any], serving: Any, request: Any) -> Any:
    """The adapter that the operator has set for what a base-model request holds, if it is one.

    An adapter is no default for being named `image`, or `text`, as anybody may name theirs.
    """
    client: Any = getattr(serving.models, "engine_client", None)
    if not is_active_behind(client):
        return original(serving, request)
    defaults = client.vllm_config.lora_config.default_mm_loras
    if not defaults:
        return None
    adapters = serving.models.lora_requests
    kinds = serving._get_message_types(request) & defaults.keys() & adapters.keys()
    return adapters[kinds.pop()] if len(kinds) == 1 else None


def default_adapters(serving: Any, request: Any) -> set[str]:
    """The operator's defaults that may answer a base-model request; of a batch, each chat's."""
    chats: Any = getattr(request, "messages", None)
    is_batch = isinstance(chats, list) and all(isinstance(chat, list) for chat in chats)
    parts = [SimpleNamespace(messages=chat) for chat in chats] if is_batch else [request]
    found = map(serving._get_active_default_mm_loras, parts)
    return {lora.lora_name for lora in found if lora is not None}


def process_tokens(original: Callable[..., Any], renderer: Any, prompt: Any, **kwargs: Any) -> Any:
    invoked_prompts.require(prompt, renderer)
    return original(renderer, _of_tenant(prompt), **kwargs)


def _of_tenant(prompt: Any) -> Any:
    """A prompt whose images and the like are kept, once they have been read, for its tenant alone.

    vLLM keeps each under a name that it makes of its content, or of the `uuid` that the client has
    given it, and of what it was read with.
    """
    caller, items = current_caller.get(), prompt.get("multi_modal_data")
    if caller is None or caller.tenant is None or not items:
        return prompt
    read_with = prompt.get("media_io_kwargs") or {}
    owner = caller.own_id("")
    own = {kind: {**read_with.get(kind, {}), "tenant": owner} for kind in items | read_with}
    return {**prompt, "media_io_kwargs": own}


def init_pooling(original: Callable[..., None], processor: Any, *args: Any, **kwargs: Any) -> None:
    original(processor, *args, **kwargs)
    render = processor.render_async

    async def render_async(params: Any) -> Any:
        # A chat that has `late_chunking` is not served; vLLM says why.
        is_chat = "conversations" in params and "late_chunking" not in params
        if is_chat and current_tenant() is not None:
            return await _render_chat(processor.renderer, params)
        return await render(params)

    processor.render_async = render_async


async def _render_chat(renderer: Any, params: Any) -> PoolingEngineInput:
    """What `PoolingIOProcessor.render` makes of a chat, as for generation: hosts are waited for."""
    _, (engine_input,) = await renderer.render_chat_async(
        [params["conversations"]],
        params["chat_params"],
        params["tok_params"],
        prompt_extras=params["prompt_extras"],
        skip_mm_cache=params["skip_mm_cache"],
    )
    return PoolingEngineInput(
        prompts=engine_input,
        params=params["params"],
        lora_requests=params["lora_requests"],
        priorities=params["priorities"],
    )


async def download(original: Callable[..., Any], connection: Any, url: str, **kwargs: Any) -> bytes:
    """Fetches an image or the like from its host; a tenant's when it has its turn."""
    caller = current_caller.get()
    if caller is None or caller.account is None:
        return await original(connection, url, **kwargs)
    async with caller.account.downloads:
        caller.require_open()
        data: bytes = await original(connection, url, **kwargs)
    caller.count_unpacked(len(data))
    return data


def download_now(original: Callable[..., bytes], connection: Any, url: str, **kwargs: Any) -> bytes:
    """The same on a thread that others' work waits for: a tenant's hosts are not waited for."""
    if current_tenant() is not None:
        message = "Nothing is fetched for this kind of call: send images and the like as data URLs."
        raise GracefulHTTPError(message, HTTPStatus.BAD_REQUEST)
    return original(connection, url, **kwargs)


class _Lookups:
    """What aiohttp asks an event loop for, few at a time of the tenant whose hosts it looks up.

    An event loop has few threads for everybody's, uvloop four. A name server that does not answer
    keeps one for half a minute, whether anybody waits for it or not. A tenant's have threads of
    their own, which end with them, and for which a server's end does not wait.
    """

    async def getaddrinfo(self, *args: Any, **kwargs: Any) -> Any:
        account = current_account()
        look_up = partial(socket.getaddrinfo, *args, **kwargs)
        if account is None:
            return await asyncio.get_running_loop().run_in_executor(None, look_up)
        await account.lookups.acquire()
        return await asyncio.shield(asyncio.ensure_future(_look_up(account.lookups, look_up)))

    async def getnameinfo(self, *args: Any) -> Any:
        return socket.getnameinfo(*args)  # of numbers alone: nobody is asked


async def _look_up(lookups: asyncio.Semaphore, look_up: Callable[[], Any]) -> Any:
    """Looks up a host on a daemon thread; those of executors are joined when a process ends."""
    found: Future[Any] = Future()
    found.set_running_or_notify_cancel()  # nobody cancels it any more

    def run() -> None:
        try:
            found.set_result(look_up())
        except Exception as error:
            found.set_exception(error)

    try:
        Thread(target=run, name="multilora-lookup", daemon=True).start()
        return await asyncio.wrap_future(found)
    finally:
        lookups.release()


def share_connections() -> None:
    """Has no tenant's downloads wait for those of others; on the event loop, before the first.

    There are a hundred at a time otherwise, and those that wait are given up after seconds. Where
    what is found is kept, those who look up the same host wait for the first of them.
    """
    if global_http_connection._async_client is None:
        lookups: Any = _Lookups()
        connector = TCPConnector(limit=0, resolver=ThreadedResolver(lookups), use_dns_cache=False)
        global_http_connection._async_client = ClientSession(trust_env=True, connector=connector)


def unpack(original: Callable[..., Any], reader: Any, data: bytes) -> Any:
    """Unpacks an image or the like; counts it for the tenant whose call it is in."""
    caller = current_caller.get()
    if caller is None or caller.account is None:
        return original(reader, data)
    caller.require_open()
    if isinstance(reader, ImageMediaIO):
        return _unpack_image(original, reader, data, caller)
    if isinstance(data, bytes) and _SESSION in data:
        message = "Expected a recording or a video, found where one would be sent to (SDP)."
        raise GracefulHTTPError(message, HTTPStatus.BAD_REQUEST)
    if isinstance(reader, VideoMediaIO):
        reader.video_loader = _counting(reader.video_loader, caller)
    media = original(reader, data)
    caller.count_unpacked(_size(media))
    return media


def _unpack_image(original: Callable[..., Any], reader: Any, data: bytes, caller: Caller) -> Any:
    clock = _Clock(caller)
    token = _clock.set(clock)
    try:
        told = _size_told(clock, data)
        caller.count_unpacked(told)
        image = original(reader, data)
        clock.count()
        caller.count_unpacked(max(0, _size(image) - told))  # files in files do not tell
        return image
    finally:
        _clock.reset(token)


def _counting(loader: Any, caller: Caller) -> Any:
    """A loader of vLLM's that counts a video's frames before they are read, not when all are."""
    kind: Any = type(loader)

    class CountingLoader(kind):
        @classmethod
        def read_frames(cls, video: Any, wanted: list[int], *args: Any, **kwargs: Any) -> Any:
            pixels = int(video.get(_WIDTH)) * int(video.get(_HEIGHT))
            caller.count_watched(1 + max(wanted, default=-1), pixels)
            size = 3 * pixels * len(wanted)
            caller.count_unpacked(size)
            try:
                return super().read_frames(video, wanted, *args, **kwargs)
            finally:
                caller.count_unpacked(-size)  # `unpack` counts what there is of them

    return CountingLoader()


class _Clock:
    """Counts the time that one thread takes to read one of a tenant's images."""

    def __init__(self, caller: Caller) -> None:
        self._caller = caller
        self._since = time.thread_time()

    def count(self) -> None:
        """Counts what has gone by since the last time."""
        before, self._since = self._since, time.thread_time()
        self._caller.count_reading(self._since - before)


_clock: ContextVar[_Clock | None] = ContextVar("multilora_clock", default=None)
"""That of the tenant's image that is being unpacked; None while none is."""


class _TimedFile(BytesIO):
    """A tenant's image, of which no more is read once its call has taken too long."""

    def __init__(self, clock: _Clock, *data: bytes) -> None:
        super().__init__(*data)
        self._clock = clock

    def read(self, size: int | None = -1, /) -> bytes:
        self._clock.count()
        return super().read(size)


def image_file(original: Callable[..., BytesIO], *data: bytes) -> BytesIO:
    """The file that vLLM makes of an image, to have it unpacked."""
    clock = _clock.get()
    return original(*data) if clock is None else _TimedFile(clock, *data)


def _size_told(clock: _Clock, data: bytes) -> int:
    """Bytes that an image has, by what its file begins with; 0 where that says nothing.

    Raises:
        GracefulHTTPError: It is of none of the formats that tenants may send, or takes too long.
    """
    try:
        image = Image.open(_TimedFile(clock, data), formats=_FORMATS)
    except GracefulHTTPError:
        raise
    except UnidentifiedImageError as error:
        message = f"Found other data, expected an image in one of {', '.join(_FORMATS)}."
        raise GracefulHTTPError(message, HTTPStatus.BAD_REQUEST) from error
    except Exception:  # which vLLM answers
        return 0
    return 4 * image.width * image.height


def _size(media: Any) -> int:
    """Bytes of what vLLM has unpacked."""
    media = getattr(media, "media", media)
    if isinstance(media, Image.Image):
        return 4 * media.width * media.height
    frames, _ = media
    return int(frames.nbytes)


def refuse_features(request: Any) -> ErrorResponse | None:
    """The answer to a tenant that has processed images and the like itself; None to all others.

    `/inference/v1/generate` hands such tensors to the model unchecked: those of a wrong shape end
    the engine, for everybody.

    Args:
        request: One of vLLM's parsed requests.
    """
    if current_tenant() is None or not hasattr(getattr(request, "features", None), "mm_hashes"):
        return None
    return error_response(
        HTTPStatus.FORBIDDEN,
        "The key does not allow `features`: send images and the like as `content_parts`.",
        "features",
    )
