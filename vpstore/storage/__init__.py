"""The only code that touches a store's disk: atomic writes, blobs, keys, attestations, pointers, stamps."""
