"""Whether the gateway acts, and the checks of its settings at start."""
