//! The side that gives commands: to a QEMU, or to another server of the protocol.

use std::{
    collections::VecDeque,
    fmt,
    io::{self, Read, Write},
    os::unix::net::UnixStream,
    path::Path,
    thread,
    time::{Duration, Instant},
};

use qapi_spec::Command;
use rustix::{
    io::Errno,
    net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, connect, socket_with},
};
use serde_json::{Map, Value, json};

use crate::{
    codec::{CodecError, Splitter},
    error::Error,
};

/// A QMP session after the negotiation of capabilities.
pub struct Client {
    stream: UnixStream,
    input: Splitter,
    /// The last [`MOST_EVENTS`], oldest first.
    events: VecDeque<Event>,
    limit: Duration,
    interrupted: Option<Interrupted>,
    version: Version,
    /// Which command the next one is. Its answer carries the number, so that the late answer to an earlier one is not
    /// taken for it.
    next_id: u64,
    out_of_band: bool,
}

/// Whether the caller wants a wait to end.
type Interrupted = Box<dyn Fn() -> bool + Send>;

/// Something the server tells unasked.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub struct Event {
    /// Its name, such as `STOP`.
    pub name: String,
    /// What belongs to it; `null` for nothing.
    pub data: Value,
    /// When it happened, by the server's clock; `null` where it does not say.
    pub timestamp: Value,
}

/// The version of a QEMU.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Default)]
#[non_exhaustive]
pub struct Version {
    /// The first number.
    pub major: u64,
    /// The second.
    pub minor: u64,
    /// The third.
    pub micro: u64,
}

impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}.{}", self.major, self.minor, self.micro)
    }
}

impl Client {
    /// How long an answer may take unless [`Client::set_limit`] says otherwise. The main loop of a busy QEMU on a busy
    /// machine can need seconds.
    pub const DEFAULT_LIMIT: Duration = Duration::from_secs(20);

    /// Connects to the socket at `path` and negotiates capabilities.
    ///
    /// # Errors
    /// [`Error::Connect`]; those of [`Client::negotiate`].
    pub fn connect(path: &Path) -> Result<Client, Error> {
        Client::builder().connect(path)
    }

    /// Reads the greeting on `stream` and enters command mode.
    ///
    /// # Errors
    /// [`Error::NoAnswer`], [`Error::Closed`], [`Error::Unexpected`] or [`Error::Codec`] where the other end is no QMP
    /// server, or serves another client.
    pub fn negotiate(stream: UnixStream) -> Result<Client, Error> {
        Client::builder().negotiate(stream)
    }

    /// A client that is not connected yet.
    pub fn builder() -> Builder {
        Builder { limit: Client::DEFAULT_LIMIT, interrupted: None, out_of_band: false }
    }

    /// Changes how long an answer may take.
    pub fn set_limit(&mut self, limit: Duration) {
        self.limit = limit;
    }

    /// Has every wait end with [`Error::Interrupted`] once `interrupted` is true; it is asked some times a second. The
    /// connection stays usable.
    pub fn set_interrupted(&mut self, interrupted: Option<Interrupted>) {
        self.interrupted = interrupted;
    }

    /// The version in the greeting.
    pub fn version(&self) -> Version {
        self.version
    }

    /// Runs `command` and returns its answer.
    ///
    /// # Errors
    /// Those of [`Client::execute`]; [`Error::Unexpected`] where the answer is not of its type.
    pub fn run<C: Command>(&mut self, command: C) -> Result<C::Ok, Error> {
        let arguments = serde_json::to_value(&command).map_err(|error| io_error(C::NAME, error.into()))?;
        let answer = self.execute(C::NAME, arguments)?;
        serde_json::from_value(answer.clone()).map_err(|_| unexpected(C::NAME, &answer))
    }

    /// Runs `command` and returns what the server puts into `return`.
    ///
    /// # Errors
    /// [`Error::Refused`] if the server refuses it, [`Error::NoAnswer`] if the answer does not come in time,
    /// [`Error::Closed`] if the server ended.
    pub fn execute(&mut self, command: &str, arguments: Value) -> Result<Value, Error> {
        self.ask("execute", command, arguments)
    }

