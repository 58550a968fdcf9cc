//! Tokens are encrypted with keys of the database, which are rotated while the service runs.

use base64::{
    Engine,
    engine::general_purpose::{STANDARD, URL_SAFE_NO_PAD},
};
use futures_util::future::join_all;
use tonic::{Code, Status, transport::Channel};
use tonic_health::pb::health_check_response::ServingStatus;
use user_service::model::token::TokenKeys;
use user_service::pb::{self, user_service_client::UserServiceClient};

use crate::feed::watch::{Watch, from_token, initial_state};
use crate::support::*;

/// The id and the bytes of each key, the newest first.
async fn stored_keys(database: &Database) -> Vec<(i16, [u8; 32])> {
    let sql = "select id, key from token_keys order by id desc";
    let rows = database.connect().await.query(sql, &[]).await.unwrap();
    rows.iter().map(|row| (row.get(0), row.get::<_, Vec<u8>>(1).try_into().unwrap())).collect()
}

/// All keys of a database, of which the newest encodes.
pub async fn token_keys(database: &Database) -> TokenKeys {
    TokenKeys::new(stored_keys(database).await).unwrap()
}

/// The id of the key that a token was made with.
fn key_id(token: &str) -> i16 {
    let bytes = URL_SAFE_NO_PAD.decode(token).unwrap();
    i16::from_be_bytes([bytes[0], bytes[1]])
}

fn starting_with(prefix: &str) -> Option<pb::UserFilter> {
    Some(pb::UserFilter { username_prefix: prefix.into(), ..Default::default() })
}

async fn next_page(
    client: &mut UserServiceClient<Channel>,
    token: &str,
) -> Result<pb::ListUsersResponse, Status> {
    let request = pb::ListUsersRequest { page_size: 1, page_token: token.into(), ..Default::default() };
    Ok(client.list_users(request).await?.into_inner())
}

/// A token of each kind.
#[derive(Debug)]
struct Tokens {
    page: String,
    /// Requests to resume a watch.
    watches: Vec<pb::WatchUsersRequest>,
}

impl Tokens {
    async fn new(client: &mut UserServiceClient<Channel>) -> Self {
        let page = next_page(client, "").await.unwrap();
        let mut export = client.export_users(pb::ExportUsersRequest::default()).await.unwrap().into_inner();
        let export = export.message().await.unwrap().unwrap();
        let mut watches = vec![from_token(&page.watch_token), from_token(&export.watch_token)];
        for filter in [None, starting_with(SECRET)] {
            for send_initial_state in [false, true] {
                let request = pb::WatchUsersRequest {
                    filter: filter.clone(),
                    send_initial_state,
                    ..Default::default()
                };
                let mut watch = Watch::open(client, request).await.unwrap();
                watch.message().await.unwrap();
                watches.push(pb::WatchUsersRequest { filter: filter.clone(), ..from_token(&watch.token) });
            }
        }
        Self { page: page.next_page_token, watches }
    }

    fn key_ids(&self) -> Vec<i16> {
        let watches = self.watches.iter().map(|request| key_id(&request.resume_token));
        watches.chain([key_id(&self.page)]).collect()
    }

    async fn assert_accepted(&self, client: &mut UserServiceClient<Channel>) {
        next_page(client, &self.page).await.unwrap();
        for request in &self.watches {
            let mut watch = Watch::open(client, request.clone()).await.unwrap();
            watch.message().await.unwrap();
        }
    }

    async fn assert_rejected(&self, client: &mut UserServiceClient<Channel>) {
        let status =
            assert_rejected(next_page(client, &self.page).await, Code::InvalidArgument, "PAGE_TOKEN_INVALID");
        assert_eq!(violations(&status), [("page_token".into(), "PAGE_TOKEN_INVALID".into())]);
        for request in &self.watches {
            let rejected = Watch::open(client, request.clone()).await.map(drop);
            let status = assert_rejected(rejected, Code::InvalidArgument, "RESUME_TOKEN_INVALID");
            assert!(status.message().contains("send_initial_state"));
        }
    }
}

