"""A package that nobody installed is called that, with what brings it; a module of one's own is a mistake."""

from __future__ import annotations

from pathlib import Path

import pytest
from small_project import Project, write

from vpstore.missing import missing_package


def lack(module: str) -> ModuleNotFoundError:
    return ModuleNotFoundError(f"No module named {module!r}", name=module)


def test_the_next_step_names_the_extra(tmp_path: Path) -> None:
    (tmp_path / "pyproject.toml").write_text(
        '[project]\ndependencies = ["No_Such.One>=1"]\n'
        '[project.optional-dependencies]\nfit = ["nosuch-torch[x]>=2; x>1"]\n'
    )
    for module, step in (
        ("nosuch_torch.nn", "pip install '.[fit]'"),
        ("no_such_one", "pip install . in"),
        ("nothing_at_all", "pip install nothing_at_all"),
    ):
        found = missing_package(lack(module), [tmp_path], where="x")
        assert found is not None
        assert found.next_step.startswith(step)


@pytest.mark.parametrize("module", ["mine", "mine.inner", "packed", "beside", "json.nothing", "numpy.nothing", ""])
def test_what_is_there_is_not_called_missing(tmp_path: Path, module: str) -> None:
    for path in ("mine/x.py", "src/packed/x.py", "beside.py"):
        write(tmp_path, path, "")
    assert missing_package(lack(module), [tmp_path], where="x") is None
    assert missing_package(ImportError("x", name="nothing_at_all"), [tmp_path], where="x") is None


def test_a_build_and_a_reproduction_name_the_package(built: Project) -> None:
    soil = built.root / "small" / "judge.py"
    text = soil.read_text()
    soil.write_text(text + "import os\nif os.environ.get('SMALL_LACKS'):\n    import nothing_at_all\n")
    with (built.root / "pyproject.toml").open("a") as file:
        file.write("\n[project]\nname = 'small'\n[project.optional-dependencies]\nfit = ['nothing_at_all']\n")
    built.run("build", "reports@plant-bloom")
    for command in ("build --force", "reproduce"):
        said = built.run(*command.split(), "reports@plant-bloom", code=2, SMALL_LACKS="1").stderr
        assert "the package nothing_at_all is not installed" in said
        assert "pip install '.[fit]'" in said
        assert "git checkout" not in said
        assert "Traceback" not in said
