"""A scorer over HTTP, for rewards that live in another process or on another machine. Copy and change it.

    python scorer.py --port 8000
    tether ppo ... --reward.functions http://localhost:8000

`score` here only counts polite words, so that the file runs as it is; put your model or your service in its place.
"""

import argparse
import json
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

POLITE = ("please", "thank", "welcome", "sorry")


def score(prompts, completions, columns):
    """One number per completion, or None where the reward does not apply."""
    return [float(any(word in str(completion).lower() for word in POLITE)) for completion in completions]


class Scorer(BaseHTTPRequestHandler):
    """Answers a POST of {"prompts": […], "completions": […], "columns": {…}} by {"scores": […]}."""

    def do_POST(self):
        """Score one batch. What `score` raises becomes a status of 500, and Tether asks again."""
        try:
            asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            scores = score(asked["prompts"], asked["completions"], asked["columns"])
            status, answer = 200, {"scores": scores}
        except Exception as error:  # noqa: BLE001 - whatever it was, the asker is told
            status, answer = 500, {"error": repr(error)}
        data = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


def server(port):
    """The server, not yet running; port 0 takes a free one."""
    return ThreadingHTTPServer(("127.0.0.1", port), Scorer)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--port", type=int, default=8000)
    with server(parser.parse_args().port) as running:
        print(f"listening on port {running.server_port}")
        running.serve_forever()
