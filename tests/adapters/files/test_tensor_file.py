"""The files: the header is read as safetensors reads it, and hostile ones are only refused."""

import json
import os
import struct
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError
from safetensors.torch import load, save

from vllm_multilora.adapters.adapter_errors import AdapterError, AdapterFormatError
from vllm_multilora.adapters.files.adapter_folder import CONFIG_NAME, TENSORS_NAME, AdapterFolder
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


def file_of(header: object, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def entry(dtype="F32", shape=(2,), span=(0, 8)) -> dict:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(span)}


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


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "ends inside the header"),
        (b"\x01\x02", "ends inside the header"),
        (struct.pack("<Q", 2**63), "its header should have 9223372036854775808 bytes"),
        (struct.pack("<Q", 10) + b"{}", "its header should have 10 bytes, and at most 2"),
        (file_of(b"{"), "not valid JSON"),
        (file_of(b"\xff\xfe"), "not valid JSON"),
        (file_of(b"[" * 50_000), "not valid JSON"),
        (file_of([1]), "JSON list"),
        (file_of({"a": 3}), "entry of a: found 3, expected an object"),
        (file_of({"a": entry(dtype="Q4")}, bytes(8)), "dtype is 'Q4', expected one of"),
        (file_of({"a": entry(dtype=["F32"])}, bytes(8)), "dtype is"),
        (file_of({"a": entry(shape=(-2,))}, bytes(8)), "shape is .*expected a list of sizes"),
        (file_of({"a": entry(shape=(True, 2))}, bytes(8)), "shape is"),
        (file_of({"a": entry(shape=(1,) * 65)}, bytes(8)), "shape is"),
        (file_of({"a": entry(shape=(2**62, 2**62))}, bytes(8)), "span 8 bytes, expected"),
        (file_of({"a": entry(span=(0, 4))}, bytes(4)), "span 4 bytes, expected 8 for F32"),
        (file_of({"a": entry(span=(8, 0))}, bytes(8)), "expected .begin, end."),
        (file_of({"a": entry(span=(0, 8, 9))}, bytes(8)), "expected .begin, end."),
        (file_of({"a": entry(span=(0.0, 8.0))}, bytes(8)), "expected .begin, end."),
        (file_of({"a": entry(span=(8, 16))}, bytes(16)), "begins at byte 8 .* expected 0"),
        (file_of({"a": entry(), "b": entry(span=(4, 12))}, bytes(12)), "b begins at byte 4"),
        (file_of({"a": entry(), "b": entry()}, bytes(8)), "b begins at byte 0"),
        (file_of({"a": entry()}, bytes(7)), "truncated or written to"),
        (file_of({"a": entry()}, bytes(9)), "truncated or written to"),
        (file_of(b'{"a": 1, "a": 2}'), "'a' occurs twice"),
    ],
)
def test_a_malformed_file_is_refused_with_what_is_wrong(folder, content, words):
    put(folder, content)
    with pytest.raises(AdapterFormatError, match=rf"adapter_model\.safetensors.*{words}"):
        read(folder)


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


def test_what_safetensors_refuses_is_refused_too(folder):
    """A sample of the table above, so that the comparison is known to compare something."""
    for content in (file_of({"a": entry(span=(8, 16))}, bytes(16)), VALID[:-1]):
        with pytest.raises(SafetensorError):
            load(content)
        put(folder, content)
        with pytest.raises(AdapterFormatError):
            read(folder)


def test_missing_files_are_named(folder, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"adapter folder .*nowhere does not exist"):
        read(tmp_path / "nowhere")
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    with pytest.raises(
        FileNotFoundError, match=r"has adapter_model\.bin instead.* save .* as .*safetensors"
    ):
        read(folder)
    (folder / "adapter_config.json").unlink()
    with (
        AdapterFolder(folder) as opened,
        pytest.raises(FileNotFoundError, match=r"adapter_config\.json does not exist"),
    ):
        opened.open(CONFIG_NAME)


def test_what_is_not_a_file_is_refused_without_waiting(folder):
    path = folder / "adapter_model.safetensors"
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(AdapterFormatError, match="not a regular file"):
        read(folder)
    path.unlink()
    path.mkdir()
    with pytest.raises(AdapterFormatError, match="not a regular file"):
        read(folder)


def test_reading_leaves_no_descriptor_behind(folder):
    def descriptors() -> int:
        return len(list(Path("/proc/self/fd").iterdir()))

    before = descriptors()
    read(folder)
    assert descriptors() == before
    put(folder, b"garbage!garbage!")
    with pytest.raises(AdapterError):
        read(folder)
    assert descriptors() == before
