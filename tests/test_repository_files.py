"""Workflows, forms and editor settings, which a fork gets beside the code. Only GitHub and editors can run them."""

import json
import re
import shlex
import subprocess
import sys
import tomllib
from configparser import ConfigParser
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML  # it comes with check-jsonschema

from tests.processes import ROOT

WORKFLOWS = sorted((ROOT / ".github/workflows").iterdir())
FORMS = sorted(set((ROOT / ".github/ISSUE_TEMPLATE").iterdir()) - {ROOT / ".github/ISSUE_TEMPLATE/config.yml"})
PULL_REQUEST_TEMPLATE = (ROOT / ".github/pull_request_template.md").read_text()
SCRIPTS = tomllib.loads((ROOT / "Pipfile").read_text())["scripts"]
RIGHTS = {"--cap-add": {"NET_ADMIN", "SYS_ADMIN"}, "--security-opt": {"apparmor=unconfined"}}


def _workflow(name: str) -> Any:
    return YAML(typ="safe").load(ROOT / ".github/workflows" / name)


def _devcontainer() -> Any:
    text = (ROOT / ".devcontainer/devcontainer.json").read_text()
    return json.loads(re.sub(r"^ *//.*$", "", text, flags=re.MULTILINE))


def _editorconfig() -> ConfigParser:
    settings = ConfigParser()
    settings.read_string("[top]\n" + (ROOT / ".editorconfig").read_text())
    return settings


