"""Clients of the store, in the processes of a vLLM server."""
