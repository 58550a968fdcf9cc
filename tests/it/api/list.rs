//! ListUsers: every user is listed once, by an index. A list without an index is rejected.

use std::{
    collections::HashMap,
    sync::{
        Arc,
        atomic::{AtomicU32, Ordering},
    },
};

use prost_types::Timestamp;
use tonic::{Code, transport::Channel};
use user_service::pb::{self, OrderBy, user_service_client::UserServiceClient};
use user_service::store::list;
use user_service::store::lookup;
use user_service::store::{statements, users};

use crate::support::*;

const ORDERS: [OrderBy; 3] = [OrderBy::CreateTimeDesc, OrderBy::CreateTimeAsc, OrderBy::UsernameAsc];

fn list_request(order: OrderBy, filter: pb::UserFilter) -> pb::ListUsersRequest {
    pb::ListUsersRequest { order_by: order.into(), filter: Some(filter), ..Default::default() }
}

async fn page(
    client: &mut UserServiceClient<Channel>,
    request: &pb::ListUsersRequest,
) -> pb::ListUsersResponse {
    client.list_users(request.clone()).await.unwrap().into_inner()
}

/// The usernames of all pages, without [`SECRET`].
async fn names(client: &mut UserServiceClient<Channel>, mut request: pb::ListUsersRequest) -> Vec<String> {
    let mut names = Vec::new();
    loop {
        let page = page(client, &request).await;
        names.extend(page.users.into_iter().map(|user| user.username.replacen(SECRET, "", 1)));
        if page.next_page_token.is_empty() {
            return names;
        }
        request.page_token = page.next_page_token;
    }
}

/// Inserts users named `prefix` and a number, each a second older than the one before.
async fn insert(database: &Database, prefix: &str, count: u32, delete_time: &str) {
    let sql = format!(
        "insert into users (id, username, username_key, username_held, email, email_key, display_name,
            revision, create_time, update_time, delete_time, purge_time)
        select gen_random_uuid(), '{prefix}' || n, '{prefix}' || n, true, n || '@example.com', n || '@example.com', '',
            1, now() - n * interval '1 second', now(), {delete_time}, {delete_time}
        from generate_series(1, {count}) as n"
    );
    database.connect().await.batch_execute(&sql).await.unwrap();
}

#[tokio::test]
async fn permanent_user_is_on_exactly_one_page_while_others_come_and_go() {
    let (server, database) = server().await;
    insert(&database, "stable", 200, "null").await;
    for order in ORDERS {
        for include_deleted in [false, true] {
            let mut writer = server.client().await;
            let cycles = Arc::new(AtomicU32::new(0));
            let writing = tokio::spawn({
                let cycles = Arc::clone(&cycles);
                async move {
                    loop {
                        let n = cycles.fetch_add(1, Ordering::Relaxed);
                        let id = created(&mut writer, &format!("{order:?}{include_deleted}{n}")).await.id;
                        writer.update_user(rename(&id, "moved")).await.unwrap();
                        writer.delete_user(delete(&id)).await.unwrap();
                        writer.expunge_user(expunge(&id)).await.unwrap();
                    }
                }
            });
            let filter = pb::UserFilter { include_deleted, ..Default::default() };
            let request = pb::ListUsersRequest { page_size: 7, ..list_request(order, filter) };
            loop {
                let before = cycles.load(Ordering::Relaxed);
                let mut seen = HashMap::new();
                for name in names(&mut server.client().await, request.clone()).await {
                    *seen.entry(name).or_insert(0) += 1;
                }
                let stable: Vec<_> = (1..=200).map(|n| seen.get(&format!("stable{n}")).copied()).collect();
                assert_eq!(stable, vec![Some(1); 200], "{order:?} {include_deleted}");
                assert!(!writing.is_finished());
                // Users have come and gone during the list.
                if cycles.load(Ordering::Relaxed) > before + 2 {
                    break;
                }
            }
            writing.abort();
        }
    }
}

#[tokio::test]
async fn each_order_sorts_by_its_key() {
    let (server, _) = server().await;
    let mut client = server.client().await;
    // Usernames sort by code point, not by language.
    for name in ["b", "\u{e9}", "a", "Z"] {
        created(&mut client, name).await;
    }
    let all = pb::UserFilter::default;
    assert_eq!(
        names(&mut client, list_request(OrderBy::Unspecified, all())).await,
        ["Z", "a", "\u{e9}", "b"]
    );
    assert_eq!(
        names(&mut client, list_request(OrderBy::CreateTimeDesc, all())).await,
        ["Z", "a", "\u{e9}", "b"]
    );
    assert_eq!(
        names(&mut client, list_request(OrderBy::CreateTimeAsc, all())).await,
        ["b", "\u{e9}", "a", "Z"]
    );
    assert_eq!(
        names(&mut client, list_request(OrderBy::UsernameAsc, all())).await,
        ["a", "b", "Z", "\u{e9}"]
    );
}

