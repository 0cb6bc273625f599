"""One module a transform; each defines ``ROOM``, and is found because it is there."""
