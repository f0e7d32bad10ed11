"""The hand-over law with a part left out, or done wrong: each has to fail a condition, or is proved and says why it does no harm."""

from z3 import BoolVal

from hand_over_law import DISCARDED, HAND_OVER_LAW as LAW, P
from machine import Variant

[discarded] = DISCARDED

VARIANTS = [
    Variant("a page is sent though its bit was set", LAW.without("send", "the bit was not set")),
    Variant("pages are discarded before the last barrier", LAW.without("discard", "the last barrier has passed")),
    Variant("RUN is written while pages of the last round are under way", LAW.without("barrier", "all of its copies are in place")),
    Variant("RUN is written before all that is not final was discarded", LAW.without("give", discarded)),
    Variant("the discard names a page that was sent since", LAW.without("discard", "not yet")),
    Variant("the discard names a page that is final", LAW.without("discard", "it is not final")),
    Variant(
        "copies of a lost connection still come after the recovery",
        LAW.with_effect("break", lambda s, effect: effect | {"flying": s.flying}),
    ),
    Variant("a recovery goes on with the sender's own bits", LAW.with_effect("recover", lambda s, effect: effect | {"claimed": s.claimed})),
    Variant("a recovery begins with no bit set", LAW.with_effect("recover", lambda s, effect: effect | {"claimed": lambda p: BoolVal(False)})),
    Variant("a lost connection is used again", LAW.without("recover", "its connection is a new one"), harmless="what was under way on it is gone, and the destination has given it up: here a name only"),
    Variant("the source takes the guest back behind RUN", LAW.without("resume", "RUN is not written")),
    Variant("the source takes the guest back, and gives it away all the same", LAW.without("give", "the guest does not run there")),
    Variant("the end does not wait for the last page", LAW.without("end", "every page is there")),
    Variant("the guest writes a page that is not there", LAW.without("write", "the page is there")),
    Variant("the destination does not wake who waits", LAW.with_effect("place", lambda s, effect: {name: new for name, new in effect.items() if name != "wanted"})),
    Variant("a lost connection ends the migration", LAW.with_guard("recover", "never", lambda s: BoolVal(False))),
    Variant("a page is sent only if the guest asks for it", LAW.with_guard("send", "the guest waits for it", lambda s: s.wanted(P))),
]
