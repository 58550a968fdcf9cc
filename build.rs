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
    let out = PathBuf::from(env::var("OUT_DIR")?).join("descriptors.bin");
    fs::write(out, descriptors.encode_to_vec())?;
    tonic_prost_build::configure().codec_path("crate::codec::BoundedCodec").compile_fds(descriptors)?;
    Ok(())
}
