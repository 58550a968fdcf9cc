//! Third-party clients use the service; they know it by reflection only.

use std::{
    io::Write as _,
    path::PathBuf,
    process::{Command, Stdio},
};

use base64::{Engine as _, engine::general_purpose::STANDARD_NO_PAD};
use prost::Message as _;
use serde_json::json;
use tonic_reflection::pb::{v1, v1alpha};
use tonic_types::pb::ErrorInfo;
use user_service::pb;

use crate::feed::watch::{Watch, insert};
use crate::support::*;

/// A command of a program that `make test` installs.
pub fn tool(path: &str) -> Command {
    let path = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join(".tools").join(path);
    assert!(path.exists(), "{} is missing: `make test` installs it", path.display());
    Command::new(path)
}

#[tokio::test]
async fn python_grpcio_client_creates_changes_watches_and_erases_users() {
    let (server, _) = server().await;
    let script = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/clients/life.py");
    let output = tool("venv/bin/python").args([script, &server.addr]).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
}

/// Calls an rpc with `buf curl`.
fn buf_curl(server: &Server, rpc: &str, json: &str) -> Result<String, String> {
    let url = format!("http://{}/users.v1.UserService/{rpc}", server.addr);
    let mut command = tool("node_modules/.bin/buf");
    command.args(["curl", "--protocol", "grpc", "--http2-prior-knowledge", "--data", json, &url]);
    let output = command.output().unwrap();
    let text = |bytes| String::from_utf8(bytes).unwrap().split_whitespace().collect::<String>();
    if output.status.success() { Ok(text(output.stdout)) } else { Err(text(output.stderr)) }
}

