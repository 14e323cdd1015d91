"""The Triton kernels' interpreter, where there is no GPU; see the conftest above."""

import os

import pytest
import torch


@pytest.fixture(autouse=True, scope="package")
def _interpreter_mode():
    """Triton looks at the variable once more when it launches a first kernel."""
    with pytest.MonkeyPatch.context() as patch:
        if not torch.cuda.is_available():
            patch.setenv("TRITON_INTERPRET", "1")
        yield os.environ.get("TRITON_INTERPRET")
