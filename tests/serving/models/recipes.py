"""The kinds of adapter that the serving tests serve: one recipe per thing that can go wrong."""

from dataclasses import dataclass, field, replace

MAX_RANK = 64

_ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
_LINEAR = (*_ATTENTION, "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class AdapterRecipe:
    """What distinguishes one adapter from another.

    Attributes:
        name: The name under which the adapter is served.
        targets: PEFT's ``target_modules``.
        rank: PEFT's ``r``.
        alpha: PEFT's ``lora_alpha``.
        gain: Size of an adapted module's delta, relative to the module's own output.
        rslora: Scales by alpha over the root of the rank, instead of over the rank.
        rank_pattern: Ranks that differ by module, as PEFT's field of that name.
        alpha_pattern: Alphas that differ by module, as PEFT's field of that name.
        layers: Only these layers are adapted; all of them where None.
        invocation: PEFT's ``alora_invocation_tokens``; none: the adapter acts on whole prompts.
        dora: PEFT's ``use_dora``: magnitudes are those of the base model, changed at random.
        own_head: Brings a head for classes, saved whole, as PEFT's adapters of classifiers do.
        within: Only modules below this one are adapted; all of them where empty.
        bfloat16: The weights of its linear layers are numbers that bfloat16 has.
        parameters: PEFT's ``target_parameters``, such as those of all experts of a layer.
    """

    name: str
    targets: tuple[str, ...] = _LINEAR
    rank: int = 8
    alpha: int = 16
    gain: float = 0.5
    rslora: bool = False
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, int] = field(default_factory=dict)
    layers: tuple[int, ...] | None = None
    invocation: tuple[int, ...] = ()
    dora: bool = False
    own_head: bool = False
    within: str = ""
    bfloat16: bool = False
    parameters: tuple[str, ...] = ()


LINEAR_RECIPES = (
    AdapterRecipe("all-linear-r8"),
    AdapterRecipe("qv-r5", targets=("q_proj", "v_proj"), rank=5, gain=0.8),
    AdapterRecipe(
        "patterns",
        rank_pattern={"q_proj": 3, "layers.1.mlp.down_proj": 24, "gate_proj": 12},
        alpha_pattern={"k_proj": 40, "layers.0.mlp.up_proj": 4},
    ),
    AdapterRecipe("rslora-r16", rank=16, rslora=True),
    AdapterRecipe("max-rank-r64", rank=MAX_RANK, alpha=32),
    AdapterRecipe("gate-only-r8", targets=("gate_proj",), gain=1.0),
    AdapterRecipe("up-only-r8", targets=("up_proj",), gain=1.0),
    AdapterRecipe("layer1-only-r8", layers=(1,), gain=0.8),
)
"""Adapters of linear layers only, which every base model takes."""

EMBEDDING_RECIPE = AdapterRecipe(
    "embedding-head-r8",
    targets=(*_ATTENTION, "embed_tokens", "lm_head"),
    rank_pattern={"embed_tokens": 3},
    alpha_pattern={"lm_head": 40},
)
"""Adapts the embedding and the head too: for base models whose class has vLLM embedding modules."""

DORA_RECIPES = (
    AdapterRecipe("dora-all-r8", dora=True),
    AdapterRecipe("dora-qv-r5", targets=("q_proj", "v_proj"), rank=5, gain=0.8, dora=True),
    AdapterRecipe(
        "dora-patterns",
        rank_pattern={"q_proj": 3, "layers.1.mlp.down_proj": 24, "gate_proj": 12},
        alpha_pattern={"k_proj": 40, "layers.0.mlp.up_proj": 4},
        dora=True,
    ),
    AdapterRecipe("dora-rslora-r16", rank=16, rslora=True, dora=True),
    AdapterRecipe("dora-max-rank-r64", rank=MAX_RANK, alpha=32, dora=True),
    AdapterRecipe("dora-up-only-r8", targets=("up_proj",), gain=1.0, dora=True),
)
"""DoRA adapters, some of parts of fused layers only."""

CLASSIFIER_RECIPES = (
    AdapterRecipe("own-head-r8", own_head=True),
    AdapterRecipe("own-head-qv-r5", targets=("q_proj", "v_proj"), rank=5, gain=0.8, own_head=True),
    AdapterRecipe("adapted-head-r16", targets=(*_ATTENTION, "score"), rank=16),
    AdapterRecipe("base-head-r64", rank=MAX_RANK, alpha=32),
)
"""Adapters of classifiers: what they do to the head is what tells them apart."""

TOKEN_CLASSIFIER_RECIPES = (
    AdapterRecipe("own-head-r8", targets=("query", "key", "value"), own_head=True),
    AdapterRecipe("own-head-qv-r5", targets=("query", "value"), rank=5, gain=0.8, own_head=True),
    AdapterRecipe("adapted-head-r16", targets=("query", "value", "classifier"), rank=16),
    AdapterRecipe("base-head-r64", ("query", "key", "value", "dense"), rank=MAX_RANK, alpha=32),
)
"""The same of a BERT that tells the classes of tokens."""

LANGUAGE_RECIPES = (
    AdapterRecipe("language-all-r8", within="language_model"),
    AdapterRecipe(
        "language-qv-r5", ("q_proj", "v_proj"), rank=5, gain=0.8, within="language_model"
    ),
)
"""Adapters of the language model of a model that sees."""

LLAVA_RECIPES = (
    *LANGUAGE_RECIPES,
    AdapterRecipe("tower-r16", ("q_proj", "v_proj", "out_proj", "fc1"), 16, within="vision_tower"),
    AdapterRecipe("connector-r8", ("linear_1", "linear_2"), within="multi_modal_projector"),
    AdapterRecipe("both-r12", ("q_proj", "v_proj", "fc2", "linear_1"), rank=12),
)
"""The same, and adapters of a LLaVA's tower, of its connector, and of all parts."""

QWEN2_VL_RECIPES = (
    AdapterRecipe("tower-r16", ("qkv", "proj", "fc1"), rank=16, within="visual.blocks"),
    AdapterRecipe("connector-r8", ("0", "2"), within="visual.merger"),
    AdapterRecipe("both-r12", ("q_proj", "v_proj", "qkv", "fc2"), rank=12),
)
"""Adapters of a Qwen2-VL's tower, of its connector, and of all parts."""

IDEFICS3_RECIPES = tuple(replace(recipe, within="text_model") for recipe in LANGUAGE_RECIPES)
"""Adapters of the language model of an Idefics3."""

SPEECH_RECIPES = (
    AdapterRecipe("decoder-r8", (*_ATTENTION[:3], "fc1"), within="decoder"),
    AdapterRecipe("encoder-r16", ("q_proj", "v_proj", "out_proj", "fc2"), 16, within="encoder"),
    AdapterRecipe("both-r5", ("q_proj", "v_proj"), rank=5, gain=0.8),
)
"""Adapters of a decoder, of an encoder, and, as usual with Whisper, of both."""

FLEET_RECIPES = tuple(
    AdapterRecipe(f"customer-{number}", rank=rank, alpha=2 * rank)
    for number, rank in zip(range(40), (8, 16, 24, 32, 64) * 8, strict=True)
)
"""Customers in numbers: more than any tier of a test server holds."""
