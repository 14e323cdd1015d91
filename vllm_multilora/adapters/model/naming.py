"""How a checkpoint's module names map to the running model, as data.

vLLM computes this with live objects: a model's `WeightsMapper`, its LoRA manager, the model itself.
Adapters are checked in processes that have none of these, so everything that matters is recorded
here as data that can be sent as a message. `integration/worker/model/module_naming.py` reads it
from a model.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

from vllm_multilora.adapters.model.tensor_names import PREFIX, WRAPPED, WRAPPED_EXPERTS

_END = ".lora_A.weight"


@dataclass(frozen=True)
class Replacement:
    r"""Text that takes the place of other text in a name.

    Attributes:
        old: What is replaced; of a regular expression, its source.
        new: What takes its place; may name an expression's groups (`\1`).
        flags: Of a regular expression, as in Python's `re`.
    """

    old: str
    new: str
    flags: int = 0


@dataclass(frozen=True)
class SourceRename:
    r"""A renaming that Transformers applies to checkpoints' names (its `WeightRenaming`).

    Attributes:
        pattern: A regular expression of alternatives, each a named group.
        new: What takes the place of the text found; `\1` is the first group within the
            alternative that fits.
        scopes: Beginnings of names of which the first that fits is set aside before the pattern
            is looked for; a name with none of them stays as it is. None: nothing is set aside.
    """

    pattern: str
    new: str
    scopes: tuple[str, ...] | None = None


@dataclass(frozen=True)
class Renames:
    """The renames of vLLM's `WeightsMapper.get_rename_mapper`, in the order of application.

    `sources` are Transformers' own. Of `substrings`, the first occurrence is replaced.
    """

    sources: tuple[SourceRename, ...] = ()
    expressions: tuple[Replacement, ...] = ()
    substrings: tuple[Replacement, ...] = ()
    prefixes: tuple[Replacement, ...] = ()
    suffixes: tuple[Replacement, ...] = ()

    def apply(self, name: str) -> str:
        """A tensor's name in the running model, from its name in a checkpoint."""
        for source, compiled in zip(self.sources, self._sources, strict=True):
            name = _renamed(name, source, compiled)
        for pair, compiled in zip(self.expressions, self._expressions, strict=True):
            name = compiled.sub(pair.new, name)
        for pair in self.substrings:
            name = name.replace(pair.old, pair.new, 1)
        for pair in self.prefixes:
            if name.startswith(pair.old):
                name = pair.new + name[len(pair.old) :]
        for pair in self.suffixes:
            if name.endswith(pair.old):
                name = name[: len(name) - len(pair.old)] + pair.new
        return name

    @cached_property
    def _sources(self) -> list[re.Pattern[str]]:
        return [re.compile(source.pattern) for source in self.sources]

    @cached_property
    def _expressions(self) -> list[re.Pattern[str]]:
        return [re.compile(pair.old, pair.flags) for pair in self.expressions]


def _renamed(name: str, source: SourceRename, compiled: re.Pattern[str]) -> str:
    scope = ""
    if source.scopes is not None:
        found = next((scope for scope in source.scopes if name.startswith(scope)), None)
        if found is None:
            return name
        scope = found
    rest = name.removeprefix(scope)
    match = compiled.search(rest)
    if match is None:
        return name
    new = source.new
    if r"\1" in new:
        group = next(key for key, text in match.groupdict().items() if text is not None)
        new = new.replace(r"\1", match[compiled.groupindex[group] + 1] or "")
    return scope + rest.replace(match[0], new, 1)


