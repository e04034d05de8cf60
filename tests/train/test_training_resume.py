"""Exact resume: 2n steps equal n steps, SIGKILL, resume, n steps; and states of another run are refused."""

from __future__ import annotations

import json
import random
import shutil
import signal
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from heal_server import Healing, HealServer
from training_pico import Workshop, heal_params, one_tokenizer, params_table, pico_moe, write_data

from recipes import heal
from recipes.data.batches import AlignedDataset
from recipes.tensors import read_safetensors
from recipes.train import state as state_module
from recipes.train.state import (
    DOCUMENT,
    TENSORS,
    Identity,
    TrainingState,
    load_state,
    random_states,
    save_state,
)
from vpstore.errors import GateMissed, RecipeRefused

STEPS = 8


@pytest.fixture(scope="module", autouse=True)
def _one_tokenizer() -> Iterator[None]:
    with one_tokenizer():
        yield


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[HealServer]:
    started = HealServer(tmp_path_factory.mktemp("server"), steps=STEPS)
    yield started
    started.close()


def kill_at_step(process: Healing, step: int, delay: float) -> None:
    """SIGKILL a moment after the step was begun, or the first after it that is not done yet."""
    for line in process.lines:
        label, _, done = line.rpartition(" ")
        if label == "training" and int(done) >= step:
            time.sleep(delay)
            process.kill()
            break
    code, _ = process.end()
    assert code == -signal.SIGKILL


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    return Workshop.make(tmp_path_factory.mktemp("shop"), pico_moe())


@pytest.fixture(scope="module")
def whole(shop: Workshop, server: HealServer) -> Path:
    """The scratch folder of an uninterrupted run."""
    code, _ = server.start(shop.root, "whole").end()
    assert code == 0
    return shop.root / "whole"


def require_same_after_kills(shop: Workshop, server: HealServer, whole: Path, kills: list[tuple[int, float]]) -> None:
    scratch = "-".join(["killed", *(str(step) for step, _ in kills)])
    for step, delay in kills:
        kill_at_step(server.start(shop.root, scratch), step, delay)
    code, out = server.start(shop.root, scratch).end()
    assert code == 0
    if kills[-1][0] > 4:  # a state of step 3 or 6 was there to go on from
        assert "training 0\n" not in out
    resumed = shop.root / scratch
    assert (whole / "report.json").read_text() == (resumed / "report.json").read_text()
    assert (whole / "result.safetensors").read_bytes() == (resumed / "result.safetensors").read_bytes()
    states = [next((folder / "training").glob("state-*")) for folder in (whole, resumed)]
    assert states[0].name == states[1].name == f"state-{STEPS:08d}"
    one, other = (read_safetensors(state / TENSORS) for state in states)
    assert one.keys() == other.keys()
    assert any(name.startswith("optimizer|") and name.endswith("second_moment") for name in one)
    assert any(name.endswith("expert_bias") for name in one)
    for name, tensor in one.items():
        assert torch.equal(tensor, other[name]), name


def test_killed_at_a_random_step_and_resumed_it_gives_the_same_bits(
    shop: Workshop, server: HealServer, whole: Path
) -> None:
    step = random.randrange(4, STEPS)
    require_same_after_kills(shop, server, whole, [(step, random.uniform(0, 0.2))])


@pytest.mark.slow
@pytest.mark.parametrize("number", range(4))
def test_killed_twice_it_gives_the_same_bits(shop: Workshop, server: HealServer, whole: Path, number: int) -> None:
    """Early kills too, before the first state, and a second one in the resumed run."""
    chance = random.Random(number)
    kills = sorted(chance.sample(range(1, STEPS), 2))
    require_same_after_kills(shop, server, whole, [(step, chance.uniform(0, 0.3)) for step in kills])


@pytest.fixture(scope="module")
def stopped(shop: Workshop) -> Path:
    """A scratch folder with a state of step 3; tests get copies."""

    class Stop(Exception):
        pass

    def stop(label: str, done: int, total: int) -> None:
        if done == 4:
            raise Stop

    with pytest.raises(Stop):
        heal.run(replace(shop.context(heal_params(steps=STEPS), scratch="stopped"), progress=stop))
    assert [path.name for path in (shop.root / "stopped/training").iterdir()] == ["state-00000003"]
    return shop.root / "stopped"


@pytest.fixture
def interrupted(shop: Workshop, stopped: Path) -> str:
    """A scratch folder with a state of step 3."""
    name = f"interrupted{random.randrange(1 << 30)}"
    shutil.copytree(stopped, shop.root / name)
    return name


