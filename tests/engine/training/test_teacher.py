"""`--teacher`: learning another model's probabilities."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from engine.config.train_config import TrainConfig
from engine.errors import CheckpointError, ConfigError
from engine.model_sources.load_model import load_model
from engine.runs.metrics import read_metrics
from engine.verbs.training.train import train
from models.adapters import adapter_tensors, add_lora
from models.layers.packed_batch import PackedBatch

Rows = Callable[..., Path]


def config(model: Path, data: Path, output: Path, **changes: object) -> TrainConfig:
    return TrainConfig(
        model=str(model),
        data=[str(data)],
        output_dir=output,
        method="lora",
        max_steps=8,
        batch_size=4,
        learning_rate=1e-2,
        max_length=64,
        device="cpu",
        plot=False,
        **changes,
    )


def test_the_loss_is_that_of_the_two_models_probabilities(tiny_model: Path) -> None:
    student, teacher = load_model(tiny_model), load_model(tiny_model)
    add_lora(student, rank=4, alpha=8)
    with torch.no_grad():
        for _, b in adapter_tensors(student).values():
            b.normal_(0, 0.1)
    ids = torch.arange(24).view(2, 12) % 60
    labels = ids.clone()
    labels[:, :5] = -100
    got = student.loss(ids, labels, teacher=teacher)
    mine, theirs = (m(ids)[:, 4:-1].log_softmax(-1) for m in (student, teacher))
    want = (theirs.exp() * (theirs - mine)).sum(-1).mean()
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-7)
    got.backward()
    grads = [p.grad for p in student.parameters() if p.requires_grad]
    assert all(grad is not None and bool(grad.any()) for grad in grads)


def test_a_teacher_embedded_on_the_host_reads_no_ids_from_the_device(tiny_model: Path) -> None:
    """Meta tensors are the device: of them nothing can be read on the host."""
    device = torch.device("meta")
    student, teacher = load_model(tiny_model).to(device), load_model(tiny_model).to(device)
    table = torch.zeros(teacher.model.embed_tokens.shape)
    teacher.model.embed_tokens.set_weight(table, device)
    ids = torch.arange(24).view(2, 12) % 60
    batch = PackedBatch.of(ids, ids)
    with torch.no_grad():
        assert student.batch_loss(batch, teacher=teacher).is_meta
        with pytest.raises(NotImplementedError, match="meta"):
            student.batch_loss(batch.to(device), teacher=teacher)


def test_a_model_has_nothing_to_learn_from_itself(
    tiny_model: Path, write_rows: Rows, tmp_path: Path
) -> None:
    train(
        config(tiny_model, write_rows(8), tmp_path / "run", teacher=str(tiny_model)), console=False
    )
    losses = [line["loss"] for line in read_metrics(tmp_path / "run" / "metrics.jsonl")]
    assert max(abs(loss) for loss in losses) < 1e-3


def test_an_adapter_learns_what_the_teacher_knows(
    tiny_model: Path, write_rows: Rows, tmp_path: Path
) -> None:
    """The teacher is the tiny model after fine-tuning, merged; the student starts before it."""
    from engine.verbs.models.merge import merge

    data = write_rows(8)
    train(config(tiny_model, data, tmp_path / "first"), console=False)
    merge(tiny_model, tmp_path / "first" / "adapter", tmp_path / "teacher")
    run = tmp_path / "run"
    train(config(tiny_model, data, run, teacher=str(tmp_path / "teacher")), console=False)
    losses = [line["loss"] for line in read_metrics(run / "metrics.jsonl")]
    assert losses[-1] < 0.5 * losses[0]


def test_a_teacher_of_another_vocabulary_is_refused(
    tiny_model: Path, write_rows: Rows, tmp_path: Path
) -> None:
    other = tmp_path / "other"
    other.mkdir()
    settings = json.loads((tiny_model / "config.json").read_text())
    for file in tiny_model.iterdir():
        (other / file.name).write_bytes(file.read_bytes())
    (other / "config.json").write_text(json.dumps(settings | {"vocab_size": 96}))
    with pytest.raises(CheckpointError):
        train(
            config(tiny_model, write_rows(4), tmp_path / "run", teacher=str(other)), console=False
        )


def test_settings_that_do_not_go_with_a_teacher_are_refused(tiny_model: Path) -> None:
    with pytest.raises(ConfigError, match="frozen head"):
        TrainConfig(model=str(tiny_model), data=["-"], teacher="x", method="full")
    with pytest.raises(ConfigError, match="memory_budget"):
        TrainConfig(model=str(tiny_model), data=["-"], teacher="x", memory_budget="8GiB")
