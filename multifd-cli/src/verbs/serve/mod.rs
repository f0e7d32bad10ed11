//! `multifd serve`: any number of VMs from one checkpoint, each of which runs at once and gets its memory while it runs.
//!
//! A client is a connection. The process that starts a QEMU opens it and passes it on as `-incoming fd:N`, so QEMU needs no address
//! of its own. Clients share the open file and nothing else: a thread of its own serves each, and no error of one ends another.

mod account;
mod clients;
mod serving;
mod single;
mod tls;

use std::{
    path::{Path, PathBuf},
    sync::{Arc, Mutex},
    thread,
    time::{Duration, Instant},
};

use multifd::{
    checkpoint::Checkpoint,
    error::Error,
    postcopy::{Options, Original},
    threads,
    transport::{Listen, Pending},
};

use self::{
    account::Account,
    clients::{Clients, Refused},
    serving::Serving,
    tls::Tls,
};
use super::{
    postcopy::{
        lists,
        record::{Identity, Record},
    },
    send,
};
use crate::{
    args::{OutputArgs, Ready, ServeArgs},
    exit::Exit,
    files,
    image::Stop,
    listening,
    metrics::{self, Metrics},
    observe,
    progress::lock,
    report::Outcome,
    signals, terminal,
};

/// What all threads know.
struct Server {
    checkpoint: Box<Checkpoint>,
    original: Original,
    identity: Identity,
    clients: Clients,
    account: Account,
    /// Where the notes are, but for the number of the client.
    notes: PathBuf,
    stall_limit: Option<Duration>,
    tls: Option<Tls>,
    output: OutputArgs,
}

/// A server, and where its clients arrive.
type Listening = (Arc<Server>, Box<dyn Listen>);

/// Serves until an interrupt, or as many clients as were asked for. Reports each client by itself.
pub fn run(args: &ServeArgs) -> Exit {
    if let Err(error) = observe::check_report(args.observe.report.as_deref()) {
        return Outcome::failed(Exit::Failed, error).print(&args.output, false);
    }
    let _metrics = match args.observe.metrics.as_ref().map(Metrics::start).transpose() {
        Ok(metrics) => metrics,
        Err(error) => return Outcome::failed(Exit::Failed, error).print(&args.output, false),
    };
    match begin(args) {
        Ok((server, listener)) => {
            let clients = server.clients.clone();
            metrics::render_by(move || metrics::render_served(&clients.served()));
            server.run(listener, args)
        }
        Err((exit, message)) => Outcome::failed(exit, message).print(&args.output, false),
    }
}

/// # Errors
/// What went wrong before any connection was taken.
fn begin(args: &ServeArgs) -> Result<Listening, (Exit, String)> {
    let of_engine = |error: Error| (Exit::from(&error), error.to_string());
    let failed = |message: String| (Exit::Failed, message);
    let checkpoint = send::open(&args.file, true, &Stop::default(), &args.output).map_err(of_engine)?;
    if checkpoint.machine().starts_with("multifd") {
        let message = "the built-in guest takes no postcopy; expected the checkpoint of a QEMU";
        return Err((Exit::Usage, message.to_owned()));
    }
    let options = options(args, &checkpoint).map_err(failed)?;
    let original = Original::new(&checkpoint, options).map_err(of_engine)?;
    let identity = Identity::of(&checkpoint).map_err(|error| failed(format!("{:?}: {error}", args.file)))?;
    let tls = Tls::of(&args.tls).map_err(|error| failed(error.to_string()))?;
    let Ready { listener, what, .. } = args.listen.listener().map_err(|error| failed(error.to_string()))?;
    let listener = args.allow.listener(listener);
    listening::announce(&what);
    let server = Server {
        checkpoint,
        original,
        identity,
        clients: Clients::new(args.max_clients),
        account: Account::default(),
        notes: notes(args),
        stall_limit: args.stall_timeout.0,
        tls,
        output: args.output.clone(),
    };
    Ok((Arc::new(server), listener))
}

/// # Errors
/// What is wrong with the list of pages.
fn options(args: &ServeArgs, checkpoint: &Checkpoint) -> Result<Options, String> {
    let mut options = Options::default();
    options.uuid = args.uuid.or(checkpoint.uuid()).filter(|uuid| *uuid != [0; 16]);
    options.max_bandwidth = args.max_bandwidth.and_then(|rate| rate.0);
    options.stall_limit = args.stall_timeout.0;
    // A client may connect long before it starts its QEMU; it is not told to run the VM before a QEMU is there.
    options.set_up_limit = None;
    options.prefetch_when = args.prefetch_when.into();
    if let Some(list) = &args.prefetch {
        options.prefetch = lists::read(list)?;
    }
    Ok(options)
}

