"""A base model and adapters of a usual size, good ones and hostile ones, for benchmarks.

The model has no weights: a server makes them up (`--load-format dummy`), which takes no disk and
changes no time.
"""

from __future__ import annotations

import json
import os
import shutil
import struct
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.steps.cpu_throughput import PROJECTIONS, write_random_adapter

RANK = 64
VOCABULARY = 1024
MODEL = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 2048,
    "intermediate_size": 8832,  # so that an adapter of rank 64 has 47 MB
    "num_hidden_layers": 8,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "hidden_act": "silu",
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "vocab_size": VOCABULARY,
}
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def write_base(folder: Path) -> Path:
    """Writes the model's configuration and a tokenizer of the words `t0 t1 ...`."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(MODEL))
    words = {f"t{number}": number for number in range(VOCABULARY)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="t0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="t0").save_pretrained(folder)
    return folder


class Fleet:
    """Adapters in a folder, each with files and bytes of its own: none is known from another one.

    Args:
        folder: Of all of them.
        model: The base model's configuration.
        rank: Theirs, where no other is asked for.
        projections: That they adapt.
        base: The server's `--model`, by which vLLM's resolver knows whose they are.
    """

    def __init__(
        self,
        folder: Path,
        model: dict[str, Any],
        rank: int,
        projections: Sequence[str] = PROJECTIONS,
        base: Path | None = None,
    ) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self._model, self._rank, self._projections = model, rank, projections
        self._base = base
        self._count = 0

    @property
    def _first(self) -> Path:
        return self._of_rank(self._rank)

    def _of_rank(self, rank: int) -> Path:
        """An adapter whose copies the others are."""
        path = self.folder.parent / f"first-adapter-{rank}"
        if not path.exists():
            write_random_adapter(path, self._model, rank, rank, self._projections)
            if self._base is not None:
                _change(path, base_model_name_or_path=str(self._base))
        return path

    def add(self, name: str, folder: Path | None = None, rank: int | None = None) -> Path:
        """Writes another adapter; where there is one, other weights take the place of its own."""
        self._count += 1
        path = (folder or self.folder) / name
        hidden = path.with_name(f".{name}")  # directories are looked at meanwhile
        shutil.rmtree(hidden, ignore_errors=True)
        shutil.copytree(self._of_rank(rank or self._rank), hidden)
        with (hidden / WEIGHTS).open("r+b") as file:
            file.seek(-8, os.SEEK_END)
            digits = (0x3C00 + self._count // 128**place % 128 for place in range(4))
            file.write(struct.pack("<4H", *digits))  # finite in bfloat16
            os.fsync(file.fileno())
        hidden.rename(path)
        return path

    def remove(self, name: str) -> None:
        """Deletes an adapter's files."""
        shutil.rmtree(self.folder / name)

    def add_hostile(self) -> dict[str, Path]:
        """Writes one adapter for each thing that a customer may try."""
        found = {}
        for spoil in HOSTILE:
            path = self.folder / spoil.__name__.replace("_", "-")
            path.mkdir()
            shutil.copy(self._first / CONFIG, path / CONFIG)
            os.link(self._first / WEIGHTS, path / WEIGHTS)
            spoil(path)
            found[path.name] = path
        return found


def header_of_40_mib(path: Path) -> None:
    """Lists of nothing, which take many times their text's memory."""
    text = b'{"__metadata__":[' + b",".join([b"[]"] * (40 * 2**20 // 3)) + b"]}"
    (path / WEIGHTS).unlink()
    (path / WEIGHTS).write_bytes(struct.pack("<Q", len(text)) + text)


def ten_thousand_patterns(path: Path) -> None:
    """Each to be matched with each module."""
    _change(path, rank_pattern={f"(a|a?)+{number}b$": 8 for number in range(10_000)})


def expression_of_4_mib(path: Path) -> None:
    """As large as a configuration may be."""
    _change(path, rank_pattern={"(" + "a|" * (2 * 2**20 - 500) + "a)*b": 8})


def fifo_for_a_configuration(path: Path) -> None:
    """Whoever opens it to read waits for somebody who writes."""
    (path / CONFIG).unlink()
    os.mkfifo(path / CONFIG)


def deep_nesting(path: Path) -> None:
    """Deeper than parsers recurse."""
    (path / CONFIG).write_text("[" * 1_000_000 + "]" * 1_000_000)


HOSTILE: tuple[Callable[[Path], None], ...] = (
    header_of_40_mib,
    ten_thousand_patterns,
    expression_of_4_mib,
    fifo_for_a_configuration,
    deep_nesting,
)


def _change(path: Path, **values: object) -> None:
    config = json.loads((path / CONFIG).read_text())
    (path / CONFIG).write_text(json.dumps(config | values))
