"""Public names that lead to adapters: by share, by a value in the request, with fallbacks."""
