"""Explains a path that is not a folder with an adapter's two files.

Only names are looked at here; whoever opens the files lists the folder.
"""

from __future__ import annotations

import re
from collections.abc import Collection

from vllm_multilora.adapters.problems import Code, Problem, shown_name

EXPECTED = "an adapter folder that holds adapter_config.json and adapter_model.safetensors"
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]{1,15}://")
_SHARD = re.compile(r".*-\d+-of-\d+\.safetensors|.*\.safetensors\.index\.json")
_MAX_NAMED = 5
# Files of other formats than PEFT's, and whose they are.
_FOREIGN = {
    "adapters.safetensors": "an adapter in MLX-LM's format",
    "adapters.npz": "an adapter in MLX-LM's format",
    "pytorch_lora_weights.safetensors": "an adapter in Diffusers' format",
}


def is_url(path: str) -> bool:
    """Whether a path is a URL, which leads to no folder."""
    return _URL.match(path) is not None


def no_folder(path: str, *, is_file: bool = False) -> Problem:
    """The problem of a path that leads to no folder, as it was given: `Path` would change a URL."""
    name = shown_name(path)
    if is_url(path):
        message = f"{name} is a URL, and adapters are read from folders, expected {EXPECTED}"
        hint = "download the adapter, and give the path of its folder"
        return Problem(Code.FOLDER_MISSING, name, "", "a URL", EXPECTED, message, hint)
    if is_file:
        message = f"{name} is a file, expected {EXPECTED}"
        hint = "give the path of the folder that the file is in"
        return Problem(Code.FOLDER_MISSING, name, "", "a file", EXPECTED, message, hint)
    message = f"the adapter folder {name} does not exist, expected {EXPECTED}"
    return Problem(Code.FOLDER_MISSING, name, "", "nothing", EXPECTED, message)


def no_file(
    folder: str, missing: str, entries: Collection[str], nested: Collection[str]
) -> Problem:
    """The problem of a folder without one of its two files; `nested` are adapters in it."""
    path = f"{folder}/{missing}"
    found, hint = _instead(folder, missing, entries, nested)
    if not found:
        message = f"{path} does not exist, expected {EXPECTED}"
        return Problem(Code.FILE_MISSING, path, "", "nothing", EXPECTED, message)
    message = f"{path} does not exist; the folder has {found} instead, expected {missing}"
    return Problem(Code.FILE_MISSING, path, "", found, missing, message, hint)


def _instead(
    folder: str, missing: str, entries: Collection[str], nested: Collection[str]
) -> tuple[str, str]:
    """What a folder has instead of a file, and what to do; both may be empty."""
    if nested and missing not in entries:
        names = _names(nested)
        first = "default" if "default" in nested else min(nested)
        return (
            f"adapters in folders of their own ({names})",
            f"PEFT saves adapters with names in sub-folders: give the path of one, such as "
            f"{folder}/{shown_name(first)}",
        )
    shards = [name for name in entries if _SHARD.fullmatch(name)]
    if shards:
        return (
            f"a checkpoint in several files ({_names(shards)})",
            "save the adapter as one file: with PEFT's save_pretrained, or Transformers' with "
            "max_shard_size='100GB'; or load the shards with safetensors and save them together",
        )
    weights = [name for name in entries if name.startswith("adapter_model") and name != missing]
    if weights and missing.startswith("adapter_model"):
        return (
            _names(weights),
            "save the adapter as one safetensors file (PEFT's default); pickled weights are read "
            "with --multilora-allow-pickle only",
        )
    for name, what in _FOREIGN.items():
        if name in entries:
            return (
                f"{what} ({name})",
                "convert it to PEFT's: names, configuration and the order of dimensions differ",
            )
    if "model.safetensors" in entries and "config.json" in entries:
        return (
            "a whole model (config.json, model.safetensors)",
            "serve it as a base model, or save the adapter before it is merged",
        )
    return "", ""


def _names(names: Collection[str]) -> str:
    return shown_name(", ".join(sorted(names)[:_MAX_NAMED]))
