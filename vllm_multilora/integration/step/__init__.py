"""What runs in each step of a worker: which rows belong to whom, and the kernels' calls."""
