//! The exit statuses of the command, which scripts rely on.
//!
//! A status is a kind of event, not the place where it was noticed. Of a connection that ends (closed, reset, a process that
//! is killed) it is always [`Failed`](Exit::Failed), whatever the byte: between packets, within one, in the hello or in the
//! set-up. [`Peer`](Exit::Peer) is for bytes that arrived and are wrong, or do not fit.

use std::process::ExitCode;

use multifd::error::Error;

/// How the command ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Exit {
    /// Done.
    Done = 0,
    /// Failed for a reason that has no status of its own.
    Failed = 1,
    /// The command line makes no sense.
    Usage = 2,
    /// Cancelled by a signal or a command.
    Cancelled = 3,
    /// The peer broke the protocol or does not match.
    Peer = 4,
    /// The guest writes faster than its memory can be sent.
    DoesNotConverge = 5,
    /// Memory has wrong contents.
    Different = 6,
    /// It is not known which side has the guest, and it is paused here; or whether the destination has all of its memory, or all of its device state.
    InDoubt = 7,
    /// The VM is at the destination, which lacks a part of its memory: it can go on.
    Incomplete = 8,
}

impl Exit {
    /// The status of a process that ended with `code`.
    pub fn from_code(code: i32) -> Exit {
        ALL.into_iter().find(|exit| *exit as i32 == code).unwrap_or(Exit::Failed)
    }

    /// The value of `status` in the JSON report, in the words of QMP's `query-migrate`.
    pub fn status(self) -> &'static str {
        match self {
            Exit::Done => "completed",
            Exit::Cancelled => "cancelled",
            _ => "failed",
        }
    }
}

impl From<&Error> for Exit {
    fn from(error: &Error) -> Exit {
        match error {
            Error::Cancelled => Exit::Cancelled,
            Error::DoesNotConverge { .. } => Exit::DoesNotConverge,
            Error::NotResumed { first, .. } => Exit::from(&**first),
            Error::AfterRun { reason, .. } => Exit::from(&**reason),
            Error::InDoubt { .. } | Error::Unacknowledged { .. } | Error::StateOnChannels { .. } => Exit::InDoubt,
            Error::Incomplete { .. } => Exit::Incomplete,
            error if error.is_peers_fault() => Exit::Peer,
            _ => Exit::Failed,
        }
    }
}

impl From<Exit> for ExitCode {
    fn from(exit: Exit) -> ExitCode {
        ExitCode::from(exit as u8)
    }
}

const ALL: [Exit; 9] = [
    Exit::Done,
    Exit::Failed,
    Exit::Usage,
    Exit::Cancelled,
    Exit::Peer,
    Exit::DoesNotConverge,
    Exit::Different,
    Exit::InDoubt,
    Exit::Incomplete,
];

#[cfg(test)]
mod tests {
    use std::{
        fs,
        io::{Read, Write},
        iter,
        os::unix::net::{UnixListener, UnixStream},
        path::Path,
        thread,
        time::Duration,
    };

    use multifd::{
        checkpoint,
        destination::{self, Destination},
        error::Mismatch,
        source::{self, Source},
        transport::{record::Recording, uri::Uri},
    };
    use multifd_guest::{
        guest::{Guest, GuestConfig, Kind},
        pace::Rate,
    };
    use multifd_proto::packet::Compression;
    use test_support::{TempDir, time_limit};

    use super::*;

    const LIMIT: Duration = Duration::from_secs(180);
    /// Bytes of the last packet of a channel.
    const SYNC_PACKET: usize = 1344;

    fn guest() -> Guest {
        let config = GuestConfig {
            kind: Kind::Process,
            memory: 64 << 10,
            working_set: 8 << 10,
            filled_percent: 20,
            write_rate: Rate::Idle,
            verify: false,
            ..GuestConfig::default()
        };
        Guest::create(&config).unwrap()
    }

    fn to(path: &Path) -> Uri {
        Uri::Unix(path.to_owned())
    }

    fn with_channels(channels: u8) -> source::Options {
        let mut options = source::Options::default();
        options.plan.channels = channels;
        options
    }

