"""Time from disk to host memory and from there into a slot: this plugin against stock vLLM.

The adapter covers every projection of an 8B Llama: 32 layers, hidden 4096, 1024 for keys and
values, 14336 in the MLP. Stock is vLLM's own code: `PEFTHelper.from_local_dir`,
`LoRAModel.from_local_checkpoint` and the manager's merge for loading, `set_lora` of its real
layers for activation. Their base weights have no memory; their slots do. Ours is what the store's
job does with an adapter's files, into an arena's segment that it has just mapped, and what a worker
does with that: group by group from the segment into the slot, on one thread. Starting the job and
the messages between the processes, some milliseconds, are in `cold_loads.py` and not here.

Both sides run in one process, in turn, and each round gives one ratio; medians count. The file is
in the page cache. Stock maps the file and leaves the reading of lora_a to the first activation, so
"load and first activation" is what a request waits for an adapter that is on disk.
"""

from __future__ import annotations

import json
import mmap
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

from benchmarks.cold.intake_cost import layout_of
from benchmarks.harness.registry import Figure, benchmark
from multilora_kernels import SlotIndex, SlotTable, host_memory
from vllm_multilora.adapters.intake import Rules, open_adapter
from vllm_multilora.adapters.packing.pack_index import PackIndex
from vllm_multilora.store.memory.arena import PLACE_BITS, Allocation, Arena
from vllm_multilora.store.memory.segments import SharedSegments

LAYERS, HIDDEN, HEADS, KV_HEADS, HEAD, MLP = 32, 4096, 32, 8, 128, 14336
SLOTS = 2
PROJECTIONS = {
    "self_attn.q_proj": (HIDDEN, HEADS * HEAD),
    "self_attn.k_proj": (HIDDEN, KV_HEADS * HEAD),
    "self_attn.v_proj": (HIDDEN, KV_HEADS * HEAD),
    "self_attn.o_proj": (HEADS * HEAD, HIDDEN),
    "mlp.gate_proj": (HIDDEN, MLP),
    "mlp.up_proj": (HIDDEN, MLP),
    "mlp.down_proj": (MLP, HIDDEN),
}
PACKED = {
    "self_attn.qkv_proj": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "self_attn.o_proj": (),
    "mlp.gate_up_proj": ("mlp.gate_proj", "mlp.up_proj"),
    "mlp.down_proj": (),
}


def write_adapter(folder: Path, rank: int, dtype: torch.dtype) -> int:
    """Writes an adapter as PEFT does; returns the bytes of its tensors."""
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for layer in range(LAYERS):
        for name, (inputs, outputs) in PROJECTIONS.items():
            module = f"base_model.model.model.layers.{layer}.{name}"
            for part, shape in (("A", (rank, inputs)), ("B", (outputs, rank))):
                values = torch.rand(shape, generator=generator).sub_(0.5)
                tensors[f"{module}.lora_{part}.weight"] = values.to(dtype)
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": 24,  # a scaling of 1 would spare both sides a multiplication
        "target_modules": sorted(name.rpartition(".")[2] for name in PROJECTIONS),
    }
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return sum(tensor.nbytes for tensor in tensors.values())


