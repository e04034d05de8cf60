"""Functions that keep and delete: gc."""
