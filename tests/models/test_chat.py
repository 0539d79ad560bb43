"""Chat templates: equal to transformers where both render, and bounded where a template means harm."""

from __future__ import annotations

import json
import time
import warnings
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from tokenizers import models

from splitdecode.errors import CheckpointError, RequestError
from splitdecode.models.chat import ChatTemplate

SPECIALS = {"bos_token": "<|bos|>", "eos_token": "<|eos|>"}

QWEN = """
{%- if tools %}
    {{- '<|im_start|>system\\n' }}
    {%- for tool in tools %}{{- "\\n" }}{{- tool | tojson }}{%- endfor %}
{%- else %}
    {%- if messages[0].role == 'system' %}
        {{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}
    {%- endif %}
{%- endif %}
{%- set ns = namespace(multi_step_tool=true, last_query_index=messages|length - 1) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if ns.multi_step_tool and message.role == "user" and not(message.content.startswith('<tool_response>')) %}
        {%- set ns.multi_step_tool = false %}
        {%- set ns.last_query_index = index %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if (message.role == "user") or (message.role == "system" and not loop.first) %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}
    {%- elif message.role == "assistant" %}
        {%- set content = message.content %}
        {%- set reasoning_content = '' %}
        {%- if '</think>' in content %}
            {%- set reasoning_content = content.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') %}
            {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
        {%- endif %}
        {%- if loop.index0 > ns.last_query_index and (loop.last or reasoning_content) %}
            {{- '<|im_start|>' + message.role + '\\n<think>\\n' }}
            {{- reasoning_content.strip('\\n') + '\\n</think>\\n\\n' }}
            {{- content.lstrip('\\n') }}
        {%- else %}
            {{- '<|im_start|>' + message.role + '\\n' + content }}
        {%- endif %}
        {{- '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
{%- endif %}
"""
LLAMA3 = (
    "{% set loop_messages = messages %}{% for message in loop_messages %}{% set content = '<|start_header_id|>' + "
    "message['role'] + '<|end_header_id|>\n\n'+ message['content'] | trim + '<|eot_id|>' %}{% if loop.index0 == 0 %}"
    "{% set content = bos_token + content %}{% endif %}{{ content }}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
DEEPSEEK = (
    "{% if not add_generation_prompt is defined %}{% set add_generation_prompt = false %}{% endif %}{% set ns = "
    "namespace(is_first=false, system_prompt='') %}{%- for message in messages %}{%- if message['role'] == 'system' %}"
    "{% set ns.system_prompt = message['content'] %}{%- endif %}{%- endfor %}{{bos_token}}{{ns.system_prompt}}"
    "{%- for message in messages %}{%- if message['role'] == 'user' %}{{'<｜User｜>' + message['content']}}{%- endif %}"
    "{%- if message['role'] == 'assistant' and message['content'] is not none %}{% set content = message['content'] %}"
    "{% if '</think>' in content %}{% set content = content.split('</think>')[-1] %}{% endif %}"
    "{{'<｜Assistant｜>' + content + '<｜end▁of▁sentence｜>'}}{%- endif %}{%- endfor -%}"
    "{% if add_generation_prompt %}{{'<｜Assistant｜><think>\\n'}}{% endif %}"
)
PARTS = """{%- macro turn(role, text) -%}
<{{ role }}>{% generation %}{{ text | trim }}{% endgeneration %}</{{ role }}>
{%- endmacro -%}
{% for message in messages if message.content %}
    {% if loop.index > 3 %}
        {% break %}
    {% endif %}
{{ turn(message.role, message.content) }} {{ loop.index ~ '/' ~ loop.length ~ (loop.last and '.' or ',') }}
{% else %}
nobody
{% endfor %}
{{ {'b': [1, 2.5, none], 'a': 'é<&>"'} | tojson(indent=2) }} {{ messages | map(attribute='role') | join(', ') }}
{{ '%s has %d' % ('it', 3) }} {{ '{:>4}|{}'.format(7, x | default('no x')) }} {{ 'ab' * 3 }} {{ 2 ** 10 + 7 % 4 }}
{{ "a\nb" | indent(3) }} {{ 'x' | center(5) }} {{ 'aXbX' | replace('X', '--') }} {{ 2.345 | round(1) }}
{{ range(4) | list }}
{% set box %}{{ 'q' }}{{ 'r' }}{% endset %}{{ box | upper }} {{ messages[0].get('name', 'nameless') }}
{% for key, value in messages[0] | dictsort %}{{ key }}={{ value | string | length }};{% endfor %}
"""
TEMPLATES = {"qwen": QWEN, "llama3": LLAMA3, "deepseek": DEEPSEEK, "parts": PARTS}
CHATS = [
    [{"role": "user", "content": "hi"}],
    [{"role": "system", "content": "be brief"}, {"role": "user", "content": " 2+2? \n"}],
    [
        {"role": "user", "content": "one"},
        {"role": "assistant", "content": "<think>\nhm\n</think>\n\ntwo "},
        {"role": "user", "content": "<|im_end|>é☃", "name": "me"},
    ],
    [{"role": "user", "content": "go"}, {"role": "assistant", "content": "<think>\nso far "}],
    [{"role": "user", "content": str(i)} for i in range(6)],
]


def template(source: str | None) -> ChatTemplate:
    return ChatTemplate(source, "there/chat_template.jinja", SPECIALS)


@pytest.fixture(scope="module")
def transformers_tokenizer() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from transformers import PreTrainedTokenizerFast

    built = tokenizers.Tokenizer(models.WordLevel({"<|bos|>": 0, "<|eos|>": 1, "x": 2}, unk_token="x"))
    return PreTrainedTokenizerFast(tokenizer_object=built, **SPECIALS)


@pytest.mark.parametrize("name", TEMPLATES)
def test_as_transformers_renders(name: str, transformers_tokenizer: Any) -> None:
    ours = template(TEMPLATES[name])
    for chat in CHATS:
        for changes in ({}, {"add_generation_prompt": False}, {"template_kwargs": {"enable_thinking": False, "x": 5}}):
            theirs = {"add_generation_prompt": True} | changes | changes.get("template_kwargs", {})
            theirs.pop("template_kwargs", None)
            expected = transformers_tokenizer.apply_chat_template(
                chat, chat_template=TEMPLATES[name], tokenize=False, **theirs
            )
            assert ours.render(chat, **changes) == expected


@pytest.mark.parametrize("name", ["qwen", "llama3"])
def test_continuing_as_transformers_does(name: str, transformers_tokenizer: Any) -> None:
    chat = CHATS[3]
    ours = template(TEMPLATES[name]).render(chat, add_generation_prompt=False, continue_final_message=True)
    expected = transformers_tokenizer.apply_chat_template(
        chat, chat_template=TEMPLATES[name], tokenize=False, continue_final_message=True
    )
    assert ours == expected
    assert ours.rstrip().endswith("so far")
    assert chat[-1]["content"] == "<think>\nso far "


def test_continuing_what_is_not_written() -> None:
    with pytest.raises(RequestError, match="does not write the last message"):
        template("fixed").render(CHATS[0], add_generation_prompt=False, continue_final_message=True)
    with pytest.raises(RequestError, match="continue_final_message"):
        template(QWEN).render(CHATS[0], continue_final_message=True)


def written(folder: Path, name: str, content: Any) -> None:
    (folder / name).write_text(content if isinstance(content, str) else json.dumps(content), "utf-8")


def test_where_templates_lie(tmp_path: Path) -> None:
    def render() -> str:
        return ChatTemplate.from_directory(tmp_path).render([{"role": "user", "content": "q"}])

    with pytest.raises(RequestError, match=r"no chat template; use generate\(\)"):
        render()
    config = {"bos_token": {"content": "<s>"}, "eos_token": "</s>"}
    written(tmp_path, "tokenizer_config.json", config | {"chat_template": "{{ bos_token }}config"})
    assert render() == "<s>config"
    named = [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": "{{ eos_token }}listed"}]
    written(tmp_path, "tokenizer_config.json", config | {"chat_template": named})
    assert render() == "</s>listed"
    written(tmp_path, "chat_template.json", {"chat_template": "from json"})
    assert render() == "from json"
    written(tmp_path, "chat_template.jinja", "{{ messages[0].content }} from jinja\n")
    assert render() == "q from jinja"


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("tokenizer_config.json", {"chat_template": 5}),
        ("tokenizer_config.json", {"chat_template": [{"name": "rag", "template": "x"}]}),
        ("chat_template.json", "{"),
    ],
)
def test_damage_is_named(name: str, content: Any, tmp_path: Path) -> None:
    written(tmp_path, name, content)
    with pytest.raises(CheckpointError, match=name):
        ChatTemplate.from_directory(tmp_path)


