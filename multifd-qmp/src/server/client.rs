//! One client of the server: its negotiation, its commands, and what it is told.

use std::{
    io::{self, Read},
    os::unix::net::UnixStream,
    sync::{
        Mutex,
        atomic::{AtomicBool, Ordering},
    },
};

use qapi_spec::ErrorClass;
use rustix::net::{SendFlags, send};
use serde_json::{Map, Value, json};

use super::{Arguments, CommandError, Shared, lock};
use crate::codec::{CodecError, Splitter};

/// A client that is connected.
pub(super) struct Connection {
    stream: UnixStream,
    /// The end of the negotiation: from here on it is told of events.
    is_ready: AtomicBool,
    /// Held while a message is written, so that messages do not mix.
    writing: Mutex<()>,
}

/// A command that can be run.
struct Request {
    command: String,
    arguments: Map<String, Value>,
    out_of_band: bool,
}

impl Connection {
    pub(super) fn new(stream: UnixStream) -> io::Result<Connection> {
        stream.set_nonblocking(false)?;
        Ok(Connection { stream, is_ready: AtomicBool::new(false), writing: Mutex::default() })
    }

    pub(super) fn is_ready(&self) -> bool {
        self.is_ready.load(Ordering::Acquire)
    }

    /// Sends an event, if the client has ended the negotiation.
    pub(super) fn tell(&self, message: &Value) {
        if self.is_ready() {
            self.write(message);
        }
    }

    /// Serves the client until it closes the connection, sends what is no message, or does not read.
    pub(super) fn run(&self, shared: &Shared) {
        let greeting = json!({ "QMP": { "version": version(shared), "capabilities": ["oob"] } });
        self.write(&greeting);
        let mut input = Splitter::new(LONGEST_COMMAND);
        let mut session = Session { shared, out_of_band: false, connection: self };
        let mut chunk = [0; 4096];
        loop {
            while let Some(value) = input.next_value() {
                match value {
                    Ok(message) => self.write(&session.answer(message)),
                    Err(CodecError::NotJson { text }) => self.write(&failure(&not_json(&text), None)),
                    Err(error @ CodecError::TooLong { .. }) => {
                        self.write(&failure(&CommandError::generic(error.to_string()), None));
                        return self.close();
                    }
                }
            }
            match (&self.stream).read(&mut chunk) {
                Ok(0) => return,
                Ok(count) => input.push(&chunk[..count]),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(_) => return,
            }
        }
    }

    /// Writes all of `message` at once, or closes the connection.
    fn write(&self, message: &Value) {
        let line = format!("{message}\r\n");
        let _alone = lock(&self.writing);
        match send(&self.stream, line.as_bytes(), SendFlags::DONTWAIT | SendFlags::NOSIGNAL) {
            Ok(written) if written == line.len() => {}
            // What it has not read fills the socket. A part of a message would be no message.
            _ => self.close(),
        }
    }

    fn close(&self) {
        // It may be closed already.
        let _ = self.stream.shutdown(std::net::Shutdown::Both);
    }
}

/// What the client has agreed to.
struct Session<'a> {
    shared: &'a Shared,
    out_of_band: bool,
    connection: &'a Connection,
}

