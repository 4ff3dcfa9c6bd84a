"""Prompts of causal rerankers: how a query and a document are put before the model judges them."""

from __future__ import annotations

import re
from collections.abc import Sequence

from headrace.errors import ContextLengthExceeded, InvalidRequest
from headrace.text.encoding import Encoded, EncodeText, Truncate
from headrace.text.template import ChatTemplate

__all__ = ["RerankTemplate", "rerank_template"]

# As the model card of Qwen3-Reranker gives it (Zhang et al. 2025).
_QWEN3 = (
    "<|im_start|>system\nJudge whether the Document meets the requirements based on the Query and the Instruct "
    'provided. Note that the answer can only be "yes" or "no".<|im_end|>\n<|im_start|>user\n'
    "<Instruct>: {{ instruction or 'Given a web search query, retrieve relevant passages that answer the query' }}\n"
    "<Query>: {{ query }}\n<Document>: {{ document }}"
    "<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
    "\n"  # jinja2 drops a template's last line break
)
_KNOWN = (("qwen3", re.compile(r"qwen3[-_ ]?reranker", re.IGNORECASE), _QWEN3),)
_MARK = "\ue000document\ue000"  # private use: no text of a model holds it


class RerankTemplate:
    """A jinja2 template with the variables ``query``, ``document`` and ``instruction``.

    When a prompt is too long the document loses tokens, never the words around it.

    Args:
        source: the template. It writes its special tokens out.
    Raises InvalidRequest when it does not parse, or does not use query and document.
    """

    def __init__(self, source: str) -> None:
        self.source = source
        for name in ("query", "document"):
            if name not in source:
                raise InvalidRequest(
                    f"the rerank template does not use the variable {name!r}; it takes query, document and instruction",
                    param="chat_template",
                )
        self._template = ChatTemplate({"default": source})

    def render(self, query: str, instruction: str | None) -> tuple[str, str]:
        """What stands before and after the document."""
        variables = {"query": query, "instruction": instruction or "", "document": _MARK}
        text = self._template.render([], add_generation_prompt=False, kwargs=variables)
        before, mark, after = text.partition(_MARK)
        if not mark or _MARK in after:
            raise InvalidRequest(
                "the rerank template must write the document exactly once", param="chat_template"
            )
        return before, after

    def encode(
        self,
        text: EncodeText,
        query: str,
        documents: Sequence[str],
        instruction: str | None,
        truncate: Truncate | None,
        param: str,
    ) -> list[Encoded]:
        """Prompts of one query and several documents."""
        before, after = self.render(query, instruction)
        whole = [before + document + after for document in documents]
        found = text.raw(whole, param)
        limit = (
            text.max_tokens
            if truncate is None or truncate.limit is None
            else min(truncate.limit, text.max_tokens)
        )
        return [
            ids
            if len(ids.ids) <= limit
            else self._cut(text, before, document, after, limit, truncate, f"{param}[{i}]")
            for i, (ids, document) in enumerate(zip(found, documents))
        ]

    def _cut(
        self,
        text: EncodeText,
        before: str,
        document: str,
        after: str,
        limit: int,
        truncate: Truncate | None,
        name: str,
    ) -> Encoded:
        """The same with fewer tokens of the document."""
        head, body, tail = (part.ids for part in text.raw([before, document, after], name))
        room = limit - len(head) - len(tail)
        if truncate is None or room < 0:
            fix = (
                "shorten it or set truncate to true"
                if room >= 0
                else "the query and the template alone do not fit"
            )
            raise ContextLengthExceeded(
                f"{name} has {len(head) + len(body) + len(tail)} tokens with its prompt and this model "
                f"takes {limit}; {fix}",
                param=name,
            )
        kept = body[len(body) - room :] if truncate.direction == "left" else body[:room]
        return Encoded((*head, *kept, *tail))


def rerank_template(model_type: str, names: Sequence[str], given: str | None) -> RerankTemplate | None:
    """The template of a reranker: the operator's, or one that is known for it by name; else None.

    Args:
        names: what the checkpoint is called (its id or folder, and `config.json`'s own word).
        given: text of the operator's template.
    """
    if given is not None:
        return RerankTemplate(given)
    for known_type, pattern, source in _KNOWN:
        if model_type == known_type and any(pattern.search(name) for name in names):
            return RerankTemplate(source)
    return None
