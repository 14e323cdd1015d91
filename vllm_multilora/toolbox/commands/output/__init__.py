"""Tables and plots that commands print."""
