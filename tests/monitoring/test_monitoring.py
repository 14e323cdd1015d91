"""`examples/monitoring`: files that parse, rules that hold, and no metric that does not exist."""

import importlib.util
import json
import re
from pathlib import Path
from types import ModuleType

import pytest
import yaml

from tests.promtool import run_promtool
from vllm_multilora.metrics.definitions import BY_NAME, PER_TOKEN, Kind

FOLDER = Path(__file__).parents[2] / "examples/monitoring"
VLLM_OWN = {"vllm:request_success_total"}


@pytest.fixture(scope="module")
def check() -> ModuleType:
    """The script `check.py`, as a module."""
    spec = importlib.util.spec_from_file_location("monitoring_check", FOLDER / "check.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def expressions(check) -> dict[str, str]:
    """Every expression of the rules and the dashboard, by name."""
    return {**check.rule_expressions(), **check.dashboard_queries()}


def exposed() -> set[str]:
    """Names of all samples that the plugin's metrics have."""
    names = set(VLLM_OWN)
    for name, definition in BY_NAME.items():
        is_histogram = definition.kind is Kind.HISTOGRAM
        names |= {f"{name}{s}" for s in ("_bucket", "_sum", "_count")} if is_histogram else {name}
    return names


def test_every_metric_in_an_expression_exists(check, expressions):
    known = exposed() | set(check.rule_expressions())
    used = {
        name
        for expression in expressions.values()
        for name in re.findall(r"\b(?:vllm|instance):[a-z0-9_:]+", expression)
    }
    assert used <= known
    assert len(used) > 20


def test_every_label_in_an_expression_exists(expressions):
    common = {"job", "instance", "model_name", "engine", "le"}
    for name, expression in expressions.items():
        for metric, matchers in re.findall(r"(vllm:\w+)\{([^}]*)\}", expression):
            base = re.sub(r"_(bucket|sum|count)$", "", metric)
            known = common | set(BY_NAME[base].labels if base in BY_NAME else ())
            assert set(re.findall(r"(\w+)=", matchers.replace("=~", "="))) <= known, name


def test_the_bucket_that_slow_loads_are_counted_by_exists():
    assert 500.0 in BY_NAME["vllm:lora_adapter_load_duration_ms"].buckets
    assert 'le="500.0"' in (FOLDER / "rules.yml").read_text()


def test_the_dashboard_covers_what_operators_ask_for(expressions):
    shown = " ".join(expressions.values())
    hidden = {"vllm:lora_cache_adapters_limit", "vllm:lora_max_rank"}
    hidden |= {"vllm:lora_kernels"}  # decided once, when a server starts
    hidden |= {PER_TOKEN.name}  # off unless an operator asks for it
    assert {name for name in BY_NAME if name not in shown} <= hidden


def test_the_dashboard_is_one_that_grafana_takes():
    dashboard = json.loads((FOLDER / "grafana/dashboards/multilora.json").read_text())
    panels = dashboard["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    taken = set()
    for panel in panels:
        place = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert not taken & cells, panel["title"]
        assert place["x"] + place["w"] <= 24
        taken |= cells


@pytest.mark.parametrize(
    "file", sorted(FOLDER.rglob("*.yml")), ids=lambda file: str(file.relative_to(FOLDER))
)
def test_every_yaml_file_parses(file):
    assert yaml.safe_load(file.read_text())


def test_every_alert_says_what_to_do_and_is_tested():
    rules = yaml.safe_load((FOLDER / "rules.yml").read_text())
    alerts = [r for group in rules["groups"] for r in group["rules"] if "alert" in r]
    tests = yaml.safe_load((FOLDER / "rules_test.yml").read_text())["tests"]
    cases = [case for test in tests for case in test["alert_rule_test"]]
    readme = (FOLDER / "README.md").read_text()
    for alert in alerts:
        assert alert["annotations"]["summary"]
        assert alert["annotations"]["description"]
        assert alert["labels"]["severity"] in ("info", "warning", "critical")
        raised = {bool(c["exp_alerts"]) for c in cases if c["alertname"] == alert["alert"]}
        assert raised == {True, False}, alert["alert"]
        assert f"`{alert['alert']}`" in readme


@pytest.mark.parametrize(
    "what",
    [
        ("check", "config", "prometheus.yml"),
        ("check", "rules", "rules.yml"),
        ("test", "rules", "rules_test.yml"),
    ],
    ids=" ".join,
)
def test_prometheus_takes_the_files_and_the_rules_hold(what):
    *command, file = what
    done = run_promtool(*command, str(FOLDER / file))
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_server_that_does_not_answer_is_named_in_one_line(check):
    url = f"http://127.0.0.1:{check.free_port()}"
    with pytest.raises(SystemExit) as end:
        check.put_under_load(url, 1)
    assert re.fullmatch(rf"{url}: .*Connection refused", str(end.value))


def test_a_server_without_traffic_hides_nobodys_hit_rate(check, tmp_path):
    """Nor counts one with little as much as one with much."""
    series = [
        {
            "series": f'vllm:lora_cache_{what}_total{{instance="{server}",tier="cpu"}}',
            "values": f"0+{count}x20",
        }
        for server, hits, misses in (("busy", 30, 10), ("calm", 1, 3), ("idle", 0, 0))
        for what, count in (("hits", hits), ("misses", misses))
    ]
    (query,) = (
        expression
        for name, expression in check.dashboard_queries().items()
        if name.startswith("Hit rate")
    )
    expected = {
        "expr": query.replace("[1m]", "[5m]"),  # as often as these are recorded
        "eval_time": "20m",
        "exp_samples": [{"labels": '{tier="cpu"}', "value": 31 / 44}],
    }
    file = tmp_path / "test.yml"
    file.write_text(
        yaml.safe_dump(
            {
                "rule_files": [str(FOLDER / "rules.yml")],
                "tests": [
                    {"interval": "1m", "input_series": series, "promql_expr_test": [expected]}
                ],
            }
        )
    )
    done = run_promtool("test", "rules", str(file))
    assert done.returncode == 0, done.stdout + done.stderr
