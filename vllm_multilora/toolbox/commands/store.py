"""`vllm-multilora store`: runs this user's store by hand, or shows its state."""

from __future__ import annotations

import argparse
import json
import socket
import time
from typing import Any, NoReturn

import msgspec

from vllm_multilora.errors import MultiLoRAError
from vllm_multilora.slots.budget import held, readable
from vllm_multilora.store.clients.client import StoreClient
from vllm_multilora.store.protocol import store_folder
from vllm_multilora.store.protocol.messages import Description
from vllm_multilora.store.protocol.store_folder import StoreUnavailableError
from vllm_multilora.store.store_launch import RunningStore, become_store
from vllm_multilora.toolbox.commands.output.text_table import aligned

_ANSWER_S = 5.0
_HEADER = ("CLIENT", "SERVER", "PROCESS", "WANTS", "LEASES")
_RIGHT = frozenset((2, 3, 4))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--describe",
        action="store_true",
        help="show the running store: clients, memory, and how its checks are sandboxed",
    )
    parser.add_argument("--json", action="store_true", help="with --describe: print JSON")


def run(arguments: argparse.Namespace) -> int:
    """Shows a store, or becomes one, which takes this process's place."""
    if arguments.json and not arguments.describe:
        raise MultiLoRAError("--json needs --describe: it prints the same as JSON")
    if not arguments.describe:
        _become_store()
    host = RunningStore()
    found = describe(host)
    if arguments.json:
        print(json.dumps({"socket": str(host.path), **_fields(found)}))
    else:
        print("\n".join(table(found, str(host.path))))
    return 0


def _become_store() -> NoReturn:
    """Listens, says so, and makes a store of this process, which has one thread then."""
    listener = _listen()
    print(f"the store of this user listens at {listener.getsockname()}")
    print("servers with --enable-lora find it there; Ctrl-C ends it", flush=True)
    become_store(listener)


def _listen() -> socket.socket:
    place = store_folder.store_folder()
    path = store_folder.socket_path(place)
    with store_folder.locked(place):
        try:
            store_folder.connect(path).close()
        except OSError:
            return store_folder.listen(path)
    raise StoreUnavailableError(
        f"a store of this user is already running at {path}: `vllm-multilora store --describe` "
        "shows whose it is; one that a server started ends a moment after its last client"
    )


def describe(host: RunningStore, patience_s: float = _ANSWER_S) -> Description:
    """What the store says of itself.

    Raises:
        StoreUnavailableError: None runs, or it does not answer within so many seconds.
    """
    client = StoreClient(host, "", role="observer")
    try:
        client.describe()
        deadline = time.monotonic() + patience_s
        while (left := deadline - time.monotonic()) > 0:
            for message in client.poll(left):
                if isinstance(message, Description):
                    return message
    finally:
        client.close()
    raise StoreUnavailableError(
        f"the store at {host.path} has not answered within {patience_s:g} seconds; requests for "
        "adapters in slots go on, others wait; if this persists, end its process: servers start "
        "another one"
    )


def table(found: Description, path: str) -> list[str]:
    """The lines of a table: the store, its memory and loads, and a client a line."""
    protection, totals = ", ".join(found.protection) or "none", found.totals
    memory = held(totals.adapters, totals.bytes, totals.adapters_limit, totals.bytes_limit)
    lines = [
        f"store        process {found.pid}, at {path}",
        f"checks       {protection}",
        f"host memory  {memory}; its segments take {readable(found.segment_bytes)}",
        f"loads        {found.queued} waiting, {found.reading} under way, "
        f"{found.stuck} killed that do not end",
    ]
    rows = [
        (one.role, one.server, str(one.pid), str(one.load_requests), str(one.leases))
        for one in found.clients
    ]
    return [*lines, "", *aligned([_HEADER, *rows], right=_RIGHT)]


def _fields(message: Any) -> Any:
    """A message and what is in it as mappings."""
    if isinstance(message, msgspec.Struct):
        return {key: _fields(value) for key, value in msgspec.structs.asdict(message).items()}
    return [_fields(one) for one in message] if isinstance(message, list) else message
