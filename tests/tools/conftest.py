"""The Triton kernels' interpreter, where there is no GPU; see the conftest above."""

from tests.kernels.conftest import _interpreter_mode  # noqa: F401
