"""The engine core's connections to its workers, on all machines."""
