"""Messages between the store, its clients and its jobs, and the sockets that carry them."""
