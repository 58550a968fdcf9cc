"""Processes that are started here and stopped here, whatever happens."""

import os
import re
import signal
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

START_TIMEOUT_S = 30
STOP_TIMEOUT_S = 15


class Failed(Exception):
    """Why there is nothing to measure, in a sentence."""


def environment(**variables: str) -> dict[str, str]:
    """What a child is told: nothing of what happens to be set around us."""
    kept = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}
    return {**kept, "PYTHONDONTWRITEBYTECODE": "1", **variables}


def run(command: Sequence[str | Path], timeout_s: float = 120, **options) -> str:
    """Runs a command to its end and returns what it said."""
    name = Path(command[0]).name
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            timeout=timeout_s, **options,
        )
    except subprocess.TimeoutExpired:
        raise Failed(f"{name} took longer than {timeout_s} s") from None
    if done.returncode != 0:
        raise Failed(f"{name} failed: {last_line(done.stderr or done.stdout)}")
    return done.stdout


@contextmanager
def running(
    command: Sequence[str | Path], log: Path, ready: str, stop: int = signal.SIGTERM, **options
) -> Iterator[re.Match[str]]:
    """Runs a server for as long as the block lasts, which begins when the server's
    log has what `ready` matches."""
    with log.open("wb") as output:
        # A session of its own: a Ctrl-C is for us, who stop everything in order.
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True, **options
        )
    try:
        deadline = time.monotonic() + START_TIMEOUT_S
        while not (found := re.search(ready, log.read_text(errors="replace"))):
            if process.poll() is not None:
                raise Failed("does not start")
            if time.monotonic() > deadline:
                raise Failed(f"has not started after {START_TIMEOUT_S} s")
            time.sleep(0.02)
        yield found
    except Failed as failed:
        raise Failed(f"{failed}; its log ends: {last_line(log.read_text(errors='replace'))}") from None
    finally:
        process.send_signal(stop)
        try:
            process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else "it does not say why"
