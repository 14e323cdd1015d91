"""What a job says is taken in its turn and within bounds: nobody knows what a file made of it."""

import selectors
import socket
import time

import msgspec
import numpy as np
import pytest

from tests.store.loads.registries import CONTENTS, PAGE, World, digest_of
from vllm_multilora.adapters.blend import MAX_PARTS, Blend, BlendPart
from vllm_multilora.failures import FailureKind
from vllm_multilora.store.jobs import job_pool as job_pools
from vllm_multilora.store.jobs.job_pool import BRIEF_S, MAX_STUCK, JobPool
from vllm_multilora.store.jobs.runner import End, Use
from vllm_multilora.store.protocol.channel import Channel
from vllm_multilora.store.protocol.job_messages import (
    LONGEST_FIELD,
    LONGEST_MESSAGE,
    MAX_CHARACTERS,
    MAX_PROBLEMS,
    Checked,
    Done,
    Failure,
    Opened,
    Place,
    ToJob,
)
from vllm_multilora.store.protocol.messages import Failed, Loaded, StoreSettings

DIGEST = digest_of("an adapter")


def blocks(*nbytes: int) -> bytes:
    return np.array(nbytes, np.int64).tobytes()


OPENED = Opened("version")
CHECKED = Checked(CONTENTS, blocks(PAGE))
DONE = Done(DIGEST, 64, ())


class PlayedJob:
    """A job whose words are the test's."""

    def __init__(self) -> None:
        self.ours, theirs = socket.socketpair()
        theirs.setblocking(False)
        self.channel = Channel(theirs, ToJob)
        self.is_killed = False
        self.can_end = True
        self.processor_s = 0.0
        self.refused_yields = 0
        self.yields = 0

    def kill(self) -> None:
        self.is_killed = True

    def gone(self) -> End | None:
        return End("was killed by signal 9") if self.is_killed and self.can_end else None

    def use(self) -> Use:
        return Use(self.processor_s, is_ready=False)

    def yield_processors(self) -> bool:
        self.yields += 1
        return self.yields > self.refused_yields


class JobPoolWorld(World):
    """A registry with a pool, at which the test plays the jobs and not what the pool does."""

    def __init__(self) -> None:
        super().__init__(StoreSettings(budget_bytes=100 * PAGE, jobs=MAX_STUCK + 1))
        self.now = time.monotonic()
        self.started: dict[str, PlayedJob] = {}
        self.selector = selectors.DefaultSelector()
        self.job_pool = JobPool(self.Runner(self.started), None, self.selector)

    class Runner:
        def __init__(self, started: dict[str, PlayedJob]) -> None:
            self._started = started

        def start(self, load, reader):
            job = self._started[load.path] = PlayedJob()
            return job, job.ours

    def start(self, load):
        self.loads[load.number] = load
        self.job_pool.start(load)

    def tell(self, job, message, segments):
        self.job_pool.tell(job, message, [])

    def kill(self, job):
        self.job_pool.kill(job)

    def refusal(self, path):
        return self.job_pool.refusal(path)

    def number(self, path: str) -> int:
        return max(number for number, load in self.loads.items() if load.path == path)

    def say(self, path: str, *messages) -> list:
        """A job says something; what the store answers to all of it."""
        job = self.started[path]
        for message in messages:
            job.channel.send(message)
        self.job_pool.hear(self.number(path), self.registry.loads)
        if job.is_killed:
            return []
        return [message for message, _ in job.channel.receive()]

    def look(self) -> None:
        self.job_pool.look(self.registry.loads)
        self.registry.loads.tick(self.now)


@pytest.fixture
def world() -> JobPoolWorld:
    return JobPoolWorld()


def test_a_job_that_says_what_it_should_is_heard(world):
    client = world.client(-1)
    ticket = world.request_load(client, 1)
    assert world.say("/adapters/1", OPENED) == []
    (place,) = world.say("/adapters/1", CHECKED)
    assert isinstance(place, Place)
    world.say("/adapters/1", DONE)
    assert isinstance(world.answer(client, ticket), Loaded)


def test_job_of_known_files_when_it_has_gone_on_is_killed_unheard(world):
    client = world.client(-1)
    first, second = world.request_load(client, 1), world.request_load(client, 2)
    for message in (OPENED, CHECKED, DONE):
        world.say("/adapters/1", message)
    assert isinstance(world.answer(client, first), Loaded)
    assert world.say("/adapters/2", OPENED, CHECKED) == []
    assert world.started["/adapters/2"].is_killed
    assert isinstance(world.answer(client, second), Loaded)
    assert world.memory.totals().bytes == PAGE


def test_what_a_socket_cannot_hold_is_said_bit_by_bit(world):
    count = 100_000  # as many as a mixture of experts may have
    world.client(-1, budget_bytes=PAGE * count)
    world.request_load(-1, 1)
    world.say("/adapters/1", OPENED)
    job = world.started["/adapters/1"].channel
    job.send(Checked(CONTENTS, blocks(*[64] * count)))
    world.selector.register(job, selectors.EVENT_READ)
    said: list = []
    while not said:
        job.flush()
        due = world.selector.select(10.0)
        assert due, "the pool waits for nothing, and the job for its place"
        for key, _ in due:
            if key.fileobj is job:
                said += job.receive()
            else:
                world.job_pool.hear(key.data, world.registry.loads)
    ((place, _),) = said
    assert len(place.places) == 8 * count
    assert {key.events for key in world.selector.get_map().values()} == {selectors.EVENT_READ}