def test_bytes_that_are_no_text(tmp_path: Path) -> None:
    (tmp_path / "chat_template.jinja").write_bytes(b"\xff\xfe")
    with pytest.raises(CheckpointError, match=r"chat_template\.jinja: not readable"):
        ChatTemplate.from_directory(tmp_path)


@pytest.mark.parametrize(
    "messages",
    [
        [],
        "hi",
        None,
        {"role": "user", "content": "hi"},
        ["hi"],
        [{"role": "user"}],
        [{"content": "x"}],
        [{"role": "user", "content": None}],
        [{"role": 1, "content": "x"}],
        [{"role": "user", "content": [{"type": "text"}]}],
        [{"role": "user", "content": "x", "extra": object()}],
    ],
)
def test_messages_are_checked(messages: Any) -> None:
    with pytest.raises(RequestError, match="messages"):
        template(QWEN).render(messages)


def test_reserved_variables() -> None:
    for name in ("messages", "bos_token", "tools", "add_generation_prompt"):
        with pytest.raises(RequestError, match=f"template_kwargs: found '{name}'"):
            template(QWEN).render(CHATS[0], template_kwargs={name: "x"})
    with pytest.raises(RequestError, match="template_kwargs"):
        template(QWEN).render(CHATS[0], template_kwargs={"f": open})


