"""Pure tensor functions: no files, no store, no clock."""
