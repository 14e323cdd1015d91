"""How requests and tenants share slots, caches and steps."""
