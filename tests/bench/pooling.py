"""Vectors: batchgen against `LLM.embed(all)` and Sentence Transformers, on the same rows.

    python -m tests.bench.pooling --shape embedding-0.6b --tokens 32=60000 512=10000 \
        --tokenizer DIR --prompts FILE
    python -m tests.bench.pooling --shape minilm --tokens 32=60000 256=20000 \
        --prompts FILE --against sentence-transformers
    python -m tests.bench.pooling --tokens 32=60000 --engines auto 1 2 3 4 --tokenizer DIR \
        --prompts FILE --against
    python -m tests.bench.pooling --host 1000000

Shapes: Qwen3-Embedding-0.6B's (the last token's vector, of length 1) and all-MiniLM-L6-v2's (the
mean of all tokens), random weights. Texts are questions one after the other, each text so many
tokens long and another. `--host` embeds texts of 200 bytes by the
echo engine, 384 numbers each, and so measures what is around an engine.

Each side as its user starts it: `batchgen run` on a job that says of the engine only which model
it is, `LLM(model, runner="pooling")` at vLLM's settings, `SentenceTransformer(model)` by its own
batch size of 32 and by 256, in float32 and in float16. Two clocks: `whole` from the start of the
process, `work` from the engine's readiness to the published snapshot, or to the vectors in memory.
`of_limit`: the time that the multiplications need at 790 TFLOP/s, as a share of the work's.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import tempfile
import time
from functools import partial
from itertools import chain, cycle, islice, product
from pathlib import Path
from typing import TYPE_CHECKING, Any

import batchgen
from batchgen.engine.devices import device_name
from batchgen.engine.vllm.settings import is_cpu_build, prepare_environment
from tests.bench import works
from tests.bench.feeding import toml
from tests.bench.limits import FLOP_PER_S, num_weights
from tests.bench.random_model import COMMON, SHAPES, make_model

if TYPE_CHECKING:
    from collections.abc import Iterator

WARM_UP_ROWS = 300
EMBEDDING, MINILM = "embedding-0.6b", "minilm"
MINILM_CONFIG: dict[str, Any] = {
    "vocab_size": 30522,
    "hidden_size": 384,
    "num_hidden_layers": 6,
    "num_attention_heads": 12,
    "intermediate_size": 1536,
    "max_position_embeddings": 512,
}
"""Source: the config.json of all-MiniLM-L6-v2."""
HOST_BYTES = 200


def main() -> None:
    """Time each length, one side after the other."""
    args = _arguments()
    if args.host:
        print(json.dumps(_host(args.host)))
        return
    if args.rival is not None:
        _rival(json.loads(args.rival.read_text()))
        return
    print(f"{device_name()}, Python {platform.python_version()}, {args.shape}, random weights")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = _model(folder / "model", args)
        own: dict[str, dict[str, Any]] = {}
        files: dict[tuple[int, int], Path] = {}
        for asked in args.tokens:
            length, num_rows = map(int, asked.split("="))
            rows = files[length, num_rows] = folder / f"{length}.jsonl"
            _write(rows, _texts(model, args.prompts, length, num_rows))
            for num in args.engines:
                told = _batchgen(model, rows, folder / f"job-{length}-{num}", args.shape, num)
                own.setdefault(str(rows), told)
                _tell(args.shape, length, num_rows, told)
        for rival in args.against:
            spec = {"kind": rival, "model": str(model), "rows": [*map(str, files.values())]}
            for told in _ask_rival(folder, {**spec, "is_dummy": args.shape == EMBEDDING}):
                (size,) = (size for size, rows in files.items() if str(rows) == told["rows"])
                _tell(args.shape, *size, told, own[told["rows"]])


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--shape", choices=[EMBEDDING, MINILM], default=EMBEDDING)
    parser.add_argument("--tokens", nargs="+", default=["32=60000", "512=10000"], metavar="N=ROWS")
    parser.add_argument("--tokenizer", type=Path, help="of the embedding shape: Qwen3's")
    parser.add_argument("--prompts", type=Path, help="JSONL with `question`")
    parser.add_argument(
        "--against", nargs="*", default=["vllm"], choices=["vllm", "sentence-transformers"]
    )
    parser.add_argument("--engines", nargs="+", default=["auto"], help="run.engines_per_gpu")
    parser.add_argument("--host", type=int, metavar="ROWS", help="no model: what is around it")
    parser.add_argument("--rival", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


def _model(folder: Path, args: argparse.Namespace) -> Path:
    if args.shape == EMBEDDING:
        make_model(folder, "0.6b", args.tokenizer)
        _of_sentence_transformers(folder, "pooling_mode_lasttoken", SHAPES["0.6b"]["hidden_size"])
        return folder
    script = "import sys\nfrom tests.bench.pooling import write_minilm\nwrite_minilm(sys.argv[1:])"
    subprocess.run([sys.executable, "-c", script, folder, args.prompts], check=True)
    _of_sentence_transformers(folder, "pooling_mode_mean_tokens", MINILM_CONFIG["hidden_size"])
    return folder


def write_minilm(given: list[str]) -> None:
    """Write a BERT of random weights; its vocabulary is the prompts' words and their letters."""
    from transformers import BertConfig, BertModel, BertTokenizer

    folder, prompts = map(Path, given)
    folder.mkdir(parents=True)
    words = sorted(
        {word.lower() for text in works.read_questions(prompts) for word in text.split()}
    )
    letters = sorted({*"".join(words)})
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    known = dict.fromkeys([*special, *letters, *(f"##{one}" for one in letters), *words])
    (folder / "vocab.txt").write_text("\n".join(islice(known, MINILM_CONFIG["vocab_size"])))
    tokenizer = BertTokenizer(str(folder / "vocab.txt"), model_max_length=512)
    tokenizer.save_pretrained(folder)
    BertModel(BertConfig(**MINILM_CONFIG)).eval().save_pretrained(folder)


