//! The server as clients see it: well-behaved ones, and those that break rules.

use std::{
    io::{BufRead, BufReader, Read, Write},
    os::unix::net::UnixStream,
    path::PathBuf,
};

use test_support::{TempDir, time_limit};

use super::*;
use crate::Client;

const LIMIT: Duration = Duration::from_secs(60);

struct Echo;

impl Handler for Echo {
    fn commands(&self) -> &'static [&'static str] {
        &["echo", "pause", "stop"]
    }

    fn out_of_band(&self) -> &'static [&'static str] {
        &["pause"]
    }

    fn execute(&self, command: &str, mut arguments: Arguments) -> Result<Value, CommandError> {
        match command {
            "echo" => {
                let text = arguments.text("text")?.ok_or_else(|| Arguments::missing("text"))?;
                arguments.end()?;
                Ok(json!({ "text": text }))
            }
            "pause" => arguments.end().map(|()| json!({})),
            _ => Err(CommandError::generic("it does not stop")),
        }
    }
}

fn server(dir: &TempDir) -> (Server, PathBuf) {
    let path = dir.join("qmp");
    let listener = UnixListener::bind(&path).unwrap();
    (Server::start(listener, Version::new(10, 0, 2), "test", Arc::new(Echo)).unwrap(), path)
}

/// The answers to `lines`, each with its events left out.
fn answers(path: &PathBuf, bytes: &[u8], count: usize) -> Vec<Value> {
    let mut stream = UnixStream::connect(path).unwrap();
    stream.write_all(bytes).unwrap();
    let lines = BufReader::new(stream).lines();
    lines.take(count + 1).skip(1).map(|line| serde_json::from_str(&line.unwrap()).unwrap()).collect()
}

#[test]
fn a_client_negotiates_runs_commands_and_sees_events() {
    time_limit(LIMIT, || {
        let dir = TempDir::new().unwrap();
        let (server, path) = server(&dir);
        let mut client = Client::builder().out_of_band().connect(&path).unwrap();
        assert_eq!((client.version(), client.is_out_of_band()), (Version::new(10, 0, 2), true));
        assert_eq!(client.execute("echo", json!({ "text": "x" })).unwrap(), json!({ "text": "x" }));
        assert_eq!(client.execute_out_of_band("pause", json!({})).unwrap(), json!({}));
        let in_band = client.execute_out_of_band("stop", json!({})).unwrap_err();
        assert_eq!(in_band.to_string(), "stop: GenericError: The command stop does not support OOB");
        assert_eq!(client.stop().unwrap_err().to_string(), "stop: GenericError: it does not stop");
        server.emit("STOP", None);
        server.emit("MIGRATION", Some(json!({ "status": "setup" })));
        assert_eq!(client.next_event(LIMIT).unwrap().name, "STOP");
        let event = client.next_event(LIMIT).unwrap();
        assert_eq!(event.data, json!({ "status": "setup" }));
        assert!(event.timestamp["seconds"].as_u64().unwrap() > 1_000_000_000);
        let names = client.run(qapi_qmp::query_commands {}).unwrap();
        assert!(names.iter().any(|command| command.name == "echo"));
        assert_eq!(client.run(qapi_qmp::query_version {}).unwrap().qemu.major, 10);
        assert!(server.has_clients() && !server.wait_clients(Duration::from_millis(20)));
        drop(client);
        assert!(server.wait_clients(LIMIT));
    });
}