    /// Runs `command` out of band, which a QEMU answers although its main loop is blocked. Only for the commands that allow
    /// it, on a client that was built with [`Builder::out_of_band`].
    ///
    /// # Errors
    /// Those of [`Client::execute`].
    pub fn execute_out_of_band(&mut self, command: &str, arguments: Value) -> Result<Value, Error> {
        self.ask("exec-oob", command, arguments)
    }

    /// Whether the server agreed to out-of-band commands.
    pub fn is_out_of_band(&self) -> bool {
        self.out_of_band
    }

    /// Takes the events that arrived so far, oldest first.
    pub fn take_events(&mut self) -> Vec<Event> {
        self.events.drain(..).collect()
    }

    /// Waits for the next event, at most for `limit`. Those that arrived earlier come first.
    ///
    /// # Errors
    /// [`Error::NoAnswer`] when `limit` is over; [`Error::Closed`] if the server ended.
    pub fn next_event(&mut self, limit: Duration) -> Result<Event, Error> {
        let deadline = Instant::now() + limit;
        loop {
            if let Some(event) = self.events.pop_front() {
                return Ok(event);
            }
            let message = self.read_message("event", deadline)?;
            if let Some(event) = Event::of(&message) {
                return Ok(event);
            }
        }
    }

    fn ask(&mut self, how: &str, command: &str, arguments: Value) -> Result<Value, Error> {
        let deadline = Instant::now() + self.limit;
        let id = self.next_id;
        self.next_id += 1;
        let mut line = json!({ how: command, "arguments": arguments, "id": id }).to_string();
        line.push('\n');
        self.write(command, line.as_bytes(), deadline)?;
        loop {
            let mut message = self.read_message(command, deadline)?;
            if let Some(event) = Event::of(&message) {
                if self.events.len() == MOST_EVENTS {
                    self.events.pop_front();
                }
                self.events.push_back(event);
                continue;
            }
            // A server that could not even read the command does not know its id.
            let answered = message.get("id").map(Value::as_u64);
            match answered {
                Some(Some(answered)) if answered < id => continue,
                // The answer to what was never asked, perhaps by another client: it says nothing of this command.
                Some(answered) if answered != Some(id) => return Err(unexpected(command, &message)),
                _ => {}
            }
            if let Some(answer) = message.get_mut("return") {
                return Ok(answer.take());
            }
            let refusal = message.get("error").filter(|error| error.get("desc").is_some_and(Value::is_string));
            let Some(error) = refusal else { return Err(unexpected(command, &message)) };
            let (class, description) = (text(error, "class"), text(error, "desc"));
            return Err(Error::Refused { command: command.to_owned(), class, description });
        }
    }

    /// Writes all of `bytes`; a server that does not read makes it wait.
    fn write(&mut self, command: &str, mut bytes: &[u8], deadline: Instant) -> Result<(), Error> {
        while !bytes.is_empty() {
            let slice = self.slice(command, deadline)?;
            self.stream.set_write_timeout(Some(slice)).map_err(|error| io_error(command, error))?;
            match self.stream.write(bytes) {
                Ok(written) => bytes = &bytes[written..],
                Err(error) if is_over(&error) => {}
                Err(error) => return Err(io_error(command, error)),
            }
        }
        Ok(())
    }

    fn read_message(&mut self, command: &str, deadline: Instant) -> Result<Value, Error> {
        loop {
            match self.input.next_value() {
                Some(Ok(value)) => return Ok(value),
                Some(Err(source)) => return Err(codec_error(command, source)),
                None => {}
            }
            let slice = self.slice(command, deadline)?;
            self.stream.set_read_timeout(Some(slice)).map_err(|error| io_error(command, error))?;
            let mut chunk = [0; 16 << 10];
            match self.stream.read(&mut chunk) {
                Ok(0) => return Err(Error::Closed { command: command.to_owned() }),
                Ok(count) => self.input.push(&chunk[..count]),
                Err(error) if is_over(&error) => {}
                Err(error) => return Err(io_error(command, error)),
            }
        }
    }

