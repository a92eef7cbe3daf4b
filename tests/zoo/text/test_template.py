"""A chat template is a stranger's program: what it may do, and what it says.

Renderings, and the marks of what was generated, are held against transformers'.
"""

import concurrent.futures
import contextlib
import json
import os
import signal
import time

import jinja2
import pytest
import transformers
from transformers.utils import chat_template_utils

from tests.conftest import TINY
from tests.zoo.text import jobs
from zoo.text import sandbox, template, tokenizer
from zoo.text.confined import Limits, Worker

TURNS = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": " Which way? "},
    {"role": "assistant", "content": "Onwards."},
    {"role": "user", "content": "Und dann — 然后？ <b>&'\"</b>\n"},
    {"role": "assistant", "content": "  Home.\n\nThen rest.  "},
]
GIVEN = {
    "messages": TURNS, "tools": None, "documents": None, "add_generation_prompt": False,
    "bos_token": "<s>", "eos_token": "</s>",
}  # fmt: skip
DATE = "2026-01-31"
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "Says <how> it's & where",
            "parameters": {"type": "object", "properties": {"town": {"type": "string"}}},
        },
    }
]


def rendered(text, date=None, **given):
    return template.render(template.compiled(text, date), GIVEN | given)


def said(text, date=None, **given):
    return rendered(text, date, **given)[0]


ESCAPES = [
    "{{ ''.__class__ }}",
    "{{ ''['__class__'] }}",
    "{{ ''|attr('__class__') }}",
    "{{ ''|attr('__cla' ~ 'ss__') }}",
    "{{ ['']|map(attribute='__class__')|join }}",
    "{{ ['']|map('attr', '__class__')|join }}",
    "{{ [{'a': ''}]|map(attribute='a.__class__')|join }}",
    "{{ '{0.__class__}'.format('') }}",
    "{{ '{0[__class__]}'.format('') }}",
    "{{ '{a.__class__}'.format_map({'a': ''}) }}",
    "{{ ('{0.__class__}'|safe).format('') }}",
    "{{ (''|attr('format'))('{0.__class__}') }}",
    "{{ '{0.__class__}'|format('') }}",
    "{{ ['{0.__class__}']|map('format', '')|join }}",
    "{% set f = '{0.__class__}'.format %}{{ f('') }}",
    "{% set f = '{0.__class__}'['format'] %}{{ f('') }}",
    "{{ cycler.__init__.__globals__ }}",
    "{{ joiner.__init__.__globals__ }}",
    "{{ namespace.__init__.__globals__ }}",
    "{{ namespace().__class__ }}",
    "{{ namespace(a=1)._Namespace__attrs }}",
    "{{ dict.__class__ }}",
    "{{ dict.__base__ }}",
    "{{ dict.mro() }}",
    "{{ dict.__call__.__globals__ }}",
    "{{ range.__class__ }}",
    "{{ raise_exception.__globals__ }}",
    "{{ raise_exception.__code__ }}",
    "{{ raise_exception.__builtins__ }}",
    "{{ strftime_now.__self__ }}",
    "{{ strftime_now.__self__.__class__ }}",
    "{{ self.__class__ }}",
    "{{ self._TemplateReference__context }}",
    "{{ self.__init__.__globals__ }}",
    "{% for x in [1] %}{{ loop.__class__ }}{{ loop._iterable }}{% endfor %}",
    "{% macro m() %}{% endmacro %}{{ m._environment }}{{ m._func.__globals__ }}",
    "{% macro m() %}{{ caller.__class__ }}{% endmacro %}{% call m() %}{% endcall %}",
    "{{ undefined.__class__ }}{{ undefined._undefined_hint }}",
    "{{ messages.__class__ }}{{ messages[0].__class__ }}{{ messages.__reduce__ }}",
    "{{ 1 .__class__ }}{{ 1.5.__class__ }}{{ none.__class__ }}{{ true.__class__ }}",
    "{{ (messages|map('upper')).gi_frame }}{{ (messages|map('upper')).gi_code }}",
    "{{ [].append.__self__ }}{{ ''.join.__self__ }}",
    "{{ ''|tojson(cls=namespace) }}",
    "{{ undefined|tojson(default=raise_exception) }}",
    "{{ environment }}{{ context }}{{ _environment }}{{ __builtins__ }}{{ config }}",
]


