"""Reads from a running model what it accepts of an adapter on this worker."""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from vllm.config import get_current_vllm_config
from vllm.lora.layers import (
    BaseLayerWithLoRA,
    FusedMoEWithLoRA,
    LogitsProcessorWithLoRA,
    VocabParallelEmbeddingWithLoRA,
)
from vllm.lora.layers.base_linear import BaseLinearLayerWithLoRA
from vllm.lora.layers.column_parallel_linear import (
    MergedColumnParallelLinearVariableSliceWithLoRA,
    MergedColumnParallelLinearWithLoRA,
)
from vllm.model_executor.layers.linear import MergedColumnParallelLinear, QKVParallelLinear
from vllm.model_executor.layers.mamba.mamba_mixer import MambaMixer
from vllm.model_executor.layers.mamba.mamba_mixer2 import MambaMixer2
from vllm.model_executor.layers.vocab_parallel_embedding import (
    ParallelLMHead,
    VocabParallelEmbedding,
)
from vllm.model_executor.models import supports_multimodal

from multilora_kernels.dtypes import of_torch
from vllm_multilora.adapters.model.layout import LinearShape, ModelLayout, SliceLayout, SpecialShape
from vllm_multilora.adapters.model.tensor_names import HEADS
from vllm_multilora.integration.step.stock_rows import ClassificationHead
from vllm_multilora.integration.worker.experts.expert_kernels import experts_left_alone
from vllm_multilora.integration.worker.experts.expert_layout import (
    expert_shapes,
    has_filled_experts,
)
from vllm_multilora.integration.worker.model.module_naming import module_naming, refused_layers
from vllm_multilora.integration.worker.model.output_factors import no_factors
from vllm_multilora.integration.worker.rows.encoder_rows import ENCODER

if TYPE_CHECKING:
    from vllm.lora.model_manager import LoRAModelManager

_Range = tuple[int, int]

# Ways of filling a slot that are nothing but slicing and copying, slice by slice; a layer that
# fills its slots in another way is left to its own `set_lora`.
_PLAIN = (
    BaseLinearLayerWithLoRA.set_lora,
    MergedColumnParallelLinearWithLoRA.set_lora,
    MergedColumnParallelLinearVariableSliceWithLoRA.set_lora,
)

_REORDERED = "vLLM loads its weights with their rows in another order"
# What Transformers has as one and vLLM adapts in parts, by vLLM's classes of the layers it is in.
_MERGED = {"Glm4DecoderLayer": ("mlp.gate_up_proj",)}
_PLACES = {"q": 0, "k": 1, "v": 2}  # of what vLLM fuses, in the fused layer


@dataclass(frozen=True)
class RunningLayout:
    """A model's layers as the plugin's adapters fill them.

    Attributes:
        layout: What packed adapters must look like.
        packed: Layers that packed adapters fill, by name, in the order of their rows in the rank
            tables: layer after layer, slice after slice.
        special: The other layers, by name: filled through vLLM's own `set_lora`.
        orders: Of slices whose weights vLLM loads with their rows in another order than checkpoints
            have, by row in the rank tables: which of the rows of B that this worker keeps belongs
            to each output.
        repeated: Those of the special layers some of whose rows every rank has.
    """

    layout: ModelLayout
    packed: dict[str, BaseLinearLayerWithLoRA]
    special: dict[str, BaseLayerWithLoRA]
    orders: dict[int, torch.Tensor]
    repeated: dict[str, RepeatedRows]


