"""Every adapter's state in the engine core, and what changes it."""
