"""Proofs that no fault loses, doubles or changes a row. `make proof-long` runs the long versions.

Each proof is a module with a command line (`python -m tests.torture.kills --kills 10000`), which
works in processes started fresh, so that it may fork before any thread exists; its pytest runs
the same command with a smaller amount.
"""
