"""FastAPI and databases, on asyncpg."""

import os
from contextlib import asynccontextmanager
from typing import Any
from uuid import UUID, uuid4

from databases import Database
from fastapi import FastAPI, HTTPException

from models import NewUser, User

COLUMNS = "id, username, email, display_name, create_time, update_time, delete_time, purge_time, revision"
GET = f"select {COLUMNS} from users where id = :id"
CREATE = f"""
    insert into users (
        id, username, username_key, username_held, email, email_key, display_name,
        revision, create_time, update_time
    )
    values (:id, :username, :username_key, true, :email, :email_key, :display_name, 1, now(), now())
    returning {COLUMNS}
"""

database = Database(os.environ["DATABASE_URL"], min_size=10, max_size=10)


@asynccontextmanager
async def lifespan(_: FastAPI):
    async with database:
        yield


app = FastAPI(lifespan=lifespan)


@app.get("/users/{user_id}", response_model=User)
async def get_user(user_id: UUID) -> Any:
    row = await database.fetch_one(GET, {"id": user_id})
    if row is None:
        raise HTTPException(404)
    return dict(row._mapping)


@app.post("/users", status_code=201, response_model=User)
async def create_user(new: NewUser) -> Any:
    values = {
        "id": uuid4(),
        "username": new.username,
        "username_key": new.username.lower(),
        "email": new.email,
        "email_key": new.email.lower(),
        "display_name": new.display_name,
    }
    async with database.transaction():
        row = await database.fetch_one(CREATE, values)
    return dict(row._mapping)