def running_layout(manager: LoRAModelManager, *, dora: bool) -> RunningLayout:
    """The layout of a manager's model, read from its LoRA layers."""
    slices: list[SliceLayout] = []
    packed: dict[str, BaseLinearLayerWithLoRA] = {}
    special: dict[str, BaseLayerWithLoRA] = {}
    no_dora: dict[str, str] = {}
    copied = _copied_slices(manager.model)
    repeated = dict(repeated_rows(manager.model))
    for name, module in manager.modules.items():
        sources = list(manager.packed_modules.get(name, [name]))
        for place, source in copied.get(name, {}).items():
            sources[place] = source
        found = [] if name in repeated else _slices(module, sources, len(slices), manager)
        if found and isinstance(module, BaseLinearLayerWithLoRA):
            slices += found
            packed[name] = module
            if dora and (reason := no_factors(module)):
                no_dora.update((part.name, reason) for part in found)
        else:
            special[name] = module
    orders = dict(_orders(manager.model, slices))
    if dora:
        no_dora.update((part.name, _REORDERED) for part in slices if part.row in orders)
    special_names = frozenset(
        source for name in special for source in (name, *manager.packed_modules.get(name, ()))
    )
    merged = dict(_merged_modules(manager, packed))
    names = special_names.union(merged, (part.name for part in slices))
    bypassed = dict(bypassed_layers(manager))
    lora_config: Any = manager.lora_config
    text_config = get_current_vllm_config().model_config.hf_text_config
    layout = ModelLayout(
        slices=tuple(slices),
        max_rank=lora_config.max_lora_rank,
        dtype=of_torch(lora_config.lora_dtype),
        columns_first=True,  # see `MultiLoRAModelManager`
        naming=module_naming(manager, names, bypassed),
        special=special_names,
        special_shapes={
            name: shape
            for name, module in (*special.items(), *unadapted_embeddings(manager))
            if (shape := _special_shape(module))
        },
        linear_shapes=dict(_linear_shapes(manager, special, repeated)),
        tied=bool(getattr(text_config, "tie_word_embeddings", False)),
        vocabulary=manager.vocab_size,
        dora=dora,
        no_dora=no_dora,
        bypassed=bypassed,
        merged=merged,
    )
    return RunningLayout(layout, packed, special, orders, repeated)


def _copied_slices(model: torch.nn.Module) -> dict[str, dict[int, str]]:
    """Slices that vLLM loads with another module's weights, and which adapters of that act on, too.

    Returns:
        By layer, slices' places in it and that module's name: where keys are values as well
        (Gemma 4's `attention_k_eq_v`), the third slice is `k_proj`'s like the second.
    """
    found: dict[str, dict[int, str]] = {}
    for block, part in model.named_modules():
        mapper = getattr(part, "hf_to_vllm_mapper", None)
        for source, (layer, shards) in (getattr(mapper, "orig_to_new_stacked", None) or {}).items():
            if isinstance(shards, list):
                source, layer = (f"{block}.{name}".strip(".") for name in (source, layer))
                places = (_PLACES[shard] if isinstance(shard, str) else shard for shard in shards)
                found.setdefault(layer, {}).update(dict.fromkeys(places, source))
    return found


def _merged_modules(
    manager: LoRAModelManager, packed: Container[str]
) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Modules as of `ModelLayout.merged`.

    Of other models nobody knows in which order such a module would have its rows: none was trained.
    """
    for block, part in manager.model.named_modules():
        for kind in _MERGED.get(type(part).__name__, ()):
            name = f"{block}.{kind}"
            sources = manager.packed_modules.get(name, ())
            if name in packed and len(sources) > 1:
                yield name, tuple(sources)


def _orders(
    model: torch.nn.Module, slices: Sequence[SliceLayout]
) -> Iterator[tuple[int, torch.Tensor]]:
    """Queries and keys that vLLM reorders for its rotary embeddings (Llama 4), as of `orders`.

    The model is asked: it reorders rows that hold their own numbers.
    """
    for block, part in model.named_modules():
        reorder = getattr(part, "permute_qk_weight_for_rotary", None)
        if reorder is None:
            continue
        for of in slices:
            if of.name.startswith(block) and of.name.endswith((".q_proj", ".k_proj")):
                _, rows = reorder(f"{of.name}.weight", torch.arange(of.outputs)[:, None])
                first, last = of.output_range
                yield of.row, rows[first:last, 0] - first


def _slices(
    module: BaseLayerWithLoRA, sources: list[str], row: int, manager: LoRAModelManager
) -> list[SliceLayout]:
    """A layer's slices; none if it has to fill its slots itself."""
    if not isinstance(module, BaseLinearLayerWithLoRA) or type(module).set_lora not in _PLAIN:
        return []
    if isinstance(module, ClassificationHead):  # has full weights beside A and B
        return []
    base: Any = module.base_layer
    inputs = base.input_size
    outputs = _outputs(base) if module.n_slices > 1 else [sum(_outputs(base))]
    # A layer that fuses more than its base class knows of, or more modules than it has slices.
    if len(outputs) != module.n_slices or len(sources) > len(outputs):
        return []
    of_first = _of_first_source(outputs, sources)
    whole = sum(outputs[:of_first])
    kept: list[tuple[_Range, _Range, _Range | None]]
    if module.tp_size == 1:
        kept = [((0, inputs), (0, size), None) for size in outputs]
    else:
        try:
            kept = list(_kept(module, inputs, outputs, manager.lora_config.max_lora_rank))
        except _NotContiguousError:
            return []
    parts = []
    for i, (size, (columns, rows, ranks)) in enumerate(zip(outputs, kept, strict=True)):
        held = (columns[1] - columns[0], rows[1] - rows[0])
        if held != (module.lora_a_stacked[i].shape[-1], module.lora_b_stacked[i].shape[-2]):
            return []
        name = sources[max(0, i - of_first + 1)]
        if i < of_first:
            before = sum(outputs[:i])
            size, rows = whole, (before + rows[0], before + rows[1])
        parts.append(SliceLayout(name, row + i, inputs, size, columns, rows, ranks))
    return parts


