"""One module a pillar; each defines ``PILLAR``."""
