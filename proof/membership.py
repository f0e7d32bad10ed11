"""Which channels there are: what packet numbers prove, for every number of channels and packets.

A destination is not told how many channels a QEMU has, and they may come late. A round with pages that ends without one of them has
lost its pages. The numbers of packets prove that none is missing: a source takes one number for each packet with pages and one for
each SYNC, from one counter for all channels. At the end of a round the destination knows the highest number of its SYNCs, and what
it has counted itself. The *balance* is what is left over,

    1 + highest - packets with pages - channels here * sync points,

and this file proves that it is 0 where all channels are here, and above 0 as long as one is missing.

**Sums.** A sum over channels is a function of the whole numbers: the sum over the channels before this one. Its terms are given by the
invariant, and what follows for the whole sum by two statements that hold of every function of whole numbers and that Z3 does not find
by itself, because they are induction: `INDUCTION`.

**Channels have numbers here** in the order in which they join, those that never join at the end. That is the proof's own numbering: it
exists behind every run, no thread knows it, and ids on the wire have nothing to do with it.

**The horizon** is any number. Everything is counted below it. Where it is chosen as the one after the highest SYNC of a round, the
sums are those of the balance; and what is proved for any horizon is proved for that one. So a theorem may choose it.

**QEMU 7.2** may put pages and SYNC into one packet, with the later of two numbers. Both were taken, and that is all that counts.

**Not here:** a source that says how many channels it has (there is nothing to prove: all of these have to come, and their numbers have to
balance, too), and streams without channels.
"""

from z3 import And, BoolSort, Exists, ForAll, If, Implies, Int, IntSort, Not, Or

from machine import Machine, State, Step, function, put

TRUTH, NUMBER = BoolSort(), IntSort()

channels = Int("channels")
horizon = Int("horizon")

c, d, i, j = Int("c"), Int("d"), Int("i"), Int("j")
C = Int("C")

before = State(
    {
        name: function(name, *sorts)
        for name, sorts in {
            # The source.
            "round": (NUMBER,),  # the round that is open
            "next": (NUMBER,),  # the number that is taken next
            "sent": (NUMBER, NUMBER),  # SYNCs written on a channel
            "packed": (NUMBER, NUMBER),  # packets with pages of a channel
            # What is under way: by channel and SYNC.
            "number": (NUMBER, NUMBER, NUMBER),  # of the SYNC
            "packets_before": (NUMBER, NUMBER, NUMBER),  # packets with pages that the channel had up to it
            # The destination.
            "at": (NUMBER,),  # the sync point that it waits for
            "joined": (NUMBER,),  # channels that have joined
            "taken": (NUMBER, NUMBER),  # SYNCs that it has read from a channel
            "packets": (NUMBER,),  # packets with pages, as told by these SYNCs
            "highest": (NUMBER,),  # the highest number of a SYNC of this round; -1: there was none
            "known": (TRUTH,),  # the numbers have proved how many channels there are
            "proved_at": (NUMBER,),  # the number behind the highest one, then
            # For the proof alone.
            "due": (NUMBER,),  # joined * at: Z3 does not multiply
            "mine": (NUMBER, NUMBER),  # numbers below the horizon that a channel has taken
            "all_before": (NUMBER, NUMBER),  # the sum of these over the channels before this one
            "counted": (NUMBER, NUMBER),  # of these, those that the destination has counted
            "counted_before": (NUMBER, NUMBER),  # their sum
            "away_before": (NUMBER, NUMBER),  # how many channels before this one have joined, and not ended the round
            "within": (TRUTH,),  # all that was counted is below the horizon
            "beyond": (NUMBER,),  # else: a channel with a SYNC that is not
        }.items()
    }
)


def every(claim):
    return ForAll([c], Implies(And(0 <= c, c < channels), claim(c)))


def here(s, c):
    return And(0 <= c, c < s.joined)


def every_here(s, claim):
    return ForAll([c], Implies(here(s, c), claim(c)))


def last_number(s, c):
    """The number of the last SYNC that was read from a channel."""
    return s.number(c, s.taken(c) - 1)


def last_packets(s, c):
    return s.packets_before(c, s.taken(c) - 1)


def balance(s):
    return 1 + s.highest - s.packets - (s.due + s.joined)


