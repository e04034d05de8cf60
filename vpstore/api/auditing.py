"""Functions that ask where an artifact comes from: audit, why, diff, graph."""
