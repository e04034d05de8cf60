"""THE joint between recipes and store: vpstore calls this module by the name that objects.toml gives.

Place in the path: config -> recipe -> tensors -> **here** -> publish. The only module of recipes/ that knows the
store's types. Nothing here imports torch before a recipe really has to run.

Example: `vpstore build vpDense@expand` calls prepare(), then, if no build of that key is at hand, produce().
"""

from __future__ import annotations

import ast
import json
import platform
import sys
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from recipes import config, execute, runtime
from recipes import recompute as again
from recipes.gpus import cards
from recipes.job import Job
from recipes.params.runtime_table import Runtime
from recipes.preflight import findings
from recipes.recipe import InputArtifact, PlanRecipe, Progress
from vpstore.checkout import Checkout
from vpstore.code import closure
from vpstore.errors import UsageError
from vpstore.lineage import walk
from vpstore.runner import (
    Finding,
    Needs,
    Prepared,
    PreparedSource,
    ResolvedInput,
    Selection,
    Staged,
    StagedFile,
    TokenizerRecord,
)
from vpstore.schema.digest import Digest
from vpstore.schema.ref import StageRef
from vpstore.storage.store import Store

if TYPE_CHECKING:
    from recipes.huggingface.history import Ancestor

# Always in a code closure: they decide bytes of every artifact although no recipe needs to import them.
CODE_ALWAYS = ("recipes.tensors", "recipes.shards", "recipes.runtime", "recipes.execute")
# Never in one: what comes of them stands in the key (`recipes.job` holds the params against it), or they make no
# artifact. This module hands over what `recipes.execute` made.
CODE_EXCLUDE = (
    "recipes.run",
    "recipes.loading",
    "recipes.config",
    "recipes.recompute",
    "recipes.preflight",
    "recipes.gpus",
    "vpstore",
)

# Recipes whose rows are shared out where the profile says `runtime.ranks`.
ON_RANKS = ("recipes.heal", "recipes.wake_up")

_ROOT = Path(__file__).resolve().parent.parent


def prepare(checkout: Checkout, object: str, stage: str) -> Prepared:
    """Everything of a stage that its key covers, apart from the inputs.

    Raises:  UsageError: a configuration that is refused, with file and key.
    """
    objects = checkout.objects
    declared = objects.stage(StageRef(object, stage))
    profile = config.read_toml(checkout.profile_path)
    _refuse_unknown(checkout, profile)
    place = config.Place(object, stage, declared.mode, declared.recipe, tuple(declared.config))
    params = config.stage_params(checkout.root, profile=profile, place=place)
    how = _runtime(profile, checkout)
    return Prepared(
        recipe_entry=declared.recipe,
        params={"runtime": {"threads": how.threads}, **params.model_dump(mode="json")},
        code_always=(*CODE_ALWAYS, config.params_module(declared.recipe)),
        code_exclude=CODE_EXCLUDE,
        sources=tuple(s for role, path in declared.sources.items() for s in _sources(checkout.root, role, path)),
        tokenizer=_tokenizer(objects.tokenizers, declared.tokenizer),
        verbatim=bool(getattr(params, "verbatim", False)),
        settings={"ranks": how.ranks} if declared.recipe in ON_RANKS else {},
    )


def param_keys(checkout: Checkout, object: str, stage: str) -> dict[str, list[str]]:
    """Where the params of a stage stand: TOML file -> dotted tables, for DVC to watch.

    The profile's file is named with `${profile}` in it, so that one pipeline serves every profile.
    """
    declared = checkout.objects.stage(StageRef(object, stage))
    place = config.Place(object, stage, declared.mode, declared.recipe, declared.config)
    found = {name: config.tables_of(config.read_toml(checkout.root / name), place) for name in declared.config}
    profile = config.read_toml(checkout.profile_path)
    inner = config.tables_of(config.descend(profile, place.profile_path), place)
    keys = ["runtime", *(".".join((*place.profile_path, table)) for table in inner)]
    if object in profile.get("objects", {}):
        keys.append(f"objects.{object}")
    shared = checkout.profile_path.relative_to(checkout.root).with_name("${profile}.toml").as_posix()
    return {**found, shared: keys}


def environment(prepared: Prepared) -> dict[str, str]:
    """What may change bytes but is in no key: Python, the packages that the closure imports, the kind of device."""
    files = closure(_ROOT, prepared.recipe_entry, always=prepared.code_always, exclude=prepared.code_exclude)
    device = runtime.device()
    kinds = sorted({card.name for card in cards()}) if device == "cuda" else []
    # A patch release of Python changes no arithmetic; which one it was stands in the attestation's builder.
    found = {
        "python": ".".join(platform.python_version_tuple()[:2]),
        "device": " ".join([device, platform.machine(), *kinds]),
    }
    if prepared.settings.get("ranks", 1) > 1:
        found["ranks"] = str(prepared.settings["ranks"])
    for name in sorted({name for file in files for name in _imported(_ROOT / file.path)}):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def preflight(checkout: Checkout, place: Path) -> list[Finding]:
    """What the profile asks of this machine, and what its trainings take: `vpstore doctor --profile NAME`."""
    refs = checkout.objects.order
    stages = {str(ref): prepare(checkout, ref.object, ref.stage) for ref in refs}
    parents = {str(ref): list(map(str, checkout.objects.stage(ref).inputs.values())) for ref in refs}
    return [Finding(*one) for one in findings(stages, parents, place)]


def produce(prepared: Prepared, inputs: Mapping[str, ResolvedInput], scratch: Path, progress: Progress) -> Staged:
    """Run the recipe; the finished files lie in `scratch` afterwards.

    Raises:  RecipeRefused, GateMissed.
    """
    return _staged(execute.carry_out(_job(prepared, inputs, scratch), progress))