@dataclass(frozen=True)
class ModuleNaming:
    """From modules' names in a checkpoint to what becomes of them in the running model.

    Attributes:
        names: Modules that this worker adapts.
        renames: The model's own renames; None: it has none.
        text_names: Names that adapters of a multimodal model's text-only sibling have, or those of
            a later Transformers than the base model's -> the names of the same modules here.
        skipped: A module whose name has one of these at its beginning, or after a dot, is left
            out of the model on purpose.
        others: Beginnings, each with its dot, of modules that other workers have.
        roots: The model's children.
        pooling: Whether it is a pooling model, whose adapters may lack the `model.` in names.
        targets: The modules that the server restricts adapters to (`--lora-target-modules`);
            None: all that the base model supports.
        packed: Kinds of fused modules -> the kinds of module that they are made of.
        unwrapped: Linear layers of parts of the model that vLLM does not adapt, such as those of a
            vision tower.
        unloaded: Beginnings of modules of the base checkpoint that what the server does has no use
            for, so that vLLM does not load them, such as a head for tokens beside embeddings.
    """

    names: frozenset[str] = frozenset()
    renames: Renames | None = None
    text_names: Mapping[str, str] = field(default_factory=dict)
    skipped: tuple[str, ...] = ()
    others: tuple[str, ...] = ()
    roots: frozenset[str] = frozenset()
    pooling: bool = False
    targets: tuple[str, ...] | None = None
    packed: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    unwrapped: frozenset[str] = frozenset()
    unloaded: tuple[str, ...] = ()

    def rename(self, module: str) -> str | None:
        """The running model's name of a module, by its name in a checkpoint.

        Returns:
            The name; of a module that the model does not have at all, what its name would be.
            None: nothing here is adapted under that name, on purpose: the base model, vLLM or the
            server leaves the module out, or another worker has it.
        """
        if self._is_skipped(module):
            return None
        module = self._mapped(module)
        if module.endswith(WRAPPED_EXPERTS):  # it goes where the experts go
            name = self._named(module.removesuffix(WRAPPED))
            return None if name is None else name + WRAPPED
        return self._named(module)

    def _named(self, module: str) -> str | None:
        if module not in self.names:
            module = self.text_names.get(module, module)
        if module in self.names:
            return module
        if self.pooling and f"model.{module}" in self.names:
            return f"model.{module}"
        begins = self._beginnings(module)
        if module in self.unwrapped or any(name.startswith(self.unloaded) for name in begins):
            return None
        if self._is_others(module) or not self.is_target(module):
            return None
        return module

    def elsewhere(self, module: str) -> bool:
        """Whether a module that `rename` has None for is adapted by another worker."""
        if self._is_skipped(module):
            return False
        module = self._mapped(module)
        if module.endswith(WRAPPED_EXPERTS):
            module = module.removesuffix(WRAPPED)
        is_others = any(name.startswith(self.others) for name in self._beginnings(module))
        return is_others and self.is_target(module)

    def is_target(self, module: str) -> bool:
        """Whether the server's targets take a module in, by its name here.

        vLLM's `is_in_target_modules`: a target is a module's last part or its whole name, and
        takes in a fused module with all of its parts.
        """
        if self.targets is None:
            return True
        return module.rpartition(".")[2] in self._target_kinds or module in self.targets

    @cached_property
    def _target_kinds(self) -> frozenset[str]:
        named = frozenset(self.targets or ())
        fused = {kind for kind, parts in self.packed.items() if named.intersection(parts)}
        parts = {part for kind, parts in self.packed.items() if kind in named for part in parts}
        return named | fused | parts

    def _is_skipped(self, module: str) -> bool:
        return any(f".{prefix}" in module or module.startswith(prefix) for prefix in self.skipped)

    def _mapped(self, module: str) -> str:
        """As vLLM's `parse_fine_tuned_lora_name` reads the name of the module's A."""
        if self.renames is None:
            return module.replace(PREFIX, "")
        name = f"{PREFIX}{module}{_END}".replace(PREFIX, "")
        return self.renames.apply(name).removesuffix(_END)

    def _beginnings(self, module: str) -> tuple[str, ...]:
        """What names below a module begin with here."""
        return (f"{module}.", f"model.{module}.") if self.pooling else (f"{module}.",)

    def _is_others(self, module: str) -> bool:
        """Whether another worker has a module, or may have: this one has nothing of the kind."""
        if not self.others:
            return False
        return f"{module}.".startswith(self.others) or module.split(".")[0] not in self.roots
