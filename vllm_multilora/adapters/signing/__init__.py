"""Digests and signatures: which version an adapter is, and who vouches for it."""
