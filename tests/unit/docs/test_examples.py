"""The examples that no test runs: files are read, flags exist, links lead somewhere."""

import argparse
import json
import re
import runpy
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
import yaml

from vllm_multilora.config import MultiLoRAConfig
from vllm_multilora.integration.server.names.preload import names_in
from vllm_multilora.integration.settings.flags import add_flags, merge_flags
from vllm_multilora.metrics.definitions import REQUESTED
from vllm_multilora.routing.routes_file import parse_routes

EXAMPLES = Path(__file__).parents[3] / "examples"
KUSTOMIZATION = EXAMPLES / "kubernetes" / "kustomization.yaml"
MANIFESTS = sorted(set((EXAMPLES / "kubernetes").glob("*.yaml")) - {KUSTOMIZATION})
NOTEBOOK = EXAMPLES / "notebook" / "multilora.ipynb"
CLIENTS = {
    "ab": ["--prompt", "Hello"],
    "continuous_deployment": ["--name", "a", "--path", "/a", "--check", "Hello"],
    "per_customer": ["--prompt", "Hello"],
    "per_language": ["--prompt", "Hello", "--language", "fr"],
    "per_task": ["--prompt", "Hello", "--task", "legal"],
}


def documents(path: Path) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all(path.read_text()))


OBJECTS = [found for path in MANIFESTS for found in documents(path)]


def of_kind(*kinds: str) -> list[dict[str, Any]]:
    return [found for found in OBJECTS if found["kind"] in kinds]


def vllm_pod() -> dict[str, Any]:
    (found,) = (each for each in of_kind("Deployment") if each["metadata"]["name"] == "vllm")
    return found["spec"]["template"]["spec"]


def settings_of(arguments: list[str]) -> MultiLoRAConfig:
    """The plugin's settings in a command line of `vllm serve`.

    Raises:
        SystemExit: A `--multilora` flag does not exist or has a value that it does not take.
    """
    parser = argparse.ArgumentParser(allow_abbrev=False)
    add_flags(parser)
    known, others = parser.parse_known_args(arguments)
    if wrong := [other for other in others if other.startswith("--multilora")]:
        parser.error(f"no such flags: {wrong}")
    engine_args = SimpleNamespace(additional_config={})
    merge_flags(known, engine_args)
    return MultiLoRAConfig.from_additional_config(engine_args.additional_config)


def test_the_manifests_name_each_other_s_objects() -> None:
    names = {(found["kind"], found["metadata"]["name"]) for found in OBJECTS}
    assert len(names) == len(OBJECTS)
    pods = [found["spec"]["template"] for found in of_kind("Deployment")]
    labels = [pod["metadata"]["labels"] for pod in pods]
    for found in of_kind("HorizontalPodAutoscaler"):
        target = found["spec"]["scaleTargetRef"]
        assert (target["kind"], target["name"]) in names
    for found in of_kind("Service", "InferencePool", "Deployment", "PodDisruptionBudget"):
        selector = found["spec"]["selector"]
        selected = selector.get("matchLabels", selector).items()
        assert any(label.items() >= selected for label in labels)
    for found in of_kind("InferencePool"):
        assert ("Service", found["spec"]["endpointPickerRef"]["name"]) in names
    for found in of_kind("HTTPRoute"):
        for rule in found["spec"]["rules"]:
            for backend in rule["backendRefs"]:
                assert (backend["kind"], backend["name"]) in names
    for pod in pods:
        volumes = {volume["name"]: volume for volume in pod["spec"]["volumes"]}
        for volume in volumes.values():
            if "configMap" in volume:
                assert ("ConfigMap", volume["configMap"]["name"]) in names
            if "persistentVolumeClaim" in volume:
                claim = volume["persistentVolumeClaim"]["claimName"]
                assert ("PersistentVolumeClaim", claim) in names
        for container in pod["spec"]["containers"]:
            assert volumes.keys() >= {mount["name"] for mount in container["volumeMounts"]}


def test_what_is_applied_together_is_there() -> None:
    (kustomization,) = documents(KUSTOMIZATION)
    names = {path.name for path in MANIFESTS}
    assert set(kustomization["resources"]) <= names
    mentioned = set(re.findall(r"[a-z]+\.yaml", KUSTOMIZATION.read_text()))
    assert mentioned == names


def test_replicas_are_scaled_by_metrics_that_there_are() -> None:
    (scaler,) = of_kind("HorizontalPodAutoscaler")
    names = {metric["pods"]["metric"]["name"] for metric in scaler["spec"]["metrics"]}
    assert names - {"vllm:num_requests_waiting"} == {REQUESTED.name}


def test_only_inference_is_routed() -> None:
    (route,) = of_kind("HTTPRoute")
    paths = [match["path"]["value"] for rule in route["spec"]["rules"] for match in rule["matches"]]
    for path in ("/v1/load_lora_adapter", "/v1/unload_lora_adapter", "/v1/lora_adapters"):
        assert not any(path.startswith(routed) for routed in paths)
    assert "/v1/chat/completions" in paths


def test_pods_have_no_rights_that_they_do_not_need() -> None:
    pod = vllm_pod()
    (container,) = pod["containers"]
    assert pod["enableServiceLinks"] is False  # else pods have variables such as `VLLM_PORT`
    assert pod["securityContext"]["runAsNonRoot"]
    assert container["securityContext"]["readOnlyRootFilesystem"]
    assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
    flags = dict(flag.split("=") for flag in container["args"] if "=" in flag)
    leaves = container["lifecycle"]["preStop"]["sleep"]["seconds"]
    assert leaves + int(flags["--shutdown-timeout"]) < pod["terminationGracePeriodSeconds"]


