"""The names that PEFT gives to an adapter's tensors."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

PREFIX = "base_model.model."
"""Before all names of modules, in PEFT's."""

WRAPPED = ".base_layer"
"""After the names of modules, in those of what PEFT wraps in them."""

PARTS: tuple[Literal["A", "B"], ...] = ("A", "B")
_PARTS: dict[str, Literal["A", "B"]] = {"lora_A": "A", "lora_B": "B"}
_EMBEDDING_PARTS: dict[str, Literal["A", "B"]] = {"lora_embedding_A": "A", "lora_embedding_B": "B"}
_MAGNITUDE = "lora_magnitude_vector"
# What PyTorch puts into the names of modules that it wraps for training: it compiles them, shares
# them out or computes them again.
_WRAPPERS = frozenset({"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})
_REPLICATED = "module."  # how names begin in a model that DistributedDataParallel wraps
HEADS = ("score", "classifier")
FUSED_EXPERTS = ".experts"  # how a module ends whose parameters hold all experts of a layer
WRAPPED_EXPERTS = f"{FUSED_EXPERTS}{WRAPPED}"  # PEFT's name for one of their two parameters
# How other formats name an adapter's matrices.
_FOREIGN = (
    ((".lora_a", ".lora_b"), "as MLX-LM names it"),
    ((".lora_a.weight", ".lora_b.weight"), "as torchtune names it while it trains"),
    ((".linear_in.weight", ".linear_out.weight"), "as NeMo and Megatron Bridge name it"),
    ((".lora_down.weight", ".lora_up.weight", ".alpha"), "as kohya's scripts and ComfyUI name it"),
    ((".lora.down.weight", ".lora.up.weight"), "as Diffusers has named it"),
)
_OF_TRAINING = (".lora_velora_embed", ".lora_monteclora_sampler.")
_BASE_EMBEDDINGS = (".embed_tokens.base_layer.weight", ".lm_head.base_layer.weight")


@dataclass(frozen=True)
class TensorRole:
    """What a LoRA tensor is.

    Attributes:
        module: The adapted module as the checkpoint calls it, without PEFT's prefix.
        part: `A`, `B`, or `magnitude`: what DoRA adapters have beside them, one for each output.
        embedding: Whether it belongs to an embedding, whose A is [r, vocabulary].
    """

    module: str
    part: Literal["A", "B", "magnitude"]
    embedding: bool = False

    def of(self, module: str) -> str:
        """What PEFT calls A or B of another module."""
        end = f"lora_embedding_{self.part}" if self.embedding else f"lora_{self.part}.weight"
        return f"{PREFIX}{module}.{end}"


def parse_tensor_name(name: str) -> TensorRole | None:
    """Reads the name of a tensor in a PEFT checkpoint.

    Accepted are `<module>.lora_A.weight` and `<module>.lora_embedding_A` (and B), with or without
    PEFT's prefix `base_model.model.`, and with or without the name that the adapter had in PEFT
    (`lora_A.default.weight`, `lora_embedding_A.default`); and `<module>.lora_magnitude_vector`,
    with that name, with `.weight` or with both after it. What PyTorch's wrappers for training add
    is left out.

    Returns:
        The tensor's role, or None if it is no LoRA tensor: a base weight, a full module
        (`modules_to_save`).
    """
    parts = unwrapped(name).split(".")
    # Ends, with where the module's name stops: with an adapter name in between and without.
    for at in (-2, -3):
        if len(parts) > -at and parts[-1] == "weight" and parts[at] in _PARTS:
            return TensorRole(".".join(parts[:at]), _PARTS[parts[at]])
    for at in (-1, -2):
        if len(parts) > -at and parts[at] in _EMBEDDING_PARTS:
            return TensorRole(".".join(parts[:at]), _EMBEDDING_PARTS[parts[at]], embedding=True)
    for at in (-1, -2, -3):
        if len(parts) > -at and parts[at] == _MAGNITUDE and (at > -3 or parts[-1] == "weight"):
            return TensorRole(".".join(parts[:at]), "magnitude")
    return None


def unwrapped(name: str) -> str:
    """A name without PEFT's prefix, and without what wrappers have added, also around PEFT's."""
    if not _WRAPPERS.isdisjoint(parts := name.split(".")):
        name = ".".join(part for part in parts if part not in _WRAPPERS)
    return name.removeprefix(_REPLICATED).removeprefix(PREFIX).removeprefix(_REPLICATED)


def tensor_of(part: str) -> str:
    return _MAGNITUDE if part == "magnitude" else f"lora_{part}"


def foreign(name: str) -> str | None:
    """The known format other than PEFT's in which tensors have such names; None for any other."""
    return next((whose for ends, whose in _FOREIGN if name.endswith(ends)), None)


def is_unused(name: str) -> bool:
    """Whether a tensor is one that PEFT saves beside an adapter, and that nothing is computed with.

    These are copies of the base model's own embedding (`save_embedding_layers`), which vLLM ignores
    too, and what VeLoRA and MonteCLoRA use in training only: then PEFT computes plain LoRA.
    """
    return name.endswith(_BASE_EMBEDDINGS) or any(part in name for part in _OF_TRAINING)


def ends_of(name: str) -> list[str]:
    """A name, and what is left of it after each of its dots."""
    parts = name.split(".")
    return [".".join(parts[first:]) for first in range(len(parts))]


def is_of(name: str, ends: frozenset[str]) -> bool:
    """Whether a name is one of these, or ends with one of them after a dot."""
    return bool(ends) and not ends.isdisjoint(ends_of(name))


def full_head(name: str) -> str | None:
    """The classification head that a tensor is the full weight or bias of, as vLLM names it.

    Of the modules that PEFT can save whole (`modules_to_save`), vLLM serves these alone.
    """
    parts = name.split(".")
    if len(parts) > 1 and parts[-1] in ("weight", "bias") and parts[-2] in HEADS:
        return parts[-2]
    return None


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
