"""Adapters that pass every check and overflow in use, and ways to attack with them."""

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors.torch import load_file, save_file

if TYPE_CHECKING:
    from vllm import LLM

NAME = "poison"
LENGTH = 100
"""Tokens of an attack's prompt, more than a step takes in."""

LARGE = {"float32": 1e19, "bfloat16": 1e19, "float16": 6e3}
"""Values whose products overflow in a type, and that a slot of this type can hold."""

_STEPS = 2_000  # at most, until an adapter has been read and its prompt begun


def poisoned(
    source: Path, target: Path, dtype: str, number: int = 0, *, part: str = "v_proj"
) -> Path:
    """A copy of an adapter with large weights; each number has its own.

    Quarantined weights would attack no more, whatever they are called.

    Args:
        source: The adapter's folder.
        target: The copy's.
        dtype: The type in which its products overflow.
        number: Of the copy.
        part: What tensors have in their names that are made large.
    """
    shutil.copytree(source, target)
    file = target / "adapter_model.safetensors"
    tensors = load_file(file)
    for name, tensor in tensors.items():
        if part in name:
            tensor.fill_(LARGE[dtype] * (1 + number / 20))
    save_file(tensors, file)
    return target


class Attacker:
    """Sends requests for one poisoned adapter to an engine in this process.

    Args:
        llm: The engine.
        adapter: The adapter's folder.
        number: Its number.
    """

    def __init__(self, llm: "LLM", adapter: Path, number: int) -> None:
        from vllm.lora.request import LoRARequest

        self._llm = llm
        self._engine = llm.llm_engine
        self._number = number
        self._lora = LoRARequest(f"{NAME}-{number}", number, str(adapter))

    @property
    def _scheduler(self) -> Any:
        return self._engine.engine_core.engine_core.scheduler  # type: ignore[attr-defined]

    def ask(self, count: int = 1, length: int = LENGTH) -> list[Any]:
        """Asks, and returns the answers."""
        from vllm import SamplingParams

        prompts = [
            {"prompt_token_ids": [(7 * i + 13 * j + self._number) % 300 for i in range(length)]}
            for j in range(count)
        ]
        params = SamplingParams(temperature=0.0, max_tokens=4, ignore_eos=True, detokenize=False)
        return self._llm.generate(prompts, params, lora_request=self._lora, use_tqdm=False)

    @contextmanager
    def unnoticed(self) -> Iterator[None]:
        """Nobody looks at the numbers: what is left in the blocks must be harmless all the same."""
        scheduler = self._scheduler
        assert scheduler._quarantines
        scheduler._quarantines = False
        try:
            yield
        finally:
            scheduler._quarantines = True

    def begin(self, length: int = LENGTH) -> None:
        """Asks, and returns when a part of the prompt has been computed, and not all of it."""
        from vllm import SamplingParams

        prompt = {"prompt_token_ids": [(7 * i + self._number) % 300 for i in range(length)]}
        params = SamplingParams(temperature=0.0, max_tokens=4, ignore_eos=True, detokenize=False)
        self._engine.add_request(self._id, prompt, params, lora_request=self._lora)
        for _ in range(_STEPS):
            (request,) = self._scheduler.requests.values()
            if 0 < request.num_computed_tokens < length:
                return
            self._engine.step()
        raise AssertionError(f"the prompt was not begun in {_STEPS} steps")

    @property
    def _id(self) -> str:
        return f"attack-{self._number}"

    def abort(self) -> None:
        """Gives the request up that was begun."""
        self._engine.abort_request([self._id])
        self._drain()

    def preempt(self) -> None:
        """Takes all running requests' blocks away from them, as a lack of blocks would."""
        before = sum(r.num_preemptions for r in self._scheduler.requests.values())
        assert self._engine.reset_prefix_cache(reset_running_requests=True)
        assert sum(r.num_preemptions for r in self._scheduler.requests.values()) > before

    def finish(self) -> list[Any]:
        """Returns what becomes of the request that was begun."""
        return self._drain()

    def _drain(self) -> list[Any]:
        outputs: list[Any] = []
        for _ in range(_STEPS):
            if not self._engine.has_unfinished_requests():
                return outputs
            outputs += self._engine.step()
        raise AssertionError(f"the request did not end in {_STEPS} steps")


def run_to_its_end(attacker: Attacker) -> None:
    """Three requests at once, in chunks: each is ended at its first token."""
    for output in attacker.ask(3):
        assert_quarantined(output)


def abort_in_mid_prefill(attacker: Attacker) -> None:
    """No token is ever computed, and the request ends as any other."""
    with attacker.unnoticed():
        attacker.begin()
        attacker.abort()


def preempt_in_mid_prefill(attacker: Attacker) -> None:
    """The blocks go to others in between; then the request goes on to its end."""
    with attacker.unnoticed():
        attacker.begin()
    attacker.preempt()
    assert_quarantined(attacker.finish()[-1])


def preempt_and_abort(attacker: Attacker) -> None:
    """The blocks are given back by two ways, neither of which is an end."""
    with attacker.unnoticed():
        attacker.begin()
        attacker.preempt()
        attacker.abort()


ATTACKS: tuple[Callable[[Attacker], None], ...] = (
    run_to_its_end,
    abort_in_mid_prefill,
    preempt_in_mid_prefill,
    preempt_and_abort,
)


def assert_quarantined(output: Any) -> None:
    """The request was ended with the reason, by the first step that had numbers of its own."""
    completion = output.outputs[0]
    assert completion.finish_reason == "error", completion
    assert "quarantined" in completion.stop_reason
    assert NAME in completion.stop_reason
    assert list(completion.token_ids) == []
