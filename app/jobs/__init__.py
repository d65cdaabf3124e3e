"""What can be done with jobs: enqueue, cancel, retry, list, wait, read. Knows no Flask and reads no environment."""
