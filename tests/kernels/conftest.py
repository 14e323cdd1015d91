"""Without a GPU the Triton kernels run in Triton's interpreter, on CPU tensors.

Triton decides as it is imported, so it is imported here, before any test module. Tests in other
folders start processes that must not inherit the variable, so it is set for these tests only.
"""

import os

import pytest
import torch

INTERPRET = not torch.cuda.is_available()

if INTERPRET:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        import multilora_kernels.triton  # noqa: F401


@pytest.fixture(autouse=True, scope="package")
def _interpreter_mode():
    """Triton looks at the variable once more when it launches a first kernel."""
    with pytest.MonkeyPatch.context() as patch:
        if INTERPRET:
            patch.setenv("TRITON_INTERPRET", "1")
        yield os.environ.get("TRITON_INTERPRET")
