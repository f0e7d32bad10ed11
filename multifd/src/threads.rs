//! How the engine's threads are made: by the standard library, or by the VMM.
//!
//! Every thread of a migration is started through [`Threads`] and joined before `run` returns. A VMM that gives its threads
//! seccomp filters, CPUs, priorities or a cgroup supplies its own [`Threads`] in the options of either side. A thread that
//! cannot be created ends the migration with [`Error::Thread`] and nothing else: the VM runs on at the source.
//!
//! One thread is made otherwise: the [TCP connector](crate::transport::tcp::TcpConnector) looks a *name* up in a thread of the standard
//! library, since nothing can interrupt the resolver. It is not joined. An address takes none.
//!
//! # Panics
//! A panic of one of these threads, or of a callback of the VMM in the thread that called `run`, is a defect. It ends the
//! migration with [`Error::Panicked`], and the VM runs on at the source; after the commit, or in the destination's
//! [`start`](crate::vm::DestinationVm::start), with [`Error::InDoubt`], and the VM stays paused there. This takes unwinding. In a program that is built with `panic = "abort"` a panic ends the whole process, and the VM with it.

use std::{fmt, io, thread::Result as ThreadResult};

pub use multifd_proto::ChannelId;

pub use crate::system_calls::{system_calls, system_calls_of_run};
use crate::{
    error::Error,
    stop::StopHandle,
    sync::{Arc, Mutex, lock, thread},
};

/// Starts the threads of a migration.
///
/// # Examples
/// Threads with a stack of 256 KiB:
/// ```
/// use std::{io, thread};
/// use multifd::threads::{Body, Joinable, ThreadRole, Threads};
///
/// struct SmallStacks;
///
/// impl Threads for SmallStacks {
///     fn spawn(&self, role: ThreadRole, body: Body) -> io::Result<Box<dyn Joinable>> {
///         Ok(Box::new(thread::Builder::new().name(role.name()).stack_size(256 << 10).spawn(body)?))
///     }
/// }
///
/// let mut options = multifd::source::Options::default();
/// options.threads = std::sync::Arc::new(SmallStacks);
/// ```
pub trait Threads: Send + Sync {
    /// Starts a thread that calls `body` once, and returns without waiting for it.
    ///
    /// `body` blocks on connections and on other threads of the migration, so it needs a thread of its own. A `body` that
    /// is dropped without a call ends the migration.
    ///
    /// # Errors
    /// The thread could not be created. `body` has then been dropped, which closes its connection.
    fn spawn(&self, role: ThreadRole, body: Body) -> io::Result<Box<dyn Joinable>>;
}

/// What a thread of a migration does.
pub type Body = Box<dyn FnOnce() + Send>;

/// A thread that was started and can be waited for.
pub trait Joinable: Send {
    /// Waits until the thread has ended. Returns the payload of its panic, if it panicked.
    fn join(self: Box<Self>) -> ThreadResult<()>;
}

impl Joinable for thread::JoinHandle<()> {
    fn join(self: Box<Self>) -> ThreadResult<()> {
        (*self).join()
    }
}

/// The task of one thread.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum ThreadRole {
    /// Sends pages over one channel, on the source.
    SendChannel(ChannelId),
    /// Reads what the destination says on main, on the source.
    ReturnPath,
    /// Sends the pages that the guest waits for over a connection of their own, on the source of a postcopy.
    Urgent,
    /// Ends waits that have a limit, on either side.
    Watchdog,
    /// Accepts connections, on the destination.
    Accept,
    /// Serves one connection, on the destination; counted from 0 in the order of arrival.
    Connection(usize),
}

impl ThreadRole {
    /// A name for the thread, as it appears in a debugger or in `top -H`: at most 15 bytes, the kernel's limit. A connection
    /// of a destination that turns out to be a channel takes the name that the channel has at the source, `multifd-ch3`, if it still has
    /// this name: one that the VMM has given stays.
    pub fn name(self) -> String {
        match self {
            ThreadRole::SendChannel(id) => format!("multifd-ch{id}"),
            ThreadRole::ReturnPath => "multifd-return".to_owned(),
            ThreadRole::Urgent => "multifd-urgent".to_owned(),
            ThreadRole::Watchdog => "multifd-watch".to_owned(),
            ThreadRole::Accept => "multifd-accept".to_owned(),
            ThreadRole::Connection(index) => format!("multifd-conn{}", index % 1000),
        }
    }
}

/// Gives this thread, which serves connection `index`, the name of the channel that the connection turned out to be, unless the VMM has
/// named it.
pub(crate) fn is_channel(index: usize, id: ChannelId) {
    #[cfg(not(any(loom, shuttle)))]
    if rustix::thread::name().is_ok_and(|name| name.as_bytes() == ThreadRole::Connection(index).name().as_bytes())
        && let Ok(name) = std::ffi::CString::new(ThreadRole::SendChannel(id).name())
    {
        // For display only.
        let _ = rustix::thread::set_name(&name);
    }
    #[cfg(any(loom, shuttle))]
    let _ = (index, id);
}

