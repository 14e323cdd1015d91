"""Ray Serve LLM over a bucket, with this plugin; answers are compared with PEFT's.

Not among the tests of `make test`, since it needs Ray: `make test-ray`.
"""

import shutil
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import psutil
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
from prompts import ADAPTED, ADAPTERS

RESTART_LIMIT_S = 240.0


@pytest.fixture(scope="module")
def fleet() -> Iterator[Fleet]:
    with Fleet(build_base_model()) as fleet:
        for customer in ADAPTED:
            fleet.put(str(customer.adapter), ADAPTERS / str(customer.adapter))
        yield fleet


def test_first_requests_at_once_for_a_cold_adapter_are_all_answered(
    fleet: Fleet, pefts_answer: Pefts
) -> None:
    """Ray loads an adapter once for each of them."""
    fleet.put("burst", ADAPTERS / "legal")
    with ThreadPoolExecutor(6) as threads:
        answers = list(threads.map(lambda _: ask(fleet, LEGAL, "burst"), range(6)))
    assert answers == 6 * [pefts_answer(LEGAL, "legal")]


def test_forty_mixed_answers_are_pefts(fleet: Fleet, pefts_answer: Pefts) -> None:
    assert_forty_mixed_answers_are_pefts(fleet, pefts_answer)


@pytest.mark.parametrize(("fault", "reason"), [("nan", "NaN"), ("shape", "shape")])
def test_a_bad_adapter_is_refused_with_its_reason_and_harms_nobody(
    fleet: Fleet, pefts_answer: Pefts, tmp_path: Path, fault: str, reason: str
) -> None:
    folder = Path(shutil.copytree(ADAPTERS / "legal", tmp_path / "bad"))
    spoil(folder, fault)
    fleet.put(f"bad-{fault}", folder)
    answer = fleet.ask(LEGAL, f"bad-{fault}")
    assert answer.status_code >= 400
    assert reason in answer.text
    assert "multilora-refused" not in answer.text
    assert ask(fleet, LEGAL) == pefts_answer(LEGAL, "legal")


def test_an_adapter_that_is_not_in_the_bucket_is_not_answered_by_the_base_model(
    fleet: Fleet,
) -> None:
    assert fleet.ask(LEGAL, "missing").status_code == 404


def test_new_weights_under_a_new_name_serve_beside_the_old_ones(
    fleet: Fleet, pefts_answer: Pefts
) -> None:
    """Ray keeps what it has downloaded: under an old name it serves the old weights."""
    fleet.put("legal-v2", ADAPTERS / "medical")
    assert ask(fleet, LEGAL, "legal-v2") == pefts_answer(LEGAL, "medical")
    assert ask(fleet, LEGAL) == pefts_answer(LEGAL, "legal")


def test_a_replica_that_is_killed_comes_back_with_its_adapters(
    fleet: Fleet, pefts_answer: Pefts
) -> None:
    [replica] = [
        each
        for each in psutil.process_iter(["cmdline"])
        if "LLMServer" in " ".join(each.info["cmdline"] or [])
    ]
    replica.kill()
    right, end = pefts_answer(LEGAL, "legal"), time.monotonic() + RESTART_LIMIT_S
    while True:
        try:
            answer = fleet.ask(LEGAL, max_tokens=PEFT_TOKENS)
            if answer.is_success:
                assert content(answer) == right
                return
        except httpx.TransportError:
            pass
        assert time.monotonic() < end
        time.sleep(1)
