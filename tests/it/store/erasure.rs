//! Nothing is left of an erased user.

use std::{fs, path::Path};

use user_service::pb;
use user_service::store::dev_postgres::Embedded;

use crate::support::*;

/// A part of every value of the users that are erased; the rest tells them apart.
const MARK: &str = "erasable";

/// Where the size of a page's header, the start and the end of its free space are in the header.
const PAGE_SIZE: usize = 8192;
const FREE_SPACE: [usize; 2] = [12, 14];

fn contains(bytes: &[u8], text: &str) -> bool {
    bytes.windows(text.len()).any(|window| window == text.as_bytes())
}

/// The files of a database that have the mark outside the free space of their pages.
fn files_with_mark(data_dir: &Path) -> Vec<String> {
    let mut found = Vec::new();
    for folder in fs::read_dir(data_dir.join("base")).unwrap() {
        for file in fs::read_dir(folder.unwrap().path()).unwrap() {
            let path = file.unwrap().path();
            let mut bytes = fs::read(&path).unwrap();
            for page in bytes.chunks_exact_mut(PAGE_SIZE) {
                let [start, end] =
                    FREE_SPACE.map(|at| usize::from(u16::from_le_bytes([page[at], page[at + 1]])));
                if start < end && end <= PAGE_SIZE {
                    page[start..end].fill(0);
                }
            }
            if contains(&bytes, MARK) {
                found.push(path.display().to_string());
            }
        }
    }
    found
}

#[tokio::test]
async fn expunged_users_are_in_no_table_statistics_index_or_dump() {
    // The files of a database of its own.
    let dir = tempfile::TempDir::with_prefix("pg-").unwrap();
    let postgres = Embedded::start(dir.path()).await.unwrap();
    let database = Database { socket_dir: dir.path().into(), name: "postgres".into() };
    let server = Server::start(&database, &[]).await;
    let mut client = server.client().await;
    let admin = database.connect().await;
    let mut erased = Vec::new();
    for n in 0..50 {
        let request_id = new_request_id();
        let request = pb::CreateUserRequest { request_id, ..create(user(&format!("{MARK}{n}"))) };
        erased.push(client.create_user(request).await.unwrap().into_inner().user.unwrap().id);
        // A value that many users have is one of the most common in the statistics.
        let mut kept = user(&format!("kept{n}"));
        kept.display_name = SECRET.into();
        client.create_user(create(kept)).await.unwrap();
    }
    for id in &erased {
        // A held username is personal data as well.
        let renamed =
            pb::User { id: id.clone(), username: format!("{SECRET}{MARK}x{id}"), ..Default::default() };
        client
            .update_user(pb::UpdateUserRequest { user: Some(renamed), ..Default::default() })
            .await
            .unwrap();
    }
    admin.batch_execute("analyze; checkpoint").await.unwrap();
    let statistics = "select count(*) from pg_stats s where s::text like '%zqzq%'";
    assert_eq!(database.count(statistics).await, 0);
    assert!(!files_with_mark(&dir.path().join("data")).is_empty());
    for id in &erased {
        client.expunge_user(expunge(id)).await.unwrap();
    }
    assert!(!database.dump().contains(MARK));
    // No row version is older than this vacuum: the feed and the pool have no snapshot.
    admin.batch_execute("vacuum").await.unwrap();
    admin.batch_execute("checkpoint").await.unwrap();
    assert_eq!(database.count(statistics).await, 0);
    assert_eq!(files_with_mark(&dir.path().join("data")), Vec::<String>::new());
    drop(server);
    postgres.stop().await.unwrap();
}

/// An index keeps keys as the boundaries between its pages, also of rows that are gone.
#[tokio::test]
async fn purged_users_are_in_no_index_after_it_is_rebuilt() {
    let dir = tempfile::TempDir::with_prefix("pg-").unwrap();
    let postgres = Embedded::start(dir.path()).await.unwrap();
    let database = Database { socket_dir: dir.path().into(), name: "postgres".into() };
    let server = Server::start(&database, &[("PURGE_INTERVAL_MS", "10")]).await;
    let admin = database.connect().await;
    let insert = format!(
        "insert into users (id, username, username_key, username_held, email, email_key, display_name,
            revision, create_time, update_time, delete_time, purge_time)
        select gen_random_uuid(), name, name, true, name || '@example.com', name || '@example.com', '', 1, now(),
            now(), case when n % 2 = 0 then now() end, case when n % 2 = 0 then now() end
        from generate_series(1, 4000) as n, lateral (
            select md5(n::text) || case when n % 2 = 0 then '{MARK}' else 'kept' end as name
        ) as names"
    );
    admin.batch_execute(&insert).await.unwrap();
    let users = "select count(*) from users";
    eventually("they are purged", async || (database.count(users).await == 2000).then_some(())).await;
    admin.batch_execute("vacuum").await.unwrap();
    admin.batch_execute("checkpoint").await.unwrap();
    let heap = "select pg_relation_filepath('users')";
    let heap: String = admin.query_one(heap, &[]).await.unwrap().get(0);
    let with_mark = files_with_mark(&dir.path().join("data"));
    assert!(!with_mark.iter().any(|file| file.ends_with(&heap)), "{with_mark:?}");
    admin.batch_execute("reindex table concurrently users").await.unwrap();
    admin.batch_execute("checkpoint").await.unwrap();
    assert_eq!(files_with_mark(&dir.path().join("data")), Vec::<String>::new());
    drop(server);
    postgres.stop().await.unwrap();
}

#[tokio::test]
async fn statistics_of_the_previous_release_are_erased_by_the_migration() {
    let database = Database::migrated().await;
    let server = Server::start(&database, &[]).await;
    for n in 0..20 {
        created(&mut server.client().await, &format!("user{n}")).await;
    }
    let admin = database.connect().await;
    let as_before = "alter table users alter column username set statistics -1,
        alter column email_key set statistics -1; analyze users";
    admin.batch_execute(as_before).await.unwrap();
    let statistics = "select count(*) from pg_stats s where s::text like '%zqzq%'";
    assert_eq!(database.count(statistics).await, 2);
    let erase = include_str!("../../../migrations/V14__erase_statistics.sql");
    admin.batch_execute(erase).await.unwrap();
    assert_eq!(database.count(statistics).await, 0);
}
