"""bitsandbytes' 4-bit weights: the tensors of one, read and made.

For a module M a file holds, in place of `M.weight` (out, in),

    M.weight                                   two codes a byte, the even element in the high nibble
    M.weight.absmax                            scales of the blocks: fp32, or uint8 where nested
    M.weight.quant_map                         the 16 values of the codes, fp32
    M.weight.nested_absmax, .nested_quant_map  scales and 256 values of the scales' codes, fp32
    M.weight.quant_state.bitsandbytes__nf4     JSON as bytes: block sizes, type, shape, offset

`bnb_4bit_quant_storage` may give the first another type; its bytes count. `kernels.nf4.weight` has
the maths of NF4. FP4 differs in the 16 values alone.
Source: bitsandbytes 0.50, `functional.QuantState`, whose files these are bit for bit.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from engine.errors import CheckpointError
from engine.model_sources.safetensors.stored_tensors import StoredTensor
from engine.storage.strict_json import parse_object
from kernels.adamw8bit.dynamic_map import dynamic_map
from kernels.nf4 import BLOCK_SIZES, NF4_CODE, NF4Weight, dequantize
from kernels.nf4.weight import NESTED_BLOCK

STATE = "quant_state.bitsandbytes__"
STATE_BYTES = 256
"""Upper bound of the bytes of a quant_state that is written."""

_FP4 = (0.0, 1 / 192, 2 / 3, 1.0, 1 / 3, 0.5, 1 / 6, 0.25)
FP4_CODE = torch.tensor([*_FP4, *(-value for value in _FP4)], dtype=torch.float32, device="cpu")
"""The sixteen values of bitsandbytes' FP4, fp32: sign, two bits of exponent, one of mantissa."""

_CODES = {"nf4": NF4_CODE, "fp4": FP4_CODE}
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_SLAB = 1 << 20


