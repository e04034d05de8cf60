"""Functions that sign and hand out: attest, export."""
