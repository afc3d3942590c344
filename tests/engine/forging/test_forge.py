"""Cycles of pruning and training: judged by what was saved, stopped when worse, resumable."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from engine.config.tasks.pruning import ForgeJob, ForgeSettings, PruneSettings
from engine.config.train_config import TrainConfig
from engine.errors import ConfigError
from engine.forging.identity import RENAMED, identity, upgraded
from engine.forging.report import draw, samples, table
from engine.forging.stages import Stages
from engine.model_sources.pruning_record import read_pruning
from engine.pruning.selection import wanted_units
from engine.verbs.models import forge as recipe
from engine.verbs.models.evaluate import evaluate
from engine.verbs.models.forge import _worse, forge
from engine.verbs.models.judge import judge

ROOT = Path(__file__).parents[3]
Make = Callable[..., ForgeSettings]


@pytest.fixture
def make(tiny_model: Path, write_rows: Callable[..., Path], tmp_path: Path) -> Make:
    """``make(name, **changes)`` gives the settings of a small job in the folder ``name``."""
    data = write_rows(24)

    def settings(name: str = "job", steps: int = 4, **changes: Any) -> ForgeSettings:
        training = TrainConfig(
            model=str(tiny_model),
            data=[str(data)],
            method="lora",
            max_steps=steps,
            checkpoint_every=2,
            learning_rate=5e-3,
            max_length=64,
            device="cpu",
            plot=False,
        )
        pruning = PruneSettings(fraction=0.25, metric="activation", device="cpu", max_length=64)
        given: dict[str, Any] = {"cycles": 2, "heldout_rows": 2, "samples": 1} | changes
        return ForgeSettings(
            output_dir=tmp_path / name, training=training, pruning=pruning, **given
        )

    return settings


def lasting(results: dict[str, Any]) -> Any:
    """The results without places (which a digest covers), times and memory."""
    volatile = {"model", "digest", "bytes"}
    volatile |= {"tokens_per_second", "train_seconds", "peak_memory_bytes"}

    def lasting_part(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: lasting_part(item) for key, item in value.items() if key not in volatile}
        return [lasting_part(item) for item in value] if isinstance(value, list) else value

    return lasting_part(results)


def test_a_job_prunes_trains_and_judges_the_saved_model(make: Make) -> None:
    settings = make(baseline=True)
    results = forge(settings)
    pruned = [cycle["prune"]["heads"]["removed"] for cycle in results["cycles"]]
    before = results["cycles"][0]["prune"]["heads"]["before"]
    first = wanted_units(0.25, before)
    assert pruned == [first, wanted_units(0.25, before - first)]
    last = results["cycles"][-1]["trained"]
    assert last["perplexity"] < results["cycles"][-1]["pruned"]["perplexity"]
    assert last["pruned_heads"] == sum(pruned)
    assert results["model"] == last["model"]
    pruning = read_pruning(Path(results["model"]))
    assert pruning is not None
    assert sum(len(heads) for heads in pruning.heads.values()) == sum(pruned)
    again = evaluate(
        results["model"],
        settings.output_dir / "data" / "heldout.jsonl",
        max_length=64,
        device="cpu",
    )
    assert again.perplexity == pytest.approx(last["perplexity"], rel=1e-9)
    assert len(results["baseline_cycles"]) == 2
    assert results["baseline_cycles"][0]["trained"]["pruned_heads"] == 0
    assert not (settings.output_dir / "cycle-1" / "pruned").exists()
    assert json.loads((settings.output_dir / "results.json").read_text()) == results
    verdict, data = results["verdict"], results["data"]
    assert (verdict["against"], verdict["seeds"]) == ("baseline", 1)
    assert verdict["verdict"] in ("kept", "within noise", "lost")
    assert data["rows_in_training_and_judging"] == 0
    assert data["training"]["file"] == "data/train.jsonl"
    assert (data["training"]["rows"], data["judging"]["rows"]) == (22, 2)
    assert data["calibration"] == {"files": [data["training"]["file"]], "first_rows": 256}
    for judged in (results["baseline"], last):
        losses, tokens = zip(*judged["row_losses"], strict=True)
        assert sum(tokens) == judged["tokens"]
        assert sum(losses) / sum(tokens) == pytest.approx(judged["loss"], rel=1e-5)
        assert judged["interval"][0] <= judged["perplexity"] * 1.01
    text = table(results)
    assert [line.split("  ")[0] for line in text.splitlines()[1:]] == [
        "baseline",
        "cycle 1, pruned",
        "cycle 1, trained",
        "cycle 2, pruned",
        "cycle 2, trained",
        "baseline 1, trained",
        "baseline 2, trained",
    ]
    assert results["baseline"]["samples"][0]["prompt"] in samples(results)
    assert draw(results, settings.output_dir / "forge.png")
    assert (settings.output_dir / "forge.png").read_bytes().startswith(b"\x89PNG")


def test_other_seeds_tell_what_chance_does_and_a_dead_writer_leaves_nothing(
    make: Make, tmp_path: Path
) -> None:
    settings = make(cycles=1, steps=2, baseline=True, baseline_seeds=2, samples=0)
    leftovers = [
        settings.output_dir / folder / ".tmp-model-99999999-0a1b2c3d"
        for folder in (".", "data", "stages", "cycle-1", "baseline-1", "baseline-1-seed-1")
    ]
    for path in leftovers:
        path.mkdir(parents=True)
    results = forge(settings)
    assert not any(path.exists() for path in leftovers)
    (first,), ((second,),) = results["baseline_cycles"], results["baseline_seeds"]
    assert first["trained"]["loss"] != second["trained"]["loss"]
    assert results["verdict"]["seeds"] == 2
    assert results["verdict"]["seed_spread"] > 0
    assert "baseline 1, seed +1" in table(results)


def test_a_job_of_an_earlier_version_is_known_by_its_present_settings(make: Make) -> None:
    settings = make(cycles=1, baseline=True)
    pruning = settings.pruning.model_copy(update={"repair": "none"})
    known = identity(settings.model_copy(update={"pruning": pruning}))
    earlier = json.loads(json.dumps(known))
    del earlier["baseline_seeds"]
    for name in ("what", "protect_first", "protect_last", "repair", "repair_ridge", "target"):
        del earlier["pruning"][name]
    earlier["pruning"]["metric"] = "activation"
    assert upgraded(earlier) == json.loads(json.dumps(known))
    yesterday = json.loads(json.dumps(known))
    del yesterday["pruning"]["target"]
    assert upgraded(yesterday) == json.loads(json.dumps(known))


@pytest.mark.parametrize("mode", ["zero", "structural"])
def test_the_mode_of_a_job_is_the_mode_of_its_pruning(tmp_path: Path, mode: Any) -> None:
    job = ForgeJob(model="m", data=("d",), output_dir=tmp_path, fraction=0.5, mode=mode)
    training = TrainConfig(model="m", data=["d"])
    assert job.settings(training).pruning.form == mode


def test_training_never_sees_a_held_out_row(make: Make) -> None:
    settings = make(cycles=1)
    forge(settings)
    files = (settings.output_dir / "data" / name for name in ("train.jsonl", "heldout.jsonl"))
    train, heldout = (set(file.read_text().splitlines()) for file in files)
    assert len(heldout) == 2
    assert not train & heldout


def test_a_domain_is_a_file_to_split_or_a_folder_with_both_files(
    make: Make, write_rows: Callable[..., Path], tmp_path: Path
) -> None:
    settings = make("file", cycles=1, domain=str(write_rows(24)), samples=0)
    forge(settings)
    folder = settings.output_dir / "data"
    whole = make("folder", cycles=1, domain=str(folder), samples=0)
    forge(whole)
    for name in ("train.jsonl", "heldout.jsonl"):
        assert (folder / name).read_bytes() == (whole.output_dir / "data" / name).read_bytes()


@pytest.mark.parametrize("per_layer", [False, True])
def test_structural_cycles_make_the_model_smaller(make: Make, per_layer: bool) -> None:
    settings = make(cycles=1)
    pruning = PruneSettings(
        fraction=0.5,
        metric="l2",
        mode="structural",
        per_layer=per_layer,
        device="cpu",
        max_length=64,
    )
    results = forge(
        ForgeSettings(
            output_dir=settings.output_dir, training=settings.training, pruning=pruning, cycles=1
        )
    )
    cycle = results["cycles"][0]
    assert cycle["trained"]["parameters"] < results["baseline"]["parameters"]
    assert cycle["trained"]["parameters"] == cycle["pruned"]["parameters"]


def test_a_job_that_fails_at_any_stage_goes_on_to_the_same_results(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = forge(make("whole"))
    names = sorted((make("whole").output_dir / "stages").iterdir())
    run = Stages.run
    for stage in ("baseline", "cycle-1-prune", "cycle-1-train", "cycle-1", "cycle-2-merge"):
        assert f"{stage}.json" in [path.name for path in names]

        def fail(job: Stages, name: str, work: Any, *, stage: str = stage) -> Any:
            """The stage is done but not written down, as when the power fails."""
            if name == stage:
                work()
                raise RuntimeError("the power fails")
            return run(job, name, work)

        monkeypatch.setattr(Stages, "run", fail)
        with pytest.raises(RuntimeError, match="power"):
            forge(make("parts"), resume=True)
    monkeypatch.setattr(Stages, "run", run)
    assert lasting(forge(make("parts"), resume=True)) == lasting(whole)


def test_a_killed_job_goes_on_to_the_same_results(make: Make, tmp_path: Path) -> None:
    whole = forge(make("whole", steps=12))
    settings = make("killed", steps=12)
    words = [
        *("forge", "--model", settings.training.model, "--data", settings.training.data[0]),
        *("--output-dir", str(settings.output_dir), "--fraction", "0.25", "--cycles", "2"),
        *("--metric", "activation"),
        *("--heldout-rows", "2", "--samples", "1", "--resume", "--json"),
        *("method=lora", "max_steps=12", "checkpoint_every=2", "learning_rate=5e-3"),
        *("max_length=64", "device=cpu", "plot=false"),
    ]
    command = [sys.executable, "-m", "cli.main", *words]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    for cycle in (1, 2):
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        mark = settings.output_dir / f"cycle-{cycle}" / "run" / "checkpoint-2"
        deadline = time.monotonic() + 120
        while not mark.exists() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        _, error = process.communicate()
        assert mark.exists(), error.decode()
        assert not (settings.output_dir / "stages" / f"cycle-{cycle}-train.json").exists()
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr.decode()
    assert lasting(json.loads(done.stdout)) == lasting(whole)


def test_a_job_killed_at_some_of_its_file_operations_leaves_the_same_bytes(
    tiny_model: Path, write_rows: Callable[..., Path], tmp_path: Path
) -> None:
    """`make torture` kills at every one of them."""
    server = ROOT / "tests" / "support" / "processes" / "forge_kill_server.py"
    done = subprocess.run(
        [sys.executable, str(server), str(tiny_model), str(write_rows(24)), str(tmp_path / "k"),
         "83", "40"],
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    seen = json.loads(done.stdout.splitlines()[-1])
    assert seen["operations"] > 200
    assert seen["killed"] == seen["same"] == len(range(40, seen["operations"], 83)), done.stderr


def test_a_cycle_that_makes_the_model_much_worse_is_the_last(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recipe, "_worse", lambda number, before, after: "Cycle 1 is the last")
    settings = make(baseline=True)
    results = forge(settings)
    assert len(results["cycles"]) == len(results["baseline_cycles"]) == 1
    assert results["stopped"] == "Cycle 1 is the last"
    assert results["model"] == settings.training.model


@pytest.mark.parametrize(
    ("before", "after", "stops"),
    [
        (20.0, 22.5, True),
        (20.0, 21.9, False),
        (5.0, 5.9, False),
        (5.0, 6.1, True),
        (5.0, 4.0, False),
        (5.0, None, True),
        (None, 7.0, False),
    ],
)
def test_worse_means_by_a_tenth_and_by_one(
    before: float | None, after: float | None, stops: bool
) -> None:
    told = _worse(3, {"perplexity": before}, {"perplexity": after})
    assert (told is not None) == stops
    assert told is None or told.startswith("Cycle 3 is the last")


def test_a_job_is_not_begun_twice_nor_continued_with_other_settings(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    forge(make(cycles=1))
    with pytest.raises(ConfigError, match="--resume"):
        forge(make(cycles=1))
    with pytest.raises(ConfigError, match="cycles was 1 and is 2"):
        forge(make(cycles=2), resume=True)
    forge(make(cycles=1), resume=True)
    # By another name of its directory, and after that was moved.
    make().output_dir.rename(tmp_path / "moved")
    monkeypatch.chdir(tmp_path)
    moved = make(cycles=1).model_copy(update={"output_dir": Path("moved")})
    assert forge(moved, resume=True)["model"] == str(Path("moved", "cycle-1", "model"))


def test_a_job_that_has_done_nothing_is_begun_anew_with_other_settings(tmp_path: Path) -> None:
    Stages(tmp_path, {"data": "misspelt"}, resume=False)
    job = Stages(tmp_path, {"data": "rows"}, resume=False)
    job.run("data", lambda: {"rows": 1})
    for resume, told in ((False, "--resume"), (True, "data was 'rows' and is 'others'")):
        with pytest.raises(ConfigError, match=told):
            Stages(tmp_path, {"data": "others"}, resume=resume)


def test_bad_requests_are_refused(make: Make, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="`cycles` = 0"):
        forge(make(cycles=0))
    with pytest.raises(ConfigError, match="--domain is 'nowhere'"):
        forge(make(domain="nowhere"))
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot be written to"):
        forge(make("file/job"))
    with pytest.raises(ConfigError, match="no text in UTF-8"):
        forge(make(os.fsdecode(b"job\xff")))
    theirs = tmp_path / "job" / "cycle-1" / "pruned" / "config.json"
    theirs.parent.mkdir(parents=True)
    theirs.write_text("{}")
    with pytest.raises(ConfigError, match="cycle-1 stands where the job would write"):
        forge(make())
    assert theirs.read_text() == "{}"
    gates = tmp_path / "gates.yaml"
    gates.write_text("{parse_rate: 0.5}")
    with pytest.raises(ConfigError, match="a checker accepts"):
        forge(make("other", gates=gates))
    assert not (tmp_path / "other").exists()


def test_gates_score_the_answers_of_every_model(make: Make, tmp_path: Path) -> None:
    gates = tmp_path / "gates.yaml"
    asked = {"checker": "regex", "pattern": "[aeiou]", "parse_rate": 0, "max_new_tokens": 4}
    gates.write_text(json.dumps(asked | {"worse_than_base": 1}))
    results = forge(make(cycles=1, steps=2, samples=0, gates=gates))
    models = [results["baseline"], results["cycles"][0]["pruned"], results["cycles"][0]["trained"]]
    again = judge(
        models[2]["model"], make().output_dir / "data" / "heldout.jsonl", gates=asked,
        device="cpu", max_length=64, output_dir=tmp_path,
    )  # fmt: skip
    for model in models:
        assert 0 <= model["task"]["figures"]["parse_rate"] <= 1
        assert model["task"]["gates"][0]["name"] == "parse_rate"
    assert models[2]["task"]["figures"]["parse_rate"] == again.figures["parse_rate"]
    against = [gate["name"] for gate in models[2]["task"]["gates"]]
    assert "parse_rate_loss_from_base" in against
    assert "gates passed (parse_rate" in results["verdict"]["text"]
    with pytest.raises(ConfigError, match="gates"):
        forge(make(cycles=1, steps=2, samples=0), resume=True)
    gates.write_text("checker: json\nbase: other\n")
    with pytest.raises(ConfigError, match="names 'other' as `base`"):
        forge(make("second", cycles=1, gates=gates))


def test_a_pruned_model_learns_from_the_one_it_was(make: Make) -> None:
    results = forge(make(cycles=1, distill=True, steps=6))
    cycle = results["cycles"][0]
    assert cycle["train"]["steps"] == 6
    plain = forge(make("plain", cycles=1, steps=6))
    assert cycle["pruned"]["perplexity"] == plain["cycles"][0]["pruned"]["perplexity"]
    assert cycle["trained"]["perplexity"] != plain["cycles"][0]["trained"]["perplexity"]


def test_a_job_that_an_earlier_version_began_is_gone_on_with(tmp_path: Path) -> None:
    (tmp_path / "job.json").write_text('{"control": true, "training": {"mlp_tile_rows": 64}}')
    present = {"baseline": True, "training": {"mlp_tile_tokens": 64}}
    job = Stages(tmp_path, present, resume=True, renamed=RENAMED)
    assert job.run("data", lambda: {"rows": 3}) == {"rows": 3}
    with pytest.raises(ConfigError, match="baseline was True and is False"):
        Stages(tmp_path, present | {"baseline": False}, resume=True, renamed=RENAMED)