    /// How long to wait before looking again whether the wait is over.
    fn slice(&self, command: &str, deadline: Instant) -> Result<Duration, Error> {
        if self.interrupted.as_ref().is_some_and(|interrupted| interrupted()) {
            return Err(Error::Interrupted { command: command.to_owned() });
        }
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(Error::NoAnswer { command: command.to_owned(), limit: self.limit });
        }
        Ok(left.min(SLICE))
    }
}

impl fmt::Debug for Client {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Client").field("version", &self.version).field("limit", &self.limit).finish_non_exhaustive()
    }
}

/// How to connect.
pub struct Builder {
    limit: Duration,
    interrupted: Option<Interrupted>,
    out_of_band: bool,
}

impl Builder {
    /// As [`Client::set_limit`]; the greeting counts as an answer.
    #[must_use]
    pub fn limit(mut self, limit: Duration) -> Builder {
        self.limit = limit;
        self
    }

    /// As [`Client::set_interrupted`].
    #[must_use]
    pub fn interrupted(mut self, interrupted: impl Fn() -> bool + Send + 'static) -> Builder {
        self.interrupted = Some(Box::new(interrupted));
        self
    }

    /// Agrees on out-of-band commands where the server has them.
    #[must_use]
    pub fn out_of_band(mut self) -> Builder {
        self.out_of_band = true;
        self
    }

    /// Connects to the socket at `path` and negotiates capabilities.
    ///
    /// # Errors
    /// [`Error::Connect`]; those of [`Client::negotiate`].
    pub fn connect(self, path: &Path) -> Result<Client, Error> {
        let stream = self.open(path)?;
        self.negotiate(stream)
    }

    /// Reads the greeting on `stream` and enters command mode.
    ///
    /// # Errors
    /// Those of [`Client::negotiate`].
    pub fn negotiate(self, stream: UnixStream) -> Result<Client, Error> {
        let Builder { limit, interrupted, out_of_band } = self;
        let input = Splitter::new(LONGEST_MESSAGE);
        let (events, version) = (VecDeque::new(), Version::default());
        let mut client = Client { stream, input, events, limit, interrupted, version, next_id: 0, out_of_band: false };
        let greeting = client.read_message("greeting", Instant::now() + limit)?;
        let Some(offered) = greeting.get("QMP") else { return Err(unexpected("greeting", &greeting)) };
        client.version = Version::of(offered);
        let has = offered["capabilities"].as_array().is_some_and(|all| all.iter().any(|name| name == "oob"));
        client.out_of_band = has && out_of_band;
        let enable = if client.out_of_band { json!({ "enable": ["oob"] }) } else { json!({}) };
        client.execute("qmp_capabilities", enable)?;
        Ok(client)
    }

    /// The kernel waits without a limit where the listener's queue is full, so this one does not let it.
    fn open(&self, path: &Path) -> Result<UnixStream, Error> {
        let failed = |error: Errno| Error::Connect { path: path.to_owned(), source: error.into() };
        let address = SocketAddrUnix::new(path).map_err(failed)?;
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let socket = socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None).map_err(failed)?;
        let deadline = Instant::now() + self.limit;
        loop {
            match connect(&socket, &address) {
                Ok(()) => break,
                Err(Errno::AGAIN | Errno::INTR) if Instant::now() < deadline => {}
                Err(error) => return Err(failed(error)),
            }
            if self.interrupted.as_ref().is_some_and(|interrupted| interrupted()) {
                return Err(Error::Interrupted { command: "greeting".to_owned() });
            }
            thread::sleep(RETRY);
        }
        let stream = UnixStream::from(socket);
        stream.set_nonblocking(false).map_err(|error| io_error("greeting", error))?;
        Ok(stream)
    }
}

impl Event {
    /// The event that `message` is, if it is one.
    fn of(message: &Value) -> Option<Event> {
        let name = message.get("event")?.as_str()?.to_owned();
        let field = |name: &str| message.get(name).cloned().unwrap_or_default();
        Some(Event { name, data: field("data"), timestamp: field("timestamp") })
    }
}

impl Version {
    /// The version with these numbers.
    pub const fn new(major: u64, minor: u64, micro: u64) -> Version {
        Version { major, minor, micro }
    }

