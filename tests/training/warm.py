"""A process that has everything imported and forks the ranks of a test, since starting Python is what takes the time.

Reads one JSON request per line and answers each with a line: {"codes": [of every rank, −9 for killed], "out": [of every
rank], "err": […]}. A request is {"call": "module:function", "arguments": […], "ranks": n} and, to kill rank 0 with
SIGKILL, "after": seconds, or "event": the how manieth thing that it does in a folder of checkpoints.
"""

import importlib
import json
import os
import signal
import socket
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import Any


def main() -> None:
    for line in sys.stdin:
        print(json.dumps(answer(json.loads(line))), flush=True)


def answer(request: dict[str, Any]) -> dict[str, Any]:
    ranks = request.get("ranks", 1)
    with socket.socket() as free, tempfile.TemporaryDirectory() as folder:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
        free.close()
        modules = Path(folder) / "modules"
        children = [fork(request, rank, ranks, port, Path(folder)) for rank in range(ranks)]
        if "after" in request:
            time.sleep(request["after"])
            os.kill(children[0], signal.SIGKILL)
        codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
        for name in modules.read_text().split() if modules.exists() else ():
            with suppress(Exception):  # what one child imported none has to import again
                importlib.import_module(name)
        said = {
            kind: [(Path(folder) / f"{rank}.{kind}").read_text() for rank in range(ranks)] for kind in ("out", "err")
        }
        return {"codes": codes, **said}


def fork(request: dict[str, Any], rank: int, ranks: int, port: int, folder: Path) -> int:
    if child := os.fork():
        return child
    for number, kind in ((1, "out"), (2, "err")):
        os.dup2(os.open(folder / f"{rank}.{kind}", os.O_CREAT | os.O_WRONLY), number)
    if ranks > 1:
        places = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "MASTER_PORT": port}
        os.environ.update({k: str(v) for k, v in places.items()}, MASTER_ADDR="localhost")
    if "event" in request and rank == 0:
        sys.addaudithook(Killer(request["event"]))
    module, function = request["call"].split(":")
    code = 70
    try:
        code = getattr(importlib.import_module(module), function)(request["arguments"]) or 0
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        if rank == 0:
            (folder / "modules").write_text("\n".join(sys.modules))
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


class Killer:
    """Kills this process when it is about to do the `at`-th thing in a folder of checkpoints; a file that it was about
    to make durable is half there."""

    def __init__(self, at: int) -> None:
        self.left = at

    def __call__(self, event: str, arguments: tuple) -> None:
        path = str(arguments[0]) if arguments else ""
        if not event.startswith(("open", "os.", "shutil.")) or "/checkpoints/" not in path:
            return
        self.left -= 1
        if self.left == 0:
            if event == "open" and path.endswith(".safetensors") and os.path.exists(path):
                os.truncate(path, os.path.getsize(path) // 2)
            os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    main()