def test_a_place_that_a_job_has_waited_for_is_said_bit_by_bit_too(world, monkeypatch):
    count = 5000
    world.client(-1, budget_bytes=PAGE * count)
    world.request_load(-1, 1)
    world.say("/adapters/1", OPENED)
    world.started["/adapters/1"].ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1)
    with monkeypatch.context() as no_room:
        no_room.setattr(world.memory, "room", lambda blocks, *, evict: None)
        world.say("/adapters/1", Checked(CONTENTS, blocks(*[64] * count)))
    world.registry.loads.give_room(world.now)
    (key,) = world.selector.get_map().values()
    assert key.events == selectors.EVENT_READ | selectors.EVENT_WRITE


def test_a_job_that_hangs_up_is_killed_and_its_adapter_fails(world):
    client = world.client(-1)
    ticket = world.request_load(client, 1)
    world.started["/adapters/1"].channel.close()
    world.job_pool.hear(world.number("/adapters/1"), world.registry.loads)
    assert world.started["/adapters/1"].is_killed
    assert world.started["/adapters/1"].ours.fileno() == -1
    world.look()
    assert "was killed by signal 9" in world.answer(client, ticket).message


@pytest.mark.parametrize("refused", [0, 2])
def test_job_yields_processors_once_it_has_used_more_than_a_brief_time(world, refused):
    """It is asked again where the system was busy."""
    world.request_load(world.client(-1), 1)
    job = world.started["/adapters/1"]
    job.processor_s, job.refused_yields = BRIEF_S / 2, refused
    world.look()
    assert job.yields == 0
    job.processor_s = BRIEF_S
    for _ in range(5):
        world.look()
    assert job.yields == refused + 1


def test_what_jobs_do_is_looked_at_while_others_wait(world, monkeypatch):
    seen, queue = [], world.registry.loads.queue
    monkeypatch.setattr(queue, "looked_at", lambda number, *use, **state: seen.append(number))
    client = world.client(-1)
    world.request_load(client, 1)
    world.look()
    assert not seen
    queue.places = 1
    world.request_load(client, 2)
    world.look()
    assert seen == [world.number("/adapters/1")]


def test_a_job_that_waits_for_room_has_nothing_to_say(world, monkeypatch):
    client = world.client(-1)
    ticket = world.request_load(client, 1)
    world.say("/adapters/1", OPENED)
    monkeypatch.setattr(world.memory, "room", lambda blocks, *, evict: None)
    assert world.say("/adapters/1", CHECKED) == []
    world.say("/adapters/1", CHECKED)
    assert "out of turn" in world.answer(client, ticket).message


@pytest.mark.parametrize("is_noticed", [True, False])
def test_room_for_a_job_that_has_hung_up_is_given_back(world, monkeypatch, is_noticed):
    client = world.client(-1)
    ticket = world.request_load(client, 1)
    world.say("/adapters/1", OPENED)
    with monkeypatch.context() as no_room:
        no_room.setattr(world.memory, "room", lambda blocks, *, evict: None)
        world.say("/adapters/1", CHECKED)
    world.started["/adapters/1"].channel.close()
    if is_noticed:
        world.job_pool.hear(world.number("/adapters/1"), world.registry.loads)
    world.registry.loads.give_room(world.now)
    assert world.started["/adapters/1"].is_killed
    assert world.memory.totals().bytes == PAGE  # until it has ended
    world.look()
    assert isinstance(world.answer(client, ticket), Failed)
    assert world.memory.totals().bytes == 0


def test_a_job_may_fail_at_any_time(world):
    client = world.client(-1)
    ticket = world.request_load(client, 1)
    world.say("/adapters/1", Failure(FailureKind.INVALID, "it is broken", []))
    assert world.answer(client, ticket).message == "it is broken"


