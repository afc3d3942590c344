"""Writes the golden fixtures of the families that `main` lists, with transformers 5.23.

    python -m tests.support.golden_fixture OUTPUT [FAMILY ...]

Each is a Hugging Face directory of a tiny random decoder and the answers of transformers to it:
logits, loss and gradients of two documents of 80 tokens, and of documents of 33 and 47 tokens, each
run alone, as one packed row of a training batch should see them. The answers hold the gradients of
one parameter of every kind, and the norms of all. Weights are large enough that no part of the
graph is nearly linear. Two fixtures are laid out as the hub's files are: the decoder under
`model.language_model.`, beside tensors of vision and of multi-token prediction.
"""

from __future__ import annotations

import json
import math
import sys
import zlib
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

COMMON: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": None,
    "tie_word_embeddings": False,
}
ROUTED: dict[str, Any] = {
    "num_experts": 6,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
}
MIXTURE = ROUTED | {"shared_expert_intermediate_size": 24}
HYBRID: dict[str, Any] = {
    "head_dim": 16,
    "linear_conv_kernel_dim": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "layer_types": ["linear_attention", "full_attention"],
    "rope_parameters": {
        "rope_type": "default",
        "rope_theta": 10_000_000.0,
        "partial_rotary_factor": 0.25,
    },
}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "smollm3": ("SmolLM3", {"no_rope_layer_interval": 2, "tie_word_embeddings": True}),
    "qwen2_moe": ("Qwen2Moe", MIXTURE | {"mlp_only_layers": [0], "norm_topk_prob": False}),
    "qwen3_moe": ("Qwen3Moe", ROUTED | {"head_dim": 16, "norm_topk_prob": True}),
    "qwen3_next": (
        "Qwen3Next",
        MIXTURE | HYBRID | {"linear_num_value_heads": 6, "num_experts": 4, "norm_topk_prob": True},
    ),
    "qwen3_5": ("Qwen3_5", HYBRID | {"linear_value_head_dim": 12, "tie_word_embeddings": True}),
    "qwen3_5_vl": ("Qwen3_5", HYBRID),
    "qwen3_5_moe_vl": ("Qwen3_5Moe", MIXTURE | HYBRID),
}
VISION = {
    "depth": 1,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_heads": 2,
    "in_channels": 3,
    "patch_size": 4,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
    "out_hidden_size": 32,
    "num_position_embeddings": 16,
}
OLD_SPELLING = ("qwen3_moe", "qwen3_next", "smollm3")
NESTED = {"qwen3_5_vl": "qwen3_5", "qwen3_5_moe_vl": "qwen3_5_moe"}
STORED_GRADIENTS = 11_000
"""Elements of stored gradients, at most: they are taken in order, one of each kind of name."""


def build(class_name: str, settings: dict[str, Any]) -> Any:
    """A transformers model with weights that depend on their names alone."""
    import transformers

    name = "TextConfig" if class_name.startswith("Qwen3_5") else "Config"
    config = getattr(transformers, f"{class_name}{name}")(**(COMMON | settings))
    model = getattr(transformers, f"{class_name}ForCausalLM")._from_config(
        config, attn_implementation="eager"
    )
    for path, parameter in model.named_parameters():
        _fill(path, parameter, class_name in ("Qwen3Next", "Qwen3_5", "Qwen3_5Moe"))
    return model.float().eval()


@torch.no_grad()
def _fill(path: str, parameter: nn.Parameter, centred: bool) -> None:
    generator = torch.Generator().manual_seed(zlib.crc32(path.encode()))
    values = torch.randn(parameter.shape, generator=generator)
    leaf = path.rsplit(".", 1)[-1]
    if leaf == "A_log":
        values = torch.rand(parameter.shape, generator=generator).mul_(2.0)
    elif "norm" in path:
        values = 0.3 * values + (0.0 if centred and "linear_attn" not in path else 1.0)
    elif parameter.ndim > 1:
        values *= (1.0 if "embed" in path else 1.1) / math.sqrt(parameter.shape[-1])
    else:
        values *= 0.3
    parameter.copy_(values)


