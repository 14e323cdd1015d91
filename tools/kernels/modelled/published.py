"""Times that others have published of their kernels on cards, beside what the model says.

Two of them define the model's two fitted factors: `down` before SGLang cut K, and the difference
between `gate_up` and `qkv` afterwards. The others test it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from tools.kernels.measure.batches import Layer
from tools.kernels.modelled.cases import Batch
from tools.kernels.modelled.machine import CALIBRATED, GPUS, START_US
from tools.kernels.modelled.sglang import chunked_us, qkv_b_us
from tools.kernels.modelled.vllm import expand_kernel

_CHUNKED = "https://github.com/sgl-project/sglang/tree/main/benchmark/kernels/lora_csgmv"
_QKV_B = "https://github.com/sgl-project/sglang/pull/27087"
_EXPAND = "https://github.com/vllm-project/vllm/pull/32425"


@dataclass(frozen=True)
class Published:
    """A published time.

    Attributes:
        case: Kernels, layer and batch.
        card: Where it was measured; in brackets where that is not published and was assumed.
        source: Who published it.
        measured_us: Microseconds that were published.
        modelled_us: Microseconds that the model says.
    """

    case: str
    card: str
    source: str
    measured_us: float
    modelled_us: float

    @property
    def error(self) -> float:
        """What the model is off by, as a share of what was measured."""
        return self.modelled_us / self.measured_us - 1


def published() -> Iterator[Published]:
    """All ten, as modelled with the calibrated variant."""
    issue, card = CALIBRATED.issue, GPUS["H200"]
    batch = Batch(32, 8, "32", 32)
    for name, inputs, outputs, parts, before, after in (
        ("qkv", 4096, (8192, 1024, 1024), 8, 20.33, 15.25),
        ("gate_up", 4096, (12288, 12288), 8, 27.71, 22.27),
        ("down", 12288, (4096,), 16, 32.17, 10.98),
    ):
        layer, case = (
            Layer(name, inputs, outputs),
            f"csgmv, {name}, 32 tokens x 8 adapters, rank 32",
        )
        old = chunked_us(layer, batch, card, issue, 1, compact=False)
        yield Published(case, "H200", _CHUNKED, before, old)
        new = chunked_us(layer, batch, card, issue, parts, compact=True)
        yield Published(f"{case}, K cut into {parts}", "H200", _CHUNKED, after, new)
    # Its widths are not published: those of the other benchmark are assumed.
    layer = Layer("qkv", 4096, (8192, 1024, 1024))
    for tokens, rank, measured in ((8, 16, 5.31), (128, 16, 45.51), (128, 32, 59.56)):
        one_each = Batch(tokens, tokens, str(rank), rank)
        found = qkv_b_us(layer, one_each, GPUS["B200"], issue)
        case = f"qkv_lora_b, {tokens} sequences, rank {rank}"
        yield Published(case, "(B200)", _QKV_B, measured, found)
    gpt_oss = Layer("qkv of gpt-oss-20b", 2880, (4096, 512, 512))
    expand = expand_kernel(gpt_oss, Batch(16, 1, "16", 16), 2, 64)
    found = START_US + expand.time_us(GPUS["H100"], issue)
    case = f"vLLM's expand alone, {gpt_oss.name}, 16 tokens, rank 16"
    yield Published(case, "(H100)", _EXPAND, 10.0, found)
