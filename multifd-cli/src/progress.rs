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
    progress::{Event, Observer, Progress, RoundStats},
    source, threads,
};

use crate::{
    args::{OutputArgs, ProgressMode},
    bar::{View, whole_of},
    current,
    forecast::{self, Forecast, Lack},
    report::Round,
    role::Role,
    rounds::Rounds,
    table::Columns,
    terminal,
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
    role: Role,
    shared: Arc<Mutex<Shown>>,
    /// What foretells the end, at a source that has rounds.
    ahead: Option<Ahead>,
    /// The operator was told that it does not converge.
    is_told: bool,
    header_shown: bool,
    /// Ends the thread that draws when dropped, and the other end of what the thread drops at its own end.
    ticker: Option<(mpsc::Sender<()>, mpsc::Receiver<()>)>,
}

/// What the thread of the migration and the one that draws share.
#[derive(Default)]
struct Shown {
    rounds: Rounds,
    forecast: Option<Forecast>,
}

/// What it takes to foretell the end of a migration.
struct Ahead {
    handle: source::Handle,
    remedies: String,
}

impl Display {
    /// Shows the migration that `progress` counts and `role` makes.
    pub fn new(role: Role, output: &OutputArgs, progress: &Progress) -> Display {
        current::begin(role, progress);
        let style = Style::of(output, io::stderr().is_terminal());
        let shared: Arc<Mutex<Shown>> = Arc::default();
        let ticker = (style == Style::Bar).then(|| draw(progress.clone(), shared.clone())).flatten();
        Display { style, role, shared, ahead: None, is_told: false, header_shown: false, ticker }
    }

    /// The same for a source that `handle` steers, and what is to be expected of it.
    pub fn of_source(output: &OutputArgs, handle: source::Handle, options: &source::Options) -> Display {
        let mut display = Display::new(Role::Source, output, &handle.progress());
        display.ahead = Some(Ahead { handle, remedies: forecast::remedies(options) });
        display
    }

    /// The rounds that are over.
    pub fn rounds(&self) -> Rounds {
        lock(&self.shared).rounds.clone()
    }

    /// What the migration needs that does not converge, and what helps; nothing where it does.
    pub fn lack(&self) -> Option<String> {
        let lack = match lock(&self.shared).forecast {
            Some(Forecast::Never(lack)) => lack,
            _ => return None,
        };
        self.ahead.as_ref().map(|ahead| ahead.text(lack))
    }

    fn round(&mut self, stats: &RoundStats) {
        {
            let mut shown = lock(&self.shared);
            shown.rounds.push(stats.clone());
            let ahead = self.ahead.as_ref().filter(|_| stats.guest_running);
            shown.forecast = ahead.and_then(|ahead| ahead.forecast(&shown.rounds));
        }
        let columns = Columns::new(self.role, terminal::width());
        if !std::mem::replace(&mut self.header_shown, true) {
            self.line(&columns.header());
        }
        self.line(&columns.row(&Round::new(self.role, stats)));
        let lack = self.lack();
        match &lack {
            Some(lack) if !self.is_told => {
                let text = format!("does not converge at this write rate: {lack}");
                tracing::info!("{text}");
                self.line(&format!("      {text}"));
            }
            _ => {}
        }
        self.is_told = lack.is_some();
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
            Event::Round(stats) => self.round(stats),
            Event::Throttle(percent) => self.line(&format!("      the guest is slowed down by {percent} %")),
            _ => {}
        }
    }
}

impl Ahead {
    fn forecast(&self, rounds: &Rounds) -> Option<Forecast> {
        Forecast::after(rounds.latest_first().take(LOOKS_BACK), PAGE_SIZE, self.handle.parameters().limits.downtime)
    }

    fn text(&self, lack: Lack) -> String {
        format!("{}; what helps: {}", lack.text(), self.remedies)
    }
}

/// Rounds that the forecast looks at: what a guest did longer ago may be over.
const LOOKS_BACK: usize = 10;

