"""What a run would do, and whether this machine can do it."""
