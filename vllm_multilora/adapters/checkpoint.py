"""An adapter on disk: its configuration, and the header of the file with its tensors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from vllm_multilora.adapters.config import AdapterConfig
from vllm_multilora.adapters.folder import CONFIG_NAME, TENSORS_NAME, AdapterFolder, read_config
from vllm_multilora.adapters.header import TensorInfo
from vllm_multilora.adapters.limits import DEFAULT_LIMITS, Limits
from vllm_multilora.adapters.tensor_file import TensorFile


@dataclass(frozen=True)
class AdapterCheckpoint:
    """What an adapter's two files say without a look at its weights.

    Attributes:
        path: The folder.
        config: What `adapter_config.json` says.
        tensors: The tensors in `adapter_model.safetensors` by name, in the order of their bytes.
    """

    path: Path
    config: AdapterConfig
    tensors: Mapping[str, TensorInfo]

    @classmethod
    def read(cls, path: str | Path, limits: Limits = DEFAULT_LIMITS) -> AdapterCheckpoint:
        """Reads an adapter's configuration and header.

        Raises:
            AdapterNotFoundError: The folder or one of its two files is missing; it is a
                FileNotFoundError too.
            AdapterFormatError: One of them is not what it should be.
            AdapterReadError: One of them cannot be read.
        """
        with AdapterFolder(path) as folder:
            with folder.open(CONFIG_NAME) as file:
                config = AdapterConfig.from_json(read_config(file, limits), str(file.path))
            with folder.open(TENSORS_NAME) as file:
                return cls(folder.path, config, TensorFile(file, limits).tensors)
