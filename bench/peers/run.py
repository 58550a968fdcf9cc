"""Compares this service with the Python stacks that it grew out of.

They run one after the other, on one machine, on copies of one database, for the
same work and under the same load; and the whole round again, for the medians.
"""

import argparse
import shutil
import signal
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

sys.dont_write_bytecode = True  # The source tree stays as it is.

import load
import postgres
import report
from load import Cell
from processes import Failed, environment, run, running
from rows import BASELINE, CONNECTIONS, OPERATIONS, Stack, all_stacks

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
STACKS_DIR = HERE / "stacks"
WARM_UP_S = 1

# A load: (operation, connections or calls in flight, seconds) -> what came of it.
Load = Callable[[str, int, float], Cell]


@dataclass(frozen=True)
class Settings:
    service: Path
    grpc_load: Path
    seconds: float
    repetitions: int
    sleep_s: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="to see that it works: 0.3 s a cell, one repetition")
    parser.add_argument("--only", metavar="TEXT", help="only the stacks whose name contains this")
    parser.add_argument("--output", type=Path, help="the page [docs/performance/peers.md; --quick: none]")
    parser.add_argument("--service", type=Path, default=ROOT / "target/release/user-service")
    parser.add_argument("--grpc-load", type=Path, default=ROOT / "target/release/bench")
    args = parser.parse_args()
    # Like a Ctrl-C: what was started is stopped.
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda *_: sys.exit("stopped"))
    settings = Settings(
        service=args.service.resolve(),
        grpc_load=args.grpc_load.resolve(),
        seconds=0.3 if args.quick else 2,
        repetitions=1 if args.quick else 3,
        sleep_s=0.1 if args.quick else 1,
    )
    stacks = [stack for stack in all_stacks() if (args.only or "").lower() in stack.name.lower()]
    try:
        page = compare(stacks, settings)
    except Failed as failed:
        sys.exit(f"bench-peers: {failed}")
    except KeyboardInterrupt:
        sys.exit("bench-peers: interrupted")
    print(page)
    output = args.output or (None if args.quick else ROOT / "docs/performance/peers.md")
    if output:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(page)


def compare(stacks: list[Stack], settings: Settings) -> str:
    if not shutil.which("wrk"):
        raise Failed("there is no wrk to make the load: please install the package wrk")
    if not settings.service.exists():
        raise Failed(f"there is no {settings.service}: please build it (cargo build --release)")
    for stack in stacks:
        install(stack)
    waits = None
    with postgres.started() as database, database.database("loaded") as loaded:
        run([settings.service, "migrate"], env=environment(DATABASE_URL=loaded))
        load_users(database)
        for repetition in range(settings.repetitions):
            for stack in stacks:
                if stack.missing:
                    continue
                say(f"repetition {repetition + 1} of {settings.repetitions}: {stack.name}")
                try:
                    with database.database("peer", template="loaded") as url, serving(stack, url, settings) as calls:
                        measure(stack, calls, settings.seconds)
                except Failed as failed:
                    stack.missing = str(failed)
        baseline = next((stack for stack in stacks if stack.name == BASELINE and not stack.missing), None)
        if baseline:
            say("ten calls that wait")
            with database.database("peer", template="loaded") as url, http_server(baseline, url) as addr:
                waits = wait_in_database(addr, settings.sleep_s)
        versions = [run([database.bin_dir / "postgres", "--version"]).strip()]
    return report.page(stacks, waits, versions, settings.seconds, settings.repetitions)


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def install(stack: Stack) -> None:
    if not stack.requirements:
        return
    pip = [Path(sys.executable).with_name("pip"), "install", "--quiet", "--disable-pip-version-check"]
    try:
        run([*pip, *stack.requirements], timeout_s=600)
    except Failed as failed:
        stack.missing = f"cannot be installed: {failed}"
        say(f"{stack.name} {stack.missing}")


