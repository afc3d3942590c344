"""The next step's batches are made and sent while a step runs, and change nothing.

There is no GPU here: a stand-in for its side stream notes what is sent, when, and what is waited
for, and keeps the copies from being read before that.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from engine.data.batches.loader import collate
from engine.data.examples import Example
from engine.errors import EngineError
from engine.runs.metrics import StepMetrics
from engine.runs.signals import Interrupted, StopSignals
from engine.selfcheck.machine import check_uploads
from engine.selfcheck.options import CheckOptions
from engine.training.loop import NonFiniteError, Progress, Trainer, TrainerHooks, TrainerSettings
from engine.training.step import TrainingStep
from kernels.runtime.device import upload
from models.adapters import add_lora
from models.config.model_config import ModelConfig
from models.decoder import Decoder
from models.layers.packed_batch import PackedBatch
from optim import AdamW8bit

STEPS, MICRO_BATCHES = 4, 2


class StandIn:
    """Uploads to a GPU that is the CPU; a copy is zero until it is waited for."""

    def __init__(self, events: list[str]) -> None:
        self.events = events

    def start(self, source: torch.Tensor) -> tuple[torch.Tensor, Any]:
        self.events.append("send")
        return torch.zeros_like(source), source.clone()

    def wait(self, target: torch.Tensor, event: torch.Tensor) -> torch.Tensor:
        self.events.append("wait for copy")
        return target.copy_(event)


def build() -> Decoder:
    torch.manual_seed(0)
    raw = {
        "model_type": "llama",
        "vocab_size": 97,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
    }
    model = Decoder(ModelConfig.from_dict(raw))
    for name, parameter in model.named_parameters():
        torch.nn.init.normal_(parameter, std=0.1)
        if "norm" in name:
            parameter.data.add_(1.0)
    add_lora(model, rank=4)
    return model


def batches_of_step(step: int) -> list[PackedBatch]:
    """Other documents in every step and micro-batch."""
    generator = torch.Generator().manual_seed(step)

    def example(length: int) -> Example:
        ids = torch.randint(0, 97, (length,), generator=generator).tolist()
        return Example(ids, [index > 1 for index in range(length)], "row:1")

    return [collate([example(5 + step), example(9 + 2 * micro)]) for micro in range(MICRO_BATCHES)]


class Run:
    """A small run that notes everything it does, with batches ahead or without."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, ahead: bool, limit: int = 0) -> None:
        self.events: list[str] = []
        self.lines: list[StepMetrics] = []
        self.saved: list[int] = []
        self.made: list[int] = []
        self.fails_at: int | None = None
        self.signals = StopSignals()
        self.model = build()
        trained = [p for p in self.model.parameters() if p.requires_grad]
        with monkeypatch.context() as patch:
            if ahead:
                name = "engine.training.batches_ahead"
                patch.setattr(f"{name}.has_streams", lambda device: True)
                patch.setattr(f"{name}.SideUploads", lambda device: StandIn(self.events))
            self.trainer = Trainer(
                TrainingStep(self.model, AdamW8bit(trained, lr=1e-3), max_grad_norm=1.0),
                self.batches,
                TrainerSettings(STEPS, 1e-3, "constant", 0, limit),
                TrainerHooks(self.save, self.report),
                self.signals,
            )

    def batches(self, step: int) -> tuple[list[PackedBatch], float]:
        self.events.append(f"make {step}")
        self.made.append(step)
        if step == self.fails_at:
            raise EngineError(f"step {step} cannot be made")
        return batches_of_step(step), (step + 1) / STEPS

    def save(self, progress: Progress) -> None:
        self.saved.append(progress.step)

    def report(self, line: StepMetrics) -> None:
        self.events.append(f"done {line.step}")
        self.lines.append(line)

    def weights(self) -> list[torch.Tensor]:
        return [p.detach().clone() for p in self.model.parameters() if p.requires_grad]

    def losses(self) -> list[tuple[float | None, float, float | None]]:
        return [(line.loss, line.epoch, line.grad_norm) for line in self.lines]


