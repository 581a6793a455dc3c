"""What was published: which snapshots there are, how two of them differ, and which may go."""
