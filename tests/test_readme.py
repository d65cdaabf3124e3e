"""The README is a list of claims; these tests hold it against the code."""

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
from app.web.schemas import EnqueueQuery, make_job_options
from tests.processes import ROOT

README = (ROOT / "README.md").read_text()


def _section(title: str) -> str:
    return README.partition(f"\n## {title}\n")[2].partition("\n## ")[0]


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


def test_readme_lists_each_setting_with_its_default_and_meaning() -> None:
    expected = [
        [f"`{name.upper()}`", _shown(field.default), field.description] for name, field in Settings.model_fields.items()
    ]
    assert _rows(_section("Settings"))[1:] == expected


def test_readme_lists_each_problem() -> None:
    expected = {
        (str(problem.status), f"`{slug}`", f"{problem.__doc__}".partition("\n")[0])
        for slug, problem in PROBLEMS.items()
    }
    listed = {tuple(row) for row in _rows(_section("The API")) if re.fullmatch(r"\d{3}", row[0])}
    assert listed == expected


def test_readme_lists_each_route(app: APIFlask) -> None:
    routes = {
        f"{method} {rule.rule}"
        for rule in app.url_map.iter_rules()
        for method in (rule.methods or set()) - {"HEAD", "OPTIONS"}
        if not rule.rule.startswith(("/static", "/docs/", "/dashboard/"))
    }
    listed = re.findall(r"`((?:GET|POST) /[^`?]*)", "\n".join(row[0] for row in _rows(_section("The API"))))
    assert set(listed) == routes


def test_readme_lists_each_option_of_enqueue() -> None:
    options = set(make_job_options(Settings())[EnqueueQuery].model_fields)
    listed = re.findall(r"`(\w+)=", "\n".join(row[0] for row in _rows(_section("The API"))))
    assert set(listed) - {"job_id"} == options


def test_readme_lists_each_function() -> None:
    shipped = {name for name, function in FUNCTIONS.items() if function.path.startswith("app.")}
    section = _section("Write a job function").partition("The functions that are there:")[2]
    assert {row[0].strip("`") for row in _rows(section)[1:]} == shipped


def test_readme_maps_each_room() -> None:
    rooms = {f"{path.relative_to(ROOT)}" for path in (ROOT / "app").rglob("*.py") if path.name != "__init__.py"}
    assert set(re.findall(r"\]\((app/[\w/]+\.py)\)", _section("How it works"))) == rooms


@pytest.mark.parametrize("link", sorted(set(re.findall(r"\]\(((?!http)[^)]+)\)", README))))
def test_readme_links_to_what_exists(link: str) -> None:
    if link.startswith("#"):
        assert f"\n## {link[1:].replace('-', ' ')}\n" in README.lower()
    else:
        assert (ROOT / link).exists()


@pytest.mark.parametrize("page", sorted((ROOT / "docs").glob("*.md")), ids=lambda page: page.name)
def test_docs_link_to_what_exists_and_name_settings_that_there_are(page: Path) -> None:
    text = page.read_text()
    for link in re.findall(r"\]\(((?!http)[^)#]+)", text):
        assert (page.parent / link).exists(), link
    settings = {name.upper() for name in Settings.model_fields}
    ours = {name.partition("_")[0] for name in settings} - {"JOB", "SENTRY", "REDIS", "LOG"}
    named = set(re.findall(r"`([A-Z]+(?:_[A-Z]+)+)(?:=[^`]*)?`", text))
    assert {name for name in named if name.partition("_")[0] in ours} <= settings


def test_readme_shows_what_the_service_answers() -> None:
    answers = [json.loads(line) for line in README.splitlines() if line.startswith('{"job_id"')]
    assert len(answers) == 3
    enqueued, finished, result = answers
    assert set(enqueued) == set(finished)
    assert (enqueued["job_status"], finished["job_status"]) == ("queued", "finished")
    assert list(result) == ["job_id", "job_enqueued_at", "job_started_at", "input", "result"]


def test_ci_runs_the_line_that_the_readme_tells() -> None:
    lines = [line for line in README.splitlines() if line.startswith("pip install pipenv && ")]
    assert len(lines) == 2
    assert lines[1] in map(str.strip, (ROOT / ".ci/run").read_text().splitlines())


@pytest.mark.parametrize("command", sorted(set(re.findall(r"^pipenv run ([\w-]+)", README, flags=re.MULTILINE))))
def test_readme_names_commands_that_there_are(command: str) -> None:
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
