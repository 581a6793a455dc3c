"""Offline batch inference: JSONL or Parquet through vLLM to published Parquet, exactly once."""

__version__ = "0.1.0"
