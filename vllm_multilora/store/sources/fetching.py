"""Load requests for adapters that are elsewhere: their files are fetched before they are queued.

The registry behind this one knows folders only. A request for a URL waits here until a fetching
child has the files in the disk cache, and goes on with the folder there. What is said of that
folder names the URL instead.
"""

from __future__ import annotations

import os
import selectors
import time
from dataclasses import dataclass, field

import msgspec

from vllm_multilora.adapters.blend import Blend, BlendError
from vllm_multilora.adapters.files.missing_files import is_url
from vllm_multilora.adapters.model.size_limits import DEFAULT_LIMITS
from vllm_multilora.failures import FailureKind
from vllm_multilora.sources.disk_tier import lease_of
from vllm_multilora.sources.download import Bounds
from vllm_multilora.sources.source_errors import SourceError
from vllm_multilora.sources.source_url import SourceUrl, allowed_source, allowed_sources
from vllm_multilora.store.loads.loads import Effects
from vllm_multilora.store.loads.registry import Registry
from vllm_multilora.store.memory.entries import Client
from vllm_multilora.store.memory.held_packs import HostMemory
from vllm_multilora.store.protocol import messages as msg
from vllm_multilora.store.protocol.job_messages import Failure
from vllm_multilora.store.sources.credentials import handed_descriptors
from vllm_multilora.store.sources.fetch_child import FetchAnswer, FetchRequest, failure_of
from vllm_multilora.store.sources.fetches import Fetch, Fetches

RETRY_AFTER_S = 3.0
"""Seconds for which a failed fetch answers requests; registrations try again at once."""


@dataclass(eq=False)
class _Waiting:
    """A load request for an adapter of which parts are elsewhere.

    Attributes:
        numbers: By URL, the number of the adapter there: its own, or that of a blend's part.
        folders: By URL, where it is on disk; empty: not yet.
        leases: Descriptors that keep these folders there.
    """

    client: int
    request: msg.LoadRequest
    numbers: dict[str, int]
    folders: dict[str, str]
    leases: list[int] = field(default_factory=list)

    @property
    def is_fetching(self) -> bool:
        return "" in self.folders.values()

    @property
    def path(self) -> str:
        """What it is read from, all of it on disk."""
        folders, path = self.folders, self.request.path
        if (blend := Blend.read(path)) is None:
            return folders[path]
        return blend.at(lambda part: folders.get(part, part)).source

    def named(self, text: str) -> str:
        """A text with URLs instead of the folders that they were fetched to."""
        for url, folder in self.folders.items():
            text = text.replace(folder, url.rstrip("/")) if folder else text
        return text

    def close(self) -> None:
        while self.leases:
            os.close(self.leases.pop())


