"""Chat templates render as transformers renders them, and a bad one is refused in a sentence."""

import json

import pytest

from maxlm.chat import ChatError, ChatTemplate

CHATML = (
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + "
    "'\\n'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
MARKED = """{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\\n' }}
    {%- if message.role == 'assistant' %}
        {%- generation %}{{ message.content + '<|im_end|>' }}{%- endgeneration %}
    {%- else %}{{- message.content + '<|im_end|>' }}
    {%- endif %}
    {{- '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"""
LLAMA3 = """{{- bos_token }}
{%- if not date_string is defined %}{%- set date_string = "26 Jul 2024" %}{%- endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content']|trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\nToday Date: " + date_string + "\\n\\n" + system_message }}
{{- "<|eot_id|>" }}
{%- if tools is not none %}
    {%- for t in tools %}{{- t | tojson(indent=4) }}{{- "\\n\\n" }}{%- endfor %}
{%- endif %}
{%- for message in messages %}
    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}
    {{- message['content'] | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{%- endif %}
"""
MISTRAL = """{%- if messages[0]["role"] == "system" %}
    {%- set system_message = messages[0]["content"] %}{%- set loop_messages = messages[1:] %}
{%- else %}{%- set loop_messages = messages %}{%- endif %}
{%- set ns = namespace(index=0) %}
{%- for message in loop_messages %}
    {%- if (message["role"] == "user") != (ns.index % 2 == 0) %}
        {{- raise_exception("roles must alternate user/assistant") }}
    {%- endif %}
    {%- set ns.index = ns.index + 1 %}
{%- endfor %}
{{- bos_token }}
{%- for message in loop_messages %}
    {%- if message["role"] == "user" %}
        {%- if loop.last and system_message is defined %}
            {{- "[INST] " + system_message + "\\n\\n" + message["content"] + "[/INST]" }}
        {%- else %}{{- "[INST] " + message["content"] + "[/INST]" }}{%- endif %}
    {%- elif message["role"] == "assistant" %}{{- " " + message["content"] + eos_token }}{%- endif %}
{%- endfor %}"""
GEMMA = """{{ bos_token }}
{%- if messages[0]['role'] == 'system' -%}
    {%- set first_user_prefix = messages[0]['content'] + '\\n\\n' -%}{%- set loop_messages = messages[1:] -%}
{%- else -%}{%- set first_user_prefix = "" -%}{%- set loop_messages = messages -%}{%- endif -%}
{%- for message in loop_messages -%}
    {%- if (message['role'] == 'assistant') -%}{%- set role = "model" -%}
    {%- else -%}{%- set role = message['role'] -%}{%- endif -%}
    {%- if loop.index > 50 %}{% break %}{% endif %}
    {{ '<start_of_turn>' + role + '\\n' + (first_user_prefix if loop.first else "") }}
    {%- if message['content'] is string -%}{{ message['content'] | trim }}
    {%- elif message['content'] is iterable -%}
        {%- for item in message['content'] -%}{{ item['text'] | trim }}{%- endfor -%}
    {%- endif -%}
    {{ '<end_of_turn>\\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{'<start_of_turn>model\\n'}}{%- endif -%}"""
TEMPLATES = {"chatml": CHATML, "marked": MARKED, "llama3": LLAMA3, "mistral": MISTRAL, "gemma": GEMMA}
USER, ASSISTANT, SYSTEM = "user", "assistant", "system"


def talk(*turns):
    return [{"role": role, "content": content} for role, content in turns]


TALKS = [
    talk((USER, "Hi & <b>bye</b>")),
    talk((USER, " two \n"), (ASSISTANT, " 4 "), (USER, "and 3?"), (ASSISTANT, "9\n")),
    talk((SYSTEM, "Be brief."), (USER, "ü 😀"), (ASSISTANT, "ok")),
]


def write_folder(folder, template, **config):
    (folder / "chat_template.jinja").write_text(template)
    tokens = {"bos_token": "<s>", "eos_token": {"content": "</s>", "special": True}}
    (folder / "tokenizer_config.json").write_text(json.dumps({**tokens, **config}))
    return ChatTemplate.read(str(folder))


@pytest.mark.oracle
@pytest.mark.parametrize("name", TEMPLATES)
def test_text_is_what_transformers_writes(tmp_path, name):
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    theirs = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.BPE()), bos_token="<s>", eos_token="</s>", chat_template=TEMPLATES[name]
    )
    theirs.save_pretrained(tmp_path)
    ours = ChatTemplate.read(str(tmp_path))
    tools = [{"type": "function", "function": {"name": "f<", "parameters": {"ü": 1}}}]
    for messages in TALKS:
        for options in ({}, {"add_generation_prompt": True}, {"tools": tools}):
            expected = theirs.apply_chat_template(messages, tokenize=False, **options)
            assert ours.render(messages, **options) == expected


