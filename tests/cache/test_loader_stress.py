"""Many threads that call the loader at random."""

import random
import threading
import time

import pytest

from tests.cache.gated_loads import PATIENCE_S, Told
from vllm_multilora.cache.load_failures import LoadDroppedError, LoadFailedError
from vllm_multilora.cache.loader import BackgroundLoader


@pytest.mark.parametrize("seed", range(4))
def test_under_stress_limits_hold_and_every_want_is_answered(seed):
    """Several threads want, take, drop and wait at random; some loads fail."""
    adapters, threads, limit = range(1, 13), 3, 4
    lock = threading.Lock()
    running, faults = [], []
    told = Told()

    def load(request):
        adapter_id, serial = request
        with lock:
            if adapter_id in running or len(running) >= threads:
                faults.append(("at once", adapter_id, list(running)))
            running.append(adapter_id)
        time.sleep(serial % 4 * 0.0005)
        with lock:
            running.remove(adapter_id)
        if serial % 7 == 0:
            raise ValueError("torn")
        return adapter_id

    loader = BackgroundLoader(
        load,
        threads=threads,
        staged_limit=limit,
        timeout_s=PATIENCE_S,
        retry_delay_s=0.002,
        on_done=told,
    )

    def drive(number):
        random_ = random.Random(100 * seed + number)
        for step in range(150):
            adapter_id = random_.choice(adapters)
            action = random_.choice(["want", "want", "want", "take", "take", "drop", "wait"])
            request = (adapter_id, 1000 * number + step)
            try:
                if action == "want":
                    loader.want(adapter_id, request)
                elif action == "take":
                    if loader.take(adapter_id) not in (None, adapter_id):
                        faults.append(("took another", adapter_id))
                elif action == "drop":
                    loader.drop(adapter_id)
                elif loader.wait(adapter_id, request, timeout_s=PATIENCE_S) != adapter_id:
                    faults.append(("waited for another", adapter_id))
            except (LoadFailedError, LoadDroppedError) as error:
                if "within" in str(error):
                    faults.append(("waited in vain", adapter_id))
            counts = loader.counts()
            if counts.loading > threads or counts.hanging:
                faults.append(("counts", counts))

    drivers = [threading.Thread(target=drive, args=(number,)) for number in range(4)]
    for driver in drivers:
        driver.start()
    for driver in drivers:
        driver.join(3 * PATIENCE_S)
    assert not any(driver.is_alive() for driver in drivers)

    # Whatever was left queued must come once there is room, and be told of with its own request.
    for adapter_id in adapters:
        loader.drop(adapter_id)
    told.entries.clear()
    for adapter_id in adapters:
        loader.want(adapter_id, (adapter_id, 1))
    answered = set()
    end = time.monotonic() + PATIENCE_S
    while len(answered) < len(adapters):
        assert time.monotonic() < end
        for adapter_id, reports in told.by_adapter().items():
            answered.add(adapter_id)
            assert [report.request for report in reports] == [(adapter_id, 1)]
            loader.take(adapter_id)
        time.sleep(0.001)
    assert loader.close(PATIENCE_S)
    assert faults == []
