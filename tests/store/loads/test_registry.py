"""What the store decides: who is read for whom, what stays, and what everybody is told."""

import pytest

from tests.store.fake_reader import digest_of
from tests.store.loads.registries import PAGE, World
from vllm_multilora.failures import FailureKind
from vllm_multilora.store.loads.loads import MAX_FAILURES
from vllm_multilora.store.memory.entries import Owner
from vllm_multilora.store.memory.held_packs import MAX_LIMITS, MAX_VERSIONS
from vllm_multilora.store.protocol.messages import Failed, Forgotten, Loaded, Reading, StoreSettings


@pytest.fixture
def world():
    world = World()
    world.client(1)
    yield world
    world.check()


def test_a_load_request_is_notified_of_its_turn_and_of_its_pack(world):
    loaded = world.load(1, pages=2)
    assert [type(m) for m in world.said[1]] == [Reading, Loaded]
    assert loaded.was_read
    assert loaded.leased
    assert world.memory.packs[loaded.pack.pack].allocation.held_bytes == 2 * PAGE
    assert loaded.pack.digest
    assert world.memory.packs[loaded.pack.pack].leases == 1
    allocation = world.memory.packs[loaded.pack.pack].allocation
    assert tuple(loaded.pack.segments) == allocation.segments
    assert loaded.pack.index_place == allocation.places[-1] == PAGE
    assert loaded.pack.index_bytes == PAGE


def test_two_engines_of_a_server_share_one_load(world):
    world.client(2)
    tickets = [(1, world.request_load(1)), (2, world.request_load(2))]
    (job,) = world.jobs
    world.opened(job)
    world.checked(job)
    tickets.append((2, world.request_load(2)))
    assert isinstance(world.said[2][-1], Reading)
    world.done(job)
    packs = [world.answer(*ticket).pack for ticket in tickets]
    assert packs[0] == packs[1] == packs[2]
    assert world.memory.packs[packs[0].pack].leases == 3
    world.settle()


def test_what_a_server_that_has_gone_had_begun_is_its_followers_alone(world):
    world.client(2, server="other")
    world.request_load(2, adapter=7, path="/same")
    world.step(max(world.jobs))
    ticket = world.request_load(1, path="/same")
    world.step(max(world.jobs))  # opened: the same files, for which somebody is on the way
    world.registry.client_gone(2, world.now)
    world.client(3, server="other")
    world.request_load(3, adapter=7, path="/same")
    assert len(world.jobs) == 2, "what the server before had begun is not for this one"
    world.registry.client_gone(3, world.now)
    world.settle()
    loaded = world.answer(1, ticket)
    world.registry.release(1, loaded.pack.pack, world.now)
    world.registry.client_gone(1, world.now)
    world.client(1)
    assert not world.memory.packs


def test_another_server_shares_equal_files_without_reading_them(world):
    one = world.load(1, path="/same")
    world.client(2, server="other")
    two = world.load(2, adapter=7, path="/same")
    assert two.pack == one.pack
    assert not two.was_read
    assert world.read == {"/same": 1}


def test_the_end_of_a_server_leaves_others_loads_to_their_engines(world):
    world.request_load(1)
    world.client(2, server="other")
    world.registry.client_gone(2, world.now)
    world.client(3)
    world.request_load(3)
    assert len(world.jobs) == 1


@pytest.mark.parametrize("then", ["another folder", "a fresh request", "forgotten", "server gone"])
def test_a_failure_answers_for_nothing_else(world, then):
    world.request_load(1)
    world.fail_one()
    if then == "forgotten":
        world.registry.forget(1, 1, world.now)
    elif then == "server gone":
        world.registry.client_gone(1, world.now)
        world.client(1)
    path = "/whole" if then == "another folder" else None
    assert isinstance(world.load(1, path=path, fresh=then == "a fresh request"), Loaded)


def test_one_reading_for_two_adapters_of_an_engine_counts_once(world):
    tickets = [world.request_load(1, adapter, "/same") for adapter in (1, 2)]
    world.settle()
    assert [world.answer(1, ticket).was_read for ticket in tickets] == [True, False]


def test_who_joins_those_that_follow_a_load_learns_that_it_is_read(world):
    for client in (2, 3):
        world.client(client, server="other")
    world.request_load(1, path="/same")
    world.request_load(2, path="/same")
    world.open_all()
    world.request_load(3, path="/same")
    assert [type(message) for message in world.said[3]] == [Reading]


def test_who_follows_a_load_shares_its_failure(world):
    world.client(2, server="other")
    tickets = world.request_load(1, path="/same"), world.request_load(2, path="/same")
    world.open_all()
    (leader,) = world.jobs
    world.failed(leader)
    world.settle()
    assert world.answer(1, tickets[0]).kind is FailureKind.INVALID
    assert world.answer(2, tickets[1]).kind is FailureKind.INVALID


def test_nobody_follows_a_load_that_follows_another(world):
    for client, server in ((2, "other"), (3, "third")):
        world.client(client, server=server)
    tickets = {client: world.request_load(client, path="/same") for client in (1, 2)}
    first, second = world.jobs
    world.opened(second)
    world.opened(first)
    tickets[3] = world.request_load(3, path="/same")
    world.settle()
    assert all(isinstance(world.answer(*ticket), Loaded) for ticket in tickets.items())
    assert world.read == {"/same": 1}


def test_a_failure_names_nobody_elses_adapter(world):
    world.client(2, server="other")
    world.request_load(1, adapter=1, path="/same")
    ticket = world.request_load(2, adapter=2, path="/same")
    world.open_all()
    (leader,) = world.jobs
    world.checked(leader, pages=11)
    failed = world.answer(2, ticket)
    assert failed.kind is FailureKind.NO_MEMORY
    assert "adapter 1" not in failed.message


def test_a_failure_names_no_other_folder_of_the_same_files(world):
    world.client(2, server="other")
    world.request_load(1, path="/same")
    ticket = world.request_load(2, path="/linked")
    world.open_all("the same files")
    world.now += world.settings.timeout_s
    world.registry.loads.tick(world.now)
    assert "/linked" in world.answer(2, ticket).message


