//! What is kept of each client for the page about the server (`--report`).

use std::{collections::VecDeque, path::Path, sync::Mutex};

use serde_json::{Map, Value};

use crate::{exit::Exit, html, progress::lock, report::Outcome};

/// The reports of clients: the first and the last of many.
#[derive(Default)]
pub struct Account(Mutex<Kept>);

#[derive(Default)]
struct Kept {
    first: Vec<Value>,
    last: VecDeque<Value>,
    all: u64,
}

impl Account {
    /// Keeps what `outcome` says.
    pub fn keep(&self, outcome: &Outcome) {
        let mut kept = lock(&self.0);
        kept.all += 1;
        if kept.first.len() < KEPT {
            return kept.first.push(outcome.json());
        }
        if kept.last.len() == KEPT {
            kept.last.pop_front();
        }
        kept.last.push_back(outcome.json());
    }

    /// Writes the page to `path`. The server ended as `exit` and `summary` say.
    ///
    /// # Errors
    /// The kernel's.
    pub fn write(&self, path: &Path, exit: Exit, summary: &str, error: Option<&str>) -> std::io::Result<()> {
        let mut kept = lock(&self.0);
        let left_out = kept.all - (kept.first.len() + kept.last.len()) as u64;
        let mut clients = std::mem::take(&mut kept.first);
        clients.extend(std::mem::take(&mut kept.last));
        let mut report = Map::new();
        report.insert("summary".to_owned(), summary.into());
        report.insert("clients".to_owned(), clients.into());
        report.insert("clients-left-out".to_owned(), left_out.into());
        let error = error.map(str::to_owned);
        html::write(path, "serve", &Outcome { exit, error, report, text: String::new() })
    }
}

/// How many at either end.
const KEPT: usize = 500;