def _of_first_source(outputs: Sequence[int], sources: Sequence[str]) -> int:
    """How many of a layer's slices the first of its modules has, which others follow one by one.

    Checkpoints may have several slices as one, such as all of the `in_proj` of a Mamba 2.
    """
    return len(outputs) - len(sources) + 1


def bypassed_layers(manager: LoRAModelManager) -> Iterator[tuple[str, str]]:
    """Layers on which adapters would not act, by checkpoints' names, and why."""
    for name in refused_layers(manager):  # such as an embedding model's last one
        yield name, "vLLM adapts no layers of its kind"
    for name in _reordered_layers(manager):
        yield name, _REORDERED
    reason = f"vLLM adapts no embeddings and output heads of {type(manager.model).__name__}"
    yield from ((name, reason) for name, _ in unadapted_embeddings(manager))
    reason = "vLLM does not say whose images its rows are of"
    yield from _with_sources(manager, _tower_layers(manager), reason)
    for start, reason in _without_the_steps_rows(manager.model):
        layers = [name for name in manager.modules if name.startswith(start)]
        yield from _with_sources(manager, layers, reason)
    for block, part in manager.model.named_modules():
        if isinstance(part, MambaMixer | MambaMixer2):
            yield f"{block}.conv1d", "vLLM convolves with its weights directly"
    for name, module in manager.modules.items():
        if isinstance(module, FusedMoEWithLoRA) and not has_filled_experts(module):
            for source in (name, f"{name}.base_layer", *manager.packed_modules.get(name, ())):
                yield source, "vLLM fills slots for other experts than those that a rank has"
    if not ClassificationHead:  # it wraps them as linear layers, and maps tokens to their rows
        heads = [name for name in manager.modules if name.rpartition(".")[2] in HEADS]
        yield from _with_sources(manager, heads, "vLLM adapts no classification heads before 0.31")
    for name, reason in experts_left_alone(manager.model):
        parent, _, kind = name.rpartition(".")
        parts = (f"{parent}.{part}" for part in manager.packed_modules_mapping.get(kind, ()))
        for source in (name, f"{name}.base_layer", *parts):
            yield source, reason
    reason = "vLLM's attention multiplies with its weights directly"
    yield from _with_sources(manager, _layers_held_by_attention(manager), reason)


def _with_sources(
    manager: LoRAModelManager, layers: Iterable[str], reason: str
) -> Iterator[tuple[str, str]]:
    """Layers by checkpoints' names, which have in parts what vLLM has fused, and the reason."""
    for name in layers:
        for source in manager.packed_modules.get(name, [name]):
            yield source, reason


def _layers_held_by_attention(manager: LoRAModelManager) -> list[str]:
    """Layers that attention has outside of the model's modules, where vLLM puts no adapters.

    Multi-head latent attention (MLA) so holds `kv_b_proj`, which makes keys and values of what is
    cached.
    """
    attentions = (getattr(part, "impl", None) for part in manager.model.modules())
    held = {id(value) for of in attentions for value in getattr(of, "__dict__", {}).values()}
    bases = ((name, getattr(part, "base_layer", None)) for name, part in manager.modules.items())
    return [name for name, base in bases if base is not None and id(base) in held]