    /// The numbers in a greeting; 0 where they are missing.
    fn of(greeting: &Value) -> Version {
        let number = |name: &str| greeting["version"]["qemu"][name].as_u64().unwrap_or_default();
        Version { major: number("major"), minor: number("minor"), micro: number("micro") }
    }
}

fn is_over(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut | io::ErrorKind::Interrupted)
}

fn io_error(command: &str, source: io::Error) -> Error {
    let command = command.to_owned();
    match source.kind() {
        io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset => Error::Closed { command },
        _ => Error::Io { command, source },
    }
}

fn codec_error(command: &str, source: CodecError) -> Error {
    Error::Codec { command: command.to_owned(), source }
}

pub(crate) fn text(value: &Value, key: &str) -> String {
    value.get(key).and_then(Value::as_str).unwrap_or_default().to_owned()
}

fn unexpected(command: &str, message: &Value) -> Error {
    let message: String = message.to_string().chars().take(SHOWN).collect();
    Error::Unexpected { command: command.to_owned(), message }
}

/// No arguments.
pub(crate) fn nothing() -> Value {
    Value::Object(Map::new())
}

/// The longest message that is read. The longest that a QEMU has, its schema, has some hundred KiB.
const LONGEST_MESSAGE: usize = 4 << 20;
/// How many events are kept for [`Client::take_events`].
const MOST_EVENTS: usize = 1024;
/// How much of a message an error shows.
const SHOWN: usize = 200;
/// How long a wait goes on before the caller is asked whether it is to end.
const SLICE: Duration = Duration::from_millis(50);
/// Between two attempts to connect to a socket whose queue is full.
const RETRY: Duration = Duration::from_millis(20);

#[cfg(test)]
pub(crate) mod tests {
    use std::{
        collections::VecDeque,
        io::{BufRead, BufReader},
        os::unix::net::UnixListener,
        sync::{
            Arc,
            atomic::{AtomicBool, Ordering},
        },
        thread::JoinHandle,
    };

    use test_support::{TempDir, time_limit};

    use super::*;

    pub(crate) const GREETING: &str = r#"{"QMP": {"version": {}, "capabilities": []}}"#;
    pub(crate) const DONE: &str = r#"{"return": {}}"#;
    const LIMIT: Duration = Duration::from_secs(60);

    /// A peer that sends `first`, then one of `answers` (any number of lines) for each line it receives, and keeps
    /// the connection open until the other side closes it. Returns the lines it received.
    pub(crate) fn peer(first: &str, answers: &[&str]) -> (UnixStream, JoinHandle<Vec<String>>) {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        let first = first.to_owned();
        let mut answers: VecDeque<String> = answers.iter().map(|&answer| answer.to_owned()).collect();
        let thread = thread::spawn(move || {
            // In one write: the client closes the connection once it has read the answer.
            theirs.write_all(format!("{first}\r\n").as_bytes()).unwrap();
            let mut received = Vec::new();
            for line in BufReader::new(theirs.try_clone().unwrap()).lines() {
                received.push(line.unwrap());
                if let Some(answer) = answers.pop_front() {
                    theirs.write_all(format!("{answer}\r\n").as_bytes()).unwrap();
                }
            }
            received
        });
        (ours, thread)
    }

    #[test]
    fn events_before_an_answer_are_kept() {
        let answer = "{\"event\": \"STOP\"}\r\n{\"return\": {\"status\": \"paused\"}}";
        let (stream, peer) = peer(GREETING, &[DONE, answer]);
        let mut client = Client::negotiate(stream).unwrap();
        assert_eq!(client.execute("query-status", nothing()).unwrap(), json!({ "status": "paused" }));
        let events = client.take_events();
        assert_eq!(events.iter().map(|event| &event.name).collect::<Vec<_>>(), ["STOP"]);
        drop(client);
        let received = peer.join().unwrap();
        let second: Value = serde_json::from_str(&received[1]).unwrap();
        assert_eq!(second, json!({ "execute": "query-status", "arguments": {}, "id": 1 }));
    }

