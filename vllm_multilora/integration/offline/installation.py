"""`vllm-multilora doctor`: shows what is installed, and what would run."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Mapping
from importlib.metadata import entry_points

import torch

from multilora_kernels import NativeUnavailableError, TritonUnavailableError
from multilora_kernels.native import load_library
from vllm_multilora import __version__
from vllm_multilora.config import MultiLoRAConfig
from vllm_multilora.failures import describe_failure
from vllm_multilora.integration.cpu_compilation import compiler_problem
from vllm_multilora.integration.offline.gpu_tools import (
    chosen_kernels,
    triton_folder,
    triton_problems,
)
from vllm_multilora.integration.patching.activation import choose_backend
from vllm_multilora.integration.patching.decision import acts, said_of
from vllm_multilora.integration.patching.parts import CORE
from vllm_multilora.integration.patching.tables import ledger
from vllm_multilora.integration.patching.version import (
    distributions,
    installed_version,
    is_expected,
)
from vllm_multilora.store.jobs import sandbox
from vllm_multilora.store.protocol import store_folder
from vllm_multilora.wording import counted

PLUGIN_GROUP, PLUGIN_NAME = "vllm.general_plugins", "multilora"
_AUDIO = (
    "; where that is torchaudio or torchcodec, pip uninstall torchaudio torchcodec: PyPI's builds "
    "of them need CUDA, and vLLM does without"
)


def diagnose() -> int:
    """Prints the diagnosis; 0 if the plugin acts on a plain `vllm serve --enable-lora`, or 1."""
    problems: list[str] = []
    print(f"vllm-multilora  {__version__}")
    print(f"torch           {torch.__version__}, {counted(torch.get_num_threads(), 'thread')}")
    if importlib.util.find_spec("vllm") is None:
        print("vLLM            not installed: pip install 'vllm-multilora[cuda]' or '[cpu]'")
        return 1
    installed = installed_version()
    print(f"vLLM            {installed or 'no metadata'} (tested: {CORE.tested})")
    problems += _check_distributions(dict(distributions()))
    problems += _check_entry_point()

    from vllm.platforms import current_platform

    print(f"platform        {current_platform.device_name or current_platform.device_type}")
    device = "cuda" if current_platform.is_cuda_alike() else current_platform.device_type
    print(f"kernels         {_kernels(device, problems)}")
    if device == "cuda":
        problems += triton_problems()
        print(f"Triton's cache  {triton_folder()}")
    if current_platform.is_cpu():
        print(f"torch.compile   {compiler_problem() or 'a C++ compiler was found'}")
    if chosen := [*chosen_kernels()]:
        print("kernels chosen at earlier starts")
        print("\n".join(f"  {line}" for line in chosen))
    print(f"store           {_store(problems)}")
    print(f"checks in it    {', '.join(sandbox.protection())}")
    for seams in ledger.SEAMS:
        is_on = acts(seams)
        print(f"{seams.part.name:15} {'acts on this vLLM' if is_on else 'inactive (see below)'}")
        if not is_on:
            hint = "; --multilora forces it on" if seams.part is CORE else ""
            problems.append(f"{said_of(seams)}{hint}")
    print("patches")
    try:
        problems += _check_patches()
    except Exception as error:  # of vLLM, or of what it imports
        problems.append(f"vLLM cannot be imported: {describe_failure(error)}{_AUDIO}")
    print()
    for problem in problems:
        print(f"problem: {problem}")
    if problems:
        print("The plugin would not act as it should.")
        return 1
    print("Ready: vllm serve MODEL --enable-lora")
    return 0


def _check_patches() -> list[str]:
    problems = []
    width = max(len(patch.name) for patch in ledger.PATCHES)
    for patch in ledger.PATCHES:
        if not is_expected(patch.target, installed_version()):
            continue
        applied = patch.apply()
        print(f"  {'in place' if applied else 'MISSING '}  {patch.name:{width}} {patch.target}")
        if not applied:
            problems.append(f"patch {patch.name!r} does not fit this vLLM")
    return problems


def _check_distributions(found: Mapping[str, str]) -> list[str]:
    if "vllm" not in found:
        return [
            "no distribution named 'vllm': vLLM's own command will not start. Install one that has "
            "vLLM's version and nothing else, as packaging/vllm-cpu-metadata in the source "
            "distribution of vllm-multilora"
        ]
    if len({text.partition("+")[0] for text in found.values()}) > 1:
        both = " and ".join(f"{name} {text}" for name, text in found.items())
        return [f"found {both}, which must be one version: install both again"]
    return []


def _check_entry_point() -> list[str]:
    seen = [p for p in entry_points(group=PLUGIN_GROUP) if p.name == PLUGIN_NAME]
    allowed = os.environ.get("VLLM_PLUGINS")
    if not seen:
        print("plugin          not seen")
        return ["vLLM sees no plugin 'multilora'; install this package with pip"]
    if allowed is not None and PLUGIN_NAME not in allowed.split(","):
        print("plugin          seen, but not allowed")
        return [f"VLLM_PLUGINS={allowed!r} leaves the plugin out; add {PLUGIN_NAME!r} to it"]
    print(f"plugin          seen by vLLM ({seen[0].value})")
    return []


def _store(problems: list[str]) -> str:
    """How the default settings run it, and where it is found."""
    try:
        path = store_folder.socket_path(store_folder.store_folder())
    except store_folder.StoreUnavailableError as error:
        problems.append(f"store: {error}")
        return "none (see below)"
    try:
        store_folder.connect(path).close()
    except OSError:
        state = "not running: the first server starts it"
    else:
        state = "running: vllm-multilora store --describe"
    return f"{MultiLoRAConfig().store}, at {path} ({state})"


def _kernels(device_type: str, problems: list[str]) -> str:
    """What the default settings mean on a device, in words."""
    if device_type == "cpu":
        try:
            return f"native ({load_library()._name})"
        except NativeUnavailableError as error:
            problems.append(f"native kernels: {error}")
            return "torch (slower; see below)"
    try:
        backend = choose_backend(MultiLoRAConfig(), device_type)
    except TritonUnavailableError as error:
        problems.append(f"Triton kernels: {error}")
        return "none (see below)"
    return "vllm (no others for this platform)" if backend == "vllm" else backend
