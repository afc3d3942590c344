"""The small files of a Hugging Face directory: configuration, tokenizer, templates."""

from __future__ import annotations

from pathlib import Path

from engine.errors import ConfigError
from engine.model_sources.interface.checks import read_config
from engine.model_sources.vocabulary.folder import TokenizerFolder
from engine.storage.safe_files import not_shown, read_json_object


class ModelFiles(TokenizerFolder):
    """What the folder `path` says of its model without its weights, which are not looked for.

    Raises `ConfigError` for a missing or unusable config.json.
    """

    def __init__(self, path: Path | str) -> None:
        super().__init__(path)
        config_path = self.path / "config.json"
        if not self.path.is_dir() or not config_path.exists():
            raise ConfigError(
                f"{self.path} holds no config.json, so it is not a Hugging Face model directory."
                f"{folder_hint(self.path)}"
            )
        self.raw_config = read_json_object(config_path, ConfigError)
        with not_shown(config_path):
            self.config = read_config(self.raw_config, str(config_path))
        self.generation_config = self._optional_json("generation_config.json")


def folder_hint(folder: Path) -> str:
    """A sentence about what `folder` holds instead of a model, empty if nothing telling."""
    if not folder.is_dir():
        return f" There is no folder {folder}." if not folder.exists() else ""
    if (folder / "adapter_config.json").exists():
        return " It holds a LoRA adapter: name its base model here, and the adapter as adapter."
    if (folder / "adapter" / "adapter_config.json").exists():
        return (
            f" It is a run that trained an adapter: name its base model here, and `{folder}` as "
            "adapter; or merge them first with `engine merge`."
        )
    files = sorted(path.name for path in folder.glob("*.gguf"))
    if len(files) > 1:
        return " It holds several GGUF files: name one of them."
    if not files:
        return ""
    return f" It holds a GGUF file: give it as --model {folder / files[0]} to use it."
