"""`cllm serve` as a person types it: the line that says how to try it, keys, mistakes, and an end in order."""

import json
import re
import shlex
import signal
import subprocess
import urllib.error
import urllib.request

import pytest
from command import PATIENCE, Started, cllm, wait_until
from served_model import write_model

from cllm.generate.decoding import generate


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    place = tmp_path_factory.mktemp("models") / "tiny.cllm"
    return place, *write_model(place)


class Server:
    """The command in a process of its own, once it serves."""

    def __init__(self, *arguments, **variables):
        self.process = Started("serve", *arguments, "--port", 0, "--threads", 1, **variables)
        wait_until(lambda: self.process.out.count("\n") >= 2, self.process)
        self.said = self.process.out.splitlines()
        assert "Serving" in self.said[0]
        self.address = re.search(r"http://\S+", self.said[0])[0]

    def ask(self, path, body=None, **headers):
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.address + path, data, {"Content-Type": "application/json", **headers})
        try:
            with urllib.request.urlopen(request, timeout=PATIENCE) as answer:
                return answer.status, answer.read()
        except urllib.error.HTTPError as error:
            return error.code, error.read()

    def end(self, number=signal.SIGTERM):
        self.process.send_signal(number)
        out, err = self.process.communicate()
        assert "Traceback" not in err, err
        return self.process.wait(), out, err


def test_the_line_that_is_printed_works_as_it_is_and_ctrl_c_ends_in_order(model):
    place, *parts = model
    started = Server(place)
    done = subprocess.run([*shlex.split(started.said[1]), "--silent"], capture_output=True, text=True, timeout=PATIENCE)
    assert len(json.loads(done.stdout)["choices"][0]["text"]) > 0, done
    body = {"model": "tiny.cllm", "prompt": "What", "max_tokens": 8, "temperature": 0}
    assert json.loads(started.ask("/v1/completions", body)[1])["choices"][0]["text"] == generate(*parts, "What", max_tokens=8, temperature=0)[0].text
    status, _, err = started.end(signal.SIGINT)
    assert status == 0 and "no new requests are taken" in err
    lines = [json.loads(line) for line in err.splitlines() if line.startswith("{")]
    assert [line["status"] for line in lines] == [200, 200]


def test_a_key_is_needed_on_an_open_address_and_is_in_no_log(model, monkeypatch):
    key = "a-very-secret-key"
    started = Server(model[0], "--host", "0.0.0.0", "--kv-cache", "int8", CLLM_API_KEY=key)
    started.address = started.address.replace("0.0.0.0", "127.0.0.1")
    assert started.ask("/health")[0] == 200 and started.ask("/v1/models")[0] == 401
    assert started.ask("/v1/models", Authorization="Bearer wrong")[0] == 401
    assert started.ask("/v1/models", Authorization=f"Bearer {key}")[0] == 200
    monkeypatch.setattr(model[1], "kv_cache", "int8")
    body = {"model": "tiny.cllm", "prompt": "What", "max_tokens": 8, "temperature": 0}
    answer = json.loads(started.ask("/v1/completions", body, Authorization=f"Bearer {key}")[1])
    assert answer["choices"][0]["text"] == generate(*model[1:], "What", max_tokens=8, temperature=0)[0].text
    status, out, err = started.end()
    assert status == 0 and key not in out + err


@pytest.mark.parametrize(
    "arguments, words",
    [
        ((), "say which model"),
        (("nothing",), "does not exist"),
        (("MODEL", "--host", "0.0.0.0"), "a key is needed"),
        (("MODEL", "--host", "0.0.0.0", "--api-key", "a b"), "visible ASCII"),
        (("MODEL", "--port", "99999"), "port must be <= 65535"),
        (("MODEL", "MODEL"), "both named 'tiny.cllm'"),
        (("--follow", "MODEL"), "is no run"),
        (("MODEL", "--weights", "int7"), "must be one of"),
    ],
    ids=str,
)
def test_mistakes_are_told_in_one_line(model, arguments, words):
    ran = cllm("serve", *[model[0] if each == "MODEL" else each for each in arguments])
    assert ran.status in (1, 2) and words in ran.err and len(ran.err.splitlines()) == 1, ran.err


def test_a_corrupt_model_is_one_line(model, tmp_path):
    content = bytearray(model[0].read_bytes())
    content[-5] ^= 1
    (tmp_path / "bad.cllm").write_bytes(content)
    ran = cllm("serve", tmp_path / "bad.cllm")
    assert ran.status == 1 and "damaged" in ran.err and len(ran.err.splitlines()) == 1
