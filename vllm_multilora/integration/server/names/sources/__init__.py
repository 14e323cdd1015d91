"""Adapters that an API server finds at URLs."""
