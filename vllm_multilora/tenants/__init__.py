"""Who may use which adapters and how much of the server: pure, without HTTP or vLLM."""
