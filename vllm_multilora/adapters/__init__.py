"""A LoRA checkpoint on disk, and what the running base model takes of it.

    if problems := validate(folder, layout):
        raise AdapterFormatError.of(*problems)
    with AdapterCheckpoint.open(folder) as checkpoint:
        packed = pack(checkpoint, layout)

`names` and `config` read what PEFT wrote, `checkpoint` reads the files, `layout` says what the
base model accepts on this worker, `validation` names all that does not fit, and `packed` turns an
adapter into one contiguous host buffer. Nothing here knows vLLM.
"""

from vllm_multilora.adapters.checkpoint import AdapterCheckpoint
from vllm_multilora.adapters.config import AdapterConfig
from vllm_multilora.adapters.errors import (
    AdapterError,
    AdapterFormatError,
    AdapterNotFoundError,
    AdapterReadError,
)
from vllm_multilora.adapters.header import TensorInfo
from vllm_multilora.adapters.layout import ModelLayout, SliceLayout, SpecialShape
from vllm_multilora.adapters.limits import Limits
from vllm_multilora.adapters.names import TensorRole, parse_tensor_name
from vllm_multilora.adapters.packed import PackedAdapter, pack
from vllm_multilora.adapters.problems import Code, Problem
from vllm_multilora.adapters.tensor_file import Fingerprint
from vllm_multilora.adapters.validation import validate

__all__ = [
    "AdapterCheckpoint",
    "AdapterConfig",
    "AdapterError",
    "AdapterFormatError",
    "AdapterNotFoundError",
    "AdapterReadError",
    "Code",
    "Fingerprint",
    "Limits",
    "ModelLayout",
    "PackedAdapter",
    "Problem",
    "SliceLayout",
    "SpecialShape",
    "TensorInfo",
    "TensorRole",
    "pack",
    "parse_tensor_name",
    "validate",
]
