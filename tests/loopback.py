"""A server on this machine in the place of one elsewhere. What it answers, each test says."""

import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Loopback(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 100

    def __init__(self, handler, path="/v1"):
        super().__init__(("127.0.0.1", 0), handler)
        self.url = f"http://127.0.0.1:{self.server_port}{path}"

    def handle_error(self, request, client_address):
        pass

    def __enter__(self):
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *_):
        self.shutdown()
        self.server_close()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def asked(self):
        return self.rfile.read(int(self.headers["Content-Length"]))

    def send(self, answer, status=200, headers=None, share=1.0, pause=0.0):
        """JSON, or bytes as they are; only a share of it, or byte by byte with pauses, where that is asked for."""
        data = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", **(headers or {})}.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        for byte in data if pause else ():
            time.sleep(pause)
            self.wfile.write(bytes([byte]))
        if not pause:
            self.wfile.write(data[: int(len(data) * share)])
        if share < 1:
            self.close_connection = True


def completion(body, said, **choice):
    """The answer to a chat or a completion request, as the schema of OpenAI has it."""
    text = {"message": {"role": "assistant", "content": said}} if "messages" in body else {"text": said}
    choice = {"index": 0, "finish_reason": "stop", "logprobs": None, **text, **choice}
    kind = "chat.completion" if "messages" in body else "text_completion"
    usage = {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2}
    return {"id": "1", "object": kind, "created": 0, "model": body["model"], "choices": [choice], "usage": usage}
