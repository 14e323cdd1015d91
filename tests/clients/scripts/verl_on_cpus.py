"""A platform of verl's for machines without a GPU: it reads `VERL_USE_EXTERNAL_MODULES`."""

from types import SimpleNamespace

import torch
from verl.plugin.platform.platform_cuda import PlatformCUDA
from verl.plugin.platform.platform_manager import PlatformRegistry


@PlatformRegistry.register(platform="cpu")
class PlatformCPU(PlatformCUDA):
    """Nothing to wait for and no cache to empty; tensors go through shared memory."""

    device_name = "cpu"
    vendor_name = "cpu"
    device_module = SimpleNamespace(synchronize=torch.cpu.synchronize, empty_cache=lambda: None)

    def is_available(self) -> bool:
        return True

    def is_ipc_supported(self) -> bool:
        return False
