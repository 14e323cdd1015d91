"""Orders to the workers, and the sockets on which they answer."""
