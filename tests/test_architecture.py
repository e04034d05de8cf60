"""The house: imports run one way, and no tensor library, engine or command line stands in the wrong room."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Container
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# Each room may import only rooms of a lower rank; two rooms of one rank do not know each other.
RANKS = {
    "vpstore": 0,
    "vpstore.errors": 0,
    "vpstore.missing": 2,
    "vpstore.repository": 1,
    "vpstore.schema": 1,
    "vpstore.storage": 2,
    "vpstore.storage.remotes": 3,
    "vpstore.narration": 3,
    "vpstore.numbers": 3,
    "vpstore.arrays": 3,
    "vpstore.code": 3,
    "vpstore.bytecode": 3,
    "vpstore.project_code": 3,
    "vpstore.surroundings": 3,
    "vpstore.checkout": 3,
    "vpstore.holdings": 4,
    "vpstore.runner": 4,
    "vpstore.signatures": 4,
    "vpstore.staging": 5,
    "vpstore.workspace": 5,
    "vpstore.preparation": 6,
    "vpstore.needs": 6,
    "vpstore.pipeline": 6,
    "vpstore.lineage": 6,
    "vpstore.claims": 5,
    "vpstore.collecting": 6,
    "vpstore.sharing": 6,
    "vpstore.evidence": 6,
    "vpstore.stale": 7,
    "vpstore.verbs": 8,
    "vpstore.rebuilding": 9,
    "vpstore.building": 10,
    "vpstore.api": 11,
    "vpstore.cli": 12,
    "vpstore.__main__": 13,
}
# Rooms whose modules do not import one another: each stands alone.
LONE = {"vpstore.verbs"}
# What may be imported where, besides the standard library.
ALLOWED = {
    "vpstore.schema": {"blake3", "rfc8785"},
    "vpstore.storage": {"blake3"},
    "vpstore.storage.remotes": {"dvc", "dvc_objects"},
    "vpstore.checkout": {"yaml"},
    "vpstore.numbers": {"numpy"},
    "vpstore.arrays": {"numpy", "ml_dtypes", "torch"},  # loaded when somebody asks for an array
    "vpstore.signatures": {"cryptography"},
    "vpstore.pipeline": {"yaml"},
    "vpstore.cli": {"click"},
}
# More than five parameters (a command: seven). Each of these has as many independent values as the formula behind it,
# and a bundle would only hide them.
MANY_PARAMETERS = {
    "recipes/ops/router.py:router_rows": 6,
    "recipes/ops/tpa.py:low_rank_factors": 6,
    "recipes/train/losses.py:weighted_token_losses": 6,
    "recipes/train/losses.py:forward": 6,
    "recipes/train/head_loss.py:weighted_losses": 6,
    "recipes/train/head_loss.py:forward": 6,
    "recipes/train/slopes.py:_slopes": 8,
    "recipes/model/grouped.py:forward": 7,
    "recipes/model/factor_kernel.py:_gradients": 10,
    "recipes/train/loop.py:__init__": 6,
    "recipes/ops/omp_kernels.py:block_bounds": 8,
    "recipes/ops/omp_kernels.py:list_blocks": 10,
    "recipes/ops/omp_kernels.py:list_atoms": 13,
    "recipes/ops/omp_kernels.py:rank": 15,
    "recipes/ops/omp_kernels.py:take": 10,
    "recipes/ops/omp_kernels.py:inner_products": 8,
    "recipes/ops/omp_kernels.py:advance": 14,
    "recipes/ops/omp_kernels.py:residuals": 16,
    "vpstore/api/reading.py:resolve": 6,  # switches of a call, by keyword
    # What transformers calls by keyword.
    "recipes/huggingface/modeling_vpmoe.py:eager_attention_forward": 7,
    "recipes/huggingface/modeling_vpmoe.py:sdpa_attention_forward": 7,
    "recipes/huggingface/modeling_vpmoe.py:forward": 9,
}
# More than 300 lines. A model that transformers loads as remote code travels as one file, or by relative imports.
LONG_FILES = {"recipes/huggingface/modeling_vpmoe.py": 560}
TYPING_ONLY = "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from a.one import X"
PURE_FORBIDDEN = {"os", "pathlib", "time", "datetime", "io", "shutil", "subprocess", "socket", "random", "secrets"}


@cache
def modules(package: str) -> dict[str, ast.Module]:
    found = {}
    for path in sorted((ROOT / package).rglob("*.py")):
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        found[name] = ast.parse(path.read_bytes())
    return found


@cache
def imports(tree: ast.AST) -> list[str]:
    """Every name a tree imports, with its module, also inside functions and for types only."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative import"
            found += [f"{node.module}.{alias.name}" for alias in node.names]
    return found


