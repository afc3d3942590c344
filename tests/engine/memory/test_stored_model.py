"""Plans know which weights of a model's files are in codes: planned bytes are those of a step."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from engine.config.train_config import TrainConfig
from engine.memory.estimate import make_batch
from engine.memory.simulate.meter import MemoryMeter, Peak
from engine.memory.simulate.observer import observed, track_model
from engine.memory.simulate.step import simulate_step
from engine.memory.simulate.stored_model import StoredModel, stored_model
from engine.model_sources.interface.model_source import ModelSource
from engine.model_sources.load_model import build_for
from engine.model_sources.open import open_model_source
from engine.training.step import TrainingStep
from engine.training.trainable import make_optimizer, make_trainable, step_settings
from models.layers.packed_batch import PackedBatch
from tests.support.scaled_folders import Encode, eight_bit, four_bit, write_quantised

DENSE = ("layers.1.self_attn.", "layers.0.mlp.down_proj")
"""What the files below leave in 16 bits."""


def dynamic_files(path: Path, encode: Encode) -> ModelSource:
    """A model some of whose weights, in some layers, are left in 16 bits."""

    def dynamic(name: str, tensor: Tensor) -> dict[str, Tensor]:
        return {name: tensor} if any(part in name for part in DENSE) else encode(name, tensor)

    noted = {"quant_method": "bitsandbytes", "load_in_4bit": encode is not eight_bit}
    noted["load_in_8bit"] = encode is eight_bit
    return open_model_source(write_quantised(path, dynamic, noted))


def measured(source: ModelSource, config: TrainConfig, batches: list[PackedBatch]) -> Peak:
    """The highest peak of the second real step."""
    model = build_for(config, source, torch.device("cpu"), torch.float32)
    make_trainable(model, config, None)
    optimizer = make_optimizer(model, config)
    optimizer.state_tensors()
    meter = MemoryMeter()
    track_model(meter, model)
    meter.track("batch", [t for b in batches for t in b.tensors()])
    meter.track("optimiser", optimizer.state_tensors().values())
    step = TrainingStep(model, optimizer, step_settings(config), config.max_grad_norm, seed=1)
    with observed(meter, fresh_scratch=True), meter:
        step(batches)
        meter.segments.clear()
        meter.begin("start")
        step(batches, 1)
    return meter.peak


@pytest.mark.parametrize(
    ("method", "encode"),
    [("qlora", four_bit()), ("lora", four_bit(32, nested=False)), ("qlora", eight_bit)],
)
def test_the_plan_of_stored_codes_is_what_their_step_takes(
    method: str, encode: Encode, tmp_path: Path
) -> None:
    source = dynamic_files(tmp_path / "m", encode)
    model, batches = stored_model(source), [make_batch([40, 24])]
    config = TrainConfig(
        model="m", data="d", device="cpu", method=method, gradient_checkpointing="selective"
    )
    measured(source, config, [make_batch([9])])  # tables that a process makes once
    real = measured(source, config, batches)
    planned, plain = (
        simulate_step(shape, config, batches, gpu=False, dtype=torch.float32).step
        for shape in (model, source.config)
    )
    assert planned.bytes == pytest.approx(real.bytes, rel=0.001)
    for owner, size in real.owners.items():
        assert abs(planned.owners[owner] - size) <= 0.01 * real.bytes, owner
    as_stored = method == "qlora" and encode is not eight_bit
    assert (plain.bytes < real.bytes) is as_stored  # all in 4 bits


def test_layers_that_differ_are_told_from_layers_that_do_not(tmp_path: Path) -> None:
    uneven = stored_model(dynamic_files(tmp_path / "some", four_bit()))
    noted = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    even = stored_model(open_model_source(write_quantised(tmp_path / "m", four_bit(), noted)))
    assert isinstance(uneven, StoredModel)
    assert isinstance(even, StoredModel)
    assert (uneven.is_even, even.is_even) == (False, True)
