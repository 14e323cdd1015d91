"""What workers, engines and the API server tell of adapters, put together."""

from types import SimpleNamespace

from vllm_multilora.integration.adapter_status import listing, merge_workers


def worker(*, slot: int | None = None, **fields: object) -> dict:
    row = {
        "name": "acme",
        "path": "/adapters/acme",
        "state": "cpu" if slot is None else "gpu",
        "slot": slot,
        "rank": 8,
        "bytes": 100,
        "pinned": False,
        "hits": 2,
        "loads": 1,
        "last_used": 50.0,
        "last_error": None,
        **fields,
    }
    return {
        "adapters": {7: row},
        "slots": {"total": 4, "free": 3},
        "cpu": {"adapters": 1, "bytes": 100, "bytes_limit": 1000, "adapters_limit": None},
    }


ACME = SimpleNamespace(lora_int_id=7, lora_name="acme", lora_path="/adapters/acme")


def test_workers_of_one_engine_share_an_adapter():
    report = merge_workers([worker(slot=1), worker(slot=1)], {7: 5})
    [row] = report["adapters"]
    assert (row["int_id"], row["state"], row["slot"]) == (7, "gpu", 1)
    assert (row["bytes"], row["requests"], row["hits"]) == (200, 5, 2)
    assert report["slots"] == {"total": 4, "free": 3}
    assert report["cpu"] == {
        "adapters": 1,
        "bytes": 200,
        "bytes_limit": 2000,
        "adapters_limit": None,
    }


def test_an_adapter_is_as_far_as_its_slowest_worker():
    failed = worker(state="failed", last_error="the disk is gone", slot=None)
    [row] = merge_workers([worker(), failed], {})["adapters"]
    assert (row["state"], row["last_error"]) == ("failed", "the disk is gone")


def test_one_engine_lists_its_adapters_without_engines():
    found = listing([merge_workers([worker(slot=1)], {7: 5})], [ACME])
    [row] = found["data"]
    assert row == {
        "id": "acme",
        "object": "lora_adapter",
        "int_id": 7,
        "path": "/adapters/acme",
        "state": "gpu",
        "tier": "gpu",
        "slot": 1,
        "rank": 8,
        "bytes": 100,
        "pinned": False,
        "requests": 5,
        "hits": 2,
        "loads": 1,
        "last_used": 50.0,
        "last_error": None,
    }


def test_several_engines_add_up_and_say_what_each_has():
    reports = [
        merge_workers([worker(last_used=60.0)], {7: 5}),
        merge_workers([worker(slot=2)], {7: 1}),
    ]
    found = listing(reports, [ACME])
    [row] = found["data"]
    assert (row["state"], row["slot"], row["requests"], row["bytes"]) == ("gpu", 2, 6, 200)
    assert row["last_used"] == 60.0
    assert row["engines"] == [
        {"engine": 0, "state": "cpu", "slot": None},
        {"engine": 1, "state": "gpu", "slot": 2},
    ]
    assert found["slots"] == {"total": 8, "free": 6}
    assert found["cpu"]["bytes_limit"] == 2000


def test_names_that_no_worker_knows_are_on_disk():
    other = SimpleNamespace(lora_int_id=8, lora_name="zeta", lora_path="/adapters/zeta")
    report = merge_workers([worker()], {})
    acme, zeta = listing([report], [other, ACME])["data"]
    assert acme["id"] == "acme"
    assert (zeta["id"], zeta["state"], zeta["rank"], zeta["bytes"]) == ("zeta", "disk", None, 0)


def test_an_adapter_that_a_request_brought_along_is_listed_and_an_old_version_is_not():
    report = merge_workers([worker()], {})
    assert [row["int_id"] for row in listing([report], [])["data"]] == [7]
    newer = SimpleNamespace(lora_int_id=9, lora_name="acme", lora_path="/adapters/acme")
    assert [row["int_id"] for row in listing([report], [newer])["data"]] == [9]