    /// What a source sends on main and on each of its channels.
    fn recorded(dir: &TempDir, options: &source::Options) -> Vec<Vec<u8>> {
        let channels = options.plan.channels;
        let (socket, kept) = (dir.join("s"), dir.join("recorded"));
        let listener = Recording::new(&kept).unwrap().listener(Box::new(to(&socket).listener().unwrap()));
        let mut writer = checkpoint::Writer::create(&dir.join("whole"), false).unwrap();
        thread::scope(|scope| {
            let sender = scope.spawn(|| {
                let connector = to(&socket).connector().unwrap();
                Source::new(options.clone()).run(&mut guest(), &*connector, &mut ()).map(drop)
            });
            writer.receive(Destination::new(Default::default()), Box::new(listener), &mut ()).unwrap();
            sender.join().unwrap().unwrap();
        });
        let names = iter::once("main.bin".to_owned()).chain((0..channels).map(|channel| format!("ch{channel}.bin")));
        names.map(|name| fs::read(kept.join(name)).unwrap()).collect()
    }

    /// How a receiver ends whose source sends these bytes, on each connection, and is gone.
    fn received(dir: &TempDir, channels: Option<u8>, connections: &[&[u8]]) -> Exit {
        let mut options = destination::Options::default();
        options.channels = channels;
        options.setup_timeout = Some(Duration::from_millis(20));
        let (socket, file) = (dir.join("s"), dir.join("cut"));
        let mut writer = checkpoint::Writer::create(&file, true).unwrap();
        let listener = to(&socket).listener().unwrap();
        for bytes in connections {
            // Fits into the socket's buffer.
            UnixStream::connect(&socket).unwrap().write_all(bytes).unwrap();
        }
        match writer.receive(Destination::new(options), Box::new(listener), &mut ()) {
            Ok(_) => Exit::Done,
            Err(error) => Exit::from(&error),
        }
    }

    /// The same event had one status between packets and another within one.
    #[test]
    fn a_source_that_is_gone_has_one_status_whatever_the_byte() {
        time_limit(LIMIT, || {
            let dir = TempDir::new().unwrap();
            let [main, channel] = &recorded(&dir, &with_channels(1))[..] else { panic!("two connections") };
            assert!(main.len() + channel.len() < 128 << 10, "{} {}", main.len(), channel.len());
            // Every byte of the beginning and of the end, and of what lies between, some.
            let cuts = |bytes: &[u8]| {
                let (head, tail) = (500.min(bytes.len()), bytes.len().saturating_sub(100));
                (0..head).chain((head..tail).step_by(61)).chain(tail.max(head)..bytes.len()).collect::<Vec<_>>()
            };
            for channels in [Some(1), None] {
                // A connection that has not even said that it is main is a stranger's, and the source is waited for.
                for at in cuts(main).into_iter().filter(|&at| at >= 4) {
                    let exit = received(&dir, channels, &[&main[..at], channel]);
                    assert_eq!(exit, Exit::Failed, "main cut at byte {at}");
                }
                for at in cuts(channel) {
                    let exit = received(&dir, channels, &[main, &channel[..at]]);
                    assert_eq!(exit, Exit::Failed, "channel 0 cut at byte {at}, channels: {channels:?}");
                }
            }
        });
    }

    /// It had the status of bytes that are wrong, where main was ahead and not known to be gone yet.
    #[test]
    fn a_channel_that_ends_between_two_packets_has_the_same_status() {
        time_limit(LIMIT, || {
            let dir = TempDir::new().unwrap();
            let [main, channel] = &recorded(&dir, &with_channels(1))[..] else { panic!("two connections") };
            let mut options = destination::Options::default();
            options.channels = Some(1);
            let mut writer = checkpoint::Writer::create(&dir.join("cut"), true).unwrap();
            let listener = to(&dir.join("s")).listener().unwrap();
            let mut open = UnixStream::connect(dir.join("s")).unwrap();
            open.write_all(main).unwrap();
            let mut cut = UnixStream::connect(dir.join("s")).unwrap();
            cut.write_all(&channel[..channel.len() - SYNC_PACKET]).unwrap();
            drop(cut);
            let error = writer.receive(Destination::new(options), Box::new(listener), &mut ()).unwrap_err();
            assert!(error.to_string().contains("ended without the SYNC packet"), "{error}");
            assert_eq!(Exit::from(&error), Exit::Failed);
        });
    }

    #[test]
    fn a_source_that_is_gone_within_compressed_pages_has_the_same_status() {
        time_limit(LIMIT, || {
            for compression in [Compression::Zlib, Compression::Zstd] {
                let dir = TempDir::new().unwrap();
                let mut options = with_channels(1);
                options.format.compression = compression;
                let [main, channel] = &recorded(&dir, &options)[..] else { panic!("two connections") };
                for at in (0..channel.len()).step_by(1 + channel.len() / 200) {
                    let exit = received(&dir, Some(1), &[main, &channel[..at]]);
                    assert_eq!(exit, Exit::Failed, "{compression:?} cut at byte {at}");
                }
            }
        });
    }

