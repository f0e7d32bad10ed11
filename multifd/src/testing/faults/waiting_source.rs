//! A source that may not switch over before it is told so.

use multifd_proto::{packet::PacketHeader, return_path::Message};

use super::script::*;
use crate::destination::{Options, SwitchoverAck};

/// A source of a machine type that says nothing about the message, with `parts` sections in which main has no page.
fn answers(parts: usize, machine: &str, switchover_ack: SwitchoverAck) -> Vec<Message> {
    answers_to(parts, machine, switchover_ack, &Wire::channel(0).sync().sync())
}

/// The same, with `channel` beside main.
fn answers_to(parts: usize, machine: &str, switchover_ack: SwitchoverAck, channel: &Wire) -> Vec<Message> {
    let mut main = Wire::from_encoder(main_start_of(machine).flush().eos().footer(1));
    for _ in 0..parts {
        let mut encoder = multifd_proto::encoder::MainEncoder::default();
        main = main.then(encoder.ram_part(1, false).eos().footer(1).bytes.as_slice());
    }
    let wires = [main.then(&main_end().bytes), channel.clone()];
    let received = receive(&wires, Options { switchover_ack, ..Options::default() });
    received.outcome.unwrap();
    received.answers
}

#[test]
fn a_source_that_waits_for_the_permission_to_switch_over_gets_it_once() {
    for machine in ["multifd", "pc-i440fx-7.2"] {
        // Enough of them that the channel's packet is read before the last, on a busy machine, too.
        let answers = answers(50_000, machine, SwitchoverAck::Auto);
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

/// QEMU 7.2 makes room in its SYNC packets. It does not know the message and would fail.
#[test]
fn a_source_like_qemu_7_2_is_not_given_permission() {
    let mut sync = packet(&PacketHeader::sync_packet(0));
    sync[12..16].copy_from_slice(&128u32.to_be_bytes());
    let channel = Wire::channel(0).then(&sync).then(&sync);
    assert_eq!(answers_to(5000, "pc-i440fx-7.2", SwitchoverAck::Auto, &channel), [Message::Shut(0)]);
}

/// Each round has a page, on a channel: such a source has something to send, and does not wait.
#[test]
fn a_source_whose_pages_come_on_channels_is_not_given_permission() {
    let mut main = Wire::from_encoder(main_start().flush().eos().footer(1));
    let mut channel = Wire::channel(0).sync().sync();
    for _ in 0..600 {
        let mut encoder = multifd_proto::encoder::MainEncoder::default();
        main = main.then(encoder.ram_part(1, false).flush().eos().footer(1).bytes.as_slice());
        channel = channel.then(pages(&[0])).sync();
    }
    let wires = [main.then(&main_end().bytes), channel];
    let received = receive(&wires, Options::default());
    received.outcome.unwrap();
    assert_eq!(received.answers, [Message::Shut(0)]);
}
