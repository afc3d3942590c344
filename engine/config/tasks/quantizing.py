"""Settings of merge and quantize, which write a model."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import BeforeValidator

from engine.config.choices import MAX_SHARD_SIZE, MergeOnto, StoredType
from engine.config.data_names import DataNames
from engine.config.given_adapters import Adapters
from engine.config.publishing import Publishing
from engine.config.settings import setting
from engine.config.spelling import DTYPES, as_text, shard_size, spelled
from engine.config.tasks.inference import Paths

StoredBits = Literal[4, 8, 16]


def _bits(value: object) -> object:
    text = str(value).lower().removesuffix("bit").rstrip("- ")
    named = {"nf4": 4, "int8": 8, "4": 4, "8": 8, "16": 16}
    return named.get(text, value)


class WrittenModelSettings(Publishing):
    """A model to read, and the directory to write."""

    model: Annotated[str, BeforeValidator(as_text)] = setting(
        ..., "Model", "Hugging Face directory, hub id or .gguf file", min_length=1
    )
    random_weights: bool = setting(
        False,
        "Model",
        "to measure memory and time: random weights in the shape of --model, a folder with "
        "config.json or a size by name, such as Qwen/Qwen3-8B",
    )
    output: Path = setting(..., "Output", "new directory for the model")
    max_shard_size: Annotated[int, BeforeValidator(shard_size)] = setting(
        MAX_SHARD_SIZE, "Output", "largest file, in GB (10^9 bytes) or with a unit", ge=1000
    )


class MergeSettings(WrittenModelSettings):
    """`engine merge`."""

    adapter: Adapters = setting(
        ...,
        "Model",
        "adapter to merge; PATH=0.5 weighs it, and of several the weighted sum is merged",
        repeat=True,
        min_length=1,
    )
    onto: Annotated[MergeOnto, spelled({"dequantized": "dequantised"})] = setting(
        "original", "Output", "the weights as they are, or as 4-bit training saw them"
    )
    check: DataNames = setting(
        (), "Output", "rows on which to compare the result with the adapter as trained", repeat=True
    )
    query: str | None = setting(
        None, "Output", "SQL query whose rows are read, where --check is the URL of a database"
    )
    verify: bool = setting(
        True, "Output", "compare logits of the result with those of model and adapter on 64 tokens"
    )
    dtype: Annotated[StoredType | None, spelled(DTYPES)] = setting(
        None, "Output", "type of all tensors; by default each keeps its own"
    )


class QuantizeSettings(WrittenModelSettings):
    """`engine quantize`."""

    adapter: Adapters = setting(
        (),
        "Model",
        "adapter to merge before; PATH=0.5 weighs it, and several are added up",
        repeat=True,
    )
    bits: Annotated[StoredBits, BeforeValidator(_bits)] = setting(
        4, "Output", "4: NF4 with double quantisation; 8: rows of int8; 16: no quantisation"
    )
    dtype: Annotated[Literal["bfloat16", "float16", "float32"] | None, spelled(DTYPES)] = setting(
        None,
        "Output",
        "type of what is not quantised; by default float16 where the model has that, else bfloat16",
    )
    data: Paths = setting(
        (), "Output", "rows on which to measure perplexity before and after", repeat=True
    )
    limit_rows: int | None = setting(None, "Output", "only the first N rows of --data", ge=1)
    query: str | None = setting(
        None, "Output", "SQL query whose rows are read, where --data is the URL of a database"
    )
