"""The dashboard: one page for any browser, and its files. All its data comes from the public API."""

from pathlib import Path

from apiflask import APIBlueprint
from flask import Response, make_response, render_template, send_from_directory

_STATIC = Path(__file__).parent / "static"

#: The page may load its own files and send requests to its own server. Text can never become a script.
#: Sources: https://www.w3.org/TR/CSP3/ and https://www.w3.org/TR/trusted-types/
POLICY = "; ".join((
    "default-src 'none'",
    "script-src 'self'",
    "style-src 'self'",
    "img-src 'self'",
    "connect-src 'self'",
    "base-uri 'none'",
    "form-action 'none'",
    "frame-ancestors 'none'",
    "require-trusted-types-for 'script'",
    "trusted-types 'none'",
))  # fmt: skip
_HEADERS = {
    "Content-Security-Policy": POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}

dashboard = APIBlueprint("dashboard", __name__, template_folder="templates", enable_openapi=False)


@dashboard.get("/dashboard")
def page() -> Response:
    """Serve the page."""
    return make_response(render_template("dashboard.html"), _HEADERS)


@dashboard.get("/dashboard/<name>")
def page_file(name: str) -> Response:
    """Serve a file of the page."""
    response = send_from_directory(_STATIC, name)
    response.headers.update(_HEADERS)
    return response
