"""A model in a folder whose name is a pattern, on real vLLM."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

import batchgen

MODEL = Path(__file__).parents[2] / "sample_data" / "model"

pytestmark = pytest.mark.vllm


def test_a_model_beside_a_job_in_a_folder_that_looks_like_a_pattern(tmp_path: Path) -> None:
    folder = tmp_path / "data[1]"
    shutil.copytree(MODEL, folder / "m*del")
    (folder / "in.jsonl").write_text(json.dumps({"text": "hello"}))
    summary = batchgen.run(
        {
            "input": {"path": str(folder / "in.jsonl")},
            "prompt": {"user": "{{ text }}"},
            "model": {
                "name": str(folder / "m*del"),
                "max_num_seqs": 4,
                "max_model_len": 256,
                "engine": {"kv_cache_memory_bytes": 32 << 20},
            },
            "sampling": {"max_tokens": 4, "temperature": 0},
            "output": {"path": str(folder / "out")},
            "checks": {"allow_truncated": True},
        }
    )
    assert (summary.state, summary.num_ok) == ("complete", 1)
