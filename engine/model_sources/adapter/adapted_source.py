"""A model source as an adapter changes it, apart from separate pairs.

What an adapter does to a model beside W + s B A of its layers' projections is done to the tensors
as they are read: trained copies of modules (`modules_to_save`), biases, rows of single tokens, LoRA
on the embedding, the head and small matrices, and what an initialisation takes from the base. The
projections' pairs are left to the graph (`models.adapters.attach_lora`) or to `engine merge`.

Where the model ties its head to the embedding, PEFT changes the one and leaves the other as it was;
then the head is a tensor of its own here, unless both are still equal.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from engine.errors import CheckpointError, listing
from engine.model_sources.adapter.biases import BiasedConfig, with_biases
from engine.model_sources.adapter.contents import Pairs
from engine.model_sources.adapter.fit import ModuleNames, check_fit
from engine.model_sources.adapter.gguf_lora import in_order
from engine.model_sources.adapter.initial import initial_base
from engine.model_sources.adapter.peft import Adapter
from engine.model_sources.interface.model_source import ModelSource
from engine.model_sources.interface.row_parts import row_parts, split_rows
from engine.model_sources.interface.stops import adapter_stops, with_stops
from engine.model_sources.interface.view import ModelSourceView, with_key
from engine.model_sources.vocabulary.folder import OtherWords
from engine.model_sources.vocabulary.of_adapter import words_of
from kernels.linear.dora import scale_rows_
from kernels.linear.int8 import Int8Weight
from kernels.nf4 import NF4Weight
from models.tensor_layout import NESTED_PREFIX, Layout, carried_prefixes
from models.tensor_names import PROJECTIONS, expected_tensors

log = logging.getLogger(__name__)

HEAD = "lm_head.weight"


class AdaptedSource(OtherWords, ModelSourceView):
    """`base` with all of `adapter` but `pairs`, which have the factors `scales`, by module.

    `folded` counts the tensors that are changed. Raises `CheckpointError` where the adapter does
    not fit the model.
    """

    def __init__(self, base: ModelSource, adapter: Adapter) -> None:
        super().__init__(base)
        check_fit(adapter, base.config, base.path)
        self.adapter = adapter = in_order(adapter, base.config)
        self.words = words_of(base, adapter.paths)
        self._rename = ModuleNames(base.config, adapter)
        self._layout = Layout.of_names(base.config, base.names())
        self._base_names, self._base_tied = set(base.names()), base.config.tie_word_embeddings
        self.embedding = self._layout.path("model.embed_tokens.weight")
        everything = self._rename.all(adapter.pairs)
        self.scales = self._rename.all(adapter.scales)
        others = adapter.others
        self.pairs: Pairs = {m: pair for m, pair in everything.items() if _stays_separate(m)}
        self.folded_pairs: Pairs = {m: p for m, p in everything.items() if m not in self.pairs}
        self._all_pairs = everything
        self._embeddings = self._rename.all(others.embeddings)
        self._bases = self._rename.all(others.bases)
        self._copies = self._divided(self._rename.all(others.copies))
        self._rows = self._rename.all(others.rows)
        self._set_biases()
        self._set_vocabulary()
        self._set_tie()
        self._names = self._ordered_names()
        self._folded_names = self._changed()
        self.folded = len(self._folded_names)
        self._require_copies_fit()

    @property
    def generation_config(self) -> dict[str, Any]:
        """That of the model, with the ends of an answer that the adapter was taught."""
        taught = (adapter_stops(path) for path in self.adapter.paths)
        return with_stops(self.base, (stop for stops in taught for stop in stops))

    @property
    def copied(self) -> Collection[str]:
        """Names of the tensors that the adapter holds whole, which PEFT never quantises."""
        return self._copies.keys()

    def is_unchanged(self, module: str) -> bool:
        """Whether the graph's module has the weight that it has without the adapter."""
        path = self._layout.path(f"{module}.weight")
        tied = path == HEAD and HEAD not in self._base_names
        touched = {path, self.embedding} if tied else {path}
        return not touched & self._folded_names

    def names(self) -> list[str]:
        return self._names

    def shape(self, name: str) -> tuple[int, ...]:
        if name in (self.embedding, HEAD):
            return (self.config.vocab_size, self.config.hidden_size)
        if name in self._copies:
            return tuple(self._copies[name].shape)
        if name in self._biases:
            return tuple(self._biases[name].shape)
        return self.base.shape(self._stored(name))

    def dtype(self, name: str) -> torch.dtype:
        new = name in self._biases and name not in self._base_names
        return self.base.dtype(f"{name.rpartition('.')[0]}.weight" if new else self._stored(name))

    def release(self, name: str) -> None:
        if self._stored(name) in self._base_names:
            self.base.release(self._stored(name))

    def codes(self, name: str) -> NF4Weight | Int8Weight | None:
        """The base's codes; None for what the adapter changes."""
        own = name in self._base_names and name not in self._folded_names
        return self.base.codes(name) if own else None

    def stored_as(self, name: str) -> str | None:
        """How the base holds it; None for what the adapter puts in its stead."""
        stored = self._stored(name)
        own = stored in self._base_names and name not in self._copies
        return self.base.stored_as(stored) if own else None

    def tensor(self, name: str) -> Tensor:
        """The tensor; in float32 where the adapter changes it."""
        module, _, leaf = name.rpartition(".")
        if leaf == "bias" and name in self._biases:
            return self._biased(name)
        weight = self._copies[name] if name in self._copies else self._below(name)
        return weight if leaf != "weight" else self._changed_rows(module, weight, 0)

    def row_parts(self, name: str) -> Iterator[Tensor]:
        """Tensor `name` in parts, each changed by itself where no change needs the whole."""
        module, _, leaf = name.rpartition(".")
        measured = len(self._embeddings.get(module, ())) > 2  # DoRA, by columns there
        if leaf != "weight" or measured:
            yield from split_rows(self.tensor(name))
            return
        whole = self._copies.get(name)
        if whole is None and (self._whole_base(name) is not None or self._has_start(name)):
            whole = self._below(name)
        below = row_parts(self.base, self._stored(name)) if whole is None else split_rows(whole)
        start = 0
        for part in below:
            yield self._changed_rows(module, part, start)
            start += len(part)

    def _changed_rows(self, module: str, weight: Tensor, start: int) -> Tensor:
        """Rows of a module's weight from `start` on, in float32 where the adapter changes them."""
        rows = slice(start, start + len(weight))
        if module in self.folded_pairs:
            a, *by_row = self.folded_pairs[module]
            pair = (a, *(part[rows] for part in by_row))
            weight = with_pair(weight, pair, self.scales[module])
        if module in self._embeddings:
            weight = self._with_embedding(module, weight, rows)
        return self._with_rows(module, weight, start)

    def _stored(self, name: str) -> str:
        """The base's tensor from which `name` comes."""
        return self.embedding if name == HEAD and HEAD not in self._base_names else name

    def _divided(self, copies: dict[str, Tensor]) -> dict[str, Tensor]:
        """`copies` as the file divides them: a copied mixture holds all experts in one tensor."""
        result: dict[str, Tensor] = {}
        for name, tensor in copies.items():
            whole = ".mlp.experts." in name and tensor.dim() == 3
            graph = name.replace(NESTED_PREFIX, "model.")
            result |= self._layout.divide(graph, tensor) if whole else {name: tensor}
        return result

    def _changed(self) -> set[str]:
        modules = {*self.folded_pairs, *self._embeddings, *self._rows}
        initial = self._all_pairs.keys() if self.adapter.config.initial else set()
        named = {f"{module}.weight" for module in modules | initial}
        return named | self._copies.keys() | self._bases.keys() | self._biases.keys()

    def _below(self, name: str) -> Tensor:
        """The tensor below what the adapter adds to it.

        PEFT stores the weights of embedding and head with their pairs, as an initialisation left
        them; where the two are tied, what it does to the one it does to both.
        """
        stored = self._whole_base(name)
        if stored is not None:
            return stored
        weight = self.base.tensor(self._stored(name))
        if not self._has_start(name):
            return weight
        module, config = self._base_module(name), self.adapter.config
        rank = int(self._all_pairs[module][0].shape[0])
        return initial_base(weight, config.initial, rank, self.scales[module], config.raw)

    def _whole_base(self, name: str) -> Tensor | None:
        """The tensor below the pairs, where it is stored with them."""
        tied = self._base_tied and name in (self.embedding, HEAD)
        keys = (name, *((self.embedding, HEAD) if tied else ()))
        return next((self._bases[key] for key in keys if key in self._bases), None)

    def _base_module(self, name: str) -> str:
        """The module whose initialisation changed the base of tensor `name`."""
        tied = self._base_tied and name in (self.embedding, HEAD)
        return "lm_head" if tied else name.removesuffix(".weight")

    def _has_start(self, name: str) -> bool:
        """Whether an initialisation took something from the base of tensor `name`."""
        return bool(self.adapter.config.initial) and self._base_module(name) in self._all_pairs

    def _with_embedding(self, module: str, weight: Tensor, rows: slice) -> Tensor:
        a, b, *magnitude = self._embeddings[module]
        scale = self.adapter.config.module_scale(module)
        wide = weight.to(torch.float32, copy=True).addmm_(a.T[rows], b.T, alpha=scale)
        if not magnitude:
            return wide
        # PEFT measures the columns of the embedding, not the tokens' rows.
        lengths: Tensor = torch.linalg.vector_norm(wide, dim=0)
        return wide.mul_(magnitude[0] / lengths)

    def _with_rows(self, module: str, weight: Tensor, start: int) -> Tensor:
        """Rows from `start` on, those of single tokens as they were trained.

        A tied head has the embedding's.
        """
        source = module
        if (
            module == "lm_head"
            and module not in self._rows
            and self.base.config.tie_word_embeddings
        ):
            source = self.embedding.removesuffix(".weight")
        rows = self._rows.get(source)
        if rows is None:
            return weight
        index = self._token_indices(source)
        size = self.config.vocab_size
        if len(index) != len(rows) or max(index) >= size or min(index) < 0:
            raise CheckpointError(
                f"{self.adapter.path}: trainable_token_indices of {source} are {index[:8]}, for "
                f"{len(rows)} rows of a vocabulary of {size}."
            )
        here = [n for n, row in enumerate(index) if start <= row < start + len(weight)]
        target = torch.tensor([index[n] - start for n in here], dtype=torch.int64)
        return weight.to(torch.float32, copy=True).index_copy_(0, target, rows[here])

    def _token_indices(self, module: str) -> list[int]:
        given = self.adapter.config.raw.get("trainable_token_indices") or []
        if isinstance(given, dict):
            leaf = module.rpartition(".")[2]
            given = next((v for k, v in given.items() if k.rpartition(".")[2] == leaf), [])
        return [index for index in given if isinstance(index, int)]

    def _biased(self, name: str) -> Tensor:
        module = name.rpartition(".")[0]
        extra: Tensor = self._biases[name] * self.scales.get(module, 0.0)
        if name in self._copies:
            return self._copies[name] + extra
        return self.base.tensor(name).float() + extra if name in self._base_names else extra

    def _set_biases(self) -> None:
        """Biases of B are added to those of the base, which gets some where it has none."""
        given = self._rename.all(self.adapter.others.biases)
        self._require_biases()
        self.biased: BiasedConfig = with_biases(self.base, given)
        self.config, self.raw_config = self.biased.config, self.biased.raw
        expected = expected_tensors(self.config, self._layout)
        self._biases = {
            name: given.get(name.removesuffix(".bias"), torch.zeros(shape))
            for name, shape in expected.items()
            if name.endswith(".bias")
            and (name.removesuffix(".bias") in given or name not in self._base_names)
        }

    def _require_biases(self) -> None:
        """Raise where the configuration promises trained biases that are not there."""
        kind = self.adapter.config.raw.get("bias", "none")
        own = {n for n in self._base_names if n.endswith("_proj.bias")}
        if kind == "lora_only":
            own = {n for n in own if n.removesuffix(".bias") in self._all_pairs}
        missing = sorted(own - self._copies.keys()) if kind != "none" else []
        if missing:
            raise CheckpointError(
                f"{self.adapter.path}: bias is {kind!r}, and no bias is there for "
                f"{listing(missing)}. The two files belong to different adapters."
            )

    def _set_vocabulary(self) -> None:
        """The rows of the embedding where the adapter was trained with another vocabulary."""
        whole = {**self._bases, **self._copies}
        sizes = {len(whole[name]) for name in (self.embedding, HEAD) if name in whole}
        size = self.config.vocab_size
        if sizes <= {size}:
            return
        complete = self.embedding in whole and (HEAD in whole or self.config.tie_word_embeddings)
        if len(sizes) > 1 or not complete:
            raise CheckpointError(
                f"{self.adapter.path} was trained with a vocabulary of {sorted(sizes)} tokens, the "
                f"model has {size}, and the adapter does not hold both embedding and head."
            )
        self.config = replace(self.config, vocab_size=sizes.pop())
        self.raw_config = with_key(self.raw_config, "vocab_size", self.config.vocab_size)

    def _set_tie(self) -> None:
        if not self.config.tie_word_embeddings:
            return
        touched = {*self.folded_pairs, *self._embeddings, *self._rows}
        touched |= {name.removesuffix(".weight") for name in self._copies}
        if not touched & {"lm_head", self.embedding.removesuffix(".weight")}:
            return
        parts = zip(self.row_parts(self.embedding), self.row_parts(HEAD), strict=True)
        if not all(torch.equal(one, other) for one, other in parts):
            self.config = replace(self.config, tie_word_embeddings=False)

    def _ordered_names(self) -> list[str]:
        if self.config == self.base.config:
            return self.base.names()
        others = carried_prefixes(self.base.config)
        own = list(expected_tensors(self.config, self._layout))
        return own + [name for name in self.base.names() if name.startswith(others)]

    def _require_copies_fit(self) -> None:
        own = expected_tensors(self.config, self._layout)
        given = {**self._copies, **self._bases}
        wrong = [
            f"{name} is {list(tensor.shape)}, in the model {list(own.get(name, ())) or 'nothing'}"
            for name, tensor in given.items()
            if own.get(name, () if name != HEAD else tensor.shape) != tuple(tensor.shape)
        ]
        if wrong:
            raise CheckpointError(
                f"The adapter {self.adapter.path} does not fit the model {self.path}: "
                f"{listing(wrong)}. Name the model that the adapter was trained on."
            )


def _stays_separate(module: str) -> bool:
    return ".layers." in module and module.rpartition(".")[2] in PROJECTIONS


def with_pair(weight: Tensor, parts: tuple[Tensor, ...], scale: float) -> Tensor:
    """W + scale B A in fp32, under DoRA with its rows scaled, of `weight` (out, in) of any type."""
    a, b, *magnitude = parts
    wide = weight.to(torch.float32, copy=True).addmm_(b, a, alpha=scale)
    return scale_rows_(wide, magnitude[0]) if magnitude else wide
