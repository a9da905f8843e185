"""What chatproxy does, each behaviour a sentence.

Tests talk to a real listening server over a real socket; the upstream is the embedded demo, with worse weather added
here. `python test_chatproxy.py bench` measures instead (`make bench`), `python test_chatproxy.py mutants` tries whether
the tests notice faults.
"""

from __future__ import annotations

import argparse
import ast
import asyncio
import base64
import concurrent.futures
import contextlib
import dataclasses
import email
import email.policy
import functools
import gzip
import hashlib
import heapq
import http.client
import importlib
import importlib.metadata
import inspect
import io
import itertools
import json
import logging
import math
import multiprocessing
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
import sqlite3
import ssl
import stat
import subprocess
import sys
import tempfile
import threading
import time
import tracemalloc
import urllib.parse
import uuid
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterator, Mapping
from statistics import median
from typing import IO, Any, TypeVar, get_args

import anthropic
import click.testing
import httpx
import ollama
import openai
import PIL.Image
import playwright.sync_api as playwright
import pydantic
import pydantic_ai
import pydantic_ai.models.openai
import pytest
import trustme
import websockets.exceptions
import websockets.sync.client
from hypothesis import HealthCheck, example, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from pydantic_ai.providers.openai import OpenAIProvider

import chatproxy as cp

HERE = pathlib.Path(__file__).parent
SCRIPT = HERE / "chatproxy.py"
KEY = "key-of-the-pool"
ALL = cp.Scope("key-of-a-test", everyone=True)
ADMIN = "key-of-the-admin"
SOLVER = cp.Solver()  # forks, so before the first thread
SOLVER.start()
LOOP = cp.Loop()
hypothesis_settings.register_profile(
    "here", deadline=None, max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
hypothesis_settings.load_profile("here")


# --- the weather, the server under test, and what both are watched with --------------------------------------------

Upstream = TypeVar("Upstream", bound=cp.Demo)
Fault = Callable[[cp.Request], "cp.Reply | cp.Stream | cp.Upgrade | None"]


UNUSUAL = "Unusual activity has been detected from your device. Try again later."


@dataclasses.dataclass
class SignInUnderWay:
    """A sign-in with a password that is under way."""

    challenge: str
    cookie: str
    username: str = ""
    done: bool = False


def s256(verifier: str) -> str:
    """PKCE's challenge for a verifier."""
    return base64.urlsafe_b64encode(hashlib.sha256(verifier.encode()).digest()).decode().rstrip("=")


def fields(request: cp.Request) -> dict[str, str]:
    """An urlencoded form."""
    return dict(urllib.parse.parse_qsl(request.body.read().decode(), keep_blank_values=True))


class StandIn(cp.Demo):
    """The demo's stand-in with what the demo does not need: both generations of calls, both encodings, either proof, Arkose,
    and all of auth.openai.com. What it reads is not read with the product's own parsers."""

    router = cp.Router()
    for one in cp.Demo.router.endpoints:
        router.on(one.method, one.path)(one.function)

    def __init__(self) -> None:
        super().__init__()
        self.algorithm = "sha3"
        self.encoding = "v1"  # or "cumulative"
        self.newer = self.older = True  # the generations of calls that it has
        self.gone: Fault = status(404, {"detail": "Not Found"})  # what it says to calls of another one
        self.estuary, self.drawing_time = False, None
        self.conduit = self.codex = False
        self.handoff = ""  # how answers end early: "handed off", "cut" or "silent"
        self.resumes: deque[int] | None = (
            deque()
        )  # what the next calls for the rest are refused with; None: all with 404
        self.thinking = 0  # looks into a conversation before its answer is there
        self.rests: dict[str, tuple[str, list[bytes]]] = {}  # token and events of answers that ended early
        self.echoes = False  # whether the messages that were sent come back, those of the assistant too
        self.anonymous = True  # whether /backend-anon is open
        self.mobile = False  # whether /unauth-mweb is there
        self.uploads = ""  # where files go: Azure, or "estuary" or "aws"
        self.confirms = "uploaded"  # what confirms them, or "process_upload_stream"
        self.refresh_refusal: tuple[int, Any] | None = None  # what the token endpoint says
        self.arkose = False
        self.persona = ""  # whose call it is taken for, when that is not the usual one
        self.checks: tuple[str, ...] = ()  # human checks that are wanted
        self.force_login = False
        self.token_client = ""  # whom its tokens are given to
        self.rotate = True  # refresh tokens are replaced when used
        self.refresh_tokens: dict[str, str] = {}  # token → name of its account
        self.session_tokens: dict[str, str] = {}
        self.codes: dict[str, tuple[str, str]] = {}  # of sign-ins under way: challenge and redirect URI
        self.device_asked = False
        self.people = {"person@demo.example": ("password", "")}  # user name → password, one-time code
        self.sign_ins: dict[str, SignInUnderWay] = {}  # by their state

    def respond(self, request: cp.Request) -> cp.Reply | cp.Stream | cp.Upgrade:
        newer = re.search("/f/|/chat-requirements/(prepare|finalize)$", request.path)
        older = re.search("/[a-z-]+/(conversation|sentinel/chat-requirements)$", request.path)
        if (newer and not self.newer) or (older and not newer and not self.older):
            self.calls.append(f"{request.method} {request.path}")
            return self.gone(request) or cp.Reply(404)
        device = request.headers.get("oai-device-id")
        cookies = dict(
            one.split("=", 1) for one in request.headers.get("cookie", "").split("; ") if "=" in one
        )
        if "/backend-" in request.path and device and device != cookies.get("oai-did"):
            return cp._detail(401, "the device's cookie is not its header")
        anonymous = request.path.startswith("/backend-anon") and not self.anonymous
        if anonymous or (request.path.startswith("/unauth-mweb") and not self.mobile):
            self.calls.append(f"{request.method} {request.path}")
            return cp._detail(403, "Unusual activity has been detected from your device.")
        return super().respond(request)

    # -- one turn ------------------------------------------------------------------------------------------------------

    def _requirements(self, request: cp.Request) -> dict[str, Any]:
        asked = super()._requirements(request) | {"arkose": {"required": self.arkose, "dx": "demo-blob"}}
        asked |= {name: {"required": True, "dx": "demo-dx"} for name in self.checks}
        asked |= {"persona": self.persona} if self.persona else {}
        return asked | ({"force_login": True} if self.force_login else {})

    def _decoded(self, answer: str) -> list[Any] | None:
        facts = super()._decoded(answer)
        return facts if facts and len(facts) == (25 if self.algorithm == "fnv" else 18) else None

    def _proved(self, issued: tuple[float, str, str], proof: str) -> bool:
        end, seed, difficulty = issued
        if not difficulty or time.monotonic() > end or "gAAAAAB" not in proof:
            return super()._proved(issued, proof)
        answer = proof.removeprefix("gAAAAAB").removesuffix("~S")
        suffix = "~S" if self.algorithm == "fnv" else ""
        framed = proof == f"gAAAAAB{answer}{suffix}" and self._decoded(answer) is not None
        return framed and right(self.algorithm, seed, difficulty, answer)

    @router.on("POST", "/{api}/conversation", "/{api}/f/conversation")
    def conversation(self, request: cp.Request) -> cp.Reply | cp.Stream | cp.Upgrade:
        """A turn, for a client that has met these requirements too."""
        headers = request.headers
        if self.arkose and headers.get("openai-sentinel-arkose-token") != "arkose-for-demo-blob":
            return cp._detail(403, "Unusual activity has been detected from your device.")
        if "/f/" in request.path and ("x-conduit-token" in headers) is not self.conduit:
            return cp._detail(422, "x-conduit-token is missing, or not expected")
        return super().conversation(request)

    def encoded(self, *given: Any) -> Iterator[bytes]:
        return super().encoded(*given) if self.encoding == "v1" else self.cumulative(*given)

    def turn(self, request: cp.Request, body: Any) -> Iterator[bytes]:
        """An answer, or what comes of it before it goes on elsewhere."""
        if self.echoes:
            return self._echoing(body, self.answer(request, body))
        return (
            self._ending_early(request, list(self.answer(request, body)))
            if self.handoff
            else self.answer(request, body)
        )

    def _echoing(self, body: Any, pieces: Iterator[bytes]) -> Iterator[bytes]:
        """The messages that were sent, as whole ones of a finished turn and the assistant's under ids of their own."""
        for message in body["messages"]:
            own = {"id": cp.new_id()} if message["author"]["role"] == "assistant" else {}
            said = message | own | {"status": "finished_successfully", "end_turn": True, "recipient": "all"}
            yield cp.data_event({"message": said, "conversation_id": "c-echo", "error": None})
        yield from pieces

    def _ending_early(self, request: cp.Request, pieces: list[bytes]) -> Iterator[bytes]:
        found = re.search(rb'"conversation_id":"([^"]+)"', b"".join(pieces))
        talk, token = (found[1].decode() if found else ""), secrets.token_hex(8)
        self.rests[talk] = token, pieces
        yield cp.data_event(
            {"type": "resume_conversation_token", "token": token, "conversation_id": talk, "kind": "topic"}
        )
        if self.handoff == "handed off":
            yield from pieces[:2]
            ways = [{"type": way, "topic_id": "t"} for way in ("resume_sse_endpoint", "subscribe_ws_topic")]
            yield (
                cp.data_event({"type": "stream_handoff", "turn_exchange_id": "x", "options": ways}) + cp.DONE
            )
            return
        self.rests[talk] = token, [b"", *pieces]  # what has come counts
        yield from pieces[: len(pieces) // 2]
        while self.handoff == "silent":
            time.sleep(0.02)
            request.watch.check()

    @router.on("POST", "/{api}/f/conversation/resume")
    def resume(self, request: cp.Request) -> cp.Reply | cp.Stream | cp.Upgrade:
        """The rest of an answer that ended early, from the event on that is asked for."""
        body = json.loads(request.body.read())
        token, pieces = self.rests[body["conversation_id"]]
        if request.headers.get("x-conduit-token") != token or self.resumes is None:
            return cp._detail(404, "no such stream")
        if self.resumes:
            return cp._detail(self.resumes.popleft(), "not yet")
        return cp.streamed(self.frames(iter(pieces[body["offset"] :])), signs=False)

    @router.on("GET", "/{api}/conversation/{id}/stream_status")
    def stream_status(self, request: cp.Request) -> cp.Reply:
        """Whether an answer is under way."""
        return cp.json_reply({"status": "IS_STREAMING" if self.thinking else "DONE"})

    @router.on("GET", "/{api}/conversation/{id}")
    def one_conversation(self, request: cp.Request) -> cp.Reply:
        """A conversation, of whose last answer nothing is there yet while it is thought about."""
        whole = super().one_conversation(request)
        if self.thinking <= 0 or whole.status != 200:
            return whole
        self.thinking -= 1
        said = json.loads(whole.body)
        while said["mapping"][said["current_node"]]["message"]["author"]["role"] != "user":
            said["current_node"] = said["mapping"][said["current_node"]]["parent"]
        return cp.json_reply(said)

    # -- the mobile page -----------------------------------------------------------------------------------------------

    @router.on("POST", "/unauth-mweb/conversation/updates")
    def update_mobile(self, request: cp.Request) -> cp.Reply | cp.Stream | cp.Upgrade:
        """A turn of the mobile page's, for a client that has done what that does."""
        form, headers = fields(request), request.headers
        lines = {
            headers.get(f"x-web-mobile-{one}")
            for one in ("conversation-document-affinity", "document-worker-version")
        }
        done = lines == {"demo-1", "demo.2"} and "x-conduit-token" in headers and "cookie" in headers
        if (
            not done
            or form["timingToken"] != "[1,null]"
            or not form["assistantMessageId"].startswith("pending-")
        ):
            return cp._detail(403, "Unusual activity has been detected from your device.")
        return super().update_mobile(request)

    # -- files ---------------------------------------------------------------------------------------------------------

    @router.on("POST", "/{api}/files")
    def create_file(self, request: cp.Request) -> cp.Reply:
        """Announces a file: where to upload it."""
        assert json.loads(request.body.read())["entry_surface"] == "chat_composer"
        said = super().create_file(request)
        if not self.uploads or said.status != 200:
            return said
        made = json.loads(said.body)
        aws = f"{self.url}/bucket/{made['file_id']}?X-Amz-Signature=demo"
        estuary = f"/backend-api/estuary/upload_content_bytes?id={made['file_id']}"
        return cp.json_reply(made | {"upload_url": aws if self.uploads == "aws" else estuary})

    @router.on("PUT", "/bucket/{id}")
    def upload_to_bucket(self, request: cp.Request) -> cp.Reply:
        """A store at AWS: it signs what it is told, and wants no header of Azure's."""
        file = self.files[request.params["id"]]
        if any(name.startswith("x-ms-") for name in request.headers) or "authorization" in request.headers:
            return cp.Reply(400)
        file.blob, file.mime = cp.Blob(request.body.read()), request.headers["content-type"]
        return cp.Reply(200)

    @router.on("POST", "/{api}/estuary/upload_content_bytes")
    def upload_to_estuary(self, request: cp.Request) -> cp.Reply:
        """The site's own store: a form with the account's headers."""
        file = self.files[request.query["id"]]
        head = f"Content-Type: {request.headers['content-type']}\r\n\r\n".encode()
        whole = email.message_from_bytes(head + request.body.read(), policy=email.policy.HTTP)
        (part,) = [
            one for one in whole.walk() if one.get_param("name", header="content-disposition") == "file"
        ]
        file.blob, file.mime = cp.Blob(bytes(part.get_payload(decode=True))), part.get_content_type()
        return cp.json_reply({"status": "success"})

    @router.on("POST", "/{api}/files/{id}/uploaded")
    def confirm_upload(self, request: cp.Request) -> cp.Reply:
        """Takes in a file, unless that is another call's."""
        return self.file_download(request) if self.confirms == "uploaded" else cp._detail(404, "Not Found")

    @router.on("POST", "/{api}/files/process_upload_stream")
    def process_upload(self, request: cp.Request) -> cp.Reply:
        """Takes in a file, and tells how far it is."""
        body = json.loads(request.body.read())
        if self.confirms == "uploaded":
            return cp._detail(404, "Not Found")
        last = "failed" if "broken" in body["file_name"] else "completed"
        file = self.files[body["file_id"]]
        file.asked = body["index_for_retrieval"]
        events = ("started", "progress", last)
        lines = ["", "[1]", "5"]
        lines += [
            json.dumps({"event": f"file.processing.{one}", "progress": 50, "extra": None}) for one in events
        ]
        return cp.Reply(200, "\n".join(lines).encode(), "application/x-ndjson")

    @router.on("POST", "/{api}/transcribe")
    def transcribe(self, request: cp.Request) -> cp.Reply:
        """What is said in a recording: its name and size are all that is heard."""
        head = f"Content-Type: {request.headers['content-type']}\r\n\r\n".encode()
        parts = email.message_from_bytes(head + request.body.read(), policy=email.policy.HTTP).walk()
        for part in parts:
            if part.get_param("name", header="content-disposition") == "file" and part.get_filename():
                size = len(part.get_payload(decode=True))
                return cp.json_reply(
                    {"text": f"The demo upstream heard {size} bytes of {part.get_filename()}."}
                )
        return cp._detail(422, [{"loc": ["body", "file"], "msg": "field required"}])

    # -- tokens --------------------------------------------------------------------------------------------------------

    @router.on("POST", "/oauth/token")
    def oauth_token(self, request: cp.Request) -> cp.Reply:
        """Exchanges a refresh token, or the code of a sign-in."""
        if "urlencoded" in request.headers.get("content-type", ""):
            return self._sign_in_tokens(fields(request))
        given = str(json.loads(request.body.read()).get("refresh_token"))
        if self.refresh_refusal:
            return cp.json_reply(self.refresh_refusal[1], self.refresh_refusal[0])
        with self._issued_lock:
            name = self.refresh_tokens.get(given)
            if name is None or given in self.dead:
                text = "Unknown or invalid refresh token."
                return cp.json_reply({"error": "invalid_grant", "error_description": text}, 403)
            token = cp.demo_token(name, client=self.token_client)
            answer = {"access_token": token, "expires_in": 86400, "token_type": "Bearer"}
            if self.rotate:
                answer["refresh_token"] = f"rt_{secrets.token_urlsafe(40)}"
                self.refresh_tokens[str(answer["refresh_token"])] = self.refresh_tokens.pop(given)
        return cp.json_reply(answer)

    @router.on("GET", "/oauth/authorize")
    def authorize(self, request: cp.Request) -> cp.Reply:
        """The sign-in page of somebody who is signed in already: back to the client with a code."""
        query = request.query
        wanted = {"response_type": "code", "client_id": cp.BROWSER_CLIENT, "code_challenge_method": "S256"}
        if (
            any(query.get(name) != value for name, value in wanted.items())
            or "offline_access" not in query["scope"]
        ):
            return cp._detail(400, "invalid_request")
        code = secrets.token_urlsafe(16)
        self.codes[code] = (query["code_challenge"], query["redirect_uri"])
        back = urllib.parse.urlencode({"code": code, "state": query["state"]})
        return cp.Reply(302, headers={"Location": f"{query['redirect_uri']}?{back}"})

    @router.on("GET", "/authorize")
    def begin_sign_in(self, request: cp.Request) -> cp.Reply:
        """The old universal login: from here to a form for the user name."""
        query = request.query
        wanted = {
            "client_id": cp.REFRESH_CLIENT,
            "redirect_uri": cp.REFRESH_REDIRECT,
            "response_type": "code",
        }
        wanted |= {
            "audience": "https://api.openai.com/v1",
            "code_challenge_method": "S256",
            "prompt": "login",
        }
        scopes = "openid email profile offline_access model.request model.read organization.read offline"
        if any(query.get(name) != value for name, value in wanted.items()) or query.get("scope") != scopes:
            return cp._detail(400, "invalid_request")
        state, cookie = secrets.token_urlsafe(24), secrets.token_urlsafe(24)
        self.sign_ins[state] = SignInUnderWay(query["code_challenge"], cookie)
        headers = {
            "Location": f"/u/login/identifier?state={state}",
            "Set-Cookie": f"auth0={cookie}; HttpOnly",
        }
        return cp.Reply(302, headers=headers)

    def _sign_in(self, request: cp.Request, *names: str) -> tuple[SignInUnderWay, dict[str, str]]:
        """The sign-in that a form belongs to, and the form, if it has these fields and came with the cookie."""
        form = fields(request)
        state = request.query.get("state", "")
        under_way = self.sign_ins.get(state)
        if under_way is None or f"auth0={under_way.cookie}" not in request.headers.get("cookie", ""):
            raise cp.ApiError("invalid_request_error", "Invalid state")
        if request.method == "POST" and (set(form) != {*names, "state", "action"} or form["state"] != state):
            raise cp.ApiError("invalid_request_error", "Bad form")
        return under_way, form

    @router.on("GET", "/u/login/identifier", "/u/login/password", "/u/mfa-otp-challenge")
    def sign_in_page(self, request: cp.Request) -> cp.Reply:
        """A page with a form."""
        return cp.Reply(200, b"<!DOCTYPE html><form method=post></form>", "text/html; charset=utf-8")

    @router.on("POST", "/u/login/identifier")
    def take_username(self, request: cp.Request) -> cp.Reply:
        """The user name; whether there is such a person is not told."""
        traits = ("js-available", "webauthn-available", "is-brave", "webauthn-platform-available")
        under_way, form = self._sign_in(request, "username", *traits)
        under_way.username = form["username"]
        return cp.Reply(302, headers={"Location": f"/u/login/password?state={form['state']}"})

    @router.on("POST", "/u/login/password")
    def take_password(self, request: cp.Request) -> cp.Reply:
        """The password: on to what the sign-in was for, or a 400."""
        under_way, form = self._sign_in(request, "username", "password")
        known = self.people.get(under_way.username)
        if known is None or form["username"] != under_way.username or form["password"] != known[0]:
            return cp.Reply(400, b"Wrong email or password", "text/html; charset=utf-8")
        under_way.done = not known[1]
        return cp.Reply(302, headers={"Location": f"/authorize/resume?state={form['state']}"})

    @router.on("POST", "/u/mfa-otp-challenge")
    def take_code(self, request: cp.Request) -> cp.Reply:
        """The one-time code."""
        under_way, form = self._sign_in(request, "code")
        if form["code"] != self.people[under_way.username][1]:
            return cp.Reply(400, b"Wrong code", "text/html; charset=utf-8")
        under_way.done = True
        return cp.Reply(302, headers={"Location": f"/authorize/resume?state={form['state']}"})

    @router.on("GET", "/authorize/resume")
    def end_sign_in(self, request: cp.Request) -> cp.Reply:
        """Back to the app with a code, or to the form for a one-time code."""
        under_way, _ = self._sign_in(request)
        if not under_way.done:
            return cp.Reply(302, headers={"Location": f"/u/mfa-otp-challenge?state={request.query['state']}"})
        code = secrets.token_urlsafe(16)
        self.codes[code] = (under_way.challenge, cp.REFRESH_REDIRECT)
        return cp.Reply(302, headers={"Location": f"{cp.REFRESH_REDIRECT}?code={code}"})

    def _sign_in_tokens(self, form: Mapping[str, str]) -> cp.Reply:
        """Tokens for a code, if its verifier is the one that the challenge was made from."""
        wanted, redirect = self.codes.pop(form.get("code", ""), ("", ""))
        proved, ios = s256(form.get("code_verifier", "")) == wanted, redirect == cp.REFRESH_REDIRECT
        client = cp.REFRESH_CLIENT if ios else cp.BROWSER_CLIENT
        if not proved or form.get("redirect_uri") != redirect or form.get("client_id") != client:
            return cp.json_reply({"error": "invalid_grant"}, 400)
        refresh = secrets.token_urlsafe(40)[:45] if ios else f"rt_{secrets.token_urlsafe(40)}"
        self.refresh_tokens[refresh] = "person"
        return cp.json_reply(
            {"access_token": cp.demo_token("person"), "refresh_token": refresh, "id_token": "x"}
        )

    @router.on("POST", "/api/accounts/deviceauth/usercode")
    def device_code(self, request: cp.Request) -> cp.Reply:
        """A device begins to sign in."""
        if json.loads(request.body.read()).get("client_id") != cp.BROWSER_CLIENT:
            return cp._detail(400, "unknown client")
        return cp.json_reply({"device_auth_id": "device-1", "user_code": "DEMO-CODE", "interval": "1"})

    @router.on("POST", "/api/accounts/deviceauth/token")
    def device_token(self, request: cp.Request) -> cp.Reply:
        """Whether the person has signed in; not at the first question."""
        if json.loads(request.body.read()) != {"device_auth_id": "device-1", "user_code": "DEMO-CODE"}:
            return cp._detail(400, "unknown device")
        if not self.device_asked:
            self.device_asked = True
            return cp._detail(403, "authorization pending")
        verifier, code = secrets.token_urlsafe(48), secrets.token_urlsafe(16)
        self.codes[code] = (s256(verifier), f"{self.url}/deviceauth/callback")
        return cp.json_reply({"authorization_code": code, "code_verifier": verifier})

    @router.on("GET", "/api/auth/session")
    def auth_session(self, request: cp.Request) -> cp.Reply:
        """Tells a session's access token; {} when the session is over."""
        cookies = dict(re.findall(r"([^=;\s]+)=([^;\s]*)", request.headers.get("cookie", "")))
        pieces = sorted(name for name in cookies if name.startswith(cp.SESSION_COOKIE))
        name = self.session_tokens.get("".join(cookies[piece] for piece in pieces))
        if name is None:
            return cp.json_reply({})
        facts = {"expires": "2099-01-01T00:00:00.000Z", "user": {"name": name}}
        return cp.json_reply({"accessToken": cp.demo_token(name)} | facts)


def said_natively(text: str) -> list[dict[str, Any]]:
    """An answer of the Codex backend's that is a text."""
    content = [{"type": "output_text", "text": text, "annotations": [], "logprobs": []}]
    return [{"type": "message", "role": "assistant", "content": content}]


def is_call(path: str, call: str) -> bool:
    """Whether a path ends with a call's; that for requirements goes by both generations' names."""
    return path.endswith(call) or (call == "/chat-requirements" and path.endswith(f"{call}/prepare"))


class Weather(StandIn):
    """The stand-in with faults: each waits for one call of its kind and answers it instead."""

    def __init__(self) -> None:
        super().__init__()
        self.url = ""
        self.pace = 0.0
        self.faults: dict[str, deque[Fault]] = defaultdict(deque)
        self.seen: list[cp.Request] = []
        self.left: list[float] = []  # when a client was noticed to be gone
        self.words: list[str] = ["Hello", " wide", " world", "."]
        self.turns: deque[list[str]] = deque()  # the words of the next answers, in turn
        self.details = "stop"
        self.before: list[dict[str, Any]] = []  # messages that come before an answer
        self.metadata: dict[str, Any] = {}  # what an answer has more
        self.obeys = False  # whether it answers as the demo does
        self.drawn_is_lost = False  # whether the bytes of its files cannot be had

    def add(self, call: str, *faults: Fault) -> None:
        """Faults for the next calls whose path ends with `call`, in turn."""
        self.faults[call].extend(faults)

    def respond(self, request: cp.Request) -> cp.Reply | cp.Stream | cp.Upgrade:
        self.seen.append(dataclasses.replace(request))  # which keeps its body
        if self.drawn_is_lost and request.path.startswith("/blob/"):
            return cp.Reply(404)
        for call, waiting in self.faults.items():
            if is_call(request.path, call) and waiting and (answer := waiting.popleft()(request)) is not None:
                self.calls.append(f"{request.method} {request.path}")
                return answer
        return super().respond(request)

    def say(self, body: Any, *given: Any, **more: Any) -> Iterator[bytes]:
        return super().say({"supported_encodings": ["v1"]} | body, *given, **more)

    def answer(self, request: cp.Request, body: Any) -> Iterator[bytes]:
        if self.obeys:
            return super().answer(request, body)
        words = self.turns.popleft() if self.turns else self.words
        return self.say(body, words, self.details, self.before, self.metadata, self._owner(request))

    def codex_items(self, request: cp.Request, body: Mapping[str, Any]) -> list[dict[str, Any]]:
        if self.obeys:
            return super().codex_items(request, body)
        return said_natively("".join(self.turns.popleft() if self.turns else self.words))

    def asked(self) -> dict[str, Any]:
        """The body of the last conversation call."""
        body: dict[str, Any] = json.loads(self.last("/conversation").body.read())
        return body

    def told(self) -> str:
        """All text of the last conversation call."""
        messages = self.asked()["messages"]
        return "\n".join(p for one in messages for p in one["content"]["parts"] if isinstance(p, str))

    def wanted(self) -> list[str]:
        """Give the calls that somebody asked for: requirements are also fetched in the background, ahead of need."""
        return [call for call in self.calls if "/chat-requirements" not in call]

    def count(self, call: str) -> int:
        return sum(is_call(path, call) for path in self.calls)

    def last(self, call: str) -> cp.Request:
        return next(request for request in reversed(self.seen) if is_call(request.path, call))

    def silence(self, first: bytes = b"") -> Fault:
        """Says no more than `first` until the client is gone, and notes when that was noticed."""

        def wait(request: cp.Request) -> cp.Sent:
            if first:
                yield first, 1
            try:
                for _ in range(2000):
                    time.sleep(0.02)
                    request.watch.check()
            except cp.ClientGone:
                self.left.append(time.monotonic())
                raise
            yield b"", 0

        return lambda request: cp.streamed(wait(request))


def status(code: int, body: Any = None, kind: str = "application/json", **headers: str) -> Fault:
    data = body.encode() if isinstance(body, str) else json.dumps(body or {"detail": "no"}).encode()
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return lambda request: cp.Reply(code, data, kind, named)


def raw_stream(*pieces: bytes) -> Fault:
    """Exactly these bytes as a whole stream."""
    return lambda request: cp.streamed((piece, 1) for piece in pieces)


def cut_stream(*pieces: bytes) -> Fault:
    """These bytes, then the connection breaks."""

    def give() -> cp.Sent:
        for piece in pieces:
            yield piece, 1
        raise cp.ClientGone

    return lambda request: cp.streamed(give())


def written(stream: cp.Stream) -> list[bytes]:
    """What a stream writes, without a connection."""
    said: list[bytes] = []

    class Collecting:
        begun = gone = full = False

        def write(self, data: bytes, events: int = 0) -> None:
            said.append(data)

        def drain(self) -> None:
            pass

    writer: Any = Collecting()
    stream.write(writer)
    return said


class Proxy:
    """chatproxy in this process: the same App and Server that `serve` runs, on a free port."""

    def __init__(self, folder: pathlib.Path, upstream: str, tokens: list[str], **settings: str) -> None:
        flags = {
            "chatgpt_base_url": upstream,
            "openai_auth_url": upstream.split(",")[0],
            "openai_api_url": upstream.split(",")[0],
            "data_dir": str(folder),
            "authorization": KEY,
            "admin_key": ADMIN,
            "port": "0",
        } | settings
        self.settings = cp.resolve(cp.gather({name: value for name, value in flags.items() if value}, {}))
        self.store = cp.Store(self.settings.data_dir)
        self.app = cp.App(self.settings, self.store, SOLVER)
        if tokens:
            self.app.pool.add(tokens)
        self.server = cp.Server(("127.0.0.1", 0), self.app, self.settings, self.app.metrics)
        self.address = ("127.0.0.1", self.server.server_port)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        self._stop = threading.Event()
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()
        threading.Thread(target=self.app.upkeep, args=(self._stop,), daemon=True).start()

    def close(self) -> None:
        self._stop.set()
        self.server.drain(0)
        for executor in (
            self.app.site._ahead,
            self.app.renewals._renewals,
            self.app.renewals._guest_renewals,
        ):
            executor.shutdown(wait=False, cancel_futures=True)
        self.app.loop.close()
        self.store.close()

    def ask(self, text: str = "hi", key: str | None = KEY, **body: Any) -> httpx.Response:
        body = {"model": "gpt-4o", "messages": [{"role": "user", "content": text}]} | body
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        return httpx.post(f"{self.url}/v1/chat/completions", json=body, headers=headers, timeout=60)

    def say(self, text: str = "hi", **body: Any) -> str:
        answer = self.ask(text, **body)
        assert answer.status_code == 200, answer.text
        return str(answer.json()["choices"][0]["message"]["content"])

    def stream(self, **body: Any) -> tuple[list[dict[str, Any]], str]:
        """The chunks of a streamed answer, and what came as raw text."""
        answer = self.ask(stream=True, **body)
        assert answer.status_code == 200, answer.text
        lines = [line[6:] for line in answer.text.split("\n\n") if line.startswith("data: ")]
        return [json.loads(line) for line in lines if line != "[DONE]"], answer.text

    def states(self) -> dict[str, str]:
        return {account.row.email: account.state(time.time()) for account in self.app.pool.accounts()}

    def user(self, name: str) -> str:
        """The token of a new API user."""
        token = cp.issue_user(self.store, name, None)[1]
        self.app.keys.reload()
        return token

    def client(self, **options: Any) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=KEY, max_retries=0, **options)


def codex_token(name: str, **more: Any) -> str:
    """A token of a browser sign-in."""
    return cp.demo_token(name, client=cp.BROWSER_CLIENT, **more)


def guest_of(proxy: Proxy, token: str) -> cp.Account:
    """The account of a caller with a token of its own."""
    return proxy.app.pool.guest(cp.callers_token(token))


def text_of(chunks: list[dict[str, Any]]) -> str:
    return "".join(c["delta"].get("content") or "" for chunk in chunks for c in chunk.get("choices", []))


def error_of(answer: httpx.Response) -> tuple[int, str]:
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return answer.status_code, error["code"]


def wait_until(true: Callable[[], Any], seconds: float = 10.0) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.005)


def at_hand(upstream: Upstream) -> Iterator[Upstream]:
    """A stand-in that listens, for a fixture."""
    server, upstream.url = upstream.listen()
    yield upstream
    server.drain(0)
    upstream.loop.close()


@pytest.fixture
def weather() -> Iterator[Weather]:
    yield from at_hand(Weather())


@pytest.fixture
def start(tmp_path: pathlib.Path, weather: Weather) -> Iterator[Callable[..., Proxy]]:
    """Starts servers against the weather: `start("alice", "bob", retry_times="0")`, accounts by name or token."""
    running: list[Proxy] = []

    def begin(*accounts: str, folder: str = "data", upstream: str = "", **settings: str) -> Proxy:
        tokens = [
            name if len(name) > 20 or name == cp.LOGIN_FREE else cp.demo_token(name) for name in accounts
        ]
        running.append(Proxy(tmp_path / folder, upstream or weather.url, tokens, **settings))
        return running[-1]

    yield begin
    for proxy in running:
        proxy.close()


@pytest.fixture
def proxy(start: Callable[..., Proxy]) -> Proxy:
    return start("alice")


def run(
    *words: str, env: dict[str, str] | None = None, stdin: str | None = None
) -> subprocess.CompletedProcess[str]:
    """A command of the program."""
    return subprocess.run(
        [sys.executable, str(SCRIPT), *words],
        env={"PATH": os.environ["PATH"], "HOME": "/nonexistent"} | (env or {}),
        input=stdin,
        capture_output=True,
        text=True,
        timeout=30,
    )


class Served:
    """`chatproxy.py serve` as a process."""

    def __init__(
        self, *words: str, env: dict[str, str] | None = None, cwd: pathlib.Path | None = None
    ) -> None:
        self.start = time.monotonic()
        self.process = subprocess.Popen(
            [sys.executable, str(SCRIPT), "serve", "--port", "0", *words],
            env={"PATH": os.environ["PATH"], "HOME": "/nonexistent"} | (env or {}),
            stderr=subprocess.PIPE,
            text=True,
            cwd=cwd,
        )
        assert self.process.stderr
        self.lines: list[str] = []
        for line in self.process.stderr:
            self.lines.append(line)
            if found := re.search(r"listening on (https?://[^/]+)", line):
                self.url = found[1]
                break
        self.ready = time.monotonic() - self.start
        threading.Thread(target=lambda: self.lines.extend(self.process.stderr or ()), daemon=True).start()

    def __enter__(self) -> Served:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()


# --- settings, commands, start ---------------------------------------------------------------------------------------


def test_the_server_goes_on_as_a_module_of_its_own_folder(tmp_path: pathlib.Path) -> None:
    for name in ("json", "click", "chatproxy"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('imported from the working directory')")
    with Served("--demo", "--log-format", "json", cwd=tmp_path) as served:
        assert httpx.get(f"{served.url}/health").status_code == 200
        command = pathlib.Path(f"/proc/{served.process.pid}/cmdline").read_bytes().split(b"\0")
        assert command[1] == b"-c" and command[-5:-1] == [b"0", b"--demo", b"--log-format", b"json"]
        status = pathlib.Path(f"/proc/{served.process.pid}/status").read_text()
        assert int(status.split("VmRSS:")[1].split()[0]) < 55 << 10  # as a script it takes 70 MB
    # Not by way of another program, nor under another name.
    other = tmp_path / "other" / "class.py"
    other.parent.mkdir()
    shutil.copy(SCRIPT, other)
    code = f"import runpy; runpy.run_path({str(SCRIPT)!r}, run_name='__main__')"
    for words in (["-mcProfile", str(SCRIPT)], ["--", str(SCRIPT)], ["-c", code], [str(other)]):
        told = subprocess.run(
            [sys.executable, *words, "serve", "--help"], cwd=SCRIPT.parent, capture_output=True, check=False
        )
        assert b"serve [OPTIONS]" in told.stdout, words
    module = [sys.executable, "-m", "chatproxy", "serve", "--help"]  # which it is already
    assert (
        b"Usage: chatproxy.py serve" in subprocess.run(module, cwd=SCRIPT.parent, capture_output=True).stdout
    )


def test_a_flag_wins_over_a_variable_and_an_alias_counts() -> None:
    env = {
        "PORT": "7000",
        "HOST": "::1",
        "GO_CHATGPT_API_PROXY": "socks5h://127.0.0.1:9050",
        "API_PREFIX": "",
    }
    origins = cp.gather({"port": "8000"}, env)
    settings = cp.resolve(origins)
    assert (settings.port, settings.host, settings.proxy_url) == (8000, "::1", ("socks5h://127.0.0.1:9050",))
    sources = [origins[name].source for name in ("port", "host", "proxy_url", "api_prefix")]
    assert sources == ["flag", "env", "env GO_CHATGPT_API_PROXY", "default"]
    assert settings.api_prefix is None


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("PORT", "65536"),
        ("PORT", "http"),
        ("RETRY_TIMES", "-1"),
        ("RANDOM_TOKEN", "perhaps"),
        ("CHATGPT_BASE_URL", "chatgpt.com"),
        ("CHATGPT_BASE_URL", ","),
        ("PROXY_URL", "ftp://x"),
        ("POW_DIFFICULTY", "xyz"),
        ("LOG_FORMAT", "xml"),
        ("IMPERSONATE", "lynx"),
        ("TLS_CERT", "/nonexistent.pem"),
        ("ENABLE_GATEWAY", "true"),
        ("OPENAI_API_URL", "https://x:99999"),
    ],
)
def test_an_unusable_value_stops_the_start_with_one_line(
    name: str, value: str, tmp_path: pathlib.Path
) -> None:
    ended = run("serve", env={name: value, "DATA_DIR": str(tmp_path)})
    assert ended.returncode == 2
    assert len(ended.stderr.splitlines()) == 1
    assert name in ended.stderr and "accepted: " in ended.stderr
    assert value in ended.stderr or name == "PROXY_URL"  # which may hold a password


def test_an_unusable_secret_is_not_repeated(tmp_path: pathlib.Path) -> None:
    ended = run("serve", env={"ADMIN_KEY": "my secret key"})
    assert ended.returncode == 2 and "ADMIN_KEY" in ended.stderr and "secret" not in ended.stderr


@given(
    st.dictionaries(
        st.sampled_from([f.name for f in cp.fields(cp.Settings)]), st.text(max_size=40), max_size=4
    )
)
@example({"port": "\x85", "chatgpt_base_url": " "})
def test_any_text_is_a_setting_or_a_setting_error(flags: dict[str, str]) -> None:
    try:
        settings = cp.resolve(cp.gather(flags, {}))
    except cp.SettingError as error:
        assert "accepted: " in str(error) and len(str(error).splitlines()) == 1
    else:
        assert isinstance(settings.port, int) and isinstance(settings.chatgpt_base_url, tuple)


def test_config_tells_where_a_setting_came_from_and_masks_secrets() -> None:
    ended = run(
        "config", "--port", "6000", env={"AUTHORIZATION": "first-key,second-key", "LOG_LEVEL": "debug"}
    )
    assert re.search(r"(?m)^PORT +6000 +\(flag\)$", ended.stdout)
    assert re.search(r"(?m)^LOG_LEVEL +debug +\(env\)$", ended.stdout)
    assert re.search(r"(?m)^HOST +127\.0\.0\.1 +\(default\)$", ended.stdout)
    assert re.search(r"(?m)^AUTHORIZATION +\*\*\*\w+,\*\*\*\w+ +\(env\)$", ended.stdout)
    assert "first-key" not in ended.stdout


def test_every_setting_has_a_flag_and_help_names_it() -> None:
    words = run("serve", "--help").stdout
    for row in cp.fields(cp.Settings):
        assert row.metadata["hidden"] or f"--{row.name.replace('_', '-')} " in words


def test_listening_for_everyone_without_a_key_is_refused_unless_meant(tmp_path: pathlib.Path) -> None:
    env = {"DATA_DIR": str(tmp_path)}
    ended = run("serve", "--host", "0.0.0.0", env=env)
    assert ended.returncode == 2 and "--open" in ended.stderr and len(ended.stderr.splitlines()) == 1
    for words in (["--open"], ["--authorization", "k"], ["--api-prefix", "p"]):
        with Served("--host", "0.0.0.0", *words, env=env) as served:
            assert served.url


def test_a_taken_port_stops_the_start_with_one_line(tmp_path: pathlib.Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        ended = run("serve", "--port", port, env={"DATA_DIR": str(tmp_path)})
    assert ended.returncode == 2 and f"PORT: cannot listen on 127.0.0.1:{port}" in ended.stderr
    assert len(ended.stderr.splitlines()) == 1


def test_a_folder_that_cannot_be_used_stops_the_start_with_one_line() -> None:
    ended = run("serve", "--data-dir", "/proc/nowhere")
    assert ended.returncode == 2 and "DATA_DIR" in ended.stderr and len(ended.stderr.splitlines()) == 1


def test_a_start_says_where_how_many_accounts_and_what_next(tmp_path: pathlib.Path) -> None:
    with Served(env={"DATA_DIR": str(tmp_path)}) as served:
        assert "0 accounts; add one with" in served.lines[-1]
    assert run("accounts", "add", cp.demo_token("alice"), env={"DATA_DIR": str(tmp_path)}).returncode == 0
    with Served(env={"DATA_DIR": str(tmp_path)}) as served:
        assert served.lines[-1].rstrip().endswith(", 1 account")


def test_the_demo_answers_without_account_and_network() -> None:
    with Served("--demo") as served:
        for headers in ({}, {"Authorization": "Bearer demo"}, {"Authorization": "Bearer sk-anything"}):
            body = {"model": "gpt-4o", "messages": [{"role": "user", "content": "hello"}]}
            answer = httpx.post(f"{served.url}/v1/chat/completions", json=body, headers=headers, timeout=30)
            assert answer.status_code == 200 and "demo" in answer.json()["choices"][0]["message"]["content"]


def test_the_demo_keeps_its_hands_off_the_pool(tmp_path: pathlib.Path) -> None:
    env = {"DATA_DIR": str(tmp_path)}
    assert run("accounts", "add", "rt_" + "r" * 40, env=env).returncode == 0
    with Served("--demo", env=env) as served:
        body = {"model": "gpt-4o", "messages": [{"role": "user", "content": "hello"}]}
        headers = {"Authorization": "Bearer demo"}
        assert httpx.post(f"{served.url}/v1/chat/completions", json=body, headers=headers).status_code == 200
    listed = run("accounts", "list", env=env).stdout.splitlines()
    assert len(listed) == 1 and listed[0].endswith("ready")


def test_no_name_means_two_things() -> None:
    names = Counter[str]()
    for one in ast.parse(SCRIPT.read_text()).body:
        targets = one.targets if isinstance(one, ast.Assign) else []
        targets = [*targets, one.target] if isinstance(one, ast.AnnAssign) else targets
        stored = [node for target in targets for node in ast.walk(target)]
        names.update(node.id for node in stored if isinstance(node, ast.Name))
        names.update([one.name] if isinstance(one, (ast.FunctionDef, ast.ClassDef)) else [])
    assert [name for name, count in names.items() if count > 1] == []


def test_the_script_carries_its_own_requirements() -> None:
    head = SCRIPT.read_text().split('"""')[0]
    assert "# /// script" in head and '"curl_cffi' in head and '"click' in head and ">=3.10" in head


def test_accounts_are_added_listed_and_removed_without_a_token_in_sight(tmp_path: pathlib.Path) -> None:
    env = {"DATA_DIR": str(tmp_path)}
    token, refresh = cp.demo_token("alice"), "rt_" + "r" * 40
    added = run(
        "accounts", "add", "-", env=env, stdin=f"# mine\n{token}\n\n{refresh},ws-1 # team\nlogin-free\n"
    )
    assert added.returncode == 0, added.stderr
    listed = run("accounts", "list", env=env).stdout
    assert "alice@demo.example" in listed and "refresh" in listed and "login-free" in listed
    assert token[:30] not in added.stdout + listed and refresh not in added.stdout + listed
    first = next(line.split()[0] for line in listed.splitlines() if "alice" in line)
    assert run("accounts", "remove", first, env=env).returncode == 0
    assert "alice" not in run("accounts", "list", env=env).stdout
    assert run("accounts", "remove", first, env=env).returncode == 2
    wrong = run("accounts", "add", "not-a-token-at-all-really", env=env)
    assert wrong.returncode == 2 and "not-a-token" not in wrong.stderr


def test_tokens_are_imported_from_what_other_programs_keep(tmp_path: pathlib.Path) -> None:
    env = {"DATA_DIR": str(tmp_path / "data")}
    names = ["alice", "bob", "carol", "dave"]
    alice, bob, carol, dave = (cp.demo_token(name) for name in names)
    refresh, other, dead = ("rt_" + letter * 40 for letter in "abc")
    folder = tmp_path / "chat2api"
    folder.mkdir()
    (folder / "token.txt").write_text(f"{refresh}\n{alice}\n\n{dead}\n")
    (folder / "refresh_map.json").write_text(
        json.dumps({refresh: {"token": bob, "timestamp": 1}, other: {"token": bob}})
    )
    (folder / "error_token.txt").write_text(f"{dead}\n")
    (folder / "seed_map.json").write_text(json.dumps({"seed": {"token": carol}}))
    (tmp_path / "access_tokens.json").write_text(
        json.dumps({"a@x.example": {"token": bob, "puid": "user-1"}, "b@x.example": carol})
    )
    codex = {
        "OPENAI_API_KEY": None,
        "tokens": {
            "id_token": alice,
            "access_token": dave,
            "refresh_token": "rt_" + "d" * 40,
            "account_id": "ws-1",
        },
    }
    (tmp_path / "auth.json").write_text(json.dumps(codex | {"last_refresh": "2026-11-20T00:00:00Z"}))
    ended = run("accounts", "import", str(folder), env=env)
    assert ended.returncode == 0 and "stored: 4 (known before: 0), merged: 1, left out: 0" in ended.stdout
    ended = run(
        "accounts",
        "import",
        str(tmp_path / "access_tokens.json"),
        str(tmp_path / "auth.json"),
        str(folder),
        env=env,
    )
    assert ended.returncode == 0 and "stored: 6 (known before: 4), merged: 2, left out: 0" in ended.stdout
    listed = run("accounts", "list", env=env).stdout
    assert len(listed.splitlines()) == 6 and "dave@" in listed and "carol@" in listed
    assert not any(
        token in ended.stdout + ended.stderr + listed for token in (alice, bob, carol, dave, refresh, other)
    )
    ended = run("accounts", "import", "-", env=env, stdin=f"# mine\n{alice}\nnonsense\n")
    assert (
        ended.returncode == 2 and "line 3: not a token" in ended.stderr and "known before: 1" in ended.stderr
    )
    for missing in (str(tmp_path / "nowhere"), str(tmp_path / "data")):
        ended = run("accounts", "import", missing, env=env)
        assert ended.returncode == 2 and len(ended.stderr.splitlines()) == 1


def test_lists_can_be_read_by_scripts(tmp_path: pathlib.Path) -> None:
    env = {"DATA_DIR": str(tmp_path)}
    for what in ("accounts", "users"):
        empty = run(what, "list", env=env)
        assert empty.returncode == 0 and not empty.stdout and str(tmp_path) in empty.stderr
    run("accounts", "add", cp.demo_token("alice"), "login-free", env=env)
    run("users", "add", "bob", env=env)
    alice, free = (
        json.loads(line) for line in run("accounts", "list", "--json", env=env).stdout.splitlines()
    )
    assert (alice["email"], alice["plan"], alice["state"]) == ("alice@demo.example", "plus", "ready")
    assert alice["expires"].endswith("+00:00") and free["expires"] is None and free["kind"] == "login-free"
    (bob,) = (json.loads(line) for line in run("users", "list", "--json", env=env).stdout.splitlines())
    assert (bob["name"], bob["limit"], bob["requests"], bob["used"]) == ("bob", None, 0, None)


def test_scripts_are_told_in_json_what_was_done(tmp_path: pathlib.Path) -> None:
    env = {"DATA_DIR": str(tmp_path)}
    token = cp.demo_token("alice")
    (added,) = run("accounts", "add", token, "--json", env=env).stdout.splitlines()
    account = json.loads(added)
    assert (account["email"], account["kind"]) == ("alice@demo.example", "access")
    user = json.loads(run("users", "add", "bob", "--limit", "7", "--json", env=env).stdout)
    assert user["limit"] == 7 and user["token"].startswith("cp-")
    for what, id in (("accounts", account["id"]), ("users", user["user_id"])):
        gone = run(what, "remove", id, "--json", env=env)
        assert gone.returncode == 0 and json.loads(gone.stdout) == {"removed": id}
    wrong = run("users", "add", "bob", "--limit", "-1", env=env)
    assert wrong.returncode == 2 and not wrong.stdout


def test_accounts_move_to_another_machine_with_their_identity(
    tmp_path: pathlib.Path, weather: Weather, start: Callable[..., Proxy]
) -> None:
    weather.refresh_tokens["rt_" + "r" * 40] = "bob"
    here = start("alice", "rt_" + "r" * 40, "login-free", folder="here")
    for _ in range(12):
        here.say()  # the refresh token rotates, cookies come
    alice = next(one for one in here.app.pool.accounts() if one.row.email.startswith("alice"))
    alice.cookies = alice.cookies | {"odd": "a#b"}
    here.app.pool.keep_told()
    here.app.pool.disable([alice.id], True)
    env, file = {"DATA_DIR": str(tmp_path / "here")}, tmp_path / "moved.jsonl"
    ended = run("accounts", "export", str(file), env=env)
    assert ended.returncode == 0 and "3 accounts written to" in ended.stdout
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    secrets_ = [row.secret for row in here.store.accounts() if row.secret]
    assert not any(secret in ended.stdout + ended.stderr for secret in secrets_)
    again = run("accounts", "export", str(file), env=env)
    assert again.returncode == 2 and "File exists" in again.stderr
    there = {"DATA_DIR": str(tmp_path / "there")}
    assert run("accounts", "import", str(file), env=there).returncode == 0
    moved = {row.secret: row for row in cp.Store(str(tmp_path / "there")).accounts()}
    for row in here.store.accounts():
        if row.secret:
            there_ = moved[row.secret]
            assert (there_.device, there_.cookies, there_.state) == (row.device, row.cookies, row.state)
    # And what is known by its token stays the account that it is.
    back = run("accounts", "import", str(file), env=env)
    assert "known before: 3" in back.stdout and len(here.store.accounts()) == 3
    alone = {"DATA_DIR": str(tmp_path / "alone")}
    (tmp_path / "one.jsonl").write_text(file.read_text().splitlines()[0])
    assert run("accounts", "import", str(tmp_path / "one.jsonl"), env=alone).returncode == 0
    assert cp.Store(alone["DATA_DIR"]).accounts()[0].device == here.store.accounts()[0].device
    assert "never printed" in run("accounts", "export", "-", env=env).stderr
    assert run("accounts", "export", env={"DATA_DIR": str(tmp_path / "none")}).returncode == 2


@pytest.mark.parametrize(
    "line",
    [
        '{"token": null}',
        '{"accessToken": 5}',
        '{"token": "TOKEN", "device": 5, "browser": "a b", "cookies": {"a": "b\\r\\nX: y"}}',
        '{"token": "TOKEN", "device": "x", "browser": [], "cookies": [1]}',
        '{"token": "TOKEN", "cookies": {"a": ["b"], "c": {}}}',
    ],
)
def test_an_exported_line_brings_nothing_that_cannot_be_used(line: str, start: Callable[..., Proxy]) -> None:
    proxy = start()
    proxy.app.pool.add([line.replace("TOKEN", cp.demo_token("alice"))])
    for account in proxy.app.pool.accounts():
        assert re.fullmatch(r"[0-9a-f-]{36}", account.row.device)
        assert account.row.browser in cp.browsers.BrowserType.__members__
        assert not re.search(r"[\r\n]", "".join(account.cookies.values()))
    assert proxy.ask().status_code == (200 if "TOKEN" in line else 503)


def test_accounts_are_checked_one_call_each(tmp_path: pathlib.Path, weather: Weather) -> None:
    env = {"DATA_DIR": str(tmp_path), "CHATGPT_BASE_URL": weather.url, "OPENAI_AUTH_URL": weather.url}
    alice, bob = cp.demo_token("alice"), cp.demo_token("bob")
    weather.refresh_tokens["rt_" + "r" * 40] = "carol"
    lines = f"{alice}\n{bob}\n{'rt_' + 'r' * 40}\n{'rt_' + 'd' * 40}\nlogin-free\n"
    assert run("accounts", "add", "-", env=env, stdin=lines).returncode == 0
    weather.dead.add(bob)
    checked = run("accounts", "check", "--json", env=env)
    assert checked.returncode == 1
    found = [json.loads(line) for line in checked.stdout.splitlines()]
    assert {one["email"]: one["works"] for one in found if one["email"]} == {
        "alice@demo.example": True, "bob@demo.example": False, "carol@demo.example": True,
    }  # fmt: skip
    assert (
        weather.count("/me") == 3 and [one["works"] for one in found].count(None) == 1
    )  # login-free: not asked
    listed = run("accounts", "list", env=env).stdout
    assert "expired: the upstream refused its token (401)" in listed and "dead: invalid_grant" in listed
    good = next(one["id"] for one in found if one["email"].startswith("alice"))
    assert run("accounts", "check", good, env=env).returncode == 0
    assert "no such account: acc-x" in run("accounts", "check", "acc-x", env=env).stderr


class SigningIn:
    """`chatproxy.py login` as a process that waits for a person."""

    def __init__(self, tmp_path: pathlib.Path, weather: Weather, *words: str) -> None:
        self.env = {"DATA_DIR": str(tmp_path), "OPENAI_AUTH_URL": weather.url, "BROWSER": "true"}
        self.process = subprocess.Popen(
            [sys.executable, str(SCRIPT), "login", *words],
            env={"PATH": os.environ["PATH"], "HOME": "/nonexistent", "PYTHONUNBUFFERED": "1"} | self.env,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip

    def until(self, pattern: str) -> str:
        assert self.process.stdout
        for line in self.process.stdout:
            if match := re.search(pattern, line):
                return match[0]
        raise AssertionError(f"ended: {self.process.stderr and self.process.stderr.read()}")


def test_a_person_signs_in_with_the_browser(tmp_path: pathlib.Path, weather: Weather) -> None:
    login = SigningIn(tmp_path, weather)
    address = login.until(r"http\S+/oauth/authorize\S+")
    back = httpx.get(address).headers["location"]
    assert back.startswith("http://localhost:1455/auth/callback?")
    for forged in (re.sub("state=[^&]+", "state=forged", back), back.partition("&state")[0]):
        assert httpx.get(forged.replace("localhost", "127.0.0.1")).status_code == 400
    assert httpx.get(back.replace("localhost", "127.0.0.1")).text.startswith("Signed in")
    out, err = login.process.communicate(timeout=20)
    assert login.process.returncode == 0 and "person@demo.example, plus, refresh" in out, err
    assert not any(token in out + err for token in weather.refresh_tokens)
    assert run("accounts", "list", env=login.env).stdout.strip().endswith("ready")
    form = weather.last("/oauth/token").body.read().decode()
    assert "grant_type=authorization_code" in form and "code_verifier=" in form


def test_a_person_signs_in_on_another_device(tmp_path: pathlib.Path, weather: Weather) -> None:
    login = SigningIn(tmp_path, weather, "--device")
    login.until(r"/codex/device and type DEMO-CODE")
    out, err = login.process.communicate(timeout=20)
    assert login.process.returncode == 0 and "person@demo.example" in out, err
    assert weather.count("/deviceauth/token") == 2


def test_a_sign_in_ends_cleanly(tmp_path: pathlib.Path, weather: Weather) -> None:
    weather.add("/deviceauth/token", *[status(403)] * 50)
    for words, pattern in (((), r"/oauth/authorize"), (("--device",), r"/codex/device")):
        login = SigningIn(tmp_path, weather, *words)
        login.until(pattern)
        login.process.send_signal(signal.SIGINT)
        _, err = login.process.communicate(timeout=30)
        assert login.process.returncode == 1 and "Aborted!" in err and "Traceback" not in err
    weather.add("/deviceauth/usercode", status(404))
    ended = run("login", "--device", env=login.env)
    assert ended.returncode == 2 and len(ended.stderr.splitlines()) == 1


def test_a_token_is_recognised_however_it_is_pasted() -> None:
    token, session = cp.demo_token("alice"), "eyJ" + "s" * 60 + "...."
    page = json.dumps({"user": {"name": "A, B"}, "accessToken": token, "expires": "2099"})
    for text in (token, f"Bearer {token}", f'"{token}"', f"\ufeff{token}\r", page):
        assert cp.recognise(text).access_token == token
    assert cp.recognise(f"{token},team-1").workspace == "team-1"
    assert cp.recognise(f"{cp.SESSION_COOKIE}={session}").secret == session


def test_missing_packages_are_named_in_one_line(tmp_path: pathlib.Path) -> None:
    (tmp_path / "curl_cffi").mkdir()
    (tmp_path / "curl_cffi" / "__init__.py").write_text("")
    ended = run("config", env={"PYTHONPATH": str(tmp_path)})
    assert ended.returncode == 1 and "pip install" in ended.stderr and len(ended.stderr.splitlines()) == 1


def test_the_log_tells_why_a_request_failed(tmp_path: pathlib.Path) -> None:
    env = {"DATA_DIR": str(tmp_path), "CHATGPT_BASE_URL": "http://127.0.0.1:9", "RETRY_TIMES": "0"}
    with Served(env=env) as served:
        body = {"model": "gpt-4o", "messages": [{"role": "user", "content": "hi"}]}
        assert httpx.post(f"{served.url}/v1/chat/completions", json=body, timeout=30).status_code == 502
        wait_until(lambda: "code=upstream_error" in "".join(served.lines))
        assert re.search(r"WARNING request .*reason=.*could not be reached", "".join(served.lines))


def test_the_readme_has_the_tables_that_the_code_makes() -> None:
    readme = (HERE / "README.md").read_text()
    for table in (cp.settings_table(), cp.errors_table(), cp.ROUTER.table()):
        assert table in readme


# --- http ------------------------------------------------------------------------------------------------------------


def talk(address: tuple[str, int], data: bytes, seconds: float = 5.0) -> bytes:
    """Sends bytes and reads until the server closes; what came when it does not."""
    with socket.create_connection(address, timeout=seconds) as sock:
        sock.sendall(data)
        got = b""
        with contextlib.suppress(TimeoutError, ConnectionResetError):
            while data := sock.recv(65536):
                got += data
        return got


HEALTH = b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n"
LAST = b"GET /health HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"


@pytest.mark.parametrize(
    "head",
    [
        b"POST /health HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\nContent-Length: 1\r\n\r\na",
        b"POST /health HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        b"POST /health HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n",
        b"POST /health HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        b"POST /health HTTP/1.0\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        b"POST /health HTTP/1.1\r\nHost: x\r\nContent-Length: +1\r\n\r\na",
        b"POST /health HTTP/1.1\r\nHost: x\r\nContent-Length: 0x1\r\n\r\na",
        b"POST /health HTTP/1.1\r\nHost: x\r\nContent-Length: 1, 1\r\n\r\na",
        b"POST /health HTTP/1.1\r\nHost: x\r\nContent-Length: -1\r\n\r\n",
        b"POST /health HTTP/1.1\r\nHost: x\r\nContent-Length: \xb2\r\n\r\na",
        b"GET /health HTTP/1.1\r\nHost : x\r\n\r\n",
        b"GET /health HTTP/1.1\r\nHost: x\r\nX: a\r\n b\r\n\r\n",
        b"GET /health HTTP/1.1\r\nHost: x\nX: a\r\n\r\n",
        b"GET /health HTTP/1.1\nHost: x\n\n",
        b"GET /health HTTP/1.1\r\nHost: x\r\nX: a\rb\r\n\r\n",
        b"GET /health HTTP/1.1\r\nHost: x\r\nX: a\x00b\r\n\r\n",
        b"GET /health HTTP/1.1\r\nHost: x\r\nHost: y\r\n\r\n",
        b"GET /health HTTP/1.1\r\n\r\n",
        b"GET /health HTTP/2.0\r\nHost: x\r\n\r\n",
        b"GET /health HTTP/1.10\r\nHost: x\r\n\r\n",
        b"GET /health http/1.1\r\nHost: x\r\n\r\n",
        b"GET /health\r\n\r\n",
        b"GET  /health HTTP/1.1\r\nHost: x\r\n\r\n",
        b"GET /hea lth HTTP/1.1\r\nHost: x\r\n\r\n",
        b"GET http://[ HTTP/1.1\r\nHost: x\r\n\r\n",
        b"GET /health HTTP/1.1\r\nHost: x\r\n: y\r\n\r\n",
        b"POST /tokens/session HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n1\r\naX\r\n0\r\n\r\n",
        b"POST /tokens/session HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n 1\r\na\r\n0\r\n\r\n",
        b"POST /tokens/session HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n1\na\r\n0\r\n\r\n",
    ],
)
def test_what_two_parsers_might_read_differently_is_refused(proxy: Proxy, head: bytes) -> None:
    got = talk(proxy.address, head + HEALTH)
    assert got.startswith(b"HTTP/1.1 400 ") and got.count(b"HTTP/1.1 ") == 1
    assert b"Connection: close" in got and b"Malformed HTTP" in got


def test_pipelined_requests_are_answered_in_order(proxy: Proxy) -> None:
    post = b"POST /tokens/session HTTP/1.1\r\nHost: x\r\nContent-Length: 3\r\n\r\nabc"
    got = talk(proxy.address, HEALTH + post + HEALTH + b"GET /none HTTP/1.1\r\nHost: x\r\n\r\n" + LAST)
    assert re.findall(rb"HTTP/1\.1 (\d+)", got) == [b"200", b"400", b"200", b"404", b"200"]


def test_a_request_may_arrive_byte_by_byte(proxy: Proxy) -> None:
    body = json.dumps(
        {"model": "gpt-4o", "messages": [{"role": "user", "content": "hé"}]}, ensure_ascii=False
    ).encode()
    half = len(body) // 2
    chunks = b"%x;ext=1\r\n%b\r\n%X\r\n%b\r\n0\r\nTrailer: x\r\n\r\n" % (
        half,
        body[:half],
        len(body) - half,
        body[half:],
    )
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nAuthorization: {KEY}\r\nTransfer-Encoding: chunked\r\n\r\n"
    with socket.create_connection(proxy.address, timeout=5) as sock:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for byte in head.encode() + chunks + LAST:
            sock.sendall(bytes([byte]))
        got = b"".join(iter(lambda: sock.recv(65536), b""))
    assert re.findall(rb"HTTP/1\.1 (\d+)", got) == [b"200", b"200"] and b"Hello wide world." in got


def test_a_client_may_ask_before_it_sends(proxy: Proxy) -> None:
    with socket.create_connection(proxy.address, timeout=5) as sock:
        sock.sendall(
            b"POST /tokens/session HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\nExpect: 100-continue\r\n\r\n"
        )
        assert sock.recv(100) == b"HTTP/1.1 100 Continue\r\n\r\n"
        sock.sendall(b"{}")
        assert sock.recv(65536).startswith(b"HTTP/1.1 401 ")
    large = (
        b"POST /tokens/session HTTP/1.1\r\nHost: x\r\nContent-Length: 65537\r\nExpect: 100-continue\r\n\r\n"
    )
    assert talk(proxy.address, large).startswith(b"HTTP/1.1 413 ")
    other = b"POST /health HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\nExpect: wonders\r\n\r\n"
    assert talk(proxy.address, other).startswith(b"HTTP/1.1 417 ")


def test_methods_are_answered_as_http_wants_it(proxy: Proxy) -> None:
    head = httpx.head(f"{proxy.url}/health")
    assert head.status_code == 200 and int(head.headers["content-length"]) > 10 and head.content == b""
    preflight = httpx.options(f"{proxy.url}/v1/chat/completions", headers={"Origin": "http://app.example"})
    assert preflight.status_code == 204 and preflight.headers["access-control-allow-origin"] == "*"
    assert "POST" in preflight.headers["access-control-allow-methods"]
    wrong = httpx.get(f"{proxy.url}/v1/chat/completions")
    assert wrong.status_code == 405 and wrong.headers["allow"] == "OPTIONS, POST"
    assert error_of(httpx.get(f"{proxy.url}/v1/nothing")) == (404, "not_found")


def test_limits_have_their_own_answers(start: Callable[..., Proxy]) -> None:
    proxy = start("alice", max_body_mb="1", read_timeout="1")
    line = b"GET /" + b"a" * 9000 + b" HTTP/1.1\r\nHost: x\r\n\r\n"
    many = b"GET / HTTP/1.1\r\nHost: x\r\n" + b"X: y\r\n" * 200 + b"\r\n"
    wide = b"GET / HTTP/1.1\r\nHost: x\r\nX: " + b"y" * 40000 + b"\r\n\r\n"
    post = f"POST /v1/responses HTTP/1.1\r\nHost: x\r\nAuthorization: {KEY}\r\n".encode()
    body = post + b"Content-Length: 1048577\r\n\r\n"
    chunk = post + b"Transfer-Encoding: chunked\r\n\r\nFFFFFF\r\n"
    slow = post + b"Content-Length: 10\r\n\r\nabc"
    for data, code in (
        (line, 414),
        (many, 431),
        (wide, 431),
        (body, 413),
        (chunk, 413),
        (slow, 408),
        (b"GET /", 408),
    ):
        assert talk(proxy.address, data).startswith(b"HTTP/1.1 %d " % code), code
    assert talk(proxy.address, b"") == b""


def test_a_dripping_client_is_cut_off(start: Callable[..., Proxy]) -> None:
    proxy = start("alice", read_timeout="1")
    began = time.monotonic()
    with socket.create_connection(proxy.address, timeout=5) as sock:
        with contextlib.suppress(OSError):
            for byte in b"GET /health HTTP/1.1\r\nHost: xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx":
                sock.sendall(bytes([byte]))
                if select_readable(sock, 0.1):
                    break
        assert sock.recv(100).startswith(b"HTTP/1.1 408 ")
    assert time.monotonic() - began < 3


def select_readable(sock: socket.socket, seconds: float) -> bool:
    return bool(select.select([sock], [], [], seconds)[0])


def test_an_empty_line_before_a_request_is_forgiven(proxy: Proxy) -> None:
    post = b"POST /tokens/session HTTP/1.1\r\nHost: x\r\nContent-Length: 3\r\n\r\nabc\r\n"
    assert talk(proxy.address, b"\r\n" + HEALTH + post + LAST).count(b"HTTP/1.1 ") == 3


def test_chunks_cannot_carry_endless_extensions(proxy: Proxy) -> None:
    head = b"POST /tokens/session HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"
    assert talk(proxy.address, head + b"1;%b\r\na\r\n" % (b"x" * 4000) * 3 + b"0\r\n\r\n").startswith(
        b"HTTP/1.1 400 "
    )
    assert talk(proxy.address, head + b"1;a\rb\r\na\r\n0\r\n\r\n").startswith(b"HTTP/1.1 400 ")


def test_an_absolute_target_is_its_path(proxy: Proxy) -> None:
    for target in (b"http://x/ping", b"HTTP://x/ping?a=b"):
        got = talk(proxy.address, b"GET " + target + b" HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        assert got.startswith(b"HTTP/1.1 200 ")
    got = talk(proxy.address, b"GET http://x?a=/ping HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
    assert got.startswith(b"HTTP/1.1 200 ") and b"Ollama" in got  # the path is /, not /ping


def test_http_1_0_is_closed_unless_asked_otherwise(proxy: Proxy) -> None:
    body = json.dumps({"model": "x", "stream": True, "messages": [{"role": "user", "content": "hi"}]})
    head = f"POST /v1/chat/completions HTTP/1.0\r\nAuthorization: Bearer {KEY}\r\nContent-Length: {len(body)}\r\n\r\n"
    got = talk(proxy.address, (head + body).encode())
    assert b"Transfer-Encoding" not in got and got.endswith(b"data: [DONE]\n\n")
    kept = b"GET /health HTTP/1.0\r\nConnection: keep-alive\r\n\r\n"
    assert talk(proxy.address, kept + b"GET /health HTTP/1.0\r\n\r\n").count(b"200 OK") == 2


def test_connections_over_the_limit_are_told_to_come_back(start: Callable[..., Proxy]) -> None:
    proxy = start("alice", max_connections="3")
    with contextlib.ExitStack() as stack:
        for _ in range(3):
            sock = stack.enter_context(socket.create_connection(proxy.address))
            sock.sendall(HEALTH)
            assert sock.recv(4096).startswith(b"HTTP/1.1 200 ")
        got = talk(proxy.address, HEALTH)
        assert got.startswith(b"HTTP/1.1 503 ") and b"Retry-After: " in got and b'"overloaded"' in got
    wait_until(lambda: httpx.get(f"{proxy.url}/health").status_code == 200)


def test_a_prefix_hides_everything_else(start: Callable[..., Proxy]) -> None:
    proxy = start("alice", api_prefix="s3cret")
    assert httpx.get(f"{proxy.url}/health").status_code == 404
    assert httpx.get(f"{proxy.url}/s3crethealth").status_code == 404
    assert httpx.get(f"{proxy.url}/s3cret/health").status_code == 200
    client = openai.OpenAI(base_url=f"{proxy.url}/s3cret/v1", api_key=KEY)
    answer = client.chat.completions.create(model="gpt-4o", messages=[{"role": "user", "content": "hi"}])
    assert answer.choices[0].message.content == "Hello wide world."


def test_https_is_served_with_a_certificate(start: Callable[..., Proxy], tmp_path: pathlib.Path) -> None:

    authority = trustme.CA()
    issued = authority.issue_cert("127.0.0.1")
    issued.cert_chain_pems[0].write_to_path(str(tmp_path / "cert.pem"))
    issued.private_key_pem.write_to_path(str(tmp_path / "key.pem"))
    proxy = start(
        "alice", tls_cert=str(tmp_path / "cert.pem"), tls_key=str(tmp_path / "key.pem"), read_timeout="1"
    )
    context = ssl.create_default_context()
    authority.configure_trust(context)
    url = proxy.url.replace("http:", "https:")
    with httpx.Client(verify=context, headers={"Authorization": f"Bearer {KEY}"}) as client:
        assert client.get(f"{url}/health").status_code == 200
        body = {"model": "gpt-4o", "stream": True, "messages": [{"role": "user", "content": "hi"}]}
        answer = client.post(f"{url}/v1/chat/completions", json=body)
        assert answer.text.endswith("data: [DONE]\n\n")
    assert not talk(proxy.address, HEALTH).startswith(b"HTTP/1.1 200")
    with context.wrap_socket(socket.create_connection(proxy.address), server_hostname="127.0.0.1") as sock:
        sock.settimeout(5)
        sock.sendall(b"GET / HT")
        assert sock.recv(100).startswith(b"HTTP/1.1 408 ")


@given(st.binary(max_size=300))
@example(b"GET / HTTP/1.1\r\nHost: x\r\nContent-Length: 99\r\n\r\n")
def test_any_bytes_are_a_head_or_an_api_error(data: bytes) -> None:
    try:
        method, target, version, headers = cp.parse_head(data)
    except cp.ApiError as error:
        assert error.status in (400, 414, 431)
    else:
        assert (
            method
            and target
            and version.startswith("HTTP/1.")
            and all(name == name.lower() for name in headers)
        )


PIECES = [
    b"GET",
    b"POST",
    b" ",
    b"/health",
    b"HTTP/1.1",
    b"\r\n",
    b"\n",
    b"\r\n\r\n",
    b"Host: x",
    b"Content-Length: ",
    b"5",
]
PIECES += [b"Transfer-Encoding: chunked", b"0", b"\x00", b":", b"\xff", b"Expect: 100-continue", b"A" * 50]


@hypothesis_settings(max_examples=150)
@given(st.lists(st.sampled_from(PIECES) | st.binary(max_size=5), max_size=20))
def test_random_bytes_never_fail_or_hang_the_server(fuzzed: Proxy, pieces: list[bytes]) -> None:
    with socket.create_connection(fuzzed.address, timeout=5) as sock:
        sock.sendall(b"".join(pieces))
        sock.shutdown(socket.SHUT_WR)
        got = b"".join(iter(lambda: sock.recv(65536), b""))
    assert not re.search(rb"HTTP/1\.1 5\d\d", got)


@pytest.fixture(scope="module")
def fuzzed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Proxy]:
    proxy = Proxy(tmp_path_factory.mktemp("fuzzed"), "http://127.0.0.1:9", [], read_timeout="2")
    yield proxy
    proxy.close()


def test_events_that_arrive_together_leave_in_one_write(
    start: Callable[..., Proxy], weather: Weather
) -> None:
    proxy = start("alice")
    weather.add(
        "/conversation", raw_stream(b"".join(weather.say({"model": "gpt-4o"}, [f" w{i}" for i in range(50)])))
    )
    body = json.dumps({"model": "gpt-4o", "stream": True, "messages": [{"role": "user", "content": "hi"}]})
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nAuthorization: {KEY}\r\nConnection: close\r\n"
    got = talk(proxy.address, f"{head}Content-Length: {len(body)}\r\n\r\n{body}".encode())
    sizes = re.findall(rb"\r\n([0-9a-f]+)\r\n(?=data: )", got)
    assert got.count(b'"content":" w') == 50 and len(sizes) == 1


# --- keys ------------------------------------------------------------------------------------------------------------


def test_the_pool_answers_its_keys_in_either_form_and_nobody_else(proxy: Proxy) -> None:
    assert proxy.ask().status_code == 200
    body = {"model": "gpt-4o", "messages": [{"role": "user", "content": "hi"}]}
    bare = httpx.post(f"{proxy.url}/v1/chat/completions", json=body, headers={"Authorization": KEY})
    assert bare.status_code == 200
    huge, deep, shape = (
        b'{"exp":' + b"9" * 4000 + b"}",
        b"[" * 3000 + b"]" * 3000,
        b'{"https://api.openai.com/auth": 5}',
    )
    crafted = [
        f"eyJhbGciOiJub25lIn0.{base64.urlsafe_b64encode(one).decode()}.0000000000"
        for one in (huge, deep, shape)
    ]
    for key in (None, "wrong", KEY + "x", KEY[:-1], "eyJhbGciOiJub25lIn0.bm90anNvbg.x", *crafted):
        assert error_of(proxy.ask(key=key)) == (401, "invalid_api_key")


def test_a_caller_may_bring_a_token_and_is_answered_by_that_account(
    start: Callable[..., Proxy], weather: Weather
) -> None:
    proxy = start("alice")
    token = cp.demo_token("guest")
    assert proxy.ask(key=f"{token},team-7").status_code == 200
    call = weather.last("/conversation")
    assert (
        call.headers["authorization"] == f"Bearer {token}" and call.headers["chatgpt-account-id"] == "team-7"
    )
    assert "guest@demo.example" not in proxy.states()
    weather.dead.add(token)
    assert error_of(proxy.ask(key=f"{token},team-7")) == (401, "invalid_api_key")
    refresh = "R" * 45
    weather.refresh_tokens[refresh] = "roaming"
    assert proxy.ask(key=refresh).status_code == 200
    assert proxy.ask(key=refresh).status_code == 200
    assert weather.count("/oauth/token") == 1
    closed = start("alice", folder="closed", allow_direct_tokens="false")
    assert error_of(closed.ask(key=cp.demo_token("guest"))) == (401, "invalid_api_key")


def test_a_guests_rotated_refresh_token_outlives_the_process(
    start: Callable[..., Proxy], weather: Weather
) -> None:
    refresh = "G" * 45
    weather.refresh_tokens[refresh] = "roaming"
    assert start().ask(key=refresh).status_code == 200
    again = start()
    guest = guest_of(again, refresh)
    guest.row = cp.replace(guest.row, access_token="")
    assert again.ask(key=refresh).status_code == 200
    assert again.app.pool.accounts() == []


def test_an_sk_key_goes_to_openai_unchanged(start: Callable[..., Proxy], weather: Weather) -> None:
    proxy = start("alice")
    client = openai.OpenAI(base_url=f"{proxy.url}/v1", api_key="sk-mine", max_retries=0)
    answer = client.chat.completions.create(
        model="gpt-9", messages=[{"role": "user", "content": "hi"}], temperature=0.5
    )
    assert "stand-in for api.openai.com" in str(answer.choices[0].message.content)
    call = weather.last("/v1/chat/completions")
    assert call.headers["authorization"] == "Bearer sk-mine" and call.json()["temperature"] == 0.5
    streamed = client.chat.completions.create(
        model="gpt-9", messages=[{"role": "user", "content": "hi"}], stream=True
    )
    assert "stand-in" in "".join(chunk.choices[0].delta.content or "" for chunk in streamed)
    weather.add("/embeddings", status(418, {"error": "teapot"}, x_ratelimit_left="1"))
    other = httpx.post(f"{proxy.url}/v1/embeddings", json={}, headers={"Authorization": "Bearer sk-mine"})
    assert (other.status_code, other.json()) == (418, {"error": "teapot"})
    assert other.headers["x-ratelimit-left"] == "1"
    get = b"GET /v1/models?include[]=a&flag HTTP/1.1\r\nHost: x\r\nAuthorization: sk-mine\r\nConnection: close\r\n\r\n"
    assert talk(proxy.address, get).startswith(b"HTTP/1.1 404 ")
    assert (weather.seen[-1].path, weather.seen[-1].raw_query) == ("/v1/models", "include[]=a&flag")
    head = get.replace(b"GET", b"HEAD")
    assert talk(proxy.address, head).startswith(b"HTTP/1.1 404 ") and talk(proxy.address, head).endswith(
        b"\r\n\r\n"
    )
    climbing = get.replace(b"/v1/models", b"/v1/../../x")
    assert (
        talk(proxy.address, climbing).startswith(b"HTTP/1.1 404 ") and weather.seen[-1].path == "/v1/models"
    )


def test_without_any_key_set_nobody_needs_one_and_the_call_is_login_free(
    start: Callable[..., Proxy], weather: Weather
) -> None:
    proxy = start("alice", authorization="")
    assert proxy.ask(key=None).status_code == 200
    call = weather.last("/conversation")
    assert call.path == "/backend-anon/f/conversation" and "authorization" not in call.headers
    assert call.json()["model"] == "auto"


def test_an_api_users_token_opens_the_pool_and_closes_the_door_behind(
    start: Callable[..., Proxy], tmp_path: pathlib.Path
) -> None:
    proxy = start("alice", authorization="")
    assert proxy.ask(key=None).status_code == 200
    env = {"DATA_DIR": str(tmp_path / "data")}
    user, token = run("users", "add", "bob", env=env).stdout.split()
    wait_until(lambda: proxy.ask(key=token).status_code == 200, 3)
    assert error_of(proxy.ask(key=None)) == (401, "invalid_api_key")
    assert "bob" in run("users", "list", env=env).stdout
    assert run("users", "remove", user, env=env).returncode == 0
    wait_until(lambda: proxy.ask(key=token).status_code == 401, 3)


def test_admin_routes_want_the_admin_key_or_this_machine(start: Callable[..., Proxy]) -> None:
    upload = {"text": cp.demo_token("new")}
    proxy = start()
    for key in (None, "wrong", KEY):
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        assert error_of(httpx.post(f"{proxy.url}/tokens/upload", data=upload, headers=headers)) == (
            401,
            "invalid_api_key",
        )
    first = start(folder="first", admin_key="")
    headers = {"Authorization": f"Bearer {KEY}"}
    assert httpx.post(f"{first.url}/tokens/upload", data=upload, headers=headers).status_code == 200
    none = start(folder="none", admin_key="", authorization="")
    assert httpx.post(f"{none.url}/tokens/upload", data=upload).status_code == 200
    for header in (
        "Origin",
        "X-Forwarded-For",
    ):  # a web page in a browser here, somebody behind a reverse proxy
        assert httpx.post(
            f"{none.url}/tokens/upload", data=upload, headers={header: "http://x"}
        ).status_code in (401, 403)


def test_tokens_are_uploaded_as_chat2api_does_it(start: Callable[..., Proxy]) -> None:
    proxy = start()
    headers = {"Authorization": f"Bearer {ADMIN}"}
    text = f"# two\n{cp.demo_token('alice')}\n\n{cp.demo_token('bob')} # second\nnonsense\n"
    answer = httpx.post(f"{proxy.url}/tokens/upload", data={"text": text}, headers=headers)
    told = {"status": "success", "tokens_count": 2, "stored": 2, "known": 0}
    assert answer.json() == told | {"faults": ["line 5: not a token"]}
    upload = {"text": (None, f"{cp.demo_token('carol')}\n{cp.demo_token('bob')}")}
    multipart = httpx.post(f"{proxy.url}/tokens/upload", files=upload, headers=headers)
    told = {"status": "success", "tokens_count": 3, "stored": 2, "known": 1, "faults": []}
    assert multipart.json() == told
    for data in ({"text": "nonsense"}, {"other": "x"}):
        assert httpx.post(f"{proxy.url}/tokens/upload", data=data, headers=headers).status_code == 400
    assert proxy.ask().status_code == 200


def test_an_upload_may_be_as_large_as_a_body(start: Callable[..., Proxy]) -> None:
    proxy = start()
    text = "\n".join(cp.demo_token(f"a{i}") for i in range(3000))
    assert len(text) > 1 << 20
    for options in ({"data": {"text": text}}, {"files": {"text": (None, text)}}):
        said = admin(proxy, "POST", "/tokens/upload", **options).json()
        assert (said["stored"], said["faults"]) == (3000, [])


@given(st.text(), st.text())
@example("\ud800bad", "\n\x1b[31mfake\nrow")
def test_what_a_token_claims_can_be_shown_anywhere(email: str, plan: str) -> None:
    said = {"https://api.openai.com/profile": {"email": email}, "exp": 1e10}
    said["https://api.openai.com/auth"] = {"chatgpt_plan_type": plan, "user_id": "u"}
    payload = base64.urlsafe_b64encode(json.dumps(said).encode()).decode().rstrip("=")
    row = cp.recognise(f"eyJhbGciOiJub25lIn0.{payload}.x")
    assert row.email.isprintable() and row.plan.isprintable() and len(row.plan) <= 32
    row.email.encode()


def admin(proxy: Proxy, method: str, path: str, key: str | None = ADMIN, **options: Any) -> httpx.Response:
    """A call of the administrator's."""
    headers = options.pop("headers", {}) | ({"Authorization": f"Bearer {key}"} if key else {})
    return httpx.request(method, proxy.url + path, headers=headers, timeout=60, **options)


def test_the_pool_is_looked_after_as_chat2api_does_it(start: Callable[..., Proxy], weather: Weather) -> None:
    alice, bob = cp.demo_token("alice"), cp.demo_token("bob")
    proxy = start(alice)
    assert admin(proxy, "GET", f"/tokens/add/{bob}").json()["tokens_count"] == 2
    assert error_of(admin(proxy, "GET", "/tokens/add/nonsense"))[0] == 400
    assert admin(proxy, "POST", "/tokens/error").json() == {"status": "success", "error_tokens": []}
    weather.dead.add(bob)
    for _ in range(20):
        proxy.say()
    dead = admin(proxy, "POST", "/tokens/error").json()["error_tokens"]
    assert [proxy.app.pool.find(id).row.email for id in dead] == ["bob@demo.example"]  # type: ignore[union-attr]
    cleared = admin(proxy, "POST", "/tokens/clear")
    assert cleared.json() == {"status": "success", "tokens_count": 0}
    assert not proxy.store.accounts() and error_of(proxy.ask()) == (503, "no_account")
    paths = [("GET", "/tokens/add/x"), ("GET", "/tokens/list"), ("GET", "/admin/users")]
    paths += [
        ("POST", f"/tokens/{name}") for name in ("upload", "clear", "error", "remove", "disable", "check")
    ]
    for method, path in [*paths, ("POST", "/admin/users/add"), ("POST", "/admin/users/delete")]:
        for key in (None, "wrong", KEY):
            assert admin(proxy, method, path, key).status_code == 401, (method, path)
        proxy.app.keys.guesses._wrong.clear()


def test_the_list_tells_who_did_what(start: Callable[..., Proxy], weather: Weather) -> None:
    proxy = start("alice", "bob", random_token="false", retry_times="0")
    proxy.say()
    wait = status(429, {"detail": {"code": "rate_limit", "clears_in": 60}})
    weather.add("/conversation", status(500), wait)
    assert proxy.ask().status_code == 502
    assert proxy.ask().status_code == 429
    list(proxy.stream())
    half = list(weather.say({"model": "m"}, ["one", " two"]))[:4]
    weather.add("/conversation", cut_stream(*half))
    assert "error" in proxy.ask(stream=True).text
    said = admin(proxy, "GET", "/tokens/list").json()
    found = {one["email"][:5].strip("@"): one for one in said["accounts"]}
    assert said["total"] == said["matching"] == 2 and sum(said["states"].values()) == 2
    counted = sum(one["answers"] for one in found.values()), sum(one["failures"] for one in found.values())
    assert counted == (2, 3)
    now = said["hours"][-1]
    assert (now["answers"], now["failures"]) == (2, 3) and len(said["hours"]) == 24
    limited_one = next(one for one in found.values() if one["state"] == "waiting")
    assert re.fullmatch(r"waiting until \d\d:\d\d \(gpt-4o\)", limited_one["told"])
    assert all(one["used"].startswith("20") for one in found.values())
    tokens = [row.secret for row in proxy.store.accounts()]
    assert not any(token in json.dumps(said) for token in tokens)
    # Another process sees it, and so does the next one.
    proxy.app.ledger.save()
    kept = cp.Ledger(proxy.store)
    assert {a.id: kept.today(a.id)[:2] for a in proxy.app.pool.accounts()} == {
        one["id"]: (one["answers"], one["failures"]) for one in found.values()
    }
    assert [tally[:2] for _, tally in kept.hours()] == [(h["answers"], h["failures"]) for h in said["hours"]]
    assert admin(proxy, "GET", "/tokens/list?q=BOB&limit=1").json()["matching"] == 1
    assert admin(proxy, "GET", "/tokens/list?state=dead").json()["accounts"] == []
    assert len(admin(proxy, "GET", "/tokens/list?offset=1&limit=5").json()["accounts"]) == 1
    for wrong in ("offset=-1", "limit=501", "limit=x"):
        assert error_of(admin(proxy, "GET", f"/tokens/list?{wrong}")) == (400, "invalid_request_error")


def test_a_new_day_begins_with_nothing_counted(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = cp.Store(str(tmp_path))
    noon = time.mktime((2026, 11, 20, 12, 30, 0, 0, 0, -1))
    monkeypatch.setattr(cp.time, "time", lambda: noon)
    ledger = cp.Ledger(store)
    ledger.count("acc-1", answers=1)
    ledger.count("acc-1", failures=2)
    assert ledger.admit("user-1", 1) == 0 and ledger.admit("user-1", 1) == 11.5 * 3600
    monkeypatch.setattr(cp.time, "time", lambda: noon + 13 * 3600)
    ledger.count("acc-2", answers=5)
    assert ledger.today("acc-1") == cp.Tally(used=noon) and ledger.admit("user-1", 1) == 0
    hours = [tally[:2] for _, tally in ledger.hours()]
    assert hours[-1] == (5, 0) and hours[-14] == (1, 2) and sum(map(sum, hours)) == 8
    ledger.save()
    later = cp.Ledger(store)
    assert later.today("acc-1") == cp.Tally(used=noon) and later.today("acc-2").answers == 5
    assert [tally[:2] for _, tally in later.hours()] == hours
    store.prune(noon + 90 * 86400)
    assert cp.Ledger(store).today("acc-1").used == noon  # when it was last used is not forgotten


def test_accounts_are_disabled_enabled_removed_and_checked(
    start: Callable[..., Proxy], weather: Weather
) -> None:
    weather.refresh_tokens["rt_" + "r" * 40] = "carol"
    proxy = start("alice", "bob", "rt_" + "r" * 40, cp.LOGIN_FREE)
    ids = {account.row.email[:3]: account.id for account in proxy.app.pool.accounts()}
    body = {"ids": [ids["ali"], ids[""], "acc-unknown"]}
    assert admin(proxy, "POST", "/tokens/disable", json=body).json()["changed"] == 2
    assert proxy.states()["alice@demo.example"] == "disabled"
    proxy.app.pool.reload()
    for _ in range(10):
        proxy.say(model="gpt-4o")
    alice = next(row.secret for row in proxy.store.accounts() if row.id == ids["ali"])
    asked = [one for one in weather.seen if one.path.endswith("/conversation")]
    assert len(asked) == 10 and not any(alice in one.headers["authorization"] for one in asked)
    proxy.app.pool.add([cp.demo_token("alice")])  # which does not undo it
    assert proxy.states()["alice@demo.example"] == "disabled"
    enable = {"ids": [ids["ali"]], "disabled": False}
    assert admin(proxy, "POST", "/tokens/disable", json=enable).json()["changed"] == 1
    assert proxy.states()["alice@demo.example"] == "ready"
    weather.dead.add(proxy.app.pool.find(ids["bob"]).row.secret)  # type: ignore[union-attr]
    everyone = {"ids": [account.id for account in proxy.app.pool.accounts()]}
    results = admin(proxy, "POST", "/tokens/check", json=everyone).json()["results"]
    assert results[ids["ali"]] == "" and results[ids["bob"]].startswith("expired: ")
    assert results[ids[""]] is None and proxy.app.pool.find(ids[""]).row.state == "disabled"  # type: ignore[union-attr]
    mine = proxy.ask(key=proxy.app.pool.find(ids["ali"]).row.secret)  # type: ignore[union-attr]
    assert mine.status_code == 200
    proxy.app.pool.disable([ids["ali"]], True)
    refused = proxy.ask(key=proxy.app.pool.find(ids["ali"]).row.secret)  # type: ignore[union-attr]
    assert error_of(refused) == (401, "invalid_api_key") and "disabled" in refused.text
    removed = admin(proxy, "POST", "/tokens/remove", json={"ids": [ids["ali"], "acc-unknown"]}).json()
    assert removed["removed"] == 1 and ids["ali"] not in {row.id for row in proxy.store.accounts()}
    for wrong in ({}, {"ids": "x"}, {"ids": [5]}, {"ids": ["x"] * 101}):
        assert admin(proxy, "POST", "/tokens/check", json=wrong).status_code == 400


def test_a_renewal_does_not_enable_an_account(start: Callable[..., Proxy], weather: Weather) -> None:
    proxy, account = renewing(start, weather)
    weather.add("/oauth/token", lambda request: time.sleep(0.5))
    account.row = dataclasses.replace(account.row, expires=time.time() + 100)
    proxy.app.renewals.renew_due(time.time())
    assert admin(proxy, "POST", "/tokens/disable", json={"ids": [account.id]}).json()["changed"] == 1
    wait_until(lambda: account.row.expires > time.time() + 1000)
    assert account.row.state == "disabled" and error_of(proxy.ask()) == (503, "no_account")


def test_a_token_is_exchanged_for_its_owner(start: Callable[..., Proxy], weather: Weather) -> None:
    refresh, session = "rt_" + "r" * 40, "eyJhbGciOiJkaXIifQ..a.b.c"
    weather.refresh_tokens[refresh], weather.session_tokens[session] = "alice", "bob"
    proxy = start()
    said = admin(proxy, "POST", "/auth/refresh", KEY, json={"refresh_token": refresh}).json()
    assert said["email"] == "alice@demo.example" and said["plan"] == "plus" and said["expires_in"] > 86000
    assert said["access_token"] == said["accessToken"] and said["refresh_token"] in weather.refresh_tokens
    assert proxy.ask(key=said["access_token"]).status_code == 200
    # The one that was replaced is worth nothing any more, here as there.
    old = admin(proxy, "POST", "/auth/refresh", KEY, json={"refresh_token": refresh})
    assert error_of(old) == (401, "invalid_api_key") and said["refresh_token"] not in old.text
    newer = admin(proxy, "POST", "/auth/refresh", KEY, json={"refresh_token": said["refresh_token"]})
    assert newer.status_code == 200 and newer.headers["cache-control"] == "no-store"
    said = admin(proxy, "POST", "/auth/session", KEY, json={"session_token": session}).json()
    assert said["email"] == "bob@demo.example" and "refresh_token" not in said
    unknown = {"refresh_token": "rt_" + "u" * 40}
    assert error_of(admin(proxy, "POST", "/auth/refresh", KEY, json=unknown)) == (401, "invalid_api_key")
    assert admin(proxy, "POST", "/auth/refresh", None, json=unknown).status_code == 401
    for wrong in (
        {},
        {"refresh_token": 5},
        {"refresh_token": session},
        {"refresh_token": cp.demo_token("x")},
    ):
        assert error_of(admin(proxy, "POST", "/auth/refresh", KEY, json=wrong))[0] == 400
    assert not proxy.app.pool.accounts()


def test_a_pool_accounts_owner_who_refreshes_leaves_it_in_the_pool(
    start: Callable[..., Proxy], weather: Weather
) -> None:
    refresh = "rt_" + "r" * 40
    weather.refresh_tokens[refresh] = "alice"
    proxy = start(refresh)
    said = admin(proxy, "POST", "/auth/refresh", KEY, json={"refresh_token": refresh}).json()
    (row,) = proxy.store.accounts()
    assert row.secret == said["refresh_token"] and proxy.ask().status_code == 200


def test_users_are_administered_as_chatgpt_api_server_does_it(start: Callable[..., Proxy]) -> None:
    proxy = start("alice")
    made = httpx.post(f"{proxy.url}/admin/users/add", json={"admin_key": ADMIN}).json()
    token = made["token"]
    assert proxy.ask(key=token).status_code == 200 and proxy.say("hi")
    listed = httpx.get(f"{proxy.url}/admin/users", params={"admin_key": ADMIN}).json()["users"]
    assert [one["user_id"] for one in listed] == [made["user_id"]] and token not in json.dumps(listed)
    assert admin(proxy, "GET", "/admin/users").json()["users"][0]["requests"] == 1
    for wrong in ("x", None, 5, ""):
        refused = httpx.post(f"{proxy.url}/admin/users/add", json={"admin_key": wrong})
        assert refused.status_code == 401 and isinstance(refused.json()["error"], str)
        assert ADMIN not in refused.text
    proxy.app.keys.guesses._wrong.clear()
    refused = httpx.get(f"{proxy.url}/admin/users", params={"admin_key": "wrong"})
    assert refused.status_code == 401 and ADMIN not in refused.text
    assert httpx.post(f"{proxy.url}/admin/users/add", content=b"{").status_code == 401
    assert admin(proxy, "POST", "/admin/users/add", content=b"{").status_code == 400
    body = {"admin_key": ADMIN, "user_id": made["user_id"]}
    gone = httpx.post(f"{proxy.url}/admin/users/delete", json=body)
    assert gone.json() == {"message": "User deleted"} and proxy.ask(key=token).status_code == 401
    assert httpx.post(f"{proxy.url}/admin/users/delete", json=body).status_code == 404
    for bad in ({"name": 5}, {"limit": -1}, {"limit": "5"}, {"name": "a\nb"}):
        assert admin(proxy, "POST", "/admin/users/add", json=bad).status_code == 400
    # The key is named in the query of these routes alone.
    assert httpx.get(f"{proxy.url}/tokens/list", params={"admin_key": ADMIN}).status_code == 401


def test_an_api_users_day_has_a_limit_and_is_counted(start: Callable[..., Proxy], weather: Weather) -> None:
    proxy = start("alice")
    made = admin(proxy, "POST", "/admin/users/add", json={"name": "bob", "limit": 3}).json()
    other = admin(proxy, "POST", "/admin/users/add", json={"name": "eve"}).json()
    assert proxy.ask(key=made["token"]).status_code == 200
    first = admin(proxy, "GET", "/admin/users").json()["users"][0]
    assert (first["requests"], first["limit"]) == (1, 3) and first["tokens"] > 5 and first["used"]
    assert "[DONE]" in proxy.ask(key=made["token"], stream=True).text
    second = admin(proxy, "GET", "/admin/users").json()["users"][0]
    assert second["tokens"] == 2 * first["tokens"]
    headers = {"Authorization": f"Bearer {made['token']}"}
    for _ in range(3):  # what costs the upstream nothing is not counted
        assert httpx.get(f"{proxy.url}/v1/models", headers=headers).status_code == 200
    body = {"model": "gpt-4o", "input": "hi"}
    assert httpx.post(f"{proxy.url}/v1/responses", json=body, headers=headers).status_code == 200
    over = proxy.ask(key=made["token"])
    assert error_of(over) == (429, "rate_limit_exceeded") and 0 < int(over.headers["retry-after"]) <= 90000
    third = admin(proxy, "GET", "/admin/users").json()["users"][0]
    assert third["requests"] == 3 and third["tokens"] == 3 * first["tokens"]
    assert proxy.ask(key=other["token"]).status_code == 200 and proxy.say()
    drawn = {"Authorization": f"Bearer {other['token']}"}
    weather.obeys = True
    image = httpx.post(f"{proxy.url}/v1/images/generations", json={"prompt": "a fish"}, headers=drawn)
    assert image.status_code == 200
    eve = admin(proxy, "GET", "/admin/users").json()["users"][1]
    assert eve["requests"] == 2 and eve["tokens"] > first["tokens"]
    proxy.app.ledger.save()
    listed = run("users", "list", env={"DATA_DIR": proxy.settings.data_dir}).stdout
    assert re.search(r"bob +3 +\d+ +3  20", listed) and re.search(r"eve +2 +\d+ +-  20", listed)
    assert run("users", "add", "evil\nname", env={"DATA_DIR": proxy.settings.data_dir}).returncode == 2


def session(proxy: Proxy, key: str = ADMIN, **headers: str) -> httpx.Response:
    return httpx.post(f"{proxy.url}/tokens/session", json={"key": key}, headers=headers)


def test_an_administrator_signs_in_on_the_page(start: Callable[..., Proxy]) -> None:
    proxy = start("alice", api_prefix="p")
    url = f"{proxy.url}/p"

    def call(method: str, path: str, **headers: str) -> int:
        return httpx.request(method, url + path, headers={"Cookie": cookie} | headers).status_code

    signed = httpx.post(f"{url}/tokens/session", json={"key": ADMIN})
    assert signed.status_code == 204
    cookie, *facts = signed.headers["set-cookie"].split("; ")
    assert set(facts) == {"Path=/p", "Max-Age=43200", "HttpOnly", "SameSite=Strict"}
    secure = httpx.post(f"{url}/tokens/session", json={"key": ADMIN}, headers={"X-Forwarded-Proto": "https"})
    assert secure.headers["set-cookie"].endswith("; Secure")
    own, other = {"Origin": proxy.url}, {"Origin": "http://evil.example"}
    assert call("GET", "/tokens/list") == 200
    assert call("GET", "/tokens/list", Authorization="Basic eDp5") == 200  # a reverse proxy's
    assert call("POST", "/tokens/error", **own) == 200
    assert call("POST", "/tokens/error", **{"Sec-Fetch-Site": "same-origin"}) == 200
    for headers in ({}, other, {"Origin": "null"}, own | {"Sec-Fetch-Site": "cross-site"}):
        assert call("POST", "/tokens/clear", **headers) == 401, headers
    for headers in (other, {"Sec-Fetch-Site": "same-site"}):
        assert call("GET", "/tokens/list", **headers) == 401
    # A GET that changes something takes no cookie at all.
    assert call("GET", f"/tokens/add/{cp.demo_token('bob')}", **own) == 401
    assert len(proxy.app.pool.accounts()) == 1
    digest = next(iter(proxy.app.keys._sessions))
    proxy.app.keys._sessions[digest] -= 12 * 3600
    assert call("GET", "/tokens/list") == 401
    proxy.app.keys._sessions[digest] += 12 * 3600
    assert call("GET", "/tokens/list") == 200
    assert call("DELETE", "/tokens/session", **own) == 204 and call("GET", "/tokens/list") == 401
    assert httpx.post(f"{url}/tokens/session", json={"key": ADMIN}, headers=other).status_code == 401
    for body in ({"key": "wrong"}, {"key": None}, {}):
        refused = httpx.post(f"{url}/tokens/session", json=body)
        assert refused.status_code == 401 and "set-cookie" not in refused.headers


def test_guessing_keys_becomes_slow(start: Callable[..., Proxy]) -> None:
    proxy = start("alice")

    def seconds(call: Callable[[], httpx.Response], code: int = 401) -> float:
        began = time.monotonic()
        assert call().status_code == code
        return time.monotonic() - began

    guesses = [
        lambda: session(proxy, "wrong"),
        lambda: proxy.ask(key="wrong"),
        lambda: proxy.ask(key="worse"),
    ]
    assert sum(seconds(guess) for guess in [*guesses, *guesses[:2]]) < 1
    for guess in guesses:
        assert 1 <= seconds(guess) < 2
    assert seconds(lambda: session(proxy), 204) < 0.9 and seconds(proxy.ask, 200) < 0.9
    for times in proxy.app.keys.guesses._wrong.values():
        times[:] = [one - 60 for one in times]
    assert seconds(guesses[0]) < 0.9


def test_without_a_key_only_this_machine_and_its_own_pages_administer(start: Callable[..., Proxy]) -> None:
    proxy = start("alice", authorization="", admin_key="")
    host = proxy.url.partition("://")[2]
    port = host.rpartition(":")[2]
    good: list[dict[str, str]] = [{}, {"Origin": proxy.url}, {"Sec-Fetch-Site": "same-origin"}]
    good.append({"Host": f"localhost:{port}", "Origin": f"http://localhost:{port}"})
    for headers in good:
        said = admin(proxy, "GET", "/tokens/list", None, headers=headers)
        assert said.status_code == 200 and said.json()["keyless"] is True, headers
    evil = "http://evil.example"
    for headers in (
        {"Origin": evil}, {"Origin": "null"}, {"Sec-Fetch-Site": "cross-site"}, {"X-Forwarded-For": "1.2.3.4"},
        {"Via": "1.1 x"}, {"X-Forwarded-Host": "x"}, {"X-Real-IP": "1.2.3.4"},
        {"Host": f"evil.example:{port}"}, {"Host": f"evil.example:{port}", "Origin": f"{evil}:{port}"},
    ):  # fmt: skip
        assert admin(proxy, "GET", "/tokens/list", None, headers=headers).status_code in (401, 403), headers
        token = cp.demo_token("bob")
        assert admin(proxy, "GET", f"/tokens/add/{token}", None, headers=headers).status_code in (401, 403)
    linked = admin(proxy, "GET", "/tokens/add/x", None, headers={"Sec-Fetch-Site": "none"})
    assert linked.status_code == 401


# --- the store -------------------------------------------------------------------------------------------------------


def test_two_processes_write_the_store_at_once(tmp_path: pathlib.Path) -> None:
    env = {"DATA_DIR": str(tmp_path), "PATH": os.environ["PATH"], "HOME": "/nonexistent"}
    words = [["accounts", "add", "-"], ["accounts", "add", "-"], ["users", "add", "bob"]]
    writers = [
        subprocess.Popen(
            [sys.executable, str(SCRIPT), *one], env=env, stdin=subprocess.PIPE, text=True, stdout=-3
        )
        for one in [*words, *words]
    ]
    for number, writer in enumerate(writers):
        assert writer.stdin
        writer.stdin.write("\n".join(cp.demo_token(f"a{number}-{i}") for i in range(150)))
        writer.stdin.close()
    assert [writer.wait(60) for writer in writers] == [0] * 6
    store = cp.Store(str(tmp_path))
    assert len(store.accounts()) == 600 and len(store.users()) == 2


def test_the_store_is_private_and_refuses_a_newer_schema(tmp_path: pathlib.Path) -> None:
    folder = tmp_path / "a" / "b"
    cp.Store(str(folder)).close()
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert all(stat.S_IMODE(file.stat().st_mode) == 0o600 for file in folder.iterdir())
    with sqlite3.connect(folder / "chatproxy.db") as db:
        db.execute("PRAGMA user_version=99")
    with pytest.raises(cp.StoreError, match="newer"):
        cp.Store(str(folder))


def test_a_killed_process_loses_nothing_that_was_acknowledged(tmp_path: pathlib.Path) -> None:
    env = {"DATA_DIR": str(tmp_path), "ADMIN_KEY": ADMIN, "LOG_LEVEL": "info"}
    stored = 0
    for round_ in range(4):
        with Served(env=env) as served:
            for number in range(5):
                token = cp.demo_token(f"a{round_}-{number}")
                headers = {"Authorization": f"Bearer {ADMIN}"}
                answer = httpx.post(f"{served.url}/tokens/upload", data={"text": token}, headers=headers)
                stored += 1
                assert answer.json()["tokens_count"] == stored
            served.process.kill()
    assert len(run("accounts", "list", env=env).stdout.splitlines()) == stored


def test_a_running_server_takes_in_what_another_process_adds(
    start: Callable[..., Proxy], tmp_path: pathlib.Path
) -> None:
    proxy = start()
    assert error_of(proxy.ask()) == (503, "no_account")
    env = {"DATA_DIR": str(tmp_path / "data")}
    began = time.monotonic()
    assert run("accounts", "add", cp.demo_token("late"), env=env).returncode == 0
    wait_until(lambda: proxy.ask().status_code == 200)
    assert time.monotonic() - began < 4
    listed = run("accounts", "list", env=env).stdout.split()
    assert run("accounts", "remove", listed[0], env=env).returncode == 0
    wait_until(lambda: proxy.ask().status_code == 503, 3)


# --- the pool --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("code", [401, 403, 429, 500, 502, 503])
def test_another_account_answers_when_one_is_refused(
    start: Callable[..., Proxy], weather: Weather, code: int
) -> None:
    proxy = start("alice", "bob", conversation_only="true")
    weather.add("/conversation", status(code, {"detail": "no"}), plain(weather))
    assert proxy.ask().status_code == 200
    first, second = [r.headers["authorization"] for r in weather.seen if r.path.endswith("/conversation")]
    assert first != second


def plain(weather: Weather) -> Fault:
    """An answer without a look at requirements, for CONVERSATION_ONLY."""
    return lambda request: cp.streamed(weather.frames(weather.answer(request, request.json())))


@pytest.mark.parametrize(("code", "answer", "calls"), [(422, 400, 2), (400, 400, 2), (413, 413, 1)])
def test_a_request_the_upstream_rejects_is_not_tried_again(
    start: Callable[..., Proxy], weather: Weather, code: int, answer: int, calls: int
) -> None:
    """But in the other generation of calls, where that may be what was wrong with it."""
    proxy = start("alice", "bob")
    fault = status(code, {"detail": [{"loc": ["body", "model"], "msg": "bad", "input": "private words"}]})
    weather.add("/conversation", *[fault] * calls)
    refused = proxy.ask()
    assert refused.status_code == answer and "private words" not in refused.text
    assert weather.count("/conversation") == calls
    assert set(proxy.states().values()) == {"ready"}


def test_retries_end_after_retry_times(start: Callable[..., Proxy], weather: Weather) -> None:
    proxy = start("a", "b", "c", "d", "e", "f", retry_times="2")
    weather.add("/conversation", *[status(503)] * 10)
    assert error_of(proxy.ask()) == (502, "upstream_error")
    assert weather.count("/conversation") == 3
    none = start("a", "b", folder="none", retry_times="0")
    assert error_of(none.ask()) == (502, "upstream_error")
    assert weather.count("/conversation") == 4


def test_an_unreachable_upstream_is_a_502(start: Callable[..., Proxy]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as unused:
        url = f"http://127.0.0.1:{unused.getsockname()[1]}"
    proxy = start("alice", upstream=url, retry_times="1")
    assert error_of(proxy.ask()) == (502, "upstream_error")
    assert proxy.states() == {"alice@demo.example": "ready"}


@pytest.mark.parametrize(
    ("body", "headers", "low", "high"),
    [
        ({"detail": {"code": "usage_limit", "message": "wait", "clears_in": 700}}, {}, 690, 701),
        ({"detail": "slow down"}, {"Retry_After": "90"}, 85, 91),
        ({"detail": "slow down"}, {}, 50, 61),
    ],
)
def test_an_account_told_to_wait_is_skipped_until_its_time(
    start: Callable[..., Proxy], weather: Weather, body: Any, headers: dict[str, str], low: int, high: int
) -> None:
    proxy = start("alice")
    weather.add("/conversation", status(429, body, **headers))
    for _ in range(2):
        refused = proxy.ask()
        assert error_of(refused) == (429, "rate_limit_exceeded")
        assert low <= int(refused.headers["retry-after"]) <= high
    assert weather.count("/conversation") == 1
    assert proxy.states() == {"alice@demo.example": "waiting"}
    assert proxy.ask(model="gpt-4o-mini").status_code == 200
    again = start()  # the same store, another process's memory
    assert error_of(again.ask()) == (429, "rate_limit_exceeded")
    assert start(enable_limit="false").ask().status_code == 200


def test_a_wait_that_names_no_time_grows_and_is_forgotten_after_an_answer(
    start: Callable[..., Proxy], weather: Weather
) -> None:
    proxy = start("alice", enable_limit="false", retry_times="0")
    account = proxy.app.pool.accounts()[0]
    pauses = []
    for _ in range(3):
        weather.add("/conversation", status(429))
        assert proxy.ask().status_code == 429
        wait = account.waits["gpt-4o"]
        pauses.append(wait.until - time.time())
        account.waits = {"gpt-4o": cp.Wait(time.time(), wait.strikes)}  # its time has come
    assert [round(pause / 60) for pause in pauses] == [1, 2, 4]
    assert proxy.ask().status_code == 200
    assert account.waits == {} and proxy.store.waits() == []


def test_a_wait_ends_when_its_time_has_come(start: Callable[..., Proxy], weather: Weather) -> None:
    proxy = start("alice")
    weather.add("/conversation", status(429, {"detail": {"clears_in": 1}}))
    assert proxy.ask().status_code == 429
    wait_until(lambda: proxy.ask().status_code == 200, 4)


@pytest.mark.parametrize(
    ("fault", "calls"),  # of two generations, where the fault may mean that one is gone
    [
        (status(403, {"detail": "Unusual activity has been detected from your device."}), 1),
        (status(403, "<html><title>Just a moment...</title></html>", "text/html"), 2),
        (status(503, "<html><title>Just a moment...</title></html>", "text/html"), 1),
        (status(200, "<html><div class=cf-spinner></div></html>", "text/html"), 2),
    ],
)
def test_a_block_is_reported_and_puts_no_account_aside(
    start: Callable[..., Proxy], weather: Weather, fault: Fault, calls: int
) -> None:
    proxy = start("alice")
    weather.add("/conversation", *[fault] * calls)
    assert error_of(proxy.ask()) == (403, "upstream_blocked")
    assert proxy.states() == {"alice@demo.example": "ready"}
    assert proxy.ask().status_code == 200


def test_a_revoked_token_sets_its_account_aside_by_name(
    start: Callable[..., Proxy], weather: Weather, tmp_path: pathlib.Path
) -> None:
    proxy = start("alice", "bob", random_token="false")
    tokens = {a.row.email: a.row.access_token for a in proxy.app.pool.accounts()}
    weather.dead.add(tokens["alice@demo.example"])
    for _ in range(6):
        assert proxy.ask().status_code == 200
    assert proxy.states() == {"alice@demo.example": "expired", "bob@demo.example": "ready"}
    listed = run("accounts", "list", env={"DATA_DIR": str(tmp_path / "data")}).stdout
    assert re.search(r"alice@demo\.example.*expired: the upstream refused", listed)
    weather.dead.add(tokens["bob@demo.example"])
    assert error_of(proxy.ask()) == (503, "no_account")
    assert "retry-after" in proxy.ask().headers
    proxy.app.pool.add([cp.demo_token("alice")])
    assert proxy.ask().status_code == 200


def test_a_pool_full_of_expired_tokens_answers_at_once_from_the_living(
    start: Callable[..., Proxy], weather: Weather
) -> None:
    proxy = start(*[cp.demo_token(f"old{i}", -5) for i in range(100)], "alice", random_token="false")
    assert proxy.ask().status_code == 200
    assert weather.count("/conversation") == 1


def test_accounts_answer_in_turn_or_at_random(start: Callable[..., Proxy], weather: Weather) -> None:
    def order(proxy: Proxy) -> list[str]:
        weather.seen.clear()
        for _ in range(12):
            assert proxy.ask().status_code == 200
        return [r.headers["chatgpt-account-id"] for r in weather.seen if r.path.endswith("/conversation")]

    turn = order(start("a", "b", "c", random_token="false"))
    assert turn == turn[:3] * 4 and len(set(turn)) == 3
    random.seed(7)
    drawn = order(start("a", "b", "c", folder="random"))
    assert len(set(drawn)) == 3 and drawn != turn


def test_200_requests_on_an_expired_token_make_one_exchange(
    start: Callable[..., Proxy], weather: Weather
) -> None:
    refresh = "rt_" + "x" * 50
    weather.refresh_tokens[refresh] = "alice"
    weather.add("/oauth/token", lambda request: time.sleep(0.3))
    proxy = start(refresh)
    with concurrent.futures.ThreadPoolExecutor(200) as pool:
        codes = list(pool.map(lambda _: proxy.ask().status_code, range(200)))
    assert codes == [200] * 200
    assert weather.count("/oauth/token") == 1
    kept = proxy.store.accounts()[0]
    assert (
        kept.secret in weather.refresh_tokens
        and kept.secret != refresh
        and kept.email == "alice@demo.example"
    )


class Issuer(Weather):
    """An issuer that lets a replaced refresh token live until the access token that came with its successor is used:
    until then the client may never have heard of either."""

    def __init__(self) -> None:
        super().__init__()
        self.successors: dict[str, str] = {}  # access token → the refresh token that it was exchanged for
        self.heirs = Counter[str]()  # how often a name's token was replaced

    def oauth_token(self, request: cp.Request) -> cp.Reply:
        given = str(request.json()["refresh_token"])
        name = self.refresh_tokens.get(given)
        if name is None:
            return cp.json_reply({"error": "invalid_grant"}, 403)
        access = cp.demo_token(name, 30, self.token_client)  # too short for a second use
        new = f"rt_{secrets.token_urlsafe(40)}"
        self.refresh_tokens[new] = name
        self.successors[access] = given
        self.heirs[name] += 1
        return cp.json_reply({"access_token": access, "refresh_token": new})

    def respond(self, request: cp.Request) -> cp.Reply | cp.Stream | cp.Upgrade:
        if request.path == "/oauth/token":
            return self.oauth_token(request)
        if replaced := self.successors.pop(cp.Keys.given(request), None):
            self.refresh_tokens.pop(replaced, None)
        return super().respond(request)


@pytest.mark.parametrize("upstream, exchanges", [("pool", 500), ("codex", 125)])
def test_no_rotated_token_is_lost_by_killing_the_process(
    tmp_path: pathlib.Path, upstream: str, exchanges: int
) -> None:
    issuer, names = Issuer(), [f"a{i}" for i in range(10)]
    server, issuer.url = issuer.listen()
    issuer.codex = upstream == "codex"
    issuer.token_client = cp.BROWSER_CLIENT if issuer.codex else ""
    issuer.refresh_tokens = {f"rt_{name}{'x' * 40}": name for name in names}
    env = {"DATA_DIR": str(tmp_path), "CHATGPT_BASE_URL": issuer.url, "OPENAI_AUTH_URL": issuer.url}
    env |= {"AUTHORIZATION": KEY, "RETRY_TIMES": "0", "UPSTREAM_ORDER": upstream}
    assert run("accounts", "add", "-", env=env, stdin="\n".join(issuer.refresh_tokens)).returncode == 0
    options: dict[str, Any] = {"headers": {"Authorization": f"Bearer {KEY}"}, "timeout": 20}
    model = "gpt-5.5" if issuer.codex else "gpt-4o"
    chance, rounds = random.Random(5), 0

    def ask(url: str) -> None:
        with contextlib.suppress(httpx.HTTPError):
            answer: httpx.Response | None = None
            while answer is None or answer.status_code:
                messages = [
                    {"role": "user", "content": str(random.random())}
                ]  # each a conversation of its own
                body = {"model": model, "messages": messages}
                answer = httpx.post(f"{url}/v1/chat/completions", json=body, **options)

    while rounds < exchanges // 25 or sum(issuer.heirs.values()) < exchanges:
        rounds += 1
        with Served(env=env) as served:
            askers = [threading.Thread(target=ask, args=(served.url,)) for _ in range(4)]
            for asker in askers:
                asker.start()
            enough = sum(issuer.heirs.values()) + 15
            deadline = time.monotonic() + 20
            while sum(issuer.heirs.values()) < enough:
                assert time.monotonic() < deadline, served.lines
                time.sleep(0.005)
            time.sleep(chance.random() * 0.1)
            served.process.kill()
            for asker in askers:
                asker.join()
    kept = {row.id: row for row in cp.Store(str(tmp_path)).accounts()}
    server.drain(0)
    assert len(kept) == len(names) and all(row.state == "ready" for row in kept.values())
    assert {issuer.refresh_tokens.get(row.secret) for row in kept.values()} == set(names)


def test_no_process_waits_long_for_another(tmp_path: pathlib.Path) -> None:
    store = cp.Store(str(tmp_path))
    code = """
import sys, threading, time; sys.path.insert(0, sys.argv[1]); import chatproxy as cp
store, other = cp.Store(sys.argv[2]), None
def want():
    try:
        with store.exclusively("ours", 60): print("got ours", flush=True)
    except OSError as error: print(error, flush=True)
with store.exclusively("theirs", 1):
    print("has theirs", flush=True); sys.stdin.readline()
    threading.Thread(target=want).start(); time.sleep(60)
"""
    words = [sys.executable, "-c", code, str(HERE), str(tmp_path)]
    other = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert other.stdin and other.stdout and other.stdout.readline() == "has theirs\n"
    with store.exclusively("ours", 1):
        other.stdin.write("go\n")
        other.stdin.flush()
        began = time.monotonic()
        with pytest.raises(TimeoutError), store.exclusively("theirs", 0.5):  # which is no deadlock
            pass
        assert 0.4 < time.monotonic() - began < 5
    assert other.stdout.readline() == "got ours\n"
    other.kill()
    other.wait()
    with store.exclusively("theirs", 5):
        pass


def test_what_cannot_be_stored_is_counted_later(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = cp.Store(str(tmp_path))
    ledger = cp.Ledger(store)
    ledger.count("acc-1", answers=1)

    def full(more: Any) -> None:
        raise cp.StoreUnavailable("database or disk is full")

    with monkeypatch.context() as patch, pytest.raises(cp.StoreUnavailable):
        patch.setattr(store, "add_tallies", full)
        ledger.save()
    ledger.count("acc-1", answers=1)
    ledger.save()
    assert cp.Ledger(store).today("acc-1").answers == 2


def test_only_the_pool_is_counted(start: Callable[..., Proxy]) -> None:
    proxy = start("alice")
    for number in range(5):
        assert proxy.ask(key=cp.demo_token(f"guest{number}")).status_code == 200
        proxy.ask(key=cp.demo_token(f"guest{number}", -100))
    said = admin(proxy, "GET", "/tokens/list").json()
    assert said["hours"][-1]["answers"] == said["hours"][-1]["failures"] == 0
    assert not proxy.app.ledger._today


@pytest.mark.parametrize(
    "notices", [False, True]
)  # what another process has stored, before it is its turn to renew
def test_two_processes_exchange_a_token_once(
    start: Callable[..., Proxy], weather: Weather, tmp_path: pathlib.Path, notices: bool
) -> None:
    refresh = "rt_" + "r" * 40
    weather.refresh_tokens[refresh] = "alice"
    proxy = start(refresh)
    slow = threading.Event()

    def wait(request: cp.Request) -> None:
        slow.wait(3)

    weather.add("/oauth/token", wait)
    env = {
        "DATA_DIR": str(tmp_path / "data"),
        "CHATGPT_BASE_URL": weather.url,
        "OPENAI_AUTH_URL": weather.url,
    }
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        check = pool.submit(run, "accounts", "check", env=env)
        wait_until(lambda: weather.faults["/oauth/token"] == deque())
        asked = pool.submit(proxy.ask)
        time.sleep(0.2)  # it waits for the other process, or would have asked by now
        slow.set()
        while notices and not asked.done():
            proxy.app.pool.reload()
        assert check.result().returncode == 0 and asked.result().status_code == 200
    assert weather.count("/oauth/token") == 1


def test_tokens_of_one_account_are_one_account(start: Callable[..., Proxy], weather: Weather) -> None:
    refresh = "rt_" + "r" * 40
    weather.refresh_tokens[refresh] = "alice"
    proxy = start("alice", "bob", history_disabled="false")
    alice = next(one for one in proxy.app.pool.accounts() if one.row.email.startswith("alice"))
    device = alice.row.device
    proxy.app.pool.hold({"conversation-1": cp.Held(alice.id)})
    proxy.app.pool.told_to_wait(alice, "o3", 1000)
    proxy.app.ledger.count(alice.id, answers=7)
    proxy.app.pool.add([refresh])
    for _ in range(30):
        proxy.say()
    kinds = {row.email: row.kind for row in proxy.store.accounts()}
    assert kinds == {"alice@demo.example": "refresh", "bob@demo.example": "access"}
    row = next(row for row in proxy.store.accounts() if row.kind == "refresh")
    assert (row.id, row.device) == (alice.id, device) and proxy.app.pool.find(row.id) is alice
    assert proxy.app.pool.holder("conversation-1", ALL) == row.id and alice.wait_for("o3", time.time()) > 900
    assert proxy.app.ledger.today(row.id).answers >= 7
    # And its access token, or the newest refresh token, added later is still the same.
    added = proxy.app.pool.add([cp.demo_token("alice"), row.secret])
    assert (len(added.rows), added.known, added.merged) == (1, 1, 1)
    assert len(proxy.store.accounts()) == 2 and proxy.ask().status_code == 200


def test_an_account_removed_during_its_first_exchange_takes_no_other_with_it(
    start: Callable[..., Proxy], weather: Weather
) -> None:
    refresh = "rt_" + "r" * 40
    weather.refresh_tokens[refresh] = "alice"
    proxy = start("alice")
    (alice,) = proxy.app.pool.accounts()
    (added,) = proxy.app.pool.add([refresh]).rows
    account = proxy.app.pool.find(added.id)
    assert account
    go = threading.Event()

    def wait(request: cp.Request) -> None:
        go.wait(5)

    weather.add("/oauth/token", wait)
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        exchange = pool.submit(proxy.app.renewals.token, account, cp.Watch())
        wait_until(lambda: not weather.faults["/oauth/token"])
        assert proxy.app.pool.remove([added.id]) == [added.id]
        go.set()
        exchange.result()
    assert [row.id for row in proxy.store.accounts()] == [alice.id] and proxy.ask().status_code == 200


def test_a_disabled_account_stays_disabled_however_it_comes_again(
    start: Callable[..., Proxy], weather: Weather
) -> None:
    refresh = "rt_" + "r" * 40
    weather.refresh_tokens[refresh] = "alice"
    proxy = start("alice", "bob")
    alice = next(one for one in proxy.app.pool.accounts() if one.row.email.startswith("alice"))
    proxy.app.pool.disable([alice.id], True)
    (added,) = proxy.app.pool.add([refresh]).rows
    account = proxy.app.pool.find(added.id)
    assert account
    proxy.app.renewals.token(account, cp.Watch())
    assert alice.row.state == "disabled" and alice.row.kind == "refresh" and len(proxy.store.accounts()) == 2


def test_of_several_tokens_of_one_account_the_one_that_lasts_longest_stays(
    start: Callable[..., Proxy],
) -> None:
    proxy = start()
    good, old = cp.demo_token("alice", 9000), cp.demo_token("alice", -100)
    for lines in ([good, old], [old, good]):
        proxy.app.pool.add(lines)
        assert [row.access_token for row in proxy.store.accounts()] == [good]
        proxy.app.pool.remove()


def renewing(start: Callable[..., Proxy], weather: Weather, **settings: str) -> tuple[Proxy, cp.Account]:
    """A server whose one account has renewed its token once."""
    weather.refresh_tokens["rt_" + "r" * 40] = "alice"
    proxy = start("rt_" + "r" * 40, **settings)
    proxy.say()
    return proxy, proxy.app.pool.accounts()[0]


def test_a_token_is_renewed_before_it_expires(start: Callable[..., Proxy], weather: Weather) -> None:
    proxy, account = renewing(start, weather)
    old, expires = account.row.access_token, account.row.expires
    proxy.app.renewals.renew_due(expires - 1000)
    assert account.renewal is None or account.renewal.done()
    for _ in range(3):  # one exchange at a time
        proxy.app.renewals.renew_due(expires - 500)
    wait_until(lambda: account.row.access_token != old)
    assert weather.count("/oauth/token") == 2 and proxy.states() == {"alice@demo.example": "ready"}
    proxy.say()
    assert weather.count("/oauth/token") == 2
    others = [cp.Account(cp.AccountRow(str(i), cp.REFRESH, ""), cp.Egress("", ""), "") for i in range(100)]
    assert 600 <= min(one.renewed_ahead for one in others) < max(one.renewed_ahead for one in others) < 900


def test_a_valid_token_goes_on_serving_while_renewal_fails(
    start: Callable[..., Proxy], weather: Weather, caplog: pytest.LogCaptureFixture
) -> None:
    proxy, account = renewing(start, weather)
    weather.add("/oauth/token", status(500), status(403, "<html>Just a moment", "text/html"))
    for failures in (1, 2):
        proxy.app.renewals.renew_due(account.row.expires - 500)
        wait_until(functools.partial(lambda number: account.retry_renewal[1] == number, failures))
        proxy.app.renewals.renew_due(account.retry_renewal[0] - 0.01)  # not before its time
        proxy.say()
        account.retry_renewal = (0.0, failures)
    assert weather.count("/oauth/token") == 3 and "token not renewed" in caplog.text
    proxy.app.renewals.renew_due(account.row.expires - 500)
    wait_until(lambda: account.retry_renewal == (0.0, 0) and weather.count("/oauth/token") == 4)


def test_every_refresh_token_is_exchanged_at_start_when_scheduled(
    start: Callable[..., Proxy], weather: Weather
) -> None:
    proxy, account = renewing(start, weather, folder="first")
    kept = account.row.secret
    again = start(kept, scheduled_refresh="true")
    wait_until(lambda: weather.count("/oauth/token") == 2)
    wait_until(lambda: again.app.pool.accounts()[0].row.secret != kept)


@pytest.mark.parametrize(
    "when", ["2026-11-20 15:00:00", "2026-12-29 02:59:59", "2028-02-27 23:00:00", "2026-03-27 12:00:00"]
)
def test_the_next_refresh_is_at_three_in_the_night_four_days_on(when: str) -> None:
    now = time.mktime(time.strptime(when, "%Y-%m-%d %H:%M:%S"))
    following = time.localtime(cp.next_refresh(now))
    assert (following.tm_hour, following.tm_min, following.tm_sec) == (3, 0, 0)
    assert 3 * 86400 < cp.next_refresh(now) - now < 5 * 86400


def test_an_access_token_that_expires_is_set_aside_with_the_reason(start: Callable[..., Proxy]) -> None:
    proxy = start("alice", cp.demo_token("bob", 100))
    proxy.app.renewals.renew_due(time.time() + 200)
    rows = {account.row.email[:3]: account.row for account in proxy.app.pool.accounts()}
    assert (rows["ali"].state, rows["bob"].state) == ("ready", "expired")
    assert "access token has expired" in rows["bob"].reason


def test_a_refused_token_is_renewed_and_the_request_answered(
    start: Callable[..., Proxy], weather: Weather
) -> None:
    weather.refresh_tokens["rt_" + "y" * 50] = "alice"
    weather.session_tokens["eyJ" + "s" * 4000 + "....."[:4]] = "bob"
    for number, token in enumerate([*weather.refresh_tokens, *weather.session_tokens]):
        proxy = start(token, folder=f"data{number}", retry_times="0")
        assert proxy.ask().status_code == 200
        weather.dead.add(proxy.app.pool.accounts()[0].row.access_token)
        assert proxy.ask().status_code == 200
        assert set(proxy.states().values()) == {"ready"}


def test_a_dead_refresh_token_sets_its_account_aside_as_dead(
    start: Callable[..., Proxy], weather: Weather, tmp_path: pathlib.Path
) -> None:
    proxy = start("rt_" + "z" * 50)
    assert error_of(proxy.ask()) == (503, "no_account")
    assert "dead: invalid_grant" in run("accounts", "list", env={"DATA_DIR": str(tmp_path / "data")}).stdout
    calls = weather.count("/oauth/token")
    assert error_of(proxy.ask()) == (503, "no_account") and weather.count("/oauth/token") == calls


def test_importing_a_token_again_does_not_undo_its_rotation(
    start: Callable[..., Proxy], weather: Weather, tmp_path: pathlib.Path
) -> None:
    refresh = "rt_" + "x" * 50
    weather.refresh_tokens[refresh] = "alice"
    proxy = start(refresh)
    assert proxy.ask().status_code == 200
    env = {"DATA_DIR": str(tmp_path / "data")}
    assert run("accounts", "add", refresh, env=env).returncode == 0
    proxy.app.pool.add([refresh])
    weather.dead.add(proxy.app.pool.accounts()[0].row.access_token)
    assert proxy.ask().status_code == 200 and weather.count("/oauth/token") == 2


def test_a_pool_tokens_owner_who_calls_with_it_leaves_it_in_the_pool(
    start: Callable[..., Proxy], weather: Weather
) -> None:
    refresh = "rt_" + "x" * 50
    weather.refresh_tokens[refresh] = "alice"
    proxy = start(refresh)
    assert proxy.ask().status_code == 200
    (row,) = proxy.store.accounts()
    assert row.secret != refresh and proxy.ask(key=row.secret).status_code == 200
    assert proxy.ask().status_code == 200 and weather.count("/oauth/token") == 1
    # What it was added with is worth as much here as there: nothing, now that it is replaced.
    assert error_of(proxy.ask(key=refresh)) == (401, "invalid_api_key")
    assert proxy.ask().status_code == 200 and len(start().app.pool.accounts()) == 1


def test_a_forged_token_shares_nothing_with_its_victim(start: Callable[..., Proxy], weather: Weather) -> None:
    proxy, real = start(), cp.demo_token("victim")
    forged = real.rpartition(".")[0] + ".forged-signature"
    weather.dead.add(forged)
    assert proxy.ask(key=real).status_code == 200
    assert error_of(proxy.ask(key=forged)) == (401, "invalid_api_key")
    assert proxy.ask(key=real).status_code == 200
    assert guest_of(proxy, real) is not guest_of(proxy, forged)


def test_made_up_refresh_tokens_leave_nothing_behind(start: Callable[..., Proxy]) -> None:
    proxy = start()
    for letter in "abc":
        assert error_of(proxy.ask(key="rt_" + letter * 50)) == (401, "invalid_api_key")
    assert proxy.store.accounts() == []


def test_a_rotated_token_is_kept_even_when_the_answer_is_of_no_use(
    start: Callable[..., Proxy], weather: Weather
) -> None:
    refresh, newer = "rt_" + "x" * 50, "rt_" + "y" * 50
    proxy = start(refresh, retry_times="0")
    weather.add("/oauth/token", status(200, {"access_token": "no JWT", "refresh_token": newer}))
    assert error_of(proxy.ask()) == (502, "upstream_error")
    assert proxy.store.accounts()[0].secret == newer
    weather.refresh_tokens[newer] = "alice"
    wait_until(lambda: proxy.ask().status_code == 200, 5)


@pytest.mark.parametrize(
    "answer", [status(200, "<html>maintenance</html>", "text/html"), status(200, ""), status(404)]
)
def test_only_an_empty_session_is_a_dead_one(
    start: Callable[..., Proxy], weather: Weather, answer: Fault
) -> None:
    weather.add("/api/auth/session", answer)
    proxy = start("eyJ" + "s" * 60 + "....", retry_times="0")
    assert error_of(proxy.ask()) == (502, "upstream_error")
    assert [a.row.state for a in proxy.app.pool.accounts()] == ["ready"]
    proxy.app.pool.accounts()[0].retry_renewal = (0.0, 0)
    assert error_of(proxy.ask()) == (503, "no_account")  # {}
    assert [a.row.state for a in proxy.app.pool.accounts()] == ["dead"]


def test_an_html_401_expires_no_account(start: Callable[..., Proxy], weather: Weather) -> None:
    proxy = start("alice", retry_times="0")
    weather.add("/conversation", status(401, "<html>gateway</html>", "text/html"))
    assert proxy.ask().status_code == 502
    assert proxy.states() == {"alice@demo.example": "ready"}


def test_an_account_whose_fresh_token_is_refused_is_left_alone_but_not_lost(
    start: Callable[..., Proxy], weather: Weather
) -> None:
    refresh = "rt_" + "x" * 50
    weather.refresh_tokens[refresh] = "alice"
    proxy = start(refresh, retry_times="0")
    weather.add("/conversation", status(401), status(401))
    assert proxy.ask().status_code == 503
    assert proxy.states() == {"alice@demo.example": "waiting"} and weather.count("/oauth/token") == 2


def test_a_late_refusal_does_not_set_a_new_token_aside(start: Callable[..., Proxy], weather: Weather) -> None:
    proxy = start("alice", retry_times="0")

    def replaced_meanwhile(request: cp.Request) -> cp.Reply:
        proxy.app.pool.add([cp.demo_token("alice")])
        return cp.Reply(401, b"{}")

    weather.add("/conversation", replaced_meanwhile)
    proxy.ask()
    assert proxy.states() == {"alice@demo.example": "ready"}


def test_an_answer_does_not_end_the_wait_that_another_request_was_told(
    start: Callable[..., Proxy], weather: Weather
) -> None:
    proxy = start("alice")
    account = proxy.app.pool.accounts()[0]
    for _ in range(6):
        proxy.app.pool.told_to_wait(account, "gpt-4o", None)
    proxy.app.pool.told_to_wait(account, "gpt-4o", 1000.0)
    proxy.app.pool.told_to_wait(account, "gpt-4o", 5.0)
    proxy.app.pool.answered(account, "gpt-4o")
    until, strikes = account.waits["gpt-4o"]
    assert strikes == 1 and 990 < until - time.time() < 1001
    assert proxy.store.waits() == [(account.id, "gpt-4o", until, 1)]
    account.waits = {"gpt-4o": cp.Wait(0.0, 5000)}
    assert 3590 < proxy.app.pool.told_to_wait(account, "gpt-4o", None) < 3601


def test_a_reload_and_a_renewal_never_undo_each_other(start: Callable[..., Proxy], weather: Weather) -> None:
    refresh = "rt_" + "x" * 50
    weather.refresh_tokens[refresh] = "alice"
    proxy = start(refresh)
    pool, stop = proxy.app.pool, threading.Event()

    def reload() -> None:
        while not stop.is_set():
            pool.reload()

    threads = [threading.Thread(target=reload) for _ in range(3)]
    for thread in threads:
        thread.start()
    for _ in range(30):
        weather.dead.add(pool.accounts()[0].row.access_token)
        assert proxy.ask().status_code == 200
    stop.set()
    for thread in threads:
        thread.join()
    assert proxy.states() == {"alice@demo.example": "ready"}


def test_the_holder_of_a_conversation_answers_for_itself_alone(
    start: Callable[..., Proxy], weather: Weather
) -> None:
    proxy = start("alice", "bob", history_disabled="false")
    known = proxy.ask().json()["conversation_id"]
    held = proxy.app.pool.store.conversation(known)
    holder = held and held.account
    for account in proxy.app.pool.accounts():
        proxy.app.pool.told_to_wait(account, "gpt-4o", 1000.0 if account.id == holder else 5.0)
    assert int(proxy.ask(conversation_id=known).headers["retry-after"]) > 900


def test_one_refusal_does_not_end_login_free_service(start: Callable[..., Proxy], weather: Weather) -> None:
    proxy = start(cp.LOGIN_FREE, authorization="", retry_times="0", enable_limit="false")
    weather.add("/conversation", status(401))
    assert proxy.ask(key=None).status_code == 401
    assert proxy.ask(key=None).status_code == 200
    assert {account.row.state for account in proxy.app.pool.live()} == {"ready"}


def test_a_guest_that_joins_the_pool_stays_one_account(start: Callable[..., Proxy], weather: Weather) -> None:
    refresh = "rt_" + "x" * 50
    proxy = start()
    assert error_of(proxy.ask(key=refresh)) == (401, "invalid_api_key")
    weather.refresh_tokens[refresh] = "alice"
    proxy.app.pool.add([refresh])
    assert proxy.ask(key=refresh).status_code == 200
    assert (
        proxy.ask().status_code == 200 and weather.count("/oauth/token") == 3
    )  # two that said it is unknown
    token = cp.demo_token("bob")
    proxy.app.pool.add([token])
    assert guest_of(proxy, token) in proxy.app.pool.accounts()


def test_an_older_token_of_the_same_account_changes_nothing(start: Callable[..., Proxy]) -> None:
    proxy = start(cp.demo_token("alice", 9000))
    kept = proxy.app.pool.accounts()[0].row.access_token
    proxy.app.pool.add([cp.demo_token("alice", 100)])
    assert proxy.app.pool.accounts()[0].row.access_token == kept


def test_chance_gives_those_behind_a_run_of_waiting_ones_no_more_than_others(
    start: Callable[..., Proxy],
) -> None:
    proxy = start()
    proxy.app.pool.add([cp.demo_token(f"a{i}") for i in range(200)])
    ordered = proxy.app.pool._turn_order
    for account in ordered[:100]:
        account.waits = {"gpt-4o": cp.Wait(time.time() + 1000, 1)}
    drawn = [proxy.app.pool.lease("gpt-4o") for _ in range(2000)]
    assert max(drawn.count(account) for account in ordered[100:]) < 60


def test_a_failing_token_endpoint_kills_no_account(start: Callable[..., Proxy], weather: Weather) -> None:
    weather.refresh_tokens["rt_" + "w" * 50] = "alice"
    weather.add("/oauth/token", status(500))
    proxy = start("rt_" + "w" * 50, retry_times="0")
    assert error_of(proxy.ask()) == (502, "upstream_error")
    wait_until(lambda: proxy.ask().status_code == 200, 5)


def test_a_conversation_goes_on_with_the_account_that_holds_it(
    start: Callable[..., Proxy], weather: Weather
) -> None:
    proxy = start("a", "b", "c", "d", history_disabled="false")
    first = proxy.ask().json()
    owner = weather.last("/conversation").headers["authorization"]
    assert weather.last("/conversation").json()["history_and_training_disabled"] is False
    again = start(history_disabled="false")
    for _ in range(5):
        answer = again.ask(
            conversation_id=first["conversation_id"], parent_message_id=first["message_id"]
        ).json()
        call = weather.last("/conversation")
        assert (
            answer["conversation_id"] == first["conversation_id"] and call.headers["authorization"] == owner
        )
        assert call.json()["parent_message_id"] == first["message_id"]
    assert error_of(again.ask(conversation_id="not-there")) == (404, "not_found")
    assert error_of(start(folder="temporary").ask(conversation_id="x")) == (400, "invalid_request_error")
    chunks, _ = again.stream()
    assert chunks[1]["conversation_id"] and chunks[-1]["message_id"]


def test_temporary_chats_tell_no_ids(proxy: Proxy, weather: Weather) -> None:
    assert "conversation_id" not in proxy.ask().json()
    assert weather.last("/conversation").json()["history_and_training_disabled"] is True


def test_an_account_keeps_its_identity_for_life(start: Callable[..., Proxy], weather: Weather) -> None:
    start("alice", "bob").ask()
    proxy = start()
    for _ in range(8):
        proxy.ask()
    seen: dict[str, set[str]] = defaultdict(set)
    jars = set()
    for request in weather.seen:
        if "authorization" in request.headers:
            device = request.headers["oai-device-id"]
            seen[request.headers["chatgpt-account-id"]].add(device)
            jars.add(request.headers["cookie"].replace(device, "ID"))
    assert jars <= {"oai-did=ID", "oai-sc=demo; oai-did=ID"} and max(jars, key=len) != "oai-did=ID"
    assert len(seen) == 2 and all(len(devices) == 1 for devices in seen.values())
    assert len(set.union(*seen.values())) == 2


def test_an_account_keeps_its_proxy_and_accounts_share_them_out(start: Callable[..., Proxy]) -> None:
    proxies = "http://127.0.0.1:1,http://127.0.0.1:2"
    first = {a.id: a.egress.proxy for a in start("a", "b", "c", "d", proxy_url=proxies).app.pool.accounts()}
    assert sorted(first.values()) == sorted(proxies.split(",") * 2)
    second = start(proxy_url=",".join(reversed(proxies.split(",")))).app.pool.accounts()
    assert {a.id: a.egress.proxy for a in second} == first


def test_an_account_moves_on_from_a_proxy_that_does_not_connect(
    start: Callable[..., Proxy], weather: Weather, caplog: pytest.LogCaptureFixture
) -> None:
    through: list[bytes] = []

    def serve(listener: socket.socket) -> None:
        """A plain proxy for one call a connection."""
        while True:
            client, _ = listener.accept()
            with contextlib.suppress(OSError), client:
                data = client.recv(65536)
                through.append(data)
                address = data.split(b" ")[1].split(b"/")[2].decode()
                head, _, rest = data.partition(b"\r\n\r\n")
                length = int((re.search(rb"(?i)content-length: (\d+)", head) or [0, 0])[1])
                while len(rest) < length:
                    rest += client.recv(65536)
                host, _, port = address.partition(":")
                with socket.create_connection((host, int(port))) as there:
                    there.sendall(head + b"\r\nConnection: close\r\n\r\n" + rest)
                    while more := there.recv(65536):
                        client.sendall(more)

    with socket.create_server(("127.0.0.1", 0)) as closed:
        dead = f"http://user:secret@127.0.0.1:{closed.getsockname()[1]}"
    listener = socket.create_server(("127.0.0.1", 0))
    threading.Thread(target=serve, args=(listener,), daemon=True).start()
    alive = f"http://127.0.0.1:{listener.getsockname()[1]}"
    proxy = start("alice", proxy_url=f"{dead},{alive}", retry_times="0")
    (account,) = proxy.app.pool.accounts()
    assert account.egress.proxy == dead
    assert (
        proxy.ask().status_code == 502 and account.egress.proxy == dead
    )  # two calls: the page, the requirements
    for code in (502, 200):
        assert proxy.ask().status_code == code
    assert account.egress.proxy == alive and proxy.store.accounts()[0].proxy == alive and through
    (told,) = [vars(one) for one in caplog.records if one.msg == "account moved to the next proxy"]
    assert told["facts"]["account"] == "alice@demo.example" and "secret" not in str(told)
    # What the upstream says through it, be it a failure, is no reason to move.
    weather.add("/conversation", *[status(502)] * 4)
    assert [proxy.ask().status_code for _ in range(4)] == [502] * 4 and account.egress.proxy == alive


def test_only_failures_in_a_row_move_an_account(start: Callable[..., Proxy]) -> None:
    proxy = start("alice", proxy_url="http://127.0.0.1:1,http://127.0.0.1:2")
    (account,) = proxy.app.pool.accounts()
    egress = account.egress
    for connected in (False, False, True, False, False):
        proxy.app.pool.reached(account, egress, connected)
    assert account.egress is egress
    for _ in range(3):  # the last two were under way when it moved: they say nothing of its new proxy
        proxy.app.pool.reached(account, egress, False)
    assert account.egress.proxy != egress.proxy and account.unreached == 0


def test_a_tunnel_that_is_refused_is_a_proxy_that_does_not_connect(start: Callable[..., Proxy]) -> None:
    def serve(listener: socket.socket) -> None:
        while True:
            client, _ = listener.accept()
            with client:
                client.recv(65536)
                client.sendall(b"HTTP/1.1 407 Proxy Authentication Required\r\nContent-Length: 0\r\n\r\n")

    listeners = [socket.create_server(("127.0.0.1", 0)) for _ in range(2)]
    for listener in listeners:
        threading.Thread(target=serve, args=(listener,), daemon=True).start()
    proxies = [f"http://127.0.0.1:{listener.getsockname()[1]}" for listener in listeners]
    proxy = start("alice", upstream="https://localhost:1", proxy_url=",".join(proxies), retry_times="0")
    (account,) = proxy.app.pool.accounts()
    seen = []
    for _ in range(5):
        assert error_of(proxy.ask()) == (502, "upstream_error")
        seen.append(account.egress.proxy)
    first, second = proxies
    assert seen == [first, second, second, second, first]  # the page is not asked for again within a minute


# --- the proof of work and the requirements --------------------------------------------------------------------------


def right(algorithm: str, seed: str, difficulty: str, answer: str) -> bool:
    """The check as the wire protocol words it, without our code."""
    if algorithm == "sha3":
        return hashlib.sha3_512((seed + answer).encode()).hexdigest()[: len(difficulty)] <= difficulty
    state = 2166136261
    for byte in (seed + answer).encode():
        state = ((state ^ byte) * 16777619) % 2**32
    state = ((state ^ (state >> 16)) * 2246822507) % 2**32
    state = ((state ^ (state >> 13)) * 3266489909) % 2**32
    return f"{state ^ (state >> 16):08x}"[: len(difficulty)] <= difficulty


@hypothesis_settings(max_examples=40)
@given(
    st.sampled_from(["sha3", "fnv"]),
    st.text("0123456789.abcdef", max_size=20),
    st.sampled_from(["0fffff", "00f", "0", "01", "003fff", "1ab"]),
    st.floats(1e9, 2e9),
)
def test_a_proof_is_right_and_still_a_configuration(
    algorithm: str, seed: str, difficulty: str, now: float
) -> None:
    page = cp.Page(("https://chatgpt.com/a.js",), "prod-ü", now - 60)
    configuration = cp.fingerprint("device", "Agent/1 “x”", "en-US", page, now)
    token = cp.proof_token(seed, difficulty, configuration, algorithm)
    suffix = "~S" if algorithm == "fnv" else ""
    assert token.startswith("gAAAAAB") and token.endswith(suffix)
    answer = token[7:].removesuffix(suffix)
    assert right(algorithm, seed, difficulty, answer)
    sent = json.loads(base64.b64decode(answer, validate=True))
    assert len(sent) == 18 and sent[9] == sent[3] // 2 and sent[7:9] == ["en-US", "en-US,en"]
    assert re.fullmatch(r"\w{3} \w{3} \d\d \d{4} \d\d:\d\d:\d\d GMT-0500 \(Eastern Standard Time\)", sent[1])


def test_a_proof_that_cannot_be_found_is_given_up_as_browsers_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cp, "MAX_ATTEMPTS", 2000)
    given_up = cp.proof_token("0.5", "0" * 32, cp.fingerprint("d", "a", "en", cp.Page(), 2e9), "sha3")
    assert given_up == "gAAAAABwQ8Lk5FbGpA2NcR9dShT6gYjU7VxZ4D" + base64.b64encode(b'"0.5"').decode()


def test_harder_means_a_smaller_string() -> None:
    assert cp.harder("000032", "00003a") and cp.harder("00000f", "00003a") and cp.harder("0000", "0001")
    assert (
        not cp.harder("00003a", "00003a")
        and not cp.harder("0fffff", "00003a")
        and not cp.harder("00003", "00003a")
    )


def test_a_hard_proof_is_solved_beside_the_streams(start: Callable[..., Proxy], weather: Weather) -> None:
    weather.difficulty = "0000ff"
    assert cp.expected_attempts(weather.difficulty) > cp.EASY_ATTEMPTS
    assert start("alice").say() == "Hello wide world."


def test_a_proof_harder_than_allowed_is_refused(start: Callable[..., Proxy], weather: Weather) -> None:
    weather.difficulty = "000032"
    assert error_of(start("alice", "bob").ask()) == (403, "proof_of_work_too_hard")
    assert weather.count("/conversation") == 0


def test_both_generations_and_both_proofs_are_spoken(start: Callable[..., Proxy], weather: Weather) -> None:
    weather.older, weather.algorithm, weather.conduit = False, "fnv", True
    proxy = start("alice")
    assert proxy.say() == "Hello wide world."
    assert proxy.say() == "Hello wide world."
    assert weather.count("/backend-api/f/conversation") == weather.count("/f/conversation/prepare") == 2
    assert "messages" not in weather.last("/f/conversation/prepare").json()
    weather.conduit = False  # as is usual: then it is not asked for
    for _ in range(3):
        assert proxy.say() == "Hello wide world."
    assert weather.count("/f/conversation/prepare") == 3
    weather.conduit = True
    assert proxy.say() == "Hello wide world."
    assert weather.count("/f/conversation/prepare") == 4


def test_an_arkose_token_comes_from_the_service_or_is_missed(
    start: Callable[..., Proxy], weather: Weather
) -> None:
    weather.arkose = True
    assert error_of(start("alice", "bob").ask()) == (403, "arkose_required")

    class Service(cp.Application):
        def respond(self, request: cp.Request) -> cp.Reply:
            return cp.json_reply({"token": f"arkose-for-{request.json()['blob']}"})

    service = cp.Server(
        ("127.0.0.1", 0),
        Service(),
        cp.resolve(cp.gather({}, {})),
        cp.Metrics(),
    )
    threading.Thread(target=service.serve_forever, args=(0.02,), daemon=True).start()
    proxy = start("alice", folder="served", arkose_token_url=f"http://127.0.0.1:{service.server_port}/token")
    assert proxy.say() == "Hello wide world."
    service.drain(0)


def spare_ready(account: cp.Account) -> bool:
    return account.spare is not None and account.spare.done()


def test_a_turn_costs_one_round_trip_once_an_account_has_answered(
    start: Callable[..., Proxy], weather: Weather
) -> None:
    proxy = start("alice")
    for _ in range(3):
        assert proxy.say() == "Hello wide world."
        account = proxy.app.pool.accounts()[0]
        wait_until(functools.partial(spare_ready, account))
        weather.add("/chat-requirements", weather.silence())  # what is got ahead meanwhile is not waited for
        assert proxy.say() == "Hello wide world."
        account.spare = None


def test_a_spare_that_has_expired_is_not_used(start: Callable[..., Proxy], weather: Weather) -> None:
    weather.expire_after = 1
    proxy = start("alice")
    for _ in range(3):
        assert proxy.say() == "Hello wide world."
        time.sleep(1.1)  # the tokens' own life


def test_an_idle_accounts_spare_is_dropped_and_not_renewed(
    start: Callable[..., Proxy], weather: Weather
) -> None:
    weather.expire_after = 1
    proxy = start("alice")
    assert proxy.say()
    account = proxy.app.pool.accounts()[0]
    wait_until(lambda: spare_ready(account))
    asked = weather.count("/chat-requirements")
    account.used = time.time() - cp.SPARE_IDLE - 1
    proxy.app.site.sweep_spares()
    assert account.spare is None and weather.count("/chat-requirements") == asked


def test_a_gateway_can_do_the_requirements(start: Callable[..., Proxy], weather: Weather) -> None:
    proxy = start("alice", conversation_only="true", auth_key="for-the-gateway")
    weather.add("/conversation", plain(weather))
    assert proxy.say() == "Hello wide world."
    assert weather.calls == ["POST /backend-api/conversation"]
    assert weather.seen[-1].headers["authkey"] == "for-the-gateway"


def test_a_forgotten_spare_is_replaced_before_the_address_is_blamed(
    start: Callable[..., Proxy], weather: Weather
) -> None:
    proxy = start("alice", retry_times="0")
    assert proxy.say()
    wait_until(lambda: spare_ready(proxy.app.pool.accounts()[0]))
    weather._issued.clear()  # as after a restart of the upstream
    assert proxy.say() == "Hello wide world."


def test_a_lost_solver_stops_nobody() -> None:
    solver = cp.Solver()
    solver.close()
    configuration = cp.fingerprint("d", "a", "en-US", cp.Page(), 2e9)
    token = solver.solved(("0.5", "000fff", configuration, "sha3"), cp.Watch())
    assert right("sha3", "0.5", "000fff", token[7:])


def test_a_missing_call_is_looked_for_in_both_generations_again(
    start: Callable[..., Proxy], weather: Weather
) -> None:
    proxy = start("alice", retry_times="0")
    weather.add("/conversation", status(404, {"detail": "Conversation not found"}))
    assert error_of(proxy.ask()) == (404, "not_found")
    weather.add("/conversation", status(404), status(404))
    assert error_of(proxy.ask()) == (502, "upstream_error")
    assert proxy.say() == "Hello wide world."


def test_the_fingerprint_names_the_agent_that_is_sent(start: Callable[..., Proxy], weather: Weather) -> None:
    start("alice").ask()
    call = weather.last("/chat-requirements")
    sent = json.loads(base64.b64decode(call.json()["p"][7:]))
    assert sent[4] == call.headers["user-agent"] and "Chrome" in sent[4]
    assert sent[5] == "/_next/static/chunks/app.js" and sent[6] == "prod-demo1"
    assert "upgrade" not in call.headers


# --- the transport ---------------------------------------------------------------------------------------------------


def test_a_silent_upstream_is_a_504(start: Callable[..., Proxy], weather: Weather) -> None:
    proxy = start("alice", upstream_timeout="1")
    weather.add("/conversation", weather.silence())
    began = time.monotonic()
    assert error_of(proxy.ask()) == (504, "upstream_timeout")
    assert time.monotonic() - began < 4 and weather.count("/conversation") == 1
    weather.add("/chat-requirements", weather.silence())
    assert start("alice", folder="other", upstream_timeout="1").ask().status_code == 504


@pytest.mark.parametrize("call", ["/conversation", "/chat-requirements"])
@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_hangs_up_ends_the_silent_upstream_call(
    start: Callable[..., Proxy], weather: Weather, call: str, stream: bool
) -> None:
    proxy = start("alice")
    weather.add(call, weather.silence())
    body = json.dumps({"model": "gpt-4o", "stream": stream, "messages": [{"role": "user", "content": "hi"}]})
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nAuthorization: {KEY}\r\nContent-Length: {len(body)}\r\n\r\n"
    with socket.create_connection(proxy.address) as sock:
        sock.sendall((head + body).encode())
        wait_until(lambda: weather.count(call))
        left = time.monotonic()
    wait_until(lambda: weather.left)
    assert weather.left[0] - left < 2


def test_a_waiting_client_gets_heartbeats_before_the_first_word_too(
    start: Callable[..., Proxy], weather: Weather
) -> None:
    proxy = start("alice", heartbeat="1", upstream_timeout="2")
    weather.add("/conversation", weather.silence())
    chunks, text = proxy.stream()
    assert text.startswith(": \n\n") and chunks[-1]["error"]["code"] == "upstream_timeout"
    assert not text.endswith("data: [DONE]\n\n")
    words = b"".join(weather.say({"model": "gpt-4o"}, ["one"])).partition(
        b'event: delta\ndata: {"p":"","o":"patch"'
    )[0]
    weather.add("/conversation", weather.silence(words))
    chunks, text = proxy.stream()
    assert text_of(chunks) == "one" and ": \n\n" in text


def test_what_is_hidden_from_the_client_is_silence_to_it(
    start: Callable[..., Proxy], weather: Weather
) -> None:
    proxy = start("alice", heartbeat="1")
    hidden = {"id": "h", "author": {"role": "tool"}, "content": {"content_type": "text", "parts": [""]}}

    def busy(request: cp.Request) -> cp.Stream:
        def pieces() -> cp.Sent:
            for _ in range(12):
                yield cp.data_event({"message": hidden}), 1
                time.sleep(0.1)
            for piece in weather.say(request.json(), weather.words):
                yield piece, 1

        return cp.streamed(pieces())

    weather.add("/conversation", busy)
    chunks, text = proxy.stream()
    assert text.startswith(": \n\n") and text_of(chunks) == "Hello wide world."


def test_a_whole_answer_without_its_last_event_is_whole(
    start: Callable[..., Proxy], weather: Weather
) -> None:
    proxy = start("alice", retry_times="0")
    weather.add(
        "/conversation",
        cut_stream(b"".join(weather.say({"model": "m"}, ["Done"])).removesuffix(b"data: [DONE]\n\n")),
    )
    chunks, text = proxy.stream()
    assert text_of(chunks) == "Done" and text.endswith("data: [DONE]\n\n")


@pytest.mark.parametrize("end", [b"data: [DONE]\n\n", b"data: [DONE]\r\n\r\n"])
def test_an_upstream_that_lingers_after_the_end_is_not_waited_for(
    start: Callable[..., Proxy], weather: Weather, end: bytes
) -> None:
    proxy = start("alice", upstream_timeout="3")
    words = b"".join(weather.say({"model": "gpt-4o"}, ["Done"])).removesuffix(b"data: [DONE]\n\n")
    weather.add("/conversation", weather.silence(words + end), weather.silence(words + end))
    began = time.monotonic()
    chunks, text = proxy.stream()
    assert text_of(chunks) == proxy.say() == "Done" and text.endswith("data: [DONE]\n\n")
    assert time.monotonic() - began < 2


def test_a_busy_upstream_is_left_when_the_client_is_gone(
    start: Callable[..., Proxy], weather: Weather
) -> None:
    proxy = start("alice")
    weather.words, weather.pace = [" word"] * 400, 0.02
    body = json.dumps({"model": "gpt-4o", "messages": [{"role": "user", "content": "hi"}]})
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nAuthorization: {KEY}\r\nContent-Length: {len(body)}\r\n\r\n"
    with socket.create_connection(proxy.address) as sock:
        sock.sendall((head + body).encode())
        wait_until(lambda: weather.count("/conversation"))
    wait_until(lambda: 'status="499"' in httpx.get(f"{proxy.url}/metrics").text, 2.5)


def test_an_answer_cut_in_the_middle_ends_in_an_error_event(
    start: Callable[..., Proxy], weather: Weather
) -> None:
    proxy = start("alice", "bob")
    half = list(weather.say({"model": "gpt-4o"}, [" a", " b", " c"]))[:5]
    weather.add("/conversation", cut_stream(*half), raw_stream(*half))
    for _ in range(2):  # a broken connection, and an orderly end in the middle
        chunks, text = proxy.stream()
        assert text_of(chunks) == " a b" and chunks[-1]["error"]["code"] == "upstream_error"
        assert "[DONE]" not in text
    assert weather.count("/conversation") == 2
    weather.add("/conversation", cut_stream(*half))
    assert error_of(proxy.ask()) == (502, "upstream_error")


def test_an_error_that_the_upstream_streams_is_told(start: Callable[..., Proxy], weather: Weather) -> None:
    proxy = start("alice", retry_times="0")
    weather.add("/conversation", raw_stream(b'data: {"message": null, "error": "secret words"}\n\n'))
    refused = proxy.ask()
    assert error_of(refused) == (502, "upstream_error") and "secret words" not in refused.text


def test_connections_upstream_are_kept(start: Callable[..., Proxy], weather: Weather) -> None:
    proxy = start("alice")
    before = weather_connections(weather)
    for _ in range(10):
        proxy.ask()
    assert weather_connections(weather) - before <= 3


def weather_connections(weather: Weather) -> int:
    """How many connections have been made to the upstream so far, by the ports they came from."""
    return len({id(request.watch) for request in weather.seen})


def over_http2(
    weather: Weather, certificate: pathlib.Path, key: pathlib.Path, spoken: set[str]
) -> Iterator[str]:
    """The weather over TLS with HTTP/2 on offer, as the real upstream is; notes which versions were spoken."""
    import hypercorn.asyncio
    import hypercorn.config

    async def app(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            return
        spoken.add(scope["http_version"])
        body = b""
        while True:
            event = await receive()
            body += event.get("body", b"")
            if not event.get("more_body"):
                break
        headers = {name.decode(): value.decode() for name, value in scope["headers"]}
        request = cp.Request(
            scope["method"], scope["path"], {}, headers, cp.Blob(body), "127.0.0.1", cp.Watch()
        )
        answer = weather.respond(request)
        assert not isinstance(answer, cp.Upgrade)
        kind = [(b"content-type", answer.content_type.encode())]
        await send({"type": "http.response.start", "status": answer.status, "headers": kind})
        for piece in [answer.body] if isinstance(answer, cp.Reply) else written(answer):
            await send({"type": "http.response.body", "body": piece, "more_body": True})
        await send({"type": "http.response.body", "body": b""})

    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    config = hypercorn.config.Config()
    config.bind = [f"127.0.0.1:{port}"]
    config.certfile, config.keyfile, config.alpn_protocols = str(certificate), str(key), ["h2", "http/1.1"]
    loop, stop = asyncio.new_event_loop(), asyncio.Event()
    serving = hypercorn.asyncio.serve(app, config, shutdown_trigger=stop.wait)
    thread = threading.Thread(target=loop.run_until_complete, args=(serving,), daemon=True)
    thread.start()
    yield f"https://127.0.0.1:{port}"
    loop.call_soon_threadsafe(stop.set)
    thread.join(5)


def test_http_2_is_spoken_over_tls(tmp_path: pathlib.Path, weather: Weather) -> None:

    authority, spoken = trustme.CA(), set[str]()
    issued = authority.issue_cert("127.0.0.1")
    authority.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
    issued.cert_chain_pems[0].write_to_path(str(tmp_path / "cert.pem"))
    issued.private_key_pem.write_to_path(str(tmp_path / "key.pem"))
    for url in over_http2(weather, tmp_path / "cert.pem", tmp_path / "key.pem", spoken):
        env = {"DATA_DIR": str(tmp_path / "data"), "AUTHORIZATION": KEY, "CHATGPT_BASE_URL": url}
        env["SSL_CERT_FILE"] = str(tmp_path / "ca.pem")
        assert run("accounts", "add", cp.demo_token("alice"), env=env).returncode == 0
        with Served(env=env) as served:
            client = openai.OpenAI(base_url=f"{served.url}/v1", api_key=KEY, max_retries=0)
            for _ in range(3):
                stream = client.chat.completions.create(
                    model="gpt-4o", messages=[{"role": "user", "content": "hi"}], stream=True
                )
                text = "".join(chunk.choices[0].delta.content or "" for chunk in stream)
                assert text == "Hello wide world."
    assert spoken == {"2"}


def test_a_plain_proxy_is_used(start: Callable[..., Proxy], weather: Weather) -> None:
    through: list[bytes] = []

    def serve(listener: socket.socket) -> None:
        while True:
            client, _ = listener.accept()
            through.append(client.recv(65536))
            client.sendall(b"HTTP/1.1 502 Bad Gateway\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
            client.close()

    listener = socket.create_server(("127.0.0.1", 0))
    threading.Thread(target=serve, args=(listener,), daemon=True).start()
    proxy = start("alice", proxy_url=f"http://127.0.0.1:{listener.getsockname()[1]}", retry_times="0")
    assert error_of(proxy.ask()) == (502, "upstream_error")
    assert through[0].startswith(f"GET {weather.url}/ HTTP/1.1".encode())


# --- the stream ------------------------------------------------------------------------------------------------------


def decoded(data: bytes, cuts: list[int]) -> list[cp.Found]:
    """The events of some bytes cut at these places, pieces of text joined."""
    decoder, out, start = cp.Decoder(), list[cp.Found](), 0
    for cut in [*sorted(cut % (len(data) + 1) for cut in cuts), len(data)]:
        out += decoder.feed(data[start:cut])
        start = cut
    finish = decoder.finish()
    joined: list[cp.Found] = []
    for event in [*out, *([finish] if finish else [])]:
        if joined and isinstance(event, (cp.Text, cp.Reasoning)) and type(joined[-1]) is type(event):
            joined[-1] = type(event)(joined[-1].text + event.text)
        else:
            joined.append(event)
    return joined


def recorded(encoding: str, newline: bytes = b"\n") -> bytes:
    weather = Weather()
    weather.encoding = encoding
    data = b"".join(
        weather.say({"model": "gpt-4o"}, ["Grüße", " 世界", " 🌍", "\n\nend", " \\u2028 ", "\u2028."])
    )
    thoughts = {
        "id": "t",
        "author": {"role": "assistant"},
        "content": {"content_type": "thoughts", "thoughts": [{"summary": "Hm", "content": "think"}]},
    }
    head, _, tail = data.partition(b'"role":"assistant"')
    at = head.rfind(b"event: delta\n") if encoding == "v1" else head.rfind(b"data: ")
    thought = cp.data_event(
        {"v": {"message": thoughts}, "p": "", "o": "add"} if encoding == "v1" else {"message": thoughts}
    )
    data = head[:at] + thought + b": a comment\n\n" + head[at:] + b'"role":"assistant"' + tail
    return data.replace(b"\n", newline)


@pytest.mark.parametrize("encoding", ["v1", "cumulative"])
@pytest.mark.parametrize("newline", [b"\n", b"\r\n", b"\r"])
@hypothesis_settings(max_examples=60)
@given(cuts=st.lists(st.integers(0, 10**6), max_size=60))
def test_any_split_of_the_bytes_gives_the_same_events(encoding: str, newline: bytes, cuts: list[int]) -> None:
    data = recorded(encoding, newline)
    events = decoded(data, cuts)
    assert [type(event) for event in events] == [cp.Begin, cp.Reasoning, cp.Text, cp.Finish]
    assert events[1] == cp.Reasoning("Hm\nthink")
    assert events[2] == cp.Text("Grüße 世界 🌍\n\nend \\u2028 \u2028.") and events[3].reason == "stop"  # type: ignore[union-attr]


def test_lines_of_one_event_stay_together_however_they_are_cut() -> None:
    data = b"data: a\r\ndata: b\r\n\r\ndata: c\r\rdata: d\n\n"
    for cut in range(len(data)):
        for other in range(cut, len(data)):
            events = cp.EventStream()
            got = events.feed(data[:cut]) + events.feed(data[cut:other]) + events.feed(data[other:])
            assert got == ["a\nb", "c", "d"]


def test_every_single_cut_gives_the_same_events() -> None:
    data = recorded("v1", b"\r\n")
    whole = decoded(data, [])
    assert all(decoded(data, [cut]) == whole for cut in range(len(data)))
    assert decoded(data, list(range(len(data)))) == whole


@given(
    st.binary(max_size=200),
    st.lists(
        st.sampled_from([b'data: {"v": ', b'"x"', b"}", b"\n\n", b'{"p": "", "o": "patch", "v": [{}]']),
        max_size=20,
    ),
)
def test_no_bytes_break_the_decoder(noise: bytes, pieces: list[bytes]) -> None:
    decoder = cp.Decoder()
    with contextlib.suppress(cp.Refusal):
        decoder.feed(noise)
        decoder.feed(b"".join(pieces) + noise)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 5) | st.text(max_size=5),
    lambda j: (
        st.lists(j, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                [
                    "p",
                    "o",
                    "v",
                    "message",
                    "content",
                    "parts",
                    "author",
                    "role",
                    "metadata",
                    "type",
                    "error",
                    "id",
                    "thoughts",
                ]
            ),
            j,
            max_size=4,
        )
    ),
    max_leaves=12,
)


@hypothesis_settings(max_examples=300)
@given(
    st.lists(
        st.fixed_dictionaries(
            {},
            optional={
                "p": st.sampled_from(
                    [
                        "",
                        "/message",
                        "/message/content/parts/0",
                        "/message/content/thoughts/0/content",
                        "/message/metadata",
                        "/message/content",
                    ]
                ),
                "o": st.sampled_from(["add", "append", "replace", "remove", "truncate", "patch"]),
                "v": JSON,
            },
        )
        | JSON,
        max_size=8,
    )
)
def test_no_event_of_any_shape_breaks_the_decoder(values: list[Any]) -> None:
    decoder = cp.Decoder()
    opening = {
        "v": {
            "message": {
                "id": "m",
                "author": {"role": "assistant"},
                "content": {"content_type": "text", "parts": [""]},
            }
        }
    }
    for value in [opening, *values]:
        with contextlib.suppress(cp.Refusal):
            decoder.feed(cp.data_event({"p": "", "o": "add"} | value if value is opening else value))


def test_only_what_is_meant_for_the_reader_is_the_answer() -> None:
    def message(text: str, **changes: Any) -> bytes:
        value = {
            "id": text,
            "author": {"role": "assistant"},
            "content": {"content_type": "text", "parts": [text]},
        } | changes
        return cp.data_event({"p": "", "o": "add", "v": {"message": value, "conversation_id": "c"}})

    data = message("user", author={"role": "user"})
    data += message("hidden", metadata={"is_visually_hidden_from_conversation": True})
    data += message("code", recipient="python", content={"content_type": "code", "text": "1"})
    data += message("aside", channel="commentary")
    data += message("tool", author={"role": "tool"})
    data += message("Yes", channel="final", recipient="all", status="finished_successfully", end_turn=True)
    data += b'data: {"type": "brand_new_thing"}\n\ndata: 12\n\ndata: [DONE]\n\n'
    events = decoded(data, [])
    assert [event.text for event in events if isinstance(event, cp.Text)] == ["Yes"]


def test_v1_operations_carry_over_and_patch() -> None:
    lines = [
        {
            "p": "",
            "o": "add",
            "v": {
                "message": {
                    "id": "m",
                    "author": {"role": "assistant"},
                    "content": {"content_type": "text", "parts": [""]},
                }
            },
        },
        {"p": "/message/content/parts/0", "o": "append", "v": "A"},
        {"v": "B"},
        {
            "p": "",
            "o": "patch",
            "v": [
                {"p": "/message/content/parts/0", "o": "append", "v": "C"},
                {"p": "/message/metadata", "o": "add", "v": {}},
            ],
        },
        {"v": [{"p": "/message/content/parts/0", "o": "append", "v": "D"}]},
        {"p": "/message/content/parts/0", "o": "replace", "v": "ABCDE"},
        {"o": "append", "v": "F"},
        {"v": "G"},
        {"p": "/message/nowhere/9/x", "o": "remove"},
        {"p": "/message/content/parts/0", "o": "append", "v": "H"},
    ]
    decoder = cp.Decoder()
    events = [event for line in lines for event in decoder.feed(cp.data_event(line))]
    assert "".join(event.text for event in events if isinstance(event, cp.Text)) == "ABCDEFGH"


def said_by(role: str, text: str, **facts: Any) -> dict[str, Any]:
    """A message of the upstream's, as it begins."""
    return {
        "id": f"{role}-{text}",
        "author": {"role": role},
        "content": {"content_type": "text", "parts": [text]},
    } | facts


def test_what_the_model_is_told_that_it_said_is_not_said_again(proxy: Proxy, weather: Weather) -> None:
    """ "History in messages": an echo has the id that was sent, or is complete at once and says the same."""
    history: Any = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "OLD"},
        {"role": "user", "content": "b"},
    ]
    for encoding in ("v1", "cumulative"):
        weather.encoding = encoding
        weather.before = [
            {"author": {"role": "assistant"}, "content": {"content_type": "text", "parts": ["OLD"]}}
        ]
        assert proxy.say(messages=history) == "Hello wide world."
        assert proxy.say() == "OLDHello wide world."  # which nobody has told it
        weather.before = []
        weather.words = ["O", "L", "D"]  # an answer may say the same, in the course of time
        assert proxy.say(messages=history) == "OLD"
        weather.words = ["Hello", " wide", " world", "."]


def test_deltas_are_for_the_message_of_their_channel() -> None:
    """ "v1": `c` selects the document, and is carried over at top level."""
    lines = [
        {"p": "", "o": "add", "v": {"message": said_by("assistant", "", channel="analysis")}, "c": 0},
        {"p": "", "o": "add", "v": {"message": said_by("assistant", " ")}, "c": 1},
        {"p": "/message/content/parts/0", "o": "append", "v": "A", "c": 1},
        {"v": "B"},
        {"v": "hidden", "c": 0},
        {"v": "hidden too"},
        {"v": "C", "c": 1},
        {"p": "", "o": "patch", "v": [{"p": "/message/content/parts/0", "o": "append", "v": "D"}]},
        {"v": [{"p": "/message/content/parts/0", "o": "append", "v": "never"}], "c": 7},  # which nobody began
        {"v": [{"p": "/message/content/parts/0", "o": "append", "v": "E"}], "c": 1},
        {"p": "/message/status", "o": "replace", "v": "finished_successfully", "c": []},
    ]
    decoder = cp.Decoder()
    events = [event for line in lines for event in decoder.feed(cp.data_event(line))]
    assert "".join(event.text for event in events if isinstance(event, cp.Text)) == " ABCDE"


def test_a_message_of_no_weight_is_hidden(proxy: Proxy, weather: Weather) -> None:
    weather.before = [
        {"weight": 0.0, "author": {"role": "assistant"}, "content": {"content_type": "text", "parts": ["no"]}}
    ]
    assert proxy.say() == "Hello wide world."
    weather.before[0]["weight"] = 1.0
    assert proxy.say() == "noHello wide world."


@pytest.mark.parametrize(
    ("told", "expected"),
    [
        (
            {"message": said_by("assistant", "", content={"content_type": "system_error", "text": "secret"})},
            (502, "upstream_error"),
        ),
        ({"message": None, "error_code": "secret", "error": None}, (502, "upstream_error")),
        ({"message": None, "error": UNUSUAL}, (403, "upstream_blocked")),
        ({"message": None, "error": {"message": UNUSUAL, "code": "secret"}}, (403, "upstream_blocked")),
        (
            {"message": said_by("assistant", "", content={"content_type": "system_error", "text": UNUSUAL})},
            (403, "upstream_blocked"),
        ),
    ],
)
def test_a_failure_within_an_answer_is_told_as_what_it_is(
    start: Callable[..., Proxy], weather: Weather, told: Any, expected: tuple[int, str]
) -> None:
    proxy = start("alice", retry_times="0")
    weather.add(
        "/conversation", *[raw_stream(cp.data_event(told))] * 2
    )  # requirements are asked for anew after a refusal
    refused = proxy.ask()
    assert error_of(refused) == expected and "secret" not in refused.text


def test_an_answer_without_content_is_an_error(start: Callable[..., Proxy], weather: Weather) -> None:
    proxy = start("alice", "bob", retry_times="1")
    nothing = raw_stream(b"data: [DONE]\n\n")
    weather.add("/conversation", nothing, nothing)
    refused = proxy.ask()
    assert error_of(refused) == (502, "upstream_error") and "without having said anything" in refused.text
    weather.add("/conversation", nothing)
    assert proxy.say() == "Hello wide world."  # by the next account
    weather.words = []
    weather.before = [THOUGHT]  # thoughts are no answer
    assert error_of(proxy.ask()) == (502, "upstream_error")
    streamed = proxy.ask(stream=True)  # which may have begun
    assert '"code":"upstream_error"' in streamed.text and "[DONE]" not in streamed.text
    weather.before, weather.details = [], "max_tokens"
    assert error_of(proxy.ask()) == (502, "upstream_error")


@pytest.mark.parametrize("encoding", ["v1", "cumulative"])
def test_both_encodings_give_the_same_answer(
    start: Callable[..., Proxy], weather: Weather, encoding: str
) -> None:
    weather.encoding = encoding
    proxy = start("alice")
    chunks, text = proxy.stream()
    assert text_of(chunks) == proxy.say() == "Hello wide world."
    assert chunks[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert chunks[-1]["choices"][0] == {"index": 0, "delta": {}, "logprobs": None, "finish_reason": "stop"}
    assert text.endswith("data: [DONE]\n\n") and {chunk["id"] for chunk in chunks} == {chunks[0]["id"]}


@given(
    st.text("abc", max_size=60),
    st.lists(st.text("abc", min_size=1, max_size=4), min_size=1, max_size=4),
    st.lists(st.integers(0, 60), max_size=12),
)
def test_a_stop_sequence_never_leaks_however_the_text_is_cut(
    text: str, stops: list[str], cuts: list[int]
) -> None:
    ends = [(text.find(stop) + len(stop), text.find(stop)) for stop in stops if stop in text]
    place = min(ends)[1] if ends else len(text)  # the first to be complete
    trimmer, out, start = cp.Trimmer(stops, None, len), list[cp.Event](), 0
    for cut in [*sorted(min(cut, len(text)) for cut in cuts), len(text)]:
        out += trimmer.feed([cp.Text(text[start:cut])] if text[start:cut] else [])
        start = cut
    out += trimmer.feed([cp.Finish("length")])
    assert "".join(event.text for event in out if isinstance(event, cp.Text)) == text[:place]
    assert out[-1].reason == ("stop" if ends else "length")  # type: ignore[union-attr]


@given(st.text(max_size=80), st.integers(1, 40), st.lists(st.integers(0, 80), max_size=12))
def test_no_answer_is_longer_than_its_limit(text: str, limit: int, cuts: list[int]) -> None:
    trimmer, out, start = cp.Trimmer([], limit, len), list[cp.Event](), 0
    for cut in [*sorted(min(cut, len(text)) for cut in cuts), len(text)]:
        out += trimmer.feed([cp.Text(text[start:cut])] if text[start:cut] else [])
        start = cut
    out += trimmer.feed([cp.Finish("stop")])
    assert "".join(event.text for event in out if isinstance(event, cp.Text)) == text[:limit]
    assert out[-1].reason == ("length" if len(text) > limit else "stop")  # type: ignore[union-attr]


def test_stop_and_max_tokens_are_enforced_here(start: Callable[..., Proxy], weather: Weather) -> None:
    proxy = start("alice")
    weather.words = ["One", " two ST", "O", "P three", " four"]
    answer = proxy.ask(stop=["STOP", "never"]).json()["choices"][0]
    assert (answer["message"]["content"], answer["finish_reason"]) == ("One two ", "stop")
    chunks, text = proxy.stream(stop="STOP")
    assert text_of(chunks) == "One two " and "ST" not in re.sub(r'"id":"[^"]*"', "", text)
    weather.words = [" one", " two", " three", " four", " five"]
    for answer in (proxy.ask(max_tokens=3).json(), proxy.ask(max_completion_tokens=3).json()):
        assert answer["choices"][0]["message"]["content"] == " one two three"
        assert answer["choices"][0]["finish_reason"] == "length" and answer["usage"]["completion_tokens"] == 3


def test_an_answer_cut_by_length_is_continued(start: Callable[..., Proxy], weather: Weather) -> None:
    proxy = start("alice")

    def cut(request: cp.Request) -> cp.Stream:
        return cp.streamed(weather.frames(weather.say(request.json(), [" part"], "max_tokens")))

    weather.add("/conversation", cut, cut)
    chunks, _ = proxy.stream()
    assert (
        text_of(chunks) == " part partHello wide world."
        and chunks[-1]["choices"][0]["finish_reason"] == "stop"
    )
    call = weather.last("/conversation").json()
    assert (
        call["action"] == "continue"
        and "messages" not in call
        and call["conversation_id"] in weather.conversations
    )
    weather.add("/conversation", *[cut] * 9)
    answer = proxy.ask().json()["choices"][0]
    assert answer["message"]["content"] == " part" * 4 and answer["finish_reason"] == "length"


def test_a_continuation_that_is_refused_leaves_the_answer_good(
    start: Callable[..., Proxy], weather: Weather
) -> None:
    proxy = start("alice")
    cut = raw_stream(b"".join(weather.say({"model": "gpt-4o"}, [" part"], "max_tokens")))
    weather.add("/conversation", cut, status(429, {"detail": {"clears_in": 500}}))
    answer = proxy.ask().json()["choices"][0]
    assert answer["message"]["content"] == " part" and answer["finish_reason"] == "length"
    assert proxy.states() == {"alice@demo.example": "waiting"}


def test_a_client_that_limits_its_answers_is_served_ahead_too(
    start: Callable[..., Proxy], weather: Weather
) -> None:
    proxy = start("alice", history_disabled="false")
    known = proxy.ask(max_tokens=1).json()["conversation_id"]
    account = proxy.app.pool.accounts()[0]
    assert account.answered and proxy.store.conversation(known).account == account.id  # type: ignore[union-attr] # held
    wait_until(lambda: spare_ready(account))


def test_moderation_ends_an_answer_as_content_filter(start: Callable[..., Proxy], weather: Weather) -> None:
    proxy = start("alice")
    pieces = list(weather.say({"model": "gpt-4o"}, [" a", " b"]))
    blocked = cp.data_event({"type": "moderation", "moderation_response": {"blocked": True}})
    weather.add("/conversation", raw_stream(*pieces[:4], blocked, *pieces[4:]))
    assert proxy.ask().json()["choices"][0]["finish_reason"] == "content_filter"


def test_usage_is_told_when_asked_for(proxy: Proxy) -> None:
    usage = proxy.ask("hello there").json()["usage"]
    assert usage["prompt_tokens"] > 2 and usage["completion_tokens"] == 4
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
    chunks, _ = proxy.stream(stream_options={"include_usage": True})
    assert chunks[-1]["choices"] == [] and chunks[-1]["usage"]["completion_tokens"] == 4
    assert all(chunk["usage"] is None for chunk in chunks[:-1])
    assert all("usage" not in chunk for chunk in proxy.stream()[0])


# Name, tokens in o200k_base (counted with its own ranks), text.
SAMPLES: list[tuple[str, int, str]] = [
    (
        "english_chat",
        94,
        "Could you help me plan a surprise party for my sister? She turns thirty next month and has always sa"
        "id she hates surprises, but I think she would secretly enjoy it. There will be about twenty guests, "
        "most of them coming by train, so the place should be close to a station. We have a small garden, but"
        " the weather in April is hard to trust. I'd like to cook most of the food the day before, and two of"
        " her friends are vegetarian.",
    ),
    (
        "english_essay",
        99,
        "Glaciers shape the land more slowly than rivers, yet with far greater force. As the ice moves downhi"
        "ll it plucks boulders from the valley floor and grinds them against the rock, leaving long parallel "
        "scratches that geologists can still read thousands of years later. When the climate warms and the ic"
        "e retreats, it drops everything it has carried: ridges of gravel, fields of clay, and single stones "
        "the size of a house, resting far from the mountains where they were born.",
    ),
    (
        "chinese_chat",
        127,
        "我打算下个月带父母去云南旅游,大概玩六天左右。他们年纪比较大,不太适合爬山,也不想每天换酒店。请帮我安排一个轻"
        "松一点的行程,最好包括昆明、大理和丽江三个地方,每天只去一两个景点。另外,听说那边早晚温差很大,需要带什么样的"
        "衣服?吃饭方面我爸爸血压高,口味要清淡一些,有没有合适的餐馆可以推荐?预算每个人不超过五千块钱。",
    ),
    (
        "chinese_story",
        164,
        "天还没亮,渔村里就有了动静。阿海提着马灯,踩着湿滑的木板走到船边,解开缆绳,回头看了一眼岸上的小屋。窗户里亮着"
        "一点微光,那是母亲在为他煮早饭。海面很平静,像一块深蓝色的绸缎,远处的岛屿只剩下模糊的轮廓。他想起祖父常说的话"
        ":出海的人,心里要装着回家的路。船桨轻轻划开水面,几只海鸟被惊醒,扑棱着翅膀飞向渐渐发白的天边。",
    ),
    (
        "chinese_technical",
        119,
        "缓存可以显著减少重复计算,但是也会带来数据不一致的问题。常见的做法是给每一条缓存设置过期时间,并在数据更新之后"
        "主动删除对应的内容。如果大量缓存在同一时刻失效,请求就会全部落到数据库上,造成瞬间的压力过大,因此建议在过期时"
        "间上增加一个随机值。对于访问特别频繁的数据,可以使用互斥锁,保证同一时间只有一个线程负责重新加载,其他线程等待"
        "结果或者返回旧的内容。",
    ),
    (
        "python",
        162,
        "from collections.abc import Iterator\nfrom pathlib import Path\n\n\ndef read_blocks(path: Path, size: in"
        't = 4096) -> Iterator[bytes]:\n    """Yield the file\'s content in blocks of at most `size` bytes."""\n'
        '    with path.open("rb") as stream:\n        while block := stream.read(size):\n            yield bloc'
        "k\n\n\nclass Checksum:\n    def __init__(self, modulus: int = 65521) -> None:\n        self.modulus = mod"
        "ulus\n        self.low, self.high = 1, 0\n\n    def update(self, data: bytes) -> None:\n        for valu"
        "e in data:\n            self.low = (self.low + value) % self.modulus\n            self.high = (self.hi"
        "gh + self.low) % self.modulus\n",
    ),
    (
        "javascript",
        148,
        "export async function loadOrders(userId, { limit = 20, signal } = {}) {\n  const url = new URL(`/api/"
        'users/${userId}/orders`, window.location.origin);\n  url.searchParams.set("limit", String(limit));\n\n '
        ' const response = await fetch(url, { signal, headers: { Accept: "application/json" } });\n  if (!resp'
        "onse.ok) {\n    throw new Error(`Request failed: ${response.status}`);\n  }\n  const { items = [] } = a"
        'wait response.json();\n  return items\n    .filter((item) => item.status !== "cancelled")\n    .map(({ '
        "id, total, createdAt }) => ({ id, total, date: new Date(createdAt) }));\n}\n",
    ),
    (
        "go",
        116,
        'package queue\n\nimport (\n\t"context"\n\t"errors"\n\t"sync"\n)\n\nvar ErrClosed = errors.New("queue: closed")\n'
        "\ntype Queue[T any] struct {\n\tmu     sync.Mutex\n\titems  []T\n\tclosed bool\n}\n\nfunc (q *Queue[T]) Push(c"
        "tx context.Context, item T) error {\n\tq.mu.Lock()\n\tdefer q.mu.Unlock()\n\tif q.closed {\n\t\treturn ErrClo"
        "sed\n\t}\n\tif err := ctx.Err(); err != nil {\n\t\treturn err\n\t}\n\tq.items = append(q.items, item)\n\treturn n"
        "il\n}\n",
    ),
    (
        "json_compact",
        101,
        '{"id":"msg_7f3a91","model":"demo-large","created":1718035200,"usage":{"input_tokens":412,"output_tok'
        'ens":96,"cached":false},"content":[{"type":"text","text":"The parcel left the warehouse this morning'
        '."},{"type":"tool_use","name":"track_parcel","input":{"number":"QX-20931","country":"NL","notify":["'
        'email","sms"]}}],"stop_reason":null,"temperature":0.7}',
    ),
    (
        "json_pretty",
        170,
        '{\n  "id": "msg_7f3a91",\n  "model": "demo-large",\n  "created": 1718035200,\n  "usage": {\n    "input_to'
        'kens": 412,\n    "output_tokens": 96,\n    "cached": false\n  },\n  "content": [\n    {\n      "type": "te'
        'xt",\n      "text": "The parcel left the warehouse this morning."\n    },\n    {\n      "type": "tool_us'
        'e",\n      "name": "track_parcel",\n      "input": {\n        "number": "QX-20931",\n        "country": '
        '"NL",\n        "notify": [\n          "email",\n          "sms"\n        ]\n      }\n    }\n  ],\n  "stop_re'
        'ason": null,\n  "temperature": 0.7\n}',
    ),
    (
        "json_chinese",
        105,
        '{"messages": [{"role": "system", "content": "你是一个简洁的助手。'
        '"}, {"role": "user", "content": "请把下面的句子翻译成英文:今天的会议改到下午'
        '三点。"}, {"role": "assistant", "content": "Today\'s meetin'
        'g has been moved to three in the afternoon."}, {"role":'
        ' "user", "content": "如果要更正式一点呢?"}], "stream": true, "ma'
        'x_tokens": 256}',
    ),
    (
        "markdown",
        141,
        "# Release checklist\n\n1. Run the full test suite: `make test`\n2. Update **CHANGELOG.md** and the vers"
        "ion in `pyproject.toml`\n3. Build the package and try it in a clean environment\n\n| Step    | Owner | "
        "Time   | Done |\n|---------|-------|-------:|:----:|\n| Tests   | Anna  | 20 min | yes  |\n| Docs    | "
        "Bilal | 45 min | no   |\n| Upload  | Chen  |  5 min | no   |\n\n> Never publish on a Friday. See the [g"
        "uide](https://docs.example.org/release#rollback) for how to roll back.\n",
    ),
    (
        "mixed",
        105,
        "这个报错是因为 `asyncio.run()` 不能在已经运行的事件循环里调用。你可以改成下面这样:\n\n```"
        "python\nasync def main() -> None:\n    results = await as"
        "yncio.gather(*(fetch(url) for url in urls))\n    print(l"
        "en(results))\n```\n\n在 Jupyter 里直接写 `await main()` 就可以了 👍。"
        "如果是普通脚本,再用 `asyncio.run(main())`,并确认 Python 版本不低于 3.9。\n",
    ),
    (
        "russian",
        99,
        "Подскажите, пожалуйста, как лучше ухаживать за комнатны"
        "ми растениями зимой? В квартире очень сухой воздух из-з"
        "а батарей, и у фикуса начали желтеть листья. Я поливаю "
        "его раз в неделю, но, кажется, этого слишком много. Сто"
        "ит ли поставить увлажнитель или достаточно опрыскивать "
        "листья водой по утрам? И ещё вопрос: можно ли пересажив"
        "ать цветы в январе, или лучше дождаться весны?",
    ),
    (
        "japanese",
        142,
        "来週の土曜日に友達が家に遊びに来るので、簡単に作れる料理を教えてください。人数は四人で、そのうち一人は卵アレル"
        "ギーがあります。できれば前の日に準備しておいて、当日は温めるだけにしたいです。デザートには季節の果物を使ったも"
        "のがいいと思っていますが、オーブンは持っていません。飲み物はお酒以外でおすすめがあれば、それも一緒に教えてもら"
        "えると助かります。買い物は近所のスーパーで済ませる予定です。",
    ),
]


@pytest.mark.parametrize(("name", "tokens", "text"), SAMPLES, ids=[sample[0] for sample in SAMPLES])
def test_the_estimate_is_within_15_percent_of_o200k_base(name: str, tokens: int, text: str) -> None:
    assert abs(cp.estimate_tokens(text) - tokens) <= 0.15 * tokens


def test_tiktoken_counts_when_it_is_there(tmp_path: pathlib.Path) -> None:
    (tmp_path / "tiktoken.py").write_text(
        "class E:\n def encode(self, text, disallowed_special):\n  return list(text)\ndef get_encoding(name):\n return E()\n"
    )
    with Served("--demo", env={"PYTHONPATH": str(tmp_path)}) as served:
        body = {"model": "gpt-4o", "messages": [{"role": "user", "content": "four"}]}
        answer = httpx.post(f"{served.url}/v1/chat/completions", json=body, timeout=30).json()
        assert answer["usage"]["completion_tokens"] == len(answer["choices"][0]["message"]["content"])


def test_an_sk_key_passes_bodies_of_any_size_on(start: Callable[..., Proxy], weather: Weather) -> None:
    proxy = start(authorization="")
    for body in (b"", b"x", b"y" * (3 << 20)):
        weather.add("/v1/files", lambda request: cp.json_reply({"bytes": request.body.size}))
        headers = {"Authorization": "Bearer sk-mine", "Content-Type": "multipart/form-data; boundary=b"}
        assert httpx.post(f"{proxy.url}/v1/files", content=body, headers=headers).json() == {
            "bytes": len(body)
        }


def test_what_the_upstream_cannot_honour_is_accepted_and_ignored(proxy: Proxy) -> None:
    answer = proxy.ask(
        temperature=0.1, top_p=1, seed=7, presence_penalty=0.5, frequency_penalty=1, logit_bias={"5": 1},
        logprobs=False, user="u", n=1, store=True, metadata={"a": "b"}, service_tier="auto", tools=[],
    )  # fmt: skip
    assert answer.status_code == 200


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"messages": []}, "messages"),
        ({"messages": "hi"}, "messages"),
        ({"messages": [{"role": "king", "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages[0].content[0].text"),
        ({"messages": [{"role": "user", "content": [{"type": "video"}]}]}, "messages[0].content[0]"),
        ({"messages": ["hi"]}, "messages[0]"),
        ({"model": None}, "model"),
        ({"model": 5}, "model"),
        ({"n": 2}, "n"),
        ({"logprobs": True}, "logprobs"),
        ({"stream": "yes"}, "stream"),
        ({"temperature": "hot"}, "temperature"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 1.5}, "max_tokens"),
        ({"stop": [1]}, "stop"),
        ({"stream_options": {"include_usage": 1}}, "stream_options.include_usage"),
        ({"tools": [{"type": "function"}]}, "tools[0].name"),
        ({"tools": [{"name": "f"}]}, "tools[0]"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools[0].name"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"response_format": {"type": "xml"}}, "response_format.type"),
        ({"response_format": {"type": "json_schema"}}, "response_format"),
        ({"reasoning_effort": "heroic"}, "reasoning_effort"),
    ],
)
def test_a_wrong_field_is_named(proxy: Proxy, weather: Weather, body: dict[str, Any], param: str) -> None:
    refused = proxy.ask(**body)
    assert error_of(refused) == (400, "invalid_request_error") and refused.json()["error"]["param"] == param
    assert weather.calls == []


@pytest.mark.parametrize(
    "body", [b"", b"{", b"[]", b"null", b"\xff", b"[" * 100000, b'{"a":' * 100000, b"1" * 5000]
)
def test_a_body_that_is_no_json_object_is_a_400(proxy: Proxy, body: bytes) -> None:
    answer = httpx.post(f"{proxy.url}/v1/chat/completions", content=body, headers={"Authorization": KEY})
    assert error_of(answer) == (400, "invalid_request_error")


def test_content_parts_and_every_role_reach_the_upstream(proxy: Proxy, weather: Weather) -> None:
    messages = [
        {"role": "developer", "content": "be brief"},
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
        {"role": "assistant", "content": None},
        {"role": "user", "content": "\ud800 lone"},
    ]
    body = json.dumps({"model": "gpt-4o", "messages": messages})
    answer = httpx.post(f"{proxy.url}/v1/chat/completions", content=body, headers={"Authorization": KEY})
    assert answer.status_code == 200
    sent = weather.last("/conversation").json()["messages"]
    assert [message["author"]["role"] for message in sent] == ["system", "user", "assistant", "user"]
    assert sent[1]["content"] == {"content_type": "text", "parts": ["a\nb"]}


# --- files that come with a message ----------------------------------------------------------------------------------


def picture(width: int = 64, height: int = 48, kind: str = "PNG", **options: Any) -> bytes:
    out = io.BytesIO()
    PIL.Image.new("RGB", (width, height), (width % 256, height % 256, 9)).save(out, kind, **options)
    return out.getvalue()


def data_url(data: bytes, mime: str = "image/png") -> str:
    return f"data:{mime};base64,{base64.b64encode(data).decode()}"


def image_part(url: str) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": url}}


def part_message(*parts: Any, role: str = "user") -> dict[str, Any]:
    texts = [{"type": "text", "text": part} if isinstance(part, str) else part for part in parts]
    return {"role": role, "content": texts}


@given(
    st.integers(1, 3000),
    st.integers(1, 3000),
    st.sampled_from(["PNG", "GIF", "JPEG", "WEBP", "LOSSLESS", "EXIF"]),
)
@hypothesis_settings(max_examples=60)
def test_an_images_size_is_read_from_its_bytes(width: int, height: int, kind: str) -> None:
    options: dict[str, Any] = {}
    if kind == "LOSSLESS":
        kind, options = "WEBP", {"lossless": True}
    elif kind == "EXIF":  # a thumbnail and other segments before the frame; in WebP the extended form
        kind, options = ("JPEG", "WEBP")[width % 2], {"exif": b"Exif\0\0" + bytes(60_000)}
    data = picture(width, height, kind, **options)
    assert cp.image_facts(cp.Blob(data)) == (f"image/{kind.lower()}", width, height)


@given(
    st.binary(max_size=60),
    st.sampled_from([b"", b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff\xe0", b"GIF89a", b"RIFF\0\0\0\0WEBPVP8"]),
)
def test_no_bytes_break_the_reader_of_sizes(data: bytes, head: bytes) -> None:
    facts = cp.image_facts(cp.Blob(head + data))
    assert facts is None or (facts[0].startswith("image/") and facts[1] >= 0)


def test_pictures_and_documents_reach_the_upstream(start: Callable[..., Proxy], weather: Weather) -> None:
    red, blue = picture(30, 20), picture(50, 40, "JPEG")
    note = {"type": "file", "file": {"filename": "note.md", "file_data": data_url(b"# hi", "text/markdown")}}
    table = {
        "type": "file",
        "file": {"filename": "table.csv", "file_data": base64.b64encode(b"a,b").decode()},
    }
    messages = [
        part_message("rules", image_part(data_url(red)), role="system"),
        part_message(
            "first", image_part(data_url(red)), "second", image_part(data_url(blue, "image/png")), note, table
        ),
    ]
    start("alice").say(messages=messages)
    system, user = weather.asked()["messages"]
    assert [one["content"]["content_type"] for one in (system, user)] == ["multimodal_text"] * 2
    kinds = [
        part if isinstance(part, str) else (part["width"], part["height"])
        for part in user["content"]["parts"]
    ]
    assert kinds == ["first", (30, 20), "second", (50, 40)]
    assert user["content"]["parts"][3]["size_bytes"] == len(blue)
    attached = user["metadata"]["attachments"]
    assert [(one["name"], one["mime_type"]) for one in attached[2:]] == [
        ("note.md", "text/markdown"),
        ("table.csv", "text/csv"),
    ]
    assert (
        attached[1]["mime_type"] == "image/jpeg" and attached[1]["width"] == 50 and "width" not in attached[2]
    )
    pointer = user["content"]["parts"][1]["asset_pointer"]
    assert pointer == f"file-service://{attached[0]['id']}" == system["content"]["parts"][1]["asset_pointer"]
    cases = {file.name: (file.use_case, file.mime) for file in weather.files.values()}
    assert cases["note.md"] == ("my_files", "text/markdown") and cases["table.csv"] == (
        "ace_upload",
        "text/csv",
    )
    assert weather.count("/files") == 4 and weather.count("/uploaded") == 4  # the red one once
    assert [
        call for call in weather.calls if call.startswith("GET") and "/files/" in call
    ]  # the document was polled


def test_the_same_bytes_are_uploaded_once_an_account(start: Callable[..., Proxy], weather: Weather) -> None:
    proxy = start("alice", "bob", random_token="false")
    for _ in range(4):
        proxy.say(messages=[part_message("what", image_part(data_url(picture())))])
    assert weather.count("/files") == 2


def test_an_upload_that_the_upstream_forgot_is_made_again(proxy: Proxy, weather: Weather) -> None:
    for _ in range(2):
        proxy.say(messages=[part_message("what", image_part(data_url(picture())))])
        weather.files.clear()
    assert weather.count("/files") == 2 and weather.count("/conversation") == 3


def test_an_upload_that_fails_goes_to_another_account(start: Callable[..., Proxy], weather: Weather) -> None:
    proxy, asked = start("alice", "bob"), [part_message("what", image_part(data_url(picture())))]
    weather.add("/files", status(503), status(503))
    proxy.say(messages=asked)
    assert weather.count("/files") == 3


def test_what_is_uploaded_is_not_sent_again_for_a_hiccup(proxy: Proxy, weather: Weather) -> None:
    weather.add("/uploaded", status(503), status(502))
    file = proxy.client().files.create(file=("a.txt", b"x"), purpose="user_data")
    assert weather.count("/files") == 1 and file.bytes == 1


def test_a_limit_for_uploads_leaves_chats_alone(start: Callable[..., Proxy], weather: Weather) -> None:
    proxy, asked = start("alice"), [part_message("what", image_part(data_url(picture())))]
    weather.add("/files", status(429, {"detail": {"clears_in": 1000}}))
    limited = proxy.ask(messages=asked)
    assert error_of(limited) == (429, "rate_limit_exceeded") and int(limited.headers["retry-after"]) > 900
    proxy.say()
    assert error_of(proxy.ask(messages=asked))[0] == 429 and weather.count("/files") == 1


def test_an_account_that_may_upload_is_found_among_those_that_may_not(
    start: Callable[..., Proxy], weather: Weather
) -> None:
    proxy = start(*(f"account{i}" for i in range(8)))
    accounts = proxy.app.pool.accounts()
    for account in accounts[:-1]:
        proxy.app.pool.told_to_wait(account, cp.UPLOADS, 1000)
    for i in range(6):
        proxy.say(messages=[part_message("what", image_part(data_url(picture(i + 1))))])
    file = accounts[-1].id
    assert {one.account for one in proxy.store.files("1")} == {file}
    proxy.app.pool.told_to_wait(accounts[-1], cp.UPLOADS, 1000)
    begin = time.monotonic()
    assert error_of(proxy.ask(messages=[part_message(image_part(data_url(picture(99))))]))[0] == 429
    assert time.monotonic() - begin < 1


def test_a_limit_met_while_uploading_again_is_one_for_uploads(proxy: Proxy, weather: Weather) -> None:
    asked = [part_message("what", image_part(data_url(picture())))]
    file = proxy.client().files.create(file=("a.txt", b"x"), purpose="user_data")
    proxy.say(messages=asked)
    weather.add("/conversation", status(404, {"detail": {"code": "file_not_found"}}))
    weather.add("/files", status(429, {"detail": {"clears_in": 1000}}))
    assert error_of(proxy.ask(messages=asked))[0] == 429
    proxy.say()
    assert proxy.client().files.content(file.id).read() == b"x"


def test_one_upload_of_many_that_fails_is_made_by_the_next(proxy: Proxy, weather: Weather) -> None:
    def fail(request: cp.Request) -> cp.Reply:
        time.sleep(0.3)
        return cp.Reply(500)

    make, seen = weather.create_file, list[str]()

    def create(request: cp.Request) -> cp.Reply:
        reply = make(request)
        seen.append(json.loads(reply.body)["file_id"])
        if len(seen) == 1:
            weather.add(f"/upload/{seen[0]}", fail)
        return reply

    weather.add("/files", *[create] * 9)
    asked = [part_message("what", image_part(data_url(picture(91, 91))))]
    with concurrent.futures.ThreadPoolExecutor(5) as executor:
        list(executor.map(lambda _: proxy.say(messages=asked), range(5)))
    assert len(seen) == 2


def test_a_file_that_the_upstream_rejects_is_offered_once(
    start: Callable[..., Proxy], weather: Weather
) -> None:
    proxy = start("alice", "bob")
    client = proxy.client()
    client.files.create(file=("a.txt", b"x"), purpose="user_data")
    weather.add("/files", status(422), status(422))
    with pytest.raises(openai.BadRequestError):
        client.files.create(file=("b.txt", b"y"), purpose="user_data")
    assert weather.count("/files") == 2


def test_a_file_whose_account_is_gone_says_so(start: Callable[..., Proxy], weather: Weather) -> None:
    alice = cp.demo_token("alice")
    proxy = start(alice)
    file = proxy.client().files.create(file=("a.txt", b"x"), purpose="user_data")
    weather.add("/download", status(404, {"detail": "Not Found"}))
    with pytest.raises(openai.NotFoundError):
        proxy.client().files.content(file.id)
    proxy.app.pool.add([cp.LOGIN_FREE, cp.demo_token("bob")])
    weather.dead.add(alice)
    with pytest.raises(openai.InternalServerError) as refused:
        for _ in range(2):
            proxy.client().files.content(file.id)
    assert refused.value.status_code == 503 and refused.value.code == "no_account"


def test_what_befalls_a_files_holder_is_not_blamed_on_who_asks(
    start: Callable[..., Proxy], weather: Weather
) -> None:
    alice = cp.demo_token("alice")
    proxy = start(alice, "bob", random_token="false")
    client = proxy.client()
    first = client.files.create(file=("1.txt", b"one"), purpose="user_data")
    holder = proxy.app.pool.find(proxy.store.files("id=?", first.id)[0].account)
    other = next(account for account in proxy.app.pool.accounts() if account is not holder)
    assert holder
    weather.dead.add(holder.row.access_token)
    second = client.files.create(file=("2.txt", b"two"), purpose="user_data")  # the first choice is dead
    assert proxy.store.files("id=?", second.id)[0].account == other.id
    asked = [part_message(*({"type": "file", "file": {"file_id": one.id}} for one in (second, first)))]
    assert proxy.ask(messages=asked).status_code in (404, 503)
    assert other.state(time.time()) == "ready" and holder.state(time.time()) == "expired"


def test_the_same_bytes_at_the_same_time_are_uploaded_once(proxy: Proxy, weather: Weather) -> None:
    asked = [part_message("what", image_part(data_url(picture(90, 90))))]
    with concurrent.futures.ThreadPoolExecutor(6) as executor:
        list(executor.map(lambda _: proxy.say(messages=asked), range(6)))
    assert weather.count("/files") == 1


def test_a_conversation_with_a_file_stays_where_it_was_begun(
    start: Callable[..., Proxy], weather: Weather
) -> None:
    proxy = start("alice", "bob", "carol", history_disabled="false")
    file = proxy.client().files.create(file=("1.txt", b"one"), purpose="user_data")
    asked = [part_message({"type": "file", "file": {"file_id": file.id}})]
    id = proxy.ask(messages=asked).json()["conversation_id"]
    assert proxy.app.pool.holder(id, ALL) == proxy.store.files("id=?", file.id)[0].account


def test_a_request_may_not_bring_files_without_end(proxy: Proxy, weather: Weather) -> None:
    refused = proxy.ask(messages=[part_message(*[image_part(data_url(picture()))] * 101)])
    assert error_of(refused) == (400, "invalid_request_error") and not weather.count("/files")


def test_a_slow_upload_is_no_silence(start: Callable[..., Proxy], weather: Weather) -> None:
    proxy, taken = start("alice", upstream_timeout="2", heartbeat="1"), bytearray()

    def take(listener: socket.socket) -> None:
        client, _ = listener.accept()
        with client:
            while not taken.endswith(b"END"):
                time.sleep(0.02)
                taken.extend(client.recv(65536))
            client.sendall(b"HTTP/1.1 201 Created\r\nContent-Length: 0\r\n\r\n")

    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65536)
        threading.Thread(target=take, args=(listener,), daemon=True).start()
        url = f"http://127.0.0.1:{listener.getsockname()[1]}/"
        weather.add("/files", status(200, {"file_id": "file-1", "upload_url": url}))
        weather.add("/uploaded", status(200, {"status": "success"}))
        data = picture() + os.urandom(9 << 20) + b"END"
        _, text = proxy.stream(messages=[part_message("what", image_part(data_url(data)))])
    assert len(taken) > len(data) and text.count(": \n\n") >= 2  # and the client hears that something happens


def test_a_compressed_upstream_is_understood(proxy: Proxy, weather: Weather) -> None:
    def compressed(request: cp.Request) -> cp.Reply:
        body = gzip.compress(b"".join(weather.say(request.json(), ["packed"])))
        return cp.Reply(200, body, "text/event-stream", {"Content-Encoding": "gzip"})

    weather.add("/conversation", compressed)
    assert proxy.say() == "packed"
    assert weather.last("/conversation").headers["accept-encoding"] == "gzip, deflate, br, zstd"


def test_a_picture_that_is_none_is_refused(proxy: Proxy, weather: Weather) -> None:
    for url, where in (
        (data_url(b"not a picture"), "messages[0].content[0].image_url"),
        ("data:image/png;base64,%%%", "messages[0].content[0].image_url"),
        ("ftp://x/y.png", "messages[0].content[0].image_url"),
        ("file:///etc/passwd", "messages[0].content[0].image_url"),
    ):
        refused = proxy.ask(messages=[part_message(image_part(url))])
        assert (
            error_of(refused) == (400, "invalid_request_error") and refused.json()["error"]["param"] == where
        )
    audio = {"type": "input_audio", "input_audio": {"data": "AAAA", "format": "wav"}}
    assert "audio" in proxy.ask(messages=[part_message(audio)]).json()["error"]["message"]
    assert not weather.count("/conversation")


def test_login_free_accounts_leave_files_to_others(start: Callable[..., Proxy], weather: Weather) -> None:
    asked = [part_message("what", image_part(data_url(picture())))]
    free = start(cp.LOGIN_FREE)
    assert error_of(free.ask(messages=asked)) == (400, "login_required")
    guest = start(authorization="", folder="guest")
    assert error_of(guest.ask(key=None, messages=asked)) == (400, "login_required")
    mixed = start(cp.LOGIN_FREE, "alice", folder="mixed")
    for _ in range(5):
        mixed.say(messages=asked)
    assert all("backend-api" in call for call in weather.calls if call.endswith("/conversation"))


def test_an_upload_of_20_mb_adds_little_memory(tmp_path: pathlib.Path, weather: Weather) -> None:
    env = {
        "DATA_DIR": str(tmp_path),
        "CHATGPT_BASE_URL": weather.url,
        "AUTHORIZATION": KEY,
        "MAX_BODY_MB": "40",
    }
    assert run("accounts", "add", cp.demo_token("alice"), env=env).returncode == 0

    def peak() -> int:
        words = pathlib.Path(f"/proc/{served.process.pid}/status").read_text()
        return int(re.search(r"VmHWM:\s+(\d+)", words)[1]) >> 10  # type: ignore[index] # Linux has it

    with Served(env=env) as served, httpx.Client(headers={"Authorization": KEY}, timeout=60) as client:
        body: dict[str, Any] = {"model": "gpt-4o", "messages": [{"role": "user", "content": "hi"}]}
        for _ in range(2):
            client.post(f"{served.url}/v1/chat/completions", json=body)
        before, data = peak(), picture() + os.urandom(20_000_000)
        sent = client.post(
            f"{served.url}/v1/files", files={"file": ("x.png", data)}, data={"purpose": "vision"}
        )
        assert sent.status_code == 200 and sent.json()["bytes"] == len(data)
        got = client.get(f"{served.url}/v1/files/{sent.json()['id']}/content")
        assert got.content == data
        other = picture(9, 9) + os.urandom(20_000_000)
        body["messages"] = [part_message("what", image_part(data_url(other)))]
        assert client.post(f"{served.url}/v1/chat/completions", json=body).status_code == 200
        assert any(file.blob and file.blob.read() == other for file in weather.files.values())
        assert peak() - before < 30


@given(st.lists(st.tuples(st.booleans(), st.binary(max_size=200)), max_size=4), st.integers(1, 5000))
@hypothesis_settings(max_examples=50)
def test_lifting_files_out_of_a_body_changes_nothing(files: list[tuple[bool, bytes]], padding: int) -> None:
    parts = [
        image_part(data_url(data))
        if known
        else {"text": f'x\\";base64,{base64.b64encode(data).decode()}', "url": "é;base64,"}
        for known, data in files
    ]
    text = json.dumps(
        {"padding": "p" * (cp.MAX_IN_MEMORY + padding), "parts": parts, "url": "data:;base64,====="}
    )
    whole, lifted = json.loads(text), cp.parse_object(cp.Blob(text.encode()))
    for part, one in zip(whole["parts"], lifted["parts"], strict=True):
        if "image_url" in part and isinstance(url := one["image_url"]["url"], cp.InlineFile):
            one["image_url"]["url"] = url + base64.b64encode(url.blob.read()).decode()
    assert lifted == whole


# --- URLs that clients name ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("address", "public"),
    [
        ("8.8.8.8", True),
        ("2606:4700::1111", True),
        ("::ffff:8.8.8.8", True),
        ("127.0.0.1", False),
        ("0.0.0.0", False),
        ("10.1.2.3", False),
        ("172.16.0.1", False),
        ("192.168.1.1", False),
        ("100.64.0.1", False),
        ("169.254.169.254", False),
        ("168.63.129.16", False),
        ("224.0.0.1", False),
        ("255.255.255.255", False),
        ("240.0.0.1", False),
        ("192.0.0.192", False),
        ("198.51.100.1", False),
        ("64:ff9b:1::a9fe:a9fe", False),
        ("::ffff:0:127.0.0.1", False),
        ("2001:4860::5efe:127.0.0.1", False),
        ("fec0::1", False),
        ("3fff::1", False),
        ("4000::1", False),
        ("::", False),
        ("::1", False),
        ("::127.0.0.1", False),
        ("::ffff:127.0.0.1", False),
        ("::ffff:10.0.0.1", False),
        ("64:ff9b::7f00:1", False),
        ("2002:7f00:1::", False),
        ("fe80::1", False),
        ("fe80::1%eth0", False),
        ("2606:4700::1111%eth0", False),
        ("fc00::1", False),
        ("fd00:ec2::254", False),
        ("ff02::1", False),
    ],
)
def test_only_anybodys_addresses_are_public(address: str, public: bool) -> None:
    assert cp.is_public(address) == public


@pytest.mark.parametrize(
    "host",
    [
        "127.0.0.1", "2130706433", "017700000001", "0x7f000001", "0x7f.1", "127.1", "0", "0.0.0.0", "localhost", "localhost.",
        "LOCALHOST", "[::1]", "[::]", "[::ffff:127.0.0.1]", "[::ffff:7f00:1]", "[fe80::1%25lo]", "169.254.169.254",
        "2852039166", "user@127.0.0.1", "127.0.0.1:80", "10.0.0.1", "[64:ff9b::7f00:1]",
    ],
)  # fmt: skip
def test_no_spelling_of_a_private_address_is_fetched(host: str, proxy: Proxy, weather: Weather) -> None:
    port = weather.url.rpartition(":")[2]
    host = host if host.endswith(":80") else f"{host}:{port}"
    seen = len(weather.seen)
    refused = proxy.ask(messages=[part_message(image_part(f"http://{host}/blob/secret-name"))])
    assert error_of(refused) == (400, "invalid_request_error")
    assert "Fetching from" in refused.text and "secret-name" not in refused.text
    assert len(weather.seen) == seen


class Origin:
    """What stands on the internet: a proxy that is told addresses to connect to, and answers for them."""

    def __init__(self) -> None:
        self.told: list[str] = []
        self.pages: dict[str, bytes] = {}
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._serve, daemon=True).start()

    def page(self, host: str, status: str, body: bytes = b"", **headers: str) -> None:
        lines = [f"HTTP/1.1 {status}", *(f"{name}: {value}" for name, value in headers.items())]
        self.pages[host] = "\r\n".join([*lines, f"Content-Length: {len(body)}", "", ""]).encode() + body

    def _serve(self) -> None:
        while True:
            with contextlib.suppress(OSError):
                client, _ = self._listener.accept()
                threading.Thread(target=self._answer, args=(client,), daemon=True).start()

    def _answer(self, client: socket.socket) -> None:
        with client, contextlib.suppress(OSError):
            self.told.append(client.recv(4096).split()[1].decode())
            client.sendall(b"HTTP/1.1 200 Connected\r\n\r\n")
            host = re.search(rb"(?i)host: ([^:\r]+)", client.recv(4096))
            client.sendall(self.pages[host[1].decode()] if host else b"")


@pytest.fixture
def internet(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Origin, dict[str, list[str]]]]:
    """An origin for every public name, and what names resolve to: one answer after the other."""
    names: dict[str, list[str]] = {}
    resolve = socket.getaddrinfo

    def answer(host: Any, port: Any, *args: Any, **options: Any) -> Any:
        if host not in names:
            return resolve(host, port, *args, **options)
        found = names[host].pop(0) if len(names[host]) > 1 else names[host][0]
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (one, port)) for one in found.split()]

    monkeypatch.setattr(socket, "getaddrinfo", answer)
    yield Origin(), names


def test_a_clients_url_is_fetched_from_the_address_that_was_checked(
    internet: tuple[Origin, dict[str, list[str]]], start: Callable[..., Proxy], weather: Weather
) -> None:
    origin, names = internet
    proxy = start("alice", export_proxy_url=origin.url)
    ask = [part_message("what", image_part("http://pictures.example/a%20cat.png"))]
    # The second answer of the DNS would lead inside.
    names["pictures.example"] = ["93.184.216.34", "127.0.0.1"]
    origin.page("pictures.example", "200 OK", picture(7, 5), **{"Content-Type": "text/plain"})
    proxy.say(messages=ask)
    assert origin.told == ["93.184.216.34:80"]
    attached = weather.asked()["messages"][0]["metadata"]["attachments"][0]
    assert (attached["name"], attached["mime_type"], attached["width"]) == ("a cat.png", "image/png", 7)
    # Of two addresses one is private.
    names["pictures.example"] = ["93.184.216.34 10.0.0.1"]
    refused = proxy.ask(messages=ask)
    assert error_of(refused) == (400, "invalid_request_error") and "pictures.example" in refused.text
    # A redirect leads inside, by name or number, or to something else, or round and round.
    names["pictures.example"], names["inside.example"] = ["93.184.216.34"], ["192.168.0.1"]
    for place in (
        "http://inside.example/",
        "http://169.254.169.254/latest",
        "//127.0.0.1/",
        "ftp://pictures.example/",
        "/again",
    ):
        told = len(origin.told)
        origin.page("pictures.example", "302 Found", Location=place)
        assert error_of(proxy.ask(messages=ask)) == (400, "invalid_request_error")
        assert set(origin.told[told:]) == {"93.184.216.34:80"}
    origin.page("pictures.example", "404 Not Found")
    assert "status 404" in proxy.ask(messages=ask).json()["error"]["message"]


def test_private_urls_can_be_allowed(start: Callable[..., Proxy], weather: Weather) -> None:
    proxy = start("alice", allow_private_urls="true", upload_by_url="true", max_body_mb="1")
    weather.files["cat.png"] = cp.DemoFile("x", "cat.png", cp.Blob(picture(8, 8)), "multimodal")
    weather.files["long.txt"] = cp.DemoFile("x", "long.txt", cp.Blob(b"x" * (2 << 20)), "my_files")
    cat, long = f"{weather.url}/blob/cat.png", f"{weather.url}/blob/long.txt"
    proxy.say(messages=[part_message("what", image_part(cat))])
    assert weather.asked()["messages"][0]["content"]["parts"][1]["width"] == 8
    proxy.say(f"{cat} {cat} what are these?")
    parts = weather.asked()["messages"][0]["content"]["parts"]
    assert [part if isinstance(part, str) else part["width"] for part in parts] == [8, 8, "what are these?"]
    proxy.say(cat)
    assert weather.asked()["messages"][0]["content"]["parts"][0]["width"] == 8
    refused = proxy.ask(f"{long} what is this?")
    assert error_of(refused) == (400, "invalid_request_error") and "MAX_BODY_MB" in refused.text
    assert "127.0.0.1" in refused.text and "long.txt" not in refused.text
    gone = proxy.ask(messages=[part_message(image_part("http://nowhere.invalid/x.png"))])
    assert "cannot be resolved" in gone.text and gone.status_code == 400


# --- the Files API, and forms ----------------------------------------------------------------------------------------


def test_files_are_kept_upstream_and_answered_by_who_holds_them(
    start: Callable[..., Proxy], weather: Weather
) -> None:
    proxy = start("alice", "bob", "carol")
    client = proxy.client()
    notes = client.files.create(file=("notes.txt", b"remember"), purpose="user_data")
    assert (notes.filename, notes.bytes, notes.purpose, notes.status) == (
        "notes.txt",
        8,
        "user_data",
        "processed",
    )
    image = client.files.create(file=("a.png", picture()), purpose="vision")
    assert [one.id for one in client.files.list()] == [image.id, notes.id]
    assert [one.id for one in client.files.list(order="asc", limit=1)] == [notes.id, image.id]  # page by page
    assert [one.id for one in client.files.list(purpose="vision")] == [image.id]
    assert client.files.retrieve(notes.id) == notes and client.files.content(notes.id).read() == b"remember"
    uploads = weather.count("/files")
    for _ in range(6):
        parts = [
            "x",
            {"type": "file", "file": {"file_id": notes.id}},
            {"type": "file", "file": {"file_id": image.id}},
        ]
        proxy.say(messages=[part_message(*parts)])
        attached = weather.asked()["messages"][0]["metadata"]["attachments"]
        assert [one["name"] for one in attached] == ["notes.txt", "a.png"]
    input: Any = [
        {
            "role": "user",
            "content": [
                {"type": "input_file", "file_id": notes.id},
                {"type": "input_image", "file_id": image.id},
            ],
        }
    ]
    client.responses.create(model="gpt-4o", input=input)
    assert weather.count("/files") == uploads  # always by the account that holds them
    with pytest.raises(openai.BadRequestError, match="is not a PNG"):
        input = [{"role": "user", "content": [{"type": "input_image", "file_id": notes.id}]}]
        client.responses.create(model="gpt-4o", input=input)
    assert client.files.delete(notes.id).deleted
    for call in (client.files.retrieve, client.files.content, client.files.delete):
        with pytest.raises(openai.NotFoundError):
            call(notes.id)
    gone = proxy.ask(messages=[part_message({"type": "file", "file": {"file_id": notes.id}})])
    assert error_of(gone) == (404, "not_found") and gone.json()["error"]["param"] == "messages[0].content[0]"


def test_files_of_two_accounts_come_together(start: Callable[..., Proxy], weather: Weather) -> None:
    proxy = start("alice", "bob", random_token="false")
    client = proxy.client()
    first = client.files.create(file=("1.txt", b"one"), purpose="user_data")
    holder = proxy.app.pool.find(proxy.store.files("id=?", first.id)[0].account)
    assert holder
    proxy.app.pool.told_to_wait(holder, "files", 1000)
    second = client.files.create(file=("2.txt", b"two"), purpose="user_data")
    assert proxy.store.files("id=?", second.id)[0].account != holder.id
    holder.waits = {}
    proxy.say(
        messages=[part_message(*({"type": "file", "file": {"file_id": one.id}} for one in (first, second)))]
    )
    held = [weather.files[one["id"]] for one in weather.asked()["messages"][0]["metadata"]["attachments"]]
    assert [file.blob and file.blob.read() for file in held] == [b"one", b"two"] and held[0].owner == held[
        1
    ].owner


def test_nobody_sees_anothers_files_and_responses(start: Callable[..., Proxy]) -> None:
    proxy = start("alice", authorization=f"{KEY},other-key")
    tokens = [admin(proxy, "POST", "/admin/users/add", json={"name": n}).json()["token"] for n in "ab"]
    mine, other, key = (
        openai.OpenAI(base_url=f"{proxy.url}/v1", api_key=one, max_retries=0)
        for one in (*tokens, "other-key")
    )
    file = mine.files.create(file=("a.txt", b"secret"), purpose="user_data")
    response = mine.responses.create(model="gpt-4o", input="hi")
    assert not other.files.list().data
    asked = [part_message({"type": "file", "file": {"file_id": file.id}})]
    assert error_of(proxy.ask(messages=asked, key=tokens[1]))[0] == 404
    for call in (
        lambda: other.files.retrieve(file.id),
        lambda: other.files.content(file.id),
        lambda: other.files.delete(file.id),
        lambda: other.responses.retrieve(response.id),
        lambda: other.responses.delete(response.id),
        lambda: other.responses.create(model="gpt-4o", input="and", previous_response_id=response.id),
    ):
        with pytest.raises(openai.NotFoundError):
            call()
    for client in (mine, key):  # the keys of AUTHORIZATION see all
        assert client.files.retrieve(file.id) and client.responses.retrieve(response.id)
        assert [one.id for one in client.files.list().data] == [file.id]
    guest = openai.OpenAI(base_url=f"{proxy.url}/v1", api_key=cp.demo_token("zoe"), max_retries=0)
    theirs = guest.files.create(file=("b.txt", b"private"), purpose="user_data")
    assert [one.id for one in key.files.list().data] == [file.id]  # but for those of people with own tokens
    with pytest.raises(openai.NotFoundError):
        key.files.retrieve(theirs.id)
    for method, path in (("GET", f"/v1/files/{file.id}"), ("DELETE", f"/v1/responses/{response.id}")):
        assert admin(proxy, method, path).status_code == 200  # and so does the administrator


def test_a_download_that_is_cut_upstream_is_cut_here(proxy: Proxy, weather: Weather) -> None:
    file = proxy.client().files.create(file=("a.txt", b"0123456789"), purpose="user_data")
    held = proxy.store.files("id=?", file.id)[0].upstream
    weather.add(f"/blob/{held}", cut_stream(b"01234"))
    with (
        pytest.raises(httpx.RemoteProtocolError),
        httpx.stream(
            "GET", f"{proxy.url}/v1/files/{file.id}/content", headers={"Authorization": KEY}
        ) as answer,
    ):
        assert answer.status_code == 200 and b"error" not in answer.read()


FORM = (
    b'--b\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nvision\r\n'
    b'--b\r\nContent-Disposition: form-data; name="file"; filename="a \\"b\\".png"\r\nContent-Type: image/png\r\n\r\n'
    b"x\r\n--c\r\ny\r\n--b--\r\n"
)


def test_a_form_is_read_as_it_was_written() -> None:
    form = cp.parse_form({"content-type": 'Multipart/Form-Data; boundary="b"'}, cp.Blob(FORM))
    assert form["purpose"][0].text() == "vision" and form["purpose"][0].file_name is None
    file = form["file"][0]
    assert (file.file_name, file.content_type, file.blob.read()) == (
        'a "b".png',
        "image/png",
        b"x\r\n--c\r\ny",
    )


@pytest.mark.parametrize(
    ("form", "kind"),
    [
        (FORM, "multipart/form-data"),
        (FORM, "multipart/form-data; boundary="),
        (FORM, f"multipart/form-data; boundary={'b' * 71}"),
        (b"preamble\r\n" + FORM, ""),
        (FORM[:-8], ""),
        (FORM + b"more", ""),
        (FORM.replace(b"\r\n", b"\n"), ""),
        (FORM.replace(b'name="purpose"', b'names="purpose"'), ""),
        (FORM.replace(b"form-data", b"attachment", 1), ""),
        (FORM.replace(b"Content-Type:", b"Content-Transfer-Encoding: base64\r\nX:"), ""),
        (FORM.replace(b"Content-Type:", b"Content-Disposition:"), ""),
        (FORM.replace(b"image/png", b"\xff"), ""),
        (FORM.replace(b"image/png", b"i" * 5000), ""),
        (FORM[: FORM.rindex(b"--b--")] + FORM * 60, ""),
        (b"", ""),
    ],
)
def test_a_form_that_is_not_quite_one_is_refused(form: bytes, kind: str) -> None:
    with pytest.raises(cp.ApiError) as refused:
        cp.parse_form({"content-type": kind or "multipart/form-data; boundary=b"}, cp.Blob(form))
    assert refused.value.code == "invalid_request_error"


FORM_PIECES = [
    b"--b",
    b"\r\n",
    b"--",
    b"--b--",
    b'Content-Disposition: form-data; name="a"',
    b'; filename="',
    b":",
    b"x",
    b"\n",
]


@given(st.lists(st.sampled_from(FORM_PIECES) | st.binary(max_size=8), max_size=40))
@example([FORM])
def test_any_bytes_are_a_form_or_an_api_error(pieces: list[bytes]) -> None:
    with contextlib.suppress(cp.ApiError):
        for name, parts in cp.parse_form(
            {"content-type": "multipart/form-data; boundary=b"}, cp.Blob(b"".join(pieces))
        ).items():
            assert isinstance(name, str) and all(b"\r\n--b" not in part.blob.read() for part in parts)


@given(st.binary(max_size=3000), st.integers(0, 300), st.integers(1, 8))
def test_a_blob_reads_the_same_from_memory_and_disk(data: bytes, start: int, size: int) -> None:
    big = cp.Blob()
    for filler in (b"\0" * cp.MAX_IN_MEMORY, data):
        big.write(filler)
    small, part = cp.Blob(data), big.part(cp.MAX_IN_MEMORY, len(data))
    assert (
        small.read() == part.read() == data
        and small.digest() == part.digest() == hashlib.sha256(data).hexdigest()
    )
    assert small.read(start, size) == part.read(start, size) == data[start : start + size]
    wanted = data[start : start + size] or b"?"
    assert small.find(wanted, 0) == part.find(wanted, 0) == data.find(wanted)


# --- what an answer is made of ---------------------------------------------------------------------------------------

CITE = "\ue200cite\ue202turn0search0\ue202turn0search1\ue201"
REFERENCES = {
    "content_references": [
        {
            "matched_text": CITE,
            "alt": "(x)",
            "items": [
                {"url": "https://a.example/x_(y)", "title": "A [title]\nof two lines"},
                {"url": "https://b.example/", "title": "B"},
            ],
        },
        {"matched_text": "\ue200entity\ue202[1]\ue201", "alt": "\ue200Acme\ue201"},
    ]
}
LINKS = r"[A \[title\] of two lines](https://a.example/x_%28y%29), [B](https://b.example/)"
MARKED = f"See {CITE}, and \ue200entity\ue202[1]\ue201 (\ue206really) \ue200cite\ue202unknown\ue201end"


@pytest.mark.parametrize("encoding", ["v1", "cumulative"])
@pytest.mark.parametrize("stream", [True, False])
def test_citations_become_links_and_private_characters_vanish(
    encoding: str, stream: bool, proxy: Proxy, weather: Weather
) -> None:
    weather.encoding, weather.words, weather.metadata = encoding, list(MARKED), REFERENCES
    said = text_of(proxy.stream()[0]) if stream else proxy.say()
    assert said == f"See {LINKS}, and Acme (really) end"


def test_an_older_citation_is_found_by_its_place(proxy: Proxy, weather: Weather) -> None:
    weather.words = ["Well, ", "\ue200cite\ue202x", "\ue201", " yes."]
    source = {"title": "T", "url": "https://t.example/"}
    weather.metadata = {
        "citations": [{"start_ix": 6, "end_ix": 14, "metadata": source}, {"start_ix": 0}, "noise"]
    }
    assert proxy.say() == "Well, [T](https://t.example/) yes."


def test_a_source_may_come_after_a_long_answer(proxy: Proxy, weather: Weather) -> None:
    weather.words, weather.metadata = [f"A {CITE} b", *[" word"] * 4000], REFERENCES
    for said in (proxy.say(), text_of(proxy.stream()[0])):
        assert said == f"A {LINKS} b" + " word" * 4000


def test_reasoning_and_output_have_no_marks_either(proxy: Proxy, weather: Weather) -> None:
    thoughts = [{"summary": f"One {CITE}", "content": "two \ue200ci"}, {"summary": "Three", "content": ""}]
    think = {"author": {"role": "assistant"}, "content": {"content_type": "thoughts", "thoughts": thoughts}}
    recap = {
        "author": {"role": "assistant"},
        "content": {"content_type": "reasoning_recap", "content": "For 5 seconds"},
    }
    output = {
        "author": {"role": "tool"},
        "content": {"content_type": "execution_output", "text": f"out{CITE}put"},
    }
    weather.before, weather.words = [think, recap, output], ["ok \uf8ff", "\U0010fffd."]
    message = proxy.ask().json()["choices"][0]["message"]
    assert message["reasoning_content"] == "One \ntwo ci\n\nThree\n\nFor 5 seconds"
    assert message["content"] == "\n```\noutput\n```\n\nok ."


def test_a_thought_that_grows_behind_another_is_not_repeated() -> None:
    message = {
        "id": "t",
        "author": {"role": "assistant"},
        "content": {"content_type": "thoughts", "thoughts": [{"summary": "A", "content": "one"}]},
    }
    decoder = cp.Decoder()
    out = decoder.feed(
        cp.data_event({"p": "", "o": "add", "v": {"message": message, "conversation_id": "c"}})
    )
    for path, op, value in (
        ("/message/content/thoughts", "append", [{"summary": "B", "content": "three"}]),
        ("/message/content/thoughts/0", "replace", {"summary": "A", "content": "one two"}),
        ("/message/content/thoughts/1/content", "append", " four"),
    ):
        out += decoder.feed(cp.data_event({"p": path, "o": op, "v": value}))
    assert "".join(one.text for one in out if isinstance(one, cp.Reasoning)) == "A\none\n\nB\nthree two four"


def scanned(text: str, cuts: list[int], references: Any) -> str:
    message = {
        "id": "m",
        "author": {"role": "assistant"},
        "content": {"content_type": "text", "parts": [""]},
        "metadata": {},
    }
    head = {"p": "", "o": "add", "v": {"message": message, "conversation_id": "c"}}
    decoder, start = cp.Decoder(), 0
    out = decoder.feed(cp.data_event(head))
    where: dict[str, Any] = {"p": "/message/content/parts/0", "o": "append"}
    for cut in [*sorted(cut % (len(text) + 1) for cut in cuts), len(text)]:
        out += decoder.feed(cp.data_event(where | {"v": text[start:cut]}))
        start, where = cut, {}
    out += decoder.feed(cp.data_event({"p": "/message/metadata", "o": "append", "v": references}))
    out += decoder.rest()
    given = []
    for event in out:
        if isinstance(event, cp.SandboxLink):
            given.append(f"<{event.path}>")
        elif isinstance(event, cp.Text):
            given.append(event.text)
    return "".join(given)


MARKS = [
    CITE,
    "\ue200",
    "\ue201",
    "\ue202",
    "(sandbox:/mnt/data/a.csv)",
    "(sandbox:",
    "(",
    ")",
    "(sand",
    " word",
    "é",
    "\n",
]


@given(st.lists(st.sampled_from(MARKS), max_size=12).map("".join), st.lists(st.integers(0, 300), max_size=12))
@example(MARKED, list(range(200)))
def test_marks_are_resolved_the_same_under_any_split(text: str, cuts: list[int]) -> None:
    said = scanned(text, cuts, REFERENCES)
    assert said == scanned(text, [], REFERENCES)
    assert not re.search("[\ue000-\uf8ff]", said)
    if "\ue200" not in text:
        assert re.sub(r"\(<([^>]*)>\)", r"(sandbox:\1)", said) == re.sub("[\ue201\ue202]", "", text)


def test_a_sandbox_file_becomes_a_link(start: Callable[..., Proxy], weather: Weather) -> None:
    proxy = start("alice")
    weather.words = ["Get [it](", "sandbox:/mnt/da", "ta/a.csv), or (sandbox", " it)."]
    weather.add("/interpreter/download", status(404))  # not there in the first moment
    said = text_of(proxy.stream()[0])
    match = re.fullmatch(r"Get \[it\]\((http[^ ]+)\), or \(sandbox it\)\.", said)
    assert match and httpx.get(match[1]).content.startswith(b"made by ")
    weather.words = [
        "[a](sandbox:/mnt/data/my%20a.csv) [b](sandbox:/mnt/data/my%20a.csv) [c](sandbox:/mnt/data/b c.csv)"
    ]
    weather.words += [
        ' [d](sandbox:/mnt/data/my%20a.csv) [e](sandbox:/mnt/data/r (1).csv) [f](sandbox:/mnt/data/t.csv "T")'
    ]
    seen = weather.count("/interpreter/download")
    said = proxy.say()
    assert said.count("/blob/") == 6 and weather.count("/interpreter/download") == seen + 4  # each once
    assert said.endswith(' "T")')
    names = {"a.csv", "my a.csv", "b c.csv", "r (1).csv", "t.csv"}
    assert {one.name for one in weather.files.values()} == names
    weather.words = ["Get [it](sandbox:/mnt/data/a.csv), or (sandbox it)."]
    weather.add("/interpreter/download", *[status(404)] * 3)
    assert proxy.say() == "Get [it](sandbox:/mnt/data/a.csv), or (sandbox it)."


@pytest.mark.parametrize("encoding", ["v1", "cumulative"])
def test_code_its_output_and_drawings_are_shown(encoding: str, proxy: Proxy, weather: Weather) -> None:
    weather.encoding = encoding
    weather.files["file-1"] = cp.DemoFile("user-alice", "x.png", cp.demo_image(), "multimodal")
    code = {
        "author": {"role": "assistant"},
        "recipient": "python",
        "content": {"content_type": "code", "text": 'print("```")\n```'},
    }
    output = {
        "author": {"role": "tool", "name": "python"},
        "content": {"content_type": "execution_output", "text": "1"},
    }
    pointers = [
        {"content_type": "image_asset_pointer", "asset_pointer": f"{kind}://file-1"}
        for kind in ("file-service", "sediment")
    ]
    drawn = {"author": {"role": "tool"}, "content": {"content_type": "multimodal_text", "parts": pointers}}
    hidden = drawn | {"metadata": {"is_visually_hidden_from_conversation": True}}
    weather.before = [code, output, hidden, drawn]
    said = proxy.say()
    url = f"{weather.url}/blob/file-1?sig=demo"
    image = f"\n![image]({url})\n\n"
    assert (
        said == f'\n````python\nprint("```")\n```\n````\n\n\n```\n1\n```\n\n{image}{image}Hello wide world.'
    )
    assert text_of(proxy.stream()[0]) == said
    assert any("/files/download/file-1" in call for call in weather.calls)


def test_effort_hints_and_gpts_are_told_to_the_upstream(proxy: Proxy, weather: Weather) -> None:
    proxy.say(reasoning_effort="high", web_search_options={})
    assert weather.asked()["thinking_effort"] == "extended" and weather.asked()["system_hints"] == ["search"]
    proxy.say()
    assert "thinking_effort" not in weather.asked()
    for model in ("gpt-4-gizmo-g-abc123", "g-abc123"):
        proxy.say(model=model)
        assert weather.asked()["conversation_mode"] == {"kind": "gizmo_interaction", "gizmo_id": "g-abc123"}
        assert weather.asked()["model"] == "auto"


# --- functions -------------------------------------------------------------------------------------------------------

WEATHER_SCHEMA = {
    "type": "object",
    "properties": {"city": {"type": "string"}, "unit": {"enum": ["c", "f"]}},
    "required": ["city"],
    "additionalProperties": False,
}
WEATHER_TOOL: Any = {
    "type": "function",
    "function": {"name": "get_weather", "description": "The weather now", "parameters": WEATHER_SCHEMA},
}
TIME_TOOL: Any = {"type": "function", "function": {"name": "get_time"}}
GOOD_CALL = '<tool_call>{"name": "get_weather", "arguments": {"city": "Paris", "unit": "c"}}</tool_call>'
TIME_CALL = '<tool_call>\n```json\n{"name": "get_time", "arguments": "{}"}\n```\n</tool_call>'


def in_pieces(text: str, size: int = 3) -> list[str]:
    return [text[i : i + size] for i in range(0, len(text), size)]


def calls_of(choice: Any) -> list[tuple[str, Any]]:
    return [
        (call.function.name, json.loads(call.function.arguments)) for call in choice.message.tool_calls or ()
    ]


@pytest.mark.parametrize("stream", [True, False])
def test_a_function_is_called(stream: bool, proxy: Proxy, weather: Weather) -> None:
    weather.words = in_pieces(f"I look < 5 <to. {GOOD_CALL}\n{TIME_CALL} and so on")
    asked: Any = {
        "model": "gpt-4o",
        "messages": [{"role": "user", "content": "hi"}],
        "tools": [WEATHER_TOOL, TIME_TOOL],
    }
    if stream:
        with proxy.client().chat.completions.stream(**asked) as events:
            choice: Any = events.get_final_completion().choices[0]
    else:
        choice = proxy.client().chat.completions.create(**asked).choices[0]
    assert choice.finish_reason == "tool_calls" and choice.message.content == "I look < 5 <to. "
    assert calls_of(choice) == [("get_weather", {"city": "Paris", "unit": "c"}), ("get_time", {})]
    ids = [call.id for call in choice.message.tool_calls]
    assert len(set(ids)) == 2 and all(id.startswith("call_") for id in ids)
    for word in (
        "get_weather",
        "The weather now",
        '"enum":["c","f"]',
        "get_time",
        '<tool_call>{"name": "FUNCTION"',
    ):
        assert word in weather.told()


def test_calls_stream_as_standard_deltas(proxy: Proxy, weather: Weather) -> None:
    long = json.dumps({"city": "P" * 1000})
    weather.words = in_pieces(
        f'<tool_call>{{"name": "get_weather", "arguments": {long}}}</tool_call>{TIME_CALL}'
    )
    chunks, _ = proxy.stream(tools=[WEATHER_TOOL, TIME_TOOL])
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    calls = [one for delta in deltas for one in delta.get("tool_calls", ())]
    assert [one["index"] for one in calls if "id" in one] == [0, 1]
    assert calls[0]["type"] == "function" and calls[0]["function"] == {"name": "get_weather", "arguments": ""}
    pieces = [one["function"]["arguments"] for one in calls if one["index"] == 0]
    assert len(pieces) > 3 and json.loads("".join(pieces)) == json.loads(long)
    assert all("name" not in one["function"] for one in calls if "id" not in one)
    assert chunks[-1]["choices"][0]["finish_reason"] == "tool_calls"


def test_text_streams_until_a_tag_may_begin(start: Callable[..., Proxy], weather: Weather) -> None:
    proxy, held = start("alice"), threading.Event()

    def slowly(request: cp.Request) -> cp.Stream:
        def words() -> Iterator[str]:
            yield "first"
            yield " second <to"
            held.wait(10)
            yield "morrow>"

        return cp.streamed(weather.frames(weather.say(request.json(), words())))

    weather.add("/conversation", slowly)
    seen = ""
    with proxy.client().chat.completions.create(
        model="gpt-4o", messages=[{"role": "user", "content": "hi"}], tools=[WEATHER_TOOL], stream=True
    ) as stream:
        for chunk in stream:
            seen += chunk.choices[0].delta.content or ""
            if seen.endswith("second "):
                held.set()
    assert held.is_set() and seen == "first second <tomorrow>"


@pytest.mark.parametrize(
    ("bad", "options", "complaint"),
    [
        ('<tool_call>{"name": "get_weather", "arguments": {"town": "x"}}</tool_call>', {}, "has no city"),
        (
            '<tool_call>{"name": "get_weather", "arguments": {"city": 5}}</tool_call>',
            {},
            "city is not of type string",
        ),
        ('<tool_call>{"name": "get_moon", "arguments": {}}</tool_call>', {}, "no function of the name"),
        ('<tool_call>{"name": "get_weather"', {}, "not valid JSON"),
        ("I would rather not.", {"tool_choice": "required"}, "had to be called"),
        (
            "I would rather not.",
            {"tool_choice": {"type": "function", "function": {"name": "get_weather"}}},
            "had to be",
        ),
        (
            TIME_CALL,
            {"tool_choice": {"type": "function", "function": {"name": "get_weather"}}},
            "is get_weather",
        ),
        (f'{GOOD_CALL}<tool_call>{{"name": "x"}}</tool_call>', {}, "no function of the name"),
    ],
)
@pytest.mark.parametrize("stream", [True, False])
def test_a_wrong_call_is_asked_for_again_once_and_then_is_text(
    bad: str, options: dict[str, Any], complaint: str, stream: bool, proxy: Proxy, weather: Weather
) -> None:
    def choice() -> tuple[str, list[str], str]:
        if not stream:
            one = proxy.ask(tools=[WEATHER_TOOL, TIME_TOOL], **options).json()["choices"][0]
            calls = [call["function"]["name"] for call in one["message"].get("tool_calls", ())]
            return one["message"]["content"] or "", calls, one["finish_reason"]
        chunks, _ = proxy.stream(tools=[WEATHER_TOOL, TIME_TOOL], **options)
        calls = [
            c["function"]["name"]
            for k in chunks
            for c in k["choices"][0]["delta"].get("tool_calls", ())
            if "id" in c
        ]
        return text_of(chunks), calls, chunks[-1]["choices"][0]["finish_reason"]

    weather.turns.extend([in_pieces(bad), in_pieces(f"Sorry. {GOOD_CALL}")])
    text, calls, reason = choice()
    assert (calls, reason) == (["get_weather"], "tool_calls") and text in ("", "Sorry. ")
    assert complaint in weather.told() and bad in weather.told()
    weather.turns.extend([in_pieces(bad), in_pieces(bad)])
    assert choice() == (bad, [], "stop")
    assert weather.count("/conversation") == 4


def test_a_second_asking_that_fails_leaves_the_first_answer(
    start: Callable[..., Proxy], weather: Weather
) -> None:
    proxy, bad = start("alice", retry_times="0"), "I look. <tool_call>oh no"
    weather.turns.append(in_pieces(bad))
    weather.add("/conversation", lambda request: None, status(500))
    assert text_of(proxy.stream(tools=[WEATHER_TOOL])[0]) == bad


def test_a_hostile_call_costs_little(proxy: Proxy, weather: Weather) -> None:
    for text in (
        "<tool_call>" + "</tool_call>" * 2000,
        "<tool_call>" + " " * 50_000 + "```",
        "<tool_call>{" + '"</tool_call>' * 2000,
    ):
        start = time.process_time()
        run_scanner(text, list(range(0, len(text), 12)), "auto", True)
        assert time.process_time() - start < 1
    calls = GOOD_CALL * 500
    assert len(run_scanner(calls, [], "auto", False)[0][1]) == 128


@pytest.mark.parametrize(
    "take",
    [
        lambda: cp._as_text(cp.ToolUse("python", "\n" * 100_000)),
        lambda: cp.find_json('{"a": "say ' + '\\"hi\\" ' * 50_000, None, cp.Budget()),
        lambda: cp.unmarked("\ue200" * 100_000),
        lambda: scanned("(sandbox:" + " " * 990, list(range(1000)), {}),
        lambda: scanned(("(sandbox:" + " (a" * 300) * 30, list(range(0, 30_000, 3)), {}),
        lambda: scanned(("\ue200" + "a" * 900) * 30, list(range(0, 30_000, 3)), {}),
        lambda: scanned(CITE + " word" * 4000, list(range(0, 20_000, 5)), {}),
    ],
)
def test_what_a_model_may_write_holds_nobody_up(take: Callable[[], Any]) -> None:
    start = time.process_time()
    take()
    assert time.process_time() - start < 1


def test_text_before_a_call_is_not_said_twice(proxy: Proxy, weather: Weather) -> None:
    weather.turns.extend([in_pieces("I look. <tool_call>oh no"), in_pieces(f"I look. {GOOD_CALL}")])
    chunks, _ = proxy.stream(tools=[WEATHER_TOOL])
    assert text_of(chunks) == "I look. " and chunks[-1]["choices"][0]["finish_reason"] == "tool_calls"
    weather.before = [
        {"author": {"role": "tool"}, "content": {"content_type": "execution_output", "text": "1"}}
    ]
    weather.turns.extend([in_pieces("I look. <tool_call>oh no"), in_pieces("I look. It is 5.")])
    assert text_of(proxy.stream(tools=[WEATHER_TOOL])[0]) == "\n```\n1\n```\n\nI look. It is 5."


def test_one_call_is_enough_when_more_are_not_wanted(proxy: Proxy, weather: Weather) -> None:
    weather.words, weather.pace = in_pieces(GOOD_CALL + GOOD_CALL), 0.0
    choice = proxy.ask(tools=[WEATHER_TOOL], parallel_tool_calls=False).json()["choices"][0]
    assert len(choice["message"]["tool_calls"]) == 1 and "one call at most" in weather.told()


def test_only_allowed_functions_are_told(proxy: Proxy, weather: Weather) -> None:
    weather.words = in_pieces(TIME_CALL)
    allowed = {"mode": "required", "tools": [{"type": "function", "function": {"name": "get_time"}}]}
    choice = {"type": "allowed_tools", "allowed_tools": allowed}
    assert proxy.ask(tools=[WEATHER_TOOL, TIME_TOOL], tool_choice=choice).json()["choices"][0]["message"][
        "tool_calls"
    ]
    assert "get_weather" not in weather.told() and "must call at least one" in weather.told()


class Person(pydantic.BaseModel):
    name: str
    ages: list[int]


@pytest.mark.parametrize("kind", ["OpenAIChatModel", "OpenAIResponsesModel"])
@pytest.mark.parametrize("output", [str, Person])
def test_an_agent_calls_a_function_and_streams_its_answer(
    kind: str, output: Any, proxy: Proxy, weather: Weather
) -> None:
    weather.obeys = True
    provider = OpenAIProvider(base_url=f"{proxy.url}/v1", api_key=KEY)
    agent: Any = pydantic_ai.Agent(
        getattr(pydantic_ai.models.openai, kind)("gpt-4o", provider=provider), output_type=output
    )
    called = []

    @agent.tool_plain
    def get_weather(city: str, days: int) -> str:
        """The weather of a city."""
        called.append((city, days))
        return "sunny-42"

    async def drive() -> tuple[list[Any], list[Any]]:
        async with agent.run_stream("What is the weather in Oslo?") as run:
            return [piece async for piece in run.stream_output(debounce_by=None)], run.all_messages()

    pieces, messages = asyncio.run(drive())
    assert called == [("demo", 1)]
    call, result = messages[1].parts[-1], messages[2].parts[0]
    assert (call.part_kind, result.part_kind) == (
        "tool-call",
        "tool-return",
    ) and call.tool_call_id == result.tool_call_id
    assert (
        pieces[-1] == Person(name="demo", ages=[1])
        if output is Person
        else len(pieces) > 5 and "sunny-42" in pieces[-1]
    )


def test_functions_that_may_not_be_called_are_not_told(proxy: Proxy, weather: Weather) -> None:
    weather.words = in_pieces(GOOD_CALL)
    assert proxy.say(tools=[WEATHER_TOOL], tool_choice="none") == GOOD_CALL
    assert "get_weather" not in weather.told()


def test_the_older_functions_are_called_too(proxy: Proxy, weather: Weather) -> None:
    weather.words = in_pieces(GOOD_CALL)
    options: dict[str, Any] = {
        "functions": [WEATHER_TOOL["function"]],
        "function_call": {"name": "get_weather"},
    }
    choice = proxy.ask(**options).json()["choices"][0]
    assert choice["finish_reason"] == "function_call" and choice["message"]["content"] is None
    assert json.loads(choice["message"]["function_call"]["arguments"])["city"] == "Paris"
    chunks, _ = proxy.stream(**options)
    calls = [c["choices"][0]["delta"].get("function_call") for c in chunks]
    assert [call["name"] for call in calls if call and "name" in call] == ["get_weather"]


def test_calls_and_results_in_the_history_reach_the_model(proxy: Proxy, weather: Weather) -> None:
    call = {
        "id": "call_1",
        "type": "function",
        "function": {"name": "get_weather", "arguments": '{"city": "Rome"}'},
    }
    proxy.say(
        tools=[WEATHER_TOOL],
        messages=[
            {"role": "user", "content": "hi"},
            {"role": "assistant", "content": None, "tool_calls": [call]},
            {"role": "tool", "tool_call_id": "call_1", "content": "sunny"},
            {"role": "assistant", "content": "ok", "function_call": {"name": "get_time", "arguments": ""}},
            {"role": "function", "name": "get_time", "content": [{"type": "text", "text": "noon"}]},
        ],
    )
    messages = [(one["author"]["role"], one["content"]["parts"][0]) for one in weather.asked()["messages"]][
        2:
    ]
    assert messages == [
        ("assistant", '<tool_call>{"name": "get_weather", "arguments": {"city": "Rome"}}</tool_call>'),
        ("tool", "Result of get_weather (call call_1):\nsunny"),
        ("assistant", 'ok\n<tool_call>{"name": "get_time", "arguments": {}}</tool_call>'),
        ("tool", "Result of get_time:\nnoon"),
    ]


CALL_PIECES = [
    GOOD_CALL,
    TIME_CALL,
    "<tool_call>",
    "</tool_call>",
    "<tool",
    "_call>",
    "<",
    ">",
    "text ",
    "\n",
    '{"name": "x"}',
    "{",
]


def run_scanner(text: str, cuts: list[int], choice: str, last: bool) -> tuple[list[Any], str]:
    functions = {one["function"]["name"]: one["function"] for one in (WEATHER_TOOL, TIME_TOOL)}
    offer = cp.Offer(
        cp.Functions(
            {name: cp.Function(name, "", one.get("parameters", {})) for name, one in functions.items()}
        ),
        choice,
        True,
    )
    scanner, out, start = cp.CallScanner(offer, cp.Budget(), last), list[cp.Event](), 0
    for cut in [*sorted(cut % (len(text) + 1) for cut in cuts), len(text)]:
        out += scanner.feed([cp.Text(text[start:cut])])
        start = cut
    out += scanner.feed([cp.Finish("stop")])
    said = "".join(one.text for one in out if isinstance(one, cp.Text))
    calls = [(one.name, one.arguments) for one in out if isinstance(one, cp.FunctionCall)]
    ends = [one.reason for one in out if isinstance(one, cp.Finish)]
    return [said, calls, ends], scanner.complaint


@given(
    st.lists(st.sampled_from(CALL_PIECES), max_size=8).map("".join),
    st.lists(st.integers(0, 1000), max_size=12),
    st.sampled_from(["auto", "required", "get_weather"]),
    st.booleans(),
)
@example(f"{GOOD_CALL} {TIME_CALL}", list(range(400)), "auto", False)
def test_calls_are_found_the_same_under_any_split(
    text: str, cuts: list[int], choice: str, last: bool
) -> None:
    found = run_scanner(text, cuts, choice, last)
    assert found == run_scanner(text, [], choice, last)
    (said, calls, ends), complaint = found
    assert bool(ends) != bool(complaint)
    if last and not calls:
        assert said == text  # what is no call is passed on unchanged


# --- structured output -----------------------------------------------------------------------------------------------

SCHEMAS = r"""
[true,[null,0,"",[],{}],[]]
[false,[],[null,0,false,"",[],{}]]
[{},[null,true,1.5,"x",[[]],{"a":{}}],[]]
[{"properties":{"a":true,"b":false}},[{},{"a":null},[],{"c":1}],[{"b":null},{"a":1,"b":2}]]
[{"items":false},[[],"ab",{"0":1}],[[null],[[]]]]
[{"type":"integer"},[0,-0.0,1.0,-7,1e+20,1180591620717411303424],[1.5,true,false,"1",null,[1]]]
[{"type":"number"},[0,1.5,1.0,-1e-09,10000000000000000000000000000000000000000],[true,false,"1.5",null,[],{}]]
[{"type":"boolean"},[true,false],[0,1,0.0,"true","",null]]
[{"type":"null"},[null],[false,0,"","null",[],{}]]
[{"type":"string"},["","null","1","\u0000"],[null,1,true,["a"],{"a":"a"}]]
[{"type":"array"},[[],[null],[[]]],[{},"[]",null,{"0":1,"length":1}]]
[{"type":["string","null"]},["",null],[0,false,[],[null]]]
[{"enum":[1,"a",null]},[1,1.0,"a",null],[true,"1","A","",0,false]]
[{"enum":[true]},[true],[1,1.0,"true",false]]
[{"enum":[[1],{"a":1},[]]},[[1],[1.0],{"a":1.0},[]],[[true],{"a":true},1,{},[1,1]]]
[{"enum":["é"]},["é"],["é","e","É"]]
[{"const":1},[1,1.0],[true,"1",[1],1.0000001]]
[{"const":false},[false],[0,0.0,null,"",[]]]
[{"const":{"a":[1,{"b":false}],"c":null}},[{"a":[1,{"b":false}],"c":null},{"c":null,"a":[1.0,{"b":false}]}],[{"a":[1,{"b":0}],"c":null},{"a":[true,{"b":false}],"c":null},{"a":[1,{"b":false}]}]]
[{"const":9007199254740993},[9007199254740993],[9007199254740992,9007199254740992.0,"9007199254740993"]]
[{"minimum":3},[3,3.0,4,true,"1",null,[]],[2,2.999,-3]]
[{"exclusiveMinimum":0},[1e-300,1,false,"0"],[0,-0.0,-1]]
[{"type":"number","minimum":0,"exclusiveMaximum":1},[0,0.0,0.999],[1,1.0,-0.1,false]]
[{"maximum":9223372036854775807},[9223372036854775807,-1208925819614629174706176],[9223372036854775808,1000000000000000000000000000000]]
[{"multipleOf":3},[0,-9,6.0,3000000000000000000000000000000,true,"1"],[1,4.5,1000000000000000000000000000000]]
[{"multipleOf":0.25},[0,0.75,-1.5,7,false],[0.3,0.125]]
[{"minLength":2},["ab","é","日本",1,null,[]],["","a","😀","é"]]
[{"maxLength":1},["","😀","\n","ß",12,["a","b"]],["ab","é","🇫🇷","👍🏽"]]
[{"maxLength":2.0,"minLength":0},["","ab",123],["abc"]]
[{"items":{"type":"integer"}},[[],[1,2.0],"x",{"a":"b"}],[[1,"2"],[null],[true],[[1]]]]
[{"minItems":1,"maxItems":2},[[null],[1,1],"",{},"abc"],[[],[1,2,3]]]
[{"prefixItems":[{"type":"string"}],"items":{"type":"integer"}},[[],["a"],["a",1,2]],[[1],["a","b"],["a",1,null]]]
[{"prefixItems":[{"const":1},true],"items":false},[[],[1],[1,{}]],[[2],[true],[1,2,3]]]
[{"uniqueItems":true},[[],[1,true],[0,false],["1",1],[[1],[true]],[{"a":0},{"a":false}],[null,0,""],"aa"],[[1,1.0],[null,null],["a",1,"a"],[[],[]],[{"a":1,"b":2},{"b":2,"a":1}],[[1],[1.0]]]]
[{"items":{"items":{"type":"number","minimum":0},"minItems":2,"maxItems":2},"type":"array"},[[],[[0,1.5],[2,2]],["skipped"]],[[[1]],[[1,-1]],[[1,2],[1,2,3]],[[1,false]],{}]]
[{"required":["a"]},[{"a":null},{"a":1,"b":2},[],"a",null],[{},{"b":1},{"A":1}]]
[{"properties":{"a":{"type":"string"}}},[{},{"a":""},{"b":1},[1],3],[{"a":null},{"a":1}]]
[{"properties":{"a":{}},"additionalProperties":false},[{},{"a":0},["b"],"b"],[{"b":0},{"A":0},{"":null}]]
[{"additionalProperties":{"type":"integer"}},[{},{"a":1,"b":2.0}],[{"a":"1"},{"a":1,"b":true}]]
[{"properties":{"id":{"type":"string"}},"additionalProperties":{"anyOf":[{"type":"null"},{"type":"array","items":{"type":"integer"}}]}},[{"id":"a"},{"x":null,"y":[1]},{"id":"","z":[]}],[{"id":null},{"x":"a"},{"y":[1,null]},{"id":"a","x":{}}]]
[{"minProperties":1,"maxProperties":2},[{"a":1},{"a":1,"b":2},[],""],[{},{"a":1,"b":2,"c":3}]]
[{"properties":{"type":{"const":"enum"},"required":{"type":"boolean"},"$ref":{"type":"string"}}},[{"type":"enum","required":true},{"$ref":"#/nowhere"},{}],[{"type":"object"},{"required":["a"]},{"$ref":1}]]
[{"type":"object","properties":{"a":{"type":"object","properties":{"b":{"properties":{"c":{"type":"integer"}},"additionalProperties":false,"required":["c"]}},"additionalProperties":false}}},[{},{"z":1},{"a":{}},{"a":{"b":{"c":1}},"z":0},{"a":{"b":"not an object"}}],[{"a":null},{"a":{"z":1}},{"a":{"b":{}}},{"a":{"b":{"c":1,"d":2}}},{"a":{"b":{"c":"1"}}}]]
[{"type":"array","items":{"type":"object","properties":{"tags":{"type":"array","items":{"type":"string"},"uniqueItems":true}},"required":["tags"]}},[[],[{"tags":[]}],[{"tags":["a","A"]},{"tags":["a"],"x":1}]],[[{}],[{"tags":["a","a"]}],[{"tags":[]},{"tags":[1]}],{"tags":[]},[[{"tags":[]}]]]]
[{"anyOf":[{"type":"string","maxLength":2},{"minimum":5}]},["ab",5,"abc",null,true],[4,0.5]]
[{"oneOf":[{"type":"integer"},{"minimum":2}]},[1,2.5,true,"x"],[2,3.0,1.5]]
[{"oneOf":[{"type":"integer"},{"type":"number"}]},[1.5,-0.25],[1,1.0,true,"1"]]
[{"oneOf":[{"required":["a"]},{"required":["b"]}]},[{"a":1},{"b":1,"c":2}],[{},{"a":1,"b":2},[]]]
[{"oneOf":[{"properties":{"kind":{"const":"cat"},"lives":{"type":"integer"}},"required":["kind"]},{"properties":{"kind":{"const":"dog"},"good":{"const":true}},"required":["kind","good"]}],"type":"object"},[{"kind":"cat"},{"kind":"cat","lives":9.0,"good":0},{"kind":"dog","good":true,"lives":"x"}],[{},{"kind":"dog"},{"kind":"dog","good":1},{"kind":"cat","lives":"9"},{"kind":"fox","good":true},[]]]
[{"allOf":[{"minimum":1},{"maximum":3},{"type":"integer"}]},[1,2.0,3],[0,4,1.5,true,"2"]]
[{"allOf":[{"properties":{"a":{"type":"integer"}}}],"additionalProperties":false},[{},"a"],[{"a":1},{"a":"x"},{"b":1}]]
[{"not":{"type":["null","boolean"]}},[0,1,"",[],{}],[null,true,false]]
[{"items":{"not":{"enum":[1,null]}}},[[],[true,2],[[1]]],[[1],[0,1.0],[null]]]
[{"$ref":"#/$defs/pos","$defs":{"pos":{"type":"integer","exclusiveMinimum":0}}},[1,2.0],[0,-1,true,"1",null]]
[{"definitions":{"s":{"type":"string"}},"items":{"$ref":"#/definitions/s"}},[[],["a"],{"definitions":1}],[[1],["a",null]]]
[{"$defs":{"s":{"type":"string","minLength":2}},"properties":{"a":{"$ref":"#/$defs/s","maxLength":3,"description":"2 to 3"}}},[{"a":"ab"},{"a":"abc"},{}],[{"a":"a"},{"a":"abcd"},{"a":12}]]
[{"$defs":{"base":{"properties":{"a":{"type":"integer"}},"required":["a"]}},"$ref":"#/$defs/base","properties":{"b":{"type":"string"}},"required":["b"]},[{"a":1,"b":""},{"a":1,"b":"","c":0}],[{"a":1},{"b":""},{"a":"1","b":""},{"a":1,"b":2}]]
[{"$ref":"#/$defs/a","$defs":{"a":{"$ref":"#/$defs/b"},"b":{"type":"null"}}},[null],[0,"",{}]]
[{"$defs":{"no":false,"unused":{"type":"null"}},"items":{"$ref":"#/$defs/no"}},[[],1],[[null],[0]]]
[{"type":"array","items":{"$ref":"#"},"maxItems":2},[[],[[],[]],[[[[]]]]],[[1],[[],[],[]],[[[null]]],[[],[[[],[],[]]]],{}]]
[{"properties":{"next":{"$ref":"#"},"v":{"type":"integer"}},"additionalProperties":false},[{},{"v":1,"next":{"v":2,"next":{"next":{}}}},{"next":null}],[{"next":{"v":"2"}},{"next":{"next":{"x":1}}},{"v":1,"next":{"v":true}}]]
[{"$ref":"#/$defs/Node","$defs":{"Node":{"type":"object","properties":{"value":{"type":"number"},"children":{"type":"array","items":{"$ref":"#/$defs/Node"}}},"required":["value"],"additionalProperties":false}}},[{"value":1},{"value":1.5,"children":[]},{"value":0,"children":[{"value":1,"children":[{"value":2}]},{"value":3}]}],[{},{"value":1,"children":null},{"value":1,"children":[{}]},{"value":0,"children":[{"value":1,"children":[{"value":"2"}]}]},{"value":0,"children":[{"value":1,"extra":0}]}]]
[{"$ref":"#/$defs/tree","$defs":{"tree":{"anyOf":[{"type":"null"},{"$ref":"#/$defs/branch"}]},"branch":{"type":"array","prefixItems":[{"$ref":"#/$defs/tree"},{"$ref":"#/$defs/tree"}],"minItems":2,"maxItems":2}}},[null,[null,null],[[null,null],[null,[null,null]]]],[[],[null],[null,[null]],[null,0],[[null,false],null],[null,null,null]]]
[{"$ref":"#/$defs/json","$defs":{"json":{"oneOf":[{"type":["string","integer","null"]},{"type":"array","items":{"$ref":"#/$defs/json"}},{"type":"object","additionalProperties":{"$ref":"#/$defs/json"}}]}}},[null,1,{"a":[1,{"b":null}]},[[],{},[""]]],[true,1.5,[0.5],{"a":[1,{"b":false}]}]]
[{"type":"string","format":"email","title":"E","default":5},["not an email",""],[5,null]]
[{"$schema":"https://json-schema.org/draft/2020-12/schema","$comment":"a default fills in nothing","properties":{"a":{"type":"integer","default":1}},"required":["a"]},[{"a":2},"x"],[{},{"a":null},{"a":"1"}]]
[{"type":"object","properties":{"location":{"type":"string","description":"City and country, e.g. Paris, France"},"units":{"type":"string","enum":["celsius","fahrenheit"],"default":"celsius"}},"required":["location"]},[{"location":"Paris"},{"location":"","units":"celsius"},{"location":"Oslo","days":3}],[{},{"units":"celsius"},{"location":null},{"location":"Oslo","units":"kelvin"},"Paris",["Paris"]]]
[{"type":"object","properties":{"location":{"type":"string"},"units":{"type":["string","null"],"enum":["celsius","fahrenheit",null]}},"required":["location","units"],"additionalProperties":false},[{"location":"Rome","units":null},{"units":"fahrenheit","location":"Rome"}],[{"location":"Rome"},{"location":"Rome","units":"null"},{"location":"Rome","units":"Celsius"},{"location":"Rome","units":null,"days":1},{"Location":"Rome","units":null},{"location":5,"units":null}]]
[{"type":"object","properties":{"u":{"type":["string","null"],"enum":["c","f"]}}},[{"u":"c"},{}],[{"u":null},{"u":""}]]
[{"type":"object","properties":{},"required":[],"additionalProperties":false},[{}],[{"a":1},null,""]]
[{"$defs":{"Unit":{"enum":["kg","lb"],"title":"Unit","type":"string"},"Item":{"properties":{"name":{"minLength":1,"title":"Name","type":"string"},"qty":{"default":1,"exclusiveMinimum":0,"title":"Qty","type":"integer"},"unit":{"anyOf":[{"$ref":"#/$defs/Unit"},{"type":"null"}],"default":null}},"required":["name"],"title":"Item","type":"object"}},"properties":{"items":{"items":{"$ref":"#/$defs/Item"},"minItems":1,"type":"array"}},"required":["items"],"title":"Order","type":"object"},[{"items":[{"name":"tea"}]},{"items":[{"name":"tea","qty":2.0,"unit":"kg"},{"name":"茶","unit":null}],"note":""}],[{"items":[]},{"items":[{"name":""}]},{"items":[{"name":"tea","qty":0}]},{"items":[{"name":"tea","qty":1.5}]},{"items":[{"qty":1}]},{},{"items":[{"name":"tea"},{"name":"tea","unit":"g"}]},{"items":{"name":"tea"}},{"items":"[{\"name\": \"tea\"}]"}]]
[{"type":"object","properties":{"steps":{"type":"array","items":{"$ref":"#/$defs/step"}},"final_answer":{"type":"string"}},"$defs":{"step":{"type":"object","properties":{"explanation":{"type":"string"},"output":{"type":"string"}},"required":["explanation","output"],"additionalProperties":false}},"required":["steps","final_answer"],"additionalProperties":false},[{"steps":[],"final_answer":""},{"steps":[{"explanation":"e","output":"o"}],"final_answer":"x"}],[{"steps":[]},{"steps":[{"explanation":"e"}],"final_answer":"x"},{"steps":[{"explanation":"e","output":null}],"final_answer":"x"},{"steps":[{"explanation":"e","output":"o","n":1}],"final_answer":"x"},{"steps":[],"final_answer":"x","$defs":{}},{"steps":{},"final_answer":"x"},{"steps":[],"final_answer":null}]]
[{"type":"object","properties":{"filter":{"anyOf":[{"type":"object","properties":{"op":{"const":"eq"},"value":{"type":["string","number","boolean"]}},"required":["op","value"],"additionalProperties":false},{"type":"object","properties":{"op":{"enum":["and","or"]},"of":{"type":"array","minItems":2}},"required":["op","of"],"additionalProperties":false},{"type":"null"}]},"limit":{"type":"integer","minimum":1,"maximum":100}},"required":["filter"],"additionalProperties":false},[{"filter":null},{"filter":{"op":"eq","value":false},"limit":100},{"filter":{"op":"or","of":[null,null]},"limit":1.0}],[{"filter":{}},{"filter":{"op":"eq","value":null}},{"filter":{"op":"and","of":[1]}},{"filter":{"op":"xor","of":[1,2]}},{"filter":{"op":"and","of":{"a":1}}},{"filter":{"op":"eq","value":1,"of":[1,2]}},{"filter":null,"limit":101},{"filter":null,"limit":0},{"filter":null,"x":1},{"filter":null,"limit":true},{"limit":5}]]
""".strip().split("\n")


@pytest.mark.parametrize("row", SCHEMAS)
def test_a_value_fits_its_schema_or_does_not(row: str) -> None:
    schema, fitting, others = json.loads(row)
    assert [value for value in fitting if cp.Schema(schema).fault(value)] == []
    assert [value for value in others if not cp.Schema(schema).fault(value)] == []


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 5) | st.floats() | st.text(max_size=3) | st.sampled_from(["#", "string", "object"]),
    lambda inner: st.lists(inner, max_size=3)
    | st.dictionaries(st.sampled_from(["type", "properties", "required", "items", "$ref", "anyOf", "enum", "multipleOf", "a"]), inner, max_size=4),
    max_leaves=12,
)  # fmt: skip


@given(JSON_VALUES, JSON_VALUES)
def test_no_schema_breaks_the_validator(schema: Any, value: Any) -> None:
    assert isinstance(cp.Schema(schema).fault(value), str)


def test_deep_json_and_deep_schemas_kill_nobody(proxy: Proxy, weather: Weather) -> None:
    deep: Any = []
    for _ in range(900):
        deep = [deep]
    shape = {"type": "json_schema", "json_schema": {"schema": {"const": deep}}}
    assert error_of(proxy.ask(response_format=shape)) == (400, "invalid_request_error")
    weather.words = ["[" * 900 + "]" * 900]
    enum = {"type": "json_schema", "json_schema": {"schema": {"enum": [[1]]}}}
    assert error_of(proxy.ask(response_format=enum)) == (502, "invalid_structured_output")


def test_a_schema_that_refers_to_itself_without_end_is_given_up_on() -> None:
    start = time.monotonic()
    many = {"$defs": {"e": {"enum": list(range(100_000))}}, "anyOf": [{"$ref": "#/$defs/e"}] * 1000}
    assert len(cp.Schema(many).fault("x")) < 1000
    cp.Schema({"$ref": "#"}).fault(1)
    cp.Schema({"anyOf": [{"$ref": "#"}, {"$ref": "#"}], "items": {"$ref": "#"}}).fault([[[1]]])
    assert time.monotonic() - start < 2


PERSON = '{"name": "Ann", "ages": [1, 2]}'


@pytest.mark.parametrize(
    "said", [PERSON, f"Sure:\n```json\n{PERSON}\n```\nAnything else?", f'[1], {{"a": 1}} or {{no}} {PERSON}']
)
def test_an_answer_is_parsed_into_a_clients_type(said: str, proxy: Proxy, weather: Weather) -> None:
    weather.words = in_pieces(said)
    client, messages = proxy.client(), [{"role": "user", "content": "who"}]
    asked: Any = {"model": "gpt-4o", "messages": messages, "response_format": Person}
    assert client.chat.completions.parse(**asked).choices[0].message.parsed == Person(name="Ann", ages=[1, 2])
    assert "JSON Schema" in weather.told() and '"ages"' in weather.told()
    with client.chat.completions.stream(**asked) as stream:
        assert stream.get_final_completion().choices[0].message.parsed == Person(name="Ann", ages=[1, 2])
    assert client.responses.parse(model="gpt-4o", input="who", text_format=Person).output_parsed == Person(
        name="Ann", ages=[1, 2]
    )


def test_json_that_does_not_fit_is_asked_for_again_once(proxy: Proxy, weather: Weather) -> None:
    schema = {"type": "json_schema", "json_schema": {"name": "p", "schema": Person.model_json_schema()}}
    weather.turns.extend([["no json"], ['{"name": "Ann"}'], [PERSON], ["no"], ["no"]])
    wrong = proxy.ask(response_format=schema)
    assert error_of(wrong) == (502, "invalid_structured_output")
    weather.turns.appendleft(['{"name": 5, "ages": []}'])
    assert json.loads(proxy.say(response_format=schema)) == {"name": "Ann", "ages": [1, 2]}
    assert '{"name": 5, "ages": []}' in weather.told() and "name is not of type string" in weather.told()
    assert (
        '"code":"invalid_structured_output"'
        in proxy.ask(response_format={"type": "json_object"}, stream=True).text
    )
    weather.turns.extend([['Well: {"a": [1]} that is it']])
    assert proxy.say(response_format={"type": "json_object"}) == '{"a": [1]}'


def test_json_that_was_cut_for_length_is_passed_on_as_it_is(
    start: Callable[..., Proxy], weather: Weather
) -> None:
    weather.words, weather.details = ['{"a": '], "max_tokens"
    choice = (
        start("alice", auto_continue="0").ask(response_format={"type": "json_object"}).json()["choices"][0]
    )
    assert choice["finish_reason"] == "length" and choice["message"]["content"] == '{"a": '


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ('{"user": {"name": "x"}, "age": 3,}', ""),
        ('{"items": [{"id": 1}, {"id": ', ""),
        ('[{"a": 1}, {"b": 2}]', ""),
        ('{"a": NaN}', ""),
        ('see [1], {here} and {"a": "}{"}', '{"a": "}{"}'),
        ("[" * 100_000, ""),
        ('{"a": ' * 500 + "1" + "}" * 500, ""),
    ],
)
def test_a_piece_of_broken_json_is_never_taken_for_the_whole(text: str, found: str) -> None:
    assert cp.find_json(text, None, cp.Budget())[0] == found


def test_functions_and_a_shape_go_together(proxy: Proxy, weather: Weather) -> None:
    options: dict[str, Any] = {"tools": [WEATHER_TOOL], "response_format": {"type": "json_object"}}
    weather.turns.extend([in_pieces(f"Let me see {GOOD_CALL}"), in_pieces(f"It is {PERSON}")])
    called = proxy.ask(**options).json()["choices"][0]
    assert called["finish_reason"] == "tool_calls" and called["message"]["content"] == "Let me see "
    assert proxy.say(**options) == PERSON


# --- models ----------------------------------------------------------------------------------------------------------


def test_models_are_those_of_the_accounts_and_the_aliases(
    start: Callable[..., Proxy], weather: Weather
) -> None:
    proxy = start("alice", "bob")
    client = proxy.client()
    for _ in range(3):
        assert [model.id for model in client.models.list()] == [
            "gpt-4o",
            "gpt-4o-mini",
            "o3",
            "auto",
            "gpt-3.5-turbo",
        ]
    assert weather.count("/models") == 2  # once an account
    assert client.models.retrieve("o3").id == "o3" and client.models.retrieve("g-abc").id == "g-abc"
    with pytest.raises(openai.NotFoundError) as missing:
        client.models.retrieve("gpt-9")
    assert missing.value.code == "model_not_found"
    headers = {"Authorization": KEY}
    engines = httpx.get(f"{proxy.url}/v1/engines", headers=headers).json()["data"]
    assert engines[0]["object"] == "engine" and engines[0]["id"] == "gpt-4o"
    assert httpx.get(f"{proxy.url}/v1/engines/o3", headers=headers).json()["id"] == "o3"
    # Ten minutes later the upstream fails.
    for account in proxy.app.pool.accounts():
        account.models = (account.models[0] - 700, account.models[1])
    weather.add("/models", status(500), status(500))
    assert "o3" in [model.id for model in client.models.list()] and weather.count("/models") == 4
    for account in proxy.app.pool.accounts():
        account.models = (account.models[0] - 700, account.models[1])
        proxy.app.pool.told_to_wait(account, "models", 1000)
    assert "o3" in [model.id for model in client.models.list()]
    free = start(cp.LOGIN_FREE, folder="free")
    assert [model.id for model in free.client().models.list()] == ["auto", "gpt-3.5-turbo"]


def test_every_accounts_models_are_listed_and_one_that_fails_hides_none(
    start: Callable[..., Proxy], weather: Weather
) -> None:
    client = start("alice", "bob", retry_times="0").client()
    special = status(200, {"models": [{"slug": "special"}]})
    weather.add("/models", special, status(500))
    assert [model.id for model in client.models.list()][:1] == ["special"]
    weather.add("/models", special)
    other = start("carol", "dave", folder="other").client()
    assert {"special", "o3"} <= {model.id for model in other.models.list()}


def test_a_named_model_is_not_answered_by_a_login_free_account(
    start: Callable[..., Proxy], weather: Weather
) -> None:
    proxy = start(cp.LOGIN_FREE, "alice")
    for model in ("o3", "g-abc", "gpt-4o"):
        for _ in range(4):
            proxy.say(model=model)
    assert not any("backend-anon" in call for call in weather.calls if call.endswith("/conversation"))
    for _ in range(12):
        proxy.say(model="auto")
    assert any("backend-anon" in call for call in weather.calls if call.endswith("/conversation"))
    lost = start(cp.LOGIN_FREE, cp.demo_token("zoe", -10), folder="lost")
    lost.say(model="o3")  # nobody else is left
    free = start(cp.LOGIN_FREE, check_model="true", folder="free")
    assert error_of(free.ask(model="o3")) == (404, "model_not_found")


def test_a_model_that_no_account_lists_is_refused_when_asked_for(
    start: Callable[..., Proxy], weather: Weather
) -> None:
    proxy = start("alice", "bob", check_model="true")
    assert error_of(proxy.ask(model="gpt-9")) == (404, "model_not_found")
    assert not weather.count("/conversation")
    for model in ("o3", "auto", "gpt-3.5-turbo", "g-abc"):
        proxy.say(model=model)
    careless = start("carol", check_model="false", folder="careless")
    careless.say(model="gpt-9")


# --- the Responses API -----------------------------------------------------------------------------------------------

RESPONSE_TOOL: Any = {"type": "function", "name": "get_weather", "parameters": WEATHER_SCHEMA, "strict": True}
SAID_HI = {"role": "user", "content": "hi"}
EXEC: Any = {"type": "custom", "name": "exec", "description": "Runs JavaScript."}
IN_NAMESPACE: Any = {
    "type": "namespace",
    "name": "functions",
    "description": "",
    "tools": [EXEC, RESPONSE_TOOL],
}
BROWSER = {"Accept": "text/html,application/xhtml+xml"}
THOUGHT = {
    "author": {"role": "assistant"},
    "content": {"content_type": "thoughts", "thoughts": [{"summary": "Hm", "content": "let me see"}]},
}
STREAM_EVENT: Any = pydantic.TypeAdapter(openai.types.responses.ResponseStreamEvent)


def events_of(answer: httpx.Response, kind: Any) -> list[dict[str, Any]]:
    """The events of a stream, each named as its type says, and of this kind."""
    assert answer.status_code == 200, answer.text
    events = []
    for block in answer.text.strip().split("\n\n"):
        name, _, data = block.partition("\n")
        value = json.loads(data.removeprefix("data: "))
        assert name == f"event: {value['type']}"
        kind.validate_python(value)
        events.append(value)
    return events


def response_events(proxy: Proxy, **body: Any) -> list[dict[str, Any]]:
    """The events of a streamed response, each checked against the openai package's type, numbers and nesting too."""
    body = {"model": "gpt-4o", "input": "hi", "stream": True} | body
    answer = httpx.post(f"{proxy.url}/v1/responses", json=body, headers={"Authorization": KEY}, timeout=30)
    events = events_of(answer, STREAM_EVENT)
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    last = events[-1]["response"]
    assert last["output"] == [
        event["item"] for event in events if event["type"] == "response.output_item.done"
    ]
    return events


def kinds_of(events: list[dict[str, Any]]) -> list[str]:
    kinds = [event["type"].removeprefix("response.") for event in events]
    return [kind for i, kind in enumerate(kinds) if i == 0 or kind != kinds[i - 1]]


def test_a_streamed_response_has_its_events_in_order(proxy: Proxy, weather: Weather) -> None:
    weather.before = [THOUGHT]
    events = response_events(
        proxy, instructions="Be brief.", metadata={"k": "v"}, reasoning={"effort": "high"}
    )
    assert kinds_of(events) == [
        "created", "in_progress",
        "output_item.added", "reasoning_summary_part.added", "reasoning_summary_text.delta",
        "reasoning_summary_text.done", "reasoning_summary_part.done", "output_item.done",
        "output_item.added", "content_part.added", "output_text.delta", "output_text.done", "content_part.done",
        "output_item.done", "completed",
    ]  # fmt: skip
    assert (
        "".join(event["delta"] for event in events if event["type"].endswith("output_text.delta"))
        == "Hello wide world."
    )
    response = events[-1]["response"]
    assert (
        response["status"] == "completed"
        and response["metadata"] == {"k": "v"}
        and response["instructions"] == "Be brief."
    )
    assert [item["type"] for item in response["output"]] == ["reasoning", "message"]
    assert response["usage"]["output_tokens_details"]["reasoning_tokens"] > 0
    assert weather.asked()["thinking_effort"] == "extended"
    assert weather.asked()["messages"][0]["content"]["parts"] == ["Be brief."]


def test_calls_in_a_response_are_items_of_their_own(proxy: Proxy, weather: Weather) -> None:
    weather.words = in_pieces(f"So: {GOOD_CALL}{GOOD_CALL}")
    events = response_events(proxy, tools=[RESPONSE_TOOL])
    assert kinds_of(events)[8:] == [
        *[
            "output_item.added",
            "function_call_arguments.delta",
            "function_call_arguments.done",
            "output_item.done",
        ]
        * 2,
        "completed",
    ]
    output = events[-1]["response"]["output"]
    assert [item["type"] for item in output] == ["message", "function_call", "function_call"]
    assert (
        json.loads(output[1]["arguments"]) == {"city": "Paris", "unit": "c"}
        and output[1]["status"] == "completed"
    )


def test_a_run_of_many_calls_that_was_kept_is_read_in_linear_time() -> None:
    items = [{"type": "function_call", "call_id": str(i), "name": "f"} for i in range(40_000)]
    begun = time.process_time()
    (message,) = cp.ItemReader("previous_response_id").merged(items)
    assert len(message.parts) == len(items) and time.process_time() - begun < 3  # else a dozen seconds


def test_what_an_earlier_response_was_asked_is_told_the_next_as_it_was(
    proxy: Proxy, weather: Weather
) -> None:
    call = {"id": "c1", "type": "function", "function": {"name": "look", "arguments": "{}"}}
    asked: Any = [
        {"role": "function", "name": "old", "content": "1"},  # which has no id
        {"role": "assistant", "content": "I look", "tool_calls": [call, {**call, "id": "c2"}]},
        {"role": "tool", "tool_call_id": "c2", "content": "2"},
        {"role": "tool", "tool_call_id": "c3", "name": "unseen", "content": "3"},
        {"role": "user", "content": "so"},
    ]
    weather.before = [
        {
            "author": {"role": "assistant"},
            "content": {"content_type": "thoughts", "thoughts": [{"content": "hm"}]},
        }
    ]
    first = proxy.client().responses.create(model="gpt-4o", input=asked)
    assert [one.type for one in first.output] == ["reasoning", "message"]

    def told() -> list[tuple[str, str]]:
        return [
            (one["author"]["role"], "".join(one["content"]["parts"])) for one in weather.asked()["messages"]
        ]

    before = told()
    assert ("tool", "Result of old:\n1") in before and ("tool", "Result of unseen (call c3):\n3") in before
    proxy.client().responses.create(model="gpt-4o", previous_response_id=first.id, input="and")
    assert told() == [*before, ("assistant", "Hello wide world."), ("user", "and")]


def test_a_response_is_gone_on_from_with_its_files_and_calls(proxy: Proxy, weather: Weather) -> None:
    client = proxy.client()
    weather.turns.append(in_pieces(GOOD_CALL))
    content: Any = [
        {"type": "input_text", "text": "where"},
        {"type": "input_image", "image_url": data_url(picture()), "detail": "auto"},
    ]
    first = client.responses.create(
        model="gpt-4o",
        input=[{"role": "user", "content": content}],
        instructions="first",
        tools=[RESPONSE_TOOL],
    )
    call: Any = first.output[0]
    second = client.responses.create(
        model="gpt-4o",
        previous_response_id=first.id,
        input=[{"type": "function_call_output", "call_id": call.call_id, "output": "sunny"}],
        tools=[RESPONSE_TOOL],
        instructions="second",
    )
    assert second.output_text == "Hello wide world." and second.previous_response_id == first.id
    messages = weather.asked()["messages"]
    assert [one["author"]["role"] for one in messages] == ["system", "system", "user", "assistant", "tool"]
    assert "first" not in weather.told() and "second" in weather.told()
    assert f"Result of get_weather (call {call.call_id}):\nsunny" in weather.told()
    assert messages[2]["metadata"]["attachments"] and weather.count("/files") == 1
    client.responses.create(model="gpt-4o", previous_response_id=second.id, input="and now")
    assert "Hello wide world." in weather.told() and "sunny" in weather.told()
    assert client.responses.retrieve(first.id).output[0] == call
    referred: Any = [{"type": "item_reference", "id": id} for id in (call.id, second.output[0].id, "rs_1")]
    client.responses.create(model="gpt-4o", input=[*referred, {"role": "user", "content": "x"}])
    assert [one["author"]["role"] for one in weather.asked()["messages"]] == ["assistant", "user"]
    with pytest.raises(openai.NotFoundError):
        client.responses.create(model="gpt-4o", input=[{"type": "item_reference", "id": "msg_1"}])
    assert not client.files.list().data  # what came inside a message is no file of the Files API
    # What is kept are items: an upstream with tools of its own could go on from them.
    _, items = proxy.store.response(second.id, cp.Scope("x", everyone=True), 0.0) or ("", "")
    kinds = ["message", "function_call", "function_call_output", "message"]
    assert [one["type"] for one in json.loads(items)] == kinds and "tool_call>" not in items
    with proxy.store.writing() as db:  # by an earlier version
        db.execute("UPDATE responses SET items=? WHERE id=?", ('{"messages": [], "names": {}}', second.id))
    with pytest.raises(openai.NotFoundError):
        client.responses.create(model="gpt-4o", previous_response_id=second.id, input="x")
    client.responses.delete(first.id)
    for id in (first.id, "resp_nonsense"):
        with pytest.raises(openai.NotFoundError):
            client.responses.retrieve(id)
        with pytest.raises(openai.NotFoundError):
            client.responses.create(model="gpt-4o", previous_response_id=id, input="x")


def test_a_second_asking_without_an_account_loses_no_response(
    start: Callable[..., Proxy], weather: Weather
) -> None:
    proxy = start("alice")
    bad = "<tool_call>oh no"

    def limited(request: cp.Request) -> cp.Stream:
        answer = cp.streamed(weather.frames(weather.say(request.json(), in_pieces(bad))))
        proxy.app.pool.told_to_wait(proxy.app.pool.accounts()[0], "gpt-4o", 1000)
        return answer

    weather.add("/conversation", limited)
    content: Any = [{"type": "input_image", "image_url": data_url(picture()), "detail": "auto"}]
    made = proxy.client().responses.create(
        model="gpt-4o", input=[{"role": "user", "content": content}], tools=[RESPONSE_TOOL]
    )
    assert made.output_text == bad and proxy.client().responses.retrieve(made.id).output_text == bad


def test_a_second_asking_goes_where_the_files_are(start: Callable[..., Proxy], weather: Weather) -> None:
    proxy = start("alice", "bob", "carol", "dave")
    for i in range(5):
        weather.turns.extend([["<tool_call>oh no"], in_pieces(GOOD_CALL)])
        asked = [part_message("what", image_part(data_url(picture(100 + i))))]
        proxy.ask(messages=asked, tools=[WEATHER_TOOL])
        assert weather.count("/files") == i + 1


def test_a_response_is_kept_for_a_day_unless_told_otherwise(proxy: Proxy) -> None:
    client = proxy.client()
    loose = client.responses.create(model="gpt-4o", input="hi", store=False)
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(loose.id)
    kept = client.responses.create(model="gpt-4o", input="hi")
    with client.responses.stream(model="gpt-4o", input="hi") as stream:
        streamed = stream.get_final_response()
    assert client.responses.retrieve(streamed.id).output_text == "Hello wide world."
    with proxy.store.writing() as db:
        db.execute("UPDATE responses SET made = made - 86401 WHERE id=?", (kept.id,))
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(kept.id)
    proxy.store.prune(time.time())
    assert len(proxy.store._rows("SELECT id FROM responses")) == 1


def test_a_response_that_reaches_its_limit_is_incomplete(proxy: Proxy, weather: Weather) -> None:
    weather.words = [" word"] * 50
    whole = proxy.client().responses.create(model="gpt-4o", input="hi", max_output_tokens=5)
    assert (
        whole.status == "incomplete"
        and whole.incomplete_details
        and whole.incomplete_details.reason == "max_output_tokens"
    )
    events = response_events(proxy, max_output_tokens=5)
    assert (
        events[-1]["type"] == "response.incomplete"
        and events[-1]["response"]["output"][0]["status"] == "incomplete"
    )


def test_a_response_that_breaks_off_ends_in_an_error_event(
    start: Callable[..., Proxy], weather: Weather
) -> None:
    proxy = start("alice", retry_times="0")
    body = {"model": "m", "messages": [{"id": "u", "author": {"role": "user"}}]}
    weather.add("/conversation", cut_stream(*list(weather.say(body, ["one", " two"]))[:4]))
    with (
        pytest.raises(openai.APIError, match="broke off"),
        proxy.client().responses.stream(model="gpt-4o", input="hi") as stream,
    ):
        list(stream)


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"input": None}, "input"),
        ({"input": []}, "input"),
        ({"input": [5]}, "input[0]"),
        ({"input": [{"type": "item_reference"}]}, "input[0].id"),
        ({"input": [{"type": "web_search_call"}]}, "input"),
        ({"input": [{"type": "shell_call", "call_id": "c"}]}, "input[0].action"),
        ({"input": [{"type": "additional_tools"}]}, "input[0].tools"),
        ({"input": [SAID_HI, {"type": "additional_tools", "tools": [5]}]}, "input[1].tools[0]"),
        ({"input": [{"type": "function_call_output", "output": "x"}]}, "input[0].call_id"),
        ({"model": None}, "model"),
        ({"tools": [{"name": "f"}]}, "tools[0]"),
        ({"tools": [{"type": "namespace", "name": "n"}]}, "tools[0].tools"),
        ({"tools": [{"type": "custom", "name": "c", "format": {"type": "grammar"}}]}, "tools[0].format"),
        ({"tools": [], "tool_choice": "required"}, "tool_choice"),
        ({"tool_choice": {"type": []}}, "tool_choice"),
        (
            {"input": [SAID_HI, {"type": "configuration_update", "text": {"format": "x"}}]},
            "input[1].text.format",
        ),
        ({"input": [{"type": "reasoning", "summary": []}]}, "input"),
        ({"temperature": math.inf}, None),
        (
            {"tools": [IN_NAMESPACE, {"type": "function", "name": "functions.exec"}]},
            "tools[1].name",
        ),
        ({"tools": [{"type": "web_search"}], "tool_choice": {"type": "custom", "name": "x"}}, "tool_choice"),
        ({"tools": [{"type": "function"}]}, "tools[0].name"),
        ({"text": {"format": {"type": "xml"}}}, "text.format.type"),
        ({"text": {"format": "x"}}, "text.format"),
        ({"metadata": {"k": 5}}, "metadata"),
        ({"truncation": "maybe"}, "truncation"),
        ({"background": True}, "background"),
        ({"text": {"format": {"type": "json_schema", "schema": {"type": []}}}}, "text.format"),
        ({"conversation": "conv_1"}, "conversation"),
        ({"prompt": {"id": "p"}}, "prompt"),
        (
            {"tools": [{"type": "function", "name": "f", "parameters": {"items": {"type": "banana"}}}]},
            "tools[0].parameters",
        ),
        (
            {"text": {"format": {"type": "json_schema", "schema": {"anyOf": [{"type": "none"}]}}}},
            "text.format",
        ),
        ({"reasoning": {"effort": 5}}, "reasoning.effort"),
        ({"max_output_tokens": 0}, "max_output_tokens"),
    ],
)
def test_a_wrong_field_of_a_response_is_named(proxy: Proxy, body: dict[str, Any], param: str | None) -> None:
    asked = json.dumps({"model": "gpt-4o", "input": "hi"} | body).replace("Infinity", "1e999")
    refused = httpx.post(f"{proxy.url}/v1/responses", content=asked, headers={"Authorization": KEY})
    assert error_of(refused) == (400, "invalid_request_error") and refused.json()["error"]["param"] == param


# --- whatever a coding agent sends ----------------------------------------------------------------------------------


ITEM_LIST: Any = pydantic.TypeAdapter(openai.types.responses.ResponseItemList)
MESSAGE_EVENT: Any = pydantic.TypeAdapter(anthropic.types.RawMessageStreamEvent)


def call_of(name: str, arguments: Any) -> list[str]:
    """The words of an answer that calls a function."""
    return in_pieces(f"<tool_call>{json.dumps({'name': name, 'arguments': arguments})}</tool_call>")


PATCH = {"operation": {"type": "create_file", "path": "a.txt", "diff": "+hi"}}
TIME_FUNCTION: Any = {"type": "function", "name": "get_time"}
SHAPES_OF_CALLS: Any = {"get_weather": {"city": "Paris"}, "shell": {"commands": ["ls"]}}


@pytest.mark.parametrize(
    ("tools", "name", "arguments", "item"),
    [
        (
            [EXEC],
            "exec",
            {"input": "text(1)\n"},
            {"type": "custom_tool_call", "name": "exec", "input": "text(1)\n"},
        ),
        (
            [EXEC],
            "exec",
            "text(1)",
            {"type": "custom_tool_call", "input": "text(1)"},
        ),  # as freeform tools are told
        (
            [IN_NAMESPACE],
            "functions.exec",
            {"input": "x" * 300},
            {"type": "custom_tool_call", "namespace": "functions", "name": "exec", "input": "x" * 300},
        ),
        (
            [IN_NAMESPACE],
            "get_weather",  # without the namespace, which is clear all the same
            {"city": "Paris"},
            {"type": "function_call", "namespace": "functions", "name": "get_weather"},
        ),
        (
            [{"type": "local_shell"}],
            "local_shell",
            {"command": ["ls", "-l"], "working_directory": "/tmp"},
            {
                "type": "local_shell_call",
                "action": {"type": "exec", "command": ["ls", "-l"], "env": {}, "working_directory": "/tmp"},
            },
        ),
        (
            [{"type": "shell"}],
            "shell",
            {"commands": ["ls", "pwd"], "timeout_ms": 5},
            {
                "type": "shell_call",
                "action": {"commands": ["ls", "pwd"], "timeout_ms": 5},
                "environment": {"type": "local"},
            },
        ),
        ([{"type": "apply_patch"}], "apply_patch", PATCH, {"type": "apply_patch_call"} | PATCH),
    ],
)
def test_a_tool_of_every_kind_is_called_in_its_own_shape(
    proxy: Proxy, weather: Weather, tools: Any, name: str, arguments: Any, item: dict[str, Any]
) -> None:
    weather.words = call_of(name, arguments)
    events = response_events(proxy, tools=tools)
    (called,) = events[-1]["response"]["output"]
    assert called.items() >= item.items() and called["status"] == "completed" and called["call_id"]
    deltas = [event["delta"] for event in events if event["type"].endswith(("input.delta", "command.delta"))]
    whole = item.get("input") or "".join(item.get("action", {}).get("commands", ()))
    assert "".join(deltas) == (whole if item["type"] != "local_shell_call" else "")
    # What came of it goes back, and is told the model as it called it.
    output: Any = "done"
    if item["type"] == "shell_call":
        output = [{"stdout": "done", "stderr": "", "outcome": {"type": "exit", "exit_code": 3}}]
    kind = f"{item['type']}_output"
    back = {"type": kind, "call_id": called["call_id"], "output": output, "status": "completed"}
    weather.words = ["Good."]
    response_events(proxy, tools=tools, input=[called, back])
    full = f"functions.{name.removeprefix('functions.')}" if "namespace" in item else name
    assert f"Result of {full} (call {called['call_id']}):\n" in weather.told() and "done" in weather.told()
    assert f'<tool_call>{{"name": "{full}", "arguments": {{"' in weather.told()
    if item["type"] == "shell_call":
        assert "done\nExit code: 3" in weather.told()


def test_what_nobody_here_has_is_left_out_and_named_once(
    proxy: Proxy, weather: Weather, caplog: pytest.LogCaptureFixture
) -> None:
    strange: Any = [
        {"type": "mcp", "server_label": "x", "server_url": "https://x.example"},
        {"type": "tool_search", "execution": "client"},
        {"type": "shell", "environment": {"type": "container_auto"}},
        RESPONSE_TOOL,
    ]
    with caplog.at_level("INFO"):
        for choice in ("auto", {"type": "mcp", "server_label": "x"}):
            events = response_events(proxy, tools=strange, tool_choice=choice)
            assert events[-1]["type"] == "response.completed"
            assert events[-1]["response"]["tools"] == strange  # as they were given
        strange.append({"type": "of_next_year", "name": "n"})
        assert web(proxy, "POST", "/v1/responses", json={"model": "gpt-4o", "input": "hi", "tools": strange})
    named = [vars(one)["facts"]["kind"] for one in caplog.records if "left out" in one.msg]
    assert named == ["mcp", "tool_search", "shell", "of_next_year"]
    told = weather.told().split(cp.FUNCTIONS_LINE)[1]
    assert [json.loads(line)["name"] for line in told.strip().splitlines()[:1]] == ["get_weather"]
    weather.words = ["Hi."]
    answer = proxy.client().chat.completions.create(
        model="gpt-4o", messages=[{"role": "user", "content": "hi"}], tools=strange, tool_choice="auto"
    )
    assert answer.choices[0].message.content == "Hi."


@pytest.mark.parametrize(
    ("definition", "text", "fits"),
    [
        ("[a-z]+ [0-9]{2,4}", "abc 123", True),
        ("[a-z]+ [0-9]{2,4}", "abc x", False),
        ("(?:yes|no)", "no", True),
        ("(?:yes|no)", "maybe", False),
        (r"a\*b[*]+", "a*b**", True),
        ("(a+)+b", "a" * 40, None),  # which would take years
        ("a*a*a*a*a*b", "a" * 3000, None),
        (r"(a)\1", "ab", None),
        ("(?=x)x", "y", None),
        ("a{99999999999}", "a", None),
        ("[", "a", None),
        ("x" * 600, "y", None),
        ("|".join("ab" for _ in range(20)), "zz", None),
    ],
)
def test_a_simple_grammar_is_checked_and_no_other(definition: str, text: str, fits: bool | None) -> None:
    begun = time.process_time()
    assert cp.fits_grammar(cp.Grammar("regex", definition), text) is fits
    assert time.process_time() - begun < 0.5
    assert cp.fits_grammar(cp.Grammar("lark", definition), text) is None


@given(
    st.text("ab*+?{}|()[]^\\1,.-", max_size=60), st.one_of(st.text("ab", max_size=3000), st.just("a" * 3000))
)
def test_no_grammar_holds_up_the_process(definition: str, text: str) -> None:
    begun = time.process_time()
    cp.fits_grammar(cp.Grammar("regex", definition), text)
    assert time.process_time() - begun < 1


def test_an_input_that_does_not_fit_its_grammar_is_asked_for_again(proxy: Proxy, weather: Weather) -> None:
    grammar = {"type": "grammar", "syntax": "regex", "definition": "[0-9]+"}
    weather.turns += [call_of("exec", {"input": "two"}), call_of("exec", {"input": "2"})]
    events = response_events(proxy, tools=[EXEC | {"format": grammar}])
    assert events[-1]["response"]["output"][0]["input"] == "2"
    assert "does not fit its grammar" in weather.told() and "[0-9]+" in weather.told()


def test_custom_tools_are_called_in_chat_completions_too(proxy: Proxy, weather: Weather) -> None:
    form = {"type": "grammar", "grammar": {"syntax": "lark", "definition": 'start: "x"'}}
    tools: Any = [{"type": "custom", "custom": {"name": "exec", "format": form}}, WEATHER_TOOL]
    weather.turns += [call_of("exec", {"input": "x"}), call_of("exec", {"input": "x"})]
    choice: Any = {"type": "custom", "custom": {"name": "exec"}}
    said: Any = [{"role": "user", "content": "go"}]
    client = proxy.client()
    answer = client.chat.completions.create(model="gpt-4o", messages=said, tools=tools, tool_choice=choice)
    (call,) = answer.choices[0].message.tool_calls or []
    assert call.type == "custom" and (call.custom.name, call.custom.input) == ("exec", "x")
    assert "You must call exec now" in weather.told() and 'start: \\"x\\"' in weather.told()
    stream = client.chat.completions.create(model="gpt-4o", messages=said, tools=tools, stream=True)
    parts: Any = [one.model_dump()["choices"][0]["delta"].get("tool_calls") for one in stream]
    parts = [one[0] for one in parts if one]
    assert parts[0]["type"] == "custom" and parts[0]["custom"] == {"name": "exec", "input": ""}
    assert "".join(one["custom"]["input"] for one in parts) == "x"
    back: Any = [*said, {"role": "assistant", "tool_calls": [call.model_dump()]}]
    back.append({"role": "tool", "tool_call_id": call.id, "content": "ran"})
    weather.words = ["Good."]
    client.chat.completions.create(model="gpt-4o", messages=back)
    assert f"Result of exec (call {call.id}):\nran" in weather.told()
    assert '{"name": "exec", "arguments": {"input":"x"}}' in weather.told()


def test_the_sites_own_tools_are_hinted_at_alone_and_offered_beside_functions(
    proxy: Proxy, weather: Weather
) -> None:
    search, draw = {"type": "web_search"}, {"type": "image_generation"}
    python = {"type": "code_interpreter", "container": {"type": "auto"}}
    for tools, choice, hints in (
        ([search], "auto", ["search"]),
        ([{"type": "web_search_preview_2025_03_11"}], "auto", ["search"]),
        ([draw], "auto", ["picture_v2"]),
        ([search, draw, python], "auto", []),
        ([search, draw, RESPONSE_TOOL], "auto", []),
        ([search, draw, RESPONSE_TOOL], {"type": "image_generation"}, ["picture_v2"]),
        ([search, RESPONSE_TOOL], {"type": "web_search_preview"}, ["search"]),
        ([search], "required", ["search"]),
        ([search], "none", []),
    ):
        response_events(proxy, tools=tools, tool_choice=choice)
        assert weather.asked()["system_hints"] == hints, (tools, choice)
    response_events(proxy, tools=[search, draw, RESPONSE_TOOL])
    assert f"{cp.OWN_TOOLS_LINE} searching the web, drawing images." in weather.told()


def test_what_the_sites_own_tools_did_is_an_item_where_they_are_offered(
    proxy: Proxy, weather: Weather
) -> None:
    weather.obeys = True
    tools: Any = [{"type": "image_generation"}, {"type": "code_interpreter", "container": {"type": "auto"}}]
    (drawn, said) = response_events(proxy, input="Draw a cat", tools=tools)[-1]["response"]["output"]
    assert drawn["type"] == "image_generation_call"
    assert base64.b64decode(drawn["result"]) == cp.demo_image().read()
    assert said["content"][0]["text"] == "Here it is."
    events = response_events(proxy, input="Run some Python", tools=tools)
    (ran, said) = events[-1]["response"]["output"]
    assert ran["code"] == "print(6 * 7)" and ran["outputs"] == [{"type": "logs", "logs": "42"}]
    assert "code_interpreter_call_code.done" in kinds_of(events) and said["type"] == "message"
    # Where they are not offered, it is told as text.
    (said,) = response_events(proxy, input="Run some Python")[-1]["response"]["output"]
    assert "```python\nprint(6 * 7)\n```" in said["content"][0]["text"]
    (said,) = response_events(proxy, input="Draw a cat")[-1]["response"]["output"]
    assert "![image](" in said["content"][0]["text"]
    # What was drawn is there in the next turn.
    weather.obeys = False
    response_events(proxy, input=[drawn, {"role": "user", "content": "and now?"}])
    assert weather.asked()["messages"][0]["metadata"]["attachments"][0]["mime_type"] == "image/png"


def test_a_drawing_that_cannot_be_had_stays_a_link(proxy: Proxy, weather: Weather) -> None:
    weather.obeys = True
    weather.drawn_is_lost = True
    tools: Any = [{"type": "image_generation"}]
    answer = proxy.client().responses.create(model="gpt-4o", input="Draw a cat", tools=tools)
    assert "![image](" in answer.output_text


def test_a_picture_that_was_sent_is_not_the_answers(proxy: Proxy, weather: Weather) -> None:
    picture_part: Any = {"type": "input_image", "image_url": data_url(picture()), "detail": "auto"}
    call = {"type": "function_call", "call_id": "c1", "name": "look", "arguments": "{}"}
    back = {"type": "function_call_output", "call_id": "c1", "output": [picture_part]}
    for encoding in ("v1", "cumulative"):
        weather.encoding = encoding
        events = response_events(proxy, input=[{"role": "user", "content": "look"}, call, back])
        assert events[-1]["response"]["output"][0]["content"][0]["text"] == "Hello wide world."
        # The upstream may give what it repeats another id.
        sent = weather.asked()["messages"][-1]
        assert sent["content"]["parts"][-1]["asset_pointer"].startswith("file-service://")
        weather.before = [{"author": {"role": "tool"}, "content": sent["content"]}]
        again = response_events(proxy, input=[{"role": "user", "content": "look"}, call, back])
        assert again[-1]["response"]["output"][0]["content"][0]["text"] == "Hello wide world."
        weather.before = []
        # What the model is to go on from is not what it says.
        begun: Any = [{"role": "user", "content": "look"}, {"role": "assistant", "content": "I see"}]
        assert proxy.say(messages=begun) == "Hello wide world."


HISTORY: Any = [
    {"role": "user", "content": "begin"},
    {"type": "reasoning", "id": "rs_x", "summary": [], "encrypted_content": "gAAAA", "content": None},
    {"type": "web_search_call", "id": "ws_1", "status": "completed", "action": {"type": "search", "query": "q"}},
    {"type": "code_interpreter_call", "id": "ci", "code": "1+1", "container_id": "c", "status": "completed",
     "outputs": [{"type": "logs", "logs": "two!"}]},
    {"type": "mcp_list_tools", "id": "ml", "server_label": "box", "tools": []},
    {"type": "mcp_approval_request", "id": "ar", "server_label": "box", "name": "open", "arguments": "{}"},
    {"type": "mcp_approval_response", "approval_request_id": "ar", "approve": False, "reason": "never"},
    {"type": "mcp_call", "id": "mc", "server_label": "box", "name": "look", "arguments": '{"a":1}', "output": "full"},
    {"type": "mcp_call", "id": "md", "server_label": "box", "name": "fail", "arguments": "{}", "error": {"code": 7}},
    {"type": "file_search_call", "id": "fs", "queries": ["q"], "status": "completed",
     "results": [{"filename": "f.txt", "text": "found this"}]},
    {"type": "computer_call", "call_id": "cc", "id": "cu", "action": {"type": "click", "x": 1}, "status": "completed"},
    {"type": "computer_call_output", "call_id": "cc",
     "output": {"type": "computer_screenshot", "image_url": "PICTURE"}},
    {"type": "local_shell_call", "id": "ls", "call_id": "c1", "status": "completed",
     "action": {"type": "exec", "command": ["ls"], "env": {}}},
    {"type": "local_shell_call_output", "id": "c1", "output": "a b c"},
    {"type": "shell_call", "call_id": "c2", "action": {"commands": ["sleep 9"]}},
    {"type": "shell_call_output", "call_id": "c2",
     "output": [{"stdout": "", "stderr": "oh", "outcome": {"type": "timeout"}}]},
    {"type": "apply_patch_call", "call_id": "c3", "status": "completed", **PATCH},
    {"type": "apply_patch_call_output", "call_id": "c3", "status": "failed", "output": "no such folder"},
    {"type": "custom_tool_call", "call_id": "c4", "name": "exec", "input": 'say("hi")'},
    {"type": "custom_tool_call_output", "call_id": "c4", "output": [{"type": "input_text", "text": "said"}]},
    {"type": "program", "id": "p", "call_id": "c5", "code": "loop()", "fingerprint": "f"},
    {"type": "program_output", "id": "po", "call_id": "c5", "result": "looped", "status": "completed"},
    {"type": "tool_search_call", "arguments": {}, "status": "completed"},
    {"type": "tool_search_output", "status": "completed", "tools": [RESPONSE_TOOL]},
    {"type": "additional_tools", "role": "developer", "tools": [EXEC]},
    {"type": "configuration_update", "reasoning": {"effort": "high"}},
    {"type": "compaction", "encrypted_content": "of somebody else's"},
    {"type": "of_next_year", "x": 1},
    {"role": "user", "content": "go on"},
]  # fmt: skip


def test_a_history_that_began_elsewhere_goes_on_here(proxy: Proxy, weather: Weather) -> None:
    history = json.loads(json.dumps(HISTORY).replace("PICTURE", data_url(picture())))
    for item in history:
        assert item.get("type", "message") in cp.ItemReader.READS or item["type"] == "of_next_year"
    events = response_events(proxy, input=history)
    told = weather.told()
    for text in (
        '{"name": "box.look", "arguments": {"a":1}}',
        "Result of box.look (call mc):\nfull",
        '{"code":7}',
        "refused: never",
        "f.txt:\nfound this",
        "1+1",
        "two!",
        "a b c",
        "oh\nIt was stopped",
        "failed\nno such folder",
        'say(\\"hi\\")',
        "Result of exec (call c4):\nsaid",
        "looped",
        "gAAAA",
    ):
        assert (text in told) == (text != "gAAAA"), text
    offered = [json.loads(one)["name"] for one in told.split(cp.FUNCTIONS_LINE)[1].strip().splitlines()[:2]]
    assert offered == ["get_weather", "exec"]
    assert weather.asked()["thinking_effort"] == "extended"
    messages = weather.asked()["messages"]
    roles = "system user assistant tool assistant tool assistant tool tool" + " assistant tool" * 6 + " user"
    assert [one["author"]["role"] for one in messages] == roles.split()
    assert sum("attachments" in one["metadata"] for one in weather.asked()["messages"]) == 1
    # It goes on from here, with the tools that came on the way.
    id = events[-1]["response"]["id"]
    weather.words = call_of("exec", {"input": "2"})
    again = response_events(proxy, input="more", previous_response_id=id)
    assert again[-1]["response"]["output"][0]["input"] == "2"
    assert "Result of exec (call c4):\nsaid" in weather.told()


def test_what_a_response_was_made_from_is_listed(proxy: Proxy, weather: Weather) -> None:
    history = json.loads(json.dumps(HISTORY).replace("PICTURE", data_url(picture())))
    id = response_events(proxy, input=history)[-1]["response"]["id"]
    path = f"/v1/responses/{id}/input_items"
    whole = web(proxy, "GET", f"{path}?order=asc&limit=100").json()
    ITEM_LIST.validate_python(whole)
    kinds = [item["type"] for item in whole["data"]]
    assert kinds == [
        *["additional_tools"] * 2, "message", "reasoning", "message", "function_call", "function_call_output",
        *["function_call", "function_call_output"] * 2, "function_call_output", "function_call", "function_call_output",
        "local_shell_call", "function_call_output", "shell_call", "function_call_output", "apply_patch_call",
        "function_call_output", "custom_tool_call", "custom_tool_call_output", "function_call", "function_call_output",
        "message",
    ]  # fmt: skip
    assert whole["first_id"] == whole["data"][0]["id"] and not whole["has_more"]
    page = web(proxy, "GET", f"{path}?limit=2").json()
    assert page["data"] == whole["data"][:-3:-1] and page["has_more"]
    after = web(proxy, "GET", f"{path}?limit=2&after={page['last_id']}").json()
    assert after["data"] == whole["data"][-3:-5:-1]
    listed = proxy.client().responses.input_items.list(id)
    assert len(list(listed)) == len(whole["data"])
    for wrong in ("limit=0", "order=up", "after=item_1"):
        assert error_of(web(proxy, "GET", f"{path}?{wrong}")) == (400, "invalid_request_error")
    assert error_of(web(proxy, "GET", "/v1/responses/resp_1/input_items")) == (404, "not_found")


def test_a_kept_response_is_told_again_as_events(proxy: Proxy, weather: Weather) -> None:
    weather.before = [THOUGHT]
    weather.words = in_pieces(f"So: {GOOD_CALL}")
    tools: Any = [RESPONSE_TOOL]
    first = response_events(proxy, tools=tools)
    response = first[-1]["response"]
    client = proxy.client()
    told = list(client.responses.retrieve(response["id"], stream=True))
    assert [one.sequence_number for one in told] == list(range(len(told)))
    assert (
        told[-1].type == "response.completed"
        and told[-1].response.model_dump()["output"]
        == (client.responses.retrieve(response["id"]).model_dump()["output"])
    )
    assert kinds_of([one.model_dump() for one in told]) == kinds_of(first)
    for one in told:
        STREAM_EVENT.validate_python(one.model_dump(mode="json", exclude_unset=True))
    rest = client.responses.retrieve(response["id"], stream=True, starting_after=4)
    assert [one.sequence_number for one in rest] == list(range(5, len(told)))
    bad = web(proxy, "GET", f"/v1/responses/{response['id']}?stream=true&starting_after=x")
    assert error_of(bad) == (400, "invalid_request_error")


def test_a_conversation_is_made_shorter_and_gone_on_with(proxy: Proxy, weather: Weather) -> None:
    weather.words = ["We", " paint", " it", " blue."]
    client = proxy.client()
    said: Any = [{"role": "user", "content": "which colour?"}, *HISTORY[12:14]]
    shorter = client.responses.compact(model="gpt-4o", input=said, instructions="Be brief.")
    assert shorter.object == "response.compaction" and shorter.usage.output_tokens > 0
    (item,) = shorter.output
    assert item.type == "compaction" and "blue" not in item.encrypted_content
    assert "which colour?" in weather.told() and "a b c" in weather.told() and "Write down" in weather.told()
    # As an item of the conversation itself: Codex asks so.
    events = response_events(proxy, input=[*said, {"type": "compaction_trigger"}], tools=[RESPONSE_TOOL])
    assert kinds_of(events) == [
        "created",
        "in_progress",
        "output_item.added",
        "output_item.done",
        "completed",
    ]
    assert cp.FUNCTIONS_LINE not in weather.told()
    response = events[-1]["response"]
    weather.words = ["Blue."]
    more: Any = [item.model_dump(), {"role": "user", "content": "so?"}]
    client.responses.create(model="gpt-4o", input=more)
    assert f"{cp.SUMMARY_LINE}\nWe paint it blue." in weather.told() and "which" not in weather.told()
    client.responses.create(model="gpt-4o", input="so?", previous_response_id=response["id"])
    assert f"{cp.SUMMARY_LINE}\nWe paint it blue." in weather.told() and "which" not in weather.told()
    only = client.responses.compact(model="gpt-4o", previous_response_id=response["id"])
    assert only.output[0].type == "compaction"
    weather.words = [" "]
    answer = web(proxy, "POST", "/v1/responses/compact", json={"model": "gpt-4o", "input": "x"})
    assert error_of(answer) == (502, "upstream_error")
    for said in (None, 5, []):
        answer = web(proxy, "POST", "/v1/responses/compact", json={"model": "gpt-4o", "input": said})
        assert error_of(answer) == (400, "invalid_request_error")


def test_the_tokens_of_a_response_are_counted_without_asking(proxy: Proxy, weather: Weather) -> None:
    client = proxy.client()
    few = client.responses.input_tokens.count(model="gpt-4o", input="hi")
    many = client.responses.input_tokens.count(model="gpt-4o", input="hi " * 500, tools=[RESPONSE_TOOL])
    assert few.object == "response.input_tokens" and 5 < few.input_tokens < 12
    assert many.input_tokens > 500 + few.input_tokens
    assert few.input_tokens == client.responses.create(model="gpt-4o", input="hi").usage.input_tokens  # type: ignore[union-attr] # there is one
    assert weather.count("/conversation") == 1


@pytest.mark.parametrize("begun", [True, False])
def test_a_response_that_breaks_off_says_so_where_clients_look(
    start: Callable[..., Proxy], weather: Weather, begun: bool
) -> None:
    proxy = start("a", heartbeat="1", retry_times="0")
    half = list(weather.say({"model": "gpt-4o"}, [" a", " b", " c"]))[:5]

    def slow(request: cp.Request) -> cp.Reply:
        time.sleep(1.5)  # until a sign of life has begun the answer
        return cp.Reply(502)

    weather.add("/conversation", cut_stream(*half) if begun else slow)
    answer = httpx.post(
        f"{proxy.url}/v1/responses",
        json={"model": "gpt-4o", "input": "hi", "stream": True},
        headers={"Authorization": KEY},
        timeout=30,
    )
    assert answer.status_code == 200
    blocks = [one for one in answer.text.strip().split("\n\n") if not one.startswith(":")]
    name, _, data = blocks[-1].partition("\n")
    event = json.loads(data.removeprefix("data: "))
    assert name == "event: response.failed" and event["type"] == "response.failed"
    assert event["sequence_number"] == len(blocks) - 1 >= 2
    STREAM_EVENT.validate_python(event)
    assert event["response"]["status"] == "failed" and event["response"]["error"]["code"] == "server_error"
    assert event["error"]["code"] == "upstream_error" and event["error"]["type"] == "upstream_error"


def test_a_websocket_where_none_is_spoken_is_refused_at_once(proxy: Proxy) -> None:
    url = f"ws://127.0.0.1:{proxy.address[1]}/v1/responses"
    with pytest.raises(websockets.exceptions.InvalidStatus) as refused:
        websockets.sync.client.connect(url, additional_headers={"Authorization": KEY}, proxy=None)
    assert refused.value.response.status_code == 426
    assert error_of(web(proxy, "GET", "/v1/responses")) == (405, "method_not_allowed")


# --- Anthropic's API --------------------------------------------------------------------------------------------------


CLAUDE_TOOL: Any = {"name": "get_weather", "description": "The weather now", "input_schema": WEATHER_SCHEMA}


def claude(proxy: Proxy, **options: Any) -> anthropic.Anthropic:
    return anthropic.Anthropic(base_url=proxy.url, api_key=KEY, max_retries=0, **options)


def message_events(proxy: Proxy, **body: Any) -> list[dict[str, Any]]:
    """The events of a streamed message, each checked against the anthropic package's type."""
    body = {"model": "gpt-4o", "max_tokens": 1000, "messages": [SAID_HI], "stream": True} | body
    answer = httpx.post(f"{proxy.url}/v1/messages", json=body, headers={"x-api-key": KEY}, timeout=30)
    return events_of(answer, MESSAGE_EVENT)


def test_a_message_is_answered_whole_and_streamed(proxy: Proxy, weather: Weather) -> None:
    weather.before = [THOUGHT]
    client = claude(proxy)
    asked: Any = {"model": "gpt-4o", "max_tokens": 100, "messages": [SAID_HI], "system": "Be brief."}
    answer = client.messages.create(**asked)
    assert [block.to_dict() for block in answer.content] == [{"type": "text", "text": "Hello wide world."}]
    assert (answer.stop_reason, answer.role, answer.model) == ("end_turn", "assistant", "gpt-4o")
    assert answer.usage.input_tokens > 8 and answer.usage.output_tokens == 9
    assert weather.asked()["messages"][0]["author"]["role"] == "system" and "Be brief." in weather.told()
    with client.messages.stream(**asked, thinking={"type": "adaptive"}) as stream:
        assert "".join(stream.text_stream) == "Hello wide world."
        final = stream.get_final_message()
    assert [block.type for block in final.content] == ["thinking", "text"]
    assert final.content[0].to_dict() == {
        "type": "thinking",
        "thinking": "Hm\nlet me see",
        "signature": "chatproxy",
    }
    assert final.usage.input_tokens == answer.usage.input_tokens
    assert final.usage.output_tokens == answer.usage.output_tokens
    kinds = [
        event["type"] for event in message_events(proxy, thinking={"type": "enabled", "budget_tokens": 2000})
    ]
    assert [kind for i, kind in enumerate(kinds) if kind != kinds[i - 1]] == [
        "message_start", "content_block_start", "content_block_delta", "content_block_stop",
        "content_block_start", "content_block_delta", "content_block_stop", "message_delta", "message_stop",
    ]  # fmt: skip
    assert weather.asked()["thinking_effort"] == "standard"
    message_events(proxy, thinking={"type": "disabled"})
    assert weather.asked()["thinking_effort"] == "min"
    message_events(proxy)
    assert "thinking_effort" not in weather.asked()
    for thinking in ({"type": "disabled"}, {"type": "adaptive", "display": "omitted"}):
        events = message_events(proxy, thinking=thinking, output_config={"effort": "max"})
        assert not any(event.get("content_block", {}).get("type") == "thinking" for event in events)
        assert weather.asked()["thinking_effort"] == "max"


def test_tools_are_called_in_messages_and_their_results_told(proxy: Proxy, weather: Weather) -> None:
    weather.words = in_pieces(f"So: {GOOD_CALL}{GOOD_CALL}")
    client = claude(proxy)
    question: Any = {"role": "user", "content": "and Paris?"}
    asked: Any = {"model": "gpt-4o", "max_tokens": 1000, "tools": [CLAUDE_TOOL]}
    for streams in (False, True):
        if streams:
            with client.messages.stream(**asked, messages=[question]) as stream:
                answer: Any = stream.get_final_message()
        else:
            answer = client.messages.create(**asked, messages=[question])
        assert [block.type for block in answer.content] == ["text", "tool_use", "tool_use"]
        assert answer.content[1].input == {"city": "Paris", "unit": "c"} and answer.stop_reason == "tool_use"
    source: Any = {"type": "base64", "media_type": "image/png", "data": base64.b64encode(picture()).decode()}
    back: Any = [
        {"type": "tool_result", "tool_use_id": answer.content[1].id, "is_error": True,
         "content": [{"type": "text", "text": "sunny"}, {"type": "image", "source": source}]},
        {"type": "tool_result", "tool_use_id": answer.content[2].id, "content": "rainy"},
        {"type": "text", "text": "which is it?"},
    ]  # fmt: skip
    weather.words = ["Both."]
    said = [question, {"role": "assistant", "content": answer.content}, {"role": "user", "content": back}]
    assert client.messages.create(**asked, messages=said).content[0].to_dict()["text"] == "Both."
    roles = [one["author"]["role"] for one in weather.asked()["messages"]]
    assert roles == ["system", "user", "assistant", "tool", "user"]
    first, second = (f"Result of get_weather (call {answer.content[i].id}):" for i in (1, 2))
    assert f"{first}\nThe call failed:\nsunny" in weather.told() and f"{second}\nrainy" in weather.told()
    assert weather.asked()["messages"][3]["metadata"]["attachments"][0]["mime_type"] == "image/png"


def test_a_tool_choice_of_messages_is_kept(proxy: Proxy, weather: Weather) -> None:
    for choice, told in (
        ({"type": "any"}, "You must call at least one"),
        ({"type": "tool", "name": "get_weather"}, "You must call get_weather now"),
        ({"type": "auto", "disable_parallel_tool_use": True}, "Write one call at most."),
    ):
        weather.words = [GOOD_CALL]
        events = message_events(proxy, tools=[CLAUDE_TOOL], tool_choice=choice)
        assert events[-2]["delta"]["stop_reason"] == "tool_use" and told in weather.told()
    weather.words = ["No."]
    message_events(proxy, tools=[CLAUDE_TOOL], tool_choice={"type": "none"})
    assert cp.FUNCTIONS_LINE not in weather.told()


def test_blocks_of_every_kind_are_understood(
    proxy: Proxy, weather: Weather, caplog: pytest.LogCaptureFixture
) -> None:
    image = base64.b64encode(picture()).decode()
    content: Any = [
        {"type": "document", "title": "Notes", "context": "old", "source": {"type": "text", "data": "plain words"}},
        {"type": "document", "source": {"type": "content", "content": [{"type": "text", "text": "inner words"}]}},
        {"type": "document", "title": "a.pdf",
         "source": {"type": "base64", "media_type": "application/pdf", "data": base64.b64encode(b"%PDF-1.4").decode()}},
        {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": image}},
        {"type": "search_result", "title": "Found", "source": "https://x.example",
         "content": [{"type": "text", "text": "found words"}]},
        {"type": "text", "text": "so?", "cache_control": {"type": "ephemeral"}},
    ]  # fmt: skip
    done: Any = [
        {"type": "thinking", "thinking": "secret thought", "signature": "x"},
        {"type": "redacted_thinking", "data": "gone"},
        {"type": "server_tool_use", "id": "s", "name": "web_search", "input": {}},
        {"type": "web_search_tool_result", "tool_use_id": "s", "content": []},
        {"type": "of_next_year"},
        {"type": "text", "text": "done words"},
    ]
    said = [
        {"role": "user", "content": content},
        {"role": "assistant", "content": done},
        {"role": "system", "content": "be kind"},
        {"role": "system", "content": [], "output_config": {"effort": "medium"}},
        {"role": "user", "content": "and?"},
        {"role": "system", "content": [{"type": "text", "text": "few tokens are left"}]},
    ]
    tools: Any = [
        {"type": "bash_20250124", "name": "bash"},
        {"type": "text_editor_20250728", "name": "str_replace_based_edit_tool"},
        {"type": "memory_20250818", "name": "memory"},
        {"type": "web_search_20250305", "name": "web_search"},
        {"type": "code_execution_20250825", "name": "code_execution"},
        {"type": "web_fetch_20250910", "name": "web_fetch"},
    ]
    with caplog.at_level("INFO"):
        message_events(proxy, messages=said, tools=tools)
    named = [vars(one)["facts"]["kind"] for one in caplog.records if "left out" in one.msg]
    assert named == ["of_next_year block", "web_fetch_20250910"]
    for text in (
        "Notes\nold",
        "plain words",
        "inner words",
        "Found\nhttps://x.example",
        "found words",
        "done words",
    ):
        assert text in weather.told(), text
    assert "secret thought" not in weather.told() and "be kind" in weather.told()
    roles = [one["author"]["role"] for one in weather.asked()["messages"]]
    assert roles == ["system", "user", "assistant", "system", "user", "system"]
    assert len(weather.asked()["messages"][1]["metadata"]["attachments"]) == 2
    offered = weather.told().split(cp.FUNCTIONS_LINE)[1].strip().splitlines()[:3]
    assert [json.loads(one)["name"] for one in offered] == ["bash", "str_replace_based_edit_tool", "memory"]
    assert "searching the web, running Python" in weather.told()


def test_a_message_ends_as_it_was_asked_to(proxy: Proxy, weather: Weather) -> None:
    client = claude(proxy)
    asked: Any = {"model": "claude-sonnet-4-5", "messages": [SAID_HI]}
    answer = client.messages.create(**asked, max_tokens=100, stop_sequences=["nowhere", " wor"])
    assert (answer.stop_reason, answer.stop_sequence) == ("stop_sequence", " wor")
    assert answer.content[0].to_dict()["text"] == "Hello wide" and weather.asked()["model"] == "auto"
    answer = client.messages.create(**asked, max_tokens=2)
    assert (answer.stop_reason, answer.stop_sequence) == ("max_tokens", None)
    schema: Any = {"type": "json_schema", "schema": {"type": "object", "required": ["a"]}}
    weather.words = ['Here: {"a":', " 1}!"]
    answer = client.messages.create(**asked, max_tokens=100, output_config={"format": schema})
    assert answer.content[0].to_dict()["text"] == '{"a": 1}'


def test_messages_fail_in_anthropics_shape(start: Callable[..., Proxy], weather: Weather) -> None:
    proxy = start("alice", retry_times="0")
    client = claude(proxy)
    asked: Any = {"model": "gpt-4o", "max_tokens": 9, "messages": [SAID_HI]}
    wrong = anthropic.Anthropic(base_url=proxy.url, api_key="no", max_retries=0)
    with pytest.raises(anthropic.AuthenticationError) as failed:
        wrong.messages.create(**asked)
    told: Any = failed.value.body
    assert told["type"] == "error" and told["error"].keys() == {"type", "message"}
    assert told["error"]["type"] == "authentication_error"
    for body, text in (
        ({"max_tokens": None}, "max_tokens"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "messages[0].content[0].source"),
        ({"messages": [{"role": "user", "content": [5]}]}, "messages[0].content[0]"),
        ({"tools": [{"name": "x y", "input_schema": {}}]}, "tools[0].name"),
        ({"tools": [5]}, "tools[0]"),
        ({"tool_choice": {"type": "perhaps"}}, "tool_choice.type"),
        ({"tool_choice": {"type": []}}, "tool_choice.type"),
        ({"messages": [{"role": "user", "content": []}]}, "messages"),
        ({"output_config": {"effort": "some"}}, "output_config.effort"),
        ({"stop_sequences": [5]}, "stop_sequences"),
    ):
        answer = httpx.post(f"{proxy.url}/v1/messages", json=asked | body, headers={"x-api-key": KEY})
        error = answer.json()["error"]
        assert (answer.status_code, error["type"]) == (400, "invalid_request_error") and text in error[
            "message"
        ]
    weather.add("/conversation", status(429))
    with pytest.raises(anthropic.RateLimitError):
        client.messages.create(**asked)
    assert httpx.get(f"{proxy.url}/v1/messages", headers={"x-api-key": KEY}).json()["type"] == "error"
    big = httpx.post(f"{proxy.url}/v1/messages", content=bytes(21 << 20), headers={"x-api-key": KEY})
    assert big.json()["error"]["type"] == "request_too_large"
    refused = httpx.post(f"{proxy.url}/v1/messages", json=asked, headers={"x-api-key": "sk-ant-api03-x"})
    assert refused.json()["error"]["type"] == "authentication_error" and weather.count("/v1/messages") == 0


def test_a_message_that_breaks_off_ends_with_an_error(proxy: Proxy, weather: Weather) -> None:
    half = list(weather.say({"model": "gpt-4o"}, [" a", " b", " c"]))[:5]
    weather.add("/conversation", cut_stream(*half))
    told = message_events_text(proxy)
    assert told.endswith("\n\n") and "message_stop" not in told
    name, _, data = told.strip().split("\n\n")[-1].partition("\n")
    assert name == "event: error"
    assert json.loads(data.removeprefix("data: "))["error"]["type"] == "api_error"
    weather.add("/conversation", cut_stream(*half))
    with (
        pytest.raises(anthropic.APIStatusError),
        claude(proxy).messages.stream(
            model="gpt-4o", max_tokens=9, messages=[{"role": "user", "content": "hi"}]
        ) as stream,
    ):
        stream.get_final_message()


def message_events_text(proxy: Proxy) -> str:
    body = {"model": "gpt-4o", "max_tokens": 9, "messages": [SAID_HI], "stream": True}
    return httpx.post(f"{proxy.url}/v1/messages", json=body, headers={"x-api-key": KEY}, timeout=30).text


def test_anthropics_clients_count_tokens_and_list_models(proxy: Proxy, weather: Weather) -> None:
    client = claude(proxy)
    counted = client.messages.count_tokens(model="gpt-4o", messages=[{"role": "user", "content": "hi"}])
    asked = client.messages.create(model="gpt-4o", max_tokens=9, messages=[{"role": "user", "content": "hi"}])
    assert counted.input_tokens == asked.usage.input_tokens
    models = client.models.list()
    assert {"gpt-4o", "auto"} <= {model.id for model in models} and not models.has_more
    pydantic.TypeAdapter(list[anthropic.types.ModelInfo]).validate_python([one.to_dict() for one in models])
    assert client.models.retrieve("gpt-4o").display_name == "gpt-4o"
    with pytest.raises(anthropic.NotFoundError):
        client.models.retrieve("nobody")
    assert web(proxy, "GET", "/v1/models").json()["object"] == "list"


# --- Ollama's API -----------------------------------------------------------------------------------------------------


def llama(proxy: Proxy) -> ollama.Client:
    return ollama.Client(host=proxy.url, headers={"Authorization": f"Bearer {KEY}"})


def test_ollamas_clients_chat(proxy: Proxy, weather: Weather) -> None:
    weather.before = [THOUGHT]
    client = llama(proxy)
    answer = client.chat("gpt-4o:latest", messages=[SAID_HI])
    assert answer.message.content == "Hello wide world." and answer.message.thinking == "Hm\nlet me see"
    assert (answer.done, answer.done_reason, answer.eval_count) == (True, "stop", 9)
    assert weather.asked()["model"] == "gpt-4o" and (answer.total_duration or 0) > 0
    parts = list(client.chat("gpt-4o", messages=[SAID_HI], stream=True, think=False))
    assert "".join(part.message.content or "" for part in parts) == "Hello wide world."
    assert not any(part.message.thinking for part in parts) and [part.done for part in parts].index(True) == 4
    assert parts[-1].prompt_eval_count == answer.prompt_eval_count
    client.chat("gpt-4o", messages=[SAID_HI], think="high")
    assert weather.asked()["thinking_effort"] == "extended"
    short = client.chat("gpt-4o", messages=[SAID_HI], options={"num_predict": 2, "stop": ["x"]})
    assert short.done_reason == "length" and short.message.content == "Hello wide"
    weather.words = ['{"a":', " 1}"]
    shaped = client.chat("gpt-4o", messages=[SAID_HI], format={"type": "object", "required": ["a"]})
    assert json.loads(shaped.message.content or "") == {"a": 1}
    assert json.loads(client.chat("gpt-4o", messages=[SAID_HI], format="json").message.content or "") == {
        "a": 1
    }


def test_ollamas_clients_call_tools_and_send_pictures(proxy: Proxy, weather: Weather) -> None:
    def get_weather(city: str, unit: str = "c") -> str:
        """The weather now.

        Args:
            city: where
            unit: c or f
        """
        return f"sunny in {city}"

    client = llama(proxy)
    weather.words = in_pieces(f"{GOOD_CALL}{GOOD_CALL}")
    said: list[Any] = [{"role": "user", "content": "look", "images": [picture()]}]
    for streams in (False, True):
        if streams:
            parts = [
                one.message for one in client.chat("gpt-4o", messages=said, tools=[get_weather], stream=True)
            ]
            message = parts[0]
            calls = [call for one in parts for call in one.tool_calls or ()]
        else:
            message = client.chat("gpt-4o", messages=said, tools=[get_weather]).message
            calls = list(message.tool_calls or ())
        assert [(call.function.name, call.function.arguments) for call in calls] == [
            ("get_weather", {"city": "Paris", "unit": "c"})
        ] * 2
    assert weather.asked()["messages"][1]["metadata"]["attachments"][0]["mime_type"] == "image/png"
    said += [message, {"role": "tool", "content": get_weather("Paris"), "tool_name": "get_weather"}]
    weather.words = ["It is sunny."]
    assert client.chat("gpt-4o", messages=said, tools=[get_weather]).message.content == "It is sunny."
    assert "Result of get_weather:\nsunny in Paris" in weather.told() and GOOD_CALL[:30] in weather.told()
    client.chat("gpt-4o", messages=[*said[:2], {"role": "tool", "content": "dry"}])  # as some clients have it
    assert "Result of get_weather:\ndry" in weather.told()
    functions: Any = [{"function": {"name": name, "arguments": {}}} for name in ("f", "g")]
    results: Any = [
        {"role": "tool", "content": "2", "tool_name": "g", "images": [picture()]},
        {"role": "tool", "content": "1"},
    ]
    client.chat("gpt-4o", messages=[SAID_HI, {"role": "assistant", "tool_calls": functions}, *results])
    assert "Result of g:\n2" in weather.told() and "Result of f:\n1" in weather.told()
    assert weather.asked()["messages"][2]["metadata"]["attachments"]


def test_ollamas_clients_complete_prompts(proxy: Proxy, weather: Weather) -> None:
    client = llama(proxy)
    answer = client.generate("gpt-4o", "hi", system="Be brief.", images=[picture()])
    assert answer.response == "Hello wide world." and answer.done_reason == "stop"
    assert "Be brief." in weather.told() and weather.asked()["messages"][1]["metadata"]["attachments"]
    parts = list(client.generate("gpt-4o", "hi", stream=True))
    assert "".join(part.response or "" for part in parts) == "Hello wide world." and parts[-1].done
    asked = weather.count("/conversation")
    assert client.generate("gpt-4o").done_reason == "load"
    assert client.chat("gpt-4o", keep_alive=0).done_reason == "unload"
    assert weather.count("/conversation") == asked
    with pytest.raises(ollama.ResponseError, match="suffix"):
        client.generate("gpt-4o", "hi", suffix="x")
    assert client.generate("gpt-4o:latest", "hi").model == "gpt-4o:latest"


def test_ollamas_clients_look_around(proxy: Proxy) -> None:
    client = llama(proxy)
    listed = {model.model for model in client.list().models}
    assert {"gpt-4o", "auto"} <= listed and client.ps().models == []
    shown = client.show("gpt-4o:latest")
    assert {"completion", "tools", "vision"} <= set(shown.capabilities or ())
    assert (shown.modelinfo or {})["chatgpt.context_length"] > 8000
    with pytest.raises(ollama.ResponseError) as missing:
        client.show("nobody")
    assert missing.value.status_code == 404 and "not found" in missing.value.error
    assert httpx.get(f"{proxy.url}/api/version").json()["version"].count(".") == 2
    assert httpx.get(proxy.url).text == "Ollama is running" and httpx.head(proxy.url).status_code == 200
    assert "<html" in httpx.get(proxy.url, headers=BROWSER).text
    with pytest.raises(ollama.ResponseError) as refused:
        ollama.Client(host=proxy.url, headers={"Authorization": "Bearer no"}).list()
    assert refused.value.status_code == 401 and "API key" in refused.value.error


def test_an_answer_of_ollamas_that_breaks_off_says_so(proxy: Proxy, weather: Weather) -> None:
    half = list(weather.say({"model": "gpt-4o"}, [" a", " b", " c"]))[:5]
    weather.add("/conversation", cut_stream(*half), cut_stream(*half))
    client = llama(proxy)
    with pytest.raises(ollama.ResponseError, match="upstream"):
        list(client.chat("gpt-4o", messages=[SAID_HI], stream=True))
    with pytest.raises(ollama.ResponseError) as failed:
        client.chat("gpt-4o", messages=[SAID_HI])
    assert failed.value.status_code == 502
    for body, text in (
        ({"messages": [5]}, "messages[0]"),
        ({"messages": [{"role": "user", "content": "x", "images": "no"}]}, "images"),
        ({"messages": [{"role": "user", "content": "x", "images": ["-"]}]}, "base64"),
        ({"messages": [SAID_HI], "options": {"num_predict": "x"}}, "num_predict"),
        ({"messages": [SAID_HI], "tools": [{"type": "function"}]}, "tools[0].name"),
        ({"messages": [SAID_HI], "format": {"type": 7}}, "format"),
        ({"messages": [SAID_HI], "format": "yaml"}, "format"),
        ({"model": ":latest", "messages": [SAID_HI]}, "model"),
        ({"model": None, "messages": [SAID_HI]}, "model"),
    ):
        answer = web(proxy, "POST", "/api/chat", json={"model": "gpt-4o"} | body)
        assert answer.status_code == 400 and text in answer.json()["error"]


# --- small ones ---------------------------------------------------------------------------------------------------------


def test_a_compressed_body_is_refused_as_what_it_is(proxy: Proxy) -> None:
    body = gzip.compress(json.dumps({"model": "gpt-4o", "messages": [SAID_HI]}).encode())
    answer = web(proxy, "POST", "/v1/chat/completions", content=body, headers={"Content-Encoding": "gzip"})
    assert error_of(answer) == (415, "unsupported_encoding")
    plain = json.dumps({"model": "gpt-4o", "messages": [SAID_HI]}).encode()
    same = web(proxy, "POST", "/v1/chat/completions", content=plain, headers={"Content-Encoding": "identity"})
    assert same.status_code == 200


@pytest.mark.parametrize(
    ("method", "path", "code"),
    [
        ("POST", "/v1/responses/unknown", 404),
        ("POST", "/v1/responses/input_tokens/more", 404),
        ("GET", "/v1/responses/compact", 405),
        ("POST", "/v1/messages/batches", 404),
        ("GET", "/v1/messages", 405),
        ("GET", "/v1/chat/completions/x", 404),
        ("POST", "/v1/models/unknown", 405),
        ("DELETE", "/v1/models/auto", 405),
        ("POST", "/v1/models/gpt-4o", 405),
        ("POST", "/v1/responses/resp_1f", 405),
        ("POST", "/api/tags", 405),
        ("GET", "/api/pull", 404),
    ],
)
def test_a_path_that_is_not_there_is_not_a_wrong_method(
    proxy: Proxy, method: str, path: str, code: int
) -> None:
    answer = web(proxy, method, path)
    assert answer.status_code == code and ("allow" in answer.headers) == (code == 405)


def test_a_recap_stands_apart_from_the_thoughts_before_it(proxy: Proxy, weather: Weather) -> None:
    recap = {
        "author": {"role": "assistant"},
        "content": {"content_type": "reasoning_recap", "content": "Thought for 5s"},
    }
    weather.before = [THOUGHT, recap]
    for encoding in ("v1", "cumulative"):
        weather.encoding = encoding
        answer: Any = proxy.client().chat.completions.create(
            model="gpt-4o", messages=[{"role": "user", "content": "hi"}]
        )
        assert answer.choices[0].message.reasoning_content == "Hm\nlet me see\n\nThought for 5s"


def at_terminal(*words: str, typed: bytes = b"", folder: pathlib.Path) -> str:
    """What a command says at a terminal where this is typed."""
    ours, theirs = os.openpty()
    env = os.environ | {"DATA_DIR": str(folder)}
    program = subprocess.Popen(
        [sys.executable, str(SCRIPT), *words], env=env, stdin=theirs, stdout=theirs, stderr=theirs
    )
    os.close(theirs)
    said = b""
    try:
        while typed:
            while b"Paste tokens" not in said:
                said += os.read(ours, 65536)
            if select_readable_fd(ours, 0.01):
                said += os.read(ours, 65536)
            typed = typed[os.write(ours, typed[:1000]) :]
        with contextlib.suppress(OSError):  # it has ended
            while more := os.read(ours, 65536):
                said += more
    finally:
        os.close(ours)
        program.wait(20)
    return said.decode()


def select_readable_fd(fd: int, seconds: float) -> bool:
    return bool(select.select([fd], [], [], seconds)[0])


def test_lists_have_a_header_at_a_terminal_and_make_no_store(tmp_path: pathlib.Path) -> None:
    folder = tmp_path / "none"
    for command in ("accounts", "users"):
        assert "no " in run(command, "list", env={"DATA_DIR": str(folder)}).stderr
        assert not folder.exists()
    run("accounts", "add", cp.demo_token("alice"), env={"DATA_DIR": str(folder)})
    run("users", "add", "bob", env={"DATA_DIR": str(folder)})
    header, row = at_terminal("accounts", "list", folder=folder).strip().splitlines()
    assert header.split()[:4] == ["id", "kind", "e-mail", "plan"] and "alice@" in row
    assert header.index("kind") == row.index("access") and header.index("e-mail") == row.index("alice@")
    assert header.index("state") == row.index("ready")
    header, row = at_terminal("users", "list", folder=folder).strip().splitlines()
    assert header.index("name") == row.index("bob")
    assert len(run("accounts", "list", env={"DATA_DIR": str(folder)}).stdout.splitlines()) == 1


def test_a_long_line_can_be_pasted_at_a_terminal(tmp_path: pathlib.Path) -> None:
    token = cp.demo_token("alice")
    page = json.dumps({"user": {"email": "alice@demo.example", "pad": "x" * 6000}, "accessToken": token})
    for typed in (page.encode() + b"\n\x04", b"bad\x7f\x7f\x7f" + token.encode() + b"\n\x04"):
        said = at_terminal("accounts", "add", "-", typed=typed, folder=tmp_path / "data")
        assert "stored: 1" in said and "alice@demo.example" in said and token[:40] not in said


def long_tool(name: str, size: int = 5000) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "description": "x" * size, "parameters": {}}}


@given(
    st.lists(st.sampled_from(["a", "b", "c"]), max_size=2),
    st.sampled_from([",", ", "]),
    st.sampled_from([":", ": "]),
    st.lists(st.integers(0, 5), min_size=1, max_size=6),
)
def test_tools_that_were_sent_before_are_read_as_what_they_are(
    names: list[str], comma: str, colon: str, turns: list[int]
) -> None:
    known = cp.KnownTools()
    tools = [long_tool(name) for name in names]
    inner = {"type": "additional_tools", "role": "developer", "tools": tools}
    text = json.dumps({"tools": tools}, separators=(comma, colon))
    for number in turns:
        body: dict[str, Any] = {"model": "m", "turn": number}
        variants: list[dict[str, Any]] = [
            {"tools": tools},
            {"input": [inner], "tools": [*tools, long_tool("d")]},
            {"messages": [{"role": "user", "content": text}], "tools": tools},
            {"tools": tools, "n": 1, "more": {"tools": tools}},
            {"input": [inner]},
            {"tools": [long_tool("é\ud800" if number else "é")]},
        ]
        body |= variants[number]
        data = cp.Blob(json.dumps(body, separators=(comma, colon)).encode())
        assert cp.parse_object(data, known) == cp.parse_object(data)


def test_known_tools_are_few_and_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    known = cp.KnownTools()
    monkeypatch.setattr(cp.KnownTools, "MOST_IN_ALL", 20_000)

    def read(name: str, size: int = 5000) -> Any:
        tools = [long_tool(name, size)]
        return cp.parse_object(cp.Blob(json.dumps({"tools": tools}).encode()), known)["tools"]

    assert read("a") is read("a") and isinstance(read("a"), cp.ToolList)
    for name in "bcdef":
        read(name)
        assert known._size <= 20_000 and len(known._known) <= 3
    first = read("a")
    assert first is read("a")
    assert not isinstance(read("g", 100), cp.ToolList)  # short ones are read each time


def test_the_same_tools_mean_what_their_api_has_them_mean(proxy: Proxy, weather: Weather) -> None:
    tools = [
        {"name": "look", "type": "custom", "description": "x" * 5000, "input_schema": {"required": ["a"]}}
    ]
    for _ in range(3):
        weather.words = call_of("look", {"input": "now"})
        assert response_events(proxy, tools=tools)[-1]["response"]["output"][0]["input"] == "now"
        weather.words = call_of("look", {"a": 1})
        events = message_events(proxy, tools=tools)
        assert events[-2]["delta"]["stop_reason"] == "tool_use"
        proxy.say(tools=[long_tool("look")])
        assert '"required":["a"]' not in weather.told()


def test_output_that_comes_late_is_told_all_the_same(proxy: Proxy, weather: Weather) -> None:
    python = {"author": {"role": "assistant"}, "recipient": "python"}
    weather.before = [
        python | {"content": {"content_type": "code", "language": "unknown", "text": "first()"}},
        THOUGHT,
        {"author": {"role": "tool"}, "content": {"content_type": "execution_output", "text": "late!"}},
        python | {"content": {"content_type": "code", "language": "unknown", "text": "second()"}},
        {"author": {"role": "tool"}, "content": {"content_type": "execution_output", "text": "in time"}},
    ]
    tools: Any = [{"type": "code_interpreter", "container": {"type": "auto"}}]
    output = response_events(proxy, tools=tools)[-1]["response"]["output"]
    kinds = [item["type"] for item in output]
    assert kinds == ["code_interpreter_call", "reasoning", "message", "code_interpreter_call", "message"]
    assert output[0]["outputs"] == [] and "late!" in output[2]["content"][0]["text"]
    assert output[3]["code"] == "second()" and output[3]["outputs"][0]["logs"] == "in time"


def test_text_that_may_begin_a_stop_sequence_stays_before_a_call(proxy: Proxy, weather: Weather) -> None:
    weather.words = in_pieces(f"Let me look.\n\n{GOOD_CALL}")
    asked: Any = {"model": "gpt-4o", "max_tokens": 100, "messages": [SAID_HI], "tools": [CLAUDE_TOOL]}
    answer = claude(proxy).messages.create(**asked, stop_sequences=["\n\nHuman:"])
    assert [block.type for block in answer.content] == ["text", "tool_use"]
    assert answer.content[0].to_dict()["text"] == "Let me look.\n\n" and answer.stop_reason == "tool_use"


def test_nothing_is_lost_in_a_large_body(proxy: Proxy, weather: Weather) -> None:
    pad = {"role": "user", "content": "x" * (1 << 20)}
    data = "QUJD" * 30
    document = {"type": "document", "source": {"type": "text", "media_type": "text/plain", "data": data}}
    message_events(proxy, messages=[pad, {"role": "user", "content": [document]}])
    assert data in weather.told()
    inner = {"data": data, "url": f"data:text/plain;base64,{data}"}
    response_events(
        proxy,
        input=[
            pad,
            {
                "type": "mcp_call",
                "id": "m",
                "name": "n",
                "server_label": "s",
                "arguments": inner,
                "output": inner,
            },
            {"type": "local_shell_call", "call_id": "c", "action": {"command": ["x"], "env": inner}},
            {"type": "computer_call", "call_id": "d", "action": inner},
            {"type": "apply_patch_call", "call_id": "e", "operation": inner},
        ],
    )
    assert weather.told().count(data) == 10


def test_choosing_among_many_functions_takes_linear_time(proxy: Proxy) -> None:
    many: Any = [{"type": "function", "name": f"f{i}"} for i in range(2000)]
    named = [{"type": "function", "name": f"f{i}"} for i in range(0, 2000, 2)] + [{}] * 20_000
    body = {"model": "auto", "input": "hi", "tools": many}
    body |= {"tool_choice": {"type": "allowed_tools", "mode": "auto", "tools": named}}
    begun = time.process_time()
    counted = web(proxy, "POST", "/v1/responses/input_tokens", json=body).json()["input_tokens"]
    assert time.process_time() - begun < 3 and 10_000 < counted < 60_000
    many.append({"type": "function", "name": "more"})
    answer = web(proxy, "POST", "/v1/responses/input_tokens", json=body)
    assert error_of(answer) == (400, "invalid_request_error") and "tools[2000]" in answer.text


@pytest.mark.parametrize(
    ("tools", "choice", "offered", "told"),
    [
        ([RESPONSE_TOOL, EXEC], {"mode": "auto", "tools": [{"type": "custom", "name": "exec"}]}, ["exec"], "Call one"),
        ([IN_NAMESPACE, TIME_FUNCTION], {"mode": "required", "tools": [{"type": "namespace", "name": "functions"}]},
         ["functions.exec", "functions.get_weather"], "at least one"),
        ([RESPONSE_TOOL, {"type": "web_search"}, {"type": "image_generation"}],
         {"mode": "auto", "tools": [{"type": "function", "name": "get_weather"}, {"type": "image_generation"}]},
         ["get_weather"], "own tools as always: drawing images."),
        ([RESPONSE_TOOL, {"type": "shell"}], {"mode": "auto", "tools": [{"type": "shell"}, {"type": "mcp"}]},
         ["shell"], "Call one"),
    ],
)  # fmt: skip
def test_only_allowed_tools_are_offered(
    proxy: Proxy, weather: Weather, tools: Any, choice: Any, offered: list[str], told: str
) -> None:
    weather.words = call_of(offered[0], SHAPES_OF_CALLS.get(offered[0], {"input": "x"}))
    response_events(proxy, tools=tools, tool_choice={"type": "allowed_tools", **choice})
    lines = weather.told().split(cp.FUNCTIONS_LINE)[1].strip().splitlines()[: len(offered)]
    assert [json.loads(line)["name"] for line in lines] == offered and told in weather.told()


def test_a_function_with_the_name_of_a_hosted_tool_is_a_function(proxy: Proxy, weather: Weather) -> None:
    function = RESPONSE_TOOL | {"name": "web_search"}
    weather.words = call_of("web_search", {"city": "Paris"})
    for choice, hints in (
        ({"type": "function", "name": "web_search"}, []),
        ({"type": "web_search_preview"}, ["search"]),
    ):
        events = response_events(proxy, tools=[function, {"type": "web_search"}], tool_choice=choice)
        assert weather.asked()["system_hints"] == hints
        kinds = {item["type"] for item in events[-1]["response"]["output"]}
        assert ("function_call" in kinds) == (not hints)
    for tool in (
        {"type": "computer_20250124", "name": "computer"},
        {"type": "code_execution_20250825", "name": "run"},
    ):
        choice = {"type": "tool", "name": tool["name"]}
        assert message_events(proxy, tools=[tool], tool_choice=choice)[-1]["type"] == "message_stop"


def test_what_was_drawn_is_kept_once_and_shown_again(proxy: Proxy, weather: Weather) -> None:
    weather.obeys = True
    tools: Any = [{"type": "image_generation"}]
    first = response_events(proxy, input="Draw a cat", tools=tools)[-1]["response"]
    weather.obeys = False
    _, items = proxy.store.response(first["id"], cp.Scope("x", everyone=True), 0.0) or ("", "")
    assert first["output"][0]["result"] not in items and first["output"][0]["id"] in items
    second = response_events(proxy, input="make it blue", previous_response_id=first["id"])[-1]["response"]
    assert weather.asked()["messages"][1]["metadata"]["attachments"][0]["mime_type"] == "image/png"
    response_events(proxy, input="and red", previous_response_id=second["id"])
    assert weather.asked()["messages"][1]["metadata"]["attachments"]
    listed = web(proxy, "GET", f"/v1/responses/{second['id']}/input_items?order=asc").json()["data"]
    referred: Any = [{"type": "item_reference", "id": listed[0]["id"]}, {"id": first["output"][0]["id"]}]
    response_events(proxy, input=[*referred, SAID_HI])
    assert (
        weather.told().startswith("Draw a cat") and weather.asked()["messages"][1]["metadata"]["attachments"]
    )


def test_the_same_tools_on_every_turn_are_kept_once(proxy: Proxy, weather: Weather) -> None:
    brought = {"type": "additional_tools", "role": "developer", "tools": [RESPONSE_TOOL]}
    id = None
    for _ in range(3):
        id = response_events(proxy, input=[brought, SAID_HI], previous_response_id=id)[-1]["response"]["id"]
    listed = web(proxy, "GET", f"/v1/responses/{id}/input_items").json()["data"]
    assert sum(item["type"] == "additional_tools" for item in listed) == 1


def test_counting_uses_up_nobodys_day(start: Callable[..., Proxy]) -> None:
    proxy = start("alice")
    user, token = cp.issue_user(proxy.store, "bob", 1)
    proxy.app.keys.reload()
    counted = {"model": "gpt-4o", "messages": [SAID_HI]}
    for path, body in (
        ("/v1/messages/count_tokens", counted),
        ("/v1/responses/input_tokens", {"model": "gpt-4o", "instructions": "Be brief."}),
        ("/api/show", {"model": "auto"}),
    ):
        assert web(proxy, "POST", path, token, json=body).status_code == 200, path
    assert web(proxy, "POST", "/v1/messages", token, json=counted | {"max_tokens": 9}).status_code == 200
    assert web(proxy, "POST", "/v1/messages", token, json=counted | {"max_tokens": 9}).status_code == 429


def test_an_empty_bearer_is_no_key(proxy: Proxy) -> None:
    body = {"model": "gpt-4o", "max_tokens": 9, "messages": [SAID_HI]}
    for empty in ("Bearer", "bearer", ""):
        headers = {"Authorization": empty, "x-api-key": KEY}
        assert httpx.post(f"{proxy.url}/v1/messages", json=body, headers=headers).status_code == 200
    headers = {"Authorization": "Bearer wrong", "x-api-key": KEY}
    assert httpx.post(f"{proxy.url}/v1/messages", json=body, headers=headers).status_code == 401


def validated(kind: Any, value: Any) -> Any:
    """A value that is of a package's type, nested ones too."""
    pydantic.TypeAdapter(kind).validate_python(value)
    return value


def test_answers_are_of_the_newest_packages_types(proxy: Proxy, weather: Weather) -> None:
    weather.before = [THOUGHT]
    said = {"model": "gpt-4o", "messages": [SAID_HI]}
    for words, tools in (
        (weather.words, []),
        (in_pieces(f"So: {GOOD_CALL}{GOOD_CALL}"), [WEATHER_TOOL]),
        (call_of("exec", {"input": "x"}), [{"type": "custom", "custom": {"name": "exec"}}]),
    ):
        weather.words = words
        body: Any = said | {"tools": tools}
        validated(
            openai.types.chat.ChatCompletion, web(proxy, "POST", "/v1/chat/completions", json=body).json()
        )
        streamed = web(proxy, "POST", "/v1/chat/completions", json=body | {"stream": True}).text
        for line in streamed.split("\n\n")[:-2]:
            chunk = json.loads(
                line.removeprefix("data: ").replace('"type":"custom",', "")
            )  # which the type has not yet
            validated(openai.types.chat.ChatCompletionChunk, chunk)
    weather.words = in_pieces(GOOD_CALL)
    asked = said | {"max_tokens": 50, "tools": [CLAUDE_TOOL], "thinking": {"type": "adaptive"}}
    validated(anthropic.types.Message, web(proxy, "POST", "/v1/messages", json=asked).json())
    counted = web(proxy, "POST", "/v1/messages/count_tokens", json=asked).json()
    validated(anthropic.types.MessageTokensCount, counted)
    for kind, body in (
        (ollama.ChatResponse, said),
        (ollama.GenerateResponse, {"model": "gpt-4o", "prompt": "hi"}),
    ):
        path = "/api/chat" if kind is ollama.ChatResponse else "/api/generate"
        validated(kind, web(proxy, "POST", path, json=body | {"stream": False}).json())
        for line in web(proxy, "POST", path, json=body).text.splitlines():
            validated(kind, json.loads(line))
    validated(ollama.ListResponse, web(proxy, "GET", "/api/tags").json())
    validated(ollama.ShowResponse, web(proxy, "POST", "/api/show", json={"model": "gpt-4o"}).json())
    response = web(
        proxy, "POST", "/v1/responses", json={"model": "gpt-4o", "input": "hi", "tools": [RESPONSE_TOOL]}
    ).json()
    validated(openai.types.responses.Response, response)
    validated(openai.types.responses.Response, web(proxy, "GET", f"/v1/responses/{response['id']}").json())
    compact = web(proxy, "POST", "/v1/responses/compact", json={"model": "gpt-4o", "input": "hi"}).json()
    validated(openai.types.responses.CompactedResponse, compact)
    models = web(proxy, "GET", "/v1/models").json()
    validated(list[openai.types.Model], models["data"])


# --- coding agents, for real --------------------------------------------------------------------------------------------

# Where `make agents` installs them; those that are not there are skipped.
AGENTS = pathlib.Path(os.environ.get("AGENTS", SCRIPT.parent / ".agents"))
OLD, NEW = "hello world", "hello changed world"
HUNKS = (f"*** Add File: hello.txt\n+{OLD}", f"*** Update File: hello.txt\n@@\n-{OLD}\n+{NEW}")
PATCHES = [f"*** Begin Patch\n{hunk}\n*** End Patch" for hunk in HUNKS]


class Coder(Weather):
    """The stand-in with a model that creates a file, reads it, changes it and prints it, with whatever tools it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = pathlib.Path()
        self.made = 0  # calls

    def answer(self, request: cp.Request, body: Any) -> Iterator[bytes]:
        texts = [
            (
                one["author"]["role"],
                "\n".join(part for part in one["content"]["parts"] if isinstance(part, str)),
            )
            for one in body["messages"]
        ]
        told = next((text for _, text in texts if cp.FUNCTIONS_LINE in text), "")
        if not told:
            return self.say(body, [self.edit(texts)])
        lines = told.split(f"{cp.FUNCTIONS_LINE}\n")[1].split("\n\n")[0].splitlines()
        offered = {one["name"]: one for one in map(json.loads, lines)}
        steps = self.steps(offered)
        done = sum("<tool_call>" in text for role, text in texts if role == "assistant")
        if done >= len(steps):
            return self.say(body, ["All", " done", "."])
        self.made += len(steps[done])
        calls = [
            f"<tool_call>{json.dumps({'name': name, 'arguments': args})}</tool_call>"
            for name, args in steps[done]
        ]
        return self.say(body, in_pieces("".join(["Now: " * (done == 0), *calls]), 9))

    @staticmethod
    def edit(texts: list[tuple[str, str]]) -> str:
        """What a program without tools is told: a file whole, and then its change."""
        if "SEARCH/REPLACE" not in "".join(text for _, text in texts):
            return "Nothing to do."
        before, after = (OLD, NEW) if any(f"\n{OLD}\n" in text for _, text in texts) else ("", OLD)
        lines = [
            "hello.txt",
            "```",
            "<<<<<<< SEARCH",
            *filter(None, [before]),
            "=======",
            after,
            ">>>>>>> REPLACE",
            "```",
        ]
        return "\n".join([*lines, ""])

    def steps(self, offered: dict[str, Any]) -> list[list[tuple[str, Any]]]:
        """The calls, step by step; the last two at once."""
        path = str(self.folder / "hello.txt")

        def fill(name: str, **values: Any) -> tuple[str, Any]:
            properties = offered[name]["parameters"].get("properties", {})
            known: dict[str, Any] = {
                "path": path, "file_path": path, "filePath": path, "filepath": path,
                "files": [{"path": path}], "description": "as asked", "is_background": False, "requires_approval": False, "cmd": values.get("run"),
                "command": values.get("run"), "commands": [values.get("run")], "content": values.get("text"),
                "file_text": values.get("text"), "new_text": values.get("new", values.get("text")),
                "old_text": values.get("old"), "old_string": values.get("old"), "oldString": values.get("old"),
                "old_str": values.get("old"), "new_string": values.get("new"), "newString": values.get("new"),
                "new_str": values.get("new"),
                "edits": [{"old_string": values.get("old"), "new_string": values.get("new")}],
            }  # fmt: skip
            if properties.get("command", {}).get("type") == "array":
                known["command"] = ["bash", "-lc", values.get("run")]
            return name, {one: known[one] for one in properties if known.get(one) not in (None, [None])}

        def first(*names: str) -> str:
            return next((name for name in names if name in offered), "")

        if "functions.exec" in offered:  # which runs programs that call the tools

            def run(code: str) -> tuple[str, Any]:
                return "functions.exec", {"input": code}

            cat = run('const r = await tools.exec_command({cmd: "cat hello.txt"}); text(r.output);')
            add, change = (run(f"text(await tools.apply_patch({json.dumps(one)}));") for one in PATCHES)
            return [[add], [cat], [change], [cat, cat]]
        shell = first(
            "Bash", "bash", "run_shell_command", "exec_command", "shell_command", "run_commands", "shell", "local_shell"
        )  # fmt: skip
        cat = fill(shell, run="cat hello.txt")
        if patch := first("apply_patch"):
            field = next(iter(offered[patch]["parameters"]["properties"]))
            add, change = ((patch, {field: one}) for one in PATCHES)
        elif writer := first("Write", "write", "write_file", "create", "editor"):
            add = fill(writer, text=f"{OLD}\n")
            change = fill(first("Edit", "edit", "editor", "MultiEdit"), old=OLD, new=NEW)
        else:
            add = fill(shell, run=f"echo {OLD} > hello.txt")
            change = fill(shell, run=f"echo {NEW} > hello.txt")
        reader = first("Read", "read", "read_file", "view", "read_files")
        read = fill(reader) if reader else cat
        return [[add], [read], [change], [cat, read]]


class NativeCoder(Coder):
    """The same by the Codex backend: the model makes its calls as the API has them."""

    def __init__(self) -> None:
        super().__init__()
        self.codex = True
        first, *others = self.codex_catalog
        named = [first | {"slug": slug, "priority": 9} for slug in ("gpt-4o", "gpt-5.4", "gpt-6-sol")]
        self.codex_catalog = [first, *others, *named]
        self.asked_natively: list[dict[str, Any]] = []

    def told(self) -> str:
        return json.dumps(self.asked_natively[-1]["input"])

    def codex_items(self, request: cp.Request, body: Mapping[str, Any]) -> list[dict[str, Any]]:
        self.asked_natively.append(dict(body))
        brought = [
            tool for item in body["input"] if item.get("type") == "additional_tools" for tool in item["tools"]
        ]
        offered = {}
        for tool in [*brought, *body.get("tools", ())]:
            inner = [(f"{tool['name']}.{one['name']}", one) for one in tool.get("tools", ())]
            for name, one in inner or [(tool.get("name") or tool["type"], tool)]:
                offered[name] = {"parameters": {"properties": {"input": {}}}} | one
        texts = [
            (one["role"], "\n".join(cp._texts_in(one["content"])))
            for one in body["input"]
            if one.get("type", "message") == "message"
        ]
        if not any(one["type"] in ("function", "custom") for one in offered.values()):
            return said_natively(self.edit([("system", body.get("instructions") or ""), *texts]))
        steps = self.steps(offered)
        done = sum(str(item.get("type")).endswith("_call") for item in body["input"])
        sizes = list(itertools.accumulate((len(step) for step in steps), initial=0))
        if done >= sizes[-1]:
            return said_natively("All done.")
        made = steps[sizes.index(done)]
        self.made += len(made)
        thought = {"type": "reasoning", "summary": [], "encrypted_content": self._sealed(request)}
        return [thought, *(self.native_call(offered[name], name, said) for name, said in made)]

    @staticmethod
    def native_call(tool: dict[str, Any], name: str, said: Any) -> dict[str, Any]:
        space, _, name = name.rpartition(".")
        call = {"call_id": f"call_{secrets.token_hex(12)}", "name": name} | (
            {"namespace": space} if space else {}
        )
        if tool["type"] == "custom":
            return {"type": "custom_tool_call", "input": said["input"]} | call
        return {"type": "function_call", "arguments": json.dumps(said)} | call


def opencode_settings(url: str, package: str) -> str:
    model = {"name": "gpt-4o", "tool_call": True, "limit": {"context": 100000, "output": 8000}}
    provider = {
        "npm": package,
        "name": "P",
        "options": {"baseURL": f"{url}/v1", "apiKey": KEY},
        "models": {"gpt-4o": model},
    }
    return json.dumps(
        {"model": "p/gpt-4o", "small_model": "p/gpt-4o", "permission": "allow", "provider": {"p": provider}}
    )


def codex_settings(url: str, custom: bool) -> str:
    if not custom:
        return f'model = "gpt-5.4"\nopenai_base_url = "{url}/v1"\n'
    provider = f'name = "p"\nbase_url = "{url}/v1"\nenv_key = "P_KEY"\nwire_api = "responses"'
    return f'model_provider = "p"\n[model_providers.p]\n{provider}\n'


def cline_settings(url: str, provider: str) -> str:
    settings = {"provider": provider, "apiKey": KEY, "model": "gpt-4o", "baseUrl": f"{url}/v1"}
    facts = {"settings": settings, "updatedAt": "2026-01-01T00:00:00.000Z", "tokenSource": "manual"}
    return json.dumps(
        {"version": 1, "lastUsedProvider": provider, "modes": {}, "providers": {provider: facts}}
    )


def continue_settings(url: str, provider: str) -> str:
    base = url if provider == "ollama" else f"{url}/v1"
    model = {"name": "M", "provider": provider, "model": "gpt-4o", "apiBase": base, "apiKey": KEY}
    lists = {"roles": ["chat", "edit", "apply"], "capabilities": ["tool_use"]}
    return json.dumps({"name": "L", "version": "1.0.0", "schema": "v1", "models": [model | lists]})


TASK = "Create hello.txt, read it, change it, print it."
CODEX = ["exec", "--skip-git-repo-check", "--dangerously-bypass-approvals-and-sandbox"]
CODEX_FILE = ".codex/config.toml"
CLINE_FILE = ".cline/data/settings/providers.json"
QUIET = {"DO_NOT_TRACK": "1", "CI": "1", "NO_COLOR": "1", "TERM": "dumb", "IS_SANDBOX": "1"}


@dataclasses.dataclass(frozen=True)
class Agent:
    """A coding agent: its program and words, its environment, and a file of settings in its home; `{url}` is the server."""

    program: str
    words: list[str]
    env: dict[str, str] = dataclasses.field(default_factory=dict)
    file: str = ""
    settings: Callable[[str], str] = str


COPILOT = {
    "COPILOT_PROVIDER_BASE_URL": "{url}/v1", "COPILOT_PROVIDER_TYPE": "openai", "COPILOT_PROVIDER_API_KEY": KEY,
    "COPILOT_MODEL": "gpt-4o", "COPILOT_OFFLINE": "true", "COPILOT_AUTO_UPDATE": "false",
}  # fmt: skip
COPILOT_WORDS = ["-p", TASK, "--allow-all", "--no-ask-user", "--no-auto-update", "--disable-builtin-mcps"]
CLINE = {"CLINE_SESSION_BACKEND_MODE": "local", "CLINE_NO_AUTO_UPDATE": "1", "CLINE_TELEMETRY_DISABLED": "1"}
OPENCODE = {
    f"OPENCODE_DISABLE_{name}": "1"
    for name in ("MODELS_FETCH", "AUTOUPDATE", "LSP_DOWNLOAD", "DEFAULT_PLUGINS", "SHARE", "PROJECT_CONFIG")
}
CLAUDE = {
    "ANTHROPIC_BASE_URL": "{url}", "ANTHROPIC_API_KEY": KEY, "CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC": "1",
    "DISABLE_TELEMETRY": "1", "DISABLE_AUTOUPDATER": "1",
}  # fmt: skip
QWEN = {"OPENAI_BASE_URL": "{url}/v1", "OPENAI_API_KEY": KEY, "OPENAI_MODEL": "gpt-4o"}
CODING_AGENTS = {
    "codex, its own provider": Agent(
        "codex", [*CODEX, TASK], {"CODEX_API_KEY": KEY}, CODEX_FILE, lambda url: codex_settings(url, False)
    ),
    "codex, a provider": Agent(
        "codex", [*CODEX, "-m", "gpt-4o", TASK], {"P_KEY": KEY}, CODEX_FILE, lambda url: codex_settings(url, True)
    ),
    "codex, code mode": Agent(
        "codex", [*CODEX, "-m", "gpt-6-sol", TASK], {"P_KEY": KEY}, CODEX_FILE, lambda url: codex_settings(url, True)
    ),
    "codex 0.145": Agent(
        "old/codex", [*CODEX, "-m", "gpt-5.4", TASK], {"P_KEY": KEY}, CODEX_FILE, lambda url: codex_settings(url, True)
    ),
    "copilot, completions": Agent("copilot", COPILOT_WORDS, COPILOT | {"COPILOT_PROVIDER_WIRE_API": "completions"}),
    "copilot, responses": Agent("copilot", COPILOT_WORDS, COPILOT | {"COPILOT_PROVIDER_WIRE_API": "responses"}),
    "cline, openai-compatible": Agent(
        "cline", ["--auto-approve", "true", "-P", "openai-compatible", "-m", "gpt-4o", TASK], CLINE, CLINE_FILE,
        lambda url: cline_settings(url, "openai-compatible"),
    ),
    "cline, openai-native": Agent(
        "cline", ["--auto-approve", "true", "-P", "openai-native", "-m", "gpt-4o", TASK], CLINE, CLINE_FILE,
        lambda url: cline_settings(url, "openai-native"),
    ),
    "opencode, completions": Agent(
        "opencode", ["run", "--auto", "-m", "p/gpt-4o", TASK], OPENCODE, ".config/opencode/opencode.json",
        lambda url: opencode_settings(url, "@ai-sdk/openai-compatible"),
    ),
    "opencode, responses": Agent(
        "opencode", ["run", "--auto", "-m", "p/gpt-4o", TASK], OPENCODE, ".config/opencode/opencode.json",
        lambda url: opencode_settings(url, "@ai-sdk/openai"),
    ),
    "claude": Agent("claude", ["-p", TASK, "--dangerously-skip-permissions", "--model", "gpt-4o"], CLAUDE),
    "qwen": Agent("qwen", ["--auth-type", "openai", "-p", TASK, "--yolo"], QWEN),
    "continue, openai": Agent(
        "cn", ["--config", "{home}/config.yaml", "-p", TASK, "--auto"], {}, "config.yaml",
        lambda url: continue_settings(url, "openai"),
    ),
    "continue, ollama": Agent(
        "cn", ["--config", "{home}/config.yaml", "-p", TASK, "--auto"], {}, "config.yaml",
        lambda url: continue_settings(url, "ollama"),
    ),
    "continue, anthropic": Agent(
        "cn", ["--config", "{home}/config.yaml", "-p", TASK, "--auto"], {}, "config.yaml",
        lambda url: continue_settings(url, "anthropic"),
    ),
}  # fmt: skip


def program_of(name: str) -> str:
    """The program of an agent; without it the test is skipped."""
    folder, _, plain = name.rpartition("/")
    bins = [AGENTS / folder / "node_modules" / ".bin", AGENTS / "venv" / "bin"]
    found = shutil.which(plain, path=os.pathsep.join([*map(str, bins), os.environ["PATH"]]))
    if found is None:
        pytest.skip(f"{name} is not installed; `make agents` does that")
    return found


def at_work(
    agent: Agent, url: str, home: pathlib.Path, folder: pathlib.Path
) -> subprocess.CompletedProcess[str]:
    """Has an agent do its task in a folder."""
    program = program_of(agent.program)
    home.mkdir(exist_ok=True)
    folder.mkdir(exist_ok=True)
    if agent.file:
        (home / agent.file).parent.mkdir(parents=True, exist_ok=True)
        (home / agent.file).write_text(agent.settings(url))
    path = os.pathsep.join([str(AGENTS / "node_modules" / ".bin"), os.environ["PATH"]])
    env = QUIET | {"HOME": str(home), "PATH": path, "SHELL": "/bin/bash", "LANG": "C.UTF-8", "USER": "root"}
    env |= {name: value.replace("{url}", url) for name, value in agent.env.items()}
    words = [word.replace("{home}", str(home)) for word in agent.words]
    return subprocess.run(
        [program, *words],
        cwd=folder,
        env=env,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=90,
    )


@pytest.fixture
def coder() -> Iterator[Coder]:
    yield from at_hand(Coder())


@pytest.fixture
def native_coder() -> Iterator[NativeCoder]:
    yield from at_hand(NativeCoder())


# One of each way to ask, since all of them take long.
NATIVE_AGENTS = (
    "codex, its own provider", "codex, code mode", "copilot, completions", "copilot, responses", "opencode, completions",
    "opencode, responses", "claude",
)  # fmt: skip


@pytest.mark.parametrize("name", NATIVE_AGENTS)
def test_a_coding_agent_does_its_work_with_native_calls(
    native_coder: NativeCoder, tmp_path: pathlib.Path, name: str
) -> None:
    program_of(CODING_AGENTS[name].program)
    coder = native_coder
    coder.folder = tmp_path / "work"
    proxy = Proxy(tmp_path / "data", coder.url, [codex_token("alice")])
    try:
        done = at_work(CODING_AGENTS[name], proxy.url, tmp_path / "home", coder.folder)
    finally:
        proxy.close()
    said = f"{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    assert (coder.folder / "hello.txt").read_text().strip() == NEW, said
    assert coder.made == 5 and NEW in coder.told() and done.returncode == 0, said
    assert not any(call.endswith("/conversation") for call in coder.calls), said
    assert "All done." in done.stdout, said


@pytest.mark.parametrize("name", CODING_AGENTS)
def test_a_coding_agent_does_its_work(coder: Coder, tmp_path: pathlib.Path, name: str) -> None:
    program_of(CODING_AGENTS[name].program)
    coder.folder = tmp_path / "work"
    proxy = Proxy(tmp_path / "data", coder.url, [cp.demo_token("alice")])
    try:
        done = at_work(CODING_AGENTS[name], proxy.url, tmp_path / "home", coder.folder)
    finally:
        proxy.close()
    said = f"{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    assert (coder.folder / "hello.txt").read_text().strip() == NEW, said
    assert coder.made == 5 and NEW in coder.told() and done.returncode == 0, said
    assert "All done." in done.stdout, said


@pytest.mark.parametrize("natively", [False, True])
def test_aider_edits_a_file(
    coder: Coder, native_coder: NativeCoder, tmp_path: pathlib.Path, natively: bool
) -> None:
    token = codex_token("alice") if natively else cp.demo_token("alice")
    coder = native_coder if natively else coder
    words = [
        "--model",
        "openai/gpt-4o",
        "--edit-format",
        "diff",
        "--yes-always",
        "--no-git",
        "--no-check-update",
    ]
    words += [
        "--no-show-model-warnings",
        "--no-pretty",
        "--no-analytics",
        "--no-suggest-shell-commands",
        "hello.txt",
    ]
    env = {"OPENAI_API_BASE": "{url}/v1", "OPENAI_API_KEY": KEY, "LITELLM_LOCAL_MODEL_COST_MAP": "True"}
    proxy = Proxy(tmp_path / "data", coder.url, [token])
    try:
        for message, text in (("Create hello.txt.", OLD), ("Now change it.", NEW)):
            agent = Agent("aider", ["--message", message, *words], env)
            done = at_work(agent, proxy.url, tmp_path / "home", tmp_path / "work")
            assert (tmp_path / "work" / "hello.txt").read_text().strip() == text, done.stdout + done.stderr
    finally:
        proxy.close()


def test_a_program_with_ollamas_package_does_its_work(coder: Coder, tmp_path: pathlib.Path) -> None:
    coder.folder = tmp_path

    def write_file(path: str, content: str) -> str:
        return str(pathlib.Path(path).write_text(content))

    def read_file(path: str) -> str:
        return pathlib.Path(path).read_text()

    def edit(path: str, old_string: str, new_string: str) -> str:
        return write_file(path, read_file(path).replace(old_string, new_string))

    def bash(command: str) -> str:
        return subprocess.run(["bash", "-c", command], cwd=tmp_path, capture_output=True, text=True).stdout

    tools = {one.__name__: one for one in (write_file, read_file, edit, bash)}
    proxy = Proxy(tmp_path / "data", coder.url, [cp.demo_token("alice")])
    said: list[Any] = [{"role": "user", "content": TASK}]
    try:
        for streams in itertools.cycle((False, True)):
            if streams:
                parts = [
                    one.message
                    for one in llama(proxy).chat("gpt-4o", said, tools=list(tools.values()), stream=True)
                ]
                calls = [call for part in parts for call in part.tool_calls or ()]
                text = "".join(part.content or "" for part in parts)
            else:
                message = llama(proxy).chat("gpt-4o", messages=said, tools=list(tools.values())).message
                calls, text = list(message.tool_calls or ()), message.content or ""
            said.append({"role": "assistant", "content": text, "tool_calls": calls})
            if not calls:
                break
            for call in calls:
                output = tools[call.function.name](**call.function.arguments)
                said.append({"role": "tool", "tool_name": call.function.name, "content": output})
    finally:
        proxy.close()
    assert (tmp_path / "hello.txt").read_text().strip() == NEW and text == "All done." and coder.made == 5


FIELD_NAMES = sorted(
    {*cp.CHAT_FIELDS, *cp.RESPONSE_FIELDS, *cp.IMAGE_FIELDS, *cp.SPEECH_FIELDS}
    | {"input", "stop", "tool_choice", "voice"}
)
ODD_VALUES: list[Any] = [
    "\ud800",
    None,
    True,
    5,
    0.5,
    "",
    "x",
    [],
    ["x"],
    [{}],
    {},
    {"type": 5},
    {"type": "function", "function": 5},
    [[]],
    {"a": {"b": None}},
]


@given(
    st.sampled_from(["/v1/chat/completions", "/v1/responses", "/v1/images/generations", "/v1/audio/speech"]),
    st.dictionaries(st.sampled_from(FIELD_NAMES), st.sampled_from(ODD_VALUES) | JSON_VALUES, max_size=3),
)
@hypothesis_settings(max_examples=300)
def test_no_body_of_any_shape_is_our_fault(fuzzed: Proxy, path: str, changes: dict[str, Any]) -> None:
    asked = {
        "model": "gpt-4o",
        "messages": [{"role": "user", "content": "x"}],
        "input": "x",
        "prompt": "x",
    } | changes
    if path == "/v1/responses" and "prompt" not in changes:
        del asked["prompt"]  # which alone is refused there
    answer = httpx.post(f"{fuzzed.url}{path}", content=json.dumps(asked), headers={"Authorization": KEY})
    assert answer.status_code != 500, answer.text


# --- images and speech -----------------------------------------------------------------------------------------------


def plain_answer(weather: Weather) -> Fault:
    return lambda request: cp.streamed(weather.frames(weather.say(request.json(), ["No."])))


def test_images_are_drawn_side_by_side(proxy: Proxy, weather: Weather) -> None:
    weather.obeys, together = True, threading.Barrier(4, timeout=10)

    def wait(request: cp.Request) -> None:
        together.wait()

    weather.add("/conversation", *[wait] * 4)
    drawn = proxy.client().images.generate(
        model="dall-e-3", prompt="a cat", n=4, size="1792x1024", quality="hd"
    )
    assert drawn.data and len({image.url for image in drawn.data}) == 4
    assert httpx.get(str(drawn.data[0].url)).content == cp.demo_image().read()
    assert weather.asked()["system_hints"] == ["picture_v2"] and weather.asked()["model"] == "auto"
    assert all(word in weather.told() for word in ("a cat", "1792x1024", "hd"))
    weather.add("/conversation", plain_answer(weather))  # one turn draws nothing
    again = proxy.client().images.generate(prompt="a cat", n=2)
    assert again.data and len(again.data) == 2
    inline = proxy.client().images.generate(model="gpt-image-1", prompt="a cat")
    assert inline.data and base64.b64decode(inline.data[0].b64_json or "") == cp.demo_image().read()


def test_an_image_is_drawn_from_others(proxy: Proxy, weather: Weather) -> None:
    weather.obeys = True
    drawn = proxy.client().images.edit(
        model="dall-e-2",
        prompt="a hat",
        image=[("a.png", picture(5, 5)), ("b.png", picture(6, 6))],
        mask=("m.png", picture(7, 7)),
    )
    assert drawn.data and drawn.data[0].url
    parts = weather.asked()["messages"][0]["content"]["parts"]
    assert (
        [part["width"] for part in parts[:-1]] == [5, 6, 7] and "mask" in parts[-1] and "a hat" in parts[-1]
    )


def test_an_answer_without_an_image_is_an_error(start: Callable[..., Proxy], weather: Weather) -> None:
    with pytest.raises(openai.InternalServerError) as refused:
        start("alice").client().images.generate(prompt="a cat", n=2)
    assert refused.value.status_code == 502 and "without an image" in refused.value.message


def test_a_client_that_leaves_ends_all_its_drawings(start: Callable[..., Proxy], weather: Weather) -> None:
    proxy = start("alice")
    weather.add("/conversation", *[weather.silence()] * 3)
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(
            f"{proxy.url}/v1/images/generations",
            json={"prompt": "a cat", "n": 3},
            headers={"Authorization": KEY},
            timeout=1,
        )
    wait_until(lambda: len(weather.left) == 3)


def untyped(proxy: Proxy) -> Any:
    """The client for calls that are wrong on purpose."""
    return proxy.client()


def test_text_is_read_aloud(proxy: Proxy, weather: Weather) -> None:
    weather.obeys, client = True, untyped(proxy)
    with client.audio.speech.with_streaming_response.create(
        model="tts-1", voice="nova", input="Read: this, please!"
    ) as answer:
        assert answer.headers["content-type"] == "audio/mpeg" and answer.read().startswith(b"\xff\xfb")
    query = weather.last("/synthesize").query
    assert (
        query["voice"] == "maple"
        and query["format"] == "mp3"
        and query["message_id"]
        and query["conversation_id"]
    )
    assert weather.asked()["messages"][-1]["content"]["parts"] == ["Read: this, please!"]
    assert (
        client.audio.speech.create(model="tts-1", voice="cove", input="x", response_format="wav").read()[:4]
        == b"RIFF"
    )
    for options in (
        {"response_format": "pcm"},
        {"response_format": "flac"},
        {"voice": "darth"},
        {"input": ""},
        {"input": "x" * 4097},
    ):
        with pytest.raises(openai.BadRequestError):
            client.audio.speech.create(**({"model": "tts-1", "voice": "alloy", "input": "x"} | options))
    weather.obeys = False
    weather.turns.extend([["Sure! Hello"], ["“Hello.”"]])
    client.audio.speech.create(model="tts-1", voice="alloy", input="Hello")  # at the second attempt
    with pytest.raises(openai.InternalServerError, match="word for word"):
        client.audio.speech.create(model="tts-1", voice="alloy", input="Goodbye")


def test_speech_is_written_down(proxy: Proxy, weather: Weather) -> None:
    weather.obeys, client = True, untyped(proxy)
    sound = ("a.mp3", b"sound" * 100_000, "audio/mpeg")
    heard = "The demo upstream heard 500000 bytes of a.mp3."
    assert client.audio.transcriptions.create(model="whisper-1", file=sound, language="en").text == heard
    form = cp.parse_form(weather.last("/transcribe").headers, weather.last("/transcribe").body)
    assert form["language"][0].text() == "en" and form["file"][0].content_type == "audio/mpeg"
    assert (
        client.audio.transcriptions.create(model="whisper-1", file=sound, response_format="text").strip()
        == heard
    )
    verbose = client.audio.transcriptions.create(
        model="whisper-1", file=sound, response_format="verbose_json", language="en"
    )
    assert verbose.text == heard and verbose.language == "en"
    translated = client.audio.translations.create(model="whisper-1", file=sound)
    assert translated.text == heard and "into English" in weather.told()
    for options in ({"response_format": "srt"}, {"file": ("a.mp3", b"")}, {"language": "?"}):
        with pytest.raises(openai.BadRequestError):
            client.audio.transcriptions.create(**({"model": "whisper-1", "file": sound} | options))


def test_login_free_accounts_neither_draw_nor_speak(start: Callable[..., Proxy], weather: Weather) -> None:
    weather.obeys = True
    client = untyped(start(cp.LOGIN_FREE, "alice"))
    for _ in range(4):
        client.images.generate(prompt="a cat")
        client.audio.speech.create(model="tts-1", voice="alloy", input="x")
    assert not any("backend-anon" in call for call in weather.calls)
    with pytest.raises(openai.BadRequestError) as refused:
        untyped(start(cp.LOGIN_FREE, folder="free")).images.generate(prompt="a cat")
    assert refused.value.code == "login_required"


def test_what_the_upstream_has_not_is_said(proxy: Proxy) -> None:
    for path in ("/v1/embeddings", "/v1/moderations", "/v1/images/variations", "/v1/fine_tuning/jobs"):
        refused = httpx.request(
            ("POST", "GET")["tun" in path], f"{proxy.url}{path}", headers={"Authorization": KEY}
        )
        assert error_of(refused) == (404, "not_found") and "web upstream has no" in refused.text
    assert error_of(httpx.post(f"{proxy.url}/v1/embeddings"))[0] == 401


# --- clients ---------------------------------------------------------------------------------------------------------


def test_the_openai_client_is_served(proxy: Proxy) -> None:
    client = proxy.client()
    answer = client.chat.completions.create(model="gpt-4o", messages=[{"role": "user", "content": "hi"}])
    assert (
        answer.choices[0].message.content == "Hello wide world."
        and answer.usage
        and answer.usage.total_tokens
    )
    with client.chat.completions.stream(
        model="gpt-4o", messages=[{"role": "user", "content": "hi"}]
    ) as stream:
        assert stream.get_final_completion().choices[0].message.content == "Hello wide world."
    with pytest.raises(openai.BadRequestError) as refused:
        client.chat.completions.create(model="gpt-4o", messages=[{"role": "user", "content": "hi"}], n=3)
    assert refused.value.param == "n" and refused.value.request_id
    with pytest.raises(openai.AuthenticationError):
        client.with_options(api_key="wrong").chat.completions.create(
            model="x", messages=[{"role": "user", "content": "x"}]
        )
    with pytest.raises(openai.NotFoundError):
        client.embeddings.create(model="x", input="x")


def test_the_async_openai_client_is_served(proxy: Proxy) -> None:
    async def ask() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{proxy.url}/v1", api_key=KEY, max_retries=0) as client:
            whole = await client.chat.completions.create(
                model="gpt-4o", messages=[{"role": "user", "content": "hi"}]
            )
            text = ""
            stream = await client.chat.completions.create(
                model="gpt-4o", messages=[{"role": "user", "content": "hi"}], stream=True
            )
            async for chunk in stream:
                text += chunk.choices[0].delta.content or ""
            return [str(whole.choices[0].message.content), text]

    assert asyncio.run(ask()) == ["Hello wide world."] * 2


def test_an_error_in_the_middle_of_a_stream_reaches_the_openai_client(
    start: Callable[..., Proxy], weather: Weather
) -> None:
    proxy = start("alice")
    half = list(weather.say({"model": "gpt-4o"}, [" a", " b", " c"]))[:5]
    weather.add("/conversation", cut_stream(*half))
    stream = proxy.client().chat.completions.create(
        model="gpt-4o", messages=[{"role": "user", "content": "hi"}], stream=True
    )
    with pytest.raises(openai.APIError, match="broke off"):
        for _ in stream:
            pass


def test_a_client_that_leaves_a_stream_does_not_disturb_the_next(proxy: Proxy, weather: Weather) -> None:
    weather.words, weather.pace = [" word"] * 500, 0.01
    stream = proxy.client().chat.completions.create(
        model="gpt-4o", messages=[{"role": "user", "content": "hi"}], stream=True
    )
    next(iter(stream))
    stream.close()
    weather.words = ["Next"]
    assert proxy.say() == "Next"


def test_300_streams_at_once(proxy: Proxy, weather: Weather) -> None:
    weather.words, weather.pace = [f" w{i}" for i in range(20)], 0.05
    body = json.dumps({"model": "gpt-4o", "stream": True, "messages": [{"role": "user", "content": "hi"}]})
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nAuthorization: {KEY}\r\nConnection: close\r\n"
    wire = f"{head}Content-Length: {len(body)}\r\n\r\n{body}".encode()

    async def one() -> bytes:
        reader, writer = await asyncio.open_connection(*proxy.address)
        writer.write(wire)
        got = await reader.read(-1)
        writer.close()
        return got

    async def everyone() -> list[bytes]:
        return await asyncio.gather(*[one() for _ in range(300)])

    for got in asyncio.run(everyone()):
        assert got.count(b'"content":" w') == 20 and b"[DONE]" in got
    wait_until(lambda: "chatproxy_streams_open 0" in httpx.get(f"{proxy.url}/metrics").text)


# --- the WebSocket ---------------------------------------------------------------------------------------------------

MOST = 1_000_000
SAMPLE = "dGhlIHNhbXBsZSBub25jZQ=="  # the RFC's
GREETING = {"Host": "x", "Upgrade": "websocket", "Connection": "Upgrade", "Sec-WebSocket-Key": SAMPLE}


def greeting(change: dict[str, str] | None = None, first: str = "GET /web HTTP/1.1") -> bytes:
    """A handshake, or what is wrong about one."""
    given = GREETING | {"Sec-WebSocket-Version": "13"} | (change or {})
    return "\r\n".join([first, *(f"{name}: {text}" for name, text in given.items()), "", ""]).encode()


def masked(first: int, payload: bytes, mask: bytes = b"\x81\x02\xf3\x04") -> bytes:
    """A client's frame."""
    size = len(payload)
    long = b"\xfe" + size.to_bytes(2, "big") if size < 65536 else b"\xff" + size.to_bytes(8, "big")
    start = bytes([first]) + (bytes([0x80 | size]) if size < 126 else long) + mask
    return start + bytes(b ^ mask[i & 3] for i, b in enumerate(payload))


def closing(code: int, reason: bytes = b"") -> bytes:
    return masked(0x88, code.to_bytes(2, "big") + reason)


class Peer:
    """A client that says what it likes."""

    def __init__(self, sock: socket.socket) -> None:
        sock.settimeout(20)
        self.sock, self.send, self.read = sock, sock.sendall, sock.makefile("rb").read

    def frame(self) -> tuple[int, bytes]:
        """A frame's first byte and payload, its length checked to be in the shortest form; 0 at the end."""
        with contextlib.suppress(ConnectionResetError):
            if start := self.read(2):
                width = {126: 2, 127: 8}.get(start[1], 0)
                size = int.from_bytes(self.read(width), "big") if width else start[1]
                assert start[1] < 128 and size >= {0: 0, 2: 126, 8: 65536}[width]  # and no mask
                return start[0], self.read(size)
        return 0, b""

    def ended(self) -> int:
        """The code of the Close that comes next, after which there is nothing."""
        first, payload = self.frame()
        assert first == 0x88 and self.frame() == (0, b"")
        return int.from_bytes(payload[:2], "big")


def echo(it: cp.WebSocket) -> None:
    """Says what it hears, but for "ping" and "close 4999 why"."""
    while (text := it.receive()) is not None:
        if text.startswith("close "):
            it.close(int(text[6:10]), text[11:])
        elif text == "ping":
            it.ping(b"are you there")
        else:
            it.send(text)


class Site(cp.Application):
    """A server whose /web is a WebSocket; `end` is how one ended, None or what was raised."""

    def __init__(self, folder: pathlib.Path | None = None) -> None:
        """Given a folder for its certificate it speaks TLS."""
        self.has, self.ends, self.open = echo, queue.Queue[Any](), queue.Queue[cp.WebSocket]()
        self.end, self.trust = functools.partial(self.ends.get, timeout=20), None
        settings = cp.resolve(cp.gather({}, {}))
        if folder:
            self.authority, self.trust = trustme.CA(), ssl.create_default_context()
            self.authority.configure_trust(self.trust)
            issued, path = self.authority.issue_cert("127.0.0.1"), str(folder / "both.pem")
            issued.private_key_and_cert_chain_pem.write_to_path(path)
            settings = dataclasses.replace(settings, tls_cert=path, tls_key=path)
        self.server = cp.Server(("127.0.0.1", 0), self, settings, cp.Metrics(), quiet=True)
        self.address = ("127.0.0.1", self.server.server_port)
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()

    def respond(self, request: cp.Request) -> cp.Reply | cp.Upgrade:
        site = request.path == "/web"
        return cp.Upgrade(cp.handshake(request), self.serve) if site else cp.Reply(200, b"plain")

    def serve(self, it: cp.WebSocket) -> None:
        self.open.put(it)
        try:
            self.has(it)
            self.ends.put(None)
        except Exception as end:
            self.ends.put(end)
            raise

    def peer(self, after: bytes = b"") -> Peer:
        """A client past its handshake, with which it sends `after` in one write."""
        sock = socket.create_connection(self.address, timeout=20)
        peer = Peer(self.trust.wrap_socket(sock, server_hostname="127.0.0.1") if self.trust else sock)
        offered = {"Sec-WebSocket-Extensions": "permessage-deflate", "Sec-WebSocket-Protocol": "chat"}
        words = {"Upgrade": "h2c, WebSocket", "Connection": "keep-alive ,\tUPGRADE"}
        peer.send(HEALTH + greeting(words | offered) + after)  # and another request before it
        data = b""
        while not data.endswith(b"\r\n\r\n") or b" 101 " not in data:
            assert (more := peer.read(1)), data
            data += more
        assert data.startswith(b"HTTP/1.1 200 ") and b"plainHTTP/1.1 101 Switching Protocols\r\n" in data
        assert b"\r\nSec-WebSocket-Accept: s3pPLMBiTxaQ9kYGzzhZRbK+xOo=\r\n" in data  # as in the RFC
        assert b"Sec-WebSocket-Ext" not in data and b"Sec-WebSocket-Prot" not in data
        return peer

    def client(self, **options: Any) -> websockets.sync.client.ClientConnection:
        url = f"ws{'s' * bool(self.trust)}://127.0.0.1:{self.address[1]}/web"
        # The library reads and writes at once, which OpenSSL survives only while nothing but data comes: no tickets.
        context = self.trust and ssl.create_default_context()
        if context:
            self.authority.configure_trust(context)
            context.maximum_version = ssl.TLSVersion.TLSv1_2
        return websockets.sync.client.connect(url, ssl=context, proxy=None, max_size=None, **options)


@pytest.fixture
def site(request: pytest.FixtureRequest, tmp_path: pathlib.Path) -> Iterator[Site]:
    served = Site(tmp_path if getattr(request, "param", "") else None)
    yield served
    served.server.drain(0)
    served.loop.close()


plain_and_secure = pytest.mark.parametrize("site", ["", "TLS"], indirect=True)


@contextlib.contextmanager
def pair(ahead: bytes = b"", buffer: int = 200_000, **limits: Any) -> Iterator[tuple[cp.WebSocket, Peer]]:
    """A WebSocket with limits of its own and its client, without a server."""
    ours, theirs = socket.socketpair()
    ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, buffer)
    with ours, theirs:
        it = cp.WebSocket(ours, LOOP, ahead, **limits)
        try:
            yield it, Peer(theirs)
        finally:
            it.leave("the test is over")
            LOOP.run(int)


@contextlib.contextmanager
def aside(do: Callable[..., Any], *given: Any) -> Iterator[None]:
    """Something done meanwhile, until it is done or its connection is lost."""

    def act() -> None:
        with contextlib.suppress(OSError, cp.Closed):
            do(*given)

    thread = threading.Thread(target=act)
    thread.start()
    yield
    thread.join(20)
    assert not thread.is_alive()


def took(do: Callable[..., Any], *given: Any) -> tuple[int, float]:
    """The code that something ends with, and the seconds until then."""
    start = time.monotonic()
    with pytest.raises(cp.Closed) as closed:
        do(*given)
    return closed.value.code, time.monotonic() - start


REFUSED = {
    "Upgrade": ["", "h2c", "websockets"],
    "Connection": ["", "keep-alive", "Upgraded"],
    "Sec-WebSocket-Key": [
        "",
        SAMPLE[4:],
        "AAAA" + SAMPLE,
        "!" + SAMPLE[1:],
        f"{SAMPLE}, {SAMPLE}",
        "A" * 23 + "=",
    ],
    "Sec-WebSocket-Version": ["", "8", "13, 13"],
}


@pytest.mark.parametrize(("name", "value"), [(name, value) for name in REFUSED for value in REFUSED[name]])
def test_a_malformed_handshake_is_refused_and_the_next_request_answered(
    site: Site, name: str, value: str
) -> None:
    got, version = talk(site.address, greeting({name: value}) + LAST), "Version" in name
    assert re.findall(rb"HTTP/1\.1 (\d+)", got) == [b"426" if version else b"400", b"200"]
    assert (b"\r\nSec-WebSocket-Version: 13\r\n" in got) == version and got.endswith(b"plain")


@pytest.mark.parametrize("first", ["GET /web HTTP/1.0", "POST /web HTTP/1.1", "HEAD /web HTTP/1.1"])
def test_a_websocket_begins_with_a_get_of_http_1_1(site: Site, first: str) -> None:
    got = talk(site.address, greeting(first=first) + masked(0x81, b"early"))
    assert got.startswith(b"HTTP/1.1 400 ") and got.count(b"HTTP/1.1 ") == 1 and site.open.empty()


@plain_and_secure
@pytest.mark.parametrize(("compression", "code"), [("deflate", 1014), (None, 4999)])
def test_a_library_finds_nothing_to_complain_of(site: Site, compression: str | None, code: int) -> None:
    with site.client(compression=compression) as client:
        for size in (0, 1, 125, 126, 127, 65535, 65536, MOST):
            for text in ("x" * size, "".join(random.choices("abcäß€😀", k=size // 4))):
                client.send(text)
                assert client.recv(timeout=20) == text
        assert client.ping("one").wait(20)
        client.send("ping")  # the server's, which the client answers by itself
        client.send(iter(["ein ", "", "Stück ", "nach dem ", "anderen"]))
        assert client.recv(timeout=20) == "ein Stück nach dem anderen"
        client.send(f"close {code} grüß dich")
        with pytest.raises(websockets.exceptions.ConnectionClosed):
            client.recv(timeout=20)
        assert (client.close_code, client.close_reason) == (code, "grüß dich") and site.end() is None
    with site.client(compression=compression) as client:
        client.close(code, "bye")
        assert client.close_code == code and site.end() is None


def test_what_does_not_fit_is_cut_and_no_second_close_is_sent() -> None:
    with pair() as (it, peer):
        it.send("a\ud800b")
        it.ping(b"x" * 200)
        it.close(1000, "a" + "€" * 50)
        it.close(1001, "again")
        assert took(it.send, "too late")[0] == 1000 and it.drop("test").code == 1006
        assert [peer.frame(), peer.frame()] == [(0x81, b"a?b"), (0x89, b"x" * 125)]
        assert [peer.frame(), peer.frame()] == [(0x88, b"\x03\xe8a" + "€".encode() * 40), (0, b"")]
        for code in (0, 999, 1004, 1005, 1006, 1015, 2999, 5000, 65536):
            pytest.raises(ValueError, it.close, code)


@plain_and_secure
def test_many_writers_and_a_reader_share_a_connection(site: Site) -> None:
    def write(send: Callable[[str], None], name: str, most: int = 300_000) -> None:
        for count in range(40):
            send(f"{name} {count} " + "x" * random.choice((0, 100, most)))

    def busy(it: cp.WebSocket) -> None:
        with aside(write, it.send, "a"), aside(write, it.send, "b"), aside(write, it.send, "c"):
            echo(it)

    site.has, seen = (
        busy,
        defaultdict(list),
    )  # the client does not read while its own send waits: it says little
    with site.client(compression=None, max_queue=None) as client, aside(write, client.send, "echo", 1000):
        for _ in range(160):
            name, count, _ = str(client.recv(timeout=20)).split(" ", 2)
            seen[name].append(int(count))
    assert len(seen) == 4 and all(counts == list(range(40)) for counts in seen.values())


FRAMING: list[tuple[int, list[bytes]]] = [
    (1002, [b"\x81\x02hi", b"\x89\x00"]),  # no mask
    (1002, [masked(first, b"") for first in (0xC1, 0xA1, 0x91, 0xC9)]),  # reserved bits
    (1002, [masked(0x80 | code, b"") for code in (3, 4, 5, 6, 7, 11, 12, 13, 14, 15)]),  # and opcodes
    (1002, [masked(0x09, b""), masked(0x08, b"\x03\xe8")]),  # control frames that go on
    (1002, [masked(0x89, b"x" * 126), masked(0x88, b"\x03\xe8" + b"x" * 124)]),  # or are too long
    (1002, [masked(0x80, b""), masked(1, b"") + masked(0, b"") + masked(0x8A, b"") + masked(1, b"b")]),
    (1002, [masked(0x01, b"a") + masked(first, b"b") for first in (0x81, 0x01, 0x82)]),  # out of order
    (
        1002,
        [b"\x81" + bytes.fromhex(size) for size in ("fe007d", "ff000000000000ffff", "ff8000000000000000")],
    ),
    (1002, [masked(0x88, b"\x03"), *map(closing, (0, 999, 1004, 1005, 1006, 1015, 2999, 5000, 65535))]),
    (1003, [masked(0x82, b"hi"), masked(0x02, b"hi")]),  # binary
    (1007, [masked(0x81, text) for text in (b"\xff", b"\xed\xa0\x80", b"\xf0\x9f\x98", b"\xf4\x90\x80\x80")]),
    (1007, [masked(1, b"\xf0\x9f") + masked(0x80, b"A"), masked(1, b"a") + masked(0x80, b"\xe2\x82")]),
    (1007, [masked(1, b"ok \xff"), closing(1000, b"\xe2\x82")]),  # a message that goes on
    (1009, [b"\x81" + bytes.fromhex(size) for size in ("ff00000000000f4241", "ff7fffffffffffffff")]),
    (1009, [masked(1, b"x" * (MOST - 10)) + masked(0, b"x" * 10) + masked(0, b"") + masked(0, b"x")[:6]]),
]


@pytest.mark.parametrize(("code", "data"), [(code, data) for code, faults in FRAMING for data in faults])
def test_a_fault_of_the_client_ends_the_connection_with_its_code(site: Site, code: int, data: bytes) -> None:
    assert site.peer(data).ended() == code
    end = site.end()
    assert isinstance(end, cp.Closed) and end.code == code and end.reason


def test_a_message_of_exactly_the_limit_passes_and_the_count_begins_anew() -> None:
    with pair(most=300) as (it, peer):
        parts = masked(0x01, b"y" * 200) + masked(0x89, b"p" * 125) + masked(0x80, b"y" * 100)
        peer.send((masked(0x81, b"x" * 300) + parts) * 2 + masked(0x81, b"x" * 301))
        assert [it.receive() for _ in range(4)] == ["x" * 300, "y" * 300] * 2 and took(it.receive)[0] == 1009


@plain_and_secure
def test_frames_may_come_with_the_handshake_and_control_frames_and_characters_lie_across(site: Site) -> None:
    word = "grün".encode()
    peer = site.peer(masked(0x81, b"early") + masked(0x01, word[:3]) + masked(0x89, b"between")[:5])
    assert peer.frame() == (0x81, b"early")
    peer.send(masked(0x89, b"between")[5:] + masked(0x8A, b"unasked"))
    assert peer.frame() == (0x8A, b"between")  # at once
    peer.send(masked(0x00, word[3:4]) + masked(0x89, b"") + masked(0x80, word[4:]) + closing(1000))
    assert peer.frame() == (0x8A, b"") and peer.frame() == (0x81, word) and peer.ended() == 1000


@pytest.mark.parametrize("payload", [b"", b"\x03\xe8", b"\x0f\xa0" + "tschüß".encode()])
def test_a_close_is_answered_once_and_then_nothing_is_read_or_sent(site: Site, payload: bytes) -> None:
    peer = site.peer(masked(0x88, payload) + masked(0x88, payload) + masked(0x81, b"late"))
    assert peer.frame() == (0x88, payload[:2]) and peer.frame() == (0, b"")
    assert site.end() is None and (it := site.open.get()).receive() is None
    assert took(it.send, "x")[0] == (int.from_bytes(payload[:2], "big") or 1005)
    peer = site.peer(masked(0x81, b"close 4001 enough"))
    assert peer.frame() == (0x88, b"\x0f\xa1enough")
    peer.send(masked(0x81, b"late") + masked(0x89, b"") + masked(0x01, b"l") + masked(0x80, b"ater"))
    peer.send(closing(4001))
    assert peer.frame() == (0, b"") and site.end() is None  # neither echo nor pong nor a second Close


@plain_and_secure
def test_a_client_that_hangs_up_gives_1006_and_drop_wakes_the_reader(site: Site) -> None:
    for last in (b"", masked(0x01, b"half"), masked(0x81, b"half")[:-1]):
        site.peer(last).sock.shutdown(socket.SHUT_RDWR)
        assert site.end().code == 1006 and site.open.get()
    peer, it = site.peer(), site.open.get(timeout=20)
    it.drop("enough")
    assert took(it.receive)[0] == took(it.ping)[0] == 1006 and site.end().reason == "enough"
    peer.sock.shutdown(socket.SHUT_RDWR)
    wait_until(lambda: site.server.connections() == 0)


def test_a_fault_of_ours_is_told_with_1011_and_nothing_is_sent_after_the_end(site: Site) -> None:
    site.has = lambda it: [][len(it.receive() or "")]
    assert site.peer(masked(0x81, b"x")).ended() == 1011 and isinstance(site.end(), IndexError)
    site.has, it = lambda it: None, site.open.get()
    assert site.peer().frame() == (0, b"") and took(it.send, "x")[0] == 1006
    wait_until(lambda: site.server.connections() == 0)
    assert took(site.open.get().send, "x")[0] == 1006


@plain_and_secure
def test_draining_tells_open_websockets_1001_at_once(site: Site) -> None:
    peers = [site.peer() for _ in range(5)]
    with site.client() as client:
        start = time.monotonic()
        site.server.drain(10)
        assert time.monotonic() - start < 2 and site.server.connections() == 0
        with pytest.raises(websockets.exceptions.ConnectionClosed):
            client.recv(timeout=20)
        assert client.close_code == 1001
    assert all(peer.frame()[1][:2] == b"\x03\xe9" for peer in peers)
    assert all(end is None or end.code == 1006 for end in (site.end() for _ in range(6)))


def test_a_silent_client_is_pinged_then_dropped_in_time() -> None:
    with pair(idle=0.4, patience=0.6) as (it, peer), aside(it.receive):
        start = time.monotonic()
        assert peer.frame() == (0x89, b"") and 0.35 < time.monotonic() - start < 0.7
        assert peer.frame() == (0, b"") and 0.95 < time.monotonic() - start < 1.5


def test_any_byte_is_a_sign_of_life_and_a_reader_that_was_away_blames_nobody() -> None:
    with pair(masked(0x81, b"one") + masked(0x81, b"two"), idle=0.1, patience=0.25) as (it, peer):
        assert it.receive() == "one"
        time.sleep(0.5)  # while the second one waits
        assert it.receive() == "two"
        with aside(echo, it):
            for byte in masked(0x8A, b"") + masked(0x81, b"hi"):  # a pong, and a message, byte by byte
                assert peer.frame() == (0x89, b"")
                peer.send(bytes([byte]))
            assert peer.frame() == (0x81, b"hi")
            peer.sock.shutdown(socket.SHUT_RDWR)


def test_an_idle_connection_does_not_wake_its_thread_and_chatter_stretches_nothing() -> None:
    def chatter(frame: bytes) -> None:
        while True:
            peer.send(frame)
            time.sleep(0.02)

    def switches() -> int:
        return resource.getrusage(resource.RUSAGE_THREAD).ru_nvcsw

    with pair() as (it, peer):
        before, (code, seconds) = switches(), took(it.receive, time.monotonic() + 0.5)
        assert code == 1008 and 0.45 < seconds < 1 and switches() - before <= 10
    with pair() as (it, peer), aside(chatter, masked(0x8A, b"")):
        code, seconds = took(it.receive, time.monotonic() + 0.3)
        assert code == 1008 and 0.25 < seconds < 1 and peer.frame()[1][:2] == b"\x03\xf0"
        it.drop("the end")
    with pair(patience=0.3) as (it, peer), aside(chatter, masked(0x81, b"never mind")):
        it.close(1001)
        code, seconds = took(it.receive)
        assert code == 1006 and 0.25 < seconds < 1


@pytest.mark.parametrize("sips", [True, False])
def test_a_client_that_hardly_reads_holds_neither_senders_nor_the_reader(sips: bool) -> None:
    def sip() -> None:
        while sips and peer.sock.recv(1000):
            time.sleep(0.01)

    with pair(buffer=4096, send_timeout=0.5) as (it, peer), aside(sip):
        for _ in range(3):
            it.send("x" * 300_000)  # nobody waits for that
        code, seconds = took(it.receive)
        assert code == 1006 and seconds < 1.2 and took(it.send, "x")[0] == 1006


def test_no_two_threads_are_inside_the_socket_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    inside, crowds = threading.Semaphore(2), []

    def slowly(call: Callable[..., Any], given: Any) -> Any:
        with inside:  # which TLS could not bear; it is slow, so that another would come
            time.sleep(0.001)
            crowds.append(inside._value)
            return call(given)

    with pair() as (it, peer):
        given = {name: functools.partial(slowly, getattr(it._sock, name)) for name in ("send", "recv")}
        monkeypatch.setattr(it, "_sock", argparse.Namespace(**given))
        peer.send(masked(0x81, b"y") * 100)
        with aside(list, map(it.ping, [b""] * 100)):
            assert [it.receive() for _ in range(100)] == ["y"] * 100
    assert set(crowds) == {1}


def test_neither_pings_nor_fragments_nor_what_was_read_take_memory() -> None:
    pings, big = masked(0x89, b"x" * 125) * 100, masked(0x81, b"x" * 500_000)
    bits = masked(0, b"\xc3") + masked(0, b"") * 10 + masked(0, b"\xa9")
    parts = masked(0x01, b"") + bits * 3000 + masked(0x80, b"")
    with contextlib.ExitStack() as stack:
        stack.enter_context(pair())  # what the first of them imports and caches
        stack.callback(tracemalloc.stop)
        tracemalloc.start()
        pairs = [stack.enter_context(pair(send_timeout=0.5)) for _ in range(5)]
        for it, peer in pairs:
            with aside(peer.send, big):
                assert len(it.receive() or "") == 500_000
        LOOP.run(int)  # which lets go of what it has read
        assert (at_rest := tracemalloc.get_traced_memory()[0]) < 5 * 16_000  # of which most is the test's
        tracemalloc.reset_peak()
        with aside(peer.send, parts):
            assert it.receive() == "é" * 3000
        with aside(list, map(peer.send, [pings] * 10_000)):
            assert took(it.receive)[0] == 1006
        assert tracemalloc.get_traced_memory()[1] - at_rest < 600_000


KINDS = st.sampled_from([0x81, 0x01, 0x00, 0x80, 0x88, 0x89, 0x8A]) | st.integers(0, 255)
FRAMES = st.builds(masked, KINDS, st.binary(max_size=140)) | st.builds(closing, st.integers(0, 65535))


@given(st.lists(st.binary(max_size=40) | FRAMES, max_size=8), st.integers(0, 60))
def test_random_frames_never_hang_or_raise_anything_but_closed(parts: list[bytes], split: int) -> None:
    data = b"".join(parts)
    with pair(data[:split], most=200) as (it, peer):
        peer.send(data[split:])
        peer.sock.shutdown(socket.SHUT_WR)
        start = time.monotonic()
        with contextlib.suppress(cp.Closed):
            while it.receive() is not None:
                pass
        assert took(it.send, "after the end") and time.monotonic() - start < 2


@given(st.data())
def test_a_message_arrives_the_same_in_any_fragments_and_any_pieces(data: st.DataObject) -> None:
    def cut(whole: bytes) -> list[bytes]:
        cuts = sorted(data.draw(st.lists(st.integers(0, len(whole)), max_size=5)))
        return [whole[a:b] for a, b in zip([0, *cuts], [*cuts, len(whole)], strict=True)]

    texts, wire = data.draw(st.lists(st.text(max_size=200), min_size=1, max_size=3)), b""
    for text in texts:
        first, *pieces = cut(text.encode())
        wire += masked(0x01, first)
        for piece in pieces:
            wire += masked(0x00, piece, data.draw(st.binary(min_size=4, max_size=4)))
            wire += masked(data.draw(st.sampled_from([0x89, 0x8A])), data.draw(st.binary(max_size=20)))
        wire += masked(0x80, b"")
    ahead, *later = cut(wire)
    with pair(ahead) as (it, peer), aside(list, map(peer.send, later)):
        assert [it.receive() for _ in texts] == texts


# --- one loop carries, threads decide -----------------------------------------------------------------------------------


def asking(
    proxy: Proxy | Served, text: str = "hi", trust: ssl.SSLContext | None = None, **body: Any
) -> socket.socket:
    """A connection that has asked for a stream, and reads next to nothing by itself."""
    port = urllib.parse.urlsplit(proxy.url).port
    sock = socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    sock.settimeout(60)
    sock.connect(("127.0.0.1", port))
    if trust:
        sock = trust.wrap_socket(sock, server_hostname="127.0.0.1")
    said = json.dumps(
        {"model": "gpt-4o", "messages": [{"role": "user", "content": text}], "stream": True} | body
    )
    head = f"POST {CHAT} HTTP/1.1\r\nHost: 127.0.0.1\r\nAuthorization: {KEY}\r\nContent-Length: {len(said)}\r\n\r\n"
    sock.sendall((head + said).encode())
    return sock


def read_on(sock: socket.socket, size: int = 1 << 20, pause: float = 0.0) -> bytes:
    """What comes until the end of a chunked answer."""
    data = b""
    while not data.endswith(b"\r\n0\r\n\r\n") and (more := sock.recv(size)):
        data += more
        time.sleep(pause)
    return data


def counted(weather: Weather, words: int, passed: list[int]) -> None:
    """The next answer has so many words of 1,000 characters; `passed` gets the number of those that were sent."""

    def say(request: cp.Request) -> cp.Stream:
        answer = weather.say(request.json(), ["x" * 1000] * words)

        def pieces() -> cp.Sent:
            for data in answer:
                passed.append(len(data))
                yield data, 1

        return cp.streamed(pieces())

    weather.add("/conversation", say)


def whole(data: bytes, words: int) -> bool:
    return data.count(b"x" * 1000) == words and b"data: [DONE]" in data


def test_every_kind_of_event_and_of_a_messages_part_has_its_place() -> None:
    events, parts = set(get_args(cp.Event)), set(get_args(cp.MessagePart))
    assert cp.Rendering.NOTES.keys() == events
    for rendering in (cp.CompletionStream, cp.ModelResponse, cp.Compaction, cp.ModelMessage, cp.OllamaAnswer):
        assert rendering.TAKES.keys() | {cp.Text, *cp.AS_TEXT} == events, rendering
    assert cp.IN_PROSE.keys() == cp.AS_ITEM.keys() | {cp.Text, cp.Attachment} == parts


def test_every_reason_of_a_refusal_has_its_remedies() -> None:
    assert set(cp.REMEDIES) == set(cp.Refusal.REASONS)
    remedies = {name for names in cp.REMEDIES.values() for name in names} - {cp.NEXT}
    assert remedies and all(
        callable(getattr(cp.Web, name, None) or getattr(cp.Codex, name)) for name in remedies
    )
    assert all(cp.NEXT not in names[:-1] for names in cp.REMEDIES.values())


def test_slow_readers_hold_up_nobody_and_get_everything(proxy: Proxy, weather: Weather) -> None:
    words = 2000
    for _ in range(4):
        counted(weather, words, [])
    slow = [asking(proxy) for _ in range(4)]
    wait_until(lambda: not weather.faults["/conversation"])
    with concurrent.futures.ThreadPoolExecutor(12) as pool:
        late = [pool.submit(read_on, sock, 16384, 0.005) for sock in slow]
        start = time.monotonic()
        assert list(pool.map(proxy.say, ["hi"] * 16)) == ["Hello wide world."] * 16
        fast = time.monotonic() - start
        assert not all(one.done() for one in late)
        assert all(whole(one.result(), words) for one in late)
    assert fast < 10
    for sock in slow:
        sock.close()


def test_thousands_of_events_may_come_at_once(start: Start) -> None:
    with standin() as upstream:
        proxy = start("alice", upstream=f"http://127.0.0.1:{upstream.port}")
        for how in ("", " flush=1"):
            assert proxy.say(f"words=16000{how}").count("lorem") == 16_000
            assert len(proxy.stream(messages=[{"role": "user", "content": f"words=16000{how}"}])[0]) > 16_000


def test_what_a_client_does_not_read_is_not_fetched(proxy: Proxy, weather: Weather) -> None:
    words, passed = 15_000, list[int]()
    counted(weather, words, passed)
    with asking(proxy) as sock:
        wait_until(lambda: passed)
        before = -1
        while before != len(passed):  # until nothing moves any more
            before = len(passed)
            time.sleep(0.5)
        assert before < words * 0.9  # 15 MB; what the kernel buffers on the way is its own
        writers = [one.client.writer for one in proxy.server._open.values() if one]
        held = [len(data) for writer in writers if writer for data in writer._unsent]
        assert 0 < sum(held) < 4 * cp.MAX_UNSENT
        assert whole(read_on(sock), words)


def test_a_client_that_stops_reading_for_20_seconds_gets_the_rest(proxy: Proxy, weather: Weather) -> None:
    words = 12_000
    counted(weather, words, [])
    with asking(proxy) as sock:
        first = sock.recv(4096)
        time.sleep(20)
        assert whole(first + read_on(sock), words)
    assert "chatproxy_streams_open 0" in httpx.get(f"{proxy.url}/metrics").text


def test_a_client_that_reads_nothing_at_all_is_left(
    proxy: Proxy, weather: Weather, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cp, "SEND_TIMEOUT", 1)
    passed = list[int]()
    counted(weather, 40_000, passed)
    with asking(proxy) as sock:
        assert sock.recv(100)
        wait_until(lambda: "chatproxy_streams_open 0" in httpx.get(f"{proxy.url}/metrics").text, 20)
        number = len(passed)
        time.sleep(0.5)
        assert len(passed) == number < 40_000  # and its answer is no longer fetched
    assert proxy.say() == "Hello wide world."


def test_a_client_that_hangs_up_ends_its_answer_at_once(
    start: Start, weather: Weather, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cp.Watch, "LOOK", 30.0)  # the request's thread would notice it much later
    proxy = start("alice", "bob")
    said = list(weather.say({"model": "gpt-4o"}, ["Hello", " there"]))
    for _ in range(2):
        weather.add("/conversation", weather.silence(b"".join(said[:-2])))
        sock = asking(proxy)
        assert sock.recv(100)
        wait_until(lambda: "chatproxy_streams_open 1" in httpx.get(f"{proxy.url}/metrics").text)
        sock.close()
        wait_until(lambda: "chatproxy_streams_open 0" in httpx.get(f"{proxy.url}/metrics").text, 5.0)


def test_tls_clients_are_carried_like_others(start: Start, weather: Weather, tmp_path: pathlib.Path) -> None:
    authority, certificate = certified(tmp_path)
    proxy = start("alice", **certificate)
    proxy.url = proxy.url.replace("http://", "https://")
    trust = ssl.create_default_context()
    authority.configure_trust(trust)
    words = 3000
    for _ in range(3):
        counted(weather, words, [])
    slow = [asking(proxy, trust=trust) for _ in range(3)]
    wait_until(lambda: not weather.faults["/conversation"])
    with concurrent.futures.ThreadPoolExecutor(16) as pool:
        late = [pool.submit(read_on, sock, 16384, 0.004) for sock in slow]
        fast = [pool.submit(read_on, asking(proxy, trust=trust)) for _ in range(12)]
        assert all(b"[DONE]" in one.result() for one in fast)
        assert all(whole(one.result(), words) for one in late)
    with httpx.Client(verify=trust, headers={"Authorization": KEY}) as client:  # the connection is used on
        body = {"model": "gpt-4o", "messages": [{"role": "user", "content": "x"}], "stream": True}
        for _ in range(3):
            assert "[DONE]" in client.post(f"{proxy.url}{CHAT}", json=body).text
            assert client.get(f"{proxy.url}/health").status_code == 200


def test_a_decision_in_mid_stream_is_made_while_the_loop_is_full(proxy: Proxy, weather: Weather) -> None:
    for _ in range(8):
        counted(weather, 5000, [])
    busy = [asking(proxy) for _ in range(8)]
    wait_until(lambda: not weather.faults["/conversation"])
    weather.words = ["See ", "[this](sandbox:/mnt/data/a.txt)", " and", " more."]
    weather.add("/interpreter/download", status(200, {"download_url": "https://files.example/a.txt"}))
    with concurrent.futures.ThreadPoolExecutor(9) as pool:
        carried = [pool.submit(read_on, sock) for sock in busy]
        chunks, _ = proxy.stream()
        assert text_of(chunks) == "See [this](https://files.example/a.txt) and more."
        assert all(whole(one.result(), 5000) for one in carried)


def test_connections_without_a_request_have_no_thread(proxy: Proxy, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cp.Workers, "LIFE", 0.5)
    before = threading.active_count()
    socks = [socket.create_connection(proxy.address) for _ in range(100)]
    for sock in socks:
        sock.sendall(HEALTH)
    assert all(sock.recv(65536).startswith(b"HTTP/1.1 200 ") for sock in socks)
    wait_until(
        lambda: (
            proxy.server.connections() >= 100
            and sum(one.busy for one in proxy.server._open.values() if one) == 0
        )
    )
    wait_until(lambda: threading.active_count() <= before + 8, 20)
    socks[0].sendall(HEALTH)
    assert socks[0].recv(65536).startswith(b"HTTP/1.1 200 ")
    for sock in socks:
        sock.close()
    wait_until(lambda: proxy.server.connections() == 0)


def test_an_idle_connection_is_closed_in_time(start: Start) -> None:
    proxy = start("alice", read_timeout="1")
    for first in (b"", HEALTH):
        with socket.create_connection(proxy.address, timeout=10) as sock:
            sock.sendall(first)
            begun, got = time.monotonic(), b""
            while more := sock.recv(65536):
                got += more
            assert 0.9 < time.monotonic() - begun < 4 and got.startswith(b"HTTP/1.1 200 ") == bool(first)


TRIED = "0.16.0 to 0.16.3"  # of curl_cffi


def test_the_versions_of_curl_cffi_that_may_be_installed_are_those_that_were_tried() -> None:
    bound, texts = (
        "curl_cffi>=0.16,<0.17",
        [(HERE / name).read_text() for name in ("Makefile", "README.md", "chatproxy.py")],
    )
    assert TRIED in texts[1] and [text.count(bound) for text in texts] == [1, 2, 2]
    assert not re.search(r"curl_cffi(?!>=0\.16,<0\.17)[<>=~]", "".join(texts))
    assert importlib.metadata.version("curl_cffi").split(".")[:2] == ["0", "16"]
    for name in (
        "curl_multi_socket_action",
        "curl_multi_setopt",
        "curl_easy_pause",
        "buffer_callback",
        "timer_function",
    ):
        assert hasattr(cp.lib, name)


def test_what_waits_or_takes_long_is_never_the_loops(
    start: Start, weather: Weather, monkeypatch: pytest.MonkeyPatch
) -> None:
    done_by: dict[str, set[str]] = defaultdict(set)

    def watched(owner: Any, name: str) -> None:
        real = getattr(owner, name)

        def called(*given: Any, **named: Any) -> Any:
            done_by[name].add(threading.current_thread().name)
            return real(*given, **named)

        monkeypatch.setattr(owner, name, called)

    for owner, name in (
        (cp.Store, "writing"), (cp.Store, "_rows"), (cp.Rendering, "counted"), (cp, "find_json"), (cp.Schema, "fault"),
        (cp, "proof_token"), (cp, "fingerprint"), (cp, "parse_object"), (cp.ModelResponse, "whole"), (socket, "getaddrinfo"),
        (time, "sleep"), (cp.CallScanner, "_finish"), (cp.Handle, "prepare"), (cp.Web, "_looked_up"), (cp.Trimmer, "_cut"),
    ):  # fmt: skip
        watched(owner, name)
    proxy = start("alice", "bob", history_disabled="false", check_model="true")
    weather.before = [
        {"author": {"role": "tool"}, "content": {"content_type": "execution_output", "text": "1"}}
    ]
    weather.words = ["See ", "[it](sandbox:/mnt/data/a.txt)", *[f" word{n}" for n in range(300)]]
    weather.pace = 0.001  # else all of them come at once, and none is the loop's
    for _ in range(2):
        weather.add("/interpreter/download", status(200, {"download_url": "https://files.example/a.txt"}))
    assert "word299" in proxy.stream()[1] and "word299" in proxy.say()
    assert proxy.ask(max_tokens=40).json()["choices"][0]["finish_reason"] == "length"
    assert proxy.stream(max_tokens=40, stop=["word7"])[0]
    weather.before, weather.words = [], [*'{"a"', ": 1}"]
    shape = {"type": "json_schema", "json_schema": {"name": "a", "schema": {"type": "object"}}}
    assert proxy.stream(response_format=shape)[0]
    weather.words = ["I look. ", "<tool_call>", '{"name": "look", "arguments": {}}', "</tool_call>"]
    tools = [{"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}]
    assert "tool_calls" in proxy.stream(tools=tools)[1]
    weather.words = ["Fine", "."]
    with proxy.client() as client:
        streamed = client.responses.create(model="gpt-4o", input="hi", stream=True)
        kept = [event for event in streamed if event.type == "response.completed"][0].response.id
        assert client.responses.retrieve(kept).output_text == "Fine."
    assert turn(proxy, auto_continue=True).status_code == 200
    assert {"writing", "counted", "find_json", "whole", "_finish", "_looked_up", "prepare"} <= set(done_by)
    assert not [name for name, threads in done_by.items() if "loop" in threads]
    assert proxy.app.loop.longest() < 0.5  # by the clock: the interpreter is shared, and so is the machine


@pytest.mark.skipif(sys.platform != "linux", reason="the load client is for Linux")
def test_a_thousand_streams_go_on_while_connections_come_and_go(tmp_path: pathlib.Path) -> None:
    with standin() as upstream:
        proxy = Measured(SCRIPT, str(tmp_path), upstream, 8)
        with ended(proxy.start()) as pid:
            server = Process(pid, proxy.port)
            server.wait("/health", proxy.log)
            rig = Rig(upstream, server, None)
            rig.run(server, rig.load(server, 1, connections=8, requests=4))
            streams = start_client(rig.load(server, 24, "pace=0.4", connections=1000, ramp=3.0))
            time.sleep(4)
            passing = start_client(rig.load(server, 1, stream=False, connections=200, requests=1, ramp=4.0))()
            carried = streams()
            longest = re.search(rb"(?m)^chatproxy_loop_seconds ([\d.e-]+)$", server.get("/metrics")[1])
    assert not passing["failures"] and not carried["failures"], (passing, carried)
    assert longest  # by the clock, on a machine that others use too: what it is says `make bench`
    assert carried["gap"] < 10, carried


# --- agents ----------------------------------------------------------------------------------------------------------


class Browser:
    """An agent that behaves as the Firefox extension does: it keeps its id in a cookie and answers what it is asked."""

    def __init__(self, proxy: Proxy | Served, cookie: str = "", key: str = ADMIN, **headers: str) -> None:
        query = f"?key={key}" if key else ""
        url = f"ws{proxy.url.removeprefix('http')}/client/register{query}"
        connected = websockets.sync.client.connect(url, additional_headers=headers, proxy=None)
        self.web = contextlib.ExitStack().enter_context(connected)
        self.id, self.asked = cookie, list[dict[str, Any]]()
        self.answers: Callable[[dict[str, Any]], str | None] = lambda question: (
            f"You said {question['content']}"
        )
        self.pongs, self.error, self.claims = True, "", ""  # the conversation that it says every answer is of
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()
        wait_until(lambda: self.id)
        if isinstance(proxy, Proxy):
            wait_until(lambda: any(one.id == self.id for one in proxy.app.agents.connected()))

    def _run(self) -> None:
        with contextlib.suppress(websockets.exceptions.ConnectionClosed):
            for text in self.web:
                said = json.loads(text)
                if said["message"] == "Connection id":
                    self.id = self.id or said["id"]
                    self.say(self.id, "Connection id", "")
                elif said["message"] == "ping" and self.pongs:
                    self.say(said["id"], "pong", "")
                elif said["message"] == "ChatGptRequest":
                    threading.Thread(target=self._answer, args=(said,), daemon=True).start()

    def _answer(self, said: dict[str, Any]) -> None:
        question = json.loads(said["data"])
        self.asked.append(question)
        if self.error:
            self.web.send(
                json.dumps(
                    {"id": said["id"], "message": "error", "data": "Unknown error", "error": self.error}
                )
            )
        elif (content := self.answers(question)) is not None:
            conversation = self.claims or question["conversation_id"] or f"talk-{secrets.token_hex(4)}"
            told = {"response_id": secrets.token_hex(4), "conversation_id": conversation, "content": content}
            self.say(said["id"], "ChatGptResponse", json.dumps(told))

    def say(self, id: str, message: str, data: str) -> None:
        with contextlib.suppress(websockets.exceptions.ConnectionClosed):
            self.web.send(json.dumps({"id": id, "message": message, "data": data}))

    def die(self) -> None:
        """Hangs up without a word."""
        self.web.socket.shutdown(socket.SHUT_RDWR)


def put(proxy: Proxy | Served, content: Any = "hi", key: str = KEY, **more: Any) -> httpx.Response:
    """A question as ChatGPT-API-server's clients put it, the key bare."""
    body = {"content": content} | more
    return httpx.post(f"{proxy.url}/api/ask", json=body, headers={"Authorization": key}, timeout=30)


def test_agents_answer_in_turn_and_keep_their_conversations(start: Callable[..., Proxy]) -> None:
    proxy = start("alice")
    one, two = Browser(proxy), Browser(proxy)
    first = put(proxy, "hello").json()
    assert set(first) == {"id", "response_id", "conversation_id", "content", "error"}
    assert first["content"] == "You said hello" and first["error"] == ""
    put(proxy, "again")
    assert len(one.asked) == len(two.asked) == 1  # the one that was asked longer ago
    holder = one if one.asked[0]["content"] == "hello" else two
    for number in range(4):
        more = {"conversation_id": first["conversation_id"], "parent_id": first["response_id"]}
        assert put(proxy, f"more {number}", **more).json()["conversation_id"] == first["conversation_id"]
    assert len(holder.asked) == 5 and holder.asked[-1]["parent_id"] == first["response_id"]
    assert set(holder.asked[0]) == {"message_id", "conversation_id", "parent_id", "content"}
    listed = admin(proxy, "GET", "/api/connections").json()["connections"]
    assert {tuple(row) for row in listed} == {("Ws", "Id", "Heartbeat", "LastMessageTime")}
    assert {row["Id"] for row in listed} == {one.id, two.id}
    assert admin(proxy, "GET", "/api/connections", KEY).status_code == 401


def test_many_questions_are_under_way_at_one_agent_and_answers_come_in_any_order(
    start: Callable[..., Proxy],
) -> None:
    proxy = start()
    agent = Browser(proxy)
    all_there = threading.Barrier(20)

    def answer(question: dict[str, Any]) -> str:
        all_there.wait(10)
        time.sleep(random.random() * 0.2)
        return question["content"][::-1]

    agent.answers = answer
    with concurrent.futures.ThreadPoolExecutor(20) as pool:
        said = list(pool.map(lambda n: put(proxy, f"question {n}").json()["content"], range(20)))
    assert said == [f"question {n}"[::-1] for n in range(20)]


def test_an_agent_that_dies_fails_only_its_own_questions(start: Callable[..., Proxy]) -> None:
    proxy = start()
    one, two = Browser(proxy), Browser(proxy)
    for _ in range(2):
        assert put(proxy).status_code == 200
    holders = {held.account: talk for talk, held in proxy.app.agents._holders.items()}
    dying, living, own, others = one, two, holders[one.id], holders[two.id]
    dying.answers = lambda question: None
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        lost = pool.submit(put, proxy, "mine", conversation_id=own)
        wait_until(lambda: any(q["content"] == "mine" for q in dying.asked))
        free = [pool.submit(put, proxy, f"free {n}") for n in range(4)]
        wait_until(lambda: len([q for q in dying.asked + living.asked if "free" in q["content"]]) >= 4)
        dying.die()
        assert put(proxy, "theirs", conversation_id=others).json()["content"] == "You said theirs"
        assert {one.result().json()["content"] for one in free} == {f"You said free {n}" for n in range(4)}
        assert lost.result().status_code == 500 and isinstance(lost.result().json()["error"], str)
    wait_until(lambda: len(proxy.app.agents.connected()) == 1)


def test_an_agent_that_comes_back_has_its_place_and_conversations(start: Callable[..., Proxy]) -> None:
    proxy = start()
    one, two = Browser(proxy), Browser(proxy)
    talk = [put(proxy).json()["conversation_id"] for _ in range(2)]
    held = next(c for c in talk if proxy.app.agents._holders[c].account == one.id)
    one.die()
    wait_until(lambda: len(proxy.app.agents.connected()) == 1)
    gone = put(proxy, "x", conversation_id=held)
    assert gone.status_code == 500 and "not connected" in gone.json()["error"]
    back = Browser(proxy, cookie=one.id)
    assert put(proxy, "y", conversation_id=held).json()["content"] == "You said y" and len(back.asked) == 1
    # A second connection with the same id replaces the first, which does not answer any more and is closed.
    back.pongs = False
    third = Browser(proxy, cookie=one.id)
    back.thread.join(10)
    assert not back.thread.is_alive() and len(proxy.app.agents.connected()) == 2
    assert put(proxy, "z", conversation_id=held).json()["content"] == "You said z" and len(third.asked) == 1
    assert len(two.asked) == 1


def test_agents_that_fall_silent_leave_the_list(
    start: Callable[..., Proxy], monkeypatch: pytest.MonkeyPatch
) -> None:
    limits: Any = cp.WebSocket.__init__.__kwdefaults__
    assert limits["idle"] + limits["patience"] < 30
    monkeypatch.setitem(limits, "idle", 0.3)
    monkeypatch.setitem(limits, "patience", 0.3)
    monkeypatch.setattr(cp, "PING_PATIENCE", 0.4)
    proxy = start()
    for _ in range(2):
        Browser(proxy).pongs = False  # lively, but no answer to the protocol's own ping
    said = put(proxy)
    assert said.status_code == 503
    wait_until(lambda: not proxy.app.agents.connected())
    half = socket.create_connection(proxy.address)  # answers nothing at all
    head = f"GET /client/register?key={ADMIN} HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
    head += "Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
    payload = json.dumps({"id": "half-open"}).encode()
    half.sendall(head.encode() + bytes([0x81, 0x80 | len(payload), 0, 0, 0, 0]) + payload)
    wait_until(lambda: [one.id for one in proxy.app.agents.connected()] == ["half-open"])
    wait_until(lambda: not proxy.app.agents.connected(), 2)
    half.close()


def test_nobody_volunteers_as_an_agent_without_the_key(start: Callable[..., Proxy]) -> None:
    proxy = start()

    def status_of(proxy: Proxy, key: str = ADMIN, **headers: str) -> int:
        try:
            Browser(proxy, key=key, **headers).die()
        except websockets.exceptions.InvalidStatus as refused:
            return refused.response.status_code
        return 101

    for key in ("", "wrong", KEY):
        assert status_of(proxy, key) == 401
    assert status_of(proxy, "", Authorization=f"Bearer {ADMIN}") == 101
    for origin in ("https://evil.example", "null", "https://chatgpt.com.evil.example", "http://chatgpt.com"):
        assert status_of(proxy, Origin=origin) == 403, origin
    for origin in ("https://chatgpt.com", "moz-extension://0a-1b", "chrome-extension://abc"):
        assert status_of(proxy, Origin=origin) == 101, origin
    own = start(folder="own", agent_key="for-agents")
    assert status_of(own, ADMIN) == 401 and status_of(own, "for-agents") == 101
    none = start(folder="none", authorization="", admin_key="")
    assert status_of(none, "") == 101
    assert status_of(none, "", **{"X-Forwarded-For": "1.2.3.4"}) == 401
    plain = httpx.get(f"{proxy.url}/client/register?key={ADMIN}")
    assert plain.status_code == 400


def test_what_an_agent_says_is_not_trusted(
    start: Callable[..., Proxy], caplog: pytest.LogCaptureFixture
) -> None:
    proxy = start()
    agent = Browser(proxy)
    for noise in ("nonsense", "[]", "{}", '{"id": 5}', json.dumps({"id": "unknown", "data": "x"}), "5" * 999):
        agent.web.send(noise)
    assert put(proxy).json()["content"] == "You said hi"
    agent.error = "what only the person and the model should read"
    failed = put(proxy)
    assert failed.status_code == 500 and "only the person" not in failed.text
    assert not any("only the person" in str(vars(record)) for record in caplog.records)
    agent.error = ""
    agent.answers = lambda question: 5  # type: ignore[assignment, return-value]
    assert put(proxy).status_code == 500
    agent.web.send(b"binary")
    wait_until(lambda: not proxy.app.agents.connected())
    agent.thread.join(5)
    assert agent.web.protocol.close_code == 1003


def test_a_question_without_agents_is_answered_by_the_pool(
    start: Callable[..., Proxy], weather: Weather
) -> None:
    proxy = start("alice", "bob")
    said = put(proxy, "hello").json()
    assert said["content"] == "Hello wide world." and said["conversation_id"] and said["error"] == ""
    holder = weather.last("/conversation").headers["authorization"]
    for _ in range(5):  # goes on where it was begun
        more = {"conversation_id": said["conversation_id"], "parent_id": said["response_id"]}
        assert put(proxy, "more", **more).json()["conversation_id"] == said["conversation_id"]
        assert weather.last("/conversation").headers["authorization"] == holder
        assert weather.asked()["parent_message_id"] == said["response_id"]
    Browser(proxy)  # which does not take the pool's conversations over
    more = {"conversation_id": said["conversation_id"], "parent_id": said["response_id"]}
    assert put(proxy, "more", **more).json()["content"] == "Hello wide world."
    made = admin(proxy, "POST", "/admin/users/add", json={"limit": 1}).json()
    assert put(proxy, "x", key=made["token"]).status_code == 200
    assert admin(proxy, "GET", "/admin/users").json()["users"][0]["tokens"] > 0
    for answer, code in ((put(proxy, "x", key=made["token"]), 429), (put(proxy, key="wrong"), 401)):
        assert answer.status_code == code and isinstance(answer.json()["error"], str)
    for wrong in ({"content": 5}, {"content": ""}, {}, {"content": "x", "parent_id": []}):
        answer = httpx.post(f"{proxy.url}/api/ask", json=wrong, headers={"Authorization": KEY})
        assert answer.status_code == 400 and isinstance(answer.json()["error"], str)
    empty = start(folder="empty")
    assert put(empty).status_code == 503


def test_an_agent_that_comes_back_while_it_is_pinged_is_asked(start: Callable[..., Proxy]) -> None:
    proxy = start()
    first = Browser(proxy)
    first.pongs = False
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        asked = pool.submit(put, proxy)
        wait_until(lambda: any(one.waiting for one in proxy.app.agents.connected()))
        back = Browser(proxy, cookie=first.id)
        assert asked.result().json()["content"] == "You said hi" and len(back.asked) == 1


def test_a_silent_agent_has_the_time_of_the_whole_exchange_and_no_other_is_asked(
    start: Callable[..., Proxy], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cp, "AGENT_PATIENCE", 0.5)
    proxy = start()
    agents = [Browser(proxy) for _ in range(3)]
    for agent in agents:
        agent.answers = lambda question: None
    began = time.monotonic()
    assert put(proxy).status_code == 500 and time.monotonic() - began < 2
    assert sum(len(agent.asked) for agent in agents) == 1


def test_a_server_that_ends_leaves_agents_time_for_their_answers(tmp_path: pathlib.Path) -> None:
    def late(question: dict[str, Any]) -> str:
        time.sleep(1)
        return "late, but there"

    env = {"DATA_DIR": str(tmp_path), "AUTHORIZATION": ADMIN, "SHUTDOWN_GRACE": "10"}
    with Served(env=env) as served:
        agent, idle = (Browser(served, key=ADMIN) for _ in range(2))
        for one in (agent, idle):
            one.answers = late
        with concurrent.futures.ThreadPoolExecutor(1) as pool:
            asked = pool.submit(put, served, "hi", ADMIN)
            wait_until(lambda: agent.asked or idle.asked)
            began = time.monotonic()
            served.process.terminate()
            assert asked.result().json()["content"] == "late, but there"
            assert served.process.wait(10) == 0 and time.monotonic() - began < 4
        for one in (agent, idle):
            one.thread.join(5)
            assert one.web.protocol.close_code == 1001


def test_responses_are_answered_by_agents_and_gone_on_from(start: Callable[..., Proxy]) -> None:
    proxy = start(upstream_order="agents")
    agent = Browser(proxy)
    client = proxy.client()
    first = client.responses.create(model="gpt-4o", input="hello")
    assert first.output_text == "You said hello"
    second = client.responses.create(model="gpt-4o", input="more", previous_response_id=first.id)
    assert "hello" in second.output_text and "more" in second.output_text and len(agent.asked) == 2


def test_a_conversation_goes_on_with_whom_it_was_begun(start: Callable[..., Proxy], weather: Weather) -> None:
    proxy = start("alice", upstream_order="agents,pool", history_disabled="false")
    mine = proxy.ask().json()
    agent = Browser(proxy)
    ids = {"conversation_id": mine["conversation_id"], "parent_message_id": mine["message_id"]}
    assert proxy.say("more", **ids) == "Hello wide world."
    theirs = proxy.ask().json()
    ids = {"conversation_id": theirs["conversation_id"], "parent_message_id": theirs["message_id"]}
    assert proxy.say("on", **ids) == "You said on" and len(agent.asked) == 2


def test_who_needs_no_key_is_answered_by_agents_too(start: Callable[..., Proxy], weather: Weather) -> None:
    proxy = start("alice", authorization="", admin_key="", upstream_order="agents,pool")
    Browser(proxy, key="")
    assert put(proxy, key="").json()["content"] == "You said hi"
    assert proxy.ask(key=None).json()["choices"][0]["message"]["content"] == "You said hi"
    own = proxy.ask(key=cp.demo_token("bob")).json()["choices"][0]["message"]["content"]
    assert own == "Hello wide world." and weather.count("/conversation") == 1


@pytest.mark.parametrize("order", ["agents", "agents,pool", "pool,agents", "pool"])
def test_chats_are_answered_by_whom_the_order_names(
    order: str, start: Callable[..., Proxy], weather: Weather
) -> None:
    proxy = start("alice", upstream_order=order)
    agent = Browser(proxy)
    by_agent = order.startswith("agents")
    assert proxy.say("hi") == ("You said hi" if by_agent else "Hello wide world.")
    chunks, text = proxy.stream()
    assert text_of(chunks) == ("You said hi" if by_agent else "Hello wide world.") and text.endswith(
        "[DONE]\n\n"
    )
    told = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Why?"}]
    if by_agent:
        assert proxy.say(messages=told) == "You said System: Be brief.\n\nUser: Why?"
        assert weather.count("/conversation") == 0
        image = {"type": "image_url", "image_url": {"url": data_url(picture())}}
        pictured = proxy.ask(
            messages=[{"role": "user", "content": [{"type": "text", "text": "what"}, image]}]
        )
        assert pictured.status_code == (400 if order == "agents" else 200)
    agent.die()
    wait_until(lambda: not proxy.app.agents.connected())
    answer = proxy.ask()
    assert answer.status_code == (503 if order == "agents" else 200)
    if order == "pool,agents":
        proxy.app.pool.remove()
        again = Browser(proxy)
        assert proxy.say("hi") == "You said hi" and len(again.asked) == 1


# --- the native web API -----------------------------------------------------------------------------------------------

Start = Callable[..., Proxy]
PLACES = ("", "/backend-api", "/api", "/chatgpt", "/chatgpt/backend-api")
SAID: dict[str, Any] = {"messages": [{"content": {"content_type": "text", "parts": ["hi"]}}]}
HIDE = {"is_visible": False}


def web(proxy: Proxy, method: str, path: str, key: str | None = KEY, **options: Any) -> httpx.Response:
    return admin(proxy, method, path, key, **options)


def turn(proxy: Proxy, key: str | None = KEY, **body: Any) -> httpx.Response:
    return web(proxy, "POST", "/conversation", key, json=SAID | body)


def conversation_of(answer: httpx.Response) -> str:
    assert answer.status_code == 200, answer.text
    return str(re.findall(r'"conversation_id":"([^"]+)"', answer.text)[0])


def keep(weather: Weather, name: str, *ids: str, at: float = 1.7e9, every: float = 10) -> None:
    """Conversations of an account, the first changed last."""
    for number, id in enumerate(ids):
        when = at - number * every
        weather.conversations[id] = cp.DemoConversation(f"user-{name}", when, True, when, f"of {name}")


def asker(request: cp.Request) -> str:
    return str(cp.claims(cp.Keys.given(request))["https://api.openai.com/auth"]["user_id"])


def taken_down(weather: Weather, monkeypatch: pytest.MonkeyPatch) -> list[bytes]:
    """What the weather answers to turns, event by event."""
    sent: list[bytes] = []
    say = weather.answer
    heard = lambda piece: sent.append(piece) or piece  # type: ignore[func-returns-value]  # noqa: E731
    monkeypatch.setattr(weather, "answer", lambda *of: map(heard, say(*of)))
    return sent


def test_the_native_calls_are_answered_under_every_prefix(proxy: Proxy, weather: Weather) -> None:
    for place in PLACES:
        keep(weather, "alice", "c-1", "c-2")
        listed = web(proxy, "GET", f"{place}/conversations").json()
        assert [one["id"] for one in listed["items"]][-2:] == ["c-1", "c-2"]
        assert (listed["total"], listed["limit"], listed["offset"]) == (len(weather.conversations), 20, 0)
        path = f"{place}/conversation"
        assert web(proxy, "GET", f"{path}/c-1").json()["conversation_id"] == "c-1"
        assert web(proxy, "PATCH", f"{path}/c-1", json={"title": "é"}).json() == {"success": True}
        assert weather.conversations["c-1"].title == "é"
        made = web(proxy, "POST", f"{path}/gen_title/c-1", json={"message_id": "m"})
        assert made.json() == {"title": "A demo chat"}
        assert web(proxy, "POST", path, json=SAID).text.endswith("data: [DONE]\n\n")
        assert web(proxy, "PATCH", f"{path}/c-2", json=HIDE).status_code == 200
        assert "c-2" not in weather.conversations
    assert all(one.path.startswith("/backend-api/") for one in weather.seen if one.path != "/")


def test_a_list_has_defaults_and_a_largest_limit(proxy: Proxy, weather: Weather) -> None:
    for key in (KEY, cp.demo_token("bob")):
        assert web(proxy, "GET", "/conversations", key).status_code == 200
        asked = weather.last("/conversations").query
        assert (asked["offset"], asked["limit"]) == ("0", "20")
        assert web(proxy, "GET", "/conversations?limit=100&offset=3", key).json()["limit"] == 100
        count = weather.count("/conversations")
        for query in ("limit=101", "limit=-1", "limit=x", "limit=", "offset=-1", "offset=1.5"):
            answer = web(proxy, "GET", f"/conversations?{query}", key)
            assert error_of(answer) == (400, "invalid_request_error")
            assert answer.json()["error"]["param"] == query.partition("=")[0]
        assert weather.count("/conversations") == count


def test_what_the_upstream_says_of_a_conversation_is_passed_on(start: Start, weather: Weather) -> None:
    proxy = start("alice", retry_times="1")
    gone = web(proxy, "GET", "/conversation/none")
    assert (gone.status_code, gone.json()) == (404, {"detail": "Can't load conversation"})
    for method, code in (("GET", 404), ("GET", 422), ("GET", 413), ("PATCH", 404), ("PATCH", 422)):
        weather.add("/conversation/c-1", status(code, f"said {code}", "text/plain"))
        answer = web(proxy, method, "/conversation/c-1", json={"title": "x"})
        assert (answer.status_code, answer.text) == (code, f"said {code}")
        assert answer.headers["content-type"] == "text/plain"
    assert weather.count("/conversation/c-1") == 5
    keep(weather, "alice", "c-1")
    for fault in (status(503), cut_stream()):  # a read is tried again
        weather.add("/conversation/c-1", fault)
        assert web(proxy, "GET", "/conversation/c-1").status_code == 200
    weather.add("/conversation/c-1", *[status(503, "<b>busy</b>", "text/html")] * 2)
    answer = web(proxy, "GET", "/conversation/c-1")
    assert (answer.status_code, answer.text) == (503, "<b>busy</b>")


# conversation goes to the same account again after a 502 or a cut, so that the question may be in it twice
@pytest.mark.parametrize("path", ["/conversation/c-1", "/conversation/gen_title/c-1", "/conversation"])
@pytest.mark.parametrize("fault", [status(502), cut_stream()], ids=["502", "cut"])
def test_a_change_is_never_sent_twice(fault: Fault, path: str, proxy: Proxy, weather: Weather) -> None:
    keep(weather, "alice", "c-1")
    assert web(proxy, "GET", "/conversation/c-1").status_code == 200  # whose connection is kept
    weather.add(path, fault)
    method = "PATCH" if path.endswith("on/c-1") else "POST"
    body = SAID | {"title": "x", "message_id": "m", "conversation_id": "c-1"}
    answer = web(proxy, method, path, json=body)
    called = "/f/conversation" if path == "/conversation" else path
    assert (answer.status_code, weather.calls.count(f"{method} /backend-api{called}")) == (502, 1)
    assert not weather.calls.count("POST /backend-api/conversation")


def test_a_change_is_sent_again_with_a_renewed_token(start: Start, weather: Weather) -> None:
    refresh = "rt_" + "r" * 40
    weather.refresh_tokens[refresh] = "alice"
    proxy = start(refresh)
    keep(weather, "alice", "c-1")
    assert web(proxy, "GET", "/conversation/c-1").status_code == 200
    weather.dead.add(proxy.app.pool.accounts()[0].row.access_token)
    assert web(proxy, "PATCH", "/conversation/c-1", json={"title": "new"}).status_code == 200
    assert weather.conversations["c-1"].title == "new" and weather.count("/oauth/token") == 2
    assert weather.calls.count("PATCH /backend-api/conversation/c-1") == 2


def test_a_change_is_sent_again_when_it_cannot_have_arrived(start: Start, weather: Weather) -> None:
    keep(weather, "alice", "c-1")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    proxy = start("alice", upstream=f"http://127.0.0.1:{port}")
    with concurrent.futures.ThreadPoolExecutor() as executor:
        answer = executor.submit(web, proxy, "PATCH", "/conversation/c-1", json={"title": "x"})
        time.sleep(0.15)
        server = cp.Server(
            ("127.0.0.1", port), weather, cp.resolve(cp.gather({}, {})), cp.Metrics(), quiet=True
        )
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        assert answer.result().status_code == 200
    server.drain(0)
    assert weather.calls.count("PATCH /backend-api/conversation/c-1") == 1


ODD = ["a%3Fb=c", "a%23b", "a%252F..%252Fme", "{id}", "{0.x}", "%C3%A4", "a;b", "a&b"]
ODDER = [
    "..",
    "%2e%2e",
    "a%2F..%2F..%2Fme",
    "a%2Fb",
    "..%2Fme",
    "",
    "a%0d%0aX:1",
    "%ff",
    "a%5cb",
    "%61",
    "a%",
    "a%zz",
]


def test_no_id_changes_the_path_of_the_upstream_call(proxy: Proxy, weather: Weather) -> None:
    for id in (*ODD, *ODDER):
        for method, place in (("GET", "/conversation/"), ("POST", "/conversation/gen_title/")):
            connection = http.client.HTTPConnection(*proxy.address)
            connection.request(method, place + id, b"{}", {"Authorization": f"Bearer {KEY}"})
            assert connection.getresponse().status in (400, 404, 405)
            connection.close()
            calls = [one.path for one in weather.seen if one.path != "/"]
            assert calls == [f"/backend-api{place}{urllib.parse.unquote(id)}"] * (id in ODD), id
            weather.seen.clear()


@pytest.mark.parametrize("encoding", ["v1", "cumulative"])
def test_a_native_turn_is_passed_on_byte_for_byte(
    encoding: str, proxy: Proxy, weather: Weather, monkeypatch: pytest.MonkeyPatch
) -> None:
    weather.encoding, weather.words = (
        encoding,
        ["é", " \U0001f600", " \ue200cite\ue202x\ue201", "\n\ndata: x"],
    )
    sent = taken_down(weather, monkeypatch)
    answer = turn(proxy)
    assert answer.headers["content-type"].startswith("text/event-stream")
    assert answer.content == b"".join(sent) and answer.content.count(b"[DONE]") == 1
    odd = (b": \xff\xfe", b"\r\n\r\nevent: new\nid: 7\ndata: {", b"broken\n\n", b"data: [DONE]\n\n")
    weather.add("/conversation", raw_stream(*odd))
    assert turn(proxy).content == b"".join(odd)


def test_what_a_native_turn_leaves_out_is_filled_in(proxy: Proxy, weather: Weather) -> None:
    assert turn(proxy, conversation_id="", suggestions=["a"], model="o3").status_code == 200
    asked = weather.asked()
    (message,) = asked["messages"]
    for id in (message["id"], asked["parent_message_id"]):
        assert re.fullmatch(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}|client-created-root", id)
    assert message["author"]["role"] == "user" and message["content"]["parts"] == ["hi"]
    assert asked["action"] == "next" and isinstance(asked["timezone_offset_min"], int)
    assert "conversation_id" not in asked and (asked["suggestions"], asked["model"]) == (["a"], "o3")
    assert weather.last("/conversation").headers["openai-sentinel-proof-token"].startswith("gAAAAAB")
    mine = {"id": "mine", "author": {"role": "system", "name": "n"}, "content": {"parts": ["x"]}}
    given: dict[str, Any] = {
        "action": "variant",
        "parent_message_id": "p",
        "timezone_offset_min": -480,
        "own": {"a": None},
    }
    assert turn(proxy, messages=[mine], conversation_id=None, **given).status_code == 200
    assert weather.asked()["messages"][0].items() >= mine.items() and weather.asked().items() >= given.items()
    for body in ({"messages": "x"}, {"model": 1}, {"auto_continue": "yes"}, {"conversation_id": 5}):
        answer = turn(proxy, **body)
        assert error_of(answer) == (400, "invalid_request_error")
        assert answer.json()["error"]["param"] == next(iter(body))


def test_a_refused_native_turn_has_the_upstreams_own_words(start: Start, weather: Weather) -> None:
    proxy = start("alice", retry_times="0")
    for code in (400, 413, 422, 403, 503):
        weather.add("/conversation", *[status(code, {"detail": [{"msg": "own", "loc": ["x"]}]})] * 2)
        answer = turn(proxy)
        assert (answer.status_code, answer.json()) == (code, {"detail": [{"msg": "own", "loc": ["x"]}]})
        weather.faults.clear()
    lost = turn(proxy, conversation_id="lost")
    assert (lost.status_code, lost.json()["detail"]["code"]) == (404, "conversation_not_found")


def test_a_native_turn_has_another_account_before_its_first_byte(start: Start, weather: Weather) -> None:
    proxy = start("alice", "bob")
    weather.add("/conversation", status(429, {"detail": {"clears_in": 500}}))
    assert turn(proxy).content.endswith(b"data: [DONE]\n\n")
    first, second = (asker(one) for one in weather.seen if one.path.endswith("/conversation"))
    assert {first, second} == {"user-alice", "user-bob"} and "waiting" in proxy.states().values()
    weather.add("/conversation", cut_stream(b'data: {"message": null}\n\n'))
    broken = turn(proxy).text
    assert broken.startswith('data: {"message": null}\n\ndata: {"error":') and "[DONE]" not in broken
    assert weather.count("/conversation") == 3


@pytest.mark.parametrize("encoding", ["v1", "cumulative"])
def test_a_native_turn_that_was_cut_for_length_is_gone_on_with_on_request(
    encoding: str, proxy: Proxy, weather: Weather, monkeypatch: pytest.MonkeyPatch
) -> None:
    weather.encoding, weather.details = encoding, "max_tokens"
    assert turn(proxy, auto_continue=False).text.count("[DONE]") == turn(proxy).text.count("[DONE]") == 1
    assert weather.count("/conversation") == 2
    parts, details, say = (
        taken_down(weather, monkeypatch),
        iter(["max_tokens", "max_tokens", "stop"]),
        weather.say,
    )
    monkeypatch.setattr(weather, "say", lambda body, words, _, *rest: say(body, words, next(details), *rest))
    answer = turn(proxy, auto_continue=True).content
    whole = b"".join(parts).replace(b"data: [DONE]\n\n", b"") + b"data: [DONE]\n\n"
    assert answer == whole and answer.count(b"message_stream_complete") == 3
    asked = [one.json() for one in weather.seen if one.path.endswith("/conversation")][2:]
    assert [one["action"] for one in asked] == ["next", "continue", "continue"]
    assert not any("auto_continue" in one for one in asked)
    for one in asked[1:]:
        assert "messages" not in one and one["conversation_id"].encode() in parts[-1]
        assert one["parent_message_id"].encode() in whole


def test_signs_of_life_come_only_between_two_events(start: Start, weather: Weather) -> None:
    pieces = (b'data: {"a": 1}\n\n', b"data: half", b" and half\n\ndata: [DONE]\n\n")

    def slow() -> cp.Sent:
        for piece in pieces:
            yield piece, 1
            time.sleep(0 if piece is pieces[-1] else 1.2)

    weather.add("/conversation", lambda request: cp.streamed(slow()))
    signs = re.escape(pieces[0]) + b"(: \n\n){1,2}" + re.escape(pieces[1] + pieces[2])
    assert re.fullmatch(signs, turn(start("alice", heartbeat="1")).content)


def test_a_native_call_is_the_callers_accounts(start: Start, weather: Weather) -> None:
    proxy, bob = start("alice", "carol"), cp.demo_token("bob")
    keep(weather, "alice", "c-a")
    keep(weather, "bob", "c-b")
    assert [one["id"] for one in web(proxy, "GET", "/conversations", bob).json()["items"]] == ["c-b"]
    assert web(proxy, "GET", "/conversation/c-b", bob).status_code == 200
    assert web(proxy, "GET", "/conversation/c-a", bob).status_code == 404
    assert weather.conversations[conversation_of(turn(proxy, bob))].owner == "user-bob"
    assert {asker(one) for one in weather.seen if one.path != "/"} == {"user-bob"}
    assert web(proxy, "PATCH", "/conversations", bob, json=HIDE).json()["success"] is True
    assert set(weather.conversations) == {"c-a"}


@pytest.mark.parametrize("key", ["sk-nobody", None])
def test_nobody_without_a_key_reaches_the_pools_conversations(
    key: str | None, proxy: Proxy, weather: Weather
) -> None:
    for path in (
        "GET s",
        "GET /c-1",
        "PATCH /c-1",
        "PATCH s?all_accounts=true",
        "POST ",
        "POST /gen_title/c-1",
    ):
        method, _, rest = path.partition(" ")
        assert web(proxy, method, f"/conversation{rest}", key, json=SAID | HIDE).status_code == 401, path
    assert weather.calls == []


def test_a_pool_asks_the_account_that_holds_the_conversation(start: Start, weather: Weather) -> None:
    proxy, names = start("alice", "bob", "carol"), ("alice", "bob", "carol")
    ids = [conversation_of(turn(proxy)) for _ in range(6)]
    for name in names:
        keep(weather, name, f"c-{name}")
    calls = weather.wanted()
    for method, path in (("GET", "/conversation/c-bob"), ("POST", "/conversation/gen_title/c-bob")):
        assert error_of(web(proxy, method, path, json={"message_id": "m"})) == (404, "not_found")
    assert weather.wanted() == calls  # nobody is known to hold it
    assert web(proxy, "GET", "/conversations").json()["total"] == 9
    for id in (*ids, *(f"c-{name}" for name in names)):
        assert web(proxy, "GET", f"/conversation/{id}").status_code == 200
        assert conversation_of(turn(proxy, conversation_id=id)) == id
        assert asker(weather.last("/conversation")) == weather.conversations[id].owner
    for place in PLACES:
        rating = {"message_id": "m", "conversation_id": "c-bob", "rating": "thumbsDown"}
        rated = web(proxy, "POST", f"{place}/conversation/message_feedback", json=rating)
        assert rated.json() == {"message_id": "m", "rating": "thumbsDown"}


def test_a_pools_list_has_all_conversations_in_order(start: Start, weather: Weather) -> None:
    proxy = start("alice", "bob", "carol", retry_times="0")
    keep(weather, "alice", *(f"a-{number}" for number in range(230)))
    keep(weather, "bob", *(f"b-{number}" for number in range(40)), at=1.7e9 - 3, every=35)
    keep(weather, "carol", *(f"c-{number}" for number in range(7)), at=1.7e9 - 5000.5, every=1)
    order = sorted(weather.conversations, key=lambda id: weather.conversations[id].updated, reverse=True)

    def listed(offset: int, limit: int) -> tuple[list[str], int]:
        told = web(proxy, "GET", f"/conversations?offset={offset}&limit={limit}").json()
        assert (told["offset"], told["limit"]) == (offset, limit)
        return [one["id"] for one in told["items"]], told["total"]

    for offset, limit in ((0, 20), (0, 100), (95, 30), (150, 100), (250, 100), (277, 5), (999, 1)):
        assert listed(offset, limit) == (order[offset : offset + limit], 277)
    fails: Fault = lambda request: cp.Reply(500) if asker(request) == "user-bob" else None  # noqa: E731
    weather.add("/conversations", *[fails] * 3)
    assert listed(0, 100) == ([id for id in order if id[0] != "b"][:100], 237)
    weather.faults["/conversations"] = deque([status(500)] * 3)
    assert web(proxy, "GET", "/conversations").status_code in (500, 502)
    answer = web(proxy, "GET", "/conversations?limit=0")
    assert answer.status_code == 400 or answer.json()["total"] == 277


def test_all_conversations_of_a_pool_go_only_when_that_is_said(start: Start, weather: Weather) -> None:
    proxy = start("alice", "bob")
    for name in ("alice", "bob", "carol"):
        keep(weather, name, f"c-{name}")
    for query in ("", "?all_accounts=", "?all_accounts=false"):
        answer = web(proxy, "PATCH", f"/conversations{query}", ADMIN, json=HIDE)
        assert error_of(answer) == (400, "invalid_request_error")
        assert "all_accounts=true" in answer.json()["error"]["message"]
    all_of_them = "/conversations?all_accounts=true"
    assert error_of(web(proxy, "PATCH", all_of_them, KEY, json=HIDE)) == (401, "invalid_api_key")
    assert weather.calls == []
    weather.add("/conversations", status(500))
    assert web(proxy, "PATCH", all_of_them, ADMIN, json=HIDE).status_code >= 500
    assert weather.count("/conversations") == 2 and len(weather.conversations) == 2
    assert web(proxy, "PATCH", all_of_them, ADMIN, json=HIDE).status_code == 200
    assert set(weather.conversations) == {"c-carol"}


def test_a_caller_without_a_key_has_turns_and_no_conversations(start: Start, weather: Weather) -> None:
    proxy = start(authorization="")
    assert turn(proxy, None, model="o3").content.endswith(b"data: [DONE]\n\n")
    assert weather.last("/conversation").path.startswith("/backend-anon/")
    assert weather.asked()["model"] == "auto"
    for method, path in (("GET", "/conversations"), ("GET", "/conversation/c"), ("PATCH", "/conversations")):
        assert error_of(web(proxy, method, path, None, json={})) == (400, "login_required")


# --- passwords --------------------------------------------------------------------------------------------------------

USER, WORD, CODE = "person@demo.example", "pass-wörd&=+ %41", "492817"


def sign_in(proxy: Proxy, key: str = KEY, **body: Any) -> httpx.Response:
    return web(proxy, "POST", "/auth/login", key, json={"username": USER, "password": WORD} | body)


def test_a_password_gives_tokens_and_leaves_nothing_behind(
    proxy: Proxy, weather: Weather, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("DEBUG")
    weather.people = {USER: (WORD, CODE)}
    answer = sign_in(proxy, code=CODE)
    told = answer.json()
    assert answer.status_code == 200 and answer.headers["cache-control"] == "no-store"
    assert cp.claims(told["accessToken"])["https://api.openai.com/profile"]["email"] == USER
    assert weather.refresh_tokens[told["refreshToken"]] == "person" and told["expires"] > "2026"
    assert set(proxy.states()) == {"alice@demo.example"}
    failed = [sign_in(proxy, code="000000"), sign_in(proxy, password=WORD + "x"), sign_in(proxy)]
    for path in ("/u/login/password", "/authorize/resume", "/oauth/token"):
        weather.add(path, *[status(500, f"{USER} {WORD} {CODE}")] * 2)
        failed.append(sign_in(proxy, code=CODE))
        weather.faults.clear()
    seen = [str(vars(record)) for record in caplog.records] + [one.text for one in failed]
    files = [file.read_bytes() for file in pathlib.Path(proxy.settings.data_dir).iterdir()]
    for secret in (USER, WORD, CODE, told["accessToken"], told["refreshToken"]):
        assert not any(secret in text for text in (*seen, proxy.app.metrics.render()))
        assert secret == CODE or not any(secret.encode() in data for data in files)


def test_a_sign_in_that_fails_says_why(proxy: Proxy, weather: Weather) -> None:
    weather.people = {USER: (WORD, CODE)}
    wrong = (401, "invalid_credentials")
    assert error_of(sign_in(proxy, username="nobody@demo.example")) == wrong
    assert error_of(sign_in(proxy, password="x")) == error_of(sign_in(proxy, code="000000")) == wrong
    assert error_of(sign_in(proxy)) == error_of(sign_in(proxy, code="")) == (401, "mfa_required")
    assert sign_in(proxy, code=CODE).status_code == 200
    calls = len(weather.calls)
    for body in ({"password": None}, {"username": ""}, {"code": 1}, {"store": "yes"}):
        answer = sign_in(proxy, **body)
        assert error_of(answer) == (400, "invalid_request_error")
        assert answer.json()["error"]["param"] == next(iter(body))
    assert error_of(sign_in(proxy, "wrong")) == (401, "invalid_api_key") and len(weather.calls) == calls


STEPS = [
    *(f"/u/{page}" for page in ("login/identifier", "login/password", "mfa-otp-challenge") for _ in "12")
]
STEPS += ["/authorize", "/authorize/resume", "/oauth/token"]


@pytest.mark.parametrize("number", range(len(STEPS)))
def test_any_step_of_a_sign_in_may_want_a_human_or_fail(number: int, proxy: Proxy, weather: Weather) -> None:
    weather.people = {USER: (WORD, CODE)}
    path = STEPS[number]
    before: list[Fault] = [lambda request: None] * (
        path in STEPS[:number]
    )  # of two calls the second is meant
    captcha = "<script src=/cdn-cgi/challenge-platform/x.js></script>"
    for wall in (status(403, "<title>Just a moment...", "text/html"), status(200, captcha, "text/html")):
        weather.add(path, *before, wall)
        answer = sign_in(proxy, code=CODE)
        assert error_of(answer) == (403, "challenge_required")
        assert "chatproxy.py login" in answer.json()["error"]["message"]
    for code, error in ((429, (429, "rate_limit_exceeded")), (500, (502, "upstream_error"))):
        weather.add(path, *before, status(code))
        assert error_of(sign_in(proxy, code=CODE)) == error
    assert sign_in(proxy, code=CODE).status_code == 200


def test_only_the_administrator_stores_an_account_by_its_password(start: Start, weather: Weather) -> None:
    proxy = start()
    weather.people = {USER: (WORD, "")}
    assert error_of(sign_in(proxy, store=True)) == (401, "invalid_api_key")
    assert weather.calls == [] and proxy.states() == {}
    told = sign_in(proxy, ADMIN, store=True).json()
    assert proxy.states() == {USER: "ready"} and proxy.say() == "Hello wide world."
    weather.dead.add(told["accessToken"])
    assert proxy.say() == "Hello wide world." and weather.count("/oauth/token") == 2
    (account,) = proxy.app.pool.accounts()
    assert weather.last("/oauth/token").json()["refresh_token"] == told["refreshToken"] != account.row.secret
    assert sign_in(proxy, ADMIN, store=True).status_code == 200 and len(proxy.states()) == 1


def test_an_account_is_added_by_a_password_that_is_typed(tmp_path: pathlib.Path, weather: Weather) -> None:
    weather.people = {USER: (WORD, CODE)}
    command = [sys.executable, str(SCRIPT), "accounts", "add", "--data-dir", str(tmp_path)]
    command += ["--openai-auth-url", weather.url]

    def add(*words: str, typed: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
        options: dict[str, Any] = {"capture_output": True, "text": True, "timeout": 30}
        text = "\n".join((*typed, ""))  # in a session of its own: a terminal would be asked for the password
        return subprocess.run([*command, *words], input=text, start_new_session=True, **options)

    wrong, done = add("--password", typed=(USER, "x")), add("--password", "--json", typed=(USER, WORD, CODE))
    assert wrong.returncode and "password or the one-time code is wrong" in wrong.stderr and not wrong.stdout
    assert done.returncode == 0 and json.loads(done.stdout)["kind"] == "refresh", done.stderr
    assert all(word in done.stderr for word in ("User name", "Password", "One-time code"))
    assert not any(secret in done.stderr + done.stdout for secret in (WORD, CODE))
    assert json.loads(run("accounts", "list", "--json", "--data-dir", str(tmp_path)).stdout)["email"] == USER
    weather.add("/u/login/password", status(403, "<title>Just a moment...", "text/html"))
    assert "chatproxy.py login" in add("--password", typed=(USER, WORD)).stderr
    for usage in (add(), add("--password", "x")):
        assert usage.returncode == 2 and "--password" in usage.stderr


def native(proxy: Proxy, method: str, path: str, **options: Any) -> httpx.Response:
    return admin(proxy, method, path, KEY, **options)


def test_a_conversation_is_known_to_its_account_from_its_beginning(start: Callable[..., Proxy]) -> None:
    proxy = start("alice", "bob", "carol")
    for _ in range(4):
        made = native(proxy, "POST", "/conversation", json={"messages": [{"content": {"parts": ["hi"]}}]})
        id = re.search(r'"conversation_id": ?"([^"]+)"', made.text)
        assert id and native(proxy, "GET", f"/conversation/{id[1]}").json()["conversation_id"] == id[1]


def test_signing_in_takes_a_key_of_the_server_and_leaves_nothing_open(start: Callable[..., Proxy]) -> None:
    proxy = start()
    right = {"username": "person@demo.example", "password": "password"}
    for key in ("sk-whoever", cp.demo_token("anybody"), "rt_" + "x" * 40):
        assert error_of(admin(proxy, "POST", "/auth/login", key, json=right)) == (401, "invalid_api_key")
    open_files = len(os.listdir("/proc/self/fd"))
    for _ in range(10):
        assert native(proxy, "POST", "/auth/login", json=right).status_code == 200
    assert len(os.listdir("/proc/self/fd")) - open_files < 10


def test_a_sign_in_that_leads_nowhere_is_a_challenge(start: Callable[..., Proxy], weather: Weather) -> None:
    proxy = start()
    right = {"username": "person@demo.example", "password": "password"}
    for place in ("http://[x", "https://elsewhere.example/", "/authorize", ""):
        weather.add("/authorize", *[status(302, Location=place)] * 20)
        answer = native(proxy, "POST", "/auth/login", json=right)
        assert error_of(answer) == (403, "challenge_required"), place
        weather.faults["/authorize"].clear()


def test_a_head_is_answered_as_its_get_would_be(start: Callable[..., Proxy]) -> None:
    proxy = start("alice", upstream_timeout="3")
    made = native(proxy, "POST", "/conversation", json={"messages": [{"content": {"parts": ["hi"]}}]})
    id = re.search(r'"conversation_id": ?"([^"]+)"', made.text)
    assert id and native(proxy, "HEAD", f"/conversation/{id[1]}").status_code == 200


def test_a_failure_in_the_middle_of_an_event_is_an_event_of_its_own(
    start: Callable[..., Proxy], weather: Weather
) -> None:
    proxy = start("alice")
    weather.add("/conversation", cut_stream(b'data: {"message": {"author": {"role": "assist'))
    got = native(proxy, "POST", "/conversation", json={"messages": [{"content": {"parts": ["hi"]}}]}).text
    assert got.split("\n\n")[1].startswith('data: {"error":') and "assist" in got


@pytest.mark.parametrize("end", [b"\n\n", b"\r\n\r\n", b"\n", b""])
@given(cuts=st.lists(st.integers(0, 60), max_size=6))
def test_a_done_is_taken_out_however_it_is_cut(end: bytes, cuts: list[int]) -> None:
    line = end[: len(end) // 2] or b"\n"
    text = b"data: {}" + line * 2 + b"data: [DONEY]" + line * 2
    wire, places = text + b"data: [DONE]" + end, sorted({0, *cuts})
    pieces = [wire[a:b] for a, b in zip(places, [*places[1:], len(wire)], strict=True)]
    without = cp.WithoutDone()
    got = b"".join([*map(without.feed, pieces), without.end()])
    assert got.rstrip() == text.rstrip() and got.startswith(text)


def test_clearing_needs_an_account_and_passes_over_those_that_are_set_aside(
    start: Callable[..., Proxy], weather: Weather
) -> None:
    proxy = start()
    body, path = {"is_visible": False}, "/conversations?all_accounts=true"
    assert error_of(admin(proxy, "PATCH", path, json=body)) == (503, "no_account")
    proxy.app.pool.add([cp.demo_token("alice"), cp.demo_token("bob")])
    bob = next(one for one in proxy.app.pool.accounts() if one.row.email.startswith("bob"))
    proxy.app.pool.disable([bob.id], True)
    assert admin(proxy, "PATCH", path, json=body).json() == {"success": True}
    weather.add("/conversations", status(404))
    refused = admin(proxy, "PATCH", path, json=body)
    assert error_of(refused) == (502, "upstream_error") and "alice@demo.example" in refused.text


# --- nobody gets in, and nobody knocks it over ------------------------------------------------------------------------

FORGED = cp.demo_token("nobody").rpartition(".")[0] + ".forged"
JUNK = ["sk-junk", FORGED, "rt_" + "j" * 40, "J" * 45]
ADDRESSES = itertools.count(1)


def bytes_of(
    method: str,
    target: str,
    body: bytes | str = b"",
    key: str | None = None,
    *lines: str,
    length: int | None = None,
) -> bytes:
    """A request as bytes, closed after its answer."""
    body = body.encode() if isinstance(body, str) else body
    head = [f"{method} {target} HTTP/1.1", "Host: x", "Connection: close", *lines]
    head += [f"Authorization: Bearer {key}"] if key is not None else []
    if body or length is not None:
        head.append(f"Content-Length: {len(body) if length is None else length}")
    return "\r\n".join([*head, "", ""]).encode() + body


def status_of_bytes(address: tuple[str, int], data: bytes, pieces: int = 1) -> int:
    """The status of the answer to some bytes, which come from a loopback address of their own; 0 for none."""
    number = next(ADDRESSES)
    source = (f"127.{number // 250 % 200 + 1}.{number % 250 + 1}.9", 0)
    with socket.create_connection(address, timeout=20, source_address=source) as sock:
        step = max(1, len(data) // pieces)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        with contextlib.suppress(ConnectionError):
            for at in range(0, len(data), step):
                sock.sendall(data[at : at + step])
        got = b""
        with contextlib.suppress(ConnectionError, TimeoutError):
            while b"\r\n\r\n" not in got and (more := sock.recv(65536)):
                got += more
            while sock.recv(65536):
                pass
    return int(got[9:12] or 0)


def chat(**body: Any) -> str:
    return json.dumps({"model": "gpt-4o", "messages": [{"role": "user", "content": "hi"}]} | body)


def refers() -> dict[str, Any]:
    """A schema of few bytes that branches without end."""
    branch = {"anyOf": [{"$ref": "#/$defs/a"}] * 9}
    return {
        "$defs": {"a": {"type": "object", **branch, "additionalProperties": {"$ref": "#/$defs/a"}}}
    } | branch


CHAT, LIMITS = "/v1/chat/completions", "x" * 60_000
BY_SCHEMA = {"type": "json_schema", "json_schema": {"name": "x", "schema": refers()}}
BY_ENUM = {
    "type": "json_schema",
    "json_schema": {
        "name": "x",
        "schema": {"type": "object", "not": {"enum": [{"a": [[n]] * 3} for n in range(3000)]}},
    },
}
PRIVATE = (
    "http://127.0.0.1:9/x", "http://localhost:9/", "http://[::1]:9/", "http://169.254.169.254/latest", "http://0x7f.1/",
    "http://2130706433/", "http://[::ffff:127.0.0.1]/", "ftp://example.com/x", "file:///etc/passwd",
)  # fmt: skip

# What somebody without a key sends, and what it is answered with.
STRANGE: list[tuple[str, bytes, int]] = [
    *((f"GET {target}", bytes_of("GET", target), 400) for target in (
        "//metrics", "//x/metrics#://", "/metrics#x", "/\\metrics", "/x\\..\\metrics", "/%2fmetrics", "/v1%2fmodels",
        "/%2Fv1/models", "/%5cmetrics", "/%6detrics", "/metric%73", "/%2e%2e/metrics", "/metrics%00", "/metrics%0d%0aX:1",
        "/metrics%zz", "/metrics%", "/metrics%ff", "http://x@127.0.0.1/metrics", "ftp://x/metrics", "http:///metrics",
        "https://x//metrics", "metrics", "://x/metrics", "http://x:y/metrics", "/metrics?a#b", "/v1//models", "*",
        "/metrics%7f", "/v1/models//", "http://[/metrics", "/?" + "&" * 1100,
    )),
    *((f"GET {target}", bytes_of("GET", target), 404) for target in (
        "/x/../metrics", "/./metrics", "/metrics/", "/METRICS", "/metrics;x", "/%252e%252e/metrics", "/.env",
        "/.git/config", "/wp-login.php", "/admin", "/actuator/health", "/v1", "/health/..", "/tokens/..%3b/x",
    )),
    *((f"GET {target} without a key", bytes_of("GET", target), 401) for target in (
        "/v1/models", "/v1/files", "/v1/files/x/content", "/conversations", "/backend-api/conversation/x", "/admin/users",
        "/tokens/list", "/tokens/add/x", "/api/connections", "/v1/responses/resp_x", "/v1/embeddings", "/client/register",
    )),
    *((f"a key that is none: {key[:40]}", bytes_of("POST", CHAT, chat(), key), 401) for key in (
        "login-free", "free-caller", "acc-0123456789", "", "x", KEY + "x", KEY[:-1], KEY.upper(), f" {KEY}x", f"{KEY},x",
        f'{{"accessToken":"{FORGED}"}}', f'"{FORGED}"', f"{cp.SESSION_COOKIE}={FORGED}", "demo", "null", "undefined",
        "eyJhbGciOiJub25lIn0.e30.", f"{FORGED},a b", "Bearer " + KEY, "key-", "user-", "admin", *JUNK,
        "eyJ" + base64.urlsafe_b64encode(b'{"exp":' + b"9" * 20 + b"}").decode().rstrip("=") + ".e30.x",
        "eyJhbGciOiJub25lIn0." + base64.urlsafe_b64encode(b"[" * 9000).decode() + ".x",
    )),
    *((f"POST {path} as login-free", bytes_of("POST", path, "{}", "login-free"), 401) for path in (
        "/auth/login", "/auth/refresh", "/auth/session", "/api/ask", "/conversation", "/v1/responses", "/v1/files",
    )),
    *((f"POST {path} with a forged token", bytes_of("POST", path, "{}", FORGED), 401) for path in (
        "/auth/login", "/auth/refresh", "/auth/session", "/api/ask", "/conversation", "/v1/files", "/v1/audio/speech",
    )),
    *((f"POST {path}, 20 MB to come", bytes_of("POST", path, b"x" * 50_000, None, length=20_000_000), 401) for path in (
        CHAT, "/v1/responses", "/v1/files", "/tokens/upload", "/conversation", "/auth/login",
    )),
    ("chunks without end", bytes_of("POST", CHAT, b"", None, "Transfer-Encoding: chunked") + b"1\r\nx\r\n" * 9000, 401),
    ("a head byte by byte", bytes_of("GET", "/ping", b"", None, *["X: " + "y" * 300] * 90), 200),
    ("a public body of one-byte chunks",
     bytes_of("POST", "/tokens/session", b"", None, "Transfer-Encoding: chunked") + b"1\r\n{\r\n" * 9000 + b"0\r\n\r\n", 400),
    ("a public body that is too long", bytes_of("POST", "/tokens/session", b"x" * 65537), 413),
    ("… in chunks", bytes_of("POST", "/tokens/session", b"", None, "Transfer-Encoding: chunked") + b"20000\r\n", 413),
    ("nested lists", bytes_of("POST", "/tokens/session", b'{"key":' + b"[" * 60_000), 400),
    ("nested objects", bytes_of("POST", "/tokens/session", b'{"key":' * 8000), 400),
    ("many values", bytes_of("POST", "/tokens/session", b"[" + b"0," * 30_000 + b"0]"), 400),
    ("surrogates", bytes_of("POST", "/tokens/session", b'{"key":"' + b"\\ud800" * 9000 + b'"}'), 401),
    ("an administrator by the body", bytes_of("POST", "/admin/users/add", '{"admin_key": "wrong"}'), 401),
    ("… whose body is long", bytes_of("POST", "/admin/users/add", b"x" * 65537), 413),
    ("… by the query", bytes_of("GET", "/admin/users?admin_key=wrong"), 401),
    ("a forged session", bytes_of("GET", "/tokens/list", b"", None, f"Cookie: chatproxy_admin_0={'x' * 43}"), 401),
    ("two keys", bytes_of("GET", "/v1/models", b"", KEY, f"Authorization: Bearer {KEY}"), 400),
    ("two lengths", bytes_of("POST", CHAT, b"x", None, "Content-Length: 1"), 400),
    ("a body of a GET", bytes_of("GET", "/ping", b"x" * 65537), 413),
    ("another method", bytes_of("TRACE", "/ping"), 405),
    ("a made-up method", bytes_of("EVIL", "/ping"), 405),
    ("CONNECT", bytes_of("CONNECT", "x:80"), 400),
    ("many headers", bytes_of("GET", "/ping", b"", None, *["X: y"] * 120), 431),
    ("a long header", bytes_of("GET", "/ping", b"", None, "X: " + "y" * 40_000), 431),
    ("a long URL", bytes_of("GET", "/" + "x" * 9000), 414),
    ("an expectation", bytes_of("POST", CHAT, b"x", None, "Expect: wonders"), 417),
    ("an agent from a foreign page", bytes_of("GET", f"/client/register?key={KEY}", b"", None, "Origin: http://x"), 403),
    ("an agent with a wrong key", bytes_of("GET", "/client/register?key=wrong"), 401),
    ("a relayed call to another host", bytes_of("GET", "%2fv1%2fx@127.0.0.1:9/x", b"", "sk-x"), 400),
    ("… by an encoded slash", bytes_of("GET", "/v1%2fx@127.0.0.1:9/x", b"", "sk-x"), 400),
    ("… by the absolute form", bytes_of("GET", "http://x@127.0.0.1:9/v1/x", b"", "sk-x"), 400),
    ("… to what is not /v1", bytes_of("GET", "/conversations", b"", "sk-x"), 401),
]  # fmt: skip

# What somebody with a key sends.
HEAVY: list[tuple[str, bytes, int]] = [
    *((name, bytes_of("POST", CHAT, body, KEY), code) for name, body, code in (
        ("nested lists", b'{"messages":' + b"[" * 100_000, 400),
        ("nested objects", b'{"a":' * 20_000, 400),
        ("empty lists", b'{"messages":[' + b"[]," * 30_000 + b"[]]}", 400),
        ("50,000 values", b'{"messages":[' + b"0," * 50_000 + b"0]}", 400),
        ("objects", b'{"messages":[' + b'{"a":0},' * 12_000 + b"0]}", 400),
        ("surrogates", chat(user="\ud800" * 15_000), 200),
        ("a number of 90,000 digits", b'{"max_tokens":' + b"9" * 90_000 + b"}", 400),
        ("a number of 4,000 digits", chat(max_tokens=10**4000), 200),
        ("infinity", chat().replace('"hi"', '"hi"').encode()[:-1] + b',"temperature":1e999}', 400),
        ("NaN", chat().encode()[:-1] + b',"temperature":NaN}', 400),
        ("a schema that branches without end", chat(response_format=BY_SCHEMA), 200),
        ("an enum of 60 KB", chat(response_format=BY_ENUM), 200),
        ("500 functions", chat(tools=[{"type": "function", "function": {"name": f"f{n}"}} for n in range(500)]), 200),
        ("a model's name of 10 KB", chat(model="x" * 10_000), 400),
        ("stop sequences", chat(stop=["a" * 256] * 16), 200),
        ("too many of them", chat(stop=["a"] * 17), 400),
        ("10,000 messages", chat(messages=[{"role": "user", "content": ""}] * 3000), 200),
        ("101 files", chat(messages=[{"role": "user", "content": [
            {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}] * 101}]), 400),
        ("base64 that is none", chat(messages=[{"role": "user", "content": [
            {"type": "image_url", "image_url": {"url": "data:;base64,!"}}]}]), 400),
        ("a compressed body", gzip.compress(chat().encode()), 400),
        ("UTF-16", chat().encode("utf-16"), 400),
        ("a conversation of others", chat(conversation_id="c-1"), 400),
    )),
    *((f"fetching {url}", bytes_of("POST", CHAT, chat(messages=[{"role": "user", "content": [
        {"type": "image_url", "image_url": {"url": url}}]}]), KEY), 400) for url in PRIVATE),
    *((name, bytes_of("POST", "/v1/responses", json.dumps({"model": "gpt-4o", "input": "hi"} | body), KEY), code)
      for name, body, code in (
        ("a long user", {"user": "x" * 90_000}, 200),
        ("long metadata", {"metadata": {"x" * 65: "y"}}, 400),
        ("long instructions", {"instructions": LIMITS}, 200),
        ("an unknown response", {"previous_response_id": "' OR 1=1 --"}, 404),
        ("an unknown item", {"input": [{"type": "item_reference", "id": "msg_x"}]}, 404),
    )),
    ("a form of 1,001 fields", bytes_of("POST", "/tokens/upload", f"text={cp.demo_token('zoe')}" + "&a=b" * 1100, ADMIN), 400),
    ("a form of 101 parts", bytes_of("POST", "/v1/files", (
        b'--x\r\nContent-Disposition: form-data; name="a"\r\n\r\nb\r\n' * 101) + b"--x--\r\n", KEY,
        "Content-Type: multipart/form-data; boundary=x"), 400),
    ("a form with nothing but boundaries", bytes_of("POST", "/v1/files", b"--x\r\n" * 15_000, KEY,
        "Content-Type: multipart/form-data; boundary=x"), 400),
    ("one-byte chunks", bytes_of("POST", CHAT, b"", KEY, "Transfer-Encoding: chunked") + b"1\r\n{\r\n" * 16_000
     + b"0\r\n\r\n", 400),
    ("the administrator's with a caller's key", bytes_of("GET", "/tokens/list", b"", KEY), 401),
    ("everybody's conversations", bytes_of("PATCH", "/conversations?all_accounts=true", "{}", KEY), 401),
    ("another's response", bytes_of("GET", "/v1/responses/resp_0", b"", KEY), 404),
    ("another's file", bytes_of("GET", "/v1/files/file-0/content", b"", KEY), 404),
    ("ids without end", bytes_of("POST", "/tokens/check", json.dumps({"ids": ["x"] * 101}), ADMIN), 400),
    ("an offset without end", bytes_of("GET", "/conversations?offset=99999999999", b"", KEY), 400),
]  # fmt: skip


class Pings:
    """Asks /ping again and again, and notes how long the longest answer took."""

    def __init__(self, url: str) -> None:
        self.slowest, self._over = 0.0, False
        self._thread = threading.Thread(target=self._run, args=(url,), daemon=True)

    def _run(self, url: str) -> None:
        with httpx.Client() as client:
            while not self._over:
                began = time.monotonic()
                assert client.get(f"{url}/ping").status_code == 200
                self.slowest = max(self.slowest, time.monotonic() - began)
                time.sleep(0.01)

    def __enter__(self) -> Pings:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over = True
        self._thread.join()


def cost(process: Process, address: tuple[str, int], data: bytes, pieces: int) -> tuple[int, float, float]:
    """A request's status, and what it cost: seconds of CPU time, and MB of memory at its peak."""
    pathlib.Path(f"/proc/{process.pid}/clear_refs").write_text("5")  # the peak begins anew
    memory, cpu = process.memory(), process.cpu()
    code = status_of_bytes(address, data, pieces)
    return code, process.cpu() - cpu, process.memory() - memory


def hostile(weather: Weather) -> None:
    """The upstream as the attacks want it."""
    weather.dead.add(FORGED)
    weather.add("/v1/models", *[status(401, {"error": {"code": "invalid_api_key"}})] * 1000)
    weather.words = ["It is ", '{"a": {"b": {"c": {}}}} ' * 60, '{"a": [[3001]]}']


@pytest.mark.parametrize("attacks", [STRANGE, HEAVY], ids=["strange", "heavy"])
def test_every_attack_has_its_answer(
    attacks: list[tuple[str, bytes, int]], start: Start, weather: Weather
) -> None:
    assert len(STRANGE) + len(HEAVY) >= 120
    hostile(weather)
    proxy = start("alice")
    with concurrent.futures.ThreadPoolExecutor(8) as executor:
        found = executor.map(lambda attack: status_of_bytes(proxy.address, attack[1]), attacks)
        wrong = [(attack[0], code) for attack, code in zip(attacks, found, strict=True) if code != attack[2]]
    assert not wrong


@pytest.mark.parametrize(
    ("attacks", "seconds", "megabytes"), [(STRANGE, 0.05, 2.0), (HEAVY, 1.0, 60.0)], ids=["strange", "heavy"]
)
def test_no_request_costs_much_whatever_it_is(
    attacks: list[tuple[str, bytes, int]],
    seconds: float,
    megabytes: float,
    tmp_path: pathlib.Path,
    weather: Weather,
) -> None:
    """Each attack has its status, costs little, and others are answered meanwhile."""
    assert all(len(data) < 110_000 for _, data, _ in attacks)
    hostile(weather)
    env = {"DATA_DIR": str(tmp_path), "CHATGPT_BASE_URL": weather.url, "OPENAI_AUTH_URL": weather.url}
    env |= {"OPENAI_API_URL": weather.url, "AUTHORIZATION": KEY, "ADMIN_KEY": ADMIN}
    assert run("accounts", "add", cp.demo_token("alice"), env=env).returncode == 0
    wrong: list[tuple[Any, ...]] = []
    with Served(env=env) as served:
        process, address = Process(served.process.pid, 0), ("127.0.0.1", int(served.url.rpartition(":")[2]))
        for attempt in range(3):  # the first time some of it is loaded; and this machine may be busy
            wrong = []
            with Pings(served.url) as pings:
                for name, data, code in attacks:
                    found, cpu, memory = cost(process, address, data, len(data) if "byte by" in name else 1)
                    if found != code or cpu > seconds or memory > megabytes:
                        wrong.append((name, found, round(cpu, 3), round(memory, 1)))
            if pings.slowest > 0.25:
                wrong.append(("ping", pings.slowest))
            if attempt and not wrong:
                break
    assert not wrong


def user_of(proxy: Proxy, name: str = "") -> str:
    """The token of a new API user."""
    return str(admin(proxy, "POST", "/admin/users/add", json={"name": name}).json()["token"])


def test_a_word_is_no_key_even_while_an_agent_is_there(start: Start) -> None:
    proxy = start()
    agent = Browser(proxy)
    wait_until(lambda: proxy.app.agents.connected())
    for word in ("login-free", "free-caller", agent.id):
        assert put(proxy, key=word).status_code == 401
    assert not agent.asked and put(proxy).status_code == 200


def test_a_relayed_answer_is_passed_on_as_it_is(start: Start, weather: Weather) -> None:
    """What is compressed is not unpacked here, where it could become a thousand times as much."""
    proxy, bomb = start(), gzip.compress(bytes(40 << 20))
    weather.add("/v1/x@127.0.0.1:9/a b", lambda _: cp.Reply(200, bomb, headers={"Content-Encoding": "gzip"}))
    with httpx.stream(
        "GET", f"{proxy.url}/v1/x@127.0.0.1:9/a%20b?q=%2f", headers={"Authorization": "Bearer sk-x"}
    ) as answer:
        assert answer.headers["content-encoding"] == "gzip" and b"".join(answer.iter_raw()) == bomb
    assert (weather.seen[-1].path, weather.seen[-1].raw_query) == ("/v1/x@127.0.0.1:9/a b", "q=%2f")
    sent = weather.seen[-1].headers
    assert sent["accept-encoding"] == "identity" and KEY not in str(sent)
    weather.add("/v1/large", lambda _: cp.Reply(200, bytes(33 << 20)))
    large = httpx.get(f"{proxy.url}/v1/large", headers={"Authorization": "Bearer sk-x"}, timeout=30)
    assert error_of(large) == (502, "upstream_error")


def test_what_an_upstream_sends_has_an_end(start: Start, weather: Weather) -> None:
    proxy = start("alice", retry_times="0")
    bomb = gzip.compress(bytes(200 << 20))
    packed = {"Content-Encoding": "gzip", "Content-Type": "text/event-stream"}
    said = list(weather.say({"model": "gpt-4o"}, ["fine"]))
    for fault in (
        lambda _: cp.Reply(200, bomb, headers=packed),
        lambda _: cp.streamed((piece, 1) for piece in (*[b"data: " + b"x" * (1 << 20)] * 20, b"\n\n", *said)),
        lambda _: cp.Reply(200, b"", headers={f"X-{n}": "y" for n in range(400)}),
        lambda _: cp.Reply(200, b"", headers={"X": "y" * 200_000}),
        lambda _: cp.Reply(2000, b"{}"),
        lambda _: cp.Reply(99, b"{}"),
    ):
        weather.add("/conversation", fault)
        tracemalloc.start()
        assert error_of(proxy.ask()) == (502, "upstream_error")
        assert tracemalloc.get_traced_memory()[1] < 100 << 20
        tracemalloc.stop()
    for reply in (
        cp.Reply(200, b"{}", headers={f"X-{n}": "y" for n in range(400)}), cp.Reply(2000, b"{}"), cp.Reply(99, b"{}"),
    ):  # fmt: skip
        weather.add("/v1/odd", lambda _, reply=reply: reply)  # type: ignore[misc] # bound here
        odd = httpx.get(f"{proxy.url}/v1/odd", headers={"Authorization": "Bearer sk-x"})
        assert error_of(odd) == (502, "upstream_error")
    weather.add("/models", lambda _: cp.Reply(200, bomb, headers={"Content-Encoding": "gzip"}))
    assert error_of(web(proxy, "GET", "/v1/models")) == (502, "upstream_error")
    assert proxy.say() == "Hello wide world."


ODD_ANSWERS: list[dict[str, Any]] = [
    {"token": "a\r\nX-Evil: 1"}, {"token": "\ud800"}, {"token": ["a"]}, {"token": "x" * 20_000},
    {"proofofwork": []}, {"proofofwork": "required"}, {"proofofwork": {"required": True}},
    {"proofofwork": {"required": True, "seed": "\ud800", "difficulty": "00003b"}},
    {"proofofwork": {"required": True, "seed": "s" * 65, "difficulty": "00003b"}},
    {"proofofwork": {"required": True, "seed": "0.5", "difficulty": "x"}},
    {"proofofwork": {"required": True, "seed": "0.5", "difficulty": "f" * 33}},
    {"proofofwork": {"required": True, "seed": {"a": []}, "difficulty": 5}},
    {"arkose": []}, {"arkose": {"required": True, "dx": "\ud800"}}, {"turnstile": 5}, {"persona": []},
    {"expire_after": 10**400}, {"expire_after": -1}, {"expire_after": "soon"}, {"expire_after": None},
]  # fmt: skip


def test_odd_requirements_are_the_upstreams_fault_and_end_no_solver(
    start: Start, weather: Weather, monkeypatch: pytest.MonkeyPatch
) -> None:
    proxy = start("alice", retry_times="0", arkose_token_url=f"{weather.url}/arkose")
    monkeypatch.setattr(proxy.app.site, "prepare", lambda account: None)  # it would take some of the answers
    weather.difficulty = "0007"  # one in six of the hardest that are asked for is given up
    for odd in ODD_ANSWERS:
        answer = {"token": "good", "expire_after": 540} | odd

        def give(request: cp.Request, answer: dict[str, Any] = answer) -> cp.Reply:
            return cp.Reply(200, json.dumps(answer).encode())

        weather.add("/chat-requirements", give)
        weather.add("/arkose", status(200, {"token": "a\r\nX-Evil: 1"}))
        answered = proxy.ask()
        assert answered.status_code in (200, 403, 502), (odd, answered.text)
        assert not any("x-evil" in request.headers for request in weather.seen)
    weather.faults.clear()  # of which some may not have been asked for
    began = time.monotonic()
    assert proxy.say() == "Hello wide world." and time.monotonic() - began < 30


@pytest.mark.parametrize("odd", [10**400, -1, "x", None, [], {"a": 1}, True, 1e308, "1e999", "9" * 5000])
def test_no_wait_of_any_shape_is_our_fault(odd: Any, start: Start, weather: Weather) -> None:
    proxy = start("alice")
    weather.add("/conversation", status(429, {"detail": {"clears_in": odd}}, retry_after=str(odd)[:300]))
    answer = proxy.ask()
    assert (
        error_of(answer) == (429, "rate_limit_exceeded") and int(answer.headers["retry-after"]) <= 30 * 86400
    )


def test_an_upstream_can_set_only_so_many_cookies(start: Start, weather: Weather) -> None:
    proxy = start("alice")
    lines = "\r\nSet-Cookie: ".join(["big=" + "x" * 5000, *(f"c{n}=v" for n in range(200))])
    weather.add("/chat-requirements", lambda _: cp.Reply(200, b"{}", headers={"Set-Cookie": lines}))
    proxy.ask()
    (account,) = proxy.app.pool.accounts()
    assert 40 < len(account.cookies) <= cp.MAX_COOKIES and "big" not in account.cookies
    assert proxy.say() == "Hello wide world."


def test_an_upstream_that_is_public_names_no_private_place(start: Start, weather: Weather) -> None:
    proxy = start("alice", retry_times="0")
    proxy.app.site._private_gateways[weather.url] = False  # as chatgpt.com's is
    place = {"type": "file", "file": {"file_data": "data:text/plain;base64,QUFB", "filename": "a.txt"}}
    port = urllib.parse.urlsplit(weather.url).port
    places = [
        f"http://127.0.0.2:{port}/x",
        f"http://localhost:{port}/x",
        "http://[::1]:9/",
        "http://169.254.169.254/x",
    ]
    for url in (*places, "x:/\r\n"):
        weather.add("/files", status(200, {"file_id": "file-1", "upload_url": url}))
        assert error_of(proxy.ask(messages=[part_message(place)])) == (502, "upstream_error"), url
        weather.add("/download", status(200, {"download_url": url}))
        drawn = web(
            proxy, "POST", "/v1/images/generations", json={"prompt": "x", "response_format": "b64_json"}
        )
        assert drawn.status_code >= 400, url
    assert not any(request.path == "/x" for request in weather.seen)
    # Behind a proxy names are the proxy's to resolve, addresses are not.
    upstream, (account,) = proxy.app.site, proxy.app.pool.accounts()
    account.egress = account.egress._replace(proxy="http://127.0.0.1:9")
    ask = functools.partial(upstream.named_place, account, watch=cp.Watch())
    assert ask(url="https://files.example/x") == ""
    for url in ("https://10.0.0.1/x", "https://[fd00::1]/x", "https://localhost/x"):
        with pytest.raises(cp.Refusal):
            ask(url=url)
    account.egress = account.egress._replace(proxy="")
    assert ask(url=f"{weather.url}/x") == ""


def test_a_gateway_whose_name_is_not_known_yet_is_asked_for_again(start: Start, weather: Weather) -> None:
    proxy = start("alice", upstream=weather.url.replace("127.0.0.1", "localhost"))
    upstream, (account,), known = proxy.app.site, proxy.app.pool.accounts(), socket.getaddrinfo
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket, "getaddrinfo", lambda *_, **__: known("name.invalid", 1))
        assert not upstream._gateway_private(account.gateway, cp.Watch())
    assert upstream._gateway_private(account.gateway, cp.Watch())


def test_a_public_host_is_asked_at_the_addresses_that_were_looked_at(weather: Weather) -> None:
    handles, port = cp.Handles(LOOP), urllib.parse.urlsplit(weather.url).port
    place = f"files.example:{port}:127.0.0.1,[::1]"
    url = f"http://files.example:{port}/backend-api/me"
    with handles.call("a", cp.Egress("", ""), "GET", url, [], None, cp.Watch(), 5.0, place=place) as call:
        assert call.whole().status == 401
    assert weather.seen[-1].headers["host"] == f"files.example:{port}"
    handles.close()


def test_junk_tokens_leave_nothing_and_reach_nothing(start: Start, weather: Weather) -> None:
    proxy = start("alice")
    asked = [part_message({"type": "image_url", "image_url": {"url": f"{weather.url}/image.png"}})]
    weather.add("/v1/models", *[status(401, {"error": {"code": "invalid_api_key"}})] * 9)
    tokens = [FORGED[:-1] + letter for letter in "abc"]
    weather.dead.update(tokens)
    for key in (*tokens, "sk-junk"):
        assert error_of(proxy.ask(key=key, messages=asked)) == (401, "invalid_api_key")
    connections, pool = proxy.app.connections, proxy.app.pool
    wait_until(lambda: not connections.guest_handles.owners())
    assert not pool._guests and not proxy.store.accounts("guest=1")
    assert weather.count("/image.png") == weather.count("/files") == weather.count("/conversation") == 0
    real = cp.demo_token("guest")
    assert [proxy.ask(key=real).status_code for _ in range(2)] == [200, 200]
    assert weather.count("/me") == 4 and len(pool._guests) == 1  # asked about once


def test_guests_share_a_small_pool_of_connections() -> None:
    handles, route = cp.Handles(LOOP, together=True, most=3), cp.Egress("", "")
    with socket.create_server(("127.0.0.1", 0)) as closed:
        dead = f"http://127.0.0.1:{closed.getsockname()[1]}/"
    for name in "abcde":
        call = handles.call(name, route, "GET", "http://127.0.0.1:1/", [], None, cp.Watch(), 1.0)
        call.__exit__()
    assert handles.owners() == ["c", "d", "e"]
    used = handles.call("c", route, "GET", dead, [], None, cp.Watch(), 1.0)
    with pytest.raises(cp.Refusal), used:
        used.whole()
    LOOP.run(int)
    again = handles.call("c", route, "GET", dead, [], None, cp.Watch(), 1.0)
    assert again.handle is not used.handle and used.handle.easy is None  # what failed is not used again
    again.__exit__()
    handles.close()
    assert handles.owners() == []


def test_made_up_refresh_tokens_keep_no_account_from_its_renewal(start: Start, weather: Weather) -> None:
    refresh, slow = "rt_" + "r" * 40, threading.Event()
    weather.refresh_tokens[refresh] = "alice"

    def wait(request: cp.Request) -> cp.Reply | None:
        if request.json().get("refresh_token") == refresh:
            return None
        slow.wait(20)
        return cp.Reply(403, b'{"error": "invalid_grant"}')

    weather.add("/oauth/token", *[wait] * 100)
    proxy = start(refresh)

    def exchange(number: int) -> httpx.Response:
        """By a caller whose key is good, from an address of its own."""
        place, head = httpx.HTTPTransport(local_address=f"127.9.{number}.1"), {"Authorization": KEY}
        with httpx.Client(transport=place, timeout=60) as client:
            body = {"refresh_token": f"rt_{number:040}"}
            return client.post(f"{proxy.url}/auth/refresh", json=body, headers=head)

    with concurrent.futures.ThreadPoolExecutor(40) as executor:
        junk = [executor.submit(exchange, number) for number in range(40)]
        arriving = proxy.app.pool._arriving
        wait_until(lambda: sum(one.renewal is not None for one in arriving.values()) >= 32)
        began = time.monotonic()
        assert proxy.say() == "Hello wide world." and time.monotonic() - began < 10
        slow.set()
        assert {one.result().status_code for one in junk} <= {401, 429, 503}


def test_guesses_of_one_address_are_looked_at_one_after_another(start: Start) -> None:
    proxy = start("alice")
    began = time.monotonic()
    with concurrent.futures.ThreadPoolExecutor(60) as executor:
        codes = Counter(
            one.status_code for one in executor.map(lambda n: proxy.ask(key=f"guess-{n}"), range(60))
        )
    seconds = time.monotonic() - began
    assert set(codes) == {401, 429} and codes[401] <= cp.WRONG_KEYS + cp.MAX_WAITING + seconds + 2
    began = time.monotonic()
    with concurrent.futures.ThreadPoolExecutor(3) as executor:
        list(executor.map(lambda n: proxy.ask(key=f"guess-{n}"), range(3)))
    assert time.monotonic() - began >= 2 * cp.WRONG_KEY_DELAY and proxy.ask().status_code == 200


def test_one_address_cannot_take_all_connections(tmp_path: pathlib.Path) -> None:
    program = f"""
import socket, subprocess, sys, time
subprocess.run("ip link set lo up; ip addr add 192.0.2.1/32 dev lo; ip addr add 192.0.2.2/32 dev lo", shell=True, check=True)
served = subprocess.Popen(
    [sys.executable, {str(SCRIPT)!r}, "serve", "--host", "0.0.0.0", "--authorization", "k", "--port", "5005",
     "--max-connections-per-address", "3", "--data-dir", {str(tmp_path / "data")!r}], stderr=subprocess.PIPE, text=True)
while "listening" not in served.stderr.readline(): pass
def ping(place, opened=[]):
    sock = socket.create_connection((place, 5005), timeout=5, source_address=(place, 0))
    opened.append(sock)
    sock.sendall(b"GET /ping HTTP/1.1\\r\\nHost: x\\r\\n\\r\\n")
    return sock.recv(4096)[9:12].decode()
print(*[ping("192.0.2.1") for _ in range(5)], ping("192.0.2.2"), *[ping("127.0.0.1") for _ in range(5)])
for sock in ping.__defaults__[0]: sock.close()
end = time.monotonic() + 10
while (again := ping("192.0.2.1")) != "200" and time.monotonic() < end: pass
print(again)
served.kill()
"""
    ended = subprocess.run(
        ["unshare", "-rn", sys.executable, "-c", program], capture_output=True, text=True, timeout=60
    )
    if "unshare" in ended.stderr or "ip:" in ended.stderr:
        pytest.skip("no network of its own to be had here")
    assert ended.stdout.split() == ["200"] * 3 + ["503"] * 2 + ["200"] * 7, ended.stderr


def test_bodies_have_a_room_of_their_own(start: Start) -> None:
    proxy = start("alice")
    proxy.server.room = cp.Room(100_000, 3 << 20)
    bodies = [chat(user="x" * size) for size in (150_000, 5 << 20)]
    for body in bodies:
        refused = web(proxy, "POST", CHAT, content=body)
        assert error_of(refused) == (503, "overloaded") and int(refused.headers["retry-after"]) > 0
    # A large one needs room in memory too while it is read.
    small, proxy.server.room = proxy.server.room, cp.Room(3 << 19, 3 << 20)
    assert error_of(web(proxy, "POST", CHAT, content=chat(user="x" * (2 << 20)))) == (503, "overloaded")
    wait_until(lambda: proxy.server.room._left == {"memory": 3 << 19, "disk": 3 << 20})
    proxy.server.room = small
    assert [proxy.ask().status_code for _ in range(5)] == [200] * 5
    wait_until(lambda: proxy.server.room._left == {"memory": 100_000, "disk": 3 << 20})


def test_base64_that_is_none_is_found_in_time(start: Start) -> None:
    body = b'{"model": "gpt-4o", "messages": [' + b'{"url":"data:;base64,!"},' * 400_000 + b"0]}"
    proxy, began = start("alice"), time.process_time()
    assert web(proxy, "POST", CHAT, content=body).status_code == 400
    assert time.process_time() - began < 3


@pytest.mark.parametrize(
    "value", [b"[" * (8 << 20), b"{" * (4 << 20), b'"",' * (3 << 20), b"[]," * (3 << 20)]
)
def test_no_body_of_any_size_takes_long_to_be_refused(value: bytes, proxy: Proxy) -> None:
    began = time.process_time()
    assert web(proxy, "POST", CHAT, content=b'{"messages":[' + value).status_code == 400
    assert time.process_time() - began < 3


def test_counting_values_takes_no_memory() -> None:
    data = b'{"a":"' + b"\\n" * 2_000_000 + b"," * 260_000 + b'"}'
    tracemalloc.start()
    assert not cp.too_many_values(data)
    assert tracemalloc.get_traced_memory()[1] < 4 * len(data)
    tracemalloc.stop()
    assert cp.too_many_values(b"[" + b'"\\\\",' * 300_000)
    assert not cp.too_many_values(b'"\\"' + b"," * 600_000)  # one string, whose first quote is escaped


def test_text_full_of_brackets_is_one_value(proxy: Proxy) -> None:
    assert web(proxy, "POST", CHAT, content=chat(user='[{,"]},' * 300_000)).status_code == 200


def test_a_validation_ends_when_nobody_waits(start: Start, weather: Weather) -> None:
    asked = 0

    def check() -> None:
        nonlocal asked
        asked += 1
        if asked > 2:
            raise cp.ClientGone

    with pytest.raises(cp.ClientGone):
        cp.find_json('{"a": {"b": {"c": {}}}} ' * 60, refers(), cp.Budget(check))
    effort = cp.Budget()
    began = time.process_time()
    for _ in range(64):
        cp.find_json('{"a": {"b": {"c": {}}}} ' * 60, refers(), effort)
    assert time.process_time() - began < 2


def limit_files(process: int, size: int) -> None:
    """Lets a process make no file longer than this, as on a disk that is full; -1 ends that."""
    hard = resource.prlimit(process, resource.RLIMIT_FSIZE)[1]
    resource.prlimit(process, resource.RLIMIT_FSIZE, (hard if size < 0 else size, hard))


def test_a_full_disk_stops_only_what_must_be_kept(tmp_path: pathlib.Path, weather: Weather) -> None:
    refresh = "rt_" + "r" * 40
    weather.refresh_tokens[refresh] = "bob"
    env = {"DATA_DIR": str(tmp_path), "CHATGPT_BASE_URL": weather.url, "OPENAI_AUTH_URL": weather.url}
    env |= {"AUTHORIZATION": KEY, "ADMIN_KEY": ADMIN, "HISTORY_DISABLED": "false", "LOG_LEVEL": "warning"}
    assert run("accounts", "add", cp.demo_token("alice"), env=env).returncode == 0
    env["LOG_LEVEL"] = "info"
    with Served(env=env) as served, httpx.Client(base_url=served.url, timeout=30) as client:
        client.headers["authorization"] = f"Bearer {KEY}"

        def ask(**more: Any) -> httpx.Response:
            return client.post(CHAT, content=chat(**more))

        head = {"Authorization": f"Bearer {ADMIN}"}
        assert ask().status_code == 200 and client.get("/health?ready").status_code == 200
        limit_files(served.process.pid, 1)
        assert ask().status_code == 200  # remembered in memory, with a warning
        talk = ask().json()
        more = {"conversation_id": talk["conversation_id"], "parent_message_id": talk["message_id"]}
        assert ask(**more).status_code == 200
        response = client.post("/v1/responses", json={"model": "gpt-4o", "input": "hi"}).json()
        assert response["store"] is False and response["status"] == "completed"
        for path, given in (
            ("/tokens/upload", {"data": {"text": refresh}}),
            ("/admin/users/add", {"json": {}}),
        ):
            refused = client.post(path, headers=head, **given)
            assert refused.status_code == 503 and int(refused.headers["retry-after"]) > 0
        file = client.post("/v1/files", files={"file": ("a.txt", b"abc")}, data={"purpose": "user_data"})
        assert error_of(file) == (503, "store_unavailable")
        ready = client.get("/health?ready")
        assert (ready.status_code, ready.json()["status"]) == (503, "store_unavailable")
        assert client.get("/health").status_code == 200
        limit_files(served.process.pid, -1)
        wait_until(lambda: client.get("/health?ready").status_code == 200, 30)
        assert client.post("/tokens/upload", headers=head, data={"text": refresh}).json()["tokens_count"] == 2
        assert ask(**more).status_code == 200
        wait_until(lambda: cp.Store(str(tmp_path)).conversation(talk["conversation_id"]), 15)
        assert any("the store cannot be used" in line for line in served.lines)
        assert not any("Traceback" in line for line in served.lines)


def test_no_token_is_exchanged_while_there_is_no_room_to_keep_it(
    start: Start, weather: Weather, monkeypatch: pytest.MonkeyPatch
) -> None:
    refresh = "rt_" + "r" * 40
    weather.refresh_tokens[refresh] = "alice"
    proxy = start(refresh, retry_times="0")
    proxy.store._db.execute("PRAGMA query_only=ON")  # SQLite's own way to refuse writes
    assert error_of(proxy.ask()) == (503, "store_unavailable")
    assert weather.count("/oauth/token") == 0 and refresh in weather.refresh_tokens
    # Room that ends just when the token has come: it is kept in memory, and stored before it is used.
    proxy.app.pool.accounts()[0].retry_renewal = (0.0, 0)
    with monkeypatch.context() as patch:
        patch.setattr(proxy.store, "try_room", lambda: None)
        assert error_of(proxy.ask()) == (503, "store_unavailable")
    assert weather.count("/oauth/token") == 1 and weather.count("/conversation") == 0
    proxy.store._db.execute("PRAGMA query_only=OFF")
    proxy.app.pool.accounts()[0].retry_renewal = (0.0, 0)
    assert proxy.say() == "Hello wide world." and weather.count("/oauth/token") == 1
    assert proxy.store.accounts()[0].secret in weather.refresh_tokens


def test_a_store_that_cannot_be_used_is_said_in_one_line(tmp_path: pathlib.Path) -> None:
    def said(folder: str, *words: str) -> str:
        ended = run(*words, env={"DATA_DIR": str(tmp_path / folder), "PORT": "0"})
        assert ended.returncode == 2 and len(ended.stderr.splitlines()) == 1, ended.stderr
        assert "DATA_DIR" in ended.stderr and "Traceback" not in ended.stderr
        return ended.stderr

    def made(folder: str) -> pathlib.Path:
        (tmp_path / folder).mkdir(mode=0o700)
        env = {"DATA_DIR": str(tmp_path / folder)}
        assert run("accounts", "add", cp.demo_token("alice"), env=env).returncode == 0
        return tmp_path / folder / "chatproxy.db"

    both = (("serve",), ("accounts", "list"))
    path = made("noise")
    path.write_bytes(b"noise" * 5000)
    assert all("restore a copy" in said("noise", *words) for words in both)
    path = made("damaged")
    size = path.stat().st_size
    path.write_bytes(path.read_bytes()[:4096] + b"\xff" * (size - 4096))
    assert all("restore a copy" in said("damaged", *words) for words in both)
    made("foreign").unlink()
    with contextlib.closing(sqlite3.connect(path := tmp_path / "foreign" / "chatproxy.db")) as db:
        db.execute("PRAGMA user_version=3")
    path.chmod(0o600)
    assert all("tables of it are missing" in said("foreign", *words) for words in both)
    made("open").parent.chmod(0o755)
    assert "chmod 700" in said("open", "serve")
    made("readable").chmod(0o644)
    assert "chmod 600" in said("readable", "serve")
    path = made("linked")
    path.rename(tmp_path / "elsewhere.db")
    path.symlink_to(tmp_path / "elsewhere.db")
    (tmp_path / "elsewhere.db").chmod(0o644)
    assert "symbolic link" in said("linked", "serve")
    assert stat.S_IMODE((tmp_path / "elsewhere.db").stat().st_mode) == 0o644  # nothing of others is changed


def test_odd_rows_of_the_store_are_survived(tmp_path: pathlib.Path) -> None:
    env = {"DATA_DIR": str(tmp_path)}
    assert run("accounts", "add", cp.demo_token("alice"), env=env).returncode == 0
    store = cp.Store(str(tmp_path))
    store._write("UPDATE accounts SET cookies='no JSON', expires=1e18")
    listed = run("accounts", "list", env=env)
    assert listed.returncode == 0 and "9999-12-31" in listed.stdout
    far = cp.demo_token("bob", 1e18)
    assert run("accounts", "add", far, env=env).returncode == 2


def test_api_users_keep_to_what_they_have_begun(start: Start, weather: Weather) -> None:
    proxy = start("alice", history_disabled="false")
    ann, ben = user_of(proxy, "ann"), user_of(proxy, "ben")
    talk = proxy.ask(key=ann).json()
    id, said = talk["conversation_id"], {"model": "gpt-4o", "messages": [{"role": "user", "content": "and"}]}
    native = conversation_of(turn(proxy, ben))
    keep(weather, "alice", "c-old")

    def listed(key: str) -> tuple[set[str], int]:
        told = web(proxy, "GET", "/conversations", key).json()
        return {one["id"] for one in told["items"]}, told["total"]

    assert listed(ann) == ({id}, 1) and listed(ben) == ({native}, 1)
    for key in (KEY, ADMIN):
        assert listed(key) == ({id, native, "c-old"}, 3)
    assert listed(ann) == ({id}, 1)  # though all of them are known now
    before = weather.wanted()
    for theirs in (id, "c-old", "c-unknown"):
        for method, path, body in (
            ("GET", f"/conversation/{theirs}", None),
            ("PATCH", f"/conversation/{theirs}", HIDE),
            ("POST", f"/conversation/gen_title/{theirs}", {"message_id": "m"}),
            ("POST", "/conversation/message_feedback", {"conversation_id": theirs, "message_id": "m", "rating": "thumbsUp"}),
            ("POST", "/conversation", SAID | {"conversation_id": theirs}),
            ("POST", CHAT, said | {"conversation_id": theirs, "parent_message_id": talk["message_id"]}),
            ("POST", "/api/ask", {"content": "x", "conversation_id": theirs}),
        ):  # fmt: skip
            refused = web(proxy, method, path, ben, json=body)
            assert refused.status_code == 404 and weather.wanted() == before, path
    twice = f'{{"conversation_id": "{id}", "message_id": "m", "rating": "thumbsUp", "conversation_id": "{native}"}}'
    assert web(proxy, "POST", "/conversation/message_feedback", ben, content=twice).status_code == 200
    assert weather.last("/message_feedback").body.read().count(b"conversation_id") == 1
    for key in (ann, KEY, ADMIN):
        assert web(proxy, "GET", f"/conversation/{id}", key).status_code == 200
    goes_on = {"conversation_id": id, "parent_message_id": talk["message_id"]}
    assert proxy.ask(key=ann, **goes_on).status_code == 200
    for key in (ann, ben, KEY):
        assert web(proxy, "PATCH", "/conversations?all_accounts=true", key, json=HIDE).status_code == 401
    assert web(proxy, "PATCH", "/conversations?all_accounts=true", ADMIN, json=HIDE).status_code == 200


def test_an_api_user_cannot_show_the_model_anothers_file(start: Start, weather: Weather) -> None:
    proxy = start("alice")
    ann, ben = user_of(proxy, "ann"), user_of(proxy, "ben")
    client = openai.OpenAI(base_url=f"{proxy.url}/v1", api_key=ann, max_retries=0)
    file = client.files.create(file=("a.txt", b"secret"), purpose="user_data")
    (row,) = proxy.store.files("id=?", file.id)
    attached = {
        "content": {"parts": ["look"]},
        "metadata": {"attachments": [{"id": row.upstream, "name": "a.txt"}]},
    }
    pointed = {"content": {"parts": [{"asset_pointer": f"sediment://{row.upstream}#x"}]}}
    voice = {"audio_asset_pointer": {"asset_pointer": f"sediment://{row.upstream}"}}
    hidden = {"content": {"parts": [voice | {"content_type": "real_time_user_audio_video_asset_pointer"}]}}
    many = [{"id": f"file-{number}"} for number in range(200)]
    lost = {"content": {"parts": ["x"]}, "metadata": {"attachments": [*many, {"id": row.upstream}]}}
    assert turn(proxy, ben, messages=[lost]).status_code == 400
    prose = {"content": {"parts": ["see https://example.com/file-x and file-y"]}}
    assert turn(proxy, ben, messages=[prose]).status_code == 200
    for message in (attached, pointed, hidden):
        assert turn(proxy, ben, messages=[message]).status_code == 404
        assert turn(proxy, ann, messages=[message]).status_code == 200


def test_agents_conversations_belong_to_who_began_them(start: Start) -> None:
    proxy = start()
    agent = Browser(proxy)
    ann, ben = user_of(proxy, "ann"), user_of(proxy, "ben")
    wait_until(lambda: proxy.app.agents.connected())
    id = put(proxy, key=ann).json()["conversation_id"]
    assert put(proxy, "more", ann, conversation_id=id).status_code == 200
    asked = len(agent.asked)
    for unknown in (id, "c-unknown"):
        assert put(proxy, "mine", ben, conversation_id=unknown).status_code == 404
    goes_on = put(proxy, "more", KEY, conversation_id=id).json()  # who sees all may go on with all
    assert len(agent.asked) == asked + 1 and goes_on["conversation_id"] == id


def test_an_agent_that_hangs_up_leaves_its_question_to_the_pool(start: Start, weather: Weather) -> None:
    proxy = start("alice", upstream_order="agents,pool")
    for ask in (lambda: put(proxy).json()["content"], proxy.say):
        agent = Browser(proxy)
        agent.answers = lambda _: agent.die()  # noqa: B023 # it is asked in this round
        assert ask() == "Hello wide world." and agent.asked
        wait_until(lambda: not proxy.app.agents.connected())


def test_an_agent_takes_neither_a_place_nor_a_conversation_of_another(start: Start) -> None:
    proxy = start(agent_key="first-key")
    one = Browser(proxy, key="first-key")
    talk = put(proxy).json()["conversation_id"]
    two = Browser(proxy, key="first-key")
    wait_until(lambda: len(proxy.app.agents.connected()) == 2)
    # It answers with the id of the other's conversation: nobody is led there, and it stays the other's.
    one.answers, two.answers, two.claims = (lambda _: "mine"), (lambda _: "stolen"), talk
    for _ in range(4):
        said = put(proxy).json()
        assert said["conversation_id"] != talk or said["content"] == "mine"
    assert two.asked
    assert put(proxy, "on", conversation_id=talk).json()["content"] == "mine"
    # Nobody gets the place of one who is there and answers.
    three = Browser(proxy, cookie=one.id, key="first-key")
    wait_until(lambda: len(proxy.app.agents.connected()) == 3)
    assert put(proxy, "on", conversation_id=talk).json()["content"] == "mine" and not three.asked


FRONT = [
    "X-Forwarded-For", "X-Forwarded-Host", "X-Forwarded-Proto", "X-Forwarded-Anything", "Forwarded", "Via", "X-Real-IP",
    "CF-Connecting-IP", "CF-Ray", "True-Client-IP", "X-Client-IP", "X-Cluster-Client-IP", "Fly-Client-IP", "X-Original-URL",
    "X-Envoy-External-Address", "X-Amzn-Trace-Id", "Fastly-Client-IP", "CDN-Loop", "X-ProxyUser-Ip",
]  # fmt: skip


def test_administration_without_a_key_is_for_this_machine_asked_directly(start: Start) -> None:
    proxy = start("alice", authorization="", admin_key="")
    port = proxy.address[1]

    def code(*lines: str, version: str = "1.1", host: str = f"127.0.0.1:{port}") -> int:
        head = [f"GET /tokens/list HTTP/{version}", f"Host: {host}", "Connection: close", *lines, "", ""]
        return int(talk(proxy.address, "\r\n".join(head).encode())[9:12])

    assert code() == code(host=f"localhost:{port}") == 200
    for name in FRONT:
        assert code(f"{name}: 127.0.0.1") == 401, name
    for host in (
        "127.0.0.1",
        "x",
        f"x:{port}",
        f"127.0.0.1:{port + 1}",
        "",
        f"u@127.0.0.1:{port}",
        f"127.0.0.1.x:{port}",
    ):
        assert code(host=host) == 401, host
    assert code(version="1.0") == 401
    assert web(proxy, "POST", "/admin/users/add", None, json={"name": "ann"}).status_code == 200
    for path in ("/tokens/list", "/admin/users", "/api/connections"):
        assert web(proxy, "GET", path, None).status_code == 401
    assert web(proxy, "POST", "/tokens/clear", None).status_code == 401 and len(proxy.states()) == 1


def test_other_sites_pages_get_nothing_from_a_server_without_a_key(start: Start, weather: Weather) -> None:
    proxy = start("alice", authorization="")
    port, evil = proxy.address[1], "http://evil.example"
    for headers in (
        {"Origin": evil}, {"Origin": "null"}, {"Sec-Fetch-Site": "cross-site"}, {"Sec-Fetch-Site": "same-site"},
        {"Origin": f"{evil}:{port}", "Host": f"evil.example:{port}"},  # a name that was made to lead here
    ):  # fmt: skip
        answer = web(proxy, "POST", CHAT, None, content=chat(), headers=headers)
        assert error_of(answer) == (403, "origin_refused"), headers
        assert not any(name.startswith("access-control") for name in answer.headers)
    preflight = httpx.options(proxy.url + CHAT, headers={"Origin": evil})
    assert not any(name.startswith("access-control") for name in preflight.headers)
    assert weather.count("/conversation") == 0
    for headers in (
        {},
        {"Origin": proxy.url},
        {"Origin": f"http://localhost:{port}", "Host": f"localhost:{port}"},
    ):
        assert web(proxy, "POST", CHAT, None, content=chat(), headers=headers).status_code == 200
    hidden = start("alice", folder="hidden", authorization="", api_prefix="s3cret")
    own = {"Origin": "https://chat.example", "Host": "chat.example"}
    answer = web(hidden, "POST", f"/s3cret{CHAT}", None, content=chat(), headers=own)
    assert answer.status_code == 200  # its own page, which knows the prefix
    keyed = start("alice", folder="keyed")
    answer = web(keyed, "POST", CHAT, content=chat(), headers={"Origin": evil})
    assert answer.status_code == 200 and answer.headers["access-control-allow-origin"] == "*"


def test_a_callers_token_opens_what_it_proves_and_no_more(start: Start, weather: Weather) -> None:
    mine, yours = "rt_" + "m" * 40, "rt_" + "y" * 40
    weather.refresh_tokens[mine] = "alice"
    proxy = start(mine)
    assert proxy.say() == "Hello wide world."
    # An account whose id is that of another token, as one could be made for ten digits of a digest.
    (row,) = proxy.store.accounts()
    proxy.store._write("UPDATE accounts SET id=?", cp.recognise(yours).id)
    proxy.app.pool.reload()
    for key in (yours, mine, cp.recognise(yours).id, row.secret[:-1]):
        assert error_of(proxy.ask(key=key)) == (401, "invalid_api_key")
    assert proxy.ask(key=row.secret).status_code == 200
    forged = row.access_token.rpartition(".")[0] + ".forged"
    weather.dead.add(forged)
    assert error_of(proxy.ask(key=forged)) == (401, "invalid_api_key")
    assert proxy.ask(key=row.access_token).status_code == 200
    # An account of the pool by its access token: another token of the same owner is not that one.
    bob = cp.demo_token("bob")
    pooled, forged = start(bob, folder="pooled"), bob.rpartition(".")[0] + ".forged"
    weather.dead.add(forged)
    assert error_of(pooled.ask(key=forged)) == (401, "invalid_api_key")
    assert pooled.ask(key=bob).status_code == 200


def test_a_fault_of_our_own_in_mid_stream_is_not_blamed_on_the_client(
    start: Start, weather: Weather, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    proxy = start("alice")

    def broken(self: Any, events: list[cp.Event]) -> tuple[bytes, int]:
        if any(isinstance(event, cp.Finish) for event in events):
            raise FileNotFoundError("a file of ours")
        return b"data: {}\n\n", 1

    monkeypatch.setattr(cp.CompletionStream, "feed", broken)
    weather.pace = 0.1  # so that the answer has begun
    answer = proxy.ask(stream=True)
    assert answer.status_code == 200 and answer.text.startswith("data: {}")
    assert '"code":"internal_error"' in answer.text and "a file of ours" not in answer.text


def test_answers_are_not_to_be_stored_and_methods_are_not_logged_as_they_come(tmp_path: pathlib.Path) -> None:
    with Served(env={"DATA_DIR": str(tmp_path), "AUTHORIZATION": KEY}) as served:
        head = {"Authorization": f"Bearer {KEY}"}
        for path in ("/v1/models", "/v1/files", "/nothing", "/v1/responses/x", "/metrics", "/conversations"):
            assert httpx.get(served.url + path, headers=head).headers["cache-control"] == "no-store", path
        address = ("127.0.0.1", int(served.url.rpartition(":")[2]))
        assert status_of_bytes(address, bytes_of("S3CRET-WORD", "/ping")) == 405
        wait_until(lambda: any("status=405" in line for line in served.lines))
        assert not any("S3CRET" in line for line in served.lines)


def test_what_is_kept_of_a_response_is_bounded_at_once(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    proxy = start("alice")
    ann, ben = user_of(proxy, "ann"), user_of(proxy, "ben")
    long = {"model": "gpt-4o", "input": "hi", "user": "x" * 200_000, "instructions": "y" * 40_000}
    made = web(proxy, "POST", "/v1/responses", ann, json=long).json()
    assert made["user"] is None and made["instructions"] == "y" * 40_000 and made["status"] == "completed"
    assert proxy.store._rows("SELECT MAX(LENGTH(response)) FROM responses")[0][0] < 80_000
    monkeypatch.setattr(cp, "MAX_RESPONSES_OF_ONE", 300_000)
    kept = [web(proxy, "POST", "/v1/responses", ben, json=long).json()["id"]]
    for _ in range(9):
        kept.append(web(proxy, "POST", "/v1/responses", ann, json=long).json()["id"])
    total = proxy.store._rows("SELECT SUM(LENGTH(response) + LENGTH(items)) FROM responses")[0][0]
    assert total < 500_000 and web(proxy, "GET", f"/v1/responses/{made['id']}", ann).status_code == 404
    assert web(proxy, "GET", f"/v1/responses/{kept[0]}", ben).status_code == 200
    assert web(proxy, "GET", f"/v1/responses/{kept[-1]}", ann).status_code == 200
    assert web(proxy, "GET", f"/v1/responses/{kept[-1]}", ben).status_code == 404


def test_1000_junk_keys_disturb_no_customer(tmp_path: pathlib.Path, weather: Weather) -> None:
    """As many a second as 10,000 a minute are, from many addresses."""
    weather.add("/v1/models", *[status(401, {"error": {"code": "invalid_api_key"}})] * 3000)
    env = {"DATA_DIR": str(tmp_path), "CHATGPT_BASE_URL": weather.url, "OPENAI_AUTH_URL": weather.url}
    env |= {"OPENAI_API_URL": weather.url, "AUTHORIZATION": KEY}
    assert run("accounts", "add", cp.demo_token("alice"), env=env).returncode == 0
    with Served(env=env) as served, httpx.Client(headers={"Authorization": f"Bearer {KEY}"}) as client:
        address = ("127.0.0.1", int(served.url.rpartition(":")[2]))
        place = pathlib.Path(f"/proc/{served.process.pid}")

        def seconds() -> float:
            began = time.monotonic()
            assert client.post(served.url + CHAT, content=chat(), timeout=30).status_code == 200
            return time.monotonic() - began

        def junk(number: int) -> int:
            forged = FORGED[:-6] + f"{number:06}"
            weather.dead.add(forged)
            key = (f"sk-{number}", forged, f"rt_{number:040}")[number % 3]
            time.sleep(max(0.0, began + number * 0.006 - time.monotonic()))
            return status_of_bytes(address, bytes_of("POST", CHAT, chat(), key))

        quiet = median(seconds() for _ in range(30))
        before = len(list((place / "fd").iterdir()))
        began = time.monotonic()
        with concurrent.futures.ThreadPoolExecutor(16) as executor:
            sent = [executor.submit(junk, number) for number in range(1000)]
            during, peak = [], 0
            while not all(one.done() for one in sent):
                during.append(seconds())
                peak = max(peak, len(list((place / "fd").iterdir())))
                time.sleep(0.02)
        assert {one.result() for one in sent} <= {401, 429, 503}
        # This machine has to make the junk too, so a little time is granted beside the twofold.
        assert median(during) < 2 * quiet + 0.05, (quiet, median(during), max(during))
        assert peak < before + 150  # nothing is kept of a stranger's
        wait_until(lambda: len(list((place / "fd").iterdir())) <= before + 4, 70)


def test_the_body_of_a_refused_request_is_never_the_next_request(proxy: Proxy) -> None:
    """Who is refused at the head may have sent a body, which nobody has looked at."""
    hidden = b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n"
    for line in ("POST /v1/responses", "POST /nothing", "POST /ping", "POST /tokens/upload", "OPTIONS /ping"):
        for framing, body in (
            (b"Content-Length: %d" % len(hidden), hidden),
            (b"Transfer-Encoding: chunked", b"%x\r\n%b\r\n0\r\n\r\n" % (len(hidden), hidden)),
        ):
            head = f"{line} HTTP/1.1\r\nHost: x\r\n".encode() + framing + b"\r\n\r\n"
            got = talk(proxy.address, head + body + hidden)
            assert got.count(b"HTTP/1.1 ") == 1 and b"chatproxy_" not in got, line
    got = talk(proxy.address, b"POST /v1/responses HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\n\r\n" + LAST)
    assert re.findall(rb"HTTP/1\.1 (\d+)", got) == [
        b"401",
        b"200",
    ]  # one without a body is followed by the next


def test_wrong_tokens_of_callers_count_as_wrong_keys(start: Start, weather: Weather) -> None:
    proxy = start("alice")
    weather.add("/v1/models", *[status(401, {"error": {"code": "invalid_api_key"}})] * 9)
    weather.dead.add(FORGED)
    for key in ("sk-junk", FORGED, "rt_" + "j" * 40, "wrong", "sk-other"):
        assert error_of(proxy.ask(key=key)) == (401, "invalid_api_key")
    began = time.monotonic()
    assert error_of(proxy.ask(key=FORGED)) == (401, "invalid_api_key")
    assert time.monotonic() - began >= cp.WRONG_KEY_DELAY
    # A key that OpenAI's API takes, though it may not do this; and one that it does not take any more.
    proxy.app.keys.guesses._wrong.clear()
    weather.faults["/v1/models"].clear()
    weather.add("/v1/models", status(401, {"error": {"message": "Missing scopes: api.model.read"}}))
    assert proxy.ask(key="sk-good").status_code == 200
    weather.add("/v1/chat/completions", status(401, {"error": {"code": "invalid_api_key"}}))
    assert proxy.ask(key="sk-good").status_code == 401 and len(proxy.app.keys.guesses._wrong) == 1
    assert proxy.ask(key="sk-good").status_code == 200
    assert weather.count("/v1/models") == 4
    weather.add("/v1/models", status(503))  # which says nothing of the key
    assert error_of(proxy.ask(key="sk-new")) == (502, "upstream_error")
    weather.add("/v1/models", status(401, {"error": {"code": "invalid_api_key"}}))
    assert error_of(proxy.ask(key="sk-new")) == (401, "invalid_api_key")


def test_requests_that_come_at_once_with_a_new_token_are_one_guests(start: Start, weather: Weather) -> None:
    proxy, refresh = start(), "rt_" + "n" * 40
    weather.refresh_tokens[refresh] = "newcomer"
    with concurrent.futures.ThreadPoolExecutor(4) as executor:
        asked = [executor.submit(proxy.ask, key=refresh) for _ in range(4)]
        assert [one.result().status_code for one in asked] == [200] * 4
    assert weather.count("/oauth/token") == 1 and len(proxy.app.pool._guests) == 1


def test_a_token_of_the_pool_is_not_exchanged_for_another_workspace(start: Start, weather: Weather) -> None:
    refresh = "rt_" + "w" * 40
    weather.refresh_tokens[refresh] = "alice"
    weather.rotate = False
    proxy = start(refresh)
    assert proxy.say() == "Hello wide world."
    assert error_of(proxy.ask(key=f"{refresh},elsewhere")) == (401, "invalid_api_key")
    assert proxy.ask(key=refresh).status_code == 200 and weather.count("/oauth/token") == 1


def test_comparing_is_an_effort_too() -> None:
    large = [[list(range(100_000))]]  # whose inner items no branch looks at but to compare them
    schema = {"anyOf": [{"enum": [large]}, {"const": large}, {"uniqueItems": True}] * 300}
    began = time.process_time()
    assert isinstance(cp.Schema(schema).fault(large), str)
    assert time.process_time() - began < 2


def test_a_commit_that_fails_leaves_nothing_open(tmp_path: pathlib.Path) -> None:
    store = cp.Store(str(tmp_path))
    store._db.execute("CREATE TABLE child (of TEXT REFERENCES accounts(id) DEFERRABLE INITIALLY DEFERRED)")
    with pytest.raises(sqlite3.IntegrityError):  # a fault of a program, not of the disk
        store._write("INSERT INTO child VALUES ('nobody')")  # refused when it is to be committed
    assert not store._db.in_transaction and not store.trouble
    store.put_user(cp.User("user-1", "ann", "00", 1.0))
    assert [user.id for user in cp.Store(str(tmp_path)).users()] == ["user-1"]


def test_a_guest_is_known_by_the_whole_digest(start: Start) -> None:
    proxy = start()
    tokens = [cp.demo_token(f"guest-{number}") for number in range(300)]
    assert len({guest_of(proxy, token).id for token in tokens}) == 300
    team = guest_of(proxy, f"{tokens[0]},team-1")
    assert team.id != guest_of(proxy, tokens[0]).id and len(team.id) > 64


def test_a_start_page_of_any_shape_holds_nobody_up(start: Start, weather: Weather) -> None:
    proxy = start("alice")
    for number, page in enumerate((
        "<script " * 40_000, "<html " * 40_000, "<html" + " " * 300_000, '<script src="' * 20_000,
        f'<html data-build="{"b" * 90_000}"><script src="{"s" * 51_000}"></script>',
    )):  # fmt: skip
        weather.add("/", status(200, page, "text/html"))
        proxy.app.site._pages.clear()
        weather.difficulty = "0007"  # hard enough for a solver process
        proxy.app.pool.accounts()[0].spare = None
        began = time.process_time()
        assert proxy.say() == "Hello wide world.", number
        assert time.process_time() - began < 3, number
    wait_until(lambda: SOLVER._waiting == {})


def test_a_solvers_answer_that_is_cut_ends_no_listener() -> None:
    SOLVER._socket.send(b"[0, []]")  # a job that is none
    long = ["seed", "0007", [*cp.fingerprint("d", "x" * 60_000, "en-US", cp.Page(), time.time())], "sha3"]
    with contextlib.suppress(OSError):  # too long a job may not even be sent
        SOLVER._socket.send(json.dumps([1, long]).encode())
    job = ("0.5", "0007", cp.fingerprint("d", "agent", "en-US", cp.Page(), time.time()), "sha3")
    began = time.monotonic()
    assert SOLVER.solved(job, cp.Watch()).startswith("gAAAAAB")
    assert time.monotonic() - began < cp.SOLVER_PATIENCE


def test_items_that_are_named_again_and_again_are_read_once(start: Start, weather: Weather) -> None:
    proxy = start("alice")
    weather.words = ["word " * 4000]
    made = web(proxy, "POST", "/v1/responses", json={"model": "gpt-4o", "input": "x"}).json()
    named = {"type": "item_reference", "id": made["output"][0]["id"]}
    said = {"role": "user", "content": "x"}

    def again(times: int) -> httpx.Response:
        return web(
            proxy, "POST", "/v1/responses", json={"model": "gpt-4o", "input": [named] * times + [said]}
        )

    assert again(3).status_code == 200
    began = time.process_time()
    assert error_of(again(1000)) == (413, "request_too_large")
    assert time.process_time() - began < 1
    weather.words = ["word " * 400_000]
    made = web(proxy, "POST", "/v1/responses", json={"model": "gpt-4o", "input": "x"}).json()
    named["id"] = made["output"][0]["id"]
    assert again(2).status_code == 200 and error_of(again(3)) == (413, "request_too_large")


def test_numbers_that_collide_are_compared_as_fast_as_others() -> None:
    schema = {"enum": [number * (2**61 - 1) for number in range(20_000)]}
    began = time.process_time()
    assert cp.Schema(schema).fault(5 * (2**61 - 1)) == "" and cp.Schema(schema).fault(7)
    assert time.process_time() - began < 1
    for fits, value in ((2**60, float(2**60)), (1e300, 1e300), (-(2**70), -(2**70)), (1, 1.0)):
        assert (
            cp.Schema({"enum": [fits]}).fault(value) == "" and cp.Schema({"const": fits}).fault(value) == ""
        )
    assert cp.Schema({"enum": [2**60]}).fault(2**60 + 1) and cp.Schema({"enum": [1]}).fault(True)


def test_a_token_that_the_upstream_will_not_speak_of_is_a_guess_all_the_same(
    start: Start, weather: Weather
) -> None:
    proxy = start("alice")
    weather.add("/me", *[status(code) for code in (403, 429, 500, 502, 403, 403, 403)])
    for number in range(cp.WRONG_KEYS):
        assert proxy.ask(key=cp.demo_token(f"junk-{number}")).status_code >= 400
    assert weather.count("/me") == cp.WRONG_KEYS  # none is asked about twice
    began = time.monotonic()
    assert proxy.ask(key=cp.demo_token("junk")).status_code >= 400
    assert time.monotonic() - began >= cp.WRONG_KEY_DELAY and proxy.ask().status_code == 200
    proxy.app.keys.guesses._wrong.clear()
    weather.faults["/me"].clear()
    for number in range(9):  # those that are accepted are none
        assert proxy.ask(key=cp.demo_token(f"guest-{number}")).status_code == 200
    assert not any(proxy.app.keys.guesses._wrong.values())


def test_one_address_does_not_take_all_places_of_new_tokens(start: Start, weather: Weather) -> None:
    proxy, held = start("alice"), threading.Event()

    def wait(request: cp.Request) -> cp.Reply:
        held.wait(20)
        return cp.Reply(401, b"{}")

    weather.add("/me", *[wait] * 30)
    with concurrent.futures.ThreadPoolExecutor(12) as executor:
        sent = [executor.submit(proxy.ask, key=cp.demo_token(f"junk-{number}")) for number in range(12)]
        wait_until(lambda: sum(one.done() for one in sent) >= 12 - cp.MAX_STRANGERS // 4 - cp.MAX_WAITING)
        asked = weather.count("/me")
        held.set()
        assert asked <= cp.MAX_STRANGERS // 4 and {one.result().status_code for one in sent} <= {
            401,
            429,
            503,
        }


def test_who_leaves_while_waiting_makes_nobody_wait_longer() -> None:
    guesses, gone = cp.Guesses(), cp.Watch()
    request = cp.Request("GET", "/", {}, {}, cp.Blob(), "127.0.0.1", gone)
    for _ in range(cp.WRONG_KEYS):
        guesses.slow_down(request, wrong=True)
    for _ in range(50):  # as if fifty had come and left
        guesses._waiting["127.0.0.1"] = (1, time.monotonic() + 50)
    began = time.monotonic()
    guesses.slow_down(request)
    assert time.monotonic() - began < 3


def test_what_a_token_says_of_its_owner_is_not_logged_before_it_is_accepted(
    tmp_path: pathlib.Path, weather: Weather
) -> None:
    said = {
        "exp": time.time() + 999,
        "https://api.openai.com/profile": {"email": 'admin" status=200 as=admin'},
    }
    forged = f"eyJhbGciOiJub25lIn0.{base64.urlsafe_b64encode(json.dumps(said).encode()).decode()}.x"
    weather.dead.add(forged)
    env = {"DATA_DIR": str(tmp_path), "CHATGPT_BASE_URL": weather.url, "AUTHORIZATION": KEY}
    with Served(env=env) as served:
        head = {"Authorization": f"Bearer {forged}"}
        assert httpx.post(served.url + CHAT, content=chat(), headers=head).status_code == 401
        wait_until(lambda: any("status=401" in line for line in served.lines))
        head = {"Authorization": f"Bearer {cp.demo_token('guest')}"}
        assert httpx.post(served.url + CHAT, content=chat(), headers=head).status_code == 200
        wait_until(lambda: any("as=guest@demo.example" in line for line in served.lines))
        assert not any("as=admin" in line or "WARNING" in line for line in served.lines)


@pytest.mark.parametrize(
    "detail", [[{"loc": None, "msg": "x"}], [{"loc": 5}], [{"loc": {"a": 1}}], [5, None, []], {"code": []}]
)
def test_no_refusal_of_any_shape_is_our_fault(detail: Any, start: Start, weather: Weather) -> None:
    proxy = start("alice", retry_times="0")
    for code in (400, 404, 413, 422, 429):
        weather.add("/conversation", status(code, {"detail": detail}))
        assert proxy.ask().status_code != 500
        proxy.app.pool.accounts()[0].waits = {}


def test_a_list_of_conversations_of_any_shape_is_merged(start: Start, weather: Weather) -> None:
    proxy = start("alice")
    for odd in (
        b'{"items": [{"id": "\\ud800"}, {"id": ["x"]}, {"id": "c-1"}], "total": NaN}',
        b'{"items": [{"id": "c-1", "update_time": 1e999}], "total": Infinity}',
        b'{"items": [{"id": "c-1", "update_time": -5}], "total": 1' + b"0" * 400 + b"}",
    ):
        weather.add("/conversations", lambda _, odd=odd: cp.Reply(200, odd))  # type: ignore[misc] # bound here
        told = web(proxy, "GET", "/conversations?limit=1").json()
        assert [one["id"] for one in told["items"]] == ["c-1"]


def test_an_upstreams_json_of_too_many_values_is_none(start: Start, weather: Weather) -> None:
    proxy = start("alice", retry_times="0")
    weather.add("/chat-requirements", lambda _: cp.Reply(200, b'{"a":[' + b"{}," * 400_000 + b"0]}"))
    assert error_of(proxy.ask()) == (502, "upstream_error")


def test_who_began_a_conversation_on_a_full_disk_keeps_it(start: Start, weather: Weather) -> None:
    proxy = start("alice")
    ann = user_of(proxy, "ann")
    proxy.store._db.execute("PRAGMA query_only=ON")
    id = conversation_of(turn(proxy, ann))
    assert (
        web(proxy, "GET", "/conversations", KEY).json()["total"] == 1
    )  # which makes it known without an owner
    assert web(proxy, "GET", f"/conversation/{id}", ann).status_code == 200
    proxy.store._db.execute("PRAGMA query_only=OFF")
    proxy.app.pool.hold({})
    assert not proxy.app.pool._unsaved_held and proxy.store.conversation(id).owner  # type: ignore[union-attr] # held
    assert web(proxy, "GET", f"/conversation/{id}", ann).status_code == 200


def test_a_browser_reads_nothing_under_a_name_that_was_made_to_lead_here(start: Start) -> None:
    proxy = start("alice", authorization="")
    port, browser = proxy.address[1], {"User-Agent": "Mozilla/5.0"}
    for path in ("/v1/models", "/metrics", "/health", "/"):
        rebound = web(proxy, "GET", path, None, headers=browser | {"Host": f"evil.example:{port}"})
        assert rebound.status_code == 403, path
        assert web(proxy, "GET", path, None, headers=browser).status_code == 200, path


def test_who_sends_all_before_reading_gets_the_refusal(proxy: Proxy) -> None:
    connection = http.client.HTTPConnection(*proxy.address, timeout=20)
    connection.request("POST", CHAT, bytes(19 << 20), {"Authorization": "wrong"})
    assert connection.getresponse().status == 401
    connection.close()


# --- the pages, in a real browser ------------------------------------------------------------------------------------

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
in_a_browser = pytest.mark.skipif(not CHROMIUM, reason="no Chromium here: apt-get install chromium")


class Tab:
    """A page of a server in Chromium, whose console is to stay free of errors."""

    def __init__(self, context: playwright.BrowserContext, url: str) -> None:
        self.page, self.errors = context.new_page(), list[str]()
        self.page.set_default_timeout(10_000)
        self.page.on("console", self._heard)
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.goto(url)

    def _heard(self, message: playwright.ConsoleMessage) -> None:
        if message.type == "error" and "Failed to load resource" not in message.text:
            self.errors.append(message.text)

    def press(self, name: str, **options: Any) -> None:
        self.page.get_by_role("button", name=name, exact=True).first.click(**options)

    def sees(self, text: str) -> None:
        self.page.get_by_text(text).first.wait_for()

    def row(self, name: str) -> playwright.Locator:
        return self.page.locator("#rows tr", has_text=name)

    def sign_in(self, key: str = ADMIN) -> None:
        self.page.get_by_label("Admin key").fill(key)
        self.press("Sign in")


@pytest.fixture
def tab() -> Iterator[Callable[..., Tab]]:
    """Opens pages: `tab(url, width=360)`."""
    quiet = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"]
    tabs: list[Tab] = []
    with playwright.sync_playwright() as driver:
        chromium = driver.chromium.launch(executable_path=CHROMIUM, args=[*quiet, "--disable-sync"])

        def open_(url: str, width: int = 1200, scheme: Any = "light") -> Tab:
            context = chromium.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
            tabs.append(Tab(context, url))
            return tabs[-1]

        yield open_
        for one in tabs:
            assert not one.errors
        chromium.close()


@in_a_browser
def test_the_pool_is_looked_after_on_its_page(
    start: Callable[..., Proxy], weather: Weather, tab: Callable[..., Tab], tmp_path: pathlib.Path
) -> None:
    proxy = start("alice", "bob", api_prefix="p")
    there = tab(f"{proxy.url}/p/tokens")
    page = there.page
    there.sign_in("wrong")
    there.sees("The admin key is wrong")
    there.sign_in()
    there.row("alice@demo.example").wait_for()
    assert page.evaluate("document.cookie") == "" and page.locator("#rows tr").count() == 2
    # What another process adds appears by itself; so does what is pasted and dropped.
    env = {"DATA_DIR": proxy.settings.data_dir}
    assert run("accounts", "add", cp.demo_token("carol"), env=env).returncode == 0
    there.row("carol@demo.example").wait_for()
    page.get_by_label("Tokens, one a line").fill(f"{cp.demo_token('dave')}\nnonsense\n")
    there.press("Add")
    there.row("dave@demo.example").wait_for()
    there.sees("line 2: not a token")
    assert page.get_by_label("Tokens, one a line").input_value() == ""
    file = tmp_path / "tokens.txt"
    file.write_text(cp.demo_token("erin"))
    page.locator("#files").set_input_files(file)
    there.row("erin@demo.example").wait_for()
    # One account after the other.
    there.row("alice@").get_by_role("button", name="Disable").click()
    there.row("alice@").get_by_text("disabled").wait_for()
    there.row("alice@").get_by_role("button", name="Check").click()
    there.row("alice@").get_by_text("not asked").wait_for()
    weather.dead.add(cp.Store(proxy.settings.data_dir).accounts("email=?", "bob@demo.example")[0].secret)
    there.row("bob@").get_by_role("button", name="Check").click()
    there.row("bob@").get_by_text("expired").first.wait_for()
    remove = there.row("carol@").get_by_role("button", name=re.compile("Remove|Sure|Really"))
    remove.click()
    page.wait_for_timeout(500)  # a double click is no answer to the question
    assert len(proxy.store.accounts()) == 5  # asked once more, in place
    remove.click()
    there.row("carol@").wait_for(state="detached")
    assert len(proxy.store.accounts()) == 4
    # All at once, when that is meant.
    for word in ("", "clea", "clear"):
        assert len(proxy.store.accounts()) == 4
        page.get_by_label("Type clear to go on").fill(word)
        there.press("Remove all")
    there.sees("There is no account yet")
    assert not proxy.store.accounts()
    there.press("Sign out")
    page.get_by_label("Admin key").wait_for()
    page.reload()
    page.get_by_label("Admin key").wait_for()


@in_a_browser
def test_api_users_are_made_and_removed_on_the_page(
    start: Callable[..., Proxy], tab: Callable[..., Tab]
) -> None:
    proxy = start("alice")
    there = tab(f"{proxy.url}/tokens")
    there.sign_in()
    there.page.get_by_label("Name", exact=True).fill("<b>bob</b>")
    there.page.get_by_label("Requests a day").fill("2")
    there.press("Add user")
    token = there.page.locator("code", has_text="cp-").inner_text()
    assert proxy.ask(key=token).status_code == 200
    there.page.reload()
    there.sees("1 of 2 requests")
    there.sees("<b>bob</b>")
    assert token not in there.page.content()
    remove = there.page.locator("#users").get_by_role("button")
    remove.click()
    there.page.wait_for_timeout(500)  # a double click is no answer to the question
    remove.click()
    there.page.locator("#users li").wait_for(state="detached")
    assert proxy.ask(key=token).status_code == 401


@in_a_browser
def test_the_page_shows_10_000_accounts_and_24_hours(
    start: Callable[..., Proxy], tab: Callable[..., Tab]
) -> None:
    proxy = start()
    proxy.app.pool.add([cp.demo_token(f"a{i}") for i in range(10_000)])
    for _ in range(3):
        proxy.say()
    there = tab(f"{proxy.url}/tokens")
    there.sign_in()
    there.row("demo.example").first.wait_for()
    took = []
    for _ in range(5):
        there.page.reload()
        there.row("demo.example").first.wait_for()
        took.append(there.page.evaluate("performance.now()"))
    assert median(took) < 1000, took  # 300 ms is the aim, on a machine that does nothing else
    there.sees("10,000")
    bars = there.page.locator("#chart rect.ready")
    assert bars.count() == 24 and float(bars.last.get_attribute("height") or 0) > 50
    assert "3 answers" in (there.page.locator("#chart svg").get_attribute("aria-label") or "")
    there.page.get_by_role("button", name="Next").click()
    there.sees("51–100 of 10,000")
    there.page.get_by_label("Search accounts").fill("a9999@")
    there.row("a9999@demo.example").wait_for()
    assert there.page.locator("#rows tr").count() == 1


@in_a_browser
def test_a_person_chats_and_stops(
    start: Callable[..., Proxy], weather: Weather, tab: Callable[..., Tab]
) -> None:
    proxy = start("alice", api_prefix="p")
    there = tab(f"{proxy.url}/p")
    page = there.page
    page.get_by_label("API key, kept until this tab is closed").fill(KEY)
    there.press("Use this key")
    page.get_by_label("Model").select_option("o3")
    thought = {
        "content": {"content_type": "thoughts", "thoughts": [{"summary": "Hm", "content": "I think."}]}
    }
    weather.before = [{"author": {"role": "assistant"}, **thought}]
    question = page.get_by_label("Message")
    question.fill("hello")
    question.press("Enter")
    there.sees("Hello wide world.")
    assert weather.asked()["model"] == "o3"
    assert not page.get_by_text("I think.").is_visible()
    page.get_by_text("Reasoning").click()
    assert page.get_by_text("I think.").is_visible()
    weather.before, weather.pace, weather.words = [], 0.05, [f"w{i} " for i in range(400)]
    question.fill("more")
    question.press("Enter")
    there.sees("w0 w1 w2")  # while it streams
    there.press("Stop")
    there.sees("Stopped.")
    said = page.locator("article").last.inner_text()
    assert "w2" in said and "w399" not in said
    weather.pace, weather.words = 0.0, ["Again."]
    question.fill("and now")
    there.press("Send")
    there.sees("Again.")
    told = [one["content"]["parts"][0] for one in weather.asked()["messages"]]
    assert told[:2] == ["hello", "Hello wide world."] and told[-1] == "and now" and "I think" not in str(told)
    weather.add("/conversation", *[status(500)] * 4)
    question.fill("oops")
    question.press("Enter")
    there.sees("The upstream failed with status 500")
    there.press("Try again")
    page.get_by_text("Again.").nth(1).wait_for()
    page.reload()
    there.press("New chat")  # the key is known still: nobody asks for it
    assert not page.get_by_role("dialog").is_visible()
    assert (
        page.evaluate("Object.values(sessionStorage)") == [KEY] and page.evaluate("localStorage.length") == 0
    )


HOSTILE = """<script>window.broken = 1</script><img src=x onerror="window.broken = 2"> & more

[one](javascript:window.broken=3) [two](JaVaScRiPt:window.broken=4) [three](java\tscript:window.broken=5)
[four](data:text/html,<script>window.broken=6</script>) [five](vbscript:x) [six](//evil.example/) <a href="javascript:1">x</a>
![seven](javascript:window.broken=7) ![eight](https://evil.example/?q=secret) [safe](https://good.example/a)

| <svg onload=window.broken=8> | b |
| --- | --- |
| `<script>` | **<iframe src=javascript:1>** |

```<script>
<script>window.broken = 9</script>
"""


@in_a_browser
def test_no_answer_can_run_a_script(
    start: Callable[..., Proxy], weather: Weather, tab: Callable[..., Tab]
) -> None:
    proxy = start("alice", authorization="")
    weather.words = in_pieces(HOSTILE, 5)
    there = tab(proxy.url)
    asked: list[str] = []
    there.page.on("request", lambda request: asked.append(request.url))
    there.page.get_by_label("Message").fill(HOSTILE)
    there.press("Send")
    there.page.locator("article", has_text="window.broken = 9").wait_for()
    there.page.get_by_role("button", name="Send").wait_for()
    answer = there.page.locator("article")
    links = answer.locator("a").evaluate_all("all => all.map(one => one.href)")
    assert links == ["https://good.example/a"]
    assert answer.locator("script, svg, iframe, img, a[href^=java]").count() == 0
    assert "<script>window.broken = 1</script>" in answer.inner_text()
    for link in answer.locator("a").all():
        assert "noopener" in (link.get_attribute("rel") or "")
    assert there.page.evaluate("window.broken") is None
    assert all(url.startswith(proxy.url) for url in asked)


@in_a_browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_pages_fit_a_narrow_screen(
    scheme: str, start: Callable[..., Proxy], weather: Weather, tab: Callable[..., Tab]
) -> None:
    proxy = start("alice", "a-person-with-quite-a-long-address-indeed", authorization="")
    weather.words = [
        "| a | b | c | d |\n|---|---|---|---|\n| one | " + "x" * 90 + " | three | four |\n\n" + "y" * 90
    ]
    pool, chat = tab(f"{proxy.url}/tokens", 360, scheme), tab(proxy.url, 360, scheme)
    pool.sign_in()
    pool.row("alice").wait_for()
    chat.page.get_by_label("Message").fill("z" * 200)
    chat.press("Send")
    chat.sees("yyyy")
    for one in (pool, chat):
        wide = "document.documentElement.scrollWidth - document.documentElement.clientWidth"
        assert one.page.evaluate(wide) == 0
        dark = one.page.evaluate("getComputedStyle(document.body).backgroundColor.match(/[0-9]+/)[0] < 100")
        assert dark == (scheme == "dark")


def test_the_pages_are_closed_to_others(proxy: Proxy) -> None:
    for path in ("/", "/tokens"):
        answer = httpx.get(proxy.url + path, headers=BROWSER)
        assert answer.status_code == 200 and answer.headers["content-type"] == "text/html; charset=utf-8"
        policy = answer.headers["content-security-policy"]
        for part in (
            "default-src 'none'",
            "frame-ancestors 'none'",
            "script-src 'sha256-",
            "base-uri 'none'",
        ):
            assert part in policy
        assert "unsafe" not in policy and answer.headers["x-content-type-options"] == "nosniff"
        assert not re.search(r"(?:src|href)=.?https?:|@import|url\(", answer.text)
        assert ADMIN not in answer.text and KEY not in answer.text


# --- operations ------------------------------------------------------------------------------------------------------


def test_health_and_metrics_tell_the_state(start: Callable[..., Proxy], weather: Weather) -> None:
    proxy = start("alice", cp.demo_token("old", -5))
    proxy.stream()
    weather.add("/conversation", status(503))
    proxy.ask()
    for path in ("/health", "/ping"):
        assert httpx.get(proxy.url + path).json()["status"] == "ok"
    text = httpx.get(f"{proxy.url}/metrics").text
    for line in (
        'chatproxy_requests_total{route="/v1/chat/completions",status="200"} 2',
        'chatproxy_upstream_responses_total{call="conversation",status="503"} 1',
        'chatproxy_accounts{state="ready"} 1',
        'chatproxy_accounts{state="expired"} 1',
        'chatproxy_retries_total{reason="broken"} 1',
        "chatproxy_streams_open 0",
        "chatproxy_events_total 7",
        'chatproxy_first_byte_seconds_count{route="/v1/chat/completions"} 2',
    ):
        assert line in text, line
    assert "chatproxy_proof_seconds_count" in text
    for line in text.splitlines():
        assert re.fullmatch(r'(# (HELP|TYPE) .*|[a-z_]+(\{([a-z]+="[^"]*",?)+\})? [0-9.e+-]+(nf)?)', line), (
            line
        )


def test_counters_keep_all_their_digits() -> None:
    metrics = cp.Metrics()
    metrics.add("chatproxy_events_total", 123_456_789)
    assert "chatproxy_events_total 123456789\n" in metrics.render()


def test_a_log_line_cannot_be_forged(capsys: pytest.CaptureFixture[str]) -> None:
    line = cp.TextFormatter().format(
        cp.logging.makeLogRecord(
            {"msg": "request", "levelname": "INFO", "facts": {"as": "a\nINFO forged=1", "ms": 2}}
        )
    )
    assert (
        len(line.splitlines()) == 1
        and " forged=1" in line
        and '"a\\nINFO forged=1"' in line
        and line.endswith(" ms=2")
    )


def test_a_request_id_is_returned_and_logged_as_json(tmp_path: pathlib.Path) -> None:
    with Served("--demo", "--log-format", "json") as served:
        answer = httpx.get(f"{served.url}/health")
        wait_until(lambda: answer.headers["x-request-id"] in "".join(served.lines))
        line = json.loads(next(line for line in served.lines if answer.headers["x-request-id"] in line))
        assert line["message"] == "request" and line["route"] == "/health" and line["status"] == 200


def stream_from(url: str, words: int = 400) -> tuple[httpx.Client, Iterator[str]]:
    client = httpx.Client(timeout=30)
    body = {"model": "gpt-4o", "stream": True, "messages": [{"role": "user", "content": "hi " * words}]}
    request = client.build_request("POST", f"{url}/v1/chat/completions", json=body)
    return client, client.send(request, stream=True).iter_text()


def test_sigterm_lets_streams_finish_and_then_ends() -> None:
    with Served("--demo") as served:
        _, text = stream_from(served.url, 30)
        first = next(text)
        idle = socket.create_connection(("127.0.0.1", int(served.url.rpartition(":")[2])))
        idle.sendall(HEALTH)
        assert idle.recv(65536).startswith(b"HTTP/1.1 200")
        served.process.send_signal(signal.SIGTERM)
        assert idle.recv(100) == b""  # an idle connection is not waited for
        assert (first + "".join(text)).endswith("data: [DONE]\n\n")
        assert served.process.wait(10) == 0


def test_streams_longer_than_the_grace_end_with_an_error_event() -> None:
    with Served("--demo", "--shutdown-grace", "0") as served:
        _, text = stream_from(served.url)
        next(text)
        served.process.send_signal(signal.SIGTERM)
        rest = "".join(text)
        assert '"code":"overloaded"' in rest and "[DONE]" not in rest
        assert served.process.wait(10) == 0


def test_a_second_sigterm_ends_at_once() -> None:
    with Served("--demo") as served:
        _, text = stream_from(served.url)
        next(text)
        served.process.send_signal(signal.SIGTERM)
        wait_until(lambda: any("stopping" in line for line in served.lines))
        served.process.send_signal(signal.SIGTERM)
        assert served.process.wait(3) == 1


def test_no_secret_reaches_log_errors_or_metrics(tmp_path: pathlib.Path, weather: Weather) -> None:
    refresh, session, alice = "rt_" + "S3cret" * 8, "eyJ" + "S3ssion" * 9 + "....", cp.demo_token("alice")
    weather.refresh_tokens[refresh] = "bob"
    env = {
        "DATA_DIR": str(tmp_path), "AUTHORIZATION": KEY, "ADMIN_KEY": ADMIN, "LOG_LEVEL": "debug", "RETRY_TIMES": "5",
        "CHATGPT_BASE_URL": weather.url, "OPENAI_AUTH_URL": weather.url, "OPENAI_API_URL": weather.url,
        "API_PREFIX": "hidden-prefix", "AUTH_KEY": "gateway-key", "PROXY_URL": "",
    }  # fmt: skip
    said = ""
    with Served(env=env) as served:
        url = f"{served.url}/hidden-prefix"
        upload = {"text": f"{alice}\n{refresh}\n{session}\nbad-line-with-a-s3cret-token"}
        said += httpx.post(f"{url}/tokens/upload", data=upload, headers={"Authorization": ADMIN}).text
        weather.add(
            "/conversation",
            *[status(code, {"detail": "PRIVATE-WORDS"}) for code in (422, 401, 403, 429, 500)],
        )
        keys = [KEY, KEY, KEY, "wrong-key-of-mine", cp.demo_token("guest"), "sk-private-thing", "R" * 45]
        body = {"model": "gpt-4o", "messages": [{"role": "user", "content": "PRIVATE-WORDS"}]}
        for key in keys:
            said += httpx.post(
                f"{url}/v1/chat/completions", json=body, headers={"Authorization": key}, timeout=30
            ).text
        said += httpx.get(f"{url}/tokens/add/{alice}").text + httpx.get(f"{served.url}/x?key={KEY}").text
        said += (
            httpx.get(f"{url}/metrics").text + pathlib.Path(f"/proc/{served.process.pid}/cmdline").read_text()
        )
        with sqlite3.connect(tmp_path / "chatproxy.db") as db:
            tokens = [
                text
                for row in db.execute("SELECT secret, access_token FROM accounts")
                for text in row
                if text
            ]
        log = "".join(served.lines)
    secrets = [
        *tokens,
        *keys,
        ADMIN,
        refresh,
        session,
        alice,
        "hidden-prefix",
        "gateway-key",
        "s3cret-token",
        "PRIVATE-WORDS",
    ]
    assert len(tokens) > 4 and log.count("request ") > 8
    for secret in secrets:
        assert secret not in log
        assert secret == "PRIVATE-WORDS" or secret not in said
        if len(secret) > 100:
            assert secret[40:80] not in log + said


def test_the_program_serves_soon_after_it_is_loaded(tmp_path: pathlib.Path) -> None:
    """Half a second on a quiet machine; here as a ratio to loading it, which a busy one slows down as much."""
    loaded, ready = [], []
    for _ in range(5):
        began = time.monotonic()
        assert run("--version").returncode == 0
        loaded.append(time.monotonic() - began)
        with Served(env={"DATA_DIR": str(tmp_path)}) as served:
            ready.append(served.ready)
    assert min(ready) < 1.7 * min(loaded)


def test_every_public_name_says_what_it_is() -> None:
    for name, thing in vars(cp).items():
        if (
            not name.startswith("_")
            and getattr(thing, "__module__", "") == "chatproxy"
            and inspect.isclass(thing)
        ):
            assert thing.__doc__ and not thing.__doc__.startswith(f"{name}("), name


def test_the_five_files_are_all_there_is() -> None:
    listed = subprocess.run(["git", "ls-files"], cwd=HERE, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a checkout")
    tops = {line.split("/")[0] for line in listed.stdout.split() if not line.startswith(".")}
    assert tops <= {"chatproxy.py", "test_chatproxy.py", "README.md", "LICENSE", "Makefile"}


# --- faults that nothing noticed: each of these has failed with one -------------------------------------------------


def certified(folder: pathlib.Path, name: str = "127.0.0.1") -> tuple[trustme.CA, dict[str, Any]]:
    """An authority, and the settings of a server with a certificate of its for this name."""
    authority, path = trustme.CA(), str(folder / f"{secrets.token_hex(4)}.pem")
    authority.issue_cert(name).private_key_and_cert_chain_pem.write_to_path(path)
    return authority, {"tls_cert": path, "tls_key": path}


class Answering(cp.Application):
    """Answers by a function, bodies of any size read."""

    def __init__(self, answer: Callable[[cp.Request], Any]) -> None:
        self.answer = answer

    def admit(self, request: cp.Request) -> int:
        return 2 << 30

    def respond(self, request: cp.Request) -> Any:
        return self.answer(request)


@contextlib.contextmanager
def listening(respond: Callable[[cp.Request], Any], **settings: Any) -> Iterator[str]:
    """A server that answers like this; its URL."""
    settled, answering = dataclasses.replace(cp.resolve(cp.gather({}, {})), **settings), Answering(respond)
    server = cp.Server(("127.0.0.1", 0), answering, settled, cp.Metrics(), quiet=True)
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    yield f"http{'s' * bool(settings.get('tls_cert'))}://127.0.0.1:{server.server_port}"
    server.drain(0)
    answering.loop.close()


def test_no_upstream_or_proxy_is_trusted_without_a_certificate_that_proves_it(
    start: Callable[..., Proxy], weather: Weather, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    authority, good = certified(tmp_path)
    (_, unknown), (other, misnamed) = certified(tmp_path), certified(tmp_path, "elsewhere.example")
    trusted = tmp_path / "trusted.pem"
    trusted.write_bytes(authority.cert_pem.bytes() + other.cert_pem.bytes())
    monkeypatch.setattr(cp, "DEFAULT_CACERT", str(trusted))
    for number, settings in enumerate((unknown, misnamed)):
        with listening(weather.respond, **settings) as url:
            proxies = {"upstream": weather.url, "proxy_url": url}
            for way, options in enumerate(({"upstream": url}, proxies)):
                proxy = start("alice", folder=f"{number}{way}", retry_times="0", **options)
                assert error_of(proxy.ask()) == (502, "upstream_error") and not weather.seen
    with listening(weather.respond, **good) as url:
        assert start("alice", folder="good", upstream=url).say() == "Hello wide world."


def test_https_is_not_spoken_in_old_versions_and_its_cookies_are_secure(
    start: Callable[..., Proxy], tmp_path: pathlib.Path
) -> None:
    authority, files = certified(tmp_path)
    proxy = start("alice", **files)
    assert proxy.server.tls and proxy.server.tls.minimum_version >= ssl.TLSVersion.TLSv1_2
    context = ssl.create_default_context()
    authority.configure_trust(context)
    url = proxy.url.replace("http:", "https:")
    signed = httpx.post(f"{url}/tokens/session", json={"key": ADMIN}, verify=context)
    assert signed.status_code == 204 and signed.headers["set-cookie"].endswith("; Secure")


def test_a_certificate_and_its_key_are_set_together(tmp_path: pathlib.Path) -> None:
    _, files = certified(tmp_path)
    for name, missing in (("tls_cert", "TLS_KEY"), ("tls_key", "TLS_CERT")):
        with pytest.raises(cp.SettingError, match=f"^{missing}: not set"):
            cp.resolve(cp.gather({name: files[name]}, {}))
    assert cp.resolve(cp.gather(files, {})).tls_cert


def test_nothing_but_what_openai_needs_is_passed_on_with_an_sk_key(
    start: Callable[..., Proxy], weather: Weather
) -> None:
    proxy = start("alice", auth_key="gateway-key")
    passed = {
        "OpenAI-Organization": "org-1",
        "OpenAI-Project": "p",
        "OpenAI-Beta": "b",
        "Idempotency-Key": "i",
    }
    mine = {"Cookie": f"{proxy.app.keys.cookie}=secret", "Proxy-Authorization": "Basic eDp5", "authkey": "x"}
    mine |= {"X-Forwarded-For": "192.0.2.7", "X-Api-Key": KEY, "Forwarded": "for=192.0.2.7", "Via": "1.1 me"}
    body = {"model": "gpt-9", "messages": [{"role": "user", "content": "hi"}]}
    headers = {"Authorization": "Bearer sk-mine", "User-Agent": "me/1", **mine, **passed}
    assert httpx.post(f"{proxy.url}/v1/chat/completions", json=body, headers=headers).status_code == 200
    told = weather.last("/v1/chat/completions").headers
    assert {name: told.get(name.lower()) for name in passed} == passed and told["user-agent"] == "me/1"
    assert told["authorization"] == "Bearer sk-mine"
    usual = {"host", "accept", "accept-encoding", "content-type", "content-length", "user-agent"}
    assert set(told) <= usual | {"authorization"} | {name.lower() for name in passed}


def test_without_any_key_this_machine_alone_administers(
    start: Callable[..., Proxy], monkeypatch: pytest.MonkeyPatch
) -> None:
    keyed = start("alice", folder="keyed", admin_key="")  # whose first key is the administrator's
    assert error_of(admin(keyed, "GET", "/tokens/list", None)) == (401, "invalid_api_key")
    proxy = start("alice", authorization="", admin_key="")
    accept, peers = proxy.server.get_request, list[str]()
    monkeypatch.setattr(proxy.server, "get_request", lambda: (accept()[0], (peers.pop(), 50000)))
    for peer in ("127.0.0.1", "127.8.8.8", "::1", "::ffff:127.0.0.1"):
        peers.append(peer)
        assert admin(proxy, "GET", "/tokens/list", None).status_code == 200, peer
    for peer in ("192.168.1.7", "203.0.113.5", "::ffff:203.0.113.5", "fe80::1%eth0", "2001:db8::1", "x"):
        for host in ("localhost", proxy.url.partition("://")[2]):
            peers.append(peer)
            said = admin(proxy, "GET", "/tokens/list", None, headers={"Host": host})
            assert error_of(said) == (401, "invalid_api_key"), peer


def test_a_prefix_is_a_whole_step_of_the_path(start: Callable[..., Proxy]) -> None:
    proxy = start("alice", api_prefix="/s3cret/")
    elsewhere = httpx.get(f"{proxy.url}/health").json()
    for path in ("/s3cre/health", "/s3cretx/health", "/s3cret-/", "/S3cret/health", "/"):
        said = httpx.get(proxy.url + path)
        assert said.status_code == 404 and said.json() == elsewhere, path
        assert httpx.options(proxy.url + path).status_code == 404, path
    for path in ("/s3cret", "/s3cret/", "/s3cret/health", "/s3cret/health?a=b"):
        assert httpx.get(proxy.url + path).status_code == 200, path


def test_a_key_that_is_sent_twice_is_refused(proxy: Proxy) -> None:
    for keys in ((KEY, KEY), ("sk-other", KEY), (KEY, "")):
        lines = "".join(f"Authorization: {key}\r\n" for key in keys)
        got = talk(proxy.address, f"GET /v1/models HTTP/1.1\r\nHost: x\r\n{lines}\r\n".encode())
        assert got.startswith(b"HTTP/1.1 400 ") and b"authorization" in got


def test_an_account_is_told_to_its_own_site_alone(start: Callable[..., Proxy], weather: Weather) -> None:
    foreign: list[cp.Request] = []

    def answer(request: cp.Request) -> cp.Reply:
        foreign.append(request)
        return cp.Reply(200, b"elsewhere", "text/plain", {"Set-Cookie": "planted=1"})

    weather.people = {USER: (WORD, "")}
    with listening(answer) as url:
        proxy = start("alice", auth_key="gateway-key", upstream_timeout="5")
        (account,) = proxy.app.pool.accounts()
        account.row = cp.replace(account.row, workspace="team-1")
        file = proxy.client().files.create(file=("a.txt", b"remember"), purpose="user_data")
        host = url.partition("://")[2]
        # Neither another host nor one that only begins like the site's is the site.
        for place in (f"{url}/blob/x", f"{weather.url}@{host}/blob/x"):
            weather.add("/download", status(200, {"status": "success", "download_url": place}))
            assert proxy.client().files.content(file.id).read() == b"elsewhere"
        own = f"{weather.url}/blob/{proxy.store.files('id=?', file.id)[0].upstream}"
        weather.add("/download", status(200, {"status": "success", "download_url": own}))
        assert proxy.client().files.content(file.id).read() == b"remember"
        assert weather.last(own.rpartition("/")[2]).headers["chatgpt-account-id"] == "team-1"
        downloads = len(foreign)
        weather.add("/authorize/resume", status(302, Location=f"{weather.url}@{host}/x"))
        assert error_of(sign_in(proxy)) == (403, "challenge_required")
    assert downloads == 2 == len(foreign)
    for request in foreign:
        said = "\n".join(f"{name}: {value}" for name, value in request.headers.items())
        for word in ("Bearer", "cookie:", "chatgpt-account-id", "oai-", "authkey", "origin:", "referer:"):
            assert word not in said, said
    assert "planted" not in json.dumps(account.cookies)


def test_a_sign_in_is_proved_by_whom_it_was_begun(proxy: Proxy, weather: Weather) -> None:
    def hashed(verifier: str) -> str:
        return base64.urlsafe_b64encode(hashlib.sha256(verifier.encode()).digest()).decode().rstrip("=")

    weather.people, seen = {USER: (WORD, "")}, set[str]()
    for _ in range(2):
        assert sign_in(proxy).status_code == 200
        query, call = weather.last("/authorize").query, weather.last("/oauth/token")
        form = dict(httpx.QueryParams(call.body.read().decode()))
        assert query["code_challenge_method"] == "S256" and len(form["code_verifier"]) >= 43
        assert query["code_challenge"] == hashed(form["code_verifier"]) not in seen
        seen.add(query["code_challenge"])
    browsers = [cp.SignIn(proxy.settings, LOOP) for _ in range(2)]
    asked = [dict(httpx.URL(browser.address()).params) for browser in browsers]
    for browser, query in zip(browsers, asked, strict=True):
        assert query["code_challenge_method"] == "S256"
        assert query["code_challenge"] == hashed(browser.verifier)
        assert len(browser.verifier) >= 43 and len(query["state"]) >= 22
    assert asked[0]["state"] != asked[1]["state"] and browsers[0].verifier != browsers[1].verifier
    # The stand-in is as strict as the original.
    for verifier in (browsers[1].verifier, asked[0]["code_challenge"], ""):
        code = dict(httpx.URL(httpx.get(browsers[0].address()).headers["location"]).params)["code"]
        with pytest.raises(cp.Refusal):
            browsers[0].tokens(code, verifier, browsers[0].redirect)
    code = dict(httpx.URL(httpx.get(browsers[0].address()).headers["location"]).params)["code"]
    assert browsers[0].tokens(code, browsers[0].verifier, browsers[0].redirect)[1].startswith("rt_")


def test_a_sign_in_is_led_on_only_so_often(proxy: Proxy, weather: Weather) -> None:
    weather.add("/authorize", *[status(302, Location="/authorize")] * 50)
    assert error_of(sign_in(proxy)) == (403, "challenge_required") and weather.count("/authorize") == 12


def test_no_workspace_is_a_header_of_its_own(proxy: Proxy, weather: Weather) -> None:
    def claimed(workspace: Any) -> str:
        head, payload, last = cp.demo_token("guest").split(".")
        said = json.loads(base64.urlsafe_b64decode(payload + "=="))
        said["https://api.openai.com/auth"]["chatgpt_account_id"] = workspace
        payload = base64.urlsafe_b64encode(json.dumps(said).encode()).decode().rstrip("=")
        return f"{head}.{payload}.{last}"

    token = cp.demo_token("guest")
    for bad in ("a\r\nX-Evil: 1", "a\nb", "a b", "a;b", "a" * 65, "é", "a,b", "a\0b", "../x"):
        for text in (f"{token},{bad}", claimed(bad), json.dumps({"token": token, "account_id": bad})):
            with pytest.raises(ValueError, match="work|token"):
                cp.recognise(text)
        admin(proxy, "POST", "/tokens/upload", data={"text": claimed(bad)})
    for key in (claimed("a\r\nX-Evil: 1"), claimed("../x"), f"{token},a b"):
        assert error_of(proxy.ask(key=key)) == (401, "invalid_api_key") and not weather.seen
    assert len(proxy.app.pool.accounts()) == 1
    assert proxy.ask(key=claimed("team-1")).status_code == 200
    assert weather.last("/conversation").headers["chatgpt-account-id"] == "team-1"


def test_what_a_server_makes_is_its_owners_alone(tmp_path: pathlib.Path) -> None:
    before = os.umask(0o022)
    try:
        with Served(env={"DATA_DIR": str(tmp_path / "a" / "b")}):
            made = [tmp_path / "a", *(tmp_path / "a").rglob("*")]
            assert len(made) >= 4 and all(stat.S_IMODE(one.stat().st_mode) & 0o077 == 0 for one in made)
    finally:
        os.umask(before)


def test_every_call_that_changes_something_is_counted_for_an_api_user(start: Callable[..., Proxy]) -> None:
    proxy = start("alice", history_disabled="false")
    user = admin(proxy, "POST", "/admin/users/add", json={"name": "bob", "limit": 3}).json()["token"]
    id = conversation_of(turn(proxy, user))
    for change in ({"title": "a"}, {"title": "b"}):
        assert web(proxy, "GET", f"/conversation/{id}", user).status_code == 200
        assert web(proxy, "PATCH", f"/conversation/{id}", user, json=change).status_code == 200
    over = web(proxy, "PATCH", f"/conversation/{id}", user, json={"title": "c"})
    assert error_of(over) == (429, "rate_limit_exceeded")
    assert admin(proxy, "GET", "/admin/users").json()["users"][0]["requests"] == 3


def form_of(parts: int, padding: int = 0) -> bytes:
    """A form of so many fields, whose header lines have so many bytes more."""
    lines = b'Content-Disposition: form-data; name="a"\r\nX: ' + b"x" * padding
    return (b"--b\r\n" + lines + b"\r\n\r\n1\r\n") * parts + b"--b--\r\n"


def test_a_form_has_only_so_many_parts_and_header_lines() -> None:
    kind = {"content-type": "multipart/form-data; boundary=b"}
    assert len(cp.parse_form(kind, cp.Blob(form_of(100)))["a"]) == 100
    assert len(cp.parse_form(kind, cp.Blob(form_of(2, 4000)))["a"]) == 2
    for form in (form_of(101), form_of(1, 4100), form_of(1, 1 << 20)):
        with pytest.raises(cp.ApiError, match="more than 100 parts|do not end"):
            cp.parse_form(kind, cp.Blob(form))
    # A boundary may lie across the pieces in which a blob is searched.
    for size in range(cp.PIECE - 70, cp.PIECE + 5):
        text = b"x" * size
        fields = cp.parse_form(kind, cp.Blob(form_of(1).replace(b"1\r\n--b--", text + b"\r\n--b--")))
        assert fields["a"][0].blob.read() == text


def test_a_request_that_did_not_arrive_whole_is_not_answered(proxy: Proxy, weather: Weather) -> None:
    body = json.dumps({"model": "gpt-4o", "messages": [{"role": "user", "content": "hi"}]}).encode()
    chunk = b"Transfer-Encoding: chunked\r\n\r\n%x\r\n%b" % (len(body), body)
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nAuthorization: {KEY}\r\n".encode()
    for rest in (
        b"Content-Length: 999\r\n\r\n" + body, b"Content-Length: 999999\r\n\r\n" + body * 300,
        chunk, chunk + b"\r\n",
        chunk + b"\r\n0\r\n", b"Transfer-Encoding: chunked\r\n\r\n999\r\n" + body,
    ):  # fmt: skip
        with socket.create_connection(proxy.address, timeout=5) as sock:
            sock.sendall(head + rest)
            sock.shutdown(socket.SHUT_WR)
            assert sock.recv(65536) == b"" and not weather.seen, rest
    assert 'completions",status="200"' not in proxy.app.metrics.render()


@pytest.mark.parametrize(
    ("framing", "rest"),
    [
        (b"Content-Length: 4", b"abcd"),
        (b"Transfer-Encoding: chunked", b"4\r\nabcd\r\n0\r\nTrailer: x\r\n\r\n"),
    ],
)
def test_what_comes_in_one_piece_with_the_end_of_a_body_is_the_next_request(
    framing: bytes, rest: bytes, proxy: Proxy
) -> None:
    head = b"POST /tokens/session HTTP/1.1\r\nHost: x\r\nExpect: 100-continue\r\n" + framing + b"\r\n\r\n"
    with socket.create_connection(proxy.address, timeout=5) as sock:
        sock.sendall(head)
        # It has all of the head now, and waits for the body.
        assert sock.recv(100) == b"HTTP/1.1 100 Continue\r\n\r\n"
        sock.sendall(rest + HEALTH + LAST)
        got = b"".join(iter(lambda: sock.recv(65536), b""))
    assert re.findall(rb"HTTP/1\.1 (\d+)", got) == [b"400", b"200", b"200"]


def test_limits_of_a_body_are_those_of_all_its_chunks(start: Callable[..., Proxy]) -> None:
    proxy = start("alice", max_body_mb="1")
    head = f"POST /v1/responses HTTP/1.1\r\nHost: x\r\nConnection: close\r\nAuthorization: {KEY}\r\n".encode()
    head += b"Transfer-Encoding: chunked\r\n\r\n"
    chunk = b"80000\r\n" + b"x" * 0x80000 + b"\r\n"
    assert b"not valid JSON" in talk(proxy.address, head + chunk * 2 + b"0\r\n\r\n")
    assert talk(proxy.address, head + chunk * 2 + b"1\r\n").startswith(b"HTTP/1.1 413 ")
    assert b"Malformed HTTP: a chunk's end" in talk(proxy.address, head + b"1\r\naXX0\r\n\r\n")
    trailers = b"0\r\n" + (b"X: " + b"y" * 4000 + b"\r\n") * 3
    assert talk(proxy.address, head + trailers + b"\r\n").startswith(b"HTTP/1.1 431 ")
    line = b"x" * 8189
    assert talk(proxy.address, head + b"1;" + line * 2 + b"\r\n").startswith(b"HTTP/1.1 400 ")


def test_a_fault_of_ours_is_told_by_its_number_alone(caplog: pytest.LogCaptureFixture) -> None:
    secret = "nothing at /secret/path"

    def pieces(first: bytes) -> cp.Sent:
        if first:
            yield first, 1
        raise LookupError(secret)

    def respond(request: cp.Request) -> cp.Reply | cp.Stream:
        if request.path == "/whole":
            raise LookupError(secret)
        return cp.streamed(pieces(b"data: 1\n\n" if request.path == "/late" else b""))

    with listening(respond) as url:
        for path in ("/whole", "/early", "/late"):
            caplog.clear()
            answer = httpx.get(url + path)
            id = answer.headers["x-request-id"]
            assert answer.status_code == (200 if path == "/late" else 500)
            assert "internal_error" in answer.text and id in answer.text
            assert "secret" not in answer.text and "LookupError" not in answer.text
            (record,) = (one for one in caplog.records if one.exc_info)
            assert vars(record)["facts"]["id"] == id and record.levelname == "ERROR"
            text, line = (form.format(record) for form in (cp.TextFormatter(), cp.JsonFormatter()))
            assert secret in text and secret in json.loads(line)["exception"] and "\n" not in line


def test_a_piece_without_bytes_ends_no_stream() -> None:
    def pieces(*words: bytes) -> cp.Sent:
        yield from ((word, 0) for word in words)

    with listening(lambda request: cp.streamed(pieces(b"", b"a", b"", b"b", b""), status=207)) as url:
        with httpx.Client() as client:
            for method in ("GET", "HEAD", "GET"):
                answer = client.request(method, url)
                assert (answer.status_code, answer.text) == (207, "ab" if method == "GET" else "")
        address = ("127.0.0.1", int(url.rpartition(":")[2]))
        assert talk(address, b"GET / HTTP/1.0\r\n\r\n").partition(b"\r\n\r\n")[2] == b"ab"


def test_what_a_clients_url_leads_to_has_its_limits(
    internet: tuple[Origin, dict[str, list[str]]],
    start: Callable[..., Proxy],
    weather: Weather,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    origin, names = internet
    proxy = start("alice", export_proxy_url=origin.url)
    ask = [part_message("what", image_part("http://pictures.example/cat.png"))]
    names["pictures.example"] = ["93.184.216.34"]

    def refused() -> str:
        answer = proxy.ask(messages=ask)
        assert error_of(answer) == (400, "invalid_request_error")
        return str(answer.json()["error"]["message"])

    origin.page("pictures.example", "302 Found", Location="/again")
    assert "redirects too often" in refused() and len(origin.told) == 6
    bomb = gzip.compress(bytes(40 << 20))
    origin.page("pictures.example", "200 OK", bomb, **{"Content-Encoding": "gzip"})
    tracemalloc.start()
    try:
        assert "compressed" in refused() and tracemalloc.get_traced_memory()[1] < 20 << 20
    finally:
        tracemalloc.stop()
    gone = threading.Event()

    def drip(client: socket.socket) -> None:
        with client, contextlib.suppress(OSError):
            client.recv(4096)
            client.sendall(b"HTTP/1.1 200 Connected\r\n\r\n")
            client.recv(4096)
            client.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n")
            for _ in range(300):  # until the other side is gone
                if gone.wait(0.02):
                    break
                client.sendall(b"x")
        gone.set()

    monkeypatch.setattr(origin, "_answer", drip)
    monkeypatch.setattr(cp, "FETCH_TIME", cp.FETCH_TIME / 100)
    assert "longer than" in refused() and gone.wait(5)


def test_a_clients_url_is_tried_at_every_address_and_never_a_file(
    internet: tuple[Origin, dict[str, list[str]]], start: Callable[..., Proxy], weather: Weather,
    tmp_path: pathlib.Path,
) -> None:  # fmt: skip
    _, names = internet
    proxy = start("alice", allow_private_urls="true")
    names["pictures.example"] = ["127.0.0.2 127.0.0.1"]  # nobody listens at the first
    weather.files["cat.png"] = cp.DemoFile("x", "cat.png", cp.Blob(picture(8, 8)), "multimodal")
    port = weather.url.rpartition(":")[2]
    url = f"http://pictures.example:{port}/blob/cat.png"
    proxy.say(messages=[part_message("what", image_part(url))])
    assert weather.asked()["messages"][0]["content"]["parts"][1]["width"] == 8
    (tmp_path / "cat.png").write_bytes(picture(8, 8))
    uploads = weather.count("/files")
    for scheme in ("file", "ftp", "gopher", "dict"):
        weather.add("/blob/hop", status(302, Location=f"{scheme}://localhost{tmp_path}/cat.png"))
        url = f"{weather.url}/blob/hop"
        refused = proxy.ask(messages=[part_message("what", image_part(url))])
        assert error_of(refused) == (400, "invalid_request_error") and weather.count("/files") == uploads
        assert "only http:// and https:// URLs" in refused.text


def test_no_two_accounts_share_a_connection(start: Callable[..., Proxy], weather: Weather) -> None:
    proxy = start("alice", "bob", random_token="false")
    for _ in range(4):
        proxy.say()
    for key in ("sk-one", "sk-two", "sk-one", "sk-two"):
        assert proxy.ask(key=key).status_code == 200
    owners, used = defaultdict(set), defaultdict(set)
    for request in weather.seen:
        key = request.headers.get("authorization", "")
        if (
            key and request.path != "/v1/models"
        ):  # by which a new key is looked at, on a connection of its own
            owners[id(request.watch)].add(key)
            used[key].add(id(request.watch))
    assert len(used) == 4 and all(len(keys) == 1 for keys in owners.values())
    assert all(len(used[f"Bearer sk-{name}"]) == 1 for name in ("one", "two"))  # and one's own is kept


def test_a_call_is_prepared_without_what_the_one_before_it_had(weather: Weather) -> None:
    handles, route = cp.Handles(LOOP), cp.Egress("", "")
    weather.add("/a", *[status(200, {}, Set_Cookie="a=1; Path=/\r\nSet-Cookie: b=2\r\nX: 1\r\nX: 2")] * 9)
    answers, used = list[cp.Answer](), set[cp.Handle]()
    for method, body in (
        ("PATCH", b"x"),
        ("GET", None),
        ("POST", b""),
        ("POST", b"yz"),
        ("DELETE", None),
    ) * 2:
        with handles.call(
            "me", route, method, f"{weather.url}/a", [b"Expect:"], body, cp.Watch(), 5.0
        ) as call:
            if len(answers) < 2:
                call.handle.sent_once()
            answers.append(call.whole())
            used.add(call.handle)
        LOOP.run(int)
        seen = weather.seen[-1]
        assert (seen.method, seen.body.read()) == (method, body or b"")
    handles.close()
    assert answers[0].headers["set-cookie"] == "a=1; Path=/\nb=2" and answers[0].headers["x"] == "1, 2"
    assert len(used) == 1
    assert weather_connections(weather) == 2  # only a call that is to be sent once has one of its own


@pytest.mark.parametrize("taken", [1] * 8 + [100_000])  # it breaks in sending, often, or in reading
def test_a_large_body_begins_anew_when_a_kept_connection_breaks(taken: int) -> None:
    blob, whole = cp.Blob(), random.randbytes(cp.MAX_IN_MEMORY + 5)
    blob.write(whole)
    got: list[bytes] = []

    def serve() -> None:
        with listener, contextlib.suppress(OSError):
            first, _ = listener.accept()
            with first:
                first.recv(65536)
                first.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")
                first.recv(taken)  # the second call, on the same connection
            second, _ = listener.accept()
            with second:
                data = b""
                while len(data.partition(b"\r\n\r\n")[2]) < len(whole) and (more := second.recv(65536)):
                    data += more
                got.append(data.partition(b"\r\n\r\n")[2])
                second.sendall(b"HTTP/1.1 201 Created\r\nContent-Length: 0\r\n\r\n")

    listener = socket.create_server(("127.0.0.1", 0))
    listener.settimeout(10)
    handles, url = cp.Handles(LOOP), f"http://127.0.0.1:{listener.getsockname()[1]}/"
    with aside(serve):
        for method, body in (("GET", None), ("PUT", blob)):
            lines = [b"Expect:"]
            with handles.call("me", cp.Egress("", ""), method, url, lines, body, cp.Watch(), 10.0) as call:
                answer = call.whole()
            LOOP.run(int)
    handles.close()
    assert answer.status == 201 and got == [whole]


def test_a_body_for_which_there_is_no_room_is_told_to_come_back(
    proxy: Proxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(**_: Any) -> Any:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(cp.tempfile, "TemporaryFile", full)
    answer = proxy.ask("x" * (2 << 20))
    assert error_of(answer) == (503, "overloaded") and int(answer.headers["retry-after"]) > 0
    assert "space" not in answer.text and proxy.say() == "Hello wide world."


class Meddled(float):
    """A number that lets another thread in as it is added or compared: it ends first, or waits."""

    meddle: Callable[[], Any] | None = None
    compared = False  # when that happens; else as it is added
    thread: threading.Thread | None = None

    def _let(self, compared: bool) -> float:
        if (meddle := self.meddle) and compared == self.compared:
            self.meddle, self.thread = None, threading.Thread(target=meddle, daemon=True)
            self.thread.start()
            self.thread.join(0.1)
        return float(self)

    def __radd__(self, other: Any) -> float:
        return float(other) + self._let(False)

    def __le__(self, other: Any) -> bool:
        return self._let(True) <= float(other)


def meddled(
    number: float, meddle: Callable[[], Any], use: Callable[[Any], Any], compared: bool = False
) -> None:
    """Uses a number; in the middle of that another thread does something."""
    given = Meddled(number)
    given.meddle, given.compared = meddle, compared
    use(given)
    assert given.thread
    given.thread.join(5)


def test_nothing_is_lost_when_threads_count_at_once(proxy: Proxy) -> None:
    metrics, ledger, pool = cp.Metrics(), proxy.app.ledger, proxy.app.pool
    (account,) = pool.accounts()
    name = "chatproxy_events_total"
    metrics.add(name, 5)
    meddled(1, lambda: metrics.add(name, 10), lambda number: metrics.add(name, number))
    assert f"{name} 16\n" in metrics.render()
    name = "chatproxy_proof_seconds"
    meddled(1, lambda: metrics.observe(name, 10), lambda number: metrics.observe(name, number))
    assert f"{name}_sum 11\n" in metrics.render()
    meddled(1, lambda: ledger.count("u", tokens=10), lambda number: ledger.count("u", tokens=number))
    assert ledger.today("u").tokens == 11
    admitted: list[float] = []
    meddled(
        1,
        lambda: admitted.append(ledger.admit("v", 1)),
        lambda number: admitted.append(ledger.admit("v", number)),
        compared=True,
    )
    assert sorted(left > 0 for left in admitted) == [False, True] and ledger.today("v").requests == 1
    # The shorter of two waits does not replace the longer one.
    meddled(
        10,
        lambda: pool.told_to_wait(account, "m", 1000),
        lambda number: pool.told_to_wait(account, "m", number),
    )
    assert account.wait_for("m", time.time()) > 900


def test_a_histogram_counts_what_is_not_above_each_bound() -> None:
    metrics = cp.Metrics()
    for seconds in (0.005, 0.3, 0.4, 100.0):
        metrics.observe("chatproxy_first_byte_seconds", seconds, 'route="/x"')
    text = metrics.render()
    counts = re.findall(r'chatproxy_first_byte_seconds_bucket\{route="/x",le="([^"]+)"\} (\d+)', text)
    bounds = {bound: int(count) for bound, count in counts}
    assert len(bounds) == len(counts) == 14 and list(bounds.values()) == sorted(bounds.values())
    assert [bounds[bound] for bound in ("0.005", "0.25", "0.5", "60.0", "+Inf")] == [1, 1, 3, 3, 4]
    assert 'chatproxy_first_byte_seconds_count{route="/x"} 4\n' in text
    assert 'chatproxy_first_byte_seconds_sum{route="/x"} 100.705\n' in text
    assert "# TYPE chatproxy_first_byte_seconds histogram\n" in text


@pytest.mark.parametrize(
    "end", ["\n", "\r", "\v", "\x1c", "\x85", "\u2028", "\u2029", " ", '"', "\x7f", "\x1b[2K"]
)
def test_a_fact_is_one_word_or_quoted(end: str) -> None:
    record = cp.logging.makeLogRecord({"msg": "request", "levelname": "INFO"})
    vars(record)["facts"] = {"as": f"a{end}forged=1", "ms": 2}
    line = cp.TextFormatter().format(record)
    assert len(line.splitlines()) == 1 and line.isprintable()
    quoted = re.search(r'as=("(?:[^"\\]|\\.)*") ms=2$', line)
    assert quoted and json.loads(quoted[1]) == f"a{end}forged=1"
    assert json.loads(cp.JsonFormatter().format(record))["as"] == f"a{end}forged=1"


def test_a_setting_is_what_it_says_and_nothing_more(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(**flags: str) -> bool:
        with pytest.raises(cp.SettingError) as error:
            cp.resolve(cp.gather(dict(flags), {}))
        return next(iter(flags)).upper() in str(error.value)

    bad = [{"chatgpt_base_url": f"https://x{bad}y"} for bad in (" ", "\r\nX: 1", "\0", "\u2028")]
    bad += [
        {"openai_auth_url": "file:///etc"},
        {"openai_api_url": "https:///v1"},
        {"proxy_url": "socks4://x"},
    ]
    bad += [{"admin_key": "a\nb"}, {"authorization": "a b"}, {"auth_key": "é"}, {"api_prefix": "a?b"}]
    bad += [{"max_body_mb": "0"}, {"port": "٣"}, {"port": "1e3"}, {"oai_language": "en\r\nX: 1"}]
    bad += [{"host": "x y"}, {"pow_difficulty": "0" * 33}, {"max_connections": "0"}, {"heartbeat": "0"}]
    bad += [{"upstream_order": order} for order in (",", "pool,pool", "pool,browser")]
    assert all(refused(**flags) for flags in bad)
    settings = cp.resolve(
        cp.gather({"api_prefix": "/a/b/", "openai_api_url": "https://x/", "port": " 7 "}, {})
    )
    assert (settings.api_prefix, settings.openai_api_url, settings.port) == ("a/b", "https://x", 7)
    monkeypatch.setenv("XDG_STATE_HOME", "/xdg")
    monkeypatch.setenv("STATE_DIRECTORY", "/one:/two")
    assert cp.resolve(cp.gather({}, {})).data_dir == "/one"
    monkeypatch.delenv("STATE_DIRECTORY")
    assert cp.resolve(cp.gather({}, {})).data_dir == "/xdg/chatproxy"


def test_the_frame_of_an_image_is_found_behind_other_segments() -> None:
    frame = b"\xff\xc2\x00\x11\x08" + (48).to_bytes(2, "big") + (64).to_bytes(2, "big")
    table, restart = b"\xff\xc4\x00\x06abcd", b"\xff\xd0\xff\x01"
    for before in (b"", table, b"\xff" + table, restart, b"\xff\xe0\x00\x02" * 300, b"\xff\xcc\x00\x02"):
        assert cp.image_facts(cp.Blob(b"\xff\xd8" + before + frame)) == ("image/jpeg", 64, 48)
    assert cp.image_facts(cp.Blob(b"\xff\xd8" + b"\xff" * 5000 + frame)) is None  # it ends some time
    scaled = b"RIFF\0\0\0\0WEBPVP8 " + bytes(10) + (64 | 1 << 14).to_bytes(2, "little") + b"\x30\xc0"
    assert cp.image_facts(cp.Blob(scaled)) == ("image/webp", 64, 48)


def test_an_address_is_a_routes_step_by_step(proxy: Proxy) -> None:
    headers = {"Authorization": KEY}
    for path in ("/v1/models/a/b", "/v1/files/a/b", "/v1/files/", "/v1xmodels", "/v1/models/", "/Health"):
        assert error_of(httpx.get(proxy.url + path, headers=headers)) == (404, "not_found"), path
    assert httpx.get(f"{proxy.url}/v1/models/gpt-4o", headers=headers).json()["id"] == "gpt-4o"


def test_errors_have_the_kinds_of_openai(proxy: Proxy) -> None:
    kinds = {400: "invalid_request_error", 401: "invalid_request_error", 404: "invalid_request_error"}
    kinds |= {429: "rate_limit_error", 500: "server_error", 502: "upstream_error", 503: "server_error"}
    for code, (status_code, _) in cp.CAUSES.items():
        error = cp.ApiError(code, "x")
        kind = kinds.get(
            status_code, "upstream_error" if status_code in (403, 504) else "invalid_request_error"
        )
        if code == "origin_refused":  # which is this server's own refusal
            kind = "invalid_request_error"
        assert error.status == status_code and error.body()["error"]["type"] == kind


def test_refused_connections_are_counted(start: Callable[..., Proxy]) -> None:
    proxy = start("alice", max_connections="1")
    with socket.create_connection(proxy.address) as sock:
        sock.sendall(HEALTH)
        assert sock.recv(4096).startswith(b"HTTP/1.1 200 ")
        assert all(talk(proxy.address, HEALTH).startswith(b"HTTP/1.1 503 ") for _ in range(3))
    assert 'chatproxy_requests_total{route="none",status="503"} 3\n' in proxy.app.metrics.render()


class Seconds(threading.Event):
    """A `stop` for the upkeep: so many of its seconds pass at once, each after something was done."""

    def __init__(self, seconds: int, before: Callable[[int], Any] = lambda second: None) -> None:
        super().__init__()
        self._left, self._before = iter(range(seconds)), before

    def wait(self, timeout: float | None = None) -> bool:
        second = next(self._left, None)
        if second is not None:
            self._before(second)
        return second is None


def test_the_upkeep_renews_saves_keeps_and_lets_go(
    start: Callable[..., Proxy], weather: Weather, monkeypatch: pytest.MonkeyPatch
) -> None:
    weather.expire_after = 4  # over soon enough to be got anew
    proxy, account = renewing(start, weather, conversation_only="false")
    proxy._stop.set()  # of its own upkeep
    wait_until(lambda: spare_ready(account))
    spare, token = account.spare, account.row.access_token
    proxy.store.update_account(account.id, expires=time.time() + 300)
    proxy.store.put_wait(account.id, "o3", time.time() - 2 * 86400, 1)
    proxy.app.pool.reload()
    account.cookies = account.cookies | {"kept": "yes"}
    connections = {id(request.watch) for request in weather.seen}
    monkeypatch.setattr(cp, "IDLE_LIFE", 0.0)  # all of them are old
    proxy.app.upkeep(Seconds(60))
    monkeypatch.undo()
    wait_until(lambda: account.row.access_token != token)
    assert account.spare is not spare
    assert cp.Ledger(proxy.store).today(account.id).answers == 1
    assert proxy.store.waits() == []
    assert json.loads(proxy.store.accounts()[0].cookies)["kept"] == "yes"
    begun = len(weather.seen)
    proxy.say()
    assert {id(request.watch) for request in weather.seen[begun:]}.isdisjoint(connections)


def test_the_upkeep_survives_a_failure_and_makes_up_for_it(start: Callable[..., Proxy]) -> None:
    proxy = start("alice")
    proxy._stop.set()  # of its own upkeep
    proxy.say()

    def fail_at_first(second: int) -> None:
        if second == 0:  # a fault of another kind, too
            proxy.app.pool.accounts()[0].cookies = {"a": object()}  # type: ignore[dict-item] # which cannot be stored
        names = {0: ("tallies", "away"), 5: ("away", "tallies")}
        with proxy.store.writing() as db:
            if second in names:
                db.execute("ALTER TABLE {} RENAME TO {}".format(*names[second]))

    proxy.app.upkeep(Seconds(11, fail_at_first))
    (account,) = proxy.app.pool.accounts()
    assert cp.Ledger(proxy.store).today(account.id).answers == 1


def test_a_scheduled_refresh_is_made_once_and_not_every_second(
    start: Callable[..., Proxy], weather: Weather
) -> None:
    weather.refresh_tokens["rt_" + "r" * 40] = "alice"
    proxy = start("rt_" + "r" * 40, scheduled_refresh="true")
    proxy._stop.set()  # of its own upkeep
    (account,) = proxy.app.pool.accounts()
    proxy.app.upkeep(
        Seconds(9, lambda _: wait_until(lambda: account.renewal is None or account.renewal.done()))
    )
    assert weather.count("/oauth/token") == 1


def test_what_was_counted_outlives_an_orderly_end(tmp_path: pathlib.Path, weather: Weather) -> None:
    env = {"DATA_DIR": str(tmp_path), "CHATGPT_BASE_URL": weather.url, "AUTHORIZATION": KEY}
    store = cp.Store(str(tmp_path))
    id = cp.Pool(cp.resolve(cp.gather({}, {})), store).add([cp.demo_token("alice")]).rows[0].id
    with Served(env=env) as served:
        body = {"model": "gpt-4o", "messages": [{"role": "user", "content": "hi"}]}
        headers = {"Authorization": f"Bearer {KEY}"}
        answer = httpx.post(f"{served.url}/v1/chat/completions", json=body, headers=headers, timeout=30)
        assert answer.status_code == 200
        served.process.terminate()
        assert served.process.wait(20) == 0
    assert cp.Ledger(store).today(id).answers == 1
    assert json.loads(store.accounts()[0].cookies) == {"oai-sc": "demo"}


def test_what_is_written_is_on_disk_and_what_failed_is_not_written(tmp_path: pathlib.Path) -> None:
    store = cp.Store(str(tmp_path))
    with store.writing() as db:
        names = ("journal_mode", "synchronous", "foreign_keys")
        assert [db.execute(f"PRAGMA {name}").fetchone()[0] for name in names] == ["wal", 2, 1]
    with pytest.raises(KeyError), store.writing():
        store.put_user(cp.User("u-1", "bob", "hash", 1.0))
        raise KeyError
    assert store.users() == [] and cp.Store(str(tmp_path)).users() == []
    store.put_user(cp.User("u-1", "bob", "hash", 1.0))  # and the next one is a transaction of its own
    assert len(cp.Store(str(tmp_path)).users()) == 1


def kept_file(account: str, digest: str, purpose: str = "", used: float = 0.0) -> cp.File:
    return cp.File(
        f"file-{digest}", "owner", account, f"up-{digest}", "n", "m/m", 1, 0, 0, purpose, digest, used
    )


def test_a_removed_account_takes_what_is_known_of_it_along_and_nothing_else(
    start: Callable[..., Proxy],
) -> None:
    proxy = start("alice", "bob")
    pool, store = proxy.app.pool, proxy.store
    proxy._stop.set()
    alice, bob = (account.id for account in pool.accounts())
    for id in (alice, bob):
        store.put_file(kept_file(id, id, "user_data", time.time()))
        pool.hold({f"conversation-{id}": cp.Held(id)})
        store.put_wait(id, "o3", time.time() + 100, 1)
        proxy.app.ledger.count(id, answers=1)
    proxy.app.ledger.save()
    user, _ = cp.issue_user(store, "carol", None)
    proxy.app.ledger.count(user.id, requests=1)
    proxy.app.ledger.save()
    assert pool.remove([alice]) == [alice] and store.remove_user(user.id)
    assert [file.account for file in store.files("1")] == [bob]
    assert (pool.holder(f"conversation-{alice}", ALL), pool.holder(f"conversation-{bob}", ALL)) == (None, bob)
    assert [row[0] for row in store.waits()] == [bob]
    assert {row[0] for row in store.last_tallies()} == {bob}
    guest = guest_of(proxy, cp.demo_token("zoe"))
    store.merge_accounts(lambda known: [guest.row])
    assert pool.remove() == [bob] and [row.id for row in store.accounts()] == [guest.id]


def test_what_is_old_is_forgotten_and_nothing_else(
    start: Callable[..., Proxy], monkeypatch: pytest.MonkeyPatch
) -> None:
    proxy = start("alice")
    proxy._stop.set()
    store, now, day, hour = proxy.store, time.time(), 86400.0, 3600.0
    (alice,) = (account.id for account in proxy.app.pool.accounts())
    store.put_conversations({"c": cp.Held(alice)})  # used now
    store.prune(now + 179 * day)
    assert store.conversation("c") == cp.Held(alice)
    store.prune(now + 181 * day)
    assert store.conversation("c") is None
    store.put_wait(alice, "recent", now - 23 * hour, 1)
    store.put_wait(alice, "old", now - 25 * hour, 1)
    for age in (6.9, 7.1):
        store.put_file(kept_file(alice, f"loose-{age}", "", now - age * day))
        store.put_file(kept_file(alice, f"listed-{age}", "user_data", now - age * day))
    for subject, ages in {"acc-1": (1, 4), "acc-2": (4, 5)}.items():
        store.add_tallies({(subject, now - age * day): cp.Tally(used=now - age * day) for age in ages})
    for age in (23, 25):
        store.put_response(f"r-{age}", "owner", "{}", "[]", now - age * hour)
    store.prune(now)
    assert [row[1] for row in store.waits()] == ["recent"]
    assert {file.digest for file in store.files("1")} == {"loose-6.9", "listed-6.9", "listed-7.1"}
    assert {name: len(store.tallies(name, 0.0)) for name in ("acc-1", "acc-2")} == {"acc-1": 1, "acc-2": 1}
    assert store.last_tallies()[1][1] == now - 4 * day  # the last one, which tells when it was used

    def kept() -> list[int]:  # whatever its age
        return [
            age for age in (1, 2, 23, 25) if store.response(f"r-{age}", cp.Scope("owner"), now - 2 * hour)
        ]

    assert kept() == [23]
    for age in (1, 2):
        store.put_response(f"r-{age}", "owner", "{}" * 50, "[]", now - age * hour)
    monkeypatch.setattr(cp, "MAX_RESPONSES", 204)  # characters
    store.prune(now)
    assert kept() == [1, 2]  # the oldest goes first


def test_truncated_text_is_cut_before_it_goes_on() -> None:
    content = {"content_type": "code", "language": "python", "text": "print(123"}
    message = {"id": "m", "author": {"role": "assistant"}, "recipient": "python", "content": content}
    changes = [
        {"p": "", "o": "add", "v": {"message": message}},
        {"p": "/message/content/text", "o": "truncate", "v": 7},
        {"p": "/message/content/text", "o": "append", "v": "4)"},
        {"p": "/message/status", "o": "replace", "v": "finished_successfully"},
    ]
    decoder = cp.Decoder()
    events = [event for change in changes for event in decoder.feed(cp.data_event(change))]
    assert [event.text for event in events if isinstance(event, cp.ToolUse)] == ["print(14)"]


def test_an_error_is_told_although_the_upstream_ends_in_order(
    start: Callable[..., Proxy], weather: Weather
) -> None:
    proxy = start("alice", retry_times="0")
    error = b'data: {"message": null, "error": "secret words"}\n\n'
    weather.add("/conversation", raw_stream(error, cp.DONE))
    assert error_of(proxy.ask()) == (502, "upstream_error")


def test_what_was_prepared_is_not_used_past_its_time(start: Callable[..., Proxy], weather: Weather) -> None:
    proxy = start("alice")
    proxy.say()
    (account,) = proxy.app.pool.accounts()
    wait_until(lambda: spare_ready(account))
    stale: concurrent.futures.Future[Any] = concurrent.futures.Future()
    stale.set_result(cp.Requirements("stale", expires=time.monotonic()))
    account.spare = stale
    proxy.say()
    calls = [request for request in weather.seen if request.path.endswith("/conversation")]
    assert [one.headers["openai-sentinel-chat-requirements-token"] == "stale" for one in calls] == [False] * 2
    account.spare = stale
    proxy.app.site.sweep_spares()
    assert account.spare is not stale


class Overtaken(str):
    """A name that takes a moment to look up: all who do not wait their turn get in between."""

    def __hash__(self) -> int:
        time.sleep(0.001)
        return super().__hash__()


def at_once(*jobs: Callable[[], Any]) -> list[Any]:
    with concurrent.futures.ThreadPoolExecutor(len(jobs)) as executor:
        return [future.result() for future in [executor.submit(job) for job in jobs]]


def test_counts_made_at_once_all_count(tmp_path: pathlib.Path) -> None:
    store = cp.Store(str(tmp_path))
    ledger = cp.Ledger(store)

    def count() -> None:
        for _ in range(5):
            ledger.count(Overtaken("acc-1"), answers=1)

    def save() -> None:
        for _ in range(20):
            ledger.save()
            time.sleep(0.002)

    at_once(count, count, count, count, save)
    ledger.save()
    assert ledger.today("acc-1").answers == cp.Ledger(store).today("acc-1").answers == 20
    admitted = at_once(*[lambda: ledger.admit(Overtaken("user-1"), 3) == 0] * 8)
    assert sum(admitted) == 3 == ledger.today("user-1").requests


def test_waits_told_at_once_are_all_kept(start: Callable[..., Proxy]) -> None:
    proxy = start("alice")
    (account,) = proxy.app.pool.accounts()
    pool, models = proxy.app.pool, [Overtaken(f"model-{i}") for i in range(6)]
    at_once(*[functools.partial(pool.told_to_wait, account, model, 100.0) for model in models])
    assert set(account.waits) == {row[1] for row in proxy.store.waits()} == set(models)
    at_once(*[functools.partial(pool.told_to_wait, account, models[0], None)] * 6)
    assert account.waits[models[0]].strikes == 1  # they were under way together


def test_nothing_is_written_into_anothers_transaction(start: Callable[..., Proxy]) -> None:
    proxy = start("alice")
    proxy._stop.set()
    store, (account,) = proxy.store, proxy.app.pool.accounts()
    other = threading.Thread(target=store.put_wait, args=(account.id, "o3", time.time() + 100, 1))
    with pytest.raises(KeyError), store.writing():
        other.start()
        other.join(0.2)
        assert other.is_alive()
        raise KeyError
    other.join()
    assert [row[1] for row in store.waits()] == ["o3"]


def test_a_renewal_changes_all_that_a_token_says(start: Callable[..., Proxy], weather: Weather) -> None:
    refresh = "rt_" + "r" * 40
    weather.refresh_tokens[refresh] = "alice"
    proxy = start(refresh)
    (account,) = proxy.app.pool.accounts()
    proxy.app.renewals.token(account, cp.Watch())
    (row,) = proxy.store.accounts()
    assert row == account.row and row.secret in weather.refresh_tokens
    assert (row.email, row.plan, row.workspace) == ("alice@demo.example", "plus", "workspace-alice")
    assert row.expires > time.time() + 80000 and cp.claims(row.access_token)["exp"] == row.expires


def test_an_expired_account_is_ready_again_with_a_refresh_token_of_its_own(
    start: Callable[..., Proxy], weather: Weather
) -> None:
    refresh = "rt_" + "r" * 40
    weather.refresh_tokens[refresh] = "alice"
    proxy = start("alice")
    (alice,) = proxy.app.pool.accounts()
    proxy.store.put_file(kept_file(alice.id, "old"))
    proxy.app.pool.set_aside(alice, "expired", "refused", alice.row.access_token)
    (added,) = proxy.app.pool.add([refresh]).rows
    proxy.app.pool.hold({"c": cp.Held(added.id)})
    proxy.store.put_file(kept_file(added.id, "new"))
    proxy.say()
    (row,) = proxy.store.accounts()
    assert (row.id, row.kind, row.state, row.reason) == (alice.id, "refresh", "ready", "")
    assert proxy.app.pool.holder("c", ALL) == alice.id
    assert {(file.digest, file.account) for file in proxy.store.files("1")} == {
        ("old", alice.id),
        ("new", alice.id),
    }
    assert proxy.say() and weather.count("/oauth/token") == 1


def test_a_rotated_token_is_stored_before_its_answer_is_looked_at(
    start: Callable[..., Proxy], weather: Weather
) -> None:
    refresh, newer = "rt_" + "x" * 50, "rt_" + "y" * 50
    proxy = start(refresh)
    (account,) = proxy.app.pool.accounts()
    with pytest.raises(ValueError):
        proxy.app.pool.renewed(account, "no JWT", newer)
    assert proxy.store.accounts()[0].secret == newer


def test_an_exchange_that_fails_is_tried_again_later_and_later(
    start: Callable[..., Proxy], weather: Weather
) -> None:
    proxy = start("rt_" + "r" * 40, retry_times="0")
    (account,) = proxy.app.pool.accounts()
    pauses = []
    for failures in range(4):
        weather.add("/oauth/token", status(500))
        account.retry_renewal = (0.0, failures)
        assert error_of(proxy.ask()) == (502, "upstream_error")
        pauses.append(round(account.retry_renewal[0] - time.time()))
        assert account.retry_renewal[1] == failures + 1
    assert pauses == [1, 2, 4, 8]
    assert error_of(proxy.ask()) == (502, "upstream_error") and weather.count("/oauth/token") == 4  # not yet
    account.retry_renewal = (0.0, 50)
    weather.add("/oauth/token", status(500))
    proxy.ask()
    assert 590 < account.retry_renewal[0] - time.time() < 601


def test_a_token_that_another_process_exchanged_is_not_exchanged_again(
    start: Callable[..., Proxy], weather: Weather
) -> None:
    refresh = "rt_" + "r" * 40
    weather.refresh_tokens[refresh] = "alice"
    proxy, other = start(refresh), start()
    for one in (proxy, other):
        one._stop.set()
    (theirs,), (ours,) = proxy.app.pool.accounts(), other.app.pool.accounts()
    proxy.app.renewals.token(theirs, cp.Watch())
    other.app.renewals.token(ours, cp.Watch())
    assert weather.count("/oauth/token") == 1 and ours.row.access_token == theirs.row.access_token


def test_disabling_touches_none_but_what_can_be_disabled(start: Callable[..., Proxy]) -> None:
    proxy = start("alice", "bob", "carol")
    proxy._stop.set()
    pool, store = proxy.app.pool, proxy.store
    alice, bob, carol = pool.accounts()
    pool.set_aside(alice, "dead", "gone", alice.row.secret)
    guest = guest_of(proxy, cp.demo_token("zoe")).row
    store.merge_accounts(lambda known: [guest])
    ids = [alice.id, bob.id, guest.id]

    def states() -> list[str]:
        found = {row.id: row.state for row in store.accounts()}
        return [found[one.id] for one in (alice, bob, carol, guest)]

    assert pool.disable(ids, True) == 1 and states() == ["dead", "disabled", "ready", "ready"]
    assert "carol" in carol.row.email and pool.lease("gpt-4o") is carol
    assert pool.disable([*ids, carol.id], False) == 1 and states() == ["dead", "ready", "ready", "ready"]


def test_a_guest_whose_token_died_leaves_nothing(start: Callable[..., Proxy], weather: Weather) -> None:
    refresh = "rt_" + "g" * 50
    weather.refresh_tokens[refresh] = "alice"
    proxy = start()
    assert proxy.ask(key=refresh).status_code == 200
    (row,) = proxy.store.accounts()
    assert row.guest == 1 and row.secret in weather.refresh_tokens
    weather.refresh_tokens.clear()
    weather.dead.add(row.access_token)
    assert error_of(proxy.ask(key=refresh)) == (401, "invalid_api_key")
    assert proxy.store.accounts() == []


def command(*words: str, env: dict[str, str], stdin: str = "") -> tuple[int, str]:
    """A command of the program in this process: its exit status, and all that it printed."""
    ended = click.testing.CliRunner().invoke(cp.cli, words, input=stdin, env=env)
    return ended.exit_code, ended.output


def test_an_export_is_a_new_file_of_ones_own(tmp_path: pathlib.Path, start: Callable[..., Proxy]) -> None:
    proxy = start("alice", "bob")
    ids = [account.id for account in proxy.app.pool.accounts()]
    proxy.app.pool.disable(ids[:1], True)
    guest = guest_of(proxy, cp.demo_token("zoe")).row
    proxy.store.merge_accounts(lambda known: [guest])
    env, file = {"DATA_DIR": str(tmp_path / "data")}, tmp_path / "moved.jsonl"
    tokens = [row.secret for row in proxy.store.accounts()]
    said = [command("accounts", "export", where, env=env) for where in (str(file), str(file), "-")]
    assert [code for code, _ in said] == [0, 2, 2] and "never printed" in said[2][1]
    assert not any(token in text for token in tokens for _, text in said)
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert [(one["email"][:3], one.get("disabled")) for one in lines] == [("ali", True), ("bob", None)]


def test_no_command_prints_a_token(tmp_path: pathlib.Path, weather: Weather) -> None:
    env = {"DATA_DIR": str(tmp_path), "CHATGPT_BASE_URL": weather.url, "OPENAI_AUTH_URL": weather.url}
    token, refresh = cp.demo_token("alice"), "rt_" + "r" * 40
    said = [command("accounts", "add", "-", env=env, stdin=f"{token}\n{refresh}\n{refresh} x\n")]
    weather.refresh_tokens[refresh] = "bob"
    for words in (["check"], ["check", "--json"], ["list"], ["list", "--json"], ["add", token, "--json"]):
        said.append(command("accounts", *words, env=env))
    assert [code for code, _ in said] == [2, 0, 0, 0, 0, 0]
    tokens = {text for row in cp.Store(str(tmp_path)).accounts() for text in (row.secret, row.access_token)}
    assert len(tokens) == 3  # one is its own access token, the other was rotated
    assert all("alice@demo.example" in text for _, text in said)
    assert not any(one[:25] in text for one in (*tokens, refresh) for _, text in said)


def test_a_device_is_the_same_in_every_process_and_its_clock_is_right() -> None:
    page = cp.Page(("a.js",), "b", 1.9e9)

    def drawn(device: str) -> tuple[Any, ...]:
        cp._device_facts.cache_clear()  # as another process would
        made = cp.fingerprint(device, "A", "de", page, 2e9)
        return made[0], *made[10:13], made[16]

    assert drawn("one") == drawn("one")
    assert len({drawn(str(number)) for number in range(20)}) > 10
    made = cp.fingerprint("one", "A", "de", page, 2e9)
    assert made[1] == "Tue May 17 2033 22:33:20 GMT-0500 (Eastern Standard Time)"
    assert made[7:9] == ["de", "de"] and made[13] == 3_600_000 and made[17] == 2e12 - 3_600_000
    assert cp.fingerprint("one", "A", "de", page._replace(read=2e9), 2e9)[13] == 1000
    assert not cp.harder("00003A", "00003a") and cp.harder("00003A", "00003b")


def test_a_hard_proof_is_not_solved_in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    configuration = cp.fingerprint("d", "a", "en-US", cp.Page(), 2e9)
    monkeypatch.setattr(cp, "proof_token", None)  # here; the solvers have theirs since they were forked
    token = SOLVER.solved(("0.5", "000fff", configuration, "sha3"), cp.Watch())
    assert right("sha3", "0.5", "000fff", token[7:])


def test_what_the_upstream_wants_beforehand_is_met_or_named(
    start: Callable[..., Proxy], weather: Weather
) -> None:
    weather.difficulty = ""  # nothing to prove
    start("alice", folder="nothing").say()
    assert "openai-sentinel-proof-token" not in weather.last("/conversation").headers
    weather.difficulty = "zz"
    assert error_of(start("alice", folder="unknown", retry_times="0").ask()) == (502, "upstream_error")
    weather.difficulty = "0fffff"
    weather.force_login = True  # a hint: it came with answers as well
    weather.checks = ("turnstile", "so")  # likewise
    free = start(cp.LOGIN_FREE, folder="free", retry_times="0")
    assert free.ask(model="auto").status_code == 200


@pytest.mark.parametrize("account", ["alice", cp.LOGIN_FREE])
def test_the_device_cookie_is_the_device_header_in_every_call(
    start: Callable[..., Proxy], weather: Weather, account: str
) -> None:
    proxy = start(account)
    answers = status(200, {"token": "t", "prepare_token": "t"}, set_cookie="oai-did=another; Path=/")
    weather.add("/chat-requirements", lambda request: answers(request) if len(weather.seen) < 5 else None)
    for _ in range(5):
        proxy.ask(model="auto")
    wait_until(lambda: weather.count("/chat-requirements") > 3)
    calls = [one for one in weather.seen if "/backend-a" in one.path]
    assert len(calls) > 5
    for one in calls:
        cookies = dict(part.split("=", 1) for part in one.headers["cookie"].split("; "))
        assert cookies["oai-did"] == one.headers["oai-device-id"], one.path


UNUSUAL_403: Any = {"detail": UNUSUAL + " (reference 7)" + "x" * 300}
CLOUDFLARE = "<html>Just a moment...</html>"


@pytest.mark.parametrize(
    ("persona", "checks", "body", "code", "advice"),
    [
        ("", (), UNUSUAL_403, "upstream_blocked", "PROXY_URL"),
        ("", ("turnstile",), UNUSUAL_403, "human_check_required", "(turnstile)"),
        ("chatgpt-freeaccount", ("turnstile", "so"), UNUSUAL_403, "human_check_required", "(turnstile, so)"),
        ("", ("so",), CLOUDFLARE, "upstream_blocked", "PROXY_URL"),
        ("chatgpt-noauth", (), CLOUDFLARE, "upstream_blocked", "PROXY_URL"),
    ],
)
@pytest.mark.parametrize("newer", [False, True])
def test_a_403_is_told_by_its_cause(
    start: Callable[..., Proxy],
    weather: Weather,
    newer: bool,
    persona: str,
    checks: Any,
    body: Any,
    code: str,
    advice: str,
) -> None:
    weather.persona, weather.checks, weather.newer, weather.older = persona, checks, newer, not newer
    proxy = start("alice", retry_times="0")
    kind = "text/html" if body is CLOUDFLARE else "application/json"
    weather.add("/f/conversation" if newer else "/conversation", *[status(403, body, kind)] * 3)
    refused = proxy.ask()
    assert error_of(refused) == (403, code) and advice in refused.text
    assert ("(reference 7)" in refused.text) == (body is UNUSUAL_403) and "x" * 200 not in refused.text
    assert proxy.app.pool.accounts()[0].state(time.time()) == "ready"


def test_a_token_that_is_not_credited_is_set_aside(start: Callable[..., Proxy], weather: Weather) -> None:
    weather.persona, weather.checks = "chatgpt-noauth", ("turnstile",)
    proxy = start("alice", "bob", retry_times="3")
    weather.add("/conversation", *[status(403, UNUSUAL_403)] * 9)
    assert error_of(proxy.ask()) == (503, "no_account")
    facts = [one.told(time.time()) for one in proxy.app.pool.accounts()]
    assert len(facts) == 2 and all("does not credit its token" in one for one in facts)
    own = proxy.ask(key=cp.demo_token("carol"))
    assert error_of(own) == (401, "token_not_credited") and "sign in" in own.text


def test_a_failure_within_an_answer_has_its_cause_too(start: Callable[..., Proxy], weather: Weather) -> None:
    weather.checks = ("turnstile",)
    proxy = start("alice", retry_times="0")
    weather.add("/conversation", *[raw_stream(cp.data_event({"message": None, "error": UNUSUAL}))] * 2)
    assert error_of(proxy.ask()) == (403, "human_check_required")


def test_a_check_asks_for_what_a_chat_needs(start: Callable[..., Proxy], weather: Weather) -> None:
    proxy = start("alice")
    account = proxy.app.pool.accounts()[0]
    assert cp.checked(proxy.app, account, cp.Watch()) == (account.id, "")
    assert weather.count("/chat-requirements") == 1
    weather.persona = "chatgpt-noauth"
    id, told = cp.checked(proxy.app, account, cp.Watch())
    assert id == account.id and "does not credit its token" in (told or "")
    assert account.row.state == "expired"


def test_the_start_page_is_read_once(start: Callable[..., Proxy], weather: Weather) -> None:
    proxy = start("alice", "bob", random_token="false")
    for _ in range(4):
        proxy.say()
    assert weather.calls.count("GET /") == 1


HTML = {"content-type": "text/html"}


@pytest.mark.parametrize(
    ("code", "body", "headers", "reason", "answer"),
    [
        (204, "", {}, "broken", "upstream_error"),
        (302, "", {}, "broken", "upstream_error"),
        (500, {"detail": "no"}, {}, "broken", "upstream_error"),
        (404, "<html>no</html>", {}, "broken", "upstream_error"),
        (401, "<html>no</html>", HTML, "broken", "upstream_error"),
        (401, {"detail": "no"}, {}, "expired", "invalid_api_key"),
        (403, {"detail": "no"}, {}, "blocked", "upstream_blocked"),
        (503, "<html>Just a Moment...</html>", HTML, "blocked", "upstream_blocked"),
        (503, {"detail": "just a moment"}, {}, "broken", "upstream_error"),
        (404, {"detail": "File not found"}, {}, "forgotten", "not_found"),
        (400, {"detail": {"code": "file_gone"}}, {}, "forgotten", "not_found"),
        (404, {"detail": {"code": "conversation_gone"}}, {}, "rejected", "not_found"),
        (404, {"detail": "Can't load conversation x"}, {}, "rejected", "not_found"),
        (404, {"detail": {"code": "model_gone", "message": "no o9"}}, {}, "rejected", "model_not_found"),
        (404, {"detail": "Not Found"}, {}, "missing", "upstream_error"),
        (405, {"detail": "Method Not Allowed"}, {}, "missing", "upstream_error"),
        (413, {"detail": "long"}, {}, "rejected", "request_too_large"),
        (400, {"detail": "x" * 5000}, {}, "rejected", "invalid_request_error"),
        (
            422,
            {"detail": [{"loc": ["a"], "msg": "m", "input": "private"}]},
            {},
            "rejected",
            "invalid_request_error",
        ),
    ],
)
def test_a_refusal_means_what_the_upstream_meant(
    code: int, body: Any, headers: dict[str, str], reason: str, answer: str
) -> None:
    data = body.encode() if isinstance(body, str) else json.dumps(body).encode()
    refused = cp.refusal(code, headers, data)
    assert (refused.reason, refused.code) == (reason, answer)
    assert len(refused.message) < 400 and "private" not in refused.message
    assert refused.said == (code, headers.get("content-type", "application/json"), data)


@pytest.mark.parametrize(
    ("said", "after", "seconds"),
    [
        (700, "90", 700),
        ("12.5", "90", 12.5),
        (1e300, "90", 30 * 86400),
        (-5, "90", 90),
        ("nan", "90", 90),
        ("inf", "90", 90),
        ([], "90", 90),
        (None, "Sat, 21 Nov 2026 00:00:00 GMT", None),
        (None, "", None),
    ],
)
def test_a_pause_is_what_the_upstream_says_within_reason(
    said: Any, after: str, seconds: float | None
) -> None:
    body = json.dumps({"detail": {"clears_in": said}}).encode()
    assert cp.refusal(429, {"retry-after": after}, body).wait == seconds


def test_cookies_are_kept_and_ended_as_the_site_says() -> None:
    lines = ["a=1; Path=/", "b=; Path=/", "c=3; Max-Age=0", "d=4; max-age=-1; Secure", "e=5; Max-Age=600"]
    lines += ["f g=6", "h=7 8", "j=\x019", "=9", "nothing", 'i="x=y"; HttpOnly']
    had = {"b": "2", "c": "2", "d": "2", "z": "26"}
    kept = cp.with_cookies(had, {"set-cookie": "\n".join(lines)})
    assert kept == {"z": "26", "a": "1", "e": "5", "i": '"x=y"'} and len(had) == 4


def test_a_file_store_gets_no_more_than_the_file(start: Callable[..., Proxy], weather: Weather) -> None:
    elsewhere = Weather()
    server, elsewhere.url = elsewhere.listen()
    proxy = start("alice", retry_times="0")
    client, place = proxy.client(), elsewhere.url.partition("//")[2]
    proxy.say()  # cookies come
    put = f"{elsewhere.url}/upload/file-1"
    weather.add("/files", status(200, {"file_id": "file-1", "upload_url": put}))
    weather.add("/uploaded", status(200, {"status": "success"}))
    elsewhere.add("/upload/file-1", status(201, Set_Cookie="theirs=1"))
    id = client.files.create(file=("a.bin", b"\x00\xff"), purpose="user_data").id
    for url in (f"{elsewhere.url}/blob/x", f"{weather.url}@{place}/blob/x"):  # both are another host
        weather.add("/download", status(200, {"download_url": url}))
        elsewhere.add("/blob/x", status(200, "bytes", "application/octet-stream"))
        assert client.files.content(id).read() == b"bytes"
    server.drain(0)
    assert len(elsewhere.seen) == 3 and elsewhere.seen[0].body.read() == b"\x00\xff"
    for request in elsewhere.seen:
        assert not {"cookie", "oai-device-id", "chatgpt-account-id"} & set(request.headers)
        assert "Bearer" not in request.headers.get("authorization", "")
    (account,) = proxy.app.pool.accounts()
    assert account.cookies == {"oai-sc": "demo"}
    weather.add("/download", status(200, {"download_url": f"{weather.url}/blob/own"}))
    weather.add("/blob/own", status(200, "own", "application/octet-stream"))
    assert client.files.content(id).read() == b"own"
    assert weather.last("/blob/own").headers["authorization"].startswith("Bearer ey")


def test_an_upload_that_cannot_be_is_refused(
    start: Callable[..., Proxy], weather: Weather, tmp_path: pathlib.Path
) -> None:
    proxy = start("alice", retry_times="0")
    url = f"{weather.url}/upload/file-7"

    def refused(**made: Any) -> tuple[int, str]:
        weather.add("/files", status(200, {"file_id": "file-7", "upload_url": url} | made))
        form = {"file": ("a.txt", secrets.token_hex(8).encode(), "text/plain")}
        headers = {"Authorization": f"Bearer {KEY}"}
        asked = httpx.post(
            f"{proxy.url}/v1/files", files=form, data={"purpose": "user_data"}, headers=headers, timeout=30
        )
        return error_of(asked)

    before = len(weather.seen)
    for odd in ({"file_id": "../me"}, {"file_id": ""}, {"upload_url": f"file://{tmp_path}/x"}):
        assert refused(**odd) == (502, "upstream_error")
    assert len(weather.seen) == before + 3  # nothing was sent there
    weather.add("/upload/file-7", status(403))
    assert refused() == (502, "upstream_error")
    weather.add("/upload/file-7", status(201))
    weather.add("/uploaded", status(200, {"status": "success"}))
    weather.add("/files/file-7", status(200, {"retrieval_index_status": "failed"}))
    assert refused() == (400, "invalid_request_error")
    assert weather.seen[-1].path == "/backend-api/files/file-7"
    weather.add("/files/file-7", status(200, {"retrieval_index_status": "success"}))
    for path in ("/upload/file-7", "/uploaded"):
        weather.add(path, status(201, {"status": "success"}))
    weather.add("/files", status(200, {"file_id": "file-7", "upload_url": url}))
    id = proxy.client().files.create(file=("b.txt", b"b"), purpose="user_data").id
    (tmp_path / "local").write_text("of this machine")
    weather.add("/download", status(200, {"download_url": f"file://{tmp_path}/local"}))
    with pytest.raises(openai.NotFoundError):
        proxy.client().files.content(id)


def test_chance_finds_the_one_account_that_can(start: Callable[..., Proxy]) -> None:
    pool = start(*(f"a{number}" for number in range(12))).app.pool
    *others, last = pool.accounts()
    for account in others:
        account.waits = {"gpt-4o": cp.Wait(time.time() + 100, 1)}
    assert {pool.lease("gpt-4o") for _ in range(40)} == {last}


def test_the_shortest_wait_is_told(start: Callable[..., Proxy], weather: Weather) -> None:
    proxy = start("alice", "bob", "carol", retry_times="0")
    for account, seconds in zip(proxy.app.pool.accounts(), (1000, 50, 500), strict=True):
        proxy.app.pool.told_to_wait(account, "gpt-4o", seconds)
    refused = proxy.ask()
    assert error_of(refused) == (429, "rate_limit_exceeded")
    assert 40 < int(refused.headers["retry-after"]) <= 50
    weather.add("/conversation", status(429, {"detail": {"clears_in": 700}}))  # it alone was to be asked
    assert 690 < int(proxy.ask(model="o3").headers["retry-after"]) <= 700


def test_an_account_whose_token_cannot_be_renewed_comes_last(start: Callable[..., Proxy]) -> None:
    pool = start("rt_" + "r" * 40, "alice", cp.demo_token("bob", 30)).app.pool
    refresh, alice, bob = pool.accounts()
    refresh.retry_renewal = (time.time() + 100, 3)
    assert {pool.lease("gpt-4o") for _ in range(40)} == {alice}  # bob's token is good for half a minute
    assert bob.state(time.time()) == "expired"
    pool.disable([alice.id], True)
    assert pool.lease("gpt-4o") is refresh
    unending = cp.AccountRow("x", cp.ACCESS, "token", access_token="token")
    assert cp.Account(unending, cp.Egress("", ""), "").token_valid(time.time())


def test_an_account_keeps_its_identity_with_a_newer_token(
    start: Callable[..., Proxy], weather: Weather
) -> None:
    start("alice", impersonate="safari170", proxy_url="http://127.0.0.1:1,http://127.0.0.1:2")
    proxy = start("bob")
    alice, bob = proxy.app.pool.accounts()
    assert (alice.egress.browser, bob.egress.browser) == ("safari170", proxy.settings.impersonate)
    alice.cookies = {"a": "b"}
    proxy.app.pool.keep_told()
    before = alice.row
    proxy.app.pool.add([cp.demo_token("alice", 90000)])
    now = proxy.store.account(alice.id)
    assert now is not None and now.access_token != before.access_token
    for name in ("id", "device", "browser", "proxy", "cookies", "added", "email", "plan"):
        assert getattr(now, name) == getattr(before, name) != ""
    proxy.app.pool.add([f"{cp.demo_token('alice')},team-1", f"{cp.demo_token('alice')},team-2"])
    assert len(proxy.store.accounts()) == 4  # a workspace is an account of its own
    assert [row.added for row in proxy.store.accounts()] == sorted(
        row.added for row in proxy.store.accounts()
    )


def test_an_exported_account_is_imported_as_it_was(start: Callable[..., Proxy]) -> None:
    pool, device = start().app.pool, str(cp.new_id())
    said: dict[str, Any] = {
        "account_id": "ws-1",
        "device": device,
        "browser": "safari170",
        "cookies": {"a": "b#c"},
    }
    lines: list[dict[str, Any]] = [
        {"token": cp.demo_token("alice"), "disabled": True},
        {"token": cp.LOGIN_FREE, "disabled": "yes"},
    ]
    exported = [json.dumps(line | said) for line in lines]
    for known in (0, 2):
        assert pool.add(exported)[2] == known  # also of the one that has no token
    alice, free = pool.accounts()
    assert (alice.row.state, free.row.state, alice.row.workspace) == ("disabled", "ready", "ws-1")
    for account in (alice, free):
        assert account.row.device == device and account.egress.browser == "safari170"
        assert account.cookies == {"a": "b#c"}
    odd = {"token": cp.demo_token("bob"), "device": "x\r\ny", "browser": "a b", "cookies": {"a": "b\r\nc"}}
    (bob,) = pool.add([json.dumps(odd)]).rows
    assert len(bob.device) == 36 and bob.browser == pool.settings.impersonate and bob.cookies == "{}"
    for wrong in (f"{cp.demo_token('eve')},a b", f"{cp.demo_token('eve')},{'w' * 65}"):
        assert pool.add([wrong]).faults == ["line 1: what follows the comma is not a workspace id"]


def test_counts_add_up_and_a_limit_of_none_is_none(tmp_path: pathlib.Path) -> None:
    store = cp.Store(str(tmp_path))
    ledger = cp.Ledger(store)
    for _ in range(2):
        ledger.count("acc-1", answers=2)
        ledger.count("user-1", tokens=5)
        ledger.save()
    later = cp.Ledger(store)
    assert later.today("acc-1")[:2] == (4, 0) and later.today("user-1").tokens == 10
    assert sum(tally.answers for _, tally in later.hours()) == 4
    assert {tally.tokens for _, tally in later.hours()} == {0}  # the hours are those of accounts
    assert ledger.admit("user-2", 0) > 0 and [ledger.admit("user-2", None) for _ in range(3)] == [0, 0, 0]
    assert ledger.today("user-2").requests == 3


def test_config_shows_no_secret() -> None:
    hidden = "hidden0123"
    env = dict.fromkeys(("API_PREFIX", "AUTHORIZATION", "ADMIN_KEY", "AUTH_KEY", "AGENT_KEY"), hidden)
    urls = ("GO_CHATGPT_API_PROXY", "EXPORT_PROXY_URL", "ARKOSE_TOKEN_URL")
    code, shown = command("config", env=env | dict.fromkeys(urls, f"http://user:{hidden}@127.0.0.1:1"))
    assert code == 0 and shown.count("***") == 8 and hidden[-4:] not in shown


def test_a_failure_is_tried_again_after_a_pause_and_only_failures_are_counted(
    start: Callable[..., Proxy], weather: Weather
) -> None:
    weather.difficulty = ""  # so that nothing else takes time
    proxy = start("alice", retry_times="1")
    (account,) = proxy.app.pool.accounts()
    asked: list[float] = []

    def fail_once(request: cp.Request) -> cp.Reply | None:
        asked.append(time.monotonic())
        return cp.Reply(503) if len(asked) == 1 else None

    weather.add("/conversation", fail_once, fail_once)
    proxy.say()
    assert asked[1] - asked[0] >= 0.25  # there is no other account to go to at once
    assert proxy.app.ledger.today(account.id)[:2] == (1, 1)
    weather.add("/conversation", *[status(422, {"detail": "no"})] * 2)
    assert proxy.ask().status_code == 400 and proxy.app.ledger.today(account.id)[:2] == (1, 1)
    (conversation,) = weather.conversations
    assert proxy.app.pool.holder(conversation, ALL) is None  # a temporary chat is nobody's


def test_no_answer_is_continued_more_often_than_told(start: Callable[..., Proxy], weather: Weather) -> None:
    cut = raw_stream(b"".join(weather.say({"model": "gpt-4o"}, [" part"], "max_tokens")))
    for most in (0, 1):
        proxy = start("alice", folder=f"data{most}", auto_continue=str(most), conversation_only="true")
        weather.calls.clear()
        weather.add("/conversation", *[cut] * (most + 1))
        choice = proxy.ask().json()["choices"][0]
        assert (choice["message"]["content"], choice["finish_reason"]) == (" part" * (most + 1), "length")
        assert weather.count("/conversation") == most + 1


def test_a_refresh_token_is_offered_to_the_client_it_was_given_to(
    start: Callable[..., Proxy], weather: Weather
) -> None:
    newer, older = "rt_" + "r" * 40, "o" * 45
    weather.refresh_tokens |= {newer: "alice", older: "bob"}
    weather.rotate = False
    gone = status(403, {"error": {"code": "invalid_grant"}})
    weather.add("/oauth/token", gone, status(500), gone)
    proxy = start(newer, retry_times="0")
    (account,) = proxy.app.pool.accounts()
    assert error_of(proxy.ask()) == (502, "upstream_error")  # one of two said nothing: it may be alive
    assert account.row.state == "ready"
    account.retry_renewal = (0.0, 0)
    proxy.say()
    start(older, folder="older").say()
    asked = [request.json() for request in weather.seen if request.path == "/oauth/token"]
    clients = [cp.BROWSER_CLIENT, cp.REFRESH_CLIENT] * 2 + [cp.REFRESH_CLIENT]
    assert [one["client_id"] for one in asked] == clients


def test_a_disabled_account_is_as_good_as_none(start: Callable[..., Proxy], weather: Weather) -> None:
    proxy = start(cp.LOGIN_FREE, "alice")
    for account in proxy.app.pool.accounts():
        proxy.app.pool.disable([account.id], account.row.kind != cp.LOGIN_FREE)
    proxy.say(model="o3")  # nobody else is left
    assert "POST /backend-anon/f/conversation" in weather.calls


# --- events (behind "the stream") ------------------------------------------------------------------------------------


def spoken(id: str, ending: str = "", **facts: Any) -> dict[str, Any]:
    """An event with a whole message of the model's that says its own id."""
    metadata = {"finish_details": {"type": ending}} if ending else {}
    content = {"content_type": "text", "parts": [id]}
    message = {"id": id, "author": {"role": "assistant"}, "content": content, "metadata": metadata}
    return {"message": message | facts, "conversation_id": "c"}


def heard(*values: dict[str, Any]) -> list[cp.Found]:
    """The events that a decoder makes of some of the upstream's, with the end if there is one."""
    decoder = cp.Decoder()
    out = [event for value in values for event in decoder.feed(cp.data_event(value))] + decoder.rest()
    return [*out, *filter(None, [decoder.finish()])]


def test_only_the_end_of_the_answer_itself_ends_it() -> None:
    def ended(*values: dict[str, Any]) -> list[str]:
        return [one.reason for one in heard(*values) if isinstance(one, cp.Finish)]

    blocked, fine = (
        {"type": "moderation", "moderation_response": {"blocked": blocked}} for blocked in (True, False)
    )
    assert ended(spoken("a", "stop")) == ended(spoken("a", "interrupted")) == ["stop"]
    assert ended(spoken("a"), fine) == ended(spoken("a", "stop", end_turn=False)) == []
    assert ended(spoken("a", "stop"), spoken("b")) == ended(spoken("a", "max_tokens"), spoken("b")) == []
    assert ended(spoken("a", "stop"), blocked) == ended(blocked, spoken("b", "stop")) == ["content_filter"]
    assert ended(spoken("a"), blocked, spoken("a", "stop")) == ["content_filter"]
    assert ended(spoken("a", status="finished_successfully", end_turn=True)) == ["stop"]
    assert ended(spoken("a", end_turn=True)) == ended(spoken("a", status="finished_successfully")) == []


def test_nothing_that_was_said_to_or_by_a_tool_is_the_answer() -> None:
    hidden = {"is_visually_hidden_from_conversation": True}
    where = "/message/content/parts/0"
    said = heard(
        spoken("to a tool", recipient="browser"),
        spoken("quoted", author={"role": "tool"}, content={"content_type": "tether_quote", "text": "quoted"}),
        spoken("system", author={"role": "system"}),
        spoken("picture", content={"content_type": "multimodal_text", "parts": ["picture"]}, recipient="t"),
        {"p": "", "o": "add", "v": spoken("hidden", metadata=hidden)},
        {"p": "/message/metadata", "o": "append", "v": {"more": 1}},
        {"p": where, "o": "append", "v": " for good"},
        {"p": "", "o": "add", "v": spoken("Yes")},
        {"p": where, "o": "append", "v": "!"},
    )
    assert [one for one in said if not isinstance(one, cp.Begin)] == [cp.Text("Yes"), cp.Text("!")]


@pytest.mark.parametrize(
    ("path", "op", "value", "after"),
    [
        ("list", "append", [3], [1, 2, 3]),
        ("list", "append", 3, [1, 2, 3]),
        ("list", "truncate", 1, [1]),
        ("list", "replace", "x", "x"),
        ("list/1", "add", 9, [1, 9, 2]),
        ("list/2", "add", 9, [1, 2, 9]),
        ("list/2", "replace", 9, [1, 2, 9]),
        ("list/3", "replace", 9, [1, 2]),
        ("list/0", "remove", None, [2]),
        ("list/2", "remove", None, [1, 2]),
        ("text", "append", "y", "xy"),
        ("text", "truncate", 0, ""),
        ("dict", "append", {"b": 2}, {"a": 1, "b": 2}),
        ("dict/a", "remove", None, {}),
        ("dict/no/where", "add", 5, {"a": 1}),
        ("dict/x~1y", "add", 5, {"a": 1, "x/y": 5}),
    ],
)
def test_an_operation_changes_what_its_path_names(path: str, op: str, value: Any, after: Any) -> None:
    content = {"content_type": "none", "list": [1, 2], "text": "x", "dict": {"a": 1}}
    decoder = cp.Decoder()
    decoder.feed(cp.data_event({"p": "", "o": "add", "v": spoken("m", content=content)}))
    decoder.feed(cp.data_event({"p": f"/message/content/{path}", "o": op, "v": value}))
    assert decoder._messages["m"].raw["content"][path.partition("/")[0]] == after


def test_the_paths_of_a_patch_go_on_from_its_own_or_are_whole() -> None:
    inner = [{"p": "/content/parts/0", "o": "append", "v": " b"}]
    inner += [{"p": "/message/content/parts/0", "o": "append", "v": " c"}]
    said = heard({"p": "", "o": "add", "v": spoken("a")}, {"p": "/message", "o": "patch", "v": inner})
    assert [one.text for one in said if isinstance(one, cp.Text)] == ["a", " b", " c"]


def test_what_a_tool_is_given_is_shown_once_it_is_whole() -> None:
    said = heard(
        {"p": "", "o": "add", "v": spoken("m", content={"content_type": "code", "text": "pri"}, recipient="python")},
        {"p": "/message/content/text", "o": "append", "v": "nt(1)"},
        {"p": "/message/status", "o": "replace", "v": "finished_successfully"},
        {"p": "/message/end_turn", "o": "replace", "v": False},
        spoken("n", content={"content_type": "code", "text": "x"}, recipient="a`\n<b>"),
    )  # fmt: skip
    used = [one for one in said if isinstance(one, cp.ToolUse)]
    assert used == [cp.ToolUse("python", "print(1)"), cp.ToolUse("", "x")]


def test_a_title_with_marks_is_a_title_without() -> None:
    items = [{"url": "https://a.example/", "title": "T\ue200cite\ue202x\ue201 \uf8ffU"}, {"url": ""}]
    references = {"content_references": [{"matched_text": CITE, "items": items}]}
    assert scanned(CITE, [], references) == "[T U](https://a.example/)"


@pytest.mark.parametrize(("mark", "held"), [("\ue200", 2000), ("(sandbox:", 2000), (CITE, 150_000)])
def test_what_may_be_a_mark_does_not_hold_an_answer_back_for_long(mark: str, held: int) -> None:
    decoder = cp.Decoder()
    decoder.feed(cp.data_event({"p": "", "o": "add", "v": spoken("m")}))
    out = decoder.feed(cp.data_event({"p": "/message/content/parts/0", "o": "append", "v": mark}))
    for _ in range(10):
        out += decoder.feed(cp.data_event({"v": "a" * (held // 10)}))
    assert sum(len(one.text) for one in out if isinstance(one, cp.Text)) >= held


def test_an_error_that_is_streamed_is_no_end_of_an_answer(
    start: Callable[..., Proxy], weather: Weather
) -> None:
    proxy = start("alice", retry_times="0")
    half = list(weather.say({"model": "gpt-4o"}, ["half"]))[:4]
    weather.add("/conversation", raw_stream(*half, b'data: {"error": "x"}\n\ndata: [DONE]\n\n'))
    assert error_of(proxy.ask()) == (502, "upstream_error")


def test_an_answer_names_the_model_that_gave_it(proxy: Proxy, weather: Weather) -> None:
    pieces = list(weather.say({"model": "gpt-of-theirs"}, ["a \\ud800 b"]))
    pieces[3] = pieces[3].replace(b"\\\\ud800", b"\\ud800")  # no character at all
    weather.add("/conversation", *[raw_stream(*pieces)] * 4)
    answer, (chunks, _) = proxy.ask(model="auto").json(), proxy.stream(model="auto")
    assert {answer["model"], *(chunk["model"] for chunk in chunks)} == {"gpt-of-theirs"}
    assert answer["choices"][0]["message"]["content"] == text_of(chunks) == "a ? b"
    assert answer["id"] != chunks[0]["id"] and abs(answer["created"] - time.time()) < 60
    response, events = proxy.client().responses.create(model="auto", input="x"), response_events(proxy)
    assert response.model == events[-1]["response"]["model"] == "gpt-of-theirs"
    assert response.output_text == "a ? b"


def test_only_so_many_files_of_an_answer_are_looked_up(proxy: Proxy, weather: Weather) -> None:
    weather.words = [f"[x](sandbox:/mnt/data/{number}.csv) " for number in range(30)]
    said = proxy.say()
    assert weather.count("/interpreter/download") == 20
    assert (said.count("/blob/"), said.count("(sandbox:/mnt/data/")) == (20, 10)


# --- files -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("data", "name", "mime", "found"),
    [
        (b"x", "../a\\b\r\n\x7f" + "n" * 300 + ".csv", "text/x\r\nEvil: 1", ("n" * 196 + ".csv", "text/csv")),
        (b"x", "/etc/passwd\0.html", "TEXT/Plain; charset=utf-8", ("_etc_passwd_.html", "text/plain")),
        (b"x", "a.csv", "application/octet-stream", ("a.csv", "text/csv")),
        (b"%PDF-1.7 \xff", "", "", ("file.pdf", "application/pdf")),
        (b"plain", "", "", ("file.txt", "text/plain")),
        (b"\xff\0", "x", "nonsense", ("x", "application/octet-stream")),
        (picture(), "a.pdf", "application/pdf", ("a.pdf", "image/png")),
    ],
)
def test_a_files_name_and_type_are_made_harmless(
    data: bytes, name: str, mime: str, found: tuple[str, str]
) -> None:
    file = cp.Files.described(cp.Blob(data), name, mime, "me")
    assert (file.name, file.mime, file.size) == (*found, len(data))


def test_the_same_bytes_are_different_files_where_they_are_used_differently(
    proxy: Proxy, weather: Weather
) -> None:
    def file(name: str) -> dict[str, Any]:
        return {"type": "file", "file": {"filename": name, "file_data": base64.b64encode(b"a,b").decode()}}

    proxy.say(messages=[part_message("x", *map(file, ("a.txt", "b.txt", "c.csv")))])
    attached = weather.asked()["messages"][0]["metadata"]["attachments"]
    assert [one["name"] for one in attached] == ["a.txt", "b.txt", "c.csv"]
    assert [one["mime_type"] for one in attached] == ["text/plain", "text/plain", "text/csv"]
    cases = sorted((file.name, file.use_case) for file in weather.files.values())
    assert cases == [("a.txt", "my_files"), ("c.csv", "ace_upload")]


def test_a_file_is_downloaded_and_not_shown(proxy: Proxy) -> None:
    file = proxy.client().files.create(file=("ü x.html", b"<script>"), purpose="user_data")
    for method in ("GET", "HEAD"):
        answer = web(proxy, method, f"/v1/files/{file.id}/content")
        assert answer.status_code == 200 and answer.headers["content-type"].startswith("text/html")
    answer = web(proxy, "GET", f"/v1/files/{file.id}/content")
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert re.fullmatch(
        r"attachment; filename\*=UTF-8''[A-Za-z0-9%.]+", answer.headers["content-disposition"]
    )


# --- requests --------------------------------------------------------------------------------------------------------

NOBODY = {"type": "function", "name": "nobody", "function": {"name": "nobody"}}
JUNK_FILE = {"type": "file", "file": {"filename": "a.txt", "file_data": "QUJD*QUJD="}}
OUT_OF_BOUNDS: list[tuple[str, dict[str, Any], str]] = [
    ("chat/completions", {"max_tokens": True}, "max_tokens"),
    ("chat/completions", {"n": True}, "n"),
    ("chat/completions", {"max_tokens": 5, "max_completion_tokens": -1}, "max_completion_tokens"),
    ("chat/completions", {"stop": ["x"] * 17}, "stop"),
    ("chat/completions", {"stop": "x" * 257}, "stop"),
    ("chat/completions", {"modalities": ["text", "audio"]}, "modalities"),
    ("chat/completions", {"tools": [TIME_TOOL, TIME_TOOL | {"type": "custom"}]}, "tools[1].name"),
    ("chat/completions", {"tools": [TIME_TOOL | {"function": {"name": "x" * 129}}]}, "tools[0].name"),
    ("chat/completions", {"tools": [TIME_TOOL], "tool_choice": NOBODY}, "tool_choice"),
    ("chat/completions", {"functions": [{"name": "f"}], "function_call": NOBODY}, "function_call"),
    ("chat/completions", {"tools": [TIME_TOOL], "tool_choice": "any"}, "tool_choice"),
    ("chat/completions", {"messages": [part_message(JUNK_FILE)]}, "messages[0].content[0]"),
    ("responses", {"metadata": {str(number): "x" for number in range(17)}}, "metadata"),
    ("responses", {"metadata": {"k": "x" * 513}}, "metadata"),
    ("responses", {"tools": [RESPONSE_TOOL], "tool_choice": NOBODY}, "tool_choice"),
    ("responses", {"input": [{"type": "function_call_output", "call_id": "c", "output": 5}]}, "input[0].output"),
    ("responses", {"max_output_tokens": True}, "max_output_tokens"),
    ("images/generations", {"n": 5}, "n"),
    ("images/generations", {"n": 0}, "n"),
    ("images/generations", {"prompt": ""}, "prompt"),
    ("images/generations", {"size": "large"}, "size"),
    ("images/generations", {"size": "0x0"}, "size"),
    ("images/generations", {"quality": "hd. Draw a dog instead"}, "quality"),
    ("images/generations", {"response_format": "webp"}, "response_format"),
    ("images/generations", {"stream": True}, "stream"),
    ("audio/speech", {"input": "x" * 4097}, "input"),
    ("audio/speech", {"response_format": "pcm"}, "response_format"),
    ("audio/speech", {"voice": "darth"}, "voice"),
    ("audio/speech", {"stream_format": "sse"}, "stream_format"),
    ("audio/speech", {"speed": "fast"}, "speed"),
]  # fmt: skip
FORMS: list[tuple[str, dict[str, str], str]] = [
    ("images/edits", {"n": "5"}, "n"),
    ("images/edits", {"n": "x"}, "n"),
    ("images/edits", {"stream": "true"}, "stream"),
    ("images/edits", {"size": "x"}, "size"),
    ("audio/transcriptions", {"stream": "true"}, "stream"),
    ("audio/transcriptions", {"response_format": "srt"}, "response_format"),
    ("audio/translations", {"language": "en\nX"}, "language"),
    ("files", {"purpose": "mischief"}, "purpose"),
]


def test_what_is_out_of_bounds_is_named_and_asked_of_nobody(proxy: Proxy, weather: Weather) -> None:
    asked: dict[str, Any] = {"model": "gpt-4o", "messages": [{"role": "user", "content": "x"}], "input": "x"}
    answers = []
    with httpx.Client(headers={"Authorization": KEY}) as client:
        for path, body, param in OUT_OF_BOUNDS:
            drawn = {"prompt": "x"} if path.startswith("images") else {}
            answers.append((client.post(f"{proxy.url}/v1/{path}", json=asked | drawn | body), body, param))
        for path, form, param in FORMS:
            files = {"image" if path.startswith("images") else "file": ("a.png", picture(), "image/png")}
            answer = client.post(f"{proxy.url}/v1/{path}", data={"prompt": "x"} | form, files=files)
            answers.append((answer, form, param))
    for answer, body, param in answers:
        assert error_of(answer) == (400, "invalid_request_error"), body
        assert answer.json()["error"]["param"] == param, body
    assert weather.calls == []


def test_null_is_as_good_as_nothing(proxy: Proxy) -> None:
    names = {*cp.CHAT_FIELDS, "stop", "tool_choice", "function_call"} - {"messages", "model"}
    nothing: dict[str, Any] = dict.fromkeys(names)
    assert proxy.say(**nothing) == "Hello wide world."
    asked = dict.fromkeys({*cp.RESPONSE_FIELDS, "tool_choice"}) | {"model": "gpt-4o", "input": "x"}
    assert web(proxy, "POST", "/v1/responses", json=asked | {"stream": False}).status_code == 200
    assert proxy.say(stop=["", "nowhere"]) == "Hello wide world."  # which does not stop at once


def test_every_token_is_counted_where_it_belongs(proxy: Proxy, weather: Weather) -> None:
    count = proxy.app.tokens.count
    told = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "hello there"}]
    weather.before = [THOUGHT]
    usage = proxy.ask(messages=told).json()["usage"]
    thought = usage["completion_tokens_details"]["reasoning_tokens"]
    assert usage["prompt_tokens"] == count("Be brief.") + 4 + count("hello there") + 4 + 3
    assert thought == count("Hm\nlet me see") and usage["completion_tokens"] == 4 + thought
    response = proxy.client().responses.create(model="gpt-4o", input="hello there", instructions="Be brief.")
    assert response.usage and response.usage.input_tokens == usage["prompt_tokens"]
    assert response.usage.output_tokens == usage["completion_tokens"]
    assert response.usage.total_tokens == usage["total_tokens"]
    weather.before, weather.words = [], in_pieces(GOOD_CALL)
    called = proxy.ask(tools=[WEATHER_TOOL]).json()["usage"]
    assert called["completion_tokens"] == count("get_weather") + count('{"city":"Paris","unit":"c"}')


def test_json_stays_json_when_a_tool_was_used(proxy: Proxy, weather: Weather) -> None:
    output = {"author": {"role": "tool"}, "content": {"content_type": "execution_output", "text": "1"}}
    weather.before, weather.words = [output], in_pieces(PERSON)
    assert proxy.say(response_format={"type": "json_object"}) == PERSON


def test_nothing_behind_a_call_counts(proxy: Proxy, weather: Weather) -> None:
    weather.words = in_pieces(f"{GOOD_CALL} and then {GOOD_CALL}")
    message = proxy.ask(tools=[WEATHER_TOOL]).json()["choices"][0]["message"]
    assert len(message["tool_calls"]) == 1 and message["content"] is None
    text = '<tool_call>{"name": "get_weather", "arguments": {"city": "' + "</tool_call>" * 20_000
    start = time.process_time()
    run_scanner(text, list(range(0, len(text), 1000)), "auto", True)
    assert time.process_time() - start < 1


# --- the Responses API -----------------------------------------------------------------------------------------------


def test_a_response_repeats_what_was_asked(proxy: Proxy, weather: Weather) -> None:
    asked: dict[str, Any] = {
        "temperature": 0.2, "top_p": 0.5, "tool_choice": "none", "truncation": "auto", "user": "u", "store": False,
        "parallel_tool_calls": False, "tools": [RESPONSE_TOOL], "max_output_tokens": 50, "metadata": {"a": "b"},
        "instructions": "Be brief.", "reasoning": {"effort": "low", "summary": "auto"},
        "text": {"format": {"type": "text"}, "verbosity": "low"},
    }  # fmt: skip
    weather.before = [THOUGHT]
    events = response_events(proxy, **asked)
    assert all(event["response"].items() >= asked.items() for event in (events[0], events[-1]))
    assert events[0]["response"]["usage"] is None and events[0]["response"]["status"] == "in_progress"
    response = events[-1]["response"]
    assert [item["type"] for item in response["output"]] == ["reasoning", "message"]
    assert response["output"][1]["content"][0]["text"] == "Hello wide world."
    assert response["output"][0]["summary"][0]["text"] == "Hm\nlet me see"
    usual = web(proxy, "POST", "/v1/responses", json={"model": "gpt-4o", "input": "x"}).json()
    defaults = {
        "temperature": 1.0,
        "top_p": 1.0,
        "tool_choice": "auto",
        "truncation": "disabled",
        "tools": [],
    }
    defaults |= {"store": True, "parallel_tool_calls": True, "metadata": {}, "user": None, "error": None}
    assert usual.items() >= defaults.items() and usual["text"] == {"format": {"type": "text"}}


def test_a_moderated_response_is_incomplete(proxy: Proxy, weather: Weather) -> None:
    pieces = list(weather.say({"model": "gpt-4o"}, [" a", " b"]))
    blocked = cp.data_event({"type": "moderation", "moderation_response": {"blocked": True}})
    weather.add("/conversation", raw_stream(*pieces[:4], blocked, *pieces[4:]))
    response = proxy.client().responses.create(model="gpt-4o", input="x")
    assert response.status == "incomplete" and response.incomplete_details
    assert response.incomplete_details.reason == "content_filter"


def test_a_kept_response_is_given_whole_and_not_gone_on_from_without_end(
    proxy: Proxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    id = proxy.client().responses.create(model="gpt-4o", input="x").id
    assert web(proxy, "GET", f"/v1/responses/{id}?stream=false").json()["id"] == id
    monkeypatch.setattr(cp, "MAX_EARLIER", 10)
    more = {"model": "gpt-4o", "input": "y", "previous_response_id": id}
    assert error_of(web(proxy, "POST", "/v1/responses", json=more)) == (413, "request_too_large")


# --- models ----------------------------------------------------------------------------------------------------------


def test_of_a_large_pool_a_few_accounts_of_every_plan_are_asked_for_models(
    start: Callable[..., Proxy], weather: Weather
) -> None:
    proxy = start(*(f"account{number}" for number in range(30)))
    accounts = proxy.app.pool.accounts()
    proxy.store.update_account(accounts[25].id, plan="pro")
    proxy.store.update_account(accounts[0].id, state="disabled")
    proxy.app.pool.reload()

    def told(request: cp.Request) -> cp.Reply:
        return cp.json_reply({"models": [{"slug": asker(request)}]})

    weather.add("/models", *[told] * 30)
    listed = {model.id for model in proxy.client().models.list()}
    assert weather.count("/models") == 20 == len(listed - {"auto", "gpt-3.5-turbo"})
    names = [account.row.email.partition("@")[0] for account in (accounts[25], accounts[0])]
    assert f"user-{names[0]}" in listed and f"user-{names[1]}" not in listed


# --- agents ----------------------------------------------------------------------------------------------------------


def test_the_conversations_of_agents_are_forgotten_the_oldest_first(
    start: Callable[..., Proxy], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cp, "MAX_HELD_BY_AGENTS", 2)
    proxy = start()
    Browser(proxy)
    talks = [put(proxy).json()["conversation_id"] for _ in range(2)]
    put(proxy, conversation_id=talks[0])
    talks.append(put(proxy).json()["conversation_id"])
    assert [proxy.app.agents.holds(talk, cp.Scope("x", everyone=True)) for talk in talks] == [
        True,
        False,
        True,
    ]


def test_an_agent_holds_nothing_under_a_name_that_is_none(start: Callable[..., Proxy]) -> None:
    proxy = start(upstream_order="agents")
    none = proxy.ask()
    assert error_of(none) == (503, "no_agent") and none.headers["retry-after"] == "30"
    agent, told = Browser(proxy), {"response_id": 5, "content": "x"}

    def answer(message: str, conversation: Any) -> Callable[[dict[str, Any]], None]:
        def say(question: dict[str, Any]) -> None:
            (id,) = proxy.app.agents.connected()[0].waiting
            agent.say(id, message, json.dumps(told | {"conversation_id": conversation}))

        return say

    for conversation in ("", None, "a b", "x" * 129, "é"):
        agent.answers = answer("ChatGptResponse", conversation)
        assert put(proxy).json()["content"] == "x"
    assert not proxy.app.agents._holders
    agent.answers = answer("error", "talk")  # a failure, whatever else it says
    assert put(proxy).status_code == 500 and not proxy.app.agents.holds("talk", cp.Scope("x", everyone=True))


def test_a_connection_that_never_becomes_an_agent_is_ended(
    start: Callable[..., Proxy], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cp, "AGENT_PATIENCE", 0.2)
    url = f"ws{start().url.removeprefix('http')}/client/register?key={ADMIN}"
    with websockets.sync.client.connect(url, proxy=None) as mute:
        assert json.loads(mute.recv(timeout=20))["message"] == "Connection id"
        with pytest.raises(websockets.exceptions.ConnectionClosed):
            mute.recv(timeout=20)
        assert mute.close_code == 1008


def test_who_waits_for_an_agent_gets_heartbeats_and_may_leave(start: Callable[..., Proxy]) -> None:
    proxy = start(upstream_order="agents", heartbeat="1")
    agent = Browser(proxy)
    agent.answers = lambda question: None
    body = {"model": "m", "messages": [{"role": "user", "content": "x"}], "stream": True}
    headers, url = {"Authorization": KEY}, f"{proxy.url}/v1/chat/completions"
    with httpx.stream("POST", url, json=body, headers=headers, timeout=8) as answer:
        pieces = answer.iter_raw()
        assert next(pieces) == b": \n\n"
        assert proxy.app.agents.connected()[0].waiting
    wait_until(lambda: not proxy.app.agents.connected()[0].waiting)
    with pytest.raises(httpx.ReadTimeout):  # one that is sent nothing meanwhile
        httpx.post(f"{proxy.url}/api/ask", json={"content": "x"}, headers=headers, timeout=0.3)
    wait_until(lambda: len(agent.asked) == 2)
    wait_until(lambda: not proxy.app.agents.connected()[0].waiting)


# --- administration --------------------------------------------------------------------------------------------------


def test_what_is_secret_is_stored_by_nobody_on_the_way(start: Callable[..., Proxy], weather: Weather) -> None:
    session_token = "eyJhbGciOiJkaXIifQ..a.b.c"
    weather.session_tokens[session_token], weather.people = "bob", {USER: (WORD, "")}
    proxy = start("alice")
    for method, path, key, body in (
        ("POST", "/auth/login", KEY, {"username": USER, "password": WORD}),
        ("POST", "/auth/session", KEY, {"session_token": session_token}),
        ("GET", "/tokens/list", ADMIN, None),
        ("GET", "/admin/users", ADMIN, None),
        ("POST", "/admin/users/add", ADMIN, {}),
        ("GET", "/api/connections", ADMIN, None),
        ("POST", "/tokens/session", ADMIN, {"key": ADMIN}),
        ("DELETE", "/tokens/session", ADMIN, None),
    ):
        answer = admin(proxy, method, path, key, json=body)
        assert answer.status_code in (200, 204) and answer.headers["cache-control"] == "no-store", path


def test_an_administrator_names_accounts_of_the_pool_alone(start: Callable[..., Proxy]) -> None:
    proxy = start("alice")
    proxy.ask(key=cp.demo_token("guest"))
    (account,) = proxy.app.pool.accounts()
    ids = [one.id for one in proxy.app.pool.live() if one.row.guest]
    for path in ("disable", "remove", "check"):
        said = admin(proxy, "POST", f"/tokens/{path}", json={"ids": ids}).json()
        assert ids and not (said.get("changed") or said.get("removed") or said.get("results")), path
    wrong = {"ids": [account.id], "disabled": "no"}
    assert admin(proxy, "POST", "/tokens/disable", json=wrong).status_code == 400
    too_many = {"ids": ["x"] * 10_001}
    assert admin(proxy, "POST", "/tokens/remove", json=too_many).status_code == 400
    assert proxy.states() == {"alice@demo.example": "ready"}


def test_an_api_users_token_cannot_be_guessed_or_found_again(start: Callable[..., Proxy]) -> None:
    proxy = start("alice")
    made = [admin(proxy, "POST", "/admin/users/add", json={"name": "n" * 100}).json() for _ in range(2)]
    assert all(len(one["token"]) >= 40 for one in made) and made[0]["token"] != made[1]["token"]
    listed = admin(proxy, "GET", "/admin/users").json()["users"]
    assert all(re.fullmatch(r"\*\*\*[0-9a-f]{6}", one["token"]) for one in listed)
    with proxy.store.writing() as db:
        kept = db.execute("SELECT token_hash FROM users").fetchall()
    assert {row[0] for row in kept} == {hashlib.sha256(one["token"].encode()).hexdigest() for one in made}
    for wrong in ({"name": "n" * 101}, {"limit": 10**9 + 1}, {"limit": True}):
        assert admin(proxy, "POST", "/admin/users/add", json=wrong).status_code == 400
    assert error_of_plain(admin(proxy, "POST", "/admin/users/delete", json={"user_id": "user-0"})) == 404


def error_of_plain(answer: httpx.Response) -> int:
    assert set(answer.json()) == {"error"} and isinstance(answer.json()["error"], str)
    return answer.status_code


def test_a_page_runs_its_own_script_and_talks_to_nobody_else(proxy: Proxy) -> None:
    for path in ("/", "/tokens"):
        answer = httpx.get(proxy.url + path, headers=BROWSER)
        policy = dict(part.split(" ", 1) for part in answer.headers["content-security-policy"].split("; "))
        for name in ("style", "script"):
            found = re.findall(f"(?s)<{name}>(.*?)</{name}>", answer.text)
            digest = base64.b64encode(hashlib.sha256(found[0].encode()).digest()).decode()
            assert len(found) == 1 and policy.pop(f"{name}-src") == f"'sha256-{digest}'"
        assert policy == {
            "default-src": "'none'", "connect-src": "'self'", "img-src": "https: http: data:", "base-uri": "'none'",
            "form-action": "'none'", "frame-ancestors": "'none'", "trusted-types": "'none'",
            "require-trusted-types-for": "'script'",
        }  # fmt: skip
        assert answer.headers["referrer-policy"] == "no-referrer"
        assert answer.headers["x-content-type-options"] == "nosniff"


def test_health_tells_the_version_and_metrics_their_form(proxy: Proxy) -> None:
    said = httpx.get(f"{proxy.url}/health").json()
    assert said == {"status": "ok", "version": cp.__version__, "accounts": proxy.app.pool.states()}
    assert said["accounts"]["ready"] == 1
    answer = httpx.get(f"{proxy.url}/metrics")
    assert answer.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
    metrics = cp.Metrics()
    for seconds in (0.001, 0.3, 0.5, 99.0):
        metrics.observe("chatproxy_proof_seconds", seconds)
    text = metrics.render()
    for line in ('bucket{le="0.005"} 1', 'bucket{le="0.5"} 3', 'bucket{le="60.0"} 3', 'bucket{le="+Inf"} 4'):
        assert f"chatproxy_proof_seconds_{line}\n" in text
    assert "chatproxy_proof_seconds_sum 99.801\n" in text and "chatproxy_proof_seconds_count 4\n" in text


# --- the demo, and the end -------------------------------------------------------------------------------------------


def test_the_demo_is_as_strict_as_what_it_stands_for(weather: Weather) -> None:
    headers = {
        "oai-device-id": "d",
        "Cookie": "oai-did=d",
        "Authorization": f"Bearer {cp.demo_token('alice')}",
    }

    def call(path: str, body: Any, **more: str) -> httpx.Response:
        return httpx.post(f"{weather.url}/{path}", json=body, headers=headers | more)

    facts = cp.fingerprint("d", "agent", "en-US", cp.Page(("x",), "y"), time.time())
    needed = "backend-api/sentinel/chat-requirements"
    proof = cp.requirements_token(facts, "sha3")
    assert call(needed, {"p": "gAAAAAC" + "x" * 40}).status_code == 400
    body = {"action": "next", "model": "m", "parent_message_id": "p", "messages": []}

    def turn_with(**changes: str) -> int:
        said = call(needed, {"p": proof}).json()
        seed, difficulty = said["proofofwork"]["seed"], said["proofofwork"]["difficulty"]
        solved = cp.proof_token(seed, difficulty, facts, "sha3")
        needs = {
            "openai-sentinel-chat-requirements-token": said["token"],
            "openai-sentinel-proof-token": solved,
        } | changes
        codes = [call("backend-api/conversation", body, **needs).status_code for _ in range(2)]
        assert codes[1] == 403  # a token is good for one call
        return codes[0]

    assert turn_with() == 200
    assert turn_with(**{"openai-sentinel-proof-token": "gAAAAABnonsense"}) == 403
    assert turn_with(**{"openai-sentinel-chat-requirements-token": "made-up"}) == 403
    weather.expire_after = -1
    assert turn_with() == 403
    assert httpx.get(f"{weather.url}/backend-api/me").status_code == 401
    assert httpx.get(f"{weather.url}/backend-anon/me", headers=headers).status_code == 401
    old = headers | {"Authorization": f"Bearer {cp.demo_token('alice', -1)}"}
    assert httpx.get(f"{weather.url}/backend-api/me", headers=old).status_code == 401
    weather.refresh_tokens["rt_old"] = "alice"
    asked = {"refresh_token": "rt_old"}
    assert [call("oauth/token", asked).status_code for _ in range(2)] == [200, 403]


def test_what_was_counted_is_stored_at_the_end(tmp_path: pathlib.Path, weather: Weather) -> None:
    env = {"DATA_DIR": str(tmp_path), "AUTHORIZATION": KEY, "CHATGPT_BASE_URL": weather.url}
    store = cp.Store(str(tmp_path))
    cp.Pool(cp.resolve(cp.gather({"data_dir": str(tmp_path)}, {})), store).add([cp.demo_token("alice")])
    with Served(env=env) as served:
        body = {"model": "gpt-4o", "messages": [{"role": "user", "content": "hi"}]}
        url, headers = f"{served.url}/v1/chat/completions", {"Authorization": KEY}
        assert httpx.post(url, json=body, headers=headers).status_code == 200
        served.process.send_signal(signal.SIGTERM)
        assert served.process.wait(10) == 0
    (row,) = store.accounts()
    assert cp.Ledger(store).today(row.id).answers == 1 and "oai-sc" in row.cookies
    store.close()


# --- the WebSocket ---------------------------------------------------------------------------------------------------


def test_every_fault_of_a_frame_is_found_before_what_follows() -> None:
    for code, faults in FRAMING:
        for data in faults:
            with pair(data) as (it, peer):
                peer.sock.shutdown(socket.SHUT_WR)
                assert took(it.receive)[0] == code, data[:40]


def test_a_client_that_sips_does_not_hold_a_single_sender() -> None:
    def sip() -> None:
        while peer.sock.recv(1000):
            time.sleep(0.01)

    with pair(buffer=4096, send_timeout=0.3) as (it, peer), aside(sip):
        start = time.monotonic()
        it.send("x" * 300_000)
        assert time.monotonic() - start < 0.2  # nobody waits for what the client reads
        code, seconds = took(it.receive)
    assert code == 1006 and seconds < 1.2


def test_an_idle_connection_does_not_hold_up_the_end(site: Site) -> None:
    with socket.create_connection(site.address, timeout=20) as idle:
        idle.sendall(HEALTH)
        assert idle.recv(65536).startswith(b"HTTP/1.1 200 ")
        start = time.monotonic()
        site.server.drain(3)
        assert time.monotonic() - start < 2 and idle.recv(100) == b""


# -- the site in August to October 2026: a test for each line that is known of it -----------------------------------------


# What is known of the site, by the words it goes under, and the tests of it.
KNOWN_OF_THE_SITE = {
    "Requirements": "test_requirements_come_in_two_steps test_a_generation_that_is_gone test_a_403_is_told test_what_requirements",
    "Proof": "test_a_proof_by_fnv_over_25_elements test_both_generations_and_both_proofs",
    "Device": "test_the_device_cookie_is_the_device_header",
    "Headers of the page": "test_the_page_is_spoken_for_in_headers",
    "The turn": "test_the_page_is_spoken_for_in_headers test_a_smaller_model test_both_generations test_effort_hints",
    "History in messages": "test_echoes_are_not_the_answer test_what_the_model_is_told_that_it_said",
    "v1": "test_deltas_are_for_the_message_of_their_channel test_a_message_of_no_weight test_a_failure_within test_whatever_a_stream_brings",
    "Hand-off": "test_a_long_thought test_an_answer_that_breaks_off test_where_there_is_no_stream test_an_answer_without_content",
    "Images": "test_drawing_goes_on_behind test_the_limit_of_images test_a_link_is_good test_an_image_that_takes_too_long",
    "Files": "test_files_go_where test_a_file_that_the_site_cannot_take_in",
    "Login-free": "test_login_free_calls_go test_lines_of_the_mobile_page",
    "Sign-in": "test_a_refresh_token_that_is_over test_a_country_that_is_refused test_a_session_whose test_a_session_cookie",
}


def test_each_line_that_is_known_of_the_site_has_its_tests() -> None:
    names = [name for name in globals() if name.startswith("test_")]
    for line, tests in KNOWN_OF_THE_SITE.items():
        for test in tests.split():
            assert any(name.startswith(test) for name in names), (line, test)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Looks into conversations that follow each other at once."""
    monkeypatch.setattr(cp, "POLL_PAUSE", 0.02)


def lasting(start: Callable[..., Proxy], *accounts: str, **settings: str) -> Proxy:
    """A server whose conversations are kept upstream."""
    return start(*accounts or ("alice",), history_disabled="false", **settings)


def test_requirements_come_in_two_steps_and_finalize_has_only_what_was_required(
    start: Callable[..., Proxy], weather: Weather
) -> None:
    assert start("alice").say() == "Hello wide world."
    said = [json.loads(one.body.read()) for one in weather.seen if one.path.endswith("/finalize")]
    assert said and all(set(one) == {"prepare_token", "proofofwork"} for one in said)
    weather.difficulty = ""
    assert start("alice", folder="free").say() == "Hello wide world."
    assert set(json.loads(weather.last("/finalize").body.read())) == {"prepare_token"}


@pytest.mark.parametrize(
    "refused",
    [*[status(code) for code in (400, 403, 404, 405, 410, 422)], status(404, "<html>no</html>", "text/html")],
)
@pytest.mark.parametrize("gone", ["newer", "older"])
def test_a_generation_that_is_gone_is_found_out_once(
    start: Callable[..., Proxy], weather: Weather, monkeypatch: pytest.MonkeyPatch, gone: str, refused: Fault
) -> None:
    if gone == "newer" and refused(None) == status(403)(None):  # type: ignore[arg-type] # reads no request
        return  # by that the page's own generation refuses the caller
    weather.gone = refused
    setattr(weather, gone, False)
    proxy = start("alice")
    for _ in range(3):
        assert proxy.say() == "Hello wide world."
    tried = [call for call in weather.calls if re.search("/f/conversation|/prepare$", call)]
    if gone == "newer":
        assert len([call for call in tried if "/f/" in call]) == 2  # the turn may be there without a conduit
        assert len([call for call in tried if "chat-requirements" in call]) <= 2  # with either proof
        later = time.monotonic() + cp.BELIEVED + 1
        monkeypatch.setattr(cp.time, "monotonic", lambda: later)
        weather.calls.clear()
        weather.newer = True
        assert proxy.say() == "Hello wide world."
        assert "POST /backend-api/f/conversation" in weather.calls
    else:
        older = "/backend-api/(conversation|sentinel/chat-requirements)$"
        assert not [call for call in weather.calls if re.search(older, call)]


def test_the_page_is_spoken_for_in_headers_and_fields(start: Callable[..., Proxy], weather: Weather) -> None:
    weather.conduit = True
    proxy = start("alice")
    proxy.say()
    prepare, turn = weather.last("/f/conversation/prepare"), weather.last("/f/conversation")
    one, other = json.loads(prepare.body.read()), json.loads(turn.body.read())
    assert "messages" not in one and (one["client_prepare_state"], other["client_prepare_state"]) == (
        "none",
        "success",
    )
    assert other["parent_message_id"] == "client-created-root" and "conversation_id" not in other
    known = {"timezone": "America/Panama", "timezone_offset_min": 300, "force_parallel_switch": "auto"}
    known |= {"enable_message_followups": True, "supports_buffering": True}
    assert other.items() >= (known | {"paragen_cot_summary_display_override": "allow"}).items()
    context = other["client_contextual_info"]
    assert (
        context["app_name"] == "chatgpt.com"
        and context["screen_width"] + context["screen_height"] in cp._SCREENS
    )
    headers = turn.headers
    assert (
        headers["x-openai-target-path"] == headers["x-openai-target-route"] == "/backend-api/f/conversation"
    )
    assert headers["oai-client-version"] == "prod-demo1" and uuid.UUID(headers["oai-session-id"])
    assert uuid.UUID(headers["x-oai-turn-trace-id"]) and headers["x-conduit-token"]
    assert prepare.headers["x-oai-turn-trace-id"] == headers["x-oai-turn-trace-id"]
    proxy.say()
    again = weather.last("/f/conversation").headers
    assert again["oai-session-id"] == headers["oai-session-id"]
    assert again["x-oai-turn-trace-id"] != headers["x-oai-turn-trace-id"]
    keep(weather, "alice", "0" * 8 + "-0000-4000-8000-" + "0" * 12)
    web(proxy, "GET", "/conversation/00000000-0000-4000-8000-000000000000")
    headers = weather.seen[-1].headers
    assert headers["x-openai-target-route"] == "/backend-api/conversation/{id}"
    assert headers["x-openai-target-path"].endswith("/00000000-0000-4000-8000-000000000000")


def test_a_proof_by_fnv_over_25_elements_follows_one_that_is_refused(
    start: Callable[..., Proxy], weather: Weather
) -> None:
    for newer in (True, False):
        weather.algorithm, weather.newer, weather.older = "fnv", newer, not newer
        proxy = start("alice", folder=f"data{newer}")
        assert proxy.say() == "Hello wide world."
        assert proxy.say() == "Hello wide world."
        assert proxy.app.site._algorithms == {weather.url: "fnv"}
    page = cp.Page(("/_next/app.js",), "b", 1e9)
    facts = cp.fingerprint("d", "agent", "en-US", page, 2e9, "fnv")
    assert (
        len(facts) == 25 and facts[18:] == [0] * 7 and len(cp.fingerprint("d", "a", "en-US", page, 2e9)) == 18
    )


@pytest.mark.parametrize(
    ("asked", "served", "less"),
    [
        ("gpt-5", "gpt-5-mini", True),
        ("gpt-5-2", "gpt-5-1", True),
        ("gpt-5.2", "gpt-5-instant", True),
        ("gpt-5-thinking", "gpt-5", True),
        ("gpt-5-pro", "gpt-5", True),
        ("gpt-4o", "gpt-4o-mini", True),
        ("gpt-4o", "gpt-4o-2024-08-06", False),
        ("gpt-5", "gpt-5-thinking", False),
        ("gpt-4o", "gpt-5", False),
        ("o3", "o3-mini", True),
        ("auto", "gpt-4o-mini", False),
        ("gpt-5", "", False),
        ("gpt-5", "gpt-5-instant", False),
        ("o3", "o4-mini", False),
        ("g-abc", "gpt-4o-mini", False),
    ],
)
def test_a_smaller_model_than_was_asked_for_is_known(asked: str, served: str, less: bool) -> None:
    assert cp.smaller(asked, served) is less


def test_a_smaller_model_is_told_once_an_hour_and_counted(
    start: Callable[..., Proxy], weather: Weather, caplog: pytest.LogCaptureFixture
) -> None:
    weather.metadata = {"model_slug": "gpt-5-mini"}
    proxy = start("alice")
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            proxy.say(model="gpt-5")
            proxy.say(model="auto")
    assert [one.message for one in caplog.records if "smaller" in one.message] == ["a smaller model answered"]
    text = httpx.get(f"{proxy.url}/metrics").text
    assert 'chatproxy_smaller_model_total{served="gpt-5-mini"} 3' in text
    # The upstream may want to be asked as the page does: once more it is looked whether there is a conduit.
    assert weather.count("/f/conversation/prepare") == 2


@pytest.mark.parametrize("encoding", ["v1", "cumulative"])
@pytest.mark.parametrize("temporary", [False, True])
def test_a_long_thought_that_is_handed_off_is_gone_on_with(
    start: Callable[..., Proxy], weather: Weather, encoding: str, temporary: bool
) -> None:
    weather.handoff, weather.encoding = "handed off", encoding
    proxy = start("alice", history_disabled=str(temporary).lower())
    assert proxy.say() == "Hello wide world."
    assert text_of(proxy.stream()[0]) == "Hello wide world."
    assert json.loads(weather.last("/resume").body.read())["offset"] == 0
    assert weather.count("/f/conversation") == weather.count("/f/conversation/resume") == 2
    weather.resumes = deque([408, 409, 425, 429, 500, 503])
    assert proxy.say() == "Hello wide world." and weather.count("/resume") == 9


@pytest.mark.parametrize("encoding", ["v1", "cumulative"])
@pytest.mark.parametrize("ending", ["cut", "silent"])
def test_an_answer_that_breaks_off_or_falls_silent_is_gone_on_with(
    start: Callable[..., Proxy], weather: Weather, monkeypatch: pytest.MonkeyPatch, encoding: str, ending: str
) -> None:
    weather.handoff, weather.encoding = ending, encoding
    weather.words = [f" w{number}" for number in range(40)]
    monkeypatch.setattr(cp, "STREAM_SILENCE", 0.5)
    proxy = lasting(start)
    assert proxy.say() == "".join(weather.words)
    assert text_of(proxy.stream()[0]) == "".join(weather.words)
    offset = json.loads(weather.last("/resume").body.read())["offset"]
    assert 5 < offset < 40 and weather.count("/f/conversation") == 2


@pytest.mark.parametrize("ending", ["handed off", "cut"])
def test_where_there_is_no_stream_to_go_on_with_the_conversation_is_looked_into(
    start: Callable[..., Proxy], weather: Weather, quick: None, ending: str
) -> None:
    weather.handoff, weather.resumes, weather.thinking = ending, None, 7
    weather.words = [f" w{number}" for number in range(40)]
    proxy = lasting(start)
    assert proxy.say() == "".join(weather.words)
    assert weather.thinking == 0 and weather.count("/f/conversation") == 1
    weather.thinking = 3
    assert text_of(proxy.stream()[0]) == "".join(weather.words)


def test_an_answer_without_content_is_an_error_wherever_it_was_looked_for(
    start: Callable[..., Proxy], weather: Weather, quick: None
) -> None:
    weather.handoff, weather.resumes, weather.words = "handed off", None, []
    proxy = lasting(start, retry_times="1")
    assert error_of(proxy.ask()) == (502, "upstream_error")
    # A temporary chat leaves nothing to look into: the second attempt is made in one that is kept, and then deleted.
    weather.words = ["Found", "."]
    proxy = start("alice", folder="temporary", retry_times="1")
    assert proxy.say() == "Found."
    kept = [
        json.loads(one.body.read())["history_and_training_disabled"]
        for one in weather.seen
        if one.path.endswith("/f/conversation")
    ]
    assert kept[-2:] == [True, False]
    wait_until(lambda: any(call.startswith("PATCH /backend-api/conversation/") for call in weather.calls))


@pytest.mark.parametrize("ending", ["handed off", "cut"])
def test_a_native_turn_goes_on_elsewhere_and_has_one_end(start: Start, weather: Weather, ending: str) -> None:
    weather.handoff = ending
    said = turn(start("alice")).text
    assert said.count("[DONE]") == 1 and said.endswith("data: [DONE]\n\n")
    decoder = cp.Decoder()
    if ending == "handed off":
        decoder.go_on()
    events = decoder.feed(said.encode())
    assert "".join(one.text for one in events if isinstance(one, cp.Text)).endswith("Hello wide world.")
    assert weather.count("/f/conversation/resume") == 1


def test_a_continued_answer_that_breaks_off_is_gone_on_with_from_its_own_events(
    start: Callable[..., Proxy], weather: Weather
) -> None:
    proxy = lasting(start, auto_continue="1")
    first, second = [f" a{number}" for number in range(20)], [f" b{number}" for number in range(40)]
    given = iter([(first, "max_tokens"), (second, "stop")])

    def answer(request: cp.Request, body: Any) -> Iterator[bytes]:
        return weather.say(body, *next(given))

    def cut_it(request: cp.Request) -> None:
        weather.handoff = "cut"

    weather.answer = answer  # type: ignore[method-assign]
    weather.add("/f/conversation", lambda request: None, cut_it)
    assert proxy.say() == "".join(first + second)
    assert json.loads(weather.last("/resume").body.read())["offset"] < 40


def test_what_nobody_wants_more_of_is_not_gone_on_with(start: Callable[..., Proxy], weather: Weather) -> None:
    weather.words = [f" w{number}" for number in range(200)]
    proxy = lasting(start)
    for more in ({"stop": "w20"}, {"max_tokens": 9}):
        assert proxy.say(**more).startswith(" w0 w1")
        assert proxy.stream(**more)[0]
    assert not weather.count("/resume") and not weather.count("/stream_status")


def test_an_old_answer_is_never_the_new_one(
    start: Callable[..., Proxy], weather: Weather, quick: None
) -> None:
    proxy = lasting(start, retry_times="0")
    said = proxy.ask().json()
    token = {"type": "resume_conversation_token", "token": "t", "conversation_id": said["conversation_id"]}
    weather.rests[said["conversation_id"]] = "t", []
    weather.resumes = None
    weather.add("/f/conversation", cut_stream(cp.data_event(token)))
    more = {"conversation_id": said["conversation_id"], "parent_message_id": said["message_id"]}
    assert error_of(proxy.ask("and now?", **more)) == (502, "upstream_error")


def test_a_token_that_expires_while_an_answer_is_looked_for_is_renewed(
    start: Callable[..., Proxy], weather: Weather, quick: None
) -> None:
    refresh = "rt_" + "k" * 40
    weather.refresh_tokens[refresh] = "alice"
    weather.handoff, weather.resumes, weather.thinking = "handed off", None, 3
    proxy = lasting(start, refresh)

    def expire(request: cp.Request) -> None:
        weather.dead.add(proxy.app.pool.accounts()[0].row.access_token)

    weather.add("/stream_status", expire)
    assert proxy.say() == "Hello wide world."
    assert weather.count("/f/conversation") == 1 and weather.count("/oauth/token") == 2


def test_an_image_that_takes_too_long_is_not_drawn_again(
    start: Callable[..., Proxy], weather: Weather, quick: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cp, "DRAWING_PATIENCE", 0.3)
    weather.drawing_time, weather.obeys = 60.0, True
    proxy = start("alice", "bob")
    refused = httpx.post(
        f"{proxy.url}/v1/images/generations",
        json={"prompt": "a cat"},
        headers={"Authorization": f"Bearer {KEY}"},
    )
    assert error_of(refused) == (504, "upstream_timeout") and weather.count("/f/conversation") == 1


def test_a_native_turn_that_breaks_within_an_event_has_none_in_halves(start: Start, weather: Weather) -> None:
    proxy = start("alice")
    weather.handoff = "cut"
    ending_early = weather._ending_early

    def halved(request: cp.Request, pieces: list[bytes]) -> Iterator[bytes]:
        yield from ending_early(request, pieces)
        yield pieces[len(pieces) // 2][:20]

    weather._ending_early = halved  # type: ignore[method-assign]
    said = turn(proxy).text
    assert said.endswith("data: [DONE]\n\n")
    for event in said.split("\n\n")[:-1]:
        data = event.partition("data: ")[2]
        assert data == "[DONE]" or json.loads(data)


def test_what_is_wrong_with_a_body_is_told_first(start: Callable[..., Proxy], weather: Weather) -> None:
    weather.add("/f/conversation", status(422, {"detail": [{"loc": ["body", "x"], "msg": "bad value"}]}))
    weather.add("/backend-api/conversation", status(403, {"detail": "Unusual activity"}))
    refused = start("alice").ask()
    assert error_of(refused) == (400, "invalid_request_error") and "bad value" in refused.text


def test_an_answer_that_only_began_is_asked_for_again(start: Callable[..., Proxy], weather: Weather) -> None:
    begun = list(weather.say({"model": "m"}, ["x"]))[:3]
    weather.add("/f/conversation", raw_stream(*begun))
    proxy = start("alice", "bob")
    assert proxy.say() == "Hello wide world."
    weather.add("/f/conversation", raw_stream(*begun))
    chunks = proxy.stream()[0]
    assert (
        text_of(chunks) == "Hello wide world."
        and sum("role" in one["choices"][0]["delta"] for one in chunks if one["choices"]) == 1
    )


def test_comments_and_workspaces_beside_cookies(tmp_path: pathlib.Path) -> None:
    name = f"{cp.SESSION_COOKIE}={SESSION}"
    pool = cp.Pool(cp.resolve(cp.gather({}, {})), cp.Store(str(tmp_path)))
    assert pool.add([f"# {name} (old)"]) == cp.Added([], [], 0, 0)
    assert [row.workspace for row in pool.add([f"{name},team-1"]).rows] == ["team-1"]
    row = cp.recognise(f"Cookie: {name}; cf_clearance=XYZ,ws-1; _puid=user-1:17-a,b")
    assert row.workspace == "" and json.loads(row.cookies) == {
        "cf_clearance": "XYZ,ws-1",
        "_puid": "user-1:17-a,b",
    }
    assert cp.callers_token(json.dumps({"accessToken": cp.demo_token("a"), "browser": "nope"})).browser == ""
    with pytest.raises(ValueError):
        cp.callers_token(json.dumps({"token": cp.demo_token("a"), "device": "d"}))


def test_echoes_are_not_the_answer(start: Callable[..., Proxy], weather: Weather) -> None:
    weather.echoes = True
    history = [("user", "one"), ("assistant", "OLD ANSWER"), ("user", "two")]
    messages = [{"role": role, "content": text} for role, text in history]
    for encoding in ("v1", "cumulative"):
        weather.encoding = encoding
        assert start("alice", folder=encoding).say(messages=messages) == "Hello wide world."


def test_drawing_goes_on_behind_the_answers_end_and_its_image_is_open_to_any_browser(
    start: Callable[..., Proxy], weather: Weather, quick: None
) -> None:
    weather.estuary, weather.drawing_time, weather.obeys = True, 0.1, True
    proxy = start("alice")
    made = proxy.client().images.generate(prompt="a cat", model="auto", response_format="url").data or []
    url = str(made[0].url)
    assert url.startswith(f"{proxy.url}/v1/files/answer-") and "signature=" in url
    assert weather.asked()["system_hints"] == ["picture_v2"]
    assert weather.asked()["history_and_training_disabled"] is False
    shown = httpx.get(url)
    assert shown.content == cp.demo_image().read() and shown.headers["content-type"] == "image/png"
    assert (
        shown.headers["content-disposition"].startswith("inline")
        and "sandbox" in shown.headers["content-security-policy"]
    )
    wait_until(lambda: not weather.conversations)  # HISTORY_DISABLED: it is deleted afterwards
    assert httpx.get(url).status_code == 200
    for changed in (
        url.replace("answer-", "answer-0")[:-1],
        re.sub("until=[0-9]+", "until=9999999999", url),
        url[:-1],
        url.partition("?")[0],
    ):
        assert httpx.get(changed).status_code == 401
    data = proxy.client().images.generate(prompt="a cat", model="gpt-image-1").data or []
    assert base64.b64decode(str(data[0].b64_json)) == cp.demo_image().read()
    response = proxy.client().responses.create(
        model="gpt-4o", input="a cat", tools=[{"type": "image_generation"}]
    )
    (call,) = [one for one in response.output if one.type == "image_generation_call"]
    assert base64.b64decode(str(call.result)) == cp.demo_image().read()
    with open(proxy.store.path.parent / "links" / "key", "rb") as file:
        assert len(file.read()) == 32


def test_a_link_is_good_for_an_hour_and_survives_a_restart(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    links = cp.Links(tmp_path / "links")
    assert links.of("http://x/v1/files/answer-" + "0" * 32 + "/content?signature=1") is None
    url = "https://x/prefix" + links.kept([b"one", b"two"], "naïve name.png", "image/png")
    found = cp.Links(tmp_path / "links").of(url)
    assert found and found.read() == b"onetwo"
    now = time.time()
    monkeypatch.setattr(cp.time, "time", lambda: now + cp.LINK_LIFE + 2)
    assert links.of(url) is None
    links.sweep(now + cp.LINK_LIFE + 2)
    assert [one.name for one in (tmp_path / "links").iterdir()] == ["key"]
    monkeypatch.undo()
    monkeypatch.setattr(cp, "MAX_LINKED_FILE", 5)
    assert links.kept([b"one", b"two"], "", "image/png") == ""
    monkeypatch.setattr(cp, "MAX_LINKED", 5)
    first, second = (links.kept([b"1234"], "", "image/png") for _ in range(2))
    assert (links.of(first) is None) and links.of(second)


def test_the_limit_of_images_is_the_accounts(
    start: Callable[..., Proxy], weather: Weather, quick: None
) -> None:
    weather.drawing_time, weather.obeys, weather.images_left = 0.05, True, 2
    proxy = start("alice")
    for _ in range(2):
        assert "/blob/" in str(
            (proxy.client().images.generate(prompt="a cat", response_format="url", model="auto").data or [])[
                0
            ].url
        )
    refused = httpx.post(
        f"{proxy.url}/v1/images/generations",
        json={"prompt": "a cat"},
        headers={"Authorization": f"Bearer {KEY}"},
    )
    assert (
        error_of(refused) == (429, "rate_limit_exceeded")
        and 86000 < int(refused.headers["retry-after"]) <= 86401
    )
    assert weather.count("/conversation/init") == 2 and weather.count("/f/conversation") == 2
    assert "image_gen" in proxy.app.pool.accounts()[0].told(time.time())
    assert "Hello" in proxy.say()  # everything else goes on
    weather.images_left = 1
    proxy.app.pool.accounts()[0].drawings = None
    assert proxy.client().images.generate(prompt="a cat", response_format="url", model="auto").data
    # What is answered in words is no image.
    weather.images_left, weather.obeys = 1, False
    for _ in range(3):
        response = proxy.client().responses.create(
            model="gpt-4o", input="hi", tools=[{"type": "image_generation"}]
        )
        assert response.output_text == "Hello wide world."


@pytest.mark.parametrize("uploads", ["", "aws", "estuary"])
@pytest.mark.parametrize("confirms", ["uploaded", "process_upload_stream"])
def test_files_go_where_the_site_wants_them(
    start: Callable[..., Proxy], weather: Weather, uploads: str, confirms: str
) -> None:
    weather.uploads, weather.confirms, weather.obeys = uploads, confirms, True
    proxy = start("alice")
    parts = [
        {"type": "text", "text": "What is this?"},
        {"type": "file", "file": {"filename": "a.txt", "file_data": "data:text/plain;base64,aGVsbG8="}},
        {
            "type": "image_url",
            "image_url": {
                "url": "data:image/png;base64," + base64.b64encode(cp.demo_image().read()).decode()
            },
        },
    ]
    said = proxy.say(messages=[{"role": "user", "content": parts}])
    assert "a.txt (5 bytes, text/plain)" in said and "image/png" in said
    assert any(one.path.endswith(confirms) for one in weather.seen)


def test_a_file_that_the_site_cannot_take_in_is_told(start: Callable[..., Proxy], weather: Weather) -> None:
    weather.confirms = "process_upload_stream"
    part = {
        "type": "file",
        "file": {"filename": "broken.txt", "file_data": "data:text/plain;base64,aGVsbG8="},
    }
    refused = start("alice").ask(messages=[{"role": "user", "content": [part]}])
    assert error_of(refused) == (400, "invalid_request_error") and "take in this file" in refused.text


def test_conversations_are_deleted_although_that_fails_at_first(
    start: Callable[..., Proxy], weather: Weather, quick: None
) -> None:
    weather.drawing_time, weather.obeys = 0.0, True
    proxy = start("alice")
    failed: list[str] = []

    def fail(request: cp.Request) -> cp.Reply | None:
        if request.method != "PATCH":
            return None
        failed.append(request.path)
        return cp.Reply(500)

    respond = weather.respond
    weather.respond = lambda request: (len(failed) < 2 and fail(request)) or respond(request)  # type: ignore[method-assign]
    assert proxy.client().images.generate(prompt="a cat", response_format="url", model="auto").data
    site = proxy.app.site
    wait_until(lambda: failed and max(due for *_, due in site._unerased.values()) < math.inf)
    site.sweep_erasures(time.monotonic() + 9)
    assert len(failed) == 1
    site.sweep_erasures(time.monotonic() + 11)
    wait_until(lambda: len(failed) == 2)
    wait_until(lambda: max(due for *_, due in site._unerased.values()) < math.inf)
    site.finish_erasures(5)
    assert not site._unerased and not weather.conversations
    # What is under way at the end is not begun a second time.
    held = threading.Event()

    def waiting(request: cp.Request) -> Any:
        return request.method == "PATCH" and not held.wait(5) or respond(request)

    weather.respond = waiting  # type: ignore[method-assign]
    asked = sum(call.startswith("PATCH") for call in weather.calls)
    site.erase(proxy.app.pool.accounts()[0], "c-9")
    threading.Timer(0.3, held.set).start()
    site.finish_erasures(5)
    time.sleep(0.2)
    assert sum(call.startswith("PATCH") for call in weather.calls) == asked + 1 and not site._unerased


def test_login_free_calls_go_where_they_are_answered(start: Callable[..., Proxy], weather: Weather) -> None:
    proxy = start(cp.LOGIN_FREE)
    weather.force_login = True  # a hint, no refusal
    assert proxy.say(model="auto") == "Hello wide world."
    weather.anonymous, weather.mobile = False, True
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi there"}]
    for _ in range(2):
        said = proxy.say(model="auto", messages=messages)
        assert (
            said.startswith("Hello from the demo")
            and "User: Hi there" in said
            and said.count("Hello from") == 1
        )
    assert text_of(proxy.stream(model="auto")[0]).startswith("Hello from the demo")
    assert weather.count("/unauth-mweb/conversation/updates") == 3
    refused = weather.calls.count("POST /backend-anon/f/conversation")
    weather.mobile = False
    assert error_of(proxy.ask(model="auto"))[0] in (403, 502)
    weather.anonymous = True  # what was refused there as well is not believed
    assert proxy.say(model="auto") == "Hello wide world."
    weather.add("/f/conversation", status(404), status(404))
    weather.add("/backend-anon/conversation", status(404))
    proxy.ask(model="auto")
    assert proxy.say(model="auto") == "Hello wide world."
    assert refused <= 2  # one that was answered, and at most one that was not


def test_lines_of_the_mobile_page_become_text_once() -> None:
    def said(*lines: Any, cut: int = 7) -> tuple[str, cp.MobileDecoder]:
        decoder = cp.MobileDecoder()
        data = b"".join(json.dumps(line).encode() + b"\n" for line in lines)
        events = [one for at in range(0, len(data), cut) for one in decoder.feed(data[at : at + cut])]
        return "".join(one.text for one in events if isinstance(one, cp.Text)), decoder

    content: dict[str, Any] = {"type": "content", "messageId": "m"}
    begun = {"type": "control", "detail": {"kind": "conversation-id", "conversationId": "c-1"}}
    for modes, texts in (
        (("replace", "append", "append"), ("a", "b", "c")),
        (("replace",) * 3, ("a", "ab", "abc")),
    ):
        lines = [content | {"mode": mode, "markdown": text} for mode, text in zip(modes, texts, strict=True)]
        text, decoder = said(begun, *lines, {"type": "shared", "html": "<p>abc</p>"}, {"type": "end"}, 5, [])
        finish = decoder.finish()
        assert text == "abc" and finish == cp.Finish("stop", "c-1", "m") and decoder.content
    with pytest.raises(cp.Refusal, match="broke off"):
        said(content | {"mode": "append", "markdown": "a"}, {"type": "error", "code": "x"})
    assert said(content | {"mode": "append", "markdown": "a"})[1].finish() is None


@pytest.mark.parametrize(
    "code", ["refresh_token_expired", "refresh_token_reused", "refresh_token_invalidated"]
)
@pytest.mark.parametrize("nested", [False, True])
def test_a_refresh_token_that_is_over_sets_its_account_aside(
    start: Callable[..., Proxy], weather: Weather, code: str, nested: bool
) -> None:
    weather.refresh_refusal = 401, {"error": {"code": code, "message": "no"} if nested else code}
    proxy = start("rt_" + "a" * 40)
    assert error_of(proxy.ask()) == (503, "no_account")
    assert proxy.app.pool.accounts()[0].row.state == "dead"


def test_a_country_that_is_refused_is_named_and_kills_nobody(
    start: Callable[..., Proxy], weather: Weather
) -> None:
    weather.refresh_refusal = (
        403,
        {"error": {"code": "unsupported_country_region_territory", "message": "no"}},
    )
    proxy = start("rt_" + "a" * 40, retry_times="0")
    refused = proxy.ask()
    assert (
        error_of(refused) == (403, "upstream_blocked")
        and "country" in refused.text
        and "proxy" in refused.text
    )
    assert proxy.app.pool.accounts()[0].row.state == "ready"


@pytest.mark.parametrize("code", [403, 429, 500])
def test_other_refusals_of_an_exchange_pass(start: Callable[..., Proxy], weather: Weather, code: int) -> None:
    weather.refresh_refusal = code, {"error": "temporarily_unavailable"}
    proxy = start("rt_" + "a" * 40, retry_times="0")
    assert proxy.ask().status_code == 502 and proxy.app.pool.accounts()[0].row.state == "ready"


def test_a_session_whose_renewal_failed_is_dead(start: Callable[..., Proxy], weather: Weather) -> None:
    session = "eyJhbGciOiJkaXIifQ.." + "A" * 20 + "." + "B" * 40 + ".C"
    weather.add(
        "/api/auth/session",
        status(200, {"error": "RefreshAccessTokenError", "accessToken": cp.demo_token("a")}),
    )
    proxy = start(session)
    assert error_of(proxy.ask()) == (503, "no_account")
    assert proxy.app.pool.accounts()[0].row.state == "dead"


SESSION = "eyJhbGciOiJkaXIiLCJlbmMiOiJBMjU2R0NNIn0.." + "k" * 16 + "." + "p" * 4000 + "." + "t" * 22
ALONG = (
    "cf_clearance=clear.1; _puid=user-1; oai-did=11111111-2222-4333-8444-555555555555; oai-sc=sc1; theme=dark"
)


def forms_of_a_session() -> dict[str, str]:
    """The forms in which a session's cookie reaches people."""
    name = cp.SESSION_COOKIE
    halves = f"{name}.0={SESSION[:3900]}; {name}.1={SESSION[3900:]}"
    page = {"user": {"id": "user-a"}, "accessToken": cp.demo_token("alice"), "sessionToken": SESSION}
    return {
        "value": SESSION,
        "named": f"{name}={SESSION}",
        "parts": halves,
        "line": f"Cookie: {ALONG}; {halves}; more=1",
        "page": json.dumps(page),
    }


@pytest.mark.parametrize("form", ["value", "named", "parts", "line", "page"])
def test_a_session_cookie_is_taken_in_every_form(
    start: Callable[..., Proxy], weather: Weather, tmp_path: pathlib.Path, form: str
) -> None:
    weather.session_tokens[SESSION] = "alice"
    text = forms_of_a_session()[form]
    row = cp.recognise(text)
    assert (row.kind, row.secret) == (cp.SESSION, SESSION)
    proxy = start(text)
    assert proxy.say() == "Hello wide world."
    if form == "line":
        assert row.device == "11111111-2222-4333-8444-555555555555"
        sent = weather.last("/f/conversation").headers
        assert sent["oai-device-id"] == row.device and "theme" not in sent["cookie"]
        assert {"cf_clearance=clear.1", "_puid=user-1", f"oai-did={row.device}"} <= set(
            sent["cookie"].split("; ")
        )
    # As a key that a caller brings, on a server whose pool is another's.
    other = start("bob", folder="other")
    assert other.ask(key=text).status_code == 200
    # And in a file that is imported.
    file = tmp_path / "tokens.json"
    file.write_text(text if form == "page" else json.dumps([text]))
    done = run("accounts", "import", str(file), env={"DATA_DIR": str(tmp_path / "imported")})
    assert done.returncode == 0, done.stderr
    assert cp.Store(str(tmp_path / "imported")).accounts()[0].secret == SESSION


def test_parts_of_a_cookie_may_stand_on_lines_of_their_own(tmp_path: pathlib.Path) -> None:
    name = cp.SESSION_COOKIE
    lines = [
        f"{name}.0\t{SESSION[:3900]}\t.chatgpt.com",
        f"{name}.1\t{SESSION[3900:]}\t.chatgpt.com",
        cp.demo_token("bob"),
    ]
    pool = cp.Pool(cp.resolve(cp.gather({}, {})), cp.Store(str(tmp_path)))
    added = pool.add(lines)
    assert sorted(row.kind for row in added.rows) == [cp.ACCESS, cp.SESSION] and not added.faults
    assert SESSION in [row.secret for row in added.rows]
    assert "missing" in pool.add([lines[1]]).faults[0]


def test_cookies_that_come_with_a_known_account_are_taken_over(
    start: Callable[..., Proxy], weather: Weather
) -> None:
    weather.session_tokens[SESSION] = "alice"
    proxy = start(SESSION)
    proxy.app.pool.add([f"{ALONG}; {cp.SESSION_COOKIE}={SESSION}"])
    assert proxy.say() == "Hello wide world."
    assert "cf_clearance=clear.1" in weather.last("/f/conversation").headers["cookie"]
    (account,) = proxy.app.pool.accounts()
    assert account.row.device != "11111111-2222-4333-8444-555555555555"  # it stays who it was


def test_what_requirements_demand_is_shown(start: Callable[..., Proxy], weather: Weather) -> None:
    weather.checks = ("turnstile",)
    proxy = start("alice", admin_key="boss")
    proxy.say()
    (shown,) = httpx.get(f"{proxy.url}/tokens/list", headers={"Authorization": "Bearer boss"}).json()[
        "accounts"
    ]
    assert (shown["persona"], shown["wants"]) == ("chatgpt-paid", ["turnstile"])
    done = run(
        "accounts", "check", env={"DATA_DIR": str(proxy.store.path.parent), "CHATGPT_BASE_URL": weather.url}
    )
    assert "works by web, as chatgpt-paid, which may have to show: turnstile" in done.stdout


MISSING: Any = object()
STRANGE_VALUES: tuple[Any, ...] = (
    MISSING,
    None,
    5,
    -1.5,
    True,
    "",
    "x",
    "\ud800",
    [],
    [None],
    ["x"],
    {},
    {"a": None},
)


OP_VALUES: tuple[Any, ...] = (None, "x", 3, [{"p": "/message", "o": "patch", "v": []}], {})


def paths_of(value: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The paths to everything in a JSON value, itself included."""
    yield at
    for key, one in (
        value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    ):
        yield from paths_of(one, (*at, key))


def with_changed(value: Any, path: tuple[Any, ...], new: Any) -> Any:
    """A JSON value with something else at a path."""
    if not path:
        return {} if new is MISSING else new
    changed = json.loads(json.dumps(value))
    place = changed
    for step in path[:-1]:
        place = place[step]
    if new is MISSING:
        del place[path[-1]]
    else:
        place[path[-1]] = new
    return changed


def strange_streams(weather: Weather, encoding: str) -> Iterator[bytes]:
    """Streams with something strange in each place of each event, events of unknown kinds, and events in other orders."""
    weather.encoding = encoding
    thought = {"content_type": "thoughts", "thoughts": [{"summary": "s", "content": "c"}]}
    code = {"content_type": "code", "language": "python", "text": "1"}
    before = [
        {"author": {"role": "assistant"}, "content": thought},
        {"author": {"role": "assistant"}, "recipient": "python", "content": code},
    ]
    sent = {"id": "u", "author": {"role": "user"}, "content": {"content_type": "text", "parts": ["hi"]}}
    said = weather.say({"model": "m", "messages": [sent]}, ["Hello", " there"], before=before)
    pieces = b"".join(said).decode().strip().split("\n\n")
    events = [json.loads(piece.partition("data: ")[2]) for piece in pieces[:-1]]

    def stream(changed: list[Any], end: bytes = cp.DONE) -> bytes:
        return b"".join(map(cp.data_event, changed)) + end

    for number, event in enumerate(events):
        for path in paths_of(event):
            for new in STRANGE_VALUES:
                yield stream([*events[:number], with_changed(event, path, new), *events[number + 1 :]])
    kinds = (
        "title_generation",
        "ping",
        "",
        5,
        None,
        "stream_handoff",
        "resume_conversation_token",
        "moderation",
        "delta",
    )
    for number in range(len(events) + 1):
        for kind in kinds:
            yield stream(
                [
                    *events[:number],
                    {"type": kind, "p": 1} if kind == "delta" else {"type": kind},
                    *events[number:],
                ]
            )
        for op in ("append", "patch", "truncate", "remove", "strange", None):
            for place in (
                "/message",
                "/message/content/parts/0",
                "/message/content/parts/9",
                "",
                "/",
                "/x/y",
                "/message/status",
            ):
                for value in OP_VALUES:
                    yield stream(
                        [*events[:number], {"p": place, "o": op, "v": value, "c": number}, *events[number:]]
                    )
        yield stream(events[number:])
        yield stream(events[:number], b"")
        yield stream([*events[:number], *events[number + 1 :]])
        yield stream(events[:number] + events[number:][::-1])
        yield stream([one for one in events for _ in range(2)][number:])


RIGHT_ERRORS = {
    (502, "upstream_error"), (403, "upstream_blocked"), (504, "upstream_timeout"), (401, "invalid_api_key"),
    (400, "invalid_request_error"), (403, "proof_of_work_too_hard"), (403, "arkose_required"), (404, "not_found"),
    (503, "no_account"), (429, "rate_limit_exceeded"), (403, "human_check_required"), (401, "token_not_credited"),
}  # fmt: skip


def outcome(client: httpx.Client, body: dict[str, Any]) -> str:
    """What became of a question: an answer, or an error that has its place; anything else fails."""
    answer = client.post(
        "/v1/chat/completions",
        json={"model": "gpt-4o", "messages": [{"role": "user", "content": "hi"}]} | body,
    )
    if answer.status_code != 200:
        assert error_of(answer) in RIGHT_ERRORS, answer.text
        return "error"
    choice = answer.json()["choices"][0]
    assert choice["message"]["content"] or choice["finish_reason"] == "content_filter", answer.text
    return "answer"


@pytest.mark.parametrize("encoding", ["v1", "cumulative"])
@pytest.mark.parametrize("kept", [False, True])
def test_whatever_a_stream_brings_there_is_an_answer_or_an_error(
    start: Callable[..., Proxy], weather: Weather, monkeypatch: pytest.MonkeyPatch, encoding: str, kept: bool
) -> None:
    for name in ("POLL_PAUSE", "RESUME_PAUSE"):
        monkeypatch.setattr(cp, name, 0.0)
    monkeypatch.setattr(cp, "MAX_RESUMED", 2)
    weather.resumes = None
    proxy = start("alice", retry_times="0", history_disabled=str(not kept).lower())
    counts: Counter[str] = Counter()
    streams = list(strange_streams(weather, encoding))
    if kept:
        streams = random.Random(13).sample(streams, len(streams) // 8)
    headers = {"Authorization": f"Bearer {KEY}"}
    with httpx.Client(base_url=proxy.url, headers=headers, timeout=20) as client:
        for stream in streams:
            weather.faults["/f/conversation"] = deque([raw_stream(stream)])
            counts[outcome(client, {})] += 1
    many = len(streams)
    assert many > (200 if kept else 2000) and counts["answer"] > many // 3 and counts["error"] > many // 100


def test_whatever_another_call_answers_there_is_an_answer_or_an_error(
    start: Callable[..., Proxy], weather: Weather, quick: None
) -> None:
    weather.conduit = weather.obeys = True
    weather.drawing_time, weather.estuary = 0.0, True
    calls = (
        "prepare",
        "finalize",
        "f/conversation/prepare",
        "conversation/init",
        "files",
        "uploaded",
        "stream_status",
    )
    picture = "data:image/png;base64," + base64.b64encode(cp.demo_image().read()).decode()
    content = [{"type": "text", "text": "x"}, {"type": "image_url", "image_url": {"url": picture}}]
    asking = {"messages": [{"role": "user", "content": content}], "tools": [{"type": "image_generation"}]}
    usual: dict[str, Any] = {}
    respond, bent = weather.respond, dict[str, Any]()

    def bending(request: cp.Request) -> Any:
        reply = respond(request)
        for call in calls:
            if request.path.endswith(f"/{call}") and isinstance(reply, cp.Reply) and reply.status == 200:
                usual.setdefault(call, json.loads(reply.body))
                if call in bent:
                    return cp.json_reply(bent[call])
        return reply

    weather.respond = bending  # type: ignore[method-assign]
    proxy = start("alice", retry_times="0")
    (account,) = proxy.app.pool.accounts()
    with httpx.Client(base_url=proxy.url, headers={"Authorization": f"Bearer {KEY}"}, timeout=20) as client:

        def asked() -> str:
            account.spare, account.drawings, account.waits = None, None, {}
            proxy.app.site._known.clear()
            proxy.store._write("DELETE FROM files")
            return outcome(client, asking)

        assert asked() == "answer"
        counts: Counter[str] = Counter()
        for call, value in list(usual.items()):
            for path in paths_of(value):
                for new in STRANGE_VALUES:
                    bent[call] = with_changed(value, path, new)
                    counts[asked()] += 1
            del bent[call]
        assert set(usual) >= {"prepare", "finalize", "conversation/init", "files", "uploaded"}
    assert counts["answer"] > 100 and counts["error"] > 100


# --- the Codex backend ------------------------------------------------------------------------------------------------


def sse(*events: Mapping[str, Any]) -> bytes:
    """Events as the Codex backend tells them."""
    return b"".join(f"event: {one['type']}\ndata: {json.dumps(one)}\n\n".encode() for one in events)


def failing(code: str, message: str = "no", **facts: Any) -> Fault:
    """A refusal inside a 200, behind what usually begins an answer."""
    begun = {"type": "response.created", "response": {"id": "resp_1", "model": "gpt-5.5"}}
    added = {
        "type": "response.output_item.added",
        "output_index": 0,
        "item": {"type": "message", "content": []},
    }
    error = {"code": code, "message": message} | facts
    failed = {"type": "response.failed", "response": {"id": "resp_1", "status": "failed", "error": error}}
    return raw_stream(sse(begun, {"type": "keepalive"}, added, failed))


def refused_with(code: int, kind: str, message: str = "no", **facts: Any) -> Fault:
    return status(code, {"error": {"code": kind, "message": message} | facts})


CODEX_CALL = "/codex/responses"
WINDOWS = {"x-codex-primary-window-minutes": "300", "x-codex-secondary-window-minutes": "10080"}


@pytest.fixture
def codex(weather: Weather) -> Weather:
    """The stand-in with a Codex backend."""
    weather.codex = True
    return weather


def sent_to_codex(weather: Weather) -> dict[str, Any]:
    """The body of the last request there."""
    return dict(json.loads(weather.last(CODEX_CALL).body.read()))


def asked_with(weather: Weather) -> list[str]:
    """The accounts of the requests there, by their names."""
    requests = [one for one in weather.seen if one.path.endswith(CODEX_CALL)]
    return [str(weather._owner(one)).removeprefix("user-") for one in requests]


def test_an_account_of_a_browser_sign_in_is_asked_at_the_codex_backend(start: Start, codex: Weather) -> None:
    proxy = start(codex_token("alice"))
    assert (
        proxy.say(model="gpt-5.5", temperature=1, top_p=1, max_tokens=500, user="me", seed=1, stop=["x"])
        == "Hello wide world."
    )
    assert codex.wanted() == ["GET /backend-api/codex/models", "POST /backend-api/codex/responses"]
    request = codex.last(CODEX_CALL)
    body = sent_to_codex(codex)
    assert body == {
        "model": "gpt-5.5", "instructions": "", "stream": True, "store": False,
        "input": [{"type": "message", "role": "user", "content": [{"type": "input_text", "text": "hi"}]}],
        "reasoning": {"summary": "auto"}, "include": ["reasoning.encrypted_content"],
        "prompt_cache_key": body["prompt_cache_key"],
    }  # fmt: skip
    headers = request.headers
    assert headers["authorization"] == f"Bearer {proxy.app.pool.accounts()[0].row.access_token}"
    assert headers["chatgpt-account-id"] == "workspace-alice"
    assert headers["accept"] == "text/event-stream" and headers["originator"] == "codex_cli_rs"
    assert re.fullmatch(r"codex_cli_rs/0\.146\.0 \(.+; x86_64\) .+", headers["user-agent"])
    assert headers["session_id"] == headers["session-id"] == body["prompt_cache_key"]
    assert str(uuid.UUID(body["prompt_cache_key"])) == body["prompt_cache_key"]
    told = [name for name in headers if name.startswith(("oai-", "openai-sentinel", "sec-", "referer"))]
    assert told == []  # it is no browser


def test_the_identity_towards_the_codex_backend_is_a_setting(start: Start, codex: Weather) -> None:
    proxy = start(codex_token("alice"), codex_client="codex_vscode/1.2.3 (Debian 12; arm64) vscode")
    proxy.say(model="gpt-5.5")
    headers = codex.last(CODEX_CALL).headers
    assert (headers["originator"], headers["version"]) == ("codex_vscode", "1.2.3")
    assert headers["user-agent"] == "codex_vscode/1.2.3 (Debian 12; arm64) vscode"
    assert codex.last("/codex/models").query == {"client_version": "1.2.3"}


def test_a_conversation_has_one_session_and_each_caller_another(start: Start, codex: Weather) -> None:
    proxy = start(codex_token("alice"), authorization="one-key,another-key")
    talk = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hi"}]
    more = [*talk, {"role": "assistant", "content": "hello"}, {"role": "user", "content": "and now?"}]

    def session(messages: list[Any], key: str = "one-key", **body: Any) -> str:
        assert proxy.ask(key=key, model="gpt-5.5", messages=messages, **body).status_code == 200
        return str(sent_to_codex(codex)["prompt_cache_key"])

    first = session(talk)
    assert session(more) == first != session(talk, "another-key")
    assert session([talk[0], {"role": "user", "content": "ho"}]) != first
    named = session(talk, prompt_cache_key="mine")
    assert (
        session(more[1:], prompt_cache_key="mine")
        == named
        != session(talk, "another-key", prompt_cache_key="mine")
    )
    assert "mine" not in named


def test_a_model_goes_to_the_upstream_that_has_it(start: Start, codex: Weather) -> None:
    proxy = start(codex_token("alice"), "bob")
    for model, path in (
        ("gpt-5.5", CODEX_CALL),
        ("gpt-4o", "/f/conversation"),
        ("auto", CODEX_CALL),
        ("gpt-5.5-high", CODEX_CALL),
    ):
        proxy.say(model=model)
        assert codex.wanted()[-1].endswith(path), model
    assert (
        sent_to_codex(codex)["model"] == "gpt-5.5" and sent_to_codex(codex)["reasoning"]["effort"] == "high"
    )
    proxy.say(model="auto")
    assert sent_to_codex(codex)["model"] == "gpt-5.6-sol"  # the first of the list
    models = {
        one["id"]: one
        for one in httpx.get(f"{proxy.url}/v1/models", headers={"Authorization": f"Bearer {KEY}"}).json()[
            "data"
        ]
    }
    assert {
        "gpt-5.6-sol",
        "gpt-5.3-codex-spark",
        "gpt-4o",
        "auto",
    } <= models.keys() and "codex-auto-review" not in models
    assert models["gpt-5.5"]["context_window"] == 272000 and models["gpt-5.5"]["input_modalities"] == [
        "text",
        "image",
    ]
    assert models["gpt-5.5"]["reasoning_efforts"] == ["low", "medium", "high", "xhigh"]


@pytest.mark.parametrize(
    "order, answers",
    [
        ("codex", ["codex", "no"]),
        ("pool", ["web", "web"]),
        ("pool,codex", ["web", "web"]),
        ("codex,pool", ["codex", "web"]),
    ],
)
def test_the_order_of_the_upstreams_is_a_setting(
    start: Start, codex: Weather, order: str, answers: list[str]
) -> None:
    proxy = start(codex_token("alice"), "bob", upstream_order=order)
    found = []
    for model in ("gpt-5.5", "gpt-4o"):
        before = codex.count(CODEX_CALL)
        answer = proxy.ask(model=model)
        found.append(
            "no" if answer.status_code != 200 else "codex" if codex.count(CODEX_CALL) > before else "web"
        )
    assert found == answers
    if order == "codex":
        assert error_of(proxy.ask(model="gpt-4o")) == (404, "model_not_found")


def test_the_list_of_models_is_read_once_an_hour_by_its_etag(
    start: Start, codex: Weather, monkeypatch: pytest.MonkeyPatch
) -> None:
    proxy = start(codex_token("alice"), upstream_order="codex")
    account = proxy.app.pool.accounts()[0]
    for _ in range(3):
        proxy.say(model="gpt-5.5")
    assert codex.count("/codex/models") == 1
    account.catalog = account.catalog._replace(read=time.time() - cp.CATALOG_LIFE - 1)
    proxy.say(model="gpt-5.5")  # which does not wait for it
    wait_until(lambda: codex.count("/codex/models") == 2)
    wait_until(lambda: time.time() - account.catalog.read < 5)
    assert codex.last("/codex/models").headers["if-none-match"] == account.catalog.etag != ""
    assert account.catalog.find("gpt-5.5")
    codex.codex_catalog = codex.codex_catalog[:1]
    account.catalog = account.catalog._replace(read=time.time() - cp.CATALOG_PAUSE - 1)
    changed = functools.partial(
        cp.Reply, 200, sse({"type": "response.completed", "response": {}}), "text/event-stream"
    )
    codex.add(CODEX_CALL, lambda request: changed({"x-models-etag": "another"}))
    proxy.ask(model="gpt-5.5")
    assert error_of_soon(proxy, "gpt-5.5") == (404, "model_not_found")


def error_of_soon(proxy: Proxy, model: str) -> tuple[int, str]:
    """The error that a question has once the list of models was read again."""
    wait_until(lambda: proxy.ask(model=model).status_code != 200)
    return error_of(proxy.ask(model=model))


def test_tools_and_all_else_are_told_natively(start: Start, codex: Weather) -> None:
    proxy = start(codex_token("alice"))
    long_name = "mcp__a.server__" + "x" * 80
    schema = {"type": "object", "properties": {"q": {"type": "string"}}}
    tools: list[dict[str, Any]] = [
        {"type": "function", "function": {"name": long_name, "description": "d", "parameters": schema, "strict": True}},
        {"type": "function", "function": {"name": "plain"}},
        {"type": "custom", "custom": {"name": "patch", "format": {"type": "grammar", "grammar": {"syntax": "regex", "definition": "a+"}}}},
        {"type": "web_search_preview"},
    ]  # fmt: skip
    picture_url = data_url(picture())
    messages: list[Any] = [
        {"role": "system", "content": "be brief"},
        {"role": "developer", "content": "and kind"},
        part_message({"type": "text", "text": "look"}, image_part(picture_url), image_part("https://example.com/a.png")),
        {"role": "assistant", "content": "I will", "tool_calls": [
            {"id": "c1", "type": "function", "function": {"name": long_name, "arguments": '{"q": "ä"}'}},
            {"id": "c2", "type": "custom", "custom": {"name": "patch", "input": "aaa"}},
            {"id": "c3", "type": "function", "function": {"name": "plain", "arguments": "{}"}},
        ]},
        {"role": "tool", "tool_call_id": "c1", "content": "found"},
        {"role": "tool", "tool_call_id": "c2", "content": [{"type": "text", "text": "patched"}]},
        {"role": "user", "content": "go on"},
    ]  # fmt: skip
    codex.obeys = True
    more: dict[str, Any] = {
        "reasoning_effort": "minimal",
        "verbosity": "low",
        "service_tier": "priority",
        "parallel_tool_calls": False,
    }
    more["response_format"] = {
        "type": "json_schema",
        "json_schema": {"name": "n", "strict": True, "schema": schema},
    }
    choice = {"type": "function", "function": {"name": long_name}}
    answer = proxy.ask(model="gpt-5.5", messages=messages, tools=tools, tool_choice=choice, **more)
    assert answer.status_code == 200, answer.text
    call = answer.json()["choices"][0]["message"]["tool_calls"][0]["function"]
    assert call["name"] == long_name and json.loads(call["arguments"]) == {"q": "demo"}
    body = sent_to_codex(codex)
    sent = body["tools"][0]["name"]
    assert re.fullmatch("[0-9A-Za-z_-]{1,64}", sent) and body["tool_choice"] == {
        "type": "function",
        "name": sent,
    }
    assert body["tools"] == [
        {"type": "function", "name": sent, "description": "d", "parameters": schema, "strict": True},
        {"type": "function", "name": "plain", "description": "", "parameters": {"type": "object"}, "strict": False},
        {"type": "custom", "name": "patch", "description": "", "format": {"type": "grammar", "syntax": "regex", "definition": "a+"}},
        {"type": "web_search"},
    ]  # fmt: skip
    assert body["instructions"] == "be brief" and body["parallel_tool_calls"] is False
    assert body["reasoning"]["effort"] == "low"  # the least that the model knows
    assert body["text"] == {
        "format": {"type": "json_schema", "name": "n", "schema": schema, "strict": True},
        "verbosity": "low",
    }
    assert body["service_tier"] == "priority"
    kinds = [
        (item["type"], item.get("role") or item.get("name") or item.get("call_id")) for item in body["input"]
    ]
    assert kinds == [
        ("message", "developer"), ("message", "user"), ("message", "assistant"), ("function_call", sent),
        ("custom_tool_call", "patch"), ("function_call", "plain"), ("function_call_output", "c1"),
        ("custom_tool_call_output", "c2"), ("function_call_output", "c3"), ("message", "user"),
    ]  # fmt: skip
    image = {"type": "input_image", "detail": "auto"}
    look = {"type": "input_text", "text": "look"}
    assert body["input"][1]["content"] == [
        look, image | {"image_url": picture_url}, image | {"image_url": "https://example.com/a.png"},
    ]  # fmt: skip
    assert body["input"][3]["arguments"] == '{"q": "ä"}' and body["input"][4]["input"] == "aaa"


@pytest.mark.parametrize(
    "tools, choice", [(1, {"type": "function", "name": "one"}), (2, "required"), (0, None)]
)
def test_a_call_that_must_be_made_is_told_by_its_name(
    start: Start, codex: Weather, tools: int, choice: Any
) -> None:
    proxy = start(codex_token("alice"))
    offered = [{"type": "function", "function": {"name": name}} for name in ("one", "two")[:tools]]
    more: dict[str, Any] = {"tools": offered, "tool_choice": "required"} if offered else {}
    proxy.ask(model="gpt-5.5", **more)
    assert sent_to_codex(codex).get("tool_choice") == choice


def test_results_without_calls_and_calls_without_results_are_made_whole(start: Start, codex: Weather) -> None:
    proxy = start(codex_token("alice"))
    call = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    messages: list[Any] = [
        {"role": "user", "content": "go"},
        {"role": "tool", "tool_call_id": "nobody's", "content": "lost"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "user", "content": "never mind"},
        {"role": "assistant", "content": None, "function_call": {"name": "old", "arguments": "{}"}},
        {"role": "function", "name": "old", "content": "fine"},
        {"role": "assistant", "content": None, "tool_calls": [call | {"id": "c2"}]},
    ]
    assert proxy.ask(model="gpt-5.5", messages=messages).status_code == 200  # the stand-in refuses any other
    text = json.dumps(sent_to_codex(codex)["input"])
    assert "lost" in text and "fine" in text and text.count("There is no result.") == 2


@pytest.mark.parametrize("streamed", [False, True])
def test_usage_is_the_upstreams_own(start: Start, codex: Weather, streamed: bool) -> None:
    proxy = start(codex_token("alice"))
    usage = {
        "input_tokens": 1234, "input_tokens_details": {"cached_tokens": 1024}, "output_tokens": 77,
        "output_tokens_details": {"reasoning_tokens": 33}, "total_tokens": 1311,
    }  # fmt: skip
    delta = {"type": "response.output_text.delta", "output_index": 0, "delta": "Hi"}
    end = {"type": "response.completed", "response": {"usage": usage}}
    codex.add(CODEX_CALL, *[raw_stream(sse(delta, end))] * 3)
    if streamed:
        chunks, _ = proxy.stream(model="gpt-5.5", stream_options={"include_usage": True})
        told = chunks[-1]["usage"]
    else:
        told = proxy.ask(model="gpt-5.5").json()["usage"]
    assert (told["prompt_tokens"], told["completion_tokens"], told["total_tokens"]) == (1234, 77, 1311)
    assert told["prompt_tokens_details"]["cached_tokens"] == 1024
    assert told["completion_tokens_details"]["reasoning_tokens"] == 33
    client = anthropic.Anthropic(base_url=proxy.url, api_key=KEY, max_retries=0)
    question: list[Any] = [{"role": "user", "content": "hi"}]
    with client.messages.stream(model="gpt-5.5", max_tokens=100, messages=question) as answer:
        read = answer.get_final_message().usage
    assert (read.input_tokens, read.cache_read_input_tokens, read.output_tokens) == (210, 1024, 77)
    response = proxy.client().responses.create(model="gpt-5.5", input="hi")
    assert response.usage and response.usage.input_tokens_details.cached_tokens == 1024


ANY_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=30),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=12), inner, max_size=4),
    max_leaves=12,
)


@given(
    arguments=st.lists(st.dictionaries(st.text(max_size=12), ANY_JSON, max_size=4), min_size=1, max_size=3),
    ascii_only=st.booleans(),
    size=st.integers(1, 9),
    cuts=st.lists(st.integers(0, 100_000), max_size=12),
    seen=st.sampled_from(["deltas", "done", "completed"]),
)
def test_every_byte_of_what_a_tool_is_called_with_arrives(
    arguments: list[Any], ascii_only: bool, size: int, cuts: list[int], seen: str
) -> None:
    texts = [json.dumps(one, ensure_ascii=ascii_only) for one in arguments]
    events: list[dict[str, Any]] = [{"type": "response.created", "response": {"id": "r", "model": "m"}}]
    items = []
    for index, text in enumerate(texts):
        place = {"output_index": index, "item_id": f"fc_{index}"}
        item = {
            "id": f"fc_{index}",
            "type": "function_call",
            "call_id": f"c{index}",
            "name": "f",
            "arguments": text,
        }
        items.append(item)
        events.append(
            {"type": "response.output_item.added", "output_index": index, "item": item | {"arguments": ""}}
        )
        if seen == "deltas":
            pieces = [text[at : at + size] for at in range(0, len(text), size)]
            events += [
                {"type": "response.function_call_arguments.delta", "delta": one} | place for one in pieces
            ]
        events.append({"type": "response.function_call_arguments.done", "arguments": text} | place)
        if seen != "completed":
            events.append({"type": "response.output_item.done", "output_index": index, "item": item})
    output = items if seen == "completed" else []
    events.append({"type": "response.completed", "response": {"output": output}})
    data = sse(*events)
    decoder = cp.CodexDecoder(False, cp.Names())
    places = [0, *sorted(cut % len(data) for cut in cuts), len(data)]
    found: list[Any] = []
    for a, b in itertools.pairwise(places):
        found += decoder.feed(data[a:b])
    assert [one.arguments for one in found if isinstance(one, cp.FunctionCall)] == texts
    assert decoder.reason == "tool_calls"
    found.append(cp.Finish("tool_calls"))

    question = cp.Question(
        (), "m", offer=cp.Offer(cp.Functions({"f": cp.Function("f", "", {})}), "auto", True)
    )
    chat = cp.CompletionStream(cp.Turn(question, stream=True), cp.Tokens(), False)
    chunks = [json.loads(one[6:]) for one in chat.feed(found)[0].decode().split("\n\n") if one[6:7] == "{"]
    told: dict[int, str] = {}
    for chunk in chunks:
        for call in chunk["choices"][0]["delta"].get("tool_calls", ()):
            told[call["index"]] = told.get(call["index"], "") + call["function"].get("arguments", "")
    assert [told[index] for index in range(len(texts))] == texts

    message = cp.ModelMessage(cp.MessageRequest(cp.Turn(question, stream=True), True), cp.Tokens())
    lines = [line for line in message.feed(found)[0].decode().split("\n") if line.startswith("data: ")]
    blocks: dict[int, str] = {}
    for event in (json.loads(line[6:]) for line in lines):
        if event["type"] == "content_block_delta":
            blocks[event["index"]] = blocks.get(event["index"], "") + event["delta"]["partial_json"]
    assert [blocks[index] for index in sorted(blocks)] == texts
    assert [one["input"] for one in message.whole()["content"]] == [json.loads(text) for text in texts]


@given(cuts=st.lists(st.integers(0, 100_000), max_size=20), newline=st.sampled_from([b"\n", b"\r\n"]))
def test_native_events_are_the_same_however_they_are_cut(cuts: list[int], newline: bytes) -> None:
    demo = cp.Demo()
    demo.pace = 0
    content = [
        {
            "type": "output_text",
            "text": "Ein wörtlicher Text, in 漢字.\n\nEnd.",
            "annotations": [],
            "logprobs": [],
        }
    ]
    call = {"type": "function_call", "call_id": "c", "name": "f", "arguments": '{"a": "ü"}'}
    thought = {"type": "reasoning", "summary": [{"type": "summary_text", "text": "Now then."}]}
    body = {"model": "gpt-5.5", "input": []}
    whole = b"".join(
        demo.codex_events(body, [thought, {"type": "message", "role": "assistant", "content": content}, call])
    )
    data = whole.replace(b"\n", newline)
    decoder = cp.CodexDecoder(True, cp.Names())
    places = [0, *sorted(cut % len(data) for cut in cuts), len(data)]
    found: list[Any] = []
    for a, b in itertools.pairwise(places):
        found += decoder.feed(data[a:b])
    told = b"".join(
        one.data if one.event is None else sse(one.event) for one in found if isinstance(one, cp.Verbatim)
    )
    assert [json.loads(one.partition(b"data: ")[2]) for one in told.split(b"\n\n") if one] == [
        json.loads(one.partition(b"data: ")[2]) for one in whole.split(b"\n\n") if one
    ]
    assert [one for one in found if isinstance(one, cp.Usage)] and decoder.reason == "stop"


@given(noise=st.binary(max_size=300), native=st.booleans())
@example(
    noise=b'event: response.output_text.delta\ndata: {"type": "response.output_text.delta"}\n\n', native=False
)
@example(noise=b'data: {"type": "response.output_text.delta", "delta": 1}\n\n', native=False)
@example(noise=b"event: response.output_text.delta\ndata: not json\n\n", native=True)
@example(noise=b'data: {"type": "response.completed", "response": 1}\n\n', native=True)
@example(
    noise=b'data: {"type": "response.output_item.done", "item": {"type": "function_call", "arguments": {}}}\n\n',
    native=False,
)
@example(
    noise=b'data: {"type": "response.output_item.done", "item": {"type": 1, "name": []}}\n\n', native=True
)
def test_no_bytes_break_the_reader_of_native_events(noise: bytes, native: bool) -> None:
    decoder = cp.CodexDecoder(native, cp.Names())
    decoder.feed(noise)
    decoder.feed(b"\n\n")
    answer = cp.ModelResponse(
        cp.parse_response({"model": "m", "input": "hi"}, [], lambda id: None, False),
        cp.Tokens(),
        lambda *_: None,
        lambda url: "",
    )
    events: Any = decoder.feed(sse({"type": "response.output_text.delta", "delta": "x"}))
    if events:
        answer.feed(events)


REFUSALS: list[tuple[Fault, tuple[int, str]]] = [
    (failing("server_is_overloaded"), (502, "upstream_error")),
    (failing("slow_down"), (502, "upstream_error")),
    (failing("rate_limit_exceeded", "Please try again in 11.054s."), (429, "rate_limit_exceeded")),
    (failing("insufficient_quota"), (429, "rate_limit_exceeded")),
    (failing("usage_not_included"), (503, "no_account")),
    (failing("internal_error"), (502, "upstream_error")),
    (refused_with(503, "server_is_overloaded"), (502, "upstream_error")),
    (refused_with(429, "", "Selected model is at capacity. Please try a different model."), (429, "rate_limit_exceeded")),
    (refused_with(429, "usage_limit_reached", resets_in_seconds=500), (429, "rate_limit_exceeded")),
    (refused_with(404, "usage_limit_reached", resets_in_seconds=500), (429, "rate_limit_exceeded")),
    (status(403, "<html>Just a moment...</html>", "text/html"), (403, "upstream_blocked")),
    (status(500, "<html>oops</html>", "text/html"), (502, "upstream_error")),
    (status(400, {"detail": "The 'gpt-5.5' model is not supported when using Codex with a ChatGPT account."}), (404, "model_not_found")),
    (raw_stream(sse({"type": "response.created", "response": {}})), (502, "upstream_error")),
    (refused_with(401, "token_invalidated"), (503, "no_account")),
]  # fmt: skip


@pytest.mark.parametrize("fault, told", REFUSALS)
@pytest.mark.parametrize("api", ["chat", "responses"])
def test_a_refusal_before_the_answer_is_retried_on_another_account(
    start: Start, codex: Weather, fault: Fault, told: tuple[int, str], api: str
) -> None:
    proxy = start(codex_token("alice"), codex_token("bob"), upstream_order="codex")
    codex.add(CODEX_CALL, fault)
    if api == "chat":
        assert proxy.say(model="gpt-5.5") == "Hello wide world."
    else:
        assert proxy.client().responses.create(model="gpt-5.5", input="hi").output_text == "Hello wide world."
    assert len(set(asked_with(codex))) == 2
    alone = start(codex_token("carol"), folder="alone", upstream_order="codex", retry_times="0")
    codex.add(CODEX_CALL, fault, fault)  # a token that is refused is renewed first, where it can be
    assert error_of(alone.ask(model="gpt-5.5")) == told


@pytest.mark.parametrize(
    "fault, code",
    [
        (
            failing("context_length_exceeded", "Your input exceeds the context window."),
            "context_length_exceeded",
        ),
        (status(413, {"detail": "too large"}), "context_length_exceeded"),
        (failing("cyber_policy", "This request has been flagged."), "invalid_request_error"),
        (refused_with(400, "invalid_value", "Invalid image."), "invalid_request_error"),
    ],
)
def test_what_is_wrong_with_a_request_is_told_and_asked_once(
    start: Start, codex: Weather, fault: Fault, code: str
) -> None:
    proxy = start(codex_token("alice"), codex_token("bob"), "carol")
    codex.add(CODEX_CALL, fault)
    assert error_of(proxy.ask(model="gpt-5.5")) == (400, code)
    assert codex.count(CODEX_CALL) == 1 and codex.count("/conversation") == 0


def test_an_answer_that_fails_in_its_midst_ends_as_the_api_has_it(start: Start, codex: Weather) -> None:
    proxy = start(codex_token("alice"), codex_token("bob"))
    delta = {"type": "response.output_text.delta", "sequence_number": 7, "output_index": 0, "delta": "Hel"}
    error = {"code": "context_length_exceeded", "message": "too long"}
    failed = {"type": "response.failed", "sequence_number": 8, "response": {"error": error}}
    codex.add(CODEX_CALL, *[raw_stream(sse(delta, failed))] * 2, cut_stream(sse(delta)))
    with httpx.stream(
        "POST", f"{proxy.url}/v1/responses", json={"model": "gpt-5.5", "input": "hi", "stream": True},
        headers={"Authorization": f"Bearer {KEY}"},
    ) as answer:  # fmt: skip
        events = [json.loads(line[6:]) for line in answer.iter_lines() if line.startswith("data: ")]
    assert events[-1]["type"] == "response.failed" and events[-1]["sequence_number"] == 8
    assert events[-1]["response"]["error"]["code"] == "context_length_exceeded" == events[-1]["error"]["code"]
    _, text = proxy.stream(model="gpt-5.5")
    assert "Hel" in text and '"code":"context_length_exceeded"' in text and "[DONE]" not in text
    _, text = proxy.stream(model="gpt-5.5")
    assert "upstream_error" in text and "[DONE]" not in text and len(asked_with(codex)) == 3


def test_a_used_up_account_rests_until_its_window_is_counted_anew(start: Start, codex: Weather) -> None:
    codex.models = ["gpt-4o", "gpt-5.5"]
    proxy = start(codex_token("alice"), "bob")
    end = int(time.time()) + 7200
    codex.add(CODEX_CALL, refused_with(429, "usage_limit_reached", resets_at=end))
    assert proxy.say(model="gpt-5.5") and codex.wanted()[-1].endswith("/conversation")  # where it is too
    alice = next(one for one in proxy.app.pool.accounts() if one.speaks_codex())
    assert alice.waits[cp.CODEX].until == pytest.approx(end, abs=2)
    assert f"({cp.CODEX})" in alice.told(time.time())
    asked = codex.count(CODEX_CALL)
    answer = proxy.ask(model="gpt-5.4-mini")  # which the site has not: nobody else answers in its name
    assert (
        error_of(answer) == (429, "rate_limit_exceeded") and 7100 < int(answer.headers["retry-after"]) <= 7200
    )
    assert proxy.say(model="auto") and codex.count(CODEX_CALL) == asked
    only = start(codex_token("carol"), folder="only", upstream_order="codex", retry_times="0")
    codex.add(CODEX_CALL, refused_with(429, "usage_limit_reached", resets_at=end))
    for _ in range(2):
        answer = only.ask(model="gpt-5.5")
        assert (
            error_of(answer) == (429, "rate_limit_exceeded")
            and 7100 < int(answer.headers["retry-after"]) <= 7200
        )


def test_a_models_own_limit_rests_the_model_alone(start: Start, codex: Weather) -> None:
    proxy = start(codex_token("alice"), upstream_order="codex", retry_times="0")
    told = headers_of_limits("20", "30") | {"x-codex-active-limit": "codex_bengalfox"}
    said = json.dumps({"error": {"type": "usage_limit_reached", "resets_in_seconds": 900}}).encode()
    codex.add(CODEX_CALL, lambda request: cp.Reply(429, said, "application/json", told))
    assert error_of(proxy.ask(model="gpt-5.3-codex-spark")) == (429, "rate_limit_exceeded")
    assert proxy.say(model="gpt-5.5") == "Hello wide world."
    assert error_of(proxy.ask(model="gpt-5.3-codex-spark")) == (429, "rate_limit_exceeded")


def test_a_model_at_capacity_rests_and_not_its_account(start: Start, codex: Weather) -> None:
    proxy = start(codex_token("alice"), upstream_order="codex", retry_times="0")
    codex.add(
        CODEX_CALL, refused_with(429, "", "Selected model is at capacity. Please try a different model.")
    )
    assert error_of(proxy.ask(model="gpt-5.5")) == (429, "rate_limit_exceeded")
    assert proxy.say(model="gpt-5.4-mini") == "Hello wide world."
    assert error_of(proxy.ask(model="gpt-5.5")) == (429, "rate_limit_exceeded")
    assert codex.count(CODEX_CALL) == 2


def test_a_plan_without_codex_is_remembered(start: Start, codex: Weather) -> None:
    proxy = start(codex_token("alice"))
    codex.add(CODEX_CALL, refused_with(429, "usage_not_included"))
    proxy.say(model="gpt-5.5")
    proxy.say(model="gpt-5.5")
    assert codex.count(CODEX_CALL) == 1 and codex.count("/conversation") == 2
    (account,) = proxy.app.pool.accounts()
    assert account.paths() == "web" and proxy.store.accounts()[0].codex == "no"
    checked = admin(proxy, "POST", "/tokens/check", json={"ids": [account.id]}).json()
    assert (
        checked["results"] == {account.id: ""}
        and account.paths() == "web"
        and "Codex" in account.told(time.time())
    )
    codex.codex_plan = "pro"  # it is another one by now
    checked = admin(proxy, "POST", "/tokens/check", json={"ids": [account.id]}).json()
    assert checked["results"] == {account.id: ""} and account.paths() == "codex + web"


def test_a_refused_token_is_renewed_once_and_then_set_aside(start: Start, codex: Weather) -> None:
    codex.refresh_tokens["rt_" + "a" * 40] = "alice"
    proxy = start("rt_" + "a" * 40, upstream_order="codex")
    codex.token_client = cp.BROWSER_CLIENT
    assert proxy.say(model="gpt-5.5") == "Hello wide world."
    (account,) = proxy.app.pool.accounts()
    codex.add(CODEX_CALL, refused_with(401, "token_invalidated"))
    assert proxy.say(model="gpt-5.5") == "Hello wide world." and codex.count("/oauth/token") == 2
    codex.add(CODEX_CALL, *[refused_with(401, "token_invalidated")] * 2)
    assert error_of(proxy.ask(model="gpt-5.5")) == (503, "no_account") and codex.count("/oauth/token") == 3
    assert account.row.state == "expired" and "Codex" in account.told(time.time())


def test_what_the_backend_does_not_know_is_left_out_once_it_says_so(start: Start, codex: Weather) -> None:
    proxy = start(codex_token("alice"), upstream_order="codex")
    ask: dict[str, Any] = {
        "model": "gpt-5.5",
        "input": [{"role": "user", "content": "hi", "phase": "x"}],
        "text": {"verbosity": "low"},
    }
    refusals = (
        "Unsupported parameter: include",
        "Unknown parameter: 'input[0].phase'.",
        "Unsupported parameter: text.verbosity",
    )
    codex.add(CODEX_CALL, *(status(400, {"detail": text}) for text in refusals))
    assert proxy.client().responses.create(**ask).output_text == "Hello wide world."
    body = sent_to_codex(codex)
    assert "include" not in body and "phase" not in body["input"][0] and body["text"] == {}
    proxy.say(model="gpt-5.5")
    assert codex.count(CODEX_CALL) == 5 and "include" not in sent_to_codex(codex)
    codex.add(CODEX_CALL, status(400, {"detail": "Unsupported parameter: model"}))
    assert error_of(proxy.ask(model="gpt-5.5")) == (400, "invalid_request_error")


def test_reasoning_is_replayed_and_dropped_when_nobody_can_read_it(start: Start, codex: Weather) -> None:
    proxy = start(codex_token("alice"), upstream_order="codex")
    codex.obeys = True
    client = proxy.client()
    ask: Any = functools.partial(
        client.responses.create, model="gpt-5.5", store=False, reasoning={"summary": "auto"}
    )
    first = ask(input="hi")
    assert first.output[0].type == "reasoning" and first.output[0].encrypted_content
    said = [one.to_dict() for one in first.output]
    ask(input=[{"role": "user", "content": "hi"}, *said, {"role": "user", "content": "more"}])
    sent = next(item for item in sent_to_codex(codex)["input"] if item.get("type") == "reasoning")
    assert sent == {
        "type": "reasoning",
        "summary": said[0]["summary"],
        "encrypted_content": said[0]["encrypted_content"],
    }
    foreign = said[0] | {"encrypted_content": "gAAAA.somebody-else"}
    assert ask(
        input=[{"role": "user", "content": "hi"}, foreign, {"role": "user", "content": "more"}]
    ).output_text
    assert [item["role"] for item in sent_to_codex(codex)["input"]] == ["user", "user"]
    without = ask(
        input=[{"role": "user", "content": "hi"}, {"type": "reasoning", "id": "rs_1", "summary": []}]
    )
    assert without.output_text


def test_anthropics_clients_bring_reasoning_back(start: Start, codex: Weather) -> None:
    proxy = start(codex_token("alice"), upstream_order="codex")
    codex.obeys = True
    client = anthropic.Anthropic(base_url=proxy.url, api_key=KEY, max_retries=0)
    tools: list[Any] = [
        {
            "name": "get_weather",
            "input_schema": {"type": "object", "properties": {"city": {"type": "string"}}},
        }
    ]
    question: list[Any] = [{"role": "user", "content": "the weather, please"}]
    ask: Any = functools.partial(
        client.messages.stream, model="claude-sonnet", max_tokens=2000, tools=tools, thinking={"type": "enabled", "budget_tokens": 1024}
    )  # fmt: skip
    with ask(messages=question) as answer:
        first = answer.get_final_message()
    assert [block.type for block in first.content] == [
        "thinking",
        "tool_use",
    ] and first.stop_reason == "tool_use"
    result = {"type": "tool_result", "tool_use_id": first.content[-1].id, "content": "sunny"}
    with ask(
        messages=[
            *question,
            {"role": "assistant", "content": first.content},
            {"role": "user", "content": [result]},
        ]
    ) as answer:
        assert "demo" in answer.get_final_text()
    items = sent_to_codex(codex)["input"]
    assert [item["type"] for item in items] == [
        "message",
        "reasoning",
        "function_call",
        "function_call_output",
    ]
    assert items[1]["encrypted_content"].endswith(".user-alice")


def headers_of_limits(primary: str, secondary: str, **facts: str) -> dict[str, str]:
    return (
        WINDOWS
        | {"x-codex-primary-used-percent": primary, "x-codex-secondary-used-percent": secondary}
        | facts
    )


def test_limits_are_shown_however_they_are_told(tmp_path: pathlib.Path, start: Start, codex: Weather) -> None:
    now = int(time.time())
    proxy = start(codex_token("alice"))
    (account,) = proxy.app.pool.accounts()
    codex.codex_windows = {"primary_window": (30, 18000, 3600), "secondary_window": (55, 604800, 90_000)}
    proxy.say(model="gpt-5.5")
    assert account.allowance and [(one.name, one.used) for one in account.allowance.windows] == [
        ("5 h", 30.0),
        ("week", 55.0),
    ]
    event = {"type": "codex.rate_limits", "rate_limits": {"allowed": True, "primary": {"used_percent": 31.5, "window_minutes": 300, "reset_after_seconds": 60}, "secondary": None}, "credits": {"has_credits": True, "unlimited": False, "balance": "9.5"}}  # fmt: skip
    delta = {"type": "response.output_text.delta", "output_index": 0, "delta": "Hi"}
    codex.codex_windows = {}
    codex.add(CODEX_CALL, raw_stream(sse(delta, event, {"type": "response.completed", "response": {}})))
    proxy.say(model="gpt-5.5")
    assert [(one.name, one.used) for one in account.allowance.windows] == [("5 h", 31.5), ("week", 55.0)]
    assert account.allowance.credits == "9.5" and account.allowance.windows[0].reset == pytest.approx(
        now + 60, abs=3
    )
    page = admin(proxy, "GET", "/tokens/list").json()["accounts"][0]
    assert page["upstreams"] == "codex" and re.fullmatch(
        r"5 h 32 % until .+, week 55 % until .+, credits 9.5", page["codex"]["told"]
    )
    metrics = admin(proxy, "GET", "/metrics").text
    assert f'chatproxy_codex_used_percent{{account="{account.id}",window="5 h"}} 31.5' in metrics
    codex.codex_windows = {"primary_window": (80, 18000, 7200), "secondary_window": (56, 604800, 90_000)}
    done = run("accounts", "check", "--json", env={"DATA_DIR": str(tmp_path / "data"), "CHATGPT_BASE_URL": codex.url, "OPENAI_AUTH_URL": codex.url})  # fmt: skip
    told = json.loads(done.stdout)
    assert (
        told["works"]
        and told["upstreams"] == "codex + web"
        and told["codex"]["windows"][0]["used_percent"] == 80
    )
    wait_until(
        lambda: account.allowance and account.allowance.windows[0].used == 80.0
    )  # which the server takes in
    listed = run("accounts", "list", env={"DATA_DIR": str(tmp_path / "data")}).stdout
    assert "codex + web" in listed and "5 h 80 % until" in listed and "week 56 %" in listed


@pytest.mark.parametrize(
    "said",
    [
        {},
        {"rate_limit": None},
        {"rate_limits": {"primary": {"used_percent": "x"}}},
        {"rate_limit": {"primary_window": {"used_percent": math.nan}}},
    ],
)
def test_limits_that_cannot_be_read_change_nothing(said: dict[str, Any]) -> None:
    before = cp.Allowance(1.0, (cp.Window(5.0, 18000, 2.0),))
    assert cp.allowance_of(said, before) is before and cp.allowance_of(said) is None


def with_windows(proxy: Proxy, **windows: tuple[float, float]) -> None:
    """Gives accounts an allowance: how much of five hours is used, and how many seconds are left."""
    for account in proxy.app.pool.accounts():
        used, left = windows[account.row.email.partition("@")[0]]
        account.allowance = cp.Allowance(time.time(), (cp.Window(used, 18000, time.time() + left),))


def asked_in_turn(proxy: Proxy, codex: Weather, times: int) -> list[str]:
    codex.codex_windows = {}
    before = len(asked_with(codex))
    for number in range(times):
        proxy.say(f"question {number}", model="gpt-5.5")
    return asked_with(codex)[before:]


def test_work_is_spread_over_accounts_those_first_that_would_lose_most(start: Start, codex: Weather) -> None:
    proxy = start(*map(codex_token, ("alice", "bob", "carol")), upstream_order="codex")
    with_windows(proxy, alice=(50, 9000), bob=(50, 9000), carol=(50, 600))
    assert asked_in_turn(proxy, codex, 3) == ["carol"] * 3
    with_windows(proxy, alice=(50, 9000), bob=(50, 9000), carol=(100, 600))
    assert sorted(asked_in_turn(proxy, codex, 4)) == ["alice", "alice", "bob", "bob"]


def test_work_drains_one_account_after_another(start: Start, codex: Weather) -> None:
    proxy = start(*map(codex_token, ("alice", "bob", "carol")), upstream_order="codex", codex_balance="drain")
    with_windows(proxy, alice=(10, 9000), bob=(90, 3000), carol=(20, 600))
    assert asked_in_turn(proxy, codex, 3) == ["carol"] * 3
    with_windows(proxy, alice=(10, 9000), bob=(90, 3000), carol=(100, 600))
    assert asked_in_turn(proxy, codex, 2) == ["bob"] * 2


def test_a_conversation_stays_with_its_account(start: Start, codex: Weather) -> None:
    proxy = start(*map(codex_token, ("alice", "bob")), upstream_order="codex")
    codex.codex_windows = {}
    talk = [{"role": "user", "content": "hi"}]
    proxy.ask(model="gpt-5.5", messages=talk)
    (home,) = asked_with(codex)
    for number in range(4):
        proxy.say(f"other {number}", model="gpt-5.5")
        talk = [*talk, {"role": "assistant", "content": "yes"}, {"role": "user", "content": "more"}]
        proxy.ask(model="gpt-5.5", messages=talk)
        assert asked_with(codex)[-1] == home
    codex.add(CODEX_CALL, refused_with(429, "usage_limit_reached", resets_in_seconds=500))
    assert proxy.ask(model="gpt-5.5", messages=talk).status_code == 200
    assert asked_with(codex)[-2:] == [home, "bob" if home == "alice" else "alice"]


def test_whether_the_site_takes_the_account_is_found_out_and_remembered(start: Start, codex: Weather) -> None:
    proxy = start(codex_token("alice"))
    (account,) = proxy.app.pool.accounts()
    assert account.paths() == "codex"
    codex.persona = "chatgpt-noauth"
    codex.add("/conversation", *[status(403, {"detail": UNUSUAL})] * 3)
    assert error_of(proxy.ask(model="gpt-4o")) == (404, "model_not_found")  # as the Codex backend says it
    asked = codex.count("/chat-requirements")
    assert account.row.web == "no" and account.row.state == "ready" and proxy.store.accounts()[0].web == "no"
    assert (
        error_of(proxy.ask(model="gpt-4o")) == (404, "model_not_found")
        and codex.count("/chat-requirements") == asked
    )
    assert proxy.say(model="gpt-5.5") == "Hello wide world."
    codex.persona = ""
    codex.faults.clear()
    assert admin(proxy, "POST", "/tokens/check", json={"ids": [account.id]}).json()["results"] == {
        account.id: ""
    }
    assert account.paths() == "codex + web" and proxy.say(model="gpt-4o") == "Hello wide world."
    assert admin(proxy, "GET", "/tokens/list").json()["accounts"][0]["upstreams"] == "codex + web"


def test_an_account_known_to_the_site_is_preferred_there(start: Start, codex: Weather) -> None:
    proxy = start(codex_token("alice"), "bob")
    for _ in range(6):
        proxy.say(model="gpt-4o")
    owners = {codex._owner(one) for one in codex.seen if one.path.endswith("/conversation")}
    assert owners == {"user-bob"}


def test_a_gateway_without_the_backend_is_asked_once(start: Start, weather: Weather) -> None:
    proxy = start(codex_token("alice"))
    for _ in range(3):
        assert proxy.say(model="gpt-4o") == "Hello wide world."
    assert weather.count(CODEX_CALL) == 1
    only = start(codex_token("bob"), folder="only", upstream_order="codex")
    assert error_of(only.ask(model="gpt-5.5")) == (503, "no_account")


def test_a_callers_own_token_is_asked_there_too(start: Start, codex: Weather) -> None:
    proxy = start()
    assert proxy.ask(key=codex_token("guest"), model="gpt-5.5").status_code == 200
    assert asked_with(codex) == ["guest"]
    assert proxy.ask(key=codex_token("guest"), model="gpt-4o").status_code == 200
    assert codex.wanted()[-1].endswith("/conversation")
    assert proxy.ask(key=cp.demo_token("guest"), model="gpt-4o").status_code == 200
    assert len(asked_with(codex)) == 1


def test_conversations_of_the_site_are_not_asked_there(start: Start, codex: Weather) -> None:
    proxy = start("alice", codex_token("bob"), history_disabled="false")
    begun = proxy.ask(model="gpt-4o").json()
    more = {"conversation_id": begun["conversation_id"], "parent_message_id": begun["message_id"]}
    assert proxy.ask(model="auto", **more).status_code == 200 and codex.count(CODEX_CALL) == 0
    only = start(codex_token("carol"), folder="only", history_disabled="false", upstream_order="codex")
    assert error_of(only.ask(model="auto", **more))[0] == 400


def test_a_response_is_told_in_the_upstreams_own_words(start: Start, codex: Weather) -> None:
    proxy = start(codex_token("alice"))
    codex.obeys = True
    said: list[bytes] = []
    events_of = codex.codex_events

    def noted(body: Any, items: Any) -> Iterator[bytes]:
        for event in events_of(body, items):
            said.append(event)
            yield event

    codex.codex_events = noted  # type: ignore[method-assign]
    tools: list[Any] = [
        {"type": "custom", "name": "patch"}, {"type": "web_search_preview"}, {"type": "image_generation"},
        {"type": "namespace", "name": "ns", "description": "n", "tools": [{"type": "function", "name": "inner", "parameters": {}}]},
        {"type": "tool_search", "execution": "client"},
    ]  # fmt: skip
    ask = {
        "model": "gpt-5.5", "input": "please patch it", "instructions": "be brief", "tools": tools, "stream": True, "metadata": {"a": "b"},
        "text": {"verbosity": "high"}, "service_tier": "priority", "parallel_tool_calls": True, "reasoning": {"effort": "high", "summary": "auto"},
        "include": ["web_search_call.action.sources"], "temperature": 0.5, "truncation": "auto", "user": "me", "client_metadata": {"x": "y"},
    }  # fmt: skip
    with httpx.stream(
        "POST", f"{proxy.url}/v1/responses", json=ask, headers={"Authorization": f"Bearer {KEY}"}
    ) as answer:
        got = [json.loads(line[6:]) for line in answer.iter_lines() if line.startswith("data: ")]
    theirs = [json.loads(one.partition(b"data: ")[2]) for one in said]
    assert [one["type"] for one in got] == [one["type"] for one in theirs]
    plain = [(ours, other) for ours, other in zip(got, theirs, strict=True) if "response" not in ours]
    assert plain and all(ours == other for ours, other in plain)  # items, ids, order, encrypted reasoning
    for ours, other in zip(got, theirs, strict=True):
        if "response" in ours:
            assert (
                ours["response"]["id"].startswith("resp_")
                and ours["response"]["id"] != other["response"]["id"]
            )
            assert ours["response"]["tools"] == tools and ours["response"]["metadata"] == {"a": "b"}
            assert (
                ours["response"]["instructions"] == "be brief" and "safety_identifier" not in ours["response"]
            )
    final = got[-1]["response"]
    openai.types.responses.Response.model_validate(final)
    assert [item["type"] for item in final["output"]] == [
        "reasoning",
        "custom_tool_call",
    ]  # which the upstream left out
    assert final["usage"] == theirs[-1]["response"]["usage"]
    body = sent_to_codex(codex)
    assert body["tools"] == [tools[0], {"type": "web_search"}, *tools[2:]]
    assert (
        body["text"] == {"verbosity": "high"}
        and body["service_tier"] == "priority"
        and body["parallel_tool_calls"]
    )
    assert body["reasoning"] == {"effort": "high", "summary": "auto"}
    assert body["include"] == ["web_search_call.action.sources", "reasoning.encrypted_content"]
    assert not {"temperature", "truncation", "user", "metadata", "client_metadata"} & body.keys()


def test_responses_are_kept_referred_to_and_gone_on_from(start: Start, codex: Weather) -> None:
    proxy = start(codex_token("alice"), authorization=f"{KEY},another-key")
    codex.obeys = True
    client = proxy.client()
    tools: list[Any] = [
        {
            "type": "function",
            "name": "get_weather",
            "parameters": {"type": "object", "properties": {}},
            "strict": False,
        }
    ]
    first = client.responses.create(
        model="gpt-5.5", input="the weather, please", tools=tools, reasoning={"summary": "auto"}
    )
    thought, call = first.output
    assert client.responses.retrieve(first.id).output == first.output
    result: Any = {"type": "function_call_output", "call_id": call.call_id, "output": "sunny"}  # type: ignore[union-attr]
    second = client.responses.create(
        model="gpt-5.5", previous_response_id=first.id, input=[result], tools=tools
    )
    items = sent_to_codex(codex)["input"]
    assert [item["type"] for item in items] == [
        "message",
        "reasoning",
        "function_call",
        "function_call_output",
    ]
    assert items[1]["encrypted_content"] and second.output_text
    references: list[Any] = [{"type": "item_reference", "id": one.id} for one in (thought, call)]
    question: Any = {"role": "user", "content": "the weather, please"}
    client.responses.create(model="gpt-5.5", input=[question, *references, result], tools=tools)
    kinds = [item.get("type", "message") for item in sent_to_codex(codex)["input"]]
    assert kinds == ["message", "reasoning", "function_call", "function_call_output"]
    listed = client.responses.input_items.list(second.id, order="asc").data
    assert [one.type for one in listed] == ["message", "reasoning", "function_call", "function_call_output"]
    events = list(client.responses.retrieve(first.id, stream=True))
    assert events[-1].type == "response.completed" and events[-1].response.id == first.id
    other = openai.OpenAI(base_url=f"{proxy.url}/v1", api_key=proxy.user("bob"), max_retries=0)
    with pytest.raises(openai.NotFoundError):
        other.responses.create(model="gpt-5.5", input=[question, *references, result], tools=tools)
    third = proxy.client().responses.create(
        model="gpt-4o", previous_response_id=second.id, input="and by the site?"
    )
    assert codex.wanted()[-1].endswith("/conversation") or third.output_text


@pytest.mark.parametrize(
    "limit, stop, text, ended",
    [
        (2, [], "Hello wide", "incomplete"),
        (500, ["wor"], "Hello wide ", "completed"),
        (500, [], "Hello wide world.", "completed"),
    ],
)
@pytest.mark.parametrize("streamed", [True, False])
def test_a_limit_and_stops_are_kept_here(
    start: Start, codex: Weather, limit: int, stop: list[str], text: str, ended: str, streamed: bool
) -> None:
    proxy = start(codex_token("alice"))
    body = {"model": "gpt-5.5", "input": "hi", "max_output_tokens": limit, "stop": stop, "stream": streamed}
    answer = httpx.post(f"{proxy.url}/v1/responses", json=body, headers={"Authorization": f"Bearer {KEY}"})
    response = answer.json() if not streamed else {}
    if streamed:
        events = [json.loads(line[6:]) for line in answer.text.split("\n") if line.startswith("data: ")]
        response = events[-1]["response"]
        told = "".join(one["delta"] for one in events if one["type"] == "response.output_text.delta")
        assert told == text and [one["sequence_number"] for one in events] == sorted(
            {one["sequence_number"] for one in events}
        )
        done = next(one for one in events if one["type"] == "response.output_text.done")
        assert done["text"] == text and events[-1]["type"] == f"response.{ended}"
    assert response["status"] == ended and response["output"][0]["content"][0]["text"] == text
    assert response["max_output_tokens"] == limit and "max_output_tokens" not in sent_to_codex(codex)


@pytest.mark.parametrize("gone", [False, True])
def test_a_conversation_is_made_shorter_by_the_upstream(start: Start, codex: Weather, gone: bool) -> None:
    proxy = start(codex_token("alice"))
    if gone:
        codex.add("/codex/responses/compact", status(404, {"detail": "Not Found"}))
    client = proxy.client()
    codex.obeys = True
    question: Any = {"role": "user", "content": "a long story"}
    for _ in range(2):
        made = client.responses.compact(model="gpt-5.5", input=[question], instructions="be brief")
        assert [getattr(item, "type", None) or "message" for item in made.output] == ["message", "compaction"]
        assert made.output[1].encrypted_content.endswith(".user-alice")  # type: ignore[union-attr]
    assert codex.count("/codex/responses/compact") == (1 if gone else 2)
    kept: list[Any] = [item.to_dict() for item in made.output]
    assert client.responses.create(model="gpt-5.5", input=[*kept, question]).output_text
    assert sent_to_codex(codex)["input"][1]["type"] == "compaction"
    web = start("bob", folder="web")
    sealed = web.client().responses.compact(model="gpt-4o", input=[question])
    assert client.responses.create(model="gpt-5.5", input=[sealed.output[0].to_dict(), question]).output_text  # type: ignore[list-item]
    told = sent_to_codex(codex)["input"][0]
    assert told["role"] == "developer" and cp.SUMMARY_LINE in told["content"][0]["text"]


@pytest.mark.parametrize("plan, by", [("plus", CODEX_CALL), ("free", "/conversation")])
def test_images_are_drawn_by_the_tool_where_the_plan_has_it(
    start: Start, codex: Weather, plan: str, by: str
) -> None:
    proxy = start(codex_token("alice", plan=plan))
    codex.obeys = True
    codex.drawing_time = 0.1
    drawn = (
        proxy.client()
        .images.generate(prompt="a cat", size="1024x1024", quality="high", model="gpt-image-1")
        .data
    )
    assert drawn and base64.b64decode(drawn[0].b64_json or "") == cp.demo_image().read()
    assert [
        call
        for call in codex.wanted()
        if call.endswith((CODEX_CALL, "/conversation")) and call.startswith("POST")
    ][-1].endswith(by)
    if plan == "plus":
        body = sent_to_codex(codex)
        assert body["tools"] == [
            {"type": "image_generation", "output_format": "png", "size": "1024x1024", "quality": "high"}
        ]
        assert body["tool_choice"] == {"type": "image_generation"} and body["model"] == "gpt-5.4-mini"
        edited = (
            proxy.client()
            .images.edit(image=("cat.png", picture()), prompt="a dog", response_format="url")
            .data
        )
        assert edited and edited[0].url and httpx.get(edited[0].url).content == cp.demo_image().read()
        assert sent_to_codex(codex)["input"][0]["content"][0]["image_url"] == data_url(picture())


def test_an_account_that_may_not_draw_is_known_after_one_refusal(start: Start, codex: Weather) -> None:
    proxy = start(codex_token("alice"))
    codex.obeys = True
    refused = {
        "error": {
            "message": "Tool choice 'image_generation' not found in 'tools' parameter.",
            "param": "tool_choice",
        }
    }
    codex.add(CODEX_CALL, status(400, refused))
    for _ in range(2):
        assert proxy.client().images.generate(prompt="a cat").data
    assert codex.count(CODEX_CALL) == 1 and proxy.app.pool.accounts()[0].row.codex != "no"
    assert proxy.say(model="gpt-5.5")


@pytest.mark.parametrize("size", [1000, 600_000])
def test_files_are_told_with_their_bytes(start: Start, codex: Weather, size: int) -> None:
    proxy = start("bob", codex_token("alice"), max_body_mb="20")
    pdf = b"%PDF-1.4 " + secrets.token_bytes(size)
    client = proxy.client()
    uploaded = client.files.create(file=("kept.pdf", b"%PDF-1.4 kept"), purpose="user_data")
    given: Any = {"type": "input_file", "filename": "a.pdf", "file_data": data_url(pdf, "application/pdf")}
    kept: Any = {"type": "input_file", "file_id": uploaded.id}
    asked: Any = [{"role": "user", "content": [given, kept, {"type": "input_text", "text": "read"}]}]
    response = client.responses.create(model="gpt-5.5", input=asked)
    content = sent_to_codex(codex)["input"][0]["content"]
    assert content[0] == given
    assert content[1] == {
        "type": "input_file",
        "filename": "kept.pdf",
        "file_data": data_url(b"%PDF-1.4 kept", "application/pdf"),
    }
    client.responses.create(model="gpt-5.5", previous_response_id=response.id, input="again")
    assert sent_to_codex(codex)["input"][0]["content"][0] == given
    file = {"type": "file", "file": {"filename": "a.pdf", "file_data": data_url(pdf, "application/pdf")}}
    proxy.say(model="gpt-5.5", messages=[part_message(file)])
    assert sent_to_codex(codex)["input"][0]["content"][0] == given


def test_cookies_of_the_backend_are_kept_for_it_alone(start: Start, codex: Weather) -> None:
    proxy = start(codex_token("alice"))
    done = sse(
        {"type": "response.output_text.delta", "delta": "Hi"}, {"type": "response.completed", "response": {}}
    )
    cookie = {"Set-Cookie": "__cf_bm=abc; Path=/"}
    codex.add(CODEX_CALL, lambda request: cp.Reply(200, done, "text/event-stream", cookie))
    proxy.say(model="gpt-5.5")
    proxy.say(model="gpt-5.5")
    assert codex.last(CODEX_CALL).headers["cookie"] == "__cf_bm=abc"
    proxy.say(model="gpt-4o")
    assert "__cf_bm" not in codex.last("/conversation").headers["cookie"]


def test_what_was_drawn_in_a_chat_has_a_link(start: Start, codex: Weather) -> None:
    proxy = start(codex_token("alice"))
    codex.obeys = True
    text = proxy.say("Draw a cat", model="gpt-5.5", tools=[{"type": "image_generation"}])
    link = re.search(r"!\[image\]\((.+)\)", text)
    assert link and httpx.get(link[1]).content == cp.demo_image().read()


def test_a_text_that_came_whole_is_told_whole(start: Start, codex: Weather) -> None:
    proxy = start(codex_token("alice"))
    item = {
        "type": "message",
        "role": "assistant",
        "content": [{"type": "output_text", "text": "All at once."}],
    }
    created = {"type": "response.created", "response": {"id": "r", "model": "gpt-5.5"}}
    done = {"type": "response.output_item.done", "output_index": 0, "item": item}
    end = {"type": "response.completed", "response": {"output": []}}
    listed = {"type": "response.completed", "response": {"output": [item]}}
    refusal = item | {"content": [{"type": "refusal", "refusal": "No."}]}
    codex.add(
        CODEX_CALL,
        raw_stream(sse(created, done, end)),
        raw_stream(sse(created, listed)),
        raw_stream(sse(done | {"item": refusal}, end)),
    )
    assert [proxy.say(model="gpt-5.5") for _ in range(3)] == ["All at once.", "All at once.", "No."]
    codex.add(CODEX_CALL, raw_stream(sse(created, done, end)))
    assert proxy.client().responses.create(model="gpt-5.5", input="hi").output_text == "All at once."


def test_two_summaries_of_thoughts_are_parted(start: Start, codex: Weather) -> None:
    proxy = start(codex_token("alice"))
    events: list[dict[str, Any]] = []
    for index, text in enumerate(("First.", "Then.")):
        events.append(
            {"type": "response.reasoning_summary_part.added", "output_index": 0, "summary_index": index}
        )
        events.append({"type": "response.reasoning_summary_text.delta", "output_index": 0, "delta": text})
    events += [
        {"type": "response.output_text.delta", "output_index": 1, "delta": "Hi"},
        {"type": "response.completed", "response": {}},
    ]
    codex.add(CODEX_CALL, raw_stream(sse(*events)))
    message = proxy.ask(model="gpt-5.5").json()["choices"][0]["message"]
    assert (message["reasoning_content"], message["content"]) == ("First.\n\nThen.", "Hi")


def test_codexs_auth_json_brings_an_account_for_it(tmp_path: pathlib.Path, codex: Weather) -> None:
    tokens = {
        "id_token": "x",
        "access_token": codex_token("alice"),
        "refresh_token": "rt_" + "b" * 40,
        "account_id": "workspace-alice",
    }
    file = tmp_path / "auth.json"
    file.write_text(
        json.dumps(
            {"OPENAI_API_KEY": None, "tokens": tokens, "last_refresh": "2026-11-01T00:00:00Z"}, indent=2
        )
    )
    env = {"DATA_DIR": str(tmp_path / "data")}
    assert run("accounts", "import", str(file), env=env).returncode == 0
    listed = json.loads(run("accounts", "list", "--json", env=env).stdout)
    assert (listed["kind"], listed["upstreams"], listed["workspace"]) == (
        "refresh",
        "codex",
        "workspace-alice",
    )


def test_the_upstreams_echo_of_a_request_stays_here(start: Start, codex: Weather) -> None:
    proxy = start(codex_token("alice"))
    body = {"model": "gpt-5.5", "input": "hi", "stream": True}
    answer = httpx.post(f"{proxy.url}/v1/responses", json=body, headers={"Authorization": f"Bearer {KEY}"})
    session = sent_to_codex(codex)["prompt_cache_key"]
    assert session not in answer.text and "user-demo" not in answer.text


def test_a_limit_is_told_rather_than_what_the_site_says_of_its_accounts(start: Start, codex: Weather) -> None:
    proxy = start(codex_token("alice"), codex_token("bob"))
    codex.add(CODEX_CALL, *[refused_with(429, "usage_limit_reached", resets_in_seconds=3600)] * 2)
    codex.add("/chat-requirements", *[status(403, {"detail": UNUSUAL})] * 20)
    for model in ("gpt-5.5", "auto"):
        answer = proxy.ask(model=model)
        assert (
            error_of(answer) == (429, "rate_limit_exceeded")
            and 3500 < int(answer.headers["retry-after"]) <= 3600
        )
    assert error_of(proxy.ask(model="gpt-9-nope")) == (404, "model_not_found")
    assert {account.paths() for account in proxy.app.pool.accounts()} == {"codex"}


def test_a_call_that_is_missing_once_turns_nobody_off(start: Start, codex: Weather) -> None:
    proxy = start(codex_token("alice"), codex_token("bob"), upstream_order="codex")
    proxy.say(model="gpt-5.5")
    codex.add(CODEX_CALL, status(404, {"detail": "Not Found"}))
    for _ in range(3):
        assert proxy.say(model="gpt-5.5") == "Hello wide world."
    lost = {
        "error": {
            "message": "Item with id 'ig_1' not found. Items are not persisted when `store` is set to false."
        }
    }
    codex.add(CODEX_CALL, status(404, lost))
    assert error_of(proxy.ask(model="gpt-5.5")) == (400, "invalid_request_error")
    assert proxy.say(model="gpt-5.5") == "Hello wide world."


@pytest.mark.parametrize("made_shorter", [False, True])
def test_what_one_account_has_sealed_goes_back_to_it(
    start: Start, codex: Weather, made_shorter: bool
) -> None:
    proxy = start(*map(codex_token, ("alice", "bob", "carol")), upstream_order="codex")
    codex.obeys = True
    client = proxy.client()
    for number in range(4):
        question: Any = {"role": "user", "content": f"story {number}"}
        if made_shorter:
            kept: Any = [
                item.to_dict() for item in client.responses.compact(model="gpt-5.5", input=[question]).output
            ]
            home = codex._owner(next(one for one in reversed(codex.seen) if one.path.endswith("/compact")))
            for _ in range(3):
                assert client.responses.create(model="gpt-5.5", input=[*kept, question]).output_text
                assert codex._owner(codex.last(CODEX_CALL)) == home
            continue
        before = client.responses.create(
            model="gpt-5.5", input=f"story {number}", reasoning={"summary": "auto"}
        )
        home, calls = codex._owner(codex.last(CODEX_CALL)), codex.count(CODEX_CALL)
        session = sent_to_codex(codex)["prompt_cache_key"]
        for _ in range(3):
            before = client.responses.create(
                model="gpt-5.5", previous_response_id=before.id, input="more", reasoning={"summary": "auto"}
            )  # fmt: skip
            assert codex._owner(codex.last(CODEX_CALL)) == home
            assert sent_to_codex(codex)["prompt_cache_key"] == session
        assert codex.count(CODEX_CALL) == calls + 3
        assert sum(item["type"] == "reasoning" for item in sent_to_codex(codex)["input"]) == 3


def test_an_account_that_the_site_refuses_goes_on_at_the_codex_backend(start: Start, codex: Weather) -> None:
    proxy = start(codex_token("alice"))
    (account,) = proxy.app.pool.accounts()
    codex.add("/me", status(401))
    assert admin(proxy, "POST", "/tokens/check", json={"ids": [account.id]}).json()["results"] == {
        account.id: ""
    }
    assert (account.row.state, account.paths()) == ("ready", "codex") and proxy.say(model="gpt-5.5")
    codex.add("/models", *[status(403, {"detail": "no"})] * 5)
    for _ in range(2):
        listed = web(proxy, "GET", "/v1/models", KEY)
        assert listed.status_code == 200 and "gpt-5.5" in listed.text
    assert account.row.state == "ready"


def test_parts_in_the_shape_of_chats_are_told_in_the_apis_own(start: Start, codex: Weather) -> None:
    proxy = start(codex_token("alice"), upstream_order="codex")
    large = picture(1200, 1200)
    for size, image in ((0, picture()), (600_000, large)):
        url = data_url(image + bytes(size))
        parts = [{"type": "text", "text": "look"}, {"type": "image_url", "image_url": {"url": url}}]
        body = {"model": "gpt-5.5", "input": [{"role": "user", "content": parts}]}
        answer = httpx.post(
            f"{proxy.url}/v1/responses", json=body, headers={"Authorization": f"Bearer {KEY}"}, timeout=30
        )
        assert answer.status_code == 200, answer.text
        content = sent_to_codex(codex)["input"][0]["content"]
        assert content == [
            {"type": "input_text", "text": "look"}, {"type": "input_image", "image_url": url, "detail": "auto"},
        ]  # fmt: skip


@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_with_a_picture_that_is_cut_is_kept_and_counted(
    start: Start, codex: Weather, stream: bool
) -> None:
    proxy = start(codex_token("alice"))
    part = {"type": "input_image", "image_url": data_url(picture())}
    body = {
        "model": "gpt-5.5",
        "max_output_tokens": 2,
        "stream": stream,
        "input": [{"role": "user", "content": [part]}],
    }
    key = proxy.user("bob")
    answer = httpx.post(f"{proxy.url}/v1/responses", json=body, headers={"Authorization": f"Bearer {key}"})
    told = json.loads(answer.text.rsplit("data: ", 1)[1])["response"] if stream else answer.json()
    assert told["status"] == "incomplete" and told["usage"]["output_tokens"] > 0
    item = told["output"][0]["id"]
    more = {
        "model": "gpt-5.5",
        "input": [{"role": "user", "content": "x"}, {"type": "item_reference", "id": item}],
    }
    assert (
        httpx.post(
            f"{proxy.url}/v1/responses", json=more, headers={"Authorization": f"Bearer {key}"}
        ).status_code
        == 200
    )
    assert proxy.app.ledger.today(proxy.store.users()[0].id).tokens > 0


def test_calls_that_are_made_side_by_side_are_told_one_after_the_other() -> None:
    def call(index: int, arguments: str) -> dict[str, Any]:
        return {"type": "function_call", "call_id": f"c{index}", "name": "f", "arguments": arguments}

    def added(index: int) -> dict[str, Any]:
        return {"type": "response.output_item.added", "output_index": index, "item": call(index, "")}

    def piece(index: int, text: str) -> dict[str, Any]:
        return {"type": "response.function_call_arguments.delta", "output_index": index, "delta": text}

    def done(index: int, text: str) -> dict[str, Any]:
        return {"type": "response.output_item.done", "output_index": index, "item": call(index, text)}

    text = {"type": "response.output_text.delta", "output_index": 2, "delta": "Meanwhile."}
    decoder = cp.CodexDecoder(False, cp.Names())
    end = {"type": "response.completed", "response": {}}
    first, second = '{"x":1}', '{"a":"long"}'
    found = decoder.feed(
        sse(
            added(0),
            piece(0, '{"x"'),
            added(1),
            piece(1, '{"a"'),
            text,
            done(1, second),
            piece(0, ":1}"),
            done(0, first),
            end,
        )
    )
    kinds = [(type(one).__name__, getattr(one, "arguments", "")) for one in found]
    assert kinds == [
        ("CallPart", ""), ("CallPart", '{"x"'), ("CallPart", ":1}"), ("FunctionCall", first), ("Text", ""), ("FunctionCall", second),
    ]  # fmt: skip


@pytest.mark.parametrize(
    "refusal",
    [
        {"message": "Unsupported tool type: mcp"},
        {"message": "Unsupported value: 'mcp'.", "code": "unsupported_value", "param": "tools[0].type"},
    ],
)
def test_a_tool_that_the_backend_does_not_have_is_left_out(
    start: Start, codex: Weather, refusal: dict[str, str]
) -> None:
    proxy = start(codex_token("alice"), upstream_order="codex")
    codex.add(CODEX_CALL, status(400, {"error": refusal}), status(400, {"error": refusal}))
    tools: Any = [{"type": "mcp", "server_label": "x", "server_url": "https://example.com"}]
    with pytest.raises(openai.BadRequestError):  # for a second refusal of the same there is no remedy
        proxy.client().responses.create(model="gpt-5.5", input="hi", tools=tools)
    assert codex.count(CODEX_CALL) == 2 and "tools" not in sent_to_codex(codex)


def test_what_items_have_too_much_is_left_out_of_this_request_alone(start: Start, codex: Weather) -> None:
    proxy = start(codex_token("alice"), upstream_order="codex")
    said = "Unknown parameter: 'input[0].content[0].cache_control'."
    codex.add(CODEX_CALL, status(400, {"error": {"message": said, "code": "unknown_parameter"}}))
    part = {"type": "input_text", "text": "hi", "cache_control": {"type": "ephemeral"}}
    ask: Any = {"model": "gpt-5.5", "input": [{"role": "user", "content": [part]}]}
    assert proxy.client().responses.create(**ask).output_text
    assert sent_to_codex(codex)["input"][0]["content"] == [{"type": "input_text", "text": "hi"}]
    codex.add(
        CODEX_CALL, *[status(400, {"error": {"message": "Unknown parameter: 'input[0].content'."}})] * 3
    )
    assert (
        error_of(proxy.ask(model="gpt-5.5")) == (400, "invalid_request_error")
        and codex.count(CODEX_CALL) == 3
    )


@pytest.mark.parametrize("body, part, left", [
    ({"a": {"b": 1, "c": 2}}, "a.b", {"a": {"c": 2}}), ({"a": 1}, "a", {}), ({"a": 1}, "b.c", {"a": 1}), ({"a": 1}, "a[0].x", {"a": 1}),
    ({"input": [{"x": 1, "type": "t"}, {"y": 2}]}, "input[1].x", {"input": [{"type": "t"}, {"y": 2}]}),
    ({"input": [{"content": [{"z": 1, "text": "t"}, "s"]}]}, "input[0].content[7].z", {"input": [{"content": [{"text": "t"}, "s"]}]}),
    ({"input": [{"name": "n"}], "model": "m"}, "input[0].name", {"input": [{"name": "n"}], "model": "m"}),
    ({"tools": [{"type": "a"}], "tool_choice": "auto", "parallel_tool_calls": True}, "tools:a", {}), ({}, "", {}),
])  # fmt: skip
def test_a_part_is_left_out_by_its_path(body: Any, part: str, left: Any) -> None:
    assert cp.without(body, part) == left


def test_numbers_have_no_gap_where_something_is_not_told(start: Start, codex: Weather) -> None:
    proxy = start(codex_token("alice"))
    kinds = [
        "response.created",
        "keepalive",
        "response.output_text.delta",
        "keepalive",
        "response.output_text.delta",
        "response.completed",
    ]
    events = [
        {"type": kind, "sequence_number": i, "delta": f'x"sequence_number":{i}', "response": {}}
        for i, kind in enumerate(kinds)
    ]
    codex.add(CODEX_CALL, raw_stream(*[sse(event) for event in events]))
    body = {"model": "gpt-5.5", "input": "hi", "stream": True}
    answer = httpx.post(f"{proxy.url}/v1/responses", json=body, headers={"Authorization": f"Bearer {KEY}"})
    told = [json.loads(line[6:]) for line in answer.text.split("\n") if line.startswith("data: ")]
    assert [one["sequence_number"] for one in told] == [0, 1, 2, 3]
    assert [one["delta"] for one in told[1:3]] == ['x"sequence_number":2', 'x"sequence_number":4']


def test_kept_conversations_of_the_site_come_first_where_their_ids_are_told(
    start: Start, codex: Weather
) -> None:
    codex.models = ["gpt-5.5"]
    proxy = start("alice", codex_token("bob"), history_disabled="false")
    assert proxy.ask(model="gpt-5.5").json()["conversation_id"] and codex.count(CODEX_CALL) == 0
    assert (
        proxy.client().responses.create(model="gpt-5.5", input="hi").output_text
        and codex.count(CODEX_CALL) == 1
    )


def test_an_imported_access_token_serves_until_it_ends(
    tmp_path: pathlib.Path, start: Start, codex: Weather
) -> None:
    tokens = {
        "access_token": codex_token("alice"),
        "refresh_token": "rt_" + "b" * 40,
        "account_id": "workspace-alice",
    }
    file = tmp_path / "auth.json"
    file.write_text(json.dumps({"tokens": tokens}))
    proxy = start(*cp.token_lines(file), upstream_order="codex")
    assert proxy.say(model="gpt-5.5") == "Hello wide world." and codex.count("/oauth/token") == 0
    (account,) = proxy.app.pool.accounts()
    assert (account.row.kind, account.row.email) == ("refresh", "alice@demo.example")


@pytest.mark.parametrize("browser", [True, False])
def test_what_a_browser_sign_in_gave_is_for_the_codex_backend(
    start: Start, codex: Weather, browser: bool
) -> None:
    proxy = start("bob")  # tokens that do not say whose client they were given to
    row = cp.store_tokens(
        proxy.app.pool, cp.demo_token("alice"), "rt_" + "a" * 40 if browser else "", browser
    )
    alice = proxy.app.pool.find(row.id)
    assert alice and alice.speaks_codex() == alice.is_of_codex() == browser
    assert alice.paths() == ("codex" if browser else "web")


def test_a_used_up_refresh_token_is_shown_to_no_other_client(start: Start, codex: Weather) -> None:
    codex.refresh_refusal = 401, {"error": {"code": "refresh_token_reused"}}
    proxy = start("rt_" + "a" * 40)
    assert proxy.ask(model="gpt-5.5").status_code == 503 and codex.count("/oauth/token") == 1
    assert proxy.app.pool.accounts()[0].row.state == "dead"


def test_the_demo_fails_as_it_is_asked_to(start: Start, codex: Weather) -> None:
    codex.obeys = True
    proxy = start(codex_token("alice"), upstream_order="codex", retry_times="0")
    said = functools.partial(proxy.ask, model="gpt-5.5")
    assert error_of(said("simulate server_is_overloaded")) == (502, "upstream_error")
    assert error_of(said("simulate context_length_exceeded")) == (400, "context_length_exceeded")
    assert error_of(said("simulate usage_limit_reached")) == (429, "rate_limit_exceeded")
    assert said("hello").status_code == 429


@pytest.mark.parametrize("quoted", [
    "deactivated_workspace", "missing scopes", "at capacity", "Selected model is at capacity", "Unknown parameter: tools",
    "Unsupported parameter: include", "The 'gpt-5.5' model is not supported", "Tool choice 'image_generation' not found",
])  # fmt: skip
def test_what_a_client_has_quoted_is_no_verdict_on_an_account(
    start: Start, codex: Weather, quoted: str
) -> None:
    proxy = start(codex_token("alice"), codex_token("bob"), upstream_order="codex")
    said = {
        "message": f"Invalid value: '{quoted}'. Supported values are: 'a'.",
        "code": "invalid_value",
        "param": "include[0]",
    }
    codex.add(CODEX_CALL, status(400, {"error": said}))
    assert (
        error_of(proxy.ask(model="gpt-5.5")) == (400, "invalid_request_error")
        and codex.count(CODEX_CALL) == 1
    )
    assert {account.told(time.time()) for account in proxy.app.pool.accounts()} == {"ready"}
    tools = [{"type": "function", "function": {"name": "f"}}]
    assert proxy.ask(model="gpt-5.5", tools=tools).status_code == 200
    body = sent_to_codex(codex)
    assert (
        body["tools"]
        and body["include"]
        and {one.row.codex for one in proxy.app.pool.accounts()} <= {"", "yes"}
    )


def test_a_guests_refusals_teach_nobody(start: Start, codex: Weather) -> None:
    proxy = start(codex_token("alice"), upstream_order="codex")
    guest = codex_token("guest")
    codex.add(CODEX_CALL, status(404, {"detail": "Not Found"}))
    assert proxy.ask(key=guest, model="gpt-5.5").status_code in (200, 502)
    codex.add(CODEX_CALL, status(400, {"detail": "Unsupported parameter: include"}))
    assert proxy.ask(key=guest, model="gpt-5.5").status_code == 200
    assert proxy.say(model="gpt-5.5") == "Hello wide world." and sent_to_codex(codex)["include"]


def test_many_tools_and_calls_take_no_time(start: Start, codex: Weather) -> None:
    proxy = start(codex_token("alice"), upstream_order="codex")
    tools = [{"type": "mcp", "server_label": f"f{i}", "server_url": "http://x"} for i in range(1900)]
    brought = [{"type": "additional_tools", "role": "developer", "tools": tools}] * 3
    calls = [
        {"id": f"a{i}", "type": "function", "function": {"name": "f", "arguments": "{}"}} for i in range(5000)
    ]
    results = [{"role": "tool", "tool_call_id": f"b{i}", "content": "x"} for i in range(5000)]
    unnamed = [{"role": "function", "name": f"g{i}", "content": "x"} for i in range(5000)]
    began = time.monotonic()
    body = {"model": "gpt-5.5", "input": [*brought, {"role": "user", "content": "x"}]}
    assert (
        httpx.post(
            f"{proxy.url}/v1/responses", json=body, headers={"Authorization": f"Bearer {KEY}"}, timeout=60
        ).status_code
        == 400
    )
    talk = [{"role": "user", "content": "x"}, {"role": "assistant", "tool_calls": calls}, *results, *unnamed]
    assert proxy.ask(model="gpt-5.5", messages=talk).status_code == 200
    assert time.monotonic() - began < 10
    too_many = {"model": "gpt-5.5", "input": "x", "tools": tools * 2}
    answer = httpx.post(
        f"{proxy.url}/v1/responses", json=too_many, headers={"Authorization": f"Bearer {KEY}"}, timeout=60
    )
    assert error_of(answer) == (400, "invalid_request_error") and "too many" in answer.text


@pytest.mark.parametrize("words", [f"try again in {'9' * 400}s", "try again in 999999999m"])
def test_no_wait_is_longer_than_anybody_lives(
    tmp_path: pathlib.Path, start: Start, codex: Weather, words: str
) -> None:
    proxy = start(codex_token("alice"), upstream_order="codex", retry_times="0")
    codex.add(CODEX_CALL, refused_with(429, "rate_limit_exceeded", words))
    answer = proxy.ask(model="gpt-5.5")
    assert (
        error_of(answer) == (429, "rate_limit_exceeded") and int(answer.headers["retry-after"]) <= 40 * 86400
    )
    proxy.store.put_wait(proxy.app.pool.accounts()[0].id, "codex", 1e300, 1)
    assert run("accounts", "list", env={"DATA_DIR": str(tmp_path / "data")}).returncode == 0


@pytest.mark.parametrize("odd", [
    {"supported_reasoning_levels": [{"effort": []}]}, {"supported_reasoning_levels": "x"}, {"description": "\ud800"},
    {"display_name": "x" * 1_000_000}, {"context_window": "large"}, {"input_modalities": [{}, 1]}, {"priority": []}, {"visibility": {}},
])  # fmt: skip
def test_an_odd_model_breaks_nothing(start: Start, codex: Weather, odd: dict[str, Any]) -> None:
    models = [codex.codex_catalog[0], codex.codex_catalog[1] | odd]
    codex.add("/codex/models", lambda request: cp.Reply(200, json.dumps({"models": models}).encode()))
    proxy = start(codex_token("alice"), upstream_order="codex")
    assert proxy.say(model="gpt-5.6-sol", reasoning_effort="high") == "Hello wide world."
    assert proxy.ask(model="gpt-5.5", reasoning_effort="high").status_code == 200
    listed = web(proxy, "GET", "/v1/models", KEY)
    assert listed.status_code == 200 and "gpt-5.6-sol" in listed.text and len(listed.content) < 10_000
    assert httpx.post(
        f"{proxy.url}/api/show", json={"model": "gpt-5.5"}, headers={"Authorization": f"Bearer {KEY}"}
    ).status_code in (200, 404)


def test_the_upstreams_words_are_for_the_client_alone(
    start: Start, codex: Weather, caplog: pytest.LogCaptureFixture
) -> None:
    proxy = start(codex_token("alice"), upstream_order="codex", retry_times="0")
    caplog.set_level("DEBUG", "chatproxy")
    codex.add(
        CODEX_CALL,
        failing("server_error", "no: SECRETTEXT"),
        status(400, {"error": {"message": "no: SECRETTEXT", "code": "x"}}),
    )
    for _ in range(2):
        assert "SECRETTEXT" in proxy.ask("SECRETTEXT", model="gpt-5.5").text
    assert "SECRETTEXT" not in caplog.text + "".join(str(record.__dict__) for record in caplog.records)


def test_what_is_held_back_has_an_end() -> None:
    waiting = sse({"type": "response.in_progress", "response": {"x": "y" * 1000}}) * 1000
    decoder = cp.CodexDecoder(True, cp.Names())
    for _ in range(20):
        decoder.feed(waiting)
    assert decoder.failure and decoder.failure.reason == "broken" and not decoder.begun
    call = {"type": "function_call", "call_id": "c", "name": "f"}
    decoder = cp.CodexDecoder(False, cp.Names())
    decoder.feed(sse({"type": "response.output_item.added", "output_index": 0, "item": call}))
    text = sse({"type": "response.output_text.delta", "output_index": 1, "delta": "x" * 10_000}) * 100
    for _ in range(200):
        decoder.feed(text)
    assert decoder.failure
    for native, end in ((False, b"\r"), (True, b"")):
        decoder, began = cp.CodexDecoder(native, cp.Names()), time.monotonic()
        decoder.feed(sse({"type": "response.output_text.delta", "delta": "x"}))
        for _ in range(1500):
            decoder.feed(b"x" * 16_000 + end)
        assert time.monotonic() - began < 3 and not decoder.failure


def test_a_list_of_models_that_never_ends_is_not_waited_for(
    start: Start, codex: Weather, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cp, "CATALOG_PATIENCE", 1.0)

    def drip(request: cp.Request) -> cp.Sent:
        for _ in range(100):
            yield b" ", 1
            time.sleep(0.2)

    proxy = start(codex_token("alice"), upstream_order="codex")
    codex.add("/codex/models", lambda request: cp.streamed(drip(request)))
    began = time.monotonic()
    assert proxy.say(model="gpt-5.5") == "Hello wide world." and time.monotonic() - began < 6


# --- faults that the tests must notice -----------------------------------------------------------------------------------
#
# `python test_chatproxy.py mutants` puts each of these faults into a copy of the program and runs the tests that are to
# notice it; `--fast` takes those whose place is in a line that is not committed yet, `-k WORD` those with a word in
# their name. A fault is its name, the text it replaces (once in the program), what stands there instead, and the tests
# as pytest's -k has them.

MUTANTS: list[tuple[str, str, str, str]] = [
    ('names are sent as they are',
     '        if _PLAIN_NAME.fullmatch(name):\n            return name\n        digest', '        return name\n        digest',
     'tools_and_all_else_are_told_natively'),
    ('a changed name stays changed',
     'item["name"] = self._given.get(name, name)', 'pass',
     'tools_and_all_else_are_told_natively'),
    ('callers share sessions',
     'f"{scope.owner}\\n{key}"', 'f"{key}"',
     'one_session_and_each_caller_another'),
    ('a refusal in an answer is told at once',
     '            self.begun = self.begun or kind not in _HELD_BACK\n', '            self.begun = True\n',
     'refusal_before_the_answer'),
    ("a plan's limit rests the model alone",
     'about = "" if windows and all(window.used < 100 for window in windows) else CODEX', 'about = ""',
     'used_up_account_rests'),
    ("a model's limit rests the plan",
     'about = "" if windows and all(window.used < 100 for window in windows) else CODEX', 'about = CODEX',
     'models_own_limit'),
    ('a conversation changes its account',
     'return spent, account.id != home, *order', 'return spent, *order',
     'conversation_stays_with_its_account'),
    ('a spent account is asked first',
     'return spent, account.id != home, *order', 'return account.id != home, *order',
     'spread_over_accounts'),
    ('earlier reasoning is insisted on',
     '        attempt.without_reasoning = True\n', '',
     'reasoning_is_replayed_and_dropped'),
    ("what was sealed is anybody's",
     'self._remember(key, attempt.leased)', 'pass',
     'sealed_goes_back_to_it'),
    ('a list of models is read each time',
     '        if now - before.read < CATALOG_LIFE:\n            return\n', '',
     'read_once_an_hour'),
    ('a hidden model is listed',
     'for one in filter(is_shown, account.catalog.models)', 'for one in account.catalog.models',
     'model_goes_to_the_upstream'),
    ('an effort is told whoever knows it',
     'reasoning["effort"] = nearest_effort(wanted, levels_of(facts))', 'reasoning["effort"] = wanted',
     'tools_and_all_else_are_told_natively'),
    ('the echo of a request is told',
     'told = {name: response[name] for name in _SAID_OF_A_RESPONSE if name in response}', 'told = dict(response)',
     'echo_of_a_request'),
    ('a gap stays in the numbers',
     '            self._swallowed += type', '            self._swallowed += 0 * type',
     'numbers_have_no_gap'),
    ('a site that refuses an account kills it',
     'if (expired and account.is_of_codex()) or', 'if False and',
     'site_refuses_goes_on or whether_the_site'),
    ('what is needed is left out',
     'return value if not steps or steps[-1] in _NEEDED or steps[-1][0] == "[" else', 'return value if not steps else',
     'left_out_by_its_path'),
    ('a model is passed off as another',
     'if before and limited and not upstream.has(', 'if before and limited and False and not upstream.has(',
     'used_up_account_rests'),
    ("a call's pieces are mixed",
     '            take(self, event, out if own else self._later)\n', '            take(self, event, out)\n',
     'side_by_side_are_told'),
    ("the site's cookies go to the Codex backend",
     '*_cookie_line(account.codex_cookies)]', '*_cookie_line(account.cookies)]',
     'cookies_of_the_backend'),
    ('a dead token is shown to another client',
     'if dead.startswith("refresh_token_"):', 'if False:',
     'shown_to_no_other_client'),
    ('free plans draw',
     'return account.row.plan != "free" and', 'return',
     'drawn_by_the_tool'),
    ('a continued answer counts the events of the one before',
     'self.seen, self.resume_token = 0, ""\n', 'pass\n',
     'continued_answer_that_breaks'),
    ('an old answer is served as the new one',
     'found = found if not sent or _at(message, ("id",)) in sent else []', 'pass',
     'old_answer_is_never'),
    ('a token that expires in the midst ends an answer',
     'if refused.reason != "expired" or not account.renewable:', 'if True:',
     'expires_while_an_answer'),
    ('a slow image is drawn again',
     'raise Refusal("silent", "The upstream took too long to finish', 'raise Refusal("broken", "The upstream took too long to finish',
     'image_that_takes_too_long'),
    ("half an event is passed on natively",
     "self._held + data if self._stream == stream else data", "self._held + data",
     "breaks_within_an_event"),
    ('what nobody wants more of is gone on with',
     'attempt.enough = not attempt.decoder.done', 'pass',
     'nobody_wants_more_of'),
    ('that an answer begins is its first part',
     'begun = attempt.begun or any(type(event) is not Begin for event in found)', 'begun = attempt.begun or bool(found)',
     'only_began_is_asked'),
    ('a deletion that fails is forgotten',
     'if not erased and failures < MAX_ERASED:', 'if False:',
     'deleted_although'),
    ('an image that is not drawn counts',
     '            if attempt.decoder.drew:\n', '            if draws:\n',
     'limit_of_images'),
    ('a commented cookie is an account',
     'comment = text[:1] == "#" and not text.startswith("#HttpOnly_")', 'comment = False',
     'comments_and_workspaces'),
    ('the second refusal of a body is told',
     'told.reason == "rejected" and refused.reason in ("blocked", "human")', 'False',
     'wrong_with_a_body'),
    ('an export is readable by others',
     'descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600)', 'descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)',
     'an_export_is_a_new_file_of_ones_own'),
    ('an export overwrites a file',
     'descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY', 'descriptor = os.open(path, os.O_CREAT | os.O_WRONLY',
     'an_export_is_a_new_file_of_ones_own'),
    ('a hand-off is the end',
     'self.handed_off = True\n', 'pass\n',
     'thought_that_is_handed_off'),
    ('a resumed stream begins anew',
     'self.seen = 0 if self.handed_off else self.seen', 'self.seen = 0',
     'breaks_off_or_falls_silent'),
    ('what came already comes again',
     'message.again = max(0, known.sent - len(text_of_parts(told))) if self._resumed else 0', 'message.again = 0',
     'thought_that_is_handed_off'),
    ('silence is never the end of a stream',
     'call.handle.silence = min(call.handle.silence, STREAM_SILENCE)', 'pass',
     'breaks_off_or_falls_silent'),
    ("a conversation is not looked into",
     "goes_on = decoder.awaits_drawing or (attempt.resumable and (decoder.unfinished or empty))", "goes_on = decoder.awaits_drawing",
     "no_stream_to_go_on_with"),
    ("drawings are not waited for",
     "goes_on = decoder.awaits_drawing or (attempt.resumable and (decoder.unfinished or empty))", "goes_on = attempt.resumable and (decoder.unfinished or empty)",
     "drawing_goes_on_behind"),
    ('drawings are made in temporary chats',
     'temporary = self.settings.history_disabled and not draws and not attempt.lasting', 'temporary = self.settings.history_disabled',
     'drawing_goes_on_behind'),
    ('a kept conversation is never deleted',
     'attempt.to_erase[talk] = account', 'pass',
     'drawing_goes_on_behind'),
    ("a link needs no signature",
     "not hmac.compare_digest(self._signature(id, facts).encode(), given)", "False",
     "drawing_goes_on_behind"),
    ('a link is good for ever',
     'if int(facts["until"]) < time.time():', 'if False:',
     'link_is_good_for_an_hour'),
    ("images are not counted",
     "account.drawings = left._replace(images=left.images - 1, counted=True)", "pass",
     "limit_of_images"),
    ('a proof is tried with one algorithm',
     'if not doubted or not self.may_prove_otherwise(account):', 'if True:',
     'proof_by_fnv'),
    ('a conduit is always asked for',
     'self._learn(account, "conduit", not token)', 'pass',
     'both_generations_and_both_proofs or smaller_model_is_told'),
    ('a smaller model is told each time',
     '>= BELIEVED:\n            if len(self._told_smaller)', '>= 0:\n            if len(self._told_smaller)',
     'smaller_model_is_told'),
    ("the bytes of a file go to AWS with Azure's headers",
     'if not re.search(r"[?&]X-Amz-", url, re.I):', 'if True:',
     'files_go_where'),
    ("login-free calls stay where they are refused",
     "attempt.mobile = fit and account.row.kind == LOGIN_FREE", "attempt.mobile = False",
     "login_free_calls_go"),
    ('a refused country kills an account',
     'if error == "unsupported_country_region_territory":', 'if False:',
     'country_that_is_refused or whatever'),
    ('a session whose renewal failed lives on',
     '(said or {}).get("error") == "RefreshAccessTokenError"', 'False',
     'session_whose_renewal'),
    ('a part of a session cookie is enough',
     'if sorted(parts) != list(range(len(parts))) or not parts:', 'if not parts:',
     'parts_of_a_cookie'),
    ('cookies that come along are lost',
     'cookies = {name: value for name, _, value in pairs if name in COOKIES_ALONG and value}', 'cookies = dict[str, str]()',
     'session_cookie_is_taken or cookies_that_come'),
    ("the device's cookie is what the site sets",
     'cookies | {DEVICE_COOKIE: row.device}', '{DEVICE_COOKIE: row.device} | cookies',
     'test_the_device_cookie_is_the_device_header_in_every_call'),
    ('calls have no device cookie',
     '*_cookie_line(cookies | {DEVICE_COOKIE: row.device})', '*_cookie_line(cookies)',
     'test_the_device_cookie_is_the_device_header_in_every_call'),
    ('a token that is not credited blames the address',
     '    if needs.persona == "chatgpt-noauth" and account.row.kind != LOGIN_FREE:\n        text = "The upstream takes this', '    if False:\n        text = "The upstream takes this',
     'test_a_token_that_is_not_credited_is_set_aside'),
    ('a human check that is wanted blames the address',
     '    elif checks:', '    elif False:',
     'test_a_403_is_told_by_its_cause'),
    ("a page that blocks the address blames the token",
     'if refused.reason != "blocked" or is_page(refused):\n        return refused\n    checks', 'if refused.reason != "blocked":\n        return refused\n    checks',
     "test_a_403_is_told_by_its_cause"),
    ('accounts whose token is not credited stay',
     '_OF_TOKEN = ("expired", "uncredited")', '_OF_TOKEN = ("expired",)',
     'test_a_token_that_is_not_credited_is_set_aside'),
    ('a check asks for less than a chat needs',
     '            needs = self.site.requirements(account, watch)\n            if', '            needs = Requirements()\n            if',
     'test_a_check_asks_for_what_a_chat_needs'),
    ('what the model is told that it said is said again',
     'return bool(said) and text_of_parts(message) in self._said', 'return False',
     'test_what_the_model_is_told_that_it_said_is_not_said_again'),
    ("what the model says again is taken for an echo",
     'whole = self.by_text and message.get("status") == "finished_successfully"', "whole = self.by_text",
     "test_what_the_model_is_told_that_it_said_is_not_said_again"),
    ('deltas are for the message that began last',
     'self._turn_to(value.get("c"))', 'pass',
     'test_deltas_are_for_the_message_of_their_channel'),
    ('messages of no weight are shown',
     ' or message.get("weight") == 0', '',
     'test_a_message_of_no_weight_is_hidden'),
    ('unusual activity within an answer is any failure',
     'if "unusual activity" in said[:20_000].lower():', 'if False:',
     'test_a_failure_within_an_answer_is_told_as_what_it_is'),
    ('a system error is a message',
     'failed = _at(told, ("content", "content_type")) == "system_error"', 'failed = False',
     'test_a_failure_within_an_answer_is_told_as_what_it_is'),
    ('an answer may be empty',
     'if ended and not attempt.decoder.content:', 'if False:',
     'test_an_answer_without_content_is_an_error'),
    ("what was sent is taken for the answer",
     "        if id in self.ids:", "        if False:",
     "test_a_picture_that_was_sent_is_not_the_answers"),
    ("a picture that was sent is taken for a drawing",
     "if pointer not in self.shown and pointer not in self.pointers:", "if pointer not in self.shown:",
     "test_a_picture_that_was_sent_is_not_the_answers"),
    ("a custom tool's call is a function's",
     'CUSTOM: CallShape("ctc", "custom_tool_call"', 'CUSTOM: CallShape("fc", "function_call"',
     'test_a_tool_of_every_kind_is_called_in_its_own_shape'),
    ('the namespace of a call is not told',
     '({"namespace": call.namespace} if call.namespace else {})', '{}',
     'test_a_tool_of_every_kind_is_called_in_its_own_shape'),
    ("a grammar is not checked",
     'if grammar and fits_grammar(grammar, arguments["input"]) is False:', "if False:",
     "test_an_input_that_does_not_fit_its_grammar_is_asked_for_again"),
    ('grammars of any kind are matched',
     '    if ways > MAX_MATCHING:', '    if False:',
     'test_a_simple_grammar_is_checked_and_no_other'),
    ('groups of a grammar are repeated',
     'if re.search(r"\\)[*+?{]", operators):', 'if False:',
     'test_a_simple_grammar_is_checked_and_no_other'),
    ('a search is forced beside functions',
     'if not meant and question.offer is None and len(question.hosted) == 1:', 'if not meant and question.hosted:',
     'test_the_sites_own_tools_are_hinted_at_alone_and_offered_beside_functions'),
    ('output that comes late is lost',
     '        else:  # something came in between\n            self.take_text(_fenced(event).text)', '        else:\n            pass',
     'test_output_that_comes_late_is_told_all_the_same'),
    ("text before a call is told behind it",
     "if type(event) in (FunctionCall, CallPart):  # it stands", "if False:  # it stands",
     "test_text_that_may_begin_a_stop_sequence_stays_before_a_call"),
    ('what a model said is kept out of order',
     'for is_item, run in itertools.groupby(message.parts, lambda part: type(part) in AS_ITEM):', 'for is_item, run in [(flag, [p for p in message.parts if (type(p) in AS_ITEM) is flag]) for flag in (False, True)]:',
     'test_a_history_that_began_elsewhere_goes_on_here'),
    ('a compaction is told before it is whole',
     '        """It comes when it is whole."""\n', '        super().take_text(text)\n',
     'test_a_conversation_is_made_shorter_and_gone_on_with'),
    ("what a compaction stands for is kept beside it",
     "    if rendering.request.compacts:  # which stands for everything before\n        pass\n    elif", "    if",
     "test_a_conversation_is_made_shorter_and_gone_on_with"),
    ("somebody else's compaction is read",
     'if not isinstance(content, str) or not content.startswith(_SEAL):', 'if not isinstance(content, str):',
     'test_a_history_that_began_elsewhere_goes_on_here'),
    ('a response that failed has no error beside it',
     'response=self.whole(), **error.body())', 'response=self.whole())',
     'test_a_response_that_breaks_off_says_so_where_clients_look'),
    ("a response that failed before it began has no begin",
     "        if not self.begun:\n            self.begin()\n        if numbers", "        if numbers",
     "test_a_response_that_breaks_off_says_so_where_clients_look"),
    ('Responses pretend to speak WebSocket',
     'raise ApiError("upgrade_required", text, headers={"Upgrade": "HTTP/1.1"})', 'pass',
     'test_a_websocket_where_none_is_spoken_is_refused_at_once'),
    ('thinking is told unasked',
     '        if self._thinks:\n            self._grow(Reasoning, event.text)', '        if True:\n            self._grow(Reasoning, event.text)',
     'test_a_message_is_answered_whole_and_streamed'),
    ('a failed call is told as any other',
     'failed = (Text("The call failed:"),) if block.get("is_error") else ()', 'failed = ()',
     'test_tools_are_called_in_messages_and_their_results_told'),
    ('no parallel calls are many',
     'return tools.offered(wanted, not choice.get("disable_parallel_tool_use"))', 'return tools.offered(wanted, True)',
     'test_a_tool_choice_of_messages_is_kept'),
    ("an error of Messages has OpenAI's shape",
     'return "anthropic"\n', 'return "openai"\n',
     'test_messages_fail_in_anthropics_shape'),
    ("a key of Anthropic's is passed on to OpenAI",
     'if key.startswith("sk-ant-") or self._foreign_path(request.path):', 'if False:',
     'test_messages_fail_in_anthropics_shape'),
    ('x-api-key is no key',
     'return request.headers.get("x-api-key", "").strip()', 'return ""',
     'test_a_message_is_answered_whole_and_streamed'),
    ('results are taken for the first call',
     '        unanswered.remove(given["name"])', '        pass',
     'test_ollamas_clients_call_tools_and_send_pictures'),
    ('a compressed body is read as it is',
     'if headers.get("content-encoding", "identity").lower() != "identity" and not request.key:', 'if False:',
     'test_a_compressed_body_is_refused_as_what_it_is'),
    ('known tools are those that begin alike',
     'if tools is None or not data.startswith(json_of, start):', 'if tools is None:',
     'test_tools_that_were_sent_before_are_read_as_what_they_are'),
    ("tools that stand elsewhere are the request's",
     'if tools is not None and value.get("tools") != mark:', 'if False:',
     'test_tools_that_were_sent_before_are_read_as_what_they_are'),
    ('tools mean the same in every API',
     'found = known[add] = Tools()', "found = known[add] = known.setdefault('', Tools())",
     'test_the_same_tools_mean_what_their_api_has_them_mean'),
    ("counting tokens uses up a user's day",
     'if request.method not in ("POST", "PATCH") or request.path in ASKS_NOBODY:', 'if request.method not in ("POST", "PATCH"):',
     'test_counting_uses_up_nobodys_day'),
    ('a list makes a store',
     'return opened(settings) if (pathlib.Path(settings.data_dir) / STORE_FILE).exists() else None', 'return opened(settings)',
     'test_lists_have_a_header_at_a_terminal_and_make_no_store'),
    ('a terminal cuts long lines',
     'raw[3] &= ~(termios.ICANON | termios.ECHO)', 'raw[3] &= ~termios.ECHO',
     'test_a_long_line_can_be_pasted_at_a_terminal'),
    ("the server imports from the working directory",
     "sys.path = [sys.argv.pop(1), *filter(None, sys.path)]", "sys.path.append(sys.argv.pop(1))",
     "test_the_server_goes_on_as_a_module"),
    ("the server runs as a script",
     'if place.name == "chatproxy.py" and plain and direct:', "if False:",
     "test_the_server_goes_on_as_a_module"),
    ("a body that breaks in sending is not sent anew",
     "if code == _NOT_SENT and call.handle.begins_anew():", "if False:",
     "test_a_large_body_begins_anew_when_a_kept_connection_breaks"),
    ("a token that was just taken in is exchanged again",
     "not self.pool.renewed_elsewhere(account) and not self._good(account, refused)",
     "not self.pool.renewed_elsewhere(account)",
     "test_two_processes_exchange_a_token_once"),
    ("a result's files are lost",
     "inner = part.parts if isinstance(part, ToolResult) else (part,)", "inner = (part,)",
     "test_calls_and_results_in_the_history_reach_the_model"),
    ("responses of an earlier version are gone on from without what was said",
     "if not isinstance(items, list):  # as", "if False:  # as",
     "test_a_response_is_gone_on_from_with_its_files_and_calls"),
    ("somebody else's conversation ends the search for its upstream",
     "        except ApiError as error:\n            refused = error\n    if refused:", "        except ApiError as error:\n            raise error\n    if refused:",
     "test_agents_conversations_belong_to_who_began_them"),
    ("an upstream may be named twice",
     "if not named or len(set(named)) < len(named):", "if not named:",
     "test_a_setting_is_what_it_says_and_nothing_more"),
    ("counting values takes memory",
     'data.replace(rb"\\\\", b"").replace(rb"\\"", b"")', "data",
     "test_counting_values_takes_no_memory"),
    ("a text full of brackets is many values",
     "return any(number > MAX_JSON_TOKENS for number, _ in enumerate(_JSON_TOKEN.finditer(plain)))", "return True",
     "test_text_full_of_brackets_is_one_value"),
    ("a URL may hold white space and control characters",
     'or re.search(r"[\\s\\x00-\\x1f]", text):', "or False:",
     "test_a_setting_is_what_it_says_and_nothing_more"),
    ("a value need only begin as it should",
     "if not re.fullmatch(pattern, text):", "if not re.match(pattern, text):",
     "test_a_setting_is_what_it_says_and_nothing_more"),
    ("a number may lie outside its bounds",
     "or not low <= int(text) <= high:", "or False:",
     "test_a_setting_is_what_it_says_and_nothing_more"),
    ("a prefix keeps the slashes around it",
     '._~/-]+")(text).strip("/")', '._~/-]+")(text)',
     "test_a_setting_is_what_it_says_and_nothing_more"),
    ("several state directories are taken for one",
     '"STATE_DIRECTORY", "").split(":")[0]', '"STATE_DIRECTORY", "")',
     "test_a_setting_is_what_it_says_and_nothing_more"),
    ("config shows the prefix",
     'anything else is 404", secret=True', 'anything else is 404", secret=False',
     "config_shows_no_secret"),
    ("config shows the proxy's password",
     'alias="GO_CHATGPT_API_PROXY",\n        secret=True', 'alias="GO_CHATGPT_API_PROXY",\n        secret=False',
     "config_shows_no_secret"),
    ("config shows the export proxy's password",
     'fetching URLs that clients name", secret=True', 'fetching URLs that clients name", secret=False',
     "config_shows_no_secret"),
    ("config shows the gateway's key",
     'for private gateways", secret=True', 'for private gateways", secret=False',
     "config_shows_no_secret"),
    ("config shows the Arkose service",
     'answers `{"token": …}`\', secret=True', 'answers `{"token": …}`\', secret=False',
     "config_shows_no_secret"),
    ("config shows the agents' key",
     'key that agents register with; when unset, the admin key", secret=True', 'key that agents register with; when unset, the admin key", secret=False',
     "config_shows_no_secret"),
    ("without ADMIN_KEY nobody needs a key to administer",
     "self.admin_key or (self.authorization[0] if self.authorization else None)", "self.admin_key",
     "test_without_any_key_this_machine_alone_administers"),
    ("a variable wins over a flag",
     "if flag := flags.get(row.name):", "if (flag := flags.get(row.name)) and row.name.upper() not in environ:",
     "test_a_flag_wins_over_a_variable_and_an_alias_counts"),
    ("an empty variable is a value",
     "next((name for name in names if environ.get(name)), None)",
     "next((name for name in names if name in environ), None)",
     "test_a_flag_wins_over_a_variable_and_an_alias_counts"),
    ("an unusable secret is repeated",
     'shown = masked(text) if row.metadata["secret"] else repr(text)', "shown = repr(text)",
     "test_an_unusable_secret_is_not_repeated"),
    ("one of TLS_CERT and TLS_KEY is accepted alone",
     'if bool(values["tls_cert"]) != bool(values["tls_key"]):', "if False:",
     "test_a_certificate_and_its_key_are_set_together"),
    ("config shows the end of a secret",
     "{hashlib.sha256(secret.encode('utf-8', 'surrogateescape')).hexdigest()[:6]}", "{secret[-4:]}",
     "config_shows_no_secret"),
    ("a 503 is the client's fault by its type",
     '503: "server_error"}\nKINDS |=', '504: "server_error"}\nKINDS |=',
     "test_errors_have_the_kinds_of_openai"),
    ("the JSON log leaves a fault out",
     'line["exception"] = self.formatException(record.exc_info)', "pass",
     "test_a_fault_of_ours_is_told_by_its_number_alone"),
    ("a fact is not quoted in the log",
     "else json.dumps(str(value))}", "else value}",
     "test_a_log_line_cannot_be_forged"),
    ("a fact's line separators of Unicode are not quoted",
     '_PLAIN = re.compile(r"[!#-~]+")', '_PLAIN = re.compile(r"[!#-~\\x80-\\uffff]+")',
     "test_a_fact_is_one_word_or_quoted"),
    ("a counter has no lock",
     "with self._values_lock:\n            series", "if True:\n            series",
     "test_nothing_is_lost_when_threads_count_at_once"),
    ("a histogram has no lock",
     "with self._values_lock:\n            row", "if True:\n            row",
     "test_nothing_is_lost_when_threads_count_at_once"),
    ("a histogram's bound is not in its bucket",
     "if seconds <= bound)", "if seconds < bound)",
     "test_a_histogram_counts_what_is_not_above_each_bound"),
    ("large counts lose their digits",
     'else f"{name} {value:.15g}")', 'else f"{name} {value:g}")',
     "test_counters_keep_all_their_digits"),
    ("a histogram's buckets are not cumulative",
     "            total += count\n", "            total = count\n",
     "test_a_histogram_counts_what_is_not_above_each_bound"),
    ("buckets of metrics do not add up",
     "total += count\n", "total = count\n",
     "test_health_tells_the_version_and_metrics_their_form"),
    ("a client that left is waited for",
     "if rung or now >= look:\n                look = now + self.look_after()", "if now >= look:\n                look = now + 3600",
     "test_who_waits_for_an_agent_gets_heartbeats_and_may_leave"),
    ("who waits for an agent hears nothing",
     "return self.writer.sign() if self.writer else self.LOOK", "return self.LOOK",
     "test_who_waits_for_an_agent_gets_heartbeats_and_may_leave"),
    ("drawings go on when the client has left",
     "one.over = True\n                one.ring()", "one.ring()",
     "test_a_client_that_leaves_ends_all_its_drawings"),
    ("one account that fails hides all models",
     "if failure and not results:", "if failure:",
     "test_every_accounts_models_are_listed_and_one_that_fails_hides_none"),
    ("bodies have no room of their own",
     "if self._left[place] < size:", "if False:",
     "test_bodies_have_a_room_of_their_own"),
    ("a disk that is full is a fault of ours",
     'raise overloaded("The server has no room for files just now", 30) from None', "raise RuntimeError from error",
     "test_a_body_for_which_there_is_no_room_is_told_to_come_back"),
    ("a part of a blob can be read beyond its end",
     "max(0, min(self.size - start, self.size if size is None else size))", "self.size if size is None else size",
     "test_a_blob_reads_the_same_from_memory_and_disk or test_a_form_is_read_as_it_was_written"),
    ("what lies across two pieces of a blob is not found",
     "self.read(at, PIECE + len(wanted) - 1)", "self.read(at, PIECE)",
     "test_a_form_has_only_so_many_parts_and_header_lines"),
    ("a body that is sent again goes on where it broke",
     "        self._at = offset\n", "        pass\n",
     "test_a_large_body_begins_anew_when_a_kept_connection_breaks"),
    ("a short PNG is a failure of ours",
     'and head[12:16] == b"IHDR" and len(head) >= 24', 'and (len(head) < 16 or head[12:16] == b"IHDR")',
     "test_no_bytes_break_the_reader_of_sizes"),
    ("a WebP's scale is taken for its size",
     "width & 0x3FFF, height & 0x3FFF", "width, height",
     "test_the_frame_of_an_image_is_found_behind_other_segments"),
    ("a JPEG's table is taken for its frame",
     "and segment[1] not in (0xC4, 0xC8, 0xCC)", "and segment[1] not in (0xC8, 0xCC)",
     "test_the_frame_of_an_image_is_found_behind_other_segments"),
    ("a JPEG's fill bytes are taken for a segment",
     "at += 1 if segment[1] == 0xFF else 2 if alone", "at += 2 if alone",
     "test_the_frame_of_an_image_is_found_behind_other_segments"),
    ("an API user sees what nobody is known to have begun",
     "return self.everyone or self.owner == LOGIN_FREE", "return True",
     "test_api_users_keep_to_what_they_have_begun"),
    ("keys do not see what API users began",
     "return owner == self.owner or (self.everyone and", "return owner == self.owner or (False and",
     "test_api_users_keep_to_what_they_have_begun"),
    ("a database behind a link is used",
     " | os.O_NOFOLLOW", "",
     "test_a_store_that_cannot_be_used_is_said_in_one_line"),
    ("SQLite without WAL", '"journal_mode=WAL"', '"journal_mode=DELETE"', "what_is_written_is_on_disk"),
    ("SQLite does not wait for the disk", '"synchronous=FULL"', '"synchronous=OFF"', "what_is_written_is_on_disk"),
    ("SQLite without foreign keys", '"foreign_keys=ON"', '"foreign_keys=OFF"', "what_is_written_is_on_disk"),
    ("a folder that others may read is used",
     "if has & 0o077:", "if False:",
     "test_a_store_that_cannot_be_used_is_said_in_one_line"),
    ("a database without tables is used",
     "if have < 0 or (have and not known) or (have == len(MIGRATIONS) and TABLES - known):", "if False:",
     "test_a_store_that_cannot_be_used_is_said_in_one_line"),
    ("a failed commit leaves the transaction open",
     "if self._db.in_transaction:  # some", "if False:  # some",
     "test_a_commit_that_fails_leaves_nothing_open"),
    ("a roll-back commits", '"ROLLBACK"', '"COMMIT"', "what_is_written_is_on_disk"),
    ("a fault of our own SQL is a full disk",
     "except (sqlite3.IntegrityError, sqlite3.ProgrammingError, sqlite3.InterfaceError, sqlite3.DataError):",
     "except KeyError:",
     "test_a_commit_that_fails_leaves_nothing_open"),
    ("a full disk is a fault of ours",
     "            raise StoreUnavailable(str(error)) from None", "            raise",
     "test_a_full_disk_stops_only_what_must_be_kept"),
    ("the store's trouble never ends",
     '            self.trouble = ""\n            log', "            log",
     "test_a_full_disk_stops_only_what_must_be_kept"),
    ("accounts are in no order",
     'WHERE {where} ORDER BY added, id"\n        return [AccountRow', 'WHERE {where}"\n        return [AccountRow',
     "an_account_keeps_its_identity_with_a_newer_token"),
    ("disabling revives or buries accounts in other states",
     "WHERE id=? AND state=? AND guest=0", "WHERE id=? AND state IS NOT ? AND guest=0",
     "disabling_touches_none_but"),
    ("enabling revives a dead account",
     "WHERE id=? AND state=? AND guest=0", "WHERE id=? AND ? != '' AND guest=0",
     "disabling_touches_none_but"),
    ("a guest can be disabled by its id",
     "WHERE id=? AND state=? AND guest=0", "WHERE id=? AND state=?",
     "disabling_touches_none_but"),
    ("removing all of the pool removes guests too",
     '"SELECT id FROM accounts WHERE guest=0"', '"SELECT id FROM accounts"',
     "a_removed_account_takes_what_is_known_of_it_along"),
    ("files of a removed account are kept",
     '"DELETE FROM files WHERE account=?"', '"DELETE FROM files WHERE account=? AND 0"',
     "a_removed_account_takes_what_is_known_of_it_along"),
    ("tallies of a removed account are kept",
     'executemany("DELETE FROM tallies WHERE subject=?"', 'executemany("DELETE FROM tallies WHERE subject=? AND 0"',
     "a_removed_account_takes_what_is_known_of_it_along"),
    ("conversations are lost when two accounts become one",
     '"UPDATE conversations SET account=? WHERE account=?"',
     '"UPDATE conversations SET account=? WHERE account=? AND 0"',
     "an_expired_account_is_ready_again"),
    ("files are lost when two accounts become one",
     '"UPDATE files SET account=? WHERE account=?"', '"UPDATE files SET account=? WHERE account=? AND 0"',
     "an_expired_account_is_ready_again"),
    ("a wait that is stored again keeps its old end",
     "DO UPDATE SET until=excluded.until, strikes", "DO UPDATE SET strikes",
     "an_answer_does_not_end_the_wait"),
    ("a wait is written into another's transaction",
     'self._write(f"{query} {changes}", model, until, strikes, account)',
     'self._db.execute(f"{query} {changes}", (model, until, strikes, account))',
     "nothing_is_written_into_anothers_transaction"),
    ("who lists a conversation owns it",
     "CASE conversations.owner WHEN '' THEN excluded.owner ELSE conversations.owner END", "excluded.owner",
     "test_api_users_keep_to_what_they_have_begun"),
    ("prune keeps waits",
     '"DELETE FROM waits WHERE until < ?"', '"DELETE FROM waits WHERE until < ? AND 0"',
     "what_is_old_is_forgotten_and_nothing_else"),
    ("prune drops waits at once",
     'until < ?", (now - 86400,)', 'until < ?", (now,)',
     "what_is_old_is_forgotten_and_nothing_else"),
    ("prune keeps conversations",
     '"DELETE FROM conversations WHERE used < ?"', '"DELETE FROM conversations WHERE used < ? AND 0"',
     "what_is_old_is_forgotten_and_nothing_else"),
    ("conversations are forgotten after a month",
     "now - 180 * 86400", "now - 30 * 86400",
     "what_is_old_is_forgotten_and_nothing_else"),
    ("prune keeps old responses",
     '"DELETE FROM responses WHERE made < ?"', '"DELETE FROM responses WHERE made < ? AND 0"',
     "what_is_old_is_forgotten_and_nothing_else"),
    ("prune drops files that are listed",
     "WHERE purpose='' AND used < ?", "WHERE used < ?",
     "what_is_old_is_forgotten_and_nothing_else"),
    ("prune keeps loose files",
     "purpose='' AND used < ?", "purpose='' AND used < ? AND 0",
     "what_is_old_is_forgotten_and_nothing_else"),
    ("prune keeps tallies",
     "DELETE FROM tallies WHERE since < ? AND EXISTS", "DELETE FROM tallies WHERE since < ? AND NOT EXISTS",
     "what_is_old_is_forgotten_and_nothing_else"),
    ("prune forgets when somebody was last used",
     "since < ? AND EXISTS ({later})", "since < ?",
     "what_is_old_is_forgotten_and_nothing_else"),
    ("an API user reads anybody's response",
     "if rows and scope.covers(rows[0][0]) else None", "if rows else None",
     "test_nobody_sees_anothers_files_and_responses"),
    ("one caller's responses fill the disk",
     'self._shorten("owner=?", (owner,), MAX_RESPONSES_OF_ONE)', "pass",
     "test_what_is_kept_of_a_response_is_bounded_at_once"),
    ("of too many responses the newest go first",
     "SUM(size) OVER (ORDER BY made DESC, id)", "SUM(size) OVER (ORDER BY made, id)",
     "what_is_old_is_forgotten_and_nothing_else"),
    ("prune keeps responses whatever their size",
     "WHERE size > ?", "WHERE size > ? AND 0",
     "what_is_old_is_forgotten_and_nothing_else"),
    ("tallies of a removed user are kept",
     'execute("DELETE FROM tallies WHERE subject=?"', 'execute("DELETE FROM tallies WHERE subject=? AND 0"',
     "a_removed_account_takes_what_is_known_of_it_along"),
    ("saving again replaces what was saved",
     "{name}={name}+excluded.{name}", "{name}=excluded.{name}",
     "counts_add_up_and_a_limit_of_none_is_none"),
    ("a device is another one in every process",
     "random.Random(device).choice", "random.Random().choice",
     "a_device_is_the_same_in_every_process"),
    ("the fingerprint's clock is not that of its time zone",
     "-datetime.timedelta(minutes=TIMEZONE_OFFSET_MIN)", "datetime.timedelta(minutes=TIMEZONE_OFFSET_MIN)",
     "a_device_is_the_same_in_every_process"),
    ("a page is older than a person keeps it open",
     "min(max(now - page.read, 1.0), 3600.0)", "max(now - page.read, 1.0)",
     "a_device_is_the_same_in_every_process"),
    ("a page was read this instant",
     "min(max(now - page.read, 1.0), 3600.0)", "min(now - page.read, 3600.0)",
     "a_device_is_the_same_in_every_process"),
    ("the fingerprint's origin is not its beginning",
     "round(now * 1000 - since, 1)", "round(now * 1000, 1)",
     "a_device_is_the_same_in_every_process"),
    ("a difficulty in capitals is harder",
     "difficulty.lower().ljust(size", "difficulty.ljust(size",
     "a_device_is_the_same_in_every_process"),
    ("a shorter difficulty is harder",
     'ljust(size, "f") < limit', 'ljust(size, "0") < limit',
     "harder_means_a_smaller_string"),
    ("the allowed difficulty itself is refused",
     '"f") < limit.ljust(size, "f")', '"f") <= limit.ljust(size, "f")',
     "harder_means_a_smaller_string"),
    ("a proof's attempts are not counted",
     "configuration[3] = tried + len(_STARTS)\n", "configuration[3] = tried\n",
     "a_proof_is_right_and_still_a_configuration"),
    ("a proof given up is not what browsers send",
     'return GIVE_UP + base64.b64encode(f\'"{seed}"\'', "return GIVE_UP + base64.b64encode(f'{seed}'",
     "a_proof_that_cannot_be_found"),
    ("hard proofs hold all threads up",
     "if expected_attempts(job[1]) <= EASY_ATTEMPTS:", "if True:",
     "a_hard_proof_is_not_solved_in_this_process"),
    ("a lost solver fails the request",
     "except (OSError, TimeoutError):\n            log", "except (KeyError, TimeoutError):\n            log",
     "a_lost_solver_stops_nobody"),
    ("an answer that is cut ends the solver's listener",
     "except (ValueError, TypeError):\n                # An", "except KeyError:\n                # An",
     "test_a_solvers_answer_that_is_cut_ends_no_listener"),
    ("an upstream's JSON may have any number of values",
     "        if too_many_values(self.body):\n            return None", "        if False:\n            return None",
     "test_an_upstreams_json_of_too_many_values_is_none"),
    ("what is unpacked has no limit",
     "if pieces.size > MAX_AT_ONCE:", "if False:",
     "test_what_an_upstream_sends_has_an_end"),
    ("any status is relayed",
     '_STATUS_LINE = re.compile(r"HTTP/[0-9.]+ ([2-5][0-9][0-9])(?: |$)")',
     '_STATUS_LINE = re.compile(r"HTTP/[0-9.]+ ([0-9]+)")',
     "test_what_an_upstream_sends_has_an_end"),
    ("an upstream's certificate is not verified",
     '"NOSIGNAL": 1,', '"NOSIGNAL": 1, "SSL_VERIFYPEER": 0,',
     "test_no_upstream_or_proxy_is_trusted_without_a_certificate_that_proves_it"),
    ("an upstream's certificate may name another host",
     '"NOSIGNAL": 1,', '"NOSIGNAL": 1, "SSL_VERIFYHOST": 0,',
     "test_no_upstream_or_proxy_is_trusted_without_a_certificate_that_proves_it"),
    ("a proxy's certificate is not verified",
     '"NOSIGNAL": 1,', '"NOSIGNAL": 1, "PROXY_SSL_VERIFYPEER": 0,',
     "test_no_upstream_or_proxy_is_trusted_without_a_certificate_that_proves_it"),
    ("a proxy's certificate may name another host",
     '"NOSIGNAL": 1,', '"NOSIGNAL": 1, "PROXY_SSL_VERIFYHOST": 0,',
     "test_no_upstream_or_proxy_is_trusted_without_a_certificate_that_proves_it"),
    ("a call has the method of the one before it",
     "if method != (self._method or usual):", "if method != usual:",
     "test_a_call_is_prepared_without_what_the_one_before_it_had"),
    ("after a call that is sent once every call has a connection of its own",
     "            self._set(_FRESH, 0)", "            pass",
     "test_a_call_is_prepared_without_what_the_one_before_it_had"),
    ("a call that is to be sent once goes over a kept connection",
     "        self._set(_FRESH, 1)", "        pass",
     "test_a_call_is_prepared_without_what_the_one_before_it_had"),
    ("an answer's head is that of the proxy's",
     "self._head[starts[-1] :]", "self._head[starts[0] :]",
     "test_a_clients_url_is_fetched_from_the_address_that_was_checked"),
    ("an upstream's head has no limit of lines",
     "len(lines) > MAX_ANSWER_LINES", "False",
     "test_what_an_upstream_sends_has_an_end"),
    ("of two cookies in an answer one is kept",
     'between = "\\n" if name == "set-cookie" else ", "', 'between = ", "',
     "test_a_call_is_prepared_without_what_the_one_before_it_had"),
    ("an upstream's answer has no limit",
     "if size > MAX_ANSWER:", "if False:",
     "test_a_relayed_answer_is_passed_on_as_it_is"),
    ("handles have no owner",
     "key = (owner, egress, place)", 'key = ("", egress, place)',
     "test_no_two_accounts_share_a_connection"),
    ("handles that failed are used again",
     "if handle and kept and not handle.failed and", "if handle and kept and",
     "test_guests_share_a_small_pool_of_connections"),
    ("no connection is kept",
     "if not kept or self._closed:", "if True:",
     "test_connections_upstream_are_kept"),
    ("guests' connections have no limit",
     "elif self._together and len(self._multis) > self._most:", "elif False:",
     "test_guests_share_a_small_pool_of_connections"),
    ("a URL is fetched for an hour",
     "FETCH_TIME = 30.0", "FETCH_TIME = 3600.0",
     "test_what_a_clients_url_leads_to_has_its_limits"),
    ("a hundred redirects are followed",
     "MAX_REDIRECTS = 5", "MAX_REDIRECTS = 100",
     "test_what_a_clients_url_leads_to_has_its_limits"),
    ("IPv4 inside IPv6 is public",
     "return is_public(str(one.ipv4_mapped))", "return True",
     "test_only_anybodys_addresses_are_public"),
    ("6to4 and Teredo lead inside",
     "not all(is_public(str(inner)) for inner in inside if inner)", "False",
     "test_only_anybodys_addresses_are_public"),
    ("multicast addresses are public",
     "one.is_global and not one.is_multicast and", "one.is_global and",
     "test_only_anybodys_addresses_are_public"),
    ("any scheme is fetched, files of this machine among them",
     'parts.scheme not in ("http", "https") or not host', "not host",
     "test_a_clients_url_is_tried_at_every_address_and_never_a_file"),
    ("of several addresses of a name one must be public",
     "and not all(map(is_public, filter(None, addresses))):\n            raise ValueError",
     "and not any(map(is_public, filter(None, addresses))):\n            raise ValueError",
     "test_a_clients_url_is_fetched_from_the_address_that_was_checked"),
    ("a name's second address is not tried",
     "return list(dict.fromkeys([*private, *addresses]))[:3]",
     "return list(dict.fromkeys([*private, *addresses]))[:1]",
     "test_a_clients_url_is_tried_at_every_address_and_never_a_file"),
    ("a fetched URL's answer is decompressed",
     "            handle.as_it_comes()\n", "",
     "test_what_a_clients_url_leads_to_has_its_limits"),
    ("a compressed answer of a fetched URL is taken as it is",
     'if call.headers.get("content-encoding", "identity") != "identity":', "if False:",
     "test_what_a_clients_url_leads_to_has_its_limits"),
    ("a fetched URL may be of any size",
     "if body.size > most:\n                raise ValueError", "if False:\n                raise ValueError",
     "test_private_urls_can_be_allowed"),
    ("a dripping URL is fetched for ever",
     'if time.monotonic() > end:\n                raise ValueError(f"it takes longer',
     'if False:\n                raise ValueError(f"it takes longer',
     "test_what_a_clients_url_leads_to_has_its_limits"),
    ("a renewal does not store the access token",
     '("access_token", "expires", "email",', '("expires", "email",',
     "a_renewal_changes_all_that_a_token_says"),
    ("a renewal does not store when the token expires",
     '("access_token", "expires", "email",', '("access_token", "email",',
     "a_renewal_changes_all_that_a_token_says"),
    ("a renewal does not store the e-mail",
     '"expires", "email", "plan"', '"expires", "plan"',
     "a_renewal_changes_all_that_a_token_says"),
    ("a renewal does not store the plan",
     '"email", "plan", "workspace", "state"', '"email", "workspace", "state"',
     "a_renewal_changes_all_that_a_token_says"),
    ("a renewal does not store the workspace",
     '"plan", "workspace", "state", "reason")', '"plan", "state", "reason")',
     "a_renewal_changes_all_that_a_token_says"),
    ("a renewal does not store that the account is ready",
     '"workspace", "state", "reason")', '"workspace", "reason")',
     "an_expired_account_is_ready_again"),
    ("a renewal does not forget the old reason",
     '"workspace", "state", "reason")', '"workspace", "state")',
     "an_expired_account_is_ready_again"),
    ("a token may last for ever",
     "if not 0 <= expires <= LAST_MOMENT:", "if math.isnan(expires):",
     "test_odd_rows_of_the_store_are_survived"),
    ("a token's workspace is not checked",
     'if workspace and not _WORKSPACE.fullmatch(workspace):\n        raise ValueError("not an access',
     'if False:\n        raise ValueError("not an access',
     "test_no_workspace_is_a_header_of_its_own"),
    ("an import forgets the workspace",
     "f\"{token},{said.get('account_id') or ''}\"", "token",
     "an_exported_account_is_imported_as_it_was"),
    ("anything after a comma is a workspace",
     'if workspace and not _WORKSPACE.fullmatch(workspace):\n        raise ValueError("what follows',
     'if False:\n        raise ValueError("what follows',
     "test_no_workspace_is_a_header_of_its_own"),
    ("a workspace need only begin well",
     'not _WORKSPACE.fullmatch(workspace):\n        raise ValueError("what follows',
     'not _WORKSPACE.match(workspace):\n        raise ValueError("what follows',
     "test_no_workspace_is_a_header_of_its_own"),
    ("two workspaces of a person are one account",
     '{row.kind} {owner} {row.workspace}"', '{row.kind} {owner}"',
     "an_account_keeps_its_identity_with_a_newer_token"),
    ("what accounts add understands is a key",
     "if row.kind == LOGIN_FREE or (key.lstrip()[:1] == \"{\" and '\"accessToken\"' not in key):", "if False:",
     "test_every_attack_has_its_answer and strange"),
    ("an import forgets the device", '{"device": device} if', "{} if", "an_exported_account_is_imported_as_it_was"),
    ("an import takes any device",
     're.fullmatch(r"[0-9a-f-]{36}", str(device))', "isinstance(device, str)",
     "an_exported_account_is_imported_as_it_was"),
    ("an import forgets the browser",
     'found["browser"] = browser', "pass",
     "an_exported_account_is_imported_as_it_was"),
    ("an import takes any cookies",
     'and not re.search(r"[^\\x21-\\x7e]", told):', "and told:",
     "an_exported_account_is_imported_as_it_was"),
    ("an import forgets the cookies",
     'found["cookies"] = json.dumps(', "json.dumps(",
     "an_exported_account_is_imported_as_it_was"),
    ("an import enables what was disabled",
     'said.get("disabled") is True', "False",
     "an_exported_account_is_imported_as_it_was"),
    ("an import disables on any word",
     'said.get("disabled") is True', 'said.get("disabled")',
     "an_exported_account_is_imported_as_it_was"),
    ("a guest is known by ten digits",
     'hexdigest()}"\n\n\ndef _same', 'hexdigest()[:2]}"\n\n\ndef _same',
     "test_a_guest_is_known_by_the_whole_digest"),
    ("cookies that are no JSON are a traceback",
     "kept = Answer(200, {}, row.cookies.encode()).object()", "kept = json.loads(row.cookies)",
     "test_odd_rows_of_the_store_are_survived"),
    ("all tokens are renewed at the same distance",
     "+ stable_number(row.id) % int(RENEWAL_SPREAD)", "",
     "a_token_is_renewed_before_it_expires"),
    ("an unproved token's e-mail is logged",
     "if self.row.guest and not self.accepted:", "if False:",
     "test_what_a_token_says_of_its_owner_is_not_logged"),
    ("a token without expiry is none",
     "current = not row.expires or row.expires", "current = row.expires",
     "an_account_whose_token_cannot_be_renewed_comes_last"),
    ("a token is used up to its last second",
     "row.expires - TOKEN_LEEWAY > now", "row.expires > now",
     "an_account_whose_token_cannot_be_renewed_comes_last"),
    ("yesterday's counts are today's",
     "subject: tally if since == begun else Tally(used=tally.used)", "subject: tally",
     "a_new_day_begins_with_nothing_counted"),
    ("counting without the lock",
     "        with self._tallies_lock:\n            self._count(subject, Tally(",
     "        if True:\n            self._count(subject, Tally(",
     "counts_made_at_once_all_count"),
    ("what is counted has no lock",
     "with self._tallies_lock:\n            self._count(", "if True:\n            self._count(",
     "test_nothing_is_lost_when_threads_count_at_once"),
    ("API users are counted among the accounts' hours",
     "if more.answers or more.failures:", "if True:",
     "counts_add_up_and_a_limit_of_none_is_none"),
    ("admitting without the lock",
     "        with self._tallies_lock:\n            now = time.time()\n            self._begun(now)",
     "        if True:\n            now = time.time()\n            self._begun(now)",
     "counts_made_at_once_all_count"),
    ("a user's limit has no lock",
     "with self._tallies_lock:\n            now = time.time()\n            self._begun(now)",
     "if True:\n            now = time.time()\n            self._begun(now)",
     "test_nothing_is_lost_when_threads_count_at_once"),
    ("a limit of 0 is no limit",
     "if limit is not None and self.today(user)", "if limit and self.today(user)",
     "counts_add_up_and_a_limit_of_none_is_none"),
    ("saving counts without the lock",
     "        with self._tallies_lock:\n            unsaved, self._unsaved",
     "        if True:\n            unsaved, self._unsaved",
     "counts_made_at_once_all_count"),
    ("what cannot be stored is forgotten",
     "self._unsaved[key] = self._unsaved.get(key, Tally()).plus(tally)", "pass",
     "what_cannot_be_stored_is_counted_later"),
    ("an account's proxy is not stored",
     'self.store.update_accounts("proxy", moved)', "pass",
     "an_account_keeps_its_proxy"),
    ("an account's proxy changes at each start",
     'proxy = row.proxy if row.proxy in proxies else ""', 'proxy = ""',
     "an_account_keeps_its_proxy"),
    ("accounts crowd on one proxy",
     "min(proxies, key=lambda one: load[one])", "proxies[0]",
     "an_account_keeps_its_proxy"),
    ("an account changes its browser with IMPERSONATE",
     "Egress(row.browser if known else self.settings.impersonate, proxy)", "Egress(self.settings.impersonate, proxy)",
     "an_account_keeps_its_identity_with_a_newer_token"),
    ("disabled accounts take their turn",
     'in self._accounts.values() if one.row.state == "ready"]', "in self._accounts.values()]",
     "a_disabled_account_is_as_good_as_none"),
    ("a login-free account that is imported again is another one",
     "tokens |= {row.device: row", "str() or {row.device: row",
     "an_exported_account_is_imported_as_it_was"),
    ("a newer token makes another device",
     'names = ("id", "device", "browser",', 'names = ("id", "browser",',
     "an_account_keeps_its_identity_with_a_newer_token"),
    ("a newer token loses the proxy",
     '"browser", "proxy", "added")', '"browser", "added")',
     "an_account_keeps_its_identity_with_a_newer_token"),
    ("a newer token loses the cookies",
     "json.dumps(_cookies_of(old) | _cookies_of(row))", "json.dumps(_cookies_of(row))",
     "an_account_keeps_its_identity_with_a_newer_token"),
    ("an account opens by its id",
     "if own and _same(own.row.access_token if row.kind == ACCESS else own.row.secret, row.secret):", "if own:",
     "test_a_callers_token_opens_what_it_proves"),
    ("a pool's token is exchanged for another workspace",
     "if row.workspace not in (\n", "if None in (\n",
     "test_a_token_of_the_pool_is_not_exchanged_for_another"),
    ("a new guest is as many as its requests",
     "account = self._arriving.setdefault(id, account)", "self._arriving[id] = account",
     "test_requests_that_come_at_once_with_a_new_token"),
    ("an API user goes on with anybody's conversation",
     'if not scope.covers(held.owner if held else ""):', "if False:",
     "test_api_users_keep_to_what_they_have_begun"),
    ("a list hides who began a conversation",
     "Held(one.account, known.owner) if known and known.owner else one", "one",
     "test_who_began_a_conversation_on_a_full_disk_keeps_it"),
    ("a full disk loses conversations",
     "self._unsaved_held = dict(list(begun.items())[-MAX_UNSAVED:])", "self._unsaved_held = {}",
     "test_who_began_a_conversation_on_a_full_disk_keeps_it"),
    ("RANDOM_TOKEN is ignored",
     "if self.settings.random_token and size:", "if False:",
     "accounts_answer_in_turn_or_at_random"),
    ("RANDOM_TOKEN=false is ignored",
     "if self.settings.random_token and size:", "if size:",
     "accounts_answer_in_turn_or_at_random"),
    ("chance does not reach every account",
     "while math.gcd(stride, size) > 1:", "while False:",
     "chance_finds_the_one_account"),
    ("an account whose renewal just failed is asked all the same",
     "able = account.token_valid(now) or account.retry_renewal[0] <= now", "able = True",
     "an_account_whose_token_cannot_be_renewed_comes_last"),
    ("the turn does not move on",
     "self._cursor = (first + step + 1) % size", "pass",
     "accounts_answer_in_turn_or_at_random"),
    ("a disabled account's owner is still served",
     'able = account.row.state == "ready" and (', "able = (",
     "accounts_are_disabled_enabled_removed"),
    ("waits are ignored",
     "return able and not (self.settings.enable_limit and account.wait_for(model, now))", "return able",
     "an_account_told_to_wait_is_skipped"),
    ("ENABLE_LIMIT=false is ignored",
     "able and not (self.settings.enable_limit and account", "able and not (account",
     "an_account_told_to_wait_is_skipped"),
    ("the longest wait is told",
     "return self._limited(min(waits))", "return self._limited(max(waits))",
     "the_shortest_wait_is_told"),
    ("told to wait without the lock",
     "        with self._changes_lock:\n            now = time.time()\n            old = account.waits.get(", "        if True:\n            now = time.time()\n            old = account.waits.get(",
     "waits_told_at_once_are_all_kept"),
    ("strikes are not counted",
     "if old.until > now else old.strikes + 1", "if old.until > now else 1",
     "a_wait_that_names_no_time_grows"),
    ("a wait has no upper limit",
     "min(strikes - 1, 10), LONGEST_WAIT)", "min(strikes - 1, 10), 1e9)",
     "an_answer_does_not_end_the_wait"),
    ("a shorter wait replaces a longer one",
     "wait = Wait(max(now + pause, old.until), strikes)", "wait = Wait(now + pause, strikes)",
     "an_answer_does_not_end_the_wait"),
    ("waits are not stored",
     "self.store.put_wait(account.id, model, wait.until, wait.strikes)", "pass",
     "an_account_told_to_wait_is_skipped"),
    ("an answer ends a wait that is not over",
     "and wait.until <= account.used:", "and wait:",
     "an_answer_does_not_end_the_wait"),
    ("strikes are not forgotten after an answer",
     "self.store.remove_wait(account.id, model)", "pass",
     "a_wait_that_names_no_time_grows"),
    ("a dead account's guest row is kept",
     "self.store.remove_accounts([account.id])", "pass",
     "a_guest_whose_token_died_leaves_nothing"),
    ("a rotated secret is not stored",
     "self._change(account, secret=secret)", "pass",
     "a_rotated_token_is_stored_before"),
    ("failures that are not in a row move an account",
     "account.unreached = 0 if connected else account.unreached", "pass",
     "only_failures_in_a_row_move_an_account"),
    ("an account never leaves a dead proxy",
     "account.unreached < PROXY_PATIENCE or", "True or",
     "only_failures_in_a_row_move_an_account"),
    ("one failure moves an account to another proxy",
     "account.unreached < PROXY_PATIENCE or", "account.unreached < 1 or",
     "only_failures_in_a_row_move_an_account"),
    ("two exchanges of one account at once",
     "if account.renewal is None or account.renewal.done():", "if True:",
     "a_token_is_renewed_before_it_expires"),
    ("a token of the upstream's may hold a line feed",
     'if not isinstance(value, str) or not re.fullmatch(r"[\\x21-\\x7e]{1,16384}", value):',
     "if not isinstance(value, str):",
     "test_odd_requirements_are_the_upstreams_fault"),
    ("a token of the upstream's may be anything",
     'if not isinstance(value, str) or not re.fullmatch(r"[\\x21-\\x7e]{1,16384}", value):', "if False:",
     "test_odd_requirements_are_the_upstreams_fault"),
    ("requirements need not be objects",
     '    """An object within an answer, {} where there is none."""\n    value = said.get(name)\n    return value if isinstance(value, dict) else {}', '    """An object within an answer, {} where there is none."""\n    value = said.get(name)\n    return value or {}',
     "test_odd_requirements_are_the_upstreams_fault"),
    ("an empty conversation_id is passed on",
     'if v not in (None, "") or k not in fillable', "if v is not None or k not in fillable",
     "test_what_a_native_turn_leaves_out_is_filled_in"),
    ("a native message has the user's role whatever it says",
     'author.get("role") or "user"}', '"user"}',
     "test_what_a_native_turn_leaves_out_is_filled_in"),
    ("a refusal's places need not be a list",
     'one["loc"] if isinstance(one.get("loc"), list) else []', 'one.get("loc", [])',
     "test_no_refusal_of_any_shape_is_our_fault"),
    ("a validator repeats what it was sent",
     '{one.get(\'msg\')}" for place', '{one.get(\'msg\')} {one.get(\'input\')}" for place',
     "a_refusal_means_what_the_upstream_meant"),
    ("the upstream's words are repeated without end",
     "said[:300]", "said",
     "a_refusal_means_what_the_upstream_meant"),
    ("a gateway's 401 expires the account",
     "status == 401 and not page", "status == 401",
     "a_refusal_means_what_the_upstream_meant"),
    ("a block is a broken upstream",
     "status == 403 or (page", "status == 599 or (page",
     "a_refusal_means_what_the_upstream_meant"),
    ("words of a 503 that is no page are a block",
     "(page and _BLOCK_MARKS.search(text))", "_BLOCK_MARKS.search(text)",
     "a_refusal_means_what_the_upstream_meant"),
    ("an answer that is neither good nor bad is an error of the client",
     "status >= 500 or status < 400 or page", "status >= 500 or page",
     "a_refusal_means_what_the_upstream_meant"),
    ("a forgotten file's code is not read",
     '"file" in code or', "False or",
     "a_refusal_means_what_the_upstream_meant"),
    ("a file that is forgotten is a missing call",
     'or (status == 404 and said.lower().startswith(": file"))', "",
     "a_refusal_means_what_the_upstream_meant"),
    ("a conversation that there is not is a missing call",
     'if "conversation" in code or "conversation" in said.lower():', "if False:",
     "a_refusal_means_what_the_upstream_meant"),
    ("a model that there is not is a missing call",
     'if "model" in code:', "if False:",
     "a_refusal_means_what_the_upstream_meant"),
    ("a prompt that is too long is no 413",
     "if status == 413:", "if False:",
     "a_refusal_means_what_the_upstream_meant"),
    ("Retry-After is not read",
     'for value in (said, headers.get("retry-after")):', "for value in (said,):",
     "a_pause_is_what_the_upstream_says"),
    ("Retry-After wins over what the body says",
     'for value in (said, headers.get("retry-after")):', 'for value in (headers.get("retry-after"), said):',
     "a_pause_is_what_the_upstream_says"),
    ("a wait may be larger than any number",
     "with contextlib.suppress(TypeError, ValueError, OverflowError):\n            if math.isfinite(seconds", "with contextlib.suppress(TypeError, ValueError):\n            if math.isfinite(seconds",
     "test_no_wait_of_any_shape_is_our_fault"),
    ("a wait may be infinite",
     'if math.isfinite(seconds := float(value or "")) and', 'if (seconds := float(value or "")) and',
     "a_pause_is_what_the_upstream_says"),
    ("a wait may be over before it begins", "and seconds >= 0:", "and True:", "a_pause_is_what_the_upstream_says"),
    ("a wait may be years",
     "return min(seconds, 30 * 86400.0)", "return seconds",
     "a_pause_is_what_the_upstream_says"),
    ("the account's jar is changed under its readers",
     "kept = dict(cookies)", "kept = cookies",
     "cookies_are_kept_and_ended"),
    ("a cookie has any size",
     "fits = equals and key and len(key) + len(value) <= MAX_COOKIE", "fits = equals and key",
     "test_an_upstream_can_set_only_so_many_cookies"),
    ("a cookie brings a space or a control character",
     're.fullmatch(r"[\\x21-\\x7e]*", key + value)', "True",
     "cookies_are_kept_and_ended"),
    ("an upstream sets any number of cookies",
     "(key in kept or len(kept) < MAX_COOKIES)", "True",
     "test_an_upstream_can_set_only_so_many_cookies"),
    ("a cookie with Max-Age=0 is kept",
     "ended = not value or re.search(", "ended = not value and re.search(",
     "cookies_are_kept_and_ended"),
    ("a cookie that was ended is sent empty",
     "for key, value in kept.items() if value}", "for key, value in kept.items()}",
     "cookies_are_kept_and_ended"),
    ("strangers' connections are kept",
     "kept = not guest or self.pool.find(account.id) is account", "kept = True",
     "test_junk_tokens_leave_nothing_and_reach_nothing"),
    ("accounts share connections",
     "        call = handles.call(\n            account.id,", '        call = handles.call(\n            "",',
     "test_no_two_accounts_share_a_connection"),
    ("a file store's cookies are taken for the site's",
     'own = url.startswith(f"{account.gateway}/") and not plain', "own = True",
     "a_file_store_gets_no_more_than_the_file"),
    ("the start page is read at every turn",
     "if known and now - known.read < PAGE_LIFE:", "if False:",
     "the_start_page_is_read_once"),
    ("a start page holds everybody up",
     "r'<script[^<>]{0,1000}?", "r'<script[^>]*?",
     "test_a_start_page_of_any_shape_holds_nobody_up"),
    ("a script's address has any length",
     "([\\x21-\\x7e]{1,500}?)", '([^"]+)',
     "test_a_start_page_of_any_shape_holds_nobody_up"),
    ("the newer generation's token is not taken",
     "return replace(ready, token=", "return ready or replace(ready, token=",
     "both_generations_and_both_proofs"),
    ("a proof is made where none is wanted",
     'if proof.get("required"):', "if True:",
     "what_the_upstream_wants_beforehand"),
    ("an Arkose token that is wanted is not sent",
     'if arkose.get("required"):', "if False:",
     "an_arkose_token_comes_from"),
    ("a difficulty that is none is worked at",
     're.fullmatch(r"[0-9a-fA-F]{1,32}", difficulty)', "difficulty",
     "what_the_upstream_wants_beforehand"),
    ("a proof's seed may be anything",
     " or not _SEED.fullmatch(seed)", "",
     "test_odd_requirements_are_the_upstreams_fault"),
    ("any difficulty is worked at",
     "if harder(difficulty, limit := self.settings.pow_difficulty):", "if harder(difficulty, limit := '0' * 32):",
     "a_proof_harder_than_allowed"),
    ("messages are sent twice in the newer generation",
     'bare = {name: value for name, value in body.items() if name != "messages"}', "bare = dict(body)",
     "both_generations_and_both_proofs"),
    ("the newer generation is not remembered for turns",
     "self._learn(account, call, second is older)", "pass",
     "generation_that_is_gone"),
    ("an upload goes wherever its id leads",
     "if not _FILE_ID.fullmatch(id) or", "if",
     "an_upload_that_cannot_be_is_refused"),
    ("an upload that the store refused counts as made",
     'raise Refusal("broken", f"The upstream\'s file store answered with status {answer.status}.")', "pass",
     "an_upload_that_cannot_be_is_refused"),
    ("the upstream is not told that a file is there",
     'confirm = functools.partial(self._either, account, "uploaded", uploaded, processed)\n        read = self._insistently(confirm, watch)', "read = False",
     "pictures_and_documents_reach_the_upstream"),
    ("a document is used before it was read",
     'if case == "my_files" and not read:', "if False:",
     "pictures_and_documents_reach_the_upstream"),
    ("a document that cannot be read is waited for",
     'if status in ("failed", "error"):', 'if status == "error":',
     "an_upload_that_cannot_be_is_refused"),
    ("an upstream names a private place for a file",
     "if not all(map(is_public, filter(None, addresses))):\n            raise Refusal",
     "if False:\n            raise Refusal",
     "test_an_upstream_that_is_public_names_no_private_place"),
    ("a host that begins like the site's is the site",
     'own = url.startswith(account.gateway + "/")', "own = url.startswith(account.gateway)",
     "test_an_account_is_told_to_its_own_site_alone"),
    ("a download URL gets the account's token whoever it is",
     'own = url.startswith(account.gateway + "/")', "own = True",
     "a_file_store_gets_no_more_than_the_file"),
    ("the site's own files are asked for as nobody",
     'own = url.startswith(account.gateway + "/")', "own = False",
     "a_file_store_gets_no_more_than_the_file"),
    ("an account's headers are sent to any download host",
     "self._headers(account, path) if own else", "self._headers(account, path) if True else",
     "test_an_account_is_told_to_its_own_site_alone"),
    ("a change is sent twice", "once=not reads", "once=False", "test_a_change_is_never_sent_twice"),
    ("a change that failed is tried on another account",
     "if reads or refused.unsent:", "if True:",
     "test_a_change_is_never_sent_twice"),
    ("models are asked for at every listing",
     "if time.time() - read < MODELS_LIFE:", "if False:",
     "models_are_those_of_the_accounts"),
    ("a spare is used past its expiry",
     "needs is not None and needs.expires > time.monotonic() + 1", "needs is not None",
     "what_was_prepared_is_not_used_past_its_time"),
    ("an expired spare is not swept",
     "needs.expires <= now + 5", "needs.expires <= now - 5",
     "what_was_prepared_is_not_used_past_its_time"),
    ("made-up tokens take the pool's renewals",
     "self._guest_renewals if account.row.guest else self._renewals", "self._renewals",
     "test_made_up_refresh_tokens_keep_no_account"),
    ("a token is renewed only once it has expired",
     "row.expires - account.renewed_ahead <= now", "row.expires <= now",
     "a_token_is_renewed_before_it_expires"),
    ("an access token that has expired is not set aside",
     "elif row.kind == ACCESS and row.expires <= now:", "elif False:",
     "an_access_token_that_expires_is_set_aside"),
    ("a failed exchange is tried again at once",
     "if time.time() < not_before:", "if False:",
     "an_exchange_that_fails_is_tried_again"),
    ("two processes exchange one token at once",
     "with self.pool.store.exclusively(account.id, EXCHANGE_PATIENCE):", "with contextlib.nullcontext():",
     "two_processes_exchange_a_token_once"),
    ("a token that another process exchanged is exchanged again",
     "if not self.pool.renewed_elsewhere(account) and not self._good(account, refused):", "if True:",
     "a_token_that_another_process_exchanged"),
    ("a token that could not be stored is exchanged again",
     "if account.unstored is None:", "if True:",
     "test_no_token_is_exchanged_while_there_is_no_room"),
    ("tokens are exchanged without room to keep them",
     "self.pool.store.try_room()\n                ask", "ask",
     "test_no_token_is_exchanged_while_there_is_no_room"),
    ("the pause between failed exchanges does not double",
     "pause = min(2.0 ** min(failures, 10), 600)", "pause = 1.0",
     "an_exchange_that_fails_is_tried_again"),
    ("the pause between failed exchanges grows without end",
     "pause = min(2.0 ** min(failures, 10), 600)", "pause = 2.0**failures",
     "an_exchange_that_fails_is_tried_again"),
    ("a refresh token is offered to one client only",
     '[{"client_id": BROWSER_CLIENT}, ios] if', '[{"client_id": BROWSER_CLIENT}] if',
     "a_refresh_token_is_offered_to_the_client"),
    ("an older refresh token goes to the newer client",
     'if secret.startswith("rt_") else [ios]:', "if True else [ios]:",
     "a_refresh_token_is_offered_to_the_client"),
    ("a token endpoint that fails once has said no",
     "elif not dead or answer.status >= 500:", "elif not dead:",
     "a_refresh_token_is_offered_to_the_client"),
    ("a challenge is the verifier itself",
     'return base64.urlsafe_b64encode(hashlib.sha256(verifier.encode()).digest()).rstrip(b"=").decode()',
     "return verifier",
     "test_a_sign_in_is_proved_by_whom_it_was_begun"),
    ("every sign-in has the same verifier",
     "self.verifier = secrets.token_urlsafe(48)", 'self.verifier = "v" * 48',
     "test_a_sign_in_is_proved_by_whom_it_was_begun"),
    ("every sign-in has the same state",
     "self.state = secrets.token_urlsafe(24)", 'self.state = "s" * 32',
     "test_a_sign_in_is_proved_by_whom_it_was_begun"),
    ("a browser's challenge is not made from the verifier",
     'challenge(self.verifier),\n            "code_challenge_method": "S256",\n            "id_token',
     'challenge(self.state),\n            "code_challenge_method": "S256",\n            "id_token',
     "test_a_sign_in_is_proved_by_whom_it_was_begun"),
    ("a browser's sign-in has a plain challenge",
     '"code_challenge_method": "S256",\n            "id_token',
     '"code_challenge_method": "plain",\n            "id_token',
     "test_a_sign_in_is_proved_by_whom_it_was_begun"),
    ("a sign-in is redirected without end", "STEPS = 12", "STEPS = 10**6", "test_a_sign_in_is_led_on_only_so_often"),
    ("a sign-in's connections stay open",
     "        finally:\n            self.handles.close()", "        finally:\n            pass",
     "test_signing_in_takes_a_key_of_the_server_and_leaves_nothing_open"),
    ("a password's sign-in has a plain challenge",
     '"code_challenge_method": "S256",\n            "prompt": "login",\n        }\n        place',
     '"code_challenge_method": "plain",\n            "prompt": "login",\n        }\n        place',
     "test_a_sign_in_is_proved_by_whom_it_was_begun"),
    ("a one-time code that is missing is sent empty",
     "if not code:\n                text", "if False:\n                text",
     "test_a_sign_in_that_fails_says_why"),
    ("a wrong password is a failure of ours",
     "answer.status in (400, 401, 403) and not walled(answer)", "answer.status in (401, 403) and not walled(answer)",
     "test_a_sign_in_that_fails_says_why"),
    ("a password's sign-in is followed to another host that begins like the issuer's",
     'if not url.startswith(f"{self.issuer}/"):', "if not url.startswith(self.issuer):",
     "test_an_account_is_told_to_its_own_site_alone"),
    ("the scheduled refresh is at four in the morning",
     "day.tm_mday + 4, 3, 0", "day.tm_mday + 4, 4, 0",
     "the_next_refresh_is_at_three"),
    ("the scheduled refresh is every day",
     "day.tm_mday + 4, 3, 0", "day.tm_mday + 1, 3, 0",
     "the_next_refresh_is_at_three"),
    ("requirements may last for any number of seconds",
     "known = isinstance(after, (int, float)) and 0 < after <= 86400",
     "known = isinstance(after, (int, float)) and after > 0",
     "test_odd_requirements_are_the_upstreams_fault"),
    ("an event has no end",
     "if size > MAX_EVENT:", "if False:",
     "test_what_an_upstream_sends_has_an_end"),
    ("a line end cut in two counts twice",
     'rest = data[1:] if self._cr and data[:1] == b"\\n" else data', "rest = data",
     "test_lines_of_one_event_stay_together_however_they_are_cut"),
    ("the lines of one event run together",
     'return "\\n".join(lines) if lines', 'return "".join(lines) if lines',
     "test_lines_of_one_event_stay_together_however_they_are_cut"),
    ("private-use characters beyond the first plane leak",
     '\\uf8ff\\U000f0000-\\U0010ffff"', '\\uf8ff"',
     "test_reasoning_and_output_have_no_marks_either"),
    ("a mark without end is waited for to the end",
     "or (end < 0 and len(text) - start > MAX_MARK):", ":",
     "test_what_may_be_a_mark_does_not_hold_an_answer_back_for_long"),
    ("a source without end is waited for to the end",
     "if link is None and not last and len(text) - start <= MAX_HELD_BACK:", "if link is None and not last:",
     "test_what_may_be_a_mark_does_not_hold_an_answer_back_for_long"),
    ("a sandbox link without end is waited for to the end",
     "if not last and len(text) - start <= MAX_MARK and not", "if not last and not",
     "test_what_may_be_a_mark_does_not_hold_an_answer_back_for_long"),
    ("a citation's own words keep their marks",
     're.sub(f"[{_PRIVATE}]", "", alt)', "alt",
     "test_citations_become_links_and_private_characters_vanish"),
    ("a parenthesis in a source's URL ends its link",
     'r"[\\s()<>]"', 'r"[\\s<>]"',
     "test_citations_become_links_and_private_characters_vanish"),
    ("a bracket in a source's title ends it",
     'r"([\\[\\]\\\\])"', 'r"([\\\\])"',
     "test_citations_become_links_and_private_characters_vanish"),
    ("a source's title keeps its marks",
     'r"\\\\\\1", unmarked(title))', 'r"\\\\\\1", title)',
     "test_a_title_with_marks_is_a_title_without"),
    ("messages hidden from the conversation are shown",
     '"is_visually_hidden_from_conversation")', '"is_hidden")',
     "test_only_what_is_meant_for_the_reader_is_the_answer"),
    ("what a tool quotes is shown as its output",
     'if kind == "execution_output" else Drawing', 'if kind in ("execution_output", "tether_quote") else Drawing',
     "test_nothing_that_was_said_to_or_by_a_tool_is_the_answer"),
    ("the user's own message is shown as the answer",
     'if role != "assistant":', 'if role not in ("assistant", "user"):',
     "test_only_what_is_meant_for_the_reader_is_the_answer"),
    ("thoughts are part of the answer",
     'if kind in ("thoughts", "reasoning_recap"):\n            return Reasoning',
     'if kind in ("thoughts", "reasoning_recap"):\n            return Text',
     "test_a_streamed_response_has_its_events_in_order"),
    ("text to a tool is shown as the answer",
     'if kind not in ("text", "multimodal_text") or recipient != "all":',
     'if kind not in ("text", "multimodal_text"):',
     "test_nothing_that_was_said_to_or_by_a_tool_is_the_answer"),
    ("the commentary channel is shown as the answer",
     'message.get("channel") in (None, "final")', "True",
     "test_only_what_is_meant_for_the_reader_is_the_answer"),
    ("code is shown before it is whole",
     'if kind is not None and (over or self.raw.get("status") == "finished_successfully"):', "if kind is not None:",
     "test_what_a_tool_is_given_is_shown_once_it_is_whole"),
    ("a language of the model's ends the line of its fence",
     'ToolUse(named if named.isalnum() else "", ', "ToolUse(named, ",
     "test_what_a_tool_is_given_is_shown_once_it_is_whole"),
    ("what a tool puts out keeps its marks",
     'named.isalnum() else "", unmarked(text))', 'named.isalnum() else "", text)',
     "test_reasoning_and_output_have_no_marks_either"),
    ("a drawing is shown once for every event",
     "if pointer not in self.shown and pointer not in", "if pointer not in",
     "test_code_its_output_and_drawings_are_shown"),
    ("a thought is said again when it grows",
     "self.thoughts[i, name] = len(text)", "self.thoughts[i, name] = 0",
     "test_a_thought_that_grows_behind_another_is_not_repeated"),
    ("an answer cut for length looks whole",
     'if details == "max_tokens":', 'if details == "max_token":',
     "test_an_answer_cut_by_length_is_continued"),
    ("an interrupted answer has no end",
     'details in ("stop", "interrupted")', 'details in ("stop",)',
     "test_only_the_end_of_the_answer_itself_ends_it"),
    ("a stop that goes on is the end",
     " and end_turn is not False", "",
     "test_only_the_end_of_the_answer_itself_ends_it"),
    ("a turn's end counts before the message is finished",
     '(end_turn and self.raw.get("status") == "finished_successfully")', "end_turn",
     "test_only_the_end_of_the_answer_itself_ends_it"),
    ("the upstream's [DONE] is no end",
     'self.done = self.done or text == "[DONE]"', "pass",
     "test_an_upstream_that_lingers_after_the_end_is_not_waited_for"),
    ("an answer that broke off passes as whole",
     "if not self._reason and not self.done:", "if False:",
     "test_an_answer_cut_in_the_middle_ends_in_an_error_event"),
    ("moderation is ignored",
     '_at(value, ("moderation_response", "blocked"))', '_at(value, ("blocked",))',
     "test_moderation_ends_an_answer_as_content_filter"),
    ("moderation that blocks nothing ends an answer",
     '_at(value, ("moderation_response", "blocked"))', "True",
     "test_only_the_end_of_the_answer_itself_ends_it"),
    ("an error that is streamed is the end of an answer",
     'if failed or value.get("error") or', 'if failed or value.get("errors") or',
     "test_an_error_that_is_streamed_is_no_end_of_an_answer"),
    ("an error event is ignored in the decoder",
     "raise broken_off(value)", "broken_off(value)",
     "an_error_is_told_although"),
    ("a new message undoes moderation",
     ' and self._reason != "content_filter":', ":",
     "test_only_the_end_of_the_answer_itself_ends_it"),
    ("the end of an earlier message is the answer's",
     'self._reason = ""  # an earlier', "pass  # an earlier",
     "test_only_the_end_of_the_answer_itself_ends_it"),
    ("operations of a patch with whole paths are lost",
     'whole = inner if inner.startswith("/message") else path + inner', "whole = path + inner",
     "test_the_paths_of_a_patch_go_on_from_its_own_or_are_whole"),
    ("operations of a patch with relative paths are lost",
     'whole = inner if inner.startswith("/message") else path + inner', "whole = inner",
     "test_the_paths_of_a_patch_go_on_from_its_own_or_are_whole"),
    ("an answer's model is the one asked for",
     'for name in ("model_slug", "resolved_model_slug"):', 'for name in ("model",):',
     "test_an_answer_names_the_model_that_gave_it"),
    ("the end of a message overrules moderation",
     '            if self._reason != "content_filter":', "            if True:",
     "test_moderation_ends_an_answer_as_content_filter"),
    ("escapes in a path are not undone",
     'text.replace("~1", "/").replace("~0", "~")', "text",
     "test_an_operation_changes_what_its_path_names"),
    ("remove is ignored in a list", "del target[last]", "pass", "test_an_operation_changes_what_its_path_names"),
    ("an append to a list replaces it",
     "value = [*old, *value] if isinstance(value, list)", "value = [*value] if isinstance(value, list)",
     "test_a_thought_that_grows_behind_another_is_not_repeated"),
    ("what is appended to an object replaces it",
     "value = old | value", "value = dict(value)",
     "test_nothing_that_was_said_to_or_by_a_tool_is_the_answer"),
    ("truncate is ignored in the decoder", 'op == "truncate"', 'op == "cut"', "truncated_text_is_cut"),
    ("truncate is ignored", "value = old[:value]", "value = old", "test_an_operation_changes_what_its_path_names"),
    ("what is added to a list replaces a part",
     "target.insert(last, value)\n        return", "target[last:last + 1] = [value]\n        return",
     "test_an_operation_changes_what_its_path_names"),
    ("the number of files of a request is not limited",
     "MAX_ATTACHMENTS = 100", "MAX_ATTACHMENTS = 1000",
     "test_a_request_may_not_bring_files_without_end"),
    ("an API user reads anybody's file",
     "if found and scope.covers(found[0].owner):", "if found:",
     "test_nobody_sees_anothers_files_and_responses"),
    ("a document kept here is sent as an image",
     "attachment.where)\n            if attachment.image and not file.width:",
     "attachment.where)\n            if False:",
     "test_files_are_kept_upstream_and_answered_by_who_holds_them"),
    ("a picture that is none reaches the upstream",
     "        if attachment.image and not file.width:\n            raise unfit(attachment.where, NO_IMAGE)\n        return file, blob",
     "        return file, blob",
     "test_a_picture_that_is_none_is_refused"),
    ("a file's name keeps slashes and line ends",
     'r"[\\x00-\\x1f\\x7f/\\\\]"', 'r"[\\x00]"',
     "test_a_files_name_and_type_are_made_harmless"),
    ("a file's name has no end", '"_", name)[-200:]', '"_", name)', "test_a_files_name_and_type_are_made_harmless"),
    ("parameters of a file's type are kept",
     'mime = mime.partition(";")[0].strip().lower()', "mime = mime.strip().lower()",
     "test_a_files_name_and_type_are_made_harmless"),
    ("a file's type may carry another header",
     " or not _MIME.fullmatch(mime)", "",
     "test_a_files_name_and_type_are_made_harmless"),
    ("an image's type is what the client says",
     "= facts or (guessed if vague else mime, 0, 0)",
     "= facts or (guessed if vague else mime, 0, 0); kind = kind if vague else mime",
     "test_pictures_and_documents_reach_the_upstream"),
    ("bytes that are no text are called text",
     'if head.isascii() and b"\\0" not in head else', "if True else",
     "test_a_files_name_and_type_are_made_harmless"),
    ("a file is known by its content whoever holds it",
     'for one in self.store.files("digest=? AND account=?", file.digest, account.id):',
     'for one in self.store.files("digest=?", file.digest):',
     "test_files_of_two_accounts_come_together"),
    ("a file counts as known however it is used",
     "if use_case(one) == use_case(file):", "if True:",
     "test_the_same_bytes_are_different_files_where_they_are_used_differently"),
    ("a file has the name that another gave to its bytes",
     "return one._replace(name=file.name, mime=file.mime)", "return one",
     "test_the_same_bytes_are_different_files_where_they_are_used_differently"),
    ("the same bytes are uploaded side by side",
     "other = self._uploads.setdefault(key, mine)", "other = mine",
     "test_the_same_bytes_at_the_same_time_are_uploaded_once"),
    ("a limit for uploads is one for the model",
     "refused.about = UPLOADS", "pass",
     "test_a_limit_for_uploads_leaves_chats_alone"),
    ("files of an answer are looked up without end",
     "MAX_LINKS = 20 ", "MAX_LINKS = 2000 ",
     "test_only_so_many_files_of_an_answer_are_looked_up"),
    ("a turn that goes on has a [DONE] in its middle",
     "done = WithoutDone() if again else None", "done = None",
     "test_a_native_turn_that_was_cut_for_length_is_gone_on_with_on_request"),
    ("the only account is asked again at once",
     "attempt.watch.pause(min(0.25 * 2 ** (len(attempt.tried) - 1), 4.0))", "pass",
     "a_failure_is_tried_again_after_a_pause"),
    ("a limit for uploads is one for chats",
     "model = refused.about or attempt.question.model", "model = attempt.question.model",
     "a_limit_for_uploads_leaves_chats_alone"),
    ("a limited account is asked by the next request",
     "pause = self.pool.told_to_wait(account, name, refused.wait)", "pause = refused.wait or 60.0",
     "an_account_told_to_wait_is_skipped"),
    ("a 429 has no Retry-After",
     'refused.headers["Retry-After"] = str(max(1, math.ceil(pause)))', "pass",
     "the_shortest_wait_is_told"),
    ("a revoked token's account stays in turn",
     '                else "the upstream does not credit its token"\n            )\n            self.pool.set_aside(account, "expired", reason, attempt.token)', '                else "the upstream does not credit its token"\n            )',
     "a_revoked_token_sets_its_account_aside"),
    ("RETRY_TIMES is one more",
     "len(attempt.tried) > most:", "len(attempt.tried) > most + 1:",
     "retries_end_after_retry_times"),
    ("a request that was rejected is its account's failure",
     "if refused.reason in _FAILURES and attempt.continues is None:", "if attempt.continues is None:",
     "a_failure_is_tried_again_after_a_pause"),
    ("AUTO_CONTINUE is ignored",
     "finish = self.to_the_end(attempt, ask, self.settings.auto_continue, going_on)", "finish = self.to_the_end(attempt, ask, 3, going_on)",
     "no_answer_is_continued_more_often"),
    ("a continuation that is refused loses the answer",
     "if attempt.continues is None:\n                raise", "if True:\n                raise",
     "a_continuation_that_is_refused"),
    ("temporary chats are kept on record",
     "keeps = attempt.asked.keeps or not self.settings.history_disabled", "keeps = True",
     "a_failure_is_tried_again_after_a_pause"),
    ("a validation may take any time",
     "        if self._left < 0:\n            raise OverBudget", "        if False:\n            raise OverBudget",
     "test_a_validation_ends_when_nobody_waits"),
    ("a validation goes on when nobody waits",
     "            self._check()", "            pass",
     "test_a_validation_ends_when_nobody_waits"),
    ("comparisons are no effort",
     "self.spend(1 + len(value) // 64 if isinstance(value, str) else 1)", "pass",
     "test_comparing_is_an_effort_too"),
    ("numbers collide",
     "if isinstance(value, (int, float)) and 2**53 < abs(value)", "if False and 2**53 < abs(value)",
     "test_numbers_that_collide_are_compared"),
    ("what is read of a large body takes no room",
     'body.share.grow("memory", len(data))', "pass",
     "test_bodies_have_a_room_of_their_own"),
    ("JSON may have any number of values",
     "if too_many_values(data):", "if False:",
     "test_no_body_of_any_size_takes_long_to_be_refused"),
    ("base64 that is none is looked for without end",
     "tried += 1", "tried += 0",
     "test_base64_that_is_none_is_found_in_time"),
    ("null is of no type",
     "if value is not None and name in types:", "if name in types:",
     "test_null_is_as_good_as_nothing"),
    ("true is a number",
     " or (isinstance(value, bool) and kinds is not bool)", "",
     "test_what_is_out_of_bounds_is_named_and_asked_of_nobody"),
    ("a model's name has no limit",
     "if len(model) > MAX_NAME:", "if False:",
     "test_every_attack_has_its_answer and heavy"),
    ("a developer's message is a user's",
     '"developer": "system"', '"developer": "user"',
     "test_content_parts_and_every_role_reach_the_upstream"),
    ("any role is taken",
     "if not isinstance(role, str) or role not in ROLES:", "if not isinstance(role, str):",
     "test_a_wrong_field_is_named"),
    ("a history's result has no heading",
     "(Text(result_heading(part.name, part.id)), *part.parts)", "part.parts",
     "test_calls_and_results_in_the_history_reach_the_model"),
    ("audio in a chat is passed over",
     'if kind == "input_audio":', 'if kind == "input_audio" and False:',
     "test_a_picture_that_is_none_is_refused"),
    ("base64 is read past what is none",
     "validate=True))\n    except ValueError:\n        raise unfit",
     "validate=False))\n    except ValueError:\n        raise unfit",
     "test_what_is_out_of_bounds_is_named_and_asked_of_nobody"),
    ("a call of an unknown function is passed on",
     "if not isinstance(name, str) or name not in offer.functions:", "if not isinstance(name, str):",
     "test_a_wrong_call_is_asked_for_again_once_and_then_is_text"),
    ("another function than the one demanded may be called",
     'if offer.choice not in ("auto", "required", name):', "if False:",
     "test_a_wrong_call_is_asked_for_again_once_and_then_is_text"),
    ("arguments need not fit their schema",
     "if fault := Schema(function.parameters, budget).fault(arguments):", 'if fault := "":',
     "test_a_wrong_call_is_asked_for_again_once_and_then_is_text"),
    ("names of functions may be anything",
     '_FUNCTION_NAME = re.compile(r"[0-9A-Za-z_.:-]{1,128}")', '_FUNCTION_NAME = re.compile(r".{1,128}")',
     "test_a_wrong_field_is_named"),
    ("names of functions without length",
     '[0-9A-Za-z_.:-]{1,128}")', '[0-9A-Za-z_.:-]+")',
     "test_what_is_out_of_bounds_is_named_and_asked_of_nobody"),
    ("a schema of unknown types is taken",
     'raise unfit(f"{where}.parameters"', '(f"{where}.parameters"',
     "test_a_wrong_field_of_a_response_is_named"),
    ("functions that are not allowed are told",
     "functions = Functions({name: functions[name] for name in names})", "pass",
     "test_only_allowed_functions_are_told"),
    ("a required call is left to the model",
     'choice = _at(allowed, ("mode",))', 'choice = "auto"',
     "test_only_allowed_functions_are_told"),
    ("a function that is not offered may be demanded",
     "if not found and not forced and other not in self.left_out:", "if False:",
     "test_what_is_out_of_bounds_is_named_and_asked_of_nobody"),
    ("an unknown tool_choice is auto",
     'elif choice not in (None, "auto", "none", "required"):', "elif False:",
     "test_what_is_out_of_bounds_is_named_and_asked_of_nobody"),
    ("tool_choice none is ignored",
     '        if choice == "none":\n            return Offered(None, (), "")', '        if choice == "none":\n            choice = "auto"',
     "test_functions_that_may_not_be_called_are_not_told"),
    ("a model may call without end", "MAX_CALLS = 128", "MAX_CALLS = 100_000", "test_a_hostile_call_costs_little"),
    ("every end tag in a call is tried",
     "MAX_TRIES = 16 ", "MAX_TRIES = 10**9 ",
     "test_nothing_behind_a_call_counts"),
    ("what may begin a tag leaks",
     "held = next((size for size in sizes if CALL_TAG.startswith(text[-size:])), 0)", "held = 0",
     "test_a_function_is_called"),
    ("text behind a call does not end the answer",
     "if text.strip() and not self._fault:", "if False:",
     "test_nothing_behind_a_call_counts"),
    ("parallel_tool_calls false is ignored",
     "most = self.MAX_CALLS if self._offer.parallel else 1", "most = self.MAX_CALLS",
     "test_one_call_is_enough_when_more_are_not_wanted"),
    ("text before a call is said twice",
     "if self._patient and not self._told and self._text:", "if self._patient and self._text:",
     "test_text_before_a_call_is_not_said_twice"),
    ("all calls have one id", 'f"call_{random.getrandbits(96):024x}"', '"call_1"', "test_a_function_is_called"),
    ("an array is taken for a JSON object",
     'Schema({"type": "object"} if schema is None else schema, budget)', "Schema({} if schema is None else schema, budget)",
     "test_a_piece_of_broken_json_is_never_taken_for_the_whole"),
    ("deep JSON of a model kills the thread",
     "fault(_not_too_deep(value))", "fault(value)",
     "test_a_piece_of_broken_json_is_never_taken_for_the_whole"),
    ("a piece of broken JSON is taken for the whole",
     "at = _closing(text, match.start())", "at = match.start() + 1",
     "test_a_piece_of_broken_json_is_never_taken_for_the_whole"),
    ("a tool's output stands before the JSON",
     "elif not isinstance(event, (ToolUse, Image)):", "else:",
     "test_json_stays_json_when_a_tool_was_used"),
    ("JSON cut for length is asked for again",
     'if event.reason == "stop":\n            text, fault', "if True:\n            text, fault",
     "test_json_that_was_cut_for_length_is_passed_on_as_it_is"),
    ("JSON that does not fit twice is passed on",
     "if fault and self._last:", "if False:",
     "test_json_that_does_not_fit_is_asked_for_again_once"),
    ("a wrong call is asked for without end",
     "CallScanner(offer, budget, True, told)", "CallScanner(offer, budget, False, told)",
     "test_a_wrong_call_is_asked_for_again_once_and_then_is_text"),
    ("the model is not told what it said wrong",
     "messages=(*question.messages, *said)", "messages=question.messages",
     "test_json_that_does_not_fit_is_asked_for_again_once"),
    ("a second asking that fails loses the first answer",
     "if shape or not isinstance(first, CallScanner):", "if True:",
     "test_a_second_asking_that_fails_leaves_the_first_answer"),
    ("a second asking shows tools again",
     "if isinstance(event, (Text, Finish))]\n        for scanner", "if isinstance(event, object)]\n        for scanner",
     "test_text_before_a_call_is_not_said_twice"),
    ("stop sequences without number",
     "isinstance(stops, list) and len(stops) <= 16", "isinstance(stops, list)",
     "test_what_is_out_of_bounds_is_named_and_asked_of_nobody"),
    ("stop sequences without length",
     "isinstance(stop, str) and len(stop) <= 256", "isinstance(stop, str)",
     "test_what_is_out_of_bounds_is_named_and_asked_of_nobody"),
    ("an empty stop sequence ends the answer at once",
     "return tuple(stop for stop in stops if stop)", "return tuple(stops)",
     "test_null_is_as_good_as_nothing"),
    ("a limit of no tokens is taken",
     "if name is not None and body[name] < 1:", "if False:",
     "test_a_wrong_field_is_named"),
    ("an unknown effort is taken",
     "if not isinstance(value, str) or value not in EFFORTS:", "if False:",
     "test_a_wrong_field_is_named"),
    ("several answers are asked for and one is given",
     'if body.get("n") not in (None, 1):', "if False:",
     "test_the_openai_client_is_served"),
    ("audio is asked for and text comes",
     'if "audio" in (body.get("modalities") or ()):', "if False:",
     "test_what_is_out_of_bounds_is_named_and_asked_of_nobody"),
    ("logprobs are left out without a word", 'if body.get("logprobs"):', "if False:", "test_a_wrong_field_is_named"),
    ("temporary chats are gone on with",
     "if conversation and history_disabled:", "if False:",
     "test_a_conversation_goes_on_with_the_account_that_holds_it"),
    ("tools of other kinds are passed over",
     'raise unfit(where, "must be an object with a `type`.")', "return",
     "test_a_wrong_field_is_named"),
    ("max_tokens wins over max_completion_tokens",
     '"max_completion_tokens", "max_tokens")', '"max_tokens", "max_completion_tokens")',
     "test_what_is_out_of_bounds_is_named_and_asked_of_nobody"),
    ("text that looked like a stop is lost at the end",
     "                self._let_go(out)\n                if not self.over:", "                if not self.over:",
     "test_a_stop_sequence_never_leaks_however_the_text_is_cut"),
    ("the stop sequence named first wins",
     "end, start = min(found)", "end, start = found[0]",
     "test_a_stop_sequence_never_leaks_however_the_text_is_cut"),
    ("a stop sequence leaks when it comes in pieces",
     "held = next((size for size in sizes if text[-size:] in self._starts), 0)", "held = 0",
     "test_stop_and_max_tokens_are_enforced_here"),
    ("an answer is one token longer than its limit",
     "if size > self._left:", "if size > self._left + 1:",
     "test_stop_and_max_tokens_are_enforced_here"),
    ("output can end its own fence",
     '"`" * max(3, *(len(run) + 1 for run in runs), 3)', '"`" * 3',
     "test_code_its_output_and_drawings_are_shown"),
    ("messages cost no tokens of their own",
     "sum(count(message.text) + 4 for message", "sum(count(message.text) for message",
     "test_every_token_is_counted_where_it_belongs"),
    ("the answer's three tokens are not counted",
     "for message in in_prose(question).messages) + 3", "for message in in_prose(question).messages)",
     "test_every_token_is_counted_where_it_belongs"),
    ("reasoning is free",
     "return self.prompt, answer + calls + reasoning, reasoning", "return self.prompt, answer + calls, reasoning",
     "test_every_token_is_counted_where_it_belongs"),
    ("calls are free",
     "return self.prompt, answer + calls + reasoning, reasoning", "return self.prompt, answer + reasoning, reasoning",
     "test_every_token_is_counted_where_it_belongs"),
    ("all completions have one id",
     'f"chatcmpl-{random.getrandbits(112):028x}"', '"chatcmpl-1"',
     "test_an_answer_names_the_model_that_gave_it"),
    ("temporary chats tell their ids",
     "if self._extras and self.conversation:", "if self.conversation:",
     "test_temporary_chats_tell_no_ids"),
    ("the older functions end as tool calls",
     'if self._reason == "tool_calls" and self.turn.legacy else', "if False else",
     "test_the_older_functions_are_called_too"),
    ("half a character in an answer breaks its stream",
     '"".join(self.pieces).encode("utf-8", "replace")', '"".join(self.pieces).encode("utf-8")',
     "test_an_answer_names_the_model_that_gave_it"),
    ("the role comes with no chunk",
     'pieces.append(self._chunk({"role": "assistant", "content": content}, None))', "pass",
     "test_both_encodings_give_the_same_answer"),
    ("a call's arguments come with its name in every piece",
     'head = {"id": id, "type": kind} if id else {}', 'head = {"id": id, "type": kind}',
     "test_calls_stream_as_standard_deltas"),
    ("usage comes unasked",
     "if self.turn.include_usage:\n            self.pieces", "if True:\n            self.pieces",
     "test_usage_is_told_when_asked_for"),
    ("a stream has no [DONE]",
     'pieces.append("data: [DONE]\\n\\n")', "pass",
     "test_both_encodings_give_the_same_answer"),
    ("chunks have no null usage before the last",
     '{"usage": None} if self.turn.include_usage else {}', "{}",
     "test_usage_is_told_when_asked_for"),
    ("a background response is made at once",
     'if body.get("background"):', "if False:",
     "test_a_wrong_field_of_a_response_is_named"),
    ("an unknown truncation is taken",
     'if body.get("truncation") not in', 'if body.get("truncation") in',
     "test_a_streamed_response_has_its_events_in_order"),
    ("metadata without number",
     "fits = len(metadata) <= 16 and", "fits =",
     "test_what_is_out_of_bounds_is_named_and_asked_of_nobody"),
    ("metadata of any type is taken",
     "isinstance(one, str) and len(one) <= 512 for one", "len(str(one)) <= 512 for one",
     "test_a_wrong_field_of_a_response_is_named"),
    ("metadata without length",
     "isinstance(one, str) and len(one) <= 512", "isinstance(one, str)",
     "test_what_is_out_of_bounds_is_named_and_asked_of_nobody"),
    ("instructions go on with the next response",
     "    messages = (*kept.merged(earlier), *(", '    messages = (*((Message("system", (Text(body["instructions"]),)),) if body.get("instructions") else ()), *kept.merged(earlier), *(',
     "test_a_response_is_gone_on_from_with_its_files_and_calls"),
    ("a response says that calls may be parallel",
     'echo["parallel_tool_calls"] = body.get("parallel_tool_calls") is not False', 'echo["parallel_tool_calls"] = True',
     "test_a_response_repeats_what_was_asked"),
    ("a response repeats no temperature",
     'for name in ("temperature", "top_p")}', 'for name in ("top_p",)}',
     "test_a_response_repeats_what_was_asked"),
    ("store false is ignored",
     'store = body.get("store") is not False', "store = True",
     "test_a_response_is_kept_for_a_day_unless_told_otherwise"),
    ("what a response repeats has no limit",
     "if sum(sizes.values()) <= MAX_ECHO:", "if True:",
     "test_what_is_kept_of_a_response_is_bounded_at_once"),
    ("an item without an id is passed over",
     'id = required(item, "id", f"{where}.")', 'id = str(item.get("id") or "rs_")',
     "test_a_wrong_field_of_a_response_is_named"),
    ("a moderated response has no reason",
     '"content_filter": "content_filter"}.get', "}.get",
     "test_a_moderated_response_is_incomplete"),
    ("usage is told before there is any",
     'self.usage() if self._status in ("completed", "incomplete") else None', "self.usage()",
     "test_a_response_repeats_what_was_asked"),
    ("events of a response share a number",
     "self.number += 1\n        event = {", "event = {",
     "test_a_streamed_response_has_its_events_in_order"),
    ("a message's part is told with the reasoning before it",
     "        self._open = kind\n        self._grown = []\n        self.tell(", "        self._open = kind\n        self.tell(",
     "test_a_response_repeats_what_was_asked"),
    ("a response that reached its limit is complete",
     'if self._reason in ("length", "content_filter") else "completed"',
     'if self._reason in ("content_filter",) else "completed"',
     "test_a_response_that_reaches_its_limit_is_incomplete"),
    ("a moderated response is complete",
     'if self._reason in ("length", "content_filter") else "completed"',
     'if self._reason in ("length",) else "completed"',
     "test_a_moderated_response_is_incomplete"),
    ("an incomplete message is complete",
     "self._events.close(self._status)", "self._events.close()",
     "test_a_response_that_reaches_its_limit_is_incomplete"),
    ("anybody may send bodies of any size",
     "MAX_PUBLIC_BODY = 64 << 10", "MAX_PUBLIC_BODY = 64 << 20",
     "test_every_attack_has_its_answer and strange"),
    ("a head is read byte by byte",
     "MAX_CRUMBS = 256, 32", "MAX_CRUMBS = 256, 10**9",
     "test_no_request_costs_much_whatever_it_is and strange"),
    ("a form may have any number of fields",
     'if text.count("&") >= MAX_FIELDS:', "if False:",
     "test_every_attack_has_its_answer and heavy"),
    ("a form may have any number of parts",
     "MAX_PARTS, MAX_PART_HEAD = 100, 4096", "MAX_PARTS, MAX_PART_HEAD = 10**9, 4096",
     "test_a_form_has_only_so_many_parts_and_header_lines"),
    ("a form's part may have any number of header lines",
     "MAX_PARTS, MAX_PART_HEAD = 100, 4096", "MAX_PARTS, MAX_PART_HEAD = 100, 1 << 30",
     "test_a_form_has_only_so_many_parts_and_header_lines"),
    ("a form may be followed by anything",
     'if after[2:] not in (b"", b"\\r\\n") or at + len(after) < body.size:', "if False:",
     "test_a_form_that_is_not_quite_one_is_refused"),
    ("a form's part may be encoded",
     'not in ("binary", "7bit", "8bit"):', 'not in ("binary", "7bit", "8bit", "base64"):',
     "test_a_form_that_is_not_quite_one_is_refused"),
    ("any number of header lines is read",
     "if len(lines) > MAX_HEADERS:", "if False:",
     "test_limits_have_their_own_answers"),
    ("two Host headers are accepted",
     'if name in ("host", "content-length",', 'if name in ("content-length",',
     "test_what_two_parsers_might_read_differently_is_refused"),
    ("two Authorization headers are accepted",
     '"transfer-encoding", "authorization"):', '"transfer-encoding"):',
     "test_a_key_that_is_sent_twice_is_refused"),
    ("a length beside chunks is accepted",
     "(length is not None or coding.lower()", "(coding.lower()",
     "test_what_two_parsers_might_read_differently_is_refused"),
    ("a length may have a sign",
     're.fullmatch(r"[0-9]{1,18}", length)', 're.fullmatch(r"[+-]?[0-9]{1,18}", length)',
     "test_what_two_parsers_might_read_differently_is_refused"),
    ("an absolute target may name a user",
     '_ABSOLUTE = re.compile(r"(?i)https?://(?:[0-9a-z._~-]+',
     '_ABSOLUTE = re.compile(r"(?i)https?://(?:[0-9a-z._~@-]+',
     "test_every_attack_has_its_answer and strange"),
    ("an absolute target may be of any scheme",
     '_ABSOLUTE = re.compile(r"(?i)https?://', '_ABSOLUTE = re.compile(r"(?i)[a-z]+://',
     "test_every_attack_has_its_answer and strange"),
    ("a target may have a fragment", '"#" in target', "False", "test_every_attack_has_its_answer and strange"),
    ("a path may have a back-slash", '"\\\\" in raw', "False", "test_every_attack_has_its_answer and strange"),
    ("a path may have two slashes", '"//" in raw', "False", "test_every_attack_has_its_answer and strange"),
    ("a path has many spellings",
     "_ENCODED_PLAIN.search(raw) or", "",
     "test_every_attack_has_its_answer and strange"),
    ("a path may be encoded wrongly",
     're.search(r"%(?![0-9a-fA-F]{2})", raw)', "False",
     "test_every_attack_has_its_answer and strange"),
    ("a path need not be UTF-8",
     'urllib.parse.unquote(raw, errors="strict")', "urllib.parse.unquote(raw)",
     "test_every_attack_has_its_answer and strange"),
    ("a truncated body is answered",
     "if not data:\n                raise ClientGone",
     'if not data:\n                return b" " * int(headers.get("content-length", 0))',
     "test_a_request_that_did_not_arrive_whole_is_not_answered"),
    ("a body in chunks that ends early is answered",
     "if not data:\n                raise ClientGone", 'if not data:\n                return b"\\r\\n0\\r\\n\\r\\n"',
     "test_a_request_that_did_not_arrive_whole_is_not_answered"),
    ("what comes with the rest of a body is lost",
     "            self._ahead = data[left:]", "            pass",
     "test_what_comes_in_one_piece_with_the_end_of_a_body_is_the_next_request"),
    ("the limit of a body is that of a chunk",
     "if body.size + len(small) + left > most:", "if left > most:",
     "test_limits_of_a_body_are_those_of_all_its_chunks"),
    ("a chunk may end in anything",
     'if data[:2] != b"\\r\\n":\n                raise malformed("a chunk',
     'if False:\n                raise malformed("a chunk',
     "test_limits_of_a_body_are_those_of_all_its_chunks"),
    ("trailers may be of any size",
     'raise ApiError("headers_too_large", "The trailers are too long.")', "pass",
     "test_limits_of_a_body_are_those_of_all_its_chunks"),
    ("what comes with the last chunk is lost",
     "self._ahead = bytes(data)\n", 'self._ahead = b""\n',
     "test_what_comes_in_one_piece_with_the_end_of_a_body_is_the_next_request"),
    ("a Close of one byte is taken",
     "_CODES = {*range(1000, 1015), *range(3000, 5000)}", "_CODES = {3, *range(1000, 1015), *range(3000, 5000)}",
     "test_every_fault_of_a_frame_is_found_before_what_follows"),
    ("a handshake needs no key",
     '(_KEY.fullmatch(key), "a Sec', '(True, "a Sec',
     "test_a_malformed_handshake_is_refused_and_the_next_request_answered"),
    ("a handshake of any version is taken",
     'if headers.get("sec-websocket-version") != "13":', "if False:",
     "test_a_malformed_handshake_is_refused_and_the_next_request_answered"),
    ("the size of a message is that of its last frame",
     "size > self._most - len(self._message):", "size > self._most:",
     "test_every_fault_of_a_frame_is_found_before_what_follows"),
    ("a pong does not say what the ping said",
     "self._put(_PONG, data)", 'self._put(_PONG, b"")',
     "test_frames_may_come_with_the_handshake_and_control_frames_and_characters_lie_across"),
    ("a Close may have any code",
     "if data and code not in _CODES:", "if False:",
     "test_every_fault_of_a_frame_is_found_before_what_follows"),
    ("text need not be UTF-8 until its end",
     "decoder.decode(data, final)  #", "pass  #",
     "test_every_fault_of_a_frame_is_found_before_what_follows"),
    ("messages after our Close are answered",
     "elif self._last is None:\n                    self._texts", "else:\n                    self._texts",
     "test_a_close_is_answered_once_and_then_nothing_is_read_or_sent"),
    ("frames are sent after a Close",
     "            if self._over or self._last:\n                raise self._end()",
     "            if self._over:\n                raise self._end()",
     "test_what_does_not_fit_is_cut_and_no_second_close_is_sent"),
    ("a client that sips keeps its connection for ever",
     "elif self._unsent and now >= self._unsent[0][1]:", "elif False:",
     "test_a_client_that_hardly_reads_holds_neither_senders_nor_the_reader"),
    ("bytes are no sign of life",
     "            self._pinged = False\n            self._due = time.monotonic() + self._idle", "            self._due = time.monotonic() + self._idle",
     "test_any_byte_is_a_sign_of_life_and_a_reader_that_was_away_blames_nobody"),
    ("a silent WebSocket is pinged for ever",
     "                self._pinged = True\n                self._due = now + self._patience", "                self._due = now + self._patience",
     "test_a_silent_client_is_pinged_then_dropped_in_time"),
    ("a silent client stays for ever",
     "elif silent and self._pinged:", "elif False:",
     "test_a_silent_client_is_pinged_then_dropped_in_time"),
    ("frames without a mask are read",
     "if first & 0x70 or not known or second < 0x80:", "if first & 0x70 or not known:",
     "test_a_fault_of_the_client_ends_the_connection_with_its_code"),
    ("reserved bits are passed over",
     "if first & 0x70 or not known", "if not known",
     "test_every_fault_of_a_frame_is_found_before_what_follows"),
    ("frames need no mask",
     "or not known or second < 0x80:", "or not known:",
     "test_every_fault_of_a_frame_is_found_before_what_follows"),
    ("control frames may be long and in pieces",
     "if (size > 125 or not final) if opcode >= _CLOSE else", "if False if opcode >= _CLOSE else",
     "test_every_fault_of_a_frame_is_found_before_what_follows"),
    ("binary messages are text",
     "if opcode == _BINARY:", "if False:",
     "test_every_fault_of_a_frame_is_found_before_what_follows"),
    ("a length may be in a longer form",
     "if size < least or size >> 63:", "if size >> 63:",
     "test_every_fault_of_a_frame_is_found_before_what_follows"),
    ("a message of a WebSocket may be of any size",
     "if opcode < _CLOSE and size > self._most", "if False and size > self._most",
     "test_a_message_of_exactly_the_limit_passes_and_the_count_begins_anew"),
    ("TLS 1.0 is accepted",
     "minimum_version = ssl.TLSVersion.TLSv1_2", "minimum_version = ssl.TLSVersion.TLSv1",
     "test_https_is_not_spoken_in_old_versions_and_its_cookies_are_secure"),
    ("loopback has a limit of connections",
     "if not most or is_loopback(peer) else", "if not most else",
     "test_one_address_cannot_take_all_connections"),
    ("one address takes all connections",
     "crowded = bool(place) and self._from[place] >= most", "crowded = False",
     "test_one_address_cannot_take_all_connections"),
    ("refused connections are not counted",
     'self.metrics.add("chatproxy_requests_total", labels=\'route="none",status="503"\')', "pass",
     "test_refused_connections_are_counted"),
    ("a connection that has ended counts for ever",
     "            self._open.pop(request, None)", "            pass",
     "test_connections_over_the_limit_are_told_to_come_back"),
    ("connections that have gone are counted",
     "self._from[place] -= 1", "pass",
     "test_one_address_cannot_take_all_connections"),
    ("idle connections are waited for",
     "idle = [one for one in self._open.values() if one and not one.busy]", "idle = []",
     "test_an_idle_connection_does_not_hold_up_the_end"),
    ("a shutdown leaves open websockets unsaid",
     'web.close(1001, "the server is shutting down")', "pass",
     "test_draining_tells_open_websockets_1001_at_once"),
    ("streams are not waited for",
     "if not left:\n                return", "if True:\n                return",
     "test_sigterm_lets_streams_finish_and_then_ends"),
    ("streams are cut at the grace without a word",
     "self.ending = time.monotonic() >= deadline", "self.ending = False",
     "test_streams_longer_than_the_grace_end_with_an_error_event"),
    ("an error has no headers",
     "json_reply(error.body(), error.status, error.headers)", "json_reply(error.body(), error.status)",
     "test_connections_over_the_limit_are_told_to_come_back"),
    ("answers may be stored on their way",
     'if "Cache-Control" not in reply.headers:', "if False:",
     "test_answers_are_not_to_be_stored_and_methods"),
    ("room for bodies is not given back",
     "        finally:\n            share.end()", "        finally:\n            pass",
     "test_bodies_have_a_room_of_their_own"),
    ("the body of a refused request is the next request",
     "keep = keep and whole", "keep = keep",
     "test_the_body_of_a_refused_request_is_never_the_next_request"),
    ("a fault is not logged",
     'log(logging.ERROR, "request failed", exc_info=True,', 'log(logging.DEBUG, "request failed",',
     "test_a_fault_of_ours_is_told_by_its_number_alone"),
    ("a fault's own words are told to the client",
     'f"chatproxy failed; its log has the details under {self.request_id}."',
     'f"chatproxy failed ({failure}); its log has {self.request_id}."',
     "test_a_fault_of_ours_is_told_by_its_number_alone"),
    ("a prefix is matched by its beginning only",
     'request.path.startswith(prefix + "/")', "request.path.startswith(prefix)",
     "test_a_prefix_is_a_whole_step_of_the_path"),
    ("a HEAD is answered with a stream",
     'if self.method == "HEAD":\n            return self._send(Reply(stream', "if False:\n            return self._send(Reply(stream",
     "test_a_piece_without_bytes_ends_no_stream"),
    ("a piece without bytes ends a stream",
     "if not data:  # a chunk of none would be the last\n            return", "if False:\n            return",
     "test_a_piece_without_bytes_ends_no_stream"),
    ("a fault of ours in mid-stream is the client's",
     "except (*_GONE, ClientGone):", "except (OSError, ClientGone):",
     "test_a_fault_of_our_own_in_mid_stream"),
    ("a stream that has ended counts as open",
     'metrics.add("chatproxy_streams_open", -1)', "pass",
     "test_health_and_metrics_tell_the_state"),
    ("logs and metrics name the path and not the route",
     'route = request.route if request else "none"\n        self',
     'route = request.path if request else "none"\n        self',
     "test_health_and_metrics_tell_the_state or test_no_secret_reaches_log_errors_or_metrics"),
    ("a method reaches the log as it came",
     'method = self.method if self.method in _METHODS else "-"', "method = self.method",
     "test_answers_are_not_to_be_stored_and_methods"),
    ("a route's step may hold slashes",
     'r"(?P<\\1>[^/]+)"', 'r"(?P<\\1>.+)"',
     "test_an_address_is_a_routes_step_by_step"),
    ("any number of wrong keys wait",
     "if waiting >= MAX_WAITING:", "if False:",
     "test_guesses_of_one_address_are_looked_at"),
    ("wrong keys wait side by side",
     "until = min(max(now, until), now + waiting * WRONG_KEY_DELAY) + WRONG_KEY_DELAY",
     "until = now + WRONG_KEY_DELAY",
     "test_guesses_of_one_address_are_looked_at"),
    ("who leaves makes others wait longer",
     "min(max(now, until), now + waiting * WRONG_KEY_DELAY)", "max(now, until)",
     "test_who_leaves_while_waiting_makes_nobody_wait_longer"),
    ("wrong keys do not count",
     "self.guesses.slow_down(request, wrong=True)\n        return", "self.guesses.slow_down(request)\n        return",
     "test_guesses_of_one_address_are_looked_at"),
    ("a PATCH is not counted for an API user",
     'if request.method not in ("POST", "PATCH") or', 'if request.method not in ("POST",) or',
     "test_every_call_that_changes_something_is_counted_for_an_api_user"),
    ("strangers are served without a question",
     "if not proved and not pooled:", "if False:",
     "test_junk_tokens_leave_nothing_and_reach_nothing"),
    ("a stranger's wrong token is no wrong key",
     "self.guesses.slow_down(request, wrong=True)  # until", "self.guesses.slow_down(request)  # until",
     "test_wrong_tokens_of_callers_count_as_wrong_keys"),
    ("one address takes all places of new tokens",
     "or self._strangers[place] >= MAX_STRANGERS // 4", "",
     "test_one_address_does_not_take_all_places_of_new_tokens"),
    ("an accepted token stays a guess",
     "self.guesses.forgive(request.peer)", "pass",
     "test_a_token_that_the_upstream_will_not_speak_of"),
    ("a guest is asked about at every call",
     "            self._proved[digest] = None", "            pass",
     "test_junk_tokens_leave_nothing_and_reach_nothing"),
    ("keyless administration goes on beside API users",
     "            if self._users:\n                text", "            if False:\n                text",
     "test_administration_without_a_key_is_for_this_machine_asked_directly"),
    ("keyless administration is passed on by front servers",
     "fronted = told or request.version", "fronted = request.version",
     "test_administration_without_a_key_is_for_this_machine_asked_directly"),
    ("keyless administration speaks HTTP/1.0",
     'fronted = told or request.version == "1.0"', "fronted = told",
     "test_administration_without_a_key_is_for_this_machine_asked_directly"),
    ("keyless administration answers to any name",
     "listened = is_loopback(host) or host == self.settings.host", "listened = True",
     "test_administration_without_a_key_is_for_this_machine_asked_directly"),
    ("keyless administration does not look at who connects",
     "return is_loopback(request.peer) and not fronted", "return not fronted",
     "test_without_any_key_this_machine_alone_administers"),
    ("keyless administration answers for any port",
     "and listened and port == request.port", "and listened",
     "test_administration_without_a_key_is_for_this_machine_asked_directly"),
    ("a Host may name a user",
     'if "@" not in parts.netloc:', "if True:",
     "test_administration_without_a_key_is_for_this_machine_asked_directly"),
    ("any page may ask a server without a key",
     "if named or (changes and self._foreign(request)):", "if False:",
     "test_other_sites_pages_get_nothing"),
    ("a name that leads here may ask a server without a key",
     "if named or (changes and self._foreign(request)):", "if changes and self._foreign(request):",
     "test_other_sites_pages_get_nothing"),
    ("a name that leads here may read",
     "if named or (changes and self._foreign(request)):", "if changes and (named or self._foreign(request)):",
     "test_a_browser_reads_nothing_under_a_name"),
    ("a cookie over its own HTTPS is not Secure",
     "secure = self.settings.tls_cert or request", "secure = request",
     "test_https_is_not_spoken_in_old_versions_and_its_cookies_are_secure"),
    ("a cookie behind a proxy that speaks HTTPS is not Secure",
     'self.settings.tls_cert or request.headers.get("x-forwarded-proto") == "https"', "self.settings.tls_cert",
     "test_an_administrator_signs_in_on_the_page"),
    ("a user's name has no end",
     "if len(name) > 100 or not name.isprintable():", "if not name.isprintable():",
     "test_an_api_users_token_cannot_be_guessed_or_found_again"),
    ("a user's token can be guessed",
     'token = f"cp-{secrets.token_urlsafe(32)}"', 'token = f"cp-{secrets.token_urlsafe(8)}"',
     "test_an_api_users_token_cannot_be_guessed_or_found_again"),
    ("a user's token is stored as it is",
     'user = User(f"user-{secrets.token_hex(4)}", name, digest,',
     'user = User(f"user-{secrets.token_hex(4)}", name, token,',
     "test_an_api_users_token_cannot_be_guessed_or_found_again"),
    ("the agent asked last is asked again",
     "key=lambda agent: agent.asked)", "key=lambda agent: -agent.asked)",
     "test_agents_answer_in_turn_and_keep_their_conversations"),
    ("a connection that never becomes an agent stays",
     "self._heard(web.receive(time.monotonic() + AGENT_PATIENCE))", "self._heard(web.receive())",
     "test_a_connection_that_never_becomes_an_agent_is_ended"),
    ("an agent takes the place of one who answers",
     "offered if self._taken(wanted) else wanted", "wanted",
     "test_an_agent_takes_neither_a_place"),
    ("an agent that comes anew has two connections",
     'before.close(1000, "the agent connected anew")\n            before.drop("the agent connected anew")', "pass",
     "test_an_agent_that_comes_back_has_its_place_and_conversations"),
    ("a question is put to a second agent when the first is slow",
     'raise AgentLost("the agent did not answer in time", silent=True)',
     'raise AgentLost("the agent did not answer in time")',
     "test_a_silent_agent_has_the_time_of_the_whole_exchange_and_no_other_is_asked"),
    ("an API user goes on with anybody's agent",
     "if conversation and not asked.scope.covers(", "if False and not asked.scope.covers(",
     "test_agents_conversations_belong_to_who_began_them"),
    ("a conversation goes on with any agent",
     "agents = [one for one in agents if one.id == attempt.holder]", "pass",
     "test_agents_answer_in_turn_and_keep_their_conversations"),
    ("nobody is told when an agent may be there",
     '"No agent is available.", headers={"Retry-After": "30"}', '"No agent is available."',
     "test_an_agent_holds_nothing_under_a_name_that_is_none"),
    ("an agent that does not answer a ping stays in the list",
     'web.drop("it did not answer a ping")', "pass",
     "test_agents_that_fall_silent_leave_the_list"),
    ("an agent's failure is its answer",
     'if said.get("message") == "error" or said.get("error") or not', "if not",
     "test_an_agent_holds_nothing_under_a_name_that_is_none"),
    ("an agent's own words reach the client",
     '"The agent reported a failure; see the console of its browser."',
     'f"The agent reported a failure: {said}"',
     "test_what_an_agent_says_is_not_trusted"),
    ("an agent holds a conversation of any name",
     "if _AGENT_ID.fullmatch(conversation):", "if True:",
     "test_an_agent_holds_nothing_under_a_name_that_is_none"),
    ("an agent takes another's conversation",
     "held = self._holders.setdefault(conversation, held)", "self._holders[conversation] = held",
     "test_an_agent_takes_neither_a_place"),
    ("a conversation that goes on grows old",
     "self._holders.move_to_end(conversation)", "pass",
     "test_the_conversations_of_agents_are_forgotten_the_oldest_first"),
    ("conversations of agents are never forgotten",
     "if len(self._holders) > MAX_HELD_BY_AGENTS:", "if False:",
     "test_the_conversations_of_agents_are_forgotten_the_oldest_first"),
    ("the newest conversation of agents is forgotten",
     "self._holders.popitem(last=False)", "self._holders.popitem()",
     "test_the_conversations_of_agents_are_forgotten_the_oldest_first"),
    ("an agent leads into another's conversation",
     'ids = conversation if own else "", response', "ids = conversation, response",
     "test_an_agent_takes_neither_a_place"),
    ("no refresh at start when scheduled",
     "self._refresh = 0.0 if settings", "self._refresh = math.inf if settings",
     "a_scheduled_refresh_is_made_once"),
    ("any page may read what a server without a key answers",
     "return not self.keys.keyless", "return True",
     "test_other_sites_pages_get_nothing"),
    ("a caller with a token of their own signs in here",
     "own=kind != SIGNS_IN", "own=True",
     "test_signing_in_takes_a_key_of_the_server_and_leaves_nothing"),
    ("upkeep never renews",
     "(10, lambda: self.renewals.renew_due(time.time())),", "",
     "the_upkeep_renews_saves_keeps_and_lets_go"),
    ("upkeep never saves counts", "(10, self.ledger.save),", "", "the_upkeep_renews_saves_keeps_and_lets_go"),
    ("upkeep never keeps cookies", "(60, self.pool.keep_told),", "", "the_upkeep_renews_saves_keeps_and_lets_go"),
    ("upkeep never prunes",
     "(3600, lambda: self.store.prune(time.time())),", "",
     "the_upkeep_renews_saves_keeps_and_lets_go"),
    ("one failing job ends the upkeep",
     '        except Exception:\n            log(logging.ERROR, "background job failed", exc_info=True)\n\n    def _take_in',
     '        except KeyError:\n            log(logging.ERROR, "background job failed", exc_info=True)\n\n    def _take_in',
     "the_upkeep_survives_a_failure"),
    ("upkeep dies of one failure",
     '"background job failed", exc_info=True)', '"background job failed", exc_info=True); raise',
     "the_upkeep_survives_a_failure"),
    ("what another process stored is not taken in", "if self._stale:", "if False:", "what_another_process_adds"),
    ("a scheduled refresh is made every second",
     "self._refresh = next_refresh(now)", "pass",
     "a_scheduled_refresh_is_made_once"),
    ("a scheduled refresh is made every second (2)",
     "refresh = next_refresh(now)", "refresh = now",
     "a_scheduled_refresh_is_made_once"),
    ("upkeep never closes idle connections",
     "self.connections.sweep(time.monotonic())", "pass",
     "the_upkeep_renews_saves_keeps_and_lets_go"),
    ("upkeep never drops old spares",
     "self.site.sweep_spares()", "pass",
     "the_upkeep_renews_saves_keeps_and_lets_go"),
    ("the administrator's cookie is passed on to OpenAI",
     'passed = ["content-type", "content-encoding",', 'passed = ["cookie", "content-type", "content-encoding",',
     "test_nothing_but_what_openai_needs_is_passed_on_with_an_sk_key"),
    ("every header is passed on to OpenAI",
     "request.headers.get(name) for name in passed}", "request.headers.get(name) for name in (*set(request.headers) - {'host', 'authorization'}, *passed)}",
     "test_nothing_but_what_openai_needs_is_passed_on_with_an_sk_key"),
    ("the gateway's key is told to OpenAI",
     'lines += [f"Authorization: Bearer {request.key}".encode("latin-1"), b"Expect:"]',
     'lines += [f"Authorization: Bearer {request.key}".encode("latin-1"), b"Expect:", f"authkey: {app.settings.auth_key}".encode()]',
     "test_nothing_but_what_openai_needs_is_passed_on_with_an_sk_key"),
    ("our own key is sent along with a relayed call",
     'f"Authorization: Bearer {request.key}".encode("latin-1"), b"Expect:"]\n    request.route',
     'f"Authorization: Bearer {request.key}, {app.settings.administrator}".encode("latin-1"), b"Expect:"]\n    request.route',
     "test_an_sk_key_goes_to_openai_unchanged"),
    ("a key that may do little is a wrong one",
     'answer.status == 401 and b"scope" not in answer.body[:2000]', "answer.status == 401",
     "test_wrong_tokens_of_callers_count_as_wrong_keys"),
    ("a relayed path is joined as text",
     '[urllib.parse.quote(step, safe="!$&\'()*+,;=:@~") for step in request.path.split("/")]',
     'request.path.split("/")',
     "test_a_relayed_answer_is_passed_on_as_it_is"),
    ("sk- keys share connections",
     'hashlib.sha256(request.key.encode("latin-1")).hexdigest()', '"0"',
     "test_no_two_accounts_share_a_connection"),
    ("a relayed call asks for compression",
     ', b"Accept-Encoding: identity"]\n    handles, watch', "]\n    handles, watch",
     "test_a_relayed_answer_is_passed_on_as_it_is"),
    ("a relayed answer is unpacked",
     "    call.handle.as_it_comes()", "    pass",
     "test_a_relayed_answer_is_passed_on_as_it_is"),
    ("an unproved key's connection is kept",
     "lines, None, kept=False)", "lines, None)",
     "test_junk_tokens_leave_nothing_and_reach_nothing"),
    ("a key is accepted when OpenAI's API is down",
     'if answer.status == 429 or answer.status >= 500:\n        raise refusal(answer.status, answer.headers, b"")\n\n\ndef _relayed',
     'if False:\n        raise refusal(answer.status, answer.headers, b"")\n\n\ndef _relayed',
     "test_wrong_tokens_of_callers_count_as_wrong_keys"),
    ("a response that could not be kept is said to be",
     'whole["store"] = wanted.echo["store"] = False', "pass",
     "test_a_full_disk_stops_only_what_must_be_kept"),
    ("what was said before has no limit",
     "if not kept or len(kept) > MAX_EARLIER:", "if False:",
     "test_a_kept_response_is_given_whole_and_not_gone_on_from"),
    ("what an earlier response called is forgotten",
     "self.calls: Calls = {} if calls is None else calls", "self.calls: Calls = {}",
     "test_a_response_is_gone_on_from_with_its_files_and_calls"),
    ("items may be named without end",
     "if self._found > MAX_REFERENCES or self._size > MAX_EARLIER:", "if False:",
     "test_items_that_are_named_again_and_again_are_read_once"),
    ("calls of a response are not remembered",
     "*as_items(rendering.request.messages, place), *items]", "*as_items(rendering.request.messages, place)]",
     "test_a_response_is_gone_on_from_with_its_files_and_calls"),
    ("a kept response is streamed as JSON",
     'if request.query.get("stream", "false") in ("false", "0"):', "if True:",
     "test_a_kept_response_is_told_again_as_events"),
    ("a deleted response is still there",
     "app.store.remove_response(id)", "pass",
     "test_a_response_is_gone_on_from_with_its_files_and_calls"),
    ("all accounts of a pool are asked for their models",
     "MAX_ASKED_FOR_MODELS = 20", "MAX_ASKED_FOR_MODELS = 20_000",
     "test_of_a_large_pool_a_few_accounts_of_every_plan_are_asked_for_models"),
    ("models of disabled accounts are listed",
     'able = [one for one in accounts if one.row.kind != LOGIN_FREE and one.row.state == "ready"]',
     "able = [one for one in accounts if one.row.kind != LOGIN_FREE]",
     "test_of_a_large_pool_a_few_accounts_of_every_plan_are_asked_for_models"),
    ("plans are left out of the list of models",
     "asked = list(dict.fromkeys([*plans.values(), *able]))", "asked = list(able)",
     "test_of_a_large_pool_a_few_accounts_of_every_plan_are_asked_for_models"),
    ("a model that nobody has is told of",
     "if id not in models and not _GPT.fullmatch(id):", "if False:",
     "test_models_are_those_of_the_accounts_and_the_aliases"),
    ("files have any purpose",
     "if purpose not in PURPOSES:", "if not isinstance(purpose, str):",
     "test_what_is_out_of_bounds_is_named_and_asked_of_nobody"),
    ("an API user lists everybody's files",
     "and scope.covers(one.owner)", "",
     "test_nobody_sees_anothers_files_and_responses"),
    ("a file of a user's is shown in the browser",
     '_as_file(file.name, "attachment")', '_as_file(file.name, "inline")',
     "test_a_file_is_downloaded_and_not_shown"),
    ("a file's name stands bare in a header",
     "{urllib.parse.quote(name, errors='replace')}", "{name}",
     "test_a_file_is_downloaded_and_not_shown"),
    ("a file's content may be sniffed for scripts",
     '"Content-Disposition": place, "X-Content-Type-Options": "nosniff"}', '"Content-Disposition": place}',
     "test_a_file_is_downloaded_and_not_shown"),
    ("images are drawn without number",
     "MAX_IMAGES = 4", "MAX_IMAGES = 400",
     "test_what_is_out_of_bounds_is_named_and_asked_of_nobody"),
    ("a form's number of images is not read",
     'if re.fullmatch("[0-9]{1,3}", count) else 0', 'if re.fullmatch("[0-9]{1,3}", count) else 1',
     "test_what_is_out_of_bounds_is_named_and_asked_of_nobody"),
    ("a mask is sent without a word",
     'body["mask"] = "The last', 'body["masks"] = "The last',
     "test_an_image_is_drawn_from_others"),
    ("no image at all is drawn",
     "if not 1 <= n <= MAX_IMAGES:", "if not 0 <= n <= MAX_IMAGES:",
     "test_what_is_out_of_bounds_is_named_and_asked_of_nobody"),
    ("streamed images come whole",
     '"must be false: the upstream gives images whole.")',
     '"must be false: the upstream gives images whole.") if False else ApiError("not_found", "")',
     "test_what_is_out_of_bounds_is_named_and_asked_of_nobody"),
    ("a size is any text",
     'if size not in (None, "auto") and not re.fullmatch(r"[1-9][0-9]{1,3}x[1-9][0-9]{1,3}", size):', "if False:",
     "test_what_is_out_of_bounds_is_named_and_asked_of_nobody"),
    ("a quality is any text",
     're.fullmatch(r"[a-z]{1,16}", quality)', 're.fullmatch(r".*", quality)',
     "test_what_is_out_of_bounds_is_named_and_asked_of_nobody"),
    ("an image's form is any",
     'if form not in ("url", "b64_json"):', "if False:",
     "test_what_is_out_of_bounds_is_named_and_asked_of_nobody"),
    ("images are drawn by login-free accounts",
     "request.guest, request.scope, True, request.base)", "request.guest, request.scope, False, request.base)",
     "test_login_free_accounts_neither_draw_nor_speak"),
    ("a drawing that did not come is not made up for",
     "for missing in (n, 1):", "for missing in (n,):",
     "test_images_are_drawn_side_by_side"),
    ("a format that the upstream has not is asked for",
     'SPEECH_FORMATS = ("mp3",', 'SPEECH_FORMATS = ("pcm", "mp3",',
     "test_what_is_out_of_bounds_is_named_and_asked_of_nobody"),
    ("a text of any length is read aloud",
     "MAX_SPOKEN = 4096", "MAX_SPOKEN = 4097",
     "test_what_is_out_of_bounds_is_named_and_asked_of_nobody"),
    ("any voice is asked for",
     "if voice not in VOICES and voice not in VOICES.values():", "if False:",
     "test_text_is_read_aloud"),
    ("speech as events is asked for and audio comes",
     'if body.get("stream_format") not in (None, "audio"):', "if False:",
     "test_what_is_out_of_bounds_is_named_and_asked_of_nobody"),
    ("what is read aloud is not what was asked",
     "if asked.account and _letters(_text_of(answer.events)) == _letters(text):", "if asked.account:",
     "test_text_is_read_aloud"),
    ("a transcription of any format is asked for",
     'if wanted not in ("json", "text", "verbose_json"):', "if False:",
     "test_what_is_out_of_bounds_is_named_and_asked_of_nobody"),
    ("a streamed transcription comes whole",
     'raise unfit("stream", "must be false: the upstream gives the text whole.")', "pass",
     "test_what_is_out_of_bounds_is_named_and_asked_of_nobody"),
    ("a recording's language may end its field",
     're.fullmatch(r"[A-Za-z-]{0,16}", language)', 're.fullmatch(r"(?s).{0,16}", language)',
     "test_what_is_out_of_bounds_is_named_and_asked_of_nobody"),
    ("a list of conversations has no largest limit",
     "MAX_CONVERSATIONS = 100", "MAX_CONVERSATIONS = 1000",
     "test_a_list_has_defaults_and_a_largest_limit"),
    ("an id changes the path of the upstream call",
     'urllib.parse.quote(value, safe="") for name, value in request.params',
     'urllib.parse.quote(value, safe="/?#%") for name, value in request.params',
     "test_no_id_changes_the_path_of_the_upstream_call"),
    ("any account is asked for a conversation that nobody is known to hold",
     "if len(signed_in) == 1:", "if signed_in:",
     "test_a_pool_asks_the_account_that_holds_the_conversation"),
    ("a conversation's id may be anything",
     'if identifier(one.get("id"))]', 'if one.get("id")]',
     "test_a_list_of_conversations_of_any_shape_is_merged"),
    ("a list's total may be anything",
     "if isinstance(told, (int, float)) and 0 <= told < 10**9 and more", "if isinstance(told, (int, float)) and more",
     "test_a_list_of_conversations_of_any_shape_is_merged"),
    ("an API user's list has everybody's conversations",
     "mine = [item for id, item in items.items() if id in own[account.id]]", "mine = list(items.values())",
     "test_api_users_keep_to_what_they_have_begun"),
    ("listed conversations are not remembered",
     "app.pool.hold(dict.fromkeys(items, Held(account.id)))", "pass",
     "test_a_pool_asks_the_account_that_holds_the_conversation"),
    ("the oldest conversations come first",
     "key=_updated, reverse=True)", "key=_updated)",
     "test_a_pools_list_has_all_conversations_in_order"),
    ("the offset is taken from every account",
     'items[offset : offset + limit], "total"', 'items[:limit], "total"',
     "test_a_pools_list_has_all_conversations_in_order"),
    ("the total is that of the page",
     '"total": sum(one[1] for one in found)', '"total": len(items)',
     "test_a_pools_list_has_all_conversations_in_order"),
    ("times of conversations are not read",
     "return moment.replace(tzinfo=moment.tzinfo or datetime.timezone.utc).timestamp()", "return 0.0",
     "test_a_pools_list_has_all_conversations_in_order"),
    ("any key clears everybody's conversations",
     '    if not request.admin:\n        text = "This changes', '    if False:\n        text = "This changes',
     "test_api_users_keep_to_what_they_have_begun"),
    ("all accounts' conversations go without a word",
     'if request.query.get("all_accounts") != "true":', "if False:",
     "test_all_conversations_of_a_pool_go_only_when_that_is_said"),
    ("clearing that failed for one account looks done",
     'return "" if answer.status < 300 else account.name', 'return ""',
     "test_clearing_needs_an_account_and_passes_over_those_that_are_set_aside"),
    ("a name that comes twice is passed on twice",
     "request.body = Blob(compact(body).encode())  #", "pass  #",
     "test_api_users_keep_to_what_they_have_begun"),
    ("auto_continue reaches the upstream",
     'if given.pop("auto_continue", None) else 0', 'if given.get("auto_continue") else 0',
     "test_a_native_turn_that_was_cut_for_length_is_gone_on_with_on_request"),
    ("an API user shows the model anybody's file",
     "        _check_files(app, request, given)", "        pass",
     "test_an_api_user_cannot_show_the_model_anothers_file"),
    ("a sign of life stands in the middle of an event",
     "quiet = self._between and not self._unsent", "quiet = not self._unsent",
     "test_signs_of_life_come_only_between_two_events"),
    ("a failure is part of the event before it",
     "self.write(last if self._between else self._stream.end + last, 1)", "self.write(last, 1)",
     "test_a_failure_in_the_middle_of_an_event_is_an_event_of_its_own"),
    ("agents connect from any site",
     "if origin is not None and not _AGENT_ORIGIN.fullmatch(origin):", "if False:",
     "test_nobody_volunteers_as_an_agent_without_the_key"),
    ("an origin is trusted by its beginning",
     "not _AGENT_ORIGIN.fullmatch(origin)", "not _AGENT_ORIGIN.match(origin)",
     "test_nobody_volunteers_as_an_agent_without_the_key"),
    ("a time past all calendars is a traceback",
     "moment = min(max(moment, 0.0), LAST_MOMENT)", "pass",
     "test_odd_rows_of_the_store_are_survived"),
    ("an old token is exchanged for its successor",
     "if not hmac.compare_digest(account.row.secret.encode(), row.secret.encode()):", "if False:",
     "test_a_token_is_exchanged_for_its_owner"),
    ("any key stores an account by its password",
     'if body.get("store") is True and not request.admin:', "if False:",
     "test_only_the_administrator_stores_an_account_by_its_password"),
    ("an account is stored by anybody",
     "app.keys.admit_admin(request, sessions=False)", "pass",
     "test_only_the_administrator_stores_an_account_by_its_password"),
    ("any number of accounts is checked at once",
     "MAX_LISTED, MAX_CHECKED = 500, 100", "MAX_LISTED, MAX_CHECKED = 500, 100_000",
     "test_accounts_are_disabled_enabled_removed_and_checked"),
    ("a list of accounts has no largest limit",
     "MAX_LISTED, MAX_CHECKED = 500, 100", "MAX_LISTED, MAX_CHECKED = 500_000, 100",
     "test_the_list_tells_who_did_what"),
    ("accounts list --json prints the token",
     '"workspace": row.workspace}', '"workspace": row.secret}',
     "no_command_prints_a_token"),
    ("a user's whole hash is listed",
     'f"***{user.token_hash[:6]}"', 'f"***{user.token_hash}"',
     "test_an_api_users_token_cannot_be_guessed_or_found_again"),
    ("any number of accounts is named",
     "most: int = 10_000)", "most: int = 10_000_000)",
     "test_an_administrator_names_accounts_of_the_pool_alone"),
    ("an administrator reaches callers' own accounts",
     "if (one := app.pool.find(id)) and not one.row.guest]", "if (one := app.pool.find(id))]",
     "test_an_administrator_names_accounts_of_the_pool_alone"),
    ("an upload without a token succeeds",
     "if added.faults and not added.rows:", "if False:",
     "test_tokens_are_uploaded_as_chat2api_does_it"),
    ("lines of an upload that are no tokens are not told",
     '{"known": added.known, "faults": added.faults}', '{"known": added.known, "faults": []}',
     "test_tokens_are_uploaded_as_chat2api_does_it"),
    ("disabled accounts count as failed",
     'in ("expired", "dead")]\n', 'in ("ready", "expired", "dead")]\n',
     "test_the_pool_is_looked_after_as_chat2api_does_it"),
    ("disabled may be any word",
     'check_types(body := request.json(), {"disabled": _FLAG})', "body = request.json()",
     "test_an_administrator_names_accounts_of_the_pool_alone"),
    ("a user's limit has no bounds",
     "if limit is not None and not 0 <= limit <= MAX_REQUESTS:", "if limit is not None and limit < 0:",
     "test_an_api_users_token_cannot_be_guessed_or_found_again"),
    ("a removed user goes on until the next second",
     'raise ApiError("not_found", "There is no such user.")\n    app.keys.reload()',
     'raise ApiError("not_found", "There is no such user.")',
     "test_users_are_administered_as_chatgpt_api_server_does_it"),
    ("health tells no states",
     '"accounts": states}', '"accounts": {}}',
     "test_health_tells_the_version_and_metrics_their_form"),
    ("readiness knows nothing of the store",
     "if app.store.trouble:\n        return", "if False:\n        return",
     "test_a_full_disk_stops_only_what_must_be_kept"),
    ("metrics are no Prometheus text",
     'content_type="text/plain; version=0.0.4; charset=utf-8"', 'content_type="text/html"',
     "test_health_tells_the_version_and_metrics_their_form"),
    ("a page talks to anybody",
     '"connect-src": "\'self\'",', '"connect-src": "*",',
     "test_a_page_runs_its_own_script_and_talks_to_nobody_else"),
    ("a page runs any script",
     'policy[name] = f"\'sha256-', 'policy[name] = f"\'unsafe-inline\' \'sha256-',
     "test_the_pages_are_closed_to_others"),
    ("a page's script is not the one in its policy",
     "hashlib.sha256(text.encode()).digest()).decode()}", "hashlib.sha256(title.encode()).digest()).decode()}",
     "test_a_page_runs_its_own_script_and_talks_to_nobody_else"),
    ("a page's forms go anywhere",
     '("base-uri", "form-action", "frame-ancestors",', '("base-uri", "frame-ancestors",',
     "test_a_page_runs_its_own_script_and_talks_to_nobody_else"),
    ("a page may be framed",
     '"form-action", "frame-ancestors", ', '"form-action", ',
     "test_the_pages_are_closed_to_others"),
    ("a page takes markup from text",
     'policy["require-trusted-types-for"] = "\'script\'"', "pass",
     "test_a_page_runs_its_own_script_and_talks_to_nobody_else"),
    ("a page tells others where it was",
     '"Referrer-Policy": "no-referrer",', '"Referrer-Policy": "unsafe-url",',
     "test_a_page_runs_its_own_script_and_talks_to_nobody_else"),
    ("the demo answers on expired tokens",
     'expired = claims(key)["exp"] < time.time()', 'expired = claims(key)["exp"] < 0',
     "test_the_demo_is_as_strict_as_what_it_stands_for"),
    ("the demo's requirements never end",
     "difficulty = issued\n        if time.monotonic() > end:", "difficulty = issued\n        if False:",
     "test_the_demo_is_as_strict_as_what_it_stands_for"),
    ("the demo takes a requirements token twice",
     "issued = self._issued.pop(headers.get(", "issued = self._issued.get(headers.get(",
     "test_the_demo_is_as_strict_as_what_it_stands_for"),
    ("the demo checks no proof",
     'if issued is None or not self._proved(issued, headers.get("openai-sentinel-proof-token", "")):',
     "if issued is None:",
     "test_the_demo_is_as_strict_as_what_it_stands_for"),
    ("a damaged database is a traceback",
     "        except StoreUnavailable as error:\n            fail(",
     "        except KeyError as error:\n            fail(",
     "test_a_store_that_cannot_be_used_is_said_in_one_line"),
    ("the umask stays as it was", "os.umask(0o077)", "pass", "test_what_a_server_makes_is_its_owners_alone"),
    ("cookies are lost at the end",
     "app.pool.keep_told()\n        app.ledger", "app.ledger",
     "test_what_was_counted_is_stored_at_the_end"),
    ("counts are not saved at the end", "app.ledger.save()", "pass", "what_was_counted_outlives_an_orderly_end"),
    ("what was counted last is lost at the end",
     "app.ledger.save()\n        store.close()", "store.close()",
     "test_what_was_counted_is_stored_at_the_end"),
    ("a second SIGTERM is not heard", "os._exit(1)", "pass", "test_a_second_sigterm_ends_at_once"),
    ("accounts add prints the token",
     "{row.id}  {row.kind:10}  {row.email or '-'}  {row.plan or '-'}",
     "{row.id}  {row.secret}  {row.email or '-'}  {row.plan or '-'}",
     "no_command_prints_a_token"),
    ("tokens that another program gave up are imported",
     "if line.strip() and line not in dead]", "if line.strip()]",
     "tokens_are_imported_from_what_other_programs_keep"),
    ("an export includes callers' own accounts",
     'rows = opened(settings).accounts("guest=0")', "rows = opened(settings).accounts()",
     "an_export_is_a_new_file_of_ones_own"),
    ("an export to standard output prints tokens",
     'if file == "-":\n        fail(', 'if file == "--":\n        fail(',
     "an_export_is_a_new_file_of_ones_own"),
    ("an export enables disabled accounts",
     'kept |= {"disabled": True} if', 'kept |= {"disabled": False} if',
     "an_export_is_a_new_file_of_ones_own"),
    ("accounts list prints the token",
     "{row.email or '-':30}  {row.plan or '-':6}", "{row.secret or '-':30}  {row.plan or '-':6}",
     "no_command_prints_a_token"),
    ("accounts check prints the token",
     "{row.email or '-':30}  {said}", "{row.secret or '-':30}  {said}",
     "no_command_prints_a_token"),
    ("accounts check ends well although one does not work",
     "if any(results.values()):", "if False:",
     "accounts_are_checked_one_call_each"),
    ("removing what is not there is no error",
     "if missing := [id for id in gone if not gone[id]]:", "if missing := []:",
     "accounts_are_added_listed_and_removed"),
    ("a browser's sign-in may be another's",
     'if request.path != "/auth/callback" or not own:', 'if request.path != "/auth/callback":',
     "test_a_person_signs_in_with_the_browser"),
    ("what a client does not read is fetched on",
     "elif self._outlet is not None and self._outlet.full:", "elif False:",
     "test_what_a_client_does_not_read_is_not_fetched"),
    ("a client that reads nothing is waited for",
     "if now - self._last > SEND_TIMEOUT:", "if False:",
     "test_a_client_that_reads_nothing_at_all_is_left"),
    ("a connection without a request keeps its thread",
     "if not self.wire.lingers(LINGER):\n                    return True", "if False:\n                    return True",
     "test_connections_without_a_request_have_no_thread"),
    ("an idle connection stays open for ever",
     "if now - self._waits > self.server.settings.read_timeout:", "if False:",
     "test_an_idle_connection_is_closed_in_time"),
    ("a hang-up is noticed at the next write alone",
     "if events & _HUNG_UP and self._watch.hung_up():", "if False:",
     "test_a_client_that_hangs_up_ends_its_answer_at_once"),
    ("a limit ends an answer in the loop",
     "if sink.careful and not sink.light(light):", "if False:",
     "test_what_waits_or_takes_long_is_never_the_loops"),
    ("a decision in mid-stream is the loop's",
     "_LIGHT.issuperset(map(type, events))", "True",
     "test_a_decision_in_mid_stream_is_made_while_the_loop_is_full"),
]  # fmt: skip
MUTANT_TIME = 120  # seconds after which a fault is noticed: by a hang


def changed_lines() -> set[int]:
    """The lines of the program that are not committed yet."""
    diff = subprocess.run(
        ["git", "diff", "-U0", "HEAD", "--", SCRIPT.name],
        cwd=HERE,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    found: set[int] = set()
    for start, count in re.findall(r"^@@ -\S+ \+(\d+)(?:,(\d+))? @@", diff, re.MULTILINE):
        found.update(range(int(start), int(start) + int(count or 1)))
    return found


def lines_of(program: str, text: str) -> set[int]:
    """The lines that a text stands in."""
    first = program[: program.index(text)].count("\n") + 1
    return set(range(first, first + text.count("\n") + 1))


def notices(mutant: tuple[str, str, str, str]) -> str:
    """What became of a fault: noticed, unnoticed, or why that cannot be told."""
    _, old, new, tests = mutant
    program = SCRIPT.read_text()
    if program.count(old) != 1:
        return f"its text stands in the program {program.count(old)} times"
    folder = pathlib.Path(tempfile.gettempdir()) / f"mutants-{os.getuid()}-{os.getpid()}"
    if not folder.exists():  # one a worker, so that the tests are compiled once
        folder.mkdir(mode=0o700)
        shutil.copy(__file__, folder)
    (folder / SCRIPT.name).write_text(program.replace(old, new))
    if not (child := os.fork()):
        run_tests(folder, tests)
    end = time.monotonic() + MUTANT_TIME
    code = 1
    while time.monotonic() < end:
        done, wait = os.waitpid(child, os.WNOHANG)
        if done:
            code = os.waitstatus_to_exitcode(wait)
            break
        time.sleep(0.02)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child, signal.SIGKILL)
    return {0: "unnoticed", 1: "noticed", 2: "noticed"}.get(code, f"pytest ended with {code}: no such test?")


def run_tests(folder: pathlib.Path, tests: str) -> None:
    """Runs some tests of a copy in this process, which ends with pytest's code: what they import is here already."""
    os.setsid()
    nothing = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1, 2):
        os.dup2(nothing, descriptor)
    os.chdir(folder)
    sys.path.insert(0, str(folder))
    del sys.modules["chatproxy"]
    code: int = 2
    with contextlib.suppress(BaseException):
        sys.dont_write_bytecode = True  # two faults of one size within a second would be taken for one
        importlib.import_module("chatproxy")
        sys.dont_write_bytecode = False
        code = pytest.main(["-x", "-q", "-p", "no:cacheprovider", "-k", tests, pathlib.Path(__file__).name])
    os._exit(code)


def mutants(argv: list[str]) -> None:
    """Tries the faults, two at a time; exit status 1 when fewer than 95 % are noticed."""
    parser = argparse.ArgumentParser(prog="mutants", description="Tries faults that the tests must notice.")
    parser.add_argument("--fast", action="store_true", help="only those in lines that are not committed")
    parser.add_argument("-k", default="", metavar="WORD", help="only those with this in their name")
    chosen = parser.parse_args(argv)
    tried = [mutant for mutant in MUTANTS if chosen.k in mutant[0]]
    if chosen.fast:
        changed, program = changed_lines(), SCRIPT.read_text()
        tried = [one for one in tried if one[1] not in program or lines_of(program, one[1]) & changed]
    noticed = 0
    with multiprocessing.get_context("fork").Pool(2) as pool:
        for mutant, result in zip(tried, pool.imap(notices, tried), strict=True):
            noticed += result == "noticed"
            if result != "noticed":
                print(f"{mutant[0]}: {result}", flush=True)
    for folder in pathlib.Path(tempfile.gettempdir()).glob(f"mutants-{os.getuid()}-*"):
        shutil.rmtree(folder, ignore_errors=True)
    share = noticed / max(1, len(tried))
    print(f"{noticed} of {len(tried)} faults noticed ({share:.1%})")
    raise SystemExit(share < 0.95)


def test_every_fault_has_its_place_and_its_tests() -> None:
    program, names = (
        SCRIPT.read_text(),
        set(re.findall(r"(?m)^def (test_\w+)", pathlib.Path(__file__).read_text())),
    )
    assert len(MUTANTS) >= 200
    for name, old, new, tests in MUTANTS:
        assert program.count(old) == 1 and old != new, name
        assert all(any(word in one for one in names) for word in tests.partition(" and ")[0].split(" or ")), (
            name
        )


# --- the benchmark ---------------------------------------------------------------------------------------------------
#
# Three parties, each in a process of its own: a stand-in for the upstream (one asyncio.Protocol, its bytes made
# beforehand), the daemon, and the load client (one epoll loop). nginx relaying the same stream is the yardstick where
# it is installed. CPU time is the kernel's own count for the daemon and its children. Linux only.

BENCH_KEY = "bench-key"
MARK = b"lorem"  # every word of an answer begins with it, so a word is found without parsing
CONVERSATION = "/backend-api/conversation"
TICKS = os.sysconf("SC_CLK_TCK")
LOCAL = "127.0.0.1"


# --- the stand-in for the upstream ------------------------------------------------------------------------


def frame(data: bytes) -> bytes:
    """One HTTP chunk."""
    return b"%x\r\n%b\r\n" % (len(data), data)


def reply(status: str, kind: str, body: bytes) -> bytes:
    """A whole HTTP answer of known length."""
    return f"HTTP/1.1 {status}\r\nContent-Type: {kind}\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body


def delta(value: dict[str, Any]) -> bytes:
    """One event of the v1 encoding."""
    return b"event: delta\ndata: %b\n\n" % json.dumps(value, separators=(",", ":")).encode()


class Script:
    """One answer, its bytes made once for all streams: `words=N pace=SECONDS first=SECONDS flush=1`.

    Every event is an HTTP chunk. They leave in one write; with `flush` each in a write of its own, one a turn
    of the loop; with a pace each word `pace` seconds after the other. `first` delays the first word.
    """

    def __init__(self, text: str) -> None:
        given = dict(pair.split("=", 1) for pair in text.split() if "=" in pair)
        self.pace, self.first = float(given.get("pace", 0)), float(given.get("first", 0))
        kind = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream; charset=utf-8\r\n"
        self.head = kind + b"Transfer-Encoding: chunked\r\n\r\n" + b"".join(self.opening(text))
        self.steps = [frame(self.word(n)) for n in range(int(given.get("words", 1)))]
        ending = b"".join(self.ending()) + b"0\r\n\r\n"
        if self.pace or self.first or "flush" in given:
            self.steps[-1] += ending
        else:
            self.head += b"".join(self.steps) + ending
            self.steps = []

    def word(self, number: int) -> bytes:
        """The event of a word."""
        first = {"p": "/message/content/parts/0", "o": "append", "v": "lorem"}
        return delta({"v": f" lorem{number % 97}"} if number else first)

    def opening(self, text: str) -> list[bytes]:
        """What comes before the first word: the encoding, the user's message, the start of the answer."""
        events = [b'event: delta_encoding\ndata: "v1"\n\n']
        for role, said, status in (("user", text, "finished_successfully"), ("assistant", "", "in_progress")):
            message: dict[str, Any] = {"id": f"00000000-0000-4000-8000-{len(role):012}"}
            message |= {"author": {"role": role}, "create_time": 1.8e9, "status": status, "end_turn": None}
            message["content"] = {"content_type": "text", "parts": [said]}
            message |= {"recipient": "all", "channel": None, "metadata": {"model_slug": "gpt-4o"}}
            value = {"message": message, "conversation_id": "00000000-0000-4000-8000-000000000001"}
            events.append(delta({"p": "", "o": "add", "v": value | {"error": None}}))
        return [frame(event) for event in events]

    def ending(self) -> list[bytes]:
        """The finishing patch and what follows it."""
        done: list[dict[str, Any]] = [{"p": "/message/status", "o": "replace", "v": "finished_successfully"}]
        done.append({"p": "/message/end_turn", "o": "replace", "v": True})
        done.append({"p": "/message/metadata", "o": "append", "v": {"finish_details": {"type": "stop"}}})
        complete = b'data: {"type":"message_stream_complete"}\n\n'
        return [frame(delta({"p": "", "o": "patch", "v": done})), frame(complete), frame(b"data: [DONE]\n\n")]


class CodexScript(Script):
    """The same as the Codex backend has it."""

    ITEM = {
        "id": f"msg_{'0' * 50}",
        "type": "message",
        "status": "in_progress",
        "role": "assistant",
        "content": [],
    }
    PLACE = {"item_id": ITEM["id"], "output_index": 0, "content_index": 0}

    @staticmethod
    def event(kind: str, **facts: Any) -> bytes:
        """One event."""
        told = json.dumps({"type": kind} | facts, separators=(",", ":")).encode()
        return b"event: %b\ndata: %b\n\n" % (kind.encode(), told)

    def word(self, number: int) -> bytes:
        text = f" lorem{number % 97}" if number else "lorem"
        more = {
            "delta": text,
            "logprobs": [],
            "obfuscation": "UhEfsZjZrAcLxBp",
            "sequence_number": number + 4,
        }
        return self.event("response.output_text.delta", **self.PLACE, **more)

    def opening(self, text: str) -> list[bytes]:
        response = {
            "id": f"resp_{'0' * 50}",
            "object": "response",
            "status": "in_progress",
            "model": "gpt-5.5",
        }
        part = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
        events = [
            self.event("response.created", sequence_number=0, response=response),
            self.event("response.in_progress", sequence_number=1, response=response),
            self.event("response.output_item.added", sequence_number=2, output_index=0, item=self.ITEM),
            self.event("response.content_part.added", sequence_number=3, part=part, **self.PLACE),
        ]
        return [frame(event) for event in events]

    def ending(self) -> list[bytes]:
        part = {"type": "output_text", "text": "all of it", "annotations": [], "logprobs": []}
        item = self.ITEM | {"status": "completed", "content": [part]}
        usage = {"input_tokens": 9, "output_tokens": 9, "total_tokens": 18}
        response = {
            "id": f"resp_{'0' * 50}",
            "status": "completed",
            "model": "gpt-5.5",
            "output": [],
            "usage": usage,
        }
        events = [
            self.event("response.output_item.done", sequence_number=90_000, output_index=0, item=item),
            self.event("response.completed", sequence_number=90_001, response=response),
        ]
        return [frame(event) for event in events]


class Ticker:
    """Drives all streams of one pace with one timer; slots 5 ms apart keep them from bursting together."""

    def __init__(self, pace: float) -> None:
        self.slots: list[list[Iterator[bool]]] = [[] for _ in range(max(1, round(pace / 0.005)))]
        self.step = pace / len(self.slots)
        self.turn = self.joined = self.streams = 0
        self.due = 0.0

    def join(self, stream: Iterator[bool]) -> None:
        """Adds a stream; starts the timer when it is the first."""
        self.slots[self.joined % len(self.slots)].append(stream)
        self.joined += 1
        self.streams += 1
        if self.streams == 1:
            self.due = time.monotonic() + self.step
            asyncio.get_running_loop().call_at(self.due, self.tick)

    def tick(self) -> None:
        """One event for every stream of the slot whose turn it is."""
        slot = self.slots[self.turn]
        kept = [stream for stream in slot if next(stream, False)]
        self.streams -= len(slot) - len(kept)
        self.slots[self.turn] = kept
        self.turn = (self.turn + 1) % len(self.slots)
        self.due += self.step
        if self.streams:
            asyncio.get_running_loop().call_at(self.due, self.tick)


class Standin:
    """What the stand-in's connections share: scripts, tickers, and what `/control?name=value` changes."""

    def __init__(self, latency: float = 0.0) -> None:
        self.state: dict[str, Any] = {"difficulty": "0fffff", "latency": latency}
        self.counts = {"page": 0, "requirements": 0, "hard": 0, "conversation": 0, "conduit": 0, "unknown": 0}
        self.counts["codex"] = 0
        self.scripts: dict[tuple[type[Script], bytes], Script] = {}
        models = {"models": [{"slug": "gpt-5.5", "visibility": "list"}]}
        self.models = reply("200 OK", "application/json", json.dumps(models).encode())
        self.tickers: dict[float, Ticker] = {}
        page = b'<html data-build="prod-bench"><script src="https://chatgpt.com/a.js"></script></html>'
        self.page = reply("200 OK", "text/html", page)
        self.missing = reply("404 Not Found", "application/json", b'{"detail":"Not Found"}')
        self.control("")

    def control(self, query: str) -> bytes:
        """Changes difficulty or latency for the calls that follow; answers the counts."""
        for name, _, value in (pair.partition("=") for pair in query.split("&")):
            self.state[name] = value
        self.latency = float(self.state["latency"])
        self.hard = self.state["difficulty"] < "0f"
        work = {"required": True, "seed": "0.42424242", "difficulty": self.state["difficulty"]}
        off = {"required": False, "dx": None}
        body = {"persona": "chatgpt-paid", "token": "gAAAAAB" + "t" * 600, "expire_after": 540}
        body.update(proofofwork=work, arkose=off, turnstile=off)
        body["prepare_token"] = body["token"]
        self.requirements = reply("200 OK", "application/json", json.dumps(body).encode())
        self.granted = reply(
            "200 OK", "application/json", b'{"token":"' + b"t" * 600 + b'","expire_after":540}'
        )
        self.conduit = reply("200 OK", "application/json", b'{"status":"ok","conduit_token":null}')
        return reply("200 OK", "application/json", json.dumps(self.counts).encode())

    def script(self, body: bytes, kind: type[Script] = Script) -> Script:
        """The script that the last user message of a body asks for."""
        at = body.rfind(b"words=")
        text = body[at : body.find(b'"', at)] if at >= 0 else b"words=1"
        if (kind, text) not in self.scripts:
            self.scripts[kind, text] = kind(text.decode())
        return self.scripts[kind, text]

    def stream(self, transport: asyncio.Transport, script: Script) -> None:
        """Sends an answer, now or step by step."""
        loop = asyncio.get_running_loop()

        def stepping() -> Iterator[bool]:
            for step in script.steps:
                if not transport.is_closing():
                    transport.write(step)
                    yield True

        def flush() -> None:
            if next(steps, False):
                loop.call_soon(flush)

        transport.write(script.head)
        steps = stepping()
        if script.pace:
            ticker = self.tickers.setdefault(script.pace, Ticker(script.pace))
            loop.call_later(script.first, ticker.join, steps)
        elif script.steps:
            loop.call_later(script.first, flush)


class StandinConnection(asyncio.Protocol):
    """One keep-alive connection to the stand-in; reads no more of a request than it needs."""

    transport: asyncio.Transport

    def __init__(self, upstream: Standin) -> None:
        self.site = upstream
        self.buffer = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        self.buffer += data
        while (end := self.buffer.find(b"\r\n\r\n")) >= 0:
            head = self.buffer[:end].lower()
            at = head.find(b"content-length:")
            size = int(head[at + 15 :].split(b"\r", 1)[0]) if at >= 0 else 0
            if len(self.buffer) < end + 4 + size:
                return
            body, self.buffer = self.buffer[end + 4 : end + 4 + size], self.buffer[end + 4 + size :]
            method, path = head.split(b" ", 2)[:2]
            if self.site.latency:
                loop = asyncio.get_running_loop()
                loop.call_later(self.site.latency, self.answer, method, path, body)
            else:
                self.answer(method, path, body)

    def answer(self, method: bytes, path: bytes, body: bytes) -> None:
        """One call of the upstream's API."""
        up, post = self.site, method == b"post"
        if post and path.endswith(b"/conversation"):
            up.counts["conversation"] += 1
            up.stream(self.transport, up.script(body))
        elif post and path.endswith(b"/codex/responses"):
            up.counts["codex"] += 1
            up.stream(self.transport, up.script(body, CodexScript))
        elif path.startswith(b"/backend-api/codex/models"):
            self.transport.write(up.models)
        elif post and path.endswith((b"/sentinel/chat-requirements", b"/sentinel/chat-requirements/prepare")):
            up.counts["hard" if up.hard else "requirements"] += 1
            self.transport.write(up.requirements)
        elif post and path.endswith(b"/sentinel/chat-requirements/finalize"):
            self.transport.write(up.granted)
        elif post and path.endswith(b"/f/conversation/prepare"):
            up.counts["conduit"] += 1
            self.transport.write(up.conduit)
        elif path == b"/":
            up.counts["page"] += 1
            self.transport.write(up.page)
        elif path.startswith(b"/control"):
            self.transport.write(up.control(path.decode().partition("?")[2]))
        else:
            up.counts["unknown"] += 1
            self.transport.write(up.missing)


def run_standin(port: int, latency: float = 0.0) -> None:
    """Serves the stand-in until it is ended or its parent is gone."""

    async def serve() -> None:
        loop, parent, upstream = asyncio.get_running_loop(), os.getppid(), Standin(latency)
        await loop.create_server(lambda: StandinConnection(upstream), LOCAL, port, backlog=4096)
        while os.getppid() == parent:
            await asyncio.sleep(0.5)

    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    asyncio.run(serve())


# --- the load client --------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Load:
    """`connections` keep-alive connections, each sending the same request `requests` times in turn."""

    port: int
    path: str
    body: str
    words: int
    stream: bool = True
    connections: int = 1
    requests: int = 1
    pause: float = 0.0  # seconds between an answer and the next request of its connection
    ramp: float = 0.0  # seconds over which the connections begin
    limit: float = 60.0  # seconds for everything
    end: str = "data: [DONE]"  # what the last event of a stream has

    def wire(self) -> bytes:
        """The request's bytes."""
        head = f"POST {self.path} HTTP/1.1\r\nHost: 127.0.0.1\r\nAuthorization: Bearer {BENCH_KEY}\r\n"
        head += f"Content-Type: application/json\r\nContent-Length: {len(self.body)}\r\n\r\n"
        return (head + self.body).encode()


class Lane:
    """One connection of the client and the answer that it is reading; times are seconds of perf_counter."""

    def __init__(self, requests: int) -> None:
        self.sock: socket.socket | None = None
        self.left = requests
        self.state = "idle"  # or connecting, reading
        self.reset(0.0)

    def reset(self, now: float) -> None:
        """Ready for an answer to a request sent now."""
        self.parts: list[bytes] = []
        self.size, self.need = 0, -1  # bytes so far; bytes of the whole answer, 0: chunked, -1: head not read
        self.tail = b""
        self.sent, self.byte, self.token, self.last = now, 0.0, 0.0, 0.0
        self.gaps: list[float] = []  # between two arrivals

    def take(self, data: bytes, now: float) -> bool:
        """Reads on; true when the answer is whole. Runs once per event."""
        self.parts.append(data)
        self.size += len(data)
        if self.token:
            self.gaps.append(now - self.last)
        elif MARK in data:
            self.token = now
        self.last = now
        if self.need < 0:
            self.byte = self.byte or now
            head, end, _ = b"".join(self.parts).partition(b"\r\n\r\n")
            if not end:
                return False
            length = head.lower().partition(b"content-length:")[2].split(b"\r", 1)[0]
            self.need = len(head) + 4 + int(length) if length else 0
        self.tail = data[-7:] if len(data) > 6 else (self.tail + data)[-7:]
        return self.size >= self.need if self.need else self.tail == b"\r\n0\r\n\r\n"


def dechunked(data: bytes) -> bytes:
    """An HTTP answer's body without its chunk framing."""
    parts, rest = [], data.partition(b"\r\n\r\n")[2]
    while rest:
        size, _, rest = rest.partition(b"\r\n")
        parts.append(rest[: int(size, 16)])
        rest = rest[int(size, 16) + 2 :]
    return b"".join(parts)


class LoadClient:
    """Runs a load in one epoll loop."""

    def __init__(self, load: Load) -> None:
        self.load, self.wire = load, load.wire()
        self.epoll = select.epoll()
        self.lanes: dict[int, Lane] = {}
        self.due: list[tuple[float, int, Lane]] = []
        self.failures: list[str] = []
        self.done = self.events = 0
        self.times: dict[str, list[float]] = {"byte": [], "token": [], "latency": [], "gap": [0.0]}

    def run(self) -> dict[str, Any]:
        """Counts, and times in seconds."""
        load, start = self.load, time.perf_counter()
        for number in range(load.connections):
            begin = start + load.ramp * number / load.connections
            heapq.heappush(self.due, (begin, number, Lane(load.requests)))
        total = load.connections * load.requests
        now = start
        while self.done + len(self.failures) < total and now < start + load.limit:
            wait = min(0.2, max(0.0, self.due[0][0] - now)) if self.due else 0.2
            ready = self.epoll.poll(wait)
            now = time.perf_counter()
            for fd, _ in ready:
                self.ready(fd, self.lanes[fd], now)
            while self.due and self.due[0][0] <= now:
                self.begin(heapq.heappop(self.due)[2])
        missing = total - self.done - len(self.failures)
        self.failures += ["unfinished at the time limit"] * missing
        return self.report(now - start)

    def report(self, wall: float) -> dict[str, Any]:
        """What a load found, as JSON values."""
        times = {name: sorted(values) or [0.0] for name, values in self.times.items()}
        found: dict[str, Any] = {"requests": self.done, "events": self.events, "wall": wall}
        found |= {"failures": len(self.failures), "failure": (self.failures or [""])[0]}
        for name in ("byte", "token", "latency"):
            found[name] = median(times[name])
        for name in ("byte", "gap"):
            found[f"{name}_p99"] = times[name][int(len(times[name]) * 0.99)]
        return found | {"gap": times["gap"][-1], "client_cpu": time.process_time()}

    def begin(self, lane: Lane) -> None:
        """Sends the lane's next request, on a new connection when it has none."""
        lane.reset(time.perf_counter())
        lane.state = "reading" if lane.sock else "connecting"
        if lane.sock:
            with contextlib.suppress(OSError):  # reading will tell
                lane.sock.sendall(self.wire)  # small beside a socket's buffer: never blocks
            return
        lane.sock = socket.socket()
        lane.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        lane.sock.setblocking(False)
        lane.sock.connect_ex((LOCAL, self.load.port))
        self.lanes[lane.sock.fileno()] = lane
        self.epoll.register(lane.sock.fileno(), select.EPOLLOUT)

    def ready(self, fd: int, lane: Lane, now: float) -> None:
        """A socket is connected, or has bytes, or is gone."""
        assert lane.sock
        try:
            if lane.state == "connecting":
                lane.sock.sendall(self.wire)
                lane.state = "reading"
                self.epoll.modify(fd, select.EPOLLIN)
                return
            data = lane.sock.recv(262144)
        except OSError as error:
            self.finish(lane, now, str(error))
            return
        if lane.state == "idle":  # closed between two requests, as a server may
            self.close(lane)
        elif not data:
            self.finish(lane, now, f"the connection was closed after {b''.join(lane.parts)[-200:]!r}")
        elif lane.take(data, now):
            self.finish(lane, now, "")

    def close(self, lane: Lane) -> None:
        """Drops the lane's connection; its next request opens another."""
        if lane.sock:
            del self.lanes[lane.sock.fileno()]
            lane.sock.close()
            lane.sock = None

    def finish(self, lane: Lane, now: float, failure: str) -> None:
        """Checks a whole answer, or notes why there is none, and plans the lane's next request."""
        body, load = b"".join(lane.parts), self.load
        words = body.count(MARK)
        if words < load.words and not failure and not lane.need:
            words = dechunked(body).count(MARK)  # a relay may end a chunk anywhere
        if not failure and not body.startswith(b"HTTP/1.1 200 "):
            failure = body[:500].decode("latin-1")
        if not failure and (words < load.words or (load.stream and load.end.encode() not in body)):
            failure = f"{words} words of {load.words}, ends {body[-80:]!r}"
        if failure:
            self.failures.append(failure)
        else:
            self.done += 1
            self.events += body.count(b"data: ") if load.stream else 0
            for name, value in (("byte", lane.byte), ("token", lane.token), ("latency", now)):
                self.times[name].append((value or now) - lane.sent)
            self.times["gap"] += lane.gaps
        if failure or b"\r\nconnection: close" in body[:1000].lower():
            self.close(lane)
        lane.state = "idle"
        lane.left -= 1
        lane.parts = []
        if lane.left:
            heapq.heappush(self.due, (now + load.pause, id(lane), lane))


# --- the processes of a run -------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Process:
    """A process that listens."""

    pid: int
    port: int

    def cpu(self) -> float:
        """Seconds of CPU time of the process and its children, the ended ones included."""
        stats: dict[int, list[str]] = {}
        for path in pathlib.Path("/proc").glob("[0-9]*/stat"):
            with contextlib.suppress(OSError):
                stats[int(path.parent.name)] = path.read_text().rpartition(")")[2].split()
        family, total = [self.pid], 0.0
        for parent in family:  # grows while it is walked
            family += [pid for pid, fields in stats.items() if int(fields[1]) == parent]
            with contextlib.suppress(OSError, KeyError):
                total += sum(map(int, stats[parent][13:15])) / TICKS  # children that have ended
                total += time.clock_gettime(~parent << 3 | 2)  # clock_getcpuclockid(3): utime + stime in ns
        return total

    def memory(self) -> float:
        """Peak resident memory of the process in MB."""
        status = pathlib.Path(f"/proc/{self.pid}/status").read_text()
        return int(status.split("VmHWM:")[1].split()[0]) / 1024

    def get(self, path: str) -> tuple[int, bytes]:
        """One GET request."""
        connection = http.client.HTTPConnection(LOCAL, self.port, timeout=10)
        with contextlib.closing(connection):
            connection.request("GET", path, headers={"Authorization": f"Bearer {BENCH_KEY}"})
            response = connection.getresponse()
            return response.status, response.read()

    def wait(self, path: str, log: pathlib.Path | None = None) -> None:
        """Returns when the server answers with less than 500; SystemExit after 10 s."""
        end = time.monotonic() + 10
        while time.monotonic() < end:
            with contextlib.suppress(OSError, http.client.HTTPException):
                if self.get(path)[0] < 500:
                    return
            time.sleep(0.005)
        raise SystemExit(f"bench: nothing answers on port {self.port}\n{log.read_text() if log else ''}")


def free_port() -> int:
    """A port below the range from which the kernel serves the load client's own."""
    for port in range(18000 + os.getpid() % 900, 19000):
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((LOCAL, port))
            return port
    raise SystemExit("bench: no free port between 18000 and 19000")


def fork(target: Callable[..., object], *args: object) -> Any:
    """A process of our own, ended with us. A fork, since a new interpreter would import all of this again."""
    process = multiprocessing.get_context("fork").Process(target=target, args=args, daemon=True)
    process.start()
    return process


@contextlib.contextmanager
def standin(latency: float = 0.0) -> Iterator[Process]:
    """The stand-in, listening."""
    port = free_port()
    process = fork(run_standin, port, latency)
    try:
        server = Process(process.pid, port)
        server.wait("/control")
        yield server
    finally:
        process.kill()
        process.join()


def started(command: list[str], log: IO[bytes], env: dict[str, str] | None = None) -> subprocess.Popen[bytes]:
    """A foreign process, the head of a group of its own, so that all of it can be ended."""
    nothing = subprocess.DEVNULL
    return subprocess.Popen(command, env=env, stdin=nothing, stdout=log, stderr=log, start_new_session=True)


@contextlib.contextmanager
def ended(process: subprocess.Popen[bytes]) -> Iterator[int]:
    """A foreign process that is ended on the way out, its children too."""
    try:
        yield process.pid
    finally:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(3)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def jwt(number: int, client: str = "") -> str:
    """An unsigned access token of a made-up account; `client` is whom it was given to."""
    ids = {"chatgpt_account_id": f"account-{number}", "user_id": f"user-{number}"}
    claims: dict[str, Any] = {
        "https://api.openai.com/profile": {"email": f"bench{number}@example.com"},
        "https://api.openai.com/auth": ids | {"chatgpt_plan_type": "plus"},
    }
    claims |= {"client_id": client} if client else {}
    parts = ({"alg": "none", "typ": "JWT"}, claims | {"exp": int(time.time()) + 86400})
    coded = [base64.urlsafe_b64encode(json.dumps(part).encode()).decode().rstrip("=") for part in parts]
    return ".".join([*coded, "c2lnbmF0dXJl"])


class Measured:
    """The daemon under test: an environment made from scratch, and a pool in a directory of its own."""

    def __init__(
        self, script: pathlib.Path, directory: str, upstream: Process, accounts: int, codex: bool = False
    ) -> None:
        self.command = [sys.executable, str(script)]
        self.log, self.port = pathlib.Path(directory, "proxy.log"), free_port()
        kept = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}
        self.environment = kept | {
            "HOST": LOCAL,
            "PORT": str(self.port),
            "CHATGPT_BASE_URL": f"http://127.0.0.1:{upstream.port}",
            "AUTHORIZATION": BENCH_KEY,
            "DATA_DIR": str(pathlib.Path(directory, "data")),
            "LOG_LEVEL": "warning",
            "MAX_CONNECTIONS": "4096",
        }
        given = [jwt(number) for number in range(accounts)] + [jwt(accounts, cp.BROWSER_CLIENT)] * codex
        tokens = "\n".join(given) + "\n"
        add = [*self.command, "accounts", "add", "-"]
        feed, env = tokens.encode(), self.environment
        done = subprocess.run(add, input=feed, env=env, capture_output=True, check=False)
        if done.returncode:
            raise SystemExit(f"bench: accounts add failed: {done.stderr.decode()}")

    def start(self) -> subprocess.Popen[bytes]:
        """The process, not yet listening."""
        with self.log.open("wb") as log:
            return started([*self.command, "serve"], log, self.environment)


NGINX = """daemon off; worker_processes 1; worker_rlimit_nofile 16384; pid {directory}/nginx.pid;
error_log {directory}/nginx.log crit;
events {{ worker_connections 8192; }}
http {{
    access_log off; keepalive_requests 1000000; keepalive_timeout 300; tcp_nodelay on;
    client_body_temp_path {directory}/b; proxy_temp_path {directory}/p;
    fastcgi_temp_path {directory}/f; uwsgi_temp_path {directory}/u; scgi_temp_path {directory}/s;
    upstream standin {{ server 127.0.0.1:{upstream}; keepalive 2048; keepalive_requests 1000000; }}
    server {{
        listen 127.0.0.1:{port} backlog=4096;
        location / {{
            proxy_pass http://standin; proxy_http_version 1.1; proxy_set_header Connection "";
            proxy_buffering off; proxy_read_timeout 300;
        }}
    }}
}}
"""


@contextlib.contextmanager
def nginx(directory: str, upstream: Process) -> Iterator[Process | None]:
    """nginx relaying to the stand-in; None where it is not installed."""
    program = shutil.which("nginx", path=os.environ.get("PATH", "") + ":/usr/sbin")
    if not program:
        yield None
        return
    port, conf = free_port(), pathlib.Path(directory, "nginx.conf")
    conf.write_text(NGINX.format(directory=directory, upstream=upstream.port, port=port))
    log = pathlib.Path(directory, "nginx.log")
    command = [program, "-p", directory, "-e", str(log), "-c", str(conf)]
    with log.open("ab") as out, ended(started(command, out)) as pid:
        server = Process(pid, port)
        server.wait("/control", log)
        yield server


@dataclasses.dataclass(frozen=True)
class Rig:
    """The servers of one case, and the loads that they are measured with."""

    upstream: Process
    proxy: Process
    nginx: Process | None

    def load(
        self,
        server: Process,
        words: int,
        how: str = "",
        stream: bool = True,
        tools: bool = False,
        native: bool = False,
        codex: bool = False,
        **more: Any,
    ) -> Load:
        """Asks for so many words: the proxy in OpenAI's terms unless `native`, anyone else in the upstream's own; `codex`: as
        the Responses API has it, by the Codex backend."""
        text = f"words={words} {how}".strip()
        if codex:
            asked = {
                "model": "gpt-5.5",
                "stream": True,
                "store": False,
                "input": [{"role": "user", "content": text}],
            }
            path = "/v1/responses" if server is self.proxy else "/backend-api/codex/responses"
            return Load(server.port, path, json.dumps(asked), words, end="response.completed", **more)
        if server is self.proxy and not native:
            messages = [{"role": "user", "content": text}]
            offered = {"tools": MANY_TOOLS} if tools else {}
            body = json.dumps({"model": "gpt-4o", "stream": stream, "messages": messages} | offered)
            return Load(server.port, "/v1/chat/completions", body, words, stream, **more)
        content = {"content_type": "text", "parts": [text]}
        message = {"id": "1", "author": {"role": "user"}, "content": content, "metadata": {}}
        turn = {"action": "next", "messages": [message], "model": "gpt-4o", "supported_encodings": ["v1"]}
        path = "/conversation" if server is self.proxy else CONVERSATION
        return Load(server.port, path, json.dumps(turn), words, **more)

    def run(self, server: Process, load: Load) -> dict[str, Any]:
        """Runs a load; its report, with `cpu` of the server and `upstream_cpu` in seconds."""
        watched = {"cpu": server, "upstream_cpu": self.upstream}
        before = {name: one.cpu() for name, one in watched.items()}
        found = dict(start_client(load)())
        found |= {name: one.cpu() - before[name] for name, one in watched.items()}
        if found["failures"]:
            print(f"bench: {found['failures']} failed, the first: {found['failure']}", file=sys.stderr)
        return found


def run_client(load: Load, pipe: Any) -> None:
    """The client's process."""
    pipe.send(LoadClient(load).run())


def start_client(load: Load) -> Callable[[], dict[str, Any]]:
    """Starts a client in its own process; call what is returned to wait for its report."""
    ours, theirs = multiprocessing.get_context("fork").Pipe(duplex=False)
    process = fork(run_client, load, theirs)
    theirs.close()

    def wait() -> dict[str, Any]:
        found: dict[str, Any] = ours.recv()
        process.join()
        return found

    return wait


# --- the cases --------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of the table."""

    case: str
    measured: str
    target: str
    met: bool
    nginx: str = ""
    ratio: str = ""


CONFIGURATION = """[3016, "Fri Nov 20 2026 12:00:00 GMT-0500 (Eastern Standard Time)", 4294705152, 0,
"Mozilla/5.0 (Windows NT 10.0; Win64; x64) AppleWebKit/537.36 (KHTML, like Gecko) Chrome/136.0.0.0",
"https://chatgpt.com/_next/static/chunks/app/layout.js?dpl=453ebaec0d44c2decab71692e1bfe39be35a24b3",
"prod-453ebaec0d44c2decab71692e1bfe39be35a24b3", "en-US", "en-US,en", 0, "vendor\u2212Google", "location",
"alert", 1234.5, "ad9a3b0c-3c0b-4fb5-9d5c-5fd0f3a1ddee", "", 16, 1763640000000]"""


def proof_rates() -> tuple[float, float]:
    """Attempts a second of the plain loop and of ours, on the same configuration, on one core."""
    config: list[Any] = json.loads(CONFIGURATION)
    seed, attempts = "0.123456789", 200_000

    def packed(part: list[Any]) -> bytes:
        return json.dumps(part, separators=(",", ":"), ensure_ascii=False).encode()[1:-1]

    def plain() -> bytes:
        encode, sha3, salt, best = base64.b64encode, hashlib.sha3_512, seed.encode(), b"\xff"
        head, middle = b"[" + packed(config[:3]) + b",", b"," + packed(config[4:9]) + b","
        tail = b"," + packed(config[10:]) + b"]"
        for n in range(attempts):
            answer = encode(head + str(n).encode() + middle + str(n >> 1).encode() + tail)
            best = min(best, sha3(salt + answer).digest()[:3])
        return best

    def rate(work: Callable[[], object], attempts: int) -> float:
        start = time.perf_counter()
        with contextlib.suppress(cp.ProofGivenUp):
            work()
        return attempts / (time.perf_counter() - start)

    def ours() -> object:
        return cp.solve(seed, "0" * 32, list(config), "sha3")  # gives up after MAX_ATTEMPTS

    return rate(plain, attempts), rate(ours, cp.MAX_ATTEMPTS)


def tool_of_2_kb(number: int) -> dict[str, Any]:
    """A function such as coding agents offer, of about 2 KB of JSON."""
    names = ("path", "content", "pattern", "timeout", "options", "recursive", "encoding", "limit")
    text = "What this is for, in the words of somebody who wants to be understood by a model; "
    properties = {name: {"type": "string", "description": f"{text}{name}. " + text} for name in names}
    schema = {
        "type": "object",
        "properties": properties,
        "required": [*names[:2]],
        "additionalProperties": False,
    }
    function = {"name": f"tool_{number}", "description": text * 3, "parameters": schema}
    return {"type": "function", "function": function}


MANY_TOOLS = [tool_of_2_kb(number) for number in range(30)]


@dataclasses.dataclass(frozen=True)
class Bench:
    """What every case needs: the daemon, how often and how long to measure, and what is told at the end."""

    script: pathlib.Path
    runs: int
    scale: float
    notes: list[str]
    failures: list[str]

    @contextlib.contextmanager
    def rig(self, accounts: int = 1, latency: float = 0.0, codex: bool = False) -> Iterator[Rig]:
        """Fresh servers, so that a case's memory is its own."""
        with contextlib.ExitStack() as stack:
            directory = stack.enter_context(tempfile.TemporaryDirectory(prefix="chatproxy-bench-"))
            upstream = stack.enter_context(standin(latency))
            proxy = Measured(self.script, directory, upstream, accounts, codex)
            server = Process(stack.enter_context(ended(proxy.start())), proxy.port)
            server.wait("/health", proxy.log)
            yield Rig(upstream, server, stack.enter_context(nginx(directory, upstream)))

    def many(self, count: int) -> int:
        """A number of requests, fewer when quick."""
        return max(2, round(count * self.scale))

    def measure(self, rig: Rig, server: Process, warm: int, **load: Any) -> dict[str, Any]:
        """Medians over the runs, after a warm-up of so many requests a connection; failures are added up."""
        quick = load | {"requests": warm, "words": min(load["words"], 10), "how": "", "pause": 0}
        if warm:
            rig.run(server, rig.load(server, **quick))
        found = [rig.run(server, rig.load(server, **load)) for _ in range(self.runs)]
        self.failures.extend(one["failure"] for one in found if one["failure"])
        result = {name: median(one[name] for one in found) for name in found[0] if name != "failure"}
        return result | {"failures": sum(one["failures"] for one in found), "memory": server.memory()}

    def shares(self, rig: Rig, name: str, found: dict[str, Any], **load: Any) -> None:
        """Notes how busy stand-in and client were, and what they do without a proxy between them."""
        note = [f"{name}: {found['requests'] / found['wall']:.0f} answers/s"]
        for who, cpu in (("proxy", "cpu"), ("stand-in", "upstream_cpu"), ("client", "client_cpu")):
            each = found[cpu] / max(1, found["requests"]) * 1e3
            note.append(f"{who} {found[cpu] / found['wall']:.0%} of a core, {each:.2f} ms an answer")
        if load:
            bare = rig.run(rig.upstream, rig.load(rig.upstream, **load))
            note.append(f"without a proxy {bare['requests'] / bare['wall']:.0f} answers/s")
        self.notes.append("; ".join(note))

    def relayed(self, rig: Rig, per: float, warm: int, **load: Any) -> float:
        """nginx's CPU time on the same load, a unit of which is `per` seconds; 0 where there is no nginx."""
        return float(self.measure(rig, rig.nginx, warm, **load)["cpu"] / per) if rig.nginx else 0.0


def case_short(bench: Bench) -> list[Row]:
    """CPU time of a short request that is not streamed."""
    with bench.rig() as rig:
        load = {"words": 1, "connections": 16, "requests": bench.many(100)}
        found = bench.measure(rig, rig.proxy, 20, stream=False, **load)
        bench.shares(rig, "short request", found, **load)
    cost = found["cpu"] / (16 * load["requests"]) * 1e3
    return [Row("short request, 16 connections", f"{cost:.2f} ms", "0.55 ms CPU", cost <= 0.55)]


def case_stream(bench: Bench) -> list[Row]:
    """CPU time of a stream as fast as it comes, each event in its own write or all in one."""
    rows = []
    with bench.rig() as rig:
        for how, name in (("flush=1", "stream of 100 words, 16 connections"), ("", "… all in one write")):
            requests = bench.many(50)
            load = {"words": 100, "how": how, "connections": 16, "requests": requests}
            found = bench.measure(rig, rig.proxy, 10, **load)
            cost = found["cpu"] / (16 * requests / 1e3)
            relay = bench.relayed(rig, 16 * requests / 1e3, 10, **load)
            bench.shares(rig, name, found, **load)
            ratio = cost / relay if relay else 0.0
            fine = ratio <= 1.5 if how else cost <= 1.6
            target = "1.5x nginx" if how else "1.6 ms CPU"
            rows.append(Row(name, f"{cost:.2f} ms", target, fine, f"{relay:.2f} ms", f"{ratio:.1f}x"))
    return rows


def compared(
    bench: Bench, name: str, option: str, target: float, words: int = 100, codex: bool = False
) -> list[Row]:
    """CPU time of a stream with an option of the load's, against one without, in turn."""
    costs: dict[bool, list[float]] = {False: [], True: []}
    with bench.rig(codex=codex) as rig:
        load: dict[str, Any] = {"words": words, "how": "flush=1", "connections": 16}
        load["requests"] = bench.many(5000 // words)
        for _ in range(3):
            for chosen, found in costs.items():
                cpu = bench.measure(rig, rig.proxy, 5, **{option: chosen}, **load)["cpu"]
                found.append(cpu / (16 * load["requests"]) * 1e3)
    plain, other = (median(found) for found in costs.values())
    return [
        Row(name, f"{other:.2f} ms, {other / plain:.2f}x", f"{target:g}x without", other / plain <= target)
    ]


def case_tools(bench: Bench) -> list[Row]:
    """With as many functions offered as a coding agent has, none of which is called."""
    return compared(bench, "stream of 100 words, 30 functions of 2 KB offered", "tools", 1.2)


def case_native(bench: Bench) -> list[Row]:
    """In the upstream's own words, through POST /conversation."""
    return compared(bench, "stream of 1,000 words by POST /conversation", "native", 1.0, words=1000)


def case_codex(bench: Bench) -> list[Row]:
    """A response by the Codex backend against a chat by the site's own API, and its first token next to the upstream's."""
    name = "response of 1,000 words by the Codex backend, against a chat by the site"
    rows = compared(bench, name, "codex", 1.0, words=1000, codex=True)
    load = {"words": 10, "requests": bench.many(100), "pause": 0.02, "codex": True}
    with bench.rig(codex=True) as rig:
        found = [bench.measure(rig, server, 20, **load) for server in (rig.proxy, rig.upstream)]
    over = (found[0]["token"] - found[1]["token"]) * 1e3
    return [
        *rows,
        Row(
            "… time to its first token, warm", f"{over:.2f} ms over the upstream's", "1 ms over", over <= 1.0
        ),
    ]


def case_paced(bench: Bench) -> list[Row]:
    """CPU time of an event of many paced streams, the streams' beginning included, and memory."""
    with bench.rig(accounts=8) as rig:
        words = bench.many(120)
        load = {"words": words, "how": "pace=0.05", "connections": 400, "ramp": 1.0}
        found = bench.measure(rig, rig.proxy, 1, **load)
        cost, relay = found["cpu"] / (400 * words / 1e6), bench.relayed(rig, 400 * words / 1e6, 1, **load)
        bench.shares(rig, "400 streams", found)
    ratio, memory, late = cost / relay if relay else 0.0, found["memory"], found["gap_p99"] * 1e3
    name, shown = "400 streams, an event every 50 ms", f"{cost:.0f} µs an event"
    return [
        Row(name, shown, "2.2x nginx", ratio <= 2.2, f"{relay:.0f} µs", f"{ratio:.1f}x"),
        Row("… memory", f"{memory:.0f} MB", "75 MB", memory <= 75),
        Row("… 99th percentile of the gap", f"{late:.0f} ms", "80 ms", late <= 80),
    ]


def case_thousand(bench: Bench) -> list[Row]:
    """1,000 streams at a time: failures and memory."""
    with bench.rig(accounts=8) as rig:
        load = {"words": bench.many(60), "how": "pace=0.1", "connections": 1000, "ramp": 1.0}
        found = bench.measure(rig, rig.proxy, 0, **load)
        bench.shares(rig, "1,000 streams", found)
    failures, memory, gap = found["failures"], found["memory"], found["gap"] * 1e3
    measured = f"{failures:.0f} of {1000 * bench.runs} failed; {memory:.0f} MB; gap {gap:.0f} ms"
    fine = not failures and memory <= 120 and gap <= 500
    return [Row("1,000 streams, an event every 100 ms", measured, "none fails; 120 MB; gap 500 ms", fine)]


def case_idle(bench: Bench) -> list[Row]:
    """Memory of a connection that has had a request, and waits for its next one."""
    with bench.rig() as rig, contextlib.ExitStack() as stack:
        request = b"GET /health HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n"

        def resident() -> int:
            status = pathlib.Path(f"/proc/{rig.proxy.pid}/status").read_text()
            return int(status.split("VmRSS:")[1].split()[0])

        rig.run(rig.proxy, rig.load(rig.proxy, 1, stream=False, requests=20))
        before = resident()
        for _ in range(2000):
            sock = stack.enter_context(socket.create_connection((LOCAL, rig.proxy.port), 10))
            sock.sendall(request)
            assert sock.recv(65536).startswith(b"HTTP/1.1 200 ")
        time.sleep(1.0)
        each = (resident() - before) / 2000
    return [Row("2,000 idle keep-alive connections", f"{each:.1f} KB each", "12 KB each", each <= 12)]


async def swarm(port: int, agents: int, asking: int, each: int) -> list[float]:
    """What questions take over their agents' own half a second or so, in ms: `asking` clients in flight, `each` in turn."""

    async def answer(web: Any, said: dict[str, Any]) -> None:
        began = time.perf_counter()
        await asyncio.sleep(random.uniform(0.3, 0.7))
        told = {"response_id": "r", "conversation_id": "", "content": str(time.perf_counter() - began)}
        await web.send(json.dumps({"id": said["id"], "message": "ChatGptResponse", "data": json.dumps(told)}))

    async def agent() -> None:
        url = f"ws://{LOCAL}:{port}/client/register?key={BENCH_KEY}"
        async with websockets.connect(url, compression=None, ping_interval=None, proxy=None) as web:
            answers = set()
            async for text in web:
                said = json.loads(text)
                if said["message"] == "ChatGptRequest":
                    answers.add(asyncio.create_task(answer(web, said)))
                else:
                    await web.send(json.dumps(said | {"message": "pong"}))

    async def ask() -> list[float]:
        reader, writer = await asyncio.open_connection(LOCAL, port)
        wire = Load(port, "/api/ask", '{"content": "hello"}', 0).wire()
        over = []
        for _ in range(each):
            began = time.perf_counter()
            writer.write(wire)
            head = await reader.readuntil(b"\r\n\r\n")
            size = int(head.lower().partition(b"content-length:")[2].split(b"\r", 1)[0])
            said = json.loads(await reader.readexactly(size))
            over.append((time.perf_counter() - began - float(said["content"])) * 1e3)
        writer.close()
        return over

    kept = [asyncio.create_task(agent()) for _ in range(agents)]
    await asyncio.sleep(3)  # until all of them are there
    found = await asyncio.gather(*(ask() for _ in range(asking)))
    for one in kept:
        one.cancel()
    return [over for one in found for over in one]


def run_swarm(pipe: Any, *arguments: int) -> None:
    """The process of agents and clients."""
    pipe.send(asyncio.run(swarm(*arguments)))


def case_agents(bench: Bench) -> list[Row]:
    """500 agents connected, 50 questions in flight."""
    with bench.rig() as rig:
        ours, theirs = multiprocessing.get_context("fork").Pipe(duplex=False)
        fork(run_swarm, theirs, rig.proxy.port, 500, 50, bench.many(20))
        over, memory = median(ours.recv()), rig.proxy.memory()
    measured = f"{over:.1f} ms over the agent's; {memory:.0f} MB"
    return [Row("500 agents, 50 questions in flight", measured, "5 ms; 70 MB", over <= 5 and memory <= 70)]


def case_long(bench: Bench) -> list[Row]:
    """CPU time of a word of a long answer, and of a shorter one."""
    costs = []
    with bench.rig() as rig:
        for words, requests in ((1000, 60), (16000, 6)):
            load = {"words": words, "requests": bench.many(requests)}
            found = bench.measure(rig, rig.proxy, 3, **load)
            costs.append(found["cpu"] / load["requests"] / words * 1e6)
    short, long = costs
    return [
        Row("one answer of 16,000 words", f"{long:.1f} µs a word", "10 µs a word", long <= 10),
        Row("… of 1,000 words", f"{short:.1f} µs a word", "the same", long <= 1.2 * short),
    ]


def case_first(bench: Bench) -> list[Row]:
    """Time to first token of one request after the other, next to the upstream's own."""
    load = {"words": 10, "requests": bench.many(100), "pause": 0.02}
    with bench.rig() as rig:
        found = [bench.measure(rig, server, 20, **load) for server in (rig.proxy, rig.upstream)]
    over = (found[0]["token"] - found[1]["token"]) * 1e3
    note = f"{found[0]['token'] * 1e3:.2f} ms, upstream's own {found[1]['token'] * 1e3:.2f} ms"
    bench.notes.append(f"first token: {note}; p99 {found[0]['byte_p99'] * 1e3:.1f} ms")
    load = {"words": 10, "requests": bench.many(16), "pause": 0.15}
    with bench.rig(latency=0.1) as rig:
        far = bench.measure(rig, rig.proxy, 2, **load)["token"] * 1e3
    row = Row("time to first token, warm", f"{over:.2f} ms over the upstream's", "1.5 ms over", over <= 1.5)
    return [row, Row("… with 100 ms to the upstream", f"{far:.1f} ms", "110 ms in all", far <= 110)]


def case_proof(bench: Bench) -> list[Row]:
    """Proof attempts a second on one core."""
    rates = [proof_rates() for _ in range(bench.runs)]
    plain, ours = (median(rate[n] for rate in rates) for n in (0, 1))
    bench.notes.append(f"proof: the plain loop {plain:,.0f} attempts/s")
    ratio = ours / plain
    return [Row("proof attempts", f"{ours:,.0f}/s, {ratio:.2f}x", "1.3x the plain loop", ratio >= 1.3)]


def case_gap(bench: Bench) -> list[Row]:
    """The largest gap of paced streams while others need hard proofs, less that while they need easy ones."""
    gaps: dict[str, float] = {}
    words, solved = bench.many(300), 0
    with bench.rig(accounts=2) as rig:
        paced = rig.load(rig.proxy, words, "pace=0.02", connections=8)
        asking = rig.load(rig.proxy, 1, stream=False, requests=100, pause=0.15, limit=words * 0.02)
        rig.run(rig.proxy, rig.load(rig.proxy, 10, requests=20))
        for difficulty in ("0fffff", "00003a"):
            rig.upstream.get(f"/control?difficulty={difficulty}")
            found = []
            for _ in range(bench.runs):
                streams, asked = start_client(paced), start_client(asking)
                found.append(streams()["gap"] * 1e3)
                solved = asked()["requests"]
            gaps[difficulty] = median(found)
        hard = json.loads(rig.upstream.get("/control")[1])["hard"]
    easy, worst = gaps["0fffff"], gaps["00003a"]
    note = f"gap: largest {worst:.1f} ms, without hard proofs {easy:.1f} ms; {hard} hard proofs asked for"
    bench.notes.append(f"{note}, {solved} answers in the last run")
    fine = worst - easy <= 20 and hard > 0 and solved > 2
    return [Row("while a hard proof is solved", f"gap grows by {worst - easy:.1f} ms", "20 ms", fine)]


def case_start(bench: Bench) -> list[Row]:
    """Seconds from the process' start to its first answer."""
    times = []
    for _ in range(bench.runs):
        with tempfile.TemporaryDirectory() as directory, standin() as upstream:
            proxy = Measured(bench.script, directory, upstream, 1)
            start = time.perf_counter()
            with ended(proxy.start()) as pid:
                server = Process(pid, proxy.port)
                server.wait("/health", proxy.log)
                rig = Rig(upstream, server, None)
                found = LoadClient(rig.load(server, 1, stream=False)).run()
                times.append(time.perf_counter() - start)
                if found["failures"]:
                    raise SystemExit(f"bench: {found['failure']}")
    took = median(times)
    return [Row("start to first answer", f"{took:.2f} s", "0.6 s", took <= 0.6)]


CASES: dict[str, Callable[[Bench], list[Row]]] = {
    "short": case_short,
    "stream": case_stream,
    "tools": case_tools,
    "native": case_native,
    "agents": case_agents,
    "codex": case_codex,
    "paced": case_paced,
    "thousand": case_thousand,
    "idle": case_idle,
    "long": case_long,
    "first": case_first,
    "proof": case_proof,
    "gap": case_gap,
    "start": case_start,
}


def run_cases(chosen: argparse.Namespace) -> None:
    """Runs what was asked for and prints the table; a measured value in bold missed its target."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    bench = Bench(chosen.proxy, 1 if chosen.quick else 3, 0.3 if chosen.quick else 1.0, [], [])
    print("| case | measured | target | nginx | ratio |\n| --- | --- | --- | --- | --- |", flush=True)
    for name in chosen.case or CASES:
        seen = len(bench.failures)
        rows = CASES[name](bench)
        failed = len(bench.failures) > seen
        for row in rows:
            measured = row.measured if row.met and not failed else f"**{row.measured}**"
            print(f"| {row.case} | {measured} | {row.target} | {row.nginx} | {row.ratio} |", flush=True)
    print("\n" + "\n".join(f"- {note}" for note in bench.notes))


def bench(argv: list[str]) -> None:
    """The benchmark's command line. `standin PORT [LATENCY]` and `client JSON` run one party by hand."""
    if argv[:1] == ["standin"]:
        run_standin(int(argv[1]), *map(float, argv[2:]))
    elif argv[:1] == ["client"]:
        print(json.dumps(LoadClient(Load(**json.loads(argv[1]))).run()))
    else:
        run_cases(options(argv))


def options(argv: list[str]) -> argparse.Namespace:
    """The flags of a run."""
    parser = argparse.ArgumentParser(prog="bench", description="Measures chatproxy.")
    parser.add_argument(
        "--proxy", type=pathlib.Path, default=pathlib.Path(__file__).with_name("chatproxy.py")
    )
    parser.add_argument("--quick", action="store_true", help="one short run of each case")
    parser.add_argument("--case", action="append", choices=CASES, help="only this one (may be repeated)")
    return parser.parse_args(argv)


if __name__ == "__main__":
    if sys.argv[1:2] == ["mutants"]:
        mutants(sys.argv[2:])
    bench(sys.argv[2:] if sys.argv[1:2] == ["bench"] else ["--help"])
