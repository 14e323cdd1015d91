"""Chats with the templates that adapters bring, of those that the operator has allowed.

A template is a program, and vLLM runs it in the process that answers everybody: it may loop for
hours, or double a text until memory is used up, and neither a look at it nor a trial can tell. So
only templates run that the operator has put into a folder. A customer's file is read by a process
without rights, compared with these, and never run.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers.utils.chat_template_utils import render_jinja_template

from vllm_multilora.adapters.files.missing_files import is_url
from vllm_multilora.errors import ConfigError
from vllm_multilora.failures import FailureKind, LoadFailure
from vllm_multilora.integration.attached import Attached
from vllm_multilora.integration.blends import blend_of
from vllm_multilora.integration.failed_requests import AdapterRefusedError, without_folder
from vllm_multilora.integration.patching.activation import settings_of
from vllm_multilora.integration.server.settings import gateway_activation
from vllm_multilora.store.jobs.template_reader import read_apart
from vllm_multilora.store.store_launch import environment
from vllm_multilora.tenants.rules import INVOCATIONS

if TYPE_CHECKING:
    from vllm.lora.request import LoRARequest

OWN_TEMPLATES: Attached[OwnTemplates] = Attached("own-chat-templates")
"""By an API server's client of its engines, where the settings allow templates of adapters."""

_FLAG = "--multilora-adapter-chat-templates"
_CHATS = "/v1/chat/completions"
_TAKERS = (_CHATS, f"{_CHATS}/batch", f"{_CHATS}/render", "/tokenize", INVOCATIONS)
"""Paths whose bodies have a `chat_template`; no others take a chat of such an adapter."""


class OwnTemplates:
    """The templates of adapters; `known` has each version's, None where it is the base model's.

    Raises:
        ConfigError: A template in the folder cannot be used, or this model's chats have none.
    """

    def __init__(self, client: Any, args: Any) -> None:
        settings, model = settings_of(client.vllm_config), client.vllm_config.model_config
        is_harmony = model.hf_config.model_type == "gpt_oss"
        if is_harmony or type(client.renderer).__name__ != "HfRenderer":
            raise ConfigError(f"{_FLAG}: vLLM renders this model's chats without a template")
        self._roots = settings.allowed_roots, settings.directories
        self._tokenizer = client.get_tokenizer()
        self._trusts_clients = gateway_activation.TRUSTS_CLIENTS.get(args)
        self.known: dict[int, str | None] = {}
        self._allowed: set[str] = set()
        folder = Path(str(settings.adapter_chat_templates))
        chat, names = [{"role": "user", "content": "hello"}], self._tokenizer.special_tokens_map
        try:
            for file in [each for each in folder.iterdir() if each.suffix == ".jinja"]:
                text = file.read_text("utf-8").removesuffix("\n")
                render_jinja_template([chat], chat_template=text, **names)
                self._allowed.add(text)
        except Exception as error:  # whatever a template raises
            expected = "expected a folder of *.jinja, each of which renders a short chat"
            raise ConfigError(f"{_FLAG} {folder}: found {error!r}, {expected}") from error

    def fault_in(self, fields: Mapping[str, Any]) -> str | None:
        """Why a request is refused that brings a template along, as vLLM refuses it."""
        more = fields.get("chat_template_kwargs")
        in_more = more.get("chat_template") if isinstance(more, dict) else None
        if self._trusts_clients or (fields.get("chat_template") is None and in_more is None):
            return None
        return "Found a chat template, expected none without --trust-request-chat-template."

    async def of(self, lora: LoRARequest) -> str | None:
        """The template of an adapter's version, or None; raises `AdapterRefusedError`."""
        number, is_read = lora.lora_int_id, blend_of(lora) is None and not is_url(lora.lora_path)
        if is_read and number not in self.known:
            self.known[number] = await self._read(lora)
        return self.known.get(number)

    async def apply(self, path: str, lora: LoRARequest, fields: dict[str, Any]) -> None:
        """Writes an adapter's template into a chat's JSON fields; raises `AdapterRefusedError`."""
        is_chat = "messages" in fields or path == "/v1/responses"
        if not is_chat or fields.get("chat_template") is not None:
            return
        if (template := await self.of(lora)) is not None:
            if path not in _TAKERS:
                raise _refused(lora, f"it is not used at {path}, expected {_CHATS}")
            fields["chat_template"] = json.dumps(template).encode()

    async def _read(self, lora: LoRARequest) -> str | None:
        read = await asyncio.to_thread(read_apart, lora.lora_path, *self._roots, environment())
        if "error" in read:
            raise _refused(lora, read["error"])
        if (template := read["template"]) is None:
            return None
        template, vocabulary = str(template).removesuffix("\n"), self._tokenizer.get_vocab()
        if added := [each for each in read["tokens"] if each not in vocabulary]:
            expected = "expected the base model's alone: a served model's vocabulary cannot grow"
            raise _refused(lora, f"its tokenizer adds the token {added[0]!r:.99}, {expected}")
        if template == str(self._tokenizer.chat_template).removesuffix("\n"):
            return None
        if template not in self._allowed:
            raise _refused(
                lora, f"it is not in the folder of {_FLAG}: an operator may put it there"
            )
        return template


def allow_templates(client: Any, args: Any) -> None:
    """Has an API server use adapters' own templates, where its settings allow them."""
    config = getattr(client, "vllm_config", None)
    if config is None or settings_of(config).adapter_chat_templates is None:
        return
    if gateway_activation.manages_adapters(config):
        OWN_TEMPLATES.set(client, OwnTemplates(client, args))


def _refused(lora: LoRARequest, reason: str) -> AdapterRefusedError:
    message = without_folder(f"chat template of {lora.lora_name!r}: {reason}", lora)
    return AdapterRefusedError(lora.lora_int_id, LoadFailure(FailureKind.INVALID, message), [])
