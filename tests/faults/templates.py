"""Chat templates are programs of strangers: bombs end in a named error in bounded time, memory and output; no escape.

A bomb's place in the template varies with the seed (`PLACES`): read at once, in a macro, in a block that is set.
"""

import resource

from molora_jax.errors import InputError
from molora_jax.io.tokenizer import Tokenizer, byte_tokenizer
from tests.faults.common import limited, scratch
from tests.faults.hostile import MEMORY, canary
from tests.faults.report import each, misnamed

OUTPUT = 11_000_000  # characters that a template may give back
BOMBS = (
    "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "{{ 'a' * 10 ** 11 }}",
    "{% set x = 3 ** (3 ** 18) %}{{ x ** 2 % 7 }}",
    "{% set n = namespace(x='a') %}{% for i in range(64) %}{% set n.x = n.x ~ n.x %}{% endfor %}{{ n.x }}",
    "{{ '%9999999999d' % 1 }}",
    "{% macro m(n) %}{{ m(n + 1) }}{{ m(n + 1) }}{% endmacro %}{{ m(0) }}",
    "{{ [1]|batch(10 ** 10, 'x')|list }}",
    "{{ 'x'|center(10 ** 11) }}",
    "{% for i in range(9999) %}{{ 'x' * 100000 }}{% endfor %}",
    "{{ ((range(99999)|list) * 1000000)|length }}",
    "{{ lipsum(n=3000000)|length }}",
    "{{ '{:>99999999999}'.format(1) }}",
    "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
    "{% set n = namespace(x=[0]) %}{% for i in range(60) %}{% set n.x = [n.x, n.x] %}{% endfor %}{{ n.x }}",
    "{{ messages|tojson(indent=999999999) }}",
    "{{ range(99999)|map('string')|map('length')|list|string * 99999 }}",
    "{% for a in range(999) recursive %}{{ loop(range(999)) }}{% endfor %}",
    "{{ ('a' * 99999)|wordwrap(1)|replace('a', 'a' * 99999) }}",
)
PLACES = (
    "%s",
    "{%% macro place() %%}%s{%% endmacro %%}{{ place() }}",
    "{%% set place %%}%s{%% endset %%}{{ place }}",
    "{%% for message in messages %%}{%% if message.role %%}%s{%% endif %%}{%% endfor %%}",
)
COMMAND = "touch CANARY"
ESCAPES = (
    "{{ ''.__class__.__mro__[1].__subclasses__() }}", "{{ cycler.__init__.__globals__.os.system('COMMAND') }}",
    "{{ lipsum.__globals__['os'].popen('COMMAND').read() }}", "{{ joiner.__init__.__globals__.os.system('COMMAND') }}",
    "{{ namespace.__init__.__globals__.os.system('COMMAND') }}", "{{ ''|attr('__class__') }}",
    "{{ self.__init__.__globals__.__builtins__.open('CANARY', 'w') }}", "{{ self._TemplateReference__context }}",
    "{{ '{0.__class__.__init__.__globals__}'.format(cycler) }}", "{{ '{0.__class__}'.format(1) }}",
    "{{ '{x.__class__}'.format_map({'x': 1}) }}", "{{ '%s'|format(cycler.__init__) }}", "{{ messages.__class__ }}",
    "{{ raise_exception.__globals__ }}", "{{ strftime_now.__globals__['__builtins__']['open']('CANARY', 'w') }}",
    "{{ messages|map(attribute='__class__')|list }}", "{{ messages|map('attr', '__class__')|list }}",
    "{{ messages|groupby('__class__') }}", "{% include '/etc/passwd' %}", "{% extends '/etc/passwd' %}",
    "{% import 'os' as os %}{{ os.system('COMMAND') }}", "{% from 'os' import system %}{{ system('COMMAND') }}",
    "{{ ()|attr('__cla' ~ 'ss__')|attr('__base__') }}", "{{ (messages|map('upper')).gi_frame.f_builtins }}",
    "{{ raise_exception.__code__.co_consts }}", "{{ ''['__class__'] }}", "{{ ''['__cl' 'ass__'].mro() }}",
    "{{ loop.__class__ }}{% for m in messages %}{{ loop.__init__.__globals__ }}{% endfor %}",
    "{% macro m() %}{% endmacro %}{{ m.__init__.__globals__ }}{{ m._func.__globals__ }}",
    "{{ caller.__class__ }}{{ varargs.__class__ }}{{ kwargs.__class__ }}", "{{ __import__('os').system('COMMAND') }}",
    "{{ open('CANARY', 'w') }}{{ eval('1') }}{{ exec('1') }}", "{% set x = messages.__setitem__ %}{{ x(0, 1) }}",
    "{{ messages.append({}) }}", "{{ messages[0].update({'role': 'x'}) }}", "{{ messages.clear() }}",
    "{{ get_flashed_messages.__globals__ }}", "{{ url_for.__globals__['os'].system('COMMAND') }}",
    "{{ dict.__base__.__subclasses__() }}", "{{ range.__class__.__base__ }}", "{{ tojson.__globals__ }}",
    "{{ messages|sort(attribute='__class__.__name__') }}", "{{ messages|selectattr('__class__')|list }}",
    "{{ 'a'.format.__self__.__class__ }}", "{{ undefined.__class__.__init__.__globals__ }}",
    "{{ ''.join.__call__.__objclass__ }}", "{{ (1).__reduce_ex__(2) }}", "{% set a = [].__class_getitem__ %}{{ a(1) }}",
)  # fmt: skip
LEAKS = ("<class", "<module", "<frame", "__builtins__", "root:x:", "built-in function", "<function", "subclasses")


def render(template: str, turns) -> str:
    plain = byte_tokenizer()
    tokenizer = Tokenizer(plain.inner, bos=plain.bos, eos=plain.eos, pad=plain.pad, template=template, where="base")
    return tokenizer.chat(turns, add_generation_prompt=True)


def turns():
    return [{"role": "user", "content": "Hello."}]


def bombs(seed, tries):
    def one(number):
        bomb = BOMBS[number % len(BOMBS)]
        template = PLACES[number // len(BOMBS) % len(PLACES)] % bomb
        try:
            with limited(resource.RLIMIT_AS, more=MEMORY):
                text = render(template, turns())
        except InputError as error:
            return misnamed(error)
        return f"{len(text)} characters came out of {bomb[:60]!r}" if len(text) > OUTPUT else ""

    return each(seed, tries, one)


def escapes(seed, tries):
    def one(number):
        escape = ESCAPES[number % len(ESCAPES)]
        escape = escape.replace("COMMAND", COMMAND).replace("CANARY", str(canary()))
        template = PLACES[number // len(ESCAPES) % len(PLACES)] % escape
        canary().unlink(missing_ok=True)
        given, text = turns(), ""
        try:
            text = render(template, given)
        except InputError as error:
            if misnamed(error):
                return misnamed(error)
        leaks = [leak for leak in LEAKS if leak in text]
        if canary().exists() or given != turns() or leaks:
            return f"{escape!r}: {'code ran' if canary().exists() else leaks or 'it changed its messages'}"
        return ""

    with scratch():
        return each(seed, tries, one)