impl fmt::Display for ThreadRole {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            ThreadRole::SendChannel(id) => write!(f, "sends channel {id}"),
            ThreadRole::ReturnPath => f.write_str("reads the return path"),
            ThreadRole::Urgent => f.write_str("sends the pages that the guest waits for"),
            ThreadRole::Watchdog => f.write_str("watches the limits"),
            ThreadRole::Accept => f.write_str("accepts connections"),
            ThreadRole::Connection(index) => write!(f, "serves connection {index}"),
        }
    }
}

/// Threads of the standard library, named by their role.
#[derive(Clone, Copy, Debug, Default)]
pub struct StdThreads;

impl Threads for StdThreads {
    fn spawn(&self, role: ThreadRole, body: Body) -> io::Result<Box<dyn Joinable>> {
        Ok(Box::new(spawn(role.name(), body)?))
    }
}

/// Starts a thread of the standard library called `name`, if there is memory for it to begin with.
///
/// Before it comes to its body, a new thread of the standard library needs memory besides its stack, and ends the *process*
/// where it gets none: for a VMM that is the guest. So this asks for as much first, and gives it back for the thread to take.
///
/// # Errors
/// The kernel's: no memory, or a limit on threads. `body` has been dropped.
pub fn spawn<T: Send + 'static>(
    name: impl Into<String>,
    body: impl FnOnce() -> T + Send + 'static,
) -> io::Result<thread::JoinHandle<T>> {
    #[cfg(not(any(loom, shuttle)))]
    drop(crate::sys::mapping::Mapping::anonymous(ROOM_TO_BEGIN)?);
    thread::Builder::new().name(name.into()).spawn(body)
}

/// A stack of the standard library (2 MiB), the stack for signals, and the allocator's first blocks.
#[cfg(not(any(loom, shuttle)))]
const ROOM_TO_BEGIN: usize = 6 << 20;

impl fmt::Debug for dyn Threads {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Threads")
    }
}

/// Calls `phases`, and turns its panic into [`Error::Panicked`]: whatever a VMM's callback does, the VM is given back.
#[cfg(not(any(loom, shuttle)))]
pub(crate) fn caught<T>(phases: impl FnOnce() -> Result<T, Error>) -> Result<T, Error> {
    let outcome = std::panic::catch_unwind(std::panic::AssertUnwindSafe(phases));
    outcome.unwrap_or_else(|panic| Err(Error::panicked(&*panic)))
}

/// The same under a model checker, which ends its threads by unwinding them.
#[cfg(any(loom, shuttle))]
pub(crate) fn caught<T>(phases: impl FnOnce() -> Result<T, Error>) -> Result<T, Error> {
    phases()
}

/// A running thread of the engine that ends with a `T`.
pub(crate) struct Task<T> {
    handle: Box<dyn Joinable>,
    state: Arc<Mutex<TaskState<T>>>,
}

/// How far a thread has come.
enum TaskState<T> {
    /// [`Threads::spawn`] has not returned yet.
    Offered,
    /// It has returned a thread.
    Accepted,
    /// The body was dropped before it was called. Kept until that is known as the reason of the end: it may have a connection.
    Dropped(Option<Box<dyn Send>>),
    /// The body has been called and has not returned.
    Begun,
    /// The body has returned.
    Done(T),
}

impl<T: Send + 'static> Task<T> {
    /// Starts a thread that runs `body`.
    ///
    /// If `threads` has no thread for it, or loses `body` later without a call, the migration is stopped, because other threads
    /// may be waiting for it. What `body` owns is dropped after that: the peer may see a connection close, and act, before
    /// this side knows why.
    ///
    /// # Errors
    /// [`Error::Thread`].
    pub(crate) fn spawn(
        threads: &dyn Threads,
        role: ThreadRole,
        stop: &StopHandle,
        body: impl FnOnce() -> T + Send + 'static,
    ) -> Result<Task<T>, Error> {
        let state = Arc::new(Mutex::new(TaskState::Offered));
        let mut offer = Offer { role, stop: Some(stop.clone()), state: state.clone(), body: Some(body) };
        let spawned = threads.spawn(
            role,
            Box::new(move || {
                if let Some((state, body)) = offer.begin() {
                    let outcome = body();
                    *lock(&state) = TaskState::Done(outcome);
                }
            }),
        );
        let mut now = lock(&state);
        let lost = match &mut *now {
            TaskState::Dropped(body) => Some(body.take()),
            TaskState::Offered if spawned.is_ok() => {
                *now = TaskState::Accepted;
                None
            }
            _ => None,
        };
        drop(now);
        let (source, body) = match (spawned, lost) {
            (Ok(handle), None) => return Ok(Task { handle, state }),
            (Ok(_), Some(body)) => (was_dropped(), body),
            (Err(source), body) => (source, body.flatten()),
        };
        let recorded = match source.raw_os_error() {
            Some(code) => io::Error::from_raw_os_error(code),
            None => io::Error::new(source.kind(), source.to_string()),
        };
        stop.stop(Error::Thread { role, source: recorded });
        drop(body);
        Err(Error::Thread { role, source })
    }

    /// Waits until the thread has ended, and returns what `body` returned.
    ///
    /// # Errors
    /// [`Error::Panicked`].
    pub(crate) fn join(self) -> Result<T, Error> {
        self.handle.join().map_err(|panic| Error::panicked(&*panic))?;
        match std::mem::replace(&mut *lock(&self.state), TaskState::Begun) {
            TaskState::Done(outcome) => Ok(outcome),
            // A VMM's thread may catch the panic itself.
            _ => Err(Error::Panicked { message: "it ended without a result".to_owned() }),
        }
    }
}

