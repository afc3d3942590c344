"""A complete tiny model, and small tokenizers with the chat templates of the common families."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, decoders, pre_tokenizers, processors, trainers
from tokenizers import Tokenizer as Backend
from tokenizers.models import BPE

from engine.tokenization.tokenizer import Tokenizer
from engine.verbs.training.train import train
from tests.support.hub_stub import HubStub, client_of, running_stub
from tests.support.small_runs import small_run
from tests.support.tiny_model import write_tiny_model, write_tokenizer

TEMPLATES = Path(__file__).parents[1] / "fixtures" / "templates"
SPECIAL = (
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<s>", "</s>", "[INST]", "[/INST]",
    "[TOOL_CALLS]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[TOOL_RESULTS]", "[/TOOL_RESULTS]",
    "<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>",
)  # fmt: skip
TEXT = [
    "The quick brown fox jumps over the lazy dog and asks what the function does.",
    "def area(radius):\n    return 3.14159 * radius ** 2\n",
    "system user assistant tool What is the answer? It is four. Thank you very much!",
]
NAMED = {
    "chatml": {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "pad_token": "<|im_end|>"},
    "llama3": {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>"},
    "qwen2_5": {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"},
    "qwen3": {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"},
    "mistral": {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "</s>"},
}


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


@pytest.fixture
def ended(tiny_model: Path, write_rows: Callable[..., Path], tmp_path: Path) -> Path:
    """The directory of a run of 6 steps; beside it `other.jsonl`, whose rows are of no kind."""
    train(small_run(tiny_model, write_rows(9), tmp_path / "run"), console=False)
    (tmp_path / "other.jsonl").write_text('{"left": 1}\n')
    return tmp_path / "run"


@pytest.fixture(scope="session")
def backend_json() -> str:
    """A byte-level BPE tokenizer with 400 entries and the families' special tokens."""
    backend = Backend(BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = processors.ByteLevel(trim_offsets=False)
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=[AddedToken(token, special=True, normalized=False) for token in SPECIAL],
    )
    backend.train_from_iterator(TEXT, trainer)
    return str(backend.to_str())


@pytest.fixture(scope="session")
def make_tokenizer(backend_json: str) -> Callable[..., Tokenizer]:
    """Make a tokenizer with a family's template (or any) and its named special tokens."""

    def make(family: str = "chatml", template: str | None = None, **options: Any) -> Tokenizer:
        source = (TEMPLATES / f"{family}.jinja").read_text() if template is None else template
        named = options.pop("special_tokens", NAMED[family])
        return Tokenizer(Backend.from_str(backend_json), named, source, **options)

    return make


@pytest.fixture(scope="session")
def tokenizers_by_family(make_tokenizer: Callable[..., Tokenizer]) -> dict[str, Tokenizer]:
    """One tokenizer for each family, shared because each keeps a template process."""
    return {family: make_tokenizer(family) for family in NAMED}


@pytest.fixture
def stub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubStub]:
    """A stand-in of the hub that huggingface_hub asks, with an empty cache."""
    with running_stub() as server, client_of(server, str(tmp_path / "hub"), monkeypatch):
        yield server
