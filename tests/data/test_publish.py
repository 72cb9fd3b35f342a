"""Nothing leaves the machine unreviewed, in public, or without a typed yes."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import pytest

from srpo_jax.data import scenes
from srpo_jax.data.formats import convert
from srpo_jax.data.loaders import open_records
from srpo_jax.data.publish import PublishError, publish


class FakeHub:
    """Keeps what it is asked; repositories are `private` or not."""

    def __init__(self, exists=False, private=True, made_public=False):
        self.exists, self.private, self.made_public, self.calls = exists, private, made_public, []

    def repo_exists(self, repo_id, *, repo_type):
        return self.exists

    def repo_info(self, repo_id, *, repo_type):
        return SimpleNamespace(private=self.private)

    def create_repo(self, repo_id, *, repo_type, private, exist_ok):
        self.calls.append(("create", repo_id, repo_type, private))
        self.exists, self.private = True, private and not self.made_public

    def upload_folder(self, *, repo_id, repo_type, folder_path, allow_patterns):
        self.calls.append(("upload", repo_id, repo_type, folder_path))


def written(tmp_path, statuses, card=True):
    metas = [{"review": {"status": status}} if status else {} for status in statuses]
    records = [
        dataclasses.replace(r, meta=m) for r, m in zip(scenes.records("train", len(statuses)), metas, strict=True)
    ]
    out = tmp_path / "out"
    convert(len(records), lambda i: [records[i]], "parquet", out, schema="ssui", origin={"source": "w"})
    if card:
        (out / "README.md").write_text("# Data card\n")
    return open_records(out, "datasets"), out


def test_reviewed_records_go_to_a_private_repository_after_its_name_was_typed(tmp_path):
    records, out = written(tmp_path, ["accepted", "edited"])
    hub, asked = FakeHub(), []
    assert publish(records, out, "owner/name", hub, lambda text: asked.append(text) or "owner/name") == 2
    assert hub.calls == [("create", "owner/name", "dataset", True), ("upload", "owner/name", "dataset", str(out))]
    assert "2 records" in asked[0] and "private data set owner/name" in asked[0]


@pytest.mark.parametrize("typed", ["", "y", "yes", "owner/other"])
def test_anything_but_the_name_is_a_no(tmp_path, typed):
    records, out = written(tmp_path, ["accepted", "edited"])
    hub = FakeHub()
    with pytest.raises(PublishError, match="nothing was uploaded"):
        publish(records, out, "owner/name", hub, lambda _: typed)
    assert hub.calls == []


@pytest.mark.parametrize("status", [None, "rejected", "disturbing", "draft"])
def test_a_record_that_was_not_accepted_stops_all(tmp_path, status):
    records, out = written(tmp_path, ["accepted", status])
    hub = FakeHub()
    with pytest.raises(PublishError, match=rf"1 of 2 records .*\({status or 'not reviewed'}\)"):
        publish(records, out, "owner/name", hub, lambda _: pytest.fail("asked although it must not"))
    assert hub.calls == []


def test_a_public_repository_is_refused_before_and_after_it_is_made(tmp_path):
    records, out = written(tmp_path, ["accepted", "edited"])
    for hub, calls in ((FakeHub(exists=True, private=False), 0), (FakeHub(made_public=True), 1)):
        with pytest.raises(PublishError, match="owner/name is public"):
            publish(records, out, "owner/name", hub, lambda _: "owner/name")
        assert len(hub.calls) == calls  # never an upload


def test_a_data_card_and_a_finished_conversion_are_needed(tmp_path):
    records, out = written(tmp_path, ["accepted", "edited"], card=False)
    with pytest.raises(PublishError, match="no data card"):
        publish(records, out, "owner/name", FakeHub(), lambda _: "owner/name")
    (out / "conversion.json").unlink()
    with pytest.raises(PublishError, match="no finished conversion"):
        publish(records, out, "owner/name", FakeHub(), lambda _: "owner/name")


def test_a_folder_that_lost_records_is_refused(tmp_path):
    records, out = written(tmp_path, ["accepted"] * 4)
    with pytest.raises(PublishError, match=r"holds 3 records, its conversion.json says 4"):
        publish(records[:3], out, "owner/name", FakeHub(), lambda _: "owner/name")
