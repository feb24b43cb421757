"""Ten thousand bad requests, in every protocol: each is told what is wrong, the good ones between them are answered rightly, and
the server is as large afterwards as before."""

import copy
import http.client
import json
import math
import random
import re
import socket
from contextlib import closing
from pathlib import Path

import grpc
import orjson
import pytest

from coterie import contracts
from tests.served import grpc_address, make_bundle, publish_profiles, serving

SECRET = "what only the asker knows"
QUESTIONS = [
    {"worker_id": "ann", "prompt": "Shall we?", "responses": ["Yes.", f"No, for {SECRET}!"]},
    {
        "worker_id": "nobody",
        "prompt": SECRET,
        "responses": ["a b", "c d.", "e"],
        "comparisons": [{"prompt": "Tea?", "chosen": "boat early.", "rejected": "a train!"}],
    },
]
VOTE = {
    "worker_id": "odd", "prompt": "Shall we?", "chosen": "Yes.", "rejected": SECRET, "label": 1, "confidence": 0.5,
    "shown_first": "chosen", "ranking_id": "r",
}  # fmt: skip
PREDICT, INFER, FEEDBACK = "/v1/models/coterie:predict", "/v2/models/coterie/infer", "/v1/feedback"
ODD = [
    None, True, False, 0, -1, 3, 0.5, -0.0, 2**31, 2**63, 2**64, -(2**63) - 1, 10**400, 1e308, math.nan, math.inf, -math.inf,
    "", " ", "0", "null", "é🙂", "\0", "\ud800", "\udfff\ud800", "\u202e", "x" * 600, "../../etc/passwd", "{{7*7}}", "[", "{}",
    [], {}, [[]], [None], [[], []], [1, "a"], {"a": {"b": []}}, ["a"] * 300, [0.1] * 70, {"prompt": 1}, {"\ud800": 1},
    ["\ud800"], {"": ""}, [{}] * 300,
]  # fmt: skip
LARGE = ["x" * 200_001, ["y" * 1000] * 65, "🙂" * 100_000, "z" * 1_000_001]
BROKEN = [
    b"", b" ", b"{", b"}", b"[", b"nul", b"NaN", b"-Infinity", b"1e999", b'"', b"\xff\xfe{}", b"\x00", b"[" * 20_000,
    b'{"instances":' * 3000, b'{"a":1,}', b"{'a': 1}", b'{"instances": [}', "{}".encode("utf-16"), b"\x1f\x8b\x08\x00garbage",
    b"instances=1&a=b", b"--b\r\nContent-Disposition: form-data\r\n\r\n1\r\n--b--", b"<a/>", b'"\\ud800"', b"\xef\xbb\xbf{}",
]  # fmt: skip
LEAKS = re.compile(
    r'Traceback|File "|\.py\b|site-packages|/usr/|/tmp/|<class|<function| at 0x|pydantic|numpy|kserve|orjson|starlette|'
    r"fastapi|\w(Error|Exception)\b",
)


# ------------------------------------------------------------------------------------------------------ bad requests
def places(value, path=()):
    """Every place in a JSON document."""
    yield path
    for key, inner in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        yield from places(inner, (*path, key))


def odd(draw):
    return copy.deepcopy(draw.choice(ODD))


def spoiled(draw, document):
    """A copy with something wrong in it at one place or several; and the last of these places."""
    document = {"": orjson.loads(orjson.dumps(document))}
    for _ in range(draw.choice((1, 1, 1, 2, 4))):
        path = draw.choice(list(places(document))[1:])
        holder = document
        for key in path[:-1]:
            holder = holder[key]
        key, kind = path[-1], draw.random()
        if kind < 0.15 and len(path) > 1:
            del holder[key]
        elif kind < 0.25 and isinstance(holder[key], dict):
            holder[key][draw.choice(("x", "posterior", "__class__", "", "\ud800", "worker", "a" * 100))] = odd(draw)
        elif kind < 0.3 and isinstance(holder[key], list):
            holder[key] = [copy.deepcopy(one) for _ in range(draw.choice((2, 40, 300))) for one in holder[key]]
        elif kind < 0.31:
            holder[key] = copy.copy(draw.choice(LARGE))
        elif kind < 0.33:
            for _ in range(draw.choice((3, 60))):
                holder[key] = [holder[key]]
        else:
            holder[key] = odd(draw)
    return document[""], path


