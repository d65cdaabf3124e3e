"""Run the Postman collection with newman against the real service (`python -m tests.newman.run`)."""

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from app.config import Settings
from tests.processes import ROOT, environment, valkey_server, web, worker

HERE = Path(__file__).parent
POSTMAN = ROOT / "postman"
#: A small limit, so that a body over it is small, too.
MAX_PAYLOAD_BYTES = 10_000


def install_newman(npm: str) -> None:
    """Install exactly the packages of package-lock.json, from the registry that npm is set up for."""
    subprocess.run([npm, "ci", "--ignore-scripts", "--no-audit", "--no-fund"], cwd=HERE, check=True)


def run_newman(base_url: str) -> int:
    """Run all folders of the collection; the result is newman's exit code."""
    command = [
        *(str(HERE / "node_modules" / ".bin" / "newman"), "run", str(POSTMAN / "collection.json")),
        *("--environment", str(POSTMAN / "environment.json")),
        *("--env-var", f"baseUrl={base_url}", "--env-var", f"maxPayloadBytes={MAX_PAYLOAD_BYTES}"),
        *("--timeout-request", "70000"),  # longer than the longest wait
    ]
    return subprocess.run(command, check=False).returncode


def main() -> int:
    npm = shutil.which("npm")
    if npm is None:
        print("npm is missing: install Node.js with npm (`apt-get install npm`), then run this again.", file=sys.stderr)
        return 1
    try:
        install_newman(npm)
    except subprocess.CalledProcessError as error:
        print(f"newman could not be installed: `npm ci` in {HERE} ended with {error.returncode}.", file=sys.stderr)
        return 1
    # The tested service gets only the settings below, and none from the shell.
    for setting in ("RQ_REDIS_URL", *map(str.upper, Settings.model_fields)):
        os.environ.pop(setting, None)
    with tempfile.TemporaryDirectory() as name, valkey_server(Path(name, "valkey")) as server:
        env = environment(
            f"redis://127.0.0.1:{server.port}/0",
            FUNCTION_MODULES="app.functions",
            MAX_PAYLOAD_BYTES=MAX_PAYLOAD_BYTES,
            SOME_LONG_FUNCTION_SECONDS=2,
        )
        with web(env, Path(name, "web.log")) as url, worker(env, Path(name, "worker.log")):
            code = run_newman(url)
            if code:
                for log in ("web.log", "worker.log"):
                    print(f"\n{log}:\n{Path(name, log).read_text(errors='replace')}", file=sys.stderr)
            return code


if __name__ == "__main__":
    sys.exit(main())
