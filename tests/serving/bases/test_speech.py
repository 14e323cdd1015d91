"""A Whisper under adapters of its encoder and its decoder transcribes as with PEFT."""

import io
import json
import random
import shutil
import wave
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import httpx
import numpy as np
import numpy.typing as npt
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForSpeechSeq2Seq, AutoProcessor

from tests.attacks.poison import poisoned
from vllm_multilora.tenants.keys import stored

from ..engine import greedy, running_engine
from ..models.cases import MIN_MARGIN
from ..models.recipes import SPEECH_RECIPES
from ..models.tiny_adapters import write_adapters
from ..models.tiny_speech import RATE, SECONDS, prompt_of, write_whisper
from ..server import VllmServer

pytestmark = pytest.mark.serving

GONE, POISON = "gone", "poison"
NEW_TOKENS = 6
SOUNDS = (1, 2, 16)
"""Seeds of such as no answer hangs on rounding."""
ROUTES = {"transcribe": "transcriptions", "translate": "translations"}
"""By what a decoder is asked to do."""
KEY, TENANT_KEY = "sk-client-client-client", "sk-acme"
Answers = Mapping[tuple[str | None, int], tuple[int, ...]]


def samples(number: int) -> npt.NDArray[np.int16]:
    """Some tones."""
    source = np.random.default_rng(number)
    time = np.arange(RATE * SECONDS) / RATE
    tones = [np.sin(2 * np.pi * pitch * time) for pitch in source.uniform(100, 3000, 4)]
    found: npt.NDArray[np.int16] = (sum(tones) / 5 * 2**15).astype(np.int16)
    return found


def sound(number: int) -> npt.NDArray[np.float32]:
    """As readers of sound files give it."""
    return samples(number).astype(np.float32) / 2**15


def recording(number: int) -> bytes:
    """A WAV file."""
    with io.BytesIO() as file:
        with wave.open(file, "wb") as writer:
            writer.setparams((1, 2, RATE, 0, "NONE", ""))
            writer.writeframes(samples(number).tobytes())
        return file.getvalue()


class SpeechReference:
    """A Whisper with its adapters in transformers + PEFT: greedy decoding without a cache."""

    def __init__(self, base: Path, adapters: Mapping[str, Path]) -> None:
        model = AutoModelForSpeechSeq2Seq.from_pretrained(base, dtype=torch.float32).eval()
        self._processor = AutoProcessor.from_pretrained(base)
        (first, path), *others = adapters.items()
        self._model = PeftModel.from_pretrained(model, path, adapter_name=first)
        for name, folder in others:
            self._model.load_adapter(folder, adapter_name=name)
        self._names = (None, *adapters)

    @torch.inference_mode()
    def answers(self, task: str) -> Answers:
        """All margins are wide, and all answers differ."""
        prompt = prompt_of(task)
        answers: dict[tuple[str | None, int], tuple[int, ...]] = {}
        for name in self._names:
            if name is not None:
                self._model.set_adapter(name)
            for number in SOUNDS:
                heard = self._processor(sound(number), sampling_rate=RATE, return_tensors="pt")
                tokens = list(prompt)
                with self._model.disable_adapter() if name is None else nullcontext():
                    for _ in range(NEW_TOKENS):
                        best = self._model(**heard, decoder_input_ids=torch.tensor([tokens]))
                        found = best.logits[0, -1].topk(2)
                        assert found.values[0] - found.values[1] > MIN_MARGIN, (name, number)
                        tokens.append(found.indices[0].item())
                answers[name, number] = tuple(tokens[len(prompt) :])
        assert len(set(answers.values())) == len(answers), "a mix-up would show"
        return answers

    def text(self, tokens: Sequence[int]) -> str:
        """What tokens are written as."""
        text: str = self._processor.tokenizer.decode(tokens, skip_special_tokens=True)
        return text


@dataclass(frozen=True)
class Speech:
    """A Whisper, its adapters, and what each answers by task: tokens, and their text."""

    base: Path
    adapters: Mapping[str, Path]
    answers: Mapping[str, Answers]
    text: Callable[[Sequence[int]], str]


@pytest.fixture(scope="module")
def speech(tmp_path_factory: pytest.TempPathFactory) -> Speech:
    root = tmp_path_factory.mktemp("speech")
    base = write_whisper(root / "base")
    adapters = write_adapters(base, root, SPEECH_RECIPES, auto=AutoModelForSpeechSeq2Seq)
    reference = SpeechReference(base, adapters)
    answers = {task: reference.answers(task) for task in ROUTES}
    return Speech(base, adapters, answers, reference.text)


