"""Redis and RQ's keys: the atomic changes of a job, what is read of jobs, and the connections. Knows no Flask."""
