"""Whether a batch needs any kernel: decided on the host, from the plan that it has there."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch

from multilora_kernels.plan import PLAN_OWN_GRAPHS, PLAN_ROWS, PLAN_TOKENS


def tokens_to_skip(header: npt.NDArray[np.int32], out: torch.Tensor) -> int:
    """The batch's tokens if no kernel has to be launched for them, else 0.

    A plan that was never filled has no tokens. It counts as one with adapters: whoever captures
    a graph before the first batch does not know yet what will come.

    Args:
        header: Of a plan, on the host.
        out: What the kernel would write to.
    """
    if header[PLAN_ROWS] or (not header[PLAN_OWN_GRAPHS] and is_capturing(out.device)):
        return 0
    return int(header[PLAN_TOKENS])


def is_capturing(device: torch.device) -> bool:
    """Whether what is launched now becomes part of a CUDA graph; asks the driver on GPUs only."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()
