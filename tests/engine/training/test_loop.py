"""One step is what it says: adapters move, accumulation is the large batch, clipping clips."""

from collections.abc import Sequence

import pytest
import torch

from engine.data.batches.loader import collate
from engine.data.examples import Example
from engine.runs.metrics import StepMetrics
from engine.runs.signals import Interrupted, StopSignals
from engine.training.loop import (
    NonFiniteError,
    Progress,
    Trainer,
    TrainerHooks,
    TrainerSettings,
)
from engine.training.step import TrainingStep
from models.adapters import adapter_tensors, add_lora
from models.config.model_config import ModelConfig
from models.decoder import Decoder
from models.layers.packed_batch import PackedBatch
from optim import AdamW8bit

LENGTHS = (5, 17, 9, 30)


def build(rank: int = 16, dropout: float = 0.0) -> Decoder:
    torch.manual_seed(0)
    raw = {
        "model_type": "llama",
        "vocab_size": 97,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
    model = Decoder(ModelConfig.from_dict(raw))
    for name, parameter in model.named_parameters():
        torch.nn.init.normal_(parameter, std=0.1)
        if "norm" in name:
            parameter.data.add_(1.0)
    add_lora(model, rank=rank, dropout=dropout)
    return model


def examples() -> list[Example]:
    generator = torch.Generator().manual_seed(1)
    return [
        Example(
            torch.randint(0, 97, (length,), generator=generator).tolist(),
            [index > length // 3 for index in range(length)],
            f"row:{length}",
        )
        for length in LENGTHS
    ]


def optimizer(model: Decoder, lr: float = 1e-3) -> AdamW8bit:
    return AdamW8bit([p for p in model.parameters() if p.requires_grad], lr=lr)


def snapshot(model: Decoder) -> dict[str, torch.Tensor]:
    return {
        f"{path}.{kind}": tensor.clone()
        for path, pair in adapter_tensors(model).items()
        for kind, tensor in zip("AB", pair, strict=True)
    }


def test_every_adapter_tensor_changes_at_step_one() -> None:
    """B moves at the first step; A as well, because AdamW's weight decay and B's start allow it."""
    model = build()
    with torch.no_grad():
        for _, b in adapter_tensors(model).values():
            b.normal_(0, 0.01)
    before = snapshot(model)
    result = TrainingStep(model, optimizer(model), max_grad_norm=1.0)([collate(examples())])
    assert not result.skipped
    after = snapshot(model)
    assert len(after) == 2 * 2 * 7
    for name, tensor in after.items():
        assert not torch.equal(tensor, before[name]), name


def test_a_fresh_adapter_moves_in_b_at_the_first_step_and_in_a_at_the_second() -> None:
    model = build()
    chosen, batch = optimizer(model), collate(examples())
    start = snapshot(model)
    TrainingStep(model, chosen, max_grad_norm=1.0)([batch])
    first = snapshot(model)
    TrainingStep(model, chosen, max_grad_norm=1.0)([batch])
    second = snapshot(model)
    for name in start:
        if name.endswith("B"):
            assert not torch.equal(start[name], first[name]), name
        assert not torch.equal(first[name], second[name]), name


def gradients(batches: Sequence[PackedBatch]) -> dict[str, torch.Tensor]:
    """The gradients that reach the optimizer, caught before they are cleared."""
    model = build()
    with torch.no_grad():
        for _, b in adapter_tensors(model).values():
            b.normal_(0, 0.05, generator=torch.Generator().manual_seed(2))
    caught: dict[str, torch.Tensor] = {}

    class Spy(AdamW8bit):
        def step(self, *_: object, **__: object) -> None:  # type: ignore[override]
            for name, parameter in model.named_parameters():
                if parameter.grad is not None:
                    caught[name] = parameter.grad.clone()

    spy = Spy([p for p in model.parameters() if p.requires_grad])
    TrainingStep(model, spy, max_grad_norm=0.0)(batches)
    return caught


def test_accumulating_four_rows_equals_a_batch_of_four() -> None:
    rows = examples()
    together, apart = gradients([collate(rows)]), gradients([collate([row]) for row in rows])
    assert together.keys() == apart.keys()
    for name, want in together.items():
        assert float((apart[name] - want).norm() / want.norm()) <= 1e-6, name


def test_losing_a_micro_batch_is_noticed() -> None:
    rows = examples()
    together, lost = gradients([collate(rows)]), gradients([collate([row]) for row in rows[:3]])
    name = next(iter(together))
    assert float((lost[name] - together[name]).norm() / together[name].norm()) > 1e-2


def test_clipping_bounds_the_norm_that_reaches_the_optimizer() -> None:
    model = build()
    seen: list[float] = []

    class Spy(AdamW8bit):
        def step(self, *_: object, **named: torch.Tensor) -> None:  # type: ignore[override]
            grads = [p.grad for p in model.parameters() if p.grad is not None]
            scaled = float(named["grad_scale"]) * torch.nn.utils.get_total_norm(grads)
            seen.append(float(scaled))

    spy = Spy([p for p in model.parameters() if p.requires_grad])
    free = TrainingStep(model, spy, max_grad_norm=0.0)([collate(examples())])
    tight = TrainingStep(model, spy, max_grad_norm=1e-3)([collate(examples())])
    assert seen[0] == pytest.approx(free.grad_norm, rel=1e-5)
    assert tight.grad_norm == pytest.approx(free.grad_norm, rel=1e-5)
    assert seen[1] == pytest.approx(1e-3, rel=1e-3)


class Recorder:
    """Collects what a `Trainer` saves and reports."""

    def __init__(self) -> None:
        self.saved: list[int] = []
        self.lines: list[StepMetrics] = []

    def save(self, progress: Progress) -> None:
        self.saved.append(progress.step)


def trainer(
    model: Decoder, recorder: Recorder, signals: StopSignals | None = None, limit: int = 0
) -> Trainer:
    return Trainer(
        TrainingStep(model, optimizer(model), max_grad_norm=1.0),
        lambda step: ([collate(examples())], (step + 1) / 5),
        TrainerSettings(5, 1e-3, "constant", 0, limit, checkpoint_every=2),
        TrainerHooks(recorder.save, recorder.lines.append),
        signals,
    )


def test_checkpoints_come_when_due_and_at_the_end() -> None:
    recorder = Recorder()
    progress = trainer(build(), recorder).run()
    assert recorder.saved == [2, 4, 5]
    assert [line.step for line in recorder.lines] == [1, 2, 3, 4, 5]
    assert progress.tokens == 5 * sum(LENGTHS)
    losses = [line.loss for line in recorder.lines if line.loss is not None]
    assert losses[-1] < losses[0]


def test_a_signal_checkpoints_the_finished_step_and_stops() -> None:
    recorder, signals = Recorder(), StopSignals()
    signals.request(15)
    with pytest.raises(Interrupted) as caught:
        trainer(build(), recorder, signals).run()
    assert caught.value.code == 143
    assert recorder.saved == [1]


def poison(model: Decoder) -> None:
    model.layers[1].input_layernorm.weight.data[3] = float("nan")


def test_a_non_finite_loss_stops_before_any_weight_changes() -> None:
    model, recorder = build(), Recorder()
    poison(model)
    before = snapshot(model)
    with pytest.raises(NonFiniteError, match="nan"):
        trainer(model, recorder).run()
    assert all(torch.equal(tensor, before[name]) for name, tensor in snapshot(model).items())
    assert recorder.saved == [0]


def test_non_finite_steps_are_skipped_and_counted_up_to_the_limit() -> None:
    model, recorder = build(), Recorder()
    poison(model)
    before = snapshot(model)
    with pytest.raises(NonFiniteError):
        trainer(model, recorder, limit=2).run()
    assert [line.skipped for line in recorder.lines] == [1, 2]
    assert all(torch.equal(tensor, before[name]) for name, tensor in snapshot(model).items())


def test_a_step_without_a_trained_token_is_refused() -> None:
    model = build()
    silent = Example([1, 2, 3], [False] * 3, "row:1")
    with pytest.raises(ValueError, match="trained token"):
        TrainingStep(model, optimizer(model), max_grad_norm=1.0)([collate([silent])])


def test_a_loss_scale_changes_nothing_but_the_range_of_the_gradients() -> None:
    results, weights = [], []
    for scale in (1.0, 1024.0):
        model = build()
        chosen = optimizer(model)
        batch = [collate(examples())]
        results.append(TrainingStep(model, chosen, max_grad_norm=0.5)(batch, loss_scale=scale))
        weights.append(snapshot(model))
    assert results[0].loss == pytest.approx(results[1].loss, rel=1e-6)
    assert results[0].grad_norm == pytest.approx(results[1].grad_norm, rel=1e-5)
    for name, tensor in weights[0].items():
        assert torch.allclose(tensor, weights[1][name], atol=1e-6), name


def test_an_overflow_is_done_again_at_half_the_scale() -> None:
    model, recorder = build(), Recorder()
    running = trainer(model, recorder)
    running.progress.loss_scale = 2.0**127  # times a gradient above 2 it leaves float32's range
    before = snapshot(model)
    running.run()
    assert running.progress.loss_scale < 2.0**127
    assert running.progress.skipped == 0
    assert [line.step for line in recorder.lines] == [1, 2, 3, 4, 5]
    assert not all(torch.equal(tensor, before[name]) for name, tensor in snapshot(model).items())
