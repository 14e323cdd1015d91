"""Tables of everything in vLLM that the plugin replaces, overrides or reads."""
