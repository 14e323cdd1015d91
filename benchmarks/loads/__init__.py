"""What benchmarks measure with: base models, adapters, clients, other engines."""
