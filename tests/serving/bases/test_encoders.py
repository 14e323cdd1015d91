"""Models that only read, such as BERT: each adapter's embeddings and classes are PEFT's."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModel, AutoModelForSequenceClassification

from ..engine import running_engine
from ..models.recipes import AdapterRecipe
from ..models.tiny_adapters import write_adapter
from ..models.tiny_models import write_bert, write_modern_bert, write_roberta

pytestmark = pytest.mark.serving

PROMPTS = [[7, 21, 88, 140, 3, 250, 64], [90 + 2 * number for number in range(33)]]


@dataclass(frozen=True)
class Encoder:
    """A kind of model.

    Attributes:
        write: Writes the base checkpoint.
        targets: What each of its adapters changes.
        classifies: Whether it tells classes, and has no embeddings.
    """

    write: Callable[[Path], Path]
    targets: tuple[tuple[str, ...], ...]
    classifies: bool = False

    @property
    def auto(self) -> Any:
        """The class of Transformers' that loads its checkpoint."""
        return AutoModelForSequenceClassification if self.classifies else AutoModel


ENCODERS = {
    # All that are called `dense`: the pooler's too, which a model of embeddings does not have.
    "bert": Encoder(write_bert, (("query", "value"), ("query", "key", "value", "dense"))),
    "modern-bert": Encoder(write_modern_bert, (("Wqkv",), ("Wqkv", "Wi", "Wo"))),
    "roberta": Encoder(
        partial(write_roberta, labels=3), (("value",), ("key", "value")), classifies=True
    ),
}


def expected(encoder: Encoder, base: Path, adapter: Path | None, prompt: list[int]) -> torch.Tensor:
    """The first token's state, normalised, or the classes' probabilities, as PEFT computes them."""
    model = encoder.auto.from_pretrained(base, dtype=torch.float32)
    if adapter is not None:
        model = PeftModel.from_pretrained(model, adapter)
    with torch.inference_mode():
        output = model.eval()(torch.tensor([prompt]))
    if encoder.classifies:
        return output.logits[0].softmax(dim=0)
    return torch.nn.functional.normalize(output.last_hidden_state[0, 0], dim=0)


def written(
    encoder: Encoder, base: Path, folder: Path, targets: tuple[str, ...], *, seed: int
) -> Path:
    recipe = AdapterRecipe(folder.name, targets=targets, gain=1.0)
    return write_adapter(base, folder, recipe, seed=seed, auto=encoder.auto)


@pytest.mark.parametrize("kind", ENCODERS)
def test_mixed_batches_are_answered_as_by_peft(kind: str, tmp_path: Path) -> None:
    """With fewer slots than adapters; one of a part of a head for classes is refused."""
    from vllm.lora.request import LoRARequest

    encoder = ENCODERS[kind]
    base = encoder.write(tmp_path / "base")
    adapters = [
        None,
        *(
            written(encoder, base, tmp_path / f"adapter-{number}", targets, seed=number)
            for number, targets in enumerate(encoder.targets)
        ),
    ]
    asked = [(adapter, prompt) for prompt in PROMPTS for adapter in adapters]
    of_head = None
    if encoder.classifies:
        of_head = written(encoder, base, tmp_path / "head", ("query", "dense"), seed=9)
    with running_engine(
        base, in_process=True, max_loras=1, runner="pooling", skip_tokenizer_init=False
    ) as llm:
        ask = llm.classify if encoder.classifies else llm.embed
        answers = ask(
            [{"prompt_token_ids": prompt} for _, prompt in asked],
            lora_request=[
                adapter and LoRARequest(adapter.name, adapters.index(adapter), str(adapter))
                for adapter, _ in asked
            ],
            use_tqdm=False,
        )
        if of_head is not None:
            with pytest.raises(Exception, match=r"classifier\.dense"):
                llm.llm_engine.add_lora(LoRARequest("head", 9, str(of_head)))
    truth = [expected(encoder, base, adapter, prompt) for adapter, prompt in asked]
    for first in range(0, len(asked), len(adapters)):
        of_one_prompt = torch.stack(truth[first : first + len(adapters)])
        assert torch.pdist(of_one_prompt).min() > 0.01, "a mix-up would not show"
    for answer, requested in zip(answers, truth, strict=True):
        assert answer.error is None
        found = answer.outputs.probs if encoder.classifies else answer.outputs.embedding
        torch.testing.assert_close(torch.tensor(found), requested, rtol=1e-4, atol=1e-5)
