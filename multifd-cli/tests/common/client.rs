//! A client of a monitor that stays connected.

use std::{
    path::Path,
    thread,
    time::{Duration, Instant},
};

use serde_json::{Value, json};

use super::{LIMIT, answered, number};

/// A connection to a monitor that is made while there is a thread for it.
pub struct Client(multifd_qmp::Client);

impl Client {
    pub fn new(path: &Path) -> Client {
        let deadline = Instant::now() + LIMIT;
        loop {
            match multifd_qmp::Client::connect(path) {
                Ok(client) => return Client(client),
                Err(error) => assert!(Instant::now() < deadline, "{}: {error}", path.display()),
            }
            thread::sleep(Duration::from_millis(10));
        }
    }

    pub fn ask(&mut self, command: &str, arguments: Value) -> Value {
        self.try_ask(command, arguments).unwrap_or_else(|| panic!("no answer to {command}"))
    }

    /// The answer; `None` from a process that has ended, or is about to.
    pub fn try_ask(&mut self, command: &str, arguments: Value) -> Option<Value> {
        answered(self.0.execute(command, arguments))
    }

    pub fn status(&mut self) -> Value {
        self.ask("x-guest-status", json!({}))["return"].take()
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
