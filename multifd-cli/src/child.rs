//! One of the processes of the demo: this same program, as `multifd guest`.
//!
//! It never outlives us: the kernel kills it when we end in whatever way. Its errors come with its report.

use std::{
    ffi::OsStr,
    io::{self, BufRead, BufReader, Read},
    process::{Child, ChildStderr, Command, Stdio},
};

use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;

use crate::{
    args::{TOKEN_VARIABLE, Token},
    exit::Exit,
    terminal, threads,
};

/// A running `multifd guest`.
pub struct GuestProcess {
    child: Child,
    /// It has ended and its id may belong to another process.
    ended: bool,
}

/// What a process left behind.
#[derive(Clone, Debug)]
pub struct Ending {
    /// Its exit status.
    pub exit: Exit,
    /// Its JSON report.
    pub report: Value,
    /// Why it failed, in its own words.
    pub error: Option<String>,
}

/// What a process says while it runs.
pub enum Said {
    /// It listens at this address.
    Listening(String),
    /// It has ended, or is about to: this is what it printed.
    Output(String),
}

impl GuestProcess {
    /// Starts one with `args`, and `token` in its environment. `said` is called from other threads with what it says. It shows its progress on our
    /// stderr; without `progress`, what it says there is passed on line by line, as far as it is not for us.
    ///
    /// # Errors
    /// The kernel's.
    pub fn start(
        args: impl IntoIterator<Item: AsRef<OsStr>>,
        token: Token,
        progress: bool,
        said: impl Fn(Said) + Clone + Send + 'static,
    ) -> io::Result<GuestProcess> {
        let failed = |error: io::Error| {
            io::Error::new(
                error.kind(),
                format!("cannot start this program again, for which /proc and /dev are needed: {error}"),
            )
        };
        let mut command = Command::new(std::env::current_exe().map_err(failed)?);
        command.args(["guest", "--json", "--child-of", &std::process::id().to_string()]).args(args);
        command.env(TOKEN_VARIABLE, token.reveal());
        command.stdin(Stdio::null()).stdout(Stdio::piped());
        command.stderr(if progress { Stdio::inherit() } else { Stdio::piped() });
        // Ends the child when a thread cannot be created.
        let mut process = GuestProcess { child: command.spawn().map_err(failed)?, ended: false };
        let mut stdout = process.child.stdout.take().expect("piped above");
        if let Some(stderr) = process.child.stderr.take() {
            let said = said.clone();
            threads::spawn("child stderr", move || pass_on(stderr, &said))?;
        }
        threads::spawn("child stdout", move || {
            let mut output = String::new();
            // What cannot be read is missing from the report, which is noticed.
            let _ = stdout.read_to_string(&mut output);
            said(Said::Output(output));
        })?;
        Ok(process)
    }

    /// Asks it to end.
    pub fn interrupt(&self) {
        if !self.ended
            && let Some(pid) = i32::try_from(self.child.id()).ok().and_then(Pid::from_raw)
        {
            // It may have ended by itself.
            let _ = kill_process(pid, Signal::TERM);
        }
    }

    /// Ends it.
    pub fn kill(&mut self) {
        // It may have ended by itself.
        let _ = self.child.kill();
    }

    /// Waits until it has ended after it printed `output`.
    ///
    /// # Errors
    /// The kernel's.
    pub fn ending(&mut self, output: &str) -> io::Result<Ending> {
        let status = self.child.wait()?;
        self.ended = true;
        let report: Value = serde_json::from_str(output).unwrap_or_default();
        let error = report.get("error").and_then(Value::as_str).map(str::to_owned);
        let exit = status.code().map_or(Exit::Failed, Exit::from_code);
        let error = match (error, report.is_object() && exit == Exit::Done) {
            (None, false) => Some(format!("ended without a report: {status}")),
            (error, _) => error,
        };
        Ok(Ending { exit, report, error })
    }
}

impl Drop for GuestProcess {
    fn drop(&mut self) {
        if !self.ended {
            self.kill();
            // Else it would stay as a zombie.
            let _ = self.child.wait();
        }
    }
}

/// Passes on what the process says, line by line, and tells where it listens.
fn pass_on(stderr: ChildStderr, said: &impl Fn(Said)) {
    for line in BufReader::new(stderr).lines().map_while(Result::ok) {
        match line.strip_prefix("listening on ") {
            Some(uri) => said(Said::Listening(uri.to_owned())),
            None => {
                terminal::say(&line);
            }
        }
    }
}
