"""Whether a KV connector's stores can tell adapters apart.

Connectors that look up blocks by vLLM's hashes can, since the hashes contain the digest of the
weights. So can those that pass a request's blocks from one engine to another. Others make keys of
their own, from tokens alone: what one adapter has computed is then found for another, in stock vLLM
too.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from vllm_multilora.errors import ConfigError

if TYPE_CHECKING:
    from vllm.config import KVTransferConfig

logger = logging.getLogger(__name__)

_BY_TOKENS = frozenset(
    {
        "ExampleConnector",
        "HF3FSKVConnector",
        "LMCacheConnectorV1",
        "LMCacheMPConnector",
    }
)
_BY_HASHES = frozenset(
    {"MooncakeStoreConnector", "OffloadingConnector", "SimpleCPUOffloadConnector"}
)
_BY_REQUEST = frozenset(
    {
        "DecodeBenchConnector",
        "ExampleHiddenStatesConnector",
        "HiSparseConnector",
        "MooncakeConnector",
        "MoRIIOConnector",
        "NixlConnector",
        "NixlPullConnector",
        "NixlPushConnector",
    }
)


def require_adapters_apart(transfer: KVTransferConfig | None) -> None:
    """Refuses connectors that would mix adapters, and warns of those that nobody knows.

    Args:
        transfer: vLLM's settings of KV connectors; None: there is none.

    Raises:
        ConfigError: A connector finds blocks by tokens alone.
    """
    if transfer is None or transfer.kv_connector is None:
        return
    of_all = {
        "kv_connector": transfer.kv_connector,
        "kv_connector_module_path": transfer.kv_connector_module_path,
        "kv_connector_extra_config": transfer.kv_connector_extra_config,
    }
    for name, is_vllms in _connectors(of_all):
        if is_vllms and name in _BY_TOKENS:
            raise ConfigError(
                f"the KV connector {name} looks up blocks by their tokens alone, so one adapter "
                "would be answered with what another has computed: serve without --enable-lora, or "
                "use a connector that looks up vLLM's block hashes, such as OffloadingConnector"
            )
        if not is_vllms or name not in _BY_HASHES | _BY_REQUEST:
            logger.warning(
                "vllm-multilora does not know the KV connector %s: unless it looks up blocks by "
                "vLLM's block hashes (Request.block_hashes), one adapter is answered with what "
                "another has computed.",
                name,
            )


def _connectors(settings: Mapping[str, Any]) -> Iterator[tuple[str, bool]]:
    """Names of connectors, those in others included, and whether they are vLLM's own."""
    name, is_vllms = settings.get("kv_connector", ""), not settings.get("kv_connector_module_path")
    if not (is_vllms and name == "MultiConnector"):
        yield name, is_vllms
        return
    for one in (settings.get("kv_connector_extra_config") or {}).get("connectors", []):
        yield from _connectors(one)
