"""`batchgen plan`: what a run would do, told before any GPU and without touching the output."""
