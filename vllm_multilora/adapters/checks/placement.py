"""Which module of the base model each of a checkpoint's tensors belongs to."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from vllm_multilora.adapters.checks.companions import require_companions
from vllm_multilora.adapters.checks.missing_modules import MissingModules
from vllm_multilora.adapters.config.adapter_config import AdapterConfig
from vllm_multilora.adapters.config.target_modules import Targets
from vllm_multilora.adapters.model.layout import ModelLayout, SpecialKind
from vllm_multilora.adapters.model.tensor_names import (
    HEADS,
    WRAPPED,
    FoundModule,
    TensorRole,
    foreign,
    full_head,
    is_unused,
    parse_tensor_name,
    tensor_of,
)
from vllm_multilora.adapters.problems import Code, ProblemList, shown_name


class Placement:
    """Sorts a checkpoint's tensors by module and notes those that have no place.

    Tensors of modules that are left out on purpose are passed over, unless there are no others.

    Attributes:
        modules: The modules that the base model serves, by name in the layout.
        heads: Tensors of classification heads saved whole.
    """

    def __init__(
        self,
        tensors: Iterable[str],
        config: AdapterConfig | None,
        layout: ModelLayout,
        problems: ProblemList,
    ) -> None:
        self.modules: dict[str, FoundModule] = {}
        self.heads: list[str] = []
        self._config = config
        self._layout = layout
        self._missing = MissingModules(layout, config)
        self._targets = Targets(config) if config else None
        self._problems = problems
        self._unknown: list[tuple[str, str, str]] = []
        self._left_out: dict[str, str] = {}  # a tensor of each such module
        self._is_adapted_elsewhere = False
        for tensor in tensors:
            if (plain := layout.by_tensor.get(tensor)) is not None:
                self._add(*plain, tensor)
            elif not is_unused(tensor):
                self._place(tensor)
        require_companions(self.modules, config, layout, problems)
        self._report_unknown()

    def _place(self, tensor: str) -> None:
        role = parse_tensor_name(tensor)
        if role is None:
            head = full_head(tensor)
            if head is None or not self._layout.is_special(head):
                self._refuse_name(tensor)
            elif self._config and head not in self._config.modules_to_save:
                self._problems.add(
                    Code.UNKNOWN_TENSOR,
                    tensor,
                    f"{head} saved whole",
                    f"{head!r} in 'modules_to_save' of adapter_config.json",
                )
            else:
                self.heads.append(tensor)
            return
        if role.part == "magnitude" and self._config and not self._config.dora:
            self._problems.add(
                Code.UNKNOWN_TENSOR,
                tensor,
                "a magnitude of DoRA",
                "'use_dora': true in adapter_config.json, or no magnitudes",
                hint="save the adapter again, with its own configuration",
            )
            return
        name = self._layout.naming.rename(role.module)
        if name is None:
            if self._layout.naming.elsewhere(role.module):
                self._is_adapted_elsewhere = True
            else:
                self._left_out.setdefault(role.module, tensor)
        elif why := self._of_parts(self._layout.bypassed, name):
            if not self._refuse_by_kind(role.module, name, tensor):
                self._refuse_bypassed(role.module, tensor, why)
        elif self._layout.is_special(name) or self._layout.parts(name)[0] in self._layout.by_name:
            self._add(role, name, tensor)
        else:
            self._unknown.append((tensor, role.module, name))

    def _of_parts(self, reasons: Mapping[str, str], name: str) -> str | None:
        """The reason that there is for a module or, if it is merged, for a part of it."""
        return next((reasons[of] for of in self._layout.parts(name) if of in reasons), None)

    def _key_of(self, module: str) -> str:
        return self._config.key_of(module) if self._config else "target_modules"

    def _refuse_bypassed(self, module: str, tensor: str, why: str) -> None:
        """An adapter that acts in part only would give other answers than PEFT."""
        self._problems.add(
            Code.UNSUPPORTED_FEATURE,
            tensor,
            f"of a layer on which adapters have no effect here: {why}",
            "layers that vLLM adapts",
            hint=f"train without it in {self._key_of(module)!r}, or merge the adapter into the "
            "base model",
            cause=f"bypassed {why}",
        )

    def _add(self, role: TensorRole, name: str, tensor: str) -> None:
        found = self.modules.get(name)
        is_known = found is not None and found.module == role.module
        key = self._targets.leaves_out(role.module) if self._targets and not is_known else None
        if key is not None:
            self._problems.add(
                Code.UNKNOWN_TENSOR,
                tensor,
                f"of a module that {key!r} of adapter_config.json leaves out",
                "tensors of the modules that PEFT adapts by this configuration, and no others",
                hint="PEFT would ignore it: save the adapter again, with its own configuration",
                cause=key,
            )
            return
        shape = self._layout.special_shapes.get(name) if role.embedding else None
        if role.embedding and not (shape is not None and shape.embedding):
            self._problems.add(
                Code.UNKNOWN_TENSOR,
                tensor,
                "named as an embedding's",
                "lora_A.weight or lora_B.weight: the base model's module is no embedding",
                hint=self._missing.hint,
            )
            return
        self._refuse_by_kind(role.module, name, tensor)
        if found is None:
            outer = self._layout.outer_parameter(name.removesuffix(WRAPPED))
            found = self.modules[name] = FoundModule(role.module, name, outer)
        other = found.tensors.setdefault(role.part, tensor)
        if found.module != role.module or other != tensor:
            first = shown_name(found.tensors.get(role.part, found.module))
            self._problems.add(
                Code.DUPLICATE_TENSOR,
                tensor,
                f"beside {first}, and both belong to the base model's {shown_name(name)}",
                f"one {tensor_of(role.part)}",
                cause="duplicate",
            )

    def _refuse_by_kind(self, module: str, name: str, tensor: str) -> bool:
        """Whether adapters of this one's kind cannot have such a module; notes why."""
        config = self._config
        if config is None or not (config.invocation_tokens or config.dora):
            return False
        kind = self._layout.kind_of_special(name)
        if config.invocation_tokens and kind in (SpecialKind.EMBEDDING, SpecialKind.EXPERTS):
            # An activated adapter can have linear layers and the output head, as in PEFT.
            self._problems.add(
                Code.UNSUPPORTED_FEATURE,
                tensor,
                f"of {kind}",
                "linear layers and 'lm_head' only, with 'alora_invocation_tokens'",
                hint="PEFT does not activate such layers: train without them in 'target_modules'",
                cause="activated",
            )
            return True
        if not (config.dora and self._layout.dora):
            return False
        why = self._of_parts(self._layout.no_dora, name)
        if kind is None and not why:
            return False
        # A DoRA adapter can have linear layers whose base weights can be read.
        hint = f"train without it in {self._key_of(module)!r}"
        if kind is not None:
            found, expected = f"of {kind}", "linear layers that the server fills"
        else:
            found = f"of a layer whose outputs cannot be multiplied: {why}"
            expected = "layers whose weights and outputs the server has whole"
            hint += ", or serve it without what stands in the way"
        self._problems.add(
            Code.UNSUPPORTED_FEATURE,
            tensor,
            found,
            f"{expected}, with 'use_dora'",
            hint=hint,
            cause=f"dora {found}",
        )
        return True

    def _refuse_name(self, tensor: str) -> None:
        """A tensor that is no A, B or magnitude; said once if the configuration says it already."""
        raw = self._config.raw if self._config else {}
        kind, said = "no LoRA tensor", False
        last = tensor.rpartition(".")[2]
        hint = "save the adapter again as plain LoRA"
        if whose := foreign(tensor):
            kind = f"a tensor {whose}"
            hint = "convert the adapter to PEFT's format with the tool that has trained it"
        elif tensor.endswith(".lora_B.bias"):
            kind, said = "a bias of lora_B", bool(raw.get("lora_bias"))
        elif last == "bias" and self._config and self._config.bias != "none":
            self._problems.add(
                Code.UNSUPPORTED_FEATURE,
                tensor,
                "a bias of the base model",
                "none: biases trained with an adapter are not supported",
                hint="train with 'bias': 'none'",
                cause="biases",
            )
            return
        elif last == "bias":
            kind = "a bias of the base model"
        elif last == "weight":
            # Modules to save other than heads have been refused with the configuration.
            saved = self._config.modules_to_save if self._config else ()
            kind, said = "a full weight", any(name not in HEADS for name in saved)
        if not said:
            self._problems.add(
                Code.UNKNOWN_TENSOR,
                tensor,
                kind,
                "lora_A.weight and lora_B.weight of the base model's modules, and nothing else",
                hint=hint,
            )

    def _report_unknown(self) -> None:
        adapted = self.modules or self.heads or self._is_adapted_elsewhere
        if not adapted and not self._unknown and not self._problems:
            if self._left_out:
                self._refuse_without_effect()
                return
            self._problems.add(
                Code.NO_LORA_TENSORS,
                "",
                "no lora_A and no lora_B",
                "a LoRA adapter",
                verb="has",
                hint="save the adapter again with PEFT's save_pretrained",
            )
        placed = self.modules or self._left_out or self._is_adapted_elsewhere
        if self._unknown and not placed and not self._explained():
            tensor, module, _ = self._unknown[0]
            self._problems.add(
                Code.NO_MATCHING_MODULES,
                tensor,
                f"for {shown_name(module)}, and none of the {len(self._unknown)} LoRA tensors is "
                "for a module that the base model has",
                f"modules such as {', '.join(list(self._layout.by_name)[:2])}",
                hint=self._missing.hint,
            )
            return
        for tensor, _, name in self._unknown:
            code, found, expected, hint = self._missing.explain(name)
            cause = "layers" if code == Code.LAYER_OUT_OF_RANGE else None
            self._problems.add(code, tensor, found, expected, hint=hint, cause=cause)

    def _refuse_without_effect(self) -> None:
        """Every module is left out: whoever named the adapter would be answered by the base."""
        kinds = dict.fromkeys(module.rpartition(".")[2] for module in self._left_out)
        targets = self._layout.naming.targets
        self._problems.add(
            Code.NOTHING_APPLIED,
            next(iter(self._left_out.values())),
            f"for a module that is left out here, as all {len(self._left_out)} modules of the "
            f"adapter are ({shown_name(', '.join(kinds))})",
            f"one of the modules that adapters change here "
            f"({', '.join(self._missing.kinds) or 'none'})",
            hint=f"the server has --lora-target-modules {' '.join(targets)}: serve the adapter "
            "where its modules are among them"
            if targets is not None
            else "the server applies no adapters to these modules of the base model: train others",
        )

    def _explained(self) -> bool:
        """Whether there is more to say of the first unknown module than that it is unknown."""
        return self._missing.explain(self._unknown[0][2])[0] != Code.UNKNOWN_MODULE
