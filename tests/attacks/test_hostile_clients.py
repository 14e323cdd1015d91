"""Whatever a client calls its adapter, its path or itself: an answer with a reason, and no harm."""

import json
import os
import re
import shutil
import time
from pathlib import Path
from typing import Any
from urllib.parse import quote

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.adapters.corpus import BAD
from tests.serving import completions
from tests.serving.exposition import scrape, values

from .site import (
    GOOD,
    HOSTILE_NAMES,
    MAX_LABELS,
    NAMES,
    STRANGE_NAMES,
    Site,
)

pytestmark = pytest.mark.serving

ENDPOINTS: dict[str, dict[str, Any]] = {
    "/v1/completions": {"prompt": [1, 2, 3], "max_tokens": 1},
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "t1 t2"}], "max_tokens": 1},
    "/v1/responses": {"input": "t1 t2", "max_output_tokens": 1},
    "/v1/messages": {"messages": [{"role": "user", "content": "t1 t2"}], "max_tokens": 1},
    "/v1/messages/count_tokens": {"messages": [{"role": "user", "content": "t1 t2"}]},
    "/tokenize": {"prompt": "t1 t2"},
    "/detokenize": {"tokens": [1, 2]},
}
PATHS = {
    "null": "/adapters/a\0b",
    "surrogate": "/adapters/\ud800",
    "5000": "/" + "a" * 5000,
    "one-long-part": "/" + "a" * 300,
}
# What a terminal or a log's reader would take for more than text.
CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e]")


@pytest.fixture(autouse=True)
def unharmed(site: Site) -> Any:
    """After every attack the good customer is answered as before, and the log is clean."""
    begin = len(site.server.log.read_bytes())
    yield
    site.assert_unharmed()
    written = site.server.log.read_bytes()[begin:].decode(errors="replace").replace("\r\n", "\n")
    assert not CONTROL.search(written)
    assert not re.search(r"^INFO.*forged\.py", written, re.MULTILINE)
    assert "Traceback" not in written
    assert max(map(len, written.splitlines())) < 2_000


def message_of(response: Any) -> str:
    return str(response.json()["error"]["message"])


@pytest.mark.parametrize("path", ENDPOINTS)
def test_a_model_of_a_hostile_name_is_not_found(site: Site, path: str) -> None:
    for name in (HOSTILE_NAMES | STRANGE_NAMES).values():
        assert_refused(name, site.post(path, {"model": name, **ENDPOINTS[path]}), 400, 404)


def assert_refused(name: str, response: Any, *statuses: int) -> None:
    assert response.status_code in statuses, f"{name[:40]!a}: {response.text[:500]}"
    assert len(response.content) < 2_000


def test_no_adapter_is_registered_or_unloaded_under_a_hostile_name(site: Site) -> None:
    for name in HOSTILE_NAMES.values():
        for path in (site.root / GOOD, "/nowhere"):
            response = site.load(name, path)
            assert_refused(name, response, 400)
            assert "the adapter's name" in message_of(response)
        assert_refused(name, site.unload(name), 404)


def test_sagemakers_routes_take_no_hostile_name_either(site: Site) -> None:
    for name in HOSTILE_NAMES.values():
        body = {"name": name, "src": str(site.root / GOOD)}
        assert_refused(name, site.post("/adapters", body), 400)
        written = name.encode("utf-8", "surrogatepass")
        if len(written) <= 256 and "INFO" not in name:  # uvicorn logs whole addresses, encoded
            url = f"{site.server.url}/adapters/{quote(written, safe='').replace('.', '%2E')}"
            assert_refused(name, httpx.delete(url, timeout=60, trust_env=False), 400, 404, 405)
        if name.isprintable():  # clients send no other in a header
            header = {"x-amzn-sagemaker-adapter-identifier": written}
            body = {"prompt": [1, 2, 3], "max_tokens": 1}
            assert_refused(name, site.post("/invocations", body, header), 400, 404)


def test_a_name_in_any_script_is_an_adapters(site: Site) -> None:
    name = "客户 🎉"
    assert site.load(name, site.root / GOOD).status_code == 200
    assert completions.token_ids(site.ask(name)) == site.case.expected.tokens
    assert site.unload(name).status_code == 200


@pytest.mark.parametrize("path", PATHS.values(), ids=PATHS)
def test_what_is_no_path_is_refused_with_a_reason(site: Site, path: str) -> None:
    response = site.load("nobody", path)
    assert response.status_code == 400, response.text[:500]
    assert "path" in message_of(response)
    assert len(response.content) < 16_000


def test_junk_names_take_no_place_among_the_metrics(site: Site) -> None:
    folder = BAD["rank-over-the-limit"].write(site.root / "junk")
    for number in range(2 * MAX_LABELS):
        assert site.load(f"junk-{number}", folder).status_code in (400, 404)
        assert site.ask(f"nobody-{number}").status_code == 404
    name = "known-afterwards"
    assert site.load(name, site.root / GOOD).status_code == 200
    assert site.ask(name).status_code == 200
    families = text_string_to_metric_families(site.server.get("/metrics").text)
    labels = {
        sample.labels["lora_name"]
        for family in families
        for sample in family.samples
        if "lora_name" in sample.labels
    }
    assert name in labels
    assert not {label for label in labels if "junk" in label or "nobody" in label}
    site.unload(name)


def resolvable(site: Site, folder: Path, source: str = NAMES[1]) -> Path:
    """An adapter that vLLM's filesystem resolver takes for one of the base model's."""
    site.put(source, folder)
    file = folder / "adapter_config.json"
    config = json.loads(file.read_text()) | {"base_model_name_or_path": str(site.scenario.base)}
    file.write_text(json.dumps(config))
    return folder


