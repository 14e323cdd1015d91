"""Plans and indexes of the bytes that a packed adapter consists of."""
