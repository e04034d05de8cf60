"""Measurements and the makers of their inputs; nothing here is part of a build."""
