"""`vllm-multilora advise`: watches a server for a while and recommends what to change."""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import asdict, replace

from vllm_multilora.errors import MultiLoRAError
from vllm_multilora.toolbox.advice.advisor import advise, demand
from vllm_multilora.toolbox.advice.observations import ACTIVITY_WINDOW_S
from vllm_multilora.toolbox.advice.snapshots import LONGEST_HISTORY_S, Snapshot, history, scrape
from vllm_multilora.toolbox.advice.watching import observe
from vllm_multilora.toolbox.clients.adapter_servers import fetch
from vllm_multilora.toolbox.clients.http_client import UnreachableError, base_url
from vllm_multilora.toolbox.commands.shared_arguments import add_api_key, require_seconds
from vllm_multilora.wording import counted

HEALTHY, ADVICE = 0, 1
_MAX_INTERVAL_S = 5.0
_MIN_SCRAPES = 5


def add_arguments(parser: argparse.ArgumentParser) -> None:
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
    seen = observe(_snapshots(arguments))
    if arguments.url:
        seen = replace(seen, has_all_ranks=_has_all_ranks(arguments))
    findings = advise(seen)
    requests = sum(seen.requests.values())
    if arguments.json:
        report = {
            "window_s": round(seen.window_s, 3),
            "max_loras": seen.slots,
            "max_lora_rank": seen.max_rank,
            "active": seen.active,
            "peak_requested": seen.peak_requested,
            "requests": requests,
            "findings": [asdict(finding) for finding in findings],
        }
        print(json.dumps(report, indent=2))
    elif findings:
        print("\n\n".join(map(str, findings)))
    else:
        print(
            f"Nothing to change: {counted(round(requests), 'request')} in {seen.window_s:.0f} s, "
            f"{demand(seen)}, {counted(seen.slots, 'slot')}."
        )
    return ADVICE if findings else HEALTHY


def _snapshots(arguments: argparse.Namespace) -> list[Snapshot]:
    require_seconds("--window", arguments.window)
    if arguments.prometheus:
        if arguments.window > LONGEST_HISTORY_S:
            raise MultiLoRAError(
                f"--window must be at most {LONGEST_HISTORY_S:.0f} s (a day) with --prometheus, "
                f"got {arguments.window:.0f}"
            )
        url = base_url(arguments.prometheus)
        return history(url, arguments.window, arguments.match, now=time.time())
    if arguments.match:
        raise MultiLoRAError(
            "--match needs --prometheus: it selects among the servers that Prometheus knows"
        )
    return _watch(base_url(arguments.url), arguments.window, arguments.api_key)


def _has_all_ranks(arguments: argparse.Namespace) -> bool:
    try:
        rows = fetch(base_url(arguments.url), api_key=arguments.api_key)["data"]
    except UnreachableError:  # metrics are there nevertheless
        return False
    return all(row["rank"] is not None for row in rows)


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
