"""An adapter on disk that changes answers."""

from pathlib import Path

import torch

from engine.model_sources.adapter.config import AdapterConfig
from engine.model_sources.adapter.peft import save_adapter
from engine.model_sources.load_model import load_model
from models.adapters import adapter_tensors, add_lora


def write_random_adapter(target: Path, base: Path, seed: int, rank: int = 4) -> Path:
    """Save random LoRA pairs for every projection of the model in `base`."""
    model = load_model(base)
    paths = add_lora(model, rank=rank, alpha=2.0 * rank, seed=seed)
    tensors = adapter_tensors(model)
    generator = torch.Generator().manual_seed(seed)
    for _, b, *_ in tensors.values():
        b.normal_(0, 0.1, generator=generator)
    names = sorted({path.rpartition(".")[2] for path in paths})
    save_adapter(target, AdapterConfig(rank, 2.0 * rank, names), tensors)
    return target