def test_nobody_follows_a_load_that_has_less_time(world):
    world.client(2, server="patient", timeout_s=world.settings.timeout_s + 60)
    tickets = world.request_load(1, path="/same"), world.request_load(2, path="/same")
    world.open_all()
    world.now += world.settings.timeout_s
    world.registry.loads.tick(world.now)
    assert world.answer(1, tickets[0]).kind is FailureKind.TIMEOUT
    assert not world.answers(2, tickets[1])
    world.settle()
    assert isinstance(world.answer(2, tickets[1]), Loaded)


@pytest.mark.parametrize("together", [False, True])
def test_models_and_rules_share_nothing(world, together):
    world.client(2, server="b", model="another")
    world.client(3, server="c", budget_bytes=10 * PAGE, allowed_roots=("/same",))
    for client in (1, 2, 3):
        world.request_load(client, path="/same")
        if not together:
            world.settle()
    world.settle()
    assert world.read == {"/same": 3}


@pytest.mark.parametrize(
    "rule",
    [
        {"allowed_roots": ("/same",)},
        {"directories": ("/same",)},
        {"allow_pickle": True},
        {"check_finite": False},
        {"signing_keys": "/keys"},
    ],
    ids=lambda rule: next(iter(rule)),
)
def test_what_was_checked_by_other_rules_is_checked_again(world, rule):
    world.load(1, path="/same")
    world.client(2, server="other", budget_bytes=10 * PAGE, **rule)
    assert world.load(2, path="/same").was_read
    assert world.read == {"/same": 2}
    pack = world.load(1, path="/same").pack.pack
    for _ in range(2):
        world.registry.release(1, pack, world.now)
    world.registry.forget(1, 1, world.now)
    assert list(world.evicted(1)) == [pack]
    assert list(world.evicted(2)) == [], "it has never heard of that one"


def test_equal_bytes_take_memory_once(world):
    world.request_load(1, 1, "/a")
    world.request_load(1, 2, "/b")
    for _ in range(2):
        for job in list(world.jobs):
            world.step(job)
    for job in list(world.jobs):
        world.done(job, digest="same")
    world.settle()
    packs = {m.pack.pack for m in world.said[1] if isinstance(m, Loaded)}
    assert len(packs) == 1
    assert world.memory.totals().bytes == PAGE
    assert world.memory.packs[packs.pop()].leases == 2


def test_changed_files_are_another_pack_and_the_old_one_leaves_with_its_last_lease(world):
    old = world.load(1)
    ticket = world.request_load(1, fresh=True)
    world.read_one("changed", "changed")
    world.settle()
    new = world.answer(1, ticket)
    assert new.pack.pack != old.pack.pack
    assert old.pack.pack in world.memory.packs
    world.registry.release(1, old.pack.pack, world.now)
    assert old.pack.pack not in world.memory.packs


def test_an_adapter_of_another_folder_is_not_the_one_in_memory(world):
    first = world.load(1, 1, path="/old")
    second = world.load(1, 1, path="/new")
    assert second.was_read
    assert second.pack.pack != first.pack.pack


def test_files_without_a_version_are_read_each_time(world):
    for adapter, path in ((1, "/a"), (2, "/b")):
        ticket = world.request_load(1, adapter, path)
        world.read_one("")
        assert world.answer(1, ticket).was_read
        world.settle()
    assert world.read == {"/a": 1, "/b": 1}


def test_nobody_follows_a_load_of_files_without_a_version(world):
    world.client(2, server="other")
    for client in (1, 2):
        world.request_load(client, path="/same")
    world.open_all("")
    assert list(world.jobs.values()) == ["checking"] * 2


def test_what_a_version_of_files_is_was_read_last(world):
    """They may have been changed without being another version."""
    tickets = [world.request_load(1, adapter, f"/{adapter}") for adapter in (1, 2)]
    for step in (lambda job: world.opened(job, "same"), world.checked):
        for job in list(world.jobs):
            step(job)
    for job, digest in zip(list(world.jobs), ("before", "after"), strict=True):
        world.done(job, digest)
    world.settle()
    before, after = (world.answer(1, ticket).pack.pack for ticket in tickets)
    world.registry.release(1, before, world.now)
    world.registry.forget(1, 1, world.now)
    assert set(world.memory.packs) == {after}
    ticket = world.request_load(1, 3, "/3")
    world.opened(next(iter(world.jobs)), "same")
    assert world.answer(1, ticket).pack.pack == after
    world.settle()


def test_a_fresh_request_of_unchanged_files_reads_nothing_again(world):
    first = world.load(1)
    again = world.load(1, fresh=True)
    assert (again.pack, again.was_read) == (first.pack, False)


def test_a_fresh_request_is_content_with_a_load_that_is_still_to_begin(one_job):
    one_job.request_load(1, 9)
    tickets = [one_job.request_load(1, 1, fresh=fresh) for fresh in (False, True)]
    one_job.gone(next(iter(one_job.jobs)))
    (job,) = one_job.jobs
    one_job.opened(job)
    one_job.checked(job)
    one_job.done(job)
    assert len({one_job.answer(1, ticket).pack.pack for ticket in tickets}) == 1
    one_job.settle()


@pytest.mark.parametrize("is_reported", [True, False], ids=["opened", "opening"])
def test_a_fresh_request_is_not_content_with_files_opened_before_it(world, is_reported):
    """A job may have opened them, and the store not have heard it yet."""
    first = world.request_load(1)
    (job,) = world.jobs
    if is_reported:
        world.opened(job, "old")
    fresh = world.request_load(1, fresh=True)
    if not is_reported:
        world.opened(job, "old")
    world.checked(job)
    world.done(job, "old")
    assert world.answers(1, fresh) == []
    world.settle()
    assert world.answer(1, first).pack.digest == digest_of("old")
    assert world.answer(1, fresh).pack.digest == digest_of("/adapters/1")


