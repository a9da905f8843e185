#!/usr/bin/env python3
# /// script
# requires-python = ">=3.10"
# dependencies = ["curl_cffi>=0.16,<0.17", "click>=8.1"]
# ///
"""chatproxy turns ChatGPT web accounts into an OpenAI-compatible API (and Anthropic's, and Ollama's) on your own server.

    python chatproxy.py serve --demo      try it with no account and no network
    python chatproxy.py accounts add -    paste tokens, one a line
    python chatproxy.py serve             then point any OpenAI client at http://127.0.0.1:5005/v1

The file reads from top to bottom: a section uses only those above it. A request travels the other way: a dialect
(`chat`, `responses`, `messages` or `ollama`, with what they share in `dialects`) makes a `question` of what `http` has
read; `turns` leases an account, asks with the calls of `web`, and gets typed events from `decoder`; the dialect gives
these the client's shape again and `http` writes them out. Connected browsers (`agents`) answer the same questions. One
thread, the loop of `transport`, carries the bytes; the request's thread decides.
"""

from __future__ import annotations

import base64
import bisect
import codecs
import contextlib
import datetime
import errno
import fcntl
import functools
import gc
import hashlib
import heapq
import hmac
import html
import http
import http.server
import importlib.util
import io
import ipaddress
import itertools
import json
import logging
import math
import mimetypes
import os
import pathlib
import queue
import random
import re
import resource
import secrets
import select
import shutil
import signal
import socket
import socketserver
import sqlite3
import ssl
import stat
import struct
import sys
import tempfile
import termios
import threading
import time
import urllib.parse
import uuid
import webbrowser
import zlib
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Collection, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, fields, replace
from typing import IO, Any, NamedTuple, NoReturn, Protocol, TypeVar, cast

# The interpreter keeps the syntax tree of a script, here 35 MB, for as long as that runs, and its compiled form for no next
# start. So the server goes on as a module, in the same process: imported from this folder, not from the working directory.
if __name__ == "__main__" and sys.argv[1:2] == ["serve"] and sys.executable and hasattr(sys, "orig_argv"):
    place = pathlib.Path(__file__).resolve()
    given = sys.orig_argv[1:]
    options = given[: -len(sys.argv)]  # the interpreter's own
    plain = all(re.fullmatch("-[BEIOPSbqsuv]+", option) for option in options)
    direct = given[len(options) :] == sys.argv  # not by way of another program
    if place.name == "chatproxy.py" and plain and direct:
        begin = "import sys; sys.path = [sys.argv.pop(1), *filter(None, sys.path)]; "
        begin += "import chatproxy; chatproxy.cli(prog_name='chatproxy.py')"
        # Else glibc keeps freed memory for each thread that sleeps: 16 KB a stream.
        os.environ.setdefault("GLIBC_TUNABLES", "glibc.malloc.tcache_count=0")
        os.execv(sys.executable, [sys.executable, *options, "-c", begin, str(place.parent), *sys.argv[1:]])

try:
    import click
    from curl_cffi import CurlHttpVersion, CurlInfo, CurlMOpt, CurlOpt, ffi, lib
    from curl_cffi.curl import DEFAULT_CACERT
    from curl_cffi.requests import impersonate as browsers

    _ = browsers.resolve_latest_browser_type, int | None  # older releases, and older Pythons, lack these
except (ImportError, AttributeError, TypeError):
    needs = "Python 3.10 or later, and its packages: pip install 'curl_cffi>=0.16,<0.17' 'click>=8.1'"
    raise SystemExit(f"chatproxy needs {needs}") from None

__version__ = "1.0.0"

T = TypeVar("T")
Y = TypeVar("Y")


def new_id() -> str:
    """A random UUID (version 4), quickly and without a system call: an identifier, never a secret."""
    digits = f"{random.getrandbits(128):032x}"
    return f"{digits[:8]}-{digits[8:12]}-4{digits[13:16]}-a{digits[17:20]}-{digits[20:]}"


compact = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode
decode = json.JSONDecoder().raw_decode
# Strings, commas and opening brackets in JSON from elsewhere: reading more would hold up everybody.
MAX_JSON_TOKENS = 500_000
# In JSON without its escapes: a group that repeats would take memory.
_JSON_TOKEN = re.compile(rb'"[^"]*"?|[,\[{]')


def too_many_values(data: bytes | bytearray) -> bool:
    """Whether JSON has more values than are read; a text that is full of commas is one value."""
    if sum(map(data.count, (b",", b"[", b"{"))) <= MAX_JSON_TOKENS // 2:
        return False
    plain = data.replace(rb"\\", b"").replace(rb"\"", b"")
    return any(number > MAX_JSON_TOKENS for number, _ in enumerate(_JSON_TOKEN.finditer(plain)))


# ============================================================================================================
# settings: one row each; flags, environment, `config`, `--help` and the README's table all come from these rows
# ============================================================================================================


class SettingError(Exception):
    """A setting that cannot be used; its text is one line naming the setting, the value and what is accepted."""


class Kind(NamedTuple):
    """How a setting's text becomes a value: `parse` raises ValueError, `accepts` says what it takes."""

    parse: Callable[[str], Any]
    accepts: str


_WORDS = dict.fromkeys(("true", "1", "yes", "on"), True) | dict.fromkeys(("false", "0", "no", "off"), False)


def _boolean(text: str) -> bool:
    return _WORDS[text.lower()]


def _off(text: str) -> bool:
    if _boolean(text):
        raise ValueError
    return False


def _url(*schemes: str) -> Callable[[str], str]:
    def parse(text: str) -> str:
        parts = urllib.parse.urlsplit(text)
        _ = parts.port  # a port that is not a number from 0 to 65535 raises here
        if parts.scheme not in schemes or not parts.hostname or re.search(r"[\s\x00-\x1f]", text):
            raise ValueError
        return text.rstrip("/")

    return parse


def _several(parse: Callable[[str], T]) -> Callable[[str], tuple[T, ...]]:
    return lambda text: tuple(parse(part.strip()) for part in text.split(",") if part.strip())


def _matching(pattern: str) -> Callable[[str], str]:
    def parse(text: str) -> str:
        if not re.fullmatch(pattern, text):
            raise ValueError
        return text

    return parse


def _number(low: int, high: int) -> Kind:
    def parse(text: str) -> int:
        if not re.fullmatch(r"[0-9]{1,9}", text) or not low <= int(text) <= high:
            raise ValueError
        return int(text)

    return Kind(parse, f"a whole number from {low} to {high}")


def _one_of(*words: str) -> Kind:
    def parse(text: str) -> str:
        return words[words.index(text.lower())]

    return Kind(parse, " or ".join(words) if len(words) > 1 else f"{words[0]} (this version has no other)")


def _some_of(*words: str) -> Kind:
    """An order: any of the words, none twice."""

    def parse(text: str) -> tuple[str, ...]:
        named = _several(_one_of(*words).parse)(text)
        if not named or len(set(named)) < len(named):
            raise ValueError
        return named

    return Kind(parse, f"{' and '.join(words)} in any order, or one of them")


BOOLEAN = Kind(_boolean, "true or false")
OFF = Kind(_off, "false (this version has no other)")
HOST_NAME = Kind(_matching(r"[0-9A-Za-z.:_%-]+"), "a host name or an IP address")
WEB = Kind(_url("http", "https"), "an http:// or https:// URL")
WEBS = Kind(_several(_url("http", "https")), "http:// or https:// URLs, separated by commas")
PROXIES = Kind(
    _several(_url("http", "https", "socks5", "socks5h")),
    "http://, https://, socks5:// or socks5h:// URLs, separated by commas",
)
KEY = Kind(_matching(r"[\x21-\x2b\x2d-\x7e]{1,4096}"), "printable ASCII without spaces and commas")
KEYS = Kind(_several(KEY.parse), "keys of printable ASCII without spaces, separated by commas")
PREFIX = Kind(lambda text: _matching(r"[0-9A-Za-z._~/-]+")(text).strip("/"), "letters, digits and . _ ~ - /")
DIFFICULTY = Kind(lambda text: _matching(r"[0-9A-Fa-f]{1,32}")(text).lower(), "1 to 32 hexadecimal digits")
EXISTING = Kind(
    lambda text: str(pathlib.Path(text).expanduser().resolve(strict=True)),
    "a file that exists and may be read",
)
FOLDER = Kind(lambda text: str(pathlib.Path(text).expanduser().absolute()), "a folder")
LANGUAGE = Kind(_matching(r"[A-Za-z]{2,3}(-[A-Za-z0-9]{2,8})*"), "a language tag such as en-US")
PROGRAM = Kind(
    _matching(r"[A-Za-z][\w.-]{0,63}/[0-9][\w.+-]{0,31}( [\x20-\x7e]{1,200})?"),
    "a program and its version, such as codex_cli_rs/0.146.0; the rest of a user agent may follow",
)
BROWSER = Kind(
    lambda text: browsers.BrowserType(browsers.resolve_latest_browser_type(text)).value,
    "a browser that curl_cffi knows, such as chrome, safari or firefox",
)


def _data_dir() -> str:
    """systemd's state directory, else XDG's, else ~/.local/state; the service manager may name several."""
    if folder := os.environ.get("STATE_DIRECTORY", "").split(":")[0]:
        return folder
    base = os.environ.get("XDG_STATE_HOME") or os.path.join(os.path.expanduser("~"), ".local", "state")
    return os.path.join(base, "chatproxy")


def setting(
    default: str, kind: Kind, meaning: str, alias: str = "", secret: bool = False, hidden: bool = False
) -> Any:
    """One row: `default` is text as a person would write it, "" is unset (None, or an empty tuple for lists)."""
    return field(
        metadata={
            "default": default,
            "kind": kind,
            "meaning": meaning,
            "alias": alias,
            "secret": secret,
            "hidden": hidden,
        }
    )


@dataclass(frozen=True)
class Settings:
    """Every setting; the field `max_body_mb` is the variable MAX_BODY_MB and the flag --max-body-mb."""

    host: str = setting("127.0.0.1", HOST_NAME, "address to listen on")
    port: int = setting("5005", _number(0, 65535), "port to listen on; 0 takes any free one")
    tls_cert: str | None = setting("", EXISTING, "PEM file with the certificate chain; with TLS_KEY: HTTPS")
    tls_key: str | None = setting("", EXISTING, "PEM file with the certificate's private key")
    api_prefix: str | None = setting(
        "", PREFIX, "all routes live under `/PREFIX`; anything else is 404", secret=True
    )
    authorization: tuple[str, ...] = setting(
        "", KEYS, "comma-separated keys that clients pass as API key to use the pool", secret=True
    )
    admin_key: str | None = setting(
        "",
        KEY,
        "key for the admin routes; when unset, the first of AUTHORIZATION; with neither, they answer only this machine, "
        "with no proxy in between, until there is an API user",
        secret=True,
    )
    allow_direct_tokens: bool = setting(
        "true", BOOLEAN, "whether clients may bring their own access, refresh or `sk-` token as API key"
    )
    chatgpt_base_url: tuple[str, ...] = setting(
        "https://chatgpt.com",
        WEBS,
        "address of the upstream; with several, comma-separated, every account keeps one of them",
    )
    openai_auth_url: str = setting("https://auth.openai.com", WEB, "token endpoint and sign-in")
    openai_api_url: str = setting("https://api.openai.com", WEB, "where `sk-` keys go")
    proxy_url: tuple[str, ...] = setting(
        "",
        PROXIES,
        "http, https, socks5 or socks5h proxies for the upstream, comma-separated; an account keeps its proxy",
        alias="GO_CHATGPT_API_PROXY",
        secret=True,
    )
    export_proxy_url: tuple[str, ...] = setting(
        "", PROXIES, "proxy for fetching URLs that clients name", secret=True
    )
    auth_key: str | None = setting(
        "", KEY, "sent upstream as header `authkey`, for private gateways", secret=True
    )
    arkose_token_url: str | None = setting(
        "", WEB, 'external service for Arkose tokens: `POST {"blob": …}` answers `{"token": …}`', secret=True
    )
    conversation_only: bool = setting(
        "false", BOOLEAN, "the upstream gateway handles requirements and proofs: send the conversation alone"
    )
    pow_difficulty: str = setting(
        "00003a",
        DIFFICULTY,
        "hardest proof of work accepted (a smaller string is harder); harder ones are refused with 403",
    )
    pow_algorithm: str = setting(
        "sha3", _one_of("sha3", "fnv"), "hash of the proof of work; newer pages use `fnv`", hidden=True
    )
    retry_times: int = setting(
        "3", _number(0, 100), "further attempts before the first byte of an answer, each on the next account"
    )
    history_disabled: bool = setting(
        "true", BOOLEAN, "temporary chats; false keeps them and returns `conversation_id` and `message_id`"
    )
    enable_limit: bool = setting(
        "true", BOOLEAN, "an account that the upstream told to wait is not used before its time"
    )
    random_token: bool = setting("true", BOOLEAN, "pick accounts at random; false: in turn")
    scheduled_refresh: bool = setting(
        "false", BOOLEAN, "refresh every refresh token at start and every 4 days at 03:00 local time"
    )
    auto_continue: int = setting(
        "3",
        _number(0, 100),
        "how many times an answer that the upstream cut for length is continued automatically",
    )
    check_model: bool = setting("false", BOOLEAN, "refuse models that the account does not list")
    upload_by_url: bool = setting(
        "false", BOOLEAN, "URLs at the start of a plain message are fetched and uploaded as its files"
    )
    allow_private_urls: bool = setting(
        "false", BOOLEAN, "whether URLs that clients name may lead to private addresses"
    )
    upstream_order: tuple[str, ...] = setting(
        "codex,pool",
        _some_of("codex", "pool", "agents"),
        "who answers: `codex` is the Codex backend, which takes accounts of a browser sign-in, `pool` the site's own API; the "
        "next one is asked when the one before has nobody to answer",
    )
    codex_client: str = setting(
        "codex_cli_rs/0.146.0", PROGRAM, "identity towards the Codex backend: originator and version"
    )
    codex_balance: str = setting(
        "spread",
        _one_of("spread", "drain"),
        "which account the Codex backend is asked with: `spread` over all, those first whose allowance would be lost soonest, "
        "or `drain` one after another",
    )
    agent_key: str | None = setting(
        "", KEY, "key that agents register with; when unset, the admin key", secret=True
    )
    enable_gateway: bool = setting("false", OFF, "the web mirror")
    auto_seed: bool = setting("true", BOOLEAN, "the web mirror's seeds are made unasked")
    impersonate: str = setting("chrome", BROWSER, "browser that curl_cffi impersonates towards the upstream")
    oai_language: str = setting("en-US", LANGUAGE, "interface language told to the upstream")
    data_dir: str = setting(
        "",
        FOLDER,
        "folder of the store; unset: `$STATE_DIRECTORY`, else `$XDG_STATE_HOME/chatproxy`, else `~/.local/state/chatproxy`",
    )
    max_body_mb: int = setting("20", _number(1, 2048), "largest request body, in MiB")
    max_connections: int = setting("2048", _number(1, 100_000), "most client connections at a time")
    max_connections_per_address: int = setting(
        "256",
        _number(0, 100_000),
        "most client connections from one address (IPv6: one /64); 0 for no limit; loopback has none",
    )
    read_timeout: int = setting(
        "30", _number(1, 3600), "seconds a client may take to send a request, or idle between two"
    )
    upstream_timeout: int = setting("120", _number(1, 3600), "seconds of upstream silence that end a call")
    shutdown_grace: int = setting(
        "30", _number(0, 3600), "seconds that open answers get to finish after SIGTERM"
    )
    heartbeat: int = setting(
        "15", _number(1, 3600), "seconds of silence after which a streaming client gets a sign of life"
    )
    log_level: str = setting(
        "info", _one_of("debug", "info", "warning", "error"), "lowest level that is logged, on stderr"
    )
    log_format: str = setting("text", _one_of("text", "json"), "`json`: one object a line")

    @property
    def administrator(self) -> str | None:
        """The key that opens the admin routes, None when only loopback clients may."""
        return self.admin_key or (self.authorization[0] if self.authorization else None)


class Origin(NamedTuple):
    """A setting's text as given, and where it came from: flag, env (which variable) or default."""

    text: str
    source: str


def gather(flags: Mapping[str, str | None], environ: Mapping[str, str]) -> dict[str, Origin]:
    """The text of every setting by field name: the flag wins over the variable, an empty text is unset."""
    found = {}
    for row in fields(Settings):
        names = [row.name.upper(), *filter(None, [row.metadata["alias"]])]
        if flag := flags.get(row.name):
            found[row.name] = Origin(flag, "flag")
        elif name := next((name for name in names if environ.get(name)), None):
            found[row.name] = Origin(environ[name], "env" if name == names[0] else f"env {name}")
        else:
            found[row.name] = Origin(row.metadata["default"], "default")
    return found


def resolve(origins: Mapping[str, Origin]) -> Settings:
    """Parsed settings; SettingError names the first that cannot be used."""
    values: dict[str, Any] = {}
    for row in fields(Settings):
        # White space alone is empty, and empty is unset.
        text = origins[row.name].text.strip() or row.metadata["default"]
        kind = row.metadata["kind"]
        if not text:
            values[row.name] = (
                () if row.type.startswith("tuple") else _data_dir() if row.name == "data_dir" else None
            )
            continue
        try:
            values[row.name] = kind.parse(text)
        except (ValueError, KeyError, OSError, RuntimeError):
            shown = masked(text) if row.metadata["secret"] else repr(text)
            raise SettingError(
                f"{row.name.upper()}: {shown} cannot be used; accepted: {kind.accepts}"
            ) from None
        if values[row.name] == () and row.metadata["default"]:
            raise SettingError(f"{row.name.upper()}: {text!r} cannot be used; accepted: {kind.accepts}")
    if bool(values["tls_cert"]) != bool(values["tls_key"]):
        missing = "TLS_KEY" if values["tls_cert"] else "TLS_CERT"
        raise SettingError(f"{missing}: not set; set both TLS_CERT and TLS_KEY, or neither")
    return Settings(**values)


def masked(secret: str) -> str:
    """A secret's stand-in for people's eyes: nothing of it but a hash that tells two apart."""
    return f"***{hashlib.sha256(secret.encode('utf-8', 'surrogateescape')).hexdigest()[:6]}"


def settings_table() -> str:
    """The README's table of settings, in Markdown."""
    lines = ["| variable | default | accepted | meaning |", "| --- | --- | --- | --- |"]
    for row in fields(Settings):
        if not row.metadata["hidden"]:
            meta = row.metadata
            alias = row.metadata["alias"]
            name = f"`{row.name.upper()}`" + (f" (`{alias}`)" if alias else "")
            default = f"`{meta['default']}`" if meta["default"] else ""
            lines.append(f"| {name} | {default} | {meta['kind'].accepts} | {meta['meaning']} |")
    return "\n".join(lines)


# ============================================================================================================
# errors: one way to fail; the http section alone turns it into bytes
# ============================================================================================================


# What each code means, and the HTTP status it has.
CAUSES = {
    "invalid_request_error": (
        400,
        "body not JSON, wrong type or missing field, a file or URL that cannot be had; `param` names it",
    ),
    "login_required": (
        400,
        "files, images and speech need a signed-in account, and there are only login-free ones",
    ),
    "invalid_api_key": (401, "no or wrong key"),
    "token_not_credited": (401, "the upstream takes the caller's own token for nobody's; sign in again"),
    "invalid_credentials": (401, "wrong user name, password or one-time code"),
    "mfa_required": (401, "the account needs a one-time code: send it as `code`"),
    "not_found": (404, "route, conversation or file that does not exist"),
    "model_not_found": (404, "model that nobody offers: with CHECK_MODEL, or when the upstream says so"),
    "method_not_allowed": (405, "known route, other method; `Allow` names those it has"),
    "request_timeout": (408, "client too slow to send its request"),
    "request_too_large": (413, "body over MAX_BODY_MB, or a prompt too long for the upstream"),
    "context_length_exceeded": (400, "a prompt too long for the model, as the Codex backend says it"),
    "uri_too_long": (414, "URL over its limit"),
    "origin_refused": (
        403,
        "a page of another site while no key is set, or a page other than chatgpt.com's that connects as an agent",
    ),
    "upgrade_required": (426, "a WebSocket version other than 13, or a WebSocket where none is spoken"),
    "unsupported_encoding": (415, "a body with a `Content-Encoding`; send it as it is"),
    "expectation_failed": (417, "an `Expect` other than `100-continue`"),
    "headers_too_large": (431, "headers over their limit"),
    "rate_limit_exceeded": (
        429,
        "every usable account is waiting for a limit to end, an API user has used up today's requests, or too many "
        "wrong keys came from this address; `Retry-After`",
    ),
    "upstream_blocked": (403, "the upstream refuses this address (Cloudflare page, unusual activity)"),
    "human_check_required": (
        403,
        "the upstream wants a human check for this account, which is not made here: another kind of account, an agent",
    ),
    "challenge_required": (403, "the sign-in page asks for a human; sign in with `chatproxy.py login`"),
    "arkose_required": (403, "the upstream wants an Arkose token and no service provides one"),
    "proof_of_work_too_hard": (
        403,
        "the upstream asks for a harder proof of work than POW_DIFFICULTY allows",
    ),
    "internal_error": (500, "a fault of chatproxy itself; the log has it under the request id"),
    "upstream_error": (502, "upstream unreachable, 5xx, or an answer cut off"),
    "invalid_structured_output": (
        502,
        "the model twice gave no JSON that `response_format` or `text.format` allows",
    ),
    "agent_lost": (500, "the agent that was asked disconnected or failed"),
    "no_agent": (503, "no connected agent answers; `Retry-After`"),
    "no_account": (503, "no account in the pool can answer (none, or all expired); `Retry-After`"),
    "overloaded": (
        503,
        "more connections or request bodies than there is room for, or shutting down; `Retry-After`",
    ),
    "store_unavailable": (503, "the store cannot be read or written, as on a full disk; `Retry-After`"),
    "upstream_timeout": (504, "upstream silent"),
}
# The `type` of an error by its status.
KINDS = {429: "rate_limit_error", 500: "server_error", 503: "server_error"}
KINDS |= dict.fromkeys((403, 502, 504), "upstream_error")
_OURS = {"origin_refused"}  # refused here, although its status is mostly the upstream's


class ApiError(Exception):
    """A failure told to the client: `code` is a key of CAUSES, `message` says what to do next, never a secret."""

    def __init__(
        self, code: str, message: str, param: str | None = None, headers: Mapping[str, str] | None = None
    ):
        super().__init__(message)
        self.code = code
        self.message = message
        self.param = param
        self.headers = dict(headers or {})
        self.words = (
            ""  # the upstream's own about it: for the client alone, since they may repeat what that has sent
        )
        self.shape = "openai"  # a key of SHAPES: the API that was called

    @property
    def status(self) -> int:
        return CAUSES[self.code][0]

    @property
    def text(self) -> str:
        """What the client is told."""
        return self.message + self.words

    def body(self) -> dict[str, Any]:
        """What is told, in its shape."""
        return SHAPES[self.shape](self)


def _openai_error(error: ApiError) -> dict[str, Any]:
    kind = "" if error.code in _OURS else KINDS.get(error.status, "")
    kind = kind or "invalid_request_error"
    return {"error": {"message": error.text, "type": kind, "param": error.param, "code": error.code}}


def _anthropic_error(error: ApiError) -> dict[str, Any]:
    usual = "invalid_request_error" if error.status < 500 else "api_error"
    kind = ANTHROPIC_KINDS.get(error.status, usual)
    return {"type": "error", "error": {"type": kind, "message": error.text}}


# The `type` of an error of Anthropic's by its status, where that is not invalid_request_error or api_error.
ANTHROPIC_KINDS = {401: "authentication_error", 403: "permission_error", 404: "not_found_error"}
ANTHROPIC_KINDS |= {413: "request_too_large", 429: "rate_limit_error", 503: "overloaded_error"}
ANTHROPIC_KINDS |= {504: "timeout_error"}
# How an error is told: OpenAI's {"error": {"message", "type", "param", "code"}}, Anthropic's {"type": "error", "error":
# {"type", "message"}}, or {"error": message}, as Ollama's and ChatGPT-API-server's clients have it.
SHAPES: Mapping[str, Callable[[ApiError], dict[str, Any]]] = {
    "openai": _openai_error,
    "anthropic": _anthropic_error,
    "plain": lambda error: {"error": error.text},
}


def invalid(param: str | None, message: str) -> ApiError:
    """A 400 that names the field."""
    return ApiError("invalid_request_error", message, param)


def unfit(param: str, message: str) -> ApiError:
    """A 400 that begins with the field's name."""
    return invalid(param, f"`{param}` {message}")


def overloaded(message: str, wait: int = 5) -> ApiError:
    """A 503 to come back from after `wait` seconds."""
    return ApiError("overloaded", f"{message}; try again.", headers={"Retry-After": str(wait)})


class Refusal(ApiError):
    """The upstream refused or failed a call before answering.

    `reason`, a key of REASONS, is what the pool needs to know; "rejected" is about this request, whoever asks, and
    "dead" about a sign-in. `wait` is the pause a 429 asked for, in seconds, `about` what it is for when not the model.
    """

    REASONS = {
        "expired": "invalid_api_key",  # 401
        "blocked": "upstream_blocked",  # 403 and human-verification pages
        "uncredited": "token_not_credited",  # 403 after requirements for nobody, although a token was sent
        "human": "human_check_required",  # 403 after requirements that want one
        "limited": "rate_limit_exceeded",  # 429
        "broken": "upstream_error",  # 5xx, a cut answer
        "unreachable": "upstream_error",  # no connection
        "silent": "upstream_timeout",
        "missing": "upstream_error",  # 404 or 405 of a call
        "unlisted": "model_not_found",  # by CHECK_MODEL, or for this account
        "excluded": "no_account",  # the account's plan is without it
        "unsupported": "invalid_request_error",  # a part of the request that can be left out
        "unreadable": "invalid_request_error",  # earlier reasoning that is not the account's
        "forgotten": "not_found",  # a file that it once had
        "rejected": "invalid_request_error",
        "dead": "invalid_api_key",
    }

    def __init__(self, reason: str, message: str, code: str = "", wait: float | None = None, about: str = ""):
        super().__init__(code or self.REASONS[reason], message)
        self.reason, self.wait, self.about = reason, wait, about
        self.unsent = False  # whether the call cannot have arrived
        self.detail = ""  # the upstream's own words about a 403
        self.said: tuple[int, str, bytes] | None = None  # the upstream's own status, content type and body


def errors_table() -> str:
    """The README's table of errors, in Markdown."""
    lines = ["| status | code | cause |", "| --- | --- | --- |"]
    rows = sorted(CAUSES.items(), key=lambda row: row[1][0])
    lines += [f"| {status} | `{code}` | {meaning} |" for code, (status, meaning) in rows]
    return "\n".join(lines)


# ============================================================================================================
# telemetry: logs on stderr and Prometheus counters; neither ever sees a secret or a message's text
# ============================================================================================================


class JsonFormatter(logging.Formatter):
    """One JSON object a line: time (ISO 8601, UTC), level, message and the record's `facts`."""

    def format(self, record: logging.LogRecord) -> str:
        when = datetime.datetime.fromtimestamp(record.created, datetime.timezone.utc)
        line = {"time": when.isoformat(timespec="milliseconds"), "level": record.levelname.lower()}
        line |= {"message": record.getMessage()} | getattr(record, "facts", {})
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


class TextFormatter(logging.Formatter):
    """`LEVEL message key=value …`; systemd's journal has the time already, a terminal gets it."""

    def __init__(self) -> None:
        when = "" if "JOURNAL_STREAM" in os.environ else "%(asctime)s "
        super().__init__(f"{when}%(levelname)-7s %(message)s")

    def formatTime(self, record: logging.LogRecord, datefmt: str | None = None) -> str:
        """The local time; what a second's lines have in common is made once."""
        return f"{_second(int(record.created))},{int(record.msecs):03}"

    def format(self, record: logging.LogRecord) -> str:
        line = super().format(record)
        for name, value in getattr(record, "facts", {}).items():
            line += f" {name}={value if _PLAIN.fullmatch(str(value)) else json.dumps(str(value))}"
        return line


@functools.lru_cache(2)
def _second(moment: int) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(moment))


# What cannot be taken for a line or a fact of its own, nor change what a terminal shows.
_PLAIN = re.compile(r"[!#-~]+")
LOG = logging.getLogger("chatproxy")


def start_logging(settings: Settings) -> None:
    """Sends the `chatproxy` logger to stderr in the chosen level and format."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter() if settings.log_format == "json" else TextFormatter())
    LOG.handlers[:] = [handler]
    LOG.setLevel(settings.log_level.upper())
    LOG.propagate = False


def log(level: int, message: str, /, exc_info: bool = False, **facts: Any) -> None:
    """One line with its facts as key=value or JSON members."""
    if LOG.isEnabledFor(level):
        LOG.log(level, message, extra={"facts": facts}, exc_info=exc_info)


class Metrics:
    """Counters, gauges and histograms by name and labels, rendered as Prometheus text.

    A value costs one lock; what happens once per token is counted by its stream and added when the stream ends.
    """

    BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
    HELP = {
        "chatproxy_requests_total": "Requests answered, by route and status.",
        "chatproxy_streams_open": "Streamed answers under way.",
        "chatproxy_events_total": "Events sent to streaming clients.",
        "chatproxy_connections": "Client connections open.",
        "chatproxy_first_byte_seconds": "Time from a request to the first byte of its answer, by route.",
        "chatproxy_upstream_responses_total": "Answers of the upstream, by call and status (0: none came).",
        "chatproxy_accounts": "Accounts in the pool, by state.",
        "chatproxy_codex_used_percent": "Use of the windows of an account's Codex allowance.",
        "chatproxy_agents": "Agents connected.",
        "chatproxy_loop_seconds": "The longest that the loop was busy at a time, in the last minute.",
        "chatproxy_proof_seconds": "Time to solve a proof of work.",
        "chatproxy_smaller_model_total": "Answers of a smaller model than was asked for, by the one that answered.",
        "chatproxy_retries_total": "Attempts that went on to the next account or agent, by reason.",
    }

    def __init__(self) -> None:
        self._values_lock = threading.Lock()
        self._values: dict[str, dict[str, float]] = {}
        self._histograms: dict[str, dict[str, list[float]]] = {}
        self._gauges: dict[str, Callable[[], Mapping[str, float]]] = {}

    def add(self, name: str, amount: float = 1, labels: str = "") -> None:
        """Adds to a counter (or an up-and-down gauge); `labels` is text such as `route="/v1",status="200"`."""
        with self._values_lock:
            series = self._values.setdefault(name, {})
            series[labels] = series.get(labels, 0) + amount

    def observe(self, name: str, seconds: float, labels: str = "") -> None:
        """Adds a duration to a histogram: a count for each bucket, then their sum."""
        with self._values_lock:
            row = self._histograms.setdefault(name, {}).setdefault(labels, [0.0] * (len(self.BUCKETS) + 2))
            index = next((i for i, bound in enumerate(self.BUCKETS) if seconds <= bound), len(self.BUCKETS))
            row[index] += 1
            row[-1] += seconds

    def gauge(self, name: str, read: Callable[[], Mapping[str, float]]) -> None:
        """A gauge that is read when asked for: `read` gives values by labels."""
        self._gauges[name] = read

    def render(self) -> str:
        """Prometheus text format, version 0.0.4."""
        with self._values_lock:
            plain = {name: dict(series) for name, series in self._values.items()}
            histograms = {
                name: {k: list(v) for k, v in rows.items()} for name, rows in self._histograms.items()
            }
        plain |= {name: dict(read()) for name, read in self._gauges.items()}
        lines = []
        for name, series in sorted(plain.items()):
            kind = "counter" if name.endswith("_total") else "gauge"
            lines += [f"# HELP {name} {self.HELP[name]}", f"# TYPE {name} {kind}"]
            for labels, value in sorted(series.items()):
                lines.append(f"{name}{{{labels}}} {value:.15g}" if labels else f"{name} {value:.15g}")
        for name, rows in sorted(histograms.items()):
            lines += [f"# HELP {name} {self.HELP[name]}", f"# TYPE {name} histogram"]
            for labels, row in sorted(rows.items()):
                lines += self._histogram_lines(name, labels, row)
        return "\n".join(lines) + "\n"

    def _histogram_lines(self, name: str, labels: str, row: list[float]) -> Iterator[str]:
        comma = "," if labels else ""
        total = 0.0
        for bound, count in zip([*map(str, self.BUCKETS), "+Inf"], row[:-1], strict=True):
            total += count
            yield f'{name}_bucket{{{labels}{comma}le="{bound}"}} {total:.15g}'
        braces = f"{{{labels}}}" if labels else ""
        yield f"{name}_sum{braces} {row[-1]:.15g}"
        yield f"{name}_count{braces} {total:.15g}"


# ============================================================================================================
# waiting: who waits for an operation, and is looked after meanwhile
# ============================================================================================================


class ClientGone(Exception):
    """The client hung up: nobody is left to be told anything."""


class Watch:
    """Who waits for an operation, in one thread: the thread sleeps until it is rung, and is woken now and then to look
    after who waits. What may take long is a plain call that is given a watch."""

    LOOK = 1.0  # seconds between two looks

    def __init__(self) -> None:
        self._bell = threading.Lock()
        self._bell.acquire()

    def check(self) -> None:
        """Raises when the operation is to end: ClientGone, or ApiError as the process stops."""

    def look_after(self) -> float:
        """Sees to who waits, with a sign of life if one is due: the seconds until it is to be done again. Raises as `check`
        does."""
        self.check()
        return self.LOOK

    def ring(self) -> None:
        """Wakes the thread that waits, from any other: what it waits for may be there."""
        with contextlib.suppress(RuntimeError):  # it has been rung already
            self._bell.release()

    def wait(self, done: Callable[[], object], limit: float = math.inf) -> None:
        """Sleeps until something is done, of which a `ring` tells; TimeoutError after `limit` seconds."""
        now = time.monotonic()
        end = now + limit
        look = now + self.LOOK
        while not done():
            if now >= end:
                raise TimeoutError
            rung = self._bell.acquire(timeout=max(0.0, min(end, look) - now))
            now = time.monotonic()
            if rung or now >= look:
                look = now + self.look_after()

    def pause(self, seconds: float) -> None:
        """A pause, for as long as somebody waits."""
        with contextlib.suppress(TimeoutError):
            self.wait(lambda: False, seconds)

    def result(self, future: Future[T], limit: float = math.inf) -> T:
        """The result of a future; TimeoutError after `limit` seconds."""
        if not future.done():
            future.add_done_callback(lambda _: self.ring())
            self.wait(future.done, limit)
        return future.result()


class _Crew(Watch):
    """Who waits for one of several operations that run side by side: they end together."""

    over = False

    def check(self) -> None:
        if self.over:
            raise ClientGone


class Until(Watch):
    """Who waits no longer than some seconds in all: then the operation ends, as after a silence."""

    def __init__(self, watch: Watch, seconds: float) -> None:
        super().__init__()
        self._watch = watch
        self._end = time.monotonic() + seconds

    def check(self) -> None:
        self._watch.check()
        if time.monotonic() > self._end:
            raise Refusal("silent", "The upstream took too long; try again.")

    def look_after(self) -> float:
        self.check()
        return min(self.LOOK, self._watch.look_after())


def side_by_side(jobs: Sequence[Callable[[Watch], T]], watch: Watch, most: int = 1000) -> list[T]:
    """Runs jobs at the same time, up to `most`, each in a thread, and returns the results of those that succeed; when
    all fail, raises the first failure. They are ended when nobody waits for them any more."""
    if len(jobs) == 1:
        return [jobs[0](watch)]
    crew = [_Crew() for _ in jobs]
    results = list[T]()
    failure = None
    with ThreadPoolExecutor(max(1, min(len(jobs), most))) as executor:
        try:
            futures = [executor.submit(job, one) for job, one in zip(jobs, crew, strict=True)]
            for future in futures:
                try:
                    results.append(watch.result(future))
                except ApiError as error:
                    watch.check()
                    failure = failure or error
        finally:
            for one in crew:
                one.over = True
                one.ring()
    if failure and not results:
        raise failure
    return results


# ============================================================================================================
# blobs: bytes that may be too many for memory, and what they are
# ============================================================================================================

MAX_IN_MEMORY = 1 << 20
PIECE = 1 << 16  # bytes that are read or copied at a time


class Room:
    """The room for all request bodies together, in bytes: in memory and in files."""

    def __init__(self, memory: int, disk: int) -> None:
        self._left_lock = threading.Lock()
        self._left = {"memory": memory, "disk": disk}

    def take(self, place: str, size: int) -> bool:
        """Takes some of the room, if there is so much."""
        with self._left_lock:
            if self._left[place] < size:
                return False
            self._left[place] -= size
            return True

    def give_back(self, place: str, size: int) -> None:
        with self._left_lock:
            self._left[place] += size


class Share:
    """The part of that room that one request takes, until it is answered."""

    def __init__(self, room: Room) -> None:
        self._room = room
        self._taken = {"memory": 0, "disk": 0}
        self.held = False  # whether files of the body are used on while it is answered

    def grow(self, place: str, size: int) -> None:
        """Takes more room; ApiError overloaded when there is not so much."""
        if not self._room.take(place, size):
            raise overloaded("The server has no room for more request bodies just now")
        self._taken[place] += size

    def move(self, size: int) -> None:
        """What was in memory goes into a file."""
        self.grow("disk", size)
        self._taken["memory"] -= size
        self._room.give_back("memory", size)

    def end(self) -> None:
        """Gives everything back."""
        for place, size in self._taken.items():
            if size:
                self._room.give_back(place, size)
                self._taken[place] = 0


class Blob:
    """Bytes that are written once and then read by any thread: in memory, past MAX_IN_MEMORY in an unnamed file.
    Those of a request's body take their `share` of the room for bodies."""

    def __init__(self, data: bytes = b"", share: Share | None = None) -> None:
        self._data: bytes | bytearray = data
        self._file: IO[bytes] | None = None
        self._start = 0
        self.size = len(data)
        self.share = share
        if share and data:
            share.grow("memory", len(data))

    def write(self, data: bytes) -> None:
        """Appends; not to a part of another blob. ApiError overloaded when there is no room."""
        large = self.size + len(data) > MAX_IN_MEMORY
        if self.share:
            if large and self._file is None:
                self.share.move(self.size)
            self.share.grow("disk" if large else "memory", len(data))
        try:
            if self._file is None and large:
                self._file = tempfile.TemporaryFile(buffering=0)  # noqa: SIM115 # open as long as the blob lives
                self._file.write(self._data)
                self._data = b""
            if self._file is None:
                self._data = bytearray(self._data) if isinstance(self._data, bytes) else self._data
                self._data += data
            view = memoryview(data if self._file else b"")
            while view:
                view = view[self._file.write(view) :]  # type: ignore[union-attr] # there is one if there is a view
        except OSError as error:
            log(logging.ERROR, "no room for a temporary file", reason=error.strerror)
            raise overloaded("The server has no room for files just now", 30) from None
        self.size += len(data)

    @classmethod
    def of_file(cls, path: pathlib.Path) -> Blob:
        """The bytes of a file, which may be removed meanwhile; OSError when there is none."""
        blob = cls()
        blob._file = path.open("rb", buffering=0)
        blob.size = os.fstat(blob._file.fileno()).st_size
        return blob

    def part(self, start: int, size: int) -> Blob:
        """Some of the bytes, not copied."""
        part = Blob()
        part._data = self._data
        part._file = self._file
        part._start = self._start + start
        part.size = size
        return part

    def read(self, start: int = 0, size: int | None = None) -> bytes:
        """Up to `size` bytes (all when None) from `start`."""
        size = max(0, min(self.size - start, self.size if size is None else size))
        start += self._start
        if self._file is None:
            whole = isinstance(self._data, bytes) and size == len(self._data)
            return self._data if whole else bytes(self._data[start : start + size])  # type: ignore[return-value]
        return os.pread(self._file.fileno(), size, start)

    def pieces(self) -> Iterator[bytes]:
        for start in range(0, self.size, PIECE):
            yield self.read(start, PIECE)

    def find(self, wanted: bytes, start: int) -> int:
        """The position of `wanted`, -1 when it does not occur from `start` on."""
        for at in range(start, self.size, PIECE):
            found = self.read(at, PIECE + len(wanted) - 1).find(wanted)
            if found >= 0:
                return at + found
        return -1

    def digest(self) -> str:
        """SHA-256, hexadecimal."""
        state = hashlib.sha256()
        for piece in self.pieces():
            state.update(piece)
        return state.hexdigest()


class BlobReader:
    """A blob as a file to be read from its beginning, as libcurl wants it."""

    def __init__(self, blob: Blob) -> None:
        self._blob, self._at = blob, 0
        self.used = time.monotonic()  # when bytes were last taken

    def read(self, size: int) -> bytes:
        data = self._blob.read(self._at, size)
        self._at += len(data)
        self.used = time.monotonic()
        return data

    def seek(self, offset: int, origin: int = 0) -> None:
        """Goes back for a request that is sent anew; `origin` is always the beginning."""
        self._at = offset


def image_facts(blob: Blob) -> tuple[str, int, int] | None:
    """An image's MIME type, width and height, read from the bytes of a PNG, JPEG, GIF or WebP; None for others."""
    head = blob.read(0, 40)
    if head[:8] == b"\x89PNG\r\n\x1a\n" and head[12:16] == b"IHDR" and len(head) >= 24:
        return "image/png", *struct.unpack(">II", head[16:24])
    if head[:6] in (b"GIF87a", b"GIF89a") and len(head) >= 10:
        return "image/gif", *struct.unpack("<HH", head[6:10])
    if head[:4] == b"RIFF" and head[8:12] == b"WEBP" and len(head) >= 30:
        return _webp_facts(head)
    return _jpeg_facts(blob) if head[:3] == b"\xff\xd8\xff" else None


def _webp_facts(head: bytes) -> tuple[str, int, int] | None:
    """One of the three kinds of WebP: lossy, lossless, or extended with its canvas first."""
    if head[12:16] == b"VP8 ":
        width, height = struct.unpack("<HH", head[26:30])
        return "image/webp", width & 0x3FFF, height & 0x3FFF
    if head[12:16] == b"VP8L":
        bits = int.from_bytes(head[21:25], "little")
        return "image/webp", (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
    if head[12:16] == b"VP8X":
        width, height = (int.from_bytes(head[at : at + 3], "little") + 1 for at in (24, 27))
        return "image/webp", width, height
    return None


def _jpeg_facts(blob: Blob) -> tuple[str, int, int] | None:
    """Looks for the start of frame, which stands behind any number of other segments."""
    at = 2
    for _ in range(1000):
        segment = blob.read(at, 9)
        if len(segment) < 9 or segment[0] != 0xFF:
            return None
        if 0xC0 <= segment[1] <= 0xCF and segment[1] not in (0xC4, 0xC8, 0xCC):
            height, width = struct.unpack(">HH", segment[5:9])
            return "image/jpeg", width, height
        # A fill byte stands alone; so do the markers without a length.
        alone = segment[1] == 0x01 or 0xD0 <= segment[1] <= 0xD8
        at += 1 if segment[1] == 0xFF else 2 if alone else 2 + int.from_bytes(segment[2:4], "big")
    return None


# ============================================================================================================
# store: one SQLite file for what must outlive the process
# ============================================================================================================


STORE_FILE = "chatproxy.db"
# The kinds of accounts.
ACCESS = "access"
REFRESH = "refresh"
SESSION = "session"
LOGIN_FREE = "login-free"


class Scope(NamedTuple):
    """The things of others that a caller may see and change. `owner` owns the caller's conversations, files and
    responses; `everyone` is set for the keys of AUTHORIZATION and the administrator's, which see those of all keys
    and API users."""

    owner: str
    everyone: bool = False

    def covers(self, owner: str) -> bool:
        """Whether something of this owner's is the caller's too. What nobody is known to have begun ("") is for those who
        see all, and for callers who need no key."""
        if owner == "":
            return self.everyone or self.owner == LOGIN_FREE
        return owner == self.owner or (self.everyone and owner.startswith(("key-", "user-")))


@dataclass(frozen=True)
class AccountRow:
    """An account as it is kept. `secret` is the token it was added with (or the newest refresh token), `access_token`
    the current one; times are Unix seconds. `guest` accounts belong to a caller who brings the token, not to the pool.
    `codex` and `web` are whether the Codex backend and the site's own API take its token: yes, no, or "" where that is not
    known; `allowance` is what it may use of the former (see `Allowance`), as JSON."""

    id: str
    kind: str
    secret: str
    email: str = ""
    plan: str = ""
    workspace: str = ""
    access_token: str = ""
    expires: float = 0.0
    device: str = ""
    browser: str = ""
    proxy: str = ""
    cookies: str = "{}"
    state: str = "ready"
    reason: str = ""
    guest: int = 0
    added: float = 0.0
    codex: str = ""
    web: str = ""
    allowance: str = ""


class File(NamedTuple):
    """A file that an account holds upstream under the id `upstream`. `owner` is who may use it here (see `Keys`);
    `purpose` is "" for what came inside a message and is not listed; times are Unix seconds."""

    id: str
    owner: str
    account: str
    upstream: str
    name: str
    mime: str
    size: int
    width: int
    height: int
    purpose: str
    digest: str
    used: float


class Held(NamedTuple):
    """Which account holds a conversation, and who began it here ("" when that is not known)."""

    account: str
    owner: str = ""


class User(NamedTuple):
    """An API user: the token itself is not kept, only its SHA-256. `limit` is how many requests a day it may make."""

    id: str
    name: str
    token_hash: str
    added: float
    limit: int | None = None


class Tally(NamedTuple):
    """Counts of an account (answers, failures) or an API user (requests, tokens) over a time; last used at `used`
    (Unix seconds)."""

    answers: int = 0
    failures: int = 0
    requests: int = 0
    tokens: int = 0
    used: float = 0.0

    def plus(self, more: Tally) -> Tally:
        work = (self.answers + more.answers, self.failures + more.failures)
        asked = (self.requests + more.requests, self.tokens + more.tokens)
        return Tally(*work, *asked, max(self.used, more.used))


MIGRATIONS = (
    """
    CREATE TABLE accounts (
        id TEXT PRIMARY KEY, kind TEXT NOT NULL, secret TEXT NOT NULL, email TEXT NOT NULL, plan TEXT NOT NULL,
        workspace TEXT NOT NULL, access_token TEXT NOT NULL, expires REAL NOT NULL, device TEXT NOT NULL,
        browser TEXT NOT NULL, proxy TEXT NOT NULL, cookies TEXT NOT NULL, state TEXT NOT NULL, reason TEXT NOT NULL,
        guest INTEGER NOT NULL, added REAL NOT NULL) WITHOUT ROWID;
    CREATE TABLE waits (
        account TEXT NOT NULL REFERENCES accounts(id) ON DELETE CASCADE, model TEXT NOT NULL, until REAL NOT NULL,
        strikes INTEGER NOT NULL, PRIMARY KEY (account, model)) WITHOUT ROWID;
    CREATE TABLE conversations (
        id TEXT PRIMARY KEY, account TEXT NOT NULL REFERENCES accounts(id) ON DELETE CASCADE, used REAL NOT NULL
        ) WITHOUT ROWID;
    CREATE TABLE users (id TEXT PRIMARY KEY, name TEXT NOT NULL, token_hash TEXT NOT NULL UNIQUE, added REAL NOT NULL)
        WITHOUT ROWID;
    """,
    """
    CREATE TABLE files (
        id TEXT PRIMARY KEY, owner TEXT NOT NULL, account TEXT NOT NULL, upstream TEXT NOT NULL, name TEXT NOT NULL,
        mime TEXT NOT NULL, size INTEGER NOT NULL, width INTEGER NOT NULL, height INTEGER NOT NULL,
        purpose TEXT NOT NULL, digest TEXT NOT NULL, used REAL NOT NULL) WITHOUT ROWID;
    CREATE INDEX files_by_content ON files (digest, account);
    CREATE INDEX files_by_owner ON files (owner, used);
    CREATE TABLE responses (
        id TEXT PRIMARY KEY, owner TEXT NOT NULL, response TEXT NOT NULL, items TEXT NOT NULL, made REAL NOT NULL
        ) WITHOUT ROWID;
    """,
    """
    ALTER TABLE users ADD COLUMN daily_limit INTEGER;
    CREATE TABLE tallies (
        subject TEXT NOT NULL, since REAL NOT NULL, answers INTEGER NOT NULL, failures INTEGER NOT NULL,
        requests INTEGER NOT NULL, tokens INTEGER NOT NULL, used REAL NOT NULL, PRIMARY KEY (subject, since)
        ) WITHOUT ROWID;
    """,
    """
    ALTER TABLE conversations ADD COLUMN owner TEXT NOT NULL DEFAULT '';
    CREATE INDEX conversations_by_owner ON conversations (owner, account);
    ALTER TABLE responses ADD COLUMN size INTEGER NOT NULL DEFAULT 0;
    UPDATE responses SET size = LENGTH(response) + LENGTH(items);
    CREATE INDEX responses_by_owner ON responses (owner, made, size);
    CREATE TABLE room (data BLOB NOT NULL);
    """,
    """
    ALTER TABLE accounts ADD COLUMN codex TEXT NOT NULL DEFAULT '';
    ALTER TABLE accounts ADD COLUMN web TEXT NOT NULL DEFAULT '';
    ALTER TABLE accounts ADD COLUMN allowance TEXT NOT NULL DEFAULT '';
    CREATE TABLE items (
        id TEXT NOT NULL, response TEXT NOT NULL REFERENCES responses(id) ON DELETE CASCADE,
        PRIMARY KEY (id, response)) WITHOUT ROWID;
    CREATE INDEX items_by_response ON items (response);
    """,
)
TABLES = set(re.findall(r"CREATE TABLE (\w+)", "".join(MIGRATIONS)))
# Seconds that a response is kept, a file that came inside a message, and a tally.
RESPONSE_LIFE = 86400.0
LOOSE_FILE_LIFE = 7 * 86400.0
TALLY_LIFE = 3 * 86400.0
MAX_RESPONSES = 256 << 20  # characters of kept responses; the oldest go first
MAX_RESPONSES_OF_ONE = 64 << 20  # of one owner's
ROOM_FOR_A_TOKEN = 1 << 16  # bytes that the disk must take before a token is exchanged


class StoreError(Exception):
    """The store cannot be opened; one line that says why, and what to do."""


def store_advice(cause: str) -> str:
    """Advice for a store that cannot be used, by the cause that SQLite gives."""
    if re.search(r"full|locked|I/O|read-?only|unable to open", cause):
        return "make room on its disk, and see to it that this user may write there"
    return "restore a copy of it, or move it away and add the accounts anew"


class StoreUnavailable(ApiError):
    """The store cannot be read or written just now: its disk is full, or the file is damaged or locked for long."""

    def __init__(self, cause: str) -> None:
        text = "The server's store cannot be used just now; its disk may be full. Try again later."
        super().__init__("store_unavailable", text, headers={"Retry-After": "30"})
        self.cause = cause


class Store:
    """The SQLite file `chatproxy.db` in a folder of mode 0700, itself of mode 0600.

    WAL with synchronous=FULL: what a method has returned from survives kill -9 and a power cut. One connection serves
    all threads under a lock; other processes may write beside it, which `changed` notices.
    """

    def __init__(self, folder: str) -> None:
        path = pathlib.Path(folder)
        self.trouble = ""  # why the last attempt to use it failed
        self.tells = False  # whether trouble is logged: once somebody serves, who goes on nevertheless
        try:
            path.mkdir(mode=0o700, parents=True, exist_ok=True)
            self.path = path / STORE_FILE
            self._private(path, 0o700)
            for name in (STORE_FILE, "chatproxy.lock"):
                file = os.open(path / name, os.O_CREAT | os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
                self._private(path / name, 0o600)
                if name == "chatproxy.lock":
                    self._turns = file
                else:
                    os.close(file)
            self._db = sqlite3.connect(self.path, timeout=10, isolation_level=None, check_same_thread=False)
            self._db_lock = threading.RLock()
            for pragma in ("journal_mode=WAL", "synchronous=FULL", "foreign_keys=ON", "busy_timeout=10000"):
                self._db.execute(f"PRAGMA {pragma}")
            self._migrate()
            self._version = self._data_version()
        except StoreUnavailable as error:
            raise self._error(error.cause) from None
        except sqlite3.Error as error:
            raise self._error(str(error)) from None
        except OSError as error:
            why = (
                "is a symbolic link; put the file itself there" if error.errno == errno.ELOOP else str(error)
            )
            raise StoreError(f"DATA_DIR: {folder!r} cannot be used: {why}") from None

    def _error(self, cause: str) -> StoreError:
        return StoreError(f"DATA_DIR: {str(self.path)!r} cannot be used: {cause}; {store_advice(cause)}")

    @staticmethod
    def _private(path: pathlib.Path, mode: int) -> None:
        """StoreError for what others on this machine could read."""
        has = stat.S_IMODE(path.stat().st_mode)
        if has & 0o077:
            text = f"others may use it (mode {has:04o}); `chmod {mode:o} {path}` makes it private"
            raise StoreError(f"DATA_DIR: {str(path)!r} cannot be used: {text}")

    def _migrate(self) -> None:
        """Brings the schema to this program's version; two processes at once take turns."""
        with self.writing():
            have = self._db.execute("PRAGMA user_version").fetchone()[0]
            if have > len(MIGRATIONS):
                raise StoreError(f"DATA_DIR: {self.path} was written by a newer chatproxy (schema {have})")
            known = {row[0] for row in self._db.execute("SELECT name FROM sqlite_master WHERE type='table'")}
            if have < 0 or (have and not known) or (have == len(MIGRATIONS) and TABLES - known):
                raise sqlite3.DatabaseError(
                    "it is not a database of chatproxy's, or tables of it are missing"
                )
            for script in MIGRATIONS[have:]:
                for statement in filter(str.strip, script.split(";")):
                    self._db.execute(statement)
            self._db.execute(f"PRAGMA user_version={len(MIGRATIONS)}")

    @contextlib.contextmanager
    def writing(self) -> Iterator[sqlite3.Connection]:
        """A transaction: everything inside is kept, or after an exception nothing. One inside another is part of it."""
        with self._db_lock:
            if self._db.in_transaction:
                yield self._db
                return
            with self._watched():
                self._db.execute("BEGIN IMMEDIATE")
                try:
                    yield self._db
                    self._db.execute("COMMIT")
                finally:
                    if self._db.in_transaction:  # some failures have rolled it back already
                        self._db.execute("ROLLBACK")

    @contextlib.contextmanager
    def _watched(self) -> Iterator[None]:
        """Says StoreUnavailable for what SQLite says of its file, and notes that the store cannot be used."""
        try:
            yield
        except (sqlite3.IntegrityError, sqlite3.ProgrammingError, sqlite3.InterfaceError, sqlite3.DataError):
            raise  # a fault of this program
        except sqlite3.Error as error:
            if not self.trouble and self.tells:
                log(logging.ERROR, "the store cannot be used", reason=str(error))
            self.trouble = str(error)
            raise StoreUnavailable(str(error)) from None

    def try_room(self) -> None:
        """Whether the disk takes what a new token needs; StoreUnavailable when it does not. Ends the store's trouble."""
        self._write("INSERT INTO room VALUES (zeroblob(?))", ROOM_FOR_A_TOKEN)
        self._write("DELETE FROM room")
        if self.trouble:
            self.trouble = ""
            log(logging.WARNING, "the store can be used again")

    def _rows(self, query: str, *values: Any) -> list[tuple[Any, ...]]:
        with self._db_lock, self._watched():
            return self._db.execute(query, values).fetchall()

    def _write(self, query: str, *values: Any) -> int:
        """One statement as a transaction; how many rows it changed."""
        with self.writing() as db:
            return db.execute(query, values).rowcount

    def close(self) -> None:
        with self._db_lock:
            self._db.close()
        os.close(self._turns)

    @contextlib.contextmanager
    def exclusively(self, id: str, patience: float) -> Iterator[None]:
        """No other process is in such a block for the same account; within one process the caller sees to that.
        TimeoutError when another is for `patience` seconds; its end, however it ends, lets the next one in."""
        place = int.from_bytes(hashlib.sha256(id.encode()).digest()[:7], "big")
        end = time.monotonic() + patience
        while True:
            try:  # not by waiting for the lock: the kernel would take two threads in two processes for a deadlock
                fcntl.lockf(self._turns, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, place)
                break
            except BlockingIOError:
                if time.monotonic() >= end:
                    raise TimeoutError from None
                time.sleep(0.05)
        try:
            yield
        finally:
            fcntl.lockf(self._turns, fcntl.LOCK_UN, 1, place)

    def _data_version(self) -> int:
        return int(self._rows("PRAGMA data_version")[0][0])

    def changed(self) -> bool:
        """Whether another process has written since the last call."""
        before = self._version
        self._version = self._data_version()
        return before != self._version

    def accounts(self, where: str = "1", *values: Any) -> list[AccountRow]:
        """The accounts in the order in which they were added."""
        columns = ", ".join(_ACCOUNT_COLUMNS)
        query = f"SELECT {columns} FROM accounts WHERE {where} ORDER BY added, id"
        return [AccountRow(*row) for row in self._rows(query, *values)]

    def account(self, id: str) -> AccountRow | None:
        return next(iter(self.accounts("id=?", id)), None)

    def merge_accounts(
        self, merge: Callable[[Mapping[str, AccountRow]], list[AccountRow]]
    ) -> list[AccountRow]:
        """Stores the accounts that `merge` makes of those that are known by id, in one transaction; returns them."""
        names = ", ".join(_ACCOUNT_COLUMNS)
        marks = ", ".join("?" * len(_ACCOUNT_COLUMNS))
        updates = ", ".join(f"{name}=excluded.{name}" for name in _ACCOUNT_COLUMNS[1:])
        query = f"INSERT INTO accounts ({names}) VALUES ({marks}) ON CONFLICT(id) DO UPDATE SET {updates}"
        with self.writing() as db:
            rows = merge({row.id: row for row in self.accounts()})
            db.executemany(query, [tuple(getattr(row, name) for name in _ACCOUNT_COLUMNS) for row in rows])
        return rows

    def update_account(self, id: str, **columns: Any) -> None:
        """Changes some columns of one account, so that two processes never undo each other's others."""
        assignments = ", ".join(f"{name}=?" for name in columns)
        self._write(f"UPDATE accounts SET {assignments} WHERE id=?", *columns.values(), id)

    def swap_states(self, ids: Iterable[str], was: str, state: str) -> int:
        """Accounts of the pool that are in a state get into another; how many did."""
        query = "UPDATE accounts SET state=? WHERE id=? AND state=? AND guest=0"
        with self.writing() as db:
            return sum(db.execute(query, (state, id, was)).rowcount for id in ids)

    def update_accounts(self, column: str, values: Mapping[str, str]) -> None:
        """Changes one column of many accounts, by id, in one transaction."""
        with self.writing() as db:
            pairs = [(value, id) for id, value in values.items()]
            db.executemany(f"UPDATE accounts SET {column}=? WHERE id=?", pairs)

    def remove_accounts(self, ids: Iterable[str] | None = None) -> list[str]:
        """Removes accounts, all of the pool when none are named, and what is known of them; those that there were."""
        with self.writing() as db:
            if ids is None:
                ids = [row[0] for row in self._rows("SELECT id FROM accounts WHERE guest=0")]
            removed = [id for id in ids if db.execute("DELETE FROM accounts WHERE id=?", (id,)).rowcount]
            db.executemany("DELETE FROM files WHERE account=?", [(id,) for id in removed])
            db.executemany("DELETE FROM tallies WHERE subject=?", [(id,) for id in removed])
        return removed

    def absorb_account(self, id: str, other: str, **columns: Any) -> None:
        """An account gets these columns and what another one held, which is removed."""
        with self.writing() as db:
            db.execute("UPDATE conversations SET account=? WHERE account=?", (id, other))
            db.execute("UPDATE files SET account=? WHERE account=?", (id, other))
            self.remove_accounts([other])
            self.update_account(id, **columns)

    def waits(self) -> list[tuple[str, str, float, int]]:
        """(account, model, until, strikes) of every cool-down, those that are over too: their strikes count on."""
        rows = self._rows("SELECT account, model, until, strikes FROM waits")
        return [(row[0], row[1], row[2], row[3]) for row in rows]

    def put_wait(self, account: str, model: str, until: float, strikes: int) -> None:
        query = "INSERT INTO waits SELECT id, ?, ?, ? FROM accounts WHERE id=? ON CONFLICT(account, model)"
        changes = "DO UPDATE SET until=excluded.until, strikes=excluded.strikes"
        self._write(f"{query} {changes}", model, until, strikes, account)

    def remove_wait(self, account: str, model: str) -> None:
        self._write("DELETE FROM waits WHERE account=? AND model=?", account, model)

    def conversation(self, id: str) -> Held | None:
        """The holder of a conversation, None when that is not known."""
        rows = self._rows("SELECT account, owner FROM conversations WHERE id=?", id)
        return Held(*rows[0]) if rows else None

    def conversations_of(self, owner: str) -> dict[str, set[str]]:
        """The conversations that somebody began, by the accounts that hold them."""
        found: dict[str, set[str]] = {}
        for id, account in self._rows("SELECT id, account FROM conversations WHERE owner=?", owner):
            found.setdefault(account, set()).add(id)
        return found

    def put_conversations(self, held: Mapping[str, Held]) -> None:
        """Notes which account holds which conversation; who began one stays who was noted first."""
        query = (
            "INSERT INTO conversations (id, account, used, owner) SELECT ?, id, ?, ? FROM accounts WHERE id=?"
        )
        owner = "CASE conversations.owner WHEN '' THEN excluded.owner ELSE conversations.owner END"
        changes = f"ON CONFLICT(id) DO UPDATE SET account=excluded.account, used=excluded.used, owner={owner}"
        rows = [(id, time.time(), one.owner, one.account) for id, one in held.items()]
        with self.writing() as db:
            db.executemany(f"{query} {changes}", rows)

    def prune(self, now: float) -> None:
        """Forgets cool-downs that ended a day ago, conversations that nobody went on with for half a year, responses,
        loose files and tallies whose time is over, and the oldest responses past MAX_RESPONSES."""
        with self.writing() as db:
            db.execute("DELETE FROM waits WHERE until < ?", (now - 86400,))
            db.execute("DELETE FROM conversations WHERE used < ?", (now - 180 * 86400,))
            db.execute("DELETE FROM responses WHERE made < ?", (now - RESPONSE_LIFE,))
            self._shorten("1", (), MAX_RESPONSES)
            db.execute("DELETE FROM files WHERE purpose='' AND used < ?", (now - LOOSE_FILE_LIFE,))
            # The last of a subject stays: it tells when that was last used.
            later = "SELECT 1 FROM tallies AS later WHERE later.subject=tallies.subject AND later.since>tallies.since"
            db.execute(f"DELETE FROM tallies WHERE since < ? AND EXISTS ({later})", (now - TALLY_LIFE,))

    def files(self, where: str, *values: Any) -> list[File]:
        """Files, the newest first."""
        query = f"SELECT {', '.join(File._fields)} FROM files WHERE {where} ORDER BY used DESC, id"
        return [File(*row) for row in self._rows(query, *values)]

    def put_file(self, file: File) -> None:
        marks = ", ".join("?" * len(File._fields))
        self._write(f"INSERT OR REPLACE INTO files VALUES ({marks})", *file)

    def move_file(self, account: str, old: str, new: str) -> None:
        """An account holds a file under another id upstream."""
        self._write("UPDATE files SET upstream=? WHERE account=? AND upstream=?", new, account, old)

    def remove_file(self, id: str) -> None:
        self._write("DELETE FROM files WHERE id=?", id)

    def response(self, id: str, scope: Scope, now: float) -> tuple[str, str] | None:
        """A response that is kept, if the caller may see it, as JSON: itself, and the items it can be gone on from."""
        query = "SELECT owner, response, items FROM responses WHERE id=? AND made>=?"
        rows = self._rows(query, id, now - RESPONSE_LIFE)
        return (rows[0][1], rows[0][2]) if rows and scope.covers(rows[0][0]) else None

    def responses_with(self, item: str) -> list[str]:
        """The ids of the responses that have an item under an id of the upstream's, the newest first."""
        query = (
            "SELECT responses.id FROM items JOIN responses ON responses.id=items.response WHERE items.id=?"
        )
        return [row[0] for row in self._rows(f"{query} ORDER BY made DESC LIMIT 10", item)]

    def put_response(
        self, id: str, owner: str, response: str, items: str, now: float, named: Iterable[str] = ()
    ) -> None:
        """Keeps a response; the oldest of its owner's go when they are too many together. `named` are its items' ids where
        those are the upstream's."""
        with self.writing() as db:
            size = len(response) + len(items)
            db.execute(
                "INSERT INTO responses VALUES (?, ?, ?, ?, ?, ?)", (id, owner, response, items, now, size)
            )
            db.executemany("INSERT OR IGNORE INTO items VALUES (?, ?)", [(item, id) for item in named])
            self._shorten("owner=?", (owner,), MAX_RESPONSES_OF_ONE)

    def _shorten(self, where: str, values: tuple[str, ...], most: int) -> None:
        """Forgets the oldest of some responses, as far as together they have more than so many characters."""
        total = self._rows(f"SELECT TOTAL(size) FROM responses WHERE {where}", *values)[0][0]
        if total > most:
            sizes = f"SELECT id, SUM(size) OVER (ORDER BY made DESC, id) AS size FROM responses WHERE {where}"
            excess = f"SELECT id FROM ({sizes}) WHERE size > ?"
            self._write(f"DELETE FROM responses WHERE id IN ({excess})", *values, most)

    def remove_response(self, id: str) -> None:
        self._write("DELETE FROM responses WHERE id=?", id)

    def users(self) -> list[User]:
        rows = self._rows("SELECT id, name, token_hash, added, daily_limit FROM users ORDER BY added, id")
        return [User(*row) for row in rows]

    def put_user(self, user: User) -> None:
        columns = "id, name, token_hash, added, daily_limit"
        self._write(f"INSERT INTO users ({columns}) VALUES (?, ?, ?, ?, ?)", *user)

    def remove_user(self, id: str) -> bool:
        with self.writing() as db:
            db.execute("DELETE FROM tallies WHERE subject=?", (id,))
            return db.execute("DELETE FROM users WHERE id=?", (id,)).rowcount > 0

    def last_tallies(self) -> list[tuple[str, float, Tally]]:
        """(subject, since, tally) of each subject's last day."""
        columns = "subject, since, answers, failures, requests, tokens, MAX(used)"
        rows = self._rows(f"SELECT {columns} FROM tallies WHERE subject != '' GROUP BY subject")
        return [(row[0], row[1], Tally(*row[2:])) for row in rows]

    def tallies(self, subject: str, since: float) -> dict[float, Tally]:
        """The tallies of a subject by when their time began."""
        query = "SELECT since, answers, failures, requests, tokens, used FROM tallies WHERE subject=? AND since>=?"
        return {row[0]: Tally(*row[1:]) for row in self._rows(query, subject, since)}

    def add_tallies(self, more: Mapping[tuple[str, float], Tally]) -> None:
        """Adds to tallies, by subject and when their time began."""
        names = ", ".join(Tally._fields)
        sums = ", ".join(f"{name}={name}+excluded.{name}" for name in Tally._fields[:4])
        query = f"INSERT INTO tallies (subject, since, {names}) VALUES (?, ?, ?, ?, ?, ?, ?)"
        change = f"ON CONFLICT DO UPDATE SET {sums}, used=MAX(used, excluded.used)"
        with self.writing() as db:
            db.executemany(f"{query} {change}", [(*key, *tally) for key, tally in more.items()])


_ACCOUNT_COLUMNS = tuple(column.name for column in fields(AccountRow))

# ============================================================================================================
# proof: the browser fingerprint and the proof of work made from it
# ============================================================================================================

# What browsers send when they give up after MAX_ATTEMPTS, before the base64 of the seed in quotes.
GIVE_UP = "gAAAAABwQ8Lk5FbGpA2NcR9dShT6gYjU7VxZ4D"
MAX_ATTEMPTS = 500_000
# A proof that takes fewer attempts than this on average (about 2 ms) is solved where it is needed.
EASY_ATTEMPTS = 2_000
REQUIREMENTS_DIFFICULTY = "0fffff"
SOLVER_PATIENCE = 60.0  # seconds before a proof is solved without the solver processes
# Width + height of a screen, and the two.
_SCREENS = {
    3000: (1920, 1080), 3016: (1936, 1080), 2624: (1600, 1024), 2520: (1440, 1080), 4000: (2560, 1440),
    3120: (1920, 1200),
}  # fmt: skip
_CORES = (4, 8, 10, 12, 16)
_NAVIGATOR = (
    "webdriver−false",
    "vendor−Google Inc.",
    "cookieEnabled−true",
    "onLine−true",
    "pdfViewerEnabled−true",
)
_DOCUMENT = ("location", "scrollingElement", "body", "activeElement", "documentElement", "fonts")
_WINDOW = (
    "alert",
    "close",
    "crypto",
    "history",
    "indexedDB",
    "navigation",
    "performance",
    "screen",
    "scheduler",
)
# The clock that the fingerprint claims and the conversation body repeats.
TIMEZONE_OFFSET_MIN = 300
TIMEZONE = "America/Panama"  # which has no summer time


class Page(NamedTuple):
    """Facts of the site's start page for a fingerprint: the `src` of its scripts, its data-build, when it was read, and its
    build's number."""

    scripts: tuple[str, ...] = ()
    build: str | None = None
    read: float = 0.0
    number: str = ""


@functools.lru_cache(10_000)
def _device_facts(device: str) -> tuple[int, int, str, str, str]:
    """Facts that a device keeps for life, derived from its id: screen, cores, navigator property, document and window
    key."""
    choose = random.Random(device).choice
    return choose(tuple(_SCREENS)), choose(_CORES), choose(_NAVIGATOR), choose(_DOCUMENT), choose(_WINDOW)


@functools.lru_cache(16)
def _browser_date(now: int) -> str:
    zone = datetime.timezone(-datetime.timedelta(minutes=TIMEZONE_OFFSET_MIN))
    local = datetime.datetime.fromtimestamp(now, zone)
    return local.strftime("%a %b %d %Y %H:%M:%S GMT-0500 (Eastern Standard Time)")


def fingerprint(
    device: str, agent: str, language: str, page: Page, now: float, algorithm: str = "sha3"
) -> list[Any]:
    """The configuration array of "Proof of work": of 18 elements, for the algorithm `fnv` of 25, the last of which tell
    that the browser has none of seven oddities."""
    screen, cores, navigator, document, window = _device_facts(device)
    since = min(max(now - page.read, 1.0), 3600.0) * 1000  # performance.now(), in ms
    script = page.scripts[int(now) % len(page.scripts)] if page.scripts else None
    languages = language if "-" not in language else f"{language},{language.split('-')[0]}"
    date = _browser_date(int(now))
    origin = round(now * 1000 - since, 1)
    head = [screen, date, 4294705152, 0, agent, script, page.build, language, languages, 0]
    probes = [0] * 7 if algorithm == "fnv" else []
    return [*head, navigator, document, window, since, new_id(), "", cores, origin, *probes]


def screen_size(device: str) -> tuple[int, int]:
    """Width and height of a device's screen, in pixels; the sum is what its fingerprint has."""
    return _SCREENS[_device_facts(device)[0]]


class _Sha3:
    """SHA3-512 over a head that is hashed once; 128 hexadecimal digits."""

    digits = 128

    def __init__(self, head: bytes) -> None:
        self._head = hashlib.sha3_512(head)

    def first(self, starts: Iterable[bytes], rest: bytes, bound: bytes) -> bytes | None:
        """The first start with which head + start + rest hashes to at most `bound`, compared over its length."""
        copy = self._head.copy
        size = len(bound)
        for start in starts:
            state = copy()
            state.update(start + rest)
            if state.digest()[:size] <= bound:
                return start
        return None


class _Fnv:
    """32-bit FNV-1a with the finisher that newer pages use; 8 hexadecimal digits."""

    digits = 8

    def __init__(self, head: bytes) -> None:
        self._head = self._add(2166136261, head)

    @staticmethod
    def _add(state: int, data: bytes) -> int:
        for byte in data:
            state = ((state ^ byte) * 16777619) & 0xFFFFFFFF
        return state

    def first(self, starts: Iterable[bytes], rest: bytes, bound: bytes) -> bytes | None:
        """The first start with which head + start + rest hashes to at most `bound`, compared over its length."""
        for start in starts:
            state = self._add(self._head, start + rest)
            state = ((state ^ state >> 16) * 2246822507) & 0xFFFFFFFF
            state = ((state ^ state >> 13) * 3266489909) & 0xFFFFFFFF
            if (state ^ state >> 16).to_bytes(4, "big")[: len(bound)] <= bound:
                return start
        return None


ALGORITHMS: dict[str, tuple[type[_Sha3] | type[_Fnv], str]] = {"sha3": (_Sha3, ""), "fnv": (_Fnv, "~S")}


def expected_attempts(difficulty: str) -> float:
    """How many attempts a difficulty takes on average: "00003a" is met by 0x3b of 16^6 digests."""
    return 16 ** len(difficulty) / (int(difficulty, 16) + 1)


def harder(difficulty: str, limit: str) -> bool:
    """Whether a difficulty is harder than the limit: smaller as text, the shorter one filled up with "f"."""
    size = max(len(difficulty), len(limit))
    return difficulty.lower().ljust(size, "f") < limit.ljust(size, "f")


# Three digits of JSON are four letters of base64: the part of an answer that changes from attempt to attempt.
_STARTS = tuple(base64.b64encode(b"%03d" % number) for number in range(1000))


def solve(seed: str, difficulty: str, configuration: list[Any], algorithm: str) -> str:
    """The answer: base64 of a configuration whose hash after the seed is at most `difficulty`; ProofGivenUp if none is.

    Only three digits of index 13, performance.now(), change from one attempt to the next: what stands before them is
    hashed once, what stands behind them is encoded once, so that an attempt hashes 100 bytes and not 700. Counter
    (index 3) and elapsed time (index 9) advance every thousand attempts.
    """
    kind = ALGORITHMS[algorithm][0]
    # An odd number of digits compares as its last half byte filled up: "00003a1" as 00 00 3a 1f.
    bound = bytes.fromhex(difficulty + "f" * (len(difficulty) % 2))[: kind.digits // 2]
    for tried in range(0, MAX_ATTEMPTS, len(_STARTS)):
        configuration[3] = tried + len(_STARTS)
        configuration[9] = (tried + len(_STARTS)) // 2
        head, rest = (base64.b64encode(part) for part in _split(configuration))
        if found := kind(seed.encode() + head).first(_STARTS, rest, bound):
            return (head + found + rest).decode()
    raise ProofGivenUp(seed)


class ProofGivenUp(Exception):
    """No proof within MAX_ATTEMPTS; the one argument is the seed."""


def _split(configuration: list[Any]) -> tuple[bytes, bytes]:
    """The configuration's JSON without three digits inside index 13: what stands before them, filled up to a multiple
    of three bytes so that base64 of the parts is base64 of the whole, and what stands behind them."""
    head = f"{compact(configuration[:13])[:-1]},{int(configuration[13])}.".encode()
    rest = f"7,{compact(configuration[14:])[1:]}".encode()
    return head + b"104"[: 3 - len(head) % 3], rest


def proof_token(seed: str, difficulty: str, configuration: list[Any], algorithm: str) -> str:
    """`PROOF`: the answer with its prefix, or what browsers send when they give up."""
    suffix = ALGORITHMS[algorithm][1]
    try:
        return f"gAAAAAB{solve(seed, difficulty, configuration, algorithm)}{suffix}"
    except ProofGivenUp:
        return GIVE_UP + base64.b64encode(f'"{seed}"'.encode()).decode() + suffix


def requirements_token(configuration: list[Any], algorithm: str) -> str:
    """`REQ`: a proof for a seed of one's own, sent as `p` to ask for requirements."""
    answer = solve(str(random.random()), REQUIREMENTS_DIFFICULTY, configuration, algorithm)
    return f"gAAAAAC{answer}{ALGORITHMS[algorithm][1]}"


class Solver:
    """Processes that solve hard proofs, so that they stop nobody: a thread would hold the interpreter for all others.

    They are forked before any thread exists, one fewer than there are cores but at most four, and take jobs off one
    datagram socket as they get free: JSON [number, [seed, difficulty, configuration, algorithm]] there,
    [number, token] back. When they are lost, proofs are solved in the calling thread.
    """

    def __init__(self, busy_cpu: int | None = None) -> None:
        """`busy_cpu` is the processor that the calling process keeps to: the solvers stay away from it."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._processes = []
        for _ in range(min(4, max(1, (os.cpu_count() or 1) - 1))):
            if not (process := os.fork()):
                ours.close()
                self._serve(theirs, busy_cpu)
            self._processes.append(process)
        theirs.close()
        self._socket = ours
        self._waiting_lock = threading.Lock()
        self._waiting: dict[int, Future[str]] = {}
        self._numbers = 0

    def start(self) -> None:
        """Begins to hear answers; called once, when threads may start."""
        threading.Thread(target=self._listen, name="solver", daemon=True).start()

    def solved(self, job: tuple[str, str, list[Any], str], watch: Watch) -> str:
        """The proof token for (seed, difficulty, configuration, algorithm); easy ones are solved at once."""
        if expected_attempts(job[1]) <= EASY_ATTEMPTS:
            return proof_token(*job)
        future: Future[str] = Future()
        with self._waiting_lock:
            self._numbers += 1
            number = self._numbers
            self._waiting[number] = future
        try:
            self._socket.send(compact([number, job]).encode())
            return watch.result(future, SOLVER_PATIENCE)
        except (OSError, TimeoutError):
            log(logging.ERROR, "the solver processes are gone or stuck; solving in place")
            return proof_token(*job)
        finally:
            with self._waiting_lock:
                self._waiting.pop(number, None)

    def close(self) -> None:
        """Ends the processes."""
        self._socket.close()
        for process in self._processes:
            with contextlib.suppress(ProcessLookupError, ChildProcessError):
                os.kill(process, signal.SIGKILL)
                os.waitpid(process, 0)

    def _listen(self) -> None:
        """Hands each answer to the future that waits for it."""
        while True:
            try:
                number, token = json.loads(self._socket.recv(65536))
            except OSError:
                return
            except (ValueError, TypeError):
                # An answer that did not come whole: who waits for it solves it in place.
                continue
            with self._waiting_lock:
                future = self._waiting.pop(number, None)
            if future and future.set_running_or_notify_cancel():
                future.set_result(token)

    @staticmethod
    def _serve(jobs: socket.socket, busy_cpu: int | None) -> NoReturn:
        """A solver process: job after job, until its parent is gone."""
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)
        os.nice(10)
        if busy_cpu is not None:
            os.sched_setaffinity(0, os.sched_getaffinity(0) - {busy_cpu})
        parent = os.getppid()
        jobs.settimeout(2.0)
        while os.getppid() == parent:
            with contextlib.suppress(OSError):  # a time-out, or the parent's end is closed
                job_number, token = 0, ""
                with contextlib.suppress(ValueError, TypeError):  # a job that is none ends nobody
                    job_number, job = json.loads(jobs.recv(65536))
                    token = proof_token(*job)
                jobs.send(json.dumps([job_number, token]).encode())
        os._exit(0)


# ============================================================================================================
# transport: the loop that carries bytes, libcurl's handles and connections, time-outs, abort
# ============================================================================================================

MAX_READY = 64  # sockets that the loop sees to before it looks at anything else
MAX_TURN = 0.005  # seconds after which the rest of what is ready waits for the loop's next turn
TICK = 0.5  # seconds between two looks at what takes too long
LONGEST_TIME = 60.0  # seconds for which the longest turn of the loop is told
_HUNG_UP = select.EPOLLHUP | select.EPOLLERR | select.EPOLLRDHUP


class Ticking:
    """Something that the loop looks at every TICK seconds."""

    def tick(self, now: float) -> None:
        """Ends what takes too long; `now` is a time.monotonic()."""


class Loop:
    """One thread that waits for every socket, and carries what arrives to where it belongs: the bytes of all upstream
    calls, the answers that clients are slow to read, connections without a request.

    Whatever it calls runs to its end before anybody else has a turn, so nothing that it calls may wait or take long;
    what may is a request thread's. Its own methods are for its own thread, but for `soon` and `run`.
    """

    def __init__(self) -> None:
        self._epoll = select.epoll()
        self._bell = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._awake = False
        self._handlers: dict[int, Callable[[int], object]] = {}
        self._soon: deque[Callable[[], object]] = deque()
        self._rings: dict[Watch, None] = {}
        self._timers: list[tuple[float, int, Callable[[], object]]] = []
        self._numbers = itertools.count()
        self.ticking: dict[Ticking, None] = {}
        self._longest = (0.0, 0.0)  # seconds: of the last minute's turns, and of the minute's before
        self._closed = False
        self.watch(self._bell, select.EPOLLIN, self._heard)
        self._thread = threading.Thread(target=self._run, name="loop", daemon=True)
        self._thread.start()

    def soon(self, call: Callable[[], object]) -> None:
        """Has the loop call something, in the order in which it is told."""
        self._soon.append(call)
        if not self._awake:
            self._awake = True
            os.eventfd_write(self._bell, 1)

    def run(self, call: Callable[[], object]) -> None:
        """Has the loop call something, and returns once it has."""
        if self._closed or threading.current_thread() is self._thread:
            call()
            return
        done = threading.Event()

        def then() -> None:
            try:
                call()
            finally:
                done.set()

        self.soon(then)
        while not done.wait(1.0):
            if self._closed:
                return

    def close(self) -> None:
        """Ends the thread; what it was carrying stays where it is."""

        def end() -> None:
            self._closed = True

        self.soon(end)
        self._thread.join(5.0)
        if not self._thread.is_alive() and self._bell >= 0:
            self._epoll.close()
            os.close(self._bell)
            self._bell = -1

    def longest(self) -> float:
        """The seconds that the longest turn of the last minute or two took."""
        return max(self._longest)

    # -- in the loop's own thread ------------------------------------------------------------------------------

    def watch(self, fd: int, events: int, handler: Callable[[int], object]) -> None:
        """Calls a handler, from now on, whenever a socket has one of these events (of epoll), with those it has."""
        try:
            if fd in self._handlers:
                self._epoll.modify(fd, events)
            else:
                self._epoll.register(fd, events)
        except FileNotFoundError:  # the number is a newer socket's
            self._epoll.register(fd, events)
        except FileExistsError:
            self._epoll.modify(fd, events)
        self._handlers[fd] = handler

    def unwatch(self, fd: int, handler: Callable[[int], object] | None = None) -> None:
        """Watches a socket no more, be it open or closed; given its handler, not if the number is a newer socket's."""
        if fd in self._handlers and handler in (None, self._handlers[fd]):
            del self._handlers[fd]
            with contextlib.suppress(OSError):
                self._epoll.unregister(fd)

    def at(self, moment: float, call: Callable[[], object]) -> None:
        """Calls something at a time.monotonic()."""
        heapq.heappush(self._timers, (moment, next(self._numbers), call))

    def ring(self, watch: Watch) -> None:
        """Wakes a thread that waits, at the end of this turn: before that it could only wait for the interpreter."""
        self._rings[watch] = None

    def _heard(self, _: int) -> None:
        os.eventfd_read(self._bell)

    def _run(self) -> None:
        poll = self._epoll.poll
        handlers = self._handlers
        soon = self._soon
        rings = self._rings
        tick = rotate = time.monotonic()
        while not self._closed:
            for watch in rings:
                watch.ring()
            rings.clear()
            due = min(self._timers[0][0], tick) if self._timers else tick
            self._awake = False
            ready = poll(0.0 if soon else max(0.0, due - time.monotonic()), MAX_READY)
            self._awake = True
            begun = time.monotonic()
            for fd, events in ready:  # once per event of a stream
                try:
                    if handler := handlers.get(fd):
                        handler(events)
                except Exception:
                    log(logging.ERROR, "a fault in the loop", exc_info=True)
                if time.monotonic() - begun > MAX_TURN:
                    break  # the others are still ready then
            for _ in range(len(soon)):  # what is added meanwhile comes after what is ready by then
                self._do(soon.popleft())
                if time.monotonic() - begun > 2 * MAX_TURN:
                    break
            while self._timers and self._timers[0][0] <= begun:
                self._do(heapq.heappop(self._timers)[2])
            if begun >= tick:
                tick = begun + TICK
                for one in list(self.ticking):
                    self._do(one.tick, begun)
            took = time.monotonic() - begun
            if took > self._longest[0]:
                self._longest = (took, self._longest[1])
            if begun - rotate > LONGEST_TIME:
                rotate = begun
                self._longest = (0.0, self._longest[0])
        self._awake = True  # so that nobody rings any more

    @staticmethod
    def _do(call: Callable[..., object], *given: Any) -> None:
        try:
            call(*given)
        except Exception:
            log(logging.ERROR, "a fault in the loop", exc_info=True)


CONNECT_TIMEOUT = 10.0  # seconds
# libcurl's codes for: no such proxy, no such host, no connection, no TLS, a certificate that is none, no way through SOCKS.
_NOT_CONNECTED = (5, 6, 7, 35, 60, 97)
LAST_SILENCE = 0.05  # seconds that an upstream may take to end an answer after its last event
IDLE_LIFE = 60.0  # seconds that an unused connection is kept
MAX_IDLE = 64  # connections kept for one account; owners whose connections are kept for all guests together
# What an upstream may send: bytes of a whole answer, decoded; bytes that come together; lines of a head.
MAX_ANSWER = 32 << 20
MAX_AT_ONCE = 16 << 20
MAX_ANSWER_LINES = 300
MAX_AHEAD = (
    16  # times that something of an answer may come before anybody takes it; then its connection rests
)


class Egress(NamedTuple):
    """How an account reaches the net: its browser target ("" for none), and proxy URL ("" for none)."""

    browser: str
    proxy: str


class Answer(NamedTuple):
    """A whole answer: status, header lines by lower-case name (those of `set-cookie` joined by line feeds), body."""

    status: int
    headers: dict[str, str]
    body: bytes

    def object(self) -> dict[str, Any] | None:
        """The body as a JSON object, None when it is none."""
        if too_many_values(self.body):
            return None
        try:
            value = json.loads(self.body)
        except (ValueError, RecursionError):
            return None
        return value if isinstance(value, dict) else None


def no_handle() -> Refusal:
    """The error for when this process has no room for another connection of its own."""
    refused = Refusal(
        "unreachable", "The server has no room for another connection to the upstream; try again."
    )
    refused.unsent = True
    return refused


def too_large() -> Refusal:
    """The error for an answer that is longer than any that was asked for can be."""
    return Refusal(
        "broken", f"The upstream's answer is larger than {MAX_ANSWER >> 20} MiB; it was abandoned."
    )


# -- libcurl, by way of curl_cffi's `lib`: its Curl class sets everything anew for each call, a fifth of a short call's time --


class _Sink:
    """Holds a Python callable or reader for libcurl, in the form that curl_cffi's C glue wants."""

    def __init__(self, callback: Any) -> None:
        self.callback, self.exception = callback, None


class _Received(list[bytes]):
    """The bytes that libcurl has brought since this was last emptied: the lines of a head, or the pieces of a body.
    Compressed data may grow a thousandfold while libcurl decodes it, before anybody else can count it."""

    tell: Callable[[], object] = int  # called when there is something in it
    size = 0  # in bytes

    def empty(self) -> bytes:
        """All of it, taken out."""
        data = self[0] if len(self) == 1 else b"".join(self)
        self.clear()
        self.size = 0
        return data


def _options(*names: str) -> tuple[int, ...]:
    """libcurl's options as plain numbers: arithmetic with curl_cffi's enumeration costs more than the call."""
    return tuple(int(CurlOpt[name]) for name in names)


_URL, _METHOD, _GET, _POST, _HTTPHEADER = _options("URL", "CUSTOMREQUEST", "HTTPGET", "POST", "HTTPHEADER")
_POSTFIELDS, _POSTSIZE, _READDATA = _options("POSTFIELDS", "POSTFIELDSIZE_LARGE", "READDATA")
_SEEKDATA, _VERSION, _VERBOSE, _FRESH = _options("SEEKDATA", "HTTP_VERSION", "VERBOSE", "FRESH_CONNECT")
_HEADERS_SENT = 2  # CURLINFO_HEADER_OUT
_NOT_WRITTEN = 23  # CURLE_WRITE_ERROR: a callback of ours did not take what came
_NOT_SENT = 55  # CURLE_SEND_ERROR
_NO_SOCKET = -1  # CURL_SOCKET_TIMEOUT
_REST, _GO_ON = 1, 0  # CURLPAUSE_RECV, CURLPAUSE_CONT
# What libcurl wants to know of a socket (CURL_POLL_…), and what it is told (CURL_CSELECT_…).
_WANTED = {1: select.EPOLLIN, 2: select.EPOLLOUT, 3: select.EPOLLIN | select.EPOLLOUT}
_READABLE, _WRITABLE, _FAILED = 1, 2, 4
_MASKS = {int(select.EPOLLIN): _READABLE, int(select.EPOLLOUT): _WRITABLE}  # the usual ones
_socket_action = lib.curl_multi_socket_action
_NEW_CONNECTIONS = int(CurlInfo.NUM_CONNECTS)
_STATUS_LINE = re.compile(r"HTTP/[0-9.]+ ([2-5][0-9][0-9])(?: |$)")
_NO_TEXT = re.compile(
    r"[\x00-\x08\x0b-\x1f\x7f]+"
)  # in a header: control characters but for tabs and line feeds


class Handle:
    """One libcurl easy handle, kept from call to call. Not for two threads at once: while a call is under way it is the
    loop's, before and after that its request's."""

    def __init__(self, egress: Egress) -> None:
        self.easy = lib.curl_easy_init()
        if not self.easy:
            raise no_handle()
        self.body = _Received()
        self._head = _Received()
        self._error = ffi.new("char[]", 256)
        self._kept: list[Any] = []  # what libcurl points to
        self._lines = self._pinned = ffi.NULL
        self._sent: Any = None  # the body, or libcurl's way to the reader of one that is not held in memory
        self.reader: BlobReader | None = None
        self._url = ""
        self._posts = False
        self._method = ""
        self._plain = False
        self.silence = 0.0  # seconds without a byte that end the call
        self._hears = self._fresh = False
        self.failed = False  # whether its last call did: such a handle is not used again
        if egress.browser:
            lib.curl_easy_impersonate(self.easy, egress.browser.encode(), 1)
        for name, value in {
            "ERRORBUFFER": self._error,
            "CAINFO": DEFAULT_CACERT.encode(),
            "PROXY_CAINFO": DEFAULT_CACERT.encode(),
            "PROXY": egress.proxy.encode(),
            "NOSIGNAL": 1,
            "PROTOCOLS_STR": b"http,https",
            "CONNECTTIMEOUT_MS": int(CONNECT_TIMEOUT * 1000),
            "MAXAGE_CONN": int(IDLE_LIFE),
            "ACCEPT_ENCODING": b"gzip, deflate, br, zstd",  # as browsers say it; libcurl decodes
            "TCP_NODELAY": 1,
            "TCP_KEEPALIVE": 1,
            "UPLOAD_BUFFERSIZE": 16384,  # the default of 64 KiB stays with every handle
            "WRITEFUNCTION": lib.buffer_callback,
            "WRITEDATA": self._pointed(self.body),
            "HEADERFUNCTION": lib.buffer_callback,
            "HEADERDATA": self._pointed(self._head),
            "READFUNCTION": lib.read_buffer_callback,
            "SEEKFUNCTION": lib.seek_buffer_callback,
        }.items():
            self._set(_options(name)[0], value)

    def _pointed(self, at: _Received) -> Any:
        self._kept.append(ffi.new_handle(at))
        return self._kept[-1]

    def _set(self, option: int, value: Any) -> None:
        """curl_easy_setopt; the glue wants numbers by pointer."""
        if isinstance(value, int):
            value = ffi.new("int64_t *" if option >= 30000 else "long *", value)
        if code := lib._curl_easy_setopt(self.easy, option, value):
            raise RuntimeError(f"libcurl refused option {option} ({code})")

    def close(self) -> None:
        """Frees the handle."""
        if self.easy:
            lib.curl_easy_cleanup(self.easy)
            lib.curl_slist_free_all(self._lines)
            lib.curl_slist_free_all(self._pinned)
        self.easy = None

    def as_it_comes(self) -> None:
        """Does not decode answers from now on: what grows without bound as it is decoded cannot be counted in time."""
        self._set(_options("ACCEPT_ENCODING")[0], ffi.NULL)

    def pin(self, address: str) -> None:
        """Connects to this address from now on, whatever host a URL names."""
        line = f"::[{address}]:" if ":" in address else f"::{address}:"
        self._pinned = lib.curl_slist_append(ffi.NULL, line.encode())
        self._set(_options("CONNECT_TO")[0], self._pinned)

    def lead(self, place: str) -> None:
        """Knows from now on what addresses a host has: `HOST:PORT:ADDRESS,ADDRESS`, those of IPv6 in brackets."""
        self._pinned = lib.curl_slist_append(ffi.NULL, place.encode())
        self._set(_options("RESOLVE")[0], self._pinned)

    def prepare(
        self, method: str, url: str, headers: list[bytes], body: bytes | Blob | None, silence: float
    ) -> None:
        """Sets what a call needs and the call before it did not have."""
        if url != self._url:
            self._url = url
            self._set(_URL, url.encode())
            if self._plain != (plain := url.startswith("http://")):
                # An impersonated handle would ask a plain server for HTTP/2 by `Upgrade: h2c`, which many mishandle.
                self._set(_VERSION, int(CurlHttpVersion.V1_1 if plain else CurlHttpVersion.V2TLS))
                self._plain = plain
        if isinstance(body, Blob) and body.size <= MAX_IN_MEMORY:
            body = body.read()
        if isinstance(body, Blob):
            self.reader = BlobReader(body)
            self._sent = ffi.new_handle(_Sink(self.reader))
            self._set(_POSTSIZE, body.size)
            self._set(_POSTFIELDS, ffi.NULL)
            self._set(_READDATA, self._sent)
            self._set(_SEEKDATA, self._sent)
        elif body is not None:
            self._sent = body
            self._set(_POSTSIZE, len(body))
            self._set(_POSTFIELDS, ffi.from_buffer(body))
        if self._posts != (body is not None):
            self._posts = body is not None
            self._set(_POST if self._posts else _GET, 1)
        usual = "POST" if self._posts else "GET"
        if method != (self._method or usual):
            self._method = "" if method == usual else method
            self._set(_METHOD, self._method.encode() if self._method else ffi.NULL)
        lines = ffi.NULL
        for line in headers:
            lines = lib.curl_slist_append(lines, line)
        self._set(_HTTPHEADER, lines)
        lib.curl_slist_free_all(self._lines)
        self._lines = lines
        self.silence = silence
        if self._fresh:
            self._fresh = False
            self._set(_FRESH, 0)
        self.body.empty()
        self._head.empty()

    def sent_once(self) -> None:
        """Has the next call made on a connection of its own: on a kept one that breaks libcurl sends it again, though the
        upstream may have got it."""
        self._fresh = True
        self._set(_FRESH, 1)

    def begins_anew(self) -> bool:
        """Whether the call that just failed in sending may be made again, which is readied then: nothing had come, on a
        kept connection. Where such a one breaks in reading libcurl does the same by itself."""
        connections = ffi.new("long *")
        lib.curl_easy_getinfo(self.easy, _NEW_CONNECTIONS, connections)
        if connections[0] or self._head:
            return False
        if self.reader:
            self.reader.seek(0)
        return True

    def learn_agent(self, found: Callable[[str], None]) -> None:
        """Lets the next call tell the user agent it sends, which only libcurl knows."""

        def hear(kind: int, data: bytes) -> None:
            if kind == _HEADERS_SENT and (match := re.search(rb"(?im)^user-agent: ([^\r\n]+)", data)):
                found(match[1].decode("latin-1"))

        self._hears = True
        self._set(_options("DEBUGFUNCTION")[0], lib.debug_function)
        self._hearing = ffi.new_handle(_Sink(hear))
        self._set(_options("DEBUGDATA")[0], self._hearing)
        self._set(_VERBOSE, 1)

    def rest(self, rests: bool) -> None:
        """Lets its connection rest, or go on; what has come meanwhile may come at once."""
        lib.curl_easy_pause(self.easy, _REST if rests else _GO_ON)

    def over(self) -> None:
        """Lets go of what the call alone needed."""
        self.body.tell = int
        self.body.empty()
        if self.reader:  # whose blob is not to live as long as the handle
            self._set(_READDATA, ffi.NULL)
            self._set(_SEEKDATA, ffi.NULL)
            self.reader = self._sent = None
        if self._hears:
            self._hears = False
            self._set(_VERBOSE, 0)

    def failure(self, code: int) -> Refusal | None:
        """The failure that libcurl's code for the end of a call means, None for 0."""
        if not code:
            return None
        text = ffi.string(self._error).decode("utf-8", "replace") or f"libcurl error {code}"
        tunnel = text.startswith("CONNECT tunnel failed")
        if code == _NOT_WRITTEN:
            return Refusal("broken", "The upstream sent too much at once; its answer was abandoned.")
        if self._head and not tunnel:
            return Refusal("broken", f"The upstream broke off its answer: {text}")
        advice = "check this server's network, or PROXY_URL"
        refused = Refusal("unreachable", f"The upstream could not be reached ({text}); {advice}.")
        refused.unsent = tunnel or code in _NOT_CONNECTED
        return refused

    def head(self) -> tuple[int, dict[str, str]]:
        """Status and headers of the newest answer (of several, after a proxy's or a 1xx, the last)."""
        starts = [i for i, line in enumerate(self._head) if line.startswith(b"HTTP/")]
        newest = b"".join(self._head[starts[-1] :] if starts else []).partition(b"\r\n\r\n")[0]
        first, *lines = _NO_TEXT.sub("", newest.decode("latin-1")).split("\n")
        headers: dict[str, str] = {}
        status = _STATUS_LINE.match(first)
        if status is None or len(lines) > MAX_ANSWER_LINES:
            self.failed = True
            raise Refusal("broken", "The upstream's answer has no valid status line, or too many headers.")
        for line in lines:
            name, _, value = line.partition(":")
            name = name.lower()
            value = value.strip()
            between = "\n" if name == "set-cookie" else ", "
            headers[name] = f"{headers[name]}{between}{value}" if name in headers else value
        return int(status[1]), headers


# What libcurl calls, in the place of curl_cffi's own functions, which are for its own classes.
@ffi.def_extern(name="buffer_callback")
def _on_bytes(data: Any, size: int, number: int, received: Any) -> int:
    """Something has come; once per event of a stream. Another number than that of the bytes ends the call."""
    pieces: _Received = ffi.from_handle(received)
    if not pieces:
        pieces.tell()
    pieces.size += number
    if pieces.size > MAX_AT_ONCE:
        return 0
    pieces.append(ffi.buffer(data, number)[:])
    return number


@ffi.def_extern(name="socket_function")
def _on_socket(easy: Any, fd: int, what: int, multi: Any, kept: Any) -> int:
    """libcurl wants to know when a socket is ready."""
    ffi.from_handle(multi).wants(fd, what)
    return 0


@ffi.def_extern(name="timer_function")
def _on_timer(multi_handle: Any, milliseconds: int, multi: Any) -> int:
    """libcurl wants a turn after some time, or none."""
    ffi.from_handle(multi).wants_turn(milliseconds)
    return 0


class Multi:
    """The connections of one owner over one egress: a libcurl multi handle that the loop drives.

    libcurl gives a kept connection to any call of the same multi handle. So every owner has one of its own, and no two
    of them ever share a connection. But for `close`, everything is for the loop's thread.
    """

    def __init__(self, loop: Loop) -> None:
        self._loop = loop
        self._multi = lib.curl_multi_init()
        if not self._multi:
            raise no_handle()
        self._running = ffi.new("int *")
        self._left = ffi.new("int *")
        self._me = ffi.new_handle(self)
        self._calls: dict[Any, Call] = {}
        self._fresh: list[Call] = []  # those that something has come for
        self._due = 0.0  # when libcurl wants a turn (time.monotonic()), 0 for never
        self.idle: list[Handle] = []  # no call's just now
        self.users = 0  # how many calls there are
        self.used = time.monotonic()  # when there last was one
        for option, value in {
            CurlMOpt.SOCKETFUNCTION: lib.socket_function,
            CurlMOpt.SOCKETDATA: self._me,
            CurlMOpt.TIMERFUNCTION: lib.timer_function,
            CurlMOpt.TIMERDATA: self._me,
            CurlMOpt.PIPELINING: ffi.new("long *", 0),  # a connection a call: one that rests stops no other
            CurlMOpt.MAXCONNECTS: ffi.new("long *", MAX_IDLE),
        }.items():
            lib.curl_multi_setopt(self._multi, option, value)

    def add(self, call: Call) -> None:
        """Begins a call."""
        self._calls[call.handle.easy] = call
        call.handle.body.tell = functools.partial(self._fresh.append, call)
        if lib.curl_multi_add_handle(self._multi, call.handle.easy):  # else it asks for a turn
            self.remove(call)
            call.end(no_handle())

    def remove(self, call: Call) -> None:
        """Ends a call where it is; its connection goes too if the answer was not over."""
        if self._calls.pop(call.handle.easy, None):
            lib.curl_multi_remove_handle(self._multi, call.handle.easy)
            call.handle.over()

    def go_on(self, call: Call) -> None:
        """Reads on for a call whose connection rests."""
        call.handle.rest(False)
        self._see_to()

    def close(self) -> None:
        """Closes the connections and frees the handles; when there is no call any more."""
        self._due = 0.0
        for handle in self.idle:
            handle.close()
        self.idle.clear()
        lib.curl_multi_cleanup(self._multi)

    def wants(self, fd: int, what: int) -> None:
        """libcurl waits for a socket, or no longer waits when `what` is no key of _WANTED."""
        if events := _WANTED.get(what):
            self._loop.watch(fd, events, functools.partial(self._ready, fd))
        else:
            self._loop.unwatch(fd)

    def wants_turn(self, milliseconds: int) -> None:
        """libcurl wants a turn after some milliseconds whatever its sockets do; none when they are negative."""
        if milliseconds < 0:
            self._due = 0.0
            return
        self._due = due = time.monotonic() + milliseconds / 1000
        turn = functools.partial(self._turn, due)
        if milliseconds:
            self._loop.at(due, turn)
        else:
            self._loop.soon(turn)  # not now: libcurl does not take a call from within its own

    def _turn(self, due: float) -> None:
        if due == self._due:  # else it was called off
            self._due = 0.0
            self._act(_NO_SOCKET, 0)

    def _ready(self, fd: int, events: int) -> None:
        """A socket is ready; once per event of a stream."""
        self._act(fd, _MASKS.get(events) or _READABLE | _WRITABLE | _FAILED)

    def _act(self, fd: int, mask: int) -> None:
        _socket_action(self._multi, fd, mask, self._running)
        if self._fresh or self._running[0] < len(self._calls):
            self._see_to()

    def _see_to(self) -> None:
        """Hands on what has come, and ends the calls that are over."""
        while self._fresh:
            self._fresh.pop().bring()
        while self._running[0] < len(self._calls):
            message = lib.curl_multi_info_read(self._multi, self._left)
            if message == ffi.NULL:
                return
            call = self._calls[message.easy_handle]
            code = message.data.result
            if code == _NOT_SENT and call.handle.begins_anew():
                lib.curl_multi_remove_handle(self._multi, call.handle.easy)
                lib.curl_multi_add_handle(self._multi, call.handle.easy)
                continue
            self.remove(call)
            call.end(call.handle.failure(code))


class Outlet(Protocol):
    """Where bytes are written to. It is `full` when so much waits to be sent that no more should come: then no more of
    a call is read until it calls `on_room`."""

    full: bool
    on_room: Callable[[], object]

    def write(self, data: bytes, events: int) -> None:
        """Sends bytes, which are so many events, now or once there is room; never waits."""

    def drain(self) -> None:
        """Waits until it is not full: for the request's thread."""


class Call(Ticking):
    """A call under way. The loop brings its bytes; the request's thread decides what becomes of them.

    At any moment one of the two has it: the thread, for which what comes is put aside up to MAX_AHEAD, or (inside of
    `carry`) the loop. To be used in a `with` block, at whose end the call is ended where it is.
    """

    def __init__(self, loop: Loop, multi: Multi, handle: Handle, watch: Watch, release: Callable[[], object]):
        self.handle = handle
        self.status = 0
        self.headers = dict[str, str]()
        self.reached: Callable[[bool], None] | None = None  # told whether there was a connection
        self._loop = loop
        self._multi = multi
        self._watch = watch
        self._release = release
        self._begun = False
        self._held = True  # whether the thread has it
        self._take: Callable[[bytes], Any] | None = None
        self._given: Any = None  # what `_take` had the loop stop with
        self._outlet: Outlet | None = None
        self._ahead: deque[bytes] = deque()  # what nobody has taken yet
        self._rests = self._over = False
        self._failure: Exception | None = None
        self._heard = 0.0  # when the last byte came

    def __enter__(self) -> Call:
        return self

    def __exit__(self, *_: object) -> None:
        if not self._begun:
            self._release()
        elif self._held:
            self._loop.soon(self._leave)
        else:
            self._loop.run(self._leave)

    # -- for the request's thread ------------------------------------------------------------------------------

    def begin(self) -> None:
        """Sends the request, unless that was done."""
        if not self._begun:
            self._begun = True
            self._loop.soon(self._add)

    def start(self) -> None:
        """Waits for the first byte of the body (or its end): status and headers are known then."""
        self.begin()
        self._watch.wait(lambda: self._ahead or self._over)
        if not self._ahead:
            self._raise_failure()
        self._told()

    def read(self) -> bytes:
        """The next bytes, b"" at the end."""
        if self._rests and not self._ahead:
            self._loop.soon(self._on_room)
        self._watch.wait(lambda: self._ahead or self._over)
        if not self._ahead:
            self._raise_failure()
        parts = []
        while self._ahead:  # to which the loop may be adding
            parts.append(self._ahead.popleft())
        if self._rests:
            self._loop.soon(self._on_room)
        return b"".join(parts)

    def pieces(self) -> Iterator[bytes]:
        """The bytes as they come."""
        while data := self.read():
            yield data

    def carry(self, take: Callable[[bytes], Any], outlet: Outlet | None = None) -> Any:
        """Has the loop give the bytes to `take` as they come: what that returns if it is not None, None at the end. What is
        not for the loop to do is returned like this and done here, before it is carried on."""
        self.begin()
        self._held, self._given = False, None

        def begin() -> None:
            self._take, self._outlet = take, outlet
            if self._ahead:
                data = b"".join(self._ahead)
                self._ahead.clear()
                self._hand_out(data)
            if self._held:
                return
            if self._over:
                self._hand_back()
            elif not (outlet and outlet.full):
                self._on_room()
            elif outlet:
                outlet.on_room = self._on_room

        self._loop.soon(begin)
        self._watch.wait(lambda: self._held)
        if self._given is None:
            self._raise_failure()
        return self._given

    def whole(self) -> Answer:
        """The whole answer."""
        parts = list[bytes]()
        size = 0

        def gather(data: bytes) -> None:
            nonlocal size
            parts.append(data)
            size += len(data)
            if size > MAX_ANSWER:
                raise too_large()

        self.carry(gather)
        if not self.status:
            self._told()
        return Answer(self.status, self.headers, b"".join(parts))

    def _told(self) -> None:
        """Status and headers are known."""
        if self.reached:
            self.reached(True)
        self.status, self.headers = self.handle.head()

    def _raise_failure(self) -> None:
        """Raises what the call failed with."""
        if self._failure is None:
            return
        self.handle.failed = True
        if self.reached and not self.status and isinstance(self._failure, Refusal):
            self.reached(self._failure.reason != "unreachable")
        raise self._failure

    # -- for the loop ------------------------------------------------------------------------------------------

    def _add(self) -> None:
        self._heard = time.monotonic()
        self._loop.ticking[self] = None
        self._multi.add(self)

    def bring(self) -> None:
        """Something has come; once per event of a stream."""
        data = self.handle.body.empty()
        self._heard = time.monotonic()
        if self._take is not None:
            self._hand_out(data)
            return
        self._ahead.append(data)
        if len(self._ahead) > MAX_AHEAD:
            self._rest()
        if self._held:
            self._loop.ring(self._watch)

    def _hand_out(self, data: bytes) -> None:
        """Gives what has come to who takes it; once per event of a stream."""
        try:
            self._given = self._take(data)  # type: ignore[misc] # there is one
        except Exception as failure:  # the thread's to handle
            self._failure = failure
            self._hand_back()
            return
        if self._given is not None:
            self._hand_back()
        elif self._outlet is not None and self._outlet.full:
            self._outlet.on_room = self._on_room
            self._rest()

    def _hand_back(self) -> None:
        self._take = self._outlet = None
        self._held = True
        self._loop.ring(self._watch)

    def _rest(self) -> None:
        if not self._over and not self._rests:
            self._rests = True
            self.handle.rest(True)

    def _on_room(self) -> None:
        if self._rests and not self._over:
            self._rests = False
            self._heard = time.monotonic()
            self._multi.go_on(self)

    def end(self, failure: Exception | None) -> None:
        """The answer is over, or cannot go on."""
        if self._over:
            return
        self._over = True
        self._failure = self._failure or failure
        self._loop.ticking.pop(self, None)
        if self._take is not None:
            self._hand_back()
        elif self._held:
            self._loop.ring(self._watch)

    def tick(self, now: float) -> None:
        """Ends the call after too long a silence; an upload that goes on is none, nor is a connection that rests."""
        if self.handle.reader:
            self._heard = max(self._heard, self.handle.reader.used)
        if now - self._heard > self.handle.silence and not self._rests:
            text = f"The upstream was silent for {self.handle.silence:g} seconds; try again."
            self._multi.remove(self)
            self.end(Refusal("silent", text))

    def _leave(self) -> None:
        """Nobody wants more of it: it is ended, unless its end is just coming, so that its connection can be kept."""
        self._held = False
        self._take = lambda data: None
        if self._over:
            self._gone()
        else:
            self._ahead.clear()
            self._watch = Watch()
            if self._rests:
                self._gone()
            else:
                self._loop.at(time.monotonic() + LAST_SILENCE, self._gone)

    def _gone(self) -> None:
        self._loop.ticking.pop(self, None)
        self._multi.remove(self)
        self._over = True  # whoever would have it go on comes too late
        release, self._release = self._release, int
        release()


class Handles:
    """Kept connections and handles by owner and egress: two owners never share a connection. Those of up to `most` owners
    are kept where they are `together`: then those used longest ago go."""

    def __init__(self, loop: Loop, together: bool = False, most: int = MAX_IDLE) -> None:
        self._loop, self._together, self._most = loop, together, most
        self._closed = False
        self._multis_lock = threading.Lock()
        self._multis: OrderedDict[tuple[str, Egress, str], Multi] = OrderedDict()

    def call(
        self, owner: str, egress: Egress, method: str, url: str, headers: list[bytes], body: bytes | Blob | None,
        watch: Watch, silence: float, kept: bool = True, place: str = "",
    ) -> Call:  # fmt: skip
        """A call on a connection of the owner's.

        `headers` are whole lines; `silence` is how many seconds without a byte end the call; `kept` is whether the
        connection is; `place` is what `Handle.lead` takes, "" for nothing.
        """
        key = (owner, egress, place)
        with self._multis_lock:
            multi = self._multis.get(key)
            if multi is None:
                multi = self._multis[key] = Multi(self._loop)
            self._multis.move_to_end(key)
            multi.users += 1
            handle = multi.idle.pop() if multi.idle else None
        try:
            if handle is None:
                handle = Handle(egress)
                if place:
                    handle.lead(place)
            handle.prepare(method, url, headers, body, silence)
        except BaseException:
            if handle:
                handle.failed = True
            self._give_back(key, multi, handle, kept)
            raise
        return Call(
            self._loop, multi, handle, watch, functools.partial(self._give_back, key, multi, handle, kept)
        )

    def _give_back(
        self, key: tuple[str, Egress, str], multi: Multi, handle: Handle | None, kept: bool
    ) -> None:
        """A call is over: its handle is kept for the next one, unless it failed."""
        surplus: list[Multi] = []
        with self._multis_lock:
            multi.users -= 1
            multi.used = time.monotonic()
            if handle and kept and not handle.failed and len(multi.idle) < MAX_IDLE:
                multi.idle.append(handle)
                handle = None
            if not kept or self._closed:
                self._take_out(key, surplus)
            elif self._together and len(self._multis) > self._most:
                unused = (key for key, one in self._multis.items() if not one.users)
                self._take_out(next(unused, key), surplus)
        if handle:
            handle.close()
        for one in surplus:
            self._loop.soon(one.close)

    def _take_out(self, key: tuple[str, Egress, str], surplus: list[Multi]) -> None:
        """Takes out connections that nobody uses; the lock is held."""
        multi = self._multis.get(key)
        if multi and not multi.users:
            del self._multis[key]
            surplus.append(multi)

    def sweep(self, now: float) -> None:
        """Closes what has been unused for long; `now` is a time.monotonic()."""
        surplus: list[Multi] = []
        with self._multis_lock:
            for key, multi in list(self._multis.items()):
                if now - multi.used > IDLE_LIFE:
                    self._take_out(key, surplus)
        for multi in surplus:
            self._loop.soon(multi.close)

    def owners(self) -> list[str]:
        """The owners that have connections here, the one used longest ago first."""
        with self._multis_lock:
            return [key[0] for key in self._multis]

    def close(self) -> None:
        """Closes all connections, those of calls that are under way once they are over."""
        self._closed = True
        self._loop.run(int)  # what was said to be over before this is
        self.sweep(math.inf)


FETCH_TIME = 30.0  # seconds for what a client's URL leads to, redirects included
MAX_REDIRECTS = 5
# What is not anybody's although its neighbours are: Azure's metadata service (others' are link-local or private), IETF
# assignments (Oracle's metadata service among them), 6to4 relays, documentation.
_INTERNAL = [
    ipaddress.ip_network(one)
    for one in ("168.63.129.16", "192.0.0.0/24", "192.88.99.0/24", "3fff::/20", "2001:db8::/32")
]
_GLOBAL_IPV6 = ipaddress.ip_network("2000::/3")


def is_public(address: str) -> bool:
    """Whether an IP address is anybody's on the internet: not private, loopback, link-local, multicast, reserved, a
    cloud's metadata service, or a zone's; IPv4 inside IPv6 counts as itself."""
    one = ipaddress.ip_address(address)
    if isinstance(one, ipaddress.IPv6Address):
        if "%" in address:
            return False
        if one.ipv4_mapped:
            return is_public(str(one.ipv4_mapped))
        inside = [one.sixtofour, one.teredo and one.teredo[1]]
        if int(one) >> 32 & 0xFFFF == 0x5EFE:  # ISATAP
            inside.append(ipaddress.IPv4Address(int(one) & 0xFFFFFFFF))
        if one not in _GLOBAL_IPV6 or not all(is_public(str(inner)) for inner in inside if inner):
            return False
    return one.is_global and not one.is_multicast and not any(one in network for network in _INTERNAL)


class Fetcher:
    """Fetches what clients name by URL: through EXPORT_PROXY_URL, up to MAX_BODY_MB, never from a private address.

    Names are resolved here and the connection made to the address that was checked, anew for every redirect, so that
    neither a second DNS answer nor a redirect leads elsewhere. Behind a proxy too: it is told the address.
    """

    def __init__(self, settings: Settings, loop: Loop) -> None:
        self.settings, self._loop = settings, loop
        self._resolving = ThreadPoolExecutor(32, thread_name_prefix="resolver")

    def fetched(self, url: str, where: str, watch: Watch) -> tuple[Blob, str, str]:
        """The bytes, their MIME type ("" when unknown) and the URL's file name; a 400 for `where` names the host."""
        end = time.monotonic() + FETCH_TIME
        host = ""
        try:
            for _ in range(MAX_REDIRECTS + 1):
                host, port, name = self.parted(url)
                blob, status, headers = self._get(url, host, port, end, watch)
                if status in (301, 302, 303, 307, 308) and headers.get("location"):
                    with contextlib.suppress(ValueError):  # else the next round says what is wrong
                        url = urllib.parse.urljoin(url, headers["location"])
                    continue
                if status != 200:
                    raise ValueError(f"it answers with status {status}")
                return blob, headers.get("content-type", "").partition(";")[0].strip().lower(), name
            raise ValueError("it redirects too often")
        except Refusal as refused:  # whose words may tell of the proxy
            reasons = {"silent": "it did not answer in time", "unreachable": "it cannot be reached"}
            reason = reasons.get(refused.reason, "it broke off")
            raise invalid(where, f"Fetching from {host} failed: {reason}.") from None
        except ValueError as error:
            raise invalid(where, f"Fetching from {host or 'a URL'} failed: {error}.") from None

    @staticmethod
    def parted(url: str) -> tuple[str, int, str]:
        """Host, port and file name of a URL; ValueError when it is not to be fetched."""
        try:
            parts = urllib.parse.urlsplit(url)
            host, port = parts.hostname, parts.port
        except ValueError:
            raise ValueError("it is not a URL") from None
        if parts.scheme not in ("http", "https") or not host or not re.fullmatch(r"[\x21-\x7e]+", url):
            raise ValueError("only http:// and https:// URLs in ASCII are fetched")
        port = port or (443 if parts.scheme == "https" else 80)
        return host, port, urllib.parse.unquote(parts.path.rpartition("/")[2])

    def _addresses(self, host: str, port: int, watch: Watch) -> list[str]:
        """What a client's host resolves to; ValueError when any of it is private and that is not allowed."""
        if self.settings.allow_private_urls and self.settings.export_proxy_url:
            return [""]  # the proxy may know names that this machine does not
        addresses = self.resolved(host, port, watch)
        if not self.settings.allow_private_urls and not all(map(is_public, filter(None, addresses))):
            raise ValueError("it is a private address, which ALLOW_PRIVATE_URLS=true would allow")
        return addresses

    def resolved(self, host: str, port: int, watch: Watch) -> list[str]:
        """Up to three addresses of a host, private ones first and then IPv4; "" for one that is a public address itself.
        ValueError for none."""
        with contextlib.suppress(ValueError):
            if is_public(str(ipaddress.ip_address(host))):
                return [""]
        asked = self._resolving.submit(socket.getaddrinfo, host, port, type=socket.SOCK_STREAM)
        try:
            found = watch.result(asked, 10.0)
        except TimeoutError:
            asked.cancel()
            raise ValueError("its name takes too long to be resolved") from None
        except (OSError, UnicodeError):
            raise ValueError("its name cannot be resolved") from None
        addresses = [str(row[4][0]) for row in sorted(found, key=lambda row: row[0] != socket.AF_INET)]
        # All of them are told where one is private: the connection could be made to any.
        private = [one for one in addresses if not is_public(one)]
        return list(dict.fromkeys([*private, *addresses]))[:3]

    def _get(
        self, url: str, host: str, port: int, end: float, watch: Watch
    ) -> tuple[Blob, int, dict[str, str]]:
        """One request: body, status and headers; from the first of the host's addresses that can be reached."""
        addresses = self._addresses(host, port, watch)
        for address in addresses:
            multi = Multi(self._loop)
            try:
                handle = Handle(
                    Egress(self.settings.impersonate, next(iter(self.settings.export_proxy_url), ""))
                )
                multi.idle.append(handle)  # which goes with it
                handle.as_it_comes()
                if address:
                    handle.pin(address)
                headers = [b"Expect:", b"Accept-Encoding: identity"]
                left = max(0.1, end - time.monotonic())
                handle.prepare("GET", url, headers, None, left)
            except BaseException:
                self._loop.soon(multi.close)
                raise
            try:
                with Call(
                    self._loop, multi, handle, watch, functools.partial(self._loop.soon, multi.close)
                ) as call:
                    return self._taken(call, end)
            except Refusal as refused:
                if refused.reason != "unreachable" or address == addresses[-1]:
                    raise
        raise ValueError("its name cannot be resolved")

    def _taken(self, call: Call, end: float) -> tuple[Blob, int, dict[str, str]]:
        call.start()
        body = Blob()
        most = self.settings.max_body_mb << 20
        if call.headers.get("content-encoding", "identity") != "identity":
            raise ValueError("it answers compressed, although it was asked not to")
        for data in call.pieces():
            body.write(data)
            if body.size > most:
                raise ValueError(f"it is larger than MAX_BODY_MB allows ({most >> 20} MiB)")
            if time.monotonic() > end:
                raise ValueError(f"it takes longer than {FETCH_TIME:g} seconds")
        return body, call.status, call.headers


# ============================================================================================================
# websocket: RFC 6455, the server's side, text messages without extensions
# ============================================================================================================

_CONTINUATION = 0
_TEXT_FRAME = 1
_BINARY = 2
_CLOSE = 8
_PING = 9
_PONG = 10
_CODES = {*range(1000, 1015), *range(3000, 5000)} - {1004, 1005, 1006}  # what a Close may carry
_NOT_READY = (BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError)


class Closed(Exception):
    """The connection is over: its Close frame's code (1005: it had none; 1006: there was no frame) and a reason."""

    def __init__(self, code: int, reason: str) -> None:
        super().__init__(code, reason)
        self.code, self.reason = code, reason


def accept_key(key: str) -> str:
    """The Sec-WebSocket-Accept that answers a Sec-WebSocket-Key."""
    text = key + "258EAFA5-E914-47DA-95CA-C5AB0DC85B11"
    return base64.b64encode(hashlib.sha1(text.encode(), usedforsecurity=False).digest()).decode()


class WebSocket:
    """A connection after its handshake; its owner closes the socket once it is over.

    The loop reads it. A message goes to who listens, in the loop, or waits for `receive`, with no more read until then.
    Whoever sends does not wait: what the client does not take at once is sent by the loop. `ahead` was read after the
    request, `most` is a message's size in bytes. Seconds: after `idle` without a byte the client is sent a ping, after
    `patience` more it is gone (it has as long to answer a Close), and so it is when a frame is not out within
    `send_timeout`.
    """

    MAX_UNSENT, MAX_FRAMES = 100, 200  # frames that wait to be sent; that are taken in a turn of the loop

    def __init__(
        self, sock: socket.socket, loop: Loop, ahead: bytes = b"", *, most: int = 1_000_000,
        idle: float = 15, patience: float = 10, send_timeout: float = 30,
    ) -> None:  # fmt: skip
        sock.setblocking(False)
        self._sock = sock
        self._fd = sock.fileno()
        self._loop = loop
        self._most = most
        self._idle, self._patience, self._send_timeout = idle, patience, send_timeout
        self._due = time.monotonic() + idle  # when to ping or, after that, to give up
        self._pinged = False
        self._lock = threading.Lock()  # for the socket, which TLS needs, and for what is below
        self._unsent: deque[tuple[memoryview, float]] = deque()  # frames, and until when each must be out
        self._last: Closed | None = None  # the Close that we sent: no frame may follow it
        self._answer_due = math.inf  # when the client's answer to it must be here
        self._over: Closed | None = None  # how it ended
        self._clean = False  # with the client's Close
        # For the loop alone.
        self._ahead = bytearray(ahead)
        self._message = bytearray()
        self._begun = False  # whether a message is under way; kept as bytes: empty fragments know no limit
        self._decoder = codecs.getincrementaldecoder("utf-8")()
        self._texts: deque[str] = deque()  # messages that nobody has received
        self._busy = False  # whether somebody has one, and has not come for the next
        self._more = False  # whether there are more frames than were taken in a turn
        self._next_look = math.inf
        self._watch = Watch()
        self._heard: Callable[[str], None] | None = None
        self._ended: list[Callable[[], object]] = []
        self.needed = 0  # how many wait for what it will say: a server that ends leaves it its time
        loop.soon(self._enter)

    def receive(self, deadline: float = math.inf) -> str | None:
        """The next whole text message; None, then and ever after, once the client has said or answered Close.

        Closed for a fault of the client, which is told its code; with 1008, told too, for no whole message by `deadline`
        (a time.monotonic()); with 1006 for an end without Close. Messages that follow our `close` are passed over.
        """
        if self._busy:
            self._busy = False
            self._loop.soon(self._go_on)
        try:
            self._watch.wait(lambda: self._texts or self._over, deadline - time.monotonic())
        except TimeoutError:
            late = Closed(1008, "no message came in time")
            self.close(late.code, late.reason)
            self._finish(late)
        with self._lock:
            if self._texts:
                self._busy = True
                return self._texts.popleft()
        if self._clean:
            return None
        raise self._end()

    def listen(self, heard: Callable[[str], None]) -> None:
        """Has every further message given to `heard`, in the loop."""

        def begin() -> None:
            self._heard, self._busy = heard, False
            self._go_on()

        self._loop.soon(begin)

    def at_end(self, call: Callable[[], object]) -> bool:
        """Has something called, in the loop, once the connection is over; False if it is over already."""
        with self._lock:
            if self._over is None:
                self._ended.append(call)
            return self._over is None

    def send(self, text: str) -> None:
        """Sends a text message, a lone surrogate as "?". Closed if the connection is over, or is lost by this."""
        self._put(_TEXT_FRAME, text.encode("utf-8", "replace"))

    def ping(self, payload: bytes = b"") -> None:
        """Sends a ping, cut to 125 bytes; its pong only counts as a sign of life. Closed as in `send`."""
        self._put(_PING, payload[:125])

    def close(self, code: int = 1000, reason: str = "") -> None:
        """Sends Close unless one was sent, with what fits of the reason; ValueError for a code that no Close may carry. The
        client then has `patience` for its answer."""
        if code not in _CODES:
            raise ValueError(f"close code {code} is not allowed")
        words = reason.encode("utf-8", "replace")[:123].decode("utf-8", "ignore")  # no half of a character
        with contextlib.suppress(Closed):
            self._put(_CLOSE, code.to_bytes(2, "big") + words.encode(), Closed(code, reason))

    def drop(self, reason: str) -> Closed:
        """Ends the connection at once, without Close: who waits for it wakes up and gets what is returned here."""
        with self._lock:
            self._dropped(reason)
        return self._end()

    def leave(self, reason: str) -> None:
        """Sends and reads no more: the socket is its owner's again."""
        self._finish(Closed(1006, reason))

    def _end(self) -> Closed:
        """A new exception each time: raised by several threads, one would mix their tracebacks."""
        told = self._over or self._last or Closed(1006, "")
        return Closed(told.code, told.reason)

    def _finish(self, how: Closed) -> None:
        """It is over."""
        with self._lock:
            self._finished(how)

    def _finished(self, how: Closed) -> None:
        """The same; the lock is held."""
        if self._over is None:
            self._over = how
            self._loop.soon(self._leave)

    def _dropped(self, reason: str) -> None:
        """It is over, and the socket is of no use any more; the lock is held."""
        self._finished(Closed(1006, reason))
        with contextlib.suppress(OSError):
            socket.socket.shutdown(self._sock, socket.SHUT_RDWR)  # an SSLSocket's own goes on in plain text

    def _put(self, opcode: int, payload: bytes, last: Closed | None = None) -> None:
        """Sends a frame, whole or as the last thing ever; `last`: it is our Close. Closed as in `send`."""
        size = len(payload)
        now = time.monotonic()
        mark, width = (size, 0) if size < 126 else (126, 2) if size < 65536 else (127, 8)
        extended = size.to_bytes(width, "big") if width else b""
        frame = memoryview(bytes((0x80 | opcode, mark)) + extended + payload)
        with self._lock:
            if self._over or self._last:
                raise self._end()
            if last:
                self._last = last
                self._answer_due = now + self._patience
                self._texts.clear()
                self._busy = False
                self._loop.soon(self._go_on)
            self._unsent.append((frame, now + self._send_timeout))
            if len(self._unsent) == 1:
                self._flush()
                if self._unsent and not self._over:
                    self._loop.soon(self._await)
            if self._over:
                raise self._end()

    def _flush(self) -> None:
        """Sends what the client takes now; the lock is held."""
        while self._unsent:
            frame, deadline = self._unsent[0]
            try:
                sent = self._sock.send(frame)
            except _NOT_READY:
                return
            except OSError as error:
                self._dropped(f"the client is gone: {error}")
                return
            if sent < len(frame):
                self._unsent[0] = (frame[sent:], deadline)
            else:
                self._unsent.popleft()

    # -- in the loop ---------------------------------------------------------------------------------------------

    def _enter(self) -> None:
        self._take_frames()
        self._await()

    def _await(self) -> None:
        """Watches the socket for what is wanted of it, and the time."""
        with self._lock:
            if self._over is None:
                reads = 0 if self._rests() else select.EPOLLIN
                sends = select.EPOLLOUT if self._unsent else 0
                self._loop.watch(self._fd, reads | sends, self._ready)
                late = self._unsent[0][1] if self._unsent else math.inf
                if (look := min(self._due, self._answer_due, late)) < self._next_look:
                    self._next_look = look
                    self._loop.at(look, functools.partial(self._look, look))

    def _rests(self) -> bool:
        """Whether no more is read just now: somebody has a message, or one waits, or frames do, or too much for the client
        to read it."""
        return self._busy or self._more or bool(self._texts) or len(self._unsent) >= self.MAX_UNSENT

    def _leave(self) -> None:
        self._loop.unwatch(self._fd, self._ready)
        self._watch.ring()
        for call in self._ended:
            call()

    def _go_on(self) -> None:
        """Somebody has received a message, or listens."""
        while self._heard and self._texts:
            self._heard(self._texts.popleft())
        self._more = False
        self._take_frames()
        self._await()

    def _look(self, planned: float) -> None:
        """Sees whether the client has been silent or slow for too long."""
        if planned != self._next_look:
            return  # an earlier look has taken this one's place
        self._next_look = math.inf
        now = time.monotonic()
        with self._lock:
            silent = now >= self._due and not self._over
            if now >= self._answer_due:
                self._dropped("Close was not answered")
            elif self._unsent and now >= self._unsent[0][1]:
                self._dropped("the client reads too slowly")
            elif silent and self._rests():
                self._due = now + self._idle  # nobody has looked what it says
                silent = False
            elif silent and self._pinged:
                self._dropped("the client fell silent")
            elif silent:
                self._pinged = True
                self._due = now + self._patience
        if silent:
            with contextlib.suppress(Closed):
                self.ping()
        self._await()

    def _ready(self, events: int) -> None:
        """The socket has something to read, or room."""
        self._ahead += self._read(events)
        self._take_frames()
        self._await()

    def _read(self, events: int) -> bytes:
        """Reads what has come, at most a TLS record, so that none of it is hidden from the socket."""
        with self._lock:
            self._flush()
            if self._over:
                return b""
            if self._rests():
                if events & (select.EPOLLHUP | select.EPOLLERR):
                    self._dropped("the client is gone")
                return b""
            try:
                data = self._sock.recv(65536)
            except _NOT_READY:
                return b""
            except OSError as error:
                self._dropped(f"the client is gone: {error}")
                return b""
            if not data:
                self._dropped("the client hung up")
            self._pinged = False
            self._due = time.monotonic() + self._idle
            return data

    def _take_frames(self) -> None:
        """Takes the frames that are whole, until a message waits for somebody."""
        try:
            for _ in range(self.MAX_FRAMES):
                if self._over or self._rests() or not (frame := self._frame()):
                    return
                self._take(*frame)
            self._more = True  # others have their turn first
            self._loop.at(time.monotonic(), self._go_on)
        except (Closed, UnicodeDecodeError) as error:
            fault = error if isinstance(error, Closed) else Closed(1007, "a text is not UTF-8")
            if fault.code != 1006:
                self.close(fault.code, fault.reason)
            self._finish(fault)

    def _take(self, opcode: int, final: bool, data: bytes) -> None:
        if opcode == _PING:
            with contextlib.suppress(Closed):  # after our Close; any other end shows at the next read
                self._put(_PONG, data)
        elif opcode == _CLOSE:
            code = int.from_bytes(data[:2], "big") if data else 1005
            if data and code not in _CODES:  # as no single byte is
                raise Closed(1002, "a Close frame has an invalid code")
            told = Closed(code, data[2:].decode())
            with contextlib.suppress(Closed):
                self._put(_CLOSE, data[:2], told)
            self._clean = True
            self._finish(told)
        elif opcode != _PONG:
            self._decoder.decode(data, final)  # a fault is told before the message's end
            self._message += data
            self._begun = not final
            if final:
                text = self._message.decode()
                self._message.clear()
                if self._last is None and self._heard:
                    self._heard(text)
                elif self._last is None:
                    self._texts.append(text)
                    self._watch.ring()

    def _frame(self) -> tuple[int, bool, bytes] | None:
        """The next frame: opcode, whether it ends its message, payload; None while it is not whole. What is wrong with a
        header is told before the payload is read."""
        ahead = self._ahead
        if len(ahead) < 2:
            return None
        first, second = ahead[:2]
        opcode = first & 15
        final = first >= 0x80
        size = second & 0x7F
        start = 6
        known = opcode in (_CONTINUATION, _TEXT_FRAME, _BINARY, _CLOSE, _PING, _PONG)
        if first & 0x70 or not known or second < 0x80:
            raise Closed(1002, "a frame has a reserved bit or opcode, or no mask")
        if (size > 125 or not final) if opcode >= _CLOSE else self._begun != (opcode == _CONTINUATION):
            raise Closed(1002, "a control frame is fragmented or too long, or fragments are out of order")
        if opcode == _BINARY:
            raise Closed(1003, "only text messages are read here")
        if size > 125:
            start, least = (8, 126) if size == 126 else (14, 65536)
            if len(ahead) < start - 4:
                return None
            size = int.from_bytes(ahead[2 : start - 4], "big")
            if size < least or size >> 63:
                raise Closed(1002, "a length is negative, or not in its shortest form")
        if opcode < _CLOSE and size > self._most - len(self._message):
            raise Closed(1009, f"a message is longer than {self._most} bytes")
        if len(ahead) < start + size:
            return None
        mask = ahead[start - 4 : start]
        data = ahead[start : start + size]
        del ahead[: start + size]
        key = int.from_bytes((mask * (size // 4 + 1))[:size], "little")  # 15 times as fast as a loop
        return opcode, final, (int.from_bytes(data, "little") ^ key).to_bytes(size, "little")


# ============================================================================================================
# accounts: identity, lease, cool-down, what an account is told and what becomes of it
# ============================================================================================================

SESSION_COOKIE = "__Secure-next-auth.session-token"
DEVICE_COOKIE = "oai-did"  # which equals the header `oai-device-id`, whatever the site sets
COOKIES_ALONG = ("cf_clearance", "_puid", DEVICE_COOKIE, "oai-sc")  # kept when they come with a session token
_SESSION_PART = re.compile(
    rf"{re.escape(SESSION_COOKIE)}(?:\.(\d))?[=\s]\s*\"?([\x21\x23-\x2b\x2d-\x3a\x3c-\x7e]{{20,16384}})"
)
DISABLED = "disabled"  # the state of an account that the administrator has taken out
# Seconds; a 429 that names no time doubles its account's wait each time.
FIRST_WAIT, LONGEST_WAIT = 60.0, 3600.0
MAX_WAIT = 40 * 86400.0  # whatever is named
_WORKSPACE = re.compile(r"[0-9A-Za-z_-]{1,64}")
RENEWAL_AHEAD, RENEWAL_SPREAD = 600.0, 300.0  # seconds
# What a new access token changes.
_TOKEN_COLUMNS = ("access_token", "expires", "email", "plan", "workspace", "state", "reason")
PROXY_PATIENCE = 3  # calls in a row that a proxy may leave without a connection
TOKEN_LEEWAY = 60.0  # seconds before its expiry at which an access token is no longer used
MAX_UNSAVED = 10_000  # conversations that are remembered in memory while the store cannot take them
LAST_MOMENT = 253402300799.0  # of the year 9999, the last that can be told
# What may stand in a header: nothing to end its line.
_TOKEN_TEXT = re.compile(r"[\x21-\x2b\x2d-\x7e]{20,16384}")
_JWT = re.compile(r"eyJ[\w-]*=*\.[\w-]+=*\.[\w.=-]*", re.ASCII)
_REFRESH_TOKEN = re.compile(r"rt_[\x21-\x2b\x2d-\x7e]+|[0-9A-Za-z_-]{45}")


def claims(token: str) -> dict[str, Any]:
    """The claims of an access token (a JWT), unverified; ValueError when it is not one. "Accounts: Access token"."""
    parts = token.split(".")
    if len(parts) != 3 or not _JWT.fullmatch(token):
        raise ValueError("not a JWT")
    payload = json.loads(base64.urlsafe_b64decode(parts[1] + "=" * (-len(parts[1]) % 4)))
    if not isinstance(payload, dict):
        raise ValueError("not a JWT")
    return payload


def with_access_token(row: AccountRow, token: str) -> AccountRow:
    """The account with a new access token and what the token says of its owner; ValueError when it is none."""
    try:
        said = claims(token)
        profile = said.get("https://api.openai.com/profile") or {}
        auth = said.get("https://api.openai.com/auth") or {}
        email = str(profile.get("email") or row.email)
        plan = str(auth.get("chatgpt_plan_type") or row.plan)
        workspace = str(auth.get("chatgpt_account_id") or "")
        expires = float(said.get("exp") or 0)
        if not 0 <= expires <= LAST_MOMENT:  # as NaN is not either
            raise TypeError
    except (TypeError, AttributeError, OverflowError, RecursionError):
        raise ValueError("not an access token") from None
    if workspace and not _WORKSPACE.fullmatch(workspace):
        raise ValueError("not an access token")
    # What a token says is not verified, but shown in terminals and tables.
    email, plan = ("".join(filter(str.isprintable, text)) for text in (email[:254], plan[:32]))
    row = replace(row, access_token=token, expires=expires, workspace=row.workspace or workspace)
    return replace(row, email=email, plan=plan)


def recognise(line: str) -> AccountRow:
    """A token as an account without identity yet; a team workspace may follow it after a comma. ValueError if unknown.

    Known are access tokens (JWTs, also within what the site's session page shows), refresh tokens (`rt_…`, or 45
    characters in the iOS generation), session tokens (encrypted JWTs, also as cookies), lines of `accounts export`, and the word
    `login-free`, which stands for no token at all.
    """
    line = line.strip("\ufeff \t\r\n")
    said = Answer(200, {}, line.encode("utf-8", "replace")).object() if line[:1] == "{" else None
    if said is not None:  # what /api/auth/session shows, whole, or what was exported
        token = said.get("sessionToken") or said.get("accessToken") or said.get("token")
        row = replace(recognise(f"{token},{said.get('account_id') or ''}"), **_identity(said))
        if row.kind == REFRESH and isinstance(beside := said.get("access_token"), str):
            with contextlib.suppress(ValueError):  # else it is exchanged for one that is good
                row = with_access_token(row, beside)
        return row
    if SESSION_COOKIE in line:
        line, cookies = _of_cookies(line)
        return replace(
            recognise(line), **_identity({"cookies": cookies, "device": cookies.get(DEVICE_COOKIE)})
        )
    token, _, workspace = (part.strip(" \"'") for part in line.partition(","))
    token = token.removeprefix("Bearer ")
    if workspace and not _WORKSPACE.fullmatch(workspace):
        raise ValueError("what follows the comma is not a workspace id")
    if token == LOGIN_FREE:
        return AccountRow(id=f"free-{secrets.token_hex(5)}", kind=LOGIN_FREE, secret="")
    if not _TOKEN_TEXT.fullmatch(token):
        raise ValueError("not a token")
    row = AccountRow(id="", kind=ACCESS, secret=token, workspace=workspace)
    owner = token
    if _REFRESH_TOKEN.fullmatch(token):
        row = replace(row, kind=REFRESH)
    elif token.startswith("eyJ") and token.count(".") == 4:
        row = replace(row, kind=SESSION)
    else:
        try:
            row = with_access_token(row, token)
            said = claims(token)
        except ValueError:
            raise ValueError("neither an access, a refresh nor a session token") from None
        user = (said.get("https://api.openai.com/auth") or {}).get("user_id") or said.get("sub")
        owner = str(user) if user else token
    digest = hashlib.sha256(f"{row.kind} {owner} {row.workspace}".encode()).hexdigest()
    return replace(row, id=f"{row.kind[:3]}-{digest[:10]}")


def _of_cookies(line: str) -> tuple[str, dict[str, str]]:
    """A session token in cookies as browsers show them, whole or in numbered parts, with the workspace that may follow it
    after a comma; and the cookies that are kept beside it. ValueError when a part is missing."""
    parts = {int(match[1] or 0): match[2] for match in _SESSION_PART.finditer(line)}
    if sorted(parts) != list(range(len(parts))) or not parts:
        raise ValueError("a part of the session cookie is missing")
    token = "".join(parts[number] for number in range(len(parts)))
    workspace = re.search(r"\A[^;]*,\s*([0-9A-Za-z_-]{1,64})\Z", line)  # which no line of several cookies has
    pairs = (one.strip().partition("=") for one in re.sub(r"(?i)\A\s*cookie:", "", line).split(";"))
    cookies = {name: value for name, _, value in pairs if name in COOKIES_ALONG and value}
    return token + (f",{workspace[1]}" if workspace else ""), cookies


def with_parts_joined(lines: Iterable[str]) -> Iterator[tuple[int, str]]:
    """The lines with their numbers; the parts of a session cookie that follow its first one on lines of their own belong to
    that line."""
    held, first, parts = list[str](), 0, 0
    for number, line in enumerate(lines, 1):
        match = re.search(rf"{re.escape(SESSION_COOKIE)}\.(\d)", line)
        if held and match and int(match[1]) == parts:
            held.append(line)
            parts += 1
            continue
        if held:
            yield first, "; ".join(held)
        held, first, parts = [line], number, int(bool(match and match[1] == "0"))
    if held:
        yield first, "; ".join(held)


def callers_token(key: str) -> AccountRow:
    """A token that a caller brings as API key: an access, refresh or session token in any of their forms, a workspace's id may
    follow after a comma. ValueError for anything else, such as a line of `accounts export`."""
    row = recognise(key)
    if row.kind == LOGIN_FREE or (key.lstrip()[:1] == "{" and '"accessToken"' not in key):
        raise ValueError("not a caller's token")
    if row.kind == ACCESS and not _JWT.fullmatch(row.secret):
        raise ValueError("not a caller's token")
    return replace(row, browser="", state="ready")


def _identity(said: Mapping[str, Any]) -> dict[str, Any]:
    """The identity of an exported account, as far as it can be used."""
    device, browser, cookies = (said.get(name) for name in ("device", "browser", "cookies"))
    found: dict[str, Any] = {"device": device} if re.fullmatch(r"[0-9a-f-]{36}", str(device)) else {}
    if isinstance(browser, str) and re.fullmatch(r"[0-9a-z_]{1,32}", browser):
        found["browser"] = browser
    told = "".join(f"{name}{value}" for name, value in cookies.items()) if isinstance(cookies, dict) else " "
    if isinstance(cookies, dict) and not re.search(r"[^\x21-\x7e]", told):
        found["cookies"] = json.dumps({name: str(value) for name, value in cookies.items()})
    if said.get("disabled") is True:
        found["state"] = DISABLED
    if said.get("codex") is True:
        found["codex"] = "yes"
    return found


def owner_of(row: AccountRow) -> tuple[str, str] | None:
    """Whose account it is, and in which workspace, as its access token says; None when it does not."""
    with contextlib.suppress(ValueError, AttributeError, RecursionError):
        user = (claims(row.access_token).get("https://api.openai.com/auth") or {}).get("user_id")
        return (str(user), row.workspace) if user else None
    return None


# The clients that tokens are given to: of the Codex CLI, and of the app for iOS.
BROWSER_CLIENT = "app_EMoamEEZ73f0CkXaXp7hrann"
REFRESH_CLIENT = "pdlLIX2Y72MIl2rhLhTE9VV9bN905kBh"


def client_of(token: str) -> str:
    """The client that an access token was given to, as it says; "" when it does not."""
    with contextlib.suppress(ValueError, RecursionError):
        return str(claims(token).get("client_id") or "")
    return ""


def guest_id(row: AccountRow) -> str:
    """The id of a caller's account: the whole digest of the token that is brought, and its workspace."""
    return f"guest-{hashlib.sha256(f'{row.secret},{row.workspace}'.encode()).hexdigest()}"


def _same(one: str, other: str) -> bool:
    """Whether two tokens are the same and not empty, compared by their whole digests."""
    digests = [hashlib.sha256(text.encode("utf-8", "replace")).digest() for text in (one, other)]
    return one != "" and hmac.compare_digest(*digests)


def stable_number(id: str) -> int:
    """A large number that stays the same for an id: which of several proxies or gateways it gets."""
    return int(hashlib.sha256(id.encode()).hexdigest(), 16)


class Wait(NamedTuple):
    """A cool-down for one model: over at `until` (Unix seconds), after `strikes` refusals in a row."""

    until: float
    strikes: int


class Added(NamedTuple):
    """The result of adding lines with tokens: the accounts, why which line was left out, how many accounts were known
    before, and how many lines were merged into another's account."""

    rows: list[AccountRow]
    faults: list[str]
    known: int
    merged: int


def _cookies_of(row: AccountRow) -> dict[str, str]:
    """The cookies of a row; none where they cannot be read."""
    kept = Answer(200, {}, row.cookies.encode()).object()
    if kept is None:
        log(logging.WARNING, "an account's cookies cannot be read; it goes on without", account=row.id)
    return {name: value for name, value in (kept or {}).items() if isinstance(value, str)}


class Catalog(NamedTuple):
    """The models that an account has at the Codex backend, best first, each as that tells it ({"slug", "context_window",
    "supported_reasoning_levels", …}); when they were read (Unix seconds, 0 for never), and the list's ETag."""

    read: float = 0.0
    etag: str = ""
    models: tuple[Mapping[str, Any], ...] = ()

    def find(self, slug: str) -> Mapping[str, Any] | None:
        return next((one for one in self.models if one["slug"] == slug), None)


# The name of the Codex backend, and what the limits of all its models are counted under.
CODEX = "codex"


class Window(NamedTuple):
    """One of the times that a plan's use of the Codex backend is counted over: how much of it is used (percent), how long it
    is (seconds), and when it is counted anew (Unix seconds)."""

    used: float
    seconds: int
    reset: float

    @property
    def name(self) -> str:
        """Its length for people: a number of hours or days, or a week."""
        hours = round(self.seconds / 3600)
        return "week" if hours == 168 else f"{hours // 24} d" if hours % 24 == 0 and hours else f"{hours} h"

    def left(self, now: float) -> float:
        """The percentage that is left of it."""
        return 100.0 if self.reset <= now else max(0.0, 100.0 - self.used)

    def urgency(self, now: float) -> float:
        """How much of it is lost by the hour if nothing of it is used (percent)."""
        rest = self.reset - now if self.reset > now else self.seconds
        return self.left(now) / max(rest, 60.0) * 3600


class Allowance(NamedTuple):
    """What an account's plan lets it use of the Codex backend, as that said at `read` (Unix seconds); `credits` are those
    that are bought beside the plan, as text: a number, "unlimited", or "" for none."""

    read: float
    windows: tuple[Window, ...] = ()
    credits: str = ""

    def as_json(self) -> str:
        return compact([self.read, [list(window) for window in self.windows], self.credits])

    @classmethod
    def of_json(cls, text: str) -> Allowance | None:
        """The allowance that was kept; None for none."""
        with contextlib.suppress(ValueError, TypeError):
            read, windows, credits = json.loads(text)
            kept = tuple(Window(float(one[0]), int(one[1]), float(one[2])) for one in windows)
            return cls(float(read), kept, str(credits))
        return None

    def told(self, now: float) -> str:
        """The same for people: how much of each window is used, and when it is counted anew (local time)."""
        texts = []
        for one in self.windows:
            used = f"{one.name} {100 - one.left(now):.0f} %"
            texts.append(f"{used} until {clock(one.reset, now)}" if one.reset > now else used)
        texts += [f"credits {self.credits}"] if self.credits else []
        return ", ".join(texts)


def clock(moment: float, now: float) -> str:
    """A time for people, with the day unless that is near (local time)."""
    form = "%H:%M" if moment - now < 86400 else "%d %b %H:%M"
    return time.strftime(form, time.localtime(min(max(moment, 0.0), LAST_MOMENT)))


class DrawingsLeft(NamedTuple):
    """How many images the site lets an account make, when it said so and when it counts anew (Unix seconds), and whether
    some have been made since."""

    read: float
    images: float = math.inf
    reset: float = 0.0
    counted: bool = False


class Account:
    """An account at work: its row of the store and what only the running process knows of it."""

    def __init__(self, row: AccountRow, egress: Egress, gateway: str) -> None:
        self.row, self.egress, self.gateway = row, egress, gateway
        self.waits: dict[str, Wait] = {}
        # Replaced, never changed: others may be reading it.
        self.cookies = _cookies_of(row)
        # The header lines of its calls, and the row, the cookies and the page that they are made of.
        self.lines: tuple[AccountRow | None, dict[str, str], Page | None, list[bytes]] = (None, {}, None, [])
        self.renewal: Future[None] | None = None  # the exchange under way
        self.accepted = False  # whether the upstream has accepted the token of a guest
        self.unstored: tuple[str, str | None] | None = (
            None  # what an exchange gave that the store could not take
        )
        # Seconds before its token's expiry at which it is renewed: not all accounts at the same moment.
        self.renewed_ahead = RENEWAL_AHEAD + stable_number(row.id) % int(RENEWAL_SPREAD)
        self.retry_renewal = (0.0, 0)  # not before (Unix seconds), after how many failures
        self.spare: Future[Any] | None = None  # the requirements prepared for its next turn
        # REQ, the reading of the page that it was made for, and its algorithm.
        self.requirements_token = ("", 0.0, "")
        self.models: tuple[float, tuple[str, ...]] = (0.0, ())  # when read (Unix seconds), slugs
        self.drawings: DrawingsLeft | None = None
        self.demands: tuple[str, tuple[str, ...]] = ("", ())  # `persona` and `wants` of its last requirements
        self._said: tuple[str, tuple[str, str] | None, str] = ("", None, "")  # by an access token
        self.allowance = Allowance.of_json(row.allowance)
        self.catalog = Catalog()  # the models that it has at the Codex backend
        self.codex_cookies: dict[str, str] = {}  # of that, which are for another program than a browser
        self.unreached = 0  # how many calls in a row did not get through its proxy
        self.answered = False
        self.used = 0.0

    @property
    def id(self) -> str:
        return self.row.id

    @property
    def name(self) -> str:
        """How logs and errors call it: what a token says of its owner counts once the upstream has accepted it."""
        if self.row.guest and not self.accepted:
            return self.row.id[:16]
        return self.row.email or self.row.id

    @property
    def renewable(self) -> bool:
        return self.row.kind in (REFRESH, SESSION)

    def _told_by_token(self) -> tuple[str, tuple[str, str] | None, str]:
        """Its access token, `owner_of` that, and the client that it was given to."""
        if self._said[0] != self.row.access_token:
            self._said = (self.row.access_token, owner_of(self.row), client_of(self.row.access_token))
        return self._said

    def owner(self) -> tuple[str, str] | None:
        """`owner_of` its access token."""
        return self._told_by_token()[1]

    def speaks_codex(self) -> bool:
        """Whether the Codex backend takes its token, as far as is known: that of a browser or device sign-in. The token says
        whose client it was given to; one that does not is judged by how it is renewed."""
        row = self.row
        if row.codex or row.kind in (LOGIN_FREE, SESSION):
            return row.codex == "yes"
        client = self._told_by_token()[2]
        return client == BROWSER_CLIENT if client else row.kind == REFRESH and row.secret.startswith("rt_")

    def is_of_codex(self) -> bool:
        """Whether its token is surely one that was given to the Codex CLI's sign-in."""
        return self.row.codex == "yes" or (
            self.row.codex == "" and self._told_by_token()[2] == BROWSER_CLIENT
        )

    def speaks_web(self) -> bool:
        """Whether the site's own API may take its token."""
        return self.row.web != "no"

    def doubtful(self) -> bool:
        """Whether it is not known that the site's own API takes its token, although it was given to another program."""
        return self.row.web == "" and self.is_of_codex()

    def paths(self) -> str:
        """The upstreams that take its token, for people."""
        if not self.speaks_codex():
            return "web"
        return "codex + web" if self.row.web == "yes" else CODEX

    def token_valid(self, now: float) -> bool:
        """Whether it can ask as it is; an access token without expiry counts until the upstream refuses it."""
        row = self.row
        current = not row.expires or row.expires - TOKEN_LEEWAY > now
        return row.kind == LOGIN_FREE or (row.access_token != "" and current)

    def state(self, now: float) -> str:
        """ready, waiting, expired, dead or disabled, for people and metrics."""
        if self.row.state != "ready":
            return self.row.state
        if not self.renewable and not self.token_valid(now):
            return "expired"
        return "waiting" if any(wait.until > now for wait in self.waits.values()) else "ready"

    def told(self, now: float) -> str:
        """Its state for people: with the reason, or until when and for which models it waits."""
        state = self.state(now)
        if state == "waiting":
            waits = {model: wait.until for model, wait in self.waits.items() if wait.until > now}
            end = max(waits.values())
            return f"waiting until {clock(end, now)} ({', '.join(sorted(waits))})"
        reason = self.row.reason or ("its access token has expired" if state == "expired" else "")
        return f"{state}: {reason}" if reason and state != DISABLED else state

    def wait_for(self, model: str, now: float) -> float:
        """Seconds of its cool-down for a model that are left; 0 for none."""
        wait = self.waits.get(model)
        return max(0.0, wait.until - now) if wait else 0.0


class Ledger:
    """Counts the work of accounts and API users today (local time), and of all accounts together by the hour. It
    counts in memory; counts that are not saved yet are lost when the process is killed."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self._tallies_lock = threading.Lock()
        self._day = (0.0, 0.0)  # the day that is counted: its beginning and end, Unix seconds
        self._unsaved: dict[tuple[str, float], Tally] = {}
        begun = self._begun(now := time.time())
        self._hours = store.tallies("", now - 86400)
        self._today = {
            subject: tally if since == begun else Tally(used=tally.used)
            for subject, since, tally in store.last_tallies()
        }

    def _begun(self, now: float) -> float:
        """The beginning of today; a new day begins with nothing counted."""
        if not self._day[0] <= now < self._day[1]:
            day = time.localtime(now)
            date = (day.tm_year, day.tm_mon, day.tm_mday)
            midnight = [time.mktime((*date[:2], date[2] + i, 0, 0, 0, 0, 0, -1)) for i in (0, 1)]
            if self._day[1]:
                self._today = {subject: Tally(used=tally.used) for subject, tally in self._today.items()}
                self._hours = {since: tally for since, tally in self._hours.items() if since > now - 90000}
            self._day = (midnight[0], midnight[1])
        return self._day[0]

    def count(self, subject: str, **amounts: int) -> None:
        """Adds `answers` or `failures` of an account, `requests` or `tokens` of an API user."""
        with self._tallies_lock:
            self._count(subject, Tally(**amounts, used=time.time()))

    def _count(self, subject: str, more: Tally) -> None:
        begun = self._begun(more.used)
        none = Tally()
        hour = begun + (more.used - begun) // 3600 * 3600
        self._today[subject] = self._today.get(subject, none).plus(more)
        keys = [(subject, begun)]
        if more.answers or more.failures:
            self._hours[hour] = self._hours.get(hour, none).plus(more)
            keys.append(("", hour))
        for key in keys:
            self._unsaved[key] = self._unsaved.get(key, none).plus(more)

    def admit(self, user: str, limit: int | None) -> float:
        """Counts a request of an API user; past its limit, how many seconds the day still has."""
        with self._tallies_lock:
            now = time.time()
            self._begun(now)
            if limit is not None and self.today(user).requests >= limit:
                return self._day[1] - now
            self._count(user, Tally(requests=1, used=now))
        return 0.0

    def today(self, subject: str) -> Tally:
        """The counts of a subject for today, and when it was last used at all."""
        return self._today.get(subject, Tally())

    def hours(self) -> list[tuple[float, Tally]]:
        """The last 24 hours, each with its beginning (Unix seconds); the last is the one under way."""
        with self._tallies_lock:
            now = time.time()
            begun = self._begun(now)
            this = begun + (now - begun) // 3600 * 3600
            starts = [this - 3600 * i for i in range(23, -1, -1)]
            return [(start, self._hours.get(start, Tally())) for start in starts]

    def save(self) -> None:
        """Stores what was counted since the last time."""
        with self._tallies_lock:
            unsaved, self._unsaved = self._unsaved, {}
        try:
            if unsaved:
                self.store.add_tallies(unsaved)
        except StoreUnavailable:  # it will be tried again
            with self._tallies_lock:
                for key, tally in unsaved.items():
                    self._unsaved[key] = self._unsaved.get(key, Tally()).plus(tally)
            raise


def login_required() -> ApiError:
    """The error for something that a login-free account cannot do."""
    return ApiError("login_required", "This needs a signed-in account; add one, or call with its token.")


class Pool:
    """The accounts, which of them answers next, and which is left alone for how long.

    What it decides is written through to the store. Guests, whose token a caller brings, are kept beside the pool and
    never chosen for others. Two locks: `_changes_lock` makes a change of store and memory one step, `_accounts_lock`
    guards the memory alone, so that a lease never waits for the disk.
    """

    MAX_GUESTS, MAX_ARRIVING = 1000, 64

    def __init__(self, settings: Settings, store: Store) -> None:
        self.settings, self.store = settings, store
        self._unsaved_lock = threading.Lock()
        self._unsaved_held: dict[str, Held] = {}  # conversations that the store could not take
        self._changes_lock = threading.RLock()
        self._accounts_lock = threading.Lock()
        self._accounts: dict[str, Account] = {}
        self._turn_order: list[Account] = []  # those not set aside that the site's own API may take
        self._signed_in: list[Account] = []  # those of them with a token
        self._codex: list[Account] = []  # those not set aside that the Codex backend takes
        self._by_secret: dict[str, Account] = {}  # those that renew themselves, by their current token
        self._cursor = 0
        self._guests: OrderedDict[str, Account] = OrderedDict()
        # Guests whose tokens nobody has accepted yet.
        self._arriving: OrderedDict[str, Account] = OrderedDict()
        self.reload()

    # -- what there is ---------------------------------------------------------------------------------------

    def reload(self) -> None:
        """Takes in what the store holds: new accounts, removed ones, states and waits that another process wrote."""
        with self._changes_lock:
            waits: dict[str, dict[str, Wait]] = {}
            for owner, model, until, strikes in self.store.waits():
                waits.setdefault(owner, {})[model] = Wait(min(until, time.time() + MAX_WAIT), strikes)
            rows = self.store.accounts()
            load = Counter(row.proxy for row in rows)
            accounts = {}
            for row in rows:
                with self._accounts_lock:
                    account = self._guests.get(row.id) if row.guest else self._accounts.get(row.id)
                    if account is None and not row.guest:  # a caller's own until now: one object an account
                        account = self._guests.pop(row.id, None)
                if account:
                    if row.cookies != account.row.cookies:  # some came with a token that was added anew
                        account.cookies = account.cookies | _cookies_of(row)
                    told = Allowance.of_json(row.allowance)
                    if told and (account.allowance is None or account.allowance.read < told.read):
                        account.allowance = told
                    account.row = row
                elif not row.guest:
                    account = self._configured(row, load)
                if account and not row.guest:
                    account.waits = waits.get(row.id, {})
                    accounts[row.id] = account
            moved = {
                a.id: a.egress.proxy for a in accounts.values() if a.egress.proxy not in ("", a.row.proxy)
            }
            if moved:
                self.store.update_accounts("proxy", moved)
            with self._accounts_lock:
                self._accounts = accounts
            self._order()

    def _configured(self, row: AccountRow, load: Counter[str]) -> Account:
        """Gives an account its part of the configuration: a proxy for life (the least used) and a gateway."""
        proxies, gateways = self.settings.proxy_url, self.settings.chatgpt_base_url
        proxy = row.proxy if row.proxy in proxies else ""
        lot = stable_number(row.id)
        if proxies and not proxy:
            proxy = proxies[lot % len(proxies)] if row.guest else min(proxies, key=lambda one: load[one])
            load[proxy] += 1
        known = row.browser in browsers.BrowserType.__members__
        egress = Egress(row.browser if known else self.settings.impersonate, proxy)
        return Account(row, egress, gateways[lot % len(gateways)])

    def _order(self) -> None:
        with self._accounts_lock:
            ready = [one for one in self._accounts.values() if one.row.state == "ready"]
            self._turn_order = [one for one in ready if one.speaks_web()]
            self._codex = [one for one in ready if one.speaks_codex()]
            self._signed_in = [one for one in self._turn_order if one.row.kind != LOGIN_FREE]
            self._by_secret = {one.row.secret: one for one in self._accounts.values() if one.renewable}

    def add(self, lines: Iterable[str]) -> Added:
        """Stores the tokens, one a line (`#` begins a comment).

        An account that is known gets its new token and is ready again; its identity stays. One that renews itself and
        is ready keeps its secret as well: the token that it was once added with may long be replaced.
        """
        found: dict[str, AccountRow] = {}
        faults = list[str]()
        given = 0
        before = set[str]()
        for number, line in with_parts_joined(lines):
            text = line.strip()
            comment = text[:1] == "#" and not text.startswith("#HttpOnly_")
            whole = text[:1] == "{" or (SESSION_COOKIE in text and not comment)
            if not (text := text if whole else text.partition("#")[0].strip()):
                continue
            try:
                row = recognise(text)
                given += 1
                if row.id not in found or row.expires >= found[row.id].expires:
                    found[row.id] = row
            except ValueError as error:
                faults.append(f"line {number}: {error}")

        def merge(known: Mapping[str, AccountRow]) -> list[AccountRow]:
            before.update(id for id, row in known.items() if not row.guest)
            return self._merged(found, known)

        with self._changes_lock:
            rows = self.store.merge_accounts(merge)
            self.reload()
        return Added(rows, faults, sum(row.id in before for row in rows), given - len(rows))

    def _merged(self, found: Mapping[str, AccountRow], known: Mapping[str, AccountRow]) -> list[AccountRow]:
        """The accounts as they are to be kept. Those that are known, by their id, their token or their owner, stay
        the accounts that they are."""
        tokens = {token: row for row in known.values() for token in (row.secret, row.access_token) if token}
        # A login-free account has nothing but its device.
        tokens |= {row.device: row for row in known.values() if row.kind == LOGIN_FREE and not row.guest}
        owners: dict[tuple[str, str] | None, AccountRow] = {}
        if any(row.kind == ACCESS and id not in known for id, row in found.items()):
            owners = {owner: row for row in known.values() if not row.guest and (owner := owner_of(row))}
        merged: dict[str, AccountRow] = {}
        for row in found.values():
            token = row.device if row.kind == LOGIN_FREE else row.secret
            old = (
                known.get(row.id)
                or known.get(guest_id(row))
                or tokens.get(token)
                or owners.get(owner_of(row))
            )
            row = self._renamed(row, old)
            merged[row.id] = row
        return list(merged.values())

    def _renamed(self, row: AccountRow, old: AccountRow | None) -> AccountRow:
        """An account that is added, with the id and identity that it already has if it is known."""
        if old is None:
            fresh: dict[str, Any] = {
                "device": row.device or new_id(),
                "browser": row.browser or self.settings.impersonate,
            }
            return replace(row, **fresh, added=time.time())
        cookies = json.dumps(_cookies_of(old) | _cookies_of(row))
        usable = old.state in ("ready", DISABLED)
        codex = row.codex or old.codex
        if usable and (old.kind in (REFRESH, SESSION) or (old.kind == ACCESS and old.expires > row.expires)):
            return replace(old, guest=0, cookies=cookies, codex=codex)
        names = ("id", "device", "browser", "proxy", "added")
        kept: dict[str, Any] = {name: getattr(old, name) for name in names} | {"cookies": cookies}
        row = replace(row, **kept, codex=codex)
        row = replace(row, email=row.email or old.email, plan=row.plan or old.plan)
        return replace(row, state=DISABLED) if old.state == DISABLED else row

    def guest(self, row: AccountRow) -> Account:
        """The account of a caller who brings this token: the pool's if it is that one's current token, and no other.

        What a token says of itself is not verified, so nobody but who brings the same token is the same guest: who has
        brought a refresh token goes on with what has replaced it. A guest is remembered once the upstream has accepted
        the token (`welcome`).
        """
        with self._accounts_lock:
            own = self._accounts.get(row.id)
            if own is None or own.renewable:  # which keeps its id while its token is replaced
                own = self._by_secret.get(row.secret)
        if own and _same(own.row.access_token if row.kind == ACCESS else own.row.secret, row.secret):
            if row.workspace not in (
                "",
                own.row.workspace,
            ):  # exchanged for another it would be lost to the pool
                text = "This token is in the pool for another workspace; send it without one."
                raise ApiError("invalid_api_key", text)
            return own
        id = guest_id(row)
        with self._accounts_lock:
            account = self._guests.get(id) or self._arriving.get(id)
        if account is None:
            device = str(uuid.uuid5(uuid.NAMESPACE_URL, id))
            fresh = replace(
                row, id=id, guest=1, device=device, browser=self.settings.impersonate, added=time.time()
            )
            account = self._configured(self.store.account(id) or fresh, Counter())
            with self._accounts_lock:  # several requests that come at once are one guest's
                account = self._arriving.setdefault(id, account)
                if len(self._arriving) > self.MAX_ARRIVING:
                    self._arriving.popitem(last=False)
        return account

    def welcome(self, account: Account) -> Account:
        """Remembers a guest whose token the upstream has accepted; of many the one used longest ago is forgotten."""
        if not account.row.guest:
            return account
        with self._accounts_lock:
            account = self._guests.setdefault(account.id, account)
            account.accepted = True
            self._guests.move_to_end(account.id)
            if len(self._guests) > self.MAX_GUESTS:
                self._guests.popitem(last=False)
        return account

    def login_free(self) -> Account:
        """The account of callers who need no key and bring none."""
        id = "free-caller"
        with self._accounts_lock:
            account = self._guests.get(id)
        if account is None:
            row = AccountRow(
                id,
                LOGIN_FREE,
                "",
                device=new_id(),
                browser=self.settings.impersonate,
                guest=1,
                added=time.time(),
            )
            with self._changes_lock, contextlib.suppress(StoreUnavailable):
                (row,) = self.store.merge_accounts(lambda known: [known.get(id) or row])
            account = self._configured(row, Counter())
        return self.welcome(account)

    def find(self, id: str) -> Account | None:
        """An account or guest by its id."""
        with self._accounts_lock:
            return self._accounts.get(id) or self._guests.get(id)

    def accounts(self) -> list[Account]:
        with self._accounts_lock:
            return list(self._accounts.values())

    def live(self) -> list[Account]:
        """All accounts and guests that the process knows."""
        with self._accounts_lock:
            return [*self._accounts.values(), *self._guests.values()]

    def holder(self, conversation: str, scope: Scope) -> str | None:
        """The id of the account that holds a conversation, None when that is not known; not_found for one that is not
        the caller's to see, be it there or not."""
        held = self._unsaved_held.get(conversation) or self.store.conversation(conversation)
        if not scope.covers(held.owner if held else ""):
            raise ApiError("not_found", "There is no such conversation.")
        return held.account if held else None

    def conversations_of(self, owner: str) -> dict[str, set[str]]:
        """The conversations that somebody began, by the accounts that hold them."""
        found = self.store.conversations_of(owner)
        for id, held in self._unsaved_held.items():
            if held.owner == owner:
                found.setdefault(held.account, set()).add(id)
        return found

    def hold(self, conversations: Mapping[str, Held]) -> None:
        """Remembers which account holds which conversation, and who began it; in memory while the store cannot."""
        with self._unsaved_lock:
            unsaved = dict(self._unsaved_held)
        for id, one in conversations.items():
            known = unsaved.get(id)
            unsaved[id] = Held(one.account, known.owner) if known and known.owner else one
        if not unsaved:
            return
        try:
            self.store.put_conversations(unsaved)
            with self._unsaved_lock:
                self._unsaved_held = {id: one for id, one in self._unsaved_held.items() if id not in unsaved}
        except StoreUnavailable:
            with self._unsaved_lock:
                # Those that nobody is known to have begun would hide whom the store knows.
                begun = {id: one for id, one in (self._unsaved_held | unsaved).items() if one.owner}
                self._unsaved_held = dict(list(begun.items())[-MAX_UNSAVED:])

    def states(self) -> dict[str, int]:
        """The number of accounts in each state."""
        now = time.time()
        return Counter(account.state(now) for account in self.accounts())

    # -- who answers -----------------------------------------------------------------------------------------

    def lease(
        self,
        model: str,
        tried: Iterable[Account] = (),
        holder: str | None = None,
        signed_in: bool = False,
        besides: str = "",
    ) -> Account:
        """The account for the next attempt; ApiError rate_limit_exceeded, no_account or login_required when there is none.

        `holder` is the id of the one account that will do, `signed_in` leaves out login-free ones. Accounts already
        tried, waiting for what is wanted `besides` the model, or of which it is doubtful whether the site takes them, come
        only when there are no others.
        """
        now = time.time()
        tried = list(tried)
        with self._accounts_lock:
            order = self._signed_in if signed_in else self._turn_order
            if holder is not None:
                one = self._accounts.get(holder)
                order = [one] if one and one.row.state == "ready" and one.speaks_web() else []
            elif not order and self._turn_order:
                raise login_required()
            usable = None
            size = len(order)
            first = self._cursor
            stride = 1
            if self.settings.random_token and size:
                # Not one after the other: whoever stands behind a run of waiting ones would get their share too.
                first = random.randrange(size)
                stride = random.randrange(1, size + 1)
                while math.gcd(stride, size) > 1:
                    stride = random.randrange(1, size + 1)
            for step in range(size):
                account = order[(first + step * stride) % size]
                if self._usable(account, model, now):
                    able = account.token_valid(now) or account.retry_renewal[0] <= now
                    sure = not account.wait_for(besides, now) and not account.doubtful()
                    if able and account not in tried and sure:
                        self._cursor = (first + step + 1) % size
                        account.used = now
                        return account
                    usable = usable or account
            if usable is None:
                raise self._none(order, (model,), now, holder is not None)
            return usable

    def lease_codex(
        self, model: str, fit: list[Account], tried: Collection[Account], rank: Callable[[Account], Any]
    ) -> Account:
        """The account for the next attempt at the Codex backend: of those that fit, and that wait neither for this model nor
        for all, the one of the lowest rank; those tried come after the others. ApiError as `lease` has it."""
        now = time.time()
        waits = (CODEX, f"{CODEX} {model}")
        with self._accounts_lock:
            usable = [one for one in fit if all(self._usable(one, wait, now) for wait in waits)]
            if not usable:
                raise self._none(fit, waits, now, False)

            def place(account: Account) -> tuple[bool, bool, Any]:
                late = not account.token_valid(now) and account.retry_renewal[0] > now
                return account in tried, late, rank(account)

            account = min(usable, key=place)
            account.used = now
            return account

    def codex_accounts(self) -> list[Account]:
        """Those that the Codex backend takes, ready ones alone."""
        with self._accounts_lock:
            return list(self._codex)

    def has_sure(self) -> bool:
        """Whether there is an account of which it is not doubtful whether the site takes it."""
        with self._accounts_lock:
            return any(not account.doubtful() for account in self._turn_order)

    def has_signed_in(self) -> bool:
        """Whether any account other than login-free ones can answer, be it after a wait."""
        now = time.time()
        with self._accounts_lock:
            return any(account.renewable or account.token_valid(now) for account in self._signed_in)

    def lease_guest(self, account: Account, model: str, signed_in: bool = False) -> Account:
        """The same for an account that cannot be replaced by another."""
        now = time.time()
        if signed_in and account.row.kind == LOGIN_FREE:
            raise login_required()
        account.used = now
        if error := self._unusable(account, model, now):
            raise error
        return account

    def _usable(self, account: Account, model: str, now: float) -> bool:
        able = account.row.state == "ready" and (account.renewable or account.token_valid(now))
        return able and not (self.settings.enable_limit and account.wait_for(model, now))

    def _unusable(self, account: Account, model: str, now: float) -> ApiError | None:
        """Why an account cannot be asked now, as its owner is told."""
        if self._usable(account, model, now):
            return None
        if account.row.state == "ready" and (wait := account.wait_for(model, now)):
            return self._limited(wait)
        if account.row.state == DISABLED:
            return ApiError("invalid_api_key", "This account is disabled on this server.")
        return ApiError("invalid_api_key", "Your token has expired or was revoked; send a new one.")

    def _none(self, order: list[Account], names: Iterable[str], now: float, held: bool) -> ApiError:
        """Why none of these accounts can answer, which may wait for any of these; the lock is held."""
        longest = [max(account.wait_for(name, now) for name in names) for account in order]
        waits = [wait for wait in longest if wait]
        if waits and self.settings.enable_limit:
            return self._limited(min(waits))
        if held:
            text = "The account that holds this conversation or file can no longer answer; start a new conversation, or upload the file again."
            return ApiError("no_account", text, headers={"Retry-After": "30"})
        found = "has no accounts" if not self._accounts else "has only expired, dead or disabled accounts"
        if self._codex and not order:
            found = (
                "has no account but those that the Codex backend alone takes, which has no such call or model"
            )
        text = f"The pool {found}; add one with `chatproxy.py accounts add`, and see `chatproxy.py accounts list`."
        return ApiError("no_account", text, headers={"Retry-After": "30"})

    @staticmethod
    def _limited(wait: float) -> ApiError:
        seconds = max(1, math.ceil(wait))
        text = "The upstream's rate limit is reached for every usable account; try again in"
        headers = {"Retry-After": str(seconds)}
        return ApiError("rate_limit_exceeded", f"{text} {seconds} seconds.", headers=headers)

    # -- what becomes of them --------------------------------------------------------------------------------

    def told_to_wait(self, account: Account, model: str, seconds: float | None) -> float:
        """A 429: leaves the account alone for this model, for the given time or one that grows; the seconds left.

        Requests that were under way together are one strike, and a shorter wait does not replace a longer one.
        """
        with self._changes_lock:
            now = time.time()
            old = account.waits.get(model, Wait(0.0, 0))
            strikes = old.strikes if old.until > now else old.strikes + 1
            pause = min(FIRST_WAIT * 2 ** min(strikes - 1, 10), LONGEST_WAIT) if seconds is None else seconds
            pause = min(pause, MAX_WAIT)
            wait = Wait(max(now + pause, old.until), strikes)
            recent = {name: one for name, one in account.waits.items() if one.until > now - 86400}
            account.waits = recent | {model: wait}
            with contextlib.suppress(StoreUnavailable):  # it is kept in memory, at least
                self.store.put_wait(account.id, model, wait.until, wait.strikes)
        return wait.until - now

    def answered(self, account: Account, model: str) -> None:
        """An answer of the site's own API came."""
        account.answered = True
        self.waited_out(account, model)

    def waited_out(self, account: Account, model: str) -> None:
        """Strikes for a model are forgotten, but not a wait that another request was told."""
        account.used = time.time()
        if (wait := account.waits.get(model)) and wait.until <= account.used:
            with self._changes_lock:
                account.waits = {name: wait for name, wait in account.waits.items() if name != model}
                with contextlib.suppress(StoreUnavailable):
                    self.store.remove_wait(account.id, model)

    def _change(self, account: Account, **columns: Any) -> None:
        """Changes columns of an account, in the store and then in memory."""
        with self._changes_lock:
            self.store.update_account(account.id, **columns)
            account.row = replace(account.row, **columns)

    def learned(self, account: Account, **paths: str) -> None:
        """Remembers whether `codex` or `web` takes an account's token: yes or no; `reason` is shown of it."""
        if all(getattr(account.row, name) == said for name, said in paths.items()):
            return
        told = [name for name, said in paths.items() if said == "no"]
        with self._changes_lock:
            try:
                if not account.row.guest:
                    self.store.update_account(account.id, **paths)
            except StoreUnavailable:  # it is found out again after the next start
                pass
            account.row = replace(account.row, **cast("dict[str, Any]", paths))
            self._order()
        if told:
            log(
                logging.INFO,
                "an upstream does not take an account",
                account=account.name,
                upstream=told[0],
            )

    def set_aside(self, account: Account, state: str, reason: str, token: str) -> bool:
        """Takes an account out for good, as `expired` or `dead`, until it gets a new token; False if it just got one.

        `token` is what was refused: the access token, or the secret of an exchange. A guest's row is not kept.
        """
        with self._changes_lock:
            if account.row.state == state:
                return True
            now = self.store.account(account.id) or account.row
            if token not in (now.access_token, now.secret):
                self.reload()
                return False
            try:
                if account.row.guest:
                    self.store.remove_accounts([account.id])
                self._change(account, state=state, reason=reason)
            except StoreUnavailable:  # the upstream will say it again after the next start
                account.row = replace(account.row, state=state, reason=reason)
            self._order()
        level = logging.DEBUG if account.row.guest else logging.WARNING
        log(level, f"account set aside as {state}", account=account.name, reason=reason)
        return True

    def renewed_elsewhere(self, account: Account) -> bool:
        """Whether another process, such as `accounts check`, has just given the account a new token; takes that in, or
        that it is set aside (Refusal)."""
        with self._changes_lock:
            row = self.store.account(account.id)
            if row is None or (row.secret, row.state) == (account.row.secret, account.row.state):
                return False
            account.row = row
            self._order()
        if row.state != "ready":
            raise Refusal("expired", "This account's sign-in is no longer valid.")
        return account.token_valid(time.time())

    def renewed(self, account: Account, token: str, secret: str | None) -> None:
        """A new access token, and the secret to ask for the next one if that was rotated: stored, then used.

        ValueError when the token is none; the new secret is kept all the same.
        """
        with self._changes_lock:
            if account.row.guest:
                self.store.merge_accounts(lambda known: [known.get(account.id) or account.row])
            if secret and re.fullmatch(r"[\x21-\x2b\x2d-\x7e]{1,16384}", secret):
                self._change(account, secret=secret)
            row = with_access_token(account.row, token)
            first = not account.row.access_token
            if row.plan != account.row.plan:  # another one may let it use what the old one did not
                self._change(account, codex="", web="")
            if row.state != DISABLED:
                row = replace(row, state="ready", reason="")
            self._change(account, **{name: getattr(row, name) for name in _TOKEN_COLUMNS})
            owner = account.owner() if first and not account.row.guest else None
            same = [one for one in self.accounts() if owner and one is not account and one.owner() == owner]
            if same and self.store.account(account.id):
                self._absorb(same[0], account)
            self._order()

    def _absorb(self, old: Account, new: Account) -> None:
        """A new account turned out to be one that was there: that gets its tokens, and stays what it is otherwise."""
        row = new.row
        columns: dict[str, Any] = {name: getattr(row, name) for name in ("kind", "secret", *_TOKEN_COLUMNS)}
        if DISABLED in (old.row.state, row.state):
            columns |= {"state": DISABLED, "reason": ""}
        self.store.absorb_account(old.id, row.id, **columns)
        self.reload()
        log(logging.INFO, "accounts merged", account=old.name, id=old.id, other=row.id)

    def reached(self, account: Account, egress: Egress, connected: bool) -> None:
        """Whether a call got through the account's proxy: after PROXY_PATIENCE in a row that did not, it gets the next."""
        if connected or egress is not account.egress:
            account.unreached = 0 if connected else account.unreached
            return
        proxies = self.settings.proxy_url
        with self._changes_lock:
            account.unreached += 1
            if account.unreached < PROXY_PATIENCE or len(proxies) < 2 or egress is not account.egress:
                return
            proxy = proxies[(proxies.index(egress.proxy) + 1) % len(proxies)]
            account.unreached = 0
            account.egress = egress._replace(proxy=proxy)
            self._change(account, proxy=proxy)
        places = [one.rpartition("@")[2].rpartition("/")[2] for one in (egress.proxy, proxy)]
        log(
            logging.WARNING,
            "account moved to the next proxy",
            account=account.name,
            old=places[0],
            new=places[1],
        )

    def disable(self, ids: Iterable[str], disabled: bool) -> int:
        """Takes accounts out until they are enabled again, or enables them; how many it changed. An expired or dead one
        stays what it is."""
        with self._changes_lock:
            changed = self.store.swap_states(ids, *(("ready", DISABLED) if disabled else (DISABLED, "ready")))
            self.reload()
        return changed

    def remove(self, ids: Iterable[str] | None = None) -> list[str]:
        """Removes accounts, all of the pool when none are named; those that there were."""
        with self._changes_lock:
            removed = self.store.remove_accounts(ids)
            self.reload()
        return removed

    def keep_told(self) -> None:
        """Stores the cookies and allowances that changed since the last time."""
        with self._changes_lock:
            accounts = self.accounts()
            self._keep("cookies", {account: json.dumps(account.cookies) for account in accounts})
            self._keep(
                "allowance",
                {account: account.allowance.as_json() for account in accounts if account.allowance},
            )

    def _keep(self, column: str, texts: Mapping[Account, str]) -> None:
        """Stores a column of accounts where it changed."""
        changed = {account: text for account, text in texts.items() if text != getattr(account.row, column)}
        if changed:
            self.store.update_accounts(column, {account.id: text for account, text in changed.items()})
        for account, text in changed.items():
            account.row = replace(account.row, **cast("dict[str, Any]", {column: text}))


# ============================================================================================================
# connections: calls on behalf of an account, what a refusal means, and the renewal of its token
# ============================================================================================================


REFRESH_REDIRECT = "com.openai.chat://auth0.openai.com/ios/com.openai.chat/callback"
# What the token endpoint says of a refresh token that is no good any more, whatever its status.
DEAD_SIGN_INS = (
    "invalid_grant", "access_denied", "refresh_token_expired", "refresh_token_reused", "refresh_token_invalidated",
)  # fmt: skip
EXCHANGE_PATIENCE = 10.0  # seconds that an exchange waits for another process that makes it
_JSON_HEADERS = [b"Content-Type: application/json", b"Expect:"]
_BLOCK_MARKS = re.compile(r"just a moment|cf-spinner|cf-chl|challenge-platform|unusual activity", re.I)


def refusal(status: int, headers: Mapping[str, str], body: bytes) -> Refusal:
    """An answer other than 2xx, with what it means."""
    refused = _meaning(status, headers, body)
    refused.said = status, headers.get("content-type", "application/json"), body
    return refused


def _meaning(status: int, headers: Mapping[str, str], body: bytes) -> Refusal:
    """An answer other than 2xx as "Refusals" has it. Of the upstream's own words only `detail` is repeated, and never
    what it was sent."""
    text = body[:20_000].decode("utf-8", "replace")
    page = "text/html" in headers.get("content-type", "") or text.lstrip()[:1] == "<"
    detail = (Answer(status, {}, body).object() or {}).get("detail")
    code = str(detail.get("code") or "") if isinstance(detail, dict) else ""
    said = detail.get("message") if isinstance(detail, dict) else detail
    if isinstance(detail, list):  # a validator's list repeats the input: say only what and where
        faults = [one for one in detail if isinstance(one, dict)]
        places = [one["loc"] if isinstance(one.get("loc"), list) else [] for one in faults]
        told = zip(places, faults, strict=True)
        said = "; ".join(f"{'.'.join(map(str, place))}: {one.get('msg')}" for place, one in told)
    said = f": {said[:300]}" if isinstance(said, str) and said else ""
    if status == 429:
        wait = detail.get("clears_in") if isinstance(detail, dict) else None
        return Refusal("limited", "The upstream's rate limit is reached.", wait=_seconds(wait, headers))
    if status == 401 and not page:
        return Refusal("expired", "The upstream says that this account's token expired or was revoked.")
    if status == 403 or (page and _BLOCK_MARKS.search(text)):
        advice = "open chatgpt.com in a browser from this address, or set PROXY_URL to another one"
        text = f"The upstream refuses this server's address ({status}{said[:200]}); {advice}."
        refused = Refusal("blocked", text)
        refused.detail = said[:200]
        return refused
    if status >= 500 or status < 400 or page:
        return Refusal("broken", f"The upstream failed with status {status}; try again.")
    if "file" in code or (status == 404 and said.lower().startswith(": file")):
        return Refusal("forgotten", "The upstream does not know this file any more; upload it again.")
    if status in (404, 405):
        if "conversation" in code or "conversation" in said.lower():
            return Refusal("rejected", "The upstream does not know this conversation.", "not_found")
        if "model" in code:
            return Refusal("rejected", f"The upstream does not offer this model{said}", "model_not_found")
        return Refusal("missing", f"The upstream has no such call ({status}).")
    if status == 413:
        text = "The upstream says that the prompt is too long; shorten it."
        return Refusal("rejected", text, "request_too_large")
    return Refusal("rejected", f"The upstream rejected the request ({status}){said}")


def _seconds(said: Any, headers: Mapping[str, str]) -> float | None:
    """The pause that a 429 asks for: its body's `clears_in`, else Retry-After as seconds."""
    for value in (said, headers.get("retry-after")):
        with contextlib.suppress(TypeError, ValueError, OverflowError):
            if math.isfinite(seconds := float(value or "")) and seconds >= 0:
                return min(seconds, 30 * 86400.0)
    return None


def iso(moment: float) -> str | None:
    """A time as ISO 8601 in UTC, None for none."""
    if not moment:
        return None
    moment = min(max(moment, 0.0), LAST_MOMENT)
    return datetime.datetime.fromtimestamp(moment, datetime.timezone.utc).isoformat(timespec="seconds")


def dicts(value: Any) -> list[dict[str, Any]]:
    """The objects in what should be a list of them."""
    return [one for one in value if isinstance(one, dict)] if isinstance(value, list) else []


MAX_COOKIES, MAX_COOKIE = 50, 4096  # in a jar, characters of one: what browsers keep


def with_cookies(cookies: Mapping[str, str], headers: Mapping[str, str]) -> dict[str, str]:
    """The cookies after an answer: with those that it sets, without those that it ends. What is too large, or one too
    many, is left out."""
    kept = dict(cookies)
    for line in headers.get("set-cookie", "").split("\n"):
        key, equals, value = (part.strip() for part in line.partition(";")[0].partition("="))
        fits = equals and key and len(key) + len(value) <= MAX_COOKIE
        if fits and re.fullmatch(r"[\x21-\x7e]*", key + value) and (key in kept or len(kept) < MAX_COOKIES):
            ended = not value or re.search(r";\s*max-age\s*=\s*(0|-\d+)\s*(;|$)", line, re.I)
            kept[key] = "" if ended else value
    return {key: value for key, value in kept.items() if value}


def _cookie_line(cookies: Mapping[str, str]) -> list[bytes]:
    return [("Cookie: " + "; ".join(f"{k}={v}" for k, v in cookies.items())).encode()] if cookies else []


class Connections:
    """Calls on behalf of accounts: each account's on connections of its own, through its proxy, with its cookies."""

    def __init__(self, settings: Settings, pool: Pool, loop: Loop, metrics: Metrics) -> None:
        self.settings, self.pool, self.metrics = settings, pool, metrics
        self.silence = float(settings.upstream_timeout)
        self.handles = Handles(loop)
        self.guest_handles = Handles(loop, together=True)

    def call(
        self, account: Account, method: str, url: str, headers: list[bytes], body: bytes | Blob | None, watch: Watch,
        silence: float | None = None, place: str = "", plain: bool = False,
    ) -> Call:  # fmt: skip
        """A call on a connection of the account's own; a guest's is kept once the upstream has accepted its token. `plain`:
        as a program that is no browser makes it."""
        guest = account.row.guest
        handles = self.guest_handles if guest else self.handles
        kept = not guest or self.pool.find(account.id) is account
        call = handles.call(
            account.id,
            account.egress._replace(browser="") if plain else account.egress,
            method,
            url,
            headers,
            body,
            watch,
            silence or self.silence,
            kept,
            place,
        )
        call.reached = functools.partial(self.pool.reached, account, account.egress)
        return call

    def answer(
        self, name: str, account: Account, method: str, url: str, headers: list[bytes], body: bytes | Blob | None,
        watch: Watch, silence: float | None = None, once: bool = False, place: str = "", plain: bool = False,
    ) -> Answer:  # fmt: skip
        """The whole answer of a call; counted under `name`, its cookies kept if it is the site's and a browser's. `once`: it
        must not be made twice; `plain`: see `call`."""
        try:
            with self.call(account, method, url, headers, body, watch, silence, place, plain) as call:
                if once:
                    call.handle.sent_once()
                answer = call.whole()
        except Refusal:
            self.heard(name, account, 0, {})
            raise
        own = url.startswith(f"{account.gateway}/") and not plain
        self.heard(name, account, answer.status, answer.headers if own else {})
        return answer

    def heard(self, name: str, account: Account, status: int, headers: Mapping[str, str]) -> None:
        """Counts an answer and keeps the cookies it sets."""
        self.metrics.add("chatproxy_upstream_responses_total", labels=f'call="{name}",status="{status}"')
        if "set-cookie" in headers:
            account.cookies = with_cookies(account.cookies, headers)

    def sweep(self, now: float) -> None:
        """Closes connections that have been unused for long; `now` is a time.monotonic()."""
        self.handles.sweep(now)
        self.guest_handles.sweep(now)


class Renewals:
    """Keeps accounts' access tokens usable: exchanges their refresh and session tokens, in the background, one exchange at
    a time an account. A client that hangs up never interrupts one."""

    def __init__(self, connections: Connections) -> None:
        self.connections, self.pool, self.settings = connections, connections.pool, connections.settings
        self._renewals_lock = threading.Lock()  # guards the accounts' `renewal`
        self._renewals = ThreadPoolExecutor(32, thread_name_prefix="renewal")
        # Of their own, so that made-up tokens keep no account of the pool from its renewal.
        self._guest_renewals = ThreadPoolExecutor(4, thread_name_prefix="guest-renewal")

    def token(self, account: Account, watch: Watch, refused: str = "") -> None:
        """Sees to it that the account has a usable access token, other than one that was just `refused`."""
        if not account.renewable:
            return
        renewal = self._begun(account, refused)
        if renewal is not None:
            try:
                watch.result(renewal, self.connections.silence)
            except TimeoutError:
                raise Refusal("silent", "The token endpoint did not answer in time; try again.") from None

    def _begun(self, account: Account, refused: str) -> Future[None] | None:
        """The exchange under way for an account, begun if there is none; None when its token is good again."""
        executor = self._guest_renewals if account.row.guest else self._renewals
        with self._renewals_lock:
            if self._good(account, refused):
                return None
            if account.renewal is None or account.renewal.done():
                account.renewal = executor.submit(self._renew, account, refused)
            return account.renewal

    @staticmethod
    def _good(account: Account, refused: str) -> bool:
        return account.token_valid(time.time()) and account.row.access_token != refused

    def renew_due(self, now: float) -> None:
        """Begins the renewals whose time has come, and sets aside access tokens that have expired; to be called often."""
        for account in self.pool.accounts():
            row = account.row
            if row.state != "ready" or not row.expires:
                continue
            if account.renewable and row.expires - account.renewed_ahead <= now:
                self._renew_ahead(account, now)
            elif row.kind == ACCESS and row.expires <= now:
                self.pool.set_aside(account, "expired", "its access token has expired", row.access_token)

    def refresh_all(self, now: float) -> None:
        """SCHEDULED_REFRESH: exchanges every refresh token, however long its access token would last."""
        for account in self.pool.accounts():
            if account.row.kind == REFRESH and account.row.state == "ready":
                self._renew_ahead(account, now)

    def _renew_ahead(self, account: Account, now: float) -> None:
        """Begins an exchange that nobody waits for; until it is done the token that there is goes on serving."""
        if account.retry_renewal[0] <= now:
            self._begun(account, account.row.access_token)

    def _renew(self, account: Account, refused: str) -> None:
        """Exchanges the account's secret for an access token, unless another process just did it. "Accounts: Refresh
        token, Session token"."""
        not_before, failures = account.retry_renewal
        if time.time() < not_before:
            raise Refusal("unreachable", "Renewing this account's token failed; it is tried again soon.")
        try:
            with self.pool.store.exclusively(account.id, EXCHANGE_PATIENCE):
                if not self.pool.renewed_elsewhere(account) and not self._good(account, refused):
                    self._exchange(account, failures)
                    log(logging.INFO, "token renewed", account=account.name)
        except TimeoutError:
            text = "Another process is still exchanging this account's token; try again."
            raise Refusal("silent", text) from None
        account.retry_renewal = (0.0, 0)

    def _exchange(self, account: Account, failures: int) -> None:
        """Asks for a new token, once it is sure that there is room to keep it, and keeps it."""
        secret = account.row.secret
        try:
            if account.unstored is None:
                self.pool.store.try_room()
                ask = self._ask_session if account.row.kind == SESSION else self._ask_refresh
                account.unstored = ask(account, secret)
            tokens = account.unstored
            self.pool.renewed(account, *tokens)
            account.unstored = None
        except StoreUnavailable as error:
            account.retry_renewal = (time.time() + 5.0, failures)
            raise Refusal("broken", error.message, error.code) from None
        except (Refusal, ValueError) as error:
            account.unstored = None
            reason = error.reason if isinstance(error, Refusal) else "broken"
            if reason == "dead" and self.pool.set_aside(account, "dead", str(error), secret):
                raise Refusal("expired", "This account's sign-in is no longer valid.") from None
            pause = min(2.0 ** min(failures, 10), 600)
            account.retry_renewal = (time.time() + pause, failures + 1)
            level = logging.DEBUG if account.row.guest else logging.WARNING
            log(level, "token not renewed", account=account.name, reason=str(error), seconds=pause)
            if reason in ("unreachable", "silent", "blocked"):
                raise
            raise Refusal("broken", "The token endpoint gave no usable answer; try again.") from None

    def _ask_refresh(self, account: Account, secret: str) -> tuple[str, str | None]:
        url = f"{self.settings.openai_auth_url}/oauth/token"
        body = {"grant_type": "refresh_token", "refresh_token": secret}
        # A token does not tell which client it was given to, but those of 45 characters are the iOS generation's.
        ios = {"client_id": REFRESH_CLIENT, "redirect_uri": REFRESH_REDIRECT}
        dead = ""
        for client in [{"client_id": BROWSER_CLIENT}, ios] if secret.startswith("rt_") else [ios]:
            data = compact(body | client).encode()
            answer = self.connections.answer("refresh", account, "POST", url, _JSON_HEADERS, data, Watch())
            said = answer.object() or {}
            if answer.status == 200 and said.get("access_token"):
                return str(said["access_token"]), str(said.get("refresh_token") or "") or None
            error = said.get("error")
            error = error.get("code") if isinstance(error, dict) else error
            if error == "unsupported_country_region_territory":
                text = "The token endpoint refuses the country that it is asked from; give the account a proxy elsewhere."
                raise Refusal("blocked", text)
            if error in DEAD_SIGN_INS or (answer.status == 401 and secret.startswith("rt_")):
                dead = dead or str(error)
                if dead.startswith("refresh_token_"):  # it is this client's, and no good to another
                    break
            elif not dead or answer.status >= 500:
                raise Refusal("broken", f"The token endpoint answered with status {answer.status}.")
        raise Refusal("dead", dead)

    def _ask_session(self, account: Account, secret: str) -> tuple[str, str | None]:
        size = 3900  # what a browser's cookie holds; longer ones are split
        pieces = [secret[i : i + size] for i in range(0, len(secret), size)]
        names = [f"{SESSION_COOKIE}.{i}" if len(pieces) > 1 else SESSION_COOKIE for i in range(len(pieces))]
        cookies = (
            account.cookies | {DEVICE_COOKIE: account.row.device} | dict(zip(names, pieces, strict=True))
        )
        url = f"{account.gateway}/api/auth/session"
        headers = [b"Expect:", *_cookie_line(cookies)]
        answer = self.connections.answer("session", account, "GET", url, headers, None, Watch())
        said = answer.object()
        if answer.status == 200 and (said == {} or (said or {}).get("error") == "RefreshAccessTokenError"):
            raise Refusal("dead", "the session is over")
        if answer.status != 200 or not said or not said.get("accessToken"):
            raise refusal(answer.status, answer.headers, answer.body)
        # A renewed cookie may come whole or in numbered pieces; it is kept as the secret, not in the jar.
        renewed = {name: value for name, value in account.cookies.items() if name.startswith(SESSION_COOKIE)}
        account.cookies = {name: value for name, value in account.cookies.items() if name not in renewed}
        token = "".join(renewed[name] for name in sorted(renewed, key=lambda name: (len(name), name)))
        return str(said["accessToken"]), token or None


def next_refresh(now: float) -> float:
    """03:00 local time, four days on."""
    day = time.localtime(now)
    return time.mktime((day.tm_year, day.tm_mon, day.tm_mday + 4, 3, 0, 0, 0, 0, -1))


# ============================================================================================================
# sign-in: with the browser, a device code, or a password
# ============================================================================================================

CALLBACK_PORT = 1455  # of the public client's only redirect URI
SIGN_IN_TIME = 900.0  # seconds that a person has for it


def challenge(verifier: str) -> str:
    """PKCE's S256 challenge for a verifier."""
    return base64.urlsafe_b64encode(hashlib.sha256(verifier.encode()).digest()).rstrip(b"=").decode()


def challenged() -> ApiError:
    """A sign-in that no program can go on with."""
    text = "The sign-in page asks for a human; sign in with `chatproxy.py login` instead."
    return ApiError("challenge_required", text)


def walled(answer: Answer) -> bool:
    """Whether an answer is a human-verification page."""
    return _BLOCK_MARKS.search(answer.body[:20_000].decode("utf-8", "replace")) is not None


class SignIn:
    """ "Accounts: Browser sign-in, Device code": a person signs in with the browser, chatproxy gets the tokens."""

    def __init__(self, settings: Settings, loop: Loop) -> None:
        self.issuer = settings.openai_auth_url
        self.handles = Handles(loop)
        self.watch = Watch()
        self.egress = Egress(settings.impersonate, next(iter(settings.proxy_url), ""))
        self.state = secrets.token_urlsafe(24)
        self.verifier = secrets.token_urlsafe(48)
        self.redirect = f"http://localhost:{CALLBACK_PORT}/auth/callback"

    def address(self) -> str:
        """The URL at which the person signs in; the browser is sent back to `redirect` with `code` and `state`."""
        query = {
            "response_type": "code",
            "client_id": BROWSER_CLIENT,
            "redirect_uri": self.redirect,
            "scope": "openid profile email offline_access",
            "code_challenge": challenge(self.verifier),
            "code_challenge_method": "S256",
            "id_token_add_organizations": "true",
            "codex_cli_simplified_flow": "true",
            "state": self.state,
            "originator": "codex_cli_rs",
        }
        return f"{self.issuer}/oauth/authorize?{urllib.parse.urlencode(query)}"

    def _ask(self, method: str, url: str, headers: list[bytes], body: bytes | None) -> Answer:
        with self.handles.call("sign-in", self.egress, method, url, headers, body, self.watch, 30.0) as call:
            return call.whole()

    def _post(self, path: str, kind: str, body: str) -> Answer:
        headers = [f"Content-Type: {kind}".encode(), b"Expect:"]
        return self._ask("POST", self.issuer + path, headers, body.encode())

    def tokens(
        self, code: str, verifier: str, redirect: str, client: str = BROWSER_CLIENT
    ) -> tuple[str, str]:
        """The access token and the refresh token ("" for none) for a code; Refusal when the issuer gives none."""
        form = {"grant_type": "authorization_code", "client_id": client, "code": code}
        form |= {"redirect_uri": redirect, "code_verifier": verifier}
        answer = self._post("/oauth/token", "application/x-www-form-urlencoded", urllib.parse.urlencode(form))
        said = answer.object() or {}
        if answer.status == 403 or walled(answer):
            raise challenged()
        if answer.status == 429 or answer.status >= 500:
            raise refusal(answer.status, answer.headers, b"")
        if answer.status != 200 or not isinstance(said.get("access_token"), str):
            text = f"The token endpoint answered with status {answer.status}; sign in again."
            raise Refusal("rejected", text)
        return said["access_token"], str(said.get("refresh_token") or "")

    def device(self) -> tuple[str, str, float]:
        """A device's sign-in begins: its id, the code for the person to type, and the seconds between two polls."""
        body = compact({"client_id": BROWSER_CLIENT})
        said = self._post("/api/accounts/deviceauth/usercode", "application/json", body).object() or {}
        id = said.get("device_auth_id")
        code = said.get("user_code")
        if not isinstance(id, str) or not isinstance(code, str):
            raise Refusal(
                "rejected", "The issuer offers no sign-in by device code; use `login` without --device."
            )
        interval = str(said.get("interval"))
        return id, code, min(60.0, max(1.0, float(interval))) if interval.isdecimal() else 5.0

    def device_tokens(self, id: str, code: str) -> tuple[str, str] | None:
        """The tokens, None while the person has not signed in yet."""
        body = compact({"device_auth_id": id, "user_code": code})
        answer = self._post("/api/accounts/deviceauth/token", "application/json", body)
        if answer.status in (403, 404):
            return None
        said = answer.object() or {}
        given = said.get("authorization_code")
        verifier = said.get("code_verifier")
        if answer.status != 200 or not isinstance(given, str) or not isinstance(verifier, str):
            raise Refusal("rejected", f"The issuer answered with status {answer.status}; sign in again.")
        return self.tokens(given, verifier, f"{self.issuer}/deviceauth/callback")


class PasswordSignIn(SignIn):
    """ "Accounts: Password": signs in with a password where the issuer lets a program do that."""

    STEPS = 12  # redirects and forms

    def __init__(self, settings: Settings, loop: Loop, watch: Watch) -> None:
        super().__init__(settings, loop)
        self.watch = watch
        self._cookies: dict[str, str] = {}

    def tokens_for(self, username: str, password: str, code: str) -> tuple[str, str]:
        """The access token and the refresh token ("" for none); ApiError invalid_credentials, mfa_required or
        challenge_required. `code` is a one-time code, "" for none."""
        try:
            return self._tokens_for(username, password, code)
        finally:
            self.handles.close()

    def _tokens_for(self, username: str, password: str, code: str) -> tuple[str, str]:
        query = {
            "client_id": REFRESH_CLIENT,
            "audience": "https://api.openai.com/v1",
            "redirect_uri": REFRESH_REDIRECT,
            "scope": "openid email profile offline_access model.request model.read organization.read offline",
            "response_type": "code",
            "code_challenge": challenge(self.verifier),
            "code_challenge_method": "S256",
            "prompt": "login",
        }
        place = self._follow(f"{self.issuer}/authorize?{urllib.parse.urlencode(query)}")
        traits = dict.fromkeys(("js-available", "webauthn-platform-available"), "true")
        traits |= dict.fromkeys(("webauthn-available", "is-brave"), "false")
        self._fill("identifier", place, {"username": username, **traits})
        place = self._fill("password", place, {"username": username, "password": password})
        if "/u/mfa-otp-challenge" in place:
            if not code:
                text = "This account needs a one-time code; send it as `code` with the password."
                raise ApiError("mfa_required", text)
            place = self._fill("mfa-otp-challenge", place, {"code": code})
        given = self._queried(place, "code")
        if not place.startswith(REFRESH_REDIRECT) or not given:
            raise challenged()
        return self.tokens(given, self.verifier, REFRESH_REDIRECT, REFRESH_CLIENT)

    @staticmethod
    def _queried(place: str, name: str) -> str:
        return dict(urllib.parse.parse_qsl(urllib.parse.urlsplit(place).query)).get(name, "")

    def _fill(self, page: str, place: str, form: Mapping[str, str]) -> str:
        """Sends one of the forms of the sign-in begun at `place`; where it leads."""
        state = self._queried(place, "state")
        if not state:
            raise challenged()
        path = f"/u/{page}" if page.startswith("mfa") else f"/u/login/{page}"
        url = f"{self.issuer}{path}?{urllib.parse.urlencode({'state': state})}"
        return self._follow(url, {"state": state, **form, "action": "default"})

    def _follow(self, url: str, form: Mapping[str, str] | None = None) -> str:
        """Follows a request redirect by redirect; returns where it ends: a page, or the app with a code."""
        for _ in range(self.STEPS):
            answer = self._step(url, form)
            if form is not None and answer.status in (400, 401, 403) and not walled(answer):
                text = "The user name, the password or the one-time code is wrong."
                raise ApiError("invalid_credentials", text)
            if answer.status == 429:
                raise refusal(answer.status, answer.headers, b"")
            if answer.status >= 500:
                raise Refusal("broken", f"The sign-in failed with status {answer.status}; try again.")
            target = answer.headers.get("location", "")
            if not 300 <= answer.status < 400 or not target:
                if answer.status != 200 or walled(answer):
                    raise challenged()
                return url
            try:
                url = urllib.parse.urljoin(url, target)
                form = None
            except ValueError:
                raise challenged() from None
            if not url.startswith(f"{self.issuer}/"):
                return url
        raise challenged()

    def _step(self, url: str, form: Mapping[str, str] | None) -> Answer:
        headers = [b"Expect:", *_cookie_line(self._cookies)]
        body = None if form is None else urllib.parse.urlencode(form).encode()
        if body is not None:
            headers.append(b"Content-Type: application/x-www-form-urlencoded")
        answer = self._ask("POST" if body is not None else "GET", url, headers, body)
        self._cookies = with_cookies(self._cookies, answer.headers)
        return answer


# ============================================================================================================
# question: what is asked and what is answered, in nobody's shape
# ============================================================================================================


@dataclass(frozen=True)
class Attachment:
    """A file in a message, given by its bytes, a URL to fetch it from, or the id of one that is kept (see `File`).

    `where` is its place in the client's request, for errors; `image` whether it must be one."""

    where: str
    image: bool = False
    name: str = ""
    mime: str = ""
    blob: Blob | None = None
    url: str = ""
    file: str = ""


class Text(NamedTuple):
    """A piece of a message: of the answer, or of what was said before."""

    text: str


# The kinds of functions, by what their calls are: a JSON object that fits the client's schema; one text; an action of a
# fixed form, which clients that offer such a tool know how to take.
FUNCTION, CUSTOM, LOCAL_SHELL, SHELL, APPLY_PATCH = (
    "function",
    "custom",
    "local_shell",
    "shell",
    "apply_patch",
)


class FunctionCall(NamedTuple):
    """A call of one of the client's own functions, in an answer or said before; `arguments` is a JSON object as text that
    fits the function's parameters: of a custom one {"input": TEXT}, of one with a fixed form see FIXED_FORMS."""

    id: str
    name: str
    arguments: str
    kind: str = FUNCTION
    namespace: str = ""


def input_of(call: FunctionCall) -> str:
    """The input of a custom function's call."""
    with contextlib.suppress(ValueError, KeyError, TypeError):
        return str(json.loads(call.arguments)["input"])
    return call.arguments


@dataclass(frozen=True)
class ToolResult:
    """The result of a call: the call's id, the function's full name ("" when it is not known), the content, and the kind
    of the function."""

    id: str
    name: str
    parts: tuple[Text | Attachment, ...]
    kind: str = FUNCTION


@dataclass(frozen=True)
class Thought:
    """Earlier reasoning of a model. The `encrypted` form only the upstream that gave it can read."""

    text: str
    encrypted: str = ""


MessagePart = Text | Attachment | FunctionCall | ToolResult | Thought


@dataclass(frozen=True)
class Message:
    """One message of a question: role system, user, assistant or tool; its parts in their order."""

    role: str
    parts: tuple[MessagePart, ...]

    @property
    def text(self) -> str:
        texts = [part.text for part in self.parts if isinstance(part, Text)]
        return texts[0] if len(texts) == 1 else "\n".join(texts)

    @property
    def attachments(self) -> list[Attachment]:
        """Its files, those of results included."""
        found = list[Attachment]()
        for part in self.parts:
            inner = part.parts if isinstance(part, ToolResult) else (part,)
            found += [one for one in inner if isinstance(one, Attachment)]
        return found


class Grammar(NamedTuple):
    """What the input of a custom function must fit: `syntax` is lark or regex."""

    syntax: str
    definition: str


class Function(NamedTuple):
    """A function of the client's: its parameters are a JSON Schema, whatever its kind."""

    name: str
    description: str
    parameters: Mapping[str, Any]
    kind: str = FUNCTION
    namespace: str = ""
    grammar: Grammar | None = None
    strict: bool = False  # whether calls must fit the parameters, where the upstream sees to that


def full_name(name: str, namespace: str) -> str:
    """The name by which a model calls a function."""
    return f"{namespace}.{name}" if namespace else name


# The functions of a kind that has a fixed form, in the words and schemas that a model needs to call them.
_COMMAND_LIMITS = {"timeout_ms": {"type": "integer", "minimum": 1}}
_PATCH = {"path": {"type": "string"}, "diff": {"type": "string"}}
FIXED_FORMS = {
    LOCAL_SHELL: Function(
        LOCAL_SHELL,
        "Runs a command on the user's machine and tells what it prints; `command` is the program and its arguments.",
        {
            "type": "object",
            "properties": {
                "command": {"type": "array", "items": {"type": "string"}, "minItems": 1},
                "working_directory": {"type": "string"},
                "env": {"type": "object", "additionalProperties": {"type": "string"}},
            }
            | _COMMAND_LIMITS,
            "required": ["command"],
        },
        LOCAL_SHELL,
    ),
    SHELL: Function(
        SHELL,
        "Runs shell commands on the user's machine, which may run side by side, and tells what each prints.",
        {
            "type": "object",
            "properties": {
                "commands": {"type": "array", "items": {"type": "string"}, "minItems": 1},
                "max_output_length": {"type": "integer", "minimum": 1},
            }
            | _COMMAND_LIMITS,
            "required": ["commands"],
        },
        SHELL,
    ),
    APPLY_PATCH: Function(
        APPLY_PATCH,
        "Creates, changes or deletes a file. The diff of a new file is its lines, each behind a `+`. The diff of an update is "
        "hunks: a line `@@`, or `@@ ` and the header of the function or class that it is in, then three unchanged lines "
        "behind a space each, the old ones behind `-`, the new ones behind `+`, and three unchanged ones again. No line "
        "numbers, no file names.",
        {
            "type": "object",
            "properties": {
                "operation": {
                    "oneOf": [
                        {
                            "type": "object",
                            "properties": {"type": {"const": kind}} | fields,
                            "required": ["type", *fields],
                        }
                        for kind, fields in (
                            ("create_file", _PATCH),
                            ("update_file", _PATCH),
                            ("delete_file", {"path": {"type": "string"}}),
                        )
                    ]
                }
            },
            "required": ["operation"],
        },
        APPLY_PATCH,
    ),
}


class Functions(dict[str, Function]):
    """Functions by their full names."""

    def full(self, name: str, namespace: str = "") -> str:
        """The full name that a name stands for, which may leave out the namespace where that is clear; "" for none."""
        if (whole := full_name(name, namespace)) in self:
            return whole
        meant = [] if namespace else self._inner.get(name, [])
        return meant[0] if len(meant) == 1 else ""

    def _grouped(self, key: Callable[[Function], str]) -> dict[str, list[str]]:
        """The full names of those in namespaces, by what they have in common."""
        found: dict[str, list[str]] = {}
        for full, function in self.items():
            if function.namespace:
                found.setdefault(key(function), []).append(full)
        return found

    @functools.cached_property
    def _inner(self) -> dict[str, list[str]]:
        """The full names of those in namespaces, by the name that they have there."""
        return self._grouped(lambda function: function.name)

    @functools.cached_property
    def within(self) -> dict[str, list[str]]:
        """The full names of those in namespaces, by the namespace."""
        return self._grouped(lambda function: function.namespace)

    @functools.cached_property
    def made(self) -> dict[Any, Any]:
        """What was made of them, by whoever makes it: the same ones may be offered with many questions."""
        return {}


@dataclass(frozen=True)
class Offer:
    """The functions that the model may call: `choice` is auto, required or the full name of the one that it must call."""

    functions: Functions
    choice: str
    parallel: bool


@dataclass(frozen=True)
class Shape:
    """The JSON that an answer is to be: any object, or what fits a schema, which has a name."""

    schema: Mapping[str, Any] | None
    name: str = "answer"
    strict: bool = False


# How hard a model may think, from the least on.
EFFORTS = ("none", "minimal", "low", "medium", "high", "xhigh", "max", "ultra")
# Tools of the upstream's own that a question may offer, by OpenAI's names for them.
WEB_SEARCH, DRAWING, PYTHON = "web_search", "image_generation", "code_interpreter"


@dataclass(frozen=True)
class Question:
    """A question, in no client's and no upstream's shape: the messages, the model by the client's name for it, a
    conversation to go on with, how hard to think (`effort`, in OpenAI's words), the upstream's own tools that may be used
    (`hosted`) and the one that must be (`forced`), the client's functions, and the shape that the answer is to have.

    `native` is the same as a request of OpenAI's Responses API, where it was one: an upstream that speaks it is asked that,
    and answers in its own words (see `Verbatim`). `options` are for such an upstream too: verbosity, service_tier,
    prompt_cache_key, and what a drawing is to be like."""

    messages: tuple[Message, ...]
    model: str
    conversation: str | None = None
    parent: str | None = None
    effort: str = ""
    hosted: tuple[str, ...] = ()
    forced: str = ""
    offer: Offer | None = None
    shape: Shape | None = None
    native: Mapping[str, Any] | None = None
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def attachments(self) -> list[Attachment]:
        return [one for message in self.messages for one in message.attachments]


# -- an answer's events, a closed set: whoever takes them has a place for each ----------------------------------------


class Begin(NamedTuple):
    """The answer begins: the model that really gives it ("" when the upstream does not say), and its ids there."""

    model: str
    conversation: str
    message: str


class Reasoning(NamedTuple):
    """A piece of what the model thought before answering; never part of the answer."""

    text: str


class Encrypted(NamedTuple):
    """What the model thought just now, in a form that only the upstream can read: to be sent back with the next question."""

    content: str


class ToolUse(NamedTuple):
    """The input or the output of one of the model's own tools, whole; `language` is "" for output."""

    language: str
    text: str


class Image(NamedTuple):
    """A drawing that can be looked at, as long as its URL lasts."""

    url: str


class CallPart(NamedTuple):
    """A piece of the arguments of a function's call that is being made; the call itself comes when it is whole. The first
    piece of a call, which may be empty, has its id and name."""

    arguments: str
    id: str = ""
    name: str = ""
    namespace: str = ""


class Usage(NamedTuple):
    """What an answer took, in tokens, as the upstream counts them: of the question those that it had `cached` too, of the
    answer those of its reasoning too."""

    prompt: int
    cached: int
    answer: int
    reasoning: int


class Verbatim(NamedTuple):
    """Events of OpenAI's Responses API in the words of an upstream that speaks it: one as an object, or as bytes some that
    nobody needs to look into, which add a piece of text to an item."""

    event: dict[str, Any] | None
    data: bytes = b""
    events: int = 1


class Finish(NamedTuple):
    """The end: `reason` is stop, length, content_filter or tool_calls; the ids are those to go on from."""

    reason: str
    conversation: str = ""
    message: str = ""


Light = Text | Reasoning  # what answers are mostly made of
Event = Light | Begin | Encrypted | ToolUse | Image | FunctionCall | CallPart | Usage | Verbatim | Finish


class InlineFile(str):
    """A file in a large body: the text ends before the base64, `blob` has the bytes."""

    blob: Blob


def changed(value: Any, change: Callable[[str], Any]) -> Any:
    """Parsed JSON with its strings changed."""
    if isinstance(value, dict):
        return {str(change(name)): changed(one, change) for name, one in value.items()}
    if isinstance(value, list):
        return [changed(one, change) for one in value]
    return change(value) if isinstance(value, str) else value


def as_sent(text: str) -> str:
    """A string that was taken for a file and is none."""
    if not isinstance(text, InlineFile):
        return text
    return text + base64.b64encode(text.blob.read()).decode()


@dataclass(frozen=True)
class Embedded:
    """A text within a native request that ends in the base64 of these bytes."""

    head: str
    blob: Blob


class Sink:
    """Takes an answer's events, batch by batch, from the request's thread or from the loop, never from both at a time."""

    outlet: Outlet | None = None  # where they go on to
    begun = False  # whether it was given anything
    over = False  # whether no more is wanted
    careful = False  # whether `light` is to be asked

    def light(self, events: list[Light]) -> bool:
        """Whether `take` is done with these at once, so that the loop may have it done."""
        return True

    def take(self, events: list[Event]) -> None:
        """Takes what has come together."""
        raise NotImplementedError


class Collected(Sink):
    """All events of an answer."""

    def __init__(self) -> None:
        self.events: list[Event] = []

    def take(self, events: list[Event]) -> None:
        self.begun = True
        self.events += events

    def end(self) -> Finish:
        """The end of the answer, with its place."""
        return next((event for event in reversed(self.events) if isinstance(event, Finish)), Finish("stop"))


# ============================================================================================================
# tools: whether a value fits a JSON Schema; functions and structured output for models that know neither
# ============================================================================================================

_SCHEMA_TYPES: dict[str, Callable[[Any], bool]] = {
    "null": lambda value: value is None,
    "boolean": lambda value: isinstance(value, bool),
    "string": lambda value: isinstance(value, str),
    "number": lambda value: isinstance(value, (int, float)) and not isinstance(value, bool),
    "integer": lambda value: (
        not isinstance(value, bool)
        and (isinstance(value, int) or (isinstance(value, float) and value.is_integer()))
    ),
    "array": lambda value: isinstance(value, list),
    "object": lambda value: isinstance(value, dict),
}


_SIZES: tuple[tuple[str, Callable[[Any], Any], str, str], ...] = (
    ("string", len, "minLength", "maxLength"),
    ("array", len, "minItems", "maxItems"),
    ("object", len, "minProperties", "maxProperties"),
    ("number", lambda value: value, "minimum", "maximum"),
)


def _bound(schema: Mapping[str, Any], name: str, default: float) -> float:
    """A number of a schema; where it has none, what bounds nothing."""
    value: Any = schema.get(name)
    return value if _SCHEMA_TYPES["number"](value) and (name != "multipleOf" or value > 0) else default


def _listed(schema: Mapping[str, Any], name: str) -> list[Any]:
    value = schema.get(name)
    return value if isinstance(value, list) else []


MAX_DEPTH = 100  # levels of JSON


def read_json(text: str | bytes | bytearray) -> Any:
    """Parses JSON as it is defined, and no deeper than MAX_DEPTH, which recursion stands; ValueError for anything else."""
    try:
        if not isinstance(text, str):
            text = text.decode("utf-8-sig")
        return _not_too_deep(_DECODER.decode(text))
    except RecursionError:
        raise ValueError("too deep") from None


def _not_too_deep(value: Any) -> Any:
    level = [value]
    for _ in range(MAX_DEPTH):
        level = [
            inner
            for one in level
            for inner in (one.values() if type(one) is dict else one if type(one) is list else ())
            if type(inner) in (dict, list)
        ]
        if not level:
            return value
    raise ValueError("too deep")


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


def _finite(text: str) -> float:
    value = float(text)
    if math.isinf(value):
        raise ValueError(f"{text[:50]} is too large a number")
    return value


_DECODER = json.JSONDecoder(parse_constant=_no_constant, parse_float=_finite)


class OverBudget(Exception):
    """A validation has done all the work that it may."""


class Budget:
    """Limits the work of a validation, over everything that it is tried on: a unit is about a microsecond or two.
    References can branch without end, and every comparison takes the time of what is compared. `check` is called
    now and then, and raises when nobody waits for the result any more."""

    MOST = 100_000
    CHECKED_EVERY = 2_000

    def __init__(self, check: Callable[[], None] | None = None) -> None:
        self._left, self._check = self.MOST, check
        self._check_at = self.MOST - self.CHECKED_EVERY

    def spend(self, units: int) -> None:
        """OverBudget when there is nothing left."""
        self._left -= units
        if self._left < 0:
            raise OverBudget
        if self._check and self._left < self._check_at:
            self._check_at = self._left - self.CHECKED_EVERY
            self._check()

    def canonical(self, value: Any) -> Any:
        """Hashable, and equal for what JSON holds equal: 1 and 1.0, but not 1 and true."""
        self.spend(1 + len(value) // 64 if isinstance(value, str) else 1)
        if isinstance(value, dict):
            return frozenset((name, self.canonical(one)) for name, one in value.items())
        if isinstance(value, list):
            return tuple([self.canonical(one) for one in value])
        if isinstance(value, (int, float)) and 2**53 < abs(value) < math.inf and value == int(value):
            return hex(int(value))  # whose hash nobody can foresee, as that of a large number
        return (type(value) is bool, value)


class Schema:
    """A JSON Schema (draft 2020-12) as far as functions and structured output need it: types, enum, const, objects,
    arrays, lengths, ranges, local references, allOf, anyOf, oneOf and not.

    `pattern` and `format` are annotations here: a client's regular expression could hold up the whole process. What is
    too much for the `budget` counts as fitting.
    """

    def __init__(self, schema: Any, budget: Budget | None = None) -> None:
        self._root = schema
        self._budget = budget or Budget()
        self._enums: dict[int, set[Any]] = {}  # what the enums allow, by the identity of their lists
        self._referred: dict[str, Any] = {}  # what references lead to

    def fault(self, value: Any) -> str:
        """Why a value does not fit, with the path to the place; "" when it fits."""
        try:
            return self._fault(value, self._root, "it", 0)
        except OverBudget:
            return ""

    def _fault(self, value: Any, schema: Any, where: str, depth: int) -> str:
        self._budget.spend(4 + len(where) // 64)
        if schema is False:
            return f"{where} is not allowed"
        if not isinstance(schema, dict) or depth > MAX_DEPTH:
            return ""
        for check in (self._of_type, self._in_range, self._in_object, self._in_array, self._in_branches):
            if fault := check(value, schema, where, depth + 1):
                return fault
        return ""

    def _of_type(self, value: Any, schema: Mapping[str, Any], where: str, depth: int) -> str:
        kinds = schema.get("type")
        kinds = kinds if isinstance(kinds, list) else [kinds]
        known = [kind for kind in kinds if isinstance(kind, str) and kind in _SCHEMA_TYPES]
        if known and not any(_SCHEMA_TYPES[kind](value) for kind in known):
            return f"{where} is not of type {' or '.join(known)}"
        if isinstance(choices := schema.get("enum"), list):
            if id(choices) not in self._enums:
                self._enums[id(choices)] = set(map(self._budget.canonical, choices))
            if self._budget.canonical(value) not in self._enums[id(choices)]:
                return f"{where} is none of {', '.join(map(_shown, choices[:10]))}"
        if "const" in schema and self._budget.canonical(value) != self._budget.canonical(schema["const"]):
            return f"{where} is not {_shown(schema['const'])}"
        return ""

    def _in_range(self, value: Any, schema: Mapping[str, Any], where: str, depth: int) -> str:
        for kind, size, least, most in _SIZES:
            if _SCHEMA_TYPES[kind](value):
                low = _bound(schema, least, -math.inf)
                high = _bound(schema, most, math.inf)
                if not low <= size(value) <= high:
                    return f"{where} is not within {least} and {most}"
        if _SCHEMA_TYPES["number"](value):
            if value <= _bound(schema, "exclusiveMinimum", -math.inf) and value != -math.inf:
                return f"{where} is not above exclusiveMinimum"
            if value >= _bound(schema, "exclusiveMaximum", math.inf) and value != math.inf:
                return f"{where} is not below exclusiveMaximum"
            step = _bound(schema, "multipleOf", 0)
            self._budget.spend(100 if isinstance(value, int) and value.bit_length() > 64 else 0)
            exact = isinstance(value, int) and isinstance(step, int)
            with contextlib.suppress(OverflowError):  # past what a float can hold nobody can tell
                if step and (value % step if exact else abs(value / step - round(value / step)) > 1e-9):
                    return f"{where} is not a multiple of {step}"
        return ""

    def _in_object(self, value: Any, schema: Mapping[str, Any], where: str, depth: int) -> str:
        if not isinstance(value, dict):
            return ""
        given = schema.get("properties")
        properties = given if isinstance(given, dict) else {}
        # The names of patternProperties are not looked at.
        others = True if "patternProperties" in schema else schema.get("additionalProperties", True)
        must = _listed(schema, "required")
        self._budget.spend(len(must) // 4)
        for name in must:
            if isinstance(name, str) and name not in value:
                return f"{where} has no {name}"
        for name, one in value.items():
            if name not in properties and others is False:
                return f"{where} must not have {name[:100]}"
            place = name[:100] if where == "it" else f"{where}.{name[:100]}"
            if fault := self._fault(one, properties.get(name, others), place, depth):
                return fault
        return ""

    def _in_array(self, value: Any, schema: Mapping[str, Any], where: str, depth: int) -> str:
        if not isinstance(value, list):
            return ""
        first = _listed(schema, "prefixItems")
        others = schema.get("items", True)
        for i, one in enumerate(value):
            if fault := self._fault(one, first[i] if i < len(first) else others, f"{where}[{i}]", depth):
                return fault
        if schema.get("uniqueItems") is True and len(set(map(self._budget.canonical, value))) < len(value):
            return f"{where} has the same item twice"
        return ""

    def _in_branches(self, value: Any, schema: Mapping[str, Any], where: str, depth: int) -> str:
        pointer = schema.get("$ref")
        referred = [self.referred(pointer)] if isinstance(pointer, str) else []
        for one in [*referred, *_listed(schema, "allOf")]:
            if fault := self._fault(value, one, where, depth):
                return fault
        if branches := _listed(schema, "anyOf"):
            faults = [self._fault(value, one, where, depth) for one in branches]
            if all(faults):
                return f"{where} fits no branch of anyOf ({'; '.join(faults[:5])[:300]})"
        if branches := _listed(schema, "oneOf"):
            fits = sum(not self._fault(value, one, where, depth) for one in branches)
            if fits != 1:
                return f"{where} fits {fits} branches of oneOf"
        if "not" in schema and not self._fault(value, schema["not"], where, depth):
            return f"{where} fits what it must not"
        return ""

    def referred(self, pointer: str) -> Any:
        """The schema that a reference within the schema leads to; True, which any value fits, for one that leads
        elsewhere."""
        if pointer not in self._referred:
            found = self._root if pointer.startswith("#") else True
            for step in urllib.parse.unquote(pointer[1:]).split("/")[1:]:
                step = step.replace("~1", "/").replace("~0", "~")
                found = found.get(step, True) if isinstance(found, dict) else True
            self._referred[pointer] = found
        return self._referred[pointer]


def unknown_type(schema: Any) -> str:
    """A `type` within a schema that JSON has not, "" for none."""
    if isinstance(schema, list):
        return next(filter(None, map(unknown_type, schema)), "")
    if not isinstance(schema, dict):
        return ""
    kinds = schema.get("type", ["object"])
    for kind in kinds or ["[]"] if isinstance(kinds, list) else [kinds]:
        if not isinstance(kind, str) or kind not in _SCHEMA_TYPES:
            return str(kind)[:100]
    named = [schema.get(name) for name in ("properties", "$defs", "definitions")]
    inner = [one for some in named if isinstance(some, dict) for one in some.values()]
    inner += [schema.get(name) for name in ("items", "prefixItems", "additionalProperties", "not")]
    return unknown_type([*inner, *(schema.get(name) for name in ("anyOf", "oneOf", "allOf"))])


def _shown(value: Any) -> str:
    """A value of a schema as a fault tells it: in short."""
    if isinstance(value, (dict, list)):
        return "an object" if isinstance(value, dict) else "a list"
    return compact(value[:60] if isinstance(value, str) else value)[:64]


# -- functions and shapes in words, for upstreams whose models know neither -------------------------------------------

CALL_TAG, CALL_END = "<tool_call>", "</tool_call>"
FUNCTIONS_LINE = "The functions, a JSON object a line:"
OWN_TOOLS_LINE = "Beside them you can use your own tools as always:"
SHAPE_LINE = "Answer with one JSON object"
SCHEMA_LINE = "It must fit this JSON Schema:"


_HOSTED_TOLD = {WEB_SEARCH: "searching the web", DRAWING: "drawing images", PYTHON: "running Python"}


class Told(str):
    """A text at the head of many questions, whose JSON is made once."""

    @functools.cached_property
    def quoted(self) -> str:
        """It as JSON."""
        return json.encoder.encode_basestring(self)


def _function_told(function: Function) -> str:
    """A function as a model is told of it."""
    told: dict[str, Any] = {"name": full_name(function.name, function.namespace)}
    told["description"] = function.description
    if function.kind == CUSTOM:
        told["description"] += "\nIts input is one text, to be given as the string `input`."
    if function.grammar:
        told["description"] += f" It must fit this grammar ({function.grammar.syntax}):\n"
        told["description"] += function.grammar.definition
    return compact(told | {"parameters": function.parameters})


def _offer_told(offer: Offer, hosted: tuple[str, ...]) -> Told:
    """The instructions by which a model that knows nothing of functions learns of them; what the upstream has itself
    (`hosted`) it knows."""
    made = offer.functions.made
    key = (offer.choice, offer.parallel, hosted)
    if (told := made.get(key)) is None:
        told = made[key] = Told(_instructions(offer, hosted))
    return told


def _instructions(offer: Offer, hosted: tuple[str, ...]) -> str:
    must = {
        "auto": "Call one whenever it helps to answer; otherwise answer as usual.",
        "required": "You must call at least one of them now, and write nothing else.",
    }.get(offer.choice, f"You must call {offer.choice} now, and write nothing else.")
    several = "For several calls write several of these in a row."
    several = several if offer.parallel else "Write one call at most."
    lines = [
        "You can call functions of the program through which you are asked. To call one, write exactly",
        f'{CALL_TAG}{{"name": "FUNCTION", "arguments": {{…}}}}{CALL_END}',
        f"where the arguments are a JSON object that fits the function's JSON Schema. {several} Write nothing after a",
        f"call: the program stops reading there, and tells you the results in its next message. {must}",
    ]
    if own := ", ".join(_HOSTED_TOLD[one] for one in hosted):
        lines.append(f"{OWN_TOOLS_LINE} {own}.")
    return "\n".join([*lines, FUNCTIONS_LINE, *map(_function_told, offer.functions.values())])


def _shape_told(shape: Shape) -> str:
    """The instructions for an answer in JSON."""
    told = f"{SHAPE_LINE} and nothing else: no prose around it, no code fence."
    return told if shape.schema is None else f"{told} {SCHEMA_LINE}\n{compact(shape.schema)}"


def call_text(name: str, arguments: str) -> str:
    """A call as the model writes it; `arguments` is JSON."""
    return f'{CALL_TAG}{{"name": {json.dumps(name)}, "arguments": {arguments or "{}"}}}{CALL_END}'


def result_heading(name: str, id: str) -> str:
    """The line above a function's result."""
    return f"Result of {name or 'the function'}{f' (call {id})' if id else ''}:"


def in_prose(question: Question) -> Question:
    """The question for a model that knows neither functions nor shapes: it is told of them first, and calls and results
    are the text that it would write and read."""
    told: list[str] = [_offer_told(question.offer, question.hosted)] if question.offer else []
    told += [_shape_told(question.shape)] if question.shape else []
    messages = [Message("system", (Text(told[0] if len(told) == 1 else "\n\n".join(told)),))] if told else []
    for message in question.messages:
        parts = tuple(itertools.chain(*(IN_PROSE[type(part)](part) for part in message.parts)))
        if parts or not message.parts:  # else it was nothing but thoughts
            messages.append(Message(message.role, parts))
    return replace(question, messages=tuple(messages))


# What stands for each kind of part.
IN_PROSE: Mapping[type, Callable[[Any], tuple[Text | Attachment, ...]]] = {
    Text: lambda part: (part,),
    Attachment: lambda part: (part,),
    FunctionCall: lambda part: (Text(call_text(full_name(part.name, part.namespace), part.arguments)),),
    ToolResult: lambda part: (Text(result_heading(part.name, part.id)), *part.parts),
    Thought: lambda part: (),
}


def call_fault(offer: Offer, call: Mapping[str, Any], budget: Budget) -> str:
    """The fault of a call as the model wrote it, "" for none."""
    name = call.get("name")
    arguments = call.get("arguments")
    if not isinstance(name, str) or name not in offer.functions:
        names = ", ".join(offer.functions)
        return f"there is no function of the name in the call; those there are: {names}"
    if offer.choice not in ("auto", "required", name):
        return f"the function to be called is {offer.choice}"
    if not isinstance(arguments, dict):
        return "the arguments are not a JSON object"
    function = offer.functions[name]
    if fault := Schema(function.parameters, budget).fault(arguments):
        return f"the arguments for {name} do not fit its schema: {fault}"
    grammar = function.grammar
    if grammar and fits_grammar(grammar, arguments["input"]) is False:
        return f"the input for {name} does not fit its grammar"
    return ""


# Parts of a regular expression that are none of its operators: escapes, and classes of characters.
_REGEX_ATOMS = re.compile(r"\\.|\[\^?\]?(?:\\.|[^\]\\])*\]", re.DOTALL)
_REGEX_REPEATS = re.compile(r"[*+?]|\{\d*,?\d*\}")
MAX_GRAMMAR = 500  # characters of a regular expression that is matched here
MAX_MATCHING = 100_000  # ways in which a text may match it, each of which may have to be tried
_REGEX_OTHER = re.compile(
    r"\\\d|\(\?(?!:)|\[\[|--|&&|~~|\|\|"
)  # what looks elsewhere, or has meanings to come


def fits_grammar(grammar: Grammar, text: str) -> bool | None:
    """Whether a text fits a regular expression; None for one that is not simple, and for any other grammar.

    A simple one takes few steps whatever the text is: it repeats no groups, looks nowhere else, and its alternatives and
    repeated characters leave few ways to match."""
    definition = grammar.definition
    if grammar.syntax != "regex" or len(definition) > MAX_GRAMMAR or _REGEX_OTHER.search(definition):
        return None
    operators = _REGEX_ATOMS.sub("a", definition).replace("(?:", "(")
    if re.search(r"\)[*+?{]", operators):
        return None
    ways = 2 ** operators.count("|") * (len(text) + 1) ** len(_REGEX_REPEATS.findall(operators))
    if ways > MAX_MATCHING:
        return None
    try:
        return re.fullmatch(definition, text) is not None
    except (re.error, OverflowError, RecursionError):
        return None


class CallScanner:
    """Finds the calls in an answer: text before them passes as it comes, from what may begin a tag on it is held back.

    Calls are passed on when the answer is over and all of them are right. When they are not, or one is missing,
    `complaint` says why and nothing is; a `last` scanner then passes on as text what it held back.
    """

    MAX_CALLS = 128
    MAX_TRIES = 16  # end tags at which a call may end: they may stand in a string of its arguments

    def __init__(self, offer: Offer, budget: Budget, last: bool = False, told: str = "") -> None:
        """`told` is what the client has of an answer that is being given again."""
        self._offer = offer
        self._budget = budget
        self._last = last
        self._told = told
        self._patient = last or offer.choice != "auto"  # text too waits until it is clear what becomes of it
        self._start = ""  # what may be the beginning of a tag
        self._inside: list[str] | None = None  # what has come of a call
        self._tail = ""  # its last characters, in which an end tag may have begun
        self._tried, self._from = 0, 0  # end tags tried, and where the next may begin
        self._calls: list[dict[str, Any]] = []
        self._fault = ""  # what is wrong with one of them
        self._text: list[str] = []  # before any call
        self._raw: list[str] = []  # everything from the first call on
        self.complaint = ""
        self.over = False  # whether the answer has been passed on, whatever follows

    @property
    def told(self) -> str:
        """The text that the client already has."""
        return "" if self._patient else "".join(self._text)

    def said(self) -> str:
        """The whole answer as the model wrote it."""
        return "".join([*self._text, *self._raw])

    def light(self, events: list[Light]) -> bool:
        """Whether `feed` does nothing with these but to hold or to pass them on: no call ends in them."""
        text = events[0][0] if len(events) == 1 else "".join(event[0] for event in events)
        return not self._calls and ">" not in text

    def feed(self, events: list[Event]) -> list[Event]:
        """The events of a batch that can be passed on."""
        plain = not (self._patient or self._start or self._raw or self.over)
        if (
            plain and len(events) == 1 and type(events[0]) is Text and "<" not in events[0][0]
        ):  # once per token
            self._text.append(events[0][0])
            return events
        out: list[Event] = []
        for event in events:
            if self.over:
                break
            if type(event) is not Text:
                if isinstance(event, Finish):
                    self._finish(event, out)
                else:
                    out.append(event)
            elif self._patient or self._start or self._raw or "<" in event.text:  # else once per token
                if self._raw:
                    self._raw.append(event.text)
                self._take(event.text, out)
            else:
                self._text.append(event.text)
                out.append(event)
        return out

    def _take(self, text: str, out: list[Event]) -> None:
        """Text of which some may be a call."""
        while text and not self.over:
            if self._inside is not None:
                self._inside.append(text)
                ended = self._tail + text
                self._tail = (self._tail + text)[1 - len(CALL_END) :]
                text = self._close(out) if CALL_END in ended else ""
                continue
            text = self._start + text
            self._start = ""
            start = text.find(CALL_TAG)
            if start < 0:
                sizes = range(min(len(CALL_TAG) - 1, len(text)), 0, -1)
                held = next((size for size in sizes if CALL_TAG.startswith(text[-size:])), 0)
                self._start = text[len(text) - held :]
                self._before(text[: len(text) - held], out)
                return
            self._before(text[:start], out)
            self._raw = self._raw or [text[start:]]
            self._inside = []
            self._tail = ""
            self._tried = 0
            self._from = 0
            text = text[start + len(CALL_TAG) :]

    def _before(self, text: str, out: list[Event]) -> None:
        """Text outside of calls: after one that is right it ends the answer."""
        if self._calls:
            if text.strip() and not self._fault:
                self._finish(Finish("stop"), out)
        elif text:
            self._text.append(text)
            if not self._patient:
                out.append(Text(text))

    def _close(self, out: list[Event]) -> str:
        """An end tag has come: what follows the call, "" while it goes on."""
        body = "".join(self._inside or ()) if self._tried < self.MAX_TRIES else ""
        while self._tried < self.MAX_TRIES and (end := body.find(CALL_END, self._from)) >= 0:
            self._tried = self._tried + 1
            self._from = end + 1
            if (call := self._parsed(body[:end])) is not None:
                self._inside = None
                self._calls.append(call)
                self._fault = self._fault or call_fault(self._offer, call, self._budget)
                most = self.MAX_CALLS if self._offer.parallel else 1
                if len(self._calls) >= most and not self._fault:
                    self._finish(Finish("stop"), out)
                return body[end + len(CALL_END) :]
        return ""

    def _parsed(self, text: str) -> dict[str, Any] | None:
        """A call's JSON object, also from within a code fence; None when it is none (yet)."""
        text = text.strip()
        if text.startswith("```"):
            text = re.sub(r"\A```\w*", "", text).removesuffix("```")
        try:
            call = read_json(text)
            if not isinstance(call, dict):
                return None
            function = self._meant(call)
            arguments = call.get("arguments")
            if function and function.kind == CUSTOM and isinstance(arguments, str):
                call["arguments"] = _input_meant(arguments)
            elif not isinstance(arguments, (dict, list)):
                call["arguments"] = read_json(str(arguments or "{}"))
        except ValueError:
            return None
        return call

    def _meant(self, call: dict[str, Any]) -> Function | None:
        """The function that a call is of, whose full name it is given if it has only the name within a namespace."""
        name = call.get("name")
        if not isinstance(name, str) or not (full := self._offer.functions.full(name)):
            return None
        call["name"] = full
        return self._offer.functions[full]

    def _finish(self, event: Finish, out: list[Event]) -> None:
        """The answer is over, or what follows does not matter: passes on the calls, or complains."""
        self.over, fault = True, self._fault
        if self._inside is not None:
            if (call := self._parsed("".join(self._inside))) is not None:
                self._calls.append(call)  # only the end tag is missing
                fault = fault or call_fault(self._offer, call, self._budget)
            else:
                fault = fault or "the call is not valid JSON between its tags"
        if not self._calls and not fault and self._offer.choice != "auto":
            fault = "a function had to be called"
        if fault and event.reason == "stop" and not self._last:
            self.complaint = f"Your answer cannot be used: {fault}. Write the whole call again, as described, and nothing else."
        elif fault or not self._calls:
            self.as_text(out, event)
        else:
            if self._patient and not self._told and self._text:
                out.append(Text("".join(self._text)))
            for call in self._calls:
                function = self._offer.functions[call["name"]]
                id = f"call_{random.getrandbits(96):024x}"
                arguments = compact(call["arguments"])
                out.append(FunctionCall(id, function.name, arguments, function.kind, function.namespace))
            out.append(event._replace(reason="tool_calls"))

    def as_text(self, out: list[Event], event: Finish) -> None:
        """Passes on unchanged what the client has not got."""
        text = self.said() + ("" if self._raw else self._start)
        told = self.told or self._told
        if text.startswith(told):
            text = text[len(told) :]
        elif self._raw:
            text = "".join(self._raw)
        out += [Text(text), event] if text else [event]


def _input_meant(arguments: str) -> dict[str, Any]:
    """The arguments of a custom function whose call has them as a text: JSON, or the input as its description wants it."""
    with contextlib.suppress(ValueError):
        value = read_json(arguments)
        if isinstance(value, dict) and value.keys() == {"input"} and isinstance(value["input"], str):
            return value
    return {"input": arguments}


MAX_STARTS = 64  # places of a text at which JSON is looked for


def find_json(text: str, schema: Mapping[str, Any] | None, budget: Budget) -> tuple[str, str]:
    """The first JSON object (or array, where a schema allows one) in a text that fits, or "" and why there is none.

    What stands inside of brackets is never taken for the whole, even when that is not valid."""
    fault, at = "there is no JSON object in it", 0
    wanted = Schema({"type": "object"} if schema is None else schema, budget)
    for _ in range(MAX_STARTS):
        if not (match := re.compile(r"[{\[]").search(text, at)):
            break
        try:
            value, at = _DECODER.raw_decode(text, match.start())
            wrong = wanted.fault(_not_too_deep(value))
            if not wrong:
                return text[match.start() : at], ""
            fault = f"it does not fit the schema: {wrong}"
        except (ValueError, RecursionError):
            fault = "its JSON is not valid"
            at = _closing(text, match.start())
    return "", fault


def _closing(text: str, start: int) -> int:
    """The position after the bracket that closes the one at `start`; the text's end when it is not closed."""
    depth = 0
    for match in re.compile(r'(?s)"[^"\\]*(?:\\.[^"\\]*)*(?:"|\Z)|[{}\[\]]').finditer(text, start):
        depth += (match[0] in "{[") - (match[0] in "}]")
        if not depth:
            return match.end()
    return len(text)


class ShapeScanner:
    """Holds an answer back until it is whole, and passes on its JSON without what stands around it; else `complaint`
    says what is wrong, or a `last` scanner fails with invalid_structured_output."""

    told, over = "", False

    def __init__(self, shape: Shape, budget: Budget, last: bool = False) -> None:
        self._shape, self._budget, self._last = shape, budget, last
        self._text: list[str] = []
        self.complaint = ""

    def said(self) -> str:
        """The whole answer as the model wrote it."""
        return "".join(self._text)

    def light(self, events: list[Light]) -> bool:
        """Whether `feed` does nothing with these but to hold or to pass them on."""
        return True

    def feed(self, events: list[Event]) -> list[Event]:
        """The events of a batch that can be passed on."""
        out: list[Event] = []
        for event in events:
            if isinstance(event, Text):
                self._text.append(event.text)
            elif isinstance(event, Finish):
                self._finish(event, out)
            elif not isinstance(event, (ToolUse, Image)):
                out.append(event)
        return out

    def _finish(self, event: Finish, out: list[Event]) -> None:
        """An answer that did not come to its own end is passed on as it is, as OpenAI does it."""
        text = self.said()
        if event.reason == "stop":
            text, fault = find_json(text, self._shape.schema, self._budget)
            if fault and self._last:
                message = "The model's answer is not the JSON that was asked for, twice; simplify the schema or ask again."
                raise ApiError("invalid_structured_output", message)
            if fault:
                self.complaint = f"Your answer cannot be used: {fault}. Write it again, as one JSON object and nothing else."
                return
        if text:
            place = len(out) - sum(isinstance(one, FunctionCall) for one in out)
            out.insert(place, Text(text))
        out.append(event)


class Scanned(Sink):
    """An answer that goes through one scanner after the other before its sink has it; what they hold back is silence to the
    client. `words_only`: it is given again, without what the client has from the first one."""

    def __init__(
        self, scanners: list[CallScanner | ShapeScanner], sink: Sink, words_only: bool = False
    ) -> None:
        self._scanners, self._sink, self._words_only = scanners, sink, words_only
        self.outlet, self.careful = sink.outlet, True

    def light(self, events: list[Light]) -> bool:
        for one in self._scanners:
            if not one.light(events):
                return False
        return self._sink.light(events)

    def take(self, events: list[Event]) -> None:
        if self._words_only:
            events = [event for event in events if isinstance(event, (Text, Finish))]
        for scanner in self._scanners:
            events = scanner.feed(events)
        if events:
            self._sink.take(events)
        self.over = self._sink.over or self._scanners[0].over


def ask_in_prose(question: Question, ask: Callable[[Question, Sink], None], sink: Sink, watch: Watch) -> None:
    """Has a question answered by `ask`, whose model knows of the client's functions and shape what it is told in words:
    an answer that cannot be used is asked for again, once, without the client's noticing."""
    offer = question.offer
    shape = question.shape
    question = in_prose(question)
    if offer is None and shape is None:
        ask(question, sink)
        return
    budget = Budget(watch.check)
    scanners: list[CallScanner | ShapeScanner] = [CallScanner(offer, budget)] if offer else []
    scanners += [ShapeScanner(shape, budget)] if shape else []
    ask(question, Scanned(scanners, sink))
    if not (complaint := next((one.complaint for one in scanners if one.complaint), "")):
        return
    first = scanners[0]
    told = first.told if len(scanners) == 1 else ""
    said = Message("assistant", (Text(first.said()),)), Message("system", (Text(complaint),))
    scanners = [CallScanner(offer, budget, True, told)] if offer else []
    scanners += [ShapeScanner(shape, budget, True)] if shape else []
    try:
        ask(replace(question, messages=(*question.messages, *said)), Scanned(scanners, sink, words_only=True))
    except ApiError:
        if shape or not isinstance(first, CallScanner):
            raise
        out: list[Event] = []
        first.as_text(out, Finish("stop"))
        sink.take(out)


# ============================================================================================================
# web: the calls of the site's own API, one method each
# ============================================================================================================

PAGE_LIFE = 900.0  # seconds between two readings of the start page
# Seconds without a byte after which the rest of an answer is asked for, where it can be.
STREAM_SILENCE = 60.0
BELIEVED = 3600.0  # seconds that what was found out about an upstream is believed
MAX_TOLD_SMALLER, MAX_LABELS = 1000, 50  # pairs of models; models that are counted by name
SENTINEL = "/sentinel/chat-requirements"
NDJSON = b"application/vnd.openai.conversation-source+ndjson, application/x-ndjson"
MOBILE = "/unauth-mweb"  # where the page for phones has its calls, which needs no sign-in
MAX_UPLOAD_NEWS = 1 << 20  # bytes that are read of what the site tells while it takes in a file
ROOT = "client-created-root"  # what the present page gives as the parent of a conversation's first message
DRAWINGS = "image_gen"  # what the limit of images is counted under, and the site's name for it
MAX_ERASED = 5  # times that deleting a conversation is tried again
DRAWINGS_LIFE = 600.0  # seconds that the site's count of images that are left is used
MODELS_LIFE = 600.0  # seconds that an account's list of models is used
MODELS_SILENCE = 10.0  # seconds that it is waited for
PAGE_SILENCE = 5.0  # seconds that a turn waits for it
SPARE_PATIENCE = 5.0  # seconds that a turn waits for what is being prepared for it
SPARE_IDLE = 300.0  # seconds without a turn after which an account's next one is no longer prepared
# A user agent for fingerprints made before libcurl has told its own, which takes a failed connection.
UNKNOWN_AGENT = "Mozilla/5.0 (Macintosh; Intel Mac OS X 10_15_7) AppleWebKit/537.36 (KHTML, like Gecko) Chrome/150.0.0.0 Safari/537.36"
# What a page's script sends rather than a person opening the page; an empty value keeps libcurl from sending its own.
_SCRIPT_HEADERS = (
    b"Sec-Fetch-Site: same-origin", b"Sec-Fetch-Mode: cors",
    b"Sec-Fetch-Dest: empty", b"Sec-Fetch-User:", b"Upgrade-Insecure-Requests:", b"Expect:",
)  # fmt: skip
_FILE_ID = re.compile(r"[0-9A-Za-z_.-]{1,128}")
# A step of a path that is a parameter: a UUID, a file, a GPT.
_ID_STEP = re.compile(r"/(?:[0-9a-f]{8}-[0-9a-f-]{27,40}|file[-_][^/]+|g-[^/]+)(?=/|\Z)")
_SEED = re.compile(r"[\x20-\x7e]{1,64}")
_URL_TEXT = re.compile(r"https?://[\x21-\x7e]{1,8000}")


@dataclass(frozen=True)
class Requirements:
    """The tokens and proofs that a conversation call needs besides its body: good for one call, until `expires`
    (monotonic seconds). `persona` is whose call the upstream believes it to be, and `wants` is what it asks for that is
    not given here."""

    token: str = ""
    proof: str = ""
    arkose: str = ""
    expires: float = math.inf
    persona: str = ""
    wants: tuple[str, ...] = ()
    algorithm: str = ""  # that a proof was made with of which nobody has said yet whether it is right
    mobile: bool = False  # whether they are for the mobile page's calls

    def headers(self) -> list[bytes]:
        """The `openai-sentinel-…` header lines."""
        values = {"chat-requirements": self.token, "proof": self.proof, "arkose": self.arkose}
        return [f"openai-sentinel-{name}-token: {one}".encode() for name, one in values.items() if one]


def granted(said: Mapping[str, Any], name: str) -> str:
    """A token that an answer has under a name, "" for none; Refusal for one that cannot stand in a header."""
    value = said.get(name)
    if value in (None, ""):
        return ""
    if not isinstance(value, str) or not re.fullmatch(r"[\x21-\x7e]{1,16384}", value):
        raise Refusal("broken", f"The upstream's answer has a {name} that cannot be used; try again.")
    return value


def inner(said: Mapping[str, Any], name: str) -> dict[str, Any]:
    """An object within an answer, {} where there is none."""
    value = said.get(name)
    return value if isinstance(value, dict) else {}


# Names that are no slug of the site's but mean one.
ALIASES = {"auto": "auto", "gpt-3.5-turbo": "auto"}
_GPT = re.compile(r"(?:gpt-4-gizmo-)?(g-[0-9A-Za-z_-]+)")


def upstream_model(model: str, login_free: bool) -> str:
    """The slug for a client's name of a model; GPTs run on the default one."""
    plain = login_free or model.startswith("gpt-3.5") or _GPT.fullmatch(model)
    return "auto" if plain else ALIASES.get(model, model)


# How hard to think, as the site calls it. And what it calls its own tools.
_THINKING_EFFORTS = dict.fromkeys(("none", "minimal"), "min") | dict.fromkeys(("low", "medium"), "standard")
_THINKING_EFFORTS |= {"high": "extended", "xhigh": "xhigh", "max": "max", "ultra": "max"}
DRAWS = "picture_v2"
_SYSTEM_HINTS = {WEB_SEARCH: "search", DRAWING: DRAWS}


def _hints(question: Question) -> list[str]:
    """The site's tools that an answer is to use. Beside functions the model decides: a hint would have it search first."""
    meant = question.forced
    if not meant and question.offer is None and len(question.hosted) == 1:
        meant = question.hosted[0]
    return [_SYSTEM_HINTS[meant]] if meant in _SYSTEM_HINTS else []


def conversation_body(
    question: Question, history_disabled: bool, login_free: bool, files: Mapping[Attachment, File]
) -> dict[str, Any]:
    """ "The conversation body" for a question in prose; `files` are its attachments as the account holds them."""
    gpt = _GPT.fullmatch(question.model)
    mode = {"kind": "gizmo_interaction", "gizmo_id": gpt[1]} if gpt else {"kind": "primary_assistant"}
    body = {
        "action": "next",
        "messages": [_message_body(message, files) for message in question.messages],
        "model": upstream_model(question.model, login_free),
        "parent_message_id": question.parent or ROOT,
        "conversation_mode": mode,
        "history_and_training_disabled": history_disabled,
        "force_use_sse": True,
        "supports_buffering": True,
        "supported_encodings": ["v1"],
        "system_hints": _hints(question),
        "suggestions": [],
        "timezone_offset_min": TIMEZONE_OFFSET_MIN,
        "websocket_request_id": new_id(),
    }
    if question.conversation:
        body["conversation_id"] = question.conversation
    if question.effort:
        body["thinking_effort"] = _THINKING_EFFORTS[question.effort]
    return body


def _mobile_facts(page: Answer) -> list[bytes]:
    """The header lines that the calls of the page for phones repeat of the page."""
    text = page.body[:1_000_000].decode("utf-8", "replace")
    names = {
        "data-conversation-document-affinity": "x-web-mobile-conversation-document-affinity",
        "data-worker-version-id": "x-web-mobile-document-worker-version",
    }
    found = {
        header: re.search(rf'\s{name}="([\x21\x23-\x7e]{{1,2048}})"', text) for name, header in names.items()
    }
    lines = [f"{header}: {match[1]}" for header, match in found.items() if match]
    lines += [f"{name}: {value}" for name, value in page.headers.items() if name.startswith("x-web-mobile-")]
    return [line.encode("ascii", "replace") for line in lines[:10]]


def text_of_parts(message: Mapping[str, Any]) -> str:
    """The text of a message in the upstream's shape."""
    parts = inner(message, "content").get("parts")
    return "".join(part for part in parts if isinstance(part, str)) if isinstance(parts, list) else ""


def in_one_text(said: list[tuple[str, str]]) -> str:
    """The roles and texts of messages as one text, for those who take no more."""
    if len(said) == 1:
        return said[0][1]
    return "\n\n".join(f"{role.capitalize()}: {text}" for role, text in said)


def mobile_form(body: Mapping[str, Any], needs: Requirements) -> dict[str, str]:
    """A conversation body as the form of the mobile page. "Login-free"."""
    messages = dicts(body.get("messages"))
    said = [(str(inner(one, "author").get("role")), text_of_parts(one)) for one in messages]
    return {
        "conversationState": "",
        "prompt": in_one_text(said),
        "chatRequirementsToken": needs.token,
        "proofToken": needs.proof,
        "turnstileToken": "",
        "timingToken": "[1,null]",
        "assistantMessageId": f"pending-{new_id()}",
        "userMessageId": new_id(),
    }


def encoded(body: Mapping[str, Any]) -> str:
    """A conversation body as JSON; what stands at its head and was encoded before is not encoded again."""
    first: dict[str, Any] = next(iter(dicts(body.get("messages"))), {})
    parts: Any = inner(first, "content").get("parts")
    told = parts[0] if isinstance(parts, list) and parts else None
    if not isinstance(told, Told):
        return compact(body)
    mark = f"@{random.getrandbits(64):016x}"
    first = first | {"content": first["content"] | {"parts": [mark, *parts[1:]]}}
    head, tail = compact({**body, "messages": [first, *body["messages"][1:]]}).split(f'"{mark}"')
    return head + told.quoted + tail


def paged(account: Account, body: Mapping[str, Any], page: Page) -> dict[str, Any]:
    """A conversation body with what the site's present page sends besides. "The turn"."""
    width, height = screen_size(account.row.device)
    context = {
        "is_dark_mode": False,
        "time_since_loaded": int(min(max(time.time() - page.read, 1.0), PAGE_LIFE)),
        "page_height": height - 140,
        "page_width": width,
        "pixel_ratio": 1,
        "screen_height": height,
        "screen_width": width,
        "app_name": "chatgpt.com",
    }
    more = {
        "client_prepare_state": "success",
        "timezone": TIMEZONE,
        "client_contextual_info": context,
        "enable_message_followups": True,
        "supports_buffering": True,
        "force_parallel_switch": "auto",
        "paragen_cot_summary_display_override": "allow",
    }
    return more | dict(body)


def smaller(asked: str, served: str) -> bool:
    """Whether the model that answered is a lesser one than was asked for, by their slugs: of an earlier number in the same
    line, or of the same number and marked as one that is smaller or thinks less."""
    if asked == served or asked == "auto" or _GPT.fullmatch(asked) or not served:
        return False
    (line, number, marks), (other, lower, fewer) = map(_rank, (asked, served))
    return line == other and (lower < number or (lower == number and fewer < marks))


def _rank(slug: str) -> tuple[str, tuple[int, ...], int]:
    """A model's line, its number in it, and a mark: 2 for what thinks longer, 0 for what is small, else 1."""
    slug = slug.lower()
    match = re.match(r"([a-z]*)-?(\d{1,3})(?:[.-](\d{1,2})(?!\d))?", slug)
    number = tuple(int(one or 0) for one in match.groups()[1:]) if match else ()
    small = re.search(r"mini|nano|small|lite|free", slug)
    mark = 0 if small else 2 if re.search(r"-(pro|thinking)\b", slug) else 1
    return match[1] if match else slug, number, mark


def continued(body: Mapping[str, Any], cut: Finish) -> dict[str, Any]:
    """The conversation body that has the upstream go on with an answer that was cut."""
    rest = {name: value for name, value in body.items() if name != "messages"}
    where = {"conversation_id": cut.conversation, "parent_message_id": cut.message}
    return rest | {"action": "continue", "websocket_request_id": new_id()} | where


def completed(given: Mapping[str, Any]) -> dict[str, Any]:
    """A conversation body in the upstream's own shape, with what its senders like to leave out."""
    body: dict[str, Any] = {
        "action": "next",
        "model": "auto",
        "parent_message_id": ROOT,
        "conversation_mode": {"kind": "primary_assistant"},
        "force_use_sse": True,
        "timezone_offset_min": TIMEZONE_OFFSET_MIN,
        "websocket_request_id": new_id(),
    }
    fillable = {*body, "conversation_id"}
    body |= {k: v for k, v in given.items() if v not in (None, "") or k not in fillable}
    messages = []
    for message in dicts(given.get("messages")):
        author: Any = message.get("author")
        author = author if isinstance(author, dict) else {}
        filled = {
            "id": message.get("id") or new_id(),
            "author": {**author, "role": author.get("role") or "user"},
        }
        messages.append(message | filled | {"metadata": message.get("metadata") or {}})
    return body | ({"messages": messages} if messages else {})


def _message_body(message: Message, files: Mapping[Attachment, File]) -> dict[str, Any]:
    content: dict[str, Any] = {"content_type": "text", "parts": [message.text]}
    metadata: dict[str, Any] = {}
    if message.attachments:
        parts = [
            _pointer(files[part]) if isinstance(part, Attachment) else part.text
            for part in message.parts
            if isinstance(part, (Attachment, Text))
        ]
        content = {"content_type": "multimodal_text", "parts": [part for part in parts if part]}
        metadata = {"attachments": [_attachment_body(files[one]) for one in message.attachments]}
    facts = {"id": new_id(), "author": {"role": message.role}, "create_time": time.time()}
    return facts | {"content": content, "metadata": metadata}


def _pointer(file: File) -> dict[str, Any] | None:
    """An image as a part of a message's content; other files are attachments only."""
    if not file.width:
        return None
    scheme = "sediment" if file.upstream.startswith("file_") else "file-service"
    pointer = {"content_type": "image_asset_pointer", "asset_pointer": f"{scheme}://{file.upstream}"}
    return pointer | {"size_bytes": file.size, "width": file.width, "height": file.height}


def _attachment_body(file: File) -> dict[str, Any]:
    size = {"width": file.width, "height": file.height} if file.width else {}
    return {"id": file.upstream, "name": file.name, "size": file.size, "mime_type": file.mime} | size


# What the site reads as documents ("my_files"); other files are for its code interpreter ("ace_upload").
_DOCUMENTS = re.compile(
    r"text/(?!csv|tab-separated)|application/(pdf|json|msword|xml|x-tex|rtf|(x-)?javascript|x-sh|typescript"
    r"|vnd\.openxmlformats-officedocument\.(wordprocessingml\.document|presentationml\.presentation))"
)


def use_case(file: File) -> str:
    """ "Files": what a file is uploaded as."""
    return "multimodal" if file.width else "my_files" if _DOCUMENTS.match(file.mime) else "ace_upload"


def is_page(refused: Refusal) -> bool:
    """Whether a refusal came as HTML."""
    _, kind, body = refused.said or (0, "", b"")
    return "text/html" in kind or body.lstrip()[:1] == b"<"


def gone(refused: Refusal) -> bool:
    """Whether a refusal may mean that the upstream has no such call, or none with such a body."""
    if refused.reason == "forgotten" or refused.code in ("not_found", "model_not_found"):
        return False
    status = refused.said[0] if refused.said else 0
    page = is_page(refused) and status < 500 and status not in (401, 429)
    return status in (400, 404, 405, 410, 422) or page


def why(refused: Refusal, account: Account, needs: Requirements) -> Refusal:
    """What is behind a refusal that could have three causes: the address, a token that is not credited, or a human check
    that is wanted. The requirements that went before tell them apart."""
    if refused.reason != "blocked" or is_page(refused):
        return refused
    checks = [name for name in needs.wants if name != "sign-in"]
    said = f" The upstream's words{refused.detail}" if refused.detail else ""
    if needs.persona == "chatgpt-noauth" and account.row.kind != LOGIN_FREE:
        text = "The upstream takes this account's token and does not credit it; sign in to the account again."
        found = Refusal("uncredited", text + said)
    elif checks:
        text = f"The upstream wants a human check ({', '.join(checks)}) for this account, and none is made here: use another "
        found = Refusal("human", f"{text}kind of account, an agent, or your own browser.{said}")
    else:
        return refused
    found.said = refused.said
    return found


def as_form(
    field: str, name: str, mime: str, blob: Blob, texts: Mapping[str, str] | None = None
) -> tuple[str, Blob]:
    """A file, and fields of text behind it, as a form: its content type and its bytes."""
    mark = f"----chatproxy{secrets.token_hex(12)}"
    body = Blob()
    quoted = re.sub(r'[\x00-\x1f"\\]', "_", name)
    head = f"--{mark}\r\nContent-Disposition: form-data; name="
    body.write(f'{head}"{field}"; filename="{quoted}"\r\nContent-Type: {mime}\r\n\r\n'.encode())
    for piece in blob.pieces():
        body.write(piece)
    for key, text in (texts or {}).items():
        body.write(f'\r\n{head}"{key}"\r\n\r\n{text}'.encode())
    body.write(f"\r\n--{mark}--\r\n".encode())
    return f"multipart/form-data; boundary={mark}", body


class ChatGPT:
    """The web API of chatgpt.com for any account: turns, and what they need beforehand."""

    def __init__(self, connections: Connections, fetcher: Fetcher, solver: Solver) -> None:
        self.connections, self.fetcher, self.solver = connections, fetcher, solver
        self.settings, self.pool, self.metrics = connections.settings, connections.pool, connections.metrics
        self.silence = connections.silence
        self._ahead = ThreadPoolExecutor(16, thread_name_prefix="ahead")
        self._erasing = ThreadPoolExecutor(4, thread_name_prefix="erase")
        # Conversations to be deleted: whose, failures so far, and the time.monotonic() of the next try.
        self._unerased: dict[str, tuple[Account, int, float]] = {}
        self._spares_lock = threading.Lock()  # guards the accounts' `spare`
        self._private_gateways: dict[str, bool] = {}  # whether a gateway's address is private
        self._pages: dict[tuple[str, str], Page] = {}
        self._agents: dict[str, str] = {}
        # What is known of an upstream, by its address and a word, until a time.monotonic() at which it is tried anew: that it
        # has the older generation of a call, that a turn needs no conduit, that another algorithm's proof was tried.
        self._known: dict[tuple[str, str], float] = {}
        self._algorithms: dict[str, str] = {}  # the one that an upstream accepts
        self._mobile_lines: dict[str, list[bytes]] = {}  # what the mobile page's calls repeat of its headers
        # Pairs of a model that was asked for and a smaller one that answered, and when that was logged.
        self._told_smaller: dict[tuple[str, str], float] = {}
        self._smaller: set[str] = set()  # models that have answered for larger ones

    # -- calls -----------------------------------------------------------------------------------------------

    def _headers(
        self, account: Account, path: str, *extra: bytes, accept: bytes = b"*/*", kind: str = "application/json",
        area: str = "",
    ) -> list[bytes]:  # fmt: skip
        """The header lines of a call of the site's own scripts, to a path below its `area`."""
        row, cookies, page, lines = account.lines
        now = self._pages.get((account.gateway, account.egress.browser))
        if row is not account.row or cookies is not account.cookies or page is not now:
            lines = self._lasting_headers(account, now)
        path = (area or self._area(account)) + path.partition("?")[0]
        target = f"x-openai-target-path: {path}", f"x-openai-target-route: {_ID_STEP.sub('/{id}', path)}"
        ours = [f"Content-Type: {kind}".encode(), *(line.encode("ascii", "replace") for line in target)]
        return [b"Accept: " + accept, *ours, *lines, *extra]

    def _lasting_headers(self, account: Account, page: Page | None) -> list[bytes]:
        """The header lines that stay the same until the account's row or cookies are replaced, or the page is read anew."""
        row, cookies, gateway = account.row, account.cookies, account.gateway
        lines = [
            f"oai-session-id: {new_id()}".encode(),
            *_SCRIPT_HEADERS,
            f"Origin: {gateway}".encode(),
            f"Referer: {gateway}/".encode(),
            f"oai-device-id: {row.device}".encode(),
            f"oai-language: {self.settings.oai_language}".encode(),
            *_cookie_line(cookies | {DEVICE_COOKIE: row.device}),
        ]
        if row.access_token and row.kind != LOGIN_FREE:
            lines.append(f"Authorization: Bearer {row.access_token}".encode())
            if row.workspace:
                lines.append(f"chatgpt-account-id: {row.workspace}".encode())
        if page and page.build:
            lines.append(f"oai-client-version: {page.build}".encode())
        if page and page.number:
            lines.append(f"oai-client-build-number: {page.number}".encode())
        if self.settings.auth_key:
            lines.append(f"authkey: {self.settings.auth_key}".encode())
        account.lines = (row, cookies, page, lines)
        return lines

    @staticmethod
    def _area(account: Account) -> str:
        return "/backend-anon" if account.row.kind == LOGIN_FREE else "/backend-api"

    def _base(self, account: Account) -> str:
        return account.gateway + self._area(account)

    def _is_known(self, account: Account, word: str) -> bool:
        return time.monotonic() < self._known.get((account.gateway, word), 0.0)

    def _learn(self, account: Account, word: str, holds: bool = True) -> None:
        """Remembers something of an upstream for as long as that is believed."""
        self._known[account.gateway, word] = time.monotonic() + BELIEVED if holds else 0.0

    def _either(
        self,
        account: Account,
        call: str,
        newer: Callable[[], T],
        older: Callable[[], T],
        as_before: bool = False,
    ) -> T:
        """The result of a call of the page's generation, or of the one before it where that is gone. Which of the two an
        upstream has is remembered; `as_before` begins with the older one all the same."""
        believed = as_before or self._is_known(account, call)
        first, second = (older, newer) if believed else (newer, older)
        try:
            return first()
        except Refusal as refused:
            if not gone(refused):
                raise
            told = refused
        try:
            result = second()
        except Refusal as refused:
            # What is wrong with a body is told rather than what another call with it was taken for.
            first_tells = gone(refused) or (
                told.reason == "rejected" and refused.reason in ("blocked", "human")
            )
            raise (told if first_tells and told.reason != "missing" else refused) from None
        self._learn(account, call, second is older)
        return result

    def _object(
        self, name: str, account: Account, path: str, watch: Watch, body: Mapping[str, Any] | Blob | None = None,
        kind: str = "application/json", silence: float | None = None, extra: Iterable[bytes] = (), area: str = "",
    ) -> dict[str, Any]:  # fmt: skip
        """A call that answers with a JSON object, GET without a body and POST with one; Refusal for anything but 2xx."""
        url = account.gateway + (area or self._area(account)) + path
        headers = self._headers(account, path, *extra, kind=kind, area=area)
        method = "GET" if body is None else "POST"
        data = compact(body).encode() if isinstance(body, Mapping) else body
        answer = self.connections.answer(name, account, method, url, headers, data, watch, silence)
        value = answer.object()
        if value is None or not 200 <= answer.status < 300:
            raise refusal(answer.status, answer.headers, answer.body)
        return value

    # -- one turn --------------------------------------------------------------------------------------------

    def page(self, account: Account, watch: Watch) -> Page:
        """The start page's facts for fingerprints, read at most every PAGE_LIFE seconds; a failure is harmless."""
        key = (account.gateway, account.egress.browser)
        known = self._pages.get(key)
        now = time.time()
        if known and now - known.read < PAGE_LIFE:
            return known
        # Others go on with what is known meanwhile; a failure, or a client that leaves, is made up for in a minute.
        self._pages[key] = (known or Page())._replace(read=now - PAGE_LIFE + 60)
        headers = [b"Expect:", *_cookie_line(account.cookies | {DEVICE_COOKIE: account.row.device})]
        url = account.gateway + "/"
        call = self.connections.call(
            account, "GET", url, headers, None, watch, min(PAGE_SILENCE, self.silence)
        )
        call.handle.learn_agent(lambda agent: self._agents.update({account.egress.browser: agent}))
        with call, contextlib.suppress(Refusal):
            answer = call.whole()
            self.connections.heard("page", account, answer.status, answer.headers)
            self._mobile_lines[account.gateway] = _mobile_facts(answer)
            if answer.status == 200:
                text = answer.body[:1_000_000].decode("utf-8", "replace")
                build = re.search(r'<html[^<>]{0,1000}\sdata-build="([\x20-\x7e]{0,200}?)"', text)
                number = re.search(r'<html[^<>]{0,1000}\sdata-seq="(\d{1,20})"', text)
                found = re.finditer(r'<script[^<>]{0,1000}?\ssrc="([\x21-\x7e]{1,500}?)"', text)
                scripts = tuple(match[1] for match in itertools.islice(found, 50))
                self._pages[key] = Page(
                    scripts, build[1] if build else None, now, number[1] if number else ""
                )
        return self._pages[key]

    def _fingerprint(self, account: Account, page: Page, algorithm: str) -> list[Any]:
        agent = self._agents.get(account.egress.browser, UNKNOWN_AGENT)
        if algorithm == "fnv":
            scripts = tuple(urllib.parse.urljoin(f"{account.gateway}/", one) for one in page.scripts)
            page = page._replace(scripts=scripts)
        return fingerprint(
            account.row.device, agent, self.settings.oai_language, page, time.time(), algorithm
        )

    def _algorithm(self, account: Account, other: bool = False) -> str:
        """The algorithm of an upstream's proofs, as far as is known, or the `other` one."""
        known = self._algorithms.get(account.gateway, self.settings.pow_algorithm)
        return next(one for one in ALGORITHMS if one != known) if other else known

    def requirements(
        self, account: Account, watch: Watch, other: bool = False, mobile: bool | None = None
    ) -> Requirements:
        """Requirements token and proofs for one conversation call; either generation, steps 1 to 3 of "One turn". `other`: the
        proof is made with the algorithm that is not the usual one; `mobile`: they are for the page for phones, None where
        that is known to answer and the other is not."""
        if self.settings.conversation_only:
            return Requirements()
        page = self.page(account, watch)
        if mobile is None:
            mobile = self._is_known(account, f"{MOBILE} {account.id}")
        ask = functools.partial(self._object, "requirements", account, area=MOBILE if mobile else "")

        def newer(algorithm: str) -> Requirements:
            asked = {"p": self._requirements_token(account, page, algorithm)}
            answer = ask(f"{SENTINEL}/prepare", watch, asked)
            ready = self._satisfied(account, page, answer, algorithm, watch)
            final = {"prepare_token": granted(answer, "prepare_token")}
            if ready.proof:
                final["proofofwork"] = ready.proof
            answer = ask(f"{SENTINEL}/finalize", watch, final)
            token = granted(answer, "token")
            return replace(ready, token=token, expires=_expiry(answer), algorithm="", mobile=mobile)

        def older(algorithm: str) -> Requirements:
            asked = {"p": self._requirements_token(account, page, algorithm)}
            answer = ask(SENTINEL, watch, asked)
            return self._satisfied(account, page, answer, algorithm, watch)

        first, second = (functools.partial(self._proving, account, other, one) for one in (newer, older))
        if not mobile:
            return self._either(account, "sentinel", first, second)
        return self._as_mobile(account, first)

    def _proving(self, account: Account, other: bool, ask: Callable[[str], Requirements]) -> Requirements:
        """Requirements got with the usual algorithm (or the `other` one); where a proof may be what was refused, with the one
        that was not tried."""
        try:
            return ask(self._algorithm(account, other))
        except Refusal as refused:
            status = refused.said[0] if refused.said else 0
            doubted = status in (400, 403, 422) and not is_page(refused)
            if not doubted or not self.may_prove_otherwise(account):
                raise
            told = refused
        second = self._algorithm(account, not other)
        try:
            ready = ask(second)
        except Refusal:
            raise told from None
        self.proved(account, second)
        return ready

    def proved(self, account: Account, algorithm: str) -> None:
        """An upstream has accepted a proof."""
        self._algorithms[account.gateway] = algorithm

    def may_prove_otherwise(self, account: Account) -> bool:
        """Whether it is worth while to try the other algorithm with an upstream that may have refused a proof."""
        first = not self._is_known(account, "proofs")
        self._learn(account, "proofs")
        return first

    def _requirements_token(self, account: Account, page: Page, algorithm: str) -> str:
        token, *made = account.requirements_token
        if made != [page.read, algorithm]:
            token = requirements_token(self._fingerprint(account, page, algorithm), algorithm)
            account.requirements_token = (token, page.read, algorithm)
        return token

    def _satisfied(
        self, account: Account, page: Page, asked: Mapping[str, Any], algorithm: str, watch: Watch
    ) -> Requirements:
        """Solves what an answer to chat-requirements asks for. Human checks are left to the upstream to insist on, and so is
        a sign-in."""
        expires = _expiry(asked)
        wants = tuple(name for name in ("turnstile", "so") if inner(asked, name).get("required"))
        wants += ("sign-in",) if asked.get("force_login") else ()
        persona = str(asked.get("persona") or "")[:50]
        log(logging.DEBUG, "requirements", account=account.name, persona=persona, wants=" ".join(wants))
        account.demands = persona, wants
        proof = inner(asked, "proofofwork")
        arkose = inner(asked, "arkose")
        solution = token = ""
        if proof.get("required"):
            seed = str(proof.get("seed"))
            difficulty = str(proof.get("difficulty"))
            solution = self._proof(account, page, seed, difficulty, algorithm, watch)
        if arkose.get("required"):
            token = self._arkose(str(arkose.get("dx") or ""), watch)
        made_with = algorithm if solution else ""
        return Requirements(granted(asked, "token"), solution, token, expires, persona, wants, made_with)

    def _proof(
        self, account: Account, page: Page, seed: str, difficulty: str, algorithm: str, watch: Watch
    ) -> str:
        if not re.fullmatch(r"[0-9a-fA-F]{1,32}", difficulty) or not _SEED.fullmatch(seed):
            text = "The upstream asks for a proof of work of an unknown kind."
            raise Refusal("rejected", text, "upstream_error")
        if harder(difficulty, limit := self.settings.pow_difficulty):
            text = f"The upstream asks for a proof of work of difficulty {difficulty}, harder than POW_DIFFICULTY={limit} allows."
            raise Refusal("rejected", text, "proof_of_work_too_hard")
        start = time.monotonic()
        configuration = self._fingerprint(account, page, algorithm)
        job = (seed, difficulty.lower(), configuration, algorithm)
        token = self.solver.solved(job, watch)
        self.metrics.observe("chatproxy_proof_seconds", time.monotonic() - start)
        return token

    def _arkose(self, dx: str, watch: Watch) -> str:
        if not (url := self.settings.arkose_token_url):
            text = "The upstream wants an Arkose token; set ARKOSE_TOKEN_URL to a service that provides them."
            raise Refusal("rejected", text, "arkose_required")
        body = compact({"blob": dx}).encode("utf-8", "replace")
        egress = Egress("", "")
        token = ""
        call = self.connections.handles.call(
            "arkose", egress, "POST", url, _JSON_HEADERS, body, watch, self.silence
        )
        with call, contextlib.suppress(Refusal):
            answer = call.whole()
            token = granted(answer.object() or {}, "token") if answer.status == 200 else ""
        if not token:
            raise Refusal("rejected", "The service at ARKOSE_TOKEN_URL gave no token.", "arkose_required")
        return token

    def conversation(
        self, account: Account, body: Mapping[str, Any], needs: Requirements, watch: Watch
    ) -> Call:
        """Steps 4 and 5 of "One turn": the call whose bytes are the answer, begun; for a `with` block."""
        if needs.mobile:
            ask = functools.partial(self._converse_as_mobile, account, body, needs, watch)
            return self._as_mobile(account, ask, True)
        unspent = [needs]
        trace = f"x-oai-turn-trace-id: {new_id()}".encode()

        def begun(path: str, body: Mapping[str, Any], *more: bytes) -> Call:
            # What a call was refused with may be spent: another one gets its own.
            ready = unspent.pop() if unspent else self.requirements(account, watch)
            try:
                return self._converse(account, path, body, [*ready.headers(), trace, *more], watch)
            except Refusal as refused:
                if refused.reason == "missing":  # nobody has looked at them
                    unspent.append(ready)
                raise

        def newer() -> Call:
            page = self._pages.get((account.gateway, account.egress.browser)) or Page()
            whole = paged(account, body, page)
            conduit = functools.partial(self._conduit, account, whole, trace, watch)
            without = self._is_known(account, "conduit") and not self.settings.conversation_only
            try:
                return begun("/f/conversation", whole, *conduit())
            except Refusal as refused:
                if not without or not gone(refused):
                    raise
                self._learn(account, "conduit", False)
                if not (line := conduit()):
                    raise
                return begun("/f/conversation", whole, *line)

        def older() -> Call:
            first = body.get("parent_message_id") == ROOT
            return begun("/conversation", {**body, "parent_message_id": new_id()} if first else body)

        call = self._either(account, "conversation", newer, older, self.settings.conversation_only)
        if needs.algorithm and needs.algorithm != self._algorithm(account):
            self.proved(account, needs.algorithm)
        return call

    def _converse_as_mobile(
        self, account: Account, body: Mapping[str, Any], needs: Requirements, watch: Watch
    ) -> Call:
        """ "Login-free": a turn as the mobile page asks it, answered in lines of JSON."""
        query = "lightweight_authenticated=0"
        form = mobile_form(body, needs)
        kind = "application/x-www-form-urlencoded"
        data = Blob(urllib.parse.urlencode(form, errors="replace").encode())
        path = f"/conversation/prepare?{query}"
        try:
            said = self._object("conduit", account, path, watch, data, kind, area=MOBILE)
            conduit = granted(said, "conduit_token")
        except Refusal as refused:
            if not gone(refused):
                raise
            conduit = ""
        extra = [b"x-web-mobile-conversation-stream-protocol: 2", b"x-web-mobile-prepare-state: success"]
        extra += self._mobile_lines.get(account.gateway, ())
        extra += [f"x-conduit-token: {conduit}".encode()] if conduit else []
        path = f"/conversation/updates?{query}&operationId={new_id()}"
        headers = self._headers(account, path, *extra, accept=NDJSON, kind=kind, area=MOBILE)
        return self._streaming(account, account.gateway + MOBILE + path, headers, data, watch)

    def _as_mobile(self, account: Account, ask: Callable[[], T], last: bool = False) -> T:
        """The result of a call of the page for phones: the `last` one that is answered shows that this account is to ask there,
        one that is refused that it is not."""
        word = f"{MOBILE} {account.id}"
        try:
            result = ask()
        except Refusal as refused:
            if refused.said:
                self._learn(account, word, False)
            raise
        if last and not self._is_known(account, word):
            self._learn(account, word)
        return result

    def _conduit(self, account: Account, body: Mapping[str, Any], trace: bytes, watch: Watch) -> list[bytes]:
        """The header line that a turn is to have from its `prepare`. An upstream that gives none is not asked again for a
        while: that would be a round trip for nothing."""
        if self.settings.conversation_only or self._is_known(account, "conduit"):
            return []
        bare = {name: value for name, value in body.items() if name != "messages"}
        bare["client_prepare_state"] = "none"
        try:
            answer = self._object("conduit", account, "/f/conversation/prepare", watch, bare, extra=[trace])
        except Refusal as refused:
            if not gone(refused):
                raise
            answer = {}  # the turn may be there without it
        token = granted(answer, "conduit_token")
        self._learn(account, "conduit", not token)
        return [f"x-conduit-token: {token}".encode()] if token else []

    def resumed(self, account: Account, conversation: str, offset: int, token: str, watch: Watch) -> Call:
        """ "Hand-off": the call that brings the rest of an answer, begun; for a `with` block."""
        body = {"conversation_id": conversation, "offset": offset}
        conduit = [f"x-conduit-token: {token}".encode()] if token else []
        path = "/f/conversation/resume"
        headers = self._headers(account, path, *conduit, accept=b"text/event-stream")
        data = compact(body).encode()
        silence = min(STREAM_SILENCE, self.silence)
        return self._streaming(account, self._base(account) + path, headers, data, watch, silence=silence)

    def turn(
        self, account: Account, conversation: str, sent: Collection[str], watch: Watch
    ) -> list[dict[str, Any]]:
        """The messages of a conversation's last turn, as far as there are any; `sent` as `turn_of` has it."""
        talk = urllib.parse.quote(conversation, safe="")

        def newer() -> dict[str, Any]:
            return self._object("conversation", account, f"/conversation/{talk}", watch)

        def older() -> dict[str, Any]:
            query = "include_has_versions=true&num_turns=20"
            return self._object("conversation", account, f"/conversations/{talk}?{query}", watch)

        return turn_of(self._either(account, "reading", newer, older), sent)

    def is_streaming(self, account: Account, conversation: str, watch: Watch) -> bool | None:
        """Whether an answer is still being made in a conversation; None where that is not told."""
        talk = urllib.parse.quote(conversation, safe="")
        try:
            said = self._object("stream_status", account, f"/conversation/{talk}/stream_status", watch)
        except Refusal:
            return None
        return said.get("status") == "IS_STREAMING"

    def erase(self, account: Account, conversation: str) -> None:
        """Deletes a conversation in the background, and tries that again for some minutes."""
        self._unerased[conversation] = (account, 0, math.inf)
        self._erasing.submit(self._erase, conversation)

    def _erase(self, conversation: str) -> None:
        account, failures, _ = self._unerased[conversation]
        path = f"/conversation/{urllib.parse.quote(conversation, safe='')}"
        body = Blob(b'{"is_visible":false}')
        erased = False
        with contextlib.suppress(ApiError):
            erased = self.native(account, "PATCH", path, body, Watch()).status in (200, 404)
        if not erased and failures < MAX_ERASED:
            self._unerased[conversation] = (account, failures + 1, time.monotonic() + 10 * 3**failures)
            return
        del self._unerased[conversation]
        if not erased:
            log(logging.WARNING, "a conversation could not be deleted upstream", account=account.name)

    def sweep_erasures(self, now: float) -> None:
        """Begins what is due; `now` is a time.monotonic()."""
        for talk, (account, failures, due) in list(self._unerased.items()):
            if due < now:  # of those under way it is never
                self._unerased[talk] = (account, failures, math.inf)
                self._erasing.submit(self._erase, talk)

    def finish_erasures(self, patience: float) -> None:
        """Deletes what is left, for some seconds: the end."""
        self.sweep_erasures(math.inf)
        end = time.monotonic() + patience
        while self._unerased and time.monotonic() < end:
            time.sleep(0.05)
        if left := len(self._unerased):
            log(logging.WARNING, "conversations are left upstream that were to be deleted", count=left)

    def served(self, account: Account, asked: str, served: str) -> None:
        """Takes note of which model has answered: the page's way of asking may have to be followed more closely."""
        if not smaller(upstream_model(asked, account.row.kind == LOGIN_FREE), served):
            return
        if not self._is_known(account, "smaller"):  # once a while a conduit is asked for again
            self._learn(account, "smaller")
            self._learn(account, "conduit", False)
        name = re.sub(r"[^\w.-]", "_", served)
        if len(self._smaller) < MAX_LABELS:
            self._smaller.add(name)
        name = name if name in self._smaller else "other"
        self.metrics.add("chatproxy_smaller_model_total", labels=f'served="{name}"')
        now = time.monotonic()
        if now - self._told_smaller.get((asked, served), -BELIEVED) >= BELIEVED:
            if len(self._told_smaller) >= MAX_TOLD_SMALLER:
                self._told_smaller.clear()
            self._told_smaller[asked, served] = now
            log(logging.WARNING, "a smaller model answered", asked=asked, served=served, account=account.name)

    def _converse(
        self, account: Account, path: str, body: Mapping[str, Any], extra: list[bytes], watch: Watch
    ) -> Call:
        url = self._base(account) + path
        data = encoded(body).encode("utf-8", "replace")
        headers = self._headers(account, path, *extra, accept=b"text/event-stream")
        # What is said in a conversation is not to be said twice.
        return self._streaming(account, url, headers, data, watch, "conversation_id" in body)

    def _streaming(
        self,
        account: Account,
        url: str,
        headers: list[bytes],
        data: bytes | Blob,
        watch: Watch,
        once: bool = False,
        silence: float | None = None,
    ) -> Call:
        """A call whose answer is a stream, begun; for a `with` block. `once`: it must not be made twice."""
        with contextlib.ExitStack() as guard:
            call = guard.enter_context(
                self.connections.call(account, "POST", url, headers, data, watch, silence)
            )
            if once:
                call.handle.sent_once()
            call.begin()
            if account.answered:
                self.prepare(account)  # meanwhile, not before
            try:
                call.start()
            except Refusal:
                self.connections.heard("conversation", account, 0, {})
                raise
            self.connections.heard("conversation", account, call.status, call.headers)
            if call.status != 200 or "text/html" in call.headers.get("content-type", ""):
                answer = call.whole()
                raise refusal(answer.status, answer.headers, answer.body)
            guard.pop_all()
        return call

    def check_drawings(self, account: Account, watch: Watch) -> None:
        """ "Images": Refusal when an account has no image left, for as long as the site says. Where it does not say, its own
        refusal of a turn decides."""
        now = time.time()
        left = account.drawings
        if not left or now - left.read > DRAWINGS_LIFE or (left.images <= 0 and left.counted):
            left = account.drawings = self._drawings_left(account, now, watch)
        says = math.isfinite(left.images)
        wait = (left.reset - now if left.images <= 0 else 0.0) if says else account.wait_for(DRAWINGS, now)
        if wait > 0 and self.settings.enable_limit:
            raise Refusal("limited", "The upstream's limit for images is reached.", wait=wait, about=DRAWINGS)

    @staticmethod
    def count_drawing(account: Account) -> None:
        """An image was made, or begun."""
        if left := account.drawings:
            account.drawings = left._replace(images=left.images - 1, counted=True)

    def _drawings_left(self, account: Account, now: float, watch: Watch) -> DrawingsLeft:
        body = {"gizmo_id": None, "conversation_id": None, "timezone_offset_min": TIMEZONE_OFFSET_MIN}
        try:
            said = self._object("init", account, "/conversation/init", watch, body)
        except Refusal as refused:
            if refused.reason == "expired":
                raise
            return DrawingsLeft(now)
        for one in dicts(said.get("limits_progress")):
            left = one.get("remaining")
            if one.get("feature_name") == DRAWINGS and isinstance(left, (int, float)):
                return DrawingsLeft(now, left, _moment(one.get("reset_after"), now))
        return DrawingsLeft(now)

    # -- files and voice ---------------------------------------------------------------------------------------

    def upload(self, account: Account, file: File, blob: Blob, watch: Watch) -> str:
        """ "Files": the id of a file that the account now holds, documents once they have been read there."""
        case = use_case(file)
        asked = {"file_name": file.name, "file_size": blob.size, "use_case": case}
        asked |= {"timezone_offset_min": TIMEZONE_OFFSET_MIN, "reset_rate_limits": False}
        asked["entry_surface"] = "chat_composer"
        made = self._object("files", account, "/files", watch, asked)
        id = str(made.get("file_id") or "")
        url = self._whole_url(account, made.get("upload_url"))
        if not _FILE_ID.fullmatch(id) or not url:
            raise Refusal("broken", "The upstream did not say where to upload a file; try again.")
        self._send_bytes(account, url, file, blob, watch)

        def uploaded() -> bool:
            self._object("uploaded", account, f"/files/{id}/uploaded", watch, {})
            return False

        def processed() -> bool:
            self._process_upload(account, id, file, case, watch)
            return True

        # What is uploaded is not sent again for a hiccup of these calls.
        confirm = functools.partial(self._either, account, "uploaded", uploaded, processed)
        read = self._insistently(confirm, watch)
        if case == "my_files" and not read:
            self._indexed(account, id, watch)
        return id

    @staticmethod
    def _whole_url(account: Account, said: Any) -> str:
        """A URL that the upstream names, which may be relative to it; "" for what is none."""
        if isinstance(said, str) and said.startswith("/") and not said.startswith("//"):
            said = account.gateway + said
        return said if isinstance(said, str) and _URL_TEXT.fullmatch(said) else ""

    def is_own(self, account: Account, url: str) -> bool:
        """Whether a URL leads to what the site gives its account alone."""
        return url.startswith(f"{account.gateway}/backend-")

    def _send_bytes(self, account: Account, url: str, file: File, blob: Blob, watch: Watch) -> None:
        """Uploads a file's bytes to where the site wants them: to itself as a form, or to a store at Azure or AWS."""
        if self.is_own(account, url):
            query = dict(urllib.parse.parse_qsl(urllib.parse.urlsplit(url).query))
            further = {name: query[name] for name in ("upload_url",) if name in query}
            kind, form = as_form("file", file.name, file.mime, blob, further)
            path = url[len(account.gateway) :].removeprefix(self._area(account))
            headers = self._headers(account, path, kind=kind)
            answer = self.connections.answer("upload", account, "POST", url, headers, form, watch)
        else:
            place = self.named_place(account, url, watch)
            headers = [
                f"Content-Type: {file.mime}".encode(),
                f"Origin: {account.gateway}".encode(),
                b"Expect:",
            ]
            if not re.search(r"[?&]X-Amz-", url, re.I):
                headers += [b"x-ms-blob-type: BlockBlob", b"x-ms-version: 2020-04-08"]
            answer = self.connections.answer("upload", account, "PUT", url, headers, blob, watch, place=place)
        if not 200 <= answer.status < 300:
            raise Refusal("broken", f"The upstream's file store answered with status {answer.status}.")

    def _process_upload(self, account: Account, id: str, file: File, case: str, watch: Watch) -> None:
        """Has the site take in what was uploaded, and waits until it has: lines of JSON tell of it."""
        path = "/files/process_upload_stream"
        asked: dict[str, Any] = {"file_id": id, "file_name": file.name, "use_case": case}
        asked |= {"index_for_retrieval": case == "my_files", "entry_surface": "chat_composer"}
        url = self._base(account) + path
        headers = self._headers(account, path)
        data = compact(asked).encode()
        answer = self.connections.answer("uploaded", account, "POST", url, headers, data, watch)
        if not 200 <= answer.status < 300:
            raise refusal(answer.status, answer.headers, answer.body)
        for line in answer.body[:MAX_UPLOAD_NEWS].decode("utf-8", "replace").split("\n"):
            if line[:1] != "{":
                continue
            with contextlib.suppress(ValueError, RecursionError):
                said = decode(line)[0]
                if re.search(r"(?:^|\.)(?:error|failed|cancelled)$", str(said.get("event"))):
                    text = "The upstream cannot take in this file; send it in another format."
                    raise Refusal("rejected", text)

    @staticmethod
    def _insistently(ask: Callable[[], T], watch: Watch) -> T:
        """The result of a call, at the third attempt where the upstream fails."""
        for pause in (0.3, 1.0):
            try:
                return ask()
            except Refusal as refused:
                if refused.reason not in ("broken", "unreachable"):
                    raise
            watch.pause(pause)
        return ask()

    def _indexed(self, account: Account, id: str, watch: Watch) -> None:
        """Waits until the site has read a document."""
        end = time.monotonic() + self.silence
        pause = 0.1
        while time.monotonic() < end:
            said = self._insistently(
                functools.partial(self._object, "file", account, f"/files/{id}", watch), watch
            )
            if (status := said.get("retrieval_index_status")) == "success":
                return
            if status in ("failed", "error"):
                text = "The upstream cannot read this document; send it in another format."
                raise Refusal("rejected", text)
            watch.pause(pause)
            pause = min(pause * 1.5, 2.0)
        raise Refusal("silent", "The upstream took too long to read the document; try again.")

    def file_url(self, account: Account, id: str, watch: Watch, conversation: str = "") -> str:
        """A short-lived URL for a file that the account holds; `conversation` is the one that a `sediment` file is of."""
        talk = urllib.parse.quote(conversation, safe="", errors="replace")

        def newer() -> str:
            query = f"conversation_id={talk}&inline=true"
            return self._url("download", account, f"/files/download/{id}?{query}", watch)

        def older() -> str:
            place = f"/conversation/{talk}/attachment" if conversation else "/files"
            return self._url("download", account, f"{place}/{id}/download", watch)

        ask = functools.partial(self._either, account, "download", newer, older) if conversation else older
        return self._found(ask)

    @staticmethod
    def _found(ask: Callable[[], str]) -> str:
        """The result of a call for a file's URL; a file of which the upstream does not know is forgotten."""
        try:
            return ask()
        except Refusal as refused:
            if refused.reason == "missing":
                raise Refusal("forgotten", "The upstream does not have this file any more.") from None
            raise

    def sandbox_url(self, account: Account, conversation: str, message: str, path: str, watch: Watch) -> str:
        """A short-lived URL for a file that the model made at `/mnt/data/…`."""
        query = urllib.parse.urlencode({"message_id": message, "sandbox_path": path}, errors="replace")
        talk = urllib.parse.quote(conversation, safe="", errors="replace")
        address = f"/conversation/{talk}/interpreter/download?{query}"
        return self._found(functools.partial(self._url, "interpreter", account, address, watch))

    def _url(self, name: str, account: Account, path: str, watch: Watch) -> str:
        for pause in (0.0, 0.5, 1.0, 2.0):
            watch.pause(pause)
            said = self._object(name, account, path, watch)
            if said.get("status") != "retry":
                break
        url = self._whole_url(account, said.get("download_url"))
        if not url:
            raise Refusal("forgotten", "The upstream does not have this file any more.")
        return url

    def named_place(self, account: Account, url: str, watch: Watch) -> str:
        """What a URL that the upstream names leads to, as `Handle.lead` takes it, "" for wherever its host is; Refusal
        when that is a private address, unless the upstream's own is one. Behind a proxy names are the proxy's."""
        private = self._gateway_private(account.gateway, watch)
        if private or url.startswith(account.gateway + "/"):
            return ""
        try:
            host, port, _ = Fetcher.parted(url)
            literal = re.fullmatch(r"[0-9.]+|.*:.*|localhost|.*\.localhost", host)
            addresses = [""]
            if literal or not account.egress.proxy:
                addresses = self.fetcher.resolved(host, port, watch)
        except ValueError:
            raise Refusal(
                "broken", "The upstream gave an address for a file that cannot be resolved."
            ) from None
        if not all(map(is_public, filter(None, addresses))):
            raise Refusal("broken", "The upstream gave a private address for a file; it was not contacted.")
        shown = [f"[{one}]" if ":" in one else one for one in addresses if one]
        return f"{host}:{port}:{','.join(shown)}" if shown else ""

    def _gateway_private(self, gateway: str, watch: Watch) -> bool:
        """Whether the upstream itself is at a private address, as a gateway of one's own may be."""
        if gateway not in self._private_gateways:
            host, port, _ = Fetcher.parted(gateway)
            try:
                addresses = self.fetcher.resolved(host, port, watch)
            except ValueError:  # it may be resolved another time, or by a proxy alone
                return False
            self._private_gateways[gateway] = not all(map(is_public, filter(None, addresses)))
        return self._private_gateways[gateway]

    def content(self, account: Account, url: str, watch: Watch) -> Call:
        """The call that gets a file's bytes, begun; its own files the site gives to the account alone."""
        for _ in range(MAX_REDIRECTS):
            place = self.named_place(account, url, watch)
            own = url.startswith(account.gateway + "/")
            path = url[len(account.gateway) :].removeprefix(self._area(account))
            headers = self._headers(account, path) if own else [b"Expect:"]
            with contextlib.ExitStack() as guard:
                call = guard.enter_context(
                    self.connections.call(account, "GET", url, headers, None, watch, place=place)
                )
                call.start()
                if call.status == 200:
                    guard.pop_all()
                    return call
            if call.status not in (301, 302, 303, 307, 308) or not call.headers.get("location"):
                break
            with contextlib.suppress(ValueError):
                url = urllib.parse.urljoin(url, call.headers["location"])
            if not _URL_TEXT.fullmatch(url):
                break
        raise Refusal("broken", f"The upstream's file store answered with status {call.status}.")

    def downloaded(self, account: Account, url: str, watch: Watch) -> Blob:
        """A file's bytes."""
        blob = Blob()
        most = max(MAX_ANSWER, self.settings.max_body_mb << 20)
        with self.content(account, url, watch) as call:
            for data in call.pieces():
                blob.write(data)
                if blob.size > most:
                    raise too_large()
        return blob

    def me(self, account: Account, watch: Watch) -> None:
        """The cheapest call that only a working account answers."""
        self._object("me", account, "/me", watch)

    def native(self, account: Account, method: str, path: str, body: Blob | None, watch: Watch) -> Answer:
        """ "Conversations": a call of the site's own scripts, with its own answer. Refusal where another attempt can do no
        harm: the call was not taken up (401, 429), never arrived, or changes nothing."""
        url = self._base(account) + path
        headers = self._headers(account, path)
        reads = method == "GET"
        try:
            answer = self.connections.answer(
                "native", account, method, url, headers, body, watch, once=not reads
            )
        except Refusal as refused:
            if reads or refused.unsent:
                raise
            raise ApiError(refused.code, refused.message) from None
        if answer.status in (401, 429) or (reads and answer.status >= 500):
            raise refusal(answer.status, answer.headers, answer.body)
        return answer

    def models(self, account: Account, watch: Watch) -> tuple[str, ...]:
        """The slugs of the models that an account may use, read at most every MODELS_LIFE seconds; what is known stays
        in use when the upstream fails."""
        read, slugs = account.models
        if time.time() - read < MODELS_LIFE:
            return slugs
        try:
            said = self._object(
                "models", account, "/models", watch, silence=min(MODELS_SILENCE, self.silence)
            )
        except Refusal:
            account.models = (time.time() - MODELS_LIFE + 60, slugs)  # and tried again in a minute
            if not slugs:
                raise
            return slugs
        slugs = tuple(str(one["slug"]) for one in dicts(said.get("models")) if one.get("slug"))
        account.models = (time.time(), slugs)
        return slugs

    def speech(
        self, account: Account, conversation: str, message: str, voice: str, form: str, watch: Watch
    ) -> Answer:
        """ "Voice": a message read aloud."""
        query = {"message_id": message, "conversation_id": conversation, "voice": voice, "format": form}
        url = f"{self._base(account)}/synthesize?{urllib.parse.urlencode(query)}"
        headers = self._headers(account, "/synthesize")
        answer = self.connections.answer("synthesize", account, "GET", url, headers, None, watch)
        kind = answer.headers.get("content-type", "")
        if answer.status != 200 or not kind.startswith(("audio/", "application/oct")):
            raise refusal(answer.status, answer.headers, answer.body)
        return answer

    def transcription(
        self, account: Account, audio: Blob, name: str, mime: str, language: str, watch: Watch
    ) -> str:
        """ "Voice": what is said in a recording."""
        kind, body = as_form("file", name, mime, audio, {"language": language} if language else {})
        said = self._object("transcribe", account, "/transcribe", watch, body, kind)
        return str(said.get("text") or "")

    # -- prepared ahead --------------------------------------------------------------------------------------

    def prepare(self, account: Account) -> None:
        """Begins to get an account's next requirements in the background, one spare an account."""
        if self.settings.conversation_only:
            return
        with self._spares_lock:
            if account.spare is None:
                account.spare = self._ahead.submit(self._prepared, account)

    def _take_spare(self, account: Account) -> Future[Any] | None:
        """The prepared requirements, for one taker."""
        with self._spares_lock:
            spare, account.spare = account.spare, None
            return spare

    def _prepared(self, account: Account) -> Requirements | None:
        """The spare, or None when it could not be had: the next turn will find out why."""
        try:
            return self.requirements(account, Watch())
        except ApiError as error:
            log(logging.DEBUG, "no requirements ahead", account=account.name, code=error.code)
        except Exception:
            log(logging.ERROR, "background job failed", exc_info=True, account=account.name)
        return None

    def spare(self, account: Account, watch: Watch) -> Requirements | None:
        """The account's spare, for a moment waited for if it is on its way; None when there is none to be used."""
        future = self._take_spare(account)
        if future is not None and not future.cancel():
            with contextlib.suppress(TimeoutError):
                needs: Requirements | None = watch.result(future, SPARE_PATIENCE)
                if needs is not None and needs.expires > time.monotonic() + 1:
                    return needs
        return None

    def sweep_spares(self) -> None:
        """Drops what has expired, and gets anew what an account in use will need."""
        now = time.monotonic()
        for account in self.pool.live():
            spare = account.spare
            if spare is None or not spare.done() or spare.cancelled():
                continue
            needs = spare.result()
            if needs is None or needs.expires <= now + 5:
                with self._spares_lock:
                    account.spare = None if account.spare is spare else account.spare
                in_use = time.time() - account.used < SPARE_IDLE and account.row.state == "ready"
                if needs is not None and in_use:
                    self.prepare(account)


def _moment(said: Any, now: float) -> float:
    """A time that the upstream gives, as ISO 8601 or in seconds from now, as Unix seconds; in an hour when it is neither,
    and in a month at the latest."""
    moment = now + 3600
    with contextlib.suppress(ValueError, OverflowError):
        if isinstance(said, (int, float)) and math.isfinite(said):
            moment = now + said
        elif isinstance(said, str):
            moment = datetime.datetime.fromisoformat(said.replace("Z", "+00:00")).timestamp()
    return min(moment, now + 31 * 86400)


def _expiry(answer: Mapping[str, Any]) -> float:
    """The end of requirements, in monotonic seconds; ten minutes less a bit where the upstream does not say."""
    after = answer.get("expire_after")
    known = isinstance(after, (int, float)) and 0 < after <= 86400
    return time.monotonic() + (float(after) if known else 540.0)  # type: ignore[arg-type] # known: a number


# ============================================================================================================
# decoder: the web API's bytes to events
# ============================================================================================================


class Drawing(NamedTuple):
    """An image that the model drew, where the upstream keeps it: `file-service://ID` or `sediment://ID`."""

    pointer: str


class SandboxLink(NamedTuple):
    """Stands in the text of a message for the URL of a file that the model made."""

    path: str
    message: str


Found = Event | Drawing | SandboxLink

# Bytes of one event, characters of a message, messages of an answer, characters of a name in it.
MAX_EVENT = 16 << 20
MAX_MESSAGE = 16 << 20
MAX_MESSAGES = 10_000
MAX_NAME = 200


class EventStream:
    """Server-sent events: takes bytes however they are cut, gives the `data` of whole events.

    Each byte is looked at a fixed number of times: what has no event's end is put aside unjoined until one comes.
    """

    def __init__(self) -> None:
        self._parts: list[bytes] = []
        self.size = 0  # of what is put aside
        self._last = b""  # the last byte put aside, to see an end that is cut in two
        self._cr = False  # a carriage return was last: a line feed that follows belongs to it

    def feed(self, data: bytes) -> list[str]:
        """The `data` of each event that is complete now, its lines joined by line feeds."""
        if b"\r" in data or self._cr:
            data = self._unix(data)
        end = data.rfind(b"\n\n")
        if end < 0 and not (self._last == b"\n" and data[:1] == b"\n"):
            if data:
                self._parts.append(data)
                self._last = data[-1:]
                self.size += len(data)
                self._check(self.size)
            return []
        cut = end + 2 if end >= 0 else 1
        if self.size:
            self._check(self.size + data.find(b"\n\n"))
        block = b"".join([*self._parts, data[:cut]]) if self._parts else data[:cut]
        rest = data[cut:]
        self._parts = [rest] if rest else []
        self._last = rest[-1:]
        self.size = len(rest)
        events = map(self._data, block[:-2].decode("utf-8", "replace").split("\n\n"))
        return [data for data in events if data is not None]

    @staticmethod
    def _check(size: int) -> None:
        if size > MAX_EVENT:
            raise Refusal("broken", "The upstream sent an event that does not end; its answer was abandoned.")

    def _unix(self, data: bytes) -> bytes:
        """The same with line feeds for all three line ends, one that is cut in two included."""
        rest = data[1:] if self._cr and data[:1] == b"\n" else data
        self._cr = data[-1:] == b"\r" if data else self._cr
        return rest.replace(b"\r\n", b"\n").replace(b"\r", b"\n")

    @staticmethod
    def _data(event: str) -> str | None:
        # Nearly all of them begin in one of two ways, and have one line of data.
        start = 6 if event.startswith("data: ") else 19 if event.startswith("event: delta\ndata: ") else 0
        if start and event.find("\n", start) < 0:
            return event[start:]
        lines = [line[5:].removeprefix(" ") for line in event.split("\n") if line.startswith("data:")]
        return "\n".join(lines) if lines else None


_SANDBOX = "(sandbox:"
_PRIVATE = "\ue000-\uf8ff\U000f0000-\U0010ffff"  # private use: what marks are made of
# What may not be passed on as it is: a mark's characters, a sandbox link, what may be the start of one.
_MARK = re.compile(
    f"[{_PRIVATE}]|\\(sandbox:|(?:"
    + "|".join(re.escape(_SANDBOX[:n]) for n in range(len(_SANDBOX) - 1, 0, -1))
    + r")\Z"
)
_SANDBOX_LINK = re.compile(  # with parentheses in its path, or a title behind it
    rf'\(sandbox:((?:[^()\n{_PRIVATE}]|\([^()\n{_PRIVATE}]{{0,200}}\)){{0,1000}}?)(\s{{1,9}}"[^"\n]{{0,200}}")?\)'
)
# Characters that wait for a mark's source, and for a mark's end.
MAX_HELD_BACK, MAX_MARK = 100_000, 1000


class Prose:
    """An answer's text with its marks resolved: citations become Markdown links, sandbox links can be looked up.

    What may be a mark is held back until it is whole and known: a citation's source often comes after it.
    """

    def __init__(self, message: dict[str, Any]) -> None:
        self.message = message  # whose metadata has the sources
        self.held: list[str] = []
        self._size, self._waits = 0, False  # of what is held; whether for a source, which text cannot bring

    def add(self, text: str, end: int, out: list[Found]) -> None:
        """More text, once per token where something is held; `end` is where in the message it ends."""
        if self._waits and self._size < MAX_HELD_BACK:
            self.held.append(text)
            self._size += len(text)
        else:
            self.feed(text, end, out)

    def feed(self, text: str, end: int, out: list[Found], last: bool = False) -> None:
        """Passes on what can be, now that there is more text or a source; with `last` everything."""
        text = "".join([*self.held, text])
        at = 0
        self.held, self._waits = [], False
        while match := _MARK.search(text, at):
            start = match.start()
            if start > at:
                out.append(Text(text[at:start]))
            after = self._mark(text, start, end - len(text), out, last)
            if after is None:
                self.held = [text[start:]]
                self._size = len(text) - start
                return
            at = after
        if at < len(text):
            out.append(Text(text[at:]))

    def _mark(self, text: str, start: int, before: int, out: list[Found], last: bool) -> int | None:
        """Passes on what stands for the mark at `start`; where the text goes on, None when that is not known yet."""
        if text[start] == "(":
            return self._sandbox(text, start, out, last)
        end = text.find("\ue201", start)
        if text[start] != "\ue200" or (end < 0 and len(text) - start > MAX_MARK):
            return start + 1
        if end < 0:
            return re.compile(r"\S*").match(text, start).end() if last else None  # type: ignore[union-attr] # matches ""
        link = self._link(text[start : end + 1], before + start)
        if link is None and not last and len(text) - start <= MAX_HELD_BACK:
            self._waits = True
            return None
        if link:
            out.append(Text(link))
        return end + 1

    def _sandbox(self, text: str, start: int, out: list[Found], last: bool) -> int | None:
        more = text[start : start + MAX_MARK]
        if ")" in more and (link := _SANDBOX_LINK.match(text, start)):
            out += [Text("("), SandboxLink(link[1], str(self.message.get("id")))]
            return link.end(1)
        if not last and len(text) - start <= MAX_MARK and not re.search(f"[\n{_PRIVATE}]", more):
            return None
        out.append(Text("("))
        return start + 1

    def _link(self, mark: str, start: int) -> str | None:
        """The sources of a citation as Markdown links; "" when it has none, None when they are not known yet."""
        metadata = self.message.get("metadata")
        for one in dicts(_at(metadata, ("content_references",))):
            if one.get("matched_text") == mark:
                items = [item for item in (*dicts(one.get("items")), one) if isinstance(item.get("url"), str)]
                links = dict.fromkeys(_markdown_link(item) for item in items if item["url"])
                alt = one["alt"] if isinstance(one.get("alt"), str) else ""
                return ", ".join(links) or re.sub(f"[{_PRIVATE}]", "", alt)
        for one in dicts(_at(metadata, ("citations",))):
            here = one.get("start_ix")
            source = one.get("metadata")
            if isinstance(here, int) and start <= here < start + len(mark) and isinstance(source, dict):
                return _markdown_link(source) if isinstance(source.get("url"), str) else ""
        return None


def unmarked(text: str) -> str:
    """A text without marks, where nothing can stand for them."""
    return re.sub(f"\ue200[^\ue200\ue201]{{0,1000}}\ue201|[{_PRIVATE}]", "", text)


def _markdown_link(source: Mapping[str, Any]) -> str:
    """`[title](url)`; what would end either part early is escaped."""
    url = re.sub(r"[\s()<>]", lambda match: urllib.parse.quote(match[0], safe=""), source["url"])
    title = re.sub(r"\s+", " ", str(source.get("title") or urllib.parse.urlsplit(url).hostname or url))
    return "[" + re.sub(r"([\[\]\\])", r"\\\1", unmarked(title)) + f"]({url})"


class Replayed:
    """What was sent with a question, which the upstream may repeat before its answer: by the messages' ids, by the texts of
    what the model is told that it said, and by pointers to images."""

    def __init__(self, body: Mapping[str, Any]) -> None:
        """`body` is the conversation body."""
        self.ids: set[str] = set()
        self._said: set[str] = set()
        self.pointers: set[str] = set()
        self.by_text = True  # whether a text tells a repetition
        self.into = bool(body.get("conversation_id"))  # whether they were sent into a known conversation
        for message in dicts(body.get("messages")):
            self.ids.add(str(message.get("id")))
            if _at(message, ("author", "role")) == "assistant":
                self._said.add(text_of_parts(message))
            for part in dicts(_at(message, ("content", "parts"))):
                self.pointers.add(str(part.get("asset_pointer")))

    def repeated(self, id: str, message: Mapping[str, Any]) -> bool:
        """Whether a message that begins is one that was sent: under its id or, complete at once, with its text."""
        if id in self.ids:
            return True
        whole = self.by_text and message.get("status") == "finished_successfully"
        said = whole and self._said and _at(message, ("author", "role")) == "assistant"
        return bool(said) and text_of_parts(message) in self._said


class _Growing:
    """A message under way: who it is for, and how much of its text has been passed on."""

    def __init__(self, message: dict[str, Any], sent: Replayed) -> None:
        self.raw = message
        self.id = identifier(message.get("id"))
        self.pointers = sent.pointers  # to images that are not the answer's
        self.echo = sent.repeated(self.id, message)  # whether it is no part of the answer either
        self.sent = 0
        self.again = 0  # characters of it that come a second time
        self.prose = Prose(message)
        self.shown: set[str] = set()  # what has been passed on that comes whole
        self.thoughts: dict[tuple[int, str], int] = {}  # how much of each thought's summary and content
        self.unended = ""  # of the thoughts, what may be the beginning of a mark
        self.follows = False  # whether there were thoughts in a message before it
        self.changed = True  # whether its text may have grown otherwise than by `append`
        self._tail = io.StringIO()  # appended to part 0 since `raw` was last brought up to date
        self.kind = self._kind()

    def append(self, more: str, out: list[Found]) -> None:
        """Appends to part 0, in constant time, and passes it on; once per token."""
        self._tail.write(more)
        if self.again:
            had = min(self.again, len(more))
            self.again -= had
            if not (more := more[had:]):
                return
        self.sent += len(more)
        if self.prose.held or (("(" in more or not more.isascii()) and _MARK.search(more)):
            self.prose.add(more, self.sent, out)
        else:
            out.append(Text(more))

    def appendable(self) -> bool:
        """Whether text can be appended to part 0 without a look at the rest: no other part follows it."""
        parts = _at(self.raw, ("content", "parts"))
        return self.kind is Text and isinstance(parts, list) and len(parts) == 1 and isinstance(parts[0], str)

    def patch(self, steps: list[str | int], op: str, value: Any) -> None:
        """Applies one operation of the v1 encoding."""
        if steps[:1] == ["content"]:
            self.changed = True
            if tail := self._tail.getvalue():
                self.raw["content"]["parts"][0] += tail
                self._tail = io.StringIO()
        _patch(self.raw, steps, op, value)
        self.kind = self._kind()

    def _kind(self) -> type[Text] | type[Reasoning] | type[ToolUse] | type[Drawing] | None:
        """The kind of event that it becomes, None for none. "Which messages are the answer"."""
        message = self.raw
        kind = _at(self.raw, ("content", "content_type"))
        role = _at(message, ("author", "role"))
        recipient = message.get("recipient", "all")
        hidden = (
            _at(message, ("metadata", "is_visually_hidden_from_conversation")) or message.get("weight") == 0
        )
        if self.echo or hidden:
            return None
        if role == "tool":
            return ToolUse if kind == "execution_output" else Drawing if kind == "multimodal_text" else None
        if role != "assistant":
            return None
        if kind in ("thoughts", "reasoning_recap"):
            return Reasoning
        if kind == "code" and recipient != "all":
            return ToolUse
        if kind not in ("text", "multimodal_text") or recipient != "all":
            return None
        return Text if message.get("channel") in (None, "final") else None

    def grow(self, out: list[Found], over: bool = False) -> None:
        """Passes on what has come otherwise than by `append`; with `over` all that is still held back."""
        kind = self.kind
        if kind is Reasoning:
            if more := self._thought(over):
                out.append(Reasoning(more))
            return
        if kind is Text:
            more = self._more()
            if more or self.prose.held:
                self.prose.feed(more, self.sent, out, over)
        if kind is not None and (over or self.raw.get("status") == "finished_successfully"):
            self._show(out)

    def _show(self, out: list[Found]) -> None:
        """Passes on what comes whole: code, its output, images."""
        content = self.raw["content"]
        if self.kind is ToolUse and "" not in self.shown and isinstance(text := content.get("text"), str):
            self.shown.add("")
            recipient = str(self.raw.get("recipient"))
            language = str(content.get("language") or "unknown")
            code = content["content_type"] == "code"
            named = "" if not code else recipient if language == "unknown" else language
            if text.strip():
                out.append(ToolUse(named if named.isalnum() else "", unmarked(text)))
        for part in dicts(content.get("parts")):
            pointer = part.get("asset_pointer")
            kind = part.get("content_type")
            if kind != "image_asset_pointer" or not isinstance(pointer, str):
                continue
            if pointer not in self.shown and pointer not in self.pointers:
                self.shown.add(pointer)
                out.append(Drawing(pointer))

    def _more(self) -> str:
        """The text that has come otherwise than by `append`."""
        if not self.changed:
            return ""
        self.changed = False
        text = text_of_parts(self.raw)[self.sent :]
        self.sent += len(text)
        return text

    def _thought(self, over: bool) -> str:
        """The growth of thoughts, or of a recap of them; a mark that may still be cut waits for its end."""
        content = self.raw["content"]
        thoughts = dicts(content.get("thoughts")) or [{"content": content.get("content")}]
        more = self.unended
        for i, one in enumerate(thoughts):
            for name in ("summary", "content"):
                text = str(one.get(name) or "")
                had = self.thoughts.get((i, name), 0)
                if len(text) > had:
                    paragraph = "\n" if (i, "summary") in self.thoughts else "\n\n"
                    first = not self.thoughts and not self.follows
                    more += ("" if had or first else paragraph) + text[had:]
                    self.thoughts[i, name] = len(text)
        open_mark = None if over else re.search("\ue200[^\ue201]{0,1000}\\Z", more)
        self.unended = open_mark[0] if open_mark else ""
        return unmarked(more[: len(more) - len(self.unended)])

    def ending(self) -> str:
        """Why it ended, "" while it has not: length or stop."""
        details = _at(self.raw, ("metadata", "finish_details", "type"))
        end_turn = self.raw.get("end_turn")
        if details == "max_tokens":
            return "length"
        stopped = details in ("stop", "interrupted") and end_turn is not False
        return "stop" if stopped or (end_turn and self.raw.get("status") == "finished_successfully") else ""


_ANSWER_PATH = "/message/content/parts/0"
_CONTENT = {Text, ToolUse, Drawing, SandboxLink}  # what an answer may consist of; thoughts alone are none


class Decoder:
    """The upstream's answer, in either encoding, as typed events. "The answer: server-sent events, two encodings".

    `feed` takes bytes however they are cut; `finish` tells afterwards how the answer ended, `done` already when the
    last event was there. One decoder lives through a continued answer, so that nothing of it is passed on twice. What
    was `sent`, which the upstream repeats before its answer, is none of that.

    An answer may go on elsewhere ("Hand-off"): `unfinished` tells so, `seen` and `resume_token` are what asks for the rest,
    and `go_on` gets ready for it. `awaits_drawing` tells that an image is being made behind the answer's end.
    """

    def __init__(self, sent: Mapping[str, Any] | None = None) -> None:
        """`sent` is the conversation body."""
        self._sent = Replayed(sent or {})
        self.content = False  # whether there was anything of an answer
        self.conversation = self.message = self.model = ""
        self.failure: Refusal | None = None  # that came behind events of the same batch
        self.failed = False  # whether nothing more is to be had of this answer
        self.resume_token = ""
        self.seen = 0  # events
        self.follows = 0  # times that the rest was asked for elsewhere
        self._drawings = 0
        self._begun = False
        self._messages: dict[str, _Growing] = {}
        self.renew()

    def renew(self) -> None:
        """Gets ready for the bytes of the call that goes on with this answer."""
        self.lines = EventStream()
        self.seen, self.resume_token = 0, ""
        self._sent.by_text = True
        self._channel: int | str = 0  # whose message the next delta is for
        self._channels: dict[int | str, _Growing] = {}
        self._current: _Growing | None = None
        self._latest: _Growing | None = None  # the message that began last
        self.failure = None
        self._path, self._op = "", "add"
        self._hot = False  # the last event appended to part 0 of an answering message
        self._reason, self.done, self.handed_off = "", False, False
        self._resumed = False  # whether what came already may come again

    def go_on(self, whole: bool = False) -> None:
        """Gets ready for the rest of the answer, from the event after the last one or (after a hand-off) from the first one
        on. With `whole` it comes as messages of which each is the answer's."""
        self.seen = 0 if self.handed_off else self.seen
        self.follows += 1
        self.lines = EventStream()
        self.failure = None
        self._hot = self.done = self.handed_off = False
        self._resumed = True
        self._sent.by_text = not whole

    @property
    def unfinished(self) -> bool:
        """Whether the end of the answer has not come."""
        return not self._reason and (self.handed_off or not self.done)

    @property
    def awaits_drawing(self) -> bool:
        """Whether the model has an image made that has not come."""
        tasks = {_drawing_task(one.raw) for one in self._messages.values()} - {""}
        return len(tasks) > self._drawings

    @property
    def drew(self) -> bool:
        """Whether the model has an image made."""
        return self._drawings > 0 or self.awaits_drawing

    @property
    def sent_ids(self) -> Collection[str]:
        """The ids of the messages that were sent into a conversation that there was before."""
        return self._sent.ids if self._sent.into else ()

    @property
    def pending(self) -> int:
        """Bytes of an event that has not come whole."""
        return self.lines.size

    def feed(self, data: bytes) -> list[Found]:
        """The events that have become whole; Refusal when the upstream says that it failed, or cannot be followed."""
        try:
            return self._fed(data)
        except Refusal:
            self.failed = True
            raise

    def _fed(self, data: bytes) -> list[Found]:
        out: list[Found] = []
        events = self.lines.feed(data)
        self.seen += len(events)
        for text in events:
            if text[:1] != "{":
                self.done = self.done or text == "[DONE]"
                continue
            if len(text) > MAX_JSON_TOKENS // 2 and too_many_values(text.encode("utf-8", "replace")):
                continue
            try:
                value = decode(text)[0]
            except (ValueError, RecursionError):
                continue
            # Once per token: {"v": "…"} goes on appending to the answer's first part.
            if self._hot and len(value) == 1 and type(more := value.get("v")) is str:
                self._current.append(more, out)  # type: ignore[union-attr] # hot: there is one
                continue
            try:
                self._take(value, out)
            except Refusal as refused:
                if not out:
                    raise
                self.failure, self.failed = refused, True
                break
        if self._current is not None and self._current.sent > MAX_MESSAGE:
            raise Refusal("broken", "The upstream's answer is too long; it was abandoned.")
        self._noted(out)
        return out

    def _noted(self, out: list[Found]) -> None:
        """Takes note of what of an answer there is."""
        kinds = list(map(type, out))
        self.content = self.content or not _CONTENT.isdisjoint(kinds)
        self._drawings += kinds.count(Drawing)

    def rest(self) -> list[Found]:
        """The events that were still held back, once nothing more comes."""
        out: list[Found] = []
        for message in self._channels.values():
            message.grow(out, over=True)
        self._noted(out)
        return out

    def finish(self) -> Finish | None:
        """The end of the answer, None when it was cut off."""
        if not self._reason and not self.done:
            return None
        return Finish(self._reason or "stop", self.conversation, self.message)

    def _take(self, value: dict[str, Any], out: list[Found]) -> None:
        """One event of any kind."""
        self._hot = False
        if "v" in value or "p" in value or "o" in value:
            self._turn_to(value.get("c"))
            self._path = str(value.get("p", self._path))
            self._op = str(value.get("o", self._op))
            self._apply(self._path, self._op, value.get("v"), out)
            self._hot = self._path == _ANSWER_PATH and self._op == "append" and self._appendable() is not None
        elif "message" in value or "error" in value:
            self._begin(value, out)
        elif value.get("type") == "message_stream_complete":
            self.conversation = identifier(value.get("conversation_id")) or self.conversation
            return
        elif value.get("type") == "resume_conversation_token":
            token = value.get("token")
            usable = isinstance(token, str) and re.fullmatch(r"[\x21-\x7e]{1,16384}", token)
            self.resume_token = str(token) if usable else self.resume_token
            self.conversation = identifier(value.get("conversation_id")) or self.conversation
            return
        elif value.get("type") == "stream_handoff":
            self.handed_off = True
            return
        elif value.get("type") == "moderation" and _at(value, ("moderation_response", "blocked")):
            self._reason = "content_filter"
            return
        if self._current is not None:
            self._pass_on(self._current, out)

    def _turn_to(self, channel: Any) -> None:
        """Turns to the message that a delta is for, by its `c`; without one it is for the same as the delta before."""
        if isinstance(channel, (int, str)) and channel != self._channel:
            self._channel = channel
            self._current = self._channels.get(channel)

    def _appendable(self) -> _Growing | None:
        return self._current if self._current is not None and self._current.appendable() else None

    def _begin(self, value: dict[str, Any], out: list[Found]) -> None:
        """A message, new or (in the cumulative encoding) known and grown."""
        told = value.get("message")
        failed = _at(told, ("content", "content_type")) == "system_error"
        if failed or value.get("error") or value.get("error_code"):
            raise broken_off(value)
        self.conversation = identifier(value.get("conversation_id")) or self.conversation
        if not isinstance(told, dict):
            return
        message = _Growing(told, self._sent)
        known = self._messages.get(message.id)
        if self._latest is not None and self._latest is not known:
            self._latest.grow(out, over=True)
        message.follows = message.kind is Reasoning and any(one.thoughts for one in self._messages.values())
        if known is not None:
            if known.echo:
                message.echo = True
                message.kind = None
            message.sent, message.prose, message.shown = known.sent, known.prose, known.shown
            message.again = max(0, known.sent - len(text_of_parts(told))) if self._resumed else 0
            message.thoughts, message.unended = known.thoughts, known.unended
            message.prose.message = message.raw
        elif message.kind is Text and self._reason != "content_filter":
            self._reason = ""  # an earlier message's end was not the answer's
        if message.id:
            self._messages[message.id] = message
            if len(self._messages) > MAX_MESSAGES:
                raise Refusal("broken", "The upstream's answer has too many messages; it was abandoned.")
        self._current = self._latest = self._channels[self._channel] = message
        if len(self._channels) > MAX_MESSAGES:
            raise Refusal("broken", "The upstream's answer has too many channels; it was abandoned.")

    def _apply(self, path: str, op: str, value: Any, out: list[Found]) -> None:
        """One operation of the v1 encoding; paths that lead nowhere are passed over."""
        current = self._current
        if op == "patch" and isinstance(value, list):
            for one in value:
                if isinstance(one, dict) and one.get("o") != "patch":
                    inner = str(one.get("p", ""))
                    whole = inner if inner.startswith("/message") else path + inner
                    self._apply(whole, str(one.get("o", "append")), one.get("v"), out)
        elif path == "" and isinstance(value, dict):
            self._begin(value, out)
        elif path == "/conversation_id":
            self.conversation = identifier(value) or self.conversation
        elif (
            path == _ANSWER_PATH
            and op == "append"
            and isinstance(value, str)
            and (answer := self._appendable())
        ):
            answer.append(value, out)
        elif current is not None and path.startswith("/message/"):
            current.patch([_step(step) for step in path.split("/")[2:]], op, value)

    def _pass_on(self, message: _Growing, out: list[Found]) -> None:
        """Passes on what a message for the client has grown by, and notes whether it is the end."""
        kind = message.kind
        if kind is None:
            return
        told = message.raw.get("metadata")
        for name in ("model_slug", "resolved_model_slug"):
            self.model = identifier(_at(told, (name,))) or self.model
        if not self._begun:
            self._begun = True
            out.insert(0, Begin(self.model, self.conversation, message.id))
        message.grow(out)
        if kind is Text:
            self.message = message.id or self.message
            if self._reason != "content_filter":
                self._reason = message.ending() or self._reason


class MobileDecoder(Decoder):
    """The same for the mobile page's answers, lines of JSON: the whole text so far, or what is new of it."""

    def renew(self) -> None:
        super().renew()
        self._parts: list[bytes] = []  # of a line that has not ended
        self._size = 0
        self._texts = dict[str, int]()  # characters of each message that were passed on

    @property
    def pending(self) -> int:
        return self._size

    def _fed(self, data: bytes) -> list[Found]:
        self._parts.append(data)
        self._size += len(data)
        if self._size > MAX_EVENT:
            raise Refusal("broken", "The upstream sent a line that does not end; its answer was abandoned.")
        if b"\n" not in data:
            return []
        whole, _, rest = b"".join(self._parts).rpartition(b"\n")
        self._parts = [rest]
        self._size = len(rest)
        out: list[Found] = []
        for line in whole.split(b"\n"):
            if line[:1] != b"{":
                continue
            try:
                self._say(decode(line.decode("utf-8", "replace"))[0], out)
            except (ValueError, RecursionError):
                continue
            except Refusal as refused:
                if not out:
                    raise
                self.failure, self.failed = refused, True
                break
        self._noted(out)
        return out

    def rest(self) -> list[Found]:
        return []

    def _say(self, value: dict[str, Any], out: list[Found]) -> None:
        kind = value.get("type")
        text = value.get("markdown")
        for place in (value, inner(value, "detail")):
            self.conversation = identifier(place.get("conversationId")) or self.conversation
        if kind == "error":
            raise broken_off({"error": value})
        if kind == "end":
            self.done = True
        elif kind == "content" and isinstance(text, str):
            if not self._begun:
                self._begun = True
                self.message = identifier(value.get("messageId"))
                out.append(Begin("", self.conversation, self.message))
            id = identifier(value.get("messageId"))
            had = self._texts.get(id, 0)
            more = text if value.get("mode") in ("append", "delta") else text[had:]
            self._texts[id] = had + len(more)
            if sum(self._texts.values()) > MAX_MESSAGE or len(self._texts) > MAX_MESSAGES:
                raise Refusal("broken", "The upstream's answer is too long; it was abandoned.")
            if more:
                out.append(Text(unmarked(more)))


def _drawing_task(message: Mapping[str, Any]) -> str:
    """The task of a message which tells that an image is being made, or has one; "" for others. "Images"."""
    metadata = message.get("metadata")
    task = _at(metadata, ("image_gen_task_id",))
    told = _at(metadata, ("image_gen_async",)) or _at(metadata, ("async_task_type",)) == "image_gen"
    return str(task) if task else "image" if told else ""


def turn_of(conversation: Mapping[str, Any], sent: Collection[str]) -> list[dict[str, Any]]:
    """The messages of a conversation behind the last one of its user, oldest first, as `GET B/conversation/ID` has them; none
    where that one is not among the ids that were `sent`, if any were: then what stands there answers something else."""
    nodes = inner(conversation, "mapping")
    id: Any = conversation.get("current_node")
    found: list[dict[str, Any]] = []
    for _ in range(MAX_MESSAGES):
        node = nodes.get(id) if isinstance(id, str) else None
        message = _at(node, ("message",))
        if node is None:
            break
        if _at(message, ("author", "role")) == "user":
            found = found if not sent or _at(message, ("id",)) in sent else []
            break
        if isinstance(message, dict):
            found.append(message)
        id = _at(node, ("parent",))
    return found[::-1]


def is_last(message: Mapping[str, Any], with_text: bool = False, settled: bool = False) -> bool:
    """Whether a message of the upstream's is the end of an answer. `with_text`: not one that says nothing; `settled`: nobody
    is at work on another one."""
    text = text_of_parts(message).strip()
    answers = _at(message, ("author", "role")) == "assistant" and message.get("recipient", "all") == "all"
    if not answers or message.get("status") != "finished_successfully" or (with_text and not text):
        return False
    end = message.get("end_turn")
    return bool(end or (settled and end is None and text))


def broken_off(value: Mapping[str, Any]) -> Refusal:
    """What it means that the upstream says within its answer that it failed."""
    content = _at(value, ("message", "content"))
    said = compact([value.get("error"), value.get("error_code"), content])
    if "unusual activity" in said[:20_000].lower():
        text = "The upstream refused to go on with its answer: it sees unusual activity."
        return Refusal(
            "blocked", f"{text} Open chatgpt.com in a browser from this address, or use another one."
        )
    return Refusal("broken", "The upstream broke off its answer with an error; try again.")


def identifier(value: Any) -> str:
    """An id or a model's name as the upstream gives it, "" for what is none."""
    return value if isinstance(value, str) and len(value) <= MAX_NAME and _NAME_TEXT.fullmatch(value) else ""


_NAME_TEXT = re.compile(r"[\x21-\x7e]+")


def _step(text: str) -> str | int:
    """A step of a JSON pointer; array indexes as numbers."""
    return int(text) if text.isdecimal() and len(text) < 7 else text.replace("~1", "/").replace("~0", "~")


def _at(value: Any, steps: Iterable[str | int]) -> Any:
    """The value that some steps lead to, None when they lead nowhere."""
    for step in steps:
        try:
            value = value[step]
        except (KeyError, IndexError, TypeError):
            return None
    return value


def _patch(target: Any, steps: list[str | int], op: str, value: Any) -> None:
    """Applies one operation where the pointer leads, if it leads anywhere."""
    target = _at(target, steps[:-1])
    last = steps[-1]
    if isinstance(target, dict):
        last = str(last)
        old = target.get(last)
    elif isinstance(target, list) and isinstance(last, int) and last <= len(target):
        old = target[last] if last < len(target) else None
    else:
        return
    if op == "remove":
        if isinstance(target, dict):
            target.pop(last, None)
        elif isinstance(last, int) and last < len(target):
            del target[last]
        return
    if op == "append" and isinstance(old, str) and isinstance(value, str):
        if len(old) + len(value) > MAX_MESSAGE:
            raise Refusal("broken", "The upstream's answer is too long; it was abandoned.")
        value = old + value
    elif op == "append" and isinstance(old, list):
        value = [*old, *value] if isinstance(value, list) else [*old, value]
    elif op == "append" and isinstance(old, dict) and isinstance(value, dict):
        value = old | value
    elif op == "truncate" and isinstance(old, (str, list)) and isinstance(value, int):
        value = old[:value]
    elif op == "add" and isinstance(target, list) and isinstance(last, int):
        target.insert(last, value)
        return
    if isinstance(target, list) and last == len(target):
        target.append(value)
    else:
        target[last] = value


# ============================================================================================================
# files: what comes with a message, and who holds it
# ============================================================================================================


UPLOADS = "files"  # what the rate limits of uploads are counted under
NO_IMAGE = "is not a PNG, JPEG, GIF or WebP image; send other files as `file` or `input_file`."
MAX_ATTACHMENTS = 100  # in a request
_MIME = re.compile(r"[0-9A-Za-z_.+-]{1,100}/[0-9A-Za-z_.+-]{1,100}")


class Files:
    """Files on their way to the accounts that need them: fetched from URLs, found again by content or id, uploaded."""

    def __init__(self, pool: Pool, site: ChatGPT) -> None:
        self.pool, self.store, self.site = pool, pool.store, site
        self.fetcher = site.fetcher
        self._uploads_lock = threading.Lock()
        self._uploads: dict[tuple[str, str], Future[None]] = {}  # under way, by account and content

    def find(self, id: str, scope: Scope, where: str | None = None) -> File:
        """A file by its id, if the caller may see it; else not_found."""
        found = self.store.files("id=?", id)
        if found and scope.covers(found[0].owner):
            return found[0]
        raise ApiError("not_found", "There is no such file; upload it with POST /v1/files.", where)

    def gathered(self, attachment: Attachment, scope: Scope, watch: Watch) -> tuple[File, Blob | None]:
        """A message's file, and its bytes unless an account has it already; fetched if it is given by URL."""
        blob, mime, name = attachment.blob, attachment.mime, attachment.name
        if attachment.file:
            file = self.find(attachment.file, scope, attachment.where)
            if attachment.image and not file.width:
                raise unfit(attachment.where, NO_IMAGE)
            return file, None
        if blob is None:
            blob, said, named = self.fetcher.fetched(attachment.url, attachment.where, watch)
            mime = mime or said
            name = name or named
        file = self.described(blob, name, mime, scope.owner)
        if attachment.image and not file.width:
            raise unfit(attachment.where, NO_IMAGE)
        return file, blob

    @staticmethod
    def described(blob: Blob, name: str, mime: str, owner: str) -> File:
        """Bytes as a file that nobody holds yet: images are known by their bytes, others by name or declared type."""
        facts = image_facts(blob)
        name = re.sub(r"[\x00-\x1f\x7f/\\]", "_", name)[-200:]
        guessed = mimetypes.guess_type(name)[0] or ""
        mime = mime.partition(";")[0].strip().lower()
        vague = mime in ("", "application/octet-stream", "binary/octet-stream") or not _MIME.fullmatch(mime)
        kind, width, height = facts or (guessed if vague else mime, 0, 0)
        if not kind:
            head = blob.read(0, 4096)
            plain = "text/plain" if head.isascii() and b"\0" not in head else "application/octet-stream"
            kind = "application/pdf" if head[:5] == b"%PDF-" else plain
        if not name:
            name = "file" + ({"text/plain": ".txt"}.get(kind) or mimetypes.guess_extension(kind) or "")
        return File("", owner, "", "", name, kind, blob.size, width, height, "", blob.digest(), time.time())

    def known(self, account: Account, file: File) -> File | None:
        """The file as an account holds it already, by its place or its content."""
        if file.account == account.id:
            return file
        for one in self.store.files("digest=? AND account=?", file.digest, account.id):
            if use_case(one) == use_case(file):
                if not one.purpose and one.used < time.time() - 3600:
                    with contextlib.suppress(StoreUnavailable):  # it is forgotten a little earlier
                        self.store.put_file(one._replace(used=time.time()))
                return one._replace(name=file.name, mime=file.mime)
        return None

    def placed(self, account: Account, file: File, blob: Blob, watch: Watch) -> File:
        """The file as an account holds it: known, or uploaded now, at a time by one of those who need it."""
        key = (account.id, file.digest)
        mine = Future[None]()
        while True:
            if found := self.known(account, file):
                return found
            with self._uploads_lock:
                other = self._uploads.setdefault(key, mine)
            if other is mine:
                break
            watch.result(other)  # who uploads sees to it that it ends
        try:
            id = self._sent(account, file, blob, watch)
            file = file._replace(account=account.id, upstream=id, purpose="", used=time.time())
            with contextlib.suppress(StoreUnavailable):  # it is uploaded again next time
                file = self.kept(file)
            return file
        finally:
            with self._uploads_lock:
                del self._uploads[key]
            mine.set_result(None)

    def _sent(self, account: Account, file: File, blob: Blob, watch: Watch) -> str:
        """Uploads a file; what the account is told then is about uploads, not about a model."""
        wait = account.wait_for(UPLOADS, time.time())
        if wait and self.site.settings.enable_limit:
            raise Refusal("limited", "The upstream's limit for uploads is reached.", wait=wait, about=UPLOADS)
        try:
            return self.site.upload(account, file, blob, watch)
        except Refusal as refused:
            refused.about = UPLOADS
            raise

    def renewed(self, account: Account, held: File, blob: Blob, watch: Watch) -> File:
        """Uploads again what the upstream has forgotten: all entries of it lead to the new one."""
        id = self._sent(account, held, blob, watch)
        self.store.move_file(account.id, held.upstream, id)
        return held._replace(upstream=id)

    def kept(self, file: File) -> File:
        """Stores a file under a new id."""
        file = file._replace(id=f"file-{secrets.token_hex(12)}")
        self.store.put_file(file)
        return file

    def owned(self, account: Account, file: File, owner: str) -> File:
        """The owner's own entry of a file that an account holds."""
        held = self.store.files("digest=? AND account=?", file.digest, account.id)
        if mine := [one for one in held if one.owner == owner]:
            return mine[0]
        return self.kept((held or [file])[0]._replace(owner=owner, purpose="", used=time.time()))

    def content(self, account: Account, file: File, watch: Watch) -> Blob:
        """A file's bytes from the account that holds it."""
        url = self.site.file_url(account, file.upstream, watch)
        return self.site.downloaded(account, url, watch)


LINK_LIFE = 3600.0  # seconds that a link to a file of an answer is good for
MAX_LINKED, MAX_LINKED_FILE = 512 << 20, 64 << 20  # bytes of all such files, and of one
_LINKED_ID = re.compile(r"answer-[0-9a-f]{32}")


class Links:
    """Files of answers that only an account may fetch, kept here for LINK_LIFE for whoever has their link.

    A link is the path `/v1/files/ID/content` with `name`, `type`, `until` (Unix seconds) and `signature`, an HMAC of the rest
    with a key of this server's. The files lie in the folder `links` beside the store; the oldest go for want of room.
    """

    def __init__(self, folder: pathlib.Path) -> None:
        self._folder = folder
        self._folder_lock = threading.Lock()

    @functools.cached_property
    def _key(self) -> bytes:
        """The key of this server's links, made with the first one; it goes where it belongs whole, or not at all."""
        self._folder.mkdir(mode=0o700, exist_ok=True)
        path = self._folder / "key"
        if not path.exists():
            with tempfile.NamedTemporaryFile(dir=self._folder) as file:
                file.write(secrets.token_bytes(32))
                file.flush()
                try:
                    os.link(file.name, path)
                except FileExistsError:  # another process was quicker
                    pass
                except OSError:  # not every disk knows links
                    os.rename(shutil.copyfile(file.name, f"{file.name}.key"), path)
        return path.read_bytes()

    def kept(self, pieces: Iterable[bytes], name: str, mime: str) -> str:
        """The link to a file of these bytes, "" when it is too large or there is no room for it."""
        id = f"answer-{secrets.token_hex(16)}"
        path = self._folder / id
        size = 0
        facts = {"name": name, "type": mime, "until": str(int(time.time() + LINK_LIFE))}
        try:
            query = urllib.parse.urlencode(
                facts | {"signature": self._signature(id, facts)}, errors="replace"
            )
            with open(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600), "wb") as file:
                for piece in pieces:
                    file.write(piece)
                    size += len(piece)
                    if size > MAX_LINKED_FILE:
                        raise OSError(errno.EFBIG, "it is too large")
        except BaseException as error:
            with contextlib.suppress(OSError):
                path.unlink()
            if not isinstance(error, OSError):
                raise
            log(logging.WARNING, "a file of an answer cannot be kept", reason=error.strerror)
            return ""
        self.sweep(time.time())
        return f"/v1/files/{id}/content?{query}"

    def file(self, id: str, query: Mapping[str, str]) -> tuple[Blob, str, str] | None:
        """Bytes, name and type of a file, for who has its link; None for a link that is none, or not any more."""
        facts = {name: query.get(name, "") for name in ("name", "type", "until")}
        given = query.get("signature", "").encode("utf-8", "replace")
        if not given or not _LINKED_ID.fullmatch(id) or not self._folder.exists():
            return None
        try:
            if not hmac.compare_digest(self._signature(id, facts).encode(), given):
                return None
            if int(facts["until"]) < time.time():
                return None
            return Blob.of_file(self._folder / id), facts["name"], facts["type"]
        except OSError:
            return None

    def of(self, url: str) -> Blob | None:
        """The bytes that a URL of such a link leads to."""
        parts = urllib.parse.urlsplit(url)
        match = re.search(r"/v1/files/([^/]+)/content\Z", parts.path)
        found = match and self.file(match[1], dict(urllib.parse.parse_qsl(parts.query)))
        return found[0] if found else None

    def _signature(self, id: str, facts: Mapping[str, str]) -> str:
        text = compact([id, dict(facts)]).encode("utf-8", "replace")
        return hmac.new(self._key, text, hashlib.sha256).hexdigest()

    def sweep(self, now: float) -> None:
        """Removes what no link leads to any more, and the oldest while all are too large."""
        with self._folder_lock, contextlib.suppress(OSError):
            files = []
            for one in os.scandir(self._folder):
                with contextlib.suppress(OSError):
                    if _LINKED_ID.fullmatch(one.name):
                        files.append((one.stat().st_mtime, one.stat().st_size, one.path))
            total = sum(size for _, size, _ in files)
            for made, size, path in sorted(files):
                if made + LINK_LIFE < now or total > MAX_LINKED:
                    with contextlib.suppress(OSError):
                        os.unlink(path)
                    total -= size


# ============================================================================================================
# turns: a question becomes events, whichever account and however many attempts it takes
# ============================================================================================================

NEXT = "next"
# What is done about a refusal, by its reason: of these methods of an `Attempts`, in their order, the first that there is and
# that can help. Each is tried once on whoever was asked; then the next one is asked, if that is among them.
REMEDIES: dict[str, tuple[str, ...]] = {
    "expired": ("renew_token", "go_mobile", NEXT),
    "excluded": (NEXT,),
    "unsupported": ("leave_out",),
    "unreadable": ("drop_reasoning", NEXT),
    "blocked": ("require_anew", "prove_otherwise", "go_mobile", NEXT),
    "uncredited": ("renew_token", NEXT),
    "human": ("require_anew", "go_mobile", NEXT),
    "limited": (NEXT,),
    "broken": (NEXT,),
    "unreachable": (NEXT,),
    "unlisted": (NEXT,),
    "forgotten": ("upload_anew",),
    "silent": (),
    "missing": ("go_mobile",),
    "rejected": (),
    "dead": (),
}
# Those that an account is told to have had, as its failures.
_FAILURES = (
    "expired", "blocked", "uncredited", "human", "limited", "broken", "unreachable", "unlisted", "silent", "dead", "excluded",
)  # fmt: skip
# Those that are about an account's token.
_OF_TOKEN = ("expired", "uncredited")
_LIGHT = {Text, Reasoning}  # the events that the loop passes on; everything else is for the request's thread
MAX_LIGHT = 1 << 16  # bytes that come together which the loop decodes
MAX_ASKED_FOR_MODELS = 20  # accounts
MAX_LINKS = 20  # different files of one answer that are looked up
MAX_RESUMED = 12  # times that the rest of an answer is asked for as a stream
RESUME_PAUSE = 0.3  # seconds between the first and the second time; they grow to 5
POLL_PAUSE = 2.0  # seconds between the first two looks into a conversation; they grow to 10
ANSWER_PATIENCE, DRAWING_PATIENCE = 3600.0, 150.0  # seconds that an answer, or an image, is looked for there
MAX_STILL = 4  # looks in a row at which nobody is at work on it


class Asked:
    """A question that somebody asks, whoever answers it in the end, and what of it is done once."""

    def __init__(
        self, question: Question, watch: Watch, guest: Account | None, scope: Scope, signed_in: bool = False,
        base: str = "",
    ) -> None:  # fmt: skip
        """`guest` is the one account that is to answer, None the pool; `scope` is whose conversations and files the
        question may use, `signed_in` whether a login-free account will not do, and `base` the URL of this server as the
        caller has it, for links."""
        self.question = question
        self.watch = watch
        self.guest = guest
        self.scope = scope
        self.signed_in = signed_in
        self.base = base
        self.keeps = False  # whether its conversation is remembered although HISTORY_DISABLED
        self.materials: dict[
            Attachment, tuple[File, Blob | None]
        ] = {}  # its files, and the bytes of new ones
        self.account: Account | None = None  # the account that has answered last


class Upstream(Protocol):
    """Somebody who answers questions. UPSTREAM_ORDER has the names."""

    name: str
    has_conversations: bool  # whether one can be gone on with by its id

    @property
    def files(self) -> Files | None:
        """Where the files that come with a question go; None if it takes none."""

    def holds(self, conversation: str, scope: Scope) -> bool:
        """Whether it is known to have a conversation of the caller's; it may raise not_found for one that is not."""

    def answer(self, asked: Asked, sink: Sink) -> None:
        """Has a question answered; Finish is the last event. ApiError when nobody could answer; after the first event,
        when the answer broke off."""

    def models(self, guest: Account | None, watch: Watch) -> dict[str, int]:
        """The models that it offers a caller, and when they were listed (Unix seconds)."""

    def is_sure(self) -> bool:
        """Whether there is somebody who surely is one of its own."""

    def has(self, model: str, guest: Account | None, watch: Watch) -> bool:
        """Whether it may have a model for a caller."""

    def takes(self, account: Account) -> bool:
        """Whether an account may be one of its own."""

    def check(self, account: Account, watch: Watch) -> None:
        """Asks whether an account works with it; ApiError when it does not."""


class Attempt:
    """One asking of a question: who was tried, and what the client has of the answer."""

    def __init__(self, asked: Asked, question: Question) -> None:
        """`question` is what is asked this time."""
        self.asked, self.question = asked, question
        self.watch, self.guest, self.scope = asked.watch, asked.guest, asked.scope
        self.materials = asked.materials
        self.once = False  # whether it must not be asked twice, where it may have been heard
        self.counts = False  # whether answers and failures of its accounts are counted
        self.kept_by: str | None = None  # the account that holds the conversation
        self.holder: str | None = None  # the one account that will do: it has the conversation or a file
        # The account to begin with, if it can be: one that was asked before has the files.
        self.preferred = asked.account.id if asked.account else None
        self.tried: list[Any] = []  # the accounts that were, or agents
        self.leased: Any = None  # the account that is asked, or the agent
        self.remedies: set[str] = set()  # that were tried with it
        # The access token of the call under way, and of the one before it.
        self.token = self.refused_token = ""
        self.spare = False  # whether that has requirements which were prepared ahead
        self.refused: Refusal | None = None  # what it was refused with
        self.otherwise = False  # whether its proof is to be made with the other algorithm
        self.mobile = False  # whether it is to be asked as the page for phones asks
        # What it was refused with when another way of asking is tried, whose own refusal is not told.
        self.doubted: Refusal | None = None
        # Whether the conversation is kept upstream, where the rest of its answer can be had.
        self.resumable = False
        self.enough = False  # whether nobody wants more of the answer
        self.lasting = False  # whether it is to be kept although HISTORY_DISABLED, until it is answered
        self.to_erase: dict[str, Account] = {}  # conversations that were kept so, and by whom
        self.held: dict[Attachment, File] = {}  # the question's files as the account holds them
        self.forgotten = False  # whether it turned out not to hold one any more
        self.decoder = Decoder()  # of the answer under way
        self.begun = False  # whether the client has anything of the answer
        self.failed = False  # whether the account's answer was counted as a failure
        self.tail: list[Event] = []  # what came together with the end of the answer
        self.continues: Finish | None = None  # where the answer was cut that the call under way goes on with
        self.kept = ""  # the conversation that is remembered for its account
        self.links: dict[SandboxLink, str] = {}  # URLs of the files that the model made


DONE = b"data: [DONE]\n\n"


def data_event(value: Any) -> bytes:
    """One server-sent event without a name."""
    return b"data: " + compact(value).encode("utf-8", "surrogatepass") + b"\n\n"


_EVENT_ENDS = re.compile(rb"\n\n|\r\n\r\n|\r\r")
_DONE_LINES = re.compile(rb"(?m)^data: ?\[DONE\]\r?\n(?:\r?\n)?")


class WithoutDone:
    """Bytes but for `[DONE]`; of an unfinished line no more is held back than could become that."""

    def __init__(self) -> None:
        self._rest = b""

    def feed(self, data: bytes) -> bytes:
        """The bytes that can be passed on now."""
        data = _DONE_LINES.sub(b"", self._rest + data)
        self._rest = b""
        line = data[data.rfind(b"\n") + 1 :]
        if line and DONE.startswith(line[: len(DONE) - 2]):
            data = data[: -len(line)]
            self._rest = line
        return data

    def end(self) -> bytes:
        """The bytes that were still held back."""
        rest, self._rest = self._rest, b""
        return b"" if rest.strip() == DONE.strip() else rest


class WholeEvents:
    """Bytes in whole events: of one that has not ended they are held back, up to MAX_LIGHT."""

    def __init__(self) -> None:
        self._held, self._stream = b"", 0

    def feed(self, data: bytes, stream: int, last: bool = False) -> tuple[bytes, int]:
        """What can be passed on now (with `last` all of it), and how many events end in it. What is held of an earlier
        `stream` is dropped: the next one begins with a whole event."""
        data = self._held + data if self._stream == stream else data
        ends = [match.end() for match in _EVENT_ENDS.finditer(data)]
        cut = len(data) if last or len(data) > MAX_LIGHT else ends[-1] if ends else 0
        self._held, self._stream = data[cut:], stream
        return data[:cut], len(ends)


class Attempts:
    """The loop over attempts, which every upstream asks in: one of those that may answer after the other, with the remedies
    that there are for a refusal, until the work is done or is not to be tried again."""

    retries: float = math.inf  # how many more are tried

    def __init__(self, metrics: Metrics) -> None:
        self.metrics = metrics

    def lease(self, attempt: Attempt) -> Any:
        """Chooses the next one to ask; ApiError when there is none."""
        raise NotImplementedError

    def ready(self, one: Any, attempt: Attempt) -> None:
        """Sees to it that it can be asked; Refusal when it cannot."""

    def learn(self, one: Any, attempt: Attempt, refused: Refusal) -> None:
        """Draws the consequences of a refusal that no remedy has helped."""

    def last(self, attempt: Attempt, refused: Refusal) -> ApiError:
        """The error that the client gets after the last attempt."""
        return refused

    def attempts(self, attempt: Attempt, work: Callable[[Any], T]) -> T:
        """The result of the work, done on one after the other; the last Refusal, or what `lease` raises, when none did it."""
        one = attempt.leased = attempt.leased or self.lease(attempt)
        while True:
            try:
                self.ready(one, attempt)
                return work(one)
            except Refusal as refused:
                if not self._helped(one, attempt, refused):
                    self.learn(one, attempt, refused)
                    one = attempt.leased = self._next(one, attempt, refused)

    def _helped(self, one: Any, attempt: Attempt, refused: Refusal) -> bool:
        """Whether the same one may do better at once."""
        again = not attempt.begun or attempt.continues is not None  # the client would have nothing twice
        for name in REMEDIES[refused.reason]:
            if again and name != NEXT and name not in attempt.remedies:
                attempt.remedies.add(name)
                attempt.refused = refused
                remedy = getattr(self, name, None)
                if remedy and remedy(one, attempt):
                    return True
        return False

    def _next(self, one: Any, attempt: Attempt, refused: Refusal) -> Any:
        """Chooses the one to ask in the next attempt; when there is to be none, raises what the client is told."""
        reason = refused.reason
        if attempt.begun:
            raise refused
        attempt.tried.append(one)
        heard = reason == "broken" or (reason == "unreachable" and not refused.unsent)
        most = 0 if attempt.once and heard else self.retries
        if NEXT not in REMEDIES[reason] or len(attempt.tried) > most:
            raise self.last(attempt, refused)
        try:
            other = self.lease(attempt)
        except ApiError as none:
            own = attempt.guest is not None and reason == "uncredited"  # which the caller is to know
            raise (none if reason in (*_OF_TOKEN, "limited") and not own else refused) from None
        if other in attempt.tried:
            if reason in ("blocked", "human", "unlisted", "unreadable", "excluded") or (
                refused.about and reason == "limited"
            ):
                raise refused
            # The same one again: a quarter of a second later, twice as long each time, at most 4 s.
            attempt.watch.pause(min(0.25 * 2 ** (len(attempt.tried) - 1), 4.0))
        self.metrics.add("chatproxy_retries_total", labels=f'reason="{reason}"')
        attempt.failed, attempt.refused_token = False, ""
        attempt.otherwise, attempt.mobile, attempt.doubted = False, False, None
        attempt.remedies.clear()
        attempt.held.clear()
        return other


class Turns(Attempts):
    """Attempts with accounts: those of the pool, or the one of a guest."""

    files: Files

    def __init__(self, connections: Connections, renewals: Renewals, ledger: Ledger) -> None:
        super().__init__(connections.metrics)
        self.settings, self.pool, self.renewals = connections.settings, connections.pool, renewals
        self.ledger = ledger
        self.retries = self.settings.retry_times

    def do(
        self,
        kind: str,
        guest: Account | None,
        work: Callable[[Account], T],
        watch: Watch,
        holder: str | None = None,
        preferred: str | None = None,
    ) -> T:
        """The result of some calls that need a signed-in account; `kind` is what its rate limits are counted under."""
        question = Question((), kind)
        attempt = Attempt(Asked(question, watch, guest, Scope("nobody"), signed_in=True), question)
        attempt.holder = holder if guest is None else None
        attempt.preferred = preferred
        return self.attempts(attempt, work)

    def to_the_end(
        self,
        attempt: Attempt,
        ask: Callable[[Account], Finish | None],
        again: int,
        going_on: Callable[[], bool],
    ) -> Finish | None:
        """Has an answer made, and gone on with up to `again` times where it was cut for length: how it ended, None when that
        is not known. `going_on` is called before that, and tells whether the client wants more."""
        finish: Finish | None = None
        try:
            for left in range(again, -1, -1):
                finish = self.attempts(attempt, ask)
                known = (
                    finish is not None
                    and finish.reason == "length"
                    and finish.conversation
                    and finish.message
                )
                if not left or not known or not going_on():
                    break
                attempt.continues = finish
                attempt.remedies.clear()
        except Refusal:
            if attempt.continues is None:
                raise
            decoder = attempt.decoder  # what there is of the answer stays good
            finish = Finish("length", decoder.conversation, decoder.message)
        finally:
            if attempt.begun and not attempt.failed:
                self._count(attempt, answers=1)
        return finish

    def lease(self, attempt: Attempt) -> Account:
        """The account that is asked next."""
        model = attempt.question.model
        if attempt.guest:
            return self.pool.lease_guest(attempt.guest, model, attempt.asked.signed_in)
        if attempt.preferred and not attempt.holder and not attempt.tried:
            with contextlib.suppress(ApiError):
                return self.pool.lease(model, (), attempt.preferred, attempt.asked.signed_in)
        uploads = UPLOADS if any(blob for _, blob in attempt.materials.values()) else ""
        besides = uploads or (DRAWINGS if DRAWS in _hints(attempt.question) else "")
        signed_in = attempt.asked.signed_in
        if not signed_in and (upstream_model(model, False) != "auto" or _GPT.fullmatch(model)):
            signed_in = self.pool.has_signed_in()  # login-free accounts have no model but one
        return self.pool.lease(model, attempt.tried, attempt.holder, signed_in, besides)

    def ready(self, account: Account, attempt: Attempt) -> None:
        """Sees to it that it has a token that the upstream may take."""
        self.renewals.token(account, attempt.watch, attempt.refused_token)
        attempt.token = account.row.access_token

    def learn(self, account: Account, attempt: Attempt, refused: Refusal) -> None:
        """Draws the consequences of a refusal for its account."""
        self._failed(attempt, refused)
        model = refused.about or attempt.question.model
        expired = refused.reason in _OF_TOKEN and account.row.state == "ready"
        blocked = refused.reason in ("blocked", "human") and refused.said and not is_page(refused)
        if (expired and account.is_of_codex()) or (blocked and account.doubtful()):
            self.pool.learned(account, web="no")  # it may answer there all the same
        elif refused.reason == "limited" or (
            expired and (account.renewable or account.row.kind == LOGIN_FREE)
        ):
            # A token that is refused although it was just renewed: the account is not dead, but left alone a while.
            self._wait(account, model, refused)
        elif expired:
            credited = refused.reason == "expired"
            reason = (
                "the upstream refused its token (401)"
                if credited
                else "the upstream does not credit its token"
            )
            self.pool.set_aside(account, "expired", reason, attempt.token)

    def _failed(self, attempt: Attempt, refused: Refusal) -> None:
        """Counts a refusal as a failure of the account's, if it is one."""
        if refused.reason in _FAILURES and attempt.continues is None:
            attempt.failed = True
            self._count(attempt, failures=1)

    def _wait(self, account: Account, name: str, refused: Refusal) -> None:
        """Leaves an account alone for a model, or whatever else has the name."""
        pause = self.pool.told_to_wait(account, name, refused.wait)
        refused.headers["Retry-After"] = str(max(1, math.ceil(pause)))
        log(logging.INFO, "account told to wait", account=account.name, model=name, seconds=round(pause))

    def gather(self, asked: Asked, attachments: Iterable[Attachment]) -> None:
        """Makes ready files that come with a question, whichever account they are for."""
        most = self.settings.max_body_mb
        if len(every := asked.question.attachments) > MAX_ATTACHMENTS:
            raise invalid(every[-1].where, f"A request may have at most {MAX_ATTACHMENTS} files.")
        for one in attachments:
            if one not in asked.materials:
                asked.materials[one] = self.files.gathered(one, asked.scope, asked.watch)
            if sum(file.size for given, (file, _) in asked.materials.items() if given.url) > most << 20:
                text = f"The URLs of a request lead to more than MAX_BODY_MB ({most} MiB)."
                raise invalid(one.where, text)

    def last(self, attempt: Attempt, refused: Refusal) -> ApiError:
        if refused.reason not in _OF_TOKEN or attempt.guest:
            return refused
        text = "The upstream refused the tokens of all accounts that were tried; see `chatproxy.py accounts list`."
        return ApiError("no_account", text, headers={"Retry-After": "1"})

    def renew_token(self, account: Account, attempt: Attempt) -> bool:
        """A remedy: another access token than the one that was refused."""
        attempt.refused_token = attempt.token
        return account.renewable and account.row.state == "ready"

    def _count(self, attempt: Attempt, **amounts: int) -> None:
        account = attempt.leased
        if attempt.counts and account and not account.row.guest:
            self.ledger.count(account.id, **amounts)

    def began(self, account: Account, attempt: Attempt) -> None:
        """The first of an answer is there: the account works."""
        attempt.begun = True
        attempt.asked.account = account
        self.pool.answered(account, attempt.question.model)
        if account.doubtful():
            self.pool.learned(account, web="yes")

    def keep(self, account: Account, attempt: Attempt, conversation: str) -> None:
        """Remembers who holds a conversation before its id is given out."""
        attempt.kept = conversation
        keeps = attempt.asked.keeps or not self.settings.history_disabled
        if keeps and not attempt.guest and attempt.kept_by != account.id:
            self.pool.hold({conversation: Held(account.id, attempt.scope.owner)})


class Web(Turns):
    """The upstream `pool`: asks the web API, and goes on with what was cut."""

    name = "pool"
    has_conversations = True

    def __init__(self, site: ChatGPT, renewals: Renewals, files: Files, ledger: Ledger, links: Links) -> None:
        super().__init__(site.connections, renewals, ledger)
        self.site, self.files, self.links = site, files, links

    # -- what is asked ------------------------------------------------------------------------------------------

    def holds(self, conversation: str, scope: Scope) -> bool:
        """Whether an account is known to have a conversation."""
        return self.pool.holder(conversation, scope) is not None

    def answer(self, asked: Asked, sink: Sink) -> None:
        """Has a question answered by an account."""

        def ask(question: Question, sink: Sink) -> None:
            self._answer(Attempt(asked, question), sink)

        ask_in_prose(asked.question, ask, sink, asked.watch)

    def _answer(self, attempt: Attempt, sink: Sink) -> None:
        question = attempt.question
        attempt.counts = True
        if attempt.guest is None and question.conversation:
            attempt.holder = attempt.kept_by = self.pool.holder(question.conversation, attempt.scope)
        self._gather(attempt)

        def ask(account: Account) -> Finish | None:
            return self._asked(account, attempt, sink)

        def going_on() -> bool:
            self._give(sink, self._rest(attempt))
            return not sink.over

        try:
            finish = self.to_the_end(attempt, ask, self.settings.auto_continue, going_on)
            if not sink.over:
                finish = finish or Finish("stop")
                self._give(sink, [*self._rest(attempt), finish])
        finally:
            for talk, account in attempt.to_erase.items():
                self.site.erase(account, talk)

    def native(
        self, asked: Asked, body: Mapping[str, Any], holder: str | None, again: int, outlet: Outlet
    ) -> None:
        """Has a conversation body answered in the upstream's own bytes, by the account that is the `holder` of its
        conversation. What was cut for length is gone on with up to `again` times, and then has one `[DONE]`."""
        attempt = Attempt(asked, asked.question)
        attempt.counts = attempt.once = True
        attempt.holder = attempt.kept_by = holder
        done = WithoutDone() if again else None

        def ask(account: Account) -> Finish | None:
            return self._native(account, attempt, body, done, outlet)

        def going_on() -> bool:
            if done:
                outlet.write(done.end(), 0)
            return True

        finish = self.to_the_end(attempt, ask, again, going_on)
        if done:
            outlet.write(done.end(), 0)
            outlet.write(DONE if finish else b"", 1)

    def models(self, guest: Account | None, watch: Watch) -> dict[str, int]:
        """The models of the accounts, of a large pool at least one of every plan."""
        accounts = [guest] if guest else self.pool.accounts()
        able = [one for one in accounts if one.row.kind != LOGIN_FREE and one.row.state == "ready"]
        able = [one for one in able if one.speaks_web()]
        plans = {one.row.plan: one for one in able}
        asked = list(dict.fromkeys([*plans.values(), *able]))[:MAX_ASKED_FOR_MODELS]

        def read(account: Account, watch: Watch) -> None:
            try:
                self.do("models", guest, functools.partial(self.site.models, watch=watch), watch, account.id)
            except ApiError:
                if not account.models[1]:  # else what it is known to offer stays listed
                    raise

        if asked:
            side_by_side([functools.partial(read, one) for one in asked], watch)
        return {name: int(account.models[0]) for account in able for name in account.models[1]}

    def is_sure(self) -> bool:
        return self.pool.has_sure()

    def has(self, model: str, guest: Account | None, watch: Watch) -> bool:
        """Whether an account lists a model, or none tells what it has."""
        if upstream_model(model, False) == "auto":
            return True
        try:
            listed = self.models(guest, watch)
        except ApiError:
            return False
        return not listed or model in listed

    def takes(self, account: Account) -> bool:
        return True

    def check(self, account: Account, watch: Watch) -> None:
        """Makes the calls that a chat needs, but for the turn itself."""

        def ask(account: Account) -> None:
            self.site.me(account, watch)
            needs = self.site.requirements(account, watch)
            if needs.persona == "chatgpt-noauth" and account.row.kind != LOGIN_FREE:
                text = "The upstream takes its token and does not credit it: sign in again."
                raise Refusal("uncredited", text)

        if account.row.web == "no":  # which may be otherwise by now
            self.pool.learned(account, web="")
        self.do("check", None, ask, watch, account.id)
        if account.speaks_codex():
            self.pool.learned(account, web="yes")

    def require_anew(self, account: Account, attempt: Attempt) -> bool:
        """A remedy: requirements of this moment, where those that were prepared ahead may have been forgotten."""
        return attempt.spare

    def prove_otherwise(self, account: Account, attempt: Attempt) -> bool:
        """A remedy: a proof made with the other algorithm."""
        attempt.otherwise = attempt.doubted is not None and self.site.may_prove_otherwise(account)
        return attempt.otherwise

    def go_mobile(self, account: Account, attempt: Attempt) -> bool:
        """A remedy: what login-free visitors of the mobile page ask, instead of those of the desktop's."""
        attempt.doubted = attempt.refused
        attempt.otherwise = False
        fit = not attempt.held and not attempt.question.conversation
        attempt.mobile = fit and account.row.kind == LOGIN_FREE
        return attempt.mobile

    def upload_anew(self, account: Account, attempt: Attempt) -> bool:
        """A remedy: files that the account turned out not to hold any more are uploaded once more."""
        attempt.forgotten = bool(attempt.held)
        return attempt.forgotten

    # -- one conversation call ----------------------------------------------------------------------------------

    def _asked(self, account: Account, attempt: Attempt, sink: Sink) -> Finish | None:
        """One conversation call: how the answer ended, None when the client wants no more of it."""
        question, cut = attempt.question, attempt.continues
        if not cut:
            if self.settings.check_model:
                self._check_model(account, question.model, attempt.watch)
            self._place(account, attempt)
        login_free = account.row.kind == LOGIN_FREE
        draws = DRAWS in _hints(question)
        temporary = self.settings.history_disabled and not draws and not attempt.lasting
        body = conversation_body(question, temporary, login_free, attempt.held)
        if draws and not cut:
            self.site.check_drawings(account, attempt.watch)
        needs = self._requirements(account, attempt)
        if cut:
            attempt.decoder.renew()
            body = continued(body, cut)
        else:
            attempt.decoder = MobileDecoder() if needs.mobile else Decoder(body)
            attempt.tail = []
        take, feed = self._taker(account, attempt, sink)
        try:
            self._heard_out(account, attempt, body, needs, take, feed)
        except Refusal as refused:
            words = refused.said[2][:2000].lower() if refused.said else b""
            if draws and refused.reason == "limited" and re.search(rb"\bimages?|image_gen", words):
                refused.about = DRAWINGS
            raise
        finally:
            talk = attempt.decoder.conversation
            if attempt.decoder.drew:
                self.site.count_drawing(account)
            # There is more help for the answer of a conversation that is kept.
            attempt.lasting = attempt.lasting or bool(talk and not attempt.decoder.content)
            ours = self.settings.history_disabled and not temporary and not login_free
            if ours and talk and not question.conversation and not attempt.asked.keeps:
                attempt.to_erase[talk] = account
        finish = attempt.decoder.finish()
        if finish is None and not sink.over:
            raise Refusal("broken", "The upstream broke off its answer; try again.")
        attempt.tail += self._looked_up(account, attempt, attempt.decoder.rest())
        ended = finish is not None and finish.reason in ("stop", "length") and not sink.over
        if ended and not attempt.decoder.content:
            raise Refusal("broken", "The upstream ended its answer without having said anything; try again.")
        self.site.served(account, question.model, attempt.decoder.model)
        return finish

    def _heard_out(
        self,
        account: Account,
        attempt: Attempt,
        body: Mapping[str, Any],
        needs: Requirements,
        take: Callable[[Call], None],
        feed: Callable[[bytes], bool],
    ) -> None:
        """One conversation call, and whatever its answer goes on in. `take` is for the bytes of a call, `feed` for others and
        tells whether no more are wanted. Refusal when the answer could not be had."""
        decoder = attempt.decoder
        doubted, attempt.doubted = attempt.doubted, None
        attempt.resumable = not needs.mobile and not body.get("history_and_training_disabled")
        try:
            with self.site.conversation(account, body, needs, attempt.watch) as call:
                take(call)
            if needs.mobile and decoder.pending:
                feed(b"\n")  # which its last line may lack
        except Refusal as refused:
            if attempt.begun and decoder.finish():
                return  # only a second saying so is missing
            if not self._goes_on(attempt, refused):
                refused = doubted if doubted and gone(refused) else why(refused, account, needs)
                if needs.algorithm and refused.reason == "blocked" and not is_page(refused):
                    attempt.doubted = refused
                raise refused from None
        if not decoder.conversation or decoder.failed or attempt.enough:
            return
        if decoder.unfinished and (attempt.resumable or decoder.resume_token):
            self._resume(account, attempt, take)
        finish = decoder.finish()
        empty = not decoder.content and (finish is None or finish.reason != "content_filter")
        goes_on = decoder.awaits_drawing or (attempt.resumable and (decoder.unfinished or empty))
        if goes_on and not attempt.enough:
            self._poll(account, attempt, feed)

    @staticmethod
    def _goes_on(attempt: Attempt, refused: Refusal) -> bool:
        """Whether the rest of an answer that broke off may be had elsewhere."""
        decoder = attempt.decoder
        cut = refused.reason in ("broken", "unreachable", "silent") and refused.said is None
        place = decoder.conversation and (attempt.resumable or decoder.resume_token)
        return bool(cut and place and not decoder.failed)

    def _resume(self, account: Account, attempt: Attempt, take: Callable[[Call], None]) -> None:
        """ "Hand-off": gets the rest of an answer as a stream, while there is one."""
        decoder, watch = attempt.decoder, attempt.watch
        pause = 0.0
        for _ in range(MAX_RESUMED):
            if not decoder.unfinished or decoder.failed or attempt.enough:
                return
            watch.pause(pause)
            pause = min(max(pause * 1.6, RESUME_PAUSE), 5.0)
            decoder.go_on()
            seen = decoder.seen
            try:
                with self.site.resumed(
                    account, decoder.conversation, seen, decoder.resume_token, watch
                ) as call:
                    take(call)
            except Refusal as refused:
                status = refused.said[0] if refused.said else 0
                again = status in (408, 409, 425, 429) or status >= 500 or self._goes_on(attempt, refused)
                if not again and not self._renewed(account, attempt, refused):
                    return

    def _poll(self, account: Account, attempt: Attempt, feed: Callable[[bytes], bool]) -> None:
        """Looks into a conversation until the answer in it, or the image that is being made, is there."""
        decoder, watch = attempt.decoder, attempt.watch
        draws = decoder.awaits_drawing
        end = time.monotonic() + (DRAWING_PATIENCE if draws else ANSWER_PATIENCE)
        decoder.go_on(whole=True)
        talk = decoder.conversation
        still = 0.0  # looks in a row at which nobody was at work
        pause = POLL_PAUSE
        seen = dict[str, bytes]()  # messages as they were
        while still < MAX_STILL:
            working = draws or self.site.is_streaming(account, talk, watch)
            # Where it is not told whether somebody works, patience is ten times as long.
            still = 0.0 if working else still + (0.1 if working is None else 1.0)
            messages = self._looked_into(account, attempt)
            for message in messages:
                id = str(message.get("id"))
                message.setdefault("status", "finished_successfully")
                data = data_event({"message": message, "conversation_id": talk, "error": None})
                if seen.get(id) == data:
                    continue
                seen[id] = data
                if sum(map(len, seen.values())) > MAX_ANSWER:
                    raise Refusal("broken", "The upstream's answer is too long; it was abandoned.")
                if feed(data):
                    return
            over = draws and not decoder.awaits_drawing
            if over or (messages and is_last(messages[-1], draws, working is False)):
                feed(DONE)
                return
            if time.monotonic() > end:
                raise Refusal("silent", "The upstream took too long to finish its answer; try again.")
            watch.pause(pause)
            pause = min(pause * 1.3, 10.0)

    def _looked_into(self, account: Account, attempt: Attempt) -> list[dict[str, Any]]:
        """The messages of a turn; none where they cannot be had just now."""
        decoder = attempt.decoder
        try:
            return self.site.turn(account, decoder.conversation, decoder.sent_ids, attempt.watch)
        except Refusal as refused:
            passes = refused.reason in ("broken", "unreachable", "silent", "limited")
            if passes or self._renewed(account, attempt, refused):
                return []
            if refused.code != "not_found" and refused.reason != "missing":
                raise
            raise Refusal("broken", "The rest of the upstream's answer cannot be found; try again.") from None

    def _renewed(self, account: Account, attempt: Attempt, refused: Refusal) -> bool:
        """Whether there is another token after one was refused in the midst of an answer."""
        if refused.reason != "expired" or not account.renewable:
            return False
        before, attempt.token = attempt.token, account.row.access_token
        if attempt.token == before:
            self.renewals.token(account, attempt.watch, before)
            attempt.token = account.row.access_token
        return attempt.token != before

    def _requirements(self, account: Account, attempt: Attempt) -> Requirements:
        ahead = None
        if not {"require_anew", "prove_otherwise", "go_mobile"} & attempt.remedies:
            ahead = self.site.spare(account, attempt.watch)
        desktop = bool(attempt.held or attempt.question.conversation)  # the page for phones has neither
        if ahead and ahead.mobile and desktop:
            ahead = None
        attempt.spare = ahead is not None
        mobile = True if attempt.mobile else False if desktop else None
        try:
            return ahead or self.site.requirements(account, attempt.watch, attempt.otherwise, mobile)
        except Refusal as refused:
            raise attempt.doubted or refused from None

    def _taker(
        self, account: Account, attempt: Attempt, sink: Sink
    ) -> tuple[Callable[[Call], None], Callable[[bytes], bool]]:
        """Gives the sink what comes of an answer: the loop what is light, this thread everything else."""
        decoder = attempt.decoder

        def carried(data: bytes) -> bytes | list[Found] | None:
            """What is not for the loop, None when it is done; once per event."""
            if len(data) + decoder.pending > MAX_LIGHT:
                return data
            events = decoder.feed(data)
            if not events and not decoder.done and decoder.conversation == attempt.kept:
                return None
            settled = attempt.begun and not decoder.done and not decoder.failure
            known = decoder.conversation == attempt.kept and _LIGHT.issuperset(map(type, events))
            if not settled or not known:
                return events
            light = cast("list[Light]", events)
            if sink.careful and not sink.light(light):
                return events
            sink.take(cast("list[Event]", light))
            return [] if sink.over else None

        def handle(come: bytes | list[Found]) -> bool:
            found = decoder.feed(come) if isinstance(come, bytes) else come
            # That an answer begins is no part of it yet: until there is more it may be asked for again.
            begun = attempt.begun or any(type(event) is not Begin for event in found)
            self._known(account, attempt, begun)
            events = [*attempt.tail, *self._looked_up(account, attempt, found)]
            attempt.tail = []
            if not begun or (decoder.done and not decoder.handed_off):
                attempt.tail = events
            else:
                self._give(sink, events)
            if decoder.done:
                return True
            if decoder.failure:
                raise decoder.failure
            return sink.over

        return functools.partial(self._share, attempt, carried, handle, sink.outlet), handle

    @staticmethod
    def _share(
        attempt: Attempt,
        carried: Callable[[bytes], Any],
        handle: Callable[[Any], bool],
        outlet: Outlet | None,
        call: Call,
    ) -> None:
        """Has the loop do with an answer what `carried` does with each piece; what that returns is for this thread to
        `handle`, which tells whether the rest is not wanted."""
        come: Any = call.read() or None
        while come is not None:
            if handle(come):
                attempt.enough = not attempt.decoder.done
                return
            if attempt.decoder.conversation and (attempt.resumable or attempt.decoder.resume_token):
                call.handle.silence = min(call.handle.silence, STREAM_SILENCE)
            come = call.carry(carried, outlet)

    def _known(self, account: Account, attempt: Attempt, begun: bool) -> None:
        """Takes note that an answer has begun, and whose conversation it is."""
        if begun and not attempt.begun:
            first = not account.answered
            self.began(account, attempt)
            if first:
                self.site.prepare(account)
        if attempt.decoder.conversation != attempt.kept:
            self.keep(account, attempt, attempt.decoder.conversation)

    @staticmethod
    def _give(sink: Sink, events: list[Event]) -> None:
        """Gives the sink events, and waits while there is no room where they go."""
        if events:
            sink.take(events)
            if sink.outlet:
                sink.outlet.drain()

    def _rest(self, attempt: Attempt) -> list[Event]:
        """The remaining events of an answer once nothing more comes."""
        rest, attempt.tail = attempt.tail, []
        account = attempt.leased
        return [*rest, *(self._looked_up(account, attempt, attempt.decoder.rest()) if account else ())]

    def _native(
        self,
        account: Account,
        attempt: Attempt,
        body: Mapping[str, Any],
        done: WithoutDone | None,
        outlet: Outlet,
    ) -> Finish | None:
        """One conversation call, its answer passed on as it comes: how that ended, None when it does not say."""
        if attempt.continues:
            body = continued(body, attempt.continues)
        if account.row.kind == LOGIN_FREE:
            body = {**body, "model": "auto"}
        decoder = attempt.decoder = Decoder(body)
        noted: list[bytes] = []  # what is to be passed on once its conversation is remembered
        events, without = WholeEvents(), WithoutDone()

        def note(data: bytes) -> None:
            # A failure that is streamed is passed on in the upstream's own words.
            with contextlib.suppress(Refusal):
                decoder.feed(data)

        def write(data: bytes, last: bool = False) -> None:
            data, count = events.feed(data, decoder.follows, last)
            # A hand-off is not the end that the client is to see.
            if filtering := done or (without if decoder.handed_off else None):
                data = filtering.feed(data)
            outlet.write(data, count)

        def carried(data: bytes) -> bytes | None:
            """What is not for the loop, None when it is done; once per event."""
            if len(data) + decoder.pending > MAX_LIGHT:
                return data
            note(data)
            if decoder.conversation != attempt.kept:
                noted.append(data)
                return b""
            write(data)
            return None

        def handle(come: bytes) -> bool:
            if come:
                note(come)
                noted.append(come)
            self._known(account, attempt, True)
            for data in noted:
                write(data)
            noted.clear()
            outlet.drain()
            return False

        take = functools.partial(self._share, attempt, carried, handle, outlet)
        needs = self._requirements(account, attempt)
        if needs.mobile:
            text = "Without a sign-in the upstream has no conversations of this kind just now."
            raise Refusal("missing", text)
        try:
            self._heard_out(account, attempt, body, needs, take, handle)
        finally:
            write(b"", last=True)
        self.site.served(account, str(body.get("model") or "auto"), decoder.model)
        return decoder.finish()

    # -- files ----------------------------------------------------------------------------------------------------

    def _gather(self, attempt: Attempt) -> None:
        """Makes ready what comes with a question, and says who will do for it."""
        attachments = attempt.question.attachments
        self.gather(attempt.asked, attachments)
        for one in attachments:
            attempt.asked.signed_in = True
            if attempt.guest is None:
                attempt.holder = attempt.holder or attempt.materials[one][0].account or None

    def _place(self, account: Account, attempt: Attempt) -> None:
        """Has the account hold the question's files."""
        anew, attempt.forgotten = attempt.forgotten, False
        for one in attempt.question.attachments:
            if one not in attempt.held:
                attempt.held[one] = self._placed(account, attempt, one)
            if anew and (blob := attempt.materials[one][1]):
                attempt.held[one] = self.files.renewed(account, attempt.held[one], blob, attempt.watch)

    def _placed(self, account: Account, attempt: Attempt, attachment: Attachment) -> File:
        """A question's file as the account holds it, its bytes got from the account that has it if that is another."""
        file, blob = attempt.materials[attachment]
        if found := self.files.known(account, file):
            return found
        blob = blob or self.fetched(attempt.asked, attachment)
        return self.files.placed(account, file, blob, attempt.watch)

    def fetched(self, asked: Asked, attachment: Attachment) -> Blob:
        """The bytes of a question's file, got from the account that holds it."""
        file = asked.materials[attachment][0]
        try:
            get = functools.partial(self.files.content, file=file, watch=asked.watch)
            blob = self.do("downloads", None, get, asked.watch, file.account)
        except ApiError as error:  # what befell that account is not another one's fault
            raise ApiError(error.code, error.message, attachment.where, error.headers) from None
        asked.materials[attachment] = file, blob
        return blob

    def _check_model(self, account: Account, model: str, watch: Watch) -> None:
        """CHECK_MODEL: refuses what the account does not list, unless the list cannot be had."""
        if upstream_model(model, False) == "auto":
            return
        if account.row.kind == LOGIN_FREE:
            raise Refusal("unlisted", "Login-free accounts offer only the model auto.")
        try:
            listed = self.site.models(account, watch)
        except Refusal as refused:
            if refused.reason == "expired":
                raise
            return
        if listed and model not in listed:
            raise Refusal("unlisted", "No account offers this model; GET /v1/models lists those there are.")

    # -- what an answer leads to ----------------------------------------------------------------------------------

    def _looked_up(self, account: Account, attempt: Attempt, events: list[Found]) -> list[Event]:
        """The events with URLs for what the model drew and made."""
        site = self.site
        watch = attempt.watch
        links = attempt.links
        out = list[Event]()
        conversation = attempt.decoder.conversation
        for event in events:
            if isinstance(event, SandboxLink):
                if event not in links and len(links) < MAX_LINKS:
                    made = (event.message, urllib.parse.unquote(event.path))
                    ask = functools.partial(site.sandbox_url, account, conversation, *made, watch)
                    url = self._url(account, ask, watch)
                    links[event] = self._linked(account, attempt, url, made[1].rpartition("/")[2])
                out.append(Text(links.get(event) or f"sandbox:{event.path}"))
            elif isinstance(event, Drawing):
                scheme, _, id = event.pointer.partition("#")[0].partition("://")
                place = conversation if scheme == "sediment" else ""
                ask = functools.partial(site.file_url, account, id, watch, place)
                url = self._url(account, ask, watch) if _FILE_ID.fullmatch(id) else ""
                if url := self._linked(account, attempt, url, ""):
                    out.append(Image(url))
            else:
                out.append(event)
        return out

    def _linked(self, account: Account, attempt: Attempt, url: str, name: str) -> str:
        """A URL that any browser can open: of this server for what only the account may fetch, which is got at once, for its
        conversation may soon be deleted; else the upstream's own. "" when it cannot be had."""
        if not self.site.is_own(account, url):
            return url
        try:
            with self.site.content(account, url, attempt.watch) as call:
                mime = call.headers.get("content-type", "").partition(";")[0].strip().lower()
                mime = mime if _MIME.fullmatch(mime) else "application/octet-stream"
                name = name or "image" + (mimetypes.guess_extension(mime) or "")
                link = self.links.kept(call.pieces(), name[-200:], mime)
        except Refusal as refused:
            log(logging.WARNING, "a file of an answer cannot be had", account=account.name, code=refused.code)
            return ""
        return attempt.asked.base + link if link else ""

    @staticmethod
    def _url(account: Account, ask: Callable[[], str], watch: Watch) -> str:
        """A download URL, "" when there is none: what was just made may take the upstream a moment to find."""
        code = ""
        for pause in (0.0, 0.3, 1.0):
            watch.pause(pause)
            try:
                return ask()
            except Refusal as refused:
                code = refused.code
                if refused.reason not in ("forgotten", "missing", "broken"):
                    break
        log(logging.WARNING, "a file of an answer cannot be had", account=account.name, code=code)
        return ""


# ============================================================================================================
# codex: the Codex backend, which takes accounts of a browser sign-in and answers as OpenAI's Responses API does
# ============================================================================================================

CATALOG_LIFE = 3600.0  # seconds that a list of models is used
CATALOG_SILENCE, CATALOG_PATIENCE = 5.0, 10.0  # seconds without a byte, and in all, that it is waited for
CATALOG_PAUSE = 60.0  # seconds until a list that could not be had is asked for again
MAX_CATALOG = 300  # models of a list
MAX_HOMES = 10_000  # conversations whose accounts are remembered
USUAL_CODEX_MODEL = "gpt-5.4-mini"  # the one that every plan has, where no list of models can be had
MAX_NATIVE_EVENT = 64 << 20  # bytes of one event: a drawing is one
MAX_NATIVE_ANSWER = 128 << 20  # bytes of all events but those of text
MAX_NATIVE_HELD = 8 << 20  # of those before there is anything of the answer, which repeat the request
# The fields of a request that the Codex backend takes as they are. Everything else it answers with 400.
_PASSED = (
    "tools",
    "tool_choice",
    "parallel_tool_calls",
    "reasoning",
    "include",
    "text",
    "service_tier",
)
ENCRYPTED = "reasoning.encrypted_content"  # what is to be included in answers
_PLAIN_NAME = re.compile(r"[0-9A-Za-z_-]{1,64}")
# Items whose `id` means something: to their other kinds it would be the place where the upstream has kept them, and it
# keeps nothing.
_WITH_ID = ("mcp_call", "mcp_list_tools", "mcp_approval_request", "computer_call")
_NAMED_CALLS = ("function_call", "custom_tool_call", "custom_tool_call_output")
_MADE_BY_MODEL = ("reasoning", "compaction")  # besides the calls and the assistant's messages


class CallShape(NamedTuple):
    """How the calls of a kind of function are told: the prefix of the item's id, its type and its own fields."""

    prefix: str
    type: str
    fields: Callable[[FunctionCall], dict[str, Any]]


def _named_fields(call: FunctionCall) -> dict[str, Any]:
    fields = {"call_id": call.id, "name": call.name}
    fields |= {"input": input_of(call)} if call.kind == CUSTOM else {"arguments": call.arguments}
    return fields | ({"namespace": call.namespace} if call.namespace else {})


def _fixed_fields(call: FunctionCall) -> dict[str, Any]:
    """The fields of a call of a fixed form; of one that another model wrote, whatever it wrote."""
    try:
        given = json.loads(call.arguments)
    except ValueError:
        given = None
    given = given if isinstance(given, dict) else {}
    if call.kind == APPLY_PATCH:
        return {"call_id": call.id, "operation": given.get("operation")}
    if call.kind == LOCAL_SHELL:
        return {"call_id": call.id, "action": {"type": "exec", "command": [], "env": {}} | given}
    return {"call_id": call.id, "action": {"commands": []} | given, "environment": {"type": "local"}}


CALL_SHAPES = {
    FUNCTION: CallShape("fc", "function_call", _named_fields),
    CUSTOM: CallShape("ctc", "custom_tool_call", _named_fields),
    LOCAL_SHELL: CallShape("lsh", "local_shell_call", _fixed_fields),
    SHELL: CallShape("sh", "shell_call", _fixed_fields),
    APPLY_PATCH: CallShape("apc", "apply_patch_call", _fixed_fields),
}
Place = Callable[[Attachment], "dict[str, Any]"]  # the content part that stands for a file


def as_items(messages: Iterable[Message], place: Place) -> list[dict[str, Any]]:
    """Messages as items of the Responses API."""
    items: list[dict[str, Any]] = []
    for message in messages:
        for is_item, run in itertools.groupby(message.parts, lambda part: type(part) in AS_ITEM):
            if is_item:
                items += [AS_ITEM[type(part)](part, place) for part in run]
            else:
                content = [
                    _content_part(cast("Text | Attachment", part), message.role, place) for part in run
                ]
                items.append({"type": "message", "role": message.role, "content": content})
        if not message.parts:
            items.append({"type": "message", "role": message.role, "content": []})
    return items


def _content_part(part: Text | Attachment, role: str, place: Place) -> dict[str, Any]:
    if isinstance(part, Text):
        return {"type": "output_text" if role == "assistant" else "input_text", "text": part.text}
    return place(part)


def _call_item(call: FunctionCall, place: Place) -> dict[str, Any]:
    told = CALL_SHAPES[call.kind]
    return {"type": told.type} | told.fields(call)


def _result_item(result: ToolResult, place: Place) -> dict[str, Any]:
    output = [_content_part(part, "tool", place) for part in result.parts]
    kind = "custom_tool_call_output" if result.kind == CUSTOM else "function_call_output"
    return {"type": kind, "call_id": result.id, "name": result.name, "output": output}


def _reasoning_item(thought: Thought, place: Place) -> dict[str, Any]:
    summary = [{"type": "summary_text", "text": thought.text}] if thought.text else []
    return {"type": "reasoning", "summary": summary, "encrypted_content": thought.encrypted or None}


# The parts that are an item each, not a part of a message's content.
AS_ITEM: Mapping[type, Callable[[Any, Place], dict[str, Any]]] = {
    FunctionCall: _call_item,
    ToolResult: _result_item,
    Thought: _reasoning_item,
}


def in_full(item: Mapping[str, Any]) -> Mapping[str, Any]:
    """An item with what may be left out of a message."""
    if item.get("type", "message") != "message":
        return item
    kind = "output_text" if item.get("role") == "assistant" else "input_text"
    content = item.get("content")
    content = [{"type": kind, "text": content}] if isinstance(content, str) else content
    return {"type": "message", **item, "content": content or []}


# -- what is asked -----------------------------------------------------------------------------------------------------


class Names:
    """Names of functions as the backend takes them: those that it would refuse are changed, always in the same way, and
    changed back in its answers."""

    def __init__(self) -> None:
        self._given: dict[str, str] = {}  # names as they were, by the changed ones

    def sent(self, name: str) -> str:
        """The name that is sent for a client's."""
        if _PLAIN_NAME.fullmatch(name):
            return name
        digest = hashlib.sha256(name.encode("utf-8", "replace")).hexdigest()[:8]
        changed = f"{re.sub('[^0-9A-Za-z_-]', '_', name)[:55]}_{digest}"
        self._given[changed] = name
        return changed

    def restore(self, item: dict[str, Any]) -> None:
        """Gives an item of an answer its client's name back."""
        if self._given and isinstance(name := item.get("name"), str):
            item["name"] = self._given.get(name, name)


def as_native(question: Question, place: Place) -> dict[str, Any]:
    """A question as a request of the Responses API."""
    messages = list(question.messages)
    instructions = ""
    if messages and messages[0].role == "system" and not messages[0].attachments:
        instructions = messages.pop(0).text
    if question.shape and question.shape.schema is None:
        said = [instructions, *(message.text for message in messages)]
        if not any("json" in text.lower() for text in said):  # which the API wants to be told
            instructions = "\n\n".join(filter(None, (instructions, "Answer with a JSON object.")))
    request: dict[str, Any] = {
        "instructions": instructions,
        "input": _matched(as_items(messages, place)),
        "tools": _tools_of(question),
        "reasoning": {"summary": "auto"} | ({"effort": question.effort} if question.effort else {}),
    }
    if question.forced:
        request["tool_choice"] = {"type": question.forced}
    elif question.offer:
        request["tool_choice"] = _choice_of(question.offer)
        request["parallel_tool_calls"] = question.offer.parallel
    text: dict[str, Any] = {"format": _format_of(question.shape)} if question.shape else {}
    if verbosity := question.options.get("verbosity"):
        text["verbosity"] = verbosity
    return request | {"text": text, "service_tier": question.options.get("service_tier")}


def _tools_of(question: Question) -> list[dict[str, Any]]:
    functions = question.offer.functions if question.offer else Functions()
    tools = [_tool_of(full, function) for full, function in functions.items()]
    for name in question.hosted:
        options = question.options.get("drawing") or {}
        more: dict[str, Any] = {"output_format": "png"} | dict(options) if name == DRAWING else {}
        more = {"container": {"type": "auto"}} if name == PYTHON else more
        tools.append({"type": name} | more)
    return tools


def _tool_of(full: str, function: Function) -> dict[str, Any]:
    if function.kind not in (FUNCTION, CUSTOM):
        return {"type": function.kind} | (
            {"environment": {"type": "local"}} if function.kind == SHELL else {}
        )
    tool: dict[str, Any] = {"type": function.kind, "name": full, "description": function.description}
    if function.kind == FUNCTION:
        return tool | {"parameters": function.parameters, "strict": function.strict}
    if grammar := function.grammar:
        tool["format"] = {"type": "grammar", "syntax": grammar.syntax, "definition": grammar.definition}
    return tool


def _choice_of(offer: Offer) -> Any:
    """`tool_choice`. That a function must be called, whichever, is told by its name where there is but one."""
    names = [offer.choice] if offer.choice in offer.functions else []
    if offer.choice == "required" and len(offer.functions) == 1:
        names = list(offer.functions)
    if not names:
        return offer.choice
    kind = offer.functions[names[0]].kind
    return {"type": kind, "name": names[0]} if kind in (FUNCTION, CUSTOM) else {"type": kind}


def _format_of(shape: Shape) -> dict[str, Any]:
    if shape.schema is None:
        return {"type": "json_object"}
    return {"type": "json_schema", "name": shape.name, "schema": shape.schema, "strict": shape.strict}


def _matched(items: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Items in which every call has a result and every result a call, since the backend refuses any other: calls without an
    id get one, a call that was given up is told so, and a result of no call is told in a message."""
    # The names of calls that wait for a result, and the types of those, by their ids; and the ids by the names.
    open_calls: dict[str, tuple[str, str]] = {}
    alike: dict[str, deque[str]] = {}
    out: list[dict[str, Any]] = []
    for number, item in enumerate(items):
        kind = item["type"]
        if kind.endswith("_call_output"):
            name = item.pop("name", "")
            id = item["call_id"]
            if not id and (named := alike.get(name)):
                id = named.popleft()
            elif not id and not name:
                id = next(iter(open_calls), "")
            if id in open_calls:
                del open_calls[id]
                out.append(item | {"call_id": id})
            else:
                heading = {"type": "input_text", "text": result_heading(name, item["call_id"])}
                out.append({"type": "message", "role": "user", "content": [heading, *item["output"]]})
            continue
        if open_calls and kind == "message" and item["role"] != "assistant":
            out += _given_up(open_calls)
        if kind.endswith("_call"):
            item["call_id"] = item["call_id"] or f"call_{number}"
            open_calls[item["call_id"]] = item.get("name", kind), f"{kind}_output"
            alike.setdefault(item.get("name", kind), deque()).append(item["call_id"])
        out.append(item)
    return [*out, *_given_up(open_calls)]


def _given_up(open_calls: dict[str, tuple[str, str]]) -> list[dict[str, Any]]:
    """Results of the calls that have none."""
    found = [
        {"type": kind, "call_id": id, "output": "There is no result."} for id, (_, kind) in open_calls.items()
    ]
    open_calls.clear()
    return found


def fitted(given: Mapping[str, Any], names: Names) -> dict[str, Any]:
    """A request of the Responses API as the Codex backend takes it, but for the model. "Body"."""
    body: dict[str, Any] = {name: given[name] for name in _PASSED if given.get(name) not in (None, [], {})}
    body |= {"instructions": given.get("instructions") or "", "stream": True, "store": False}
    body["input"] = [item for one in given["input"] if (item := _fitted_item(one, names)) is not None]
    # Tools that items bring are for a shape of requests that is not used here.
    brought = [
        tool for item in given["input"] if item.get("type") == "additional_tools" for tool in item["tools"]
    ]
    tools = [_fitted_tool(tool, names) for tool in [*brought, *body.get("tools", ())]]
    body = with_tools(body, list({compact(tool): tool for tool in tools}.values()) if brought else tools)
    if isinstance(choice := body.get("tool_choice"), dict):
        body["tool_choice"] = _fitted_tool(choice, names)
    if body.get("service_tier") != "priority":
        body.pop("service_tier", None)
    body["include"] = list(dict.fromkeys([*body.get("include", ()), ENCRYPTED]))
    return body


def _fitted_item(item: Mapping[str, Any], names: Names) -> dict[str, Any] | None:
    """An item of `input`; None for what means nothing to the backend, which remembers nothing."""
    kind = item.get("type") or "message"
    if kind == "reasoning":
        if not isinstance(item.get("encrypted_content"), str):
            return None
        kept = {name: item[name] for name in ("summary", "content") if item.get(name)}
        return {"type": kind, "summary": [], "encrypted_content": item["encrypted_content"]} | kept
    empty = kind == "image_generation_call" and not item.get("result")
    if empty or kind in ("item_reference", "web_search_call", "additional_tools"):
        return None
    item = in_full(item)
    dropped = ("status",) if kind in _WITH_ID else ("status", "id")
    fit = {name: value for name, value in item.items() if name not in dropped and value is not None}
    if fit.get("role") == "system":
        fit["role"] = "developer"
    says = "output_text" if item.get("role") == "assistant" else "input_text"
    for field_name in ("content", "output"):
        if isinstance(parts := fit.get(field_name), list):
            fit[field_name] = [_fitted_part(part, says) for part in parts]
        elif isinstance(parts, dict):
            fit[field_name] = _fitted_part(parts, says)
    if kind == "function_call_output":
        fit.pop("name", None)
    if kind in _NAMED_CALLS and isinstance(name := fit.get("name"), str):
        fit["name"] = names.sent(name)
    return fit


def _fitted_part(part: Any, says: str) -> Any:
    """A part of a message or a result, with the bytes of its file; one in the shape of Chat Completions in this API's, where
    `says` is the type of a text."""
    if not isinstance(part, dict):
        return part
    kind = part.get("type")
    if kind == "text":
        part = part | {"type": says}
    elif kind == "image_url":
        given = part.get("image_url")
        given = given if isinstance(given, dict) else {"url": given}
        part = {"type": "input_image", "image_url": given.get("url"), "detail": given.get("detail") or "auto"}
    elif kind == "file" and isinstance(part.get("file"), dict):
        part = {"type": "input_file"} | part["file"]
    return {
        name: Embedded(str(value), value.blob) if isinstance(value, InlineFile) else value
        for name, value in part.items()
        if name not in ("prompt_cache_breakpoint", "logprobs")
    }


def _fitted_tool(tool: Any, names: Names) -> Any:
    """A tool, or a choice of tools."""
    if not isinstance(tool, dict):
        return tool
    kind = str(tool.get("type"))
    inner = tool.get(kind)
    fit: dict[str, Any] = (
        {"type": kind} | inner if isinstance(inner, dict) and kind in (FUNCTION, CUSTOM) else dict(tool)
    )
    fit.pop("prompt_cache_breakpoint", None)
    if kind.startswith(WEB_SEARCH):
        fit["type"] = WEB_SEARCH
    if isinstance(name := fit.get("name"), str):
        fit["name"] = names.sent(name)
    if isinstance(tools := fit.get("tools"), list):
        fit["tools"] = [_fitted_tool(one, names) for one in tools]
    return fit


_STEP = re.compile(r"[^.\[\]]+|\[\d+\]")
# Without which nothing can be asked, or what an item says would be lost.
_NEEDED = frozenset((
    "model", "input", "stream", "store", "instructions", "type", "role", "content", "name", "call_id", "arguments", "output",
    "text", "image_url", "file_data", "encrypted_content", "summary",
))  # fmt: skip


def without(value: Any, part: str) -> Any:
    """A body without a part that the backend does not take, by the path that it names: of something in a list
    (`input[3].status`) that of all in the list. `tools:TYPE` are the tools of a type. What is needed stays."""
    if part.startswith("tools:"):
        kept = [tool for tool in value.get("tools", ()) if _at(tool, ("type",)) != part[6:]]
        return with_tools(value, kept) if "tools" in value else value
    steps = _STEP.findall(part)
    return value if not steps or steps[-1] in _NEEDED or steps[-1][0] == "[" else _without(value, steps)


def _without(value: Any, steps: list[str]) -> Any:
    if steps[0][0] == "[":
        return [_without(one, steps[1:]) for one in value] if isinstance(value, list) else value
    if not isinstance(value, dict) or steps[0] not in value:
        return value
    if len(steps) == 1:
        return {name: one for name, one in value.items() if name != steps[0]}
    return value | {steps[0]: _without(value[steps[0]], steps[1:])}


def with_tools(body: Mapping[str, Any], tools: list[Any]) -> dict[str, Any]:
    """A body with these tools, or with nothing that is about tools if there are none."""
    if tools:
        return {**body, "tools": tools}
    return {
        name: one for name, one in body.items() if name not in ("tools", "tool_choice", "parallel_tool_calls")
    }


def beginning(body: Mapping[str, Any]) -> str:
    """The beginning of a conversation, which all its requests have: everything before what the model said first."""
    first: list[Any] = []
    for item in body["input"]:
        kind = str(item.get("type") or "message")
        if item.get("role") == "assistant" or kind.endswith("_call") or kind in _MADE_BY_MODEL:
            break
        first.append(item)
    return _WITH_FILES.encode([body["instructions"], first])


_WITH_FILES = json.JSONEncoder(
    ensure_ascii=False, separators=(",", ":"), default=lambda one: [one.head, one.blob.digest()]
)


def as_json_body(body: Mapping[str, Any]) -> bytes | Blob:
    """A body as JSON, the files in it as base64, which never stands in memory whole."""
    mark = f"@{random.getrandbits(64):016x}:"
    files: list[Embedded] = []

    def hold(value: Embedded) -> str:
        files.append(value)
        return f"{value.head}{mark}"

    text = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"), default=hold).encode(body)
    if not files:
        return text.encode("utf-8", "replace")
    blob = Blob()
    for piece, file in itertools.zip_longest(text.split(mark), files):
        blob.write(piece.encode("utf-8", "replace"))
        for at in range(0, file.blob.size if file else 0, 3 << 18):
            blob.write(base64.b64encode(file.blob.read(at, 3 << 18)))
    return blob


# -- what it says ------------------------------------------------------------------------------------------------------

_PAUSE = re.compile(r"try again in\s*(\d{1,9}(?:\.\d{1,9})?)\s*(ms|s|m)", re.I)
_REFUSED_PART = re.compile(
    r"(?:Unsupported|Unknown) (parameter|tool type)s?:? '?([\w-]+(?:\[\d+\]|\.[\w-]+)*)", re.I
)
_NO_MODEL = re.compile(
    r"The (?:'[^']{1,200}' model|model [`'][^`']{1,200}[`']) (?:is not supported|does not exist|requires a)"
)


def codex_refusal(status: int, headers: Mapping[str, str], body: bytes) -> Refusal:
    """An answer other than 2xx of the Codex backend, with what it means."""
    said = Answer(status, {}, body).object() or {}
    error = said.get("error")
    error = error if isinstance(error, dict) else {"code": error, "message": said.get("detail")}
    refused = failure_of(error, status, headers)
    refused = refused or refusal(status, headers, body)
    refused.said = status, headers.get("content-type", "application/json"), body
    return refused


def failure_of(
    error: Mapping[str, Any], status: int = 0, headers: Mapping[str, str] | None = None
) -> Refusal | None:
    """What an error of the backend's means, be it the answer or an event in one (`status` 0); None where its words do not
    tell. "Limits" and "Events". Its message may repeat what a client has sent: it is believed where nothing but the backend
    itself can begin like that, told to the client and never logged."""
    code = str(error.get("code") or error.get("type") or "")
    message = str(error.get("message") or "")
    refused = _by_code(code, error, status, headers or {}) or _by_words(code, message, error, status)
    if refused is None and status in (404, 0) and (code or message not in ("", "Not Found")):
        reason = "rejected" if status or _OF_REQUEST.match(code) else "broken"
        refused = Refusal(
            reason, "The upstream rejected the request" if reason == "rejected" else "Its answer failed"
        )
    elif (
        refused is None and 400 <= status < 500 and (status not in (401, 403, 404) or _OF_REQUEST.match(code))
    ):
        refused = Refusal("rejected", "The upstream rejected the request")
    if refused and refused.reason in ("rejected", "broken", "unsupported", "unlisted", "unreadable"):
        refused.words = f": {message[:300]}" if message else "."
    return refused


def _by_code(code: str, error: Mapping[str, Any], status: int, headers: Mapping[str, str]) -> Refusal | None:
    """What an error means by its code, or a status that has but one meaning."""
    if code == "usage_limit_reached":
        windows = (allowance_of(limits_in(headers)) or Allowance(0.0)).windows
        # A model may have a limit of its own, while the plan's have room.
        about = "" if windows and all(window.used < 100 for window in windows) else CODEX
        text = "This account's allowance for Codex is used up."
        return Refusal("limited", text, wait=_until_reset(error, headers), about=about)
    if code == "usage_not_included":
        return Refusal("excluded", "This account's plan does not include Codex.")
    if code == "insufficient_quota":
        return Refusal("limited", "This account's quota is used up.", about=CODEX)
    if code in _OVERLOADED:
        return Refusal("broken", "The upstream is overloaded; try again")
    if code == "rate_limit_exceeded" or status == 429:
        wait = _pause_in(str(error.get("message") or ""))
        wait = _seconds(None, headers) if wait is None else wait
        return Refusal("limited", "The upstream's rate limit is reached.", wait=wait)
    if code == "context_length_exceeded" or status == 413:
        text = "The conversation is too long for the model; shorten it."
        return Refusal("rejected", text, "context_length_exceeded")
    if code == "invalid_encrypted_content":
        return Refusal("unreadable", "The upstream cannot read earlier reasoning")
    if code == "model_not_found":
        return Refusal("unlisted", "The upstream does not offer this model to this account")
    if code == "deactivated_workspace":
        return _deactivated()
    return None


def _deactivated() -> Refusal:
    refused = Refusal("expired", "This account's workspace is deactivated.")
    refused.detail = "its workspace is deactivated"
    return refused


def _by_words(code: str, message: str, error: Mapping[str, Any], status: int) -> Refusal | None:
    """What an error means by the beginning of its message."""
    param = str(error.get("param") or "")
    refused: Refusal | None = None
    if message.startswith("Selected model is at capacity"):
        return Refusal("limited", "The model is at capacity just now.")
    if status in (401, 402, 403) and message.startswith("deactivated_workspace"):
        return _deactivated()
    if status in (401, 403) and message.lower().startswith("missing scopes"):
        return Refusal("excluded", "This account's token is not of a sign-in that Codex takes.")
    if status not in (0, 400, 404):
        return None
    if _NO_MODEL.match(message):
        return Refusal("unlisted", "The upstream does not offer this model to this account")
    if message.startswith("Tool choice 'image_generation' not found"):
        refused = Refusal("excluded", "This account's plan does not include drawing.")
        refused.about = DRAWING
    elif code == "unsupported_value" and (param == "reasoning.effort" or param.startswith("tools[")):
        refused = Refusal("unsupported", "The upstream rejected the request")
        refused.about = param.removesuffix(".type")
    elif (part := _REFUSED_PART.match(message)) and param in ("", part[2]):
        refused = Refusal("unsupported", "The upstream rejected the request")
        refused.about = f"tools:{part[2]}" if part[1].lower() == "tool type" else part[2]
    return refused


def _pause_in(message: str) -> float | None:
    """The seconds that a message says to wait, None when it does not."""
    if not (pause := _PAUSE.search(message)):
        return None
    return _seconds(float(pause[1]) * {"ms": 0.001, "s": 1, "m": 60}[pause[2].lower()], {})


# The codes of what is wrong with a request, where no status says whose fault it is.
_OF_REQUEST = re.compile("invalid|unsupported|unknown_param|missing|cyber_policy|content_|string_|array_")
_OVERLOADED = ("server_is_overloaded", "slow_down", "overloaded_error")


def _until_reset(error: Mapping[str, Any], headers: Mapping[str, str]) -> float | None:
    """The seconds until a limit is counted anew."""
    moment = _number_of(error.get("resets_at"))
    if moment is not None:
        return min(max(moment - time.time(), 1.0), 32 * 86400.0)
    return _seconds(error.get("resets_in_seconds"), headers)


def _number_of(value: Any) -> float | None:
    with contextlib.suppress(TypeError, ValueError, OverflowError):
        if (
            math.isfinite(number := float(value))
            and not isinstance(value, bool)
            and abs(number) < LAST_MOMENT
        ):
            return number
    return None


def _window(said: Any, now: float) -> Window | None:
    """A window of an allowance, in any of the shapes in which it is told; None for none."""
    if not isinstance(said, Mapping) or (used := _number_of(said.get("used_percent"))) is None:
        return None
    seconds = _number_of(said.get("limit_window_seconds"))
    seconds = 60 * (_number_of(said.get("window_minutes")) or 0) if seconds is None else seconds
    reset = _number_of(said.get("reset_at"))
    if reset is None:
        reset = now + (_number_of(said.get("reset_after_seconds")) or seconds)
    return Window(max(0.0, used), int(min(max(seconds, 0.0), 400 * 86400.0)), min(reset, now + 400 * 86400.0))


def _credits(said: Any) -> str:
    """Bought credits, as a person is told them."""
    if not isinstance(said, Mapping):
        return ""
    has, unlimited = (str(said.get(name)).lower() in ("true", "1") for name in ("has_credits", "unlimited"))
    balance = str(said.get("balance") or "0")
    return "unlimited" if unlimited else re.sub(r"[^\w.,-]", "", balance)[:20] if has else ""


def allowance_of(said: Mapping[str, Any], before: Allowance | None = None) -> Allowance | None:
    """The allowance in what the backend says of it; what it leaves out is as `before`. None when it says nothing."""
    now = time.time()
    limits = said.get("rate_limit") or said.get("rate_limits")
    limits = limits if isinstance(limits, Mapping) else {}
    told = [limits.get(name) for name in ("primary_window", "secondary_window", "primary", "secondary")]
    windows = [window for one in told if (window := _window(one, now))]
    if not windows and "credits" not in said:
        return before
    if before:
        new = {window.seconds for window in windows}
        windows += [one for one in before.windows if one.seconds not in new and one.reset > now]
    bought = _credits(said["credits"]) if "credits" in said else before.credits if before else ""
    return Allowance(now, tuple(sorted(windows, key=lambda one: one.seconds)), bought)


def limits_in(headers: Mapping[str, str]) -> dict[str, Any]:
    """What an answer's headers say of the allowance, in the shape of its event."""

    def told(start: str) -> dict[str, str]:
        names = (
            "used-percent",
            "window-minutes",
            "reset-at",
            "reset-after-seconds",
            "has-credits",
            "unlimited",
        )
        found = {name: headers.get(f"x-codex-{start}-{name}") for name in (*names, "balance")}
        return {name.replace("-", "_"): value for name, value in found.items() if value}

    said: dict[str, Any] = {"rate_limits": {name: told(name) for name in ("primary", "secondary")}}
    return said | ({"credits": bought} if (bought := told("credits")) else {})


def catalog_models(said: Mapping[str, Any]) -> tuple[dict[str, Any], ...]:
    """The models of a list, best first."""
    models = [
        one for one in dicts(said.get("models"))[:MAX_CATALOG] if _MODEL_NAME.fullmatch(str(one.get("slug")))
    ]
    models.sort(key=lambda one: _number_of(one.get("priority")) or 0.0)
    return tuple(
        {
            name: value
            for name, kind in _OF_A_MODEL.items()
            if (value := _kept_fact(one.get(name), kind)) is not None
        }
        for one in models
    )


def _kept_fact(value: Any, kind: type) -> Any:
    """What is kept of something that is told of a model; None for what is not of its kind."""
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        return None
    if isinstance(value, str):
        return value[:500].encode("utf-8", "replace").decode()
    if isinstance(value, list):  # of words, or of objects with an effort
        words = [one if isinstance(one, str) else _at(one, ("effort",)) for one in value[:20]]
        words = [one[:50] for one in words if isinstance(one, str)]
        return [{"effort": one} for one in words] if any(isinstance(one, dict) for one in value) else words
    return value


def is_shown(model: Mapping[str, Any]) -> bool:
    """Whether a model is for people to choose; others answer whoever knows their names."""
    return bool(model.get("visibility", "list") == "list")


# What is kept of a model: its instructions are long, and for the client that it is made for.
_OF_A_MODEL: Mapping[str, type] = {
    "slug": str, "visibility": str, "display_name": str, "description": str, "context_window": int,
    "max_context_window": int, "input_modalities": list, "support_verbosity": bool, "default_reasoning_level": str,
    "supported_reasoning_levels": list,
}  # fmt: skip
_MODEL_NAME = re.compile(r"[0-9A-Za-z][\w.:/-]{0,127}")


def levels_of(model: Mapping[str, Any]) -> list[str]:
    """The efforts that a model knows, from the least on."""
    told = [one.get("effort") for one in dicts(model.get("supported_reasoning_levels"))]
    return [effort for effort in EFFORTS if effort in told]


def nearest_effort(effort: str, levels: Sequence[str]) -> str:
    """The effort that a model knows for one that is wanted: that one, else the next lower one, else its lowest."""
    if not levels or effort not in EFFORTS:
        return effort
    lower = [one for one in levels if EFFORTS.index(one) <= EFFORTS.index(effort)]
    return lower[-1] if lower else levels[0]


class Drawn(NamedTuple):
    """A drawing within an answer: base64, and its format."""

    data: str
    form: str


_SEQUENCE = re.compile(rb'("sequence_number": ?)(\d{1,9})')
_TEXT_HEAD = b"event: response.output_text.delta\ndata: {"
_EVENT_KIND = re.compile(rb'data: ?\{"type": ?"([\w.]+)"')
_HELD_BACK = {
    "response.created", "response.in_progress", "response.queued", "response.output_item.added",
    "response.content_part.added", "response.reasoning_summary_part.added",
}  # fmt: skip


class CodexDecoder:
    """The bytes of an answer to events: of a native request to the backend's own (`Verbatim`), else to an answer's. What comes
    before there is anything of the answer is held back, so that a refusal among it can be made up for elsewhere. "Events".
    """

    def __init__(self, native: bool, names: Names) -> None:
        self._native, self._names = native, names
        self._rest = bytearray()
        self._searched = 0
        self._held: list[Event | Drawn] = []
        self.begun = False  # whether there is anything of the answer
        self.light = True  # whether everything since the last `feed` is text
        self.failure: Refusal | None = None
        self.limits: dict[str, Any] | None = None  # what was said of the allowance last
        self.reason = ""  # how the answer has ended, "" while it has not
        self._calls = False
        self._plain = False  # whether events of text can be passed on as they come
        self._carriage = False  # whether what came last ended in a carriage return
        self._size = 0  # bytes of what is no text
        self._swallowed = 0  # events with a number that nobody is told
        self._said: dict[Any, int] = {}  # characters that were told, by the item's place
        self._calling: Any = None  # the place of the call that is being told
        self._later: list[Event | Drawn] = []  # what comes behind that
        self._seen: set[Any] = set()  # places of items that are complete
        self._thought = False  # whether anything of what the model thought was told

    @property
    def pending(self) -> int:
        return len(self._rest)

    def text_alone(self, data: bytes) -> Verbatim | None:
        """The whole events in what is there with these bytes, if they are text and nothing else; once per event."""
        rest = self._rest
        if not self._plain or len(rest) > MAX_LIGHT:  # a long event is not looked through with every piece
            return None
        data = bytes(rest) + data if rest else data
        end = data.rfind(b"}\n\n") + 3
        whole = data if end == len(data) else data[:end]
        count = whole.count(_TEXT_HEAD)
        if not count or not whole.startswith(_TEXT_HEAD) or whole.count(b"\n") != 3 * count:
            return None
        rest[:] = data[end:]
        self._searched = 0
        return Verbatim(None, whole, count)

    def feed(self, data: bytes) -> list[Event | Drawn]:
        """The events in these bytes; once per piece."""
        if told := self.text_alone(data):
            self.light = True
            return [told]
        rest = self._rest
        if self._carriage or b"\r" in data:
            data = b"\r" * self._carriage + data
            self._carriage = data.endswith(b"\r")
            data = data[: len(data) - self._carriage].replace(b"\r\n", b"\n")
        rest += data
        out: list[Event | Drawn] = []
        self.light = True
        start = 0
        while (end := rest.find(b"\n\n", max(start, self._searched))) >= 0:
            self._event(bytes(rest[start:end]), out)
            start = end + 2
            self._searched = 0
        if start:
            del rest[:start]
        self._searched = max(0, len(rest) - 1)
        most = MAX_NATIVE_ANSWER if self.begun else MAX_NATIVE_HELD
        if len(rest) > MAX_NATIVE_EVENT or self._size > most:
            self.failure = Refusal("broken", "The upstream's answer is too long; it was abandoned.")
        quiet = not (self.reason or self._swallowed or self.failure or self._carriage)
        self._plain = self._native and self.begun and quiet
        if self.begun and self._held:
            out[:0], self._held = self._held, []
        elif not self.begun:
            self._held += out
            out = []
        return out

    def _event(self, block: bytes, out: list[Event | Drawn]) -> None:
        """One event; once per token."""
        if block.startswith(b"event: "):
            name, _, data = block[7:].partition(b"\n")
        else:
            data = block
            match = _EVENT_KIND.match(block)
            name = match[1] if match else b""
        whole = name.endswith(b".delta") and data.startswith(b"data: {") and data.endswith(b"}")
        if self._native and whole and self.reason == "":
            self.begun = True
            if self._swallowed:
                data = _SEQUENCE.sub(lambda match: match[1] + b"%d" % (int(match[2]) - self._swallowed), data)
            self._pass_on(b"event: " + name + b"\n" + data + b"\n\n", out)
            return
        event = self._object(block)
        if event is None:
            return
        kind = event["type"]
        if kind == "response.output_text.delta" and not self._native and not self.reason:  # once per token
            self.begun = True
            self._size += len(block) if self._calling is not None else 0
            self._text(event, self._later if self._calling is not None else out)
            return
        self._size += len(block)
        if not kind.startswith(("response.", "error")) or kind == "response.metadata":
            self._swallowed += type(event.get("sequence_number")) is int
            if kind == "codex.rate_limits":
                self.limits = event
            return
        self.light = False
        if kind in ("response.failed", "error"):
            self._failed(event)
        elif self.reason == "" and self.failure is None:
            self.begun = self.begun or kind not in _HELD_BACK
            self._take(kind, event, out)

    def _pass_on(self, data: bytes, out: list[Event | Drawn]) -> None:
        """Text that nobody here looks into, behind such text in one piece."""
        last = out[-1] if out else None
        if type(last) is Verbatim and last.event is None:
            out[-1] = Verbatim(None, last.data + data, last.events + 1)
        else:
            out.append(Verbatim(None, data))

    @staticmethod
    def _object(block: bytes) -> dict[str, Any] | None:
        """The object of an event; None for a comment, or what is none; once per token."""
        lines = [line[5:] for line in block.split(b"\n") if line.startswith(b"data:")]
        try:
            event = json.loads(lines[0] if len(lines) == 1 else b"\n".join(lines)) if lines else None
        except (ValueError, RecursionError):
            return None
        return event if isinstance(event, dict) and isinstance(event.get("type"), str) else None

    def _failed(self, event: Mapping[str, Any]) -> None:
        response = event.get("response")
        error = response.get("error") if isinstance(response, dict) else event.get("error")
        error = error if isinstance(error, dict) else event
        code = error.get("code") or ("" if error is event else error.get("type"))
        status = _number_of(event.get("status") or event.get("status_code")) or 0
        known = {"code": code, "type": "", "message": error.get("message")}
        told = {name: error.get(name) for name in ("param", "resets_at", "resets_in_seconds")}
        if self.failure is None or self.failure.reason == "broken":
            self.failure = failure_of(known | told, int(status)) or Refusal(
                "broken", "The upstream's answer failed; try again."
            )

    def _take(self, kind: str, event: dict[str, Any], out: list[Event | Drawn]) -> None:
        """An event of the answer's."""
        item = event.get("item")
        response = event.get("response")
        if isinstance(item, dict):
            self._names.restore(item)
        if self._native:
            if type(number := event.get("sequence_number")) is int:
                event["sequence_number"] = number - self._swallowed
            for one in dicts(response.get("output")) if isinstance(response, dict) else ():
                self._names.restore(one)
            self._names.restore(event)
            self._calls = self._calls or (isinstance(item, dict) and str(item.get("type")).endswith("_call"))
            out.append(Verbatim(event))
        if kind == "response.created" and isinstance(response, dict):
            out.append(Begin(str(response.get("model") or ""), "", str(response.get("id") or "")))
        elif take := None if self._native else self.TAKES.get(kind):
            own = self._calling is None or item_place(event) == self._calling
            take(self, event, out if own else self._later)
            if self._calling is None:
                out += self._later
                self._later = []
        if kind in RESPONSE_ENDS and isinstance(response, dict):
            self._end(kind, response, out)

    def _end(self, kind: str, response: Mapping[str, Any], out: list[Event | Drawn]) -> None:
        if not self._native:
            out += self._later
            for place, item in enumerate(dicts(response.get("output"))):
                self._names.restore(item)
                self._whole(place, item, out)
        usage = response.get("usage")
        if isinstance(usage, dict):
            counts = [usage.get("input_tokens"), _at(usage, ("input_tokens_details", "cached_tokens"))]
            counts += [usage.get("output_tokens"), _at(usage, ("output_tokens_details", "reasoning_tokens"))]
            out.append(Usage(*(int(max(0.0, _number_of(one) or 0.0)) for one in counts)))
        self.reason = "tool_calls" if self._calls and not self._native else "stop"
        if kind == "response.incomplete":
            cause = _at(response, ("incomplete_details", "reason"))
            self.reason = "content_filter" if cause == "content_filter" else "length"

    # -- an answer's own events, of those that are not text --

    def _grown(self, event: dict[str, Any], out: list[Event | Drawn], make: Callable[[str], Event]) -> None:
        if isinstance(text := event.get("delta"), str) and text:
            out.append(make(text))
            place = item_place(event)
            if place not in self._said:
                self._size += 1000  # a place takes room too
            self._said[place] = self._said.get(place, 0) + len(text)

    def _text(self, event: dict[str, Any], out: list[Event | Drawn]) -> None:
        self._grown(event, out, Text)

    def _reasoning(self, event: dict[str, Any], out: list[Event | Drawn]) -> None:
        self._thought = True
        self._grown(event, out, Reasoning)

    def _new_part(self, event: dict[str, Any], out: list[Event | Drawn]) -> None:
        if self._thought:
            out.append(Reasoning("\n\n"))

    def _added(self, event: dict[str, Any], out: list[Event | Drawn]) -> None:
        item = event.get("item")
        if self._calling is None and isinstance(item, dict) and item.get("type") == "function_call":
            self._calling = item_place(event)
            out.append(
                CallPart("", *(str(item.get(name) or "") for name in ("call_id", "name", "namespace")))
            )

    def _arguments(self, event: dict[str, Any], out: list[Event | Drawn]) -> None:
        if self._calling is not None and item_place(event) == self._calling:
            self._grown(event, out, CallPart)

    def _item_done(self, event: dict[str, Any], out: list[Event | Drawn]) -> None:
        if isinstance(item := event.get("item"), dict):
            self._whole(item_place(event), item, out)

    def _whole(self, place: Any, item: dict[str, Any], out: list[Event | Drawn]) -> None:
        """An item that is complete: what of it has not been told yet."""
        place = len(self._seen) if place is None else place
        if place in self._seen:
            return
        self._seen.add(place)
        kind = str(item.get("type"))
        if kind == "message":
            parts = dicts(item.get("content"))
            text = "".join(str(part.get("text") or part.get("refusal") or "") for part in parts)
            out += [Text(rest)] if (rest := text[self._said.get(place, 0) :]) else []
        elif kind in ("function_call", "custom_tool_call"):
            self._calls = True
            self._calling = None if self._calling == place else self._calling
            custom = kind == "custom_tool_call"
            said = item.get("input" if custom else "arguments")
            said = said if isinstance(said, str) else compact(said)
            arguments = compact({"input": said}) if custom else said
            id, name, space = (str(item.get(field) or "") for field in ("call_id", "name", "namespace"))
            out.append(FunctionCall(id, name, arguments, CUSTOM if custom else FUNCTION, space))
        elif kind in _FIXED_CALLS:
            self._calls = True
            given = item.get("operation" if kind == "apply_patch_call" else "action")
            given = {"operation": given} if kind == "apply_patch_call" else given
            call = FunctionCall(
                str(item.get("call_id") or ""), _FIXED_CALLS[kind], compact(given), _FIXED_CALLS[kind]
            )
            out.append(call)
        elif kind == "image_generation_call" and isinstance(item.get("result"), str):
            out.append(Drawn(item["result"], str(item.get("output_format") or "png")))
        elif kind == "code_interpreter_call":
            out.append(ToolUse("python", str(item.get("code") or "")))
            logs = [str(one["logs"]) for one in dicts(item.get("outputs")) if one.get("logs")]
            out += [ToolUse("", text) for text in logs]
        elif kind == "reasoning" and isinstance(item.get("encrypted_content"), str):
            out.append(Encrypted(item["encrypted_content"]))

    TAKES: Mapping[str, Callable[[Any, dict[str, Any], list[Any]], None]] = {
        "response.output_text.delta": _text,
        "response.refusal.delta": _text,
        "response.reasoning_summary_text.delta": _reasoning,
        "response.reasoning_text.delta": _reasoning,
        "response.reasoning_summary_part.added": _new_part,
        "response.output_item.added": _added,
        "response.function_call_arguments.delta": _arguments,
        "response.output_item.done": _item_done,
    }


def item_place(event: Mapping[str, Any]) -> int | str | None:
    """The place of an event's item in the answer; its id where that is not told, None for neither."""
    index, id = event.get("output_index"), event.get("item_id")
    return index if type(index) is int else id if isinstance(id, str) else None


RESPONSE_ENDS = ("response.completed", "response.done", "response.incomplete")
_FIXED_CALLS = {CALL_SHAPES[kind].type: kind for kind in (LOCAL_SHELL, SHELL, APPLY_PATCH)}


# -- the calls, and who makes them -------------------------------------------------------------------------------------


class CodexCalls:
    """The calls of the Codex backend, one method each."""

    def __init__(self, connections: Connections) -> None:
        self.connections, self.settings, self.metrics = connections, connections.settings, connections.metrics
        program, _, rest = self.settings.codex_client.partition(" ")
        self.originator, _, self.version = program.partition("/")
        agent = f"{program} {rest or '(Ubuntu 24.04; x86_64) xterm-256color'}"
        self._identity = [
            f"originator: {self.originator}",
            f"User-Agent: {agent}",
            f"version: {self.version}",
        ]
        self._catalogs: dict[str, tuple[Mapping[str, Any], ...]] = {}  # lists of models, by their digest
        # Parts of requests that a gateway has refused, which are left out until a time.monotonic().
        self._refused_parts: dict[tuple[str, str], float] = {}

    def _headers(self, account: Account, accept: str, session: str = "") -> list[bytes]:
        """The header lines of a call. "Headers"."""
        row = account.row
        lines = [f"Authorization: Bearer {row.access_token}", *self._identity, f"Accept: {accept}"]
        lines += ["Content-Type: application/json", "Expect:"]
        if row.workspace:
            lines.append(f"ChatGPT-Account-ID: {row.workspace}")
        if session:
            lines += [f"session_id: {session}", f"session-id: {session}", f"thread-id: {session}"]
            lines += [f"x-client-request-id: {session}", "OpenAI-Beta: responses=experimental"]
        if self.settings.auth_key:
            lines.append(f"authkey: {self.settings.auth_key}")
        return [*(line.encode("latin-1", "replace") for line in lines), *_cookie_line(account.codex_cookies)]

    def _heard(self, name: str, account: Account, status: int, headers: Mapping[str, str]) -> None:
        """Counts an answer, and keeps what it brings besides: cookies, the allowance, that the list of models is another."""
        self.connections.heard(name, account, status, {})
        if "set-cookie" in headers:
            account.codex_cookies = with_cookies(account.codex_cookies, headers)
        self.note_limits(account, limits_in(headers))
        etag = headers.get("x-models-etag", "")
        known = account.catalog
        changed = etag and known.etag and _plain_tag(etag) != _plain_tag(known.etag)
        if changed and time.time() - known.read > CATALOG_PAUSE:
            account.catalog = known._replace(read=0.0)

    @staticmethod
    def note_limits(account: Account, said: Mapping[str, Any]) -> None:
        account.allowance = allowance_of(said, account.allowance)

    def responses(self, account: Account, body: Mapping[str, Any], session: str, watch: Watch) -> Call:
        """A request whose answer is begun, for a `with` block; its bytes are events."""
        url = f"{account.gateway}/backend-api/codex/responses"
        headers = self._headers(account, "text/event-stream", session)
        if body["input"] and body["input"][-1].get("type") == "compaction_trigger":
            headers.append(b"x-codex-beta-features: remote_compaction_v2")
        call = self.connections.call(
            account,
            "POST",
            url,
            headers,
            as_json_body(self._without_refused(account.gateway, body)),
            watch,
            plain=True,
        )
        with contextlib.ExitStack() as guard:
            guard.enter_context(call)
            try:
                call.start()
            except Refusal:
                self._heard("codex", account, 0, {})
                raise
            self._heard("codex", account, call.status, call.headers)
            if call.status != 200:
                raise codex_refusal(call.status, call.headers, call.whole().body)
            guard.pop_all()
        return call

    def _object(
        self, name: str, account: Account, method: str, path: str, watch: Watch,
        body: Mapping[str, Any] | None = None, session: str = "", silence: float | None = None, etag: str = "",
    ) -> Answer:  # fmt: skip
        """The whole answer of a call; Refusal for anything but an object with 2xx, or 304."""
        url = f"{account.gateway}/backend-api{path}"
        headers = self._headers(account, "application/json", session)
        headers += [f"If-None-Match: {etag}".encode("latin-1")] if etag else []
        data = None if body is None else as_json_body(body)
        answer = self.connections.answer(
            name, account, method, url, headers, data, watch, silence, plain=True
        )
        self._heard(name, account, answer.status, answer.headers)
        if answer.status != 304 and (not 200 <= answer.status < 300 or answer.object() is None):
            raise codex_refusal(answer.status, answer.headers, answer.body)
        return answer

    def compacted(
        self, account: Account, body: Mapping[str, Any], session: str, watch: Watch
    ) -> dict[str, Any]:
        """The items that stand for a conversation, as {"output"}."""
        left_out = ("stream", "store", "include", "client_metadata", "tool_choice")
        body = {name: value for name, value in body.items() if name not in left_out}
        path = "/codex/responses/compact"
        return self._object("codex-compact", account, "POST", path, watch, body, session).object() or {}

    def usage(self, account: Account, watch: Watch) -> dict[str, Any]:
        """What the account's plan lets it use, which is noted."""
        said = self._object("codex-usage", account, "GET", "/wham/usage", watch).object() or {}
        self.note_limits(account, said)
        return said

    def models(self, account: Account, watch: Watch) -> Catalog:
        """The account's models, read anew unless they are still those."""
        before = account.catalog
        path = f"/codex/models?client_version={urllib.parse.quote(self.version)}"
        answer = self._object(
            "codex-models", account, "GET", path, watch, silence=CATALOG_SILENCE, etag=before.etag
        )
        if answer.status == 304:
            return before._replace(read=time.time())
        models = catalog_models(answer.object() or {})
        digest = hashlib.sha256(
            compact(models).encode("utf-8", "replace")
        ).hexdigest()  # accounts of a plan have the same
        if len(self._catalogs) > MAX_HELD_CATALOGS:
            self._catalogs.clear()
        etag = answer.headers.get("etag", "")
        etag = etag if re.fullmatch(r"[\x21-\x7e]{1,200}", etag) else ""
        return Catalog(time.time(), etag, self._catalogs.setdefault(digest, models))

    def refuse_part(self, gateway: str, part: str) -> None:
        """Remembers that a gateway's backend refuses a part of requests, for as long as that is believed."""
        self._refused_parts[gateway, part] = time.monotonic() + BELIEVED

    def _without_refused(self, gateway: str, body: Mapping[str, Any]) -> Mapping[str, Any]:
        now = time.monotonic()
        for part in _SHARED_PARTS:
            body = without(body, part) if self._refused_parts.get((gateway, part), 0.0) > now else body
        return body


MAX_HELD_CATALOGS = 50
# Parts of requests that are left out of all once one was refused for them: what no client's words can make out to be one,
# and nobody misses much.
_SHARED_PARTS = (
    "include", "prompt_cache_key", "service_tier", "parallel_tool_calls", "text.verbosity", "reasoning.summary",
)  # fmt: skip


def _plain_tag(etag: str) -> str:
    return etag.removeprefix("W/").strip('"')


class CodexAttempt(Attempt):
    """An asking of the Codex backend."""

    def __init__(self, asked: Asked, session: str) -> None:
        super().__init__(asked, asked.question)
        self.session = session  # the id of the conversation there
        # What it is known by besides: the response before, what stands for its beginning.
        self.marks: list[str] = []
        self.heard = CodexDecoder(False, Names())  # the answer under way
        self.without_reasoning = False  # whether earlier reasoning is left out
        self.left_out: list[str] = []  # parts of it that were refused
        self.body: Mapping[str, Any] = {}  # what was asked last
        self.counts = True


class Codex(Turns):
    """The upstream `codex`: asks the Codex backend. A conversation stays with its account as long as that can answer: what
    it has read already costs less there, and nobody else can read what its model thought."""

    name = CODEX
    has_conversations = False

    def __init__(self, calls: CodexCalls, web: Web) -> None:
        super().__init__(web.site.connections, web.renewals, web.ledger)
        self.calls, self.web, self.files, self.links = calls, web, web.files, web.links
        self._homes_lock = threading.Lock()
        self._homes: OrderedDict[str, str] = OrderedDict()  # sessions → accounts
        self._absent: dict[str, float] = {}  # gateways without this backend, until a time.monotonic()
        # Gateways without the call to make a conversation shorter, until a time.monotonic().
        self._without_compact: dict[str, float] = {}
        self._reading = ThreadPoolExecutor(4, thread_name_prefix="codex")

    def holds(self, conversation: str, scope: Scope) -> bool:
        """Nothing is kept there."""
        return False

    def answer(self, asked: Asked, sink: Sink) -> None:
        """Has a question answered by an account of a browser sign-in."""
        attempt, body, names = self._attempt(asked)
        tail: list[Event] = []

        def ask(account: Account) -> Finish:
            return self._asked(account, attempt, body, names, sink, tail)

        try:
            finish = self.to_the_end(attempt, ask, 0, lambda: False)
        except Refusal as refused:
            if refused.reason != "missing":
                raise
            raise self._nobody("") from None
        if not sink.over and finish:
            sink.take([*tail, finish])

    def _attempt(self, asked: Asked) -> tuple[CodexAttempt, dict[str, Any], Names]:
        """What is asked, and the names in it, but for what depends on the account."""
        question = asked.question
        self._refuse_early(asked)
        given = question.native or as_native(question, functools.partial(self._part, asked))
        names = Names()
        body = fitted(given, names)
        if question.native:
            body["input"] = [self._with_files(asked, item) for item in body["input"]]
        key = question.options.get("prompt_cache_key") or beginning(body)
        attempt = CodexAttempt(asked, self._session(asked.scope, str(key)))
        before = (question.native or {}).get("previous_response_id")
        attempt.marks = [before] if isinstance(before, str) else []
        attempt.marks += [key for item in body["input"] if (key := _compaction_key(item))]
        return attempt, body, names

    def _refuse_early(self, asked: Asked) -> None:
        """Says that nobody has the model before files are fetched for it; the models of accounts of which nothing is known
        are read, at once if none of the others has it."""
        there = self._there(asked.guest)
        unread = [one for one in there if not one.catalog.read]
        if unread and any(one.catalog.models and self._fits(one, asked.question) for one in there):
            for account in unread:
                self._reading.submit(self._try_to_know, account, Watch())
        elif unread and len(there) > 1:  # of a single one they are read when it is asked
            jobs = [
                functools.partial(self._try_to_know, account) for account in unread[:MAX_ASKED_FOR_MODELS]
            ]
            side_by_side(jobs, asked.watch)
        if not any(self._fits(account, asked.question) for account in there):
            raise self._nobody(asked.question.model if there else "")

    def _there(self, guest: Account | None) -> list[Account]:
        """The accounts that can be asked for a caller, ready ones whose gateway has this backend."""
        accounts = [guest] if guest else self.pool.codex_accounts()
        able = [one for one in accounts if one.row.state == "ready" and one.speaks_codex()]
        now = time.monotonic()
        return [one for one in able if self._absent.get(one.gateway, 0.0) < now]

    def _try_to_know(self, account: Account, watch: Watch) -> None:
        """Has the models of an account read, if they can be had."""
        with contextlib.suppress(ApiError):
            self.renewals.token(account, watch)
            self._know(account, watch)

    @staticmethod
    def _session(scope: Scope, key: str) -> str:
        """The id of a conversation there: stable, and another one for every caller."""
        digest = hashlib.sha256(f"{scope.owner}\n{key}".encode("utf-8", "replace")).digest()
        return str(uuid.UUID(bytes=digest[:16], version=4))

    def _asked(
        self, account: Account, attempt: CodexAttempt, body: dict[str, Any], names: Names, sink: Sink, tail: list[Event]
    ) -> Finish:  # fmt: skip
        """One call: how its answer ended. `tail` gets what is to be given together with that."""
        decoder = attempt.heard = CodexDecoder(attempt.question.native is not None, names)
        tail.clear()
        attempt.body = body = self._for_account(account, attempt, body)
        try:
            with self.calls.responses(account, body, attempt.session, attempt.watch) as call:
                self._hear(account, attempt, call, sink, tail)
        except Refusal as refused:
            known = account.catalog.models or account.row.codex == "yes"
            if refused.reason != "missing" or not known:
                raise
            raise Refusal("broken", "The Codex backend said that it has no such call; try again.") from None
        if decoder.limits:
            self.calls.note_limits(account, decoder.limits)
        if decoder.failure and not decoder.reason:
            raise decoder.failure
        if not decoder.reason and not sink.over:
            raise Refusal("broken", "The upstream broke off its answer; try again.")
        return Finish(decoder.reason or "stop")

    def _hear(
        self, account: Account, attempt: CodexAttempt, call: Call, sink: Sink, tail: list[Event]
    ) -> None:
        """Gives the sink what comes: the loop what is text alone, this thread everything else."""
        decoder, careful = attempt.heard, sink.careful

        def carried(data: bytes) -> Any:
            """What is not for the loop, None when it is done; once per event."""
            if not careful and (told := decoder.text_alone(data)):
                sink.take([told])
                return [] if sink.over else None
            if len(data) + decoder.pending > MAX_LIGHT:
                return data
            found = decoder.feed(data)
            if decoder.failure or not (attempt.begun and decoder.light):
                return found or decoder.failure
            if found:
                if careful and not sink.light(cast("list[Light]", found)):
                    return found
                sink.take(cast("list[Event]", found))
            return [] if sink.over else None

        def handle(come: Any) -> bool:
            found = decoder.feed(come) if isinstance(come, bytes) else come if isinstance(come, list) else []
            if decoder.begun and not attempt.begun:
                self._began(account, attempt)
            events = self._shown(attempt, found)
            if decoder.reason:
                tail.extend(events)
                return True
            if events:
                sink.take(events)
                if sink.outlet:
                    sink.outlet.drain()
            return decoder.failure is not None or sink.over

        come: Any = call.read() or None
        while come is not None and not handle(come):
            come = call.carry(carried, sink.outlet)

    def _began(self, account: Account, attempt: CodexAttempt) -> None:
        attempt.begun = True
        attempt.asked.account = account
        for name in (CODEX, f"{CODEX} {attempt.question.model}"):
            self.pool.waited_out(account, name)
        self.pool.learned(account, codex="yes")
        self._remember(attempt.session, account)

    def _remember(self, key: str, account: Account) -> None:
        """Remembers which account has a conversation."""
        with self._homes_lock:
            self._homes[key] = account.id
            self._homes.move_to_end(key)
            if len(self._homes) > MAX_HOMES:
                self._homes.popitem(last=False)

    def keep_response(self, id: str, account: Account | None) -> None:
        """Remembers which account has made a response."""
        if account and account.speaks_codex():
            self._remember(id, account)

    def _keep_home(self, attempt: Attempt, item: Mapping[str, Any]) -> None:
        """Remembers whose an item is that stands for the beginning of a conversation."""
        if (key := _compaction_key(item)) and attempt.leased:
            self._remember(key, attempt.leased)

    def _home(self, attempt: Attempt) -> str:
        """The account that has a conversation, "" where that is not known: by the response before, by what stands for its
        beginning since it was made shorter, which only that account can read, or by the session."""
        if not isinstance(attempt, CodexAttempt):
            return ""
        with self._homes_lock:
            return next(
                (self._homes[key] for key in (*attempt.marks, attempt.session) if key in self._homes), ""
            )

    def _shown(self, attempt: CodexAttempt, found: Iterable[Event | Drawn]) -> list[Event]:
        """The events with a link for each drawing."""
        events: list[Event] = []
        for event in found:
            if isinstance(event, Verbatim) and event.event and isinstance(event.event.get("item"), dict):
                self._keep_home(attempt, event.event["item"])
            if not isinstance(event, Drawn):
                events.append(event)
                continue
            form = event.form if re.fullmatch("[a-z]{1,8}", event.form) else "png"
            try:
                data = base64.b64decode(event.data)
            except ValueError:
                raise Refusal("broken", "The upstream's answer has a drawing that is none.") from None
            if link := self.links.kept([data], f"image.{form}", f"image/{form}"):
                events.append(Image(attempt.asked.base + link))
        return events

    # -- what is asked, and of whom --

    def _part(self, asked: Asked, attachment: Attachment) -> dict[str, Any]:
        """A file as a part of a message."""
        if attachment.image and attachment.url:
            return {"type": "input_image", "detail": "auto", "image_url": attachment.url}
        file, blob = self._bytes(asked, attachment)
        data = Embedded(f"data:{file.mime};base64,", blob)
        if file.width:
            return {"type": "input_image", "detail": "auto", "image_url": data}
        return {"type": "input_file", "filename": file.name, "file_data": data}

    def _bytes(self, asked: Asked, attachment: Attachment) -> tuple[File, Blob]:
        """A file and its bytes, got from the account that holds it if another one does."""
        self.gather(asked, [attachment])
        file, blob = asked.materials[attachment]
        if blob is None:
            blob = self.web.fetched(asked, attachment)
        return file, blob

    def _with_files(self, asked: Asked, item: dict[str, Any]) -> dict[str, Any]:
        """An item of a native request with the bytes of the files that are named by an id of this server's."""
        known = {one.file: one for one in asked.question.attachments if one.file}
        if not known:
            return item
        whole = dict(item)
        for name in ("content", "output"):
            if isinstance(parts := item.get(name), list):
                files = [known.get(str(_at(part, ("file_id",)))) for part in parts]
                whole[name] = [
                    self._part(asked, file) if file else part for part, file in zip(parts, files, strict=True)
                ]
        return whole

    def _for_account(
        self, account: Account, attempt: CodexAttempt, body: Mapping[str, Any]
    ) -> dict[str, Any]:
        """A body with what depends on the account: its model, how hard that may think, and what its plan has."""
        model, effort = self._model(account, attempt.question)
        whole = {"model": model} | dict(body) | {"prompt_cache_key": attempt.session}
        facts = account.catalog.find(model) or {}
        reasoning = dict(body.get("reasoning") or {})
        wanted = effort or reasoning.get("effort")
        if isinstance(wanted, str) and wanted:
            reasoning["effort"] = nearest_effort(wanted, levels_of(facts))
        if reasoning:
            whole["reasoning"] = reasoning
        if facts.get("support_verbosity") is False and isinstance(body.get("text"), dict):
            whole["text"] = {name: one for name, one in body["text"].items() if name != "verbosity"}
        if not self._draws(account, model) and attempt.question.forced != DRAWING and body.get("tools"):
            whole = without(whole, f"tools:{DRAWING}")
        if attempt.without_reasoning:
            whole["input"] = [one for one in body["input"] if one.get("type") != "reasoning"]
        for part in attempt.left_out:
            whole = without(whole, part)
        return whole

    @staticmethod
    def _draws(account: Account, model: str) -> bool:
        """Whether the account's plan, and a model, have the tool that draws."""
        waits = account.wait_for(f"{CODEX} {DRAWING}", time.time())
        return account.row.plan != "free" and "spark" not in model and not waits

    @staticmethod
    def _model(account: Account, question: Question) -> tuple[str, str]:
        """The slug for a client's name of a model, and the effort that the name may end in; ("", "") for a model that the
        account does not have."""
        catalog, model = account.catalog, question.model
        if upstream_model(model, False) == "auto":
            draws = question.forced == DRAWING
            if draws and catalog.find(USUAL_CODEX_MODEL):
                return USUAL_CODEX_MODEL, ""
            return next((str(one["slug"]) for one in catalog.models if is_shown(one)), USUAL_CODEX_MODEL), ""
        if not catalog.models or catalog.find(model):
            return model, ""
        base, _, effort = model.rpartition("-")
        return (base, effort) if effort in EFFORTS and catalog.find(base) else ("", "")

    def _fits(self, account: Account, question: Question) -> bool:
        """Whether an account can answer a question, as far as is known."""
        if self._absent.get(account.gateway, 0.0) > time.monotonic() or _GPT.fullmatch(question.model):
            return False
        model = self._model(account, question)[0]
        return model != "" and (question.forced != DRAWING or self._draws(account, model))

    def _rank(self, account: Account, home: str, now: float) -> tuple[Any, ...]:
        """How early an account is asked: the conversation's own first, but those whose allowance is used up last of all.
        CODEX_BALANCE says how the rest are ordered."""
        windows = account.allowance.windows if account.allowance else ()
        bought = account.allowance.credits if account.allowance else ""
        spent = any(not window.left(now) for window in windows) and not bought
        if self.settings.codex_balance == "drain":
            resets = [window.reset for window in windows if window.reset > now]
            order: tuple[Any, ...] = (min(resets, default=math.inf), account.row.added, account.id)
        else:
            # What would be lost soonest, in steps of two; those alike in turn.
            urgency = max((window.urgency(now) for window in windows), default=_UNKNOWN_URGENCY)
            order = (-round(math.log2(max(urgency, 0.01))), account.used)
        return spent, account.id != home, *order

    def lease(self, attempt: Attempt) -> Account:
        """The account that is asked next."""
        question = attempt.question
        if attempt.guest:
            self.pool.lease_guest(attempt.guest, f"{CODEX} {question.model}")
            return self.pool.lease_guest(attempt.guest, CODEX)
        if attempt.holder and (account := self.pool.find(attempt.holder)):
            return self.pool.lease_guest(account, CODEX)
        self._refuse_early(attempt.asked)
        fit = [account for account in self.pool.codex_accounts() if self._fits(account, question)]
        rank = functools.partial(self._rank, home=self._home(attempt), now=time.time())
        return self.pool.lease_codex(question.model, fit, attempt.tried, rank)

    @staticmethod
    def _nobody(model: str) -> ApiError:
        """The error for a model that nobody has, or "" for no account at all."""
        if model:
            text = "No account offers this model at the Codex backend; GET /v1/models lists those there are."
            return ApiError("model_not_found", text, "model")
        text = "No account can be asked at the Codex backend; sign in to one with `chatproxy.py login`."
        return ApiError("no_account", text, headers={"Retry-After": "30"})

    def ready(self, account: Account, attempt: Attempt) -> None:
        """Sees to it that it has a token, and that its models are known."""
        super().ready(account, attempt)
        if isinstance(attempt, CodexAttempt):
            self._know(account, attempt.watch)
            if not self._fits(account, attempt.question):
                raise Refusal("unlisted", self._nobody(attempt.question.model).message)

    def _know(self, account: Account, watch: Watch) -> None:
        """Has the models of an account read: at once where nothing is known of them, else beside what is done."""
        before, now = account.catalog, time.time()
        if now - before.read < CATALOG_LIFE:
            return
        # Others go on with what is known meanwhile.
        account.catalog = before._replace(read=now - CATALOG_LIFE + CATALOG_PAUSE)
        if before.models:
            self._reading.submit(self._read_catalog, account, before, Watch())
        else:
            self._read_catalog(account, before, watch)

    def _read_catalog(self, account: Account, before: Catalog, watch: Watch) -> None:
        try:
            account.catalog = self.calls.models(account, Until(watch, CATALOG_PATIENCE))
        except Refusal as refused:
            log(logging.DEBUG, "the list of models cannot be had", account=account.name, code=refused.code)
            if refused.reason == "expired" and not before.models:
                account.catalog = before
                raise

    def learn(self, account: Account, attempt: Attempt, refused: Refusal) -> None:
        """Draws the consequences of a refusal for its account."""
        self._failed(attempt, refused)
        name = f"{CODEX} {attempt.question.model}"
        if refused.reason == "limited":
            self._wait(account, refused.about or name, refused)
        elif refused.reason == "expired" and account.row.web == "yes":  # which may go on answering there
            self._wait(account, CODEX, refused)
        elif refused.reason == "expired" and account.row.state == "ready":
            reason = refused.detail or "the Codex backend refused its token (401)"
            self.pool.set_aside(account, "expired", reason, attempt.token)
        elif refused.reason == "excluded" and refused.about == DRAWING:
            if attempt.question.forced != DRAWING:  # but the client has chosen what it does not offer
                return
            self.pool.told_to_wait(account, f"{CODEX} {DRAWING}", 86400.0)
        elif refused.reason == "excluded":
            self.pool.learned(account, codex="no", reason="its plan does not include Codex")
            refused.headers["Retry-After"] = "30"
        elif refused.reason == "missing" and not account.row.guest:
            alike = [one for one in self.pool.codex_accounts() if one.gateway == account.gateway]
            if not any(one.row.codex == "yes" or one.catalog.models for one in alike):
                self._absent[account.gateway] = time.monotonic() + BELIEVED

    def leave_out(self, account: Account, attempt: CodexAttempt) -> bool:
        """A remedy: the request without a part that was refused, if it can do without."""
        part = attempt.refused.about if attempt.refused else ""
        if index := re.fullmatch(r"tools\[(\d{1,4})\]", part):  # then all of its type
            tools = attempt.body.get("tools") or []
            kind = _at(tools[int(index[1])], ("type",)) if int(index[1]) < len(tools) else None
            part = f"tools:{kind}" if kind not in (FUNCTION, CUSTOM, "namespace") else ""
        if len(attempt.left_out) >= MAX_LEFT_OUT_PARTS or without(attempt.body, part) == attempt.body:
            return False
        if part in _SHARED_PARTS and not account.row.guest:  # else it is about this request alone
            self.calls.refuse_part(account.gateway, part)
        attempt.left_out.append(part)
        attempt.remedies.discard("leave_out")  # another part may be refused next
        return True

    def drop_reasoning(self, account: Account, attempt: CodexAttempt) -> bool:
        """A remedy: the request without earlier reasoning, which was another account's."""
        attempt.without_reasoning = True
        return True

    # -- besides answers --

    def compacted(self, asked: Asked) -> dict[str, Any]:
        """The conversation of a request that ends in `compaction_trigger` made shorter, as {"output"}: by the call for it, or
        where that is gone by the request."""
        native = asked.question.native or {}
        attempt, body, names = self._attempt(asked)
        body["input"] = [item for item in body["input"] if item.get("type") != "compaction_trigger"]

        def ask(account: Account) -> dict[str, Any] | None:
            if self._without_compact.get(account.gateway, 0.0) > time.monotonic():
                return None
            whole = self._for_account(account, attempt, body)
            try:
                return self.calls.compacted(account, whole, attempt.session, attempt.watch)
            except Refusal as refused:
                if refused.reason != "missing":
                    raise
                if not account.row.guest:
                    self._without_compact[account.gateway] = time.monotonic() + BELIEVED
                return None

        said = self.attempts(attempt, ask)
        if said is not None:
            for item in dicts(said.get("output")):
                names.restore(item)
                self._keep_home(attempt, item)
            return said
        told = Collected()
        self.answer(asked, told)
        events = [event.event for event in told.events if isinstance(event, Verbatim) and event.event]
        made = [event["item"] for event in events if event["type"] == "response.output_item.done"]
        made = [item for item in made if _compaction_key(item)]
        if not made:
            raise ApiError("upstream_error", "The upstream did not make the conversation shorter; try again.")
        messages = [
            item for item in dicts(native["input"]) if item.get("role") in ("user", "developer", "system")
        ]
        kept = [in_full(changed(item, as_sent)) for item in messages]
        response: dict[str, Any] = next(
            (e["response"] for e in reversed(events) if e["type"] in RESPONSE_ENDS), {}
        )
        return {"output": [*kept, *made], "usage": response.get("usage")}

    def models(self, guest: Account | None, watch: Watch) -> dict[str, int]:
        """The models of the accounts, and when they were listed (Unix seconds)."""
        return {slug: int(read) for slug, (read, _) in self._listed(guest, watch).items()}

    def facts(self, guest: Account | None, watch: Watch) -> dict[str, Mapping[str, Any]]:
        """The same with what the backend tells of them."""
        return {slug: facts for slug, (_, facts) in self._listed(guest, watch).items()}

    def _listed(self, guest: Account | None, watch: Watch) -> dict[str, tuple[float, Mapping[str, Any]]]:
        able = self._there(guest)
        if able:
            jobs = [functools.partial(self._try_to_know, one) for one in able[:MAX_ASKED_FOR_MODELS]]
            side_by_side(jobs, watch)
        return {
            str(one["slug"]): (account.catalog.read, one)
            for account in able
            for one in filter(is_shown, account.catalog.models)
        }

    def is_sure(self) -> bool:
        return bool(self._there(None))

    def has(self, model: str, guest: Account | None, watch: Watch) -> bool:
        question = Question((), model)
        return any(self._fits(account, question) for account in self._there(guest))

    def takes(self, account: Account) -> bool:
        return account.speaks_codex() or account.row.codex == "no"

    def check(self, account: Account, watch: Watch) -> None:
        """Asks what the account's plan lets it use, and which models it has."""

        def ask(account: Account) -> None:
            try:
                said = self.calls.usage(account, watch)
            except Refusal as refused:
                if refused.reason != "missing":
                    raise
            else:
                self._note_usage(account, said)
            account.catalog = self.calls.models(account, watch)

        before = account.row.plan
        self.do("check", None, ask, watch, account.id)
        if account.row.codex == "no" and account.row.plan == before:
            raise Refusal("excluded", "This account's plan does not include Codex.")

    def _note_usage(self, account: Account, said: Mapping[str, Any]) -> None:
        """Takes note of what an account's plan lets it use: another plan, or that everything is used up."""
        plan = said.get("plan_type")
        if isinstance(plan, str) and plan and plan != account.row.plan and account.row.codex == "no":
            self.pool.learned(account, codex="", plan=plan[:32], reason="")
        resets = [
            one.reset for one in (account.allowance.windows if account.allowance else ()) if one.used >= 100
        ]
        if _at(said, ("rate_limit", "allowed")) is False and resets:
            self.pool.told_to_wait(account, CODEX, max(1.0, min(resets) - time.time()))

    def prove(self, account: Account, watch: Watch) -> bool:
        """Has the backend say whether it takes an account's token; False when it is not there to say."""
        try:
            account.catalog = self.calls.models(account, watch)
        except Refusal as refused:
            if refused.reason != "missing":
                raise
            return False
        return True

    def percentages(self) -> dict[str, float]:
        """How much of each window of each account is used, for metrics."""
        now = time.time()
        return {
            f'account="{account.id}",window="{window.name}"': 100.0 - window.left(now)
            for account in self.pool.accounts()
            for window in (account.allowance.windows if account.allowance else ())
        }


MAX_LEFT_OUT_PARTS = 8  # of one request
_UNKNOWN_URGENCY = 1e9  # percent an hour: whoever was never asked is asked first, and then it is known


def _compaction_key(item: Mapping[str, Any]) -> str:
    """What an item is remembered by that stands for the beginning of a conversation; "" for any other."""
    sealed = item.get("encrypted_content")
    if item.get("type") not in ("compaction", "context_compaction") or not isinstance(sealed, str):
        return ""
    return hashlib.sha256(sealed.encode("utf-8", "replace")).hexdigest()


# ============================================================================================================
# agents: browsers that connect and answer questions
# ============================================================================================================

PING_PATIENCE, AGENT_PATIENCE = 5.0, 120.0  # seconds that an agent has for the one and the other
HOLDER_PATIENCE = 2.0  # and that one has to show that it is there when another claims its id
MAX_HELD_BY_AGENTS = 100_000  # conversations
_AGENT_ID = re.compile(r"[\x21-\x7e]{1,128}")


class AgentLost(Exception):
    """An agent that hung up, or is `silent`: it did not answer in time."""

    def __init__(self, message: str, silent: bool = False) -> None:
        super().__init__(message)
        self.silent = silent


class Agent:
    """One place in the list of agents: whoever has its id has its conversations, over one connection at a time."""

    def __init__(self, id: str) -> None:
        self.id = id
        self.web: WebSocket | None = None
        self.heard = time.time()  # when it last answered (Unix seconds)
        self.asked = 0.0  # when it was last asked (Unix seconds)
        self.waiting: dict[str, Future[dict[str, Any]]] = {}  # by the id of what it was sent


class Agents(Attempts):
    """The upstream `agents`: the browsers that are connected. Many questions may be under way at one of them, and answers
    come in any order. "Agents (ChatGPT-API-server's protocol)"."""

    name = "agents"
    has_conversations = True
    files = None

    def __init__(self, metrics: Metrics) -> None:
        super().__init__(metrics)
        self._agents_lock = threading.Lock()
        self._agents: dict[str, Agent] = {}  # those that are connected
        self._holders: OrderedDict[str, Held] = OrderedDict()  # conversations → agents, connected or not

    def connected(self) -> list[Agent]:
        """The agents, the one asked longest ago first."""
        with self._agents_lock:
            return sorted(self._agents.values(), key=lambda agent: agent.asked)

    def serve(self, web: WebSocket) -> bool:
        """Lets an agent in: whether it is there now, and listened to."""
        offered = new_id()
        web.send(compact({"id": offered, "message": "Connection id", "data": ""}))
        said = self._heard(web.receive(time.monotonic() + AGENT_PATIENCE))
        if said is None:
            return False
        id = said.get("id")
        wanted = id if isinstance(id, str) and _AGENT_ID.fullmatch(id) else offered
        agent = self._take_place(offered if self._taken(wanted) else wanted, web)
        log(logging.INFO, "agent connected", agent=agent.id)
        web.listen(functools.partial(self._hear, agent))
        if not web.at_end(functools.partial(self._leave, agent, web)):
            self._leave(agent, web)
        return True

    def _hear(self, agent: Agent, text: str) -> None:
        """An agent says something, which may be an answer; in the loop."""
        said = self._heard(text) or {}
        with self._agents_lock:
            agent.heard = time.time()
            waiting = agent.waiting.pop(str(said.get("id")), None)
        if waiting and not waiting.done():
            waiting.set_result(said)

    @staticmethod
    def _heard(text: str | None) -> dict[str, Any] | None:
        """A message of the protocol, {} for what is none; None at the end."""
        return None if text is None else Answer(200, {}, text.encode()).object() or {}

    def _taken(self, id: str) -> bool:
        """Whether the agent of this id is there, and answers: then nobody else gets its place and its conversations."""
        with self._agents_lock:
            agent = self._agents.get(id)
        if agent is None:
            return False
        try:
            self._exchange(agent, "ping", "", HOLDER_PATIENCE, Watch())
        except AgentLost:
            return False
        return True

    def _take_place(self, id: str, web: WebSocket) -> Agent:
        """The place of this id, taken over from an earlier connection."""
        with self._agents_lock:
            agent = self._agents.setdefault(id, Agent(id))
            before = agent.web
            agent.web = web
            agent.heard = time.time()
            lost, agent.waiting = agent.waiting, {}
        self._lose(lost)
        if before is not None:
            before.close(1000, "the agent connected anew")
            before.drop("the agent connected anew")
        return agent

    def _leave(self, agent: Agent, web: WebSocket) -> None:
        log(logging.INFO, "agent gone", agent=agent.id)
        with self._agents_lock:
            if agent.web is not web:
                return  # another connection has the place
            self._agents.pop(agent.id, None)
            lost, agent.waiting = agent.waiting, {}
        self._lose(lost)

    @staticmethod
    def _lose(waiting: Mapping[str, Future[dict[str, Any]]]) -> None:
        for future in waiting.values():
            if not future.done():
                future.set_exception(AgentLost("the agent hung up"))

    def _exchange(
        self, agent: Agent, message: str, data: str, patience: float, watch: Watch
    ) -> dict[str, Any]:
        """Sends a message; the answer with its id. AgentLost when there is none in time."""
        id = new_id()
        future = Future[dict[str, Any]]()
        with self._agents_lock:
            web = agent.web
            if web is None or self._agents.get(agent.id) is not agent:
                raise AgentLost("the agent hung up")
            agent.waiting[id] = future
            web.needed = len(agent.waiting)
        try:
            web.send(compact({"id": id, "message": message, "data": data}))
            return watch.result(future, patience)
        except Closed:
            raise AgentLost("the agent hung up") from None
        except TimeoutError:
            raise AgentLost("the agent did not answer in time", silent=True) from None
        finally:
            with self._agents_lock:
                agent.waiting.pop(id, None)
                web.needed = len(agent.waiting)

    def answer(self, asked: Asked, sink: Sink) -> None:
        """Has a question answered, in one piece: by the agent that holds the conversation, without one by whoever answers
        a ping first, beginning with the one asked longest ago. ApiError no_agent when none is there, agent_lost when
        the one that holds the conversation is not, or fails; not_found when that is not the caller's to go on with."""
        ask_in_prose(asked.question, functools.partial(self._ask, asked), sink, asked.watch)

    def _ask(self, asked: Asked, question: Question, sink: Sink) -> None:
        conversation = question.conversation or ""
        end = time.monotonic() + AGENT_PATIENCE
        held = self._held(conversation)
        if held is None and not self.connected():
            raise self._nobody()
        if conversation and not asked.scope.covers(held.owner if held else ""):
            raise ApiError("not_found", "There is no such conversation.")
        attempt = Attempt(asked, question)
        attempt.holder = held.account if held else self._only() if conversation else None
        # Whatever an agent knows already, it is told all messages, in one text.
        content = in_one_text([(one.role, one.text) for one in question.messages])
        data = {"conversation_id": conversation, "parent_id": question.parent or new_id(), "content": content}

        def ask(leased: tuple[Agent, WebSocket | None]) -> list[Event]:
            message = compact({"message_id": new_id()} | data)
            left = max(0.0, end - time.monotonic())
            try:
                said = self._exchange(leased[0], "ChatGptRequest", message, left, asked.watch)
            except AgentLost as lost:
                if not conversation and not lost.silent:  # the next one can be asked
                    raise self._refused(None) from None
                raise Refusal("silent", f"The question is lost: {lost}.", "agent_lost") from None
            return self._said(leased[0], said, asked.scope)

        sink.take(self.attempts(attempt, ask))

    def lease(self, attempt: Attempt) -> tuple[Agent, WebSocket | None]:
        """The agent that is asked next, with its connection: one that comes back has another."""
        agents = [one for one in self.connected() if (one, one.web) not in attempt.tried]
        if attempt.question.conversation:
            agents = [one for one in agents if one.id == attempt.holder]
        if not agents:
            raise self._nobody(attempt.question.conversation)
        agents[0].asked = time.time()
        return agents[0], agents[0].web

    def ready(self, leased: tuple[Agent, WebSocket | None], attempt: Attempt) -> None:
        """Sees to it that it is there: it answers a ping, or loses its connection."""
        agent, web = leased
        try:
            self._exchange(agent, "ping", "", PING_PATIENCE, attempt.watch)
        except AgentLost:
            if web and agent.web is web:  # and has not come back meanwhile
                web.drop("it did not answer a ping")
            raise self._refused(attempt.question.conversation) from None

    @staticmethod
    def _nobody(conversation: str | None = None) -> ApiError:
        if conversation:
            return ApiError("agent_lost", "The agent that holds this conversation is not connected.")
        return ApiError("no_agent", "No agent is available.", headers={"Retry-After": "30"})

    def _refused(self, conversation: str | None) -> Refusal:
        """The refusal of an agent that is not there, with what the client is told if it was the last."""
        nobody = self._nobody(conversation)
        refused = Refusal("unreachable", nobody.message, nobody.code)
        refused.headers = nobody.headers
        return refused

    def models(self, guest: Account | None, watch: Watch) -> dict[str, int]:
        """None that could be chosen: an agent answers with what its page is set to."""
        return {}

    def is_sure(self) -> bool:
        return bool(self.connected())

    def has(self, model: str, guest: Account | None, watch: Watch) -> bool:
        """Whichever it is: an agent answers with what its page is set to."""
        return True

    def takes(self, account: Account) -> bool:
        return False

    def check(self, account: Account, watch: Watch) -> None:
        """Agents have no accounts that could fail."""

    def _held(self, conversation: str) -> Held | None:
        """The agent that is known to have a conversation, and whose it is."""
        with self._agents_lock:
            return self._holders.get(conversation)

    def _only(self) -> str | None:
        """The agent, if there is but one: it may have a conversation that nobody is known to have."""
        with self._agents_lock:
            return next(iter(self._agents)) if len(self._agents) == 1 else None

    def holds(self, conversation: str, scope: Scope) -> bool:
        """Whether an agent is known to have a conversation of the caller's."""
        held = self._held(conversation)
        return held is not None and scope.covers(held.owner)

    def _said(self, agent: Agent, said: Mapping[str, Any], scope: Scope) -> list[Event]:
        """An agent's answer; ApiError agent_lost for a failure that it reports, or what cannot be understood."""
        data = str(said.get("data") or "").encode("utf-8", "replace")
        value = Answer(200, {}, data).object() or {}
        content = value.get("content")
        response = identifier(value.get("response_id"))
        conversation = identifier(value.get("conversation_id"))
        if said.get("message") == "error" or said.get("error") or not isinstance(content, str):
            # Its own words may be anybody's, and this is logged.
            raise ApiError("agent_lost", "The agent reported a failure; see the console of its browser.")
        held = Held(agent.id, scope.owner)
        if _AGENT_ID.fullmatch(conversation):
            with self._agents_lock:
                held = self._holders.setdefault(conversation, held)
                self._holders.move_to_end(conversation)
                if len(self._holders) > MAX_HELD_BY_AGENTS:
                    self._holders.popitem(last=False)
        # Nobody is led into a conversation of another agent's, or of somebody else's.
        own = held.account == agent.id and scope.covers(held.owner)
        ids = conversation if own else "", response
        return [Begin("", *ids), Text(content), Finish("stop", *ids)]


# ============================================================================================================
# dialects: what the APIs that clients speak have in common; pure functions and small machines, no sockets
# ============================================================================================================


class ToolList(list[Any]):
    """The tools of a request that were sent before: what was made of them then, by who reads them, is still good."""

    def __init__(self, tools: list[Any], size: int) -> None:
        super().__init__(tools)
        self.size = size  # of their JSON
        self.read: dict[Any, Tools] = {}


class KnownTools:
    """The tools that were sent lately, by their JSON: a coding agent sends 50 KB of them with every turn, and to read those
    again each time would cost more than everything else that is done for it."""

    LEAST, MOST, MOST_IN_ALL = 4 << 10, 512 << 10, 4 << 20  # bytes of JSON that are remembered
    KEY = 512  # bytes by which a list is looked up; then all of it is compared
    _BEGIN = re.compile(rb'"tools":\s?\[')  # no such text is within a string, whose quotes are escaped

    def __init__(self) -> None:
        self._known_lock = threading.Lock()
        self._known: OrderedDict[bytes, tuple[bytes, ToolList]] = OrderedDict()
        self._size = 0

    def lift(self, data: bytes | bytearray, mark: str) -> tuple[bytes | bytearray, ToolList | None]:
        """A body with a mark instead of the first tools in it, and those, if they are known."""
        if len(data) < self.LEAST or not (match := self._BEGIN.search(data)):
            return data, None
        start = match.start()
        with self._known_lock:
            key = bytes(data[start : start + self.KEY])
            json_of, tools = self._known.get(key, (b"", None))
            if tools is not None:
                self._known.move_to_end(key)
        if tools is None or not data.startswith(json_of, start):
            return data, None
        return data[:start] + f'"tools":"{mark}"'.encode() + data[start + len(json_of) :], tools

    def learn(self, data: bytes | bytearray, tools: Any) -> Any:
        """Remembers the tools of a body, if they are long and the first in it; what is to be used in their place."""
        match = self._BEGIN.search(data) if len(data) >= self.LEAST and isinstance(tools, list) else None
        if not match:
            return tools
        text = data[match.start() : match.start() + self.MOST].decode("utf-8", "replace")
        try:
            found, end = _DECODER.raw_decode(text, match.end() - match.start() - 1)
        except (ValueError, RecursionError):
            return tools
        json_of = text[:end].encode()
        if len(json_of) < self.LEAST or found != tools or "\\ud" in text[:end].lower():
            return tools
        known = ToolList(tools, len(json_of))
        with self._known_lock:
            _, before = self._known.pop(json_of[: self.KEY], (b"", None))
            self._size += known.size - (before.size if before else 0)
            self._known[json_of[: self.KEY]] = json_of, known
            while self._size > self.MOST_IN_ALL:
                self._size -= self._known.popitem(last=False)[1][1].size
        return known


def parse_object(body: Blob, known: KnownTools | None = None) -> dict[str, Any]:
    """A request's body as a JSON object, without lone surrogates, which nobody could send on. Of `known` tools there is no
    more than a mark to be read."""
    mark = f"@{random.getrandbits(64):016x}:"
    blobs = list[Blob]()
    data: bytes | bytearray = b""
    if body.size <= MAX_IN_MEMORY:
        data = body.read()
    else:
        data = _lifted(body, mark, blobs)
        if body.share:
            body.share.held = bool(blobs)
            body.share.grow("memory", len(data))
    whole = data
    data, tools = known.lift(data, mark) if known else (data, None)
    value = _object_of(data)
    if tools is not None and value.get("tools") != mark:  # they stand somewhere else
        data, tools = whole, None
        value = _object_of(whole)
    if b"\\ud" in data or b"\\uD" in data:
        value = changed(value, _without_surrogates)
    for name, one in value.items() if blobs else ():
        keep = name in ("messages", "input")
        value[name] = changed(one, functools.partial(_with_blob, mark, blobs, keep))
    if tools is not None:
        value["tools"] = tools
    elif known and value.get("tools") and not blobs:
        value["tools"] = known.learn(whole, value["tools"])
    return value


def _object_of(data: bytes | bytearray) -> dict[str, Any]:
    if too_many_values(data):
        raise invalid(None, "The body is JSON of more values than any request has; send a smaller one.")
    try:
        value = read_json(data)
    except ValueError:
        raise invalid(None, "The body is not valid JSON; send one JSON object.") from None
    if not isinstance(value, dict):
        raise invalid(None, "The body is not a JSON object; send one.")
    return value


def _without_surrogates(text: str) -> str:
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


_INLINE = re.compile(
    rb'(?<!\\)"(?:url|image_url|file_data)"\s{0,20}:\s{0,20}"data:[^",\\]{0,200};base64,'
    rb'|(?<!\\)"file_data"\s{0,20}:\s{0,20}"(?=[0-9A-Za-z+/]{64})'
)
_NOT_BASE64 = re.compile(rb"[^0-9A-Za-z+/=]")
MAX_LIFTED = 200


def _lifted(body: Blob, mark: str, blobs: list[Blob]) -> bytearray:
    """A large body with the files in it decoded on their way into `blobs`, and in their places the mark and their
    numbers: as text they would stand in memory three times."""
    rest = bytearray()
    at = 0
    reach = 512
    tried = 0
    while at < body.size:
        window = body.read(at, PIECE)
        escaped = rest[-1:] == b"\\"  # then the window's first character is no quote
        hopeful = tried < MAX_LIFTED and (b"data:" in window or b"file_data" in window)
        match = _INLINE.search(window, int(escaped)) if hopeful else None
        if match is None:
            # A name may be cut by the window's end.
            step = len(window) if at + PIECE >= body.size else PIECE - reach
            rest += window[:step]
            at += step
            continue
        rest += window[: match.end()]
        at += match.end()
        tried += 1  # whether it is base64 or not: each try reads a window
        if found := _decoded_run(body, at):
            rest += f"{mark}{len(blobs)}".encode()
            blobs.append(found[0])
            at = found[1]
    return rest


def _decoded_run(body: Blob, start: int) -> tuple[Blob, int] | None:
    """The bytes of the base64 that begins there and where it ends; None if that is not at the end of its string."""
    blob = Blob(share=body.share)
    for at in range(start, body.size, PIECE):
        piece = body.read(at, PIECE)
        end = _NOT_BASE64.search(piece)
        try:
            blob.write(base64.b64decode(piece[: end.start()] if end else piece, validate=True))
        except ValueError:
            return None
        if end:
            return (blob, at + end.start()) if end[0] == b'"' else None
    return None


def _with_blob(mark: str, blobs: list[Blob], keep: bool, text: str) -> str:
    """A string with the mark of a blob as an InlineFile; where none is expected, as it was."""
    head, found, number = text.partition(mark)
    if not found:
        return text
    if not keep:
        return head + base64.b64encode(blobs[int(number)].read()).decode()
    file = InlineFile(head)
    file.blob = blobs[int(number)]
    return file


_NUMBER = ((int, float), "a number")
_INTEGER = (int, "an integer")
_FLAG = (bool, "true or false")
_TEXT = (str, "a string")
_LIST = (list, "a list")
_OBJECT = (dict, "an object")
Types = Mapping[str, tuple[type | tuple[type, ...], str]]


def check_types(body: Mapping[str, Any], types: Types, where: str = "") -> None:
    """400 for the first field that is neither null nor of its type."""
    for name, value in body.items():
        if value is not None and name in types:
            kinds, what = types[name]
            if not isinstance(value, kinds) or (isinstance(value, bool) and kinds is not bool):
                raise unfit(where + name, f"must be {what}.")


def model_of(body: Mapping[str, Any]) -> str:
    """The model that a request names; every event of an answer repeats it."""
    model = body.get("model")
    if not isinstance(model, str) or not model:
        raise unfit("model", "is missing; name one, such as gpt-4o or auto.")
    return fit_name(model)


def fit_name(model: str) -> str:
    """A model's name, of a length that can be repeated and remembered."""
    if len(model) > MAX_NAME:
        raise unfit("model", f"must have at most {MAX_NAME} characters.")
    return model


def required(body: Mapping[str, Any], name: str, where: str = "") -> str:
    """A field that must be a string with something in it."""
    value = body.get(name)
    if not isinstance(value, str) or not value:
        raise unfit(where + name, "must be a string that is not empty.")
    return value


@dataclass(frozen=True)
class Turn:
    """A request for an answer, whichever API it came through. `limit` is in tokens, None for none; `stops` never occur
    in the answer."""

    question: Question
    stream: bool = False
    limit: int | None = None
    stops: tuple[str, ...] = ()
    include_usage: bool = False
    legacy: bool = False  # called through `functions`, which came before `tools`
    left_out: tuple[str, ...] = ()  # types of tools and items that mean nothing here


def _stops(value: Any, where: str = "stop") -> tuple[str, ...]:
    if value is None:
        return ()
    stops = [value] if isinstance(value, str) else value
    fits = isinstance(stops, list) and len(stops) <= 16
    if not fits or not all(isinstance(stop, str) and len(stop) <= 256 for stop in stops):
        raise unfit(where, "must be a string or a list of up to 16 strings of up to 256 characters.")
    return tuple(stop for stop in stops if stop)


def _limit(body: Mapping[str, Any], *names: str) -> int | None:
    name = next((name for name in names if body.get(name) is not None), None)
    if name is not None and body[name] < 1:
        raise unfit(name, "must be 1 or more.")
    return body[name] if name else None


def _effort(value: Any, where: str) -> str:
    if value is None:
        return ""
    if not isinstance(value, str) or value not in EFFORTS:
        raise unfit(where, f"must be one of {', '.join(EFFORTS)}.")
    return value


# -- parts of messages and functions -----------------------------------------------------------------------------------

_LEADING_URLS = re.compile(r"\s*((?:https?://\S+(?:\s+|\Z))+)(.*)", re.DOTALL)
_FUNCTION_NAME = re.compile(r"[0-9A-Za-z_.:-]{1,128}")
ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}
ROLES |= {"tool": "tool", "function": "tool"}


def parse_messages(values: list[Any], upload_by_url: bool) -> tuple[Message, ...]:
    """The `messages` of a chat completion request."""
    calls: Calls = {}
    return tuple(_message(value, f"messages[{i}]", calls, upload_by_url) for i, value in enumerate(values))


def _message(value: Any, where: str, calls: Calls, upload_by_url: bool) -> Message:
    if not isinstance(value, dict):
        raise unfit(where, "must be an object with `role` and `content`.")
    role = value.get("role")
    if not isinstance(role, str) or role not in ROLES:
        raise unfit(f"{where}.role", f"must be one of {', '.join(ROLES)}.")
    content = _content(value.get("content"), f"{where}.content", role == "assistant")
    if role == "assistant":
        return Message("assistant", (*content, *_calls_made(value, where, calls)))
    if ROLES[role] == "tool":
        return result_message(str(value.get("tool_call_id") or ""), content, calls, value.get("name"))
    if role == "user" and upload_by_url and (match := _LEADING_URLS.fullmatch(str(value.get("content")))):
        urls = [Attachment(f"{where}.content", url=url) for url in match[1].split()]
        return Message("user", (*urls, Text(match[2])))
    return Message(ROLES[role], content)


def _content(content: Any, where: str, may_miss: bool = False) -> tuple[Text | Attachment, ...]:
    if content is None and may_miss:
        return ()
    if isinstance(content, str):
        return (Text(content),)
    if not isinstance(content, list):
        raise unfit(where, "must be a string or a list of content parts.")
    return tuple(_part(part, f"{where}[{i}]") for i, part in enumerate(content))


def _part(value: Any, where: str) -> Text | Attachment:
    """A content part of either API."""
    kind = value.get("type") if isinstance(value, dict) else None
    if kind in ("text", "input_text", "output_text", "refusal"):
        text = value.get("refusal" if kind == "refusal" else "text")
        if not isinstance(text, str):
            raise unfit(f"{where}.text", "must be a string.")
        return Text(text)
    if kind in ("image_url", "input_image", "computer_screenshot"):
        given = value.get("image_url")
        url = given.get("url") if isinstance(given, dict) else given
        if kind != "image_url" and isinstance(id := value.get("file_id"), str):
            return Attachment(where, image=True, file=id)
        if not isinstance(url, str):
            raise unfit(f"{where}.image_url", "must name a URL.")
        return _from_url(url, f"{where}.image_url", image=True)
    if kind in ("file", "input_file"):
        given = value.get("file") if kind == "file" else value
        if isinstance(given, dict):
            return _file_part(given, where)
    if kind == "input_audio":
        text = "the upstream takes no audio in chats; use POST /v1/audio/transcriptions first."
        raise invalid(where, f"`{where}`: {text}")
    text = "must be a part of type text, image_url or file (input_text, input_image, input_file)."
    raise unfit(where, text)


def _file_part(given: Mapping[str, Any], where: str) -> Attachment:
    check_types(given, dict.fromkeys(("file_id", "file_data", "filename", "file_url"), _TEXT), f"{where}.")
    if id := given.get("file_id"):
        return Attachment(where, file=id)
    name = given.get("filename") or ""
    if url := given.get("file_url"):
        return replace(_from_url(url, where), name=name)
    data = given.get("file_data")
    if isinstance(data, str) and data.startswith("data:"):
        return replace(_from_url(data, where), name=name)
    if data or isinstance(data, InlineFile):
        blob = data.blob if isinstance(data, InlineFile) else _unbased(data, 0, where)
        return Attachment(where, name=name, blob=blob)
    raise unfit(where, "must have a `file_id`, or `file_data` with a `filename`.")


_DATA_URL = re.compile(r"data:([^;,]*)(?:;[^,]*)?;base64,")


def _from_url(url: str, where: str, image: bool = False) -> Attachment:
    """A file by its URL: a data: URL is its bytes."""
    if url[:8].lower().startswith(("http://", "https://")):
        return Attachment(where, image, url=url)
    if not (match := _DATA_URL.match(url)):
        raise unfit(where, "must be an http://, https:// or base64 data: URL.")
    blob = url.blob if isinstance(url, InlineFile) else _unbased(url, match.end(), where)
    return Attachment(where, image, mime=match[1], blob=blob)


def _unbased(text: str, start: int, where: str) -> Blob:
    """The bytes of base64 from `start` on, decoded in pieces."""
    if re.compile(r"\s").search(text, start):
        text = "".join(text[start:].split())
        start = 0
    blob = Blob()
    try:
        for at in range(start, len(text), PIECE):
            blob.write(base64.b64decode(text[at : at + PIECE], validate=True))
    except ValueError:
        raise unfit(where, "is not valid base64.") from None
    return blob


Calls = dict[str, FunctionCall]  # those made so far, by their id


def _calls_made(message: Mapping[str, Any], where: str, calls: Calls) -> list[FunctionCall]:
    """The calls of an assistant's message; `calls` learns them."""
    made = message.get("tool_calls") or []
    made = list(made) if isinstance(made, list) else [None]
    if message.get("function_call"):
        made.append({"function": message["function_call"]})
    found = [_call_made(one, f"{where}.tool_calls") for one in made]
    calls.update({call.id: call for call in found if call.id})
    return found


def _call_made(made: Any, where: str) -> FunctionCall:
    made = made if isinstance(made, dict) else {}
    custom = made.get("custom")
    function = custom if isinstance(custom, dict) else made.get("function")
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise unfit(where, "must be a list of calls of functions.")
    id = str(made.get("id") or "")
    if function is custom:
        return FunctionCall(id, function["name"], input_arguments(function.get("input")), CUSTOM)
    return FunctionCall(id, function["name"], as_json(function.get("arguments")))


def as_json(arguments: Any) -> str:
    """Arguments as a client gives them, JSON already or not."""
    if isinstance(arguments, (dict, list)):
        return compact(changed(arguments, as_sent))
    return str(arguments or "")


def input_arguments(text: Any) -> str:
    """The arguments of a custom function's call by its input."""
    return compact({"input": as_json(text)})


def arguments_of(call: FunctionCall) -> Any:
    """The arguments of a call as a value; {} for what is no JSON, which some model wrote."""
    with contextlib.suppress(ValueError, RecursionError):
        return json.loads(call.arguments or "{}")
    return {}


def result_message(id: str, parts: tuple[Text | Attachment, ...], calls: Calls, name: Any = None) -> Message:
    """The message with a call's result; of what is known from the call."""
    call = calls.get(id)
    known = full_name(call.name, call.namespace) if call else ""
    return Message("tool", (ToolResult(id, str(name or known), parts, call.kind if call else FUNCTION),))


class Offered(NamedTuple):
    """What a request lets the model use: see the fields of a Question."""

    offer: Offer | None
    hosted: tuple[str, ...]
    forced: str


class Tools:
    """The tools of a request, of every kind: what can be called here, what the upstream has itself, and the types of those
    that nobody has, which are left out."""

    def __init__(self) -> None:
        self.functions = Functions()
        self.hosted: dict[str, None] = {}
        self.left_out: dict[str, None] = {}
        self.others: dict[str, str] = {}  # names of what is no function here, and what it is

    def add_all(
        self, tools: list[Any], where: str, add: Callable[[Tools, Any, str], None] | None = None
    ) -> None:
        """Adds each of a list, by `add` where its shape is not OpenAI's; 400 names the first that is wrong."""
        if len(tools) > MAX_FUNCTIONS:
            text = f"is one too many: a request may offer {MAX_FUNCTIONS} tools."
            raise unfit(f"{where}[{MAX_FUNCTIONS}]", text)
        add = add or Tools.add
        known = tools.read if isinstance(tools, ToolList) else {}
        if (found := known.get(add)) is None:
            found = known[add] = Tools()
            for i, tool in enumerate(tools):
                add(found, tool, f"{where}[{i}]")
        # The same functions as before know already what is told of them.
        self.functions = Functions(self.functions | found.functions) if self.functions else found.functions
        self.hosted |= found.hosted
        self.left_out |= found.left_out
        self.others |= found.others

    def add(self, tool: Any, where: str, namespace: str = "") -> None:
        """Adds a tool, {"type", …}; Chat Completions has the rest under the type's name."""
        kind = tool.get("type") if isinstance(tool, dict) else None
        if not isinstance(kind, str):
            raise unfit(where, "must be an object with a `type`.")
        inner = tool.get(kind)
        tool = inner if isinstance(inner, dict) else tool
        if kind.startswith(WEB_SEARCH):
            self.hosted[WEB_SEARCH] = None
        elif kind in (DRAWING, PYTHON):
            self.hosted[kind] = None
        elif kind in self.READS:
            self.READS[kind](self, tool, where, namespace)
        elif kind in FIXED_FORMS and _at(tool, ("environment", "type")) in (None, "local"):
            self._put(FIXED_FORMS[kind], where)
        else:  # or it is to run in a container, which nobody here has
            self.left_out[named_kind(kind)] = None
        if kind not in self.READS and isinstance(name := tool.get("name"), str):
            self.others[name] = WEB_SEARCH if kind.startswith(WEB_SEARCH) else named_kind(kind)

    def function(self, given: Any, where: str, namespace: str = "") -> None:
        """Adds a function, {"name", "description"?, "parameters"?}."""
        name = _tool_name(given, where)
        check_types(given, {"description": _TEXT, "parameters": _OBJECT}, f"{where}.")
        parameters = given.get("parameters") or {"type": "object"}
        if kind := unknown_type(given.get("parameters")):
            raise unfit(f"{where}.parameters", f"is not a JSON Schema: it names an unknown type, {kind}.")
        strict = given.get("strict") is True
        self._put(
            Function(name, given.get("description") or "", parameters, namespace=namespace, strict=strict),
            where,
        )

    def _custom(self, given: Any, where: str, namespace: str) -> None:
        name = _tool_name(given, where)
        check_types(given, {"description": _TEXT, "format": _OBJECT}, f"{where}.")
        form = given.get("format") or {}
        told = form.get("grammar", form)
        grammar = None
        if form.get("type", "text") != "text":
            syntax, definition = (_at(told, (one,)) for one in ("syntax", "definition"))
            if not isinstance(syntax, str) or not isinstance(definition, str):
                raise unfit(f"{where}.format", "must have a grammar with `syntax` and `definition`.")
            grammar = Grammar(syntax[:50], definition)
        description = given.get("description") or ""
        self._put(Function(name, description, INPUT_SCHEMA, CUSTOM, namespace, grammar), where)

    def _namespace(self, given: Any, where: str, outer: str) -> None:
        name = _tool_name(given, where)
        tools = given.get("tools")
        if outer or not isinstance(tools, list):
            raise unfit(f"{where}.tools", "must be a list of functions.")
        for i, one in enumerate(tools):
            self.add(one, f"{where}.tools[{i}]", name)

    def _put(self, function: Function, where: str) -> None:
        full = full_name(function.name, function.namespace)
        before = self.functions.get(full, function)
        if (before.name, before.namespace) != (function.name, function.namespace):
            raise unfit(f"{where}.name", f"is {full} with its namespace, as another function is.")
        if len(self.functions) >= MAX_FUNCTIONS:
            raise unfit(where, f"is one too many: a request may offer {MAX_FUNCTIONS} functions.")
        self.functions[full] = function

    READS: Mapping[str, Callable[[Any, Any, str, str], None]] = {
        FUNCTION: function,
        CUSTOM: _custom,
        "namespace": _namespace,
    }

    def offered(self, choice: Any, parallel: Any, field: str = "tool_choice") -> Offered:
        """What may be used of them, by `tool_choice` and `parallel_tool_calls`; 400 names the choice that is wrong."""
        functions, hosted, forced = self.functions, tuple(self.hosted), ""
        if isinstance(choice, dict) and choice.get("type") == "allowed_tools":
            allowed = choice.get("allowed_tools", choice)
            named = [self._named(one) for one in dicts(_at(allowed, ("tools",)))]
            names = dict.fromkeys(itertools.chain.from_iterable(found for found, _ in named))
            functions = Functions({name: functions[name] for name in names})
            others = {other for _, other in named}
            hosted = tuple(one for one in hosted if one in others)
            choice = _at(allowed, ("mode",))
        if isinstance(choice, dict):
            found, other = self._named(choice)
            forced = other if other in hosted else ""
            if not found and not forced and other not in self.left_out:
                raise unfit(field, "must name one of the functions offered.")
            choice = found[0] if found else "auto"
        elif choice not in (None, "auto", "none", "required"):
            raise unfit(field, "must be auto, none, required or a function.")
        elif choice == "required" and not functions:
            if not hosted and not self.left_out:
                raise unfit(field, "is required, but no tool is offered.")
            forced = next(iter(hosted), "")
        if choice == "none":
            return Offered(None, (), "")
        if not functions or forced:
            return Offered(None, hosted, forced)
        return Offered(Offer(functions, choice or "auto", parallel is not False), hosted, "")

    def _named(self, named: Mapping[str, Any]) -> tuple[list[str], str]:
        """What an object of a choice names: functions by their full names, or a tool of another kind by that."""
        kind = str(named.get("type", FUNCTION))
        inner = named.get(kind)
        named = inner if isinstance(inner, dict) else named
        name = str(named.get("name") or "")
        if kind == "namespace":
            return self.functions.within.get(name, []), ""
        if kind in FIXED_FORMS:
            return [kind] if kind in self.functions else [], kind
        if kind in (FUNCTION, CUSTOM):
            full = self.functions.full(name, str(named.get("namespace") or ""))
            return [full] if full else [], self.others.get(name, "")
        return [], WEB_SEARCH if kind.startswith(WEB_SEARCH) else kind


MAX_FUNCTIONS = 2000  # of a request
INPUT_SCHEMA = {
    "type": "object",
    "properties": {"input": {"type": "string"}},
    "required": ["input"],
    "additionalProperties": False,
}


def named_kind(kind: str) -> str:
    """A client's name of a kind of tool or item, as logs can have it."""
    return re.sub(r"[^\w. -]", "?", kind[:50], flags=re.ASCII)


def _tool_name(tool: Any, where: str) -> str:
    name = tool.get("name") if isinstance(tool, dict) else None
    if not isinstance(name, str) or not _FUNCTION_NAME.fullmatch(name):
        raise unfit(f"{where}.name", "must be 1 to 128 letters, digits and . _ : -.")
    return name


def parse_shape(value: Any, where: str) -> Shape | None:
    """`response_format`, or `text.format` of the Responses API; None for text."""
    if value is None or value.get("type", "text") == "text":
        return None
    if value["type"] == "json_object":
        return Shape(None)
    if value["type"] != "json_schema":
        raise unfit(f"{where}.type", "must be text, json_object or json_schema.")
    given = value.get("json_schema", value)
    schema = given.get("schema") if isinstance(given, dict) else None
    if not isinstance(schema, dict):
        raise unfit(where, "must have a JSON Schema in `schema`.")
    if kind := unknown_type(schema):
        raise unfit(where, f"is not a JSON Schema: it names an unknown type, {kind}.")
    name = str(given.get("name") or "")
    return Shape(schema, name if _PLAIN_NAME.fullmatch(name) else "answer", given.get("strict") is True)


def options_of(body: Mapping[str, Any], *names: str) -> dict[str, Any]:
    """The fields of a request that are for an upstream that speaks OpenAI's own API."""
    names = ("service_tier", "prompt_cache_key", *names)
    return {name: body[name] for name in names if isinstance(body.get(name), str)}


# -- tokens ------------------------------------------------------------------------------------------------------------

# How text is counted without a tokenizer. o200k_base first cuts text into pieces (words with their leading space or
# sign, digits by three, runs of signs, white space); most are one token, so every match here stands for one. The upper
# bounds split longer pieces, which are rarer in the vocabulary; they were fitted on prose, code and JSON.
_PIECE = re.compile(
    r"""\d{1,3}
    | [ ][A-Z]?[a-z\xdf-\u024f\u1e00-\u1eff]{1,9} | [A-Z]?[a-z\xdf-\u024f\u1e00-\u1eff]{1,7}
    | [ ]?[A-Z]{1,5}
    | [!-/:-@\[-`{-~][A-Z]?[a-z\xdf-\u024f\u1e00-\u1eff]{1,6}  # .name, (word, _part
    | ([-=*\#_/.~+])\1{3,}[\r\n]*  # rulers: ----, ====
    | [ ]?[!-/:-@\[-`{-~\x00-\x08\x0e-\x1b\x7f]{1,3}[\r\n]*
    | \s*[\r\n]+ | \s+(?=\s) | \s(?![^\x00-\x7f])""",
    re.VERBOSE,
)
_NOT_ASCII = re.compile(r"[^\x00-\x7f]+")
# Tokens per character beyond ASCII, by the code point its range starts at: Latin-1 (the words are matched above),
# other Latin, Greek, Cyrillic, Hebrew and Arabic, Indic and others, Vietnamese, symbols, CJK signs, kana, others, Han,
# others, Hangul, others, variation selectors, full-width signs, emoji and rare Han.
_SCRIPTS = (
    0x80, 0x100, 0x370, 0x400, 0x590, 0x700, 0x1E00, 0x2000, 0x3000, 0x3040, 0x3100, 0x3400, 0xA000, 0xAC00, 0xD7A4,
    0xFE00, 0xFF00, 0x10000,
)  # fmt: skip
_COSTS = (0.1, 1.5, 0.4, 0.26, 0.36, 0.4, 0.0, 1.0, 0.25, 0.65, 0.5, 1.6, 0.5, 0.73, 0.5, 1.6, 1.0, 1.85)
# The 500 Han characters in most of the vocabulary's longer pieces: those usually share a token.
_COMMON_HAN = frozenset(
    "一丁七万三上下不与专世业东个中丰为主久么之乐也买了争事二于五亚些交产京人亿什今他代以们件价任伊众优会"
    "传位体何作你例保信俺值假做偷像元先克免党入全公六共关其内册准凤凰出分划创利到制前力办加务动助势包化北"
    "区十午华卓单南博卡历去县参友双发取口另只可台号司合同名后吗否告员周命和品哪商啪器四回因国图在地场址型"
    "城基堂增士处备复外多夜大天太央奇奖女好如妇妻始姐委娱子字存学安完官定宝实客家容对导小少就尼局展属山州"
    "工市布常幕平年幸广庆应度建开式强当录彩影律得微心必快态怎思性总息情意戏成我战户所手打技投报拍招持指据"
    "排接推提播收改放政教数整文料斯新方旗无日时明易星是時更最月有服期本机权来极果查标样格案棋模次欧款止正"
    "此比毛民水求江没河治法注洲活流测海消清港游源点热無然爱片版牌物特玩环现球理生用申电男登百的皇目直相看"
    "真知码破确碰示社神票福科秘称程空站竞第等算管米类精系红级线组经结统综编网置美群老考者联肖育胆能腾自至"
    "色苹草荐菲营蕉虎行表装西要观规视解计认讯记论设证评试话说请读财责账购费资赌赛赢超足路车软载输过运近返"
    "这进送选透通速道邀那部都里重量金钱银链锋长間门间阳际限院除集霸青靠面韩音页预领频题首香马验骗高黄黑龙"
)


def estimate_tokens(text: str) -> int:
    """About how many o200k_base tokens a text is, in one pass (two if it is not all ASCII); in slices, between which
    others get their turn."""
    if len(text) > PIECE:
        return sum(estimate_tokens(text[at : at + PIECE]) for at in range(0, len(text), PIECE))
    tokens = float(len(_PIECE.findall(text)))
    if not text.isascii():
        for char, count in Counter("".join(_NOT_ASCII.findall(text))).items():
            if char in _COMMON_HAN:
                tokens += 0.45 * count
            elif char in "äöüß":  # the sign of German, whose long words split more often
                tokens += 2.5 * count
            else:
                tokens += _COSTS[bisect.bisect(_SCRIPTS, ord(char)) - 1] * count
    return max(1, round(tokens)) if text else 0


class Tokens:
    """Counts tokens: exactly with `tiktoken` where that is installed and has loaded its vocabulary, else by estimate."""

    LONG, MOST_COUNTED = 1000, 5000  # characters of texts whose counts are remembered, and how many

    def __init__(self) -> None:
        self._encode: Callable[..., list[int]] | None = None
        self._looked = False  # whether tiktoken was looked for
        self._counted: dict[tuple[int, int], int] = {}  # the tokens of long texts, by their size and hash

    def start(self) -> None:
        """Looks for tiktoken, once: when somebody's tokens are to be counted, since it takes 10 MB."""
        if not self._looked:
            self._looked = True
            if importlib.util.find_spec("tiktoken"):
                with contextlib.suppress(RuntimeError):  # there is no thread to be had
                    threading.Thread(target=self._load, name="tiktoken", daemon=True).start()

    def _load(self) -> None:
        """tiktoken may have to download its vocabulary: in the background, so that nobody waits for it."""
        try:
            self._encode = importlib.import_module("tiktoken").get_encoding("o200k_base").encode
            self._counted = {}
        except (ImportError, OSError, ValueError, AttributeError) as error:
            log(logging.INFO, "tiktoken has no vocabulary; tokens are estimated", reason=type(error).__name__)

    def count(self, text: str) -> int:
        """The tokens of a text in o200k_base. Long ones are sent again and again: a conversation with every turn."""
        if len(text) < self.LONG:
            return self._count(text)
        counted, key = self._counted, (len(text), hash(text))
        if (tokens := counted.get(key)) is None:
            if len(counted) >= self.MOST_COUNTED:
                counted.clear()
            tokens = counted[key] = self._count(text)
        return tokens

    def _count(self, text: str) -> int:
        self.start()
        return len(self._encode(text, disallowed_special=())) if self._encode else estimate_tokens(text)


class Trimmer:
    """Enforces `stop` and the token limit on a sequence of events: what comes out is what the client may see.

    As where the text is made, the stop sequence that is complete first ends it, whichever began first.
    A piece of text that may be the beginning of a stop sequence is held back until it is known not to be one.
    """

    def __init__(self, stops: Iterable[str], limit: int | None, count: Callable[[str], int]) -> None:
        self._stops = tuple(stops)
        self._left = limit  # tokens, those of what is `_uncounted` not taken off
        self._count = count
        self._uncounted: list[str] = []  # what surely fits, and is counted once that is not sure any more
        self._characters = 0  # of it
        self._starts = {stop[:size] for stop in self._stops for size in range(1, len(stop))}
        self._longest = max(map(len, self._starts), default=0)
        self._held = ""
        self.over = False
        self.stopped_at = ""  # the stop sequence that has ended it

    def light(self, events: list[Light]) -> bool:
        """Whether the answer surely does not end with these, and nothing has to be counted: a stop sequence that ends in
        them has at least its last character there."""
        if self._left is not None and not self._fits(sum(len(event[0]) for event in events)):
            return False
        return not any(stop[-1] in event[0] for stop in self._stops for event in events)

    def feed(self, events: list[Event]) -> list[Event]:
        """The events with their text trimmed; after the end of the answer `over` is set and nothing follows."""
        out: list[Event] = []
        for event in events:
            if self.over:
                break
            if type(event) is Text:
                self._text(event.text, out)
            elif type(event) is Finish:
                self._let_go(out)
                if not self.over:
                    out.append(event)
                self.over = True
            else:
                if type(event) in (FunctionCall, CallPart):  # it stands before the call
                    self._let_go(out)
                out += [] if self.over else [event]
        return out

    def _let_go(self, out: list[Event]) -> None:
        """Gives out what was held back: nothing follows that could make a stop sequence of it."""
        held, self._held = self._held, ""
        self._limited(held, out)

    def flush(self) -> list[Event]:
        """What was held back of a text that has ended."""
        out: list[Event] = []
        self._let_go(out)
        return out

    def surely_fits(self, characters: int) -> bool:
        """Whether so many more are passed on whatever they are."""
        return not self._stops and self._fits(characters)

    def _text(self, text: str, out: list[Event]) -> None:
        if not self._stops:
            self._limited(text, out)
            return
        text = self._held + text
        found = [(at + len(stop), at) for stop in self._stops if (at := text.find(stop)) >= 0]
        if found:
            self._held = ""
            end, start = min(found)
            self._limited(text[:start], out)
            if not self.over:
                self.stopped_at = text[start:end]
                out.append(Finish("stop"))
            self.over = True
            return
        sizes = range(min(self._longest, len(text)), 0, -1)
        held = next((size for size in sizes if text[-size:] in self._starts), 0)
        self._held = text[len(text) - held :]
        self._limited(text[: len(text) - held], out)

    def _fits(self, characters: int) -> bool:
        """Whether so many more surely fit: a token has at least one of a text's bytes."""
        return self._left is None or 4 * (self._characters + characters) <= self._left

    def _limited(self, text: str, out: list[Event]) -> None:
        if not text:
            return
        if self._left is not None and self._fits(len(text)):
            self._uncounted.append(text)
            self._characters += len(text)
        elif self._left is not None:
            self._left -= self._count("".join(self._uncounted))
            self._uncounted.clear()
            self._characters = 0
            size = self._count(text)
            if size > self._left:
                text = self._cut(text, self._left)
                if text:
                    out.append(Text(text))
                out.append(Finish("length"))
                self.over = True
                return
            self._left -= size
        out.append(Text(text))

    def _cut(self, text: str, tokens: int) -> str:
        """The longest beginning of the text that is at most so many tokens."""
        low = 0
        high = len(text)
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if self._count(text[:middle]) <= tokens else (low, middle - 1)
        return text[:low]


MAX_PIECE = 256  # characters of a call's arguments in one event


def in_pieces(arguments: str) -> list[str]:
    """A call's arguments in the pieces in which they are streamed."""
    return [arguments[at : at + MAX_PIECE] for at in range(0, len(arguments), MAX_PIECE)]


# -- answers -----------------------------------------------------------------------------------------------------------


def _fenced(event: ToolUse) -> Text:
    """Code or its output in a fence that it cannot end."""
    runs = re.findall("`{3,}", event.text)
    fence = "`" * max(3, *(len(run) + 1 for run in runs), 3)
    end = "" if event.text.endswith("\n") else "\n"
    return Text(f"\n{fence}{event.language}\n{event.text}{end}{fence}\n\n")


# What has no shape of its own here is told as Markdown.
AS_TEXT: Mapping[type, Callable[[Any], Text]] = {
    ToolUse: _fenced,
    Image: lambda event: Text(f"\n![image]({event.url})\n\n"),
}


def _as_text(event: Event) -> Event:
    tell = AS_TEXT.get(type(event))
    return tell(event) if tell else event


def prompt_tokens(question: Question, count: Callable[[str], int]) -> int:
    """The tokens of a question: four more a message (its frame and role) and three for the answer, as the chat format has
    them."""
    return sum(count(message.text) + 4 for message in in_prose(question).messages) + 3


# The kinds of events that need not be told: those that come again as others, or are for another API's clients.
_NOT_TOLD: Mapping[type, Callable[[Any, Any], None]] = dict.fromkeys(
    (Encrypted, CallPart, Usage, Verbatim), lambda self, event: None
)


class Rendering:
    """One answer on its way into a client's shape: takes events, knows what of them the client is given.

    `cut` is set when the client is given no more although the upstream goes on: the answer can be left.
    """

    def __init__(self, turn: Turn, tokens: Tokens, keeps_text: bool = True) -> None:
        self.turn, self._tokens, self._keeps_text = turn, tokens, keeps_text
        self.created = int(time.time())
        self.model = turn.question.model
        self.trims = bool(turn.stops) or turn.limit is not None
        if self.trims or keeps_text:
            tokens.start()
        self._trimmer = Trimmer(turn.stops, turn.limit, tokens.count) if self.trims else None
        self._text: list[str] = []
        self._reasoning: list[str] = []
        self._calls: list[FunctionCall] = []
        self.conversation = self.message = ""
        self.usage_told: Usage | None = None  # by the upstream
        self._reason = "stop"
        self.cut = False
        self.begun = False  # whether the client was told that the answer begins
        self.pieces: list[str] = []  # what it is to be told next

    def begin(self) -> None:
        """Tells the client that the answer begins."""

    def take_text(self, text: str) -> None:
        """Tells the client text; once per token."""

    # How each other kind of event is told, but for what is told as text.
    TAKES: Mapping[type, Callable[[Any, Any], None]] = {}

    def feed(self, events: list[Event]) -> tuple[bytes, int]:
        """The bytes for a batch of events, all in one piece, and how many events of the client's they are."""
        for event in self.take(events):
            if not self.begun:
                self.begun = True
                self.begin()
            kind = type(event)
            if kind is Text:  # once per token
                self.take_text(event[0])
            else:
                self.TAKES[kind](self, event)
        return self.told()

    def told(self) -> tuple[bytes, int]:
        """What the client is to be told now, and how many events that is."""
        data, events = "".join(self.pieces).encode("utf-8", "replace"), len(self.pieces)
        self.pieces.clear()
        return data, events

    @functools.cached_property
    def prompt(self) -> int:
        """The tokens of the question."""
        return prompt_tokens(self.turn.question, self._tokens.count)

    @property
    def text(self) -> str:
        """The text that the client has been given, if it is kept."""
        return "".join(self._text)

    @property
    def stopped_at(self) -> str:
        """The stop sequence that has ended the answer, "" for none."""
        return self._trimmer.stopped_at if self._trimmer else ""

    def light(self, events: list[Light]) -> bool:
        """Whether these surely do not end the answer."""
        return self._trimmer is None or self._trimmer.light(events)

    def take(self, events: list[Event]) -> list[Any]:
        """Notes a batch of events; those that the client may see."""
        if not AS_TEXT.keys().isdisjoint(map(type, events)):
            events = [event if self.has_place(event) else _as_text(event) for event in events]
        if self._trimmer:
            ended = bool(events) and type(events[-1]) is Finish
            events = self._trimmer.feed(events)
            self.cut = self._trimmer.over and not ended
        for event in events:
            self.NOTES[type(event)](self, event)
        return events

    def has_place(self, event: Event) -> bool:
        """Whether an event that could be told as text is told otherwise."""
        return False

    def _note_begin(self, event: Begin) -> None:
        self.model = event.model or self.model
        self.conversation, self.message = event.conversation, event.message

    def _note_text(self, event: Text) -> None:
        if self._keeps_text:
            self._text.append(event.text)

    def _note_reasoning(self, event: Reasoning) -> None:
        if self._keeps_text:
            self._reasoning.append(event.text)

    def _note_call(self, event: FunctionCall) -> None:
        self._calls.append(event)

    def _note_usage(self, event: Usage) -> None:
        self.usage_told = event

    def _note_finish(self, event: Finish) -> None:
        self._reason = event.reason
        if event.conversation:
            self.conversation, self.message = event.conversation, event.message

    # What is noted of each kind of event.
    NOTES: Mapping[type, Callable[[Any, Any], None]] = {
        Begin: _note_begin,
        Text: _note_text,
        Reasoning: _note_reasoning,
        **_NOT_TOLD,
        ToolUse: lambda self, event: None,
        Image: lambda self, event: None,
        FunctionCall: _note_call,
        Usage: _note_usage,
        Finish: _note_finish,
    }

    @property
    def cached(self) -> int:
        """The tokens of the prompt that the upstream had already."""
        return self.usage_told.cached if self.usage_told else 0

    def counted(self) -> tuple[int, int, int]:
        """Tokens of the prompt, the answer (reasoning included) and the reasoning: as the upstream counts them, where it
        says so."""
        if told := self.usage_told:
            return told.prompt, told.answer, told.reasoning
        count = self._tokens.count
        answer = count(self.text)
        reasoning = count("".join(self._reasoning))
        if self.turn.limit is not None:
            answer = min(answer, self.turn.limit)
        calls = sum(count(call.name) + count(call.arguments) for call in self._calls)
        return self.prompt, answer + calls + reasoning, reasoning


# ============================================================================================================
# chat: OpenAI's Chat Completions
# ============================================================================================================

# The types of the fields of a chat completion request. Other fields are passed over.
CHAT_FIELDS: Types = {
    "messages": _LIST, "model": _TEXT, "stream": _FLAG, "stream_options": _OBJECT, "n": _INTEGER, "logprobs": _FLAG,
    "temperature": _NUMBER, "top_p": _NUMBER, "presence_penalty": _NUMBER, "frequency_penalty": _NUMBER,
    "seed": _INTEGER, "user": _TEXT, "logit_bias": _OBJECT, "tools": _LIST, "functions": _LIST, "response_format": _OBJECT,
    "max_tokens": _INTEGER, "max_completion_tokens": _INTEGER, "conversation_id": _TEXT, "parent_message_id": _TEXT,
    "parallel_tool_calls": _FLAG, "reasoning_effort": _TEXT, "web_search_options": _OBJECT, "modalities": _LIST,
    "verbosity": _TEXT, "service_tier": _TEXT, "prompt_cache_key": _TEXT,
}  # fmt: skip


def parse_chat(body: Mapping[str, Any], history_disabled: bool, upload_by_url: bool = False) -> Turn:
    """A chat completion request; 400 names what is wrong. What the web upstream cannot honour is accepted and ignored."""
    check_types(body, CHAT_FIELDS)
    if not (messages := body.get("messages")):
        raise unfit("messages", "must be a list of at least one message.")
    model = model_of(body)
    if body.get("n") not in (None, 1):
        raise unfit("n", "must be 1: the upstream gives one answer a request.")
    if "audio" in (body.get("modalities") or ()):
        raise unfit("modalities", "must be text alone; use POST /v1/audio/speech to have text read.")
    if body.get("logprobs"):
        raise unfit("logprobs", "must be false: the upstream gives none.")
    options = body.get("stream_options") or {}
    check_types(options, {"include_usage": _FLAG}, "stream_options.")
    conversation = body.get("conversation_id") or None
    if conversation and history_disabled:
        text = "`conversation_id` needs HISTORY_DISABLED=false on the server: chats are temporary."
        raise invalid("conversation_id", text)
    tools = Tools()
    legacy = not body.get("tools") and bool(body.get("functions"))
    offered = _chat_tools(body, tools, legacy)
    question = Question(
        parse_messages(messages, upload_by_url),
        model,
        conversation,
        body.get("parent_message_id") if conversation else None,
        _effort(body.get("reasoning_effort"), "reasoning_effort"),
        offered.hosted,
        offered.forced,
        offered.offer,
        parse_shape(body.get("response_format"), "response_format"),
        options=options_of(body, "verbosity"),
    )
    return Turn(
        question,
        bool(body.get("stream")),
        _limit(body, "max_completion_tokens", "max_tokens"),
        _stops(body.get("stop")),
        bool(options.get("include_usage")),
        legacy,
        tuple(tools.left_out),
    )


def _chat_tools(body: Mapping[str, Any], tools: Tools, legacy: bool) -> Offered:
    """What a chat completion request lets the model use; `legacy`: by the fields that came before `tools`."""
    if legacy:
        for i, one in enumerate(body["functions"]):
            tools.function(one, f"functions[{i}]")
        return tools.offered(body.get("function_call"), False, "function_call")
    tools.add_all(body.get("tools") or [], "tools")
    if body.get("web_search_options") is not None:
        tools.hosted[WEB_SEARCH] = None
    return tools.offered(body.get("tool_choice"), body.get("parallel_tool_calls"))


class Completion(Rendering):
    """An answer as a `chat.completion`."""

    def __init__(self, turn: Turn, tokens: Tokens, extras: bool, counts: bool = False) -> None:
        """`extras`: whether `conversation_id` and `message_id` are told, of conversations that are kept; `counts`:
        whether its tokens are counted for the caller's account here."""
        # Else nobody asks for the text.
        super().__init__(turn, tokens, keeps_text=counts or not turn.stream or turn.include_usage)
        self._extras = extras
        self._notes = self.trims or self._keeps_text  # whether text is to be looked at
        self.id = f"chatcmpl-{random.getrandbits(112):028x}"

    def usage(self) -> dict[str, Any]:
        """`usage`."""
        prompt, completion, reasoning = self.counted()
        return {
            "prompt_tokens": prompt,
            "completion_tokens": completion,
            "total_tokens": prompt + completion,
            "prompt_tokens_details": {"cached_tokens": self.cached},
            "completion_tokens_details": {"reasoning_tokens": reasoning},
        }

    def _frame(self, kind: str) -> dict[str, Any]:
        frame = {"id": self.id, "object": kind, "created": self.created, "model": self.model}
        if self._extras and self.conversation:
            frame |= {"conversation_id": self.conversation, "message_id": self.message}
        return frame

    def finish_reason(self) -> str:
        """`finish_reason`."""
        return "function_call" if self._reason == "tool_calls" and self.turn.legacy else self._reason

    def whole(self) -> dict[str, Any]:
        """A `chat.completion`."""
        content = self.text or (None if self._calls else "")
        message: dict[str, Any] = {"role": "assistant", "content": content, "refusal": None}
        if self._reasoning:
            message["reasoning_content"] = "".join(self._reasoning)
        calls = [
            {"id": call.id, "type": kind, kind: told}
            for call in self._calls
            for kind, told in [chat_call(call)]
        ]
        if calls and self.turn.legacy:
            message["function_call"] = calls[0]["function"]
        elif calls:
            message["tool_calls"] = calls
        choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": self.finish_reason()}
        return self._frame("chat.completion") | {"choices": [choice], "usage": self.usage()}


def chat_call(call: FunctionCall) -> tuple[str, dict[str, str]]:
    """The type of a call that there is for one here, and its name and what it is called with."""
    name = full_name(call.name, call.namespace)
    if call.kind == CUSTOM:
        return CUSTOM, {"name": name, "input": input_of(call)}
    return FUNCTION, {"name": name, "arguments": call.arguments}


class CompletionStream(Completion):
    """The same as `chat.completion.chunk` events."""

    _ahead = _behind = ""
    _called = 0
    _piece_told: int | None = None  # characters of the arguments of the call that is being made

    @property
    def _at_once(self) -> bool:
        """Whether the client can be told that the answer begins before it is known whether it is text."""
        return self.turn.question.offer is None or self.turn.question.shape is not None

    def feed(self, events: list[Event]) -> tuple[bytes, int]:
        """The bytes for a batch of events, all in one piece, and how many events of the client's they are."""
        quote = json.encoder.encode_basestring
        if self.begun and not self._notes and len(events) == 1 and type(events[0]) is Text:  # once per token
            return f"{self._ahead}{quote(events[0][0])}{self._behind}".encode("utf-8", "replace"), 1
        append = self.pieces.append
        for event in self.take(events):
            kind = type(event)
            if not self.begun and (kind is not Begin or self._at_once):
                self._begin(None if kind in (FunctionCall, CallPart) else "")
            if kind is Text:  # once per token
                append(f"{self._ahead}{quote(event[0])}{self._behind}")
            else:
                self.TAKES[kind](self, event)
        return self.told()

    def _begin(self, content: str | None) -> None:
        self.begun = True
        self.pieces.append(self._chunk({"role": "assistant", "content": content}, None))
        here = f"<{self.id}>"  # in the place of the text, and nowhere else in a chunk
        self._ahead, self._behind = self._chunk({"content": here}, None).split(f'"{here}"')

    def _take_reasoning(self, event: Reasoning) -> None:
        self.pieces.append(self._chunk({"reasoning_content": event.text}, None))

    def _take_part(self, part: CallPart) -> None:
        """A piece of a call that is being made: of the first one its id and name are told."""
        if self._piece_told is None:
            self._piece_told = 0
            name = {"name": full_name(part.name, part.namespace)}
            self._tell_call(FUNCTION, name | {"arguments": ""}, part.id)
        if part.arguments:
            self._piece_told += len(part.arguments)
            self._tell_call(FUNCTION, {"arguments": part.arguments})

    def _take_call(self, call: FunctionCall) -> None:
        """A call: first its name, then its arguments in pieces; of one that was told in pieces the rest."""
        kind, told = chat_call(call)
        ((field, whole),) = ((name, value) for name, value in told.items() if name != "name")
        if self._piece_told is None:
            self._tell_call(kind, told | {field: ""}, call.id)
        for piece in in_pieces(whole[self._piece_told or 0 :]):
            self._tell_call(kind, {field: piece})
        self._piece_told = None
        self._called += 1

    def _tell_call(self, kind: str, part: dict[str, str], id: str = "") -> None:
        delta: dict[str, Any] = {"function_call": part}
        if not self.turn.legacy:
            head = {"id": id, "type": kind} if id else {}
            delta = {"tool_calls": [{"index": self._called} | head | {kind: part}]}
        self.pieces.append(self._chunk(delta, None))

    def _take_finish(self, event: Finish) -> None:
        self.pieces.append(self._chunk({}, self.finish_reason()))
        if self.turn.include_usage:
            self.pieces.append(self._event(choices=[], usage=self.usage()))
        self.pieces.append("data: [DONE]\n\n")

    TAKES = {
        **_NOT_TOLD,
        Begin: lambda self, event: None,  # which `feed` sees to
        Reasoning: _take_reasoning,
        CallPart: _take_part,
        FunctionCall: _take_call,
        Finish: _take_finish,
    }

    def _chunk(self, delta: dict[str, Any], reason: str | None) -> str:
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": reason}
        usage = {"usage": None} if self.turn.include_usage else {}
        return self._event(choices=[choice], **usage)

    def _event(self, **facts: Any) -> str:
        return f"data: {compact(self._frame('chat.completion.chunk') | facts)}\n\n"


# ============================================================================================================
# responses: OpenAI's Responses
# ============================================================================================================

RESPONSE_FIELDS: Types = {
    "model": _TEXT, "instructions": _TEXT, "previous_response_id": _TEXT, "stream": _FLAG, "store": _FLAG,
    "max_output_tokens": _INTEGER, "metadata": _OBJECT, "parallel_tool_calls": _FLAG, "reasoning": _OBJECT,
    "temperature": _NUMBER, "text": _OBJECT, "tools": _LIST, "top_p": _NUMBER, "truncation": _TEXT, "user": _TEXT,
    "background": _FLAG, "include": _LIST, "service_tier": _TEXT, "prompt_cache_key": _TEXT,
}  # fmt: skip


@dataclass(frozen=True)
class ResponseRequest:
    """A validated request of the Responses API: `turn`, what of its messages a later one can go on from with the items that
    brought tools, the fields that the response repeats, and whether it `compacts` what was said so far."""

    turn: Turn
    messages: tuple[Message, ...]
    tools: tuple[dict[str, Any], ...]
    echo: dict[str, Any]
    store: bool
    compacts: bool = False


FindItem = Callable[[str], "dict[str, Any] | None"]  # an item of a response that is kept, by its id


def parse_response(
    body: Mapping[str, Any],
    earlier: list[dict[str, Any]],
    find_item: FindItem,
    upload_by_url: bool,
    counted: bool = False,
) -> ResponseRequest:
    """A request of the Responses API that goes on from the items of an earlier one; 400 names what is wrong. `counted`: its
    tokens alone are wanted."""
    model = model_of(body)
    _check_response(body)
    kept = ItemReader("previous_response_id")
    said = ItemReader("input", find_item, upload_by_url, kept.calls)
    without = counted and body.get("input") is None
    messages = (*kept.merged(earlier), *(() if without else said.merged(body.get("input"))))
    system = (Message("system", (Text(body["instructions"]),)),) if body.get("instructions") else ()
    if not counted and all(isinstance(part, Thought) for message in messages for part in message.parts):
        raise unfit("input", "must have at least one message.")
    text = said.told_later("text", body)
    reasoning = said.told_later("reasoning", body)
    brought = (*kept.tools, *said.tools)
    tools = Tools()
    for where, item in brought:
        tools.add_all(item["tools"], where)
    tools.add_all(body.get("tools") or [], "tools")
    offered = tools.offered(body.get("tool_choice"), body.get("parallel_tool_calls"))
    question = Question(
        (*system, *messages),
        model,
        effort=_effort(reasoning.get("effort"), "reasoning.effort"),
        hosted=offered.hosted,
        forced=offered.forced,
        offer=offered.offer,
        shape=parse_shape(text.get("format"), "text.format"),
        native={**body, "input": [*kept.items, *said.items]},
        options=options_of(body),
    )
    left_out = (*tools.left_out, *said.left_out)
    limit = _limit(body, "max_output_tokens")
    turn = Turn(question, bool(body.get("stream")), limit, _stops(body.get("stop")), left_out=left_out)
    if said.compacts:
        turn = replace(turn, question=compacting(question), limit=None)
    store = body.get("store") is not False
    echo = _echo(body, text, reasoning)
    facts = {"type": "additional_tools", "role": "developer"}
    brought = (
        brought[-1:] if all(item["tools"] == brought[-1][1]["tools"] for _, item in brought) else brought
    )
    items = tuple(facts | {"tools": item["tools"]} for _, item in brought)
    return ResponseRequest(turn, messages, items, echo, store, said.compacts)


def _check_response(body: Mapping[str, Any]) -> None:
    """400 for what is asked for and cannot be had."""
    if not all(isinstance(one, str) for one in body.get("include") or ()):
        raise unfit("include", "must be a list of strings.")
    for name in ("conversation", "prompt"):
        if body.get(name) is not None:
            raise unfit(
                name, "is not supported; use `previous_response_id` to go on from an earlier response."
            )
    if body.get("background"):
        raise unfit("background", "must be false: a response is made while you wait.")
    if body.get("truncation") not in (None, "auto", "disabled"):
        raise unfit("truncation", "must be auto or disabled.")
    metadata = body.get("metadata") or {}
    fits = len(metadata) <= 16 and all(len(name) <= 64 for name in metadata)
    if not fits or not all(isinstance(one, str) and len(one) <= 512 for one in metadata.values()):
        raise unfit("metadata", "must have at most 16 strings of up to 512 characters, by names of up to 64.")
    check_types(body.get("text") or {}, {"format": _OBJECT}, "text.")


MAX_ECHO = 64 << 10  # characters of JSON
_ECHO_DEFAULTS = {"tools": [], "metadata": {}, "text": {"format": {"type": "text"}}, "tool_choice": "auto"}


def _echo(body: Mapping[str, Any], text: dict[str, Any], reasoning: dict[str, Any]) -> dict[str, Any]:
    """The fields that a response repeats, and that are kept with it: without the longest ones if they are too long
    together."""
    repeated = ("instructions", "max_output_tokens", "previous_response_id", "user")
    echo = {name: body.get(name) for name in repeated}
    echo["metadata"] = body.get("metadata") or {}
    echo["parallel_tool_calls"] = body.get("parallel_tool_calls") is not False
    echo["tools"] = body.get("tools") or []
    echo["reasoning"] = {name: reasoning.get(name) for name in ("effort", "summary")}
    echo |= {name: 1.0 if body.get(name) is None else body[name] for name in ("temperature", "top_p")}
    echo["text"] = {"format": {"type": "text"}} | text
    echo["truncation"] = body.get("truncation") or "disabled"
    echo["tool_choice"] = body.get("tool_choice") or "auto"
    echo["store"] = body.get("store") is not False
    sizes = {name: len(compact(value)) for name, value in echo.items()}
    for name in sorted(sizes, key=lambda name: -sizes[name]):
        if sum(sizes.values()) <= MAX_ECHO:
            break
        echo[name] = _ECHO_DEFAULTS.get(name)
        sizes[name] = 0
    return echo


# -- items in ------------------------------------------------------------------------------------------------------------


class ItemReader:
    """Reads the items of `input`, or those that were kept of an earlier response, of every kind that the API has."""

    def __init__(
        self,
        field: str,
        find_item: FindItem = lambda id: None,
        upload_by_url: bool = False,
        calls: Calls | None = None,
    ) -> None:
        """`field` is where they stand, for errors; `calls` are those that were made before."""
        self._field, self._find_item, self._upload_by_url = field, find_item, upload_by_url
        self._ours = field != "input"  # then they are as they were written here
        self.calls: Calls = {} if calls is None else calls
        self.items: list[dict[str, Any]] = []  # as they are, but for what this server alone knows
        self.tools: list[tuple[str, dict[str, Any]]] = []  # the items that bring tools, and where they stand
        self.left_out: dict[str, None] = {}  # types of items that mean nothing here
        self.compacts = False  # whether the conversation is to be made shorter
        self._updates: dict[str, dict[str, Any]] = {}  # of the request's own fields

    def merged(self, value: Any) -> list[Message]:
        """The messages of items, or of a string; what the model said in a row is one message."""
        found: list[Message] = []
        for role, run in itertools.groupby(self._messages(value), lambda message: message.role):
            if role == "assistant":
                parts = itertools.chain.from_iterable(message.parts for message in run)
                found.append(Message(role, tuple(parts)))
            else:
                found += run
        return found

    def told_later(self, name: str, body: Mapping[str, Any]) -> dict[str, Any]:
        """A field of the request, as items have changed it."""
        return (body.get(name) or {}) | self._updates.get(name, {})

    def _messages(self, value: Any) -> Iterator[Message]:
        if isinstance(value, str):
            value = [{"role": "user", "content": value}]
        if not isinstance(value, list) or (not value and not self._ours):
            raise unfit(self._field, "must be a string or a list of at least one item.")
        for i, item in enumerate(value):
            where = self._field if self._ours else f"{self._field}[{i}]"
            kind = _item_type(item) if isinstance(item, dict) else None
            if not isinstance(kind, str):
                raise unfit(where, "must be an item, an object with a `type`.")
            if kind == "item_reference":
                id = required(item, "id", f"{where}.")
                if (item := self._find_item(id)) is None and id.startswith("rs_"):
                    continue  # reasoning that can be read here is not kept
                if item is None:
                    text = "There is no such item; they are kept for 24 hours."
                    raise ApiError("not_found", text, f"{where}.id")
                kind = item["type"]
            self.items.append(_as_any(item))
            if read := self.READS.get(kind):
                yield from read(self, item, where)
            else:
                self.left_out[f"{named_kind(kind)} item"] = None

    def _required(self, item: Mapping[str, Any], name: str, where: str) -> str:
        return str(item.get(name) or "") if self._ours else required(item, name, f"{where}.")

    def _message(self, item: dict[str, Any], where: str) -> Iterable[Message]:
        yield _message(item, where, self.calls, self._upload_by_url)

    # -- calls --

    def _made(self, call: FunctionCall) -> Iterable[Message]:
        if call.id:
            self.calls[call.id] = call
        yield Message("assistant", (call,))

    def _function_call(self, item: dict[str, Any], where: str) -> Iterable[Message]:
        name = self._required(item, "name", where)
        custom = item["type"] == "custom_tool_call"
        arguments = input_arguments(item.get("input")) if custom else as_json(item.get("arguments"))
        namespace = str(item.get("namespace") or "")
        return self._made(
            FunctionCall(_call_id(item), name, arguments, CUSTOM if custom else FUNCTION, namespace)
        )

    def _fixed_call(self, item: dict[str, Any], where: str) -> Iterable[Message]:
        kind = item["type"].removesuffix("_call")
        field = "operation" if kind == APPLY_PATCH else "action"
        given = item.get(field)
        if not isinstance(given, dict):
            raise unfit(f"{where}.{field}", "must be an object.")
        known = FIXED_FORMS[kind].parameters["properties"]
        arguments = {name: given[name] for name in known if given.get(name) is not None}
        arguments = {field: given} if kind == APPLY_PATCH else arguments
        return self._made(FunctionCall(_call_id(item), kind, as_json(arguments), kind))

    def _computer_call(self, item: dict[str, Any], where: str) -> Iterable[Message]:
        actions = item.get("actions") or [item.get("action")]
        return self._made(FunctionCall(_call_id(item), "computer", as_json({"actions": actions})))

    def _call_output(self, item: dict[str, Any], where: str) -> Iterable[Message]:
        id = self._required(item, "call_id", where) if "call_id" in item or "id" not in item else item["id"]
        output = item.get("output")
        if item["type"] == "shell_call_output" and isinstance(output, list):
            output = "\n".join(map(_shell_output, dicts(output)))
        elif item["type"] == "apply_patch_call_output":
            output = "\n".join(filter(None, (str(item.get("status") or ""), str(output or ""))))
        elif item["type"] == "computer_call_output":
            output = [output]
        yield result_message(str(id), _content(output, f"{where}.output"), self.calls, item.get("name"))

    # -- what upstreams elsewhere did --

    def _mcp_call(self, item: dict[str, Any], where: str) -> Iterable[Message]:
        call = FunctionCall(
            str(item.get("id") or ""),
            str(item.get("name") or ""),
            as_json(item.get("arguments")),
            namespace=str(item.get("server_label") or ""),
        )
        yield from self._made(call)
        said = item.get("output") if item.get("error") is None else item["error"]
        if said is not None:
            yield result_message(call.id, (Text(as_json(said)),), self.calls)

    def _approval(self, item: dict[str, Any], where: str) -> Iterable[Message]:
        told = "approved" if item.get("approve") else "refused"
        told = ": ".join(filter(None, (told, str(item.get("reason") or ""))))
        yield result_message(str(item.get("approval_request_id") or ""), (Text(told),), self.calls)

    def _file_search(self, item: dict[str, Any], where: str) -> Iterable[Message]:
        found = [
            f"{one.get('filename') or one.get('file_id') or ''}:\n{one.get('text') or ''}"
            for one in dicts(item.get("results"))
        ]
        if found:
            yield Message("tool", (ToolResult("", "file_search", (Text("\n\n".join(found)),)),))

    def _drawing(self, item: dict[str, Any], where: str) -> Iterable[Message]:
        if item.get("result"):
            where = f"{where}.result"
            form = str(item.get("output_format") or "png")
            blob = _unbased(str(item["result"]), 0, where)
            image = Attachment(where, image=True, mime=f"image/{form}", blob=blob)
            yield Message("tool", (ToolResult("", DRAWING, (image,)),))

    def _ran(self, item: dict[str, Any], where: str) -> Iterable[Message]:
        told = [_fenced(ToolUse("python", str(item.get("code") or "")))]
        told += [
            _fenced(ToolUse("", str(one["logs"]))) for one in dicts(item.get("outputs")) if one.get("logs")
        ]
        yield Message("assistant", tuple(told))

    def _program(self, item: dict[str, Any], where: str) -> Iterable[Message]:
        return self._made(
            FunctionCall(_call_id(item), "program", compact({"code": str(item.get("code") or "")}))
        )

    def _program_output(self, item: dict[str, Any], where: str) -> Iterable[Message]:
        yield result_message(_call_id(item), (Text(str(item.get("result") or "")),), self.calls)

    # -- what is about the conversation --

    def _reasoning(self, item: dict[str, Any], where: str) -> Iterable[Message]:
        """What of a reasoning item can be read."""
        parts = dicts(item.get("summary")) or dicts(item.get("content"))
        encrypted = item.get("encrypted_content")
        text = "\n\n".join(str(part.get("text") or "") for part in parts)
        yield Message("assistant", (Thought(text, encrypted if isinstance(encrypted, str) else ""),))

    def _tools(self, item: dict[str, Any], where: str) -> Iterable[Message]:
        if not isinstance(item.get("tools"), list):
            raise unfit(f"{where}.tools", "must be a list of tools.")
        self.tools.append((f"{where}.tools", item))
        return ()

    def _compaction(self, item: dict[str, Any], where: str) -> Iterable[Message]:
        summary = unsealed(item.get("encrypted_content"))
        if summary is None:
            self.left_out["compaction item of another server"] = None
        else:
            yield Message("system", (Text(f"{SUMMARY_LINE}\n{summary}"),))

    def _trigger(self, item: dict[str, Any], where: str) -> Iterable[Message]:
        self.compacts = True
        return ()

    def _update(self, item: dict[str, Any], where: str) -> Iterable[Message]:
        check_types(item, {"text": _OBJECT, "reasoning": _OBJECT}, f"{where}.")
        check_types(item.get("text") or {}, {"format": _OBJECT}, f"{where}.text.")
        self._updates |= {name: item[name] for name in ("text", "reasoning") if item.get(name)}
        return ()

    READS: Mapping[str, Callable[[Any, dict[str, Any], str], Iterable[Message]]] = {
        "message": _message,
        "function_call": _function_call,
        "custom_tool_call": _function_call,
        "local_shell_call": _fixed_call,
        "shell_call": _fixed_call,
        "apply_patch_call": _fixed_call,
        "computer_call": _computer_call,
        "function_call_output": _call_output,
        "custom_tool_call_output": _call_output,
        "local_shell_call_output": _call_output,
        "shell_call_output": _call_output,
        "apply_patch_call_output": _call_output,
        "computer_call_output": _call_output,
        "mcp_call": _mcp_call,
        "mcp_approval_request": _mcp_call,
        "mcp_approval_response": _approval,
        "mcp_list_tools": lambda reader, item, where: (),  # it offers what nobody here can call
        "file_search_call": _file_search,
        "web_search_call": lambda reader, item, where: (),  # the answer has what was found
        "image_generation_call": _drawing,
        "code_interpreter_call": _ran,
        "program": _program,
        "program_output": _program_output,
        "reasoning": _reasoning,
        "additional_tools": _tools,
        "tool_search_call": lambda reader, item, where: (),  # its output has what was found
        "tool_search_output": _tools,
        "compaction": _compaction,
        "compaction_trigger": _trigger,
        "configuration_update": _update,
    }


def _as_any(item: dict[str, Any]) -> dict[str, Any]:
    """An item as any server understands it: a summary that was sealed here is told in a message."""
    summary = unsealed(item.get("encrypted_content")) if item.get("type") == "compaction" else None
    if summary is None:
        return item
    content = [{"type": "input_text", "text": f"{SUMMARY_LINE}\n{summary}"}]
    return {"type": "message", "role": "developer", "content": content}


def _item_type(item: Mapping[str, Any]) -> Any:
    """The type of an item; messages and references need not say it."""
    untyped = "item_reference" if "id" in item and "role" not in item else "message"
    return item.get("type") or untyped


def _call_id(item: Mapping[str, Any]) -> str:
    return str(item.get("call_id") or item.get("id") or "")


def _shell_output(output: Mapping[str, Any]) -> str:
    """What one shell command printed, and how it ended."""
    outcome = output.get("outcome")
    code = _at(outcome, ("exit_code",))
    ended = "It was stopped: it took too long." if code is None else f"Exit code: {code}"
    return (
        "\n".join(filter(None, (str(output.get(name) or "") for name in ("stdout", "stderr")))) + f"\n{ended}"
    )


# -- a conversation made shorter -----------------------------------------------------------------------------------------

SUMMARY_LINE = "The conversation so far, in short:"
_COMPACTING = (
    "Write down the conversation so far in short, so that somebody who has not read it can go on with it from what you "
    "write: what the user wants, in the user's own words where they matter; what was decided, and why; what was done and "
    "found out; the names and the state of files and other things that were worked on; what is still to be done. Write "
    "nothing else."
)
_SEAL = "chatproxy-1."


def compacting(question: Question) -> Question:
    """The question that has a conversation made shorter."""
    ask = Message("user", (Text(_COMPACTING),))
    return replace(question, messages=(*question.messages, ask), hosted=(), forced="", offer=None, shape=None)


def sealed(summary: str) -> str:
    """A summary as the content of a compaction item. It is the client's own conversation, and no secret from it."""
    return _SEAL + base64.urlsafe_b64encode(summary.encode("utf-8", "replace")).decode()


def unsealed(content: Any) -> str | None:
    """The summary of a compaction item; None for one that was not made here."""
    if not isinstance(content, str) or not content.startswith(_SEAL):
        return None
    try:
        return base64.b64decode(content[len(_SEAL) :], b"-_", validate=True).decode()
    except ValueError:
        return None


# -- items out -----------------------------------------------------------------------------------------------------------


def listed_items(items: Iterable[Mapping[str, Any]], response: str) -> list[dict[str, Any]]:
    """Kept items in the shape in which they are listed, each with an id."""
    listed = []
    for i, item in enumerate(items):
        id = f"item_{response.removeprefix('resp_')}{i:04x}"
        whole: dict[str, Any] = {"id": id, "status": "completed"} | dict(item)
        if whole["type"] == "message":
            facts = _TEXT_FACTS if whole["role"] == "assistant" else {}
            whole["content"] = [part | facts for part in whole["content"]]
        listed.append(whole)
    return listed


_TEXT_FACTS: dict[str, Any] = {"annotations": [], "logprobs": []}  # that a model's text has besides


ItemEvent = tuple[
    str, dict[str, Any]
]  # the name of an event of an item's, and its fields but for the item's place


def _growth_of(event: str, field: str, text: str) -> list[ItemEvent]:
    """The events of an item's text that grows, and of its end."""
    pieces = [(f"{event}.delta", {"delta": piece}) for piece in in_pieces(text)]
    return [*pieces, (f"{event}.done", {field: text})]


def _steps(kind: str, *steps: str) -> list[ItemEvent]:
    return [(f"response.{kind}.{step}", {}) for step in steps]


def _commands(item: Mapping[str, Any]) -> list[ItemEvent]:
    """The events of a shell call."""
    events: list[ItemEvent] = []
    for i, command in enumerate(item["action"]["commands"]):
        place = {"command_index": i}
        for step, facts in (
            ("added", {"command": ""}),
            ("delta", {"delta": command}),
            ("done", {"command": command}),
        ):
            events.append((f"response.shell_call_command.{step}", place | facts))
    return events


# The events between the begin and the end of an item, by its type; of those that are told when they are whole.
ITEM_EVENTS: Mapping[str, Callable[[Mapping[str, Any]], list[ItemEvent]]] = {
    "function_call": lambda item: _growth_of(
        "response.function_call_arguments", "arguments", item["arguments"]
    ),
    "custom_tool_call": lambda item: _growth_of("response.custom_tool_call_input", "input", item["input"]),
    "shell_call": _commands,
    "image_generation_call": lambda item: _steps(
        "image_generation_call", "in_progress", "generating", "completed"
    ),
    "web_search_call": lambda item: _steps("web_search_call", "in_progress", "searching", "completed"),
    "code_interpreter_call": lambda item: [
        *_steps("code_interpreter_call", "in_progress"),
        *_growth_of("response.code_interpreter_call_code", "code", item["code"]),
        *_steps("code_interpreter_call", "interpreting", "completed"),
    ],
}
# What such an item begins with instead of what it will have.
_BEGINNINGS = {"arguments": "", "input": "", "code": "", "outputs": None, "result": None}


@dataclass(frozen=True)
class _Growth:
    """How an item that grows is told: the prefix of its id, its type, the field with its one part, that part's type,
    the events of the part and of its text, the name of the part's index, and what items, parts and texts have more."""

    prefix: str
    item: str
    field: str
    type: str
    part: str
    text: str
    index: str
    facts: Mapping[str, Any]
    parts: Mapping[str, Any]
    more: Mapping[str, Any]

    def whole(self, text: str) -> dict[str, Any]:
        """The part."""
        return {"type": self.type, "text": text, **self.parts}


_MESSAGE = _Growth(
    "msg", "message", "content", "output_text", "response.content_part", "response.output_text", "content_index",
    {"role": "assistant", "content": []}, {"annotations": [], "logprobs": []}, {"logprobs": []},
)  # fmt: skip
_REASONING = _Growth(
    "rs", "reasoning", "summary", "summary_text", "response.reasoning_summary_part",
    "response.reasoning_summary_text", "summary_index", {"summary": []}, {}, {},
)  # fmt: skip


class ResponseEvents:
    """The events of a response: items open, grow and close one after the other, and every event has the next sequence
    number."""

    def __init__(self, id: str, put: Callable[[str], None]) -> None:
        """`put` takes an event as text."""
        self.id = id
        self._put = put
        self.items: list[dict[str, Any]] = []
        self._open: _Growth | None = None  # what the last item is, while it grows
        self._grown: list[str] = []
        self.number = -1  # of the last event
        self._ahead = ""

    def tell(self, kind: str, **facts: Any) -> None:
        """Tells an event."""
        self.number += 1
        event = {"type": kind, "sequence_number": self.number} | facts
        self._put(f"event: {kind}\ndata: {compact(event)}\n\n")

    def _place(self) -> dict[str, Any]:
        """The place of the last item."""
        inner = {self._open.index: 0} if self._open else {}
        return {"item_id": self.items[-1]["id"], "output_index": len(self.items) - 1} | inner

    def new_id(self, prefix: str) -> str:
        """An id for the next item, which tells whose it is."""
        return f"{prefix}_{self.id.removeprefix('resp_')}{len(self.items):02x}"

    def _add(self, item: dict[str, Any]) -> None:
        self.close()
        self.items.append(item)
        self.tell("response.output_item.added", output_index=len(self.items) - 1, item=item)

    def add_whole(self, item: dict[str, Any]) -> None:
        """Tells an item that is complete, with the events that it would have had while it came about."""
        begun = item | {name: value for name, value in _BEGINNINGS.items() if name in item}
        self._add(begun | ({"status": "in_progress"} if "status" in item else {}))
        for kind, facts in ITEM_EVENTS.get(item["type"], lambda item: [])(item):
            self.tell(kind, **self._place(), **facts)
        self._done(item)

    def grow(self, kind: _Growth, text: str, id: str = "") -> None:
        """Text for the item of this kind; once per token."""
        if self._open is not kind:
            self._begin(kind, id)
        self.number += 1
        self._grown.append(text)
        quoted = json.encoder.encode_basestring(text)
        self._put(f'{self._ahead}{self.number},"delta":{quoted}}}\n\n')

    def _begin(self, kind: _Growth, id: str = "") -> None:
        """Opens an item that grows."""
        self.close()
        item = {"id": id or self.new_id(kind.prefix), "type": kind.item, "status": "in_progress"}
        self._add(item | dict(kind.facts))
        self._open = kind
        self._grown = []
        self.tell(f"{kind.part}.added", **self._place(), part=kind.whole(""))
        event = {"type": f"{kind.text}.delta"} | self._place() | dict(kind.more)
        self._ahead = f'event: {kind.text}.delta\ndata: {compact(event)[:-1]},"sequence_number":'

    def close(self, status: str = "completed") -> None:
        """Ends the item that grows."""
        if (kind := self._open) is None:
            return
        text = "".join(self._grown)
        place = self._place()
        self.tell(f"{kind.text}.done", **place, text=text, **kind.more)
        self.tell(f"{kind.part}.done", **place, part=kind.whole(text))
        self._open = None
        self._done({kind.field: [kind.whole(text)], "status": status})

    def _done(self, facts: Mapping[str, Any]) -> None:
        self.items[-1] |= facts
        self.tell("response.output_item.done", output_index=len(self.items) - 1, item=self.items[-1])


def replayed(response: Mapping[str, Any]) -> list[str]:
    """The events of a response that is kept; each of its texts in one piece."""
    told: list[str] = []
    events = ResponseEvents(response["id"], told.append)
    begun: dict[str, Any] = {**response, "status": "in_progress", "output": []}
    begun |= {"usage": None, "incomplete_details": None}
    events.tell("response.created", response=begun)
    events.tell("response.in_progress", response=begun)
    for item in response["output"]:
        kind = {"message": _MESSAGE, "reasoning": _REASONING}.get(item["type"])
        if kind:
            texts = [str(part.get("text") or part.get("refusal") or "") for part in item[kind.field]]
            events.grow(kind, "".join(texts), item["id"])
            events.close(item.get("status") or "completed")
        else:
            events.add_whole(item)
    events.tell(f"response.{response['status']}", response=response)
    return told


# The codes of OpenAI's for a response that failed; other failures are server_error.
_FAILURE_CODES = {"rate_limit_exceeded": "rate_limit_exceeded", "invalid_request_error": "invalid_prompt"}
_FAILURE_CODES |= {"context_length_exceeded": "context_length_exceeded"}
_NUMBERS = re.compile(rb'"sequence_number": ?(\d{1,9})')
# What an upstream says of a response that is true of ours too.
_SAID_OF_A_RESPONSE = (
    "created_at", "completed_at", "status", "background", "error", "incomplete_details", "model", "usage", "service_tier",
    "reasoning", "text",
)  # fmt: skip
_SEARCHES = {"web", "browser", "bing"}  # the site's own tools that search
Inline = Callable[[str], str]  # the image at a URL of the upstream's in base64, "" when it cannot be had


class ModelResponse(Rendering):
    """An answer as a `response`, and as the events of one that is streamed."""

    def __init__(
        self,
        request: ResponseRequest,
        tokens: Tokens,
        keep: Callable[[ModelResponse, dict[str, Any]], None],
        inline: Inline,
    ) -> None:
        """`keep` is called with the finished response before the client is told that it is."""
        super().__init__(request.turn, tokens)
        self.request, self._keep, self._inline = request, keep, inline
        self.id = f"resp_{secrets.token_hex(24)}"  # who has it, has the response
        self._events = ResponseEvents(self.id, self.pieces.append)
        self._status = "in_progress"
        self._error: dict[str, Any] | None = None
        self._runs = False  # whether the output of Python is what comes next
        self._code: str | None = None  # what it runs
        # Of an upstream that speaks this API: its last words, what of them it was that ended the answer, and the text that
        # grows when it may have to be cut.
        self.is_native = False  # whether there is one that answers
        self._deltas = 0  # pieces of text that it told
        self._last_said = b""
        self._ended: dict[str, Any] | None = None
        self._growing: dict[str, Any] = {}

    @property
    def items(self) -> list[dict[str, Any]]:
        """The items that the client has been given."""
        return self._events.items

    def whole(self) -> dict[str, Any]:
        """The response as it is now."""
        if self._ended is not None:
            return self._as_ours(self._ended["response"])
        reason = {"length": "max_output_tokens", "content_filter": "content_filter"}.get(self._reason)
        usage = self.usage() if self._status in ("completed", "incomplete") else None
        return {
            "id": self.id,
            "object": "response",
            "created_at": self.created,
            "status": self._status,
            "background": False,
            "error": self._error,
            "incomplete_details": {"reason": reason} if self._status == "incomplete" else None,
            "model": self.model,
            "output": self.items,
            "usage": usage,
            **self.request.echo,
        }

    def usage(self) -> dict[str, Any]:
        """`usage`."""
        prompt, answer, reasoning = self.counted()
        return self.usage_of(Usage(prompt, self.cached, answer, reasoning))

    @staticmethod
    def usage_of(usage: Usage) -> dict[str, Any]:
        """`usage` of so many tokens."""
        return {
            "input_tokens": usage.prompt,
            "input_tokens_details": {"cached_tokens": usage.cached, "cache_write_tokens": 0},
            "output_tokens": usage.answer,
            "output_tokens_details": {"reasoning_tokens": usage.reasoning},
            "total_tokens": usage.prompt + usage.answer,
        }

    def begin(self) -> None:
        self._events.tell("response.created", response=self.whole())
        self._events.tell("response.in_progress", response=self.whole())

    def failed(self, error: ApiError) -> bytes:
        """The last event of an answer that broke off: it has the error twice, since clients look in either place."""
        if not self.begun:
            self.begin()
        if numbers := _NUMBERS.findall(self._last_said):
            self._events.number = max(self._events.number, int(numbers[-1]))
        self._status = "failed"
        code = _FAILURE_CODES.get(error.code, "server_error")
        self._error = {"code": code, "message": error.text}
        self._events.tell("response.failed", response=self.whole(), **error.body())
        return self.told()[0]

    # -- what an upstream says that speaks this API itself: its own words, but for what they say of the response --

    def feed(self, events: list[Event]) -> tuple[bytes, int]:
        """The bytes for a batch of events, all in one piece, and how many events of the client's they are."""
        first = events[0]
        if type(first) is Verbatim:
            if self.begun and not self.trims and first.event is None and len(events) == 1:  # once per token
                self._last_said = first.data
                self._deltas += first.events
                return first.data, first.events
            # It says itself that it begins.
            self.is_native = True
            self.begun = self.begun or (first.event or {}).get("type") == "response.created"
        return super().feed(events)

    def counted(self) -> tuple[int, int, int]:
        """Tokens, as the upstream counts them; of an answer of its own that it could not end each piece is one."""
        if self.is_native and self.usage_told is None:
            return self.prompt, self._deltas, 0
        return super().counted()

    def light(self, events: list[Light]) -> bool:
        if type(events[0]) is not Verbatim:
            return super().light(events)
        size = sum(len(cast(Verbatim, event).data) for event in events)
        return self._trimmer is None or self._trimmer.surely_fits(size)

    def take(self, events: list[Event]) -> list[Any]:
        if self._trimmer and any(type(event) is Verbatim for event in events):
            kept = list(itertools.chain.from_iterable(map(self._cut_to_size, events)))
            ends = [i for i, event in enumerate(kept) if type(event) is Finish]
            events = kept[: ends[0] + 1] if ends else kept
            self.cut = self._trimmer.over
            for event in events:
                self.NOTES[type(event)](self, event)
            return events
        return super().take(events)

    def _cut_to_size(self, event: Event) -> list[Event]:
        """An event of the upstream's as far as its text may be told, with the end where it may not."""
        trimmer = cast(Trimmer, self._trimmer)
        if not isinstance(event, Verbatim):
            return [event]
        if event.event is not None:
            return [*self._as_said(trimmer.flush()), event]
        out: list[Event] = []
        for block in filter(None, event.data.split(b"\n\n")):
            said = Answer(200, {}, block.partition(b"\ndata: ")[2]).object() or {}
            if said.get("type") == "response.output_text.delta":
                self._deltas += 1
                self._growing = said
                out += self._as_said(trimmer.feed([Text(str(said.get("delta") or ""))]))
            else:
                out.append(Verbatim(None, block + b"\n\n"))
        return out

    def _as_said(self, events: list[Event]) -> list[Event]:
        """Text as the upstream tells the one that grows."""
        return [
            Verbatim(self._growing | {"delta": event.text}) if isinstance(event, Text) else event
            for event in events
        ]

    def _take_verbatim(self, told: Verbatim) -> None:
        event = told.event
        if event is None:
            self._last_said = told.data
            self._deltas += 0 if self.trims else told.events
            self.pieces.append(told.data.decode("utf-8", "replace"))
            return
        kind = event["type"]
        number = event.get("sequence_number")
        self._events.number = number if type(number) is int else self._events.number + 1
        if kind in RESPONSE_ENDS and isinstance(event.get("response"), dict):
            self._ended = event
            return
        if isinstance(event.get("response"), dict):
            event = event | {"response": self._as_ours(event["response"])}
        if kind == "response.output_item.added" and self.trims:
            self._open_item = event
        elif kind == "response.output_text.delta":  # one that may be cut
            self._grown += event["delta"]
        elif kind == "response.output_item.done" and isinstance(event.get("item"), dict):
            self.items.append(event["item"])
            self._open_item, self._grown = {}, ""
        self.pieces.append(f"event: {kind}\ndata: {compact(event)}\n\n")

    _open_item: Mapping[str, Any] = {}  # the event that an item began with, if it may have to be cut
    _grown = ""  # its text

    def _cut_off(self) -> None:
        """Ends an item of the upstream's that is not told to its end."""
        item = dict(self._open_item.get("item") or {})
        if not item or item.get("type") != "message":
            return
        place = {name: self._growing.get(name) for name in ("item_id", "output_index", "content_index")}
        part = {"type": "output_text", "text": self._grown, "annotations": [], "logprobs": []}
        self._events.tell("response.output_text.done", **place, text=self._grown, logprobs=[])
        self._events.tell("response.content_part.done", **place, part=part)
        status = "incomplete" if self._reason == "length" else "completed"
        self.items.append(item | {"content": [part], "status": status})
        index = self._open_item.get("output_index")
        self._events.tell("response.output_item.done", output_index=index, item=self.items[-1])

    def _as_ours(self, response: Mapping[str, Any]) -> dict[str, Any]:
        """An upstream's response with what the client has asked for: of how it was asked there nothing is told."""
        told = {name: response[name] for name in _SAID_OF_A_RESPONSE if name in response}
        told |= {"id": self.id, "object": "response", "output": self.items or response.get("output") or []}
        told.setdefault("created_at", self.created)
        if isinstance(usage := told.get("usage"), dict):
            details = {"cached_tokens": 0, "cache_write_tokens": 0} | (
                usage.get("input_tokens_details") or {}
            )
            told["usage"] = usage | {"input_tokens_details": details}
        return self.request.echo | told

    def has_place(self, event: Event) -> bool:
        """Whether what the upstream's own tools did is an item: when the request offers them."""
        hosted = self.turn.question.hosted
        if type(event) is Image:
            return DRAWING in hosted
        if type(event) is not ToolUse:
            return False
        if not event.language:
            runs, self._runs = self._runs, False
            return runs
        self._runs = event.language == "python" and PYTHON in hosted
        return self._runs or (event.language in _SEARCHES and WEB_SEARCH in hosted)

    def _add(self, prefix: str, kind: str, **facts: Any) -> None:
        """Tells an item that is complete."""
        self._end_code()
        item = {"id": self._events.new_id(prefix), "type": kind, "status": "completed"}
        self._events.add_whole(item | facts)

    def _end_code(self, *logs: str) -> None:
        """Tells the code that was run, with what it printed."""
        if (code := self._code) is not None:
            self._code = None
            outputs = [{"type": "logs", "logs": one} for one in logs]
            container = f"cntr_{self.id.removeprefix('resp_')}"
            self._add("ci", "code_interpreter_call", code=code, container_id=container, outputs=outputs)

    def take_text(self, text: str) -> None:
        if self._code is not None:
            self._end_code()
        self._events.grow(_MESSAGE, text)

    def _take_reasoning(self, event: Reasoning) -> None:
        self._end_code()
        self._events.grow(_REASONING, event.text)

    def _take_tool_use(self, event: ToolUse) -> None:
        if event.language == "python":
            self._end_code()
            self._code = event.text
        elif event.language:
            action = {"type": "search", "query": event.text, "queries": [event.text]}
            self._add("ws", "web_search_call", action=action)
        elif self._code is not None:
            self._end_code(event.text)
        else:  # something came in between
            self.take_text(_fenced(event).text)

    def _take_image(self, event: Image) -> None:
        if data := self._inline(event.url):
            self._add("ig", "image_generation_call", result=data)
        else:
            self.take_text(AS_TEXT[Image](event).text)

    def _take_call(self, call: FunctionCall) -> None:
        told = CALL_SHAPES[call.kind]
        self._add(told.prefix, told.type, **told.fields(call))

    def _take_finish(self, event: Finish) -> None:
        if self._ended is not None:
            whole = self.whole()
            self._keep(self, whole)
            ended = self._ended | {"response": whole}
            self.pieces.append(f"event: {ended['type']}\ndata: {compact(ended)}\n\n")
            return
        self._cut_off()
        self._end_code()
        self._status = "incomplete" if self._reason in ("length", "content_filter") else "completed"
        if not any(item["type"] != "reasoning" for item in self.items):
            self._events.grow(_MESSAGE, "")  # an answer without a word is a message all the same
        self._events.close(self._status)
        response = self.whole()
        self._keep(self, response)
        self._events.tell(f"response.{self._status}", response=response)

    TAKES = {
        **_NOT_TOLD,
        Begin: lambda self, event: None,  # which `feed` sees to
        Verbatim: _take_verbatim,
        Reasoning: _take_reasoning,
        ToolUse: _take_tool_use,
        Image: _take_image,
        FunctionCall: _take_call,
        Finish: _take_finish,
    }


class Compaction(ModelResponse):
    """An answer that is the earlier conversation made shorter: one item, which this program reads again."""

    def take_text(self, text: str) -> None:
        """It comes when it is whole."""

    def _take_reasoning(self, event: Reasoning) -> None:
        """Nobody has asked for it."""

    def _take_finish(self, event: Finish) -> None:
        if self._ended is not None:
            super()._take_finish(event)
            return
        if not self.text.strip():
            raise ApiError("upstream_error", "The upstream wrote no summary of the conversation; try again.")
        item = {"id": self._events.new_id("cmp"), "type": "compaction"}
        self._events.add_whole(item | {"encrypted_content": sealed(self.text)})
        super()._take_finish(event)

    def compacted(self) -> dict[str, Any]:
        """A `response.compaction`."""
        facts = {"id": self.id, "object": "response.compaction", "created_at": self.created}
        return facts | {"output": self.items, "usage": self.usage()}

    TAKES = {**ModelResponse.TAKES, Reasoning: _take_reasoning, Finish: _take_finish}


# ============================================================================================================
# messages: Anthropic's Messages
# ============================================================================================================

MESSAGE_FIELDS: Types = {
    "messages": _LIST, "model": _TEXT, "max_tokens": _INTEGER, "stream": _FLAG, "stop_sequences": _LIST, "tools": _LIST,
    "tool_choice": _OBJECT, "thinking": _OBJECT, "output_config": _OBJECT, "metadata": _OBJECT, "temperature": _NUMBER,
    "top_p": _NUMBER, "top_k": _INTEGER,
}  # fmt: skip
# A model of Anthropic's, which clients ask for until they are told of another one.
_CLAUDE = re.compile(r"(?:anthropic/)?claude-.*|sonnet|opus|haiku")
# Tools that clients run themselves, and whose form is Anthropic's: by the beginning of their types, their schemas.
_TEXT_EDITOR = {
    "command": {"enum": ["view", "create", "str_replace", "insert"]},
    "path": {"type": "string"},
    "file_text": {"type": "string", "description": "of `create`: the whole file"},
    "old_str": {"type": "string", "description": "of `str_replace`: text that occurs once in the file"},
    "new_str": {"type": "string", "description": "of `str_replace`: what takes its place"},
    "insert_line": {
        "type": "integer",
        "description": "of `insert`: the line behind which to insert, 0 for the top",
    },
    "insert_text": {"type": "string"},
    "view_range": {"type": "array", "items": {"type": "integer"}, "minItems": 2, "maxItems": 2},
}
_MEMORY = {
    "command": {"enum": ["view", "create", "str_replace", "insert", "delete", "rename"]},
    "path": {"type": "string", "description": "below /memories"},
    "old_path": {"type": "string"},
    "new_path": {"type": "string"},
}
_CLIENT_TOOLS: Mapping[str, tuple[str, dict[str, Any], list[str]]] = {
    "bash_": (
        "Runs a command in the user's shell, which stays the same between calls.",
        {"command": {"type": "string"}, "restart": {"type": "boolean"}},
        [],
    ),
    "text_editor_": ("Looks at and edits files.", _TEXT_EDITOR, ["command", "path"]),
    "memory_": ("Keeps notes in files.", _TEXT_EDITOR | _MEMORY, ["command"]),
}


@dataclass(frozen=True)
class MessageRequest:
    """A validated request of the Messages API; `thinks`: whether the client is told what the model thought."""

    turn: Turn
    thinks: bool


def parse_message_request(body: Mapping[str, Any], counted: bool = False) -> MessageRequest:
    """A request of the Messages API; 400 names what is wrong. `counted`: its tokens alone are wanted."""
    check_types(body, MESSAGE_FIELDS)
    model = model_of(body)
    if not body.get("messages"):
        raise unfit("messages", "must be a list of at least one message.")
    if body.get("max_tokens") is None and not counted:
        raise unfit("max_tokens", "is missing; it is how many tokens the answer may have.")
    reader = BlockReader()
    messages = reader.system(body.get("system"), "system")
    for i, message in enumerate(body["messages"]):
        messages += reader.message(message, f"messages[{i}]")
    if not counted and not any(message.parts for message in messages if message.role != "system"):
        raise unfit("messages", "must have something to be answered.")
    offered = _offered_of(body, reader.tools)
    config = body.get("output_config") or {}
    thinking = body.get("thinking") or {}
    form = config.get("format")
    question = Question(
        tuple(messages),
        "auto" if _CLAUDE.fullmatch(model) else model,
        effort=_effort(config.get("effort"), "output_config.effort") or _effort_of(thinking),
        hosted=offered.hosted,
        forced=offered.forced,
        offer=offered.offer,
        shape=parse_shape(form, "output_config.format") if isinstance(form, dict) else None,
    )
    turn = Turn(
        question,
        bool(body.get("stream")),
        _limit(body, "max_tokens"),
        _stops(body.get("stop_sequences"), "stop_sequences"),
        left_out=tuple(reader.tools.left_out),
    )
    thinks = thinking.get("type", "disabled") != "disabled" and thinking.get("display") != "omitted"
    return MessageRequest(turn, thinks)


def _effort_of(thinking: Mapping[str, Any]) -> str:
    """How hard to think, by the tokens that thinking may take."""
    if thinking.get("type") == "disabled":
        return "none"
    budget = thinking.get("budget_tokens")
    if not isinstance(budget, int):
        return ""
    return next(effort for most, effort in _BUDGETS if budget <= most)


_BUDGETS = ((4096, "low"), (16384, "medium"), (32768, "high"), (math.inf, "xhigh"))


def _offered_of(body: Mapping[str, Any], tools: Tools) -> Offered:
    """What the tools of a request let the model use."""
    tools.add_all(body.get("tools") or [], "tools", _add_tool)
    choice = body.get("tool_choice") or {}
    kind = str(choice.get("type", "auto"))
    wanted: Any = {"auto": "auto", "any": "required", "none": "none"}.get(kind)
    if kind == "tool":
        wanted = {"type": FUNCTION, "name": choice.get("name")}
    elif wanted is None:
        raise unfit("tool_choice.type", "must be auto, any, tool or none.")
    return tools.offered(wanted, not choice.get("disable_parallel_tool_use"))


def _add_tool(tools: Tools, tool: Any, where: str) -> None:
    """Adds a tool: the client's own have a schema, those of Anthropic's form a type."""
    if not isinstance(tool, dict):
        raise unfit(where, "must be an object.")
    kind = tool.get("type") or CUSTOM
    if not isinstance(kind, str):
        raise unfit(f"{where}.type", "must be a string.")
    known = next((kind_of for kind_of in _CLIENT_TOOLS if kind.startswith(kind_of)), "")
    if kind == CUSTOM:
        facts = {"name": tool.get("name"), "description": tool.get("description")}
        tools.function(facts | {"parameters": tool.get("input_schema")}, where)
    elif known:
        description, properties, must = _CLIENT_TOOLS[known]
        schema = {"type": "object", "properties": properties, "required": must}
        tools.function({"name": tool.get("name"), "description": description, "parameters": schema}, where)
    else:
        kind = PYTHON if kind.startswith("code_execution") else kind
        tools.add({"type": kind, "name": tool.get("name")}, where)


class BlockReader:
    """Reads messages of Anthropic's, whose content is blocks of many kinds."""

    def __init__(self) -> None:
        self.tools = Tools()
        self._calls: Calls = {}

    def system(self, content: Any, where: str) -> list[Message]:
        """The system prompt as a message, if there is one."""
        parts = self._blocks(content, where) if content else []
        return [Message("system", tuple(parts))] if parts else []

    def message(self, value: Any, where: str) -> list[Message]:
        """A message: results of calls, which stand in the user's messages, are one of their own."""
        role = value.get("role") if isinstance(value, dict) else None
        if role not in ("user", "assistant", "system"):
            raise unfit(f"{where}.role", "must be user, assistant or system.")
        parts = self._blocks(value.get("content"), f"{where}.content")
        found = []
        for is_result, run in itertools.groupby(parts, lambda part: isinstance(part, ToolResult)):
            found.append(Message("tool" if is_result else role, tuple(run)))
        return found

    def _blocks(self, content: Any, where: str) -> list[MessagePart]:
        if isinstance(content, str):
            return [Text(content)]
        if not isinstance(content, list):
            raise unfit(where, "must be a string or a list of content blocks.")
        found: list[MessagePart] = []
        for i, block in enumerate(content):
            here = f"{where}[{i}]"
            kind = block.get("type") if isinstance(block, dict) else None
            if not isinstance(kind, str):
                raise unfit(here, "must be a content block, an object with a `type`.")
            if read := self.READS.get(kind):
                found += read(self, block, here)
            elif not kind.startswith(_DONE_THERE):
                self.tools.left_out[f"{named_kind(kind)} block"] = None
        return found

    def _content(self, content: Any, where: str) -> tuple[Text | Attachment, ...]:
        """The blocks that may stand in a result or a document."""
        blocks = self._blocks(content or "", where)
        return tuple(part for part in blocks if isinstance(part, (Text, Attachment)))

    def _text(self, block: dict[str, Any], where: str) -> list[MessagePart]:
        if not isinstance(block.get("text"), str):
            raise unfit(f"{where}.text", "must be a string.")
        return [Text(block["text"])]

    def _image(self, block: dict[str, Any], where: str) -> list[MessagePart]:
        return [self._source(block, where, True)]

    def _source(self, block: dict[str, Any], where: str, image: bool) -> Attachment:
        source = block.get("source")
        source = source if isinstance(source, dict) else {}
        where = f"{where}.source"
        kind = source.get("type")
        name = str(block.get("title") or "")
        if kind == "base64":
            data = source.get("data")
            if not isinstance(data, str):
                raise unfit(f"{where}.data", "must be base64.")
            blob = _unbased(data, 0, f"{where}.data")
            return Attachment(where, image, name, str(source.get("media_type") or ""), blob)
        if kind == "url":
            return replace(_from_url(required(source, "url", f"{where}."), f"{where}.url", image), name=name)
        if kind == "file":
            return Attachment(where, image, name, file=required(source, "file_id", f"{where}."))
        raise unfit(f"{where}.type", "must be base64, url or file.")

    def _document(self, block: dict[str, Any], where: str) -> list[MessagePart]:
        """A document: a text is told, with its title and context, other files come with it."""
        source = block.get("source")
        kind = _at(source, ("type",))
        heading = "\n".join(str(block[name]) for name in ("title", "context") if block.get(name))
        told: list[MessagePart] = [Text(heading)] if heading else []
        if kind == "text":
            return [*told, Text(str(_at(source, ("data",)) or ""))]
        if kind == "content":
            return [*told, *self._content(_at(source, ("content",)), f"{where}.source.content")]
        return [*told, self._source(block, where, False)]

    def _search_result(self, block: dict[str, Any], where: str) -> list[MessagePart]:
        heading = "\n".join(str(block[name]) for name in ("title", "source") if block.get(name))
        return [Text(heading), *self._content(block.get("content"), f"{where}.content")]

    def _tool_use(self, block: dict[str, Any], where: str) -> list[MessagePart]:
        id = required(block, "id", f"{where}.")
        call = FunctionCall(id, required(block, "name", f"{where}."), as_json(block.get("input") or {}))
        self._calls[id] = call
        return [call]

    def _tool_result(self, block: dict[str, Any], where: str) -> list[MessagePart]:
        id = required(block, "tool_use_id", f"{where}.")
        content = self._content(block.get("content"), f"{where}.content")
        failed = (Text("The call failed:"),) if block.get("is_error") else ()
        return list(result_message(id, (*failed, *content), self._calls).parts)

    def _upload(self, block: dict[str, Any], where: str) -> list[MessagePart]:
        return [Attachment(where, file=required(block, "file_id", f"{where}."))]

    READS: Mapping[str, Callable[[Any, dict[str, Any], str], list[MessagePart]]] = {
        "text": _text,
        "image": _image,
        "document": _document,
        "search_result": _search_result,
        "thinking": lambda reader, block, where: [
            Thought(str(block.get("thinking") or ""), encrypted_in(block.get("signature")))
        ],
        "redacted_thinking": lambda reader, block, where: [Thought("", encrypted_in(block.get("data")))],
        "tool_use": _tool_use,
        "tool_result": _tool_result,
        "tool_reference": lambda reader, block, where: [Text(f"The tool {block.get('tool_name')} is there.")],
        "compaction": lambda reader, block, where: [Text(f"{SUMMARY_LINE}\n{block.get('content') or ''}")],
        "container_upload": _upload,
    }


# The beginnings of the blocks that tell what Anthropic's own tools did: the answers that follow have what matters of it.
_DONE_THERE = (
    "server_tool_use", "web_search_tool_", "web_fetch_tool_", "code_execution_tool_", "bash_code_", "text_editor_code_",
    "tool_search_tool_", "mcp_tool_",
)  # fmt: skip


SIGNATURE = (
    "chatproxy"  # of thinking, which clients send back with it; what only the upstream can read may follow
)


def encrypted_in(signature: Any) -> str:
    """What the upstream alone can read in a signature of thinking, "" for nothing."""
    mark, _, encrypted = str(signature or "").partition(".")
    return encrypted if mark == SIGNATURE else ""


class ModelMessage(Rendering):
    """An answer as a `message`, and as the events of one that is streamed: blocks begin, grow and end one after another."""

    def __init__(self, request: MessageRequest, tokens: Tokens) -> None:
        super().__init__(request.turn, tokens)
        self.id = f"msg_{random.getrandbits(96):024x}"
        self._thinks = request.thinks
        self._content: list[dict[str, Any]] = []  # the blocks that the client has been given
        self._open: type[Event] | None = None  # what the last one is of, while it grows
        self._grown: list[str] = []
        self._ahead = ""
        self._signature = SIGNATURE
        self._piece_told: int | None = None  # characters of the input of the call that is being made

    def whole(self) -> dict[str, Any]:
        """A `message`."""
        return {
            "id": self.id,
            "type": "message",
            "role": "assistant",
            "model": self.model,
            "content": self._content,
            **self._ending(),
            "usage": self._usage(),
        }

    def _usage(self) -> dict[str, int]:
        """`usage` at the end: what was read from the cache is no part of `input_tokens`."""
        prompt, answer, _ = self.counted()
        cached = min(self.cached, prompt)
        read = {"cache_creation_input_tokens": 0, "cache_read_input_tokens": cached}
        return {"input_tokens": prompt - cached} | read | {"output_tokens": answer}

    def _ending(self) -> dict[str, Any]:
        """`stop_reason` and `stop_sequence`."""
        sequence = self.stopped_at or None
        reason = "stop_sequence" if sequence else _STOP_REASONS[self._reason]
        return {"stop_reason": reason, "stop_sequence": sequence}

    def _tell(self, kind: str, **facts: Any) -> None:
        self.pieces.append(f"event: {kind}\ndata: {compact({'type': kind} | facts)}\n\n")

    def begin(self) -> None:
        usage = {"input_tokens": self.prompt} | _NO_CACHE | {"output_tokens": 0}
        nothing: dict[str, Any] = {"content": [], "stop_reason": None, "stop_sequence": None, "usage": usage}
        message = {"id": self.id, "type": "message", "role": "assistant", "model": self.model}
        self._tell("message_start", message=message | nothing)

    def _start(self, block: dict[str, Any]) -> None:
        """Begins a block."""
        self._stop()
        self._content.append(block)
        self._tell("content_block_start", index=len(self._content) - 1, content_block=block)

    def _delta(self, kind: str, field: str, text: str) -> None:
        delta = {"type": kind, field: text}
        self._tell("content_block_delta", index=len(self._content) - 1, delta=delta)

    def _grow(self, kind: type[Event], text: str) -> None:
        """Text for the block of this kind; once per token."""
        name, delta, field = _BLOCKS[kind]
        if self._open is not kind:
            self._start({"type": name, field: ""} | ({"signature": ""} if kind is Reasoning else {}))
            self._open = kind
            self._grown = []
            event = {"type": "content_block_delta", "index": len(self._content) - 1}
            head = f'{compact(event)[:-1]},"delta":{{"type":"{delta}","{field}":'
            self._ahead = f"event: content_block_delta\ndata: {head}"
        self._grown.append(text)
        self.pieces.append(f"{self._ahead}{json.encoder.encode_basestring(text)}}}}}\n\n")

    def _stop(self) -> None:
        """Ends the block that grows."""
        if self._open is None:
            return
        block = self._content[-1]
        block[_BLOCKS[self._open][2]] = "".join(self._grown)
        if self._open is Reasoning:
            block["signature"] = self._signature
            self._delta("signature_delta", "signature", self._signature)
            self._signature = SIGNATURE
        self._open = None
        self._tell("content_block_stop", index=len(self._content) - 1)

    def take_text(self, text: str) -> None:
        self._grow(Text, text)

    def _take_reasoning(self, event: Reasoning) -> None:
        if self._thinks:
            self._grow(Reasoning, event.text)

    def _take_encrypted(self, event: Encrypted) -> None:
        """What only the upstream can read of the thinking: with what was told of it, or by itself."""
        signature = f"{SIGNATURE}.{event.content}"
        if self._open is Reasoning:
            self._signature = signature
            self._stop()
        elif self._thinks:
            self._start({"type": "redacted_thinking", "data": signature})
            self._tell("content_block_stop", index=len(self._content) - 1)

    def _take_part(self, part: CallPart) -> None:
        """A piece of a call that is being made."""
        if self._piece_told is None:
            self._piece_told = 0
            self._start({"type": "tool_use", "id": part.id, "name": part.name, "input": {}})
        if part.arguments:
            self._piece_told += len(part.arguments)
            self._delta("input_json_delta", "partial_json", part.arguments)

    def _take_call(self, call: FunctionCall) -> None:
        if self._piece_told is None:
            self._start({"type": "tool_use", "id": call.id, "name": call.name, "input": {}})
        for piece in in_pieces(call.arguments[self._piece_told or 0 :]):
            self._delta("input_json_delta", "partial_json", piece)
        self._piece_told = None
        self._content[-1]["input"] = arguments_of(call)
        self._tell("content_block_stop", index=len(self._content) - 1)

    def _take_finish(self, event: Finish) -> None:
        self._stop()
        usage = self._usage() if self.usage_told else {"output_tokens": self.counted()[1]}
        self._tell("message_delta", delta=self._ending(), usage=usage)
        self._tell("message_stop")

    TAKES = {
        **_NOT_TOLD,
        Begin: lambda self, event: None,  # which `feed` sees to
        Reasoning: _take_reasoning,
        Encrypted: _take_encrypted,
        CallPart: _take_part,
        FunctionCall: _take_call,
        Finish: _take_finish,
    }


_NO_CACHE = {"cache_creation_input_tokens": 0, "cache_read_input_tokens": 0}
_STOP_REASONS = {
    "stop": "end_turn",
    "length": "max_tokens",
    "tool_calls": "tool_use",
    "content_filter": "refusal",
}
# What blocks that grow are: type, the type of their deltas, and the field of their text.
_BLOCKS: Mapping[type, tuple[str, str, str]] = {
    Text: ("text", "text_delta", "text"),
    Reasoning: ("thinking", "thinking_delta", "thinking"),
}


def event_of_failed_message(error: ApiError) -> bytes:
    """The last event of a message that broke off."""
    return f"event: error\ndata: {compact(error.body())}\n\n".encode()


# ============================================================================================================
# ollama: Ollama's API
# ============================================================================================================

OLLAMA_VERSION = "0.13.0"  # of the API that is spoken here; clients refuse what is too old
OLLAMA_FIELDS: Types = {
    "model": _TEXT, "name": _TEXT, "messages": _LIST, "prompt": _TEXT, "system": _TEXT, "suffix": _TEXT, "images": _LIST,
    "tools": _LIST, "options": _OBJECT, "stream": _FLAG,
}  # fmt: skip
_THINKING = ("low", "medium", "high", "max")


def ollama_model(body: Mapping[str, Any]) -> str:
    """The model that a request names; all of them are the latest."""
    name = body.get("model") or body.get("name")
    return model_of({"model": name.removesuffix(":latest") if isinstance(name, str) else name})


def parse_ollama(body: Mapping[str, Any], chats: bool) -> Turn | None:
    """A request of Ollama's for a chat, else for a completion; None for one that only has a model loaded. 400 names what
    is wrong."""
    check_types(body, OLLAMA_FIELDS)
    model = ollama_model(body)
    messages = _ollama_messages(body, chats)
    if not messages:
        return None
    options = body.get("options") or {}
    check_types(options, {"num_predict": _INTEGER}, "options.")
    most = options.get("num_predict")
    tools = Tools()
    tools.add_all(body.get("tools") or [], "tools")
    offered = tools.offered(None, True)
    think = body.get("think")
    question = Question(
        tuple(messages),
        model,
        effort=think if think in _THINKING else "none" if think is False else "",
        hosted=offered.hosted,
        offer=offered.offer,
        shape=_ollama_shape(body.get("format")),
    )
    stops = _stops(options.get("stop"), "options.stop")
    streams = body.get("stream") is not False
    return Turn(question, streams, most if most and most > 0 else None, stops, left_out=tuple(tools.left_out))


def _ollama_shape(form: Any) -> Shape | None:
    if isinstance(form, dict):
        return parse_shape({"type": "json_schema", "schema": form}, "format")
    if form not in (None, "", "json"):
        raise unfit("format", "must be json or a JSON Schema.")
    return Shape(None) if form else None


def _ollama_messages(body: Mapping[str, Any], chats: bool) -> list[Message]:
    """The messages of a chat, or of a completion."""
    if body.get("suffix"):
        raise unfit("suffix", "cannot be had: the model does not fill gaps.")
    values = body.get("messages") or []
    if not chats:
        prompt = {"role": "user", "content": body.get("prompt"), "images": body.get("images")}
        values = [prompt] if prompt["content"] or prompt["images"] else []
        if values and body.get("system"):
            values.insert(0, {"role": "system", "content": body["system"]})
    calls: Calls = {}
    unanswered: list[str] = []  # names of functions that were called
    messages = []
    for i, value in enumerate(values):
        message = _ollama_message(value, f"messages[{i}]." if chats else "", calls, unanswered)
        unanswered += [part.name for part in message.parts if isinstance(part, FunctionCall)]
        messages.append(message)
    return messages


def _ollama_message(value: Any, where: str, calls: Calls, unanswered: list[str]) -> Message:
    """A message; a result that does not say of what it is, is of the first call without one."""
    if not isinstance(value, dict):
        raise unfit(where[:-1], "must be an object with `role` and `content`.")
    given = {name: one for name, one in value.items() if name in ("role", "tool_calls", "tool_call_id")}
    given |= {"content": value.get("content") or "", "name": value.get("tool_name") or value.get("name")}
    if value.get("role") == "tool" and not given["name"] and not given.get("tool_call_id"):
        given["name"] = next(iter(unanswered), None)
    with contextlib.suppress(ValueError):
        unanswered.remove(given["name"])
    message = _message(given, where[:-1], calls, False)
    images = value.get("images") or []
    if not isinstance(images, list) or not all(isinstance(one, str) for one in images):
        raise unfit(f"{where}images", "must be a list of images in base64.")
    found = []
    for i, image in enumerate(images):
        here = f"{where}images[{i}]"
        if image.startswith("data:"):
            found.append(_from_url(image, here, image=True))
        else:
            found.append(Attachment(here, image=True, blob=_unbased(image, 0, here)))
    if message.role == "tool":
        (part,) = message.parts
        answered = cast(ToolResult, part)
        return Message("tool", (replace(answered, parts=(*answered.parts, *found)),))
    thought = [Thought(value["thinking"])] if isinstance(value.get("thinking"), str) else []
    return Message(message.role, (*thought, *found, *message.parts))


class OllamaAnswer(Rendering):
    """An answer as Ollama gives it: JSON objects, a line each."""

    def __init__(self, turn: Turn, tokens: Tokens, name: str, chats: bool, thinks: bool) -> None:
        """`name` is the client's for the model; `chats`: whether it is a chat's, else a completion's; `thinks`: whether the
        client is told what the model thought."""
        super().__init__(turn, tokens)
        self._name, self._chats, self._thinks = name, chats, thinks
        self._asked_at = time.monotonic()
        self._answered_at = 0.0
        self._told_calls = 0

    def _object(self, text: str, done: bool = False, **more: Any) -> dict[str, Any]:
        """A piece of the answer; `more` belongs to its message."""
        told: dict[str, Any] = {"model": self._name, "created_at": iso(time.time())}
        if self._chats:
            told["message"] = {"role": "assistant", "content": text} | more
        else:
            told |= {"response": text} | more
        return told | {"done": done}

    def _tell(self, told: dict[str, Any]) -> None:
        self.pieces.append(f"{compact(told)}\n")

    def begin(self) -> None:
        self._answered_at = time.monotonic()

    def take_text(self, text: str) -> None:
        self._tell(self._object(text))

    def _take_reasoning(self, event: Reasoning) -> None:
        if self._thinks:
            self._tell(self._object("", thinking=event.text))

    def _take_call(self, call: FunctionCall) -> None:
        self._tell(self._object("", tool_calls=[self._call(call, self._told_calls)]))
        self._told_calls += 1

    @staticmethod
    def _call(call: FunctionCall, index: int) -> dict[str, Any]:
        name = full_name(call.name, call.namespace)
        told = {"index": index, "name": name, "arguments": arguments_of(call)}
        return {"id": call.id, "function": told}

    def _take_finish(self, event: Finish) -> None:
        self._tell(self._object("", True) | self._end())

    def _end(self) -> dict[str, Any]:
        """What the last object has more: why it ended, tokens, and nanoseconds."""
        prompt, answer, _ = self.counted()
        now = time.monotonic()
        waited = self._answered_at - self._asked_at
        spans = {"total_duration": now - self._asked_at, "load_duration": 0.0}
        spans |= {"prompt_eval_duration": waited, "eval_duration": now - self._answered_at}
        counts = {"prompt_eval_count": prompt, "eval_count": answer}
        reason = "length" if self._reason == "length" else "stop"
        return {"done_reason": reason} | {name: int(span * 1e9) for name, span in spans.items()} | counts

    def whole(self) -> dict[str, Any]:
        """The answer in one object."""
        more: dict[str, Any] = {}
        if self._thinks and self._reasoning:
            more["thinking"] = "".join(self._reasoning)
        if self._calls:
            more["tool_calls"] = [self._call(call, i) for i, call in enumerate(self._calls)]
        return self._object(self.text, True, **more) | self._end()

    TAKES = {
        **_NOT_TOLD,
        Begin: lambda self, event: None,  # which `feed` sees to
        Reasoning: _take_reasoning,
        FunctionCall: _take_call,
        Finish: _take_finish,
    }


def line_of_failure(error: ApiError) -> bytes:
    """The last line of an answer of Ollama's that broke off."""
    return f"{compact(error.body())}\n".encode()


def ollama_loaded(name: str, chats: bool, reason: str) -> dict[str, Any]:
    """The answer to a request without a question."""
    answer = {"message": {"role": "assistant", "content": ""}} if chats else {"response": ""}
    told = {"model": name, "created_at": iso(time.time())} | answer
    return told | {"done_reason": reason, "done": True}


def ollama_facts(name: str) -> dict[str, Any]:
    """A model as Ollama lists it; what it weighs nobody here knows."""
    details = {"parent_model": "", "format": "", "family": "chatgpt", "families": ["chatgpt"]}
    details |= {"parameter_size": "", "quantization_level": ""}
    return {"digest": hashlib.sha256(name.encode()).hexdigest(), "size": 0, "details": details}


# Tokens that a question may have. The site tells nobody; it is what its larger plans have.
OLLAMA_CONTEXT = 128_000
OLLAMA_CAPABILITIES = ["completion", "tools", "vision", "thinking"]


# ============================================================================================================
# http: listening, parsing, limits, auth, router, streaming out
# ============================================================================================================

MAX_LINE = 8192  # bytes of the request line
MAX_HEAD = 32768  # bytes of the request line and all headers
MAX_HEADERS = 100
MAX_PUBLIC_BODY = 64 << 10  # bytes of the body of a request that anybody may make
MAX_FIELDS = 1000  # of a form or a query
# Bytes of all request bodies at a time.
ROOM_IN_MEMORY = 256 << 20
ROOM_ON_DISK = 4 << 30
CRUMB, MAX_CRUMBS = 256, 32  # reads of fewer bytes, so many of which are a client that sends in crumbs
BODY_RATE = 10_000  # bytes a second that extend the time a client has for its body
SEND_TIMEOUT = 30  # seconds without a byte read by a client that end its answer
# Seconds in which a client may go on sending after its answer, before the connection is closed.
DRAIN_TIME = 2.0
LINGER = 0.1  # seconds that a thread waits for a connection's next request itself
_TOKEN = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")
_TARGET = re.compile(r"[\x21-\x7e]+")
_VALUE = re.compile(r"[\t\x20-\x7e\x80-\xff]*")
_CHUNK_LINE = re.compile(rb"[\t\x20-\x7e\x80-\xff]*\r")
_CHUNK_SIZE = re.compile(rb"[0-9A-Fa-f]{1,15}")
_BARE_LF = re.compile(rb"(?<!\r)\n")


@dataclass
class Request:
    """A request as routes see it: `path` is decoded and without API_PREFIX, header names are lower-case."""

    method: str
    path: str
    query: dict[str, str]
    headers: dict[str, str]
    body: Blob
    peer: str
    watch: Watch
    id: str = ""
    params: dict[str, str] = field(default_factory=dict)
    guest: Account | None = None
    asker: str = ""
    scope: Scope = Scope("nobody")  # whose conversations, files and responses it may use
    user: str = ""  # the API user whose requests and tokens are counted
    route: str = "none"
    endpoint: Endpoint | None = None
    admin: bool = False  # whether it has the administrator's key
    key: str = ""
    raw_query: str = ""
    port: int = 0  # that the server listens on
    base: str = ""  # the URL of this server as the client has it, where that is known
    version: str = "1.1"

    def json(self, known: KnownTools | None = None) -> dict[str, Any]:
        """The body, of which tools that are `known` are not read again."""
        return parse_object(self.body, known)


class Part(NamedTuple):
    """A field of a form; a file has a name, other fields have None."""

    file_name: str | None
    content_type: str
    blob: Blob

    def text(self) -> str:
        return self.blob.read().decode("utf-8", "replace")


def parse_form(headers: Mapping[str, str], body: Blob) -> dict[str, list[Part]]:
    """The fields of a form by name, in either encoding that browsers use. Files are parts of the body, not copied."""
    kind = headers.get("content-type", "")
    if kind.lower().startswith("multipart/form-data"):
        return _multipart(kind, body)
    form: dict[str, list[Part]] = {}
    text = body.read().decode("utf-8", "replace")
    for name, value in fields_of(text):
        form.setdefault(name, []).append(Part(None, "", Blob(value.encode("utf-8", "replace"))))
    return form


def fields_of(text: str) -> list[tuple[str, str]]:
    """The fields of a query, or of a form in the same encoding, counted before they are built."""
    if text.count("&") >= MAX_FIELDS:
        raise invalid(None, f"There are more than {MAX_FIELDS} fields; send fewer.")
    return urllib.parse.parse_qsl(text, keep_blank_values=True)


MAX_PARTS, MAX_PART_HEAD = 100, 4096
_BOUNDARY = re.compile(
    r"""(?i);\s*boundary=(?:"([0-9A-Za-z'()+_,./:=? -]{0,69}[0-9A-Za-z'()+_,./:=?-])"|([!#$%&'*+.^_`|~0-9A-Za-z-]{1,70}))\s*(?:;|$)"""
)
_PART_PARAM = re.compile(r""";\s*(name|filename)=(?:"((?:[^"\\\r\n]|\\.)*)"|([^\s;",]+))\s*(?=;|$)""")


def _multipart(content_type: str, body: Blob) -> dict[str, list[Part]]:
    """multipart/form-data (RFC 7578) as clients write it: no preamble, CRLF alone, every part a named form-data one."""

    def wrong(what: str) -> ApiError:
        return invalid(None, f"The form cannot be read: {what}; send multipart/form-data as a browser does.")

    if not (match := _BOUNDARY.search(content_type)):
        raise wrong("its Content-Type names no boundary")
    mark = b"--" + (match[1] or match[2]).encode()
    if body.read(0, len(mark)) != mark:
        raise wrong("it does not begin with its boundary")
    form: dict[str, list[Part]] = {}
    at = len(mark)
    for _ in range(MAX_PARTS + 1):
        after = body.read(at, 4)
        if after[:2] == b"--":
            if after[2:] not in (b"", b"\r\n") or at + len(after) < body.size:
                raise wrong("data follows its end")
            return form
        if after[:2] != b"\r\n":
            raise wrong("a boundary is followed by other bytes")
        head = body.read(at + 2, MAX_PART_HEAD)
        size = head.find(b"\r\n\r\n")
        if size < 0:
            raise wrong("a part's header lines do not end")
        start = at + 2 + size + 4
        end = body.find(b"\r\n" + mark, start)
        if end < 0:
            raise wrong("a part does not end")
        name, part = _part_of(head[:size], body.part(start, end - start), wrong)
        form.setdefault(name, []).append(part)
        at = end + 2 + len(mark)
    raise wrong(f"it has more than {MAX_PARTS} parts")


def _part_of(head: bytes, blob: Blob, wrong: Callable[[str], ApiError]) -> tuple[str, Part]:
    """A part by its header lines: its field's name, and itself."""
    try:
        lines = head.decode().split("\r\n")
    except UnicodeDecodeError:
        raise wrong("a part's header lines are not UTF-8") from None
    headers = {}
    for line in lines:
        name, colon, value = line.partition(":")
        fits = colon and _TOKEN.fullmatch(name) and not re.search(r"[\x00-\x08\n-\x1f]", value)
        if not fits or name.lower() in headers:
            raise wrong("a part's header line is malformed")
        headers[name.lower()] = value.strip()
    kind, _, rest = headers.get("content-disposition", "").partition(";")
    params = _PART_PARAM.finditer(";" + rest)
    given = {m[1]: m[3] if m[2] is None else re.sub(r"\\(.)", r"\1", m[2]) for m in params}
    if kind.strip().lower() != "form-data" or "name" not in given:
        raise wrong("a part is not named form-data")
    if headers.get("content-transfer-encoding", "binary").lower() not in ("binary", "7bit", "8bit"):
        raise wrong("a part has a transfer encoding")
    return given["name"], Part(given.get("filename"), headers.get("content-type", ""), blob)


@dataclass
class Reply:
    """A whole answer."""

    status: int = 200
    body: bytes = b""
    content_type: str = "application/json"
    headers: dict[str, str] = field(default_factory=dict)


@dataclass
class Stream:
    """An answer that is written as it comes: `write` does that, from beginning to end, in the request's thread, and may have
    the loop go on with it meanwhile.

    The status is sent with the first bytes. An ApiError raised before that is answered as such, and a Reply that is returned
    before that is sent instead; an ApiError raised later becomes the last event of an event stream, and cuts another off.
    `signs`: whether a sign of life may stand between two events; `opens`: whether it may come before anything else.
    `failed` makes the last event of an ApiError, where that is not OpenAI's; `end` is what an event ends with.
    """

    write: Callable[[Writer], Reply | None]
    status: int = 200
    content_type: str = "text/event-stream; charset=utf-8"
    headers: dict[str, str] = field(default_factory=dict)
    signs: bool = True
    opens: bool = False
    failed: Callable[[ApiError], bytes] | None = None
    end: bytes = b"\n\n"


# An answer's pieces: bytes, and how many events they are.
Sent = Generator[tuple[bytes, int], None, None]


def streamed(pieces: Sent, **facts: Any) -> Stream:
    """An answer in pieces that are made one after the other; `facts` are fields of a Stream."""

    def write(writer: Writer) -> None:
        with contextlib.closing(pieces):
            for data, events in pieces:
                writer.write(data, events)
                writer.drain()

    return Stream(write, **facts)


def json_reply(value: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Reply:
    """A JSON value as an answer."""
    return Reply(status, compact(value).encode("utf-8", "replace"), headers=dict(headers or {}))


def malformed(message: str) -> ApiError:
    """A 400 for what is not HTTP as it is spoken here."""
    return ApiError("invalid_request_error", f"Malformed HTTP: {message}.")


def parse_head(head: bytes) -> tuple[str, str, str, dict[str, str]]:
    """Method, target, version and headers of a request's head (without its last empty line).

    Refused with 400 is whatever two parsers might read differently: bare line feeds, folded lines, white space before
    a colon, control characters, two Host or Content-Length lines, a length with chunked, a length that is not plain
    digits, a transfer coding other than chunked, a version other than 1.0 and 1.1.
    """
    first, *lines = head.decode("latin-1").split("\r\n")
    if len(first) > MAX_LINE:
        raise ApiError("uri_too_long", f"The request line is longer than {MAX_LINE} bytes.")
    words = first.split(" ")
    if len(words) != 3 or not _TOKEN.fullmatch(words[0]) or not _TARGET.fullmatch(words[1]):
        raise malformed("the request line")
    method, target, version = words
    if version not in ("HTTP/1.1", "HTTP/1.0"):
        raise malformed("an HTTP version other than 1.0 and 1.1")
    if len(lines) > MAX_HEADERS:
        raise ApiError("headers_too_large", f"There are more than {MAX_HEADERS} header lines.")
    headers: dict[str, str] = {}
    for line in lines:
        name, colon, value = line.partition(":")
        if not colon or not _TOKEN.fullmatch(name) or not _VALUE.fullmatch(value):
            raise malformed("a header line")
        name = name.lower()
        value = value.strip(" \t")
        if name in headers:
            if name in ("host", "content-length", "transfer-encoding", "authorization"):
                raise malformed(f"two {name} headers")
            value = f"{headers[name]}, {value}"
        headers[name] = value
    if version == "HTTP/1.1" and "host" not in headers:
        raise malformed("no Host header")
    length = headers.get("content-length")
    coding = headers.get("transfer-encoding")
    if coding is not None and (length is not None or coding.lower() != "chunked" or version == "HTTP/1.0"):
        raise malformed("a transfer coding other than chunked alone")
    if length is not None and not re.fullmatch(r"[0-9]{1,18}", length):
        raise malformed("a Content-Length that is not plain digits")
    return method, target, version, headers


_ABSOLUTE = re.compile(r"(?i)https?://(?:[0-9a-z._~-]+|\[[0-9a-f:.]+\])(?::[0-9]{1,5})?(?=[/?]|\Z)")
_ENCODED_PLAIN = re.compile(
    r"%(?:2[dDeEfF]|3[0-9]|4[1-9a-fA-F]|5[0-9aAcCfF]|6[1-9a-fA-F]|7[0-9aA]|[01][0-9a-fA-F]|7[fF])"
)


def parse_target(target: str) -> tuple[str, str]:
    """Path, decoded, and query of a request's target: a path, or an http:// or https:// URL as it is sent to proxies.

    A path has one spelling, so that a front server and this one never take it for two. Refused with 400 are `//`, `#`,
    back-slashes, and what is percent-encoded although it could stand as it is: letters, digits, `-`, `.`, `_`, and
    what would be a slash or a control character.
    """
    if match := _ABSOLUTE.match(target):
        target = target[match.end() :]
        target = target if target.startswith("/") else "/" + target
    raw, _, query = target.partition("?")
    if not raw.startswith("/") or "#" in target or "\\" in raw or "//" in raw:
        raise malformed("the request's target")
    if "%" not in raw:
        return raw, query
    if _ENCODED_PLAIN.search(raw) or re.search(r"%(?![0-9a-fA-F]{2})", raw):
        raise malformed("a path that is encoded more than it must be, or wrongly")
    try:
        return urllib.parse.unquote(raw, errors="strict"), query
    except UnicodeDecodeError:
        raise malformed("a path that is not UTF-8") from None


class Wire:
    """A client's socket: reads heads and bodies with their limits and time-outs, keeps what was sent ahead."""

    def __init__(self, sock: socket.socket, timeout: float) -> None:
        self._sock, self._timeout = sock, timeout
        self._ahead = b""
        self._limited = 0.0
        self._poll = select.poll()
        self._poll.register(sock.fileno(), select.POLLIN)
        self._crumbs = 0  # reads of this request that brought next to nothing

    def _limit(self, seconds: float) -> None:
        """The kernel's own time-out: a timed Python socket calls poll() before each read and write, as TLS must."""
        if seconds == self._limited:
            return
        self._limited = seconds
        if isinstance(self._sock, ssl.SSLSocket):
            self._sock.settimeout(seconds)
            return
        value = struct.pack("ll", int(seconds), int(seconds % 1 * 1e6))
        self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, value)

    def ahead(self) -> bytes:
        """The bytes that have come after the request; they are the caller's from now on."""
        data, self._ahead = self._ahead, b""
        return data

    def lingers(self, seconds: float) -> bool:
        """Whether something of another request is there within a moment, or its end."""
        if self._ahead or (isinstance(self._sock, ssl.SSLSocket) and self._sock.pending()):
            return True
        return bool(self._poll.poll(seconds * 1000))

    def replying(self) -> None:
        """To be called before a whole answer: TLS has one time-out for both ways, others have SO_SNDTIMEO for this one."""
        if isinstance(self._sock, ssl.SSLSocket):
            self._limit(SEND_TIMEOUT)

    def sending(self) -> None:
        """To be called before an answer that is sent as it comes: from now on nobody waits for the socket."""
        if isinstance(self._sock, ssl.SSLSocket):
            self._sock.settimeout(0.0)

    def sent(self) -> None:
        """To be called behind it."""
        self._limited = -1.0

    def _more(self, deadline: float) -> bytes:
        """The next bytes, b"" at the end; ApiError request_timeout when they are not there in time. What is sent in
        crumbs is left to gather, up to a twentieth of a second: each read takes its time."""
        if self._crumbs > MAX_CRUMBS:
            time.sleep(min(0.05, 0.001 * (self._crumbs - MAX_CRUMBS)))
        left = deadline - time.monotonic()
        try:
            if left > 0:
                if left < self._timeout - 0.5:
                    self._limit(max(left, 0.01))
                data = self._sock.recv(16384)
                if len(data) < CRUMB:
                    self._crumbs += 1
                return data
        except (BlockingIOError, TimeoutError, ssl.SSLWantReadError):
            pass
        except OSError:
            return b""
        raise ApiError("request_timeout", "The request took too long to arrive; send it faster.")

    def head(self) -> bytes | None:
        """The next request's head without its last empty line; None when the client is done.

        A client that sends nothing at all is given the time-out too, and then left without a word.
        """
        self._limit(self._timeout)
        data, begun, seen = self._ahead, False, 0  # how much of it holds no end
        self._crumbs = 0  # what comes in crumbs comes in few of them, so that joining them costs little
        deadline = time.monotonic() + self._timeout
        while True:
            if not begun and data not in (b"", b"\r"):  # one empty line before a request is forgiven
                data = data.removeprefix(b"\r\n")
                begun = True
            end = data.find(b"\r\n\r\n", max(seen - 3, 0))
            if 0 <= end <= MAX_HEAD:
                self._ahead = data[end + 4 :]
                return data[:end]
            if _BARE_LF.search(data, max(seen - 1, 0)):
                raise malformed("a line feed without carriage return")
            seen = len(data)
            if len(data) > MAX_HEAD:
                line = data.find(b"\r\n")
                if not 0 <= line <= MAX_LINE:
                    raise ApiError("uri_too_long", f"The request line is longer than {MAX_LINE} bytes.")
                raise ApiError("headers_too_large", f"The headers are longer than {MAX_HEAD} bytes.")
            try:
                more = self._more(deadline)
            except ApiError:
                if data:
                    raise
                return None
            if not more:
                return None
            if not begun:  # the wait for a request is over, the time to send it begins
                deadline = time.monotonic() + self._timeout
            data += more

    def body(self, headers: Mapping[str, str], most: int, share: Share) -> Blob:
        """The request's body, by length or in chunks; request_too_large past `most` bytes, overloaded when there is no
        room for more bodies."""
        start = time.monotonic()
        read = 0
        size = f"{most >> 20} MiB, see MAX_BODY_MB" if most >= 1 << 20 else f"{most >> 10} KiB here"
        too_large = ApiError("request_too_large", f"The body is larger than allowed ({size}).")

        def more() -> bytes:
            nonlocal read
            data = self._more(start + self._timeout + read / BODY_RATE)
            if not data:
                raise ClientGone
            read += len(data)
            return data

        if "transfer-encoding" in headers:
            return self._chunks(more, most, too_large, share)
        length = int(headers.get("content-length", 0))
        if length > most:
            raise too_large
        body = Blob(self._ahead[:length], share)
        self._ahead = self._ahead[length:]
        while (left := length - body.size) > 0:
            data = more()
            body.write(data[:left])
            self._ahead = data[left:]
        return body

    def _chunks(self, more: Callable[[], bytes], most: int, too_large: ApiError, share: Share) -> Blob:
        body = Blob(share=share)
        data = bytearray(self._ahead)
        beside = 0
        small = bytearray()  # chunks that are written together
        while True:
            digits, _, extension = self._line(data, more).partition(b";")
            beside += len(extension)
            if not _CHUNK_SIZE.fullmatch(digits):
                raise malformed("a chunk's size")
            left = int(digits, 16)
            if not left:
                break
            if body.size + len(small) + left > most:
                raise too_large
            while len(data) < left:  # a chunk may be as large as the body
                body.write(bytes(small + data))
                left -= len(data)
                small.clear()
                data[:] = more()
            small += data[:left]
            del data[:left]
            if len(small) > PIECE:
                body.write(bytes(small))
                small.clear()
            while len(data) < 2:
                data += more()
            if data[:2] != b"\r\n":
                raise malformed("a chunk's end")
            del data[:2]
            if beside > MAX_LINE:
                raise malformed("so much beside the chunks")
        while line := self._line(data, more):
            beside += len(line)
            if beside > MAX_LINE:
                raise ApiError("headers_too_large", "The trailers are too long.")
        body.write(bytes(small))
        self._ahead = bytes(data)
        return body

    @staticmethod
    def _line(data: bytearray, more: Callable[[], bytes]) -> bytes:
        while (end := data.find(b"\n")) < 0:
            if len(data) > MAX_LINE:
                raise malformed("a line of the chunked body")
            data += more()
        line = bytes(data[:end])
        if end > MAX_LINE or not _CHUNK_LINE.fullmatch(line):
            raise malformed("a line of the chunked body")
        del data[: end + 1]
        return line[:-1]


_KEY = re.compile(r"[A-Za-z0-9+/]{22}==")  # 16 bytes in base64, and nothing else is


def handshake(request: Request) -> dict[str, str]:
    """The headers of the 101 (RFC 6455, 4.2); ApiError for what is none, or speaks another version. Extensions are not
    accepted, and subprotocols are not chosen."""
    headers = request.headers

    def words(name: str) -> list[str]:
        return [word.strip(" \t").lower() for word in headers.get(name, "").split(",")]

    key = headers.get("sec-websocket-key", "")
    for met, need in (
        ("websocket" in words("upgrade"), "`Upgrade: websocket`"),
        ("upgrade" in words("connection"), "`Connection: Upgrade`"),
        (_KEY.fullmatch(key), "a Sec-WebSocket-Key of 16 bytes in base64"),
    ):
        if not met:
            raise malformed(f"a WebSocket begins with {need}")
    if headers.get("sec-websocket-version") != "13":
        known = {"Sec-WebSocket-Version": "13", "Upgrade": "websocket"}
        raise ApiError("upgrade_required", "Only version 13 of WebSocket is spoken here.", headers=known)
    return {"Upgrade": "websocket", "Connection": "Upgrade", "Sec-WebSocket-Accept": accept_key(key)}


@dataclass
class Upgrade:
    """An answer that turns the connection into a WebSocket: `headers` are those of the 101. `serve` has it to its end, or
    returns True where it listens on without a thread."""

    headers: dict[str, str]
    serve: Callable[[WebSocket], object]
    status: int = 101


class Client(Watch):
    """The client as someone who waits: gone when its side of the connection is closed."""

    def __init__(self, sock: socket.socket, server: Server) -> None:
        super().__init__()
        self._poll = select.poll()
        self._poll.register(sock.fileno(), select.POLLRDHUP)
        self._server = server
        self.writer: Writer | None = None  # of the answer that it gets as it comes

    def check(self) -> None:
        if (self.writer and self.writer.gone) or self.hung_up():
            raise ClientGone
        if self._server.ending:
            raise overloaded("The server is shutting down")

    def hung_up(self) -> bool:
        """Whether its side of the connection is closed."""
        return bool(self._poll.poll(0))

    def look_after(self) -> float:
        self.check()
        return self.writer.sign() if self.writer else self.LOOK


HEARTBEAT_COMMENT = b": \n\n"
TLS_RECORD = 1 << 14
MAX_UNSENT = 1 << 17  # bytes that wait for a client to read, before no more is fetched for it


class Writer(Ticking):
    """An answer that is sent as it comes, by the request's thread and, while that waits, by the loop.

    What the client's socket does not take at once waits here, and the loop sends it; `full` says when it is enough. A
    client that reads nothing for SEND_TIMEOUT seconds, or hangs up, is `gone`: then nothing is sent, and who waits for it
    wakes up.
    """

    def __init__(self, connection: Connection, request: Request, stream: Stream, keep: bool) -> None:
        self.begun = self.gone = self.full = False
        self.events = 0
        self.on_room: Callable[[], object] = int
        self._connection = connection
        self._request = request
        self._stream = stream
        self.keep = keep
        self._sock, self._watch, self._loop = connection.sock, connection.client, connection.server.loop
        self._secure = isinstance(self._sock, ssl.SSLSocket)
        self._chunked = connection.version == "1.1"
        self._heartbeat = float(connection.server.settings.heartbeat)
        self._write_lock = threading.Lock()
        self._unsent: list[bytes] = []
        self._size = 0  # of it
        self._between = True  # whether what was written last is a whole event
        self._last = time.monotonic()  # when something was written, or taken by the client
        self._watched = self._left = self._ended = False

    def write(self, data: bytes, events: int = 0) -> None:
        """Sends bytes of the answer, which are so many events, now or once there is room; never waits. Once per event."""
        if not data:  # a chunk of none would be the last
            return
        with self._write_lock:
            self.events += events
            self._between = data.endswith(self._stream.end)
            self._send(self._framed(data))

    def _framed(self, data: bytes) -> bytes:
        return b"%x\r\n%b\r\n" % (len(data), data) if self._chunked else data

    def drain(self) -> None:
        """Waits until there is room for more: for the request's thread. ClientGone when there is nobody to send to."""
        if self.full:
            self._watch.wait(lambda: self.gone or not self.full)
        if self.gone:
            raise ClientGone

    def sign(self) -> float:
        """Gives a sign of life if nothing was sent for HEARTBEAT seconds: the seconds until the next look."""
        with self._write_lock:
            left = self._last + self._heartbeat - time.monotonic()
            quiet = self._between and not self._unsent
            if left <= 0 and quiet and self._stream.signs and (self.begun or self._stream.opens):
                self._send(self._framed(HEARTBEAT_COMMENT))
        if left <= 0:
            left = self._heartbeat
        # Whoever hangs up is noticed by the loop, once it watches.
        return left if self._watched else min(left, Watch.LOOK)

    def end(self, last: bytes = b"") -> None:
        """Sends the end, behind a last event, and waits until the client has it."""
        if last and not self._ended:
            self.write(last if self._between else self._stream.end + last, 1)
        with self._write_lock:
            self._send(b"0\r\n\r\n" if self._chunked and not self._ended else b"")
            self._ended = True
        self._watch.wait(lambda: self.gone or not self._unsent)
        if self.gone:
            raise ClientGone

    def close(self) -> None:
        """Leaves the socket to the connection again."""
        if self.begun:
            with self._write_lock:
                self._left = True
            self._loop.soon(self._leave)
            self._connection.wire.sent()

    def _send(self, data: bytes) -> None:
        """Sends what there is room for, and puts the rest aside; the lock is held. Once per event."""
        if not self.begun:
            self.begun = True
            data = self._connection.head_of(self._request, self._stream, self.keep) + data
            self._connection.wire.sending()
            self._loop.soon(self._enter)
        if self.gone or not data:
            return
        self._last = time.monotonic()
        sent = 0 if self._unsent else self._put(data)
        if sent < len(data) and not self.gone:
            self._unsent.append(data[sent:])
            self._size += len(data) - sent
            self.full = self._size > MAX_UNSENT
            if len(self._unsent) == 1:
                self._loop.soon(self._await_room)

    def _put(self, data: bytes) -> int:
        """Writes as much as the socket takes now; how many bytes that was."""
        sent = 0
        try:
            if not self._secure:
                return self._sock.send(data, socket.MSG_DONTWAIT)
            while sent < len(data):  # TLS tells of nothing before the whole of what it was given is out
                sent += self._sock.send(data[sent : sent + TLS_RECORD])
        except _NOT_READY:
            pass
        except OSError:
            self._lose()
        return sent

    def _lose(self) -> None:
        self.gone = True
        self._unsent.clear()
        self._size, self.full = 0, False
        self._watch.ring()

    # -- in the loop ---------------------------------------------------------------------------------------------

    def _enter(self) -> None:
        """Watches whether the client hangs up."""
        with self._write_lock:
            if not self._left:
                self._await()
                self._watched = True

    def _leave(self) -> None:
        self._loop.ticking.pop(self, None)
        self._loop.unwatch(self._connection.fd, self._ready)

    def _await_room(self) -> None:
        with self._write_lock:
            if self._unsent and not self._left:
                self._await()

    def _await(self) -> None:
        """Watches whether the client hangs up and, if something waits for that, reads; the lock is held."""
        room = select.EPOLLOUT if self._unsent else 0
        self._loop.watch(self._connection.fd, select.EPOLLRDHUP | room, self._ready)
        if room:
            self._loop.ticking[self] = None
        else:
            self._loop.ticking.pop(self, None)

    def _ready(self, events: int) -> None:
        """The client has read something, or hung up."""
        with self._write_lock:
            if self._left:
                return
            if events & _HUNG_UP and self._watch.hung_up():
                self._lose()
            if self._unsent:
                data = b"".join(self._unsent)
                sent = self._put(data)
                if sent:
                    self._last = time.monotonic()
                self._unsent = [data[sent:]] if sent < len(data) and not self.gone else []
                self._size = sum(map(len, self._unsent))
                self.full = self._size > MAX_UNSENT
            if self.gone:
                self._leave()
            elif not self._unsent:
                self._await()
            room = self._size <= MAX_UNSENT // 2
        if room:
            on_room, self.on_room = self.on_room, int
            on_room()
            self._watch.ring()

    def tick(self, now: float) -> None:
        if now - self._last > SEND_TIMEOUT:
            with self._write_lock:
                self._lose()
                self._leave()


def tls_context(settings: Settings) -> ssl.SSLContext | None:
    """The TLS context for HTTPS, None for HTTP; SettingError when the files cannot be used."""
    if not settings.tls_cert or not settings.tls_key:
        return None
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    try:
        context.load_cert_chain(settings.tls_cert, settings.tls_key, password=lambda: b"")
    except (OSError, ValueError) as error:
        accepted = "a PEM certificate chain and its private key, readable and without passphrase"
        text = f"TLS_CERT, TLS_KEY: {settings.tls_cert}, {settings.tls_key} cannot be used ({error}); accepted: {accepted}"
        raise SettingError(text) from None
    return context


class Application:
    """What a server serves. A request's head is looked at first: who may send what is settled before its body is read."""

    @functools.cached_property
    def loop(self) -> Loop:
        """The loop that carries its answers."""
        return Loop()

    def admit(self, request: Request) -> int:
        """The most bytes that the body of a request may have, of which only the head has come; ApiError when it is
        refused."""
        return MAX_PUBLIC_BODY

    def respond(self, request: Request) -> Reply | Stream | Upgrade:
        """The answer to a whole request."""
        raise NotImplementedError

    def shared(self) -> bool:
        """Whether pages of any web site may read the answers (CORS)."""
        return True

    def shape(self, request: Request) -> str:
        """In which of SHAPES a request is told that it failed."""
        return "openai"


def is_loopback(text: str) -> bool:
    """Whether an address, or `localhost`, is this machine by itself."""
    with contextlib.suppress(ValueError):
        address = ipaddress.ip_address(text.partition("%")[0])
        return (getattr(address, "ipv4_mapped", None) or address).is_loopback
    return text == "localhost"


def place_of(peer: str) -> str:
    """The part of an address that one person can be expected to have: a house has 2**64 of IPv6."""
    with contextlib.suppress(ValueError):
        address = ipaddress.IPv6Address(peer.partition("%")[0])
        return str(address.ipv4_mapped or int(address) >> 64)
    return peer


class Workers:
    """Threads that requests are answered in. The one that became free last takes the next; one that has had nothing to do
    for a while ends."""

    LIFE = 10.0  # seconds that a free thread waits for something to do

    def __init__(self) -> None:
        self._free_lock = threading.Lock()
        self._free: list[Worker] = []
        # What no free thread is there for. Starting one takes long enough to be a thread's own work.
        self._waiting: queue.SimpleQueue[Callable[[], object] | None] = queue.SimpleQueue()
        threading.Thread(target=self._start, name="starter", daemon=True).start()

    def run(self, job: Callable[[], object]) -> None:
        """Has a thread do a job."""
        if not self._given(job):
            self._waiting.put(job)

    def _given(self, job: Callable[[], object]) -> bool:
        """Whether there was a free thread for a job."""
        with self._free_lock:
            worker = self._free.pop() if self._free else None
        if worker is None:
            return False
        worker.job = job
        worker.bell.release()
        return True

    def _start(self) -> None:
        """Starts a thread for every job that waits for one."""
        while job := self._waiting.get():
            while not self._given(job):
                try:
                    Worker(self, job).start()
                    break
                except (RuntimeError, MemoryError):
                    log(logging.ERROR, "no thread can be started; raise the limit or lower MAX_CONNECTIONS")
                    time.sleep(0.1)

    def close(self) -> None:
        """Starts no more of them."""
        self._waiting.put(None)

    def next_job(self, worker: Worker) -> bool:
        """Waits, in a worker's thread, until there is something to do; False when the thread is to end."""
        with self._free_lock:
            self._free.append(worker)
        if worker.bell.acquire(timeout=self.LIFE):
            return True
        with self._free_lock:
            if worker in self._free:
                self._free.remove(worker)
                return False
        return worker.bell.acquire()  # it was being given something


class Worker(threading.Thread):
    """One of the threads."""

    def __init__(self, workers: Workers, job: Callable[[], object]) -> None:
        super().__init__(name="request", daemon=True)
        self.job = job
        self.bell = threading.Lock()
        self.bell.acquire()
        self._workers = workers

    def run(self) -> None:
        while True:
            self.job()
            self.job = int  # what was done is not kept
            if not self._workers.next_job(self):
                return


class Server(http.server.ThreadingHTTPServer):
    """A thread a request, up to MAX_CONNECTIONS connections; those without a request wait in the loop. The application
    answers a Request."""

    request_queue_size = 1024
    allow_reuse_address = True

    def __init__(
        self, address: tuple[str, int], application: Application, settings: Settings, metrics: Metrics,
        quiet: bool = False,
    ) -> None:  # fmt: skip
        self.application = application
        self.settings = settings
        self.metrics = metrics
        self.quiet = quiet
        self.loop = application.loop
        self.workers = Workers()
        self.room = Room(ROOM_IN_MEMORY, max(ROOM_ON_DISK, 4 * (settings.max_body_mb << 20)))
        self.prefix = f"/{settings.api_prefix}" if settings.api_prefix else ""
        self.stopping = False  # no new requests
        self.ending = False  # open answers are to end
        self._open_lock = threading.Lock()
        self._open: dict[socket.socket, Connection | None] = {}  # by the socket that was accepted
        self._places: dict[socket.socket, str] = {}  # where those come from that are counted
        self._from = Counter[str]()  # how many come from a place
        self.tls = tls_context(settings)
        if ":" in address[0]:
            self.address_family = socket.AF_INET6
        super().__init__(address, Connection)

    def server_bind(self) -> None:
        """Binds without asking DNS for the host's name, as HTTPServer would."""
        socketserver.TCPServer.server_bind(self)
        self.server_name = str(self.server_address[0])
        self.server_port = int(self.server_address[1])

    def get_request(self) -> tuple[socket.socket, Any]:
        """Accepts a connection; without file descriptors left it waits a little rather than trying at full speed."""
        try:
            return super().get_request()
        except OSError as error:
            if error.errno in (errno.EMFILE, errno.ENFILE):
                log(logging.ERROR, "no file descriptors left; raise the limit or lower MAX_CONNECTIONS")
                time.sleep(0.5)
            raise

    def verify_request(self, request: Any, client_address: Any) -> bool:
        """Refuses what is over MAX_CONNECTIONS or MAX_CONNECTIONS_PER_ADDRESS, in the accepting thread and without
        waiting."""
        peer = str(client_address[0])
        most = self.settings.max_connections_per_address
        place = "" if not most or is_loopback(peer) else place_of(peer)
        with self._open_lock:
            crowded = bool(place) and self._from[place] >= most
            if len(self._open) < self.settings.max_connections and not self.stopping and not crowded:
                self._open[request] = None
                if place:
                    self._places[request] = place
                    self._from[place] += 1
                return True
        self.metrics.add("chatproxy_requests_total", labels='route="none",status="503"')
        if not self.tls:
            text = "Too many connections from this address" if crowded else "Too many connections"
            reply = error_reply(overloaded(text))
            with contextlib.suppress(OSError):
                request.settimeout(0)
                request.send(head_bytes(reply, "1.1", "close") + reply.body)
                request.shutdown(socket.SHUT_WR)
        return False

    def process_request(self, request: Any, client_address: Any) -> None:
        """Has the loop wait for what a new connection sends first."""
        connection = Connection(request, client_address, self)
        with self._open_lock:
            self._open[request] = connection
        self.loop.soon(connection.wait)

    def shutdown_request(self, request: Any) -> None:
        """Closes a connection, by the socket that was accepted."""
        with self._open_lock:
            self._open.pop(request, None)
            if place := self._places.pop(request, ""):
                self._from[place] -= 1
                if not self._from[place]:
                    del self._from[place]
        super().shutdown_request(request)

    def connections(self) -> int:
        return len(self._open)

    def drain(self, grace: float) -> None:
        """Stops accepting and waits for open answers, up to `grace` seconds; then they end with an error."""
        self.stopping = True
        self.shutdown()
        self.socket.close()
        self._wait_for_open(grace)
        self.workers.close()

    def _wait_for_open(self, grace: float) -> None:
        deadline = time.monotonic() + grace
        while time.monotonic() < deadline + 3:
            with self._open_lock:
                busy = [one for one in self._open.values() if one and one.busy]
                idle = [one for one in self._open.values() if one and not one.busy]
                webs = [one.web for one in self._open.values() if one and one.web]
                webs = [web for web in webs if self.ending or not web.needed]
                left = len(self._open) - len(idle)
            for web in webs:
                web.close(1001, "the server is shutting down")
                web.drop("the server is shutting down")
            for one in idle:
                one.let_go()
            if not left:
                return
            self.ending = time.monotonic() >= deadline
            if self.ending:
                for one in busy:
                    one.client.ring()
            time.sleep(0.05)


def error_reply(error: ApiError) -> Reply:
    """An error as an answer, in OpenAI's shape."""
    return json_reply(error.body(), error.status, error.headers)


def event_of_failure(error: ApiError) -> bytes:
    """The last event of a stream in OpenAI's shape."""
    return f"data: {compact(error.body())}\n\n".encode()


_REASONS = {status.value: status.phrase for status in http.HTTPStatus}


def head_bytes(reply: Reply | Stream | Upgrade, version: str, connection: str, extra: str = "") -> bytes:
    """The head of an answer: whole ones have a length, streams to HTTP/1.1 clients are chunked."""
    status = f"HTTP/1.1 {reply.status} {_REASONS.get(reply.status, '')}"
    lines = [status]
    if not isinstance(reply, Upgrade):
        lines.append(f"Content-Type: {reply.content_type}")
    if isinstance(reply, Reply):
        if reply.status != 204:
            lines.append(f"Content-Length: {len(reply.body)}")
    elif isinstance(reply, Stream):
        lines.append("X-Accel-Buffering: no")
        if version == "1.1":
            lines.append("Transfer-Encoding: chunked")
    if "Cache-Control" not in reply.headers:
        lines.append("Cache-Control: no-store")
    if connection:
        lines.append(f"Connection: {connection}")
    lines += [f"{name}: {value}" for name, value in reply.headers.items()]
    lines += [f"Date: {_date(int(time.time()))}", "Server: chatproxy", extra]
    return ("\r\n".join(lines) + "\r\n").encode("latin-1", "replace")


@functools.lru_cache(2)
def _date(now: int) -> str:
    return time.strftime("%a, %d %b %Y %H:%M:%S GMT", time.gmtime(now))


_NO_BODY = Blob()  # of a request that has none, or whose body has been read
# What writing to a client raises that is gone or does not read; other errors of the system are not the client's.
_GONE = (ConnectionError, TimeoutError, BlockingIOError, ssl.SSLError)
_METHODS = {"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"}  # that a log names
_CORS = "Access-Control-Allow-Origin: *\r\nAccess-Control-Expose-Headers: x-request-id, retry-after\r\n"
_PREFLIGHT = {
    "Access-Control-Allow-Methods": "GET, POST, PUT, PATCH, DELETE, OPTIONS",
    "Access-Control-Allow-Headers": "*, Authorization",
    "Access-Control-Max-Age": "86400",
}


class Connection(http.server.BaseHTTPRequestHandler, Ticking):
    """One client connection: HTTP/1.1 with keep-alive and pipelining, HTTP/1.0 with close.

    A request is read whole, answered, and only then the next one is looked at. What `parse_head` refuses ends the
    connection, since nobody can say where the next request would begin. While it has no request it waits in the loop, and
    has no thread.
    """

    server: Server

    def __init__(self, sock: socket.socket, address: Any, server: Server) -> None:
        """Without a request, and so without what the base class does for one at once."""
        self.request, self.client_address, self.server = sock, address, server
        self.setup()

    def setup(self) -> None:
        sock = self.request
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("ll", SEND_TIMEOUT, 0))
        self.plain = self.sock = sock
        self.fd = sock.fileno()
        self.busy = False  # whether a request is being answered
        self.web: WebSocket | None = None  # what the connection has become
        self.peer = str(self.client_address[0])
        self.wire: Wire
        self._met = False  # whether it had a request, for which TLS has begun
        self._waits = time.monotonic()  # for a request, since when

    # -- in the loop ---------------------------------------------------------------------------------------------

    def wait(self) -> None:
        """Waits for a request."""
        if self.server.stopping:
            self._visit()
            return
        self._waits = time.monotonic()
        self.server.loop.watch(self.fd, select.EPOLLIN | select.EPOLLRDHUP, self._come)
        self.server.loop.ticking[self] = None

    def _come(self, events: int) -> None:
        """Something has come, or the client is done."""
        self._leave()
        if events & _HUNG_UP and not isinstance(self.sock, ssl.SSLSocket):
            with contextlib.suppress(OSError):
                if not self.sock.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT):
                    self._drop()
                    return
        self._visit()

    def tick(self, now: float) -> None:
        if now - self._waits > self.server.settings.read_timeout:
            self._leave()
            self._drop()

    def _drop(self) -> None:
        """Closes it as it is: there is nothing to be told, or to be read."""
        self.sock.close()
        self.server.shutdown_request(self.plain)

    def _leave(self) -> None:
        self.server.loop.unwatch(self.fd, self._come)
        self.server.loop.ticking.pop(self, None)

    def _visit(self) -> None:
        self.server.workers.run(self.visit)

    # -- in a thread ---------------------------------------------------------------------------------------------

    def visit(self) -> None:
        """Answers what has come, and then waits for more in the loop; at the end closes the connection."""
        try:
            if self.handle():
                self.server.loop.soon(self.wait)
                return
        except Exception:
            log(logging.ERROR, "connection failed", exc_info=True)
        if self.web is None or not self.web.at_end(self._at_end):
            self._end()

    def _at_end(self) -> None:
        """The WebSocket that it has become is over."""
        self.server.workers.run(self._end)

    def _end(self) -> None:
        try:
            self.finish()
        finally:
            self.server.shutdown_request(self.plain)

    def handle(self) -> bool:  # type: ignore[override] # whose caller is `visit`
        """Answers request after request: whether there may be more after a while, else the connection is over."""
        server = self.server
        try:
            if not self._met:
                self._met = True
                if server.tls:
                    self.plain.settimeout(server.settings.read_timeout)
                    self.sock = self.request = server.tls.wrap_socket(self.plain, server_side=True)
                self.wire = Wire(self.sock, float(server.settings.read_timeout))
                self.client = Client(self.sock, server)
            while self._one():
                self.busy = False
                if server.stopping:
                    return False
                if not self.wire.lingers(LINGER):
                    return True
        except (OSError, ClientGone):
            pass
        return False

    def let_go(self) -> None:
        """Has a thread that waits for a request wait no longer."""
        with contextlib.suppress(OSError):
            socket.socket.shutdown(self.sock, socket.SHUT_RD)  # TLS has nothing to say to it

    def finish(self) -> None:
        """Closes without a reset that could overtake the answer: reads what the client still sends, for a moment."""
        plain = self.plain
        end = time.monotonic() + DRAIN_TIME
        with contextlib.suppress(OSError, ValueError):
            if isinstance(self.sock, ssl.SSLSocket):
                self.sock.settimeout(1)
                plain = self.sock.unwrap()
        with contextlib.suppress(OSError):
            plain.shutdown(socket.SHUT_WR)
            plain.settimeout(0.2)
            for _ in range(512):
                if not plain.recv(65536) or time.monotonic() > end:
                    break
        self.sock.close()

    def _one(self) -> bool:
        """Reads one request and answers it; whether another may follow."""
        self.version, self.method = "1.1", ""
        request = None
        self.failure: ApiError | None = None  # what the client was told went wrong
        self.start = time.monotonic()
        self.request_id = f"req_{random.getrandbits(64):016x}"
        try:
            head = self.wire.head()
            if head is None:
                return False
            self.busy = True
            self.start = time.monotonic()
            request, keep = self._parsed(head)
        except ApiError as error:
            self.failure = error
            self._send(error_reply(error), request, False)
            return False
        share = Share(self.server.room)
        try:
            return self._answered(request, keep, share)
        finally:
            share.end()

    def _answered(self, request: Request, keep: bool, share: Share) -> bool:
        """Reads the body of a request that is admitted, and answers; whether another request may follow."""
        answer: Reply | Stream | Upgrade
        bodiless = {"content-length", "transfer-encoding"}.isdisjoint(request.headers)
        whole = bodiless or request.headers.get("content-length") == "0"
        try:
            early = self._placed(request)
            most = 0 if early else self.server.application.admit(request)
            if not whole and not early:
                self._read(request, most, share)
                whole = True
            answer = early or self.server.application.respond(request)
        except ClientGone:
            self._log(request, 499, 0)
            return False
        except Exception as failure:
            answer = error_reply(self._failed(failure, request))
        keep = keep and whole  # else nobody reads on to where the next request begins
        if (
            isinstance(answer, Stream) and not share.held
        ):  # what was asked is read, and an answer may take an hour
            request.body = _NO_BODY
            share.end()
        if isinstance(answer, Reply):
            return self._send(answer, request, keep)
        if isinstance(answer, Upgrade):
            return self._upgraded(answer, request)
        return self._stream(answer, request, keep)

    def _upgraded(self, upgrade: Upgrade, request: Request) -> bool:
        """Has a WebSocket on this connection until it ends."""
        if self.version != "1.1" or self.method != "GET":
            return self._send(
                error_reply(malformed("a WebSocket begins with a GET of HTTP/1.1")), request, False
            )
        extra = f"x-request-id: {self.request_id}\r\n"
        self.sock.sendall(head_bytes(upgrade, self.version, "", extra))
        self._first_byte(request)
        self._log(request, upgrade.status, 0)
        self.web = WebSocket(self.sock, self.server.loop, self.wire.ahead())
        try:
            if upgrade.serve(self.web):
                return False
        except Closed:
            pass
        except Exception:
            log(logging.ERROR, "websocket failed", exc_info=True, id=self.request_id, route=request.route)
            self.web.close(1011, "chatproxy failed")
        self.web.leave("it is over")  # `finish` closes, so that no reset overtakes our Close
        return False

    def _failed(self, failure: Exception, request: Request) -> ApiError:
        """The reply for a failure; one that nobody foresaw is logged."""
        if not isinstance(failure, ApiError):
            log(logging.ERROR, "request failed", exc_info=True, id=self.request_id, route=request.route)
            failure = ApiError(
                "internal_error", f"chatproxy failed; its log has the details under {self.request_id}."
            )
        failure.shape = self.server.application.shape(request)
        self.failure = failure
        return failure

    def _parsed(self, head: bytes) -> tuple[Request, bool]:
        """The request by its head, and whether its connection may be kept."""
        method, target, version, headers = parse_head(head)
        self.version = version[5:]
        self.method = method
        options = {word.strip().lower() for word in headers.get("connection", "").split(",")}
        keep = "close" not in options if version == "HTTP/1.1" else "keep-alive" in options
        if headers.get("expect", "100-continue").lower() != "100-continue":
            raise ApiError("expectation_failed", "`Expect` may only be `100-continue`.")
        path, query = parse_target(target)
        values = dict(fields_of(query)) if query else {}
        request = Request(method, path, values, headers, _NO_BODY, self.peer, self.client, self.request_id)
        request.raw_query, request.port, request.version = query, self.server.server_port, self.version
        return request, keep

    def _placed(self, request: Request) -> Reply | None:
        """Takes API_PREFIX off the path of a request; the answer where the application is not needed for it."""
        prefix = self.server.prefix
        if self.server.stopping:
            raise overloaded("The server is shutting down")
        if prefix and not (request.path == prefix or request.path.startswith(prefix + "/")):
            raise ApiError("not_found", "There is nothing at this address.")
        request.path = request.path[len(prefix) :] or "/"
        if not {".", ".."}.isdisjoint(request.path.split("/")):
            raise ApiError("not_found", "There is nothing at this address.")
        if request.method == "OPTIONS":
            return Reply(204, headers=dict(_PREFLIGHT) if self.server.application.shared() else {})
        return None

    def _read(self, request: Request, most: int, share: Share) -> None:
        """Reads the body of a request, of up to `most` bytes."""
        headers = request.headers
        if headers.get("content-encoding", "identity").lower() != "identity" and not request.key:
            text = "The body has a Content-Encoding, which is not read here; send it as it is."
            raise ApiError("unsupported_encoding", text)
        fits = int(headers.get("content-length", 0)) <= most
        if "expect" in headers and fits and self.version == "1.1":
            try:
                self.sock.sendall(b"HTTP/1.1 100 Continue\r\n\r\n")
            except OSError:
                raise ClientGone from None
        request.body = self.wire.body(headers, most, share)

    def _send(self, reply: Reply, request: Request | None, keep: bool) -> bool:
        keep = keep and not self.server.stopping
        connection = ("" if self.version == "1.1" else "keep-alive") if keep else "close"
        head = head_bytes(reply, self.version, connection, self._extra())
        self.wire.replying()
        try:
            self.sock.sendall(head if self.method == "HEAD" else head + reply.body)
        except OSError:
            keep = False
        if request:
            self._first_byte(request)
        self._log(request, reply.status, 0)
        return keep

    def _extra(self) -> str:
        """The header lines that every answer has."""
        shared = _CORS if self.server.application.shared() else ""
        return f"x-request-id: {self.request_id}\r\n{shared}"

    def _first_byte(self, request: Request) -> None:
        labels = f'route="{request.route}"'
        self.server.metrics.observe("chatproxy_first_byte_seconds", time.monotonic() - self.start, labels)

    def head_of(self, request: Request, stream: Stream, keep: bool) -> bytes:
        """The head of a streamed answer, which begins now."""
        self._first_byte(request)
        self.server.metrics.add("chatproxy_streams_open")
        return head_bytes(stream, self.version, "" if keep else "close", self._extra())

    def _stream(self, stream: Stream, request: Request, keep: bool) -> bool:
        """Sends an answer as it comes."""
        if self.method == "HEAD":
            return self._send(Reply(stream.status, b"", stream.content_type, stream.headers), request, keep)
        lasting = keep and self.version == "1.1" and not self.server.stopping
        writer = self.client.writer = Writer(self, request, stream, lasting)
        status = stream.status
        try:
            reply = stream.write(writer)
            if reply is not None and not writer.begun:
                return self._send(reply, request, keep)
            writer.end()
        except (*_GONE, ClientGone):
            status, lasting = 499, False
        except Exception as failure:
            error = self._failed(failure, request)
            if not writer.begun:
                return self._send(error_reply(error), request, keep)
            status, lasting = error.status, False
            failed = stream.failed
            if stream.content_type.startswith("text/event-stream"):
                failed = failed or event_of_failure
            if failed:  # else it can only be cut
                with contextlib.suppress(ClientGone, ApiError):
                    writer.end(failed(error))
        finally:
            self.client.writer = None
            writer.close()
            if writer.begun:
                self.server.metrics.add("chatproxy_streams_open", -1)
                self.server.metrics.add("chatproxy_events_total", writer.events)
        self._log(request, status, writer.events)
        return lasting

    def _log(self, request: Request | None, status: int, events: int) -> None:
        """One line and one count a request; the route's pattern, since a path may hold a token."""
        route = request.route if request else "none"
        self.server.metrics.add("chatproxy_requests_total", labels=f'route="{route}",status="{status}"')
        level = logging.WARNING if status >= 500 else logging.INFO
        if not LOG.isEnabledFor(level) or self.server.quiet:
            return
        method = self.method if self.method in _METHODS else "-"
        facts: dict[str, Any] = {"id": self.request_id, "method": method, "route": route}
        facts |= {"status": status, "ms": round((time.monotonic() - self.start) * 1000, 1), "peer": self.peer}
        if request and request.asker:
            facts["as"] = request.asker
        if events:
            facts["events"] = events
        if self.failure:
            facts["code"] = self.failure.code
            if status >= 500:  # what is said of a request itself may repeat its words
                facts["reason"] = self.failure.message
        log(level, "request", **facts)


Respond = Callable[[Any, Request], Reply | Stream | Upgrade]  # of an App (or Demo) and what it is asked


class Endpoint(NamedTuple):
    """A row of the route table. `access`: public, caller (an API key), admin (its key or session) or admin key; what
    else is written there says whom the function itself admits."""

    method: str
    path: str
    access: str
    function: Respond


class Router:
    """The route table: endpoints by method and path, whose `{name}` steps become `request.params`."""

    def __init__(self) -> None:
        self.endpoints: list[Endpoint] = []
        self._plain: dict[str, dict[str, Endpoint]] = {}
        self._patterns: list[tuple[re.Pattern[str], dict[str, Endpoint]]] = []

    def on(
        self, method: str, *paths: str, access: str = "caller", also: Iterable[str] = (), id: str = "[^/]+"
    ) -> Callable[[Respond], Any]:
        """Decorates the function that answers a method on some paths; those with `also` before them are not listed. `id` is
        what `{id}` may be: other paths are not there."""

        def add(function: Respond) -> Any:
            for path in paths:
                endpoint = Endpoint(method, path, access, function)
                self.endpoints.append(endpoint)
                for place in (path, *(before + path for before in also)):
                    self._place(place, endpoint, id)
            return function

        return add

    def _place(self, path: str, endpoint: Endpoint, id: str) -> None:
        if "{" not in path:
            self._plain.setdefault(path, {})[endpoint.method] = endpoint
            return
        named = re.sub(r"\\\{(\w+)\\\}", r"(?P<\1>[^/]+)", re.escape(path))
        pattern = re.compile(named.replace("(?P<id>[^/]+)", f"(?P<id>{id})"))
        for known, methods in self._patterns:
            if known.pattern == pattern.pattern:
                methods[endpoint.method] = endpoint
                return
        self._patterns.append((pattern, {endpoint.method: endpoint}))

    def find(self, request: Request) -> Endpoint:
        """The endpoint of a request, whose `params` and `route` are set; not_found or method_not_allowed."""
        methods = self._plain.get(request.path)
        method = "GET" if request.method == "HEAD" else request.method
        if methods is None:
            for pattern, found in self._patterns:
                if (methods is None or method in found) and (match := pattern.fullmatch(request.path)):
                    request.params = match.groupdict()
                    methods = found
                    if method in found:
                        break
        if methods is None:
            raise ApiError("not_found", "There is nothing at this address; the README lists the routes.")
        endpoint = methods.get(method)
        request.route = next(iter(methods.values())).path
        if endpoint is None:
            allowed = sorted({*methods, "OPTIONS"} | ({"HEAD"} if "GET" in methods else set()))
            text = f"Use {' or '.join(sorted(methods))} here."
            headers = {"Allow": ", ".join(allowed)}
            raise ApiError("method_not_allowed", text, headers=headers)
        return endpoint

    def table(self) -> str:
        """The README's table of routes, in Markdown."""
        lines = ["| route | who | answer |", "| --- | --- | --- |"]
        for endpoint in self.endpoints:
            meaning = " ".join((endpoint.function.__doc__ or "").partition("\n\n")[0].split())
            lines.append(f"| `{endpoint.method} {endpoint.path}` | {endpoint.access} | {meaning} |")
        return "\n".join(lines)


# ============================================================================================================
# access: who may call, who administers, and who owns what
# ============================================================================================================

SESSION_LIFE = 12 * 3600.0  # seconds that an administrator stays signed in
WRONG_KEYS, WRONG_KEY_TIME, WRONG_KEY_DELAY = 5, 60.0, 1.0  # so many in so many seconds; then each waits
MAX_WAITING = 4  # wrong keys of one address that wait; further ones are refused
# Callers' own tokens that the upstream is asked about at a time, a quarter of them from one address.
MAX_STRANGERS = 16
ADMIN_COOKIE = "chatproxy_admin_{}"  # and the port: browsers send a host's cookies to all of its ports
MAX_REMEMBERED = 10_000  # addresses, sessions, tokens
# What is answered here alone: an API user's limit is for what the upstream is asked.
ASKS_NOBODY = ("/v1/messages/count_tokens", "/v1/responses/input_tokens", "/api/show")
# Headers by which a server in front of this one tells for whom it asks: what they are, or begin with.
_FRONT_NAMES = {
    "via", "cdn-loop", "client-ip", "true-client-ip", "x-client-ip", "x-cluster-client-ip", "x-host", "x-url-scheme",
    "front-end-https", "x-rewrite-url", "x-varnish", "x-nginx-proxy", "x-remote-addr", "remote-addr", "remote-user",
    "x-cloud-trace-context",
}  # fmt: skip
_FRONT_PREFIXES = (
    "forwarded", "x-forwarded", "x-real-", "x-original-", "x-envoy-", "x-amz", "x-azure-", "x-appengine-", "x-arr-",
    "x-proxy", "x-scheme", "x-vercel-", "x-nf-", "tailscale-", "cf-", "fly-", "fastly-", "akamai-", "cloudfront-",
)  # fmt: skip


class Guesses:
    """Wrong keys by the address that they come from. After WRONG_KEYS of them in a minute every further one waits for
    its answer, one after another, up to MAX_WAITING at a time."""

    def __init__(self) -> None:
        self._guesses_lock = threading.Lock()
        self._wrong: OrderedDict[str, list[float]] = OrderedDict()  # when an address had wrong keys
        self._waiting: dict[
            str, tuple[int, float]
        ] = {}  # how many wait, and until when the last of them does

    def note(self, peer: str) -> None:
        """A key of this peer's was wrong."""
        with self._guesses_lock:
            self._note(place_of(peer), time.monotonic())

    def forgive(self, peer: str) -> None:
        """The last of them was right after all."""
        with self._guesses_lock:
            if times := self._wrong.get(place_of(peer)):
                times.pop()

    def _note(self, place: str, now: float) -> None:
        self._wrong[place] = [*self._recent(place, now)[-WRONG_KEYS:], now]
        self._wrong.move_to_end(place)
        if len(self._wrong) > MAX_REMEMBERED:
            self._wrong.popitem(last=False)

    def _recent(self, place: str, now: float) -> list[float]:
        return [one for one in self._wrong.get(place, ()) if now - one < WRONG_KEY_TIME]

    def slow_down(self, request: Request, wrong: bool = False) -> None:
        """Waits if there were many wrong keys from the peer's address; rate_limit_exceeded when enough wait already.
        `wrong`: it has come with one more."""
        now = time.monotonic()
        place = place_of(request.peer)
        with self._guesses_lock:
            recent = len(self._recent(place, now))
            if recent < WRONG_KEYS:
                if wrong:
                    self._note(place, now)
                return
            waiting, until = self._waiting.get(place, (0, now))
            if waiting >= MAX_WAITING:
                headers = {"Retry-After": str(math.ceil(WRONG_KEY_TIME))}
                text = "Too many wrong keys came from this address; send the right one, or try again in a minute."
                raise ApiError("rate_limit_exceeded", text, headers=headers)
            until = min(max(now, until), now + waiting * WRONG_KEY_DELAY) + WRONG_KEY_DELAY  # some have left
            self._waiting[place] = (waiting + 1, until)
            if wrong:
                self._note(place, now)
        try:
            request.watch.pause(until - now)
        finally:
            with self._guesses_lock:
                waiting, until = self._waiting.pop(place)
                if waiting > 1:
                    self._waiting[place] = (waiting - 1, until)


class Keys:
    """Who may call: the keys of AUTHORIZATION, API users and the administrator, compared by digest in constant time,
    and whoever brings a token that the upstream accepts."""

    def __init__(
        self, settings: Settings, pool: Pool, ledger: Ledger, prove: Callable[[Request], None],
        extra: Iterable[str] = (),
    ) -> None:  # fmt: skip
        """`prove` asks the upstream about the token that a request brings: invalid_api_key when it does not accept it."""
        self.settings = settings
        self.pool = pool
        self.ledger = ledger
        self._prove = prove
        # Who has a key: how logs call them, and whose conversations, files and responses are theirs.
        self._keys = {
            self._digest(key): (f"key {masked(key)}", f"key-{self._digest(key).hex()[:16]}")
            for key in (*settings.authorization, *extra)
        }
        administrator = settings.administrator
        self._administrator = self._digest(administrator) if administrator else None
        self.cookie = ADMIN_COOKIE.format(settings.port)
        self.guesses = Guesses()
        self._users_lock = threading.Lock()
        self._users: dict[bytes, User] = {}
        self._remembered_lock = threading.Lock()
        self._sessions: OrderedDict[bytes, float] = OrderedDict()  # when one ends, by its cookie's digest
        # Callers' tokens that the upstream has accepted.
        self._proved: OrderedDict[bytes, None] = OrderedDict()
        self._strangers = Counter[str]()  # from where the tokens come that are being asked about
        self.reload()

    @staticmethod
    def _digest(key: str) -> bytes:
        return hashlib.sha256(key.encode("utf-8", "replace")).digest()

    def reload(self) -> None:
        """Takes in the API users of the store."""
        with self._users_lock:  # what was read last is what stays
            self._users = {bytes.fromhex(user.token_hash): user for user in self.pool.store.users()}

    @property
    def keyless(self) -> bool:
        """Whether callers need no key: there is neither AUTHORIZATION nor an API user."""
        return not self.settings.authorization and not self._users

    @staticmethod
    def given(request: Request) -> str:
        """The API key of a request, "" for none: `Authorization: Bearer X`, or bare `X`, else `x-api-key: X`."""
        value = request.headers.get("authorization", "")
        nothing = value.strip().lower() in ("", "bearer")
        if nothing or value[:6].lower() == "basic ":  # which is for a reverse proxy in front
            return request.headers.get("x-api-key", "").strip()
        return value[7:].strip() if value[:7].lower() == "bearer " else value.strip()

    def _refused(self, request: Request, text: str) -> ApiError:
        """A wrong key; who has had too many of them waits for this answer."""
        self.guesses.slow_down(request, wrong=True)
        return ApiError("invalid_api_key", text)

    def admit(self, request: Request, own: bool = True, administers: bool = False) -> None:
        """Decides who answers: sets `guest` (None: the pool), `asker`, `scope` and `user`, or `key` for an `sk-` key; else
        invalid_api_key. An API user's requests are counted, rate_limit_exceeded past its limit. `own`: whether callers
        may bring tokens of their own; `administers`: whether the administrator's key is one here."""
        key = self.given(request)
        # Digests are compared: how long that takes tells nothing of a key.
        digest = self._digest(key)
        request.admin = key != "" and self._is_administrators(digest)
        if key and (known := self._keys.get(digest)):
            request.asker = known[0]
            request.scope = Scope(known[1], everyone=True)
        elif administers and request.admin:
            request.asker = "admin"
            request.scope = Scope("key-admin", everyone=True)
        elif key and (user := self._users.get(digest)):
            self._admit_user(request, user)
        elif not key:
            if not self.keyless:
                text = "No API key was sent; send one as `Authorization: Bearer KEY`."
                raise ApiError("invalid_api_key", text)
            request.guest = self.pool.login_free()
            request.asker = LOGIN_FREE
            request.scope = Scope(LOGIN_FREE)
        elif not own or not self.settings.allow_direct_tokens or not self._admit_own(request, key, digest):
            text = "send one of the server's AUTHORIZATION, an API user's token, or your own."
            raise self._refused(request, f"Incorrect API key provided: {text}")

    def _admit_user(self, request: Request, user: User) -> None:
        request.asker = f"user {user.name or user.id}"
        request.scope = Scope(user.id)
        request.user = user.id
        if request.method not in ("POST", "PATCH") or request.path in ASKS_NOBODY:
            self.ledger.count(user.id)
        elif left := self.ledger.admit(user.id, user.limit):
            text = f"The {user.limit} requests that this API user has a day are used up; come back tomorrow."
            raise ApiError("rate_limit_exceeded", text, headers={"Retry-After": str(math.ceil(left))})

    def _admit_own(self, request: Request, key: str, digest: bytes) -> bool:
        """Admits who brings an access token, a refresh token or an `sk-` key, once the upstream has accepted it; False for
        what is none of these. A stranger's body is not read before that, and nothing is kept for one."""
        if key.startswith("sk-"):
            if key.startswith("sk-ant-") or self._foreign_path(request.path):
                text = "An `sk-` key is passed on to OpenAI's API, which has no such path or key."
                raise ApiError("invalid_api_key", text)
            request.key = key
            request.asker = f"key {masked(key)}"
        else:
            try:
                request.guest = self.pool.guest(callers_token(key))
            except ValueError:
                return False
            request.asker = request.guest.name
            request.scope = Scope(request.guest.id)
        guest = request.guest
        pooled = guest is not None and not guest.row.guest
        refused = guest is not None and guest.row.state != "ready"  # since it was accepted
        with self._remembered_lock:
            proved = digest in self._proved and not refused
            if proved:
                self._proved.move_to_end(digest)
        if not proved and not pooled:
            self._ask_about(request, digest)
        if request.guest:
            request.guest = self.pool.welcome(request.guest)
            request.asker = request.guest.name
        return True

    @staticmethod
    def _foreign_path(path: str) -> bool:
        """Whether a path is none of OpenAI's API."""
        return not path.startswith("/v1/") or path.startswith("/v1/messages")

    def _ask_about(self, request: Request, digest: bytes) -> None:
        """Has the upstream say whether it accepts a token; of those that it does not, an address has as few as of wrong
        keys."""
        self.guesses.slow_down(request, wrong=True)  # until the upstream says otherwise
        place = place_of(request.peer)
        with self._remembered_lock:
            if sum(self._strangers.values()) >= MAX_STRANGERS or self._strangers[place] >= MAX_STRANGERS // 4:
                raise overloaded("Too many new tokens are being checked just now", 1)
            self._strangers[place] += 1
        try:
            self._prove(request)
        finally:
            with self._remembered_lock:
                self._strangers -= Counter([place])
        self.guesses.forgive(request.peer)
        with self._remembered_lock:
            self._proved[digest] = None
            if len(self._proved) > MAX_REMEMBERED:
                self._proved.popitem(last=False)

    def doubt(self, request: Request) -> None:
        """The upstream does not accept a caller's token any more."""
        with self._remembered_lock:
            self._proved.pop(self._digest(self.given(request)), None)
        self.guesses.note(request.peer)

    # -- the administrator -------------------------------------------------------------------------------------

    def admit_admin(self, request: Request, named: str = "", sessions: bool = True) -> None:
        """Admits the administrator's key (in the header, or `named` elsewhere in the request) and, from a page of this
        server, who signed in with it. Without any key set, clients of this machine, until there is an API user."""
        request.asker = "admin"
        request.admin = True
        request.scope = Scope("key-admin", everyone=True)
        if self.settings.administrator is None:
            browsed = not sessions and "sec-fetch-site" in request.headers  # a link that changes something
            if self._users:
                text = "There are API users now: set ADMIN_KEY to administer this server."
                raise ApiError("invalid_api_key", text)
            if browsed or not self._local(request) or self._foreign(request):
                text = (
                    "Until ADMIN_KEY is set, admin routes answer only this machine, with no proxy in between."
                )
                raise ApiError("invalid_api_key", text)
        elif key := self.given(request) or named:
            self._check(request, key)
        elif not sessions or not self._signed_in(request):
            text = "The admin key is missing; send it as `Authorization: Bearer KEY`."
            raise ApiError("invalid_api_key", text)

    def _is_administrators(self, digest: bytes) -> bool:
        return self._administrator is not None and hmac.compare_digest(digest, self._administrator)

    def _check(self, request: Request, key: str) -> None:
        if not self._is_administrators(self._digest(key)):
            raise self._refused(request, "The admin key is wrong.")

    def admit_agent(self, request: Request, named: str) -> None:
        """Admits who has the agents' key, in the header or `named` in the query; without any key set, this machine."""
        request.asker = "agent"
        key = self.given(request) or named
        wanted = self.settings.agent_key or self.settings.administrator
        if wanted is None:
            if not self._local(request):
                raise ApiError(
                    "invalid_api_key", "Until AGENT_KEY is set, agents can connect only from this machine."
                )
        elif not key:
            raise ApiError("invalid_api_key", "An agent needs the key; connect to /client/register?key=KEY.")
        elif not hmac.compare_digest(self._digest(key), self._digest(wanted)):
            raise self._refused(request, "The agent's key is wrong.")

    def _local(self, request: Request) -> bool:
        """Whether a request comes from this machine, as far as anybody can tell: from a loopback address, asking for the
        address and port that are listened on, and not through another server, which would say so (or speak HTTP/1.0, as
        nginx does unless told otherwise)."""
        headers = request.headers
        told = any(name in _FRONT_NAMES or name.startswith(_FRONT_PREFIXES) for name in headers)
        fronted = told or request.version == "1.0"
        host, port = self._asked_for(request)
        listened = is_loopback(host) or host == self.settings.host
        return is_loopback(request.peer) and not fronted and listened and port == request.port

    def _asked_for(self, request: Request) -> tuple[str, int]:
        """Host and port of the Host header; ("", 0) for what is none."""
        with contextlib.suppress(ValueError):
            parts = urllib.parse.urlsplit(f"//{request.headers.get('host', '')}")
            usual = 443 if self.settings.tls_cert else 80
            if "@" not in parts.netloc:
                return parts.hostname or "", parts.port or usual
        return "", 0

    @staticmethod
    def _foreign(request: Request) -> bool:
        """Whether a browser says that another site's page is behind a request. What says nothing is no browser."""
        headers = request.headers
        if site := headers.get("sec-fetch-site"):
            return site not in ("same-origin", "none")
        return headers.get("origin", "").partition("://")[2].lower() != headers.get("host", "").lower() and (
            "origin" in headers
        )

    def refuse_pages(self, request: Request) -> None:
        """Without a key any page that somebody on this machine has open could ask for answers: origin_refused for what
        another site's page sends, or one that has had its name lead here."""
        if not self.keyless:
            return
        headers = request.headers
        browsed = {"origin", "sec-fetch-site"} & set(headers) or "mozilla" in headers.get(
            "user-agent", ""
        ).lower()
        if not browsed:
            return
        host = self._asked_for(request)[0]
        # Where nobody but this machine is listened to without a secret in the path, a name can only have been led here.
        closed = is_loopback(self.settings.host) and not self.settings.api_prefix
        named = closed and not is_loopback(host)
        changes = request.method not in ("GET", "HEAD")
        if named or (changes and self._foreign(request)):
            text = (
                "Pages of other sites may not ask a server that has no key; set AUTHORIZATION to allow them."
            )
            raise ApiError("origin_refused", text)

    def _signed_in(self, request: Request) -> bool:
        """Whether a request has the cookie of a session and, if it changes anything, comes from a page of this server."""
        headers = request.headers
        digest = self._cookie(request)
        changes = request.method not in ("GET", "HEAD")
        if self._foreign(request) or (changes and not {"origin", "sec-fetch-site"} & set(headers)):
            return False
        return digest is not None and self._sessions.get(digest, 0.0) > time.time()

    def _cookie(self, request: Request) -> bytes | None:
        found = re.search(rf"(?:^|[;,]\s*){self.cookie}=([\w-]{{43}})", request.headers.get("cookie", ""))
        return self._digest(found[1]) if found else None

    def sign_in(self, request: Request, key: str) -> str:
        """Begins a session of the administrator's: its cookie, as a header. It ends with the process or its time."""
        if self._foreign(request):
            text = "Sign in on a page of this server; a reverse proxy in front of it must pass the Host header on."
            raise ApiError("invalid_api_key", text)
        if self.settings.administrator is None:
            self.admit_admin(request)
        else:
            self._check(request, key)
        token = secrets.token_urlsafe(32)
        with self._remembered_lock:
            self._sessions[self._digest(token)] = time.time() + SESSION_LIFE
            if len(self._sessions) > MAX_REMEMBERED:
                self._sessions.popitem(last=False)
        return self._cookie_header(request, token, int(SESSION_LIFE))

    def sign_out(self, request: Request) -> str:
        """Ends the session of a request; the header that takes its cookie away."""
        with self._remembered_lock:
            self._sessions.pop(self._cookie(request) or b"", None)
        return self._cookie_header(request, "", 0)

    def _cookie_header(self, request: Request, token: str, life: int) -> str:
        secure = self.settings.tls_cert or request.headers.get("x-forwarded-proto") == "https"
        path = f"/{self.settings.api_prefix or ''}"
        rest = f"Path={path}; Max-Age={life}; HttpOnly; SameSite=Strict{'; Secure' if secure else ''}"
        return f"{self.cookie}={token}; {rest}"


def issue_user(store: Store, name: str, limit: int | None) -> tuple[User, str]:
    """A new API user and its token, which nobody can tell later; ApiError when the name is none."""
    if len(name) > 100 or not name.isprintable():
        raise unfit("name", "must be a text of up to 100 printable characters.")
    token = f"cp-{secrets.token_urlsafe(32)}"
    digest = hashlib.sha256(token.encode()).hexdigest()
    user = User(f"user-{secrets.token_hex(4)}", name, digest, time.time(), limit)
    store.put_user(user)
    return user, token


# ============================================================================================================
# routes: one short function each
# ============================================================================================================

# What OpenAI's API has and the web upstream has not, with everything below it.
ABSENT = (
    "/v1/embeddings", "/v1/moderations", "/v1/completions", "/v1/images/variations", "/v1/fine_tuning", "/v1/batches",
    "/v1/vector_stores", "/v1/assistants", "/v1/threads", "/v1/uploads", "/v1/realtime", "/v1/conversations",
)  # fmt: skip
# Where an error is a text: ChatGPT-API-server's paths, and Ollama's.
PLAIN_ERRORS = ("/admin/", "/api/")
ROUTER = Router()


OR_ADMIN = "caller or admin"  # the access of what belongs to somebody
OR_LINK = "caller, admin or signed link"
# The access of what takes a key of this server, and no caller's own token.
SIGNS_IN = "caller; to store: admin"


def _named_key(request: Request) -> str:
    """The admin key as ChatGPT-API-server's clients send it, in the body."""
    with contextlib.suppress(ApiError):
        return str(_body(request).get("admin_key") or "")
    return ""


def _body(request: Request) -> dict[str, Any]:
    """A JSON body that may be left out."""
    return request.json() if request.body.size else {}


_HOST_TEXT = re.compile(r"[0-9A-Za-z._-]{1,253}(:[0-9]{1,5})?|\[[0-9A-Fa-f:.]{2,45}\](:[0-9]{1,5})?")


class App(Application):
    """Everything a route may need, made once."""

    def __init__(
        self, settings: Settings, store: Store, solver: Solver, extra_keys: Iterable[str] = ()
    ) -> None:
        self.settings = settings
        self.store = store
        self.solver = solver
        self.loop = Loop()
        self.metrics = Metrics()
        self.pool = Pool(settings, store)
        self.ledger = Ledger(store)
        self.keys = Keys(settings, self.pool, self.ledger, self._prove, extra_keys)
        self.connections = Connections(settings, self.pool, self.loop, self.metrics)
        self.renewals = Renewals(self.connections)
        self.site = ChatGPT(self.connections, Fetcher(settings, self.loop), solver)
        self.files = Files(self.pool, self.site)
        self.links = Links(self.store.path.parent / "links")
        self.web = Web(self.site, self.renewals, self.files, self.ledger, self.links)
        self.codex = Codex(CodexCalls(self.connections), self.web)
        self.agents = Agents(self.metrics)
        upstreams: tuple[Upstream, ...] = (self.codex, self.web, self.agents)
        self.upstreams = {upstream.name: upstream for upstream in upstreams}
        self.tokens = Tokens()
        self.known_tools = KnownTools()
        self.left_out: set[str] = set()  # kinds of tools and items that the log has named
        self._stale = False  # whether another process has stored what is not taken in yet
        self._refresh = 0.0 if settings.scheduled_refresh else math.inf  # when all tokens are refreshed next
        states = self.pool.states
        self.metrics.gauge("chatproxy_loop_seconds", lambda: {"": self.loop.longest()})
        self.metrics.gauge("chatproxy_codex_used_percent", self.codex.percentages)
        self.metrics.gauge("chatproxy_agents", lambda: {"": len(self.agents.connected())})
        self.metrics.gauge("chatproxy_accounts", lambda: {f'state="{s}"': n for s, n in states().items()})

    def shared(self) -> bool:
        """Pages of other sites may read answers once there is a key that they must send."""
        return not self.keys.keyless

    def admit(self, request: Request) -> int:
        """Finds the route of a request, and checks who may use it."""
        self.keys.refuse_pages(request)
        return self._admit(request)

    def shape(self, request: Request) -> str:
        """That of the API whose path it is."""
        anthropic = "anthropic-version" in request.headers and request.path.startswith("/v1/models")
        if anthropic or request.path.startswith("/v1/messages"):
            return "anthropic"
        return "plain" if request.path.startswith(PLAIN_ERRORS) else "openai"

    def respond(self, request: Request) -> Reply | Stream | Upgrade:
        """The answer to a request that was admitted; the administrator's key may be in the body of some."""
        endpoint = request.endpoint
        if endpoint is None or request.key:
            return relay(self, request)
        if endpoint.access == "admin" and not request.admin:
            self.keys.admit_admin(request, _named_key(request))
        return endpoint.function(self, request)

    def _admit(self, request: Request) -> int:
        under_v1 = request.path.startswith("/v1/")
        whole = self.settings.max_body_mb << 20
        absent = request.path.startswith(ABSENT)
        request.base = self._base(request.headers)
        given = Keys.given(request)
        if "websocket" in request.headers.get("upgrade", "").lower() and request.path == "/v1/responses":
            text = "The Responses API is spoken over HTTP here; send POST /v1/responses."
            raise ApiError("upgrade_required", text, headers={"Upgrade": "HTTP/1.1"})
        try:
            request.endpoint = endpoint = ROUTER.find(request)
        except ApiError:
            if not under_v1 or not (given.startswith("sk-") or absent):
                raise
            self.keys.admit(request)
            if request.key:
                return whole
            if not absent:
                raise
            text = f"The ChatGPT web upstream has no {request.path}; requests with an `sk-` key go to OpenAI's API."
            raise ApiError("not_found", text) from None
        kind = endpoint.access
        if kind == OR_LINK and self.links.file(request.params["id"], request.query):
            return MAX_PUBLIC_BODY
        if kind.startswith("caller"):
            self.keys.admit(request, own=kind != SIGNS_IN, administers=kind != "caller")
            return MAX_PUBLIC_BODY if request.path.startswith("/auth/") else whole
        if kind.startswith("admin"):
            named = request.path.startswith("/admin/") and kind == "admin"
            in_body = named and request.method == "POST" and not given
            try:
                in_query = request.query.get("admin_key", "") if named else ""
                self.keys.admit_admin(request, in_query, kind == "admin")
            except ApiError:
                request.admin = False
                if not in_body or in_query or self.settings.administrator is None:
                    raise
                return MAX_PUBLIC_BODY
            return whole
        return MAX_PUBLIC_BODY

    def _base(self, headers: Mapping[str, str]) -> str:
        """The URL of this server as a client has it; only its path where that does not say."""
        prefix = f"/{self.settings.api_prefix}" if self.settings.api_prefix else ""
        host = headers.get("host", "")
        if not _HOST_TEXT.fullmatch(host):
            return prefix
        secure = self.settings.tls_cert or headers.get("x-forwarded-proto") == "https"
        return f"{'https' if secure else 'http'}://{host}{prefix}"

    def _prove(self, request: Request) -> None:
        """Has the upstream say whether it accepts the token that a caller brings, by the cheapest call."""
        account, watch = request.guest, request.watch
        if account is None:
            prove_key(self, request)
            return

        self.pool.lease_guest(account, "")
        self.renewals.token(account, watch)
        if account.renewable:  # whose token was exchanged just now, or earlier
            return
        if (
            account.speaks_codex()
            and "codex" in self.settings.upstream_order
            and self.codex.prove(account, watch)
        ):
            return
        try:
            self.site.me(account, watch)
        except Refusal as refused:
            if refused.reason != "missing":  # a gateway need not have this call
                raise

    def upkeep(self, stop: threading.Event) -> None:
        """The background jobs, each at every so many seconds: one that fails keeps no other from its work."""
        jobs: tuple[tuple[int, Callable[[], object]], ...] = (
            (1, self._take_in),
            (1, self._refresh_on_schedule),
            (10, self._sweep),
            (10, self._retry_store),
            (10, lambda: self.renewals.renew_due(time.time())),
            (10, self.ledger.save),
            (60, self.pool.keep_told),
            (3600, lambda: self.store.prune(time.time())),
            (600, lambda: self.links.sweep(time.time())),
        )
        for second in itertools.count():
            if stop.wait(1.0):
                return
            for every, job in jobs:
                if second % every == 0:
                    self._do(job)

    @staticmethod
    def _do(job: Callable[[], object]) -> None:
        try:
            job()
        except StoreUnavailable:  # which the store has told
            pass
        except Exception:
            log(logging.ERROR, "background job failed", exc_info=True)

    def _take_in(self) -> None:
        """Takes in the changes that another process has stored."""
        self._stale = self.store.changed() or self._stale
        if self._stale:
            self.pool.reload()
            self.keys.reload()
            self._stale = False

    def _refresh_on_schedule(self) -> None:
        if self._refresh <= (now := time.time()):
            self._refresh = next_refresh(now)
            self.renewals.refresh_all(now)

    def _sweep(self) -> None:
        """Lets go of what is old."""
        self.connections.sweep(time.monotonic())
        self.site.sweep_spares()
        self.site.sweep_erasures(time.monotonic())

    def _retry_store(self) -> None:
        """Stores what could not be stored, once there is room again."""
        if self.store.trouble:
            self.store.try_room()
        self.pool.hold({})


def relay(app: App, request: Request) -> Reply | Stream | Upgrade:
    """Passes a request with an `sk-` key on to OPENAI_API_URL, unchanged, and its answer back as it comes."""
    passed = ["content-type", "content-encoding", "accept", "user-agent", "idempotency-key"]
    passed += ["openai-organization", "openai-project", "openai-beta"]
    given = {name: request.headers.get(name) for name in passed}
    lines = [f"{name}: {value}".encode("latin-1") for name, value in given.items() if value is not None]
    lines += [f"Authorization: Bearer {request.key}".encode("latin-1"), b"Expect:"]
    request.route = request.route if request.route != "none" else "/v1/…"
    method = "GET" if request.method == "HEAD" else request.method
    body = request.body if request.body.size or method in ("POST", "PUT", "PATCH") else None
    if "content-type" not in request.headers:
        lines.append(b"Content-Type:")
    with contextlib.ExitStack() as guard:
        call = guard.enter_context(_to_openai(app, request, method, _relayed_url(app, request), lines, body))
        call.start()
        named = ("x-ratelimit-", "openai-")
        headers = {k: v for k, v in call.headers.items() if k.startswith(named) or k in _RELAYED_HEADERS}
        content_type = call.headers.get("content-type", "application/octet-stream")
        if request.method == "HEAD":
            return Reply(call.status, b"", content_type, headers)
        if content_type.startswith("text/event-stream"):
            guard.pop_all()
            signs = call.headers.get("content-encoding", "identity") == "identity"
            return Stream(functools.partial(_relayed, call), call.status, content_type, headers, signs)
        answer = call.whole()
        if _refuses_key(answer):
            app.keys.doubt(request)
        return Reply(answer.status, answer.body, content_type, headers)


def _refuses_key(answer: Answer) -> bool:
    """Whether OpenAI's API says that it does not know a key; one that may do little is known all the same."""
    return answer.status == 401 and b"scope" not in answer.body[:2000]


_RELAYED_HEADERS = ("retry-after", "content-encoding")


def _relayed_url(app: App, request: Request) -> str:
    """The URL of a relayed request: OPENAI_API_URL and the request's path, which begins with /v1/, encoded anew step
    by step."""
    steps = [urllib.parse.quote(step, safe="!$&'()*+,;=:@~") for step in request.path.split("/")]
    return (
        app.settings.openai_api_url + "/".join(steps) + (f"?{request.raw_query}" if request.raw_query else "")
    )


def _to_openai(
    app: App,
    request: Request,
    method: str,
    url: str,
    lines: list[bytes],
    body: Blob | None,
    kept: bool = True,
) -> Call:
    """A call with an `sk-` key; what is answered is passed on as it comes, since nobody knows what it becomes decoded."""
    proxies = app.settings.proxy_url
    owner = hashlib.sha256(request.key.encode("latin-1")).hexdigest()
    proxy = proxies[stable_number(owner) % len(proxies)] if proxies else ""
    egress = Egress("", proxy)
    silence = float(app.settings.upstream_timeout)
    lines = [*lines, b"Accept-Encoding: identity"]
    handles, watch = app.connections.guest_handles, request.watch
    call = handles.call(owner, egress, method, url, lines, body, watch, silence, kept)
    call.handle.as_it_comes()
    return call


def prove_key(app: App, request: Request) -> None:
    """Asks OpenAI's API about an `sk-` key: invalid_api_key if it says that it does not know it. An API without this call
    takes any."""
    lines = [f"Authorization: Bearer {request.key}".encode("latin-1"), b"Expect:"]
    url = f"{app.settings.openai_api_url}/v1/models"
    with _to_openai(app, request, "GET", url, lines, None, kept=False) as call:
        answer = call.whole()
    if _refuses_key(answer):
        raise ApiError("invalid_api_key", "OpenAI's API does not take this key; send a valid one.")
    if answer.status == 429 or answer.status >= 500:
        raise refusal(answer.status, answer.headers, b"")


def _relayed(call: Call, writer: Writer) -> None:
    """Passes an answer on as it comes."""
    with call:
        call.carry(lambda data: writer.write(data, data.count(b"\n\n")), writer)


class Streamed(Sink):
    """An answer for a client that gets it as it comes."""

    def __init__(self, rendering: Rendering, writer: Writer) -> None:
        self.outlet: Writer = writer
        self._rendering, self.careful = rendering, rendering.trims

    def light(self, events: list[Light]) -> bool:
        return self._rendering.light(events)

    def take(self, events: list[Event]) -> None:
        self.begun = True
        self.outlet.write(*self._rendering.feed(events))
        self.over = self._rendering.cut


class Whole(Sink):
    """An answer for a client that waits for its end."""

    def __init__(self, rendering: Rendering, take: Callable[[list[Event]], object]) -> None:
        self._rendering, self._take, self.careful = rendering, take, rendering.trims

    def light(self, events: list[Light]) -> bool:
        return self._rendering.light(events)

    def take(self, events: list[Event]) -> None:
        self.begun = True
        self._take(events)
        self.over = self._rendering.cut


def _asked(request: Request, question: Question, signed_in: bool = False) -> Asked:
    """A question as the caller asks it."""
    return Asked(question, request.watch, request.guest, request.scope, signed_in, request.base)


def _ask(
    app: App, request: Request, asked: Asked, sink: Sink, rendering: Rendering, only: Upstream | None = None
) -> None:
    """Has a question answered, by whoever can or one upstream `only`, and counts its tokens for the API user who asked."""
    try:
        _by_order(asked, sink, [only] if only else _order_of(app, request))
    finally:
        if request.user and rendering.message:
            app.ledger.count(request.user, tokens=sum(rendering.counted()[:2]))


# What an upstream cannot do that another one may.
_PASSES_ON = ("no_agent", "no_account", "rate_limit_exceeded", "model_not_found", "upstream_blocked")
# Errors that say only that nobody can answer here.
_NOBODY = ("no_account", "no_agent", "login_required")
# Those, and the ones about an upstream or its accounts: a limit of the upstream before is told rather than these.
_SAYS_LITTLE = (
    "no_account", "no_agent", "login_required", "invalid_api_key", "token_not_credited", "upstream_blocked",
    "human_check_required", "upstream_error", "upstream_timeout",
)  # fmt: skip


def _order_of(app: App, request: Request) -> list[Upstream]:
    """The upstreams that may answer a caller, in the order of the settings; with HISTORY_DISABLED=false Chat Completions first
    ask those that keep conversations, whose ids are told."""
    order = [app.upstreams[name] for name in app.settings.upstream_order]
    if not app.settings.history_disabled and request.route == "/v1/chat/completions":
        order.sort(key=lambda one: not one.has_conversations)
    if request.guest and request.guest.row.kind != LOGIN_FREE:  # then the caller's account is asked
        order = [one for one in order if one is app.codex and request.guest.speaks_codex()]
        order.append(app.web)
    return order


def _by_order(asked: Asked, sink: Sink, order: list[Upstream]) -> None:
    """The answer of the first of these upstreams, or of the next one when that has nobody to answer."""
    question = asked.question
    if question.attachments:
        order = [one for one in order if one.files]
        if not order:
            text = "Agents take no files; name `pool` in UPSTREAM_ORDER too."
            raise invalid(question.attachments[0].where, text)
    if question.conversation:
        order = [one for one in order if one.has_conversations]
        if not order:
            text = "The Codex backend has no conversations; name `pool` in UPSTREAM_ORDER too."
            raise invalid("conversation_id", text)
        if len(order) > 1:
            order = _holders(order, question.conversation, asked.scope) or order

    def ask(upstream: Upstream, before: ApiError | None) -> None:
        # A model that another upstream has, and that is to be waited for there, is not passed off as another one.
        limited = before is not None and before.code == "rate_limit_exceeded"
        if before and limited and not upstream.has(question.model, asked.guest, asked.watch):
            raise before
        try:
            upstream.answer(asked, sink)
        except ApiError as error:
            # What befell accounts that are hardly its own says less than that nobody has the model.
            missing = before is not None and before.code == "model_not_found" and not upstream.is_sure()
            raise (before if before and missing and not sink.begun else error) from None

    in_turn(order, ask, lambda: sink.begun)


def in_turn(
    order: Sequence[Y], ask: Callable[[Y, ApiError | None], T], begun: Callable[[], bool] = lambda: False
) -> T:
    """What the first of several gives, or the next one when that has nobody for it; when the last one has not either, the
    error that says most. `ask` is told why the one before did not."""
    told: ApiError | None = None
    for one in order:
        try:
            return ask(one, told)
        except ApiError as error:
            limited = told and told.code in ("rate_limit_exceeded", "upstream_blocked")
            if told and (
                (limited and error.code in _SAYS_LITTLE)
                or (told.code == "model_not_found" and error.code in _NOBODY)
            ):
                error = told
            if one is order[-1] or begun() or error.code not in _PASSES_ON:
                raise error from None
            told = error
    raise AssertionError  # there is one at least


def _holders(order: list[Upstream], conversation: str, scope: Scope) -> list[Upstream]:
    """The first upstream that has a conversation; not_found if there is none, and the conversation is not the caller's."""
    refused: ApiError | None = None
    for upstream in order:
        try:
            if upstream.holds(conversation, scope):
                return [upstream]
        except ApiError as error:
            refused = error
    if refused:
        raise refused
    return []


def _as_it_comes(app: App, request: Request, asked: Asked, rendering: Rendering, **facts: Any) -> Stream:
    """The answer to a question as it comes; `facts` are fields of the Stream."""

    def write(writer: Writer) -> None:
        _ask(app, request, asked, Streamed(rendering, writer), rendering)

    return Stream(write, **facts)


def _all(app: App, request: Request, asked: Asked, upstream: Upstream | None = None) -> Collected:
    """A whole answer that is used here, of the pool's if none is named, counted for the API user who asked."""
    answer = Collected()
    (upstream or app.web).answer(asked, answer)
    if request.user:
        texts = [message.text for message in asked.question.messages]
        texts += [event.text for event in answer.events if isinstance(event, Text)]
        app.ledger.count(request.user, tokens=sum(map(app.tokens.count, texts)))
    return answer


def _image_data(app: App, request: Request, asked: Asked, url: str, watch: Watch) -> str:
    """The image at a URL of the upstream's in base64, got by the account that answered."""
    if kept := app.links.of(url):
        return base64.b64encode(kept.read()).decode()
    get = functools.partial(app.site.downloaded, url=url, watch=watch)
    holder = asked.account.id if asked.account else None
    blob = app.web.do("downloads", request.guest, get, watch, holder)
    return base64.b64encode(blob.read()).decode()


def _text_of(events: Iterable[Event]) -> str:
    return "".join(event.text for event in events if isinstance(event, Text))


# -- chat --------------------------------------------------------------------------------------------------------------


@ROUTER.on("POST", "/v1/chat/completions")
def chat_completions(app: App, request: Request) -> Reply | Stream | Upgrade:
    """OpenAI's chat completions, streamed or whole"""
    settings = app.settings
    turn = parse_chat(request.json(app.known_tools), settings.history_disabled, settings.upload_by_url)
    _tell_left_out(app, turn)
    extras = not settings.history_disabled
    asked = _asked(request, turn.question)
    if turn.stream:
        stream = CompletionStream(turn, app.tokens, extras, bool(request.user))
        return _as_it_comes(app, request, asked, stream, opens=True)
    completion = Completion(turn, app.tokens, extras)
    _ask(app, request, asked, Whole(completion, completion.take), completion)
    return json_reply(completion.whole())


RESPONSE_ID = "resp_[^/]+"


def _wanted(app: App, request: Request, body: dict[str, Any], counted: bool = False) -> ResponseRequest:
    """What a body of the Responses API asks for."""
    check_types(body, RESPONSE_FIELDS)
    kept = KeptItems(app, request)
    earlier = _earlier(app, request, body.get("previous_response_id"), kept)
    wanted = parse_response(body, earlier, kept.find, app.settings.upload_by_url, counted)
    _tell_left_out(app, wanted.turn)
    return wanted


def _response(
    app: App, request: Request, body: dict[str, Any], kept: bool = True, only: Upstream | None = None
) -> tuple[ModelResponse, Callable[[Sink], None]]:
    """The response to be that a body asks for, and what has a sink filled with it. `kept`: whether it is stored, if the
    body does not say otherwise; `only`: who is to answer."""
    wanted = _wanted(app, request, body)
    asked = _asked(request, wanted.turn.question)

    def keep(response: ModelResponse, whole: dict[str, Any]) -> None:
        if kept and wanted.store:
            try:
                try:
                    items = compact(_kept_items(app, asked, response))
                except ApiError:
                    items = ""
                items = items if len(items) <= MAX_EARLIER else ""  # too long to be gone on from
                text, items = (one.encode("utf-8", "replace").decode() for one in (compact(whole), items))
                named = [item["id"] for item in response.items if isinstance(item.get("id"), str)]
                named = named if response.is_native else []
                owner = request.scope.owner
                app.store.put_response(response.id, owner, text, items, time.time(), named)
                app.codex.keep_response(response.id, asked.account if response.is_native else None)
            except StoreUnavailable:
                whole["store"] = wanted.echo["store"] = False

    def inline(url: str) -> str:
        try:
            return _image_data(app, request, asked, url, request.watch)
        except ApiError as error:
            log(logging.WARNING, "a drawing of an answer cannot be had", code=error.code)
            return ""

    make = Compaction if wanted.compacts else ModelResponse
    response = make(wanted, app.tokens, keep, inline)
    return response, lambda sink: _ask(app, request, asked, sink, response, only)


@ROUTER.on("POST", "/v1/responses")
def responses_create(app: App, request: Request) -> Reply | Stream | Upgrade:
    """OpenAI's responses, streamed or whole; kept for 24 hours unless `store` is false"""
    response, ask = _response(app, request, request.json(app.known_tools))
    if response.turn.stream:
        return Stream(lambda writer: ask(Streamed(response, writer)), opens=True, failed=response.failed)
    ask(Whole(response, response.feed))
    return json_reply(response.whole())


@ROUTER.on("POST", "/v1/responses/compact")
def responses_compact(app: App, request: Request) -> Reply:
    """makes a conversation shorter: one item to go on from"""
    body = request.json()
    said = body.get("input") or []
    said = [{"role": "user", "content": said}] if isinstance(said, str) else said
    if not isinstance(said, list):
        raise unfit("input", "must be a string or a list of items.")
    body["input"] = [*said, {"type": "compaction_trigger"}]

    def by(upstream: Upstream, _: ApiError | None) -> Reply:
        if isinstance(upstream, Codex):
            turn = _wanted(app, request, body).turn
            told = upstream.compacted(_asked(request, turn.question))
            facts = {"id": f"resp_{secrets.token_hex(24)}", "created_at": int(time.time())}
            count = prompt_tokens(turn.question, app.tokens.count)
            usage = told.get("usage") or ModelResponse.usage_of(Usage(count, 0, 0, 0))
            if request.user:
                app.ledger.count(request.user, tokens=int(usage.get("total_tokens") or count))
            return json_reply(facts | told | {"object": "response.compaction", "usage": usage})
        response, ask = _response(app, request, body, kept=False, only=upstream)
        ask(Whole(response, response.feed))
        return json_reply(cast(Compaction, response).compacted())

    return in_turn(_order_of(app, request), by)


@ROUTER.on("POST", "/v1/responses/input_tokens")
def responses_input_tokens(app: App, request: Request) -> Reply:
    """how many tokens a request has, without asking it"""
    body = {"model": "auto"} | {name: value for name, value in request.json().items() if value is not None}
    wanted = _wanted(app, request, body, counted=True)
    count = prompt_tokens(wanted.turn.question, app.tokens.count)
    return json_reply({"object": "response.input_tokens", "input_tokens": count})


def _tell_left_out(app: App, turn: Turn) -> None:
    """Names in the log, once, the kinds of tools and items that mean nothing here."""
    for kind in turn.left_out:
        if kind not in app.left_out and len(app.left_out) < MAX_LEFT_OUT:
            app.left_out.add(kind)
            log(logging.INFO, "a kind of tool or item is left out of requests", kind=kind)


MAX_LEFT_OUT = 100  # kinds that are named in the log
MAX_EARLIER = 4 << 20  # characters


def _earlier(app: App, request: Request, id: Any, drawings: KeptItems) -> list[dict[str, Any]]:
    """The items that a response can be gone on from, with what was drawn."""
    if id is None:
        return []
    where = "previous_response_id"
    items = _items_of(_kept_response(app, request, str(id), where)[1], where)
    drawn = [item for item in items if item["type"] == "image_generation_call" and not item.get("result")]
    for item in drawn[-MAX_DRAWINGS:]:
        item |= drawings.find(item["id"]) or {}
    return items


def _items_of(kept: str, where: str | None = None) -> list[dict[str, Any]]:
    """The items that were kept of a response: what it was made from, and its own."""
    if not kept or len(kept) > MAX_EARLIER:
        text = "The earlier conversation has become too long; begin a new one."
        raise ApiError("request_too_large", text, where)
    items = json.loads(kept)
    if not isinstance(items, list):  # as an earlier version kept it
        raise _no_response(where)
    return dicts(items)


MAX_DRAWINGS = 5  # of an earlier conversation that are shown the model again


def _no_response(where: str | None = None) -> ApiError:
    return ApiError("not_found", "There is no such response; they are kept for 24 hours.", where)


def _kept_response(app: App, request: Request, id: str, where: str | None = None) -> tuple[str, str]:
    if kept := app.store.response(id, request.scope, time.time()):
        return kept
    raise _no_response(where)


MAX_REFERENCES = 100  # items of kept responses that a request may name


class KeptItems:
    """The items of kept responses that one request names: each response is read once, and what they say together has
    the limit of what was said before. A drawing is not counted, of which a response has few."""

    def __init__(self, app: App, request: Request) -> None:
        self._app, self._request = app, request
        self._items: dict[str, dict[str, dict[str, Any]]] = {}  # by the response's id and their own
        self._found, self._size = 0, 0

    def find(self, id: str) -> dict[str, Any] | None:
        """An item by its id, which has the response's in it, unless it is an upstream's own."""
        listed = id.startswith("item_")  # as `listed_items` has it: of what the response was made from
        item = self._within(f"resp_{id.partition('_')[2][: -4 if listed else -2]}", listed).get(id)
        for response in self._app.store.responses_with(id) if item is None else ():
            item = item or self._within(response, False).get(id)
        self._found += 1
        self._size += len(compact(item | {"result": None})) if item else 0
        if self._found > MAX_REFERENCES or self._size > MAX_EARLIER:
            raise ApiError(
                "request_too_large",
                "The request refers to more earlier items than are read at a time.",
                "input",
            )
        return item

    def _within(self, response: str, listed: bool) -> dict[str, dict[str, Any]]:
        """The items of a response, or what it was made from, by their ids."""
        place = f"{response} {listed}"
        if place not in self._items:
            kept = self._app.store.response(response, self._request.scope, time.time())
            items: list[dict[str, Any]] = []
            if kept:
                items = (
                    listed_items(_items_of(kept[1]), response) if listed else json.loads(kept[0])["output"]
                )
            self._items[place] = {str(item.get("id")): item for item in items}
        return self._items[place]


def _kept_items(app: App, asked: Asked, rendering: ModelResponse) -> list[dict[str, Any]]:
    """The messages of a request and its answer as items, with the files as the account that answered holds them."""

    def place(attachment: Attachment) -> dict[str, Any]:
        id = attachment.file
        if not id and asked.account is not None:
            id = app.files.owned(asked.account, asked.materials[attachment][0], asked.scope.owner).id
        told = {"type": "input_image", "detail": "auto"} if attachment.image else {"type": "input_file"}
        return told | {"file_id": id}

    items = rendering.items
    if rendering.request.compacts:  # which stands for everything before
        pass
    elif rendering.is_native:
        items = [*_as_told(asked.question), *items]
    else:
        items = [*rendering.request.tools, *as_items(rendering.request.messages, place), *items]
    # Reasoning that only its upstream can read is for that one; other reasoning is for nobody. A drawing stands in the
    # response itself, and is as large as all else together.
    kept = [item for item in items if item.get("type") != "reasoning" or item.get("encrypted_content")]
    return [item | {"result": None} if item.get("result") else item for item in kept]


def _as_told(question: Question) -> list[dict[str, Any]]:
    """The items of a native request as they are kept; request_too_large when their files are."""
    items: list[dict[str, Any]] = (question.native or {})["input"]
    sizes = [one.blob.size for one in question.attachments if one.blob]
    if sum(sizes) * 4 // 3 > MAX_EARLIER:
        raise ApiError("request_too_large", "The files of this conversation are too large to be kept.")
    return [dict(in_full(changed(item, as_sent) if sizes else item)) for item in items]


@ROUTER.on("GET", "/v1/responses/{id}", access=OR_ADMIN, id=RESPONSE_ID)
def responses_retrieve(app: App, request: Request) -> Reply | Stream | Upgrade:
    """a response that is kept; with `stream=true` as events, from behind `starting_after` on"""
    kept = _kept_response(app, request, request.params["id"])[0]
    if request.query.get("stream", "false") in ("false", "0"):
        return Reply(body=kept.encode())
    start = _query_number(request, "starting_after", -1, -1, 1 << 30) + 1
    pieces = replayed(json.loads(kept))[start:]
    return streamed((piece.encode(), 1) for piece in pieces)


@ROUTER.on("GET", "/v1/responses/{id}/input_items", access=OR_ADMIN, id=RESPONSE_ID)
def responses_input_items(app: App, request: Request) -> Reply:
    """what a kept response was made from, the last first, or with `order=asc` the first"""
    id = request.params["id"]
    whole, kept = _kept_response(app, request, id)
    items = _items_of(kept)
    answer = {item.get("id") for item in json.loads(whole)["output"]}
    data = listed_items([item for item in items if item.get("id") not in answer], id)
    order = request.query.get("order", "desc")
    if order not in ("asc", "desc"):
        raise unfit("order", "must be asc or desc.")
    if order == "desc":
        data.reverse()
    ids = ["", *(item["id"] for item in data)]
    after = request.query.get("after", "")
    if after not in ids:
        raise unfit("after", "must be the id of one of the items.")
    start = ids.index(after)
    page = data[start : start + _query_number(request, "limit", 20, 1, 100)]
    facts = {"object": "list", "data": page, "has_more": start + len(page) < len(data)}
    ends = {"first_id": page[0]["id"], "last_id": page[-1]["id"]} if page else {}
    return json_reply(facts | {"first_id": "", "last_id": ""} | ends)


def _query_number(request: Request, name: str, usual: int, least: int, most: int) -> int:
    """A number of the query."""
    text = request.query.get(name, str(usual))
    if not re.fullmatch(r"-?[0-9]{1,10}", text) or not least <= int(text) <= most:
        raise unfit(name, f"must be a number from {max(least, 0)} to {most}.")
    return int(text)


@ROUTER.on("DELETE", "/v1/responses/{id}", access=OR_ADMIN, id=RESPONSE_ID)
def responses_delete(app: App, request: Request) -> Reply:
    """forgets a response"""
    id = request.params["id"]
    _kept_response(app, request, id)
    app.store.remove_response(id)
    return json_reply({"id": id, "object": "response", "deleted": True})


# -- Anthropic's API ------------------------------------------------------------------------------------------------------


@ROUTER.on("POST", "/v1/messages")
def messages_create(app: App, request: Request) -> Reply | Stream | Upgrade:
    """Anthropic's messages, streamed or whole"""
    wanted = parse_message_request(request.json(app.known_tools))
    _tell_left_out(app, wanted.turn)
    asked = _asked(request, wanted.turn.question)
    message = ModelMessage(wanted, app.tokens)
    if wanted.turn.stream:
        return _as_it_comes(app, request, asked, message, opens=True, failed=event_of_failed_message)
    _ask(app, request, asked, Whole(message, message.feed), message)
    return json_reply(message.whole())


@ROUTER.on("POST", "/v1/messages/count_tokens")
def messages_count_tokens(app: App, request: Request) -> Reply:
    """how many tokens a request has, without asking it"""
    wanted = parse_message_request(request.json(), counted=True)
    return json_reply({"input_tokens": prompt_tokens(wanted.turn.question, app.tokens.count)})


# -- Ollama's API ---------------------------------------------------------------------------------------------------------


def _ollama(app: App, request: Request, chats: bool) -> Reply | Stream | Upgrade:
    """The answer to a chat or a completion; a request without a question only has the model loaded, as it always is."""
    body = request.json(app.known_tools)
    turn = parse_ollama(body, chats)
    if turn is None:
        unloads = body.get("keep_alive") in (0, "0", "0s")
        return json_reply(ollama_loaded(ollama_model(body), chats, "unload" if unloads else "load"))
    _tell_left_out(app, turn)
    asked = _asked(request, turn.question)
    name = str(body.get("model") or body.get("name"))
    answer = OllamaAnswer(turn, app.tokens, name, chats, body.get("think") is not False)
    if turn.stream:
        facts = {"content_type": "application/x-ndjson", "signs": False, "end": b"\n"}
        return _as_it_comes(app, request, asked, answer, failed=line_of_failure, **facts)
    _ask(app, request, asked, Whole(answer, answer.feed), answer)
    return json_reply(answer.whole())


@ROUTER.on("POST", "/api/chat")
def ollama_chat(app: App, request: Request) -> Reply | Stream | Upgrade:
    """Ollama's chat, streamed (NDJSON) or whole"""
    return _ollama(app, request, chats=True)


@ROUTER.on("POST", "/api/generate")
def ollama_generate(app: App, request: Request) -> Reply | Stream | Upgrade:
    """Ollama's completion of a prompt, streamed (NDJSON) or whole"""
    return _ollama(app, request, chats=False)


@ROUTER.on("GET", "/api/tags")
def ollama_tags(app: App, request: Request) -> Reply:
    """the models, as Ollama lists them"""
    models = [
        {"name": name, "model": name, "modified_at": iso(listed)} | ollama_facts(name)
        for name, listed in _listed_models(app, request).items()
    ]
    return json_reply({"models": models})


@ROUTER.on("GET", "/api/ps")
def ollama_ps(app: App, request: Request) -> Reply:
    """the models that are loaded: none needs to be"""
    return json_reply({"models": []})


@ROUTER.on("POST", "/api/show")
def ollama_show(app: App, request: Request) -> Reply:
    """what one of the models can do"""
    body = request.json()
    check_types(body, OLLAMA_FIELDS)
    name = ollama_model(body)
    models = _listed_models(app, request)
    if name not in models and not _GPT.fullmatch(name):
        raise ApiError("model_not_found", f"model '{name}' not found; GET /api/tags lists those there are")
    # Clients take it from the template whether a model can call tools.
    facts = {"modelfile": "", "parameters": "", "template": "{{ .Messages }}{{ .Tools }}", "license": ""}
    info: dict[str, Any] = {"general.architecture": "chatgpt", "general.basename": name}
    known = _facts_of_models(app, request).get(name, {})
    info["chatgpt.context_length"] = known.get("context_window") or OLLAMA_CONTEXT
    told = {"details": ollama_facts(name)["details"], "model_info": info, "capabilities": OLLAMA_CAPABILITIES}
    return json_reply(facts | told | {"modified_at": iso(models.get(name, time.time()))})


@ROUTER.on("GET", "/api/version", access="public")
def ollama_version(app: App, request: Request) -> Reply:
    """the version of Ollama's API that is spoken here"""
    return json_reply({"version": OLLAMA_VERSION})


# -- models ------------------------------------------------------------------------------------------------------------


def _listed_models(app: App, request: Request) -> dict[str, int]:
    """The models that the caller may name, and when they were listed: those of the upstreams, and the aliases."""
    found: dict[str, int] = {}
    failure: ApiError | None = None
    for upstream in _order_of(app, request):
        try:
            found = upstream.models(request.guest, request.watch) | found
        except ApiError as error:
            failure = error
    if failure and not found:
        raise failure
    return found | {name: int(time.time()) for name in ALIASES if name not in found}


# What is told of a model besides, by the Codex backend's names for it.
_MODEL_FACTS = {
    "display_name": "display_name",
    "description": "description",
    "context_window": "context_window",
    "max_context_window": "max_context_window",
    "input_modalities": "input_modalities",
    "default_reasoning_level": "default_reasoning_effort",
}


def model_facts(told: Mapping[str, Any]) -> dict[str, Any]:
    """A model of the Codex backend's in the fields that are told besides OpenAI's own."""
    facts: dict[str, Any] = {
        ours: told[name] for name, ours in _MODEL_FACTS.items() if told.get(name) is not None
    }
    return facts | ({"reasoning_efforts": levels} if (levels := levels_of(told)) else {})


def _model(request: Request, id: str, created: int, facts: Mapping[str, Any]) -> dict[str, Any]:
    """A model in the shape of its route and client, with what else is known of it."""
    if "anthropic-version" in request.headers:
        name = str(facts.get("display_name") or id)
        told = {"type": "model", "id": id, "display_name": name, "lifecycle": "active"}
        window = facts.get("context_window")
        return told | {"created_at": iso(created), "max_input_tokens": window, "max_tokens": None}
    if "engines" in request.route:
        return {"id": id, "object": "engine", "created": created, "owner": "openai", "ready": True}
    return {"id": id, "object": "model", "created": created, "owned_by": "openai"} | dict(facts)


def _facts_of_models(app: App, request: Request) -> dict[str, dict[str, Any]]:
    """What is known of the models of the Codex backend, if that may answer the caller."""
    if app.codex not in _order_of(app, request):
        return {}
    told = app.codex.facts(request.guest, request.watch)
    return {slug: model_facts(one) for slug, one in told.items()}


@ROUTER.on("GET", "/v1/models", "/v1/engines")
def models_list(app: App, request: Request) -> Reply:
    """the models of the pool's accounts (or the caller's), and the aliases; in Anthropic's shape for its clients"""
    listed, facts = _listed_models(app, request), _facts_of_models(app, request)
    data = [_model(request, *one, facts.get(one[0], {})) for one in listed.items()]
    if "anthropic-version" in request.headers:
        ends = {"first_id": data[0]["id"], "last_id": data[-1]["id"]}  # aliases are always there
        return json_reply({"data": data, "has_more": False} | ends)
    return json_reply({"object": "list", "data": data})


@ROUTER.on("GET", "/v1/models/{id}", "/v1/engines/{id}")
def models_retrieve(app: App, request: Request) -> Reply:
    """one of the models, or any GPT by its `g-…`"""
    id = request.params["id"]
    models = _listed_models(app, request)
    if id not in models and not _GPT.fullmatch(id):
        text = "There is no such model; GET /v1/models lists those there are."
        raise ApiError("model_not_found", text, "model")
    facts = _facts_of_models(app, request).get(id, {})
    return json_reply(_model(request, id, models.get(id, int(time.time())), facts))


# -- files -------------------------------------------------------------------------------------------------------------

PURPOSES = ("assistants", "batch", "evals", "fine-tune", "user_data", "vision")


def _file_object(file: File) -> dict[str, Any]:
    facts = {"id": file.id, "object": "file", "bytes": file.size, "created_at": int(file.used)}
    return facts | {"filename": file.name, "purpose": file.purpose, "status": "processed"}


def _form_file(form: Mapping[str, list[Part]], *names: str) -> list[Part]:
    """The files in fields of these names; at least one."""
    found = [part for name in names for part in form.get(name, []) if part.file_name is not None]
    if not found or not all(part.blob.size for part in found):
        text = f"Send the file in the form field `{names[0]}`, with a file name and not empty."
        raise invalid(names[0], text)
    return found


def _form_text(form: Mapping[str, list[Part]], name: str, default: str = "") -> str:
    parts = form.get(name)
    return parts[0].text() if parts else default


@ROUTER.on("POST", "/v1/files")
def files_create(app: App, request: Request) -> Reply:
    """uploads a file (form fields `file` and `purpose`) to an account of the pool, which from then on answers what uses it"""
    form = parse_form(request.headers, request.body)
    part = _form_file(form, "file")[0]
    purpose = _form_text(form, "purpose")
    owner = request.scope.owner
    if purpose not in PURPOSES:
        raise unfit("purpose", f"must be one of {', '.join(PURPOSES)}.")
    file = app.files.described(part.blob, part.file_name or "", part.content_type, owner)

    def place(account: Account) -> File:
        return app.files.placed(account, file, part.blob, request.watch)

    # Beside the owner's other files, so that one account can answer what uses several.
    before = app.store.files("owner=? AND purpose!=''", owner)
    beside = app.pool.find(before[0].account) if before else None
    preferred = beside.id if beside else None
    held = app.web.do(UPLOADS, request.guest, place, request.watch, preferred=preferred)
    kept = held._replace(owner=owner, purpose=purpose, used=time.time())
    if held.purpose or held.owner != owner:
        kept = app.files.kept(kept)
    else:
        app.store.put_file(kept)
    return json_reply(_file_object(kept))


@ROUTER.on("GET", "/v1/files", access=OR_ADMIN)
def files_list(app: App, request: Request) -> Reply:
    """the files that the caller may see; `purpose`, `order`, `limit` and `after` as OpenAI has them"""
    query = request.query
    limit = query.get("limit", "10000")
    if not re.fullmatch(r"[0-9]{1,5}", limit) or not 1 <= int(limit) <= 10000:
        raise unfit("limit", "must be a number from 1 to 10000.")
    scope, listed = request.scope, "purpose!=''"
    files = (
        app.store.files(listed) if scope.everyone else app.store.files(f"owner=? AND {listed}", scope.owner)
    )
    files = [
        one for one in files if query.get("purpose", one.purpose) == one.purpose and scope.covers(one.owner)
    ]
    if query.get("order") == "asc":
        files.reverse()
    ids = [file.id for file in files]
    if (after := query.get("after")) and after in ids:
        files = files[ids.index(after) + 1 :]
    page = [_file_object(file) for file in files[: int(limit)]]
    ends = {"first_id": page[0]["id"] if page else None, "last_id": page[-1]["id"] if page else None}
    return json_reply({"object": "list", "data": page, "has_more": len(files) > int(limit)} | ends)


def _listed_file(app: App, request: Request) -> File:
    file = app.files.find(request.params["id"], request.scope)
    if not file.purpose:
        raise ApiError("not_found", "There is no such file; upload it with POST /v1/files.")
    return file


@ROUTER.on("GET", "/v1/files/{id}", access=OR_ADMIN)
def files_retrieve(app: App, request: Request) -> Reply:
    """a file's name, size and purpose"""
    return json_reply(_file_object(_listed_file(app, request)))


@ROUTER.on("GET", "/v1/files/{id}/content", access=OR_LINK)
def files_content(app: App, request: Request) -> Reply | Stream | Upgrade:
    """a file's bytes, streamed from the upstream; those of an answer's file for whoever has its signed link"""
    if linked := app.links.file(request.params["id"], request.query):
        blob, name, mime = linked
        # Whatever the model made is no page of this server's.
        shown = "inline" if mime in _SHOWN else "attachment"
        headers = _as_file(name, shown) | {"Content-Security-Policy": "default-src 'none'; sandbox"}
        if blob.size <= MAX_IN_MEMORY:
            return Reply(body=blob.read(), content_type=mime, headers=headers)
        return streamed(
            ((piece, 0) for piece in blob.pieces()), content_type=mime, headers=headers, signs=False
        )
    file = _listed_file(app, request)
    if request.method == "HEAD":
        return Reply(content_type=file.mime)

    def begin(account: Account) -> Call:
        url = app.site.file_url(account, file.upstream, request.watch)
        return app.site.content(account, url, request.watch)

    call = app.web.do("downloads", request.guest, begin, request.watch, file.account)

    def write(writer: Writer) -> None:
        with call:
            call.carry(lambda data: writer.write(data, 0), writer)

    return Stream(write, content_type=file.mime, headers=_as_file(file.name, "attachment"), signs=False)


# Kinds of files that a browser may show where it finds them.
_SHOWN = ("image/png", "image/jpeg", "image/gif", "image/webp")


def _as_file(name: str, shown: str) -> dict[str, str]:
    """The headers of a file's bytes: `shown` is inline or attachment."""
    place = f"{shown}; filename*=UTF-8''{urllib.parse.quote(name, errors='replace')}"
    return {"Content-Disposition": place, "X-Content-Type-Options": "nosniff"}


@ROUTER.on("DELETE", "/v1/files/{id}", access=OR_ADMIN)
def files_delete(app: App, request: Request) -> Reply:
    """forgets a file; the upstream has no call to delete it there"""
    file = _listed_file(app, request)
    app.store.remove_file(file.id)
    return json_reply({"id": file.id, "object": "file", "deleted": True})


# -- images ------------------------------------------------------------------------------------------------------------

_IMAGE_MODEL = re.compile(r"gpt-image.*|chatgpt-image.*|dall-e.*|auto")
IMAGE_FIELDS: Types = {
    "prompt": _TEXT, "model": _TEXT, "n": _INTEGER, "size": _TEXT, "quality": _TEXT, "response_format": _TEXT,
    "stream": _FLAG, "user": _TEXT,
}  # fmt: skip
MAX_IMAGES = 4


@ROUTER.on("POST", "/v1/images/generations")
def images_generations(app: App, request: Request) -> Reply:
    """draws up to 4 images, as `url` or `b64_json`"""
    body = request.json()
    check_types(body, IMAGE_FIELDS)
    return _drawn(app, request, body, [])


@ROUTER.on("POST", "/v1/images/edits")
def images_edits(app: App, request: Request) -> Reply:
    """draws from the images in the form fields `image` (or `image[]`) and, where there is one, `mask`"""
    form = parse_form(request.headers, request.body)
    parts = _form_file(form, "image", "image[]")
    mask = [part for part in form.get("mask", []) if part.blob.size]
    names = ("prompt", "model", "size", "quality", "response_format")
    body: dict[str, Any] = {name: _form_text(form, name) or None for name in names}
    body["stream"] = _form_text(form, "stream").lower() in ("true", "1")
    count = _form_text(form, "n", "1")
    body["n"] = int(count) if re.fullmatch("[0-9]{1,3}", count) else 0
    images = [
        Attachment(name, True, part.file_name or "", part.content_type, part.blob)
        for name, several in (("image", parts), ("mask", mask[:1]))
        for part in several
    ]
    if mask:
        body["mask"] = "The last image is a mask: change only what is transparent in it."
    return _drawn(app, request, body, images)


def _drawn(app: App, request: Request, body: Mapping[str, Any], images: list[Attachment]) -> Reply:
    """The images that parallel turns draw."""
    prompt = required(body, "prompt")
    n = body.get("n")
    size = body.get("size")
    quality = body.get("quality")
    n = 1 if n is None else n
    if not 1 <= n <= MAX_IMAGES:
        raise unfit("n", f"must be from 1 to {MAX_IMAGES}.")
    if body.get("stream"):
        raise unfit("stream", "must be false: the upstream gives images whole.")
    if size not in (None, "auto") and not re.fullmatch(r"[1-9][0-9]{1,3}x[1-9][0-9]{1,3}", size):
        raise unfit("size", "must be auto, or WIDTHxHEIGHT such as 1024x1024.")
    if quality is not None and not re.fullmatch(r"[a-z]{1,16}", quality):
        raise unfit("quality", "must be a word such as standard, hd, low, medium or high.")
    model = body.get("model") or "auto"
    usual = "b64_json" if model.startswith(("gpt-image", "chatgpt-image")) else "url"
    form = body.get("response_format") or usual
    if form not in ("url", "b64_json"):
        raise unfit("response_format", "must be url or b64_json.")
    told = [f"{'Edit the image' if images else 'Draw one image'} as described:\n{prompt}", body.get("mask")]
    told.append(f"Size: {size}." if size not in (None, "auto") else None)
    told.append(f"Quality: {quality}." if quality not in (None, "auto") else None)
    text = "\n\n".join(line for line in told if line)
    model = "auto" if _IMAGE_MODEL.fullmatch(model) else fit_name(model)
    wanted = {name: one for name, one in (("size", size), ("quality", quality)) if one not in (None, "auto")}
    question = Question(
        (Message("user", (*images, Text(text))),),
        model,
        hosted=(DRAWING,),
        forced=DRAWING,
        options={"drawing": wanted},
    )
    order = [one for one in _order_of(app, request) if one is not app.agents]
    order = order if app.web in order else [*order, app.web]

    def draw(watch: Watch) -> list[dict[str, str]]:
        asked = Asked(question, watch, request.guest, request.scope, True, request.base)
        answer = in_turn(order, lambda upstream, _: _all(app, request, asked, upstream))
        urls = [event.url for event in answer.events if isinstance(event, Image)]
        if form == "url":
            return [{"url": url} for url in urls]
        return [{"b64_json": _image_data(app, request, asked, url, watch)} for url in urls]

    data: list[dict[str, str]] = []
    for missing in (n, 1):  # a turn without an image is made up for once
        if len(data) < n:
            missing = max(missing, n - len(data))
            data += itertools.chain(*side_by_side([draw] * min(missing, n), request.watch))
    if not data:
        text = "The upstream answered without an image; say more clearly what to draw."
        raise ApiError("upstream_error", text)
    return json_reply({"created": int(time.time()), "data": data[:n]})


# -- speech ------------------------------------------------------------------------------------------------------------

# The upstream's voice for each of OpenAI's; its own names may be used as well.
VOICES = {
    "alloy": "ember", "ash": "cove", "ballad": "arbor", "coral": "breeze", "echo": "cove", "fable": "vale",
    "nova": "maple", "onyx": "arbor", "sage": "juniper", "shimmer": "juniper", "verse": "sol", "marin": "breeze",
    "cedar": "spruce",
}  # fmt: skip
SPEECH_FORMATS = ("mp3", "aac", "opus", "flac", "wav")
MAX_SPOKEN = 4096  # characters
SPEECH_FIELDS: Types = {
    "input": _TEXT, "model": _TEXT, "response_format": _TEXT, "speed": _NUMBER, "instructions": _TEXT, "stream_format": _TEXT,
}  # fmt: skip


@ROUTER.on("POST", "/v1/audio/speech")
def audio_speech(app: App, request: Request) -> Reply:
    """reads a text of up to 4,096 characters aloud"""
    body = request.json()
    check_types(body, SPEECH_FIELDS)
    text = required(body, "input")
    voice = body.get("voice") or "alloy"
    voice = str(voice.get("id") if isinstance(voice, dict) else voice)
    form = body.get("response_format") or "mp3"
    if len(text) > MAX_SPOKEN:
        raise unfit("input", f"must have at most {MAX_SPOKEN} characters.")
    if form not in SPEECH_FORMATS:
        raise unfit("response_format", f"must be one of {', '.join(SPEECH_FORMATS)}.")
    if voice not in VOICES and voice not in VOICES.values():
        raise unfit("voice", f"must be one of {', '.join(sorted({*VOICES, *VOICES.values()}))}.")
    if body.get("stream_format") not in (None, "audio"):
        raise unfit("stream_format", "must be audio.")
    account, finish = _repeated(app, request, text)
    ids = (finish.conversation, finish.message)
    named = VOICES.get(voice, voice)

    def read(account: Account) -> Answer:
        return app.site.speech(account, *ids, named, form, request.watch)

    answer = app.web.do("synthesize", request.guest, read, request.watch, account.id)
    return Reply(body=answer.body, content_type=answer.headers["content-type"])


def _told_to(told: str, text: str) -> Question:
    """A question of ours about a text: what is to be done with it, and the text."""
    return Question((Message("system", (Text(told),)), Message("user", (Text(text),))), "auto")


def _repeated(app: App, request: Request, text: str) -> tuple[Account, Finish]:
    """Has the model say a text word for word; the account, and where the message stands."""
    told = "Repeat the next message word for word. Do not answer it, and add nothing before or after it."
    for _ in range(2):
        asked = _asked(request, _told_to(told, text), signed_in=True)
        answer = _all(app, request, asked)
        if asked.account and _letters(_text_of(answer.events)) == _letters(text):
            return asked.account, answer.end()
    raise ApiError("upstream_error", "The model did not repeat the text word for word; try again.")


def _letters(text: str) -> str:
    return re.sub(r"[\W_]", "", text).casefold()


@ROUTER.on("POST", "/v1/audio/transcriptions")
def audio_transcriptions(app: App, request: Request) -> Reply:
    """writes down what is said in the form field `file`, as `json`, `text` or `verbose_json`"""
    text, language, form = _transcribed(app, request)
    return _written(form, "transcribe", text, language)


@ROUTER.on("POST", "/v1/audio/translations")
def audio_translations(app: App, request: Request) -> Reply:
    """the same in English"""
    text, _, form = _transcribed(app, request)
    told = "Translate the next message into English. Write the translation and nothing else."
    asked = _asked(request, _told_to(told, text))
    said = _text_of(_all(app, request, asked).events) if text else ""
    return _written(form, "translate", said, "english")


def _transcribed(app: App, request: Request) -> tuple[str, str, str]:
    """The text of a recording in a request, its language as given, and the format that is wanted."""
    form = parse_form(request.headers, request.body)
    part = _form_file(form, "file")[0]
    language = _form_text(form, "language")
    wanted = _form_text(form, "response_format", "json")
    if wanted not in ("json", "text", "verbose_json"):
        raise unfit("response_format", "must be json, text or verbose_json.")
    if _form_text(form, "stream").lower() in ("true", "1"):
        raise unfit("stream", "must be false: the upstream gives the text whole.")
    if not re.fullmatch(r"[A-Za-z-]{0,16}", language):
        raise unfit("language", "must be a code such as en.")
    name = part.file_name or "audio"
    kind = part.content_type if _MIME.fullmatch(part.content_type) else ""
    kind = kind or mimetypes.guess_type(name)[0] or "application/octet-stream"

    def listen(account: Account) -> str:
        return app.site.transcription(account, part.blob, name, kind, language, request.watch)

    return app.web.do("transcribe", request.guest, listen, request.watch), language, wanted


def _written(form: str, task: str, text: str, language: str) -> Reply:
    if form == "text":
        return Reply(body=f"{text}\n".encode("utf-8", "replace"), content_type="text/plain; charset=utf-8")
    more = {"task": task, "language": language, "duration": 0.0, "segments": []}
    return json_reply({"text": text} | (more if form == "verbose_json" else {}))


# -- the native web API ------------------------------------------------------------------------------------------------

# What go-chatgpt-api's clients, and others that know the site's own calls, put before the paths.
native = functools.partial(ROUTER.on, also=("/backend-api", "/api", "/chatgpt", "/chatgpt/backend-api"))
MAX_CONVERSATIONS = 100  # in a list
MAX_SEARCHED = 2000  # conversations of an account among which an API user's own are looked for
LISTED_AT_ONCE = 8  # accounts


def _passed_on(said: tuple[int, str, bytes]) -> Reply:
    """The upstream's own answer."""
    return Reply(said[0], said[2], said[1])


def _native_answer(
    app: App, request: Request, method: str, path: str, holder: str | None, watch: Watch
) -> Answer:
    """A call's answer by the caller's account, or by this one of the pool."""
    body = request.body if method != "GET" else None
    work = functools.partial(app.site.native, method=method, path=path, body=body, watch=watch)
    return app.web.do("native", request.guest, work, watch, holder)


def _able(app: App) -> list[Account]:
    """The accounts of the pool that have conversations; ApiError when there are none."""
    able = [one for one in app.pool.accounts() if one.row.kind != LOGIN_FREE and one.row.state == "ready"]
    if not able:
        app.pool.lease("native", signed_in=True)  # which says why
    return able


def _native(app: App, request: Request, holder: str | None, query: str = "") -> Reply:
    """The call of a request, its answer as the upstream gives it."""
    steps = {name: urllib.parse.quote(value, safe="") for name, value in request.params.items()}
    path = request.route.format(**steps) + (f"?{query}" if query else "")
    method = "GET" if request.method == "HEAD" else request.method
    try:
        answer = _native_answer(app, request, method, path, holder, request.watch)
    except Refusal as refused:
        if not refused.said:
            raise
        return _passed_on(refused.said)
    return _passed_on((answer.status, answer.headers.get("content-type", "application/json"), answer.body))


def _holder(app: App, request: Request, conversation: str) -> str | None:
    """The account of the pool that holds a conversation; None for a caller with an account."""
    if request.guest:
        return None
    if holder := app.pool.holder(conversation, request.scope):
        return holder
    signed_in = [one for one in app.pool.accounts() if one.row.kind != LOGIN_FREE]
    if len(signed_in) == 1:
        return signed_in[0].id
    text = "No account of the pool is known to hold this conversation; GET /conversations learns of them all."
    raise ApiError("not_found", text)


@native("GET", "/conversations", access=OR_ADMIN)
def conversations_list(app: App, request: Request) -> Reply:
    """the conversations of the caller's account, of all accounts of the pool, or, for an API user, those begun by it, by
    update time; `offset`, `limit`"""
    query = dict(request.query)
    offset = _whole(query, "offset", 0, 10**6)
    limit = _whole(query, "limit", 20, MAX_CONVERSATIONS)
    if request.guest:
        return _native(app, request, None, urllib.parse.urlencode(query | {"offset": offset, "limit": limit}))

    own = None if request.scope.everyone else app.pool.conversations_of(request.scope.owner)

    def read(account: Account, watch: Watch) -> tuple[list[dict[str, Any]], int]:
        """The first conversations of an account, as many as may be asked for, and how many it has; of an API user's own
        all that are found."""
        items = dict[str, dict[str, Any]]()
        at = 0
        total = 1
        wanted = max(1, offset + limit)
        wanted = wanted if own is None else MAX_SEARCHED
        while at < min(wanted, total) and (own is None or not own[account.id] <= set(items)):
            most = min(MAX_CONVERSATIONS, wanted - at)
            part = urllib.parse.urlencode(query | {"offset": at, "limit": most})
            try:
                answer = _native_answer(app, request, "GET", f"/conversations?{part}", account.id, watch)
            except ApiError as error:
                log(logging.WARNING, "conversations not listed", account=account.name, code=error.code)
                raise
            said = answer.object() or {}
            more = [one for one in dicts(said.get("items")) if identifier(one.get("id"))]
            items |= {str(one["id"]): one for one in more}  # one that moves between two pages comes twice
            at = at + len(more)
            told = said.get("total")
            total = int(told) if isinstance(told, (int, float)) and 0 <= told < 10**9 and more else at
        if own is not None:
            mine = [item for id, item in items.items() if id in own[account.id]]
            return mine, len(mine)
        app.pool.hold(dict.fromkeys(items, Held(account.id)))
        return list(items.values()), total

    able = [one for one in _able(app) if own is None or one.id in own]
    jobs = [functools.partial(read, account) for account in able]
    found = side_by_side(jobs, request.watch, LISTED_AT_ONCE)
    items = sorted(itertools.chain(*(one[0] for one in found)), key=_updated, reverse=True)
    told = {"items": items[offset : offset + limit], "total": sum(one[1] for one in found)}
    return json_reply(told | {"limit": limit, "offset": offset})


def _updated(conversation: Mapping[str, Any]) -> float:
    """The time of a conversation's last change (Unix seconds), given in either of the upstream's forms."""
    value = conversation.get("update_time")
    if isinstance(value, (int, float)):
        return float(value) if 0 <= value <= LAST_MOMENT else 0.0
    with contextlib.suppress(ValueError, OverflowError):
        moment = datetime.datetime.fromisoformat(
            re.sub(r"\.(\d{1,6})\d*", r".\1", str(value)).replace("Z", "+00:00")
        )
        return moment.replace(tzinfo=moment.tzinfo or datetime.timezone.utc).timestamp()
    return 0.0


@native("PATCH", "/conversations", access=OR_ADMIN)
def conversations_clear(app: App, request: Request) -> Reply:
    """changes all conversations of the caller's account, `{"is_visible": false}` deletes them; with the admin key those of
    all accounts, and only with `?all_accounts=true`"""
    request.json()
    if request.guest:
        return _native(app, request, None)
    if not request.admin:
        text = "This changes everybody's conversations and needs the admin key; PATCH /conversation/{id} changes one."
        raise ApiError("invalid_api_key", text)
    if request.query.get("all_accounts") != "true":
        text = "This would change the conversations of all accounts; add ?all_accounts=true if that is meant."
        raise invalid("all_accounts", text)

    def change(account: Account, watch: Watch) -> str:
        """The account's name if it was not done for it."""
        try:
            answer = _native_answer(app, request, "PATCH", "/conversations", account.id, watch)
            return "" if answer.status < 300 else account.name
        except ApiError as error:
            log(logging.WARNING, "conversations not changed", account=account.name, code=error.code)
            return account.name

    jobs = [functools.partial(change, account) for account in _able(app)]
    if failed := list(filter(None, side_by_side(jobs, request.watch, LISTED_AT_ONCE))):
        raise ApiError("upstream_error", f"It failed for these accounts: {', '.join(failed[:20])}.")
    return json_reply({"success": True})


@native("PATCH", "/conversation/{id}", access=OR_ADMIN)
@native("GET", "/conversation/{id}", access=OR_ADMIN)
def conversation_one(app: App, request: Request) -> Reply:
    """a conversation; PATCH changes its `title`, or with `{"is_visible": false}` deletes it"""
    return _native(app, request, _holder(app, request, request.params["id"]))


@native("POST", "/conversation/gen_title/{id}", access=OR_ADMIN)
def conversation_title(app: App, request: Request) -> Reply:
    """has the upstream make a title of `{"message_id"}`"""
    return _native(app, request, _holder(app, request, request.params["id"]))


@native("POST", "/conversation/message_feedback", access=OR_ADMIN)
def conversation_feedback(app: App, request: Request) -> Reply:
    """rates a message: `{"message_id", "conversation_id", "rating": "thumbsUp" or "thumbsDown"}`"""
    body = request.json()
    holder = _holder(app, request, required(body, "conversation_id"))
    request.body = Blob(compact(body).encode())  # as it was understood here: a name may have come twice
    return _native(app, request, holder)


@native("POST", "/conversation")
def conversation_create(app: App, request: Request) -> Reply | Stream | Upgrade:
    """a turn in the upstream's own words, its events byte for byte, those of a hand-off's rest too; `"auto_continue": true` goes on with what was cut"""
    given = request.json()
    check_types(given, {"messages": _LIST, "model": _TEXT, "conversation_id": _TEXT, "auto_continue": _FLAG})
    again = app.settings.auto_continue if given.pop("auto_continue", None) else 0
    if len(dicts(given.get("messages"))) != len(given.get("messages") or ()):
        raise unfit("messages", "must be a list of objects.")
    body = completed(given)
    if not request.guest:
        _check_files(app, request, given)
    question = Question((), fit_name(body["model"]), body.get("conversation_id"))
    asked = _asked(request, question)
    asked.keeps = True
    holder = _holder(app, request, question.conversation) if question.conversation else None

    def write(writer: Writer) -> Reply | None:
        try:
            app.web.native(asked, body, holder, again, writer)
        except Refusal as refused:
            if writer.begun or not refused.said:
                raise
            return _passed_on(refused.said)
        return None

    return Stream(write)


# A string that is nothing but a file of the upstream's: a pointer, or an id as it gives them.
_FILE_NAMED = re.compile(r"(?:[a-z-]+://)?((?<=://)[^#?/\s]+|file[-_][0-9A-Za-z_-]+)(?:[#?/]\S*)?")


def _strings(value: Any) -> Iterator[str]:
    """All strings within a JSON value."""
    left = [value]
    while left:
        one = left.pop()
        if isinstance(one, str):
            yield one
        elif isinstance(one, dict):
            left += one.values()
        elif isinstance(one, list):
            left += one


def _check_files(app: App, request: Request, body: Mapping[str, Any]) -> None:
    """not_found for a message with a file that the account may hold, but that is not the caller's."""
    if request.scope.everyone:
        return
    used: set[str] = set()
    for message in dicts(body.get("messages")):
        used.update(str(one.get("id")) for one in dicts(_at(message, ("metadata", "attachments"))))
        found = map(_FILE_NAMED.fullmatch, _strings(message))
        used.update(match[1] for match in found if match)
    if len(used) > MAX_ATTACHMENTS:
        raise invalid("messages", f"A request may have at most {MAX_ATTACHMENTS} files.")
    for id in used:
        if not any(request.scope.covers(file.owner) for file in app.store.files("upstream=?", id)):
            raise ApiError("not_found", "There is no such file; upload it with POST /v1/files.", "messages")


# -- agents ------------------------------------------------------------------------------------------------------------

_AGENT_ORIGIN = re.compile(
    r"https://chatgpt\.com|https://chat\.openai\.com|(moz|chrome|safari-web)-extension://[^/]+"
)


@ROUTER.on("GET", "/client/register", access="agent key")
def client_register(app: App, request: Request) -> Reply | Stream | Upgrade:
    """a browser becomes an agent (WebSocket), with the key as `?key=` or in the header"""
    origin = request.headers.get("origin")
    if origin is not None and not _AGENT_ORIGIN.fullmatch(origin):
        text = "A browser can connect as an agent only from chatgpt.com or from an extension."
        raise ApiError("origin_refused", text)
    app.keys.admit_agent(request, request.query.get("key", ""))
    return Upgrade(handshake(request), app.agents.serve)


ASK_FIELDS: Types = {"content": _TEXT, "conversation_id": _TEXT, "parent_id": _TEXT, "message_id": _TEXT}


@ROUTER.on("POST", "/api/ask")
def api_ask(app: App, request: Request) -> Reply:
    """ChatGPT-API-server's question: `{"content", "conversation_id", "parent_id"}`, answered by an agent, by the pool
    when none is connected"""
    check_types(body := request.json(), ASK_FIELDS)
    content = required(body, "content")
    question = Question(
        (Message("user", (Text(content),)),),
        "auto",
        str(body.get("conversation_id") or "") or None,
        str(body.get("parent_id") or "") or None,
    )
    asked = _asked(request, question)
    answer = Collected()
    asked.keeps = True
    brings = request.guest is not None and request.guest.row.kind != LOGIN_FREE
    _by_order(asked, answer, [app.web] if brings else [app.agents, app.web])
    said = _text_of(map(_as_text, answer.events))
    end = answer.end()
    if request.user:
        app.ledger.count(request.user, tokens=app.tokens.count(content) + app.tokens.count(said))
    told = {"id": "", "response_id": end.message, "conversation_id": end.conversation}
    return json_reply(told | {"content": said, "error": ""})


@ROUTER.on("GET", "/api/connections", access="admin")
def api_connections(app: App, request: Request) -> Reply:
    """ChatGPT-API-server's list of the agents"""
    none = "0001-01-01T00:00:00Z"  # as Go has it
    agents: list[dict[str, Any]] = [
        {"Ws": {}, "Id": one.id, "Heartbeat": iso(one.heard), "LastMessageTime": iso(one.asked) or none}
        for one in app.agents.connected()
    ]
    return json_reply({"connections": agents})


# -- sign-in -----------------------------------------------------------------------------------------------------------


def token_facts(row: AccountRow) -> dict[str, Any]:
    """An account's tokens and facts, with the names that several programs have for them."""
    told: dict[str, Any] = {"accessToken": row.access_token, "access_token": row.access_token}
    told["expires"] = iso(row.expires)
    told["expires_in"] = max(0, int(row.expires - time.time()))
    told |= {"email": row.email, "plan": row.plan, "account_id": row.workspace}
    if row.kind == REFRESH:
        return told | {"refreshToken": row.secret, "refresh_token": row.secret}
    return told | ({"session_token": row.secret} if row.kind == SESSION else {})


def _exchanged(app: App, request: Request, kind: str, *names: str) -> Reply:
    """A refresh or session token that the caller brings, exchanged now; the caller gets what replaces it too."""
    body = request.json()
    where = next((name for name in names if name in body), names[0])
    given = required(body, where)
    try:
        row = recognise(given)
    except ValueError:
        row = AccountRow("", "", "")
    if row.kind != kind:
        raise unfit(where, f"must be a {kind} token.")
    account = app.pool.guest(row)
    if not hmac.compare_digest(account.row.secret.encode(), row.secret.encode()):
        text = "This token was exchanged before; send the one that replaced it, or sign in again."
        raise ApiError("invalid_api_key", text)
    app.keys.guesses.slow_down(request)
    try:
        app.pool.lease_guest(account, "")
        app.renewals.token(account, request.watch, account.row.access_token)
    except ApiError as error:
        if error.code == "invalid_api_key":
            app.keys.guesses.note(request.peer)
        raise
    return json_reply(token_facts(app.pool.welcome(account).row))


def store_tokens(pool: Pool, access: str, refresh: str, browser: bool = False) -> AccountRow:
    """The account of tokens that a sign-in gave, stored; ValueError when they are none. `browser`: by a browser or a device
    code, so that the Codex backend takes them."""
    rows = pool.add([refresh or access]).rows
    if not rows:
        raise ValueError("the issuer gave no token that could be used; sign in again")
    account = pool.find(rows[0].id)
    if refresh and account and account.row.secret == refresh:
        pool.renewed(account, access, None)
    kept = pool.store.accounts("secret=? OR id=?", refresh or access, rows[0].id)
    row = (kept or rows)[0]  # it may have turned out to be one that was there
    if browser and (account := pool.find(row.id)):
        pool.learned(account, codex="yes")
    return row


@ROUTER.on("POST", "/auth/login", access=SIGNS_IN)
def auth_login(app: App, request: Request) -> Reply:
    """signs in with `{"username", "password", "code"}`: `{"accessToken", "refreshToken", "expires"}`; `"store": true`
    adds the account to the pool"""
    body = request.json()
    if body.get("store") is True and not request.admin:
        app.keys.admit_admin(request, sessions=False)
    check_types(body, {"code": _TEXT, "store": _FLAG})
    username = required(body, "username")
    password = required(body, "password")
    sign_in = PasswordSignIn(app.settings, app.loop, request.watch)
    access, refresh = sign_in.tokens_for(username, password, body.get("code") or "")
    try:
        row = with_access_token(AccountRow("", REFRESH if refresh else ACCESS, refresh or access), access)
        if body.get("store") is True:
            row = store_tokens(app.pool, access, refresh)
    except ValueError:
        raise ApiError("upstream_error", "The sign-in gave no token that could be used; try again.") from None
    return json_reply(token_facts(row))


@ROUTER.on("POST", "/auth/refresh")
def auth_refresh(app: App, request: Request) -> Reply:
    """a new access token for `{"refresh_token"}`, what replaces that, and the account's facts"""
    return _exchanged(app, request, REFRESH, "refresh_token", "refreshToken")


@ROUTER.on("POST", "/auth/session")
def auth_session(app: App, request: Request) -> Reply:
    """the same for `{"session_token"}`"""
    return _exchanged(app, request, SESSION, "session_token", "sessionToken")


# -- the pool ----------------------------------------------------------------------------------------------------------

MAX_LISTED, MAX_CHECKED = 500, 100  # accounts a request


def account_facts(account: Account, ledger: Ledger, now: float) -> dict[str, Any]:
    """An account for scripts and for the page: nothing of it is secret. `answers` and `failures` are today's."""
    row = account.row
    today = ledger.today(account.id)
    facts = {"id": row.id, "kind": row.kind, "email": row.email, "plan": row.plan, "workspace": row.workspace}
    facts |= {"state": account.state(now), "told": account.told(now), "reason": row.reason}
    times = {"expires": iso(row.expires), "used": iso(today.used)}
    persona, wants = account.demands
    demands = {"persona": persona, "wants": list(wants)}  # what the upstream's requirements said last
    codex = {"upstreams": account.paths(), "codex": allowance_facts(account.allowance, now)}
    return facts | times | demands | codex | {"answers": today.answers, "failures": today.failures}


def allowance_facts(allowance: Allowance | None, now: float) -> dict[str, Any] | None:
    """What an account may use of the Codex backend, None where that is not known: `told` is for people."""
    if allowance is None:
        return None
    windows = [
        {
            "window": one.name,
            "seconds": one.seconds,
            "used_percent": 100.0 - one.left(now),
            "resets": iso(one.reset),
        }
        for one in allowance.windows
    ]
    facts = {"told": allowance.told(now), "windows": windows, "credits": allowance.credits or None}
    return facts | {"read": iso(allowance.read)}


def user_facts(user: User, ledger: Ledger) -> dict[str, Any]:
    """An API user likewise; `requests` and `tokens` are today's, the token itself is known by its hash alone."""
    today = ledger.today(user.id)
    facts: dict[str, Any] = {"user_id": user.id, "name": user.name, "token": f"***{user.token_hash[:6]}"}
    facts |= {"limit": user.limit, "requests": today.requests, "tokens": today.tokens}
    return facts | {"used": iso(today.used), "added": iso(user.added)}


CHECKED_AT_ONCE = 8


def checked(app: App, account: Account, watch: Watch) -> tuple[str, str | None]:
    """Asks the upstream about an account: its id, and why it does not work, "" when it does, None when there is nothing
    to ask: of a login-free or a disabled one."""
    if account.row.kind == LOGIN_FREE or account.row.state == DISABLED:
        return account.id, None
    faults: dict[str, str] = {}
    paths = [upstream for upstream in app.upstreams.values() if upstream.takes(account)]
    for upstream in paths:
        try:
            upstream.check(account, watch)
        except ApiError as error:
            faults[upstream.name] = error.message
    app.pool.keep_told()
    state = account.told(time.time())
    if len(faults) < len(paths):
        return account.id, ""
    return account.id, next(iter(faults.values()), "") if state == "ready" else state


def _count_of(app: App) -> int:
    """chat2api's `tokens_count`: how many accounts are not set aside."""
    return sum(account.row.state == "ready" for account in app.pool.accounts())


def _named(app: App, request: Request, most: int = 10_000) -> list[Account]:
    """The accounts of the pool that a request names in `ids`."""
    ids = request.json().get("ids")
    if not isinstance(ids, list) or not all(isinstance(id, str) for id in ids) or len(ids) > most:
        raise unfit("ids", f"must be a list of up to {most} accounts' ids.")
    return [one for id in ids if (one := app.pool.find(id)) and not one.row.guest]


def _added(app: App, lines: list[str]) -> Reply:
    added = app.pool.add(lines)
    if added.faults and not added.rows:
        raise invalid("text", f"None of the lines is a token: {'; '.join(added.faults[:5])}.")
    for fault in added.faults:
        log(logging.WARNING, "line of an upload left out", fault=fault)
    told = {"status": "success", "tokens_count": _count_of(app), "stored": len(added.rows)}
    return json_reply(told | {"known": added.known, "faults": added.faults})


@ROUTER.on("POST", "/tokens/upload", access="admin")
def tokens_upload(app: App, request: Request) -> Reply:
    """chat2api's upload: form field `text`, one token a line; `{"status": "success", "tokens_count": N, …}`"""
    texts = parse_form(request.headers, request.body).get("text")
    if not texts:
        raise invalid("text", "Send the tokens in the form field `text`, one a line.")
    return _added(app, texts[0].text().splitlines())


@ROUTER.on("GET", "/tokens/add/{token}", access="admin key")
def tokens_add(app: App, request: Request) -> Reply:
    """chat2api's way to add one token; a URL may stay in logs on its way, so better upload it"""
    return _added(app, [request.params["token"]])


@ROUTER.on("POST", "/tokens/clear", access="admin")
def tokens_clear(app: App, request: Request) -> Reply:
    """removes all accounts of the pool"""
    log(logging.WARNING, "all accounts removed", count=len(app.pool.remove()))
    return json_reply({"status": "success", "tokens_count": 0})


@ROUTER.on("POST", "/tokens/error", access="admin")
def tokens_error(app: App, request: Request) -> Reply:
    """the accounts that are set aside, by their id: `{"status": "success", "error_tokens": […]}`"""
    aside = [one.id for one in app.pool.accounts() if one.state(time.time()) in ("expired", "dead")]
    return json_reply({"status": "success", "error_tokens": aside})


@ROUTER.on("GET", "/tokens/list", access="admin")
def tokens_list(app: App, request: Request) -> Reply:
    """the accounts with their states and use; `offset`, `limit`, `state`, and `q` for a word in e-mail, id or plan"""
    query = request.query
    now = time.time()
    states = Counter[str]()
    word = query.get("q", "").lower()
    state = query.get("state")
    found = []
    for account in app.pool.accounts():
        row = account.row
        has = account.state(now)
        states[has] += 1
        if state in (None, "", has) and word in f"{row.email} {row.id} {row.plan} {row.kind}".lower():
            found.append(account)
    offset = _whole(query, "offset", 0, 10**9)
    limit = _whole(query, "limit", 50, MAX_LISTED)
    page = [account_facts(one, app.ledger, now) for one in found[offset : offset + limit]]
    hours = [
        {"start": iso(start), "answers": tally.answers, "failures": tally.failures}
        for start, tally in app.ledger.hours()
    ]
    told = {"total": sum(states.values()), "matching": len(found), "states": states, "accounts": page}
    told |= {"hours": hours, "keyless": app.settings.administrator is None}
    return json_reply(told)


def _whole(query: Mapping[str, str], name: str, default: int, most: int) -> int:
    """A number of the query."""
    text = query.get(name, str(default))
    if not re.fullmatch(r"[0-9]{1,9}", text) or int(text) > most:
        raise unfit(name, f"must be a whole number from 0 to {most}.")
    return int(text)


@ROUTER.on("POST", "/tokens/remove", access="admin")
def tokens_remove(app: App, request: Request) -> Reply:
    """removes the accounts named by `{"ids"}`"""
    removed = len(app.pool.remove([account.id for account in _named(app, request)]))
    return json_reply({"status": "success", "removed": removed, "tokens_count": _count_of(app)})


@ROUTER.on("POST", "/tokens/disable", access="admin")
def tokens_disable(app: App, request: Request) -> Reply:
    """takes the accounts named by `{"ids"}` out, or with `"disabled": false` in again"""
    check_types(body := request.json(), {"disabled": _FLAG})
    ids = [account.id for account in _named(app, request)]
    changed = app.pool.disable(ids, body.get("disabled") is not False)
    return json_reply({"status": "success", "changed": changed})


@ROUTER.on("POST", "/tokens/check", access="admin")
def tokens_check(app: App, request: Request) -> Reply:
    """asks the upstream about the accounts named by `{"ids"}`: `{"results": {id: "", why it does not work, or null if not asked}}`"""
    jobs = [functools.partial(checked, app, account) for account in _named(app, request, MAX_CHECKED)]
    found = side_by_side(jobs, request.watch, CHECKED_AT_ONCE)
    return json_reply({"status": "success", "results": dict(found)})


@ROUTER.on("POST", "/tokens/session", access="public")
def tokens_sign_in(app: App, request: Request) -> Reply:
    """begins a session of the page's, twelve hours long, with `{"key"}`"""
    key = request.json().get("key")
    cookie = app.keys.sign_in(request, key if isinstance(key, str) else "")
    return Reply(204, headers={"Set-Cookie": cookie})


@ROUTER.on("DELETE", "/tokens/session", access="public")
def tokens_sign_out(app: App, request: Request) -> Reply:
    """ends a session of the page's"""
    return Reply(204, headers={"Set-Cookie": app.keys.sign_out(request)})


# -- API users ---------------------------------------------------------------------------------------------------------


@ROUTER.on("GET", "/admin/users", access="admin")
def users_list(app: App, request: Request) -> Reply:
    """the API users with what they used today; `admin_key` may be in the query"""
    return json_reply({"users": [user_facts(user, app.ledger) for user in app.store.users()]})


@ROUTER.on("POST", "/admin/users/add", access="admin")
def users_add(app: App, request: Request) -> Reply:
    """a new API user: `{"user_id", "token"}`; the body may have `admin_key`, `name` and `limit` (requests a day)"""
    check_types(body := _body(request), {"name": _TEXT, "limit": _INTEGER})
    name = body.get("name") or ""
    limit = body.get("limit")
    if limit is not None and not 0 <= limit <= MAX_REQUESTS:
        raise unfit("limit", f"must be from 0 to {MAX_REQUESTS}.")
    user, token = issue_user(app.store, name, limit)
    app.keys.reload()
    return json_reply(user_facts(user, app.ledger) | {"token": token})


MAX_REQUESTS = 10**9


@ROUTER.on("POST", "/admin/users/delete", access="admin")
def users_delete(app: App, request: Request) -> Reply:
    """removes the API user `{"user_id"}`; the body may have `admin_key`"""
    check_types(body := request.json(), {"user_id": _TEXT})
    if not app.store.remove_user(required(body, "user_id")):
        raise ApiError("not_found", "There is no such user.")
    app.keys.reload()
    return json_reply({"message": "User deleted"})


# -- operations --------------------------------------------------------------------------------------------------------


@ROUTER.on("GET", "/health", "/ping", access="public")
def health(app: App, request: Request) -> Reply:
    """liveness: `{"status": "ok"}` and how many accounts are in which state; with `?ready` 503 while the store cannot be
    used or no account can answer"""
    states = app.pool.states()
    told = {"status": "ok", "version": __version__, "accounts": states}
    if "ready" not in request.query:
        return json_reply(told)
    if app.store.trouble:
        return json_reply(told | {"status": "store_unavailable"}, 503, {"Retry-After": "30"})
    if not app.keys.keyless and not states.get("ready", 0) + states.get("waiting", 0):
        return json_reply(told | {"status": "no_account"}, 503, {"Retry-After": "30"})
    return json_reply(told)


@ROUTER.on("GET", "/metrics", access="public")
def metrics(app: App, request: Request) -> Reply:
    """Prometheus text"""
    return Reply(body=app.metrics.render().encode(), content_type="text/plain; version=0.0.4; charset=utf-8")


# ============================================================================================================
# pages: the built-in ones; what they show is made of text nodes alone, so nobody's words can become markup
# ============================================================================================================


def built_page(title: str, style: str, body: str, script: str) -> Reply:
    """A page that loads nothing from anywhere, talks to this server alone, and runs no script but its own."""
    policy = {"default-src": "'none'", "connect-src": "'self'", "img-src": "https: http: data:"}
    for name, text in (("style-src", style), ("script-src", script)):
        policy[name] = f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
    policy |= dict.fromkeys(("base-uri", "form-action", "frame-ancestors", "trusted-types"), "'none'")
    policy["require-trusted-types-for"] = "'script'"
    headers = {"Content-Security-Policy": "; ".join(f"{name} {value}" for name, value in policy.items())}
    headers |= {
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "no-referrer",
        "Cache-Control": "no-cache",
    }
    head = f'<meta charset="utf-8"><title>{title}</title><link rel="icon" href="data:,">'
    head += '<meta name="viewport" content="width=device-width, initial-scale=1">'
    text = f'<!DOCTYPE html><html lang="en"><head>{head}<style>{style}</style></head><body>{body}<script>{script}</script></body></html>'
    return Reply(200, text.encode(), "text/html; charset=utf-8", headers)


BASE_CSS = r"""
:root {
  color-scheme: light dark;
  --page: #f6f7f8; --card: #ffffff; --text: #1b2126; --quiet: #5a6570; --line: #dce0e4; --soft: #eceff1;
  --accent: #0b6e69; --on-accent: #ffffff; --bad: #b3261e; --good: #2e7d32; --warn: #a86200;
}
@media (prefers-color-scheme: dark) {
  :root {
    --page: #14181b; --card: #1c2226; --text: #e5e9ec; --quiet: #9aa6b0; --line: #323a41; --soft: #272e34;
    --accent: #5cc8bf; --on-accent: #06211f; --bad: #ff8a80; --good: #7cc47f; --warn: #e8b04a;
  }
}
* { box-sizing: border-box; }
[hidden] { display: none !important; }
body { margin: 0; background: var(--page); color: var(--text); overflow-wrap: anywhere; }
body { font: 15px/1.55 system-ui, sans-serif; font-variant-numeric: tabular-nums; }
h1, h2, p { margin: 0; font-size: 1em; }
a, h1 { color: var(--accent); }
button, input, select, textarea {
  font: inherit; color: inherit; background: var(--card); max-width: 100%;
  border: 1px solid var(--line); border-radius: 8px; padding: 0.4rem 0.75rem;
}
button { cursor: pointer; }
button:disabled { opacity: 0.45; cursor: default; }
button.main { background: var(--accent); border-color: var(--accent); color: var(--on-accent); }
button.small { padding: 0.1rem 0.55rem; font-size: 0.85rem; }
button.bad { color: var(--bad); }
button.armed { background: var(--bad); color: var(--card); }
.quiet, summary, th { color: var(--quiet); }
.trouble { color: var(--bad); }
.row { display: flex; flex-wrap: wrap; gap: 0.5rem; align-items: center; }
.stack { display: grid; grid-template-columns: minmax(0, 1fr); gap: 0.75rem; }
.stack > label { display: grid; gap: 0.25rem; }
.row > * { min-width: 0; }
.grow { flex: 1 1 10rem; }
code, pre { font-family: ui-monospace, Menlo, Consolas, monospace; font-size: 0.9em; }
"""

BASE_JS = r"""
"use strict";

const $ = (id) => document.getElementById(id);

// Everything is asked below the path this page stands at. The origin is spelled out because a path that
// begins with two slashes would otherwise name another host.
const BASE = location.origin + location.pathname.replace($("tokens") ? /[/]tokens[/]*$/ : "", "")
  .replace(/[/]+$/, "");

/** A new element. `props` are properties where it has such, else attributes; strings become text. */
function el(tag, props, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(props || {})) {
    if (name in node) node[name] = value;
    else node.setAttribute(name, value);
  }
  for (const child of children.flat()) node.append(child); // spread arguments would be limited in number
  return node;
}

const button = (text, onclick, className) => el("button", { type: "button", onclick, className }, text);

function onSubmit(id, act) {
  $(id).onsubmit = (event) => {
    event.preventDefault();
    act();
  };
}

/** Write only what differs, so that selections, screen readers and layout are left alone. */
function put(node, text, props) {
  for (const [name, value] of Object.entries({ textContent: text, ...props })) {
    if (node[name] !== value) node[name] = value;
  }
}

/** The response if it is a success, else an Error with the server's message and `status` (0: not reached). */
async function send(method, path, body, more = {}) {
  const json = body && !(body instanceof URLSearchParams);
  const headers = { ...(json ? { "content-type": "application/json" } : {}), ...more.headers };
  const options = { ...more, method, headers, body: json ? JSON.stringify(body) : body };
  const response = await fetch(BASE + path, options).catch(() => null);
  if (response?.ok) return response;
  const status = response?.status || 0;
  const said = await response?.json().catch(() => null);
  const plain = status ? `The server answered with ${status}.` : "The server cannot be reached.";
  throw Object.assign(new Error(said?.error?.message || said?.error || plain), { status });
}

const api = async (...request) => JSON.parse(await (await send(...request)).text() || "null");

/** Copy `text`, or select it in `shown`: browsers offer the clipboard only over HTTPS and on this machine. */
async function copy(text, shown, node) {
  try {
    await navigator.clipboard.writeText(text);
    node.textContent = "Copied";
  } catch {
    getSelection().selectAllChildren(shown);
    node.textContent = "Selected";
  }
  setTimeout(() => { node.textContent = "Copy"; }, 1500);
}
"""

# -- the pool ----------------------------------------------------------------------------------------------------------

TOKENS_CSS = r"""
main { max-width: 76rem; margin: 0 auto; padding: 1.25rem 1rem 3rem; }
.card { background: var(--card); border: 1px solid var(--line); border-radius: 14px; padding: 1.1rem; }
.wide { width: 100%; }
#sign-in { max-width: 24rem; margin: 12vh auto 0; }
#chips { flex: 1 1 max(17rem, 100% - 16rem); }
#chips button { border-radius: 99px; }
[aria-pressed="true"], tr:has(:checked) { border-color: var(--accent); background: var(--soft); }
.ready { --dot: var(--good); }
.waiting, .expired { --dot: var(--warn); }
.dead { --dot: var(--bad); }
.dot::before { content: "● "; color: var(--dot, var(--quiet)); }
table { border-collapse: collapse; }
th, td { text-align: left; padding: 0.4rem 0.5rem; border-bottom: 1px solid var(--line); }
:is(th, td):nth-child(n+4) { white-space: nowrap; }
td:nth-child(2) { width: 30%; }
td:last-child { text-align: right; }
td button { margin-left: 0.3rem; }
textarea { width: 100%; resize: vertical; }
.over { border-color: var(--accent); }
ul { list-style: none; margin: 0; padding: 0; max-height: 20rem; overflow-y: auto; }
li { padding: 0.3rem 0; }
:is(#said, #users-said, #fresh, #added, #cleared):empty { display: none; }
svg { display: block; width: 100%; height: 150px; overflow: visible; }
text { fill: var(--quiet); font-size: 11px; }
line { stroke: var(--line); }
rect { fill: var(--dot, transparent); }
@media (max-width: 60rem) {
  :is(th, td):nth-child(n+4):nth-child(-n+6) { display: none; }
}
@media (max-width: 42rem) { /* each account becomes a few lines */
  thead { display: none; }
  tr { display: flex; flex-wrap: wrap; border-bottom: 1px solid var(--line); }
  td { border: 0; }
  td:nth-child(2) { width: calc(100% - 2.5rem); }
  td:nth-child(7)::before { content: "used "; }
  td:nth-child(8)::before { content: "today "; }
}
"""

TOKENS_HTML = r"""
<main id="tokens" class="stack">
  <header class="row">
    <h1>Accounts</h1>
    <p id="trouble" class="quiet grow" role="status"></p>
    <a id="to-chat">Chat</a>
    <button id="sign-out" type="button" hidden>Sign out</button>
  </header>
  <form id="sign-in" class="card stack" hidden>
    <label>Admin key<input id="key" type="password" autocomplete="current-password" required></label>
    <p id="sign-in-said" class="trouble" role="alert"></p>
    <button class="main">Sign in</button>
  </form>
  <div id="pool" class="stack" hidden>
    <section class="card row">
      <h2 class="grow">Last 24 hours</h2>
      <span class="dot ready">answers</span><span class="dot dead">failures</span>
      <div id="chart" class="wide"></div>
    </section>
    <section class="card row">
      <div id="chips" class="row" role="group" aria-label="State"></div>
      <input id="search" type="search" placeholder="Search" aria-label="Search accounts">
      <label class="grow"><input id="all" type="checkbox"> <span id="picked"></span></label>
      <button type="button" data-do="check">Check</button>
      <button type="button" data-do="disable">Disable</button>
      <button type="button" data-do="enable">Enable</button>
      <button type="button" data-do="remove" class="bad">Remove</button>
      <p id="said" class="wide" role="status"></p>
      <table class="wide" aria-label="Accounts">
        <thead><tr><th></th><th>Account</th><th>State</th><th>Plan</th><th>Kind</th><th>Expires</th>
          <th>Last use</th><th title="answers / failures today">Today</th><th></th></tr></thead>
        <tbody id="rows"></tbody>
      </table>
      <span id="range" class="quiet grow"></span>
      <button id="back" type="button">Previous</button><button id="next" type="button">Next</button>
    </section>
    <form id="add" class="card stack">
      <h2>Add accounts</h2>
      <label>Tokens, one a line<textarea id="text" rows="4" spellcheck="false" required></textarea></label>
      <div class="row">
        <button class="main">Add</button>
        <label class="row">or drop text files here, or <input id="files" type="file" multiple></label>
      </div>
      <ul id="added" role="status"></ul>
    </form>
    <form id="add-user" class="card row">
      <h2 class="wide">API users</h2>
      <ul id="users" class="wide"></ul>
      <p id="users-said" class="wide" role="status"></p>
      <div id="fresh" class="row wide"></div>
      <input id="user-name" class="grow" required maxlength="100" placeholder="Name" aria-label="Name">
      <input id="user-limit" type="number" min="1" placeholder="Requests a day" aria-label="Requests a day">
      <button class="main">Add user</button>
    </form>
    <form id="clear" class="card row">
      <h2 class="grow">Remove all accounts</h2>
      <label for="word">Type <code>clear</code> to go on</label>
      <input id="word" required pattern="clear" title="the word clear" autocomplete="off">
      <button class="bad">Remove all</button>
      <p id="cleared" class="wide" role="status"></p>
    </form>
  </div>
</main>
"""

TOKENS_JS = r"""
const PAGE = 50;
const STATES = ["ready", "waiting", "expired", "dead", "disabled"];
const BULK = document.querySelectorAll("[data-do]");
const wanted = { offset: 0, q: "", state: "" };
const accounts = new Map(); // id -> its row; only of those shown, so that nothing unseen is acted upon
const users = new Map();
let asked = 0; // counts the list requests, so that an answer overtaken by a newer one is dropped
let timer = 0;
let drawn = ""; // the hours the chart shows

const num = (number) => number.toLocaleString("en");
const count = (number, noun) => `${num(number)} ${noun}${number === 1 ? "" : "s"}`;
const fully = (iso) => (iso ? new Date(iso).toLocaleString("en-GB") : "");
const RELATIVE = new Intl.RelativeTimeFormat("en", { numeric: "auto", style: "short" });

function when(iso) {
  const seconds = (Date.parse(iso) - Date.now()) / 1000;
  const span = Math.abs(seconds);
  const [size, unit] = span < 3600 ? [60, "minute"] : span < 86400 ? [3600, "hour"] : [86400, "day"];
  return RELATIVE.format(Math.trunc(seconds / size), unit);
}

/** Say the outcome of something; an ended session leads back to the sign-in. */
function say(where, text, error) {
  if (error?.status === 401) return signedOut("Your sign-in has ended.");
  where.classList.toggle("trouble", Boolean(error));
  put(where, error ? error.message : text);
}

/** Have the server change something, say what `told` makes of its answer, and look again. */
async function change(where, path, body, told) {
  try {
    const result = await api("POST", path, body);
    say(where, told(result));
    return result;
  } catch (error) {
    say(where, "", error);
  } finally {
    poll();
  }
}

/** Make a button ask once, in its own place, before it acts. */
function arm(node, act, label = node.textContent) {
  let since = 0;
  const show = (at) => {
    since = at;
    put(node, at ? "Really?" : "Remove", { ariaLabel: at ? `Really? ${label}` : label });
    node.classList.toggle("armed", at > 0);
  };
  node.onblur = () => show(0);
  node.onkeydown = (event) => { if (event.key === "Escape") show(0); };
  node.onclick = (event) => {
    if (since && event.timeStamp - since < 400) return; // a double click is no answer to the question
    if (since) return show(0), act();
    show(event.timeStamp);
    node.focus(); // Safari does not focus a button that is clicked, and then it would not blur
  };
}

/** Make `parent` show `items`, touching only what differs; `make` returns a row {node, update}. */
function sync(parent, items, id, rows, make) {
  const focused = document.activeElement;
  const ids = new Set(items.map((item) => item[id]));
  for (const [key, row] of rows) if (!ids.has(key)) rows.delete(key), row.node.remove();
  items.forEach((item, index) => {
    if (!rows.has(item[id])) rows.set(item[id], make(item));
    const row = rows.get(item[id]);
    row.update(item);
    if (parent.children[index] !== row.node) parent.insertBefore(row.node, parent.children[index] || null);
  });
  if (focused !== document.activeElement && focused.isConnected) focused.focus({ preventScroll: true });
}

function accountRow({ id, email }) {
  const name = email || id;
  const cells = Array.from({ length: 7 }, () => el("td"));
  const box = el("input", { type: "checkbox", "aria-label": `Select ${name}` });
  const check = button("Check", () => act("check", [id]), "small");
  const toggle = button("", () => act(toggle.textContent.toLowerCase(), [id]), "small");
  const remove = button("Remove", null, "small bad");
  const [where, state, paid, kind, expires, used, today] = cells;
  const who = el("span");
  const spent = el("div", { className: "quiet" }); // of what it may use of the Codex backend
  where.append(who, spent);
  const node = el("tr", {}, el("td", {}, box), cells, el("td", {}, check, toggle, remove));
  const row = { node, box, note: "" }; // the note is what the last check found
  check.ariaLabel = `Check ${name}`;
  arm(remove, () => act("remove", [id]), `Remove ${name}`);
  box.onchange = showPicked;
  row.update = (account) => {
    const { told, answers, failures, plan, wants, upstreams, codex } = account;
    const verb = account.state === "disabled" ? "Enable" : "Disable";
    put(who, name, { title: id });
    put(spent, codex && codex.told ? `Codex: ${codex.told}` : "");
    const asks = wants.length ? `; the site may ask for ${wants.join(", ")}` : "";
    const noted = (row.note && row.note !== told ? `${told} – ${row.note}` : told) + asks;
    put(state, noted, { className: `dot ${account.state}` });
    put(paid, [plan, upstreams === "web" ? "" : upstreams].filter(Boolean).join(", ") || "–");
    put(kind, account.kind);
    put(expires, account.expires ? when(account.expires) : "–", { title: fully(account.expires) });
    put(used, account.used ? when(account.used) : "never", { title: fully(account.used) });
    put(today, `${num(answers)} / ${num(failures)}`, { className: failures ? "trouble" : "" });
    put(toggle, verb, { ariaLabel: `${verb} ${name}`, hidden: /^(expired|dead)$/.test(account.state) });
  };
  return row;
}

function userRow({ user_id, name }) {
  const [token, use] = [el("code"), el("span", { className: "quiet grow" })];
  const remove = button("Remove", null, "small bad");
  const act = () => change($("users-said"), "/admin/users/delete", { user_id }, () => `Removed ${name}.`);
  arm(remove, act, `Remove ${name}`);
  const update = (user) => {
    const limit = user.limit === null ? "" : ` of ${num(user.limit)}`;
    const used = user.used ? `used ${when(user.used)}` : "never used";
    put(token, user.token);
    put(use, `${num(user.requests)}${limit} requests, ${count(user.tokens, "token")} today, ${used}`);
  };
  return { node: el("li", { className: "row" }, el("b", {}, name), token, use, remove), update };
}

const picked = () => [...accounts.keys()].filter((id) => accounts.get(id).box.checked);

function showPicked() {
  const number = picked().length;
  $("all").checked = number > 0 && number === accounts.size;
  put($("picked"), number ? `${number} selected` : "Select all on this page");
  for (const each of BULK) each.disabled = !number;
}

function act(what, ids) {
  const done = (verb, number) => `${verb} ${count(number, "account")}.`;
  const [path, body, told] = {
    check: ["check", {}, ({ results }) => {
      for (const id of ids) {
        if (accounts.has(id)) accounts.get(id).note = (results[id] ?? "not asked") || "works";
      }
      const works = ids.filter((id) => results[id] === "").length;
      const bad = ids.filter((id) => results[id]).length;
      return `${done("Checked", works + bad)} ${works} work, ${bad} do not.`;
    }],
    disable: ["disable", { disabled: true }, ({ changed }) => done("Disabled", changed)],
    enable: ["disable", { disabled: false }, ({ changed }) => done("Enabled", changed)],
    remove: ["remove", {}, ({ removed }) => done("Removed", removed)],
  }[what];
  say($("said"), what === "check" ? `Checking ${count(ids.length, "account")}…` : "");
  return change($("said"), `/tokens/${path}`, { ids, ...body }, told);
}

function svg(tag, props, ...children) {
  const node = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(props)) node.setAttribute(name, value);
  node.append(...children);
  return node;
}

function showChart(hours) {
  if (drawn === JSON.stringify(hours)) return;
  drawn = JSON.stringify(hours);
  const [top, bottom] = [16, 128];
  const total = (key) => num(hours.reduce((sum, hour) => sum + hour[key], 0));
  const most = Math.max(...hours.map((hour) => hour.answers + hour.failures), 1);
  const label = `${total("answers")} answers and ${total("failures")} failures, at most ${num(most)} an hour`;
  const chart = svg("svg", { role: "img", "aria-label": label }, svg("text", { y: top - 4 }, num(most)),
    svg("line", { x2: "100%", y1: top, y2: top }), svg("line", { x2: "100%", y1: bottom, y2: bottom }));
  hours.forEach(({ start, answers, failures }, index) => {
    const left = (index / hours.length) * 100;
    const time = new Date(start).toTimeString().slice(0, 5);
    const title = svg("title", {}, `from ${time}: ${num(answers)} answers, ${num(failures)} failures`);
    const bar = (kind, below, number) => {
      const [y, height] = [below + number, number].map((each) => (each / most) * (bottom - top));
      return svg("rect", { class: kind, x: `${left}%`, width: "3%", y: bottom - y, height });
    };
    const bars = [bar("", 0, most), bar("ready", 0, answers), bar("dead", answers, failures)];
    chart.append(svg("g", {}, title, ...bars));
    if (new Date(start).getHours() % 6 === 0) {
      chart.append(svg("text", { x: `${left + 1.5}%`, y: 145, "text-anchor": "middle" }, time));
    }
  });
  $("chart").replaceChildren(chart);
}

function signedOut(text) {
  clearTimeout(timer);
  asked++;
  $("sign-in").hidden = false;
  $("pool").hidden = $("sign-out").hidden = true;
  $("text").value = ""; // no token stays behind on a page that may be left alone
  $("fresh").replaceChildren();
  sync($("rows"), [], "id", accounts, accountRow);
  sync($("users"), [], "user_id", users, userRow);
  put($("trouble"), "");
  put($("sign-in-said"), text);
  $("key").focus();
}

/** Ask for the accounts and users now, and then every three seconds. */
async function poll() {
  clearTimeout(timer);
  const mine = ++asked;
  try {
    const query = new URLSearchParams({ ...wanted, limit: PAGE });
    const get = (path) => api("GET", path, undefined, { signal: AbortSignal.timeout(15000) });
    const [list, people] = await Promise.all([get(`/tokens/list?${query}`), get("/admin/users")]);
    if (mine !== asked) return;
    put($("trouble"), "");
    show(list);
    sync($("users"), people.users, "user_id", users, userRow);
  } catch (error) {
    if (mine !== asked) return;
    if (error.status === 401) return signedOut($("pool").hidden ? "" : "Your sign-in has ended.");
    put($("trouble"), `${error.message} Trying again…`);
  }
  if (mine === asked) timer = setTimeout(poll, 3000);
}

function show(list) {
  const { matching } = list;
  const last = wanted.offset + list.accounts.length;
  if (wanted.offset && wanted.offset >= matching) return look({ offset: wanted.offset - PAGE });
  $("sign-in").hidden = true;
  $("pool").hidden = false;
  $("sign-out").hidden = list.keyless;
  sync($("rows"), list.accounts, "id", accounts, accountRow);
  showPicked();
  for (const chip of $("chips").children) {
    put(chip.lastChild, num(chip.value ? list.states[chip.value] || 0 : list.total));
    chip.ariaPressed = chip.value === wanted.state;
  }
  showChart(list.hours);
  const none = list.total ? "No account matches." : "There is no account yet. Add one below.";
  put($("range"), matching ? `${wanted.offset + 1}–${last} of ${num(matching)}` : none);
  $("back").disabled = wanted.offset === 0;
  $("next").disabled = last >= matching;
}

/** Look at other accounts: another page, or from the first page another state or search. */
function look(other) {
  Object.assign(wanted, { offset: 0 }, other);
  return poll();
}

/** Upload files of tokens; the answer to the last one. */
async function upload(files) {
  let result = null;
  $("added").replaceChildren();
  for (const file of files) {
    const said = el("span", {}, "adding…");
    $("added").append(el("li", {}, `${file.name}: `, said));
    const body = new URLSearchParams({ text: await file.text().catch(() => "") });
    const told = ({ stored, known }) => `${count(stored - known, "account")} added, ${known} known before.`;
    result = await change(said, "/tokens/upload", body, told);
    for (const fault of result?.faults || []) $("added").append(el("li", { className: "trouble" }, fault));
  }
  $("files").value = ""; // so that the same file may be chosen again
  return result;
}

$("to-chat").href = `${BASE}/`;
for (const state of ["", ...STATES]) {
  const chip = button(`${state || "all"} `, () => look({ state }), state && `dot ${state}`);
  chip.value = state;
  chip.append(el("b"));
  $("chips").append(chip);
}
onSubmit("sign-in", async () => {
  const body = { key: $("key").value.trim() };
  await api("POST", "/tokens/session", body).then(poll, (error) => put($("sign-in-said"), error.message));
  $("sign-in").reset();
  $("search").focus({ preventScroll: true });
});
$("sign-out").onclick = () => api("DELETE", "/tokens/session").then(() => signedOut(""), poll);
$("search").oninput = () => look({ q: $("search").value.trim() });
$("back").onclick = () => look({ offset: Math.max(0, wanted.offset - PAGE) });
$("next").onclick = () => look({ offset: wanted.offset + PAGE });
$("all").onchange = () => {
  for (const { box } of accounts.values()) box.checked = $("all").checked;
  showPicked();
};
for (const each of BULK) {
  const go = () => act(each.dataset.do, picked());
  if (each.dataset.do === "remove") arm(each, go);
  else each.onclick = go;
}
onSubmit("add", async () => {
  if (await upload([new File([$("text").value], "Pasted")])) $("text").value = "";
});
$("files").onchange = () => upload($("files").files);
$("add").ondragover = $("add").ondragleave = $("add").ondrop = (event) => {
  $("add").classList.toggle("over", event.type === "dragover");
  if (!event.dataTransfer.types.includes("Files")) return; // text goes into the text area as usual
  event.preventDefault();
  if (event.type === "drop") upload(event.dataTransfer.files);
};
onSubmit("add-user", async () => {
  const [name, limit] = [$("user-name").value.trim(), Number($("user-limit").value) || null];
  if (!name) return;
  const made = await change($("users-said"), "/admin/users/add", { name, limit }, () => `Added ${name}.`);
  if (!made) return;
  $("add-user").reset();
  const shown = el("code", {}, made.token);
  const copier = button("Copy", () => copy(made.token, shown, copier), "main");
  const done = button("Done", () => { row.remove(); $("user-name").focus(); });
  const row = el("div", { className: "row wide" }, `The key of ${name}, shown only now:`, shown, copier, done);
  $("fresh").append(row);
  copier.focus();
});
onSubmit("clear", () => {
  $("clear").reset();
  change($("cleared"), "/tokens/clear", undefined, () => "All accounts were removed.");
});
poll();
"""

# -- chat --------------------------------------------------------------------------------------------------------------

CHAT_CSS = r"""
#chat { display: grid; grid-template: auto minmax(0, 1fr) auto / minmax(0, 1fr); height: 100dvh; }
#chat > header { padding: 0.6rem 1rem; border-bottom: 1px solid var(--line); background: var(--card); }
#log { overflow-y: auto; padding: 1.5rem max(1rem, calc(50% - 23rem)); }
#empty { justify-content: center; padding-top: 25vh; text-align: center; }
#ask { padding: 0.75rem max(1rem, calc(50% - 23rem)) 1rem; }
#question { field-sizing: content; max-height: 40vh; resize: none; }
#status { position: absolute; width: 1px; height: 1px; overflow: hidden; clip-path: inset(50%); }
dialog { border: 1px solid var(--line); border-radius: 14px; background: var(--card); color: inherit; }
.question { white-space: pre-wrap; background: var(--soft); border-radius: 14px; padding: 0.6rem 1rem; }
.question { width: fit-content; max-width: 88%; margin: 1.25rem 0 1.25rem auto; }
article[aria-busy="true"]::after { content: "…"; color: var(--quiet); }
details > div, blockquote { border-left: 3px solid var(--line); padding-left: 0.9rem; color: var(--quiet); }
.md > *, .md blockquote, .md figure { margin: 0 0 0.8rem; }
.md :is(h1, h2, h3, h4, h5, h6) { font-size: 1.15em; }
.md :is(ul, ol) { padding-left: 1.5rem; }
.md code { background: var(--soft); border-radius: 5px; padding: 0.1em 0.3em; }
.md figure { border: 1px solid var(--line); border-radius: 10px; overflow: hidden; }
figcaption { display: flex; padding: 0.25rem 0.8rem; background: var(--soft); align-items: center; }
.md pre { margin: 0; padding: 0.8rem; overflow-x: auto; background: var(--card); }
.md pre code { background: none; padding: 0; }
.md .wide { overflow-x: auto; overflow-wrap: normal; }
.md table { border-collapse: collapse; }
.md :is(th, td) { border: 1px solid var(--line); padding: 0.3rem 0.65rem; }
.md img { display: block; max-width: 100%; }
"""

CHAT_HTML = r"""
<main id="chat">
  <header class="row">
    <h1 class="grow">Chat</h1>
    <select id="model" aria-label="Model"><option>gpt-4o</option></select>
    <button id="new" type="button">New chat</button>
    <button id="change-key" type="button">Change key</button>
    <a id="to-tokens">Accounts</a>
  </header>
  <div id="log" role="log" aria-live="off" aria-label="Conversation" tabindex="0">
    <div id="empty" class="row">
      <p class="wide">Ask anything. This page talks to your own server, and keeps nothing of it when you close it.</p>
    </div>
  </div>
  <form id="ask" class="row">
    <textarea id="question" class="grow" rows="2" aria-label="Message" placeholder="Message"></textarea>
    <button id="go" class="main">Send</button>
    <p id="status" role="status"></p>
  </form>
  <dialog id="key-dialog" aria-label="API key">
    <form id="key-form" class="stack">
      <p id="key-why" class="quiet"></p>
      <label>API key, kept until this tab is closed
        <input id="key" type="password" autocomplete="off" pattern="[!-~]*"></label>
      <div class="row"><button class="main">Use this key</button>
        <button id="key-no" type="button">Cancel</button></div>
    </form>
  </dialog>
</main>
"""

CHAT_JS = r"""
// Markdown. Blocks are found line by line, and a line is looked at a fixed number of times a level; spans are
// found in one walk along the text. So an answer made to be expensive costs no more than its length.
const DEEPEST = 20;
const FENCE = /^[ \t]*(`{3,}|~{3,})([^`]*)$/;
const ITEM = /^[ \t]*([-*+]|[0-9]{1,9}[.)])[ \t]+/;

const indent = (line) => /^[ \t]*/.exec(line)[0].replaceAll("\t", "    ").length;
const dedent = (line, width) => " ".repeat(Math.max(0, indent(line) - width)) + line.trimStart();
const isOrdered = (line) => /^[ \t]*[0-9]/.test(line);

function cellsOf(line) {
  const cells = line.trim().replace(/^[|]/, "").replace(/(?<!\\)[|]$/, "").split(/(?<!\\)[|]/);
  return cells.map((cell) => cell.trim().replaceAll("\\|", "|"));
}

function isTable(line, below = "") {
  if (!line.includes("|") || !below.includes("-") || !below.includes("|")) return false;
  const marks = cellsOf(below);
  return marks.every((mark) => /^:?-+:?$/.test(mark)) && marks.length === cellsOf(line).length;
}

function kindOf(lines, at, depth) {
  const text = lines[at].trim();
  if (!text) return "blank";
  if (FENCE.test(lines[at])) return "fence";
  if (/^#{1,6}[ \t]/.test(text)) return "heading";
  if (/^(-{3,}|[*]{3,}|_{3,})$/.test(text.replaceAll(" ", ""))) return "rule";
  if (depth < DEEPEST && text.startsWith(">")) return "quote";
  if (depth < DEEPEST && ITEM.test(lines[at])) return "list";
  return isTable(lines[at], lines[at + 1]) ? "table" : "text";
}

/** Whether a paragraph goes on at line `at`; "1984. What a year" within one begins no list. */
function isMore(lines, at, depth) {
  const kind = kindOf(lines, at, depth);
  return kind === "text" || (kind === "list" && isOrdered(lines[at]) && !/^[ \t]*1[.)]/.test(lines[at]));
}

/** The elements of the blocks from line `at` on; `starts` gets the line each begins at. */
function blocks(lines, depth, at = 0, starts = []) {
  const nodes = [];
  while (at < lines.length) {
    const start = at++;
    const kind = kindOf(lines, start, depth);
    const take = (goesOn) => {
      while (at < lines.length && goesOn(lines[at])) at++;
      return lines.slice(start, at);
    };
    if (kind === "blank") continue;
    starts.push(start);
    if (kind === "rule") nodes.push(el("hr"));
    else if (kind === "heading") {
      const [, marks, text] = /^(#+)(.*)/.exec(lines[start].trim());
      nodes.push(el(`h${marks.length}`, {}, spans(text.trim())));
    } else if (kind === "text") {
      const text = take(() => isMore(lines, at, depth)).map((line) => line.trim()).join("\n");
      nodes.push(el("p", {}, spans(text)));
    } else if (kind === "quote") {
      const inner = take((line) => line.trim()[0] === ">").map((line) => line.trim().slice(1));
      nodes.push(el("blockquote", {}, blocks(inner, depth + 1)));
    } else if (kind === "table") nodes.push(table(take((line) => line.includes("|"))));
    else if (kind === "fence") {
      const mark = FENCE.exec(lines[start])[1];
      const closes = (text) => text.startsWith(mark) && !text.replaceAll(mark[0], "");
      nodes.push(codeBlock(take((line) => !closes(line.trim()))));
      at++;
    } else {
      const width = indent(lines[start]) + 2;
      const isNext = (line) =>
        isOrdered(line) === isOrdered(lines[start]) && kindOf(lines, at, depth) === kind;
      const items = take((line) => !line.trim() || indent(line) >= width || isNext(line));
      nodes.push(list(items, width, depth));
    }
  }
  return nodes;
}

function list(lines, width, depth) {
  const items = [];
  for (const line of lines) {
    if (line.trim() && indent(line) < width) items.push([line.replace(ITEM, "")]);
    else items.at(-1).push(dedent(line, width));
  }
  const nodes = items.map((inner) => el("li", {}, blocks(inner, depth + 1)));
  return isOrdered(lines[0]) ? el("ol", { start: parseInt(lines[0], 10) }, nodes) : el("ul", {}, nodes);
}

function codeBlock([first, ...inner]) {
  const width = indent(first);
  const code = inner.map((line) => (width ? dedent(line, width) : line)).join("\n");
  const label = el("span", { className: "quiet grow" }, FENCE.exec(first)[2].trim().slice(0, 40));
  const pre = el("pre", { tabIndex: 0 }, el("code", {}, code));
  const copier = button("Copy", () => copy(code, pre, copier), "small");
  return el("figure", {}, el("figcaption", {}, label, copier), pre);
}

function table([head, marks, ...rest]) {
  const width = cellsOf(marks).length;
  const row = (line, tag) => cellsOf(line).slice(0, width).map((cell) => el(tag, {}, spans(cell)));
  const rows = [row(head, "th"), ...rest.map((line) => row(line, "td"))];
  const body = el("table", {}, rows.map((cells) => el("tr", {}, cells)));
  return el("div", { className: "wide", tabIndex: 0 }, body);
}

// An escaped sign; backticks (1) around code (2); a run of emphasis signs; the beginning of a link or image;
// its end, with the address (3); a line break; a bare address.
const SPAN = new RegExp([/\\[!-/:-@[-`{-~]/, /(?<!`)(`{1,3})(?!`)([^]+?)(?<!`)\1(?!`)/, /[*]+|_+|~~/, /!?\[/,
  /\](?:[(]([^\s()]*(?:[(][^\s()]*[)][^\s()]*)*)(?: "[^"]*")?[)])?/, /\n/,
  /https?:[/][/](?:[^\s<>"`*[\]()]|[(][^\s<>"`*[\]()]*[)]){1,2000}(?<![.,;:!?'])/,
].map((part) => part.source).join("|"), "g");
const isLink = ({ mark }) => mark === "[";
const TAGS = { "*": "em", "**": "strong", _: "em", __: "strong", "~~": "del" };

/** The nodes of a paragraph. What a mark opens stands on `stack` until the mark that closes it comes. */
function spans(text) {
  const stack = [{ mark: "", nodes: [] }];
  const add = (node) => stack.at(-1).nodes.push(node);
  let at = 0;
  for (const found of text.matchAll(SPAN)) {
    const [sign, , code, target] = found;
    if (at < found.index) add(text.slice(at, found.index));
    at = found.index + sign.length;
    if (code) add(el("code", {}, code.trim() ? code.replace(/^ (.*) $/s, "$1") : code));
    else if (sign === "\n") add(el("br"));
    else if (sign[0] === "\\") add(sign[1]);
    else if (sign[0] === "]") bracket(stack, add, sign, target);
    else if (sign.endsWith("[")) open(stack, sign);
    else if (sign[0] === "h") add(stack.some(isLink) ? sign : link(sign, [sign]));
    else if (sign.length > 3) add(sign);
    else emphasis(stack, add, sign, text[found.index - 1] || " ", text[at] || " ");
  }
  add(text.slice(at));
  while (stack.length > 1) undo(stack, stack.length - 1);
  return stack[0].nodes;
}

function open(stack, mark) {
  if (stack.length > DEEPEST) undo(stack, 1);
  stack.push({ mark, nodes: [] });
}

/** The mark at `index` of the stack turns out to be mere text. */
function undo(stack, index) {
  const [{ mark, nodes }] = stack.splice(index, 1);
  for (const node of [mark, ...nodes]) stack[index - 1].nodes.push(node);
}

/** Take what the mark at `index` opened off the stack. */
function close(stack, index) {
  while (stack.length > index + 1) undo(stack, stack.length - 1);
  return stack.pop();
}

function emphasis(stack, add, signs, before, after) {
  const [sign] = signs;
  const isEdge = (char) => sign !== "_" || !/[\p{L}\p{N}]/u.test(char);
  let rest = signs;
  while (rest && before.trim() && isEdge(after)) {
    let index = stack.findLastIndex(({ mark }) => mark === rest);
    if (index < 0) index = stack.findLastIndex(({ mark }) => mark && rest.startsWith(mark));
    if (index < 0) break;
    const { mark, nodes } = close(stack, index);
    add(el(TAGS[mark], {}, nodes));
    rest = rest.slice(mark.length);
  }
  if (!after.trim() || !isEdge(before)) return add(rest);
  for (; rest; rest = rest.slice(2)) open(stack, rest.slice(0, 2));
}

function bracket(stack, add, sign, target) {
  const index = stack.findLastIndex(({ mark }) => mark.endsWith("["));
  if (index > 0 && target === undefined) undo(stack, index);
  if (index < 0 || target === undefined) return add(sign);
  const { mark, nodes } = close(stack, index);
  const node = mark === "[" ? link(target, nodes) : image(target, el("p", {}, nodes).textContent);
  for (const each of node ? [node] : [mark, ...nodes, sign]) add(each);
  while (node?.href && stack.some(isLink)) undo(stack, stack.findLastIndex(isLink)); // a link holds no other
}

function link(href, nodes) {
  if (!/^(https?:[/][/]|mailto:)/i.test(href)) return null;
  return el("a", { href, title: href, target: "_blank", rel: "noopener noreferrer nofollow" }, nodes);
}

/** An image is loaded only on request: its address could carry the conversation to its host. */
function image(src, alt) {
  if (!/^(https?:[/][/]|data:image[/])/i.test(src)) return null;
  const { host } = el("a", { href: src });
  return button(`Show image ${alt} ${host && `from ${host}`}`, (event) => {
    event.preventDefault(); // the image may stand within a link
    event.target.replaceWith(el("img", { referrerPolicy: "no-referrer", alt, src }));
  }, "small");
}

/** What shows a growing text in `root`. A line to come can change no more than the last two blocks. */
function markdown(root) {
  const starts = []; // the line each block begins at
  return (text) => {
    const [from = 0] = starts.splice(-2);
    while (root.children.length > starts.length) root.lastChild.remove();
    for (const node of blocks(text.split(/\r?\n/), 0, from, starts)) root.append(node);
  };
}

/** The data of the server-sent events of `body`, which may be split anywhere, even within a character. */
async function* events(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  for (let rest = "", done = false; !done;) {
    const part = await reader.read();
    const lines = (rest + (part.value || "")).split("\n");
    done = part.done;
    rest = lines.pop();
    for (const line of lines) if (line.startsWith("data:")) yield line.slice(5).trim();
  }
}

const KEY = `chatproxy key ${BASE}`;
const EXAMPLES = ["Explain how a rainbow forms", "Write a Python script that renames photos by date",
  "Compare tea and coffee in a table"];
const turns = []; // {role, content, reasoning, node}
let running = null; // the AbortController of the answer that is being written

const auth = () => {
  const key = sessionStorage.getItem(KEY);
  return key ? { authorization: `Bearer ${key}` } : {};
};
const atEnd = () => $("log").scrollHeight - $("log").scrollTop - $("log").clientHeight < 48;
const toEnd = () => { $("log").scrollTop = $("log").scrollHeight; };

function askKey(why) {
  put($("key-why"), why);
  $("key").value = "";
  if (!$("key-dialog").open) $("key-dialog").showModal();
}

async function loadModels() {
  try {
    const { data } = await api("GET", "/v1/models", undefined, { headers: auth() });
    const chosen = $("model").value;
    $("model").replaceChildren(...data.map(({ id }) => el("option", { selected: id === chosen }, id)));
  } catch (error) {
    if (error.status === 401) askKey(auth().authorization ? error.message : "This server wants an API key.");
  }
}

function ask(content) {
  for (const old of document.querySelectorAll(".again")) old.remove();
  turns.push({ role: "user", content, node: el("div", { className: "question" }, content) });
  $("empty").hidden = true;
  $("log").append(turns.at(-1).node);
  answer();
}

function busy(controller, said) {
  running = controller;
  put($("go"), controller ? "Stop" : "Send");
  put($("status"), said);
}

async function answer() {
  const [text, thought] = [el("div", { className: "md" }), el("div", { className: "md" })];
  const details = el("details", { hidden: true }, el("summary", {}, "Reasoning"), thought);
  const node = el("article", { "aria-label": "Answer", "aria-busy": "true" }, details, text);
  const turn = { role: "assistant", content: "", reasoning: "", node };
  const messages = turns.flatMap(({ role, content }) => (content ? { role, content } : []));
  const [show, showThought, control] = [markdown(text), markdown(thought), new AbortController()];
  turns.push(turn);
  $("log").append(node);
  toEnd();
  busy(control, "Answering");
  let frame = 0;
  const paint = () => {
    const follow = atEnd();
    frame = 0;
    details.hidden = !turn.reasoning;
    showThought(turn.reasoning);
    show(turn.content);
    if (follow) toEnd();
  };
  let [ended, problem] = ["", null];
  try {
    const body = { model: $("model").value, stream: true, messages };
    const more = { headers: auth(), signal: control.signal };
    const response = await send("POST", "/v1/chat/completions", body, more);
    for await (const data of events(response.body)) {
      if (data === "[DONE]") break;
      const { error, choices } = JSON.parse(data);
      if (error) throw new Error(error.message || String(error));
      const { delta, finish_reason } = choices?.[0] || {};
      ended = finish_reason || ended;
      turn.content += delta?.content || "";
      turn.reasoning += delta?.reasoning_content || "";
      frame = frame || requestAnimationFrame(paint);
    }
    if (!ended) throw new Error("The answer broke off.");
  } catch (error) {
    ended = "Stopped.";
    const broken = error instanceof TypeError ? new Error("The connection to the server broke.") : error;
    problem = control.signal.aborted ? null : broken;
  }
  cancelAnimationFrame(frame);
  node.ariaBusy = "false";
  if (turns.at(-1) !== turn) return; // a new chat was begun
  const kind = problem?.status === 401 ? "row denied" : "row";
  const copier = button("Copy", () => copy(turn.content, text, copier), "small");
  const again = button("Try again", () => { turns.pop().node.remove(); answer(); }, "small again");
  const note = problem?.message || (ended === "stop" ? "" : ended);
  const told = el("span", { className: problem ? "trouble" : "quiet" }, note);
  node.append(el("div", { className: kind }, turn.content ? copier : "", again, told));
  paint();
  busy(null, note || "The answer is complete.");
  if (problem?.status === 401) askKey(problem.message);
}

$("to-tokens").href = `${BASE}/tokens`;
$("empty").append(...EXAMPLES.map((text) => button(text, () => ask(text))));
onSubmit("ask", () => {
  const text = $("question").value.trim();
  if (running) return running.abort();
  if (text) ask(text);
  $("question").value = "";
});
$("question").onkeydown = (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing || event.keyCode === 229) return;
  event.preventDefault();
  if (!running) $("ask").requestSubmit();
};
$("new").onclick = () => {
  running?.abort();
  for (const { node } of turns.splice(0)) node.remove();
  busy(null, "");
  $("empty").hidden = false;
  $("question").focus();
};
$("change-key").onclick = () => askKey("Leave it empty to go on without a key.");
onSubmit("key-form", () => {
  sessionStorage.setItem(KEY, $("key").value.trim());
  $("key-dialog").close();
  loadModels();
  document.querySelector(".denied .again")?.click();
});
$("key-no").onclick = () => $("key-dialog").close();
loadModels();
$("question").focus();
"""

TOKENS_PAGE = built_page("chatproxy accounts", BASE_CSS + TOKENS_CSS, TOKENS_HTML, BASE_JS + TOKENS_JS)
CHAT_PAGE = built_page("chatproxy", BASE_CSS + CHAT_CSS, CHAT_HTML, BASE_JS + CHAT_JS)


@ROUTER.on("GET", "/tokens", access="public")
def tokens_page(app: App, request: Request) -> Reply:
    """the page to look after accounts and API users; it shows nothing before the admin key is given"""
    return TOKENS_PAGE


@ROUTER.on("GET", "/", access="public")
def chat_page(app: App, request: Request) -> Reply:
    """a chat page against this server's own API; what Ollama says there, to a client that is no browser"""
    browser = "text/html" in request.headers.get("accept", "")
    return (
        CHAT_PAGE if browser else Reply(body=b"Ollama is running", content_type="text/plain; charset=utf-8")
    )


# ============================================================================================================
# demo: the embedded upstream
# ============================================================================================================

DEMO_KEY = "demo"
DEMO_ANSWER = (
    "Hello from the demo upstream: no account and no network were used. You asked: “{question}”. This answer travelled "
    "the whole way that a real one takes, from the requirements token and its proof of work to the stream you are "
    "reading. Add an account with `chatproxy.py accounts add -` and start without `--demo` to talk to the real one."
)


DEMO_CODEX_ANSWER = (
    "Hello from the demo upstream's Codex backend: no account and no network were used. You asked: “{question}”. Sign in "
    "with `chatproxy.py login` and start without `--demo` to talk to the real one."
)


def demo_token(name: str, lifetime: float = 86400.0, client: str = "", plan: str = "plus") -> str:
    """An unsigned access token in the shape of a real one; `client` is whom it was given to."""
    auth = {"chatgpt_account_id": f"workspace-{name}", "chatgpt_plan_type": plan, "user_id": f"user-{name}"}
    said = ({"client_id": client} if client else {}) | {
        "exp": int(time.time() + lifetime),
        "jti": secrets.token_hex(8),
        "https://api.openai.com/profile": {"email": f"{name}@demo.example"},
        "https://api.openai.com/auth": auth,
    }
    parts = [base64.urlsafe_b64encode(json.dumps(one).encode()).decode() for one in ({"alg": "none"}, said)]
    return ".".join([*(part.rstrip("=") for part in parts), "0" * 16])


def demo_image() -> Blob:
    """A PNG of 64 by 64 pixels, green fading to blue."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    rows = b"".join(b"\0" + bytes((40, 255 - y * 3, y * 3)) * 64 for y in range(64))
    head = struct.pack(">IIBBBBB", 64, 64, 8, 2, 0, 0, 0)
    chunks = chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return Blob(b"\x89PNG\r\n\x1a\n" + chunks)


def sample(schema: Any, root: Any = None, depth: int = 0) -> Any:
    """A value that fits a schema of the usual kind."""
    root = schema if root is None else root
    if not isinstance(schema, dict) or depth > 20:
        return None
    if isinstance(pointer := schema.get("$ref"), str):
        return sample(Schema(root).referred(pointer), root, depth + 1)
    for name in ("enum", "anyOf", "oneOf", "allOf"):
        if choices := schema.get(name):
            return choices[0] if name == "enum" else sample(choices[0], root, depth + 1)
    if "const" in schema:
        return schema["const"]
    kind = schema.get("type", "object")
    kind = kind[0] if isinstance(kind, list) else kind
    if kind == "object":
        return {name: sample(one, root, depth + 1) for name, one in (schema.get("properties") or {}).items()}
    if kind == "array":
        return [sample(schema.get("items"), root, depth + 1)] if depth < 10 else []
    return {"string": "demo", "integer": 1, "number": 1, "boolean": True}.get(kind)


@dataclass
class DemoFile:
    """A file of the stand-in's; `blob` is None until its bytes have come."""

    owner: str
    name: str
    blob: Blob | None
    use_case: str
    size: int = 0
    mime: str = ""
    asked: bool = False


@dataclass
class DemoConversation:
    """A conversation of the stand-in's; temporary ones are not `kept`, and so neither listed nor remembered."""

    owner: str
    created: float
    kept: bool
    updated: float = 0.0
    title: str = "New chat"
    messages: list[dict[str, Any]] = field(default_factory=list)
    drawn: tuple[float, dict[str, Any]] | None = None  # a message that comes later, and when (Unix seconds)

    def mapping(self) -> dict[str, Any]:
        """Its messages as a tree, and which of them is the last."""
        if self.drawn and self.drawn[0] <= time.time():
            self.messages.append(self.drawn[1])
            self.drawn = None
        nodes: dict[str, Any] = {"client-created-root": {"message": None, "parent": None, "children": []}}
        before = "client-created-root"
        for message in self.messages:
            id = str(message["id"])
            nodes[before]["children"].append(id)
            nodes[id] = {"id": id, "message": message, "parent": before, "children": []}
            before = id
        return {"mapping": nodes, "current_node": before}

    def facts(self, id: str) -> dict[str, Any]:
        """Its row in a list."""
        times = [
            datetime.datetime.fromtimestamp(t, datetime.timezone.utc) for t in (self.created, self.updated)
        ]
        made, changed = (moment.isoformat().replace("+00:00", "Z") for moment in times)
        return {"id": id, "title": self.title, "create_time": made, "update_time": changed}


class Demo(Application):
    """A stand-in for chatgpt.com, and api.openai.com in a nutshell, that speaks the real wire protocol in both generations.

    It is as strict as the original: proofs are checked, and a requirements token is good for one call. The attributes
    are its knobs; a subclass can replace its methods for other variants of the site, and for worse weather.
    """

    MAX_FILES = MAX_TALKS = 200  # kept at a time
    conduit = True  # whether turns are given one
    estuary = True  # whether files are where only the account gets them
    drawing_time: float | None = (
        0.5  # seconds that a drawing takes behind the answer's end; None: it is in the answer
    )

    router = Router()

    def __init__(self) -> None:
        self.difficulty = "0fffff"
        self.pace = 0.02  # seconds between two words
        self.expire_after = 540
        self.dead: set[str] = set()  # tokens that are answered with 401
        self.conversations: dict[str, DemoConversation] = {}
        self.models = ["gpt-4o", "gpt-4o-mini", "o3"]
        self.images_left = 40
        self.codex = True  # whether it has the Codex backend
        self.codex_plan = "plus"
        self.codex_catalog = demo_catalog()
        # How much of each window is used (percent), how long it is, and when it is counted anew (seconds).
        self.codex_windows = {"primary_window": (12, 18000, 9000), "secondary_window": (40, 604800, 250_000)}
        self._codex_cache: dict[str, int] = {}  # tokens of the last request, by its cache key
        self.files: dict[str, DemoFile] = {}
        self.url = ""
        self.calls: list[str] = []  # "METHOD /path" of every request, in order
        self._issued_lock = threading.Lock()
        # Requirements token → end of life, seed, difficulty.
        self._issued: dict[str, tuple[float, str, str]] = {}

    def listen(self) -> tuple[Server, str]:
        """Starts it on a free port of the loopback interface: the server, and its URL."""
        settings = replace(resolve(gather({}, {})), max_connections=10_000, max_body_mb=2048)
        server = Server(("127.0.0.1", 0), self, settings, Metrics(), quiet=True)
        threading.Thread(target=server.serve_forever, args=(0.1,), name="demo", daemon=True).start()
        self.url = f"http://127.0.0.1:{server.server_port}"
        return server, self.url

    def admit(self, request: Request) -> int:
        """Takes bodies of any size: the site refuses by what it reads."""
        return 2 << 30

    def respond(self, request: Request) -> Reply | Stream | Upgrade:
        """Answers any call; what the site does not have is its 404."""
        self.calls.append(f"{request.method} {request.path}")
        try:
            endpoint = self.router.find(request)
            if refused := self._refused(request):
                return refused
            return endpoint.function(self, request)
        except ApiError as error:
            return _detail(error.status, error.message or "Not Found")

    def _refused(self, request: Request) -> Reply | None:
        """Refuses callers without an account's token on /backend-api, or with one on /backend-anon."""
        api = request.params.get("api")
        key = Keys.given(request)
        if api is None:
            return None
        mobile = api == "unauth-mweb" and "/sentinel/" in request.path
        if api not in ("backend-api", "backend-anon") and not mobile:
            return _detail(404, "Not Found")
        if api != "backend-api":
            return _detail(401, "Unauthorized") if key else None
        try:
            expired = claims(key)["exp"] < time.time()
        except (ValueError, KeyError, TypeError):
            expired = True
        if expired or key in self.dead:
            text = "Your authentication token has expired."
            return _detail(401, {"message": text, "code": "token_expired"})
        return None

    # -- one turn ------------------------------------------------------------------------------------------------------

    @router.on("GET", "/")
    def start_page(self, request: Request) -> Reply:
        """The page whose scripts and build the fingerprint names."""
        facts = 'data-build="prod-demo1" data-conversation-document-affinity="demo-1" data-worker-version-id="demo.2"'
        page = f'<!DOCTYPE html><html {facts}><head><script src="/_next/static/chunks/app.js"></script></head></html>'
        headers = {"Set-Cookie": "oai-sc=demo; Path=/; Secure"}
        return Reply(200, page.encode(), "text/html; charset=utf-8", headers)

    def _requirements(self, request: Request) -> dict[str, Any]:
        """The answer to chat-requirements; a client need not give a proof of its own, but none that is wrong."""
        given = (request.json() if request.body.size else {}).get("p")
        proved = isinstance(given, str) and given.startswith("gAAAAAC") and self._decoded(given[7:])
        if given is not None and not proved:
            raise ApiError("invalid_request_error", "p is not a requirements proof")
        token = secrets.token_urlsafe(24)
        seed = str(random.random())
        with self._issued_lock:
            self._issued[token] = (time.monotonic() + self.expire_after, seed, self.difficulty)
        return {
            "persona": "chatgpt-paid" if request.params["api"] == "backend-api" else "chatgpt-noauth",
            "token": token,
            "expire_after": self.expire_after,
            "proofofwork": {"required": bool(self.difficulty), "seed": seed, "difficulty": self.difficulty},
            "arkose": {"required": False, "dx": ""},
            "turnstile": {"required": False, "dx": ""},
            "so": {"required": False, "collector_dx": "", "snapshot_dx": ""},
        }

    def _decoded(self, answer: str) -> list[Any] | None:
        """A proof's configuration, in the form of any year; None when it is none."""
        try:
            value = json.loads(base64.b64decode(answer.removesuffix("~S"), validate=True))
        except (ValueError, RecursionError):
            return None
        known = isinstance(value, list) and 13 <= len(value) <= 25 and isinstance(value[3], (int, float))
        return value if known else None

    @router.on("POST", "/{api}/sentinel/chat-requirements")
    def chat_requirements(self, request: Request) -> Reply:
        """Requirements, first generation."""
        return json_reply(self._requirements(request))

    @router.on("POST", "/{api}/sentinel/chat-requirements/prepare")
    def prepare_requirements(self, request: Request) -> Reply:
        """Requirements, the page's generation: the token comes after the proof."""
        asked = self._requirements(request)
        return json_reply(asked | {"prepare_token": asked.pop("token")})

    @router.on("POST", "/{api}/sentinel/chat-requirements/finalize")
    def finalize_requirements(self, request: Request) -> Reply:
        """Exchanges a prepare token and its proof for the token."""
        body = request.json()
        with self._issued_lock:
            issued = self._issued.pop(str(body.get("prepare_token")), None)
        if issued is None or not self._proved(issued, str(body.get("proofofwork"))):
            return _detail(403, "Proof of work failed")
        token = secrets.token_urlsafe(24)
        with self._issued_lock:
            self._issued[token] = (issued[0], "", "")
        persona = "chatgpt-paid" if request.params["api"] == "backend-api" else "chatgpt-noauth"
        granted = {"persona": persona, "token": token, "expire_after": self.expire_after}
        return json_reply(granted | {"expire_at": time.time() + self.expire_after})

    @router.on("POST", "/unauth-mweb/conversation/prepare")
    def prepare_mobile(self, request: Request) -> Reply:
        """A conduit for a turn of the page for phones."""
        return json_reply({"conduit_token": secrets.token_urlsafe(12), "prepare_cadence_enabled": True})

    @router.on("POST", "/unauth-mweb/conversation/updates")
    def update_mobile(self, request: Request) -> Reply | Stream | Upgrade:
        """A turn of the page for phones: lines of JSON, or pieces of HTML for those who know no other protocol."""
        form = {name: parts[0].text() for name, parts in parse_form(request.headers, request.body).items()}
        with self._issued_lock:
            issued = self._issued.pop(form.get("chatRequirementsToken", ""), None)
        if issued is None or not self._proved(issued, form.get("proofToken", "")):
            return _detail(403, "Unusual activity has been detected from your device.")
        words = re.findall(r"\s*\S+", DEMO_ANSWER.format(question=form.get("prompt", "")[:2000]))
        if request.headers.get("x-web-mobile-conversation-stream-protocol") == "2":
            kind = "application/vnd.openai.conversation-source+ndjson"
            return streamed(self.frames(self._mobile_lines(words)), content_type=kind, signs=False)
        kind = "text/vnd.openai.web-mobile-partial+html"
        pieces = self._mobile_frames(words, form.get("assistantMessageId", ""))
        return streamed(self.frames(pieces), content_type=kind, signs=False)

    def _mobile_lines(self, words: list[str]) -> Iterator[bytes]:
        message = {"type": "content", "messageId": new_id()}
        begun = {"type": "control", "detail": {"kind": "conversation-id", "conversationId": new_id()}}
        yield compact(begun).encode() + b"\n"
        for number, word in enumerate(words):
            mode = "append" if number else "replace"
            yield compact(message | {"mode": mode, "markdown": word}).encode() + b"\n"
            time.sleep(self.pace)
        yield compact({"type": "end"}).encode() + b"\n"

    def _mobile_frames(self, words: list[str], message: str) -> Iterator[bytes]:
        def frame(number: int, place: str, apply: str, inside: str) -> bytes:
            applied = f'<template for="{place}" data-web-mobile-dpu-apply="{apply}">{inside}</template>'
            return f'<template data-web-mobile-dpu-frame="{number}">{applied}</template>'.encode()

        for end in (len(words) // 2, len(words)):
            text = html.escape("".join(words[:end]))
            block = f'<p data-assistant-stream-block="" data-assistant-stream-block-index="0">{text}</p>'
            yield frame(end, f"assistant-{message}-pending", "replace", block)
        id = new_id()
        state = {
            "messages": [],
            "parentMessageId": id,
            "userMessageCount": 1,
            "backendConversationId": new_id(),
        }
        facts = {"control": "complete", "id": state["backendConversationId"], "state": compact(state)}
        attributes = " ".join(
            f'data-conversation-{name}="{html.escape(str(one))}"' for name, one in facts.items()
        )
        end_of_it = f'<span {attributes} data-message-id="{id}"></span>'
        yield frame(len(words) + 1, "conversation-control", "append", end_of_it)

    @router.on("POST", "/{api}/f/conversation/prepare")
    def prepare_conversation(self, request: Request) -> Reply:
        """A conduit for the turn to come, or none."""
        if "messages" in request.json():
            return _detail(422, "messages are not expected")
        token = secrets.token_urlsafe(12) if self.conduit else None
        return json_reply({"status": "ok", "conduit_token": token})

    def _proved(self, issued: tuple[float, str, str], proof: str) -> bool:
        """Whether a proof is right, or the giving up that browsers are allowed."""
        end, seed, difficulty = issued
        if time.monotonic() > end:
            return False
        given_up = GIVE_UP + base64.b64encode(f'"{seed}"'.encode()).decode()
        if not difficulty or proof.removesuffix("~S") == given_up:
            return True
        answer = proof.removeprefix("gAAAAAB")
        if answer == proof or not self._decoded(answer):
            return False
        kind = ALGORITHMS["fnv" if answer.endswith("~S") else "sha3"][0]
        bound = bytes.fromhex(difficulty + "f" * (len(difficulty) % 2))[: kind.digits // 2]
        return kind(seed.encode()).first((answer.removesuffix("~S").encode(),), b"", bound) is not None

    @router.on("POST", "/{api}/conversation", "/{api}/f/conversation")
    def conversation(self, request: Request) -> Reply | Stream | Upgrade:
        """A turn, for a client that has met the requirements."""
        body = request.json()
        headers = request.headers
        with self._issued_lock:
            issued = self._issued.pop(headers.get("openai-sentinel-chat-requirements-token", ""), None)
        if issued is None or not self._proved(issued, headers.get("openai-sentinel-proof-token", "")):
            return _detail(403, "Unusual activity has been detected from your device.")
        if not body.get("model") or body.get("action") not in ("next", "continue", "variant"):
            return _detail(422, [{"loc": ["body"], "msg": "field required", "input": body}])
        known = body.get("conversation_id")
        if known and known not in self.conversations:
            return _detail(404, {"code": "conversation_not_found", "message": "Conversation not found"})
        for message in body.get("messages") or ():
            for one in message.get("metadata", {}).get("attachments", ()):
                if self._held(request, one.get("id")) is None:
                    return _detail(404, {"code": "file_not_found", "message": "File not found"})
        return streamed(self.frames(self.turn(request, body)), signs=False)

    def turn(self, request: Request, body: Mapping[str, Any]) -> Iterator[bytes]:
        """The bytes of a turn's stream."""
        return self.answer(request, body)

    def frames(self, pieces: Iterable[bytes]) -> Sent:
        for piece in pieces:
            yield piece, 1

    def answer(self, request: Request, body: Mapping[str, Any]) -> Iterator[bytes]:
        """The answer's bytes, event by event: a drawing, a call, JSON, or a few words, as the messages want it."""
        texts = []
        owner = self._owner(request)
        for one in body.get("messages") or ():
            parts = [part for part in one["content"]["parts"] if isinstance(part, str)]
            texts.append((one["author"]["role"], "\n".join(parts)))
        told = texts[0][1] if texts else ""  # where functions and shapes are told
        role, asked = texts[-1] if texts else ("user", "go on")
        if "picture_v2" in body.get("system_hints", ()) or re.match(r"(?i)draw\b", asked):
            return self._drawn(body, owner)
        if role == "user" and re.match(r"(?i)run\b.*\bpython\b", asked):
            code = {"content_type": "code", "language": "unknown", "text": "print(6 * 7)"}
            python = {"author": {"role": "assistant"}, "recipient": "python", "content": code}
            printed = {"content_type": "execution_output", "text": "42"}
            output = {"author": {"role": "tool", "name": "python"}, "content": printed}
            return self.say(body, ["It", " is", " 42."], before=[python, output], owner=owner)
        if FUNCTIONS_LINE in told and (called := self._call(told, texts)):
            return self.say(body, re.findall(r"(?s).{1,7}", called), owner=owner)
        if SHAPE_LINE in told:
            schema = told.partition(f"{SCHEMA_LINE}\n")[2]
            return self.say(
                body, [compact(sample(decode(schema)[0]) if schema else {"demo": True})], owner=owner
            )
        if told.startswith(("Repeat the next message", "Translate the next message")):
            return self.say(body, re.findall(r"\s*\S+", asked), owner=owner)
        came = [
            f"{one.get('name')} ({one.get('size', 0):,} bytes, {one.get('mime_type') or one.get('mimeType')})"
            for message in body.get("messages") or ()
            for one in message.get("metadata", {}).get("attachments", ())
        ]
        answer = DEMO_ANSWER.format(question=asked[:2000]) + (
            f" With it came {', '.join(came)}." if came else ""
        )
        return self.say(body, re.findall(r"\s*\S+", answer), owner=owner)

    def _drawn(self, body: Mapping[str, Any], owner: str) -> Iterator[bytes]:
        """An answer that is a drawing: made while it is given, or after its end."""
        if self.drawing_time is not None and body.get("history_and_training_disabled"):
            return self.say(
                body, ["Images", " are", " not", " drawn", " in", " temporary", " chats."], owner=owner
            )
        drawn = DemoFile(owner, "drawing.png", demo_image(), "multimodal", 0, "image/png")
        scheme = "file-service" if self.drawing_time is None else "sediment"
        place = f"{scheme}://{self.keep(drawn)}"
        part = {"content_type": "image_asset_pointer", "asset_pointer": place, "width": 64, "height": 64}
        content = {"content_type": "multimodal_text", "parts": [part]}
        drawing = {"author": {"role": "tool", "name": "dalle.text2im"}, "content": content}
        if self.drawing_time is None:
            return self.say(body, ["Here", " it", " is."], before=[drawing], owner=owner)
        return self._drawn_later(body, drawing, self.drawing_time, owner)

    def _drawn_later(
        self, body: Mapping[str, Any], drawing: dict[str, Any], seconds: float, owner: str
    ) -> Iterator[bytes]:
        """A stream that ends with the news that a drawing is under way."""
        conversation, talk = self._talk(body, owner)
        task = {"image_gen_task_id": new_id(), "async_task_type": "image_gen"}
        facts = {"status": "finished_successfully", "recipient": "all", "id": new_id()}
        content = {"content_type": "text", "parts": ["Processing image"]}
        notice = facts | {
            "author": {"role": "tool", "name": "image_gen"},
            "content": content,
            "metadata": task,
        }
        talk.messages.append(notice)
        talk.drawn = (time.time() + seconds, facts | drawing | {"id": new_id(), "metadata": task})
        self.images_left = max(0, self.images_left - 1)
        user = dict((body.get("messages") or [{"id": new_id(), "author": {"role": "user"}}])[-1])
        encoded = self.encoded if "v1" in (body.get("supported_encodings") or ()) else self.cumulative
        yield from encoded(conversation, [user], notice, (), {}, {})
        yield data_event({"type": "message_stream_complete", "conversation_id": conversation}) + DONE

    @classmethod
    def _call(cls, told: str, texts: list[tuple[str, str]]) -> str:
        """The call that a model would make, as it would write it; "" for none."""
        lines = told.partition(f"{FUNCTIONS_LINE}\n")[2].partition("\n\n")[0]
        offered = {one["name"]: one for one in map(json.loads, lines.split("\n"))}
        last = max((i for i, (role, _) in enumerate(texts) if role == "user"), default=0)
        made = set(re.findall(r'<tool_call>\{"name": "([^"]+)"', "\n".join(text for _, text in texts[last:])))
        must = re.search(r"You must call (\S+)", told)
        over = texts[-1][0] == "tool"
        name = cls.choice(list(offered), made, texts[last][1], must[1] if must else "", over)
        return call_text(name, compact(sample(offered[name]["parameters"]))) if name else ""

    @staticmethod
    def choice(offered: list[str], made: Collection[str], asked: str, must: str, over: bool) -> str:
        """The function that a model would call: the one that it `must`, or one that the question speaks of and that it has
        not called yet, unless that is `over`; "" for none."""
        left = [name for name in offered if name not in made]
        wanted = [
            name for name in left if any(word in asked.lower() for word in re.split("[._]", name.lower()))
        ]
        if must in offered:
            return must
        if must:
            wanted = wanted or left or offered[-1:]
        elif over:
            wanted = []
        return wanted[0] if wanted else ""

    def say(
        self,
        body: Mapping[str, Any],
        words: Iterable[str],
        details: str = "stop",
        before: Iterable[Mapping[str, Any]] = (),
        metadata: Mapping[str, Any] | None = None,
        owner: str = "",
    ) -> Iterator[bytes]:
        """The events of an answer of these words; `details` is finish_details.type, `before`
        messages that come first, `metadata` what the answer has more at its end, `owner` whose conversation it is."""
        conversation, talk = self._talk(body, owner)
        user = dict((body.get("messages") or [{"id": new_id(), "author": {"role": "user"}}])[-1])
        message: dict[str, Any] = {
            "id": new_id(),
            "author": {"role": "assistant", "name": None, "metadata": {}},
            "create_time": time.time(),
            "content": {"content_type": "text", "parts": [""]},
            "status": "in_progress",
            "end_turn": None,
            "metadata": {"model_slug": body["model"], "message_type": "next", "parent_id": user.get("id")},
            "recipient": "all",
            "channel": "final",
        }
        done: dict[str, Any] = {"status": "finished_successfully", "recipient": "all", "metadata": {}}
        first = [user, *({"id": new_id()} | done | dict(one) for one in before)]
        end = {"status": "finished_successfully", "end_turn": details != "max_tokens"}
        end_metadata = {"finish_details": {"type": details}, "is_complete": True} | dict(metadata or {})
        encoded = self.encoded if "v1" in (body.get("supported_encodings") or ()) else self.cumulative
        said = list[str]()

        def noted() -> Iterator[str]:
            for word in words:
                said.append(word)
                yield word

        yield from encoded(conversation, first, message, noted() if talk.kept else words, end, end_metadata)
        if talk.kept:
            content = {"content_type": "text", "parts": ["".join(said)]}
            whole = message | end | {"content": content, "metadata": message["metadata"] | end_metadata}
            talk.messages += [*first[1:], whole]
        complete = {"type": "message_stream_complete", "conversation_id": conversation}
        yield data_event(complete) + DONE

    def _talk(self, body: Mapping[str, Any], owner: str) -> tuple[str, DemoConversation]:
        """The conversation of a turn, begun if there is none, with the turn's own messages in it."""
        conversation = str(body.get("conversation_id") or uuid.uuid4())
        now = time.time()
        kept = not body.get("history_and_training_disabled")
        talk = self.conversations.setdefault(conversation, DemoConversation(owner, now, kept))
        talk.updated = now
        if talk.kept:
            talk.messages += body.get("messages") or ()
        if len(self.conversations) > self.MAX_TALKS:
            self.conversations.pop(next(iter(self.conversations)))
        return conversation, talk

    def cumulative(
        self, conversation: str, first: list[Any], message: Any, words: Iterable[str], end: Any, metadata: Any
    ) -> Iterator[bytes]:
        """The messages of an answer in the cumulative encoding: each event has all of a message that there is."""
        frame = {"conversation_id": conversation, "error": None}
        text = ""
        for one in first:
            yield data_event({"message": one} | frame)
        for word in words:
            text += word
            message = message | {"content": {"content_type": "text", "parts": [text]}}
            yield data_event({"message": message} | frame)
            time.sleep(self.pace)
        yield data_event({"message": message | end | {"metadata": message["metadata"] | metadata}} | frame)

    def encoded(
        self, conversation: str, first: list[Any], message: Any, words: Iterable[str], end: Any, metadata: Any
    ) -> Iterator[bytes]:
        """The same in the v1 encoding: the `first` messages whole, then the last word by word."""

        def delta(value: Any) -> bytes:
            return b"event: delta\n" + data_event(value)

        yield b'event: delta_encoding\ndata: "v1"\n\n'
        where = {"p": "", "o": "add"}
        for number, one in enumerate([*first, message]):
            whole = {"message": one, "conversation_id": conversation, "error": None}
            yield delta(where | {"v": whole, "c": number})
            where = {}
        head: dict[str, Any] = {"p": "/message/content/parts/0", "o": "append"}
        for word in words:
            yield delta(head | {"v": word})
            head = {}
            time.sleep(self.pace)
        changes = [{"p": f"/message/{name}", "o": "replace", "v": value} for name, value in end.items()]
        changes.append({"p": "/message/metadata", "o": "append", "v": metadata})
        yield delta({"p": "", "o": "patch", "v": changes})

    # -- the Codex backend -----------------------------------------------------------------------------------------------

    @router.on("GET", "/{api}/codex/models")
    def codex_models(self, request: Request) -> Reply:
        """The models, for clients that say which version they are; those that know the list are told no more."""
        if not self.codex:
            return _detail(404, "Not Found")
        if not request.query.get("client_version"):
            return _detail(400, "client_version is required")
        body = compact({"models": self.codex_catalog}).encode()
        headers = {"ETag": f'"{hashlib.sha256(body).hexdigest()[:16]}"'}
        if request.headers.get("if-none-match") == headers["ETag"]:
            return Reply(304, headers=headers)
        return Reply(200, body, headers=headers)

    @router.on("GET", "/{api}/wham/usage")
    def codex_usage(self, request: Request) -> Reply:
        """What the plan lets the account use."""
        if not self.codex:
            return _detail(404, "Not Found")
        now = int(time.time())
        windows = {
            name: {
                "used_percent": used,
                "limit_window_seconds": seconds,
                "reset_after_seconds": rest,
                "reset_at": now + rest,
            }
            for name, (used, seconds, rest) in self.codex_windows.items()
        }
        limit: dict[str, Any] = {"allowed": True, "limit_reached": False} | windows
        credits = {"has_credits": False, "unlimited": False, "balance": "0"}
        return json_reply({"plan_type": self.codex_plan, "rate_limit": limit, "credits": credits})

    @router.on("POST", "/{api}/codex/responses")
    def codex_responses(self, request: Request) -> Reply | Stream | Upgrade:
        """An answer, as events."""
        body = request.json()
        if refused := self._codex_refusal(request, body):
            return refused
        headers = dict[str, str]()
        for name, (used, seconds, rest) in self.codex_windows.items():
            start = f"x-codex-{name.removesuffix('_window')}"
            headers |= {f"{start}-used-percent": str(used), f"{start}-window-minutes": str(seconds // 60)}
            headers[f"{start}-reset-at"] = str(int(time.time()) + rest)
        return streamed(self.frames(self.codex_turn(request, body)), headers=headers, signs=False)

    @router.on("POST", "/{api}/codex/responses/compact")
    def codex_compact(self, request: Request) -> Reply:
        """A conversation made shorter: the user's messages, and an item that the site alone can read."""
        body = request.json()
        if refused := self._codex_refusal(request, body | {"stream": True, "store": False}):
            return refused
        kept = [in_full(item) for item in body["input"] if item.get("role") == "user"]
        return json_reply({"object": "response.compaction", "output": [*kept, self._compaction(request)]})

    def _compaction(self, request: Request) -> dict[str, Any]:
        return {"type": "compaction", "encrypted_content": self._sealed(request)}

    def _sealed(self, request: Request) -> str:
        """Something that only this account's next requests may bring back."""
        return f"gAAAAA{secrets.token_urlsafe(60)}.{self._owner(request)}"

    def _codex_refusal(self, request: Request, body: Mapping[str, Any]) -> Reply | None:
        """Refuses what the site refuses: whoever came by another sign-in, parameters it does not know, items that it would
        have to remember, and tools that are not offered."""
        key = Keys.given(request)
        if not self.codex:
            return _detail(404, "Not Found")
        if claims(key).get("client_id") != BROWSER_CLIENT:
            return _codex_error(401, "Missing scopes: api.responses.write", "missing_scope")
        for name in body:
            if name not in _CODEX_PARAMETERS:
                return _detail(400, f"Unsupported parameter: {name}")
        for name, value in (("store", False), ("stream", True)):
            if body.get(name) is not value:
                return _detail(400, f"{name.capitalize()} must be set to {compact(value)}")
        if not isinstance(body.get("input"), list):
            return _detail(400, "Input must be a list")
        if body.get("service_tier", "priority") != "priority":
            return _detail(400, f"Unsupported service_tier: {body['service_tier']}")
        model = next((one for one in self.codex_catalog if one["slug"] == body.get("model")), None)
        if model is None:
            text = (
                f"The '{body.get('model')}' model is not supported when using Codex with a ChatGPT account."
            )
            return _detail(400, text)
        effort = (body.get("reasoning") or {}).get("effort")
        levels = [one["effort"] for one in model["supported_reasoning_levels"]]
        if effort is not None and effort not in levels:
            text = f"Unsupported value: '{effort}' is not supported with the '{model['slug']}' model."
            return _codex_error(400, text, "unsupported_value", "reasoning.effort")
        fault = self._fault_of_tools(body) or self._fault_of_items(body["input"], self._owner(request))
        if fault:
            return _codex_error(400, *fault)
        code = self._simulated(body)
        if not _CODEX_FAILURES.get(code):
            return None
        facts: dict[str, Any] = {"type": code, "code": code, "plan_type": "plus"}
        facts["message"] = "The usage limit has been reached"
        facts |= {"resets_at": int(time.time()) + 60, "resets_in_seconds": 60}
        return json_reply({"error": facts}, _CODEX_FAILURES[code])

    @staticmethod
    def _simulated(body: Mapping[str, Any]) -> str:
        """The failure that the last message asks for, "" for none."""
        texts = _texts_in(body["input"][-1].get("content")) if body["input"] else []
        match = re.match(r"(?i)\s*simulate (\w+)", texts[-1]) if texts else None
        return match[1] if match and match[1] in _CODEX_FAILURES else ""

    @staticmethod
    def _fault_of_tools(body: Mapping[str, Any]) -> tuple[str, str, str] | None:
        tools = body.get("tools") or []
        names = {tool.get("name") or tool["type"] for tool in tools}
        for i, tool in enumerate(tools):
            if tool["type"] not in _CODEX_TOOLS:
                return f"Unsupported tool type: {tool['type']}", "", f"tools[{i}].type"
            name = tool.get("name", "x")
            if not re.fullmatch("[a-zA-Z0-9_-]{1,64}", name):
                return (
                    f"Invalid 'tools[{i}].name': string does not match pattern.",
                    "invalid_value",
                    f"tools[{i}].name",
                )
        choice = body.get("tool_choice")
        named = choice.get("name") or choice.get("type") if isinstance(choice, dict) else ""
        if named and named != "allowed_tools" and named not in names:
            return f"Tool choice '{named}' not found in 'tools' parameter.", "", "tool_choice"
        if "parallel_tool_calls" in body and not tools:
            return (
                "'parallel_tool_calls' is only allowed when 'tools' are specified.",
                "",
                "parallel_tool_calls",
            )
        return None

    @staticmethod
    def _fault_of_items(items: list[Any], owner: str) -> tuple[str, str, str] | None:
        """What is wrong with the items of a request: nothing is remembered here, and every call has its result."""
        calls = set[str]()
        for i, item in enumerate(items):
            kind, where = item.get("type", "message"), f"input[{i}]"
            if kind == "compaction_trigger" and i < len(items) - 1:
                return "The 'compaction_trigger' item must be the final input item.", "invalid_value", where
            if kind == "function_call_output" and "name" in item:
                return f"Unknown parameter: '{where}.name'.", "unknown_parameter", f"{where}.name"
            content = item.get("content")
            for part in dicts(content):
                if part.get("type") not in _CODEX_PARTS:
                    text = f"Invalid value: '{part.get('type')}'."
                    return text, "invalid_value", f"{where}.content[0].type"
            if kind == "item_reference" or (
                kind in ("message", "reasoning", "function_call") and "id" in item
            ):
                text = f"Item with id '{item.get('id')}' not found. Items are not persisted when `store` is set to false."
                return text, "", "input"
            if "status" in item and kind != "tool_search_output":
                return f"Unknown parameter: '{where}.status'.", "unknown_parameter", f"{where}.status"
            if item.get("role") == "system":
                return "System messages are not allowed", "", where
            sealed = item.get("encrypted_content")
            if kind in ("reasoning", "compaction") and not str(sealed).endswith(f".{owner}"):
                text = "The encrypted content for item could not be verified."
                return text, "invalid_encrypted_content", where
            if kind.endswith("_call_output") and item.get("call_id") not in calls:
                return f"No tool call found for {kind} with call_id {item.get('call_id')}.", "", "input"
            if kind.endswith("_call_output"):
                calls.discard(str(item["call_id"]))
            elif kind.endswith("_call") and "call_id" in item:
                calls.add(str(item["call_id"]))
        if calls:
            return f"No tool output found for function call {min(calls)}.", "", "input"
        return None

    def codex_turn(self, request: Request, body: Mapping[str, Any]) -> Iterator[bytes]:
        """The events of an answer."""
        return self.codex_events(body, self.codex_items(request, body))

    def codex_items(self, request: Request, body: Mapping[str, Any]) -> list[dict[str, Any]]:
        """What a model would answer: a drawing, a call, JSON, or a few words, as the request wants it."""
        texts = [
            (one.get("role", ""), "\n".join(_texts_in(one.get("content"))))
            for one in body["input"]
            if one.get("type", "message") == "message"
        ]
        asked = next((text for role, text in reversed(texts) if role == "user"), "go on")
        if body["input"] and body["input"][-1].get("type") == "compaction_trigger":
            return [self._compaction(request)]
        items: list[dict[str, Any]] = []
        if (body.get("reasoning") or {}).get("summary"):
            summary = [{"type": "summary_text", "text": "**Thinking** about the question."}]
            sealed = {"encrypted_content": self._sealed(request)} if body.get("include") else {}
            items.append({"type": "reasoning", "summary": summary} | sealed)
        tools = {tool.get("name") or tool["type"]: tool for tool in body.get("tools") or []}
        choice = body.get("tool_choice", "auto")
        must = "required" if choice == "required" else ""
        if isinstance(choice, dict):
            must = str(choice.get("name") or choice.get("type"))
        if "image_generation" in tools and (must == "image_generation" or re.match(r"(?i)draw\b", asked)):
            drawn = base64.b64encode(demo_image().read()).decode()
            facts = {"result": drawn, "output_format": "png", "revised_prompt": asked[:200]}
            return [*items, {"type": "image_generation_call"} | facts]
        ended = [i for i, one in enumerate(body["input"]) if one.get("role") == "user"]
        since = body["input"][ended[-1] if ended else 0 :]
        made = {one["name"] for one in since if "name" in one}
        callable_ = [name for name, tool in tools.items() if tool["type"] in ("function", "custom")]
        over = since and str(since[-1].get("type")).endswith("_call_output")
        if choice != "none" and (name := self.choice(callable_, made, asked, must, bool(over))):
            return [*items, self._codex_call(tools[name], f"call_{secrets.token_hex(12)}")]
        form = (body.get("text") or {}).get("format") or {}
        answer = DEMO_CODEX_ANSWER.format(question=asked[:2000])
        if form.get("type", "text") != "text":
            answer = compact(sample(form["schema"]) if "schema" in form else {"demo": True})
        content = [{"type": "output_text", "text": answer, "annotations": [], "logprobs": []}]
        return [*items, {"type": "message", "role": "assistant", "content": content}]

    @staticmethod
    def _codex_call(tool: Mapping[str, Any], id: str) -> dict[str, Any]:
        if tool["type"] == "custom":
            return {"type": "custom_tool_call", "call_id": id, "name": tool["name"], "input": "demo"}
        arguments = compact(sample(tool.get("parameters")))
        return {"type": "function_call", "call_id": id, "name": tool["name"], "arguments": arguments}

    def codex_events(self, body: Mapping[str, Any], items: list[dict[str, Any]]) -> Iterator[bytes]:
        """The items of an answer as they come about, word by word. The response at the end repeats none of them."""
        numbers = itertools.count()

        def told(kind: str, **facts: Any) -> bytes:
            event = {"type": kind, "sequence_number": next(numbers)} | facts
            return f"event: {kind}\n".encode() + data_event(event)

        response = {
            "id": f"resp_{secrets.token_hex(25)}",
            "object": "response",
            "created_at": int(time.time()),
        }
        response |= {
            "status": "in_progress",
            "model": body["model"],
            "output": [],
            "error": None,
            "usage": None,
        }
        response |= {
            name: body.get(name) for name in ("instructions", "tools", "prompt_cache_key", "reasoning")
        }
        response |= {"store": False, "safety_identifier": "user-demo"}
        for kind in ("created", "in_progress"):
            yield told(f"response.{kind}", response=response)
        if code := self._simulated(body):
            error = {"code": code, "message": "It was asked for. Please try again in 20s."}
            yield told("response.failed", response=response | {"status": "failed", "error": error})
            return
        written = 0
        for index, item in enumerate(items):
            prefix, grows = _CODEX_GROWTH.get(item["type"], ("it", None))
            item = {"id": f"{prefix}_{secrets.token_hex(25)}"} | item
            item |= {} if item["type"] == "compaction" else {"status": "completed"}
            begun = item | ({"status": "in_progress"} if "status" in item else {})
            begun |= {name: [] for name in ("content", "summary") if name in item}
            begun |= {name: "" for name in ("arguments", "input") if name in item}
            begun |= {"result": None} if "result" in item else {}
            yield told("response.output_item.added", output_index=index, item=begun)
            for kind, facts in grows(item) if grows else ():
                place = {"item_id": item["id"], "output_index": index}
                yield told(kind, **place, **facts)
                written += kind.endswith(".delta")
                time.sleep(self.pace * kind.endswith(".delta"))
            yield told("response.output_item.done", output_index=index, item=item)
        usage = self._codex_usage(body, written, sum(item["type"] == "reasoning" for item in items))
        yield told("response.completed", response=response | {"status": "completed", "usage": usage})

    def _codex_usage(self, body: Mapping[str, Any], written: int, thoughts: int) -> dict[str, Any]:
        """Tokens, roughly; what a conversation's last request had is cached for its next one."""
        read = len(compact(body["input"])) // 4 + len(str(body.get("instructions") or "")) // 4
        key = str(body.get("prompt_cache_key"))
        cached = min(self._codex_cache.get(key, 0), read) // 128 * 128
        self._codex_cache[key] = read
        if len(self._codex_cache) > self.MAX_TALKS:
            self._codex_cache.pop(next(iter(self._codex_cache)))
        details = {"cached_tokens": cached, "cache_write_tokens": 0}
        facts = {"input_tokens": read, "input_tokens_details": details}
        facts |= {"output_tokens": written + 8 * thoughts, "total_tokens": read + written + 8 * thoughts}
        return facts | {"output_tokens_details": {"reasoning_tokens": 8 * thoughts}}

    # -- files and voice -----------------------------------------------------------------------------------------------

    @staticmethod
    def _owner(request: Request) -> str:
        key = Keys.given(request)
        said = claims(key).get("https://api.openai.com/auth") if key else None
        return str((said or {}).get("user_id"))

    def keep(self, file: DemoFile) -> str:
        """The id of a new file."""
        id = f"file-{secrets.token_hex(11)}"
        self.files[id] = file
        if len(self.files) > self.MAX_FILES:
            self.files.pop(next(iter(self.files)))
        return id

    def _held(self, request: Request, id: Any) -> DemoFile | None:
        """A file whose bytes have come, if it is the caller's."""
        file = self.files.get(str(id))
        return file if file and file.blob is not None and file.owner == self._owner(request) else None

    @router.on("GET", "/{api}/me")
    def me(self, request: Request) -> Reply:
        """Whose account it is."""
        return json_reply({"object": "user", "id": self._owner(request), "email": None})

    @router.on("GET", "/{api}/models")
    def list_models(self, request: Request) -> Reply:
        """The account's models."""
        models = [{"slug": slug, "title": slug, "max_tokens": 8191} for slug in self.models]
        return json_reply({"models": models})

    @router.on("POST", "/{api}/files")
    def create_file(self, request: Request) -> Reply:
        """Announces a file: where to upload it."""
        body = request.json()
        fits = isinstance(body.get("file_name"), str) and isinstance(body.get("file_size"), int)
        if not fits or body.get("use_case") not in ("multimodal", "my_files", "ace_upload"):
            return _detail(422, [{"loc": ["body"], "msg": "field required"}])
        file = DemoFile(self._owner(request), body["file_name"], None, body["use_case"], body["file_size"])
        id = self.keep(file)
        url = f"{self.url}/upload/{id}?sig=demo"
        return json_reply({"status": "success", "file_id": id, "upload_url": url})

    @router.on("PUT", "/upload/{id}")
    def upload_file(self, request: Request) -> Reply:
        """The file store: takes the bytes, from whom it neither knows nor wants to know."""
        file = self.files.get(request.params["id"])
        headers = request.headers
        if file is None or "authorization" in headers or headers.get("x-ms-blob-type") != "BlockBlob":
            return Reply(400, b"<?xml version='1.0'?><Error/>", "application/xml")
        if headers.get("x-ms-version") != "2020-04-08" or request.body.size != file.size:
            return Reply(400, b"<?xml version='1.0'?><Error/>", "application/xml")
        file.blob = request.body
        file.mime = headers.get("content-type", "")
        return Reply(201)

    @router.on("GET", "/{api}/files/{id}")
    def file_status(self, request: Request) -> Reply:
        """Whether a document has been read; the first question comes too early."""
        if (file := self._held(request, request.params["id"])) is None:
            return _detail(404, "File not found")
        status = "success" if file.asked else "in_progress"
        file.asked = True
        return json_reply({"id": request.params["id"], "name": file.name, "retrieval_index_status": status})

    @router.on(
        "GET",
        "/{api}/files/{id}/download",
        "/{api}/files/download/{id}",
        "/{api}/conversation/{conversation}/attachment/{id}/download",
    )
    @router.on("POST", "/{api}/files/{id}/uploaded")
    def file_download(self, request: Request) -> Reply:
        """A file's short-lived URL, once its bytes are there."""
        if self._held(request, id := request.params["id"]) is None:
            return _detail(404, "File not found")
        return json_reply({"status": "success", "download_url": self._place(id)})

    def _place(self, id: str) -> str:
        """Where a file's bytes are for a while."""
        own = f"{self.url}/backend-api/estuary/content?id={id}&sig=demo"
        return own if self.estuary else f"{self.url}/blob/{id}?sig=demo"

    @router.on("GET", "/{api}/estuary/content")
    def estuary_content(self, request: Request) -> Reply | Stream | Upgrade:
        """A file's bytes, for its account alone."""
        file = self._held(request, request.query.get("id"))
        return self._bytes(file)

    @router.on("GET", "/{api}/conversation/{conversation}/interpreter/download")
    def sandbox_download(self, request: Request) -> Reply:
        """The URL of a file that the model made."""
        path = request.query.get("sandbox_path", "")
        if request.params["conversation"] not in self.conversations or not path.startswith("/mnt/data/"):
            return _detail(404, "File not found")
        data = Blob(f"made by {request.query.get('message_id')}".encode())
        id = self.keep(DemoFile(self._owner(request), path.rpartition("/")[2], data, "ace_upload"))
        return json_reply({"status": "success", "download_url": self._place(id)})

    @router.on("GET", "/blob/{id}")
    def blob(self, request: Request) -> Reply | Stream | Upgrade:
        """A file's bytes, for whoever has the URL."""
        return self._bytes(self.files.get(request.params["id"]))

    def _bytes(self, file: DemoFile | None) -> Reply | Stream | Upgrade:
        if file is None or file.blob is None:
            return Reply(404)
        kind = file.mime or "application/octet-stream"
        return streamed(self.frames(file.blob.pieces()), content_type=kind, signs=False)

    @router.on("GET", "/{api}/synthesize")
    def synthesize(self, request: Request) -> Reply:
        """A message read aloud: silence, in the two formats that need no encoder."""
        form = request.query.get("format")
        query = request.query
        known = query.get("conversation_id") in self.conversations
        if not known or not query.get("message_id") or not query.get("voice"):
            return _detail(404, "Message not found")
        if form == "mp3":
            return Reply(body=(b"\xff\xfb\x90\x00" + bytes(413)) * 20, content_type="audio/mpeg")
        if form != "wav":
            return _detail(422, "Unsupported format")
        facts = (b"WAVE", b"fmt ", 16, 1, 1, 8000, 8000, 1, 8, b"data", 8000)
        head = struct.pack("<4sI4s4sIHHIIHH4sI", b"RIFF", 8036, *facts)
        return Reply(body=head + b"\x80" * 8000, content_type="audio/wav")

    @router.on("POST", "/{api}/transcribe")
    def transcribe(self, request: Request) -> Reply:
        """What is said in a recording: its name and size are all that is heard."""
        file = parse_form(request.headers, request.body).get("file")
        if not file or file[0].file_name is None:
            return _detail(422, [{"loc": ["body", "file"], "msg": "field required"}])
        text = f"The demo upstream heard {file[0].blob.size} bytes of {file[0].file_name}."
        return json_reply({"text": text})

    # -- conversations -------------------------------------------------------------------------------------------------

    def _own(self, request: Request, id: Any) -> DemoConversation:
        """A conversation of the caller's, or a 404."""
        talk = self.conversations.get(str(id))
        if talk is None or talk.owner != self._owner(request):
            raise ApiError("not_found", "Can't load conversation")
        return talk

    @router.on("GET", "/{api}/conversations")
    def list_conversations(self, request: Request) -> Reply:
        """The caller's conversations, the one changed last first."""
        offset, limit = (
            int(request.query.get(name, most)) for name, most in (("offset", "0"), ("limit", "28"))
        )
        if not 0 < limit <= 100:
            return _detail(422, [{"loc": ["query", "limit"], "msg": "ensure this value is less than 101"}])
        owner = self._owner(request)
        own = [(id, talk) for id, talk in self.conversations.items() if talk.owner == owner and talk.kept]
        own.sort(key=lambda one: one[1].updated, reverse=True)
        items = [talk.facts(id) for id, talk in own[offset : offset + limit]]
        return json_reply({"items": items, "total": len(own), "limit": limit, "offset": offset})

    @router.on("PATCH", "/{api}/conversations")
    def clear_conversations(self, request: Request) -> Reply:
        """Deletes all of them."""
        if request.json().get("is_visible") is not False:
            return _detail(422, [{"loc": ["body", "is_visible"], "msg": "field required"}])
        owner = self._owner(request)
        self.conversations = {id: talk for id, talk in self.conversations.items() if talk.owner != owner}
        return json_reply({"success": True, "message": None})

    @router.on("GET", "/{api}/conversation/{id}", "/{api}/conversations/{id}")
    def one_conversation(self, request: Request) -> Reply:
        """A conversation with its messages."""
        id = request.params["id"]
        talk = self._own(request, id)
        if not talk.kept:
            return _detail(404, {"code": "conversation_not_found", "message": "Can't load conversation"})
        return json_reply(talk.facts(id) | {"conversation_id": id} | talk.mapping())

    @router.on("GET", "/{api}/conversation/{id}/stream_status")
    def stream_status(self, request: Request) -> Reply:
        """Whether an answer is under way in it: never longer than the call that asked for it."""
        self._own(request, request.params["id"])
        return json_reply({"status": "NOT_STREAMING"})

    @router.on("POST", "/{api}/conversation/init")
    def init_conversation(self, request: Request) -> Reply:
        """What a new conversation would find: how many images are left for today."""
        end = datetime.datetime.now(datetime.timezone.utc) + datetime.timedelta(days=1)
        limit = {"feature_name": "image_gen", "remaining": self.images_left, "reset_after": end.isoformat()}
        return json_reply({"type": "conversation_detail_metadata", "limits_progress": [limit]})

    @router.on("PATCH", "/{api}/conversation/{id}")
    def change_conversation(self, request: Request) -> Reply:
        """Gives it a title, or deletes it."""
        talk = self._own(request, request.params["id"])
        body = request.json()
        if body.get("is_visible") is False:
            del self.conversations[request.params["id"]]
        talk.title = str(body.get("title") or talk.title)
        talk.updated = time.time()
        return json_reply({"success": True})

    @router.on("POST", "/{api}/conversation/gen_title/{id}")
    def make_title(self, request: Request) -> Reply:
        """Makes a title."""
        talk = self._own(request, request.params["id"])
        if not request.json().get("message_id"):
            return _detail(422, [{"loc": ["body", "message_id"], "msg": "field required"}])
        talk.title = "A demo chat"
        return json_reply({"title": talk.title})

    @router.on("POST", "/{api}/conversation/message_feedback")
    def take_feedback(self, request: Request) -> Reply:
        """Takes a rating."""
        body = request.json()
        self._own(request, body.get("conversation_id"))
        if body.get("rating") not in ("thumbsUp", "thumbsDown") or not body.get("message_id"):
            return _detail(
                422, [{"loc": ["body", "rating"], "msg": "value is not a valid enumeration member"}]
            )
        return json_reply({"message_id": body["message_id"], "rating": body["rating"]})

    @router.on("POST", "/v1/chat/completions")
    def openai_completion(self, request: Request) -> Reply | Stream | Upgrade:
        """api.openai.com in a nutshell, for `sk-` keys."""
        turn = parse_chat(request.json(), True)
        completion = CompletionStream(turn, Tokens(), False)
        words = re.findall(r"\s*\S+", "This is the demo's stand-in for api.openai.com.")
        events: list[list[Event]] = [[Begin(turn.question.model, "", "")]]
        events += [[Text(word)] for word in words]
        events.append([Finish("stop")])
        if turn.stream:
            return streamed(completion.feed(batch) for batch in events)
        for batch in events:
            completion.take(batch)
        return json_reply(completion.whole())


def _detail(status: int, detail: Any) -> Reply:
    """A refusal in the site's shape."""
    return json_reply({"detail": detail}, status)


def _codex_error(status: int, message: str, code: str = "", param: str = "") -> Reply:
    """A refusal in the shape of OpenAI's API."""
    facts = {"type": "invalid_request_error", "code": code or None, "param": param or None}
    return json_reply({"error": {"message": message} | facts}, status)


def _texts_in(content: Any) -> list[str]:
    if isinstance(content, str):
        return [content]
    return [str(part["text"]) for part in dicts(content) if "text" in part]


def demo_catalog() -> list[dict[str, Any]]:
    """The models of the demo's Codex backend."""
    found = []
    efforts = ["low", "medium", "high", "xhigh"]
    for priority, (slug, levels, inputs, shown) in enumerate((
        ("gpt-5.6-sol", [*efforts, "max", "ultra"], ["text", "image"], "list"),
        ("gpt-5.5", efforts, ["text", "image"], "list"),
        ("gpt-5.4-mini", efforts, ["text", "image"], "list"),
        ("gpt-5.3-codex-spark", efforts, ["text"], "list"),
        ("codex-auto-review", efforts, ["text"], "hide"),
    )):  # fmt: skip
        facts = {
            "slug": slug,
            "display_name": slug.upper(),
            "description": "A model of the demo.",
            "priority": priority,
        }
        told = [{"effort": level, "description": level} for level in levels]
        facts |= {
            "supported_reasoning_levels": told,
            "default_reasoning_level": "medium",
            "visibility": shown,
        }
        facts |= {"context_window": 272_000, "input_modalities": inputs, "support_verbosity": True}
        found.append(facts | {"supports_parallel_tool_calls": True, "base_instructions": "You are a demo."})
    return found


def _grown_text(item: Mapping[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """The events of a message's text."""
    place: dict[str, Any] = {"content_index": 0}
    part = item["content"][0]
    yield "response.content_part.added", place | {"part": part | {"text": ""}}
    for word in re.findall(r"\s*\S+|\s+", part["text"]):
        yield "response.output_text.delta", place | {"delta": word, "logprobs": [], "obfuscation": "demo"}
    yield "response.output_text.done", place | {"text": part["text"], "logprobs": []}
    yield "response.content_part.done", place | {"part": part}


def _grown_summary(item: Mapping[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """The events of the summary of what a model thought."""
    for index, part in enumerate(item["summary"]):
        place: dict[str, Any] = {"summary_index": index}
        yield "response.reasoning_summary_part.added", place | {"part": part | {"text": ""}}
        for word in re.findall(r"\s*\S+", part["text"]):
            yield "response.reasoning_summary_text.delta", place | {"delta": word}
        yield "response.reasoning_summary_text.done", place | {"text": part["text"]}
        yield "response.reasoning_summary_part.done", place | {"part": part}


def _grown_call(
    event: str, field_name: str
) -> Callable[[Mapping[str, Any]], Iterator[tuple[str, dict[str, Any]]]]:
    """The events of what a function is called with."""

    def grown(item: Mapping[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
        text = item[field_name]
        for at in range(0, len(text), 7):
            yield f"response.{event}.delta", {"delta": text[at : at + 7]}
        yield f"response.{event}.done", {field_name: text}

    return grown


# The prefixes of the ids of items, and the events between their begin and their end.
_CODEX_GROWTH: Mapping[
    str, tuple[str, Callable[[Mapping[str, Any]], Iterator[tuple[str, dict[str, Any]]]] | None]
] = {
    "message": ("msg", _grown_text),
    "reasoning": ("rs", _grown_summary),
    "function_call": ("fc", _grown_call("function_call_arguments", "arguments")),
    "custom_tool_call": ("ctc", _grown_call("custom_tool_call_input", "input")),
    "image_generation_call": ("ig", None),
    "compaction": ("cmp", None),
}
_CODEX_PARAMETERS = (
    "model", "input", "instructions", "stream", "store", "tools", "tool_choice", "parallel_tool_calls", "reasoning",
    "include", "prompt_cache_key", "text", "service_tier", "client_metadata",
)  # fmt: skip
_CODEX_TOOLS = (
    "function", "custom", "namespace", "web_search", "image_generation", "local_shell", "shell", "apply_patch", "tool_search",
)  # fmt: skip
_CODEX_PARTS = (
    "input_text", "input_image", "input_file", "output_text", "refusal", "reasoning_text", "summary_text",
)  # fmt: skip
# What it can be asked to fail with ("simulate …"), and whether the refusal is the answer's status or an event in it.
_CODEX_FAILURES = {
    "usage_limit_reached": 429, "usage_not_included": 429, "server_is_overloaded": 0, "rate_limit_exceeded": 0,
    "context_length_exceeded": 0, "token_invalidated": 401,
}  # fmt: skip


# ============================================================================================================
# cli: commands and the life of the process
# ============================================================================================================

LAST_PATIENCE = 5.0  # seconds that a server that ends goes on deleting conversations


def fail(message: str) -> NoReturn:
    """Ends a command that was asked for something impossible: one line, exit status 2."""
    click.echo(f"chatproxy: {message}", err=True)
    raise SystemExit(2)


def setting_flags(*names: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Gives a command a flag for each of the named settings (all when none is), collected as `flags`."""

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        rows = [row for row in fields(Settings) if not names or row.name in names]

        @functools.wraps(command)
        def collected(**values: Any) -> None:
            command(flags={row.name: values.pop(row.name) for row in rows}, **values)

        for row in reversed(rows):
            meta = row.metadata
            boolean = meta["kind"] in (BOOLEAN, OFF)
            default = f"={meta['default']}" if meta["default"] else ""
            shown = f"{meta['meaning']} [{row.name.upper()}{default}]"
            collected = click.option(
                f"--{row.name.replace('_', '-')}",
                row.name,
                metavar="true|false" if boolean else "TEXT",
                help=shown,
                hidden=meta["hidden"],
                is_flag=False,
                flag_value="true" if boolean else None,
            )(collected)
        return collected

    return decorate


def settled(flags: Mapping[str, str | None]) -> Settings:
    """The settings; a command with unusable ones ends here."""
    try:
        return resolve(gather(flags, os.environ))
    except SettingError as error:
        fail(str(error))


def opened(settings: Settings) -> Store:
    """The store; a command that cannot have it ends here."""
    try:
        return Store(settings.data_dir)
    except StoreError as error:
        fail(str(error))


def opened_to_read(settings: Settings) -> Store | None:
    """The store if there is one: who only looks makes none."""
    return opened(settings) if (pathlib.Path(settings.data_dir) / STORE_FILE).exists() else None


def echo_header(text: str, as_json: bool) -> None:
    """A header above a table, for people alone."""
    if sys.stdout.isatty() and not as_json:
        click.echo(text)


def pasted_lines() -> list[str]:
    """The lines of standard input. At a terminal they are asked for, not shown, and may be of any length: a terminal left
    to itself cuts lines at 4,095 characters."""
    if not sys.stdin.isatty():
        return sys.stdin.read().splitlines()
    click.echo("Paste tokens, one a line (they are not shown), then press Ctrl-D:", err=True)
    terminal = sys.stdin.fileno()
    before = termios.tcgetattr(terminal)
    raw = termios.tcgetattr(terminal)
    raw[3] &= ~(termios.ICANON | termios.ECHO)
    termios.tcsetattr(terminal, termios.TCSADRAIN, raw)
    try:
        return _pasted(terminal)
    finally:
        termios.tcsetattr(terminal, termios.TCSADRAIN, before)


def _pasted(terminal: int) -> list[str]:
    """Reads up to Ctrl-D, and says how much has come."""
    data = bytearray()
    while more := os.read(terminal, 65536):
        end = more.find(b"\x04")
        for byte in more if end < 0 else more[:end]:
            if byte not in (0x7F, 0x08):
                data.append(byte)
            elif data and data[-1] != 0x0A:
                data.pop()
        click.echo(f"\r{len(data)} characters, {data.count(10)} lines", err=True, nl=end >= 0)
        if end >= 0:
            break
    return data.decode("utf-8", "replace").splitlines()


class Commands(click.Group):
    """The commands; one whose store cannot be used ends in one line."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except StoreUnavailable as error:
            fail(f"DATA_DIR: the store cannot be used: {error.cause}; {store_advice(error.cause)}")


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, message="%(version)s")
def cli() -> None:
    """ChatGPT web accounts as an OpenAI-compatible API on your own server.

    \b
    chatproxy.py serve --demo      try it: no account, no network
    chatproxy.py accounts add -    paste tokens, one a line
    chatproxy.py serve             listen on http://127.0.0.1:5005/v1
    """


DEMO_HELP = "Answer from an embedded stand-in, with a pool of its own; API key `demo` or none."
OPEN_HELP = "Listen beyond this machine although neither a key nor a prefix is set."


@cli.command()
@click.option("--demo", is_flag=True, help=DEMO_HELP)
@click.option("--open", "anyone", is_flag=True, help=OPEN_HELP)
@setting_flags()
def serve(flags: Mapping[str, str | None], demo: bool, anyone: bool) -> None:
    """Run the server."""
    settings = settled(flags)
    if (
        not anyone
        and not settings.authorization
        and not settings.api_prefix
        and not is_loopback(settings.host)
    ):
        advice = "set AUTHORIZATION or API_PREFIX, or pass --open"
        fail(f"HOST: {settings.host!r} cannot be used without a key; {advice}")
    give_back_memory()
    start_logging(settings)
    os.umask(0o077)
    cpu = keep_to_one_cpu()
    solver = Solver(cpu)  # before the first thread
    if cpu is not None:
        os.sched_setaffinity(0, {cpu})
    with contextlib.ExitStack() as stack:
        stack.callback(solver.close)
        if demo:  # whose upstream must never get to see, or to refuse, a real account's token
            folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="chatproxy-demo-"))
            settings = replace(settings, proxy_url=(), data_dir=folder)
        code = Daemon(settings, solver, demo).run()
    if sys.stderr:  # which may be closed
        sys.stderr.flush()
    os._exit(code)  # daemon threads may be in the middle of a call


def give_back_memory() -> None:
    """Returns to the system what the C library keeps of freed memory: compiling this file takes much."""
    with contextlib.suppress(AttributeError, ImportError, OSError):
        importlib.import_module("ctypes").CDLL(None).malloc_trim(0)


def keep_to_one_cpu() -> int | None:
    """The processor for the server's threads, None when there is no choice.

    They share one interpreter lock. On several processors they fight over it: the same work then takes two to three
    times as long. The solver processes get the other processors.
    """
    if not hasattr(os, "sched_setaffinity"):
        return None
    cpus = sorted(os.sched_getaffinity(0))
    return random.choice(cpus) if len(cpus) > 1 else None


ENDING_SIGNALS = {signal.SIGTERM, signal.SIGINT}


class Daemon:
    """The running server's life: from the first bound port to the last open stream."""

    def __init__(self, settings: Settings, solver: Solver, demo: bool) -> None:
        self.settings, self.solver, self.demo = settings, solver, demo
        self.stop = threading.Event()

    def run(self) -> int:
        """Serves until a signal says otherwise; the exit status."""
        signal.pthread_sigmask(signal.SIG_BLOCK, ENDING_SIGNALS)
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        most = hard if hard != resource.RLIM_INFINITY else max(soft, 65536)
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
        threading.stack_size(1024 * 1024)
        settings = self.settings
        if self.demo:
            upstream = Demo()
            _, url = upstream.listen()
            settings = replace(settings, chatgpt_base_url=(url,), openai_auth_url=url, openai_api_url=url)
        store = opened(settings)
        keys = [DEMO_KEY] if self.demo and not settings.authorization else []
        app = App(settings, store, self.solver, keys)
        if self.demo and not app.pool.accounts():
            app.pool.add([demo_token("demo"), demo_token("demo-codex", client=BROWSER_CLIENT)])
        server = self._bind(app)
        store.tells = True
        self.solver.start()
        app.metrics.gauge("chatproxy_connections", lambda: {"": server.connections()})
        threading.Thread(target=self._hear_signals, name="signals", daemon=True).start()
        threading.Thread(target=server.serve_forever, args=(0.1,), name="accept", daemon=True).start()
        threading.Thread(target=app.upkeep, args=(self.stop,), name="upkeep", daemon=True).start()
        gc.collect()
        gc.freeze()
        log(logging.INFO, self._ready(server, app))
        self.stop.wait()
        log(logging.INFO, "stopping", open=server.connections())
        server.drain(settings.shutdown_grace)
        app.site.finish_erasures(LAST_PATIENCE)
        app.pool.keep_told()
        app.ledger.save()
        store.close()
        return 0

    def _bind(self, app: App) -> Server:
        host, port = self.settings.host, self.settings.port
        try:
            return Server((host, port), app, app.settings, app.metrics)
        except SettingError as error:
            self._fail(str(error))
        except OSError as error:
            name = "PORT" if error.errno in (errno.EADDRINUSE, errno.EACCES) else "HOST"
            self._fail(f"{name}: cannot listen on {host}:{port}: {error.strerror or error}")

    def _fail(self, message: str) -> NoReturn:
        self.solver.close()
        fail(message)

    def _ready(self, server: Server, app: App) -> str:
        """The one line of a start: where it listens, how many accounts, and what to do when there are none."""
        scheme = "https" if server.tls else "http"
        host = self.settings.host
        where = f"{scheme}://{f'[{host}]' if ':' in host else host}:{server.server_port}{server.prefix and '/***'}/v1"
        count = len(app.pool.accounts())
        line = f"listening on {where}, {count} account{'' if count == 1 else 's'}"
        if self.demo:
            key = "one of AUTHORIZATION" if self.settings.authorization else f"`{DEMO_KEY}` or none"
            line += f", answers from the embedded demo upstream, API key {key}"
        elif not count:
            line += "; add one with `chatproxy.py accounts add -` (this server notices it by itself)"
        return line

    def _hear_signals(self) -> None:
        """The first SIGTERM or SIGINT begins the end, the second is the end. All threads block them: a handler would
        run in the main thread alone, and only once that wakes up."""
        signal.sigwait(ENDING_SIGNALS)
        self.stop.set()
        signal.sigwait(ENDING_SIGNALS)
        os._exit(1)


@cli.command()
@setting_flags()
def config(flags: Mapping[str, str | None]) -> None:
    """Print the effective settings and where each came from, secrets masked."""
    settings = settled(flags)
    origins = gather(flags, os.environ)
    width = max(len(row.name) for row in fields(Settings))
    for row in fields(Settings):
        if row.metadata["hidden"] and origins[row.name].source == "default":
            continue
        value = getattr(settings, row.name)
        values = value if isinstance(value, tuple) else () if value is None else (value,)
        texts = [str(one).lower() if isinstance(one, bool) else str(one) for one in values]
        shown = ",".join(masked(text) if row.metadata["secret"] else text for text in texts)
        click.echo(f"{row.name.upper():{width}}  {shown or '-'}  ({origins[row.name].source})")


AS_JSON = click.option("--json", "as_json", is_flag=True, help="One JSON object a line, for scripts.")


@cli.group()
def accounts() -> None:
    """The pool: add, import, list, check and remove accounts. A running server takes changes in by itself."""


def _store_accounts(settings: Settings, lines: list[str], as_json: bool) -> None:
    """Adds the tokens and tells of each account what is stored, then how many there are."""
    store = opened(settings)
    added = Pool(settings, store).add(lines)
    for row in added.rows:
        facts = {"id": row.id, "kind": row.kind, "email": row.email, "plan": row.plan}
        line = f"{row.id}  {row.kind:10}  {row.email or '-'}  {row.plan or '-'}"
        click.echo(compact(facts) if as_json else line)
    for fault in added.faults:
        click.echo(f"chatproxy: {fault}", err=True)
    told = f"stored: {len(added.rows)} (known before: {added.known}), merged: {added.merged}"
    told += f", left out: {len(added.faults)}"
    if added.faults or not added.rows:
        fail(told)
    click.echo(told, err=as_json)


@accounts.command("add")
@click.argument("tokens", nargs=-1, metavar="TOKEN…|-")
@click.option(
    "--password", is_flag=True, help="Ask for user name and password instead, and sign in with them."
)
@AS_JSON
@setting_flags("data_dir", "impersonate", "proxy_url", "openai_auth_url")
def accounts_add(
    flags: Mapping[str, str | None], tokens: tuple[str, ...], password: bool, as_json: bool
) -> None:
    """Add accounts by access, refresh or session TOKEN; `-` reads them from standard input, one a line.

    A workspace id may follow a token after a comma. `login-free` adds an account without a token.
    """
    settings = settled(flags)
    if password == bool(tokens):
        raise click.UsageError("Give tokens, `-`, or --password.")
    if password:
        _store_signed_in(Pool(settings, opened(settings)), *_by_password(settings), as_json)
        return
    lines: list[str] = []
    for token in tokens:
        lines += pasted_lines() if token == "-" else [token]
    _store_accounts(settings, lines, as_json)


# Names under which other programs keep a token; a refresh token is worth more than the access token beside it.
_TOKEN_NAMES = ("refresh_token", "refreshToken", "sessionToken", "token", "access_token", "accessToken")


def tokens_in(value: Any) -> Iterator[str]:
    """The tokens in a JSON file of another program: ChatGPT-to-API's access_tokens.json, chat2api's refresh_map.json,
    Codex's auth.json, or what the site's session page shows."""
    if isinstance(value, str):
        with contextlib.suppress(ValueError):
            recognise(value)
            yield value
    elif isinstance(value, list):
        for one in value:
            yield from tokens_in(one)
    elif isinstance(value, dict):
        if "token" in value and "device" in value:  # what was exported
            yield compact(value)
            return
        if token := next(
            (value[name] for name in _TOKEN_NAMES if isinstance(value.get(name), str) and value[name]), ""
        ):
            workspace = value.get("account_id")
            if token == value.get("refresh_token") and isinstance(value.get("access_token"), str):
                told = {"token": token, "account_id": workspace, "access_token": value["access_token"]}
                told = {name: one for name, one in told.items() if isinstance(one, str)}
                yield compact(told | ({"codex": True} if "id_token" in value else {}))
                return
            yield from tokens_in(
                f"{token},{workspace}" if isinstance(workspace, str) and workspace else token
            )
            return
        for name, one in value.items():
            known = list(tokens_in(name))  # refresh tokens are the names of chat2api's map
            yield from known or tokens_in(one)


def token_lines(path: pathlib.Path) -> list[str]:
    """The tokens in a file of lines or JSON, or in chat2api's data folder but for those it has given up; OSError."""
    if path.is_dir():
        names = ("token.txt", "refresh_map.json", "seed_map.json")
        inside = [path / name for name in names if (path / name).exists()]
        given_up = path / "error_token.txt"
        dead = set(given_up.read_text(errors="replace").split("\n")) if given_up.exists() else set()
        if not inside:
            raise FileNotFoundError(f"{path}: none of {', '.join(names)} in it")
        return [line for one in inside for line in token_lines(one) if line.strip() and line not in dead]
    text = path.read_text(encoding="utf-8-sig", errors="replace")
    try:
        return list(tokens_in(read_json(text)))
    except ValueError:
        return text.splitlines()


@accounts.command("import")
@click.argument("files", nargs=-1, required=True, metavar="FILE…")
@AS_JSON
@setting_flags("data_dir", "impersonate", "proxy_url")
def accounts_import(flags: Mapping[str, str | None], files: tuple[str, ...], as_json: bool) -> None:
    """Add accounts from FILEs: tokens one a line, what `accounts export` wrote, chat2api's data folder, ChatGPT-to-API's
    access_tokens.json, Codex's auth.json; `-` is standard input. Tokens of one account become one.
    """
    settings = settled(flags)
    lines = list[str]()
    for file in files:
        try:
            lines += token_lines(pathlib.Path("/dev/stdin" if file == "-" else file))
        except OSError as error:
            fail(f"{file}: {error.strerror or error}")
    _store_accounts(settings, lines, as_json)


@accounts.command("export")
@click.argument("file", default="", metavar="[FILE]")
@AS_JSON
@setting_flags("data_dir")
def accounts_export(flags: Mapping[str, str | None], file: str, as_json: bool) -> None:
    """Write all accounts with their tokens into a new FILE that only you may read, for `accounts import`.

    The tokens stay valid here too. Of refresh tokens that rotate only one copy can live: stop the server here before you
    use the file elsewhere.
    """
    settings = settled(flags)
    rows = opened(settings).accounts("guest=0")
    if not rows:
        fail(f"no accounts in {settings.data_dir}")
    if file == "-":
        fail("tokens are never printed; give a file to write them to")
    path = file or time.strftime("chatproxy-accounts-%Y%m%d-%H%M%S.jsonl")
    try:
        descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600)
    except OSError as error:
        fail(f"{path}: {error.strerror or error}")
    with open(descriptor, "w", encoding="utf-8") as lines:
        for row in rows:
            kept: dict[str, Any] = {
                "token": row.secret or LOGIN_FREE,
                "account_id": row.workspace,
                "email": row.email,
            }
            kept |= {"device": row.device, "browser": row.browser, "cookies": json.loads(row.cookies)}
            kept |= {"disabled": True} if row.state == DISABLED else {}
            kept |= {"codex": True} if row.codex == "yes" else {}
            lines.write(compact(kept) + "\n")
    told = f"{len(rows)} accounts written to {path}; whoever has this file has the accounts"
    click.echo(compact({"file": path, "accounts": len(rows)}) if as_json else told)


@accounts.command("list")
@AS_JSON
@setting_flags("data_dir")
def accounts_list(flags: Mapping[str, str | None], as_json: bool) -> None:
    """List the accounts: id, kind, e-mail, plan, the upstreams that take it, when the access token expires and the account
    was last used (UTC), answers and failures of today, state, and how much of its Codex allowance is used."""
    settings = settled(flags)
    store = opened_to_read(settings)
    found = Pool(settings, store).accounts() if store else []
    if store is None or not found:
        click.echo(f"no accounts in {settings.data_dir}", err=True)
        return
    now = time.time()
    ledger = Ledger(store)
    names = ("upstreams", "expires (UTC)", "used (UTC)", "answers", "failed", "state")
    echo_header(
        "{:14}  {:10}  {:30}  {:6}  {:11}  {:16}  {:16}  {:7} {:6}  {}".format(
            "id", "kind", "e-mail", "plan", *names
        ),
        as_json,
    )
    for account in found:
        row = account.row
        facts = account_facts(account, ledger, now)
        times = "  ".join(f"{(facts[name] or '-')[:16]:16}" for name in ("expires", "used"))
        who = f"{row.id}  {row.kind:10}  {row.email or '-':30}  {row.plan or '-':6}  {facts['upstreams']:11}"
        used = f"; {facts['codex']['told']}" if facts["codex"] else ""
        line = f"{who}  {times}  {facts['answers']:7} {facts['failures']:6}  {facts['told']}{used}"
        click.echo(compact(facts) if as_json else line)


@accounts.command("check")
@click.argument("ids", nargs=-1, metavar="[ID…]")
@AS_JSON
@setting_flags("data_dir", "impersonate", "proxy_url", "chatgpt_base_url", "openai_auth_url", "auth_key")
def accounts_check(flags: Mapping[str, str | None], ids: tuple[str, ...], as_json: bool) -> None:
    """Ask the upstream whether accounts work (all, or those named by ID), by the calls that a chat begins with.

    What it says is kept, and a running server takes it in. Exit status 1 when one does not work.
    """
    settings = settled(flags)
    store = opened(settings)
    if missing := set(ids) - {row.id for row in store.accounts()}:
        fail(f"no such account: {', '.join(sorted(missing))}")
    app = App(settings, store, solver := Solver())
    chosen = [account for account in app.pool.accounts() if not ids or account.id in ids]
    ask = functools.partial(checked, app, watch=Watch())
    with ThreadPoolExecutor(CHECKED_AT_ONCE) as executor:
        asked = executor.map(ask, chosen)
        with click.progressbar(asked, len(chosen), "checking", file=sys.stderr) as done:
            results = dict(done)
    solver.close()
    for account in chosen:
        row = account.row
        result = results[account.id]
        told: dict[str, Any] = {"id": row.id, "kind": row.kind, "email": row.email}
        told |= {"works": None if result is None else not result, "reason": result or ""}
        persona, wants = account.demands
        told |= {"persona": persona, "wants": list(wants), "upstreams": account.paths()}
        told |= {"codex": allowance_facts(account.allowance, time.time())}
        demands = f", as {persona}" if persona else ""
        demands += f", which may have to show: {', '.join(wants)}" if wants else ""
        used = f"; {account.allowance.told(time.time())}" if account.allowance else ""
        said = "not asked" if result is None else result or f"works by {account.paths()}{demands}{used}"
        click.echo(compact(told) if as_json else f"{row.id}  {row.kind:10}  {row.email or '-':30}  {said}")
    if any(results.values()):
        raise SystemExit(1)


@accounts.command("remove")
@click.argument("ids", nargs=-1, required=True, metavar="ID…")
@AS_JSON
@setting_flags("data_dir")
def accounts_remove(flags: Mapping[str, str | None], ids: tuple[str, ...], as_json: bool) -> None:
    """Remove accounts by their ID from the list."""
    store = opened(settled(flags))
    _remove(lambda id: bool(store.remove_accounts([id])), ids, "account", as_json)


def _remove(remove: Callable[[str], bool], ids: Iterable[str], what: str, as_json: bool) -> None:
    gone = {id: remove(id) for id in ids}
    for id in filter(gone.get, gone):
        click.echo(compact({"removed": id}) if as_json else f"removed {id}")
    if missing := [id for id in gone if not gone[id]]:
        fail(f"no such {what}: {', '.join(missing)}")


@cli.command()
@click.option("--device", is_flag=True, help="Without a browser here: type a code on any device.")
@AS_JSON
@setting_flags("data_dir", "impersonate", "proxy_url", "openai_auth_url")
def login(flags: Mapping[str, str | None], device: bool, as_json: bool) -> None:
    """Sign in with your browser and store the account; a running server notices it by itself."""
    settings = settled(flags)
    pool = Pool(settings, opened(settings))
    sign_in = SignIn(settings, Loop())
    tell = functools.partial(click.echo, err=as_json)  # so that a script gets nothing but JSON
    try:
        access, refresh = _by_device(sign_in, tell) if device else _by_browser(sign_in, settings, tell)
    except ApiError as error:
        fail(error.message)
    _store_signed_in(pool, access, refresh, as_json, browser=True)


def _store_signed_in(pool: Pool, access: str, refresh: str, as_json: bool, browser: bool = False) -> None:
    try:
        row = store_tokens(pool, access, refresh, browser)
    except ValueError as error:
        fail(str(error))
    told = {"id": row.id, "kind": row.kind, "email": row.email, "plan": row.plan}
    line = f"stored {row.id}: {row.email or '-'}, {row.plan or '-'}, {row.kind}"
    click.echo(compact(told) if as_json else line)


def _by_password(settings: Settings) -> tuple[str, str]:
    """The tokens of a person who types user name, password and, where it is wanted, a one-time code."""
    username = click.prompt("User name", err=True)
    password = click.prompt("Password", hide_input=True, err=True)
    code = ""
    while True:
        try:
            return PasswordSignIn(settings, Loop(), Watch()).tokens_for(username, password, code)
        except ApiError as error:
            if error.code != "mfa_required" or code:
                fail(error.message)
            code = click.prompt("One-time code", err=True)


class Callback(Application):
    """A server for the redirect at the end of a sign-in, which brings its code."""

    def __init__(self, state: str) -> None:
        self.state = state.encode()
        self.code = Future[str]()

    def shared(self) -> bool:
        """Nobody's page may look."""
        return False

    def respond(self, request: Request) -> Reply:
        """Takes the code of the sign-in that was begun here, and of no other."""
        query, page = request.query, "text/plain; charset=utf-8"
        own = hmac.compare_digest(query.get("state", "").encode("utf-8", "replace"), self.state)
        if request.path != "/auth/callback" or not own:
            return Reply(400, b"This is not the sign-in that was begun here.\n", page)
        if not self.code.done():
            self.code.set_result(query.get("code", ""))
        return Reply(200, b"Signed in. You may close this window.\n", page)


def _by_browser(sign_in: SignIn, settings: Settings, tell: Callable[[str], None]) -> tuple[str, str]:
    """The tokens of a person who signs in with the browser of this machine."""
    callback = Callback(sign_in.state)
    try:
        server = Server(
            ("127.0.0.1", CALLBACK_PORT),
            callback,
            replace(settings, tls_cert=None, tls_key=None, api_prefix=None),
            Metrics(),
            True,
        )
    except OSError as error:
        fail(
            f"cannot listen on 127.0.0.1:{CALLBACK_PORT}: {error.strerror}; stop the program that uses it, or try `login --device`"
        )
    threading.Thread(target=server.serve_forever, args=(0.1,), daemon=True).start()
    tell(f"Sign in here; your browser may have opened it:\n{sign_in.address()}")
    webbrowser.open(sign_in.address())
    try:
        code = Watch().result(callback.code, SIGN_IN_TIME)
    except TimeoutError:
        fail(f"nobody signed in within {SIGN_IN_TIME / 60:.0f} minutes")
    finally:
        server.drain(1)
    if not code:
        fail("the sign-in was refused or cancelled")
    return sign_in.tokens(code, sign_in.verifier, sign_in.redirect)


def _by_device(sign_in: SignIn, tell: Callable[[str], None]) -> tuple[str, str]:
    """The tokens of a person who types a code on another device."""
    id, code, interval = sign_in.device()
    tell(f"Open {sign_in.issuer}/codex/device and type {code}")
    end = time.monotonic() + SIGN_IN_TIME
    while time.monotonic() < end:
        time.sleep(interval)
        if tokens := sign_in.device_tokens(id, code):
            return tokens
    fail(f"nobody signed in within {SIGN_IN_TIME / 60:.0f} minutes")


@cli.group()
def users() -> None:
    """API users, each with a token of its own."""


@users.command("add")
@click.argument("name", default="")
@click.option(
    "--limit", type=click.IntRange(0, MAX_REQUESTS), help="Most requests a day; without it there is no limit."
)
@AS_JSON
@setting_flags("data_dir")
def user_add(flags: Mapping[str, str | None], name: str, limit: int | None, as_json: bool) -> None:
    """Add an API user; its token is printed this once and kept only as a hash."""
    try:
        user, token = issue_user(opened(settled(flags)), name, limit)
    except ApiError as error:
        fail(error.message)
    told = {"user_id": user.id, "token": token, "name": name, "limit": limit}
    click.echo(compact(told) if as_json else f"{user.id}  {token}")


@users.command("list")
@AS_JSON
@setting_flags("data_dir")
def user_list(flags: Mapping[str, str | None], as_json: bool) -> None:
    """List the API users: id, name, requests and tokens of today, requests that they may make a day, last use (UTC)."""
    settings = settled(flags)
    store = opened_to_read(settings)
    found = store.users() if store else []
    if store is None or not found:
        click.echo(f"no API users in {settings.data_dir}", err=True)
        return
    ledger = Ledger(store)
    names = ("requests", "tokens", "a day", "used (UTC)")
    echo_header("{:13}  {:20}  {:8} {:9}  {:6}  {}".format("id", "name", *names), as_json)
    for user in found:
        facts = user_facts(user, ledger)
        limit = "-" if user.limit is None else user.limit
        line = f"{user.id}  {user.name or '-':20}  {facts['requests']:8} {facts['tokens']:9}  {limit:>6}"
        click.echo(compact(facts) if as_json else f"{line}  {(facts['used'] or '-')[:16]}")


@users.command("remove")
@click.argument("ids", nargs=-1, required=True, metavar="ID…")
@AS_JSON
@setting_flags("data_dir")
def user_remove(flags: Mapping[str, str | None], ids: tuple[str, ...], as_json: bool) -> None:
    """Remove API users by their ID from the list."""
    _remove(opened(settled(flags)).remove_user, ids, "user", as_json)


if __name__ == "__main__":
    cli(prog_name="chatproxy.py")
