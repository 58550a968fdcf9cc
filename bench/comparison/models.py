"""The messages of the HTTP stacks."""

from datetime import datetime
from uuid import UUID

from pydantic import BaseModel


class NewUser(BaseModel):
    username: str
    email: str
    display_name: str = ""


class User(BaseModel):
    id: UUID
    username: str
    email: str
    display_name: str
    create_time: datetime
    update_time: datetime
    delete_time: datetime | None
    purge_time: datetime | None
    revision: int
