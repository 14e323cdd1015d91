"""What keys, identity and metrics cost, and what many tenants do over hours."""
