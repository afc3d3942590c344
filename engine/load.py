"""From a checkpoint to a `Decoder`, one tensor at a time.

The graph is built without memory (torch's meta device). Each tensor is then read from the mapped
file, quantised or cast, put where it belongs and forgotten, so peak host memory is the finished
model plus the largest single tensor.
"""

from __future__ import annotations

import ctypes
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn

from engine.errors import CheckpointError, ConfigError
from engine.formats.checkpoint import Checkpoint, open_checkpoint
from kernels.int8 import quantize_int8
from kernels.nf4 import quantize
from kernels.nf4_layout import has_planar_order, to_planar
from models.decoder import Decoder
from models.linear import Linear
from models.lora import add_lora, load_adapter_tensors
from models.registry import PROJECTIONS, expected_tensors

if TYPE_CHECKING:
    from engine.formats.adapter import AdapterConfig

Quantization = Literal["nf4", "int8"]


def build_model(
    checkpoint: Checkpoint,
    *,
    quantization: Quantization | None = None,
    double_quant: bool = True,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Decoder:
    """A decoder with the checkpoint's weights, every parameter frozen.

    The seven projections of each layer are quantised if asked for; embeddings, norms, biases and
    the head are kept in `dtype`. Raises `CheckpointError` for a tensor that is not finite.
    """
    device = torch.device(device)
    with torch.device("meta"):
        model = Decoder(checkpoint.config)
    for name in expected_tensors(checkpoint.config):
        tensor = checkpoint.tensor(name)
        _place(model, name, tensor, quantization, double_quant, device, dtype)
        del tensor
        checkpoint.release(name)
    for layer in model.layers:
        layer.join_weights()
    _return_freed_memory()
    return model.eval()


def _return_freed_memory() -> None:
    """Give the pages that quantising freed back to the system, where the C library knows how."""
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc has it, musl has not
        if trim is not None:
            trim(0)


def _place(
    model: Decoder,
    name: str,
    tensor: Tensor,
    quantization: Quantization | None,
    double_quant: bool,
    device: torch.device,
    dtype: torch.dtype,
) -> None:
    path, _, leaf = name.rpartition(".")
    module = model.get_submodule(path)
    if not tensor.is_cuda and not bool(torch.isfinite(tensor.float().sum())):
        raise CheckpointError(
            f"tensor {name} holds values that are not finite; the checkpoint is damaged or was "
            "saved from a diverged run. Download it again or use an earlier one."
        )
    if isinstance(module, Linear) and leaf == "weight":
        if quantization and path.rsplit(".", 1)[-1] in PROJECTIONS:
            on_device = tensor.to(device)
            if quantization == "nf4":
                packed = quantize(on_device, double_quant=double_quant)
                # The GPU kernels read their own order of the codes; the reference reads either.
                planar = device.type == "cuda" and has_planar_order(packed)
                module.set_weight(to_planar(packed) if planar else packed)
            else:
                module.set_weight(quantize_int8(on_device))
        else:
            module.set_weight(_owned(tensor, device, dtype))
        return
    setattr(module, leaf, nn.Parameter(_owned(tensor, device, dtype), requires_grad=False))


def _owned(tensor: Tensor, device: torch.device, dtype: torch.dtype) -> Tensor:
    """A copy that no longer reads the mapped file."""
    return tensor.to(device=device, dtype=dtype, copy=True)


def attach_adapter(model: Decoder, directory: Path | str) -> AdapterConfig:
    """Put a saved PEFT adapter on `model` and return its configuration.

    Raises `CheckpointError` where its targets or shapes do not fit the model.
    """
    from engine.formats.adapter import load_adapter

    config, tensors = load_adapter(Path(directory))
    try:
        add_lora(
            model,
            rank=config.r,
            alpha=config.lora_alpha,
            dropout=config.lora_dropout,
            targets=config.target_modules,
            use_rslora=config.use_rslora,
        )
        load_adapter_tensors(model, tensors)
    except ValueError as error:
        raise CheckpointError(
            f"The adapter {directory} does not fit this model: {error}. Give the model that it "
            "was trained on."
        ) from error
    return config


def load_model(
    model: str | Path,
    quantize: Quantization | None = None,
    adapter: str | Path | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Decoder:
    """Load a model for use: a Hugging Face directory, a hub id or a `.gguf` file.

    Needs `config.json` and weights, no tokenizer. With an `adapter` its pairs stay separate and
    trainable. Raises `ConfigError` or `CheckpointError` naming what cannot be used.
    """
    if quantize not in (None, "nf4", "int8"):
        raise ConfigError(f"quantize is {quantize!r}; expected None, 'nf4' or 'int8'")
    decoder = build_model(open_checkpoint(model), quantization=quantize, device=device, dtype=dtype)
    if adapter is not None:
        attach_adapter(decoder, adapter)
    return decoder
