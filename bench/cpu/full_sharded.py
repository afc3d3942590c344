"""Full fine-tuning divided among two processes, beside torch's FSDP2 around transformers.

The same Llama of random weights in fp32, the same tokens, gradient descent, gloo between two
processes of one thread each. FSDP2 wraps every layer and the whole (`fully_shard`); ours divides as
`models.sharding.shard_parameters` does. The losses must be the same. Time is the processor's, of
both processes together and after a first step, the least of several turns in which the sides
alternate; memory is the resident set of a rank after its last step, above that before the model was
made.

Run as ``python -m bench.cpu.full_sharded [--rounds N] [--layers N] [--hidden N]``.
"""

import argparse
import datetime
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp import fully_shard
from transformers import LlamaConfig, LlamaForCausalLM

from bench.cpu.fresh_process import ROOT
from engine.distributed.torch_ranks import TorchRanks
from engine.model_sources.load_model import LayerPlacement, build_model
from engine.model_sources.open import open_model_source
from engine.provenance import device_name, git_commit
from models.layers.packed_batch import PackedBatch
from models.sharding import finish_gradients, trained_pieces

RESULTS = ROOT / "bench" / "results" / "full_sharded_cpu.jsonl"
SIDES = ("ours", "fsdp2")
RANKS, STEPS, TOKENS, RATE = 2, 3, 512, 0.05

Loss = Callable[[Tensor, Tensor], Tensor]


def ours(folder: Path) -> tuple[list[Tensor], Loss, Callable[[], object]]:
    """Parameters to train, the loss of a rank's row, and what ends a backward pass."""
    ranks = TorchRanks()
    placement = LayerPlacement(ranks=ranks, trained=True)
    model = build_model(open_model_source(str(folder)), dtype=torch.float32, layers=placement)
    model.train()

    def loss(ids: Tensor, items: Tensor) -> Tensor:
        return model.batch_loss(PackedBatch.of(ids, ids), num_items=float(items))

    return (
        [piece.parameter for piece in trained_pieces(model)],
        loss,
        lambda: finish_gradients(model),
    )


def fsdp2(folder: Path) -> tuple[list[Tensor], Loss, Callable[[], object]]:
    """The same of transformers' model; FSDP2 divides sums by the number of ranks."""
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    for layer in model.model.layers:
        fully_shard(layer)
    fully_shard(model)
    model.train()

    def loss(ids: Tensor, items: Tensor) -> Tensor:
        logits = model(ids).logits[0, :-1]
        summed = torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum")
        return summed / items * RANKS

    return list(model.parameters()), loss, lambda: None


def side(name: str, folder: Path, rank: int) -> None:
    """One process: train, and write what it measured."""
    torch.set_num_threads(1)
    process = psutil.Process()
    method = f"file://{folder}/meeting-{name}"
    dist.init_process_group("gloo", init_method=method, rank=rank, world_size=RANKS)
    before = process.memory_info().rss
    parameters, loss, finish = {"ours": ours, "fsdp2": fsdp2}[name](folder / "model")
    optimizer = torch.optim.SGD(parameters, RATE)
    losses, seconds = [], 0.0
    for step in range(STEPS):
        draw = torch.Generator().manual_seed(step * RANKS + rank)
        ids = torch.randint(0, 1000, (1, TOKENS), generator=draw)
        started = time.process_time()
        value = loss(ids, torch.tensor(RANKS * (TOKENS - 1.0)))
        value.backward()
        finish()
        optimizer.step()
        optimizer.zero_grad()
        seconds += time.process_time() - started if step else 0.0
        total = value.detach().double() / (RANKS if name == "fsdp2" else 1)
        dist.all_reduce(total)
        losses.append(float(total))
    resident = process.memory_info().rss - before
    told = {"losses": losses, "seconds": seconds, "resident_bytes": resident}
    (folder / f"{name}-{rank}.json").write_text(json.dumps(told))
    dist.destroy_process_group()


def measured(name: str, folder: Path) -> dict[str, Any]:
    """Both processes of a side: losses, processor time of all, the larger memory."""
    (folder / f"meeting-{name}").unlink(missing_ok=True)
    command = [sys.executable, "-m", "bench.cpu.full_sharded", "--side", name, str(folder)]
    started = [subprocess.Popen([*command, str(rank)], cwd=ROOT) for rank in range(RANKS)]
    if any(process.wait() for process in started):
        raise SystemExit(f"{name} failed")
    ranks = [json.loads((folder / f"{name}-{rank}.json").read_text()) for rank in range(RANKS)]
    return {
        "losses": ranks[0]["losses"],
        "seconds": sum(rank["seconds"] for rank in ranks),
        "resident_bytes": max(rank["resident_bytes"] for rank in ranks),
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--side", nargs=3, metavar=("NAME", "FOLDER", "RANK"))
    options = parser.parse_args()
    if options.side:
        side(options.side[0], Path(options.side[1]), int(options.side[2]))
        return
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=options.hidden,
        intermediate_size=options.hidden * 3,
        num_hidden_layers=options.layers,
        num_attention_heads=8,
        num_key_value_heads=4,
        vocab_size=8192,
        tie_word_embeddings=False,
    )
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = LlamaForCausalLM(config)
        size = sum(p.numel() for p in model.parameters())
        model.save_pretrained(folder / "model")
        del model
        turns = [{s: measured(s, folder) for s in SIDES} for _ in range(options.rounds)]
    first = turns[0]
    apart = max(
        abs(a - b) for a, b in zip(first["ours"]["losses"], first["fsdp2"]["losses"], strict=True)
    )
    assert apart <= 1e-5, f"the losses are {apart} apart: {first}"
    best = {s: min(turn[s]["seconds"] for turn in turns) for s in SIDES}
    row = {
        "parameters": size,
        "losses_apart": apart,
        "cpu_seconds": {s: round(best[s], 2) for s in SIDES},
        "time_ratio": round(best["ours"] / best["fsdp2"], 3),
        "resident_bytes": {s: min(turn[s]["resident_bytes"] for turn in turns) for s in SIDES},
        "machine": device_name(torch.device("cpu")),
        "torch": torch.__version__,
        "commit": git_commit(),
        "date": datetime.date.today().isoformat(),
    }
    print(json.dumps(row, indent=1))
    with RESULTS.open("a") as file:
        file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
