"""The house (docs/architecture.md): wings import only downward, and importing anything needs no environment."""

import ast
import subprocess
import sys
from functools import cache
from graphlib import TopologicalSorter

import pytest

from tests.processes import ROOT, environment

APP = ROOT / "app"

#: The modules of the front that a wing may import. `config` holds classes only, but `get_settings`.
FRONT = {"config", "logs", "job_function", "functions", "redis_resc"}
#: What each wing may import: other wings, and modules of the front.
MAY_IMPORT = {
    "web": {"jobs", "webhooks", "core", *FRONT},
    "worker": {"webhooks", "core", *FRONT},
    "webhooks": {"jobs", "core", *FRONT},
    "jobs": {"core", "job_function", "config"},
    "core": {"config"},
    "dashboard": set(),
    "start": {"core", *FRONT},
    # The front: who may import what.
    "main": {"web", "jobs", "core", "dashboard", *FRONT},
    "redis_resc": {"core", "config"},
    "functions": {"job_function", "config"},
    "logs": {"config"},
    "job_function": set(),
    "config": set(),
}
MOST_FLOORS = 8


def name_of(path: str) -> str:
    """`app.web.auth` for `app/web/auth.py`, `app.web` for `app/web/__init__.py`."""
    return path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


MODULES = {name_of(f"{path.relative_to(ROOT)}"): path for path in APP.rglob("*.py")}


@cache
def imports_of(module: str) -> frozenset[str]:
    """The modules of `app` that a module imports, wherever in it the import stands."""
    return frozenset(find_imports(MODULES[module].read_text()) - {module})


def find_imports(source: str) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            # `from app.web import openapi` imports a module, `from app.web.auth import find_key` a name of one.
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name if name in MODULES else f"{node.module}" for name in names}
    return {name for name in found if name == "app" or name.startswith("app.")}


def wing_of(module: str) -> str:
    return module.split(".")[1] if "." in module else ""


@pytest.mark.parametrize("module", sorted(MODULES))
def test_module_imports_only_what_its_wing_may(module: str) -> None:
    wing = wing_of(module)
    imported = {wing_of(name) for name in imports_of(module)}
    assert imported <= MAY_IMPORT.get(wing, set()) | {wing}
    assert imports_of(module) <= MODULES.keys()


def test_each_wing_has_a_rule() -> None:
    assert {wing_of(module) for module in MODULES} - {""} == MAY_IMPORT.keys()


def test_the_web_imports_only_the_addresses_of_webhooks() -> None:
    imported = {name for module in MODULES for name in imports_of(module) if wing_of(module) == "web"}
    assert {name for name in imported if wing_of(name) == "webhooks"} == {"app.webhooks.addresses"}


def test_jobs_and_core_never_read_the_environment_at_import() -> None:
    env = environment("redis://127.0.0.1:1", REDIS_URL="nonsense", RQ_REDIS_URL="nonsense", QUEUES="a b")
    modules = sorted(name for name in MODULES if wing_of(name) in {"jobs", "core"})
    assert len(modules) > 10
    code = f"import sys, {', '.join(modules)}; print('app.redis_resc' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    assert (done.stdout, done.stderr) == ("False\n", "")


def test_jobs_never_read_the_settings_of_the_environment() -> None:
    for module, path in MODULES.items():
        assert wing_of(module) != "jobs" or "get_settings" not in path.read_text(), module


def floors(graph: dict[str, frozenset[str]]) -> dict[str, int]:
    """How many imports stand on each other below each module.

    Raises:
        graphlib.CycleError: modules import each other in a circle.
    """
    found: dict[str, int] = {}
    for module in TopologicalSorter(graph).static_order():
        found[module] = 1 + max((found[name] for name in graph[module]), default=0)
    return found


def test_imports_have_no_circle_and_few_floors() -> None:
    found = floors({module: imports_of(module) for module in MODULES})
    highest = max(found.values())
    assert highest <= MOST_FLOORS, sorted(name for name, floor in found.items() if floor == highest)
    assert found["app.main"] > found["app.web.routes.jobs"] > found["app.core.scripts"]
    assert not any("app.main" in imports_of(module) for module in MODULES)


@pytest.mark.parametrize(
    ("source", "imported"),
    [
        ("from app.web import auth", {"app.web.auth"}),
        ("from app.web.auth import find_key", {"app.web.auth"}),
        ("import app.worker.run", {"app.worker.run"}),
        ("def late():\n    from app.main import app", {"app.main"}),
        ("import json, rq", set()),
    ],
)
def test_an_import_is_found_wherever_it_stands(source: str, imported: set[str]) -> None:
    assert find_imports(source) == imported
