//! A watch with a filter delivers the users that match, and at most the ids of other users.

use std::collections::HashMap;

use tonic::{Code, transport::Channel};
use user_service::pb::{
    self, ChangeKind,
    user_change::{Removed, State},
    user_service_client::UserServiceClient,
};

use crate::feed::watch::{Watch, from_token, initial_state, user_of};
use crate::mirror::Mirror;
use crate::support::*;

fn none() -> pb::UserFilter {
    pb::UserFilter::default()
}

fn starting_with(prefix: &str) -> pb::UserFilter {
    pb::UserFilter { username_prefix: format!("{SECRET}{prefix}"), ..none() }
}

/// The users of a list with the same filter.
async fn listed(
    client: &mut UserServiceClient<Channel>,
    filter: &pb::UserFilter,
) -> HashMap<String, pb::User> {
    let by_username = !filter.username_prefix.is_empty();
    let order = if by_username { pb::OrderBy::UsernameAsc } else { pb::OrderBy::CreateTimeAsc };
    let request =
        pb::ListUsersRequest { order_by: order.into(), filter: Some(filter.clone()), ..Default::default() };
    let page = client.list_users(request).await.unwrap().into_inner();
    assert_eq!(page.next_page_token, "");
    page.users.into_iter().map(|user| (user.id.clone(), user)).collect()
}

/// Changes the username or the e-mail address of a user.
async fn change(client: &mut UserServiceClient<Channel>, id: &str, username: &str, email: &str) {
    let id = id.to_owned();
    let (username, email) = (username.replacen('-', SECRET, 1), email.replacen('-', SECRET, 1));
    let user = Some(pb::User { id, username, email, ..Default::default() });
    client.update_user(pb::UpdateUserRequest { user, ..Default::default() }).await.unwrap();
}

/// Filters of each kind. The bounds of the last two are the times of existing users.
async fn some_filters(client: &UserServiceClient<Channel>, ids: &[String]) -> [pb::UserFilter; 9] {
    let time_of = async |id: &str| {
        client.clone().get_user(by_id(id)).await.unwrap().into_inner().user.unwrap().create_time
    };
    [
        none(),
        pb::UserFilter { include_deleted: true, ..none() },
        starting_with("AN"),
        pb::UserFilter { include_deleted: true, ..starting_with("an") },
        starting_with("A\u{308}"),
        pb::UserFilter { email: format!("{SECRET}Bob@EXAMPLE.com"), ..none() },
        pb::UserFilter { email: format!("{SECRET}ANNE@bücher.EXAMPLE"), ..none() },
        pb::UserFilter { create_time_after: time_of(&ids[1]).await, ..none() },
        pb::UserFilter { create_time_before: time_of(&ids[2]).await, include_deleted: true, ..none() },
    ]
}

