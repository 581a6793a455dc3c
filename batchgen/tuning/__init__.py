"""`batchgen tune`: the fastest engine settings for a job on this machine, found with its rows."""
