"""The page: what was measured, as Markdown."""

import importlib.metadata
import os
import platform
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from load import USERS
from rows import ALONE, BASELINE, CONNECTIONS, OPERATIONS, SERVICE, Stack

LIBRARIES = (
    "fastapi", "uvicorn", "uvloop", "httptools", "pydantic", "asyncpg", "psycopg", "psycopg-pool", "databases",
    "aiopg", "psycopg2-binary", "SQLAlchemy", "grpcio", "protobuf",
)

# What the notes that this service began with claim for asyncpg. They do not say with how
# many connections.
CLAIMED = {"get": "50,000–100,000", "create": "10,000–30,000"}


@dataclass(frozen=True)
class Waits:
    """How long ten calls took that each wait in the database."""

    each_s: float
    serial_s: float
    together_s: float


def page(stacks: list[Stack], waits: Waits | None, programs: list[str], seconds: float, repetitions: int) -> str:
    how = f"medians of {repetitions} interleaved repetitions" if repetitions > 1 else "one repetition"
    return "\n\n".join((
        "# Beside the stacks it grew out of",
        "Written by `make bench-peers`. The same work in one run on one machine: get one user by a random id, and\n"
        f"create one with a new name, on a PostgreSQL with {USERS:,} users and fsync on, at 1, 10 and 100 connections\n"
        f"(for gRPC: calls in flight, on a few connections). Calls a second that succeeded, {how} of {seconds:g} s.\n"
        "The last four columns are at 100: the 99th percentile of the latency, and the rate ÷ that of FastAPI with\n"
        "asyncpg. Compare within the table only: another machine has other figures.",
        table(stacks),
        f"*{machine(programs)}*",
        "## Ten at once",
        ten_at_once(stacks, waits),
        "## How to read it",
        notes(stacks),
    )) + "\n"


def table(stacks: list[Stack]) -> str:
    baseline = find(stacks, BASELINE)
    header = ["stack"]
    for operation in OPERATIONS:
        header += [f"{operation}/s at {CONNECTIONS[0]}", *(f"at {connections}" for connections in CONNECTIONS[1:])]
    header += [f"{operation} p99, ms" for operation in OPERATIONS]
    header += [f"{operation} ÷" for operation in OPERATIONS]
    lines = [header, ["--", *["--:"] * (len(header) - 1)]]
    for stack in stacks:
        lines.append([stack.name, *figures(stack, baseline, len(header) - 1)])
        if stack.name == ALONE:
            lines.append(["*asyncpg, as claimed*", "", "", CLAIMED["get"], "", "", CLAIMED["create"], *[""] * 4])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def figures(stack: Stack, baseline: Stack | None, width: int) -> list[str]:
    if stack.missing:
        return [stack.missing.replace("|", "/"), *[""] * (width - 1)]
    most = CONNECTIONS[-1]
    rates = [f"{stack.rate(operation, n):,.0f}" for operation in OPERATIONS for n in CONNECTIONS]
    tails = [f"{stack.p99_us(operation, most) / 1000:.1f}" for operation in OPERATIONS]
    ratios = [
        ratio(stack.rate(operation, most), baseline.rate(operation, most) if baseline else 0)
        for operation in OPERATIONS
    ]
    return [*rates, *tails, *ratios]


def ratio(over: float, under: float) -> str:
    return f"{over / under:.2f}" if under else "–"


def ten_at_once(stacks: list[Stack], waits: Waits | None) -> str:
    lines = ["What this service began with were notes that claim so much for asyncpg, as in the table, and tenfold for "
        "concurrent over serial calls.", ""]
    if waits:
        lines.append(
            f"- {BASELINE}, ten calls that each wait {waits.each_s:g} s in the database (`select pg_sleep(…)`): "
            f"{waits.serial_s:.2f} s one after the other, {waits.together_s:.2f} s together: "
            f"{waits.serial_s / waits.together_s:.1f} times as fast. While it waits, a call costs nothing."
        )
    shown = [stack for stack in stacks if not stack.missing]
    gains = "; ".join(f"{stack.name}: {ratio(stack.rate('get', 10), stack.rate('get', 1))}" for stack in shown)
    lines.append(
        "- Calls that work instead of waiting compete for the processors, and gain less: "
        f"`get` at 10 connections ÷ at 1: {gains}."
    )
    lines.append("- This service has no call that sleeps, so it is not in the first line.")
    return "\n".join(lines)


def notes(stacks: list[Stack]) -> str:
    failed = {stack.name: sum(cell.failed for cell in stack.all_cells()) for stack in stacks}
    failures = ", ".join(f"{name} {count:,}" for name, count in failed.items() if count)
    lines = [
        "Each stack is written as its own documentation would ([`bench/peers/stacks`](../../bench/peers/stacks)): the "
        "default settings of its library, 10 connections to PostgreSQL, the user checked and shaped by Pydantic, and "
        "an explicit transaction on create. One process each, as one replica would have; uvicorn on uvloop and "
        "httptools, without its access log. The service has 10 connections too, and one process with a thread for "
        "each processor. More processes of Python would do more, where processors are idle.",
        "The work is not quite the same. This service's create also writes a row of the change log and a row for the "
        "request id, in the same transaction, so that a retry is safe, and it checks names by RFC 8265 and UTS #39, "
        "where the others take the lower case. In return it needs no round trips for the transaction, and its ids are "
        "UUIDs of version 7, which an index likes better than theirs of version 4.",
        f"*{ALONE}* has neither HTTP nor JSON: {CONNECTIONS[-1]} tasks in one process call the pool, nothing else. It "
        "is what the figures of a driver, and so what is claimed, are about.",
        "Each stack gets its own copy of the database, and the others do not run meanwhile. psycopg2 blocks, so its "
        "functions run in as many threads as it has connections.",
        "The load comes from [wrk](https://github.com/wg/wrk) for HTTP, of which only answers with a status of 2xx "
        "count, and from `bench load` for gRPC, of which only trailers that say OK do. Each has one thread, on "
        f"the same machine. {generators(stacks)} (wrk adds to its percentiles the calls that a stall kept it from "
        "sending, so what is more than twice the mean may look a little worse for HTTP.)",
        f"Calls that failed, and are not counted: {failures or 'none'}.",
    ]
    return "\n".join(f"- {line}" for line in lines)


def generators(stacks: list[Stack]) -> str:
    used = [(cell.generator_cores, stack.name) for stack in stacks if stack.name != ALONE for cell in stack.all_cells()]
    most, name = max(used, default=(0, "none"))
    so = "none was at its limit" if most < 0.9 else "that one was at its limit, and the stack would go faster"
    return f"The busiest of them, for {name}, took {most:.2f} of a processor: {so}."


def machine(programs: list[str]) -> str:
    python = f"Python {platform.python_version()}"
    libraries = [f"{name} {version}" for name in LIBRARIES if (version := installed(name))]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    hardware = f"{processor()}, {cores} cores, {platform.system()}"
    return "; ".join((hardware, *programs, python, ", ".join(libraries)))


def processor() -> str:
    try:
        found = re.search(r"^model name\s*: (.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        found = None
    return found[1] if found else platform.machine()


def installed(library: str) -> str | None:
    try:
        return importlib.metadata.version(library)
    except importlib.metadata.PackageNotFoundError:
        return None


def find(stacks: list[Stack], name: str) -> Stack | None:
    return next((stack for stack in stacks if stack.name == name and not stack.missing), None)
