"""Shared host memory: the arena, the packs in it, and who maps and holds them."""