@pytest.mark.smoke("speech (Whisper)")
def test_recordings_are_heard_as_by_peft_beside_adapters_that_fail(
    speech: Speech, tmp_path: Path
) -> None:
    from vllm.lora.request import LoRARequest

    answers = speech.answers["transcribe"]
    adapters = {
        **speech.adapters,
        GONE: tmp_path / GONE,
        POISON: poisoned(speech.adapters["decoder-r8"], tmp_path / POISON, "float32"),
    }
    asked = [(name, number) for name in (None, *adapters) for number in SOUNDS]
    random.Random(1).shuffle(asked)
    with running_engine(
        speech.base, in_process=True, skip_tokenizer_init=False, max_model_len=64, max_loras=2
    ) as llm:
        outputs = llm.generate(
            [
                {
                    "encoder_prompt": {
                        "prompt": "",
                        "multi_modal_data": {"audio": (sound(number), RATE)},
                    },
                    "decoder_prompt": {"prompt_token_ids": list(prompt_of("transcribe"))},
                }
                for _, number in asked
            ],
            greedy(max_tokens=NEW_TOKENS),
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


@pytest.mark.smoke("transcriptions and translations")
def test_files_are_transcribed_and_translated_as_by_peft_beside_adapters_that_fail(
    speech: Speech, tmp_path: Path
) -> None:
    """By a server with fewer slots, and less host memory, than all adapters need.

    Adapters are asked by a tenant that may not use the base model, and languages are detected where
    a request does not say which it is: by the base model, and so they are metered.
    """
    gone = shutil.copytree(speech.adapters["both-r5"], tmp_path / GONE)
    adapters = {**speech.adapters, GONE: gone}
    tenants = {"acme": {"keys": [stored(TENANT_KEY)], "adapters": ["*"], "allow": ["media"]}}
    (tmp_path / "tenants.json").write_text(json.dumps({"tenants": tenants}))
    (tmp_path / "admin-key").write_text("sk-admin-admin-admin\n")
    with VllmServer(
        speech.base,
        *("--served-model-name", "base", "--dtype", "float32", "--enforce-eager", "--seed", "0"),
        *("--max-model-len", "64", "--max-num-seqs", "16", "--block-size", "32", "--enable-lora"),
        *("--max-loras", "2", "--max-cpu-loras", "2", "--max-lora-rank", "64"),
        *("--lora-modules", *(f"{name}={path}" for name, path in adapters.items())),
        *("--multilora-tenants", str(tmp_path / "tenants.json")),
        *("--multilora-admin-key-file", str(tmp_path / "admin-key")),
        *("--multilora-usage-log", str(tmp_path / "usage.jsonl")),
        log=tmp_path / "vllm.log",
        api_key=KEY,
    ) as server:

        def ask(task: str, name: str | None, number: int) -> httpx.Response:
            language = {"language": "en"} if task == "transcribe" else {}
            return httpx.post(
                f"{server.url}/v1/audio/{ROUTES[task]}",
                headers={"Authorization": f"Bearer {KEY if name is None else TENANT_KEY}"},
                data={
                    "model": name or "base",
                    "max_completion_tokens": str(NEW_TOKENS),
                    **language,
                },
                files={"file": recording(number)},
                timeout=120,
                trust_env=False,
            )

        for name in speech.adapters:  # they push the other out of host memory
            assert ask("transcribe", name, SOUNDS[0]).is_success, server.log_tail()
        shutil.rmtree(gone)
        asked = [
            (task, name, number)
            for task in ROUTES
            for name in (None, *adapters)
            for number in SOUNDS
        ]
        random.Random(1).shuffle(asked)
        with ThreadPoolExecutor(len(asked)) as pool:
            found = list(pool.map(lambda of: ask(*of), asked))
    # The log is complete when the server has ended.
    lines = [json.loads(line) for line in (tmp_path / "usage.jsonl").read_text().splitlines()]
    used = Counter((line["tenant"], line["adapter"]) for line in lines if line["status"] == "ok")
    answered, detected = len(SOUNDS) * len(ROUTES), len(SOUNDS)
    assert used == {
        (None, None): answered + detected,
        ("acme", None): detected * len(adapters),
        **{("acme", name): answered + 1 for name in speech.adapters},
    }
    for (task, name, number), response in zip(asked, found, strict=True):
        if name == GONE:
            assert response.status_code == 404, response.text
            assert GONE in response.json()["error"]["message"]
        else:
            assert response.status_code == 200, (task, name, response.text)
            requested = speech.text(speech.answers[task][name, number])
            assert response.json()["text"] == requested, (task, name, number)
