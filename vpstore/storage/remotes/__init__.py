"""Remotes: where blobs are shared, each behind the same few calls."""
