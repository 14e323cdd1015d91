"""Pickled weights become safetensors, and nothing in a pickle is ever run."""

import os
import pickle
from pathlib import Path

import pytest
import torch

from tests.adapters.corpus import LAYOUT
from tests.adapters.corpus.draft import WEIGHTS, good
from vllm_multilora.adapters import AdapterError, AdapterFormatError, Code, pack, validate
from vllm_multilora.adapters.checkpoint import AdapterCheckpoint
from vllm_multilora.integration.pickled import as_safetensors, pickled_tensors

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


@pytest.mark.parametrize("name", NAMES)
def test_the_same_adapter_comes_out(tmp_path, name):
    plain = good().write(tmp_path / "plain")
    pickled = pickle_weights(tmp_path / "pickled", name)
    assert pickled_tensors(plain) is None
    assert pickled_tensors(pickled.parent) == pickled
    with (
        AdapterCheckpoint.open(plain) as expected,
        as_safetensors(pickled.parent, pickled) as folder,
        AdapterCheckpoint.open(folder) as found,
    ):
        assert validate(found, LAYOUT) == []
        assert torch.equal(pack(found, LAYOUT).buffer, pack(expected, LAYOUT).buffer)
    assert not folder.exists()


def test_tensors_that_share_memory_are_told_apart(tmp_path):
    pickled = pickle_weights(tmp_path)
    tensors = torch.load(pickled, weights_only=True)
    both = torch.stack([tensor.flatten()[:8] for tensor in list(tensors.values())[:2]])
    torch.save({"first": both[0], "second": both[1], "transposed": both.T}, pickled)
    with (
        as_safetensors(tmp_path, pickled) as folder,
        (folder / WEIGHTS).open("rb") as file,
    ):
        assert len(file.read()) > 4 * both.numel()


@pytest.mark.parametrize("how", ["protocol-2", "torch-save", "inside-the-dictionary"])
def test_a_malicious_pickle_is_refused_and_nothing_runs(tmp_path, how):
    pickled, trace = pickle_weights(tmp_path / "adapter"), tmp_path / "executed"
    if how == "protocol-2":
        pickled.write_bytes(pickle.dumps(Bomb(trace), protocol=2))
    elif how == "torch-save":
        torch.save(Bomb(trace), pickled)
    else:
        torch.save({**torch.load(pickled, weights_only=True), "x": Bomb(trace)}, pickled)
    with (
        pytest.raises(AdapterFormatError, match=r"adapter_model\.bin") as caught,
        as_safetensors(pickled.parent, pickled),
    ):
        pass
    [problem] = caught.value.problems
    assert problem.code == Code.NOT_PICKLED_TENSORS
    assert "without running code" in problem.message
    assert not trace.exists()
    # It was a real one.
    if how == "protocol-2":
        pickle.loads(pickled.read_bytes())
        assert trace.exists()


@pytest.mark.parametrize(
    "content",
    [b"", b"no pickle at all", b"PK\x03\x04 half an archive", pickle.dumps([1, 2], protocol=2)],
    ids=["empty", "text", "zip", "a-list"],
)
def test_what_is_no_dictionary_of_tensors_is_refused(tmp_path, content):
    pickled = pickle_weights(tmp_path)
    pickled.write_bytes(content)
    with pytest.raises(AdapterFormatError) as caught, as_safetensors(tmp_path, pickled):
        pass
    assert [problem.code for problem in caught.value.problems] == [Code.NOT_PICKLED_TENSORS]


def test_problems_name_the_adapters_own_file(tmp_path):
    pickled = pickle_weights(tmp_path / "adapter")
    tensors = torch.load(pickled, weights_only=True)
    name = next(iter(tensors))
    tensors[name][0, 0] = float("nan")
    torch.save(tensors, pickled)
    with (
        pytest.raises(AdapterError) as caught,
        as_safetensors(pickled.parent, pickled) as folder,
    ):
        raise AdapterFormatError.of(*validate(folder, LAYOUT))
    [problem] = caught.value.problems
    assert (problem.code, problem.file, problem.where) == (Code.NOT_FINITE, str(pickled), name)
    assert problem.message.startswith(f"{pickled}: {name}")
