"""Adapters of experts on CPUs, against PEFT."""
