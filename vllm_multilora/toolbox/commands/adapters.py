"""`vllm-multilora adapters sync`: has several servers serve the adapters of one folder."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial

from vllm_multilora.adapters.directory import (
    AdapterDirectories,
    AdapterVersion,
    Settling,
    require_directories,
)
from vllm_multilora.adapters.files.allowed_roots import AllowedRoots
from vllm_multilora.errors import ConfigError
from vllm_multilora.toolbox.clients.adapter_servers import AdapterServer, LoadRefusedError, connect
from vllm_multilora.toolbox.clients.http_client import UnreachableError, base_url
from vllm_multilora.toolbox.commands.shared_arguments import add_api_key, require_seconds

DONE, NOT_ALL = 0, 1
_EVERY_S = 5.0
_RETRY_S = 60.0
"""Between two attempts to load files that a server has refused: it may have had no room."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("action", choices=("sync",), help="load on all servers what is in FOLDER")
    parser.add_argument(
        "folder",
        metavar="FOLDER",
        help="its sub-folders are adapters, served by their names; servers read them by this path",
    )
    parser.add_argument(
        *("--workers", "--url"),
        nargs="+",
        required=True,
        metavar="URL",
        help="vLLM servers, or system ports of Dynamo's workers",
    )
    parser.add_argument(
        "--every",
        nargs="?",
        type=float,
        const=_EVERY_S,
        metavar="SECONDS",
        help="look again every SECONDS "
        f"(default: {_EVERY_S:.0f}) until Ctrl-C: at the folder, and for servers that have been "
        "started again",
    )
    parser.add_argument(
        "--remove", action="store_true", help="unload what servers have and FOLDER has not"
    )
    add_api_key(parser)


def run(arguments: argparse.Namespace) -> int:
    require_seconds("--every", arguments.every)
    try:
        require_directories([arguments.folder])
    except ConfigError as error:
        raise ConfigError(f"FOLDER is no directory that can be read: {error.__cause__}") from error
    urls = dict.fromkeys(map(base_url, arguments.workers))
    workers = [_Worker(url, arguments.api_key, removes=arguments.remove) for url in urls]
    directory = AdapterDirectories([arguments.folder], AllowedRoots([]))
    settling = Settling()
    while True:
        found = settling.settle(directory.scan())
        # A folder without weights is still being written.
        versions = {name: folder for name, folder in found.items() if folder.weights is not None}
        with ThreadPoolExecutor(len(workers)) as threads:  # none waits for another that is slow
            are_done = [*threads.map(partial(_Worker.look, versions=versions), workers)]
        try:
            if arguments.every is not None:
                time.sleep(arguments.every)
                continue
        except KeyboardInterrupt:
            pass  # the end of a watch
        return DONE if all(are_done) else NOT_ALL


class _Worker:
    """What this process knows of one server; it may unload adapters without a folder."""

    def __init__(self, url: str, api_key: str | None, *, removes: bool) -> None:
        self._url = url
        self._api_key = api_key
        self._removes = removes
        self._loaded: dict[str, AdapterVersion] = {}
        self._refused: dict[str, tuple[AdapterVersion, float]] = {}
        self._error: str | None = None  # why it could not be asked the last time

    def look(self, versions: Mapping[str, AdapterVersion]) -> bool:
        """Loads what is missing or has changed; whether all is as it should be."""
        try:
            server, there = connect(self._url, self._api_key)
            self._error = None
            # What it has not any more it has lost: it was started again.
            self._loaded = {name: known for name, known in self._loaded.items() if name in there}
            for name, version in versions.items():
                # What is there and was loaded by somebody else may be of other files.
                if self._loaded.get(name) != version:
                    self._load(server, name, version, is_new=name not in there)
            for name in sorted(there - versions.keys()) if self._removes else ():
                self._unload(server, name)
        except UnreachableError as error:
            if str(error) != self._error:
                _say_wrong(str(error))
            self._error = str(error)
            return False
        return all(self._loaded.get(name) == version for name, version in versions.items())

    def _unload(self, server: AdapterServer, name: str) -> None:
        try:
            server.unload(name)
            print(f"{self._url}: {name} unloaded", flush=True)
        except LoadRefusedError as error:
            _say_wrong(f"{self._url}: {name} cannot be unloaded: {error}")

    def _load(
        self, server: AdapterServer, name: str, version: AdapterVersion, *, is_new: bool
    ) -> None:
        refused, until = self._refused.get(name, (None, 0.0))
        if refused == version and time.monotonic() < until:
            return
        try:
            if not server.load(name, version.path, is_new=is_new) and name in self._loaded:
                raise LoadRefusedError(
                    "the worker keeps the version that it has; one that was started with "
                    "DYN_LORA_HOTSWAP_ENABLED=true takes changed files"
                )
        except LoadRefusedError as error:
            self._refused[name] = version, time.monotonic() + _RETRY_S
            if refused != version:
                _say_wrong(f"{self._url}: {name} refused: {error}")
            return
        self._refused.pop(name, None)
        self._loaded[name] = version
        print(f"{self._url}: {name} loaded", flush=True)


def _say_wrong(what: str) -> None:
    print(f"vllm-multilora adapters: {what}", file=sys.stderr, flush=True)
