//! What is to be seen of a migration from the side: metrics, the log, threads, and the report to read afterwards.

mod common;

use std::{
    fs,
    io::{Read, Write},
    net::TcpStream,
    path::Path,
    process::{Command, Stdio},
    time::{Duration, Instant},
};

use serde_json::Value;
use test_support::{TempDir, in_ci, skip, time_limit};

use common::{Guest, LIMIT, exit_code, number, python, run};

const SMALL: &str = "--guest process --memory 32MiB --working-set 4MiB --write-rate 20MB/s";

/// A client of HTTP: the status line and the body; nothing where the server hangs up.
fn ask(address: &str, request: &str) -> Option<(String, String)> {
    let mut stream = TcpStream::connect(address).ok()?;
    stream.set_read_timeout(Some(LIMIT)).unwrap();
    stream.write_all(request.as_bytes()).ok()?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer).ok()?;
    let (head, body) = answer.split_once("\r\n\r\n")?;
    Some((head.lines().next()?.to_owned(), body.to_owned()))
}

const SCRAPE: &str = "GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n";

/// The value of the sample that begins with `name`.
#[track_caller]
fn sample(metrics: &str, name: &str) -> f64 {
    let line = metrics.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
    line.unwrap_or_else(|| panic!("no {name} in {metrics}")).parse().unwrap()
}

