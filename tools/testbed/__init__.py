"""Runs the smoke tests with every supported vLLM and model runner, and keeps what came of it."""
