"""asyncpg with no server in front, which is what a driver's own figures are about.

Usage: asyncpg_alone.py get|create IN_FLIGHT SECONDS USERS. It calls itself, so it
prints what a load generator prints.
"""

import asyncio
import json
import os
import random
import sys
import time
from uuid import UUID, uuid4

import asyncpg
import uvloop

COLUMNS = "id, username, email, display_name, create_time, update_time, delete_time, purge_time, revision"
GET = f"select {COLUMNS} from users where id = $1"
CREATE = f"""
    insert into users (
        id, username, username_key, username_held, email, email_key, display_name,
        revision, create_time, update_time
    )
    values ($1, $2, $2, true, $3, $3, '', 1, now(), now())
    returning {COLUMNS}
"""


async def get(pool: asyncpg.Pool, users: int) -> None:
    user_id = UUID(f"0190a3c0-0000-7000-8000-{random.randint(1, users):012}")
    assert await pool.fetchrow(GET, user_id)


async def create(pool: asyncpg.Pool, _: int) -> None:
    user_id = uuid4()
    async with pool.acquire() as connection, connection.transaction():
        await connection.fetchrow(CREATE, user_id, f"u{user_id.hex}", f"u{user_id.hex}@example.com")


async def main(rpc: str, in_flight: int, seconds: float, users: int) -> None:
    call = {"get": get, "create": create}[rpc]
    times_us: list[float] = []
    async with asyncpg.create_pool(os.environ["DATABASE_URL"], min_size=10, max_size=10) as pool:
        start = time.perf_counter()

        async def caller() -> None:
            now = time.perf_counter()
            while now < start + seconds:
                began = now
                await call(pool, users)
                now = time.perf_counter()
                times_us.append((now - began) * 1e6)

        await asyncio.gather(*(caller() for _ in range(in_flight)))
        elapsed = time.perf_counter() - start
    times_us.sort()
    p50, p99 = (times_us[int(len(times_us) * share)] for share in (0.5, 0.99))
    print(json.dumps({"ok": len(times_us), "errors": 0, "seconds": elapsed, "p50_us": p50, "p99_us": p99}))


uvloop.run(main(sys.argv[1], int(sys.argv[2]), float(sys.argv[3]), int(sys.argv[4])))