#[tokio::test]
async fn users_with_the_same_key_are_each_listed_once() {
    let (server, database) = server().await;
    insert(&database, "same", 30, "null").await;
    let admin = database.connect().await;
    admin.batch_execute("update users set create_time = now(), email_key = 'a@b.c'").await.unwrap();
    let mut client = server.client().await;
    for order in [OrderBy::CreateTimeDesc, OrderBy::CreateTimeAsc] {
        for email in ["", "A@b.C"] {
            let filter = pb::UserFilter { email: email.into(), ..Default::default() };
            let mut names =
                names(&mut client, pb::ListUsersRequest { page_size: 4, ..list_request(order, filter) })
                    .await;
            names.sort();
            names.dedup();
            assert_eq!(names.len(), 30);
        }
    }
    // Released usernames are not unique.
    admin
        .batch_execute(
            "update users set username_key = 'same', username_held = false, delete_time = now(), purge_time = now()",
        )
        .await
        .unwrap();
    let filter = pb::UserFilter { include_deleted: true, ..Default::default() };
    let request = pb::ListUsersRequest { page_size: 4, ..list_request(OrderBy::UsernameAsc, filter) };
    assert_eq!(names(&mut client, request).await.len(), 30);
}

#[tokio::test]
async fn filters_select_matching_users() {
    let (server, _) = server().await;
    let mut client = server.client().await;
    let mut users = Vec::new();
    for name in ["ann", "Anna", "bob", "an.na", "anz"] {
        users.push(created(&mut client, name).await);
    }
    client.delete_user(delete(&users[1].id)).await.unwrap();
    let none = pb::UserFilter::default();
    let by_name = |prefix: &str, include_deleted| {
        let username_prefix = format!("{SECRET}{prefix}");
        list_request(
            OrderBy::UsernameAsc,
            pb::UserFilter { username_prefix, include_deleted, ..Default::default() },
        )
    };
    assert_eq!(names(&mut client, by_name("AN", false)).await, ["an.na", "ann", "anz"]);
    assert_eq!(names(&mut client, by_name("an", true)).await, ["an.na", "ann", "Anna", "anz"]);
    assert_eq!(names(&mut client, by_name("ann", true)).await, ["ann", "Anna"]);
    assert_eq!(names(&mut client, by_name("an.", false)).await, ["an.na"]);
    assert_eq!(names(&mut client, by_name("c", true)).await, [""; 0]);

    let email = format!("{}BOB@EXAMPLE.com", SECRET.to_uppercase());
    let by_email = pb::UserFilter { email, ..none.clone() };
    assert_eq!(names(&mut client, list_request(OrderBy::CreateTimeAsc, by_email)).await, ["bob"]);

    let between = pb::UserFilter {
        create_time_after: users[0].create_time,
        create_time_before: users[4].create_time,
        ..none
    };
    assert_eq!(
        names(&mut client, list_request(OrderBy::CreateTimeAsc, between.clone())).await,
        ["bob", "an.na"]
    );
    let with_deleted = pb::UserFilter { include_deleted: true, ..between };
    assert_eq!(
        names(&mut client, list_request(OrderBy::CreateTimeDesc, with_deleted)).await,
        ["an.na", "bob", "Anna"]
    );
}

#[tokio::test]
async fn page_size_defaults_to_50_and_is_capped_at_1000() {
    let (server, database) = server().await;
    insert(&database, "user", 1001, "null").await;
    let mut client = server.client().await;
    for (asked, got) in [(0, 50), (1, 1), (1000, 1000), (1001, 1000), (i32::MAX, 1000)] {
        let request = pb::ListUsersRequest { page_size: asked, ..Default::default() };
        assert_eq!(page(&mut client, &request).await.users.len(), got);
    }
    for asked in [-1, i32::MIN] {
        let request = pb::ListUsersRequest { page_size: asked, ..Default::default() };
        let status =
            assert_rejected(client.list_users(request).await, Code::InvalidArgument, "FIELD_INVALID");
        assert_eq!(violations(&status)[0].0, "page_size");
    }
}

#[tokio::test]
async fn only_the_first_page_has_an_estimate_and_a_watch_token() {
    let (server, database) = server().await;
    insert(&database, "user", 100, "null").await;
    let mut client = server.client().await;
    let admin = database.connect().await;
    admin.batch_execute("analyze users").await.unwrap();
    let first = page(&mut client, &pb::ListUsersRequest::default()).await;
    assert_eq!(first.total_size_estimate, 100);
    // The tests of watches resume from it.
    assert!(!first.watch_token.is_empty());
    let request = pb::ListUsersRequest { page_token: first.next_page_token, ..Default::default() };
    let second = page(&mut client, &request).await;
    assert_eq!((second.users.len(), second.total_size_estimate, second.watch_token.as_str()), (50, 0, ""));
}

