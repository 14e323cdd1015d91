"""Every valid adapter of the corpus is served, and changes the model as PEFT says it does."""

from pathlib import Path

import pytest
import torch

from tests.adapters.corpus import VALID

from ..bases.test_parity import LOGPROB_ATOL
from ..engine import generate, prompt_logprobs, running_engine
from ..models.tiny_models import VOCAB_SIZE, write_llama

pytestmark = [pytest.mark.serving, pytest.mark.slow]

PROMPT_LENGTH = 24
# The least that an adapter of the corpus moves some log-probability; the most of rounding is
# LOGPROB_ATOL.
MIN_EFFECT = 0.1
NAMES = [name for name, case in VALID.items() if case.read_by_peft]


@pytest.fixture(scope="module")
def prompt() -> list[int]:
    generator = torch.Generator().manual_seed(7)
    return torch.randint(VOCAB_SIZE, (PROMPT_LENGTH,), generator=generator).tolist()


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_llama(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("adapters")
    return {name: VALID[name].write(root / name) for name in NAMES}


@pytest.fixture(scope="module")
def expected(base: Path, folders: dict[str, Path], prompt: list[int]) -> dict[str, torch.Tensor]:
    """Log-probabilities of the prompt's tokens but the first, by adapter, from PEFT.

    Adapters of two bytes a value are computed in float32, as an engine in float32 does.
    """
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    found = {}
    for name, folder in {"": None, **folders}.items():
        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
        if folder is not None:
            model = PeftModel.from_pretrained(model, folder)
        with torch.inference_mode():
            logits = model(input_ids=torch.tensor([prompt]), use_cache=False).logits[0, :-1]
        logprobs = logits.float().log_softmax(-1)
        found[name] = logprobs.gather(1, torch.tensor(prompt[1:])[:, None])[:, 0]
    return found


@pytest.fixture(scope="module")
def served(base: Path, folders: dict[str, Path], prompt: list[int]) -> dict[str, torch.Tensor]:
    """The same from one engine and one batch."""
    from vllm.lora.request import LoRARequest

    loras = [
        LoRARequest(name, number, str(folder))
        for number, (name, folder) in enumerate(folders.items(), 1)
    ]
    with running_engine(base, in_process=True, max_cpu_loras=len(NAMES)) as llm:
        outputs = generate(llm, [prompt] * len(NAMES), loras, max_tokens=1, prompt_logprobs=0)
    return {name: prompt_logprobs(output) for name, output in zip(NAMES, outputs, strict=True)}


@pytest.mark.parametrize("name", NAMES)
def test_it_is_served_as_peft_computes_it(name, served, expected):
    assert (expected[name] - expected[""]).abs().max() > MIN_EFFECT
    torch.testing.assert_close(served[name], expected[name], atol=LOGPROB_ATOL, rtol=0)
