"""An adapter's files: found, opened safely, and read once."""
