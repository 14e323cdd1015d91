"""Dynamo's frontend and two workers with this plugin; answers are compared with PEFT's.

Not among the tests of `make test`, since it needs Dynamo: `make test-dynamo`.
"""

import json
import shutil
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from base_model import build_base_model
from fleet import Fleet
from fleet_checks import (
    LEGAL,
    PEFT_TOKENS,
    Pefts,
    ask,
    assert_forty_mixed_answers_are_pefts,
    spoil,
)
from fleets import content
from processes import started
from prompts import ADAPTED, ADAPTERS

EVERY_S = 1.0
NAMES = {str(customer.adapter) for customer in ADAPTED}


@pytest.fixture(scope="module")
def fleet() -> Iterator[Fleet]:
    with Fleet(build_base_model(), step_metrics=True) as fleet:
        yield fleet


@pytest.fixture
def adapters(tmp_path: Path, fleet: Fleet) -> Path:
    """A folder with the demo's adapters, which all workers serve."""
    folder = tmp_path / "adapters"
    shutil.copytree(ADAPTERS, folder)
    assert sync(fleet, folder, "--remove").returncode == 0
    fleet.wait("all adapters", lambda: fleet.models() == {"base", *NAMES}, 30)
    return folder


def sync(fleet: Fleet, folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    command = fleet.sync_command(folder, *options)
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


def replace(folder: Path, adapter: str, by: Path) -> None:
    """Puts another adapter's files in the place of an adapter's own."""
    new = folder / f".{adapter}"
    shutil.copytree(by, new)
    (folder / adapter).rename(folder / f".old-{adapter}")
    new.rename(folder / adapter)


def loaded(fleet: Fleet) -> list[set[str]]:
    """The adapters of each worker."""
    urls = [f"{worker.url}/v1/loras" for worker in fleet.workers]
    return [set(httpx.get(url, trust_env=False).json()["loras"]) for url in urls]


def test_forty_mixed_answers_are_pefts(fleet: Fleet, adapters: Path, pefts_answer: Pefts) -> None:
    assert_forty_mixed_answers_are_pefts(fleet, pefts_answer)


def test_every_worker_serves_every_adapter_and_syncing_again_changes_nothing(
    fleet: Fleet, adapters: Path
) -> None:
    assert loaded(fleet) == [NAMES, NAMES]
    again = sync(fleet, adapters)
    assert (again.returncode, again.stderr) == (0, "")
    assert loaded(fleet) == [NAMES, NAMES]


def test_the_first_worker_has_dynamos_own_scheduler(fleet: Fleet) -> None:
    child = fleet.workers[0].child
    assert child is not None
    log = child.log.read_text()
    assert "InstrumentedScheduler" in log
    assert "vllm-multilora" in log


def test_a_hot_swap_lets_a_running_stream_end_with_the_old_weights(
    fleet: Fleet, adapters: Path, pefts_answer: Pefts
) -> None:
    old = content(fleet.ask(LEGAL, max_tokens=200, ignore_eos=True))
    begun, pieces = threading.Event(), list[str]()

    def stream() -> None:
        body = {
            "model": LEGAL.adapter,
            "messages": [{"role": "user", "content": LEGAL.prompt}],
            "max_tokens": 200,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
        }
        url = f"{fleet.url}/v1/chat/completions"
        with httpx.stream("POST", url, json=body, timeout=120, trust_env=False) as answer:
            for line in answer.iter_lines():
                if line.startswith("data: {"):
                    choices = json.loads(line[len("data: ") :])["choices"]
                    pieces.extend(each["delta"].get("content") or "" for each in choices)
                    begun.set()

    thread = threading.Thread(target=stream)
    thread.start()
    assert begun.wait(60)
    replace(adapters, "legal", ADAPTERS / "medical")
    swapped = sync(fleet, adapters)
    thread.join(120)
    assert (swapped.returncode, swapped.stderr) == (0, "")
    assert "".join(pieces) == old
    assert {ask(fleet, LEGAL) for _ in range(4)} == {pefts_answer(LEGAL, "medical")}


@pytest.mark.parametrize(
    ("fault", "reason"), [("nan", "NaN"), ("shape", "shape")], ids=lambda value: value
)
def test_a_bad_adapter_is_never_published(
    fleet: Fleet, adapters: Path, pefts_answer: Pefts, fault: str, reason: str
) -> None:
    shutil.copytree(ADAPTERS / "legal", adapters / "bad")
    spoil(adapters / "bad", fault)
    refused = sync(fleet, adapters)
    assert refused.returncode == 1
    assert refused.stderr.count("bad refused:") == len(fleet.workers)
    assert reason in refused.stderr
    assert "multilora-refused" not in refused.stderr
    assert loaded(fleet) == [NAMES, NAMES]
    assert fleet.models() == {"base", *NAMES}
    assert ask(fleet, LEGAL) == pefts_answer(LEGAL, "legal")


def test_a_worker_that_is_started_again_serves_all_adapters(
    fleet: Fleet, adapters: Path, pefts_answer: Pefts
) -> None:
    right = pefts_answer(LEGAL, "legal")
    with started("sync", fleet.sync_command(adapters, "--every", str(EVERY_S))):
        worker = fleet.workers[1]
        fleet.kill(worker)

        def is_answered() -> bool:
            answer = fleet.ask(LEGAL, max_tokens=PEFT_TOKENS)
            return answer.is_success and content(answer) == right

        fleet.wait("the other worker to answer", is_answered, 60)
        fleet.start(worker)
        fleet.await_start(worker)
        fleet.wait("all adapters on both workers", lambda: loaded(fleet) == [NAMES, NAMES], 60)
        time.sleep(2 * EVERY_S)
        assert [ask(fleet, LEGAL) for _ in range(6)] == 6 * [right]


def test_a_workers_metrics_have_each_series_once(fleet: Fleet, adapters: Path) -> None:
    for worker in fleet.workers:
        text = httpx.get(f"{worker.url}/metrics", trust_env=False).text
        series = [line.rpartition(" ")[0] for line in text.splitlines() if line[:1] not in "#"]
        ours = [each for each in series if each.startswith("vllm:lora_")]
        assert ours
        assert len(ours) == len(set(ours))
