"""Turns of tenants: for calls, and for lists of what there is."""
