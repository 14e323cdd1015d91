"""What judges adapters runs in processes without PyTorch."""

import subprocess
import sys

import pytest
import torch

from multilora_kernels import dtypes

_MODULES = (
    "config.adapter_config",
    "config.config_checks",
    "directory",
    "files.header",
    "model.layout",
    "model.size_limits",
    "checks.missing_modules",
    "checks.placement",
    "checks.shape_checks",
)


def test_judging_an_adapter_imports_no_torch():
    imports = ", ".join(f"vllm_multilora.adapters.{name}" for name in _MODULES)
    code = f"import sys, {imports}; assert 'torch' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("kind", dtypes.SAFETENSORS_DTYPES.values(), ids=str)
def test_a_dtype_is_pytorchs_of_the_same_name_and_size(kind):
    assert isinstance(kind.torch, torch.dtype)
    assert kind.torch.itemsize == kind.itemsize
    assert dtypes.of_torch(kind.torch) == kind
