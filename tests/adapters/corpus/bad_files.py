"""Adapters whose folder is not what it should be."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import torch

from vllm_multilora.adapters.problems import Code

from .cases import Change, add_bad
from .draft import CONFIG, WEIGHTS, Draft, content, files, resized
from .headers import append_hole

MISSING, NO_FOLDER = Code.FILE_MISSING, Code.FOLDER_MISSING
NOT_SAFETENSORS, NOT_A_FILE = Code.NOT_SAFETENSORS, Code.NOT_A_FILE
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"
PAGE = b"<!DOCTYPE html><html><body>404 Not Found</body></html>"


def in_place_of(name: str, make: Callable[[Path], object]) -> Change:
    """Makes something else where a file is; the folder itself, where the name is empty."""

    def step(folder: Path) -> None:
        path = folder / name
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()
        make(path)

    return files(step)


def nothing(path: Path) -> None: ...


def empty(draft: Draft) -> None:
    in_place_of(CONFIG, nothing)(draft)
    in_place_of(WEIGHTS, nothing)(draft)


def pickled(name: str) -> Change:
    def change(draft: Draft) -> None:
        in_place_of(WEIGHTS, lambda path: torch.save(draft.tensors, path.with_name(name)))(draft)

    return change


add_bad(
    "",
    {
        "folder-missing": (files(shutil.rmtree), NO_FOLDER, "does not exist", CONFIG, WEIGHTS),
        "folder-a-file": (in_place_of("", Path.touch), NO_FOLDER, "is a file"),
    },
)
add_bad(
    CONFIG,
    {
        "config-missing": (in_place_of(CONFIG, nothing), MISSING, "does not exist"),
        "folder-empty": (empty, (MISSING, MISSING), "does not exist"),
        "config-a-pipe": (in_place_of(CONFIG, os.mkfifo), NOT_A_FILE, "not a regular file"),
    },
)
add_bad(
    WEIGHTS,
    {
        "weights-missing": (in_place_of(WEIGHTS, nothing), MISSING, "does not exist"),
        "weights-pickled": (
            pickled("adapter_model.bin"),
            *(MISSING, "adapter_model.bin", "safetensors"),
        ),
        "weights-pickled-under-the-right-name": (
            pickled(WEIGHTS),
            *(NOT_SAFETENSORS, "a zip archive, as torch.save writes"),
        ),
        "weights-a-git-lfs-pointer": (
            content(WEIGHTS, POINTER),
            *(NOT_SAFETENSORS, "a Git LFS pointer", "git lfs pull"),
        ),
        "weights-a-web-page": (content(WEIGHTS, PAGE), NOT_SAFETENSORS, "HTML"),
        "weights-empty": (
            content(WEIGHTS, b""),
            *(NOT_SAFETENSORS, "0 bytes", "ends inside the header"),
        ),
        "weights-garbage": (
            content(WEIGHTS, b"\xa5" * 5000),
            *(NOT_SAFETENSORS, "its header should have"),
        ),
        "weights-a-folder": (in_place_of(WEIGHTS, Path.mkdir), NOT_A_FILE, "not a regular file"),
        "weights-a-link-to-nowhere": (
            in_place_of(WEIGHTS, lambda path: path.symlink_to("/nowhere")),
            *(MISSING, "does not exist"),
        ),
        "weights-cut-short": (
            resized(WEIGHTS, -100),
            *(Code.FILE_SIZE, "bytes, expected", "truncated"),
        ),
        "weights-with-a-tail": (
            resized(WEIGHTS, 4),
            *(Code.FILE_SIZE, "bytes, expected"),
        ),
        # What no slot gets makes the file too large: a copy of the embedding, which has holes.
        "weights-larger-than-any-adapter": (
            files(
                lambda folder: append_hole(
                    folder, "base_model.model.model.embed_tokens.base_layer.weight", 300 << 20
                )
            ),
            *(Code.FILE_TOO_LARGE, "bytes, expected at most", "largest adapter"),
        ),
    },
)
