"""Commands that sign and hand out: attest, export."""
