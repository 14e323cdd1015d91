"""What LoRA serving needs in an API server, and in the process that starts an engine."""
