"""The plugin's flags, and the settings of vLLM that follow from them."""
