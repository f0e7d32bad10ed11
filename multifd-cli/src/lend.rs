//! Lends a value to a thread: it comes back whatever becomes of the thread.
//!
//! The guest of this process is the only copy. It is handed over once its thread exists, and lies outside of what a panic
//! unwinds.

use std::{
    any::Any,
    io,
    panic::{self, AssertUnwindSafe},
    sync::mpsc,
};

use multifd::threads;

/// Calls `body` with `value` in a new thread called `name`, then `done` with `value` and the result; with the message of
/// the panic, if `body` panicked.
///
/// # Errors
/// The thread cannot be created. `value` comes back with the reason.
pub fn lend<V: Send + 'static, T>(
    name: &str,
    value: V,
    body: impl FnOnce(&mut V) -> T + Send + 'static,
    done: impl FnOnce(V, Result<T, String>) + Send + 'static,
) -> Result<(), (V, io::Error)> {
    let (hand_over, handed_over) = mpsc::channel::<V>();
    let run = move || {
        let Ok(mut value) = handed_over.recv() else { return };
        let result = panic::catch_unwind(AssertUnwindSafe(|| body(&mut value)));
        done(value, result.map_err(|panic| message(&*panic)));
    };
    match threads::spawn(name, run) {
        // The thread waits for it, and cannot end without.
        Ok(_) => {
            hand_over.send(value).map_err(|mpsc::SendError(value)| (value, io::Error::other("the thread has ended")))
        }
        Err(error) => Err((value, error)),
    }
}

fn message(panic: &(dyn Any + Send)) -> String {
    let text = panic.downcast_ref::<&str>().map(|text| (*text).to_owned());
    text.or_else(|| panic.downcast_ref::<String>().cloned()).unwrap_or_else(|| "no message".to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The guest of a migration that panicked was dropped with the thread, and with it the only copy.
    #[test]
    fn a_value_survives_the_panic_of_its_thread() {
        let (sender, receiver) = mpsc::channel();
        let body = |value: &mut Vec<u8>| {
            value.push(2);
            assert!(value.is_empty(), "a defect");
        };
        lend("test", vec![1], body, move |value, result| sender.send((value, result)).unwrap()).unwrap();
        assert_eq!(receiver.recv().unwrap(), (vec![1, 2], Err("a defect".to_owned())));
    }

    #[test]
    fn a_value_comes_back_with_the_result() {
        let (sender, receiver) = mpsc::channel();
        let done = move |value, result| sender.send((value, result)).unwrap();
        lend("test", 1, |value| std::mem::replace(value, 2), done).unwrap();
        assert_eq!(receiver.recv().unwrap(), (2, Ok(1)));
    }
}