def is_away(s, c):
    return If(And(here(s, c), s.taken(c) == s.at), 1, 0)


def left(s):
    """The sum over the channels before this one of what the destination has not counted."""
    return lambda i: s.all_before(i) - s.counted_before(i)


def induction(sums, all_channels):
    """A sum without a negative term never falls; one whose terms are all 0 is 0."""
    return And(
        Implies(
            ForAll([c], Implies(And(0 <= c, c < all_channels), sums(c) <= sums(c + 1))),
            ForAll([i, j], Implies(And(0 <= i, i <= j, j <= all_channels), sums(i) <= sums(j))),
        ),
        Implies(ForAll([c], Implies(And(0 <= c, c < all_channels), sums(c) == sums(c + 1))), sums(all_channels) == sums(0)),
    )


INDUCTION = [induction(sums, channels) for sums in (before.all_before, left(before), before.away_before)]


def initial(s):
    return [
        s.round == 0,
        s.next == 0,
        s.at == 0,
        s.joined == 0,
        s.packets == 0,
        s.highest == -1,
        s.due == 0,
        Not(s.known),
        s.within,
        ForAll([c], And(s.sent(c) == 0, s.packed(c) == 0, s.taken(c) == 0, s.mine(c) == 0, s.counted(c) == 0)),
        ForAll([c], And(s.all_before(c) == 0, s.counted_before(c) == 0, s.away_before(c) == 0)),
    ]


MY_ROUND = {"the channel has not ended the round": lambda s: And(0 <= C, C < channels, s.sent(C) == s.round)}


def numbered(s):
    """Channel C takes the next number."""
    below = If(s.next < horizon, 1, 0)
    return {
        "next": s.next + 1,
        "mine": put(s.mine, (C,), s.mine(C) + below),
        "all_before": lambda i: s.all_before(i) + If(i > C, below, 0),
    }


def counts(s, channel, taken, highest):
    """The destination has read SYNC number `taken` of a channel, counted from 0."""
    is_below = s.number(channel, taken) < horizon
    counted = If(is_below, s.packets_before(channel, taken) + taken + 1, s.counted(channel))
    return {
        "taken": put(s.taken, (channel,), taken + 1),
        "packets": s.packets + s.packets_before(channel, taken) - If(taken > 0, s.packets_before(channel, taken - 1), 0),
        "highest": highest,
        "counted": put(s.counted, (channel,), counted),
        "counted_before": lambda i: s.counted_before(i) + If(i > channel, counted - s.counted(channel), 0),
        "within": And(s.within, is_below),
        "beyond": If(is_below, s.beyond, channel),
    }


def higher(s, number):
    return If(s.highest < number, number, s.highest)


def joins(s):
    # In the first round with pages its SYNC is none of the round's: it has to send another one.
    highest = If(s.at == 0, higher(s, s.number(s.joined, 0)), s.highest)
    away = If(s.at == 0, 0, 1)
    joined = s.joined
    return counts(s, joined, 0, highest) | {
        "joined": joined + 1,
        "due": s.due + s.at,
        "away_before": lambda i: s.away_before(i) + If(i > joined, away, 0),
    }


def arrives(s):
    return counts(s, C, s.taken(C), higher(s, s.number(C, s.taken(C)))) | {
        "away_before": lambda i: s.away_before(i) - If(i > C, 1, 0),
    }


def passes(s):
    return {
        "at": s.at + 1,
        "known": s.at >= 1,
        "proved_at": If(s.known, s.proved_at, s.highest + 1),
        "highest": -1,
        "due": s.due + s.joined,
        # All are away from the end of the next round.
        "away_before": lambda i: If(i <= 0, 0, If(i <= s.joined, i, s.joined)),
    }


