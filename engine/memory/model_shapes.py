"""Shapes of well-known models, so that a plan needs no download.

Each entry is what the model's published `config.json` says of its arithmetic, and its published
number of parameters. Sources: the model cards and configuration files of Llama 2 to 3.3, Qwen1.5 to
Qwen3.5, Mistral 7B, SmolLM2 and SmolLM3.
"""

from __future__ import annotations

import difflib
import re
from typing import Any

from engine.errors import ConfigError
from models.config.model_config import ModelConfig

_LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
_COMMON: dict[str, dict[str, Any]] = {
    "llama2": {
        "model_type": "llama",
        "vocab_size": 32_000,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10_000.0,
        "max_position_embeddings": 4096,
    },
    "llama3": {
        "model_type": "llama",
        "vocab_size": 128_256,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500_000.0,
        "max_position_embeddings": 8192,
    },
    "llama": {
        "model_type": "llama",
        "vocab_size": 128_256,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500_000.0,
        "rope_scaling": _LLAMA3_ROPE,
        "max_position_embeddings": 131_072,
    },
    "qwen3": {
        "model_type": "qwen3",
        "vocab_size": 151_936,
        "head_dim": 128,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1_000_000.0,
        "max_position_embeddings": 40_960,
    },
    "qwen2": {
        "model_type": "qwen2",
        "vocab_size": 151_936,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1_000_000.0,
        "max_position_embeddings": 32_768,
    },
    "mistral": {
        "model_type": "mistral",
        "vocab_size": 32_768,
        "rms_norm_eps": 1e-5,
        "rope_theta": 1_000_000.0,
        "sliding_window": None,
        "max_position_embeddings": 32_768,
    },
    "smollm2": {
        "model_type": "llama",
        "vocab_size": 49_152,
        "rms_norm_eps": 1e-5,
        "rope_theta": 100_000.0,
        "max_position_embeddings": 8_192,
    },
}

# name: family, hidden, inner, layers, heads, key/value heads, vocabulary (None: the family's),
# tied head, published parameters
_SHAPES: dict[str, tuple[str, int, int, int, int, int, int | None, bool, int]] = {
    "llama-2-7b": ("llama2", 4096, 11008, 32, 32, 32, None, False, 6_738_415_616),
    "llama-2-13b": ("llama2", 5120, 13824, 40, 40, 40, None, False, 13_015_864_320),
    "llama-2-70b": ("llama2", 8192, 28672, 80, 64, 8, None, False, 68_976_648_192),
    "llama-3-8b": ("llama3", 4096, 14336, 32, 32, 8, None, False, 8_030_261_248),
    "llama-3-70b": ("llama3", 8192, 28672, 80, 64, 8, None, False, 70_553_706_496),
    "llama-3.1-8b": ("llama", 4096, 14336, 32, 32, 8, None, False, 8_030_261_248),
    "llama-3.1-70b": ("llama", 8192, 28672, 80, 64, 8, None, False, 70_553_706_496),
    "llama-3.1-405b": ("llama", 16384, 53248, 126, 128, 8, None, False, 405_853_388_800),
    "llama-3.2-1b": ("llama", 2048, 8192, 16, 32, 8, None, True, 1_235_814_400),
    "llama-3.2-3b": ("llama", 3072, 8192, 28, 24, 8, None, True, 3_212_749_824),
    "llama-3.3-70b": ("llama", 8192, 28672, 80, 64, 8, None, False, 70_553_706_496),
    "qwen3-0.6b": ("qwen3", 1024, 3072, 28, 16, 8, None, True, 596_049_920),
    "qwen3-1.7b": ("qwen3", 2048, 6144, 28, 16, 8, None, True, 1_720_574_976),
    "qwen3-4b": ("qwen3", 2560, 9728, 36, 32, 8, None, True, 4_022_468_096),
    "qwen3-8b": ("qwen3", 4096, 12288, 36, 32, 8, None, False, 8_190_735_360),
    "qwen3-14b": ("qwen3", 5120, 17408, 40, 40, 8, None, False, 14_768_307_200),
    "qwen3-32b": ("qwen3", 5120, 25600, 64, 64, 8, None, False, 32_762_123_264),
    "qwen1.5-0.5b": ("qwen2", 1024, 2816, 24, 16, 16, None, True, 463_987_712),
    "qwen1.5-1.8b": ("qwen2", 2048, 5504, 24, 16, 16, None, False, 1_836_828_672),
    "qwen1.5-4b": ("qwen2", 2560, 6912, 40, 20, 20, None, False, 3_950_369_280),
    "qwen1.5-7b": ("qwen2", 4096, 11008, 32, 32, 32, None, False, 7_721_324_544),
    "qwen1.5-14b": ("qwen2", 5120, 13696, 40, 40, 40, 152_064, False, 14_167_290_880),
    "qwen1.5-32b": ("qwen2", 5120, 27392, 64, 40, 8, 152_064, False, 32_512_218_112),
    "qwen1.5-72b": ("qwen2", 8192, 24576, 80, 64, 64, 152_064, False, 72_287_920_128),
    "qwen1.5-110b": ("qwen2", 8192, 49152, 80, 64, 8, 152_064, False, 111_209_914_368),
    "qwen2-0.5b": ("qwen2", 896, 4864, 24, 14, 2, None, True, 494_032_768),
    "qwen2-1.5b": ("qwen2", 1536, 8960, 28, 12, 2, None, True, 1_543_714_304),
    "qwen2-7b": ("qwen2", 3584, 18944, 28, 28, 4, 152_064, False, 7_615_616_512),
    "qwen2-72b": ("qwen2", 8192, 29568, 80, 64, 8, 152_064, False, 72_706_203_648),
    "qwen2.5-0.5b": ("qwen2", 896, 4864, 24, 14, 2, None, True, 494_032_768),
    "qwen2.5-1.5b": ("qwen2", 1536, 8960, 28, 12, 2, None, True, 1_543_714_304),
    "qwen2.5-3b": ("qwen2", 2048, 11008, 36, 16, 2, None, True, 3_085_938_688),
    "qwen2.5-7b": ("qwen2", 3584, 18944, 28, 28, 4, 152_064, False, 7_615_616_512),
    "qwen2.5-14b": ("qwen2", 5120, 13824, 48, 40, 8, 152_064, False, 14_770_033_664),
    "qwen2.5-32b": ("qwen2", 5120, 27648, 64, 40, 8, 152_064, False, 32_763_876_352),
    "qwen2.5-72b": ("qwen2", 8192, 29568, 80, 64, 8, 152_064, False, 72_706_203_648),
    "mistral-7b": ("mistral", 4096, 14336, 32, 32, 8, None, False, 7_248_023_552),
    "smollm2-135m": ("smollm2", 576, 1536, 30, 9, 3, None, True, 134_515_008),
    "smollm2-360m": ("smollm2", 960, 2560, 32, 15, 5, None, True, 361_821_120),
    "smollm2-1.7b": ("smollm2", 2048, 8192, 24, 32, 32, None, True, 1_711_376_384),
}

