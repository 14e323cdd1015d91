"""Messages say `1 adapter` and `2 adapters`."""

import pytest

from vllm_multilora.wording import counted


@pytest.mark.parametrize(
    ("count", "adapters", "copies"),
    [(0, "0 adapters", "0 copies"), (1, "1 adapter", "1 copy"), (2, "2 adapters", "2 copies")],
)
def test_one_is_not_called_several(count: int, adapters: str, copies: str) -> None:
    assert counted(count, "adapter") == adapters
    assert counted(count, "copy", "copies") == copies
