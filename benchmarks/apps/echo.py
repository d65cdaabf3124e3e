"""The shortest way from a request to another process and back: a list each way. `python -m` runs the other process."""

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
# Without redis-py's limit of 5 s: the other process waits as long as nothing comes.
redis = Redis.from_url(os.environ["REDIS_URL"], socket_timeout=None)


@app.get("/healthz")
def healthz() -> str:
    """Tell that the app is up."""
    return "ok"


@app.post("/echo")
def echo() -> Response:
    """Have the body sent back by the other process."""
    answers = f"echo:{uuid.uuid4()}"
    redis.lpush(QUESTIONS, json.dumps([answers, request.json]))
    answer: Any = redis.blpop([answers], PATIENCE)
    return Response(answer[1], mimetype="application/json")


def serve() -> None:
    """Send back what comes, for ever."""
    while True:
        question: Any = redis.blmove(QUESTIONS, TAKEN, 0, "RIGHT", "LEFT")
        answers, payload = json.loads(question)
        with redis.pipeline(transaction=False) as pipeline:
            pipeline.lpush(answers, json.dumps(payload))
            pipeline.rpop(TAKEN)
            pipeline.execute()


if __name__ == "__main__":
    serve()
