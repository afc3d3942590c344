"""Write a LoRA adapter as a GGUF file for its base's own.

llama.cpp adds (alpha / r) B A to a tensor, r being the rank of its pair. So each pair's real scale
goes into its B, and alpha is the largest rank. Rows and columns that the base's tensor has in
another order are moved in A and B alike.
"""

from __future__ import annotations

from contextlib import closing
from pathlib import Path

from torch import Tensor

from engine.errors import ConfigError, listing
from engine.exporting.gguf_file import metadata_writer, require_gguf
from engine.exporting.gguf_layout import GGUFTensor, layout
from engine.exporting.gguf_metadata import architecture
from engine.exporting.portable_adapter import refuse_more_than_pairs
from engine.model_sources.adapter.fit import ModuleNames, check_fit
from engine.model_sources.adapter.peft import Adapter
from engine.model_sources.interface.model_source import ModelDescription
from engine.storage import durable
from models.tensor_layout import Layout


def write_gguf_adapter(base: ModelDescription, adapter: Adapter, output: Path) -> int:
    """Write `adapter` of the model `base` as the new file `output`; returns its number of pairs.

    Raises `ConfigError` for what llama.cpp cannot apply (DoRA, trained biases or whole modules,
    experts) or an occupied output, `CheckpointError` for an adapter of another model.
    """
    require_gguf()
    refuse_more_than_pairs(
        adapter, "llama.cpp adds pairs alone, no magnitudes and no whole modules"
    )
    check_fit(adapter, base.config, base.path)
    output = output.absolute()
    durable.refuse_occupied(output)
    pairs = gguf_pairs(base, adapter)
    alpha = max(a.shape[0] for a, _ in pairs.values())
    metadata = {
        "general.type": "adapter",
        "general.name": output.stem,
        "adapter.type": "lora",
        "adapter.lora.alpha": float(alpha),
    }
    arch = architecture(base.config)
    with (
        durable.publish_files(output) as folder,
        closing(metadata_writer(folder / output.name, arch, metadata)) as writer,
    ):
        for name, (a, b) in pairs.items():
            writer.add_tensor(f"{name}.lora_a", a.float().contiguous().numpy())
            # llama.cpp's factor is alpha / rank of the pair.
            scaled = b.float() * (a.shape[0] / alpha)
            writer.add_tensor(f"{name}.lora_b", scaled.contiguous().numpy())
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    return len(pairs)


def gguf_pairs(base: ModelDescription, adapter: Adapter) -> dict[str, tuple[Tensor, Tensor]]:
    """Name of the base's tensor -> A (r, in) and s B (out, r) in the order of that tensor."""
    tensors: dict[str, list[GGUFTensor]] = {}
    names, paths = ModuleNames(base.config, adapter), Layout(base.config.nested, fused=True)
    for tensor in layout(base.config):
        if tensor.parameter is not None:
            path = paths.path(tensor.parameter).removesuffix(".weight")
            tensors.setdefault(path, []).append(tensor)
    made: dict[str, tuple[Tensor, Tensor]] = {}
    strays = [module for module in adapter.pairs if names.path(module) not in tensors]
    if strays:
        raise ConfigError(
            f"{adapter.path} adapts {listing(strays)}; llama.cpp takes pairs for projections of "
            "attention, DeltaNet and dense layers. Merge it first: engine merge."
        )
    for module, (a, b, *_) in adapter.pairs.items():
        for tensor in tensors[names.path(module)]:
            scaled = b.float() * adapter.scales[module]
            if tensor.columns_move:
                made[tensor.name] = (tensor.make(a), scaled)
            else:
                made[tensor.name] = (a, tensor.make(scaled))
    return made