@pytest.mark.parametrize("text", ESCAPES)
def test_nothing_leads_out_of_the_sandbox(text):
    try:
        found = said(text, DATE)
    except ValueError as error:
        assert str(error).startswith("the chat template refuses the messages: ")
        return
    assert found == "" or found == "{0.__class__}", found


@pytest.mark.parametrize(
    "text",
    [
        "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ namespace.__init__.__globals__['__builtins__'] }}",
        "{{ dict.__class__.__base__ }}",
        "{{ namespace(__call__=1) }}",
        "{{ namespace({'__class__': 1}) }}",
        "{{ namespace(**{'_Namespace__attrs': 1}) }}",
        "{% set n = namespace() %}{% set n.__class__ = 1 %}",
        "{% set n = namespace() %}{% set n._Namespace__attrs = {} %}",
        "{% include '/etc/passwd' %}",
        "{% include '/etc/passwd' ignore missing %}",
        "{% include ['a', '../../etc/passwd'] %}",
        "{% import '/etc/passwd' as p %}",
        "{% from '/etc/passwd' import p %}",
        "{% extends '/etc/passwd' %}",
        "{{ messages.append(1) }}",
        "{{ messages.clear() }}",
        "{{ messages.sort() }}",
        "{{ messages.__setitem__(0, 1) }}",
        "{{ messages[0].update(role='x') }}",
        "{{ messages[0].pop('role') }}",
        "{{ messages[0].setdefault('x', 1) }}",
        "{{ messages[0]['update']({'role': 'x'}) }}",
        "{{ (messages[0]|attr('clear'))() }}",
        "{{ messages|map('attr', 'clear')|list|first() }}{{ messages[0].clear() }}",
        "{{ lipsum(3) }}",
    ],
)
def test_what_reaches_for_more_is_refused_and_changes_nothing(text):
    before = json.dumps(TURNS)
    with pytest.raises(ValueError, match="the chat template refuses the messages"):
        rendered(text)
    assert json.dumps(TURNS) == before


@pytest.mark.parametrize(
    "text",
    [
        "{% set messages[0].role = 'x' %}",
        "{% set messages.x = 1 %}",
        "{% do messages.append(1) %}",
        "{% if %}",
        "{{ 'x'|nothing }}",
        "{{ 'x'|random }}",
        "{% generation %}",
        "{% endgeneration %}",
        "{{" + "(" * 3000 + "1" + ")" * 3000 + "}}",
        "{{" + "[" * 3000 + "]" * 3000 + "}}",
        "{{" + "not " * 3000 + "1}}",
        "{% if 1 %}" * 300 + "{% endif %}" * 300,
    ],
)
def test_what_is_no_template_is_a_sentence(text):
    with pytest.raises(ValueError, match="the chat template"):
        rendered(text)


ENDLESS = [
    "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "{% for i in range(99999) %}{% for j in range(99999) %}{% set x = i %}{% endfor %}{% endfor %}",
    "{% set a = range(99999)|list %}{% for i in a %}{{ a|map('string')|join|length }}{% endfor %}",
    "{% macro m(n) %}{% if n %}{{ m(n - 1) }}{{ m(n - 1) }}{% endif %}{% endmacro %}{{ m(60) }}",
    "{% set n = namespace(x=[1]) %}{% for i in range(90) %}{% set n.x = [n.x, n.x] %}{% endfor %}"
    "{{ n.x|tojson|length }}",
]


@pytest.fixture
def worker():
    with contextlib.closing(Worker("the template", "use another", Limits(0.4))) as one:
        yield one