_QWEN3_MOE = {
    "model_type": "qwen3_moe",
    "vocab_size": 151_936,
    "head_dim": 128,
    "num_key_value_heads": 4,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "norm_topk_prob": True,
    "rope_theta": 1_000_000.0,
    "max_position_embeddings": 40_960,
}
_QWEN3_5 = {
    "model_type": "qwen3_5_text",
    "vocab_size": 248_320,
    "head_dim": 256,
    "linear_num_key_heads": 16,
    "rope_theta": 10_000_000.0,
    "partial_rotary_factor": 0.25,
    "max_position_embeddings": 262_144,
}
# hidden, layers, heads, key/value heads, then what else the family's file says, and the published
# number of parameters, or that of the decoder where the published one counts other parts too.
_OTHERS: dict[str, tuple[dict[str, Any], int, int, int, int, dict[str, Any], int]] = {
    "smollm3-3b": (
        {"model_type": "smollm3", "vocab_size": 128_256, "rope_theta": 5_000_000.0},
        2048, 36, 16, 4, {"intermediate_size": 11008, "max_position_embeddings": 65_536},
        3_075_098_624,
    ),
    "qwen1.5-moe-a2.7b": (
        {"model_type": "qwen2_moe", "vocab_size": 151_936, "rope_theta": 1_000_000.0},
        2048, 24, 16, 16, {"intermediate_size": 5632, "max_position_embeddings": 8192},
        14_315_784_192,
    ),
    "qwen2-57b-a14b": (
        {"model_type": "qwen2_moe", "vocab_size": 151_936, "rope_theta": 1_000_000.0},
        3584, 28, 28, 4,
        {
            "intermediate_size": 18944, "moe_intermediate_size": 2560, "num_experts": 64,
            "num_experts_per_tok": 8, "shared_expert_intermediate_size": 20480,
            "max_position_embeddings": 32_768,
        },
        57_408_658_944,
    ),
    "qwen3-30b-a3b": (
        _QWEN3_MOE, 2048, 48, 32, 4,
        {"intermediate_size": 6144, "moe_intermediate_size": 768}, 30_532_122_624,
    ),
    "qwen3-235b-a22b": (
        _QWEN3_MOE, 4096, 94, 64, 4,
        {"intermediate_size": 12288, "moe_intermediate_size": 1536}, 235_093_634_560,
    ),
    "qwen3-coder-480b-a35b": (
        _QWEN3_MOE, 6144, 62, 96, 8,
        {"intermediate_size": 8192, "moe_intermediate_size": 2560, "num_experts": 160},
        480_154_875_392,
    ),
    "qwen3-next-80b-a3b": (
        {"model_type": "qwen3_next", "vocab_size": 151_936, "rope_theta": 10_000_000.0},
        2048, 48, 16, 2, {"intermediate_size": 5120, "max_position_embeddings": 262_144},
        79_674_391_296,
    ),
    "qwen3.5-0.8b": (
        _QWEN3_5, 1024, 24, 8, 2,
        {"intermediate_size": 3584, "linear_num_value_heads": 16, "tie_word_embeddings": True},
        752_393_024,
    ),
    "qwen3.5-2b": (
        _QWEN3_5, 2048, 24, 8, 2,
        {"intermediate_size": 6144, "linear_num_value_heads": 16, "tie_word_embeddings": True},
        1_881_825_088,
    ),
    "qwen3.5-4b": (
        _QWEN3_5, 2560, 32, 16, 4,
        {"intermediate_size": 9216, "linear_num_value_heads": 32, "tie_word_embeddings": True},
        4_205_751_296,
    ),
    "qwen3.5-9b": (
        _QWEN3_5, 4096, 32, 16, 4,
        {"intermediate_size": 12288, "linear_num_value_heads": 32}, 8_953_803_264,
    ),
    "qwen3.5-27b": (
        _QWEN3_5, 5120, 64, 24, 4,
        {"intermediate_size": 17408, "linear_num_value_heads": 48}, 26_895_998_464,
    ),
    "qwen3.5-35b-a3b": (
        _QWEN3_5 | {"model_type": "qwen3_5_moe_text"}, 2048, 40, 16, 2,
        {"num_experts": 256, "num_experts_per_tok": 8, "linear_num_value_heads": 32},
        34_660_610_688,
    ),
}  # fmt: skip