def test_another_parent_data_tokenizer_or_config_is_refused_by_name(shop: Workshop, interrupted: str) -> None:
    params = heal_params(steps=STEPS)
    for role in ("parent", "data", "tokenizer"):
        with pytest.raises(RecipeRefused, match="another run") as refusal:
            heal.run(shop.context(params, scratch=interrupted, **{role: "blake3:other"}))
        assert refusal.value.where.endswith(f": {role}")
        assert "blake3:other" in refusal.value.expected
    table = params_table(steps=STEPS)
    table["train"]["optimizer"]["head_rate"] = 0.5
    changed = type(params).model_validate_json(json.dumps(table))
    with pytest.raises(RecipeRefused, match="another run") as refusal:
        heal.run(shop.context(changed, scratch=interrupted))
    assert refusal.value.where.endswith(": params.train.optimizer.head_rate")
    with pytest.raises(RecipeRefused, match="another run") as refusal:
        heal.run(shop.context(heal_params(steps=STEPS, packing="best_fit"), scratch=interrupted))
    assert refusal.value.where.endswith(": params.train.packing")


def test_a_damaged_state_is_refused(shop: Workshop, interrupted: str) -> None:
    state = shop.root / interrupted / "training" / "state-00000003"
    data = bytearray((state / TENSORS).read_bytes())
    data[-5] ^= 1
    (state / TENSORS).write_bytes(data)
    with pytest.raises(RecipeRefused, match="damaged"):
        heal.run(shop.context(heal_params(steps=STEPS), scratch=interrupted))
    (state / DOCUMENT).write_text("{")
    with pytest.raises(RecipeRefused, match="damaged"):
        heal.run(shop.context(heal_params(steps=STEPS), scratch=interrupted))


def small_state(step: int) -> TrainingState:
    weights = {"a": torch.full((3,), float(step)), "scalar": torch.tensor(1.5)}
    return TrainingState(step, weights, {"a/mean": torch.ones(3)}, {"a": step}, random_states(), {"rows": [0.1 + 0.2]})


def test_a_run_on_the_cpu_leaves_gpus_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert random_states().keys() == {"cpu"}


def test_a_state_round_trips_and_only_the_newest_stays(tmp_path: Path) -> None:
    identity = Identity({"parent": "blake3:1"}, {"lr": 0.1, "many": (1, 2), "deep": {"x": None}})
    assert load_state(tmp_path, identity) is None
    save_state(tmp_path, small_state(3), identity)
    save_state(tmp_path, small_state(5), identity)
    assert [path.name for path in tmp_path.iterdir()] == ["state-00000005"]
    found = load_state(tmp_path, identity)
    assert found is not None
    want = small_state(5)
    assert (found.step, found.optimizer_steps, found.record) == (5, want.optimizer_steps, want.record)
    for part in ("weights", "optimizer", "random"):
        own, other = getattr(found, part), getattr(want, part)
        assert own.keys() == other.keys()
        assert all(torch.equal(own[name], other[name]) for name in own)


def test_an_unfinished_state_is_no_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control for the write order: what was cut off before the rename is never taken up."""
    identity = Identity({}, {})
    save_state(tmp_path, small_state(3), identity)

    def refuse(self: Path, target: Path) -> Path:
        raise OSError("no rename today")

    monkeypatch.setattr(Path, "rename", refuse)
    with pytest.raises(RecipeRefused, match="cannot be written") as refused:
        save_state(tmp_path, small_state(4), identity)
    monkeypatch.undo()
    assert (refused.value.where, refused.value.found) == ("state-00000004", "no rename today")
    assert [path.name for path in tmp_path.iterdir()] == ["state-00000003"]
    found = load_state(tmp_path, identity)
    assert found is not None
    assert found.step == 3
    save_state(tmp_path, small_state(4), identity)
    assert [path.name for path in tmp_path.iterdir()] == ["state-00000004"]


class Killed(BaseException):
    """What no handler catches: the process ends here, and nothing after it happens."""


def kill_at_operation(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """Let the n-th thing that a save does to the disk be its last moment: before it happens."""
    done = [0]

    def mortal(real: Any) -> Any:
        def call(*arguments: Any, **options: Any) -> Any:
            done[0] += 1
            if done[0] == number:
                raise Killed
            return real(*arguments, **options)

        return call

    for owner, name in ((state_module, "save_file"), (state_module, "_sync"), (state_module.shutil, "rmtree")):
        monkeypatch.setattr(owner, name, mortal(getattr(owner, name)))
    for name in ("mkdir", "write_text", "rename"):
        monkeypatch.setattr(Path, name, mortal(getattr(Path, name)))


def test_killed_at_any_moment_of_a_save_a_whole_state_is_left(tmp_path: Path) -> None:
    identity = Identity({"parent": "blake3:1"}, {})
    left = []
    for number in range(1, 40):
        folder = tmp_path / str(number)
        save_state(folder, small_state(3), identity)
        with pytest.MonkeyPatch.context() as patch:
            kill_at_operation(patch, number)
            try:
                save_state(folder, small_state(5), identity)
            except Killed:
                pass
            else:
                break  # there were fewer operations: the save went through
        found = load_state(folder, identity)
        assert found is not None
        want = small_state(found.step)
        assert all(torch.equal(found.weights[name], want.weights[name]) for name in want.weights)
        left.append(found.step)
        save_state(folder, small_state(6), identity)
        assert [path.name for path in folder.iterdir()] == ["state-00000006"]
    assert len(left) >= 8
    assert left == sorted(left)  # the old one until the new one has its name, the new one from then on
    assert set(left) == {3, 5}


@pytest.mark.slow
@pytest.mark.parametrize("moment", ["in the file of tensors", "before the name"])
def test_killed_while_a_state_is_written_the_run_goes_on_from_the_one_before(
    shop: Workshop, server: HealServer, whole: Path, moment: str
) -> None:
    """The second state of the run never comes to be; SIGKILL by the process's own hand, at the exact place."""
    scratch = f"torn-{moment.split()[0]}"
    if moment == "before the name":
        place = (
            "Path.rename = lambda self, target: os.kill(os.getpid(), 9) if '06' in target.name else old(self, target)"
        )
    else:
        place = (
            "state.save_file = lambda tensors, path: (path.write_bytes(b'torn'), os.kill(os.getpid(), 9))"
            " if '06' in path.parent.name else old_save(tensors, path)"
        )
    lines = (
        "import os\nfrom pathlib import Path\nfrom recipes.train import state\n"
        "old, old_save = Path.rename, state.save_file\n"
    )
    code, _ = server.start(shop.root, scratch, first=lines + place).end()
    assert code == -signal.SIGKILL
    left = sorted(path.name for path in (shop.root / scratch / "training").iterdir())
    assert left == ["state-00000003", "unfinished-00000006"]
    code, out = server.start(shop.root, scratch).end()
    assert code == 0
    assert "training 3\n" in out
    assert "training 0\n" not in out
    assert (whole / "result.safetensors").read_bytes() == (shop.root / scratch / "result.safetensors").read_bytes()


