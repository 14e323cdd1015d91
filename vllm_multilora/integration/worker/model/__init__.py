"""What a running model accepts of adapters, and how its layers are named and shaped."""
