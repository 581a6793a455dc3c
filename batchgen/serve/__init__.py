"""`batchgen serve`: OpenAI's Batch API over batchgen's jobs, one process and no database server.

    app        routes, for an unmodified `openai` client           HTTP's threads
    keys       who may call
    store      files and batches, each a folder under the root     any thread
    runner     starts and ends what works on batches               a thread of its own
    work       validates a batch, runs its job, writes its files   a process each
    config     serve.toml

A batch is a batchgen job with its own output folder: what is promised of a job holds for it. The
process that answers HTTP imports no engine; small batches share one that stays up between them.
"""
