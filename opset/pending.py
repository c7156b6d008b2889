"""The pending tokens of a deferred state: how many there are, what a call keeps of them, and which row has which.

A stored state stands before a token whose position is a multiple of BLOCK; the tokens since then are pending: `count`
of them, 0 to SLOTS - 1, a number of each sequence. A call appends its tokens, and moves the stored state forward by
whole blocks as far as `kept` says: over tokens that were pending before it, and of a call of more than BLOCK tokens
over all but the last BLOCK or more. So the last BLOCK tokens of any call can be taken back by lowering `count`; and as
nothing but a token's position decides what is computed for it, calls may be cut in any way, and give the same numbers.
"""

from __future__ import annotations

from dfssm.base.errors import DfssmError

from .arithmetic import Array
from .schema import BLOCK, SLOTS


def kept(count: int, tokens: int) -> int:
    """How many tokens, counted from the stored state on, a call of `tokens` tokens moves it over."""
    return max(count, count + tokens - BLOCK) // BLOCK * BLOCK


def check_count(op: str, count: Array) -> None:
    """DfssmError where one of `count` u8[B] is no number of pending tokens."""
    if (most := int(count.max())) >= SLOTS:
        raise DfssmError(f"{op}: input 'pending_count' has {most}, expected at most {SLOTS - 1}")


COUNTS = f"""
  pair = Constant <value_ints = [1]> ()
  behind = Constant <value_ints = [-1]> ()
  block = Constant <value = int64 {{{BLOCK}}}> ()
  counted = Cast <to = 7> (pending_count)
  count = Unsqueeze (counted, pair)
  tokens = Shape <start = 1, end = 2> (x)
  length = Add (count, tokens)
  accepted = Sub (length, block)
  folded = Max (count, accepted)
  whole = Div (folded, block)
  kept = Mul (whole, block)
  left = Sub (length, kept)
  left_narrow = Cast <to = 2> (left)
  new_pending_count = Squeeze (left_narrow, pair)
"""
"""`count`, `length` (with the call's tokens), `kept` and `left`, the new count: i64 [B,1]; `new_pending_count`."""


def gather(out: str, slots: str, added: str, index: str, before: str = "count") -> str:
    """`out` [B,K,E]: the tokens `index` i64 [B,K] of `slots` [B,S,E], of which `before` i64 [B,1] are filled, and then
    of `added` [B,T,E]; after COUNTS.
    """
    return f"""
  {out}_room = Shape <start = 1, end = 2> ({slots})
  {out}_held = Less ({index}, {before})
  {out}_past = Sub ({index}, {before})
  {out}_later = Add ({out}_past, {out}_room)
  {out}_where = Where ({out}_held, {index}, {out}_later)
  {out}_row = Unsqueeze ({out}_where, behind)
  {out}_all = Concat <axis = 1> ({slots}, {added})
  {out} = GatherND <batch_dims = 1> ({out}_all, {out}_row)
"""


def update(out: str, slots: str, added: str, before: str = "count", after: str = "left") -> str:
    """`out` [B,S,E]: `slots` when the call is over. The first `after` i64 [B,1] are filled, the others as they were."""
    return f"""
  {out}_first = Constant <value = int64 {{0}}> ()
  {out}_step = Constant <value = int64 {{1}}> ()
  {out}_size = Shape <start = 1, end = 2> ({slots})
  {out}_end = Squeeze ({out}_size)
  {out}_slot = Range ({out}_first, {out}_end, {out}_step)
  {out}_filled = Less ({out}_slot, {after})
  {out}_moved = Add ({out}_slot, kept)
  {out}_last = Add ({before}, tokens)
  {out}_top = Sub ({out}_last, {out}_step)
  {out}_known = Min ({out}_moved, {out}_top)
  {gather(f"{out}_new", slots, added, f"{out}_known", before)}
  {out}_choice = Unsqueeze ({out}_filled, behind)
  {out} = Where ({out}_choice, {out}_new, {slots})
"""
