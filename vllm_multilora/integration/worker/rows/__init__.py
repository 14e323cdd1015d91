"""Which rows of a batch an adapter acts on."""
