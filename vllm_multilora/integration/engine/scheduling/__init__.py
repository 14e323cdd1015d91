"""The scheduler: holds requests until their adapter has a slot, and shares steps fairly."""
