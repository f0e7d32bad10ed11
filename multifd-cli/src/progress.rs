//! Shows a migration while it happens: a row per round, and below them a bar for the current one.
//!
//! The rows come from the engine's events; the bar is drawn by a thread that looks at the counters ten times a second.
//! Everything goes to stderr.

use std::{
    io::{self, IsTerminal},
    sync::{Arc, Mutex, MutexGuard, PoisonError, mpsc},
    time::{Duration, Instant},
};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use multifd::{
    progress::{Event, Observer, Phase, Progress, Snapshot},
    threads,
};

use crate::{
    args::{OutputArgs, ProgressMode},
    report::Round,
    rounds::Rounds,
    table, terminal,
};

/// How progress is shown.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Style {
    Nothing,
    /// A line per round.
    Lines,
    /// Lines, and a bar below them.
    Bar,
}

/// Shows one migration and remembers its rounds. Ends the bar when dropped.
pub struct Display {
    style: Style,
    rounds: Arc<Mutex<Rounds>>,
    header_shown: bool,
    /// Ends the thread that draws when dropped, and the other end of what the thread drops at its own end.
    ticker: Option<(mpsc::Sender<()>, mpsc::Receiver<()>)>,
}

impl Display {
    /// Shows the migration that `progress` counts.
    pub fn new(output: &OutputArgs, progress: &Progress) -> Display {
        let style = Style::of(output, io::stderr().is_terminal());
        let rounds: Arc<Mutex<Rounds>> = Arc::default();
        let ticker = (style == Style::Bar).then(|| draw(progress.clone(), rounds.clone())).flatten();
        Display { style, rounds, header_shown: false, ticker }
    }

    /// The rounds that are over.
    pub fn rounds(&self) -> Rounds {
        lock(&self.rounds).clone()
    }

    fn line(&self, line: &str) {
        if self.style != Style::Nothing {
            terminal::say(line);
        }
    }
}

impl Observer for Display {
    fn event(&mut self, event: &Event) {
        match event {
            Event::Round(stats) => {
                lock(&self.rounds).push(stats.clone());
                if !std::mem::replace(&mut self.header_shown, true) {
                    self.line(&table::header());
                }
                self.line(&table::row(&Round::from(stats)));
            }
            Event::Throttle(percent) => self.line(&format!("      the guest is slowed down by {percent} %")),
            _ => {}
        }
    }
}

impl Drop for Display {
    fn drop(&mut self) {
        if let Some((end, ended)) = self.ticker.take() {
            drop(end);
            // A terminal that takes nothing must not delay the end of the migration.
            let _ = ended.recv_timeout(LAST_DRAWING);
            *lock(&BAR) = None;
        }
    }
}

impl Style {
    fn of(output: &OutputArgs, terminal: bool) -> Style {
        match (output.progress, terminal) {
            (ProgressMode::Never, _) => Style::Nothing,
            (ProgressMode::Auto, _) if output.quiet => Style::Nothing,
            (ProgressMode::Auto, false) => Style::Nothing,
            (ProgressMode::Always, false) => Style::Lines,
            (_, true) => Style::Bar,
        }
    }
}

/// Whether the reader of the result has seen a row for each round already.
pub fn reader_saw_rounds(output: &OutputArgs) -> bool {
    io::stdout().is_terminal() && Style::of(output, io::stderr().is_terminal()) != Style::Nothing
}

/// Prints `line` where progress is shown.
pub fn remark(output: &OutputArgs, line: &str) {
    if Style::of(output, io::stderr().is_terminal()) == Style::Bar {
        terminal::say(line);
    }
}

/// Runs `print`, which prints to stderr, with the bar out of the way.
///
/// # Errors
/// Those of `print`.
pub fn above_the_bar(print: impl FnOnce() -> io::Result<()>) -> io::Result<()> {
    let bar = lock(&BAR).clone();
    match bar {
        Some(bar) => bar.suspend(print),
        None => print(),
    }
}

/// Begins to draw. Ends the drawing when the sender is dropped; the receiver is disconnected when that is done. `None`
/// where the process may not have one more thread.
fn draw(progress: Progress, rounds: Arc<Mutex<Rounds>>) -> Option<(mpsc::Sender<()>, mpsc::Receiver<()>)> {
    let bar = ProgressBar::with_draw_target(None, ProgressDrawTarget::stderr());
    let (end, is_ended) = mpsc::channel();
    let (done, is_done) = mpsc::channel();
    let drawn = bar.clone();
    let thread = threads::spawn("progress", move || {
        draw_until(&is_ended, &drawn, &progress, &rounds);
        drop(done);
    });
    thread.ok()?;
    *lock(&BAR) = Some(bar);
    Some((end, is_done))
}

fn draw_until(ended: &mpsc::Receiver<()>, bar: &ProgressBar, progress: &Progress, rounds: &Mutex<Rounds>) {
    let mut rate = Rate::default();
    loop {
        let snapshot = progress.snapshot();
        let phase = snapshot.phase.map_or("", Phase::name);
        let rate = rate.at(Instant::now(), snapshot.bytes());
        let moved = table::bytes(snapshot.bytes());
        let expected = lock(rounds).latest().map_or(String::new(), |last| {
            let round = Round::from(last);
            let expected = round.expected_downtime.filter(|_| round.guest_running);
            expected.map_or(String::new(), |time| format!("  downtime {}", table::milliseconds(time)))
        });
        match whole_of(&snapshot) {
            Some(pages) => {
                bar.set_style(style(BAR_TEMPLATE));
                bar.set_length(pages);
                bar.set_position(snapshot.round_done.min(pages));
            }
            None => bar.set_style(style(SPINNER_TEMPLATE)),
        }
        bar.set_prefix(match snapshot.phase {
            Some(Phase::Rounds) => format!("round {}", snapshot.round),
            _ => phase.to_owned(),
        });
        let pages = match (whole_of(&snapshot), snapshot.round_done) {
            (Some(whole), done) => format!("{:.0} %  ", 100.0 * done.min(whole) as f64 / whole as f64),
            (None, 0) => String::new(),
            (None, done) => format!("{} pages  ", table::grouped(done)),
        };
        let faults = faults(&snapshot);
        bar.set_message(format!("{pages}{moved}  {}/s{expected}{faults}", table::decimal_bytes(rate)));
        bar.tick();
        if ended.recv_timeout(TICK) == Err(mpsc::RecvTimeoutError::Disconnected) {
            return bar.finish_and_clear();
        }
    }
}

