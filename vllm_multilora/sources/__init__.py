"""Adapters in object stores, on web servers and in repositories of the Hugging Face hub."""
