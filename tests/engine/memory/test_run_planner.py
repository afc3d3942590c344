"""A plan knows the rows, the teacher and the memory of its run, and train takes what it chooses."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from cli import main as cli
from engine.config.sources import load_config
from engine.config.train_config import NO_DATA, TrainConfig
from engine.data.batches.loader import collate
from engine.errors import ConfigError, DataError
from engine.memory.budget import largest_step
from engine.memory.estimate import plan as plan_memory
from engine.memory.estimate import step_of
from engine.memory.options import NAMES, memory_options
from engine.memory.run_planner import usable_memory
from engine.memory.search import changed
from engine.training.prepare import prepare
from engine.training.row_set import RowSet, read_examples
from engine.verbs.training.plan import find_target, plan, with_fitted
from engine.verbs.training.train import train
from tests.support.tiny_model import write_tiny_model

GIB = 2**30


def small(model: Path, rows: Path, output: Path, **changes: Any) -> TrainConfig:
    given = {"max_length": 512, "batch_size": 3, "device": "cpu", "plot": False} | changes
    return TrainConfig(model=str(model), data=(str(rows),), output_dir=output, **given)


@pytest.mark.parametrize("changes", [{}, {"accumulate": 3}, {"packing": True, "max_length": 64}])
def test_the_plan_is_that_of_the_largest_step_of_the_rows(
    changes: dict[str, Any], tiny_model: Path, write_rows: Callable[..., Path], tmp_path: Path
) -> None:
    config = small(
        tiny_model, write_rows(9), tmp_path / "run", gradient_checkpointing="none", **changes
    )
    prepared = prepare(config)
    lengths = [len(example) for example in prepared.examples]
    steps = range(prepared.steps_per_epoch)
    most = max(sum(b.tokens for b in prepared.batches(step)[0]) for step in steps)
    report = plan(config)
    known = largest_step(prepared)
    model = prepared.model_source.config
    by_hand = plan_memory(model, config, gpu=False, dtype=report.plan.dtype, work=known)
    assert report.plan.total == by_hand.total
    assert report.plan.tokens >= most
    assert report.as_dict()["longest_row_tokens"] == max(lengths)
    assert f"rows: 9, the longest of {max(lengths)} tokens" in report.text()
    bare = plan(changed(config, data=NO_DATA))
    assert bare.plan.total >= report.plan.total
    assert bare.as_dict()["rows"] is None
    assert f"taken to have max_length, {config.max_length} tokens" in bare.text()


def test_a_step_of_rows_is_the_batch_that_is_collated(
    tiny_model: Path, write_rows: Callable[..., Path], tmp_path: Path
) -> None:
    prepared = prepare(small(tiny_model, write_rows(9), tmp_path / "run"))
    longest = sorted(prepared.examples, key=len, reverse=True)[:3]
    lengths, model = [len(example) for example in prepared.examples], prepared.model_source.config
    made = step_of(prepared.config, lengths, model)
    assert made.tokens == collate(longest).tokens
    cut = changed(prepared.config, max_length=8)
    assert step_of(cut, [5, 9, 40, 3], model).micro_batches == ((8, 8, 5),)


def test_the_rows_of_a_model_without_a_tokenizer_are_read(
    tmp_path: Path, write_rows: Callable[..., Path]
) -> None:
    given: dict[str, Any] = {"model": "smollm2-135m", "batch_size": 1, "max_length": 64}
    report = plan(TrainConfig(data=(str(write_rows(7)),), **given))
    assert report.as_dict()["rows"] == 7
    assert "rows: 7; smollm2-135m has no tokenizer here" in report.text()
    (tmp_path / "broken.jsonl").write_text('{"prompt": "a", "response": "b"}\n{"prompt": \n')
    for name, message in (("nope.jsonl", "no such data file"), ("broken.jsonl", "broken.jsonl:2")):
        with pytest.raises(DataError, match=message):
            plan(TrainConfig(data=(str(tmp_path / name),), **given))


def test_the_longest_rows_do_not_depend_on_the_data(
    tiny_model: Path, write_rows: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["plan", "--model", str(tiny_model), "--max-context", "--json", "--device", "cpu"]
    tables = []
    for more in ([], ["--data", str(write_rows(3))]):
        assert cli.main([*words, *more]) == 0
        tables.append(json.loads(capsys.readouterr().out))
    assert tables[0] == tables[1]


def test_a_teacher_s_weights_are_counted(
    tiny_model: Path, write_rows: Callable[..., Path], tmp_path: Path
) -> None:
    teacher = write_tiny_model(tmp_path / "teacher")
    config = small(tiny_model, write_rows(4), tmp_path / "run", gradient_checkpointing="none")
    alone, taught = plan(config), plan(changed(config, teacher=str(teacher)))
    base = ("NF4 base", "dense base", "embeddings", "head", "norms and biases")
    weights = sum(alone.plan.save.owners.get(owner, 0) for owner in base)
    assert taught.plan.reserve["teacher's weights"] == weights > 0
    assert taught.plan.total == alone.plan.total + weights
    assert "teacher: its weights are counted" in taught.text()
    assert "teacher:" not in alone.text()


@pytest.mark.slow
@pytest.mark.parametrize(("preset", "gigabytes"), [("qlora-12gb", 12), ("qlora-16gb", 16)])
def test_a_preset_of_a_size_uses_that_gpu(preset: str, gigabytes: int) -> None:
    report = plan(load_config(preset=preset, flags={"model": "qwen3-8b", "data": "-"}))
    config = report.plan.config
    assert 0.85 * gigabytes * GIB <= report.plan.total <= 0.95 * gigabytes * GIB
    assert config.max_length == 2048
    assert config.batch_size * config.accumulate == 16
    assert config.gradient_checkpointing != "full"


@pytest.mark.parametrize("setting", ["memory_budget", "fit_memory"])
def test_an_explicit_policy_that_a_search_replaces_is_named(setting: str, tiny_model: Path) -> None:
    given: dict[str, Any] = {"model": str(tiny_model), "data": NO_DATA, "device": "cuda"}
    config = TrainConfig(gradient_checkpointing="full", max_length=64, **{setting: GIB}, **given)
    report = plan(config)
    assert report.as_dict()["changes"]["gradient_checkpointing"] == ["full", "none"]
    assert "--gradient-checkpointing none  (asked for full)" in report.text()
    assert report.as_dict()["budget_bytes"] == GIB


@pytest.mark.parametrize("sizes", [(GIB, 2 * GIB), (2 * GIB, GIB)])
def test_the_smaller_of_budget_and_size_counts(sizes: tuple[int, int], tiny_model: Path) -> None:
    given: dict[str, Any] = {"model": str(tiny_model), "data": NO_DATA, "device": "cuda"}
    config = TrainConfig(memory_budget=sizes[0], fit_memory=sizes[1], max_length=64, **given)
    assert plan(config).budget == GIB


def test_graphs_are_offered_no_offloading() -> None:
    config = TrainConfig(model="m", data=NO_DATA)
    offered = {"offload"} & {option.setting for option in memory_options(config, True, False)}
    assert offered == {"offload"}
    options = memory_options(changed(config, cuda_graphs=True), True, False)
    assert "offload" not in {option.setting for option in options}


@pytest.mark.skipif(torch.cuda.is_available(), reason="the GPU's memory is known")
def test_a_gpu_that_is_not_here_has_no_memory_to_fit() -> None:
    assert usable_memory(gpu=True) is None
    with pytest.raises(ConfigError, match="--fit-memory 15GiB"):
        plan(load_config(preset="auto", flags={"model": "qwen3-8b", "data": "-"}))


def test_train_takes_what_the_planner_chose(
    tiny_model: Path, write_rows: Callable[..., Path], tmp_path: Path
) -> None:
    """The preset is made settings, which the run stores, and a run that goes on has the same."""
    flags = {"model": str(tiny_model), "data": str(write_rows(9)), "device": "cpu", "plot": False}
    flags |= {"output_dir": str(tmp_path / "run"), "max_steps": 2}
    config = load_config(preset="auto", flags=flags)
    chosen, _ = with_fitted(config)
    assert chosen.fit_memory is None
    assert chosen.gradient_checkpointing == "none"
    assert chosen.batch_size * chosen.accumulate == 16
    train(config, console=False)
    stored = load_config(tmp_path / "run" / "config.yaml")
    assert stored.fit_memory is None
    assert [getattr(stored, name) for name in NAMES] == [getattr(chosen, name) for name in NAMES]
    log = next((tmp_path / "run").glob("*.log")).read_text()
    assert "chosen for the memory: --gradient-checkpointing none" in log
    again, rows = with_fitted(changed(config, resume="auto", fit_memory=GIB // 1024))
    assert rows is None
    assert [getattr(again, name) for name in NAMES] == [getattr(stored, name) for name in NAMES]


@pytest.mark.parametrize(("longest", "times"), [(512, 1), (32, 2)])
def test_rows_are_tokenised_once_unless_the_planner_shortens_them(
    longest: int,
    times: int,
    tiny_model: Path,
    tmp_path: Path,
    write_rows: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    read: list[int] = []

    def counted(config: TrainConfig, *given: Any) -> RowSet:
        read.append(config.max_length)
        return read_examples(config, *given)

    for module in ("engine.memory.run_planner", "engine.training.prepare"):
        monkeypatch.setattr(f"{module}.read_examples", counted)
    config = small(tiny_model, write_rows(9), tmp_path / "run", max_steps=1)
    config = changed(config, fit_memory=GIB)
    fitted, rows = with_fitted(config)
    assert rows is not None and rows.examples
    fitted = changed(fitted, max_length=longest, template_date="2026-01-01T00:00:00")
    prepared = prepare(fitted, None, rows)
    assert len(read) == times
    assert (prepared.rows is rows) == (times == 1)
    assert max(map(len, prepared.examples)) <= longest
    if times == 1:
        read.clear()
        train(config, console=False)
        assert len(read) == 1
        log = next((tmp_path / "run").glob("*.log")).read_text()
        assert prepared.rows.report.describe() in log


def test_less_memory_takes_smaller_micro_batches(
    tiny_model: Path, tmp_path: Path, write_rows: Callable[..., Path]
) -> None:
    config = small(tiny_model, write_rows(9), tmp_path / "run", batch_size=4, max_length=64)
    target = find_target(config)
    one = changed(config, batch_size=1, gradient_checkpointing="none", keep_decoded="none")
    limit = target.plan(one).total
    less, _ = with_fitted(changed(config, fit_memory=limit))
    assert target.plan(less).total <= limit
    assert less.batch_size * less.accumulate == 4
    more, _ = with_fitted(changed(config, fit_memory=100 * limit))
    assert (more.batch_size, more.gradient_checkpointing) == (4, "none")
