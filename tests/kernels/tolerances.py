"""How far a backend may be from the float64 reference, per dtype of its output.

A backend accumulates in float32 and rounds once, on storing. So the RMS error is bounded by a
few units in the last place, relative to the RMS of the same sums over absolute values: relative
to the result itself no bound holds, because terms may cancel.
"""

import torch

RELATIVE_RMS = {torch.float32: 1e-6, torch.bfloat16: 4e-3, torch.float16: 5e-4}


def assert_close(actual: torch.Tensor, expected: torch.Tensor, magnitude: torch.Tensor) -> None:
    """Compares with the float64 expectation; `magnitude` is the sum over absolute values."""
    assert torch.isfinite(actual).all(), "output has values that are not finite"
    error = (actual.double() - expected).pow(2).mean().sqrt()
    size = magnitude.pow(2).mean().sqrt().clamp_min(1e-12)
    assert error / size <= RELATIVE_RMS[actual.dtype], f"relative RMS error {error / size:.2e}"
