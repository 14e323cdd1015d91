"""What benchmarks share: how they are declared, run, recorded and reported, and their loads."""
