"""README and docs are lists of claims; these tests hold them against the code."""

import ast
import json
import os
import re
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
from apiflask import APIFlask

from app.config import Settings
from app.job_function import FUNCTIONS
from app.jobs.problems import PROBLEMS
from app.jobs.status import StatusObject
from app.web.schemas import EnqueueQuery, make_query_models
from tests.processes import ROOT

README = (ROOT / "README.md").read_text()


#: The pages that the tests hold against the code: those that a reader finds from the README on.
PAGES = [*(ROOT / f"{name}.md" for name in ("README", "CONTRIBUTING", "CHANGELOG", "SECURITY")),
         *sorted((ROOT / "docs").glob("*.md"))]  # fmt: skip


def _section(page: str, title: str) -> str:
    text = (ROOT / page).read_text()
    assert f"\n## {title}\n" in text, f"{page} has no section {title!r}"
    return text.partition(f"\n## {title}\n")[2].partition("\n## ")[0]


def _rows(text: str) -> list[list[str]]:
    """The cells of all table rows but the headings."""
    rows = [
        [cell.strip() for cell in line.strip("|").split(" | ")] for line in text.splitlines() if line.startswith("|")
    ]
    return [row for row in rows if not set("".join(row)) <= set("-| ")]


def _shown(default: Any) -> str:
    if default in (None, ()):
        return "–"
    text = ",".join(default) if isinstance(default, tuple) else str(default)
    return f"`{text.lower() if isinstance(default, bool) else text}`"


