"""Prepares, builds and checks a release; it uploads nothing unless it is told to.

    python scripts/release.py prepare 0.2.0      # version and changelog, for a commit and a tag
    python scripts/release.py build              # sdist and wheel in dist/, checked and tried
    python scripts/release.py build --rehearse   # the same before there is a tag, or a clean tree
    python scripts/release.py upload             # asks, and hands dist/ to twine

What is built is what is committed: `git archive` of HEAD, in a directory of its own. The wheel is
installed in a fresh environment, where the README's example must run. `build` and `twine` are in
the extra `release`.
"""

import argparse
import datetime
import re
import subprocess
import sys
import tarfile
import tempfile
import venv
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
VERSION_FILE, CHANGELOG = Path("lora_jax/version.py"), Path("CHANGELOG.md")
UNRELEASED = "## [Unreleased]"
_VERSION = re.compile(r'^__version__ = "(.*)"$', re.MULTILINE)
_HEADING = re.compile(r"^## \[(\d[^\]]*)\] - (.*)$", re.MULTILINE)
# All that a source distribution holds beside the package: no tests, which need their goldens, and
# no programs. They are in the repository, at the tag.
SDIST_FILES = {
    "CHANGELOG.md", "CITATION.cff", "LICENSE", "MANIFEST.in", "PKG-INFO", "README.md",
    "constraints.txt", "pyproject.toml", "setup.cfg", "setup.py",
}  # fmt: skip
DATA = (".tsv", ".jsonl", "README.md", "py.typed")  # of the package, beside Python
LARGEST = 2**20  # bytes of a file


class ReleaseError(Exception):
    """A reason not to release."""


def run(*command: str | Path, cwd: Path) -> str:
    """Runs a command and returns what it prints."""
    done = subprocess.run([str(x) for x in command], cwd=cwd, capture_output=True, text=True)
    if done.returncode:
        raise ReleaseError(f"{' '.join(map(str, command))}:\n{done.stdout}{done.stderr}")
    return done.stdout.strip()


# ---- Version and changelog -----------------------------------------------------------------------


def read_version(root: Path) -> str:
    """Reads the version of the package."""
    match = _VERSION.search((root / VERSION_FILE).read_text(encoding="utf-8"))
    if match is None:
        raise ReleaseError(f'{VERSION_FILE} has no line __version__ = "...".')
    return match[1]


def prepare(root: Path, version: str, date: datetime.date) -> None:
    """Writes a version, and makes what is unreleased in the changelog that version's."""
    if not re.fullmatch(r"\d+\.\d+\.\d+((a|b|rc)\d+)?", version):
        raise ReleaseError(f"{version!r} is no version such as 0.2.0, or 0.2.0rc1.")
    text = (root / CHANGELOG).read_text(encoding="utf-8")
    if version in dict(_HEADING.findall(text)):
        raise ReleaseError(f"{CHANGELOG} has {version} already: choose a new version.")
    if not read_unreleased(text):
        raise ReleaseError(f"{CHANGELOG} has nothing under {UNRELEASED!r} to release.")
    heading = f"{UNRELEASED}\n\n## [{version}] - {date.isoformat()}"
    (root / CHANGELOG).write_text(text.replace(UNRELEASED, heading, 1), encoding="utf-8")
    code = (root / VERSION_FILE).read_text(encoding="utf-8")
    new = _VERSION.sub(f'__version__ = "{version}"', code)
    (root / VERSION_FILE).write_text(new, encoding="utf-8")


def read_unreleased(text: str) -> str:
    """Returns what a changelog says of changes that are not released."""
    _, found, rest = text.partition(f"{UNRELEASED}\n")
    if not found:
        raise ReleaseError(f"{CHANGELOG} has no heading {UNRELEASED!r}.")
    return re.split(r"^## ", rest, maxsplit=1, flags=re.MULTILINE)[0].strip()


def check_changelog(root: Path) -> None:
    """Checks that the changelog's newest version is the package's, with everything in it."""
    text, version = (root / CHANGELOG).read_text(encoding="utf-8"), read_version(root)
    newest = _HEADING.search(text)
    if newest is None or newest[1] != version:
        there = newest[1] if newest else "none"
        raise ReleaseError(
            f"The package is {version}, and the newest version of {CHANGELOG} is {there}: "
            f"scripts/release.py prepare VERSION writes both."
        )
    try:
        datetime.date.fromisoformat(newest[2])
    except ValueError:
        raise ReleaseError(f"{CHANGELOG}: {newest[2]!r} is no date such as 2026-11-27.") from None
    if changes := read_unreleased(text):
        raise ReleaseError(f"{CHANGELOG} has changes that are in no version: {changes[:70]!r}...")


def check_tree(root: Path) -> None:
    """Checks that all is committed, and that HEAD has the version's tag."""
    if changed := run("git", "status", "--porcelain", cwd=root):
        raise ReleaseError(f"The tree has changes that are not committed:\n{changed}")
    tag = f"v{read_version(root)}"
    if tag not in (tags := run("git", "tag", "--points-at", "HEAD", cwd=root).split()):
        raise ReleaseError(
            f"HEAD has the tags {tags}, and not {tag}: git tag -a {tag} -m 'Version "
            f"{tag[1:]}'; or rehearse with --rehearse."
        )


# ---- Distributions -------------------------------------------------------------------------------


