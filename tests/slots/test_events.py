"""The events of slots, as several receivers get them."""

from tests.slots.situations import Journal, make_slots, run
from vllm_multilora.slots.events import AllOf


def test_all_receivers_hear_everything_in_the_same_order() -> None:
    first, second = Journal(), Journal()
    slots = make_slots(1, events=AllOf(first, second))
    run(slots, [1], [], [1], [], [2])
    slots.clear_all()
    assert first.seen == second.seen
    assert first.seen == [
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
