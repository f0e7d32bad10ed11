//! The bytes of the hello that QEMU does not use, which our own ends fill.

use std::{
    io::{self, Read, Write},
    net::Shutdown,
    os::unix::net::{UnixListener, UnixStream},
    path::{Path, PathBuf},
    sync::mpsc::{self, Receiver, Sender},
    thread,
};

use multifd::multifd_proto::packet::{HELLO_LEN, MAGIC};
use qemu_peer::{Installed, Qemu, Version};
use test_support::{TempDir, report, time_limit};

use crate::harness::{LIMIT, Multifd, Settings, TEST_LIMIT, assert_goes_on, listen, migrate_away, receive_uri, vm};

/// The first byte behind the channel's id.
const UNUSED: usize = 25;
const CHANNELS: u8 = 3;

/// Every version has to ignore them: they carry the number of channels and a token between our own ends, and a source cannot
/// know that its destination is a QEMU.
#[test]
fn qemu_ignores_and_does_not_fill_the_unused_bytes_of_a_hello() {
    for (version, machine) in
        [(Version::V7_2, "pc-i440fx-7.2"), (Version::V10_0, "pc-i440fx-10.0"), (Version::V11_1, "pc-q35-11.1")]
    {
        let Some(installed) = Installed::require(version) else { continue };
        time_limit(TEST_LIMIT, || {
            let settings = Settings { channels: CHANNELS, ..Settings::default() };
            let start = |incoming| {
                let builder = vm(&installed, machine);
                let mut qemu = if incoming { builder.incoming() } else { builder }.start().unwrap();
                settings.apply(&mut qemu);
                qemu
            };
            let (mut source, mut destination): (Qemu, Qemu) = (start(false), start(true));
            source.wait_passes(3, LIMIT).unwrap();
            let uri = listen(&mut destination, false);
            let path = source.path("proxy");
            let hellos = proxy(&path, uri.strip_prefix("unix:").unwrap().into());
            migrate_away(&mut source, &format!("unix:{}", path.display()));
            assert_goes_on(&source, &mut destination);
            let hellos: Vec<_> = hellos.try_iter().collect();
            assert_eq!(hellos.len(), usize::from(CHANNELS));
            assert!(hellos.iter().all(|hello| hello[UNUSED..] == [0; HELLO_LEN - UNUSED]), "{hellos:02x?}");
        });
        report("hello", &format!("{:4} ignores bytes {UNUSED} to {} of a hello: ok", version.name(), HELLO_LEN - 1));
    }
}

/// Our source always says the number of its channels, also to a QEMU, which goes on.
#[test]
fn qemu_takes_a_hello_of_ours_with_the_number_of_channels() {
    for (version, machine) in
        [(Version::V7_2, "pc-i440fx-7.2"), (Version::V10_0, "pc-i440fx-10.0"), (Version::V11_1, "pc-q35-11.1")]
    {
        let Some(installed) = Installed::require(version) else { continue };
        time_limit(TEST_LIMIT, || {
            let dir = TempDir::new().unwrap();
            let settings = Settings { channels: CHANNELS, ..Settings::default() };
            let mut source = vm(&installed, machine).start().unwrap();
            settings.apply(&mut source);
            source.wait_passes(3, LIMIT).unwrap();
            let file = dir.join("checkpoint");
            let (receive, uri) = Multifd::receive(&receive_uri(dir.path(), false), &file, &[]);
            migrate_away(&mut source, &uri);
            receive.done();

            let mut destination = vm(&installed, machine).incoming().start().unwrap();
            settings.apply(&mut destination);
            let uri = listen(&mut destination, false);
            let path = dir.join("proxy");
            let hellos = proxy(&path, uri.strip_prefix("unix:").unwrap().into());
            let [channels, compression] = settings.args();
            let (file, uri) = (file.display().to_string(), format!("unix:{}", path.display()));
            Multifd::start(["send", &file, &uri, &channels, &compression]).done();
            assert_goes_on(&source, &mut destination);
            let hellos: Vec<_> = hellos.try_iter().collect();
            assert_eq!(hellos.len(), usize::from(CHANNELS));
            assert!(hellos.iter().all(|hello| hello[UNUSED] == CHANNELS), "{hellos:02x?}");
        });
        report("hello", &format!("{:4} takes a hello with the number of channels: ok", version.name()));
    }
}

type HelloBytes = [u8; HELLO_LEN];

/// Passes all connections on from the socket `from` to `to`. Fills the unused bytes of each hello, and returns the hellos as
/// they were. Its threads end with the connections, and the first one with the test process.
fn proxy(from: &Path, to: PathBuf) -> Receiver<HelloBytes> {
    let listener = UnixListener::bind(from).unwrap();
    let (hellos, seen) = mpsc::channel();
    thread::spawn(move || {
        for stream in listener.incoming() {
            let Ok(stream) = stream else { return };
            // At once: QEMU 7.2 takes the first connection for main.
            let Ok(onward) = UnixStream::connect(&to) else { return };
            let hellos = hellos.clone();
            thread::spawn(move || pass_on(stream, onward, &hellos));
        }
    });
    seen
}

fn pass_on(mut from: UnixStream, mut to: UnixStream, hellos: &Sender<HelloBytes>) -> io::Result<()> {
    let mut magic = [0; 4];
    from.read_exact(&mut magic)?;
    if magic == MAGIC.to_be_bytes() {
        let mut hello = [0; HELLO_LEN];
        hello[..magic.len()].copy_from_slice(&magic);
        from.read_exact(&mut hello[magic.len()..])?;
        // The test may have ended.
        let _ = hellos.send(hello);
        hello[UNUSED] = CHANNELS;
        for (index, byte) in hello[UNUSED + 1..].iter_mut().enumerate() {
            *byte = 0x80 | index as u8;
        }
        to.write_all(&hello)?;
    } else {
        to.write_all(&magic)?;
    }
    let (mut back, mut answers) = (to.try_clone()?, from.try_clone()?);
    thread::spawn(move || {
        let _ = io::copy(&mut back, &mut answers);
        let _ = answers.shutdown(Shutdown::Write);
    });
    io::copy(&mut from, &mut to)?;
    to.shutdown(Shutdown::Write)
}
