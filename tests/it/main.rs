//! The service, proved through gRPC on a real PostgreSQL.