@pytest.mark.parametrize("scale", [1.0, 2.0**127])
def test_bits_are_the_same_with_batches_ahead(
    scale: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the larger scale the first step overflows and is done again, with its own batches."""
    plain, ahead = Run(monkeypatch, ahead=False), Run(monkeypatch, ahead=True)
    for run in (plain, ahead):
        run.trainer.progress.loss_scale = scale
        run.trainer.run()
    assert plain.losses() == ahead.losses()
    assert all(map(torch.equal, plain.weights(), ahead.weights()))
    assert plain.made == ahead.made == list(range(STEPS))
    assert ahead.events.count("send") == STEPS * MICRO_BATCHES


def test_the_next_step_is_sent_after_the_work_and_before_the_wait(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run = Run(monkeypatch, ahead=True)
    update = run.trainer.step.optimizer.step
    plain = torch.Tensor.tolist

    def noted(*args: Any, **named: Any) -> Any:
        run.events.append("update")
        return update(*args, **named)

    def waiting(tensor: torch.Tensor) -> Any:
        if tensor.dtype == torch.float64 and tensor.numel() == 2:
            run.events.append("wait for loss")
        return plain(tensor)

    monkeypatch.setattr(run.trainer.step.optimizer, "step", noted)
    monkeypatch.setattr(torch.Tensor, "tolist", waiting)
    run.trainer.run()
    sent, arrived = ["send"] * MICRO_BATCHES, ["wait for copy"] * MICRO_BATCHES
    want = ["make 0", *sent]
    for step in range(STEPS):
        following = [f"make {step + 1}", *sent] if step + 1 < STEPS else []
        want += [*arrived, "update", *following, "wait for loss", f"done {step + 1}"]
    assert run.events == want


def test_an_error_in_making_batches_comes_at_its_own_step(monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run(monkeypatch, ahead=True)
    run.fails_at = 2
    with pytest.raises(EngineError, match="step 2 cannot be made"):
        run.trainer.run()
    assert run.trainer.progress.step == 2
    assert [line.step for line in run.lines] == [1, 2]


def test_a_stopped_run_goes_on_with_the_bits_of_one_that_was_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    whole, stopped = Run(monkeypatch, ahead=True), Run(monkeypatch, ahead=True)
    whole.trainer.run()
    stopped.signals.request(15)
    with pytest.raises(Interrupted):
        stopped.trainer.run()
    assert (stopped.saved, stopped.made) == ([1], [0, 1])
    again = Run(monkeypatch, ahead=True)
    again.trainer.step, again.trainer.progress = stopped.trainer.step, stopped.trainer.progress
    again.trainer.run()
    assert again.made == [1, 2, 3]
    assert stopped.losses() + again.losses() == whole.losses()
    assert all(map(torch.equal, stopped.weights(), whole.weights()))


def test_a_skipped_step_is_followed_by_the_next_ones_batches(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run = Run(monkeypatch, ahead=True, limit=2)
    run.model.layers[0].input_layernorm.weight.data[3] = float("nan")
    with pytest.raises(NonFiniteError, match="Step 3"):
        run.trainer.run()
    assert run.made == [0, 1, 2, 3]
    assert [line.skipped for line in run.lines] == [1, 2]


def test_another_step_than_the_one_ahead_gets_its_own_batches(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run = Run(monkeypatch, ahead=True)
    ahead = run.trainer._batches
    ahead.start(1)
    taken, want = ahead.take(3), batches_of_step(3)
    for batch, truth in zip(taken.device, want, strict=True):
        assert all(map(torch.equal, batch.tensors(), truth.tensors()))
        assert batch.bounds == truth.bounds
    ahead.start(STEPS)
    assert run.made == [1, 3]


def test_on_a_cpu_nothing_is_made_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run(monkeypatch, ahead=False)
    run.trainer.run()
    want = [event for step in range(STEPS) for event in (f"make {step}", f"done {step + 1}")]
    assert run.events == want


@pytest.mark.parametrize("with_ids", [True, False])
def test_a_batch_is_sent_in_one_copy(with_ids: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The parts are views of one buffer, each at a multiple of 128 bytes."""
    sent: list[torch.Tensor] = []

    def counted(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
        sent.append(upload(tensor, torch.device("cpu")).clone())
        return sent[-1]

    name = "models.layers.packed_batch"
    monkeypatch.setattr(f"{name}.has_streams", lambda device: True)
    monkeypatch.setattr(f"{name}.upload", counted)
    batch, gpu = batches_of_step(3)[1], torch.device("cuda")
    there = batch.to(gpu, gpu if with_ids else torch.device("cpu"))
    assert len(sent) == 1
    assert there.bounds == batch.bounds
    for ours, truth in zip(there.tensors(), batch.tensors(), strict=True):
        assert ours.dtype == truth.dtype
        assert torch.equal(ours, truth)
    parts = there.tensors() if with_ids else there.tensors()[1:]
    for part in parts:
        assert part.untyped_storage().data_ptr() == sent[0].data_ptr()
        assert (part.data_ptr() - sent[0].data_ptr()) % 128 == 0
    if with_ids:
        assert sent[0].nbytes == batch.joined_bytes()
    else:
        assert there.input_ids is batch.input_ids


@pytest.mark.parametrize("early", [False, True])
def test_the_self_check_sees_a_batch_that_is_read_too_early(
    early: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Early(StandIn):
        def wait(self, target: torch.Tensor, event: torch.Tensor) -> torch.Tensor:
            return target

    kind = Early if early else StandIn
    monkeypatch.setattr("engine.selfcheck.machine.SideUploads", lambda device: kind([]))
    finding = check_uploads(CheckOptions(torch.device("cpu"), (torch.float32,), True))
    assert finding["passed"] is not early