def test_a_resolved_adapter_serves(site: Site) -> None:
    resolvable(site, site.resolved / "tenant" / "v1")
    case = site.scenario.cases_of(NAMES[1])[0]
    completions.assert_serves(site.server, "tenant/v1", case)
    completions.assert_serves(site.server, "tenant/v1", case)
    site.unload("tenant/v1")


def test_a_bad_adapter_that_is_resolved_is_refused_with_its_problems(site: Site) -> None:
    folder = resolvable(site, site.resolved / "bad")
    config = json.loads((folder / "adapter_config.json").read_text())
    config |= {"r": 4 * config["r"], "use_dora": True}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    for _ in range(2):
        response = site.ask("bad")
        assert response.status_code == 400, response.text
        error = response.json()["error"]
        assert error["param"] == "model"
        codes = {problem["code"] for problem in error["problems"]}
        assert {"rank-not-as-configured", "unsupported-feature"} <= codes


@pytest.mark.parametrize("content", ["{", "[]", '{"peft_type": "LORA"}', "pipe", "huge", "deep"])
def test_a_configuration_that_no_resolver_can_read_is_refused(site: Site, content: str) -> None:
    folder = resolvable(site, site.resolved / f"unreadable-{len(content)}-{content[:2]}")
    file = folder / "adapter_config.json"
    file.unlink()
    if content == "pipe":
        os.mkfifo(file)
    else:
        texts = {"huge": "[" + "1," * (3 << 20) + "1]", "deep": "[" * 100_000}
        file.write_text(texts.get(content, content))
    response = site.ask(folder.name)
    assert response.status_code == 400, response.text[:500]
    assert response.json()["error"]["problems"]


def test_no_name_leads_a_resolver_out_of_its_folder(site: Site) -> None:
    outside = resolvable(site, site.outside.parent / "resolvable")
    (site.resolved / "link").unlink(missing_ok=True)
    (site.resolved / "link").symlink_to(outside)
    linked = site.resolved / "linked-files"
    linked.mkdir(exist_ok=True)
    for file in outside.iterdir():
        (linked / file.name).unlink(missing_ok=True)
        (linked / file.name).symlink_to(file)
    for name in (f"../outside/{outside.name}", str(outside), "link", "linked-files", "tenant/.."):
        assert site.ask(name).status_code == 404, name


INPUTS: dict[str, tuple[str, dict[str, Any], dict[str, str], int]] = {
    "long-tag": ("by-language", {}, {"accept-language": "a-" * 12_000}, 200),
    "many-tags": ("by-language", {}, {"accept-language": "xx-yy-zz," * 2_500}, 200),
    "long-tag-in-metadata": ("by-language", {"metadata": {"language": "b-" * 99_999}}, {}, 200),
    "long-user": ("by-user", {"user": "u" * 5_000}, {}, 400),
    "surrogate-user": ("split", {"user": "\ud800"}, {}, 200),
    "control-user": ("by-user", {"user": "a\n\x1b[31m\0"}, {}, 200),
    "long-metadata": ("by-task", {"metadata": {"task": "t" * 99_999}}, {}, 400),
    "escape-in-metadata": ("by-task", {"metadata": {"task": "\x1b[31m\n"}}, {}, 400),
    "large-number": ("by-task", {"metadata": {"task": 10**4_000}}, {}, 400),
    "long-header": ("by-header", {}, {"x-task": "t" * 20_000}, 400),
    "long-sticky": ("split", {"user": "s" * 99_999}, {}, 400),
}


@pytest.mark.parametrize(("route", "more", "headers", "status"), INPUTS.values(), ids=INPUTS)
def test_what_a_request_says_of_itself_is_bounded(
    site: Site, route: str, more: dict[str, Any], headers: dict[str, str], status: int
) -> None:
    body = completions.body(route, site.case, **more)
    response = site.post("/v1/completions", body, headers)
    assert response.status_code == status, response.text[:500]
    assert len(response.content) < 4_000
    if status == 400:
        assert route in message_of(response)


def test_very_many_problems_are_a_hundred_and_a_count(site: Site) -> None:
    folder = site.put(NAMES[0], site.root / "very-wrong")
    config = json.loads((folder / "adapter_config.json").read_text())
    config["rank_pattern"] = {f"module-{number}": "x" for number in range(5_000)}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    response = site.load("very-wrong", folder)
    assert response.status_code == 400
    problems = response.json()["error"]["problems"]
    assert len(problems) == 101
    assert problems[-1]["code"] == "more-problems"
    assert sum(problem["count"] for problem in problems) == 5_000
    assert len(response.content) < 300_000
    shutil.rmtree(folder)


def _failed_loads(site: Site) -> float:
    """What engines have failed to load, or refused to try again."""
    found = values(scrape(site.server), "vllm:lora_adapter_load_failures_total", "reason")
    return found.get("gone", 0.0)


def test_the_directory_keeps_a_refusal_for_those_who_ask_again(site: Site) -> None:
    """Weights that have gone: every request would be another check."""
    folder = site.put(NAMES[0], site.directory / "without-weights")
    (folder / "adapter_model.safetensors").unlink()
    before = _failed_loads(site)
    statuses = {site.ask("without-weights").status_code for _ in range(20)}
    assert statuses == {404}
    assert 1 <= _failed_loads(site) - before <= 5  # pauses double from two seconds on
    site.put(NAMES[0], folder)
    deadline = time.monotonic() + 30
    while site.ask("without-weights").status_code != 200:
        assert time.monotonic() < deadline, site.server.log_tail()
        time.sleep(0.25)
    shutil.rmtree(folder)