def encoded(draw, document):
    """JSON as Python writes it, NaN and surrogates included; sometimes cut, doubled or in another encoding."""
    content, kind = json.dumps(document, ensure_ascii=draw.random() < 0.9).encode(errors="surrogatepass"), draw.random()
    if kind < 0.03:
        return content[: draw.randrange(len(content))]
    if kind < 0.04:
        return content.decode(errors="surrogatepass").encode("utf-16", errors="surrogatepass")
    if kind < 0.06 and content.startswith(b"{"):
        return b'{"instances": 1, "inputs": 2, "worker_id": 3, ' + content[1:]  # keys twice
    if kind < 0.07:
        return content + content
    return content


def headers(draw):
    """Of a body that is JSON, whatever they say."""
    told = {"content-type": "application/json"}
    if draw.random() < 0.1:
        name, value = draw.choice((
            ("content-type", "text/plain"), ("content-type", "application/cloudevents+json"), ("content-type", "\xff"),
            ("content-type", "multipart/form-data"), ("content-encoding", "gzip"), ("accept", "nothing/at-all"),
            ("inference-header-content-length", "12"), ("inference-header-content-length", "-3"),
            ("inference-header-content-length", "many"), ("x-request-id", "a" * 900), ("authorization", "Bearer x"),
            ("ce-specversion", "1.0"), ("ce-id", "\xe9"), ("expect", "200-maybe"),
        ))  # fmt: skip
        told[name] = value
    return told


def tensors(questions):
    """The questions as a body of the Open Inference Protocol."""
    columns = {
        "prompt": [q["prompt"] for q in questions],
        "worker_id": [q["worker_id"] for q in questions],
        "response": [text for q in questions for text in q["responses"]],
        "response_count": [len(q["responses"]) for q in questions],
        "comparisons": [orjson.dumps(q.get("comparisons", [])).decode() for q in questions],
    }
    inputs = [
        {"name": name, "shape": [len(values)], "datatype": contracts.WORKER_TENSORS[name][0], "data": values}
        for name, values in columns.items()
    ]
    return {
        "id": "7",
        "inputs": inputs,
        "parameters": {"explain": True},
        "outputs": [{"name": "best"}, {"name": "score"}],
    }


def message(questions, raw):
    """The same as a message of gRPC: with raw contents, or typed ones."""
    from kserve.protocol.grpc.grpc_predict_v2_pb2 import ModelInferRequest

    request = ModelInferRequest(model_name="coterie", id="7")
    for given in tensors(questions)["inputs"]:
        tensor = request.inputs.add(name=given["name"], datatype=given["datatype"], shape=given["shape"])
        texts = given["datatype"] == "BYTES"
        values = [value.encode() for value in given["data"]] if texts else given["data"]
        if raw:
            lengths = [
                len(value).to_bytes(4, "little") + value if texts else value.to_bytes(4, "little") for value in values
            ]
            request.raw_input_contents.append(b"".join(lengths))
        else:
            getattr(tensor.contents, "bytes_contents" if texts else "int_contents").extend(values)
    return request


def spoiled_message(draw):
    """Bytes of a gRPC request with something wrong in it."""
    request = message(QUESTIONS, raw=draw.random() < 0.5)
    for _ in range(draw.choice((1, 1, 2))):
        tensor, kind = draw.choice(request.inputs), draw.randrange(14)
        if kind == 0:
            tensor.name = draw.choice(("", "posterior", "prompt", "\0", "é" * 99, "response"))
        elif kind == 1:
            tensor.datatype = draw.choice(("", "FP32", "INT64", "bytes", "BOOL", "FP16", "nothing", "UINT8"))
        elif kind == 2:
            tensor.shape[:] = draw.choice(([], [0], [-1], [3], [2, 2], [2**40], [2**62, 2**62], [-(2**63)], [1] * 70))
        elif kind == 3:
            tensor.contents.bytes_contents.extend(
                [draw.choice((b"", b"\xff\xfe", b"{" * 9, b"x" * 5000, b"\xed\xa0\x80"))]
            )
        elif kind == 4:
            draw.choice((
                tensor.contents.fp64_contents, tensor.contents.fp32_contents,
            )).extend([math.nan, math.inf, -0.0])  # fmt: skip
        elif kind == 5:
            tensor.contents.int64_contents.extend([2**62, -1])
        elif kind == 6 and request.raw_input_contents:
            i = draw.randrange(len(request.raw_input_contents))
            whole = request.raw_input_contents[i]
            request.raw_input_contents[i] = draw.choice((
                whole[: draw.randrange(len(whole) + 1)], whole + b"\0", b"\xff\xff\xff\x7f" + whole, whole * 2, draw.randbytes(40),
            ))  # fmt: skip
        elif kind == 7 and request.raw_input_contents:
            del request.raw_input_contents[draw.randrange(len(request.raw_input_contents))]
        elif kind == 8:
            request.raw_input_contents.append(draw.randbytes(draw.randrange(30)))
        elif kind == 9:
            del request.inputs[draw.randrange(len(request.inputs))]
            request.inputs.add(name="x")
        elif kind == 10:
            request.parameters["explain"].string_param = draw.choice(("yes", "", "é"))
        elif kind == 11:
            request.parameters["next_pair"].int64_param = draw.choice((2, -1, 2**62))
        elif kind == 12:
            request.outputs.add(name=draw.choice(("", "nothing", "best")))
        else:
            request.model_name = draw.choice(("", "nothing", "coterie-feedback", "../coterie", "coterie-predictor"))
    content = request.SerializeToString()
    if draw.random() < 0.1:
        content = draw.choice(
            (content[: draw.randrange(len(content))], draw.randbytes(60), content + b"\xff", b"\x0a\x02\xff\xfe")
        )
    return content