@pytest.mark.parametrize("text", ENDLESS)
def test_what_takes_too_long_is_stopped(text, worker):
    with pytest.raises(ValueError, match=r"to render it takes more than 0.4 seconds of CPU time"):
        worker.call(jobs.rendered, text, GIVEN)
    assert worker.call(jobs.rendered, "{{ 1 }}", GIVEN) == "1"


LARGE = [
    "{{ 'x' * 10**9 }}",
    "{{ 10**9 * 'x' }}",
    "{{ ('x' * 10**5) * 10**5 }}",
    "{{ [0] * 10**9 }}",
    "{{ ([0] * 10**5) * 10**5 }}",
    "{{ (0,) * 10**9 }}",
    "{{ 10 ** 10 ** 10 }}",
    "{{ 7 ** 9999999 }}",
    "{{ 'x'|center(10**9) }}",
    "{{ 'x'|center(1000000000) }}",
    "{{ 'x'.center(1000000000) }}",
    "{{ 'x'.ljust(1000000000) }}",
    "{{ 'x'.rjust(1000000000) }}",
    "{{ 'x'.zfill(1000000000) }}",
    "{{ 'x\\t'.expandtabs(1000000000) }}",
    "{{ 'x'['zfill'](1000000000) }}",
    "{{ ('x'|attr('zfill'))(1000000000) }}",
    "{{ ('x'|safe).center(1000000000) }}",
    "{{ 'x'.encode().zfill(1000000000) }}",
    "{{ 7 .to_bytes(1000000000) }}",
    "{{ 'x'.translate({120: 'y' * 10**7}) * 3 }}",
    "{{ '%1000000000d' % 1 }}",
    "{{ '%0*d' % (1000000000, 1) }}",
    "{{ '%(a)1000000000d' % {'a': 1} }}",
    "{{ '%.1000000000f' % 1 }}",
    "{{ ('%1000000000d'|safe) % 1 }}",
    "{{ '%1000000000d'.encode() % 1 }}",
    "{{ '%1000000000d'|format(1) }}",
    "{{ '%*d'|format(1000000000, 1) }}",
    "{{ ['%1000000000d']|map('format', 1)|join }}",
    "{{ '{:1000000000}'.format(1) }}",
    "{{ '{:{}}'.format(1, 1000000000) }}",
    "{{ '{a:1000000000}'.format_map({'a': 1}) }}",
    "{{ ('{:1000000000}'|safe).format(1) }}",
    "{{ 'x'|indent(1000000000, true) }}",
    "{{ ('x\\n' * 10**6)|indent(100) }}",
    "{{ ('x\\n' * 10**5)|indent('x' * 10**5) }}",
    "{{ (['x' * 10**6] * 100)|join }}",
    "{{ ([''] * 10**5)|join('x' * 10**5) }}",
    "{{ ''.join(['x' * 10**6] * 100) }}",
    "{{ ('x' * 10**6).join([''] * 100) }}",
    "{{ ('x' * 10**5)|replace('x', 'y' * 10**5) }}",
    "{{ ('x' * 10**5)|replace('', 'y' * 10**5) }}",
    "{{ ('x' * 10**5).replace('x', 'y' * 10**5) }}",
    "{{ [1]|batch(1000000000, 0)|list }}",
    "{{ [1]|slice(1000000000)|list }}",
    "{{ ([[0] * 1000] * 100000)|sum(start=[]) }}",
    "{{ 'x'|tojson(indent=1000000000) }}{{ [1]|tojson(indent=1000000000) }}",
    "{{ [1]|tojson(indent='x' * 10**7) }}",
    "{{ range(10**9) }}",
    "{{ range(1000000000)|list }}",
    "{% set n = namespace(x='x') %}{% for i in range(60) %}{% set n.x = n.x + n.x %}{% endfor %}",
    "{% set n = namespace(x='x') %}{% for i in range(60) %}{% set n.x = n.x ~ n.x %}{% endfor %}",
    "{% set n = namespace(x=[1]) %}{% for i in range(60) %}{% set n.x = n.x + n.x %}{% endfor %}",
    "{% set n = namespace(x=3) %}{% for i in range(60) %}{% set n.x = n.x * n.x %}{% endfor %}",
    "{% set n = namespace(x='x') %}{% for i in range(60) %}"
    "{% set y %}{{ n.x }}{{ n.x }}{% endset %}{% set n.x = y %}{% endfor %}",
    "{% macro m(x, n) %}{% if n %}{{ m(x, n - 1) }}{{ m(x, n - 1) }}{% else %}{{ x }}{% endif %}"
    "{% endmacro %}{{ m('x' * 10**5, 10) }}",
    "{% for i in range(99999) %}{{ 'x' * 10**5 }}{% endfor %}",
    "{% generation %}{% for i in range(30) %}{{ 'x' * 10**6 }}{% endfor %}{% endgeneration %}",
    "{% filter upper %}{% for i in range(30) %}{{ 'x' * 10**6 }}{% endfor %}{% endfilter %}",
]


