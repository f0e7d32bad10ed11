"""What packet numbers prove, with a part left out, or done wrong: each has to fail a condition, or is proved and says why it does no harm.

Names in brackets are variants that the bounded model has no row for; the others are in its table, and in the round law's.
"""

from z3 import And, If, Or

from machine import Variant, put
from membership import C, MEMBERSHIP as MACHINE, balance, channels, higher, numbered

BALANCED = "the numbers of a round with pages balance"
ALL_ENDED = "all that have joined have ended it"


def after_set_up(holds):
    return lambda s: Or(s.at == 0, holds(s))


VARIANTS = [
    # The destination.
    Variant(
        "those that have come at the first sync point are taken for all",
        MACHINE.with_effect("pass", lambda s, effect: effect | {"known": True, "proved_at": If(s.known, s.proved_at, s.highest + 1)}),
    ),
    Variant("those that have come at the second sync point are taken for all", MACHINE.without("pass", BALANCED)),
    Variant(
        "the first SYNC of a late channel counts for the current round",
        MACHINE.with_effect("join", lambda s, effect: effect | {"taken": put(s.taken, (s.joined,), s.at + 1), "away_before": s.away_before}),
    ),
    Variant("[a round ends while a channel is on its way]", MACHINE.without("pass", ALL_ENDED)),
    Variant("[a round with pages ends without any channel]", MACHINE.without("pass", "a round with pages has channels")),
    Variant("[a number is left over, and the round ends]", MACHINE.with_guard("pass", BALANCED, after_set_up(lambda s: And(0 <= balance(s), balance(s) <= 1)))),
    Variant("[packets with pages that are SYNCs, too, are not counted]", MACHINE.with_effect("arrive", lambda s, effect: effect | {"packets": s.packets})),
    Variant(
        "[the last number of a round counts, and not the highest]",
        MACHINE.with_effect("arrive", lambda s, effect: effect | {"highest": s.number(C, s.taken(C))}),
    ),
    Variant(
        "[the SYNC of a late channel is counted twice]",
        MACHINE.with_effect("join", lambda s, effect: effect | {"packets": effect["packets"] + 1}),
    ),
    # The source.
    Variant(
        "[a round opens before every channel has ended the one before]",
        MACHINE.without("open", "every channel has written SYNC of the round").with_guard(
            "open", "some channel has written SYNC of the round", lambda s: s.sent(0) == s.round + 1
        ),
    ),
    Variant("[a channel sends pages behind its SYNC]", MACHINE.with_guard("pack", "the channel has not ended the round", lambda s: And(0 <= C, C < channels, s.sent(C) <= s.round + 1))),
    Variant("[a SYNC takes no number]", MACHINE.with_effect("sync", lambda s, effect: effect | {name: getattr(s, name) for name in numbered(s)})),
    Variant("[a packet takes two numbers]", MACHINE.with_effect("pack", lambda s, effect: effect | {"next": s.next + 2})),
    # Harmless.
    Variant(
        "[the set-up has pages]",
        MACHINE.without("pack", "the set-up has no pages"),
        harmless="numbers balance all the same; that no barrier would be between these pages and the next is the round law's",
    ),
    Variant(
        "[numbers below 0 end a round, too]",
        MACHINE.with_guard("pass", BALANCED, after_set_up(lambda s: balance(s) <= 0)),
        harmless="of a source that counts like this the balance is never below 0",
    ),
    Variant(
        "[the first number of a late channel counts for the highest]",
        MACHINE.with_effect("join", lambda s, effect: effect | {"highest": If(And(s.at > 0, s.highest < 0), s.highest, higher(s, s.number(s.joined, 0)))}),
        harmless="those that have ended the round have higher ones",
    ),
]