STEPS = [
    Step(
        "pack: a channel takes a number for a packet with pages",
        (C,),
        MY_ROUND | {"the set-up has no pages": lambda s: s.round >= 1},
        lambda s: numbered(s) | {"packed": put(s.packed, (C,), s.packed(C) + 1)},
    ),
    Step(
        "sync: a channel takes a number for a SYNC",
        (C,),
        MY_ROUND,
        lambda s: numbered(s)
        | {
            "sent": put(s.sent, (C,), s.sent(C) + 1),
            "number": put(s.number, (C, s.sent(C)), s.next),
            "packets_before": put(s.packets_before, (C, s.sent(C)), s.packed(C)),
        },
    ),
    Step(
        "open: main opens a round",
        (),
        {"every channel has written SYNC of the round": lambda s: every(lambda c: s.sent(c) == s.round + 1)},
        lambda s: {"round": s.round + 1},
    ),
    Step(
        "join: a channel joins, with its first SYNC",
        (),
        {
            "it was written": lambda s: And(s.joined < channels, s.sent(s.joined) >= 1),
            "the number of channels is not known": lambda s: Not(s.known),
        },
        joins,
    ),
    Step(
        "arrive: a channel that has joined reads a SYNC",
        (C,),
        {
            "it has joined": lambda s: here(s, C),
            "there is one to read": lambda s: s.sent(C) > s.taken(C),
            "it has not ended the round": lambda s: s.taken(C) == s.at,
        },
        arrives,
    ),
    Step(
        "pass: a round ends",
        (),
        {
            "all that have joined have ended it": lambda s: every_here(s, lambda c: s.taken(c) == s.at + 1),
            "a round with pages has channels": lambda s: Or(s.at == 0, s.joined >= 1),
            "the numbers of a round with pages balance": lambda s: Or(s.at == 0, balance(s) == 0),
        },
        passes,
    ),
]

INVARIANT = {
    "there are channels, some of which have joined": lambda s: And(0 <= s.joined, s.joined <= channels, s.at >= 0, s.round >= 0, s.next >= 0),
    "a channel has ended the open round or the one before": lambda s: every(lambda c: And(s.round <= s.sent(c), s.sent(c) <= s.round + 1, s.packed(c) >= 0)),
    "one that has joined is at the end of the destination's round or behind that of the one before": lambda s: every_here(
        s, lambda c: And(1 <= s.taken(c), s.taken(c) <= s.sent(c), s.at <= s.taken(c), s.taken(c) <= s.at + 1)
    ),
    "of one that has not, nothing was read": lambda s: ForAll([c], Implies(c >= s.joined, And(s.taken(c) == 0, s.counted(c) == 0))),
    "the destination goes no further than the source where a channel has joined": lambda s: Implies(s.joined >= 1, s.at <= s.round + 1),
    "it has not ended a round with pages before it knew the number of channels": lambda s: s.known == (s.at >= 2),
    "the number that it knows is that of the channels": lambda s: Implies(And(s.known, horizon == s.proved_at), s.joined == channels),
    "numbers rise on a channel, and are taken": lambda s: ForAll(
        [c, j],
        Implies(
            And(0 <= c, c < channels, 0 <= j, j < s.sent(c)),
            And(0 <= s.number(c, j), s.number(c, j) < s.next, Implies(j >= 1, s.number(c, j - 1) < s.number(c, j))),
        ),
    ),
    "a SYNC has a higher number than each SYNC of an earlier round": lambda s: ForAll(
        [c, d, i, j],
        Implies(And(0 <= c, c < channels, 0 <= d, d < channels, 0 <= i, i < j, i < s.sent(c), j < s.sent(d)), s.number(c, i) < s.number(d, j)),
    ),
    "packets are counted up to each SYNC": lambda s: ForAll(
        [c, j],
        Implies(
            And(0 <= c, c < channels, 0 <= j, j < s.sent(c)),
            And(
                0 <= s.packets_before(c, j),
                s.packets_before(c, j) <= s.packed(c),
                Implies(j >= 1, s.packets_before(c, j - 1) <= s.packets_before(c, j)),
                Implies(j == s.round, s.packets_before(c, j) == s.packed(c)),
            ),
        ),
    ),
    "a channel takes a number for each packet and each SYNC": lambda s: every(
        lambda c: And(0 <= s.mine(c), s.mine(c) <= s.packed(c) + s.sent(c), Implies(s.next <= horizon, s.mine(c) == s.packed(c) + s.sent(c)))
    ),
    "all that it took up to a SYNC below the horizon is below it": lambda s: ForAll(
        [c, j],
        Implies(
            And(0 <= c, c < channels, 0 <= j, j < s.sent(c), s.number(c, j) < horizon),
            s.mine(c) >= s.packets_before(c, j) + j + 1,
        ),
    ),
    "what it took behind a SYNC has higher numbers than every SYNC of that round": lambda s: ForAll(
        [c, d, j],
        Implies(
            And(0 <= c, c < channels, 0 <= d, d < channels, 0 <= j, j < s.sent(c), j < s.sent(d), s.number(d, j) + 1 >= horizon),
            s.mine(c) <= s.packets_before(c, j) + j + 1,
        ),
    ),
    "each number is one channel's": lambda s: And(
        s.all_before(0) == 0,
        every(lambda c: s.all_before(c + 1) == s.all_before(c) + s.mine(c)),
        s.all_before(channels) == If(s.next < horizon, s.next, horizon),
    ),
    "of a channel that has joined, all up to its last SYNC is counted": lambda s: every_here(
        s,
        lambda c: And(
            Implies(last_number(s, c) < horizon, s.counted(c) == last_packets(s, c) + s.taken(c)),
            Implies(s.within, last_number(s, c) < horizon),
        ),
    ),
    "nothing is counted that was not taken": lambda s: every(lambda c: And(0 <= s.counted(c), s.counted(c) <= s.mine(c))),
    "counts add up": lambda s: And(s.counted_before(0) == 0, every(lambda c: s.counted_before(c + 1) == s.counted_before(c) + s.counted(c))),
    "what the destination has counted are packets, and SYNCs": lambda s: Implies(
        s.within, s.counted_before(channels) == s.packets + s.due + s.joined - s.away_before(channels)
    ),
    "what is beyond the horizon is some channel's last SYNC": lambda s: Implies(Not(s.within), And(here(s, s.beyond), last_number(s, s.beyond) >= horizon)),
    "those that have not ended the round are counted": lambda s: And(
        s.away_before(0) == 0, every(lambda c: s.away_before(c + 1) == s.away_before(c) + is_away(s, c))
    ),
    "the highest number is that of a channel at the end of the round": lambda s: And(
        every_here(s, lambda c: Implies(s.taken(c) == s.at + 1, last_number(s, c) <= s.highest)),
        Or(s.highest == -1, Exists([c], And(here(s, c), s.taken(c) == s.at + 1, last_number(s, c) == s.highest))),
    ),
    "a channel that joined while the set-up was open has ended it": lambda s: Implies(s.at == 0, every_here(s, lambda c: s.taken(c) == 1)),
}


