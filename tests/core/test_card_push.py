"""The model card and the upload: valid front matter, honest results, nothing of this machine, nothing sent without being asked."""

from __future__ import annotations

import json
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
import yaml
from report_runs import HASH, HOSTILE, make_run, measured

from upo.errors import RunError
from upo.report.card import card
from upo.report.push import push
from upo.report.read import read_run


def front(text: str) -> dict[str, Any]:
    assert text.startswith("---\n")
    return yaml.safe_load(text.split("---\n")[1])


def test_the_front_matter(tmp_path):
    run = read_run(make_run(tmp_path / "run", evaluation=measured()))
    assert front(card(run)) == {
        "base_model": "owner/base",
        "library_name": "peft",
        "pipeline_tag": "text-generation",
        "tags": ["upo", "lora", "preference-optimization", "unified-preference-optimization", "kto"],
    }
    assert front(card(run, license="apache-2.0"))["license"] == "apache-2.0"
    assert front(card(run, base="other/base"))["base_model"] == "other/base"
    hub = read_run(make_run(tmp_path / "hub", model="/models/x", data={"train": "owner/pairs:train", "eval": 0.05}, objective={"preference": {"loss": "dpo"}}))
    assert front(card(hub)) == {"library_name": "peft", "pipeline_tag": "text-generation", "datasets": ["owner/pairs"], "tags": ["upo", "lora", "preference-optimization", "dpo"]}
    with pytest.raises(RunError, match="not a hub id"):
        card(run, base="/home/me/base")


def test_results_with_their_intervals_and_limits(tmp_path):
    text = card(read_run(make_run(tmp_path / "run", evaluation=measured()))).replace("\u00a0", " ")
    for line in (
        "| readability | 0.200 | 0.320 | +0.120, 95 % interval +0.050 to +0.190 (rose) |",
        "| length | 0.500 | 0.450 | −0.050, 95 % interval −0.110 to +0.010 (not shown) |",
        "| preference accuracy | 0.500 | 0.750 | +0.250, 95 % interval +0.100 to +0.400 |",
        "| win rate against before (judge: readability) |  | 0.55 | 0.45 to 0.65 (not shown) |",
        f"| training | a file of the author's | 120 | 240 | `{HASH}` |",
        "- **length**, weight -0.3: Brevity",
        "- The run warned: train.jsonl:7: 3 rows dropped.",
    ):
        assert line in text, (line, text)
    assert "No change of length is shown" in text
    plain = card(read_run(make_run(tmp_path / "plain")))
    assert "Whether the goals moved on sampled answers was not measured." in plain and "| preference accuracy | 0.500 | 0.750 |  |" in plain


def test_no_path_and_no_answer_is_in_it(tmp_path):
    text = card(read_run(make_run(tmp_path / "run", model="/home/someone/my models/base", evaluation=measured())))
    assert not any(word in text for word in ("/home", "someone", "secret", "my models", "Question 0", "after 0", str(tmp_path)))


def test_text_stays_text(tmp_path):
    folder = make_run(tmp_path / "run", evaluation=measured(goals={HOSTILE + "|": {"weight": 1, "before": 0, "after": 1}}))
    text = card(read_run(folder))
    text.encode()
    assert "<script" not in text.replace("\\<script", "") and "\\| \n" not in text and r"end\| | 0.000 | 1.000 |" in text


def test_an_unfinished_run_has_no_card(tmp_path):
    with pytest.raises(RunError, match="This run has not ended: 3 of 20 steps"):
        card(read_run(make_run(tmp_path / "run", done=3)))


# --- Upload -----------------------------------------------------------------------------------------------------------------------


class Hub:
    """Stands in for HfApi: repositories with their visibility, and what was uploaded."""

    def __init__(self, **repos: bool) -> None:
        self.private = repos
        self.created: list[tuple[str, bool]] = []
        self.uploaded: dict[str, bytes] = {}
        self.error: Exception | None = None

    def repo_exists(self, repo: str) -> bool:
        if self.error is not None:
            raise self.error
        return repo.split("/")[1] in self.private

    def repo_info(self, repo: str) -> SimpleNamespace:
        return SimpleNamespace(private=self.private[repo.split("/")[1]])

    def create_repo(self, repo: str, private: bool) -> None:
        self.created.append((repo, private))

    def upload_folder(self, repo_id: str, folder_path: str, commit_message: str) -> str:
        self.uploaded = {str(path.relative_to(folder_path)): path.read_bytes() for path in Path(folder_path).rglob("*") if path.is_file()}
        return f"https://hub/{repo_id}/commit/1"


@pytest.fixture
def hub(monkeypatch) -> Hub:
    hub = Hub(open=False, closed=True)
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: hub)
    return hub


def test_a_dry_run_sends_nothing(tmp_path, hub, monkeypatch):
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: pytest.fail("the hub was asked"))
    run = make_run(tmp_path / "run", evaluation=measured())
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    done = push(run, "me/new")
    assert sorted(done.files) == ["README.md", "adapter_config.json", "adapter_model.safetensors", "config.yaml"] and done.files["adapter_model.safetensors"] == 10
    assert done.url is None and done.private and not done.written and front(done.card)["base_model"] == "owner/base"
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


