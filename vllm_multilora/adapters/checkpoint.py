"""An adapter on disk: its configuration, and the file with its tensors."""

from __future__ import annotations

from pathlib import Path

from vllm_multilora.adapters.config import AdapterConfig
from vllm_multilora.adapters.folder import CONFIG_NAME, TENSORS_NAME, read_config
from vllm_multilora.adapters.limits import DEFAULT_LIMITS, Limits
from vllm_multilora.adapters.tensor_file import TensorFile


class AdapterCheckpoint(TensorFile):
    """An adapter's folder, its two files read as far as their headers.

    Args:
        path: The folder.
        config: What `adapter_config.json` says.
        limits: What is read at most.

    Attributes:
        path: The folder.
        config: What `adapter_config.json` says.

    Raises:
        AdapterError: As for `TensorFile`.
    """

    def __init__(self, path: Path, config: AdapterConfig, limits: Limits = DEFAULT_LIMITS) -> None:
        self.path = path
        self.config = config
        super().__init__(path / TENSORS_NAME, limits)

    @classmethod
    def open(cls, path: str | Path, limits: Limits = DEFAULT_LIMITS) -> AdapterCheckpoint:
        """Opens an adapter's folder, reading the configuration and the header only.

        Raises:
            AdapterNotFoundError: The folder or one of its two files is missing; it is a
                FileNotFoundError too.
            AdapterFormatError: One of them is not what it should be.
            AdapterReadError: One of them cannot be read.
        """
        folder = Path(path)
        content = read_config(folder, limits)
        return cls(folder, AdapterConfig.from_json(content, str(folder / CONFIG_NAME)), limits)