def _without_the_steps_rows(model: torch.nn.Module) -> Iterator[tuple[str, str]]:
    """Beginnings of the names of layers that have other rows than the step's, and why.

    vLLM would apply adapters to the first ones of the rows that it has counted.
    """
    for block, part in model.named_modules():
        if getattr(part, "is_sequence_parallel", False):
            yield f"{block}.", "each of vLLM's ranks computes some of its rows only"
        if hasattr(part, "vision_experts"):  # of Ernie 4.5 VL
            yield f"{block}.", "vLLM computes rows of texts apart from those of images"
        if isinstance(part, MambaMixer):
            for kind in ("x_proj", "dt_proj"):
                yield f"{block}.{kind}", "vLLM computes rows of prompts apart from those of answers"


def _reordered_layers(manager: LoRAModelManager) -> Iterator[str]:
    """Queries and keys that vLLM reorders for its rotary embeddings, and does not say how.

    So it does in K2 Horizon; for those of Llama 4, see `_orders`.
    """
    blocks = tuple(
        f"{name}."
        for name, part in manager.model.named_modules()
        if getattr(part, "fold_rope_weights", False) and part.rope_head_dim != part.head_dim
    )
    for name in manager.modules:
        for source in manager.packed_modules.get(name, [name]):
            if name.startswith(blocks) and source.endswith((".q_proj", ".k_proj")):
                yield source


def _tower_layers(manager: LoRAModelManager) -> Iterator[str]:
    """Layers that would take rows of images for the language model's.

    They are wrapped in a model that does not say which of its parts are towers: then vLLM describes
    rows of the language model alone.
    """
    has_encoder = ENCODER in manager.punica_wrapper_mapping
    if manager.supports_mm or has_encoder or not supports_multimodal(manager.model):
        return
    model: Any = manager.model
    try:
        language = set(model.get_language_model().modules())
    except NotImplementedError:  # nobody knows which part that is
        return
    yield from (name for name, module in manager.modules.items() if module not in language)


def unadapted_embeddings(
    manager: LoRAModelManager,
) -> Iterator[tuple[str, VocabParallelEmbedding]]:
    """Embeddings and output heads that the model has, and that vLLM does not adapt in it."""
    for name, part in manager.model.named_modules(remove_duplicate=False):
        is_wrapped = name in manager.modules or name.endswith(".base_layer")
        if isinstance(part, VocabParallelEmbedding) and not is_wrapped:
            yield name, part


def _special_shape(module: torch.nn.Module) -> SpecialShape | None:
    """Sizes of an embedding or a head in the whole model; None for other layers."""
    if isinstance(module, ParallelLMHead):
        return SpecialShape(module.embedding_dim, module.org_vocab_size, embedding=False)
    if isinstance(module, VocabParallelEmbedding):
        return SpecialShape(module.org_vocab_size, module.embedding_dim, embedding=True)
    if isinstance(module, VocabParallelEmbeddingWithLoRA):
        base: Any = module.base_layer
        return SpecialShape(base.org_vocab_size, base.embedding_dim, embedding=True)
    if isinstance(module, LogitsProcessorWithLoRA):
        return SpecialShape(module.hidden_size, module.vocab_size, embedding=False)
    return None


def _linear_shapes(
    manager: LoRAModelManager,
    special: Mapping[str, BaseLayerWithLoRA],
    repeated: Mapping[str, RepeatedRows],
) -> Iterator[tuple[str, LinearShape]]:
    """Sizes of linear layers and of experts' projections by their names in checkpoints."""
    for name, module in special.items():
        sources = manager.packed_modules.get(name, [])
        if isinstance(module, FusedMoEWithLoRA):
            yield from expert_shapes(name, module, sources)
        elif isinstance(module, BaseLinearLayerWithLoRA):
            base: Any = module.base_layer
            outputs = _outputs(base)
            if name in repeated:
                outputs = [repeated[name].outputs]
            of_first = _of_first_source(outputs, sources or [name])
            if of_first > 0:
                sizes = (sum(outputs[:of_first]), *outputs[of_first:])
                for source, size in zip(sources or [name], sizes, strict=True):
                    yield source, LinearShape(base.input_size, size)