@pytest.mark.parametrize("cancelled", ["before", "after", None])
def test_a_fresh_request_outlives_the_load_before_it(world, cancelled):
    first = world.request_load(1)
    (job,) = world.jobs
    world.opened(job)
    fresh = world.request_load(1, fresh=True)
    if cancelled == "before":
        world.registry.cancel(1, fresh, world.now)
    world.failed(job)
    assert isinstance(world.answer(1, first), Failed)
    if cancelled == "after":
        world.registry.cancel(1, fresh, world.now)
    world.settle()
    assert world.read == ({} if cancelled else {"/adapters/1": 1})
    assert len(world.answers(1, fresh)) == (not cancelled)


def test_a_fresh_request_outlives_the_one_before_it(world):
    first = world.request_load(1)
    fresh = world.request_load(1, fresh=True)
    world.registry.cancel(1, first, world.now)
    world.settle()
    assert isinstance(world.answer(1, fresh), Loaded)


def test_a_registration_is_checked_though_the_system_gives_no_memory(world, monkeypatch):
    def refuse(blocks, *, evict):
        raise OSError(12, "Cannot allocate memory")

    monkeypatch.setattr(world.memory, "room", refuse)
    loaded = world.load(1, keep=False)
    assert (loaded.pack.pack, loaded.was_read) == (0, True)


def test_a_registration_evicts_nothing(world):
    world.registry.release(1, world.load(1, 1, pages=10).pack.pack, world.now)
    loaded = world.load(1, 2, keep=False)
    assert (loaded.pack.pack, loaded.pack.segments, loaded.pack.index_place) == (0, [], 0)
    assert loaded.was_read
    assert len(world.memory.packs) == 1
    assert loaded.pack.digest
    assert list(world.evicted(1)) == []


def test_a_request_that_joins_a_registration_gets_room(world):
    world.registry.release(1, world.load(1, 1, pages=10).pack.pack, world.now)
    registration = world.request_load(1, 2, keep=False)
    (job,) = world.jobs
    world.opened(job)
    world.checked(job)
    request = world.request_load(1, 2, owners=("acme",))
    world.settle()
    assert world.answer(1, registration).pack.pack == 0
    assert world.answer(1, request).pack.pack in world.memory.packs
    assert kept(world, "acme") == ["/adapters/2"]


def test_a_load_waits_on_for_room_when_one_of_its_requests_has_ended(world):
    full = world.load(1, 1, pages=10).pack.pack
    tickets = [world.request_load(1, 2) for _ in range(2)]
    world.settle()
    world.registry.cancel(1, tickets[0], world.now)
    world.registry.release(1, full, world.now)
    world.settle()
    assert world.answer(1, tickets[1]).leased
    assert world.read["/adapters/2"] == 1


@pytest.mark.parametrize("by", ["cancelling", "going"])
def test_a_registration_waits_for_no_room_once_the_requests_for_it_have_ended(world, by):
    full = world.load(1, 1, pages=10)
    world.client(2)
    request, registration = world.request_load(2, 2), world.request_load(1, 2, keep=False)
    world.settle()
    assert world.answers(1, registration) == []  # one load for both, which waits for room
    if by == "cancelling":
        world.registry.cancel(2, request, world.now)
    else:
        world.registry.client_gone(2, world.now)
    assert not world.registry.loads.queue.waits_for_room("server")
    world.check()
    world.settle()
    assert world.answer(1, registration).pack.pack == 0
    world.registry.release(1, full.pack.pack, world.now)
    assert list(world.evicted(1)) == []
    world.check()


def test_a_server_whose_adapters_fill_the_memory_delays_another_by_a_load():
    """However many of its adapters wait for a slot, and so for room."""
    world = World(StoreSettings(budget_adapters=2, jobs=1))
    full, other = world.client(1, server="full"), world.client(2, server="other")
    packs = [world.load(full, adapter).pack.pack for adapter in (1, 2)]
    waiting = [world.request_load(full, adapter) for adapter in (3, 4, 5, 6)]
    asked = world.request_load(other, 3, "/adapters/others")
    world.settle()
    for pack in packs:  # which slots have now
        world.registry.release(full, pack, world.now)
        world.settle()
    assert isinstance(world.answer(other, asked), Loaded)
    assert [len(world.answers(full, ticket)) for ticket in waiting] == [1, 0, 0, 0]
    world.check()


def test_victims_are_the_least_recently_used_and_never_leased(world):
    packs = [world.load(1, n, pages=3).pack.pack for n in (1, 2, 3)]
    for pack in packs[1:]:
        world.registry.release(1, pack, world.now)
    world.registry.used(1, [packs[1]])
    world.load(1, 4, pages=3)
    assert list(world.evicted(1)) == [packs[2]]


def test_a_policy_is_notified_of_each_step_what_is_in_memory_and_what_has_joined(world):
    packs = [world.load(1, n).pack.pack for n in (1, 2, 3)]
    world.registry.used(1, [packs[1], packs[0]])
    world.registry.used(1, [packs[2], 12345, packs[1]])
    world.registry.used(1, [12345])
    assert world.policy.steps == [(packs[:2], packs[:2]), (packs[1:], packs[2:])]


def test_nothing_leaves_for_what_would_not_fit_even_then(world):
    world.load(1, 1, pages=6)
    world.registry.release(1, world.load(1, 2, pages=3).pack.pack, world.now)
    ticket = world.request_load(1, 3)
    world.settle(pages=8)
    assert world.answers(1, ticket) == []
    assert list(world.evicted(1)) == []


def test_the_clock_of_a_job_goes_on_when_it_has_room(world):
    full = world.load(1, 1, pages=10).pack.pack
    ticket = world.request_load(1, 2)
    world.settle()
    world.now += 1000.0
    world.registry.release(1, full, world.now)
    world.now += world.settings.timeout_s
    world.registry.loads.tick(world.now)
    assert world.answer(1, ticket).kind is FailureKind.TIMEOUT


