"""`vllm-multilora plan --traffic` end to end: text, JSON, what is outside, and every bad input."""

import json

import msgspec
import pytest

from vllm_multilora import __version__, cli
from vllm_multilora.slots.budget import MIB
from vllm_multilora.toolbox.capacity.calibration import write_calibration

from .calibrations import calibration

HEADER = "time,adapter,prompt_tokens,generation_tokens"
TWO = f"{HEADER}\n10,a,10,3\n20,base,10,1\n"
"""At 10 s one for an adapter of 2 MiB (4.7 s to the first token), at 20 s one for none (1.7 s)."""


@pytest.fixture
def plan(tmp_path, capsys):
    def plan(*flags, trace=TWO, measured=None, name="trace.csv"):
        (tmp_path / name).write_text(trace)
        file = tmp_path / "calibration.json"
        if isinstance(measured, str):
            file.write_text(measured)
        else:
            write_calibration(measured or calibration(), file)
        words = ["--traffic", tmp_path / name, "--calibration", file, *flags]
        status = cli.main(["plan", *map(str, words)])
        return status, *capsys.readouterr()

    return plan


def test_a_trace_is_forecast_as_computed_by_hand(plan):
    status, out, err = plan("--json")
    assert (status, err) == (0, "")
    report = json.loads(out)
    found = report["forecast"]
    assert found["requests"] == 2
    assert found["seconds"] == pytest.approx(10 + 1.7)
    assert found["generated_per_s"] == pytest.approx(4 / 11.7)
    assert found["prompt_per_s"] == pytest.approx(20 / 11.7)
    assert found["busy"] == pytest.approx((1.2 + 1.1 + 1.1 + 1.2) / 11.7)
    assert found["first_token_p50"] == pytest.approx(4.7)
    assert found["first_token_p99"] == pytest.approx(4.7)
    assert found["next_token_p50"] == found["next_token_p99"] == pytest.approx(1.1)
    assert (found["gpu_hit_rate"], found["cpu_hit_rate"]) == (0, 0)
    assert (found["loads"], found["activations"]) == (1, 1)
    assert found["outside"] == []
    assert report["server"] == {
        "max_loras": 2,
        "max_cpu_loras": None,
        "cpu_cache_bytes": None,
        "max_num_seqs": 4,
        "max_num_batched_tokens": 64,
        "policy": "lru",
    }
    assert report["calibration"]["versions"]["vllm-multilora"] == __version__
    assert plan("--json")[1] == out


def test_the_text_says_the_same(plan):
    status, out, _ = plan()
    assert status == 0
    assert "2 requests in 11.7 s; 2 slots, host memory: no limit, lru; batches of 4 requests" in out
    assert "0.3 generated tokens/s, 1.7 tokens/s of prompts; the engine computes 39%" in out
    assert "first token, ms     4,700.0  4,700.0" in out
    assert "; 1 load, 1 copy into slots" in out
    assert "calibrated 2026-11-27T00:00:00+00:00 on abacus; steps are fitted to 1.0%" in out


def test_settings_may_be_others_than_the_calibrated_ones(plan):
    flags = ("--max-loras", 1, "--max-num-seqs", 1, "--max-num-batched-tokens", 8)
    _, out, _ = plan(*flags, "--max-cpu-loras", 3, "--policy", "gdsf", "--json")
    assert json.loads(out)["server"] == {
        "max_loras": 1,
        "max_cpu_loras": 3,
        "cpu_cache_bytes": None,
        "max_num_seqs": 1,
        "max_num_batched_tokens": 8,
        "policy": "gdsf",
    }


def test_sizes_come_from_the_trace_or_a_directory_before_the_calibration(plan, tmp_path):
    """4 MiB are read in 3 s and copied in 1.5: 6.2 s to the first token."""
    (tmp_path / "adapters" / "new").mkdir(parents=True)
    weights = tmp_path / "adapters" / "new" / "adapter_model.safetensors"
    weights.write_bytes(bytes(4 * MIB))
    for trace, flags in (
        (f"{HEADER},bytes\n0,a,10,1,{4 * MIB}\n", ()),
        (f"{HEADER}\n0,new,10,1\n", ("--adapters", tmp_path / "adapters")),
    ):
        _, out, _ = plan(*flags, "--json", trace=trace)
        assert json.loads(out)["forecast"]["first_token_p50"] == pytest.approx(6.2)


@pytest.mark.parametrize(
    ("trace", "flags", "said"),
    [
        (f"{HEADER}\n0,base,100,1\n", ("--max-num-batched-tokens", 128), "100 tokens of prompts"),
        (
            f"{HEADER}\n" + "0,base,1,2\n" * 6,
            ("--max-num-seqs", 6),
            "6 requests in a step, calibrated up to 4",
        ),
        (f"{HEADER}\n" + "0,base,110,9\n" * 4, (), "tokens of contexts in a step"),
        (f"{HEADER},bytes\n0,a,1,1,{5 * MIB}\n", (), "5 MiB of an adapter to load, calibrated up"),
        (f"{HEADER}\n" + "0,base,100,28\n" * 6, ("--max-num-seqs", 6), "tokens in the KV cache"),
    ],
)
def test_what_was_not_calibrated_is_said(plan, trace, flags, said):
    status, out, err = plan(*flags, "--json", trace=trace)
    assert status == 0
    assert f"outside the calibration: {said}" in err or said in err
    assert any(said in each for each in json.loads(out)["forecast"]["outside"])


