"""A LoRA checkpoint on disk, and what of it the running base model accepts.

    with open_adapter(path, Rules()) as source:
        intake = source.check(layouts)
        taken = intake.read(addresses, places)

`names` and `config` read what PEFT wrote, `folder` opens the files, `layout` describes what the
base model accepts on each worker, `validation` reports everything that does not fit, and `intake`
reads an adapter once and packs it into memory. Nothing here depends on vLLM, and only `pickled`,
for servers that allow pickles, needs PyTorch.
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
