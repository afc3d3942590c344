"""--deterministic: torch's mode inside the block, refusals by name, part of a run's trajectory."""

import os
from dataclasses import replace
from typing import Any

import pytest
import torch

from engine.config.tasks.inference import EvalSettings, GenerateSettings
from engine.config.train_config import TrainConfig
from engine.errors import ConfigError
from engine.memory.estimate import plan
from engine.memory.model_shapes import preset_config
from engine.training.determinism import deterministic
from kernels.attention import AttentionPlan, AttentionSettings, backends, choice, table

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def test_the_mode_is_on_inside_the_block_only() -> None:
    with deterministic(CPU):
        assert torch.are_deterministic_algorithms_enabled()
    assert not torch.are_deterministic_algorithms_enabled()
    with deterministic(CPU, wanted=False):
        assert not torch.are_deterministic_algorithms_enabled()


def test_the_variable_of_cublas_is_set_for_a_gpu_and_a_wrong_one_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":0:0")
    with pytest.raises(ConfigError, match="unset CUBLAS_WORKSPACE_CONFIG"), deterministic(CUDA):
        pass
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG")
    with deterministic(CUDA):
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    with deterministic(CPU):
        pass


def test_an_op_without_a_deterministic_form_is_refused_by_name() -> None:
    # What torch's `alertNotDeterministic` says; other errors pass as they are.
    text = (
        "cumsum_cuda_kernel does not have a deterministic implementation, but you set "
        "'torch.use_deterministic_algorithms(True)'."
    )
    with (
        pytest.raises(ConfigError, match=r"cumsum_cuda_kernel.*Leave out --deterministic"),
        deterministic(CPU),
    ):
        raise RuntimeError(text)
    with pytest.raises(RuntimeError, match="something else"), deterministic(CPU):
        raise RuntimeError("something else")


def test_it_is_a_setting_of_training_evaluation_and_generation_and_decides_the_weights() -> None:
    assert TrainConfig(model="m", data="d", deterministic=True).trajectory()["deterministic"]
    assert not TrainConfig(model="m", data="d").deterministic
    assert EvalSettings(model="m", data=("d",), deterministic=True).deterministic
    assert GenerateSettings(model="m", prompt="p", deterministic=True).deterministic


def test_only_back_ends_that_repeat_their_bits_are_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    tried = []

    def trial(name: str, kind: Any) -> str:
        assert kind.repeats
        tried.append(name)
        return "ok"

    monkeypatch.setattr(choice, "trial", trial)
    monkeypatch.setattr(choice, "_torch_prefers_cudnn", lambda kind: True)
    plan = AttentionPlan.from_cu_seqlens(torch.tensor([0, 128, 256], dtype=torch.int32), 256)
    settings = AttentionSettings(plan, None, 0.1)
    q = torch.zeros(256, 4, 64, dtype=torch.bfloat16)
    with deterministic(CPU):
        assert choice.select(q, q, settings).repeats
        assert "cudnn" not in tried
        monkeypatch.setenv("ENGINE_ATTENTION", "cudnn")
        with pytest.raises(ValueError, match="does not repeat its bits"):
            choice.select(q, q, settings)


def test_a_back_end_whose_gradient_changes_from_call_to_call_fails_its_trial(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    right, calls = table.BACKENDS["documents"], []

    def drifts(*arguments: Any) -> Any:
        calls.append(1)
        dq, dk, dv = right.backward(*arguments)
        return dq + 1e-6 * len(calls), dk, dv

    drifting = backends.Backend("flash", right.forward, drifts, right.suits, repeats=True)
    monkeypatch.setitem(table.BACKENDS, "flash", drifting)
    kind = choice.TrialKind(CPU, torch.float32, 4, 2, 24, windowed=False)
    assert choice.trial("flash", kind) == "ok"
    exact = choice.TrialKind(CPU, torch.float32, 4, 2, 24, windowed=False, repeats=True)
    assert "does not repeat" in choice.trial("flash", exact)


def test_a_checkpoint_from_before_the_setting_resumes_without_it_alone() -> None:
    config = TrainConfig(model="m", data="d")
    saved = config.trajectory()
    del saved["deterministic"]
    assert config.other_trajectory(saved, names=True) == {}
    exact = TrainConfig(model="m", data="d", deterministic=True)
    assert exact.other_trajectory(saved, names=True) == {"deterministic": (False, True)}


def test_a_plan_counts_the_buffers_of_attention_that_repeats_its_bits() -> None:
    model = preset_config("qwen3-0.6b")
    assert model is not None
    model = replace(model, vocab_size=1024)  # attention, not the loss, is the peak
    settings: dict[str, Any] = {"model": "m", "data": "d", "batch_size": 1, "max_length": 2048}
    plain, repeats = (
        plan(
            model,
            TrainConfig(**settings, deterministic=given, gradient_checkpointing="full"),
            gpu=True,
            dtype=torch.bfloat16,
        ).step.bytes
        for given in (False, True)
    )
    # 16 heads of 128 on 108 multiprocessors: seven buffers where one was enough.
    assert 0 <= repeats - plain <= 6 * (2048 + 128) * 16 * 128 * 4
    assert repeats > plain
