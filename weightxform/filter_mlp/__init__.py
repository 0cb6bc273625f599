"""A small network over each filter of a bank."""
