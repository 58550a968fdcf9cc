"""FastAPI and asyncpg."""

import os
from contextlib import asynccontextmanager
from typing import Any
from uuid import UUID, uuid4

import asyncpg
from fastapi import FastAPI, HTTPException

from models import NewUser, User

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


@asynccontextmanager
async def lifespan(app: FastAPI):
    async with asyncpg.create_pool(os.environ["DATABASE_URL"], min_size=10, max_size=10) as pool:
        app.state.pool = pool
        yield


app = FastAPI(lifespan=lifespan)


@app.get("/users/{user_id}", response_model=User)
async def get_user(user_id: UUID) -> Any:
    row = await app.state.pool.fetchrow(GET, user_id)
    if row is None:
        raise HTTPException(404)
    return dict(row)


@app.post("/users", status_code=201, response_model=User)
async def create_user(new: NewUser) -> Any:
    async with app.state.pool.acquire() as connection, connection.transaction():
        row = await connection.fetchrow(
            CREATE, uuid4(), new.username, new.username.lower(), new.email, new.email.lower(), new.display_name
        )
    return dict(row)


@app.get("/sleep")
async def sleep(seconds: float) -> None:
    await app.state.pool.execute("select pg_sleep($1)", seconds)
