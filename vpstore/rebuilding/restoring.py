"""resolve --rebuild: the bytes are nowhere here, so recipes run again until they are.

Place in the path: between a `resolve` that failed and one that succeeds. What is wanted is a digest, the pointer's or
the lock's; how to make it, the manifest says if it is here, else the working tree if that has the agreed build key.
Invariants: a result counts only if its artifact digest is the one that was asked for, and is published only then; any
other leaves the store as it was. Damaged blobs in the way are kept in quarantine, as by every publish.

Example:
    Restoration(work).restore(*wanted(work, parse_ref("vpMoE")))
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from vpstore.errors import BlobMissing, DigestMismatch, Interrupted, NoSuchRef, VpstoreError
from vpstore.preparation import prepare
from vpstore.rebuilding.comparing import Comparer, Rebuilt, rebuilt
from vpstore.rebuilding.ingredients import Task, lay_out, recipe_file
from vpstore.rebuilding.running import run
from vpstore.rebuilding.scratch import scratch_folder
from vpstore.schema.digest import Digest
from vpstore.schema.manifest import InputRecord, Manifest
from vpstore.schema.ref import Ref, StageRef
from vpstore.storage.prefixes import by_prefix
from vpstore.surroundings import UNKNOWN, Stopwatch
from vpstore.verbs.publish import Publication, publish
from vpstore.workspace import Workspace


def wanted(work: Workspace, ref: Ref) -> tuple[StageRef, Digest]:
    """Which artifact a ref stands for, the pointer's or else the lock's, whether or not it is here.

    Raises:  NoSuchRef: neither names one, or no artifact, or several, that were ever here have the digest prefix;
             DigestMismatch, BadManifest: of the digest's manifest, which alone says how it was built.
    """
    if ref.prefix is not None:
        manifest = work.store.manifest(by_prefix(work.store, ref), what=str(ref))
        return manifest.ref, manifest.digest
    stage = work.checkout.objects.find(ref)
    pointer, entry = work.checkout.pointers.read(stage), work.checkout.lock().entry(work.checkout.profile, stage)
    if pointer is not None or entry is not None:
        return stage, pointer.artifact if pointer is not None else entry.artifact  # type: ignore[union-attr]
    raise NoSuchRef("nothing says which artifact this is", where=str(ref), next_step="vpstore ls, or vpstore build it")


@dataclass
class Restoration:
    """One run: an artifact and, where they are missing too, its ancestors."""

    work: Workspace
    _under_way: list[Digest] = field(default_factory=list)

    def restore(self, ref: StageRef, artifact: Digest) -> Manifest:
        """Make sure that an artifact is whole here, by building it again if it is not.

        Returns: its manifest.
        Raises:  BlobMissing: nothing says how to make it; DigestMismatch: the recipes give something else; BadManifest;
                 RecipeRefused, GateMissed; Interrupted.
        """
        manifest = self._manifest(artifact)
        if manifest is not None and all(self.work.store.blobs.is_whole(digest) for digest in manifest.blobs()):
            return manifest
        if artifact in self._under_way:
            next_step = f"vpstore audit {ref}: what says so is damaged or forged"
            raise VpstoreError(
                "an artifact is said to be made from itself", where=str(ref), found=artifact, next_step=next_step
            )
        self._under_way.append(artifact)
        task = Task.of(manifest) if manifest is not None else self._from_working_tree(ref, artifact)
        for row in task.record.inputs:
            self._restore_input(task, row)
        self._under_way.pop()
        return self._make(task, artifact)

    def _manifest(self, artifact: Digest) -> Manifest | None:
        try:
            return self.work.store.manifest(artifact)
        except (BlobMissing, DigestMismatch):
            return None

    def _restore_input(self, task: Task, row: InputRecord) -> None:
        """Only the files of a parent are read, so nothing else of it has to be whole."""
        manifest = self._manifest(row.artifact)
        if manifest is not None and all(self.work.store.blobs.is_whole(file.digest) for file in manifest.files):
            return
        if manifest is not None:
            ref = manifest.ref
        elif task.ref in self.work.checkout.objects.order:
            ref = self.work.checkout.objects.stage(task.ref).inputs.get(row.role, StageRef(row.role, "unknown"))
        else:
            ref = StageRef(row.role, "unknown")
        self.restore(ref, row.artifact)

    def _from_working_tree(self, ref: StageRef, artifact: Digest) -> Task:
        """What the working tree would build, if that has the key under which the artifact was agreed or built."""
        keys = dict(self._claimed_keys(ref, artifact))
        if ref in self.work.checkout.objects.order and keys:
            preparation = prepare(self.work, ref)
            for parents in self._parents(ref):
                record = preparation.record(preparation.input(role, *parent) for role, parent in parents.items())
                if record.key() in keys.values():
                    return Task(ref, record, preparation.prepared.verbatim)
        expected = " or ".join(f"{key.short} ({place})" for place, key in keys.items()) or "a pointer or a lock entry"
        raise BlobMissing(
            "an artifact is not here, and nothing here says how it was made",
            where=f"{ref}, {artifact}",
            expected=f"its manifest in the store, or a working tree that has the build key {expected}",
            found="neither" if keys else "no key to hold the working tree against",
            next_step=f"{self._commit(artifact)}, or vpstore pull {ref} brings it from a remote",
        )

    def _claimed_keys(self, ref: StageRef, artifact: Digest) -> Iterator[tuple[str, Digest]]:
        entry = self.work.checkout.lock().entry(self.work.checkout.profile, ref)
        if entry is not None and entry.artifact == artifact:
            yield self.work.checkout.config.lock, entry.key
        pointer = self.work.checkout.pointers.read(ref)
        if pointer is not None and pointer.artifact == artifact:
            yield "the pointer", pointer.key

    def _parents(self, ref: StageRef) -> Iterator[Mapping[str, tuple[Digest, Digest]]]:
        """Artifact and content that the inputs may have had: all as the lock says, or all as the pointers do."""
        declared = self.work.checkout.objects.stage(ref).inputs
        lock, pointers = self.work.checkout.lock(), self.work.checkout.pointers
        agreed = {role: lock.entry(self.work.checkout.profile, parent) for role, parent in declared.items()}
        present = {role: pointers.read(parent) for role, parent in declared.items()}
        for known in (agreed, present):
            parents = {}
            for role, row in known.items():
                if row is not None and row.content is not None:
                    parents[role] = (row.artifact, row.content)
            if len(parents) == len(declared):
                yield parents

    def _commit(self, artifact: Digest) -> str:
        commits = [statement.facts.git.get("commit") for statement in self.work.store.attestations.of(artifact)]
        known = [commit for commit in commits if commit not in (None, UNKNOWN)]
        return f"git checkout {known[-1]}" if known else "check out the commit that wrote this lock entry or pointer"

    def _make(self, task: Task, artifact: Digest) -> Manifest:
        watch = Stopwatch()
        self.work.narrator.note(f"{task.ref}: building {artifact.short} again with {task.record.entry}")
        try:
            with scratch_folder(self.work, "rebuild", task) as folder:
                job = lay_out(self.work, task, folder)
                result = run(job, self.work.narrator, advice=self._commit(artifact))
                made = rebuilt(task, result.staged)
                if made.manifest.digest != artifact:
                    raise self._mismatch(task, artifact, made)
                recipe = {row: recipe_file(self.work, task.ref, row) for row in task.record.recipe_files}
                publication = Publication(task.ref, task.record, result.staged, job.scratch, task.verbatim, recipe)
                root = self.work.checkout.root
                with self.work.changing():
                    return publish(self.work, publication, facts=lambda: watch.facts(root, result.environment))
        except KeyboardInterrupt:
            raise Interrupted("interrupted; nothing was published", where=str(task.ref)) from None

    def _mismatch(self, task: Task, artifact: Digest, made: Rebuilt) -> VpstoreError:
        summary = "which tensors differ cannot be told, as the artifact is not here"
        if task.manifest is not None:
            try:
                summary = Comparer(self.work, task.manifest, None).by_tables(made).summary()
            except VpstoreError:
                summary = "which tensors differ cannot be told, as its tensor tables are not here"
        return DigestMismatch(
            "the recipes give another artifact; nothing was published",
            where=f"{task.ref}, key {task.record.key().short}",
            expected=artifact,
            found=f"{made.manifest.digest}; {summary}",
            next_step="build where it was built (vpstore show lists versions and CPU), or vpstore pull it",
        )
