"""Exports that Hugging Face's libraries open."""
