"""Names: the list of models that a caller sees."""
