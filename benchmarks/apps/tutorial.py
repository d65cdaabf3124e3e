"""Flask and RQ as tutorials combine them: RQ's own queue, pickle, and a fetch of the whole job for its status."""

import os

from flask import Flask, jsonify, request
from flask.typing import ResponseReturnValue
from redis import Redis
from rq import Queue
from rq.job import Job

from app.functions import count_words

app = Flask(__name__)
redis = Redis.from_url(os.environ["REDIS_URL"])
q = Queue(connection=redis)


@app.get("/healthz")
def healthz() -> str:
    """Say that the app is up."""
    return "ok"


@app.post("/enqueue")
def enqueue() -> ResponseReturnValue:
    """Enqueue a job."""
    job = q.enqueue(count_words, request.json)
    return jsonify({"job_id": job.id}), 202


@app.get("/check_status")
def check_status() -> ResponseReturnValue:
    """Return the status of a job."""
    job = Job.fetch(request.args["job_id"], connection=redis)
    return jsonify({"job_id": job.id, "job_status": job.get_status()})