@pytest.mark.parametrize("text", LARGE)
def test_what_would_grow_large_is_refused_at_once(text):
    before = time.thread_time()
    with pytest.raises(ValueError, match="the chat template") as found:
        rendered(text)
    assert "too much memory" not in str(found.value)  # a bound of its own came first
    assert "takes longer" not in str(found.value)
    assert time.thread_time() - before < 3


def test_what_takes_memory_in_small_parts_is_stopped_by_the_system():
    text = (
        "{% set n = namespace(x=[]) %}{% for i in range(3000) %}"
        "{% set n.x = [n.x, 'y' * 10**6 ~ i] %}{% endfor %}"
    )
    limits = Limits(seconds=60, memory=2**29)
    with contextlib.closing(Worker("the template", "use another", limits)) as worker:
        with pytest.raises(ValueError) as error:
            worker.call(jobs.rendered, text, {})
        assert str(error.value) == "the chat template needs too much memory"
        assert worker.call(jobs.rendered, "{{ 1 }}", GIVEN) == "1"


def test_a_macro_that_calls_itself_forever_is_refused():
    with pytest.raises(ValueError, match="recursion"):
        rendered("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}")
    with pytest.raises(ValueError, match="recursion"):
        rendered("{% for x in [[]] recursive %}{{ loop([[]]) }}{% endfor %}")


def test_a_text_may_be_as_long_as_the_bound(monkeypatch):
    monkeypatch.setattr(sandbox, "LONGEST", 100)
    assert len(said("{% for i in range(100) %}x{% endfor %}")) == 100
    with pytest.raises(ValueError, match="a text of more than 100 characters"):
        rendered("{% for i in range(101) %}x{% endfor %}")


