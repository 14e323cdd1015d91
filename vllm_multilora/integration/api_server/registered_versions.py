"""Which version of its weights each registered adapter is, in an engine's client."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from vllm_multilora.integration.attached import Attached
from vllm_multilora.integration.blends import blend_of

if TYPE_CHECKING:
    from vllm.lora.request import LoRARequest

VERSIONS: Attached[dict[int, Version]] = Attached("versions")
"""The version of each registered adapter of an engine client, by the adapter's number."""


@dataclass(frozen=True)
class Version:
    """What is known of an adapter's weights."""

    digest: str
    loaded: float
    kind: str
    invocation: tuple[int, ...] = ()

    @property
    def invocation_text(self) -> str:
        """The invocation as `read_invocation` reads it."""
        return ",".join(map(str, self.invocation))


def read_invocation(text: str) -> tuple[int, ...]:
    """Token ids from a text."""
    return tuple(map(int, text.split(","))) if text else ()


def note(client: Any, adapter: int, version: Version) -> None:
    """An adapter was registered; registering the same again changes nothing."""
    known = VERSIONS.get_or_make(client, dict)
    if adapter not in known or known[adapter].digest != version.digest:
        known[adapter] = version


def forget(client: Any, adapter: int) -> None:
    """An adapter is gone."""
    (VERSIONS.get(client) or {}).pop(adapter, None)


def find(client: Any, lora: LoRARequest) -> Version | None:
    """The version that an adapter was registered in; None if no engine has read it yet.

    That of a blend follows from those of its parts.
    """
    known = VERSIONS.get(client) or {}
    blend = blend_of(lora)
    if blend is None:
        return known.get(lora.lora_int_id)
    parts = [known[part.number] for part in blend.parts if part.number in known]
    if len(parts) < len(blend.parts):
        return None
    loaded = max(part.loaded for part in parts)
    return Version(blend.digest([part.digest for part in parts]), loaded, "blend")