@pytest.mark.parametrize(
    ("schema", "files"),
    [
        ("github-workflows", WORKFLOWS),
        ("github-issue-forms", FORMS),
        ("github-issue-config", [ROOT / ".github/ISSUE_TEMPLATE/config.yml"]),
        ("compose-spec", [ROOT / "compose.yaml"]),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_files_fit_the_public_schema_of_their_kind(schema: str, files: list[Path]) -> None:
    assert files
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", f"vendor.{schema}", *map(str, files)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_ci_checks_each_push_to_main_and_each_pull_request() -> None:
    triggers = _workflow("ci.yml")["on"]
    assert triggers["push"] == {"branches": ["main"]}
    assert "pull_request" in triggers
    assert "pull_request_target" not in triggers  # it would give a token with write access to the code of strangers


def _image_of(job: Any) -> str:
    """The image of the job's container if its caller names none."""
    found = re.fullmatch(
        r"\$\{\{ inputs\.image \|\| '(python:3\.\d+-(bookworm|trixie))' \}\}", job["container"]["image"]
    )
    assert found
    return found[1]


def test_ci_runs_its_script_in_a_debian_container_with_the_needed_rights() -> None:
    (job,) = _workflow("ci.yml")["jobs"].values()
    assert _image_of(job).startswith("python:3.11-")
    options = shlex.split(job["container"]["options"])
    assert "--init" in options
    assert "--privileged" not in options
    for option, values in RIGHTS.items():
        assert {value for name, value in pairwise(options) if name == option} == values
    last = job["steps"][-1]
    assert last["run"] == "bash ${{ inputs.script || '.ci/run' }}"
    assert last["env"]["CI"] == "true"
    assert (ROOT / ".ci/run").is_file()


def test_ci_lets_git_read_the_checkout_before_the_script_uses_it() -> None:
    (job,) = _workflow("ci.yml")["jobs"].values()
    steps = [step.get("run", step.get("uses", "")) for step in job["steps"]]
    found = [number for number, step in enumerate(steps) if "safe.directory" in step]
    assert found == [len(steps) - 2]
    assert steps[0].startswith("actions/checkout@")


def test_nightly_runs_all_parts_of_its_script_every_week_and_by_hand() -> None:
    workflow = _workflow("nightly.yml")
    inputs = {"script", "minutes", "image"}
    assert set(_workflow("ci.yml")["on"]["workflow_call"]["inputs"]) == inputs
    asked = []
    for job in workflow["jobs"].values():
        assert job["uses"] == "./.github/workflows/ci.yml"
        assert set(job["with"]) <= inputs
        script, *parts = job["with"]["script"].split()
        assert script == ".ci/nightly"
        asked += parts
    (parts,) = re.findall(r"^chosen=\$\{\*:-([\w ]+)\}$", (ROOT / ".ci/nightly").read_text(), flags=re.MULTILINE)
    assert sorted(asked) == sorted(parts.split())
    assert "workflow_dispatch" in workflow["on"]
    (schedule,) = workflow["on"]["schedule"]
    assert re.fullmatch(r"\d+ \d+ \* \* \d", schedule["cron"])


def test_ci_ends_a_run_that_hangs() -> None:
    (job,) = _workflow("ci.yml")["jobs"].values()
    limit = re.fullmatch(r"\$\{\{ inputs\.minutes \|\| (\d+) \}\}", job["timeout-minutes"])
    assert limit
    assert 25 < int(limit[1]) <= 90


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_workflow_may_only_read_and_runs_no_action_that_could_change(path: Path) -> None:
    workflow = _workflow(path.name)
    assert workflow["permissions"] == {"contents": "read"}
    for job in workflow["jobs"].values():
        assert "permissions" not in job
        for step in (job, *job.get("steps", [])):
            if "uses" in step:
                assert re.fullmatch(r"\./.+|[\w-]+/[\w-]+@[0-9a-f]{40}", step["uses"])


def test_devcontainer_has_the_image_and_the_rights_of_ci() -> None:
    (job,) = _workflow("ci.yml")["jobs"].values()
    devcontainer = _devcontainer()
    assert devcontainer["image"] == _image_of(job)
    assert devcontainer["init"] is True
    assert set(devcontainer["capAdd"]) == RIGHTS["--cap-add"]
    assert set(devcontainer["securityOpt"]) == RIGHTS["--security-opt"]


def test_devcontainer_installs_what_ci_and_the_readme_install() -> None:
    tools, _, setup = _devcontainer()["postCreateCommand"].partition(" && pip ")
    (line,) = [line for line in (ROOT / "README.md").read_text().splitlines() if line.endswith(" && pipenv run test")]
    assert f"pip {setup} && pipenv run test" == line
    shell, option, script = shlex.split(tools)
    library, _, function = script.partition(" && ")
    ci = (ROOT / ".ci/run").read_text().split()
    assert function in ci
    assert library.split()[-1] in ci
    done = subprocess.run([shell, option, f"{library} && declare -F {function}"], cwd=ROOT, check=False)
    assert done.returncode == 0


def test_devcontainer_forwards_the_port_of_the_service() -> None:
    (port,) = _devcontainer()["forwardPorts"]
    assert f"http://127.0.0.1:{port}/" in (ROOT / "README.md").read_text()
    assert f"EXPOSE {port}\n" in (ROOT / "Dockerfile").read_text()


@pytest.mark.parametrize("command", re.findall(r"pipenv run ([\w-]+)", PULL_REQUEST_TEMPLATE))
def test_pull_request_template_names_only_commands_that_exist(command: str) -> None:
    assert command in SCRIPTS or (Path(sys.executable).parent / command).is_file()


def test_pull_request_template_asks_for_tests_and_documentation() -> None:
    assert {"test", "test-all", "faults"} <= set(re.findall(r"pipenv run ([\w-]+)", PULL_REQUEST_TEMPLATE))
    assert "## Documentation" in PULL_REQUEST_TEMPLATE


@pytest.mark.parametrize("path", FORMS, ids=lambda path: path.name)
def test_issue_form_keeps_keys_and_security_problems_out_of_the_public(path: Path) -> None:
    first = YAML(typ="safe").load(path)["body"][0]
    assert first["type"] == "markdown"
    assert "Report a vulnerability" in first["attributes"]["value"]
    assert "Do not paste keys" in first["attributes"]["value"]


def test_bug_form_asks_how_to_repeat_the_bug() -> None:
    form = YAML(typ="safe").load(ROOT / ".github/ISSUE_TEMPLATE/bug.yml")
    fields = {field["id"]: field for field in form["body"] if "id" in field}
    required = {name for name, field in fields.items() if field.get("validations", {}).get("required")}
    assert required == {"sent", "answered", "expected", "commit", "python", "redis"}
    assert "X-Request-ID" in fields["log"]["attributes"]["description"]


def test_editorconfig_has_the_line_length_of_ruff() -> None:
    ruff = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["ruff"]
    assert _editorconfig().getint("*.py", "max_line_length") == ruff["line-length"]


def test_tracked_text_files_follow_editorconfig() -> None:
    rules = dict(_editorconfig()["*"])
    assert (
        rules.items()
        >= {
            "charset": "utf-8",
            "end_of_line": "lf",
            "insert_final_newline": "true",
            "trim_trailing_whitespace": "true",
            "indent_style": "space",
        }.items()
    )
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    paths = [path for name in listed.split("\0") if name and (path := ROOT / name).is_file()]
    assert ROOT / "README.md" in paths
    contents = {path: path.read_bytes() for path in paths}
    texts = {path: content.decode() for path, content in contents.items() if b"\0" not in content}
    assert not [path for path, text in texts.items() if "\r" in text]
    assert not [path for path, text in texts.items() if text and not text.endswith("\n")]
    assert not [path for path, text in texts.items() if re.search(r"[ \t]+$", text, flags=re.MULTILINE)]
    assert not [path for path, text in texts.items() if re.search(r"^ *\t", text, flags=re.MULTILINE)]