def room(module: str) -> str:
    parts = module.split(".")
    for end in (3, 2, 1):
        if (name := ".".join(parts[:end])) in RANKS:
            return name
    raise AssertionError(f"{module} stands in no room: give it a rank")


MODULES = modules("vpstore")


def own(name: str, among: Container[str] = MODULES) -> str:
    """The module that an imported name means: itself, or the one it comes from."""
    while name and name not in among:
        name = name.rpartition(".")[0]
    return name


def violations(trees: dict[str, ast.Module]) -> list[str]:
    found = []
    for module, tree in trees.items():
        here = room(module)
        for name in imports(tree):
            if not name.startswith("vpstore"):
                continue
            target = own(name)
            there = room(target)
            if target in ("vpstore", module) or (module == "vpstore" and there == "vpstore.api"):
                continue  # the package's own name (its version), and its lazy door
            if RANKS[there] > RANKS[here] or (there != here and RANKS[there] == RANKS[here] and there != "vpstore"):
                found.append(f"{module} imports {target}")
            if here == there and here in LONE and module != here:
                found.append(f"{module} imports its sibling {target}")
    return found


def test_imports_run_one_way() -> None:
    assert violations(MODULES) == []


@pytest.mark.parametrize(
    ("module", "text"),
    [
        ("vpstore.schema.digest", "from vpstore.storage import atomic"),
        ("vpstore.verbs.publish", "def f():\n    from vpstore.verbs.resolve import resolve"),
        ("vpstore.verbs.publish", "import vpstore.cli"),
        ("vpstore.storage.keys", "from vpstore import api"),
    ],
)
def test_a_wrong_import_is_noticed(module: str, text: str) -> None:
    assert violations({module: ast.parse(text)})


def circles(trees: dict[str, ast.Module], package: str) -> list[str]:
    """The modules that stand on a circle of imports, or import one that does."""
    edges = {
        module: {own(name, trees) for name in imports(tree)} - {module, package, ""}
        for module, tree in trees.items()
        if module != package  # vpstore's lazy door leads to the api on purpose
    }
    # The package of the command line names its own modules, so that importing it declares the commands.
    edges.pop("vpstore.cli", None)
    done = {"vpstore.cli"}
    while ready := [module for module in edges if module not in done and edges[module] <= done]:
        done.update(ready)
    return sorted(edges.keys() - done)


@pytest.mark.parametrize("package", ["vpstore", "recipes"])
def test_no_circles(package: str) -> None:
    assert circles(modules(package), package) == []


@pytest.mark.parametrize("back", ["from a import one\none.x()", "def f():\n    import a.one", TYPING_ONLY])
def test_a_circle_is_noticed(back: str) -> None:
    trees = {"a": "", "a.one": "from a.two import y", "a.two": back, "a.three": "import a.four", "a.four": ""}
    assert circles({name: ast.parse(text) for name, text in trees.items()}, "a") == ["a.one", "a.two"]


def test_foreign_packages_stay_in_their_rooms() -> None:
    found = []
    for module, tree in MODULES.items():
        for name in imports(tree):
            top = name.split(".")[0]
            if top in sys.stdlib_module_names or top == "vpstore":
                continue
            if top not in ALLOWED.get(room(module), set()):
                found.append(f"{module} imports {top}")
    assert found == []


def test_the_schema_is_pure() -> None:
    found = []
    for module, tree in MODULES.items():
        if room(module) != "vpstore.schema":
            continue
        found += [f"{module} imports {name}" for name in imports(tree) if name.split(".")[0] in PURE_FORBIDDEN]
        found += [
            f"{module} opens a file"
            for node in ast.walk(tree)
            if isinstance(node, ast.Call)
            and isinstance(node.func, ast.Name)
            and node.func.id in {"open", "print", "input"}
        ]
    assert found == []


