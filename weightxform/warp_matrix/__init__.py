"""The matrices of affine warps of a kernel."""