/// How many pages the round has. A destination knows it of round 0 alone, which has all pages, once it knows the RAM
/// blocks; of the later rounds the source does not tell.
fn whole_of(snapshot: &Snapshot) -> Option<u64> {
    let whole = match (snapshot.phase, snapshot.round_pages, snapshot.round) {
        (Some(Phase::Rounds | Phase::Switchover), 0, 0) | (Some(Phase::Setup), 0, 0) => snapshot.pages_total,
        (Some(Phase::Rounds | Phase::Switchover | Phase::Postcopy), pages, _) => pages,
        _ => 0,
    };
    (whole > 0).then_some(whole)
}

/// Of a guest that runs elsewhere: what it asked for, and how much it lacks.
fn faults(snapshot: &Snapshot) -> String {
    match snapshot.phase {
        Some(Phase::Postcopy) => {
            let left = snapshot.round_pages.saturating_sub(snapshot.round_done);
            format!("  {} faults, {} pages left", table::grouped(snapshot.requests), table::grouped(left))
        }
        _ => String::new(),
    }
}

fn style(template: &str) -> ProgressStyle {
    ProgressStyle::with_template(template).expect("the templates below are valid").progress_chars("━╸─")
}

/// Bytes per second, smoothed over about a second.
#[derive(Default)]
struct Rate {
    last: Option<(Instant, u64)>,
    smooth: f64,
}

impl Rate {
    fn at(&mut self, now: Instant, bytes: u64) -> f64 {
        if let Some((then, before)) = self.last {
            let seconds = (now - then).as_secs_f64().max(1e-3);
            let current = bytes.saturating_sub(before) as f64 / seconds;
            let weight = if self.smooth == 0.0 { 1.0 } else { seconds.min(1.0) };
            self.smooth += (current - self.smooth) * weight;
        }
        self.last = Some((now, bytes));
        self.smooth
    }
}

pub fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // What is in it is for display: a panic elsewhere leaves nothing half-done that matters.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The bar on stderr, of which there is at most one. What else is printed there moves it out of the way.
static BAR: Mutex<Option<ProgressBar>> = Mutex::new(None);

// The message is cut where the terminal ends: with 80 columns there are 48 for it.
const BAR_TEMPLATE: &str = "{prefix:>10} {bar:20.cyan/dim} {wide_msg}";
const SPINNER_TEMPLATE: &str = "{prefix:>10} {spinner:.cyan} {wide_msg}";
const TICK: Duration = Duration::from_millis(100);
const LAST_DRAWING: Duration = Duration::from_secs(1);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_is_shown_elsewhere_than_on_a_terminal_unless_asked_for() {
        let output = |progress, quiet| OutputArgs { json: false, verbose: 0, quiet, progress };
        assert_eq!(Style::of(&output(ProgressMode::Auto, false), true), Style::Bar);
        assert_eq!(Style::of(&output(ProgressMode::Auto, true), true), Style::Nothing);
        assert_eq!(Style::of(&output(ProgressMode::Auto, false), false), Style::Nothing);
        assert_eq!(Style::of(&output(ProgressMode::Always, false), false), Style::Lines);
        assert_eq!(Style::of(&output(ProgressMode::Always, true), true), Style::Bar);
        assert_eq!(Style::of(&output(ProgressMode::Never, false), true), Style::Nothing);
    }

    #[test]
    fn a_destination_shows_how_far_round_0_is_and_later_how_much_came() {
        let mut snapshot = Snapshot::default();
        assert_eq!(whole_of(&snapshot), None, "not connected");
        snapshot.phase = Some(Phase::Setup);
        assert_eq!(whole_of(&snapshot), None, "no blocks yet");
        snapshot.pages_total = 1000;
        assert_eq!(whole_of(&snapshot), Some(1000));
        snapshot.phase = Some(Phase::Rounds);
        assert_eq!(whole_of(&snapshot), Some(1000));
        snapshot.round = 1;
        assert_eq!(whole_of(&snapshot), None);
        // A source knows it.
        snapshot.round_pages = 10;
        assert_eq!(whole_of(&snapshot), Some(10));
        snapshot.phase = Some(Phase::Postcopy);
        (snapshot.requests, snapshot.round_done) = (1234, 4);
        assert_eq!((whole_of(&snapshot), faults(&snapshot)), (Some(10), "  1,234 faults, 6 pages left".to_owned()));
        snapshot.phase = Some(Phase::Confirm);
        assert_eq!(whole_of(&snapshot), None);
    }

    #[test]
    fn the_rate_follows_what_is_sent() {
        let (start, mut rate) = (Instant::now(), Rate::default());
        assert_eq!(rate.at(start, 0), 0.0);
        assert_eq!(rate.at(start + Duration::from_millis(100), 1000), 10_000.0);
        for tick in 2..60 {
            rate.at(start + tick * Duration::from_millis(100), 1000 + 2000 * u64::from(tick - 1));
        }
        assert!((rate.smooth - 20_000.0).abs() < 100.0, "{}", rate.smooth);
    }
}
