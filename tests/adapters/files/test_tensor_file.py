"""The files: the header is read as safetensors reads it, and hostile ones are only refused."""

import struct
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from safetensors.torch import load, save

from vllm_multilora.adapters.adapter_errors import AdapterFormatError
from vllm_multilora.adapters.files.adapter_folder import TENSORS_NAME, AdapterFolder
from vllm_multilora.adapters.files.header import TensorInfo
from vllm_multilora.adapters.files.tensor_file import TensorFile

from ..checkpoints import MODULES, weights, write

RANKS = {module: 4 for module, _, _ in MODULES}


@pytest.fixture
def folder(tmp_path):
    return write(tmp_path / "adapter", weights(RANKS), rank=4, alpha=8)


def read(folder: Path) -> Mapping[str, TensorInfo]:
    with AdapterFolder(folder) as opened, opened.open(TENSORS_NAME) as file:
        return TensorFile(file).tensors


def put(folder, content: bytes) -> None:
    (folder / "adapter_model.safetensors").write_bytes(content)


def test_the_header_gives_every_tensor(folder):
    tensors = read(folder)
    assert {n: i.shape for n, i in tensors.items()} == {
        n: tuple(t.shape) for n, t in weights(RANKS).items()
    }
    begins = [info.begin for info in tensors.values()]
    assert begins == sorted(begins)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.int8, torch.float64])
def test_every_dtype_keeps_its_bytes(folder, dtype):
    values = {"a": torch.arange(6).reshape(2, 3).to(dtype), "empty": torch.empty(0, 3, dtype=dtype)}
    put(folder, save(values))
    content = (folder / "adapter_model.safetensors").read_bytes()
    tensors = read(folder)
    for name, tensor in values.items():
        info = tensors[name]
        assert info.dtype.torch == dtype
        stored = content[info.begin : info.end]
        assert stored == tensor.view(-1).view(torch.uint8).numpy().tobytes()


VALID = save(weights({MODULES[0][0]: 4}))
VALID_HEADER = VALID[: 8 + struct.unpack("<Q", VALID[:8])[0]]


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=200)
@given(
    st.binary(max_size=200)
    | st.builds(
        lambda at, byte: VALID[:at] + bytes([byte]) + VALID[at + 1 :],
        st.integers(0, len(VALID_HEADER) - 1),
        st.integers(0, 255),
    )
    | st.builds(lambda end: VALID[:end], st.integers(0, len(VALID)))
    | st.builds(
        lambda a, b: VALID_HEADER[:a] + VALID_HEADER[b:] + VALID[len(VALID_HEADER) :],
        st.integers(8, len(VALID_HEADER)),
        st.integers(8, len(VALID_HEADER)),
    )
)
@example(VALID)
def test_any_bytes_are_read_as_safetensors_reads_them_or_refused(folder, content):
    put(folder, content)
    try:
        found = read(folder)
    except AdapterFormatError:
        return
    shapes = {name: info.shape for name, info in found.items()}
    assert shapes == {name: tuple(tensor.shape) for name, tensor in load(content).items()}
