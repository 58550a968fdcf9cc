"""FastAPI and asyncpg."""

import os
from contextlib import asynccontextmanager
from typing import Any
from uuid import UUID, uuid4

import asyncpg
from fastapi import FastAPI, HTTPException

from models import NewUser, User
from statements import CREATE, GET


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
