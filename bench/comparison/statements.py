"""The SQL of the stacks without an ORM."""

COLUMNS = "id, username, email, display_name, create_time, update_time, delete_time, purge_time, revision"
GET = f"select {COLUMNS} from users where id = $1"
CREATE = f"""
    insert into users (
        id, username, username_key, username_held, email, email_key, display_name,
        revision, create_time, update_time
    )
    values ($1, $2, $3, true, $4, $5, $6, 1, now(), now())
    returning {COLUMNS}
"""
