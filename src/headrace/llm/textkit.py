"""The text side of a checkpoint: the text room's tokenizer, template and detokenizers as one TextKit."""

from __future__ import annotations

from typing import Any

from headrace.checkpoints.resolve import resolve
from headrace.config.spec import EngineSpec
from headrace.llm.protocols import Messages
from headrace.text.detokenizer import Detokenizer
from headrace.text.sources import read_sources
from headrace.text.template import ChatTemplate
from headrace.text.tokenizer import Tokenizer

__all__ = ["ModelText", "load_text"]


class ModelText:
    """TextKit of one model."""

    def __init__(self, tokenizer: Tokenizer, template: ChatTemplate) -> None:
        self.tokenizer = tokenizer
        self._template = template

    def render(self, messages: Messages, *, chat_template: str | None = None, **options: Any) -> str:
        """See TextKit. A ``developer`` speaks as ``system`` where the template does not know the role."""
        template = self._template
        if chat_template is not None:
            template = ChatTemplate({"default": chat_template}, self.tokenizer.special_tokens)
        if not any("developer" in source for source in template.templates.values()):
            messages = [
                {**message, "role": "system"} if message.get("role") == "developer" else message
                for message in messages
            ]
        return template.render(messages, **options)

    @property
    def template(self) -> str:
        """See TextKit."""
        return "\n".join(self._template.templates.values())

    @property
    def architecture(self) -> str:
        """See TextKit."""
        named = self.tokenizer.sources.config.get("architectures")
        return str(named[0]) if isinstance(named, list) and named else ""

    def detokenizer(
        self, *, skip_special_tokens: bool, continuing: bool, visible: frozenset[int] = frozenset()
    ) -> Detokenizer:
        """See TextKit."""
        return Detokenizer(
            self.tokenizer, skip_special_tokens=skip_special_tokens, continuing=continuing, visible=visible
        )


def load_text(spec: EngineSpec) -> ModelText:
    """Read tokenizer and template of a model.

    Raises MissingFile and UnsupportedCheckpoint, and InvalidRequest for a template that does not parse.
    """
    path = spec.path if spec.path is not None else resolve(spec.model, spec.revision, spec.secret_name)
    sources = read_sources(path)
    tokenizer = Tokenizer.from_sources(sources)
    template = ChatTemplate.from_sources(sources, tokenizer.special_tokens, spec.chat_template)
    return ModelText(tokenizer, template)
