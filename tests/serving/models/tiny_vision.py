"""Tiny random models that look at images, written as ordinary Hugging Face checkpoints."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    Idefics3ImageProcessorPil,
    Idefics3Processor,
    Idefics3VisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextImageProcessorPil,
    LlavaNextProcessor,
    LlavaProcessor,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    ProcessorMixin,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen2VLImageProcessorPil,
    Qwen2VLProcessor,
    Qwen2VLVideoProcessor,
)

from .tiny_models import TWO_LAYERS, VOCAB_SIZE, randomise, word_tokenizer

IMAGE_TOKEN = VOCAB_SIZE
"""What stands for an image in a prompt; the first token that is no word."""

_SPECIAL = ("<image>", "<video>", "<vision>", "</vision>")
_TOKENS = VOCAB_SIZE + len(_SPECIAL)

_SIDE, _PATCH = 28, 14
"""Sides of images and of their patches, in pixels."""

_SQUARE = {"height": _SIDE, "width": _SIDE}
_FEATURES = "default"  # those of a LLaVA's tower without the one of its class's token

_TOWER = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": _SIDE,
    "patch_size": _PATCH,
}
_TEXT = {**TWO_LAYERS, "vocab_size": _TOKENS}


def write_llava(path: Path, *, seed: int = 5) -> Path:
    """Writes a LLaVA whose tower is a CLIP: it has a token more than it hands on, its class's."""
    images = CLIPImageProcessorPil(size=_SQUARE, crop_size=_SQUARE)
    model = LlavaForConditionalGeneration(_llava_config(LlavaConfig))
    _write(model, _llava_processor(LlavaProcessor, images), path, seed)
    return _with_older_names(path)


def write_llava_next(path: Path, *, seed: int = 9) -> Path:
    """Writes a LLaVA-NeXT: as a LLaVA, and it looks at an image tile by tile."""
    tiles = [[_SIDE, 2 * _SIDE], [2 * _SIDE, _SIDE]]
    images = LlavaNextImageProcessorPil(
        size={"shortest_edge": _SIDE}, crop_size=_SQUARE, image_grid_pinpoints=tiles
    )
    config = _llava_config(LlavaNextConfig, image_grid_pinpoints=tiles)
    model = LlavaNextForConditionalGeneration(config)
    _write(model, _llava_processor(LlavaNextProcessor, images), path, seed)
    return _with_older_names(path)


def _llava_config(made: type, **fields: Any) -> Any:
    return made(
        vision_config=CLIPVisionConfig(**_TOWER),
        text_config=LlamaConfig(**_TEXT),
        image_token_index=IMAGE_TOKEN,
        vision_feature_layer=-1,
        vision_feature_select_strategy=_FEATURES,
        tie_word_embeddings=False,
        **fields,
    )


def _llava_processor(made: type, images: Any) -> Any:
    return made(
        image_processor=images,
        tokenizer=_tokenizer(),
        patch_size=_PATCH,
        vision_feature_select_strategy=_FEATURES,
        image_token="<image>",
        num_additional_image_tokens=1,
    )


def _with_older_names(path: Path) -> Path:
    """Published checkpoints have the names of before Transformers 5, which vLLM asks for."""
    file = path / "model.safetensors"
    tensors = {
        name.replace("vision_tower.", "vision_tower.vision_model."): tensor
        for name, tensor in load_file(file).items()
    }
    save_file(tensors, file, {"format": "pt"})
    return path


def write_qwen2_vl(path: Path, *, seed: int = 6) -> Path:
    """Writes a Qwen2-VL: its images have as many tokens as their sizes make of them."""
    config = Qwen2VLConfig(
        text_config={
            **_TEXT,
            "rope_parameters": {
                "rope_type": "default",
                "mrope_section": [4, 6, 6],
                "rope_theta": 1e4,
            },
        },
        vision_config={
            "depth": 2,
            "embed_dim": 64,
            "hidden_size": _TEXT["hidden_size"],
            "num_heads": 2,
            "mlp_ratio": 2,
            "patch_size": _PATCH,
        },
        image_token_id=IMAGE_TOKEN,
        video_token_id=IMAGE_TOKEN + 1,
        vision_start_token_id=IMAGE_TOKEN + 2,
        vision_end_token_id=IMAGE_TOKEN + 3,
        tie_word_embeddings=False,
    )
    pixels = {"shortest_edge": _SIDE**2, "longest_edge": 16 * _SIDE**2}
    processor = Qwen2VLProcessor(
        image_processor=Qwen2VLImageProcessorPil(size=pixels),
        tokenizer=_tokenizer(),
        video_processor=Qwen2VLVideoProcessor(size=pixels),
    )
    return _write(Qwen2VLForConditionalGeneration(config), processor, path, seed)


def write_idefics3(path: Path, *, seed: int = 7) -> Path:
    """Writes an Idefics3: it looks at an image tile by tile, and hands on one token of four."""
    tiles = 3
    """Along an image's longer side."""
    special = (
        *("<fake_token_around_image>", "<global-img>", "<end_of_utterance>"),
        *(f"<row_{row + 1}_col_{column + 1}>" for row in range(tiles) for column in range(tiles)),
    )
    config = Idefics3Config(
        vision_config=Idefics3VisionConfig(**_TOWER),
        text_config=LlamaConfig(**{**_TEXT, "vocab_size": _TOKENS + len(special)}),
        scale_factor=2,
        image_token_id=IMAGE_TOKEN,
        pad_token_id=None,
        tie_word_embeddings=False,
    )
    processor = Idefics3Processor(
        image_processor=Idefics3ImageProcessorPil(
            size={"longest_edge": tiles * _SIDE}, max_image_size={"longest_edge": _SIDE}
        ),
        tokenizer=_tokenizer(special),
        image_seq_len=(_SIDE // _PATCH // config.scale_factor) ** 2,
    )
    return _write(Idefics3ForConditionalGeneration(config), processor, path, seed)


def _tokenizer(more: Sequence[str] = ()) -> PreTrainedTokenizerFast:
    names = dict(zip(("image", "video", "vision_bos", "vision_eos"), _SPECIAL, strict=True))
    return word_tokenizer(
        (*_SPECIAL, *more), **{f"{kind}_token": text for kind, text in names.items()}
    )


def _write(model: PreTrainedModel, processor: ProcessorMixin, path: Path, seed: int) -> Path:
    model = model.to(torch.float32)
    randomise(model, torch.Generator().manual_seed(seed))
    model.lm_head.weight.data[VOCAB_SIZE:] = 0.0  # answers are words
    model.save_pretrained(path)
    processor.save_pretrained(path)
    return path
