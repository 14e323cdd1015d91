"""Per request: where its adapter begins to act, its cache keys and its weights' version."""