impl Session<'_> {
    fn answer(&mut self, message: Value) -> Value {
        let Value::Object(mut message) = message else {
            return failure(&CommandError::generic("QMP input must be a JSON object"), None);
        };
        let id = message.remove("id");
        let answer = request(message, self.out_of_band).and_then(|request| self.execute(request));
        match answer {
            Ok(answer) => with_id(json!({ "return": answer }), id),
            Err(error) => failure(&error, id),
        }
    }

    fn execute(&mut self, request: Request) -> Result<Value, CommandError> {
        let Request { command, arguments, out_of_band } = request;
        let arguments = Arguments::new(arguments);
        match (command.as_str(), self.connection.is_ready()) {
            ("qmp_capabilities", false) => return self.negotiate(arguments),
            ("qmp_capabilities", true) => {
                let description = "Capabilities negotiation is already complete, command ignored".to_owned();
                return Err(CommandError { class: ErrorClass::CommandNotFound, description });
            }
            (_, false) => {
                let description = "Expecting capabilities negotiation with 'qmp_capabilities'".to_owned();
                return Err(CommandError { class: ErrorClass::CommandNotFound, description });
            }
            _ => {}
        }
        if out_of_band && !self.shared.handler.out_of_band().contains(&command.as_str()) {
            return Err(CommandError::generic(format!("The command {command} does not support OOB")));
        }
        match command.as_str() {
            "query-version" => arguments.end().map(|()| version(self.shared)),
            "query-commands" => {
                let own = ["qmp_capabilities", "query-commands", "query-version"];
                let all = own.iter().chain(self.shared.handler.commands()).map(|name| json!({ "name": name }));
                arguments.end().map(|()| all.collect())
            }
            command if self.shared.handler.commands().contains(&command) => {
                self.shared.handler.execute(command, arguments)
            }
            command => Err(CommandError::unknown(command)),
        }
    }

    fn negotiate(&mut self, mut arguments: Arguments) -> Result<Value, CommandError> {
        for capability in arguments.list("enable")?.unwrap_or_default() {
            match capability.as_str() {
                Some("oob") => self.out_of_band = true,
                _ => {
                    let capability = capability.to_string();
                    let description = format!("Parameter 'enable' does not accept value {capability}");
                    return Err(CommandError::generic(description));
                }
            }
        }
        arguments.end()?;
        self.connection.is_ready.store(true, Ordering::Release);
        Ok(json!({}))
    }
}

/// The command that `message` is, in QEMU's words if it is none.
fn request(mut message: Map<String, Value>, out_of_band: bool) -> Result<Request, CommandError> {
    let wrong = |member: &str, what: &str| Err(CommandError::generic(format!("QMP input member '{member}' {what}")));
    let is_known = |name: &str| matches!(name, "execute" | "arguments") || (out_of_band && name == "exec-oob");
    if let Some(name) = message.keys().find(|name| !is_known(name)) {
        return wrong(name, "is unexpected");
    }
    let (execute, exec_oob) = (message.remove("execute"), message.remove("exec-oob"));
    let (name, member, out_of_band) = match (execute, exec_oob) {
        (Some(name), None) => (name, "execute", false),
        (None, Some(name)) => (name, "exec-oob", true),
        (None, None) => return Err(CommandError::generic("QMP input lacks member 'execute'")),
        (Some(_), Some(_)) => return wrong("exec-oob", "clashes with 'execute'"),
    };
    let Value::String(command) = name else { return wrong(member, "must be a string") };
    let arguments = match message.remove("arguments") {
        None => Map::new(),
        Some(Value::Object(arguments)) => arguments,
        Some(_) => return wrong("arguments", "must be an object"),
    };
    Ok(Request { command, arguments, out_of_band })
}

fn version(shared: &Shared) -> Value {
    let version = shared.version;
    json!({
        "qemu": { "micro": version.micro, "minor": version.minor, "major": version.major },
        "package": shared.package,
    })
}

fn not_json(text: &str) -> CommandError {
    CommandError::generic(format!("JSON parse error, invalid keyword '{text}'"))
}

fn failure(error: &CommandError, id: Option<Value>) -> Value {
    let error = json!({ "class": error.class, "desc": error.description });
    with_id(json!({ "error": error }), id)
}

fn with_id(mut message: Value, id: Option<Value>) -> Value {
    if let (Some(id), Some(object)) = (id, message.as_object_mut()) {
        object.insert("id".to_owned(), id);
    }
    message
}

/// No command that we have is nearly as long.
const LONGEST_COMMAND: usize = 64 << 10;