# ----------------------------------------------------------------------------------------------------------- the server
@pytest.fixture(scope="module")
def server(tmp_path_factory):
    root = tmp_path_factory.mktemp("fuzz")
    make_bundle(root)
    publish_profiles(root)
    feedback = json.dumps({"database": f"sqlite:///{root / 'feedback.db'}"})
    with serving(root, environ={"FEEDBACK": feedback}) as (process, url, log):
        yield Asker(process.pid, url, grpc_address(log), log)


class Asker:
    """Asks one server over connections that are kept, and checks every answer."""

    def __init__(self, pid, url, address, log):
        self.pid, self.address, self.log = pid, ("127.0.0.1", int(url.rpartition(":")[2])), log
        self.link = http.client.HTTPConnection(*self.address, timeout=60)
        self.channel = grpc.insecure_channel(address)
        self.infer = self.channel.unary_unary("/inference.GRPCInferenceService/ModelInfer")  # bytes in, bytes out

    def post(self, path, content, headers=None):
        self.link.request("POST", path, content, headers or {"content-type": "application/json"})
        response = self.link.getresponse()
        return response.status, response.read()

    def call(self, content):
        try:
            return grpc.StatusCode.OK, self.infer(content, timeout=60)
        except grpc.RpcError as error:
            return error.code(), error.details()

    def good(self):
        """Good requests in each protocol, which are answered as ever."""
        asked, votes = {"instances": QUESTIONS}, [VOTE | {"worker_id": "zoe", "prompt": f"p {n}"} for n in range(2)]
        status, v1 = self.post(PREDICT, json.dumps(asked))
        assert status == 200, v1
        status, v2 = self.post(INFER, json.dumps(tensors(QUESTIONS)))
        assert status == 200, v2
        code, over_grpc = self.call(message(QUESTIONS, raw=True).SerializeToString())
        assert code is grpc.StatusCode.OK, over_grpc
        status, outcomes = self.post(FEEDBACK, json.dumps({"comparisons": votes}))
        assert status == 200, outcomes
        kept = [(one["comparison_id"], one["counts"]) for one in orjson.loads(outcomes)["comparisons"]]
        return orjson.loads(v1), orjson.loads(v2), over_grpc, kept

    def memory(self):
        """Resident megabytes."""
        return int(re.search(r"VmRSS:\s+(\d+)", Path(f"/proc/{self.pid}/status").read_text())[1]) / 1024


def check_words(words, *about):
    """What is said is a sentence about one of `about`, and repeats neither what was sent nor how the server is made."""
    assert 10 < len(words) < 1500, words
    assert SECRET not in words
    assert not LEAKS.search(words), words
    assert not about or any(name in words for name in about), (words, about)


def ask_rest(server, draw, path, document, roots):
    """One spoiled document, which is refused in words that name where the fault is."""
    wrong, place = spoiled(draw, document)
    content, told = (draw.choice(BROKEN), None) if draw.random() < 0.05 else (encoded(draw, wrong), wrong)
    said = headers(draw)
    status, answer = server.post(path, content, said)
    assert status in (200, 400, 409, 413, 415), (path, content[:300], said, status, answer[:500])
    if status == 200:
        return
    words = orjson.loads(answer)["error"]
    try:
        readable = (
            status == 400
            and len(said) == 1
            and said["content-type"] == "application/json"
            and orjson.loads(content) == told
        )
    except orjson.JSONDecodeError:
        readable = False
    names = [str(key) for key in place if isinstance(key, str) and key] if readable else []
    check_words(words, *names, *roots) if readable else check_words(words)