def test_ordinary_uses_of_what_is_bounded_stay_allowed():
    for text, expected in (
        ("{{ 'ab' * 3 }} {{ '-' * 40 }}", "ababab " + "-" * 40),
        ("{{ 2 ** 10 }} {{ 7 % 3 }} {{ 10**7 * 1 }} {{ 1 + 2.5 }}", "1024 1 10000000 3.5"),
        ("{{ [1] + [2] }} {{ (1, 2) + (3,) }}", "[1, 2] (1, 2, 3)"),
        ("{{ 'a' ~ 1 ~ none ~ [2] ~ 'b' ~ 'c'|safe }}", "a1None[2]bc"),
        ("{{ '%s: %5.2f%%' % ('a', 1) }} {{ '%d'|format(7) }}", "a:  1.00% 7"),
        ("{{ '%(a)s'|format(a=7) }}", "7"),
        ("{{ '{:>5} {a} {{}}'.format(1, a=2) }}", "    1 2 {}"),
        ("{{ '{a}'.format_map({'a': 1}) }}", "1"),
        ("{{ 'a\nb'|indent(2) }}|{{ 'a\nb'|indent('> ', true) }}", "a\n  b|> a\n> b"),
        ("{{ [1, 'b']|join(', ') }} {{ '-'.join(['a', 'b']) }}", "1, b a-b"),
        ("{{ [{'a': 1}, {'a': 2}]|join('+', attribute='a') }} {{ []|join }}|", "1+2 |"),
        ("{{ 'aab'|replace('a', 'x') }} {{ 'aab'|replace('a', 'x', 1) }}", "xxb xab"),
        ("{{ 'aab'.replace('a', '') }} {{ 'aab'.replace('a', 'x', 1) }}", "b xab"),
        ("{{ 'a b'.split(' ')[-1].upper().strip() }} {{ 'abc'[1:]|length }}", "B 2"),
        (
            "{{ 'x'.startswith('x') }} {{ 'abc'.find('c') }} {{ 'a-b'.partition('-')[2] }}",
            "True 2 b",
        ),
        ("{{ dict(a=1).items()|list }} {{ {'a': 1}|items|list }}", "[('a', 1)] [('a', 1)]"),
        (
            "{% for x in [1, 2, 3] %}{% if x == 2 %}{% continue %}{% endif %}{{ x }}{% endfor %}",
            "13",
        ),
        (
            "{% set n = namespace(a=1) %}{% for x in [1] %}{% set n.a = 2 %}{% endfor %}{{ n.a }}",
            "2",
        ),
        ("{% macro m(given, x=1) %}{{ given }}{{ x }}{% endmacro %}{{ m(given=2) }}", "21"),
        ("{% set c = cycler('a', 'b') %}{{ c.next() }}{{ c.next() }}", "ab"),
    ):
        assert said(text) == expected
        assert chat_template_utils._compile_jinja_template(text).render(**GIVEN) == expected


def test_a_refusal_says_what_the_template_says():
    with pytest.raises(ValueError, match="refuses the messages: roles must alternate"):
        rendered("{{ raise_exception('roles must alternate') }}")


def test_the_date_is_the_one_that_is_given():
    assert said("{{ strftime_now('%d %b %Y, %A') }}", DATE) == "31 Jan 2026, Saturday"
    with pytest.raises(ValueError, match="strftime_now"):
        rendered("{{ strftime_now('%d') }}")
    assert said("{{ strftime_now is defined }}") == "False"
    assert said("{{ strftime_now is defined }}", DATE) == "True"
    assert template.prints_the_date("{{ strftime_now('%d') }}")
    with pytest.raises(ValueError, match="tomorrow"):
        template.compiled("x", "tomorrow")


def test_json_is_written_without_the_escapes_of_html():
    value = {"b": "<b>&'é中\n", "a": [1, 2.5, None, True]}
    for how in (
        "",
        "(indent=2)",
        "(sort_keys=true)",
        "(ensure_ascii=true)",
        "(separators=(',', ':'))",
    ):
        text = f"{{{{ x|tojson{how} }}}}"
        theirs = chat_template_utils._compile_jinja_template(text).render(x=value)
        assert said(text, x=value) == theirs
    assert said("{{ x|tojson }}", x=value) == json.dumps(value, ensure_ascii=False)


def test_generation_blocks_are_marked_and_leave_no_trace():
    text, spans = rendered(
        "a{% generation %}bc{% endgeneration %}d{% generation %}é{% endgeneration %}"
    )
    assert (text, spans) == ("abcdé", [(1, 3), (4, 5)])
    text = "{% for m in messages %}[{% generation %}{{ m.content }}{% endgeneration %}]{% endfor %}"
    text, spans = rendered(text)
    assert [text[a:b] for a, b in spans] == [m["content"] for m in TURNS]
    assert not set(text) & {sandbox.OPEN, sandbox.CLOSE}


def test_of_generation_blocks_within_another_the_outer_counts():
    text = (
        "a{% generation %}b{% generation %}c{% endgeneration %}d{% endgeneration %}e"
        "{% generation %}{% generation %}f{% endgeneration %}{% endgeneration %}"
    )
    assert rendered(text) == ("abcdef", [(1, 4), (5, 6)])


