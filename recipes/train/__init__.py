"""Training: loop, optimizer, losses, exact resume."""
