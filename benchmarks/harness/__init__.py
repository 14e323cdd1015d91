"""How benchmarks are declared, run, recorded, compared and reported."""
