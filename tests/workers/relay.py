"""What an agent of torchrun starts in place of a worker, for nursery.py: relay.py NAME SCRIPT ARGUMENT..."""

import json
import os
import signal
import socket
import sys


def main(name: str, argv: list[str]) -> None:
    """Ask for a worker and stand for it."""
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(f"\0{name}")
        connection.sendall(json.dumps({"argv": argv, "env": dict(os.environ)}).encode() + b"\n")
        answers = connection.makefile()
        worker = int(answers.readline())
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda number, _: os.kill(worker, number))
        code = int(answers.readline())
    if code < 0:
        if -code != signal.SIGKILL:
            signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    sys.exit(code)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
