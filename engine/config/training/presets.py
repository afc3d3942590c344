"""Named starting points for `engine train --preset NAME`.

A preset is a handful of settings under the configuration file and the flags, both of which win over
it. The sizes in the names say which GPU memory the settings were chosen for with a model of 7 to 8
billion parameters; smaller models leave room to raise `batch_size` or `max_length`. Where a preset
sets `fit_memory`, its `batch_size` is a whole step's: the planner cuts it into micro-batches, and
takes the recomputation and memory options, that are the fastest in that memory.
"""

from typing import Any

PRESETS: dict[str, dict[str, Any]] = {
    "cpu-demo": {
        "method": "qlora",
        "device": "cpu",
        "dtype": "float32",
        "max_length": 256,
        "batch_size": 4,
        "max_steps": 60,
        "learning_rate": 5e-4,
        "checkpoint_every": 20,
    },
    "auto": {
        "method": "qlora",
        "batch_size": 16,
        "accumulate": 1,
        "max_length": 2048,
        "fit_memory": "auto",
    },
    "qlora-8gb": {
        "method": "qlora",
        "batch_size": 1,
        "accumulate": 16,
        "max_length": 1024,
        "gradient_checkpointing": "full",
        "loss_chunk_tokens": 256,
    },
    "qlora-12gb": {
        "method": "qlora",
        "batch_size": 16,
        "accumulate": 1,
        "max_length": 2048,
        "fit_memory": "11.4GiB",
    },
    "qlora-16gb": {
        "method": "qlora",
        "batch_size": 16,
        "accumulate": 1,
        "max_length": 2048,
        "fit_memory": "15.2GiB",
    },
    "qlora-24gb": {
        "method": "qlora",
        "batch_size": 4,
        "accumulate": 4,
        "max_length": 2048,
        "packing": True,
    },
    "lora-16bit": {
        "method": "lora",
        "batch_size": 2,
        "accumulate": 8,
        "max_length": 2048,
        "learning_rate": 1e-4,
    },
    "full": {
        "method": "full",
        "batch_size": 1,
        "accumulate": 16,
        "learning_rate": 2e-5,
        "gradient_checkpointing": "full",
    },
    "scratch": {
        "method": "scratch",
        "model": "builtin:scratch",
        "hidden_dropout": 0.1,
        "attention_dropout": 0.1,
        "max_length": 512,
        "batch_size": 16,
        "packing": True,
        "learning_rate": 5e-4,
        "weight_decay": 0.1,
        "betas": (0.9, 0.95),
    },
}

OTHER_NAMES = {"qwen_4080_16g": "qlora-16gb"}
"""Names that earlier configurations have for a preset."""

SUMMARIES: dict[str, str] = {
    "cpu-demo": "60 QLoRA steps on a CPU with a model of some hundred million parameters",
    "auto": "QLoRA, 16 examples a step, in the way that is fastest in this machine's memory",
    "qlora-8gb": "7-8B model on an 8 GB GPU, examples of up to 1,024 tokens",
    "qlora-12gb": "7-8B model on a 12 GB GPU, examples of up to 2,048 tokens, 16 a step",
    "qlora-16gb": "7-8B model on a 16 GB GPU, examples of up to 2,048 tokens, 16 a step",
    "qlora-24gb": "7-8B model on a 24 GB GPU, packed examples",
    "lora-16bit": "LoRA over 16-bit weights, for models up to half the GPU's memory",
    "full": "every weight, at a learning rate of 2e-5",
    "scratch": "a new model of 12 layers that reads characters, from random weights",
}