#[tokio::test]
async fn keys_are_rotated_under_two_running_servers() {
    let (one, database) = server().await;
    let two = Server::start(&database, &[]).await;
    let mut clients = [one.client().await, two.client().await];
    for name in ["alice", "bob"] {
        created(&mut clients[0], name).await;
    }
    let old = Tokens::new(&mut clients[0]).await;
    assert_eq!(old.key_ids(), [1; 7]);
    let mut open = Watch::from_now(&mut clients[1]).await;

    // A new key is not used at once, but both servers know it before they use it.
    let admin = database.connect().await;
    admin.batch_execute("insert into token_keys default values").await.unwrap();
    let later = "select count(*) from token_keys where id = 2 and use_time > now() + interval '30 seconds'";
    assert_eq!(database.count(later).await, 1);
    admin.batch_execute("update token_keys set use_time = 'infinity' where id = 2").await.unwrap();
    let keys = token_keys(&database).await;
    let position = keys.decode(b"watch", &open.token).unwrap();
    let of_new_key = keys.encode(b"watch", &position);
    assert_eq!(key_id(&of_new_key), 2);
    for client in &mut clients {
        let resume = async || Watch::resumed(&mut client.clone(), &of_new_key).await.ok();
        eventually("the server knows the new key", resume).await;
        assert_eq!(Tokens::new(client).await.key_ids(), [1; 7]);
    }

    admin.batch_execute("update token_keys set use_time = now() where id = 2").await.unwrap();
    for client in &mut clients {
        let uses_new_key = async || {
            let page = next_page(&mut client.clone(), "").await.unwrap();
            (key_id(&page.next_page_token) == 2).then_some(())
        };
        eventually("the server uses the new key", uses_new_key).await;
        old.assert_accepted(client).await;
    }
    let new = Tokens::new(&mut clients[0]).await;
    assert_eq!(new.key_ids(), [2; 7]);
    new.assert_accepted(&mut clients[1]).await;
    // A watch that is open gets tokens of the new key.
    let carol = created(&mut clients[0], "carol").await;
    assert_eq!(open.changes(1).await[0].id, carol.id);
    assert_eq!(key_id(&open.token), 2);

    admin.batch_execute("delete from token_keys where id = 1").await.unwrap();
    for client in &mut clients {
        let is_rejected = async || next_page(&mut client.clone(), &old.page).await.err();
        eventually("the server has dropped the old key", is_rejected).await;
        old.assert_rejected(client).await;
        new.assert_accepted(client).await;
    }
    let dave = created(&mut clients[0], "dave").await;
    assert_eq!(open.changes(1).await[0].id, dave.id);
}

