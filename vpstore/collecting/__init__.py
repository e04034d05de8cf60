"""What of a store is needed: marking from the roots, then a verdict for everything; `gc` acts on it."""
