"""Deaths of work-horses at every moment of the fork server's loop; prints how many of them it did not tell.

A process of its own: the fork server is forked before there are threads.
"""

import os
import random
import signal
import socket
import sys
import threading
import time

from app.worker.fork_server import ForkServer

#: Seconds of the longest way from an order to its answer, and a little more.
WINDOW = 0.0025
#: Seconds within which a death is told, on a busy machine too; without the wakeup of the server's loop it was with the
#: next order only, and none is sent while one waits here.
TOLD_WITHIN = 30


def wait_for_end(end: socket.socket) -> None:
    end.recv(1)


def start(server: ForkServer) -> tuple[int, socket.socket]:
    ours, its = socket.socketpair()
    with its:
        return server.start(its), ours


def kill_after(seconds: float, pid: int) -> None:
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:  # a sleep is not that exact
        pass
    os.kill(pid, signal.SIGKILL)


def main(deaths: int, seed: str) -> None:
    random.seed(seed)
    server = ForkServer(wait_for_end)
    pid, channel = start(server)
    untold = 0
    for _ in range(deaths):
        killer = threading.Thread(target=kill_after, args=(random.uniform(0, WINDOW), pid))
        killer.start()
        following = start(server)  # while the other one dies
        killer.join()
        untold += server.wait(pid, TOLD_WITHIN) is None
        server.forget(pid)
        channel.close()
        pid, channel = following
    kill_after(0, pid)
    server.close()
    print(untold)


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])