def test_a_template_may_refuse() -> None:
    with pytest.raises(RequestError, match=r"there/chat_template\.jinja: chat template: .*roles must alternate"):
        template("{{ raise_exception('roles must alternate') }}").render(CHATS[0])
    with pytest.raises(RequestError, match="chat template: "):
        template("{{ messages[0].content + 5 }}").render(CHATS[0])
    assert template("{{ strftime_now('%Y') }}").render(CHATS[0]) == time.strftime("%Y")


@pytest.mark.parametrize(
    "source",
    [
        "{% for %}",
        "{{ x | nowhere }}",
        "{{ (" * 3000,
        "{% if 1 %}" * 500,
        "x" * ((1 << 20) + 1),
        "{% include 'a' %}{{ x |",
    ],
)
def test_what_does_not_compile(source: str) -> None:
    with pytest.raises(CheckpointError, match=r"there/chat_template\.jinja: "):
        template(source).render(CHATS[0])


def repeated(step: str) -> str:
    """A template that applies `step` to x forty times."""
    return "{% set n = namespace(x='AA') %}{% for i in range(40) %}{% set n.x = " + step + " %}{% endfor %}"


HARM = {
    "product": "{{ 'A' * 300000000 }}",
    "product, set": "{% set x = 'A' * 300000000 %}",
    "product, turned": "{{ 300000000 * 'A' }}",
    "product of a list": "{% set x = [1] * 300000000 %}",
    "doubling": "{% set n = namespace(x='AAAA') %}{% for i in range(40) %}{% set n.x = n.x + n.x %}{% endfor %}",
    "doubling, ~": "{% set n = namespace(x='AAAA') %}{% for i in range(40) %}{% set n.x = n.x ~ n.x %}{% endfor %}",
    "doubling, blocks": "{% set x0 %}AAAA{% endset %}"
    + "".join(f"{{% set x{i + 1} %}}{{{{ x{i} }}}}{{{{ x{i} }}}}{{% endset %}}" for i in range(40)),
    "doubling, macros": "{% macro f0() %}AAAA{% endmacro %}"
    + "".join(f"{{% macro f{i + 1}() %}}{{{{ f{i}() }}}}{{{{ f{i}() }}}}{{% endmacro %}}" for i in range(40))
    + "{{ f40() }}",
    "doubling, lists": "{% set n = namespace(x=[1]) %}{% for i in range(40) %}{% set n.x = n.x + n.x %}{% endfor %}",
    "doubling, replace": repeated("n.x.replace('A', 'AA')"),
    "doubling, |replace": repeated("n.x | replace('A', 'AA')"),
    "doubling, join": repeated("n.x.join([n.x, n.x])"),
    "doubling, |join": repeated("[n.x, n.x] | join"),
    "doubling, format": repeated("'{}{}'.format(n.x, n.x)"),
    "doubling, %": repeated("'%s%s' % (n.x, n.x)"),
    "doubling, string": repeated("[n.x, n.x] | string"),
    "doubling, tojson": repeated("[n.x, n.x] | tojson"),
    "doubling, nested data": repeated("[n.x, n.x]") + "{{ n.x | string }}",
    "doubling, nested output": repeated("[n.x, n.x]") + "{{ n.x }}",
    "doubling, nested keys": repeated("{'a': n.x, 'b': n.x}") + "{{ n.x | tojson }}",
    "doubling, compared": repeated("[n.x, n.x]") + "{% set m = n.x %}" + repeated("[n.x, n.x]") + "{{ m == n.x }}",
    "doubling, tested": repeated("[n.x, n.x]") + "{% set m = n.x %}" + repeated("[n.x, n.x]") + "{{ m is eq n.x }}",
    "doubling, sorted": repeated("[n.x, n.x]") + "{% set m = n.x %}" + repeated("[n.x, n.x]") + "{{ [m, n.x] | sort }}",
    "doubling, raised": repeated("[n.x, n.x]") + "{{ raise_exception(n.x) }}",
    "doubling, sought": repeated("[n.x, n.x]") + "{{ [1].index(n.x) }}",
    "doubling, cased": repeated("[n.x, n.x]") + "{{ n.x is upper }}{{ n.x | upper }}",
    "power": "{{ 9 ** (9 ** 9) }}",
    "power, negative": "{{ (0 - 9) ** (9 ** 9) }}",
    "squares": "{% set n = namespace(x=9) %}{% for i in range(40) %}{% set n.x = n.x * n.x %}{% endfor %}",
    "range": "{% for i in range(2000000) %}{% endfor %}",
    "range, huge": "{% for i in range(10 ** 30) %}{% endfor %}",
    "ranges": "{% for i in range(2000) %}{% for j in range(2000) %}{% endfor %}{% endfor %}",
    "strings": "{% set s = 'A' * 2000 %}{% for i in s %}{% for j in s %}{% endfor %}{% endfor %}",
    "strings, mapped": "{% set s = 'A' * 2000 %}"
    "{% for i in s | map('upper') %}{% for j in s | map('upper') %}{% endfor %}{% endfor %}",
    "macros": "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
    "recursive loop": "{% for x in [[1]] recursive %}{{ loop(x) }}{% endfor %}",
    "output": "{% for i in range(100000) %}" + "A" * 100 + "{% endfor %}",
    "ljust": "{{ 'x'.ljust(300000000) }}",
    "rjust": "{{ 'x'.rjust(300000000) }}",
    "center": "{{ 'x'.center(300000000) }}",
    "zfill": "{{ 'x'.zfill(300000000) }}",
    "expandtabs": "{{ '\t'.expandtabs(300000000) }}",
    "expandtabs, named": "{{ '\t'.expandtabs(tabsize=300000000) }}",
    "format width": "{{ '{:>300000000}'.format(1) }}",
    "format width, given": "{{ '{:>{}}'.format(1, 300000000) }}",
    "format_map": "{{ '{a:>300000000}'.format_map({'a': 1}) }}",
    "% width": "{{ '%300000000d' % 1 }}",
    "% width, given": "{{ '%*d' % (300000000, 1) }}",
    "% width, key": "{{ ('%(a(b))300000000s' % {'a(b)': 'x'}) | length }}",
    "% width, behind %%": "{{ ('%5%%300000000s' % 'x') | length }}",
    "% precision": "{{ '%.300000000f' % 1 }}",
    "format width, key": "{{ '{0[a}b]:300000000}'.format({'a}b': 'x'}) }}",
    "format, kept": "{% set s = 'A' * 1000000 %}{{ ([s.format] * 20) | string | length }}{{ [s] * 20 }}",
    "views": "{% set s = 'A' * 1000000 %}{{ ({'k': [s] * 20}.values() | string) | length }}",
    "views, %": "{% set s = 'A' * 1000000 %}{{ ('%s' % ({'k': [s] * 20}.items(),)) | length }}",
    "namespaces": "{% set s = 'A' * 1000000 %}{% set n = namespace(k=[s] * 20) %}{{ (n | string) | length }}",
    "slices": "{% set s = 'A' * 4000000 %}{% set n = namespace(l=[]) %}"
    "{% for i in range(40) %}{% set n.l = n.l + [s[1:]] %}{% endfor %}",
    "|center": "{{ 'x' | center(300000000) }}",
    "|center, mapped": "{{ ['x'] | map('center', 300000000) | list }}",
    "|indent": "{{ 'x\ny' | indent(300000000) }}",
    "|indent, many": "{{ ('\n' * 1000000) | indent(1000) }}",
    "|format": "{{ '%300000000d' | format(1) }}",
    "|round": "{{ 1.5 | round(300000000, 'ceil') }}",
    "|tojson": "{{ [1] | tojson(indent=300000000) }}",
    "to_bytes": "{{ (5).to_bytes(300000000, 'big') }}",
    "encode": "{{ 'x'.encode().ljust(300000000) }}",
    "strftime": "{{ strftime_now('%300000000d') }}",
    "classes": "{{ ''.__class__.__mro__ }}{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "functions": "{{ raise_exception.__globals__ }}{{ raise_exception.__globals__['os'] }}",
    "namespace": "{% set n = namespace() %}{% set n.__class__ = 5 %}",
    "format attribute": "{{ '{0.__class__.__mro__[1].__subclasses__}'.format('x') }}",
    "append": "{{ messages.append(1) }}",
    "lipsum": "{{ lipsum(n=1000000) }}",
    "|batch": "{{ [1] | batch(300000000, 'x') | list }}",
    "|attr": "{{ 'x' | attr('__class__') }}",
}


