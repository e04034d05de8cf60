"""objects.toml: which objects there are, their stages, and what each stage is made of.

Place in the path: **config** -> recipe. `objects.toml` and the profile's `[objects]` are merged, typed and checked
here; everything after asks the result.
Invariants: a key stands in one of the two files, never in both; unknown keys are refused; inputs name stages that exist
and form no circle; no two stages share the name of a pointer.

Example:
    objects = parse_objects(tomllib.loads(text), tomllib.loads(profile), where="objects.toml")
    objects.find(parse_ref("vpDense0-5_28.real"))  # StageRef(object='vpDense0-5_28', stage='real-heal')
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from vpstore.errors import NoSuchRef, UsageError
from vpstore.schema.fields import Fields
from vpstore.schema.paths import check_path, fold
from vpstore.schema.ref import Ref, StageRef, check_name, nearest, parse_ref

FORMAT: Final = 1


@dataclass(frozen=True)
class StageDeclaration:
    """One stage of one object, as declared."""

    ref: StageRef
    recipe: str
    mode: str | None
    inputs: Mapping[str, StageRef]  # role -> parent
    sources: Mapping[str, str]  # role -> provenance JSON, relative to the checkout
    tokenizer: str | None
    config: tuple[str, ...]  # TOML files of the params, relative to the checkout
    by_artifact: frozenset[str] = frozenset()  # roles whose artifact's digest the recipe writes down


@dataclass(frozen=True)
class ObjectDeclaration:
    """One object and its stages in the order of its life."""

    name: str
    default_stage: str
    build_all: bool  # the object alone, without a stage, means all its stages
    stages: Mapping[str, StageDeclaration]


@dataclass(frozen=True)
class Summary:
    """The optional last column of `build --all`: a figure out of another object's report."""

    file: str
    key: str
    source: str  # the object whose stage `<object>-<stage>` has the report


@dataclass(frozen=True)
class Objects:
    """Everything objects.toml and the profile declare."""

    runner: str
    tokenizers: Mapping[str, Any]  # opaque here: the runner reads them
    objects: Mapping[str, ObjectDeclaration]
    summary: Summary | None = None
    order: tuple[StageRef, ...] = field(default=())  # every stage, parents first

    def find(self, ref: Ref) -> StageRef:
        """The stage a ref means: its own, the last of its mode, else the object's default.

        Raises:  NoSuchRef: no such object, stage or mode, or a stage that is not of that mode.
        """
        declared = self._object(ref.object)
        stages = [stage for stage in declared.stages.values() if ref.mode is None or stage.mode == ref.mode]
        if not stages:
            modes = sorted({stage.mode for stage in declared.stages.values() if stage.mode})
            raise _no_such(f"{ref.object} has no mode {ref.mode}", str(ref), modes, typed=f"{ref.object}.{ref.mode}")
        if ref.stage is not None:
            if ref.stage not in {stage.ref.stage for stage in stages}:
                known = [stage.ref.stage for stage in stages]
                raise _no_such(
                    f"{ref.object} has no stage {ref.stage}", str(ref), known, typed=f"{ref.object}@{ref.stage}"
                )
            return StageRef(ref.object, ref.stage)
        return stages[-1].ref if ref.mode is not None else StageRef(ref.object, declared.default_stage)

    def targets(self, ref: Ref) -> tuple[StageRef, ...]:
        """The stages that `build REF` builds: all of a `build_all` object named alone, else the one `find` gives."""
        declared = self._object(ref.object)
        if declared.build_all and ref.mode is None and ref.stage is None:
            return tuple(stage for stage in self.order if stage.object == ref.object)
        return (self.find(ref),)

    def stage(self, ref: StageRef) -> StageDeclaration:
        """The declaration of one stage.

        Raises:  NoSuchRef: not declared.
        """
        return self._object(ref.object).stages[self.find(Ref(ref.object, stage=ref.stage)).stage]

    def _object(self, name: str) -> ObjectDeclaration:
        if name not in self.objects:
            raise _no_such(f"no object {name}", name, sorted(self.objects), typed=name)
        return self.objects[name]


