"""A PostgreSQL of our own: this machine's server binaries, a temporary directory,
and a socket in it. Its settings are PostgreSQL's defaults; so fsync is on."""

import os
import pwd
import re
import shutil
import signal
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from processes import Failed, environment, run, running

# Where server binaries are when they are not on the PATH; `*` is a version.
BIN_DIRS = (
    "/usr/lib/postgresql/*/bin",
    "/usr/local/lib/postgresql/*/bin",
    "/opt/homebrew/opt/postgresql*/bin",
    "/usr/local/opt/postgresql*/bin",
)

# Users of which PostgreSQL may be when we are root, which it refuses to run as.
USERS = ("postgres", "nobody")


class Postgres:
    def __init__(self, bin_dir: Path, directory: Path):
        self.bin_dir = bin_dir
        self.directory = directory

    def url(self, database: str) -> str:
        return f"postgresql://postgres@/{database}?host={self.directory}"

    def sql(self, statement: str, database: str = "postgres") -> str:
        psql = [self.bin_dir / "psql", "-XAtq", "-v", "ON_ERROR_STOP=1", "-c", statement, self.url(database)]
        return run(psql, env=environment()).strip()

    @contextmanager
    def database(self, name: str, template: str = "template1") -> Iterator[str]:
        """A copy of a database, for as long as the block lasts."""
        self.sql(f"create database {name} template {template}")
        try:
            # The copying shall not be written out while something is measured.
            self.sql("checkpoint")
            yield self.url(name)
        finally:
            self.sql(f"drop database {name} with (force)")


@contextmanager
def started() -> Iterator[Postgres]:
    bin_dir = find_binaries()
    # Not TMPDIR: the path of a socket has 107 bytes at most.
    directory = Path(tempfile.mkdtemp(prefix="peers-", dir="/tmp"))
    try:
        options = {"env": environment(), "cwd": "/"}
        if os.geteuid() == 0:
            user = unprivileged_user()
            os.chown(directory, user.pw_uid, user.pw_gid)
            options |= {"user": user.pw_uid, "group": user.pw_gid, "extra_groups": []}
        data = directory / "data"
        initdb = ["--username=postgres", "--auth=trust", "--encoding=UTF8", "--no-locale", "--pgdata", data]
        run([bin_dir / "initdb", *initdb], **options)
        server = [bin_dir / "postgres", "-D", data, "-c", "listen_addresses=", "-k", directory]
        # SIGINT is its fast shutdown: sessions are ended.
        log = directory / "postgres.log"
        with running(server, log, "ready to accept connections", stop=signal.SIGINT, **options):
            yield Postgres(bin_dir, directory)
    finally:
        shutil.rmtree(directory)


def find_binaries() -> Path:
    if initdb := shutil.which("initdb"):
        # A link may be there without its neighbours.
        return Path(initdb).resolve().parent
    found = [path for pattern in BIN_DIRS for path in Path("/").glob(pattern[1:]) if (path / "initdb").exists()]
    if not found:
        raise Failed("there are no PostgreSQL server binaries: please install the package postgresql")
    return max(found, key=lambda path: [int(number) for number in re.findall(r"\d+", str(path))])


def unprivileged_user() -> pwd.struct_passwd:
    for name in USERS:
        try:
            return pwd.getpwnam(name)
        except KeyError:
            continue
    raise Failed(f"PostgreSQL does not run as root, and there is no other user ({', '.join(USERS)})")
