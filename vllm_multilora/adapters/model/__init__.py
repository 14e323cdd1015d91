"""What the base model accepts of an adapter, and the names of tensors and modules."""
