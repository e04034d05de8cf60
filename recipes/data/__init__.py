"""Text to token ids to datasets."""
