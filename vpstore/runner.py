"""The joint between vpstore and a project: what a runner module must offer, and how it is loaded.

Place in the path: `objects.toml` names the runner; build asks it what goes into a stage, under which environment it
would run, and to run it. vpstore imports no recipe: it loads the runner by name, with the checkout's root first on the
path, and its src/ behind it.
Invariants: `prepare` and `environment` are fast and load no tensor library; `produce`, `needs` and `recompute` run in a
process of their own, from a tree with the normal form of the recipe, and write only into their scratch folder; whatever
the module does, the runner that `load_runner` gives raises errors of ours (or Ctrl-C, or what the disk refuses).

Example:
    runner = load_runner(checkout); prepared = runner.prepare(checkout, "vpMoE", "smoke")
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple, Protocol, cast

from vpstore.bytecode import drop_stale_bytecode
from vpstore.checkout import Checkout
from vpstore.errors import UsageError
from vpstore.project_code import checked, project_code
from vpstore.repository import module_places
from vpstore.schema.digest import Digest
from vpstore.schema.manifest import Pin
from vpstore.schema.ref import StageRef
from vpstore.storage.compiled import keep_compiled

__all__ = [
    "Finding",
    "LoadedRunner",
    "Needs",
    "Pin",
    "Prepared",
    "PreparedSource",
    "ResolvedInput",
    "Runner",
    "Selection",
    "Staged",
    "StagedFile",
    "TokenizerRecord",
    "load_runner",
]

ProgressFunction = Callable[[str, int, int], None]  # label, done, total


class TokenizerRecord(NamedTuple):
    """The rank file that the ids of an artifact mean: a pin of the role `tokenizer`, as it was called at first."""

    family: str
    digest: Digest
    padded_vocab: int


@dataclass(frozen=True)
class PreparedSource:
    """A file from outside: its role (`donor/model.safetensors`), where it should lie, and what it must be."""

    role: str
    path: Path
    sha256: str
    size_bytes: int | None = None


@dataclass(frozen=True)
class Prepared:
    """What goes into a build, known without running it."""

    recipe_entry: str  # the recipe's module, for instance "recipes.convert_dense"
    # Typed config after the profile is merged; `produce` gets it as `schema.typed.plain` does.
    params: Mapping[str, Any]
    code_always: tuple[str, ...] = ()  # modules that make bytes though the entry may not import them
    code_exclude: tuple[str, ...] = ()  # modules (and what is below them) that move bytes but do not make them
    sources: tuple[PreparedSource, ...] = ()
    tokenizer: TokenizerRecord | None = None
    verbatim: bool = False  # a donor: no provenance.json is added
    settings: Mapping[str, Any] = field(default_factory=dict)  # how to run it: in no key, maybe in `environment`
    pins: tuple[Pin, ...] = ()  # files that decide what bytes mean
    variables: Mapping[str, str] = field(default_factory=dict)  # of the environment, as far as they decide bytes


@dataclass(frozen=True)
class ResolvedInput:
    """One verified parent, shown as a directory: of it a recipe can know what the build key covers, and no more.

    For an input that objects.toml declares `by = "artifact"`, and for `export`, `ref` is object@stage and `artifact`
    the artifact's digest. For any other input `ref` is the role and `artifact` the digest of the content, so that a
    parent rebuilt to the same content changes nothing; the directory has no artifact.json and no provenance.json.
    """

    role: str
    ref: str
    artifact: Digest
    path: Path


@dataclass(frozen=True)
class StagedFile:
    """One file of the result: its path in the artifact and where its bytes lie.

    A file inside the scratch folder is moved into the store, one outside, or a link to one, is copied.
    """

    path: str
    media_type: str
    source: Path


@dataclass(frozen=True)
class Staged:
    """What a build has made."""

    files: list[StagedFile]
    intermediates: list[StagedFile] = field(default_factory=list)


@dataclass(frozen=True)
class Needs:
    """What a build takes besides time, as the runner knows it before the work."""

    disk_bytes: int  # in the scratch folder
    memory_bytes: int  # of the host, at the peak


@dataclass(frozen=True)
class Finding:
    """What a runner says of one thing that a profile asks of this machine."""

    name: str
    ok: bool
    detail: str = ""
    next_step: str = ""


@dataclass(frozen=True)
class Selection:
    """Which tensors of a plan are to be computed again, on their own."""

    names: tuple[str, ...]
    intermediates: Mapping[str, Path] | None = None  # what many tensors need, by name; None: computed again, too


class Runner(Protocol):
    """The module-level functions of a runner module."""

    def prepare(self, checkout: Checkout, object: str, stage: str) -> Prepared:
        """Read the config of one stage. Fast, and without a tensor library.

        Raises:  UsageError, RecipeRefused.
        """

    def environment(self, prepared: Prepared) -> dict[str, str]:
        """The package versions and the device kind under which this build would run."""

    def produce(
        self, prepared: Prepared, inputs: Mapping[str, ResolvedInput], scratch: Path, progress: ProgressFunction
    ) -> Staged:
        """Run the recipe.

        Args:    scratch: an empty folder; with `resume = true` in [tool.vpstore], one in which an earlier run of the
                 same key may have left things, whole or not, when it was killed or failed.
        Raises:  RecipeRefused, GateMissed.
        """

    def recompute(
        self,
        prepared: Prepared,
        inputs: Mapping[str, ResolvedInput],
        selection: Selection,
        scratch: Path,
        progress: ProgressFunction,
    ) -> Staged:
        """Compute some tensors of a plan. Optional: only `reproduce --sample` and `--tensor` ask for it.

        Returns: shards at their full size and with their headers, of which only the selected tensors are computed; the
                 plan's other files; the intermediates, if they were computed.
        Raises:  UsageError: the recipe is no plan, so its tensors cannot be had one by one; RecipeRefused.
        """

    def needs(self, prepared: Prepared, inputs: Mapping[str, ResolvedInput], scratch: Path) -> Needs | None:
        """What `produce` is going to take. Optional; None: not known."""

    def preflight(self, checkout: Checkout, place: Path) -> list[Finding]:
        """What a profile asks of this machine; `place` is on the disk that artifacts are written to. Optional."""

    def exporters(self) -> dict[str, str]:
        """Formats besides plain files that `export --to` offers: name -> what it is for. Optional: none.

        Fast, and without a tensor library.
        """

    def export(self, target: str, source: ResolvedInput, folder: Path, progress: ProgressFunction) -> None:
        """Write an artifact in one of those formats. Only asked for if `exporters` names it.

        Args:    folder: an empty folder, which appears under its own name when this returns.
        Raises:  RecipeRefused: the artifact is not what the format is for.
        """

    def param_keys(self, checkout: Checkout, object: str, stage: str) -> dict[str, list[str]]:
        """Where the params of a stage stand, TOML file -> dotted keys. Only the generator of dvc.yaml asks for it."""


def load_runner(checkout: Checkout) -> LoadedRunner:
    """Import the runner module of a checkout.

    Raises:  UsageError: it is not there, or lacks a function.
    """
    name, places = checkout.objects.runner, [str(place) for place in module_places(checkout.root) if place.is_dir()]
    if sys.path[: len(places)] != places:
        sys.path[:0] = places
    drop_stale_bytecode(checkout.root, checkout.root / name.split(".")[0])
    keep_compiled()  # what the runner imports later may be a tensor library
    with project_code(f"the runner {name}", checkout.root):
        try:
            module = importlib.import_module(name)
        except ModuleNotFoundError as error:
            if not f"{name}.".startswith(f"{error.name}."):  # something that it imports
                raise
            raise UsageError(
                "the runner cannot be imported", where=f"{checkout.config.objects}: runner",
                expected=f"module {name} under {checkout.root}", found=str(error),
                next_step="correct `runner`, or bring the module back",
            ) from error  # fmt: skip
    _refuse_lacking(module, "prepare", "environment", "produce")
    return LoadedRunner(checkout.root, module)


def _refuse_lacking(module: ModuleType, *parts: str) -> None:
    missing = [part for part in parts if not callable(getattr(module, part, None))]
    if missing:
        next_step = "add them to the runner module; vpstore/runner.py says what each does"
        raise UsageError(
            "the runner lacks functions", where=module.__name__, found=", ".join(missing), next_step=next_step
        )


@dataclass(frozen=True)
class LoadedRunner:
    """What this process asks a runner, each of whose failures is an error of ours; recipes run in another one."""

    root: Path
    module: Any  # the project's, with whatever functions it has

    def prepare(self, checkout: Checkout, object: str, stage: str) -> Prepared:
        """As `Runner.prepare`."""
        what, files = f"prepare for {object}@{stage}", _configuration(checkout, StageRef(object, stage))
        with project_code(what, self.root, files=files):
            found = self.module.prepare(checkout, object, stage)
        return cast(Prepared, checked(found, Prepared, what))

    def environment(self, prepared: Prepared) -> dict[str, str]:
        """As `Runner.environment`."""
        what = f"environment for {prepared.recipe_entry}"
        with project_code(what, self.root):
            found = self.module.environment(prepared)
        return cast(dict[str, str], checked(found, Mapping, what))

    def preflight(self, checkout: Checkout, place: Path) -> list[Finding]:
        """As `Runner.preflight`."""
        if not callable(getattr(self.module, "preflight", None)):
            return []
        with project_code(f"preflight of profile {checkout.profile}", self.root):
            found = self.module.preflight(checkout, place)
        return [cast(Finding, checked(one, Finding, "preflight")) for one in found]

    def exporters(self) -> dict[str, str]:
        """As `Runner.exporters`."""
        if not callable(getattr(self.module, "exporters", None)):
            return {}
        _refuse_lacking(self.module, "export")
        with project_code("exporters", self.root):
            found = self.module.exporters()
        return cast(dict[str, str], checked(found, Mapping, "exporters"))

    def export(self, target: str, source: ResolvedInput, folder: Path, progress: ProgressFunction) -> None:
        """As `Runner.export`."""
        with project_code(f"export to {target}", self.root):
            self.module.export(target, source, folder, progress)

    def param_keys(self, checkout: Checkout, object: str, stage: str) -> dict[str, list[str]]:
        """As `Runner.param_keys`."""
        _refuse_lacking(self.module, "param_keys")
        what, files = f"param_keys for {object}@{stage}", _configuration(checkout, StageRef(object, stage))
        with project_code(what, self.root, files=files):
            found = self.module.param_keys(checkout, object, stage)
        return cast(dict[str, list[str]], checked(found, Mapping, what))


def _configuration(checkout: Checkout, ref: StageRef) -> Iterator[Path]:
    """The files that a stage declares, read only if something went wrong."""
    declared = checkout.objects.stage(ref)
    yield from (checkout.root / path for path in (*declared.config, *declared.sources.values()))
