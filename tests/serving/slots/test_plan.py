"""What `plan` says of a config.json is, to the byte, what vLLM then allocates."""

import json
import multiprocessing
import shlex
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from uuid import uuid4

import pytest

from .. import template
from ..allocated_slots import (
    CONFIGS,
    Setting,
    allocate,
    allocate_as_one_of,
    real_manager,
    write_configs,
)

pytestmark = [pytest.mark.serving, pytest.mark.slow]

ALONE = (
    Setting(1, 16),
    Setting(3, 64, lora_dtype="float16"),
    Setting(4, 8, fully_sharded_loras=True),
    Setting(2, 32, lora_target_modules=("qkv_proj", "down_proj")),
    Setting(3, 16, dora=True),
)
SHARED = (
    Setting(2, 16, tensor_parallel_size=2),
    Setting(2, 16, tensor_parallel_size=2, dora=True),
    Setting(3, 32, tensor_parallel_size=2, fully_sharded_loras=True),
)
WORKER_TIMEOUT_S = 180


def pairs(settings: tuple[Setting, ...]) -> list[tuple[str, Setting]]:
    """Models with settings: plain layers and experts with all, others where theirs differ."""
    return [
        (name, setting)
        for name in CONFIGS
        for setting in settings
        if name in ("llama", "mixtral") or setting == settings[0] or setting.fully_sharded_loras
    ]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("configs")
    write_configs(folder)
    return folder


@pytest.fixture(scope="module")
def allocated_by_two(folder, tmp_path_factory):
    """What the first of two real workers allocates, for every model and setting."""
    cases = {f"{m} {s}": (folder / m, s) for m, s in pairs(SHARED)}
    meeting = tmp_path_factory.mktemp("meeting") / uuid4().hex
    context = multiprocessing.get_context("spawn")
    try:
        with (
            template.forked_processes(),
            ProcessPoolExecutor(2, mp_context=context) as workers,
        ):
            first, second = (
                workers.submit(allocate_as_one_of, 2, rank, meeting, cases) for rank in range(2)
            )
            second.result(WORKER_TIMEOUT_S)
            return first.result(WORKER_TIMEOUT_S)
    finally:
        for left in Path("/dev/shm").glob(f"{meeting.name}-*"):
            left.unlink()


def costs(folder, setting):
    from vllm_multilora.integration.offline.costs import offline_costs
    from vllm_multilora.integration.offline.model_without_weights import ServerFlags

    return offline_costs(ServerFlags(str(folder), **vars(setting)))


def check(model, setting, allocated):
    memory = model.by_rank[setting.max_lora_rank]
    slots = setting.max_loras
    of_vllm = sum(layer.fixed_bytes + slots * layer.slot_bytes for layer in memory.layers)
    assert of_vllm == allocated.lora
    assert memory.total(slots) == allocated.all
    assert memory.largest_adapter == allocated.largest_adapter
    assert model.weight_bytes == allocated.parameters


@pytest.mark.parametrize(("name", "setting"), pairs(ALONE), ids=str)
def test_one_worker(folder, name, setting):
    from vllm_multilora.integration.offline.model_without_weights import one_worker
    from vllm_multilora.integration.patching.tables.ledger import apply_patches

    apply_patches()
    planned = costs(folder / name, setting)
    check(planned, setting, allocate(folder / name, setting, one_worker))


@pytest.mark.parametrize(("name", "setting"), pairs(SHARED), ids=str)
def test_two_workers(folder, allocated_by_two, name, setting):
    check(costs(folder / name, setting), setting, allocated_by_two[f"{name} {setting}"])


def test_a_server_says_it_when_it_starts(folder, caplog, monkeypatch):
    from vllm.config import get_current_vllm_config

    from vllm_multilora.integration.offline.model_without_weights import one_worker
    from vllm_multilora.integration.patching.tables.ledger import apply_patches
    from vllm_multilora.integration.worker.slots import slot_buffers
    from vllm_multilora.slots.budget import CpuBudget, readable

    apply_patches()
    setting = Setting(3, 16)
    with real_manager(folder / "llama", setting, one_worker) as manager:
        config = get_current_vllm_config()
        # vLLM's loggers do not always pass on to pytest's.
        monkeypatch.setattr(slot_buffers.logger, "handlers", [caplog.handler])
        monkeypatch.setattr(slot_buffers.logger, "propagate", False)
        caplog.set_level("INFO", logger=slot_buffers.__name__)
        slot_buffers.report_slots(manager, CpuBudget(bytes=2**30), config)
        config.parallel_config.rank = 1  # another worker says nothing
        slot_buffers.report_slots(manager, CpuBudget(bytes=2**30), config)
    [line] = [r.getMessage() for r in caplog.records if r.name == slot_buffers.__name__]
    total = costs(folder / "llama", setting).by_rank[16].total(3)
    assert f"3 of rank 16 in bfloat16 take {readable(total)}" in line
    assert "Adapters in host memory: up to 1.00 GiB." in line


@pytest.fixture(scope="module")
def uneven(folder):
    """Layers with sliding windows and layers without, of which one group is not full."""
    path = folder / "gemma3"
    path.mkdir()
    config = json.loads((folder / "llama" / "config.json").read_text())
    config |= {"architectures": ["Gemma3ForCausalLM"], "model_type": "gemma3_text"}
    config |= {"num_hidden_layers": 7, "sliding_window": 64, "query_pre_attn_scalar": 32}
    config["layer_types"] = ["full_attention"] * 2 + ["sliding_attention"] * 5
    (path / "config.json").write_text(json.dumps(config))
    return path


