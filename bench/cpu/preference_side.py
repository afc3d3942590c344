"""One side of bench/cpu/preference.py: DPO with this engine, or with TRL.

Both train a QLoRA adapter of rank 16 on all seven projections with 8-bit AdamW, against the base
without adapter. The time of a side is that of its timed steps and of all that they need of the
reference. TRL has what it offers for memory: its fused head, checkpointing, and the reference's
log-probabilities from the same weights with the adapter off.

Run as ``python -m bench.cpu.preference_side SIDE WORK.json RESULT.json``.
"""

import json
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from bench.cpu.side import peak_resident_bytes

KINDS = ("chosen", "rejected")
Pair = dict[str, list[int]]
"""`prompt_ids`, `chosen_ids` and `rejected_ids`, as TRL's collator reads them."""


def ours(work: dict[str, Any], share: bool) -> tuple[Callable[[list[Pair]], float], float, str]:
    """The step, the seconds that the reference took for one pair, and the compute type."""
    from engine.config.train_config import TrainConfig
    from engine.data.batches.sequences import AnswerSet
    from engine.data.examples import Example
    from engine.data.preferences import PairExample
    from engine.model_sources.load_model import load_model
    from engine.training.cpu_dtype import with_cpu_dtype
    from engine.training.objectives.choose import make_objective
    from engine.training.objectives.reference import reference_log_probs
    from models.adapters import add_lora
    from models.layers.context import StepSettings
    from optim import AdamW8bit
    from optim.clip import clip_grad_norm

    config = TrainConfig(model=work["gguf"], data=["-"], objective="dpo", share_prompt=share)
    config = with_cpu_dtype(config, gpu=False)
    model = load_model(work["gguf"], quantize="nf4", dtype=getattr(torch, config.dtype))

    def answer(prompt: list[int], ids: list[int]) -> Example:
        return Example([*prompt, *ids], [False] * len(prompt) + [True] * len(ids), "bench")

    pairs = [pair for batch in work["batches"] for pair in batch]
    examples = [
        PairExample(*(answer(pair["prompt_ids"], pair[f"{kind}_ids"]) for kind in KINDS))
        for pair in pairs
    ]
    answers = AnswerSet(examples, work["max_length"], share)
    settings = StepSettings(checkpointing=work["policy"])
    began = time.perf_counter()
    every = list(range(len(pairs)))
    reference = reference_log_probs(model, answers, every, settings, judged=False)
    each = (time.perf_counter() - began) / len(pairs)
    add_lora(model, rank=work["rank"], alpha=work["alpha"])
    model.train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = AdamW8bit(trained, lr=work["learning_rate"], weight_decay=0.01)
    objective = make_objective(config, answers, reference)
    done = 0

    def step(rows: list[Pair]) -> float:
        nonlocal done
        batch = answers.batch(range(done, done + len(rows)))
        done += len(rows)
        totals = objective.totals(model, [batch], settings)
        loss = objective.share(model, batch, settings, totals).loss
        loss.backward()
        clip_grad_norm(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return float(loss.detach())

    return step, each, config.dtype


def peers(work: dict[str, Any]) -> tuple[Callable[[list[Pair]], float], float, str]:
    """TRL's loss, in a loop of our own that does no more than a step needs."""
    import bitsandbytes
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig
    from trl import DPOConfig, DPOTrainer

    model = AutoModelForCausalLM.from_pretrained(
        work["hf_directory"],
        dtype=torch.float32,
        device_map="cpu",
        attn_implementation="sdpa",
        quantization_config=BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.float32,
        ),
    )
    output = tempfile.mkdtemp(prefix="engine-bench-trl-")
    arguments = DPOConfig(
        output_dir=output, per_device_train_batch_size=4, report_to=[], use_cpu=True, bf16=False,
        gradient_checkpointing=work["checkpointing"], max_length=None, beta=0.1,
        gradient_checkpointing_kwargs={"use_reentrant": False},
    )  # fmt: skip
    data = Dataset.from_dict({"prompt": ["a"], "chosen": ["b"], "rejected": ["c"]})
    adapter = LoraConfig(
        r=work["rank"],
        lora_alpha=work["alpha"],
        target_modules="all-linear",
        task_type="CAUSAL_LM",
    )
    trainer = DPOTrainer(
        model, None, arguments, train_dataset=data, peft_config=adapter,
        processing_class=AutoTokenizer.from_pretrained(work["hf_directory"]),
    )  # fmt: skip
    trainer.model.train()
    trained = [parameter for parameter in trainer.model.parameters() if parameter.requires_grad]
    optimizer = bitsandbytes.optim.AdamW8bit(trained, lr=work["learning_rate"], weight_decay=0.01)

    def step(rows: list[Pair]) -> float:
        loss = trainer.compute_loss(trainer.model, trainer.data_collator(rows))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return float(loss.detach())

    return step, 0.0, "float32"


def write_peer_model(work: dict[str, Any]) -> None:
    """The model as transformers reads it, with its tokenizer."""
    from bench.cpu.train_step_peers import convert
    from engine.model_sources.export import write_tokenizer
    from engine.model_sources.open import open_model_source

    gguf, directory = Path(work["gguf"]), Path(work["hf_directory"])
    convert(gguf, directory)
    write_tokenizer(open_model_source(gguf), directory)


def main(side: str, work_file: Path, result_file: Path) -> None:
    work = json.loads(work_file.read_text())
    if side == "convert":
        write_peer_model(work)
        return
    if side.startswith("ours"):
        step, each, dtype = ours(work, side == "ours-shared")
        names: tuple[str, ...] = ("torch",)
    else:
        step, each, dtype = peers(work)
        names = ("trl", "transformers", "peft", "bitsandbytes", "torch")
    losses, seconds = [], []
    for batch in work["batches"]:
        began = time.perf_counter()
        losses.append(step(batch))
        seconds.append(time.perf_counter() - began)
    timed = sum(len(batch) for batch in work["batches"][work["warmup"] :])
    result = {
        "pairs": timed,
        "seconds": sum(seconds[work["warmup"] :]) + each * timed,
        "reference_seconds": each * timed,
        "losses": losses,
        "peak_bytes": peak_resident_bytes(),
        "dtype": dtype,
        "versions": {name: version(name) for name in names},
    }
    result_file.write_text(json.dumps(result))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]))
