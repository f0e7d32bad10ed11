//! Migrates a guest that writes as fast as it can to another process, and watches from both how far it is.
//!
//! ```text
//! watch MIB WORKING_SET_MIB CHANNELS MAX_BANDWIDTH      MAX_BANDWIDTH: bytes per second, 0 for no limit
//! ```
//! Prints one JSON line: the guest's kind, what tracked its writes, when the migration began and ended, the end of each round, what the report
//! says of the pause, and how many pages the guest had written at each moment: `[microseconds, pages]`, at the source and
//! at the destination. Times are of the system's clock. What the destination shows before the guest runs there is
//! what was sent of its account: it runs from the first number that is larger than the source's last.

use std::{
    env,
    error::Error,
    io::{BufRead, BufReader},
    process::{Command, Stdio},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use multifd::{
    destination::{self, Destination},
    progress::{Event, Observer},
    source::{self, Source},
    transport::uri::Uri,
};
use multifd_guest::{
    guest::{Guest, GuestConfig, Monitor},
    pace::Rate,
};

type Outcome<T = ()> = Result<T, Box<dyn Error + Send + Sync>>;

fn main() -> Outcome {
    let arguments: Vec<String> = env::args().skip(1).collect();
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    match arguments[..] {
        ["destination", mib, working_set] => receive(&config(mib, working_set)?),
        [mib, working_set, channels, max_bandwidth] => {
            // It ends by itself after the migration, or when nobody connects for as long as a destination waits.
            let mut child = Command::new(env::current_exe()?)
                .args(["destination", mib, working_set])
                .stdin(Stdio::piped())
                .stdout(Stdio::piped())
                .spawn()?;
            let sent = send(&config(mib, working_set)?, channels.parse()?, max_bandwidth.parse()?, &mut child);
            // After an error nobody needs it; otherwise it has ended.
            if sent.is_err() {
                let _ = child.kill();
            }
            child.wait()?;
            sent
        }
        _ => Err("usage: watch MIB WORKING_SET_MIB CHANNELS MAX_BANDWIDTH".into()),
    }
}

fn config(mib: &str, working_set: &str) -> Outcome<GuestConfig> {
    Ok(GuestConfig {
        memory: mib.parse::<u64>()? << 20,
        working_set: working_set.parse::<u64>()? << 20,
        filled_percent: 100,
        write_rate: Rate::Max,
        verify: false,
        // The samples tell, and do not slow it down.
        watch: false,
        ..GuestConfig::default()
    })
}

fn send(config: &GuestConfig, channels: u8, max_bandwidth: u64, child: &mut std::process::Child) -> Outcome {
    let mut output = BufReader::new(child.stdout.take().ok_or("the destination has no output")?);
    let mut line = String::new();
    output.read_line(&mut line)?;
    let uri: Uri = line.trim().parse()?;
    let mut guest = Guest::create(config)?;
    guest.run();
    if !guest.wait_passes(1, Duration::from_secs(60)) {
        return Err("the guest makes no progress".into());
    }
    let watch = Watch::begin(guest.monitor());
    thread::sleep(BEFORE);
    let mut options = source::Options::default();
    options.plan.channels = channels;
    options.parameters.max_bandwidth = Some(max_bandwidth).filter(|limit| *limit > 0);
    options.parameters.limits.throttle = false;
    let mut rounds = Rounds::default();
    let began = now();
    let report = Source::new(options).run(&mut guest, &*uri.connector()?, &mut rounds)?;
    let ended = now();
    let here = watch.end();
    let (kind, log) = (guest.kind().name(), guest.dirty_log_choice().name());
    drop(guest);
    line.clear();
    output.read_line(&mut line)?;
    let rounds = rounds.0.join(",");
    println!(
        "{{\"guest\":\"{kind}\",\"dirty-log\":\"{log}\",\"began-us\":{began},\"ended-us\":{ended},\
         \"downtime-ms\":{:.3},\"rounds\":[{rounds}],\"source\":{here},{}}}",
        report.downtime.total.as_secs_f64() * 1e3,
        line.trim()
    );
    Ok(())
}

fn receive(config: &GuestConfig) -> Outcome {
    let mut guest = Guest::create_incoming(config)?;
    let listener = "tcp:127.0.0.1:0".parse::<Uri>()?.listener()?;
    println!("{}", listener.uri());
    let watch = Watch::begin(guest.monitor());
    Destination::new(destination::Options::default()).run(&mut guest, Box::new(listener), &mut ())?;
    thread::sleep(AFTER);
    println!("\"destination\":{}", watch.end());
    Ok(())
}

/// The ends of rounds, as JSON.
#[derive(Default)]
struct Rounds(Vec<String>);

impl Observer for Rounds {
    fn event(&mut self, event: &Event) {
        if let Event::Round(round) = event {
            self.0.push(format!(
                "{{\"ended-us\":{},\"took-us\":{},\"guest-running\":{},\"pages\":{}}}",
                now(),
                round.took.as_micros(),
                round.guest_running,
                round.normal + round.zero
            ));
        }
    }
}

/// A thread that looks at the guest.
struct Watch {
    stop: Arc<AtomicBool>,
    thread: thread::JoinHandle<String>,
}

impl Watch {
    fn begin(mut monitor: Monitor) -> Watch {
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = stop.clone();
        let thread = thread::spawn(move || {
            let mut samples = Vec::new();
            while !stopped.load(Ordering::Relaxed) {
                samples.push(format!("[{},{}]", now(), monitor.status().pages_written));
                thread::sleep(EVERY);
            }
            format!("[{}]", samples.join(","))
        });
        Watch { stop, thread }
    }

    /// What it saw, as JSON.
    fn end(self) -> String {
        self.stop.store(true, Ordering::Relaxed);
        self.thread.join().expect("it does not panic")
    }
}

/// Microseconds of the system's time.
fn now() -> u128 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_micros()
}

const BEFORE: Duration = Duration::from_secs(2);
const AFTER: Duration = Duration::from_secs(2);
/// Twice in the shortest stall that counts.
const EVERY: Duration = Duration::from_millis(1);
