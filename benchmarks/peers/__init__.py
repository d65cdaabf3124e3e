"""The same job for each task queue, set up as its own documentation says, and run in a virtualenv of its own.

Each module has `enqueue(count)`, which enqueues that number of jobs and returns their handles, and
`find_result(handle)`, which returns the job's return value, or None until there is one.
"""
