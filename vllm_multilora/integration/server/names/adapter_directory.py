"""The API server's part of `--multilora-adapter-dir`: serves what is in the directories.

All adapters of a directory are in vLLM's table of names from the start, so that `/v1/models` and
every route know them. An adapter is read and checked when it is first used, as by a registration. A
changed folder is reloaded like a registration: in place, under a new number, and if the new version
is refused, the old one is served on.

With several API servers, each watches the directories for itself. They arrive at the same numbers
(`AdapterVersion.number`), so the engine holds each adapter once.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any, TypeVar, TypeVarTuple

from vllm.entrypoints.serve.engine.protocol import ErrorResponse
from vllm.lora.request import LoRARequest

from vllm_multilora.adapters.directory import AdapterDirectories, AdapterVersion, Settling
from vllm_multilora.adapters.files.allowed_roots import AllowedRoots
from vllm_multilora.adapters.problems import TRUST_CODES
from vllm_multilora.integration.attached import Attached
from vllm_multilora.integration.patching.activation import settings_of
from vllm_multilora.integration.server.names import registration
from vllm_multilora.integration.server.names.public_names import is_reserved, public_names
from vllm_multilora.integration.server.names.refusals import Refusals
from vllm_multilora.integration.server.requests import callers, http_calls
from vllm_multilora.wording import listed

logger = logging.getLogger(__name__)

SCAN_S = 2.0
"""Time between two looks at the directories."""

_MAX_BUSY = 0.2  # share of the time that looking may take, however slow the storage is
_FIND_LIMIT_S = 5.0  # for one folder
# Other API servers may know an old version by name for as long as it takes them to see the new.
_GRACE_S = http_calls.GRACE_S + 4 * SCAN_S
_MAX_NAMED = 5

_T = TypeVar("_T")
_Ts = TypeVarTuple("_Ts")

DIRECTORY: Attached[DirectoryServer] = Attached("directory")
"""What serves the adapter directories for vLLM's `OpenAIServingModels`."""

_MAX_LOOKS = 1_024  # that have not ended


@dataclass
class _Served:
    """An adapter that is served from a directory.

    Attributes:
        folder: The version that `lora`, which is in the table of names, stands for.
        is_admitted: Whether the engine has accepted this version for this server.
        refused: The newest version that was found to be bad, and the answer.
        is_asked: Whether the engine may know it by a request, which came when its folder had gone.
    """

    folder: AdapterVersion
    lora: LoRARequest
    is_admitted: bool = False
    refused: tuple[AdapterVersion, ErrorResponse] | None = None
    is_asked: bool = False


