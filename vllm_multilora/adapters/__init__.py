"""A LoRA checkpoint on disk, and what the running base model takes of it.

    with open_adapter(path, Rules()) as source:
        intake = source.check(layouts)
        taken = intake.read(addresses, places)

`names` and `config` read what PEFT wrote, `folder` opens the files, `layout` says what the base
model accepts on each worker, `validation` names all that does not fit, and `intake` reads an
adapter once and packs it into memory. Nothing here knows vLLM, and nothing needs PyTorch but
`pickled`, where pickles are allowed.
"""

from vllm_multilora.adapters.config import AdapterConfig
from vllm_multilora.adapters.errors import (
    AdapterError,
    AdapterFormatError,
    AdapterNotFoundError,
    AdapterReadError,
)
from vllm_multilora.adapters.fingerprint import Fingerprint
from vllm_multilora.adapters.header import TensorInfo
from vllm_multilora.adapters.layout import ModelLayout, SliceLayout, SpecialShape
from vllm_multilora.adapters.limits import Limits
from vllm_multilora.adapters.names import TensorRole, parse_tensor_name
from vllm_multilora.adapters.problems import Code, Problem

__all__ = [
    "AdapterConfig",
    "AdapterError",
    "AdapterFormatError",
    "AdapterNotFoundError",
    "AdapterReadError",
    "Code",
    "Fingerprint",
    "Limits",
    "ModelLayout",
    "Problem",
    "SliceLayout",
    "SpecialShape",
    "TensorInfo",
    "TensorRole",
    "parse_tensor_name",
]
