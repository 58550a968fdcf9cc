"""FastAPI and the asynchronous ORM of SQLAlchemy, on asyncpg."""

import os
from contextlib import asynccontextmanager
from datetime import datetime
from typing import Annotated, Any
from uuid import UUID, uuid4

from fastapi import Depends, FastAPI, HTTPException
from sqlalchemy import TIMESTAMP, BigInteger, func, make_url
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker, create_async_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from models import NewUser, User


class Base(DeclarativeBase):
    type_annotation_map = {datetime: TIMESTAMP(timezone=True), int: BigInteger}


class UserRow(Base):
    __tablename__ = "users"

    id: Mapped[UUID] = mapped_column(primary_key=True, default=uuid4)
    username: Mapped[str]
    username_key: Mapped[str]
    username_held: Mapped[bool] = mapped_column(default=True)
    email: Mapped[str]
    email_key: Mapped[str]
    display_name: Mapped[str]
    revision: Mapped[int] = mapped_column(default=1)
    create_time: Mapped[datetime] = mapped_column(default=func.now())
    update_time: Mapped[datetime] = mapped_column(default=func.now())
    delete_time: Mapped[datetime | None]
    purge_time: Mapped[datetime | None]


url = make_url(os.environ["DATABASE_URL"]).set(drivername="postgresql+asyncpg")
engine = create_async_engine(url, pool_size=10, max_overflow=0)
new_session = async_sessionmaker(engine, expire_on_commit=False)


async def session():
    async with new_session() as session:
        yield session


Session = Annotated[AsyncSession, Depends(session)]


@asynccontextmanager
async def lifespan(_: FastAPI):
    yield
    await engine.dispose()


app = FastAPI(lifespan=lifespan)


@app.get("/users/{user_id}", response_model=User)
async def get_user(user_id: UUID, session: Session) -> Any:
    user = await session.get(UserRow, user_id)
    if user is None:
        raise HTTPException(404)
    return user


@app.post("/users", status_code=201, response_model=User)
async def create_user(new: NewUser, session: Session) -> Any:
    user = UserRow(username_key=new.username.lower(), email_key=new.email.lower(), **new.model_dump())
    async with session.begin():
        session.add(user)
    return user
