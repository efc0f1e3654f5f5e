"""Templates of strangers: what hangs or fills the memory is stopped and named, nothing gets out, and the next one goes
on. The environment is transformers' own."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import threading
import time

import pytest

from molora_jax.errors import InputError
from molora_jax.io import template_worker, templates
from molora_jax.io.tokenizer import Tokenizer, byte_tokenizer

TALK = dict(messages=[dict(role="user", content="hi")], add_generation_prompt=True)
LOOP = "{% for i in range(99999) %}{% for j in range(99999) %}{% for k in range(99999) %}"
ENDS = "{% endfor %}" * 3
HANG = {
    "loops": LOOP + ENDS,
    "loops that write": LOOP + "x" + ENDS,
    "a sort in a loop": "{% for i in range(99999) %}{% for j in range(99999) | list | sort %}{% endfor %}{% endfor %}",
    "a power": "{% set ns = namespace(x=3) %}{% for i in range(99) %}{% set ns.x = ns.x * ns.x %}{% endfor %}",
    "a power in one call": "{{ (10 ** 8) ** (10 ** 8) }}",
    "a digit string": "{% set ns = namespace(x=7) %}{% for i in range(28) %}{% set ns.x = ns.x * ns.x %}{% endfor %}",
}
FILL = {
    "multiplied text": "{{ 'x' * 10**10 }}",
    "doubled text": "{% set ns = namespace(x='x') %}{% for i in range(99) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}",
    "center": "{{ 'x' | center(10**10) }}",
    "indent": "{{ ('\n' * 10**7) | indent(10**4, blank=true) }}",
    "a format width": "{{ '%1000000000d' % 3 }}",
    "a format call": "{{ '{:>1000000000}'.format(3) }}",
    "the format filter": "{{ '%*d' | format(10**10, 3) }}",
    "replace": "{{ ('x' * 10**6) | replace('x', 'x' * 10**6) }}",
    "join": "{{ (['x' * 10**6] * 10**5) | join }}",
    "lists": "{{ ([0] * 10**10) | length }}",
    "nested lists": "{% set ns = namespace(x=[1]) %}{% for i in range(99) %}{% set ns.x = ns.x + ns.x %}{% endfor %}",
    "tojson": "{{ messages | tojson(indent=10**10) }}",
    "ljust": "{{ 'x'.ljust(10**10) }}",
    "expandtabs": "{{ '\t'.expandtabs(10**10) }}",
    "wordwrap": "{{ ('x ' * 10**6) | wordwrap(1, wrapstring='y' * 10**6) }}",
}
OTHER = {
    "recursion": ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "RecursionError"),
    "deep nesting": ("{{ " + "(" * 3000 + "1" + ")" * 3000 + " }}", "Error"),
    "a long range": ("{% for i in range(10**9) %}x{% endfor %}", "OverflowError"),
    "much text": ("{% for i in range(99999) %}{{ 'x' * 1000 }}{% endfor %}", "10,000,000 characters"),
}
BOMBS = {**{name: (text, "") for name, text in (HANG | FILL).items()}, **OTHER}


@pytest.fixture(scope="module")
def quick():
    """A child of its own with half a second a rendering."""
    worker = templates.Worker(seconds=0.5)
    yield worker
    worker.close()


def one(worker, template, **more):
    return worker.render(template, None, [TALK | more])[0]


@pytest.mark.parametrize("name", BOMBS)
def test_a_bomb_is_stopped_and_named_and_the_next_rendering_is_right(quick, name):
    template, message = BOMBS[name]
    start = time.monotonic()
    result = one(quick, template)
    assert set(result) - {"died"} == {"error"} and message in result["error"] and len(result["error"]) < 600
    assert time.monotonic() - start < 30  # the start of a child on a busy machine; mostly half a second
    assert one(quick, "{{ messages[0].content }}")["text"] == "hi"


LEAKS = ("class '", "<class", "function", "built-in", "module", "root:", "uid=", "__", "object at")


def test_nothing_gets_out():
    worker = templates.Worker()
    escapes = (pathlib.Path(__file__).parent / "escapes.txt").read_text().splitlines()
    assert len(escapes) > 48
    try:
        for escape in escapes:
            result = one(worker, escape)
            text = result.get("text", "")
            assert not any(leak in text for leak in LEAKS), (escape, text)
            assert "error" in result or len(text) < 60, (escape, text)
        assert one(worker, "{{ messages | tojson }}")["text"] == '[{"role": "user", "content": "hi"}]', "unchanged"
    finally:
        worker.close()


def test_the_environment_is_that_of_transformers(quick):
    odd = dict(messages=[dict(role="user", content='<a> "é"', b=1)])
    for template, text in {
        "{{ tools is none }} {{ documents is none }} {{ x is defined }}": "True True False",
        "{{ messages | tojson }}": '[{"role": "user", "content": "<a> \\"é\\"", "b": 1}]',
        "{{ messages[0].content | tojson(ensure_ascii=true) }}": '"<a> \\"\\u00e9\\""',
        "{{ {'b': 1, 'a': [2]} | tojson(indent=2, sort_keys=true) }}": json.dumps({"a": [2], "b": 1}, indent=2),
        "{{ {'b': 1, 'a': 2} | tojson(separators=(',', ':')) }}": '{"b":1,"a":2}',
        "{% for i in '0123' %}{% if i == '1' %}{% continue %}{% endif %}{% if i > '2' %}{% break %}{% endif %}{{ i }}"
        "{% endfor %}": "02",
        "{% if true %}\n  x\n  {% endif %}\n": "  x\n",
        "{% set d = dict(a=1) %}{{ d.a }}{{ dict.fromkeys(['b'], 2).b }}": "12",
        "{% set ns = namespace(a=1) %}{% set ns.a = 2 %}{{ ns.a }}": "2",
        "{{ messages[0].reasoning_content }}|{{ messages[0].name is defined }}": "|False",
    }.items():  # fmt: skip
        assert one(quick, template, **odd).get("text") == text, template
    thought = dict(messages=[dict(role="assistant", content=None, thinking="t", name=None)])
    show = "{{ messages[0].reasoning_content }} {{ messages[0].content is defined }} {{ messages[0].name is defined }}"
    assert one(quick, show, **thought)["text"] == "t False False"
    refused = one(quick, "{{ raise_exception('no system turn') }}")
    assert refused["error"] == "TemplateError: no system turn"
    spans = one(quick, "ab{% generation %}cd{% endgeneration %}é{%- generation -%} f {%- endgeneration -%}")
    assert spans == {"text": "abcdéf", "spans": [[2, 4], [5, 6]]}


def test_the_day():
    tok = Tokenizer(byte_tokenizer().inner, eos="<|im_end|>", template="{{ strftime_now('%d %b %Y %H') }}")
    assert tok.depends_on_day and not byte_tokenizer().depends_on_day
    assert tok.at_day("2024-07-26").chat([], add_generation_prompt=True) == "26 Jul 2024 00"
    assert tok.chat([], add_generation_prompt=True).startswith(time.strftime("%d %b %Y"))
    assert tok.at_day("2024-07-26").digest() == tok.digest()
    with pytest.raises(InputError, match="day"):
        tok.at_day("yesterday")


def test_many_conversations_a_message_and_a_bad_one_among_them(quick):
    template = "{% if messages[0].content == 300 %}{{ raise_exception('x') }}{% endif %}{{ messages[0].content }}"
    out = quick.render(template, None, [dict(messages=[dict(role="user", content=i)]) for i in range(700)])
    assert [i for i, result in enumerate(out) if "error" in result] == [300]
    assert [int(result["text"]) for i, result in enumerate(out) if i != 300] == [i for i in range(700) if i != 300]


def test_conversations_that_are_no_json(quick):
    deep = "x"
    for _ in range(100_000):
        deep = [deep]
    nearly = json.loads("[" * 900 + "1" + "]" * 900)
    talks = [dict(messages=[dict(role="user", content=content)]) for content in ("a", deep, object(), nearly, "b")]
    out = quick.render("{{ messages[0].content | string | length }}", None, talks)
    assert out[0]["text"] == out[4]["text"] == "1"
    assert "RecursionError" in out[1]["error"] and "TypeError" in out[2]["error"] and set(out[3]) & {"text", "error"}
    assert templates.characters(deep) == 1


HANGS_ON_5 = "{% if messages[0].content == 5 %}" + HANG["loops"] + "{% endif %}{{ messages[0].content }}"


def asked(*contents):
    return [dict(messages=[dict(role="user", content=content)]) for content in contents]


def test_the_row_that_hangs_is_named_and_the_others_are_rendered(quick):
    out = quick.render(HANGS_ON_5, None, asked(*range(8)))
    assert [result.get("text") for result in out] == ["0", "1", "2", "3", "4", None, "6", "7"]
    assert "0.5 seconds" in out[5]["error"] and out[5]["died"]


def test_a_row_dies_once_and_too_many_end_it(quick):
    """All conversations of a row that kills the child share its one death; after so many rows no other is tried."""
    deaths = templates.Deaths(3)
    out = quick.render(HANGS_ON_5, None, asked(1, 5, 5, 5, 2, 5, 3), rows=[0, 1, 1, 1, 2, 3, 4], deaths=deaths)
    assert [result.get("text") for result in out] == ["1", None, None, None, "2", None, "3"]
    assert deaths.count == 2 and not deaths.too_many
    out = quick.render(HANGS_ON_5, None, asked(4, 5, 4, *[5] * 99), deaths=deaths)
    assert out[0]["text"] == "4" and out[1]["died"] and deaths.too_many
    later = quick.render("x", None, asked(1), deaths=deaths)
    assert all("not tried" in result["error"] for result in (*out[2:], *later))


def test_large_rows_do_not_fill_the_child():
    worker = templates.Worker()
    try:
        talk = dict(messages=[dict(role="user", content="x" * 900_000)])
        assert [len(r["text"]) for r in worker.render("{{ messages[0].content }}", None, [talk] * 20)] == [900_000] * 20
    finally:
        worker.close()


def test_a_killed_child_is_replaced_and_threads_take_turns():
    worker = templates.Worker()
    try:
        assert one(worker, "a")["text"] == "a"
        worker._process.kill()
        assert "signal 9" in one(worker, "b")["error"]
        results = {}

        def ask(i):
            results[i] = [one(worker, f"{i} {{{{ messages[0].content }}}}")["text"] for _ in range(5)]

        threads = [threading.Thread(target=ask, args=(i,)) for i in range(4)]
        [thread.start() for thread in threads]
        [thread.join() for thread in threads]
        assert results == {i: [f"{i} hi"] * 5 for i in range(4)}
    finally:
        worker.close()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_fork_has_a_child_of_its_own():
    code = (
        "import os\nfrom molora_jax.io import templates as t\n"
        "talk = dict(messages=[dict(role='user', content='hi')])\n"
        "say = lambda: t.render('{{ messages[0].content }}!', [talk])[0]['text']\n"
        "assert say() == 'hi!'\npid = os.fork()\nassert say() == 'hi!'\n"
        "if pid:\n    assert os.waitpid(pid, 0)[1] == 0\n    print('both')\n"
    )
    done = run_python(code)
    assert done.stdout == "both\n" and done.returncode == 0, done.stderr


@pytest.mark.skipif(not pathlib.Path("/proc").exists(), reason="looks for the child in /proc")
@pytest.mark.parametrize("ending", ["exit", "interrupt", pytest.param("kill", marks=pytest.mark.slow)])
def test_no_child_is_left_behind(ending):
    """Whatever the end of this process: while the child waits, or renders for ever."""
    busy = ending != "exit"
    code = (
        "import os, signal, sys, threading, time\nfrom molora_jax.io import templates as t\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # a shell's background jobs ignore it
        "talk = dict(messages=[dict(role='user', content='hi')])\nt.render('x', [talk])\n"
        "print(t._worker._process.pid, flush=True)\n"
        f"if {busy}: t.render({HANG['loops']!r}, [talk])\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    child = int(process.stdout.readline())
    if busy:
        time.sleep(0.3)
        process.send_signal(signal.SIGINT if ending == "interrupt" else signal.SIGKILL)
    process.wait(30)
    deadline = time.monotonic() + template_worker.SECONDS + 10  # after a kill the child's own alarm ends it
    while alive(child) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not alive(child)
    assert "KeyboardInterrupt" in process.stderr.read() if ending == "interrupt" else True


def alive(pid):
    try:
        return "\nState:\tZ" not in pathlib.Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False


def run_python(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)


def test_the_child_imports_neither_jax_nor_numpy():
    paths = os.pathsep.join(path for path in sys.path if path)
    file = pathlib.Path(template_worker.__file__)
    code = (
        f"import runpy, sys; runpy.run_path({str(file)!r})\n"
        "print([m for m in sys.modules if m in ('jax', 'numpy', 'molora_jax')])"
    )
    done = subprocess.run([sys.executable, "-S", "-P", "-c", code], capture_output=True, text=True,
                          env={**os.environ, "PYTHONPATH": paths})  # fmt: skip
    assert done.stdout == "[]\n", done.stderr