def test_a_registration_does_not_take_what_a_request_waits_for(world):
    first = world.load(1, 1, pages=6)
    request = world.request_load(1, 2)
    world.settle(pages=6)
    assert world.load(1, 3, keep=False).pack.pack == 0
    world.registry.release(1, first.pack.pack, world.now)
    world.settle()
    assert isinstance(world.answer(1, request), Loaded)


@pytest.mark.parametrize("by", ["cancelling", "crash"])
def test_the_next_in_line_gets_room_when_the_first_needs_none_any_more(world, by):
    world.load(1, 1, pages=6)
    large, small = world.request_load(1, 2), world.request_load(1, 3)
    first, second = world.jobs
    for job, pages in ((first, 6), (second, 2)):
        world.opened(job)
        world.checked(job, pages)
    assert world.jobs[second] == "checked"
    if by == "cancelling":
        world.registry.cancel(1, large, world.now)
    else:
        world.gone(first)
    assert world.jobs[second] == "reading"
    world.settle()
    assert isinstance(world.answer(1, small), Loaded)


def test_the_room_of_a_job_that_has_ended_is_the_next_ones(world):
    ticket, other = world.request_load(1, 1), world.request_load(1, 2)
    first, second = world.jobs
    for job in (first, second):
        world.opened(job)
        world.checked(job, pages=10)
    world.registry.cancel(1, ticket, world.now)
    assert world.jobs[second] == "checked"
    world.gone(first)
    assert world.jobs[second] == "reading"
    world.settle()
    assert isinstance(world.answer(1, other), Loaded)


def test_what_a_registration_has_brought_makes_room_for_who_waits(world):
    world.request_load(1, 1, keep=False)
    request = world.request_load(1, 2)
    first, second = world.jobs
    for job, pages in ((first, 6), (second, 5)):
        world.opened(job)
        world.checked(job, pages)
    assert world.jobs[second] == "checked"
    world.done(first)
    assert world.jobs[second] == "reading"
    world.settle()
    assert isinstance(world.answer(1, request), Loaded)


def test_what_can_never_fit_fails_at_once_with_both_sizes(world):
    failed = world.load(1, pages=11)
    assert failed.kind is FailureKind.NO_MEMORY
    assert "takes 44.0 KiB" in failed.message
    assert "may take 40.0 KiB" in failed.message


def test_what_can_never_fit_any_more_fails_when_the_server_with_the_largest_budget_has_gone():
    """As in a rolling restart. What waits in vain would hold up everything behind it, for ever."""
    world = World()
    world.client(1, server="old", budget_bytes=10 * PAGE)
    world.client(2, server="new", budget_bytes=4 * PAGE)
    world.load(1, 1, pages=6)
    large = world.request_load(2, 2)
    world.settle(pages=5)
    assert world.answers(2, large) == []  # it waits for the old server's lease
    world.registry.client_gone(1, world.now)
    assert world.answer(2, large).kind is FailureKind.NO_MEMORY
    assert isinstance(world.load(2, 3), Loaded)
    world.check()


def test_the_number_of_adapters_has_a_budget_too():
    world = World(StoreSettings(budget_adapters=2))
    world.client(1)
    for adapter in (1, 2, 3):
        world.registry.release(1, world.load(1, adapter).pack.pack, world.now)
    assert world.memory.totals().adapters == 2
    assert len(list(world.evicted(1))) == 1
    world.check()


def test_a_source_that_hangs_delays_no_load_from_another(monkeypatch):
    world = World(StoreSettings(budget_bytes=10 * PAGE, jobs=1))
    monkeypatch.setattr(world, "refusal", lambda path: "it hangs" if path == "/slow" else None)
    world.client(1)
    tickets = [
        world.request_load(1, number, path) for number, path in ((1, "/a"), (2, "/slow"), (3, "/b"))
    ]
    world.failed(next(iter(world.jobs)))
    world.registry.loads.tick(world.now)
    assert world.answer(1, tickets[1]).message == "it hangs"
    assert [world.loads[job].path for job in world.jobs] == ["/b"]


def test_jobs_are_as_many_as_any_asks_for():
    world = World()
    for client, jobs in ((1, 1), (2, 3), (3, 2)):
        world.client(client, jobs=jobs)
    assert world.registry.loads.queue.places == 3


def test_a_smaller_budget_is_kept_to_as_soon_as_leases_allow_it():
    world = World()
    world.client(1, budget_bytes=2 * PAGE)
    world.client(2, server="other")
    packs = [world.load(1, adapter).pack.pack for adapter in range(4)]
    world.registry.client_gone(2, world.now)
    assert world.memory.totals().bytes == 4 * PAGE
    for pack in packs:
        world.registry.release(1, pack, world.now)
    assert isinstance(world.load(1, 9), Loaded)
    assert world.memory.totals().bytes == 2 * PAGE
    world.check()


def test_adapters_that_are_being_read_count_among_those_in_memory():
    world = World(StoreSettings(budget_adapters=1))
    world.client(1)
    tickets = [world.request_load(1, adapter) for adapter in (1, 2)]
    first, second = list(world.jobs)
    for job in (first, second):
        world.opened(job)
        world.checked(job)
    assert [world.jobs[job] for job in (first, second)] == ["reading", "checked"]
    world.done(first)
    world.settle()
    world.registry.release(1, world.answer(1, tickets[0]).pack.pack, world.now)
    world.settle()
    assert isinstance(world.answer(1, tickets[1]), Loaded)
    world.check()


def test_servers_that_count_adapters_and_bytes_both_bound_the_memory():
    """Each one's budget is enough: together they are not without a limit."""
    world = World()
    world.client(1, server="adapters", budget_bytes=None, budget_adapters=2)
    world.client(2, server="bytes", budget_bytes=5 * PAGE, budget_adapters=None)
    for adapter in range(9):
        world.registry.release(2, world.load(2, adapter).pack.pack, world.now)
        world.check()
    assert world.memory.totals().bytes == 5 * PAGE
    for adapter in (10, 11):  # of which two are too many bytes, and not too many adapters
        world.registry.release(1, world.load(1, adapter, pages=4).pack.pack, world.now)
    assert world.memory.totals().bytes == 8 * PAGE
    world.load(2, 12)
    assert world.memory.totals().bytes == 5 * PAGE
    world.check()


