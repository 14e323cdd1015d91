"""What runs in the engine core: requests wait for their adapters there, and share the slots."""
