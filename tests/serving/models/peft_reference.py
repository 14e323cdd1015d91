"""The truth of the serving tests: greedy decoding by transformers + PEFT.

Every step recomputes the whole sequence without a KV cache, one adapter at a time, so nothing
that a serving engine does to be fast can be shared with it.
"""

import json
from collections.abc import Mapping, Sequence
from itertools import groupby
from pathlib import Path

import torch
from peft import PeftModel
from peft.tuners.lora.variants import calculate_alora_offsets
from transformers import AutoModelForCausalLM, DynamicCache

from .cases import Continuation, Key, Prompt


class PeftReference:
    """A base model with its adapters in transformers + PEFT.

    Args:
        base: Directory of the base checkpoint.
        adapters: Adapter directories by name.
    """

    def __init__(self, base: Path, adapters: Mapping[str, Path]) -> None:
        self._base = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
        self._peft: PeftModel | None = None
        for name, path in adapters.items():
            if self._peft is None:
                self._peft = PeftModel.from_pretrained(
                    self._base, path, adapter_name=name, autocast_adapter_dtype=False
                )
            else:
                self._peft.load_adapter(path, adapter_name=name, autocast_adapter_dtype=False)

    def blend(self, name: str, weights: Mapping[str, float]) -> None:
        """Adds the weighted sum of some adapters as another one."""
        assert self._peft is not None
        self._peft.add_weighted_adapter(
            list(weights), list(weights.values()), name, combination_type="cat"
        )

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
        offsets = self._offsets(adapter, sequences)
        steps: list[list[tuple[int, float, dict[int, float], float]]] = [[] for _ in prompts]
        for step in range(new_tokens):
            activated = None if offsets is None else [offset + step for offset in offsets]
            logits = self._last_logits(adapter, sequences, activated)
            logprobs = torch.log_softmax(logits, dim=-1)
            best = logits.topk(top_k)
            for row, ids in enumerate(best.indices.tolist()):
                top = {token: logprobs[row, token].item() for token in ids}
                margin = (best.values[row, 0] - best.values[row, 1]).item()
                steps[row].append((ids[0], top[ids[0]], top, margin))
            sequences = torch.cat([sequences, best.indices[:, :1]], dim=1)
        return [Continuation(*zip(*row, strict=True)) for row in steps]

    def _offsets(self, adapter: str | None, sequences: torch.Tensor) -> list[int] | None:
        """Where PEFT's `generate` has an activated adapter begin, counted from prompts' ends."""
        if self._peft is None or adapter is None:
            return None
        if not self._peft.peft_config[adapter].alora_invocation_tokens:
            return None
        return calculate_alora_offsets(self._peft.peft_config, adapter, sequences)

    def _last_logits(
        self, adapter: str | None, sequences: torch.Tensor, offsets: list[int] | None
    ) -> torch.Tensor:
        """Float32 logits of the last position, of shape [sequences, vocabulary]."""
        return self.logits(adapter, sequences, offsets)[:, -1]

    def prompt_logprobs(self, adapter: str | None, prompt: Prompt) -> torch.Tensor:
        """Log-probability of each of a prompt's tokens but the first, float32.

        Args:
            adapter: The adapter's name, or None for the base model.
            prompt: Token ids.
        """
        if self._peft is not None and adapter is not None:
            self._peft.set_adapter(adapter)
        with torch.inference_mode():
            scores = self.logits(adapter, torch.tensor([prompt]))[0, :-1].log_softmax(dim=-1)
        return scores[range(len(prompt) - 1), list(prompt[1:])]

    def likeliest_in_turn(self, tokens: Prompt, adapters: Sequence[str]) -> list[int]:
        """Greedy decoding's choice after each token, where adapters take turns at one KV cache.

        Args:
            tokens: Token ids.
            adapters: The adapter that computes each token, with what those before have left.
        """
        chosen: list[int] = self.logits_in_turn(tokens, adapters).argmax(dim=-1).tolist()
        return chosen

    @torch.inference_mode()
    def logits_in_turn(self, tokens: Prompt, adapters: Sequence[str]) -> torch.Tensor:
        """Float32 logits after each token, of shape [tokens, vocabulary]; arguments as above."""
        assert self._peft is not None
        cache, found = DynamicCache(config=self._base.config), []
        for adapter, positions in groupby(range(len(tokens)), adapters.__getitem__):
            self._peft.set_adapter(adapter)
            part = torch.tensor([[tokens[position] for position in positions]])
            output = self._peft(input_ids=part, past_key_values=cache, use_cache=True)
            found.append(output.logits[0].float())
        return torch.cat(found)

    def likeliest(self, adapter: str | None, prompt: Prompt) -> list[int]:
        """Greedy decoding's choice after each token of a prompt."""
        if self._peft is not None and adapter is not None:
            self._peft.set_adapter(adapter)
        with torch.inference_mode():
            return self.logits(adapter, torch.tensor([prompt]))[0].argmax(dim=-1).tolist()

    def logits(
        self, adapter: str | None, sequences: torch.Tensor, offsets: list[int] | None = None
    ) -> torch.Tensor:
        """Float32 logits of all positions, of shape [sequences, tokens, vocabulary].

        Args:
            adapter: The adapter's name, or None for the base model.
            sequences: Token ids of shape [sequences, tokens].
            offsets: PEFT's `alora_offsets`; None: where PEFT finds the invocation.
        """
        activated = {} if offsets is None else {"alora_offsets": offsets}
        if self._peft is None:
            if adapter is not None:
                raise KeyError(f"adapter {adapter!r} asked for, but the reference has none")
            output = self._base(sequences, use_cache=False)
        elif adapter is None:
            with self._peft.disable_adapter():
                output = self._peft(input_ids=sequences, use_cache=False)
        else:
            output = self._peft(input_ids=sequences, use_cache=False, **activated)
        return output.logits.float()


def reference_continuations(
    base: Path,
    adapters: Mapping[str, Path],
    prompts: Sequence[Prompt],
    new_tokens: int,
) -> dict[Key, Continuation]:
    """Decodes every prompt under the base model and under every adapter.

    Args:
        base: Directory of the base checkpoint.
        adapters: Adapter directories by name.
        prompts: Token ids.
        new_tokens: Tokens to add to each prompt.

    Returns:
        Continuations by (adapter or None, prompt).
    """
    # PEFT has adapters of the same parameters only beside each other.
    groups: dict[str, dict[str | None, Path]] = {"None": {None: base}}
    for name, folder in adapters.items():
        config = json.loads((folder / "adapter_config.json").read_text())
        groups.setdefault(str(config.get("target_parameters")), {})[name] = folder
    found = {}
    for group in groups.values():
        reference = PeftReference(base, {name: of for name, of in group.items() if name})
        for name in group:
            answers = reference.generate(name, prompts, new_tokens)
            found |= {(name, prompt): one for prompt, one in zip(prompts, answers, strict=True)}
    return found
