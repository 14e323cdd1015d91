"""The ASGI application in front of vLLM's own: keys, what tenants may ask, and what answers say."""
