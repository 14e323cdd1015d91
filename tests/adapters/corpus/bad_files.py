"""Adapters whose folder is not what it should be."""

import json
import os
import shutil
from pathlib import Path

import torch

from vllm_multilora.adapters.problems import Code

from .cases import bad, bad_config, bad_weights
from .draft import CONFIG, WEIGHTS, Draft


@bad("", Code.FOLDER_MISSING, words=("does not exist", CONFIG, WEIGHTS))
def folder_missing(draft: Draft) -> None:
    draft.afterwards.append(shutil.rmtree)


@bad("", Code.FOLDER_MISSING, words=("is a file",))
def folder_a_file(draft: Draft) -> None:
    def replace(folder: Path) -> None:
        shutil.rmtree(folder)
        folder.write_text("{}")

    draft.afterwards.append(replace)


@bad_config(Code.FILE_MISSING, words=("does not exist",))
def config_missing(draft: Draft) -> None:
    draft.afterwards.append(lambda folder: (folder / CONFIG).unlink())


@bad_weights(Code.FILE_MISSING, words=("does not exist",))
def weights_missing(draft: Draft) -> None:
    draft.afterwards.append(lambda folder: (folder / WEIGHTS).unlink())


@bad_config(Code.FILE_MISSING, Code.FILE_MISSING, words=("does not exist",))
def folder_empty(draft: Draft) -> None:
    def empty(folder: Path) -> None:
        (folder / CONFIG).unlink()
        (folder / WEIGHTS).unlink()

    draft.afterwards.append(empty)


@bad_weights(Code.FILE_MISSING, words=("adapter_model.bin", "safetensors"))
def weights_pickled(draft: Draft) -> None:
    def pickle(folder: Path) -> None:
        torch.save(draft.tensors, folder / "adapter_model.bin")
        (folder / WEIGHTS).unlink()

    draft.afterwards.append(pickle)


@bad_weights(Code.NOT_SAFETENSORS, words=("a zip archive, as torch.save writes",))
def weights_pickled_under_the_right_name(draft: Draft) -> None:
    draft.afterwards.append(lambda folder: torch.save(draft.tensors, folder / WEIGHTS))


@bad_weights(Code.NOT_SAFETENSORS, words=("a Git LFS pointer", "git lfs pull"))
def weights_a_git_lfs_pointer(draft: Draft) -> None:
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"
    draft.afterwards.append(lambda folder: (folder / WEIGHTS).write_bytes(pointer))


@bad_weights(Code.NOT_SAFETENSORS, words=("HTML",))
def weights_a_web_page(draft: Draft) -> None:
    page = b"<!DOCTYPE html><html><body>404 Not Found</body></html>"
    draft.afterwards.append(lambda folder: (folder / WEIGHTS).write_bytes(page))


@bad_weights(Code.NOT_SAFETENSORS, words=("0 bytes", "ends inside the header"))
def weights_empty(draft: Draft) -> None:
    draft.afterwards.append(lambda folder: (folder / WEIGHTS).write_bytes(b""))


@bad_weights(Code.NOT_SAFETENSORS, words=("its header should have",))
def weights_garbage(draft: Draft) -> None:
    draft.afterwards.append(lambda folder: (folder / WEIGHTS).write_bytes(b"\xa5" * 5000))


@bad_weights(Code.NOT_A_FILE, words=("not a regular file",))
def weights_a_folder(draft: Draft) -> None:
    def replace(folder: Path) -> None:
        (folder / WEIGHTS).unlink()
        (folder / WEIGHTS).mkdir()

    draft.afterwards.append(replace)


@bad_config(Code.NOT_A_FILE, words=("not a regular file",))
def config_a_pipe(draft: Draft) -> None:
    def replace(folder: Path) -> None:
        (folder / CONFIG).unlink()
        os.mkfifo(folder / CONFIG)

    draft.afterwards.append(replace)


@bad_weights(Code.FILE_MISSING, words=("does not exist",))
def weights_a_link_to_nowhere(draft: Draft) -> None:
    def replace(folder: Path) -> None:
        (folder / WEIGHTS).unlink()
        (folder / WEIGHTS).symlink_to("/nowhere/adapter_model.safetensors")

    draft.afterwards.append(replace)


@bad_weights(Code.FILE_SIZE, words=("bytes, expected", "truncated"))
def weights_cut_short(draft: Draft) -> None:
    draft.afterwards.append(
        lambda folder: os.truncate(folder / WEIGHTS, (folder / WEIGHTS).stat().st_size - 100)
    )


@bad_weights(Code.FILE_SIZE, words=("bytes, expected",))
def weights_with_a_tail(draft: Draft) -> None:
    def append(folder: Path) -> None:
        with (folder / WEIGHTS).open("ab") as file:
            file.write(b"tail")

    draft.afterwards.append(append)


@bad_weights(Code.FILE_TOO_LARGE, words=("bytes, expected at most", "largest adapter"))
def weights_larger_than_any_adapter(draft: Draft) -> None:
    """A copy of the embedding, which nobody reads, makes the file too large; it has holes."""
    name = "base_model.model.model.embed_tokens.base_layer.weight"

    def grow(folder: Path) -> None:
        content = (folder / WEIGHTS).read_bytes()
        length = int.from_bytes(content[:8], "little")
        header = json.loads(content[8 : 8 + length])
        data = len(content) - 8 - length
        more = 300 << 20
        header[name] = {"dtype": "U8", "shape": [more], "data_offsets": [data, data + more]}
        text = json.dumps(header).encode()
        written = len(text).to_bytes(8, "little") + text + content[8 + length :]
        (folder / WEIGHTS).write_bytes(written)
        os.truncate(folder / WEIGHTS, len(written) + more)

    draft.afterwards.append(grow)
