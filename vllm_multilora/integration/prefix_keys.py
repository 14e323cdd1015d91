"""Whether the prefix cache of this process's engine tells versions of an adapter apart."""

tells_versions_apart = False
"""Set when an engine core starts its workers. A module's variable, since vLLM's function that makes
the keys knows requests only; engines of one process share it."""
