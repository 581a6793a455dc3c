"""`python -m tests.torture.observed JOB OUT LOG`: one run, every call of its `Disk` in a log."""

import sys
from pathlib import Path

from tests.torture.disks import SpoiltDisk
from tests.torture.support import Job, run_here

if __name__ == "__main__":
    job, out, log = map(Path, sys.argv[1:])
    told = run_here(Job(job, 0), out, disk=SpoiltDisk(-1, "none", log))
    sys.stderr.write(f"{told['error']}: {told['text']}\n")
    sys.exit(told["code"])
