"""The input of a simulated engine, and its output."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from vllm_multilora.toolbox.capacity.calibration import LoadCosts
from vllm_multilora.toolbox.capacity.step_cost import StepCost


@dataclass(frozen=True)
class Request:
    """A request.

    Attributes:
        arrives_s: When it is sent, in seconds; 0 or more.
        adapter: The number of its adapter; None for the base model.
        prompt_tokens: At least 1.
        generation_tokens: Likewise.
    """

    arrives_s: float
    adapter: int | None
    prompt_tokens: int
    generation_tokens: int


@dataclass(frozen=True)
class Costs:
    """What things take.

    Attributes:
        step: Steps.
        request_s: Seconds of a request outside the engine, while that is idle.
        request_beside_s: As `request_s`, while the engine computes.
        loads: Loads and copies; None if all adapters are in slots from the start.
    """

    step: StepCost
    request_s: float
    request_beside_s: float
    loads: LoadCosts | None


@dataclass
class Served:
    """What has come of a trace.

    Attributes:
        first_token_s: Of each request: seconds from its sending to its first token.
        end_s: When the last token came.
        steps: Seconds of each step, and the requests that got their next token in it.
        gpu_hits: Requests whose adapter was in a slot when they came; none of the base model.
        cpu_hits: Those whose adapter was in a slot or in host memory.
        loads: Loads.
        activations: Copies into slots.
        most: The most of each attribute of a `Batch` in one step, by its name.
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
