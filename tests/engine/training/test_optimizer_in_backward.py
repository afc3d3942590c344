"""Full fine-tuning that updates in backward: the same bits, less memory, and what it refuses."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from cli import main as cli
from engine.config.train_config import TrainConfig
from engine.errors import ConfigError, MemoryPlanError
from engine.memory.estimate import MemoryPlan, plan
from engine.memory.model_shapes import preset_config
from engine.memory.options import apply_options, memory_options
from engine.memory.search import changed, choose, smallest
from engine.memory.simulate.meter import MemoryMeter
from engine.memory.simulate.observer import observed, track_model
from engine.runs.metrics import read_metrics
from engine.training.checks import check_run
from engine.training.loop import NonFiniteError, Progress, Trainer, TrainerHooks, TrainerSettings
from engine.training.step import TrainingStep
from engine.training.trainable import make_in_backward
from engine.verbs.training.train import train
from kernels.runtime.scratch import release
from models.config.model_config import ModelConfig
from models.decoder import Decoder
from models.layers.context import StepSettings
from models.layers.packed_batch import PackedBatch
from optim import AdamW8bit

Rows = Callable[..., Path]
SHAPE: dict[str, Any] = {
    "model_type": "qwen3",
    "vocab_size": 97,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
}


def settings(**changes: Any) -> TrainConfig:
    given = {"method": "full", "max_grad_norm": 0, "optimizer_in_backward": True} | changes
    return TrainConfig(model="m", data="d", device="cpu", **given)


def build(raw: dict[str, Any], dtype: torch.dtype = torch.float32) -> Decoder:
    """A random model that trains all of itself."""
    model = Decoder(ModelConfig.from_dict(raw)).to(dtype)
    draw = torch.Generator().manual_seed(3)
    for name, parameter in model.named_parameters():
        value = torch.randn(parameter.shape, generator=draw) * 0.1
        parameter.data.copy_(value + 1.0 if "norm" in name else value)
        parameter.requires_grad_(True)
    return model


def batch(step: int, vocab: int = 97) -> PackedBatch:
    draw = torch.Generator().manual_seed(step)
    ids = torch.randint(0, vocab, (46,), generator=draw)
    return PackedBatch.of(ids, ids, torch.tensor([0, 9, 32, 46]))


def optimizer_of(model: Decoder, **options: Any) -> AdamW8bit:
    named = list(model.named_parameters())
    groups = [
        {"params": [p for n, p in named if ("norm" in n) is exempt], "weight_decay": decay}
        for exempt, decay in ((False, 0.1), (True, 0.0))
    ]
    return AdamW8bit(groups, lr=1e-2, **options)


def compare(raw: dict[str, Any], dtype: torch.dtype, policy: str, **options: Any) -> None:
    """Three steps at once and in backward: results, weights and state must have the same bits."""
    outcomes = []
    for in_backward in (False, True):
        model = build(raw, dtype)
        optimizer = optimizer_of(model, **options)
        steps = make_in_backward(model, optimizer, settings(optimizer_in_backward=in_backward))
        assert (steps is not None) is in_backward
        start = {name: p.detach().clone() for name, p in model.named_parameters()}
        results = []
        step_settings = StepSettings(checkpointing=policy)
        run = TrainingStep(model, optimizer, step_settings, in_backward=steps)
        for step in range(3):
            results.append(run([batch(step, raw["vocab_size"])], step))
            if step == 0:
                moved = {n for n, p in model.named_parameters() if not torch.equal(p, start[n])}
                assert moved == set(start)
        assert all(parameter.grad is None for parameter in model.parameters())
        state = {name: tensor.clone() for name, tensor in optimizer.state_tensors().items()}
        outcomes.append((results, dict(model.named_parameters()), state))
    (results, weights, state), (theirs, others, their_state) = outcomes
    assert results == theirs
    assert not any(result.skipped for result in results)
    for name, tensor in weights.items():
        assert torch.equal(tensor, others[name]), name
    for name, value in state.items():
        assert torch.equal(value, their_state[name]), name


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("policy", ["none", "full"])
@pytest.mark.parametrize(
    ("dtype", "options"),
    [
        (torch.float32, {}),
        (torch.bfloat16, {"low_precision": "stochastic", "seed": 7}),
        (torch.bfloat16, {}),
    ],
)
def test_weights_and_state_are_those_of_an_update_at_once(
    dtype: torch.dtype, options: dict[str, Any], policy: str, tied: bool
) -> None:
    compare(SHAPE | {"tie_word_embeddings": tied}, dtype, policy, **options)


@pytest.mark.parametrize("family", ["qwen2_moe", "qwen3_moe", "qwen3_next", "smollm3"])
def test_other_graphs_come_out_the_same(family: str, golden: Callable[[str], Path]) -> None:
    raw = json.loads((golden(family) / "config.json").read_text())
    routed = {"output_router_logits": True} if "moe" in family else {}
    compare(raw | routed, torch.float32, "selective")


class GradientMeter(MemoryMeter):
    """Notes the most bytes of gradients as well."""

    gradients = 0

    def mark(self) -> None:
        super().mark()
        self.gradients = max(self.gradients, self.live["gradients"])


def metered(in_backward: bool) -> GradientMeter:
    model = build(SHAPE | {"tie_word_embeddings": False, "num_hidden_layers": 12})
    optimizer = optimizer_of(model)
    optimizer.state_tensors()
    steps = make_in_backward(model, optimizer, settings(optimizer_in_backward=in_backward))
    meter = GradientMeter()
    track_model(meter, model)
    with observed(meter, fresh_scratch=True), meter:
        step_settings = StepSettings(checkpointing="full")
        TrainingStep(model, optimizer, step_settings, in_backward=steps)([batch(0)])
    return meter


def test_gradients_take_the_bytes_of_one_layer() -> None:
    model = build(SHAPE | {"tie_word_embeddings": False, "num_hidden_layers": 12})
    everything = 4 * sum(p.numel() for p in model.parameters())
    layer = 4 * sum(p.numel() for p in model.layers[0].parameters())
    plain, fused = metered(False), metered(True)
    assert plain.gradients == everything
    assert fused.gradients == layer
    assert fused.peak.bytes <= plain.peak.bytes - 10 * layer


@pytest.mark.parametrize("gpu", [False, True])
def test_the_plan_has_the_gradients_of_one_layer(gpu: bool) -> None:
    shape = preset_config("smollm2-135m")
    assert shape is not None
    config = settings(batch_size=1, max_length=64, gradient_checkpointing="full")
    dtype = torch.bfloat16 if gpu else torch.float32
    fused = plan(shape, config, gpu=gpu, dtype=dtype)
    plain = plan(shape, changed(config, optimizer_in_backward=False), gpu=gpu, dtype=dtype)
    layers = plain.step.owners["dense base"]
    assert plain.step.owners["gradients"] >= layers
    assert fused.step.owners["gradients"] <= layers / shape.num_hidden_layers * 1.01
    assert fused.step.bytes < plain.step.bytes
    # A GPU has a small table for each layer.
    assert plain.save.bytes <= fused.save.bytes <= plain.save.bytes + 2**20 * gpu


def test_a_loss_that_is_not_finite_changes_nothing() -> None:
    model = build(SHAPE)
    model.layers[1].input_layernorm.weight.data[3] = float("nan")
    optimizer = optimizer_of(model)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    saved: list[int] = []
    with pytest.raises(NonFiniteError, match="no weight was changed"):
        running(model, optimizer, saved).run()
    assert saved == [0]
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]) or name.startswith("model.layers.1.input"), name
    state = optimizer.state_tensors()
    assert int(state["steps"].sum()) == 0
    assert optimizer.skipped_steps == 1
    assert not state["exp_avg.absmax"].any()


def running(model: Decoder, optimizer: AdamW8bit, saved: list[int]) -> Trainer:
    def save(progress: Progress) -> None:
        saved.append(progress.step)

    return Trainer(
        TrainingStep(model, optimizer, in_backward=make_in_backward(model, optimizer, settings())),
        lambda step: ([batch(step)], 0.0),
        TrainerSettings(3, 1e-3, "constant", 0),
        TrainerHooks(save, lambda line: None),
    )


def test_a_gradient_that_is_not_finite_is_said_and_its_state_not_saved() -> None:
    model = build(SHAPE)
    spoilt = model.get_parameter("model.layers.1.mlp.down_proj.weight")
    spoilt.register_hook(lambda gradient: gradient / 0)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    saved: list[int] = []
    with pytest.raises(NonFiniteError, match="a part of the weights had moved"):
        running(model, optimizer_of(model), saved).run()
    assert saved == []
    still = {n for n, p in model.named_parameters() if torch.equal(p, before[n])}
    assert still == {name for name in before if name.startswith("model.layers.1.")}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_grad_norm": 1.0}, r"--max-grad-norm 0 --accumulate 1"),
        ({"accumulate": 2}, r"max_grad_norm 0 and accumulate 2"),
        ({"method": "lora"}, "adapter's gradients are too small"),
        ({"method": "qlora"}, "--method full"),
        ({"dtype": "float16"}, "loss scale"),
    ],
)
def test_what_it_cannot_do_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        settings(**changes)


def test_a_device_that_computes_in_float16_is_refused() -> None:
    with pytest.raises(ConfigError, match="loss scale"):
        check_run(settings(), None, torch.device("cuda"), torch.float16)
    check_run(settings(), None, torch.device("cuda"), torch.bfloat16)
    check_run(settings(optimizer_in_backward=False), None, torch.device("cuda"), torch.float16)


@pytest.mark.parametrize("options", [{"max_grad_norm": 1.0}, {"loss_scale": 2.0}])
def test_the_loop_refuses_it_too(options: dict[str, float]) -> None:
    model = build(SHAPE)
    optimizer = optimizer_of(model)
    steps = make_in_backward(model, optimizer, settings())
    step = TrainingStep(
        model, optimizer, max_grad_norm=options.get("max_grad_norm", 0.0), in_backward=steps
    )
    with pytest.raises(ValueError, match="unclipped"):
        step([batch(0)], loss_scale=options.get("loss_scale", 1.0))


def run_config(model: Path, data: Path, output: Path, **changes: Any) -> TrainConfig:
    given = {
        "method": "full",
        "max_grad_norm": 0,
        "max_steps": 4,
        "batch_size": 2,
        "max_length": 64,
        "learning_rate": 1e-3,
        "checkpoint_every": 2,
    } | changes
    return TrainConfig(
        model=str(model), data=str(data), output_dir=output, device="cpu", plot=False, **given
    )


@pytest.mark.parametrize("first", [False, True])
def test_a_run_goes_on_either_way_to_the_same_bytes(
    first: bool,
    tiny_model: Path,
    write_rows: Rows,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    data = write_rows(9)
    whole = run_config(tiny_model, data, tmp_path / "whole", optimizer_in_backward=not first)
    train(whole, console=False)
    parts = run_config(tiny_model, data, tmp_path / "parts", optimizer_in_backward=first)
    loss, calls = Decoder.batch_loss, []

    def failing(model: Decoder, *args: Any, **options: Any) -> Any:
        calls.append(1)
        if len(calls) == 4:
            raise RuntimeError("the power fails in the fourth step")
        return loss(model, *args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(Decoder, "batch_loss", failing)
        with pytest.raises(RuntimeError, match="power"):
            train(parts, console=False)
    train(changed(parts, resume="auto", optimizer_in_backward=not first), console=False)
    files = [tmp_path / run / "model" / "model.safetensors" for run in ("whole", "parts")]
    assert files[0].read_bytes() == files[1].read_bytes()
    lines = [read_metrics(tmp_path / run / "metrics.jsonl") for run in ("whole", "parts")]
    for key in ("step", "loss", "grad_norm"):
        assert [line[key] for line in lines[0]] == [line[key] for line in lines[1]]


def test_from_the_command_line_to_a_model(
    tiny_model: Path, write_rows: Rows, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    release()
    words = ["train", "--model", str(tiny_model), "--data", str(write_rows(9))]
    words += ["--method", "full", "--max-grad-norm", "0", "--max-steps", "3", "--device", "cpu"]
    words += ["--batch-size", "2", "--max-length", "64", "--no-plot", "--log-level", "ERROR"]
    fused = [*words, "--optimizer-in-backward", "--memory-budget", "8GiB"]
    assert cli.main([*fused, "--output-dir", str(tmp_path / "a")]) == 0
    assert cli.main([*words, "--output-dir", str(tmp_path / "b")]) == 0
    files = [tmp_path / run / "model" / "model.safetensors" for run in ("a", "b")]
    assert files[0].read_bytes() == files[1].read_bytes()
    metrics = json.loads((tmp_path / "a" / "summary.json").read_text())["metrics"]
    assert metrics["planned_peak_bytes"] == pytest.approx(metrics["measured_peak_bytes"], rel=0.02)


def test_the_command_line_says_what_to_give(
    tiny_model: Path, write_rows: Rows, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["train", "--model", str(tiny_model), "--data", str(write_rows(3))]
    assert cli.main([*words, "--method", "full", "--optimizer-in-backward"]) == 2
    error = capsys.readouterr().err
    assert "--max-grad-norm 0 --accumulate 1" in error
    assert error.count("\n") == 1


@cache
def planned(text: str) -> MemoryPlan:
    shape = preset_config("smollm2-135m")
    assert shape is not None
    config = TrainConfig.model_validate_json(text)
    return plan(shape, config, gpu=True, dtype=torch.bfloat16)


def planner(config: TrainConfig) -> MemoryPlan:
    """Plans are made once for all tests here."""
    return planned(config.model_dump_json())


def test_it_is_a_memory_option_where_it_learns_the_same() -> None:
    def offered(config: TrainConfig) -> bool:
        options = memory_options(config, True, True)
        return any(option.setting == "optimizer_in_backward" for option in options)

    asked = settings(optimizer_in_backward=False)
    assert offered(asked)
    assert not offered(settings())
    assert not offered(changed(asked, max_grad_norm=1.0))
    assert not offered(changed(asked, accumulate=4))
    assert not offered(changed(asked, dtype="float16"))
    assert not offered(changed(asked, method="lora"))
    assert apply_options(asked, memory_options(asked, True, True)).optimizer_in_backward
    halved = changed(asked, batch_size=2, accumulate=2)
    assert not apply_options(halved, memory_options(asked, True, True)).optimizer_in_backward


def test_a_search_pulls_it_before_it_recomputes() -> None:
    # Rows so short that the gradients decide the peak.
    asked = settings(
        optimizer_in_backward=False,
        batch_size=2,
        max_length=128,
        gradient_checkpointing="none",
    )
    budget = planner(settings(batch_size=2, max_length=128, gradient_checkpointing="none")).total
    assert budget < planner(asked).total
    choice = choose(asked, budget, planner)
    assert choice.plan.total <= budget
    assert choice.changes == {"optimizer_in_backward": (False, True)}


@pytest.mark.parametrize("given", [False, True])
def test_the_least_settings_are_those_that_need_the_least(given: bool) -> None:
    asked = settings(optimizer_in_backward=given, batch_size=2, max_length=128)
    least = smallest(asked, planner)
    assert least.optimizer_in_backward and (least.batch_size, least.accumulate) == (2, 1)
    # With long rows two passes of one row each need less than one of both.
    least = smallest(changed(asked, max_length=131072), planner)
    assert not least.optimizer_in_backward and (least.batch_size, least.accumulate) == (1, 2)


def test_a_run_that_clips_is_told_that_it_would_fit_without() -> None:
    asked = settings(optimizer_in_backward=False, max_grad_norm=1.0, batch_size=2, max_length=128)
    alone = {"optimizer_in_backward": True, "max_grad_norm": 0.0, "batch_size": 1}
    short = changed(smallest(asked, planner), max_length=64)
    budget = planner(changed(short, accumulate=1, **alone)).total
    assert budget < planner(short).total
    with pytest.raises(MemoryPlanError) as refused:
        choose(asked, budget, planner)
    way = "--optimizer-in-backward --max-grad-norm 0 --accumulate 1 --batch-size 1 (fits)"
    assert way in str(refused.value)
    assert "qv" not in str(refused.value)
