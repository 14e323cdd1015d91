"""Questions about images, and what PEFT and transformers answer under each adapter."""

import base64
import io
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import PeftModel
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from ..bases.test_classification import text
from .cases import MIN_MARGIN
from .recipes import AdapterRecipe
from .tiny_adapters import write_adapters
from .tiny_models import VOCAB_SIZE
from .tiny_vision import IMAGE_TOKEN

NEW_TOKENS = 6
_CANDIDATES = 8

TEMPLATE = (
    "{% for message in messages %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<vision> <image> </vision>{% else %}{{ part['text'] }}"
    "{% endif %} {% endfor %}{% endfor %}"
)
"""A chat template that writes an image where a prompt of these questions has it."""


@dataclass(frozen=True)
class Question:
    """A prompt with its images, and its true answer.

    Attributes:
        adapter: Its name; None: the base model.
        images: Numbers of images, which stand in the prompt one after the other.
        prompt: Token ids; each image is one of them.
        answer: Token ids, greedily decoded.
    """

    adapter: str | None
    images: tuple[int, ...]
    prompt: tuple[int, ...]
    answer: tuple[int, ...] = field(repr=False)

    def request(self) -> dict[str, Any]:
        """As vLLM takes it."""
        images = {"image": [picture(number) for number in self.images]} if self.images else {}
        return {"prompt_token_ids": list(self.prompt), "multi_modal_data": images}


def picture(number: int) -> Image.Image:
    """Coloured squares."""
    source = np.random.default_rng(number)
    squares = source.integers(0, 256, (2, 2 + number % 2, 3), dtype=np.uint8)
    return Image.fromarray(squares.repeat(14 * 2, 0).repeat(14 * 2, 1))


def data_url(number: int) -> str:
    file = io.BytesIO()
    picture(number).save(file, "png")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def chat(question: Question) -> list[dict[str, Any]]:
    """A question's message, its image where it stands in the prompt."""
    words = question.prompt
    if not question.images:
        return [{"role": "user", "content": [{"type": "text", "text": text(words)}]}]
    place = words.index(IMAGE_TOKEN)
    (number,) = question.images
    parts = [
        {"type": "text", "text": text(words[: place - 1])},
        {"type": "image_url", "image_url": {"url": data_url(number)}},
        {"type": "text", "text": text(words[place + 2 :])},
    ]
    return [{"role": "user", "content": parts}]


class VisionReference:
    """A base model with its adapters in transformers + PEFT: greedy decoding without a cache.

    Args:
        base: Directory of the base checkpoint.
        adapters: Adapter directories by name.
    """

    def __init__(self, base: Path, adapters: Mapping[str, Path]) -> None:
        model = AutoModelForImageTextToText.from_pretrained(base, dtype=torch.float32)
        (first, path), *others = adapters.items()
        self._model = PeftModel.from_pretrained(model.eval(), path, adapter_name=first)
        for name, path in others:
            self._model.load_adapter(path, adapter_name=name)
        self._processor = AutoProcessor.from_pretrained(base)

    @torch.inference_mode()
    def answer(
        self, adapter: str | None, images: Sequence[int], prompt: Sequence[int]
    ) -> tuple[tuple[int, ...], float]:
        """The tokens of a question's answer, and the narrowest margin between best and second."""
        inputs = self._processor(
            text=self._processor.tokenizer.decode(prompt),
            images=[picture(number) for number in images] or None,
            return_tensors="pt",
        )
        if adapter is not None:
            self._model.set_adapter(adapter)
        margin = float("inf")
        for _ in range(NEW_TOKENS):
            if adapter is None:
                with self._model.disable_adapter():
                    logits = self._model(**inputs, use_cache=False).logits[0, -1]
            else:
                logits = self._model(**inputs, use_cache=False).logits[0, -1]
            best = logits.topk(2)
            margin = min(margin, (best.values[0] - best.values[1]).item())
            inputs["input_ids"] = _with(inputs["input_ids"], best.indices[0].item())
            inputs["attention_mask"] = _with(inputs["attention_mask"], 1)
            if "mm_token_type_ids" in inputs:
                inputs["mm_token_type_ids"] = _with(inputs["mm_token_type_ids"], 0)
        return tuple(inputs["input_ids"][0, -NEW_TOKENS:].tolist()), margin


def _with(row: torch.Tensor, value: float) -> torch.Tensor:
    return torch.cat([row, row.new_full((1, 1), value)], dim=1)


@dataclass(frozen=True)
class Gallery:
    """A base checkpoint that sees, its adapters by name, and questions with their answers."""

    base: Path
    adapters: Mapping[str, Path]
    questions: tuple[Question, ...] = field(repr=False)


def gallery(
    root: Path,
    write_base: Callable[[Path], Path],
    recipes: Sequence[AdapterRecipe],
    images: Sequence[tuple[int, ...]],
) -> Gallery:
    """Writes the checkpoints below ``root``, and asks PEFT about images.

    Args:
        root: An empty directory.
        write_base: Writes the base checkpoint into a directory.
        recipes: The adapters to write.
        images: Of one question each for the base model and every adapter.

    Raises:
        LookupError: No prompt is answered decisively, and unlike by all others.
    """
    base = write_base(root / "base")
    adapters = write_adapters(base, root, recipes, auto=AutoModelForImageTextToText)
    reference = VisionReference(base, adapters)
    questions = [
        question for shown in images for question in _questions(reference, (None, *adapters), shown)
    ]
    return Gallery(base, adapters, tuple(questions))


def _questions(
    reference: VisionReference, names: Sequence[str | None], images: tuple[int, ...]
) -> Iterator[Question]:
    source = random.Random(len(images))
    missing = list(names)
    for _ in range(_CANDIDATES):
        words = [source.randrange(VOCAB_SIZE) for _ in range(8)]
        shown = [token for _ in images for token in (IMAGE_TOKEN + 2, IMAGE_TOKEN, IMAGE_TOKEN + 3)]
        prompt = (*words[:3], *shown, *words[3:])
        found = {name: reference.answer(name, images, prompt) for name in names}
        answers = [answer for answer, _ in found.values()]
        for name in tuple(missing):
            answer, margin = found[name]
            if margin >= MIN_MARGIN and answers.count(answer) == 1:
                missing.remove(name)
                yield Question(name, images, prompt, answer)
        if not missing:
            return
    raise LookupError(f"no prompt with the images {images} is a question of {missing}")
