"""Candidates, trials and choices of the tuner."""
