"""Say in one line what becomes of weights that files hold quantised.

Every verb says it through `say`, and tells with a function what it does to one tensor.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable

from engine.config.choices import Quantization
from engine.config.train_config import TrainConfig
from engine.model_sources.interface.model_source import ModelSource
from engine.model_sources.quantised.stored_codes import kind_of, used_weights
from models.tensor_layout import carried_prefixes
from models.tensor_names import is_quantised

log = logging.getLogger(__name__)

WORDS = {"nf4": "NF4", "int8": "8-bit rows"}
STAYS = "stay as they are"
_DECODED = "are decoded"

Fate = Callable[[str], str]
"""Name of a tensor -> what becomes of such tensors, as the end of a sentence."""


def say(source: ModelSource, fate: Fate) -> None:
    """Log the one line about `source`; nothing where its files hold no quantised weight."""
    line = stored_line(source, fate)
    if line:
        log.info("%s", line)


def say_loaded(source: ModelSource, asked: Quantization | None, dense: bool = False) -> None:
    """Say what becomes of a model that `build_model` loads in the quantisation `asked`."""
    say(source, loaded_fate(source, asked, dense=dense))


def say_decoded(source: ModelSource, then: str) -> None:
    """Say that all codes of `source` are decoded, and `then` what is done with them."""
    say(source, lambda name: f"{_DECODED} and {then}" if source.stored_as(name) else f"are {then}")


def stored_line(source: ModelSource, fate: Fate) -> str | None:
    """The line about a model whose files hold quantised weights; None for any other.

    It counts the quantised tensors, and the projections beside them that are not.
    """
    others = carried_prefixes(source.config)
    counts: Counter[tuple[str | None, str]] = Counter()
    for name in source.names():
        form = source.stored_as(name)
        if (form or is_quantised(name)) and not name.startswith(others):
            counts[form, fate(name)] += 1
    if not any(form for form, _ in counts):
        return None
    parts = [
        f"{count} weights stored in {form or '16 bits or more'} {what}"
        for (form, what), count in counts.items()
    ]
    return f"{source.path}: {'; '.join(parts)}"


def loaded_fate(
    source: ModelSource, asked: Quantization | None, *, dense: bool = False, written: bool = False
) -> Fate:
    """What `build_model` does where it is asked for `asked`.

    With `dense` it gets the decoded source; `written` are values that decode what it loads.
    """
    kind = None if dense else used_weights(source, asked)[0]
    first = None if dense else used_weights(source, None)[0]
    uses_codes = first is not None and kind == first

    def fate(name: str) -> str:
        form = source.stored_as(name)
        codes = source.codes(name) if form else None
        experts = ".mlp.experts." in name
        if uses_codes and codes is not None and kind_of(codes) == kind and is_quantised(name):
            return _DECODED if written else STAYS
        anew = asked if is_quantised(name) and (experts or not uses_codes) else None
        end = f"quantised to {WORDS[anew]}" if anew else ""
        if form:
            return f"{_DECODED} and {end}" if end else _DECODED
        return f"are {end}" if end else STAYS

    return fate


def run_fate(config: TrainConfig, source: ModelSource) -> Fate:
    """What a training run of `config` does to the weights of its base, or of its teacher."""
    four_bit = config.method == "qlora"
    return loaded_fate(source, "nf4" if four_bit else None, dense=not four_bit)