def test_a_failure_answers_for_a_while_and_is_forgotten(world):
    ticket = world.request_load(1)
    world.failed(next(iter(world.jobs)))
    assert world.answer(1, ticket).message == "it is broken"
    world.settle()
    world.now += 1.9
    assert isinstance(world.answer(1, world.request_load(1)), Failed)
    assert not world.jobs
    world.now += 0.2
    world.request_load(1)
    assert world.jobs


def test_the_latest_failures_are_kept_in_bounded_number(world):
    for adapter in (*range(MAX_FAILURES), 0, MAX_FAILURES):
        world.request_load(1, adapter, fresh=True)
        world.failed(next(iter(world.jobs)))
        world.gone(next(iter(world.dying)))
    for adapter in (0, 2, MAX_FAILURES):
        assert isinstance(world.answer(1, world.request_load(1, adapter)), Failed)
    world.request_load(1, 1)
    assert world.jobs, "the oldest failure is forgotten"


def until_reading(world: World, pages: int) -> int:
    (job,) = world.jobs
    world.opened(job)
    world.checked(job, pages)
    return job


def starve(world: World, pages: int) -> None:
    """The kernel ends the only job while it reads."""
    world.gone(until_reading(world, pages), FailureKind.NO_MEMORY)


@pytest.mark.parametrize("keep", [True, False])
def test_where_memory_is_used_up_below_the_budget_an_adapter_is_read_once_more(world, keep):
    """The kernel has ended its job: others leave for a request's, and a registration keeps none."""
    idle = [world.load(1, adapter, pages=2).pack.pack for adapter in (2, 3, 4)]
    for pack in idle:
        world.registry.release(1, pack, world.now)
    ticket = world.request_load(1, keep=keep)
    starve(world, 3)
    world.settle(3)
    assert list(world.evicted(1)) == (idle[:2] if keep else [])
    loaded = world.answer(1, ticket)
    assert isinstance(loaded, Loaded)
    assert bool(loaded.pack.pack) == keep


def test_the_system_gets_small_packs_pages_where_memory_is_used_up(world, monkeypatch):
    """What they leave for may not fit in their places, and lies where no pages are yet."""
    numbers = [world.load(1, adapter, pages=2).pack.pack for adapter in (2, 3, 4)]
    (first,) = world.memory.packs[numbers[0]].allocation.extents
    world.registry.release(1, numbers[0], world.now)
    world.registry.release(1, numbers[2], world.now)
    given = []
    monkeypatch.setattr(world.memory.arena._memory, "give_back", lambda *run: given.append(run))
    world.request_load(1)
    starve(world, 3)
    world.settle(3)
    assert tuple(first) in given


@pytest.mark.parametrize(("leased", "jobs"), [(True, 1), (False, 2)])
def test_an_adapter_fails_whose_job_is_ended_again_or_for_which_nobody_can_leave(
    world, leased, jobs
):
    pack = world.load(1, 2, pages=2).pack.pack
    if not leased:
        world.registry.release(1, pack, world.now)
    ticket = world.request_load(1)
    for _ in range(jobs):
        assert not world.answers(1, ticket)
        starve(world, 2)
    assert world.answer(1, ticket).kind is FailureKind.NO_MEMORY
    assert len(world.memory.packs) == leased


def test_a_source_that_hangs_is_refused_at_once(world):
    world.refuse = "its storage hangs"
    failed = world.answer(1, world.request_load(1))
    assert (failed.kind, failed.message) == (FailureKind.TIMEOUT, "its storage hangs")
    assert not world.jobs


def test_a_withdrawn_adapter_leaves_and_its_load_requests_fail(world):
    loaded = world.load(1, 1)
    waiting = world.request_load(1, 2)
    for adapter in (1, 2):
        world.registry.forget(1, adapter, world.now)
    assert world.answer(1, waiting).kind is FailureKind.GONE
    assert [m.adapter for m in world.said[1] if isinstance(m, Forgotten)] == [1, 2]
    assert loaded.pack.pack in world.memory.packs
    world.registry.release(1, loaded.pack.pack, world.now)
    world.settle()
    assert world.memory.totals().bytes == 0


def test_the_failures_of_other_adapters_and_servers_outlive_a_withdrawn_adapter(world):
    world.client(2, server="other")
    for client, adapter in ((1, 2), (2, 1)):
        world.request_load(client, adapter)
        world.fail_one()
    world.registry.forget(1, 1, world.now)
    assert isinstance(world.answer(1, world.request_load(1, 2)), Failed)
    assert isinstance(world.answer(2, world.request_load(2, 1)), Failed)


@pytest.mark.parametrize("path", ["/same", "/other"])
def test_a_withdrawn_adapter_stays_for_other_servers_that_have_it(world, path):
    """And for none whose adapter of the same number is another one."""
    world.client(2, server="other")
    pack = world.load(1, 1, path="/same").pack.pack
    world.load(2, 1, path=path)
    world.registry.release(1, pack, world.now)
    world.registry.forget(1, 1, world.now)
    assert (pack in world.memory.packs) == (path == "/same")


def test_an_adapter_that_one_engine_has_forgotten_still_comes_for_the_others(world):
    for client in (2, 3):
        world.client(client)
    tickets = [world.request_load(client, 1) for client in (1, 2)]
    world.registry.forget(1, 1, world.now)
    assert world.answer(1, tickets[0]).kind is FailureKind.GONE
    joined = world.request_load(3, 1)
    assert len(world.jobs) == 1
    world.settle()
    pack = world.answer(2, tickets[1]).pack
    assert world.answer(3, joined).pack == pack
    again = world.load(2, 1)
    assert (again.pack, again.was_read) == (pack, False)


