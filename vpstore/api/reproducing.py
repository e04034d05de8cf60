"""Functions that build again to prove: reproduce."""