#[tokio::test]
async fn page_token_of_another_list_is_rejected() {
    let (server, database) = server().await;
    insert(&database, "user", 10, "null").await;
    let mut client = server.client().await;
    let request = pb::ListUsersRequest { page_size: 3, ..Default::default() };
    let token = page(&mut client, &request).await.next_page_token;
    let mut foreign = vec![
        pb::ListUsersRequest {
            order_by: OrderBy::CreateTimeAsc.into(),
            page_token: token.clone(),
            ..Default::default()
        },
        pb::ListUsersRequest {
            order_by: OrderBy::UsernameAsc.into(),
            page_token: token.clone(),
            ..Default::default()
        },
        pb::ListUsersRequest {
            filter: Some(pb::UserFilter { include_deleted: true, ..Default::default() }),
            page_token: token.clone(),
            ..Default::default()
        },
        pb::ListUsersRequest {
            filter: Some(pb::UserFilter { email: "a@b.c".into(), ..Default::default() }),
            page_token: token.clone(),
            ..Default::default()
        },
        pb::ListUsersRequest {
            filter: Some(pb::UserFilter {
                create_time_after: Some(Timestamp { seconds: 1, nanos: 0 }),
                ..Default::default()
            }),
            page_token: token.clone(),
            ..Default::default()
        },
    ];
    let watch_token = page(&mut client, &pb::ListUsersRequest::default()).await.watch_token;
    let cuts = (1..token.len()).map(|n| token[..n].to_owned());
    let flips = (0..token.len()).map(|n| {
        let mut bytes = token.clone().into_bytes();
        bytes[n] = if bytes[n] == b'A' { b'B' } else { b'A' };
        String::from_utf8(bytes).unwrap()
    });
    let junk = ["x", "AAAA", "%00", "\u{202e}", "' or 1=1 --", &"A".repeat(100_000)].map(str::to_owned);
    foreign.extend(
        cuts.chain(flips)
            .chain(junk)
            .chain([watch_token])
            .map(|page_token| pb::ListUsersRequest { page_token, ..Default::default() }),
    );
    for other in foreign
        .into_iter()
        .filter(|other| other.page_token != token || other.order_by != 0 || other.filter.is_some())
    {
        let status =
            assert_rejected(client.list_users(other).await, Code::InvalidArgument, "PAGE_TOKEN_INVALID");
        assert_eq!(violations(&status), [("page_token".into(), "PAGE_TOKEN_INVALID".into())]);
    }
    // A token of a watch with the same filter is rejected, too.
    let prefix = pb::UserFilter { username_prefix: "user".into(), ..Default::default() };
    let watch = pb::WatchUsersRequest { filter: Some(prefix.clone()), ..Default::default() };
    let mut watch = client.watch_users(watch).await.unwrap().into_inner();
    let page_token = watch.message().await.unwrap().unwrap().resume_token;
    let of_watch = pb::ListUsersRequest { page_token, ..list_request(OrderBy::UsernameAsc, prefix) };
    assert_rejected(client.list_users(of_watch).await, Code::InvalidArgument, "PAGE_TOKEN_INVALID");
    let next = pb::ListUsersRequest { page_token: token, page_size: 5, ..Default::default() };
    assert_eq!(page(&mut client, &next).await.users.len(), 5);
}

#[tokio::test]
async fn list_without_an_index_is_rejected() {
    let (server, _) = server().await;
    let mut client = server.client().await;
    let time = Some(Timestamp { seconds: 1, nanos: 0 });
    let filters = [
        pb::UserFilter { username_prefix: "abc".into(), ..Default::default() },
        pb::UserFilter { email: "a@b.c".into(), ..Default::default() },
        pb::UserFilter { create_time_after: time, ..Default::default() },
        pb::UserFilter { create_time_before: time, ..Default::default() },
    ];
    // Every combination of conditions in every order, with and without deleted users.
    for order in ORDERS {
        for chosen in 0..1_u32 << filters.len() {
            let mut filter = pb::UserFilter { include_deleted: chosen % 3 == 0, ..Default::default() };
            for (n, part) in filters.iter().enumerate().filter(|(n, _)| chosen >> n & 1 == 1) {
                match n {
                    0 => filter.username_prefix.clone_from(&part.username_prefix),
                    1 => filter.email.clone_from(&part.email),
                    2 => filter.create_time_after = part.create_time_after,
                    _ => filter.create_time_before = part.create_time_before,
                }
            }
            let is_served = if order == OrderBy::UsernameAsc { chosen & !1 == 0 } else { chosen & 1 == 0 };
            let response = client.list_users(list_request(order, filter)).await;
            if is_served {
                response.unwrap();
            } else {
                assert_rejected(response, Code::InvalidArgument, "FILTER_UNSUPPORTED");
            }
        }
    }
    let unknown = pb::ListUsersRequest { order_by: 99, ..Default::default() };
    let status = assert_rejected(client.list_users(unknown).await, Code::InvalidArgument, "FIELD_INVALID");
    assert_eq!(violations(&status)[0].0, "order_by");
    for time in [Timestamp { seconds: i64::MAX, nanos: 0 }, Timestamp { seconds: 0, nanos: -1 }] {
        let filter = pb::UserFilter { create_time_after: Some(time), ..Default::default() };
        let status = client.list_users(list_request(OrderBy::CreateTimeAsc, filter)).await;
        let status = assert_rejected(status, Code::InvalidArgument, "FIELD_INVALID");
        assert_eq!(violations(&status)[0].0, "filter.create_time_after");
    }
}

