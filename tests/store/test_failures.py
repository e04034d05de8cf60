"""Builds that fail, are interrupted or meet one another: the store stays as it was, and a retry converges."""

from __future__ import annotations

import re
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
from small_project import Project


def edit(project: Project, path: str, old: str, new: str) -> None:
    file = project.root / path
    assert old in file.read_text()
    file.write_text(file.read_text().replace(old, new))


def test_a_missed_gate_publishes_nothing(built: Project) -> None:
    before = built.listing()
    edit(built, "configs/plant.toml", "step = 2", "step = -1")
    done = built.run("build", "plant", code=20)
    assert "growth is negative" in done.stderr
    assert built.listing() == before
    assert len(list((built.store / "work").iterdir())) == 1  # what it had computed is kept
    assert list((built.store / "tmp").iterdir()) == []


def test_a_project_with_its_packages_below_src_builds_and_a_helper_there_is_in_the_key(project: Project) -> None:
    (project.root / "src").mkdir()
    shutil.move(project.root / "small", project.root / "src/small")
    first = project.run("build", "seed").stdout
    soil = project.root / "src/small/soil.py"
    soil.write_text(soil.read_text() + "\nANOTHER = 1\n")
    assert "would be built" in project.run("build", "seed", "--dry-run").stdout
    assert "built in" in first
    assert "built in" in project.run("build", "plant@sprout").stdout


def test_what_a_runner_says_moves_no_cursor(built: Project) -> None:
    edit(built, "small/run.py", "    import tomllib", "    raise RuntimeError('\\x1b[2J gone\\r')\n    import tomllib")
    for command, code in ((("build", "seed"), 1), (("doctor",), 1), (("resolve", "seed"), 0)):
        done = built.run(*command, code=code)
        assert "\x1b" not in done.stdout + done.stderr
        assert "\r" not in done.stdout + done.stderr
    assert "x1b[2J gone" in built.run("build", "seed", code=1).stderr


def test_a_runner_that_resumes_finds_its_scratch_folder_again_and_it_goes_when_the_build_is_done(
    project: Project,
) -> None:
    edit(project, "pyproject.toml", 'reports = "reports"', 'reports = "reports"\nresume = true')
    project.run("build", "seed")
    edit(project, "small/grow.py", "if step < 0:", 'if (scratch / "attempts.txt").read_text() == "x":')
    project.run("build", "plant@sprout", code=20)
    project.run("build", "plant@sprout")
    assert list((project.store / "work").iterdir()) == []


def test_any_other_runner_begins_in_an_empty_folder(project: Project) -> None:
    project.run("build", "seed")
    empty = '    assert os.listdir(scratch) == ["attempts.txt"]\n'
    edit(project, "small/grow.py", "    step = prepared", f"{empty}    step = prepared")
    edit(project, "small/grow.py", "if step < 0:", 'if os.environ.get("SMALL_STOP"):')
    project.run("build", "plant@sprout", code=20, SMALL_STOP="1")
    [scratch] = (project.store / "work").iterdir()
    assert (scratch / "attempts.txt").read_text() == "x"  # kept to be looked at
    (scratch / "stray" / "deep").mkdir(parents=True)
    (scratch / "stray" / "link").symlink_to(project.root)
    project.run("build", "plant@sprout")
    assert (project.root / "small" / "run.py").is_file()  # what a link leads to is no part of the folder
    assert list((project.store / "work").iterdir()) == []


@pytest.mark.parametrize(
    ("old", "new", "what"),
    [
        ('"reports/metrics.json", "app', '"../metrics.json", "app', "a path is not acceptable"),
        ('"reports/metrics.json", "app', '"artifact.json", "app', "two paths collide"),
        ('"reports/metrics.json", "app', '"provenance.json", "app', "two paths collide"),
        ('"reports/metrics.json", "app', '"MODEL.safetensors", "app', "two paths collide"),
        ('"reports/metrics.json", "app', '"bad.safetensors", "app', "safetensors"),
        ('scratch / "metrics.json")],', 'scratch / "nothing.json")],', "a staged file is missing"),
    ],
)
def test_a_result_that_is_not_acceptable_is_refused(project: Project, old: str, new: str, what: str) -> None:
    project.run("build", "seed")
    edit(project, "small/grow.py", old, new)
    done = project.run("build", "plant@sprout", code=20)
    assert what in done.stderr
    assert not project.pointer("plant-sprout").exists()