def test_pods_start_once_the_adapters_are_in_memory_that_they_read_ahead() -> None:
    """`tests/serving/names/test_adapter_dir.py` runs the probe."""
    (container,) = vllm_pod()["containers"]
    names = container["startupProbe"]["exec"]["command"][3:]
    assert names == names_in(settings_of(container["args"]).preload or "")


def test_what_the_config_maps_hold_is_yaml() -> None:
    held = {name: text for each in of_kind("ConfigMap") for name, text in each["data"].items()}
    assert parse_routes("routes.yaml", held["routes.yaml"]).targets
    picker = yaml.safe_load(held["config.yaml"])
    plugins = {plugin["type"] for plugin in picker["plugins"]}
    (profile,) = picker["schedulingProfiles"]
    weights = {use["pluginRef"]: use.get("weight", 0) for use in profile["plugins"]}
    assert weights.keys() <= plugins
    assert max(weights, key=lambda name: weights[name]) == "lora-affinity-scorer"


def test_the_manifests_flags_are_ones_that_the_plugin_takes() -> None:
    (vllm,) = vllm_pod()["containers"]
    settings = settings_of(vllm["args"])
    mounts = tuple(mount["mountPath"] for mount in vllm["volumeMounts"])
    assert settings.adapter_dir == ("/adapters",)
    for path in (*settings.adapter_dir, settings.routes, settings.admin_key_file):
        assert path.startswith(mounts)


def test_the_notebook_is_one_without_outputs() -> None:
    notebook = json.loads(NOTEBOOK.read_text())
    assert (notebook["nbformat"], notebook["nbformat_minor"]) == (4, 5)
    cells = notebook["cells"]
    assert len({cell["id"] for cell in cells}) == len(cells)
    for cell in cells:
        if cell["cell_type"] == "code":
            assert (cell["outputs"], cell["execution_count"]) == ([], None)
            compile("".join(cell["source"]), cell["id"], "exec")


def test_the_image_is_a_supported_vllm() -> None:
    from vllm_multilora.integration.patching.parts import CORE

    dockerfile = (EXAMPLES / "docker" / "Dockerfile").read_text()
    base = re.search(r"^ARG BASE=vllm/vllm-openai:v(\S+)", dockerfile, re.MULTILINE)
    assert base is not None
    assert CORE.is_tested(base[1])


def run_client(
    script: str,
    answer: Callable[[httpx.Request], httpx.Response],
    monkeypatch: pytest.MonkeyPatch,
) -> object:
    """Runs a client whose server gives these answers; its exit status, or what it ends with."""
    for client in ("Client", "AsyncClient"):
        answered = partial(getattr(httpx, client), transport=httpx.MockTransport(answer))
        monkeypatch.setattr(httpx, client, answered)
    path = EXAMPLES / "patterns" / f"{script}.py"
    monkeypatch.syspath_prepend(path.parent)
    monkeypatch.setattr("sys.argv", [str(path), *CLIENTS[script]])
    try:
        runpy.run_path(str(path), run_name="__main__")
    except SystemExit as end:
        return end.code
    return 0


@pytest.mark.parametrize("script", CLIENTS)
def test_clients_send_the_key(script: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As `vllm-multilora status` does: the README's server has keys."""
    keys = []

    def answer(request: httpx.Request) -> httpx.Response:
        keys.append(request.headers.get("Authorization"))
        body = {"model": "a", "choices": [{"text": "Yes"}], "data": [{"id": "a", "parent": "m"}]}
        return httpx.Response(200, headers={"x-multilora-adapter": "a"}, json=body)

    monkeypatch.setenv("VLLM_API_KEY", "sk-secret")
    assert run_client(script, answer, monkeypatch) == 0
    assert set(keys) == {"Bearer sk-secret"}


@pytest.mark.parametrize("script", CLIENTS)
def test_clients_without_a_server_say_so_in_one_line(
    script: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(request: httpx.Request) -> httpx.Response:
        raise httpx.ConnectError("Connection refused", request=request)

    said = run_client(script, refuse, monkeypatch)
    assert isinstance(said, str)  # which Python prints, and exits with 1
    assert re.fullmatch(r"http://127.0.0.1:8000/v1/\S+ gives no answer: Connection refused", said)


@pytest.mark.parametrize("script", CLIENTS)
@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ('{"error": {"message": "no such\\nmodel"}}', "no such model"),
        ('{"error": "Unauthorized"}', "Unauthorized"),
        ('{"detail": "Not Found"}', '{"detail": "Not Found"}'),
        ("<html>\n</html>", "<html> </html>"),
    ],
)
def test_clients_say_in_one_line_what_a_server_refuses(
    script: str, body: str, reason: str, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    said = run_client(script, lambda _: httpx.Response(404, text=body), monkeypatch)
    printed = capsys.readouterr().err.rstrip("\n") if said == 1 else said
    assert isinstance(printed, str)
    assert printed.endswith(f"404: {reason}")
    assert "\n" not in printed


def test_every_client_is_one_of_them() -> None:
    scripts = {path.stem for path in (EXAMPLES / "patterns").glob("*.py")}
    assert scripts - {"client", "offline_batch"} == set(CLIENTS)
