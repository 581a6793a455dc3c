"""What a run says of itself: figures, progress, the log of a run, advice."""