def test_a_crash_in_a_recipe_shows_where_and_changes_nothing(built: Project) -> None:
    before = built.listing()
    edit(built, "small/grow.py", "step = prepared", "step = 1 / 0 or prepared")
    done = built.run("build", "plant", code=1)
    assert "ZeroDivisionError" in done.stderr
    assert built.listing() == before


def test_a_recipe_that_changes_while_it_runs_is_recorded_as_it_ran(built: Project) -> None:
    edit(built, "configs/plant.toml", "step = 2", "step = 5")
    recipe = built.root / "small/grow.py"
    edit(
        built, "small/grow.py", "    step = prepared", f"    open({str(recipe)!r}, 'a').write('x')\n    step = prepared"
    )
    ran = recipe.read_bytes()
    built.run("build", "plant")
    assert recipe.read_bytes() == ran + b"x"
    document = built.json("show", "plant")["manifest"]
    (row,) = (row for row in document["build"]["recipe"]["files"] if row["path"] == "small/grow.py")
    assert built.blob(row["digest"]).read_bytes() == ran


def wait_for(condition: object, seconds: float = 20) -> None:
    end = time.monotonic() + seconds
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < end
        time.sleep(0.02)


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGKILL])
def test_an_interrupted_build_changes_nothing_and_is_taken_up(
    built: Project, tmp_path: Path, sent: signal.Signals
) -> None:
    before = built.listing()
    edit(built, "configs/plant.toml", "step = 2", "step = 5")
    log = tmp_path / "log"
    process = subprocess.Popen(
        built.command("build", "plant"),
        cwd=built.root,
        env=built.variables(SMALL_SLEEP="60", SMALL_LOG=str(log)),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    wait_for(log.exists)
    process.send_signal(sent)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == (130 if sent == signal.SIGINT else -9)
    if sent == signal.SIGINT:
        assert "nothing was published" in errors
        assert "vpstore build plant@bloom begins anew" in errors
        assert "Traceback" not in errors
    assert built.listing() == before
    assert not built.json("build", "plant")["builds"][0]["cached"]


def test_two_builders_of_one_key_run_it_once(project: Project, tmp_path: Path) -> None:
    project.run("build", "seed")
    log = tmp_path / "log"
    processes = [
        subprocess.Popen(
            project.command("build", "plant@sprout", "--json"),
            cwd=project.root,
            env=project.variables(SMALL_SLEEP="1", SMALL_LOG=str(log)),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for _ in range(3)
    ]
    outputs = [process.communicate(timeout=60) for process in processes]
    assert [process.returncode for process in processes] == [0, 0, 0], outputs
    assert len(log.read_text().splitlines()) == 1
    assert sum('"cached": false' in out for out, _ in outputs) == 1
    project.run("verify", "--all")


def test_many_publishers_and_readers_of_the_same_blobs(built: Project) -> None:
    """Forced builds replace nothing that is whole, so readers never meet a gap."""
    commands = [["build", "plant", "--force"]] * 3 + [["resolve", "plant", "--full"]] * 4
    processes = [
        subprocess.Popen(built.command(*command), cwd=built.root, env=built.variables(), stdout=subprocess.DEVNULL)
        for command in commands
    ]
    assert [process.wait(60) for process in processes] == [0] * len(commands)
    assert list((built.store / "quarantine").iterdir()) == []
    built.run("verify", "--all")


def test_a_full_disk_is_said_and_a_retry_converges(project: Project) -> None:
    project.run("build", "seed")
    edit(project, "small/run.py", "def produce(", "import errno\n\n\ndef produce(")
    full = "    if os.environ.get('SMALL_FULL'):\n        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))\n"
    edit(project, "small/run.py", "    import importlib\n", f"    import importlib\n\n{full}")
    done = project.run("build", "plant@sprout", code=1, SMALL_FULL="1")
    assert "No space left on device" in done.stderr
    assert "free space" in done.stderr
    assert "Traceback" not in done.stderr
    project.run("build", "plant@sprout")


def test_a_store_that_cannot_be_written_is_said(project: Project, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    done = project.run("build", "seed", code=10, VPSTORE_ROOT=str(tmp_path / "file" / "below"))
    assert "Traceback" not in done.stderr


@pytest.mark.skipif(shutil.which("strace") is None, reason="needs strace")
def test_the_order_of_writes(built: Project, tmp_path: Path) -> None:
    """blob fsync < rename < directory fsync, for every blob; then manifest, attestation, key, root and pointer."""
    built.run("resolve", "plant@sprout")  # this copy of a checkout makes itself and the parent's view known
    edit(built, "configs/plant.toml", "step = 2", "step = 6")
    trace = tmp_path / "trace"
    calls = "trace=fsync,openat,rename,renameat,renameat2"
    subprocess.run(
        ["strace", "-f", "-y", "-e", calls, "-o", str(trace), *built.command("build", "plant")],
        cwd=built.root,
        env=built.variables(),
        check=True,
        capture_output=True,
    )  # fmt: skip
    events = events_of(trace.read_text())
    renamed = [event for event in events if event[0] == "rename"]
    for position, (_, source, target) in [(events.index(event), event) for event in renamed]:
        if (
            "changed-" in target
            or target.startswith(f"{built.store}/work/")
            or source.rpartition("/")[2].startswith(".")
        ):
            continue  # views, which are folders of links, and what one process says to another
        synced = [index for index, event in enumerate(events[:position]) if event[:2] == ("fsync", source)]
        assert synced, f"{source} was renamed to {target} before its bytes were durable"
        folder = target.rpartition("/")[0]
        assert ("fsync", folder, "") in events[position + 1 :], f"{folder} was never made durable"
    order = [kind_of(target) for _, _, target in renamed]
    artifact = built.json("resolve", "plant")["artifact"][7:]
    manifest = next(i for i, (_, _, target) in enumerate(renamed) if target.endswith(f"{artifact[:2]}/{artifact[2:]}"))
    assert order[-1] == "pointer"
    assert set(order[:manifest]) - {"other"} == {"running root", "blob"}  # first of all, what the build needs
    rest = [kind for kind in order[manifest + 1 :] if kind != "other"]
    assert rest == ["attestation", "key", "root", "artifact of the pointer", "pointer"]


def events_of(trace: str) -> list[tuple[str, str, str]]:
    found = []
    places: dict[str, str] = {}  # of folders that are held open

    def real(path: str) -> str:
        held, _, name = path.rpartition("/")
        return f"{places[held]}/{name}" if held in places else path

    for line in trace.splitlines():
        if match := re.search(r"openat\(.*O_DIRECTORY.* = (\d+)<([^>]+)>", line):
            places[f"/proc/self/fd/{match[1]}"] = match[2]
        elif match := re.search(r"fsync\(\d+<([^>]+)>\)\s+= 0", line):
            found.append(("fsync", match[1], ""))
        elif match := re.search(r'rename(?:at2?)?\((?:[^"]*)"([^"]+)", (?:[^"]*)"([^"]+)".*= 0', line):
            found.append(("rename", real(match[1]), real(match[2])))
    return found


def kind_of(target: str) -> str:
    parts = {
        ".artifact": "artifact of the pointer",
        "/blobs/": "blob",
        "/roots/running/": "running root",
        "/roots/": "root",
        "/attestations/": "attestation",
        "/keys/": "key",
        "/refs/": "pointer",
    }
    return next((kind for part, kind in parts.items() if part in target), "other")
