"""Conversations to text for fine-tuning: lines of JSON, written by a chat template, and what the assistant says there.

What the assistant says are the template's {% generation %} blocks. A template without them is asked for the
conversation up to each answer and with it; what the answer adds is its turn, the end-of-turn token included.
"""

import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from maxlm.chat import ChatError, ChatTemplate, files_of
from maxlm.data.sources import DataError, Document, Source, read_objects
from maxlm.data.tokenizer import FIRST, JsonTokenizer, load_tokenizer

Spans = tuple[tuple[int, int], ...]
ASSISTANT = "assistant"
ROLES = {"human": "user", "gpt": ASSISTANT, "bing": ASSISTANT, "chatgpt": ASSISTANT}
"""Names in rows of dict(conversations: list of dict(from, value)) that templates call otherwise."""
SURROGATES = re.compile("[\ud800-\udfff]")


@dataclass
class Chats:
    """Reads conversations as documents.

    Attributes:
        template: writes them.
        special_tokens: text of tokens that must not come from what people say.
        skipped: conversations left out, by reason.
    """

    template: ChatTemplate
    special_tokens: Sequence[str]
    skipped: Counter[str] = field(default_factory=Counter)

    def documents(self, source: Source) -> Iterator[Document]:
        """Streams the conversations of one .jsonl file.

        Raises:
            DataError: a line holds no conversation, or the template refuses it; named by file and line.
            StorageError: the file cannot be read.
        """
        for line, row, replaced in read_objects(source):
            try:
                messages = _messages(row)
                if not any(message["role"] == ASSISTANT for message in messages):
                    self.skipped["no assistant turn"] += 1
                elif _has_any(messages, self.special_tokens):
                    self.skipped["special tokens in what is said"] += 1
                else:
                    text, spans = self._written(messages, row.get("tools"))
                    mended = SURROGATES.sub("\ufffd", text)  # one for one: the spans hold
                    yield Document(mended, replaced + len(SURROGATES.findall(text)), spans)
            except ChatError as error:
                raise DataError(f"{source.name} line {line}: {error}") from None

    def describe(self) -> str:
        """What was left out, such as `3 no assistant turn`."""
        return ", ".join(f"{count:,} {reason}" for reason, count in self.skipped.items())

    def _written(self, messages: list[dict[str, Any]], tools: Any) -> tuple[str, Spans]:
        text, marked = self.template.render_spans(messages, tools=tools)
        if marked:
            return text, tuple(marked)
        spans = []
        for i, message in enumerate(messages):
            if message["role"] != ASSISTANT:
                continue
            before = self.template.render(messages[:i], add_generation_prompt=True, tools=tools)
            after = self.template.render(messages[: i + 1], tools=tools)
            if not (text.startswith(after) and after.startswith(before)):
                raise ChatError(
                    f"the template writes message {i + 1} otherwise when it is the last or still to come, so that an "
                    "answer's place is unknown; mark answers with {% generation %} in the template"
                )
            spans.append((len(before), self._end(after)))
        return text, tuple(spans)

    def _end(self, text: str) -> int:
        """Where a turn ends: white space behind its end-of-turn token is no answer."""
        kept = text.rstrip()
        return len(kept) if kept.endswith(tuple(self.special_tokens)) else len(text)


def load_chats(folder: str, eos: str | None = None, bos: str | None = None) -> tuple[JsonTokenizer, Chats]:
    """The tokenizer and the reader of conversations of a Hugging Face folder or a converted model.

    Args:
        folder: holds tokenizer.json and a chat template.
        eos: token that ends a text; None takes the folder's eos_token, or looks for the usual names.
        bos: as load_tokenizer.

    Raises:
        FileNotFoundError: no such folder, or it has no tokenizer.json.
        ValueError: the template or the tokenizer cannot be used.
    """
    template = ChatTemplate.read(folder)
    path = os.path.join(files_of(folder), "tokenizer.json")
    tokenizer = load_tokenizer(path, eos or template.special_tokens.get("eos_token"), bos)
    if not isinstance(tokenizer, JsonTokenizer) or tokenizer.vocab_size > FIRST:
        raise DataError(f"tokenizer {path} is not a tokenizers JSON file of up to {FIRST:,} ids")
    return tokenizer, Chats(template, tokenizer.special_tokens())


def _messages(row: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The messages of a row: of dict(messages), or of dict(conversations)."""
    key = "messages" if "messages" in row or "conversations" not in row else "conversations"
    found = row.get(key)
    if not isinstance(found, list) or not found:
        raise ChatError(f"{key} is {'empty' if found == [] else 'missing' if found is None else 'no list'}")
    messages = []
    for number, message in enumerate(found, 1):
        if isinstance(message, dict) and "from" in message and "role" not in message:
            role = message["from"]
            message = {
                "role": ROLES.get(role, role) if isinstance(role, str) else role,
                "content": message.get("value"),
            }
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise ChatError(f"message {number} of {key} has no role, such as user or assistant")
        content = message.get("content")
        if not isinstance(content, str | list) and "tool_calls" not in message:
            raise ChatError(f"message {number} of {key} has no content")
        messages.append(message)
    return messages


def _has_any(value: Any, texts: Sequence[str]) -> bool:
    if isinstance(value, str):
        return any(text in value for text in texts)
    if isinstance(value, dict):
        return any(_has_any(item, texts) for item in value.values())
    return isinstance(value, list) and any(_has_any(item, texts) for item in value)
