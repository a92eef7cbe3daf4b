"""Of words that a template has not met, what is written is what the template writes."""

import itertools
import random
import string

import pytest

from tests.conftest import TINY
from zoo.text import sandbox, template, traced

WORDS = [
    "", "a", "b", " a\n", "yes", "</think>x", "<think>a</think>\n\nyes", "12", "-1.5", "role",
    "Ab cd", "<b>&'\"", "é然后", "x" * 40,
]  # fmt: skip
# All of what chat templates do with words, and what nobody expects.
SNIPPETS = [
    # Passed on, whole or in parts.
    "{{ c }}", "{{ 'a' + c }}", "{{ c + 'a' }}", "{{ c + c + 'x' }}", "{{ c ~ 1 ~ c }}",
    "{{ c|trim }}", "{{ c.strip() }}", "{{ c.strip('a') }}", "{{ c.lstrip('\n').rstrip() }}",
    "{{ c|trim|upper }}", "{{ c[1:] }}", "{{ c[:-1] }}", "{{ c[::-1] }}", "{{ c|string }}",
    "{{ [c, 'x', c]|join('-') }}", "{{ c.split('</think>')[-1] }}",
    "{{ c.split('</think>', 1)[0] }}", "{{ c.split()|join('_') }}",
    "{{ messages|map(attribute='content')|join(' ') }}", "{{ ' '.join([c, c]) }}",
    "{{ c or 'none' }}", "{% set x %}<{{ c }}>{% endset %}{{ x }}{{ 'think' in x }}{{ x|length }}",
    "{{ c and 'some' }}", "{% macro m(x) %}[{{ x }}]{% endmacro %}{{ m(c) }}{{ 'ye' in m(c) }}",
    "{{ (c, 'x')[0] }}",
    "{% set n = namespace(x='') %}{% for i in 'ab' %}{% set n.x = n.x + c %}{% endfor %}{{ n.x }}",
    "{% filter upper %}a{{ c }}{% endfilter %}", "{% filter trim %} {{ c }} {% endfilter %}",
    "{% generation %}{{ c }}{% endgeneration %}", "{{ {'x': c}.x }}", "{{ dict(x=c)['x'] }}",
    "{% set x = c %}{% if x %}{{ x }}{% endif %}", "{{ c|default('d') }}",
    "{{ c|default('d', true) }}",
    # Asked about.
    "{{ 'a' in c }}", "{{ c in 'role' }}", "{{ c in ['a', 'yes'] }}", "{{ c == 'a' }}",
    "{{ c != 'a' }}", "{{ c == messages[0].content }}",
    "{{ c.startswith('<') and c.endswith('s') }}", "{{ not c }}",
    "{{ c is string }}{{ c is mapping }}{{ c is none }}{{ c is defined }}{{ c is callable }}",
    "{{ c is number }}", "{{ c is integer }}", "{{ c is escaped }}",
    "{{ c is iterable }}{{ c is sequence }}{{ c is boolean }}{{ c is true }}{{ c is undefined }}",
    "{{ c is lower }}{{ c is upper }}", "{{ c is eq 'a' }}", "{{ c|length }}", "{{ c|length > 3 }}",
    "{{ c|count }}", "{{ messages|selectattr('content', 'equalto', 'a')|list|length }}",
    "{{ c is in ['a'] }}", "{{ c < 'b' }}",
    "{% for m in messages %}{{ loop.changed(m.content) }}{% endfor %}", "{{ [c, 'b']|max }}",
    "{{ c is sameas none }}", "{{ ([c, 'b']|sort)[0] }}", "{{ [c, c, 'a']|unique|list|length }}",
    "{{ messages[0] == messages[1] }}", "{{ {'a': 1, 'yes': 2}[c] }}", "{{ {'a': 1}.get(c) }}",
    "{{ c in {'a': 1} }}", "{{ c.find('a') }}", "{{ c.count('a') }}",
    "{% if 'b' in c %}{{ raise_exception('no ' + c) }}{% endif %}.", "{% if c|int %}n{% endif %}",
    "{{ c.isdigit() }}",
    # One character after the other.
    "{{ c[0] }}", "{{ c[0] is defined }}", "{{ c|first }}", "{{ c|last }}", "{{ c|list }}",
    "{% for x in c %}{{ x }},{% endfor %}", "{{ c|reverse }}", "{{ c|sort|join }}",
    "{{ c|unique|join }}", "{{ c|select('in', 'ab')|join }}", "{{ c|map('upper')|join }}",
    # What nothing can follow.
    "{{ '</think>' in [c]|string }}", "{{ '</think>' in {'x': c}|string }}",
    "{{ [c] }}", "{{ {'x': c} }}", "{{ c|int }}", "{{ c|float }}", "{{ c|tojson }}",
    "{{ messages|tojson }}", "{{ c|e }}", "{{ '%s!' % c }}", "{{ '{}!'.format(c) }}",
    "{{ '%s'|format(c) }}", "{{ c % 1 }}", "{{ c * 2 }}", "{{ c.format(1) }}",
    "{{ c|replace('a', 'b') }}", "{{ c.replace('a', 'b') }}", "{{ 'xax'|replace('a', c) }}",
    "{{ c|indent }}", "{{ c|wordcount }}", "{{ c|title }}", "{{ c|capitalize }}",
    "{{ c|truncate(5) }}", "{{ c|striptags }}", "{{ c|safe }}", "{{ c|urlencode }}",
    "{{ range(c|length)|list }}", "{{ 'abc'[c|length:] }}", "{{ c|abs }}", "{{ c|round }}",
    "{{ c|items|list }}", "{{ c|hash }}", "{{ c|attr('upper') is defined }}", "{{ c.upper }}",
    "{{ c.items is defined }}{{ c['role'] is defined }}{{ c.role is defined }}",
    "{{ c._run is defined }}{{ c._number }}", "{{ c.strip.__self__ }}", "{{ c.__class__ }}",
    "{{ c|groupby('x')|list }}", "{% if c|length > 100 %}{{ c|center }}{% endif %}{{ c }}",
    "{{ joiner(c)() }}", "{{ cycler(c, 'b').next() }}",
]  # fmt: skip
LOOP = "{% for message in messages %}{% set c = message.content %}SNIPPET{% endfor %}"


