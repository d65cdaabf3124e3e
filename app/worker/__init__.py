"""What `rq worker` runs (RQ_WORKER_CLASS=app.worker.Worker): it takes jobs and has its work-horse run them."""

from app.worker.worker import Worker

__all__ = ["Worker"]
