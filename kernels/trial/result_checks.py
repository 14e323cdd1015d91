"""Whether a result is right: row by row, within the rounding that its types allow."""

from __future__ import annotations

from collections.abc import Iterator

import torch

RELATIVE_RMS = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}
"""Error of a result relative to the RMS of that result; values of one size, no cancellation.

Between the halves and at the end values are rounded to 16 bits, which explains a fifth of it.
"""
WORST = 10
"""Error of the worst value, in those of the whole: rounding errors are near normal."""
CHUNK_ELEMENTS = 1 << 22
"""Values that are compared at a time, so that comparing takes little of the device's memory."""


def tolerance(*dtypes: torch.dtype) -> float:
    """The error allowed where these types are involved: the coarsest one's."""
    return max(RELATIVE_RMS[dtype] for dtype in dtypes)


def problem_with(actual: torch.Tensor, expected: torch.Tensor, allowed: float) -> str:
    """What is wrong with a result; empty if it is right.

    Each row is judged by itself, so that one wrong row among a thousand shows.

    Args:
        actual: [..., rows, columns].
        expected: float32 of the same shape.
        allowed: RMS error of a row, relative to the RMS of the row.
    """
    if actual.shape != expected.shape:
        return f"found shape {list(actual.shape)}, expected {list(expected.shape)}"
    columns = expected.size(-1)
    found, right = actual.reshape(-1, columns), expected.reshape(-1, columns)
    return next(filter(None, _problems(found, right, allowed)), "")


def _problems(found: torch.Tensor, right: torch.Tensor, allowed: float) -> Iterator[str]:
    """The worst problem of each chunk of rows; empty where there is none."""
    step = max(1, CHUNK_ELEMENTS // right.size(1))
    for first in range(0, len(right), step):
        values, expected = found[first : first + step].float(), right[first : first + step]
        finite = torch.isfinite(values).all(1)
        if not bool(finite.all()):
            yield f"row {first + int((~finite).nonzero()[0])} has values that are not finite"
        error = (values - expected).abs()
        limit = allowed * expected.square().mean(1).sqrt()
        rms, worst = error.square().mean(1).sqrt(), error.amax(1)
        excess = torch.maximum(rms, worst / WORST) - limit
        row = int(excess.argmax())
        yield (
            ""
            if bool(excess[row] <= 0)
            else (
                f"row {first + row} of {len(found)} is off by {float(rms[row]):.2g} (RMS), "
                f"{float(worst[row]):.2g} (worst); {float(limit[row]):.2g} is allowed"
            )
        )
