"""Who has used how many tokens: counted in metrics, and kept in a log."""