def _outputs(base: Any) -> list[int]:
    """Widths of a layer's slices in the whole model, as checkpoints have them."""
    if isinstance(base, QKVParallelLinear):
        # `output_sizes` counts key-value heads once per replica; checkpoints hold them once.
        value_size = getattr(base, "v_head_size", base.head_size)
        return [
            base.total_num_heads * base.head_size,
            base.total_num_kv_heads * base.head_size,
            base.total_num_kv_heads * value_size,
        ]
    return list(getattr(base, "output_sizes", None) or [base.output_size])


class _NotContiguousError(Exception):
    """A worker keeps several separate parts of one tensor."""


def _kept(
    module: Any, inputs: int, outputs: list[int], max_rank: int
) -> Iterator[tuple[_Range, _Range, _Range | None]]:
    """What the layer keeps of each slice under tensor parallelism: columns, rows, ranks.

    The layer is asked: it slices tensors that hold their own row and column numbers.
    """
    rank_numbers = torch.arange(max_rank)[:, None].expand(max_rank, inputs)
    columns = torch.arange(inputs)[None].expand(max_rank, inputs)
    rows = [torch.arange(size)[:, None] for size in outputs]
    if module.n_slices == 1:
        a_ranks, a_columns = module.slice_lora_a(rank_numbers), module.slice_lora_a(columns)
        parts = [(a_ranks, a_columns, module.slice_lora_b(rows[0]))]
    else:
        many = module.n_slices
        parts = list(
            zip(
                module.slice_lora_a([rank_numbers] * many),
                module.slice_lora_a([columns] * many),
                module.slice_lora_b(rows),
                strict=True,
            )
        )
    for a_ranks, a_columns, b_rows in parts:
        ranks = _range(a_ranks[:, 0])
        yield _range(a_columns[0]), _range(b_rows[:, 0]), None if ranks == (0, max_rank) else ranks


def _range(numbers: torch.Tensor) -> _Range:
    first, last = int(numbers[0]), int(numbers[-1]) + 1
    if not torch.equal(numbers, torch.arange(first, last)):
        raise _NotContiguousError
    return first, last


def is_ranked(module: BaseLayerWithLoRA) -> bool:
    """Whether our wrapper tracks ranks for a layer; others are computed at the full rank.

    Classification heads are not: vLLM compares their wrapper's identity with the model's.
    """
    kinds = (BaseLinearLayerWithLoRA, LogitsProcessorWithLoRA, VocabParallelEmbeddingWithLoRA)
    return isinstance(module, kinds) and not isinstance(module, ClassificationHead)


@dataclass(frozen=True)
class RepeatedRows:
    """Which rows a rank has of a layer.

    Attributes:
        outputs: Of the layer in a checkpoint.
        rows: Those of the checkpoint that this rank has, in its order.
        rank: This rank's number.
    """

    outputs: int
    rows: torch.Tensor
    rank: int

    def for_cutting(self, b: torch.Tensor) -> torch.Tensor:
        """A B of which vLLM cuts this rank's rows, as it does where ranks have a share of all."""
        own = b[self.rows]
        return torch.cat([own.new_zeros(self.rank * len(own), own.shape[1]), own])


def repeated_rows(model: torch.nn.Module) -> Iterator[tuple[str, RepeatedRows]]:
    """Such layers by name: of states (Mamba 2) that are of one group, which all heads need."""
    for block, part in model.named_modules():
        layer: Any = getattr(part, "in_proj", None)
        base = getattr(layer, "base_layer", None)
        if not isinstance(part, MambaMixer2) or base is None:
            continue
        if isinstance(base, MergedColumnParallelLinear):  # ranks have whole groups
            continue
        inner, heads, of_group = part.intermediate_size, part.num_heads, 2 * part.ssm_state_size
        rank, ranks = layer.tp_rank, layer.tp_size
        own = torch.arange(rank * inner // ranks, (rank + 1) * inner // ranks)
        of_heads = torch.arange(rank * heads // ranks, (rank + 1) * heads // ranks)
        shared = torch.arange(of_group) + 2 * inner
        rows = torch.cat([own, own + inner, shared, of_heads + 2 * inner + of_group])
        yield f"{block}.in_proj", RepeatedRows(2 * inner + of_group + heads, rows, rank)
