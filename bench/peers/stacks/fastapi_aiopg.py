"""FastAPI and aiopg."""

import os
from contextlib import asynccontextmanager
from typing import Any
from uuid import UUID, uuid4

import aiopg
from fastapi import FastAPI, HTTPException
from psycopg2.extras import RealDictCursor

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


@asynccontextmanager
async def lifespan(app: FastAPI):
    async with aiopg.create_pool(
        os.environ["DATABASE_URL"], minsize=10, maxsize=10, cursor_factory=RealDictCursor
    ) as pool:
        app.state.pool = pool
        yield


app = FastAPI(lifespan=lifespan)


@app.get("/users/{user_id}", response_model=User)
async def get_user(user_id: UUID) -> Any:
    async with app.state.pool.acquire() as connection, connection.cursor() as cursor:
        await cursor.execute(GET, (str(user_id),))
        row = await cursor.fetchone()
    if row is None:
        raise HTTPException(404)
    return row


@app.post("/users", status_code=201, response_model=User)
async def create_user(new: NewUser) -> Any:
    async with app.state.pool.acquire() as connection, connection.cursor() as cursor:
        async with cursor.begin():
            await cursor.execute(
                CREATE,
                (str(uuid4()), new.username, new.username.lower(), new.email, new.email.lower(), new.display_name),
            )
            return await cursor.fetchone()
