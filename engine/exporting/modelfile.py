"""An Ollama Modelfile: an explicit template, and where answers stop.

Ollama guesses a template where none is given, and an unknown one makes gibberish. Its templates are
Go's; those of the common chat formats are written here, chosen by the special tokens that the
model's own template puts around a turn. Another format gets none: Ollama then reads the file's own.
"""

from __future__ import annotations

from dataclasses import dataclass

from engine.model_sources.interface.model_source import ModelDescription

_CHATML = """{{- range .Messages }}<|im_start|>{{ .Role }}
{{ .Content }}<|im_end|>
{{ end }}<|im_start|>assistant
"""
_LLAMA3 = """{{- range .Messages }}<|start_header_id|>{{ .Role }}<|end_header_id|>

{{ .Content }}<|eot_id|>{{ end }}<|start_header_id|>assistant<|end_header_id|>

"""
_MISTRAL = """{{- if .System }}[INST] {{ .System }}

{{ .Prompt }} [/INST]{{ else }}[INST] {{ .Prompt }} [/INST]{{ end }}"""


@dataclass(frozen=True)
class _Format:
    mark: str
    template: str
    stops: tuple[str, ...]


_FORMATS = (
    _Format("<|im_start|>", _CHATML, ("<|im_end|>", "<|im_start|>")),
    _Format("<|start_header_id|>", _LLAMA3, ("<|eot_id|>", "<|start_header_id|>")),
    _Format("[INST]", _MISTRAL, ("[INST]", "</s>")),
)


def modelfile(source: ModelDescription, file: str) -> str:
    """The text of a Modelfile for the GGUF file named `file` beside it."""
    lines = [f"FROM ./{file}"]
    own = source.chat_template() or ""
    form = next((form for form in _FORMATS if form.mark in own), None)
    if form is not None:
        lines.append(f'TEMPLATE """{form.template}"""')
        lines += [f'PARAMETER stop "{stop}"' for stop in form.stops]
    lines.append(f"PARAMETER num_ctx {min(8192, source.config.max_position_embeddings)}")
    return "\n".join(lines) + "\n"
