"""The files of a small project that DVC drives: text is set, bound and judged in milliseconds.

letters -> words -> pages@draft -> pages@final, each final page judged by `reports`; `stamps` hangs on letters alone.
"""

from __future__ import annotations

import hashlib
import json

LETTERS = "a quick brown fox\n"

PYPROJECT = """
[tool.vpstore]
objects = "configs/objects.toml"
profiles = "configs/profiles"
lock = "vpstore.lock"
weights = "weights"
reports = "reports"
"""

OBJECTS = """
format = 1
runner = "press.run"

[objects.letters]
default_stage = "main"
[objects.letters.stages.main]
recipe = "press.letters"
sources = { case = "configs/case.json" }

[objects.words]
default_stage = "main"
[objects.words.stages.main]
recipe = "press.words"
inputs = { parent = "letters" }
config = ["configs/words.toml"]

[objects.stamps]
default_stage = "main"
[objects.stamps.stages.main]
recipe = "press.stamps"
inputs = { parent = "letters" }

[objects.pages]
default_stage = "final"
[objects.pages.stages.draft]
recipe = "press.pages"
inputs = { parent = "words" }
config = ["configs/pages.toml"]
[objects.pages.stages.final]
recipe = "press.pages"
inputs = { parent = "pages@draft" }
config = ["configs/pages.toml"]

[objects.reports]
default_stage = "pages-final"
build_all = true
[objects.reports.stages.pages-draft]
recipe = "press.judge"
inputs = { parent = "pages@draft" }
[objects.reports.stages.pages-final]
recipe = "press.judge"
inputs = { parent = "pages@final" }
"""

RUN = """
import json
import os
import tomllib

from vpstore.runner import Prepared, PreparedSource
from vpstore.schema.ref import StageRef


def prepare(checkout, object, stage):
    declared = checkout.objects.stage(StageRef(object, stage))
    params = {}
    for path in declared.config:
        params.update(tomllib.loads((checkout.root / path).read_text())[stage])
    profile = tomllib.loads(checkout.profile_path.read_text())
    params.update(profile.get("params", {}).get(object, {}).get(stage, {}))
    sources = []
    for role, path in declared.sources.items():
        document = json.loads((checkout.root / path).read_text())
        for row in document["files"]:
            file = checkout.root / document["root"] / row["path"]
            sources.append(PreparedSource(f"{role}/{row['path']}", file, row["sha256"], row["size_bytes"]))
    return Prepared(declared.recipe, params, code_exclude=("press.run", "vpstore"), sources=tuple(sources))


def param_keys(checkout, object, stage):
    found = {path: [stage] for path in checkout.objects.stage(StageRef(object, stage)).config}
    profile = tomllib.loads(checkout.profile_path.read_text())
    if stage in profile.get("params", {}).get(object, {}):
        found["configs/profiles/${profile}.toml"] = [f"params.{object}.{stage}"]
    return found


def environment(prepared):
    return {"device": "cpu"}


def produce(prepared, inputs, scratch, progress):
    import importlib

    with open(os.environ["PRESS_LOG"], "a") as log:
        log.write(prepared.recipe_entry + "\\n")
    return importlib.import_module(prepared.recipe_entry).make(prepared, inputs, scratch)
"""

BINDING = """
import json

from vpstore.runner import Staged, StagedFile


def bound(scratch, text, **metrics):
    (scratch / "text.txt").write_text(text)
    (scratch / "metrics.json").write_text(json.dumps({"length": len(text), **metrics}) + "\\n")
    return Staged([StagedFile("text.txt", "text/plain", scratch / "text.txt"),
                   StagedFile("reports/metrics.json", "application/json", scratch / "metrics.json")])


def text_of(inputs):
    return (inputs["parent"].path / "text.txt").read_text()
"""

LETTERS_RECIPE = """
from press.binding import bound


def make(prepared, inputs, scratch):
    return bound(scratch, prepared.sources[0].path.read_text())
"""

WORDS = """
from press.binding import bound, text_of
from press.spelling import spelled


def make(prepared, inputs, scratch):
    return bound(scratch, spelled(text_of(inputs)) * prepared.params["repeat"])
"""

SPELLING = """
def spelled(text):
    return text.replace("quick", "rapid")
"""

STAMPS = """
from press.binding import bound, text_of


def make(prepared, inputs, scratch):
    return bound(scratch, text_of(inputs).upper())
"""

PAGES = """
import time

from press.binding import bound, text_of
from vpstore.errors import GateMissed


def make(prepared, inputs, scratch):
    text = prepared.params["title"] + text_of(inputs)
    (scratch / "begun.txt").write_text("set")
    time.sleep(prepared.params["seconds"])
    longest = prepared.params["longest"]
    if len(text) > longest:
        raise GateMissed("the page is too long", where="press.pages", expected=f"<= {longest}", found=str(len(text)))
    return bound(scratch, text)
"""

JUDGE = """
import json

from press.binding import bound, text_of
from vpstore.runner import Staged, StagedFile


def make(prepared, inputs, scratch):
    text = text_of(inputs)
    staged = bound(scratch, text, vowels=sum(text.count(vowel) for vowel in "aeiou"))
    rows = [{"line": number, "length": len(line)} for number, line in enumerate(text.splitlines())]
    (scratch / "lines.json").write_text(json.dumps(rows) + "\\n")
    plot = StagedFile("reports/lines.json", "application/json", scratch / "lines.json")
    return Staged([*staged.files, plot])
"""

PAGES_TOML = """
[draft]
title = "Draft: "
seconds = 0
longest = 900

[final]
title = "Page: "
seconds = 0
"""

CASE = {
    "root": "assets",
    "files": [
        {
            "path": "letters.txt",
            "sha256": hashlib.sha256(LETTERS.encode()).hexdigest(),
            "size_bytes": len(LETTERS),
        }
    ],
}

FILES = {
    "pyproject.toml": PYPROJECT,
    "params.yaml": "profile: tiny\n",
    "configs/objects.toml": OBJECTS,
    "configs/profiles/tiny.toml": "[params.pages.final]\nlongest = 200\n",
    "configs/profiles/large.toml": "[params.pages.final]\nlongest = 2000\n",
    "configs/words.toml": "[main]\nrepeat = 2\n",
    "configs/pages.toml": PAGES_TOML,
    "configs/case.json": json.dumps(CASE, indent=2),
    "assets/letters.txt": LETTERS,
    "press/__init__.py": "",
    "press/run.py": RUN,
    "press/binding.py": BINDING,
    "press/letters.py": LETTERS_RECIPE,
    "press/words.py": WORDS,
    "press/spelling.py": SPELLING,
    "press/stamps.py": STAMPS,
    "press/pages.py": PAGES,
    "press/judge.py": JUDGE,
    ".gitignore": "/.vpstore/\n/weights/\n__pycache__/\n/dvc_plots/\n",
    ".dvcignore": "/.vpstore/\n/weights/*/*@*\n__pycache__/\n",
}
