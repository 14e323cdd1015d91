"""What acts in each step of a worker: whose rows are whose, and the kernels' calls."""
