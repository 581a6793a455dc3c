"""A run, from its job file to its snapshot: `job_run.JobRun` is where its phases meet.

`nights` says what there is to do, `plans` and `carry_over` make the plan, `computing` takes it to
its last row, with one engine or a fleet, `snapshot` publishes.
"""
