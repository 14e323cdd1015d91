"""Adapters' bytes: packed on the host, staged, and scattered over slots."""
