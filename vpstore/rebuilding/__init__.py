"""Running recipes: for `building`, to prove an artifact (`reproduce`), or to have its bytes back (`resolve --rebuild`).

Place in the path: under `building` and the api; composes verbs. A build starts from the working tree, the others from a
build record, that is, from what the artifact itself says it was made of.
Invariants: recipes run in a process of their own, from a tree that is laid out from the files that the key covers, so
that nothing else of the checkout's recipes is used; of what is built again nothing is published but an artifact whose
digest is the one that was asked for.

Example:
    from vpstore.rebuilding.reproducing import reproduce
"""
