"""A Whisper under adapters of its encoder and its decoder transcribes as with PEFT."""

import random
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForSpeechSeq2Seq, AutoProcessor

from tests.attacks.poison import poisoned

from .cases import MIN_MARGIN
from .engine import running_engine
from .recipes import SPEECH_RECIPES
from .tiny_adapters import write_adapter
from .tiny_speech import PROMPT, RATE, SECONDS, write_whisper

pytestmark = pytest.mark.serving

GONE, POISON = "gone", "poison"
NEW_TOKENS = 6
SOUNDS = 3
Answers = Mapping[tuple[str | None, int], tuple[int, ...]]


def sound(number: int) -> npt.NDArray[np.float32]:
    """Some tones."""
    source = np.random.default_rng(number)
    time = np.arange(RATE * SECONDS) / RATE
    tones = [np.sin(2 * np.pi * pitch * time) for pitch in source.uniform(100, 3000, 4)]
    found: npt.NDArray[np.float32] = (sum(tones) / 5).astype(np.float32)
    return found


@torch.inference_mode()
def reference(base: Path, adapters: Mapping[str, Path]) -> Answers:
    """Greedy decoding without a cache; all margins are wide, and all answers differ."""
    model = AutoModelForSpeechSeq2Seq.from_pretrained(base, dtype=torch.float32).eval()
    processor = AutoProcessor.from_pretrained(base)
    (first, path), *others = adapters.items()
    peft = PeftModel.from_pretrained(model, path, adapter_name=first)
    for name, folder in others:
        peft.load_adapter(folder, adapter_name=name)
    answers: dict[tuple[str | None, int], tuple[int, ...]] = {}
    for name in (None, *adapters):
        if name is not None:
            peft.set_adapter(name)
        for number in range(SOUNDS):
            heard = processor(sound(number), sampling_rate=RATE, return_tensors="pt")
            tokens = list(PROMPT)
            with peft.disable_adapter() if name is None else nullcontext():
                for _ in range(NEW_TOKENS):
                    best = model(**heard, decoder_input_ids=torch.tensor([tokens]))
                    found = best.logits[0, -1].topk(2)
                    assert found.values[0] - found.values[1] > MIN_MARGIN, (name, number)
                    tokens.append(found.indices[0].item())
            answers[name, number] = tuple(tokens[len(PROMPT) :])
    assert len(set(answers.values())) == len(answers), "a mix-up would show"
    return answers


@pytest.mark.smoke("speech (Whisper)")
def test_recordings_are_heard_as_by_peft_beside_adapters_that_fail(
    tmp_path: Path,
) -> None:
    from vllm import SamplingParams
    from vllm.lora.request import LoRARequest

    base = write_whisper(tmp_path / "base")
    adapters = {
        recipe.name: write_adapter(
            base, tmp_path / recipe.name, recipe, seed=seed, auto=AutoModelForSpeechSeq2Seq
        )
        for seed, recipe in enumerate(SPEECH_RECIPES)
    }
    answers = reference(base, adapters)
    adapters[GONE] = tmp_path / GONE
    adapters[POISON] = poisoned(adapters["decoder-r8"], tmp_path / POISON, "float32")
    asked = [(name, number) for name in (None, *adapters) for number in range(SOUNDS)]
    random.Random(1).shuffle(asked)
    with running_engine(
        base, in_process=True, skip_tokenizer_init=False, max_model_len=64, max_loras=2
    ) as llm:
        outputs = llm.generate(
            [
                {
                    "encoder_prompt": {
                        "prompt": "",
                        "multi_modal_data": {"audio": (sound(number), RATE)},
                    },
                    "decoder_prompt": {"prompt_token_ids": list(PROMPT)},
                }
                for _, number in asked
            ],
            SamplingParams(
                temperature=0.0, max_tokens=NEW_TOKENS, ignore_eos=True, detokenize=False
            ),
            lora_request=[
                LoRARequest(name, (1 << 40) + list(adapters).index(name), str(adapters[name]))
                if name
                else None
                for name, _ in asked
            ],
            use_tqdm=False,
        )
    for (name, number), output in zip(asked, outputs, strict=True):
        completion = output.outputs[0]
        if name == GONE:
            assert GONE in str(completion.stop_reason)
        elif name != POISON:
            assert tuple(completion.token_ids) == answers[name, number], (name, number)
