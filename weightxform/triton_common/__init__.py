"""What the Triton kernels of several rooms share. Nothing here imports Triton but ``kernels``."""
