"""Stage 1's reference trainer on a pico: a complete log, a resume without drift, refusals of what is not its own."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from stage1_pico import Stage1Shop
from training_pico import ROOT, STAGE1_SMOKE, one_tokenizer, stage1_params, write_data

from recipes import stage1_smoke
from recipes.data.batches import Batch
from recipes.train import stage1_run
from recipes.train.loop import Trainer
from recipes.train.losses import token_weights
from recipes.train.optimizer import Optimizer
from recipes.train.stage1_drift import commits, drift
from recipes.train.stage1_log import AGGREGATES, Log, read_log
from recipes.train.stage1_run import LOG_FILE, Stage1Run
from recipes.train.stage1_stop import judge_stop
from recipes.train.state import TrainingState
from recipes.train.step_figures import added, span_counts
from recipes.train.trainer_code import code_digest
from vpstore.errors import GateMissed, RecipeRefused


class Stop(Exception):
    """An interruption between two steps."""


@pytest.fixture(scope="module", autouse=True)
def _one_tokenizer() -> Any:
    with one_tokenizer():
        yield


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Stage1Shop:
    return Stage1Shop.make(tmp_path_factory.mktemp("stage1") / "shop")


@pytest.fixture(scope="module")
def whole(shop: Stage1Shop, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an uninterrupted run."""
    return finished(shop, tmp_path_factory.mktemp("whole"))


def finished(shop: Stage1Shop, out: Path) -> Path:
    Stage1Run(shop.inputs(), out).go()
    return out


def interrupted(shop: Stage1Shop, out: Path, *, after: int = 3) -> Path:
    """A run that got as far as `after` steps; with states every 2 steps, it goes on from an earlier one."""
    out.mkdir(exist_ok=True)
    run = Stage1Run(shop.inputs(), out)
    inner = run.trainer.on_step
    assert inner is not None

    def stop(row: Any, figures: Any) -> bool:
        is_ended = inner(row, figures)
        if row["step"] == after:
            raise Stop
        return is_ended

    run.trainer.on_step = stop
    with pytest.raises(Stop):
        run.go()
    return out


def lines(folder: Path, kind: str) -> list[dict[str, Any]]:
    return [line for line in read_log(folder / LOG_FILE) if line["kind"] == kind]


def test_every_name_that_the_run_lists_is_logged(shop: Stage1Shop, whole: Path) -> None:
    run = tomllib.loads((shop.root / "run/stage1.toml").read_text())
    names, sizes = run["logging"], run["smoke"]
    log = read_log(whole / LOG_FILE)
    assert log[0]["kind"] == "provenance"
    assert set(names["once"]) <= log[0].keys()
    assert log[0]["checkpoint_digest"] == run["inputs"]["checkpoint"]["digest"]
    assert log[0]["data_manifest_digest"] == run["data"]["manifest"]["digest"]
    assert log[0]["smoke"] == STAGE1_SMOKE
    assert (log[0]["packing"], log[0]["documents"], log[0]["documents_cut"]) == ("best_fit", 40, 0)
    steps = lines(whole, "step")
    assert [line["step"] for line in steps] == list(range(1, sizes["steps"] + 1))
    for line in steps:
        assert set(names["every_step"]) <= line.keys()
        assert line["tokens_per_second"] > 0
        assert set(line["learning_rate_by_group"]) == {
            "matrix", "embedding", "head", "vector", "frequency", "residual"
        }  # fmt: skip
    routers = lines(whole, "router")
    assert [line["step"] for line in routers] == [2, 4, 6]
    for line in routers:
        assert [row["layer"] for row in line["layers"]] == [2, 3, 4]
        for figures in (*line["layers"], line["all"]):
            assert set(names["router"]) <= figures.keys()
        assert line["uniform"]["entropy"] == pytest.approx(math.log(8))
        assert line["uniform"]["max_load_percent"] == 12.5
        assert all(row["active_experts"] + row["dead_experts"] == 8 for row in line["layers"])
        assert all(0 < row["entropy"] <= math.log(8) for row in line["layers"])
    assert set(AGGREGATES) == set(names["router"])
    evaluations = lines(whole, "evaluation")
    assert [line["step"] for line in evaluations] == [0, 3, 6]
    for line in evaluations:
        assert set(names["evaluation"]) <= line.keys()
        assert line["answers"] == len(line["samples"]) == 2
    assert [line["step"] for line in lines(whole, "stop")] == [0, 3, 6]