/// Where `guest` serves its metrics.
#[track_caller]
fn address(guest: &Guest) -> String {
    let deadline = Instant::now() + LIMIT;
    loop {
        let stderr = guest.stderr();
        if let Some(at) = stderr.lines().find_map(|line| line.strip_prefix("metrics on tcp:")) {
            return at.to_owned();
        }
        assert!(Instant::now() < deadline, "{stderr}");
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// Has a program that was not written here read `metrics`; `false` where it cannot be had.
#[track_caller]
fn is_read_by_prometheus(metrics: &str) -> bool {
    let python = match python::with("prometheus_client==0.21.1", "prometheus_client") {
        Ok(python) => python,
        Err(reason) if in_ci() => panic!("prometheus_client cannot be installed from PyPI: {reason}"),
        Err(reason) => {
            skip(&format!("prometheus_client cannot be installed from PyPI: {reason}"));
            return false;
        }
    };
    let script = "import sys\n\
                  from prometheus_client.parser import text_string_to_metric_families as families\n\
                  for family in families(sys.stdin.read()):\n    \
                  assert family.documentation and family.type in ('counter', 'gauge'), family\n    \
                  for sample in family.samples: print(sample.name, sample.labels, sample.value)\n";
    let mut child =
        Command::new(python).args(["-c", script]).stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
    child.stdin.take().unwrap().write_all(metrics.as_bytes()).unwrap();
    let output = child.wait_with_output().unwrap();
    assert!(output.status.success(), "{metrics}");
    let read = String::from_utf8(output.stdout).unwrap();
    let samples = metrics.lines().filter(|line| !line.starts_with('#')).count();
    assert_eq!(read.lines().count(), samples, "{read}");
    true
}

#[test]
fn metrics_over_http_follow_a_migration_and_clients_cannot_disturb_it() {
    time_limit(LIMIT, || {
        let dir = TempDir::new().unwrap();
        let observed = format!("{SMALL} --metrics tcp:127.0.0.1:0");
        let (destination, uri) = Guest::incoming(dir.path(), "destination", &observed);
        let source = Guest::start(dir.path(), "source", &format!("{observed} --channels 2 --max-bandwidth 8MB/s"));
        let (here, there) = (address(&source), address(&destination));
        let (status, before) = ask(&here, SCRAPE).unwrap();
        assert_eq!(
            (status.as_str(), sample(&before, "multifd_migrations_total{status=\"completed\"}")),
            ("HTTP/1.1 200 OK", 0.0)
        );
        source.wait_for(|status| number(status, "/passes") > 0.0);
        // Each takes a place and says nothing.
        let silent: Vec<TcpStream> = (0..20).map(|_| TcpStream::connect(&here).unwrap()).collect();
        source.ask("migrate", serde_json::json!({ "uri": uri })).unwrap();
        source.wait_for(|status| status["state"] == "outgoing");
        drop(silent);
        let deadline = Instant::now() + LIMIT;
        let rounds = "multifd_phase_seconds_total{role=\"source\",phase=\"rounds\"}";
        let during = loop {
            match ask(&here, SCRAPE) {
                Some((_, metrics)) if metrics.contains(rounds) && sample(&metrics, rounds) > 0.0 => break metrics,
                _ => assert!(Instant::now() < deadline),
            }
            std::thread::sleep(Duration::from_millis(10));
        };
        assert!(during.contains("multifd_channel_bytes_total{role=\"source\",channel=\"1\"}"), "{during}");
        assert_eq!(sample(&during, "multifd_active{role=\"source\"}"), 1.0, "{during}");
        destination.wait_for(|status| status["state"] == "running");
        let (_, after) = ask(&there, SCRAPE).unwrap();
        assert_eq!(sample(&after, "multifd_migrations_total{status=\"completed\"}"), 1.0, "{after}");
        for (request, status) in [
            ("GET /nonesuch HTTP/1.1\r\n\r\n", Some("HTTP/1.1 404 Not Found")),
            ("POST /metrics HTTP/1.1\r\n\r\n", Some("HTTP/1.1 405 Method Not Allowed")),
            (&"x".repeat(20_000), None),
        ] {
            let answer = ask(&there, request).map(|(status, _)| status);
            assert_eq!(answer.as_deref(), status, "{request:.50}");
        }
        let (exit, report) = source.end();
        assert_eq!(exit, 0, "{report}");
        for (kind, name) in [("normal", "normal"), ("zero", "duplicate")] {
            let pages = sample(&after, &format!("multifd_pages_total{{role=\"destination\",kind=\"{kind}\"}}"));
            assert_eq!(pages, number(&report, &format!("/ram/{name}")), "{after}");
        }
        is_read_by_prometheus(&during);
        destination.ask("quit", Value::Null);
    });
}

#[test]
fn metrics_in_a_file_end_with_the_end_of_the_migration() {
    time_limit(LIMIT, || {
        let dir = TempDir::new().unwrap();
        let file = dir.join("multifd.prom");
        let report = dir.join("report.html");
        let output = run(&format!(
            "demo {SMALL} --after 0 --json --metrics file:{} --report {}",
            file.display(),
            report.display()
        ));
        assert_eq!(exit_code(&output), 0, "{}", String::from_utf8_lossy(&output.stderr));
        let metrics = fs::read_to_string(&file).unwrap();
        assert_eq!(sample(&metrics, "multifd_migrations_total{status=\"completed\"}"), 1.0, "{metrics}");
        // Of both ends, though only one of them can be looked at while the other is.
        for role in ["source", "destination"] {
            assert_eq!(sample(&metrics, &format!("multifd_phase{{role=\"{role}\",phase=\"done\"}}")), 1.0, "{metrics}");
            assert!(sample(&metrics, &format!("multifd_pages_total{{role=\"{role}\",kind=\"normal\"}}")) > 0.0);
        }
        is_read_by_prometheus(&metrics);
        assert!(fs::read_to_string(&report).unwrap().contains("<h2>Rounds</h2>"));
        // The files that take their places are gone.
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 2);
        // Nothing that cannot be begun with is begun.
        let output = run("receive unix:/nonesuch --output /nonesuch --metrics file:/nonesuch/x --json");
        assert_eq!(exit_code(&output), 1);
        let error = common::json(&output.stdout)["error"].to_string();
        assert!(error.contains("--metrics file:/nonesuch/x"), "{error}");
    });
}

/// The names of the threads of process `pid`.
fn threads(pid: i32) -> Vec<String> {
    let tasks = fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten().flatten();
    tasks
        .filter_map(|task| fs::read_to_string(task.path().join("comm")).ok())
        .map(|name| name.trim().to_owned())
        .collect()
}

#[test]
fn threads_and_the_log_say_which_channel_they_belong_to() {
    time_limit(LIMIT, || {
        let dir = TempDir::new().unwrap();
        let log = format!("{SMALL} --log-format json -vv");
        let (destination, uri) = Guest::incoming(dir.path(), "destination", &log);
        let source =
            Guest::start(dir.path(), "source", &format!("{log} --channels 3 --max-bandwidth 4MB/s --migrate-to {uri}"));
        let deadline = Instant::now() + LIMIT;
        for guest in [&source, &destination] {
            let has_all = |names: &[String]| {
                ["multifd-ch0", "multifd-ch1", "multifd-ch2"].iter().all(|name| names.iter().any(|other| other == name))
            };
            while !has_all(&threads(guest.pid().as_raw_nonzero().get())) {
                assert!(Instant::now() < deadline, "{:?}", threads(guest.pid().as_raw_nonzero().get()));
                std::thread::sleep(Duration::from_millis(10));
            }
        }
        source.ask("migrate_cancel", Value::Null);
        for (guest, role) in [(&source, "source"), (&destination, "destination")] {
            // The line on which it enters the rounds.
            let entered = loop {
                let stderr = guest.stderr();
                let mut events = stderr.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok());
                if let Some(event) = events.find(|event| event["fields"]["phase"] == "rounds") {
                    break event;
                }
                assert!(Instant::now() < deadline, "{stderr}");
                std::thread::sleep(Duration::from_millis(10));
            };
            assert_eq!((&entered["role"], &entered["message"]), (&role.into(), &"enters".into()), "{entered}");
            assert_eq!(entered["pid"], guest.pid().as_raw_nonzero().get(), "{entered}");
        }
        source.kill();
        destination.kill();
    });
}

