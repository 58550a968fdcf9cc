"""FastAPI and psycopg 3, asynchronous."""

import os
from contextlib import asynccontextmanager
from typing import Any
from uuid import UUID, uuid4

from fastapi import FastAPI, HTTPException
from psycopg.rows import dict_row
from psycopg_pool import AsyncConnectionPool

from models import NewUser, User

COLUMNS = "id, username, email, display_name, create_time, update_time, delete_time, purge_time, revision"
GET = f"select {COLUMNS} from users where id = %s"
CREATE = f"""
    insert into users (
        id, username, username_key, username_held, email, email_key, display_name,
        revision, create_time, update_time
    )
    values (%s, %s, %s, true, %s, %s, %s, 1, now(), now())
    returning {COLUMNS}
"""

pool = AsyncConnectionPool(
    os.environ["DATABASE_URL"], min_size=10, max_size=10, open=False, kwargs={"row_factory": dict_row}
)


@asynccontextmanager
async def lifespan(_: FastAPI):
    async with pool:
        await pool.wait()
        yield


app = FastAPI(lifespan=lifespan)


@app.get("/users/{user_id}", response_model=User)
async def get_user(user_id: UUID) -> Any:
    async with pool.connection() as connection:
        cursor = await connection.execute(GET, (user_id,))
        row = await cursor.fetchone()
    if row is None:
        raise HTTPException(404)
    return row


@app.post("/users", status_code=201, response_model=User)
async def create_user(new: NewUser) -> Any:
    # The block is the transaction.
    async with pool.connection() as connection:
        cursor = await connection.execute(
            CREATE, (uuid4(), new.username, new.username.lower(), new.email, new.email.lower(), new.display_name)
        )
        return await cursor.fetchone()
