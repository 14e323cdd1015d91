"""How vLLM is changed, and for which engines: the ledger, what applies it, version and flags."""
