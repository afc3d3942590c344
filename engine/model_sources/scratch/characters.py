"""The character tokenizer of 133 ids for new models.

    0 [PAD]   1 [UNK]   2 [EOS]   3 to 97 the printable characters of ASCII, 98 to 132 `COMPOUNDS`

A text is read from its start, and the longest of all tokens that fits comes next: a compound before
its characters. So decoding the ids gives the text again, to the character, whatever stands in it of
printable ASCII, line ends and tabs; any other character is [UNK], and is lost.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

from tokenizers import AddedToken

from engine.model_sources.gguf.longest_match import longest_match

PAD, UNKNOWN, END = "[PAD]", "[UNK]", "[EOS]"
TURN, TURN_END = "<|im_start|>", "<|im_end|>"
CHARACTERS = tuple(chr(code) for code in range(32, 127))
COMPOUNDS = (
    TURN, TURN_END, "<think>", "</think>", "```",
    "\n", "\t", "\n\n", "  ", "    ", "        ",
    "system", "user", "assistant",
    "def ", "class ", "return ", "import ", "from ", "self", "for ", " in ", "if ", "else", "not ",
    "None", "True", "False", "():", " = ",
    "the ", "and ", "ing ", " of ", " to ",
)  # fmt: skip
TOKENS = (PAD, UNKNOWN, END, *CHARACTERS, *COMPOUNDS)
SPECIAL = (PAD, UNKNOWN, END, TURN, TURN_END)

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


@cache
def serialised_characters() -> str:
    """The tokenizer.json."""
    backend = longest_match(TOKENS, UNKNOWN)
    backend.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in SPECIAL])
    return str(backend.to_str(pretty=True))


class CharacterTokenizer:
    """The files of the character tokenizer, as a model source offers them."""

    path = Path("char")
    raw_config: dict[str, Any] = {}  # noqa: RUF012

    def tokenizer_json(self) -> str:
        return serialised_characters()

    def tokenizer_model(self) -> None:
        """None: it is no SentencePiece file."""

    def tokenizer_config(self) -> dict[str, Any]:
        return {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "pad_token": PAD,
            "unk_token": UNKNOWN,
            "eos_token": END,
            "additional_special_tokens": [TURN, TURN_END],
            "clean_up_tokenization_spaces": False,
            "chat_template": CHAT_TEMPLATE,
        }

    def chat_template(self, name: str = "default") -> str | None:
        return CHAT_TEMPLATE if name == "default" else None

    def tokenizer_files(self) -> dict[str, bytes]:
        config = json.dumps(self.tokenizer_config(), indent=2) + "\n"
        return {
            "tokenizer.json": self.tokenizer_json().encode(),
            "tokenizer_config.json": config.encode(),
            "chat_template.jinja": CHAT_TEMPLATE.encode(),
        }
