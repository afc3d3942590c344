"""Train a byte-level BPE tokenizer for a Hugging Face directory."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from engine.errors import DataError
from engine.storage import durable

START, END, TEXT_END = "<|im_start|>", "<|im_end|>", "<|endoftext|>"
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


@dataclass(frozen=True)
class TrainedVocabulary:
    """What was trained: ids with special tokens, and how well they compress the training text."""

    size: int
    text_bytes: int
    tokens: int


def train_tokenizer(
    texts: Sequence[str],
    output_dir: Path,
    vocab_size: int,
    special: Iterable[str] = (),
    describe: Callable[[Path], None] | None = None,
) -> TrainedVocabulary:
    """Train on texts and write tokenizer.json, tokenizer_config.json and a ChatML template.

    Every byte has a token, so that any text is encoded and decoded to itself.

    Args:
        texts: to train on.
        output_dir: must not exist, or be empty.
        vocab_size: most ids; at least the 256 bytes and the special tokens.
        special: further special tokens.
        describe: called with the folder before it gets its name.

    Raises:
        DataError: the vocabulary is too small for the bytes.
        ConfigError: the folder holds something.
        CheckpointError: it cannot be written.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

    names = list(dict.fromkeys((TEXT_END, START, END, *special)))
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    if vocab_size < len(alphabet) + len(names):
        raise DataError(
            f"A vocabulary of {vocab_size} cannot hold 256 bytes and {len(names)} special tokens; "
            f"at least {len(alphabet) + len(names)} are needed."
        )
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        initial_alphabet=sorted(alphabet),
        special_tokens=[AddedToken(name, special=True, normalized=False) for name in names],
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer, length=len(texts))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": END,
        "pad_token": TEXT_END,
        "additional_special_tokens": [name for name in names if name not in (END, TEXT_END)],
        "clean_up_tokenization_spaces": False,
        "chat_template": CHAT_TEMPLATE,
    }
    with durable.publish_directory(output_dir) as folder:
        durable.write_text(folder / "tokenizer.json", backend.to_str(pretty=True))
        durable.write_json(folder / "tokenizer_config.json", config)
        durable.write_text(folder / "chat_template.jinja", CHAT_TEMPLATE)
        if describe is not None:
            describe(folder)
    tokens = sum(len(encoding) for encoding in backend.encode_batch_fast(texts))
    size = sum(len(text.encode("utf-8", "replace")) for text in texts)
    return TrainedVocabulary(backend.get_vocab_size(), size, tokens)
