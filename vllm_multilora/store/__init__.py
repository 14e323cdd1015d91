"""The store: a process that owns adapters' files, their checks, and host memory."""