/// A browser without a window, where there is one.
fn browser() -> Option<&'static str> {
    let names = ["chromium-headless-shell", "chromium", "google-chrome", "chromium-browser"];
    names
        .into_iter()
        .find(|name| Command::new(name).arg("--version").output().is_ok_and(|output| output.status.success()))
}

/// The page as a browser has it after it was read.
fn dom(browser: &str, page: &Path) -> String {
    let mut command = Command::new(browser);
    command
        .args(["--headless", "--no-sandbox", "--disable-gpu", "--dump-dom"])
        .arg(format!("file://{}", page.display()));
    String::from_utf8(command.output().unwrap().stdout).unwrap()
}

/// That was said when the guest was gone, with a status that says that it is not.
#[test]
fn a_report_that_cannot_be_written_is_refused_before_anything_moves() {
    time_limit(LIMIT, || {
        let dir = TempDir::new().unwrap();
        let (at, page) = (dir.join("at"), dir.join("none/report.html"));
        let (at, page) = (at.display(), page.display());
        for verb in [
            format!("guest {SMALL} --incoming unix:{at}"),
            format!("receive unix:{at} --output {}", dir.join("checkpoint").display()),
            format!("serve /dev/null --listen unix:{at}"),
        ] {
            let output = run(&format!("{verb} --report {page} --json"));
            let report: Value = serde_json::from_slice(&output.stdout).unwrap();
            assert_eq!(exit_code(&output), 1, "{report}");
            assert_eq!(report["error"], format!("--report {page}: No such file or directory (os error 2)"));
        }
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
    });
}

#[test]
fn a_browser_shows_the_report() {
    let Some(browser) = browser() else { return skip("no Chromium here") };
    time_limit(LIMIT, || {
        let dir = TempDir::new().unwrap();
        let page = dir.join("report.html");
        let output = run(&format!("demo {SMALL} --after 0 --report {}", page.display()));
        assert_eq!(exit_code(&output), 0, "{}", String::from_utf8_lossy(&output.stderr));
        let dom = dom(browser, &page);
        for part in ["<h2>Downtime</h2>", "<h2>Rounds</h2>", "<h2>Channels</h2>", "<svg", "confirm"] {
            assert!(dom.contains(part), "{part}: {dom}");
        }
    });
}