def load_users(database: postgres.Postgres) -> None:
    database.sql(
        f"""insert into users (
            id, username, username_key, username_held, email, email_key, display_name,
            revision, create_time, update_time
        )
        select ('0190a3c000007000' || (8000000000000000 + n))::uuid, 'user' || n, 'user' || n, true,
            'user' || n || '@example.com', 'user' || n || '@example.com', 'User ' || n, 1, now(), now()
        from generate_series(1, {load.USERS}) n""",
        "loaded",
    )
    database.sql("vacuum (analyze) users", "loaded")


@contextmanager
def serving(stack: Stack, url: str, settings: Settings) -> Iterator[Load]:
    """Starts a stack, and says how to call it."""
    if stack.module == "asyncpg_alone":
        yield lambda operation, in_flight, seconds: load.generate(
            [sys.executable, STACKS_DIR / "asyncpg_alone.py", operation, str(in_flight), str(seconds), str(load.USERS)],
            seconds,
            DATABASE_URL=url,
        )
    elif stack.module.startswith("fastapi"):
        with http_server(stack, url) as addr:
            yield partial(load.wrk, addr)
    else:
        if not settings.grpc_load.exists():
            raise Failed(f"no load generator for gRPC: there is no {settings.grpc_load.name}, please build it")
        with grpc_server(stack, url, settings.service) as addr:
            yield partial(load.grpc, settings.grpc_load, addr)


@contextmanager
def http_server(stack: Stack, url: str) -> Iterator[str]:
    # One worker process, with uvloop and httptools, since they are installed. The
    # line that it would log for each request is spared it.
    app = [f"{stack.module}:app", "--app-dir", STACKS_DIR, "--port", "0", "--no-access-log"]
    ready = r"Uvicorn running on http://(127\.0\.0\.1:\d+)"
    with log_file() as log:
        command = [sys.executable, "-m", "uvicorn", *app]
        with running(command, log, ready, env=environment(DATABASE_URL=url)) as found:
            yield found[1]


@contextmanager
def grpc_server(stack: Stack, url: str, service: Path) -> Iterator[str]:
    if stack.module:
        command = [sys.executable, STACKS_DIR / f"{stack.module}.py"]
        ready = r"listening on (127\.0\.0\.1:\d+)"
    else:
        command = [service]
        ready = r'"message":"listening","addr":"([^"]+)"'
    variables = {"LISTEN_ADDR": "127.0.0.1:0", "DRAIN_DELAY_MS": "0", **stack.variables}
    with log_file() as log:
        with running(command, log, ready, env=environment(DATABASE_URL=url, **variables)) as found:
            if not stack.module:
                wait_until_serving(service, found[1])
            yield found[1]


def wait_until_serving(service: Path, addr: str) -> None:
    """It listens before it is ready: the copy of a database has to be made its own first."""
    deadline = time.monotonic() + 30
    while True:
        try:
            run([service, "check", "--addr", addr])
            return
        except Failed:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.05)


@contextmanager
def log_file() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="peers-") as directory:
        yield Path(directory) / "log"


def measure(stack: Stack, calls: Load, seconds: float) -> None:
    for operation in OPERATIONS:
        # Connections are opened, statements prepared; and does it work at all?
        warm = calls(operation, 10, WARM_UP_S)
        if warm.failed or not warm.rate:
            raise Failed(f"cannot {operation} a user ({warm.failed} calls failed)")
        for connections in CONNECTIONS:
            cell = calls(operation, connections, seconds)
            stack.cells.setdefault((operation, connections), []).append(cell)


def wait_in_database(addr: str, seconds: float) -> report.Waits:
    """Ten calls that each wait in the database: one after the other, and together."""

    def call(_: int) -> None:
        with urllib.request.urlopen(f"http://{addr}/sleep?seconds={seconds}", timeout=60) as answer:
            answer.read()

    start = time.monotonic()
    for n in range(10):
        call(n)
    serial = time.monotonic() - start
    start = time.monotonic()
    with ThreadPoolExecutor(10) as threads:
        list(threads.map(call, range(10)))
    return report.Waits(seconds, serial, time.monotonic() - start)


if __name__ == "__main__":
    main()
