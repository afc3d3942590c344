"""One side of bench/train_step_cpu.py: QLoRA with this engine.

The same work as bench/train_step_peers.py: NF4 with double quantisation, fp32 compute, checkpointed
layers, 8-bit AdamW, LoRA on all seven projections. Rows lie end to end instead of being padded.

Run as ``python -m bench.train_step_ours WORK.json RESULT.json``.
"""

import sys
from importlib.metadata import version
from pathlib import Path

import torch

from bench.side import Row, Work, measure
from engine.data.examples import Example
from engine.data.loader import collate
from engine.load import load_model
from models.lora import add_lora
from optim import AdamW8bit
from optim.clip import clip_grad_norm


def main(work_file: Path, result_file: Path) -> None:
    work = Work.read(work_file)
    model = load_model(work.gguf, quantize="nf4", dtype=torch.float32)
    add_lora(model, rank=work.rank, alpha=work.alpha, targets="all")
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
        loss = model.loss(batch.input_ids, batch.labels, batch.cu_seqlens)
        loss.backward()
        clip_grad_norm(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return float(loss.detach())

    measure(work, step, {"torch": version("torch")}, len(trained), result_file)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
