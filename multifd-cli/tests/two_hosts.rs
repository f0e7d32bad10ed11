//! A guest that moves between two hosts and back: two network namespaces with a cable between them, and nothing else.

mod common;

use common::{LIMIT, hosts::two_hosts, number};
use serde_json::json;
use test_support::{TempDir, skip, time_limit};

const SMALL: &str = "--guest process --memory 32MiB --working-set 8MiB --channels 3";

#[test]
fn a_guest_moves_to_another_host_and_back() {
    time_limit(LIMIT, || {
        let (left, right) = match two_hosts() {
            Ok(hosts) => hosts,
            Err(reason) => return skip(&reason),
        };
        let dir = TempDir::new().unwrap();
        let mut source = left.guest(dir.path(), "first", SMALL);
        source.wait_for(|status| status["state"] == "running");
        let way = [("there", &left, &right, "192.0.2.2"), ("back", &right, &left, "192.0.2.1")];
        for (name, from, to, address) in way {
            let destination = to.guest(dir.path(), name, &format!("{SMALL} --incoming tcp:{address}:0"));
            let uri = destination.listening();
            assert!(uri.starts_with(&format!("tcp:{address}:")), "{uri}");
            let before = from.sent("cable");
            source.ask("migrate", json!({ "uri": uri })).unwrap();
            let (exit, report) = source.end();
            assert_eq!((exit, &report["status"]), (0, &json!("completed")), "{name}: {report}");
            let (sent, transferred) = (from.sent("cable") - before, number(&report, "/ram/transferred"));
            assert!(transferred > 8e6 && sent as f64 >= transferred, "{name}: {sent} of {transferred} bytes by cable");
            destination.runs_on();
            source = destination;
        }
        assert!(source.ask("quit", json!({})).unwrap().get("return").is_some());
        let (exit, report) = source.end();
        assert_eq!(exit, 0, "{report}");
        assert_eq!(number(&report, "/guest-errors") + number(&report, "/pages-wrong"), 0.0);
    });
}
