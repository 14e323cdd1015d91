"""Checks of tensors and values against what the base model accepts."""
