"""Checks the rules and the dashboard against a real Prometheus that scrapes a server under load.

    python check.py                              # starts a server of its own, with the demo's model
    python check.py --url http://localhost:8000  # watches one that serves already

Every expression of `rules.yml` must be one that Prometheus evaluates, and every query of the
dashboard must return data; of a server that was not started here, one without data (it had no
failed load, say) is only told. Exits with 0 if all is well and with 1 if not. Needs `prometheus`
on the path (Debian's package of that name, or the official binary), httpx and PyYAML.
"""

import argparse
import contextlib
import itertools
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import yaml

HERE = Path(__file__).resolve().parent
DEMO = HERE.parent / "demo"
RULES = HERE / "rules.yml"
DASHBOARD = HERE / "grafana/dashboards/multilora.json"
VARIABLES = {"$__rate_interval": "1m", "$model_name": ".*"}
START_LIMIT_S = 300
STOP_LIMIT_S = 30
OWN_SERVER_LACKS = ("by tenant", "Refused", "Dropped", "by route", "First token")
"""Parts of the names of panels without data here: of tenants, routes and latencies by adapter."""
STYLES = ("medical", "legal", "french-support", "code-review")


def rule_expressions(path: Path = RULES) -> dict[str, str]:
    """The expression of every recording and alert rule."""
    groups = yaml.safe_load(path.read_text())["groups"]
    return {
        rule.get("alert") or rule["record"]: rule["expr"]
        for group in groups
        for rule in group["rules"]
    }


def dashboard_queries(path: Path = DASHBOARD) -> dict[str, str]:
    """Every query of the dashboard, with Grafana's variables filled in."""
    queries = {}
    for panel in json.loads(path.read_text())["panels"]:
        for target in panel.get("targets", ()):
            expression = target["expr"]
            for variable, value in VARIABLES.items():
                expression = expression.replace(variable, value)
            queries[f"{panel['title']} / {target['legendFormat'] or target['refId']}"] = expression
    return queries


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextlib.contextmanager
def process(command: list[str], log: Path, **options) -> Iterator[subprocess.Popen]:
    """Runs a command with its output in a file, and ends it by its own process group."""
    with log.open("wb") as output:
        running = subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, start_new_session=True, **options
        )
    try:
        yield running
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(running.pid, signal.SIGTERM)
        try:
            running.wait(STOP_LIMIT_S)
        except subprocess.TimeoutExpired:
            os.killpg(running.pid, signal.SIGKILL)
            running.wait()


def wait_until_ready(url: str, running: subprocess.Popen, log: Path) -> None:
    deadline = time.monotonic() + START_LIMIT_S
    while time.monotonic() < deadline and running.poll() is None:
        with contextlib.suppress(httpx.TransportError):
            if httpx.get(url, timeout=2, trust_env=False).status_code == 200:
                return
        time.sleep(0.5)
    tail = "\n".join(log.read_text(errors="replace").splitlines()[-20:])
    raise SystemExit(f"{url} did not answer; {log.name} ends with:\n{tail}")


