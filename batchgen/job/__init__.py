"""The job file: its model, how it is loaded, its recipe."""