def given(*words, **other):
    turns = [{"role": role, "content": said} for role, said in zip(("user", "assistant"), words)]  # noqa: B905
    return {"messages": turns, "add_generation_prompt": False, "tools": None, **other}


def written(render, *given):
    """What it writes; of an error nothing but that it is one."""
    try:
        return render(*given)
    except Exception:
        return None


@pytest.mark.parametrize("snippet", SNIPPETS)
def test_what_is_written_is_what_the_template_writes(snippet):
    text = LOOP.replace("SNIPPET", snippet)
    plain = written(sandbox.environment(None).from_string, text)
    program = written(traced.program, text, None)
    if program is None:  # a filter that there is not
        assert plain is None
        return
    for words in itertools.product(WORDS, WORDS):
        expected = written(plain.render, given(*words))
        assert written(traced.render, program, given(*words)) == expected, words


def test_a_template_that_asks_nothing_of_words_runs_once():
    program = traced.program(LOOP.replace("SNIPPET", "<{{ message.role }}>{{ c|trim }}\n"), None)
    for words in itertools.product(WORDS, WORDS):
        traced.render(program, given(*words))
    (traces,) = program.traces.values()
    assert len(traces) == 1
    assert traced._written(traces[0], ["One ", " two"]) == "<user>One\n<assistant>two\n"


def test_every_answer_to_a_question_has_its_trace_and_no_more():
    program = traced.program("{{ 'a' in messages[0].content }}{{ messages[1].content }}", None)
    for words in itertools.product(WORDS, WORDS):
        traced.render(program, given(*words))
    (traces,) = program.traces.values()
    said = [traced._written(trace, [words, "."]) for trace in traces for words in ("a", "-")]
    assert sorted(filter(None, said)) == ["False.", "True."] and len(traces) == 2


