"""Chat templates: from messages to the text a model was tuned on, as Hugging Face folders describe it.

A template is a program that came with a model, in Jinja's language. It runs in Jinja's sandbox, where it reaches
nothing but the messages, and with limits on its size, its output and its work (turns of loops and calls), so that it
cannot run forever.
"""

import datetime
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import jinja2
import jinja2.ext
from jinja2 import nodes
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer

from maxlm.json_object import parse_object

Message = Mapping[str, Any]
MAX_FILE = 1 << 24
"""Bytes of a file that holds a template; tokenizer_config.json lists added tokens, too."""
MAX_TEMPLATE = 1 << 20
MAX_OUTPUT = 1 << 24
"""Characters of a template, and of what it makes of one conversation."""
MAX_WORK = 1_000_000
"""Turns of loops and calls of one rendering."""
CONVERTED = "hf"
"""Folder within a converted model that holds the files which came along."""


class ChatError(ValueError):
    """A template or conversation that cannot be used; one sentence that says why."""


@dataclass
class _Rendering:
    """What a rendering has done so far."""

    blocks: list[str] = field(default_factory=list)
    num_chars: int = 0
    spans: list[tuple[int, int]] = field(default_factory=list)
    generated: list[str] = field(default_factory=list)
    work: int = 0

    def spend(self) -> None:
        self.work += 1
        if self.work > MAX_WORK:
            raise ChatError(f"it takes more than {MAX_WORK:,} steps")


_CURRENT: ContextVar[_Rendering] = ContextVar("rendering")


class ChatTemplate:
    """A folder's chat template and special tokens.

    Args:
        template: Jinja source, or a source for each name; "default" must be among the names.
        special_tokens: such as {"bos_token": "<s>"}; the template sees them under these names.
        name: how errors call it.

    Attributes:
        special_tokens: as given.

    Raises:
        ChatError: a source is no template, or too large.

    References:
        https://huggingface.co/docs/transformers/chat_templating
    """

    def __init__(
        self, template: str | Mapping[str, str], special_tokens: Mapping[str, str] | None = None, name: str = "template"
    ):
        sources = {"default": template} if isinstance(template, str) else template
        if "default" not in sources:
            names = ", ".join(sorted(sources))[:80] or "none"
            raise ChatError(f"{name} has no chat template named default, but {names}")
        self.special_tokens = dict(special_tokens or {})
        self._name = name
        self._templates = {key: self._compiled(source) for key, source in sources.items()}

    @classmethod
    def read(cls, folder: str) -> "ChatTemplate":
        """Reads the template of a Hugging Face folder, or of a model that `maxlm convert from-hf` made of one.

        Args:
            folder: holds chat_template.jinja, chat_template.json or tokenizer_config.json, in this order of preference.

        Raises:
            FileNotFoundError: there is no such folder.
            ChatError: it has no template, or a file is damaged.
            OSError: a file cannot be read.
        """
        folder = files_of(folder)
        config = _read_json(os.path.join(folder, "tokenizer_config.json"))
        tokens = {**_read_json(os.path.join(folder, "special_tokens_map.json")), **config}
        path = os.path.join(folder, "chat_template.jinja")
        template: Any = _read_text(path)
        if template is None:
            path = os.path.join(folder, "chat_template.json")
            template = _read_json(path).get("chat_template")
        if template is None:
            path = os.path.join(folder, "tokenizer_config.json")
            template = config.get("chat_template")
        if template is None:
            raise ChatError(
                f"{folder} has no chat template; it would be in chat_template.jinja or tokenizer_config.json"
            )
        return cls(_named(template, path), _special_tokens(tokens), path)

    def render(self, messages: Sequence[Message], add_generation_prompt: bool = False, **extra: Any) -> str:
        """Writes a conversation as the text the model is to read.

        Args:
            messages: dict(role, content) each, and what else the template knows.
            add_generation_prompt: end with what precedes an answer of the assistant.
            extra: further variables of the template, such as tools, documents or enable_thinking.

        Raises:
            ChatError: the template refuses the messages, fails, or exceeds a limit.
        """
        return self._run(messages, add_generation_prompt, extra)[0]

    def render_spans(self, messages: Sequence[Message], **extra: Any) -> tuple[str, list[tuple[int, int]]]:
        """Writes a conversation, and where the template's {% generation %} blocks, the assistant's words, lie in it.

        Returns:
            The text, and [start, stop) of each block in characters; empty if the template marks none.

        Raises:
            ChatError: as render; or a block is not in the output as it was written.
        """
        text, rendering = self._run(messages, False, extra)
        for (start, stop), generated in zip(rendering.spans, rendering.generated, strict=True):
            if text[start:stop] != generated:
                raise ChatError(f"{self._name}: a generation block lies within a macro or an assignment")
        return text, rendering.spans

    def _compiled(self, source: str) -> jinja2.Template:
        if len(source) > MAX_TEMPLATE:
            raise ChatError(f"{self._name}: the chat template has more than {MAX_TEMPLATE:,} characters")
        try:
            return _environment().from_string(source)
        except Exception as error:  # Jinja's own, and Python's of code nested too deeply.
            raise ChatError(f"{self._name}: the chat template is no Jinja template ({_reason(error)})") from None

    def _run(self, messages: Sequence[Message], prompt: bool, extra: Mapping[str, Any]) -> tuple[str, _Rendering]:
        template = self._templates["default"]
        if extra.get("tools") is not None:
            template = self._templates.get("tool_use", template)
        variables: dict[str, Any] = {"tools": None, "documents": None, **self.special_tokens, **extra}
        # null is how some programs write that a message has no such field, and templates would print it.
        variables["messages"] = [{k: v for k, v in message.items() if v is not None} for message in messages]
        variables["add_generation_prompt"] = prompt
        rendering = _Rendering()
        token = _CURRENT.set(rendering)
        try:
            for block in template.generate(**variables):
                rendering.blocks.append(block)
                rendering.num_chars += len(block)
                if rendering.num_chars > MAX_OUTPUT:
                    raise ChatError(f"it makes more than {MAX_OUTPUT:,} characters of one conversation")
        except Exception as error:  # A template is a program: it may raise whatever Python can.
            raise ChatError(f"{self._name}: the chat template fails ({_reason(error)})") from None
        finally:
            _CURRENT.reset(token)
        return "".join(rendering.blocks), rendering