    /// A process that is killed: each connection has come to another place.
    #[test]
    fn a_source_that_is_killed_has_one_status_wherever_its_connections_are() {
        time_limit(LIMIT, || {
            let dir = TempDir::new().unwrap();
            let connections = recorded(&dir, &with_channels(2));
            let mut random = 0x9e37_79b9_7f4a_7c15u64;
            let mut cut = |len: usize| {
                // xorshift64
                random ^= random << 13;
                random ^= random >> 7;
                random ^= random << 17;
                // Half of them early.
                (random >> 16) as usize % if random & 1 == 0 { len } else { len.min(500) }
            };
            for _ in 0..400 {
                let mut parts: Vec<&[u8]> = connections.iter().map(|bytes| &bytes[..cut(bytes.len())]).collect();
                // With less, main would be a stranger's connection, and the source waited for.
                parts[0] = &connections[0][..parts[0].len().max(4)];
                // Those that were not opened yet have no bytes.
                let opened = 1 + cut(3);
                for channels in [Some(2), None] {
                    let exit = received(&dir, channels, &parts[..opened]);
                    let lengths: Vec<usize> = parts[..opened].iter().map(|part| part.len()).collect();
                    assert_eq!(exit, Exit::Failed, "cut at {lengths:?}, channels: {channels:?}");
                }
            }
        });
    }

    #[test]
    fn a_destination_that_is_gone_has_one_status_whatever_the_byte() {
        time_limit(LIMIT, || {
            let dir = TempDir::new().unwrap();
            let socket = dir.join("d");
            for at in (0..150).step_by(3) {
                let listener = UnixListener::bind(&socket).unwrap();
                let exit = thread::scope(|scope| {
                    let destination = scope.spawn(|| {
                        let mut main = listener.accept().unwrap().0;
                        let mut channel = listener.accept().unwrap().0;
                        // All that comes before the two ends have agreed is less than that.
                        main.set_read_timeout(Some(Duration::from_millis(20))).unwrap();
                        let _ = main.read_exact(&mut vec![0; at]);
                        // Some of it was read: a reset, or none of it: an end.
                        let _ = channel.read(&mut [0; 100]).unwrap();
                    });
                    let connector = to(&socket).connector().unwrap();
                    let sent = Source::new(with_channels(1)).run(&mut guest(), &*connector, &mut ());
                    destination.join().unwrap();
                    Exit::from(&sent.unwrap_err())
                });
                assert_eq!(exit, Exit::Failed, "gone after byte {at}");
                fs::remove_file(&socket).unwrap();
            }
            // One that never was.
            fs::write(&socket, "").unwrap();
            let connector = to(&socket).connector().unwrap();
            let sent = Source::new(with_channels(1)).run(&mut guest(), &*connector, &mut ());
            assert_eq!(Exit::from(&sent.unwrap_err()), Exit::Failed);
        });
    }

    #[test]
    fn each_cause_has_its_status() {
        let no_convergence = Error::DoesNotConverge {
            rounds: 1,
            seconds: 1.0,
            remaining: 1,
            bytes_per_second: 1,
            expected_downtime_ms: 1.0,
            downtime_limit_ms: 1.0,
        };
        let not_resumed = Error::NotResumed { first: Box::new(Error::Cancelled), resume: "no".into() };
        for (error, exit) in [
            (Error::Cancelled, Exit::Cancelled),
            (not_resumed, Exit::Cancelled),
            (no_convergence, Exit::DoesNotConverge),
            (Error::Mismatch(Mismatch::TooMuchRam), Exit::Peer),
            (Error::Refused { status: 1, reason: None }, Exit::Failed),
            (Error::Unconfirmed, Exit::Failed),
            (Error::InDoubt { reason: Box::new(Error::Unconfirmed) }, Exit::InDoubt),
            (Error::Unacknowledged { reason: Box::new(Error::Unconfirmed) }, Exit::InDoubt),
            (Error::StateOnChannels { reason: Box::new(Error::Unconfirmed) }, Exit::InDoubt),
        ] {
            assert_eq!(Exit::from(&error), exit, "{error}");
        }
    }

    #[test]
    fn a_childs_status_is_read_back() {
        for code in 0..=7 {
            assert_eq!(Exit::from_code(code) as i32, code);
        }
        assert_eq!(Exit::from_code(101), Exit::Failed);
    }
}
