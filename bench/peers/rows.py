"""The rows of the table: what is compared, and what came of it."""

from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

from load import Cell

OPERATIONS = ("get", "create")
CONNECTIONS = (1, 10, 100)

BASELINE = "FastAPI, asyncpg"
ALONE = "asyncpg, no server"
SERVICE = "user-service"


@dataclass
class Stack:
    name: str
    # The file in stacks/; none for this service.
    module: str = ""
    # What pip installs for it. Each stack by itself, so that one that cannot be
    # installed any more costs its own row only.
    requirements: tuple[str, ...] = ()
    variables: dict[str, str] = field(default_factory=dict)
    # The repetitions, by operation and connections.
    cells: dict[tuple[str, int], list[Cell]] = field(default_factory=dict)
    # Why there is nothing to show.
    missing: str = ""

    def rate(self, operation: str, connections: int) -> float:
        return median(cell.rate for cell in self.cells[operation, connections])

    def p99_us(self, operation: str, connections: int) -> float:
        return median(cell.p99_us for cell in self.cells[operation, connections])

    def all_cells(self) -> list[Cell]:
        return [cell for cells in self.cells.values() for cell in cells]


HTTP = ("-r", str(Path(__file__).with_name("requirements.txt")))
ASYNCPG = "asyncpg==0.32.0"
SQLALCHEMY = "sqlalchemy[asyncio]==2.1.9"
GRPC = ("grpcio==1.85.1", "grpcio-tools==1.85.1")


def all_stacks() -> list[Stack]:
    return [
        Stack(BASELINE, "fastapi_asyncpg", (*HTTP, ASYNCPG)),
        Stack("FastAPI, psycopg 3", "fastapi_psycopg3", (*HTTP, "psycopg[binary,pool]==3.3.9")),
        Stack("FastAPI, databases", "fastapi_databases", (*HTTP, ASYNCPG, "databases==0.9.0")),
        Stack("FastAPI, aiopg", "fastapi_aiopg", (*HTTP, "aiopg==1.4.0")),
        Stack("FastAPI, psycopg2", "fastapi_psycopg2", (*HTTP, "psycopg2-binary==2.9.13")),
        Stack("FastAPI, SQLAlchemy ORM", "fastapi_sqlalchemy_orm", (*HTTP, ASYNCPG, SQLALCHEMY)),
        Stack("FastAPI, SQLAlchemy Core", "fastapi_sqlalchemy_core", (*HTTP, ASYNCPG, SQLALCHEMY)),
        Stack("grpc.aio, asyncpg", "grpc_asyncpg", (*GRPC, ASYNCPG)),
        Stack(ALONE, "asyncpg_alone", (ASYNCPG, "uvloop")),
        Stack(f"{SERVICE}, `GROUPING=off`", variables={"GROUPING": "off"}),
        Stack(SERVICE, variables={"GROUPING": "on"}),
    ]
