"""Who sends a request: keys, and the tenants and operators that they belong to."""
