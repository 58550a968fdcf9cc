//! Third-party clients use the service; they know it by reflection only.

use std::{path::PathBuf, process::Command};

use tonic_reflection::pb::{v1, v1alpha};

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
