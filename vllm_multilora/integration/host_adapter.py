"""An adapter in host memory, ready for a slot: the packed part and what vLLM fills in itself."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from vllm.exceptions import LoRAAdapterNotFoundError
from vllm.lora.peft_helper import PEFTHelper
from vllm.lora.utils import get_adapter_absolute_path

from vllm_multilora.adapters.allowed_roots import AllowedRoots
from vllm_multilora.adapters.checkpoint import AdapterCheckpoint
from vllm_multilora.adapters.errors import AdapterError, AdapterFormatError
from vllm_multilora.adapters.folder import TENSORS_NAME
from vllm_multilora.adapters.names import is_base_embedding, parse_tensor_name
from vllm_multilora.adapters.packed import PackedAdapter, pack
from vllm_multilora.adapters.placement import left_out_modules
from vllm_multilora.adapters.tensor_file import Fingerprint
from vllm_multilora.adapters.validation import validate
from vllm_multilora.config import MultiLoRAConfig
from vllm_multilora.integration.pickled import as_safetensors, pickled_tensors

if TYPE_CHECKING:
    from vllm.lora.lora_model import LoRAModel
    from vllm.lora.request import LoRARequest

    from vllm_multilora.integration.model_manager import MultiLoRAModelManager


logger = logging.getLogger(__name__)

# vLLM's own checks of an adapter; which of them exist depends on the version.
_CHECKS = (
    "_validate_moe_lora_format",  # from 0.32
    "_validate_modules_to_save",  # to 0.32
    "_validate_token_classification_lora",  # to 0.32
    "_validate_classification_head_lora",  # from 0.33, for the two before
)


@dataclass(frozen=True)
class HostAdapter:
    """An adapter's host copy; read-only.

    Attributes:
        packed: The linear layers' part.
        special: The rest (embeddings, output heads, experts) in vLLM's own form; None if the
            adapter has nothing of the kind.
        fingerprint: Tells whether the files have changed since.
    """

    packed: PackedAdapter
    special: LoRAModel | None
    fingerprint: Fingerprint | None

    @property
    def nbytes(self) -> int:
        """Bytes of host memory, at true rank."""
        return self.packed.nbytes + sum(tensor.nbytes for tensor in _tensors(self.special))

    @property
    def rank(self) -> int:
        """The highest rank in it."""
        packed = int(self.packed.ranks.max(initial=0))
        return packed if self.special is None else max(packed, self.special.rank)


def _tensors(model: LoRAModel | None) -> Iterator[torch.Tensor]:
    if model is None:
        return
    for weights in model.loras.values():
        for part in (weights.lora_a, weights.lora_b):
            yield from (t for t in (part if isinstance(part, list) else [part]) if t is not None)
    for module in model.modules_to_save.values():
        yield from (t for t in (module.weight, module.bias) if t is not None)


class HostAdapterLoader:
    """Reads adapters from disk for one worker; called from several threads.

    Args:
        manager: The model manager whose model the adapters are for.
        max_position_embeddings: As vLLM's `PEFTHelper` wants it.
        model_class: vLLM's class for what it fills in itself.
        settings: The plugin's.
    """

    def __init__(
        self,
        manager: MultiLoRAModelManager,
        max_position_embeddings: int | None,
        model_class: type[LoRAModel],
        settings: MultiLoRAConfig,
    ) -> None:
        self._manager = manager
        self._max_position_embeddings = max_position_embeddings
        self._model_class = model_class
        self._roots = AllowedRoots.of(settings)
        self._allow_pickle = settings.allow_pickle
        self._check_finite = settings.check_finite
        # What has been found, by adapter number. Each entry is written by one thread at a time.
        self._checked: dict[int, Fingerprint] = {}
        self._problems: dict[int, list[dict[str, Any]]] = {}
        self._said: set[int] = set()

    def load(self, request: LoRARequest) -> HostAdapter:
        """Reads and checks an adapter; nothing of the running model changes.

        Raises:
            LoRAAdapterNotFoundError: There are no such files.
            AdapterError: The files are damaged or do not fit the base model.
            ValueError: vLLM does not serve this kind of adapter.
        """
        if getattr(request, "tensorizer_config_dict", None):  # vLLM 0.31
            raise ValueError(
                f"adapter {request.lora_name!r} is in the tensorizer format, which is not "
                "supported: save it as adapter_model.safetensors"
            )
        self._problems.pop(request.lora_int_id, None)
        try:
            folder = Path(get_adapter_absolute_path(request.lora_path))
            self._roots.require(folder)
            pickled = pickled_tensors(folder) if self._allow_pickle else None
            if pickled is None:
                return self._load(folder, request)
            fingerprint = Fingerprint.of(pickled.stat())
            with as_safetensors(folder, pickled) as converted:
                return replace(self._load(converted, request), fingerprint=fingerprint)
        except AdapterError as error:
            self._problems[request.lora_int_id] = [p.as_dict() for p in error.problems]
            if not isinstance(error, FileNotFoundError):
                raise
            # The server's routes know this error by its type and wording.
            not_found = LoRAAdapterNotFoundError(request.lora_name, request.lora_path)
            not_found.message = f"{not_found}: {error}"
            raise not_found from error

    def _load(self, folder: Path, request: LoRARequest) -> HostAdapter:
        # Opened before vLLM reads the configuration: what is wrong is said better here.
        with self._open(folder) as checkpoint:
            if self._check_finite and self._checked.get(request.lora_int_id) != (
                checkpoint.fingerprint
            ):
                # Weights that were found good once are not looked through again.
                problems = validate(checkpoint, self._manager.layout)
                if problems:
                    raise AdapterFormatError.of(*problems)
                self._checked[request.lora_int_id] = checkpoint.fingerprint
            self._say_what_is_left_out(checkpoint, request)
            packed = pack(checkpoint, self._manager.layout, pin=self._manager.device.type != "cpu")
            helper = PEFTHelper.from_local_dir(str(folder), self._max_position_embeddings)
            helper.validate_legal(self._manager.lora_config)
            special = self._special(checkpoint, request, helper)
            return HostAdapter(packed, special, checkpoint.fingerprint)

    def _say_what_is_left_out(self, checkpoint: AdapterCheckpoint, request: LoRARequest) -> None:
        """Warns, once, of an adapter that is served without some of its modules."""
        if request.lora_int_id in self._said:
            return
        self._said.add(request.lora_int_id)
        left_out = left_out_modules(checkpoint.tensors, self._manager.layout)
        if left_out:
            targets = self._manager.layout.targets
            logger.warning(
                "Adapter %r is served without %d of its modules (%s), which are left out %s.",
                request.lora_name,
                len(left_out),
                ", ".join(dict.fromkeys(module.rpartition(".")[2] for module in left_out)),
                "by --lora-target-modules" if targets is not None else "of this base model",
            )

    def _open(self, folder: Path) -> AdapterCheckpoint:
        try:
            return AdapterCheckpoint.open(folder)
        except AdapterError as error:
            # The first thing wrong; what else is?
            problems = validate(folder, self._manager.layout, check_finite=False)
            raise type(error).of(*problems) if problems else error from None

    def problems(self, lora_id: int) -> list[dict[str, Any]]:
        """All that was wrong with an adapter when it was read last, as `Problem.as_dict`."""
        return self._problems.get(lora_id, [])

    def forget(self, lora_id: int) -> None:
        """The adapter was removed."""
        self._checked.pop(lora_id, None)
        self._problems.pop(lora_id, None)
        self._said.discard(lora_id)

    def has_changed(self, request: LoRARequest, adapter: HostAdapter) -> bool:
        """Whether an adapter's file is another one than it was loaded from; so if it is gone."""
        folder = Path(get_adapter_absolute_path(request.lora_path))
        pickled = pickled_tensors(folder) if self._allow_pickle else None
        path = pickled or folder / TENSORS_NAME
        try:
            return Fingerprint.of(path.stat()) != adapter.fingerprint
        except OSError:
            return True

    def _special(
        self, checkpoint: AdapterCheckpoint, request: LoRARequest, helper: PEFTHelper
    ) -> LoRAModel | None:
        """What the packed part leaves out, read and validated by vLLM's own classes."""
        manager, layout = self._manager, self._manager.layout
        tensors: dict[str, torch.Tensor] = {}
        for name, info in checkpoint.tensors.items():
            role = parse_tensor_name(name)
            module = layout.rename(role.module) if role else None
            if is_base_embedding(name) or (
                role and (module is None or not layout.is_special(module))
            ):
                continue
            tensors[name] = torch.empty(info.shape, dtype=info.dtype)
            checkpoint.read_into(name, tensors[name])
        if not tensors:
            return None
        model: Any = manager.model
        lora_config: Any = manager.lora_config
        mapper = getattr(model, "hf_to_vllm_mapper", None)
        special = self._model_class.from_lora_tensors(
            lora_model_id=request.lora_int_id,
            tensors=tensors,
            peft_helper=helper,
            device="cpu",
            dtype=lora_config.lora_dtype,
            model_vocab_size=manager.vocab_size,
            weights_mapper=mapper.get_rename_mapper() if mapper is not None else None,
            skip_prefixes=getattr(model, "lora_skip_prefixes", None),
        )
        special.is_3d_lora_weight = request.is_3d_lora_weight
        for name in _CHECKS:
            if check := getattr(manager, name, None):
                check(special)
        if special.loras:
            manager._create_merged_loras_inplace(special)
        return special