def test_padding_is_counted_nowhere_as_tokens(shop: Stage1Shop, whole: Path) -> None:
    """Held against the rows themselves; the control is that there is padding at all."""
    trainer = Stage1Run(shop.inputs(), whole / "again").trainer
    consumed = 0
    for line, batch in zip(lines(whole, "step"), trainer.batches(), strict=True):
        is_end_BT = batch.ids_BT == 199999  # of a document, if no other one stands before it
        shown = batch.ids_BT.numel() - int((is_end_BT[:, 1:] & is_end_BT[:, :-1]).sum())
        consumed += shown
        assert 0 < shown < batch.ids_BT.numel()
        assert (line["tokens"], line["consumed_tokens"]) == (shown, consumed)
        assert line["fill"] == shown / batch.ids_BT.numel()
        assert line["epoch"] == consumed // trainer.dataset.tokens
        assert sum(line[f"tokens_{span}"] for span in ("plain", "reasoning", "final")) <= shown
    summary = json.loads((whole / "summary.json").read_text())
    assert summary["consumed_tokens"] == consumed
    assert summary["documents_cut"] == 0
    said = stage1_smoke._said(summary)
    assert "best_fit" in said
    assert "0 of 40 documents are longer than a row" in said


def test_the_loss_is_the_sum_of_span_means_over_the_global_batch(whole: Path) -> None:
    steps = lines(whole, "step")
    assert sum(line["tokens_reasoning"] > 0 for line in steps) >= 4  # four rows may hold no conversation at all
    for line in steps:
        spans = [span for span in ("reasoning", "final") if line[f"tokens_{span}"]]
        objective = sum(line[f"cross_entropy_{span}"] for span in spans)
        assert line["loss_total"] == pytest.approx(objective + line["balance_loss"], rel=1e-5)
    first, last = lines(whole, "evaluation")[0], lines(whole, "evaluation")[-1]
    assert last["held_out_objective"] < first["held_out_objective"] - 1.0  # it learns


def test_interrupted_and_resumed_it_does_not_drift(shop: Stage1Shop, whole: Path, tmp_path: Path) -> None:
    out = interrupted(shop, tmp_path / "out")
    with (out / LOG_FILE).open("a") as log:
        log.write('{"kind": "step", "st')  # torn by the kill
    Stage1Run(shop.inputs(), out).go()
    assert [line["step"] for line in lines(out, "resumed")] == [2]
    assert [line["step"] for line in lines(out, "step")] == [1, 2, 3, 4, 5, 6]
    assert drift(out, whole) == []
    Stage1Run(shop.inputs(), out).go()  # a run that is done stays as it is
    assert drift(out, whole) == []


def without_momentum(patch: pytest.MonkeyPatch) -> None:
    load = Optimizer.load

    def forgetful(self: Optimizer, tensors: Any, steps: Any) -> None:
        load(self, tensors, steps)
        for state in self.state.values():
            state.get("momentum", torch.zeros(1)).zero_()

    patch.setattr(Optimizer, "load", forgetful)


def without_adam_steps(patch: pytest.MonkeyPatch) -> None:
    load = Optimizer.load
    patch.setattr(Optimizer, "load", lambda self, tensors, steps: load(self, tensors, dict.fromkeys(steps, 0)))


def loaded_with(change: Callable[[TrainingState], None]) -> Callable[[pytest.MonkeyPatch], None]:
    def apply(patch: pytest.MonkeyPatch) -> None:
        from recipes.train import loop

        load = loop.load_state

        def changed(*arguments: Any) -> TrainingState | None:
            state = load(*arguments)
            if state is not None:
                change(state)
            return state

        patch.setattr(loop, "load_state", changed)

    return apply


def zero_expert_bias(state: TrainingState) -> None:
    for name, tensor in state.weights.items():
        if name.endswith("expert_bias"):
            tensor.zero_()


def round_frequencies(state: TrainingState) -> None:
    for name, tensor in state.weights.items():
        if name.endswith("log_freq"):
            tensor.copy_(tensor.bfloat16().float())


