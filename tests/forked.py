"""Runs a script's code in a process forked from one that has torch loaded: it starts in 0.1 s.

Imported by the fork server, so that `import train` in the code costs nothing.
"""

import os
import signal
import sys
import traceback

import predict  # noqa: F401
import train  # noqa: F401


def run_code(code, folder, environment, output):
    """Be `python -c code` in `folder`; stdout and stderr go to `output`.out and `output`.err."""
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    for number, suffix in ((1, "out"), (2, "err")):
        file = os.open(f"{output}.{suffix}", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(file, number)
        os.close(file)
    # It is ignored if pytest runs in a shell's background.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.path.insert(0, "")
    sys.argv = ["-c"]
    try:
        exec(compile(code, "script", "exec"), {"__name__": "__main__"})
    except KeyboardInterrupt:
        traceback.print_exc()
        sys.exit(130)
