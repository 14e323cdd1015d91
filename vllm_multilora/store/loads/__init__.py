"""Which load comes next, what becomes of each, and what clients hear of it."""
