"""What runs in each worker between steps and at its start: adapters, slots, layouts."""