#[tokio::test]
async fn filtered_watch_equals_a_filtered_list_after_every_kind_of_change() {
    let database = Database::migrated().await;
    let server = Server::start(&database, &[("PURGE_INTERVAL_MS", "10")]).await;
    let mut client = server.client().await;
    let mut ids = Vec::new();
    for name in ["ann", "Anna", "bob", "anz"] {
        ids.push(created(&mut client, name).await.id);
    }
    // Keys are compared beyond ASCII.
    let (username, email) = (format!("{SECRET}Änne"), format!("{SECRET}anne@BÜCHER.example"));
    client.create_user(create(pb::User { username, email, ..Default::default() })).await.unwrap();
    let mut copies = Vec::new();
    for filter in some_filters(&client, &ids).await {
        let request = pb::WatchUsersRequest { filter: Some(filter.clone()), ..initial_state() };
        let watch = Watch::open(&mut client, request).await.unwrap();
        copies.push((watch, Mirror::of(Some(filter))));
    }
    let (ann, bob) = (ids[0].clone(), ids[2].clone());
    let erasable = "update users set purge_time = now() where delete_time is not null";
    for step in 0..12 {
        match step {
            0 => {}
            1 => change(&mut client, &bob, "-anbob", "").await,
            2 => change(&mut client, &bob, "-bob", "").await,
            3 => change(&mut client, &ann, "", "-bob@example.com").await,
            4 => change(&mut client, &ann, "", "-ann@example.com").await,
            5 => drop(client.delete_user(delete(&ann)).await.unwrap()),
            6 => {
                let undelete = pb::UndeleteUserRequest { id: ann.clone(), ..Default::default() };
                drop(client.undelete_user(undelete).await.unwrap());
            }
            7 => {
                let request = pb::DeleteUserRequest { release_username: true, ..delete(&bob) };
                drop(client.delete_user(request).await.unwrap());
            }
            8 => database.connect().await.batch_execute(erasable).await.unwrap(),
            9 => drop(client.expunge_user(expunge(&ann)).await.unwrap()),
            // A new user with the same id has another create_time.
            10 => {
                let again = create(pb::User { id: ann.clone(), ..user("annagain") });
                drop(client.create_user(again).await.unwrap());
            }
            _ => drop(created(&mut client, "anlast").await),
        }
        for (watch, mirror) in &mut copies {
            let filter = mirror.filter.clone().unwrap();
            let what = format!("step {step} reaches the watch of {filter:?}");
            eventually(&what, async || {
                // The purge of step 8 runs later.
                if mirror.is_complete && mirror.users == listed(&mut client.clone(), &filter).await {
                    return Some(());
                }
                let message = watch.message().await.unwrap();
                message.changes.iter().for_each(|change| assert_matches(change, &filter));
                mirror.apply(message);
                None
            })
            .await;
        }
    }
    // Nothing wrong follows.
    for (watch, mirror) in &mut copies {
        loop {
            let message = watch.message().await.unwrap();
            mirror.apply(message.clone());
            if message.bookmark {
                break;
            }
        }
        let filter = mirror.filter.clone().unwrap();
        assert_eq!(mirror.users, listed(&mut client, &filter).await, "{filter:?}");
    }
}

fn assert_matches(change: &pb::UserChange, filter: &pb::UserFilter) {
    if let Some(user) = user_of(change) {
        let username = user.username.to_lowercase();
        let prefix = filter.username_prefix.to_lowercase().replace("a\u{308}", "ä");
        assert!(username.starts_with(&prefix), "{change:?}");
        assert!(filter.email.is_empty() || user.email.to_lowercase() == filter.email.to_lowercase());
        let time = |time: Option<prost_types::Timestamp>| time.map(|time| (time.seconds, time.nanos));
        let create_time = time(user.create_time);
        assert!(create_time > time(filter.create_time_after), "{change:?}");
        assert!(filter.create_time_before.is_none_or(|before| create_time < time(Some(before))));
        assert!(filter.include_deleted || user.delete_time.is_none(), "{change:?}");
    }
}

/// A change whose user was erased or does not match.
fn removed(kind: ChangeKind, id: &str, revision: i64) -> pb::UserChange {
    let state = Some(State::Removed(Removed {}));
    pb::UserChange { kind: kind.into(), id: id.into(), revision, state }
}

#[tokio::test]
async fn created_user_that_does_not_match_is_left_out_and_later_changes_are_removed() {
    let (server, _) = server().await;
    let mut client = server.client().await;
    let request = pb::WatchUsersRequest { filter: Some(starting_with("an")), ..Default::default() };
    let mut watch = Watch::open(&mut client, request).await.unwrap();
    assert!(watch.message().await.unwrap().bookmark);
    let (bob, ann) = (created(&mut client, "bob").await, created(&mut client, "ann").await);
    let (kind, id) = (ChangeKind::Created.into(), ann.id.clone());
    let expected = pb::UserChange { kind, id, revision: 1, state: Some(State::User(ann)) };
    assert_eq!(watch.changes(1).await, [expected]);
    client.update_user(rename(&bob.id, "Bob")).await.unwrap();
    assert_eq!(watch.changes(1).await, [removed(ChangeKind::Updated, &bob.id, 2)]);
    client.expunge_user(expunge(&bob.id)).await.unwrap();
    assert_eq!(watch.changes(1).await, [removed(ChangeKind::Expunged, &bob.id, 3)]);
}

