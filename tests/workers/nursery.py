"""Workers for a real torchrun agent without the imports of each: they are forks of a process that has imported all.

The agent starts relay.py, which asks here for a fork that runs the worker's script, and stands for it from then on.
"""

import contextlib
import json
import os
import runpy
import select
import signal
import socket
import sys
from pathlib import Path
from typing import NoReturn

RELAY = Path(__file__).with_name("relay.py")


def open_nursery() -> list[str]:
    """Start serving in a fork of this process, which must have no threads, and dies with it.

    Call it outside every `with`: what a worker leaves by sys.exit it would leave for this process too.

    Returns:
        The command that runs a script in a fork: the script and its arguments follow.
    """
    from halfbyte.training import environment

    name = f"halfbyte-nursery-{os.getpid()}"
    listening = socket.socket(socket.AF_UNIX)
    listening.bind(f"\0{name}")  # a name of Linux's that is no file
    listening.listen()
    if os.fork() == 0:
        environment.die_with_parent()
        _serve(listening)
    listening.close()
    return [sys.executable, "-S", str(RELAY), name]


def _serve(listening: socket.socket) -> NoReturn:
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for keepers
    while True:
        connection, _ = listening.accept()
        if os.fork() == 0:
            listening.close()
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            _keep(connection)
        connection.close()


def _keep(connection: socket.socket) -> NoReturn:
    """Run a worker; tell its relay how it ended, or end it with its relay."""
    request = json.loads(connection.makefile().readline())
    worker = os.fork()
    if worker == 0:
        connection.close()
        os.environ.clear()
        os.environ.update(request["env"])
        sys.argv = request["argv"]
        runpy.run_path(sys.argv[0], run_name="__main__")
        sys.exit(0)
    connection.sendall(f"{worker}\n".encode())
    ended = os.pidfd_open(worker)
    readable = select.select([connection, ended], [], [])[0]
    if ended not in readable:  # nothing more is sent: the relay is gone
        os.kill(worker, signal.SIGKILL)
    _, status = os.waitpid(worker, 0)
    with contextlib.suppress(BrokenPipeError):
        connection.sendall(f"{os.waitstatus_to_exitcode(status)}\n".encode())
    os._exit(0)