@pytest.mark.parametrize("length", [256, 200])  # with blocks of 128 tokens
@pytest.mark.parametrize("name", ["llama", "mixtral", "gemma3"])
def test_the_kv_cache_is_counted_as_vllm_counts_it(folder, uneven, name, length):
    from vllm.v1.core.kv_cache_utils import (
        get_kv_cache_capacity,
        get_kv_cache_config_from_groups,
        get_kv_cache_groups,
    )

    from vllm_multilora.integration.offline.costs import offline_costs
    from vllm_multilora.integration.offline.model_without_weights import (
        ServerFlags,
        offline_manager,
    )

    config = ServerFlags(str(folder / name), max_model_len=length).vllm_config()
    config.cache_config.kv_cache_layout = "LBNHC"  # what the engine core settles, if anything
    with offline_manager(config):
        layers = config.compilation_config.static_forward_context
        specs = {
            name: layer.get_kv_cache_spec(config)
            for name, layer in layers.items()
            if hasattr(layer, "get_kv_cache_spec")
        }
        groups = get_kv_cache_groups(config, specs)
        tokens, requests = get_kv_cache_capacity(
            config, get_kv_cache_config_from_groups(config, groups, 2**26)
        )
    cache = offline_costs(ServerFlags(str(folder / name), max_model_len=length)).kv_cache
    assert cache.tokens(2**26) == tokens
    assert cache.requests(2**26) == requests


LLAMA_3_1_8B = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "intermediate_size": 14336,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
    "torch_dtype": "bfloat16",
    "rope_theta": 500000.0,
}
PROJECTIONS = ("qkv_proj", "o_proj", "gate_up_proj", "down_proj")


@pytest.fixture(scope="module")
def llama_8b(tmp_path_factory):
    path = tmp_path_factory.mktemp("llama-8b") / "config.json"
    path.write_text(json.dumps(LLAMA_3_1_8B))
    return path


def test_llama_3_1_8b(llama_8b):
    """By hand: a rank takes the widths of a module's inputs and outputs, in 2 bytes each."""
    model = costs(llama_8b, Setting(1, 16))
    hidden, heads, kv, inner, vocabulary = 4096, 4096, 1024, 14336, 128256
    layer = {
        "qkv_proj": (hidden + heads) + 2 * (hidden + kv),
        "o_proj": heads + hidden,
        "gate_up_proj": 2 * (hidden + inner),
        "down_proj": inner + hidden,
    }
    for rank in (8, 16, 64, 512):
        memory = model.by_rank[rank]
        groups = {name.rpartition(".")[2]: size for name, _, size in memory.groups()}
        for name, widths in layer.items():
            assert groups[name] == 32 * widths * rank * 2
        assert groups["embed_tokens"] == groups["lm_head"] == (vocabulary + hidden) * rank * 2
    projections = sum(
        part.slot_bytes for part in model.by_rank[16].layers if part.suffix in PROJECTIONS
    )
    assert projections == 83_886_080
    assert sum(part.slot_bytes for part in model.by_rank[16].layers) == 92_356_608
    assert model.kv_cache.token_bytes == 2 * 8 * 128 * 2 * 32  # K and V, heads, size, bytes, layers
    assert model.weight_bytes >= 8_030_261_248 * 2


def test_the_page_shows_what_the_command_prints(llama_8b, capsys):
    from vllm_multilora.cli import main

    page = (Path(__file__).parents[3] / "docs" / "planning.md").read_text()
    _, _, block = page.partition("```\n$ vllm-multilora ")
    command, _, shown = block.partition("```")[0].replace("\\\n", "").partition("\n")
    arguments = shlex.split(command.replace("Llama-3.1-8B/config.json", str(llama_8b)))
    assert main(arguments) == 0
    assert capsys.readouterr().out == shown


@pytest.mark.parametrize(
    ("model", "more", "message"),
    [
        ("nothing-here", (), "there is no such folder"),
        ("", (), "local directory that contains a recognized configuration file"),
        ("mamba", (), "vLLM does not support LoRA for MambaForCausalLM"),
        ("llama", ("--max-lora-rank", "17"), "max_lora_rank is 17, but vLLM accepts only 1, 8, 16"),
        ("llama", ("--tensor-parallel-size", "3"), "must be divisible by tensor parallel size"),
        (
            "llama",
            ("--tensor-parallel-size", "4", "--fully-sharded", "--max-lora-rank", "1"),
            "cannot share between 4 workers",
        ),
    ],
)
def test_what_cannot_be_planned(folder, capsys, model, more, message):
    from vllm_multilora.cli import main

    (folder / "mamba").mkdir(exist_ok=True)
    mamba = {"architectures": ["MambaForCausalLM"], "model_type": "mamba", "hidden_size": 64}
    (folder / "mamba" / "config.json").write_text(
        json.dumps(mamba | {"num_hidden_layers": 1, "vocab_size": 300, "state_size": 8})
    )
    basic = ["--model", str(folder / model), "--max-loras", "2", "--max-lora-rank", "16"]
    assert main(["plan", *basic, *more]) == 2
    assert message in capsys.readouterr().err.splitlines()[0]
