"""`batchgen doctor`: whether this machine can run a job, and how well, before anything loads."""
