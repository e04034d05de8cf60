"""Carry the chain out at full size, on donors of the real shapes with random weights.

Place: beside `full_shape_donors`, which makes the donors. The profile `upcycle` is taken as it stands, but for what it
pins (the random donors), its amounts (a hundred steps of 8,192 tokens, a few thousand tokens of calibration) and the
thresholds that ask for sense, which random weights have none of. Shapes, parameter counts, dtypes, files and the gates
of exactness are the real ones. So this shows that every stage loads, computes, fits in memory and publishes at full
size, and how long that takes; not how good it is.

Use: python -m benchmarks.full_shape_chain FOLDER [--quick] [--ranks N] [--stages REF …] [--report FILE]
What is built stays in FOLDER; run again, it goes on, and the rows of the report that were there stay. About 50 GB of
disk, and 100 more for vpMoE@smoke, whose state of 48 GB stays until the next one is written; that stage takes a card of
141 GB, or two of 80 with --ranks 2. VPSTORE_DEVICE=cuda for OMP, walks and trainings.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import tomlkit

from benchmarks.projects import REPOSITORY
from benchmarks.sides import Command

PROFILE = "full-shape"
STAGES = (
    "o200k-harmony@main",
    "qwen3-0_6B@main",
    "gpt-oss-20b@main",
    "healing_text@main",
    "qwen3-o200k-coefficients@main",
    "qwen3-0_6B-o200k@transplant",
    "vpDense0-5_28@convert",
    "vpDense0-5_28@compat-heal",
    "vpDense0-5_28@real-morph",
    "vpDense0-5_28@real-heal",
    "vpDense@expand",
    "vpDense@wake-up",
    "vpMoE@upcycle",
    "synth_kd@main",
    "vpMoE@smoke",
    "stage1@main",
)
_TRAINING: dict[str, Any] = {
    "train": {
        "steps": 100, "sequences": 4, "micro_sequences": 4, "save_every_steps": 50, "schedule": {"warmup_steps": 10},
    },
    "gates": {
        "numeric": {"three_digit_stride": 100, "nll_margin": 1e9},
        "harmony": {"mode": "sampled", "threshold": 0.0, "rows": 8, "max_new_tokens": 64},
        "held_out": {"tokens": 16384, "improvement": -1e9},
    },
}  # fmt: skip
_SENSELESS = {"gates": {"max_spikes": 100}}
_AMOUNTS: dict[str, Any] = {
    "healing_text": {"main": {"train_tokens": 400_000, "valid_tokens": 40_000}},
    "synth_kd": {"main": {"held_out_fraction": 0.1}},
    "qwen3-o200k-coefficients": {"main": {"max_mean_residual": 1.0}},
    "vpDense0-5_28": {
        "compat": {
            "convert": {
                "calibration_tokens": 8192, "probe_tokens": 2048, "ffn_steps": 20, "max_loss_over_unigram": 1e9,
            },
            "compat-heal": _TRAINING,
        },
        "real": {
            "real-morph": {
                "calibration_tokens": 8192, "probe_tokens": 2048, "max_loss_increase": 1e9, "max_flipped_share": 1.0,
            },
            "real-heal": _TRAINING,
        },
    },
    "vpDense": {
        "real": {
            "expand": {"check_tokens": 512},
            "wake-up": {**_TRAINING, "new_layers_steps": 25, "second_warmup_steps": 5},
        }
    },
    "vpMoE": {
        "real": {
            "upcycle": {"calibration_tokens": 4096, "check_tokens": 64},
            "smoke": _TRAINING,
        }
    },
}  # fmt: skip
# What an object's own configuration says a profile may not say, too: these are changed there.
_OBJECTS: dict[str, dict[str, Any]] = {
    "configs/upcycle/vpDense0-5_28-compat.toml": {"compat-heal": _SENSELESS},
    "configs/upcycle/vpDense0-5_28-real.toml": {"real-heal": _SENSELESS},
    "configs/upcycle/vpDense-real.toml": {"wake-up": _SENSELESS},
    "configs/upcycle/vpMoE-real.toml": {
        "upcycle": {"min_router_entropy": 0.0, "max_expert_load": 1.0},
        "smoke": {"gates": {"max_spikes": 100, "router": {"max_dead": 1.0, "max_load": 1.0}}},
    },
}

_FITS = {"sequence_length": 512, "calibration_tokens": 1024, "probe_tokens": 512}
_QUICK: dict[str, Any] = {  # the shapes stay; OMP sees a small dictionary, and the fits a thousand tokens
    "qwen3-o200k-coefficients": {
        "main": {"dictionary_size": 4096, "calibration_anchors": 512, "atoms_per_token": 8},
    },
    "vpDense0-5_28": {"compat": {"convert": {**_FITS, "ffn_steps": 5}}, "real": {"real-morph": _FITS}},
}


def merged(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """The tables of `base` with those of `changes` laid over them."""
    found = dict(base)
    for key, value in changes.items():
        found[key] = merged(found.get(key, {}), value) if isinstance(value, dict) else value
    return found


class Place:
    """The folder that everything lies in: a checkout of what is here, and the donors."""

    def __init__(self, root: Path, *, is_quick: bool = False, ranks: int = 1) -> None:
        self.ranks = ranks
        self.amounts = merged(_AMOUNTS, _QUICK) if is_quick else _AMOUNTS
        self.project, self.donors = root / "project", root / "donors"
        self.environment = {
            **os.environ, "PYTHONPATH": os.pathsep.join([str(self.project), os.environ.get("PYTHONPATH", "")]),
            "VPSTORE_ROOT": str(root / "store"), "VPSTORE_PROFILE": PROFILE,
        }  # fmt: skip

    def prepare(self) -> None:
        """Copy the sources, make the donors, write the profile."""
        ignored = shutil.ignore_patterns(".git", ".venv", ".vpstore", "weights", "runs", "__pycache__")
        shutil.copytree(REPOSITORY, self.project, ignore=ignored, dirs_exist_ok=True)
        for name, changes in _OBJECTS.items():
            path = self.project / name
            document = merged(tomllib.loads(path.read_text(encoding="utf-8")), changes)
            path.write_text(tomlkit.dumps(document), encoding="utf-8")
        text = (self.project / "configs/profiles/upcycle.toml").read_text(encoding="utf-8")
        profile = merged(tomllib.loads(text), {"params": self.amounts, "runtime": {"ranks": self.ranks}})
        for name in ("qwen3-0_6B", "gpt-oss-20b"):
            profile["objects"][name]["stages"]["main"]["sources"] = {
                "donor": f"configs/upcycle/provenance/random-{name}.json"
            }
        (self.project / f"configs/profiles/{PROFILE}.toml").write_text(tomlkit.dumps(profile), encoding="utf-8")
        if not (self.donors / "gpt-oss-20b.provenance.json").exists():
            self.make_donors()
        for name in ("qwen3-0_6B", "gpt-oss-20b"):
            shutil.copy(
                self.donors / f"{name}.provenance.json", self.project / f"configs/upcycle/provenance/random-{name}.json"
            )

    def make_donors(self) -> None:
        """The donors, and the o200k tokenizer that the reference carries, from the profile that needs no donors."""
        tiny = {**self.environment, "VPSTORE_PROFILE": "tiny"}
        self.vpstore("build", "o200k-harmony@main", environment=tiny)
        view = self.vpstore("resolve", "o200k-harmony@main", environment=tiny).strip()
        arguments = [
            "-m",
            "benchmarks.full_shape_donors",
            str(self.donors),
            "--o200k-tokenizer",
            f"{view}/tokenizer.json",
        ]
        subprocess.run([sys.executable, *arguments], cwd=self.project, env=self.environment, check=True)

    def vpstore(self, *arguments: str, environment: dict[str, str] | None = None) -> str:
        """Run a command; its standard output."""
        done = subprocess.run(
            [sys.executable, "-m", "vpstore", *arguments],
            cwd=self.project, env=environment or self.environment, check=True, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        return done.stdout

    def build(self, ref: str) -> dict[str, Any]:
        """Build one stage in a process of its own: seconds, peak memory, size, parameters, metrics."""
        command = Command([sys.executable, "-m", "vpstore", "build", ref], self.project, self.environment)
        run = command.run()
        shown = json.loads(self.vpstore("show", ref, "--json"))
        files = shown["manifest"]["files"]
        report = self.project / "reports" / PROFILE / ref.replace("@", "-") / "metrics.json"
        return {
            "ref": ref,
            "ranks": self.ranks,
            "seconds": round(run.seconds, 1),
            "cpu_seconds": round(run.cpu_seconds, 1),
            "peak_gib": round(run.peak_bytes / (1 << 30), 2),
            "size_bytes": sum(row["size_bytes"] for row in files),
            "artifact": shown["artifact"],
            "metrics": json.loads(report.read_text()) if report.exists() else None,
        }


def main() -> None:
    """Build stage after stage, and write what each took as soon as it is known."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--stages", nargs="+", default=list(STAGES), metavar="REF")
    parser.add_argument(
        "--quick", action="store_true", help="a small dictionary for OMP, a thousand tokens for the fits"
    )
    parser.add_argument("--ranks", type=int, default=1, help="cards that share a training")
    parser.add_argument("--report", type=Path, help="where to write the figures as JSON")
    given = parser.parse_args()
    given.folder.mkdir(parents=True, exist_ok=True)
    place = Place(given.folder.resolve(), is_quick=given.quick, ranks=given.ranks)
    place.prepare()
    rows = []
    if given.report and given.report.exists():
        rows = [row for row in json.loads(given.report.read_text())["stages"] if row["ref"] not in given.stages]
    for ref in given.stages:
        rows.append(place.build(ref))
        shown = {key: value for key, value in rows[-1].items() if key != "metrics"}
        print(json.dumps(shown), flush=True)
        if given.report:
            given.report.write_text(json.dumps({"schema": 1, "stages": rows}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