class DirectoryServer:
    """Keeps one API server's table of names in step with its directories.

    Used on the server's event loop only; the file system is looked at on a thread. It is alone
    where no other API server of these engines serves from the directories.
    """

    def __init__(self, models: Any, directories: AdapterDirectories, *, is_alone: bool) -> None:
        self._models = models
        self._directories = directories
        self._is_alone = is_alone
        self._settling = Settling()
        self._served: dict[str, _Served] = {}
        # Versions that somebody has unloaded or replaced over HTTP: they stay away.
        self._given_up: dict[str, AdapterVersion] = {}
        # Of versions that could not be had, and may yet.
        self._missed = Refusals()
        self._reloads: asyncio.Task[None] | None = None
        # One thread: what one look finds is never older than what the look before has found.
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="multilora-directory")
        self._looks = PendingLooks(self._thread, _FIND_LIMIT_S)

    async def scan(self) -> None:
        """Looks at the directories, and serves what is there from now on."""
        loop = asyncio.get_running_loop()
        found = await loop.run_in_executor(self._thread, self._directories.scan)
        self._take(self._settling.settle(found))

    async def watch(self) -> None:
        pause, last_s = SCAN_S, 0.0
        while True:
            await asyncio.sleep(pause)
            began = time.monotonic()
            try:
                await self.scan()
            except Exception:
                logger.exception("The adapter directories could not be looked at.")
            took_s = time.monotonic() - began
            # Not after a single slow one: storage may have hung for minutes, and is back.
            pause = max(SCAN_S, min(took_s, last_s) / _MAX_BUSY)
            last_s = took_s

    async def prepare(self, name: str) -> ErrorResponse | None:
        """Finds an adapter that has just come, and has the engine read one on its first use.

        Returns:
            The answer to the request where the engine refuses the adapter.
        """
        served = self._served.get(name)
        if served is not None and served.is_admitted:
            return None
        models = self._models
        if served is None and (name in public_names(models) or models.is_base_model(name)):
            return None
        async with callers.turn_to_read():
            folder = await self._find(name)
            if folder is None:  # vLLM says that there is no such model, or the engine why not
                if served is not None:
                    served.is_asked = True
                return None
            async with registration.lock_of(models, name):
                served = self._served.get(name)
                if served is None and (served := self._serve(folder)) is not None:
                    logger.info("Adapter directories: serving %s", name)
                if served is None or served.is_admitted or not self._is_ours(served):
                    return None
                return await registration.to_its_end(self._admit(served, folder))

    def refused(self) -> dict[int, str]:
        """Why adapters were refused when they were tried last, by the numbers that serve.

        The engine keeps nothing of an adapter that it has refused.
        """
        found = {}
        for served in self._served.values():
            answer = served.refused[1] if served.refused else self._missed.last(served.folder)
            if answer is not None:
                found[served.lora.lora_int_id] = answer.error.message
        return found

    def _take(self, adapters: Mapping[str, AdapterVersion]) -> None:
        gone = [name for name in self._served if name not in adapters]
        for name in gone:
            self._withdraw(name)
        for name, served in list(self._served.items()):
            if not self._is_ours(served):
                self._given_up[name] = served.folder
                del self._served[name]
        for name in self._given_up.keys() - adapters.keys():
            del self._given_up[name]
        new = [folder for name, folder in adapters.items() if name not in self._served]
        if come := [folder.name for folder in new if self._serve(folder) is not None]:
            logger.info("Adapter directories: serving %s", listed(come, _MAX_NAMED))
        if gone:
            logger.info("Adapter directories: no longer there: %s", listed(gone, _MAX_NAMED))
        changed = [
            (served, adapters[name])
            for name, served in self._served.items()
            if served.is_admitted and served.folder != adapters[name]
        ]
        if changed and (self._reloads is None or self._reloads.done()):
            self._reloads = asyncio.create_task(self._reload_all(changed))

    def _serve(self, folder: AdapterVersion) -> _Served | None:
        """Takes an adapter into the table of names, unless its name is somebody else's."""
        name, models = folder.name, self._models
        if is_reserved(models, name):
            self._directories.tell(f"{folder.path} is not served: {name} is a kind of message part")
            return None
        is_route = name in (registration.ROUTE_NAMES.get(models) or ())
        if models.is_base_model(name) or name in public_names(models) or is_route:
            self._directories.tell(f"{folder.path} is not served: another model has its name")
            return None
        if self._given_up.get(name) == folder:
            return None
        self._given_up.pop(name, None)
        served = self._served[name] = _Served(folder, _request(folder))
        public_names(models)[name] = served.lora
        return served

    def _withdraw(self, name: str) -> None:
        served = self._served.pop(name)
        if self._is_ours(served):
            del public_names(self._models)[name]
            is_known = served.is_admitted or served.is_asked
            # Of several engines, one may have what another could not read.
            if is_known or self._missed.last(served.folder) is not None:
                registration.without_waiting(registration.remove(self._models, served.lora))
                self._remove_later(served.lora)

    def _remove_later(self, lora: LoRARequest) -> None:
        removal = registration.remove_later(self._models, lora, _GRACE_S)
        registration.without_waiting(removal)

    def _is_ours(self, served: _Served) -> bool:
        return public_names(self._models).get(served.folder.name) is served.lora

    async def _reload_all(self, changed: list[tuple[_Served, AdapterVersion]]) -> None:
        # One at a time: nobody waits for them, and requests may wait for other adapters.
        for served, folder in changed:
            async with registration.lock_of(self._models, folder.name):
                if self._is_ours(served):
                    await self._admit(served, folder)

    async def _admit(self, served: _Served, folder: AdapterVersion) -> ErrorResponse | None:
        """Has the engine read a version, which serves from now on if it is good."""
        if served.refused is not None and served.refused[0] == folder:
            return served.refused[1]
        if (missed := self._missed.find(folder)) is not None:
            return missed
        lora = served.lora if folder == served.folder else _request(folder)
        refusal = await registration.admit(self._models, lora, "model")
        if refusal is not None:
            return await self._refuse(served, folder, lora, refusal)
        if not self._is_ours(served):  # unloaded, or its folder taken away, meanwhile
            registration.without_waiting(registration.remove_later(self._models, lora))
            return None
        if lora is not served.lora:
            public_names(self._models)[folder.name] = lora
            if served.is_admitted or served.is_asked:
                self._remove_later(served.lora)
            if served.is_admitted:
                logger.info("Adapter directories: serving a new version of %s", folder.path)
        self._missed.forget(folder)
        served.folder, served.lora, served.is_admitted, served.refused = folder, lora, True, None
        served.is_asked = False
        return None

    async def _refuse(
        self, served: _Served, folder: AdapterVersion, lora: LoRARequest, refusal: ErrorResponse
    ) -> ErrorResponse | None:
        self._directories.tell(f"{folder.path} is refused: {_beginning(refusal.error.message)}")
        is_bad = refusal.error.code == HTTPStatus.BAD_REQUEST
        if is_bad and _is_by_its_files(refusal):
            served.refused = folder, refusal  # not read again until its files change
        else:
            self._missed.remember(folder, refusal)
        # Another engine may have taken it. What was only not to be had now, another API server may
        # serve: it had it read in better times.
        if is_bad or self._is_alone:
            registration.without_waiting(registration.remove(self._models, lora))
        if served.is_admitted or folder == served.folder or self._is_alone:
            return refusal
        # Another API server may have had the version before read: it serves on.
        if await registration.admit(self._models, served.lora) is not None:
            return refusal
        served.is_admitted = True
        return None

    async def _find(self, name: str) -> AdapterVersion | None:
        with contextlib.suppress(TimeoutError):
            return await self._looks.wait(self._directories.find, name)
        return None


