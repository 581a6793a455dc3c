"""Many engines, one job: the driver leases rows, workers end them, the driver alone publishes.

    driver (`fleet`)    LeaseBook -> orders -> worker ... reports -> LeaseBook, until all is durable
    worker (`replica`)  leases -> Feeder -> Runner -> parts of its own, in the shared output

What carries orders and reports, places workers and sees them die is a `Crew`; Ray is one. Nothing
here knows which.
"""
