"""Without a GPU the Triton kernels run in Triton's interpreter, on CPU tensors.

Triton decides as it is imported, and `multilora_kernels` and vLLM import it. So it is imported
here, before any test module. Some tests start processes that must not inherit the variable, so it
is set for the import only, and again by the tests that launch kernels.
"""

import pytest
import torch

if not torch.cuda.is_available():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        import multilora_kernels.triton  # noqa: F401