@pytest.mark.parametrize("by", ["forgetting", "giving back", "death"])
def test_an_adapter_leaves_when_the_last_engine_does_not_use_it_any_more(world, by):
    world.client(2)
    for client in (1, 2):
        pack = world.load(client, 1).pack.pack
    world.registry.release(1, pack, world.now)
    world.registry.forget(1, 1, world.now)
    assert pack in world.memory.packs
    if by == "forgetting":
        world.registry.forget(2, 1, world.now)
        assert pack in world.memory.packs
    if by == "death":
        world.registry.client_gone(2, world.now)
    else:
        world.registry.release(2, pack, world.now)
    assert pack not in world.memory.packs
    assert not world.registry._leaving


def test_what_an_engine_still_copies_when_it_forgets_it_is_nobodys(world):
    world.client(2)
    pack = world.load(1, 1).pack.pack
    world.registry.forget(1, 1, world.now)
    assert pack in world.memory.packs
    world.request_load(2, 1)
    assert world.jobs, "its files may be others by now"


def test_an_adapter_that_an_engine_has_aborted_is_nobodys_either(world):
    world.client(2)
    pack = world.load(1, 1).pack.pack
    world.registry.release(1, pack, world.now)
    ticket = world.request_load(2, 1, fresh=True)
    world.registry.forget(1, 1, world.now)
    assert pack in world.memory.packs
    world.registry.cancel(2, ticket, world.now)
    assert pack not in world.memory.packs


def test_an_engine_that_forgot_an_adapter_gets_what_the_files_are_now(world):
    world.client(2)
    for client in (1, 2):
        old = world.load(client, 1).pack.pack
    world.registry.release(1, old, world.now)
    world.registry.forget(1, 1, world.now)
    ticket = world.request_load(1, 1)
    world.read_one("newer", "newer")
    world.settle()
    new = world.answer(1, ticket).pack.pack
    assert new != old
    world.registry.forget(2, 1, world.now)
    world.registry.release(2, old, world.now)
    assert set(world.memory.packs) == {new}
    assert world.load(1, 1).pack.pack == new


def test_a_pack_knows_the_latest_versions_of_its_files_only(world):
    """A folder that is copied anew every minute has a new version each time."""
    pack = world.load(1, 1).pack.pack
    for copy in range(MAX_VERSIONS + 4):
        world.request_load(1, 1, fresh=True)
        world.read_one(f"copy {copy}", "/adapters/1")
        world.settle()
    (kept,) = world.memory.packs.values()
    assert kept.info.pack == pack
    assert list(kept.versions) == [f"copy {n}" for n in range(4, MAX_VERSIONS + 4)]
    assert world.memory._by_version.keys() == {(kept.scope, one) for one in kept.versions}


def test_a_version_that_is_seen_again_is_the_latest(world):
    for version in ("one", "two", "one"):
        world.request_load(1, 1, fresh=True)
        (job,) = world.jobs
        world.opened(job, version)
        if job in world.jobs:
            world.checked(job)
            world.done(job, "/adapters/1")
        world.settle()
    (kept,) = world.memory.packs.values()
    assert list(kept.versions) == ["two", "one"]


def test_each_request_of_a_withdrawn_adapter_fails_once_though_its_other_load_fails(
    world, monkeypatch
):
    def refuse(blocks, *, evict):
        raise OSError(12, "Cannot allocate memory")

    world.load(1, 9, pages=10)
    tickets = world.request_load(1, 1, "/a"), world.request_load(1, 1, "/b")
    world.settle()  # both wait for room
    monkeypatch.setattr(world.memory, "room", refuse)
    world.registry.forget(1, 1, world.now)
    assert [world.answer(1, ticket).kind for ticket in tickets] == [FailureKind.GONE] * 2


def test_withdrawing_what_another_server_follows_does_not_end_it(world):
    world.client(2, server="other")
    world.request_load(1, path="/same")
    second = world.request_load(2, path="/same")
    world.open_all()
    world.registry.forget(1, 1, world.now)
    world.request_load(1, path="/same")
    assert len(world.jobs) == 2, "what has begun before is not what it is registered for now"
    world.settle()
    assert isinstance(world.answer(2, second), Loaded)
    assert isinstance(world.load(1, path="/same"), Loaded)


def test_the_death_of_a_client_frees_its_leases_and_load_requests(world):
    world.client(2, server="other")
    world.load(2, 1, pages=10)
    world.request_load(2, 2)
    ticket = world.request_load(1, 3)
    world.settle(pages=10)
    assert world.answers(1, ticket) == []
    world.registry.client_gone(2, world.now)
    world.settle(pages=10)
    assert isinstance(world.answer(1, ticket), Loaded)


def test_a_lease_that_one_does_not_have_cannot_be_given_back(world):
    world.client(2)
    loaded = world.load(1)
    world.registry.release(2, loaded.pack.pack, world.now)
    world.registry.release(1, 12345, world.now)
    assert world.memory.packs[loaded.pack.pack].leases == 1


def test_an_engine_that_is_not_configured_learns_it():
    from vllm_multilora.store.memory.entries import Client
    from vllm_multilora.store.protocol.messages import LoadRequest

    world = World()
    world.registry.clients[1] = Client(1, "engine", "s", 1)
    world.said[1] = []
    world.registry.request_load(1, LoadRequest(1, "a", "/a", ticket=1), 0.0)
    assert "not configured" in world.answer(1, 1).message
    world.client(2)
    assert isinstance(world.load(2), Loaded)


def test_a_ticket_is_for_one_load_request(world):
    ticket = world.request_load(1)
    world.tickets -= 1
    world.request_load(1, 2)
    assert f"using ticket {ticket}" in world.answer(1, ticket).message
    world.settle()
    assert isinstance(world.answers(1, ticket)[1], Loaded)


def test_a_path_that_is_no_blends_source_fails_its_adapter_alone(world):
    failed = world.answer(1, world.request_load(1, path="blend:nonsense"))
    assert failed.kind is FailureKind.INVALID
    assert "not the source of a blend" in failed.message
    assert not world.jobs


