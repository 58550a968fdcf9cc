//! Hostile clients, which `tests/clients/attacks.py` plays by raw frames: the process lives, its
//! memory stays within the documented bound, and an innocent client is served.

use std::{io::Write as _, path::PathBuf, process::Output};

use user_service::pb;

use crate::feed::watch::insert;
use crate::server::clients::tool;
use crate::support::*;

const MIB: usize = 1 << 20;
/// What requests and responses of one connection may take: `MAX_BYTES_PER_CONNECTION`.
const LIMIT: usize = 16 * MIB;
/// What 1,000 requests of a connection take beside that: headers, futures, windows, and what
/// the allocator keeps. Generous, and far below what the attacks would take without a bound.
const OVERHEAD: usize = 64 * MIB;

/// Plays an attack against a server with short deadlines, and checks what it has done to it.
async fn attack(name: &str) {
    attack_within(name, "3000").await;
}

async fn attack_within(name: &str, request_timeout_ms: &str) {
    let database = Database::migrated().await;
    insert(&database, &"x".repeat(40), 1, 1_000).await;
    let settings = [
        // At the level `trace`, h2 logs every frame.
        ("RUST_LOG", "info,user_service::store::pool=debug"),
        ("MAX_BYTES_PER_CONNECTION", &LIMIT.to_string()),
        ("REQUEST_TIMEOUT_MS", request_timeout_ms),
        ("STREAM_READ_TIMEOUT_MS", "3000"),
    ];
    let mut server = Server::start(&database, &settings).await;
    let mut descriptors = tempfile::NamedTempFile::new().unwrap();
    descriptors.write_all(pb::FILE_DESCRIPTOR_SET).unwrap();
    let before = server.memory();
    let script = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/clients/attacks.py");
    let mut command = tool("venv/bin/python");
    command.arg(script).arg(&server.addr).arg(descriptors.path()).arg(name);
    let Output { status, stderr, .. } =
        tokio::task::spawn_blocking(move || command.output().unwrap()).await.unwrap();
    assert!(status.success(), "{}", String::from_utf8_lossy(&stderr));
    let growth = server.peak_memory().saturating_sub(before);
    assert!(growth < 2 * LIMIT + OVERHEAD, "{name} took {} MiB", growth / MIB);
    created(&mut server.client().await, "alice").await;
    server.signal("TERM");
    assert!(server.ended().await.success());
}

macro_rules! attacks {
    ($($name:ident: $attack:literal,)+) => {
        $(#[tokio::test]
        async fn $name() {
            attack($attack).await;
        })+
    };
}

attacks! {
    rapid_reset_closes_the_connection: "rapid_reset",
    resets_that_the_server_is_made_to_send_close_the_connection: "made_you_reset",
    endless_headers_close_the_connection: "continuation_flood",
    large_headers_take_little_memory: "header_bomb",
    frames_without_a_request_close_the_connection: "control_floods",
    half_open_connections_do_not_keep_a_client_out: "half_open_connections",
    unread_responses_are_bounded_and_reset: "zero_windows",
    responses_that_cannot_be_reset_close_the_connection: "one_byte_windows",
    small_responses_that_cannot_be_reset_close_the_connection: "small_unread_responses",
    unfinished_reflection_is_bounded_and_ends: "unfinished_reflection",
    random_bytes_are_rejected_by_every_rpc: "random_bytes",
}

/// The client has to reach the limit before the deadline of its requests.
#[tokio::test]
async fn unfinished_requests_are_bounded_and_end() {
    attack_within("unfinished_requests", "15000").await;
}

#[tokio::test]
async fn malformed_requests_are_rejected() {
    attack_within("malformed_requests", "60000").await;
}

#[tokio::test]
async fn client_that_cancels_all_its_requests_keeps_its_connection() {
    attack_within("mass_cancellation", "60000").await;
}

#[tokio::test]
async fn change_whose_response_finds_no_room_says_that_its_outcome_is_unknown() {
    attack_within("unread_changes", "60000").await;
}