def read_on_elsewhere(patch: pytest.MonkeyPatch) -> None:
    """The data starts over, as a sampler does that was not saved."""
    from recipes.train import loop

    draw = loop.packed_batches
    patch.setattr(
        loop, "packed_batches", lambda *arguments, **options: draw(*arguments, **{**options, "start_step": 0})
    )


def forget_evaluations(state: TrainingState) -> None:
    state.record["evaluations"] = []


@pytest.mark.slow
@pytest.mark.parametrize(
    "drop",
    [
        pytest.param(without_momentum, id="momentum"),
        pytest.param(loaded_with(zero_expert_bias), id="expert bias"),
        pytest.param(read_on_elsewhere, id="data position"),
        pytest.param(without_adam_steps, id="adam steps", marks=pytest.mark.slow),
        pytest.param(loaded_with(round_frequencies), id="float32 frequencies", marks=pytest.mark.slow),
        pytest.param(loaded_with(forget_evaluations), id="evaluations", marks=pytest.mark.slow),
    ],
)
def test_a_part_of_the_state_that_is_lost_is_found_out(
    shop: Stage1Shop, whole: Path, started: Path, tmp_path: Path, drop: Callable[[pytest.MonkeyPatch], None]
) -> None:
    """Negative controls: without this part, the comparison must not say that nothing drifted."""
    out = tmp_path / "out"
    shutil.copytree(started, out)
    with pytest.MonkeyPatch.context() as patch:
        drop(patch)
        Stage1Run(shop.inputs(), out).go()
    assert drift(out, whole)