#[tokio::test]
async fn erased_user_is_removed_if_a_user_with_the_same_id_does_not_match() {
    let (server, _) = server().await;
    let mut client = server.client().await;
    let filter = Some(starting_with("an"));
    let id = created(&mut client, "ann").await.id;
    let request = pb::WatchUsersRequest { filter: filter.clone(), ..initial_state() };
    let mut live = Watch::open(&mut client, request).await.unwrap();
    let mut mirror = Mirror::of(filter.clone());
    while !mirror.is_complete {
        mirror.apply(live.message().await.unwrap());
    }
    assert_eq!(mirror.users.len(), 1);
    client.expunge_user(expunge(&id)).await.unwrap();
    client.create_user(create(pb::User { id: id.clone(), ..user("bob") })).await.unwrap();
    let request = pb::WatchUsersRequest { filter, ..from_token(&mirror.resume_token) };
    let mut resumed = Watch::open(&mut client, request).await.unwrap();
    for watch in [&mut live, &mut resumed] {
        assert_eq!(watch.changes(1).await, [removed(ChangeKind::Expunged, &id, 2)]);
        // Nothing follows.
        while !watch.message().await.unwrap().bookmark {}
    }
}

#[tokio::test]
async fn resume_token_requires_its_filter_and_watch_token_accepts_any() {
    let (server, _) = server().await;
    let mut client = server.client().await;
    let before = client.list_users(pb::ListUsersRequest::default()).await.unwrap().into_inner().watch_token;
    let mut exported = client.export_users(pb::ExportUsersRequest::default()).await.unwrap().into_inner();
    let exported = exported.message().await.unwrap().unwrap().watch_token;
    for name in ["ann", "bob"] {
        created(&mut client, name).await;
    }
    let all = pb::UserFilter { include_deleted: true, ..none() };
    let filters = [
        None,
        Some(all),
        Some(none()),
        Some(starting_with("an")),
        Some(starting_with("AN")),
        Some(starting_with("bo")),
    ];
    // Equal numbers are equivalent filters.
    let meanings = [0, 0, 1, 2, 2, 3];
    // Within the initial state and after it.
    for messages in [1, 2] {
        for (filter, meaning) in filters.iter().zip(meanings) {
            let request = pb::WatchUsersRequest { filter: filter.clone(), ..initial_state() };
            let mut watch = Watch::open(&mut client, request).await.unwrap();
            for _ in 0..messages {
                watch.message().await.unwrap();
            }
            for (other, other_meaning) in filters.iter().zip(meanings) {
                let request = pb::WatchUsersRequest { filter: other.clone(), ..from_token(&watch.token) };
                let resumed = Watch::open(&mut client, request).await.map(drop);
                if meaning == other_meaning {
                    resumed.unwrap();
                } else {
                    let status = assert_rejected(resumed, Code::InvalidArgument, "RESUME_TOKEN_INVALID");
                    assert_eq!(violations(&status)[0].0, "resume_token");
                }
            }
        }
    }
    for token in [&before, &exported] {
        for filter in &filters {
            // A created user that does not match is left out.
            let has_prefix = filter.as_ref().is_some_and(|filter| !filter.username_prefix.is_empty());
            let request = pb::WatchUsersRequest { filter: filter.clone(), ..from_token(token) };
            let mut watch = Watch::open(&mut client, request).await.unwrap();
            watch.changes(if has_prefix { 1 } else { 2 }).await;
        }
    }
}

#[tokio::test]
async fn unsupported_and_invalid_filters_are_rejected_with_the_field() {
    let (server, _) = server().await;
    let mut client = server.client().await;
    let an = || pb::UserFilter { username_prefix: "an".into(), ..none() };
    for (filter, reason, field) in [
        (pb::UserFilter { email: "a@b.c".into(), ..an() }, "FILTER_UNSUPPORTED", "filter"),
        (pb::UserFilter { email: "nonsense".into(), ..none() }, "EMAIL_INVALID", "filter.email"),
        (
            pb::UserFilter { username_prefix: "a\0".into(), ..none() },
            "FIELD_INVALID",
            "filter.username_prefix",
        ),
    ] {
        let request = pb::WatchUsersRequest { filter: Some(filter), ..initial_state() };
        let rejected = Watch::open(&mut client, request).await.map(drop);
        let status = assert_rejected(rejected, Code::InvalidArgument, reason);
        assert_eq!(violations(&status), [(field.into(), reason.into())]);
    }
}
