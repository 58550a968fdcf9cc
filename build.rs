//! Compiles the protos, without protoc, and keeps the descriptors for reflection.

#![expect(clippy::disallowed_methods, reason = "cargo talks to build scripts by the environment")]

use std::{env, error::Error, fs, path::PathBuf};

use prost::Message;

fn main() -> Result<(), Box<dyn Error>> {
    println!("cargo:rerun-if-changed=proto");
    // refinery embeds the migrations with a macro, which cargo does not watch.
    println!("cargo:rerun-if-changed=migrations");
    let descriptors = protox::Compiler::new(["proto"])?
        .include_source_info(true)
        .include_imports(true)
        .open_file("users/v1/user_service.proto")?
        .file_descriptor_set();
    let out = PathBuf::from(env::var("OUT_DIR")?);
    fs::write(out.join("descriptors.bin"), descriptors.encode_to_vec())?;
    let builder = || tonic_prost_build::configure().codec_path("crate::pb::codec::BoundedCodec");
    builder().build_server(false).compile_fds(descriptors.clone())?;
    // The server on its own, because what it sends to watchers is already encoded.
    let server = out.join("server");
    fs::create_dir_all(&server)?;
    builder()
        .build_client(false)
        .extern_path(".users.v1", "crate::pb")
        .extern_path(".users.v1.WatchUsersResponse", "crate::pb::codec::Encoded")
        .out_dir(server)
        .compile_fds(descriptors)?;
    Ok(())
}
