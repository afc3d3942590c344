"""Fine-tune from Python, then evaluate, generate and merge.

    python -m examples.python_api --model MODEL --data rows.jsonl [--output runs/python_api]

MODEL is a Hugging Face directory, a hub id or a .gguf file; `engine data docstrings --output-dir
data` makes rows to try with. The settings of `engine.TrainConfig` are the flags of `engine train`.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch

import engine


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="examples.python_api", description="Fine-tune from Python."
    )
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--output", type=Path, default=Path("runs/python_api"))
    parser.add_argument("--steps", type=int, default=60)
    given = parser.parse_args(arguments)

    # The settings are checked when they are made: a wrong one raises engine.ConfigError here.
    config = engine.TrainConfig(
        model=given.model,
        data=given.data,
        output_dir=given.output / "run",
        method="qlora",
        learning_rate=5e-4,
        max_length=256,
        max_steps=given.steps,
    )
    result = engine.train(config)
    print(f"{result.metrics['trained_tokens']} trained tokens, adapter in {result.adapter_path}")

    # The model as a module: logits for ids, or the loss. `quantize="nf4"` keeps its base in 4 bits.
    model = engine.load_model(given.model, quantize="nf4", adapter=result.adapter_path)
    ids = torch.arange(16).unsqueeze(0)
    with torch.no_grad():
        logits = model(ids)  # (1, 16, vocabulary)
        loss = model.loss(ids, labels=ids)  # labels unshifted; -100 where nothing is trained
    print(f"logits {tuple(logits.shape)}, loss {float(loss):.3f}")

    answer = engine.generate(given.model, "What does zip() do?", result.adapter_path)
    print(answer.text)

    # A model of its own, which any program loads: the adapter merged into the original weights.
    assert result.adapter_path is not None
    engine.merge(given.model, result.adapter_path, given.output / "merged")
    print(f"merged model in {given.output / 'merged'}")


if __name__ == "__main__":
    main()
