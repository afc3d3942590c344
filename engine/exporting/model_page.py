"""The page of a result on the hub, where it has none."""

from __future__ import annotations

import json


def model_page(repository: str, base: str | None, gguf: str | None = None) -> str:
    """The text of a README.md: front matter by which the hub knows what this is, and its use.

    `base` is the public name of the model that it was made from; `gguf` one of its GGUF files.
    """
    front = ["---"]
    if base is not None:
        front.append(f"base_model: {json.dumps(base)}")
        front.append(f"base_model_relation: {'quantized' if gguf else 'finetune'}")
    front.append(f"library_name: {'gguf' if gguf else 'transformers'}")
    front += ["pipeline_tag: text-generation", "---", ""]
    made = "" if base is None else f"Made from `{base}` with engine.\n\n"
    if gguf is not None:
        use = f"    engine generate --model {repository}/{gguf} --prompt 'Hello'\n"
        use += f"    llama-cli -hf {repository}\n"
    else:
        use = f"    engine generate --model {repository} --prompt 'Hello'\n"
    return "\n".join(front) + f"\n# {repository.rpartition('/')[2]}\n\n{made}{use}"
