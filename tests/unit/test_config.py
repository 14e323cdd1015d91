"""Settings: defaults, and one clear sentence for everything wrong."""

import re
from types import SimpleNamespace
from typing import Any

import pytest

from vllm_multilora.config import MultiLoRAConfig
from vllm_multilora.errors import ConfigError
from vllm_multilora.integration.settings.cache_settings import UNLIMITED, cpu_budget
from vllm_multilora.slots.budget import GIB, CpuBudget


@pytest.mark.parametrize("additional", [None, {}, {"other": 1}, {"multilora": {}}], ids=str)
def test_without_settings_the_defaults_hold(additional):
    assert MultiLoRAConfig.from_additional_config(additional) == MultiLoRAConfig(None, "auto")


def test_settings_are_taken_over():
    config = MultiLoRAConfig.from_additional_config(
        {"multilora": {"enabled": False, "backend": "triton", "batch_invariant": True}}
    )
    assert config == MultiLoRAConfig(enabled=False, backend="triton", batch_invariant=True)


@pytest.mark.parametrize("backend", ["auto", "native", "triton"])
def test_batch_invariance_goes_with_backends_that_have_it(backend):
    assert MultiLoRAConfig(backend=backend, batch_invariant=True).batch_invariant


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"bakend": "torch"}, r"unknown setting 'bakend' .*did you mean 'backend'\?"),
        ({"zzz": 1}, r"unknown setting 'zzz' in multilora \(known: enabled, backend, .*\)"),
        ({"backend": "cuda"}, "--multilora-backend .* must be one of auto, native, .* got 'cuda'"),
        ({"backend": None}, "--multilora-backend .* must be one of .* got None"),
        (
            {"kernels": "torch"},
            "--multilora-kernels .* must be one of auto, ours, vllm, got 'torch'",
        ),
        ({"enabled": "yes"}, "--multilora .* must be true, false or null, got 'yes'"),
        ({"batch_invariant": 1}, "--multilora-batch-invariant .* must be true or false, got 1"),
        ({"batch_invariant": True, "backend": "torch"}, "-backend torch: plain PyTorch's sums"),
        ({"batch_invariant": True, "backend": "vllm"}, "-backend vllm: .* VLLM_BATCH_INVARIANT=1"),
        ({"routes": 7}, "--multilora-routes .* must be the path of a file, got 7"),
        ({"signing_keys": ""}, "--multilora-signing-keys .* must be the path of a file, got ''"),
        (
            {"signing_keys": "keys.pem", "allow_pickle": True},
            "--multilora-signing-keys and --multilora-allow-pickle cannot be used together",
        ),
        ({"fair_shares": "yes"}, "--multilora-fair-shares .* must be true or false, got 'yes'"),
        ({"max_blends": -1}, "--multilora-max-blends .* must be a whole .* got -1"),
        ({"fair_slowdown": 1}, "--multilora-fair-slowdown .* must be a number above 1 .* got 1"),
        ({"cpu_cache_gib": 0}, "--multilora-cpu-cache-gib .* must be a number above 0 .* got 0"),
        ({"cpu_cache_gib": 1e300}, "--multilora-cpu-cache-gib .* must be .* at most 1e9, got 1e"),
        ({"usage_log_mib": 1e305}, "--multilora-usage-log-mib .* must be .* at most 1e9, got 1e"),
        ("torch", r'additional_config\["multilora"\] must be a mapping .* got \'torch\''),
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_wrong_setting_is_one_clear_sentence(settings, message):
    with pytest.raises(ConfigError, match=message):
        MultiLoRAConfig.from_additional_config({"multilora": settings})


@pytest.mark.parametrize("bytes_each", [1_500_000, 2**30, 5 * 2**30 + 7, 70 * 2**30 + 10**6])
def test_a_budget_too_small_for_the_slots_is_refused_with_one_that_is_not(bytes_each: int) -> None:
    lora = SimpleNamespace(max_loras=2, max_cpu_loras=UNLIMITED, max_lora_rank=64)
    vllm_config: Any = SimpleNamespace(lora_config=lora)

    def budget(gib: float) -> CpuBudget:
        settings = MultiLoRAConfig(cpu_cache_gib=gib)
        return cpu_budget(settings, vllm_config, largest_adapter=bytes_each)

    with pytest.raises(ConfigError) as caught:
        budget(2 * bytes_each / GIB - 1e-6)
    (reported,) = re.findall(r"may take ([\d.]+) GiB", str(caught.value))
    assert 2 * bytes_each <= (budget(float(reported)).bytes or 0) < 2 * bytes_each + GIB / 100