def test_what_else_is_given_is_part_of_the_shape():
    program = traced.program("{{ x }}{{ messages[0].content }}{{ add_generation_prompt }}", None)
    for x in (1, True, "1", 1.0, 0.0, -0.0, None, [1], {"a": 1}, (1,)):
        for ask in (True, False):
            more = {"x": x, "add_generation_prompt": ask}
            expected = program.run.render(given("yy", "b", **more))
            assert traced.render(program, given("yy", "b", **more)) == expected
            assert traced.render(program, given("zz", "b", **more)) == expected.replace("yy", "zz")


def test_keys_and_roles_of_messages_are_part_of_the_shape():
    program = traced.program(
        "{% for m in messages %}{{ m.role }}{{ m.thought }}{{ m.content }}{% endfor %}", None
    )
    turns = lambda *given: {"messages": list(given), "tools": None}
    for one in (
        {"role": "user", "content": "a"}, {"role": "tool", "content": "a"},
        {"role": "user", "content": "a", "thought": "b"},
        {"role": "user", "content": "b", "name": "a"},
        {"role": "user", "content": None}, {"role": "user", "content": ["a"]}, {"content": "a"},
        {"role": ["user"], "content": "a"}, {"role": True, "content": "a"},
        {"role": "user", "content": "a", "tool_calls": [{"x": "a"}]},
    ):  # fmt: skip
        for given in (turns(one), turns(one, one), turns(one | {"content": "z"})):
            assert traced.render(program, given) == program.run.render(given)


def test_what_is_kept_is_bounded(monkeypatch):
    monkeypatch.setattr(traced, "MOST_SHAPES", 3)
    program = traced.program("{{ messages[0].content|length }}", None)
    for count in range(20):
        for more in range(5):
            assert traced.render(program, given("a" * count, x=more)) == str(count)
    assert len(program.traces) == 3
    assert [len(traces) for traces in program.traces.values()] == [traced.MOST_TRACES] * 3


def test_texts_stay_bounded():
    """Doubled forty times: a trace of no words at all would allow it."""
    doubled = "{% for i in range(40) %}{% set n.x = n.x + n.x %}{% endfor %}"
    text = "{% set n = namespace(x=messages[0].content) %}" + doubled + "{{ n.x }}"
    program = template.compiled(text, None)
    assert template.render(program, given(""))[0] == ""
    with pytest.raises(ValueError, match="more than"):
        template.render(program, given("a"))


def test_what_is_written_again_is_bounded_like_what_is_written_first(monkeypatch):
    monkeypatch.setattr(sandbox, "LONGEST", 100)
    program = template.compiled(LOOP.replace("SNIPPET", "{{ c }}" * 8), None)
    assert template.render(program, given("a", "b"))[0] == "a" * 8 + "b" * 8
    with pytest.raises(ValueError, match="more than 100"):
        template.render(program, given("a" * 13, "b"))


def test_the_template_of_the_small_model_runs_once_for_each_shape():
    program = template.compiled((TINY / "model/chat_template.jinja").read_text(), None)
    for word in string.ascii_letters:
        template.render(program, given(word, word, bos_token="<s>", eos_token="</s>"))
    assert [len(traces) for traces in program.traces.values()] == [1]


def test_stock_templates_write_the_same(shared):
    draw, followed = random.Random(0), 0
    for path in sorted((shared / "data" / "chat_templates").glob("*/*.jinja")):
        program = traced.program(path.read_text("utf-8"), "2026-01-31")
        roles = ("user", "assistant", "user", "assistant", "system", "tool")
        for turns, ask in itertools.product(range(1, 7), (True, False)):
            for _ in range(12):
                messages = [{"role": role, "content": draw.choice(WORDS)} for role in roles[:turns]]
                if turns == 4:
                    messages[3]["reasoning_content"] = draw.choice(WORDS)
                more = {"add_generation_prompt": ask, "tools": None, "documents": None}
                all_given = {"messages": messages, "bos_token": "<s>", "eos_token": "</s>", **more}
                expected = written(program.run.render, all_given)
                assert written(traced.render, program, all_given) == expected, path.name
        followed += any(program.traces.values())
    assert followed > 20