def answers(model: Any) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What `golden.safetensors` and `golden.json` hold."""
    generator = torch.Generator().manual_seed(7)
    ids = torch.randint(3, model.config.vocab_size, (2, 80), generator=generator)
    labels = torch.where(torch.rand(2, 80, generator=generator) < 0.3, -100, ids)
    out = model(input_ids=ids, labels=labels, use_cache=False)
    gradients = _gradients(model, out.loss)
    tensors = {"input_ids": ids, "labels": labels, "logits": out.logits.detach()}
    tensors |= {"loss": out.loss.detach().view(1), **_chosen(gradients)}
    notes: dict[str, Any] = {"grad_norm": {n: float(g.norm()) for n, g in gradients.items()}}
    packed, bounds = ids[0], [0, 33, 80]
    logits = [model(input_ids=packed[a:b][None]).logits[0] for a, b in ((0, 33), (33, 80))]
    targets = [packed[a + 1 : b] for a, b in ((0, 33), (33, 80))]
    loss = nn.functional.cross_entropy(
        torch.cat([part[:-1] for part in logits]), torch.cat(targets)
    )
    notes["packed_grad_norm"] = {n: float(g.norm()) for n, g in _gradients(model, loss).items()}
    tensors |= {
        "packed.input_ids": packed.clone(),
        "packed.cu_seqlens": torch.tensor(bounds, dtype=torch.int32),
        "packed.logits": torch.cat(logits).detach(),
        "packed.loss": loss.detach().view(1),
    }
    if hasattr(model.config, "num_experts"):
        model.config.output_router_logits = True
        routed = model(input_ids=ids, labels=labels, output_router_logits=True)
        model.config.output_router_logits = False
        notes |= {"aux_loss": float(routed.aux_loss), "loss_with_aux": float(routed.loss)}
        ordered = torch.cat(routed.router_logits).sort(-1, descending=True).values
        top = model.config.num_experts_per_tok
        notes["router_min_margin"] = float((ordered[:, top - 1] - ordered[:, top]).min())
    return tensors, notes


def _gradients(model: Any, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()}


def _chosen(gradients: dict[str, Tensor]) -> dict[str, Tensor]:
    """The first gradient of every kind of name, the small ones first, within the limit."""
    kinds: dict[str, str] = {}
    for name in gradients:
        kinds.setdefault("".join(c for c in name if not c.isdigit()), name)
    chosen, left = {}, STORED_GRADIENTS
    for name in sorted(kinds.values(), key=lambda name: gradients[name].numel()):
        left -= gradients[name].numel()
        if left >= 0:
            chosen[f"grad.{name}"] = gradients[name]
    return chosen


def nested_files(model: Any, model_type: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """config.json and tensors as the hub lays them out, with those of the model's other parts."""
    text = model.config.to_dict()
    text |= {"full_attention_interval": 2, "mtp_num_hidden_layers": 1, "attn_output_gate": True}
    config = {
        "architectures": [
            f"{'Qwen3_5Moe' if 'moe' in model_type else 'Qwen3_5'}ForConditionalGeneration"
        ],
        "model_type": model_type,
        "text_config": text,
        "tie_word_embeddings": False,
        "image_token_id": 60,
        "video_token_id": 61,
        "vision_start_token_id": 62,
        "vision_end_token_id": 63,
        "vision_config": VISION | {"model_type": model_type},
    }
    tensors = {
        name.replace("model.", "model.language_model.", 1) if name[0] == "m" else name: p.detach()
        for name, p in model.named_parameters()
    }
    generator = torch.Generator().manual_seed(3)
    shapes = {
        "mtp.fc.weight": (32, 64),
        "mtp.layers.0.self_attn.k_proj.weight": (32, 32),
        "mtp.norm.weight": (32,),
        "model.visual.patch_embed.proj.weight": (16, 3, 2, 4, 4),
        "model.visual.blocks.0.attn.qkv.bias": (48,),
    }
    tensors |= {
        name: torch.randn(shape, generator=generator).to(torch.bfloat16)
        for name, shape in shapes.items()
    }
    return config, tensors


def old_spelling(config: dict[str, Any]) -> dict[str, Any]:
    """The same configuration as transformers 4 writes it."""
    old = {k: v for k, v in config.items() if k not in ("rope_parameters", "dtype", "layer_types")}
    rope = config["rope_parameters"]
    old |= {"rope_theta": rope["rope_theta"], "rope_scaling": None, "torch_dtype": "float32"}
    if "partial_rotary_factor" in rope:
        old |= {"partial_rotary_factor": rope["partial_rotary_factor"]}
        old["full_attention_interval"] = 2
    if "num_local_experts" in old:
        old["num_experts"] = old.pop("num_local_experts")
    return old | {"transformers_version": "4.57.0"}


def write(family: str, folder: Path) -> None:
    """One fixture."""
    class_name, settings = FAMILIES[family]
    model = build(class_name, settings)
    tensors, notes = answers(model)
    folder.mkdir(parents=True, exist_ok=True)
    if family in NESTED:
        config, stored = nested_files(model, NESTED[family])
        save_file(stored, folder / "model.safetensors", {"format": "pt"})
        (folder / "config.json").write_text(json.dumps(config, indent=1))
    else:
        model.save_pretrained(folder)
        config = json.loads((folder / "config.json").read_text())
        if family in OLD_SPELLING:
            (folder / "config_v4.json").write_text(json.dumps(old_spelling(config), indent=1))
    from safetensors import safe_open

    with safe_open(folder / "model.safetensors", "pt") as file:
        notes["checkpoint"] = {
            name: [file.get_slice(name).get_dtype(), file.get_slice(name).get_shape()]
            for name in sorted(file.keys())
        }
    save_file(tensors, folder / "golden.safetensors")
    (folder / "golden.json").write_text(json.dumps({"family": family, **notes}, indent=1))


def main(arguments: list[str]) -> None:
    """Write the named families, or all, below a folder."""
    for family in arguments[1:] or list(FAMILIES):
        write(family, Path(arguments[0]) / family)


if __name__ == "__main__":
    main(sys.argv[1:])
