"""`verb-phrase`: one sentence that says what the graph looks like afterwards.

Copy this file to `passes/verb_phrase.py` (file name = pass name with underscores), and see
docs/adding-a-pass.md for the rest: a golden file, one import and one line in a pipeline. Say here
why the pass pays, when it does not apply, and the paper behind it (author, title, year).
"""

from __future__ import annotations

from dataclasses import dataclass

from skive import ops
from skive.ir import Graph, Node
from skive.pipeline import pass_
from skive.rewrite import Declined, Match, Rule, Var, op, rewrite


@dataclass(frozen=True, slots=True)
class VerbPhrase:
    """The options, settable as `verb-phrase{limit=8}`. A pass without options needs no class."""

    limit: int = 64  # elements


# A rule matches one node (its root) and gives the replacement, which must have the same type.
# None: not for this rule. Declined: it matched but must stay, for a reason that -v shows.
def double_negation(limit: int) -> Rule:
    """-(-x) = x for tensors of at most `limit` elements."""

    def fn(m: Match) -> Node | Declined | None:
        x = m["x"]
        if x.type.size > limit:
            return Declined(f"{x.type.size} elements are more than {limit}")
        # A new node takes its origin from the source layer, so that errors and profiles can name it.
        return ops.make("reshape", x, shape=x.shape, origin=m.root.origin, label=m.root.name)

    return Rule("double-negation", op("neg", op("neg", Var("x"), exclusive=True)), fn)


# exact=True: the outputs stay the same up to float32 rounding, and the pass manager may compare
# them with the numpy reference. A pass that trades accuracy for speed says exact=False.
@pass_("verb-phrase", exact=True, options=VerbPhrase)
def verb_phrase(graph: Graph, options: VerbPhrase) -> Graph:
    """No double negation of a small tensor.

    The first line is what the pass guarantees. Return the very same graph if nothing changed:
    then it is neither verified nor compared.
    """
    return rewrite(graph, [double_negation(options.limit)])