def test_the_upload_is_private_and_holds_nothing_else(tmp_path, hub):
    run = make_run(tmp_path / "run", evaluation=measured(), objective={"preset": "upo", "auxiliary": {"rewards": {"scorer": "python", "function": "/home/someone/mine.py:f"}}})
    (run / "adapter" / "notes.txt").write_text("private")
    done = push(run, "me/new", upload=True)
    assert hub.created == [("me/new", True)] and done.url == "https://hub/me/new/commit/1"
    assert sorted(hub.uploaded) == ["README.md", "adapter_config.json", "adapter_model.safetensors", "config.yaml"]
    assert {name: len(content) for name, content in hub.uploaded.items()} == done.files
    everything = b"\n".join(hub.uploaded.values()).decode()
    assert not any(word in everything for word in ("/home", "someone", "secret", "Question 0", str(tmp_path)))
    assert json.loads(hub.uploaded["adapter_config.json"])["base_model_name_or_path"] == "owner/base"
    config = yaml.safe_load(hub.uploaded["config.yaml"])
    assert config["model"] == "owner/base" and config["data"]["train"] == "train.jsonl" and "function: mine.py:f" in hub.uploaded["config.yaml"].decode()
    assert push(run, "me/new", upload=True, metrics=True).files["metrics.jsonl"] == (run / "metrics.jsonl").stat().st_size


def test_a_public_repository_needs_a_word(tmp_path, hub):
    run = make_run(tmp_path / "run")
    with pytest.raises(RunError, match=r"me/open: exists and is public\. Add --public"):
        push(run, "me/open", upload=True)
    assert hub.uploaded == {} and hub.created == []
    push(run, "me/open", upload=True, public=True)
    assert hub.uploaded and hub.created == []
    push(run, "me/closed", upload=True)
    push(run, "me/new", upload=True, public=True)
    assert hub.created == [("me/new", False)]


def test_an_edited_card_is_taken(tmp_path, hub):
    run = make_run(tmp_path / "run")
    (run / "README.md").write_text("# mine\n")
    done = push(run, "me/new", upload=True)
    assert hub.uploaded["README.md"] == b"# mine\n" and done.written


def test_a_base_that_nobody_else_has(tmp_path, hub):
    run = make_run(tmp_path / "run", model="/home/someone/base")
    with pytest.raises(RunError, match=r"the base model is a folder \(base\).*--base owner/name"):
        push(run, "me/new")
    push(run, "me/new", upload=True, base="owner/its-base")
    assert json.loads(hub.uploaded["adapter_config.json"])["base_model_name_or_path"] == "owner/its-base" == yaml.safe_load(hub.uploaded["config.yaml"])["model"]


@pytest.mark.parametrize("repo", ["mine", "a/b/c", "me/..", "me/x y", "", "me/" + "x" * 200])
def test_a_bad_name_is_refused_in_one_line(tmp_path, hub, repo):
    with pytest.raises(RunError) as caught:
        push(make_run(tmp_path / "run"), repo, upload=True)
    assert "owner/name" in str(caught.value) and len(str(caught.value).splitlines()) == 1 and hub.created == []


def test_no_result_or_a_link_is_refused(tmp_path, hub):
    with pytest.raises(RunError, match=r"no result to upload. This run has not ended: 3 of 20"):
        push(make_run(tmp_path / "half", done=3), "me/new")
    run = make_run(tmp_path / "run")
    weights = run / "adapter" / "adapter_model.safetensors"
    weights.unlink()
    os.symlink("/etc/hostname", weights)
    with pytest.raises(RunError, match="is a link, which is not followed"):
        push(run, "me/new", upload=True)
    assert hub.uploaded == {}


def test_what_the_hub_says_becomes_one_line(tmp_path, hub):
    from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError, OfflineModeIsEnabled

    run = make_run(tmp_path / "run")

    def refused(status: int) -> HfHubHTTPError:
        error = HfHubHTTPError.__new__(HfHubHTTPError)
        Exception.__init__(error, f"{status} refused\nRequest ID: x")
        error.response = SimpleNamespace(status_code=status)
        return error

    for error, message in (
        (LocalTokenNotFoundError("no token"), "not logged in to the hub. Log in with `hf auth login`"),
        (refused(403), "the hub refused .403 refused.*hf auth login"),
        (refused(500), "the hub refused .500 refused.*Try again"),
        (OfflineModeIsEnabled("offline"), "could not be uploaded .offline."),
        (ConnectionError("no route"), "could not be uploaded .no route."),
        (type("ConnectError", (HfHubHTTPError.__mro__[1],), {})("refused"), "could not be uploaded .refused."),  # not an OSError
    ):
        hub.error = error
        with pytest.raises(RunError, match=message) as caught:
            push(run, "me/new", upload=True)
        assert len(str(caught.value).splitlines()) == 1