def build(root: Path, out: Path) -> tuple[Path, Path]:
    """Builds what is committed; returns the source distribution and the wheel."""
    with tempfile.TemporaryDirectory() as folder:
        archive = Path(folder) / "source.tar"
        run("git", "archive", "--output", archive, "HEAD", cwd=root)
        with tarfile.open(archive) as tar:
            tar.extractall(Path(folder) / "source", filter="data")
        out.mkdir(exist_ok=True)
        for old in out.glob("lora_jax-*"):
            old.unlink()
        command = (sys.executable, "-m", "build", "--outdir", out)
        run(*command, Path(folder) / "source", cwd=Path(folder))
    (sdist,), (wheel,) = out.glob("*.tar.gz"), out.glob("*.whl")
    return sdist, wheel


def check_sdist(path: Path) -> None:
    """Checks that a source distribution holds the package and the files beside it alone."""
    with tarfile.open(path) as tar:
        sizes = {m.name.partition("/")[2]: m.size for m in tar.getmembers() if m.isfile()}
    package = {name: n for name, n in sizes.items() if name.startswith("lora_jax/")}
    others = {n for n in sizes if n not in package and not n.startswith("lora_jax.egg-info/")}
    if wrong := sorted(others - SDIST_FILES):
        raise ReleaseError(f"{path.name} holds what belongs to no release: {', '.join(wrong)}.")
    wanted = {"CHANGELOG.md", "LICENSE", "README.md", "pyproject.toml"}
    if missing := sorted(wanted - others):
        raise ReleaseError(f"{path.name} lacks {', '.join(missing)}.")
    _check_package(path.name, package)


def check_wheel(path: Path) -> None:
    """Checks that a wheel holds one package, and of data what the package reads."""
    with zipfile.ZipFile(path) as wheel:
        sizes = {m.filename: m.file_size for m in wheel.infolist() if not m.is_dir()}
    package = {n: x for n, x in sizes.items() if ".dist-info/" not in n}
    if wrong := sorted(n for n in package if not n.startswith("lora_jax/")):
        raise ReleaseError(f"{path.name} holds more than lora_jax: {', '.join(wrong)}.")
    _check_package(path.name, package)


def _check_package(where: str, sizes: dict[str, int]) -> None:
    wrong = [n for n in sizes if not n.endswith((".py", *DATA))]
    wrong += [f"{n} of {size:,} bytes" for n, size in sizes.items() if size > LARGEST]
    if wrong:
        raise ReleaseError(f"{where} holds files that are none of the package: {', '.join(wrong)}.")
    if "lora_jax/py.typed" not in sizes:
        raise ReleaseError(f"{where} lacks lora_jax/py.typed, by which type checkers read it.")


def read_example(readme: str) -> str:
    """Returns the first block of Python in the README that makes an adapter."""
    blocks = re.findall(r"^```python\n(.*?)^```", readme, flags=re.DOTALL | re.MULTILINE)
    found = [block for block in blocks if "import lora_jax" in block and ".init(" in block]
    if not found:
        raise ReleaseError("README.md has no example that imports lora_jax.")
    return found[0]


def try_wheel(root: Path, wheel: Path) -> None:
    """Installs a wheel in a fresh environment, and runs the README's example there."""
    example = read_example((root / "README.md").read_text(encoding="utf-8"))
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        venv.create(home / "venv", with_pip=True)
        python = home / "venv" / "bin" / "python"
        pip = (python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check")
        run(*pip, "-c", root / "constraints.txt", wheel, cwd=home)
        version = run(python, "-c", "import lora_jax; print(lora_jax.__version__)", cwd=home)
        if version != read_version(root):
            raise ReleaseError(f"The wheel says that it is {version}.")
        run(python, "-W", "error", "-c", example, cwd=home)


# ---- The command ---------------------------------------------------------------------------------


def make_release(root: Path, *, rehearse: bool) -> None:
    """Checks, builds, and checks again."""
    if not rehearse:
        check_changelog(root)
        check_tree(root)
    sdist, wheel = build(root, root / "dist")
    run(sys.executable, "-m", "twine", "check", "--strict", sdist, wheel, cwd=root)
    check_sdist(sdist)
    check_wheel(wheel)
    try_wheel(root, wheel)
    print(f"{sdist.name} and {wheel.name} are in dist/, and the README's example runs.")
    if not rehearse:
        print("Next: git push --follow-tags, and scripts/release.py upload")


def upload(root: Path) -> None:
    """Uploads the distributions of the version, once a person has typed it."""
    check_changelog(root)
    check_tree(root)
    version = read_version(root)
    files = sorted((root / "dist").glob(f"lora_jax-{version}*"))
    if len(files) != 2:
        raise ReleaseError(f"dist/ lacks a distribution of {version}: scripts/release.py build")
    names = " and ".join(file.name for file in files)
    if input(f"Type {version} to upload {names} for everybody: ").strip() != version:
        raise ReleaseError("Nothing was uploaded.")
    subprocess.run([sys.executable, "-m", "twine", "upload", *map(str, files)], check=True)


def main() -> None:
    """Runs one of the commands."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("prepare").add_argument("version")
    text = "without a tag, a clean tree and a version in the changelog"
    commands.add_parser("build").add_argument("--rehearse", action="store_true", help=text)
    commands.add_parser("upload")
    args = parser.parse_args()
    try:
        if args.command == "prepare":
            prepare(ROOT, args.version, datetime.date.today())
        elif args.command == "build":
            make_release(ROOT, rehearse=args.rehearse)
        else:
            upload(ROOT)
    except ReleaseError as error:
        sys.exit(f"release: {error}")


if __name__ == "__main__":
    main()
