"""The checkout: a project's root, its profile, and where things lie in it.

Place in the path: every command begins by finding one. `pyproject.toml` says where objects, profiles, lock, views and
reports are; `--profile`, VPSTORE_PROFILE or `params.yaml` says which profile is meant.
Invariants: nothing is written here, but the folders that `opened` makes for who does; no path in `[tool.vpstore]` leads
out of the checkout.

Example:
    checkout = Checkout.find(Path.cwd()); objects = checkout.objects
"""

from __future__ import annotations

import os
import re
import tomllib
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Final

from vpstore.errors import BadManifest, UsageError
from vpstore.repository import has_link
from vpstore.schema.fields import Fields
from vpstore.schema.lockfile import Lockfile
from vpstore.schema.objects import Objects, parse_objects
from vpstore.schema.paths import check_path
from vpstore.schema.ref import StageRef, check_name, nearest
from vpstore.storage import beneath
from vpstore.storage.pointers import Pointers
from vpstore.storage.refusals import disk_errors

PROFILE_VARIABLE: Final = "VPSTORE_PROFILE"
# A params.yaml that says nothing else, which needs no YAML to be read; a name that begins with two letters is never one
# of YAML's numbers, and the lookahead leaves out its words for true, false and null.
_ONLY_PROFILE: Final = re.compile(
    r"(?:[ ]*(?:#[ -~]*)?\n)*profile:[ ]+(?!(?:y|yes|n|no|true|false|on|off|null)\b)([a-z]{2}[a-z0-9_-]{0,77})[ ]*\n"
    r"(?:[ ]*(?:#[ -~]*)?\n)*"
)

_RESTORE: Final = "correct [tool.vpstore] in pyproject.toml, or bring the file back: git checkout --"
_ACCESS: Final = "give this user access to the file"


@dataclass(frozen=True)
class CheckoutConfig:
    """The table [tool.vpstore]: where things lie, relative to the root, with forward slashes."""

    objects: str
    profiles: str
    lock: str
    weights: str  # of all profiles
    reports: str  # of all profiles
    trusted_keys: str | None = None  # the folder of public keys (*.pem) whose signatures count here
    resume: bool = False  # the runner takes up what an interrupted build left; else each begins in an empty folder

    @classmethod
    def parse(cls, table: Any, *, where: str) -> CheckoutConfig:
        """Read the table.

        Raises:  UsageError: a missing or unknown field, a path that leads out of the checkout.
        """
        fields = Fields(table, where=where, error=UsageError)
        required = ("objects", "profiles", "lock", "weights", "reports")
        paths = {key: check_path(fields.text(key), where=fields.where) for key in required}
        keys = fields.optional("trusted_keys", str)
        trusted = None if keys is None else check_path(keys, where=fields.where)
        config = cls(**paths, trusted_keys=trusted, resume=bool(fields.optional("resume", bool)))
        fields.done()
        return config


