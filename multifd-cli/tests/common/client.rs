//! A client of a control socket that stays connected.

use std::{
    io::{BufRead, BufReader, Write},
    os::unix::net::UnixStream,
    path::Path,
    thread,
    time::{Duration, Instant},
};

use serde_json::{Value, json};

use super::{LIMIT, number};

/// A connection to a control socket that is made while there is a thread for it.
pub struct Client(BufReader<UnixStream>);

impl Client {
    pub fn new(path: &Path) -> Client {
        let deadline = Instant::now() + LIMIT;
        let stream = loop {
            match UnixStream::connect(path) {
                Ok(stream) => break stream,
                Err(error) => assert!(Instant::now() < deadline, "{}: {error}", path.display()),
            }
            thread::sleep(Duration::from_millis(10));
        };
        Client(BufReader::new(stream))
    }

    pub fn ask(&mut self, command: &Value) -> Value {
        self.try_ask(command).unwrap_or_else(|| panic!("no answer to {command}"))
    }

    /// The answer; `None` from a process that has ended, or is about to.
    pub fn try_ask(&mut self, command: &Value) -> Option<Value> {
        writeln!(self.0.get_mut(), "{command}").ok()?;
        let mut line = String::new();
        self.0.read_line(&mut line).ok()?;
        serde_json::from_str(&line).ok()
    }

    pub fn status(&mut self) -> Value {
        self.ask(&json!("status"))["return"].take()
    }

    /// The status, once no attempt is under way.
    pub fn settled(&mut self) -> Value {
        let deadline = Instant::now() + LIMIT;
        loop {
            let status = self.status();
            if status["state"] != "outgoing" {
                return status;
            }
            assert!(Instant::now() < deadline, "{status}");
            thread::sleep(Duration::from_millis(5));
        }
    }

    pub fn runs_on(&mut self) {
        let deadline = Instant::now() + LIMIT;
        let before = number(&self.status(), "/passes");
        loop {
            let status = self.status();
            assert_eq!((&status["state"], number(&status, "/guest-errors")), (&json!("running"), 0.0), "{status}");
            if number(&status, "/passes") > before + 1.0 {
                return;
            }
            assert!(Instant::now() < deadline, "{status}");
            thread::sleep(Duration::from_millis(5));
        }
    }
}
