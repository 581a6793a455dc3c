"""A job file and its input, checked and frozen: which rows there are, and as what."""
