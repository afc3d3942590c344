"""An Ollama Modelfile: an explicit template, and where answers stop.

Ollama guesses a template where none is given, and an unknown one makes gibberish. Its templates are
Go's; those of the common chat formats are written here, chosen by the special tokens that the
model's own template puts around a turn. Another format gets none: Ollama then reads the file's own.

A system message that the model's own template writes where a conversation has none becomes the
Modelfile's. What else that template writes otherwise is said.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass

from engine.errors import DataError
from engine.model_sources.interface.model_source import ModelDescription
from engine.tokenization.chat_template import ChatTemplate
from engine.tokenization.tokenizer import load_tokenizer

log = logging.getLogger(__name__)

_CHATML = """{{- range .Messages }}<|im_start|>{{ .Role }}
{{ .Content }}<|im_end|>
{{ end }}<|im_start|>assistant
"""
_LLAMA3 = """{{- range .Messages }}<|start_header_id|>{{ .Role }}<|end_header_id|>

{{ .Content }}<|eot_id|>{{ end }}<|start_header_id|>assistant<|end_header_id|>

"""
_MISTRAL = """{{- if .System }}[INST] {{ .System }}

{{ .Prompt }} [/INST]{{ else }}[INST] {{ .Prompt }} [/INST]{{ end }}"""


Turns = list[dict[str, str]]
_MARK = "0SYSTEM0"
_TALK = [
    {"role": "user", "content": "One?"},
    {"role": "assistant", "content": "Two."},
    {"role": "user", "content": "Three?"},
]


def _chatml(turns: Turns) -> str:
    text = "".join(f"<|im_start|>{t['role']}\n{t['content']}<|im_end|>\n" for t in turns)
    return f"{text}<|im_start|>assistant\n"


def _llama3(turns: Turns) -> str:
    def head(role: str) -> str:
        return f"<|start_header_id|>{role}<|end_header_id|>\n\n"

    return "".join(f"{head(t['role'])}{t['content']}<|eot_id|>" for t in turns) + head("assistant")


@dataclass(frozen=True)
class _Format:
    """`written` is what Ollama makes of a conversation, None where it joins turns by itself."""

    mark: str
    template: str
    stops: tuple[str, ...]
    written: Callable[[Turns], str] | None = None


_FORMATS = (
    _Format("<|im_start|>", _CHATML, ("<|im_end|>", "<|im_start|>"), _chatml),
    _Format("<|start_header_id|>", _LLAMA3, ("<|eot_id|>", "<|start_header_id|>"), _llama3),
    _Format("[INST]", _MISTRAL, ("[INST]", "</s>")),
)


def modelfile(source: ModelDescription, file: str) -> str:
    """The text of a Modelfile for the GGUF file named `file` beside it."""
    lines = [f"FROM ./{file}"]
    own = source.chat_template() or ""
    form = next((form for form in _FORMATS if form.mark in own), None)
    if form is not None:
        lines.append(f'TEMPLATE """{form.template}"""')
        system = _check(load_tokenizer(source).chat_template, form, file)
        if system:
            lines.append(f'SYSTEM """{system}"""')
        lines += [f'PARAMETER stop "{stop}"' for stop in form.stops]
    lines.append(f"PARAMETER num_ctx {min(8192, source.config.max_position_embeddings)}")
    return "\n".join(lines) + "\n"


def _check(template: ChatTemplate, form: _Format, file: str) -> str:
    """The model's own system message, "" for none; says what Ollama will write otherwise."""
    try:
        system = _default_system(template)
        if form.written is None:
            return system
        own = template.render(_TALK, add_generation_prompt=True)
    except DataError as error:
        log.warning("%s: its template cannot be compared with Ollama's: %s", file, error)
        return ""
    finally:
        template.close()
    turns = [{"role": "system", "content": system}, *_TALK] if system else _TALK
    theirs = form.written(turns)
    # The token that begins a text is Ollama's to add.
    if own not in (theirs, template.special_tokens.get("bos_token", "") + theirs):
        log.warning(
            "%s: the model's own chat template writes %r, of which the Modelfile's template makes "
            "%r: answers in Ollama may be worse. Edit its TEMPLATE, or leave it out.",
            file, own, theirs,
        )  # fmt: skip
    return system


def _default_system(template: ChatTemplate) -> str:
    """What a template writes as the system message of a conversation that has none."""

    def rendered(*before: dict[str, str]) -> str:
        return template.render([*before, _TALK[0]], add_generation_prompt=True)

    plain = rendered()
    try:
        prefix, _, suffix = rendered({"role": "system", "content": _MARK}).partition(_MARK)
    except DataError:  # a template that knows no system message
        return ""
    if not (plain.startswith(prefix) and plain.endswith(suffix)):
        return ""
    system = plain[len(prefix) : len(plain) - len(suffix)]
    same = system and rendered({"role": "system", "content": system}) == plain
    return system if same and '"""' not in system else ""
