"""Counts the work of a launch in Triton's interpreter."""
