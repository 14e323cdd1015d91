"""How frameworks for training have vLLM's workers load adapters from tensors."""

import ctypes
import json
from pathlib import Path
from typing import Any

import msgspec
from vllm.lora.peft_helper import PEFTHelper
from vllm.lora.request import LoRARequest
from vllm.lora.worker_manager import LRUCacheWorkerLoRAManager

PATH = "of no folder"
SCHEME = "memory://"
"""Begins the paths of adapters that a framework's own loader has at hand."""


class TensorLoRARequest(LoRARequest):
    """An adapter that is in no folder."""

    peft_config: dict[str, Any] = msgspec.field(default_factory=dict)
    lora_tensors: dict[str, Any] = msgspec.field(default_factory=dict)
    swap: str | None = None
    expected_version: str | None = None


def of_tensors(number: int, folder: Path, factor: float = 1.0) -> TensorLoRARequest:
    """The adapter in a folder, as if it came from a training process.

    Args:
        number: Its number.
        folder: Where it is.
        factor: What all of its values are multiplied by.
    """
    from safetensors.torch import load_file

    config = json.loads((folder / "adapter_config.json").read_text())
    tensors = load_file(folder / "adapter_model.safetensors")
    tensors = {name: tensor * factor for name, tensor in tensors.items()}
    return TensorLoRARequest(str(number), number, PATH, peft_config=config, lora_tensors=tensors)


def take_over() -> None:
    """Has vLLM's manager of this process load what is in no folder, too."""
    original = LRUCacheWorkerLoRAManager._load_adapter

    def load(manager: Any, request: LoRARequest) -> Any:
        if request.lora_path.startswith(SCHEME):
            request = of_tensors(request.lora_int_id, Path(request.lora_path.removeprefix(SCHEME)))
        if not isinstance(request, TensorLoRARequest):
            return original(manager, request)
        helper = PEFTHelper.from_dict(request.peft_config)
        helper.validate_legal(manager.lora_config)
        mapper = getattr(manager._adapter_manager.model, "hf_to_vllm_mapper", None)
        if hasattr(mapper, "get_rename_mapper"):
            mapper = mapper.get_rename_mapper()
        return manager._lora_model_cls.from_lora_tensors(
            lora_model_id=request.lora_int_id,
            tensors=request.lora_tensors,
            peft_helper=helper,
            device="cpu",
            dtype=manager.lora_config.lora_dtype,
            weights_mapper=mapper,
        )

    LRUCacheWorkerLoRAManager._load_adapter = load  # type: ignore[method-assign]


class Extension:
    """Extension of a worker: vLLM's `worker_extension_cls`."""

    def push(self: Any, number: int, folder: Path, factor: float = 1.0) -> bool:
        """Puts an adapter in the place of the one that has its number."""
        self.remove_lora(number)
        return bool(self.add_lora(of_tensors(number, folder, factor)))

    def push_in_flight(
        self: Any, number: int, folder: Path, expected: str | None = None, swap: str = "in_flight"
    ) -> bool:
        """As `push`; running requests go on with it."""
        self.remove_lora(number)
        request = self.request(number, folder)
        request.swap, request.expected_version = swap, expected
        return bool(self.add_lora(request))

    def request(self, number: int, folder: Path) -> TensorLoRARequest:
        """The adapter in a folder, with a number."""
        return of_tensors(number, folder)

    def push_all(self: Any, folders: dict[int, Path]) -> bool:
        """Gives the worker several adapters at once."""
        return all(self.add_lora(of_tensors(*each)) for each in folders.items())

    def push_twice(self: Any, number: int, first: Path, second: Path) -> bool:
        """Gives the worker two versions in one call; the second one counts."""
        return all(self.add_lora(of_tensors(number, folder)) for folder in (first, second))

    def forget(self: Any, number: int) -> bool:
        return bool(self.remove_lora(number))

    def trim(self) -> None:
        """Gives back what the C library keeps of memory that nothing uses any more."""
        ctypes.CDLL(None).malloc_trim(0)


class KeptTensors(Extension):
    """Reads each folder once: a trainer has its tensors at hand."""

    def request(self, number: int, folder: Path) -> TensorLoRARequest:
        """As before, of tensors that were read for an earlier request."""
        kept = self.__dict__.setdefault("kept", {})
        if folder not in kept:
            kept[folder] = of_tensors(number, folder)
        return msgspec.structs.replace(kept[folder])


class OwnLoader(Extension):
    """The extension of a framework that also replaces vLLM's loader, as verl and ms-swift do."""

    def __new__(cls, **kwargs: Any) -> "OwnLoader":
        take_over()
        return super().__new__(cls)