#[tokio::test]
async fn buf_curl_creates_changes_and_erases_a_user() {
    let (server, _) = server().await;
    let id = "0190a3c0-0000-7000-8000-000000000001";
    let with_id = |rest: &str| format!(r#"{{"id":"{id}"{rest}}}"#);
    let create = format!(r#"{{"user":{{"id":"{id}","username":"zqzqAlice","email":"zqzq@example.com"}}}}"#);
    let created = buf_curl(&server, "CreateUser", &create).unwrap();
    assert!(
        created.contains(r#""revision":"1""#) && created.contains(r#""username":"zqzqAlice""#),
        "{created}"
    );
    assert_eq!(created, buf_curl(&server, "GetUser", r#"{"username":"ZQZQALICE"}"#).unwrap());
    let rejected = buf_curl(&server, "CreateUser", &create).unwrap_err();
    assert!(rejected.contains(r#""code":"already_exists""#), "{rejected}");
    assert!(
        rejected.contains("google.rpc.ErrorInfo") && rejected.contains("google.rpc.BadRequest"),
        "{rejected}"
    );
    let update = format!(r#"{{"user":{{"id":"{id}","displayName":"Al"}},"updateMask":"displayName"}}"#);
    assert!(buf_curl(&server, "UpdateUser", &update).unwrap().contains(r#""displayName":"Al""#));
    assert!(buf_curl(&server, "ListUsers", "{}").unwrap().contains(id));
    assert!(
        buf_curl(&server, "DeleteUser", &with_id(r#","releaseUsername":true"#))
            .unwrap()
            .contains("purgeTime")
    );
    assert!(
        buf_curl(&server, "CheckUsername", r#"{"username":"zqzqalice"}"#)
            .unwrap()
            .contains(r#""available":true"#)
    );
    assert!(buf_curl(&server, "UndeleteUser", &with_id("")).unwrap_err().contains("failed_precondition"));
    let undelete = with_id(r#","username":"zqzqal""#);
    assert!(buf_curl(&server, "UndeleteUser", &undelete).unwrap().contains(r#""revision":"4""#));
    assert!(buf_curl(&server, "ExpungeUser", &with_id(r#","force":true"#)).unwrap().contains(id));
    assert!(buf_curl(&server, "GetUser", &with_id("")).unwrap_err().contains("not_found"));
}

/// A request that is rejected, and what clients have to read.
struct Rejection {
    rpc: &'static str,
    request: serde_json::Value,
    code: &'static str,
    reason: &'static str,
    message: &'static str,
}

const fn rejection(
    rpc: &'static str,
    request: serde_json::Value,
    code: &'static str,
    reason: &'static str,
    message: &'static str,
) -> Rejection {
    Rejection { rpc, request, code, reason, message }
}

const WATCH: &str = "users.v1.UserService/WatchUsers";
const EXPORT: &str = "users.v1.UserService/ExportUsers";
const IMPORT: &str = "users.v1.UserService/ImportUsers";

/// Sends the requests by three implementations of gRPC. Each has to read the code, the
/// message, and the details.
fn assert_clients_read(server: &Server, rejections: &[Rejection]) {
    let mut descriptors = tempfile::NamedTempFile::new().unwrap();
    descriptors.write_all(pb::FILE_DESCRIPTOR_SET).unwrap();
    let cases = rejections.iter().map(|case| {
        json!({
            "rpc": case.rpc, "request": case.request, "code": case.code, "reason": case.reason,
            "message": case.message,
        })
    });
    let cases = serde_json::Value::from_iter(cases).to_string();
    let root = PathBuf::from(env!("CARGO_MANIFEST_DIR"));
    let mut node = Command::new("node");
    node.env("NODE_PATH", root.join(".tools/node_modules"));
    for (mut program, script) in [(tool("venv/bin/python"), "rejections.py"), (node, "rejections.js")] {
        program.arg(root.join("tests/clients").join(script)).arg(&server.addr).arg(descriptors.path());
        program.stdin(Stdio::piped()).stderr(Stdio::piped());
        let mut child = program.spawn().unwrap();
        child.stdin.take().unwrap().write_all(cases.as_bytes()).unwrap();
        let output = child.wait_with_output().unwrap();
        assert!(output.status.success(), "{script}: {}", String::from_utf8_lossy(&output.stderr));
    }
    for case in rejections {
        let method = case.rpc.rsplit_once('/').unwrap().1;
        let read = buf_curl(server, method, &case.request.to_string()).unwrap_err();
        let read: serde_json::Value = serde_json::from_str(&read).unwrap();
        assert_eq!(read["code"], case.code.to_lowercase(), "{read}");
        let message = case.message.split_whitespace().collect::<String>();
        assert!(read["message"].as_str().unwrap().contains(&message), "{read}");
        let details = read["details"].as_array().unwrap();
        let info = details.iter().find(|detail| detail["type"] == "google.rpc.ErrorInfo").unwrap();
        let info = STANDARD_NO_PAD.decode(info["value"].as_str().unwrap()).unwrap();
        assert_eq!(ErrorInfo::decode(&*info).unwrap().reason, case.reason);
    }
}

#[tokio::test]
async fn three_implementations_of_grpc_read_rejections_of_streams() {
    let database = Database::migrated().await;
    let settings = [("MAX_WATCHERS", "1"), ("MAX_EXPORTS", "1"), ("MAX_IMPORTS", "1")];
    let server = Server::start(&database, &settings).await;
    let prefix = json!({"filter": {"username_prefix": "ab", "email": "a@example.com"}});
    let import = |chunk| json!({"import_id": new_request_id(), "chunk": chunk});
    assert_clients_read(
        &server,
        &[
            rejection(
                WATCH,
                json!({"resume_token": "x"}),
                "INVALID_ARGUMENT",
                "RESUME_TOKEN_INVALID",
                "resume",
            ),
            rejection(WATCH, prefix, "INVALID_ARGUMENT", "FILTER_UNSUPPORTED", "filter"),
            rejection(
                EXPORT,
                json!({"filter": {"email": "zqzq"}}),
                "INVALID_ARGUMENT",
                "EMAIL_INVALID",
                "filter.email",
            ),
            rejection(IMPORT, json!({"chunk": 1}), "INVALID_ARGUMENT", "FIELD_REQUIRED", "import_id"),
            rejection(IMPORT, import(0), "INVALID_ARGUMENT", "FIELD_REQUIRED", "chunk"),
        ],
    );

    // Each limit is reached by a stream that is not read.
    insert(&database, "user", 10, 2_000).await;
    let mut client = narrow_client(&server).await;
    let _watch = Watch::from_now(&mut client).await;
    let _export = client.export_users(pb::ExportUsersRequest::default()).await.unwrap();
    let _import = client.import_users(futures_util::stream::pending()).await.unwrap();
    let is_full = |rpc, request, message| rejection(rpc, request, "UNAVAILABLE", "OVERLOADED", message);
    assert_clients_read(
        &server,
        &[
            is_full(WATCH, json!({}), "the limit of 1 watches"),
            is_full(EXPORT, json!({}), "the limit of 1 exports"),
            is_full(IMPORT, import(1), "the limit of 1 imports"),
        ],
    );
}

#[tokio::test]
async fn three_implementations_of_grpc_read_that_the_database_is_unavailable() {
    let url = "postgres://postgres@%2Fnonexistent/postgres";
    let server = Server::spawn(&[("DATABASE_URL", url)]).await;
    let is_unavailable =
        |rpc| rejection(rpc, json!({}), "UNAVAILABLE", "DATABASE_UNAVAILABLE", "cannot be reached");
    assert_clients_read(&server, &[is_unavailable(WATCH), is_unavailable(EXPORT)]);
}

#[tokio::test]
async fn reflection_can_be_switched_off() {
    let database = Database::migrated().await;
    let server = Server::start(&database, &[("REFLECTION", "off")]).await;
    let mut client = v1::server_reflection_client::ServerReflectionClient::new(server.channel().await);
    let status = client.server_reflection_info(futures_util::stream::pending()).await.unwrap_err();
    assert_eq!(status.code(), tonic::Code::Unimplemented);
    created(&mut server.client().await, "alice").await;
}

#[tokio::test]
async fn both_versions_of_reflection_serve_the_contract_with_its_comments() {
    let (server, _) = server().await;
    let file = "users.v1.UserService";
    let expected = ["users.v1.UserService", "grpc.health.v1.Health"];

    let request =
        |message| v1::ServerReflectionRequest { message_request: Some(message), ..Default::default() };
    let requests = [
        v1::server_reflection_request::MessageRequest::ListServices(String::new()),
        v1::server_reflection_request::MessageRequest::FileContainingSymbol(file.into()),
        v1::server_reflection_request::MessageRequest::FileContainingSymbol("google.rpc.RetryInfo".into()),
    ];
    let mut client = v1::server_reflection_client::ServerReflectionClient::new(server.channel().await);
    let stream =
        client.server_reflection_info(futures_util::stream::iter(requests.map(request))).await.unwrap();
    let mut stream = stream.into_inner();
    let mut responses = Vec::new();
    while let Some(response) = stream.message().await.unwrap() {
        responses.push(response.message_response.unwrap());
    }
    let [
        v1::server_reflection_response::MessageResponse::ListServicesResponse(services),
        v1::server_reflection_response::MessageResponse::FileDescriptorResponse(files),
        v1::server_reflection_response::MessageResponse::FileDescriptorResponse(_),
    ] = &responses[..]
    else {
        panic!("{responses:?}");
    };
    let names: Vec<_> = services.service.iter().map(|service| service.name.as_str()).collect();
    assert!(expected.iter().all(|name| names.contains(name)), "{names:?}");
    let comment = b"The system of record for users.";
    assert!(files.file_descriptor_proto[0].windows(comment.len()).any(|window| window == comment));

    let request = v1alpha::ServerReflectionRequest {
        message_request: Some(
            v1alpha::server_reflection_request::MessageRequest::ListServices(String::new()),
        ),
        ..Default::default()
    };
    let mut client = v1alpha::server_reflection_client::ServerReflectionClient::new(server.channel().await);
    let stream = client.server_reflection_info(futures_util::stream::iter([request])).await.unwrap();
    let response = stream.into_inner().message().await.unwrap().unwrap().message_response.unwrap();
    let v1alpha::server_reflection_response::MessageResponse::ListServicesResponse(services) = response
    else {
        panic!("{response:?}");
    };
    assert!(services.service.iter().any(|service| service.name == expected[0]));
}
