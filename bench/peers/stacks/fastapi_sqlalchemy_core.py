"""FastAPI and SQLAlchemy Core, asynchronous, on asyncpg."""

import os
from contextlib import asynccontextmanager
from typing import Any
from uuid import UUID, uuid4

from fastapi import FastAPI, HTTPException
from sqlalchemy import (
    TIMESTAMP, BigInteger, Boolean, Column, MetaData, Table, Text, Uuid, func, insert, make_url, select,
)
from sqlalchemy.ext.asyncio import create_async_engine

from models import NewUser, User

users = Table(
    "users",
    MetaData(),
    Column("id", Uuid, primary_key=True, default=uuid4),
    Column("username", Text),
    Column("username_key", Text),
    Column("username_held", Boolean, default=True),
    Column("email", Text),
    Column("email_key", Text),
    Column("display_name", Text),
    Column("revision", BigInteger, default=1),
    Column("create_time", TIMESTAMP(timezone=True), default=func.now()),
    Column("update_time", TIMESTAMP(timezone=True), default=func.now()),
    Column("delete_time", TIMESTAMP(timezone=True)),
    Column("purge_time", TIMESTAMP(timezone=True)),
)
shown = [users.c[name] for name in User.model_fields]

url = make_url(os.environ["DATABASE_URL"]).set(drivername="postgresql+asyncpg")
engine = create_async_engine(url, pool_size=10, max_overflow=0)


@asynccontextmanager
async def lifespan(_: FastAPI):
    yield
    await engine.dispose()


app = FastAPI(lifespan=lifespan)


@app.get("/users/{user_id}", response_model=User)
async def get_user(user_id: UUID) -> Any:
    async with engine.connect() as connection:
        row = (await connection.execute(select(*shown).where(users.c.id == user_id))).first()
    if row is None:
        raise HTTPException(404)
    return row


@app.post("/users", status_code=201, response_model=User)
async def create_user(new: NewUser) -> Any:
    values = {"username_key": new.username.lower(), "email_key": new.email.lower(), **new.model_dump()}
    async with engine.begin() as connection:
        return (await connection.execute(insert(users).values(values).returning(*shown))).one()