def test_a_state_says_where_its_data_stands(shop: Workshop, interrupted: str) -> None:
    document = json.loads((shop.root / interrupted / "training/state-00000003" / DOCUMENT).read_text())
    tokens = AlignedDataset(shop.root / "data", "train").tokens
    assert document["position"] == {
        "consumed_samples": 3 * 2,
        "epoch": 3 * 2 * 64 // tokens,
        "token_of_epoch": 3 * 2 * 64 % tokens,
        "shuffle_seed": 7,
        "schedule_step": 3,
    }


def test_a_state_at_another_place_of_its_data_is_refused(shop: Workshop, interrupted: str) -> None:
    path = shop.root / interrupted / "training/state-00000003" / DOCUMENT
    document = json.loads(path.read_text())
    document["position"]["token_of_epoch"] += 1
    path.write_text(json.dumps(document))
    with pytest.raises(RecipeRefused, match="another place"):
        heal.run(shop.context(heal_params(steps=STEPS), scratch=interrupted))


@pytest.mark.slow
def test_packed_by_best_fit_it_resumes_exactly_and_says_where(shop: Workshop) -> None:
    """A state of step 3 of 4: position in true tokens, and the same end as without a stop."""
    params = heal_params(steps=4, packing="best_fit")
    once = heal.run(shop.context(params, scratch="packed-once"))

    def stop(label: str, done: int, total: int) -> None:
        if done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        heal.run(replace(shop.context(params, scratch="packed-twice"), progress=stop))
    document = json.loads((shop.root / "packed-twice/training/state-00000003" / DOCUMENT).read_text())
    tokens = AlignedDataset(shop.root / "data", "train").tokens
    shown = document["record"]["rows"][-1]["consumed_tokens"]
    assert shown < 3 * 2 * 64
    assert (document["position"]["epoch"], document["position"]["token_of_epoch"]) == divmod(shown, tokens)
    twice = heal.run(shop.context(params, scratch="packed-twice"))
    assert once.tensors.keys() == twice.tensors.keys()
    assert all(torch.equal(tensor, twice.tensors[name]) for name, tensor in once.tensors.items())


def test_a_missed_gate_keeps_the_state_and_costs_no_step(shop: Workshop) -> None:
    table = params_table(steps=4)
    table["gates"]["held_out"]["improvement"] = 50.0
    params = type(heal_params()).model_validate_json(json.dumps(table))
    with pytest.raises(GateMissed, match="nothing was published"):
        heal.run(shop.context(params, scratch="missed"))
    assert [path.name for path in (shop.root / "missed/training").iterdir()] == ["state-00000004"]
    said: list[tuple[str, int]] = []

    def listen(label: str, done: int, total: int) -> None:
        said.append((label, done))

    with pytest.raises(GateMissed):
        heal.run(replace(shop.context(params, scratch="missed"), progress=listen))
    assert said == [("training", 4)]


@pytest.mark.slow
def test_other_data_gives_other_bits(shop: Workshop, tmp_path: Path) -> None:
    """Negative control: equality above is not because training does nothing with its data."""
    other = Workshop(tmp_path)
    for folder in ("parent", "tokenizer"):
        (tmp_path / folder).symlink_to(shop.root / folder)
    write_data(tmp_path / "data", seed=1)
    params = heal_params(steps=4)
    results = [heal.run(one.context(params, scratch="control")).tensors for one in (shop, other)]
    assert not torch.equal(results[0]["lm_head.weight"], results[1]["lm_head.weight"])
