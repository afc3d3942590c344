"""Options that several verbs share, so that they read alike everywhere."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from engine.config.spelling import json_object
from engine.errors import ConfigError


class Base(StrEnum):
    """How the base model's weights are held."""

    none = "none"
    nf4 = "nf4"
    int8 = "int8"

    @property
    def quantization(self) -> Literal["nf4", "int8"] | None:
        """The value for `engine.load_model`'s `quantize`."""
        if self is Base.none:
            return None
        return "nf4" if self is Base.nf4 else "int8"


Model = Annotated[str, typer.Option(help="Hugging Face directory, hub id or .gguf file.")]
Adapter = Annotated[Path | None, typer.Option(help="Adapter to put on the model.")]
Quantize = Annotated[Base, typer.Option(help="Quantise the base model's weights as they load.")]
Device = Annotated[str, typer.Option(help="auto, cpu or cuda.")]
Dtype = Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")]
TemplateKwargs = Annotated[
    str | None,
    typer.Option(
        "--chat-template-kwargs",
        metavar="JSON",
        help='Further variables of the chat template: {"enable_thinking": false}.',
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object instead.")]


def template_kwargs(text: str | None) -> dict[str, Any]:
    """The variables that `--chat-template-kwargs` gives. Raises `ConfigError`."""
    try:
        found = json_object(text)
    except ValueError as error:
        raise ConfigError(f"--chat-template-kwargs {text!r} {error}.") from error
    if not isinstance(found, dict):
        raise ConfigError(
            f"--chat-template-kwargs {text!r} should be a JSON object, such as "
            '{"enable_thinking": false}.'
        )
    return found
