"""The C code: kernels for CPUs (`segment_gemm`), scattering into slots, and packing.

`compiler` builds and loads it; neither it nor this folder's own import needs PyTorch.
"""

from multilora_kernels.native.builds import NativeUnavailableError
from multilora_kernels.native.compiler import (
    check_size,
    is_available,
    load_library,
    load_packing_library,
    load_releasing_library,
)

__all__ = [
    "NativeUnavailableError",
    "check_size",
    "is_available",
    "load_library",
    "load_packing_library",
    "load_releasing_library",
]
