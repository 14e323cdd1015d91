"""Adapters' own chat templates, those that the operator has allowed."""
