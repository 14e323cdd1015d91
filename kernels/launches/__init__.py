"""Calls of the kernels that are prepared once and repeated each step."""