def _of_sentence_transformers(folder: Path, mode: str, size: int) -> None:
    kinds = {"": "Transformer", "1_Pooling": "Pooling", "2_Normalize": "Normalize"}
    modules = [
        {"idx": at, "name": str(at), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for at, (path, kind) in enumerate(kinds.items())
    ]
    (folder / "modules.json").write_text(json.dumps(modules))
    for path in filter(None, kinds):
        (folder / path).mkdir()
    pooling = {"word_embedding_dimension": size, mode: True}
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(pooling))


def _texts(model: Path, prompts: Path, length: int, num_rows: int) -> Iterator[str]:
    """So many texts of so many tokens, none like another."""
    from transformers import AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(model)
    questions = works.read_questions(prompts)
    numbered = (f"{number}. {text}" for number, text in enumerate(cycle(questions)))
    own = length - 2  # The model's special tokens, or the space that decoding may leave.
    encoded = (tokenizer.encode(text, add_special_tokens=False) for text in numbered)
    tokens = chain.from_iterable(encoded)
    for _ in range(num_rows):
        yield tokenizer.decode(list(islice(tokens, own)))


def _write(path: Path, texts: Iterator[str]) -> None:
    with path.open("w", encoding="utf-8") as out:
        for text in texts:
            out.write(json.dumps({"text": text}) + "\n")


def _batchgen(model: Path, rows: Path, folder: Path, shape: str, engines: str) -> dict[str, Any]:
    folder.mkdir()
    tables: dict[str, dict[str, Any]] = {
        "input": {"path": str(rows)},
        "prompt": {"text": "text"},
        "model": {"name": str(model)},
        **({"model.engine": {"load_format": "dummy"}} if shape == EMBEDDING else {}),
        "output": {"path": str(folder / "out")},
        "run": {"engines_per_gpu": engines if engines == "auto" else int(engines)},
    }
    job = folder / "job.toml"
    job.write_text('task = "embed"\n' + toml(tables), encoding="utf-8")
    command = [sys.executable, "-m", "batchgen", "run", str(job), "--json"]
    began_s = time.monotonic()
    ran = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    process_s = time.monotonic() - began_s
    if ran.returncode:
        sys.exit(ran.stdout)
    summary = json.loads(ran.stdout)
    figures = summary["run"]
    return {
        "how": f"batchgen, engines_per_gpu = {engines}",
        "whole_s": process_s,
        "work_s": summary["published_s"] - figures["ready_after_s"],
        "working_s": figures["working_s"],
        "num_tokens": figures["num_prompt_tokens"],
        "ok": summary["num_ok"],
        "engine": {key: str(value)[:80] for key, value in summary["engine"].items()},
    }


