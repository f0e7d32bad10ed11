//! Who may connect where a migration arrives.

use std::net::IpAddr;

use clap::Args;
use ipnet::{IpNet, Ipv4Net};
use multifd::transport::{Listen, uri::Uri};

use super::MIGRATION;
use crate::allow::AllowListener;

/// Addresses that may connect.
#[derive(Clone, Debug, Default, Args)]
#[command(next_help_heading = MIGRATION)]
pub struct AllowArgs {
    /// Take connections from this address or network only, as in 10.0.0.0/8 or fd00::1; may be given several times. All others are
    /// closed unread. TCP only [default: from every address].
    #[arg(long, value_name = "CIDR", value_parser = network)]
    pub allow: Vec<IpNet>,
}

impl AllowArgs {
    /// # Errors
    /// What was expected, for clap: addresses have no meaning where `uri` has none.
    pub fn check(&self, uri: Option<&Uri>) -> Result<(), String> {
        match uri {
            _ if self.allow.is_empty() => Ok(()),
            // What a descriptor is shows when it is used.
            Some(Uri::Tcp { .. } | Uri::Fd(_)) => Ok(()),
            _ => {
                Err("the option '--allow <CIDR>' is for addresses, which only TCP has; expected tcp:HOST:PORT with it"
                    .to_owned())
            }
        }
    }

    /// What accepts the connections of `listener` that come from such an address.
    pub fn listener(&self, listener: Box<dyn Listen>) -> Box<dyn Listen> {
        match self.allow.is_empty() {
            true => listener,
            false => Box::new(AllowListener::new(listener, self.allow.clone())),
        }
    }
}

/// Who may connect to a destination, and how many at once before they have said what they are.
#[derive(Clone, Debug, Args)]
#[command(next_help_heading = MIGRATION)]
pub struct ListenArgs {
    /// By address.
    #[command(flatten)]
    pub allow: AllowArgs,
    /// How many connections that have not said what they are may be there, 1 to 4096; the oldest makes room. Those of the last 3
    /// seconds stay, up to 272: a source may open all of its own at once.
    #[arg(long, value_name = "N", default_value_t = DEFAULT_UNIDENTIFIED, value_parser = clap::value_parser!(u16).range(1..=4096))]
    pub max_unidentified: u16,
}

impl Default for ListenArgs {
    fn default() -> ListenArgs {
        ListenArgs { allow: AllowArgs::default(), max_unidentified: DEFAULT_UNIDENTIFIED }
    }
}

/// An address, or those that begin with the same bits.
///
/// # Errors
/// What was expected, for clap.
fn network(text: &str) -> Result<IpNet, String> {
    let single = || text.parse().ok().map(|address: IpAddr| IpNet::from(address.to_canonical()));
    let network = text.parse().ok().map(canonical).or_else(single);
    network.ok_or_else(|| "expected an address or network, as in 192.0.2.7, 10.0.0.0/8 or fd00::/8".to_owned())
}

/// The network of IPv4 addresses that `network` means, where it is one of them in IPv6's notation: peers are known by their IPv4
/// addresses.
fn canonical(network: IpNet) -> IpNet {
    let IpNet::V6(mapped) = network else { return network };
    let address = mapped.addr().to_ipv4_mapped();
    let v4 =
        address.zip(mapped.prefix_len().checked_sub(96)).and_then(|(address, len)| Ipv4Net::new(address, len).ok());
    v4.map_or(network, IpNet::V4)
}

/// As many as the engine permits by itself.
const DEFAULT_UNIDENTIFIED: u16 = 64;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn networks_and_addresses_are_read() {
        for (text, expected) in [
            ("10.0.0.0/8", "10.0.0.0/8"),
            ("192.0.2.7", "192.0.2.7/32"),
            ("fd00::/8", "fd00::/8"),
            ("::1", "::1/128"),
            ("::ffff:192.0.2.7", "192.0.2.7/32"),
            ("0.0.0.0/0", "0.0.0.0/0"),
            ("::ffff:10.0.0.0/104", "10.0.0.0/8"),
            ("::ffff:0:0/96", "0.0.0.0/0"),
            ("::/0", "::/0"),
        ] {
            assert_eq!(network(text).unwrap().to_string(), expected);
        }
        for wrong in ["", "10.0.0.0/33", "10.0.0/8", "host.example", "fd00::/129", "10.0.0.0/-1", "10.0.0.0/"] {
            assert!(network(wrong).unwrap_err().contains("10.0.0.0/8"), "{wrong}");
        }
    }

    #[test]
    fn the_default_is_that_of_the_engine() {
        let options = multifd::destination::Options::default();
        assert_eq!(options.max_unidentified, usize::from(DEFAULT_UNIDENTIFIED));
    }
}
