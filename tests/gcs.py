"""A server that speaks Google Cloud Storage's protocol on this machine."""

import contextlib
import functools
import json
import re
import threading
import urllib.parse
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest


@contextlib.contextmanager
def gcs_bucket() -> Iterator[str]:
    """An empty bucket, which tensorstore and gcsfs find by their environment variables."""
    url = f"http://127.0.0.1:{_server().server_port}"
    GcsHandler.objects.clear()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TENSORSTORE_GCS_HTTP_URL", url)
        patch.setenv("GOOGLE_AUTH_TOKEN_FOR_TESTING", "secret")
        patch.setenv("STORAGE_EMULATOR_HOST", url)
        yield "gs://some-bucket"


@functools.cache
def _server() -> ThreadingHTTPServer:
    # one for the whole process: clients keep their connections, and would go on talking to an earlier one
    server = ThreadingHTTPServer(("127.0.0.1", 0), GcsHandler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server


class GcsHandler(BaseHTTPRequestHandler):
    """Google Cloud Storage's JSON API for one bucket, as far as tensorstore and gcsfs (Orbax's) use it."""

    protocol_version = "HTTP/1.1"
    objects: dict[str, tuple[bytes, int]] = {}
    page_size = 2

    def log_message(self, format, *args):
        pass

    def do_GET(self):
        name, query = self._object()
        if name is None and urllib.parse.urlsplit(self.path).path.endswith("/some-bucket"):
            self._answer(200, b'{"kind": "storage#bucket", "name": "some-bucket"}')
        elif name is None:
            self._list(query)
        elif name not in self.objects:
            self._answer(404, b"Not Found")
        elif query.get("alt") != "media":
            self._answer(200, json.dumps(self._metadata(name)).encode())
        else:
            data, generation = self.objects[name]
            headers = {"x-goog-generation": str(generation), "content-type": "application/octet-stream"}
            if (wanted := self.headers.get("range")) is None:
                return self._answer(200, data, headers)
            first, last = wanted.removeprefix("bytes=").split("-")
            start = int(first) if first else len(data) - int(last)
            stop = min(int(last) + 1, len(data)) if first and last else len(data)
            if start >= len(data):
                return self._answer(416, b"", {"content-range": f"bytes */{len(data)}"})
            headers["content-range"] = f"bytes {start}-{stop - 1}/{len(data)}"
            self._answer(206, data[start:stop], headers)

    def do_POST(self):
        if self.path.startswith("/batch/"):
            return self._delete_all()
        _, query = self._object("/upload")
        data = self.rfile.read(int(self.headers["content-length"]))
        if query["uploadType"] == "multipart":  # gcsfs: metadata and content, between boundaries
            boundary = re.search(r'boundary="?([^";]+)', self.headers["content-type"])[1].encode()
            metadata, content = (part.split(b"\n\n", 1)[1] for part in data.split(b"--" + boundary)[1:3])
            query["name"], data = json.loads(metadata)["name"], content.removesuffix(b"\n")
        if query["uploadType"] == "resumable":  # gcsfs: the content follows
            name = query.get("name") or json.loads(data)["name"]
            location = f"http://{self.headers['host']}/upload/storage/v1/b/some-bucket/o?uploadType=media&"
            return self._answer(200, b"{}", {"location": location + urllib.parse.urlencode({"name": name})})
        name = query["name"]
        generation = self.objects.get(name, (b"", 0))[1]
        if int(query.get("ifGenerationMatch", generation)) != generation:
            return self._answer(412, b"Precondition Failed")
        self.objects[name] = data, self.objects.get(name, (b"", 0))[1] + 1
        self._answer(200, json.dumps(self._metadata(name)).encode())

    def do_DELETE(self):
        name, _ = self._object()
        self._answer(204 if self.objects.pop(name or "", None) else 404, b"")

    def _delete_all(self):
        body = self.rfile.read(int(self.headers["content-length"])).decode()
        boundary = re.search(r'boundary="?([^";]+)', self.headers["content-type"])[1]
        answers = []
        for path in re.findall(r"DELETE (\S+) HTTP", body):
            name = urllib.parse.unquote(path.partition("/o/")[2].partition("?")[0])
            status = "204 No Content" if self.objects.pop(name, None) else "404 Not Found"
            answers.append(f"--{boundary}\nContent-Type: application/http\n\nHTTP/1.1 {status}\n\n")
        headers = {"content-type": f"multipart/mixed; boundary={boundary}"}
        self._answer(200, ("".join(answers) + f"--{boundary}--").encode(), headers)

    def _list(self, query):
        low, high, token = (query.get(key, "") for key in ("startOffset", "endOffset", "pageToken"))
        start, delimiter = query.get("prefix", ""), query.get("delimiter")
        names = sorted(
            n for n in self.objects if max(low, token) <= n and (not high or n < high) and n.startswith(start)
        )
        page: dict[str, object] = {"kind": "storage#objects"}
        size = int(query.get("maxResults", self.page_size))
        if names[size:]:
            page["nextPageToken"] = names[size]
        names = names[:size]
        if delimiter:
            inside = [n for n in names if delimiter in n[len(start) :]]
            page["prefixes"] = sorted({start + n[len(start) :].split(delimiter)[0] + delimiter for n in inside})
            names = [n for n in names if n not in inside]
        page["items"] = [self._metadata(name) for name in names]
        self._answer(200, json.dumps(page).encode())

    def _metadata(self, name):
        data, generation = self.objects[name]
        times = dict.fromkeys(("timeCreated", "updated"), "2024-01-01T00:00:00.000Z")
        return {"name": name, "size": str(len(data)), "generation": str(generation), "metageneration": "1", **times}

    def _object(self, prefix=""):
        """Object name (None for the bucket itself) and query of a request; refuses what the real server would."""
        url = urllib.parse.urlsplit(self.path)
        query = dict(urllib.parse.parse_qsl(url.query, keep_blank_values=True))
        path = url.path.removeprefix("/download").removeprefix(prefix).removeprefix("/storage/v1/b/")
        bucket, _, name = path.partition("/o")
        # Orbax's clients send no credentials to an emulator
        anonymous = any(client in self.headers["user-agent"] for client in ("gcsfs", "gcloud-python"))
        if not anonymous and self.headers["authorization"] != "Bearer secret":
            self._answer(401, b"Unauthorized")
            raise ConnectionAbortedError("no credentials")
        if bucket != "some-bucket":
            self.rfile.read(int(self.headers["content-length"] or 0))
            self._answer(404, b"The specified bucket does not exist")
            raise ConnectionAbortedError("no such bucket")
        return urllib.parse.unquote(name[1:]) or None, query

    def handle_one_request(self):
        try:
            super().handle_one_request()
        except ConnectionError:  # refused above, or the client left
            self.close_connection = True

    def _answer(self, status, data, headers=None):
        self.send_response(status)
        for key, value in {**(headers or {}), "content-length": str(len(data))}.items():
            self.send_header(key, value)
        self.end_headers()
        self.wfile.write(data)
