//! `--report`: a page about one migration, to read in a browser afterwards.
//!
//! One file, made of the same object that `--json` prints. It loads nothing and runs nothing; what came from a peer is text in it.

mod chart;
mod clients;

use std::{io, path::Path};

use serde_json::{Map, Value};

use self::{
    chart::{bars, split},
    clients::clients,
};
use crate::{replace, report::Outcome, table};

/// Writes the page about `outcome` to `path`, which appears complete or not at all.
///
/// # Errors
/// The kernel's.
pub fn write(path: &Path, verb: &str, outcome: &Outcome) -> io::Result<()> {
    replace::file(path, page(verb, &outcome.json()).as_bytes())
}

/// The page about the report of `verb`.
fn page(verb: &str, report: &Value) -> String {
    let empty = Map::new();
    let report = report.as_object().unwrap_or(&empty);
    let status = text(report, "status");
    let mut page = format!(
        "<!DOCTYPE html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\">\n\
         <meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">\n\
         <meta name=\"viewport\" content=\"width=device-width\">\n<title>multifd {verb}: {status}</title>\n\
         <style>{STYLE}</style>\n</head>\n<body>\n<h1>multifd {verb} <span class=\"{status}\">{status}</span></h1>\n"
    );
    if report.contains_key("error") {
        page.push_str(&format!("<p class=\"error\">{}</p>\n", text(report, "error")));
    }
    page.push_str(&summary(report));
    page.push_str(&downtime(report));
    page.push_str(&rounds(report));
    page.push_str(&channels(report));
    page.push_str(&faults(report));
    page.push_str(&clients(report));
    page.push_str("</body>\n</html>\n");
    page
}

/// The main figures.
fn summary(report: &Map<String, Value>) -> String {
    let mut tiles = Vec::new();
    let time = |name: &str| number(report, name).map(|us| table::milliseconds(us / 1e3));
    for (label, value) in [
        ("total time", time("total-time-us")),
        ("downtime", time("downtime-us")),
        ("set-up", time("setup-time-us")),
        ("machine", report.get("machine").and_then(Value::as_str).map(escaped)),
        ("guest", report.get("guest").and_then(Value::as_str).map(escaped)),
        ("compression", report.get("compression").and_then(Value::as_str).map(escaped)),
    ] {
        tiles.extend(value.map(|value| (label, value)));
    }
    if let Some(ram) = report.get("ram").and_then(Value::as_object) {
        let bytes = |name| table::bytes(number(ram, name).unwrap_or_default() as u64);
        let count = |name| table::grouped(number(ram, name).unwrap_or_default() as u64);
        tiles.push(("transferred", format!("{} of {}", bytes("transferred"), bytes("total"))));
        tiles.push(("rate", format!("{:.0} Mbit/s", number(ram, "mbps").unwrap_or_default())));
        tiles.push(("pages with content", count("normal")));
        tiles.push(("zero pages", count("duplicate")));
        tiles.push(("rounds", count("dirty-sync-count")));
    }
    let tiles: Vec<String> =
        tiles.iter().map(|(label, value)| format!("<div><b>{value}</b><span>{label}</span></div>")).collect();
    format!("<section class=\"tiles\">{}</section>\n", tiles.join(""))
}

/// How the pause was spent.
fn downtime(report: &Map<String, Value>) -> String {
    let Some(parts) = report.get("downtime-parts").and_then(Value::as_object) else { return String::new() };
    let parts: Vec<(String, f64)> =
        parts.iter().map(|(name, time)| (name.replace('-', " "), time.as_f64().unwrap_or_default())).collect();
    format!("<section><h2>Downtime</h2>\n{}</section>\n", split(&parts, table::milliseconds))
}

/// A picture and a table of the rounds.
fn rounds(report: &Map<String, Value>) -> String {
    let rounds: Vec<&Map<String, Value>> =
        report.get("rounds").and_then(Value::as_array).into_iter().flatten().filter_map(Value::as_object).collect();
    if rounds.is_empty() {
        return String::new();
    }
    let of = |name: &str| rounds.iter().map(|round| number(round, name).unwrap_or_default()).collect::<Vec<_>>();
    let names: Vec<String> = rounds
        .iter()
        .map(|round| match round.get("guest-running") {
            Some(Value::Bool(false)) => "pause".to_owned(),
            _ => number(round, "round").unwrap_or_default().to_string(),
        })
        .collect();
    let pages = |value: f64| table::grouped(value as u64);
    let charts = [
        bars("Dirty pages", &names, &of("dirty-pages"), pages),
        bars("Pages sent with content", &names, &of("normal"), pages),
        bars("Time", &names, &of("time"), table::milliseconds),
        bars(
            "Time at the barrier, from the first channel to the last",
            &names,
            &of("barrier-time"),
            table::milliseconds,
        ),
    ];
    let head =
        ["round", "dirty", "content", "zero", "bytes", "time", "barrier", "written", "expected downtime", "throttle"];
    let row = |(round, name): (&&Map<String, Value>, &String)| {
        let count = |field| number(round, field).map_or_else(String::new, |value| table::grouped(value as u64));
        let time = |field, scale: f64| {
            number(round, field).map_or_else(String::new, |value| table::milliseconds(value / scale))
        };
        let cells = [
            name.clone(),
            count("dirty-pages"),
            count("normal"),
            count("duplicate"),
            table::bytes(number(round, "bytes").unwrap_or_default() as u64),
            time("time", 1.0),
            time("barrier-time", 1.0),
            count("dirty-after"),
            time("expected-downtime-us", 1e3),
            number(round, "throttle").map_or_else(String::new, |percent| format!("{percent} %")),
        ];
        format!("<tr><td>{}</td></tr>\n", cells.join("</td><td>"))
    };
    let rows: String = rounds.iter().zip(&names).map(row).collect();
    format!(
        "<section><h2>Rounds</h2>\n{}<details{}><summary>All figures</summary><table><tr><th>{}</th></tr>\n{rows}</table></details>\
         </section>\n",
        charts.concat(),
        if rounds.len() <= 30 { " open" } else { "" },
        head.join("</th><th>"),
    )
}

