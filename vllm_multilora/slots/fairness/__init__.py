"""Fair shares of tokens and slots among tenants and adapters."""