CHANGING = {
    "chmod", "chown", "copy2", "copyfile", "copytree", "fchmod", "hardlink_to", "lchmod", "makedirs", "mkdir",
    "removedirs", "rename", "renames", "rmdir", "rmtree", "symlink_to", "touch", "truncate", "unlink", "utime",
    "write_bytes", "write_text",
}  # fmt: skip
WRITING_MODE = re.compile(r"[rwxabt+]*[wxa+][rwxabt+]*")


def disk_changes(tree: ast.AST) -> list[str]:
    """Every call that changes a disk by itself, whatever it is called on; what `atomic` does is storage's own."""
    found = []
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        name = node.func.attr if isinstance(node.func, ast.Attribute) else ast.unparse(node.func)
        receiver = ast.unparse(node.func.value) if isinstance(node.func, ast.Attribute) else ""
        values = [*node.args, *(keyword.value for keyword in node.keywords)]
        texts = [str(value.value) for value in values if isinstance(value, ast.Constant)]
        if receiver == "self._fs":  # fsspec's: a remote, no disk of ours
            continue
        changes = name in CHANGING and receiver not in {"", "atomic"}
        changes |= name == "replace" and (receiver == "os" or (receiver != "" and len(values) == 1))  # of text: two
        changes |= name in {"remove", "link", "symlink"} and receiver == "os"
        changes |= name == "open" and any(WRITING_MODE.fullmatch(text) for text in texts)
        changes |= name == "open" and receiver == "os" and not any("devnull" in ast.unparse(value) for value in values)
        if changes:
            found.append(f"{node.lineno} {ast.unparse(node.func)}")
    return found


def test_only_storage_changes_a_disk() -> None:
    """Every write, rename, link and unlink is one of storage's, so that faults can be injected in one place."""
    found = []
    for module, tree in MODULES.items():
        if room(module) != "vpstore.storage":
            found += [f"{module}:{call}" for call in disk_changes(tree)]
    assert found == []


@pytest.mark.parametrize(
    "text",
    [
        "place.chmod(0o644)", "place.parent.mkdir()", "os.makedirs(x)", "shutil.rmtree(x)", "os.replace(a, b)",
        "folder.joinpath(name).replace(target)", "self.file.write_text('x')", "open(x, 'w')", "open(x, mode='ab')",
        "x.open('r+b')", "x.open('xb', buffering=0)", "os.open(x, os.O_WRONLY | os.O_CREAT)", "remote_path.unlink()",
    ],
)  # fmt: skip
def test_a_change_of_the_disk_is_noticed(text: str) -> None:
    assert disk_changes(ast.parse(text))


@pytest.mark.parametrize(
    "text", ["name.replace('-', '_')", "replace(row, where=x)", "atomic.rename(a, b)", "x.open('rb')", "Store.open(x)"]
)
def test_what_changes_no_disk_is_not_taken_for_it(text: str) -> None:
    assert disk_changes(ast.parse(text)) == []


