"""What acts where requests come in: a new engine's settings, and the API server."""