    #[test]
    fn a_typed_command_has_a_typed_answer() {
        let answer = r#"{"return": {"status": "running", "running": true, "later": 1}}"#;
        let (stream, _peer) = peer(GREETING, &[DONE, answer, r#"{"return": {"status": 3}}"#]);
        let mut client = Client::negotiate(stream).unwrap();
        assert!(client.run(qapi_qmp::query_status {}).unwrap().running);
        assert!(matches!(client.run(qapi_qmp::query_status {}), Err(Error::Unexpected { .. })));
    }

    #[test]
    fn the_version_and_the_capability_of_the_greeting_are_read() {
        let greeting = r#"{"QMP": {"version": {"qemu": {"micro": 2, "minor": 0, "major": 10}, "package": ""},
            "capabilities": ["oob"]}}"#;
        let (stream, peer) = peer(greeting, &[DONE, DONE]);
        let mut client = Client::builder().out_of_band().negotiate(stream).unwrap();
        assert_eq!((client.version(), client.is_out_of_band()), (Version::new(10, 0, 2), true));
        client.execute_out_of_band("migrate-pause", nothing()).unwrap();
        drop(client);
        let received: Vec<Value> =
            peer.join().unwrap().iter().map(|line| serde_json::from_str(line).unwrap()).collect();
        assert_eq!(received[0]["arguments"], json!({ "enable": ["oob"] }));
        assert_eq!(received[1]["exec-oob"], "migrate-pause");
    }

    /// It was taken for the answer to the command after it.
    #[test]
    fn the_late_answer_to_an_earlier_command_is_not_taken_for_this_one() {
        let answers = r#"{"return": {"which": "first"}, "id": 1}
            {"return": {"which": "second"}, "id": 2}"#;
        let (stream, _peer) = peer(GREETING, &[DONE, "", answers]);
        let mut client = Client::negotiate(stream).unwrap();
        client.set_limit(Duration::from_millis(50));
        assert!(matches!(client.execute("first", nothing()), Err(Error::NoAnswer { .. })));
        client.set_limit(LIMIT);
        assert_eq!(client.execute("second", nothing()).unwrap(), json!({ "which": "second" }));
    }

    /// An answer to another question was taken for this one's, and an error without words for a refusal without a reason.
    #[test]
    fn an_answer_to_what_was_not_asked_and_an_error_without_words_are_no_answers() {
        for answer in [
            r#"{"return": {}, "id": 2}"#,
            r#"{"return": {}, "id": "1"}"#,
            r#"{"error": {"class": "GenericError", "desc": "no"}, "id": null}"#,
            r#"{"error": 5, "id": 1}"#,
            r#"{"error": {"class": "GenericError"}, "id": 1}"#,
        ] {
            let (stream, _peer) = peer(GREETING, &[DONE, answer]);
            let mut client = Client::negotiate(stream).unwrap();
            let error = client.execute("stop", nothing()).unwrap_err();
            assert!(
                error.is_protocol() && error.to_string().contains("stop: unexpected QMP message"),
                "{answer}: {error}"
            );
        }
    }

    #[test]
    fn a_server_that_says_nothing_is_given_up_in_time() {
        let (stream, _peer) = peer(GREETING, &[DONE]);
        let mut client = Client::negotiate(stream).unwrap();
        client.set_limit(Duration::from_millis(50));
        assert!(matches!(client.stop(), Err(Error::NoAnswer { .. })));
    }

    #[test]
    fn a_server_that_trickles_bytes_is_given_up_in_time() {
        let (stream, mut theirs) = UnixStream::pair().unwrap();
        let trickle = thread::spawn(move || {
            while theirs.write_all(b" ").is_ok() {
                thread::sleep(Duration::from_millis(5));
            }
        });
        let error = Client::builder().limit(Duration::from_millis(100)).negotiate(stream).unwrap_err();
        assert!(matches!(error, Error::NoAnswer { .. }), "{error}");
        trickle.join().unwrap();
    }

    #[test]
    fn a_server_that_does_not_read_is_given_up_in_time() {
        time_limit(LIMIT, || {
            let (stream, mut theirs) = UnixStream::pair().unwrap();
            theirs.write_all(format!("{GREETING}\n{DONE}\n").as_bytes()).unwrap();
            let mut client = Client::negotiate(stream).unwrap();
            client.set_limit(Duration::from_millis(100));
            let long = json!({ "text": "x".repeat(1 << 20) });
            assert!(matches!(client.execute("long", long), Err(Error::NoAnswer { .. })));
            drop(theirs);
        });
    }

