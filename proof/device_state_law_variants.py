"""Device state on its way with a part left out, or done wrong: each has to fail a condition, or is proved and says why it does no harm.

Rows have the names of `multifd-model`'s table of device state, which has the shortest way to the harm of each. A test of that package
demands that none of its rows is missing here. Names in brackets are variants that the bounded model has no row for.
"""

from dataclasses import replace

from z3 import And, BoolVal, If, Not, Or

from device_state_law import (
    AXIOMS,
    B,
    DESTINATION_WORKS,
    DEVICE_STATE_LAW as LAW,
    P,
    PASSED,
    QUEUED,
    ROOM_FOR_A_BATCH,
    SOURCE_WORKS,
    no_packet,
)
from machine import Step, Variant, put

[source_works], [destination_works] = SOURCE_WORKS, DESTINATION_WORKS
[passed] = PASSED


def never(machine, step):
    return machine.with_guard(step, "never", lambda s: BoolVal(False))


def begins_again(s, effect):
    number = If(B, 0, s.next)
    return effect | {"number": put(s.number, (s.saved,), number), "piece": put(s.piece, (number,), s.saved), "next": number + 1}


skip = Step(
    "skip: main goes on without a packet",
    (),
    DESTINATION_WORKS | {"a packet follows": lambda s: And(s.passed, s.given < s.told, s.packed(s.given))},
    lambda s: {"given": s.given + 1, "wanted": s.wanted + 1},
)

VARIANTS = [
    Variant("the destination goes on although a packet is on its way", replace(LAW, steps=[*LAW.steps, skip])),
    Variant("packets are given in the order in which they come", LAW.without("unpack", "it has the number that comes next")),
    Variant(
        "packets are numbered by the channel that writes them",
        LAW.with_effect("write", lambda s, effect: effect | {"number": put(s.number, (P,), s.written), "piece": put(s.piece, (s.written,), P)}),
    ),
    Variant("the numbers of packets begin again with each section", LAW.with_effect("put", begins_again)),
    Variant(
        "channels take the packet that was queued last",
        LAW.with_guard("take", "it is the first there", lambda s: no_packet(s, lambda p: And(s.place(p) == QUEUED, p > P))),
    ),
    Variant("channels do not wait for room", LAW.without("head", "there is room for it")),
    Variant("main speaks of packets when more are queued than there is room for", replace(LAW, axioms=AXIOMS)),
    Variant("channels end when the queue is empty", LAW.without("over", "no packet follows, or it takes none")),
    Variant("main does not say that no packet follows", never(LAW, "close")),
    Variant("the window is not told that a channel has ended", LAW.with_effect("leave", lambda s, effect: effect | {"window_ended": s.window_ended})),
    Variant("an end within a packet counts as one between two", LAW.with_effect("leave", lambda s, effect: effect | {"refused": Not(s.passed)})),
    Variant("no barrier behind the last round, devices on main", LAW.without("give", passed)),
    Variant(
        "the same, devices in packets",
        never(LAW, "sync").without("flush", "every channel has written its last SYNC").without("take", "it has written its last SYNC"),
    ),
    Variant(
        "a checkpoint takes what looks like the end for the end",
        LAW.without("ready", "main is done with all words").with_guard("ready", "it is written", lambda s: Or(s.ended, And(s.given < s.told, Not(s.packed(s.given))))),
    ),
    Variant(
        "channels take state before the last round is over",
        LAW.without("head", "all have passed the barrier"),
        harmless="main comes to it behind the barrier",
    ),
    Variant(
        "the source writes GO without having joined its channels",
        LAW.without("go", "every channel has ended"),
        harmless="READY came when all was loaded",
    ),
    Variant(
        "the source goes on without PONG",
        LAW.without("last", "PONG has come for all of it"),
        harmless="main reads FLUSH behind that state; but the pause has the loading in it",
    ),
    # The end.
    Variant("[the destination is ready before it has given all]", LAW.without("ready", "main is done with all words")),
    Variant("[the destination is ready without having read the end]", LAW.without("ready", "it is written")),
    Variant(
        "[the destination does not look whether packets are left]",
        LAW.without("ready", "no packet is left in the window"),
        harmless="a source that keeps the rules has none: their numbers are below the next; it is there for one that does not",
    ),
    Variant("[GO is written without READY]", LAW.without("go", "READY has come")),
    Variant("[GO is written by a source that has given up]", LAW.without("go", source_works)),
    Variant("[the source takes the guest back behind GO]", LAW.with_effect("fail", lambda s, effect: {"resumed": BoolVal(True)})),
    Variant("[the destination starts without GO]", LAW.without("start", "GO has come")),
    Variant("[the destination starts although it has given up]", LAW.without("start", destination_works)),
    Variant("[the end is written before main has spoken of all]", LAW.without("end", "all is told")),
    # Packets on channels.
    Variant("[a packet is taken by two channels]", LAW.without("take", "it is in the queue")),
    Variant("[a channel takes a packet while it holds one]", LAW.without("take", "it holds none")),
    Variant("[a channel begins a packet within another]", LAW.without("head", "the channel is done with the one before")),
    Variant("[a channel ends while it holds a packet]", LAW.without("over", "it holds none")),
    Variant("[a packet comes whole although its connection is dead]", LAW.without("come", "its connection is alive"), harmless="a loss that comes later is the same"),
    Variant("[no channel takes packets]", replace(LAW, axioms=[*AXIOMS[1:], ROOM_FOR_A_BATCH])),
    Variant("[a lost packet is not missed]", never(LAW, "miss")),
    Variant("[a piece of the running guest is saved behind the last round's FLUSH]", LAW.without("live", "the last round is not open")),
]
