"""grpc.aio and asyncpg, with the proto of this service, which grpc compiles on import."""

import asyncio
import os
import sys
from pathlib import Path
from uuid import UUID, uuid4

import asyncpg
import grpc

from statements import CREATE, GET

sys.path.append(str(Path(__file__).resolve().parents[2] / "proto"))
pb, pb_grpc = grpc.protos_and_services("users/v1/user_service.proto")


def user(row: asyncpg.Record):
    return pb.User(**{**row, "id": str(row["id"])})


class UserService(pb_grpc.UserServiceServicer):
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
        pb_grpc.add_UserServiceServicer_to_server(UserService(pool), server)
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        print(f"listening on 127.0.0.1:{port}", file=sys.stderr, flush=True)
        await server.wait_for_termination()


asyncio.run(main())
