"""What is known of each request, and its way to the engine and back."""
