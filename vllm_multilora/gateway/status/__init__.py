"""The status route, and the page that shows it."""
