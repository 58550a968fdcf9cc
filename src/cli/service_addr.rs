//! The address of the service, which every client command takes.

use std::net::SocketAddr;

use clap::Args;

use crate::config::DEFAULT_LISTEN_ADDR;

/// The service that a client command connects to.
#[derive(Debug, Args)]
pub struct ServiceAddr {
    /// The address of the service, as HOST:PORT [default: this machine, at the port of
    /// LISTEN_ADDR, which is 50051 if unset].
    #[arg(
        long,
        value_name = "HOST:PORT",
        env = "LISTEN_ADDR",
        hide_env = true,
        default_value = DEFAULT_LISTEN_ADDR,
        hide_default_value = true,
        value_parser = parse_service_addr
    )]
    pub addr: String,
}

/// An address to connect to. The unspecified address, on which a service can listen, becomes
/// the loopback address of the same family.
fn parse_service_addr(text: &str) -> Result<String, &'static str> {
    if let Ok(addr) = text.parse::<SocketAddr>() {
        return Ok(match addr {
            SocketAddr::V4(addr) if addr.ip().is_unspecified() => format!("127.0.0.1:{}", addr.port()),
            SocketAddr::V6(addr) if addr.ip().is_unspecified() => format!("[::1]:{}", addr.port()),
            addr => addr.to_string(),
        });
    }
    let is_valid = text
        .split_once(':')
        .is_some_and(|(host, port)| !host.is_empty() && !host.contains('/') && port.parse::<u16>().is_ok());
    if is_valid { Ok(text.to_owned()) } else { Err("must be HOST:PORT (from --addr, else LISTEN_ADDR)") }
}
