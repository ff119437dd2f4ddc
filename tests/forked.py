"""Python in processes of their own, forked from one that has imported what is heavy: each would import it for seconds.

For what such a process does and how it ends. Where it matters how one begins (its locale, its streams, what it
imports) it is begun by `subprocess`.
"""

import gc
import multiprocessing
import os
import runpy
import sys
from multiprocessing import forkserver
from multiprocessing.connection import Connection
from pathlib import Path

# As `subprocess` has it, so that this module stands for that one.
from subprocess import TimeoutExpired
from types import SimpleNamespace
from unittest import mock

TASFT = [sys.executable, "-c", "from tasft.cli.main import main; main()"]
# The first of them has the shapes of the losses checked, so it comes before what imports these.
IMPORTED = ["conftest", "running", "tasft.cli.runs", "tasft.train.trainer", "transformers.models.llama.modeling_llama"]
_context = multiprocessing.get_context("forkserver")


def ready():
    """Let the process be there from which others are forked."""
    places = [str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]
    _context.set_forkserver_preload(IMPORTED)
    # One thread, since what is forked has none of the threads of its parent.
    with mock.patch.dict(os.environ, {"PYTHONPATH": os.pathsep.join(places), "OMP_NUM_THREADS": "1"}):
        forkserver.ensure_running()


def _run(words, environment, folder, streams):
    gc.freeze()  # As the tests do: a training looks through all else for what is garbage.
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    for number, stream in zip((1, 2), streams, strict=True):
        os.dup2(stream.fileno(), number)
    sys.path.insert(0, "" if words[0] == "-c" else os.path.dirname(words[0]))
    if words[0] == "-c":
        sys.argv = ["-c", *words[2:]]
        exec(words[1], {"__name__": "__main__"})
    else:
        sys.argv = words
        runpy.run_path(words[0], run_name="__main__")


class Popen:
    """As `subprocess.Popen`, of this Python with `-c` or a script."""

    def __init__(self, command, env=None, stdout=None, stderr=None):
        ready()
        numbers = (1 if stdout is None else stdout.fileno(), 2 if stderr is None else stderr.fileno())
        streams = [Connection(os.dup(number), readable=False) for number in numbers]
        words = [str(word) for word in command[1:]]
        self._process = _context.Process(
            target=_run, args=(words, dict(os.environ if env is None else env), os.getcwd(), streams), daemon=True
        )
        self._process.start()
        for stream in streams:
            stream.close()
        self.pid, self.terminate, self.kill = self._process.pid, self._process.terminate, self._process.kill

    def poll(self):
        return self._process.exitcode

    def wait(self, timeout=None):
        self._process.join(timeout)
        if self.poll() is None:
            raise TimeoutExpired("", timeout)
        return self.poll()

    def send_signal(self, number):
        if self.poll() is None:
            os.kill(self.pid, number)


def run(command, env=None):
    return SimpleNamespace(returncode=Popen(command, env).wait())
