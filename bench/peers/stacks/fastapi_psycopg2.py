"""FastAPI and psycopg2, which blocks: FastAPI runs the functions in threads."""

import os
from contextlib import asynccontextmanager, contextmanager
from typing import Any
from uuid import UUID, uuid4

from anyio import to_thread
from fastapi import FastAPI, HTTPException
from psycopg2.extras import RealDictCursor
from psycopg2.pool import ThreadedConnectionPool

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

pool = ThreadedConnectionPool(10, 10, os.environ["DATABASE_URL"], cursor_factory=RealDictCursor)


@contextmanager
def transaction():
    connection = pool.getconn()
    try:
        with connection, connection.cursor() as cursor:
            yield cursor
    finally:
        pool.putconn(connection)


@asynccontextmanager
async def lifespan(_: FastAPI):
    # A pool without a free connection refuses instead of waiting, so there are
    # as many threads as connections.
    to_thread.current_default_thread_limiter().total_tokens = 10
    yield
    pool.closeall()


app = FastAPI(lifespan=lifespan)


@app.get("/users/{user_id}", response_model=User)
def get_user(user_id: UUID) -> Any:
    with transaction() as cursor:
        cursor.execute(GET, (str(user_id),))
        row = cursor.fetchone()
    if row is None:
        raise HTTPException(404)
    return row


@app.post("/users", status_code=201, response_model=User)
def create_user(new: NewUser) -> Any:
    with transaction() as cursor:
        cursor.execute(
            CREATE,
            (str(uuid4()), new.username, new.username.lower(), new.email, new.email.lower(), new.display_name),
        )
        return cursor.fetchone()
