//! Two network namespaces joined by a veth pair: the link of a test, to be cut and mended.

use crate::block::run;
use std::process::Command;

/// The server's and the second site's namespace; both go when dropped.
pub struct Network {
    server: String,
    site: String,
}

/// Address of the server's end.
pub const SERVER_ADDRESS: &str = "10.213.77.1";
/// Address of the second site's end.
pub const SITE_ADDRESS: &str = "10.213.77.2";

impl Network {
    /// Makes both namespaces, the link up.
    pub fn new() -> Self {
        let unique = std::process::id();
        let network =
            Self { server: format!("ss-server-{unique}"), site: format!("ss-site-{unique}") };
        let (server, site) = (network.server.as_str(), network.site.as_str());
        run("ip", &["netns", "add", server]);
        run("ip", &["netns", "add", site]);
        let veth = ["link", "add", "wire0", "netns", server, "type", "veth"];
        run("ip", &[&veth[..], &["peer", "name", "wire0", "netns", site]].concat());
        for (namespace, address) in [(server, SERVER_ADDRESS), (site, SITE_ADDRESS)] {
            run("ip", &["-n", namespace, "addr", "add", &format!("{address}/24"), "dev", "wire0"]);
            run("ip", &["-n", namespace, "link", "set", "lo", "up"]);
            run("ip", &["-n", namespace, "link", "set", "wire0", "up"]);
        }
        network
    }

    /// Cuts or mends the link at the server's end, as a pulled plug would: sending fails at once.
    /// (At the second site's end it would take that end's own address with it.)
    pub fn set_up(&self, up: bool) {
        run("ip", &["-n", &self.server, "link", "set", "wire0", if up { "up" } else { "down" }]);
    }

    /// Loses every packet in both directions, or no more: nobody is told.
    pub fn set_silent(&self, silent: bool) {
        self.nft(if silent {
            "add table inet cut; \
             add chain inet cut in { type filter hook input priority 0; }; \
             add rule inet cut in iif wire0 drop; \
             add chain inet cut out { type filter hook output priority 0; }; \
             add rule inet cut out oif wire0 drop"
        } else {
            "delete table inet cut"
        });
    }

    /// The server's ends of the connections to a port of the second site that stand there.
    pub fn connections(&self, port: u16) -> Vec<u16> {
        let filter = format!("sport = :{port}");
        let output = self.on_site("ss").args(["-Htn", "state", "established", &filter]).output();
        let text = String::from_utf8(output.expect("ss runs").stdout).expect("UTF-8");
        let peer = |line: &str| line.split_whitespace().nth(3)?.rsplit_once(':')?.1.parse().ok();
        text.lines().map(|line| peer(line).expect("an address and a port")).collect()
    }

    /// Loses what still comes from these ports of the server, for good: as if a machine had lost
    /// its power, whose last packets this kernel would otherwise send again.
    pub fn bury(&self, ports: &[u16]) {
        let ports: Vec<String> = ports.iter().map(u16::to_string).collect();
        self.nft(&format!(
            "add table inet buried; \
             add chain inet buried in {{ type filter hook input priority 0; }}; \
             add rule inet buried in iif wire0 tcp sport {{ {} }} drop",
            ports.join(", ")
        ));
    }

    fn nft(&self, rules: &str) {
        let status = self.on_site("nft").arg(rules).status().expect("nft runs");
        assert!(status.success(), "nft {rules}: {status}");
    }

    /// A command that runs on the second site's end.
    pub fn on_site(&self, program: &str) -> Command {
        enter(&self.site, program)
    }

    /// A command that runs on the server's end.
    pub fn on_server(&self, program: &str) -> Command {
        enter(&self.server, program)
    }
}

/// Only the network is entered: `ip netns exec` would also mount another /sys, and with it hide
/// the pins under /sys/fs/bpf.
fn enter(namespace: &str, program: &str) -> Command {
    let mut command = Command::new("nsenter");
    command.arg(format!("--net=/run/netns/{namespace}")).arg(program);
    command
}

impl Default for Network {
    fn default() -> Self {
        Self::new()
    }
}

impl Drop for Network {
    fn drop(&mut self) {
        for namespace in [&self.server, &self.site] {
            let _ = Command::new("ip").args(["netns", "del", namespace]).status();
        }
    }
}
