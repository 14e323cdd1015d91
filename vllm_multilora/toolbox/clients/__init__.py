"""HTTP clients of a running server."""
