"""From a requested model name to an adapter: registration, directories, routes."""
