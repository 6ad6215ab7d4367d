"""The release script refuses what must not be released: each mistake in a repository of its own."""

import datetime
import io
import subprocess
import sys
import tarfile
import zipfile

import pytest

from tests.helpers.places import ROOT
from tests.helpers.tools import needs_git

sys.path.insert(0, str(ROOT / "scripts"))
import release  # noqa: E402

pytestmark = needs_git

DAY = datetime.date(2026, 11, 27)
CHANGES = "# Changelog\n\n## [Unreleased]\n\n- A change.\n"


@pytest.fixture
def repository(tmp_path):
    (tmp_path / "lora_jax").mkdir()
    (tmp_path / "lora_jax/version.py").write_text('"""The version."""\n\n__version__ = "0.1.0"\n')
    (tmp_path / "CHANGELOG.md").write_text(CHANGES)
    git(tmp_path, "init", "-q")
    commit(tmp_path)
    return tmp_path


def git(root, *args):
    who = ("-c", "user.name=A", "-c", "user.email=a@example.org", "-c", "commit.gpgsign=false")
    subprocess.run(["git", *who, *args], cwd=root, check=True, capture_output=True)


def commit(root, *tags):
    git(root, "add", "-A")
    git(root, "commit", "-q", "--allow-empty", "-m", "A commit")
    for tag in tags:
        git(root, "tag", tag)


def test_a_prepared_version_is_one_that_can_be_released(repository):
    release.prepare(repository, "0.2.0", DAY)
    assert release.read_version(repository) == "0.2.0"
    text = (repository / "CHANGELOG.md").read_text()
    assert text == CHANGES.replace("- A", "## [0.2.0] - 2026-11-27\n\n- A")
    commit(repository, "v0.2.0")
    release.check_changelog(repository)
    release.check_tree(repository)


@pytest.mark.parametrize(
    ("version", "message"),
    [
        ("1.0", "'1.0' is no version"),
        ("v0.2.0", "is no version"),
        ("0.2.0", "has nothing under '## \\[Unreleased\\]' to release"),
        ("0.1.0", "has 0.1.0 already"),
    ],
)
def test_versions_that_are_not_prepared(repository, version, message):
    release.prepare(repository, "0.1.0", DAY)
    with pytest.raises(release.ReleaseError, match=message):
        release.prepare(repository, version, DAY)


@pytest.mark.parametrize(
    ("changelog", "message"),
    [
        (CHANGES, "The package is 0.1.0, and the newest version of CHANGELOG.md is none"),
        (f"{CHANGES}\n## [0.0.9] - 2026-11-01\n", "newest version of CHANGELOG.md is 0.0.9"),
        (f"{CHANGES}\n## [0.1.0] - 2026-11-01\n", "changes that are in no version: '- A change.'"),
        ("## [Unreleased]\n\n## [0.1.0] - soon\n", "'soon' is no date"),
        ("## [0.1.0] - 2026-11-01\n", r"has no heading '## \[Unreleased\]'"),
    ],
)
def test_changelogs_that_do_not_fit(repository, changelog, message):
    (repository / "CHANGELOG.md").write_text(changelog)
    with pytest.raises(release.ReleaseError, match=message):
        release.check_changelog(repository)


def test_a_tree_with_changes_and_one_without_the_tag(repository):
    with pytest.raises(release.ReleaseError, match=r"has the tags \[\], and not v0.1.0: git tag"):
        release.check_tree(repository)
    git(repository, "tag", "v0.1.0")
    (repository / "new.txt").write_text("x")
    with pytest.raises(release.ReleaseError, match=r"not committed:\n\?\? new.txt"):
        release.check_tree(repository)


FILES = ("CHANGELOG.md", "LICENSE", "README.md", "pyproject.toml", "lora_jax/py.typed")


def make_sdist(path, *files):
    with tarfile.open(path, "w:gz") as tar:
        for name in files:
            member = tarfile.TarInfo(f"lora_jax-0.1.0/{name}")
            member.size = release.LARGEST + 1 if "large" in name else 1
            tar.addfile(member, io.BytesIO(bytes(member.size)))
    return path


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ((*FILES, "tests/goldens/a.npz"), "holds what belongs to no release: tests/goldens/a.npz"),
        (FILES[1:], "lacks CHANGELOG.md"),
        (FILES[:-1], "lacks lora_jax/py.typed"),
        ((*FILES, "lora_jax/data/model.safetensors"), "none of the package: lora_jax/data/model"),
        ((*FILES, "lora_jax/data/large.tsv"), "large.tsv of 1,048,577 bytes"),
    ],
)
def test_source_distributions_that_hold_something_else(tmp_path, files, message):
    release.check_sdist(make_sdist(tmp_path / "right.tar.gz", *FILES, "lora_jax/a.py"))
    with pytest.raises(release.ReleaseError, match=message):
        release.check_sdist(make_sdist(tmp_path / "a.tar.gz", *files))


def test_a_wheel_of_two_packages(tmp_path):
    for extra in ("", "tests/__init__.py"):
        with zipfile.ZipFile(tmp_path / "a.whl", "w") as wheel:
            for name in ("lora_jax/py.typed", "lora_jax-0.1.0.dist-info/METADATA", extra):
                wheel.writestr(name or "lora_jax/__init__.py", "")
        if extra:
            with pytest.raises(release.ReleaseError, match="more than lora_jax: tests/__init__"):
                release.check_wheel(tmp_path / "a.whl")
        else:
            release.check_wheel(tmp_path / "a.whl")


def test_the_readmes_example_is_found():
    assert "lora.init(" in release.read_example((ROOT / "README.md").read_text(encoding="utf-8"))
    with pytest.raises(release.ReleaseError, match="no example"):
        release.read_example("```python\nprint()\n```\n")


def test_the_changelog_of_this_repository_can_be_prepared():
    assert release.read_unreleased((ROOT / "CHANGELOG.md").read_text(encoding="utf-8")) is not None