def ask(server, draw, number):
    """`number` requests of all kinds, a good one of each now and then."""
    right = server.good()
    for n in range(number):
        match n % 4:
            case 0:
                ask_rest(
                    server, draw, PREDICT, {"instances": QUESTIONS, "explain": True}, ("instances", "explain", "body")
                )
            case 1:
                ask_rest(server, draw, INFER, tensors(QUESTIONS), ("inputs", "outputs", "id", "body", "parameters", *contracts.WORKER_TENSORS))  # fmt: skip
            case 2:
                document = draw.choice((VOTE, {"comparisons": [VOTE, VOTE | {"prompt": "Tea?"}]}))
                ask_rest(server, draw, FEEDBACK, document, ("comparison",))
            case 3:
                content = spoiled_message(draw)
                code, words = server.call(content)
                assert code.name in ("OK", "INVALID_ARGUMENT", "NOT_FOUND"), (code, words, content)
                code is grpc.StatusCode.OK or check_words(words)
        if n % 250 == 0:
            assert server.good() == right, n


@pytest.mark.timeout(600)
def test_ten_thousand_bad_requests(server):
    draw = random.Random(0)
    ask(server, draw, 3000)  # after which every pool and cache is as large as it gets
    before = server.memory()
    ask(server, draw, 7000)
    assert server.memory() < before + 48
    said = server.log.read_text()
    assert "Traceback" not in said
    assert SECRET not in said


RAW = [
    b"nothing at all\r\n\r\n",
    b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\0" * 64,  # TLS
    b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    b"POST PATH HTTP/9.9\r\nhost: a\r\n\r\n",
    b"POST PATH HTTP/1.1\r\nhost: a\r\ncontent-length: -1\r\n\r\n",
    b"POST PATH HTTP/1.1\r\nhost: a\r\ncontent-length: many\r\n\r\n",
    b"POST PATH HTTP/1.1\r\nhost: a\r\ncontent-length: 5\r\ncontent-length: 6\r\n\r\n{}   ",
    b"POST PATH HTTP/1.1\r\nhost: a\r\ncontent-length: 99999999999999999999999\r\n\r\n{}",
    b"POST PATH HTTP/1.1\r\nhost: a\r\ncontent-length: 99999999\r\n\r\n{}",
    b"POST PATH HTTP/1.1\r\nhost: a\r\ncontent-length: 2\r\n\r\n{\xff",
    b"POST PATH HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked\r\n\r\nzz\r\n{}\r\n0\r\n\r\n",
    b"POST PATH HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked\r\n\r\n2\r\n{]\r\n0\r\n\r\n",
    b"POST PATH HTTP/1.1\r\nhost: a\r\ntransfer-encoding: gzip\r\n\r\n{}",
    b"POST PATH%00%ff HTTP/1.1\r\nhost: a\r\ncontent-length: 2\r\n\r\n{}",
    b"POST PATH HTTP/1.1\r\nhost: a\r\nx: " + b"y" * 100_000 + b"\r\n\r\n",
    b"POST PATH HTTP/1.1\r\n: \r\n\r\n",
    b"BREW PATH HTTP/1.1\r\nhost: a\r\ncontent-length: 0\r\n\r\n",
]


@pytest.mark.parametrize("path", [PREDICT, INFER, FEEDBACK])
def test_what_is_hardly_http_is_refused_or_hung_up_on(server, path):
    right = server.good()
    for content in RAW:
        with closing(socket.create_connection(server.address, timeout=60)) as link:
            link.sendall(content.replace(b"PATH", path.encode()))
            link.shutdown(socket.SHUT_WR)
            answer = b""
            while more := link.recv(65_536):
                answer += more
        assert not answer or 400 <= int(answer.split()[1]) < 500, (content, answer)
        assert not LEAKS.search(answer.decode(errors="replace")), answer
    assert server.good() == right


def test_a_body_without_end_is_cut_off_at_the_limit(server):
    right, before = server.good(), server.memory()
    for path in (PREDICT, INFER, FEEDBACK):
        with closing(socket.create_connection(server.address, timeout=60)) as link:
            link.sendall(f"POST {path} HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked\r\n\r\n".encode())
            try:
                for _ in range(400):  # 25 MiB, of which 16 are read
                    link.sendall(b"10000\r\n" + b" " * 65_536 + b"\r\n")
                link.sendall(b"0\r\n\r\n")
            except OSError:  # hung up on
                continue
            assert link.recv(65_536).split()[1] == b"413"
    assert server.good() == right
    assert server.memory() < before + 64