# Where each module that writes by storage's functions writes to. Whatever lies below a checkout and is not its store is
# reached through `storage.beneath`, as a folder of it may be a link to anywhere; tests/store/test_writers.py holds the
# same over the calls of real commands.
BENEATH, STORE, NAMED, OWN = "through storage.beneath", "the store", "where a person says", "a person's own cache"
WRITERS = {
    "vpstore.api.building": BENEATH,
    "vpstore.bytecode": BENEATH,
    "vpstore.rebuilding.running": STORE,
    "vpstore.rebuilding.scratch": NAMED,
    "vpstore.rebuilding.worker": STORE,
    "vpstore.sharing.registry": STORE,
    "vpstore.sharing.trust": STORE,
    "vpstore.storage.attestations": STORE,
    "vpstore.storage.beneath": BENEATH,
    "vpstore.storage.blobs": STORE,
    "vpstore.storage.keys": STORE,
    "vpstore.storage.memory": OWN,
    "vpstore.storage.modes": STORE,
    "vpstore.storage.partial": STORE,
    "vpstore.storage.passing": STORE,
    "vpstore.storage.pointers": BENEATH,
    "vpstore.storage.remotes.directory": NAMED,
    "vpstore.storage.roots": STORE,
    "vpstore.storage.store": STORE,
    "vpstore.storage.trial": NAMED,  # the folder that doctor holds open
    "vpstore.verbs.attest": NAMED,
    "vpstore.verbs.export": NAMED,
    "vpstore.verbs.gc": STORE,
    "vpstore.verbs.importing": BENEATH,
    "vpstore.verbs.lock": BENEATH,
    "vpstore.verbs.materialize": BENEATH,
    "vpstore.verbs.reports": BENEATH,
    "vpstore.workspace": BENEATH,
}
WRITING = {
    "TemporaryFile", "chmod", "clone", "copy", "keep_aside", "link", "make_directory", "make_plain_directory",
    "make_writable", "mkdir", "remove", "remove_if_empty", "remove_tree", "rename", "rmdir", "symlink", "unlink",
    "write", "write_file", "write_if_different", "write_once",
}  # fmt: skip


def writers(trees: dict[str, ast.Module]) -> dict[str, set[str]]:
    """The modules that write by a function of storage's, and what they call to reach the place."""
    found = {}
    for module, tree in trees.items():
        calls = [node.func for node in ast.walk(tree) if isinstance(node, ast.Call)]
        names = [(ast.unparse(call.value), call.attr) for call in calls if isinstance(call, ast.Attribute)]
        if any(on in {"atomic", "beneath", "system.disk"} and name in WRITING for on, name in names):
            found[module] = {name for on, name in names if name in {"opened", "opened_file"}}
            found[module] |= {call.id for call in calls if isinstance(call, ast.Name) and call.id == "_Walk"}
    return found


def test_who_writes_into_a_checkout_goes_beneath_its_root() -> None:
    found = writers({name: tree for name, tree in MODULES.items() if name != "vpstore.storage.atomic"})
    assert sorted(found) == sorted(WRITERS), "say where it writes"
    assert [module for module, ways in found.items() if WRITERS[module] == BENEATH and not ways] == []


def test_a_writer_that_goes_past_is_noticed() -> None:
    text = (
        "from vpstore.storage import atomic\ndef f(checkout):\n    atomic.write_if_different(checkout.lock_path, b'')"
    )
    assert writers({"vpstore.verbs.new": ast.parse(text)}) == {"vpstore.verbs.new": set()}


def parameters(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """How many a caller gives; what a method or an autograd function is called on does not count."""
    found = [*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs]
    return len([each for each in found if each.arg not in {"self", "cls", "ctx"}])


@pytest.mark.parametrize("package", ["vpstore", "recipes"])
def test_files_and_functions_are_small(package: str) -> None:
    lengths, many = [], {}
    for path in sorted((ROOT / package).rglob("*.py")):
        assert len(path.read_text().splitlines()) <= LONG_FILES.get(str(path.relative_to(ROOT)), 300), path
        for node in ast.walk(ast.parse(path.read_bytes())):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                name = f"{path.relative_to(ROOT)}:{node.name}"
                lengths.append((int(node.end_lineno or 0) - node.lineno + 1, name))
                # A click command has one parameter an option; `--profile` and `--json` come on top of its own.
                if (count := parameters(node)) > (7 if path.parent.name == "cli" else 5):
                    many[name] = count
    lengths.sort()
    assert lengths[-1][0] <= 60, lengths[-1]
    assert lengths[int(len(lengths) * 0.9)][0] <= 35
    assert lengths[len(lengths) // 2][0] <= 12
    assert many == {name: count for name, count in MANY_PARAMETERS.items() if name.startswith(package)}


def test_the_command_line_loads_little() -> None:
    """Importing the command line loads no verb, no YAML, no database and nothing heavy."""
    code = "import sys, vpstore.cli; print(*sorted(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    loaded = set(done.stdout.split())
    heavy = {"torch", "numpy", "dvc", "yaml", "sqlite3", "pydantic", "safetensors", "rfc8785", "vpstore.api"}
    assert loaded & heavy == set()
    assert len(loaded) < 250
