"""Mixtures, hybrids and SmolLM3 as llama.cpp's own converter writes them.

The files of `tests/fixtures/gguf` were made from the golden checkpoints of the same names by
`convert_hf_to_gguf.py` of August 2026, in F16 and without layers that predict further tokens. That
of `qwen2_moe` has random weights of its own, for llama.cpp reads no mixture with a dense layer.
"""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from engine.errors import CheckpointError, ConfigError
from engine.model_sources.export import export_hf_directory
from engine.model_sources.gguf.config import raw_config
from engine.model_sources.gguf.container import GGUFFile
from engine.model_sources.gguf.source import GGUFSource, dequantise
from engine.model_sources.gguf.tensor_map import by_key_head, grouped, sources
from engine.model_sources.hf_directory import HFDirectory
from engine.model_sources.interface.checks import read_config
from engine.model_sources.load_model import load_model
from engine.model_sources.open import open_model_source
from models.tensor_layout import Layout

FIXTURES = Path(__file__).parents[3] / "fixtures" / "gguf"
FAMILIES = ("smollm3", "qwen3_moe", "qwen3_next", "qwen3_5_vl", "qwen3_5_moe_vl")
U32, F32, STRING = 4, 6, 8
NAMES = {
    "embed_tokens": "token_embd",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "input_layernorm": "attn_norm",
    "mlp.shared_expert.gate_proj": "ffn_gate_shexp",
    "mlp.shared_expert.up_proj": "ffn_up_shexp",
    "mlp.shared_expert.down_proj": "ffn_down_shexp",
    "mlp.shared_expert_gate": "ffn_gate_inp_shexp",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "mlp.gate": "ffn_gate_inp",
    "model.layers": "blk",
    "model.norm": "output_norm",
    "model.": "",
    "lm_head": "output",
}
Golden = Callable[[str], Path]
Pack = Callable[..., bytes]


@pytest.mark.parametrize("family", FAMILIES)
def test_what_llama_cpp_converted_is_read_back(golden: Golden, family: str) -> None:
    checkpoint, original = GGUFSource(FIXTURES / f"{family}.gguf"), HFDirectory(golden(family))
    layout = Layout(nested=original.config.nested)
    own = {layout.path(name): name for name in checkpoint.names()}
    carried = ("mtp.", "model.visual.")
    assert set(own) == {name for name in original.names() if not name.startswith(carried)}
    for theirs, ours in own.items():
        actual, wanted = checkpoint.tensor(ours), original.tensor(theirs)
        assert actual.dtype == checkpoint.dtype(ours), ours
        assert actual.is_contiguous() and actual.shape == checkpoint.shape(ours)
        if actual.dtype == torch.float16:
            assert torch.equal(actual, wanted.half()), ours
        else:  # 1 + w and exp(A_log) were rounded
            assert torch.allclose(actual, wanted, rtol=1e-6, atol=1e-7), ours


@pytest.mark.parametrize("family", FAMILIES)
def test_the_configuration_is_read_back(golden: Golden, family: str) -> None:
    actual, wanted = (
        GGUFSource(FIXTURES / f"{family}.gguf").config,
        HFDirectory(golden(family)).config,
    )
    wanted = replace(
        wanted,
        pad_token_id=0,  # of the tokenizer that the file got
        model_type=wanted.model_type if not wanted.nested else f"{wanted.model_type}_text",
        nested=False,
    )
    if family == "smollm3":  # llama.cpp leaves out every fourth rotation, and no key says other
        wanted = replace(wanted, rope_layers=(True, True))
    assert actual == wanted


@torch.no_grad()
@pytest.mark.parametrize("family", ["qwen2_moe", *FAMILIES])
def test_a_converted_model_runs_and_is_exported(family: str, tmp_path: Path) -> None:
    path = FIXTURES / f"{family}.gguf"
    ids = torch.randint(0, 64, (1, 70), generator=torch.Generator().manual_seed(1))
    model = load_model(path)
    export_hf_directory(open_model_source(path), tmp_path / "model", dtype="float32")
    assert torch.equal(load_model(tmp_path / "model")(ids), model(ids))
    quantised = load_model(path, quantize="nf4")(ids)
    assert 0 < float((quantised - model(ids)).abs().max()) < 12