@contextlib.contextmanager
def own_server(folder: Path) -> Iterator[str]:
    """A server with two slots and eight customers, each with one of the demo's adapters."""
    sys.path.insert(0, str(DEMO))
    from base_model import build_base_model

    port = free_port()
    modules = [
        json.dumps({"name": f"{style}-{number}", "path": str(DEMO / "adapters" / style)})
        for number in (1, 2)
        for style in STYLES
    ]
    command = [
        *(sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", str(build_base_model())),
        *("--served-model-name", "base", "--host", "127.0.0.1", "--port", str(port)),
        *("--dtype", "float32", "--enforce-eager", "--max-model-len", "256"),
        *("--enable-lora", "--max-loras", "2", "--max-lora-rank", "32"),
        *("--lora-modules", *modules),
    ]
    environment = {
        "HF_HUB_OFFLINE": "1",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        **os.environ,
        "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1",
    }
    log = folder / "vllm.log"
    with process(command, log, env=environment) as running:
        url = f"http://127.0.0.1:{port}"
        wait_until_ready(f"{url}/health", running, log)
        yield url


@contextlib.contextmanager
def prometheus(server: str, folder: Path) -> Iterator[str]:
    """A Prometheus that scrapes a server every two seconds, with the rules of this folder."""
    program = shutil.which("prometheus")
    if program is None:
        raise SystemExit("no prometheus on the path; see README.md")
    config = {
        "global": {"scrape_interval": "2s", "evaluation_interval": "2s"},
        "rule_files": [str(RULES)],
        "scrape_configs": [
            {
                "job_name": "vllm",
                "scheme": server.partition("://")[0],
                "static_configs": [{"targets": [server.partition("://")[2].rstrip("/")]}],
            }
        ],
    }
    file = folder / "prometheus.yml"
    file.write_text(yaml.safe_dump(config))
    address = f"127.0.0.1:{free_port()}"
    command = [
        *(program, f"--config.file={file}", f"--web.listen-address={address}"),
        f"--storage.tsdb.path={folder / 'data'}",
    ]
    log = folder / "prometheus.log"
    with process(command, log) as running:
        wait_until_ready(f"http://{address}/-/ready", running, log)
        yield f"http://{address}"


def put_under_load(url: str, seconds: float) -> int:
    """Asks every model of a server in turn, from three clients; returns the answers."""
    with httpx.Client(base_url=url, timeout=120, trust_env=False) as client:
        try:
            models = client.get("/v1/models").raise_for_status().json()["data"]
        except httpx.HTTPError as error:
            raise SystemExit(f"{url}: {error}".partition("\n")[0]) from error
        names = [model["id"] for model in models]
        turn, end = itertools.cycle(names), time.monotonic() + seconds
        answered = itertools.count()

        def ask() -> None:
            while time.monotonic() < end:
                body = {"model": next(turn), "prompt": "Hello", "max_tokens": 8}
                if client.post("/v1/completions", json=body).status_code == 200:
                    next(answered)

        clients = [threading.Thread(target=ask) for _ in range(3)]
        for thread in clients:
            thread.start()
        for thread in clients:
            thread.join()
        return next(answered)


def fail_a_load(url: str) -> None:
    """A load that fails, so that failures have a series."""
    httpx.post(
        f"{url}/v1/load_lora_adapter",
        json={"lora_name": "nowhere", "lora_path": "/nowhere/at/all"},
        timeout=60,
        trust_env=False,
    )


def evaluate(prometheus_url: str, expression: str) -> tuple[str | None, int]:
    """What is wrong with an expression, if anything, and how many series it has now."""
    answer = httpx.get(
        f"{prometheus_url}/api/v1/query", params={"query": expression}, timeout=30, trust_env=False
    ).json()
    if answer["status"] != "success":
        return answer["error"], 0
    return None, len(answer["data"]["result"])


def report(prometheus_url: str, *, must_have_data: bool) -> bool:
    """Prints a line for each expression; whether all are as they should be."""
    good = True
    for kind, expressions in (("rule", rule_expressions()), ("panel", dashboard_queries())):
        for name, expression in expressions.items():
            error, series = evaluate(prometheus_url, expression)
            is_asked = kind == "panel" and not any(part in name for part in OWN_SERVER_LACKS)
            is_good = error is None and (series > 0 or not (is_asked and must_have_data))
            good &= is_good
            print(
                f"{'ok' if is_good else 'BAD':4} {kind:6} {error or f'{series} series':12} {name}"
            )
    rules = httpx.get(f"{prometheus_url}/api/v1/rules", timeout=30, trust_env=False).json()
    for group in rules["data"]["groups"]:
        for rule in group["rules"]:
            if rule["health"] != "ok":
                good = False
                print(f"BAD  rule   {rule['name']}: {rule.get('lastError') or rule['health']}")
    return good


def main() -> int:
    """Runs the check."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--url", help="a server that runs already")
    parser.add_argument("--seconds", type=float, default=60, help="of load (default: 60)")
    arguments = parser.parse_args()
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="monitoring-")))
        url = arguments.url or stack.enter_context(own_server(folder))
        watcher = stack.enter_context(prometheus(url, folder))
        time.sleep(5)  # counters that begin now have a value to grow from
        if not arguments.url:
            fail_a_load(url)
        answers = put_under_load(url, arguments.seconds)
        print(f"{answers} answers of {url} in {arguments.seconds:.0f} s, scraped by {watcher}")
        return 0 if report(watcher, must_have_data=not arguments.url) else 1


if __name__ == "__main__":
    sys.exit(main())
