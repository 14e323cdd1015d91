"""Adapters of experts, against the specification in loops."""
