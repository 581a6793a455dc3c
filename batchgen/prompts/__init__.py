"""Row values to prompts and requests."""