@dataclass(frozen=True)
class Checkout:
    """One checkout under one profile."""

    root: Path
    profile: str
    config: CheckoutConfig

    @classmethod
    def find(cls, start: Path, *, profile: str | None = None) -> Checkout:
        """The checkout around `start`.

        Args:    profile: overrides VPSTORE_PROFILE, which overrides `profile:` in params.yaml.
        Raises:  UsageError: no pyproject.toml with [tool.vpstore] upwards, a bad table, no profile, an unknown profile.
        """
        root, table = _locate(start.absolute())
        config = CheckoutConfig.parse(table, where=f"{root / 'pyproject.toml'}: tool.vpstore")
        name = profile or os.environ.get(PROFILE_VARIABLE) or _profile_of_params(root)
        check_name(name, where="profile")
        checkout = cls(root, name, config)
        if not checkout.profile_path.is_file():
            known = checkout.profiles()
            meant = nearest(name, known)
            guess = f"did you mean {meant}? " if meant else ""
            raise UsageError(
                "no such profile",
                where=config.profiles,
                expected="one of " + ", ".join(known),
                found=name,
                next_step=f"{guess}--profile, {PROFILE_VARIABLE} or `profile:` in params.yaml names one",
            )
        return checkout

    @property
    def profile_path(self) -> Path:
        """The profile's TOML."""
        return self.root / self.config.profiles / f"{self.profile}.toml"

    @property
    def objects_path(self) -> Path:
        """objects.toml."""
        return self.root / self.config.objects

    @property
    def lock_path(self) -> Path:
        """vpstore.lock."""
        return self.root / self.config.lock

    def profiles(self) -> list[str]:
        """The names of all profiles, sorted."""
        return sorted(path.stem for path in (self.root / self.config.profiles).glob("*.toml"))

    @property
    def views(self) -> Path:
        """The folder of this profile's views."""
        return self.root / self.config.weights / self.profile

    @property
    def outputs(self) -> tuple[Path, Path]:
        """The folders of what builds make, of all profiles: they decide nothing that a stage is prepared from."""
        return self.root / self.config.weights, self.root / self.config.reports

    @property
    def pointers(self) -> Pointers:
        """This profile's pointers."""
        return Pointers(self.views / "refs", self._top(self.views))

    def reports_of(self, ref: StageRef) -> Path:
        """Where the reports of one stage are put."""
        return self.root / self.config.reports / self.profile / ref.slug

    @cached_property
    def objects(self) -> Objects:
        """What objects.toml and the profile declare.

        Raises:  UsageError: missing, not TOML, or wrong.
        """
        return parse_objects(read_toml(self.objects_path), read_toml(self.profile_path), where=self.config.objects)

    def lock(self) -> Lockfile:
        """The lock; an absent file is an empty one.

        Raises:  BadManifest: damaged.
        """
        with disk_errors(self.lock_path, "reading the lock"):
            try:
                data = self.lock_path.read_bytes()
            except FileNotFoundError:
                return Lockfile()
        try:
            return Lockfile.decode(data, where=str(self.lock_path))
        except BadManifest as error:
            name = self.config.lock
            error.next_step = f"`git restore {name}`; where git has none, remove it, then `vpstore lock`"
            raise

    def opened(self, folder: Path) -> AbstractContextManager[Path]:
        """A folder of this checkout, made if need be and held open for writing into it: see `storage.beneath`.

        Raises:  VpstoreError: a link on the way to it leads out of the checkout, or nowhere.
        """
        return beneath.opened(self._top(folder), folder)

    def _top(self, folder: Path) -> Path:
        """What no way to a folder may leave: the checkout, or the folder of weights if that is a link of one's own."""
        weights = self.root / self.config.weights
        return weights if folder.is_relative_to(weights) and self._has_weights_elsewhere else self.root

    @cached_property
    def _has_weights_elsewhere(self) -> bool:
        """Whether the folder of weights is on another disk, by a link that a person made and no clone brought.

        Where it leads there is nothing, or the folder of pointers of a profile of this checkout: no other folder.
        """
        weights = self.root / self.config.weights
        if "/" in self.config.weights or not weights.is_symlink() or not os.access(weights, os.R_OK | os.X_OK):
            return False
        if os.path.realpath(weights).startswith(os.path.realpath(self.root) + os.sep) or not weights.is_dir():
            return False
        is_given = not os.listdir(weights) or any((weights / name / "refs").is_dir() for name in self.profiles())
        return is_given and has_link(self.root, self.config.weights) is False

    def opened_file(self, file: Path) -> AbstractContextManager[Path]:
        """The place of a file of this checkout, there or not, in its folder held open; a link is followed inside.

        Raises:  VpstoreError: as `opened`.
        """
        return beneath.opened_file(self.root, file)

    def relative(self, path: Path) -> str:
        """A path for messages: relative to the root where it lies below it."""
        return path.relative_to(self.root).as_posix() if path.is_relative_to(self.root) else str(path)


def read_toml(path: Path) -> dict[str, Any]:
    """Read a TOML file.

    Raises:  UsageError: missing or not TOML.
    """
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UsageError("a configuration file is missing", where=str(path), next_step=f"{_RESTORE} {path}") from None
    except OSError as error:
        raise UsageError(
            "a configuration file cannot be read", where=str(path), found=str(error.strerror), next_step=_ACCESS
        ) from error
    except (ValueError, RecursionError) as error:  # not TOML, not UTF-8, a number of thousands of digits, too deep
        raise UsageError(
            "a file is not TOML", where=str(path), found=str(error)[:200], next_step="correct the file there"
        ) from error


def _locate(start: Path) -> tuple[Path, dict[str, Any]]:
    for folder in (start, *start.parents):
        file = folder / "pyproject.toml"
        if file.is_file():
            table = read_toml(file).get("tool", {}).get("vpstore")
            if table is not None:
                return folder, table
    raise UsageError(
        "not inside a checkout",
        where=str(start),
        expected="a pyproject.toml with [tool.vpstore] here or upwards",
        next_step="change into the project's directory",
    )


def _profile_of_params(root: Path) -> str:
    file = root / "params.yaml"
    try:
        text = file.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UsageError(
            "no profile is chosen",
            where=str(file),
            expected=f"--profile, {PROFILE_VARIABLE} or `profile:` in params.yaml",
            next_step="write `profile: NAME` into params.yaml, or add --profile NAME",
        ) from None
    except OSError as error:
        raise UsageError(
            "params.yaml cannot be read", where=str(file), found=str(error.strerror), next_step=_ACCESS
        ) from error
    except UnicodeDecodeError as error:
        raise _not_yaml(file, error) from error
    if match := _ONLY_PROFILE.fullmatch(text):
        return match[1]
    return _profile_of_yaml(text, file)


def _profile_of_yaml(text: str, file: Path) -> str:
    import yaml

    try:
        value = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise _not_yaml(file, error) from error
    profile = value.get("profile") if isinstance(value, dict) else None
    if not isinstance(profile, str):
        raise UsageError(
            "params.yaml names no profile",
            where=str(file),
            expected="profile: NAME",
            next_step="write that line into it, or add --profile NAME",
        )
    return profile


def _not_yaml(file: Path, error: Exception) -> UsageError:
    found = " ".join(str(error).split())[:200]
    return UsageError("params.yaml is not YAML", where=str(file), found=found, next_step="correct the file there")
