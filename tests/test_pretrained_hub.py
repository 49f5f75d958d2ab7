"""Checkpoints by their name on the hub, from a cache that the test lays out as huggingface_hub does, without a network."""

import shutil
import subprocess
import sys

import huggingface_hub
import pytest
from families import CASES

import tinylm
from pretrained import find_checkpoint
from tinylm import TinyLM

LLAMA = next(case for case in CASES if case.name == "llama")
COMMIT, OLDER = "0" * 39 + "1", "0" * 39 + "2"


@pytest.fixture(scope="module")
def cache(folder, tmp_path_factory):
    """A cache with a repository at two commits: refs/, snapshots/ and blobs/."""
    cache = tmp_path_factory.mktemp("hub")
    repository = cache / "models--somebody--tiny-llama"
    for part in ("refs", "blobs", *(f"snapshots/{commit}" for commit in (COMMIT, OLDER))):
        (repository / part).mkdir(parents=True)
    (repository / "refs" / "main").write_text(COMMIT)
    (repository / "refs" / "v1").write_text(OLDER)
    for commit in (COMMIT, OLDER):
        for file in sorted(folder(LLAMA).iterdir()):
            blob = repository / "blobs" / f"{commit}-{file.name}"
            shutil.copy(file, blob)
            (repository / "snapshots" / commit / file.name).symlink_to(f"../../blobs/{blob.name}")
    (repository / "snapshots" / OLDER / "generation_config.json").unlink()
    return cache


@pytest.fixture
def hub(cache, monkeypatch, tmp_path):
    """Offline, with that cache, in an empty folder."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_name_on_the_hub(hub, cache, folder):
    lm = TinyLM.from_pretrained("somebody/tiny-llama")
    expected = TinyLM.from_pretrained(folder(LLAMA))
    assert lm.config == expected.config and (lm.embed.weight == expected.embed.weight).all()
    assert lm.folder == cache / "models--somebody--tiny-llama" / "snapshots" / COMMIT


def test_a_revision(hub):
    assert find_checkpoint("somebody/tiny-llama", "v1").name == OLDER
    assert find_checkpoint("somebody/tiny-llama", revision=OLDER).name == OLDER
    assert TinyLM.from_pretrained("somebody/tiny-llama", revision="v1").folder.name == OLDER


def test_a_folder_goes_before_the_hub(hub, folder):
    shutil.copytree(folder(LLAMA), hub / "somebody" / "tiny-llama")
    assert not find_checkpoint("somebody/tiny-llama").is_absolute()
    assert find_checkpoint(folder(LLAMA)) == folder(LLAMA)
    with pytest.raises(tinylm.Error, match="revision"):
        find_checkpoint("somebody/tiny-llama", revision="main")


@pytest.mark.parametrize(
    "name", ["somebody/nothing", "nothing", "somebody/tiny-llama/x", "/no/x", "a" * 500, ""]
)
def test_neither(hub, name):
    with pytest.raises(tinylm.Error) as error:
        TinyLM.from_pretrained(name)
    assert name[:100] in str(error.value) and "\n" not in str(error.value)


def test_without_huggingface_hub(hub, monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(tinylm.Error) as error:
        find_checkpoint("somebody/tiny-llama")
    for word in ("pip install huggingface_hub", "hf download somebody/tiny-llama --local-dir"):
        assert word in str(error.value)


def test_the_hub_is_imported_when_it_is_used():
    code = "import sys, tinylm; assert 'huggingface_hub' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tinylm.__file__.rpartition("/")[0])
