"""What can be held against an artifact, one kind of evidence a module; `audit` puts them together."""
