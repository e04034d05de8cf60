"""Commands that build again to prove: reproduce."""