def test_a_failure_is_kept_in_bounded_length():
    large = Failure(FailureKind.INVALID, "x" * 10**7, [{"message": "m" * 10**6, "count": 3}] * 999)
    kept = large.bounded()
    assert len(kept.message) <= LONGEST_MESSAGE
    first = kept.problems[0]
    assert first["count"] == 3
    assert len(first["message"]) <= LONGEST_FIELD
    length = sum(len(key) + len(str(value)) for key, value in first.items())
    assert kept.problems == [first] * (MAX_CHARACTERS // length)


def test_a_failure_of_that_length_is_kept_as_it_is():
    problems = [{"message": "m", "count": number} for number in range(MAX_PROBLEMS)]
    failure = Failure(FailureKind.INVALID, "x" * LONGEST_MESSAGE, problems)
    assert failure.bounded() == failure


def test_what_a_job_says_of_its_failure_is_cut_to_what_may_be_kept(world):
    client = world.client(-1)
    ticket = world.request_load(client, 1)
    world.say("/adapters/1", Failure(FailureKind.INVALID, "x" * 2 * LONGEST_MESSAGE, []))
    assert len(world.answer(client, ticket).message) <= LONGEST_MESSAGE


@pytest.mark.parametrize(
    "said",
    [
        pytest.param([DONE], id="done before it has opened anything"),
        pytest.param([CHECKED], id="checked before it has opened anything"),
        pytest.param([OPENED, OPENED], id="opened twice"),
        pytest.param([OPENED, DONE], id="done before it has checked anything"),
        pytest.param([OPENED, CHECKED, CHECKED], id="checked twice, for a second place"),
    ],
)
def test_a_job_that_speaks_out_of_turn_fails_alone(world, said):
    client = world.client(-1)
    hostile, honest = world.request_load(client, 1), world.request_load(client, 2)
    world.say("/adapters/1", *said, OPENED, CHECKED)  # and goes on speaking
    world.job_pool.hear(world.number("/adapters/1"), world.registry.loads)
    failed = world.answer(client, hostile)
    assert isinstance(failed, Failed)
    assert failed.kind is FailureKind.INTERNAL
    assert "/adapters/1" in failed.message
    assert "out of turn" in failed.message
    assert world.started["/adapters/1"].is_killed
    world.look()
    assert world.memory.totals().bytes == 0  # nothing stays taken
    for message in (OPENED, CHECKED, DONE):
        world.say("/adapters/2", message)
    assert isinstance(world.answer(client, honest), Loaded)


@pytest.mark.parametrize(
    ("said", "reason"),
    [
        pytest.param(Checked(CONTENTS, b""), "not positive", id="no blocks"),
        pytest.param(Checked(CONTENTS, blocks(64, -64)), "not positive", id="a negative block"),
        pytest.param(Checked(CONTENTS, blocks(65)), "multiples of 64", id="an odd block"),
        pytest.param(Checked(CONTENTS, blocks(64)[:5]), "buffer size", id="half a number"),
        pytest.param(Checked(CONTENTS, blocks(1 << 60)), "too large", id="a huge block"),
        pytest.param(
            Checked(CONTENTS, blocks(*[1 << 40] * 1025)), "too large", id="blocks that overflow"
        ),
        pytest.param(Checked(CONTENTS, blocks(1 << 41)), "too large", id="a large block"),
        pytest.param(
            Checked(msgspec.structs.replace(CONTENTS, invocation_tokens=(-1,)), blocks(64)),
            "tokens",
            id="a negative token",
        ),
        pytest.param(Done("short", 64, ()), "digest", id="no digest"),
        pytest.param(
            Checked(msgspec.structs.replace(CONTENTS, invocation_tokens=(1,) * 65), blocks(64)),
            "tokens",
            id="too many tokens",
        ),
        pytest.param(Done(DIGEST, -1, ()), "size", id="a negative size"),
        pytest.param(Done(DIGEST, 1 << 50, ()), "size", id="a huge size"),
        pytest.param(Done(DIGEST, 64, ("short",)), "digest", id="no digest of a part"),
        pytest.param(Done(DIGEST, 64, (DIGEST,) * (MAX_PARTS + 1)), "parts", id="too many parts"),
    ],
)
def test_numbers_that_no_honest_job_gives_fail_its_adapter(world, said, reason):
    client = world.client(-1)
    ticket = world.request_load(client, 1)
    world.say("/adapters/1", OPENED)
    if isinstance(said, Done):
        world.say("/adapters/1", CHECKED)
    world.say("/adapters/1", said)
    failed = world.answer(client, ticket)
    assert failed.kind is FailureKind.INTERNAL
    assert reason in failed.message


def test_jobs_that_hang_on_one_mount_stop_new_ones_there_and_nowhere_else(world, monkeypatch):
    monkeypatch.setattr(job_pools, "_mount_points", lambda: ["/", "/slow", "/slow/deep", "/sound"])
    client = world.client(-1)
    for number in range(MAX_STUCK):
        world.request_load(client, number, path=f"/slow/{number}")
        world.started[f"/slow/{number}"].can_end = False
        world.kill(world.number(f"/slow/{number}"))
    assert world.job_pool.stuck == 0  # they may end yet
    monkeypatch.setattr(job_pools, "_now", lambda: time.monotonic() + 60)
    assert world.job_pool.stuck == MAX_STUCK
    refusal = world.refusal("/slow/another")
    assert refusal is not None
    assert "/slow do not end" in refusal
    assert world.refusal("/slow") is not None
    for path in ("/sound/another", "/slow/deep/er/a", "/slower/a"):
        assert world.refusal(path) is None
    parts = (BlendPart(1, "a", "/slow/a", 1.0), BlendPart(2, "b", "/sound/b", 1.0))
    assert world.refusal(Blend.of(parts).source) is not None
    world.started["/slow/0"].can_end = True
    world.look()
    assert world.job_pool.stuck == MAX_STUCK - 1
    assert world.refusal("/slow/another") is None
