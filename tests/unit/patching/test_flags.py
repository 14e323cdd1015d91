"""The flags of `vllm serve`: settings of the engine, and of every API server."""

import argparse
import inspect
import json
import pickle
from types import SimpleNamespace

import pytest

pytest.importorskip("vllm")
from vllm.utils.argparse_utils import FlexibleArgumentParser

from vllm_multilora.errors import ConfigError
from vllm_multilora.integration import flag_values
from vllm_multilora.integration.api_server import engine_settings
from vllm_multilora.integration.patching import decision
from vllm_multilora.integration.patching.patch import Patch
from vllm_multilora.integration.settings.flags import (
    add_cli_args,
    add_flags,
    from_cli_args,
    merge_flags,
)
from vllm_multilora.slots.policies.policy import PolicyError
from vllm_multilora.store.protocol.store_folder import StoreUnavailableError


def parse(*argv, additional_config=None):
    parser = argparse.ArgumentParser()
    add_flags(parser)
    args = parser.parse_args(argv)
    args.additional_config = additional_config
    return args, SimpleNamespace(additional_config=additional_config)


def without(monkeypatch, name):
    """Has this vLLM lack what a patch needs."""
    apply = Patch.apply
    monkeypatch.setattr(Patch, "apply", lambda self: self.name != name and apply(self))


def test_flags_that_are_not_given_leave_no_trace():
    args, engine_args = parse()
    merge_flags(args, engine_args)
    assert engine_args.additional_config is None
    assert args.additional_config is None


def test_flags_win_over_the_additional_config_and_leave_the_rest_of_it():
    given = {"other": 1, "multilora": {"backend": "torch", "loader_threads": 3}}
    args, engine_args = parse("--multilora-backend", "native", additional_config=given)
    merge_flags(args, engine_args)
    assert engine_args.additional_config == {
        "other": 1,
        "multilora": {"backend": "native", "loader_threads": 3},
    }
    assert given["multilora"]["backend"] == "torch"


def test_every_api_server_gets_the_flags():
    """One of several is sent the arguments, and makes its engine's before the flags are known."""
    args, engine_args = parse("--multilora-routes", "routes.yaml")
    merge_flags(args, engine_args)
    sent = pickle.loads(pickle.dumps(args))
    assert sent.additional_config == {"multilora": {"routes": "routes.yaml"}}


@pytest.mark.parametrize("settings", [None, ["dora"], "dora"])
def test_flags_beside_settings_that_are_no_mapping_are_one_clear_sentence(settings):
    args, engine_args = parse("--multilora-quarantine", additional_config={"multilora": settings})
    with pytest.raises(ConfigError, match="must be a mapping of settings"):
        merge_flags(args, engine_args)


def test_a_platforms_own_additional_configuration_is_left_alone():
    own = SimpleNamespace()
    args, engine_args = parse(additional_config=own)
    merge_flags(args, engine_args)
    assert engine_args.additional_config is own


def test_a_configuration_file_sets_what_the_docs_say_it_can(tmp_path):
    """vLLM passes over a key that is false: it has no flag, and its `no-` flag one of its own."""

    parser = FlexibleArgumentParser()
    serve = parser.add_subparsers(dest="subparser").add_parser("serve")
    serve.add_argument("model_tag")
    serve.add_argument("--additional-config", type=json.loads)
    add_flags(serve)

    def settings(text):
        file = tmp_path / "config.yaml"
        file.write_text(text)
        args = parser.parse_args(["serve", "MODEL", "--config", str(file)])
        engine_args = SimpleNamespace(additional_config=args.additional_config)
        merge_flags(args, engine_args)
        return (engine_args.additional_config or {}).get("multilora", {})

    assert settings("multilora-dora: true") == {"dora": True}
    assert settings("no-multilora-quarantine: true") == {"quarantine": False}
    assert settings("multilora-quarantine: false") == {}
    by_key = "additional-config: {multilora: {pin: [a, b], quarantine: false}}"
    assert settings(by_key) == {"pin": ["a", "b"], "quarantine": False}


@pytest.mark.parametrize("lacking", ["flag-values", "settings-check"])
def test_a_vllm_that_would_not_read_the_flags_refuses_them(monkeypatch, lacking):
    without(monkeypatch, lacking)
    parser = add_cli_args(lambda parser: parser, argparse.ArgumentParser())
    with pytest.raises(SystemExit):
        parser.parse_args(["--multilora-tenants", "file"])


def test_settings_that_nobody_would_check_are_refused(monkeypatch):
    without(monkeypatch, "settings-check")
    args = SimpleNamespace()

    def made(additional_config):
        return lambda cls, args: SimpleNamespace(additional_config=additional_config)

    for additional in (None, {}, {"other": 1}, {"multilora": {}}):
        from_cli_args(made(additional), SimpleNamespace, args)
    with pytest.raises(ConfigError, match="cannot be checked with this vLLM"):
        from_cli_args(made({"multilora": {"tenants": "file"}}), SimpleNamespace, args)


