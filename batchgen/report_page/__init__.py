"""A run on one page: what came of it, what to look at, and how it went."""