/// Travels with a body until it is called, and notices when that never happens.
struct Offer<T, F: Send + 'static> {
    role: ThreadRole,
    /// `None` once the body has been called.
    stop: Option<StopHandle>,
    state: Arc<Mutex<TaskState<T>>>,
    /// `None` once it has been called or dropped.
    body: Option<F>,
}

impl<T, F: Send + 'static> Offer<T, F> {
    fn begin(&mut self) -> Option<(Arc<Mutex<TaskState<T>>>, F)> {
        self.stop = None;
        *lock(&self.state) = TaskState::Begun;
        Some((self.state.clone(), self.body.take()?))
    }
}

impl<T, F: Send + 'static> Drop for Offer<T, F> {
    fn drop(&mut self) {
        let Some(stop) = self.stop.take() else { return };
        let mut state = lock(&self.state);
        if matches!(*state, TaskState::Offered) {
            // `Task::spawn` reports it, with the reason, and drops the body then.
            *state = TaskState::Dropped(self.body.take().map(|body| Box::new(body) as Box<dyn Send>));
            return;
        }
        let accepted = matches!(*state, TaskState::Accepted);
        *state = TaskState::Dropped(None);
        drop(state);
        if accepted {
            // The body is dropped after this, with the other fields.
            stop.stop(Error::Thread { role: self.role, source: was_dropped() });
        }
    }
}

fn was_dropped() -> io::Error {
    io::Error::other("it was dropped before it ran")
}

#[cfg(all(test, not(any(loom, shuttle))))]
pub(crate) mod test_doubles {
    use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};

    use super::*;

    /// Threads of which one cannot be created: the kernel's limit is reached there and nowhere else.
    pub(crate) struct FailsAt {
        /// Counted from 0.
        pub(crate) index: usize,
        pub(crate) spawned: AtomicUsize,
    }

    impl Threads for FailsAt {
        fn spawn(&self, role: ThreadRole, body: Body) -> io::Result<Box<dyn Joinable>> {
            if self.spawned.fetch_add(1, SeqCst) == self.index {
                return Err(io::ErrorKind::WouldBlock.into());
            }
            StdThreads.spawn(role, body)
        }
    }

    /// Threads of which one ends before it has called its body.
    pub(crate) struct LosesAt {
        /// Counted from 0.
        pub(crate) index: usize,
        pub(crate) spawned: AtomicUsize,
    }

    impl Threads for LosesAt {
        fn spawn(&self, role: ThreadRole, body: Body) -> io::Result<Box<dyn Joinable>> {
            let lost = self.spawned.fetch_add(1, SeqCst) == self.index;
            let body = if lost { Box::new(move || drop(body)) } else { body };
            StdThreads.spawn(role, body)
        }
    }
}

#[cfg(all(test, not(any(loom, shuttle))))]
mod tests {
    use super::*;

    #[test]
    fn a_name_fits_into_what_the_kernel_keeps() {
        let roles = [
            ThreadRole::SendChannel(ChannelId(255)),
            ThreadRole::ReturnPath,
            ThreadRole::Accept,
            ThreadRole::Connection(usize::MAX),
        ];
        for role in roles {
            assert!(role.name().len() <= 15, "{}", role.name());
        }
    }

    #[test]
    fn a_thread_has_the_name_of_its_role() {
        let name = || std::thread::current().name().map(str::to_owned);
        let task = Task::spawn(&StdThreads, ThreadRole::Accept, &StopHandle::new(), name).unwrap();
        assert_eq!(task.join().unwrap().as_deref(), Some("multifd-accept"));
    }

    /// The kernel's name of a thread that was called `name` and turns out to serve channel 3.
    fn renamed(name: impl Into<String>) -> String {
        let of_channel = || {
            is_channel(7, ChannelId(3));
            rustix::thread::name().unwrap().into_string().unwrap()
        };
        spawn(name, of_channel).unwrap().join().unwrap()
    }

    #[test]
    fn a_connection_takes_the_name_of_its_channel_and_one_that_the_vmm_has_given_stays() {
        assert_eq!(renamed(ThreadRole::Connection(7).name()), "multifd-ch3");
        assert_eq!(renamed("vmm-migration"), "vmm-migration");
    }

    #[test]
    fn a_panic_is_reported_with_its_message() {
        let task: Task<()> =
            Task::spawn(&StdThreads, ThreadRole::Accept, &StopHandle::new(), || panic!("a defect")).unwrap();
        assert_eq!(task.join().unwrap_err().to_string(), "a thread panicked: a defect");
    }
}