def write_qwen2_moe(
    golden: Golden,
    gguf_bytes: Pack,
    path: Path,
    change: dict[str, tuple[int, Any] | None] | None = None,
    joint: bool = False,
    drop: str = "never",
    ones: bool = True,
) -> Path:
    """The golden Qwen2-MoE, whose first layer is dense, and behind it a layer of prediction."""
    raw = load_file(golden("qwen2_moe") / "model.safetensors")
    config = HFDirectory(golden("qwen2_moe")).config
    stored: dict[str, torch.Tensor] = {}
    for name, tensor in raw.items():
        if ".experts." in name:
            continue
        for ours, theirs in NAMES.items():
            name = name.replace(ours, theirs)
        stored[name] = tensor[0] if "gate_inp_shexp" in name else tensor
    count = config.num_experts
    experts = {
        kind: [raw[f"model.layers.1.mlp.experts.{n}.{kind}_proj.weight"] for n in range(count)]
        for kind in ("gate", "up", "down")
    }
    stacks = {kind: torch.stack(matrices) for kind, matrices in experts.items()}
    if joint:
        stacks = {"gate_up": torch.cat((stacks["gate"], stacks["up"]), 1), "down": stacks["down"]}
    stored |= {f"blk.1.ffn_{kind}_exps.weight": stack for kind, stack in stacks.items()}
    stored["blk.2.nextn.eh_proj.weight"] = torch.zeros(32, 64)
    metadata: dict[str, Any] = {
        "block_count": (U32, 3),
        "nextn_predict_layers": (U32, 1),
        "context_length": (U32, config.max_position_embeddings),
        "embedding_length": (U32, config.hidden_size),
        "feed_forward_length": (U32, config.intermediate_size),
        "attention.head_count": (U32, config.num_attention_heads),
        "attention.head_count_kv": (U32, config.num_key_value_heads),
        "attention.layer_norm_rms_epsilon": (F32, config.rms_norm_eps),
        "rope.freq_base": (F32, config.rope_parameters["rope_theta"]),
        "expert_count": (U32, 6),
        "expert_used_count": (U32, 2),
    } | (change or {})

    def shape_of(tensor: torch.Tensor) -> tuple[int, ...]:
        """Innermost dimension first."""
        shape = list(tensor.shape)
        while not ones and shape[0] == 1:
            del shape[0]
        return tuple(shape[::-1])

    keys = {f"qwen2moe.{key}": value for key, value in metadata.items() if value is not None}
    tensors = [
        (name, shape_of(tensor), 0, None, tensor.numpy().tobytes())
        for name, tensor in stored.items()
        if drop not in name
    ]
    path.write_bytes(gguf_bytes({"general.architecture": (STRING, "qwen2moe"), **keys}, tensors))
    return path


@pytest.mark.parametrize("joint", [False, True])
def test_a_mixture_with_a_dense_layer_is_read_without_the_layer_of_prediction(
    golden: Golden, gguf_bytes: Pack, tmp_path: Path, joint: bool
) -> None:
    checkpoint = GGUFSource(write_qwen2_moe(golden, gguf_bytes, tmp_path / "a.gguf", joint=joint))
    original = HFDirectory(golden("qwen2_moe"))
    assert checkpoint.names() == original.names()
    for name in original.names():
        assert torch.equal(checkpoint.tensor(name), original.tensor(name)), name
    assert checkpoint.config.sparse_layers == (False, True)
    by_file = {"bos_token_id": None, "eos_token_id": ()}
    assert checkpoint.config == replace(original.config, **by_file)  # type: ignore[arg-type]


