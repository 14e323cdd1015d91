"""Dynamo's frontend and two workers with this plugin; answers are compared with PEFT's.

Not among the tests of `make test`, since it needs Dynamo: `make test-dynamo`.
"""

import json
import runpy
import shutil
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

PEFT_TOKENS = 12
ASKED_AT_ONCE = 8
EVERY_S = 1.0

example = runpy.run_path(str(Path(__file__).with_name("fleet.py")))
ADAPTED, ADAPTERS, CUSTOMERS = (example[name] for name in ("ADAPTED", "ADAPTERS", "CUSTOMERS"))
NAMES = {str(customer.adapter) for customer in ADAPTED}
Pefts = Callable[[Any, str | None], str]
LEGAL = next(customer for customer in CUSTOMERS if customer.adapter == "legal")


@pytest.fixture(scope="module")
def fleet() -> Iterator[Any]:
    with example["Fleet"](example["build_base_model"](), step_metrics=True) as fleet:
        yield fleet


@pytest.fixture
def adapters(tmp_path: Path, fleet: Any) -> Path:
    """A folder with the demo's adapters, which all workers serve."""
    folder = tmp_path / "adapters"
    shutil.copytree(ADAPTERS, folder)
    assert sync(fleet, folder, "--remove").returncode == 0
    fleet.wait("all adapters", lambda: fleet.models() == {"base", *NAMES}, 30)
    return folder


def sync(fleet: Any, folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    command = fleet.sync_command(folder, *options)
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


def content(answer: httpx.Response) -> str:
    assert answer.status_code == 200, answer.text
    return str(answer.json()["choices"][0]["message"]["content"])


def ask(fleet: Any, customer: Any) -> str:
    return content(fleet.ask(customer, max_tokens=PEFT_TOKENS))


def replace(folder: Path, adapter: str, by: Path) -> None:
    """Puts another adapter's files in the place of an adapter's own."""
    new = folder / f".{adapter}"
    shutil.copytree(by, new)
    (folder / adapter).rename(folder / f".old-{adapter}")
    new.rename(folder / adapter)


def loaded(fleet: Any) -> list[set[str]]:
    """The adapters of each worker."""
    urls = [f"{worker.url}/v1/loras" for worker in fleet.workers]
    return [set(httpx.get(url, trust_env=False).json()["loras"]) for url in urls]


def test_forty_mixed_answers_are_pefts(fleet: Any, adapters: Path, pefts_answer: Pefts) -> None:
    right = {each.name: pefts_answer(each, each.adapter) for each in CUSTOMERS}
    asked = [CUSTOMERS[number % len(CUSTOMERS)] for number in range(40)]
    with ThreadPoolExecutor(ASKED_AT_ONCE) as threads:
        answers = list(threads.map(lambda customer: ask(fleet, customer), asked))
    assert answers == [right[customer.name] for customer in asked]


def test_every_worker_serves_every_adapter_and_syncing_again_changes_nothing(
    fleet: Any, adapters: Path
) -> None:
    assert loaded(fleet) == [NAMES, NAMES]
    again = sync(fleet, adapters)
    assert (again.returncode, again.stderr) == (0, "")
    assert loaded(fleet) == [NAMES, NAMES]


def test_the_first_worker_has_dynamos_own_scheduler(fleet: Any) -> None:
    child = fleet.workers[0].child
    assert child is not None
    log = child.log.read_text()
    assert "InstrumentedScheduler" in log
    assert "vllm-multilora" in log


def test_a_hot_swap_lets_a_running_stream_end_with_the_old_weights(
    fleet: Any, adapters: Path, pefts_answer: Pefts
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
    fleet: Any, adapters: Path, pefts_answer: Pefts, fault: str, reason: str
) -> None:
    import torch
    from safetensors.torch import load_file, save_file

    shutil.copytree(ADAPTERS / "legal", adapters / "bad")
    file = adapters / "bad" / "adapter_model.safetensors"
    tensors = load_file(file)
    name = next(each for each in sorted(tensors) if "lora_B" in each)
    if fault == "nan":
        tensors[name][0, 0] = torch.nan
    else:
        tensors[name] = tensors[name][:-1].contiguous()
    save_file(tensors, file)
    refused = sync(fleet, adapters)
    assert refused.returncode == 1
    assert refused.stderr.count("bad refused:") == len(fleet.workers)
    assert reason in refused.stderr
    assert "multilora-refused" not in refused.stderr  # the form in which processes tell each other
    assert loaded(fleet) == [NAMES, NAMES]
    assert fleet.models() == {"base", *NAMES}
    assert ask(fleet, LEGAL) == pefts_answer(LEGAL, "legal")


def test_a_worker_that_is_started_again_serves_all_adapters(
    fleet: Any, adapters: Path, pefts_answer: Pefts
) -> None:
    right = pefts_answer(LEGAL, "legal")
    with example["started"]("sync", fleet.sync_command(adapters, "--every", str(EVERY_S))):
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


def test_a_workers_metrics_have_each_series_once(fleet: Any, adapters: Path) -> None:
    for worker in fleet.workers:
        text = httpx.get(f"{worker.url}/metrics", trust_env=False).text
        series = [line.rpartition(" ")[0] for line in text.splitlines() if line[:1] not in "#"]
        ours = [each for each in series if each.startswith("vllm:lora_")]
        assert ours
        assert len(ours) == len(set(ours))
