"""Replays traces against the server's own slots and cache policies."""