class FetchingRegistry(Registry):
    """A registry that knows URLs, too."""

    def __init__(
        self, memory: HostMemory, effects: Effects, selector: selectors.BaseSelector
    ) -> None:
        super().__init__(memory, effects)
        self._requests: dict[tuple[int, int], _Waiting] = {}
        self._fetches: Fetches[_Waiting] = Fetches(selector, self._fetched)
        # By server, adapter and URL, where it was fetched to; and by fetch, how it has failed.
        self._folders: dict[tuple[str, int, str], str] = {}
        self._failures: dict[FetchRequest, tuple[float, Failure]] = {}

    def request_load(self, number: int, load_request: msg.LoadRequest, now: float) -> None:
        client, numbers = self.clients[number], _urls_in(load_request)
        if not numbers or client.settings is None:
            super().request_load(number, load_request, now)
            return
        waiting = _Waiting(number, load_request, numbers, dict.fromkeys(numbers, ""))
        self._requests[number, load_request.ticket] = waiting
        for url in numbers:
            if (failure := self._find(client, waiting, url, now)) is not None:
                self._fail(waiting, failure)
                return
        if not waiting.is_fetching:
            self._go_on(waiting, now)

    def share(self, number: int, ticket: int, owner: str) -> None:
        waiting = self._requests.get((number, ticket))
        if waiting is None or not waiting.is_fetching:
            super().share(number, ticket, owner)
        elif owner not in waiting.request.owners:
            owners = (*waiting.request.owners, owner)
            waiting.request = msgspec.structs.replace(waiting.request, owners=owners)

    def cancel(self, number: int, ticket: int, now: float) -> None:
        self._take_back((number, ticket))
        super().cancel(number, ticket, now)

    def forget(self, number: int, adapter: int, now: float) -> None:
        whose = (self.clients[number].server, adapter)
        self._folders = {key: at for key, at in self._folders.items() if key[:2] != whose}
        gone = Failure(FailureKind.GONE, f"adapter {adapter} was withdrawn meanwhile", [])
        for waiting in list(self._requests.values()):
            is_its = (waiting.client, waiting.request.adapter) == (number, adapter)
            if is_its and waiting.is_fetching:
                self._fail(waiting, gone)
        super().forget(number, adapter, now)

    def client_gone(self, number: int, now: float) -> None:
        server = self.clients[number].server
        for key in [key for key in self._requests if key[0] == number]:
            self._take_back(key)
        super().client_gone(number, now)
        if server not in {client.server for client in self.clients.values()}:
            self._folders = {key: at for key, at in self._folders.items() if key[0] != server}

    def answered(self, number: int, message: msg.Message) -> msg.Message:
        """What a client is told, with URLs instead of the folders that they were fetched to."""
        if not isinstance(message, msg.Loaded | msg.Failed):
            return message
        waiting = self._requests.pop((number, message.ticket), None)
        if waiting is None:
            return message
        waiting.close()
        if isinstance(message, msg.Loaded):
            return message
        problems = [
            {
                key: waiting.named(text) if isinstance(text, str) else text
                for key, text in of.items()
            }
            for of in message.problems
        ]
        text = waiting.named(message.message)
        return msg.Failed(message.ticket, message.kind, text, problems)

    def close(self) -> None:
        """Ends all fetches; what they have fetched so far stays for the next ones."""
        self._fetches.close()

    def _find(self, client: Client, waiting: _Waiting, url: str, now: float) -> Failure | None:
        """Finds what is at a URL in the disk cache, or has it fetched; returns why it cannot be.

        The parts of a blend have numbers of their own, which stand for their versions.
        """
        number = waiting.numbers[url]
        is_fresh = waiting.request.fresh and number == waiting.request.adapter
        try:
            request, root = _fetch_request(client, url)
        except SourceError as error:
            return failure_of(error)
        if not is_fresh:
            until, failure = self._failures.get(request, (0.0, None))
            if failure is not None and now < until:
                return failure
            folder = self._folders.get((client.server, number, url), "")
            lease = lease_of(folder) if folder else None
            if lease is not None:
                waiting.leases.append(lease)
            if lease is not None or self._is_in_memory(client, waiting.request.adapter, folder):
                waiting.folders[url] = folder
                return None
        self._fetches.ask(request, root, waiting, is_fresh=is_fresh)
        return None

    def _is_in_memory(self, client: Client, adapter: int, folder: str) -> bool:
        """Whether an adapter is in host memory as read from a folder, which may have gone."""
        return any(
            binding.scope == client.scope and pack.bindings.get(binding) == folder
            for binding, pack in self.memory.bound(client.server, adapter).items()
        )

    def _fetched(self, fetch: Fetch[_Waiting], answer: FetchAnswer) -> None:
        now, url, failure = time.monotonic(), fetch.request.url, answer.failure
        self._failures = {key: one for key, one in self._failures.items() if now < one[0]}
        if failure is not None:
            self._failures[fetch.request] = now + RETRY_AFTER_S, failure
        for waiting in list(fetch.waiting):
            if self._requests.get((waiting.client, waiting.request.ticket)) is not waiting:
                continue  # taken back by what came of another
            if failure is not None:
                self._fail(waiting, failure)
                continue
            waiting.folders[url] = answer.folder
            if (lease := lease_of(answer.folder)) is not None:
                waiting.leases.append(lease)
            server = self.clients[waiting.client].server
            self._folders[server, waiting.numbers[url], url] = answer.folder
            if not waiting.is_fetching:
                self._go_on(waiting, now)

    def _go_on(self, waiting: _Waiting, now: float) -> None:
        """Queues a load request all of whose files are here."""
        request = msgspec.structs.replace(waiting.request, path=waiting.path)
        super().request_load(waiting.client, request, now)

    def _fail(self, waiting: _Waiting, failure: Failure) -> None:
        self._fetches.leave(waiting)
        ticket = waiting.request.ticket
        failed = msg.Failed(ticket, failure.kind, failure.message, failure.problems)
        self._effects.send(waiting.client, failed)

    def _take_back(self, key: tuple[int, int]) -> None:
        waiting = self._requests.pop(key, None)
        if waiting is not None:
            waiting.close()
            self._fetches.leave(waiting)


def _fetch_request(client: Client, url: str) -> tuple[FetchRequest, SourceUrl]:
    """What fetches a URL, from which source; raises `SourceError` where that is not allowed."""
    settings = client.settings
    assert settings is not None
    cache = settings.disk_cache or ""
    allowed = allowed_sources(settings.allowed_roots if cache else ())
    root = allowed_source(SourceUrl.parse(url), allowed)
    weights_bytes = sum(map(DEFAULT_LIMITS.most_bytes, client.layouts))
    is_signed = settings.signing_keys is not None
    bounds = Bounds(DEFAULT_LIMITS.config_bytes, weights_bytes, settings.timeout_s, is_signed)
    request = FetchRequest(
        url,
        tuple(map(str, allowed)),
        cache,
        settings.disk_cache_bytes,
        bounds,
        handed_descriptors(os.environ),
        settings.source_credentials,
    )
    return request, root


def _urls_in(request: msg.LoadRequest) -> dict[str, int]:
    """The URLs that an adapter is read from, each with the number of the adapter there."""
    if "://" not in request.path:
        return {}
    try:
        blend = Blend.read(request.path)
    except BlendError:
        return {}  # the registry says so
    if blend is None:
        return {request.path: request.adapter} if is_url(request.path) else {}
    return {part.path: part.number for part in blend.parts if is_url(part.path)}
