"""Commands that keep and delete: gc."""
