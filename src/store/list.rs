//! The statements of lists. Each walks along an index between two positions.

use prost::Message;
use tokio_postgres::{Row, types::ToSql};

use crate::error::{Access, Error};
use crate::model::page::{Key, Order, Page, Position, Selection};
use crate::model::request::List;
use crate::model::token::TokenKeys;
use crate::pb;
use crate::store::change_log::{POSITION_COLUMN_COUNT, current_position, position_from_row};
use crate::store::pool::Db;
use crate::store::user_row::{CREATE_TIME, ID, USER_COLUMN_COUNT, column, user_columns, user_from_row};

/// Every statement of this file, for preparation.
pub const STATEMENTS: &[&str] = &[
    BEGINNING,
    CREATE_TIME_DESC.live,
    CREATE_TIME_DESC.all,
    CREATE_TIME_ASC.live,
    CREATE_TIME_ASC.all,
    EMAIL_DESC.live,
    EMAIL_DESC.all,
    EMAIL_ASC.live,
    EMAIL_ASC.all,
    USERNAME_ASC.live,
    USERNAME_ASC.all,
];

/// A list without and with soft-deleted users.
struct Statements {
    live: &'static str,
    all: &'static str,
}

/// Users between two positions, exclusive. Live and deleted users have indexes of
/// their own, so a list of both merges two walks.
macro_rules! statements {
    ($positions:literal, $order:literal) => {
        Statements {
            live: statements!(walk "delete_time is null and username_held", $positions, $order),
            all: concat!(
                "select * from (",
                statements!(walk "delete_time is null and username_held", $positions, $order),
                " union all ",
                statements!(walk "delete_time is not null", $positions, $order),
                ") as both_walks order by ", $order, " limit $5"
            ),
        }
    };
    (walk $which:literal, $positions:literal, $order:literal) => {
        concat!(
            "(select ", user_columns!(), ", username_key from users where ", $which, " and ", $positions,
            " order by ", $order, " limit $5)"
        )
    };
}

const CREATE_TIME_DESC: Statements =
    statements!("(create_time, id) > ($1, $2) and (create_time, id) < ($3, $4)", "create_time desc, id desc");

const CREATE_TIME_ASC: Statements =
    statements!("(create_time, id) > ($1, $2) and (create_time, id) < ($3, $4)", "create_time, id");

const EMAIL_DESC: Statements = statements!(
    "email_key = $6 and (create_time, id) > ($1, $2) and (create_time, id) < ($3, $4)",
    "create_time desc, id desc"
);

const EMAIL_ASC: Statements = statements!(
    "email_key = $6 and (create_time, id) > ($1, $2) and (create_time, id) < ($3, $4)",
    "create_time, id"
);

const USERNAME_ASC: Statements =
    statements!("(username_key, id) > ($1, $2) and (username_key, id) < ($3, $4)", "username_key, id");

/// The position in history from which a watch continues, and statistics.
const BEGINNING: &str = concat!(
    "select log_position.*, greatest(reltuples, 0)::bigint from pg_class left join ",
    current_position!(),
    " on true where pg_class.oid = 'users'::regclass"
);

/// Encoded bytes of users at which a page ends, so that it fits into a message of 4 MiB
/// however large users are.
const PAGE_MAX_BYTES: usize = 1024 * 1024;

/// Reads [`BEGINNING`]. A server that does not tell the position still has the users.
async fn beginning(db: &Db) -> Result<Vec<Row>, Error> {
    match db.run(Access::Read, BEGINNING, &[]).await {
        Err(Error::Internal) => Ok(Vec::new()),
        result => result,
    }
}

