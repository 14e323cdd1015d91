"""The truth of the serving tests: greedy decoding by transformers + PEFT.

Every step recomputes the whole sequence without a KV cache, one adapter at a time, so nothing
that a serving engine does to be fast can be shared with it.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from .cases import Continuation, Key, Prompt


class PeftReference:
    """A base model with its adapters in transformers + PEFT.

    Args:
        base: Directory of the base checkpoint.
        adapters: Adapter directories by name.
        dtype: Type of the base's and the adapters' weights, and of the arithmetic.
    """

    def __init__(
        self, base: Path, adapters: Mapping[str, Path], *, dtype: torch.dtype = torch.float32
    ) -> None:
        self._base = AutoModelForCausalLM.from_pretrained(base, dtype=dtype).eval()
        self._peft: PeftModel | None = None
        for name, path in adapters.items():
            if self._peft is None:
                self._peft = PeftModel.from_pretrained(
                    self._base, path, adapter_name=name, autocast_adapter_dtype=False
                )
            else:
                self._peft.load_adapter(path, adapter_name=name, autocast_adapter_dtype=False)

    def generate(
        self, adapter: str | None, prompts: Sequence[Prompt], new_tokens: int, *, top_k: int = 5
    ) -> list[Continuation]:
        """Decodes greedily, ignoring end-of-sequence tokens.

        Args:
            adapter: The adapter's name, or None for the base model.
            prompts: Token ids, of any lengths.
            new_tokens: Tokens to add to each prompt.
            top_k: Log-probabilities to keep per step; at least 2.

        Returns:
            One continuation per prompt, in order.
        """
        if self._peft is not None and adapter is not None:
            self._peft.set_adapter(adapter)  # slow with many adapters: not for every step
        found: dict[int, Continuation] = {}
        for length in sorted({len(prompt) for prompt in prompts}):
            rows = [row for row, prompt in enumerate(prompts) if len(prompt) == length]
            batch = [prompts[row] for row in rows]
            found.update(zip(rows, self._decode(adapter, batch, new_tokens, top_k), strict=True))
        return [found[row] for row in range(len(prompts))]

    @torch.inference_mode()
    def _decode(
        self, adapter: str | None, prompts: Sequence[Prompt], new_tokens: int, top_k: int
    ) -> list[Continuation]:
        """Decodes prompts of one length, so that no padding is needed."""
        sequences = torch.tensor(prompts)
        steps: list[list[tuple[int, float, dict[int, float], float]]] = [[] for _ in prompts]
        for _ in range(new_tokens):
            logits = self._last_logits(adapter, sequences)
            logprobs = torch.log_softmax(logits, dim=-1)
            best = logits.topk(top_k)
            for row, ids in enumerate(best.indices.tolist()):
                top = {token: logprobs[row, token].item() for token in ids}
                margin = (best.values[row, 0] - best.values[row, 1]).item()
                steps[row].append((ids[0], top[ids[0]], top, margin))
            sequences = torch.cat([sequences, best.indices[:, :1]], dim=1)
        return [Continuation(*zip(*row, strict=True)) for row in steps]

    def _last_logits(self, adapter: str | None, sequences: torch.Tensor) -> torch.Tensor:
        """Float32 logits of the last position, of shape [sequences, vocabulary]."""
        if self._peft is None:
            if adapter is not None:
                raise KeyError(f"adapter {adapter!r} asked for, but the reference has none")
            output = self._base(sequences, use_cache=False)
        elif adapter is None:
            with self._peft.disable_adapter():
                output = self._peft(input_ids=sequences, use_cache=False)
        else:
            output = self._peft(input_ids=sequences, use_cache=False)
        return output.logits[:, -1].float()


def reference_continuations(
    base: Path,
    adapters: Mapping[str, Path],
    prompts: Sequence[Prompt],
    new_tokens: int,
    *,
    dtype: torch.dtype = torch.float32,
) -> dict[Key, Continuation]:
    """Decodes every prompt under the base model and under every adapter.

    Args:
        base: Directory of the base checkpoint.
        adapters: Adapter directories by name.
        prompts: Token ids.
        new_tokens: Tokens to add to each prompt.
        dtype: As for `PeftReference`.

    Returns:
        Continuations by (adapter or None, prompt).
    """
    reference = PeftReference(base, adapters, dtype=dtype)
    with _single_thread():
        return {
            (name, prompt): continuation
            for name in (None, *adapters)
            for prompt, continuation in zip(
                prompts, reference.generate(name, prompts, new_tokens), strict=True
            )
        }


@contextmanager
def _single_thread() -> Iterator[None]:
    """Tiny matrices gain nothing from threads, and lose much where cores are shared."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
