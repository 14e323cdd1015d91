"""Adapters that a worker is given as tensors, as frameworks for training do.

The worker writes each to a folder in memory. Its engine core has the store check and pack that
folder, as it has for any other, and deletes it when a later version is in use.
"""

from __future__ import annotations

import json
import re
import shutil
import tempfile
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, is_dataclass
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import TensorSpec, serialize_file

from vllm_multilora.adapters.files.adapter_folder import CONFIG_NAME, TENSORS_NAME
from vllm_multilora.errors import MultiLoRAError
from vllm_multilora.integration.memory_folders import own_folder

if TYPE_CHECKING:
    from vllm.lora.lora_model import LoRAModel
    from vllm.lora.request import LoRARequest

_CONFIGS = ("peft_config", "lora_config")
"""Fields of frameworks' requests that hold the adapter's configuration, beside `lora_tensors`."""

SWAP = "in_flight"
"""Field `swap` of requests after which running ones go on with the new weights."""


@dataclass(frozen=True)
class Push:
    """An adapter that a worker was given.

    Attributes:
        number, name, path: As in the request that brought it.
        folder: Where it was written; None: this worker was told to forget the adapter.
        in_flight: Whether running requests go on with it.
        expected_version: The beginning of the digest of what it may replace; None: of anything.
    """

    number: int
    name: str = ""
    path: str = ""
    folder: str | None = None
    in_flight: bool = False
    expected_version: str | None = None


class PushedTensors:
    """What a worker was given since its engine core last asked, and the numbers that it has.

    Args:
        writes: Whether this worker writes folders. All workers get the same tensors, so one of
            each machine does.
    """

    def __init__(self, *, writes: bool) -> None:
        self._writes = writes
        self._numbers: set[int] = set()
        self._pushes: dict[int, Push] = {}

    def add(
        self, request: LoRARequest, config: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]
    ) -> None:
        """Takes an adapter in; a later one of its number takes its place.

        Raises:
            OSError: There is no room for it in memory.
        """
        number, swap = request.lora_int_id, getattr(request, "swap", None)
        if swap not in (None, SWAP):
            found = f"found swap {swap!r}, expected {SWAP!r} or none"
            raise MultiLoRAError(f"adapter {request.lora_name!r}: {found}")
        if self._writes:
            folder = Path(tempfile.mkdtemp(prefix=f"{number}-", dir=own_folder()))
            try:
                (folder / CONFIG_NAME).write_text(json.dumps(config, default=_plain))
                _write(tensors, folder / TENSORS_NAME)
            except BaseException:
                shutil.rmtree(folder, ignore_errors=True)
                raise
            expected = getattr(request, "expected_version", None)
            name, path = request.lora_name, request.lora_path
            self._note(Push(number, name, path, str(folder), swap == SWAP, expected))
        self._numbers.add(number)

    def remove(self, number: int) -> bool:
        """Forgets an adapter; whether it was given to this worker."""
        if number not in self._numbers:
            return False
        self._numbers.remove(number)
        if self._writes:
            self._note(Push(number))
        return True

    def _note(self, push: Push) -> None:
        """Notes what has become of an adapter; what came before it was never asked for."""
        before = self._pushes.get(push.number)
        if before is not None and before.folder is not None:
            shutil.rmtree(before.folder, ignore_errors=True)
        self._pushes[push.number] = push

    def take(self) -> list[Push]:
        """What has changed since the last call."""
        taken, self._pushes = list(self._pushes.values()), {}
        return taken


def tensors_in(request: LoRARequest) -> tuple[Mapping[str, Any], Mapping[str, Any]] | None:
    """The configuration and the tensors in a framework's request; None if it has no tensors.

    Raises:
        MultiLoRAError: It has tensors and no configuration.
    """
    tensors = getattr(request, "lora_tensors", None)
    if not tensors:
        return None
    config = next((found for name in _CONFIGS if (found := getattr(request, name, None))), None)
    if config is None:
        raise MultiLoRAError(
            f"adapter {request.lora_name!r} came as tensors without a configuration: give the "
            f"request PEFT's, as a mapping, in its field {_CONFIGS[0]}"
        )
    if is_dataclass(config) and not isinstance(config, type):
        config = asdict(config)
    return config, tensors


def tensors_of(model: LoRAModel) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """A configuration and tensors for what another program has loaded as vLLM's `LoRAModel`."""
    factors = {
        name: (weights.rank, round(float(weights.scaling) * weights.rank, 6))
        for name, weights in model.loras.items()
    }
    rank, alpha = Counter(factors.values()).most_common(1)[0][0] if factors else (1, 1.0)
    others = {re.escape(name): each for name, each in factors.items() if each != (rank, alpha)}
    config = {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": alpha,
        "target_modules": sorted({name.rpartition(".")[2] for name in factors}),
        "rank_pattern": {name: own_rank for name, (own_rank, _) in others.items()},
        "alpha_pattern": {name: own_alpha for name, (_, own_alpha) in others.items()},
    }
    tensors = {}
    for name, weights in model.loras.items():
        tensors[f"base_model.model.{name}.lora_A.weight"] = weights.lora_a
        tensors[f"base_model.model.{name}.lora_B.weight"] = weights.lora_b
    return config, tensors


def _write(tensors: Mapping[str, torch.Tensor], path: Path) -> None:
    """As safetensors' `save_file` in a third of its time, for running requests wait meanwhile."""
    on_host = {name: tensor.detach().to("cpu").contiguous() for name, tensor in tensors.items()}
    specs = {
        name: TensorSpec(
            dtype=str(tensor.dtype).removeprefix("torch."),
            shape=tensor.shape,
            data_ptr=tensor.data_ptr(),
            data_len=tensor.nbytes,
        )
        for name, tensor in on_host.items()
    }
    serialize_file(specs, path)


def _plain(value: Any) -> Any:
    """What JSON has for values of PEFT's configuration."""
    if isinstance(value, Enum):
        return value.value
    return sorted(value) if isinstance(value, set | frozenset) else str(value)
