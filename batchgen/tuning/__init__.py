"""The fastest settings for a job on a machine."""
