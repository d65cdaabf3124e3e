"""The same job for each task queue, set up as its own documentation says; run with the queue's own virtualenv.

Each module has `enqueue(count)`, which returns handles of so many new jobs, and `find_result(handle)`, which returns
what the job returned, or None while there is nothing.
"""
