"""Large host tensors: what they hold, where they lie, and that they go back to the system."""

import gc
import mmap
import re
import sys
from pathlib import Path

import pytest
import torch

from multilora_kernels import host_memory
from multilora_kernels.host_memory import HUGE_PAGE

LARGE = 3 * HUGE_PAGE


def mapping(address: int) -> tuple[str, list[str]]:
    """The permissions and flags of the mapping that holds an address, as Linux shows them."""
    permissions = ""
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if found := re.match(r"([0-9a-f]+)-([0-9a-f]+) (\S+)", line):
            inside = int(found[1], 16) <= address < int(found[2], 16)
            permissions = found[3] if inside else ""
        elif permissions and line.startswith("VmFlags:"):
            return permissions, line.split()[1:]
    return "", []


on_linux = pytest.mark.skipif(sys.platform != "linux", reason="reads Linux's /proc")


def test_large_tensors_begin_with_a_huge_page():
    first, _ = host_memory.zeros([(4, 5), (LARGE,)], torch.uint8)
    assert first.data_ptr() % HUGE_PAGE == 0


@on_linux
def test_large_tensors_ask_for_huge_pages():
    for tensor in host_memory.zeros([(4, 5), (LARGE,)], torch.uint8):
        permissions, flags = mapping(tensor.data_ptr())
        assert permissions == "rw-p"  # shared memory gets none by default
        assert "hg" in flags


def test_a_system_without_huge_pages_gives_small_ones(monkeypatch):
    class Mapping(mmap.mmap):
        def madvise(self, *args):
            raise OSError(22, "Invalid argument")

    monkeypatch.setattr(mmap, "mmap", Mapping)
    (vector,) = host_memory.zeros([(LARGE,)], torch.uint8)
    assert int(vector.fill_(1).sum()) == LARGE


@pytest.mark.parametrize("large", [False, True], ids=["small", "large"])
def test_tensors_together_are_zeroed_and_apart(large: bool):
    shapes = [(2, 1, 3, 5), (7,), (0, 4), (2, LARGE // 4) if large else (2, 3)]
    tensors = host_memory.zeros(shapes, torch.bfloat16)
    assert [tuple(t.shape) for t in tensors] == shapes
    for number, tensor in enumerate(tensors, start=1):
        assert tensor.is_contiguous()
        assert not tensor.any()
        assert tensor.data_ptr() % 64 == 0
        assert tensor.untyped_storage().nbytes() == tensor.nbytes
        tensor.fill_(number)
    for number, tensor in enumerate(tensors, start=1):
        assert (tensor == number).all()


@on_linux
def test_memory_is_returned_with_the_last_tensor():
    first, last = host_memory.zeros([(8,), (64 * HUGE_PAGE,)], torch.uint8)
    ends = first.data_ptr(), last.data_ptr() + last.nbytes - 1
    del last
    gc.collect()
    assert all("hg" in mapping(end)[1] for end in ends)  # the first keeps it
    del first
    gc.collect()
    # Another thread's small pages may lie there by now.
    assert not any("hg" in mapping(end)[1] for end in ends)
