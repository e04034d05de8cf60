"""Building again: to prove an artifact (`reproduce`), or to have its bytes back (`resolve --rebuild`).

Place in the path: beside `building`; composes verbs, called by the api. A build starts from the working tree; what is
here starts from a build record, that is, from what the artifact itself says it was made of.
Invariants: recipes run in a process of their own, from a tree that is laid out from the recorded files, so that nothing
of the checked-out recipes is used; nothing is published but an artifact whose digest is the one that was asked for.

Example:
    from vpstore.rebuilding.reproducing import reproduce
"""