def test_keys_are_refused_where_vllm_lacks_what_the_gateway_needs(monkeypatch):
    def made(cls, args):
        return SimpleNamespace(additional_config={"multilora": {"tenants": "file"}})

    flag_values.from_cli_args(made, SimpleNamespace, SimpleNamespace())
    monkeypatch.setattr(decision, "installed_version", lambda: "0.28.0")
    with pytest.raises(ConfigError, match="protect nothing here"):
        flag_values.from_cli_args(made, SimpleNamespace, SimpleNamespace())


@pytest.mark.parametrize("flag", ["--multilora-tenants", "--multilora-admin-key-file"])
def test_keys_are_refused_where_a_server_is_started_that_knows_none(flag):
    args, engine_args = parse(flag, "file")
    merge_flags(args, engine_args)
    args.host, args.lora_modules, args.grpc = None, None, False  # as of `vllm serve`
    merge_flags(args, engine_args)
    args.grpc = True
    with pytest.raises(ConfigError, match="gRPC"):
        merge_flags(args, engine_args)
    del args.lora_modules, args.grpc  # as of vLLM's module of the gRPC server
    with pytest.raises(ConfigError, match="gRPC"):
        merge_flags(args, engine_args)


@pytest.fixture
def configure(tmp_path, monkeypatch):
    """Makes a server's configuration with settings, as at its start."""
    from vllm.engine.arg_utils import EngineArgs
    from vllm.usage.usage_lib import UsageContext

    from vllm_multilora.integration.engine_config import create_engine_config

    monkeypatch.setenv("PROMETHEUS_MULTIPROC_DIR", str(tmp_path))  # for what it makes
    model = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "vocab_size": 256,
        "max_position_embeddings": 128,
    }
    (tmp_path / "config.json").write_text(json.dumps(model))
    original = inspect.unwrap(EngineArgs.create_engine_config)

    def configure(usage="OPENAI_API_SERVER", *, enable_lora=True, headless=False, **settings):
        additional = {"multilora": settings}
        args = EngineArgs(
            str(tmp_path),
            skip_tokenizer_init=True,
            enable_lora=enable_lora,
            additional_config=additional,
        )
        context = None if usage is None else UsageContext[usage]
        return create_engine_config(original, args, context, headless=headless)

    return configure


@pytest.mark.parametrize("inactive", [{"enabled": False}, {"backend": "vllm"}], ids=str)
@pytest.mark.parametrize("usage", ["OPENAI_API_SERVER", "LLM_CLASS"])
def test_checks_of_adapters_are_refused_where_vllms_own_code_would_load_them(
    configure, inactive, usage
):
    configure(usage, **inactive)
    for check, value in [
        ("signing_keys", "keys.pem"),
        ("require_digest", "digests.json"),
        ("allowed_roots", ["/adapters"]),
    ]:
        flag = f"--multilora-{check.replace('_', '-')}"
        with pytest.raises(ConfigError, match=f"{flag} would check no adapter here"):
            configure(usage, **{check: value}, **inactive)
        configure(usage, enable_lora=False, **{check: value}, **inactive)  # there are no adapters


def test_a_usage_log_that_cannot_be_written_stops_the_start(configure, tmp_path):
    log = tmp_path / "nowhere" / "usage.jsonl"
    with pytest.raises(ConfigError, match="cannot be written to: No such file"):
        configure(usage_log=str(log))
    configure("LLM_CLASS", usage_log=str(log))  # which writes none
    configure(headless=True, usage_log=str(log))  # likewise
    log.parent.mkdir()
    configure(usage_log=str(log))
    assert log.read_text() == ""


def test_a_store_folder_that_cannot_be_used_stops_the_start(configure, tmp_path, monkeypatch):
    tmp_path.chmod(0o755)
    monkeypatch.setenv("MULTILORA_STORE_FOLDER", str(tmp_path))
    with pytest.raises(StoreUnavailableError, match=r"MULTILORA_STORE_FOLDER: .*mode 755"):
        configure()
    configure(None)  # for whoever starts no engine
    configure(store="thread")
    configure(enabled=False)
    tmp_path.chmod(0o700)
    configure()


def test_more_pins_than_slots_stop_the_start(configure):
    with pytest.raises(ConfigError, match="pin 1 adapter, and of 1 slot one must stay free"):
        configure(pin=["acme"])
    with pytest.raises(PolicyError, match="unknown cache policy 'lfru'; did you mean 'lru'"):
        configure(cache_policy="lfru")


def test_roots_that_are_no_folders_are_warned_of(configure, tmp_path, monkeypatch):
    """They may be mounted later."""
    warnings = []
    monkeypatch.setattr(engine_settings.logger, "warning", lambda *args: warnings.append(args[1:]))
    (tmp_path / "file").touch()
    roots = [str(tmp_path / name) for name in (".", "nowhere", "file")]
    configure(allowed_roots=roots)
    assert warnings == [
        (roots[1], "No such file or directory"),
        (roots[2], "Not a directory"),
    ]