@pytest.fixture(scope="module")
def started(shop: Stage1Shop, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that was interrupted after step 5: its newest state is step 4."""
    return interrupted(shop, tmp_path_factory.mktemp("started"), after=5)


def swap_data(other: Stage1Shop) -> None:
    shutil.rmtree(other.root / "data")
    write_data(other.root / "data", seed=1)


def swap_manifest(other: Stage1Shop) -> None:
    path = other.root / "data/manifest.json"
    path.write_text(path.read_text() + " ")


def swap_file(folder: str) -> Callable[[Stage1Shop], None]:
    return lambda other: (other.root / folder / "note.txt").write_text("other")  # type: ignore[return-value]


@pytest.mark.parametrize(
    ("change", "params", "named"),
    [
        (swap_file("parent"), {}, {"checkpoint"}),
        (swap_file("tokenizer"), {}, {"tokenizer"}),
        (swap_data, {}, {"data", "data_manifest"}),
        (swap_manifest, {}, {"data", "data_manifest"}),
        (lambda other: None, {"stop": {"max_load": 0.05}}, {"config"}),
        (lambda other: None, {"smoke": {"warmup_steps": 2}}, {"config", "params.schedule.warmup_steps"}),
        (lambda other: None, {"packing": "document_bounded"}, {"config", "params.packing"}),
    ],
    ids=["checkpoint", "tokenizer", "data", "data manifest", "config", "config of the loop", "packing"],
)
def test_a_state_of_another_run_is_refused_and_says_in_what(
    shop: Stage1Shop, started: Path, tmp_path: Path, change: Any, params: dict[str, Any], named: set[str]
) -> None:
    """The run is handed over anew for what changed, so that it would start; the state of the old one is refused."""
    other = shop.copy(tmp_path / "other")
    change(other)
    table = stage1_params().model_dump(mode="json")
    changed = {name: {**table[name], **new} if isinstance(new, dict) else new for name, new in params.items()}
    other.write_run(**changed)
    out = tmp_path / "out"
    shutil.copytree(started, out)
    with pytest.raises(RecipeRefused, match="another run") as refusal:
        Stage1Run(other.inputs(), out).go()
    found = set(refusal.value.where.partition(": ")[2].split(", "))
    # An input's digest stands in the run's file too: another input is another config.
    assert found == named | {"config"}


@pytest.mark.slow
def test_a_resume_says_who_resumed(shop: Stage1Shop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = interrupted(shop, tmp_path / "out")
    later = {"git_sha": "f" * 40, "git_dirty": True}
    monkeypatch.setattr(stage1_run, "git_state", lambda: later)
    Stage1Run(shop.inputs(), out).go()
    begun, (resumed,) = lines(out, "provenance")[0], lines(out, "resumed")
    assert begun.keys() - {"kind"} == resumed.keys() - {"kind", "step"}
    assert (resumed["git_sha"], resumed["git_dirty"]) == ("f" * 40, True) != (begun["git_sha"], begun["git_dirty"])
    assert begun["code_digest"] == resumed["code_digest"] == code_digest()


def test_another_commit_is_no_drift_and_is_told(whole: Path, tmp_path: Path) -> None:
    """What the same run would have logged at another commit."""
    other = tmp_path / "out"
    shutil.copytree(whole, other)
    (header, *rows) = (other / LOG_FILE).read_text().splitlines(keepends=True)
    provenance = json.loads(header)
    assert provenance.keys() >= stage1_run.git_state().keys()
    text = json.dumps({**provenance, "git_sha": "f" * 40, "git_dirty": True}) + "\n" + "".join(rows)
    (other / LOG_FILE).write_text(text)
    assert drift(other, whole) == []
    assert commits(other, other) == ["f" * 40 + " with changes"]
    assert len(commits(whole, other)) == 2
    (other / LOG_FILE).write_text(text.replace(f'"code_digest": "{code_digest()}"', '"code_digest": "other"'))
    assert drift(other, whole) == ["log.jsonl, line 1: code_digest"]  # the control: other code is


def test_a_state_of_other_code_is_refused(
    shop: Stage1Shop, started: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(started, tmp_path / "out")
    monkeypatch.setattr(stage1_run, "code_digest", lambda: "blake3:other")
    with pytest.raises(RecipeRefused, match="another run") as refusal:
        Stage1Run(shop.inputs(), tmp_path / "out").go()
    assert refusal.value.where.endswith(": code")
    assert (refusal.value.expected, refusal.value.found) == ("code = blake3:other", f"code = {code_digest()}")


def test_the_code_is_all_that_the_trainer_imports(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "recipes", tmp_path / "recipes", ignore=shutil.ignore_patterns("__pycache__"))
    found = code_digest(root=tmp_path)
    assert found == code_digest()  # wherever it lies

    def changed(name: str) -> bool:
        path = tmp_path / "recipes" / name
        whole_text = path.read_text()
        path.write_text(whole_text + "\n# changed\n")
        code_digest.cache_clear()
        is_other = code_digest(root=tmp_path) != found
        path.write_text(whole_text)
        return is_other

    inside = ("stage1_smoke.py", "train/loop.py", "train/stage1_stop.py", "model/moe.py", "data/packing.py")
    assert all(map(changed, (*inside, "runtime.py", "train/__init__.py")))
    assert not any(map(changed, ("synth_kd.py", "run.py", "train/gates.py")))
    code_digest.cache_clear()
    assert code_digest(root=tmp_path) == found


@pytest.mark.parametrize("damage", ["gone", "no header", "a step is missing", "a line is damaged"])
def test_a_log_that_does_not_reach_the_state_is_refused(
    shop: Stage1Shop, started: Path, tmp_path: Path, damage: str
) -> None:
    out = tmp_path / "out"
    shutil.copytree(started, out)
    path = out / LOG_FILE
    rows = path.read_text().splitlines(keepends=True)
    kept = {
        "gone": [],
        "no header": rows[1:],
        "a step is missing": [row for row in rows if '"step": 3' not in row],
        "a line is damaged": [rows[0], "{\n", *rows[1:]],
    }[damage]
    path.write_text("".join(kept))
    if damage == "gone":
        path.unlink()
    with pytest.raises(RecipeRefused, match="log") as refusal:
        Stage1Run(shop.inputs(), out).go()
    assert "start again in an empty folder" in refusal.value.next_step
    assert not path.exists() if damage == "gone" else path.read_text() == "".join(kept)  # nothing is overwritten


def test_a_line_separator_in_an_answer_ends_no_line(tmp_path: Path) -> None:
    """A model may well sample one, and JSON leaves it as it is."""
    log = Log(tmp_path / LOG_FILE)
    log.begin({"git_sha": None}, resumed_step=None)
    log.write("evaluation", {"step": 1, "samples": ["a\u2028b\x85c"]})
    log.write("step", {"step": 1})
    assert [line["kind"] for line in read_log(log.path)] == ["provenance", "evaluation", "step"]
    assert stage1_smoke._has_logged(log.path, 1)


@given(
    rows=st.sampled_from([4, 8]),
    world=st.sampled_from([1, 2, 4]),
    micro=st.integers(1, 8),
    seed=st.integers(0, 10**6),
)
@settings(max_examples=60, deadline=None)
def test_span_means_do_not_depend_on_the_cut(rows: int, world: int, micro: int, seed: int) -> None:
    """And the mean of the means of the parts does: the control that the property is no accident."""
    generator = torch.Generator().manual_seed(seed)
    length = 6
    span_BT = torch.randint(0, 3, (rows, length), generator=generator)
    span_BT[0, :2] = torch.tensor([1, 2])
    mask_BT = (torch.rand(rows, length, generator=generator) < 0.7).float()
    mask_BT[0, :2] = 1.0
    nll_BT = torch.rand(rows, length, generator=generator, dtype=torch.float64) + span_BT
    batch = Batch(torch.arange(rows * length).view(rows, length), span_BT, mask_BT, span_BT, span_BT)

    def weighted(part: Batch, counts: tuple[int, ...]) -> float:
        kept = part.loss_mask_BT > 0
        weights = token_weights(part.span_BT[kept], counts, loss="span", span_weights=(0.0, 1.0, 1.0))
        return float((weights.double() * nll_BT.flatten()[part.ids_BT[kept]]).sum())

    shares = [batch.share(rank, world) for rank in range(world)]
    counts = added([span_counts(share) for share in shares])
    assert counts == span_counts(batch)
    parts = [part for share in shares for part in share.cut(micro)]
    kept_BT = mask_BT > 0
    wanted = sum(float(nll_BT[kept_BT & (span_BT == span)].mean()) for span in (1, 2))
    assert sum(weighted(part, counts) for part in parts) == pytest.approx(wanted, rel=1e-6)
    # What a trainer gets that divides in each micro-batch: equal only if all have the same counts.
    per_part = [span_counts(part) for part in parts]
    of_means = sum(weighted(part, own) for part, own in zip(parts, per_part, strict=True)) / len(parts)
    if any(own[1:] != per_part[0][1:] for own in per_part) and len(parts) > 1:
        assert of_means != pytest.approx(wanted, rel=1e-9)


def test_processes_and_micro_batches_change_rounding_only(shop: Stage1Shop, tmp_path: Path) -> None:
    """The trainer itself: loss, expert loads and gradients of the global batch."""
    found = []
    for world, micro in ((1, 4), (2, 1), (4, 1)):
        run = Stage1Run(shop.inputs(), tmp_path)
        trainer: Trainer = run.trainer
        trainer.world = world
        trainer.params = trainer.params.model_copy(update={"micro_sequences": micro})
        trainer.model.zero_grad(set_to_none=True)
        figures = trainer._accumulate(next(iter(trainer.batches())))
        gradients = {name: weight.grad.clone() for name, weight in trainer.model.named_parameters()}  # type: ignore[union-attr]
        found.append((figures, gradients))
    for figures, gradients in found[1:]:
        assert figures.counts == found[0][0].counts
        assert figures.loss == pytest.approx(found[0][0].loss, rel=1e-5)
        for number, counts_E in (figures.expert_counts or {}).items():
            assert torch.equal(counts_E, (found[0][0].expert_counts or {})[number])
        for name, gradient in gradients.items():
            torch.testing.assert_close(gradient, found[0][1][name], rtol=2e-3, atol=2e-5)


def evaluation(validity: float | None, objective: float) -> dict[str, Any]:
    return {"format_validity": validity, "held_out_objective": objective}


def router(step: int, *, dead: int = 0, load: float = 15.0) -> dict[str, Any]:
    layer = {"layer": 2, "dead_experts": dead, "active_experts": 8 - dead, "max_load_percent": load}
    return {"step": step, "layers": [layer]}


def test_the_stop_rules() -> None:
    stop = {
        "min_format_validity": 0.9,
        "format_window": 2,
        "flat_improvement": 0.01,
        "flat_window": 2,
        "max_dead": 0.2,
        "max_load": 0.3,
        "alarm_after_steps": 10,
    }
    good = [evaluation(1.0, 5.0), evaluation(0.95, 4.995), evaluation(1.0, 4.991)]

    def verdict(evaluations: list[dict[str, Any]], figures: dict[str, Any]) -> str:
        return str(judge_stop(evaluations, figures, stop)["verdict"])

    assert verdict(good, router(20)) == "done"
    assert verdict(good[:2], router(20)) == "go on"  # too few to say that it is flat
    assert verdict([*good[:2], evaluation(0.8, 4.991)], router(20)) == "go on"
    assert verdict([*good[:2], evaluation(None, 4.991)], router(20)) == "go on"
    assert verdict([evaluation(1.0, 5.2), *good[1:]], router(20)) == "go on"  # still falling
    assert verdict(good, router(20, dead=2)) == "router collapse"
    assert verdict(good, router(20, load=31.0)) == "router collapse"
    assert verdict(good, router(9, load=31.0)) == "go on"  # too early for the alarm, too bad to be done
    assert judge_stop(good, router(9, dead=2), stop)["collapsed_layers"] == [2]


def test_a_collapse_ends_the_run_and_keeps_its_state(shop: Stage1Shop, tmp_path: Path) -> None:
    other = shop.copy(tmp_path / "other")
    stop = stage1_params().stop.model_dump(mode="json") | {"max_load": 0.01, "alarm_after_steps": 2}
    other.write_run(stop=stop)
    (tmp_path / "out").mkdir()
    with pytest.raises(GateMissed, match="collapsed") as missed:
        Stage1Run(other.inputs(), tmp_path / "out").go()
    assert missed.value.exit_code == 20
    assert [line["step"] for line in lines(tmp_path / "out", "step")] == [1, 2, 3]  # the first evaluation after it
    assert [path.name for path in (tmp_path / "out/states").iterdir()] == ["state-00000003"]


def test_the_provenance_names_the_commit() -> None:
    found = stage1_run.git_state()
    said = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert found["git_sha"] == (said.stdout.strip() or None)


def test_a_ref_that_means_another_artifact_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stage1_smoke, "resolve", lambda ref: {"artifact": "blake3:new", "path": "somewhere"})
    assert stage1_smoke.resolve_input("checkpoint", {"ref": "vpMoE@smoke", "digest": "blake3:new"}) == "somewhere"
    with pytest.raises(RecipeRefused, match="another artifact") as refusal:
        stage1_smoke.resolve_input("checkpoint", {"ref": "vpMoE@smoke", "digest": "blake3:old"})
    assert (refusal.value.expected, refusal.value.found) == ("blake3:old", "blake3:new")
    assert refusal.value.where == "checkpoint vpMoE@smoke"


def test_errors_keep_their_exit_codes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["train", "--run", str(tmp_path), "--checkpoint", "a", "--data", "b", "--tokenizer", "c"]
    assert stage1_smoke.main([*command, "--out", str(tmp_path), "--json"]) == 20
    document = json.loads(capsys.readouterr().out)
    assert document["schema"] == 1
    assert document["error"]["exit_code"] == 20
    assert document["error"]["next_step"] == "vpstore build stage1"
    assert stage1_smoke.main([*command, "--out", str(tmp_path)]) == 20
    assert "no run to carry out" in capsys.readouterr().err
    with pytest.raises(SystemExit) as ended:
        stage1_smoke.main(["train"])
    assert ended.value.code == 2


@pytest.mark.slow
def test_killed_by_the_system_and_resumed_by_the_program(shop: Stage1Shop, tmp_path: Path) -> None:
    """What `make stage1-smoke` does, but for the store: three processes, one of them killed."""
    python = [sys.executable, "-m", "recipes.stage1_smoke"]
    out = tmp_path / "interrupted"
    commands = {name: [*python, *shop.command(tmp_path / name)] for name in ("interrupted", "uninterrupted")}
    stage1_smoke.train_and_kill(commands["interrupted"], out, 3)
    assert not (out / "summary.json").exists()
    resumed = stage1_smoke.train([*commands["interrupted"], "--json"])
    twin = stage1_smoke.train([*commands["uninterrupted"], "--json"])
    assert resumed == twin
    found = stage1_smoke.compared(tmp_path, {"run": "blake3:run", "twin": twin, "started": 0.0})
    assert found["verdict"] == "resumed without drift"
    assert 2 <= found["resumed_from_step"] < 6
    log = out / "log.jsonl"
    log.write_text(log.read_text().replace('"cross_entropy": ', '"cross_entropy": 1', 1))
    with pytest.raises(RecipeRefused, match="not the uninterrupted one"):
        stage1_smoke.compared(tmp_path, {"run": "blake3:run", "twin": twin, "started": 0.0})