class Stock:
    """vLLM's way, over its own layers."""

    def __init__(self, folder: Path, max_rank: int) -> None:
        from vllm.config import VllmConfig, set_current_vllm_config
        from vllm.config.lora import LoRAConfig
        from vllm.distributed import (
            ensure_model_parallel_initialized,
            init_distributed_environment,
        )
        from vllm.lora.model_manager import LoRAModelManager

        self._folder = folder
        self._config = LoRAConfig(
            max_lora_rank=max_rank, max_loras=SLOTS, lora_dtype=torch.bfloat16
        )
        with set_current_vllm_config(VllmConfig()):
            if not torch.distributed.is_initialized():
                init_distributed_environment(1, 0, f"file://{folder}/rendezvous", 0, "gloo")
                ensure_model_parallel_initialized(1, 1)
            self.modules = self._layers()
        # Only what the merge reads, so that no model and no engine are needed.
        manager: Any = object.__new__(LoRAModelManager)
        manager.modules = self.modules
        manager.packed_modules = {
            f"model.layers.{layer}.{name}": [f"model.layers.{layer}.{part}" for part in parts]
            for layer in range(LAYERS)
            for name, parts in PACKED.items()
            if parts
        }
        manager.is_pooling_model = manager._is_moe = manager._is_non_gated_moe = False
        manager._enable_moe_shared_loras = manager._enable_mixed_moe_lora_format = False
        self._manager = manager
        self._expected = {name.rpartition(".")[2] for name in PROJECTIONS}

    def _layers(self) -> dict[str, Any]:
        from vllm.lora import layers as lora
        from vllm.model_executor.layers import linear

        made: dict[str, tuple[Callable[[], Any], type]] = {
            "self_attn.qkv_proj": (
                lambda: linear.QKVParallelLinear(HIDDEN, HEAD, HEADS, KV_HEADS, bias=False),
                lora.MergedQKVParallelLinearWithLoRA,
            ),
            "self_attn.o_proj": (
                lambda: linear.RowParallelLinear(HEADS * HEAD, HIDDEN, bias=False),
                lora.RowParallelLinearWithLoRA,
            ),
            "mlp.gate_up_proj": (
                lambda: linear.MergedColumnParallelLinear(HIDDEN, [MLP, MLP], bias=False),
                lora.MergedColumnParallelLinearWithLoRA,
            ),
            "mlp.down_proj": (
                lambda: linear.RowParallelLinear(MLP, HIDDEN, bias=False),
                lora.RowParallelLinearWithLoRA,
            ),
        }
        modules = {}
        for layer in range(LAYERS):
            for name, (base, wrapper) in made.items():
                with torch.device("meta"):
                    module = wrapper(base())
                module.device = torch.device("cpu")
                module.create_lora_weights(SLOTS, self._config)
                modules[f"model.layers.{layer}.{name}"] = module
        return modules

    def load(self) -> Any:
        from vllm.lora.lora_model import LoRAModel
        from vllm.lora.peft_helper import PEFTHelper

        helper = PEFTHelper.from_local_dir(str(self._folder), None)
        helper.validate_legal(self._config)
        model = LoRAModel.from_local_checkpoint(
            str(self._folder),
            self._expected,
            helper,
            lora_model_id=1,
            device="cpu",
            dtype=torch.bfloat16,
        )
        self._manager._create_merged_loras_inplace(model)
        return model

    def activate(self, model: Any, slot: int) -> None:
        for name, module in self.modules.items():
            weights = model.get_lora(name)
            module.set_lora(slot, weights.lora_a, weights.lora_b)

    def unload(self, model: Any) -> None:
        pass  # its memory goes with the last reference to it


class HostMemory:
    """An arena with segments as the store has them; an adapter lies in one run of pages."""

    def __init__(self) -> None:
        self._segments = SharedSegments()
        self._arena = Arena(self._segments, budget=None)
        self._mapped: dict[int, mmap.mmap] = {}

    def allocate(self, block_bytes: Any) -> Allocation:
        """Room for an adapter's blocks."""
        allocation = self._arena.allocate(np.asarray(block_bytes, np.int64))
        if allocation is None or len(allocation.extents) != 1:
            raise RuntimeError("the arena has no run of pages for the adapter")
        return allocation

    def free(self, allocation: Allocation) -> None:
        """Takes an adapter's room back."""
        self._arena.free(allocation)

    def map_to_write(self, allocation: Allocation) -> tuple[mmap.mmap, Any]:
        """A job's mapping of its pages, and its blocks' addresses."""
        (extent,) = allocation.extents
        descriptor = self._segments.descriptor(extent.segment)
        written = mmap.mmap(descriptor, extent.size, offset=extent.offset)
        inside = (allocation.places & ((1 << PLACE_BITS) - 1)) - extent.offset
        return written, _address(written) + inside

    def map_to_read(self, allocation: Allocation) -> mmap.mmap:
        """A worker's mapping of the segment, which it keeps."""
        (segment,) = allocation.segments
        if segment not in self._mapped:
            descriptor, size = self._segments.descriptor(segment), self._segments.size(segment)
            self._mapped[segment] = mmap.mmap(descriptor, size)
        return self._mapped[segment]


def _address(mapped: mmap.mmap) -> int:
    return int(np.frombuffer(mapped, np.uint8).__array_interface__["data"][0])


