//! Which `Host` headers are answered.

use std::net::{IpAddr, SocketAddr};

/// Whether a request may name this host. Loopback names and addresses may be named, the bound address, and every address where
/// the socket is bound to all of them; beyond loopback also this machine's own name. Any other name could be one that another
/// site points to this machine, to read the answers from its own page.
pub(super) fn is_allowed(host: &str, bound: SocketAddr, own_name: &str) -> bool {
    let name = without_port(host);
    if let Ok(address) = name.parse::<IpAddr>() {
        return address.is_loopback() || address == bound.ip() || bound.ip().is_unspecified();
    }
    name.eq_ignore_ascii_case("localhost") || (!bound.ip().is_loopback() && name.eq_ignore_ascii_case(own_name))
}

/// `name`, `name:port`, `[v6]` and `[v6]:port` without port and brackets.
fn without_port(host: &str) -> &str {
    match host.strip_prefix('[') {
        Some(rest) => rest.split_once(']').map_or(rest, |(address, _)| address),
        None => host.rsplit_once(':').map_or(host, |(name, _)| name),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hosts() {
        let (loopback, all, one) = ("127.0.0.1:4243", "0.0.0.0:4243", "10.1.2.3:4243");
        let cases = [
            ("127.0.0.1:4243", loopback, true),
            ("127.0.0.1", loopback, true),
            ("LocalHost:4243", loopback, true),
            ("[::1]:4243", loopback, true),
            ("evil.example:4243", loopback, false),
            ("localhost.evil.example", loopback, false),
            ("127.0.0.1.evil.example:4243", loopback, false),
            ("10.1.2.3:4243", loopback, false),
            ("node-a:4243", loopback, false),
            ("", loopback, false),
            ("10.1.2.3:4243", all, true),
            ("[2001:db8::1]:4243", all, true),
            ("node-a:4243", all, true),
            ("node-a.evil.example:4243", all, false),
            ("10.1.2.3:4243", one, true),
            ("10.1.2.4:4243", one, false),
            ("Node-A", one, true),
            ("localhost:4243", one, true),
        ];
        for (host, bound, expected) in cases {
            assert_eq!(is_allowed(host, bound.parse().unwrap(), "node-a"), expected, "{host} at {bound}");
        }
    }
}
