"""Which ranks slots can have."""

from __future__ import annotations

MAX_LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""What vLLM takes as `--max-lora-rank`."""

LARGE_RANK = 256
"""From here on the adapters' own arithmetic is felt beside the base model's."""


def slot_rank(rank: int) -> int | None:
    """The lowest rank of slots that adapters of some rank fit into; None: there is none."""
    return next((most for most in MAX_LORA_RANKS if rank <= most), None)


def room_for(rank: int) -> str:
    """What to do so that an adapter of some rank has room in a slot."""
    if (most := slot_rank(rank)) is not None:
        return f"start the server with --max-lora-rank {most} or more"
    return f"vLLM's largest --max-lora-rank is {MAX_LORA_RANKS[-1]}: train at a lower rank"
