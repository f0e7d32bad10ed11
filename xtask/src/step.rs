//! Runs the steps of a verb one after the other, each with a time limit, and keeps account of them.
//!
//! A failing step does not stop the next one: one run shows everything that is wrong.

use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::mpsc;
use std::time::{Duration, Instant};
use std::{fs, io, thread};

/// What became of a step.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Outcome {
    /// It did what it should.
    Passed,
    /// It found something wrong, in words.
    Failed(String),
    /// It cannot run here, and why.
    Skipped(String),
}

/// The steps so far.
#[derive(Debug, Default)]
pub struct Steps {
    done: Vec<(String, Outcome, Duration)>,
}

impl Steps {
    /// Runs `step` under the name `name`.
    pub fn run(&mut self, name: &str, step: impl FnOnce() -> Outcome) {
        println!("\n=== {name}");
        let started = Instant::now();
        let outcome = step();
        if let Outcome::Failed(reason) | Outcome::Skipped(reason) = &outcome {
            println!("{name}: {reason}");
        }
        self.done.push((name.to_owned(), outcome, started.elapsed()));
    }

    /// No step failed.
    pub fn all_passed(&self) -> bool {
        !self.done.iter().any(|(_, outcome, _)| matches!(outcome, Outcome::Failed(_)))
    }

    /// One line per step: its outcome, how long it took, its name, and the reason if it did not pass.
    pub fn table(&self) -> String {
        let mut table = String::new();
        for (name, outcome, time) in &self.done {
            let (word, reason) = match outcome {
                Outcome::Passed => ("ok", ""),
                Outcome::Failed(reason) => ("FAILED", reason.as_str()),
                Outcome::Skipped(reason) => ("skipped", reason.as_str()),
            };
            let line = format!("{word:<8} {:>7.1} s  {name:<16} {reason}", time.as_secs_f64());
            table.push_str(line.trim_end());
            table.push('\n');
        }
        table
    }
}

/// Runs `command` with the terminal as its output; it fails if the command does, or when `limit` is over.
pub fn command(command: &mut Command, limit: Duration) -> Outcome {
    command_with_lines(command, limit, |_| ())
}

/// As [`command`], and shows each line of its standard output to `observe` before it is printed.
pub fn command_with_lines(command: &mut Command, limit: Duration, mut observe: impl FnMut(&str)) -> Outcome {
    let text = describe(command);
    println!("+ {text}");
    let mut child = match command.stdin(Stdio::null()).stdout(Stdio::piped()).spawn() {
        Ok(child) => child,
        Err(error) => return Outcome::Failed(format!("{text}: {error}")),
    };
    let output = child.stdout.take().expect("stdout is piped");
    let (lines, received) = mpsc::channel::<String>();
    thread::spawn(move || {
        let mut output = BufReader::new(output);
        let mut line = Vec::new();
        // Tests may print anything, so no line is refused for not being UTF-8.
        while output.read_until(b'\n', &mut line).is_ok_and(|count| count > 0) {
            if lines.send(String::from_utf8_lossy(&line).into_owned()).is_err() {
                return;
            }
            line.clear();
        }
    });
    let deadline = Instant::now() + limit;
    loop {
        match received.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
            Ok(line) => {
                observe(line.trim_end());
                print!("{line}");
                // A closed terminal is no reason to stop.
                let _ = io::stdout().flush();
            }
            Err(mpsc::RecvTimeoutError::Disconnected) => return end_of(child, &text, deadline),
            Err(mpsc::RecvTimeoutError::Timeout) => return too_late(child, &text, limit),
        }
    }
}

/// The command as one would type it, without where the program is.
fn describe(command: &Command) -> String {
    let program = Path::new(command.get_program()).file_name().unwrap_or_default();
    let words = std::iter::once(program).chain(command.get_args());
    words.map(|word| word.to_string_lossy()).collect::<Vec<_>>().join(" ")
}

fn end_of(mut child: Child, text: &str, deadline: Instant) -> Outcome {
    loop {
        match child.try_wait() {
            Ok(Some(status)) if status.success() => return Outcome::Passed,
            Ok(Some(status)) => return Outcome::Failed(format!("{text}: {status}")),
            Ok(None) if Instant::now() >= deadline => return too_late(child, text, Duration::ZERO),
            // Its output has ended, so it ends in a moment.
            Ok(None) => thread::sleep(Duration::from_millis(5)),
            Err(error) => return Outcome::Failed(format!("{text}: {error}")),
        }
    }
}