@pytest.mark.parametrize("name", HARM)
def test_harm_is_stopped_soon(name: str) -> None:
    started = time.process_time()
    with pytest.raises((CheckpointError, RequestError), match=r"there/chat_template\.jinja: chat template: "):
        template(HARM[name]).render(CHATS[0])
    assert time.process_time() - started < 5


def test_what_looks_like_a_width_and_is_none() -> None:
    source = "{{ '%% 2026 %s' % 1 }} {{ '2026 {}'.format(2) }} {{ '%(2026)d' % {'2026': 3} }} {{ '{{2026}}'.format() }}"
    assert template(source + "{{ 'abc'[1:] }}{{ [1, 2][:1] }}").render(CHATS[0]) == "% 2026 1 2026 2 3 {2026}bc[1]"


def test_long_conversations_are_no_harm() -> None:
    chat = [{"role": ("user", "assistant")[i % 2], "content": "word " * 100} for i in range(1500)]
    for name in TEMPLATES:
        assert template(TEMPLATES[name]).render(chat)


def test_rendering_again_starts_afresh() -> None:
    ours = template("{% for i in range(n) %}{{ 'x' * 2 }}{% endfor %}")
    for _ in range(3):
        assert len(ours.render(CHATS[0], template_kwargs={"n": 30_000})) == 60_000
        with pytest.raises(CheckpointError, match="steps"):  # range() and the loop both count
            ours.render(CHATS[0], template_kwargs={"n": 600_000})
