"""A Python for scripts under test that is quick to start: each start is a fork of one process that has imported it all.

The folder it makes looks like a virtual environment (``bin/python``), so that the real scripts run, as they are, in it;
``python -m pip`` does nothing, as everything is installed. What a fork starts as ``sys.executable``, as torchrun does
with workers, is such a fork too. Kill the process that asked for a fork: it ends, and with it what it has started.
"""

from __future__ import annotations

import importlib
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import threading
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
_WHEN_THE_PARENT_ENDS = 1  # PR_SET_PDEATHSIG of Linux: torchrun puts its workers into sessions of their own
# Sends the arguments, the folder, the environment and the three standard streams, and ends with the status it gets.
_CLIENT = """
import ctypes, json, os, socket, sys
words = sys.argv[2:] if sys.argv[1:2] == ["-u"] else sys.argv[1:]
if words[:2] == ["-m", "pip"]:
    sys.exit()
if words[:1] not in (["-m"], ["-c"]):
    os.execv(sys.executable, [sys.executable, *sys.argv[1:]])
ctypes.CDLL(None).prctl({death}, {kill})
with socket.socket(socket.AF_UNIX) as connection:
    connection.connect({address!r})
    request = json.dumps([words, os.getcwd(), dict(os.environ)]).encode() + b"\\n"
    socket.send_fds(connection, [request[:1]], [0, 1, 2])
    connection.sendall(request[1:])
    status = connection.recv(1)
    sys.exit(status[0] if status else 1)
"""


@contextmanager
def quick_environment(folder: Path, *modules: str) -> Iterator[Path]:
    """Make such a folder for programs that import these modules; its process ends with the context."""
    address, program = str(folder / "socket"), folder / "client.py"
    python = folder / "bin" / "python"
    python.parent.mkdir(parents=True)
    program.write_text(_CLIENT.format(address=address, death=_WHEN_THE_PARENT_ENDS, kill=int(signal.SIGKILL)))
    python.write_text(f'#!/bin/sh\nexec "{sys.executable}" -S -E "{program}" "$@"\n')
    python.chmod(0o755)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(address)
        listener.listen()
        command = [sys.executable, __file__, str(listener.fileno()), str(python), *modules]
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
        server = subprocess.Popen(command, pass_fds=[listener.fileno()], env=environment, cwd=ROOT)
        try:
            yield folder
        finally:
            server.terminate()
            server.wait()


def _serve(listener: socket.socket, python: str, modules: list[str]) -> None:
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # DeepSpeed looks for a GPU otherwise, as it is imported
    for module in modules:
        importlib.import_module(module)  # before the forks: they have it then
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # so that none needs to be waited for
    while True:
        connection, _ = listener.accept()
        if os.fork() == 0:
            try:
                listener.close()
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                sys.executable = python
                _answer(connection)
            finally:
                os._exit(1)
        connection.close()


def _answer(connection: socket.socket) -> None:
    """Be the interpreter that was started."""
    start, streams, _, _ = socket.recv_fds(connection, 1, 3)
    with connection.makefile("rb") as rest:
        arguments, folder, environment = json.loads(start + rest.readline())
    threading.Thread(target=_die_with, args=(connection,), daemon=True).start()
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
        os.close(stream)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    option, program = arguments[:2]
    status = 0
    try:
        if option == "-c":
            sys.argv = [option, *arguments[2:]]
            exec(program, {"__name__": "__main__"})
        else:
            sys.argv = arguments[1:]
            runpy.run_module(program, run_name="__main__", alter_sys=True)
    except SystemExit as end:
        status = end.code or 0
    except BaseException:  # as the interpreter does
        traceback.print_exc()
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    connection.sendall(bytes([status]))


def _die_with(client: socket.socket) -> None:
    """Wait for the end of the process that asked, which sends nothing more."""
    client.recv(1)
    os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    _serve(socket.socket(fileno=int(sys.argv[1])), sys.argv[2], sys.argv[3:])
