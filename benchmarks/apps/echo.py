"""The shortest way from a request to another process and back, with a list each way. `python -m` runs that process."""

import json
import os
import uuid
from typing import Any

from flask import Flask, Response, request
from redis import Redis

QUESTIONS, TAKEN = "echo:questions", "echo:taken"
#: Seconds that a request waits for the other process.
PATIENCE = 10

app = Flask(__name__)
# Drop redis-py's limit of 5 s: the other process waits until a payload comes.
redis = Redis.from_url(os.environ["REDIS_URL"], socket_timeout=None)


@app.get("/healthz")
def healthz() -> str:
    """Say that the app is up."""
    return "ok"


@app.post("/echo")
def echo() -> Response:
    """Send the body to the other process, and return its answer."""
    answers = f"echo:{uuid.uuid4()}"
    redis.lpush(QUESTIONS, json.dumps([answers, request.json]))
    answer: Any = redis.blpop([answers], PATIENCE)
    return Response(answer[1], mimetype="application/json")


def serve() -> None:
    """Send each payload back, for ever."""
    while True:
        question: Any = redis.blmove(QUESTIONS, TAKEN, 0, "RIGHT", "LEFT")
        answers, payload = json.loads(question)
        with redis.pipeline(transaction=False) as pipeline:
            pipeline.lpush(answers, json.dumps(payload))
            pipeline.rpop(TAKEN)
            pipeline.execute()


if __name__ == "__main__":
    serve()
