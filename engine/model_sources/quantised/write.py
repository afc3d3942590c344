"""Store a model's tensors in 4 or 8 bits, in bitsandbytes' format.

Quantised are the layers' projections; embeddings, head, norms, biases, routers and the other parts
of a model stay in 16 bits, as bitsandbytes leaves them. So do the experts of mixtures: transformers
5 holds all of a layer in one tensor, which its bitsandbytes integration neither makes nor reads.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Any, Literal

import torch
from torch import Tensor

from engine.errors import CheckpointError
from engine.model_sources.interface.model_source import ModelSource
from engine.model_sources.quantised.eight_bit import eight_bit_rows
from engine.model_sources.quantised.four_bit import STATE, STATE_BYTES, four_bit_parts
from kernels.adamw8bit.dynamic_map import dynamic_map
from kernels.linear.int8 import Int8Weight
from kernels.nf4 import NF4_CODE, NF4Weight, quantize
from kernels.nf4.weight import NESTED_BLOCK
from models.tensor_layout import carried_prefixes
from models.tensor_names import is_quantised

Bits = Literal[4, 8]
Spec = tuple[torch.dtype, tuple[int, ...]]
_BLOCK = 64


class Encoding:
    """Stores the projections of `source` in `bits` bits, and everything else in `dtype`.

    A projection that the source holds in the wanted codes already keeps them, to the bit, unless
    it is among the `changed`.
    """

    def __init__(
        self,
        source: ModelSource,
        bits: Bits,
        dtype: torch.dtype,
        changed: Collection[str] = (),
    ) -> None:
        self._source, self._bits, self.dtype, self._changed = source, bits, dtype, changed
        others = carried_prefixes(source.config)
        self._names = {
            name
            for name in source.names()
            if is_quantised(name) and ".mlp.experts." not in name and not name.startswith(others)
        }
        self._quantised: set[str] = set()
        self._copied: set[str] = set()

    @property
    def form(self) -> str:
        """The name of the codes."""
        return "NF4" if self._bits == 4 else "8-bit rows"

    @property
    def quantised(self) -> int:
        """Weights that were quantised here."""
        return len(self._quantised)

    @property
    def copied(self) -> int:
        """Weights whose codes are those of the source."""
        return len(self._copied)

    def encodes(self, name: str) -> bool:
        """Whether tensor `name` is stored in codes."""
        return name in self._names

    def keeps(self, name: str) -> bool:
        """Whether tensor `name` is stored in the codes that the source has."""
        return self.encodes(name) and self._stored(name) is not None

    def specs(self, name: str) -> dict[str, Spec]:
        """Types and shapes of the file's tensors of weight `name`; of a `quant_state` the most."""
        stored = self._stored(name)
        if stored is not None:
            return {key: (t.dtype, tuple(t.shape)) for key, t in self._tensors(name, stored)} | (
                {self._state(name): (torch.uint8, (STATE_BYTES,))} if self._bits == 4 else {}
            )
        rows, columns = self._source.shape(name)
        if self._bits == 8:
            module = name.removesuffix(".weight")
            return {
                name: (torch.int8, (rows, columns)),
                f"{module}.SCB": (torch.float32, (rows,)),
                f"{module}.weight_format": (torch.uint8, ()),
            }
        blocks = -(-rows * columns // _BLOCK)
        return {
            name: (torch.uint8, ((rows * columns + 1) // 2, 1)),
            f"{name}.absmax": (torch.uint8, (blocks,)),
            f"{name}.quant_map": (torch.float32, tuple(NF4_CODE.shape)),
            f"{name}.nested_absmax": (torch.float32, (-(-blocks // NESTED_BLOCK),)),
            f"{name}.nested_quant_map": (torch.float32, tuple(dynamic_map(True).shape)),
            self._state(name): (torch.uint8, (STATE_BYTES,)),
        }

    def is_open(self, name: str) -> bool:
        """Whether the length of the file's tensor `name` is known only when it is written."""
        return f".{STATE}" in name

    def parts(self, name: str, tensor: Tensor) -> dict[str, Tensor]:
        """The file's tensors of weight `name` with the values `tensor` (out, in).

        Raises `CheckpointError` for values that cannot be quantised.
        """
        self._quantised.add(name)
        try:
            codes = quantize(tensor, _BLOCK) if self._bits == 4 else eight_bit_rows(tensor)
        except ValueError as error:
            raise CheckpointError(f"tensor {name} cannot be quantised: {error}.") from error
        return dict(self._tensors(name, codes))

    def stored_parts(self, name: str) -> dict[str, Tensor] | None:
        """The file's tensors of weight `name` in the source's own codes, where it has such."""
        stored = self._stored(name)
        if stored is None:
            return None
        self._copied.add(name)
        return dict(self._tensors(name, stored))

    def _stored(self, name: str) -> NF4Weight | Int8Weight | None:
        codes = None if name in self._changed else self._source.codes(name)
        wanted = NF4Weight if self._bits == 4 else Int8Weight
        return codes if isinstance(codes, wanted) else None

    def _state(self, name: str) -> str:
        return f"{name}.{STATE}nf4"

    def _tensors(self, name: str, codes: NF4Weight | Int8Weight) -> Iterator[tuple[str, Tensor]]:
        if isinstance(codes, NF4Weight):
            for leaf, part in four_bit_parts(codes).items():
                yield (f"{name}.{leaf}" if leaf else name), part
            return
        module = name.removesuffix(".weight")
        yield name, codes.codes
        yield f"{module}.SCB", codes.absmax
        yield f"{module}.weight_format", torch.zeros((), dtype=torch.uint8)

    def quantization_config(self) -> dict[str, Any]:
        """What config.json says of it, with the keys that transformers writes.

        Every matrix in 16 bits is named, since transformers 4 takes those that are not for codes.
        """
        four = self._bits == 4
        nested = four and all(
            codes.nested_absmax is not None
            for name in self._copied
            if isinstance(codes := self._source.codes(name), NF4Weight)
        )
        return {
            "_load_in_4bit": four,
            "_load_in_8bit": not four,
            "bnb_4bit_compute_dtype": str(self.dtype).removeprefix("torch."),
            "bnb_4bit_quant_storage": "uint8",
            "bnb_4bit_quant_type": "nf4" if four else "fp4",
            "bnb_4bit_use_double_quant": nested,
            "llm_int8_enable_fp32_cpu_offload": False,
            "llm_int8_has_fp16_weight": False,
            "llm_int8_skip_modules": self._left(),
            "llm_int8_threshold": 6.0,
            "load_in_4bit": four,
            "load_in_8bit": not four,
            "quant_method": "bitsandbytes",
        }

    def _left(self) -> list[str]:
        """Modules in 16 bits that other programs would take for quantised."""
        others = carried_prefixes(self._source.config)
        left = {"lm_head"} | {prefix.rstrip(".") for prefix in others}
        for name in self._source.names():
            if name in self._names or name.startswith(others):
                continue
            module, experts, _ = name.partition(".mlp.experts.")
            if experts:
                left.add(f"{module}.mlp.experts")
            elif ".layers." in name and name.endswith(".weight") and self._is_matrix(name):
                left.add(name.removesuffix(".weight"))
        return sorted(left)

    def _is_matrix(self, name: str) -> bool:
        return len(self._source.shape(name)) == 2