def files_of(folder: str) -> str:
    """The folder that holds the tokenizer and template of a Hugging Face folder or of a converted model.

    Raises:
        FileNotFoundError: there is no such folder.
    """
    if not os.path.isdir(folder):
        raise FileNotFoundError(f"folder {folder} does not exist; name one that holds a tokenizer and a chat template")
    inner = os.path.join(folder, CONVERTED)
    return inner if os.path.isdir(inner) else folder


class _Generation(jinja2.ext.Extension):
    """The block {% generation %}, which marks the assistant's words."""

    tags = {"generation"}

    def parse(self, parser: Any) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_mark"), [], [], body).set_lineno(line)

    def _mark(self, caller: Callable[[], str]) -> str:
        text, rendering = caller(), _CURRENT.get()
        rendering.spans.append((rendering.num_chars, rendering.num_chars + len(text)))
        rendering.generated.append(text)
        return text


class _Environment(ImmutableSandboxedEnvironment):
    """The sandbox, counting the turns of loops and calls and refusing operators that make text beyond the limit."""

    intercepted_binops = frozenset(["*", "**", "+"])

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        return _Limits().visit(super()._parse(source, name, filename))

    def call(self, *args: Any, **kwargs: Any) -> Any:
        _CURRENT.get().spend()
        return super().call(*args, **kwargs)

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        for value, times in ((left, right), (right, left)):
            if operator == "*" and isinstance(value, str | list | tuple) and isinstance(times, int):
                size = len(value) * times
            else:
                size = abs(times) if operator == "**" and isinstance(times, int) else 0
            if size > (MAX_OUTPUT if operator == "*" else 1000):
                raise ChatError(f"operator {operator} makes something too large")
        return _limited(super().call_binop(context, operator, left, right))


class _Limits(NodeTransformer):
    """Puts filters that count around what loops run over and what ~ makes."""

    def visit_For(self, node: nodes.For) -> nodes.Node:
        self.generic_visit(node)
        node.iter = nodes.Filter(node.iter, "counted turns", [], [], None, None, lineno=node.lineno)
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        return nodes.Filter(self.generic_visit(node), "limited size", [], [], None, None, lineno=node.lineno)


def _environment() -> _Environment:
    """As transformers sets it up."""
    environment = _Environment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, "jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = _tojson
    environment.filters["counted turns"] = _counted
    environment.filters["limited size"] = _limited
    names: dict[str, Any] = {"raise_exception": _raise, "strftime_now": _strftime_now}
    environment.globals.update(names)
    return environment


def _counted(items: Iterable[Any]) -> Iterator[Any]:
    rendering = _CURRENT.get()
    for item in items:
        rendering.spend()
        yield item


def _limited(value: Any) -> Any:
    if isinstance(value, str | list | tuple) and len(value) > MAX_OUTPUT:
        raise ChatError("an operator makes something too large")
    return value


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Jinja's own filter would escape HTML's characters."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise(message: Any) -> None:
    raise jinja2.TemplateError(str(message))


def _strftime_now(form: str) -> str:
    return datetime.datetime.now().strftime(form)


def _reason(error: Exception) -> str:
    text = " ".join(str(error).split())[:200] or type(error).__name__
    return f"line {error.lineno}: {text}" if isinstance(error, jinja2.TemplateSyntaxError) else text


def _named(template: Any, path: str) -> str | dict[str, str]:
    """A template as tokenizer_config.json writes it: text, or a list of dict(name, template)."""
    if isinstance(template, str):
        return template
    if isinstance(template, list) and all(
        isinstance(entry, dict) and isinstance(entry.get("name"), str) and isinstance(entry.get("template"), str)
        for entry in template
    ):
        return {entry["name"]: entry["template"] for entry in template}
    raise ChatError(f"{path}: chat_template is neither text nor a list of objects with name and template")


def _special_tokens(entries: Mapping[str, Any]) -> dict[str, str]:
    """Entries such as bos_token, which are text or dict(content)."""
    tokens = {}
    for key, value in entries.items():
        text = value.get("content") if isinstance(value, dict) else value
        if key.endswith("_token") and isinstance(text, str):
            tokens[key] = text
    return tokens


def _read(path: str) -> bytes | None:
    """What is in a file, or None if there is no such file."""
    try:
        with open(path, "rb") as file:
            data = file.read(MAX_FILE + 1)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise OSError(f"cannot read {path}: {error.strerror}") from None
    if len(data) > MAX_FILE:
        raise ChatError(f"{path} has more than {MAX_FILE:,} bytes: is it another file?")
    return data


def _read_text(path: str) -> str | None:
    """A file's text, or None if there is no such file."""
    try:
        return None if (data := _read(path)) is None else data.decode()
    except UnicodeDecodeError:
        raise ChatError(f"{path} is not UTF-8 text") from None


def _read_json(path: str) -> dict[str, Any]:
    """A file's JSON object, empty if there is no such file."""
    return parse_object(data, path, ChatError) if (data := _read(path)) else {}
