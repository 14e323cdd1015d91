"""Mixtures of experts on CPUs: who computes them, and the slots of their adapters."""
