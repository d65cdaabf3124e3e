"""`pipenv run bench [NAME ...]`: run the benchmarks of these names, or all, and write RESULTS.md anew."""

import argparse
import importlib
import signal
import sys

from benchmarks import report

#: In the order of RESULTS.md. Each is a module of this package with `run() -> report.Section`.
BENCHMARKS = ("workers", "http", "waiting", "size", "lists")


def main() -> None:
    """Measure, and write RESULTS.md after each benchmark."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"one of {', '.join(BENCHMARKS)}")
    names = parser.parse_args().names or BENCHMARKS
    if unknown := set(names) - set(BENCHMARKS):
        parser.error(f"there is no benchmark {', '.join(sorted(unknown))}")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # like Ctrl-C: it ends the started processes, too
    for name in names:
        report.save(name, importlib.import_module(f"benchmarks.{name}").run())
        report.render(BENCHMARKS)


if __name__ == "__main__":
    main()