def _no_such(what: str, where: str, known: list[str], *, typed: str) -> NoSuchRef:
    """The error for a name that is not declared.

    Args:    typed: the ref up to the wrong word, which is its last.
    """
    cut = max(typed.rfind("."), typed.rfind("@")) + 1
    meant = nearest(typed[cut:], known)
    guess = f"did you mean {typed[:cut]}{meant}? " if meant else ""
    next_step = f"{guess}vpstore ls lists what is built"
    return NoSuchRef(what, where=where, expected="one of " + ", ".join(known), next_step=next_step)


def parse_objects(declared: Mapping[str, Any], profile: Mapping[str, Any], *, where: str) -> Objects:
    """Merge and check.

    Args:    declared: objects.toml; profile: the profile's TOML, of which only `[objects]` is read here.
    Raises:  UsageError: a key in both files, an unknown or mistyped key, an unknown parent, a circle, colliding names.
    """
    own = profile.get("objects", {})
    merged = {**declared, "objects": _merge(declared.get("objects", {}), own, f"{where}: objects")}
    fields = Fields(merged, where=where, error=UsageError)
    fields.format(FORMAT)
    runner = fields.text("runner")
    tokenizers = fields.optional("tokenizers", dict) or {}
    summary = fields.optional("summary", dict)
    table = fields.take("objects", dict)
    fields.done()
    objects = {name: _object(name, value, f"{where}: objects.{name}") for name, value in table.items()}
    every = {stage.ref: stage for item in objects.values() for stage in item.stages.values()}
    _check_slugs(every, where)
    _check_tokenizers(every, tokenizers, where)
    whole = Objects(runner, tokenizers, objects, _summary(summary, where))
    linked = {name: _linked(item, whole, where) for name, item in objects.items()}
    every = {stage.ref: stage for item in linked.values() for stage in item.stages.values()}
    return Objects(runner, tokenizers, linked, whole.summary, _topological(every, where))


def _merge(left: Any, right: Any, where: str) -> Any:
    if not isinstance(left, Mapping) or not isinstance(right, Mapping):
        raise UsageError(
            "a key stands in objects.toml and in the profile",
            where=where,
            expected="each key in one of them, so that an override on the command line always acts",
            next_step="remove it from one of the two files",
        )
    merged = dict(left)
    for name, value in right.items():
        merged[name] = _merge(left[name], value, f"{where}.{name}") if name in left else value
    return merged


def _object(name: str, value: Any, where: str) -> ObjectDeclaration:
    check_name(name, where=where)
    fields = Fields(value, where=where, error=UsageError)
    default = fields.text("default_stage")
    build_all = fields.optional("build_all", bool) or False
    table = fields.take("stages", dict)
    fields.done()
    stages = {stage: _stage(StageRef(name, stage), row, f"{where}.stages.{stage}") for stage, row in table.items()}
    if default not in stages:
        fields.refuse(
            "the default stage is not declared", at="default_stage", expected=", ".join(stages), found=default
        )
    return ObjectDeclaration(name, default, build_all, stages)


def _stage(ref: StageRef, value: Any, where: str) -> StageDeclaration:
    check_name(ref.stage, where=where)
    fields = Fields(value, where=where, error=UsageError)
    recipe = fields.text("recipe")
    mode = fields.optional("mode", str)
    if mode is not None:
        check_name(mode, where=where)
    written = fields.optional("inputs", dict) or {}
    inputs, by_artifact = _inputs(written, f"{where}: inputs")
    sources = fields.optional("sources", dict) or {}
    tokenizer = fields.optional("tokenizer", str)
    config = tuple(fields.optional("config", list) or ())
    fields.done()
    for text in (*inputs.values(), *sources.values(), *config):
        if not isinstance(text, str):
            fields.refuse("not text", found=repr(text)[:80])
    for path in (*sources.values(), *config):
        check_path(path, where=where)
    parents = {check_name(role, where=where): _unlinked(text, where) for role, text in inputs.items()}
    return StageDeclaration(ref, recipe, mode, parents, sources, tokenizer, config, by_artifact)


