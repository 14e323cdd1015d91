"""What compilers make of the kernels: PTX and SASS, without a GPU."""
