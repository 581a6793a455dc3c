"""Quantized models: what runs, how well it answers, and what `doctor` said of it before.

    python -m tests.gpu.quantized                            # the model of sample_data, its labels
    python -m tests.gpu.quantized --shape 0.6b --tokenizer DIR --rows 3000     # speed and memory

AWQ and GPTQ checkpoints are packed here, by rounding to the nearest of 16 values in groups of 128
(no calibration: what counts is the format); FP8 is vLLM's own, online. Prints a JSON line for each:
the run's state, labels right (random weights have none), tokens a second, and weights and KV tokens
by `doctor` and by vLLM's log. A format that is refused has the reason instead.

Source:
    GPTQ: qweight packs 8 rows, qzeros holds zero points less one; AutoGPTQ, qlinear_cuda.py, and
    vllm/model_executor/layers/quantization/gptq.py. AWQ: qweight packs 8 columns in the order
    below; AutoAWQ, awq/modules/linear/gemm.py, and vllm/.../awq.py, 0.26 to 0.33.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import polars as pl

import batchgen
from tests.bench.random_model import SHAPES, make_model

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch

    Pack = Callable[[torch.Tensor], dict[str, torch.Tensor]]

ROOT = Path(__file__).parents[2]
GROUP = 128
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
_LINEAR = re.compile(r"\.(q|k|v|o|gate|up|down)_proj\.weight$")
_LOADED = re.compile(r"Model loading took ([\d.]+) GiB")
_TOKENS = re.compile(r"GPU KV cache size: ([\d,]+) tokens")
CONFIGS: dict[str, dict[str, Any]] = {
    "awq": {"quant_method": "awq", "bits": 4, "group_size": GROUP, "zero_point": True}
    | {"version": "gemm", "modules_to_not_convert": None},
    "gptq": {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "desc_act": False}
    | {"sym": True, "lm_head": False, "checkpoint_format": "gptq"},
}
JOB = """
[input]
path = "rows.jsonl"
[prompt]
text = "text"
[model]
name = "model"
max_model_len = 2048
[sampling]
temperature = 0
max_tokens = 128
ignore_eos = true
[checks]
allow_truncated = true
[output]
path = "out"
"""


def quantize(weight: torch.Tensor, *, zero_points: bool) -> tuple[torch.Tensor, ...]:
    """Round to 4 bits.

    Args:
        weight: Of shape (outputs, inputs), inputs a multiple of `GROUP`.
        zero_points: Find one for each group; else it is 8.

    Returns:
        Numbers from 0 to 15, of shape (inputs, outputs); scales and zero points of each group, of
        shape (inputs / GROUP, outputs). The weight is `(number - zero point) * scale`.
    """
    import torch

    grouped = weight.float().t().reshape(-1, GROUP, weight.shape[0])
    if zero_points:
        low, high = grouped.amin(1), grouped.amax(1)
        scales = ((high - low) / 15).clamp(min=1e-6)
        zeros = (-low / scales).round().clamp(0, 15)
    else:
        scales = (grouped.abs().amax(1) / 7).clamp(min=1e-6)
        zeros = torch.full_like(scales, 8)
    scales = scales.half()
    numbers = (grouped / scales.float()[:, None]).round() + zeros[:, None]
    numbers = numbers.clamp(0, 15).reshape(-1, weight.shape[0])
    return numbers.int(), scales, zeros.int()


def pack_columns(numbers: torch.Tensor, order: tuple[int, ...] = tuple(range(8))) -> torch.Tensor:
    """Put 8 columns into one of 32 bits, the first of `order` lowest."""
    import torch

    columns = numbers.reshape(numbers.shape[0], -1, 8)[:, :, list(order)].long()
    packed = (columns << torch.arange(0, 32, 4)).sum(-1)
    return (packed - ((packed >> 31) << 32)).int()  # As a signed number.


def pack_awq(weight: torch.Tensor) -> dict[str, torch.Tensor]:
    """A linear layer as AutoAWQ writes it."""
    numbers, scales, zeros = quantize(weight, zero_points=True)
    return {
        "qweight": pack_columns(numbers, AWQ_ORDER),
        "qzeros": pack_columns(zeros, AWQ_ORDER),
        "scales": scales,
    }


def pack_gptq(weight: torch.Tensor) -> dict[str, torch.Tensor]:
    """A linear layer as AutoGPTQ writes it."""
    import torch

    numbers, scales, zeros = quantize(weight, zero_points=False)
    return {
        "qweight": pack_columns(numbers.t().contiguous()).t().contiguous(),
        "qzeros": pack_columns(zeros - 1),
        "scales": scales,
        "g_idx": (torch.arange(weight.shape[1]) // GROUP).int(),
    }


PACKS: dict[str, Pack] = {"awq": pack_awq, "gptq": pack_gptq}


def make_checkpoint(model: Path, target: Path, kind: str) -> Path:
    """Write a quantized copy of a model; its embeddings and norms stay as they are."""
    from safetensors.torch import load_file, save_file

    shutil.copytree(model, target, ignore=shutil.ignore_patterns("*.safetensors"))
    tensors: dict[str, torch.Tensor] = {}
    for name, tensor in load_file(model / "model.safetensors").items():
        if _LINEAR.search(name):
            layer = name.removesuffix("weight")
            tensors |= {f"{layer}{part}": value for part, value in PACKS[kind](tensor).items()}
        else:
            tensors[name] = tensor
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((target / "config.json").read_text(encoding="utf-8"))
    config["quantization_config"] = CONFIGS[kind]
    (target / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return target


def make_random(folder: Path, shape: str, tokenizer: Path) -> Path:
    """Write a model of a real shape with random weights, in bfloat16."""
    import torch
    from safetensors.torch import save_file
    from transformers import AutoConfig, AutoModelForCausalLM

    make_model(folder, shape, tokenizer)
    torch.manual_seed(0)
    config = AutoConfig.from_pretrained(folder)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    state = {
        name: tensor.contiguous()
        for name, tensor in model.state_dict().items()
        if not (config.tie_word_embeddings and name == "lm_head.weight")
    }
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def doctor(job: Path, sets: list[str]) -> dict[str, Any]:
    """What `batchgen doctor` says before anything is loaded."""
    words = [word for one in sets for word in ("--set", one)]
    done = subprocess.run(
        [sys.executable, "-m", "batchgen", "doctor", str(job), "--json", *words],
        capture_output=True,
        text=True,
        check=False,
    )
    found: dict[str, Any] = json.loads(done.stdout)
    said = [line["text"] for line in found["findings"] if line["topic"] == "quantization"]
    weights = found["weights"] or {}
    return {
        "state": found["state"],
        "said": said,
        "weights_gib": round(weights.get("num_bytes", 0) / 2**30, 3),
        "kv_tokens": found["kv_cache_tokens"],
    }


def run(job: Path, sets: list[str]) -> dict[str, Any]:
    """Run a job; what became of it, by the summary, the rows and vLLM's own log."""
    try:
        summary = batchgen.run(job, overrides=sets)
    except batchgen.BatchgenError as error:
        return {"refused": str(error)[:400]}
    log = Path(str(summary.summary_path)).with_name("vllm.log").read_text(errors="replace")
    rows = batchgen.read(summary.output).collect()
    loaded, tokens = _LOADED.search(log), _TOKENS.search(log)
    found: dict[str, Any] = {
        "state": summary.state,
        "ok": summary.num_ok,
        "errors": summary.num_errors,
        "output_tokens_per_s": round(summary.run["output_tokens_per_s"] or 0),
        "weights_gib": float(loaded[1]) if loaded else None,
        "kv_tokens": int(tokens[1].replace(",", "")) if tokens else None,
    }
    if "gold_label" in rows.columns:
        right = (pl.col("gen_label") == pl.col("gold_label")) & (pl.col("gen_status") == "ok")
        found["labels_right"] = rows.select(right.mean()).item()
    return found


