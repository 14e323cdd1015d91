"""`vllm-multilora advise`: watches a server for a while and recommends what to change."""

from __future__ import annotations

import argparse
import json
import sys
import time

from vllm_multilora.errors import MultiLoRAError
from vllm_multilora.toolbox.advice.advisor import advise, demand
from vllm_multilora.toolbox.advice.findings import Finding
from vllm_multilora.toolbox.advice.observations import ACTIVITY_WINDOW_S, Observations
from vllm_multilora.toolbox.advice.snapshots import LONGEST_HISTORY_S, Snapshot, history, scrape
from vllm_multilora.toolbox.advice.watching import observe
from vllm_multilora.toolbox.clients.http_client import base_url
from vllm_multilora.toolbox.commands.arguments.api_key import add_api_key
from vllm_multilora.wording import counted

HEALTHY, ADVICE = 0, 1
_MAX_INTERVAL_S = 5.0
_MIN_SCRAPES = 5


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's arguments."""
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument(
        "--url", help="watch this server for one window, such as http://localhost:8000"
    )
    source.add_argument(
        "--prometheus",
        metavar="URL",
        help="query this Prometheus about the window that ends now, such as http://localhost:9090",
    )
    parser.add_argument(
        "--window",
        type=float,
        default=ACTIVITY_WINDOW_S,
        metavar="SECONDS",
        help="length of the window (default: %(default).0f); a shorter one calls no adapter idle",
    )
    parser.add_argument(
        "--match",
        default="",
        metavar="LABELS",
        help='with --prometheus: which servers, such as job="vllm",instance="gpu7:8000"',
    )
    add_api_key(parser)
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(arguments: argparse.Namespace) -> int:
    """Runs the command.

    Returns:
        0 if there is nothing to change, 1 if there is.

    Raises:
        MultiLoRAError: That cannot be told.
    """
    seen = observe(_snapshots(arguments))
    findings = advise(seen)
    if arguments.json:
        print(json.dumps(_as_json(seen, findings), indent=2))
    else:
        print("\n\n".join(map(str, findings)) or _nothing_to_change(seen))
    return ADVICE if findings else HEALTHY


def _snapshots(arguments: argparse.Namespace) -> list[Snapshot]:
    if not 0 < arguments.window < float("inf"):
        raise MultiLoRAError(
            f"--window must be a positive number of seconds, got {arguments.window}"
        )
    if arguments.prometheus:
        if arguments.window > LONGEST_HISTORY_S:
            raise MultiLoRAError(
                f"--window must be at most {LONGEST_HISTORY_S:.0f} s (a day) with --prometheus, "
                f"got {arguments.window:.0f}"
            )
        return history(
            base_url(arguments.prometheus), arguments.window, arguments.match, now=time.time()
        )
    if arguments.match:
        raise MultiLoRAError(
            "--match needs --prometheus: it selects among the servers that Prometheus knows"
        )
    return _watch(base_url(arguments.url), arguments.window, arguments.api_key)


def _watch(url: str, window_s: float, api_key: str | None) -> list[Snapshot]:
    """Scrapes a server from now until the window is over."""
    interval = min(_MAX_INTERVAL_S, window_s / _MIN_SCRAPES)
    seen = [scrape(url, api_key=api_key)]
    if sys.stderr.isatty():
        print(f"watching {url} for {window_s:.0f} s ...", file=sys.stderr)
    end = time.monotonic() + window_s
    while (left := end - time.monotonic()) > 0:
        time.sleep(min(interval, left))
        seen.append(scrape(url, api_key=api_key))
    return seen


def _nothing_to_change(seen: Observations) -> str:
    requests = counted(round(sum(seen.requests.values())), "request")
    return (
        f"Nothing to change: {requests} in {seen.window_s:.0f} s, {demand(seen)}, "
        f"{counted(seen.slots, 'slot')}."
    )


def _as_json(seen: Observations, findings: list[Finding]) -> dict[str, object]:
    return {
        "window_s": round(seen.window_s, 3),
        "max_loras": seen.slots,
        "max_lora_rank": seen.max_rank,
        "active": seen.active,
        "peak_requested": seen.peak_requested,
        "requests": sum(seen.requests.values()),
        "findings": [finding.as_dict() for finding in findings],
    }
