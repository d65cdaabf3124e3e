"""Lock the dependencies, and leave no package index in the lock (`pipenv run lock`).

Pipenv writes the default index into Pipfile.lock even when the Pipfile names none. A user behind a mirror should
install from their own, so the index is taken out again; `pipenv sync` and `pipenv verify` accept the result.
"""

import json
import subprocess
from pathlib import Path

LOCK = Path(__file__).resolve().parent.parent / "Pipfile.lock"

subprocess.run(["pipenv", "lock"], check=True)
lock = json.loads(LOCK.read_text())
lock["_meta"]["sources"] = []
for section in ("default", "develop"):
    for package in lock[section].values():
        package.pop("index", None)
LOCK.write_text(json.dumps(lock, indent=4, sort_keys=True) + "\n")