@pytest.mark.parametrize(
    ("trace", "said"),
    [
        ("time,adapter\n0,a\n", "the header lacks prompt_tokens and generation_tokens"),
        (f"{HEADER}\n", "contains no requests"),
        (
            f"{HEADER}\n1,a,5,5\n0.5,a,5,5\n",
            "line 3: time 0.5 is before 1, the time of the request",
        ),
        (f"{HEADER}\n0,a,5,5\n1e13,a,5,5\n", "line 3: time 1e+13 is more than 2^32 seconds"),
        (f"{HEADER}\nsoon,a,5,5\n", "line 2: time must be a finite number, got 'soon'"),
        (f"{HEADER}\n0,a,0,5\n", "line 2: prompt_tokens must be a positive integer, got '0'"),
        (f"{HEADER}\n0,a,5,many\n", "generation_tokens must be a positive integer, got 'many'"),
        (f"{HEADER}\n0,a,5\n", "generation_tokens must be a positive integer, got None"),
        (f"{HEADER}\n0,acme,5,5\n", "adapter 'acme' is unknown: the calibration has a, b, and the"),
        (f"{HEADER}\n0,a,120,9\n", "0 s has 120 + 9 tokens, but the calibrated server accepts"),
    ],
)
def test_a_bad_trace_is_one_sentence(plan, trace, said):
    status, out, err = plan(trace=trace)
    assert (status, out) == (2, "")
    assert err.startswith("vllm-multilora plan: error: ")
    assert said in err


def test_a_trace_may_be_json_lines(plan):
    line = {"time": 0, "adapter": "base", "prompt_tokens": 10, "generation_tokens": 1}
    status, out, _ = plan("--json", trace=json.dumps(line), name="trace.jsonl")
    assert status == 0
    assert json.loads(out)["forecast"]["first_token_p50"] == pytest.approx(1.7)
    del line["prompt_tokens"]
    _, _, err = plan(trace=json.dumps(line), name="trace.jsonl")
    assert "line 1: prompt_tokens must be a positive integer, got None" in err


def changed(**attributes):
    """A calibration's JSON with these attributes."""
    return json.dumps(msgspec.to_builtins(calibration()) | attributes)


@pytest.mark.parametrize(
    ("measured", "said"),
    [
        ("{", "calibration.json: Input data was truncated; expected a file that"),
        ('{"format": 3}', "Object missing required field `created`"),
        (changed(surprise=1), "contains unknown field `surprise`"),
        (changed(format=7), "has format 7; expected a file that `vllm-multilora calibrate`"),
        (changed(step_s={"step": 1.0}), "step_s has step; expected"),
        (changed(request_s=-1.0), "Expected `float` >= 0.0 - at `$.request_s`; expected a file"),
        (changed(adapters={"a": 0}), "Expected `int` >= 1 - at `$.adapters[...]`"),
        (
            changed(step_s=dict.fromkeys(calibration().step_s, 0.0)),
            "a step takes no time",
        ),
        (
            changed(versions={"vllm-multilora": "0.0.1"}),
            f"was measured with vllm-multilora 0.0.1, but {__version__} is installed; calibrate",
        ),
        (changed(loads=None), "the calibration has no times of loads: calibrate a server that"),
    ],
)
def test_a_calibration_that_does_not_fit_is_refused(plan, measured, said):
    status, out, err = plan(measured=measured)
    assert (status, out) == (2, "")
    assert said in err


def test_another_vllm_is_refused_and_another_build_of_it_is_not(plan, monkeypatch):
    here = {"vllm": "0.32.0+cpu", "vllm-multilora": __version__}
    monkeypatch.setattr("vllm_multilora.toolbox.capacity.calibration.versions_here", lambda: here)
    assert plan(measured=changed(versions=here | {"vllm": "0.32.0"}))[0] == 0
    _, _, err = plan(measured=changed(versions=here | {"vllm": "0.31.0"}))
    assert "was measured with vllm 0.31.0, but 0.32.0+cpu is installed; calibrate a server" in err


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--model", "/models/large"), "was measured with the model base alias /models/tiny, but"),
        (("--max-loras", 0), "slots must be a positive integer, at most 32766, got 0"),
        (("--max-num-seqs", 0), "concurrency must be at least 1, got 0"),
        (("--max-num-batched-tokens", 3), "3 is less than --max-num-seqs 4, which vLLM refuses"),
        (("--max-cpu-loras", 1), "got 1 for 2 slots"),
        (("--cpu-cache-gib", -1), "--cpu-cache-gib must be a positive number of GiB"),
        (("--cpu-cache-gib", 0.001), "adapter 'a' has 2.0 MiB, more than the whole CPU budget"),
        (("--policy", "best"), "unknown cache policy 'best'"),
        (("--adapters", "/no/such/folder"), "--adapters /no/such/folder: No such file"),
    ],
)
def test_wrong_flags_are_one_sentence(plan, flags, said):
    status, out, err = plan(*flags)
    assert (status, out) == (2, "")
    assert said in err


def test_traffic_and_calibration_belong_together(capsys, tmp_path):
    assert cli.main(["plan", "--traffic", "trace.csv"]) == 2
    assert "--traffic needs --calibration, a file that `vllm-multilora" in capsys.readouterr().err
    memory = ["plan", "--model", "m", "--max-loras", "2", "--max-lora-rank", "8"]
    assert cli.main([*memory, "--calibration", "c.json"]) == 2
    assert "--calibration is for --traffic, which is not given" in capsys.readouterr().err
    (tmp_path / "trace.csv").write_text(TWO)
    words = ["--traffic", str(tmp_path / "trace.csv"), "--calibration", str(tmp_path / "none.json")]
    assert cli.main(["plan", *words]) == 2
    assert "none.json: cannot be read: No such file or directory" in capsys.readouterr().err
