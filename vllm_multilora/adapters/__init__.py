"""A LoRA checkpoint on disk, and what of it the running base model accepts.

    with open_adapter(path, Rules()) as source:
        intake = source.check(layouts)
        taken = intake.read(addresses, places)

`tensor_names` and `adapter_config` read what PEFT wrote, `adapter_folder` opens the files, `layout`
describes what the base model accepts on each worker, `validation` reports everything that does not
fit, and `intake` reads an adapter once and packs it into memory. Nothing here depends on vLLM, and
only `pickled`, for servers that allow pickles, needs PyTorch.
"""

from vllm_multilora.adapters.adapter_errors import (
    AdapterError,
    AdapterFormatError,
    AdapterNotFoundError,
    AdapterReadError,
)
from vllm_multilora.adapters.config.adapter_config import AdapterConfig
from vllm_multilora.adapters.files.fingerprint import Fingerprint
from vllm_multilora.adapters.files.header import TensorInfo
from vllm_multilora.adapters.model.layout import ModelLayout, SliceLayout, SpecialShape
from vllm_multilora.adapters.model.size_limits import SizeLimits
from vllm_multilora.adapters.model.tensor_names import TensorRole, parse_tensor_name
from vllm_multilora.adapters.problems import Code, Problem

__all__ = [
    "AdapterConfig",
    "AdapterError",
    "AdapterFormatError",
    "AdapterNotFoundError",
    "AdapterReadError",
    "Code",
    "Fingerprint",
    "ModelLayout",
    "Problem",
    "SizeLimits",
    "SliceLayout",
    "SpecialShape",
    "TensorInfo",
    "TensorRole",
    "parse_tensor_name",
]
