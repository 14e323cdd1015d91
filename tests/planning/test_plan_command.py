"""`vllm-multilora plan`: text, JSON and errors, with the base model's costs given."""

import argparse
import json

import pytest

from vllm_multilora.cli import status_of
from vllm_multilora.errors import MultiLoRAError
from vllm_multilora.toolbox.commands.planning import plan_command

from .models import MODEL, TWO_WORKERS
from .test_survey import put

NAME = "vllm-multilora plan"


def command(*argv, model=MODEL):
    parser = argparse.ArgumentParser()
    plan_command.add_arguments(parser)
    arguments = ["--model", "tiny/model", "--max-loras", "4", "--max-lora-rank", "16"]
    parsed = parser.parse_args([*arguments, *map(str, argv)])
    return status_of(lambda given: plan_command.run(given, lambda _: model), parsed, NAME)


@pytest.fixture
def text(capsys):
    def run(*argv, model=MODEL):
        assert command(*argv, model=model) == 0
        return capsys.readouterr().out

    return run


def test_the_total_and_what_it_takes_from_the_kv_cache(text):
    out = text()
    total = MODEL.by_rank[16].total(4)
    assert f"4 slots: {total:,} bytes" in out
    assert f"in KV cache: {total // 64:,} tokens, or {total / 6400:.2f} requests of 100 tok" in out
    for layer in (*MODEL.by_rank[16].layers, *MODEL.by_rank[16].tables):
        assert layer.name.replace(".0.", ".*.").replace(".1.", ".*.") in out


def test_what_a_gpu_has_left(text):
    out = text("--gpu-memory", "4", "--gpu-memory-utilization", "0.75")
    left = 2 * 2**30 - MODEL.by_rank[16].total(4)
    assert f"at most {left // 64:,} tokens" in out
    assert f"without LoRA: at most {2**31 // 64:,} tokens" in out


@pytest.mark.parametrize(
    ("gib", "advice"),
    [
        ("2.000001", "that is more than there is: lower --max-loras or --max-lora-rank"),
        ("1", "the weights alone are more than there is: raise --tensor-parallel-size"),
    ],
)
def test_what_does_not_fit_is_no_success(gib, advice, capsys):
    assert command("--gpu-memory", gib) == 1
    assert advice in capsys.readouterr().out


def test_advice(text, tmp_path):
    for name, rank in (("acme", 8), ("globex", 8), ("legal", 50)):
        put(tmp_path, name, rank)
    put(tmp_path, "broken", 8, r="eight")
    out = text("--adapters", tmp_path)
    assert "adapters: 3 that the base model accepts" in out
    assert "- broken cannot be served: " in out
    assert "- rank 8: 2 of 3 fit" in out
    assert "--max-lora-rank 16 is too small for legal: --max-lora-rank 64 serves all" in out
    assert "- legal alone needs rank 64, which costs " in out
    assert "- no adapter touches v_proj, lm_head: --lora-target-modules q_proj down_proj" in out
    assert "- 4 slots for 3 adapters: 1 would stay empty" in out
    assert "merged" not in out


def test_a_rank_that_nobody_needs(text, tmp_path):
    put(tmp_path, "acme", 8)
    put(tmp_path, "globex", 8)
    saved = MODEL.by_rank[16].total(4) - MODEL.by_rank[8].total(4)
    out = text("--adapters", tmp_path)
    assert f"--max-lora-rank 8 serves all and saves {saved / 1024:.1f} KiB" in out
    assert "alone need" not in out


def test_one_adapter_is_better_merged(text, tmp_path):
    assert "merged into the base model" in text("--adapters", put(tmp_path, "acme", 8))


def test_json_is_the_only_thing_printed_and_adds_up(text, tmp_path):
    put(tmp_path, "acme", 8)
    put(tmp_path, "broken", 8, r="eight")
    found = json.loads(text("--json", "--adapters", tmp_path, model=TWO_WORKERS))
    layers = [*found["layers"], *found["plugin_tables"]]
    assert found["slot_bytes"] == sum(layer["slot_bytes"] for layer in layers)
    assert found["total_bytes"] == found["fixed_bytes"] + 4 * found["slot_bytes"]
    assert {"max_loras": 4, "max_lora_rank": 16, "bytes": found["total_bytes"]} in found["totals"]
    [accepted], [refused] = found["adapters"]["accepted"], found["adapters"]["refused"]
    assert accepted["host_bytes_of_all_workers"] > 0
    assert (accepted["name"], refused["name"]) == ("acme", "broken")
    assert refused["problems"][0]["code"] == "config-value"
    assert found["advice"]["max_lora_rank"] == 8


@pytest.mark.parametrize(
    ("name", "gib"),
    [("plan.png", None), ("plan.svg", 0.5), ("plan.png", 80)],
    ids=["no GPU", "too small", "large"],
)
def test_the_plot_is_what_its_name_says_and_leaves_the_report_as_it_is(name, gib, capsys, tmp_path):
    pytest.importorskip("matplotlib", reason="the plot extra is not installed")
    gpu = () if gib is None else ("--gpu-memory", gib)
    status, alone = command(*gpu), capsys.readouterr().out
    drawn = []
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        path = tmp_path / folder / name
        assert command(*gpu, "--plot", path) == status
        assert capsys.readouterr() == (alone, f"wrote {path}\n")
        drawn.append(path.read_bytes())
    assert drawn[0] == drawn[1]
    assert (b"<svg" in drawn[0]) == (name == "plan.svg")
    assert drawn[0].startswith(b"\x89PNG") == (name == "plan.png")


@pytest.mark.parametrize(
    ("name", "found"), [("plan.pdf", "ends in '.pdf'"), ("plan", "has no ending")]
)
def test_a_plot_of_another_kind_is_refused_before_anything_is_computed(
    name, found, capsys, tmp_path
):
    pytest.importorskip("matplotlib", reason="the plot extra is not installed")
    assert command("--plot", tmp_path / name, model=None) == 2
    assert f"{name}: the plot cannot be written: its name {found}, expected one of .png, .svg" in (
        capsys.readouterr().err
    )


def test_a_base_model_whose_costs_cannot_be_found_out(capsys):
    def costs_of(_):
        raise MultiLoRAError("no such model")

    parser = argparse.ArgumentParser()
    plan_command.add_arguments(parser)
    arguments = parser.parse_args(["--model", "m", "--max-loras", "1", "--max-lora-rank", "8"])
    assert status_of(lambda given: plan_command.run(given, costs_of), arguments, NAME) == 2
    assert capsys.readouterr().err == "vllm-multilora plan: error: no such model\n"
