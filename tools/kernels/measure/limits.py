"""What a batch costs at least, and what the device can do at most."""

from __future__ import annotations

from dataclasses import dataclass
from statistics import median

import torch

from tools.kernels.measure.batches import LayerBatch
from tools.kernels.measure.timing import Timer

_REPETITIONS = 20
_COPIED, _SIDE = 1 << 30, 8192  # bytes, and a product large enough to fill any card


@dataclass(frozen=True)
class Work:
    """The least that any implementation moves and computes.

    Attributes:
        bytes: Between memory and processor, everything once.
        operations: Multiplications and additions.
    """

    bytes: int
    operations: int


def adapter_work(batch: LayerBatch) -> Work:
    """What the adapters of a batch ask for.

    The weights of active adapters up to their true rank, once each; x once; y read and written.
    Rows without an adapter cost nothing. What goes from one half to the other could stay on the
    chip, so it is not counted.
    """
    slots = batch.token_slots[batch.token_slots >= 0]
    ranks = batch.spec.slot_ranks()
    layer = batch.spec.layer
    sides = len(layer.outputs) * layer.inputs + sum(layer.outputs)
    active = {int(slot) for slot in slots}
    weights = sum(int(ranks[slot]) for slot in active) * sides
    activations = len(slots) * (layer.inputs + 2 * sum(layer.outputs))
    item_sizes = batch.lora_a[0].element_size(), batch.x.element_size()
    return Work(
        bytes=weights * item_sizes[0] + activations * item_sizes[1],
        operations=2 * int(ranks[slots].sum()) * sides,
    )


@dataclass(frozen=True)
class Peaks:
    """What the device did at most, measured here and now.

    Attributes:
        bytes_per_second: Of a large copy, reading and writing counted.
        operations_per_second: Of a large product of square matrices.
        method: How they were measured, in words.
    """

    bytes_per_second: float
    operations_per_second: float
    method: str


def measure_peaks(
    timer: Timer,
    device: torch.device,
    dtype: torch.dtype,
    copied: int = _COPIED,
    side: int = _SIDE,
) -> Peaks:
    """Measures a copy and a product in `dtype`: what can be reached, not what is advertised.

    Args:
        timer: How to measure.
        device: What is measured.
        dtype: Of the product's matrices.
        copied: Bytes of the copy.
        side: Rows and columns of each matrix.
    """
    source = torch.zeros(copied, dtype=torch.uint8, device=device)
    target = torch.ones_like(source)
    factors = [torch.randn(side, side, device=device).to(dtype) for _ in range(2)]
    product = torch.empty(side, side, dtype=dtype, device=device)

    def copy() -> None:
        target.copy_(source)

    def multiply() -> None:
        torch.mm(*factors, out=product)

    copy_time, multiply_time = map(median, timer.paired([copy, multiply], _REPETITIONS))
    return Peaks(
        bytes_per_second=2 * copied / copy_time * 1e6,
        operations_per_second=2 * side**3 / multiply_time * 1e6,
        method=(
            f"measured: copy of {copied >> 20} MiB (read + written), product of two "
            f"{side} x {side} matrices in {str(dtype).removeprefix('torch.')}"
        ),
    )


def share_of_peak(work: Work, peaks: Peaks, microseconds: float) -> float:
    """The time that the work needs at the device's peaks over the time taken.

    Whichever of memory and arithmetic needs longer counts: memory in decoding, arithmetic in a
    long prefill of high ranks.
    """
    least = max(work.bytes / peaks.bytes_per_second, work.operations / peaks.operations_per_second)
    return least * 1e6 / microseconds
