"""Functions that move bytes between stores: push, pull, repair."""
