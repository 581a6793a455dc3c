"""How good answers are: tried on a sample, compared with others, scored against gold labels."""
