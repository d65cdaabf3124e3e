"""Kill work-horses at every moment of the fork server's loop, and print how many deaths the server did not report.

This is a program of its own, because the fork server must be forked before there are threads.
"""

import os
import random
import signal
import socket
import sys
import threading
import time

from app.worker.fork_server import ForkServer

#: A little more than the longest time from an order to its answer, in seconds.
WINDOW = 0.0025
#: Seconds until a death is reported at the latest, even on a busy machine. Before a signal woke the server's loop, a
#: death was reported only with the next order, and this program sends none while it waits.
REPORTED_WITHIN = 30


def wait_for_end(end: socket.socket) -> None:
    end.recv(1)


def start(server: ForkServer) -> tuple[int, socket.socket]:
    ours, its = socket.socketpair()
    with its:
        return server.start(its), ours


def kill_after(seconds: float, pid: int) -> None:
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:  # time.sleep is not exact enough
        pass
    os.kill(pid, signal.SIGKILL)


def main(deaths: int, seed: str) -> None:
    random.seed(seed)
    server = ForkServer(wait_for_end)
    pid, channel = start(server)
    unreported = 0
    for _ in range(deaths):
        killer = threading.Thread(target=kill_after, args=(random.uniform(0, WINDOW), pid))
        killer.start()
        following = start(server)  # while the other one dies
        killer.join()
        unreported += server.wait(pid, REPORTED_WITHIN) is None
        server.forget(pid)
        channel.close()
        pid, channel = following
    kill_after(0, pid)
    server.close()
    print(unreported)


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])
