"""One side of bench/cpu/train_step.py: QLoRA with this engine.

The same work as bench/cpu/train_step_peers.py: NF4 with double quantisation, 8-bit AdamW, LoRA on
all seven projections. Rows lie end to end instead of being padded. The compute type and what
backward computes again are chosen as `engine train` chooses them.

Run as ``python -m bench.cpu.train_step_ours WORK.json RESULT.json``.
"""

import sys
from importlib.metadata import version
from pathlib import Path

import torch

from bench.cpu.side import Row, Work, measure
from engine.config.spelling import given_chunk
from engine.config.train_config import TrainConfig
from engine.data.batches.loader import collate
from engine.data.examples import Example
from engine.memory.auto_policy import resolve_policy
from engine.memory.estimate import Workload
from engine.model_sources.load_model import load_model
from engine.model_sources.open import open_model_source
from engine.training.cpu_dtype import with_cpu_dtype
from kernels.runtime.cores import compiles_loops
from models.adapters import add_lora
from models.layers.context import StepSettings
from optim import AdamW8bit
from optim.clip import clip_grad_norm


def checkpointing_policy(config: TrainConfig, work: Work, dtype: torch.dtype) -> str:
    """What `--gradient-checkpointing` comes to for the largest batch."""
    largest = max(work.batches, key=lambda rows: sum(len(row.input_ids) for row in rows))
    lengths = tuple(len(row.input_ids) for row in largest)
    return resolve_policy(
        open_model_source(work.gguf).config,
        config,
        torch.device("cpu"),
        dtype,
        Workload((lengths,)),
    )


def main(work_file: Path, result_file: Path) -> None:
    work = Work.read(work_file)
    config = TrainConfig(
        model=work.gguf,
        data=["-"],
        dtype=work.dtype,
        lora_rank=work.rank,
        gradient_checkpointing=work.policy,
    )
    config = with_cpu_dtype(config, gpu=False)
    dtype: torch.dtype = getattr(torch, config.dtype)
    model = load_model(work.gguf, quantize="nf4", dtype=dtype)
    add_lora(model, rank=work.rank, alpha=work.alpha, targets="all")
    policy = checkpointing_policy(config, work, dtype)
    settings = StepSettings(
        checkpointing=policy, loss_chunk_tokens=given_chunk(config.loss_chunk_tokens)
    )
    model.train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = AdamW8bit(trained, lr=work.learning_rate, weight_decay=0.01)

    def step(rows: list[Row]) -> float:
        batch = collate(
            [
                Example(row.input_ids, [label != -100 for label in row.labels], "bench")
                for row in rows
            ]
        )
        loss = model.batch_loss(batch, settings)
        loss.backward()
        clip_grad_norm(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return float(loss.detach())

    versions = {
        "torch": version("torch"),
        "gradient_checkpointing": policy,
        "dtype": config.dtype,
        "numba": str(compiles_loops()),
    }
    measure(work, step, versions, len(trained), result_file)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
