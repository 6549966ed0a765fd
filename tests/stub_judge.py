"""An OpenAI-compatible endpoint on this machine that behaves as it is told: well, slowly, or badly in many ways."""

import gzip
import json
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

BOMB = gzip.compress(bytes(1 << 24))


class StubJudge:
    """Serves while its `with` block lasts. `plan(name, number)` says what request `number` (0, 1, ...) about the question
    `name` meets: a text of a judge, a dict (the whole reply), ("status", headers, body), or one of the names in `behave`.
    """

    def __init__(self, plan, *, port=0):
        self.plan, self.asked, self.headers, self.bodies = plan, Counter(), [], []
        self.lock, self.busy, self.most = threading.Lock(), 0, 0
        stub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self):
                stub.answer(self)

            def log_message(self, *_):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1"

    def __enter__(self):
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *_):
        self.server.shutdown()
        self.server.server_close()

    def answer(self, request):
        body = json.loads(request.rfile.read(int(request.headers["Content-Length"])))
        self.bodies.append(body)
        name = body["messages"][1]["content"].split("[Question]\n")[1].split("\n")[0]
        with self.lock:
            number = self.asked[name]
            self.asked[name] += 1
            self.headers.append(request.headers)  # names in any case
            self.busy += 1
            self.most = max(self.most, self.busy)
        try:
            self.behave(request, self.plan(name, number))
        except (BrokenPipeError, ConnectionResetError):
            pass  # the client has lost its patience
        finally:
            with self.lock:
                self.busy -= 1

    def behave(self, request, what):
        request.close_connection = True
        if isinstance(what, tuple):
            status, headers, text = what
            self.send(request, text.encode(), status, headers)
        elif isinstance(what, dict):
            self.send(request, json.dumps(what).encode())
        elif what == "slow":
            time.sleep(30)
        elif what == "headers":
            request.wfile.write(b"HTTP/1.1 200 OK\r\n")
            for n in range(300):
                request.wfile.write(b"X-%d: 1\r\n" % n)
                time.sleep(0.1)
        elif what in ("drip", "cut"):
            request.send_response(200)
            request.send_header("Content-Length", "1000")
            request.end_headers()
            request.wfile.write(b'{"choices": [{"message": {"con')
            for _ in range(300 if what == "drip" else 0):
                request.wfile.write(b" ")
                time.sleep(0.1)
        elif what in ("giant", "forever"):
            request.send_response(200)
            request.send_header("Transfer-Encoding", "chunked")
            request.end_headers()
            while True:
                request.wfile.write(b"10000\r\n" + b" " * 0x10000 + b"\r\n" if what == "giant" else b"1\r\n \r\n")
                time.sleep(0.001 if what == "giant" else 0.1)
        elif what == "bomb":
            self.send(request, BOMB, headers={"Content-Encoding": "gzip"})
        elif what == "garbage":
            self.send(request, b"\xff<html>busy</html>")
        elif what != "closed":
            self.send(request, json.dumps(completion(what)).encode())

    def send(self, request, body, status=200, headers=None):
        request.send_response(status)
        for name, value in (headers or {}).items():
            request.send_header(name, value)
        request.send_header("Content-Length", str(len(body)))
        request.end_headers()
        request.wfile.write(body)


def completion(content, finish="stop", **message):
    """The reply of a chat completion."""
    message = {"role": "assistant", "content": content, **message}
    return {"id": "1", "object": "chat.completion", "choices": [{"index": 0, "message": message, "finish_reason": finish}]}


def error(status, message, headers=None, **fields):
    """An error as OpenAI-compatible servers give it."""
    return status, headers or {}, json.dumps({"error": {"message": message, **fields}})