async def start(models: Any) -> None:
    """Serves the adapters of the directories that the settings name, if they name any."""
    if not registration.acts_for(models):
        return
    vllm_config = models.engine_client.vllm_config
    settings = settings_of(vllm_config)
    if not settings.directories:
        return
    allowed = AllowedRoots(settings.allowed_roots, settings.directories)
    directories = AdapterDirectories(settings.directories, allowed)
    is_alone = vllm_config.parallel_config._api_process_count <= 1
    server = DirectoryServer(models, directories, is_alone=is_alone)
    DIRECTORY.set(models, server)
    await server.scan()
    registration.in_background(server.watch())


async def prepare(models: Any, name: str) -> ErrorResponse | None:
    server = DIRECTORY.get(models)
    return None if server is None else await server.prepare(name)


def refused(models: Any) -> dict[int, str]:
    server = DIRECTORY.get(models)
    return {} if server is None else server.refused()


def _request(folder: AdapterVersion) -> LoRARequest:
    return LoRARequest(lora_name=folder.name, lora_int_id=folder.number, lora_path=folder.path)


def _is_by_its_files(refusal: ErrorResponse) -> bool:
    """Whether what is wrong is in the two files by which versions are told apart.

    While these stay as they are, a signature may be put beside them, and keys or required digests
    may become others.
    """
    codes = {problem.code for problem in getattr(refusal.error, "problems", ())}
    return bool(codes) and codes.isdisjoint(TRUST_CODES)


def _beginning(message: str) -> str:
    """The first problems of an adapter: a new version may have a hundred others every time."""
    problems = message.splitlines()
    rest = "" if len(problems) <= _MAX_NAMED else "\n(requests for it are told all)"
    return "\n".join(problems[:_MAX_NAMED]) + rest


class PendingLooks:
    """Looks by some threads that have not ended; used on one event loop.

    Nobody waits for one longer than the limit. It goes on all the same, and a thread that stands
    still has it in its queue until then: so there are not more of them than a thousand.
    """

    def __init__(self, threads: ThreadPoolExecutor, limit_s: float) -> None:
        self._threads, self._limit_s = threads, limit_s
        self._looks: set[asyncio.Future[Any]] = set()

    async def wait(self, function: Callable[[*_Ts], _T], *values: *_Ts) -> _T:
        """Has a thread look, by calling a function, and waits for what it finds.

        Raises:
            TimeoutError: It has not ended in time, or too many others have not.
        """
        if len(self._looks) >= _MAX_LOOKS:
            raise TimeoutError("too many looks at storage have not ended")
        look = asyncio.get_running_loop().run_in_executor(self._threads, function, *values)
        self._looks.add(look)
        look.add_done_callback(self._ended)
        await asyncio.wait({look}, timeout=self._limit_s)
        if not look.done():
            raise TimeoutError(f"storage has not answered within {self._limit_s:g} s")
        return look.result()

    def _ended(self, look: asyncio.Future[Any]) -> None:
        self._looks.discard(look)
        if not look.cancelled():
            look.exception()  # nobody may be left to hear of it, and asyncio would log each
