"""The events of slots, and their order."""

from tests.slots.situations import Journal, make_slots, run


def test_events_come_after_what_they_tell_of_and_in_its_order() -> None:
    journal = Journal()
    slots = make_slots(1, events=journal)
    run(slots, [1], [], [1], [], [2])
    slots.clear_all()
    assert journal.seen == [
        "assigned 1 to 0",
        "filled 0 with 1",
        "miss gpu 1",
        "hit cpu 1",
        "hit gpu 1",
        "left 0: 1",
        "evicted gpu 1",
        "assigned 2 to 0",
        "filled 0 with 2",
        "miss gpu 2",
        "hit cpu 2",
        "left 0: 2",
    ]
