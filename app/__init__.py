"""An HTTP front door to background jobs: a Flask REST API in front of Redis Queue (RQ)."""
