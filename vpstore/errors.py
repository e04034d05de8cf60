"""The tree of errors: every failure a person can cause or meet, each with its exit code.

Place in the path: below everything; nothing of the project is imported here.
Invariants: an error says where, what was expected, what was found and what to do next; the table of exit codes in the
documentation is generated from these classes.

Example:
    >>> raise DigestMismatch("blob does not match its digest", where="vpDense@wake-up", next_step="vpstore repair")
"""

from __future__ import annotations


class VpstoreError(Exception):
    """Base of all errors that are reported to a person rather than shown as a traceback."""

    exit_code = 1
    meaning = "failure"
    advice = ""  # the next step of an error that names no better one

    def __init__(
        self,
        what: str,
        *,
        where: str = "",
        expected: str = "",
        found: str = "",
        next_step: str = "",
    ) -> None:
        super().__init__(what)
        self.what, self.where = what, where
        self.expected, self.found, self.next_step = expected, found, next_step or self.advice
        self.trace = ""  # where the project's own code failed, line by line, if that is what happened

    def advise(self, next_step: str) -> None:
        """Name a next step that fits what was going on better than the one the error came with."""
        self.next_step = next_step

    def rows(self) -> list[tuple[str, str]]:
        """The labelled lines below the headline; empty ones are left out."""
        pairs = (
            ("where", self.where),
            ("expected", self.expected),
            ("found", self.found),
            ("next", self.next_step),
        )
        return [(label, text) for label, text in pairs if text]

    def __str__(self) -> str:
        return "\n".join([f"error: {self.what}", *(f"  {label:<9} {text}" for label, text in self.rows())])

    def __reduce__(self) -> tuple[object, ...]:
        """Keep the fields when an error crosses a process boundary (worker pools pickle exceptions)."""
        return (_rebuild, (type(self), self.what, self.where, self.expected, self.found, self.next_step))


def _rebuild(cls: type[VpstoreError], what: str, where: str, expected: str, found: str, next_step: str) -> VpstoreError:
    return cls(what, where=where, expected=expected, found=found, next_step=next_step)


class UsageError(VpstoreError):
    """The command line or a configuration file says something that has no meaning."""

    exit_code = 2
    meaning = "usage or configuration"
    advice = "correct what is named above, then run the command again"


class FaultsFound(VpstoreError):
    """verify, audit, reproduce or export --check finished and found faults."""

    exit_code = 3
    meaning = "faults found by verify, audit, reproduce or export --check"


class NoStore(VpstoreError):
    """There is no store, or one of a format that this version does not read."""

    exit_code = 10
    meaning = "no store"


class NoSuchRef(VpstoreError):
    """A name that nothing here resolves."""

    exit_code = 11
    meaning = "no such ref"


class NoSuchTensor(NoSuchRef, KeyError):
    """A name that none of an artifact's tensors has; a KeyError, too, as an open artifact is a mapping."""


class BlobMissing(VpstoreError):
    """A manifest names bytes that the store does not hold."""

    exit_code = 12
    meaning = "blob missing"
    advice = "vpstore pull or vpstore repair brings it from a remote; vpstore build makes it again"


class DigestMismatch(VpstoreError):
    """Bytes are not what their digest says."""

    exit_code = 13
    meaning = "digest mismatch"
    advice = "vpstore verify --all lists all damage; vpstore repair replaces it from a remote"


class BlobUnreadable(DigestMismatch):
    """This user may not read a blob, so nothing can be said of its bytes.

    For whoever can do without the blob it is as good as a damaged one; nothing says that it is damaged.
    """

    exit_code = VpstoreError.exit_code
    meaning = VpstoreError.meaning
    advice = "its owner, or root, lets this user read it; vpstore doctor counts all that cannot be read, and says how"

    def advise(self, next_step: str) -> None:
        """Nothing: neither repair nor build mends a mode."""


class BadManifest(VpstoreError):
    """A document that does not parse, is not canonical, or contradicts itself."""

    exit_code = 14
    meaning = "bad manifest"
    advice = "vpstore verify --all lists all damage; vpstore repair replaces it from a remote"


class NotLocked(VpstoreError):
    """The pointer is not what vpstore.lock says."""

    exit_code = 15
    meaning = "not what the lock says"


class RemoteFailure(VpstoreError):
    """A remote refused, broke off, or sent something else."""

    exit_code = 16
    meaning = "remote failure"
    advice = "try again; if it stays so, check the remote's address and credentials (dvc remote list)"


class RecipeRefused(VpstoreError):
    """A recipe's input, plan or result is not acceptable."""

    exit_code = 20
    meaning = "recipe input or gate refused"
    advice = "correct the config or the recipe, then run vpstore build again"


class GateMissed(RecipeRefused):
    """A recipe finished, but a figure is on the wrong side of its declared threshold: nothing was published."""


class ShapeMismatch(RecipeRefused):
    """A tensor does not have the shape that its place demands."""


class Interrupted(VpstoreError):
    """Ctrl-C; what was computed so far stays in the scratch folder and is taken up again."""

    exit_code = 130
    meaning = "interrupted"
    advice = "run the command again: what was finished is kept"


class OutputClosed(VpstoreError):
    """Whoever read the output has gone, as `head` does: nothing is said, as nobody would hear it."""

    exit_code = 141  # as a shell says of a program that SIGPIPE ended
    meaning = "nobody reads the output any more"
