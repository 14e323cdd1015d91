"""Matrix products of the base layers on CPUs, without any adapter."""
