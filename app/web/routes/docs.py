"""The documentation: a page for each problem, and Swagger UI's files. APIFlask serves `/openapi.json` and `/docs`."""

from pathlib import Path

import flask_swagger_ui
from apiflask import APIBlueprint
from flask import Response, send_from_directory

from app.jobs import problems
from app.web.limits import limit_send_time
from app.web.openapi import TEXT, Answer, answers

_SWAGGER_UI = Path(flask_swagger_ui.__file__).parent / "dist"

docs = APIBlueprint("docs", __name__, tag="Problems")


@docs.get("/problems/<name>")
@docs.doc(operation_id="get_explain_problem")
@answers({200: Answer("what it means, and what to do", TEXT)}, problems=[problems.NotFound])
def explain_problem(name: str) -> Response:
    """Explain a problem and what to do about it."""
    if name not in problems.PROBLEMS:
        raise problems.NotFound(f"There is no problem {name!r}.")
    problem = problems.PROBLEMS[name]
    return Response(f"{problem.title} ({problem.status})\n\n{problem.explanation}\n", mimetype="text/plain")


@docs.get("/docs/<path:name>")
@docs.doc(hide=True)
def docs_file(name: str) -> Response:
    """Serve Swagger UI's files from the installed package: no CDN."""
    return limit_send_time(send_from_directory(_SWAGGER_UI, name))
