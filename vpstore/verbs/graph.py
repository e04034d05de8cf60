"""graph: the lineage of an artifact as a document or as a drawing.

Place in the path: a reading verb over the lineage. Manifests are verified as they are read, nothing else is.
Invariants: parents first, roles sorted: the same lineage always gives the same text; names are quoted, whatever a
manifest says.

Example:
    print(dot(walk(store, artifact), agreed))
"""

from __future__ import annotations

from typing import Any

from vpstore.lineage import Lineage, Node
from vpstore.schema.lockfile import LockEntry, Profile
from vpstore.workspace import LockStatus


def lock_status(node: Node, agreed: Profile) -> LockStatus:
    """How one artifact stands to the lock's entries."""
    entry = agreed.get(node.manifest.ref) if node.manifest is not None else None
    if entry is None:
        return "absent"
    assert node.manifest is not None  # else there is no entry
    return "same" if entry.is_kept_by(LockEntry.of(node.manifest)) else "differs"


def document(lineage: Lineage, agreed: Profile) -> dict[str, Any]:
    """The lineage as `graph --json` prints it."""
    return {"artifact": lineage.top, "nodes": [_node(node, agreed) for node in lineage]}


def _node(node: Node, agreed: Profile) -> dict[str, Any]:
    manifest = node.manifest
    return {
        "artifact": node.artifact,
        "object": manifest.object if manifest else None,
        "stage": manifest.stage if manifest else None,
        "key": manifest.build.key() if manifest else None,
        "recipe": manifest.build.entry if manifest else None,
        "size_bytes": manifest.size_bytes if manifest else None,
        "locked": lock_status(node, agreed),
        "inputs": [row._asdict() for row in node.inputs],
        "sources": [row._asdict() for row in manifest.build.sources] if manifest else [],
        "fault": node.reason or None,
    }


def dot(lineage: Lineage, agreed: Profile) -> str:
    """The lineage for Graphviz: parents above their children, edges named by role; what is not known is dashed."""
    lines = [
        "digraph lineage {",
        '  node [shape=box, fontname="monospace"];',
        '  edge [fontname="monospace", fontsize=10];',
    ]
    for node in lineage:
        second = node.artifact.short if node.manifest is not None else node.reason
        style = "" if node.manifest is not None else ", style=dashed"
        if lock_status(node, agreed) == "differs":
            style = ', color="orange"'
        lines.append(f"  {_quoted(node.artifact.short)} [label={_quoted(node.name, second)}{style}];")
        for row in node.inputs:
            edge = f"{_quoted(row.artifact.short)} -> {_quoted(node.artifact.short)}"
            lines.append(f"  {edge} [label={_quoted(row.role)}];")
    return "\n".join([*lines, "}"]) + "\n"


def _quoted(*lines: str) -> str:
    escaped = (line.replace("\\", "\\\\").replace('"', '\\"').replace("\n", " ") for line in lines)
    return '"' + "\\n".join(escaped) + '"'
