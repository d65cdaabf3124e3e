"""The upper bounds for a Flask app under our gunicorn: it answers a constant, at once or after a call of Redis."""

import json
from collections.abc import Iterable
from wsgiref.types import StartResponse, WSGIEnvironment

from flask import Flask, Response

from app.config import get_settings
from app.core.connections import connect

#: It is as long as the status object of a waiting job.
_ANSWER = json.dumps({"job_status": "queued", "": "." * 420})

app = Flask(__name__)
redis = connect(get_settings())


@app.get("/healthz")
def healthz() -> str:
    """Say that the app is up."""
    return "ok"


@app.get("/constant")
def constant() -> Response:
    """Answer at once."""
    return Response(_ANSWER, mimetype="application/json")


@app.route("/ping", methods=["GET", "POST"])
def ping() -> Response:
    """Answer after one round trip to Redis."""
    redis.ping()
    return Response(_ANSWER, mimetype="application/json")


def bare(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
    """Answer without Flask."""
    start_response("200 OK", [("Content-Type", "application/json"), ("Content-Length", str(len(_ANSWER)))])
    return [_ANSWER.encode()]