impl Drop for Display {
    fn drop(&mut self) {
        current::end();
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
fn draw(progress: Progress, shared: Arc<Mutex<Shown>>) -> Option<(mpsc::Sender<()>, mpsc::Receiver<()>)> {
    let bar = ProgressBar::with_draw_target(None, ProgressDrawTarget::stderr());
    let (end, is_ended) = mpsc::channel();
    let (done, is_done) = mpsc::channel();
    let drawn = bar.clone();
    let thread = threads::spawn("progress", move || {
        draw_until(&is_ended, &drawn, &progress, &shared);
        drop(done);
    });
    thread.ok()?;
    *lock(&BAR) = Some(bar);
    Some((end, is_done))
}

fn draw_until(ended: &mpsc::Receiver<()>, bar: &ProgressBar, progress: &Progress, shared: &Mutex<Shown>) {
    let (mut rate, mut page_rate) = (Rate::default(), Rate::default());
    loop {
        let (snapshot, now) = (progress.snapshot(), Instant::now());
        let view = {
            let shown = lock(shared);
            let expected = shown.rounds.latest().filter(|round| round.guest_running && shown.forecast.is_some());
            View {
                rate: rate.at(now, snapshot.bytes()),
                page_rate: page_rate.at(now, snapshot.normal + snapshot.zero),
                after_this_round: match shown.forecast {
                    // It counts from the end of the last round, and this one is a part of it.
                    Some(Forecast::In(time)) => {
                        let this = expected.map_or(Duration::ZERO, |round| forecast::next_round(round, PAGE_SIZE));
                        Some(time.saturating_sub(this))
                    }
                    _ => None,
                },
                is_hopeless: matches!(shown.forecast, Some(Forecast::Never(_))),
                expected_downtime: expected.map(|round| round.expected_downtime),
                snapshot: &snapshot,
            }
        };
        let line = view.line(terminal::width());
        bar.set_style(style(line.bar, whole_of(&snapshot).is_some()));
        if let Some(pages) = whole_of(&snapshot) {
            bar.set_length(pages);
            bar.set_position(snapshot.round_done.min(pages));
        }
        bar.set_prefix(line.prefix);
        bar.set_message(line.message);
        bar.tick();
        if ended.recv_timeout(TICK) == Err(mpsc::RecvTimeoutError::Disconnected) {
            return bar.finish_and_clear();
        }
    }
}

fn style(columns: usize, is_known: bool) -> ProgressStyle {
    let template = match (columns, is_known) {
        (0, true) => "{prefix:>10} {wide_msg}".to_owned(),
        (0, false) => "{prefix:>10} {spinner:.cyan} {wide_msg}".to_owned(),
        (columns, _) => format!("{{prefix:>10}} {{bar:{columns}.cyan/dim}} {{wide_msg}}"),
    };
    ProgressStyle::with_template(&template).expect("the templates above are valid").progress_chars("━╸─")
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

/// Of all guests that this command has.
const PAGE_SIZE: u64 = multifd::checkpoint::PAGE_SIZE as u64;
const TICK: Duration = Duration::from_millis(100);
const LAST_DRAWING: Duration = Duration::from_secs(1);

#[cfg(test)]
mod tests {
    use super::*;
    use crate::args::LogFormat;

    #[test]
    fn nothing_is_shown_elsewhere_than_on_a_terminal_unless_asked_for() {
        let output =
            |progress, quiet| OutputArgs { json: false, verbose: 0, quiet, progress, log_format: LogFormat::Text };
        assert_eq!(Style::of(&output(ProgressMode::Auto, false), true), Style::Bar);
        assert_eq!(Style::of(&output(ProgressMode::Auto, true), true), Style::Nothing);
        assert_eq!(Style::of(&output(ProgressMode::Auto, false), false), Style::Nothing);
        assert_eq!(Style::of(&output(ProgressMode::Always, false), false), Style::Lines);
        assert_eq!(Style::of(&output(ProgressMode::Always, true), true), Style::Bar);
        assert_eq!(Style::of(&output(ProgressMode::Never, false), true), Style::Nothing);
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