fn too_late(mut child: Child, text: &str, limit: Duration) -> Outcome {
    end(&mut child);
    Outcome::Failed(format!("{text}: not finished after {limit:?}, killed"))
}

/// Kills `child` with all that it started.
pub fn end(child: &mut Child) {
    // cargo does not end its test programs when it is killed itself.
    let doomed = descendants(child.id());
    // The shell's own `kill`: a small system has no program of that name.
    let kill = ["-c", "kill -9 \"$@\"", "sh"];
    let _ = Command::new("sh").args(kill).args(doomed.iter().map(u32::to_string)).status();
    let _ = child.kill();
    let _ = child.wait();
}

/// The processes below `ancestor`.
fn descendants(ancestor: u32) -> Vec<u32> {
    let mut parents = Vec::new();
    for entry in fs::read_dir("/proc").into_iter().flatten().flatten() {
        let Some(pid) = entry.file_name().to_str().and_then(|name| name.parse::<u32>().ok()) else { continue };
        let stat = fs::read_to_string(entry.path().join("stat")).unwrap_or_default();
        // The name before it is in parentheses and may hold spaces: `pid (name) state parent …`.
        let parent = stat.rsplit_once(')').and_then(|(_, rest)| rest.split_whitespace().nth(1)?.parse().ok());
        parents.extend(parent.map(|parent: u32| (pid, parent)));
    }
    let mut found = vec![ancestor];
    let mut next = 0;
    while let Some(&process) = found.get(next) {
        found.extend(parents.iter().filter(|(_, parent)| *parent == process).map(|(pid, _)| *pid));
        next += 1;
    }
    found.split_off(1)
}

#[cfg(test)]
pub mod tests {
    use super::*;

    pub const LONG: Duration = Duration::from_secs(60);

    pub fn shell(script: &str) -> Command {
        let mut command = Command::new("sh");
        command.args(["-c", script]);
        command
    }

    #[test]
    fn a_command_passes_or_fails_by_its_status() {
        assert_eq!(command(&mut shell("exit 0"), LONG), Outcome::Passed);
        assert!(matches!(command(&mut shell("exit 3"), LONG), Outcome::Failed(_)));
        assert!(matches!(command(&mut Command::new("/no/such/program"), LONG), Outcome::Failed(_)));
    }

    #[test]
    fn each_line_is_observed() {
        let mut seen = Vec::new();
        let outcome = command_with_lines(&mut shell("echo one; echo two"), LONG, |line| seen.push(line.to_owned()));
        assert_eq!((outcome, seen), (Outcome::Passed, vec!["one".to_owned(), "two".to_owned()]));
    }

    #[test]
    fn a_command_that_hangs_is_killed_with_its_children() {
        let mut pid = String::new();
        let started = Instant::now();
        let mut hanging = shell("sleep 1000 & echo $!; wait");
        let outcome = command_with_lines(&mut hanging, Duration::from_millis(300), |line| line.clone_into(&mut pid));
        assert!(matches!(outcome, Outcome::Failed(reason) if reason.contains("killed")));
        assert!(started.elapsed() < LONG);
        // On a busy machine a process that was killed takes a moment to go.
        let gone = || {
            let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
            stat.is_empty() || stat.contains(" Z ")
        };
        while !gone() {
            assert!(started.elapsed() < LONG, "process {pid} lives on");
            thread::sleep(Duration::from_millis(5));
        }
    }

    #[test]
    fn one_failed_step_fails_the_run() {
        let mut steps = Steps::default();
        steps.run("first", || Outcome::Passed);
        steps.run("second", || Outcome::Skipped("no such tool".into()));
        assert!(steps.all_passed());
        steps.run("third", || Outcome::Failed("wrong".into()));
        assert!(!steps.all_passed());
        assert_eq!(steps.table().lines().count(), 3);
        assert!(steps.table().contains("FAILED") && steps.table().contains("no such tool"));
    }
}
