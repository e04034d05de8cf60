"""What push, pull, repair and `verify --remote` have in common: what a ref needs, who may say so, and how it moves."""