def _ask_rival(folder: Path, spec: dict[str, Any]) -> Iterator[dict[str, Any]]:
    path = folder / "rival.json"
    path.write_text(json.dumps({**spec, "began_s": time.monotonic()}))
    command = [sys.executable, "-m", "tests.bench.pooling", "--rival", str(path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as rival:
        assert rival.stdout is not None
        yield from (json.loads(line) for line in rival.stdout if line.startswith("{"))
    if rival.returncode:
        print(f"{spec['kind']}: ended with {rival.returncode}")


def _rival(spec: dict[str, Any]) -> None:
    """Be the rival: embed the rows, print its times."""
    if is_cpu_build():
        prepare_environment(is_cpu=True)
    texts = {}
    for rows in spec["rows"]:
        lines = Path(rows).read_text(encoding="utf-8").splitlines()
        texts[rows] = [json.loads(line)["text"] for line in lines]
    ask = _ask_vllm if spec["kind"] == "vllm" else _ask_sentence_transformers
    for how, embed in ask(spec):
        start_s = time.monotonic() - spec["began_s"]
        for rows, own in texts.items():
            embed([f"Warm up {text}" for text in own[:WARM_UP_ROWS]])
            began_s = time.monotonic()
            num = embed(own)
            work_s = time.monotonic() - began_s
            told = {"how": how, "rows": rows, "whole_s": start_s + work_s, "work_s": work_s}
            print(json.dumps({**told, "ok": num}), flush=True)


def _ask_vllm(spec: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    from vllm import LLM

    more = {"load_format": "dummy"} if spec["is_dummy"] else {}
    llm = LLM(model=spec["model"], runner="pooling", **more)
    yield "LLM.embed(all)", lambda texts: len(llm.embed(texts, use_tqdm=False))


def _ask_sentence_transformers(spec: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(spec["model"])
    for dtype, size in product(("float32", "float16"), (32, 256)):
        encode = partial((model if dtype == "float32" else model.half()).encode, batch_size=size)
        how = f"Sentence Transformers, {dtype}, by {size}"
        yield how, lambda texts, encode=encode: len(encode(texts))


def _tell(
    shape: str, length: int, num_rows: int, told: dict[str, Any], own: dict[str, Any] | None = None
) -> None:
    if shape == EMBEDDING:
        # The head is not used: no token is drawn.
        head = SHAPES["0.6b"]["hidden_size"] * COMMON["vocab_size"]
        weights = num_weights("0.6b") - head
    else:
        hidden, inner = MINILM_CONFIG["hidden_size"], MINILM_CONFIG["intermediate_size"]
        weights = MINILM_CONFIG["num_hidden_layers"] * (4 * hidden**2 + 2 * hidden * inner)
    least_s = 2 * weights * length * num_rows / FLOP_PER_S
    ratio = f", batchgen {own['work_s'] / told['work_s']:.2f} of its time" if own else ""
    print(
        f"{length} tokens, {num_rows} rows, {told['how']}: work {told['work_s']:.2f} s "
        f"({num_rows / told['work_s']:,.0f} rows/s), whole {told['whole_s']:.1f} s, "
        f"{told['ok']} ok, of_limit {least_s / told['work_s']:.1%}{ratio}",
        flush=True,
    )
    if own is None:
        print(f"  {json.dumps(told)}", flush=True)


def _host(num_rows: int) -> dict[str, Any]:
    """Rows a second around an embedder that answers at once."""
    import resource

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        letters = "abcdefghijklmnopqrstuvwxyz "
        filler = (letters * 10)[: HOST_BYTES - 10]
        _write(folder / "in.jsonl", (f"{number:09} {filler}" for number in range(num_rows)))
        began_s = time.monotonic()
        summary = batchgen.run(
            {
                "task": "embed",
                "input": {"path": str(folder / "in.jsonl")},
                "prompt": {"text": "text"},
                "model": {"backend": "echo"},
                "output": {"path": str(folder / "out")},
            }
        )
        elapsed_s = time.monotonic() - began_s
    return {
        "rows": summary.num_ok,
        "rows_per_s": round(summary.num_ok / elapsed_s),
        "elapsed_s": round(elapsed_s, 1),
        "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
    }


if __name__ == "__main__":
    main()
