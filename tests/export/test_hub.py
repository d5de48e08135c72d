"""Exports on the hub: a server on this machine takes the place of huggingface.co."""

import base64
import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import huggingface_hub
import pytest
import yaml
from refusals import refused
from student_checkpoints import write_student

from hgkd.cli.export import main
from hgkd.export.hub import check_push, push_export

ROOT = Path(__file__).parents[2]


class Hub(ThreadingHTTPServer):
    """A hub as far as it takes repositories and files.

    Attributes:
        repos: name -> private.
        files: repository -> file -> content.
        asked: (method, path, Authorization) of every request.
        refuse: status that answers every commit, or None.
    """

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Answer)
        self.repos, self.files, self.asked, self.uploaded, self.refuse = {}, {}, [], {}, None
        self.address = f"http://127.0.0.1:{self.server_address[1]}"


class Answer(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def reply(self, content, status=200):
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def handle_any(self):
        hub = self.server
        if self.headers.get("Transfer-Encoding") == "chunked":
            body = b""
            while size := int(self.rfile.readline(), 16):
                body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
        else:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        hub.asked.append((self.command, self.path, self.headers.get("Authorization")))
        path = self.path.partition("?")[0].strip("/").split("/")
        if path == ["api", "repos", "create"]:
            asked = json.loads(body)
            name = "/".join(filter(None, (asked.get("organization"), asked["name"])))
            if name in hub.repos:
                return self.reply({"error": "You already created this model repo", "url": f"{hub.address}/{name}"}, 409)
            hub.repos[name] = bool(asked.get("private")) or asked.get("visibility") == "private"
            return self.reply({"url": f"{hub.address}/{name}", "id": name})
        if path == ["api", "validate-yaml"]:
            return self.reply({"errors": [], "warnings": []})
        if path[0] == "put":
            hub.uploaded[path[1]] = body
            return self.reply({})
        if path[-4:] == ["info", "lfs", "objects", "batch"]:
            objects = json.loads(body)["objects"]
            for one in objects:
                one["actions"] = {"upload": {"href": f"{hub.address}/put/{one['oid']}"}}
            return self.reply({"transfer": "basic", "objects": objects})
        repo = "/".join(path[2:4])
        if repo not in hub.repos:
            return self.reply({"error": "Repository not found"}, 404)
        if path[4:] == ["preupload", "main"]:
            files = json.loads(body)["files"]
            modes = {f["path"]: "lfs" if f["path"].endswith(".safetensors") else "regular" for f in files}
            return self.reply({"files": [{"path": p, "uploadMode": m, "shouldIgnore": False} for p, m in modes.items()]})
        if path[4:] == ["commit", "main"]:
            if hub.refuse:
                return self.reply({"error": "You do not have write access"}, hub.refuse)
            held = hub.files.setdefault(repo, {})
            for line in map(json.loads, body.decode().splitlines()):
                value = line["value"]
                if line["key"] == "file":
                    held[value["path"]] = base64.b64decode(value["content"])
                elif line["key"] == "lfsFile":
                    held[value["path"]] = hub.uploaded[value["oid"]]
            return self.reply({"commitUrl": f"{hub.address}/{repo}/commit/1", "commitOid": "1" * 40, "success": True})
        return self.reply(
            {"id": repo, "modelId": repo, "private": hub.repos[repo], "sha": "0" * 40, "siblings": [], "tags": []}
        )

    do_GET = do_POST = do_PUT = handle_any


@pytest.fixture
def hub(monkeypatch):
    server = Hub()
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", server.address)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)  # a protocol of its own; the hub takes both
    monkeypatch.setenv("HF_HUB_DISABLE_XET", "1")  # of processes
    monkeypatch.setenv("HF_TOKEN", "hf_test")
    monkeypatch.setenv("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def run(tmp_path):
    """A checkpoint in the work folder of a run with three validations, of which a resumed start did one again."""
    (tmp_path / "run").mkdir()
    write_student(tmp_path / "run/epoch_4.pth")
    for stamp, rows in (("1", [(2, 40.0), (3, 47.5)]), ("2", [(3, 45.0), (4, 42.5)])):
        folder = tmp_path / "run" / stamp / "vis_data"
        folder.mkdir(parents=True)
        lines = [{"lr": 0.1, "loss": 1.0, "step": 9}, *({"knn/top1": top, "time": 0.1, "step": step} for step, top in rows)]
        (folder / "scalars.json").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return tmp_path / "run/epoch_4.pth"


def test_a_command_sends_the_folder_to_the_hub_of_the_environment(run, tmp_path, hub):
    command = [sys.executable, "-m", "hgkd", "export", run, "--to", "timm", "--out", tmp_path / "out"]
    command += ["--licence", "weights=mit", "--push", "ana/tiny", "--private"]
    env = {**os.environ, "HF_ENDPOINT": hub.address, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "0"}
    done = subprocess.run(list(map(str, command)), env=env, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert f"sent to {hub.address}/ana/tiny (private)" in done.stdout
    assert hub.repos == {"ana/tiny": True}
    sent = hub.files["ana/tiny"]
    assert set(sent) == {"README.md", "config.json", "model.safetensors"}
    assert all(sent[name] == (tmp_path / "out" / name).read_bytes() for name in sent)
    told = [token for _, path, token in hub.asked if path.endswith(("/create", "/commit/main"))]
    assert told == ["Bearer hf_test"] * 2
    _, front, page = sent["README.md"].decode().split("---\n", 2)
    assert yaml.safe_load(front)["library_name"] == "timm"
    numbers = page.partition("## run\n")[2].partition("## ")[0]
    assert "knn/top1:" in numbers
    for line in ("last: 42.5", "lowest: 40.0", "highest: 45.0", "validations: 3"):
        assert f"- {line}\n" in numbers
    assert str(tmp_path) not in page


def test_nothing_is_sent_unasked(run, tmp_path, hub):
    assert main([str(run), "--out", str(tmp_path / "out")]) == 0
    assert hub.asked == []


def test_a_repository_that_is_there_is_written_to_but_stays_as_private_as_asked(run, tmp_path, hub):
    hub.repos["ana/tiny"] = False
    assert main([str(run), "--out", str(tmp_path / "out"), "--push", "ana/tiny"]) == 0
    assert "README.md" in hub.files["ana/tiny"]
    hub.files.clear()
    with refused(RuntimeError, "hub-repository-public", "ana/tiny"):
        push_export(tmp_path / "out", "ana/tiny", private=True)
    assert hub.files == {}


def test_a_hub_that_refuses_leaves_the_export(run, tmp_path, hub, capsys):
    hub.refuse = 403
    assert main([str(run), "--out", str(tmp_path / "out"), "--push", "ana/tiny"]) == 2
    told = capsys.readouterr().err
    assert "hub-refuses" in told
    assert "hf upload ana/tiny" in told
    assert (tmp_path / "out/model.safetensors").is_file()


@pytest.mark.parametrize(
    "name", ["tiny", "ana/tiny/x", "ana//tiny", "ana/tiny--x", "an a/tiny", "ana/.tiny", "https://hf.co/ana/x"]
)
def test_names_are_looked_at_before_the_export(run, tmp_path, hub, name, capsys):
    assert main([str(run), "--out", str(tmp_path / "out"), "--push", name]) == 2
    assert "push-name" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert hub.asked == []


def test_what_is_missing_is_told_before_the_export(run, tmp_path, hub, monkeypatch, capsys):
    def code(*options):
        assert main([str(run), "--out", str(tmp_path / "out"), *options]) == 2
        assert not (tmp_path / "out").exists()
        return capsys.readouterr().err.split("[")[-1].split("]")[0]

    assert code("--to", "ncnn", "--push", "ana/tiny") == "push-target"
    assert code("--to", "tim", "--push", "ana/tiny") == "push-target"
    assert code("--private") == "private-without-push"
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert code("--push", "ana/tiny") == "push-offline"
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    with refused(ValueError, "push-without-login", "ana/tiny", "hf auth login"):
        check_push("ana/tiny", "timm")
    assert hub.asked == []
