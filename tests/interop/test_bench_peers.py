"""What the benchmarks time beside ours computes the same thing, and its steps run."""

import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from bench import peers
from bench.gpu import step_peers, step_unsloth
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


class StandIn:
    """What unsloth's `FastLanguageModel` does, by transformers and PEFT alone."""

    asked: dict[str, Any]

    @classmethod
    def from_pretrained(
        cls, model_name: str, max_seq_length: int, dtype: torch.dtype, load_in_4bit: bool
    ) -> tuple[Any, Any]:
        assert load_in_4bit and max_seq_length == 8
        model = AutoModelForCausalLM.from_pretrained(model_name, dtype=dtype)
        return model, AutoTokenizer.from_pretrained(model_name)

    @classmethod
    def get_peft_model(cls, model: Any, **asked: Any) -> Any:
        cls.asked = asked
        names = ("r", "lora_alpha", "lora_dropout", "bias", "target_modules")
        return get_peft_model(model, LoraConfig(**{name: asked[name] for name in names}))

    @staticmethod
    def for_training(model: Any) -> Any:
        return model.train()


@pytest.mark.filterwarnings("ignore")
def test_unsloth_is_given_a_checkpoint_that_it_can_read(monkeypatch: pytest.MonkeyPatch) -> None:
    module = ModuleType("unsloth")
    module.FastLanguageModel = StandIn  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "unsloth", module)
    spec = StepSpec("llama-3.1-8b", 2, 8, "full")
    result = step_unsloth.measure_step(spec, CPU, torch.float32, small=True, steps=1)
    assert result["tokens_per_second"] > 0
    assert all(loss > 0 for loss in result["losses"])
    assert StandIn.asked["use_gradient_checkpointing"] == "unsloth"


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("model", ["llama-3.1-8b", "qwen3-0.6b"])
def test_the_written_checkpoint_is_the_model(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, made = configuration(model, small=True), []

    def quantised(*given: Any) -> Any:
        made.append(step_peers.quantised(*given))
        return made[0]

    monkeypatch.setattr(step_unsloth, "quantised", quantised)
    step_unsloth.write_checkpoint(tmp_path, config, CPU, torch.float32)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    ids = torch.arange(12).view(2, 6)
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids).logits, made[0].eval()(ids).logits)
    assert loaded.is_loaded_in_4bit
