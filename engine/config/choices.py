"""The values that settings may take, defined once, without torch.

Each `Literal` is the type of a setting; the tuple after it lists its values in the order in which
they are shown.
"""

from typing import Literal, get_args

Method = Literal["qlora", "lora", "full", "scratch"]
METHODS: tuple[Method, ...] = get_args(Method)
PretrainedMethod = Literal["qlora", "lora", "full"]
EVERY_WEIGHT: tuple[Method, ...] = ("full", "scratch")
"""Methods that train all weights of a model, and no adapter."""

Policy = Literal["none", "selective", "full"]
POLICIES: tuple[Policy, ...] = get_args(Policy)
"""Checkpointing policies, the fastest first; `models.layers` has the same, and a test says so."""

Quantization = Literal["nf4", "int8"]
QUANTIZATIONS: tuple[Quantization, ...] = get_args(Quantization)

ComputeType = Literal["auto", "float32", "bfloat16", "float16"]
StoredType = Literal["float32", "bfloat16", "float16"]
Auto = Literal["auto"]
SavedModule = Literal["embed_tokens", "lm_head"]
SAVED_MODULES: tuple[SavedModule, ...] = get_args(SavedModule)
"""Modules that can be trained whole beside an adapter."""
HeadPrecision = Literal["16bit", "8bit"]
EmbeddingOn = Literal["device", "host"]
Offload = Literal["checkpoints", "weights"]
Optimizer = Literal["adamw8bit", "adamw", "lion8bit", "adafactor", "muon"]
Schedule = Literal[
    "cosine", "linear", "constant", "polynomial", "warmup_stable_decay", "cosine_with_restarts"
]  # fmt: skip
DecayShape = Literal["linear", "cosine", "1-sqrt"]
ObjectiveName = Literal["sft", "dpo", "ipo", "kto", "orpo", "simpo", "cpo", "distill"]
AnswerObjective = Literal["sft", "dpo", "ipo", "kto", "orpo", "simpo", "cpo"]
"""What `engine eval` can judge rows by."""
PAIR_OBJECTIVES: tuple[ObjectiveName, ...] = ("dpo", "ipo", "orpo", "simpo", "cpo")
"""What learns from pairs of a better and a worse answer."""
Tracker = Literal["tensorboard", "wandb"]
Thinking = Literal["auto", "keep", "strip", "empty"]
Streaming = Literal["auto", "on", "off"]
Sharding = Literal["none", "weights"]
LogLevel = Literal["DEBUG", "INFO", "WARNING", "ERROR"]
GGUFType = Literal["f32", "f16", "bf16", "q8_0", "q4_0", "q5_1", "q4_k_m", "q5_k_m", "q6_k"]
PipelineEvents = Literal["text", "jsonl"]
Program = Literal["axolotl", "llama-factory", "trl", "mlx-lm"]
TARGET_PRESETS = ("all", "attn", "qv")
"""Names for sets of projections; `models.adapters` resolves them."""

Metric = Literal[
    "l2-reconstruction", "l2-output", "l2-weights", "l2-weights-largest", "gradient", "ov",
    "cosine", "routed-mass", "random",
]  # fmt: skip
METRICS: tuple[Metric, ...] = get_args(Metric)
METRICS_WITH_DATA: tuple[Metric, ...] = ("l2-reconstruction", "l2-output", "gradient", "cosine",
    "routed-mass",
)  # fmt: skip
Prunable = Literal["heads", "kv-groups", "mlp", "layers", "experts"]
PRUNABLES: tuple[Prunable, ...] = get_args(Prunable)
METRICS_OF: dict[Prunable, tuple[Metric, ...]] = {
    "heads": tuple(metric for metric in METRICS if metric not in ("cosine", "routed-mass")),
    "kv-groups": tuple(metric for metric in METRICS if metric not in ("cosine", "routed-mass")),
    "mlp": ("l2-reconstruction", "l2-output", "l2-weights", "random"),
    "layers": ("l2-reconstruction", "cosine", "random"),
    "experts": ("routed-mass", "random"),
}
"""What each part of a model can be ranked by."""
RepairMethod = Literal["none", "least-squares"]
PruneMode = Literal["zero", "mask", "structural"]
PRUNE_MODES: tuple[PruneMode, ...] = get_args(PruneMode)
HeadKind = Literal["attention", "delta"]
Scope = Literal["sensitivity", "global", "layer"]
Granularity = Literal["head", "kv-group"]
MergeOnto = Literal["original", "dequantised"]
MAX_SHARD_SIZE = 5 * 10**9
"""Bytes of the largest file of a model that is written, where nothing else is asked for."""

GPU_TFLOPS = {
    "h200": 790.0, "h100": 790.0, "h800": 790.0, "a100": 280.0, "a800": 280.0,
    "l40s": 362.0, "l40": 181.0, "6000ada": 364.0, "a6000": 155.0, "a40": 150.0, "l4": 121.0,
    "a10": 125.0, "a10g": 70.0, "v100": 125.0, "t4": 65.0,
    "5090": 209.0, "5080": 113.0, "5070": 62.0, "4090": 165.0, "4080": 97.0, "4070": 58.0,
    "4060ti": 44.0, "3090": 71.0, "3080": 60.0, "3060": 25.0,
}  # fmt: skip
"""Tera-operations per second of dense 16-bit products with fp32 sums; the key is a GPU's name.

Of H200 (and H100, H800, which are the same chip) and A100 what large products reach; of the others
what their data sheets say, twice the rate of fp32 of a GeForce.
"""

DETERMINISTIC = (
    "equal runs give equal bits on a GPU too, more slowly; refused by name where an op has no such "
    "form. On a CPU they do anyway, with equal --threads"
)
"""Help of the setting that training and running a model share."""

RowShape = Literal[
    "auto", "prompt-response", "prompt-completion", "question-answer", "alpaca", "messages",
    "sharegpt", "text", "preference",
]  # fmt: skip
"""Shapes that `engine data convert` writes rows in."""

CompareOn = Literal["all", "prompt", "response"]
"""What of two rows is compared."""
