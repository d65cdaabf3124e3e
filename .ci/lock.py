"""Lock the dependencies, and leave no package index in the lock (`pipenv run lock`).

Pipenv writes the default index into Pipfile.lock even if the Pipfile names none. This script removes it, so that users
behind a mirror install from their mirror. `pipenv sync` and `pipenv verify` accept the result.
The hash in the lock covers the indexes of pip's configuration, too. To get the same hash on every machine, this script
makes it, and the hook verifies it, without pip's configuration.
"""

import json
import os
import subprocess
from pathlib import Path

LOCK = Path(__file__).resolve().parent.parent / "Pipfile.lock"

plain = ["env", "-u", "PIP_INDEX_URL", "-u", "PIP_EXTRA_INDEX_URL", f"PIP_CONFIG_FILE={os.devnull}"]
subprocess.run([*plain, "pipenv", "lock"], check=True)
lock = json.loads(LOCK.read_text())
lock["_meta"]["sources"] = []
for section in ("default", "develop"):
    for package in lock[section].values():
        package.pop("index", None)
LOCK.write_text(json.dumps(lock, indent=4, sort_keys=True) + "\n")
