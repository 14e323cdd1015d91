"""The input of a simulated engine, and its output."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from vllm_multilora.errors import ConfigError
from vllm_multilora.slots.simulation.replay import ServerShape


@dataclass(frozen=True)
class PlannedServer:
    """The server to plan; `shape.concurrency` is its `--max-num-seqs`.

    Raises:
        ConfigError: A step has fewer tokens than a batch has requests.
    """

    shape: ServerShape
    max_num_batched_tokens: int
    policy: str = "lru"

    def __post_init__(self) -> None:
        if self.max_num_batched_tokens < self.shape.concurrency:
            raise ConfigError(
                f"--max-num-batched-tokens {self.max_num_batched_tokens} is less than "
                f"--max-num-seqs {self.shape.concurrency}, which vLLM refuses: each running "
                "request gets a token in each step"
            )


@dataclass(frozen=True)
class Request:
    """A request: when it is sent, and the number of its adapter; None for the base model.

    It is sent at 0 seconds or later, and has at least one token of each kind.
    """

    arrives_s: float
    adapter: int | None
    prompt_tokens: int
    generation_tokens: int


@dataclass
class Served:
    """What has come of a trace.

    Attributes:
        first_token_s: Of each request: seconds from its sending to its first token.
        steps: Seconds of each step, and the requests that got their next token in it.
        gpu_hits: Requests whose adapter was in a slot when they came; none of the base model.
        cpu_hits: Those whose adapter was in a slot or in host memory.
        most: The most of each attribute of a `StepBatch` in one step, by its name.
        most_context: The most tokens that were in the KV cache.
    """

    first_token_s: list[float]
    end_s: float = 0.0
    steps: list[tuple[float, int]] = field(default_factory=list)
    gpu_hits: int = 0
    cpu_hits: int = 0
    loads: int = 0
    activations: int = 0
    most: Counter[str] = field(default_factory=Counter)
    most_context: int = 0
