"""What acts in each worker between the steps, and when it starts: adapters, slots, layouts."""