    /// The kernel lets it wait forever.
    #[test]
    fn a_listener_whose_queue_is_full_is_given_up_in_time() {
        time_limit(LIMIT, || {
            let dir = TempDir::new().unwrap();
            let path = dir.join("qmp");
            let listener = UnixListener::bind(&path).unwrap();
            rustix::net::listen(&listener, 0).unwrap();
            let _first = UnixStream::connect(&path).unwrap();
            let error = Client::builder().limit(Duration::from_millis(100)).connect(&path).unwrap_err();
            assert!(matches!(error, Error::Connect { .. }), "{error}");
        });
    }

    #[test]
    fn the_caller_ends_a_wait() {
        time_limit(LIMIT, || {
            let (stream, _peer) = peer(GREETING, &[DONE, "", DONE]);
            let mut client = Client::negotiate(stream).unwrap();
            let interrupted = Arc::new(AtomicBool::new(false));
            let seen = interrupted.clone();
            client.set_interrupted(Some(Box::new(move || seen.load(Ordering::Relaxed))));
            let interrupt = thread::spawn(move || {
                thread::sleep(Duration::from_millis(100));
                interrupted.store(true, Ordering::Relaxed);
            });
            assert!(matches!(client.stop(), Err(Error::Interrupted { .. })));
            interrupt.join().unwrap();
            client.set_interrupted(None);
            client.cont().unwrap();
        });
    }

    #[test]
    fn what_is_not_qmp_is_refused() {
        for other in ["SSH-2.0-OpenSSH_9.6", "HTTP/1.1 400 Bad Request", "{\"hello\": 1}", "[1]", "{}"] {
            let (stream, _peer) = peer(other, &[]);
            let error = Client::negotiate(stream).unwrap_err();
            assert!(error.is_protocol(), "{other}: {error}");
        }
        // And in the middle.
        let (stream, _peer) = peer(GREETING, &[DONE, "\u{1b}[31mnonsense", "{\"neither\": 1}"]);
        let mut client = Client::negotiate(stream).unwrap();
        assert!(client.stop().unwrap_err().is_protocol());
        assert!(client.stop().unwrap_err().is_protocol());
    }

    #[test]
    fn a_message_without_an_end_is_bounded() {
        time_limit(LIMIT, || {
            let (stream, mut theirs) = UnixStream::pair().unwrap();
            let endless = thread::spawn(move || {
                theirs.write_all(b"{\"QMP\": \"").unwrap();
                while theirs.write_all(&[b'x'; 4096]).is_ok() {}
            });
            let error = Client::negotiate(stream).unwrap_err();
            assert!(matches!(error, Error::Codec { source: CodecError::TooLong { .. }, .. }), "{error}");
            endless.join().unwrap();
        });
    }

    #[test]
    fn a_flood_of_events_is_bounded() {
        time_limit(LIMIT, || {
            let (stream, mut theirs) = UnixStream::pair().unwrap();
            let flood = thread::spawn(move || {
                theirs.write_all(format!("{GREETING}\n").as_bytes()).unwrap();
                for number in 0..3000 {
                    theirs.write_all(format!("{{\"event\": \"E\", \"data\": {number}}}\n").as_bytes()).unwrap();
                }
                theirs.write_all(format!("{DONE}\n").as_bytes()).unwrap();
                theirs
            });
            let mut client = Client::negotiate(stream).unwrap();
            let events = client.take_events();
            assert_eq!((events.len(), &events[0].data), (MOST_EVENTS, &json!(3000 - MOST_EVENTS)));
            drop(flood.join().unwrap());
        });
    }

    #[test]
    fn a_closed_connection_is_an_error_except_for_quit() {
        let (stream, peer) = peer(GREETING, &[DONE]);
        let mut client = Client::negotiate(stream).unwrap();
        client.stream.shutdown(std::net::Shutdown::Both).unwrap();
        assert!(matches!(client.stop(), Err(Error::Closed { .. })));
        client.quit().unwrap();
        peer.join().unwrap();
    }
}
