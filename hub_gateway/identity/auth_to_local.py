"""`auth_to_local` of krb5.conf: which unix user a principal is.

The rules mean what they mean to MIT Kerberos (`krb5_aname_to_localname`), with two differences. What would make MIT's
library give up only when a principal comes, or would not end, is refused when the rules are read. And `/L`, Hadoop's
and Kafka's way to lower-case the result, is understood.

    RULE:[n:string](regex)s/pattern/replacement/g/L
    DEFAULT

`n` is the number of the principal's components, `$0` in `string` its realm, `$1`... its components. The POSIX extended
regular expression must match the whole string; it holds no `)`. Any number of substitutions follow. `DEFAULT` is the
first component of a principal of the default realm. The first rule that applies decides; after the last one, nobody.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from hub_gateway.identity.names import Principal, lower

__all__ = ["AuthToLocal", "Localname"]

_CLASSES = {
    "alpha": "A-Za-z",
    "digit": "0-9",
    "alnum": "A-Za-z0-9",
    "upper": "A-Z",
    "lower": "a-z",
    "xdigit": "A-Fa-f0-9",
    "punct": r"!-/:-@\[-`{-~",
    "space": r" \t\n\r\f\v",
    "blank": r" \t",
}
_LIKE_PYTHON = "wWsS"  # backslash letters that mean the same to glibc and to Python
_RULE = re.compile(r"RULE:(?:\[(?P<n>[1-9][0-9]?):(?P<string>[^\]]*)\])?(?:\((?P<match>[^)]*)\))?(?P<rest>.*)", re.S)
_SUBSTITUTION = re.compile(r"\s*s/([^/]*)/([^/]*)/(g?)")
_VARIABLE = re.compile(r"\$([0-9]*)")


@dataclass(frozen=True)
class Localname:
    """A unix user, by which rule, and whether that rule looked at the principal's realm."""

    name: str
    rule: str
    realm_seen: bool


class AuthToLocal:
    """A list of rules, as they stand in krb5.conf after `auth_to_local =`. Raises `ValueError` for a bad one.

    An empty list is `DEFAULT`, as where krb5.conf has none.
    """

    def __init__(self, rules: Iterable[str], default_realm: str) -> None:
        self.default_realm = default_realm
        self._rules = [(text.strip(), _parse(text.strip())) for text in rules] or [("DEFAULT", None)]

    def map(self, principal: Principal) -> Localname | None:
        """The unix user of a principal, or None. Nothing is checked of the name that comes out."""
        for text, rule in self._rules:
            if rule is None:
                found, realm_seen = _default(principal, self.default_realm), True
            else:
                found, realm_seen = rule.apply(principal), rule.realm_seen
            if found is not None:
                return Localname(found, text, realm_seen)
        return None


def _default(principal: Principal, realm: str) -> str | None:
    if not realm or principal.realm != realm or principal.components[1:] not in ((), (realm,)):
        return None
    return principal.primary


@dataclass(frozen=True)
class _Substitution:
    pattern: _Regex
    replacement: str
    everywhere: bool

    def apply(self, text: str) -> str:
        done = ""
        while (found := self.pattern.search(text)) is not None:
            start, end = found
            # What follows is looked at as a string of its own, so "^" matches there again, as in MIT's library.
            done, text = done + text[:start] + self.replacement, text[end:]
            if not self.everywhere:
                break
        return done + text


@dataclass(frozen=True)
class _Rule:
    components: int | None
    string: str
    match: _Regex | None
    substitutions: tuple[_Substitution, ...]
    to_lower: bool

    @property
    def realm_seen(self) -> bool:
        return self.components is not None and "0" in _VARIABLE.findall(self.string)

    def apply(self, principal: Principal) -> str | None:
        if self.components is None:
            text = "/".join(principal.components)
        elif self.components != len(principal.components):
            return None
        else:
            values = (principal.realm, *principal.components)
            text = _VARIABLE.sub(lambda found: values[int(found[1])], self.string)
        if self.match is not None and not self.match.whole(text):
            return None
        for substitution in self.substitutions:
            text = substitution.apply(text)
        return lower(text) if self.to_lower else text


def _parse(text: str) -> _Rule | None:
    if text == "DEFAULT":
        return None
    found = _RULE.fullmatch(text)
    if found is None:
        raise ValueError(f"{text!r} is neither DEFAULT nor RULE:[n:string](regex)s/pattern/replacement/g")
    try:
        components = None if found["n"] is None else int(found["n"])
        string = found["string"] or ""
        for number in _VARIABLE.findall(string):
            if not number or int(number) > (components or 0):
                raise ValueError(f"${number} is not one of the {components} components that it asks for")
        match = None if found["match"] is None else _Regex(found["match"])
        rest = found["rest"].strip()
        to_lower = rest.endswith("/L") and (rest == "/L" or _ends_a_substitution(rest[:-2]))
        return _Rule(components, string, match, _substitutions(rest[:-2] if to_lower else rest), to_lower)
    except (ValueError, re.error) as error:
        raise ValueError(f"{text!r} is no rule of auth_to_local: {error}") from error