/// `FILE.postcopy` and [what other processes do not have](Record::for_clones), in the directory that was asked for.
fn notes(args: &ServeArgs) -> PathBuf {
    let mut name = args.file.file_name().unwrap_or_default().to_owned();
    name.push(format!(".postcopy{}", Record::for_clones()));
    args.state.as_deref().or(args.file.parent()).unwrap_or(Path::new("")).join(name)
}

impl Server {
    fn run(self: Arc<Server>, mut listener: Box<dyn Listen>, args: &ServeArgs) -> Exit {
        if let Err(error) = self.end_on_interrupt(&*listener) {
            return Outcome::failed(Exit::Failed, error).print(&args.output, false);
        }
        let most = if listener.is_single() { 1 } else { args.clients.map_or(u32::MAX, Into::into) };
        let failed = self.accept(&mut *listener, most);
        // What has connected and was not accepted is refused by this.
        drop(listener);
        self.clients.wait_for_end();
        if !self.clients.wait(Some(args.finish_timeout)) {
            terminal::say(&format!(
                "multifd: {} of the VMs have not got all of their memory within {} s (--finish-timeout)",
                self.clients.count(),
                args.finish_timeout.as_secs_f64()
            ));
            self.clients.end_all();
        }
        self.clients.wait(None);
        let (exit, text) = self.clients.summary();
        terminal::say(&text);
        let exit = match &failed {
            Some(error) => say_failed(error, exit),
            None => exit,
        };
        let written = args.observe.report.as_deref().map(|path| {
            let written = self.account.write(path, exit, &text, failed.as_deref());
            written.map_err(|error| format!("--report {}: {error}", path.display()))
        });
        match written {
            Some(Err(error)) => say_failed(&error, exit),
            _ => exit,
        }
    }

    /// The first interrupt refuses clients whose VM does not run yet, and all that follow. The second ends all.
    fn end_on_interrupt(self: &Arc<Server>, listener: &dyn Listen) -> std::io::Result<()> {
        let (server, stopper) = (self.clone(), Mutex::new(listener.stopper()?));
        signals::on_interrupt(signals::Hangup::Interrupts, move || {
            if server.clients.is_ending() {
                return server.clients.end_all();
            }
            server.clients.end();
            lock(&stopper).stop();
            if let 1.. = server.clients.count() {
                terminal::say("waits for VMs that run already to get their memory; interrupt again to end at once");
            }
        })
    }

    /// Takes up to `most` connections. Returns why it cannot take more, where that is an error.
    fn accept(self: &Arc<Server>, listener: &mut dyn Listen, most: u32) -> Option<String> {
        let (mut number, mut failing_since) = (0, None);
        while number < most && !self.clients.is_ending() {
            match listener.accept(None) {
                Ok(pending) => {
                    number += 1;
                    failing_since = None;
                    self.begin(number, pending);
                }
                Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
                // Descriptors or memory may come back when clients go.
                Err(error) => {
                    let since = *failing_since.get_or_insert_with(Instant::now);
                    if since.elapsed() > FAILING {
                        self.clients.end();
                        return Some(format!(
                            "no connection could be taken for {} s: {}",
                            FAILING.as_secs(),
                            files::with_limit(&error)
                        ));
                    }
                    if since.elapsed() < PAUSE {
                        let error = files::with_limit(&error);
                        tracing::warn!(error, "taking a connection; tries again for {} s", FAILING.as_secs());
                    }
                    thread::sleep(PAUSE);
                }
            }
        }
        None
    }

    /// Starts a thread for a client, or says why it is not served.
    fn begin(self: &Arc<Server>, number: u32, pending: Box<dyn Pending>) {
        let peer = pending.peer();
        let refused = match self.clients.enter() {
            Ok(place) => {
                let (server, peer) = (self.clone(), peer.clone());
                let serving = move || {
                    let outcome = Serving { server: &server, number, peer, place: &place }.run(pending);
                    server.account.keep(&outcome);
                    outcome.print(&server.output, false);
                    server.clients.report(outcome.exit);
                };
                match threads::spawn(format!("client {number}"), serving) {
                    Ok(_) => return,
                    Err(error) => format!("there is no thread for it: {error}"),
                }
            }
            Err(Refused::Full { limit }) => format!("{limit} clients are being served already (--max-clients)"),
            Err(Refused::Ending) => serving::ENDING.to_owned(),
        };
        let mut outcome = Outcome::failed(Exit::Failed, format!("client {number} ({peer}) was refused: {refused}"));
        serving::name(&mut outcome, number, &peer);
        self.clients.report(outcome.exit);
        self.account.keep(&outcome);
        outcome.print(&self.output, false);
    }
}

/// Says that the server failed, and returns its exit status.
fn say_failed(error: &str, exit: Exit) -> Exit {
    terminal::say(&format!("multifd: {error}"));
    if exit == Exit::Done { Exit::Failed } else { exit }
}

/// Between two attempts to take a connection.
const PAUSE: Duration = Duration::from_millis(200);
/// How long no connection can be taken before that is an error.
const FAILING: Duration = Duration::from_secs(60);