/// The words of a QEMU 10.0.2, and its classes.
#[test]
fn what_is_wrong_is_said_in_the_words_of_qemu() {
    time_limit(LIMIT, || {
        let dir = TempDir::new().unwrap();
        let (_server, path) = server(&dir);
        let cases: &[(&str, &str)] = &[
            (r#"{"execute": "qmp_capabilities"}"#, "Capabilities negotiation is already complete, command ignored"),
            (r#"{"execute": "nonesuch"}"#, "The command nonesuch has not been found"),
            (r#"{"execute": "echo"}"#, "Parameter 'text' is missing"),
            (r#"{"execute": "echo", "arguments": {"text": 5}}"#, "Invalid parameter type for 'text', expected: string"),
            (r#"{"execute": "echo", "arguments": {"text": "", "foo": 1}}"#, "Parameter 'foo' is unexpected"),
            (r#"{"a": 1}"#, "QMP input member 'a' is unexpected"),
            (r#"{"execute": 3}"#, "QMP input member 'execute' must be a string"),
            (r#"{"exec-oob": "stop"}"#, "QMP input member 'exec-oob' is unexpected"),
            (r#"{"execute": "stop", "arguments": 3}"#, "QMP input member 'arguments' must be an object"),
            (r#"{"execute": "stop", "extra": 1}"#, "QMP input member 'extra' is unexpected"),
            ("garbage", "JSON parse error, invalid keyword 'garbage'"),
        ];
        let mut bytes = br#"{"execute": "qmp_capabilities"}"#.to_vec();
        cases.iter().for_each(|(line, _)| bytes.extend(format!("{line}\n").bytes()));
        let answers = answers(&path, &bytes, 1 + cases.len());
        for ((line, expected), answer) in cases.iter().zip(&answers[1..]) {
            assert_eq!(answer["error"]["desc"], *expected, "{line}");
            let not_found = line.contains("nonesuch") || line.contains("qmp_capabilities");
            let class = if not_found { "CommandNotFound" } else { "GenericError" };
            assert_eq!(answer["error"]["class"], class, "{line}");
        }
    });
}

#[test]
fn commands_before_the_negotiation_are_refused_and_ids_come_back() {
    time_limit(LIMIT, || {
        let dir = TempDir::new().unwrap();
        let (_server, path) = server(&dir);
        // Without a newline between them, as clients may send them.
        let bytes = br#"{"execute": "stop", "id": [1]}{"execute": "qmp_capabilities",
            "arguments": {"enable": ["oob"]}, "id": {"a": 2}}{"exec-oob": "stop", "id": "x"}"#;
        let answers = answers(&path, bytes, 3);
        assert_eq!(answers[0]["error"]["class"], "CommandNotFound");
        assert_eq!(answers[0]["id"], json!([1]));
        assert_eq!(answers[1], json!({ "return": {}, "id": { "a": 2 } }));
        assert_eq!(answers[2]["error"]["desc"], "The command stop does not support OOB");
    });
}

#[test]
fn a_command_without_an_end_closes_the_connection() {
    time_limit(LIMIT, || {
        let dir = TempDir::new().unwrap();
        let (_server, path) = server(&dir);
        let mut stream = UnixStream::connect(&path).unwrap();
        // Fails as soon as the server has had enough.
        while stream.write_all(&[b'{'; 4096]).is_ok() {}
        let mut client = Client::connect(&path).unwrap();
        client.execute("echo", json!({ "text": "others are served" })).unwrap();
    });
}

/// Its events would fill our memory, and its answers hold up its thread.
#[test]
fn a_client_that_does_not_read_loses_its_connection_and_delays_no_one() {
    time_limit(LIMIT, || {
        let dir = TempDir::new().unwrap();
        let (server, path) = server(&dir);
        let mut lazy = UnixStream::connect(&path).unwrap();
        lazy.write_all(br#"{"execute": "qmp_capabilities"}"#).unwrap();
        while !server.has_clients() {
            thread::sleep(Duration::from_millis(1));
        }
        while server.has_clients() {
            server.emit("EVENT", Some(json!({ "text": "x".repeat(1000) })));
        }
        let mut rest = Vec::new();
        lazy.read_to_end(&mut rest).unwrap();
        assert!(rest.len() < 4 << 20);
    });
}

#[test]
fn more_clients_than_there_may_be_are_closed() {
    time_limit(LIMIT, || {
        let dir = TempDir::new().unwrap();
        let (server, path) = server(&dir);
        let clients: Vec<_> = (0..MOST_CLIENTS).map(|_| Client::connect(&path).unwrap()).collect();
        assert!(matches!(Client::connect(&path), Err(crate::Error::Closed { .. })));
        drop(clients);
        assert!(server.wait_clients(LIMIT));
        Client::connect(&path).unwrap();
    });
}