def _ends_a_substitution(text: str) -> bool:
    """Whether `/L` after this is a flag, and not the end of a replacement."""
    try:
        return bool(_substitutions(text))
    except ValueError:
        return False


def _substitutions(text: str) -> tuple[_Substitution, ...]:
    made = []
    while text:
        found = _SUBSTITUTION.match(text)
        if found is None:
            raise ValueError(f"{text!r} is no substitution s/pattern/replacement/")
        pattern, everywhere = _Regex(found[1]), found[3] == "g"
        if everywhere and pattern.search("") is not None:
            raise ValueError(f"s/{found[1]}/.../g would replace nothing, without end")
        made.append(_Substitution(pattern, found[2], everywhere))
        text = text[found.end() :]
    return tuple(made)


class _Regex:
    """A POSIX extended regular expression, of the kind that means the same everywhere."""

    def __init__(self, text: str) -> None:
        source = _translate(text)
        # Where the end of what is looked at is not the end of the string, "$" matches nothing.
        self._at_end = re.compile(source.replace(_END, r"\Z"), re.ASCII | re.DOTALL)
        self._before_end = re.compile(source.replace(_END, "(?!)"), re.ASCII | re.DOTALL)

    def whole(self, text: str) -> bool:
        """Whether it matches the whole string."""
        return self._at_end.fullmatch(text) is not None

    def search(self, text: str) -> tuple[int, int] | None:
        """Where it matches: leftmost, and of these longest, as POSIX has it (Python takes the first alternative)."""
        found = self._at_end.search(text)
        if found is None:
            return None
        start = found.start()
        if self._at_end.fullmatch(text, start):
            return start, len(text)
        for end in range(len(text) - 1, start - 1, -1):
            if self._before_end.fullmatch(text, start, end):
                return start, end
        return found.span()


_END = "\0"


def _translate(text: str) -> str:
    """A POSIX extended regular expression in Python's language. Raises `ValueError` for what differs."""
    made: list[str] = []
    position, repeatable = 0, False
    while position < len(text):
        letter = text[position]
        if letter == "[":
            piece, position = _bracket(text, position)
            made.append(piece)
            repeatable = True
            continue
        if letter == "\\":
            position += 1
            escaped = text[position : position + 1]
            if not escaped or (escaped.isalnum() and escaped not in _LIKE_PYTHON) or escaped in "<>`'" or escaped > "~":
                raise ValueError(f"\\{escaped} does not mean the same everywhere; write it without the backslash")
            made.append(f"\\{escaped}")
            repeatable = True
        elif letter in "*+?{":
            if not repeatable:
                raise ValueError(f"there is nothing before {letter!r} in {text!r} that it could repeat")
            length = 1
            if letter == "{":
                found = re.match(r"\{[0-9]{1,3}(,[0-9]{0,3})?\}", text[position:])
                if found is None:
                    raise ValueError(f"{text[position:]!r} does not begin with a number of repetitions")
                length = found.end()
            made.append(text[position : position + length])
            position += length - 1
            repeatable = False
        elif letter in "^$|(":
            made.append(_END if letter == "$" else letter)
            repeatable = False
        elif letter == ")":
            made.append(letter)
            repeatable = True
        elif letter == "\0" or letter > "~":
            raise ValueError("only ASCII may stand in it")
        else:
            made.append(letter if letter == "." else re.escape(letter))
            repeatable = True
        position += 1
    return "".join(made)


def _bracket(text: str, start: int) -> tuple[str, int]:
    """The bracket expression that begins at `start`, translated, and where it ends."""
    position, made = start + 1, "["
    if text[position : position + 1] == "^":
        made, position = "[^", position + 1
    first = True
    while position < len(text) and (text[position] != "]" or first):
        first = False
        if text.startswith(("[.", "[="), position):
            raise ValueError("collating symbols may not stand in it")
        if text.startswith("[:", position):
            end = text.find(":]", position)
            name = text[position + 2 : end] if end > 0 else ""
            if name not in _CLASSES:
                raise ValueError(f"there is no class of characters {name!r}")
            made, position = made + _CLASSES[name], end + 2
            continue
        letter = text[position]
        if letter > "~" or letter == "\0":
            raise ValueError("only ASCII may stand in it")
        made += letter if letter == "-" else re.escape(letter)
        position += 1
    if position >= len(text):
        raise ValueError(f"{text!r} has a bracket that does not end")
    return made + "]", position + 1