def needs(prepared: Prepared, inputs: Mapping[str, ResolvedInput], scratch: Path) -> Needs | None:
    """What the recipe says that it takes of disk and memory; None: it does not say.

    Raises:  RecipeRefused.
    """
    job = _job(prepared, inputs, scratch)
    recipe = job.recipe()
    if not isinstance(recipe, PlanRecipe) or recipe.needs is None:
        return None
    found = recipe.needs(job.context(lambda label, done, total: None))
    return Needs(found.disk_bytes, found.memory_bytes)


def recompute(
    prepared: Prepared,
    inputs: Mapping[str, ResolvedInput],
    selection: Selection,
    scratch: Path,
    progress: Progress,
) -> Staged:
    """Compute some tensors of a plan again; the shards in `scratch` hold nothing else.

    Raises:  UsageError: the recipe is a training; RecipeRefused.
    """
    job = _job(prepared, inputs, scratch)
    return _staged(again.recompute(job, selection.names, given=selection.intermediates, progress=progress))


def exporters() -> dict[str, str]:
    """Formats besides plain files that an artifact can be exported in: name -> what it is for."""
    # Not above: where a recorded recipe runs again, exporters are not.
    from recipes.huggingface import targets as huggingface
    from recipes.megatron import targets as megatron

    return {**megatron.TARGETS, **huggingface.TARGETS}


def export(target: str, source: ResolvedInput, folder: Path, progress: Progress) -> None:
    """Write an artifact in one of those formats into an empty folder.

    Raises:  RecipeRefused: the artifact is not what the format is for, or the result does not agree with it.
    """
    from recipes.huggingface import targets as huggingface

    artifact = InputArtifact(source.role, source.ref, str(source.artifact), source.path)
    if target in huggingface.TARGETS:
        from recipes.huggingface.export import export as write_for_huggingface

        write_for_huggingface(artifact, _history(source.artifact), root=_ROOT, folder=folder, progress=progress)
        return
    from recipes.megatron.export import export as write_for_megatron

    write_for_megatron(target, artifact, folder, progress)


def _history(artifact: Digest) -> list[Ancestor]:
    """The lineage of an artifact as far as its manifests are in the store, parents first."""
    from recipes.huggingface.history import Ancestor

    found = []
    for node in walk(Store.find(_ROOT), artifact):
        if node.manifest is None:
            found.append(Ancestor(node.name, str(node.artifact)))
            continue
        build = node.manifest.build
        inputs = tuple((row.role, str(row.artifact)) for row in build.inputs)
        sources = tuple((row.role, row.sha256) for row in build.sources)
        found.append(Ancestor(node.name, str(node.artifact), build.entry, inputs, sources, build.params))
    return found


def _job(prepared: Prepared, inputs: Mapping[str, ResolvedInput], scratch: Path) -> Job:
    params = dict(prepared.params)
    threads = params.pop("runtime")["threads"]
    parents = {role: InputArtifact(role, found.ref, str(found.artifact), found.path) for role, found in inputs.items()}
    sources = {source.role: source.path for source in prepared.sources}
    ranks = prepared.settings.get("ranks", 1)
    return Job(prepared.recipe_entry, params, threads, parents, sources, scratch, ranks=ranks)


def _staged(made: execute.Made) -> Staged:
    return Staged(
        files=[StagedFile(name, media_type, path) for name, (media_type, path) in sorted(made.files.items())],
        intermediates=[
            StagedFile(name, "application/vnd.safetensors", path) for name, path in made.intermediates.items()
        ],
    )


def _runtime(profile: Mapping[str, Any], checkout: Checkout) -> Runtime:
    where = f"{checkout.profile_path.name}: [runtime]"
    return cast(Runtime, config.validated(Runtime, profile.get("runtime", {}), where=where))


def _sources(root: Path, role: str, provenance: str) -> list[PreparedSource]:
    path = root / provenance
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        folder = root / document["root"]
        return [
            PreparedSource(f"{role}/{file['path']}", folder / file["path"], file["sha256"], file["size_bytes"])
            for file in document["files"]
        ]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(
            "a provenance file is missing or not of its form",
            where=provenance,
            expected="format, root, files: [{path, sha256, size_bytes}]",
            found=f"{type(error).__name__}: {error}",
            next_step="git checkout it, or write one as configs/upcycle/provenance/ shows",
        ) from error


def _tokenizer(tables: Mapping[str, Any], name: str | None) -> TokenizerRecord | None:
    if name is None:
        return None
    table = tables[name]
    return TokenizerRecord(family=name, digest=Digest(table["digest"]), padded_vocab=table["padded_vocab"])


def _refuse_unknown(checkout: Checkout, profile: Mapping[str, Any]) -> None:
    known: dict[str, set[str]] = {}
    for name, declared in checkout.objects.objects.items():
        tables = known.setdefault(name, set())
        for stage, place in declared.stages.items():
            prefix = f"{place.mode}." if place.mode else ""
            tables.update(prefix + table for table in (stage, config.DEFAULT_TABLE, *config.SHARED_TABLES))
    faults = config.unknown_tables(profile, known)
    if faults:
        raise UsageError(
            "a profile configures what objects.toml does not declare",
            where=f"{checkout.profile_path.name}: {', '.join(faults)}",
            expected="params.<object>[.<mode>].<stage>",
            next_step="mend the name of the table",
        )


def _imported(path: Path) -> set[str]:
    """Top-level packages that a file imports, the standard library and this project left out."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_bytes())):
        if isinstance(node, ast.Import):
            names.update(alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module.partition(".")[0])
    return {name for name in names if name not in sys.stdlib_module_names and not (_ROOT / name).is_dir()}