class Ours:
    """This plugin's way, over slots as it keeps them on CPUs (`columns`) or on GPUs."""

    def __init__(self, folder: Path, max_rank: int, *, columns: bool) -> None:
        self._folder = folder
        shapes = [
            (f"model.layers.{layer}.{name}", inputs, outputs)
            for layer in range(LAYERS)
            for name, (inputs, outputs) in PROJECTIONS.items()
        ]
        sizes = {name: (inputs, outputs) for name, inputs, outputs in shapes}
        self.layout = layout_of(sizes, max_rank, columns_first=columns)

        shapes_a = [(SLOTS, 1, max_rank, inputs) for _, inputs, _ in shapes]
        shapes_b = [(SLOTS, 1, outputs, max_rank) for _, _, outputs in shapes]
        if columns:
            shapes_b = [(*slot, rank, outputs) for *slot, outputs, rank in shapes_b]
        slots = host_memory.zeros(shapes_a + shapes_b, torch.bfloat16)
        self.lora_a, self.lora_b = slots[: len(shapes)], slots[len(shapes) :]
        if columns:
            self.lora_b = [b.mT for b in self.lora_b]
        self._slots = SlotTable(self.lora_a, self.lora_b)

        self._memory = HostMemory()

    def load(self) -> tuple[Allocation, int]:
        with open_adapter(str(self._folder), Rules()) as source:
            intake = source.check([self.layout])
            allocation = self._memory.allocate(intake.block_bytes)
            written, addresses = self._memory.map_to_write(allocation)
            intake.read(addresses, allocation.places)
            written.close()
        return allocation, int(intake.block_bytes[-1])

    def activate(self, packed: tuple[Allocation, int], slot: int) -> None:
        allocation, index_bytes = packed
        memory = self._memory.map_to_read(allocation)
        place = int(allocation.places[-1])
        found = PackIndex.decode(memoryview(memory)[place : place + index_bytes]).ranks[0]
        base = _address(memory)
        index = SlotIndex(
            found.rows, found.a_ranks, found.ranks, base + found.a_places, base + found.b_places
        )
        for group in self._slots.pieces(slot, index):
            self._slots.copy(group)

    def unload(self, packed: tuple[Allocation, int]) -> None:
        self._memory.free(packed[0])


def same_weights(stock: Stock, ours: Ours, slot: int, rank: int) -> bool:
    """Whether both sides' slots hold the same bits, where kernels read them."""
    rows = iter(range(len(ours.lora_a)))
    return all(
        torch.equal(module.lora_a_stacked[i][slot, 0, :rank], ours.lora_a[row][slot, 0, :rank])
        and torch.equal(
            module.lora_b_stacked[i][slot, 0, :, :rank], ours.lora_b[row][slot, 0, :, :rank]
        )
        for module in stock.modules.values()
        for i in range(module.n_slices)
        for row in (next(rows),)
    )


def seconds(function: Callable[[], Any]) -> tuple[float, Any]:
    """How long a call takes, and what it returns."""
    start = time.perf_counter()
    result = function()
    return time.perf_counter() - start, result


def compare(folder: Path, rank: int, max_rank: int, rounds: int, columns: bool) -> Iterable[Figure]:
    """The figures of one size of slots."""
    sides = {"stock": Stock(folder, max_rank), "ours": Ours(folder, max_rank, columns=columns)}
    steps = ("load", "first activation", "load and first activation", "later activation")
    times: dict[str, dict[str, list[float]]] = {
        side: {step: [] for step in steps} for side in sides
    }
    for turn in range(-1, rounds):  # the first warms up
        for name, side in list(sides.items())[:: 1 if turn % 2 else -1]:
            load, adapter = seconds(side.load)
            first, _ = seconds(lambda side=side, adapter=adapter: side.activate(adapter, 0))
            later, _ = seconds(lambda side=side, adapter=adapter: side.activate(adapter, 1))
            if turn >= 0:
                for step, took in zip(steps, (load, first, load + first, later), strict=True):
                    times[name][step].append(took * 1e3)
            side.unload(adapter)
            del adapter
    if not same_weights(sides["stock"], sides["ours"], 1, rank):
        raise RuntimeError("the two sides do not hold the same weights")
    for step in steps:
        stock, ours = times["stock"][step], times["ours"][step]
        case = f"slots for rank {max_rank}: {step}"
        yield Figure(case, "stock, ms", stock)
        yield Figure(case, "plugin, ms", ours)
        yield Figure(case, "stock / plugin", [s / o for s, o in zip(stock, ours, strict=True)])


@benchmark(
    workload="an adapter with an 8-billion Llama's shapes, its files in the page cache",
    control="vLLM's own loading and activation, in the same process and round",
    figure="stock's time over the plugin's, of each step",
    compares_to="stock vLLM",
    quick={"rank": 8, "max_rank": 8, "rounds": 1},
)
def adapter_moves(
    rank: int = 16,
    max_rank: int = 0,
    rounds: int = 9,
    dtype: str = "bfloat16",
    by_row: bool = False,
) -> Iterable[Figure]:
    """Time from disk to host memory and from there into a slot: this plugin against stock vLLM.

    Args:
        rank: The adapter's.
        max_rank: Of slots; 0 for 16 and 64.
        rounds: Of both sides.
        dtype: Of the adapter's file.
        by_row: B by rows, as in slots on GPUs.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_adapter(folder, rank, getattr(torch, dtype))
        for size in (max_rank,) if max_rank else (16, 64):
            yield from compare(folder, rank, size, rounds, columns=not by_row)