def main() -> None:
    """Make them, and run each."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--shape", choices=sorted(SHAPES), help="random weights; else sample_data")
    parser.add_argument("--tokenizer", type=Path)
    parser.add_argument("--rows", type=int, default=3000)
    parser.add_argument("--kind", action="append", choices=["16 bit", "fp8", *PACKS])
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model, job = ROOT / "sample_data" / "model", ROOT / "jobs" / "quickstart.toml"
        if args.shape:
            model, job = make_random(folder / "model", args.shape, args.tokenizer), folder / "job"
            job.write_text(JOB, encoding="utf-8")
            texts = [{"text": f"Row {n}: " + "word " * (n % 97)} for n in range(args.rows)]
            lines = "\n".join(map(json.dumps, texts))
            (folder / "rows.jsonl").write_text(lines, encoding="utf-8")
        for kind in args.kind or ["16 bit", "fp8", *PACKS]:
            used = make_checkpoint(model, folder / kind, kind) if kind in PACKS else model
            sets = [f"model.name={used}", f"output.path={folder / f'out-{kind[:2]}'}", *args.set]
            sets += ["model.quantization=fp8"] if kind == "fp8" else []
            told = {"kind": kind, "doctor": doctor(job, sets), "vllm": run(job, sets)}
            print(json.dumps(told), flush=True)


if __name__ == "__main__":
    main()