def _anchors(page: Path) -> set[str]:
    """The fragments that links to the headings of a page have on GitHub."""
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    headings = re.findall(r"^#+ (.+)$", text, flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_readme_is_read_in_a_few_minutes() -> None:
    assert len(README.splitlines()) <= 150


def test_settings_page_lists_each_setting_with_its_default_and_meaning() -> None:
    expected = [
        [f"`{name.upper()}`", _shown(field.default), field.description] for name, field in Settings.model_fields.items()
    ]
    assert _rows(_section("docs/settings.md", "All settings"))[1:] == expected


def test_api_page_lists_each_problem() -> None:
    expected = {
        (str(problem.status), f"`{slug}`", f"{problem.__doc__}".partition("\n")[0])
        for slug, problem in PROBLEMS.items()
    }
    listed = {tuple(row) for row in _rows(_section("docs/api.md", "Errors")) if re.fullmatch(r"\d{3}", row[0])}
    assert listed == expected


def test_api_page_lists_each_route(app: APIFlask) -> None:
    routes = {
        f"{method} {rule.rule}"
        for rule in app.url_map.iter_rules()
        for method in (rule.methods or set()) - {"HEAD", "OPTIONS"}
        if not rule.rule.startswith(("/static", "/docs/", "/dashboard/"))
    }
    rows = _rows(_section("docs/api.md", "Routes"))
    assert set(re.findall(r"`((?:GET|POST) /[^`?]*)", "\n".join(row[0] for row in rows))) == routes


def test_api_page_lists_each_option_of_enqueue() -> None:
    options = set(make_query_models(Settings())[EnqueueQuery].model_fields)
    rows = _rows(_section("docs/api.md", "Options of `/enqueue`"))
    assert set(re.findall(r"`(\w+)=", "\n".join(row[0] for row in rows))) == options


def test_api_page_lists_each_function() -> None:
    shipped = {name for name, function in FUNCTIONS.items() if function.path.startswith("app.")}
    section = _section("docs/api.md", "Job functions").partition("These functions come with the service:")[2]
    assert {row[0].strip("`") for row in _rows(section)[1:]} == shipped


def test_api_page_shows_the_status_object_as_it_is() -> None:
    example = _section("docs/api.md", "The status object").partition("```json\n")[2].partition("```")[0]
    status = StatusObject.model_validate_json(example)
    assert list(json.loads(example)) == list(StatusObject.model_fields)
    assert status.job_status


def test_architecture_page_has_a_row_for_each_module() -> None:
    modules = {f"{path.relative_to(ROOT)}" for path in (ROOT / "app").rglob("*.py") if path.name != "__init__.py"}
    listed = re.findall(r"\]\(\.\./(app/[\w/]+\.py)\)", _section("docs/architecture.md", "The modules"))
    assert sorted(listed) == sorted(modules)


def test_readme_maps_each_thing_that_ls_app_shows() -> None:
    shown = {path.relative_to(ROOT) for path in (ROOT / "app").iterdir() if not path.name.startswith("__")}
    section = _section("README.md", "Where things are")
    listed = re.findall(r"^\| \[app/[\w./]+\]\((app/[\w./]+)\)", section, re.MULTILINE)
    assert {Path(place) for place in listed} == shown


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_pages_link_to_what_exists(page: Path) -> None:
    for link in re.findall(r"\]\(((?!http)[^)]+)\)", page.read_text()):
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        assert target.exists(), link
        assert not anchor or anchor in _anchors(target), link


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_pages_name_settings_that_there_are(page: Path) -> None:
    settings = {name.upper() for name in Settings.model_fields}
    ours = {name.partition("_")[0] for name in settings} - {"JOB", "SENTRY", "REDIS", "LOG"}
    named = set(re.findall(r"`([A-Z]+(?:_[A-Z]+)+)(?:=[^`]*)?`", page.read_text()))
    assert {name for name in named if name.partition("_")[0] in ours} <= settings


def _sources() -> str:
    files = [ROOT / "gunicorn.conf.py", ROOT / "pyproject.toml", ROOT / "Pipfile", ROOT / "docs/deploy.md"]
    for folder, pattern in (("app", "*.py"), ("app", "*.lua"), ("app", "*.js"), ("tests", "*.py"), ("deploy", "*")):
        files += (ROOT / folder).rglob(pattern)
    return "\n".join(path.read_text() for path in files if path.is_file())


@pytest.mark.parametrize("name", ["CONTRIBUTING.md", "docs/architecture.md", "docs/lifecycle.md", "README.md"])
def test_pages_name_functions_that_there_are(name: str) -> None:
    """A name in backticks, with an underscore or a capital in its middle, is one of the code or of the deployment."""
    named = set(re.findall(r"`@?(_?[A-Za-z]\w*?(?:_|[a-z][A-Z])\w*)(?:\(.*?\))?`", (ROOT / name).read_text()))
    assert named <= set(re.findall(r"\w+", _sources()))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_pages_show_python_that_can_be_read(page: Path) -> None:
    for block in re.findall(r"^```python\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL):
        ast.parse(block)


def test_readme_shows_answers_as_jq_cuts_them() -> None:
    lines = README.splitlines()
    shown = [(lines[number - 1], json.loads(line)) for number, line in enumerate(lines) if line.startswith('{"')]
    assert len(shown) == 3
    for command, answer in shown:
        members = re.fullmatch(r".* \| jq -c '\{(.+)\}'", command)
        assert members
        assert list(answer) == members[1].split(", ")
    (_, enqueued), (_, finished), (_, result) = shown
    assert StatusObject.model_fields.keys() >= {*enqueued, *finished}
    assert (enqueued["job_status"], finished["job_status"]) == ("queued", "finished")
    assert result["input"] == result["result"]


def test_ci_runs_the_line_that_the_readme_tells() -> None:
    lines = [line for line in README.splitlines() if line.startswith("pip install pipenv && ")]
    assert len(lines) == 2
    assert lines[1] in map(str.strip, (ROOT / ".ci/run").read_text().splitlines())


@pytest.mark.parametrize(
    "command",
    sorted(set(re.findall(r"^pipenv run ([\w-]+)", "\n".join(map(Path.read_text, PAGES)), flags=re.MULTILINE))),
)
def test_pages_name_commands_that_there_are(command: str) -> None:
    scripts = tomllib.loads((ROOT / "Pipfile").read_text())["scripts"]
    assert command in scripts or (Path(sys.executable).parent / command).is_file()


def test_no_tracked_file_names_a_package_registry() -> None:
    hosts = re.compile(
        "|".join(["py" + r"pi\.org", "python" + r"hosted\.org", "registry" + r"\.npmjs", "deb" + r"\.debian\.org"])
    )
    skipped = {
        ".git",
        ".venv",
        "node_modules",
        ".data",
        ".bench",
        ".mypy_cache",
        ".ruff_cache",
        ".pytest_cache",
        ".hypothesis",
    }
    for folder, folders, files in os.walk(ROOT):
        folders[:] = set(folders) - skipped  # what other tests write there comes and goes
        for path in (Path(folder, file) for file in files if not file.startswith(".coverage")):
            assert not _is_text(path) or not hosts.search(path.read_text(errors="replace")), path


def _is_text(path: Path) -> bool:
    return path.suffix in {".py", ".md", ".json", ".toml", ".yaml", ".yml", ".lua", ".lock", ""}
