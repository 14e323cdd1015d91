"""Settings: defaults, and one clear sentence for everything wrong."""

import pytest

from vllm_multilora.config import MultiLoRAConfig
from vllm_multilora.errors import ConfigError


@pytest.mark.parametrize("additional", [None, {}, {"other": 1}, {"multilora": {}}], ids=str)
def test_without_settings_the_defaults_hold(additional):
    assert MultiLoRAConfig.from_additional_config(additional) == MultiLoRAConfig(None, "auto")


def test_settings_are_taken_over():
    config = MultiLoRAConfig.from_additional_config(
        {"multilora": {"enabled": False, "backend": "torch"}}
    )
    assert config == MultiLoRAConfig(enabled=False, backend="torch")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"bakend": "torch"}, r"unknown setting 'bakend' .*did you mean 'backend'\?"),
        ({"zzz": 1}, r"unknown setting 'zzz' in multilora \(known: enabled, backend\)"),
        ({"backend": "cuda"}, "multilora.backend must be one of auto, native, .* got 'cuda'"),
        ({"backend": None}, "multilora.backend must be one of .* got None"),
        ({"enabled": "yes"}, "multilora.enabled must be true, false or null, got 'yes'"),
        ("torch", r'additional_config\["multilora"\] must be a mapping .* got \'torch\''),
    ],
    ids=["typo", "unknown", "backend", "null-backend", "enabled", "no-mapping"],
)
def test_a_wrong_setting_is_one_clear_sentence(settings, message):
    with pytest.raises(ConfigError, match=message):
        MultiLoRAConfig.from_additional_config({"multilora": settings})
