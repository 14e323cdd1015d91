"""Loads and unloads adapters on running servers: vLLM's with this plugin, and Dynamo's workers."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from http import HTTPStatus
from typing import Any
from urllib.parse import quote

from vllm_multilora.errors import MultiLoRAError
from vllm_multilora.tenants.rules import STATUS
from vllm_multilora.toolbox.clients.http_client import UnreachableError, base_url, get_json, send

LOAD_TIMEOUT_S = 600.0
"""A load waits for those before it, and a worker of Dynamo's for running answers."""

_DYNAMO = "/v1/loras"


class LoadRefusedError(MultiLoRAError):
    """A server does not take an adapter, and says why."""


class AdapterServer(ABC):
    """One server or worker; its methods raise UnreachableError if it does not answer."""

    def __init__(self, url: str, api_key: str | None) -> None:
        self._url = url
        self._api_key = api_key

    @abstractmethod
    def loaded(self) -> set[str]:
        """The adapters that it has names for."""

    @abstractmethod
    def load(self, name: str, folder: str, *, is_new: bool) -> bool:
        """Has it serve what a folder that it can read has now; `is_new`: under a name new to it.

        Returns:
            False if it keeps the version that it has, whatever is in the folder.

        Raises:
            LoadRefusedError: It cannot serve the adapter.
        """

    @abstractmethod
    def unload(self, name: str) -> None:
        """Takes an adapter away; raises as `load`."""

    def _send(self, method: str, path: str, body: Any = None) -> str:
        key, limit = self._api_key, LOAD_TIMEOUT_S
        try:
            return send(method, f"{self._url}{path}", body, api_key=key, timeout_s=limit)
        except UnreachableError as error:
            if error.status is None or error.status == HTTPStatus.UNAUTHORIZED:
                raise
            raise LoadRefusedError(error.answer or str(error)) from error


class _VllmServer(AdapterServer):
    def loaded(self) -> set[str]:
        return {row["id"] for row in fetch(self._url, api_key=self._api_key)["data"]}

    def load(self, name: str, folder: str, *, is_new: bool) -> bool:
        body = {"lora_name": name, "lora_path": folder, "load_inplace": not is_new}
        self._send("POST", "/v1/load_lora_adapter", body)
        return True

    def unload(self, name: str) -> None:
        self._send("POST", "/v1/unload_lora_adapter", {"lora_name": name})


class _DynamoWorker(AdapterServer):
    def loaded(self) -> set[str]:
        return set(get_json(f"{self._url}{_DYNAMO}", api_key=self._api_key)["loras"])

    def load(self, name: str, folder: str, *, is_new: bool) -> bool:
        body = {"lora_name": name, "source": {"uri": f"file://{folder}"}}
        answer = json.loads(self._send("POST", _DYNAMO, body))
        return is_new or bool(answer.get("hot_swap"))

    def unload(self, name: str) -> None:
        self._send("DELETE", f"{_DYNAMO}/{quote(name, safe='')}")


def connect(url: str, api_key: str | None) -> tuple[AdapterServer, set[str]]:
    """Finds out what answers at an address, and which adapters it has names for.

    That is a vLLM server, or the system port of a worker of Dynamo's; a key must be one that may
    load adapters.

    Raises:
        UnreachableError: Nothing there loads adapters.
    """
    error: Exception | None = None
    for kind in (_DynamoWorker, _VllmServer):
        server: AdapterServer = kind(base_url(url), api_key)
        try:
            return server, server.loaded()
        except UnreachableError as unreachable:
            if unreachable.status is None or unreachable.status == HTTPStatus.UNAUTHORIZED:
                raise
            error = unreachable
        except (KeyError, TypeError) as other:  # some other answer
            error = other
    raise UnreachableError(
        f"{url} loads no adapters: expected a vLLM server with vllm-multilora and --enable-lora, "
        "or the system port of a Dynamo worker with DYN_LORA_ENABLED=true"
    ) from error


def fetch(url: str, *, api_key: str | None) -> dict[str, Any]:
    """What a server says of its adapters; to some keys it says no folders, or no totals.

    Raises:
        UnreachableError: It says nothing of the kind.
    """
    try:
        listing = get_json(f"{url}{STATUS}", api_key=api_key)
    except UnreachableError as error:
        hint = ""
        if error.status == HTTPStatus.NOT_FOUND:
            hint = "; is it a vLLM server with vllm-multilora and --enable-lora?"
        raise UnreachableError(f"{error}{hint}", error.status, error.answer) from error
    if not (isinstance(listing, dict) and isinstance(listing.get("data"), list)):
        what = f"{url}{STATUS} did not answer with a list of adapters"
        raise UnreachableError(what, HTTPStatus.OK)
    return listing