/// How much each channel moved, and how fast.
fn channels(report: &Map<String, Value>) -> String {
    let bytes: Vec<f64> =
        report.get("channel-bytes").and_then(Value::as_array).into_iter().flatten().filter_map(Value::as_f64).collect();
    let seconds = number(report, "total-time-us").unwrap_or_default() / 1e6;
    if bytes.is_empty() || seconds <= 0.0 {
        return String::new();
    }
    let names: Vec<String> = (0..bytes.len()).map(|channel| channel.to_string()).collect();
    let rates: Vec<f64> = bytes.iter().map(|bytes| bytes / seconds).collect();
    let charts = [
        bars("Bytes on each channel", &names, &bytes, |value| table::bytes(value as u64)),
        bars("Rate of each channel over the whole time", &names, &rates, |value| {
            format!("{}/s", table::decimal_bytes(value))
        }),
    ];
    format!("<section><h2>Channels</h2>\n{}</section>\n", charts.concat())
}

/// How long a guest at the destination waited for its pages.
fn faults(report: &Map<String, Value>) -> String {
    let Some(postcopy) = report.get("postcopy").and_then(Value::as_object) else { return String::new() };
    let latency = postcopy.get("request-latency-us").and_then(Value::as_object);
    let rows: String = postcopy
        .iter()
        .filter(|(_, value)| value.is_number())
        .map(|(name, value)| format!("<tr><td>{}</td><td>{value}</td></tr>\n", name.replace('-', " ")))
        .collect();
    let names: Vec<String> = ["p50", "p99", "max"].map(str::to_owned).to_vec();
    let times: Vec<f64> =
        names.iter().map(|name| latency.and_then(|latency| number(latency, name)).unwrap_or_default()).collect();
    let chart = bars("From a request until its page was written", &names, &times, |us| table::milliseconds(us / 1e3));
    format!("<section><h2>Postcopy</h2>\n{chart}<table>{rows}</table></section>\n")
}

fn number(object: &Map<String, Value>, name: &str) -> Option<f64> {
    object.get(name).and_then(Value::as_f64)
}

fn text(object: &Map<String, Value>, name: &str) -> String {
    escaped(object.get(name).and_then(Value::as_str).unwrap_or_default())
}

/// `text` as text of a page, whatever it says.
fn escaped(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '&' => out.push_str("&amp;"),
            '<' => out.push_str("&lt;"),
            '>' => out.push_str("&gt;"),
            '"' => out.push_str("&quot;"),
            '\'' => out.push_str("&#39;"),
            c => out.push(c),
        }
    }
    out
}

const STYLE: &str = include_str!("style.css");

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn what_a_peer_says_is_text() {
        let report = json!({ "status": "failed", "error": "<script>\"'&", "machine": "<img src=x>" });
        let page = page("receive", &report);
        assert!(page.contains("&lt;script&gt;&quot;&#39;&amp;") && page.contains("&lt;img src=x&gt;"), "{page}");
        assert!(!page.contains("<script") && !page.contains("<img"), "{page}");
        assert!(!page.contains("http://") && !page.contains("https://"), "{page}");
    }

    #[test]
    fn a_page_has_all_that_the_report_has() {
        let round = |round: u64| {
            json!({ "round": round, "dirty-pages": 10, "normal": 5, "duplicate": 5, "bytes": 20_480, "time": 1.5,
                "barrier-time": 0.25, "guest-running": round == 0, "dirty-after": 3, "throttle": 0 })
        };
        let report = json!({
            "status": "completed", "total-time-us": 2_000_000, "downtime-us": 1500,
            "downtime-parts": { "pause": 0.5, "last-round": 1.0 },
            "ram": { "transferred": 1, "total": 2, "normal": 3, "duplicate": 4, "dirty-sync-count": 2, "mbps": 1.0 },
            "rounds": [round(0), round(1)], "channel-bytes": [4_000_000, 2_000_000],
            "postcopy": { "requests": 9, "request-latency-us": { "p50": 100, "p99": 200, "max": 3000 } },
        });
        let page = page("demo", &report);
        for part in
            ["1.5 ms", "last round", "Dirty pages", "barrier", "2.0 MB/s", "Postcopy", "3.0 ms", "<td>pause</td>"]
        {
            assert!(page.contains(part), "{part}: {page}");
        }
        assert!(!page.contains("NaN") && !page.contains("inf"), "{page}");
    }

    #[test]
    fn a_report_without_a_migration_is_a_page_too() {
        let page = page("send", &json!({ "status": "failed", "error": "no" }));
        assert!(page.contains("<p class=\"error\">no</p>") && page.ends_with("</html>\n"), "{page}");
    }
}