@pytest.mark.parametrize("dropped", [False, True])
@pytest.mark.parametrize("joint", [False, True])
def test_one_expert_is_read_with_and_without_its_dimension(
    golden: Golden, gguf_bytes: Pack, tmp_path: Path, joint: bool, dropped: bool
) -> None:
    """ggml's own writer leaves out outer dimensions of 1, its Python package writes them."""
    raw = {
        name: tensor[:1] if name.endswith("mlp.gate.weight") else tensor
        for name, tensor in load_file(golden("qwen2_moe") / "model.safetensors").items()
        if ".experts." not in name or ".experts.0." in name
    }
    folder = tmp_path / "model"
    shutil.copytree(golden("qwen2_moe"), folder)
    save_file(raw, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config |= {"num_experts": 1, "num_experts_per_tok": 1}
    (folder / "config.json").write_text(json.dumps(config))
    change: dict[str, tuple[int, Any] | None] = {
        "expert_count": (U32, 1),
        "expert_used_count": (U32, 1),
    }
    path = write_qwen2_moe(
        lambda _: folder, gguf_bytes, tmp_path / "a.gguf", change, joint=joint, ones=not dropped
    )
    shapes = [info.shape for name, info in GGUFFile(path).tensors.items() if "_exps" in name]
    assert all(len(shape) == 3 - dropped for shape in shapes)
    checkpoint, original = GGUFSource(path), HFDirectory(folder)
    assert checkpoint.names() == original.names()
    for name in original.names():
        assert torch.equal(checkpoint.tensor(name), original.tensor(name)), name
    ids = torch.arange(50)[None]
    assert torch.equal(load_model(path)(ids), load_model(folder)(ids))


@pytest.mark.parametrize(
    ("change", "drop", "error", "words"),
    [
        ({"expert_count": None}, "never", CheckpointError, "qwen2moe.expert_count"),
        ({"expert_used_count": (U32, 7)}, "never", ConfigError, "num_experts_per_tok is 7"),
        ({"expert_count": (U32, 5)}, "never", CheckpointError, "of the wrong shape"),
        ({"expert_weights_scale": (F32, 2.5)}, "never", ConfigError, "scaled by 2.5"),
        ({"block_count": (U32, 2**31)}, "never", CheckpointError, "2147483647 layers"),
        ({}, "ffn_gate_inp.", CheckpointError, "without any router"),
        ({}, "ffn_down_exps", CheckpointError, "no matrix blk.1.ffn_down_exps.weight"),
        ({}, "ffn_up_exps", CheckpointError, "1 missing: blk.1.ffn_up_exps.weight [6, 16, 32]"),
        ({}, "ffn_gate_shexp", CheckpointError, "no matrix blk.1.ffn_gate_shexp.weight"),
        ({"nextn_predict_layers": None}, "never", CheckpointError, "12 missing"),
    ],
)
def test_a_damaged_mixture_is_refused(
    golden: Golden,
    gguf_bytes: Pack,
    tmp_path: Path,
    change: dict[str, Any],
    drop: str,
    error: type[Exception],
    words: str,
) -> None:
    path = write_qwen2_moe(golden, gguf_bytes, tmp_path / "a.gguf", change, drop=drop)
    with pytest.raises(error) as caught:
        GGUFSource(path)
    assert words in str(caught.value) and str(path) in str(caught.value)


@pytest.mark.parametrize("kind", ["F16", "Q8_0", "Q5_0", "Q6_K"])
def test_one_expert_is_unpacked_as_all_are(tmp_path: Path, gguf_bytes: Pack, kind: str) -> None:
    number = gguf.GGMLQuantizationType[kind]
    block, width = gguf.GGML_QUANT_SIZES[number]
    raw = np.random.default_rng(0).integers(0, 60, 24 * width * 256 // block, dtype=np.uint8)
    path = tmp_path / "a.gguf"
    path.write_bytes(gguf_bytes({}, [("t", (256, 8, 3), int(number), None, raw.tobytes())]))
    file = GGUFFile(path)
    whole = dequantise(file, "t")
    assert whole.shape == (3, 8, 256)
    for expert in range(3):
        assert torch.equal(dequantise(file, "t", expert), whole[expert])


def test_tiled_value_heads_are_grouped() -> None:
    # Value head j of Hugging Face reads key head j // 3; llama.cpp's j-th reads key head j mod 2.
    tiled = torch.tensor([key * 3 + nth for nth in range(3) for key in range(2)])
    rows = torch.cat((torch.tensor([-2, -1]), tiled.repeat_interleave(4) * 10))
    ordered = grouped(rows[:, None], key_heads=2, value_heads=6, start=2)[:, 0]
    assert ordered.tolist() == [-2, -1, *(10 * head for head in range(6) for _ in range(4))]


def test_joint_rows_are_put_together_by_key_head() -> None:
    q, k, v, z = (
        ["q0", "q1"],
        ["k0", "k1"],
        ["v00", "v01", "v10", "v11"],
        ["z00", "z01", "z10", "z11"],
    )
    rows = [*q, *k, *v, *z]
    index = torch.arange(12)[:, None]
    order = by_key_head(index[:8], index[8:], key_heads=2, key_rows=2)[:, 0].tolist()
    assert [rows[n] for n in order] == [
        *("q0", "k0", "v00", "v01", "z00", "z01"),
        *("q1", "k1", "v10", "v11", "z10", "z11"),
    ]


def test_files_of_2025_hold_the_joint_projection_as_it_is(golden: Golden) -> None:
    config = HFDirectory(golden("qwen3_next")).config
    name, theirs = "model.layers.0.linear_attn.in_proj_qkvz.weight", "blk.0.ssm_in.weight"
    rows = torch.randn(config.linear_num_key_heads, 3)
    actual = sources(config, {theirs: (128, 32)})[name]
    assert list(actual.tensors) == [theirs]
    assert torch.equal(actual.restore(rows), rows)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"rope.dimension_sections": 3}, "rope.dimension_sections is 3"),
        ({"ssm.time_step_rank": 0}, "0 value heads"),
        ({"ssm.time_step_rank": 5}, "5 value heads cannot share"),
        ({"ssm.group_count": None}, "lacks the metadata key qwen35.ssm.group_count"),
        ({"rope.dimension_count": 3}, "partial_rotary_factor"),
    ],
)
def test_damaged_keys_of_a_hybrid_are_named(change: dict[str, int | None], words: str) -> None:
    file = GGUFFile(FIXTURES / "qwen3_5_vl.gguf")
    metadata = file.metadata | {f"qwen35.{key}": value for key, value in change.items()}
    metadata = {key: value for key, value in metadata.items() if value is not None}
    shapes = {name: info.shape for name, info in file.tensors.items()}
    with pytest.raises((CheckpointError, ConfigError)) as caught:
        read_config(raw_config(metadata, shapes, None, "here"), "here")
    assert words in str(caught.value) and str(caught.value).startswith("here")
