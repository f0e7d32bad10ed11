//! A source that may not switch over before it is told so.

use multifd_proto::return_path::Message;

use super::script::*;
use crate::destination::{Options, SwitchoverAck};

/// A source of a machine type that says nothing about the message, with `parts` sections in which main has no page.
fn answers(parts: usize, machine: &str, switchover_ack: SwitchoverAck) -> Vec<Message> {
    let mut main = Wire::from_encoder(main_start_of(machine).flush().eos().footer(1));
    for _ in 0..parts {
        let mut encoder = multifd_proto::encoder::MainEncoder::new();
        main = main.then(encoder.ram_part(1, false).eos().footer(1).as_bytes());
    }
    let wires = [main.then(main_end().as_bytes()), Wire::channel(0).sync().sync()];
    let received = receive(&wires, Options { switchover_ack, ..Options::default() });
    received.outcome.unwrap();
    received.answers
}

#[test]
fn a_source_that_waits_for_the_permission_to_switch_over_gets_it_once() {
    for machine in ["multifd", "pc-i440fx-7.2"] {
        let answers = answers(5000, machine, SwitchoverAck::Auto);
        assert_eq!(answers, [Message::SwitchoverAck, Message::Shut(0)], "{machine}");
    }
}

/// It failed every migration of QEMU 11.1 with a machine type of its own.
#[test]
fn a_source_that_does_not_wait_is_not_given_permission() {
    assert_eq!(answers(20, "pc-i440fx-7.2", SwitchoverAck::Auto), [Message::Shut(0)]);
    assert_eq!(answers(5000, "pc-i440fx-11.1", SwitchoverAck::Auto), [Message::Shut(0)]);
    assert_eq!(answers(5000, "pc-i440fx-7.2", SwitchoverAck::Never), [Message::Shut(0)]);
}