#[tokio::test]
async fn log_has_the_ids_of_keys_and_never_a_key() {
    let (server, database) = server().await;
    database.connect().await.batch_execute("insert into token_keys default values").await.unwrap();
    eventually("the server knows the new key", async || {
        server.log().contains(r#""message":"token keys loaded","ids":"[1, 2]""#).then_some(())
    })
    .await;
    let log = server.log();
    for (_, key) in stored_keys(&database).await {
        let list = format!("{key:?}");
        let hex: String = key.iter().map(|byte| format!("{byte:02x}")).collect();
        // A part of a key is too much as well.
        for text in
            [&list[1..40], &hex[..20], &STANDARD.encode(key)[..20], &URL_SAFE_NO_PAD.encode(key)[..20]]
        {
            assert!(!log.contains(text), "the log has a key");
        }
    }
}

/// The proxy holds all responses of the database, so a token that reaches it is not answered.
#[tokio::test]
async fn forged_tokens_are_rejected_without_the_database() {
    let database = Database::migrated().await;
    let proxy = Proxy::to(&database).await;
    let server = Server::start(&proxy.database(), &[]).await;
    let mut client = server.client().await;
    for name in ["alice", "bob"] {
        created(&mut client, name).await;
    }
    let page = next_page(&mut client, "").await.unwrap();
    let honest = Watch::from_now(&mut client).await.token;
    let position = token_keys(&database).await.decode(b"watch", &honest).unwrap();
    // The payload is valid, the key is not. In protobuf, a repeated field can follow at the end.
    let forger = TokenKeys::new([(1, [7; 32])]).unwrap();
    let with_many_in_flight = [position.clone(), [0x20, 1].repeat(20_000)].concat();
    let forged = |n: usize| {
        let payload = if n.is_multiple_of(2) { &position } else { &with_many_in_flight };
        forger.encode(b"watch", payload)
    };
    proxy.hold_responses();
    let rejections = join_all((0..200).map(|n| {
        let (mut client, token) = (client.clone(), forged(n));
        async move { Watch::resumed(&mut client, &token).await.map(drop) }
    }));
    for rejected in rejections.await {
        assert_rejected(rejected, Code::InvalidArgument, "RESUME_TOKEN_INVALID");
    }
    let mut token = page.next_page_token.clone().into_bytes();
    token[30] ^= 1;
    let rejected = next_page(&mut client, &String::from_utf8(token).unwrap()).await;
    assert_rejected(rejected, Code::InvalidArgument, "PAGE_TOKEN_INVALID");
    proxy.release_responses();
    assert!(Watch::resumed(&mut client, &honest).await.unwrap().message().await.unwrap().bookmark);
    assert_eq!(next_page(&mut client, &page.next_page_token).await.unwrap().users.len(), 1);
}

#[tokio::test]
async fn tokens_show_no_personal_data() {
    let (server, _) = server().await;
    let mut client = server.client().await;
    for name in ["alice", "bob"] {
        created(&mut client, name).await;
    }
    let mut tokens = Vec::new();
    for _ in 0..2 {
        let request = pb::ListUsersRequest {
            page_size: 1,
            order_by: pb::OrderBy::UsernameAsc.into(),
            filter: starting_with(SECRET),
            ..Default::default()
        };
        tokens.push(client.list_users(request).await.unwrap().into_inner().next_page_token);
        let request = pb::WatchUsersRequest { filter: starting_with(SECRET), ..initial_state() };
        let mut watch = Watch::open(&mut client, request).await.unwrap();
        watch.message().await.unwrap();
        tokens.push(watch.token);
    }
    for token in &tokens {
        let bytes = URL_SAFE_NO_PAD.decode(token).unwrap();
        for text in [SECRET.as_bytes(), b"alice", b"bob"] {
            assert!(!bytes.windows(text.len()).any(|part| part == text));
        }
    }
    // Not even whether two tokens have the same content.
    assert_ne!(tokens[0], tokens[2]);
}

#[tokio::test]
async fn start_without_token_keys_fails_with_the_reason() {
    for (change, reason) in [
        ("delete from token_keys", "the table token_keys has no key"),
        ("drop table token_keys", "cannot read the table token_keys: db error: 42P01"),
    ] {
        let database = Database::migrated().await;
        database.connect().await.batch_execute(change).await.unwrap();
        let mut server = Server::spawn(&[("DATABASE_URL", &database.url())]).await;
        assert!(!server.ended().await.success());
        assert!(server.log().contains(reason), "{}", server.log());
    }
}

#[tokio::test]
async fn known_keys_stay_if_the_table_is_emptied_and_go_if_it_is_replaced() {
    let (server, database) = server().await;
    let mut client = server.client().await;
    for name in ["alice", "bob"] {
        created(&mut client, name).await;
    }
    let tokens = Tokens::new(&mut client).await;
    let admin = database.connect().await;
    admin
        .batch_execute("create table kept as select * from token_keys; delete from token_keys")
        .await
        .unwrap();
    eventually("the server reads the table", async || {
        server.log().contains(r#""message":"token keys not loaded""#).then_some(())
    })
    .await;
    tokens.assert_accepted(&mut client).await;
    Tokens::new(&mut client).await.assert_accepted(&mut client).await;
    server.wait_until("", ServingStatus::Serving).await;

    // Another database was restored here: its key has the same id.
    let replace = "insert into token_keys (id, key, use_time) overriding system value
        select id, sha256(key), use_time from kept";
    admin.batch_execute(replace).await.unwrap();
    let is_rejected = async || next_page(&mut client.clone(), &tokens.page).await.err();
    eventually("the server has the other key", is_rejected).await;
    tokens.assert_rejected(&mut client).await;
    Tokens::new(&mut client).await.assert_accepted(&mut client).await;
}
