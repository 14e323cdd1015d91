"""Pickled weights become safetensors, and nothing in a pickle is ever run."""

import os
import pickle
from pathlib import Path

import pytest
import torch

from vllm_multilora.adapters.adapter_errors import (
    AdapterError,
    AdapterFormatError,
    AdapterNotFoundError,
    AdapterReadError,
)
from vllm_multilora.adapters.intake import Rules, open_adapter
from vllm_multilora.adapters.problems import Code

from ..corpus import LAYOUT
from ..corpus.draft import WEIGHTS, good
from ..packs import refused, take

NAMES = ("adapter_model.bin", "adapter_model.pt")


def pickle_weights(folder: Path, name: str = NAMES[0]) -> Path:
    """Has the folder's weights in a pickle, as PEFT did once; returns the file."""
    draft = good()
    draft.write(folder)
    (folder / WEIGHTS).unlink()
    torch.save(draft.tensors, folder / name)
    return folder / name


class Bomb:
    """Runs a command where it is unpickled by Python's own unpickler."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self):
        return os.mkdir, (str(self.trace),)


ALLOWED = Rules(allow_pickle=True)


@pytest.mark.parametrize("name", NAMES)
def test_the_same_adapter_comes_out(tmp_path, name):
    plain = good().write(tmp_path / "plain")
    pickled = pickle_weights(tmp_path / "pickled", name)
    expected = take(plain, LAYOUT, rules=ALLOWED)
    found = take(pickled.parent, LAYOUT, rules=ALLOWED)
    for row, pair in expected.contents().items():
        assert all(map(torch.equal, pair, found.contents()[row]))
    assert sorted(p.name for p in pickled.parent.iterdir()) == ["adapter_config.json", name]


def test_without_permission_pickles_are_not_read(tmp_path):
    pickled = pickle_weights(tmp_path)
    with pytest.raises(AdapterNotFoundError, match=rf"has {pickled.name} instead"):
        take(tmp_path, LAYOUT)


def test_safetensors_beside_a_pickle_are_what_is_read(tmp_path):
    good().write(tmp_path)
    (tmp_path / NAMES[0]).write_bytes(b"never looked at")
    assert take(tmp_path, LAYOUT, rules=ALLOWED).nbytes > 0


def test_tensors_that_share_memory_are_distinguished(tmp_path):
    """Also those that lie across each other, which safetensors itself refuses to write."""
    pickled = pickle_weights(tmp_path)
    tensors = torch.load(pickled, weights_only=True)
    name = next(iter(tensors))
    expected = tensors[name].clone()
    tensors[name] = tensors[name].T.contiguous().T
    torch.save(tensors, pickled)
    found = take(tmp_path, LAYOUT, rules=ALLOWED)
    row = next(p.row for p in LAYOUT.slices if p.name in name)
    assert torch.equal(found.contents()[row]["AB".index(name[-8])], expected)


def test_a_small_file_of_huge_tensors_is_refused_before_they_are_made(tmp_path):
    pickled = pickle_weights(tmp_path)
    torch.save({"x": torch.zeros(1).expand(1 << 40)}, pickled)
    assert pickled.stat().st_size < 10_000
    assert [problem.code for problem in refused(tmp_path, LAYOUT, rules=ALLOWED)] == [
        Code.FILE_TOO_LARGE
    ]


@pytest.mark.parametrize("how", ["protocol-2", "torch-save", "inside-the-dictionary"])
def test_a_malicious_pickle_is_refused_and_nothing_runs(tmp_path, how):
    pickled, trace = pickle_weights(tmp_path / "adapter"), tmp_path / "executed"
    if how == "protocol-2":
        pickled.write_bytes(pickle.dumps(Bomb(trace), protocol=2))
    elif how == "torch-save":
        torch.save(Bomb(trace), pickled)
    else:
        torch.save({**torch.load(pickled, weights_only=True), "x": Bomb(trace)}, pickled)
    with pytest.raises(AdapterFormatError, match=r"adapter_model\.bin") as caught:
        take(pickled.parent, LAYOUT, rules=ALLOWED)
    [problem] = caught.value.problems
    assert problem.code == Code.NOT_PICKLED_TENSORS
    assert "without running code" in problem.message
    assert not trace.exists()
    # It was a real one.
    if how == "protocol-2":
        pickle.loads(pickled.read_bytes())
        assert trace.exists()


UNUSABLE = {
    "empty": b"",
    "text": b"no pickle at all",
    "zip": b"PK\x03\x04 half an archive",
    "a-list-of-python": pickle.dumps([1, 2], protocol=2),
    "a-list": [torch.zeros(1)],
    "a-number": {"x": 1},
    "a-number-as-name": {1: torch.zeros(1)},
    "sparse": {"x": torch.zeros(1).to_sparse()},
    "complex": {"x": torch.zeros(1, dtype=torch.complex64)},
    "without-bytes": {"x": torch.zeros(1, device="meta")},
    "nested": {"x": torch.nested.nested_tensor([torch.zeros(1), torch.zeros(2)])},
}


@pytest.mark.parametrize("content", UNUSABLE.values(), ids=UNUSABLE)
def test_what_no_safetensors_file_holds_is_refused(tmp_path, content):
    pickled = pickle_weights(tmp_path)
    if isinstance(content, bytes):
        pickled.write_bytes(content)
    else:
        torch.save(content, pickled)
    assert [problem.code for problem in refused(tmp_path, LAYOUT, rules=ALLOWED)] == [
        Code.NOT_PICKLED_TENSORS
    ]


def test_problems_name_the_adapters_own_file(tmp_path):
    pickled = pickle_weights(tmp_path / "adapter")
    tensors = torch.load(pickled, weights_only=True)
    name = next(iter(tensors))
    tensors[name][0, 0] = float("nan")
    torch.save(tensors, pickled)
    with pytest.raises(AdapterError) as caught:
        take(pickled.parent, LAYOUT, rules=ALLOWED)
    [problem] = caught.value.problems
    assert (problem.code, problem.file, problem.where) == (Code.NOT_FINITE, str(pickled), name)
    assert problem.message.startswith(f"{pickled}: {name}")


def test_the_version_is_that_of_the_pickle(tmp_path):
    pickled = pickle_weights(tmp_path)

    def version() -> str:
        with open_adapter(str(tmp_path), ALLOWED) as source:
            source.check([LAYOUT]).read(None, None)
            return source.version

    first = version()
    assert version() == first
    pickled.touch()
    assert version() != first


def test_a_pickle_written_to_meanwhile_is_noticed(tmp_path):
    pickled = pickle_weights(tmp_path)
    with open_adapter(str(tmp_path), ALLOWED) as source:
        intake = source.check([LAYOUT])
        pickled.touch()
        with pytest.raises(AdapterReadError, match="written to while it was being read"):
            intake.read(None, None)


def test_too_little_memory_for_a_pickle_is_not_the_files_fault(tmp_path, monkeypatch):
    """PyTorch says so with a RuntimeError, as of any fault."""
    pickle_weights(tmp_path / "adapter")

    def load(*_: object, **__: object) -> None:
        raise RuntimeError(
            "DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"
        )

    monkeypatch.setattr(torch, "load", load)
    with (
        pytest.raises(MemoryError, match=r"adapter_model\.bin"),
        open_adapter(str(tmp_path / "adapter"), Rules(allow_pickle=True)) as source,
    ):
        source.check([LAYOUT])
