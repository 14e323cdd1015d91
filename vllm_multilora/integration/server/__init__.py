"""What runs where requests arrive: the settings of a new engine, and the API server."""
