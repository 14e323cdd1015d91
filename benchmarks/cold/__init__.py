"""What loads, registrations and starts cost."""
