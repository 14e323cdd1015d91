"""Whether tensors fit the modules that they belong to: types, sizes and ranks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from multilora_kernels.dtypes import KERNEL_DTYPES
from vllm_multilora.adapters.checks.missing_modules import MissingModules
from vllm_multilora.adapters.checks.placement import Placement
from vllm_multilora.adapters.config.adapter_config import AdapterConfig
from vllm_multilora.adapters.files.header import TensorInfo
from vllm_multilora.adapters.model.layout import LinearShape, ModelLayout, SpecialShape
from vllm_multilora.adapters.model.ranks import room_for
from vllm_multilora.adapters.model.tensor_names import HEADS, FoundModule, full_head, tensor_of
from vllm_multilora.adapters.problems import Code, Problem, ProblemList, shown_name

_ORDER = {"A": "[rank, inputs]", "B": "[outputs, rank]"}


@dataclass(frozen=True)
class TensorReport:
    """A checkpoint's served modules, heads that are saved whole, and all that is wrong with it."""

    modules: tuple[FoundModule, ...]
    heads: tuple[str, ...]
    problems: tuple[Problem, ...]


def check_tensors(
    tensors: Mapping[str, TensorInfo],
    config: AdapterConfig | None,
    layout: ModelLayout,
    file: str,
) -> TensorReport:
    """Finds each tensor's module, and all that do not fit; raises as `AdapterConfig.rank_of`.

    Without a configuration, as where it is broken, what depends on it is left out.
    """
    problems = ProblemList(file)
    placement = Placement(tensors, config, layout, problems)
    check = _Check(tensors, config, layout, problems)
    check.heads(placement)
    misfits = [misfit for m in placement.modules.values() for misfit in check.module(m)]
    # Where most modules have other sizes than the base model's, the cause is one.
    modules = {misfit.module for misfit in misfits}
    cause = "base model" if 1 < len(modules) > len(placement.modules) // 2 else None
    for misfit in misfits:
        misfit.add_to(problems, MissingModules(layout, config).hint, cause)
    return TensorReport(
        tuple(placement.modules.values()), tuple(placement.heads), tuple(problems.grouped())
    )


