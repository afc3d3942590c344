"""One side of bench/cpu/generation.py: this engine, or transformers and bitsandbytes.

The file stands alone, so that the other side runs without this project on its path: the hub's
package `kernels`, which transformers imports where it is installed, has the name of one of ours.

Run as ``python generation_side.py SIDE WORK.json RESULT.json``; SIDE is ours, peers, or prepare,
which writes the model that both read as a Hugging Face directory.
"""

import json
import os
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[2]
Generate = Callable[[list[list[int]], int], list[list[int]]]
"""Prompts and a number of new tokens -> the new tokens of each prompt, the likeliest ones."""


def prepare(work: dict[str, Any]) -> None:
    """Write the model by transformers' own reader, or a small one of random weights."""
    from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

    if work["gguf"] is None:
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=256,
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            tie_word_embeddings=True,
        )
        LlamaForCausalLM(config).save_pretrained(work["directory"])
        return
    gguf = Path(work["gguf"])
    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype=torch.float32
    )
    # The reader dequantises the weights but leaves the model marked as quantised.
    model.hf_quantizer = None
    del model.config.quantization_config
    model.save_pretrained(work["directory"])


def ours(work: dict[str, Any]) -> Generate:
    """The engine's batched generation."""
    from engine.inference.batched import BatchedGenerator
    from engine.inference.request import RequestSettings
    from engine.model_sources.load_model import build_model
    from engine.model_sources.open import open_model_source
    from models.memory.lasting import keep_decoded

    model = build_model(
        open_model_source(work["directory"]),
        quantization="nf4" if work["four_bit"] else None,
        device=torch.device("cpu"),
        dtype=getattr(torch, work["dtype"]),
    )
    if work["keep_decoded"]:
        keep_decoded(model.layers, model.dtype)

    def generate(prompts: list[list[int]], tokens: int) -> list[list[int]]:
        generator = BatchedGenerator(model, slots=len(prompts))
        numbers = [generator.submit(ids, RequestSettings(tokens)) for ids in prompts]
        events = generator.run()
        return [[e.token for e in events[n] if e.token is not None] for n in numbers]

    return generate


def peers(work: dict[str, Any]) -> Generate:
    """transformers' `generate`, over weights of bitsandbytes where they are in 4 bits."""
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    dtype = getattr(torch, work["dtype"])
    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )
    model = AutoModelForCausalLM.from_pretrained(
        work["directory"],
        dtype=dtype,
        device_map="cpu",
        attn_implementation="sdpa",
        quantization_config=quantization if work["four_bit"] else None,
    ).eval()
    model.generation_config.eos_token_id = None  # both sides make as many tokens as they are asked
    model.generation_config.pad_token_id = 0

    def generate(prompts: list[list[int]], tokens: int) -> list[list[int]]:
        ids = torch.tensor(prompts)
        whole = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, do_sample=False
        )
        made: list[list[int]] = whole[:, ids.shape[1] :].tolist()
        return made

    return generate


def measure(generate: Generate, prompts: list[list[int]], tokens: int) -> dict[str, Any]:
    """Seconds to the first token of every prompt, and tokens per second from there on.

    Processor time too, which other programs on the machine change less than the clock's.
    """
    generate(prompts, 4)
    started = time.perf_counter()
    generate(prompts, 1)
    first, cpu = time.perf_counter(), time.process_time()
    generate(prompts, 1)
    middle_cpu, middle = time.process_time(), time.perf_counter()
    made = generate(prompts, tokens)
    seconds = time.perf_counter() - middle
    cpu_seconds = time.process_time() - middle_cpu
    if [len(ids) for ids in made] != [tokens] * len(prompts):
        raise SystemExit(f"{[len(ids) for ids in made]} tokens came; {tokens} of each were asked")
    decoded = len(prompts) * (tokens - 1)
    to_first = min(first - started, middle - first)
    return {
        "first_token_seconds": to_first,
        "tokens_per_second": decoded / max(seconds - to_first, 1e-9),
        "cpu_ms_per_token": 1e3 * (cpu_seconds - (middle_cpu - cpu)) / decoded,
        "tokens": made,
    }


def hide_project() -> None:
    """Take this project off the path, and what an editable install of it put beside the path."""
    sys.path[:] = [path for path in sys.path if Path(path or os.curdir).resolve() != ROOT]
    sys.meta_path[:] = [
        finder
        for finder in sys.meta_path
        if not getattr(finder, "__module__", "").startswith("__editable___engine")
    ]
    if find_spec("models") is not None:
        raise SystemExit("this project's packages are still on the path of the other side")


def main(side: str, work_file: Path, result_file: Path) -> None:
    work = json.loads(work_file.read_text())
    if side == "ours":
        sys.path.insert(0, str(ROOT))
    else:
        hide_project()
    if side == "prepare":
        prepare(work)
        return
    generate = ours(work) if side == "ours" else peers(work)
    result = measure(generate, work["prompts"], work["tokens"])
    names = ["torch"] if side == "ours" else ["torch", "transformers", "bitsandbytes"]
    result |= {
        "threads": torch.get_num_threads(),
        "versions": {name: version(name) for name in names},
    }
    result_file.write_text(json.dumps(result))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]))
