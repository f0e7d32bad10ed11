//! The union of several dirty logs: what the CPUs wrote, and what the devices wrote.
//!
//! A hypervisor's log sees the guest's CPUs only; a device model that runs in the host process writes past it and marks
//! its pages itself. A page is dirty if any log says so.

use std::io;

use crate::{dirty::DirtyLog, dirty_bitmap::DirtyBitmap, ram::Ram};

/// Reports what any of its logs reports.
///
/// It is `Send`, as its logs are, unless it is [`local`](MergedLog::local).
pub struct MergedLog<L: DirtyLog + ?Sized = dyn DirtyLog + Send> {
    logs: Vec<Box<L>>,
}

impl MergedLog {
    /// Puts `logs` together.
    pub fn new(logs: Vec<Box<dyn DirtyLog + Send>>) -> MergedLog {
        MergedLog { logs }
    }
}

impl MergedLog<dyn DirtyLog> {
    /// Puts `logs` together that stay in this thread.
    pub fn local(logs: Vec<Box<dyn DirtyLog>>) -> MergedLog<dyn DirtyLog> {
        MergedLog { logs }
    }
}

impl<L: DirtyLog + ?Sized> DirtyLog for MergedLog<L> {
    fn name(&self) -> &'static str {
        "merged"
    }

    /// Starts all of the logs, or none.
    fn start(&mut self, ram: &Ram) -> io::Result<()> {
        for index in 0..self.logs.len() {
            if let Err(error) = self.logs[index].start(ram) {
                // The first error is the one to tell; a log that cannot be stopped only costs speed.
                let _ = stop_all(&mut self.logs[..index]);
                return Err(error);
            }
        }
        Ok(())
    }

    fn drain(&mut self, into: &mut DirtyBitmap) -> io::Result<()> {
        self.logs.iter_mut().try_for_each(|log| log.drain(into))
    }

    fn peek(&mut self, into: &mut DirtyBitmap) -> io::Result<()> {
        self.logs.iter_mut().try_for_each(|log| log.peek(into))
    }

    /// Stops all of the logs, also those behind one that fails, and returns the first error.
    fn stop(&mut self) -> io::Result<()> {
        stop_all(&mut self.logs)
    }
}

fn stop_all<L: DirtyLog + ?Sized>(logs: &mut [Box<L>]) -> io::Result<()> {
    let mut first = Ok(());
    for log in logs {
        // Each one is stopped, whatever the others say.
        let result = log.stop();
        first = first.and(result);
    }
    first
}

#[cfg(all(test, not(any(loom, shuttle))))]
mod tests {
    use std::sync::{Arc, Mutex};

    use super::*;

    /// Writes down what it was asked, and refuses the calls in `refuses`.
    struct Scripted {
        page: u64,
        refuses: &'static [&'static str],
        calls: Arc<Mutex<Vec<(u64, &'static str)>>>,
    }

    impl Scripted {
        fn call(&self, call: &'static str) -> io::Result<()> {
            self.calls.lock().unwrap().push((self.page, call));
            if self.refuses.contains(&call) { Err(io::Error::other(format!("{} {call}", self.page))) } else { Ok(()) }
        }
    }

    impl DirtyLog for Scripted {
        fn name(&self) -> &'static str {
            "scripted"
        }

        fn start(&mut self, _: &Ram) -> io::Result<()> {
            self.call("start")
        }

        fn drain(&mut self, into: &mut DirtyBitmap) -> io::Result<()> {
            into.set(self.page);
            self.call("drain")
        }

        fn stop(&mut self) -> io::Result<()> {
            self.call("stop")
        }
    }

    type Calls = Arc<Mutex<Vec<(u64, &'static str)>>>;

    fn merged(refuses: [&'static [&'static str]; 3]) -> (MergedLog, Calls) {
        let calls = Calls::default();
        let log = |page: usize| {
            Box::new(Scripted { page: page as u64, refuses: refuses[page], calls: Arc::clone(&calls) })
                as Box<dyn DirtyLog + Send>
        };
        (MergedLog::new((0..3).map(log).collect()), calls)
    }

    #[test]
    fn a_page_of_any_log_is_reported() {
        let ram = Ram::for_test(&[("a", 5)]);
        let (mut log, _) = merged([&[], &[], &[]]);
        let mut dirty = DirtyBitmap::new(ram.layout());
        log.start(&ram).unwrap();
        log.drain(&mut dirty).unwrap();
        log.stop().unwrap();
        assert!(dirty.iter().eq(0..3));
    }

    #[test]
    fn logs_that_were_started_are_stopped_when_a_later_one_refuses() {
        let ram = Ram::for_test(&[("a", 5)]);
        let (mut log, calls) = merged([&["stop"], &[], &["start"]]);
        assert_eq!(log.start(&ram).unwrap_err().to_string(), "2 start");
        let calls = calls.lock().unwrap();
        assert_eq!(*calls, [(0, "start"), (1, "start"), (2, "start"), (0, "stop"), (1, "stop")]);
    }

    #[test]
    fn all_logs_are_stopped_and_the_first_error_is_told() {
        let (mut log, calls) = merged([&[], &["stop"], &["stop"]]);
        assert_eq!(log.stop().unwrap_err().to_string(), "1 stop");
        assert_eq!(calls.lock().unwrap().len(), 3);
    }
}