@dataclass
class _Check:
    tensors: Mapping[str, TensorInfo]
    config: AdapterConfig | None
    layout: ModelLayout
    problems: ProblemList

    def heads(self, placement: Placement) -> None:
        """Checks heads saved whole: without a weight of its own, the base model's would decide."""
        saved = self.config.modules_to_save if self.config else ()
        saved = tuple(name for name in saved if name in HEADS and self.layout.is_special(name))
        found: dict[str, dict[str, str]] = {}
        for tensor in placement.heads:
            self.content(tensor)
            parts = found.setdefault(full_head(tensor) or "", {})
            if (first := parts.setdefault(tensor.rpartition(".")[2], tensor)) != tensor:
                self.problems.add(
                    Code.DUPLICATE_TENSOR,
                    tensor,
                    f"beside {shown_name(first)}, and both are of the same head",
                    "one of them",
                )
        for name in saved:
            if module := placement.modules.get(name):
                self.problems.add(
                    Code.DUPLICATE_TENSOR,
                    module.first_tensor,
                    f"of {name}, which 'modules_to_save' of adapter_config.json names, too",
                    f"{name} adapted, or saved whole",
                )
        # PEFT names all heads that there are models with; each model has one of them.
        for name in found or saved[:1]:
            self._head(name, found.get(name, {}))

    def _head(self, name: str, parts: Mapping[str, str]) -> None:
        if "weight" not in parts:
            self.problems.add(
                Code.HALF_MISSING,
                parts.get("bias", ""),
                f"no full weight of {name}",
                "one, as 'modules_to_save' of adapter_config.json has it",
                verb="has",
                hint="the checkpoint is incomplete: save it again",
            )
            return
        weight = self.tensors[parts["weight"]].shape
        bias = self.tensors[parts["bias"]].shape if "bias" in parts else weight[:1]
        if len(weight) != 2:
            wrong, shape, expected = "weight", weight, "[labels, inputs]"
        elif bias != weight[:1]:
            wrong, shape, expected = "bias", bias, f"{list(weight[:1])}: one for each label"
        else:
            return
        found = f"the shape {list(shape)}"
        self.problems.add(Code.WRONG_SHAPE, parts[wrong], found, expected, verb="has")

    def module(self, module: FoundModule) -> Iterator[_Misfit]:
        """Checks a module's tensors; yields those whose shapes do not fit the base model."""
        sound = True
        parts = ("A", "B", "magnitude") if self._has_magnitudes(module) else ("A", "B")
        for missing in parts:
            if missing not in module.tensors:
                self.problems.add(
                    Code.HALF_MISSING,
                    module.first_tensor,
                    f"there without its {tensor_of(missing)}",
                    "both" if len(parts) == 2 else "all three",
                    hint="the checkpoint is incomplete: save it again",
                )
                sound = False
        for tensor in module.tensors.values():
            sound &= self.content(tensor)
        sizes = self._sizes(module)
        if not sound or (sizes is None and module.target != module.module):  # experts held as one
            return
        inputs, outputs = (sizes.inputs, sizes.outputs) if sizes else (None, None)
        if outputs is not None:
            self._magnitude(module, outputs)
        linear = sizes if isinstance(sizes, LinearShape) else LinearShape(0, 0)
        a, b = (
            self._matrix(module.tensors[part], matrices)
            for part, matrices in zip("AB", linear.matrices or (None, None), strict=True)
        )
        fits = a is not None and b is not None
        for part, shape, own, size in (("A", a, 1, inputs), ("B", b, 0, outputs)):
            if shape is not None and size is not None and shape[own] != size:
                special = self.layout.special_shapes.get(module.name)
                vocabulary = special is not None and special.embedding == (part == "A")
                yield _Misfit(module.tensors[part], module.name, part, shape, size, vocabulary)
                fits = False
        if fits and a is not None and b is not None:
            self._ranks(module, a[0], b[1], linear.experts)

    def _matrix(self, tensor: str, matrices: int | None) -> tuple[int, ...] | None:
        """The shape of a tensor's matrices; None unless it is one, or holds so many in a row."""
        shape = self.tensors[tensor].shape
        if matrices is None and len(shape) == 2:
            return shape
        if matrices is not None and len(shape) == 3 and shape[0] == matrices:
            return shape[1:]
        expected = "two dimensions"
        if matrices is not None:
            expected = f"three dimensions, the first of {matrices}, with --enable-moe-shared-loras"
        found = f"the shape {list(shape)}"
        self.problems.add(Code.WRONG_SHAPE, tensor, found, expected, verb="has")
        return None

    def _has_magnitudes(self, module: FoundModule) -> bool:
        if not (self.config and self.config.dora and self.layout.dora):
            return False
        return not self.layout.is_special(module.name)

    def _magnitude(self, module: FoundModule, outputs: int) -> None:
        tensor = module.tensors.get("magnitude")
        if tensor is None or self.tensors[tensor].shape == (outputs,):
            return
        self.problems.add(
            Code.WRONG_SHAPE,
            tensor,
            f"the shape {list(self.tensors[tensor].shape)}",
            f"[{outputs}]: one magnitude for each output of the base model's {module.name}",
            verb="has",
            hint=MissingModules(self.layout, self.config).hint,
            cause=f"{module.name.rpartition('.')[2]} magnitude",
        )

    def content(self, tensor: str) -> bool:
        info = self.tensors[tensor]
        if info.dtype not in KERNEL_DTYPES:
            self.problems.add(
                Code.WRONG_DTYPE,
                tensor,
                str(info.dtype),
                f"one of {', '.join(map(str, KERNEL_DTYPES))}",
                hint="convert the adapter's weights",
            )
            return False
        if info.begin == info.end:
            self.problems.add(
                Code.EMPTY_TENSOR,
                tensor,
                f"no elements (shape {list(info.shape)})",
                "a weight",
                verb="has",
                hint="the checkpoint was saved from a sharded model without gathering it: save it "
                "again with its weights",
            )
            return False
        return True

    def _sizes(self, module: FoundModule) -> SpecialShape | LinearShape | None:
        """The base model's sizes; None where only vLLM knows them."""
        name = module.name
        if self.layout.is_special(name):
            return self.layout.special_shapes.get(name) or self.layout.linear_shapes.get(name)
        slices = [self.layout.by_name[part][0] for part in self.layout.parts(name)]
        return LinearShape(slices[0].inputs, sum(part.outputs for part in slices))

    def _ranks(self, module: FoundModule, of_a: int, of_b: int, experts: int) -> None:
        tensor = module.tensors["A"]
        if of_a != of_b:
            self.problems.add(
                Code.RANKS_DIFFER,
                module.tensors["B"],
                f"the rank {of_b}",
                f"{of_a}, as lora_A",
                verb="has",
                hint="the checkpoint mixes two adapters: save it again",
            )
            return
        rank = self.config.rank_of(module.target) * experts if self.config else of_a
        of_all = f" times the base model's {experts} experts" if experts > 1 else ""
        if rank != of_a:
            self.problems.add(
                Code.RANK_NOT_AS_CONFIGURED,
                tensor,
                f"the rank {of_a}",
                f"{rank // experts}{of_all}, which adapter_config.json gives its module",
                verb="has",
                hint="'r' and 'rank_pattern' must be those that the adapter was trained with: "
                "scalings follow from them",
            )
        if of_a > self.layout.max_rank * experts and (rank != of_a or self.config is None):
            self.problems.add(
                Code.RANK_TOO_LARGE,
                tensor,
                f"the rank {of_a}",
                f"at most {self.layout.max_rank}",
                verb="has",
                hint=room_for(of_a),
            )


@dataclass(frozen=True)
class _Misfit:
    """A tensor whose size is not the base model's."""

    tensor: str
    module: str
    part: str
    shape: tuple[int, ...]
    size: int
    vocabulary: bool

    def add_to(self, problems: ProblemList, hint: str, cause: str | None) -> None:
        side = "inputs" if self.part == "A" else "outputs"
        rows, columns = self.shape
        expected = [rows, self.size] if self.part == "A" else [self.size, columns]
        if self.vocabulary:
            code, what = Code.WRONG_VOCABULARY, f"a vocabulary of {self.size}"
        else:
            code, what = Code.WRONG_SHAPE, f"{self.size} {side}"
        if (rows if self.part == "A" else columns) == self.size:
            hint = f"lora_{self.part} seems to be transposed: PEFT writes {_ORDER[self.part]}"
            expected = [columns, rows]
        problems.add(
            code,
            self.tensor,
            f"the shape {list(self.shape)}",
            f"{expected}: the base model's {self.module} has {what}",
            verb="has",
            hint=hint,
            cause=cause or f"{self.module.rpartition('.')[2]} {self.part} {self.shape}",
        )
