"""One cell of the table: a load on one stack, and what came of it."""

import json
import resource
import secrets
import signal
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from processes import Failed, environment, last_line

# The users in the database, from 1. User n has an id that everybody can compute, as
# `bench load` does: ('0190a3c000007000' || (8000000000000000 + n))::uuid.
USERS = 100_000

WRK_SCRIPT = Path(__file__).with_name("wrk.lua")


@dataclass(frozen=True)
class Cell:
    rate: float
    p99_us: float
    failed: int
    # CPU seconds a second.
    generator_cores: float


def wrk(addr: str, operation: str, connections: int, seconds: float) -> Cell:
    # wrk counts in whole seconds, so it is interrupted instead. One thread of it
    # is many times as fast as one process of Python.
    options = ["-t1", f"-c{connections}", f"-d{int(seconds) + 10}s", "-s", WRK_SCRIPT, f"http://{addr}"]
    arguments = ["--", operation, str(USERS), str(secrets.randbelow(2**31))]
    return generate(["wrk", *options, *arguments], seconds, interrupt=True)


def grpc(program: Path, addr: str, operation: str, in_flight: int, seconds: float) -> Cell:
    rpc = {"get": "get-by-id"}.get(operation, operation)
    what = ["--addr", addr, "--rpc", rpc, "--users", str(USERS)]
    return generate([program, "load", *what, "--in-flight", str(in_flight), "--seconds", str(seconds)], seconds)


def generate(command: Sequence[str | Path], seconds: float, interrupt: bool = False, **variables: str) -> Cell:
    """Runs a load generator. The last line that it prints is its result, in JSON."""
    cpu_before = children_cpu_s()
    process = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        start_new_session=True, env=environment(**variables),
    )
    try:
        if interrupt:
            time.sleep(seconds)
            process.send_signal(signal.SIGINT)
        output, errors = process.communicate(timeout=seconds + 30)
    except subprocess.TimeoutExpired:
        raise Failed("the load generator does not come to an end") from None
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()
    if process.returncode != 0:
        raise Failed(f"the load generator failed: {last_line(errors or output)}")
    try:
        result = json.loads(last_line(output))
        return Cell(
            rate=result["ok"] / result["seconds"],
            p99_us=result["p99_us"],
            failed=result["errors"],
            generator_cores=(children_cpu_s() - cpu_before) / result["seconds"],
        )
    except (ValueError, KeyError):
        raise Failed(f"the load generator's result cannot be read: {last_line(output)}") from None


def children_cpu_s() -> float:
    """Of those that have ended, so in between only of the generator."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime
