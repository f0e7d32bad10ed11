//! What the process says on stderr: messages, the log, progress.
//!
//! A thread of its own writes it. A terminal that is gone, a full disk or a reader that does not read can neither fail nor
//! delay the thread that speaks, which may have a guest paused at that moment. What does not fit into the queue is left out,
//! and its amount is said.

use std::{
    io::{self, Write},
    sync::{
        OnceLock,
        atomic::{AtomicU64, AtomicUsize, Ordering::Relaxed},
        mpsc,
    },
    time::Duration,
};

use multifd::threads;

use crate::{printable, progress};

/// Prints `line` above the progress bar, made fit for a terminal. Does not block.
pub fn say(line: &str) {
    write(format!("{}\n", printable::line(line)));
}

/// The same for text that is fit for a terminal, and has its line end.
pub fn write(text: String) {
    let Some(queue) = queue() else { return print(&text) };
    if queue.bytes.fetch_add(text.len(), Relaxed) > LONGEST_QUEUE {
        queue.bytes.fetch_sub(text.len(), Relaxed);
        queue.left_out.fetch_add(1, Relaxed);
        return;
    }
    // The thread only ends with the process.
    let _ = queue.messages.send(Message::Text(text));
}

/// Columns of the terminal at stderr; 80 where there is none.
pub fn width() -> usize {
    let size = rustix::termios::tcgetwinsize(io::stderr());
    size.map(|size| usize::from(size.ws_col)).ok().filter(|columns| *columns > 0).unwrap_or(80)
}

/// Waits until all that was said is written, or `limit` is over.
pub fn flush(limit: Duration) {
    let Some(Some(queue)) = QUEUE.get() else { return };
    let (done, is_done) = mpsc::channel();
    // The thread only ends with the process, and time runs out where it cannot write.
    let _ = queue.messages.send(Message::Flush(done));
    let _ = is_done.recv_timeout(limit);
}

struct Queue {
    messages: mpsc::Sender<Message>,
    /// Of texts that are not written yet.
    bytes: AtomicUsize,
    /// Texts for which there was no room.
    left_out: AtomicU64,
}

enum Message {
    Text(String),
    Flush(mpsc::Sender<()>),
}

/// The queue; `None` where the process may not have one more thread.
fn queue() -> Option<&'static Queue> {
    QUEUE
        .get_or_init(|| {
            let (messages, arrivals) = mpsc::channel();
            let thread = threads::spawn("stderr", move || print_all(&arrivals));
            thread.is_ok().then(|| Queue { messages, bytes: AtomicUsize::new(0), left_out: AtomicU64::new(0) })
        })
        .as_ref()
}

fn print_all(arrivals: &mpsc::Receiver<Message>) {
    for message in arrivals {
        match message {
            Message::Text(text) => {
                print(&text);
                let Some(Some(queue)) = QUEUE.get() else { continue };
                queue.bytes.fetch_sub(text.len(), Relaxed);
                match queue.left_out.swap(0, Relaxed) {
                    0 => {}
                    count => print(&format!("({count} messages were left out: stderr did not take them)\n")),
                }
            }
            Message::Flush(done) => drop(done.send(())),
        }
    }
}

fn print(text: &str) {
    // There is no other place to complain to.
    let _ = progress::above_the_bar(|| io::stderr().write_all(text.as_bytes()));
}

static QUEUE: OnceLock<Option<Queue>> = OnceLock::new();
/// In bytes.
const LONGEST_QUEUE: usize = 4 << 20;
