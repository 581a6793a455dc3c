"""How many workers, which rows each."""
