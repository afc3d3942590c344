"""One side of bench/cpu/train_step.py: QLoRA with transformers, PEFT and bitsandbytes.

The strongest configuration that these libraries offer on a CPU: NF4 with double quantisation by
bitsandbytes' native CPU kernels, fp32 compute (bf16 is slower without AMX), SDPA attention,
non-reentrant checkpointing of every layer, bitsandbytes' native 8-bit AdamW. A batch is padded to
its longest row with the labels of the padding at -100, which is what these libraries do by default,
or flattened: all rows end to end, told apart by position ids that start again, from which
transformers makes the mask for SDPA.

Run as ``python -m bench.cpu.train_step_peers WORK.json RESULT.json``; bench/cpu/train_step.py says
what the two files hold.
"""

import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from bench.cpu.side import Row, Work, measure


def convert(gguf: Path, directory: Path) -> None:
    """Write the GGUF file as a Hugging Face directory, by transformers' own reader."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype=torch.float32
    )
    # The reader dequantises the weights but leaves the model marked as quantised, and a model so
    # marked refuses to be saved.
    model.hf_quantizer = None
    del model.config.quantization_config
    model.save_pretrained(directory)


def load(work: Work) -> Any:
    from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    model = AutoModelForCausalLM.from_pretrained(
        work.hf_directory,
        dtype=torch.float32,
        device_map="cpu",
        attn_implementation="sdpa",
        quantization_config=BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.float32,
        ),
    )
    model.config.use_cache = False
    model = prepare_model_for_kbit_training(
        model,
        use_gradient_checkpointing=True,
        gradient_checkpointing_kwargs={"use_reentrant": False},
    )
    config = LoraConfig(
        r=work.rank, lora_alpha=work.alpha, target_modules="all-linear", task_type="CAUSAL_LM"
    )
    return get_peft_model(model, config).train()


def padded(rows: list[Row]) -> dict[str, torch.Tensor]:
    longest = max(len(row.input_ids) for row in rows)
    shape = (len(rows), longest)
    input_ids = torch.zeros(shape, dtype=torch.int64)
    labels = torch.full(shape, -100, dtype=torch.int64)
    attention_mask = torch.zeros(shape, dtype=torch.int64)
    for index, row in enumerate(rows):
        length = len(row.input_ids)
        input_ids[index, :length] = torch.tensor(row.input_ids)
        labels[index, :length] = torch.tensor(row.labels)
        attention_mask[index, :length] = 1
    return {"input_ids": input_ids, "labels": labels, "attention_mask": attention_mask}


def flattened(rows: list[Row]) -> dict[str, torch.Tensor]:
    ids = [token for row in rows for token in row.input_ids]
    # The first token of a row has no predecessor within the row to predict it from.
    labels = [label for row in rows for label in (-100, *row.labels[1:])]
    positions = [position for row in rows for position in range(len(row.input_ids))]
    return {
        "input_ids": torch.tensor([ids]),
        "labels": torch.tensor([labels]),
        "position_ids": torch.tensor([positions]),
    }


def main(work_file: Path, result_file: Path) -> None:
    import bitsandbytes

    work = Work.read(work_file)
    directory = Path(work.hf_directory)
    if not (directory / "config.json").exists():
        # The conversion holds the whole fp32 model: it is done by a process of its own, so that it
        # does not count in the peak memory of a training run.
        convert(Path(work.gguf), directory)
        return
    model = load(work)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = bitsandbytes.optim.AdamW8bit(trained, lr=work.learning_rate, weight_decay=0.01)

    collate = flattened if work.flattened else padded

    def step(rows: list[Row]) -> float:
        loss = model(**collate(rows)).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return float(loss.detach())

    names = ("transformers", "peft", "bitsandbytes", "torch")
    measure(work, step, {name: version(name) for name in names}, len(trained), result_file)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
