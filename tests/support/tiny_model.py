"""A complete tiny model that can chat, and a model source of random weights."""

import json
import shutil
import string
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer as Backend
from tokenizers import decoders
from tokenizers.models import BPE

from models.config.model_config import ModelConfig
from models.tensor_names import expected_tensors

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
GOLDEN = Path(__file__).parents[1] / "fixtures" / "golden"


def write_tiny_model(target: Path, family: str = "qwen3") -> Path:
    """A Hugging Face directory of 2 layers and 128 tokens that can chat.

    The last norm is scaled up: with the golden one, a frozen head cannot give any token a
    probability near 1, and no adapter could learn a row by heart.
    """
    target.mkdir(parents=True)
    shutil.copy(GOLDEN / family / "config.json", target / "config.json")
    weights = load_file(GOLDEN / family / "model.safetensors")
    weights["model.norm.weight"] = weights["model.norm.weight"] * 4
    save_file(weights, target / "model.safetensors", {"format": "pt"})
    write_tokenizer(target)
    return target


CHARACTERS = f"{string.ascii_letters}{string.digits} \n.,:;!?'()_-+*/=<>"


def write_tokenizer(target: Path, characters: str = CHARACTERS) -> None:
    """The files of a tokenizer of these characters (83 ids) and a ChatML template."""
    vocab = {text: index for index, text in enumerate(["<pad>", "<|im_start|>", "<|im_end|>"])}
    vocab |= {text: index + 3 for index, text in enumerate(characters)}
    tokenizer = Backend(BPE(vocab, []))
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens(["<pad>", "<|im_start|>", "<|im_end|>"])
    tokenizer.save(str(target / "tokenizer.json"))
    config = {"eos_token": "<|im_end|>", "pad_token": "<pad>", "chat_template": CHATML}
    (target / "tokenizer_config.json").write_text(json.dumps(config))


class RandomSource:
    """Random bfloat16 weights, made when they are asked for."""

    def __init__(self, config: ModelConfig) -> None:
        self.config = config
        self._shapes = expected_tensors(config)

    def names(self) -> list[str]:
        return list(self._shapes)

    def tensor(self, name: str) -> torch.Tensor:
        return (torch.randn(self._shapes[name]) * 0.02).to(torch.bfloat16)

    def codes(self, name: str) -> None:
        """Nothing is quantised."""

    def release(self, name: str) -> None:
        """Nothing is mapped."""
