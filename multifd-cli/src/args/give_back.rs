//! The options of `multifd give-back`.

use clap::Args;
use multifd::transport::uri::Uri;
use multifd_proto::BlockName;

use super::{listen::AllowArgs, output::OutputArgs, tls::TlsArgs};

/// Options of `multifd give-back`.
#[derive(Debug, Args)]
pub struct GiveBackArgs {
    /// Where to wait for the source: tcp:HOST:PORT (port 0 picks a free one), unix:PATH or vsock:CID:PORT.
    #[arg(value_name = "URI")]
    pub uri: Uri,
    /// A RAM block of the VM and its size in bytes, each of them: what `receive` has named when it failed.
    #[arg(value_name = "BLOCK=BYTES", required = true, value_parser = block)]
    pub blocks: Vec<(BlockName, u64)>,
    /// Who may connect.
    #[command(flatten)]
    pub allow: AllowArgs,
    /// Whether the connection is encrypted.
    #[command(flatten)]
    pub tls: TlsArgs,
    /// What to print.
    #[command(flatten)]
    pub output: OutputArgs,
}

impl GiveBackArgs {
    /// # Errors
    /// What was expected, for clap.
    pub(super) fn check(&self) -> Result<(), String> {
        self.allow.check(Some(&self.uri))
    }
}

/// # Errors
/// What was expected, for clap.
fn block(text: &str) -> Result<(BlockName, u64), String> {
    let expected = || format!("expected the name of a RAM block, = and its bytes, a multiple of 4096: {text:?}");
    let (name, bytes) = text.rsplit_once('=').ok_or_else(expected)?;
    let bytes: u64 = bytes
        .parse()
        .ok()
        .filter(|bytes| *bytes > 0 && *bytes <= MAX_BLOCK && bytes % 4096 == 0)
        .ok_or_else(expected)?;
    Ok((BlockName::new(name).map_err(|_| expected())?, bytes))
}

/// The largest block that is taken, 16 TiB: its bitmap has 512 MiB.
const MAX_BLOCK: u64 = 16 << 40;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_block_is_a_name_and_whole_pages() {
        let name = |text: &str| BlockName::new(text).unwrap();
        assert_eq!(block("pc.ram=8192"), Ok((name("pc.ram"), 8192)));
        assert_eq!(block("/rom@etc/acpi/tables=131072"), Ok((name("/rom@etc/acpi/tables"), 131_072)));
        assert_eq!(block("a=b=4096"), Ok((name("a=b"), 4096)));
        for wrong in
            ["pc.ram", "=4096", "pc.ram=", "pc.ram=0", "pc.ram=4097", "pc.ram=-4096", "pc.ram=18446744073709547520"]
        {
            assert!(block(wrong).unwrap_err().contains("a multiple of 4096"), "{wrong}");
        }
    }
}
