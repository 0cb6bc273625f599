"""Weights that follow a condition: warps, hypernetworks, and whole models with them."""