def all_ended(m):
    return every_here(m.state, lambda c: m.state.taken(c) == m.state.at + 1)


def chosen(m):
    """A choice of the horizon: it is behind the highest SYNC of the round."""
    return horizon == m.state.highest + 1


THEOREMS = {
    "the number of channels that is decided is that of the channels": lambda m: ([m.state.known, horizon == m.state.proved_at], m.state.joined == channels),
    "a destination that has passed a round with pages has all channels": lambda m: ([m.state.at >= 2, horizon == m.state.proved_at], m.state.joined == channels),
    "while a channel is missing, the balance is above 0": lambda m: (
        [all_ended(m), chosen(m), m.state.at >= 1, m.state.joined >= 1, m.state.joined < channels],
        balance(m.state) > 0,
    ),
    "where all channels are here, it is 0 at every sync point": lambda m: (
        [all_ended(m), chosen(m), m.state.joined == channels],
        balance(m.state) == 0,
    ),
}

MEMBERSHIP = Machine(
    name="membership",
    state=before,
    axioms=[channels >= 1, horizon >= 0, *INDUCTION],
    initial=initial,
    steps=STEPS,
    invariant=INVARIANT,
    theorems=THEOREMS,
    small=[channels == 2, horizon <= 6],
    small_first=True,
    witnesses={
        "the number of channels is known": lambda s: And(s.known, channels == 2, horizon == 0),
        "a channel that joins when the set-up has passed": lambda s: And(s.at == 1, s.joined == 1, channels == 2, s.sent(1) == 1),
        "a destination that has to wait for a channel": lambda s: And(
            s.at == 1, s.joined == 1, channels == 2, s.taken(0) == 2, horizon == s.highest + 1
        ),
    },
)
