"""grpc.aio and asyncpg: this service's own proto, compiled as it is imported."""

import asyncio
import os
import signal
import sys
from pathlib import Path
from uuid import UUID, uuid4

import asyncpg
import grpc

sys.path.append(str(Path(__file__).parents[3] / "proto"))
pb, pb_grpc = grpc.protos_and_services("users/v1/user_service.proto")

COLUMNS = "id, username, email, display_name, create_time, update_time, delete_time, purge_time, revision"
GET = f"select {COLUMNS} from users where id = $1"
CREATE = f"""
    insert into users (
        id, username, username_key, username_held, email, email_key, display_name,
        revision, create_time, update_time
    )
    values ($1, $2, $3, true, $4, $5, $6, 1, now(), now())
    returning {COLUMNS}
"""


def user(row: asyncpg.Record):
    return pb.User(**{**row, "id": str(row["id"])})


class Users(pb_grpc.UserServiceServicer):
    def __init__(self, pool: asyncpg.Pool):
        self.pool = pool

    async def GetUser(self, request, context):
        row = await self.pool.fetchrow(GET, UUID(request.id))
        if row is None:
            await context.abort(grpc.StatusCode.NOT_FOUND, "no such user")
        return pb.GetUserResponse(user=user(row))

    async def CreateUser(self, request, context):
        new = request.user
        async with self.pool.acquire() as connection, connection.transaction():
            row = await connection.fetchrow(
                CREATE, uuid4(), new.username, new.username.lower(), new.email, new.email.lower(), new.display_name
            )
        return pb.CreateUserResponse(user=user(row))


async def main() -> None:
    async with asyncpg.create_pool(os.environ["DATABASE_URL"], min_size=10, max_size=10) as pool:
        server = grpc.aio.server()
        pb_grpc.add_UserServiceServicer_to_server(Users(pool), server)
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        print(f"listening on 127.0.0.1:{port}", file=sys.stderr, flush=True)
        stop = asyncio.Event()
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
        await stop.wait()
        await server.stop(grace=1)


asyncio.run(main())