def _inputs(written: Mapping[str, Any], where: str) -> tuple[dict[str, Any], frozenset[str]]:
    """Parents by role, each a ref or `{ ref = …, by = "artifact" }`, and the roles that are by artifact."""
    inputs, by_artifact = dict(written), set()
    for role, value in written.items():
        if not isinstance(value, Mapping):
            continue
        fields = Fields(value, where=f"{where}.{role}", error=UsageError)
        inputs[role], by = fields.text("ref"), fields.text("by")
        fields.done()
        if by not in ("content", "artifact"):
            fields.refuse("an unknown word", at="by", expected='"content" or "artifact"', found=by[:40])
        by_artifact |= {role} if by == "artifact" else set()
    return inputs, frozenset(by_artifact)


def _unlinked(text: str, where: str) -> StageRef:
    """A parent as written, carried in a StageRef until every object is known."""
    parse_ref(text, where=where)
    return StageRef(text, "")


def _linked(item: ObjectDeclaration, whole: Objects, where: str) -> ObjectDeclaration:
    stages = {}
    for name, stage in item.stages.items():
        inputs = {}
        for role, written in stage.inputs.items():
            ref = parse_ref(written.object, where=f"{where}: {stage.ref}")
            if ref.prefix is not None:
                raise UsageError(
                    "an input is pinned by digest",
                    where=f"{stage.ref}, {role}",
                    expected="object[.mode][@stage]",
                    next_step=f"name the stage that it means in {where}",
                )
            try:
                inputs[role] = whole.find(ref)
            except NoSuchRef as error:
                raise UsageError(
                    error.what,
                    where=f"{where}: {stage.ref}, input {role}",
                    expected=error.expected,
                    next_step=f"name one of these in {where}",
                ) from None
        stages[name] = StageDeclaration(
            stage.ref, stage.recipe, stage.mode, inputs, stage.sources, stage.tokenizer, stage.config, stage.by_artifact
        )
    return ObjectDeclaration(item.name, item.default_stage, item.build_all, stages)


def _check_slugs(every: Mapping[StageRef, StageDeclaration], where: str) -> None:
    seen: dict[str, StageRef] = {}
    for ref in every:
        other = seen.setdefault(fold(ref.slug), ref)
        if other != ref:
            raise UsageError(
                "two stages would share a pointer",
                where=where,
                found=f"{other} and {ref}: {ref.slug}.json",
                next_step="give one of them another name",
            )


def _check_tokenizers(every: Mapping[StageRef, StageDeclaration], known: Mapping[str, Any], where: str) -> None:
    for ref, stage in every.items():
        if stage.tokenizer is not None and stage.tokenizer not in known:
            raise UsageError(
                "a tokenizer is not declared",
                where=f"{where}: {ref}",
                expected="one of " + ", ".join(known),
                found=stage.tokenizer,
                next_step=f"name one of these, or declare it under [tokenizers] in {where}",
            )


def _summary(value: dict[str, Any] | None, where: str) -> Summary | None:
    if value is None:
        return None
    fields = Fields(value, where=f"{where}: summary", error=UsageError)
    summary = Summary(fields.text("file"), fields.text("key"), fields.text("from"))
    fields.done()
    return summary


def _topological(every: Mapping[StageRef, StageDeclaration], where: str) -> tuple[StageRef, ...]:
    """Parents first; among the ready ones the declared order decides."""
    done: dict[StageRef, None] = {}
    waiting = list(every)
    while waiting:
        ready = next((ref for ref in waiting if all(parent in done for parent in every[ref].inputs.values())), None)
        if ready is None:
            circle = " -> ".join(map(str, waiting[:8]))
            raise UsageError(
                "inputs form a circle", where=where, found=circle, next_step="take one of these inputs out"
            )
        done[ready] = None
        waiting.remove(ready)
    return tuple(done)
