"""CPU time of taking an adapter in: from the page cache into memory, checked and digested.

The adapter has the shapes of Llama-3.1-8B's projections, in bfloat16, in as many layers as make up
the size; its scaling is not 1. Times are those of the process (user and system) on one core,
medians. "Fresh pages" packs into memory that has never been touched, so that the kernel hands out
and clears a page for every 4 KiB written; the store does so once in its life for each page.
"""

from __future__ import annotations

import json
import mmap
import tempfile
import time
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
from blake3 import blake3

from benchmarks.harness.registry import Figure, benchmark
from multilora_kernels.dtypes import BFLOAT16
from vllm_multilora.adapters.intake import Rules, open_adapter
from vllm_multilora.adapters.model.layout import ModelLayout, SliceLayout
from vllm_multilora.adapters.signing.adapter_digest import AdapterDigest

HIDDEN, KV, MLP = 4096, 1024, 14336
PROJECTIONS = {
    "self_attn.q_proj": (HIDDEN, HIDDEN),
    "self_attn.k_proj": (HIDDEN, KV),
    "self_attn.v_proj": (HIDDEN, KV),
    "self_attn.o_proj": (HIDDEN, HIDDEN),
    "mlp.gate_proj": (HIDDEN, MLP),
    "mlp.up_proj": (HIDDEN, MLP),
    "mlp.down_proj": (MLP, HIDDEN),
}


def modules(layers: int) -> dict[str, tuple[int, int]]:
    """The names of modules, with inputs and outputs."""
    return {
        f"model.layers.{layer}.{name}": sizes
        for layer in range(layers)
        for name, sizes in PROJECTIONS.items()
    }


def write_adapter(folder: Path, layers: int, rank: int) -> None:
    """Writes an adapter as PEFT does, of small bfloat16 numbers."""
    generator = np.random.default_rng(0)
    header, parts, at = {}, [], 0
    for module, (inputs, outputs) in modules(layers).items():
        for part, shape in (("A", (rank, inputs)), ("B", (outputs, rank))):
            signs = generator.integers(0, 2, shape, np.uint16) << 15
            values = generator.integers(0x3800, 0x3D00, shape, np.uint16) | signs
            parts.append(values.tobytes())
            header[f"base_model.model.{module}.lora_{part}.weight"] = {
                "dtype": "BF16",
                "shape": list(shape),
                "data_offsets": [at, at + len(parts[-1])],
            }
            at += len(parts[-1])
    text = json.dumps(header).encode()
    content = b"".join((len(text).to_bytes(8, "little"), text, *parts))
    (folder / "adapter_model.safetensors").write_bytes(content)
    names = sorted(name.rpartition(".")[2] for name in PROJECTIONS)
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": 24, "target_modules": names}
    (folder / "adapter_config.json").write_text(json.dumps(config))


def layout_of(
    sizes: Mapping[str, tuple[int, int]], rank: int, *, columns_first: bool
) -> ModelLayout:
    """A worker that keeps everything.

    Args:
        sizes: Inputs and outputs by module.
        rank: The largest.
        columns_first: As `ModelLayout` has it.
    """
    slices = tuple(
        SliceLayout(name, row, inputs, outputs, (0, inputs), (0, outputs))
        for row, (name, (inputs, outputs)) in enumerate(sizes.items())
    )
    return ModelLayout(slices, rank, BFLOAT16, columns_first=columns_first)


class Memory:
    """Memory for a pack, either touched before or not."""

    def __init__(self, size: int, *, fresh: bool) -> None:
        flags = mmap.MAP_SHARED | mmap.MAP_ANONYMOUS
        self._map = mmap.mmap(-1, size, flags=flags)
        self.array = np.frombuffer(self._map, np.uint8)
        if not fresh:
            self.array[:] = 1


def take(folder: Path, layout: ModelLayout, memory: Memory | None) -> tuple[float, float, int]:
    """Takes the adapter in.

    Returns:
        Milliseconds of CPU time for opening and checking; for reading; bytes packed.
    """
    start = time.process_time()
    with open_adapter(str(folder), Rules()) as source:
        intake = source.check([layout])
        checked = time.process_time()
        addresses = places = None
        if memory is not None:
            places = np.cumsum([0, *intake.block_bytes[:-1]])
            addresses = memory.array.ctypes.data + places
        taken = intake.read(addresses, places)
        end = time.process_time()
    return (checked - start) * 1e3, (end - checked) * 1e3, taken.nbytes


@benchmark(
    workload="an adapter of Llama-3.1-8B's shapes, read from the page cache, checked and packed",
    control="the same without a digest, and into memory that was touched before",
    figure="processor time, user and system",
    compares_to="BLAKE3 of as many bytes, alone",
    quick={"megabytes": 8.0, "rounds": 1},
)
def intake_cost(megabytes: float = 84.0, rank: int = 64, rounds: int = 7) -> Iterable[Figure]:
    """CPU time of taking an adapter in: from the page cache into memory, checked and digested."""
    layers = max(1, round(megabytes * 1e6 / (2 * rank * sum(map(sum, PROJECTIONS.values())))))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_adapter(folder, layers, rank)
        size = (folder / "adapter_model.safetensors").stat().st_size
        update = AdapterDigest.update
        for columns_first in (False, True):
            layout = layout_of(modules(layers), rank, columns_first=columns_first)
            for fresh in (False, True):
                for digest in (True, False):
                    AdapterDigest.update = update if digest else lambda self, content: None
                    times = []
                    for _ in range(rounds + 1):  # the first warms up
                        memory = Memory(size + (1 << 20), fresh=fresh)
                        times.append(take(folder, layout, memory)[:2])
                        del memory
                    case = (
                        f"B by {'columns' if columns_first else 'rows'}, "
                        f"{'fresh' if fresh else 'touched'} pages, "
                        f"{'with' if digest else 'without'} digest"
                    )
                    check, read = zip(*times[1:], strict=True)
                    yield Figure(case, "open and check, ms", check)
                    yield Figure(case, "read, ms", read)
                    yield Figure(case, "all, ms", [sum(t) for t in times[1:]])
        AdapterDigest.update = update
        content = bytearray((folder / "adapter_model.safetensors").read_bytes())
        hashing = []
        for _ in range(rounds):
            start = time.process_time()
            digest_of = blake3()
            for at in range(0, len(content), 1 << 20):
                digest_of.update(memoryview(content)[at : at + (1 << 20)])
            hashing.append((time.process_time() - start) * 1e3)
        yield Figure("BLAKE3 of as many bytes in memory, alone", "all, ms", hashing)
