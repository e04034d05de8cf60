"""reproduce with a recipe of this repository: a pico vpDense becomes a vpMoE, again, whole and tensor by tensor."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from garden_project import edit
from small_project import REPOSITORY, Project

ROUTER = "model.layers.2.mlp.router.weight"


@pytest.fixture(scope="module")
def pico(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """A checkout in which vpMoE@upcycle is built; then a file of its closure is edited."""
    folder = tmp_path_factory.mktemp("pico")
    root = folder / "checkout"
    root.mkdir()
    here = Path(__file__).resolve().parent
    places = [REPOSITORY, here.parent / "surgery", here.parent / "store"]
    variables = {"PYTHONPATH": os.pathsep.join(map(str, places)), "XDG_CACHE_HOME": str(folder / "cache")}
    command = [sys.executable, str(here / "pico_checkout.py"), str(root)]
    subprocess.run(command, check=True, env={**os.environ, **variables}, cwd=folder, timeout=120)
    project = Project(root, folder / "cache")
    project.run("build", "vpMoE")
    assert "cache hit" in project.run("build", "vpMoE", "--dry-run").stdout
    edit(project, "recipes/ops/router.py", "def router_rows(", "SEEN = 1 / 0\n\n\ndef router_rows(")
    assert "would be built" in project.run("build", "vpMoE", "--dry-run").stdout
    return project


@pytest.mark.slow
def test_the_whole_artifact_comes_out_again(pico: Project) -> None:
    [found] = pico.json("reproduce", "vpMoE")["reproductions"]
    assert (found["verdict"], found["rebuilt"]) == ("identical", found["artifact"])
    assert len(found["tensors"]) == found["tensors_total"] > 60
    shown = pico.json("show", "vpMoE")
    built, again = shown["attestations"][0]["predicate"], shown["reproductions"][0]["predicate"]
    internal = built["buildDefinition"]["internalParameters"]
    assert again["reproduction"]["environment"] == internal["environment"]  # so that a rebuilt artifact is a cache hit
    assert again["reproduction"]["machine"] == internal["machine"]
    paths = {row["path"] for row in found["files"]}
    assert {"reports/metrics.json", "reports/router.json", "intermediate router_inputs", "config.json"} <= paths


@pytest.mark.slow
def test_some_tensors_come_out_again_on_their_own(pico: Project) -> None:
    text = pico.run("reproduce", "vpMoE", "--sample", "6", "--seed", "5").stdout
    assert "6 of " in text
    assert "6 identical" in text
    assert "1 intermediates, taken from the artifact" in text
    [found] = pico.json("reproduce", "vpMoE", "--tensor", ROUTER, "--with-intermediates")["reproductions"]
    assert [row["name"] for row in found["tensors"]] == [ROUTER]
    assert found["given_intermediates"] == []
    assert "intermediate router_inputs" in {row["path"] for row in found["files"]}