def test_chatml_is_written_as_its_makers_write_it(tmp_path):
    template = write_folder(tmp_path, CHATML)
    assert template.render(TALKS[0], add_generation_prompt=True) == (
        "<|im_start|>user\nHi & <b>bye</b><|im_end|>\n<|im_start|>assistant\n"
    )
    assert template.special_tokens == {"bos_token": "<s>", "eos_token": "</s>"}


def test_generation_blocks_are_found(tmp_path):
    text, spans = write_folder(tmp_path, MARKED).render_spans(TALKS[1])
    assert [text[start:stop] for start, stop in spans] == [" 4 <|im_end|>", "9\n<|im_end|>"]


@pytest.mark.parametrize("place", ["jinja", "json", "config", "named", "converted"])
def test_all_places_of_a_template_are_known(tmp_path, place):
    if place == "jinja":
        write_folder(tmp_path, "{{ bos_token }}right", chat_template="wrong")
    elif place == "json":
        (tmp_path / "chat_template.json").write_text('{"chat_template": "{{ bos_token }}right"}')
        (tmp_path / "special_tokens_map.json").write_text('{"bos_token": {"content": "<s>"}}')
    else:
        folder = tmp_path / "hf" if place == "converted" else tmp_path
        folder.mkdir(exist_ok=True)
        named = [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": "{{ bos_token }}right"}]
        template = named if place == "named" else "{{ bos_token }}right"
        config = {"bos_token": "<s>", "chat_template": template}
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
    template = ChatTemplate.read(str(tmp_path))
    assert template.render(TALKS[0]) == "<s>right"
    if place == "named":
        assert template.render(TALKS[0], tools=[]) == "tools"


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("{{ raise_exception('only users may speak') }}", "only users may speak"),
        ("{% if %}", "no Jinja template"),
        ("{{ messages.__class__.__mro__ }}", "unsafe"),
        ("{{ messages.append(1) }}", "unsafe"),
        ("{{ messages[0]['content'] + 1 }}", "fails"),
        ("{{ 1 / 0 }}", "zero"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "recursion"),
        ("{% for a in range(9999) %}{% for b in range(9999) %}{% endfor %}{% endfor %}", "steps"),
        ("{{ 'a' * 10**10 }}", "too large"),
        ("{{ 9 ** 9 ** 9 }}", "too large"),
        ("{% set n = namespace(a='a') %}{% for i in range(99) %}{% set n.a = n.a ~ n.a %}{% endfor %}", "too large"),
        ("{% set n = namespace(a=[1]) %}{% for i in range(99) %}{% set n.a = n.a + n.a %}{% endfor %}", "too large"),
        ("{% set a = 'a' * 10**6 %}{% for i in range(99) %}{{ a }}{% endfor %}", "characters"),
        ("a" * (1 << 20) + "a", "characters"),
        ("{% include '/etc/passwd' %}", "fails"),
    ],
)
def test_a_bad_template_is_refused(tmp_path, source, words):
    with pytest.raises(ChatError, match=words) as caught:
        write_folder(tmp_path, source).render(TALKS[0])
    assert "chat_template.jinja" in str(caught.value)


@pytest.mark.parametrize(
    "config", ["[]", "{", '{"chat_template": 3}', '{"chat_template": [{"name": "default"}]}', '{"chat_template": []}']
)
def test_a_bad_file_is_refused(tmp_path, config):
    (tmp_path / "tokenizer_config.json").write_text(config)
    with pytest.raises(ChatError, match=r"tokenizer_config\.json"):
        ChatTemplate.read(str(tmp_path))


def test_a_folder_without_template_is_refused(tmp_path):
    with pytest.raises(ChatError, match="no chat template"):
        ChatTemplate.read(str(tmp_path))
    with pytest.raises(FileNotFoundError, match="does not exist"):
        ChatTemplate.read(str(tmp_path / "none"))
