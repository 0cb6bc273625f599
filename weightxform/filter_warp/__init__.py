"""Filters mapped tap by tap: what all warps of a filter bank have in common."""
