"""What runs without an engine: the diagnosis, and models without weights for the commands."""