@pytest.mark.parametrize("by", ["reload", "withdrawal"])
def test_every_engine_hears_that_a_pack_has_left_whoever_has_caused_it(by):
    world = World()
    first, second = world.client(1), world.client(2)
    old = world.load(first).pack.pack
    world.load(second)
    for client in (first, second):
        world.registry.release(client, old, world.now)
    if by == "reload":
        ticket = world.request_load(first, fresh=True)
        world.read_one("newer", "newer")
        world.settle()
        assert world.answer(first, ticket).pack.pack != old
    else:
        world.registry.forget(first, 1, world.now)
    assert old not in world.memory.packs
    assert old in world.evicted(second)


def turns(world) -> list[str]:
    """The folders in the order in which they are read, one at a time."""
    found = []
    for _ in range(200):
        world.registry.loads.tick(world.now)
        if not world.jobs:
            break
        (job,) = world.jobs
        found.append(world.loads[job].path)
        world.failed(job)
        world.gone(job)
    return found


@pytest.fixture
def one_job():
    world = World(StoreSettings(budget_bytes=100 * PAGE, jobs=1))
    world.client(1)
    yield world
    world.check()


@pytest.mark.parametrize("keep", [True, False], ids=["requests", "registrations"])
def test_one_load_of_a_tenant_waits_for_one_of_anothers_five_hundred(one_job, keep):
    world = one_job
    for adapter in range(100, 600):
        world.request_load(1, adapter, owners=("flood",), keep=keep)
    world.request_load(1, 7, owners=("acme",), keep=keep)
    assert turns(world).index("/adapters/7") <= 2


@pytest.mark.parametrize("keep", [True, False])
def test_a_registration_that_a_request_waits_for_too_takes_the_requests_turn(one_job, keep):
    for adapter in range(10, 20):
        one_job.request_load(1, adapter, owners=("acme",), keep=False)
    one_job.request_load(1, 19, owners=("acme",), keep=keep)
    assert turns(one_job).index("/adapters/19") == (2 if keep else 9)


@pytest.mark.parametrize("by", ["a want of another engine", "the same want"])
def test_a_load_at_the_end_of_a_flood_takes_the_turn_of_another_that_requests_it_too(one_job, by):
    world = one_job
    for adapter in range(100, 600):
        ticket = world.request_load(1, adapter, owners=("flood",))
    if by == "the same want":
        world.registry.share(1, ticket, "acme")
    else:
        world.client(2, jobs=1)
        world.request_load(2, 599, owners=("acme",))
    assert turns(world).index("/adapters/599") <= 2


def test_a_load_that_is_begun_again_takes_the_turns_of_all_that_wait_for_it(one_job):
    one_job.request_load(1, 1, owners=("flood",))
    (job,) = one_job.jobs
    one_job.request_load(1, 1, owners=("acme",), fresh=True)
    for adapter in range(10, 20):
        one_job.request_load(1, adapter, owners=("flood",))
    one_job.failed(job)
    one_job.gone(job)
    assert turns(one_job).index("/adapters/1") <= 1


def release_all(world, client=1):
    for pack in list(world.registry.clients[client].leases.elements()):
        world.registry.release(client, pack, world.now)


def kept(world, tenant=None, server="server"):
    """The tenant's folders in memory; nobody's without one."""
    owner = None if tenant is None else Owner(server, tenant)
    packs = world.memory.packs.values()
    return sorted(p for pack in packs if pack.tenant == owner for p in pack.bindings.values())


def test_a_tenant_over_its_limit_loses_its_own_least_valuable_adapter(world):
    """Room for ten: nobody else's leaves, and nobody without a limit loses one."""
    for adapter in range(1, 5):
        world.load(1, adapter, owners=("acme",))
    for adapter in range(10, 15):
        world.load(1, adapter, owners=("other",), most=3)
        release_all(world)
    assert kept(world, "other") == ["/adapters/12", "/adapters/13", "/adapters/14"]
    assert kept(world, "acme") == [f"/adapters/{number}" for number in range(1, 5)]


def test_what_a_tenants_requests_wait_for_stays_and_leaves_afterwards(world):
    for adapter in range(1, 5):
        world.load(1, adapter, owners=("acme",), most=2)
    assert len(kept(world, "acme")) == 4
    release_all(world)
    assert kept(world, "acme") == ["/adapters/3", "/adapters/4"]
    world.load(1, 5, owners=("acme",), most=2)
    assert kept(world, "acme") == ["/adapters/4", "/adapters/5"]


def test_an_adapter_that_was_registered_is_its_first_users(world):
    """Nobody says whose a registration is."""
    for adapter in range(1, 5):
        world.load(1, adapter, keep=False)
    assert len(kept(world)) == 4
    for adapter in range(1, 5):
        world.load(1, adapter, owners=("acme",), most=2)
        assert len(kept(world, "acme")) <= 2
        release_all(world)
    assert kept(world, "acme") == ["/adapters/3", "/adapters/4"]
    world.load(1, 4, owners=("other",), most=1)
    assert kept(world, "other") == []


def test_what_is_being_read_for_a_tenant_counts_before_anybody_else_makes_room():
    world = World(StoreSettings(budget_bytes=4 * PAGE, jobs=2))
    world.client(1)
    world.load(1, 1, owners=("quiet",))
    for adapter in (2, 3):
        world.load(1, adapter, owners=("acme",), most=3)
    release_all(world)
    for adapter in (4, 5):
        world.request_load(1, adapter, owners=("acme",), most=3)
    world.settle()
    assert kept(world, "quiet") == ["/adapters/1"]
    assert kept(world, "acme") == ["/adapters/3", "/adapters/4", "/adapters/5"]


def test_what_is_being_read_for_others_does_not_count_for_a_tenant(world):
    world.load(1, 1, owners=("acme",), most=2)
    release_all(world)
    world.request_load(1, 2, owners=("other",))
    world.request_load(1, 3, owners=("acme",), most=2)
    for job in world.jobs:
        world.opened(job)
        world.checked(job)
    assert list(world.jobs.values()) == ["reading"] * 2
    assert kept(world, "acme") == ["/adapters/1"]
    world.settle()
    assert kept(world, "acme") == ["/adapters/1", "/adapters/3"]


