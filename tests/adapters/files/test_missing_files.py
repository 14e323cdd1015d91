"""A path that is no adapter's folder: what it is, and what to do."""

import pytest

from vllm_multilora.adapters.files.missing_files import no_file, no_folder
from vllm_multilora.adapters.problems import Code

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"


def test_a_url_is_shown_whole():
    problem = no_folder("s3://bucket/acme/v1")
    assert problem.message.startswith("s3://bucket/acme/v1 is a URL")
    assert "download" in problem.hint


def test_a_file_and_nothing_are_distinguished():
    assert "give the path of the folder" in no_folder(f"/a/{TENSORS}", is_file=True).hint
    assert "the adapter folder /a does not exist" in no_folder("/a").message


def test_a_path_of_a_strangers_making_is_shown_printable():
    assert no_folder("/a\x1b[2J\ud800" + "x" * 10_000).message.isprintable()


@pytest.mark.parametrize(
    ("missing", "entries", "nested", "words"),
    [
        (CONFIG, ["default"], ["default"], "such as /a/default"),
        (CONFIG, ["v1", "v2", "README.md"], ["v1", "v2"], "such as /a/v1"),
        (TENSORS, [CONFIG, "adapter_model.safetensors.index.json"], [], "in several files"),
        (TENSORS, [CONFIG, "adapter_model-00001-of-00002.safetensors"], [], "as one file"),
        (TENSORS, [CONFIG, "adapter_model.bin"], [], "--multilora-allow-pickle"),
        (CONFIG, ["config.json", "model.safetensors"], [], "a whole model"),
        (TENSORS, [CONFIG, "adapters.safetensors"], [], "MLX-LM's format (adapters.safetensors)"),
        (CONFIG, ["pytorch_lora_weights.safetensors"], [], "Diffusers' format"),
        (CONFIG, [TENSORS], [], f"/a/{CONFIG} does not exist, expected an adapter folder"),
        (TENSORS, [CONFIG], [], f"/a/{TENSORS} does not exist, expected an adapter folder"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_what_a_folder_has_instead_is_said_with_what_to_do(missing, entries, nested, words):
    problem = no_file("/a", missing, entries, nested)
    assert problem.code == Code.FILE_MISSING
    assert words in str(problem)
