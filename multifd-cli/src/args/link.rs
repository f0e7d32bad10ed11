//! The connections of a migration, on either side: limits, and the secret that keeps others out.

use std::{
    fmt,
    fs::File,
    io::{self, Read},
    str::FromStr,
    time::Duration,
};

use clap::Args;

use super::{
    MIGRATION,
    tls::TlsArgs,
    values::{bytes16, show_limit},
};
use crate::units::{self, Limit};

/// The connections, on either side.
#[derive(Clone, Debug, Args)]
#[command(next_help_heading = MIGRATION)]
pub struct LinkArgs {
    /// How long nothing may arrive before the peer is given up, while the guest runs; 0 for no limit.
    #[arg(long, value_name = "TIME", default_value = "2min", value_parser = units::time_limit)]
    pub stall_timeout: Limit<Duration>,
    /// Secret of this migration, 32 hexadecimal digits, the same on both sides; connections without it are dropped. Not
    /// with QEMU. In the environment other users do not see it.
    #[arg(long, value_name = "HEX32", env = TOKEN_VARIABLE, hide_env_values = true, value_parser = Token::from_str)]
    pub token: Option<Token>,
    /// Whether they are encrypted.
    #[command(flatten)]
    pub tls: TlsArgs,
}

impl LinkArgs {
    /// The same as options of a command line, but for the token: every user can read those.
    pub(super) fn to_args(&self) -> Vec<String> {
        let LinkArgs { stall_timeout, token: _, tls } = self;
        let mut args = vec![format!("--stall-timeout={}", show_limit(*stall_timeout))];
        args.extend(tls.to_args());
        args
    }
}

/// The secret of a migration.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Token(pub [u8; 16]);

impl Token {
    /// One that was never used before.
    ///
    /// # Errors
    /// The kernel's.
    pub fn random() -> io::Result<Token> {
        let mut bytes = [0; 16];
        File::open("/dev/urandom")?.read_exact(&mut bytes)?;
        Ok(Token(bytes))
    }

    /// The same as 32 digits.
    pub fn reveal(self) -> String {
        format!("{:032x}", u128::from_be_bytes(self.0))
    }
}

impl FromStr for Token {
    type Err = String;

    fn from_str(text: &str) -> Result<Token, String> {
        bytes16(text).map(Token).ok_or_else(|| "expected 32 hexadecimal digits".to_owned())
    }
}

/// Hides it.
impl fmt::Debug for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Token(..)")
    }
}

/// Where `--token` is taken from when it is not given.
pub const TOKEN_VARIABLE: &str = "MULTIFD_TOKEN";

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_token_is_32_digits_and_not_shown() {
        let token = Token::random().unwrap();
        assert_eq!(token.reveal().parse(), Ok(token));
        assert_eq!("000102030405060708090a0b0c0D0E0F".parse(), Ok(Token(std::array::from_fn(|at| at as u8))));
        assert!(!format!("{token:?}").contains(&token.reveal()[..8]));
        for wrong in ["", "0", "zz0102030405060708090a0b0c0d0e0f", "00010203-0405-0607-0809-0a0b0c0d0e0f"] {
            assert!(wrong.parse::<Token>().is_err(), "{wrong}");
        }
    }
}