def test_the_limit_that_was_said_last_holds(world):
    for adapter in range(1, 4):
        world.load(1, adapter, owners=("acme",), most=3)
    world.request_load(1, 1, owners=("acme",), most=1)
    release_all(world)
    assert len(kept(world, "acme")) == 1
    for adapter in range(1, 6):
        world.load(1, adapter, owners=("acme",))
    release_all(world)
    assert len(kept(world, "acme")) == 5


@pytest.mark.parametrize(("server", "left"), [("server", ["9"]), ("other", ["1", "2", "3"])])
def test_a_tenants_limit_is_that_of_its_server_and_of_all_its_engines(world, server, left):
    for adapter in range(1, 4):
        world.load(1, adapter, owners=("acme",), most=3)
        release_all(world)
    world.client(2, server)
    world.load(2, 9, owners=("acme",), most=1)
    release_all(world, 2)
    assert kept(world, "acme", server) == ["/adapters/9"]
    assert kept(world, "acme") == [f"/adapters/{number}" for number in left]


@pytest.mark.parametrize(("server", "place"), [("server", 5), ("other", 2)])
def test_a_tenants_turn_is_that_of_its_server_and_of_all_its_engines(one_job, server, place):
    for adapter in range(10, 15):
        one_job.request_load(1, adapter, owners=("acme",))
    one_job.client(2, server, jobs=1)
    one_job.request_load(2, 99, owners=("acme",))
    assert turns(one_job).index("/adapters/99") == place


def test_what_a_server_that_has_gone_leaves_counts_for_who_uses_it_next(world):
    world.client(2, "other")
    world.load(2, 1, owners=("acme",), most=1)
    world.load(1, 1)
    world.registry.client_gone(2, world.now)
    assert kept(world) == ["/adapters/1"]
    assert not world.memory.tenant_limits
    world.load(1, 1, owners=("acme",), most=1)
    assert kept(world, "acme") == ["/adapters/1"]


def test_a_tenant_that_follows_a_load_of_nobody_makes_room_with_its_own(world):
    world.client(2, "other")
    world.load(2, 5, pages=4)
    world.load(1, 1, pages=4, owners=("acme",), most=1)
    release_all(world, 2)
    release_all(world)
    tickets = (
        world.request_load(2, 7, "/same"),
        world.request_load(1, 2, "/same", owners=("acme",), most=1),
    )
    world.open_all()
    world.settle(pages=4)
    assert world.answer(2, tickets[0]).pack == world.answer(1, tickets[1]).pack
    assert kept(world) == ["/adapters/5"]
    assert kept(world, "acme") == ["/same", "/same"]


def test_what_a_tenants_server_has_withdrawn_counts_for_it_no_more(world):
    world.client(2, "other")
    world.load(1, 1, path="/same", owners=("acme",), most=1)
    world.load(2, 7, path="/same")
    release_all(world)
    release_all(world, 2)
    world.registry.forget(1, 1, world.now)
    world.load(1, 2, owners=("acme",), most=1)
    assert kept(world) == ["/same"]
    assert kept(world, "acme") == ["/adapters/2"]


def test_an_adapter_is_its_tenants_under_whatever_names_of_its_server(world):
    world.client(2, "other")
    for adapter in (1, 2):
        world.load(1, adapter, path="/same", owners=("acme",), most=3)
    world.load(2, 7, path="/same")
    release_all(world)
    world.registry.forget(1, 1, world.now)
    assert kept(world, "acme") == ["/same", "/same"]


def test_limits_are_kept_of_the_tenants_that_have_requested_something_last(world):
    for number in range(2 * MAX_LIMITS):
        limited, unlimited = (
            world.request_load(1, number, owners=(f"{kind}-{number}",), most=most)
            for kind, most in (("limited", 2), ("unlimited", None))
        )
        for ticket in (limited, unlimited):
            world.registry.cancel(1, ticket, world.now)
    tenants = [owner.of for _, owner in world.memory.tenant_limits]
    assert tenants == [f"limited-{number}" for number in range(MAX_LIMITS, 2 * MAX_LIMITS)]


def test_a_tenants_limit_is_for_each_model(world):
    world.client(2, model="another")
    for client in (1, 2):
        world.load(client, 1, owners=("acme",), most=1)
    release_all(world)
    release_all(world, 2)
    assert len(kept(world, "acme")) == 2


def test_limits_stay_when_another_server_has_gone(world):
    world.client(2, "other")
    world.load(2, 7, owners=("acme",), most=1)
    for adapter in (1, 3):
        world.load(1, adapter, owners=("acme",), most=1)
    world.registry.client_gone(2, world.now)
    release_all(world)
    assert kept(world, "acme") == ["/adapters/3"]


def test_a_store_that_is_kept_keeps_what_servers_leave_until_its_room_is_needed(world):
    world.memory.keeps = True
    first = world.load(1, 1, pages=9, owners=("acme",), most=1)
    world.registry.client_gone(1, world.now)
    assert not world.memory.tenant_limits
    assert not world.memory.bound("server", 1)
    world.client(2, "next")
    again = world.load(2, 7, path="/adapters/1")
    assert (again.pack, again.was_read) == (first.pack, False)
    world.registry.client_gone(2, world.now)
    world.client(3, "last")
    world.load(3, 8, path="/other", pages=5)
    assert first.pack.pack not in world.memory.packs
    world.memory.keeps = False
    world.registry.client_gone(3, world.now)
    assert not world.memory.packs


def test_what_a_server_that_has_gone_had_begun_is_counted_for_its_followers(world):
    world.client(2, "other")
    world.request_load(2, 1, "/adapters/1", owners=("acme",), most=1)
    ticket = world.request_load(1, 1, "/adapters/1", owners=("acme",), most=1)
    world.open_all()
    world.registry.client_gone(2, world.now)
    world.settle()
    assert world.answer(1, ticket).leased
    assert kept(world, "acme") == ["/adapters/1"]
