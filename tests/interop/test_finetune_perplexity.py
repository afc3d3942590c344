"""A run on the real model, judged by transformers and PEFT on the saved adapter."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from engine.config.train_config import TrainConfig
from engine.data.dataset import load_rows
from engine.data.docstrings import docstring_pairs
from engine.data.examples import Example, build_examples
from engine.model_sources.open import open_model_source
from engine.tokenization.tokenizer import load_tokenizer
from engine.verbs.models.evaluate import evaluate
from engine.verbs.training.train import train

pytestmark = pytest.mark.interop
LONGEST = 128


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Files of rows to train on and of rows held out."""
    folder = tmp_path_factory.mktemp("rows")
    pairs = [row for row in docstring_pairs() if len(row.messages[-1]["content"]) < 300]
    files = folder / "train.jsonl", folder / "heldout.jsonl"
    for file, chosen in zip(files, (pairs[:24:2], pairs[1:24:2]), strict=True):
        file.write_text("".join(json.dumps({"messages": row.messages}) + "\n" for row in chosen))
    return files


@torch.no_grad()
def peers_perplexity(model: Any, examples: list[Example]) -> float:
    total, tokens = 0.0, 0
    for example in examples:
        ids = torch.tensor([example.input_ids])
        labels = ids.masked_fill(~torch.tensor([list(example.trained)]), -100)
        trained = int((labels[:, 1:] >= 0).sum())
        total += float(model(input_ids=ids, labels=labels).loss) * trained
        tokens += trained
    return math.exp(total / tokens)


@pytest.mark.parametrize(("method", "tolerance"), [("lora", 1e-4), ("qlora", 1e-3)])
def test_the_perplexity_we_report_is_the_one_that_peft_finds(
    method: str,
    tolerance: float,
    rows: tuple[Path, Path],
    smollm2_directory: Path,
    tmp_path: Path,
) -> None:
    training, heldout = rows
    result = train(
        TrainConfig(
            model=str(smollm2_directory),
            data=[str(training)],
            eval_data=[str(heldout)],
            output_dir=tmp_path / "run",
            method=method,
            max_steps=3,
            batch_size=4,
            max_length=LONGEST,
            learning_rate=1e-3,
            lora_dropout=0.0,
            device="cpu",
            dtype="float32",
            plot=False,
        ),
        console=False,
    )
    reported = result.metrics["heldout_perplexity"]
    assert reported < 0.97 * result.metrics["heldout_perplexity_before"]
    quantize: Literal["nf4"] | None = "nf4" if method == "qlora" else None
    again = evaluate(
        smollm2_directory,
        heldout,
        result.adapter_path,
        quantize=quantize,
        max_length=LONGEST,
        device="cpu",
    )
    assert again.perplexity == pytest.approx(reported, rel=1e-5)
    in_4_bit = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )
    base = AutoModelForCausalLM.from_pretrained(
        smollm2_directory,
        dtype=torch.float32,
        quantization_config=in_4_bit if quantize else None,
    )
    peers = PeftModel.from_pretrained(base, str(result.adapter_path))
    # Nothing drops out here; in evaluation bitsandbytes' CPU kernels would round to bfloat16.
    peers.train()
    tokenizer = load_tokenizer(open_model_source(smollm2_directory))
    examples, _ = build_examples(load_rows(heldout), tokenizer, LONGEST)
    assert peers_perplexity(peers, examples) == pytest.approx(reported, rel=tolerance)
