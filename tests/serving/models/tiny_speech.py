"""A tiny random Whisper, written as an ordinary Hugging Face checkpoint."""

from pathlib import Path

import torch
from transformers import (
    WhisperConfig,
    WhisperFeatureExtractor,
    WhisperForConditionalGeneration,
    WhisperProcessor,
    WhisperTokenizer,
)

from .tiny_models import VOCAB_SIZE, randomise

SECONDS = 2
"""Seconds of sound that the encoder looks at."""
RATE = 16_000
"""Samples a second."""

_SPECIAL = (
    "<|endoftext|>",
    "<|startoftranscript|>",
    "<|en|>",
    "<|transcribe|>",
    "<|translate|>",
    "<|notimestamps|>",
)
_TOKENS = {text: VOCAB_SIZE + number for number, text in enumerate(_SPECIAL)}
END, START, ENGLISH = (_TOKENS[text] for text in _SPECIAL[:3])


def prompt_of(task: str) -> tuple[int, ...]:
    """What the transcription, or the translation, of an English recording begins with."""
    return START, ENGLISH, _TOKENS[f"<|{task}|>"], _TOKENS["<|notimestamps|>"]


def write_whisper(path: Path, *, seed: int = 8) -> Path:
    """Writes a Whisper with two layers in its encoder and in its decoder."""
    config = WhisperConfig(
        vocab_size=VOCAB_SIZE + len(_SPECIAL),
        num_mel_bins=80,
        d_model=64,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=96,
        decoder_ffn_dim=96,
        max_source_positions=50 * SECONDS,
        max_target_positions=64,
        decoder_start_token_id=START,
        bos_token_id=END,
        eos_token_id=END,
        pad_token_id=END,
        suppress_tokens=None,
        begin_suppress_tokens=None,
    )
    model = WhisperForConditionalGeneration(config).to(torch.float32)
    positions = model.model.encoder.embed_positions.weight.clone()
    randomise(model, torch.Generator().manual_seed(seed))
    model.model.encoder.embed_positions.weight.data.copy_(positions)  # sines
    # The head is tied: what layers add has to count for more than the last token's embedding.
    for name, parameter in model.named_parameters():
        if name.endswith(("out_proj.weight", "fc2.weight")):
            parameter.data.mul_(8.0)
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            parameter.data.mul_(2.0)  # attention that does not look everywhere at once
        if name.endswith("norm.bias"):
            parameter.data.sub_(1.0)  # around zero
        if ".conv" in name:
            parameter.data.mul_(4.0)
    model.model.decoder.embed_tokens.weight.data.mul_(0.3)
    model.model.decoder.embed_positions.weight.data.mul_(16.0)
    model.model.decoder.layer_norm.weight.data.mul_(4.0)
    model.generation_config.lang_to_id = {"<|en|>": ENGLISH}
    model.save_pretrained(path)
    WhisperProcessor(WhisperFeatureExtractor(chunk_length=SECONDS), _tokenizer()).save_pretrained(
        path
    )
    return path


def _tokenizer() -> WhisperTokenizer:
    words = {f"t{number}": number for number in range(VOCAB_SIZE)}
    return WhisperTokenizer(
        vocab=words | _TOKENS,
        merges=[],
        unk_token="<|en|>",  # for all languages' tokens: there is no other
        additional_special_tokens=[*_SPECIAL],
    )
