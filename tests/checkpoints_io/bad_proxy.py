"""An HTTP server that passes requests on, and of a tenth answers 503, late, or not at all.

  python -m tests.checkpoints_io.bad_proxy PORT PORT_OF_THE_SERVER

Ended by SIGTERM it prints what it did.
"""

import collections
import http.client
import http.server
import random
import signal
import socket
import struct
import sys
import time

did: collections.Counter = collections.Counter()


class Passing(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def _pass(self):
        body = self.rfile.read(int(self.headers.get("content-length") or 0))
        how = random.choice(["503", "late", "reset"]) if random.random() < 0.1 else "passed on"
        did[how] += 1
        if how == "503":
            self.send_response(503)
            self.send_header("content-length", "0")
            self.end_headers()
            return
        if how == "reset":
            linger = struct.pack("ii", 1, 0)
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
            self.close_connection = True
            self.connection.close()
            return
        if how == "late":
            time.sleep(random.uniform(0.5, 3))
        server = http.client.HTTPConnection("127.0.0.1", int(sys.argv[2]))
        server.request(self.command, self.path, body, dict(self.headers))
        answer = server.getresponse()
        content = answer.read()
        self.send_response(answer.status)
        for name, value in answer.getheaders():
            if name.lower() not in ("transfer-encoding", "content-length", "connection"):
                self.send_header(name, value)
        self.send_header("content-length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = do_HEAD = _pass


def end(*_):
    print(dict(did), flush=True)
    sys.exit(0)


if __name__ == "__main__":
    proxy = http.server.ThreadingHTTPServer(("127.0.0.1", int(sys.argv[1])), Passing)
    proxy.daemon_threads = True
    signal.signal(signal.SIGTERM, end)
    print("ready", flush=True)
    proxy.serve_forever()