NAMES = (*_SHAPES, *_OTHERS)
PARAMETERS = {name: preset[-1] for name, preset in (_SHAPES | _OTHERS).items()}
"""Parameters of each preset's decoder; written down, so that listing them builds no model."""


# Of the hub's ids of these models: who publishes them, and what does not change their shape.
_PUBLISHERS = frozenset({"meta-llama", "qwen", "mistralai", "huggingfacetb"})
_VARIANT = re.compile(r"-(instruct|chat|base|hf|thinking|2507|v0\.3)(?=-|$)")


def preset_config(name: str) -> ModelConfig | None:
    """The configuration of a preset, whatever its case; None if there is no such preset.

    A preset is also found by its publisher's id on the hub, such as Qwen/Qwen3-8B.
    """
    raw = preset_raw(name)
    return None if raw is None else ModelConfig.from_dict(raw)


def preset_raw(name: str) -> dict[str, Any] | None:
    """What config.json says of a preset, found as above; None if there is no such preset."""
    name = _preset_name(name)
    other = _OTHERS.get(name)
    if other is not None:
        raw, hidden, layers, heads, kv_heads, more, _ = other
        sizes = {"hidden_size": hidden, "num_hidden_layers": layers}
        sizes |= {"num_attention_heads": heads, "num_key_value_heads": kv_heads}
        return raw | sizes | more
    shape = _SHAPES.get(name)
    if shape is None:
        return None
    family, hidden, inner, layers, heads, kv_heads, vocabulary, tied, _ = shape
    raw = _COMMON[family] | {
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "tie_word_embeddings": tied,
    }
    if name.startswith("llama-3.2"):
        raw["rope_scaling"] = _LLAMA3_ROPE | {"factor": 32.0}
    if vocabulary is not None:
        raw["vocab_size"] = vocabulary
    return raw


def _preset_name(name: str) -> str:
    """`name` in small letters, and an id of the hub as the preset that it is a variant of."""
    publisher, slash, model = name.lower().rpartition("/")
    if not slash or publisher not in _PUBLISHERS:
        return name.lower()
    return _VARIANT.sub("", model.removeprefix("meta-"))


def unknown_model(model: str) -> ConfigError:
    """The error for a name that is neither a path nor a hub id nor a preset."""
    near = difflib.get_close_matches(model.lower(), NAMES, n=1, cutoff=0.5)
    meant = f" Did you mean {near[0]}?" if near else ""
    return ConfigError(
        f"There is no model directory, config.json or .gguf file {model}, and no preset of that "
        f"name.{meant} Presets: {', '.join(NAMES)}."
    )
