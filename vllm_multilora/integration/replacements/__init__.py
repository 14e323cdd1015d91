"""What takes the place of vLLM's own functions and classes, by where it acts."""