/// Explains the generic plans, which the service uses, without the planner settings of the
/// service that prefer indexes: the planner has to choose them by cost.
#[tokio::test]
async fn every_statement_uses_an_index_of_a_large_table() {
    let database = Database::migrated().await;
    insert(&database, "live", 100_000, "null").await;
    insert(&database, "deleted", 20_000, "now()").await;
    let admin = database.connect().await;
    admin
        .batch_execute(
            "insert into requests select gen_random_uuid(), '', true, gen_random_uuid(), now() + n * interval '1 second'
                from generate_series(1, 100000) as n;
            insert into user_changes (xid, seq, user_id, revision, kind)
                select (n / 10)::text::xid8, n % 9 * 1000000000000000000 + n, id, 1, 1
                from (select row_number() over () as n, id from users) as numbered;
            insert into username_holds select id::text, id, now() + interval '1 day' from users;
            insert into import_chunks select sha256(n::text::bytea), '', '{}', '', now() + n * interval '1 second'
                from generate_series(1, 100000) as n;
            analyze;
            set plan_cache_mode = force_generic_plan",
        )
        .await
        .unwrap();
    for sql in statements() {
        let parameters = (1..).take_while(|n| sql.contains(&format!("${n}"))).count();
        let values = match parameters {
            0 => String::new(),
            n => format!("({})", vec!["null"; n].join(", ")),
        };
        admin.batch_execute(&format!("prepare asked as {sql}")).await.unwrap();
        let plan = admin.query(&format!("explain (costs off) execute asked{values}"), &[]).await.unwrap();
        admin.batch_execute("deallocate asked").await.unwrap();
        let plan: Vec<String> = plan.iter().map(|row| row.get(0)).collect();
        let plan = plan.join("\n");
        // These tables have one row, nine rows, one row for each database, and one or two.
        let plan =
            plan.replace("Seq Scan on user_feed", "").replace("Seq Scan on user_changes_partitions", "");
        let plan = plan.replace("Seq Scan on user_changes_seq", "").replace("Seq Scan on pg_database", "");
        let plan = plan.replace("Seq Scan on token_keys", "");
        // The reset of the log reads all of it.
        let is_reset = sql.contains("delete from user_changes where");
        let plan = if is_reset { plan.replace("Seq Scan on user_changes", "") } else { plan };
        // A merge of two scans is not a sort, nor is an incremental sort of a scan by username,
        // in which no two live users are equal.
        let plan = plan.replace("Sort Key", "");
        let is_by_username = sql.contains("(username_key, id)");
        let plan = if is_by_username { plan.replace("Incremental Sort", "") } else { plan };
        let is_list = list::STATEMENTS.contains(&sql) && sql.contains("limit $5");
        let (scan, collect, sort) =
            (plan.contains("Seq Scan"), plan.contains("Bitmap"), plan.contains("Sort"));
        // Only lists must not sort: coalesced requests are sorted to be locked in one order.
        assert!(!scan && !(is_list && (collect || sort)), "without an index:\n{sql}\n{plan}");
        let scans = plan.matches("Index Scan").count();
        let conditions = plan.lines().filter(|line| line.contains("Index Cond"));
        let ranges = conditions.filter(|line| line.contains("$1") && line.contains("$3")).count();
        assert!(!is_list || ranges == scans && scans > 0, "not limited by both positions:\n{sql}\n{plan}");
        // Users are read by their keys.
        let is_by_keys = [users::STATEMENTS, lookup::STATEMENTS].concat().contains(&sql);
        let lookups = scans + plan.matches("Index Only Scan").count();
        let keys = plan.matches("Index Cond").count();
        assert!(!is_by_keys || lookups == keys && keys > 0, "not by the keys:\n{sql}\n{plan}");
    }
}
