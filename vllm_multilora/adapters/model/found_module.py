"""A module that the base model serves, as an adapter's file has it."""

from __future__ import annotations

from dataclasses import dataclass, field

from vllm_multilora.adapters.model.tensor_names import FUSED_EXPERTS, WRAPPED, WRAPPED_EXPERTS


@dataclass(frozen=True)
class FoundModule:
    """What the file has for one module that the base model serves.

    Attributes:
        module: The module's name in the checkpoint, without PEFT's prefix.
        name: Its name in the layout.
        outer: Of experts that are held as one, as of `ModelLayout.outer_parameter`.
        tensors: The names of its tensors by part, as of `TensorRole`; some may be missing.
    """

    module: str
    name: str
    outer: str
    tensors: dict[str, str] = field(default_factory=dict)

    @property
    def first_tensor(self) -> str:
        """The name of one of its tensors, which stands for it in what is said of it."""
        return next(iter(self.tensors.values()))

    @property
    def target(self) -> str:
        """What patterns for ranks and alphas are matched with.

        Experts that are held as one are two parameters of a module to PEFT, each with an A and a B
        of its own. It saves them as of the module and of what the module wraps, and matches
        patterns with the parameters' names.
        """
        if self.module.endswith(FUSED_EXPERTS):
            return f"{self.module}.down_proj"
        if self.module.endswith(WRAPPED_EXPERTS):
            return f"{self.module.removesuffix(WRAPPED)}.{self.outer}"
        return self.module