/// Returns a page.
pub async fn list(
    db: &Db,
    keys: &TokenKeys,
    List { page, is_unfiltered, view }: &List,
) -> Result<pb::ListUsersResponse, Error> {
    let mut response = pb::ListUsersResponse::default();
    // Read before the users: a watch may send a change again, but must not miss one.
    if page.is_first
        && let Some(row) = beginning(db).await?.first()
    {
        response.watch_token = position_from_row(row)?.map(|point| point.to_token(keys)).unwrap_or_default();
        if *is_unfiltered {
            response.total_size_estimate = column(row, POSITION_COLUMN_COUNT)?;
        }
    }
    let (rows, mut is_last) = walk(db, page).await?;
    response.users =
        rows.iter().map(|row| user_from_row(row).map(|user| view.of(user))).collect::<Result<_, _>>()?;
    let len = page_len(response.users.iter().map(Message::encoded_len));
    is_last &= len == rows.len();
    response.users.truncate(len);
    let last = response.users.len().checked_sub(1).and_then(|last| rows.get(last));
    if let Some(last) = last.filter(|_| !is_last) {
        response.next_page_token = page.token_after(keys, &position(last, page.rest.order)?);
    }
    Ok(response)
}

/// How many users a page has, of which these are the sizes.
fn page_len(sizes: impl Iterator<Item = usize>) -> usize {
    let mut bytes = 0;
    let fits = |size: &usize| {
        let is_first_beyond = bytes >= PAGE_MAX_BYTES;
        bytes += size;
        !is_first_beyond
    };
    sizes.take_while(fits).count()
}

/// The users of a page, and whether it is the last one.
pub(crate) async fn walk(db: &Db, page: &Page) -> Result<(Vec<Row>, bool), Error> {
    let one_more = i64::try_from(page.size + 1).ok();
    let mut rows = db.run(Access::Read, statement(&page.rest), &params(&page.rest, &one_more)).await?;
    let is_last = rows.len() <= page.size;
    rows.truncate(page.size);
    Ok((rows, is_last))
}

/// The statement that walks along a list.
pub(crate) fn statement(list: &Selection) -> &'static str {
    let statements = match (list.order, &list.email_key) {
        (Order::CreateTimeDesc, None) => CREATE_TIME_DESC,
        (Order::CreateTimeAsc, None) => CREATE_TIME_ASC,
        (Order::CreateTimeDesc, Some(_)) => EMAIL_DESC,
        (Order::CreateTimeAsc, Some(_)) => EMAIL_ASC,
        (Order::UsernameAsc, _) => USERNAME_ASC,
    };
    if list.include_deleted { statements.all } else { statements.live }
}

/// The parameters of its [`statement`]; without a limit, it walks to the end.
pub(crate) fn params<'a>(list: &'a Selection, limit: &'a Option<i64>) -> Vec<&'a (dyn ToSql + Sync)> {
    let (from, to) = (&list.from, &list.to);
    let mut params: Vec<&(dyn ToSql + Sync)> =
        vec![from.key.as_param(), &from.id, to.key.as_param(), &to.id, limit];
    if let Some(email_key) = &list.email_key {
        params.push(email_key);
    }
    params
}

/// The position of a user in the order.
pub(crate) fn position(row: &Row, order: Order) -> Result<Position, Error> {
    let key = match order {
        Order::CreateTimeDesc | Order::CreateTimeAsc => Key::Time(column(row, CREATE_TIME)?),
        Order::UsernameAsc => Key::Username(column(row, USER_COLUMN_COUNT)?),
    };
    Ok(Position { key, id: column(row, ID)? })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn page_ends_when_its_users_reach_a_mebibyte() {
        assert_eq!(page_len([100; 1000].into_iter()), 1000);
        assert_eq!(page_len([PAGE_MAX_BYTES, 1].into_iter()), 1);
        assert_eq!(page_len([PAGE_MAX_BYTES - 1, 1, 1].into_iter()), 2);
        assert_eq!(page_len([10_000; 1000].into_iter()), PAGE_MAX_BYTES.div_ceil(10_000));
        assert_eq!(page_len([].into_iter()), 0);
    }
}
