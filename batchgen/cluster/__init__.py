"""The second way to compute: many engines, placed by Ray."""
