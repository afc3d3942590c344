"""Out of memory on the device: one paragraph with what was planned, taken, and what would fit."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.config.train_config import TrainConfig
from engine.errors import MemoryPlanError, gib
from engine.memory.estimate import Workload, cublas_workspace, plan
from engine.memory.model_shapes import preset_config
from engine.memory.out_of_memory import DeviceUse, explain, explained
from models.config.model_config import ModelConfig

GIB, MIB = 2**30, 2**20
CUDA, CPU = torch.device("cuda"), torch.device("cpu")
SAID = (
    "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 8.00 GiB of "
    "which 1.00 GiB is free."
)


def shape(name: str = "qwen3-0.6b") -> ModelConfig:
    config = preset_config(name)
    assert config is not None
    return config


def settings(**changes: Any) -> TrainConfig:
    given = {"gradient_checkpointing": "none", "batch_size": 8, "max_length": 2048} | changes
    return TrainConfig(model="m", data="d", **given)


def told(config: TrainConfig, use: DeviceUse, model: str = "qwen3-0.6b") -> str:
    work = Workload(((config.max_length,) * config.batch_size,))
    return str(explain(SAID, shape(model), config, CUDA, torch.bfloat16, work, use))


def test_it_says_what_was_planned_what_was_taken_and_what_fits() -> None:
    config = settings()
    use = DeviceUse(8 * GIB, 1 * GIB, 5 * GIB, 6 * GIB)
    text = told(config, use)
    planned = plan(shape(), config, gpu=True, dtype=torch.bfloat16).total
    assert planned > use.available
    assert "Tried to allocate 2.00 GiB)" in text
    assert f"Planned were {planned / GIB:.2f} GiB for the largest step, 16384 tokens" in text
    assert "Of 8.00 GiB this run's tensors took up to 5.00 GiB" in text
    assert f"its allocator holds 6.00 GiB and other programs {gib(544 * MIB)}" in text
    flags = text.partition("Settings that are planned with ")[2].partition(". A resumed")[0]
    size, _, words = flags.partition(": ")
    assert float(size.removesuffix(" GiB")) * GIB <= use.available
    # The proposal is real: the settings it names are planned within what is there.
    given = [part.partition(" ") for part in parts(words)]
    changes = {name[2:].replace("-", "_"): value or "true" for name, _, value in given}
    other = TrainConfig(**({"model": "m", "data": "d", "gradient_checkpointing": "none"} | changes))
    assert plan(shape(), other, gpu=True, dtype=torch.bfloat16).total <= use.available


def parts(words: str) -> list[str]:
    return [f"--{part.strip()}" for part in words.split("--") if part.strip()]


def test_a_plan_that_did_not_hold_is_answered_with_a_smaller_one() -> None:
    config = settings(batch_size=1, max_length=512)
    use = DeviceUse(80 * GIB, 70 * GIB, 3 * GIB, 4 * GIB)
    text = told(config, use)
    planned = plan(shape(), config, gpu=True, dtype=torch.bfloat16).total
    size = text.partition("Settings that are planned with ")[2].partition(" GiB")[0]
    assert float(size) * GIB < planned


def test_where_nothing_fits_the_ways_out_are_named() -> None:
    text = told(settings(), DeviceUse(GIB, 100 * MIB, 400 * MIB, 450 * MIB), "llama-3.1-8b")
    assert "No settings fit" in text
    assert "Ways out:" in text


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError(SAID),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to ..."),
        MemoryError("too large"),
    ],
)
def test_every_kind_of_it_is_explained(error: Exception) -> None:
    work = Workload(((64,),))
    with (
        pytest.raises(MemoryPlanError, match="ran out of memory"),
        explained(shape(), settings(batch_size=1, max_length=64), CPU, torch.float32, work),
    ):
        raise error


def test_other_errors_pass_as_they_are() -> None:
    with (
        pytest.raises(RuntimeError, match="shapes do not match"),
        explained(shape(), settings(), CPU, torch.float32, Workload(((64,),))),
    ):
        raise RuntimeError("shapes do not match")


def test_both_threads_handles_of_cublas_are_counted() -> None:
    assert cublas_workspace(architecture=90) == 64 * MIB
    assert cublas_workspace(architecture=89) == 2 * (8 * MIB + 128 * 1024)
    assert cublas_workspace(deterministic=True, architecture=89) == 64 * MIB
    if not torch.cuda.is_available():
        assert cublas_workspace() == 64 * MIB


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        ({}, "expandable_segments:True"),
        ({"PYTORCH_CUDA_ALLOC_CONF": "max_split_size_mb:64"}, "max_split_size_mb:64"),
        ({"PYTORCH_ALLOC_CONF": "max_split_size_mb:64"}, "None"),
    ],
)
def test_segments_grow_unless_the_user_configured_the_allocator(
    given: dict[str, str], wanted: str
) -> None:
    names = ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF")
    clean = {name: value for name, value in os.environ.items() if name not in names}
    code = (
        "import sys, os, engine; assert 'torch' not in sys.modules; "
        "print(os.environ.get('PYTORCH_CUDA_ALLOC_CONF'))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=clean | given,
        cwd=Path(__file__).parents[3],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == wanted
