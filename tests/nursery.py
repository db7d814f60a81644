"""Fresh processes that need not import everything: one process imports what a test does not look at and is forked."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

_SERVE = """
import json, os, signal, sys, tempfile, traceback

def run(code, out, err):
    os.dup2(out.fileno(), 1)
    os.dup2(err.fileno(), 2)
    signal.alarm(300)
    status = 1
    try:
        exec(compile(code, "<code>", "exec"), {"__name__": "__main__"})
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)

for line in sys.stdin:
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        child = os.fork()
        if child == 0:
            run(json.loads(line), out, err)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        out.seek(0), err.seek(0)
        print(json.dumps([status, out.read(), err.read()]), flush=True)
"""


class Finished(NamedTuple):
    """How a process ended."""

    returncode: int
    stdout: str
    stderr: str


class Nursery:
    """A process whose forks run code, each in a state that no other code has touched."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process

    def run(self, code: str) -> Finished:
        """Run code in a fork."""
        self.process.stdin.write(json.dumps(textwrap.dedent(code)) + "\n")
        self.process.stdin.flush()
        return Finished(*json.loads(self.process.stdout.readline()))

    def printed(self, code: str) -> str:
        """What code prints, which has to end well."""
        result = self.run(code)
        assert result.returncode == 0, result.stderr
        return result.stdout.strip()


@contextmanager
def nursery(first: str, **environment: str) -> Iterator[Nursery]:
    """A process that has run ``first``, for the block."""
    command = [sys.executable, "-c", f"{first}\n{_SERVE}"]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, **pipes, env=os.environ | environment) as process:
        try:
            yield Nursery(process)
        finally:
            process.stdin.close()