def test_an_empty_generation_block_marks_nothing():
    empty = "{% generation %}{% endgeneration %}"
    assert rendered(f"a{empty}b") == ("ab", [])
    assert rendered(f"{empty}") == ("", [])
    assert rendered("a{% generation %}" + empty + "x{% endgeneration %}") == ("ax", [(1, 2)])


def test_a_mark_that_has_lost_its_partner_is_none():
    whole = "{% set x %}{% generation %}abc{% endgeneration %}{% endset %}"
    assert rendered(whole + "{{ x }}") == ("abc", [(0, 3)])
    assert rendered(whole + "{{ x[:2] }}") == ("a", [])
    assert rendered(whole + "{{ x[2:] }}") == ("bc", [])
    assert rendered(whole + "{{ x[::-1] }}") == ("cba", [])


def test_whether_a_template_marks_its_answers():
    assert template.marks_answers("{% generation %}x{% endgeneration %}")
    assert template.marks_answers("{%- generation -%}x{%- endgeneration -%}")
    assert not template.marks_answers("{% if add_generation_prompt %}generation{% endif %}")


def stock(shared):
    return sorted((shared / "data" / "chat_templates").glob("*/*.jinja"))


def test_stock_templates_say_what_they_say_in_transformers(shared):
    compared = 0
    for path in stock(shared):
        text = path.read_text("utf-8")
        date = DATE if template.prints_the_date(text) else None
        theirs = chat_template_utils._compile_jinja_template(text)
        theirs.globals["strftime_now"] = sandbox.environment(DATE).globals["strftime_now"]
        ours = template.compiled(text, date)
        for turns in (TURNS, TURNS[1:], TURNS[:2], TURNS[1:3], TURNS[1:4], TURNS[1:2]):
            for other in ({}, {"tools": TOOLS}, {"enable_thinking": False}):
                given = GIVEN | {"messages": turns, **other}
                given["add_generation_prompt"] = turns[-1]["role"] == "user"
                try:
                    expected = theirs.render(**given)
                except (jinja2.TemplateError, TypeError):
                    with pytest.raises(ValueError, match="refuses"):
                        template.render(ours, given)
                    continue
                assert template.render(ours, given)[0] == expected, path.name
                compared += 1
    assert compared > 400


def test_marks_are_the_masks_of_transformers(shared):
    own = tokenizer.load(TINY / "model")
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(TINY / "model")
    compared = 0
    for path in stock(shared):
        text = path.read_text("utf-8")
        if not template.marks_answers(text):
            continue
        program = template.compiled(text, None)
        for turns in (TURNS[1:], TURNS[1:3]):
            given = {**own.named, "messages": turns, "tools": None, "documents": None}
            ours, spans = template.render(program, given | {"add_generation_prompt": False})
            found = theirs.apply_chat_template(
                turns, chat_template=text, tokenize=True, return_dict=True,
                return_assistant_tokens_mask=True,
            )  # fmt: skip
            ids, offsets = own.encode(ours)
            assert found["input_ids"] == ids, path.name
            counts = [
                any(begin < stop and start < end for start, stop in spans) for begin, end in offsets
            ]
            assert [*map(bool, found["assistant_masks"])] == counts, path.name
            assert any(counts) and not all(counts)
            compared += 1
    assert compared >= 12


@pytest.mark.parametrize("pauses", [3, pytest.param(20, marks=pytest.mark.full)])
def test_a_pause_changes_no_rendering(pauses, worker):
    """Stopped for longer than a rendering may take, at any moment, and gone on with."""
    pid = worker.call(jobs.process)
    with concurrent.futures.ThreadPoolExecutor() as other:
        done = other.submit(worker.call, jobs.rendered_many, 0.2 * pauses)
        for i in range(pauses):
            time.sleep(0.03 * (i % 7))
            os.kill(pid, signal.SIGSTOP)
            time.sleep(0.5)
            os.kill(pid, signal.SIGCONT)
        assert done.result() > pauses
    assert worker.call(jobs.process) == pid
