"""Processes that read and check adapters, apart from the store."""