@dataclass(frozen=True)
class FourBitTensor:
    """A weight in 4 bits, by the tensors that its file has of it.

    `parts` has the key "" for the codes and the last words of their names for the others. Its
    `tensor` is what bitsandbytes decodes, bit for bit, in the type that was quantised.
    """

    name: str
    parts: Mapping[str, StoredTensor]
    kind: str
    block_size: int
    dtype: torch.dtype
    shape: tuple[int, ...]
    nested_block: int | None
    nested_offset: float

    @classmethod
    def of(cls, name: str, parts: Mapping[str, StoredTensor], kind: str) -> FourBitTensor:
        """The weight `name`. Raises `CheckpointError` where its tensors do not fit together."""
        stored = parts[f"{STATE}{kind}"]
        where = f"{stored.file.path}: tensor {name}"
        state = parse_object(bytes(stored.tensor().contiguous().numpy()), f"{where} (quant_state)")
        stored.release()
        try:
            weight = cls(
                name,
                parts,
                kind,
                int(state["blocksize"]),
                _DTYPES[state["dtype"]],
                tuple(int(size) for size in state["shape"]),
                int(state["nested_blocksize"]) if "nested_blocksize" in state else None,
                float(state.get("nested_offset", 0.0)),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(
                f"{where}: its quant_state {str(state)[:200]} lacks or misstates {error}; expected "
                "blocksize, dtype and shape as bitsandbytes writes them. Download it again."
            ) from error
        weight._check(where)
        return weight

    def tensor(self) -> Tensor:
        """The decoded weight (out, in), in memory of its own."""
        weight = self.codes()
        return self._decode_fp4() if weight is None else dequantize(weight, self.dtype)

    def codes(self) -> NF4Weight | None:
        """The weight as it is stored, views of the file; None for FP4, which has other values.

        Scales of a nested quantisation that is not the usual one come decoded.
        """
        if self.kind != "nf4":
            return None
        absmax = self.parts["absmax"].tensor()
        weight = NF4Weight(
            self._packed(), absmax, None, None, self.shape, self.block_size, self.dtype
        )
        if self.nested_block is None:
            return weight
        usual = dynamic_map(True, torch.device("cpu"))
        own = self.parts["nested_quant_map"].tensor()
        if self.nested_block != NESTED_BLOCK or not torch.equal(own, usual):
            return replace(weight, absmax=self._scales())
        nested = self.parts["nested_absmax"].tensor()
        return replace(weight, nested_absmax=nested, nested_offset=torch.tensor(self.nested_offset))

    @property
    def form(self) -> str:
        """NF4 or FP4."""
        return self.kind.upper()

    def release(self) -> None:
        """Let go of the pages of all parts."""
        for part in self.parts.values():
            part.release()

    def _packed(self) -> Tensor:
        flat = self.parts[""].tensor().contiguous().view(-1).view(torch.uint8)
        return flat[: (math.prod(self.shape) + 1) // 2]

    def _scales(self) -> Tensor:
        """fp32 scales of all blocks."""
        absmax = self.parts["absmax"].tensor()
        if self.nested_block is None:
            return absmax
        scales = self.parts["nested_quant_map"].tensor()[absmax.int()]
        nested = self.parts["nested_absmax"].tensor()
        factors = nested.repeat_interleave(self.nested_block)[: scales.numel()]
        return scales.mul_(factors).add_(self.nested_offset)

    def _decode_fp4(self) -> Tensor:
        packed, scales = self._packed(), self._scales()
        count = math.prod(self.shape)
        out = torch.empty(count, dtype=self.dtype)
        byte = torch.arange(256)
        pairs = torch.stack([FP4_CODE[byte >> 4], FP4_CODE[byte & 15]], dim=1)
        slab = max(_SLAB, self.block_size)  # both are powers of two
        for start in range(0, count, slab):
            stop = min(start + slab, count)
            values = pairs[packed[start // 2 : (stop + 1) // 2].int()].view(-1)[: stop - start]
            blocks = scales[start // self.block_size : -(-stop // self.block_size)]
            out[start:stop] = values * blocks.repeat_interleave(self.block_size)[: stop - start]
        return out.view(self.shape)

    def _check(self, where: str) -> None:
        """Raises `CheckpointError` unless all parts are there, of the right size and finite."""
        count = math.prod(self.shape)
        blocks = -(-count // max(self.block_size, 1))
        wanted = {"absmax": blocks}
        if self.nested_block is not None:
            wanted["nested_absmax"] = -(-blocks // max(self.nested_block, 1))
            wanted["nested_quant_map"] = 256
        absent = sorted({"", *wanted} - self.parts.keys())
        if absent or self.block_size not in BLOCK_SIZES or len(self.shape) != 2 or count < 1:
            raise CheckpointError(
                f"{where} is stored in 4 bits of shape {list(self.shape)} in blocks of "
                f"{self.block_size}, without {absent or 'nothing'}; expected a matrix, blocks of "
                f"{BLOCK_SIZES[0]} to {BLOCK_SIZES[-1]} and all tensors that bitsandbytes writes."
            )
        codes = self.parts[""]
        width, needed = codes.dtype.itemsize, (count + 1) // 2
        taken = math.prod(codes.shape) * width
        wrong = [
            f"{name} holds {math.prod(self.parts[name].shape)}, expected {size}"
            for name, size in wanted.items()
            if math.prod(self.parts[name].shape) != size
        ]
        if taken != -(-needed // width) * width:
            wrong.append(f"the codes take {taken} bytes, expected {needed}")
        if not wrong:
            wrong = self._odd_values()
        if wrong:
            raise CheckpointError(
                f"{where} of shape {list(self.shape)} is damaged: {'; '.join(wrong)}. Download "
                "the model again."
            )

    def _odd_values(self) -> list[str]:
        """What is wrong with the values of scales and code."""
        wrong = []
        absmax = self.parts["absmax"].dtype
        if absmax != (torch.float32 if self.nested_block is None else torch.uint8):
            wrong.append(f"its scales are {absmax}")
        else:
            scales = self.parts["absmax" if self.nested_block is None else "nested_absmax"].tensor()
            if not bool(torch.isfinite(scales).all()) or not math.isfinite(self.nested_offset):
                wrong.append("its scales are not finite")
        given = self.parts.get("quant_map")
        if given is not None and not torch.allclose(
            given.tensor().float().view(-1), _CODES[self.kind], rtol=0, atol=1e-6
        ):
            wrong.append(f"its quant_map has not the values of {self.kind}")
        return wrong


def quant_state(weight: NF4Weight) -> Tensor:
    """The JSON of bitsandbytes' `quant_state` as bytes, uint8 (at most `STATE_BYTES`,)."""
    state = {
        "quant_type": "nf4",
        "blocksize": weight.block_size,
        "dtype": str(weight.dtype).removeprefix("torch."),
        "shape": list(weight.shape),
    }
    if weight.nested_absmax is not None and weight.nested_offset is not None:
        state |= {"nested_blocksize": NESTED_BLOCK, "nested_dtype": "float32"}
        state["nested_offset"] = weight.nested_offset.item()
    return torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)


def four_bit_parts(weight: NF4Weight) -> dict[str, Tensor]:
    """All tensors of `weight` by the last words of their names; see `FourBitTensor.parts`."""
    parts = {
        "": weight.packed.view(-1, 1),
        "absmax": weight.absmax,
        "quant_map": NF4_CODE,
        f"{STATE}nf4": quant_state(weight),
    }
    if weight.nested_absmax is not None:
        parts["nested_absmax"] = weight.nested_absmax
        parts["nested_quant_map"] = dynamic_map(True, torch.device("cpu"))
    return parts
