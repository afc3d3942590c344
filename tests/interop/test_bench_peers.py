"""What the benchmarks time beside ours computes the same thing, and its steps run."""

import pytest
import torch

from bench import peers
from bench.gpu import step_peers
from bench.gpu.step import StepSpec
from engine.benchmark.cases.case import CaseSizes, Work
from engine.benchmark.cases.shapes import configuration
from engine.benchmark.runner import all_cases

pytestmark = pytest.mark.interop

CPU = torch.device("cpu")


def work_of(op: str) -> Work:
    settings = CaseSizes(16, torch.float32, document=16, optimizer_layers=1)
    cases = all_cases("llama-3.1-8b", settings, configuration("llama-3.1-8b", small=True))
    return next(case for case in cases if case.op == op).make(CPU)


@pytest.mark.parametrize("op", ["nf4_dequantize", "nf4_linear"])
def test_bitsandbytes_gives_our_values(op: str) -> None:
    work = work_of(op)
    theirs = peers.baselines(op, work)["bitsandbytes"]()
    assert isinstance(theirs, torch.Tensor)
    (mine,) = work.ours(work.tensors).values()
    torch.testing.assert_close(theirs, mine, rtol=1e-5, atol=1e-5)


def test_bitsandbytes_steps_its_own_optimiser_over_the_same_shapes() -> None:
    work = work_of("adamw8bit")
    peers.baselines("adamw8bit", work)["bitsandbytes"]()
    assert sum(parameter.numel() for parameter in work.parameters) > 0


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("model", ["llama-3.1-8b", "qwen3-8b"])
def test_the_other_sides_step_runs_and_trains_the_adapters_alone(model: str) -> None:
    spec = StepSpec(model, 2, 8, "full")
    result = step_peers.measure_step(spec, CPU, torch.float32, small=True, steps=1)
    assert result["tokens_per_second"] > 0
    assert all(loss > 0 for loss in result["losses"])
    config = configuration(model, small=True)
    built = step_peers.build(config, "none", CPU, torch.float32)
    trained = [name for name, p in built.named_parameters() if p.requires_grad]
    assert len(trained) == 2 * 7 * config.num_hidden_layers
    assert all("lora_" in name for name in trained)
