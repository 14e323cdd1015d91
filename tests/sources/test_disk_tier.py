"""The disk cache: within its limit whoever writes, what is in use stays, the oldest goes first."""

import multiprocessing
import os
import random
import subprocess
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from tests.sources.conftest import adapter
from tests.sources.web_server import Fault
from vllm_multilora.failures import FailureKind
from vllm_multilora.sources.disk_tier import LEASE, DiskTier, lease_of
from vllm_multilora.sources.source_errors import SourceError
from vllm_multilora.store.protocol.messages import Loaded, LoadRequest

NBYTES = 100_000
LIMIT = 5 * NBYTES + NBYTES // 2


def put(tier: DiskTier, key: str, nbytes: int = NBYTES) -> Path:
    with tier.fetching(key, nbytes, 20) as incoming:
        if incoming is None:
            found = tier.find(key, nbytes)
            assert found is not None
            return found
        for part in range(10):
            with (incoming.folder / "weights").open("ab") as file:
                file.write(os.urandom(nbytes // 10))
            time.sleep(0.001 * part)
        adapter = tier.publish(incoming, key, nbytes)
        lease = lease_of(adapter)
        assert lease is not None, "others cannot use it yet"
        os.close(lease)
        return adapter


def used_by(tier: DiskTier) -> int:
    found = 0
    for place in ("entries", "incoming"):  # in this order nothing that moves is counted twice
        for folder, _, names in os.walk(tier.folder / place):
            for name in names:
                with suppress(FileNotFoundError):
                    found += (Path(folder) / name).stat().st_size
    return found


def write_some(folder: Path, seed: int) -> None:
    tier, chance = DiskTier(folder, LIMIT), random.Random(seed)
    for _ in range(12):
        try:
            adapter = put(tier, f"key{chance.randrange(20)}")
        except SourceError:
            time.sleep(0.01)
            continue
        if (lease := lease_of(adapter)) is not None:
            assert (adapter / "weights").stat().st_size == NBYTES
            os.close(lease)


def test_ten_writers_stay_below_the_limit_at_any_time(tmp_path: Path) -> None:
    tier = DiskTier(tmp_path, LIMIT)
    context = multiprocessing.get_context("fork")
    writers = [context.Process(target=write_some, args=(tmp_path, seed)) for seed in range(10)]
    for writer in writers:
        writer.start()
    most = 0
    while any(writer.is_alive() for writer in writers):
        most = max(most, used_by(tier))
    for writer in writers:
        writer.join()
    assert [writer.exitcode for writer in writers] == [0] * 10
    assert 3 * NBYTES < most <= LIMIT


def test_what_was_used_longest_ago_makes_room(tmp_path: Path) -> None:
    tier = DiskTier(tmp_path, 3 * NBYTES)
    for number, key in enumerate(("a", "b", "c")):
        entry = put(tier, key).parent / LEASE
        os.utime(entry, (1000 + number, 1000 + number))
    assert tier.find("a", NBYTES) is not None  # and so is used now
    put(tier, "d")
    assert [tier.find(key, NBYTES) is not None for key in "abcd"] == [True, False, True, True]


def test_what_is_in_use_stays_and_the_new_one_is_refused(tmp_path: Path) -> None:
    tier = DiskTier(tmp_path, 2 * NBYTES)
    leases = [lease_of(put(tier, key)) for key in "ab"]
    with pytest.raises(SourceError, match="--multilora-disk-cache-gib"):
        put(tier, "c")
    assert leases[0] is not None
    os.close(leases[0])
    put(tier, "c")
    assert [tier.find(key, NBYTES) is not None for key in "abc"] == [False, True, True]


def test_what_an_ended_process_left_is_resumed_or_makes_room(tmp_path: Path) -> None:
    tier = DiskTier(tmp_path, 2 * NBYTES)
    with tier.fetching("a", NBYTES, 1) as incoming:
        assert incoming is not None
        (incoming.folder / "weights").write_bytes(b"some")
        # Its whole size counts, though it has a part of it.
        with pytest.raises(SourceError), tier.fetching("b", NBYTES + 1, 1):
            pass
    with tier.fetching("a", NBYTES, 1) as incoming:
        assert incoming is not None
        assert (incoming.folder / "weights").read_bytes() == b"some"
    assert tier.find("a", NBYTES) is None
    put(tier, "b", 2 * NBYTES)
    assert list((tmp_path / "incoming").iterdir()) == []


def test_an_adapter_that_no_disk_has_room_for_is_refused(tmp_path: Path) -> None:
    tier = DiskTier(tmp_path, 1 << 60)
    with pytest.raises(SourceError, match="bytes free on its disk"):
        put(tier, "a", 1 << 59)


@pytest.fixture
def small_disk(cache: Path) -> Iterator[Path]:
    """A disk of 1 MiB, on which the disk cache is."""
    cache.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=1m", "none", str(cache)]
    if subprocess.run(command, check=False, capture_output=True).returncode:
        pytest.skip("to mount a small disk one must be root")
    yield cache
    subprocess.run(["umount", "--lazy", str(cache)], check=True)


def test_a_full_disk_hurts_only_new_fetches(small_disk, engines, web, tmp_path):
    for name in "ab":
        web.put(f"/loras/{name}", adapter(tmp_path / name))
    url, full = f"{web.address}/loras", small_disk / "others"
    engine = engines(url)
    assert isinstance(engine.load(1, f"{url}/a"), Loaded)
    engine.client.forget(1)
    weights = "adapter_model.safetensors"
    web.faults = [Fault("GET", weights, "cut", 2000), Fault("GET", weights, "delay", 3)]
    ticket = engine.client.request_load(LoadRequest(2, "b", f"{url}/b"))
    incoming = small_disk / "incoming"
    engine.until(lambda: any(f.stat().st_size >= 2000 for f in incoming.rglob(weights)))
    with full.open("wb", buffering=0) as file, suppress(OSError):
        while True:  # somebody else's
            file.write(bytes(4096))
    failed = engine.answer(ticket)
    assert failed.kind is FailureKind.NO_MEMORY
    assert "--multilora-disk-cache" in failed.message
    assert isinstance(engine.load(1, f"{url}/a", fresh=True), Loaded)
    full.unlink()
    assert isinstance(engine.load(3, f"{url}/b", fresh=True), Loaded)
