"""Whether documents that are about to be written are conversations: their control tokens, and what stands between.

Place in the path: assembly -> **structure** -> indexed datasets.

Invariants: of documents that pass, each holds the control tokens of the frame, one question, one analysis and one
final, in this order and no other; each final has words; the spans say so at every control token and change nowhere
else; the loss mask is 1 where the span is not 0. Words hold no control token, so there is nothing else to parse.

Example:
    Structure(around).require(arrays_of(documents), [len(one.tokens) for one in documents], where="train")
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from recipes.data.assembly import Surroundings
from recipes.data.conversation import ANALYSIS, FINAL, Rendered
from recipes.data.encodings import O200K_HARMONY
from vpstore.errors import RecipeRefused

_FIRST_SPECIAL = O200K_HARMONY.n_ranks


class Structure:
    """What every document of a data set must look like."""

    def __init__(self, around: Surroundings) -> None:
        user_end, *thought = around.to_analysis
        thought_end, *answer = around.to_final
        answer_end, *document_end = around.closing
        parts = ((*around.opening, user_end), (*thought, thought_end), (*answer, answer_end), tuple(document_end))
        marked = [
            (token, span)
            for tokens, span in zip(parts, (0, ANALYSIS, FINAL, 0), strict=True)
            for token in tokens
            if token >= _FIRST_SPECIAL
        ]
        self._control = np.array([token for token, _ in marked])
        self._spans = np.array([span for _, span in marked])
        self._final = len(marked) - len(document_end) - 2  # the place of the <|message|> before the answer's words

    def require(self, rendered: Rendered, lengths: Sequence[int], *, where: str) -> None:
        """Hold documents that lie back to back against it; in numpy, a small part of what encoding them takes.

        Raises:  RecipeRefused: a document that is no conversation, by its number among these.
        """
        fault = self._fault(rendered, np.asarray(lengths))
        if fault:
            raise RecipeRefused(
                "a document is no conversation",
                where=where,
                expected="the frame, a question, one analysis and one final with words, and spans that say so",
                found=fault,
                next_step="report it: no row can make one; nothing of this shard was kept",
            )

    def _fault(self, rendered: Rendered, lengths: np.ndarray) -> str:
        tokens, spans = rendered.tokens, rendered.span
        at = np.flatnonzero(tokens >= _FIRST_SPECIAL)
        starts = np.cumsum(lengths) - lengths
        per_document = np.diff(np.searchsorted(at, np.append(starts, tokens.size)))
        if (wrong := np.flatnonzero(per_document != self._control.size)).size:
            return f"document {wrong[0]} has {per_document[wrong[0]]} control tokens instead of {self._control.size}"
        each = at.reshape(len(lengths), -1)
        if (wrong := np.flatnonzero((tokens[each] != self._control).any(axis=1))).size:
            return f"document {wrong[0]} has other control tokens, or another order of them"
        if (wrong := np.flatnonzero(np.diff(each[:, self._final : self._final + 2], axis=1) < 2)).size:
            return f"document {wrong[0]} has a final without words"
        # Shifted arrays: the span of a token stands one place before it; the first token's stands nowhere.
        if (wrong := np.flatnonzero((spans[each[:, 1:] - 1] != self._spans[1:]).any(axis=1))).size:
            return f"document {wrong[0]} has another span at a control token"
        changes = np.flatnonzero(spans[1:] != spans[:-1]) + 2  # tokens whose span differs from that of the token before
        if not np.isin(changes, at).all() or not np.array_equal(rendered.loss_mask, spans > 0):
            return "a span that changes among words, or a loss mask that does not follow the spans"
        return ""
