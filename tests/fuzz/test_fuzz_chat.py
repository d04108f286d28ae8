"""Chat templates and conversations may be anything: text or one of maxlm's own errors, never a traceback."""

import json

import pytest
from fuzz_values import JSON, TEXTS, cut_or_changed, deep, fuzz, mutated, told
from hypothesis import example, given
from hypothesis import strategies as st

from maxlm.chat import ChatError, ChatTemplate
from maxlm.data.chats import Chats
from maxlm.data.sources import DataError, expand

TEMPLATE = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>' + m.content | trim + '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
ROW = {
    "messages": [
        {"role": "user", "content": "two and two"},
        {"role": "assistant", "content": "four"},
        {"role": "user", "content": "and three"},
        {"role": "assistant", "content": "seven"},
    ]
}
WORDS = "{{ }} {% %} for in messages if endif endfor set a = ( ) [ ] | ~ * 9 'x' range generation endgeneration".split()
CONFIG = {"chat_template": [{"name": "default", "template": TEMPLATE}], "eos_token": {"content": "<|end|>"}}


@pytest.fixture(scope="module")
def template():
    return ChatTemplate(TEMPLATE)


@fuzz(250)
@given(st.lists(st.sampled_from(WORDS), max_size=12).map(" ".join) | cut_or_changed(TEMPLATE.encode()))
@example("{{ " + deep("(", ")") + " }}")
@example(deep("{% if a %}", "{% endif %}", 300))
@example("{{ messages | map(attribute='__class__') | list }}")
@example("{% set a = namespace(x='aaaaaaaa') %}{% for i in range(60) %}{% set a.x = a.x * 8 %}{% endfor %}")
@example("{% for a in 'x' * 99999 recursive %}{{ loop(messages) }}{% endfor %}")
@example("{{ '%c' | format(55296) }}")
@example("{% generation %}{% generation %}a{% endgeneration %}{% endgeneration %}")
@example("{{ cycler.__init__.__globals__.os.system('true') }}")
def test_a_template_may_be_any_program(source):
    text = source if isinstance(source, str) else source.decode("utf-8", "replace")
    try:
        chat = ChatTemplate(text)
        assert isinstance(chat.render(ROW["messages"], add_generation_prompt=True), str)
        written, spans = chat.render_spans(ROW["messages"])
        assert all(0 <= start <= stop <= len(written) for start, stop in spans)
    except ChatError as error:
        told(error)


@fuzz(150)
@given(mutated(CONFIG).map(lambda tree: json.dumps(tree).encode()) | cut_or_changed(json.dumps(CONFIG).encode()))
@example(deep("[", "]").encode())
def test_a_tokenizer_config_may_hold_anything(tmp_path, data):
    (tmp_path / "tokenizer_config.json").write_bytes(data)
    try:
        chat = ChatTemplate.read(str(tmp_path))
        chat.render(ROW["messages"])
    except ChatError as error:
        told(error)


@fuzz(300)
@given(mutated(ROW, JSON | st.dictionaries(st.sampled_from(["role", "content", "from", "value"]), TEXTS, max_size=3)))
@example({"conversations": [{"from": "gpt", "value": None}]})
@example({"conversations": [{"from": ["gpt"], "value": "a"}]})
@example({"messages": [{"role": "assistant", "content": "a\ud800"}]})
def test_a_line_of_chat_may_hold_anything(tmp_path, template, row):
    (tmp_path / "a.jsonl").write_text(json.dumps(row) + "\n")
    chats = Chats(template, ["<|end|>"])
    try:
        for document in chats.documents(*expand([str(tmp_path / "a.jsonl")])):
            assert document.text.encode()
            assert all(0 <= start <= stop <= len(document.text) for start, stop in document.spans or ())
    except DataError as error:
        told(error, "a.jsonl line 1")
