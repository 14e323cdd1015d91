"""A digest that identifies an adapter: it covers everything that decides what it computes.

It is BLAKE3 over

- the configuration as it is understood: rank, alpha, rank and alpha patterns in their order,
  `use_rslora`, `use_dora`, `bias`, `modules_to_save` without its order, and
  `alora_invocation_tokens` where there are any;
- every tensor by its name in the checkpoint: data type, shape and bytes.

Nothing else is in it: not the adapter's name or path, the name of its base model, keys that
training alone needs (dropout, `task_type`, `target_modules`, which the tensors say themselves),
the layout of the JSON, metadata, the order of tensors in the file, or whether the file is in
safetensors or pickle format. So it is the same on every server and after every restart.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import fields
from typing import Any

from blake3 import blake3

from vllm_multilora.adapters.config.adapter_config import AdapterConfig
from vllm_multilora.adapters.files.header import TensorInfo

DIGITS = 64
"""Hexadecimal digits of a digest."""

_KIND = b"vllm-multilora adapter 2\n"
_WITHOUT_EFFECT = frozenset({"base_model", "target_modules"})
_WITHOUT_ORDER = frozenset({"modules_to_save", "target_weights"})
_WHERE_SET = frozenset({"invocation_tokens", "target_weights"})


class AdapterDigest:
    """The digest of an adapter whose tensors' bytes are shown in the order of the file."""

    def __init__(self, config: AdapterConfig, tensors: Mapping[str, TensorInfo]) -> None:
        self._config = config
        self._tensors = tensors
        # Of each tensor by itself, so that their order in the file does not matter.
        self._digests: dict[str, bytes] = dict.fromkeys(tensors, blake3().digest())
        # Tensors are in the order of their bytes.
        sizes = ((name, info.end - info.begin) for name, info in tensors.items())
        self._coming = iter([(name, size) for name, size in sizes if size])
        self._name, self._left, self._hash = "", 0, blake3()

    def update(self, content: memoryview) -> None:
        at = 0
        while at < len(content):
            if not self._left:
                name, size = next(self._coming)
                piece = content[at : at + size]
                at += len(piece)
                if len(piece) == size:  # most tensors are small
                    self._digests[name] = blake3(piece).digest()
                else:
                    self._name, self._left, self._hash = name, size - len(piece), blake3(piece)
                continue
            piece = content[at : at + self._left]
            self._hash.update(piece)
            at += len(piece)
            self._left -= len(piece)
            if not self._left:
                self._digests[self._name] = self._hash.digest()

    def hexdigest(self) -> str:
        """The digest, `DIGITS` hexadecimal digits, once all bytes have been shown."""
        names = sorted(self._tensors)
        infos = (self._tensors[name] for name in names)
        content = {
            "config": dict(_effective(self._config)),
            "tensors": [
                [name, info.dtype.name, info.shape] for name, info in zip(names, infos, strict=True)
            ],
        }
        text = json.dumps(content, sort_keys=True, separators=(",", ":")).encode()
        whole = blake3(_KIND + len(text).to_bytes(8, "little") + text)
        whole.update(b"".join(self._digests[name] for name in names))
        return whole.hexdigest()


def _effective(config: AdapterConfig) -> Iterable[tuple[str, Any]]:
    """What of a configuration decides on the adapter, as JSON."""
    for field in fields(config):
        if not field.compare or field.name in _WITHOUT_EFFECT:
            continue
        value = getattr(config, field.name)
        if field.name in _WHERE_SET and not value:
            continue
        if isinstance(value, Mapping):  # patterns: the first that fits counts
            value = list(value.items())
        elif field.name in _WITHOUT_ORDER:
            value = sorted(set(value))
        yield field.name, value
