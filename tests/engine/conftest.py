"""A complete tiny model: a golden checkpoint with a character tokenizer and a ChatML template."""

import json
import shutil
import string
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders
from tokenizers.models import BPE

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


def write_tokenizer(target: Path) -> None:
    """The files of a character tokenizer of 83 ids and a ChatML template."""
    characters = [*string.ascii_letters, *string.digits, *" \n.,:;!?'()_-+*/=<>"]
    vocab = {text: index for index, text in enumerate(["<pad>", "<|im_start|>", "<|im_end|>"])}
    vocab |= {text: index + 3 for index, text in enumerate(characters)}
    tokenizer = Tokenizer(BPE(vocab, []))
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens(["<pad>", "<|im_start|>", "<|im_end|>"])
    tokenizer.save(str(target / "tokenizer.json"))
    config = {"eos_token": "<|im_end|>", "pad_token": "<pad>", "chat_template": CHATML}
    (target / "tokenizer_config.json").write_text(json.dumps(config))


@pytest.fixture
def add_tokenizer() -> Callable[[Path], None]:
    """``add_tokenizer(folder)`` puts a character tokenizer of 83 ids beside a model."""
    return write_tokenizer


@pytest.fixture
def tiny_model(tmp_path: Path) -> Path:
    return write_tiny_model(tmp_path / "model")


@pytest.fixture
def write_rows(tmp_path: Path) -> Callable[..., Path]:
    """``write_rows(n)`` writes n short prompt/response rows of different lengths."""

    def write(count: int, name: str = "rows.jsonl") -> Path:
        path = tmp_path / name
        rows = [
            {"prompt": f"Word {index}?", "response": f"{'abc' * (index % 3 + 1)}{index}."}
            for index in range(count)
        ]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return path

    return write
